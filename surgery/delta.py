"""A vector as a file: sparse where the change is sparse, dense where it is not, with the hash of the base it was measured from.

A delta folder holds ``delta.safetensors`` (per site either ``SITE.value`` or ``SITE.index`` and ``SITE.value``, fp32) and its record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.checkpoint import CheckpointError, new_folder, read_header
from surgery.sites import Site
from surgery.weights import Delta

FILE = "delta.safetensors"
_FORMAT = "model-surgery delta 1"


class StoredDelta(Delta):
    """A Delta read lazily from a folder that `save_delta` wrote.

    base_hash: the hash of the checkpoint it was measured from. Raises CheckpointError for a folder that holds no delta.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            found = (
                ", ".join(sorted(p.name for p in self.folder.iterdir())[:6])
                if self.folder.is_dir()
                else "no such folder"
            )
            raise CheckpointError(
                f"{folder} holds no {FILE} ({found}). `surgery diff TUNED BASE --to {folder}` writes one."
            )
        stored, metadata = read_header(path)
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} is a safetensors file but not a delta: its format is {metadata.get('format')!r}, expected {_FORMAT!r}."
            )
        self.base_hash = metadata["base_hash"]
        self._shapes = {Site.parse(s): torch.Size(shape) for s, shape in json.loads(metadata["shapes"]).items()}
        self._names = {t.name for t in stored}
        self._file = safe_open(path, framework="pt")

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def _read(self, site: Site, rows: slice) -> Tensor:
        value = self._file.get_tensor(f"{site}.value")
        shape = self._shapes[site]
        if f"{site}.index" not in self._names:
            return value[rows]
        return scatter(self._file.get_tensor(f"{site}.index"), value, shape, rows)

    @property
    def nonzero(self) -> int:
        """How many entries the file stores."""
        return sum(self._file.get_slice(n).get_shape()[0] if n.removesuffix("value") + "index" in self._names
                   else self._shapes[Site.parse(n.removesuffix(".value"))].numel() for n in self._names if n.endswith(".value"))  # fmt: skip


def save_delta(delta: Delta, to: str | os.PathLike[str], *, base_hash: str) -> Path:
    """Write a vector to a new folder, whole or not at all; sites it does not move are left out.

    Each site is stored sparse (flat int32 index and fp32 value) when that is smaller, dense otherwise. Raises ValueError for a
    vector that is zero everywhere or not finite.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for site in delta:
        value = delta[site].float().contiguous()
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"The change at {site} is NaN or infinite; nothing was written.")
        moved = value.reshape(-1).nonzero()[:, 0]
        if not len(moved):
            continue
        shapes[str(site)] = list(value.shape)
        if 2 * len(moved) < value.numel() and value.numel() < 2**31:
            tensors[f"{site}.index"] = moved.to(torch.int32)
            tensors[f"{site}.value"] = value.reshape(-1)[moved]
        else:
            tensors[f"{site}.value"] = value
    if not tensors:
        raise ValueError("The two models are identical: there is no change to save.")
    metadata = {"format": _FORMAT, "base_hash": base_hash, "shapes": json.dumps(shapes)}
    with new_folder(Path(to)) as partial:
        save_file(tensors, partial / FILE, metadata=metadata)
        mask = os.umask(0)
        os.umask(mask)
        (partial / FILE).chmod(0o666 & ~mask)  # safetensors writes 0600
        reloaded = StoredDelta(partial)
        for name, tensor in tensors.items():
            if not torch.equal(reloaded._file.get_tensor(name), tensor):
                raise CheckpointError(f"{name} on disk differs from what was written.")
    return Path(to)


def scatter(index: Int[Tensor, " k"], value: Float[Tensor, " k"], shape: torch.Size, rows: slice) -> Tensor:
    """Rows of the dense tensor that a sorted flat `index` and its values stand for."""
    first, last, _ = rows.indices(shape[0])
    width = shape[1:].numel()
    begin, end = torch.searchsorted(index, torch.tensor([first * width, last * width], dtype=index.dtype)).tolist()
    dense = torch.zeros((last - first) * width)
    dense[index[begin:end].long() - first * width] = value[begin:end]
    return dense.view(last - first, *shape[1:])
