"""What looking costs: capture beside the bare forward pass, beside nnsight and TransformerLens on the same weights, and statistics of rows
seen once beside those of rows held.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analyses.tasks import chained_sums
from probes.accumulators import Moments
from probes.activations import collect
from probes.capture import forward, pad_right
from probes.engines import Engine, reader
from probes.recorder import recording
from surgery.model import Model
from surgery.sites import match
from tests.benchmarks import measure

ALL, EARLY = 1.03, 0.55
TOKENS, WIDTH = 100_000, 576
MEMORY, GROWTH = 0.05, 1.25


def run(folder: str | Path, rounds: int = 7) -> list[Any]:
    """Rows for the model in `folder`, in fp32 on the CPU."""
    return [*capture_rows(folder, rounds), *generation_rows(folder, rounds), *statistics_rows()]


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each arm, one after the other in every round, so that a slow minute of the machine hits all."""
    for call in arms.values():
        call()
    times = [{name: timed(call) for name, call in arms.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in arms}


def capture_rows(folder: str | Path, rounds: int) -> list[dict[str, Any]]:
    model = Model.load(folder, device="cpu", dtype="float32")
    told = [model.transcript(q.question, q.completion(model.markers)) for q in chained_sums(16, seed=0)]
    rows = [t.ids for t in told]
    streams = match("*.resid", model.anatomy.activation_sites())
    middle = [s for s in streams if s.layer == model.anatomy.n_layers // 2]
    ids, mask = pad_right(rows, model.pad_id)

    @torch.no_grad()
    def bare() -> None:
        model.module.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    def through(engine: Engine) -> Callable[[], object]:
        read = reader(model, engine)
        return lambda: read(rows, streams)

    took = medians(
        {
            "bare": bare,
            "all": lambda: forward(model, rows, streams),
            "middle": lambda: forward(model, rows, middle),
            "every": lambda: collect(model, told, over="all"),
            "rows": lambda: collect(model, told),
            "means": lambda: collect(model, told, over=("prompt", "thinking", "answer"), pool="mean"),
            "nnsight": through("nnsight"),
            "transformer-lens": through("transformer-lens"),
        },
        rounds,
    )
    note = f"{len(rows)} transcripts, {sum(map(len, rows))} tokens, fp32; median of {rounds}"
    every = f"{len(streams)} residual streams"
    return [
        row(f"capturing {every} against the bare forward pass (s)", took["all"], took["bare"], ALL, note),
        row(f"capturing {middle[0]} with early stop against the bare forward pass (s)", took["middle"], took["bare"], EARLY, note),
        row(f"collect(): every token's row of {every}, against the bare forward pass (s)", took["every"], took["bare"], ALL, note),
        row(f"collect(): rows of {every} over the completion, against the bare forward pass (s)", took["rows"], took["bare"], None, note),
        row(f"collect(): means of {every} over three spans, against the bare forward pass (s)", took["means"], took["bare"], None, note),
        row(f"capturing {every} against nnsight (s)", took["all"], took["nnsight"], None, note),
        row(f"capturing {every} against TransformerLens (s)", took["all"], took["transformer-lens"], None, note),
    ]  # fmt: skip


def generation_rows(folder: str | Path, rounds: int) -> list[dict[str, Any]]:
    model = Model.load(folder, device="cpu", dtype="float32")
    asked = [q.question for q in chained_sums(8, seed=0)]

    def plain() -> None:
        model.generate(asked, max_new_tokens=32)

    def recorded() -> None:
        with recording(model, at="*.resid"):
            model.generate(asked, max_new_tokens=32)

    took = medians({"plain": plain, "recorded": recorded}, rounds)
    note = f"8 questions, up to 32 tokens each, every residual stream kept; median of {rounds}"
    return [row("generating while recording against generating (s)", took["recorded"], took["plain"], None, note)]


def statistics_rows(repeats: int = 3) -> list[dict[str, Any]]:
    """Mean and covariance of many rows, seen once in batches, beside numpy's on the rows held together; and beside a tenth of the rows."""
    here = "tests.benchmarks.bench_capture"
    many, numpys = measure.beside(f"{here}:streamed", f"{here}:held", {"tokens": TOKENS}, repeats=repeats)
    few = [measure.once(f"{here}:streamed", {"tokens": TOKENS // 10}, many[0].imported) for _ in range(repeats)]
    ours, held_all, tenth = (statistics.median(run.rise for run in side) / 2**20 for side in (many, numpys, few))
    note = f"rows of width {WIDTH} in batches of 1,000; float64 scatter matrix: {8 * WIDTH**2 / 2**20:.1f} MiB"
    name = f"mean and covariance of {TOKENS:,} rows seen once: MiB above what was there before"
    return [
        row(f"{name}, against numpy on all rows", ours, held_all, MEMORY, note),
        row(f"{name}, against a tenth of the rows", ours, tenth, GROWTH, note),
    ]


def streamed(tokens: int) -> Callable[[], None]:
    def call() -> None:
        found = Moments.empty(WIDTH)
        for start in range(0, tokens, 1000):
            found.add_(torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(start)))
        found.covariance()

    return call


def held(tokens: int) -> Callable[[], None]:
    def call() -> None:
        batches = [
            torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(start)) for start in range(0, tokens, 1000)
        ]
        np.cov(torch.cat(batches).numpy().T, dtype=np.float64)

    return call


def row(name: str, ours: float, peer: float, limit: float | None, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}
