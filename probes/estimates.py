"""A number with its interval, by drawing independent units again and again.

Answers to one question, cuts of one transcript and matrices of one layer are not independent of each other: whole questions, transcripts or
layers are drawn, all their rows with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num

from surgery.numbers import require_whole


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    value:  the point estimate, in the units of what was measured; NaN where nothing could be judged.
    low:    lower end of the interval; NaN where one independent unit leaves nothing to judge the spread by.
    high:   upper end.
    n:      independent units behind it (questions, transcripts, layers), not rows.
    seed:   of the resampling; None where nothing was drawn, or a file of before does not say.
    method: how the interval was made, ``"wilson"`` or ``"percentile bootstrap, 2000 draws"``; of a held-out number also what was compared.
    level:  nominal coverage, in (0, 1).
    """

    value: float
    low: float
    high: float
    n: int
    seed: int | None
    method: str
    level: float = 0.95

    def __str__(self) -> str:
        if math.isnan(self.low) and self.seed is None:  # the method says why
            return f"{self.value:.3g} (n={self.n}, {self.method})"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n={self.n})"


ALL_AGREE = "no interval: all draws agree"


def no_interval(value: float, n: int, method: str) -> Estimate:
    """A number of which no interval can be told; method: why not."""
    return Estimate(value, math.nan, math.nan, n, None, method)


def numbered(labels: Sequence | np.ndarray | None, items: int) -> tuple[Int[np.ndarray, " item"], int]:
    """The number of each item's unit, from 0 in the order of the labels, and how many units there are; without labels each is its own.

    Raises ValueError for labels that are not one an item. (`probes.held_out.units` numbers in the order in which units come.)
    """
    named = np.arange(items) if labels is None else np.asarray(labels)
    if named.shape != (items,):
        raise ValueError(f"{items} values but cluster labels of shape {named.shape}: give one label a value")
    _, unit = np.unique(named, return_inverse=True)
    return unit, int(unit.max()) + 1


def resamples(units: int, draws: int, seed: int) -> Int[np.ndarray, "draws units"]:
    """How often each of ``units`` independent units is drawn in each bootstrap sample; every row sums to ``units``.

    For a statistic made of per-unit sums, ``resamples(...) @ sums`` is every bootstrap sample at once.
    """
    require_whole("draws", draws)
    require_whole("seed", seed, 0)
    if units < 1 or draws < 1:
        raise ValueError(f"{draws} bootstrap draws of {units} units: both must be at least 1")
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws)


def resampled_means(
    sums: Num[np.ndarray, "units ..."], sizes: Num[np.ndarray, " units"], draws: int, seed: int
) -> Float[np.ndarray, "draws ..."]:
    """The mean over all members in each bootstrap sample of units, from each unit's sum and its number of members."""
    counts = resamples(len(sizes), draws, seed)
    return ((counts @ sums).T / (counts @ sizes)).T


def ends(drawn: Float[np.ndarray, "draws ..."], n: int, level: float) -> Float[np.ndarray, "2 ..."]:
    """Where the middle `level` of statistics on bootstrap samples of `n` units begins and ends; NaN with fewer than two units."""
    check_level(level)
    if n < 2:
        return np.full((2, *drawn.shape[1:]), math.nan)
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)


def percentile(value: float, drawn: Float[np.ndarray, " draws"], *, n: int, seed: int, level: float = 0.95) -> Estimate:
    """The percentile interval of statistics ``drawn`` on bootstrap samples of ``n`` independent units.

    With fewer than two units every sample is the same one, so the interval is NaN rather than of width zero. So it is
    when a statistic is undefined (NaN) on some sample. Where all samples agree the width is zero, which says that no spread was seen, not
    that there is none; the method says so.

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", section 13.3.
    """
    low, high = ends(drawn, n, level)
    said = f"percentile bootstrap, {len(drawn)} draws" + (", which all agree" if agree(drawn) and n > 1 else "")
    return Estimate(float(value), float(low), float(high), n, seed, said, level)


def agree(drawn: Float[np.ndarray, " draws"]) -> bool:
    """Whether a statistic is the same on all samples, but for rounding: nothing then tells how far it scatters."""
    return bool(np.ptp(drawn) <= 1e-9 * np.abs(drawn).max())


def check_level(level: float) -> None:
    """Raise ValueError where it is no coverage."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a coverage in (0, 1), 0.95 for example.")
