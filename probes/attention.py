"""Where a model looks: the attention its heads give to marked tokens.

Attention is causal, so what a token attended to while it was generated is what it attends to when the finished transcript is read
again. It is read again here, some queries at a time over a KV cache, and each layer's weights are added up and dropped as they come:
no table of tokens by tokens is kept. Only eager attention has weights to show, so it is switched on for the time, and given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.activations import as_spans
from probes.passes import Batch, batches
from probes.results import interval, load_tensors, save_tensors
from surgery.borrowing import text_positions
from surgery.model import Model
from surgery.numbers import require_whole
from surgery.sites import Site
from surgery.transcript import Transcript, positions

if TYPE_CHECKING:
    import pandas as pd

_MEASURES = ("mass", "uniform", "others", "marked", "unmarked")


@dataclass(frozen=True, eq=False)
class AttentionMass:
    """The attention that a span's tokens give to marked tokens, by layer and head, transcript by transcript.

    mass:     ``[transcript, layer, head]``: attention on all marked tokens together, 0 to 1, the mean over the span's tokens.
    uniform:  ``[transcript, layer]``: what it would be if attention were spread evenly over all tokens that a token can see; smaller as
              the context grows, and where a sliding window has left the marked tokens behind.
    others:   ``[transcript, layer, head]``: attention on the prompt's other tokens together, less the first of all, which soaks up
              attention whatever it is.
    marked:   ``[transcript]``: how many tokens are marked. unmarked: how many the prompt's others are.
    to, over: the marked tokens and the span that looks at them.
    """

    mass: Float[Tensor, "transcript layer head"]
    uniform: Float[Tensor, "transcript layer"]
    others: Float[Tensor, "transcript layer head"]
    marked: Float[Tensor, " transcript"]
    unmarked: Float[Tensor, " transcript"]
    transcript: tuple[int, ...]
    question: tuple[str, ...]
    to: tuple[str, ...]
    over: tuple[str, ...]

    def frame(self, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
        """A row a layer, head and measure: layer, head, measure, value, low, high, n (questions).

        mass:     of the attention, 0 to 1. excess: mass less the even share, so that 0 is chance at any length of context.
        per_token: mass on a marked token less that on one of the prompt's other tokens, times how many are marked; 0 where the marked are
                  like the rest. Without the transcripts whose prompt has no other tokens. low, high: percentile bootstrap over questions.
        """
        import pandas as pd

        layers, heads = self.mass.shape[1:]
        places = pd.DataFrame([{"layer": layer, "head": head} for layer in range(layers) for head in range(heads)])
        tables = []
        for measure, (values, question) in self._measures().items():
            flat = values.flatten(1).double()
            low, high, n = interval(flat, question, draws=draws, seed=seed, level=level)
            tables.append(places.assign(measure=measure, value=flat.mean(0).numpy(), low=low, high=high, n=n))
        return pd.concat(tables, ignore_index=True)

    def summary(self, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
        """The same, averaged over layers and heads first: the paper's number. measure, value, low, high, n."""
        import pandas as pd

        rows = []
        for measure, (values, question) in self._measures().items():
            means = values.double().mean((1, 2))[:, None]
            low, high, n = interval(means, question, draws=draws, seed=seed, level=level)
            rows.append({"measure": measure, "value": float(means.mean()), "low": low[0], "high": high[0], "n": n})
        return pd.DataFrame(rows)

    def drop(self, other: AttentionMass, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
        """What is lost from here to another result, question by question: without thinking less with it, say. As `summary`.

        Transcripts of a question are averaged first; questions that one of the two lacks are left out. Raises ValueError where
        they have no question in common.
        """
        import pandas as pd

        if not set(self.question) & set(other.question):
            raise ValueError("The two have no question in common: attention is compared question by question.")
        rows, mine, theirs = [], self._measures(), other._measures()
        for measure in (m for m in mine if m in theirs):
            shared = [q for q in dict.fromkeys(mine[measure][1]) if q in theirs[measure][1]]
            if not shared:
                continue
            before, after = (_by_question(*found[measure], shared) for found in (mine, theirs))
            low, high, n = interval((before - after)[:, None], shared, draws=draws, seed=seed, level=level)
            value = float((before - after).mean())
            rows.append({"measure": measure, "value": value, "low": low[0], "high": high[0], "n": n})
        return pd.DataFrame(rows)

    def _measures(self) -> dict[str, tuple[Float[Tensor, "transcript layer head"], tuple[str, ...]]]:
        """Each measure of the transcripts that have it, and their questions; none that no transcript has."""
        found = {"mass": (self.mass, self.question), "excess": (self.mass - self.uniform[:, :, None], self.question)}
        with_others = (self.unmarked > 0).nonzero()[:, 0].tolist()
        if with_others:
            expected = self.others * (self.marked / self.unmarked)[:, None, None]
            apart = (self.mass - expected)[with_others]
            found["per_token"] = (apart, tuple(self.question[i] for i in with_others))
        return found

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all."""
        said = {name: getattr(self, name) for name in ("transcript", "question", "to", "over")}
        save_tensors(path, {name: getattr(self, name) for name in _MEASURES}, said)

    @classmethod
    def load(cls, path: str | Path) -> AttentionMass:
        """What `save` wrote."""
        tensors, said = load_tensors(path, *_MEASURES)
        rest: dict[str, Any] = {name: tuple(value) for name, value in said.items()}
        return cls(**tensors, **rest)


def attention(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    to: str | Sequence[str],
    over: str | Sequence[str] = "completion",
    queries: int = 128,
    batch_size: int = 8,
    progress: bool = False,
) -> AttentionMass:
    """The attention that each head gives to marked tokens while it writes a span (constraint attention).

    to:      what is marked: spans, most often part of the prompt, as in ``prompt~/no commas/``. over: the tokens that look.
    queries: how many tokens are read at a time: bounds the memory, which is that of one layer's ``[batch, head, queries, tokens]``,
             and changes nothing else.
    A transcript that lacks either span has no row. With grouped queries each query head counts by itself; in a sliding window only what
    is in sight. Raises ValueError where no transcript has both spans, and for a family whose eager attention shows no weights.
    Source: arXiv 2505.11423, whose constraint attention is `summary`'s mass: mean over layers, heads and answer tokens; what thinking takes
    from it is ``attention(plain, over="answer").drop(attention(thought, over="answer"))``. Differs: chance is shown beside it, since
    attention on any fixed tokens thins out as the context grows.
    """
    from tqdm.auto import tqdm

    require_whole("queries", queries, 1)
    marks, looking = ([positions(t, span) for t in transcripts] for span in (to, over))
    wanted = [asked if marked else [] for marked, asked in zip(marks, looking, strict=True)]
    kept = tuple(i for i in range(len(transcripts)) if wanted[i])
    if not kept:
        raise ValueError(
            f"None of the {len(transcripts)} transcripts has both {to!r} and {over!r}: "
            f"{sum(map(bool, marks))} have the first, {sum(map(bool, looking))} the second."
        )
    others = [sorted(set(positions(t, "prompt")) - set(m) - {0}) for t, m in zip(transcripts, marks, strict=True)]
    shape = (len(kept), model.anatomy.n_layers, model.anatomy.n_heads)
    mass, rest, even = (torch.zeros(s, dtype=torch.float64) for s in (shape, shape, shape[:2]))
    place = {i: k for k, i in enumerate(kept)}
    with (
        eager(model),
        text_positions(model.module),
        tqdm(total=len(kept), desc="looking", disable=not progress, leave=False) as bar,
    ):
        for batch in batches(model, transcripts, wanted, batch_size):
            sums = _Sums(model, batch, [marks[i] for i in batch.members], [others[i] for i in batch.members])
            sums.read(queries)
            rows = [place[i] for i in batch.members]
            mass[rows], rest[rows], even[rows] = (x.cpu().double() for x in sums.means())
            bar.update(len(batch.members))
    marked, unmarked = (torch.tensor([float(len(x[i])) for i in kept]) for x in (marks, others))
    question = tuple(transcripts[i].question for i in kept)
    return AttentionMass(mass, even, rest, marked, unmarked, kept, question, as_spans(to), as_spans(over))


@contextmanager
def eager(model: Model) -> Iterator[Model]:
    """The model with eager attention, whose weights can be seen; its own implementation comes back on leaving."""
    found: Any = (getattr(m, "config", None) for m in model.module.modules())
    configs = {id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield model
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


class _Sums:
    """Adds up, layer by layer, the attention of a batch's queries on two sets of tokens."""

    def __init__(self, model: Model, batch: Batch, marked: Sequence[Sequence[int]], others: Sequence[Sequence[int]]):
        self._model, self._batch = model, batch
        self._sets = torch.stack([_indicator(batch, rows) for rows in (marked, others)], -1)  # [batch, token, set]
        self._asks = torch.zeros_like(batch.mask, dtype=torch.float32)
        self._asks[batch.row, batch.at] = 1
        shape = (len(batch.members), model.anatomy.n_layers)
        device = batch.ids.device
        self._mass = torch.zeros(*shape, model.anatomy.n_heads, 2, device=device)
        self._even = torch.zeros(*shape, device=device)
        self._now = slice(0, 0)

    @torch.no_grad()
    def read(self, queries: int) -> None:
        """Forward passes over the batch, `queries` tokens at a time."""
        from transformers import DynamicCache

        model, ids, mask = self._model, self._batch.ids, self._batch.mask
        model.require_room(ids.shape[1])
        cache = DynamicCache(config=model.module.config)
        handles = []
        try:
            for layer in range(model.anatomy.n_layers):
                path = model.anatomy.tap(Site(layer, "attn.z")).path.rpartition(".")[0]
                inner = model.module.get_submodule(path)
                handles.append(inner.register_forward_hook(self._adder(layer), with_kwargs=True))
            for start in range(0, int(self._batch.at.max()) + 1, queries):
                end = min(start + queries, ids.shape[1])
                self._now = slice(start, end)
                with self._batch.announced():
                    model.module.base_model(
                        input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
                    )
        finally:
            for handle in handles:
                handle.remove()

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        count = self._asks.sum(1)
        mass = self._mass / count[:, None, None, None]
        return mass[..., 0], mass[..., 1], self._even / count[:, None]

    def _adder(self, layer: int) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                raise ValueError(f"Attention of this {self._model.anatomy.family} shows no weights, though eager.")
            keys = slice(self._now.stop - weights.shape[-1], self._now.stop)  # a sliding cache holds only the last
            asks, sets = self._asks[:, self._now], self._sets[:, keys]
            self._mass[:, layer] += torch.einsum("bhqk,bq,bks->bhs", weights.float(), asks, sets)
            seen = self._visible(kwargs.get("attention_mask"), weights)
            share = (seen @ sets[..., :1])[..., 0] / seen.sum(-1).clamp_min(1)
            self._even[:, layer] += (share * asks).sum(1)

        return add

    def _visible(self, mask: Tensor | None, weights: Tensor) -> Float[Tensor, "batch query key"]:
        """1 where a query can see a key: what the mask that the layer was given lets through."""
        batch, _, queries, keys = weights.shape
        if mask is None:
            if queries > 1:
                raise ValueError(
                    f"Attention of this {self._model.anatomy.family} was given no mask: what it sees is not known."
                )
            return torch.ones(batch, queries, keys, device=weights.device)
        seen = mask if mask.dtype == torch.bool else mask >= 0
        return seen[..., :keys].expand(batch, 1, queries, keys)[:, 0].float()


def _by_question(
    values: Float[Tensor, "transcript layer head"], question: Sequence[str], wanted: Sequence[str]
) -> Float[Tensor, " question"]:
    means = values.double().mean((1, 2))
    return torch.stack([means[[i for i, q in enumerate(question) if q == name]].mean() for name in wanted])


def _indicator(batch: Batch, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch token"]:
    table = torch.zeros_like(batch.mask, dtype=torch.float32)
    for r, found in enumerate(rows):
        table[r, list(found)] = 1
    return table
