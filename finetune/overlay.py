"""A sparse overlay: trainable values at fixed positions beside frozen matrices, which may be quantised.

LIFT moves entries of a matrix in place, and a quantised matrix has none that could take a small step. `overlay_` leaves the matrix as it
is and adds a second, sparse one to what it computes: ``y = W x + S x``, where S has as many numbers as LIFT would train, at the places
LIFT would choose. Any torch optimizer trains them; gradients and optimizer state exist for them alone.

    with overlay_(model, density=0.05, dequantise=read) as overlay:
        optimizer = torch.optim.AdamW(overlay.parameters(), lr=1e-3)
        ...
        save_delta(overlay.delta(), "vectors/tuned", base_hash=base.hash())  # base = Checkpoint(folder)

Source: the positions are those of arXiv 2506.00772 (LIFT). Differs: the matrix is frozen and the positions stay as first chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.lift import Select, budget, principal_indices
from surgery.anatomy import Anatomy, Place
from surgery.delta import scatter
from surgery.model import Model
from surgery.seeds import seed_from_numbers
from surgery.sites import Patterns, Site, match
from surgery.weights import Delta

Dequantise = Callable[[nn.Module], Tensor]
_VALUES, _PLACES = "overlay", "overlay_at"  # what an overlaid module has besides its own
_STRIP = 1 << 22  # entries of the sparse matrix that are dense at once


def sparse_product(
    x: Float[Tensor, "*row in"], values: Float[Tensor, " k"], indices: Int[Tensor, " k"], out: int
) -> Float[Tensor, "*row out"]:
    """``x S^T``, where S ``[out, in]`` has `values` at the flat, ascending positions `indices` and is zero elsewhere.

    Computed in the dtype of `x`. Differentiable in x and in values, once; S and its gradient are dense a few rows at a time.
    """
    return _SparseProduct.apply(x, values, indices, out)  # type: ignore[no-any-return]


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, out: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        product = rows.new_empty(len(rows), out)
        with torch.autocast(x.device.type, enabled=False):
            for strip, dense, _ in _strips(values, indices, out, rows):
                product[:, strip] = rows @ dense.T
        ctx.save_for_backward(x, values, indices)
        ctx.out = out
        return product.view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, indices = ctx.saved_tensors
        rows, above = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, ctx.out)
        of_x = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        of_values = torch.empty_like(values)
        with torch.autocast(x.device.type, enabled=False):
            for strip, dense, (part, at) in _strips(values, indices, ctx.out, rows):
                if of_x is not None:
                    of_x.addmm_(above[:, strip], dense)
                of_values[part] = (above[:, strip].T @ rows).view(-1).index_select(0, at).to(values.dtype)
        return None if of_x is None else of_x.view(x.shape), of_values, None, None


def _strips(
    values: Tensor, indices: Tensor, out: int, like: Tensor
) -> Iterator[tuple[slice, Tensor, tuple[slice, Tensor]]]:
    """The sparse matrix some rows at a time: which rows, the rows, and which of the values lie where in them."""
    into = like.shape[-1]
    step = max(1, _STRIP // into)
    starts = list(range(0, out, step))
    edges = torch.tensor([start * into for start in starts], dtype=indices.dtype, device=indices.device)
    ends = [*torch.searchsorted(indices, edges).tolist(), len(indices)]
    for i, start in enumerate(starts):
        stop, part = min(out, start + step), slice(ends[i], ends[i + 1])
        at = indices[part].long() - start * into
        dense = like.new_zeros((stop - start) * into).index_copy_(0, at, values[part].to(like.dtype))
        yield slice(start, stop), dense.view(-1, into), (part, at)


@dataclass(frozen=True)
class _Part:
    """One site's share of an overlaid module: its shape, its positions in the site's own matrix, and which of the values they are."""

    shape: torch.Size
    index: Int[Tensor, " k"]
    slots: Int[Tensor, " k"]


@dataclass(frozen=True)
class _Layer:
    """An overlaid module. transposed: it stores its weight ``[in, out]``."""

    path: str
    module: nn.Module
    parts: Mapping[Site, _Part]
    transposed: bool
    hook: Any

    @property
    def values(self) -> nn.Parameter:
        return getattr(self.module, _VALUES)


class Entries(Delta):
    """A vector that moves some entries of some matrices: site -> ascending flat positions and their values."""

    def __init__(
        self, entries: Mapping[Site, tuple[Tensor, Tensor]], shapes: Mapping[Site, torch.Size], anatomy: Anatomy
    ):
        self._entries, self._shapes, self._anatomy = dict(entries), dict(shapes), anatomy

    @property
    def anatomy(self) -> Anatomy:
        return self._anatomy

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def _read(self, site: Site, rows: slice) -> Tensor:
        return scatter(*self._entries[site], self._shapes[site], rows)


class Overlay:
    """The sparse matrices that `overlay_` laid on a model. Give `parameters` to an optimizer; `close` takes everything away again.

    The model's own parameters are frozen as long as it lies there, its `weights` remain those of the base: ``model.weights +
    overlay.delta()`` is the tuned point. In a state_dict of the module the values are at ``MODULE.overlay``, their positions at
    ``MODULE.overlay_at``.
    """

    def __init__(self, model: Model, layers: Iterable[_Layer], free: Iterable[nn.Parameter]):
        self.model = model
        self._layers, self._free = list(layers), list(free)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name in the module, trainable float32 values ``[k]``), one pair for each overlaid module. None after `close`."""
        return [(f"{layer.path}.{_VALUES}", layer.values) for layer in self._layers]

    def parameters(self) -> list[nn.Parameter]:
        return [values for _, values in self.named_parameters()]

    @property
    def sites(self) -> list[Site]:
        """The matrices that have a sparse one beside them."""
        return [site for layer in self._layers for site in layer.parts]

    @property
    def trainable(self) -> int:
        """How many numbers are free to move."""
        return sum(values.numel() for values in self.parameters())

    def delta(self) -> Delta:
        """The change that the overlay makes, as it is now: exact, and sparse in a file (`save_delta`)."""
        entries, shapes = {}, {}
        for layer in self._layers:
            values = layer.values.detach().cpu()
            for site, part in layer.parts.items():
                entries[site], shapes[site] = (part.index, values[part.slots]), part.shape
        return Entries(entries, shapes, self.model.anatomy)

    @torch.no_grad()
    def merge_(self) -> None:
        """Adds the values to the matrices they lie on, rounded to the dtype these are stored in, and takes the overlay away.

        Raises ValueError, and changes nothing, where a matrix is quantised: rounding to its levels would take most of the change away
        again. `delta` exports it instead.
        """
        for layer in self._layers:
            if not _is_plain(layer.module):
                raise ValueError(
                    f"{layer.path} is quantised: merged into it, the change would be rounded to its levels and mostly lost. Export it with "
                    "overlay.delta(), and add that to the unquantised model."
                )
        for layer in self._layers:
            weight = layer.module.weight
            assert isinstance(weight, Tensor)
            out = weight.shape[1] if layer.transposed else weight.shape[0]
            into = weight.numel() // out
            at = getattr(layer.module, _PLACES).long()
            where = (at % into, at // into) if layer.transposed else (at // into, at % into)
            weight[where] = (weight[where].float() + layer.values).to(weight.dtype)
        self.close()

    def close(self) -> None:
        """Takes the overlay away: the modules are as they were before, and what was free to move is so again."""
        for layer in self._layers:
            layer.hook.remove()
            delattr(layer.module, _VALUES)
            delattr(layer.module, _PLACES)
        for parameter in self._free:
            parameter.requires_grad_(True)
        self._layers, self._free = [], []

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Overlay: {self.trainable} numbers on {len(self.sites)} matrices>"


@torch.no_grad()
def overlay_(
    model: Model,
    at: Patterns | None = None,
    *,
    density: float | None = None,
    lora_rank: int | None = None,
    filter_rank: int = 16,
    select: Select = "largest",
    seed: int = 0,
    dequantise: Dequantise | None = None,
) -> Overlay:
    """Lays trainable values, zero at first, on the principal entries of a model's matrices, and freezes the model itself, in place.

    at: patterns of the matrices, among those of attention and MLP; by default all of these.
    density, lora_rank: how many entries of each matrix, exactly one of them (see `finetune.lift.budget`).
    filter_rank, select, seed: which entries (see `principal_indices`). A random choice depends on (seed, place) only.
    dequantise: ``module -> W``, the weight a quantised module stands for, of the shape its parameter would have unquantised; positions
        are chosen by it, and forgotten is what it gave. By default the module's own weight, which must then not be quantised.

    Raises ValueError, naming the site and leaving the model as it was, where a pattern matches no such matrix, where a matrix is
    quantised and no `dequantise` says how to read it, where an overlay lies already, and for experts stored as one tensor.
    """
    linear = model.anatomy.linear_sites()
    chosen = linear if at is None else match(at, linear)
    by_module: dict[str, list[Site]] = {}
    for site in chosen:
        if site.head is not None:
            raise ValueError(f"{site} is one head: an overlay lies on whole matrices, so ask for {site.whole}.")
        if model.anatomy.places[site].expert is not None:
            raise ValueError(f"{site} is part of one tensor with all experts, which no single linear map computes.")
        by_module.setdefault(model.anatomy.places[site].name.removesuffix(".weight"), []).append(site)

    def choose(site: Site, stored: Tensor) -> _Choice:
        place, drawn = model.anatomy.places[site], seed_from_numbers(seed, linear.index(site))
        matrix = place.take(stored)
        count = budget(matrix.shape, density, lora_rank)  # type: ignore[arg-type]
        try:
            index = principal_indices(matrix.contiguous(), filter_rank, count, select, drawn).cpu()
        except ValueError as reason:
            raise ValueError(f"cannot choose entries of {site}: {reason}") from reason
        return _Choice(matrix.shape, index, _inside(place, stored.shape, index))

    plans = []
    for path, sites in by_module.items():
        module = model.module.get_submodule(path)
        if hasattr(module, _VALUES):
            raise ValueError(f"{path} has an overlay already: close it, or merge it, before laying another.")
        stored = _weight(path, module, dequantise)
        transposed = model.anatomy.places[sites[0]].transposed
        out = stored.shape[1 if transposed else 0]
        plans.append((path, module, {site: choose(site, stored) for site in sites}, out, transposed))
    free = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    return Overlay(model, [_lay_(*plan) for plan in plans], free)


@dataclass(frozen=True)
class _Choice:
    """What was chosen of a site: its shape, the positions in its own matrix, and the same ones in the module's ``[out, in]``."""

    shape: torch.Size
    index: Int[Tensor, " k"]
    inside: Int[Tensor, " k"]


def _inside(place: Place, stored: torch.Size, index: Tensor) -> Tensor:
    """Where positions of a site's matrix are in the matrix ``[out, in]`` of the module that it is a piece of."""
    if place.is_whole:
        return index
    out, into = reversed(stored) if place.transposed else stored
    positions = torch.arange(out * into).view(out, into)
    return place.take(positions.T if place.transposed else positions).reshape(-1)[index.long()]


def _lay_(path: str, module: nn.Module, choices: Mapping[Site, _Choice], out: int, transposed: bool) -> _Layer:
    inside, order = torch.cat([choice.inside.long() for choice in choices.values()]).sort()
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order))
    ends = [len(choice.index) for choice in choices.values()]
    parts = {
        site: _Part(choice.shape, choice.index, mine)
        for (site, choice), mine in zip(choices.items(), slots.split(ends), strict=True)
    }
    device = next(chain(module.parameters(), module.buffers())).device
    module.register_parameter(_VALUES, nn.Parameter(torch.zeros(len(inside), device=device)))
    module.register_buffer(
        _PLACES, inside.to(device, max((c.index.dtype for c in choices.values()), key=lambda d: d.itemsize))
    )

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        values, places = getattr(module, _VALUES), getattr(module, _PLACES)
        return output + sparse_product(args[0].to(output.dtype), values, places, out)

    return _Layer(path, module, parts, transposed, module.register_forward_hook(add))


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and weight.itemsize > 1


def _weight(path: str, module: nn.Module, dequantise: Dequantise | None) -> Tensor:
    if dequantise is not None:
        weight = dequantise(module)
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"dequantise gave {weight.dtype} of shape {tuple(weight.shape)} for {path}, not a matrix of floating numbers."
            )
        return weight.detach()
    if not _is_plain(module):
        weight = getattr(module, "weight", None)
        stored = f"stored as {weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "without a weight"
        raise ValueError(
            f"{path} is a {type(module).__name__} {stored}: positions are chosen by the matrix that it stands for. Say how to read it, as in "
            "overlay_(..., dequantise=lambda module: module.codes * module.scale)."
        )
    return module.weight.detach()  # type: ignore[operator,return-value]
