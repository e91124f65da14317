"""The dtypes that weights are stored in, what rounding to them leaves of a change, and rounding without a bias.

Rounding to nearest swallows a change smaller than half a step of the stored dtype, always and everywhere. Stochastic rounding
keeps it on average: each number goes to one of its two neighbours, to the nearer one more often.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"bfloat16"`` -> torch.bfloat16; None for ``auto`` and None. Raises ValueError listing the choices."""
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is not a dtype of weights. Choose float32, bfloat16, float16 or auto.")
    return found


@dataclass(frozen=True)
class Kept:
    """Asked and kept: a change, and what rounding to the stored dtype leaves of it.

    asked, kept: Frobenius norms before and after rounding. cosine: between the two; 1 is perfect, nan when either is zero.
    unmoved: fraction in [0, 1] of the entries asked to move that stayed where they were. entries: how many were asked to move.
    """

    asked: float
    kept: float
    cosine: float
    unmoved: float
    entries: int

    @classmethod
    def of(cls, asked: float, kept: float, inner: float, stuck: float, entries: int) -> Kept:
        """From sums over entries: the squares of both changes, their product, and counts of those that stayed and that were asked to move."""
        norms = (asked * kept) ** 0.5
        cosine = inner / norms if norms else float("nan")
        return cls(asked**0.5, kept**0.5, cosine, stuck / entries if entries else 0.0, entries)


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on a seed and a tensor's name alone: not on order, threads or pieces."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def stochastic(x: Float[Tensor, "*shape"], dtype: torch.dtype, draws: np.random.Generator) -> Float[Tensor, "*shape"]:
    """`x` in `dtype`, each number at one of its two neighbours there, with expectation `x`.

    What `dtype` holds exactly stays. A number beyond its largest value goes where rounding to nearest sends it. One uniform draw
    an entry is taken from `draws`, whatever the entries are, so pieces of a tensor one after another equal the whole. float32 and wider
    are stored as they are.

    Source: Gupta et al. 2015, Section 3.
    """
    x = x.detach()
    if dtype.itemsize > 2:
        return x.to(dtype)
    uniform = torch.from_numpy(draws.random(x.numel(), dtype=np.float32)).view(x.shape)
    x = x.to("cpu", torch.float32)
    near = x.to(dtype).contiguous()
    reached = near.float()
    # Floats of one sign are ordered as their bits are: one more is the neighbour away from zero, one less that toward it.
    step = torch.where(x.abs() > reached.abs(), 1, -1).to(_BITS[dtype.itemsize])
    other = (near.view(step.dtype) + step).view(dtype)
    share = (x - reached).abs() / (other.float() - reached).abs()
    return torch.where((uniform < share) & (x != reached), other, near)
