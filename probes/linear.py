"""Linear probes beside their controls: what can be read off at each layer, over each span, and how much of it to believe.

A probe is a scikit-learn pipeline on one row a transcript, its activations averaged over a span. Questions are whole in one fold; the strength
of the penalty is chosen inside the training folds, on folds of its own; every number is of held-out questions.

A layer says something where its score is above all four of these: the same labels shuffled, the same probe on an untrained model, the
embedding layer, and the length of the span alone. ``same_length`` asks the probe about pairs of about equal length only.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from probes.activations import Activations, Pool, collect
from probes.directions import Labels, per_row
from probes.estimates import Estimate, no_interval
from probes.fitting import Kind, Settings, fit_path, length_bins, loss, of_length, select
from probes.held_out import auc, auc_score, deal, mean_score, require_two_a_fold, shuffled, units
from probes.results import reading
from surgery.borrowing import own_draws
from surgery.linalg import each_matrix
from surgery.model import Model
from surgery.sites import Patterns, Site, match
from surgery.transcript import Transcript, nobody_has, positions, require_several
from surgery.whole import write_whole

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("shuffled", "untrained", "embedding", "length")  # columns a probe is to be above
EMBEDDING = Site(0, "resid")


@dataclass(frozen=True)
class ProbeRow:
    """One probe, at a site over a span.

    value, low, high, n: held-out AUC of two classes (0.5 is chance), or held-out R² of a number (0 is its mean, negative is worse), with its
                 95 % interval over `n` groups.
    rows:        transcripts that have the span and a label.
    accuracy, majority, log_loss: held out, of classes; majority is the accuracy of always saying the commoner class of the training folds;
                 log_loss is in nats. NaN for a number.
    same_length, same_length_low, same_length_high: the value where rows are compared with rows of about their length only; of a number, with
                 the mean of those of other groups.
    shuffled, shuffled_most: mean and largest value with shuffled labels.
    untrained:   value in a model of the same architecture with random weights.
    embedding:   value at ``0.resid``, the same span.
    length:      value of a probe that sees the span's length and its logarithm, nothing else.
    selectivity: ``value - shuffled``.
    penalty:     median over the folds of the inverse strength chosen.
    """

    site: str
    layer: int | None
    span: str
    measure: str
    value: float
    low: float
    high: float
    n: int
    rows: int
    accuracy: float
    majority: float
    log_loss: float
    same_length: float
    same_length_low: float
    same_length_high: float
    shuffled: float
    shuffled_most: float
    untrained: float
    embedding: float
    length: float
    selectivity: float
    penalty: float


@dataclass(frozen=True)
class Chosen:
    """The held-out value over a span when the site, too, is chosen inside the training folds: the number to report for the span.

    sites: the site chosen in each fold.
    """

    span: str
    value: float
    low: float
    high: float
    n: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class ProbeTable:
    """What `probe` found; reloads without a model.

    rows:   a `ProbeRow` for each site and span, the embedding first where it was not asked for.
    chosen: for each span the value at sites, of those asked for, chosen without the held-out questions. The best row of the table is optimistic: it
            was picked by the very numbers it is praised for.
    about:  kind, folds, seed, and what else the caller decided.
    """

    rows: tuple[ProbeRow, ...]
    chosen: tuple[Chosen, ...]
    about: Mapping[str, Any]

    def frame(self) -> pd.DataFrame:
        """One row a (site, span), with the columns of `ProbeRow`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def summary(self) -> pd.DataFrame:
        """One row a span: what `chosen` says, beside the controls at the site chosen most often.

        Columns: span, measure, value, low, high, n, site, shuffled, untrained, embedding, length, and above: whether the interval lies above
        every control there is.
        """
        import pandas as pd

        at = {(row.span, row.site): row for row in self.rows}
        rows = []
        for one in self.chosen:
            place = at[one.span, max(dict.fromkeys(one.sites), key=one.sites.count)]
            controls = {name: getattr(place, name) for name in CONTROLS}
            best = max((v for v in controls.values() if not math.isnan(v)), default=-math.inf)
            numbers = {"value": one.value, "low": one.low, "high": one.high, "n": one.n, "site": place.site}
            rows.append({"span": one.span, "measure": place.measure, **numbers, **controls, "above": one.low > best})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ProbeTable:
        """What `save` wrote. Raises ValueError for a file of something else."""
        with reading(path, cls) as found:
            chosen = tuple(Chosen(**{**c, "sites": tuple(c["sites"])}) for c in found["chosen"])
            return cls(tuple(ProbeRow(**row) for row in found["rows"]), chosen, found["about"])

    def __repr__(self) -> str:
        said = ", ".join(f"{c.span} {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]" for c in self.chosen)
        return f"<ProbeTable: {len(self.rows)} probes; at sites chosen by validation: {said}>"

    def _repr_html_(self) -> str:
        return self.frame().to_html(max_rows=24, float_format="%.3g", index=False)


def probe(
    model: Model,
    transcripts: Sequence[Transcript],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = ("prompt", "thinking", "answer"),
    kind: Kind = "classes",
    components: int | None = None,
    folds: int = 5,
    shuffles: int = 3,
    draws: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> ProbeTable:
    """Probe every site over every span: one pass over the transcripts for the model, one for its untrained twin.

    labels:     one a transcript: 1 or 0 (classes), or any number; None leaves the transcript out.
    groups:     one a transcript, kept whole in one fold; by default its question.
    kind:       ``"classes"``: logistic regression, judged by AUC. ``"number"``: ridge regression, judged by R².
    components: principal components kept before the probe; None keeps all coordinates. Wanted where rows are few.
    shuffles:   labellings shuffled over groups, and inside them, that are probed as a control, at the penalties of the real ones.

    A transcript without a span is missing there. Raises ValueError for a span no transcript has, for labels of one class only, for one
    group only, for classes with fewer than two groups a fold, and as `collect` does.
    Source: protocol of Hewitt and Liang (2019), arXiv 1909.03368, and Alain and Bengio (2016), arXiv 1610.01644.
    Differs: groups are held out whole; controls are always there; the penalty is chosen inside the training folds.
    """
    spans = (over,) if isinstance(over, str) else tuple(over)
    Settings(kind, components, shuffles, draws, seed)  # raises before any pass
    match(at, model.anatomy.activation_sites())
    require_folds(transcripts, labels, groups, over=spans, kind=kind, folds=folds)
    found = gathered(
        model, transcripts, labels, groups, at=at, over=spans, seed=seed, batch_size=batch_size, progress=progress
    )
    return probe_rows(
        found.acts,
        found.labels,
        found.groups,
        lengths=found.lengths,
        twin=found.twin,
        kind=kind,
        components=components,
        folds=folds,
        shuffles=shuffles,
        draws=draws,
        seed=seed,
        progress=progress,
        among=found.asked,
    )


def require_folds(
    transcripts: Sequence[Transcript],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    over: Sequence[str],
    kind: Kind = "classes",
    folds: int = 5,
    called: str = "questions",
) -> None:
    """Raise ValueError, before any activation is read, where the rows cannot be dealt into folds as `probe` deals them.

    called: what the groups are called in the error. Other arguments as of `probe`.
    """
    kept = _kept(transcripts, labels, groups, over)
    named = [text.question for text in transcripts] if groups is None else groups
    for span in over:
        _dealt([i for i in kept if positions(transcripts[i], span)], labels, named, kind, span, folds, 0, called)


def require_one_span(over: object) -> None:
    """Raise ValueError for several spans where one is read."""
    if not isinstance(over, str):
        raise ValueError(f"over={over!r}: one span is read here, as in over='answer'.")


def _kept(
    transcripts: Sequence[Transcript],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None,
    over: Sequence[str],
) -> list[int]:
    """Which transcripts have a label. Raises ValueError where none has, or none of these has a span."""
    require_several(transcripts)
    if len(labels) != len(transcripts) or (groups is not None and len(groups) != len(transcripts)):
        raise ValueError(
            f"{len(transcripts)} transcripts, {len(labels)} labels: give one label (and one group) a transcript."
        )
    kept = [i for i, label in enumerate(labels) if label is not None and label == label]
    if not kept:
        raise ValueError("No transcript has a label: there is nothing to probe for.")
    texts = [transcripts[i] for i in kept]
    for span in over:
        if not any(positions(text, span) for text in texts):
            raise ValueError(nobody_has(texts, span, "labelled transcripts"))
    return kept


def _dealt(
    among: Sequence[int] | np.ndarray,
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    kind: Kind,
    span: str,
    folds: int,
    seed: int,
    called: str = "questions",
) -> tuple[Int[np.ndarray, " row"], np.ndarray, Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """The rows, of some, that have a label, with their labels, groups and folds. Raises ValueError where a probe can learn nothing of them."""
    rows, y = labelled(labels, kind, span, among)
    g = units([groups[i] for i in rows])
    if kind == "classes" and g.max() > 0:  # else `deal` says what is missing
        require_two_a_fold(g, folds, called)
    return rows, y, g, deal(g, y, folds=folds, seed=seed)


@dataclass(frozen=True, eq=False)
class Gathered:
    """The rows of labelled transcripts, of a model and its untrained twin, one a transcript and span.

    index, labels, groups, lengths: of each row its transcript among those given, their label and group, and the tokens of the span.
    asked: the sites that were asked for; the embedding is there besides.
    """

    acts: Activations
    twin: Activations
    index: list[int]
    labels: list[Any]
    groups: list[Any]
    lengths: list[int]
    asked: list[Site]


def gathered(
    model: Model,
    transcripts: Sequence[Transcript],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None,
    *,
    at: Patterns,
    over: Sequence[str],
    pool: Pool = "mean",
    seed: int,
    batch_size: int,
    progress: bool,
) -> Gathered:
    """What `probe` reads, from one pass over the transcripts for each of the two models. Arguments and errors as there."""
    kept = _kept(transcripts, labels, groups, over)
    texts = [transcripts[i] for i in kept]
    asked = match(at, model.anatomy.activation_sites())
    options: dict[str, Any] = {
        "at": list(dict.fromkeys([EMBEDDING, *asked])),
        "over": over,
        "pool": pool,
        "batch_size": batch_size,
        "progress": progress,
    }
    acts = collect(model, texts, **options)
    twin = collect(untrained(model, seed=seed), texts, **options)
    pairs = list(zip(acts.transcript.tolist(), acts.span.tolist(), strict=True))
    return Gathered(
        acts,
        twin,
        [kept[i] for i, _ in pairs],
        [labels[kept[i]] for i, _ in pairs],
        [texts[i].question if groups is None else groups[kept[i]] for i, _ in pairs],
        [len(positions(texts[i], over[k])) for i, k in pairs],
        asked,
    )


def untrained(model: Model, *, seed: int = 0) -> Model:
    """A model of the same architecture and tokenizer with the weights its family begins training from. The random state is left as it was."""
    with own_draws():
        torch.manual_seed(seed)
        module = type(model.module)(copy.deepcopy(model.module.config))
    module.to(model.device, next(model.module.parameters()).dtype)  # type: ignore[arg-type]
    return Model(module, model.tokenizer, markers=model.markers)


def probe_rows(
    acts: Activations,
    labels: Labels,
    groups: Labels,
    *,
    lengths: Labels | None = None,
    twin: Activations | None = None,
    kind: Kind = "classes",
    components: int | None = None,
    folds: int = 5,
    shuffles: int = 3,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
    among: Iterable[Site] | None = None,
) -> ProbeTable:
    """`probe` on activations already collected, one row a transcript and span (``pool="mean"``).

    labels, groups: one a row, or a transcript. lengths: tokens of the span, one a row; without them the columns about length are NaN.
    twin: the same rows from the untrained model; without them ``untrained`` is NaN. ``embedding`` is NaN where the rows lack ``0.resid``.
    among: the sites that ``chosen`` chooses among, where others are there as controls only; by default all.
    """
    from tqdm.auto import tqdm

    if twin is not None and not (torch.equal(twin.transcript, acts.transcript) and torch.equal(twin.span, acts.span)):
        raise ValueError(
            "The untrained model's rows are not those of the model: collect both from the same transcripts and spans."
        )
    y, g = per_row(acts, labels, "labels"), per_row(acts, groups, "groups")
    tokens = None if lengths is None else np.asarray(per_row(acts, lengths, "lengths"), dtype=float)
    tasks = [
        _Task.of(k, span, (acts.span == k).numpy(), y, g, tokens, kind, folds, seed)
        for k, span in enumerate(acts.over)
        if (acts.span == k).any()
    ]
    settings = Settings(kind, components, shuffles, draws, seed)
    cells = [(task, site) for task in tasks for site in acts.values]
    bars = tqdm(total=len(cells), desc="probing", disable=not progress, leave=False)
    alone = {task.span: _length_alone(task, settings) for task in tasks}

    def one(cell: tuple[_Task, Site]) -> _Found:
        task, site = cell
        found = _probe_cell(
            task, rows_at(acts, site, task.rows), None if twin is None else rows_at(twin, site, task.rows), settings
        )
        bars.update()
        return found

    with bars:
        found = dict(zip(cells, each_matrix(one, cells), strict=True))
    rows, chosen = [], []
    for task in tasks:
        mine = {site: found[task, site] for site in acts.values}
        embedding = mine[EMBEDDING].score.value if EMBEDDING in mine else math.nan
        rows += [_row(task, site, cell, embedding, alone[task.span], kind) for site, cell in mine.items()]
        chosen.append(_choose(task, {site: mine[site] for site in (acts.values if among is None else among)}, settings))
    about = {"kind": kind, "components": components, "folds": folds, "shuffles": shuffles, "draws": draws, "seed": seed}
    return ProbeTable(tuple(rows), tuple(chosen), about)


def labelled(
    labels: Sequence[Any] | np.ndarray, kind: Kind, span: str, among: Sequence[int] | np.ndarray | None = None
) -> tuple[Int[np.ndarray, " row"], np.ndarray]:
    """Which rows, of some or of all, have a label, and the labels: bool of classes, or numbers. Raises ValueError where a probe can learn nothing."""
    asked = range(len(labels)) if among is None else among
    rows = [int(i) for i in asked if labels[i] is not None and labels[i] == labels[i]]
    if not rows:
        raise ValueError(f"No row over {span!r} has a label: there is nothing to probe for.")
    y = np.array([float(labels[i]) for i in rows])
    if kind == "classes":
        if wrong := sorted(set(y) - {0.0, 1.0}):
            raise ValueError(
                f"Two classes are labelled 1 and 0; these labels hold {wrong[0]:g}. For a number, say kind='number'."
            )
        y = y.astype(bool)
    if y.min() == y.max():
        raise ValueError(f"All {len(y)} rows over {span!r} have the same label: a probe needs rows that differ.")
    return np.array(rows), y


def rows_at(acts: Activations, site: Site, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, "row d"]:
    """Rows at a site, to fit on. Raises ValueError where they are not finite."""
    # fp64: in fp32 the optimizer's line search can fail near the optimum, and is no faster
    X = acts[site][torch.from_numpy(rows)].double().numpy()
    if not np.isfinite(X).all():
        raise ValueError(f"The activations at {site} hold NaN or infinite values: they cannot be probed.")
    return X


@dataclass(frozen=True, eq=False)
class _Task:
    """What is predicted over one span: the rows of it, their labels, groups, folds and bins of length."""

    span: str
    rows: Int[np.ndarray, " row"]
    y: np.ndarray
    g: Int[np.ndarray, " row"]
    fold: Int[np.ndarray, " row"]
    tokens: Float[np.ndarray, " row"] | None
    bins: Int[np.ndarray, " row"] | None

    @classmethod
    def of(
        cls,
        index: int,
        span: str,
        mine: Bool[np.ndarray, " all"],
        labels: Sequence[Any],
        groups: Sequence[Any],
        tokens: np.ndarray | None,
        kind: Kind,
        folds: int,
        seed: int,
    ) -> _Task:
        rows, y, g, fold = _dealt(np.flatnonzero(mine), labels, groups, kind, span, folds, seed)
        own = None if tokens is None else tokens[rows]
        bins = None if own is None else length_bins(own)
        return cls(span, rows, y, g, fold, own, bins)


@dataclass(frozen=True, eq=False)
class _Found:
    """Held-out predictions of one probe, and its scores. inner: the validation loss in each outer fold."""

    predicted: Float[np.ndarray, " row"]
    inner: Float[np.ndarray, " fold"]
    penalties: Float[np.ndarray, " fold"]
    score: Estimate
    same_length: Estimate
    shuffled: Float[np.ndarray, " shuffle"]
    untrained: float


def _probe_cell(task: _Task, X: np.ndarray, twin: np.ndarray | None, settings: Settings) -> _Found:
    predicted, inner, penalties = _predict(X, task, settings)
    null = []
    for i in range(settings.shuffles):
        labels = shuffled(task.y, task.g, seed=settings.seed + 1 + i)
        null.append(_value(*_predict(X, task, settings, labels, penalties)[:1], labels, task, settings))
    other = math.nan if twin is None else _value(_predict(twin, task, settings)[0], task.y, task, settings)
    same = no_interval(math.nan, 0, "no lengths")
    if task.bins is not None:
        same = _judge(predicted, task, settings, within=task.bins)
    return _Found(predicted, inner, penalties, _judge(predicted, task, settings), same, np.array(null), other)


def _length_alone(task: _Task, settings: Settings) -> float:
    if task.tokens is None:
        return math.nan
    X = of_length(task.tokens)
    plain = Settings(settings.kind, None, 0, settings.draws, settings.seed)
    return _value(_predict(X, task, plain)[0], task.y, task, settings)


def _predict(
    X: Float[np.ndarray, "row d"],
    task: _Task,
    settings: Settings,
    labels: np.ndarray | None = None,
    penalties: np.ndarray | None = None,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " fold"], Float[np.ndarray, " fold"]]:
    """Each row's prediction by a probe that saw none of its fold, the validation losses, and the penalties (chosen unless given).

    A prediction is the probability of class 1, or the number. A fold whose training rows are all of one label predicts their mean.
    """
    y = task.y if labels is None else labels
    folds = int(task.fold.max()) + 1
    predicted, inner, chosen = np.empty(len(y)), np.full(folds, math.nan), np.full(folds, math.nan)
    for k in range(folds):
        train, test = np.flatnonzero(task.fold != k), np.flatnonzero(task.fold == k)
        if y[train].min() == y[train].max():
            predicted[test] = y[train].mean()
            continue
        if penalties is None or math.isnan(penalties[k]):
            inner[k], chosen[k] = select(X[train], y[train], task.g[train], settings)
        else:
            chosen[k] = penalties[k]
        (predicted[test],) = fit_path(X, y, train, test, (chosen[k],), settings)
    return predicted, inner, chosen


def _value(predicted: np.ndarray, y: np.ndarray, task: _Task, settings: Settings) -> float:
    if settings.kind == "classes":
        return auc(predicted, y, task.fold)
    return float(1 - loss(predicted, y, "number").sum() / ((y - _training_means(y, task.fold)) ** 2).sum())


def _judge(predicted: np.ndarray, task: _Task, settings: Settings, within: np.ndarray | None = None) -> Estimate:
    """The probe's score with its interval, rows compared inside a fold and, where given, inside a bin."""
    options: dict[str, Any] = {"folds": int(task.fold.max()) + 1, "draws": settings.draws, "seed": settings.seed}
    if settings.kind == "classes":
        strata = task.fold if within is None else task.fold * (within.max() + 1) + within
        return auc_score(predicted, task.y, task.g, strata, what="held-out AUC", **options)
    spread = (task.y - _training_means(task.y, task.fold)) ** 2 if within is None else _spread(task.y, task.g, within)
    errors = loss(predicted, task.y, "number")
    return mean_score(errors, spread, task.g, flip=True, what="held-out R²", **options)


def _training_means(y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """For each row the mean label of the folds it is not in."""
    sums, sizes = np.bincount(fold, y), np.bincount(fold)
    return ((sums.sum() - sums) / (sizes.sum() - sizes))[fold]


def _spread(y: np.ndarray, g: np.ndarray, within: np.ndarray) -> Float[np.ndarray, " row"]:
    """For each row its squared distance from the mean label of its bin in other groups; where these have none, from all their mean.

    A mean of k rows is off by 1/k of their variance, which is taken out again: bins hold few rows. Of other folds it would be biased, for like
    labels are dealt to different folds.
    """
    sums, sizes = (np.zeros((int(g.max()) + 1, int(within.max()) + 1)) for _ in range(2))
    np.add.at(sums, (g, within), y)
    np.add.at(sizes, (g, within), 1)
    sums, sizes = sums.sum(0) - sums, sizes.sum(0) - sizes
    empty = sizes == 0
    sums, sizes = (np.where(empty, x.sum(1, keepdims=True), x)[g, within] for x in (sums, sizes))
    return (y - sums / sizes) ** 2 * sizes / (sizes + 1)


def _choose(task: _Task, mine: Mapping[Site, _Found], settings: Settings) -> Chosen:
    sites = list(mine)
    best: list[int] = np.stack([f.inner for f in mine.values()]).argmin(axis=0).tolist()  # NaN at all sites or at none
    predicted = np.empty(len(task.y))
    for k, i in enumerate(best):
        held = task.fold == k
        predicted[held] = mine[sites[i]].predicted[held]
    score = _judge(predicted, task, settings)
    return Chosen(task.span, score.value, score.low, score.high, score.n, tuple(str(sites[i]) for i in best))


def _row(task: _Task, site: Site, found: _Found, embedding: float, length: float, kind: Kind) -> ProbeRow:
    classes = kind == "classes"
    said = found.predicted > 0.5
    majority = _training_means(task.y.astype(float), task.fold) > 0.5
    null = float(found.shuffled.mean()) if len(found.shuffled) else math.nan
    return ProbeRow(
        site=str(site),
        layer=site.layer,
        span=task.span,
        measure="auc" if classes else "r2",
        value=found.score.value,
        low=found.score.low,
        high=found.score.high,
        n=found.score.n,
        rows=len(task.y),
        accuracy=float((said == task.y).mean()) if classes else math.nan,
        majority=float((majority == task.y).mean()) if classes else math.nan,
        log_loss=float(loss(found.predicted, task.y, kind).mean()) if classes else math.nan,
        same_length=found.same_length.value,
        same_length_low=found.same_length.low,
        same_length_high=found.same_length.high,
        shuffled=null,
        shuffled_most=float(found.shuffled.max()) if len(found.shuffled) else math.nan,
        untrained=found.untrained,
        embedding=embedding,
        length=length,
        selectivity=found.score.value - null,
        penalty=float(np.nanmedian(found.penalties)) if not np.isnan(found.penalties).all() else math.nan,
    )
