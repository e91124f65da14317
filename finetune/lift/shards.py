"""Choosing entries of matrices of which every process has some rows, all or none (FSDP2), as if each were in one place.

No matrix, and no score of a whole one, is ever put together. What a filter needs of a matrix is the Gram matrix of its short side: the
processes' own Gram matrices add up to it (a wide matrix is first dealt out anew, by columns), and each process solves its share of the
eigenproblems. The threshold is found exactly, by counting how many scores there are with which leading bits.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from finetune.distributed import Shards
from finetune.lift.selection import OF_GRADIENTS, Choice, Matrix, Select, position_dtype, wide
from surgery.linalg import gram_matrix, leading_eigenvectors, work_precision

SHARDED: tuple[Select, ...] = ("largest", "smallest", "magnitude", "random", *OF_GRADIENTS)  # what can be chosen by
_FILTERED = ("largest", "smallest")  # of these, by what a filter leaves of the matrix
_DIGIT = 12  # bits of a score that are counted at once: tables of 4096 counts go between the processes


@torch.no_grad()
def choose_shards(
    matrices: Sequence[Matrix], at: Shards, select: Select, rank: int, *, together: bool = False
) -> list[Choice]:
    """What `choose` chooses of each whole matrix, as flat positions within the rows that this process holds.

    matrices: their `W` (and `gradient`) are the rows that this process has of each, in the order of the processes of `at`, with the `height`
    of the whole; `count` is of the whole too. select: one of `SHARDED`. rank, together: as in `choose`, which is followed to the entry:
    exact, ties to the first matrices and the lowest positions. All these processes must call this, with the same matrices in the same order. Raises ValueError in every process, naming the matrix,
    where one is not finite.
    """
    if not matrices:
        return []
    _require_finite("matrix", [m.W for m in matrices], matrices, at)
    gradients = _gradients(matrices, select) if select in OF_GRADIENTS else []
    if gradients:
        _require_finite("gradient", gradients, matrices, at)
    own = [i for i, m in enumerate(matrices) if m.own or not together]
    shared = [i for i in range(len(matrices)) if i not in set(own)]
    found: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    filtered = [i for i, m in enumerate(matrices) if _is_filtered(m, select, rank, i in set(shared))]
    bases: dict[int, Tensor] = {}
    for i, m in enumerate(matrices):
        if i in filtered and i not in bases:  # as many at once as there are processes to solve them
            bases = _bases(matrices, rank, [j for j in filtered if j >= i][: at.count], at)
        if m.count == m.shape.numel() and i not in shared:
            found[i] = torch.arange(m.W.numel(), device=m.W.device)
            continue
        gradient = gradients[i] if gradients else None
        score = _score(m, gradient, bases.pop(i, None), select, at)
        if i in shared:
            scores[i] = _comparable(score, m, select, at).double()
        else:
            (found[i],) = _largest([_ordered(score)], m.count, at)
    if shared:
        orders = [_ordered(scores[i]) for i in shared]
        found |= dict(zip(shared, _largest(orders, sum(matrices[i].count for i in shared), at), strict=True))
    return [Choice(found[i].to(position_dtype(m.shape.numel())), None, False) for i, m in enumerate(matrices)]


def _is_filtered(m: Matrix, select: Select, rank: int, shared: bool) -> bool:
    return select in _FILTERED and rank < min(m.shape) and (shared or m.count < m.shape.numel())


def _require_finite(what: str, parts: Sequence[Tensor], matrices: Sequence[Matrix], at: Shards) -> None:
    squares = at.total(torch.stack([part.double().square().sum() for part in parts]))
    for m, square in zip(matrices, squares.tolist(), strict=True):
        if not math.isfinite(square):
            raise ValueError(f"cannot choose entries of {m.name}: the {what} holds NaN or infinite entries")


def _gradients(matrices: Sequence[Matrix], select: Select) -> list[Tensor]:
    found = []
    for m in matrices:
        if m.gradient is None:
            raise ValueError(
                f'cannot choose entries of {m.name}: select="{select}" needs a gradient, and none has arrived'
            )
        found.append(m.gradient)
    return found


def _score(m: Matrix, gradient: Tensor | None, basis: Tensor | None, select: Select, at: Shards) -> Float[Tensor, " n"]:
    """What this process's entries are compared by."""
    mine = m.W
    if select == "random":
        first = at.before(len(mine), mine.device)
        drawn = torch.rand(tuple(m.shape), generator=torch.Generator().manual_seed(m.seed))
        return drawn[first : first + len(mine)].reshape(-1).to(mine.device)
    if gradient is not None:
        G = wide(gradient)
        return (G.abs() if select == "gradient" else -G * wide(mine)).reshape(-1)
    if basis is None:
        values = wide(mine)
    elif m.shape[1] <= m.shape[0]:
        values = mine.to(basis.dtype) @ basis @ basis.T
    else:
        first = at.before(len(mine), mine.device)
        own = basis[first : first + len(mine)]
        values = own @ at.total(own.T @ mine.to(basis.dtype))
    sign = -1 if select == "smallest" else 1
    return values.abs().mul_(sign).reshape(-1)


def _comparable(score: Tensor, m: Matrix, select: Select, at: Shards) -> Float[Tensor, " n"]:
    """Scores divided by the root mean square, over all processes, of what is compared: the weights, or else the scores themselves."""
    if select == "random":
        return score
    square = at.total((score if select in OF_GRADIENTS else m.W).double().square().sum()[None])
    return score / (float(square) / m.shape.numel()) ** 0.5 if square else score


def _bases(
    matrices: Sequence[Matrix], rank: int, members: Sequence[int], at: Shards
) -> dict[int, Float[Tensor, "short rank"]]:
    """The leading singular vectors of the short side of a few matrices, each of them solved by another process."""
    solved: Tensor | None = None
    for turn, i in enumerate(members):
        mine, shape = matrices[i].W, matrices[i].shape
        part = mine if shape[1] <= shape[0] else _columns(mine, shape, at).T
        dtype, side = work_precision(mine), part.shape[1]
        summed = gram_matrix(part, dtype) if len(part) else torch.zeros(side, side, dtype=dtype, device=part.device).T
        dist.reduce(summed if summed.is_contiguous() else summed.T, group=at.group, group_dst=turn)
        if at.rank == turn:
            solved = leading_eigenvectors(summed, rank).contiguous()
    bases = {}
    for turn, i in enumerate(members):
        mine, shape = matrices[i].W, (min(matrices[i].shape), rank)
        basis = solved if at.rank == turn else torch.empty(shape, dtype=work_precision(mine), device=mine.device)
        assert basis is not None
        dist.broadcast(basis, group=at.group, group_src=turn)
        bases[i] = basis
    return bases


def _columns(mine: Float[Tensor, "rows in"], shape: torch.Size, at: Shards) -> Float[Tensor, "out cols"]:
    """This process's share of the columns of a matrix of which every process has some rows: as much of it as it had before."""
    widths = [len(part) for part in torch.arange(shape[1]).tensor_split(at.count)]
    heights, width = at.each(len(mine), mine.device), widths[at.rank]
    sent = torch.cat([part.reshape(-1) for part in mine.split(widths, dim=1)])
    got = mine.new_empty(shape[0] * width)
    dist.all_to_all_single(got, sent, [h * width for h in heights], [len(mine) * w for w in widths], group=at.group)
    return got.view(shape[0], width)


def _largest(orders: Sequence[Int[Tensor, " n"]], count: int, at: Shards) -> list[Int[Tensor, " kept"]]:
    """This process's positions among the `count` largest of all; ties at the threshold to the first matrices and the lowest positions."""
    order = torch.cat(list(orders))
    bits = 8 * order.element_size()
    flipped = order ^ torch.iinfo(order.dtype).min  # bits that count up from the lowest number
    threshold, wanted, live = 0, count, flipped
    for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        digits = (live >> shift) & (2 ** min(_DIGIT, bits - shift) - 1)
        counts = torch.bincount(digits, minlength=2**_DIGIT)
        dist.all_reduce(counts, group=at.group)
        above = counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= wanted).nonzero()[-1])
        wanted -= int(above[digit] - counts[digit])
        threshold |= digit << shift
        live = live[digits == digit]
    threshold -= 2 ** (bits - 1)  # back to the numbers' own order
    found = []
    for part in orders:
        kept, tied = part > threshold, (part == threshold).nonzero().squeeze(1)
        everywhere = at.each(len(tied), part.device)
        room = max(0, min(len(tied), wanted - sum(everywhere[: at.rank])))
        kept[tied[:room]] = True
        wanted = max(0, wanted - sum(everywhere))
        found.append(kept.nonzero().squeeze(1))
    return found


def _ordered(score: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Integers in the order of the scores: a number's own bits, but for those below zero, whose bits count the other way."""
    kind = torch.int64 if score.element_size() == 8 else torch.int32
    bits = score.add(0.0).view(kind)  # there is one zero
    return bits ^ ((bits >> (8 * score.element_size() - 1)) & torch.iinfo(kind).max)
