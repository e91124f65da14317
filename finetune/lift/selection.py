"""Which entries of a matrix are trained: the principal ones, and what they are compared with.

Every rule gives a score, every choice takes the largest scores; so budgets, blocks, one threshold over many matrices and growing masks
work alike for all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finetune.lift.warm import GUARDS, warm_subspace
from surgery.linalg import STRIP, each_matrix, low_rank_factors, work_precision

R = TypeVar("R")

Select = Literal[
    "largest",
    "smallest",
    "random",
    "magnitude",
    "gradient",
    "movement",
    "hybrid",
    "random-triplets",
    "smallest-triplets",
]
OF_GRADIENTS = ("gradient", "movement")
_TRIPLETS = ("hybrid", "random-triplets", "smallest-triplets")
_SAMPLE = 1 << 15  # scores of a matrix that are looked at for a first bound of the threshold


def budget(
    shape: tuple[int, int] | torch.Size, density: float | None = None, lora_rank: int | None = None, block: int = 1
) -> int:
    """How many entries of a matrix of this shape are trained; exactly one of the two budgets must be given.

    density: fraction of the entries, in (0, 1]; rounded down, at least one entry.
    lora_rank: as many entries as a LoRA adapter of this rank has parameters, `(out + in) * lora_rank`, at most all.
    block: entries are counted in squares of this side; rounded down to whole ones, at least one.
    Raises ValueError for both, neither, or a value out of range.
    Source: arXiv 2506.00772, section 3 (lora_rank).
    """
    if (density is None) == (lora_rank is None):
        raise ValueError(f"give exactly one of density and lora_rank, got density={density} and lora_rank={lora_rank}")
    out, into = shape
    if density is not None:
        if not 0 < density <= 1:
            raise ValueError(f"density is a fraction in (0, 1], got {density}")
        count = int(density * out * into)
    else:
        assert lora_rank is not None
        if lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
        count = min((out + into) * lora_rank, out * into)
    return max(1, count // block**2) * block**2


def principal_indices(
    W: Float[Tensor, "out in"],
    rank: int,
    count: int,
    select: Select = "largest",
    seed: int = 0,
    *,
    block: int = 1,
    gradient: Float[Tensor, "out in"] | None = None,
) -> Int[Tensor, " count"]:
    """The flat positions of the `count` principal entries of W, ascending: int32, or int64 from 2**31 entries on.

    rank: how much of the spectrum the filter keeps, 1 or more (from the short side on it filters nothing).
    count: 1 up to all entries.
    select: "largest" |entries| of the rank-`rank` part of W (LIFT); "smallest" ones (what the released code trains); or, with other
        singular triplets kept in place of the `rank` largest, the largest |entries| of the "smallest-triplets", of "random-triplets"
        drawn by `seed`, or of a "hybrid" of the largest and the smallest, half each. Without a filter: "magnitude", the largest |W|;
        "random" ones drawn by `seed`; the largest "gradient" |G|; the largest "movement" -G W, entries that the gradient drives away
        from zero.
    block: choose squares of this side in place of entries; it must divide both sides of W, and its area the count. A square's score is
        the sum of squares of what its entries are compared by (of "movement", the sum).
    gradient: G, for the two that need it.
    Exact: the same set as a float64 SVD gives (a float32 SVD's own rounding moves an entry now and then). Among entries
    equal to the threshold, the lowest positions are taken. Raises ValueError for bad arguments and for a W that is not
    finite.
    Source: arXiv 2506.00772, Algorithm 1; section 6 (triplets, blocks). Movement: arXiv 2005.07683, Eq. 4.
    """
    if W.ndim != 2:
        raise ValueError(f"principal entries are those of a matrix, got shape {tuple(W.shape)}")
    if not 1 <= count <= W.numel():
        raise ValueError(f"count {count} asked of a matrix with {W.numel()} entries")
    if rank < 1:
        raise ValueError(f"the filter's rank must be at least 1, got {rank}")
    check_select(select)
    check_block(W.shape, block)
    if count % block**2:
        raise ValueError(f"count {count} is not a whole number of {block}x{block} blocks")
    return _one(Matrix("", W, count, seed=seed, gradient=gradient), select, rank, block, 1.0).indices


@dataclass(frozen=True)
class Matrix:
    """A matrix to choose entries of, and what the choice depends on.

    height: how many rows the whole has, where `W` and `gradient` are some of its rows (`finetune.lift.shards`). count: entries of its budget. own: that budget is its own, it has no part in one threshold over many matrices.
    start: orthonormal vectors of the short side to begin from, nearly the leading singular vectors: `rank` of them or more.
    old, cap: chosen entries that stay chosen, and how many there may be in all; None where the choice is made afresh.
    """

    name: str
    W: Tensor
    count: int
    seed: int = 0
    own: bool = False
    gradient: Tensor | None = None
    start: Tensor | None = None
    old: Tensor | None = None
    cap: int = 0
    height: int | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the whole matrix."""
        return self.W.shape if self.height is None else torch.Size((self.height, self.W.shape[1]))


@dataclass(frozen=True)
class Choice:
    """indices: ascending flat positions. basis: of the filter and some vectors more, where it is to be begun from the next time.

    warm: it was begun from the last one, and got close enough.
    """

    indices: Tensor
    basis: Tensor | None
    warm: bool


def choose(
    matrices: Sequence[Matrix],
    select: Select,
    rank: int,
    *,
    block: int = 1,
    together: bool = False,
    agreement: float = 1.0,
) -> list[Choice]:
    """A choice for each matrix, in order.

    together: the budgets of all (but those with their `own`) are one, spent on the largest scores wherever they are. Scores are made
        comparable by dividing what is compared (W, G or -G W) by its root mean square in each matrix.
    agreement: 1 finds the filter exactly; below, it may begin from `start`, with at least this fraction of the entries meant to be the same.
    Raises ValueError naming the matrix that is not finite.
    """
    many = matrices[0].W.device.type == "cpu" and sum(m.W.numel() for m in matrices) > 2**18  # below, threads cost more
    own = [i for i, m in enumerate(matrices) if m.own or not together]
    shared = [i for i in range(len(matrices)) if i not in set(own)]

    def one(i: int) -> Choice:
        return _named(matrices[i], lambda m: _one(m, select, rank, block, agreement))

    def score(i: int) -> _Scored:
        return _named(matrices[i], lambda m: _scored(m, select, rank, block, agreement, comparable=True))

    choices = dict(zip(own, each_matrix(one, own) if many else map(one, own), strict=True))
    if shared:
        scored = each_matrix(score, shared) if many else [score(i) for i in shared]
        found = _chosen([matrices[i] for i in shared], scored, block)
        choices |= dict(zip(shared, found, strict=True))
    return [choices[i] for i in range(len(matrices))]


def check_select(select: str) -> None:
    if select not in get_args(Select):
        raise ValueError(f"select is one of {', '.join(get_args(Select))}: got {select!r}")


def check_block(shape: torch.Size | tuple[int, int], block: int) -> None:
    if block < 1 or any(side % block for side in shape):
        raise ValueError(f"blocks of side {block} do not tile a {shape[0]}x{shape[1]} matrix")


# --- scores -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What the units (entries, or blocks) of a matrix are compared by; the scores of a whole matrix never exist at once.

    of: scores `[row, column]` of the rows of units asked for, as a slice or as positions. grid: rows and columns of units.
    """

    of: Callable[[slice | Tensor], Tensor]
    grid: tuple[int, int]
    device: torch.device

    @property
    def units(self) -> int:
        return self.grid[0] * self.grid[1]

    def sample(self) -> Float[Tensor, " some"]:
        stride = max(1, self.units // _SAMPLE)
        return self.of(torch.arange(0, self.grid[0], stride, device=self.device)).reshape(-1)

    def above(self, bound: float) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Positions, ascending, and scores of the units that reach a bound."""
        positions, scores = [], []
        for start, strip in self._strips():
            at = (strip >= bound).nonzero().squeeze(1)
            positions.append(at + start * self.grid[1])
            scores.append(strip[at])
        return torch.cat(positions), torch.cat(scores)

    def at(self, units: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The scores at ascending positions."""
        found = []
        for start, strip in self._strips():
            first, last = torch.searchsorted(
                units, torch.tensor([start * self.grid[1], start * self.grid[1] + len(strip)], device=units.device)
            ).tolist()
            found.append(strip[units[first:last] - start * self.grid[1]])
        return torch.cat(found)

    def _strips(self) -> Iterator[tuple[int, Tensor]]:
        rows = max(1, STRIP // self.grid[1]) if self.device.type == "cpu" else self.grid[0]
        for start in range(0, self.grid[0], rows):
            yield start, self.of(slice(start, min(start + rows, self.grid[0]))).reshape(-1)


@dataclass(frozen=True)
class _Scored:
    scores: Scores
    basis: Tensor | None = None
    warm: bool = False


def largest(scored: Sequence[Scores], count: int) -> list[Int[Tensor, " n"]]:
    """Ascending positions, in each, of the `count` units with the largest scores of all.

    Ties at the threshold go to the first matrices and the lowest positions.
    """
    total, home = sum(s.units for s in scored), scored[0].device
    # Some of the rows bound the threshold from below, so that only a few candidates are ever ordered.
    sample = torch.cat([s.sample().to(home) for s in scored])
    for slack in (1.3, 3.0, math.inf):
        reach = min(len(sample), math.ceil(min(slack * count / total, 1.0) * len(sample)) + 32)
        bound = -math.inf if slack == math.inf else float(sample.kthvalue(len(sample) - reach + 1).values)
        found = [s.above(bound) for s in scored]
        if sum(len(positions) for positions, _ in found) >= count:
            break
    candidate = torch.cat([scores.to(home) for _, scores in found])
    threshold = candidate.kthvalue(len(candidate) - count + 1).values
    kept = candidate >= threshold
    surplus = int(kept.sum()) - count
    if surplus:
        kept[(candidate == threshold).nonzero().squeeze(1)[-surplus:]] = False
    parts = kept.split([len(positions) for positions, _ in found])
    return [positions[part.to(positions.device)] for (positions, _), part in zip(found, parts, strict=True)]


def _one(m: Matrix, select: Select, rank: int, block: int, agreement: float) -> Choice:
    if m.count == m.W.numel():  # nothing to choose; but what is trained must be finite
        _require_finite(m.W)
        return Choice(_as_indices(torch.arange(m.count, device=m.W.device), m.W.shape, 1), None, False)
    return _chosen([m], [_scored(m, select, rank, block, agreement, comparable=False)], block)[0]


def _chosen(matrices: Sequence[Matrix], scored: Sequence[_Scored], block: int) -> list[Choice]:
    """The budget of all these matrices together, spent on the largest scores; where entries stay, what there is room for is added."""
    scores = [s.scores for s in scored]
    units = largest(scores, sum(m.count for m in matrices) // block**2)
    if matrices[0].old is not None:
        before = [_as_units(m.old, m.W.shape, block) for m in matrices if m.old is not None]
        units = _grown(scores, before, units, sum(m.cap for m in matrices) // block**2)
    return [
        Choice(_as_indices(chosen, m.W.shape, block), s.basis, s.warm)
        for m, s, chosen in zip(matrices, scored, units, strict=True)
    ]


def _grown(scores: Sequence[Scores], old: Sequence[Tensor], new: Sequence[Tensor], cap: int) -> list[Tensor]:
    """Old units and those new ones that there is room for under a joint cap, largest scores first."""
    fresh = [n[~torch.isin(n, o)] for n, o in zip(new, old, strict=True)]
    room = cap - sum(map(len, old))
    if sum(map(len, fresh)) > room:
        home = fresh[0].device
        score = torch.cat([s.at(n).to(home) for s, n in zip(scores, fresh, strict=True)])
        kept = torch.zeros(len(score), dtype=torch.bool, device=home)
        kept[score.argsort(descending=True, stable=True)[: max(0, room)]] = True
        parts = kept.split([len(n) for n in fresh])
        fresh = [n[part.to(n.device)] for n, part in zip(fresh, parts, strict=True)]
    return [torch.cat([o, n]).sort().values for o, n in zip(old, fresh, strict=True)]


def _scored(m: Matrix, select: Select, rank: int, block: int, agreement: float, comparable: bool) -> _Scored:
    W = m.W.detach()
    if select == "random":
        _require_finite(W)
        grid = (W.shape[0] // block, W.shape[1] // block)
        drawn = torch.rand(grid, generator=torch.Generator().manual_seed(m.seed)).to(W.device)
        return _Scored(Scores(lambda rows: drawn[rows], grid, W.device))
    if select in OF_GRADIENTS:
        _require_finite(W)
        if m.gradient is None:
            raise ValueError(f'select="{select}" needs a gradient, and none has arrived')
        _require_finite(m.gradient, "gradient")
        G = m.gradient.detach()
        if select == "gradient":
            return _Scored(_by_size(lambda rows: wide(G[rows]), G, block, 1.0, comparable))
        return _Scored(_as_it_is(lambda rows: -wide(G[rows]) * wide(W[rows]), W, block, comparable))
    sign = -1.0 if select == "smallest" else 1.0
    if select == "magnitude" or rank >= min(W.shape):
        _require_finite(W)
        return _Scored(_by_size(lambda rows: wide(W[rows]), W, block, sign, comparable))
    left, across, basis, warm = _filtered(W, select, rank, m.start, agreement, m.seed)
    scores = _by_size(lambda rows: left[rows] @ across, W, block, sign, comparable)
    return _Scored(scores, basis, warm)


def _filtered(
    W: Tensor, select: Select, rank: int, start: Tensor | None, agreement: float, seed: int
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Factors whose product is the filtered matrix, the basis to begin from the next time, and whether this time's was begun from `start`."""
    if select in _TRIPLETS:
        left, across = _other_triplets(W, rank, select, seed)
        return left, across, None, False
    tall = W.shape[1] <= W.shape[0]
    # Half the room: the error of the filter is an estimate, and the share of other entries differs by matrix.
    if (
        start is not None
        and agreement < 1
        and (basis := warm_subspace(W, start, rank, (1 - agreement) / 2)) is not None
    ):
        whole, inner = wide(W), basis[:, :rank]
        left, across = (whole @ inner, inner.T) if tall else (inner, inner.T @ whole)
        return left, across.contiguous(), basis, True
    held = min(rank + GUARDS, min(W.shape)) if agreement < 1 else rank
    left, right = low_rank_factors(W, held)
    basis = (right if tall else left).float() if agreement < 1 else None
    return left[:, :rank], right[:, :rank].T.contiguous(), basis, False


def _other_triplets(W: Tensor, rank: int, select: Select, seed: int) -> tuple[Tensor, Tensor]:
    _require_finite(W)
    U, S, Vh = torch.linalg.svd(W.to(work_precision(W)), full_matrices=False)
    short = len(S)
    if select == "hybrid":
        kept = torch.cat([torch.arange((rank + 1) // 2), torch.arange(short - rank // 2, short)])
    elif select == "smallest-triplets":
        kept = torch.arange(short - rank, short)
    else:
        kept = torch.randperm(short, generator=torch.Generator().manual_seed(seed))[:rank].sort().values
    kept = kept.to(W.device)
    return U[:, kept] * S[kept], Vh[kept].contiguous()


def _by_size(
    values: Callable[[slice | Tensor], Tensor], of: Tensor, block: int, sign: float, comparable: bool
) -> Scores:
    """Entries compared by |value|, blocks by the sum of their squares; a sign of -1 turns the order around."""
    scale = sign / _rms(of) ** (1 if block == 1 else 2) if comparable else sign
    grid = (of.shape[0] // block, of.shape[1] // block)

    def score(rows: slice | Tensor) -> Tensor:
        if block == 1:
            found = values(rows).abs()
        else:
            found = values(_spread(rows, block)).view(-1, block, grid[1], block).square().sum((1, 3))
        return found if scale == 1 else found.mul_(scale)

    return Scores(score, grid, of.device)


def _as_it_is(values: Callable[[slice | Tensor], Tensor], of: Tensor, block: int, comparable: bool) -> Scores:
    """Entries compared by their value, sign and all, blocks by their sum."""
    whole = slice(0, of.shape[0])
    scale = 1 / _rms(values(whole)) if comparable else 1.0
    grid = (of.shape[0] // block, of.shape[1] // block)

    def score(rows: slice | Tensor) -> Tensor:
        found = values(rows if block == 1 else _spread(rows, block))
        return (found if block == 1 else found.view(-1, block, grid[1], block).sum((1, 3))) * scale

    return Scores(score, grid, of.device)


def _spread(rows: slice | Tensor, block: int) -> slice | Tensor:
    """The rows of entries that rows of blocks are made of."""
    if isinstance(rows, slice):
        return slice(rows.start * block, rows.stop * block)
    return (rows[:, None] * block + torch.arange(block, device=rows.device)).view(-1)


def _as_indices(units: Tensor, shape: torch.Size, block: int) -> Tensor:
    if block > 1:
        columns = shape[1] // block
        corner = units // columns * block * shape[1] + units % columns * block
        side = torch.arange(block, device=units.device)
        units = (corner[:, None, None] + side[:, None] * shape[1] + side).view(-1).sort().values
    return units.to(position_dtype(shape.numel()))


def _as_units(indices: Tensor, shape: torch.Size, block: int) -> Tensor:
    indices = indices.long()
    if block == 1:
        return indices
    return (indices // shape[1] // block * (shape[1] // block) + indices % shape[1] // block).unique()


def position_dtype(entries: int) -> torch.dtype:
    """What flat positions among so many entries are kept in."""
    return torch.int32 if entries < 2**31 else torch.int64


def wide(tensor: Tensor) -> Tensor:
    """At least fp32: what scores are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rms(tensor: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float32 if tensor.itemsize < 4 else tensor.dtype))
    return norm / tensor.numel() ** 0.5 or 1.0


def _require_finite(tensor: Tensor, what: str = "matrix") -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"the {what} holds NaN or infinite entries")


def _named(m: Matrix, work: Callable[[Matrix], R]) -> R:
    try:
        return work(m)
    except ValueError as reason:
        raise ValueError(f"cannot choose entries of {m.name}: {reason}") from reason
