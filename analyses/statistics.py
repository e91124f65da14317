"""How sure a number is, and whether two differ: intervals (each a `probes.estimates.Estimate`), tests, lengths that were cut off.

Every interval here is of *independent units*, most by resampling them. Answers to one question, cuts of one transcript and matrices of one
layer are not independent of each other: name their question, transcript or layer in ``clusters`` to keep them together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from probes.estimates import (
    ALL_AGREE,
    Estimate,
    agree,
    check_level,
    no_interval,
    numbered,
    percentile,
    resampled_means,
    resamples,
)


def wilson(successes: float, n: int, level: float = 0.95) -> Estimate:
    """A proportion and its Wilson score interval, in [0, 1]: usable for small ``n`` and at 0 or 1.

    Trials must be independent: for several answers a question use ``share`` with clusters. No trials at all say
    nothing: the value is NaN and the interval [0, 1]. successes: part of one where a trial is a share itself.

    Errors: ValueError when ``successes`` is not in [0, n] or ``level`` not in (0, 1).
    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    check_level(level)
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
    unit, units = numbered(clusters, len(rows))
    if statistic is None:
        drawn = resampled_means(np.bincount(unit, weights=rows), np.bincount(unit), draws, seed)
        return percentile(rows.mean(), drawn, n=units, seed=seed, level=level)
    counts = resamples(units, draws, seed)
    drawn = np.array([statistic(np.repeat(rows, count[unit], axis=0)) for count in counts], dtype=float)
    return percentile(statistic(rows), drawn, n=units, seed=seed, level=level)


def share(values: ArrayLike, clusters: Sequence | np.ndarray, *, seed: int = 0, level: float = 0.95) -> Estimate:
    """The share of ones among zeros and ones, with an interval that is never of width zero.

    clusters: one label a value, as in ``bootstrap``. With one value a cluster the interval is Wilson's; with several, clusters are drawn; and
    where every draw would agree, as where all values do or each cluster has the same share, it is Wilson's of as many clusters: answers
    to one question say no more than one. NaN where answers to one question alone differ.

    Errors: ValueError for no values, other ones than 0 and 1 (or true and false), and labels that do not match them.
    """
    rows = np.asarray(values, dtype=float)
    if not np.isin(rows, (0, 1)).all():
        raise ValueError("a share is of values 0 and 1 (or true and false): first leave out the missing ones")
    if not len(rows):
        raise ValueError("nothing to estimate from: no values were given")
    _, units = numbered(clusters, len(rows))
    if units < len(rows) and 0 < rows.sum() < len(rows):
        found = bootstrap(rows, clusters=clusters, seed=seed, level=level)
        if found.low != found.high:
            return found
    return wilson(units * float(rows.mean()), units, level)


def tango(won: float, lost: float, n: int, level: float = 0.95) -> Estimate:
    """A difference of two shares over the same ``n`` questions and its score interval, in [-1, 1]: usable for small ``n``, and where no question tells
    the two apart. Then the ends are as far off as Wilson's of none in ``n``.

    won, lost: questions that only the second, or only the first, has right; parts of one where a question's answers are a share themselves.

    Errors: ValueError when ``won`` and ``lost`` are negative or more than ``n`` together, no question is there or ``level`` is not in (0, 1).
    Source: Tango (1998), "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17, equations 10 and 11.
    """
    check_level(level)
    if not (won >= 0 and lost >= 0 and won + lost <= n) or n < 1:
        raise ValueError(
            f"{won} won and {lost} lost of {n} questions: both must be at least 0, together at most all, of 1 question or more"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    value = (won - lost) / n

    def score(d: float) -> float:
        slope = (2 * n - won + lost) * d - won - lost
        losing = (math.sqrt(slope * slope + 8 * n * lost * d * (1 - d)) - slope) / (
            4 * n
        )  # likeliest share of the lost, given d
        return (won - lost - n * d) / math.sqrt(n * (2 * losing + d * (1 - d)))

    def end(beyond: float, limit: float) -> float:
        within = value
        for _ in range(60 if value != beyond else 0):
            middle = (within + beyond) / 2
            within, beyond = (middle, beyond) if abs(score(middle)) <= limit else (within, middle)
        return within

    return Estimate(value, end(-1.0, z), end(1.0, z), n, None, "tango", level)


def share_difference(base: ArrayLike, tuned: ArrayLike, *, seed: int = 0, level: float = 0.95) -> Estimate:
    """The mean of ``tuned - base`` over the same questions, of shares of right answers, with an interval that is never of width zero.

    base, tuned: one share a question, in [0, 1]. With one answer a question (shares 0 and 1) the interval is Tango's; with several, questions
    are drawn; and where every draw would agree, as all differences are one, it is Tango's of so large a share of the questions turned.

    Errors: ValueError as ``paired_bootstrap``, and for shares outside [0, 1].
    """
    found = paired_bootstrap(base, tuned, seed=seed, level=level)
    a, b = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if min(a.min(), b.min()) < 0 or max(a.max(), b.max()) > 1:
        raise ValueError("shares of right answers lie between 0 and 1")
    apart = b - a
    if not np.isin([a, b], (0, 1)).all() and np.ptp(apart) > 1e-9:
        return found
    return tango(float(apart[apart > 0].sum()), float(-apart[apart < 0].sum()), len(a), level)


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


def crossed_bootstrap(
    values: Float[np.ndarray, "seed item"], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The mean of a table of training seeds and items, with a percentile interval from resampling both: rows and columns are drawn
    independently, and a cell counts as often as its row times its column were.

    For a paired difference give the table of differences. ``n`` counts the items; a table of one seed says nothing of how much another
    would differ. With a handful of seeds the interval is rough: show the rows' means beside it.

    Errors: ValueError for an empty table and for values that are not finite.
    Source: Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1.
    """
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"a table of seeds and items without gaps is needed; this one has shape {values.shape}")
    rows, items = values.shape
    by_row, by_item = resamples(rows, draws, seed), resamples(items, draws, seed + 1)
    drawn = np.einsum("dr,ri,di->d", by_row, values, by_item, optimize=True) / values.size
    found = percentile(values.mean(), drawn, n=items, seed=seed, level=level)
    return replace(found, method=found.method.replace("bootstrap", f"bootstrap of {rows} seeds and {items} items", 1))


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


# --- lengths that were cut off ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Significance:
    """What a test found.

    z       standard normal where there is no effect; what its sign means, the test says
    p       two-sided, in [0, 1]
    n       independent units behind it
    method  which test
    """

    z: float
    p: float
    n: int
    method: str

    def __str__(self) -> str:
        return f"z {self.z:.3g}, p {self.p:.3g} (n={self.n}, {self.method})"


@dataclass(frozen=True)
class Survival:
    """The share still going after each length, from lengths some of which were cut off.

    times     distinct lengths at which something ended, ascending
    share     of all, in [0, 1]: those that last longer than each time
    at_risk   how many had lasted at least until each time
    ended     how many ended at it
    followed  the longest length about which anything is known: infinite when the longest of all ended by itself
    """

    times: Float[np.ndarray, " time"]
    share: Float[np.ndarray, " time"]
    at_risk: Int[np.ndarray, " time"]
    ended: Int[np.ndarray, " time"]
    followed: float

    def at(self, length: float) -> float:
        """The share that lasts longer than a length; NaN beyond what was followed."""
        if length > self.followed:
            return math.nan
        before = int(np.searchsorted(self.times, length, side="right"))
        return float(self.share[before - 1]) if before else 1.0

    @property
    def median(self) -> float:
        """The shortest length that at most half outlast; infinite when more than half were going when last seen."""
        reached = np.flatnonzero(self.share <= 0.5)
        return float(self.times[reached[0]]) if len(reached) else math.inf


def kaplan_meier(lengths: ArrayLike, ended: ArrayLike) -> Survival:
    """The survival curve of lengths, those that were cut off counted for as long as they were seen.

    lengths  at least 0, one an item
    ended    whether it ended by itself at that length; False where it was cut off and is at least that long

    The two must not depend on each other beyond that: a cap on all items alike is fine.

    Errors: ValueError for no items, negative or non-finite lengths, and marks that are not true or false.
    Source: Kaplan and Meier (1958), "Nonparametric estimation from incomplete observations", JASA 53.
    """
    length, over = _lengths(lengths, ended)
    times = np.unique(length[over])
    at_risk = (length[:, None] >= times).sum(axis=0)
    events = ((length[:, None] == times) & over[:, None]).sum(axis=0)
    return Survival(times, _still_going(events, at_risk), at_risk, events, followed(length, over))


def restricted_mean(
    lengths: ArrayLike,
    ended: ArrayLike,
    *,
    until: float | None = None,
    clusters: Sequence | np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean of ``min(length, until)`` where some lengths were cut off: the area under their survival curve.

    until     in the units of the lengths, above 0; by default as far as the lengths were followed, or up to the longest when that one
              ended by itself. Compare two samples at the same ``until`` only
    clusters  one label an item, drawn together, as in ``bootstrap``

    The plain mean of lengths capped at L is this one at ``until=L``; for a cap that differs from item to item it is not. Where no
    item ended before ``until``, the value is ``until``, without an interval: the mean length is at least that. Nor is there one where all
    draws agree, as where all items ended at one length. A resample in which nobody was followed that far takes its curve as level from there on.

    Errors: ValueError as ``kaplan_meier``, and for an ``until`` that nobody was followed to.
    Source: Irwin (1949); Royston and Parmar (2013), BMC Medical Research Methodology 13:152.
    """
    length, over = _lengths(lengths, ended)
    end = _until(until, (length, over))
    unit, units = numbered(clusters, len(length))
    if not (over & (length < end)).any() and not _all_ended_at(end, (length, over)):
        return no_interval(
            end, units, f"no interval: none of {len(length)} ended before {end:g}, so it is at least that"
        )
    drawn = _restricted(length, over, unit, _with_whole(units, draws, seed), end)
    return _unless_all_agree(drawn, units, seed, level)


def restricted_difference(
    base: tuple[ArrayLike, ArrayLike],
    tuned: tuple[ArrayLike, ArrayLike],
    *,
    until: float | None = None,
    clusters: tuple[Sequence | np.ndarray, Sequence | np.ndarray] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The restricted mean of ``tuned`` minus that of ``base``, questions resampled for both together.

    base, tuned  ``(lengths, ended)``, as in ``restricted_mean``
    clusters     the labels of each side's items; the same label on both sides is the same question, drawn for both. Without them the
                 items of the two sides are paired in order, and must be equally many
    until        as in ``restricted_mean``; by default as far as both were followed

    Where no item of either side ended before ``until``, the value is 0, without an interval: nothing is known of the difference. Nor is there
    one where all draws agree, as where the lengths of all questions change alike, or none does.

    Errors: ValueError as ``restricted_mean``; for sides that cannot be paired.
    """
    sides = [_lengths(*side) for side in (base, tuned)]
    if clusters is None and len(sides[0][0]) != len(sides[1][0]):
        raise ValueError(
            f"{len(sides[0][0])} and {len(sides[1][0])} items cannot be paired in order: give the question of each, in clusters"
        )
    end = _until(until, *sides)
    labels = clusters or tuple(np.arange(len(side[0])) for side in sides)
    both = np.concatenate([np.asarray(own) for own in labels])
    unit, units = numbered(both, sum(len(side[0]) for side in sides))
    if not any((over & (length < end)).any() for length, over in sides) and not _all_ended_at(end, *sides):
        return no_interval(
            0.0, units, f"no interval: none of {len(both)} ended before {end:g}, so nothing is known of it"
        )
    counts = _with_whole(units, draws, seed)
    split = len(sides[0][0])
    drawn = [
        _restricted(*side, own, counts, end) for side, own in zip(sides, (unit[:split], unit[split:]), strict=True)
    ]
    return _unless_all_agree(drawn[1] - drawn[0], units, seed, level)


def logrank(
    lengths: ArrayLike, ended: ArrayLike, group: ArrayLike, *, strata: Sequence | np.ndarray | None = None
) -> Significance:
    """Whether two groups last equally long, some lengths being cut off. ``z`` is positive when the second group lasts longer.

    group   False or 0 for the first group, True or 1 for the second
    strata  one label an item (its question): only items of one stratum are compared with each other. Answers to one question are alike,
            and without strata a test of two models on the same questions is too cautious

    A set of lengths that leaves nothing to compare gives z 0 and p 1.

    Errors: ValueError as ``kaplan_meier``; for groups that are not true or false, or one of which is empty.
    Source: Mantel (1966), Cancer Chemotherapy Reports 50; Peto and Peto (1972), JRSS A 135.
    """
    length, over = _lengths(lengths, ended)
    second = np.asarray(group)
    if second.shape != length.shape or not np.isin(second, (0, 1)).all() or len(np.unique(second)) < 2:
        raise ValueError("a log-rank test compares two groups: give each item false or true, and have both")
    second = second.astype(bool)
    unit, units = (
        numbered(strata, len(length)) if strata is not None else (np.zeros(len(length), dtype=int), len(length))
    )
    surplus = variance = 0.0
    for stratum in np.unique(unit):
        own = unit == stratum
        times = np.unique(length[own & over])
        lasted = length[own, None] >= times
        events = ((length[own, None] == times) & over[own, None]).sum(axis=0)
        n, n_second = lasted.sum(axis=0), lasted[second[own]].sum(axis=0)
        seen = ((length[own, None] == times) & (over & second)[own, None]).sum(axis=0)
        share = n_second / n
        surplus += float((events * share - seen).sum())
        variance += float((events * share * (1 - share) * (n - events) / np.maximum(n - 1, 1)).sum())
    z = surplus / math.sqrt(variance) if variance > 0 else 0.0
    return Significance(z, _two_sided(z), units, "log-rank" if strata is None else "log-rank, stratified")


def page(table: ArrayLike) -> Significance:
    """Whether values rise (``z`` above 0) or fall along ordered levels, block by block: Page's test, with ties.

    table  ``[block, level]``: a row a question, a column a strength, columns in the order of the strengths

    The statistic is the sum over blocks of level times rank within the block. Its mean and variance are exact under shuffling within
    blocks, with ties (average ranks); the normal form needs some ten blocks. A table of ties alone gives z 0 and p 1.

    Errors: ValueError for fewer than two levels, no block, or NaN.
    Source: Page (1963), "Ordered hypotheses for multiple treatments", JASA 58.
    Differs: the variance is that of the ranks as they are tied; two-sided.
    """
    from scipy.stats import rankdata

    rows = np.asarray(table, dtype=float)
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"a trend needs a table of blocks and at least two levels without gaps, got shape {rows.shape}: leave out blocks with missing values"
        )
    levels = np.arange(rows.shape[1]) - (rows.shape[1] - 1) / 2
    ranks = rankdata(rows, axis=1) - (rows.shape[1] + 1) / 2  # whose mean in a block is 0, with ties too
    variance = float((levels @ levels) * (ranks**2).sum() / (rows.shape[1] - 1))
    z = float((ranks @ levels).sum()) / math.sqrt(variance) if variance > 0 else 0.0
    return Significance(z, _two_sided(z), len(rows), "Page's trend")


def _lengths(lengths: ArrayLike, ended: ArrayLike) -> tuple[Float[np.ndarray, " item"], Bool[np.ndarray, " item"]]:
    length, over = np.asarray(lengths, dtype=float), np.asarray(ended)
    if length.ndim != 1 or length.shape != over.shape or not len(length):
        raise ValueError(
            f"lengths of shape {length.shape} and marks of shape {over.shape}: one of each an item is needed, and an item at least"
        )
    if not (np.isfinite(length).all() and (length >= 0).all()):
        raise ValueError(
            "lengths must be finite and not negative: leave missing items out, and give those cut off the length that was seen"
        )
    if not np.isin(over, (0, 1)).all():
        raise ValueError("whether an item ended is true or false (or 1 or 0)")
    return length, over.astype(bool)


def followed(lengths: ArrayLike, ended: ArrayLike) -> float:
    """The longest length about which anything is known: infinite when the longest of all ended by itself."""
    length, over = _lengths(lengths, ended)
    last = length.max()
    return float(last) if (~over[length == last]).any() else math.inf


def _all_ended_at(length: float, *samples: tuple[Float[np.ndarray, " _"], Bool[np.ndarray, " _"]]) -> bool:
    return all((over & (lengths == length)).all() for lengths, over in samples)


def _unless_all_agree(drawn: Float[np.ndarray, " draw"], units: int, seed: int, level: float) -> Estimate:
    """The percentile interval of statistics, the first of which is the sample's own."""
    if units > 1 and agree(drawn):
        return no_interval(float(drawn[0]), units, ALL_AGREE)
    return percentile(drawn[0], drawn[1:], n=units, seed=seed, level=level)


def _until(until: float | None, *samples: tuple[Float[np.ndarray, " _"], Bool[np.ndarray, " _"]]) -> float:
    """What means of all the samples can be restricted to, or an error that says so."""
    known = min(followed(*sample) for sample in samples)
    end = min(known, max(float(length.max()) for length, _ in samples)) if until is None else float(until)
    if not 0 < end <= known:
        raise ValueError(
            f"a mean restricted to {end:g}: the limit must be above 0 and not beyond {known:g}, as far as the lengths were followed"
        )
    return end


def _still_going(events: np.ndarray, at_risk: np.ndarray) -> np.ndarray:
    """The product over times of the share that did not end; times at which nobody is left change nothing."""
    ending = np.divide(events, at_risk, out=np.zeros(events.shape), where=at_risk > 0)
    return np.cumprod(1 - ending, axis=-1)


def _restricted(
    length: Float[np.ndarray, " item"],
    over: Bool[np.ndarray, " item"],
    unit: Int[np.ndarray, " item"],
    counts: Int[np.ndarray, "draw unit"],
    until: float,
) -> Float[np.ndarray, " draw"]:
    """The area under the survival curve up to ``until``, for each row of how often each unit is drawn."""
    seen = over & (length < until)
    times = np.unique(length[seen])
    events, first_after = np.zeros((counts.shape[1], len(times))), np.zeros((counts.shape[1], len(times) + 1))
    np.add.at(events, (unit[seen], np.searchsorted(times, length[seen])), 1)
    np.add.at(first_after, (unit, np.searchsorted(times, length, side="right")), 1)
    lasted = first_after[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]  # those that were there at each time
    share = _still_going(counts @ events, counts @ lasted)
    edges = np.append(times, until)
    return edges[0] + share @ np.diff(edges)


def _with_whole(units: int, draws: int, seed: int) -> Int[np.ndarray, "draw unit"]:
    """Bootstrap samples, the first of them the sample itself."""
    return np.concatenate([np.ones((1, units), dtype=int), resamples(units, draws, seed)])


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))
