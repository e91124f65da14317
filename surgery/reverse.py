"""The way back: a compact reverse patch, kept with what was written, from which the exact original bytes return.

The patch (``undo.patch``, a safetensors file by another name, so that nothing takes it for weights) holds what the original had
wherever the written model has something else: entries of tensors, file headers, small side files. Of the side files that it leaves to
the copy it has the hashes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint import RECORD, Checkpoint, point_hash
from surgery.hashing import Digest, hash_bytes, hash_file
from surgery.headers import TEMPLATES
from surgery.side_files import PATCH, UNDO_LIMIT, copy_file, files_in
from surgery.tensorfile import DTYPES, CheckpointError, Stored, TensorFile, raw_bytes, save_tensors
from surgery.whole import new_folder

NO_UNDO = "no undo: "  # what a check begins with that says why there is no patch
SIDE_LIMIT = 1 << 20  # bytes: larger side files are not the kind that is rewritten after the write itself
_OURS = {PATCH, RECORD, "README.md"}  # a command puts its own in their place
# nor are vocabularies, whatever their size
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"}
_BLOCK = 1 << 16  # entries compared at a time: numpy counts places in 64 bits
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FORMAT = "model-surgery reverse patch 3"
_BEFORE = "model-surgery reverse patch 2"  # without the hashes of what is left to the copy


class Reverse:
    """Collects the patch while the new bytes go by, tensors side by side. Over its limit it lets go of everything and remembers why."""

    def __init__(self, layout: Checkpoint, limit: int = UNDO_LIMIT):
        self._layout, self._limit = layout, limit
        self._pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._size, self._lock = 0, threading.Lock()
        self.refused: str | None = None if limit else "it was asked not to keep a way back"

    def add(self, name: str, at: int, after: Tensor) -> None:
        """Entries ``at, at + 1, ...`` of a stored tensor will be `after`: keep those of the original that differ, bit for bit."""
        if self.refused:
            return
        before = self._layout.stored(name)
        was, now = _bits(before.reshape(-1)[at : at + after.numel()]), _bits(after.reshape(-1))
        narrow = np.int32 if at + len(was) < 2**31 else np.int64
        grown = 0
        for begin in range(0, len(was), _BLOCK):
            differing = np.flatnonzero(was[begin : begin + _BLOCK] != now[begin : begin + _BLOCK]) + begin
            if len(differing):
                self._pieces.setdefault(name, []).append(((differing + at).astype(narrow), was[differing]))
                grown += len(differing) * (np.dtype(narrow).itemsize + was.itemsize)
        with self._lock:
            self._size += grown
        if self._size > self._limit:
            self.refuse(f"the original of what changed takes more than {self._limit / 2**20:.0f} MiB")

    def refuse(self, why: str) -> None:
        if self._limit:
            self.refused, self._pieces = why, {}

    def save(self, folder: Path, base_hash: str, point: str) -> str:
        """Write the patch into the new folder, and say what it holds; or say why there is none."""
        if self.refused:
            return f"{NO_UNDO}{self.refused}"
        tensors = {}
        for name, pieces in sorted(self._pieces.items()):  # whichever thread came first
            tensors[f"index:{name}"] = torch.from_numpy(np.concatenate([i for i, _ in pieces]))
            tensors[f"value:{name}"] = torch.from_numpy(np.concatenate([v for _, v in pieces]).view(np.uint8))
        for file in self._layout.files:
            tensors[f"header:{file}"] = _as_tensor(TensorFile(self._layout.folder / file).header)
        left: dict[str, str] = {}  # to the copy
        without = []
        for name in files_in(self._layout.folder):
            path, ours = self._layout.folder / name, folder / name
            if name in self._layout.files:
                continue
            if _is_kept(path, ours):
                self._size += path.stat().st_size
                if self._size > self._limit:
                    self.refuse(f"with the original's {name} it would take more than {self._limit / 2**20:.0f} MiB")
                    return f"{NO_UNDO}{self.refused}"
                tensors[f"side:{name}"] = _as_tensor(path.read_bytes())
            elif ours.is_file():
                left[name] = hash_file(path)
            else:
                without.append(name)
        said = {
            "format": _FORMAT,
            "left": json.dumps(left),
            "base_hash": base_hash,
            "hash": point,
            "content": _digest(tensors.values()),
        }
        save_tensors(folder / PATCH, tensors, said)
        lacking = f", without {', '.join(without)}, which no copy takes along" if without else ""
        return f"undo kept: {(folder / PATCH).stat().st_size / 2**20:.1f} MiB{lacking}"


def _is_kept(path: Path, ours: Path) -> bool:
    """Whether a side file of the original must be in the patch: its namesake is another, or may yet become so."""
    if path.name in _OURS:
        return True
    small = path.stat().st_size <= SIDE_LIMIT
    if not ours.is_file():
        return small
    return (small and path.name not in _VOCABULARIES) or hash_file(path) != hash_file(ours)


def undo(folder: str | os.PathLike[str], to: str | os.PathLike[str], *, progress: bool = False) -> str:
    """The original of a written model, byte for byte, in a new folder; gives its hash.

    Side files the write replaced (card, record, index) come back too; files over 1 MiB that no copy takes along (weights in another format)
    do not, and the check of the write named them. Raises CheckpointError where the folder has no patch, or where
    its tensors, or the side files that only it has, are not those the patch was made for; nothing is left then.
    """
    from surgery.record import verify

    folder, to = Path(folder), Path(to)
    path = folder / PATCH
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}: give that of a model which a surgery command wrote.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {PATCH}: {_why_none(folder)}. The original is where it was: nothing was overwritten."
        )
    patch = TensorFile(path)
    metadata = patch.metadata
    if metadata.get("format") not in (_FORMAT, _BEFORE):
        raise CheckpointError(f"{path} is not a reverse patch: its format is {metadata.get('format')!r}.")
    outside = [name for name in _named(patch) if not _is_of_a_folder(name)]
    left = json.loads(metadata.get("left", "{}"))
    needed = {"hash", "base_hash", "left" if metadata["format"] == _FORMAT else "files"}
    if outside or not needed <= metadata.keys() or not isinstance(left, dict):
        wrong = f"names {outside[0]!r}, which is no file of its folder" if outside else "does not say what it leads to"
        raise CheckpointError(f"{path} {wrong}: it was not written by surgery, and is refused.")
    if metadata.get("content") != _digest(patch[name] for name in patch.tensors):
        raise CheckpointError(f"{path} is damaged: its content has another hash than it had when it was written.")
    written = Checkpoint(folder)
    hashes = written.hashes()
    if point_hash(written.tensors, hashes) != metadata["hash"]:
        found = [p for p in verify(folder) if "tensor" in p] if (folder / RECORD).is_file() else []
        raise CheckpointError(
            f"{folder} is not what was written any more{': ' + found[0] if found else ''}. Undo needs its exact bytes."
        )
    for name, digest in left.items():
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is not what was written any more, and {PATCH} leaves it to this folder: the original cannot be given back whole. "
                "Put back the file as it was written."
            )
    headers = {n.removeprefix("header:"): _bytes(patch, n) for n in patch.tensors if n.startswith("header:")}
    restored: dict[str, str] = dict(hashes)
    originals: dict[str, Stored] = {}
    from tqdm.auto import tqdm

    with new_folder(to) as partial, tqdm(total=written.nbytes, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, header in headers.items():
            with (partial / file).open("wb") as sink:
                sink.write(header)
                sink.flush()
                for tensor in _promised(file, header):
                    originals[tensor.name] = tensor
                    data = _original(written, patch, tensor)
                    if data is not None:
                        restored[tensor.name] = hash_bytes(data)
                        sink.write(data)
                    else:
                        sink.write(raw_bytes(written.stored(tensor.name)))
                    bar.update(tensor.end - tensor.begin)
        for name in patch.tensors:
            if name.startswith("side:"):
                side = partial / name.removeprefix("side:")
                side.parent.mkdir(exist_ok=True)
                side.write_bytes(_bytes(patch, name))
        if metadata["format"] == _BEFORE:
            left = [n for n in json.loads(metadata["files"]) if n not in _OURS and (folder / n).is_file()]
        for name in left:
            if not (partial / name).exists():
                copy_file(folder, partial, name)
        if point_hash(originals, restored) != metadata["base_hash"]:
            raise CheckpointError(f"{path} does not lead back to the original: the restored bytes have another hash.")
    return metadata["base_hash"]


def _why_none(folder: Path) -> str:
    """Why no patch was kept, as the record of the write says it."""
    from surgery.record import Record

    if not (folder / RECORD).is_file():
        return "it was not written by surgery, or the change was too large to keep a way back"
    record = Record.load(folder)
    said = [check.removeprefix(NO_UNDO) for check in record.checks if check.startswith(NO_UNDO)]
    if PATCH in record.outputs:
        said = ["it had one when it was written, and the file is gone"]
    return said[0] if said else f"`surgery {record.command}` made it, and a way back is kept with written models only"


def _named(patch: TensorFile) -> list[str]:
    """Every file that undoing a patch would write."""
    told = [n.partition(":")[2] for n in patch.tensors if n.startswith(("header:", "side:"))]
    return [*told, *json.loads(patch.metadata.get("left", "{}")), *json.loads(patch.metadata.get("files", "[]"))]


def _is_of_a_folder(name: str) -> bool:
    """Whether a name is that of a file of a model's folder, or of its named chat templates."""
    last = name.removeprefix(f"{TEMPLATES}/")
    return Path(last).name == last and last not in ("", "..") and "\0" not in last


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = Digest()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _original(written: Checkpoint, patch: TensorFile, tensor: Stored) -> memoryview | None:
    """The original bytes of a tensor that was changed, None for one that was not."""
    if f"index:{tensor.name}" not in patch.tensors:
        return None
    whole = _bits(written.stored(tensor.name).reshape(-1)).copy()
    whole[patch[f"index:{tensor.name}"].numpy()] = patch[f"value:{tensor.name}"].numpy().view(whole.dtype)
    return memoryview(whole.view(np.uint8))  # type: ignore[arg-type]


def _promised(file: str, header: bytes) -> Iterator[Stored]:
    """The tensors a header announces, in file order."""
    said = json.loads(header[8:])
    said.pop("__metadata__", None)
    for name, entry in sorted(said.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (len(header) + at for at in entry["data_offsets"])
        yield Stored(file, name, DTYPES[entry["dtype"]], torch.Size(entry["shape"]), begin, end)


def _bits(tensor: Tensor) -> np.ndarray:
    """A flat tensor's entries as integers of their width."""
    return tensor.contiguous().view(_INTEGERS[tensor.dtype.itemsize]).numpy()


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]


def _bytes(patch: TensorFile, name: str) -> bytes:
    return patch[name].numpy().tobytes()
