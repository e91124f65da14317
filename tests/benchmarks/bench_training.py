"""Whole training steps and their memory: LIFT beside full fine-tuning with AdamW, and beside PEFT's LoRA and SHiRA with as many numbers to train.

All arms see the same batch, compute in bfloat16 with float32 weights, and clip; they take turns in one process. Memory is that of a
process of its own.

What the optimizer costs does not depend on the batch, what the passes through the model cost does: hence batches of two sizes, and the pass that
every way of training those matrices makes before it computes a weight's gradient. A peer is "plain" in a loop as its users write it, with the loss that
transformers computes; otherwise it goes through the model as `tune` has it go, the beginning that all rows share once, which tells what the choice of
the method alone saves.
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
SIZES = (16, 2)  # transcripts a batch
Step = Callable[[], object]


def run(folder: str | Path, rounds: int = 5) -> list[dict[str, Any]]:
    """Rows for the model in `folder`, in fp32 weights with bf16 autocast, on the CPU."""
    return training_rows(folder, rounds) + memory_rows(folder)


def batch(model: Model, size: int) -> dict[str, Tensor]:
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


def lift_steps(folder: str | Path, steps: int = 1, size: int = SIZES[0], **options: Any) -> Step:
    """The job: steps of LIFT on every attention and MLP matrix, by default with as many entries as the LoRA has numbers."""
    model = Model.load(folder, device="cpu", dtype="float32")
    weights = model.weights
    assert isinstance(weights, LiveWeights)
    chosen = [(str(site), weights.parameter(site)) for site in linear_sites(weights)]
    model.module.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    lift = LIFT(chosen, lr=1e-4, **(options or {"lora_rank": RANK}))
    return stepping(model, lift, lambda: lift.clip_grad_norm_(1.0), steps, size)


def full_steps(folder: str | Path, steps: int = 1, size: int = SIZES[0], plain: bool = False) -> Step:
    """The job: steps of AdamW on all parameters."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return dense_steps(model, model.module, steps, size, plain)


def lora_steps(folder: str | Path, steps: int = 1, size: int = SIZES[0], plain: bool = False) -> Step:
    """The job: steps of AdamW on PEFT's LoRA at the same matrices."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return dense_steps(model, with_adapter(model, "lora", RANK), steps, size, plain)


def shira_steps(folder: str | Path, steps: int = 1, size: int = SIZES[0], plain: bool = False) -> Step:
    """The job: steps of AdamW on PEFT's SHiRA, which trains entries of the same matrices, drawn at random."""
    model = Model.load(folder, device="cpu", dtype="float32")
    return dense_steps(model, with_adapter(model, "shira", RANK, seed=0), steps, size, plain)


def frozen_steps(folder: str | Path, steps: int = 1, size: int = SIZES[0]) -> Step:
    """The job: forward and backward through the whole model for the gain of its first norm alone, which no optimizer changes."""
    model = Model.load(folder, device="cpu", dtype="float32")
    weights = model.weights
    assert isinstance(weights, LiveWeights)
    model.module.requires_grad_(False)
    first = weights.parameter("0.attn.norm").requires_grad_(True)
    return stepping(model, torch.optim.SGD([first], lr=0.0), lambda: None, steps, size)


def dense_steps(model: Model, learner: Any, steps: int, size: int, plain: bool) -> Step:
    trained = [p for p in learner.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-5, foreach=True)
    return stepping(model, adamw, lambda: torch.nn.utils.clip_grad_norm_(trained, 1.0), steps, size, plain)


def stepping(
    model: Model, optimizer: torch.optim.Optimizer, clip: Step, steps: int, size: int, plain: bool = False
) -> Step:
    """plain: the loss is transformers' own, of all rows whole, as a Trainer computes it; otherwise what `tune` computes, the same number."""
    inputs = batch(model, size)
    model.module.train()

    def step() -> None:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.module(**inputs).loss if plain else nll(predict(model.module, inputs))
            loss.backward()
            clip()
            optimizer.step()
            optimizer.zero_grad()

    return step


def training_rows(folder: str | Path, rounds: int) -> list[dict[str, Any]]:
    return [found for size in SIZES for found in rows_of_size(folder, rounds, size)]


def rows_of_size(folder: str | Path, rounds: int, size: int) -> list[dict[str, Any]]:
    arms = {
        "LIFT": lift_steps(folder, size=size),
        "full AdamW": full_steps(folder, size=size),
        "LoRA": lora_steps(folder, size=size),
        "SHiRA": shira_steps(folder, size=size),
        "LIFT, density 0.05": lift_steps(folder, size=size, density=0.05),
        "no weight's gradient": frozen_steps(folder, size=size),
        "plain full AdamW": full_steps(folder, size=size, plain=True),
        "plain LoRA": lora_steps(folder, size=size, plain=True),
        "plain SHiRA": shira_steps(folder, size=size, plain=True),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, step in arms.items():
            began = time.perf_counter()
            step()
            if turn:  # the first is not counted
                times[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in times.items()}
    note = f"{size} transcripts, bf16 autocast, clipping; {RANK} numbers a row and column, but for full AdamW; median of {rounds}"
    return [
        row(f"whole training step of {size}, {ours} against {peer} (s)", middle[ours], middle[peer], limit, note)
        for ours, peer, limit in (
            ("LIFT", "plain full AdamW", 0.75),
            ("LIFT", "plain LoRA", 1.3),
            ("LIFT", "plain SHiRA", 1 / 1.5),
            ("LIFT", "full AdamW", 0.75),
            ("LIFT", "LoRA", 1.3),
            ("LIFT", "SHiRA", 1 / 1.5),
            ("LIFT, density 0.05", "full AdamW", 0.75),
            ("no weight's gradient", "full AdamW", None),
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


def row(name: str, ours: float, peer: float, limit: float | None, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}
