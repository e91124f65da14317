"""Edits: frozen, callable, pure.

Most take one tensor to one tensor, ``(site, W) -> W``, with `W` ``[out, in]`` in fp32, or a head's rows or columns of it:
``apply(RemoveDirection(u), weights, at="*.attn.o")``. `SwapLayers` and `ReplaceLayers` take a point to a point and need no pattern:
``apply(SwapLayers(3, 4), weights)``. Either way nothing happens until the result is written or installed.

Every edit has a strength: at 0 it changes no bit, at 1 it is whole. Any finite number will do; another raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.linalg import low_rank, project_out
from surgery.numbers import require_number, require_whole
from surgery.sites import Site
from surgery.weights import Edit, Weights, require_summable


@dataclass(frozen=True)
class Scale:
    """Multiply by a factor; 0 silences a site. At a strength in between, by ``1 - strength + strength * factor``.

    Of a norm whose file holds its gain less one (Gemma), `apply` has the gain multiplied, not the number in the file.
    """

    factor: float
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_number("factor", self.factor)
        require_number("strength", self.strength)

    def bound(self, weights: Weights, sites: Iterable[Site]) -> Edit:
        """The same edit of what the model multiplies by: what `apply` asks for."""
        if not any(map(weights.anatomy.offset, sites)):
            return self

        def scaled(site: Site, W: Tensor) -> Tensor:
            offset = weights.anatomy.offset(site)
            return self(site, W) if self.strength == 0 or not offset else self(site, W) + offset * (self._factor - 1)

        return scaled

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        return W if self.strength == 0 else W * self._factor

    @property
    def _factor(self) -> float:
        return 1 - self.strength + self.strength * self.factor


@dataclass(frozen=True, eq=False)
class RemoveDirection:
    """Stop a matrix, or a bias, from writing a direction: ``W <- (I - strength u uᵀ) W``.

    direction: any non-zero vector of length `out`, of what the matrix itself writes; it is normalised. Or directions of the residual
               stream, by layer or activation site (a `Direction`): the matrix of a layer takes the vector of its layer. `apply` then
               sees to a norm that stands between matrix and stream (Gemma, OLMo 2): the stream receives ``g * W z / rms``, whose
               component along u is that of ``W z`` along ``g * u``, so this is what is removed, and the stream receives no more u.
    strength:  1 removes the component, 2 reflects it, 0 does nothing.
    Raises ValueError where the directions have no vector, or several, for the layer of a site.

    Source: ThinkEdit, arXiv 2503.22048. Differs: the published code knows no norm after the matrix.
    """

    direction: Float[Tensor, " out"] | Mapping[Any, Tensor]
    strength: float = 1.0

    def __post_init__(self) -> None:
        vectors = self.direction.values() if isinstance(self.direction, Mapping) else [self.direction]
        if not vectors:
            raise ValueError("There is no direction to remove: the mapping is empty.")
        for vector in vectors:
            _require_direction(vector)
        require_number("strength", self.strength)

    def vector(self, site: Site) -> Float[Tensor, " out"]:
        """The vector for a site: the only one, the one at the site itself, or the one of its layer."""
        if not isinstance(self.direction, Mapping):
            return self.direction
        if site.whole in self.direction:
            return self.direction[site.whole]
        found = [key for key in self.direction if (key.layer if isinstance(key, Site) else key) == site.layer]
        if len(found) == 1:
            return self.direction[found[0]]
        there = ", ".join(map(str, self.direction))
        raise ValueError(
            f"{site} needs the direction of its layer, and there {'is none' if not found else 'are ' + str(len(found))}: these are at {there}."
        )

    def bound(self, weights: Weights, sites: Iterable[Site]) -> RemoveDirection:
        """The same edit with a vector for each site, as the matrix there writes it: for directions of the stream, what `apply` asks for."""
        if not isinstance(self.direction, Mapping):
            return self
        written: dict[Site, Tensor] = {}
        for site in sites:
            vector, factor = self.vector(site), gain_after(weights, site)
            _require_writes(site, weights.shape(site), vector)
            written[site.whole] = vector if factor is None else factor.to(vector.device) * vector.float()
        return replace(self, direction=written)

    def check(self, site: Site, shape: torch.Size) -> None:
        """Raise ValueError where the tensor at the site does not write vectors of the direction's length."""
        _require_writes(site, shape, self.vector(site))

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        self.check(site, W.shape)
        if self.strength == 0:
            return W
        return project_out(W.reshape(len(W), -1), self.vector(site).to(W), self.strength).view(W.shape)


@dataclass(frozen=True, eq=False)
class AddDirection:
    """Make a site write a direction: ``b + strength u`` at a bias, the rank-one ``W + strength u vᵀ`` at a matrix.

    direction: u, of length `out`, taken as it is: its length says how much is written.
    reads:     v, of length `in`: a matrix then writes `strength` u for each unit of its input along v. By default what the matrix
               already reads in order to write u, ``v = Wᵀ u / |u|²``: strength 1 doubles the component along u, whatever u's length.
    Raises ValueError at a site that writes vectors of another length; a bias reads nothing and takes no `reads`.
    """

    direction: Float[Tensor, " out"]
    strength: float = 1.0
    reads: Float[Tensor, " in"] | None = None

    def __post_init__(self) -> None:
        _require_direction(self.direction)
        if self.reads is not None:
            _require_direction(self.reads)
        require_number("strength", self.strength)

    def check(self, site: Site, shape: torch.Size) -> None:
        """Raise ValueError where the vectors do not fit the tensor at the site."""
        _require_writes(site, shape, self.direction)
        if self.reads is not None and len(shape) == 1:
            raise ValueError(f"{site} is a bias and reads nothing: leave out what it should read.")
        if self.reads is not None and shape[1] != len(self.reads):
            raise ValueError(f"{site} is {tuple(shape)} and cannot read a direction of length {len(self.reads)}.")

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        self.check(site, W.shape)
        if self.strength == 0:
            return W
        u = self.direction.to(W)
        if W.ndim == 1:
            return W + self.strength * u
        v = (u @ W) / (u @ u) if self.reads is None else self.reads.to(W)
        return W + self.strength * torch.outer(u, v)


@dataclass(frozen=True)
class TruncateRank:
    """Replace a matrix by its best approximation of a rank; at a strength in between, go that share of the way.

    rank: 1 or more; from the short side on, nothing is lost. For a head it is the rank of the head's own rows or columns. A vector (a
          norm's gain that ``*.mlp.*`` matches too) is of rank one and stays as it is.
    Source: Eckart and Young 1936.
    """

    rank: int
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_number("strength", self.strength)
        require_whole("rank", self.rank)
        if self.rank < 1:
            raise ValueError(f"A rank is 1 or more; this is {self.rank}. To silence a site, use Scale(0).")

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        if self.strength == 0 or W.ndim < 2:
            return W
        low = low_rank(W, self.rank).to(W)
        return low if self.strength == 1 else torch.lerp(W, low, self.strength)


def gain(weights: Weights, norm: Site) -> Float[Tensor, " d"]:
    """What a norm multiplies by, fp32, the 1 included that Gemma's files leave out."""
    return weights[norm].float() + weights.anatomy.offset(norm)


def gain_after(weights: Weights, site: Site) -> Float[Tensor, " d"] | None:
    """The gain of the norm that what a matrix (or its bias) writes passes on its way to the stream; None where there is no norm."""
    norm = weights.anatomy.norm_after(site)
    return None if norm is None else gain(weights, norm)


# --- whole blocks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ReplaceLayers:
    """Take whole blocks, norms and biases included, from another point.

    donor:    the point they are taken from.
    layers:   which: ``[3, 4]`` takes the donor's layers 3 and 4 to the same places, ``{3: 7}`` its layer 7 to the place of layer 3.
    strength: 1 takes the donor's tensors bit for bit; in between, ``own + strength * (donor's - own)``.
    What the config says of a layer (its attention window) stays with the place. Raises ValueError where a layer does not exist, or
    where two blocks do not have the same tensors, shapes and heads, or where codes of a quantised model would be mixed or rounded.
    """

    donor: Weights
    layers: Sequence[int] | Mapping[int, int]
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_number("strength", self.strength)
        if not isinstance(self.layers, Sequence | Mapping):
            raise ValueError(
                f"layers={self.layers!r}: name them in a list, as in [3, 4], or by their places, as in {{3: 7}}."
            )
        for layer in (*self.layers, *(self.layers.values() if isinstance(self.layers, Mapping) else ())):
            require_whole("layer", layer)

    def __call__(self, weights: Weights) -> Weights:
        layers = self.layers if isinstance(self.layers, Mapping) else {layer: layer for layer in self.layers}
        return _transplanted(weights, self.donor, layers, self.strength)


@dataclass(frozen=True)
class SwapLayers:
    """Exchange two whole blocks of a model; twice is not at all, to the bit.

    strength: 1 exchanges them; in between each goes that share of the way to the other, so that at 0.5 both are their mean.
    What the config says of a layer stays with the place. Raises ValueError as `ReplaceLayers` does.
    """

    first: int
    second: int
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_number("strength", self.strength)
        for layer in (self.first, self.second):
            require_whole("layer", layer)
        if self.first == self.second:
            raise ValueError(f"Layer {self.first} swapped with itself changes nothing: name two layers.")

    def __call__(self, weights: Weights) -> Weights:
        return _transplanted(weights, weights, {self.first: self.second, self.second: self.first}, self.strength)


class Transplanted(Weights):
    """A point some of whose tensors are another point's, or a mixture of both. sources: site -> the donor's site."""

    def __init__(self, start: Weights, donor: Weights, sources: Mapping[Site, Site], strength: float = 1.0):
        self._start, self._donor, self._sources, self._strength = start, donor, sources, strength
        self.anatomy, self.layout = start.anatomy, start.layout

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._start.shapes()

    def dtype(self, site: Site | str) -> torch.dtype:
        return self._start.dtype(site)

    def _read(self, site: Site, rows: slice) -> Tensor:
        if site not in self._sources:
            return self._start.rows(site, rows)
        taken = self._donor.rows(self._sources[site], rows)
        if self._strength == 1:
            return taken
        own = self._start.rows(site, rows).float()
        return torch.lerp(own, taken.to(own), self._strength)

    def by_rows(self, site: Site) -> bool:
        donor = site not in self._sources or self._donor.by_rows(self._sources[site])
        return donor and self._start.by_rows(site)

    def changed_from(self, layout: Weights) -> set[Site]:
        return set() if self is layout else set(self._sources) | self._start.changed_from(layout)


def _transplanted(weights: Weights, donor: Weights, layers: Mapping[int, int], strength: float) -> Weights:
    if not layers:
        raise ValueError("No layer is named, so nothing would change.")
    theirs, ours = donor.anatomy, weights.anatomy
    heads = [(a.n_heads, a.n_kv_heads, a.head_dim) for a in (theirs, ours)]
    if heads[0] != heads[1]:
        raise ValueError(
            "The donor's blocks do not fit: it has {} heads ({} kv) of {}, here are {} ({} kv) of {}.".format(
                *heads[0], *heads[1]
            )
        )
    sources: dict[Site, Site] = {}
    for place, taken in layers.items():
        here, there = _block(weights, place), _block(donor, taken)
        shapes = [{key: w.shape(site) for key, site in block.items()} for w, block in ((weights, here), (donor, there))]
        unlike = sorted(k for k in here.keys() | there.keys() if shapes[0].get(k) != shapes[1].get(k))
        if unlike:
            said = [str(tuple(s[unlike[0]])) if unlike[0] in s else "absent" for s in shapes]
            raise ValueError(
                f"Layer {taken} does not fit in the place of layer {place}: {len(unlike)} tensors differ, first {unlike[0]}: "
                f"{said[0]} here, {said[1]} there. Blocks are exchanged between layers of one architecture."
            )
        sources |= {here[k]: there[k] for k in here if donor is not weights or here[k] != there[k]}
    for own, taken in sources.items():
        if strength not in (0, 1) or weights.dtype(own) != donor.dtype(taken):
            require_summable(weights, own)
            require_summable(donor, taken)
    return Transplanted(weights, donor, sources, strength) if strength and sources else weights


def _block(weights: Weights, layer: int) -> dict[str, Site]:
    """Every tensor of a block, by part; those that the family's table does not name, by what follows the block's own name."""
    if not 0 <= layer < weights.anatomy.n_layers:
        raise ValueError(f"There is no layer {layer}: this model has layers 0 to {weights.anatomy.n_layers - 1}.")
    named = {site.part: site for site in weights if site.layer == layer}
    name = weights.anatomy.places[next(iter(named.values()))].name
    prefix = name[: name.index(f".{layer}.") + len(f".{layer}.")]
    unnamed = {str(site).removeprefix("file:"): site for site in weights if site.is_unnamed}
    return named | {f"file:{n[len(prefix) :]}": site for n, site in unnamed.items() if n.startswith(prefix)}


def _require_direction(vector: Tensor) -> None:
    """Raise ValueError where it is not one finite, non-zero vector."""
    if not isinstance(vector, Tensor):
        raise ValueError(f"A direction is one tensor, not a {type(vector).__name__}: {vector!r:.60}.")
    norm = float(torch.linalg.vector_norm(vector.float()))
    if vector.ndim != 1 or not 0 < norm < float("inf"):
        raise ValueError(
            f"A direction is one finite, non-zero vector; this has shape {tuple(vector.shape)} and norm {norm}."
        )


def _require_writes(site: Site, shape: torch.Size, direction: Tensor) -> None:
    writes = len(shape) == 2 or (len(shape) == 1 and site.part.endswith(".bias"))
    if not writes or shape[0] != len(direction):
        raise ValueError(f"{site} is {tuple(shape)} and cannot write a direction of length {len(direction)}.")
