"""`tune` under a launcher that asks for FSDP2, two processes on this CPU: it trains what one process trains, and gives whole models back."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import trl
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerState

from finetune.distributed import is_sharded, local_part, under_fsdp
from finetune.monitors import every
from finetune.retention import Replay
from finetune.rules import DRIFT
from finetune.tune import tune
from surgery.model import Model
from tests.families import tiny
from tests.hosted import belongings
from tests.processes import together

ASKED = {  # as by accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --mixed_precision bf16
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}
SHARED: dict[str, Any] = {"steps": 2, "batch_size": 8, "accumulate": 2, "max_grad_norm": 0.5, "autocast": False}
RUNS: dict[str, dict[str, Any]] = {
    "lift": {"method": "lift", "density": 0.1, "filter_rank": 4, "refresh": 1, "save_every": 1},
    "full": {"method": "full", "save_every": 1},
    "lora": {"method": "lora", "lora_rank": 2},
    "shira": {"method": "shira", "lora_rank": 2},
}


class Sharding(trl.SFTTrainer):
    """accelerate shards on several accelerators only, so it is told that these are."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        PartialState._shared_state["distributed_type"] = self.accelerator.state.distributed_type
        assert under_fsdp()


class Watched(TrainerCallback):
    """Whether the weights are dealt out while they train, of which type they are, and whether gradients are finer than bf16; it stops the
    training in all processes in the midst of a step."""

    def __init__(self, model: Model, stop: int | None = None) -> None:
        self.model, self.stop, self.sharded, self.fine = model, stop, False, False
        self.dtypes: set[torch.dtype] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        params = list(self.model.module.parameters())
        self.sharded, self.dtypes = all(map(is_sharded, params)), {p.dtype for p in params}
        grads = [local_part(p.grad) for p in params if p.grad is not None]
        self.fine = any(not torch.equal(grad, grad.bfloat16().to(grad.dtype)) for grad in grads)
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def start(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Model, list[Any]]:
    m = Model(*tiny("llama", seed, dtype))
    sums = [(f"{i}+{i * i}", i + i * i) for i in range(3, 23)]
    return m, [m.transcript(f"{asked}=?", f"{asked}={answer}.") for asked, answer in sums]


def weights(m: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.module.named_parameters()}


def told(m: Model, done: Any) -> dict[str, Any]:
    return {"weights": weights(m), "losses": done.losses, "norms": done.gradient_norms, "FSDP": done.settings["FSDP"]}


def run(kind: str, folder: Path | None = None) -> dict[str, Any]:
    """A run; with a folder, stopped before its last step and taken up by another model of other weights."""
    options = SHARED | RUNS[kind]
    every_so_often = options.pop("save_every", None)
    m, data = start()
    m.module.model.norm.weight.requires_grad_(False)
    before, watched = belongings(m), Watched(m)
    found = told(m, tune(m, data, callbacks=[watched], **options))
    after = belongings(m)
    found |= {"sharded": watched.sharded, "changed": [key for key, value in before.items() if after[key] != value]}
    if folder is None or every_so_often is None:
        return found
    kept: dict[str, Any] = {"checkpoints": folder / kind, "save_every": every_so_often}
    m, data = start()
    before, first = belongings(m), weights(m)
    try:
        tune(m, data, callbacks=[Watched(m, stop=1)], **options, **kept)
    except KeyboardInterrupt:
        after = belongings(m)
        found["stopped"] = [key for key, value in before.items() if after[key] != value]
        found["as begun"] = all(torch.equal(p, first[name]) for name, p in weights(m).items())
    found["resumed"] = told(m, tune(m, data, **options, **kept))  # of the model that was stopped
    return found


def drifted() -> dict[str, Any]:
    """How far two trainings of one model have come along a vector, by the last reading of each and when the model is whole again; and what DRIFT
    says where a training has it whole."""
    m, data = start()
    m.module.register_buffer("kept", torch.ones(2))  # is saved with the weights, and dealt out by nobody
    pulled = DRIFT(start(seed=4)[0].weights - m.weights, m, log_every=1)
    found: dict[str, Any] = {"read": [], "now": []}
    for _ in range(2):
        tune(m, data, callbacks=[pulled], **SHARED | {"method": "full", "steps": 1})
        found["read"].append([line for line in pulled.readings.lines if line.site == "all"][-1].merged)
        found["now"].append(pulled.merged().overall)
    torch._foreach_mul_([p.detach() for p in m.module.parameters()], 1.1)
    found["moved"] = pulled.merged().overall
    try:
        pulled.on_train_begin(None, TrainerState(), None)
    except ValueError as error:
        found["said"] = str(error)
    return found


def bf16() -> dict[str, Any]:
    """Weights in bf16, and fp32 ones computed with in bf16, whose gradients nobody has scaled."""
    found = {}
    for dtype, options in (
        (torch.bfloat16, {"density": 0.1, "filter_rank": 4, "steps": 1}),
        (torch.float32, {"method": "full", "steps": 1, "accumulate": 1, "max_grad_norm": 0.0}),
    ):
        m, data = start(dtype)
        watched = Watched(m)
        found[dtype] = told(m, tune(m, data, callbacks=[watched], **SHARED | {"autocast": True} | options))
        found[dtype] |= {"training": watched.dtypes, "fine": watched.fine}
    return found


def refused(folder: Path, rank: int) -> dict[str, tuple[str, bool]]:
    found: dict[str, tuple[str, bool]] = {}

    def attempt(name: str, seed: int = 0, environment: dict[str, str] | None = None, **options: Any) -> None:
        m, data = start(seed=seed)
        before, first, said = belongings(m), weights(m), "trained"
        try:
            with patch.dict(os.environ, environment or {}):
                tune(m, data, **SHARED | {"method": "full"} | options)
        except ValueError as error:
            said = str(error)
        same = belongings(m) == before and all(torch.equal(p, first[n]) for n, p in weights(m).items())
        found[name] = said, same

    watch = {"watch": [every(1, lambda m, step: {"one": 1.0}, "one")], "log": folder / f"{rank}.jsonl"}
    attempt("watch", **watch)
    attempt("terms", terms=[Replay(start()[1][:4], weight=0.7, batch_size=2)])
    attempt("select", method="lift", density=0.1, select="hybrid")
    attempt("apart", seed=rank)
    attempt("offload", environment={"FSDP_OFFLOAD_PARAMS": "true"})
    attempt("older", environment={"FSDP_VERSION": "1"})
    return found


def launched(folder: Path, rank: int, world: int) -> dict[str, Any]:
    elsewhere = patch.object(torch.Tensor, "cpu", lambda tensor: tensor.detach().clone())  # as from an accelerator
    with elsewhere, patch.object(trl, "SFTTrainer", Sharding), patch.dict(os.environ, ASKED):
        found: dict[str, Any] = {kind: run(kind, folder) for kind in RUNS}
        return found | {"drifted": drifted(), "bf16": bf16(), "refused": refused(folder, rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tuned")
    given = together(2, {"all": functools.partial(launched, folder)}, folder, begun=False)["all"]
    for mine in given:
        assert not isinstance(mine, str), mine
    return given


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_train_what_one_trains_and_have_it_whole(kind: str, found: list[dict[str, Any]]) -> None:
    one = run(kind)
    assert not one["sharded"]
    assert one["FSDP"] is None
    for mine in (found[0][kind], found[1][kind]):
        assert mine["sharded"]
        assert mine["FSDP"]  # its checkpoints are of another kind
        assert mine["changed"] == []
        assert mine["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert mine["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(mine["weights"][name], tensor, rtol=0, atol=2e-5)
            assert torch.equal(mine["weights"][name], found[0][kind]["weights"][name])


@pytest.mark.parametrize("kind", [kind for kind, options in RUNS.items() if "save_every" in options])
def test_a_run_that_was_stopped_gives_back_its_start_and_goes_on_bit_for_bit(
    kind: str, found: list[dict[str, Any]]
) -> None:
    for mine in found:
        assert mine[kind]["stopped"] == []
        assert mine[kind]["as begun"]
        again = mine[kind]["resumed"]
        assert again["losses"] == mine[kind]["losses"]
        assert all(torch.equal(tensor, mine[kind]["weights"][name]) for name, tensor in again["weights"].items())


def test_drift_says_how_far_a_model_is_that_is_whole_again(found: list[dict[str, Any]]) -> None:
    one = drifted()
    assert len({*one["read"], one["moved"]}) == 3
    for mine in (each["drifted"] for each in found):
        assert mine["read"] == pytest.approx(one["read"], rel=1e-3)
        assert mine["now"] == pytest.approx(mine["read"], rel=1e-6)
        assert mine["moved"] == pytest.approx(one["moved"], rel=1e-4)
        assert "has a part of its prior" in mine["said"]
    assert "said" not in one


def test_bf16_is_of_the_computation_alone(found: list[dict[str, Any]]) -> None:
    one, exact = bf16(), run("full")
    for mine in found:
        for dtype, computed in mine["bf16"].items():
            assert {tensor.dtype for tensor in computed["weights"].values()} == computed["training"] == {dtype}
            assert computed["losses"] == pytest.approx(one[dtype]["losses"], rel=2e-3)
        assert mine["bf16"][torch.float32]["fine"]  # gradients were reduced as fp32
        assert mine["bf16"][torch.float32]["losses"][0] != pytest.approx(exact["losses"][0], rel=5e-5)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("watch", "recorder .*is sharded.*Record under DDP"),
        ("terms", "term .*Leave terms out, or use DDP"),
        ("select", "sharded weights .*select='hybrid'"),
        ("apart", "does not start out the same in all 2 processes"),
        ("offload", "Leave fsdp_offload_params out"),
        ("older", "FSDP1.*FSDP2"),
    ],
)
def test_what_cannot_be_right_is_refused_and_leaves_the_model_as_it_was(
    case: str, said: str, found: list[dict[str, Any]]
) -> None:
    for mine in found:
        text, untouched = mine["refused"][case]
        assert re.search(said, text), text
        assert untouched
