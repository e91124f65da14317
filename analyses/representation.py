"""Drift: how far a model's representations, and its output distributions, have moved from another's on the same tokens.

Five measures compare rows ``X`` (base) with rows ``Y`` (tuned), one row a token:

mean_shift       how far the average state has moved, in units of the base's own spread. 0 is no move; no upper end
relative_change  how far the states have moved one by one, same units. At least ``mean_shift``, up to (n - 1)/n
cka              whether the states are alike up to rotation and scale: 1 is the same, about 0 unrelated
angle_mean,      between the k-dimensional principal subspaces: 0 to 90 degrees
angle_max

The first two are aligned (a tuned model shares its base's axes), the third is not: a small ``cka`` change beside a large
``relative_change`` is a rotation. The first token of a text is never a row: its state is an outlier in most models and
would decide every variance.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.statistics import bootstrap
from probes.activations import Activations, as_spans, collect
from probes.capture import pad_right
from probes.estimates import Estimate, percentile, resamples
from surgery.linalg import each_matrix, principal_angles, principal_subspace
from surgery.model import Model
from surgery.rows import rows_are
from surgery.sites import Site
from surgery.transcript import Transcript, nobody_has, positions
from surgery.whole import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GROUPS = 20  # transcripts are dealt into this many groups for the jackknife
_RITZ = 64  # principal components kept when only the spread of an angle is wanted
_CKA_SPLITS = 50  # split halves for the floor of CKA
_ANGLE_SPLITS = 3  # split halves for the angles' floor: each costs two eigendecompositions


def mean_shift(X: Float[Tensor, "row d"], Y: Float[Tensor, "other d"]) -> float:
    """``||mean(Y) - mean(X)|| / sqrt(tr Cov(X))``: the move of the average, in units of the base's spread; 0 or more.

    The rows need not be the same ones, so the same number between two halves of the base is its noise. NaN where the base
    does not vary. Errors: ValueError for fewer than two base rows.
    Source: proposed for this toolkit after Huan et al. (2025), arXiv 2507.00432.
    Differs: their PCA shift keeps two components of uncentred, padding-included means; this keeps the whole vector.
    """
    if len(X) < 2:
        raise ValueError(f"a spread needs at least two base rows, got {len(X)}")
    centre = X.double().mean(dim=0)
    variance = float((X.double() - centre).square().sum()) / (len(X) - 1)
    return _ratio(float(torch.linalg.vector_norm(Y.double().mean(dim=0) - centre)), variance)


def relative_change(X: Float[Tensor, "row d"], Y: Float[Tensor, "row d"]) -> float:
    """``||Y - X||_F / ||X - mean(X)||_F``: the move of the states one by one, in units of the base's spread; 0 or more.

    NaN where the base does not vary. Errors: ValueError for fewer than two rows.
    """
    if len(X) < 2:
        raise ValueError(f"a spread needs at least two rows, got {len(X)}")
    X, Y = X.double(), Y.double()
    return _ratio(float(torch.linalg.vector_norm(Y - X)), float((X - X.mean(dim=0)).square().sum()))


def linear_cka(X: Float[Tensor, "row d"], Y: Float[Tensor, "row e"]) -> float:
    """Debiased linear CKA of the same rows seen twice: 1 for rotated or rescaled copies, near 0 for unrelated ones.

    A ratio of unbiased HSIC estimates, so unrelated rows score 0 on average however few they are (the plain form is biased
    towards 1 when there are fewer rows than dimensions); it may fall slightly outside [0, 1]. NaN where either set has no
    more variation than chance. Costs O(row d e) or O(row^2 (d + e)), whichever is less.

    Tokens of one text are alike: the estimate treats rows as independent, its interval (`drift`) does not.

    Errors: ValueError for fewer than four rows, or different numbers of them.
    Source: Kornblith et al. (2019), arXiv 1905.00414, with HSIC_1 of Song et al. (2012), JMLR 13, equation 5.
    """
    if len(X) != len(Y):
        raise ValueError(f"CKA compares the same rows, got {len(X)} and {len(Y)}")
    if len(X) < 4:
        raise ValueError(f"debiased CKA needs at least four rows, got {len(X)}")
    X, Y = X.float(), Y.float()
    everyone = torch.zeros(len(X), dtype=torch.long)
    return float(_subset_cka(X - X.mean(dim=0), Y - Y.mean(dim=0), everyone, torch.ones(1, 1, dtype=torch.double)))


def subspace_angles(X: Float[Tensor, "row d"], Y: Float[Tensor, "other d"], k: int) -> tuple[float, float]:
    """Mean and largest principal angle, in degrees [0, 90], between the spans of the top k principal components.

    Each side is centred by its own mean. The largest angle is unstable where the k-th and the next variance are close.

    Errors: ValueError unless ``1 <= k < min(row, other)`` and ``k <= d``.
    Source: Bjorck and Golub (1973), "Numerical methods for computing angles between linear subspaces".
    """
    rows = min(len(X), len(Y))
    if not 1 <= k <= min(rows - 1, X.shape[1]):
        raise ValueError(f"{k} principal components were asked of {rows} rows of width {X.shape[1]}: ask for fewer")
    return _angles(_components(X, k), _components(Y, k))


@dataclass(frozen=True)
class DriftRow:
    """One measure at one layer over one span. ``low`` to ``high`` is its 95 % interval, ``method`` how that was made.

    ``floor`` is what the measure shows without any tuning; see `drift`.
    """

    layer: int
    span: str
    measure: str
    value: float
    low: float
    high: float
    floor: float
    n_rows: int
    n_transcripts: int
    method: str


class _Found(NamedTuple):
    measure: str
    value: float
    low: float
    high: float
    floor: float
    method: str


@dataclass(frozen=True)
class Drift:
    """What `drift` found; reloads without a model."""

    rows: tuple[DriftRow, ...]
    k: int
    draws: int
    seed: int

    def frame(self) -> "pd.DataFrame":
        """One row a (layer, span, measure): value, low, high, floor, n_rows, n_transcripts, method, k, seed."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows]).assign(k=self.k, seed=self.seed)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(Path(path), json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Drift":
        """What `save` wrote."""
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**found, "rows": tuple(DriftRow(**row) for row in found["rows"])})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Measures against layers, with their floors."""
        from analyses import figures

        return figures.drift(self.frame(), ax)

    def _repr_html_(self) -> str:
        return self.frame().to_html(max_rows=24, float_format="%.4g")


def drift(
    base: Model | Activations,
    tuned: Model | Activations,
    transcripts: Sequence[Transcript],
    *,
    over: str | Sequence[str] = ("thinking", "answer"),
    layers: Sequence[int] | None = None,
    k: int = 8,
    draws: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Drift:
    """Compare two models' residual streams on the same tokens: every layer, every span, five measures.

    base, tuned  models, or Activations already collected from these transcripts
    over         spans, or tokens of them (`surgery.transcript.positions`). A transcript without one adds nothing to it
    layers       residual streams, 0 to n_layers; all (that the Activations have) by default
    k            principal components whose span is compared
    draws        bootstrap samples, and split halves, of the two mean measures

    Intervals resample transcripts, never tokens. For the two norms they are basic bootstraps, ``2 value - quantile`` (noise
    lengthens a norm, so that samples lie above the value as the value lies above the truth), widened to hold the value;
    for ``cka`` and the angles a jackknife over at most 20 groups of transcripts (a resample repeats rows, which the debiased estimate
    would read as agreement). Angles inside the jackknife are taken within the leading 64 components of the whole: the
    point estimate is exact, only its spread is approximated. An angle between estimated subspaces is itself enlarged by
    having few rows: its interval is about spread alone.

    Floors, each an average over random halves of the *transcripts*:
    ``mean_shift``       the same statistic between two halves of the base.
    ``angle_*``          likewise, between the halves' own principal subspaces.
    ``relative_change``, ``cka``  compare row with row, so that without any change they are 0 and 1 exactly and have no
    noise of that kind. What is given is how far the choice of texts decides them: the difference of the statistic
    between two halves (for ``cka``, 1 minus it). Unlike the others it shrinks as the drift does.
    Halves hold half the rows, so floors lie above what the whole set would show.

    Errors: ValueError when the two were not read from the same tokens, or a span has too few rows for k.
    """
    from tqdm.auto import tqdm

    spans = as_spans(over)
    a, b = (_activations(m, transcripts, spans, layers, progress) for m in (base, tuned))
    if not (torch.equal(a.transcript, b.transcript) and torch.equal(a.position, b.position)):
        raise ValueError(
            "the two sets of activations are not from the same tokens: collect both over the same transcripts"
        )
    streams = [[s for s in acts.sites if s.part == "resid"] for acts in (a, b)]
    sites = streams[0] if layers is None else [Site(layer, "resid") for layer in sorted(set(layers))]
    absent = [s for s in sites if not all(s in side for side in streams)]
    if absent or not sites:
        there = [", ".join(map(str, side)) or "none" for side in streams]
        raise ValueError(
            f"No residual stream to compare at {', '.join(map(str, absent)) or 'any layer'}: the base's activations have {there[0]}; the tuned one's {there[1]}."
        )
    where = {span: _span_rows(a, transcripts, span, k) for span in spans}
    cells = [(span, site) for span in spans for site in sites]
    with tqdm(total=len(cells), desc="drift", disable=not progress, leave=False) as bar:

        def compare(cell: tuple[str, Site]) -> list[DriftRow]:
            span, site = cell
            keep, unit = where[span]
            found = _compare(a[site][keep].float(), b[site][keep].float(), unit, k, draws, seed)
            bar.update()
            texts = int(unit.max()) + 1
            layer = site.layer or 0
            return [DriftRow(layer, span, n_rows=len(unit), n_transcripts=texts, **f._asdict()) for f in found]

        rows = [row for cell in each_matrix(compare, cells) for row in cell]
    return Drift(tuple(rows), k, draws, seed)


@torch.no_grad()
def output_kl(
    base: Model,
    tuned: Model,
    transcripts: Sequence[Transcript],
    over: str | Sequence[str] = ("thinking", "answer"),
    *,
    batch_size: int = 4,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """For each span, the mean of ``KL(tuned || base)`` a token, in nats, 0 or more, over the whole vocabulary.

    The two distributions are those from which each token of the span was (or would have been) drawn, given all before
    it. It is an average over *these* transcripts: texts of the base, of the tuned model and a fixed corpus give three
    different numbers, so say whose they are. Tokens weigh equally; the interval resamples transcripts.

    Errors: ValueError when no transcript has a span, or the vocabularies differ.
    Source: the exact form of what Huan et al. (2025), arXiv 2507.00432, estimate from sampled tokens.
    Differs: no absolute value, no skipped token.
    """
    spans = as_spans(over)
    order = sorted(range(len(transcripts)), key=lambda i: len(transcripts[i].ids))
    divergence: list[np.ndarray] = [np.empty(0)] * len(transcripts)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        logits = [_logits(model, transcripts, batch) for model in (tuned, base)]
        for i, (p, q) in zip(batch, zip(*logits, strict=True), strict=True):
            if p.shape != q.shape:
                raise ValueError(f"vocabularies differ: {p.shape[-1]} tokens against {q.shape[-1]}")
            p, q = p.float().log_softmax(dim=-1), q.float().log_softmax(dim=-1)
            divergence[i] = (p.exp() * (p - q)).sum(dim=-1).clamp_min(0).cpu().double().numpy()
    found: dict[str, Estimate] = {}
    for span in spans:
        values, owners = [], []
        for i, transcript in enumerate(transcripts):
            at = [p - 1 for p in positions(transcript, span) if p > 0]  # entry j is for token j + 1
            values.append(divergence[i][at])
            owners.append(np.full(len(values[-1]), i))
        if not sum(map(len, values)):
            raise ValueError(nobody_has(transcripts, span))
        found[span] = bootstrap(np.concatenate(values), clusters=np.concatenate(owners), draws=draws, seed=seed)
    return found


def _logits(
    model: Model, transcripts: Sequence[Transcript], batch: Sequence[int]
) -> list[Float[Tensor, "token vocab"]]:
    """Each text's logits, all positions but the last. Padded on the right, where causal attention cannot see it."""
    texts = [transcripts[i].ids for i in batch]
    ids, mask = pad_right(texts, model.pad_id)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with rows_are([transcripts[i].spans.get("prompt", (0, 0))[1] for i in batch], batch):
        logits = model.module(**inputs, use_cache=False).logits
    return [logits[row, : len(text) - 1] for row, text in enumerate(texts)]


def _activations(
    source: Model | Activations,
    transcripts: Sequence[Transcript],
    spans: Sequence[str],
    layers: Sequence[int] | None,
    progress: bool,
) -> Activations:
    if isinstance(source, Activations):
        return source
    at = "*.resid" if layers is None else [Site(layer, "resid") for layer in layers]
    return collect(source, transcripts, at=at, over=spans, progress=progress)


def _span_rows(
    acts: Activations, transcripts: Sequence[Transcript], span: str, k: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
    """Which rows lie in the span, and which of the contributing transcripts each is from."""
    keep = rows_in(acts, transcripts, span)
    if not len(keep):
        raise ValueError(f"no activations in the span {span!r}: they were collected over {', '.join(acts.over)}")
    width = min(acts[site].shape[1] for site in acts.sites)
    if not 1 <= k <= width:
        raise ValueError(f"k {k}: principal components of rows of width {width} number 1 to {width}.")
    texts, unit = acts.transcript[keep].long().unique(return_inverse=True)
    if len(keep) < 2 * (k + 1):
        fewer = f", or a k of at most {len(keep) // 2 - 1}" if len(keep) >= 4 else ""
        raise ValueError(
            f"{k} principal angles (k) of the span {span!r} need {2 * (k + 1)} of its tokens, {k + 1} in each half; the {len(texts)} transcripts that "
            f"have it have {len(keep)}. Give about {math.ceil(2 * (k + 1) * len(texts) / len(keep))} transcripts (of `surgery measure`, --count){fewer}."
        )
    return keep, unit


def rows_in(acts: Activations, transcripts: Sequence[Transcript], span: str) -> Int[Tensor, " kept"]:
    """Which rows lie in the span, in order: also those collected under another span, the first token of a text never.

    Raises ValueError for rows that are means of several tokens.
    """
    if (acts.position < 0).any():
        raise ValueError(
            "These activations are means over spans, and drift is of single tokens: collect them without pooling (pool=None)."
        )
    inside = torch.zeros(len(transcripts), max((len(t.ids) for t in transcripts), default=1), dtype=torch.bool)
    for i, transcript in enumerate(transcripts):
        inside[i, positions(transcript, span)] = True
    inside[:, 0] = False
    return inside[acts.transcript.long(), acts.position.long()].nonzero().squeeze(1)


def _compare(
    X: Float[Tensor, "row d"],
    Y: Float[Tensor, "row d"],
    unit: Int[Tensor, " row"],
    k: int,
    draws: int,
    seed: int,
) -> list[_Found]:
    """Every measure of one site over one span; ``unit`` numbers the transcripts from 0."""
    units = int(unit.max()) + 1
    rng = np.random.default_rng(seed)
    dealt = torch.from_numpy(rng.permutation(units) % GROUPS)
    centre = X.mean(dim=0)
    X, Y = X - centre, Y - centre
    return [
        *_mean_measures(X, Y, unit, units, draws, seed),
        *_group_measures(X, Y, dealt[unit], min(units, GROUPS), k, rng),
    ]


def _mean_measures(
    X: Float[Tensor, "row d"], Y: Float[Tensor, "row d"], unit: Int[Tensor, " row"], units: int, draws: int, seed: int
) -> list[_Found]:
    """Mean shift and relative change. Every resample is a product with per-transcript sums."""
    moved = Y - X
    size, spread, change = (
        torch.zeros(units, dtype=torch.double).index_add_(0, unit, v.double())
        for v in (torch.ones(len(X)), X.square().sum(dim=1), moved.square().sum(dim=1))
    )
    sums, moves = (
        torch.zeros(units, X.shape[1], dtype=torch.double).index_add_(0, unit, v.double()) for v in (X, moved)
    )

    def measures(weight: Float[Tensor, "sample unit"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = weight @ size
        mean = (weight @ sums) / n[:, None]
        scatter = weight @ spread - n * mean.square().sum(dim=1)
        shift = ((weight @ moves) / n[:, None]).norm(dim=1) / (scatter / (n - 1)).sqrt()
        return shift, ((weight @ change) / scatter).sqrt(), mean, scatter / (n - 1)

    shift, relative, _, _ = measures(torch.ones(1, units, dtype=torch.double))
    drawn_shift, drawn_relative, _, _ = measures(torch.from_numpy(resamples(units, draws, seed)).double())
    floor_shift = floor_relative = math.nan
    if units > 1:
        half = _halves(units, draws, np.random.default_rng(seed))
        _, relative_a, mean_a, variance_a = measures(half)
        _, relative_b, mean_b, _ = measures(1 - half)
        floor_shift = float(((mean_a - mean_b).norm(dim=1) / variance_a.sqrt()).mean())
        floor_relative = float((relative_a - relative_b).abs().mean())
    found = []
    for name, value, drawn, floor in (
        ("mean_shift", shift, drawn_shift, floor_shift),
        ("relative_change", relative, drawn_relative, floor_relative),
    ):
        v = float(value)
        e = percentile(v, drawn.numpy(), n=units, seed=seed)
        low, high = max(0.0, min(v, 2 * v - e.high)), max(v, 2 * v - e.low)
        if units < 2:
            low, high = e.low, e.high
        found.append(_Found(name, v, low, high, floor, f"basic bootstrap, {draws} draws"))
    return found


def _group_measures(
    X: Float[Tensor, "row d"],
    Y: Float[Tensor, "row d"],
    group: Int[Tensor, " row"],
    groups: int,
    k: int,
    rng: np.random.Generator,
) -> list[_Found]:
    """CKA and the angles, with jackknife intervals over groups of transcripts and floors from halves of the groups."""
    how = f"delete-one jackknife, {groups} groups"
    frames = [_components(V, min(max(_RITZ, 2 * k), V.shape[1], len(V) - 1)) for V in (X, Y)]
    angles = _angles(*(frame[:, :k] for frame in frames))
    everyone = torch.ones(1, groups, dtype=torch.double)
    without = 1 - torch.eye(groups, dtype=torch.double)
    half = _halves(groups, _CKA_SPLITS, rng)
    subsets = torch.cat([everyone, without, half, 1 - half])
    smallest = float((subsets @ group.bincount(minlength=groups).double()).min())
    if smallest <= max(k, 3):  # too few transcripts, or one of them holds nearly every row
        cka = float(_subset_cka(X, Y, group, everyone))
        values = zip(("cka", "angle_mean", "angle_max"), (cka, *angles), strict=True)
        return [_Found(name, value, math.nan, math.nan, math.nan, how) for name, value in values]
    whole, left, first, second = _subset_cka(X, Y, group, subsets).split([1, groups, _CKA_SPLITS, _CKA_SPLITS])
    agreement = 1 - float((first - second).abs().mean())
    found = [_Found("cka", float(whole), *_jackknife(float(whole), left, -math.inf, 1.0), agreement, how)]
    splits = [[_components(X[h[group] == side], k) for side in (1, 0)] for h in half[:_ANGLE_SPLITS]]
    floors = np.mean([_angles(*pair) for pair in splits], axis=0)
    spread = _ritz_angles(
        [V.double() @ frame for V, frame in zip((X, Y), frames, strict=True)], frames, group, without, k
    )
    for name, value, left, floor in zip(("angle_mean", "angle_max"), angles, spread.T, floors, strict=True):
        found.append(_Found(name, value, *_jackknife(value, left, 0.0, 90.0), float(floor), how))
    return found


def _subset_cka(
    X: Float[Tensor, "row d"],
    Y: Float[Tensor, "row e"],
    group: Int[Tensor, " row"],
    weight: Float[Tensor, "subset group"],
) -> Float[Tensor, " subset"]:
    """Debiased CKA of the rows of each subset of groups (weights 0 or 1), from one pass over the rows.

    HSIC_1 needs, with the diagonals of K = XX' and L = YY' removed: tr(KL), 1'KL1, 1'K1 and 1'L1. The first is a
    quadratic form in blocks between groups, and a block is <X_g'Y_g, X_h'Y_h>; the others need each row's product with
    the subset's sum. The estimate does not depend on where the origin is: a subset need not be centred again.
    """
    w = weight[:, group].T  # row by subset
    n = w.sum(dim=0)

    def row_sums(V: Tensor) -> tuple[Tensor, Tensor]:
        V = V.double()
        totals = torch.zeros(weight.shape[1], V.shape[1], dtype=torch.double).index_add_(0, group, V)
        own = V.square().sum(dim=1)
        return own, w * ((V @ totals.T) @ weight.T - own[:, None])

    def hsic(A: Tensor, B: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        trace = ((weight @ _blocks(A, B, group, weight.shape[1])) * weight).sum(dim=1) - w.T @ (a[0] * b[0])
        corner = a[1].sum(dim=0) * b[1].sum(dim=0) / ((n - 1) * (n - 2))
        cross = (a[1] * b[1]).sum(dim=0)
        return trace + corner - 2 / (n - 2) * cross  # times 1 / (n (n - 3)), which the ratio cancels

    x, y = row_sums(X), row_sums(Y)
    return hsic(X, Y, x, y) / (hsic(X, X, x, x) * hsic(Y, Y, y, y)).sqrt()


def _blocks(
    X: Float[Tensor, "row d"], Y: Float[Tensor, "row e"], group: Int[Tensor, " row"], groups: int
) -> Float[Tensor, "group group"]:
    """Sums of (XX') o (YY') over the rows of one group and the columns of another, by the cheaper of two routes."""
    if X.shape[1] * Y.shape[1] < len(X) * (X.shape[1] + Y.shape[1]):
        products = torch.stack([(X[group == g].T @ Y[group == g]).flatten() for g in range(groups)])
        return (products @ products.T).double()
    member = torch.nn.functional.one_hot(group, groups).to(X.dtype)
    return (member.T @ ((X @ X.T) * (Y @ Y.T)) @ member).double()


def _components(X: Float[Tensor, "row d"], k: int) -> Float[Tensor, "d k"]:
    """The top k principal components of rows, centred here."""
    return principal_subspace(X - X.mean(dim=0), k, side="in").double()


def _ritz_angles(
    scores: list[Float[Tensor, "row width"]],
    frames: list[Float[Tensor, "d width"]],
    group: Int[Tensor, " row"],
    weight: Float[Tensor, "subset group"],
    k: int,
) -> Float[Tensor, "subset 2"]:
    """Mean and largest angle for each subset of groups, with components sought inside each side's frame."""
    groups = weight.shape[1]
    n = weight @ group.bincount(minlength=groups).double()
    sides = []
    for Z, frame in zip(scores, frames, strict=True):
        parts = [Z[group == g] for g in range(groups)]
        sums = weight @ torch.stack([part.sum(dim=0) for part in parts])
        grams = torch.tensordot(weight, torch.stack([part.T @ part for part in parts]), dims=1)
        scatter = grams - sums[:, :, None] * sums[:, None, :] / n[:, None, None]
        sides.append(frame @ torch.linalg.eigh(scatter).eigenvectors[..., -k:])
    return torch.tensor([_angles(a, b) for a, b in zip(*sides, strict=True)], dtype=torch.double)


def _angles(U: Float[Tensor, "d k"], V: Float[Tensor, "d k"]) -> tuple[float, float]:
    angles = torch.rad2deg(principal_angles(U, V))
    return float(angles.mean()), float(angles.max())


def _halves(units: int, draws: int, rng: np.random.Generator) -> Float[Tensor, "draw unit"]:
    """Random halves: 1 in the first, 0 in the second, which has the odd one."""
    order = rng.permuted(np.tile(np.arange(units), (draws, 1)), axis=1)
    return torch.from_numpy((order < units // 2).astype(float))


def _jackknife(value: float, left: Float[Tensor, " group"], lowest: float, highest: float) -> tuple[float, float]:
    """``value -+ t * se`` within the measure's range, from the values with each group left out.

    Source: Efron and Tibshirani (1993), section 11.5 (delete-d), with Student's t on groups - 1 degrees of freedom.
    """
    from scipy.special import stdtrit

    groups = len(left)
    error = math.sqrt((groups - 1) / groups * float((left - left.mean()).square().sum()))
    reach = float(stdtrit(groups - 1, 0.975)) * error
    if math.isnan(reach):
        return math.nan, math.nan
    return max(lowest, value - reach), min(highest, value + reach)


def _ratio(move: float, variance: float) -> float:
    return move / math.sqrt(variance) if variance > 0 else math.nan
