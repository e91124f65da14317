"""What checks shapes in tests.

`checked` stands in the place of jaxtyping's own decorator: functions that name a shape go to it, with all their types; the others, which
are most, are left to pyright. Checking those too at every call took a seventh of all tests' time.
"""

import dataclasses
import functools
import inspect
import typing
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# where a float is asked for an int will do, as everywhere in Python
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_with_shapes = jaxtyping.jaxtyped


def checked(what: Any = None, *, typechecker: Any) -> Any:
    """In the place of `jaxtyping.jaxtyped`, for what its import hook decorates: functions, and classes for their dataclasses' sake."""
    if what is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__, typechecker=typechecker)
        return what
    hints = _hints(what)
    if any(map(_names_a_shape, hints.values())):
        return _with_shapes(what, typechecker=typechecker)
    return what


def _hints(function: FunctionType) -> dict[str, Any]:
    """Annotations as types; what only the type checker imports is anything."""
    found = {}
    for name, annotation in function.__annotations__.items():

        def alone(value: annotation) -> None:  # type: ignore[valid-type]
            del value

        try:
            found[name] = typing.get_type_hints(alone, function.__globals__, include_extras=True)["value"]
        except Exception:  # whatever evaluating it raises
            found[name] = Any
    return found


def _names_a_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_a_shape, hint if isinstance(hint, list) else typing.get_args(hint)))
