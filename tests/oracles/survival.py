"""Kaplan and Meier, restricted means, Mantel's test and Page's, restated as slow as they are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def share_lasting(lengths: Sequence[float], ended: Sequence[bool], at: float) -> float:
    """Kaplan and Meier 1958, equation 2b: the product over times up to `at` of (n - d) / n."""
    share = 1.0
    for time in sorted({t for t, over in zip(lengths, ended, strict=True) if over}):
        if time > at:
            break
        n = sum(t >= time for t in lengths)
        d = sum(t == time and over for t, over in zip(lengths, ended, strict=True))
        share *= (n - d) / n
    return share


def restricted_mean(lengths: Sequence[float], ended: Sequence[bool], until: float) -> float:
    """Irwin 1949: the integral of the curve from 0 to `until`, interval by interval."""
    edges = sorted({0.0, until, *(t for t in lengths if t < until)})
    return sum(share_lasting(lengths, ended, a) * (b - a) for a, b in itertools.pairwise(edges))


def restricted_mean_error(lengths: Sequence[float], ended: Sequence[bool], until: float) -> float:
    """The standard error of the restricted mean: Kaplan and Meier 1958, equation 6d, Greenwood's sum with the areas that are left."""
    variance = 0.0
    for time in sorted({t for t, over in zip(lengths, ended, strict=True) if over and t < until}):
        n = sum(t >= time for t in lengths)
        d = sum(t == time and over for t, over in zip(lengths, ended, strict=True))
        left = restricted_mean(lengths, ended, until) - restricted_mean(lengths, ended, time)
        if n > d:
            variance += left**2 * d / (n * (n - d))
    return math.sqrt(variance)


def logrank(lengths: Sequence[float], ended: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """Mantel 1966: expected less observed endings of the second group, and the sum of hypergeometric variances."""
    rows = list(zip(lengths, ended, second, strict=True))
    surplus = variance = 0.0
    for time in sorted({t for t, over, _ in rows if over}):
        n = sum(t >= time for t, _, _ in rows)
        n2 = sum(t >= time and g for t, _, g in rows)
        d = sum(t == time and over for t, over, _ in rows)
        d2 = sum(t == time and over and g for t, over, g in rows)
        surplus += d * n2 / n - d2
        if n > 1:
            variance += d * (n2 / n) * (1 - n2 / n) * (n - d) / (n - 1)
    return surplus, variance


def page_by_shuffling(table: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Page's L with average ranks, and its mean and variance over every shuffling of every block."""

    def ranks(row: Sequence[float]) -> list[float]:
        return [sum(x < y for x in row) + (sum(x == y for x in row) + 1) / 2 for y in row]

    def score(row: Sequence[float]) -> float:
        return sum((j + 1) * r for j, r in enumerate(row))

    mean = variance = 0.0
    for row in table:
        scores = [score(shuffled) for shuffled in itertools.permutations(ranks(row))]
        centre = sum(scores) / len(scores)
        mean += centre
        variance += sum((s - centre) ** 2 for s in scores) / len(scores)
    return sum(score(ranks(row)) for row in table), mean, variance
