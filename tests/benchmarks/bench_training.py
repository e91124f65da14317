"""Whole training steps and their memory: LIFT beside full fine-tuning with AdamW, and beside PEFT's LoRA and SHiRA with as many numbers to train.

All arms see the same batch, compute in bfloat16 with float32 weights, and clip; they take turns in one process. Memory is that of a
process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.tasks import chained_sums
from finetune.learner import with_adapter
from finetune.lift import LIFT
from finetune.objectives import nll
from finetune.predictions import predict
from surgery.model import LiveWeights, Model
from surgery.weights import linear_sites
from tests.benchmarks import measure

RANK = 16  # of the LoRA: every other arm but the full one trains as many numbers, matrix by matrix
Step = Callable[[], object]


def run(folder: str | Path, rounds: int = 5) -> list[dict[str, Any]]:
    """Rows for the model in `folder`, in fp32 weights with bf16 autocast, on the CPU."""
    return training_rows(folder, rounds) + memory_rows(folder)


def batch(model: Model, size: int = 16) -> dict[str, Tensor]:
    """A batch of the study's own data, padded on the right."""
    told = [model.transcript(q.question, q.completion(model.markers)) for q in chained_sums(size, seed=0)]
    width = max(len(t.ids) for t in told)
    ids, labels, mask = (
        torch.full((size, width), model.pad_id),
        torch.full((size, width), -100),
        torch.zeros(size, width, dtype=torch.long),
    )
    for row, t in enumerate(told):
        begin, end = t.spans["completion"]
        ids[row, : len(t.ids)], mask[row, : len(t.ids)] = torch.tensor(t.ids), 1
        labels[row, begin:end] = ids[row, begin:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lift_steps(folder: str | Path, steps: int = 1, **options: Any) -> Step:
    """The job: steps of LIFT on every attention and MLP matrix, by default with as many entries as the LoRA has numbers."""
    model = Model.load(folder, device="cpu", dtype="float32")
    weights = model.weights
    assert isinstance(weights, LiveWeights)
    chosen = [(str(site), weights.parameter(site)) for site in linear_sites(weights)]
    model.module.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    lift = LIFT(chosen, lr=1e-4, **(options or {"lora_rank": RANK}))
    return stepping(model, lift, lambda: lift.clip_grad_norm_(1.0), steps)


def full_steps(folder: str | Path, steps: int = 1) -> Step:
    """The job: steps of AdamW on all parameters."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return dense_steps(model, model.module, steps)


def lora_steps(folder: str | Path, steps: int = 1) -> Step:
    """The job: steps of AdamW on PEFT's LoRA at the same matrices."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return dense_steps(model, with_adapter(model, "lora", RANK), steps)


def shira_steps(folder: str | Path, steps: int = 1) -> Step:
    """The job: steps of AdamW on PEFT's SHiRA, which trains entries of the same matrices, drawn at random."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return dense_steps(model, with_adapter(model, "shira", RANK, seed=0), steps)


def dense_steps(model: Model, learner: Any, steps: int) -> Step:
    trained = [p for p in learner.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-5, foreach=True)
    return stepping(model, adamw, lambda: torch.nn.utils.clip_grad_norm_(trained, 1.0), steps)


def stepping(model: Model, optimizer: torch.optim.Optimizer, clip: Step, steps: int) -> Step:
    inputs = batch(model)
    model.module.train()

    def step() -> None:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nll(predict(model.module, inputs))
            loss.backward()
            clip()
            optimizer.step()
            optimizer.zero_grad()

    return step


def training_rows(folder: str | Path, rounds: int) -> list[dict[str, Any]]:
    arms = {
        "LIFT": lift_steps(folder),
        "full AdamW": full_steps(folder),
        "LoRA": lora_steps(folder),
        "SHiRA": shira_steps(folder),
    }
    arms["LIFT, density 0.05"] = lift_steps(folder, density=0.05)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, step in arms.items():
            began = time.perf_counter()
            step()
            if turn:  # the first is not counted
                times[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in times.items()}
    note = f"16 transcripts, bf16 autocast, clipping; {RANK} numbers a row and column, but for full AdamW; median of {rounds}"
    limits = {"full AdamW": 0.75, "LoRA": 1.3, "SHiRA": 1 / 1.5}
    return [
        row(f"whole training step, LIFT against {peer} (s)", middle["LIFT"], middle[peer], limit, note)
        for peer, limit in limits.items()
    ] + [
        row(
            "whole training step, LIFT at density 0.05 against full AdamW (s)",
            middle["LIFT, density 0.05"],
            middle["full AdamW"],
            0.75,
            note,
        )
    ]


def memory_rows(folder: str | Path, repeats: int = 2) -> list[measure.Row]:
    """Peak private memory of a process that takes steps, its model and imports included."""
    jobs = {
        peer: f"tests.benchmarks.bench_training:{name}"
        for peer, name in (("LoRA", "lora_steps"), ("full AdamW", "full_steps"))
    }
    found: list[measure.Row] = []
    for peer, job in jobs.items():
        runs = measure.beside(
            "tests.benchmarks.bench_training:lift_steps", job, {"folder": str(folder), "steps": 2}, repeats
        )
        limit = 1.05 if peer == "LoRA" else 1.0
        found += measure.rows(
            f"training against {peer}",
            *runs,
            seconds=None,
            peak=limit,
            note="two steps, as above; the model and the imports included",
        )
    return found


def row(name: str, ours: float, peer: float, limit: float, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}
