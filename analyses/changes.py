"""Changes of a model that have a strength: a steering, an edit of weights, a task vector; confined to layers or a span, and their random
stand-ins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from itertools import product
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
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
from surgery.transcript import parse_span
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


def confined(
    change: Change, model: Model | Weights, layers: Iterable[int] | None = None, span: str | None = None
) -> Change:
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


def require_fit(
    change: Change, weights: Weights, layers: Iterable[Iterable[int] | None], spans: Iterable[str | None]
) -> None:
    """Raise ValueError where a change does not fit weights, or nothing of it is in some of the layers or can be over a span: from headers alone."""
    for group, span in product(layers, spans):
        if span is not None:
            parse_span(span)
        part = confined(change, weights, layers=group, span=span)
        if isinstance(part, Editing):
            part.of(weights, 1.0)
        elif isinstance(part, Steering):
            _sites(part, weights)


def settled(change: Change, model: Model) -> Change:
    """A change that was checked against the model once, so that it need not be at every strength.

    Raises ValueError for what does not fit the model, and for a `Direction` that was measured in another one and not said to be meant for this
    (``carried_to``).
    """
    if isinstance(change, Delta):
        _ = model.weights + change
        return change
    if isinstance(change, Editing):
        if isinstance(direction := getattr(change.edit, "direction", None), Direction):
            direction.require(model)
        change.of(model.weights, 1.0)
        return change
    place(replace(change, strength=1.0, units="raw"), model)  # raises where it does not fit
    direction = change.direction
    return (
        replace(change, direction={site: direction.raw(site) for site in direction})
        if hasattr(direction, "raw")
        else change
    )


def stand_in(change: Change, model: Model, *, seed: int, draw: int) -> Change:
    """A random change in the place of a change: what it does, any such change does.

    Directions are drawn evenly from the sphere, each with the norm of the one it stands for: a steering that adds one is then as large. A
    direction that is removed, ablated or clamped, or that an edit doubles, changes as much as the weights or the stream have along it, which of
    a random one is seldom as much. An edit without a direction, and a delta, become Gaussian noise that has the change's norm in every tensor.
    Draw number `draw` depends on ``(seed, draw)`` and the site.
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


def _sites(change: Steering | Editing, model: Model | Weights) -> list[Site]:
    """Where a steering or an edit acts."""
    if isinstance(change, Steering):
        return [placed.site for placed in place(replace(change, strength=1.0, units="raw"), model)]
    assert change.at is not None
    return match(change.at, model.weights if isinstance(model, Model) else model)


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
    """A hash of what something is: numbers, words, tensors, points, collections, functions with all they close over, a model by its weights,
    other objects by their attributes.

    What a function reads from its module counts by its name alone. Raises ValueError for what cannot be told from another of its kind in the
    next process (an open file, a generator of random numbers). (`finetune.checkpoints.digest` is of plain data, as the checkpoints have it.)
    """
    total = Digest()
    for piece in _bytes(thing):
        total.update(piece)
    return total.hexdigest()[:32]


_PLAIN = (  # what prints as what it is
    type(None), bool, int, float, complex, str, bytes, range, slice, Enum, PurePath, Site, np.generic, torch.dtype, torch.device,
)  # fmt: skip


def _bytes(thing: Any, within: frozenset[int] = frozenset()) -> Iterator[bytes | memoryview]:
    """within: the ids of what this is a part of."""
    if id(thing) in within:
        yield b"itself"
        return
    inner = partial(_bytes, within=within | {id(thing)})
    if isinstance(thing, Tensor):
        yield f"{thing.dtype}{tuple(thing.shape)}".encode()
        yield raw_bytes(thing)
    elif isinstance(thing, np.ndarray):
        yield f"{thing.dtype}{thing.shape}".encode()
        yield from inner(thing.tolist())
    elif isinstance(thing, Delta | Weights):
        for site, shape in thing.shapes().items():
            yield str(site).encode()
            for strip in thing.strips(site, pieces(shape)):
                yield from inner(strip)
    elif isinstance(thing, Model):
        yield from inner(thing.weights)
    elif isinstance(thing, _PLAIN):
        yield repr(thing).encode()
    elif isinstance(thing, type | ModuleType):
        yield _name(thing).encode()
    elif is_dataclass(thing):
        yield type(thing).__name__.encode()
        for entry in fields(thing):
            yield f"{entry.name}=".encode()
            yield from inner(getattr(thing, entry.name))
    elif isinstance(thing, Mapping):
        yield b"{"
        for key, value in thing.items():
            yield from inner(key)
            yield b":"
            yield from inner(value)
            yield b","
        yield b"}"
    elif isinstance(thing, list | tuple):
        yield b"["
        for value in thing:
            yield from inner(value)
            yield b","
        yield b"]"
    elif isinstance(thing, set | frozenset):  # its order is another in every process
        yield from inner(sorted(map(digest, thing)))
    elif isinstance(thing, re.Pattern):
        yield from inner([thing.pattern, thing.flags])
    elif isinstance(thing, partial):
        yield from inner([thing.func, thing.args, thing.keywords])
    elif isinstance(thing, MethodType):
        yield from inner([thing.__func__, thing.__self__])
    elif isinstance(thing, FunctionType):
        yield from _code(thing.__code__)
        yield from inner([thing.__defaults__, thing.__kwdefaults__])
        yield from inner([cell.cell_contents for cell in thing.__closure__ or ()])
        yield _name(thing).encode()
    elif isinstance(thing, BuiltinFunctionType):
        yield _name(thing).encode()
        yield from inner(thing.__self__)
    elif hasattr(thing, "__dict__"):
        yield _name(type(thing)).encode()
        if callable(thing) and isinstance(type(thing).__call__, FunctionType):
            yield from _code(type(thing).__call__.__code__)
        yield from inner(vars(thing))
    else:
        raise ValueError(
            f"{thing!r}, on which what is measured depends, cannot be told from another {type(thing).__name__} in the next process, so a folder "
            "cannot be gone on with. Leave out `to`, or hold something that is known by what it prints as, such as a seed or a path."
        )


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', None) or thing.__name__}"


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
