"""Judged on what was not learned from: folds that keep a question whole, the AUC, and its interval over questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from probes.estimates import ALL_AGREE, Estimate, no_interval, resamples
from surgery.numbers import require_whole

_CHUNK = 1 << 20  # resampled rows that are in work at once


def opposite(found: Estimate) -> Estimate:
    """One less it: the AUC of the opposite direction."""
    return replace(found, value=1 - found.value, low=1 - found.high, high=1 - found.low)


def units(names: Sequence[Any] | ArrayLike) -> Int[np.ndarray, " row"]:
    """Groups as numbers from 0, in the order in which they first come."""
    numbers: dict[Any, int] = {}
    listed = names.tolist() if isinstance(names, np.ndarray) else list(names)  # type: ignore[arg-type]
    return np.array([numbers.setdefault(name, len(numbers)) for name in listed], dtype=np.int64)


def deal(
    groups: Int[np.ndarray, " row"], labels: ArrayLike, *, folds: int = 5, seed: int = 0
) -> Int[np.ndarray, " row"]:
    """For each row the fold in which it is held out, 0 to folds - 1.

    A group stays whole, and groups of like mean label are spread over all folds. With fewer groups than folds there are as many
    folds as groups. Raises ValueError where there is nothing to hold out: one group only.
    """
    require_whole("folds", folds)
    require_whole("seed", seed, 0)
    if folds < 2:
        raise ValueError(f"{folds} folds hold nothing out: ask for 2 or more.")
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise ValueError(
            "All rows are of one group (question): nothing can be held out. Give rows of several questions."
        )
    mean = np.bincount(groups, np.asarray(labels, dtype=float)) / np.maximum(sizes, 1)
    order = np.lexsort((np.random.default_rng(seed).random(len(sizes)), mean))
    fold = np.empty(len(sizes), dtype=np.int64)
    fold[order] = np.arange(len(sizes)) % folds
    return fold[groups]


def require_two_a_fold(groups: Int[np.ndarray, " row"], folds: int, called: str = "questions") -> None:
    """Raise ValueError where `deal` would give a fold one group only.

    An AUC compares the rows of a fold with each other. In a fold of one question, where a prompt's activations are the same in all rows, all tie.
    """
    count = len(np.unique(groups))
    if count >= 2 * folds:
        return
    fix = f"ask for at most {count // 2} folds, or give more" if count >= 4 else "give at least 4"
    raise ValueError(
        f"{folds} folds of {count} {called}: a fold would hold one, and rows are compared inside a fold; {fix}."
    )


def auc(scores: ArrayLike, labels: ArrayLike, strata: ArrayLike | None = None) -> float:
    """How often a positive row scores above a negative one of the same stratum, ties counted half: in [0, 1], 0.5 is chance.

    strata: a label a row; only rows with equal labels are compared. None compares all. NaN where no two rows can be compared.
    Raises ValueError for scores of NaN, labels other than 1 and 0, and rows that do not match.
    Source: Mann and Whitney (1947); strata: van Elteren (1960), each pair weighing the same.
    """
    s, y, strata = _rows(scores, labels, strata)
    if missing := int(np.isnan(s).sum()):
        raise ValueError(f"{missing} of {len(s)} scores are NaN: leave their rows out.")
    won, asked = _won_and_asked(s, y, strata, np.ones((1, len(s))))
    return float(won[0] / asked[0]) if asked[0] else math.nan


def auc_score(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    folds: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    what: str = "AUC",
) -> Estimate:
    """`auc` with a percentile interval from drawing whole groups (questions) with replacement.

    Rows with a NaN score are left out. Draws without a pair to compare are left out too; where they are most, the interval is NaN. A
    stratum inside one group is copied with it: two copies of a question are two questions, never compared with each other.

    folds: how many folds the scores were cross-fitted over; None where whoever gave the scores had never seen any of the rows. What is
        fitted on all folds but one has learned from rows that are judged elsewhere, so that the judgements hang together, and the
        bootstrap, which takes them for independent, gives intervals too short by up to a factor of about 1.4. They are widened by
        ``sqrt(1 + folds / (folds - 1))``, 1.5 for five, and end at 0 and 1.

    Where all pairs are won, or none, every draw agrees: the interval then reaches as far as the exact one of as many groups all won. Where
    they agree on anything else, all scores that are compared being equal, say, there is none.
    Source: Efron and Tibshirani (1993), section 13.3, with groups as units; Nadeau and Bengio (2003), "Inference for the generalization error",
    equation 8, for the widening; Clopper and Pearson (1934) for all or none.
    """
    widening(folds)  # raises before any work
    s, y, strata = _rows(scores, labels, strata)
    seen = ~np.isnan(s)
    s, y, strata, unit = s[seen], y[seen], units(strata[seen]), units(np.asarray(groups)[seen])
    count = int(unit.max()) + 1 if len(unit) else 0
    value = auc(s, y, strata) if count else math.nan
    if count < 2 or math.isnan(value):
        return no_interval(value, count, f"{what}, no interval")
    times = resamples(count, draws, seed)
    if _nested(strata, unit):
        row, won, asked = _contests(s, y, strata, np.ones((1, len(s))))
        won, asked = (times @ np.bincount(unit[row], side[0], minlength=count) for side in (won, asked))
    else:
        step = max(1, _CHUNK // len(s))
        parts = [_won_and_asked(s, y, strata, times[i : i + step, unit].astype(float)) for i in range(0, draws, step)]
        won, asked = (np.concatenate(side) for side in zip(*parts, strict=True))
    low, high = _ends(value, won, asked, folds)
    if low == high and 0 < value < 1:
        return no_interval(value, count, f"{what}, {ALL_AGREE}")
    perfect = 0.025 ** (1 / count)
    if value == 1:  # every draw says so too; as a share of `count` groups it is still no more than this
        low = min(low, perfect)
    if value == 0:
        high = max(high, 1 - perfect)
    return Estimate(value, max(low, 0.0), min(high, 1.0), count, seed, f"{what}, {_how(draws, folds)}")


def mean_score(
    above: Float[np.ndarray, " row"],
    below: Float[np.ndarray, " row"],
    groups: ArrayLike,
    *,
    flip: bool = False,
    most: float = math.inf,
    folds: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    what: str = "mean",
) -> Estimate:
    """``sum(above) / sum(below)``, or one less it with `flip`, with a percentile interval from drawing whole groups.

    above, below: 0 or more. An accuracy is hits over ones; an R² is one less squared errors over squared deviations. folds: as in `auc_score`;
    the widened interval of the ratio ends at 0, and at `most`, the largest that it can be. Where all draws agree there is none.
    """
    unit = units(groups)
    sums = np.stack([np.bincount(unit, above), np.bincount(unit, below)])
    count = sums.shape[1]
    ratio = float(sums[0].sum() / sums[1].sum())
    if count < 2:
        return no_interval(1 - ratio if flip else ratio, count, f"{what}, no interval")
    times = resamples(count, draws, seed)
    low, high = _ends(ratio, times @ sums[0], times @ sums[1], folds)
    if math.isclose(low, high, rel_tol=1e-9):
        return no_interval(1 - ratio if flip else ratio, count, f"{what}, {ALL_AGREE}")
    found = Estimate(ratio, max(low, 0.0), min(high, most), count, seed, f"{what}, {_how(draws, folds)}")
    return opposite(found) if flip else found


def widening(folds: int | None) -> float:
    """How much wider an interval of cross-fitted predictions is than the bootstrap's, see `auc_score`."""
    if folds is None:
        return 1.0
    require_whole("folds", folds, 2)
    return math.sqrt(1 + folds / (folds - 1))


def _ends(value: float, above: np.ndarray, below: np.ndarray, folds: int | None) -> tuple[float, float]:
    """The ends of the interval of a ratio that was drawn again and again; NaN where most draws have nothing below the line."""
    drawn = above[below > 0] / below[below > 0]
    if 2 * len(drawn) < len(above):
        return math.nan, math.nan
    wider = widening(folds)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value - wider * (value - low)), float(value + wider * (high - value))


def _how(draws: int, folds: int | None) -> str:
    return f"percentile bootstrap over groups, {draws} draws" + (f", widened for {folds} folds" if folds else "")


def shuffled(labels: ArrayLike, groups: Int[np.ndarray, " row"], *, seed: int) -> np.ndarray:
    """Labels dealt out again such that nothing tells them, and rows of a group stay as alike as they were.

    Whole groups exchange theirs, and where labels differ inside groups, so do the rows of each. Of groups that differ in size, a group's labels
    run on into the next where they do not fit.
    Source: the permutation null of Hewitt and Liang (2019), arXiv 1909.03368. They give a type its label at random; to exchange labels inside
    groups alone would leave what tells a group, and of rows that are the same in all of a group (its prompt) that is everything.
    """
    y, draw = np.asarray(labels), np.random.default_rng(seed)
    names, first = np.unique(groups, return_index=True)
    unit = units(groups)
    if all((y[groups == g] == y[f]).all() for g, f in zip(names, first, strict=True)):
        return draw.permutation(y[first])[unit]
    giving, taking = draw.permutation(len(names)), draw.permutation(len(names))
    new = np.empty_like(y)
    new[np.argsort(taking[unit], kind="stable")] = y[np.lexsort((draw.random(len(y)), giving[unit]))]
    return new


def _rows(scores: ArrayLike, labels: ArrayLike, strata: ArrayLike | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s, given = np.asarray(scores, dtype=float), np.asarray(labels)
    if not np.isin(given, (0, 1)).all():
        raise ValueError("An AUC is of two classes: labels are 1 or 0 (or true and false).")
    y = given.astype(bool)
    k = np.zeros(len(s), dtype=np.int64) if strata is None else units(strata)
    if not s.shape == y.shape == k.shape or s.ndim != 1:
        raise ValueError(
            f"An AUC needs a score, a label and a stratum a row; got shapes {s.shape}, {y.shape}, {k.shape}."
        )
    return s, y, k


def _nested(strata: np.ndarray, unit: np.ndarray) -> bool:
    """Whether each stratum lies in one group."""
    first = np.unique(strata, return_index=True)[1]
    return bool((unit[first][strata] == unit).all())


def _won_and_asked(
    s: np.ndarray, y: np.ndarray, strata: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    _, won, asked = _contests(s, y, strata, weights)
    return won.sum(axis=1), asked.sum(axis=1)


def _contests(
    scores: Float[np.ndarray, " row"],
    labels: Bool[np.ndarray, " row"],
    strata: Int[np.ndarray, " row"],
    weights: Float[np.ndarray, "draw row"],
) -> tuple[Int[np.ndarray, " positive"], Float[np.ndarray, "draw positive"], Float[np.ndarray, "draw positive"]]:
    """For each positive row: which it is, the weight of the negatives it beats (ties half) and of all it meets, times its own."""
    order = np.lexsort((scores, strata))
    s, k, y, w = scores[order], strata[order], labels[order], weights[:, order]
    new = np.ones(len(s), dtype=bool)
    new[1:] = k[1:] != k[:-1]
    first, last = _run_ends(new)
    new[1:] |= s[1:] != s[:-1]
    begin, end = _run_ends(new)
    below = np.zeros((len(w), len(s) + 1))
    np.cumsum(w * ~y, axis=1, out=below[:, 1:])
    at = np.flatnonzero(y)
    start = below[:, first[at]]
    won = (below[:, begin[at]] + below[:, end[at]]) / 2 - start
    return order[at], w[:, at] * won, w[:, at] * (below[:, last[at]] - start)


def _run_ends(new: Bool[np.ndarray, " row"]) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Where the run that each row is in begins and ends, given where runs begin."""
    begins = np.flatnonzero(new)
    run = np.cumsum(new) - 1
    return begins[run], np.append(begins[1:], len(new))[run]
