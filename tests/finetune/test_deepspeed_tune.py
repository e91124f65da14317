"""`tune` under a launcher that asks for DeepSpeed, two processes on this CPU: it trains what one process trains, and gives whole models back."""

from __future__ import annotations

import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import trl
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback

from finetune.distributed import is_partitioned, under_deepspeed
from finetune.grpo import grpo
from finetune.monitors import every, read_log
from finetune.objectives import kl_to_base, nll
from finetune.retention import Replay
from finetune.rules import DRIFT
from finetune.tune import tune
from surgery.model import Model
from tests.families import tiny
from tests.hosted import belongings
from tests.processes import together

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

SHARED: dict[str, Any] = {"steps": 2, "batch_size": 8, "accumulate": 2, "max_grad_norm": 0.5, "autocast": False}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {  # of a ZeRO stage
    "lift": (0, {"method": "lift", "density": 0.1, "filter_rank": 4, "refresh": 1}),
    "full 0": (0, {"method": "full"}),
    "full 1": (1, {"method": "full"}),
    "full 2": (2, {"method": "full"}),
    "full 3": (3, {"method": "full"}),
    "lora 2": (2, {"method": "lora", "lora_rank": 2}),
    "lora 3": (3, {"method": "lora", "lora_rank": 2}),
    "shira 1": (1, {"method": "shira", "lora_rank": 2}),
    "terms 3": (3, {"method": "full", "terms": [0.7]}),
    "reference 3": (3, {"method": "full", "objective": nll + 0.5 * kl_to_base}),
    "drift 0": (0, {"method": "full"}),
    "drift 2": (2, {"method": "full"}),
    "drift 3": (3, {"method": "full"}),
    "watch 2": (2, {"method": "full"}),
}
LOW = ("autocast 2", "autocast 3")  # rounded otherwise in other micro-batches
RESUMED = ("lift", "full 0", "full 2", "full 3", "lora 2")


class Watched(TrainerCallback):
    """Whether the weights are dealt out while they train; it stops the training in all processes in the midst of a step."""

    def __init__(self, model: Model, stop: int | None = None) -> None:
        self.model, self.stop, self.engine, self.dealt = model, stop, False, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.engine, self.dealt = under_deepspeed(), all(map(is_partitioned, self.model.module.parameters()))
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def start(seed: int = 0) -> tuple[Model, list[Any]]:
    m = Model(*tiny("llama", seed))
    sums = [(f"{i}+{i * i}", i + i * i) for i in range(3, 23)]
    return m, [m.transcript(f"{asked}=?", f"{asked}={answer}.") for asked, answer in sums]


def weights(m: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.module.named_parameters()}


def told(m: Model, done: Any) -> dict[str, Any]:
    return {"weights": weights(m), "losses": done.losses, "norms": done.gradient_norms}


def run(kind: str, folder: Path) -> dict[str, Any]:
    """A run; of some kinds also one that is stopped before its last step, and taken up again."""
    stage, options = RUNS.get(kind) or (int(kind[-1]), {"method": "full", "autocast": True})
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    options, log = SHARED | options, folder / f"{os.environ.get('RANK')}.jsonl"
    if "terms" in options:
        options["terms"] = [Replay(start()[1][:4], weight=weight, batch_size=2) for weight in options["terms"]]
    if kind.startswith("watch"):
        options |= {
            "watch": [every(1, lambda m, step: {"norm": float(m.module.lm_head.weight.norm())}, "norm")],
            "log": log,
        }
    m, data = start()
    m.module.model.norm.weight.requires_grad_(False)
    before, watched = belongings(m), Watched(m)
    drift = [DRIFT(start(seed=4)[0].weights - m.weights, m, log_every=1)] if kind.startswith("drift") else []
    found = told(m, tune(m, data, callbacks=[*drift, watched], **options))
    after = belongings(m)
    found |= {"engine": watched.engine, "dealt": watched.dealt}
    found["changed"] = [key for key, value in before.items() if after[key] != value]
    if drift:
        found["merged"] = [line.merged for line in drift[0].readings.lines if line.site == "all"]
        found["merged"].append(drift[0].merged().overall)
    if kind.startswith("watch") and log.exists():
        found["log"] = [entry["norm"] for entry in read_log(log) if "norm" in entry]
    if kind not in RESUMED:
        return found
    kept: dict[str, Any] = {"checkpoints": folder / kind, "save_every": 1}
    m, data = start()
    before, first = belongings(m), weights(m)
    try:
        tune(m, data, callbacks=[Watched(m, stop=1)], **options, **kept)
    except KeyboardInterrupt:
        after = belongings(m)
        found["stopped"] = [key for key, value in before.items() if after[key] != value]
        found["as begun"] = all(torch.equal(p, first[name]) for name, p in weights(m).items())
    m, data = start()
    found["resumed"] = told(m, tune(m, data, **options, **kept))
    return found


def refused() -> dict[str, tuple[str, bool]]:
    found: dict[str, tuple[str, bool]] = {}

    def attempt(name: str, stage: int, environment: dict[str, str] | None = None, **options: Any) -> None:
        m, data = start()
        before, first, said = belongings(m), weights(m), "trained"
        try:
            with patch.dict(os.environ, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} | (environment or {})):
                if options.get("method") == "grpo":
                    grpo(m, ["a", "b"], lambda question, transcript: 1.0, steps=1, groups=2, samples=2)
                else:
                    tune(m, data, **SHARED | {"method": "full"} | options)
        except ValueError as error:
            said = str(error)
        same = belongings(m) == before and all(torch.equal(p, first[n]) for n, p in weights(m).items())
        found[name] = said, same

    for stage in (1, 2, 3):
        attempt(f"lift {stage}", stage, method="lift", density=0.1)
    attempt("watch", 3, watch=[every(1, lambda m, step: {"one": 1.0}, "one")], log="watched.jsonl")
    attempt("grpo", 2, method="grpo")
    attempt("offload", 2, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})
    return found


def launched(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """As by accelerate launch --use_deepspeed --zero_stage STAGE --mixed_precision bf16, on a machine without an accelerator: DeepSpeed is not for
    accelerate's CPU mode."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"})
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    given = trl.SFTConfig

    def on_this_cpu(**options: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
        return given(**options | {"use_cpu": False, "accelerator_config": {"use_configured_state": True}})

    elsewhere = patch.object(torch.Tensor, "cpu", lambda tensor: tensor.detach().clone())  # as from an accelerator
    with elsewhere, patch.object(trl, "SFTConfig", on_this_cpu):
        found: dict[str, Any] = {kind: run(kind, folder) for kind in (*RUNS, *LOW)}
        return found | {"refused": refused(), "whole": weights(start()[0])}  # a model that is made afterwards


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tuned")
    given = together(2, {"all": functools.partial(launched, folder)}, folder, begun=False)["all"]
    for mine in given:
        assert not isinstance(mine, str), mine
    return given


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_train_what_one_trains_and_have_it_whole(
    kind: str, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    one = run(kind, tmp_path)
    assert not one["engine"]
    for mine in (found[0][kind], found[1][kind]):
        assert mine["engine"]
        assert mine["dealt"] == (RUNS[kind][0] == 3)
        assert mine["changed"] == []
        assert mine["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert mine["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(mine["weights"][name], tensor, rtol=0, atol=2e-5)
        if "merged" in one:
            assert mine["merged"] == pytest.approx(one["merged"], rel=1e-4)
            assert len(mine["merged"]) == 3
    if "log" in one:
        assert found[0][kind]["log"] == pytest.approx(one["log"], rel=1e-5)
        assert "log" not in found[1][kind]


@pytest.mark.parametrize("kind", LOW)
def test_it_computes_in_bf16_where_that_is_asked(kind: str, found: list[dict[str, Any]], tmp_path: Path) -> None:
    one, fine = run(kind, tmp_path)["losses"], found[0]["full 2"]["losses"]
    for mine in (found[0][kind], found[1][kind]):
        assert mine["losses"] == pytest.approx(one, rel=2e-3)
        assert mine["losses"] != pytest.approx(fine, rel=1e-4)
        assert {tensor.dtype for tensor in mine["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_stopped_run_goes_on_to_the_bit(kind: str, found: list[dict[str, Any]]) -> None:
    for mine in (found[0][kind], found[1][kind]):
        assert mine["stopped"] == []
        assert mine["as begun"] == (kind != "lift")  # which has the weights themselves, as in one process
        for name, tensor in mine["weights"].items():
            assert torch.equal(mine["resumed"]["weights"][name], tensor), name


def test_what_cannot_be_is_refused_and_leaves_the_model(found: list[dict[str, Any]]) -> None:
    told = {
        **{f"lift {stage}": f"ZeRO stage {stage} deals" for stage in (1, 2, 3)},
        "watch": "The recorder reads whole weights, and under ZeRO stage 3",
        "grpo": "The launcher asks for DeepSpeed, and grpo needs the weights whole",
        "offload": r"keep things on the cpu \(offload_optimizer\), with which no training here was tried",
    }
    for mine in found:
        assert mine["refused"].keys() == told.keys()
        for name, words in told.items():
            said, same = mine["refused"][name]
            assert re.search(words, said), (name, said)
            assert same, name
        for name, tensor in weights(start()[0]).items():
            assert torch.equal(mine["whole"][name], tensor)
