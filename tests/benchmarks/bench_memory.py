"""A model larger than the memory: `apply` on a synthetic sharded checkpoint in a control group with a hard memory limit.

python -m tests.benchmarks.bench_memory [GIGABYTES LIMIT_GIGABYTES]       by default 8 and 2
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks import measure
from tests.benchmarks.bench_merge import synthetic


def halved(model: str, to: str) -> Callable[[], object]:
    """The job: every MLP output scaled, so that a good part of the model is computed anew."""
    from surgery import Checkpoint, Scale, apply, write

    def call() -> object:
        return write(apply(Scale(0.5), Checkpoint(model), "*.mlp.down"), to)

    return call


@contextmanager
def limited(limit: int) -> Iterator[Callable[[], dict[str, int]]]:
    """A control group with a hard limit, with this process and its children in it; gives a function that reads its highest use."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    home = Path("/sys/fs/cgroup") if unified else Path("/sys/fs/cgroup/memory")
    group = home / f"surgery-{os.getpid()}"
    group.mkdir()  # needs the right to make one
    (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    peak, kills = (
        group / ("memory.peak" if unified else "memory.max_usage_in_bytes"),
        group / ("memory.events" if unified else "memory.oom_control"),
    )
    try:
        yield lambda: {
            "peak": int(peak.read_text()),
            "killed": next(
                int(line.split()[1]) for line in kills.read_text().splitlines() if line.startswith("oom_kill ")
            ),
        }
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def run(gigabytes: float = 8, limit_gigabytes: float = 2) -> list[measure.Row]:
    with tempfile.TemporaryDirectory() as here:
        model = synthetic(Path(here) / "model", size=int(gigabytes * 1e9), shards=8)
        size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
        with limited(int(limit_gigabytes * 1e9)) as read:
            found = measure.once(
                "tests.benchmarks.bench_memory:halved", {"model": str(model), "to": str(Path(here) / "out")}
            )
            used = read()
    note = (
        f"every mlp.down scaled, proof by reloading included, {found.seconds:.0f} s; in a control group limited to {limit_gigabytes:g} GB, page cache "
        f"included, of which at most {used['peak'] / 1e9:.2f} GB were used; {used['killed']} processes killed"
    )
    return [
        measure.Row(
            name="model larger than memory: private memory against the model's bytes",
            ours=f"{found.peak / 2**20:.0f} MiB",
            peer=f"{size / 2**20:.0f} MiB",
            ratio=found.peak / size,
            limit=limit_gigabytes / gigabytes,
            note=note,
        )
    ]


if __name__ == "__main__":
    sys.stdout.write(measure.table(run(*map(float, sys.argv[1:]))))
