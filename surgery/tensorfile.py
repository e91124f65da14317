"""One safetensors file, read or written a tensor at a time: its header believed only as far as its length bears it out, its tensors by memory map.

safetensors' own reader hands torch a Python sequence, and torch takes an interrupt inside it for a bad shape; a map has no such gap,
and costs no memory that the system could not take back.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery import headers
from surgery.hashing import hash_bytes, hash_file, hash_range
from surgery.headers import CheckpointError
from surgery.whole import new_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ENTRY = 256  # bytes of header that one tensor takes at most, beside its name


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as its header describes it."""

    file: str
    name: str
    dtype: torch.dtype
    shape: torch.Size
    begin: int  # absolute byte range in the file
    end: int

    @property
    def code(self) -> str:
        """The dtype as the header has it, ``BF16``."""
        return CODES[self.dtype]


class TensorFile:
    """A safetensors file, open: tensors by name, read when asked for. Raises CheckpointError where it is damaged."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        stored, self.metadata = read_header(self.path)
        self.tensors = {t.name: t for t in stored}
        self._map: mmap.mmap | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, over the file's own pages: writing to it changes a private copy of a page, never the file."""
        tensor = self.tensors[name]
        if tensor.begin == tensor.end:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, offset=tensor.begin, count=tensor.end - tensor.begin)
        if tensor.begin % tensor.dtype.itemsize:
            raw = raw.clone()  # a file that is not aligned
        return raw.view(tensor.dtype).view(tensor.shape)

    def hashes(self) -> dict[str, str]:
        """BLAKE3 of every tensor's bytes, read in file order."""
        with self.path.open("rb") as source:
            return {t.name: hash_range(source, t.begin, t.end) for t in self.tensors.values()}

    @property
    def header(self) -> bytes:
        """Everything before the tensors, as it lies in the file."""
        with self.path.open("rb") as source:
            length = source.read(8)
            return length + source.read(int.from_bytes(length, "little"))


def read_header(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its metadata; a CheckpointError where the file is damaged.

    The header's claims are checked against the file's length before anything is allocated.
    """
    entries, metadata = headers.read_header(path)
    return [stored(entry) for entry in entries], metadata


def stored(entry: headers.Entry) -> Stored:
    """An entry of a header in torch's terms."""
    return Stored(entry.file, entry.name, DTYPES[entry.code], torch.Size(entry.shape), entry.begin, entry.end)


def header_bytes(
    tensors: Iterable[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """What a safetensors file of these tensors, in this order, begins with; and the size the whole file will have."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        length = shape.numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, the same bytes for the same tensors (the library's own writer shuffles its metadata and writes mode 0600)."""
    with path.open("wb") as sink:
        sink.write(header_bytes(((name, t.dtype, t.shape) for name, t in tensors.items()), metadata)[0])
        for tensor in tensors.values():
            sink.write(raw_bytes(tensor))
        sink.flush()
        os.fsync(sink.fileno())


def save_whole(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`save_tensors` of a result: tensors of any device, in a file that is there whole or not at all, its folder made where it is missing."""
    with new_file(Path(path)) as partial:
        save_tensors(partial, {name: tensor.detach().cpu() for name, tensor in tensors.items()}, metadata)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they are stored."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def hash_file_tensors(path: Path) -> dict[str, str]:
    """BLAKE3 of every tensor of one safetensors file, and of what its header says, in whatever order.

    A file whose header is damaged has one hash for the whole.
    """
    try:
        stored, metadata = read_header(path)
    except CheckpointError:
        return {"(damaged header)": hash_file(path)}
    with path.open("rb") as source:
        said = [metadata, sorted([t.name, t.code, list(t.shape), t.begin - stored[0].begin] for t in stored)]
        return {
            "(header)": hash_bytes(json.dumps(said, sort_keys=True).encode()),
            **{t.name: hash_range(source, t.begin, t.end) for t in stored},
        }


class TensorSink:
    """Writes one safetensors file a tensor at a time: room is kept for its header, which comes at the end; then reads all back by hash.

    names:    all the names that may come; any of them may, once each.
    metadata: text by name, to be set before the end; `room` bytes are kept for it.
    hashes:   name -> BLAKE3 of the tensor's bytes, as they came.

    A context manager: the file is whole when the block has ended. Raises CheckpointError where the disk has something else.
    """

    def __init__(self, path: Path, names: Iterable[str], *, room: int = 4096):
        self.path = path
        self.metadata: dict[str, str] = {}
        self.hashes: dict[str, str] = {}
        self._room = 64 + room + sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._room += -self._room % 8
        self._header: dict[str, Any] = {}
        self._at = 0

    def __enter__(self) -> TensorSink:
        self._file = self.path.open("wb")
        self._file.write(self._room.to_bytes(8, "little") + b" " * self._room)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._header:
            raise ValueError(f"{name} is there already.")
        data = raw_bytes(tensor)
        entry = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._at, self._at + len(data)],
        }
        self._header[name] = entry
        self.hashes[name] = hash_bytes(data)
        self._file.write(data)
        self._at += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file as file:
            if kind is not None:
                return
            header = {"__metadata__": self.metadata, **self._header} if self.metadata else self._header
            text = json.dumps(header, separators=(",", ":")).encode()
            if len(text) > self._room:
                raise ValueError(f"The header of {self.path} takes {len(text)} bytes; {self._room} were kept for it.")
            file.seek(8)
            file.write(text)  # the spaces that follow it are allowed by the format
            file.flush()
            os.fsync(file.fileno())
        found = hash_file_tensors(self.path)
        wrong = [name for name, digest in self.hashes.items() if found.get(name) != digest]
        if wrong:
            raise CheckpointError(f"{wrong[0]} in {self.path} differs from what was written.")
