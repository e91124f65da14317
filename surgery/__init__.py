"""The patient, and what may be done to its weights. Read in this order:

sites        Site: places have names; patterns match them
anatomy      where each site is in a file, in a module, and which slice a head owns; families are data
seeds        of draws that have a name
numbers      finite and whole ones, or one clear error
rounding     the dtypes of stored weights, and stochastic rounding to them
weights      points and vectors: Weights, Delta, apply; lazy, exact
hashing      what content is known by
headers      what safetensors headers and indices say; torch-free, believed no further than the files bear out
tensorfile   one safetensors file, by memory map
whole        files and folders that are there whole or not at all
borrowing    modes, random states and memory, given back
side_files   what lies beside weights and goes where they go
checkpoint   Checkpoint reads a model folder by site
reverse      the way back, as a compact patch
proof        a written model is loaded and compared before it appears
writing      write() streams, hashes, proves, is atomic
linalg       low rank, principal subspaces and angles
_blas        BLAS and LAPACK routines that let other threads run
adapter_names  what an adapter's files and tensors are called, and which of a model's tensors they mean
adapter_config  what an adapter's config makes of them
lowrank      Factored and Adapter: changes as factor pairs, PEFT's LoRA folders read and written
delta        a vector as a file, dense, sparse or low-rank, with the hash of its base
drawn        Noise, Permuted: vectors as large as another, and otherwise random
across       land(): a vector as it fits another model, a vision-language model's language tower for one
edits        Scale, RemoveDirection, AddDirection, TruncateRank: pure (site, W) -> W; SwapLayers, ReplaceLayers
edit_lists   edits as a small YAML
realign      SafeLoRA and SafeMERGE
yaml_text    YAML in which nothing is taken otherwise than it reads
recipe_text  a recipe's YAML from a file, text or a mapping, and which of its models are one folder
merging      mergekit's recipes and rules over our stream: read_recipe(), merge()
transcript   Transcript: prompt, thinking, answer, sentences, as token spans
rows         rows_are(): where the prompts of a running batch end, said by whoever runs it
runs         Runs: transcripts as a file, with the fingerprint of the model that wrote them
room         a cache that tokens are written into
decoding     decode(): what a module writes on, batch by batch; prefix_cache()
model        Model: live module, tokenizer, anatomy; generate(), installed()
windows      the same live weights in nnsight and TransformerLens, and what they call our sites
record       Record, verify, replay
card         the model card beside a written model
preflight    surgery check: problems and their fixes, and a forecast, from headers alone
hub_ids      what may be a model's name on the hub, and why the hub does not give it
specimen     the default model
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.across import Landed as Landed
    from surgery.across import land as land
    from surgery.anatomy import Anatomy as Anatomy
    from surgery.checkpoint import Checkpoint as Checkpoint
    from surgery.delta import StoredDelta as StoredDelta
    from surgery.delta import read_vector as read_vector
    from surgery.delta import save_delta as save_delta
    from surgery.edit_lists import read_edits as read_edits
    from surgery.edits import AddDirection as AddDirection
    from surgery.edits import RemoveDirection as RemoveDirection
    from surgery.edits import ReplaceLayers as ReplaceLayers
    from surgery.edits import Scale as Scale
    from surgery.edits import SwapLayers as SwapLayers
    from surgery.edits import TruncateRank as TruncateRank
    from surgery.lowrank import Adapter as Adapter
    from surgery.lowrank import Factored as Factored
    from surgery.lowrank import joined as joined
    from surgery.lowrank import save_adapter as save_adapter
    from surgery.lowrank import truncated as truncated
    from surgery.merging import merge as merge
    from surgery.merging import read_recipe as read_recipe
    from surgery.model import Model as Model
    from surgery.model import installed as installed
    from surgery.realign import safelora as safelora
    from surgery.realign import safemerge as safemerge
    from surgery.record import Record as Record
    from surgery.reverse import undo as undo
    from surgery.runs import Runs as Runs
    from surgery.runs import fingerprint as fingerprint
    from surgery.sites import Site as Site
    from surgery.sites import match as match
    from surgery.tensorfile import CheckpointError as CheckpointError
    from surgery.transcript import Markers as Markers
    from surgery.transcript import Transcript as Transcript
    from surgery.weights import Delta as Delta
    from surgery.weights import Weights as Weights
    from surgery.weights import apply as apply
    from surgery.writing import write as write

_HOMES = {
    "Landed": "across", "land": "across",
    "AddDirection": "edits", "ReplaceLayers": "edits", "SwapLayers": "edits", "TruncateRank": "edits", "read_edits": "edit_lists",
    "Adapter": "lowrank", "Factored": "lowrank", "joined": "lowrank", "read_vector": "delta", "save_adapter": "lowrank",
    "truncated": "lowrank",
    "merge": "merging", "read_recipe": "merging",
    "Runs": "runs", "fingerprint": "runs",
    "safelora": "realign", "safemerge": "realign",
    "Anatomy": "anatomy", "Checkpoint": "checkpoint", "CheckpointError": "tensorfile", "Delta": "weights", "Markers": "transcript",
    "Model": "model", "Record": "record", "RemoveDirection": "edits", "Scale": "edits", "Site": "sites", "StoredDelta": "delta",
    "Transcript": "transcript", "Weights": "weights", "apply": "weights", "installed": "model", "match": "sites",
    "save_delta": "delta", "undo": "reverse", "write": "writing",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"surgery.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
