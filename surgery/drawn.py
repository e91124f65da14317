"""Vectors made from another: as large at every site, and otherwise random. They are what a vector is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.anatomy import Anatomy
from surgery.seeds import seed_from_words
from surgery.sites import Site
from surgery.weights import Delta, Origin, some_rows


class Alike(Delta):
    """A vector made from another at the same sites, a whole tensor at a time."""

    def __init__(self, delta: Delta):
        self._delta = delta

    @property
    def anatomy(self) -> Anatomy | None:
        return self._delta.anatomy

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._delta.shapes()

    def origins(self) -> frozenset[Origin]:
        return self._delta.origins()


class _Drawn(Alike):
    def __init__(self, delta: Delta, seed: int = 0):
        super().__init__(delta)
        self._seed = seed

    def by_rows(self, site: Site) -> bool:
        return False

    def _generator(self, site: Site) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from_words(self._seed, site))


class Noise(_Drawn):
    """Gaussian noise with the Frobenius norm that the vector has at each site. The draw depends on (seed, site) alone."""

    def _read(self, site: Site, rows: slice) -> Tensor:
        norm = torch.linalg.vector_norm(self._delta[site], dtype=torch.float64)
        noise = torch.randn(self.shapes()[site], generator=self._generator(site))
        return some_rows(noise * float(norm / torch.linalg.vector_norm(noise, dtype=torch.float64)), rows)


class Permuted(_Drawn):
    """The same entries at each site, in a random order. The order depends on (seed, site) alone."""

    def _read(self, site: Site, rows: slice) -> Tensor:
        value = self._delta[site]
        order = torch.randperm(value.numel(), generator=self._generator(site))
        return some_rows(value.reshape(-1)[order.to(value.device)].view(value.shape), rows)
