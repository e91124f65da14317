"""Rows on disk: a folder of safetensors shards that is written one whole shard at a time, can be gone on with, and knows what it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.hashing import hash_bytes
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.sites import Site
from surgery.whole import new_file

_MANIFEST = "capture.json"
SHARD_BYTES = 1 << 28


@dataclass(frozen=True)
class Folder:
    """A folder of shards. about: what the rows are of. shards: the half-open range of transcripts in each."""

    path: Path
    about: Mapping[str, Any]
    shards: tuple[tuple[int, int], ...]

    @classmethod
    def prepare(
        cls,
        path: Path,
        model: Model,
        *,
        texts: Sequence[object],
        tokens: Sequence[object],
        about: Mapping[str, Any],
        rows: Sequence[int],
        row_bytes: int,
    ) -> Folder:
        """A new folder, or the one that an interrupted call with the same arguments left.

        texts: the token ids of each transcript. tokens: which of them are read. rows: how many rows each gives. row_bytes: size of one
        row at all sites together. Raises ValueError when the folder holds something else.
        """
        about = {
            **about,
            "transcripts": _hash(texts),
            "tokens": _hash(tokens),
            "model": fingerprint(model),
            "dtype": str(model.module.dtype),
        }
        if (path / _MANIFEST).is_file():
            found = cls.open(path)
            other = [key for key in about if found.about.get(key) != about[key]]
            if other:
                raise ValueError(
                    f"{path} was collected from other {' and '.join(other)}{_differences(found.about, about, other)}. "
                    "Give another folder, or remove this one."
                )
            return found
        if path.exists() and (not path.is_dir() or any(".partial-" not in p.name for p in path.iterdir())):
            raise ValueError(f"{path} exists and was not made by collect. Give a new folder.")
        made = cls(path, about, _cut(rows, SHARD_BYTES // row_bytes))
        _replace(path / _MANIFEST, json.dumps({"about": about, "shards": made.shards}, indent=1).encode())
        return made

    @classmethod
    def open(cls, path: Path) -> Folder:
        """A folder that is there. Raises ValueError where it is none of ours, or does not say any more what it is of."""
        if not (path / _MANIFEST).is_file():
            raise ValueError(
                f"{path} has no {_MANIFEST}, so it holds no activations. collect(..., to=FOLDER) makes such a folder."
            )
        try:
            said = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            about, shards = said["about"], tuple((int(begin), int(end)) for begin, end in said["shards"])
            if not all(isinstance(about[name], list) for name in ("sites", "over")):
                raise TypeError("sites and over are lists")
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path / _MANIFEST} is damaged ({error}): remove the folder, and collect again."
            ) from error
        return cls(path, about, shards)

    def file(self, number: int) -> Path:
        return self.path / f"rows-{number:05}.safetensors"

    def has(self, number: int) -> bool:
        return self.file(number).is_file()

    def require_complete(self) -> None:
        missing = [n for n in range(len(self.shards)) if not self.has(n)]
        if missing:
            raise ValueError(
                f"{self.path} is not complete: {len(missing)} of {len(self.shards)} shards are missing. The same collect(..., to=...) goes on where it stopped."
            )

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard: it is there whole, or not at all."""
        from safetensors.torch import save

        _replace(self.file(number), save(dict(tensors)))

    def read(self, name: str) -> Tensor:
        """One column of all shards, in order."""
        return torch.cat([self.read_shard(number, name) for number in range(len(self.shards))])

    def read_shard(self, number: int, name: str) -> Tensor:
        """One column of one shard."""
        with self._opened(number) as file:
            return file.get_tensor(name)

    def read_whole(self, number: int) -> dict[str, Tensor]:
        """All columns of one shard."""
        with self._opened(number) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    @contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file(number), framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(
                f"{self.file(number)} is damaged: {error}. Remove it, and the same collect(..., to=...) makes it anew."
            ) from error


class Stored(Mapping[Site, Tensor]):
    """site -> its rows, read from a folder when asked for and not kept."""

    def __init__(self, folder: Folder):
        self._folder, self._sites = folder, [Site.parse(text) for text in folder.about["sites"]]

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._sites:
            raise KeyError(site)
        return self._folder.read(str(site))

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, site: object) -> bool:  # without reading it
        return site in self._sites


def _cut(rows: Sequence[int], most: int) -> tuple[tuple[int, int], ...]:
    """Ranges of transcripts with at most so many rows each, or of one transcript that has more; ranges without rows are left out."""
    bounds, held = [0], 0
    for i, count in enumerate(rows):
        if held and held + count > most:
            bounds.append(i)
            held = 0
        held += count
    bounds.append(len(rows))
    return tuple((a, b) for a, b in pairwise(bounds) if sum(rows[a:b]))


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any], keys: Sequence[str]) -> str:
    """In words, what is no hash: after a colon, or nothing."""
    plain = [k for k in keys if k in ("sites", "over", "pool", "dtype")]
    said = "; ".join(f"{k} {there.get(k)!r} there, {asked[k]!r} asked for" for k in plain)
    return f": {said}" if said else ""


def _hash(words: object) -> str:
    return hash_bytes(json.dumps(words).encode())


def _replace(path: Path, data: bytes) -> None:
    with new_file(path) as partial:
        partial.write_bytes(data)
