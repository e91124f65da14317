"""Changing weights by gradient, inside transformers.Trainer and TRL. Read in this order:

lift         principal_indices() and LIFT, a torch optimizer over the chosen entries
overlay      overlay_(): trainable entries beside frozen matrices, quantised ones too
distributed  LIFT in several processes: DDP, FSDP2 and DeepSpeed
shares       what of a parameter one process steps on, where an engine deals it out
dealt        a module that FSDP2 or DeepSpeed deals out while it trains, whole before and afterwards
examples     transcripts with a weight for every token, alone or in groups
pieces       a backward pass in pieces, in which no weight keeps its gradient back
predictions  what an objective looks at: logits at the tokens that are learnt
rules        pull() and DRIFT: gradients bent toward a vector; controls, the effective merge coefficient and matched merges
objectives   what a step minimises, one small function each
retention    losses beside the objective that keep what a model knew
checkpoints  whole, and of this very run
learner      what a trainer is given to train, and what is given back
hosts        Surgical: all of this inside transformers.Trainer and TRL's trainers
cadence      how often to measure, from a share of the training time
monitors     every(n, fn) and the Recorder: any callable, inside the training loop
movement     monitors of what training does to the weights, and of its gradients
rewards      verifiable rewards of a transcript: answer, format, length
grpo         grpo() reinforces what is rewarded, through TRL's GRPOTrainer
recipes      transcripts in, transcripts or examples out: rejection sampling, pairs, prefixes, disturbed steps, critical tokens
prerequisite knowledge and skill in two adapters, and only the skill is kept
tune         tune() puts it together: ``from finetune.tune import tune``
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.lift import LIFT as LIFT
    from finetune.lift import principal_indices as principal_indices
    from finetune.monitors import Recorder as Recorder
    from finetune.monitors import every as every
    from finetune.monitors import sometimes as sometimes
    from finetune.movement import ChangeNorm as ChangeNorm
    from finetune.overlay import overlay_ as overlay_
    from finetune.rules import DRIFT as DRIFT
    from finetune.rules import matched_merge as matched_merge
    from finetune.rules import merge_coefficients as merge_coefficients
    from finetune.rules import pull as pull
    from finetune.tune import Tuned as Tuned

_HOMES = {
    "ChangeNorm": "movement",
    "DRIFT": "rules",
    "LIFT": "lift",
    "Recorder": "monitors",
    "Tuned": "tune",
    "every": "monitors",
    "matched_merge": "rules",
    "merge_coefficients": "rules",
    "overlay_": "overlay",
    "principal_indices": "lift",
    "pull": "rules",
    "sometimes": "monitors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"finetune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")
