"""Which parts of a model write a direction of the residual stream, and which write a logit.

The stream is a sum: the embeddings, what each attention adds and what each MLP adds; and what an attention adds is a sum over its heads
and a bias. How far a sum reaches along a direction is the sum of how far its parts do, so one forward pass scores every part
exactly, and a head costs one number a token.

contributions        what the embeddings and each head, attention and MLP add along a direction
writers_of           the same for heads alone
logit_contributions  the same for a logit
ablations            the causal check: what changes when a head, an attention or an MLP is silenced

A norm *after* attention (Gemma, OLMo 2) divides by one number a token. It is taken as it was, `frozen`: a head's share of what attention
adds is then the gain times the head's output over that number, and the shares still sum to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.activations import as_spans, stream
from probes.capture import in_order
from probes.passes import Batch, batches, run
from probes.results import interval, load_tensors, save_tensors
from surgery.anatomy import Anatomy, Tap
from surgery.edits import gain
from surgery.model import Model, require_no_adapter
from surgery.numbers import require_whole
from surgery.rows import may_leave
from surgery.sites import Patterns, Site, match, nothing_matched
from surgery.transcript import Transcript, nobody_has, positions
from surgery.weights import require_numbers

if TYPE_CHECKING:
    import pandas as pd

_EMBED, _HEAD = Site(None, "embed"), Site(None, "head")
_CONSTANTS = (Site(None, "norm.bias"), Site(None, "head.bias"))
_KINDS = {"attn.o": "head", "attn.o.bias": "bias", "attn.out": "attention", "mlp.out": "mlp", "embed": "embed"}


# --- results --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each part of a model adds along a direction, transcript by transcript.

    sites:      the parts: heads at ``3.attn.o.h2`` (the columns that an edit takes), the bias beside them at ``3.attn.o.bias``, the whole
                of an attention at ``3.attn.out``, of an MLP at ``3.mlp.out``, token and position embeddings at ``embed``; and, named by
                its own site, the stream that they sum to. Of logits also the constants ``norm.bias`` and ``head.bias``.
    at:         for each part the site of the direction it is scored along.
    scores:     ``[transcript, part]``, fp64: the mean over the tokens of the span, in units of the activations (of logits, in nats).
    transcript: for each row of `scores` the index of the transcript; those that lack the span have none.
    question:   for each row its question: rows of one question are not independent.
    over:       the span.
    n_heads:    of the whole model.
    """

    sites: tuple[Site, ...]
    at: tuple[Site, ...]
    scores: Float[Tensor, "transcript part"]
    transcript: tuple[int, ...]
    question: tuple[str, ...]
    over: tuple[str, ...]
    n_heads: int

    def score(self, site: Site | str) -> float:
        """The mean score of one part over transcripts. Raises ValueError, listing what exists, for a part that was not scored."""
        wanted = Site.parse(site)
        if wanted not in self.sites:
            raise ValueError(nothing_matched(str(wanted), list(self.sites)))
        return float(self.scores[:, self.sites.index(wanted)].mean())

    @property
    def heads(self) -> Contributions:
        """The heads alone."""
        return self._only([i for i, site in enumerate(self.sites) if site.head is not None])

    def matrix(self) -> Float[Tensor, "layer head"]:
        """Mean scores of heads, fp64; NaN where a head was not scored."""
        found = self.heads
        if not found.sites:
            raise ValueError("No heads were scored here.")
        layers, heads = (1 + max(getattr(s, name) for s in found.sites) for name in ("layer", "head"))
        table = torch.full((layers, heads), math.nan, dtype=torch.float64)
        for site, value in zip(found.sites, found.scores.mean(0), strict=True):
            table[site.layer, site.head] = value
        return table

    def top(self, *, share: float | None = None, count: int | None = None) -> list[Site]:
        """The heads that write most along the direction, the first first: sites for an edit, as in ``apply(edit, weights, at=found.top(count=10))``.

        share: of all heads of the model, in (0, 1], rounded, at least one head. count: how many instead.
        A head that writes against the direction has a negative score and comes last: for those, score the opposite direction.
        Raises ValueError unless exactly one of the two is given, and where fewer heads were scored than are asked for.
        Source: ThinkEdit, arXiv 2503.22048, section 4.
        """
        if (share is None) == (count is None):
            raise ValueError("Ask for a share of the heads or for a count of them: one of the two.")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share={share}: of all heads, in (0, 1].")
        found = self.heads
        if count is not None:
            require_whole("count", count)
        wanted = max(1, round(share * self.n_heads)) if share is not None else count
        assert wanted is not None
        if not 1 <= wanted <= len(found.sites):
            raise ValueError(f"{wanted} heads were asked for; {len(found.sites)} of {self.n_heads} were scored.")
        order = torch.argsort(found.scores.mean(0), descending=True, stable=True)
        return [found.sites[i] for i in order[:wanted].tolist()]

    def frame(self, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
        """A row a part: layer, head, site, kind, at, score, low, high, n (questions).

        kind: head, bias, attention, mlp, embed, constant or stream. The stream is the sum of attention, mlp, embed and constant, each layer's
        attention that of its heads and bias. low, high: percentile bootstrap over questions, their transcripts with them; NaN from a
        single one.
        """
        import pandas as pd

        low, high, n = interval(self.scores, self.question, draws=draws, seed=seed, level=level)
        rows = [
            {"layer": s.layer, "head": s.head, "site": str(s), "kind": self._kind(s, at), "at": str(at)}
            for s, at in zip(self.sites, self.at, strict=True)
        ]
        table = pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})
        return table.assign(score=self.scores.mean(0).numpy(), low=low, high=high, n=n)

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all."""
        said = {name: getattr(self, name) for name in ("transcript", "question", "over", "n_heads")}
        said |= {"sites": [str(s) for s in self.sites], "at": [str(s) for s in self.at]}
        save_tensors(path, {"scores": self.scores}, said)

    @classmethod
    def load(cls, path: str | Path) -> Contributions:
        """What `save` wrote."""
        tensors, said = load_tensors(path, "scores")
        sites, at = (tuple(Site.parse(s) for s in said[name]) for name in ("sites", "at"))
        rest = {name: tuple(said[name]) for name in ("transcript", "question", "over")}
        return cls(sites, at, tensors["scores"], **rest, n_heads=said["n_heads"])

    def _only(self, kept: list[int]) -> Contributions:
        sites, at = (tuple(names[i] for i in kept) for names in (self.sites, self.at))
        return replace(self, sites=sites, at=at, scores=self.scores[:, kept])

    @staticmethod
    def _kind(site: Site, at: Site) -> str:
        return "stream" if site == at else _KINDS.get(site.part, "constant")


@dataclass(frozen=True, eq=False)
class Ablations:
    """What silencing each part changed, transcript by transcript.

    sites:      the parts (heads, attentions, MLPs), silenced one at a time.
    at:         for each the site of the direction at which the stream was read.
    projection: ``[transcript, part]``: the stream's mean component along the direction, as it was less as it became. What the part
                writes there by itself is its contribution; the rest is what later parts make of it.
    kl:         ``[transcript, part]``: mean KL divergence of the next-token distribution that became from the one that was, in nats, at least 0.
    nll:        ``[transcript, part]``: mean rise of the next token's negative log-likelihood, in nats.
    how:        ``zero``, or ``mean``: the part's output at every token is its mean over the span of these transcripts.
    """

    sites: tuple[Site, ...]
    at: tuple[Site, ...]
    projection: Float[Tensor, "transcript part"]
    kl: Float[Tensor, "transcript part"]
    nll: Float[Tensor, "transcript part"]
    transcript: tuple[int, ...]
    question: tuple[str, ...]
    over: tuple[str, ...]
    how: str

    def frame(self, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
        """A row a part and measure (projection, kl, nll): layer, head, site, at, measure, value, low, high, n (questions)."""
        import pandas as pd

        tables = []
        for measure in ("projection", "kl", "nll"):
            values: Tensor = getattr(self, measure)
            told = ~values.isnan().any(1)  # after the last token of a transcript nothing comes that could be likelier
            values, asked = values[told], [q for q, known in zip(self.question, told.tolist(), strict=True) if known]
            low, high, n = (
                interval(values, asked, draws=draws, seed=seed, level=level) if asked else (math.nan, math.nan, 0)
            )
            places = [
                {"layer": s.layer, "head": s.head, "site": str(s), "at": str(at), "measure": measure}
                for s, at in zip(self.sites, self.at, strict=True)
            ]
            places = pd.DataFrame(places).astype({"layer": "Int64", "head": "Int64"})
            tables.append(places.assign(value=values.mean(0).numpy(), low=low, high=high, n=n))
        return pd.concat(tables, ignore_index=True)

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all."""
        said = {name: getattr(self, name) for name in ("transcript", "question", "over", "how")}
        said |= {"sites": [str(s) for s in self.sites], "at": [str(s) for s in self.at]}
        save_tensors(path, {"projection": self.projection, "kl": self.kl, "nll": self.nll}, said)

    @classmethod
    def load(cls, path: str | Path) -> Ablations:
        """What `save` wrote."""
        tensors, said = load_tensors(path, "projection", "kl", "nll")
        sites, at = (tuple(Site.parse(s) for s in said[name]) for name in ("sites", "at"))
        rest = {name: tuple(said[name]) for name in ("transcript", "question", "over")}
        return cls(sites, at, tensors["projection"], tensors["kl"], tensors["nll"], **rest, how=said["how"])


# --- scores by linearity --------------------------------------------------------------------------------------------------------


def contributions(
    model: Model,
    direction: Tensor | Mapping[Any, Tensor],
    transcripts: Sequence[Transcript],
    *,
    over: str | Sequence[str] = "thinking",
    at: Patterns | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Contributions:
    """What every part of the model adds along a direction, averaged over the tokens of a span, in one forward pass.

    direction: one vector, read at the site `at` (by default the stream that leaves the last block), or a vector for each of several
               stream sites (``resid``, ``mid``), of which `at` may pick some. Vectors are taken at length 1.
    over:      the span; each transcript that has it weighs the same, whatever its length.

    A part is scored along the direction of the first site downstream of it: with a direction at every ``mid`` a head is scored where it
    writes (ThinkEdit), with one at ``14.mid`` alone all that leads up to it is, and sums to the stream's own component exactly.
    Parts after the last site are not scored, and the forward pass does not reach them. What `steered` adds is of no part: inside it the
    parts sum to the stream less that. Raises ValueError for a direction of another width,
    at another kind of site, zero or not finite, and where no transcript has the span.
    Source: ThinkEdit, arXiv 2503.22048, section 4, rearranged: ``<mean_t W_j z_tj, u> = mean_t <z_tj, W_jᵀ u>``, so that no vector of
    the stream's width is ever made for a head.
    """
    targets = _targets(model, direction, at)
    return _scores_along(model, targets, _parts(model.anatomy, targets), transcripts, over, batch_size, progress)


def writers_of(
    model: Model,
    direction: Tensor | Mapping[Any, Tensor],
    runs: Sequence[Transcript],
    *,
    over: str | Sequence[str] = "thinking",
    at: Patterns | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Contributions:
    """What every attention head adds along a direction: `contributions` of the heads alone. ``writers_of(...).top(share=0.04)`` are sites to edit."""
    targets = _targets(model, direction, at)
    parts = [p for p in _parts(model.anatomy, targets) if p.read.part == "attn.z"]
    if not parts:
        raise ValueError(f"No head writes before {', '.join(map(str, targets))}: nothing to rank.")
    heads = [replace(p, names=tuple(s for s in p.names if s.head is not None)) for p in parts]
    return _scores_along(model, targets, heads, runs, over, batch_size, progress)


def logit_contributions(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    over: str | Sequence[str] = "answer[0]",
    against: int | Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Contributions:
    """What every part of the model adds to the logit of the token that came, less the logit of another (direct logit attribution).

    over:    the tokens that are predicted: ``answer[0]`` asks what wrote the first token of the answer, and reads the stream at the token
             before it. The first token of a transcript is predicted by nothing and left out.
    against: the other token's id, one for all or one a transcript; None is the mean over the vocabulary.

    The final norm divides by one number a token, taken as it was; with its bias and the head's the parts sum to the model's own difference
    of logits exactly. Where a family caps its logits (Gemma 2), it is the difference before the cap. What a part changes in later parts
    is not counted. Raises ValueError for a token id outside the vocabulary, and where no transcript has the span.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    anatomy, wanted = model.anatomy, [[p - 1 for p in positions(t, over) if p > 0] for t in transcripts]
    others = _others(model, transcripts, against)
    final = Site(anatomy.n_layers, "resid")
    parts = _parts(anatomy, [final])
    constants = tuple(site for site in _CONSTANTS if site in anatomy.places)
    sites = (*(name for part in parts[:-1] for name in part.names), *constants, _HEAD)
    norm = _Norm(model, Site(None, "norm"))
    require_numbers(model.weights, _HEAD)
    unembedding = model.weights[_HEAD]
    average = unembedding.mean(0, dtype=torch.float32)
    bias = model.weights[Site(None, "head.bias")].float() if Site(None, "head.bias") in anatomy.places else None

    def score(batch: Batch) -> Float[Tensor, "row part"]:
        chosen = batch.ids[batch.row, batch.at + 1]
        if others is None:
            other, apart = None, unembedding[chosen].float() - average
        else:
            other = torch.tensor([others[i] for i in batch.members], device=chosen.device)[batch.row]
            apart = unembedding[chosen].float() - unembedding[other].float()
        fixed = []
        if norm.shift is not None:
            fixed.append(apart @ norm.shift)
        if bias is not None:
            fixed.append(bias[chosen] - (bias.mean() if other is None else bias[other]))
        vectors, last = norm.back(apart), {}
        rows = _scored(model, parts, batch, _Along(model, vectors=lambda _: vectors), last)
        rows = rows * norm.scale(last[final])
        fixed = torch.stack(fixed, 1) if fixed else rows[:, :0]
        return torch.cat([rows[:, :-1], fixed, rows[:, -1:] + fixed.sum(1, keepdim=True)], 1)

    scores, kept = _averaged(model, transcripts, wanted, len(sites), score, over, batch_size, progress)
    return _contributions(model, sites, (_HEAD,) * len(sites), scores, kept, transcripts, over)


# --- silencing parts ------------------------------------------------------------------------------------------------------------


@contextmanager
def ablated(model: Model, parts: Patterns, *, to: Mapping[Site, Tensor] | None = None) -> Iterator[Model]:
    """The model with some parts silenced: what they write is zero, at every token, or the fixed vectors `to`.

    parts: sites or patterns: heads as in ``3.attn.o.h2``, of which what they give to ``attn.o`` is silenced, and whole attentions and MLPs as
    in ``3.attn.out`` and ``3.mlp.out``. to: site -> vector; of heads the site is ``3.attn.z`` and the vector as wide as all heads
    together, of which the silenced ones take their part. Hooks are gone on leaving. Raises ValueError for a part that does not exist,
    and for vectors of another width or not finite.
    """
    chosen: dict[Site, list[slice]] = {}
    for site in _silent(model.anatomy, parts):
        chosen.setdefault(_read_at(site), []).append(_columns(model.anatomy, site))
    handles = []
    try:
        for site, slices in chosen.items():
            fixed = None if to is None else _fixed(model, site, to)
            handles.append(model.anatomy.tap(site).attach(model.module, _silencer(slices, fixed)))
        in_order()
        with may_leave(handles):  # all rows are treated alike
            yield model
    finally:
        for handle in handles:
            handle.remove()


def ablations(
    model: Model,
    direction: Tensor | Mapping[Any, Tensor],
    transcripts: Sequence[Transcript],
    parts: Patterns,
    *,
    over: str | Sequence[str] = "thinking",
    at: Patterns | None = None,
    how: Literal["zero", "mean"] = "mean",
    batch_size: int = 8,
    progress: bool = False,
) -> Ablations:
    """Silence parts one at a time and see what becomes of the direction and of the next-token distribution: a pass a part and batch.

    direction, over, at: as in `contributions`; a part is judged at the first site of the direction downstream of it. parts: heads,
    attentions and MLPs, as in `ablated`; such as ``contributions(...).top(count=10)``, or ``("*.attn.out", "*.mlp.out")``. how: ``zero``, or
    ``mean``: a part's mean output over the span, which leaves the model nearer to what it was trained on.
    Silencing acts at every token of the transcript; effects are averaged over the span. Raises ValueError for a part that does
    not exist or lies downstream of every site of the direction, and where no transcript has the span.
    """
    from probes.lens import next_token_losses

    if how not in ("zero", "mean"):
        raise ValueError(f"how={how!r}: silence a part with 'zero' or with its 'mean'.")
    anatomy, targets = model.anatomy, _targets(model, direction, at)
    silenced = _silent(anatomy, parts)
    downstream = []
    for site in silenced:
        target = _first_after(anatomy, targets, site if site.head is None else Site(site.layer, "attn.out"))
        if target is None:
            raise ValueError(f"{site} writes after {', '.join(map(str, targets))}: it cannot move the direction there.")
        downstream.append(target)
    wanted = [positions(t, over) for t in transcripts]
    to = None
    if how == "mean":
        to = _mean_outputs(model, transcripts, sorted(set(map(_read_at, silenced))), over, batch_size)
    final, count = Site(anatomy.n_layers, "resid"), len(silenced)

    def streams(batch: Batch) -> dict[Site, Tensor]:
        rows: dict[Site, Tensor] = {}
        keep = [(anatomy.tap(s), lambda x, s=s: rows.update({s: batch.rows(x)})) for s in {*targets, final}]
        run(model, batch, keep)
        return rows

    def score(batch: Batch) -> Float[Tensor, "row part"]:
        before, next_ids = streams(batch), batch.following()
        effects = []
        for site, target in zip(silenced, downstream, strict=True):
            with ablated(model, site, to=to):
                after = streams(batch)
            moved = (before[target] - after[target]) @ targets[target]
            kl, rise = next_token_losses(model, before[final], after[final], next_ids)
            effects.append(torch.stack([moved, kl, rise], 1))
        return torch.stack(effects, 2).flatten(1)

    scores, kept = _averaged(model, transcripts, wanted, 3 * count, score, over, batch_size, progress)
    projection, kl, nll = scores.split(count, 1)
    question = tuple(transcripts[i].question for i in kept)
    return Ablations(tuple(silenced), tuple(downstream), projection, kl, nll, kept, question, as_spans(over), how)


# --- one forward pass -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What adds to the stream: the activation it is read from, what its scores are called, and the site it is scored at."""

    read: Site
    names: tuple[Site, ...]
    at: Site


class _Norm:
    """The norm at a site with its scale frozen: ``shift + scale(x) * gain * x``, with x less its mean where the norm takes that."""

    def __init__(self, model: Model, site: Site):
        self._norm = model.module.get_submodule(model.anatomy.places[site].name.removesuffix(".weight"))
        self._centres, bias = isinstance(self._norm, nn.LayerNorm), Site(site.layer, f"{site.part}.bias")
        self.gain = gain(model.weights, site)
        self.shift = model.weights[bias].float() if bias in model.anatomy.places else None

    def back(self, vector: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """v with ``<v, gain * x> = <back(v), x>``."""
        pulled = vector * self.gain
        return pulled - pulled.mean(-1, keepdim=True) if self._centres else pulled

    def scale(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row 1"]:
        """What each row was multiplied by."""
        if isinstance(self._norm, nn.LayerNorm):
            return (x.var(-1, unbiased=False, keepdim=True) + self._norm.eps).rsqrt()
        before, after = (y.norm(dim=-1, keepdim=True) for y in (x * self.gain, self._norm.forward(x).float()))
        return torch.where(before > 0, after / before, 0.0)


class _Along:
    """The vector each part is scored along: as it lies in the stream, and read back through what mixes the heads.

    vectors: site -> ``[d]``, or a row's own ``[row, d]``.
    """

    def __init__(self, model: Model, vectors: Callable[[Site], Tensor]):
        require_no_adapter(model.module)  # scores are read back through the tensors alone
        self._model, self.vectors = model, vectors
        self._norms: dict[int, _Norm | None] = {}
        self._read: dict[_Part, tuple[Tensor, Tensor | None]] = {}

    def after(self, layer: int) -> _Norm | None:
        """The norm between ``attn.o`` and the stream, where there is one."""
        if layer not in self._norms:
            norm = self._model.anatomy.norm_after(Site(layer, "attn.o"))
            self._norms[layer] = None if norm is None else _Norm(self._model, norm)
        return self._norms[layer]

    def heads(self, part: _Part) -> tuple[Tensor, Tensor | None]:
        """(q, b): ``<q, z>`` is what z writes along the vector before a norm's scale, b what the bias does; None without one."""
        if part in self._read:
            return self._read[part]
        vector, layer = self.vectors(part.at), _layer(part.read)
        norm, weights = self.after(layer), self._model.weights
        require_numbers(weights, Site(layer, "attn.o"))
        pulled = vector if norm is None else norm.back(vector)
        bias = Site(layer, "attn.o.bias")
        written = pulled @ weights[bias].float() if bias in part.names else None
        read = pulled @ weights[Site(layer, "attn.o")].float(), written
        if vector.ndim == 1:  # the same for every batch
            self._read[part] = read
        return read


def _scored(
    model: Model, parts: Sequence[_Part], batch: Batch, along: _Along, last: dict[Site, Tensor] | None = None
) -> Float[Tensor, "asked part"]:
    """Each part's score at each token asked for; `last` is given the rows of the streams that parts are scored at."""
    found: dict[_Part, Tensor] = {}
    watched: list[tuple[Tap, Callable[[Tensor], None]]] = []

    def heads(part: _Part) -> None:
        norm = along.after(_layer(part.read))

        def see(z: Tensor) -> None:
            q, bias = along.heads(part)
            rows = batch.rows(z) * q
            each = rows.view(len(rows), model.anatomy.n_heads, -1).sum(-1)
            found[part] = each if bias is None else torch.cat([each, bias.expand(len(rows))[:, None]], 1)

        def rescale(mixed: Tensor) -> None:
            assert norm is not None
            found[part] = found[part] * norm.scale(batch.rows(mixed))

        tap = model.anatomy.tap(part.read)
        watched.append((tap, see))
        if norm is not None:
            watched.append((Tap(tap.path, "output"), rescale))

    def whole(part: _Part) -> None:
        def see(activation: Tensor) -> None:
            rows = batch.rows(activation)
            found[part] = (rows * along.vectors(part.at)).sum(-1, keepdim=True)
            if last is not None and part.read == part.at:
                last[part.at] = rows

        watched.append((model.anatomy.tap(part.read), see))

    for part in parts:
        (heads if part.read.part == "attn.z" else whole)(part)
    run(model, batch, watched)
    return torch.cat([found[part] for part in parts], 1)


def _averaged(
    model: Model,
    transcripts: Sequence[Transcript],
    wanted: Sequence[Sequence[int]],
    columns: int,
    score: Callable[[Batch], Tensor],
    over: str | Sequence[str],
    batch_size: int,
    progress: bool,
) -> tuple[Float[Tensor, "transcript part"], tuple[int, ...]]:
    """Scores of tokens, averaged within each transcript in fp64; a NaN is a token of which nothing can be said. And whose they are."""
    from tqdm.auto import tqdm

    kept = tuple(i for i in range(len(transcripts)) if wanted[i])
    if not kept:
        raise ValueError(nobody_has(transcripts, over))
    place = {i: k for k, i in enumerate(kept)}
    means = torch.zeros(len(kept), columns, dtype=torch.float64)
    with tqdm(total=len(kept), desc="attributing", disable=not progress, leave=False) as bar:
        for batch in batches(model, transcripts, wanted, batch_size):
            with torch.no_grad():
                scores = score(batch).cpu().double()
            row, missing = batch.row.cpu(), scores.isnan()
            sums, counts = (torch.zeros(len(batch.members), columns, dtype=torch.float64) for _ in range(2))
            sums.index_add_(0, row, scores.nan_to_num())
            counts.index_add_(0, row, (~missing).double())
            means[[place[i] for i in batch.members]] = sums / counts
            bar.update(len(batch.members))
    return means, kept


# --- what is asked for ----------------------------------------------------------------------------------------------------------


def _scores_along(
    model: Model,
    targets: Mapping[Site, Tensor],
    parts: Sequence[_Part],
    transcripts: Sequence[Transcript],
    over: str | Sequence[str],
    batch_size: int,
    progress: bool,
) -> Contributions:
    constant = _Along(model, targets.__getitem__)
    sites = tuple(name for part in parts for name in part.names)
    scores, kept = _averaged(
        model,
        transcripts,
        [positions(t, over) for t in transcripts],
        len(sites),
        lambda batch: _scored(model, parts, batch, constant),
        over,
        batch_size,
        progress,
    )
    return _contributions(model, sites, tuple(p.at for p in parts for _ in p.names), scores, kept, transcripts, over)


def _targets(
    model: Model, direction: Tensor | Mapping[Any, Tensor], at: Patterns | None
) -> dict[Site, Float[Tensor, " d"]]:
    """Site -> unit vector, in the order of the forward pass."""
    anatomy = model.anatomy
    final = Site(anatomy.n_layers, "resid")
    if isinstance(direction, Tensor):
        sites = [final] if at is None else match(at, anatomy.activation_sites())
        named = dict.fromkeys(sites, direction)
        if len(sites) != 1:
            raise ValueError(
                f"One vector is read at one site; {at} names {len(sites)}. Give a vector for each site, as a mapping."
            )
    else:
        require = getattr(direction, "require", None)
        if require is not None:
            require(model)
        if not all(isinstance(site, str | Site) for site in direction):
            raise ValueError(
                f"The directions are at {', '.join(map(str, direction))}: name stream sites, as in 3.mid or 3.resid."
            )
        named = {Site.parse(site): vector for site, vector in direction.items()}
        if at is not None:
            named = {site: named[site] for site in match(at, named)}
        if not named:
            raise ValueError("The direction has no site: nothing to score along.")
    for site, vector in named.items():
        anatomy.tap(site)  # raises where there is no such site
        if site.part not in ("resid", "mid"):
            raise ValueError(f"The direction is at {site}; parts are scored in the stream, at resid or mid.")
        if vector.shape != (anatomy.d_model,):
            raise ValueError(
                f"The direction at {site} has shape {tuple(vector.shape)}; this model's stream is {anatomy.d_model} wide."
            )
        length = float(vector.float().norm())
        if not 0 < length < math.inf:
            raise ValueError(f"The direction at {site} has length {length}: it must be finite and not zero.")
    ordered = sorted(named, key=anatomy.order)
    return {s: nn.functional.normalize(named[s].detach().float(), dim=0).to(model.device) for s in ordered}


def _first_after(anatomy: Anatomy, targets: Iterable[Site], site: Site) -> Site | None:
    """The first target downstream of what is added at a site."""
    return next((t for t in targets if anatomy.order(t) > anatomy.order(site)), None)


def _parts(anatomy: Anatomy, targets: Iterable[Site]) -> list[_Part]:
    """Everything that adds to the stream up to the last target, in the order of the forward pass, then the streams themselves."""
    targets = list(targets)
    parts = [_Part(Site(0, "resid"), (_EMBED,), targets[0])]
    for layer in range(anatomy.n_layers):
        out, mlp, bias = Site(layer, "attn.out"), Site(layer, "mlp.out"), Site(layer, "attn.o.bias")
        if target := _first_after(anatomy, targets, out):
            heads = tuple(Site(layer, "attn.o", head) for head in range(anatomy.n_heads))
            parts.append(_Part(Site(layer, "attn.z"), (*heads, *([bias] if bias in anatomy.places else [])), target))
            parts.append(_Part(out, (out,), target))
        if target := _first_after(anatomy, targets, mlp):
            parts.append(_Part(mlp, (mlp,), target))
    return [*parts, *(_Part(t, (t,), t) for t in targets)]


def _contributions(
    model: Model,
    sites: tuple[Site, ...],
    at: tuple[Site, ...],
    scores: Tensor,
    kept: tuple[int, ...],
    transcripts: Sequence[Transcript],
    over: str | Sequence[str],
) -> Contributions:
    question = tuple(transcripts[i].question for i in kept)
    heads = model.anatomy.n_layers * model.anatomy.n_heads
    return Contributions(sites, at, scores, kept, question, as_spans(over), heads)


def _others(model: Model, transcripts: Sequence[Transcript], against: int | Sequence[int] | None) -> list[int] | None:
    if against is None:
        return None
    if isinstance(against, str):
        raise ValueError(
            f"against={against!r}: a token is meant by its id, as in tokenizer(text, add_special_tokens=False).input_ids[0]."
        )
    others = list(against) if isinstance(against, Iterable) else [against] * len(transcripts)
    for token in others:
        require_whole("against", token)
    if len(others) != len(transcripts) or not all(0 <= token < model.anatomy.vocab for token in others):
        raise ValueError(
            f"against: one token id, or one for each of the {len(transcripts)} transcripts, from 0 to {model.anatomy.vocab - 1}; "
            f"{len(others)} were given, from {min(others, default=None)} to {max(others, default=None)}."
        )
    return others


def _silent(anatomy: Anatomy, parts: Patterns) -> list[Site]:
    """The heads, attentions and MLPs that sites or patterns name, each once. Raises ValueError for what names something else."""
    wanted = [parts] if isinstance(parts, str | Site) else list(parts)
    outputs = [s for s in anatomy.activation_sites() if s.part in ("attn.out", "mlp.out")]
    found = match(wanted, [*anatomy.places, *outputs]) if wanted else []
    others = [s for s in found if s not in outputs and (s.head is None or s.part != "attn.o")]
    if others or not found:
        raise ValueError(
            f"{others[0] if others else 'An empty list'} names no part that can be silenced: a head is a site like 3.attn.o.h2 (*.attn.o.h2 is "
            "head 2 of every layer), a whole attention 3.attn.out, an MLP 3.mlp.out."
        )
    for site in found:
        if site.head is not None:
            anatomy.head_slice(site)  # raises where there is no such head
    return found


def _read_at(part: Site) -> Site:
    """Where the output of a part that is silenced passes by."""
    return part if part.head is None else Site(part.layer, "attn.z")


def _columns(anatomy: Anatomy, part: Site) -> slice:
    return slice(None) if part.head is None else anatomy.head_slice(part)[1]


def _silencer(slices: Sequence[slice], fixed: Tensor | None) -> Callable[[Tensor], Tensor]:
    def silenced(z: Tensor) -> Tensor:
        z = z.clone()
        for columns in slices:
            z[..., columns] = 0 if fixed is None else fixed[columns].to(z)
        return z

    return silenced


def _mean_outputs(
    model: Model, transcripts: Sequence[Transcript], sites: Sequence[Site], over: str | Sequence[str], batch_size: int
) -> dict[Site, Float[Tensor, " width"]]:
    """What passes each site, averaged over the tokens of the spans, each token once, and then over the transcripts that have some."""
    sums: dict[Site, Tensor] = {}
    count = 0
    for batch in stream(model, transcripts, at=sites, over=over, batch_size=batch_size):
        _, place, tokens = batch.transcript.unique(return_inverse=True, return_counts=True)
        count += len(tokens)
        for site, rows in batch.values.items():
            means = (rows.double() / tokens[place, None]).sum(0)
            sums[site] = sums[site] + means if site in sums else means
    return {site: (total / count).float().to(model.device) for site, total in sums.items()}


def _fixed(model: Model, site: Site, to: Mapping[Site, Tensor]) -> Tensor:
    width = model.anatomy.width(site)
    if site not in to or to[site].shape != (width,):
        found = f"shape {tuple(to[site].shape)}" if site in to else "nothing"
        raise ValueError(f"To fix what passes {site} takes a vector of {width} numbers there; got {found}.")
    if not bool(torch.isfinite(to[site]).all()):
        raise ValueError(f"The vector to fix {site} to holds values that are NaN or infinite.")
    return to[site]


def _layer(site: Site) -> int:
    assert site.layer is not None
    return site.layer
