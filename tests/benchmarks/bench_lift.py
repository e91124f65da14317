"""LIFT against what it replaces: mask refresh against full SVD, optimizer step and state against torch's AdamW, and what computing
only the chosen blocks' weight gradients would save.

    python -m tests.benchmarks.bench_lift cuda       the same on a GPU at the shapes of 1B and 7B models, with random bfloat16 weights

Ours and the peer's take turns in one process; times are medians over the rounds.
"""

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.lift import LIFT, budget, principal_indices
from finetune.lift.selection import Matrix, choose
from finetune.lift.warm import GUARDS
from surgery.linalg import each_matrix, low_rank_factors
from tests.benchmarks import measure

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
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = perf_counter()
    result = work()
    synchronize()
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
            1 / 15 if full else None,
            identical(masks["ours"], masks[name]) + ("; of the study's refresh 0.125 is asked" if full else ""),
        )
        for name, (_, full) in peers.items()
    ]


def changed(W: Tensor, by: float = 0.01, seed: int = 0) -> Tensor:
    """W with its principal entries moved by `by` in the root mean square: about what 60 steps of LIFT at a peak of 1e-3 do to the specimen."""
    after = W.float().clone()
    at = principal_indices(after, RANK, budget(W.shape, DENSITY)).long()
    noise = torch.randn(len(at), generator=torch.Generator().manual_seed(seed)).to(W.device)
    after.view(-1)[at] += by * noise
    return after


def basis(W: Tensor) -> Tensor:
    left, right = low_rank_factors(W, RANK + GUARDS)
    return (right if W.shape[1] <= W.shape[0] else left).float()


def warm_rows(weights: list[Tensor], rounds: int) -> list[dict[str, Any]]:
    """A refresh that begins from the last one's filters, against full SVD; how far its masks agree with the exact ones, in the note."""
    after, starts = each_matrix(changed, weights), each_matrix(basis, weights)
    counts = [budget(W.shape, DENSITY) for W in after]
    matrices = [Matrix(str(i), W, counts[i], start=starts[i]) for i, W in enumerate(after)]
    exact = each_matrix(lambda m: principal_indices(m.W, RANK, m.count), matrices)
    kept = [
        float(torch.isin(old, new).float().mean())
        for old, new in zip(
            each_matrix(lambda W: principal_indices(W.float(), RANK, budget(W.shape, DENSITY)), weights),
            exact,
            strict=True,
        )
    ]
    times: dict[str, list[float]] = {"warm": [], "cold": [], "peer": []}
    for _ in range(rounds):
        took, found = seconds(lambda: choose(matrices, "largest", RANK, agreement=0.999))
        times["warm"].append(took)
        times["cold"].append(seconds(lambda: choose(matrices, "largest", RANK))[0])
        times["peer"].append(seconds(lambda: [by_svd(W, torch.float64, True) for W in after])[0])
    same = sum(int(torch.isin(a, b.indices).sum()) for a, b in zip(exact, found, strict=True))
    least = min(float(torch.isin(a, b.indices).float().mean()) for a, b in zip(exact, found, strict=True))
    note = (
        f"{same / sum(counts):.4%} of the entries are the exact ones (at least {least:.3%} in each matrix), {sum(c.warm for c in found)}/"
        f"{len(found)} warm; since the last refresh {1 - sum(kept) / len(kept):.1%} of the mask has changed; the filters kept for it are "
        f"{sum(b.nbytes for b in starts) / sum(8 * W.numel() for W in weights):.2%} of AdamW's state"
    )
    middle = {name: statistics.median(values) for name, values in times.items()}
    return [
        row("warm mask refresh, s: full SVD, float64", middle["warm"], middle["peer"], 1 / 40, note),
        row("warm mask refresh, s: the cold one", middle["warm"], middle["cold"], None, ""),
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
        row(f"optimizer step, s: {name}", middle[name], middle["peer"], 0.25, notes[name] or "after a refresh")
        for name in notes
    ]
    size = [
        sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
        for optimizer in (lift, adamw)
    ]
    rows.append(
        row("optimizer state, bytes", size[0], size[1], 0.10, "float32 weights; gradient accumulators are not state")
    )
    return rows


def block_rows(rounds: int, tokens: int = 1463, shape: tuple[int, int] = (1536, 576)) -> list[dict[str, Any]]:
    """The weight gradient of the chosen 4x4 blocks alone, against all of it and a gather: what structured blocks could save."""
    out, into = shape
    units = torch.randperm(out * into // 16, generator=torch.Generator().manual_seed(0))[
        : budget(shape, DENSITY, block=4) // 16
    ]
    columns = [units[units // (into // 4) == i] % (into // 4) for i in range(out // 4)]
    indices = principal_indices(torch.randn(shape), 1, len(units) * 16, "random", block=4)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        X, dY = torch.randn(tokens, into).to(dtype), torch.randn(tokens, out).to(dtype)

        def blocks(X: Tensor = X, dY: Tensor = dY) -> list[Tensor]:
            inputs, outputs = X.T.contiguous().view(into // 4, -1), dY.T.contiguous().view(out // 4, 4, -1)
            return [
                outputs[i] @ inputs.index_select(0, chosen).view(-1, tokens).T
                for i, chosen in enumerate(columns)
                if len(chosen)
            ]

        def whole(X: Tensor = X, dY: Tensor = dY) -> Tensor:
            return (dY.T @ X).float().view(-1).index_select(0, indices)

        blocks(), whole()
        pairs = [(seconds(blocks)[0], seconds(whole)[0]) for _ in range(max(9, 3 * rounds))]
        ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
        name = f"weight gradient of the chosen 4x4 blocks, s: of all entries and a gather, {str(dtype).removeprefix('torch.')}"
        rows.append(row(name, ours, peer, None, f"{out}x{into}, {tokens} tokens, density {DENSITY}"))
    return rows


def row(name: str, ours: float, peer: float, limit: float | None, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "limit": limit, "note": note}


def run(folder: str, rounds: int = 3) -> list[dict[str, Any]]:
    weights = list(matrices(folder).values())
    return (
        refresh_rows(weights, rounds)
        + warm_rows(weights, rounds)
        + step_rows(weights, max(5, rounds))
        + block_rows(rounds)
    )


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------

SHAPES = {  # name -> layers, and the matrices of one
    "1B": (16, [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]),
    "7B": (32, [(4096, 4096)] * 4 + [(11008, 4096), (11008, 4096), (4096, 11008)]),
}


class PublishedStep:
    """A step of the published optimizer as its paper's code does it: dense boolean masks on the host, moved to the device every step."""

    def __init__(self, params: list[torch.nn.Parameter], masks: list[Tensor], lr: float = 1e-4):
        self.params, self.masks, self.lr, self.t = params, masks, lr, 0
        self.moments = [
            [torch.zeros(int(m.sum()), dtype=p.dtype, device=p.device) for _ in range(2)]
            for p, m in zip(params, masks, strict=True)
        ]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for p, host, (mean, square) in zip(self.params, self.masks, self.moments, strict=True):
            mask = host.to(p.device)
            assert p.grad is not None
            grad = p.grad[mask]
            mean.mul_(0.9).add_(grad, alpha=0.1)
            square.mul_(0.999).addcmul_(grad, grad, value=0.001)
            denominator = (square / (1 - 0.999**self.t)).sqrt_().add_(1e-8)
            moved = torch.zeros_like(p)
            moved[mask] = mean / (1 - 0.9**self.t) / denominator
            p.add_(moved, alpha=-self.lr)
            p.grad[~mask] = 0


def gpu_rows(size: str, rounds: int = 5, device: str = "cuda") -> list[dict[str, Any]]:
    """Refresh and step at the shapes of a model of that size, bfloat16 weights drawn at random, one arm in memory at a time."""
    layers, shapes = SHAPES[size]
    generator = torch.Generator(device).manual_seed(0)

    def parameters() -> list[torch.nn.Parameter]:
        return [
            torch.nn.Parameter(torch.randn(s, device=device, dtype=torch.bfloat16, generator=generator) * 0.02)
            for _ in range(layers)
            for s in shapes
        ]

    def timed(step: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        times = []
        for _ in range(rounds + 2):
            before()
            times.append(seconds(step)[0])
        return statistics.median(times[2:])

    def ours() -> tuple[float, float, float, float]:
        params = parameters()
        opened, lift = seconds(lambda: LIFT(params, lr=1e-4, density=DENSITY, filter_rank=RANK))

        def backward() -> None:  # one layer's gradient at a time, as in a backward pass
            for p in params:
                p.grad = torch.randn_like(p)
                lift.gathered()

        took = timed(lift.step, backward)
        state = sum(v.numel() * v.element_size() for s in lift.state.values() for v in s.values())
        lift.close()
        return opened, took, state, torch.cuda.max_memory_allocated()

    def dense() -> tuple[float, float, float]:
        params = [torch.nn.Parameter(p.detach().float()) for p in parameters()]
        adamw = torch.optim.AdamW(params, lr=1e-4, fused=True)
        for p in params:
            p.grad = torch.randn_like(p)
        took = timed(adamw.step)
        state = sum(v.numel() * v.element_size() for s in adamw.state.values() for v in s.values())
        return took, state, torch.cuda.max_memory_allocated()

    def published() -> tuple[float, float]:
        params = parameters()
        masks = [torch.rand(p.shape) < DENSITY for p in params]
        optimizer = PublishedStep(params, masks)
        for p in params:
            p.grad = torch.randn_like(p)
        return timed(optimizer.step), torch.cuda.max_memory_allocated()

    def fresh(arm: Callable[[], Any]) -> Any:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return arm()

    mine, theirs, paper = fresh(ours), fresh(dense), fresh(published)
    some = [torch.randn(s, device=device) for s in shapes]
    svd = seconds(lambda: [torch.linalg.svd(W, full_matrices=False) for W in some])[0] * layers
    return [
        row(
            f"{size}: first choice of all masks, s: SVD, float32",
            mine[0],
            svd,
            1 / 15,
            f"the peer of one layer, times {layers}",
        ),
        row(
            f"{size}: optimizer step, s: torch's fused AdamW in float32",
            mine[1],
            theirs[0],
            0.25,
            "gathering in the backward pass not counted",
        ),
        row(
            f"{size}: optimizer step, s: the published optimizer restated",
            mine[1],
            paper[0],
            None,
            "its masks come from the host every step",
        ),
        row(
            f"{size}: optimizer state, bytes: AdamW",
            mine[2],
            theirs[1],
            0.10,
            "bfloat16 weights with their lower halves",
        ),
        row(
            f"{size}: peak memory, bytes: AdamW",
            mine[3],
            theirs[2],
            None,
            "weights, state and gradients, no activations; float32 weights there",
        ),
        row(
            f"{size}: peak memory, bytes: the published optimizer",
            mine[3],
            paper[1],
            None,
            "the same; its gradients are all whole",
        ),
    ]


if __name__ == "__main__":
    sizes = sys.argv[2:] or list(SHAPES)
    sys.stdout.write(measure.table([line for size in sizes for line in gpu_rows(size, device=sys.argv[1])]))
