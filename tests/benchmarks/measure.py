"""Time and memory of one job in a fresh process, beside a peer's, in one run.

A *job* is named `module:function`. The function takes keyword arguments, does what must not be timed (imports, say)
and returns a callable without arguments: calling that is what is measured. Every run gets a new interpreter, so
that neither side inherits the other's caches or heap, and runs of the two sides alternate, so that a slow minute of the
machine hits both. What a job imports only once it is called is imported beforehand in the runs that count.
"""

import gc
import importlib
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.002


class Row(TypedDict):
    """One line of a results table: `ratio` is ours over the peer's, which must be at most `limit`."""

    name: str
    ours: str | float
    peer: str | float
    ratio: float
    limit: float | None
    note: str


@dataclass(frozen=True)
class Run:
    """What one run of a job took.

    seconds: wall time of the call, without imports.
    peak: highest anonymous memory of the process in bytes while it ran, the interpreter and its imports included.
        Pages of memory-mapped files are not counted: the kernel can drop them at any moment.
    rise: how far that is above the level just before the call, in bytes.
    imported: the modules that the call itself imported.
    """

    seconds: float
    peak: int
    rise: int
    imported: tuple[str, ...]


def anonymous_bytes(pid: int) -> int:
    """Private memory of a process that no file backs, in bytes.

    Read from the kernel's counters in /proc where there is one, which costs microseconds and not a walk over all pages;
    elsewhere psutil's unique set size.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        import psutil

        return psutil.Process(pid).memory_full_info().uss
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def once(job: str, arguments: Mapping[str, object], imports: Iterable[str] = ()) -> Run:
    """Run a job in a fresh interpreter and watch it from outside.

    imports: modules to import before the clock starts. RuntimeError with the process's last lines when it fails.
    """
    os.sync()  # no run pays for the pages that an earlier one left to be written
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    orders = json.dumps({"job": job, "arguments": dict(arguments), "imports": list(imports)})
    command = [sys.executable, "-m", "tests.benchmarks.measure"]
    ready, report = os.pipe(), os.pipe()
    with (
        # a file and not a pipe for what the job prints: nobody reads while it runs, and a full pipe would stop it
        tempfile.TemporaryFile() as log,
        os.fdopen(report[0], "rb") as said,
        os.fdopen(ready[1], "wb", buffering=0) as tell,
        subprocess.Popen(
            [*command, str(ready[0]), str(report[1])],
            cwd=ROOT,
            env=environment,
            pass_fds=(ready[0], report[1]),
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        os.close(ready[0])
        os.close(report[1])
        tell.write(orders.encode() + b"\n")
        prepared = said.readline()
        before = peak = anonymous_bytes(process.pid) if prepared else 0
        if prepared:
            tell.write(b"go\n")
        while prepared and not select.select([said], [], [], SAMPLE_SECONDS)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        answer = said.read()
        process.wait()
        log.seek(0)
        words = log.read().decode(errors="replace")
    if process.returncode or not answer:
        raise RuntimeError(f"{job} failed with exit status {process.returncode}:\n" + words[-4000:])
    told = json.loads(answer)
    return Run(told["seconds"], peak, peak - before, tuple(told["imported"]))


def fresh(folder: str, prefix: str) -> Path:
    """A place to write to, for a job to ask for while it prepares. What its last run left in the folder is gone then.

    Otherwise the memory for files fills up as runs go by, and pages that the machine has yet to find cost a run as much as its work does.
    """
    for last in Path(folder).glob(f"{prefix}-*"):
        shutil.rmtree(last)
    return Path(tempfile.mkdtemp(dir=folder, prefix=f"{prefix}-")) / "out"


def beside(ours: str, peer: str, arguments: Mapping[str, object], repeats: int = 5) -> tuple[list[Run], list[Run]]:
    """Runs of both jobs with the same arguments, alternating: ours, peer, ours, peer ...

    One run of each goes first and is not counted: it fills the page cache and tells which modules to import beforehand.
    """
    first, second = once(ours, arguments).imported, once(peer, arguments).imported
    pairs = [(once(ours, arguments, first), once(peer, arguments, second)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def rows(
    name: str, ours: list[Run], peer: list[Run], *, seconds: float | None, peak: float | None, note: str
) -> list[Row]:
    """Medians of both sides as table rows.

    seconds, peak: the highest ratios allowed; None leaves that row out.
    """
    made: list[Row] = []
    if seconds is not None:
        a, b = (statistics.median(run.seconds for run in side) for side in (ours, peer))
        made.append(
            Row(name=f"{name}: time", ours=f"{a:.2f} s", peer=f"{b:.2f} s", ratio=a / b, limit=seconds, note=note)
        )
    if peak is not None:
        a, b = (statistics.median(run.peak for run in side) / 2**20 for side in (ours, peer))
        rises = [statistics.median(run.rise for run in side) / 2**20 for side in (ours, peer)]
        above = f"above what the imports took: {rises[0]:.0f} and {rises[1]:.0f} MiB"
        made.append(
            Row(
                name=f"{name}: peak private memory",
                ours=f"{a:.0f} MiB",
                peer=f"{b:.0f} MiB",
                ratio=a / b,
                limit=peak,
                note=f"{note}; {above}" if note else above,
            )
        )
    return made


def table(lines: Iterable[Row]) -> str:
    """A Markdown table; a ratio over its limit is said in bold."""
    made = ["| what | ours | peer | ratio | at most | note |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for line in lines:
        limit, ratio = line["limit"], f"{line['ratio']:.3g}"
        if limit is not None and line["ratio"] > limit:
            ratio = f"**{ratio} (over)**"
        ours, peer = (v if isinstance(v, str) else f"{v:.4g}" for v in (line["ours"], line["peer"]))
        made.append(
            f"| {line['name']} | {ours} | {peer} | {ratio} | {'' if limit is None else f'{limit:.3g}'} | {line['note']} |"
        )
    return "\n".join(made) + "\n"


def machine(packages: Iterable[str] = ("torch", "transformers", "safetensors", "mergekit", "trl", "peft")) -> str:
    """One line that says where and with which versions the numbers were taken."""
    from surgery.record import processor

    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return f"{os.cpu_count()} x {processor()}, {platform.system()}, Python {platform.python_version()}, " + ", ".join(
        found
    )


def _importable(name: str) -> bool:
    """Whether a loaded module can be imported by its name: compiled packages register some that cannot."""
    package = sys.modules.get(name.rpartition(".")[0])
    return PathFinder.find_spec(name, getattr(package, "__path__", None)) is not None


def _serve(ready: int, report: int) -> None:
    """The child's side: prepare, say so, wait for the word, run, report the seconds."""
    with os.fdopen(ready) as told, os.fdopen(report, "w") as say:
        orders = json.loads(told.readline())
        for name in orders["imports"]:
            importlib.import_module(name)
        module, function = orders["job"].split(":")
        call = getattr(importlib.import_module(module), function)(**orders["arguments"])
        gc.collect()
        known = set(sys.modules)
        say.write("prepared\n")
        say.flush()
        told.readline()
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        late = [name for name in sys.modules if name not in known and _importable(name)]  # in the order of loading
        say.write(json.dumps({"seconds": seconds, "imported": late}))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
