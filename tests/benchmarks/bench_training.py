"""Whole training steps: LIFT beside full fine-tuning with AdamW."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.tasks import chained_sums
from finetune.lift import LIFT
from finetune.objectives import nll
from finetune.predictions import predict
from surgery.model import Model
from surgery.weights import linear_sites


def run(folder: str | Path, rounds: int = 5) -> list[dict[str, Any]]:
    """Rows for the model in `folder`, in fp32 weights with bf16 autocast, on the CPU."""
    return training_rows(folder, rounds)


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


def training_rows(folder: str | Path, rounds: int) -> list[dict[str, Any]]:
    lift_model, full_model = (Model.load(folder, device="cpu", dtype="float32") for _ in range(2))
    inputs = batch(lift_model)
    weights = lift_model.weights
    chosen = [(str(site), weights.parameter(site)) for site in linear_sites(weights)]
    for parameter in lift_model.module.parameters():
        parameter.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    lift = LIFT(chosen, lr=1e-4, density=0.05)
    adamw = torch.optim.AdamW(full_model.module.parameters(), lr=1e-5, foreach=True)

    def step(model: Model, optimizer: Any, clip: Callable[[], object]) -> float:
        model.module.train()
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nll(predict(model.module, inputs))
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    def ours() -> float:
        return step(lift_model, lift, lambda: lift.clip_grad_norm_(1.0))

    def peer() -> float:
        return step(full_model, adamw, lambda: torch.nn.utils.clip_grad_norm_(full_model.module.parameters(), 1.0))

    ours(), peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    tokens = int(inputs["attention_mask"].sum())
    return [
        row(
            "whole training step, LIFT against full AdamW (s)",
            a,
            b,
            1.0,
            f"16 transcripts, {tokens} tokens, bf16 autocast, clipping; median of {rounds}",
        )
    ]


def row(name: str, ours: float, peer: float, limit: float, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}
