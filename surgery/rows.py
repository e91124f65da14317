"""Who the rows of a forward pass are.

A pass sees tokens and padding; where the prompts end, and which question a row answers, it does not see. Whoever runs a batch says so
here, and whoever follows the passes (steering over a span, say) may ask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Rows:
    """What is said of the rows of a batch.

    prompts: of each row, how many tokens are its prompt, padding not counted; None where `width` says it.
    items:   which question or transcript each row is, counted from 0; None where nobody said.
    width:   how many columns, padding included, are prompt; None where `prompts` says it.
    """

    prompts: tuple[int, ...] | None = None
    items: tuple[int, ...] | None = None
    width: int | None = None


_said: ContextVar[Rows | None] = ContextVar("rows", default=None)
_apart: ContextVar[bool] = ContextVar("apart", default=False)


@contextmanager
def rows_are(
    prompts: Sequence[int] | None = None, items: Sequence[int] | None = None, *, width: int | None = None
) -> Iterator[None]:
    """Say of the forward passes in the block where their rows' prompts end: ``with rows_are([12, 15]): model.module(...)``.

    prompts: tokens of each row that are prompt, padding not counted; 0 for a text that is nobody's answer.
    items:   which question or transcript each row is.
    width:   instead of `prompts`, the number of columns that are prompt, padding included.
    """
    if (prompts is None) == (width is None):
        raise ValueError("Say where the prompts end: either how many tokens of each row, or how many columns of all.")
    if prompts is not None and items is not None and len(prompts) != len(items):
        raise ValueError(f"{len(prompts)} rows have prompts, but {len(items)} are said to be items.")
    said = Rows(
        None if prompts is None else tuple(map(int, prompts)), None if items is None else tuple(map(int, items)), width
    )
    token = _said.set(said)
    try:
        yield
    finally:
        _said.reset(token)


def rows_now() -> Rows | None:
    """What was said of the rows of the passes that run now; None where nothing was."""
    return _said.get()


@contextmanager
def rows_apart() -> Iterator[None]:
    """Inside the block no rows share the computation of a common prefix: they are treated unlike."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def are_apart() -> bool:
    """Whether rows must not share a prefix now."""
    return _apart.get()


# --- rows that leave ------------------------------------------------------------------------------------------------------------

_asking: set[int] = set()  # hooks that ask `rows_now` in every pass, by the number of their handle


@contextmanager
def may_leave(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Say of hooks that they ask `rows_now` who the rows of each pass are, so that rows that have ended may leave the batch between passes."""
    numbers = {handle.id for handle in handles}
    _asking.update(numbers)
    try:
        yield
    finally:
        _asking.difference_update(numbers)


def some_ask(module: nn.Module) -> bool:
    """Whether a module has hooks of `may_leave` now: what is steered, silenced or recorded with hooks is."""
    return any(number in _asking for number in _hooks(module))


def all_stay(module: nn.Module) -> bool:
    """Whether some hook of a module may count on every row to stay where it is."""
    return any(number not in _asking for number in _hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody has a hook on a module, or on a part of it."""
    return next(_hooks(module), None) is not None


def _hooks(module: nn.Module) -> Iterator[int]:
    for part in module.modules():
        yield from part._forward_hooks
        yield from part._forward_pre_hooks


class KeptByRow(ABC):
    """What somebody keeps with a cache, as an attribute of it, that has a part for every row."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> KeptByRow:
        """The same of some rows."""


def select_rows(cache: Any, rows: Tensor) -> None:
    """Go on with some rows of a cache, and with them of all that is kept with it."""
    cache.batch_select_indices(rows)
    for name, kept in list(vars(cache).items()):
        if isinstance(kept, KeptByRow):
            setattr(cache, name, kept.select(rows.tolist()))
        elif hasattr(kept, "batch_select_indices"):
            select_rows(kept, rows.cpu())  # another model's, wherever that is
