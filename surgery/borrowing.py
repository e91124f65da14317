"""What is borrowed of a module, of the process and of the system is given back, after an error too."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def own_modes(module: nn.Module) -> Iterator[None]:
    """Whatever is switched inside, every submodule is afterwards in the mode (training or evaluation) that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the length of a ``with`` block."""
    with own_modes(module):
        module.eval()
        yield


@contextmanager
def own_parts(module: nn.Module) -> Iterator[None]:
    """Whatever is made of them inside, all submodules are afterwards of the class that they were, with the hooks, parameters, submodules and other
    attributes that they had."""
    had = [(part, type(part), [_attribute(*own) for own in vars(part).items()]) for part in module.modules()]
    try:
        yield
    finally:
        for part, kind, attributes in had:
            part.__class__ = kind
            vars(part).clear()
            for name, own, entries in attributes:
                if entries is not None:
                    own.clear()
                    own.update(entries)
                vars(part)[name] = own


def _attribute(name: str, own: Any) -> tuple[str, Any, dict[Any, Any] | None]:
    """An attribute, and what a dictionary holds, of hooks say."""
    return name, own, dict(own) if isinstance(own, dict) else None


@contextmanager
def own_draws() -> Iterator[None]:
    """Whatever is drawn inside, the random states of Python, numpy and torch are afterwards as before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def no_generation_settings(module: nn.Module) -> Iterator[None]:
    """A module's own generation settings are set aside: `generate` fills in from them (penalties, suppressed tokens, warpers) what it is not told."""
    from transformers import GenerationConfig

    held: Any = module
    own, held.generation_config = held.generation_config, GenerationConfig()
    try:
        yield
    finally:
        held.generation_config = own


def without_adapter(module: Any) -> Any:
    """The transformers module inside a PEFT model, whose layers the adapter's are then still beside; another module as it is."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


@contextmanager
def text_positions(module: nn.Module) -> Iterator[None]:
    """Passes inside are of texts: how far the images of the last batch moved its positions, which Qwen's vision-language models keep, is set aside.

    They would add it to those of any batch that goes on over a cache, whatever its rows.
    """
    held: Any = without_adapter(module).base_model
    if not hasattr(held, "rope_deltas"):
        yield
        return
    own, held.rope_deltas = held.rope_deltas, None
    try:
        yield
    finally:
        held.rope_deltas = own


def give_back_memory() -> None:
    """To the system, what was held and is not any more: a trainer is full of cycles, and glibc keeps freed blocks (3 GB after two arms)."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc: nothing to ask
        ctypes.CDLL(None).malloc_trim(0)
