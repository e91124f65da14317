"""Edits: frozen, callable, pure. ``(site, W) -> W``, with `W` ``[out, in]`` in fp32, or a head's rows or columns of it.

``apply(RemoveDirection(u), weights, at="*.attn.o")`` costs nothing until it is written or installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.linalg import project_out
from surgery.sites import Site


@dataclass(frozen=True)
class Scale:
    """Multiply by a factor; 0 silences a site."""

    factor: float

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        return W * self.factor


@dataclass(frozen=True, eq=False)
class RemoveDirection:
    """Stop a matrix from writing a direction of the residual stream: ``W <- (I - strength u uᵀ) W``.

    direction: any non-zero vector of length `out`; it is normalised.
    strength:  1 removes the component, 2 reflects it, 0 does nothing.
    """

    direction: Float[Tensor, " out"]
    strength: float = 1.0

    def __post_init__(self) -> None:
        norm = float(torch.linalg.vector_norm(self.direction.float()))
        if self.direction.ndim != 1 or not 0 < norm < float("inf"):
            raise ValueError(
                f"A direction is one finite, non-zero vector; this has shape {tuple(self.direction.shape)} and norm {norm}."
            )

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        if W.ndim != 2 or W.shape[0] != len(self.direction):
            raise ValueError(
                f"{site} is {tuple(W.shape)} and cannot write a direction of length {len(self.direction)}."
            )
        return project_out(W, self.direction.to(W), self.strength)
