"""A vector as a file: dense, sparse or low-rank, whichever is asked for or smallest, with the hash of the base it was measured from.

A delta folder holds ``delta.safetensors``, and the record of the command where one wrote it. Per site the file has ``SITE.value`` (dense), ``SITE.index`` and
``SITE.value`` (sparse: flat, ascending positions), or ``SITE.left`` and ``SITE.right`` (low-rank: their product); numbers are fp32. Its
metadata has the hash of the base, the shapes, and the relative error of each low-rank site.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery.adapter_names import CONFIG
from surgery.checkpoint import Checkpoint
from surgery.headers import DELTA, DELTA_FORMAT
from surgery.lowrank import Adapter, Factored, factor_pair
from surgery.sites import Site
from surgery.tensorfile import CheckpointError, Stored, TensorFile, TensorSink
from surgery.weights import Delta, Origin, Weights, some_rows
from surgery.whole import new_folder

Form = Literal["auto", "dense", "sparse", "low-rank"]
_READABLE = {
    "model-surgery delta 1",
    "model-surgery delta 2",
    DELTA_FORMAT,
}  # the earlier ones knew their base by another hash
IDENTICAL = "The two models are identical: there is no change to save."
_PARTS = ({"value"}, {"index", "value"}, {"left", "right"})
_MOST, _WIDEST = 1 << 33, 1 << 26  # entries of one tensor and of one row of it: a few positions could claim any size


class StoredDelta(Factored):
    """A Delta read lazily from a folder that `save_delta` wrote.

    base_hash: the hash of the checkpoint it was measured from; empty where that is not known.
    errors:    relative Frobenius error in [0, 1] of each site stored as factors, 0 where they are exact.
    Raises CheckpointError for a folder that holds no delta, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / DELTA
        if not path.is_file():
            if (self.folder / "config.json").is_file():
                raise CheckpointError(
                    f"{folder} holds no {DELTA}: it is a model. Take the difference first: surgery diff {folder} BASE --to VECTOR"
                )
            there = ", ".join(sorted(p.name for p in self.folder.iterdir())[:6]) if self.folder.is_dir() else None
            found = "no such folder" if there is None else there or "nothing in it"
            raise CheckpointError(
                f"{folder} holds no {DELTA} ({found}). `surgery diff TUNED BASE --to VECTOR` writes one."
            )
        self._file = TensorFile(path)
        metadata = self._file.metadata
        if metadata.get("format") not in _READABLE:
            raise CheckpointError(
                f"{path} is a safetensors file but not a delta: its format is {metadata.get('format')!r}, expected {DELTA_FORMAT!r}."
            )
        try:
            self.base_hash = str(metadata["base_hash"]) if metadata["format"] == DELTA_FORMAT else ""
            self._shapes = {Site.parse(s): _size(shape) for s, shape in json.loads(metadata["shapes"]).items()}
            self.errors = {Site.parse(s): float(e) for s, e in json.loads(metadata.get("errors", "{}")).items()}
            self._origins = frozenset(Origin(**said) for said in json.loads(metadata.get("origins", "[]")))
            self._parts = _parts(self._file.tensors.values(), self._shapes)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is a damaged delta: {error}") from error
        self._checked: set[Site] = set()

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def origins(self) -> frozenset[Origin]:
        return self._origins

    def form(self, site: Site | str) -> Literal["dense", "sparse", "low-rank"]:
        """How the file holds a site."""
        parts = self._parts[self._existing(site)]
        return "low-rank" if "left" in parts else "sparse" if "index" in parts else "dense"

    def factored(self) -> list[Site]:
        return [site for site in self._shapes if "left" in self._parts[site]]

    def factors(self, site: Site | str) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        site = self._existing(site)
        if "left" not in self._parts[site]:
            raise ValueError(f"{self.folder} holds {site} {self.form(site)}, not as factors.")
        return self._part(site, "left"), self._part(site, "right")

    def stored(self, site: Site | str) -> int:
        """How many numbers the file has for a site, positions not counted."""
        parts = self._parts[self._existing(site)]
        return sum(tensor.shape.numel() for what, tensor in parts.items() if what != "index")

    @property
    def nonzero(self) -> int:
        """How many numbers the file stores, positions not counted."""
        return sum(self.stored(site) for site in self._shapes)

    def _read(self, site: Site, rows: slice) -> Tensor:
        match self.form(site):
            case "low-rank":
                return super()._read(site, rows)
            case "sparse":
                return scatter(self._index(site), self._part(site, "value"), self._shapes[site], rows)
            case "dense":
                value = some_rows(self._part(site, "value"), rows)
                return value.clone() if rows == slice(None) else value  # whole, it is the caller's own

    def _part(self, site: Site, what: str) -> Tensor:
        return self._file[self._parts[site][what].name]

    def _index(self, site: Site) -> Tensor:
        index = self._part(site, "index")
        if site not in self._checked and len(index):
            ascending = bool((index[1:] > index[:-1]).all())
            if not ascending or int(index[0]) < 0 or int(index[-1]) >= self._shapes[site].numel():
                raise CheckpointError(
                    f"{self.folder / DELTA} is a damaged delta: the positions at {site} are out of order or range."
                )
        self._checked.add(site)
        return index


def save_delta(
    delta: Delta,
    to: str | os.PathLike[str],
    *,
    base_hash: str | None = None,
    form: Form = "auto",
    rank: int | None = None,
    seal: Callable[[Path], object] | None = None,
) -> Path:
    """Write a vector to a new folder, whole or not at all, one tensor at a time; sites it does not move are left out.

    base_hash: `Checkpoint.hash` of the model it is a change of; by default that of the checkpoint it was taken from.
    form: ``auto`` takes for each site whatever exact form is smallest: dense, sparse, or the factors of a vector that has them.
          ``dense`` and ``sparse`` are what they say; ``low-rank`` keeps the best `rank` of every matrix, with its error in the
          file (`StoredDelta.errors`), and what is no matrix, or is no smaller as factors, as ``auto`` does.
    rank: 1 or more, for ``low-rank`` alone.
    seal: called with the finished folder before it appears under its name: the place to add a record.
    Every byte is read back by hash. Raises ValueError for a vector that is zero everywhere or not finite, or that no one checkpoint is known
    of, FileExistsError if `to` exists.
    """
    base_hash = _base_hash(delta) if base_hash is None else base_hash
    if (form == "low-rank") != (rank is not None) or (rank is not None and rank < 1):
        raise ValueError(
            f"form {form!r} with rank {rank}: low-rank needs a rank of 1 or more, and nothing else takes one."
        )
    names = [f"{site}.{part}" for site in delta for part in ("index", "value", "left", "right")]
    origins = json.dumps(sorted(map(asdict, delta.origins()), key=repr))
    said = 4096 + len(base_hash) + 2 * len(origins) + sum(2 * len(str(site)) + 200 for site in delta)
    shapes: dict[str, list[int]] = {}
    errors: dict[str, float] = {}
    with new_folder(Path(to)) as partial:
        with TensorSink(partial / DELTA, names, room=said) as sink:
            for site in delta:
                value = delta[site].float().contiguous()
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"The change at {site} is NaN or infinite; nothing was written.")
                if not bool(value.any()):
                    continue
                shapes[str(site)] = list(value.shape)
                parts, error = _stored_as(delta, site, value, form, rank)
                if error is not None:
                    errors[str(site)] = error
                for what, tensor in parts.items():
                    sink.add(f"{site}.{what}", tensor)
            if not shapes:
                raise ValueError(IDENTICAL)
            sink.metadata = {
                "format": DELTA_FORMAT, "base_hash": base_hash, "shapes": json.dumps(shapes), "errors": json.dumps(errors),
                "origins": origins,
            }  # fmt: skip
        if seal is not None:
            seal(partial)
    return Path(to)


def _base_hash(delta: Delta) -> str:
    if isinstance(delta, StoredDelta):
        return delta.base_hash
    base = delta.taken_from()
    if not isinstance(base, Checkpoint):
        raise ValueError(
            "This change does not know one checkpoint that it was taken from: take it from the files, tuned - Checkpoint(folder), or say "
            "which it is a change of, base_hash=Checkpoint(folder).hash()."
        )
    return base.hash()


def read_vector(folder: str | os.PathLike[str], base: Weights) -> Delta:
    """The vector in a folder: a delta that `save_delta` wrote, or a PEFT LoRA adapter of `base`."""
    return Adapter(folder, base) if (Path(folder) / CONFIG).is_file() else StoredDelta(folder)


def scatter(index: Int[Tensor, " k"], value: Float[Tensor, " k"], shape: torch.Size, rows: slice) -> Tensor:
    """Rows of the dense tensor that a sorted flat `index` and its values stand for."""
    first, last, _ = rows.indices(shape[0] if shape else 1)
    width = shape[1:].numel()
    begin, end = torch.searchsorted(index, torch.tensor([first * width, last * width], dtype=index.dtype)).tolist()
    dense = torch.zeros((last - first) * width)
    dense[index[begin:end].long() - first * width] = value[begin:end]
    return dense.view(last - first, *shape[1:]) if shape else dense.view(shape)


def _stored_as(
    delta: Delta, site: Site, value: Tensor, form: Form, rank: int | None
) -> tuple[dict[str, Tensor], float | None]:
    """The tensors a site is stored as and, where they are factors, the relative error of their product."""
    matrix = value.ndim == 2
    if form == "low-rank" and matrix and rank is not None and rank * sum(value.shape) < value.numel():
        left, right, error = factor_pair(value, rank)
        return {"left": left, "right": right}, error
    if form == "dense":
        return {"value": value}, None
    flat = value.reshape(-1)
    moved = flat.nonzero()[:, 0]
    size = {"dense": value.numel(), "sparse": 2 * len(moved)}
    if form == "sparse":
        size = {"sparse": 0}
    elif isinstance(delta, Factored) and site in delta.factored():
        size["factors"] = delta.rank(site) * sum(value.shape)
    match min(size, key=lambda name: size[name]):
        case "dense":
            return {"value": value}, None
        case "factors":
            left, right = delta.factors(site)  # type: ignore[union-attr]
            return {"left": left, "right": right}, 0.0
    wide = torch.int64 if value.numel() >= 2**31 else torch.int32
    return {"index": moved.to(wide), "value": flat[moved]}, None


def _size(shape: Any) -> torch.Size:
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{shape!r} is not the shape of a tensor")
    if math.prod(shape) > _MOST or math.prod(shape[1:]) > _WIDEST:
        raise ValueError(f"{shape!r} is larger than any tensor of a model")
    return torch.Size(shape)


def _parts(stored: Iterable[Stored], shapes: Mapping[Site, torch.Size]) -> dict[Site, dict[str, Stored]]:
    """Site -> what -> tensor, each checked against the site's shape. Raises ValueError at the first that does not fit."""
    parts: dict[Site, dict[str, Stored]] = {site: {} for site in shapes}
    for tensor in stored:
        name, _, what = tensor.name.rpartition(".")
        parts[Site.parse(name)][what] = tensor
    for site, found in parts.items():
        if found.keys() not in _PARTS:
            raise ValueError(f"{site} has {', '.join(sorted(found)) or 'no tensor'}")
        for tensor in found.values():
            if not _fits(tensor, found, shapes[site]):
                raise ValueError(f"{tensor.name} is {tensor.dtype} of {tuple(tensor.shape)}, for {tuple(shapes[site])}")
    return parts


def _fits(tensor: Stored, found: Mapping[str, Stored], shape: torch.Size) -> bool:
    """Whether one of a site's tensors has the dtype and shape that its others and the site's own shape ask for."""
    what = tensor.name.rpartition(".")[2]
    if what == "index":
        return tensor.dtype in (torch.int32, torch.int64) and tensor.shape == found["value"].shape
    if tensor.dtype != torch.float32:
        return False
    if what == "value":
        sparse = "index" in found
        return len(tensor.shape) == 1 and tensor.shape[0] <= shape.numel() if sparse else tensor.shape == shape
    if len(shape) != 2 or len(tensor.shape) != 2:
        return False
    return tensor.shape[0] == shape[0] if what == "left" else tensor.shape == (found["left"].shape[-1], shape[1])
