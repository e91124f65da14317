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
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune.monitors import Recorder, every
from finetune.rules import DRIFT, pull
from surgery.weights import linear_sites
from tests import hosted
from tests.hosted import CLIP, KINDS, STEPS, Hosted, Seen, model, prior, stepper, trainer_of
from tests.processes import together

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def arguments(folder: Any, world: int, stage: int, low: str | None = None, **more: Any) -> TrainingArguments:
    """low: bf16 or fp16, of DeepSpeed's own; transformers allows them on a GPU alone, so that it is told after its checks."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage}} | dict.fromkeys(auto, "auto")
    if low:
        config |= {low: {"enabled": True}}
    # accelerate has no backend for several processes without an accelerator, but for its CPU mode
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")
    config |= more.pop("config", {})
    given = {"deepspeed": config, "use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    found = hosted.arguments(folder, world, **given, **more)
    if low:
        setattr(found, low, True)
        found.hf_deepspeed_config.mismatches.clear()
    return found


def run(kind: str, world: int, stage: int, low: str | None = None, **drifting: Any) -> dict[str, Any]:
    return hosted.run(kind, lambda folder: arguments(folder, world, stage, low), **drifting)


# --- what the processes do ----------------------------------------------------------------------------------------------


def on_this_cpu() -> None:
    """DeepSpeed is not for accelerate's CPU mode: it is a machine without an accelerator that trains here."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"})


def trained(rank: int, world: int) -> Any:
    on_this_cpu()
    found = {kind: run(kind, world, stage=0) for kind in KINDS}
    for stage in (1, 2, 3):
        for kind in ("adamw", "drift"):
            found[f"{kind} {stage}"] = run(kind, world, stage)
            unset_hf_deepspeed_config()  # that of stage 3 would have the next model made in pieces
        found[f"bf16 {stage}"] = run("drift", world, stage, "bf16", store="lazy", alpha=2.0)
        unset_hf_deepspeed_config()
    return found


class Whole(hosted.Hosted):
    """The backward pass goes whole, as it does under DeepSpeed: bf16 rounds the sum of its pieces otherwise."""

    def _may_cut(self, model: Any) -> bool:
        return False


def under_ddp(rank: int, world: int) -> Any:
    return hosted.run("bf16", functools.partial(hosted.arguments, world=world), Whole)


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
        *((f"lift {stage}", "lift", stage, {}, Hosted) for stage in (1, 2, 3)),
        *((f"{kind} bf16", kind, 0, {"low": "bf16"}, Hosted) for kind in ("lift", "drift")),
        *((f"{kind} plain", kind, 0, {}, Trainer) for kind in ("lift", "drift")),
        ("drift plain 2", "drift", 2, {}, Trainer),
        ("update 1", "update", 1, {}, Hosted),
        ("legacy 3", "legacy", 3, {}, Hosted),
        ("drift fp16", "drift", 2, {"low": "fp16"}, Hosted),
        (
            "drift offload",
            "drift",
            2,
            {"config": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
            Hosted,
        ),
        ("lift optimizer", "lift", 0, {"config": optimizer}, Hosted),
        ("lift offload", "lift", 0, {"config": offload}, Hosted),
        ("recorder 3", "full", 3, {}, Trainer),
    ]
    for name, kind, stage, options, host in cases:
        m = model("drift" if kind in ("full", "legacy") else kind)
        lift = stepper(kind, m) if kind == "lift" else None
        before = {n: p.detach().clone() for n, p in m.module.named_parameters()}
        with TemporaryDirectory() as folder:
            watch = Recorder(m, [every(1, lambda model, step: {"one": 1.0}, "one")], Path(folder) / "log.jsonl")
            pulled = {"drift": {}, "update": {"form": "update"}, "legacy": {"legacy": True}}
            callbacks = [DRIFT(prior(), m, **pulled[kind])] if kind in pulled else [watch] if kind == "full" else []
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
    return {kind: hosted.run(kind) for kind in KINDS}


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
        close([line[2] for line in mine["readings"]], [line[2] for line in expected["readings"]])
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


@pytest.mark.parametrize("kind", ["adamw", "drift"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_tuning_is_that_of_a_plain_trainer_at_every_stage(
    stage: int, kind: str, deep: dict[str, list[Any]], plain: dict[str, Any]
) -> None:
    """With DRIFT as well: readings, of the merge coefficient too, and weights."""
    for mine in (found[f"{kind} {stage}"] for found in deep["trained"]):
        torch.testing.assert_close(mine["losses"], plain[kind]["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(mine["norms"], plain[kind]["norms"], rtol=1e-5, atol=0)
        for ours, theirs in zip(mine["readings"], plain[kind]["readings"], strict=True):
            assert ours[2:] == pytest.approx(theirs[2:], rel=1e-3, abs=1e-6)
        for name, tensor in plain[kind]["weights"].items():
            torch.testing.assert_close(mine["weights"][name], tensor, rtol=1e-4, atol=2e-5)


def test_density_1_is_adamw_under_deepspeed(deep: dict[str, list[Any]]) -> None:
    for mine in deep["trained"]:
        for name, tensor in mine["adamw"]["weights"].items():
            torch.testing.assert_close(mine["whole"]["weights"][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["drift", *(f"{dtype} {stage}" for dtype in ("drift", "bf16") for stage in (1, 2, 3))])
def test_drift_bends_what_was_reduced_and_clipped(kind: str, deep: dict[str, list[Any]]) -> None:
    m, alpha = model("drift"), 2.0 if kind.startswith("bf16") else 1.0
    towards = {
        m.anatomy.places[site].name: tensor for site, tensor in prior().items() if site in linear_sites(m.weights)
    }
    close = {"rtol": 2e-2, "atol": 1e-5} if kind.startswith("bf16") else {}
    for mine in (found[kind] for found in deep["trained"]):
        assert len(mine["before"]) == STEPS
        for before, after in zip(mine["before"], mine["after"], strict=True):
            norm = torch.stack([g.float().square().sum() for g in before.values()]).sum().sqrt()
            torch.testing.assert_close(float(norm), CLIP, rtol=1e-2 if close else 1e-4, atol=0)
            for name, grad in before.items():
                bent = pull(grad.float(), towards[name], alpha) if name in towards else grad.float()
                torch.testing.assert_close(after[name].float(), bent, **close)


def test_a_resumed_run_is_bit_identical(deep: dict[str, list[Any]]) -> None:
    for whole, again in deep["resumed"]:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


@pytest.mark.parametrize("deep", [1], indirect=True)
@pytest.mark.parametrize(
    ("case", "said"),
    [
        *((f"lift {stage}", rf"ZeRO stage {stage} .*LIFT.*stage to 0.*FSDP2") for stage in (1, 2, 3)),
        ("lift bf16", "DeepSpeed's bf16 .*dtype='bfloat16'"),
        ("drift bf16", "bf16 at ZeRO stage 0 .*Use stage 1, 2 or 3"),
        ("lift plain", "Surgical"),
        ("drift plain", "Surgical"),
        ("drift plain 2", "Surgical"),
        ("update 1", "'update'.*form='gradient'"),
        ("legacy 3", "legacy .*Leave legacy out"),
        ("drift fp16", "fp16.*bf16 or fp32"),
        ("drift offload", "offload_optimizer.*Leave it out"),
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
