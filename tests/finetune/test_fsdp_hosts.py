"""Hosted trainers under accelerate's FSDP2, two processes on this CPU: they train what one process trains, and what cannot be is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import nn

from finetune.monitors import Recorder, every
from finetune.objectives import kl_to_base, nll
from finetune.rules import DRIFT
from tests import hosted
from tests.hosted import CLIP, STEPS, Hosted, Seen, model, prior, stepper, trainer_of, whole
from tests.processes import together

RUNS: dict[str, dict[str, Any]] = {  # name -> kind, family and options of DRIFT
    "adamw": {"kind": "adamw"},
    "lift": {"kind": "lift"},
    "drift": {"kind": "drift", "store": "lazy"},
    "update": {"kind": "update", "rank": 4, "rule": "norm"},
    "both": {"kind": "both"},
    "fused": {"kind": "both", "family": "gpt-neox"},  # q, k and v in one
    "experts": {"kind": "both", "family": "mixtral"},  # each whole in one of the processes
    "turned": {"kind": "drift", "family": "gpt2"},  # stored the other way round
}


class Sharding:
    """accelerate shards on several accelerators only, so it is told that these are."""

    version = 2

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        state: Any = self.accelerator.state  # type: ignore[attr-defined]
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=self.version, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        self.is_fsdp_enabled = True


class Dealt(Sharding, Hosted):
    pass


class Older(Dealt):
    version = 1


def trained(name: str, rank: int, world: int) -> Any:
    return hosted.run(args=functools.partial(hosted.arguments, world=world), host=Dealt, **RUNS[name])


def kept(folder: Path, adapted: bool, rank: int, world: int, host: Any = Dealt) -> dict[str, float]:
    """A run by an objective that asks for the starting model, and what an evaluation then says. adapted: of an adapter."""
    m = model("adamw")
    if adapted:
        torch.manual_seed(0)
        m.module.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = trainer_of(m, hosted.arguments(folder, world), None, host, objective=nll + 0.1 * kl_to_base)
    trainer.train()
    return {
        "loss": trainer.state.log_history[-1]["train_loss"],
        "evaluated": trainer.evaluate(trainer.train_dataset.select([0] * 4))["eval_loss"],
    }


def resumed(folder: Path, rank: int, world: int) -> Any:
    """A run that saves half way, and another of other weights that goes on from there."""
    found = []
    for turn in range(2):
        m = model("both")
        lift, drift, seen = stepper("both", m), DRIFT(prior(), m), Seen()
        if turn:
            torch._foreach_mul_([p.detach() for p in m.module.parameters()], 1.1)
        args = hosted.arguments(folder, world, save_strategy="steps", save_steps=2)
        trainer = trainer_of(m, args, lift, Dealt, [drift, seen])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if turn else None)
        assert len(seen.steps) == (STEPS - 2 if turn else STEPS)
        found.append(seen.weights)
    (folder / "checkpoint-4" / f"lift-{rank + 1}-of-{world}.pt").unlink()
    again = model("both")
    try:
        trainer_of(again, args, stepper("both", again), Dealt).train(
            resume_from_checkpoint=str(folder / "checkpoint-4")
        )
    except ValueError as error:
        found.append(str(error))
    return found


class Summed:
    """A term: the sum of some weights."""

    def __call__(self, module: nn.Module, step: int) -> Any:
        return next(module.parameters()).sum()


def refused(folder: Path, rank: int, world: int) -> Any:
    found: dict[str, Any] = {}

    def attempt(name: str, kind: str, host: Any = Dealt, callbacks: Any = lambda m: [], **own: Any) -> None:
        m = model(kind)
        before = {n: p.detach().clone() for n, p in m.module.named_parameters()}
        try:
            trainer_of(m, hosted.arguments(folder, world), stepper(kind, m), host, callbacks(m), **own).train()
            found[name] = "trained", False
        except (ValueError, RuntimeError) as error:
            found[name] = str(error), all(torch.equal(whole(p), before[n]) for n, p in m.module.named_parameters())

    attempt("older", "lift", Older)
    attempt("terms", "adamw", terms=[Summed()])
    attempt("legacy", "drift", callbacks=lambda m: [DRIFT(prior(), m, legacy=True)])
    attempt("another prior", "drift", callbacks=lambda m: [DRIFT((1 + rank) * prior(), m)])
    attempt(
        "recorder",
        "adamw",
        callbacks=lambda m: [Recorder(m, [every(1, lambda m, step: {"one": 1.0}, "one")], folder / "log.jsonl")],
    )
    m = model("drift")
    trainer_of(m, hosted.arguments(folder, world, max_steps=1), None, Dealt).train()
    try:
        DRIFT(prior(), m)
    except ValueError as error:
        found["dealt"] = str(error), True
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    jobs: dict[str, Any] = {name: functools.partial(trained, name) for name in RUNS}
    jobs["resumed"] = functools.partial(resumed, tmp_path_factory.mktemp("checkpoints"))
    for adapted in (False, True):
        jobs[f"kept {adapted}"] = functools.partial(kept, tmp_path_factory.mktemp("kept"), adapted)
    jobs["refused"] = functools.partial(refused, tmp_path_factory.mktemp("refused"))
    given = together(2, jobs, tmp_path_factory.mktemp("sharded"), begun=False)
    for job, results in given.items():
        for mine in results:
            assert not isinstance(mine, str), f"{job} {mine}"
    return given


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name: str, found: dict[str, list[Any]]) -> None:
    """Accumulated, clipped, with a falling lr: losses, norms, weights, and what DRIFT saw of whole tensors."""
    expected = hosted.run(**RUNS[name])
    assert min(expected["norms"]) > CLIP  # every step is clipped
    start = dict(model(RUNS[name]["kind"], RUNS[name].get("family", "llama")).module.named_parameters())
    assert any(not torch.equal(start[name], tensor) for name, tensor in expected["weights"].items())
    for mine in found[name]:
        torch.testing.assert_close(mine["losses"], expected["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(mine["norms"], expected["norms"], rtol=1e-5, atol=0)
        for ours, theirs in zip(mine["readings"], expected["readings"], strict=True):
            assert ours[2:] == pytest.approx(theirs[2:], rel=1e-3, abs=1e-6)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(mine["weights"][name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_starting_model_and_an_evaluation_are_those_of_one_process(
    adapted: bool, found: dict[str, list[Any]], tmp_path: Path
) -> None:
    expected = kept(tmp_path, adapted, 0, 1, Hosted)
    assert expected["evaluated"] < expected["loss"]
    for mine in found[f"kept {adapted}"]:
        assert mine == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_is_bit_identical(found: dict[str, list[Any]]) -> None:
    for whole_run, again, said in found["resumed"]:
        assert all(torch.equal(tensor, whole_run[name]) for name, tensor in again.items())
        assert re.search(r"has no lift-\d-of-2.pt.*as many", said)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("older", "FSDP1 .*version"),
        ("terms", "term .*Leave terms out"),
        ("legacy", "legacy .*Leave legacy out"),
        ("another prior", "prior of DRIFT is not the same in all 2 processes"),
        ("recorder", "sharded"),
        ("dealt", "dealt out to several processes already.*first"),
    ],
)
def test_what_cannot_be_right_is_refused_before_a_step(case: str, said: str, found: dict[str, list[Any]]) -> None:
    for results in found["refused"]:
        text, untouched = results[case]
        assert re.search(said, text), text
        assert untouched
