"""The leading singular subspace of a matrix that has changed a little, from the one it had before."""

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST = 3  # steps: the first ones clear what settles fast, and their changes say little of what does not
_MOST = 12  # from there on the exact way is no dearer
GUARDS = 8  # vectors beyond those wanted, which settle as fast as their distance to what lies beyond the guards allows


def warm_subspace(
    W: Float[Tensor, "out in"], start: Float[Tensor, "short more"], rank: int, tolerance: float
) -> Float[Tensor, "short more"] | None:
    """Orthonormal vectors, the first `rank` of them a basis of W's leading singular subspace on its short side, or None.

    start: vectors to begin from, `rank` or (better) some more, largest singular value first.
    tolerance: relative error, in (0, 1), that the part of W in that subspace may have in the Frobenius norm. The share of the largest
        entries that are others than the exact part's is then about as large, less where few entries lie near the threshold. It is
        estimated, from the third step on: the last step's change, times what all further steps together would add if they went on shrinking
        as the last did.
    float32. None where that is not reached in 12 steps. Raises ValueError for a W that is not finite.
    Source: Knyazev 2001, LOBPCG without a preconditioner, on the Gram matrix, which is never formed: a step costs two thin products with W.
    """
    X = W.detach().to(torch.float32)
    X = X if X.shape[1] <= X.shape[0] else X.T
    V = torch.linalg.qr(start.to(X)).Q
    XV = X @ V
    if not torch.isfinite(XV).all():
        raise ValueError("the matrix holds NaN or infinite entries")
    held, moved, last = V.shape[1], V[:, :0], 0.0
    for step in range(1, _MOST + 1):
        residual = X.T @ XV[:, :rank]
        residual -= V @ (V.T @ residual)
        more = torch.cat([V, residual / residual.norm().clamp_min(1e-30), moved], 1)
        D = torch.linalg.qr(more).Q[:, held:]
        both, images = torch.cat([V, D], 1), torch.cat([XV, X @ D], 1)
        leading = torch.linalg.eigh(images.T @ images).eigenvectors[:, -held:].flip(1)
        new, image = both @ leading, images @ leading
        change = _change(V[:, :rank], XV[:, :rank], new[:, :rank], image[:, :rank])
        V, XV, moved = new, image, D @ leading[held:, :rank]
        shrinks = change / last if last else 1.0  # one that grows is never enough
        if step >= _LEAST and change * shrinks <= tolerance * (1 - shrinks):
            return V
        last = change
    return None


def _change(V: Tensor, XV: Tensor, new: Tensor, image: Tensor) -> float:
    """‖X V V^T − X V' V'^T‖ / ‖X V'‖ for two near subspaces, to first order, without a difference of large numbers."""
    inner = new.T @ V
    off, image_off = V - new @ inner, XV - image @ inner
    square = image_off.square().sum() + ((off.T @ off) * (image.T @ image)).sum()
    return float(square.sqrt() / image.norm())
