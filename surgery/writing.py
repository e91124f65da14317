"""Writing a point as a model folder: streamed, hashed while it goes, proved by reloading, there whole or not at all.

`write` walks any point, a few tensors side by side, into a temporary folder beside the destination, loads what it wrote as anybody would
(`surgery.proof`), keeps a way back (`surgery.reverse`), and only then renames.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from surgery.checkpoint import INDEX, Checkpoint, point_hash, read_headers
from surgery.hashing import Digest
from surgery.proof import Loops, prove
from surgery.reverse import Reverse
from surgery.rounding import Kept as Kept
from surgery.rounding import generator, stochastic
from surgery.side_files import UNDO_LIMIT, copy_file, side_files
from surgery.sites import Site
from surgery.tensorfile import Stored, header_bytes, raw_bytes, read_header
from surgery.weights import Weights, minus, require_point, require_summable, some_rows
from surgery.whole import flush, new_folder

Rounding = Literal["nearest", "stochastic"]
_CHUNK = 1 << 19  # entries at a time: few enough for the cache, so many that threads seldom wait for each other
_EXACT = 1 << 24  # ones that fp32 can add up
_THREADS = 8  # more would wait for the interpreter and for memory


@dataclass(frozen=True)
class Written:
    """What `write` did. hashes: BLAKE3 per tensor. kept: asked and kept per computed site, `moved` of which changed.

    checks: what was verified, in words.
    """

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

    @property
    def moved(self) -> int:
        """At how many sites an entry was asked to move: of those computed, a merge or a strength of 0 may leave some as they were."""
        return sum(row.asked > 0 for row in self.kept.values())

    def unlisted(self) -> str:
        """What became of the model, in words, where no entry was asked to move."""
        same = self.hash == self.base_hash
        return "an exact copy, nothing changed" if same else "no site changed, stored in another dtype"

    def __str__(self) -> str:
        if not self.moved:
            return f"{self.folder}: {self.unlisted()}"
        t = self.total()
        return (
            f"{self.folder}: {self.moved} site{'' if self.moved == 1 else 's'} changed; asked {t.asked:.4g}, kept {t.kept:.4g} (cosine {t.cosine:.4f}, "
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

    Raises FileExistsError if `to` exists, ValueError for non-finite values and for a quantised model's codes in another `dtype` (naming the
    site), CheckpointError where the files have a head of its own that config.json ties, VerificationError if the proof fails;
    TypeError for a change, which is not a model.
    """
    require_point(weights)
    layout = weights.layout
    if layout is None:
        raise ValueError(
            "These weights come from a live module with no checkpoint behind it; there are no files to imitate. Use module.save_pretrained."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"Weights cannot be stored as {dtype!r}: give a torch.dtype of floating point, such as torch.bfloat16."
        )
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}: choose nearest or stochastic.")
    if loops not in get_args(Loops):
        raise ValueError(f"loops={loops!r}: choose refuse, report or ignore.")
    if not undo_limit >= 0:
        raise ValueError(f"undo_limit={undo_limit!r}: bytes, 0 or more.")
    if dtype is not None:
        for site in layout:
            require_summable(layout, site)
    layout.require_tied()
    to = Path(to)
    job = _Job(weights, layout, dtype, seed if rounding == "stochastic" else None, Reverse(layout, undo_limit))
    flushing: list[Future[None]] = []
    from tqdm.auto import tqdm

    with (
        new_folder(to) as partial,
        tqdm(total=layout.nbytes, unit="B", unit_scale=True, desc=f"writing {to.name}", disable=not progress) as bar,
        ThreadPoolExecutor(1) as aside,
    ):
        for file in layout.files:
            job.write_file(partial / file, bar)
            flushing.append(aside.submit(flush, partial / file))
        _copy_side_files(layout.folder, partial, dtype)
        flushing += [aside.submit(flush, path) for path in partial.rglob("*") if path.name not in layout.files]
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


def _one_core() -> None:
    """For the thread that calls: torch asks how many there are at its first work, and keeps to the answer."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def _done(work: Callable[..., _Learnt], *given: Any) -> Future[_Learnt]:
    """What is done here and now, or its fault, as if it came from another thread."""
    done: Future[_Learnt] = Future()
    try:
        done.set_result(work(*given))
    except Exception as error:  # told in its turn
        done.set_exception(error)
    return done


@dataclass(frozen=True)
class _Learnt:
    """Of one stored tensor: its hash, that of what it was where it is altered, and what was kept at each changed site."""

    hash: str
    base_hash: str | None
    kept: dict[Site, Kept]


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
        self._given_up, self._room = threading.Event(), _Room()
        self._changed, self._homes = self.weights.changed_from(self.layout), self.layout.anatomy.stored_in()
        self.altered = {n for n, t in self.layout.tensors.items() if self._touched(n) or self._out(t) != t.dtype}
        restored = next((t for t in self.layout.tensors.values() if self._out(t) != t.dtype), None)
        if restored is not None:
            self.reverse.refuse(f"it was stored as {self._out(restored)} where the original has {restored.dtype}")

    def write_file(self, path: Path, bar: Any) -> None:
        """One safetensors file of the layout, its tensors side by side.

        What is read by rows goes to threads of one core each. What is there whole comes one at a time and in the file's order, on the
        thread that called and with all its cores: an edit is code of its caller's.
        """
        stored = sorted((t for t in self.layout.tensors.values() if t.file == path.name), key=lambda t: t.begin)
        planned = ((t.name, self._out(t), t.shape) for t in stored)
        text, size = header_bytes(planned, self.layout.metadata[path.name])
        begin, work = len(text), []  # of each tensor what comes of it, and the bytes that the bar has not counted yet
        with path.open("wb", buffering=0) as file, self._threads() as pool:
            if hasattr(os, "posix_fallocate"):  # a disk too small is known before the work, and writing is faster
                os.posix_fallocate(file.fileno(), 0, size)
            sink = _Sink(file)
            sink.put(text, 0)
            for tensor in stored:
                if self._by_rows(self._touched(tensor.name)):
                    work.append((pool.submit(self._write_aside, sink, tensor, begin), tensor.end - tensor.begin))
                else:
                    work.append((_done(self._write_tensor, sink, tensor, begin), 0))
                    if work[-1][0].exception():
                        break
                    bar.update(tensor.end - tensor.begin)
                begin += tensor.shape.numel() * self._out(tensor).itemsize
            for tensor, (done, size) in zip(stored, work, strict=False):  # in the file's order, of faults as well
                self._learn(tensor, done.result())
                bar.update(size)

    @contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        """Threads with one core each. Left early, what they are at is given up."""
        cores = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(min(cores, _THREADS), initializer=_one_core) as pool:
                try:
                    yield pool
                except BaseException:
                    self._given_up.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(cores)  # what threads begin with

    def _write_aside(self, sink: _Sink, tensor: Stored, begin: int) -> _Learnt:
        with torch.no_grad():
            return self._write_tensor(sink, tensor, begin)

    def _write_tensor(self, sink: _Sink, tensor: Stored, begin: int) -> _Learnt:
        """One stored tensor, a chunk at a time, hashed as it was and as it is while the processor's cache has it."""
        changed = self._touched(tensor.name)
        before, altered = self.layout.stored(tensor.name).reshape(-1), tensor.name in self.altered
        was, now, at = Digest(), Digest(), 0
        kept: dict[Site, Kept] = {}
        for piece in self._pieces(tensor, changed, kept):
            if self._given_up.is_set():
                break
            data = raw_bytes(piece)
            now.update(data)
            if altered:
                was.update(raw_bytes(before[at : at + piece.numel()]))
                self.reverse.add(tensor.name, at, piece)
            begin += sink.put(data, begin)
            at += piece.numel()
        return _Learnt(now.hexdigest(), was.hexdigest() if altered else None, kept)

    def _learn(self, tensor: Stored, learnt: _Learnt) -> None:
        self.hashes[tensor.name] = learnt.hash
        if learnt.base_hash is not None:
            self.base_hashes[tensor.name] = learnt.base_hash
        self.kept |= learnt.kept

    def _by_rows(self, changed: list[Site]) -> bool:
        places = self.layout.anatomy.places
        return not changed or (len(changed) == 1 and places[changed[0]].is_whole and self.weights.by_rows(changed[0]))

    def _touched(self, name: str) -> list[Site]:
        return [site for site in self._homes[name] if site in self._changed]

    def _out(self, tensor: Stored) -> torch.dtype:
        return tensor.dtype if self.dtype is None or not tensor.dtype.is_floating_point else self.dtype

    def _pieces(self, tensor: Stored, changed: list[Site], learnt: dict[Site, Kept]) -> Iterator[Tensor]:
        """Pieces of one stored tensor as it will be stored, in order; after the last one, `learnt` has what was kept of its changes."""
        before, out, places = self.layout.stored(tensor.name), self._out(tensor), self.layout.anatomy.places
        rows = max(1, _CHUNK // max(1, tensor.shape[1:].numel()))
        starts = range(0, tensor.shape[0], rows) if tensor.shape else ()
        pieces = [slice(i, i + rows) for i in starts] or [slice(None)]
        draws = None if self.seed is None else generator(self.seed, tensor.name)

        def rounded(x: Tensor) -> Tensor:
            return x.to(out) if draws is None or not out.is_floating_point else stochastic(x, out, draws)

        if not changed:
            named = not all(
                site.is_unnamed for site in self._homes[tensor.name]
            )  # else a buffer, perhaps, that holds -inf
            for piece in pieces:
                was = some_rows(before, piece)
                if named and out.is_floating_point and not bool(torch.isfinite(was.sum(dtype=torch.float32))):
                    _require_finite(was, self._homes[tensor.name])
                yield was if was.dtype == out else rounded(was)
            return
        if len(changed) == 1 and places[changed[0]].is_whole:
            tally = _Tally(changed[0], self._room)
            strips = iter(self.weights.strips(changed[0], pieces))
            for piece in pieces:
                wish = next(strips).cpu()  # of a model on an accelerator
                after = rounded(wish)
                tally.add(some_rows(before, piece), wish, after)
                del wish  # nothing of a chunk is held while the next is computed
                yield after
                del after
            learnt[changed[0]] = tally.kept()
            return
        after = before if before.dtype == out else rounded(before)
        for site in changed:  # pieces of one fused tensor, or a transposed one: put together whole
            wish = self.weights[site].cpu()
            kept = rounded(wish)
            tally = _Tally(site, self._room)
            tally.add(places[site].take(before), wish, kept)
            learnt[site] = tally.kept()
            after = places[site].put(after, kept)
        yield after


class _Tally:
    """Sums behind `Kept`, over the chunks of a tensor. Raises ValueError at the first value that is not finite."""

    def __init__(self, site: Site, room: _Room) -> None:
        self._site, self._room = site, room
        self._asked = self._kept = self._inner = 0.0
        self._moving = self._stuck = 0

    def add(self, before: Tensor, wish: Tensor, after: Tensor) -> None:
        was, got = self._room.of(before.shape)
        got.copy_(after).sub_(was.copy_(before))
        asked = torch.sub(wish.float(), was, out=was)
        asked, got = asked.view(-1), got.view(-1)
        kept = float(got.dot(got))
        if not math.isfinite(kept) and self._site.is_unnamed:
            got.copy_(minus(after.float(), before.float()).view(-1))
            asked.copy_(minus(wish.float(), before.float()).view(-1))
            kept = float(got.dot(got))
        if not math.isfinite(kept):  # what is not finite is not after squaring either
            _require_finite(before, [self._site])
            _require_finite(after, [self._site])
        self._asked += float(asked.dot(asked))
        self._kept += kept
        self._inner += float(asked.dot(got))
        # counted as products of ones and zeros: torch's own count takes several times as long, and numpy's keeps other threads waiting
        for moving, moved in zip(asked.ne_(0).split(_EXACT), got.ne_(0).split(_EXACT), strict=True):
            count = int(moving.dot(moving))
            self._moving += count
            self._stuck += count - int(moving.dot(moved))

    def kept(self) -> Kept:
        return Kept.of(self._asked, self._kept, self._inner, self._stuck, self._moving)


class _Room(threading.local):
    """A thread's memory for the sums of one chunk, used again and again: fresh pages cost more than the sums."""

    def __init__(self) -> None:
        self._numbers = torch.empty(2, 0)

    def of(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Two tensors of a shape, with anything in them."""
        entries, numbers = shape.numel(), self._numbers
        if entries > numbers.shape[1]:
            numbers = torch.empty(2, entries)
            if entries <= 2 * _CHUNK:  # a tensor put together whole is not kept
                self._numbers = numbers
        one, other = (x[:entries].view(shape) for x in numbers)
        return one, other


def _require_finite(tensor: Tensor, sites: list[Site]) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{sites[0]} has {bad} values that are NaN or infinite; nothing was written.")


class _Sink:
    """A file that several threads write to, each at its own place."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def put(self, data: bytes | memoryview, begin: int) -> int:
        """Write all of `data` at a place; gives its length."""
        left = memoryview(data)
        with self._lock:
            self._file.seek(begin)
            while len(left):
                left = left[self._file.write(left) :]
        return len(data)


def _copy_side_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Tokenizer, template, processor and generation files; the config with its dtype made true."""
    for name in side_files(source):
        copy_file(source, target, name)
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
