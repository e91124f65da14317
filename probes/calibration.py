"""Are a probe's probabilities what they say? Reliability, ECE and Brier score on held-out questions, before and after scaling.

found = calibration(model, runs, right, at="14.resid", over="answer")
found.frame()                                  # as the probe says it, by a temperature, by Platt's line
figures.reliability(found.curve())             # of `analyses`

The scaling is fitted on validation questions inside the training folds, never on those that are judged. `reliability` judges anyone's
probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from probes.activations import Activations
from probes.directions import Labels, per_row
from probes.estimates import ALL_AGREE, Estimate, agree, no_interval, resamples
from probes.fitting import Settings, crossed, fit_path, of_length
from probes.held_out import deal, mean_score, require_two_a_fold, shuffled, units, widening
from probes.linear import EMBEDDING, gathered, labelled, require_folds, require_one_span, rows_at
from probes.results import reading
from surgery.model import Model
from surgery.sites import Patterns, Site, match
from surgery.transcript import Transcript
from surgery.whole import write_whole

if TYPE_CHECKING:
    import pandas as pd

Scaling = Literal["none", "temperature", "platt"]
VALIDATION = 10  # folds inside the training rows for a scaling: a probe of fewer rows than the judged one is surer than it, and is cooled too much
_CHUNK = 4_000_000  # labels drawn at once
_SURE = 1e-12  # no probability is nearer to 0 or 1


@dataclass(frozen=True)
class Bin:
    """Rows of which about the same was said. said: their mean probability; was: the share that is 1, with its 95 % interval over `n` groups;
    NaN where the groups all have the same share, other than none or all, and nothing says how far it scatters."""

    said: float
    was: float
    low: float
    high: float
    n: int
    rows: int


@dataclass(frozen=True)
class Reliability:
    """How far probabilities are what they say.

    brier:       mean squared distance from the labels, 0 to 1; saying the share of ones always gives ``uncertainty``.
    ece:         expected calibration error: mean distance between what was said and what was, over bins of equal width, 0 to 1.
    ece_mass:    the same over bins of about equally many rows.
    floor, floor_mass: what of an ECE is chance: of draws of whole groups from calibrated probabilities that scatter as these do 95 % are
                 below, and 95 % of draws of labels as the probabilities say, those of a group together where they never differ. An ECE
                 under its floor is no sign of miscalibration, and its interval begins at 0. An interval ends as far above the ECE as the
                 draws of groups do, or as draws of labels scatter above their median, and begins as far below it.
    reliability, resolution, uncertainty: Brier's parts over the bins of equal rows; ``reliability - resolution + uncertainty`` is the Brier
                 score where each row says the mean of its bin.
    bins:        those of equal rows, from unlikely to likely.

    Source: Brier (1950); its parts: Murphy (1973), "A new vector partition of the probability score"; ECE: Naeini et al. (2015), Guo et al.
    (2017), arXiv 1706.04599; the floor: as the consistency bars of Broecker and Smith (2007), with groups as units.
    """

    brier: Estimate
    ece: Estimate
    ece_mass: Estimate
    floor: float
    floor_mass: float
    reliability: float
    resolution: float
    uncertainty: float
    log_loss: float
    bins: tuple[Bin, ...]


def reliability(
    probabilities: ArrayLike,
    labels: ArrayLike,
    groups: Sequence[Any] | np.ndarray,
    *,
    bins: int = 10,
    folds: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Reliability:
    """Judge probabilities of label 1, one a row.

    groups: questions, which are drawn whole. folds: of how many these are the cross-fitted predictions, as in `probes.held_out.auc_score`.
    bins:   of each kind, 2 or more; equal probabilities are never parted, so that there may be fewer of equal rows.

    Intervals: percentile for Brier, ending at 0 and 1. An ECE of draws is above that of the rows as much as that is above the truth, so
    its interval begins as in the basic bootstrap (Efron and Tibshirani 1993, section 13.4), and ends as in the percentile one, which chance
    makes too wide and never too narrow. Where all draws agree there is no interval, and of one group no floor of an ECE (NaN). Raises ValueError for what is no probability, and for rows that do not match.
    """
    p, y, g = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=bool), units(groups)
    if not p.shape == y.shape == g.shape or p.ndim != 1 or not len(p):
        raise ValueError(f"{p.shape} probabilities, {y.shape} labels, {g.shape} groups: give one of each a row.")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"Probabilities lie in [0, 1]; these go from {p.min():g} to {p.max():g}.")
    if bins < 2:
        raise ValueError(f"{bins} bins tell nothing apart: ask for 2 or more.")
    options: dict[str, Any] = {"folds": folds, "draws": draws, "seed": seed}
    wide = np.minimum((p * bins).astype(int), bins - 1)
    mass = units(np.searchsorted(np.unique(np.quantile(p, np.arange(1, bins) / bins)), p, side="right"))
    ece, floor = _ece(p, y, g, wide, "ECE, bins of equal width", **options)
    ece_mass, floor_mass = _ece(p, y, g, mass, "ECE, bins of equal rows", **options)
    base = y.mean()
    parts = [mass == b for b in sorted(set(mass.tolist()), key=lambda b: p[mass == b].mean())]
    of_bins = tuple(_bin(p[rows], y[rows], g[rows], draws, seed) for rows in parts)
    weight = np.array([b.rows for b in of_bins]) / len(y)
    said, was = (np.array([getattr(b, name) for b in of_bins]) for name in ("said", "was"))
    likely = np.clip(np.where(y, p, 1 - p), _SURE, None)
    return Reliability(
        brier=mean_score((p - y) ** 2, np.ones(len(y)), g, most=1.0, what="Brier score", **options),
        ece=ece,
        ece_mass=ece_mass,
        floor=floor,
        floor_mass=floor_mass,
        reliability=float(weight @ (said - was) ** 2),
        resolution=float(weight @ (was - base) ** 2),
        uncertainty=float(base * (1 - base)),
        log_loss=float(-np.log(likely).mean()),
        bins=of_bins,
    )


def _ece(
    p: np.ndarray,
    y: np.ndarray,
    g: np.ndarray,
    bin_of: np.ndarray,
    what: str,
    *,
    folds: int | None,
    draws: int,
    seed: int,
) -> tuple[Estimate, float]:
    """The ECE with its interval, and its floor."""
    count = int(g.max()) + 1
    gaps = np.zeros(
        (count, int(bin_of.max()) + 1)
    )  # sums over a group's rows in a bin: one number a group says all that draws need
    np.add.at(gaps, (g, bin_of), p - y)
    rows = np.bincount(g)
    whole = gaps.sum(0) / len(y)
    value = float(np.abs(whole).sum())
    if count < 2:
        return no_interval(value, count, f"{what}, no interval"), math.nan
    times = resamples(count, draws, seed)
    drawn = (times @ gaps) / (times @ rows)[:, None]
    # of labels that are all alike draws of groups show no scatter: what the probabilities say of it is there whatever the labels are
    said = _as_said(p, y, g, bin_of, draws, seed)
    floor = float(max(np.quantile(noise, 0.95) for noise in (np.abs(drawn - whole).sum(1), said)))
    if agree(np.abs(drawn).sum(1)):
        return no_interval(value, count, f"{what}, {ALL_AGREE}"), floor
    # chance adds to a sum of distances: draws lie above the value, as it does above the truth. What is above them is too far, and as far below the
    # value is far enough; their own lower end is none: a gap that chance closed would seem to be nothing for certain.
    above = float(np.quantile(np.abs(drawn).sum(1), 0.975)) - value
    reach = widening(folds) * max(above, float(np.ptp(np.quantile(said, [0.5, 0.975]))))
    ends = 0.0 if value <= floor else max(0.0, value - reach), min(1.0, value + reach)
    how = f"{what}, bootstrap over groups, {draws} draws" + (f", widened for {folds} folds" if folds else "")
    return Estimate(value, *ends, count, seed, how), floor


def _as_said(
    p: np.ndarray, y: np.ndarray, g: np.ndarray, bin_of: np.ndarray, draws: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """ECEs of labels drawn from the probabilities themselves; of groups in which no two labels differ, one draw each."""
    first = np.unique(g, return_index=True)[1]
    of = g if (y == y[first][g]).all() else np.arange(len(y))
    bins, random = np.eye(int(bin_of.max()) + 1)[bin_of], np.random.default_rng(seed)
    step = max(1, _CHUNK // len(y))
    found = []
    for start in range(0, draws, step):
        ones = random.random((min(step, draws - start), int(of.max()) + 1))[:, of] < p
        found.append(np.abs((p - ones) @ bins).sum(1) / len(y))
    return np.concatenate(found)


def _bin(p: np.ndarray, y: np.ndarray, g: np.ndarray, draws: int, seed: int) -> Bin:
    found = mean_score(y.astype(float), np.ones(len(y)), g, draws=draws, seed=seed)
    ends = found.low, found.high
    if found.n > 1 and found.value in (0, 1):  # every draw says so too: as in `probes.held_out.auc_score`
        least = 0.025 ** (1 / found.n)
        ends = (least, 1.0) if found.value == 1 else (0.0, 1 - least)
    return Bin(float(p.mean()), found.value, *ends, found.n, len(y))


def line_through(z: Float[np.ndarray, " row"], y: Bool[np.ndarray, " row"], scaling: Scaling) -> tuple[float, float]:
    """(slope, offset) of the log odds that make Platt's targets likeliest; ``temperature``: slope 1/T, at least 0, and offset 0.

    Source: Platt (1999), "Probabilistic outputs for support vector machines", with his targets, which keep the line finite where the
    labels are told apart without error; one temperature: Guo et al. (2017), section 4.2.
    Differs: Guo's temperature is of the labels themselves; of Platt's targets, which lie nearer to a half, it is higher where rows are few.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    if scaling == "none":
        return 1.0, 0.0
    ones, zeros = int(y.sum()), int((~y).sum())
    target = np.where(y, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    shift = scaling == "platt"

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        odds = line[0] * z + (line[1] if shift else 0.0)
        off = (expit(odds) - target) / len(z)
        gradient = np.array([off @ z, off.sum()])
        return float((np.logaddexp(0, odds) - target * odds).mean()), gradient if shift else gradient[:1]

    ends = [(None, None), (None, None)] if shift else [(0.0, None)]
    found = minimize(loss, np.array([1.0, 0.0]) if shift else np.ones(1), jac=True, method="L-BFGS-B", bounds=ends).x
    return float(found[0]), float(found[1]) if shift else 0.0


@dataclass(frozen=True)
class CalibrationRow:
    """A probe's probabilities, scaled one way; see `Reliability` for what is not said here. All of held-out rows.

    scaling:  ``none``; ``temperature``: log odds divided by one number; ``platt``: a line through the log odds.
    site:     chosen in most folds, inside the training rows. n: groups. rows: transcripts.
    slope, offset: median over the folds of the line; a slope below 1 says that the probe was too sure, or that rows are few (see `line_through`).
    base:     Brier score of saying the training rows' share of ones. shuffled, untrained, embedding, length: Brier scores of probes, unscaled,
              of shuffled labels, of an untrained model, at ``0.resid``, and of the span's length alone. NaN where there was none.
    """

    scaling: Scaling
    site: str
    n: int
    rows: int
    brier: float
    brier_low: float
    brier_high: float
    ece: float
    ece_low: float
    ece_high: float
    ece_floor: float
    ece_mass: float
    ece_mass_low: float
    ece_mass_high: float
    ece_mass_floor: float
    reliability: float
    resolution: float
    uncertainty: float
    log_loss: float
    slope: float
    offset: float
    base: float
    shuffled: float
    untrained: float
    embedding: float
    length: float


@dataclass(frozen=True)
class Calibration:
    """What `calibration` found; reloads without a model.

    rows:  a `CalibrationRow` for each scaling. bins: for each scaling its bins of equal rows. about: span, folds, seed, draws and the like.
    """

    rows: tuple[CalibrationRow, ...]
    bins: Mapping[Scaling, tuple[Bin, ...]]
    about: Mapping[str, Any]

    def frame(self) -> pd.DataFrame:
        """One row a scaling, with the columns of `CalibrationRow`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def curve(self) -> pd.DataFrame:
        """The reliability diagram: one row a scaling and bin, with the columns of `Bin`."""
        import pandas as pd

        return pd.DataFrame([{"scaling": name, **asdict(one)} for name, bins in self.bins.items() for one in bins])

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote. Raises ValueError for a file of something else."""
        with reading(path, cls) as found:
            bins: Any = {name: tuple(Bin(**one) for one in bins) for name, bins in found["bins"].items()}
            return cls(tuple(CalibrationRow(**row) for row in found["rows"]), bins, found["about"])

    def __repr__(self) -> str:
        said = "; ".join(
            f"{r.scaling}: Brier {r.brier:.3f}, ECE {r.ece:.3f} (chance to {r.ece_floor:.3f})" for r in self.rows
        )
        return f"<Calibration over {self.rows[0].n} groups: {said}>"

    def _repr_html_(self) -> str:
        return self.frame().to_html(float_format="%.3g", index=False)


def calibration(
    model: Model,
    transcripts: Sequence[Transcript],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    at: Patterns = "*.resid",
    over: str = "thinking",
    bins: int = 10,
    components: int | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> Calibration:
    """Fit a probe as `probes.linear.probe` does, at a site of `at` chosen inside the training folds, and judge its probabilities.

    Arguments and errors as there; labels are of two classes.
    """
    match(at, model.anatomy.activation_sites())
    require_one_span(over)
    Settings("classes", components, 1, draws, seed)  # raises before any pass
    require_folds(transcripts, labels, groups, over=(over,), folds=folds)
    found = gathered(
        model, transcripts, labels, groups, at=at, over=(over,), seed=seed, batch_size=batch_size, progress=progress
    )
    options: dict[str, Any] = {"components": components, "folds": folds, "draws": draws, "seed": seed}
    more: dict[str, Any] = {"lengths": found.lengths, "twin": found.twin, "among": found.asked}
    return calibration_rows(found.acts, found.labels, found.groups, bins=bins, **more, **options)


def calibration_rows(
    acts: Activations,
    labels: Labels,
    groups: Labels,
    *,
    lengths: Labels | None = None,
    twin: Activations | None = None,
    bins: int = 10,
    components: int | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    among: Iterable[Site] | None = None,
) -> Calibration:
    """`calibration` on activations already collected over one span, one row a transcript; arguments as of `probes.linear.probe_rows`."""
    if len(acts.over) != 1:
        raise ValueError(f"These rows are over {', '.join(acts.over)}: a calibration is of one span.")
    kept, y = labelled(per_row(acts, labels, "labels"), "classes", acts.over[0])
    names = per_row(acts, groups, "groups")
    g = units([names[i] for i in kept])
    require_two_a_fold(g, folds)
    fold = deal(g, y, folds=folds, seed=seed)
    settings = Settings("classes", components, 1, draws, seed)
    values = {site: rows_at(acts, site, kept) for site in (acts.values if among is None else among)}
    real = crossed(values, y, g, fold, settings)
    lines = [_lines(values, y, g, fold != k, best, settings) for k, best in enumerate(real.chosen)]

    def brier(p: np.ndarray, target: np.ndarray = y) -> float:
        return float(((p - target) ** 2).mean())

    def other(values: Mapping[Site, np.ndarray], **options: Any) -> float:
        return brier(crossed(values, y, g, fold, replace(settings, **options)).predicted)

    null = shuffled(y, g, seed=seed + 1)
    controls = {
        "base": brier(np.array([y[fold != k].mean() for k in range(folds)])[fold]),
        "shuffled": brier(crossed(values, null, g, fold, settings, chosen=real.chosen).predicted, null),
        "untrained": math.nan if twin is None else other({site: rows_at(twin, site, kept) for site in values}),
        "embedding": other({EMBEDDING: rows_at(acts, EMBEDDING, kept)}) if EMBEDDING in acts.values else math.nan,
        "length": math.nan,
    }
    if lengths is not None:
        tokens = np.asarray(per_row(acts, lengths, "lengths"), dtype=float)[kept]
        controls["length"] = other({EMBEDDING: of_length(tokens)}, components=None)
    z = log_odds(real.predicted)
    rows, curves = [], {}
    for scaling in get_args(Scaling):
        slope, offset = np.array([line[scaling] for line in lines]).T
        p = 1 / (1 + np.exp(-(slope[fold] * z + offset[fold])))
        found = reliability(p, y, g, bins=bins, folds=folds, draws=draws, seed=seed)
        rows.append(
            _row(scaling, real.site, len(y), found, float(np.median(slope)), float(np.median(offset)), controls)
        )
        curves[scaling] = found.bins
    about = {"over": acts.over[0], "bins": bins, "components": components, "folds": folds, "draws": draws, "seed": seed}
    return Calibration(tuple(rows), curves, about)


def log_odds(p: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    p = np.clip(p, _SURE, 1 - _SURE)
    return np.log(p / (1 - p))


def _lines(
    values: Mapping[Site, np.ndarray],
    y: Bool[np.ndarray, " row"],
    g: Int[np.ndarray, " row"],
    mine: Bool[np.ndarray, " row"],
    best: tuple[Site, float] | None,
    settings: Settings,
) -> dict[Scaling, tuple[float, float]]:
    """The line of each scaling, from validation predictions on folds inside these rows; as it is where nothing was fitted."""
    if best is None:
        return dict.fromkeys(get_args(Scaling), (1.0, 0.0))
    train = np.flatnonzero(mine)
    inner = deal(units(g[train]), y[train], folds=VALIDATION, seed=settings.seed)
    said = np.full(len(y), math.nan)
    for j in range(int(inner.max()) + 1):
        seen, held = train[inner != j], train[inner == j]
        if y[seen].min() < y[seen].max():
            (said[held],) = fit_path(values[best[0]], y, seen, held, best[1:], settings)
    there = ~np.isnan(said)
    return {scaling: line_through(log_odds(said[there]), y[there], scaling) for scaling in get_args(Scaling)}


def _row(
    scaling: Scaling,
    site: Site,
    rows: int,
    found: Reliability,
    slope: float,
    offset: float,
    controls: Mapping[str, float],
) -> CalibrationRow:
    ends = {
        f"{name}{end}": getattr(getattr(found, name), part)
        for name in ("brier", "ece", "ece_mass")
        for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return CalibrationRow(
        scaling=scaling,
        site=str(site),
        n=found.brier.n,
        rows=rows,
        **ends,
        ece_floor=found.floor,
        ece_mass_floor=found.floor_mass,
        reliability=found.reliability,
        resolution=found.resolution,
        uncertainty=found.uncertainty,
        log_loss=found.log_loss,
        slope=slope,
        offset=offset,
        **controls,
    )
