"""What a write will take: memory, disk, time.

The constants are measured; ``python -m tests.benchmarks.bench_check`` prints forecast beside fact, to measure them again after the
writer has changed. What they describe (private memory, that is without pages of files, which the system takes back as it needs):

* the libraries are most of it: `IMPORTS`, and `MERGEKIT` where a recipe runs;
* the writer computes in chunks, so that the models' size does not matter; inputs are memory-mapped;
* a rule that needs a whole tensor holds `RULE_COPIES` fp32 copies of it for each model, and more where they are small (`SCATTERED`);
* the way back holds every changed entry and its position until it is found to exceed `UNDO_LIMIT`; below that it is put together;
* the proof maps the written model too; it adds the code of the architecture, and logits.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.headers import SIZES
from surgery.preflight.facts import SHORT, Facts
from surgery.side_files import UNDO_LIMIT

MIB = 1 << 20
IMPORTS = 262 * MIB  # the interpreter, torch, transformers as far as a config needs it
MERGEKIT = 54 * MIB
CHUNKS = 7.5 * MIB  # pieces in flight in one thread: computed, hashed, written
RULE = 20 * MIB  # what a rule of mergekit's adds where chunks are enough
TRIMS = 17.5 * MIB  # and one that looks for the largest entries, in each thread
THREADS = min(8, os.cpu_count() or 1)  # as many as the writer takes
PROOF = 30 * MIB  # the architecture's code, and activations
PROBES = 8  # tokens whose logits are compared, three times over
CHANGED = 0.8  # of the entries asked to move in bf16, those that do
HELD, SAVED = 4, 4  # bytes of a position while it is held, and in the file
RULE_COPIES = {
    "slerp": 2.6, "nuslerp": 4.9, "multislerp": 4.6, "karcher": 3.6, "model_stock": 3.2, "sce": 4.4, "ramplus_tl": 7.1, "arcee_fusion": 5.4,
    "dare_linear": 3.6, "dare_ties": 3.9, "della_linear": 6.2, "della": 6.2, "breadcrumbs": 3.9, "breadcrumbs_ties": 3.9,
}  # fmt: skip
OTHER_COPIES = 5.0
MAPPED = 32 * MIB  # from this size on, memory that is let go of returns to the system at once
SCATTERED = 1.3  # below, the allocator keeps between as much as is in use and two thirds more: the middle
FUSED_COPIES = 5.0  # of a tensor that holds several sites, or lies transposed: put together whole
STARTUP = 5.0  # s: imports, and the fixed part of the proof
THROUGHPUT = 250e6  # bytes a second of one input read, hashed, computed, written, read back and proved
_SIDE = (".json", ".jinja", ".txt", ".model")
IN_CHUNKS = ("linear", "task_arithmetic", "nearswap", "ram", "passthrough", "ties")


@dataclass(frozen=True)
class Forecast:
    """memory: peak private bytes, `imports` of them the libraries. disk: bytes written. free: bytes free there. seconds: a rough time,
    without that of the download. download: bytes that the hub would have to give first.

    memory is None on mergekit's own executor, which holds as much as it likes. machine: this machine's memory in bytes, None where it is
    not known.
    """

    memory: int | None
    imports: int
    disk: int
    free: int
    seconds: float
    machine: int | None = None
    download: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Its numbers by name: bytes, and seconds."""
        return asdict(self)

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} minutes"
        memory = "not known, as mergekit's own executor does the merge"
        if self.memory is not None:
            memory = f"{in_bytes(self.memory)} at its peak ({in_bytes(self.imports)} of it the libraries)"
        return f"forecast memory {memory}, disk {in_bytes(self.disk)} ({in_bytes(self.free)} free), roughly {time}" + (
            f" after a download of {in_bytes(self.download)}" if self.download else ""
        )


def peak_memory(
    *,
    entries: int,
    width: int,
    largest: int,
    fused: int,
    vocabulary: int,
    models: int,
    method: str | None,
    lined_up: bool = False,
) -> float:
    """Peak private bytes of a write.

    entries: numbers that change, each of `width` bytes. largest: entries of the largest tensor; fused: of the largest that holds
    several sites. models: how many are merged. method: of a recipe; None for deltas added to a model. lined_up: whether embeddings
    are made anew, row by row: then each model's is there twice.
    """
    entries = int(CHANGED * entries)
    patch = entries * (SAVED + width)
    kept = patch <= UNDO_LIMIT
    held = entries * (HELD + width) if kept else UNDO_LIMIT * (HELD + width) / (SAVED + width)
    rule = FUSED_COPIES * 4 * fused
    if method is not None:
        copies = RULE_COPIES.get(method, OTHER_COPIES)
        spread = SCATTERED if 4 * largest < MAPPED else 1.0
        rule += RULE if method in IN_CHUNKS else spread * copies * 4 * largest * models
        rule += THREADS * TRIMS if method == "ties" else 0
        rule += 2 * 4 * largest * models if lined_up else 0
    libraries = IMPORTS + (MERGEKIT if method else 0)
    writing = THREADS * CHUNKS + max(
        held, rule
    )  # the largest tensor, an embedding, comes first: little is held by then
    proof = PROOF + 3 * PROBES * 4 * vocabulary + (held + patch if kept else 0)
    return libraries + max(writing, proof)


def forecast(
    facts: Facts,
    *,
    models: int,
    moved: int | None,
    method: str | None,
    to: Path,
    dtype: str | None = None,
    share: float = 1.0,
    executor: bool = False,
    lined_up: bool = False,
    download: int = 0,
) -> Forecast:
    """What writing a model laid out like `facts` takes.

    models: how many folders are read. moved: numbers that change, all by default. method: of a recipe. share: layers of the result over its own.
    executor: whether mergekit's own does the merge, which keeps no way back. lined_up: whether embeddings get rows of a
    vocabulary built anew, which leaves no way back either. download: bytes that the hub would have to give first.
    """
    out = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype or "", dtype)
    code = next((c for c, name in SHORT.items() if name == out), None)
    sizes = {n: math.prod(t.shape) for n, t in facts.tensors.items()}
    stored = {n: code if code and facts.tensors[n].code in SHORT else facts.tensors[n].code for n in sizes}
    written = sum(size * SIZES[stored[n]] for n, size in sizes.items()) * share
    same = all(stored[n] == facts.tensors[n].code for n in sizes)
    entries = sum(sizes.values()) if moved is None else min(moved, sum(sizes.values()))
    pieces = {} if facts.anatomy is None else {p.name: p for p in facts.anatomy.places.values()}
    memory = peak_memory(
        entries=int(entries * share) if same and not lined_up else 0,  # else there is no way back to keep
        width=SIZES[max(stored.values(), key=lambda c: SIZES[c])],
        largest=max(sizes.values()),
        fused=max((size for n, size in sizes.items() if n in pieces and not pieces[n].is_whole), default=0),
        vocabulary=facts.rows() or 0,
        models=models,
        method=method,
        lined_up=lined_up,
    )
    side = sum(facts.place.size(p.name) for p in facts.folder.iterdir() if p.is_file() and p.suffix in _SIDE)
    home = next(p for p in to.absolute().parents if p.exists())
    seconds = STARTUP + models * facts.nbytes * share / THROUGHPUT
    libraries = IMPORTS + (MERGEKIT if method else 0)
    kept = same and not executor and not lined_up
    patch = int(entries * share * (SAVED + written / max(1, sum(sizes.values()) * share))) if kept else 0
    disk = int(written + side) + (patch if patch <= UNDO_LIMIT else 0)
    free = shutil.disk_usage(home).free
    memory = None if executor else int(memory)
    return Forecast(memory, int(libraries), disk, free, round(seconds, 1), _machine(), download)


def _machine() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def in_bytes(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
