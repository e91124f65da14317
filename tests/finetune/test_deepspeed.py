"""LIFT and DRIFT under DeepSpeed, in real processes: at ZeRO stage 0 they train as a plain Trainer does, and what cannot be is refused."""

from __future__ import annotations

import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from analyses.tasks import chained_sums
from finetune.examples import Collate, examples, rows_of
from finetune.hosts import Surgical
from finetune.lift import LIFT, matrices_of
from finetune.monitors import Recorder, every
from finetune.objectives import nll
from finetune.rules import DRIFT, pull
from surgery.model import Model
from surgery.weights import linear_sites
from tests.families import tiny
from tests.processes import together

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

OPTIONS: dict[str, Any] = {"lr": 1e-3, "filter_rank": 4, "weight_decay": 0.1, "refresh": 2}
KINDS = ("lift", "bf16", "movement", "whole", "adamw", "drift", "update", "both")
STEPS, CLIP = 4, 0.5


class Hosted(Surgical, Trainer):
    pass


class Seen(TrainerCallback):
    """Copies of the gradients as they are before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def model(kind: str) -> Model:
    m = Model(*tiny("llama", dtype=torch.bfloat16 if kind == "bf16" else torch.float32))
    matrices = {id(m.weights.parameter(site)) for site in linear_sites(m.weights)}
    for p in m.module.parameters():
        p.requires_grad_(kind in ("drift", "update") or id(p) in matrices)
    return m


def prior() -> Any:
    return Model(*tiny("llama", seed=4)).weights - Model(*tiny("llama")).weights


def stepper(kind: str, m: Model) -> LIFT | None:
    more: dict[str, Any] = {"movement": {"select": "movement"}, "whole": {"density": 1.0, "refresh": None}}
    options = OPTIONS | {"density": 0.1} | more.get(kind, {})
    return None if kind in ("adamw", "drift", "update") else LIFT(matrices_of(m.weights), **options)


def arguments(folder: Any, world: int, stage: int | None, **more: Any) -> TrainingArguments:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}} | dict.fromkeys(auto, "auto")
    options: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "weight_decay": 0.1, "max_grad_norm": CLIP, "seed": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": False, "use_cpu": stage is None,
    }  # fmt: skip
    if (
        stage is not None
    ):  # accelerate has no backend for several processes without an accelerator, but for its CPU mode
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
        options["accelerator_config"] = {"use_configured_state": True}
    config |= more.pop("config", {})
    return TrainingArguments(str(folder), deepspeed=None if stage is None else config, **(options | more))


def trainer_of(m: Model, args: TrainingArguments, lift: LIFT | None, host: Any = Hosted, callbacks: Any = ()) -> Any:
    from datasets import Dataset

    rows = rows_of(examples([m.transcript(q.question, q.completion(m.markers)) for q in chained_sums(16, seed=5)]))
    own = {"objective": nll} if host is Hosted else {}
    return host(
        m.module, args, train_dataset=Dataset.from_list(rows), data_collator=Collate(m.pad_id), optimizers=(lift, None),
        callbacks=list(callbacks), **own,
    )  # fmt: skip


def run(kind: str, world: int = 1, stage: int | None = None) -> dict[str, Any]:
    m = model(kind)
    lift, before, after = stepper(kind, m), Seen(), Seen()
    form: Any = "update" if kind == "update" else "gradient"
    drift = DRIFT(prior(), m, form=form, log_every=1) if kind in ("drift", "update", "both") else None
    with TemporaryDirectory() as folder:
        args = arguments(folder, world, stage)
        trainer = trainer_of(m, args, lift, callbacks=[before, *([drift] if drift else []), after])
        trainer.train()
    found = {
        "weights": {name: p.detach().clone() for name, p in m.module.named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "chosen": {},
        "before": before.steps,
        "after": after.steps,
        "merged": drift.merged().overall if drift else 0.0,
    }
    if lift is not None:
        found["chosen"] = {name: lift.state[p]["indices"].clone() for name, p in matrices_of(m.weights)}
        lift.close()
    return found


# --- what the processes do ----------------------------------------------------------------------------------------------


def on_this_cpu() -> None:
    """DeepSpeed is not for accelerate's CPU mode: it is a machine without an accelerator that trains here."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"})


def trained(rank: int, world: int) -> Any:
    on_this_cpu()
    found = {kind: run(kind, world, stage=0) for kind in KINDS}
    for stage in (1, 2, 3):
        found[f"adamw {stage}"] = run("adamw", world, stage)
        unset_hf_deepspeed_config()  # that of stage 3 would have the next model made in pieces
    return found


def under_ddp(rank: int, world: int) -> Any:
    return run("bf16", world)


def resumed(folder: Path, rank: int, world: int) -> Any:
    """A run that saves half way, and another of other weights that goes on from there."""
    on_this_cpu()
    found = []
    for turn in range(2):
        m = model("both")
        lift, drift, seen = stepper("both", m), DRIFT(prior(), m), Seen()
        if turn:
            torch._foreach_mul_([p.detach() for p in m.module.parameters()], 1.1)
        args = arguments(folder, world, 0, save_strategy="steps", save_steps=2)
        trainer = trainer_of(m, args, lift, callbacks=[drift, seen])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if turn else None)
        assert len(seen.steps) == (STEPS - 2 if turn else STEPS)
        found.append({name: p.detach().clone() for name, p in m.module.named_parameters()})
    return found


def refused(rank: int, world: int) -> Any:
    on_this_cpu()
    found: dict[str, Any] = {}
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}}
    offload = {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
    cases: list[tuple[str, str, int, dict[str, Any], Any]] = [
        *((f"{kind} {stage}", kind, stage, {}, Hosted) for kind in ("lift", "drift") for stage in (1, 2, 3)),
        ("lift bf16", "lift", 0, {"config": {"bf16": {"enabled": True}}}, Hosted),
        *((f"{kind} plain", kind, 0, {}, Trainer) for kind in ("lift", "drift")),
        ("lift optimizer", "lift", 0, {"config": optimizer}, Hosted),
        ("lift offload", "lift", 0, {"config": offload}, Hosted),
        ("recorder 3", "full", 3, {}, Trainer),
    ]
    for name, kind, stage, options, host in cases:
        m = model("drift" if kind == "full" else kind)
        lift = stepper("drift" if kind == "full" else kind, m)
        before = {n: p.detach().clone() for n, p in m.module.named_parameters()}
        with TemporaryDirectory() as folder:
            watch = Recorder(m, [every(1, lambda model, step: {"one": 1.0}, "one")], Path(folder) / "log.jsonl")
            callbacks = {"drift": lambda m=m: [DRIFT(prior(), m)], "full": lambda w=watch: [w]}.get(kind, list)()
            try:
                trainer_of(m, arguments(folder, world, stage, **options), lift, host, callbacks).train()
                found[name] = "trained"
            except ValueError as error:
                found[name] = str(error)
        unset_hf_deepspeed_config()
        if lift:
            lift.close()
        same = all(torch.equal(p, before[n]) for n, p in m.module.named_parameters() if p.numel())
        found[name] = (found[name], same)
    m = model("adamw")
    with TemporaryDirectory() as folder:
        trainer = trainer_of(m, arguments(folder, world, 0), None)
        trainer.train()
        once = {n: p.detach().clone() for n, p in m.module.named_parameters()}
        try:
            trainer.train()
        except RuntimeError as error:
            found["twice"] = (str(error), all(torch.equal(p, once[n]) for n, p in m.module.named_parameters()))
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return {kind: run(kind) for kind in KINDS}


@pytest.fixture(scope="module", params=[1, 2])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What one process gave, or two with as many rows together."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs: dict[str, Any] = {"under_ddp": under_ddp, "trained": trained, "resumed": functools.partial(resumed, folder)}
    if request.param == 1:
        jobs["refused"] = refused
    found = together(request.param, jobs, tmp_path_factory.mktemp("deep"), begun=False)
    for job, given in found.items():
        for mine in given:
            assert not isinstance(mine, str), f"{job} {mine}"
    return found


# --- the laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stage_0_trains_as_a_plain_trainer(kind: str, deep: dict[str, list[Any]], plain: dict[str, Any]) -> None:
    """Accumulated over two micro-batches, clipped, with a falling lr: losses, norms, masks and weights."""
    # a pass in bf16 is rounded by how many rows go through it together, so that two processes are compared with two under DDP
    expected = deep["under_ddp"][0] if kind == "bf16" else plain[kind]
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)
    for mine in (found[kind] for found in deep["trained"]):
        close(mine["losses"], expected["losses"])
        close(mine["norms"], expected["norms"])
        close(mine["merged"], expected["merged"])
        assert min(expected["norms"]) > CLIP  # every step is clipped
        assert all(torch.equal(mine["chosen"][name], chosen) for name, chosen in expected["chosen"].items())
        for name, tensor in expected["weights"].items():
            close(mine["weights"][name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    start = dict(model(kind).module.named_parameters())
    moved = {name: int((tensor != start[name]).sum()) for name, tensor in deep["trained"][0][kind]["weights"].items()}
    assert any(moved.values())
    if kind == "lift":
        for name, p in start.items():  # two choices of a tenth
            assert moved[name] <= 2 * (p.numel() // 10 + 1) if p.requires_grad else moved[name] == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_tuning_is_that_of_a_plain_trainer_at_every_stage(
    stage: int, deep: dict[str, list[Any]], plain: dict[str, Any]
) -> None:
    for mine in (found[f"adamw {stage}"] for found in deep["trained"]):
        torch.testing.assert_close(mine["losses"], plain["adamw"]["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(mine["norms"], plain["adamw"]["norms"], rtol=1e-5, atol=0)


def test_density_1_is_adamw_under_deepspeed(deep: dict[str, list[Any]]) -> None:
    for mine in deep["trained"]:
        for name, tensor in mine["adamw"]["weights"].items():
            torch.testing.assert_close(mine["whole"]["weights"][name], tensor, rtol=1e-5, atol=1e-6)


def test_drift_bends_what_was_reduced_and_clipped(deep: dict[str, list[Any]]) -> None:
    m = model("drift")
    towards = {
        m.anatomy.places[site].name: tensor for site, tensor in prior().items() if site in linear_sites(m.weights)
    }
    for mine in (found["drift"] for found in deep["trained"]):
        assert len(mine["before"]) == STEPS
        for before, after in zip(mine["before"], mine["after"], strict=True):
            norm = torch.stack([g.square().sum() for g in before.values()]).sum().sqrt()
            torch.testing.assert_close(float(norm), CLIP, rtol=1e-4, atol=0)
            for name, grad in before.items():
                torch.testing.assert_close(after[name], pull(grad, towards[name]) if name in towards else grad)


def test_a_resumed_run_is_bit_identical(deep: dict[str, list[Any]]) -> None:
    for whole, again in deep["resumed"]:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


@pytest.mark.parametrize("deep", [1], indirect=True)
@pytest.mark.parametrize(
    ("case", "said"),
    [
        *((f"lift {stage}", rf"ZeRO stage {stage} .*LIFT.*stage to 0.*FSDP2") for stage in (1, 2, 3)),
        *((f"drift {stage}", rf"ZeRO stage {stage} .*DRIFT.*stage to 0.*DDP") for stage in (1, 2, 3)),
        ("lift bf16", "DeepSpeed's bf16 .*dtype='bfloat16'"),
        ("lift plain", "Surgical"),
        ("drift plain", "Surgical"),
        ("lift optimizer", "optimizer of its own.*Leave"),
        ("lift offload", "offload_optimizer"),
        ("recorder 3", "ZeRO stage 3.*recorder"),
        ("twice", "once under DeepSpeed.*another trainer"),
    ],
)
def test_what_cannot_be_right_is_refused_before_a_step(case: str, said: str, deep: dict[str, list[Any]]) -> None:
    for found in deep["refused"]:
        text, untouched = found[case]
        assert re.search(said, text), text
        assert untouched
