"""The patient, and what may be done to its weights. Read in this order:

sites        Site: places have names; patterns match them
anatomy      where each site is in a file, in a module, and which slice a head owns; families are data
weights      points and vectors: Weights, Delta, apply; lazy, exact
checkpoint   Checkpoint reads safetensors by site; write() streams, verifies, is atomic
delta        a vector as a file, sparse or dense, with the hash of its base
edits        Scale, RemoveDirection: pure (site, W) -> W
linalg       low rank, principal subspaces and angles
transcript   Transcript: prompt, thinking, answer, sentences, as token spans
model        Model: live module, tokenizer, anatomy; generate(), installed()
record       Record, verify, replay
specimen     the default model
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.anatomy import Anatomy as Anatomy
    from surgery.checkpoint import Checkpoint as Checkpoint
    from surgery.checkpoint import CheckpointError as CheckpointError
    from surgery.checkpoint import write as write
    from surgery.delta import StoredDelta as StoredDelta
    from surgery.delta import save_delta as save_delta
    from surgery.edits import RemoveDirection as RemoveDirection
    from surgery.edits import Scale as Scale
    from surgery.model import Model as Model
    from surgery.model import installed as installed
    from surgery.record import Record as Record
    from surgery.sites import Site as Site
    from surgery.sites import match as match
    from surgery.transcript import Markers as Markers
    from surgery.transcript import Transcript as Transcript
    from surgery.weights import Delta as Delta
    from surgery.weights import Weights as Weights
    from surgery.weights import apply as apply

_HOMES = {
    "Anatomy": "anatomy", "Checkpoint": "checkpoint", "CheckpointError": "checkpoint", "Delta": "weights", "Markers": "transcript",
    "Model": "model", "Record": "record", "RemoveDirection": "edits", "Scale": "edits", "Site": "sites", "StoredDelta": "delta",
    "Transcript": "transcript", "Weights": "weights", "apply": "weights", "installed": "model", "match": "sites",
    "save_delta": "delta", "write": "checkpoint",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"surgery.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
