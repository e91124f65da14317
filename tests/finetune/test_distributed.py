"""LIFT in several real processes equals LIFT in one: replicated (DDP) and sharded (FSDP2) weights, choices, steps, resuming, refusals."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from analyses.tasks import chained_sums
from finetune.distributed import Peers, Shards, exempt_from_ddp, local_part
from finetune.lift import LIFT, matrices_of, principal_indices
from finetune.lift.selection import Matrix, choose
from finetune.lift.shards import SHARDED, choose_shards
from finetune.overlay import overlay_
from surgery.model import Model
from surgery.weights import linear_sites
from tests.families import tiny
from tests.processes import together

SHAPES = [(24, 16), (16, 40), (17, 17), (2, 30), (9, 33), (64, 192), (1, 7)]
IDS = torch.randint(4, 90, (4, 6, 12), generator=torch.Generator().manual_seed(3))  # step, row, token
OPTIONS: dict[str, Any] = {"lr": 1e-3, "density": 0.1, "filter_rank": 4, "weight_decay": 0.1, "refresh": 2}
STEPS = 4


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def model(family: str = "llama") -> Model:
    found = Model(*tiny(family))
    found.module.requires_grad_(False)
    for site in linear_sites(found.weights):
        found.weights.parameter(site).requires_grad_(True)
    return found


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def loss(module: nn.Module, ids: Tensor, of: int = 6) -> Tensor:
    """Summed over its rows and divided by the rows of the whole batch."""
    logits = module(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (11 * of)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in module.named_parameters()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    module: nn.Module, lift: LIFT, steps: range, rank: int = 0, world: int = 1, through: nn.Module | None = None
) -> list[float]:
    """Steps on this process's rows of each batch; the norms of the clipped gradients. Processes' gradients are averaged."""
    norms = []
    for step in steps:
        rows = IDS[step].chunk(world)[rank]
        (world * loss(through or module, rows)).backward()
        norms.append(float(lift.clip_grad_norm_(0.5)))
        lift.step()
        lift.zero_grad()
    return norms


def alone(family: str = "llama", **options: Any) -> dict[str, Any]:
    m = model(family)
    with LIFT(matrices_of(m.weights), **(OPTIONS | options)) as lift:
        norms = train(m.module, lift, range(STEPS))
        chosen = {name: lift.state[p]["indices"].clone() for name, p in named(m.module)}
        return {"weights": snapshot(m.module), "norms": norms, "chosen": chosen, "refreshes": lift.refreshes}


# --- what the processes do ----------------------------------------------------------------------------------------------------


def averages(rank: int, world: int) -> Any:
    peers = Peers.of()
    assert peers is not None
    flat = torch.arange(6.0) * (rank + 1)
    parts, here = list(flat.split(2)), [True, rank == 0, False]
    peers.average_(flat, parts, here)
    agreed = peers.agreed([torch.tensor([rank, 7]), torch.zeros(0)])
    peers.require_same({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    alone = Peers.of(dist.new_subgroups(1)[0])
    return flat, here, [t.tolist() for t in agreed], alone


def differing(rank: int, world: int) -> Any:
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    with torch.no_grad():
        q[3, 3] += 1e-6 * rank
    LIFT([("same", p), ("other", q)], density=0.5, filter_rank=2)


def candidates(select: str, deal: Any = lambda i, W: W) -> list[Matrix]:
    """The matrices, one of them chosen whole, with budgets, seeds and gradients; one has a budget of its own. deal: the rows that
    a process has of the i-th."""
    wanted = [max(1, W.numel() // 9) for W in matrices()]
    wanted[2] = 17 * 17
    grads = [deal(i, G) if select in ("gradient", "movement") else None for i, G in enumerate(matrices(1))]
    return [
        Matrix(f"m{i}", deal(i, W), count, seed=i, own=i == 1, gradient=G, height=len(W))
        for i, (W, count, G) in enumerate(zip(matrices(), wanted, grads, strict=True))
    ]


def tied() -> Tensor:
    found = torch.zeros(20, 30)
    found[5:, 7] = 1
    found[18, 3] = 2
    return found


def rows_here(rank: int, world: int) -> Callable[[int, Tensor], Tensor]:
    """By turns the rows that ``fully_shard`` would give a process, and all or none of them, as of an expert that lies in one process."""

    def deal(i: int, W: Tensor) -> Tensor:
        mine = -(-len(W) // world)
        return W[rank * mine : (rank + 1) * mine] if i % 2 else W if i // 2 % world == rank else W[:0]

    return deal


def choices(rank: int, world: int) -> Any:
    at = Shards(dist.group.WORLD)
    found = {}
    for select, k, joint in itertools.product(SHARDED, (1, 4, 50), (False, True)):
        dealt = candidates(select, rows_here(rank, world))
        chosen = choose_shards(dealt, at, select, k, together=joint)
        found[select, k, joint] = [(len(m.W), c.indices) for m, c in zip(dealt, chosen, strict=True)]
    mine = rows_here(rank, world)(1, tied())
    t, u = (Matrix(name, mine, 12, height=len(tied())) for name in "tu")
    found["ties"] = [(len(mine), choose_shards([replace(t, count=5)], at, "magnitude", 1)[0].indices)]
    found["ties together"] = [
        (len(mine), choice.indices) for choice in choose_shards([t, u], at, "magnitude", 1, together=True)
    ]
    return found


def sick_shard(rank: int, world: int) -> Any:
    W = matrices()[0]
    W[-1, 0] = torch.nan  # in the last process only
    sick, fine = (Matrix(n, w.chunk(world)[rank], 9, height=len(w)) for n, w in (("sick", W), ("fine", matrices()[1])))
    choose_shards([fine, sick], Shards(dist.group.WORLD), "largest", 2)


def refusals(rank: int, world: int) -> Any:
    """What each thing that cannot be done with sharded weights says."""
    mesh = init_device_mesh("cpu", (world,))
    said = []
    rows, columns = (nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(i)])) for i in (0, 1))
    for named, options in (
        ([("wide", columns)], {}),
        ([("part", rows), ("whole", nn.Parameter(torch.ones(4, 4)))], {}),
        ([("part", rows)], {"select": "hybrid"}),
        ([("part", rows)], {"block": 4}),
        ([("part", rows)], {"grow_to": 0.9, "refresh": 1}),
        ([("part", rows)], {"agreement": 0.9, "refresh": 1}),
    ):
        try:
            LIFT(named, density=0.5, **options)
        except ValueError as error:
            said.append(str(error))
    return said


def replicated(rank: int, world: int) -> Any:
    """Plain module, DDP with LIFT's parameters exempt, and DDP as it is; each with its own rows of every batch."""
    found: dict[str, Any] = {}
    for kind in ("bare", "exempt", "ddp"):
        m = model()
        lift = LIFT(named(m.module), **OPTIONS)
        exempted = exempt_from_ddp(m.module, lift) if kind == "exempt" else []
        through = None if kind == "bare" else DistributedDataParallel(m.module)
        norms = train(m.module, lift, range(STEPS), rank, world, through)
        chosen = {name: lift.state[p]["indices"].clone() for name, p in named(m.module)}
        found[kind] = {"weights": snapshot(m.module), "norms": norms, "chosen": chosen, "exempted": exempted}
        lift.close()
    return found


def accumulated(rank: int, world: int) -> Any:
    """Micro-batches of one row; no gradient is clipped or asked for before the step; what nobody used has no step."""
    m = model()
    unused = nn.Parameter(torch.ones(6, 6))
    lift = LIFT([*named(m.module), ("unused", unused)], **OPTIONS)
    for step in range(STEPS):
        for row in IDS[step].chunk(world)[rank].split(1):
            (world * loss(m.module, row)).backward()
        lift.step()
        m.module.zero_grad()
    return snapshot(m.module), torch.equal(unused, torch.ones(6, 6))


def one_sided(rank: int, world: int) -> Any:
    """Matrices that only the first process's rows use, as an expert's may be, two in one parameter."""
    p, q = (nn.Parameter(W.clone()) for W in matrices()[:2])
    lift = LIFT([("both", p), (("gate", "up"), q)], lr=0.1, density=0.2, filter_rank=2, betas=(0.0, 0.9))
    (p.sum() + (q.sum() if rank == 0 else 0.0)).backward()
    lift.step()
    return [lift.state[w]["exp_avg"].clone() for w in (p, q)], [p.detach().clone(), q.detach().clone()]


def resumed(rank: int, world: int) -> Any:
    """Two steps, a state saved and loaded by each process, two more."""
    first = model()
    lift = LIFT(named(first.module), **OPTIONS)
    train(first.module, lift, range(2), rank, world)
    file = io.BytesIO()
    torch.save({"model": first.module.state_dict(), "lift": lift.state_dict()}, file)
    lift.close()
    file.seek(0)
    saved = torch.load(file)
    m = model()
    m.module.load_state_dict(saved["model"])
    lift = LIFT(named(m.module), **OPTIONS)
    lift.load_state_dict(saved["lift"])
    train(m.module, lift, range(2, STEPS), rank, world)
    return snapshot(m.module), saved["lift"]


def sharded(family: str, rank: int, world: int) -> Any:
    """FSDP2: a run in one go, with its peak of dense gradients, and one resumed half way."""
    m, lift = dealt(world, family)
    dense = []
    for p in m.module.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda _: dense.append(sum(q.grad is not None for q in m.module.parameters()))
            )
    norms = train(m.module, lift, range(STEPS), rank, world)
    mine = {name: (len(local_part(p)), lift.state[p]["indices"].clone()) for name, p in named(m.module)}
    found: dict[str, Any] = {
        "weights": snapshot(m.module), "norms": norms, "chosen": mine, "dense": max(dense), "refreshes": lift.refreshes,
    }  # fmt: skip
    lift.close()
    m, lift = dealt(world, family)
    train(m.module, lift, range(2), rank, world)
    files = {"model": {k: local_part(v).clone() for k, v in m.module.state_dict().items()}, "lift": lift.state_dict()}
    lift.close()
    m, lift = dealt(world, family)
    for name, tensor in m.module.state_dict().items():
        local_part(tensor).copy_(files["model"][name])
    lift.load_state_dict(files["lift"])
    train(m.module, lift, range(2, STEPS), rank, world)
    found["resumed"] = snapshot(m.module)
    states: list[Any] = [None] * world
    dist.all_gather_object(states, files["lift"])
    try:
        lift.load_state_dict(states[(rank + 1) % world])
    except ValueError as error:
        found["another's state"] = str(error)
    lift.close()
    return found


def dealt(world: int, family: str) -> tuple[Model, LIFT]:
    m = model(family)
    mesh = init_device_mesh("cpu", (world,))
    for block in m.module.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(m.module, mesh=mesh)
    return m, LIFT(matrices_of(m.weights), **OPTIONS)


def overlaid(rank: int, world: int) -> Any:
    """Overlay values are ordinary parameters to DDP."""
    m = model()
    overlay = overlay_(m, density=0.1)
    through = DistributedDataParallel(m.module)
    adamw = torch.optim.AdamW(overlay.parameters(), lr=1e-3)
    for step in range(STEPS):
        (world * loss(through, IDS[step].chunk(world)[rank])).backward()
        adamw.step()
        adamw.zero_grad()
    return [p.detach().clone() for p in overlay.parameters()]


def by_gradient(rank: int, world: int) -> Any:
    """Entries chosen by gradients, one threshold over all matrices: chosen by the whole batch's."""
    m = model()
    lift = LIFT(named(m.module), **(OPTIONS | {"select": "movement", "scope": "global"}))
    train(m.module, lift, range(STEPS), rank, world)
    return {name: lift.state[p]["indices"].clone() for name, p in named(m.module)}, snapshot(m.module)


def switched(rank: int, world: int) -> Any:
    """As accelerate shards a model: parameters of an optimizer that is there already are replaced by sharded ones."""
    m = model()
    lift = LIFT(named(m.module), **OPTIONS)
    mesh = init_device_mesh("cpu", (world,))
    for block in m.module.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(m.module, mesh=mesh)
    lift.param_groups[0]["params"] = [p for _, p in named(m.module)]
    norms = train(m.module, lift, range(STEPS), rank, world)
    return {"weights": snapshot(m.module), "norms": norms, "shard": lift.param_groups[0]["shard"]}


def accelerated(rank: int, world: int) -> Any:
    """accelerate's own FSDP2 prepares model and optimizer. It does so on several accelerators only, so it is told that these are."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    m = model()
    lift = LIFT(named(m.module), **OPTIONS)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    host = Accelerator(cpu=True)
    host.state.distributed_type, host.state.fsdp_plugin = DistributedType.FSDP, plugin
    prepared, stepper = host.prepare(m.module, lift)
    norms = []
    for step in range(STEPS):
        host.backward(world * loss(prepared, IDS[step].chunk(world)[rank]))
        norms.append(float(lift.clip_grad_norm_(0.5)))
        stepper.step()
        stepper.zero_grad()
    return {"weights": snapshot(m.module), "norms": norms, "shard": lift.param_groups[0]["shard"]}


def hybrid(rank: int, world: int) -> Any:
    """Weights sharded over some processes and replicated over others: here two replicas of one shard each."""
    m = model()
    fully_shard(m.module, mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicas", "shards")))
    lift = LIFT(named(m.module), **OPTIONS)
    return {"norms": train(m.module, lift, range(STEPS), rank, world), "weights": snapshot(m.module)}


def hosted(rank: int, world: int) -> Any:
    """transformers.Trainer under DDP, with LIFT made before there is a process group; with the mixin and without."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from finetune.examples import Collate, examples, rows_of
    from finetune.hosts import Surgical
    from finetune.objectives import nll

    class Hosted(Surgical, Trainer):
        pass

    found = {}
    questions = chained_sums(12, seed=5, terms=(2, 3))
    for kind in ("with", "without"):
        m = model()
        lift = LIFT(named(m.module), **OPTIONS)
        rows = rows_of(examples([m.transcript(q.question, q.completion(m.markers)) for q in questions]))
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=3, per_device_train_batch_size=4 // world, report_to=[], use_cpu=True, disable_tqdm=True,
                remove_unused_columns=False, save_strategy="no", max_grad_norm=0.5 if kind == "with" else 0.0, seed=1,
                dataloader_pin_memory=False, lr_scheduler_type="constant", logging_steps=1,
            )  # fmt: skip
            host, own = (Hosted, {"objective": nll}) if kind == "with" else (Trainer, {})
            trainer: Any = host(
                m.module, arguments, train_dataset=Dataset.from_list(rows), data_collator=Collate(m.pad_id),
                optimizers=(lift, None), **own,
            )  # fmt: skip
            trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found[kind] = {"weights": snapshot(m.module), "norms": norms, "processes": lift.param_groups[0]["processes"]}
        found[kind]["exempt"] = len(getattr(m.module, "_ddp_params_and_buffers_to_ignore", ()))
        lift.close()
    return found


TUNED: dict[str, dict[str, Any]] = {
    "lift": {"batch_size": 8, "accumulate": 2, "steps": 3, "refresh": 2, "density": 0.1, "save_every": 2},
    "full": {"batch_size": 4, "steps": 2, "method": "full", "lr": 1e-3, "save_every": 1},
    "lora": {"batch_size": 8, "accumulate": 2, "steps": 2, "method": "lora", "lora_rank": 2},
    "shira": {"batch_size": 8, "accumulate": 2, "steps": 2, "method": "shira", "lora_rank": 2},
}
FAR = {
    "lift": 2e-5,
    "full": 2e-4,
    "lora": 2e-4,
    "shira": 2e-4,
}  # Adam divides gradients by their size: near 0 the order of a sum shows


def stamped(rank: int) -> Any:
    def stamp(m: Model, step: int) -> dict[str, float]:
        return {"rank": float(rank)}

    return stamp


def tuned(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """`tune` as a script under torchrun calls it, with a term; full tuning gives each process another folder for its checkpoints."""
    from finetune.monitors import every
    from finetune.objectives import asft
    from finetune.retention import Replay
    from finetune.tune import tune

    found: dict[str, Any] = {}
    shared: dict[str, Any] = {"autocast": False, "objective": asft(0.1), "schedule": "constant", "max_grad_norm": 0.5}
    for kind, options in TUNED.items():
        kept = (
            {"checkpoints": folder / (f"{kind}{rank}" if kind == "full" else kind)} if "save_every" in options else {}
        )
        for turn in (1, 2) if kind == "lift" else (1,):  # the second goes on from the checkpoint
            m = Model(*tiny("llama"))
            told = [m.transcript(q.question, q.completion(m.markers)) for q in chained_sums(20, seed=5, terms=(2, 3))]
            log = folder / f"{kind}{turn}.jsonl"
            done = tune(
                m, told[:16], terms=[Replay(told[16:], weight=0.7, batch_size=3)], watch=[every(1, stamped(rank), "stamp")], log=log,
                **shared, **options, **kept,
            )  # fmt: skip
            found[f"{kind}{turn}"] = {
                "weights": snapshot(m.module), "losses": done.losses, "norms": done.gradient_norms, "shares": done.shares["improbable"],
                "traces": sorted(m.module.__dict__),
            }  # fmt: skip
    if world > 1:
        m = Model(*tiny("llama"))
        try:
            tune(m, [m.transcript("1?", "2"), m.transcript("2?", "3")], steps=1, batch_size=3)
        except ValueError as error:
            found["refused"] = str(error)
    return found


TRAINED = {f"sharded {family}": functools.partial(sharded, family) for family in ("llama", "mixtral")}
JOBS = (
    averages,
    differing,
    choices,
    sick_shard,
    refusals,
    replicated,
    accumulated,
    one_sided,
    resumed,
    overlaid,
    by_gradient,
    switched,
    accelerated,
    hybrid,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together(2, {job.__name__: job for job in JOBS} | TRAINED, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together(3, {"choices": choices} | TRAINED, tmp_path_factory.mktemp("three"))


@functools.cache
def in_one(family: str = "llama") -> dict[str, Any]:
    return alone(family)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return in_one()


def agree(found: Any) -> Any:
    """What the processes gave, none having raised."""
    for mine in found:
        assert not (isinstance(mine, str) and mine.startswith("raised")), mine
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- replicated weights -------------------------------------------------------------------------------------------------------


def test_averages_are_over_processes_and_agreements_the_first_ones(two: dict[str, list[Any]]) -> None:
    for flat, here, agreed, single in agree(two["averages"]):
        assert flat[:4].tolist() == [0.0, 1.5, 1.0, 1.5]  # both; only the first process's [2, 3], halved
        assert here == [True, True, False]
        assert agreed == [[0, 7], []]
        assert single is None


def test_one_process_has_no_peers() -> None:
    assert Peers.of() is None


@pytest.mark.parametrize("kind", ["bare", "exempt", "ddp"])
def test_two_processes_are_one_with_the_whole_batch(kind: str, two: dict[str, list[Any]], one: dict[str, Any]) -> None:
    first, second = (found[kind] for found in agree(two["replicated"]))
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["norms"] == second["norms"]
    torch.testing.assert_close(first["norms"], one["norms"], rtol=1e-4, atol=0)
    close(first["weights"], one["weights"])
    for name, chosen in one["chosen"].items():
        assert torch.equal(first["chosen"][name], chosen), name
    start = snapshot(model().module)
    assert max(float((one["weights"][n] - start[n]).abs().max()) for n in start) > 1e-3  # far beyond the tolerance


def test_ddp_is_left_with_one_small_matrix(two: dict[str, list[Any]]) -> None:
    everything = {name: p.numel() for name, p in named(model().module)}
    for found in agree(two["replicated"]):
        exempted = set(found["exempt"]["exempted"])
        (left,) = set(everything) - exempted
        assert everything[left] == min(everything.values())


def test_where_more_is_trained_all_of_lifts_is_exempt() -> None:
    m = model()
    m.module.get_input_embeddings().weight.requires_grad_(True)
    lift = LIFT([pair for pair in named(m.module) if "embed" not in pair[0]], **OPTIONS)
    names = exempt_from_ddp(m.module, lift)
    assert sorted(names) == sorted(n for n, _ in named(m.module) if "embed" not in n)
    assert m.module._ddp_params_and_buffers_to_ignore == sorted(names)
    lift.close()


def test_micro_batches_are_reduced_once_a_step(two: dict[str, list[Any]]) -> None:
    expected = model()
    lift = LIFT(named(expected.module), **OPTIONS)
    for step in range(STEPS):
        loss(expected.module, IDS[step]).backward()
        lift.step()
    for weights, untouched in agree(two["accumulated"]):
        close(weights, snapshot(expected.module))
        assert untouched


def test_a_gradient_of_one_process_counts_in_all(two: dict[str, list[Any]]) -> None:
    (grads, first), (others, second) = agree(two["one_sided"])
    for a, b in zip([*grads, *first], [*others, *second], strict=True):
        assert torch.equal(a, b)
    assert grads[0].unique().tolist() == [1.0]
    assert grads[1].unique().tolist() == [0.5]
    assert len(grads[1]) == 2 * int(0.2 * 8 * 40)


def test_resume_in_two_processes_is_bit_identical(two: dict[str, list[Any]]) -> None:
    for straight, (weights, _) in zip(agree(two["replicated"]), agree(two["resumed"]), strict=True):
        for name, tensor in straight["bare"]["weights"].items():
            assert torch.equal(weights[name], tensor), name


def test_a_state_of_two_processes_is_refused_by_one(two: dict[str, list[Any]]) -> None:
    m = model()
    with LIFT(named(m.module), **OPTIONS) as lift:
        before = {name: lift.state[p]["exp_avg"].clone() for name, p in named(m.module)}
        with pytest.raises(ValueError, match="processes was 2, is 1"):
            lift.load_state_dict(agree(two["resumed"])[0][1])
        assert all(torch.equal(before[name], lift.state[p]["exp_avg"]) for name, p in named(m.module))


def test_processes_that_start_apart_are_refused(two: dict[str, list[Any]]) -> None:
    for said in two["differing"]:
        assert said.startswith("raised ValueError: other")
        assert "same checkpoint" in said


def test_an_overlay_under_ddp_is_the_whole_batch(two: dict[str, list[Any]]) -> None:
    m = model()
    overlay = overlay_(m, density=0.1)
    adamw = torch.optim.AdamW(overlay.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss(m.module, IDS[step]).backward()
        adamw.step()
        adamw.zero_grad()
    for found in agree(two["overlaid"]):
        for mine, expected in zip(found, overlay.parameters(), strict=True):
            torch.testing.assert_close(mine, expected.detach(), rtol=0, atol=2e-5)


def test_entries_are_chosen_by_the_gradient_of_the_whole_batch(two: dict[str, list[Any]]) -> None:
    expected = alone(select="movement", scope="global")
    for chosen, weights in agree(two["by_gradient"]):
        for name, indices in expected["chosen"].items():
            assert torch.equal(chosen[name], indices), name
        close(weights, expected["weights"])


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def launched(scripts: Path) -> dict[str, list[Any]]:
    """Two processes that begin their group as they train, as under torchrun."""
    jobs = {"hosted": hosted, "tuned": functools.partial(tuned, scripts)}
    return together(2, jobs, scripts, begun=False)


@pytest.fixture(scope="module")
def trainers(launched: dict[str, list[Any]]) -> list[Any]:
    return [hosted(0, 1), *agree(launched["hosted"])]


@pytest.fixture(scope="module")
def tunes(launched: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return [tuned(tmp_path_factory.mktemp("alone"), 0, 1), *agree(launched["tuned"])]


@pytest.mark.parametrize("kind", ["with", "without"])
def test_a_trainer_in_two_processes_is_one_with_the_whole_batch(kind: str, trainers: list[Any]) -> None:
    one, first, second = trainers
    assert [found[kind]["processes"] for found in (one, first, second)] == [1, 2, 2]
    for name, tensor in first[kind]["weights"].items():
        assert torch.equal(tensor, second[kind]["weights"][name]), name
    close(first[kind]["weights"], one[kind]["weights"])
    if kind == "with":
        assert [found[kind]["exempt"] for found in trainers] == [0, 20, 20]
        torch.testing.assert_close(first[kind]["norms"], one[kind]["norms"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", list(TUNED))
def test_tune_in_two_processes_is_tune_in_one(kind: str, tunes: list[Any]) -> None:
    """With a term, which counts once, over more than one epoch, and the same in both processes."""
    one, first, second = (found[f"{kind}1"] for found in tunes)
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    for what in ("losses", "norms", "shares"):
        assert first[what] == second[what]
        assert first[what] == pytest.approx(one[what], rel=1e-4), what
    close(first["weights"], one["weights"], FAR[kind])
    assert first["traces"] == one["traces"]  # nothing of DDP's stays
    start = snapshot(Model(*tiny("llama")).module)
    assert max(float((one["weights"][n] - start[n]).abs().max()) for n in start) > 1e-3


def test_tune_in_two_processes_resumes_bit_for_bit(tunes: list[Any]) -> None:
    for found in tunes:
        assert found["lift2"]["losses"] == found["lift1"]["losses"]
        for name, tensor in found["lift1"]["weights"].items():
            assert torch.equal(found["lift2"]["weights"][name], tensor), name


@pytest.mark.usefixtures("tunes")
def test_the_first_process_alone_writes(scripts: Path) -> None:
    from finetune.monitors import read_log

    for kind, options in TUNED.items():
        lines = [line for line in read_log(scripts / f"{kind}1.jsonl") if line["monitor"] == "stamp"]
        assert [line["step"] for line in lines] == list(range(options["steps"] + 1))  # each once
        assert {line["rank"] for line in lines} == {0}
    checkpoint = {p.name for p in (scripts / "full0" / "checkpoint-1").iterdir()}
    assert {"complete.json", "model.safetensors", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"} <= checkpoint
    # the second process keeps nothing but its own random state, and whose folder it is
    assert {p.name for p in (scripts / "full1").rglob("*") if p.is_file()} == {"rng_state_1.pth", "run.json"}


def test_what_two_processes_cannot_do_is_refused(tunes: list[Any]) -> None:
    for found in tunes[1:]:
        assert "1 micro-batches in each of 2 processes need a multiple of 2" in found["refused"]


# --- sharded weights ----------------------------------------------------------------------------------------------------------


def put_together(parts: list[tuple[int, Tensor]], width: int) -> list[int]:
    """Positions in the whole matrix, from every process's rows and the positions within them."""
    starts = itertools.accumulate((height * width for height, _ in parts), initial=0)
    return [int(i) + start for start, (_, index) in zip(starts, parts, strict=False) for i in index]


@pytest.mark.parametrize("world", ["two", "three"])
@pytest.mark.parametrize("select", SHARDED)
@pytest.mark.parametrize("rank", [1, 4, 50])
@pytest.mark.parametrize("together", [False, True])
def test_shards_choose_what_the_whole_matrices_would(
    world: str, select: Any, rank: int, together: bool, request: pytest.FixtureRequest
) -> None:
    found = agree(request.getfixturevalue(world)["choices"])
    expected = choose(candidates(select), select, rank, together=together)
    for i, W in enumerate(matrices()):
        parts = [mine[select, rank, together][i] for mine in found]
        assert sum(height for height, _ in parts) == len(W)
        assert all(index.dtype == torch.int32 for _, index in parts)
        assert put_together(parts, W.shape[1]) == expected[i].indices.tolist(), SHAPES[i]


@pytest.mark.parametrize("world", ["two", "three"])
def test_ties_between_shards_go_to_the_lowest_positions(world: str, request: pytest.FixtureRequest) -> None:
    found = agree(request.getfixturevalue(world)["choices"])
    parts = [mine["ties"][0] for mine in found]
    assert put_together(parts, 30) == principal_indices(tied(), 1, 5, "magnitude").tolist()
    assert put_together(parts, 30) == [5 * 30 + 7, 6 * 30 + 7, 7 * 30 + 7, 8 * 30 + 7, 18 * 30 + 3]
    for i, ones in enumerate((15, 7)):  # of 24 in two such matrices, the first has all that it can
        parts = [mine["ties together"][i] for mine in found]
        assert put_together(parts, 30) == sorted([*(30 * row + 7 for row in range(5, 5 + ones)), 18 * 30 + 3])


@pytest.mark.parametrize("world", ["two", "three"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sharded_training_is_the_whole_batch_in_one_process(
    world: str, family: str, request: pytest.FixtureRequest
) -> None:
    one, found = in_one(family), agree(request.getfixturevalue(world)[f"sharded {family}"])
    for mine in found:
        torch.testing.assert_close(mine["norms"], one["norms"], rtol=1e-4, atol=0)
        close(mine["weights"], one["weights"])
        assert mine["dense"] == 0  # each gradient is gone before the next one comes
        for ours, alone in zip(mine["refreshes"], one["refreshes"], strict=True):
            assert (ours.step, ours.overlap) == (alone.step, alone.overlap)
    widths = {name: p.shape[1:].numel() for name, p in named(model(family).module)}
    for name, chosen in one["chosen"].items():
        assert put_together([mine["chosen"][name] for mine in found], widths[name]) == chosen.tolist(), name


@pytest.mark.parametrize("world", ["two", "three"])
@pytest.mark.parametrize("job", list(TRAINED))
def test_sharded_resume_is_bit_identical(world: str, job: str, request: pytest.FixtureRequest) -> None:
    for mine in agree(request.getfixturevalue(world)[job]):
        for name, tensor in mine["weights"].items():
            assert torch.equal(mine["resumed"][name], tensor), name
        assert "shard was" in mine["another's state"]


@pytest.mark.parametrize("job", ["switched", "accelerated", "hybrid"])
def test_other_ways_to_shard_train_alike(job: str, two: dict[str, list[Any]], one: dict[str, Any]) -> None:
    for rank, mine in enumerate(agree(two[job])):
        torch.testing.assert_close(mine["norms"], one["norms"], rtol=1e-4, atol=0)
        close(mine["weights"], one["weights"])
        assert mine.get("shard", rank) == rank


def test_a_sick_shard_is_named_in_every_process(two: dict[str, list[Any]]) -> None:
    for said in two["sick_shard"]:
        assert said.startswith("raised ValueError: cannot choose entries of sick: the matrix holds NaN")


def test_what_shards_cannot_do_is_refused(two: dict[str, list[Any]]) -> None:
    for said in agree(two["refusals"]):
        for text, wanted in zip(
            said,
            (
                "wide is placed",
                "part is sharded and whole is not",
                "select='hybrid'",
                "block=4",
                "grow_to=0.9",
                "agreement=0.9",
            ),
            strict=True,
        ):
            assert wanted in text
