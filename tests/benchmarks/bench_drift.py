"""DRIFT's share of a training step: the same steps with and without it, in turns, for full fine-tuning and for LIFT."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from finetune.lift import LIFT
from finetune.objectives import nll
from finetune.predictions import predict
from finetune.rules import DRIFT, Store
from surgery.checkpoint import Checkpoint
from surgery.edits import Scale
from surgery.model import Model
from surgery.weights import Delta, apply, linear_sites
from tests.benchmarks.bench_training import SIZES, batch

LIMIT, LOG_EVERY = 1.05, 10


def run(folder: str | Path, rounds: int = 7) -> list[dict[str, Any]]:
    """Rows for the model in `folder`, in fp32 weights with bf16 autocast, on the CPU; each row's model is its own."""
    return [
        step_row(folder, "full AdamW", "memory", rounds),
        step_row(folder, "LIFT", "memory", rounds),
        step_row(folder, "LIFT", "lazy", rounds),
    ]


def step_row(folder: str | Path, method: str, store: Store, rounds: int) -> dict[str, Any]:
    model = Model.load(folder, device="cpu", dtype="float32")
    drift = DRIFT(_prior(folder), model, store=store, log_every=LOG_EVERY)
    state = TrainerState()
    drift.on_train_begin(None, state, None)
    optimizer, clip = _lift(model) if method == "LIFT" else _adamw(model)
    inputs, spent = batch(model, SIZES[0]), []

    def step(bent: bool) -> float:
        model.module.train()
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nll(predict(model.module, inputs))
        loss.backward()
        clip()
        if bent:
            before = time.perf_counter()
            drift.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
            spent.append(time.perf_counter() - before)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step(True), step(False)
    spent.clear()
    pairs = [(step(True), step(False)) for _ in range(rounds)]
    began = time.perf_counter()
    drift.merged()
    reading = (time.perf_counter() - began) / LOG_EVERY
    ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
    note = (
        f"adaptive on {len(linear_sites(model.weights))} matrices, prior {store}; in the callback itself "
        f"{statistics.median(spent):.3f} s, and {reading:.3f} s as a tenth of a measurement of the merge coefficient, included; median of {rounds}"
    )
    name = f"training step with DRIFT against without (s): {method}"
    ours += reading
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": LIMIT, "note": note}


def _prior(folder: str | Path) -> Delta:
    """A hundredth of the matrices themselves, read from the files: what a prior costs does not depend on what is in it."""
    point = Checkpoint(folder)
    sites = linear_sites(point)
    return (apply(Scale(1.01), point, sites) - point).keep(at=sites)


def _lift(model: Model) -> tuple[Any, Callable[[], object]]:
    weights = model.weights
    chosen = [(str(site), weights.parameter(site)) for site in linear_sites(weights)]
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    lift = LIFT(chosen, lr=1e-4, density=0.05)
    return lift, lambda: lift.clip_grad_norm_(1.0)


def _adamw(model: Model) -> tuple[Any, Callable[[], object]]:
    parameters = list(model.module.parameters())
    return torch.optim.AdamW(parameters, lr=1e-5, foreach=True), lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)
