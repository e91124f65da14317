"""What a number must carry: how sure it is, from how many, by which method.

Every interval here resamples *independent units*. Answers to one question, cuts of one transcript and matrices of one
layer are not independent of each other: name their question, transcript or layer in ``clusters`` to keep them together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    value   the point estimate, in the units of what was measured
    low     lower end of the interval; NaN where one independent unit leaves nothing to judge the spread by
    high    upper end
    n       independent units behind it (questions, transcripts, layers), not rows
    seed    of the resampling; None where nothing was drawn
    method  how the interval was made, e.g. ``"wilson"`` or ``"percentile bootstrap, 2000 draws"``
    level   nominal coverage, in (0, 1)
    """

    value: float
    low: float
    high: float
    n: int
    seed: int | None
    method: str
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n={self.n})"


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A proportion and its Wilson score interval, in [0, 1]: usable for small ``n`` and at 0 or 1.

    Trials must be independent: for several answers a question use ``bootstrap`` with clusters. No trials at all say
    nothing: the value is NaN and the interval [0, 1].

    Errors: ValueError when ``successes`` is not in [0, n] or ``level`` not in (0, 1).
    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: successes must lie between 0 and the number of trials")
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0, None, "wilson", level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the closed form is exact only up to rounding
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(p, low, high, n, None, "wilson", level)


def resamples(units: int, draws: int, seed: int) -> Int[np.ndarray, "draws units"]:
    """How often each of ``units`` independent units is drawn in each bootstrap sample; every row sums to ``units``.

    For a statistic made of per-unit sums, ``resamples(...) @ sums`` is every bootstrap sample at once.
    """
    if units < 1 or draws < 1:
        raise ValueError(f"{draws} bootstrap draws of {units} units: both must be at least 1")
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws)


def percentile(value: float, drawn: Float[np.ndarray, " draws"], *, n: int, seed: int, level: float = 0.95) -> Estimate:
    """The percentile interval of statistics ``drawn`` on bootstrap samples of ``n`` independent units.

    With fewer than two units every sample is the same one, so the interval is NaN rather than of width zero. So it is
    when a statistic is undefined (NaN) on some sample.

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3.
    """
    _check_level(level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if n > 1 else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high), n, seed, f"percentile bootstrap, {len(drawn)} draws", level)


def bootstrap(
    values: ArrayLike,
    *,
    clusters: Sequence | np.ndarray | None = None,
    statistic: Callable[[np.ndarray], float] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean of ``values`` (or any ``statistic`` of them) with a percentile interval.

    values     one number an item; for a ``statistic``, rows of any shape
    clusters   one label an item (the question it belongs to): whole clusters are drawn, all their items with them.
               Without it every item is its own cluster
    statistic  rows -> number. The mean is one matrix product over all draws; any other statistic is called once a draw
    draws      bootstrap samples

    The mean is over items, so that a cluster weighs by its size. With under about 20 clusters the interval is too
    narrow: report the clusters themselves beside it.

    Errors: ValueError for no items; for NaN or infinite items (a missing answer is left out, or scored, by the caller);
    for labels that do not match the items.
    Source: Efron and Tibshirani (1993), section 13.3; clusters: Davison and Hinkley (1997), section 3.8.
    """
    rows = np.asarray(values, dtype=float)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("nothing to estimate from: no values were given")
    if rows.ndim > 1 and statistic is None:
        raise ValueError(f"the mean of rows of shape {rows.shape[1:]} is not one number: give a statistic")
    if bad := int((~np.isfinite(rows)).sum()):
        raise ValueError(
            f"{bad} of {rows.size} values are NaN or infinite: first leave missing items out or score them"
        )
    labels = np.arange(len(rows)) if clusters is None else np.asarray(clusters)
    if labels.shape != (len(rows),):
        raise ValueError(f"{len(rows)} values but cluster labels of shape {labels.shape}: give one label a value")
    _, unit = np.unique(labels, return_inverse=True)
    units = int(unit.max()) + 1
    counts = resamples(units, draws, seed)
    if statistic is None:
        sums, sizes = np.bincount(unit, weights=rows), np.bincount(unit)
        return percentile(rows.mean(), (counts @ sums) / (counts @ sizes), n=units, seed=seed, level=level)
    drawn = np.array([statistic(np.repeat(rows, count[unit], axis=0)) for count in counts], dtype=float)
    return percentile(statistic(rows), drawn, n=units, seed=seed, level=level)


def paired_bootstrap(
    base: ArrayLike,
    tuned: ArrayLike,
    *,
    clusters: Sequence | np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean of ``tuned - base`` over the same items, with a percentile interval from resampling items (or clusters).

    Errors: ValueError when the two do not have the same items, and as ``bootstrap``.
    """
    a, b = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a paired difference needs the same items twice, got shapes {a.shape} and {b.shape}")
    return bootstrap(b - a, clusters=clusters, draws=draws, seed=seed, level=level)


def holm(pvalues: ArrayLike) -> Float[np.ndarray, " tests"]:
    """Step-down adjusted p-values, in the order given: ``holm(p) <= 0.05`` makes a false alarm at most 5 % likely.

    The family is exactly what is passed in: say its size beside the result.

    Errors: ValueError when a p-value is outside [0, 1].
    Source: Holm (1979), "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
    """
    p = np.asarray(pvalues, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be a list of numbers in [0, 1], got {pvalues!r}")
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def mcnemar(base: ArrayLike, tuned: ArrayLike) -> float:
    """Two-sided exact p-value that two models answer the same items equally well, one answer each.

    Only items that one model gets right and the other wrong count; with none of them the p-value is 1.

    Errors: ValueError when the two do not have the same items or are not true/false (or 0/1).
    Source: McNemar (1947), Psychometrika 12, in its exact binomial form.
    """
    a, b = np.asarray(base), np.asarray(tuned)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a paired test needs the same items twice, got shapes {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("a McNemar test needs right/wrong items (true/false or 0/1): first leave out the missing ones")
    a, b = a.astype(bool), b.astype(bool)
    lost, won = int((a & ~b).sum()), int((~a & b).sum())
    n = lost + won
    tail = sum(math.comb(n, i) for i in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**n)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not a coverage in (0, 1); 0.95 is usual")
