"""What is asked for in numbers: finite ones and whole ones, or one clear error before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real


def require_number(name: str, value: object) -> None:
    """Raise ValueError where a value is no finite number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: give a finite number.")


def require_whole(name: str, value: object, least: int | None = None) -> None:
    """Raise ValueError where a value is no whole number, or one below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and int(value) < least):
        raise ValueError(f"{name}={value!r}: give a whole number{'' if least is None else f', {least} or more'}.")
