"""How likely a model finds given tokens, and how sure it is: teacher-forced negative log-likelihood and entropy over spans; plain text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.capture import pad_right
from probes.estimates import Estimate, percentile, resampled_means
from surgery.borrowing import evaluating
from surgery.model import Model
from surgery.rows import rows_are
from surgery.transcript import Transcript, nobody_has, positions

Row = tuple[Sequence[int], Sequence[int]]  # token ids, and which of them are scored
# log-probabilities at some places, and the tokens that stand there -> nats a token
Reading = Callable[[Float[Tensor, "token vocab"], Int[Tensor, " token"]], Float[Tensor, " token"]]


@dataclass(frozen=True)
class Likelihood:
    """Nats of some tokens under a model, item by item: their negative log-likelihood, or the entropy of what they were drawn from.

    ``nats[i]``: summed over item *i*, in nats; ``tokens[i]``: over how many tokens. ``missing``: items without the span.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    missing: int = 0
    seed: int = 0

    @property
    def per_item(self) -> tuple[float, ...]:
        """Mean nats per token of every item."""
        return tuple(nats / count for nats, count in zip(self.nats, self.tokens, strict=True))

    @cached_property
    def mean(self) -> Estimate:
        """Nats per token over all tokens (at least 0; lower is likelier, or surer), bootstrapped over items."""
        nats, tokens = np.array(self.nats), np.array(self.tokens)
        drawn = resampled_means(nats, tokens, 2000, self.seed)
        return percentile(nats.sum() / tokens.sum(), drawn, n=len(nats), seed=self.seed)

    def __str__(self) -> str:
        return f"{self.mean} nats per token over {sum(self.tokens)} tokens; {self.missing} missing"


def nll(
    model: Model, transcripts: Sequence[Transcript], over: str = "answer", *, batch_size: int = 16, seed: int = 0
) -> Likelihood:
    """Negative log-likelihood of one span of every transcript, given everything before it.

    ``over``: a span, or tokens of one ("answer", "answer[0]", "sentence[2]", ...; see `surgery.transcript.positions`). Transcripts
    without it are counted as missing; none with it is a ValueError. No padding enters: a batch of 8 is eight batches of 1.
    """
    return _over(model, transcripts, over, batch_size, seed, surprise)


def entropy(
    model: Model, transcripts: Sequence[Transcript], over: str = "thinking", *, batch_size: int = 16, seed: int = 0
) -> Likelihood:
    """Entropy of the distribution that each token of a span is drawn from, given everything before it: 0 to log(vocabulary) nats a token.

    Arguments and errors as `nll`.
    """
    return _over(model, transcripts, over, batch_size, seed, _uncertainty)


def text_nll(model: Model, texts: Sequence[str], *, batch_size: int = 16, seed: int = 0) -> Likelihood:
    """Negative log-likelihood of plain texts, without a chat template. The first token has nothing before it and is
    not scored, unless the tokenizer begins every text with a token of its own."""
    rows = passages(model, texts)
    return _likelihood(model, rows, [0] * len(rows), batch_size, seed, len(texts) - len(rows), surprise)


def passages(model: Model, texts: Sequence[str]) -> list[Row]:
    """Plain texts as rows to score, those of one token left out. Raises ValueError where none is left."""
    rows: list[Row] = [(ids, range(1, len(ids))) for ids in model.tokenizer(list(texts))["input_ids"] if len(ids) > 1]
    if not rows:
        raise ValueError(f"none of {len(texts)} texts is longer than one token")
    return rows


def _over(
    model: Model, transcripts: Sequence[Transcript], over: str, batch_size: int, seed: int, read: Reading
) -> Likelihood:
    places = [[p for p in positions(t, over) if p > 0] for t in transcripts]  # nothing predicts the first token
    kept = [(t, at) for t, at in zip(transcripts, places, strict=True) if at]
    if not kept:
        raise ValueError(nobody_has(transcripts, over))
    prompts = [t.spans.get("prompt", (0, 0))[1] for t, _ in kept]
    rows: list[Row] = [(t.ids, at) for t, at in kept]
    return _likelihood(model, rows, prompts, batch_size, seed, len(transcripts) - len(rows), read)


@contextmanager
def quiet(module: torch.nn.Module):
    """Evaluation mode without gradients; the mode is given back (a monitor measures inside a training loop)."""
    with evaluating(module), torch.inference_mode():
        yield


def keeping(module: torch.nn.Module, positions: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Arguments that make a causal model give logits at these positions only, and where they then are. A vocabulary is
    large: on a small model the unembedding is a fifth of all arithmetic."""
    positions = sorted(set(positions))
    if "logits_to_keep" not in inspect.signature(module.forward).parameters:
        return {}, positions
    device = next(module.parameters()).device
    return {"logits_to_keep": torch.tensor(positions, device=device)}, list(range(len(positions)))


def _likelihood(
    model: Model, rows: Sequence[Row], prompts: Sequence[int], batch_size: int, seed: int, missing: int, read: Reading
) -> Likelihood:
    nats = [0.0] * len(rows)
    with quiet(model.module):
        for row, log_p, said in predicted(model, rows, prompts, batch_size):
            nats[row] = read(log_p, said).cpu().double().sum().item()
    return Likelihood(tuple(nats), tuple(len(at) for _, at in rows), missing, seed)


def predicted(
    model: Model, rows: Sequence[Row], prompts: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Float[Tensor, "token vocab"], Int[Tensor, " token"]]]:
    """Which row, the log-probabilities at its scored tokens, and those tokens; every row once, short ones first.

    prompts: how many tokens of each row are its prompt. To be used within `quiet`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    module, device = model.module, next(model.module.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        # padding is on the right and attention looks left: no row sees it
        ids, mask = pad_right([rows[row][0][: rows[row][1][-1] + 1] for row in batch], model.pad_id)
        wanted = sorted({p - 1 for row in batch for p in rows[row][1]})
        keep, places = keeping(module, wanted)
        where = dict(zip(wanted, places, strict=True))
        with rows_are([prompts[row] for row in batch], batch):
            logits = module(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **keep).logits
        for line, row in enumerate(batch):
            scored = list(rows[row][1])
            yield (
                row,
                logits[line, [where[p - 1] for p in scored]].float().log_softmax(-1),
                ids[line, scored].to(device),
            )


def surprise(log_p: Float[Tensor, "token vocab"], target: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    return -log_p.gather(-1, target[:, None])[:, 0]


def _uncertainty(log_p: Float[Tensor, "token vocab"], target: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    return torch.special.entr(log_p.exp()).sum(-1)
