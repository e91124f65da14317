"""SafeLoRA and SafeMERGE restated literally and densely, for tests: every C is formed, every product too.

For a module with ``dW = s B A`` (B ``[m, r]``, A ``[r, n]``, s the adapter's scaling):

    (1)  V = W_aligned - W_base                                     [m, n]
    (2)  C = V Vᵀ / |V|_F                                           [m, m]
    (3)  rho = <C B A, B A> / (|C B A| |B A|)
    (4)  B <- C B   where rho <= tau                                SafeLoRA
    (5)  dW <- a dW + (1 - a) dW_safe   where rho < tau             SafeMERGE
    (6)  A' = Σ √(w_i s_i) A_i,  B' = Σ √(w_i s_i) B_i              SafeMERGE as released, by PEFT's linear combination
    (7)  P = V (Vᵀ V)⁺ Vᵀ                                           the orthogonal projector for which C stands in
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def alignment_map(V: Tensor) -> Tensor:
    """(2): C, in float64."""
    V = V.double()
    return V @ V.T / V.norm()


def rho(V: Tensor, dW: Tensor) -> float:
    """(3), in float64, of the dense product."""
    dW = dW.double()
    moved = alignment_map(V) @ dW
    return float((moved * dW).sum() / (moved.norm() * dW.norm()))


def projector(V: Tensor) -> Tensor:
    """(7), in float64."""
    V = V.double()
    return V @ torch.linalg.pinv(V.T @ V) @ V.T


def added_factors(pairs: Sequence[tuple[float, float, Tensor, Tensor]]) -> Tensor:
    """(6) as the dense product B' A' of (weight, scaling, B, A)."""
    B = sum((w * s) ** 0.5 * B for w, s, B, _ in pairs)
    A = sum((w * s) ** 0.5 * A for w, s, _, A in pairs)
    return B @ A


def by_enumeration(
    base: Mapping[str, Tensor],
    aligned: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    targets: Sequence[str],
    *,
    tau: float | None = None,
    count: int | None = None,
) -> dict[str, Tensor]:
    """The adapter after SafeLoRA, its modules and the model's matrices paired by the order in which they are enumerated.

    base, aligned: a model's parameters by name, in order. adapter: ``...lora_A.weight`` and ``...lora_B.weight`` by name, in order.
    targets: substrings of the names of the tuned matrices. tau or count: which modules are projected.
    """
    projections = [
        alignment_map(aligned[n] - base[n]) for n in base if any(t in n for t in targets) and base[n].ndim == 2
    ]
    downs = [name for name in adapter if "lora_A" in name]
    ups = [name for name in adapter if "lora_B" in name]
    moved = [P @ adapter[up].double() for P, up in zip(projections, ups, strict=True)]
    cosines = []
    for CB, down, up in zip(moved, downs, ups, strict=True):
        one, other = CB @ adapter[down].double(), adapter[up].double() @ adapter[down].double()
        cosines.append(float((one * other).sum() / (one.norm() * other.norm())))
    if count is not None:
        tau = sorted(cosines)[count - 1]
    assert tau is not None
    after = dict(adapter)
    for cosine, CB, up in zip(cosines, moved, ups, strict=True):
        if cosine <= tau:
            after[up] = CB.to(adapter[up].dtype)  # (4)
    return after
