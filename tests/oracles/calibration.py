"""Brier's score and the expected calibration error as their definitions say, one row and one bin at a time."""

from collections.abc import Sequence


def brier(p: Sequence[float], y: Sequence[int]) -> float:
    """Brier 1950, for two classes: the mean squared distance of what was said from what was."""
    return sum((said - was) ** 2 for said, was in zip(p, y, strict=True)) / len(p)


def ece(p: Sequence[float], y: Sequence[int], bins: Sequence[int]) -> float:
    """Guo et al. 2017, equation 3: each bin's share of the rows times the distance between its mean probability and its share of ones."""
    total = 0.0
    for name in set(bins):
        mine = [i for i in range(len(p)) if bins[i] == name]
        said = sum(p[i] for i in mine) / len(mine)
        was = sum(y[i] for i in mine) / len(mine)
        total += len(mine) / len(p) * abs(said - was)
    return total


def equal_width(p: Sequence[float], count: int) -> list[int]:
    """The bin of each probability, [0, 1/count) to [1 - 1/count, 1]."""
    return [next(b for b in range(count) if value < (b + 1) / count or b == count - 1) for value in p]


def murphy(p: Sequence[float], y: Sequence[int], bins: Sequence[int]) -> tuple[float, float, float]:
    """Murphy 1973, equation 7: reliability, resolution and uncertainty."""
    base = sum(y) / len(y)
    reliability = resolution = 0.0
    for name in set(bins):
        mine = [i for i in range(len(p)) if bins[i] == name]
        said = sum(p[i] for i in mine) / len(mine)
        was = sum(y[i] for i in mine) / len(mine)
        reliability += len(mine) / len(p) * (said - was) ** 2
        resolution += len(mine) / len(p) * (was - base) ** 2
    return reliability, resolution, base * (1 - base)
