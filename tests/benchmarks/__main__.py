"""Measure every figure again and write RESULTS.md: ``make benchmarks``. Ours and the peer run side by side, in one go.

python -m tests.benchmarks [STUDY]        STUDY: folder of a finished study whose time is to be stated
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from surgery.specimen import specimen
from tests.benchmarks import bench_faithfulness, bench_lift, bench_training, bench_write, measure

RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    base = specimen()
    sections = [
        "# Benchmarks\n",
        "Ours and the peer in one run on one machine; a ratio over its limit is in bold.\n",
        measure.machine() + f", {torch.get_num_threads()} threads\n",
    ]
    if len(sys.argv) > 1:
        study = Path(sys.argv[1])
        clock = json.loads((study / "clock.json").read_text(encoding="utf-8"))
        record = json.loads((study / "record.json").read_text(encoding="utf-8"))
        stages = ", ".join(
            f"{name.split('/')[-2] if name.startswith('arms') else Path(name).stem} {seconds:.0f} s"
            for name, seconds in clock.items()
        )
        sections.append(
            f"Study: {sum(clock.values()) / 60:.1f} minutes (at most 12), peak resident memory {record['results']['peak_resident_mib'] / 1024:.2f} GiB (at most 6). Stages: {stages}.\n"
        )
    with tempfile.TemporaryDirectory() as folder:
        rows = [*bench_write.run(folder, base)]
    rows += bench_lift.run(str(base), rounds=1) + bench_training.run(base) + bench_faithfulness.run(base)
    RESULTS.write_text("\n".join([*sections, measure.table(rows)]), encoding="utf-8")
    sys.stdout.write(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
