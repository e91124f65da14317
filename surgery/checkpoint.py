"""Checkpoints on disk: read by site, written by stream, verified, atomic.

A `Checkpoint` is keyed on the names in its *files*, never on those of a live module. `write` walks any point one tensor at a
time into a temporary folder beside the destination, hashes while it writes, reads everything back, and only then renames.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import mmap
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from surgery.anatomy import Anatomy
from surgery.sites import Site
from surgery.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECORD = "record.json"
_MAX_HEADER = 100_000_000  # the format's own limit
_CHUNK = 1 << 18  # entries computed at a time: fits the cache, and bounds memory for a huge embedding
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
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
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A folder that is not a readable checkpoint: the message says what was looked for, what is there and what to do."""


class VerificationError(CheckpointError):
    """What was written is not what was asked for."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as its header describes it."""

    file: str
    name: str
    dtype: torch.dtype
    shape: torch.Size
    begin: int  # absolute byte range in the file
    end: int


class Checkpoint(Weights):
    """The weights in a Hugging Face model folder, lazily: opening reads headers only.

    Sharded or single safetensors files; tied tensors are one site. Raises CheckpointError for a folder that is empty, incomplete,
    inconsistent or pickled, and ValueError for a family without a table.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.tensors, self.metadata = _read_headers(self.folder)
        self.anatomy = Anatomy.of(self.config, self.tensors, where=str(folder))
        self.layout = self
        self._shapes = {site: self._site_shape(site) for site in self.anatomy.places}
        self._open: dict[str, mmap.mmap] = {}
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def dtype(self, site: Site | str) -> torch.dtype:
        return self.tensors[self.anatomy.places[self._existing(site)].name].dtype

    def _read(self, site: Site, rows: slice) -> Tensor:
        place = self.anatomy.places[site]
        tensor = place.take(self.stored(place.name))[rows]
        return tensor.clone() if rows == slice(None) else tensor  # whole, it is the caller's own, to write to as well

    def stored(self, name: str) -> Tensor:
        """A tensor as the file has it, by the file's name for it."""
        last = self._last  # one look: another thread may put its own there
        if last[0] != name:  # a walk in chunks asks for the same one many times
            self._last = last = (name, self._mapped(self.tensors[name]))
        return last[1]

    def _mapped(self, tensor: Stored) -> Tensor:
        # safetensors' own reader goes through a Python sequence, and torch takes an interrupt there for a bad shape
        if tensor.begin == tensor.end:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.file not in self._open:
            with (self.folder / tensor.file).open("rb") as file:
                self._open[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(
            self._open[tensor.file], dtype=torch.uint8, offset=tensor.begin, count=tensor.end - tensor.begin
        )
        if tensor.begin % tensor.dtype.itemsize:
            raw = raw.clone()  # a file that is not aligned
        return raw.view(tensor.dtype).view(tensor.shape)

    @property
    def files(self) -> list[str]:
        """The weight files, in order."""
        return sorted({t.file for t in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        return sum(t.end - t.begin for t in self.tensors.values())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor's bytes, by file name of the tensor."""
        return _hash_tensors(self.folder, self.tensors)

    def hash(self) -> str:
        """SHA-256 of the whole point: of its tensors' names, dtypes, shapes and bytes, whatever files they are split into."""
        return point_hash(self.tensors, self.hashes())

    def __repr__(self) -> str:
        return f"<Checkpoint {self.folder.name}: {self.anatomy.family}, {self.anatomy.n_layers} layers, {self.nbytes / 1e6:.0f} MB>"

    def _site_shape(self, site: Site) -> torch.Size:
        place = self.anatomy.places[site]
        stored = self.tensors[place.name]
        if place.rows is None and not place.transposed:
            return stored.shape
        return place.take(torch.empty(stored.shape, device="meta", dtype=stored.dtype)).shape


def point_hash(tensors: Mapping[str, Stored], hashes: Mapping[str, str]) -> str:
    rows = [[name, _CODES[tensors[name].dtype], list(tensors[name].shape), hashes[name]] for name in sorted(tensors)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_config(folder: Path) -> PretrainedConfig:
    """The folder's config, or a CheckpointError that says what is wrong with the folder."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. A checkpoint is a folder with config.json and safetensors files."
        )
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{folder} has no config.json (there is: {found}). A checkpoint is a folder with config.json and safetensors files."
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error


def _read_headers(folder: Path) -> tuple[dict[str, Stored], dict[str, dict[str, str]]]:
    index = folder / INDEX
    present = sorted(p.name for p in folder.glob("*.safetensors"))
    if index.is_file():
        wanted = _read_index(index)
        files = sorted(set(wanted.values()))
        missing = [f for f in files if f not in present]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(files)} shards, first {missing[0]}. Download it again."
            )
        extra = [f for f in present if f not in files]
        if extra:
            raise CheckpointError(
                f"{folder} has {', '.join(extra[:3])}, which {INDEX} does not mention: the folder mixes two checkpoints. Remove the stray files."
            )
    elif (folder / SINGLE).is_file() and len(present) == 1:
        wanted, files = None, [SINGLE]
    elif present:
        raise CheckpointError(
            f"{folder} has {len(present)} safetensors files ({', '.join(present[:3])}) but no {INDEX} to say which belong."
        )
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds pickles ({', '.join(pickles[:3])}), which can run code when opened and are refused. Convert once, where you trust "
                "the file: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there.")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in files:
        stored, metadata[file] = read_header(folder / file)
        for tensor in stored:
            if wanted is not None and wanted.get(tensor.name) != file:
                said = f"says it is in {wanted[tensor.name]}" if tensor.name in wanted else "does not mention it"
                raise CheckpointError(
                    f"{folder / file} contains {tensor.name}, but {INDEX} {said}. Index and shards are of different checkpoints."
                )
            tensors[tensor.name] = tensor
    absent = [name for name in wanted or () if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{INDEX} promises {absent[0]} in {(wanted or {})[absent[0]]}, which does not contain it ({len(absent)} such)."
        )
    return tensors, metadata


def _read_index(path: Path) -> dict[str, str]:
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
            raise TypeError("weight_map does not map names to files")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index: {error!r}") from error
    outside = [f for f in wanted.values() if Path(f).name != f or not f.endswith(".safetensors")]
    if outside:
        raise CheckpointError(
            f"{path} points to {outside[0]!r}: shards must be safetensors files inside the folder itself."
        )
    return wanted


def read_header(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its metadata; a CheckpointError where the file is damaged.

    The header's claims are checked against the file's length before anything is allocated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is not a complete safetensors file: {size} bytes, with a header that claims {length}."
            )
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = sorted(
                (int(e["data_offsets"][0]), int(e["data_offsets"][1]), name, DTYPES[e["dtype"]], torch.Size(e["shape"]))
                for name, e in header.items()
            )
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header: {error!r}. Download it again.") from error
    start, at = 8 + length, 0
    stored = []
    for begin, end, name, dtype, shape in entries:
        if begin != at or end - begin != shape.numel() * dtype.itemsize:
            raise CheckpointError(
                f"{path} has a damaged header: {name} claims bytes {begin} to {end}, which do not fit its shape or its neighbours."
            )
        at = end
        stored.append(Stored(path.name, name, dtype, shape, start + begin, start + end))
    if start + at != size:
        raise CheckpointError(
            f"{path} is truncated or padded: {size} bytes where its header promises {start + at}. Download it again."
        )
    return stored, metadata


def load_module(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The transformers model of a folder, on the CPU, silently. Raises CheckpointError when a tensor is missing, unexpected or misshapen."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    finally:
        logging.set_verbosity(level)
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


# --- writing ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Asked and kept, for one site: what rounding to the stored dtype left of the change.

    asked, kept: Frobenius norms. cosine: between the two changes (nan when either is zero). unmoved: fraction in [0, 1] of the
    entries asked to move that stayed where they were. entries: how many were asked to move.
    """

    asked: float
    kept: float
    cosine: float
    unmoved: float
    entries: int


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
        asked, kept = (sum(getattr(r, k) ** 2 for r in rows) ** 0.5 for k in ("asked", "kept"))
        inner = sum(r.cosine * r.asked * r.kept for r in rows if r.asked and r.kept)
        entries = sum(r.entries for r in rows)
        unmoved = sum(r.unmoved * r.entries for r in rows) / entries if entries else 0.0
        return Kept(asked, kept, inner / (asked * kept) if asked and kept else float("nan"), unmoved, entries)

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
    weights: Weights, to: str | os.PathLike[str], *, dtype: torch.dtype | None = None, progress: bool = False
) -> Written:
    """Write a point to a new model folder: streamed, hashed, verified, and there whole or not at all.

    Files, shards, tokenizer and configuration are those of the checkpoint the weights derive from. Arithmetic is fp32; each tensor is
    stored in the dtype it was found in, or in `dtype`. Tensors that nothing changed keep their bytes. The copy is then checked by
    `verify_written`.

    Raises FileExistsError if `to` exists, ValueError for non-finite values (naming the site), VerificationError if the check fails.
    """
    layout = weights.layout
    if layout is None:
        raise ValueError(
            "These weights come from a live module with no checkpoint behind it; there are no files to imitate. Use module.save_pretrained."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"Weights cannot be stored as {dtype}.")
    to = Path(to)
    hashes: dict[str, str] = {}
    hashing: list[Future[dict[str, str]]] = []
    kept: dict[Site, Kept] = {}
    from tqdm.auto import tqdm

    with (
        new_folder(to) as partial,
        tqdm(total=layout.nbytes, unit="B", unit_scale=True, desc=f"writing {to.name}", disable=not progress) as bar,
        ThreadPoolExecutor(1) as aside,
    ):
        with _one_core_free():
            for file in layout.files:
                stored = {name: t for name, t in layout.tensors.items() if t.file == file}
                hashing.append(aside.submit(_hash_tensors, layout.folder, stored))  # while the cache still holds it
                _write_file(weights, layout, partial / file, dtype, hashes, kept, bar)
        _copy_side_files(layout.folder, partial, dtype)
        checks = verify_written(partial, hashes)
        tensors, _ = _read_headers(partial)
        base_hashes = {name: digest for done in hashing for name, digest in done.result().items()}
    return Written(to, point_hash(tensors, hashes), point_hash(layout.tensors, base_hashes), hashes, kept, checks)


def verify_written(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Load a folder as anybody would, through transformers, and compare every parameter with the hash taken while it was computed.

    Bit-equal parameters in the same architecture give bit-equal logits, so nothing larger is compared; the logits of a probe are
    required to be finite. Returns what was checked, in words. Raises VerificationError naming the first culprit.
    """
    module = load_module(folder, "auto")
    anatomy = Checkpoint(folder).anatomy
    parameters = dict(module.named_parameters(remove_duplicate=False))
    loaded: dict[str, Tensor] = {}
    for name in anatomy.stored_in():
        parameter = parameters.get(name, parameters.get(f"{module.base_model_prefix}.{name}"))
        if parameter is not None:
            loaded[name] = parameter
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(lambda parameter: hashlib.sha256(_bytes(parameter)).hexdigest(), loaded.values())
        for name, digest in zip(loaded, digests, strict=True):
            if digest != hashes[name]:
                raise VerificationError(
                    f"{name} as loaded differs from {name} as computed: the file or its loading is at fault."
                )
    if len(loaded) < len(hashes):
        unread = {n: h for n, h in _hash_tensors(folder, _read_headers(folder)[0]).items() if n not in parameters}
        wrong = [n for n, digest in unread.items() if digest != hashes[n]]
        if wrong:
            raise VerificationError(f"{wrong[0]} on disk differs from {wrong[0]} as computed.")
    tied = []
    for site, target in anatomy.ties.items():
        head, embed = (
            m.weight for m in (module.get_output_embeddings(), module.get_input_embeddings()) if m is not None
        )
        if head is not embed:
            raise VerificationError(f"{site} should be tied to {target}, but loading made them two tensors.")
        tied.append(f"{site} tied to {target}")
    with torch.no_grad():
        probe = torch.arange(min(16, anatomy.vocab))[None]
        if not bool(torch.isfinite(module(input_ids=probe, attention_mask=torch.ones_like(probe)).logits).all()):
            raise VerificationError("The written model gives logits that are NaN or infinite.")
    return [f"{len(loaded)} of {len(hashes)} tensors bit-equal as loaded by transformers", *tied, "probe logits finite"]


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder beside `to` that becomes `to` when the block ends well and vanishes when it does not.

    Leftovers of processes that were killed are removed. Raises FileExistsError when `to` exists.
    """
    if to.exists() or to.is_symlink():
        raise FileExistsError(f"{to} exists already and is never overwritten. Choose another --to, or remove it.")
    to.parent.mkdir(parents=True, exist_ok=True)
    for stale in to.parent.glob(f".{glob.escape(to.name)}.partial-*"):
        pid = stale.name.rsplit("-", 1)[-1]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    partial = to.parent / f".{to.name}.partial-{os.getpid()}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        os.rename(partial, to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _one_core_free() -> Iterator[None]:
    """Arithmetic on all cores but one, which hashes and writes: two kinds of threads on one core would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _write_file(
    weights: Weights,
    layout: Checkpoint,
    path: Path,
    dtype: torch.dtype | None,
    hashes: dict[str, str],
    kept: dict[Site, Kept],
    bar: Any,
) -> None:
    """One safetensors file of the layout, its tensors in their order, a chunk at a time."""
    stored = sorted((t for t in layout.tensors.values() if t.file == path.name), key=lambda t: t.begin)
    changed, homes = weights.changed_from(layout), layout.anatomy.stored_in()
    metadata = layout.metadata[path.name]
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for tensor in stored:
        out = _out_dtype(tensor.dtype, dtype)
        length = tensor.shape.numel() * out.itemsize
        header[tensor.name] = {"dtype": _CODES[out], "shape": list(tensor.shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as sink:
        if hasattr(
            os, "posix_fallocate"
        ):  # a disk too small is known before the work, and writing is several times as fast
            os.posix_fallocate(sink.fileno(), 0, 8 + len(text) + at)
        sink.write(len(text).to_bytes(8, "little") + text)
        with _Worker(hashes, sink) as worker:
            for tensor in stored:
                out = _out_dtype(tensor.dtype, dtype)
                for piece in _chunks(weights, layout, tensor, homes[tensor.name], changed, out, kept):
                    worker.put(tensor.name, _bytes(piece))
                bar.update(tensor.end - tensor.begin)
        os.fsync(sink.fileno())


def _chunks(
    weights: Weights,
    layout: Checkpoint,
    tensor: Stored,
    sites: list[Site],
    touched: set[Site],
    out: torch.dtype,
    kept: dict[Site, Kept],
) -> Iterator[Tensor]:
    """Pieces of one stored tensor as it will be stored, in order."""
    before = layout.stored(tensor.name)
    places = layout.anatomy.places
    rows = max(1, _CHUNK // max(1, tensor.shape[1:].numel())) if tensor.shape else 1
    pieces = [slice(i, i + rows) for i in range(0, tensor.shape[0], rows)] if tensor.shape else [slice(None)]
    changed = [s for s in sites if s in touched]
    if not changed:
        for piece in pieces:
            was = before[piece] if tensor.shape else before
            if out.is_floating_point and not bool(torch.isfinite(was.sum(dtype=torch.float32))):
                _require_finite(was, sites)
            yield was.to(out)
        return
    if len(changed) == 1 and places[changed[0]].rows is None and not places[changed[0]].transposed:
        tally = _Tally(changed[0])
        for piece in pieces:
            wish = weights.rows(changed[0], piece)
            after = wish.to(out)
            tally.add(before[piece], wish, after)
            yield after
        kept[changed[0]] = tally.kept()
        return
    after = before.to(out)
    for site in changed:  # pieces of one fused tensor, or a transposed one: put together whole
        wish = weights[site]
        tally = _Tally(site)
        tally.add(places[site].take(before), wish, wish.to(out))
        kept[site] = tally.kept()
        after = places[site].put(after, wish)
    yield after


class _Tally:
    """Sums behind `Kept`, over the chunks of a tensor. Raises ValueError at the first value that is not finite."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._asked = self._kept = self._inner = 0.0
        self._moving = self._moved = 0

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
        self._moving += int(np.count_nonzero(asked.numpy() != 0))
        self._moved += int(np.count_nonzero(got.numpy() != 0))

    def kept(self) -> Kept:
        norms = (self._asked * self._kept) ** 0.5
        cosine = self._inner / norms if norms else float("nan")
        # Rounding may also move an entry that was asked to stay, when the stored dtype changes: never count below none.
        unmoved = max(0.0, 1 - self._moved / self._moving) if self._moving else 0.0
        return Kept(self._asked**0.5, self._kept**0.5, cosine, unmoved, self._moving)


def _out_dtype(found: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return found if asked is None or not found.is_floating_point else asked


def _require_finite(tensor: Tensor, sites: list[Site]) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{sites[0]} has {bad} values that are NaN or infinite; nothing was written.")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


class _Worker:
    """SHA-256 of tensors that arrive in pieces, one tensor after another, on a thread of its own, which also writes them to `sink`.

    A few pieces wait at most. What goes wrong on the thread (a full disk) is raised by the next `put`, or on leaving.
    """

    def __init__(self, into: dict[str, str], sink: io.FileIO) -> None:
        self._into, self._sink = into, sink
        self._queue: queue.Queue[tuple[str, memoryview] | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Worker:
        self._thread.start()
        return self

    def put(self, name: str, data: memoryview) -> None:
        if self._error:
            raise self._error
        self._queue.put((name, data))

    def __exit__(self, kind: object, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def _work(self) -> None:
        digests: dict[str, Any] = {}
        while (item := self._queue.get()) is not None:
            if self._error:
                continue  # drained, so that nobody waits
            name, data = item
            try:
                digests.setdefault(name, hashlib.sha256()).update(data)
                while len(data):
                    data = data[self._sink.write(data) :]
            except (OSError, ValueError) as error:  # ValueError: an interrupt closed the file meanwhile
                self._error = error
        self._into.update({name: digest.hexdigest() for name, digest in digests.items()})


def _copy_side_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Tokenizer, template, processor and generation files; the config with its dtype made true."""
    skip = {RECORD, INDEX, "pytorch_model.bin.index.json", "provenance.json"}  # true of the original only
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


def _hash_tensors(folder: Path, tensors: Mapping[str, Stored]) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for file in sorted({t.file for t in tensors.values()}):
        with (folder / file).open("rb") as source:
            for tensor in sorted((t for t in tensors.values() if t.file == file), key=lambda t: t.begin):
                hashes[tensor.name] = _hash_range(source, tensor.begin, tensor.end)
    return hashes


def _hash_range(source: BinaryIO, begin: int, end: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    source.seek(begin)
    left = end - begin
    while left:
        count = source.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{source.name} ended early.")
        digest.update(buffer[:count])
        left -= count
    return digest.hexdigest()


def hash_file_tensors(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of one safetensors file, and of what its header says, in whatever order.

    A file whose header is damaged has one hash for the whole.
    """
    try:
        stored, metadata = read_header(path)
    except CheckpointError:
        return {"(damaged header)": hashlib.sha256(path.read_bytes()).hexdigest()}
    with path.open("rb") as source:
        said = [metadata, sorted([t.name, _CODES[t.dtype], list(t.shape), t.begin - stored[0].begin] for t in stored)]
        return {
            "(header)": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
            **{t.name: _hash_range(source, t.begin, t.end) for t in stored},
        }
