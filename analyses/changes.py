"""Changes of a model that have a strength: a steering, an edit of weights, a task vector; confined to layers or a span, and their random stand-ins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import CodeType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.directions import Direction
from probes.steering import Steering, place, steered
from surgery.drawn import Noise
from surgery.edits import AddDirection, RemoveDirection
from surgery.hashing import Digest
from surgery.model import Model
from surgery.seeds import seed_from_words
from surgery.sites import Site, match
from surgery.tensorfile import raw_bytes
from surgery.weights import Delta, Weights, apply, pieces


@dataclass(frozen=True, eq=False)
class Editing:
    """An edit of weights and where it acts, so that its strength can be swept: ``Editing(RemoveDirection(u), "*.attn.o")``.

    edit: one with a field ``strength``, at 0 of which it changes nothing. at: patterns of sites; None for an edit of whole layers.
    """

    edit: Any
    at: str | Site | tuple[str | Site, ...] | None = None

    def __post_init__(self) -> None:
        if not is_dataclass(self.edit) or "strength" not in {f.name for f in fields(self.edit)}:
            raise ValueError(
                f"{self.edit!r} has no strength to sweep; an edit such as RemoveDirection or Scale has one."
            )

    def of(self, weights: Weights, strength: float) -> Weights:
        """The weights with the edit at a strength."""
        return apply(replace(self.edit, strength=float(strength)), weights, self.at)


Change = Steering | Editing | Delta


def acting(change: Change, model: Model, strength: float) -> AbstractContextManager:
    """The model with a change at a strength, for the length of a ``with`` block."""
    if isinstance(change, Delta):
        return model.installed(model.weights + float(strength) * change)
    if isinstance(change, Editing):
        return model.installed(change.of(model.weights, strength))
    return steered(model, replace(change, strength=float(strength)))


def confined(change: Change, model: Model, layers: Iterable[int] | None = None, span: str | None = None) -> Change:
    """The part of a change in some layers; of a steering, over another span. Raises ValueError where nothing is left."""
    if span is not None:
        if not isinstance(change, Steering):
            raise ValueError(
                f"Only a steering acts over a span; a change of weights acts everywhere. Leave out the span {span!r}."
            )
        change = replace(change, over=span)
    if layers is None:
        return change
    wanted = set(layers)
    if isinstance(change, Delta):
        return change.keep(layers=wanted)
    if isinstance(change, Editing) and change.at is None:
        raise ValueError(f"{change.edit!r} edits whole layers that it names itself: leave out layers.")
    sites = _sites(change, model)
    left = tuple(site for site in sites if site.layer in wanted)
    if not left:
        there = sorted({site.layer for site in sites if site.layer is not None})
        raise ValueError(
            f"The change does nothing in layer {', '.join(map(str, sorted(wanted)))}; it acts in {', '.join(map(str, there))}."
        )
    return replace(change, at=left)


def settled(change: Change, model: Model) -> Change:
    """A change that was checked against the model once, so that it need not be at every strength.

    Raises ValueError for a `Direction` that was measured in another model and not said to be meant for this one (``carried_to``).
    """
    if isinstance(change, Editing) and isinstance(direction := getattr(change.edit, "direction", None), Direction):
        direction.require(model)
    if not isinstance(change, Steering):
        return change
    place(replace(change, strength=1.0, units="raw"), model)  # raises where it does not fit
    direction = change.direction
    return (
        replace(change, direction={site: direction.raw(site) for site in direction})
        if hasattr(direction, "raw")
        else change
    )


def stand_in(change: Change, model: Model, *, seed: int, draw: int) -> Change:
    """A random change as large as a change: what it does, any change does.

    Directions are drawn evenly from the sphere, each with the norm of the one it stands for; an edit without a direction, and a delta,
    become Gaussian noise that has the change's norm in every tensor. Draw number `draw` depends on ``(seed, draw)`` and the site.
    """
    if isinstance(change, Steering):
        return replace(change, direction=_random_directions(change.direction, seed, draw))
    if isinstance(change, Editing) and isinstance(change.edit, RemoveDirection | AddDirection):
        drawn = _random_directions(change.edit.direction, seed, draw)
        return replace(change, edit=replace(change.edit, direction=drawn))
    if isinstance(change, Editing):
        point = change.of(model.weights, 1.0)
        change = (point - model.weights).keep(sorted(point.changed_from(model.weights)))
    return Noise(change, seed_from_words(seed, draw))


def _sites(change: Steering | Editing, model: Model) -> list[Site]:
    """Where a steering or an edit acts."""
    if isinstance(change, Steering):
        return [placed.site for placed in place(replace(change, strength=1.0, units="raw"), model)]
    assert change.at is not None
    return match(change.at, model.weights)


def _random_directions(direction: Any, seed: int, draw: int) -> Any:
    if isinstance(direction, Tensor):
        return _random_like(direction, seed, draw, "")
    raw = getattr(direction, "raw", direction.__getitem__)
    return {site: _random_like(raw(site), seed, draw, site) for site in direction}


def _random_like(vector: Float[Tensor, " d"], seed: int, draw: int, site: Site | str) -> Float[Tensor, " d"]:
    noise = torch.randn(vector.shape, generator=_generator(seed, draw, site))
    return noise * (float(vector.float().norm()) / float(noise.norm()))


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from_words(*parts))


def digest(thing: Any) -> str:
    """A hash of numbers, words, tensors, points, vectors and dataclasses and collections of them."""
    total = Digest()
    for piece in _bytes(thing):
        total.update(piece)
    return total.hexdigest()[:32]


def _bytes(thing: Any) -> Iterator[bytes | memoryview]:
    if isinstance(thing, Tensor):
        yield f"{thing.dtype}{tuple(thing.shape)}".encode()
        yield raw_bytes(thing)
    elif isinstance(thing, Delta | Weights):
        for site, shape in thing.shapes().items():
            yield str(site).encode()
            for strip in thing.strips(site, pieces(shape)):
                yield from _bytes(strip)
    elif is_dataclass(thing) and not isinstance(thing, Site):
        yield type(thing).__name__.encode()
        for entry in fields(thing):
            yield f"{entry.name}=".encode()
            yield from _bytes(getattr(thing, entry.name))
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield f"{key}:".encode()
            yield from _bytes(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _bytes(value)
            yield b","
    elif isinstance(thing, partial):
        yield from _bytes([thing.func, thing.args, thing.keywords])
    elif callable(thing):
        yield from _code(getattr(thing, "__code__", None))
        yield from _bytes([*(getattr(thing, "__defaults__", None) or ())])
        held = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        yield from _bytes(
            [value for value in held if isinstance(value, str | int | float | tuple | list | dict | Tensor)]
        )
        yield f"{thing.__module__}.{getattr(thing, '__qualname__', type(thing).__name__)}".encode()
    else:
        yield repr(thing).encode()


def _code(code: CodeType | None) -> Iterator[bytes]:
    """What a function does, for telling it from another of its name."""
    if code is not None:
        yield code.co_code
        for constant in code.co_consts:
            if not isinstance(constant, CodeType):  # a set's order is another in every process
                yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()
        yield repr(code.co_names).encode()
        for inner in code.co_consts:
            yield from _code(inner if isinstance(inner, CodeType) else None)
