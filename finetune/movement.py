"""Monitors of what training does to the weights: how far they moved, in what shape, what of it bf16 would keep, and which way gradients point.

All of them compare with a `Start`: matrices as they were before training. Weights are read as the forward pass uses them, with what an
adapter makes of them where one is being trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from finetune.lift import budget, lift_of, principal_indices
from surgery.adapter_names import ADDING
from surgery.borrowing import evaluating
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import linear_sites

STORED = torch.bfloat16
_SKETCH, _ROUNDS = 4, 4  # columns and rounds of the search for the largest singular value
_UNITS = 1024  # unit vectors that go through a layer at once


class Start:
    """Matrices as they were when this was made: what monitors compare with.

    Make it before training begins; a resumed run then compares with the same. It holds a copy of each matrix, in 16 bits where these say
    all (as of a bf16 model that is loaded in float32 to be trained).

    sites: by default every attention and MLP matrix.
    """

    def __init__(self, model: Model, sites: Sequence[Site] | None = None):
        weights = model.weights
        self._held = {s: _copy(weights[s]) for s in (linear_sites(weights) if sites is None else sites)}
        self._norms: dict[Site, float] = {}
        self._principal: dict[tuple[Site, float, int], Tensor] = {}

    @property
    def sites(self) -> list[Site]:
        return list(self._held)

    def __getitem__(self, site: Site) -> Float[Tensor, "out in"]:
        """The matrix at the start, fp32."""
        return self._held[site].float()

    def size(self, site: Site) -> int:
        """How many entries the matrix has."""
        return self._held[site].numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(W.nbytes for W in self._held.values())

    def norm(self, site: Site) -> float:
        if site not in self._norms:
            self._norms[site] = _norm(self[site])
        return self._norms[site]

    def principal(self, site: Site, density: float, filter_rank: int) -> Int[Tensor, " count"]:
        """Flat positions of the matrix's principal entries (`finetune.lift.principal_indices`), found when first asked for."""
        key = site, density, filter_rank
        if key not in self._principal:
            W = self._held[site]
            self._principal[key] = principal_indices(W, filter_rank, budget(W.shape, density)).long()
        return self._principal[key]


def _copy(W: Tensor) -> Tensor:
    """The same numbers, in bfloat16 or float16 where that is exact."""
    W = W.detach()
    for dtype in (torch.bfloat16, torch.float16):
        half = W.to(dtype)
        if W.dtype.itemsize > 2 and torch.equal(half.to(W.dtype), W):
            return half
    return W.clone()


def as_trained(model: Model, site: Site) -> Float[Tensor, "out in"]:
    """The matrix that the forward pass uses now, fp32: the module's own, and what an unmerged adapter makes of it."""
    place, W = model.anatomy.places[site], model.weights[site].float()
    layer: Any = model.module.get_submodule(place.name.rpartition(".")[0])
    if not hasattr(layer, "active_adapters") or layer.merged or layer.disable_adapters:
        return W
    if not _adds(layer):
        whole = _matrix_of(layer, W.shape[1])
        return whole if place.rows is None else whole[place.rows]
    for adapter in layer.active_adapters:
        if not any(adapter in getattr(layer, held) for held in layer.adapter_layer_names):
            continue  # it is in other layers
        W = W + place.take(layer.get_delta_weight(adapter).detach()).float()
    return W


def _adds(layer: Any) -> bool:
    """Whether a layer's adapters are vectors that are added to its matrix, as LoRA's are, but not DoRA's, IA3's or OFT's."""
    names, variants = layer.adapter_layer_names, getattr(layer, "lora_variant", {})
    return all(name.startswith(ADDING) for name in names) and not any(a in variants for a in layer.active_adapters)


@torch.no_grad()
def _matrix_of(layer: nn.Module, width: int) -> Float[Tensor, "out in"]:
    """What a linear layer multiplies by, fp32: what it makes of the unit vectors, a strip of them at a time."""
    like = next(p for p in layer.parameters() if p.is_floating_point())
    with evaluating(layer):
        bias = layer(like.new_zeros(1, width)).float()
        strips = torch.arange(width, device=like.device).split(_UNITS)
        units = (like.new_zeros(len(at), width).scatter_(1, at[:, None], 1) for at in strips)
        return torch.cat([layer(rows).float() - bias for rows in units]).T


def spread_layers(depth: int, count: int) -> list[int]:
    """`count` layers, evenly over the depth, the first and the last among them: all where there are no more."""
    count = min(count, depth)
    return [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]


class ChangeNorm:
    """A monitor: how far each matrix has moved since training began.

    Gives ``‖W - W_0‖_F / ‖W_0‖_F`` at each site and over all of them (``all``).
    """

    __name__ = "change"

    def __init__(self, model: Model, sites: Sequence[Site] | None = None, start: Start | None = None):
        self._start = start or Start(model, sites)
        self._sites = self._start.sites if sites is None else list(sites)

    def trial(self, model: Model) -> float:
        """One matrix, see `finetune.monitors.Monitor`."""
        site, share = _largest(self._start, self._sites)
        self._start.norm(site)
        _norm(as_trained(model, site) - self._start[site])
        return share

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        moved = {s: _norm(as_trained(model, s) - self._start[s]) for s in self._sites}
        norms = {s: self._start.norm(s) for s in self._sites}
        total = math.hypot(*moved.values()) / math.hypot(*norms.values())
        return {"all": total, **{str(s): moved[s] / norms[s] for s in moved}}


@dataclass(frozen=True)
class Shape:
    """The shape of one matrix's change. NaN where nothing moved.

    relative:    ``‖dW‖_F / ‖W_0‖_F``.
    stable_rank: ``‖dW‖_F² / ‖dW‖_2²``: 1 to the short side.
    principal:   share of ``‖dW‖_F²`` on the principal entries of W_0, in [0, 1]; chance is their share of all entries.
    absorbed:    of the entries that moved in fp32, the share that are the same numbers once both points are stored in bf16.
    lost:        ``‖dW - stored dW‖_F / ‖dW‖_F``: 0 where bf16 keeps the change as it is. It may exceed 1.

    Stored dW is between both points in bf16, as in `analyses.geometry`, whose words for the first, the third and the fourth are norm_ratio,
    energy_principal and 1 - changed_stored / changed. `Delta.survival` is another question: it rounds the end alone, not the base.
    """

    relative: float
    stable_rank: float
    principal: float
    absorbed: float
    lost: float


class UpdateShape:
    """A monitor: the shape of the change at some matrices, see `Shape`.

    Gives the mean over matrices of each number, ``chance`` for ``principal``, and each matrix's own as ``12.mlp.up.stable_rank``; of a
    matrix that has not moved only that ``relative`` is 0.

    layers:      whose matrices; by default four, spread over the depth: the cost is proportional to their number.
    density:     fraction of the entries that count as principal, in (0, 1]. filter_rank: see `finetune.lift.principal_indices`.
    Source: what of an update is left in bf16: Liu et al. (2025), arXiv 2511.08567; principal entries: arXiv 2506.00772.
    Differs: the largest singular value is found by four rounds of a block power iteration from a fixed start, below the truth by less than
        1 % in practice; `analyses.geometry` has it exactly.
    """

    __name__ = "geometry"

    def __init__(
        self,
        model: Model,
        layers: Iterable[int] | None = None,
        *,
        density: float = 0.05,
        filter_rank: int = 16,
        start: Start | None = None,
    ):
        wanted = set(spread_layers(model.anatomy.n_layers, 4) if layers is None else layers)
        self._sites = [s for s in linear_sites(model.weights) if s.layer in wanted]
        if not self._sites:
            raise ValueError(f"There is no matrix in layers {sorted(wanted)}: the model has {model.anatomy.n_layers}.")
        self._start = start or Start(model, self._sites)
        self._density, self._rank = density, filter_rank

    def trial(self, model: Model) -> float:
        """One matrix, see `finetune.monitors.Monitor`."""
        site, share = _largest(self._start, self._sites)
        self._shape(model, site)
        return share

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        found = {site: self._shape(model, site) for site in self._sites}
        means: dict[str, list[float]] = {}
        each: dict[str, float] = {}
        for site, shape in found.items():
            for name, value in asdict(shape).items():
                if not math.isnan(value):  # a matrix that has not moved has a size alone
                    each[f"{site}.{name}"] = value
                    means.setdefault(name, []).append(value)
        sizes = [self._start[site].shape for site in self._sites]
        chance = sum(budget(size, self._density) for size in sizes) / sum(size.numel() for size in sizes)
        return {**{name: sum(some) / len(some) for name, some in means.items()}, "chance": chance, **each}

    def _shape(self, model: Model, site: Site) -> Shape:
        before, after = self._start[site], as_trained(model, site)
        principal = self._start.principal(site, self._density, self._rank)
        return shape_of(before, after, principal)


def shape_of(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], principal: Int[Tensor, " count"]
) -> Shape:
    """The shape of the change from one matrix to another, `principal` being the flat positions that count as such."""
    change = after.float() - before.float()
    size = _norm(change)
    if not size:
        return Shape(0.0, *[math.nan] * 4)
    stored = stored_change(before, after)
    moved = int((change != 0).sum())
    return Shape(
        relative=size / _norm(before) if before.any() else math.nan,
        stable_rank=(size / _largest_singular_value(change)) ** 2,
        principal=energy_share(change, principal),
        absorbed=int(((change != 0) & (stored == 0)).sum()) / moved,
        lost=_norm(stored - change) / size,
    )


def stored_change(before: Float[Tensor, "out in"], after: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """What is left of a change once both points are stored in bf16, fp32."""
    return after.to(STORED).float() - before.to(STORED).float()


def energy_share(change: Float[Tensor, "*shape"], at: Int[Tensor, " count"]) -> float:
    """The share of ``‖change‖_F²`` on the entries at flat positions, in [0, 1]; NaN where nothing changed."""
    whole = _norm(change)
    return (_norm(change.flatten()[at]) / whole) ** 2 if whole else math.nan


class GradientCourse:
    """A monitor: which way the gradient points that the optimizer is about to use; after accumulation, reduction and clipping.

    Gives over all matrices that have one its ``norm``, and ``onward``, the cosine of minus the gradient with what the weights have moved
    so far: near 1 training goes straight on, below 0 it turns back; and both for each layer, as ``L12.norm``. With `LIFT` the gradient is zero
    but at the entries it trains. It sees the gradient as it is when the recorder has its turn: with `DRIFT` before it among the callbacks, bent.

    Matrices whose weights are frozen (an adapter's base) have none. Raises ValueError where nothing has a gradient.
    """

    __name__ = "gradient"
    before_step = True

    def __init__(self, model: Model, start: Start | None = None):
        self._start = start or Start(model)

    def trial(self, model: Model, optimizer: Any) -> float:
        """One matrix, see `finetune.monitors.Monitor`."""
        site, share = _largest(self._start, self._start.sites)
        self._products(model, site, _gathered(optimizer))
        return share

    def __call__(self, model: Model, step: int, optimizer: Any) -> dict[str, float]:
        entries = _gathered(optimizer)
        sums: dict[str, list[float]] = {}
        for site in self._start.sites:
            found = self._products(model, site, entries)
            if found is None:
                continue
            for name in ("", f"L{site.layer}."):
                sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), found, strict=True)]
        if not sums:
            raise ValueError("No matrix has a gradient of its own: its weights are frozen, as under a LoRA adapter.")
        return {key: value for name, three in sums.items() for key, value in _course(name, *three).items()}

    def _products(
        self, model: Model, site: Site, entries: Mapping[Tensor, tuple[Tensor, Tensor]]
    ) -> list[float] | None:
        """Of the gradient g and the change d so far: gg, dd and gd; None where there is no gradient."""
        g = self._gradient(model, site, entries)
        if g is None:
            return None
        d = model.weights[site].float() - self._start[site]
        return [float((a * b).sum(dtype=torch.float64)) for a, b in ((g, g), (d, d), (g, d))]

    def _gradient(
        self, model: Model, site: Site, entries: Mapping[Tensor, tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "out in"] | None:
        parameter, place = model.weights.parameter(site), model.anatomy.places[site]
        if parameter in entries:
            indices, values = entries[parameter]
            members, where = place.find(indices, parameter.shape)
            shape = model.weights.shape(site)
            return values.new_zeros(shape.numel()).index_copy_(0, where.long(), values[members]).view(shape).float()
        return None if parameter.grad is None else place.take(parameter.grad).float()


def _largest(start: Start, sites: Sequence[Site]) -> tuple[Site, float]:
    """The largest matrix, and its share of the entries of all."""
    sizes = {s: start.size(s) for s in sites}
    largest = max(sites, key=lambda s: sizes[s])
    return largest, sizes[largest] / sum(sizes.values())


def _course(name: str, gg: float, dd: float, gd: float) -> dict[str, float]:
    norms = math.sqrt(gg * dd)
    return {f"{name}norm": math.sqrt(gg), f"{name}onward": -gd / norms if norms else math.nan}


def _gathered(optimizer: Any) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """The gradients that LIFT holds instead of `.grad`: parameter -> flat positions and values; none for another optimizer."""
    lift = lift_of(optimizer)
    return {one.parameter: (one.indices, one.grad) for one in lift.gathered()} if lift else {}


def _largest_singular_value(W: Float[Tensor, "out in"]) -> float:
    start = torch.randn(W.shape[1], min(_SKETCH, *W.shape), generator=torch.Generator().manual_seed(0))
    basis = start.to(W.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(W.T @ torch.linalg.qr(W @ basis).Q).Q
    return float(torch.linalg.matrix_norm(W @ basis, 2))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
