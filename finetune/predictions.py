"""What an objective looks at: the model's logits at the tokens that have a loss, and which sequence each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.examples import IGNORED, OWN, require_rows
from finetune.pieces import cut_cache
from surgery.borrowing import text_positions, without_adapter
from surgery.decoding import common_prefix, prefix_cache

_STRIP = {"cpu": 1 << 21}  # logits in work at once: in float32 they stay in the cache
_STRIP_ELSEWHERE = 1 << 24
INPUTS = ("input_ids", "attention_mask", "pixel_values")


@dataclass(frozen=True)
class Totals:
    """What a loss is divided by: sums over the whole optimizer step, all its micro-batches and all processes.

    tokens: the weights of the learnt tokens. sequences, groups: their number. All at least 0, as floats.
    """

    tokens: float
    sequences: float
    groups: float

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Totals:
        """Those of one batch as `Collate` makes it (labels alone are enough: each has weight 1, each row is a group)."""
        wanted = batch["labels"][:, 1:] != IGNORED
        weights = batch.get("token_weights")
        rows = len(wanted)
        return cls(
            float(wanted.sum() if weights is None else weights[:, 1:][wanted].double().sum()),
            float(rows),
            float(len(batch["group"].unique()) if "group" in batch else rows),
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.tokens + other.tokens, self.sequences + other.sequences, self.groups + other.groups)


@dataclass(frozen=True)
class Predictions:
    """The labelled tokens of a batch, row by row, and what the model says of them.

    raw:       logits before the softmax where each token is predicted, in the precision that the model gave them.
    logits:    the same in float32 (float64 stays).
    targets:   the tokens. weights: of their losses. row: the sequence of the batch that each is in.
    rows:      how many sequences. sample, group: of each. columns: the other numbers that the data has, by name.
    totals:    of the whole optimizer step.
    reference: gives the logits of the frozen starting model at the same places, without gradient; None where nobody asked for it.
    numbered:  whether `sample` is the sequence's number in the data; else it is that in the batch.
    """

    raw: Float[Tensor, "token vocab"]
    targets: Int[Tensor, " token"]
    weights: Float[Tensor, " token"]
    row: Int[Tensor, " token"]
    rows: int
    sample: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    totals: Totals
    columns: Mapping[str, Float[Tensor, " rows"]] = field(default_factory=dict)
    reference: Callable[[], Float[Tensor, "token vocab"]] | None = None
    numbered: bool = True

    @cached_property
    def logits(self) -> Float[Tensor, "token vocab"]:
        return _wide(self.raw)

    @cached_property
    def nll(self) -> Float[Tensor, " token"]:
        """Negative log-likelihood of each token, in nats."""
        found: Any = _TokenNLL.apply(self.raw, self.targets)
        return found

    def per_row(self, values: Float[Tensor, " token"]) -> Float[Tensor, " rows"]:
        """Sums over the tokens of each sequence."""
        return values.new_zeros(self.rows).index_add(0, self.row, values)


def predict(
    module: Any, batch: Mapping[str, Tensor], share: bool = True, totals: Totals | None = None,
    reference: Callable[[], Tensor] | None = None, pieces: bool = False,
) -> Predictions:  # fmt: skip
    """The module's predictions at the labelled tokens of a batch padded on the right.

    totals: of the optimizer step; by default of this batch alone. Two savings leave the values as they are: only labelled positions
    reach the vocabulary, and the prompt that all rows begin with is computed once (`share`), its gradient being the sum of theirs; not where
    NEFTune's noise on the embeddings is drawn for each row. pieces: the prompt goes backward by itself (`finetune.pieces`).
    Raises ValueError for rows that are packed, or padded on the left.
    """
    require_rows(batch)
    labels = batch["labels"]
    wanted = labels[:, 1:] != IGNORED
    row, column = wanted.nonzero(as_tuple=True)
    rows = len(labels)
    weights = (
        batch["token_weights"][:, 1:][wanted] if "token_weights" in batch else torch.ones(len(row), device=row.device)
    )
    return Predictions(
        _raw_logits_at(module, batch, row, column, share, pieces),
        labels[row, column + 1],
        weights,
        row,
        rows,
        batch.get("sample", torch.arange(rows, device=row.device)),
        batch.get("group", torch.arange(rows, device=row.device)),
        totals or Totals.of(batch),
        {name: value for name, value in batch.items() if name not in OWN and value.shape == (rows,)},
        reference,
        "sample" in batch,
    )


def logits_at(
    module: Any,
    batch: Mapping[str, Tensor],
    row: Int[Tensor, " token"],
    column: Int[Tensor, " token"],
    share: bool = True,
    pieces: bool = False,
) -> Float[Tensor, "token vocab"]:
    """Logits in float32 of the positions (row, column) of a batch. share, pieces: as in `predict`."""
    return _wide(_raw_logits_at(module, batch, row, column, share, pieces))


def _raw_logits_at(
    module: Any, batch: Mapping[str, Tensor], row: Tensor, column: Tensor, share: bool, pieces: bool
) -> Tensor:
    """`logits_at` in the precision of the computation; in float32 where they are capped."""
    ids, mask, module = batch["input_ids"], batch["attention_mask"], without_adapter(module)
    start, cache = 0, None
    # layers that are recomputed in the backward pass would drop the cache of the prompt
    recomputed = module.training and getattr(module, "is_activation_checkpointing", False)
    # of the length of a row, too, by which it is scaled
    noisy = module.training and hasattr(module.get_input_embeddings(), "neftune_noise_alpha")
    if share and len(ids) > 1 and len(column) and not recomputed and not noisy and "pixel_values" not in batch:
        start = min(common_prefix(ids.tolist()), int(column.min()))
        cache = prefix_cache(module, ids[0, :start].tolist(), 1) if start else None
        start = 0 if cache is None else start
        if cache is not None:
            if pieces:
                cut_cache(cache)
            cache.batch_repeat_interleave(len(ids))
    rest = {name: batch[name] for name in INPUTS[2:] if name in batch}
    with text_positions(module):
        hidden = module.base_model(
            input_ids=ids[:, start:], attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **rest
        ).last_hidden_state
    logits = module.get_output_embeddings()(hidden[row, column - start])
    cap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(_wide(logits) / cap) * cap if cap else logits


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _TokenNLL(torch.autograd.Function):
    """``cross_entropy(logits.float(), targets, reduction="none")`` without a float32 copy of the logits, of their softmax or of their
    gradient: the vocabulary is taken a strip of tokens at a time, in float32, and the exponentials are computed again backwards."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        norms = torch.cat([_norms(work.copy_(strip)) for strip, work in _strips(logits)])
        ctx.save_for_backward(logits, targets, norms)
        return norms - _wide(logits.gather(1, targets[:, None])[:, 0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        found, start = torch.empty_like(logits), 0
        for strip, work in _strips(logits):
            now = slice(start, start := start + len(strip))
            chances = work.copy_(strip).sub_(norms[now, None]).exp_()
            chances.scatter_add_(1, targets[now, None], chances.new_full((len(strip), 1), -1.0))
            found[now] = chances.mul_(weights[now, None])
        return found, None


def _norms(logits: Tensor) -> Tensor:
    """The log of the sum of the exponentials of each row, which are left in place of the logits."""
    top = logits.amax(-1, keepdim=True)
    return (logits.sub_(top).exp_().sum(-1, keepdim=True).log_() + top)[:, 0]


def _strips(logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some tokens' logits at a time, and room for them in the precision of the work, the same room each time."""
    step = max(1, _STRIP.get(logits.device.type, _STRIP_ELSEWHERE) // max(1, logits.shape[1]))
    room = torch.empty_like(_wide(logits[:step]))
    for strip in logits.split(step):
        yield strip, room[: len(strip)]
