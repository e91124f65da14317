"""LIFT restated literally and densely, for tests. Slow, memory-hungry, and close to the page.

Paper: arXiv 2506.00772, Algorithm 1. Every tensor here has the full shape of its matrix.
"""

import torch
from torch import Tensor


def truncated(W: Tensor, rank: int) -> Tensor:
    """W' = sum over i <= r of sigma_i u_i v_i^T: the rank reduction, by a full SVD in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in range(min(rank, len(S)))), torch.zeros_like(W.double()))


def mask(W: Tensor, rank: int, count: int) -> Tensor:
    """M: the `count` entries with the largest |W'|, ties to the lowest positions (a stable sort)."""
    order = truncated(W, rank).abs().flatten().argsort(descending=True, stable=True)
    return _as_mask(order[:count], W)


def released_mask(W: Tensor, rank: int, count: int) -> Tensor:
    """M as the released code's configurations choose it.

    The code takes the top k with largest = ("largest" in the mask's name), and the name they give is "lift_sparse".
    """
    largest = "largest" in "lift_sparse"
    chosen = torch.topk(truncated(W, rank).abs().flatten(), count, largest=largest).indices
    return _as_mask(chosen, W)


def _as_mask(positions: Tensor, W: Tensor) -> Tensor:
    M = torch.zeros(W.numel(), dtype=torch.bool)
    M[positions] = True
    return M.view(W.shape)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the dtype; of two equally near bfloat16 ones, the one that is farther from zero."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    inner = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)  # the next one toward zero
    outer = (inner.view(torch.int32) + 0x10000).view(torch.float32)
    nearer = (values.double() - inner.double()).abs() < (outer.double() - values.double()).abs()
    return torch.where(nearer, inner, outer).to(dtype)


class DenseLIFT:
    """Adam on M with refreshes: dense moments, dense ages, a dense float32 master.

    In float32, with the order of operations of AdamW: mu, nu (the moments' updates), the two bias corrections by each
    entry's own age, W[M] -= lr * mu_hat / (sqrt(nu_hat) + eps). At a refresh, moments and ages are multiplied by the
    overlap of the old and the new mask.
    """

    def __init__(
        self, W: Tensor, rank: int, count: int, lr: float, betas=(0.9, 0.999), eps=1e-8, decay=0.0, refresh=None
    ):
        self.W, self.rank, self.count, self.lr, self.betas, self.eps = W.clone(), rank, count, lr, betas, eps
        self.decay, self.refresh, self.t = decay, refresh, 0
        self.master = W.float().clone()
        self.mu, self.nu = torch.zeros(W.shape), torch.zeros(W.shape)
        self.age = torch.zeros(W.shape, dtype=torch.int64)
        self.M = mask(W, rank, count)

    def step(self, grad: Tensor) -> None:
        b1, b2 = self.betas
        M, self.t = self.M, self.t + 1
        g = torch.where(M, grad.float(), 0.0)
        self.age += M
        self.mu = torch.where(M, self.mu.lerp(g, 1 - b1), 0.0)
        self.nu = torch.where(M, (self.nu * b2).addcmul(g, g, value=1 - b2), 0.0)
        decayed = self.master * (1 - self.lr * self.decay)
        for t in self.age[M].unique().tolist():
            here = M & (self.age == t)
            denominator = self.nu.sqrt() / (1 - b2**t) ** 0.5 + self.eps
            moved = decayed.addcdiv(self.mu, denominator, value=-(self.lr / (1 - b1**t)))
            self.master = torch.where(here, moved, self.master)
        self.W = torch.where(M, nearest(self.master, self.W.dtype), self.W)
        if self.refresh and self.t % self.refresh == 0:
            new = mask(self.W, self.rank, self.count)
            self.mu, self.nu, self.age = (torch.where(M & new, x, 0) for x in (self.mu, self.nu, self.age))
            self.master = torch.where(M & new, self.master, self.W.float())
            self.M = new


def from_triplets(W: Tensor, kept: list[int]) -> Tensor:
    """sum over the kept i of sigma_i u_i v_i^T (section 6: the strategies of rank reduction)."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in kept), torch.zeros_like(W.double()))


def top(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` largest of all scores together, ties to the first matrix and the lowest positions."""
    joint = torch.cat([score.flatten() for score in scores])
    chosen = torch.zeros(len(joint), dtype=torch.bool)
    chosen[joint.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def pooled(entries: Tensor, side: int) -> Tensor:
    """The sum over every side x side square."""
    sums = torch.zeros(entries.shape[0] // side, entries.shape[1] // side, dtype=entries.dtype)
    for i in range(entries.shape[0]):
        for j in range(entries.shape[1]):
            sums[i // side, j // side] += entries[i, j]
    return sums


def in_blocks(blocks: Tensor, side: int) -> Tensor:
    """A mask of blocks as a mask of entries."""
    return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
