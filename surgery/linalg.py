"""Matrix facts that edits, spectra and LIFT share: subspaces, low-rank parts, singular values, angles.

Everything goes through the Gram matrix of a matrix's *short* side: for the top of a spectrum it gives the full SVD's
answer at a fraction of its cost, because the eigenproblem is as small as it can be and only the wanted vectors are
formed. Precision is chosen so that nothing is lost by it: float64 up to a short side of 1024, float32 above.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

Side = Literal["short", "in", "out"]

FLOAT64_UP_TO = 1024  # beyond this short side float64 costs more than the last digits are worth
STRIP = (
    1 << 16
)  # entries of a matrix on the CPU that are in work at once: they stay in the cache, and need no wide copy


def principal_subspace(W: Float[Tensor, "out in"], rank: int, side: Side = "short") -> Float[Tensor, "dim rank"]:
    """The leading `rank` singular vectors of one side of W, as orthonormal columns, largest singular value first.

    side: "in" gives right singular vectors `[in, rank]`, "out" left ones `[out, rank]`, "short" those of the shorter
        side (of `in` for a square matrix).
    rank: 1 up to the short side.
    Gives float64 up to a short side of 1024, else float32. Each column's largest entry is positive, so a sign is
    reproducible; where singular values coincide, the vectors between them are any basis of their span.
    Raises ValueError for a rank out of range, or where W is not a matrix or not finite.
    """
    if side != "short" and (side == "in") != (W.ndim == 2 and W.shape[1] <= W.shape[0]):
        long, basis = _factors(W, rank)
        basis = torch.linalg.qr(long).Q
    else:
        basis = _short_subspace(W, rank)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis)


def low_rank(W: Float[Tensor, "out in"], rank: int) -> Float[Tensor, "out in"]:
    """The best approximation of W by a matrix of rank at most `rank`, in the Frobenius and the spectral norm.

    rank: 1 or more; from the short side on, W itself comes back.
    Gives float64 up to a short side of 1024, else float32. Raises ValueError as `principal_subspace` does.
    Source: Eckart and Young 1936; `W V V^T` with V the leading right singular vectors is `U_r S_r V_r^T`.
    """
    if W.ndim == 2 and rank >= min(W.shape) > 0:
        if not torch.isfinite(W).all():
            raise ValueError(_NOT_FINITE)
        return W.detach().to(work_precision(W), copy=True)
    left, right = low_rank_factors(W, rank)
    return left @ right.T


def low_rank_factors(
    W: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "in rank"]]:
    """`low_rank(W, rank)` as a pair (left, right) with `left @ right.T` equal to it, never formed.

    The factor on W's shorter side is orthonormal. rank: 1 up to the short side. Precision and errors as `low_rank`.
    """
    long, short = _factors(W, rank)
    return (long, short) if W.shape[1] <= W.shape[0] else (short, long)


def singular_values(W: Float[Tensor, "out in"]) -> Float[Tensor, " short"]:
    """All singular values of W, largest first, float64.

    Accuracy: the Gram matrix squares the spectrum, so a value s is good to about `1e-16 * s_1**2 / s`: twelve digits
    at s_1/100, and below `1e-8 * s_1` only "zero" is known. Raises ValueError where W is not a finite matrix.
    """
    gram = gram_matrix(_tall(W), torch.float64)
    return torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp_min(0).sqrt()


def singular_system(
    W: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, " short"], Float[Tensor, "out rank"], Float[Tensor, "in rank"]]:
    """All singular values, largest first, and orthonormal bases of the leading `rank` left and right singular subspaces.

    From one decomposition, in float64 whatever the size; values as accurate as those of `singular_values`. rank: 1 up to the short side.
    Raises ValueError as `principal_subspace` does.
    """
    X = _tall(W)
    _check_rank(W, rank)
    gram = gram_matrix(X, torch.float64)
    if gram.device.type == "cpu":
        from surgery._blas import eigensystem

        squares, vectors = map(torch.from_numpy, eigensystem(gram.numpy(), rank))
    else:
        squares, vectors = torch.linalg.eigh(gram, UPLO="L")
    short = vectors[:, vectors.shape[1] - rank :].flip(1)
    long = torch.linalg.qr(torch.cat([strip @ short for strip in _strips(X, torch.float64)])).Q
    values = squares.flip(0).clamp_min(0).sqrt()
    return (values, long, short) if W.shape[1] <= W.shape[0] else (values, short, long)


def project_out(
    W: Float[Tensor, "out in"],
    u: Float[Tensor, " dim"],
    strength: float = 1.0,
    side: Literal["out", "in"] = "out",
) -> Float[Tensor, "out in"]:
    """W with a direction taken out of what it writes (side "out") or of what it reads (side "in"), in float32.

    `(I - strength u u^T) W` or `W (I - strength u u^T)` with u scaled to length 1. strength: 1 removes the direction,
    0 changes nothing, 2 reflects it. Raises ValueError where u is zero, not finite, or of another length than the side.
    Source: ThinkEdit, arXiv 2503.22048, whose `A (I - w u u^T)` has rows where ours has columns.
    """
    axis = 0 if side == "out" else 1
    if u.ndim != 1 or u.shape[0] != W.shape[axis]:
        raise ValueError(f"direction of shape {_shape(u)} does not fit side {side!r} of a {_shape(W)} matrix")
    u = u.to(W.device, torch.float32)
    length = u.norm()
    if not torch.isfinite(length) or length == 0:
        raise ValueError("the direction to project out is zero or not finite")
    u, W = u / length, W.to(torch.float32)
    if side == "out":
        return W - strength * torch.outer(u, u @ W)
    return W - strength * torch.outer(W @ u, u)


def principal_angles(U: Float[Tensor, "dim r"], V: Float[Tensor, "dim s"]) -> Float[Tensor, " angles"]:
    """The principal angles between the column spans of U and V: min(r, s) of them, in radians, ascending, float64.

    The columns need not be orthonormal, but must be independent. Angles below 45 degrees are read off their sine and
    the others off their cosine, so small angles are as accurate as large ones (about 1e-15).
    Raises ValueError where the two do not live in the same space or a side has dependent columns.
    Source: Björck and Golub 1973; Knyazev and Argentati 2002, Algorithm 3.1.
    """
    if U.ndim != 2 or V.ndim != 2 or U.shape[0] != V.shape[0]:
        raise ValueError(f"subspaces of one space expected, as columns: got {_shape(U)} and {_shape(V)}")
    P, Q = (_orthonormal(basis) for basis in (U, V))
    if P.shape[1] < Q.shape[1]:
        P, Q = Q, P
    inner = P.T @ Q
    cosine = torch.linalg.svdvals(inner).clamp(0, 1)
    sine = torch.linalg.svdvals(Q - P @ inner).flip(0).clamp(0, 1)
    return torch.where(cosine**2 > 0.5, sine.asin(), cosine.acos())


def each_matrix(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`[function(item) for item in items]`, with as many items at once as torch has threads, and one thread for each.

    Eigensolvers scale badly with threads; a model's many matrices scale perfectly. The results do not depend on the
    number of threads. Thread counts of torch and BLAS are given back. Meant for matrices on the CPU.
    """
    from threadpoolctl import threadpool_limits

    items, threads = list(items), torch.get_num_threads()  # before the limit, which changes it
    if len(items) < 2:  # one alone may use all
        return [function(item) for item in items]
    with threadpool_limits(1):
        return _at_once(function, items, threads)


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`[function(item) for item in items]`, with as many items at once as torch has threads, and one of torch's threads for each.

    For work on the CPU that torch itself would do on one thread. Gradients are recorded where they are recorded for the caller.
    """
    return _at_once(function, list(items), torch.get_num_threads())


def _at_once(function: Callable[[T], R], items: list[T], threads: int) -> list[R]:
    recorded = torch.is_grad_enabled()
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]

    def one(item: T) -> R:
        with torch.set_grad_enabled(recorded):
            return function(item)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(one, items))
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also the default of threads that are yet to start


_NOT_FINITE = "the matrix holds NaN or infinite entries (or entries whose squares overflow)"


def _factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The low-rank part of the tall W as (long, short) factors, short orthonormal."""
    short = _short_subspace(W, rank)
    return torch.cat([strip @ short for strip in _strips(_tall(W), short.dtype)]), short


def _short_subspace(W: Tensor, rank: int) -> Tensor:
    X = _tall(W)
    _check_rank(W, rank)
    return leading_eigenvectors(gram_matrix(X, work_precision(W)), rank)


def _check_rank(W: Tensor, rank: int) -> None:
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} asked of a {_shape(W)} matrix: it has ranks 1 to {min(W.shape)}")


def _tall(W: Tensor) -> Tensor:
    """W, or its transpose where it is wider than tall."""
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(f"a matrix with at least one entry is needed, got shape {_shape(W)}")
    return W.detach() if W.shape[1] <= W.shape[0] else W.detach().T


def work_precision(W: Float[Tensor, "out in"]) -> torch.dtype:
    """float64 up to a short side of 1024, else float32."""
    return torch.float64 if min(W.shape) <= FLOAT64_UP_TO and W.device.type != "mps" else torch.float32


def _strips(X: Tensor, dtype: torch.dtype, entries: int = STRIP) -> Iterator[Tensor]:
    """X in the precision of the work, some rows at a time; at once where it is not on the CPU."""
    rows = max(1, entries // X.shape[1]) if X.device.type == "cpu" else len(X)
    for start in range(0, len(X), rows):
        yield X[start : start + rows].to(dtype, copy=True)  # a copy lies dense, in the order of its strides


def gram_matrix(X: Float[Tensor, "row n"], dtype: torch.dtype) -> Float[Tensor, "n n"]:
    """`X^T X` in that dtype; on the CPU only its lower triangle is filled. Raises ValueError where it is not finite."""
    if X.device.type != "cpu":
        (whole,) = _strips(X, dtype)
        gram = whole.T @ whole
    else:
        from surgery._blas import add_gram

        sums = np.zeros((X.shape[1], X.shape[1]), torch.empty(0, dtype=dtype).numpy().dtype, order="F")
        for strip in _strips(X, dtype, 8 * STRIP):  # few, as every strip goes through all the sums
            add_gram(strip.numpy(), sums)
        gram = torch.from_numpy(sums)
    if not torch.isfinite(gram.diagonal()).all():
        raise ValueError(_NOT_FINITE)
    return gram


def leading_eigenvectors(gram: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """Those of a `gram_matrix`, largest eigenvalue first; uses the matrix up."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram).eigenvectors[:, len(gram) - rank :].flip(1)
    from surgery._blas import top_eigenvectors  # torch's forms all of them

    return torch.from_numpy(top_eigenvectors(gram.numpy(), rank)).flip(1)


def _orthonormal(basis: Tensor) -> Tensor:
    basis = basis.detach().to(torch.float64)
    Q, upper = torch.linalg.qr(basis / basis.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny))
    if basis.shape[1] > basis.shape[0] or (upper.diagonal().abs() < 1e-12).any():
        raise ValueError(f"the {_shape(basis)} basis has dependent or zero columns: they span less than they count")
    return Q


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
