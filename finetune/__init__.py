"""Changing weights by gradient, inside transformers.Trainer and TRL. Read in this order:

lift         principal_indices() and LIFT, a torch optimizer over the chosen entries
examples     transcripts with a weight for every token, alone or in groups
predictions  what an objective looks at: logits at the tokens that are learnt
objectives   what a step minimises, one small function each
hosts        Surgical: all of this inside transformers.Trainer and TRL's trainers
monitors     every(n, fn) and the Recorder: any callable, inside the training loop
tune         tune() puts it together: ``from finetune.tune import tune``
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.lift import LIFT as LIFT
    from finetune.lift import principal_indices as principal_indices
    from finetune.monitors import ChangeNorm as ChangeNorm
    from finetune.monitors import Recorder as Recorder
    from finetune.monitors import every as every
    from finetune.tune import Tuned as Tuned

_HOMES = {
    "ChangeNorm": "monitors",
    "LIFT": "lift",
    "Recorder": "monitors",
    "Tuned": "tune",
    "every": "monitors",
    "principal_indices": "lift",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"finetune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")
