"""What the flight recorder costs: its share of a training run's time, and what a step takes when it is there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from analyses.flight import Flight, flight_recorder
from analyses.general_text import GENERAL_TEXT
from analyses.tasks import chained_sums
from finetune.tune import Tuned, tune
from surgery.model import Model
from tests.benchmarks.measure import Row


def run(folder: str | Path, steps: int = 40) -> list[Row]:
    """Rows for the model in `folder`: LIFT, 16 transcripts a step, everything watched within the default budget, on the CPU."""
    plain = trained(load(folder), steps).seconds
    with tempfile.TemporaryDirectory() as where:
        log, model = Path(where) / "log.jsonl", load(folder)
        questions = chained_sums(16, seed=1, side="test")
        recorder = flight_recorder(model, log, questions=questions, texts=GENERAL_TEXT[:8])
        trained(model, steps, callbacks=[recorder])
        end = next(line for line in Flight.load(log).lines if line.get("event") == "end")
    training, measuring = end["training_seconds"], end["budgeted_seconds"]
    measured = ", ".join(f"{name} {count}" for name, count in end["measured"].items())
    return [
        Row(
            name="flight recorder: seconds of measuring, against those of training", ours=measuring, peer=training,
            ratio=measuring / training, limit=0.03, note=f"{steps} steps, everything watched; measured: {measured}",
        ),
        Row(
            name="training recorded, measuring left out, against unrecorded (s)", ours=training, peer=plain,
            ratio=training / plain, limit=None, note="one run of each: they also differ by what else the machine does",
        ),
    ]  # fmt: skip


def load(folder: str | Path) -> Model:
    return Model.load(folder, device="cpu", dtype="float32")


def trained(model: Model, steps: int, **options: Any) -> Tuned:
    taught = [model.transcript(q.question, q.completion(model.markers)) for q in chained_sums(16 * steps, seed=0)]
    return tune(model, taught, steps=steps, **options)
