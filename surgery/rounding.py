"""Storing fp32 numbers in fewer bits, without a bias.

Rounding to nearest swallows a change smaller than half a step of the stored dtype, always and everywhere. Stochastic rounding
keeps it on average: each number goes to one of its two neighbours, to the nearer one more often.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16}


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
