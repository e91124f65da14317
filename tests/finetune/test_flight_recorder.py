"""Laws of the flight recorder: it keeps to its share of the time, sees whole optimizer steps, speaks through the trainer's own log, and
goes on where a killed run left off."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from finetune import monitors
from finetune.examples import Collate, examples, rows_of
from finetune.grpo import grpo
from finetune.monitors import Recorder, every, read_log, sometimes
from finetune.rules import DRIFT
from finetune.tune import tune
from surgery.model import Model
from tests.finetune.test_monitors import SMALL, model, norm, steps_of, taught
from tests.finetune.test_rules import expert

# --- the budget -------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def flown(
    recorder: Recorder, clock: Clock, steps: int, second: float = 1.0, first: int = 0, accumulate: int = 1
) -> None:
    """The events of a Trainer's run, each optimizer step of `accumulate` micro-batches taking `second` in all."""
    state = SimpleNamespace(global_step=first, max_steps=steps, is_world_process_zero=True)
    args = SimpleNamespace(gradient_accumulation_steps=accumulate)
    recorder.on_train_begin(args, state, None)
    for _ in range(first, steps):
        recorder.on_step_begin(args, state, None)
        for _ in range(accumulate):
            clock.now += second / accumulate
            recorder.on_substep_end(args, state, None)
        recorder.on_pre_optimizer_step(args, state, None)
        state.global_step += 1
        recorder.on_step_end(args, state, None)
    recorder.on_train_end(args, state, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitors, "time", clock)
    return clock


def costing(clock: Clock, seconds: float) -> Callable[[Model, int], dict[str, float]]:
    def monitor(model: Model, step: int) -> dict[str, float]:
        clock.now += seconds
        return {"at": step}

    return monitor


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_recorder_keeps_to_its_budget_and_spreads_it(clock: Clock, accumulate: int, tmp_path: Path) -> None:
    m, log = model(), tmp_path / "log"
    watches = [sometimes(costing(clock, cost), name) for name, cost in (("cheap", 0.25), ("dear", 2.0))]
    recorder = Recorder(m, watches, log, budget=0.03)
    flown(recorder, clock, 400, accumulate=accumulate)
    lines = read_log(log)
    spent = {n: sum(line["seconds"] for line in lines if line["monitor"] == n) for n in ("cheap", "dear")}
    assert sum(spent.values()) <= 12.0
    assert spent["dear"] == 6.0
    assert spent["cheap"] == pytest.approx(6.0, abs=0.3)
    for name in spent:
        at = steps_of(log, name)
        assert (at[0], at[-1]) == (0, 400)
        gaps = np.diff(at)
        assert max(gaps) <= 1.5 * min(gaps)
    end = lines[-1]
    assert (end["event"], end["training_seconds"], end["budgeted_seconds"]) == ("end", 400.0, sum(spent.values()))
    assert end["measured"] == {"cheap": len(steps_of(log, "cheap")), "dear": 3}
    said = next(line for line in lines if line.get("event") == "plan")
    assert (said["step_seconds"], said["seconds_allowed"]) == (1.0, 12.0)
    assert said["costs"] == {"cheap": 0.25, "dear": 2.0}
    assert said["at_end"] == ["cheap", "dear"]


def test_the_start_is_measured_on_the_starting_weights(tmp_path: Path) -> None:
    m, log = model(), tmp_path / "log"
    begin = norm(m, 0)["norm"]
    tune(m, taught(m), steps=3, callbacks=[Recorder(m, [norm], log, budget=1.0)], lr=0.1, **SMALL)
    found = {line["step"]: line["norm"] for line in read_log(log) if line["monitor"] == "norm"}
    assert found[0] == begin
    assert all(v != begin for step, v in found.items() if step)


def test_preparing_a_monitor_counts_as_spent(clock: Clock, tmp_path: Path) -> None:
    class Prepared:
        prepared = 5.0

        def __call__(self, model: Model, step: int) -> dict[str, float]:
            clock.now += 5.0
            return {}

    flown(Recorder(model(), [Prepared()], tmp_path / "log", budget=0.03), clock, 400)
    assert steps_of(tmp_path / "log", "Prepared") == [400]  # of 12 seconds 5 were gone, and 6 may be by the start


class Tried:
    """A monitor that takes `seconds`, and a trial of it a hundredth of what it is said to take."""

    def __init__(self, clock: Clock, seconds: float, said: float | None = None, share: float = 0.01):
        self.clock, self.seconds, self.said, self.share = clock, seconds, seconds if said is None else said, share

    def trial(self, model: Model) -> float:
        self.clock.now += self.said / 100
        return self.share

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        self.clock.now += self.seconds
        return {}


@pytest.mark.parametrize("steps", [3, 40, 120])
def test_a_trial_says_what_a_first_measurement_costs(clock: Clock, steps: int, tmp_path: Path) -> None:
    """However short the run, the budget is kept; what it cannot pay is named."""
    costs = {"cheap": 0.03, "fair": 0.2, "dear": 4.0, "dearest": 40.0}
    log = tmp_path / "log"
    flown(Recorder(model(), [sometimes(Tried(clock, c), n) for n, c in costs.items()], log, budget=0.5), clock, steps)
    lines = read_log(log)
    trials = [line for line in lines if line.get("event") == "trial"]
    assert {line["of"]: line["expected"] for line in trials} == pytest.approx(costs)
    said = next(line for line in lines if line.get("event") == "plan")
    never = set(costs) - set(lines[-1]["measured"])
    assert set(said["no_time"]) == never
    assert never == {3: {"dear", "dearest"}, 40: {"dearest"}, 120: set()}[steps]
    measured = sum(line["seconds"] for line in lines if line["monitor"] in costs)
    tried = sum(line["seconds"] for line in trials)
    assert lines[-1]["budgeted_seconds"] == pytest.approx(measured + tried, abs=0.01)
    assert measured <= max(0.0, 0.5 * steps - tried) + 1e-9
    assert {n: steps_of(log, n)[0] for n in ("cheap", "fair") if n not in never} == dict.fromkeys(("cheap", "fair"), 0)


def test_a_trial_that_promised_too_little_costs_one_measurement(clock: Clock, tmp_path: Path) -> None:
    watches = [sometimes(Tried(clock, 10.0, 1.0), "liar"), sometimes(Tried(clock, 1.0), "honest")]
    flown(Recorder(model(), watches, tmp_path / "log", budget=0.05), clock, 100)
    assert steps_of(tmp_path / "log", "liar") == [0]
    assert steps_of(tmp_path / "log", "honest") == []


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_trial_that_fails_leaves_the_cost_unknown(clock: Clock, share: float, tmp_path: Path) -> None:
    flown(Recorder(model(), [Tried(clock, 1.0, share=share)], tmp_path / "log", budget=0.1), clock, 100)
    said = next(line for line in read_log(tmp_path / "log") if line.get("event") == "trial")
    assert said["expected"] is None
    assert "in (0, 1]" in said["failed"]
    assert steps_of(tmp_path / "log", "Tried")[0] == 0


def test_a_run_that_is_stopped_has_its_own_budget(clock: Clock, tmp_path: Path) -> None:
    """The end of a stopped run is measured if the steps that were made pay for it."""
    recorder = Recorder(model(), [Tried(clock, 1.0)], tmp_path / "log", budget=0.03)
    state = SimpleNamespace(global_step=0, max_steps=400, is_world_process_zero=True)
    recorder.on_train_begin(SimpleNamespace(), state, None)
    clock.now += 1.0
    recorder.on_pre_optimizer_step(SimpleNamespace(), state, None)
    state.global_step = 1
    recorder.on_step_end(SimpleNamespace(), state, None)
    recorder.on_train_end(SimpleNamespace(), state, None)
    assert steps_of(tmp_path / "log", "Tried") == [0]


@pytest.mark.parametrize("budget", [0.0, 0.03])
def test_fixed_cadences_cost_what_they_cost(clock: Clock, budget: float, tmp_path: Path) -> None:
    watches = [every(100, costing(clock, 9.0), "mine"), sometimes(costing(clock, 1.0), "theirs")]
    flown(Recorder(model(), watches, tmp_path / "log", budget=budget), clock, 400)
    assert steps_of(tmp_path / "log", "mine") == [0, 100, 200, 300, 400]
    assert len(steps_of(tmp_path / "log", "theirs")) == (12 if budget else 0)


def test_a_real_run_keeps_to_its_budget(tmp_path: Path) -> None:
    """With real seconds, which nobody knows beforehand: each monitor may overdraw by one measurement that took longer than expected."""

    def slow(m: Model, step: int) -> dict[str, float]:
        time.sleep(0.05)
        return {}

    class Slower(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            time.sleep(0.1)

    m, log = model(), tmp_path / "log"
    tune(m, taught(m), steps=20, watch=[sometimes(slow), sometimes(norm)], log=log, callbacks=[Slower()], **SMALL)
    end = read_log(log)[-1]
    longest = {name: max(x["seconds"] for x in read_log(log) if x["monitor"] == name) for name in end["measured"]}
    assert end["budgeted_seconds"] <= 0.03 * end["training_seconds"] + sum(longest.values())
    assert end["training_seconds"] >= 2.0


# --- gradients --------------------------------------------------------------------------------------------------------


def trainer_of(host: str, m: Model, where: Path, callbacks: Any, steps: int = 4, **options: Any) -> Any:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    common: dict[str, Any] = {
        "output_dir": str(where), "max_steps": steps, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "max_grad_norm": 0.0,
    } | options  # fmt: skip
    if host == "sft":
        made = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        rows = [{"input_ids": list(t.ids), "labels": list(t.ids)} for t in taught(m)]
        return SFTTrainer(
            model=m.module,
            args=made,
            train_dataset=Dataset.from_list(rows),
            processing_class=m.tokenizer,
            callbacks=callbacks,
        )

    def batch(items: list[Any]) -> dict[str, Any]:
        made = Collate(m.pad_id)(items)
        return {name: made[name] for name in ("input_ids", "attention_mask", "labels")}

    made = TrainingArguments(**common, remove_unused_columns=False)
    return Trainer(
        model=m.module, args=made, train_dataset=rows_of(examples(taught(m))), data_collator=batch, callbacks=callbacks
    )  # type: ignore[arg-type]


class GradientNorm:
    __name__ = "gradient"
    before_step = True

    def __call__(self, model: Model, step: int, optimizer: Any) -> dict[str, float]:
        assert isinstance(optimizer, torch.optim.Optimizer)
        return {
            "norm": float(torch.stack([p.grad.norm() for p in model.module.parameters() if p.grad is not None]).norm())
        }


class Compact:
    """The norm of what LIFT has gathered for the step."""

    before_step = True

    def __call__(self, model: Model, step: int, optimizer: Any) -> dict[str, float]:
        return {"norm": float(optimizer.optimizer.clip_grad_norm_(math.inf))}


@pytest.mark.parametrize("host", ["plain", "sft"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_monitors_of_gradients_see_what_the_optimizer_is_about_to_use(
    host: str, accumulate: int, tmp_path: Path
) -> None:
    """Of the whole optimizer step: the norm is the one the trainer logs for it, however it was split."""
    m, log = model(), tmp_path / "log"
    recorder = Recorder(m, [every(2, GradientNorm())], log)
    split = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer = trainer_of(host, m, tmp_path, [recorder], 5, **split)
    trainer.train()
    found = {line["step"]: line["norm"] for line in read_log(log) if line["monitor"] == "gradient"}
    assert list(found) == [2, 4, 5]  # there is no gradient before the first step; the last step is measured as well
    logged = {line["step"]: line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line}
    for step, value in found.items():
        assert value == pytest.approx(logged[step], rel=1e-5)
    assert recorder._account.steps == 5


# --- the trainer's own log --------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands where TensorBoard's callback stands: among the trainer's own, before those of the caller."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("host", ["plain", "sft"])
def test_attached_to_a_trainer_headline_numbers_go_to_its_log(host: str, tmp_path: Path) -> None:
    def detailed(m: Model, step: int) -> dict[str, float]:
        return {
            "all": 1.0,
            "L3": 2.0,
            "thinking.cka": 0.5,
            "thinking.L3.cka": 0.5,
            "1.mlp.up": 3.0,
            "lost": float("nan"),
        }

    bare, told = model(), model()
    reporter = Reporter()
    trainers = [trainer_of(host, x, tmp_path, [r] if r else []) for x, r in ((bare, None), (told, reporter))]
    log = tmp_path / "log"
    recorder = Recorder(told, [every(2, detailed)], log)
    assert recorder.attach(trainers[1]) is recorder
    for trainer in trainers:
        trainer.train()
    ours = [(step, logs) for step, logs in reporter.seen if "detailed/all" in logs]
    assert [step for step, _ in ours] == [0, 2, 4]
    assert all(set(logs) - {"epoch"} == {"detailed/all", "detailed/thinking.cka"} for _, logs in ours)
    history = trainers[1].state.log_history
    assert [line["step"] for line in history if "detailed/all" in line] == [0, 2, 4]
    # and the trainer's own log is what it is without a recorder: every step has its loss, and TRL's averages
    plain = [line for line in trainers[0].state.log_history if "loss" in line]
    watched = [line for line in history if "loss" in line]
    assert [set(line) for line in watched] == [set(line) for line in plain]
    assert [line["loss"] for line in watched] == [line["loss"] for line in plain]
    # the recorder does not take its own numbers for the trainer's
    lines = [line for line in read_log(log) if line["monitor"] == "training"]
    assert not [key for line in lines for key in line if key.startswith("detailed")]
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in plain]


def test_what_is_measured_before_a_step_is_sent_as_of_that_step(tmp_path: Path) -> None:
    m, log, reporter = model(), tmp_path / "log", Reporter()
    trainer = trainer_of("plain", m, tmp_path, [reporter])
    Recorder(m, [every(2, GradientNorm()), every(1, norm)], log).attach(trainer)
    trainer.train()
    for name, steps in (("gradient", [2, 4]), ("norm", [0, 1, 2, 3, 4])):
        written = {line["step"]: line["norm"] for line in read_log(log) if line["monitor"] == name}
        assert list(written) == steps
        assert {step: logs[f"{name}/norm"] for step, logs in reporter.seen if f"{name}/norm" in logs} == written
        history = trainer.state.log_history
        assert {line["step"]: line[f"{name}/norm"] for line in history if f"{name}/norm" in line} == written
    assert [step for step, logs in reporter.seen if "epoch" in logs] == [1, 2, 3, 4, 4]  # with the loss, and at the end


class Stop(TrainerCallback):
    """A run that is interrupted after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tensorboard_holds_what_the_log_holds(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every headline number once and at its step, what DRIFT says too, in one folder, where a resumed run goes on: what it does again replaces
    what was there."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"

    def flown_to(step: int) -> None:
        m = model()
        tune(
            m, taught(m), watch=[every(2, norm), every(1, Compact())], log=log, steps=6, accumulate=accumulate, report_to=["tensorboard"],
            checkpoints=tmp_path / "saved", save_every=2, callbacks=[DRIFT(expert(m), m, log_every=1), Stop(step)], **SMALL,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        flown_to(3)
    flown_to(7)
    (run,) = (tmp_path / "runs").iterdir()
    events = accumulator(str(run)).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name, key in (
        ("norm", "norm"),
        ("Compact", "norm"),
        *[("training", k) for k in ("loss", "pull_merged", "pull_cosine")],
    ):
        tag = f"train/{key}" if name == "training" else f"train/{name}/{key}"
        lines = [x for x in read_log(log) if x["monitor"] == name and key in x]
        told = [(x["step"], pytest.approx(x[key], rel=1e-6)) for x in lines]
        assert [step for step, _ in found[tag]] == [step for step, _ in told], tag
        assert found[tag] == told, tag


def test_a_run_of_wandb_is_ended_with_the_training_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        m = model()
        tune(m, taught(m), steps=1, watch=[every(1, norm)], log=tmp_path / "log", report_to=["wandb"], **SMALL)
        assert wandb.run is None
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    with wandb.init(dir=tmp_path) as mine:
        m = model()
        tune(m, taught(m), steps=1, watch=[every(1, norm)], log=tmp_path / "log", report_to=["wandb"], **SMALL)
        assert wandb.run is mine  # the caller's own stays open
        assert mine.summary["train/norm/norm"] == norm(m, 1)["norm"]


def test_reinforcement_is_recorded_like_any_training(tmp_path: Path) -> None:
    m, log = model(), tmp_path / "log"

    def early_letters(question: Any, transcript: Any) -> float:
        return sum(c in "abcdefghijklm" for c in transcript.completion or "") / 6

    options: dict[str, Any] = {"groups": 2, "samples": 4, "max_new_tokens": 6, "temperature": 6.0, "autocast": False}
    recorder = Recorder(m, [every(1, norm), GradientNorm()], log, budget=100)
    grpo(m, ["What is 1?", "What is 99?"], early_letters, trains="full", steps=3, callbacks=[recorder], **options)
    assert steps_of(log, "norm") == [0, 1, 2, 3]
    assert steps_of(log, "gradient") == [1, 2, 3]
    rewards = [line["reward"] for line in read_log(log) if line["monitor"] == "training" and "reward" in line]
    assert len(rewards) == 3


def test_what_later_callbacks_add_to_the_trainers_log_is_recorded(tmp_path: Path) -> None:
    class Later(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs["pull_merged"] = 0.25 * state.global_step

    m, log = model(), tmp_path / "log"
    trainer_of("plain", m, tmp_path, [Recorder(m, [], log), Later()]).train()
    found = [line["pull_merged"] for line in read_log(log) if "loss" in line]
    assert found == [0.25, 0.5, 0.75, 1.0]


def test_a_page_that_fails_does_not_cost_the_training(tmp_path: Path) -> None:
    def page(path: Path) -> None:
        raise OSError("no room left")

    m, log = model(), tmp_path / "log"
    with pytest.warns(RuntimeWarning, match="could not be made .OSError: no room left.. The log is whole"):
        tune(m, taught(m), steps=1, callbacks=[Recorder(m, [norm], log, page=page)], **SMALL)
    assert read_log(log)[-1]["event"] == "end"


def test_only_the_first_process_measures(tmp_path: Path) -> None:
    recorder = Recorder(model(), [every(1, norm)], tmp_path / "log")
    state = SimpleNamespace(global_step=0, max_steps=1, is_world_process_zero=False)
    for event in ("on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_train_end"):
        getattr(recorder, event)(SimpleNamespace(), state, None, logs={"loss": 1.0})
    assert not (tmp_path / "log").exists()


def test_the_page_is_made_when_training_ends(tmp_path: Path) -> None:
    seen: list[list[Any]] = []
    m = model()
    recorder = Recorder(m, [every(2, norm)], tmp_path / "log", page=lambda path: seen.append(read_log(path)))
    trainer_of("plain", m, tmp_path, [recorder], 2).train()
    assert len(seen) == 1
    assert seen[0] == read_log(tmp_path / "log")
    assert seen[0][-1]["event"] == "end"
    assert steps_of(tmp_path / "log", "norm") == [0, 2]


# --- interrupted ---------------------------------------------------------------------------------------------------


def test_a_resumed_account_knows_what_was_spent(clock: Clock, tmp_path: Path) -> None:
    """Kept lines keep their cost: a run in two parts spends what an unbroken one does, and measures at like steps."""

    def recorder(log: Path) -> Recorder:
        return Recorder(
            model(), [sometimes(costing(clock, 1.0), "a"), sometimes(Tried(clock, 1.0), "b")], log, budget=0.03
        )

    flown(recorder(tmp_path / "whole"), clock, 400)
    broken = tmp_path / "broken"
    flown(recorder(broken), clock, 400)
    lines = read_log(broken)
    broken.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= 250) + '{"step": 26')
    flown(recorder(broken), clock, 400, first=200)
    for name in ("a", "b"):
        assert steps_of(broken, name) == steps_of(tmp_path / "whole", name)
    assert len([line for line in read_log(broken) if line.get("event") == "trial"]) == 1
    assert [line["step"] for line in read_log(broken) if line.get("event") == "begin"] == [0, 200]
    ends = [read_log(log)[-1] for log in (broken, tmp_path / "whole")]
    for one in ("training_seconds", "measuring_seconds", "budgeted_seconds"):
        assert ends[0][one] == ends[1][one]
    flown(Recorder(model(), [sometimes(costing(clock, 0.01), "new")], broken), clock, 400, first=200)
    assert min(steps_of(broken, "new")) > 200  # the starting weights are gone


def whole_run(where: Path, pause: float) -> None:
    def slow(m: Model, step: int) -> dict[str, float]:
        time.sleep(pause)
        return {"step_is": step}

    m = model()
    saved = {"checkpoints": where / "saved", "save_every": 2}
    tune(m, taught(m), steps=12, watch=[every(1, norm), every(1, slow)], log=where / "log", **saved, **SMALL)


def test_a_killed_run_leaves_a_log_that_is_gone_on_with(tmp_path: Path) -> None:
    """A process killed in the middle of training, and the same run again: every measurement is there once."""
    code = "from pathlib import Path; from tests.finetune.test_flight_recorder import whole_run"
    words = [sys.executable, "-c", f"{code}; whole_run(Path({str(tmp_path)!r}), 0.2)"]
    log = tmp_path / "log"
    with subprocess.Popen(words) as process:
        deadline = time.monotonic() + 120
        while not any(line["step"] >= 5 for line in read_log(log)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert max(line["step"] for line in read_log(log)) < 12
    whole_run(tmp_path, 0)
    for name in ("norm", "slow"):
        assert steps_of(log, name) == list(range(13))
    losses = [line["step"] for line in read_log(log) if line["monitor"] == "training" and "loss" in line]
    assert losses == list(range(1, 13))
