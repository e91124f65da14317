"""LIFT against what it replaces: mask refresh against full SVD, optimizer step and state against torch's AdamW.

Ours and the peer's take turns in one process; times are medians over the rounds.
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.lift import LIFT, budget, principal_indices
from surgery.linalg import each_matrix

LINEAR = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$")
DENSITY, RANK = 0.05, 16


def matrices(folder: str) -> dict[str, Tensor]:
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if LINEAR.search(name)}  # noqa: SIM118
    if not found:
        raise SystemExit(f"no linear matrices in {folder}")
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = work()
    return perf_counter() - start, result


def by_svd(W: Tensor, dtype: torch.dtype, full: bool) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.to(dtype), full_matrices=full)
    score = ((U[:, :RANK] * S[:RANK]) @ Vh[:RANK]).abs_().view(-1)
    return score.topk(budget(W.shape, DENSITY), sorted=False).indices.sort().values


def identical(ours: list[Tensor], theirs: list[Tensor]) -> str:
    same = sum(torch.equal(a.long(), b) for a, b in zip(ours, theirs, strict=True))
    strays = sum(len(a) - int(torch.isin(a.long(), b).sum()) for a, b in zip(ours, theirs, strict=True))
    return f"{same}/{len(ours)} masks identical, {strays} of {sum(map(len, ours))} entries differ"


def refresh_rows(weights: list[Tensor], rounds: int) -> list[dict[str, Any]]:
    peers = {  # "full" in the sense of the field: all singular vectors of both sides; the reduced one stops at the short side
        "full SVD, float64": (torch.float64, True),
        "reduced SVD, float64": (torch.float64, False),
        "reduced SVD, float32": (torch.float32, False),
    }
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    masks: dict[str, list[Tensor]] = {}

    def ours() -> list[Tensor]:
        return each_matrix(lambda W: principal_indices(W, RANK, budget(W.shape, DENSITY)), weights)

    principal_indices(weights[0], RANK, 1)  # imports
    for _ in range(rounds):
        took, masks["ours"] = seconds(ours)
        times["ours"].append(took)
        for name, (dtype, full) in peers.items():
            took, masks[name] = seconds(lambda: [by_svd(W, dtype, full) for W in weights])  # noqa: B023
            times[name].append(took)
    own = statistics.median(times["ours"])
    return [
        row(
            f"mask refresh, s: {name}",
            own,
            statistics.median(times[name]),
            1 / 8 if full else None,
            identical(masks["ours"], masks[name]),
        )
        for name, (_, full) in peers.items()
    ]


def step_rows(weights: list[Tensor], rounds: int) -> list[dict[str, Any]]:
    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(W.float()) for W in weights]

    sparse, dense = parameters(), parameters()
    lift = LIFT(sparse, density=DENSITY, filter_rank=RANK, select="magnitude")
    adamw = torch.optim.AdamW(dense, foreach=True)
    for p in dense:
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in dense]
    times: dict[str, list[float]] = {"ours": [], "ours and gather": [], "ours, mixed ages": [], "peer": []}

    def backward() -> None:
        for p, grad in zip(sparse, grads, strict=True):
            p.grad = grad
        lift.clip_grad_norm_(float("inf"))

    def one_step(name: str) -> None:
        gather = seconds(backward)[0]
        step = seconds(lift.step)[0]
        times[name].append(step)
        if name == "ours":
            times["ours and gather"].append(gather + step)

    for _ in range(rounds + 2):
        one_step("ours")
        times["peer"].append(seconds(adamw.step)[0])
    lift.param_groups[0]["select"], lift.param_groups[0]["refresh"] = "largest", lift.param_groups[0]["steps"] + 1
    backward()
    lift.step()
    lift.param_groups[0]["refresh"] = None
    for _ in range(rounds + 2):
        one_step("ours, mixed ages")
        times["peer"].append(seconds(adamw.step)[0])
    middle = {name: statistics.median(values[2:]) for name, values in times.items()}
    notes = {"ours": "one age", "ours and gather": "hooks' gathering and the norm included", "ours, mixed ages": ""}
    rows = [
        row(f"optimizer step, s: {name}", middle[name], middle["peer"], 0.5, notes[name] or "after a refresh")
        for name in notes
    ]
    size = [
        sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
        for optimizer in (lift, adamw)
    ]
    rows.append(row("optimizer state, bytes", size[0], size[1], 0.12, "gradient accumulators are not state"))
    return rows


def row(name: str, ours: float, peer: float, limit: float | None, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}


def run(folder: str, rounds: int = 3) -> list[dict[str, Any]]:
    weights = list(matrices(folder).values())
    return refresh_rows(weights, rounds) + step_rows(weights, max(5, rounds))
