"""What the activations say.

activations  collect(): rows at sites over spans, without padding, each knowing whose it is
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.activations import Activations as Activations
    from probes.activations import collect as collect

_HOMES = {
    "Activations": "activations",
    "collect": "activations",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"probes.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
