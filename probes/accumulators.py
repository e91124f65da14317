"""Streaming statistics of rows: seen once, batch by batch, and exactly what all rows together would give.

`Moments` holds the mean, the covariance and the extremes of rows, `CrossMoments` how two sets of columns vary together. Both take
O(d²) memory however many rows there are, add in float64, and merge: the sum of two is what one would have been over the rows of both,
so batches, shards and processes can each keep their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probes.results import read_tensors
from surgery.numbers import require_whole
from surgery.tensorfile import save_whole

Rows = Float[Tensor, "row d"]
_BLOCK = 1 << 20  # entries of a batch that are widened to float64 at a time


@dataclass(eq=False)
class Moments:
    """Mean, covariance and extremes of rows. An accumulator: `add_` changes it.

    count:   rows seen.
    mean:    ``[d]``, float64.
    scatter: ``[d, d]``, float64: the sum over rows of ``(x - mean)(x - mean)ᵀ``.
    low, high: ``[d]``, float64: the smallest and the largest entry of each column; +inf and -inf before the first row.

    Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances", eqs. 2.1.
    """

    count: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]
    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]

    @classmethod
    def empty(cls, d: int, device: torch.device | str = "cpu") -> Moments:
        """Of no rows yet, of width `d`."""
        zero = torch.zeros(d, dtype=torch.float64, device=device)
        return cls(0, zero, torch.zeros(d, d, dtype=torch.float64, device=device), zero + torch.inf, zero - torch.inf)

    @classmethod
    def of(cls, rows: Rows) -> Moments:
        """Of these rows. Raises ValueError as `add_` does."""
        return cls.empty(rows.shape[-1], rows.device).add_(rows)

    def add_(self, rows: Rows) -> Moments:
        """Take in more rows, in place; gives itself. Raises ValueError, and takes nothing in, for another width or rows not finite."""
        _require_width(rows, len(self.mean))
        _require_finite(rows)
        for block in _blocks(rows, self.mean) if len(rows) else ():
            count = self.count + len(block)
            mean = block.mean(0)
            delta = mean - self.mean
            torch.minimum(self.low, block.amin(0), out=self.low)
            torch.maximum(self.high, block.amax(0), out=self.high)
            block -= mean
            self.scatter.addmm_(block.T, block)
            self.scatter.addr_(delta, delta, alpha=self.count * len(block) / count)
            self.mean.add_(delta, alpha=len(block) / count)
            self.count = count
        return self

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both. Raises ValueError when their widths differ."""
        if not isinstance(other, Moments):
            return NotImplemented
        _require_merge(self.mean, other.mean)
        count, delta = self.count + other.count, other.mean.to(self.mean) - self.mean
        share = other.count / count if count else 0.0
        return Moments(
            count,
            self.mean + share * delta,
            self.scatter + other.scatter.to(self.scatter) + self.count * share * torch.outer(delta, delta),
            torch.minimum(self.low, other.low.to(self.low)),
            torch.maximum(self.high, other.high.to(self.high)),
        )

    def covariance(self, ddof: int = 1) -> Float[Tensor, "d d"]:
        """The covariance of the columns, float64: `scatter` over ``count - ddof``. Raises ValueError for `ddof` rows or fewer."""
        return self.scatter / _degrees(self.count, ddof)

    def variance(self, ddof: int = 1) -> Float[Tensor, " d"]:
        """The covariance's diagonal."""
        return self.scatter.diagonal() / _degrees(self.count, ddof)

    def save(self, path: str | Path) -> None:
        """Write count, moments and extremes to a safetensors file."""
        _save(path, self.count, mean=self.mean, scatter=self.scatter, low=self.low, high=self.high)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """What `save` wrote. Raises ValueError for a damaged file, or one of something else."""
        count, found = _load(path, "mean", "scatter", "low", "high")
        return cls(count, **found)

    def __repr__(self) -> str:
        return f"<Moments of {self.count:,} rows of width {len(self.mean)}>"


@dataclass(eq=False)
class CrossMoments:
    """How the columns of x vary with those of y, from rows of both. An accumulator: `add_` changes it.

    count:   rows seen.
    mean_x, mean_y: ``[d]`` and ``[e]``, float64.
    scatter: ``[d, e]``, float64: the sum over rows of ``(x - mean_x)(y - mean_y)ᵀ``.

    Source: Chan, Golub and LeVeque (1979), for two variables.
    """

    count: int
    mean_x: Float[Tensor, " d"]
    mean_y: Float[Tensor, " e"]
    scatter: Float[Tensor, "d e"]

    @classmethod
    def empty(cls, d: int, e: int, device: torch.device | str = "cpu") -> CrossMoments:
        """Of no rows yet, x of width `d` and y of width `e`."""
        wide = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(d, **wide), torch.zeros(e, **wide), torch.zeros(d, e, **wide))

    @classmethod
    def of(cls, x: Float[Tensor, "row d"], y: Float[Tensor, "row e"]) -> CrossMoments:
        """Of these rows. Raises ValueError as `add_` does."""
        return cls.empty(x.shape[-1], y.shape[-1], x.device).add_(x, y)

    def add_(self, x: Float[Tensor, "row d"], y: Float[Tensor, "row e"]) -> CrossMoments:
        """Take in more rows of both, in place; gives itself. Raises ValueError, and takes nothing in, where they do not pair or are not finite."""
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}: give each row of x the row of y that belongs to it.")
        for rows, mean in ((x, self.mean_x), (y, self.mean_y)):
            _require_width(rows, len(mean))
            _require_finite(rows)
        if not len(x):
            return self
        for a, b in zip(_blocks(x, self.mean_x, y.shape[1]), _blocks(y, self.mean_y, x.shape[1]), strict=True):
            count, mean_a, mean_b = self.count + len(a), a.mean(0), b.mean(0)
            delta_x, delta_y = mean_a - self.mean_x, mean_b - self.mean_y
            self.scatter.addmm_((a - mean_a).T, b - mean_b)
            self.scatter.addr_(delta_x, delta_y, alpha=self.count * len(a) / count)
            self.mean_x.add_(delta_x, alpha=len(a) / count)
            self.mean_y.add_(delta_y, alpha=len(a) / count)
            self.count = count
        return self

    def __add__(self, other: CrossMoments) -> CrossMoments:
        """Of the rows of both. Raises ValueError when their widths differ."""
        if not isinstance(other, CrossMoments):
            return NotImplemented
        _require_merge(self.mean_x, other.mean_x)
        _require_merge(self.mean_y, other.mean_y)
        count = self.count + other.count
        x, y = other.mean_x.to(self.mean_x) - self.mean_x, other.mean_y.to(self.mean_y) - self.mean_y
        share = other.count / count if count else 0.0
        scatter = self.scatter + other.scatter.to(self.scatter) + self.count * share * torch.outer(x, y)
        return CrossMoments(count, self.mean_x + share * x, self.mean_y + share * y, scatter)

    def covariance(self, ddof: int = 1) -> Float[Tensor, "d e"]:
        """The covariance of each column of x with each of y, float64. Raises ValueError for `ddof` rows or fewer."""
        return self.scatter / _degrees(self.count, ddof)

    def save(self, path: str | Path) -> None:
        """Write count, means and cross-scatter to a safetensors file."""
        _save(path, self.count, mean_x=self.mean_x, mean_y=self.mean_y, scatter=self.scatter)

    @classmethod
    def load(cls, path: str | Path) -> CrossMoments:
        """What `save` wrote. Raises ValueError for a damaged file, or one of something else."""
        count, found = _load(path, "mean_x", "mean_y", "scatter")
        return cls(count, **found)

    def __repr__(self) -> str:
        return f"<CrossMoments of {self.count:,} rows of widths {len(self.mean_x)} and {len(self.mean_y)}>"


def _blocks(rows: Tensor, like: Tensor, partner: int = 0) -> Iterable[Tensor]:
    """The rows in float64, a piece at a time: a wide copy of a whole batch would be most of the memory."""
    for block in rows.split(max(1, _BLOCK // max(rows.shape[1], partner))):
        yield block.to(like, copy=True)


def _require_width(rows: Tensor, d: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != d:
        raise ValueError(f"These rows are {tuple(rows.shape)}; the statistics so far are of rows of width {d}.")


def _require_finite(rows: Tensor) -> None:
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(1).sum())
        raise ValueError(f"{bad} of {len(rows)} rows hold NaN or infinity: leave them out before adding.")


def _require_merge(a: Tensor, b: Tensor) -> None:
    if len(a) != len(b):
        raise ValueError(f"Statistics of rows of width {len(a)} and of width {len(b)} do not add.")


def _degrees(count: int, ddof: int) -> int:
    require_whole("ddof", ddof, 0)
    if count <= ddof:
        raise ValueError(f"A covariance with ddof={ddof} needs more than {ddof} rows; there are {count}.")
    return count - ddof


def _save(path: str | Path, count: int, **tensors: Tensor) -> None:
    save_whole(path, tensors, {"count": str(count)})


def _load(path: str | Path, *names: str) -> tuple[int, dict[str, Tensor]]:
    tensors, metadata = read_tensors(path, *names)
    if "count" not in metadata:
        raise ValueError(f"{path} does not say of how many rows it is: no such statistics were saved there.")
    return int(metadata["count"]), tensors
