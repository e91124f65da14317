"""Measure the figures again and write RESULTS.md: ``make benchmarks``. Ours and the peer run side by side, in one go.

python -m tests.benchmarks [SECTION ...] [STUDY]

SECTION: write, merge, merge-large, memory, realign, check, lift, training, drift, recorder, capture, steering, probes, faithfulness, thinkedit; by
         default all. The other sections stay as they were.
STUDY:   folder of a finished study whose time is to be stated.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from surgery.specimen import specimen
from tests.benchmarks import (
    bench_capture,
    bench_check,
    bench_drift,
    bench_faithfulness,
    bench_lift,
    bench_memory,
    bench_merge,
    bench_probes,
    bench_realign,
    bench_recorder,
    bench_steering,
    bench_thinkedit,
    bench_training,
    bench_write,
    measure,
)

RESULTS = Path(__file__).with_name("RESULTS.md")
SECTIONS: dict[str, Callable[[str, Path], list[measure.Row]]] = {
    "write": bench_write.run,
    "merge": bench_merge.run,
    "merge-large": lambda folder, base: bench_merge.run_large(folder),
    "memory": lambda folder, base: bench_memory.run(),
    "realign": bench_realign.run,
    "check": lambda folder, base: [*bench_check.seconds(base), *bench_check.run(folder)],
    "lift": lambda folder, base: bench_lift.run(str(base), rounds=1),
    "training": lambda folder, base: bench_training.run(base),
    "drift": lambda folder, base: bench_drift.run(base),
    "recorder": lambda folder, base: bench_recorder.run(base),
    "capture": lambda folder, base: bench_capture.run(base),
    "steering": lambda folder, base: bench_steering.run(base),
    "probes": lambda folder, base: bench_probes.run(),
    "faithfulness": lambda folder, base: bench_faithfulness.run(base),
    "thinkedit": lambda folder, base: bench_thinkedit.run(base),
}


def main(words: list[str]) -> None:
    studies = [Path(word) for word in words if word not in SECTIONS]
    chosen = [word for word in words if word in SECTIONS] or ([] if studies else list(SECTIONS))
    base = specimen()
    found = _sections()
    for path in studies:
        found["study"] = _study(path)
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows = SECTIONS[name](folder, base)
        found[name] = f"{measure.machine()}, {torch.get_num_threads()} threads\n\n{measure.table(rows)}"
        _save(found)
    _save(found)
    sys.stdout.write(RESULTS.read_text(encoding="utf-8"))


def _study(folder: Path) -> str:
    clock = json.loads((folder / "clock.json").read_text(encoding="utf-8"))
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    stages = ", ".join(
        f"{name.split('/')[-2] if name.startswith('arms') else Path(name).stem} {seconds:.0f} s"
        for name, seconds in clock.items()
    )
    return (
        f"{measure.machine()}\n\n"
        f"{sum(clock.values()) / 60:.1f} minutes (at most 12), peak resident memory {record['results']['peak_resident_mib'] / 1024:.2f} GiB "
        f"(at most 6). Stages: {stages}.\n"
    )


def _sections() -> dict[str, str]:
    """What RESULTS.md says already, by section."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    parts = re.split(r"^## ([\w-]+)\n\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.rstrip() + "\n" for part in parts[2::2]), strict=True))


def _save(found: dict[str, str]) -> None:
    order = [name for name in ("study", *SECTIONS) if name in found]
    head = "# Benchmarks\n\nOurs and the peer in one run on one machine; a ratio over its limit is in bold.\n"
    RESULTS.write_text("\n".join([head, *(f"## {name}\n\n{found[name]}" for name in order)]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
