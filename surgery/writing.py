"""Writing a point as a model folder: streamed, hashed while it goes, proved by reloading, there whole or not at all.

`write` walks any point one tensor at a time into a temporary folder beside the destination, loads what it wrote as anybody would
(`surgery.proof`), keeps a way back (`surgery.reverse`), and only then renames.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint import INDEX, RECORD, Checkpoint, point_hash, read_headers
from surgery.proof import Loops, prove
from surgery.reverse import PATCH, UNDO_LIMIT, Reverse
from surgery.rounding import Kept as Kept
from surgery.rounding import generator, stochastic
from surgery.sites import Site
from surgery.tensorfile import Stored, header_bytes, raw_bytes, read_header
from surgery.weights import Weights, some_rows
from surgery.whole import new_folder

Rounding = Literal["nearest", "stochastic"]
_CHUNK = 1 << 18  # entries computed at a time: fits the cache, and bounds memory for a huge embedding
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
}  # a copy would be stale


@dataclass(frozen=True)
class Written:
    """What `write` did. hashes: SHA-256 per tensor. kept: asked and kept per changed site. checks: what was verified, in words."""

    folder: Path
    hash: str
    base_hash: str
    hashes: dict[str, str]
    kept: dict[Site, Kept]
    checks: list[str] = field(default_factory=list)

    def total(self) -> Kept:
        """Asked and kept over all changed sites together."""
        rows = list(self.kept.values())
        asked, kept = (sum(getattr(r, k) ** 2 for r in rows) for k in ("asked", "kept"))
        inner = sum(r.cosine * r.asked * r.kept for r in rows if r.asked and r.kept)
        return Kept.of(asked, kept, inner, sum(r.unmoved * r.entries for r in rows), sum(r.entries for r in rows))

    def __str__(self) -> str:
        if not self.kept:
            same = self.hash == self.base_hash
            return f"{self.folder}: {'an exact copy, nothing changed' if same else 'no site changed, stored in another dtype'}"
        t = self.total()
        return (
            f"{self.folder}: {len(self.kept)} sites changed; asked {t.asked:.4g}, kept {t.kept:.4g} (cosine {t.cosine:.4f}, "
            f"{t.unmoved:.1%} of {t.entries:,} entries too small to move)"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "hash": self.hash,
            "base_hash": self.base_hash,
            "asked_and_kept": asdict(self.total()),
            "checks": self.checks,
        }


def write(
    weights: Weights,
    to: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    undo_limit: int = UNDO_LIMIT,
    loops: Loops = "ignore",
    seal: Callable[[Path, Written], object] | None = None,
    progress: bool = False,
) -> Written:
    """Write a point to a new model folder: streamed, hashed, proved, and there whole or not at all.

    Files, shards, tokenizer and configuration are those of the checkpoint the weights derive from. Arithmetic is fp32; each tensor is
    stored in the dtype it was found in, or in `dtype`. Tensors that nothing changed keep their bytes. The copy is then loaded and
    checked by `surgery.proof.prove`.

    rounding: "nearest", or "stochastic": small changes survive on average; the same `seed` gives the same bytes.
    undo_limit: bytes a way back may take (`surgery.reverse`); 0 keeps none.
    loops: what to do when a short generation falls into a loop that the source's does not: "refuse" it, "report" it, or "ignore" the
        matter and generate nothing.
    seal: called with the finished folder and what is known about it, before it appears under its name: the place to add a record.

    Raises FileExistsError if `to` exists, ValueError for non-finite values (naming the site), VerificationError if the proof fails.
    """
    layout = weights.layout
    if layout is None:
        raise ValueError(
            "These weights come from a live module with no checkpoint behind it; there are no files to imitate. Use module.save_pretrained."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"Weights cannot be stored as {dtype}.")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}: choose nearest or stochastic.")
    to = Path(to)
    job = _Job(weights, layout, dtype, seed if rounding == "stochastic" else None, Reverse(layout, undo_limit))
    flushing: list[Future[None]] = []
    from tqdm.auto import tqdm

    with (
        new_folder(to) as partial,
        tqdm(total=layout.nbytes, unit="B", unit_scale=True, desc=f"writing {to.name}", disable=not progress) as bar,
        ThreadPoolExecutor(1) as aside,
    ):
        with _one_core_free():
            for file in layout.files:
                job.write_file(partial / file, bar)
                flushing.append(aside.submit(_flush, partial / file))
        _copy_side_files(layout.folder, partial, dtype)
        checks = prove(partial, job.hashes, layout, dtype, loops)
        # what nothing changes has the hash of its copy
        base_hash = point_hash(layout.tensors, job.hashes | job.base_hashes)
        point = point_hash(read_headers(partial)[0], job.hashes)
        checks.append(job.reverse.save(partial, base_hash, point))
        written = Written(to, point, base_hash, job.hashes, job.kept, checks)
        if seal is not None:
            seal(partial, written)
        for flushed in flushing:
            flushed.result()
    return written


@contextmanager
def _one_core_free() -> Iterator[None]:
    """Arithmetic on all cores but one, which hashes and writes: two kinds of threads on one core would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _flush(path: Path) -> None:
    """The file's bytes are on the disk when this returns."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


@dataclass
class _Job:
    """One write: what goes in, and what is learnt on the way."""

    weights: Weights
    layout: Checkpoint
    dtype: torch.dtype | None
    seed: int | None  # of stochastic rounding
    reverse: Reverse
    hashes: dict[str, str] = field(default_factory=dict)
    base_hashes: dict[str, str] = field(default_factory=dict)  # of the tensors that are altered
    kept: dict[Site, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._changed, self._homes = self.weights.changed_from(self.layout), self.layout.anatomy.stored_in()
        self.altered = {n for n, t in self.layout.tensors.items() if self._touched(n) or self._out(t) != t.dtype}

    def write_file(self, path: Path, bar: Any) -> None:
        """One safetensors file of the layout, its tensors in their order, a chunk at a time."""
        stored = sorted((t for t in self.layout.tensors.values() if t.file == path.name), key=lambda t: t.begin)
        planned = ((t.name, self._out(t), t.shape) for t in stored)
        text, size = header_bytes(planned, self.layout.metadata[path.name])
        with path.open("wb", buffering=0) as sink:
            if hasattr(os, "posix_fallocate"):  # a disk too small is known before the work, and writing is faster
                os.posix_fallocate(sink.fileno(), 0, size)
            sink.write(text)
            with _Worker(self.hashes, self.base_hashes, sink) as worker:
                for tensor in stored:
                    at, before = 0, self.layout.stored(tensor.name).reshape(-1)
                    for piece in self._pieces(tensor, self._touched(tensor.name)):
                        if tensor.name in self.altered:
                            worker.put(tensor.name, raw_bytes(piece), raw_bytes(before[at : at + piece.numel()]))
                            self.reverse.add(tensor.name, at, piece)
                        else:
                            worker.put(tensor.name, raw_bytes(piece))
                        at += piece.numel()
                    bar.update(tensor.end - tensor.begin)

    def _touched(self, name: str) -> list[Site]:
        return [site for site in self._homes[name] if site in self._changed]

    def _out(self, tensor: Stored) -> torch.dtype:
        return tensor.dtype if self.dtype is None or not tensor.dtype.is_floating_point else self.dtype

    def _pieces(self, tensor: Stored, changed: list[Site]) -> Iterator[Tensor]:
        """Pieces of one stored tensor as it will be stored, in order."""
        before, out, places = self.layout.stored(tensor.name), self._out(tensor), self.layout.anatomy.places
        rows = max(1, _CHUNK // max(1, tensor.shape[1:].numel()))
        starts = range(0, max(1, tensor.shape[0]), rows) if tensor.shape else ()
        pieces = [slice(i, i + rows) for i in starts] or [slice(None)]
        draws = None if self.seed is None else generator(self.seed, tensor.name)

        def rounded(x: Tensor) -> Tensor:
            return x.to(out) if draws is None or not out.is_floating_point else stochastic(x, out, draws)

        if not changed:
            for piece in pieces:
                was = some_rows(before, piece)
                if out.is_floating_point and not bool(torch.isfinite(was.sum(dtype=torch.float32))):
                    _require_finite(was, self._homes[tensor.name])
                yield was if was.dtype == out else rounded(was)
            return
        if len(changed) == 1 and places[changed[0]].is_whole:
            tally = _Tally(changed[0])
            for piece, wish in zip(pieces, self.weights.strips(changed[0], pieces), strict=True):
                here = wish.cpu()  # of a model on an accelerator
                after = rounded(here)
                tally.add(some_rows(before, piece), here, after)
                yield after
            self.kept[changed[0]] = tally.kept()
            return
        after = before if before.dtype == out else rounded(before)
        for site in changed:  # pieces of one fused tensor, or a transposed one: put together whole
            wish = self.weights[site].cpu()
            kept = rounded(wish)
            tally = _Tally(site)
            tally.add(places[site].take(before), wish, kept)
            self.kept[site] = tally.kept()
            after = places[site].put(after, kept)
        yield after


class _Tally:
    """Sums behind `Kept`, over the chunks of a tensor. Raises ValueError at the first value that is not finite."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._asked = self._kept = self._inner = 0.0
        self._moving = self._stuck = 0

    def add(self, before: Tensor, wish: Tensor, after: Tensor) -> None:
        was = before.float()
        asked = (wish.float() - was).reshape(-1)
        got = asked if after.dtype == torch.float32 else after.to(torch.float32, copy=True).sub_(was).reshape(-1)
        kept = float(got.dot(got))
        if not math.isfinite(kept):  # what is not finite is not after squaring either
            _require_finite(before, [self._site])
            _require_finite(after, [self._site])
        self._asked += float(asked.dot(asked))
        self._kept += kept
        self._inner += float(asked.dot(got))
        # numpy compares and counts several times as fast as torch
        moving = asked.numpy() != 0
        self._moving += int(np.count_nonzero(moving))
        self._stuck += int(np.count_nonzero(moving & (got.numpy() == 0)))

    def kept(self) -> Kept:
        return Kept.of(self._asked, self._kept, self._inner, self._stuck, self._moving)


def _require_finite(tensor: Tensor, sites: list[Site]) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{sites[0]} has {bad} values that are NaN or infinite; nothing was written.")


class _Worker:
    """SHA-256 of tensors that arrive in pieces, one tensor after another, on a thread of its own, which also writes them to `sink`; and
    of what they were before, while the processor's cache still has it.

    A few pieces wait at most. What goes wrong on the thread (a full disk) is raised by the next `put`, or on leaving.
    """

    def __init__(self, into: dict[str, str], before: dict[str, str], sink: io.FileIO) -> None:
        self._into, self._before, self._sink = into, before, sink
        self._queue: queue.Queue[tuple[str, memoryview, memoryview | None] | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Worker:
        self._thread.start()
        return self

    def put(self, name: str, data: memoryview, before: memoryview | None = None) -> None:
        if self._error:
            raise self._error
        self._queue.put((name, data, before))

    def __exit__(self, kind: object, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def _work(self) -> None:
        digests: dict[str, Any] = {}
        befores: dict[str, Any] = {}
        while (item := self._queue.get()) is not None:
            if self._error:
                continue  # drained, so that nobody waits
            name, data, before = item
            try:
                if before is not None:
                    befores.setdefault(name, hashlib.sha256()).update(before)
                digests.setdefault(name, hashlib.sha256()).update(data)
                while len(data):
                    data = data[self._sink.write(data) :]
            except (OSError, ValueError) as error:  # ValueError: an interrupt closed the file meanwhile
                self._error = error
        for into, found in ((self._into, digests), (self._before, befores)):
            into.update({name: digest.hexdigest() for name, digest in found.items()})


def _copy_side_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Tokenizer, template, processor and generation files; the config with its dtype made true."""
    skip = {RECORD, INDEX, PATCH, "pytorch_model.bin.index.json", "provenance.json"}  # true of the original only
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _WEIGHTS and path.name not in skip:
            _copy(path, target / path.name)
    if dtype is not None:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        headers = [read_header(path)[0] for path in target.glob("*.safetensors")]
        index["metadata"] = {
            **index.get("metadata", {}),
            "total_size": sum(t.end - t.begin for h in headers for t in h),
        }
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as sink:  # not copy2: the umask decides the mode
        shutil.copyfileobj(read, sink)
