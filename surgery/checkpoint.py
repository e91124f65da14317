"""Checkpoints on disk, read by site. A `Checkpoint` is keyed on the names in its *files*, never on those of a live module."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery import headers
from surgery.anatomy import Anatomy
from surgery.hashing import hash_bytes
from surgery.headers import INDEX as INDEX
from surgery.headers import RECORD as RECORD
from surgery.headers import CheckpointError as CheckpointError
from surgery.headers import read_folder
from surgery.sites import Site
from surgery.tensorfile import Stored, TensorFile, stored
from surgery.weights import Weights, some_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Checkpoint(Weights):
    """The weights in a Hugging Face model folder, lazily: opening reads headers only.

    Sharded or single safetensors files; tied tensors are one site. Raises CheckpointError for a folder that is empty, incomplete,
    inconsistent or pickled, and ValueError for a family without a table. A head of its own under a config that ties it is noticed,
    by a CheckpointError, where the embedding is first read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.tensors, self.metadata = read_headers(self.folder)
        self.anatomy = Anatomy.of(self.config, self.tensors, where=str(folder))
        self.layout = self
        self._shapes = {site: self._site_shape(site) for site in self.anatomy.places}
        self._files: dict[str, TensorFile] = {}
        self._last: dict[int, tuple[str, Tensor]] = {}  # of each thread
        self._tied = not self.anatomy.copies  # that copies repeat their site is not known before they are read

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def dtype(self, site: Site | str) -> torch.dtype:
        return self.tensors[self.anatomy.places[self._existing(site)].name].dtype

    def _read(self, site: Site, rows: slice) -> Tensor:
        place = self.anatomy.places[site]
        if site in self.anatomy.ties.values():
            self.require_tied()
        tensor = some_rows(place.take(self.stored(place.name)), rows)
        return tensor.clone() if rows == slice(None) else tensor  # whole, it is the caller's own, to write to as well

    def stored(self, name: str) -> Tensor:
        """A tensor as the file has it, by the file's name for it."""
        last = self._last.get(threading.get_ident())
        if last is None or last[0] != name:  # a walk in chunks asks for the same one many times
            last = self._last[threading.get_ident()] = (name, self._file(self.tensors[name].file)[name])
        return last[1]

    def require_tied(self) -> None:
        """Raise CheckpointError where the files have a head of its own that config.json says is the embedding; reads both, once."""
        if self._tied:
            return
        for name, site in self.anatomy.copies.items():
            fault = headers.two_heads(self.folder, self.tensors[name], self.tensors[self.anatomy.places[site].name])
            if fault is not None:
                raise CheckpointError(str(fault))
        self._tied = True

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]

    @property
    def files(self) -> list[str]:
        """The weight files, in order."""
        return sorted({t.file for t in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files, headers not counted."""
        return sum(t.end - t.begin for t in self.tensors.values())

    def hashes(self) -> dict[str, str]:
        """BLAKE3 of every tensor's bytes, by file name of the tensor."""
        return {name: digest for file in self.files for name, digest in self._file(file).hashes().items()}

    def hash(self) -> str:
        """BLAKE3 of the whole point: of its tensors' names, dtypes, shapes and bytes, whatever files they are split into."""
        return point_hash(self.tensors, self.hashes())

    def __repr__(self) -> str:
        return f"<Checkpoint {self.folder.name}: {self.anatomy.family}, {self.anatomy.n_layers} layers, {self.nbytes / 1e6:.0f} MB>"

    def _site_shape(self, site: Site) -> torch.Size:
        place = self.anatomy.places[site]
        stored = self.tensors[place.name]
        if place.is_whole:
            return stored.shape
        return place.take(torch.empty(stored.shape, device="meta", dtype=stored.dtype)).shape


def point_hash(tensors: Mapping[str, Stored], hashes: Mapping[str, str]) -> str:
    rows = [[name, tensors[name].code, list(tensors[name].shape), hashes[name]] for name in sorted(tensors)]
    return hash_bytes(json.dumps(rows).encode())


def read_config(folder: Path) -> PretrainedConfig:
    """The folder's config, or a CheckpointError that says what is wrong with the folder."""
    headers.read_config(folder)  # what it says is possible, or this raises
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a class may trip over what it reads in any way
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {said or type(error).__name__}") from error


def read_headers(folder: Path) -> tuple[dict[str, Stored], dict[str, dict[str, str]]]:
    """The tensors of a folder by name and each file's metadata; a CheckpointError says the first thing that is wrong."""
    found = read_folder(folder)
    if found.faults:
        raise CheckpointError(str(found.faults[0]))
    return {name: stored(entry) for name, entry in found.tensors.items()}, found.metadata


def load_module(folder: Path, dtype: torch.dtype | str, *, offload: Path | None = None) -> PreTrainedModel:
    """The transformers model of a folder, on the CPU, silently.

    offload: leave the weights in their files and fetch them a module at a time, for a model larger than memory; the folder given takes
    what has another name in memory than in the file, and is needed as long as the model is. Raises CheckpointError when a
    tensor is missing, unexpected or misshapen.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    config = read_config(folder)
    auto: Any = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText

    bars, level, dispatch = (
        logging.is_progress_bar_enabled(),
        logging.get_verbosity(),
        getLogger("accelerate.big_modeling"),
    )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disabled, dispatch.disabled = dispatch.disabled, True
    options: dict[str, Any] = {}
    if offload is not None:
        options = {"device_map": _on_disk(auto, config), "offload_folder": str(offload)}
    try:
        loaded: Any = auto.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(level)
        dispatch.disabled = disabled
        if bars:
            logging.enable_progress_bar()
    module, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            first = sorted(map(str, info[problem]))[0]
            raise CheckpointError(
                f"{folder} does not load cleanly: {len(info[problem])} {problem.replace('_', ' ')}, first {first}."
            )
    return module


def _on_disk(auto: Any, config: PretrainedConfig) -> dict[str, str]:
    """A device map that leaves every weight in its file: module -> "disk", or "cpu" where a module has buffers only."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        skeleton = auto.from_config(config)
    places: dict[str, str] = {}

    def place(name: str, module: Any) -> None:
        children = dict(module.named_children())
        if not any(True for _ in module.parameters()):
            places[name] = "cpu"
        elif not children or dict(module.named_parameters(recurse=False)):
            places[name] = "disk"
        else:
            for child, inner in children.items():
                place(f"{name}.{child}" if name else child, inner)

    place("", skeleton)
    return places
