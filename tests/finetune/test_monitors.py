"""Laws of the hooks into the training loop: when they are called, what their file holds, and that training does not notice them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from analyses.tasks import chained_sums
from finetune.monitors import Recorder, every, read_log
from finetune.tune import tune
from surgery.model import Model
from surgery.transcript import Transcript
from tests.families import tiny

QUESTIONS = chained_sums(8, seed=3, terms=(2, 3))
SMALL: dict[str, Any] = {"batch_size": 4, "autocast": False}


def model() -> Model:
    return Model(*tiny("llama"))


def taught(m: Model) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS]


def steps_of(log: Path, name: str) -> list[int]:
    return [line["step"] for line in read_log(log) if line["monitor"] == name]


def norm(m: Model, step: int) -> dict[str, float]:
    return {"norm": float(sum(p.detach().float().norm() for p in m.module.parameters()))}


@pytest.mark.parametrize(
    ("steps", "cadence", "accumulate", "expected"),
    [
        (4, 2, 1, [0, 2, 4]),
        (4, 2, 4, [0, 2, 4]),  # optimizer steps, not micro-batches
        (5, 2, 2, [0, 2, 4, 5]),
        (3, 1, 1, [0, 1, 2, 3]),
        (2, 9, 1, [0, 2]),
    ],
)
def test_cadence(steps: int, cadence: int, accumulate: int, expected: list[int], tmp_path: Path) -> None:
    m, log = model(), tmp_path / "deep" / "log.jsonl"
    tune(m, taught(m), steps=steps, accumulate=accumulate, watch=[every(cadence, norm)], log=log, **SMALL)
    assert steps_of(log, "norm") == expected


def test_each_line_is_one_measurement(tmp_path: Path) -> None:
    m, log = model(), tmp_path / "log.jsonl"
    start = norm(m, 0)
    twice = every(2, lambda model, step: {"double": 2.0 * step}, "twice")
    tune(m, taught(m), steps=4, watch=[every(4, norm), twice], log=log, **SMALL)
    every_line = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in every_line if line["monitor"] not in ("recorder", "training")]
    assert [(line["step"], line["monitor"]) for line in lines] == [
        (0, "norm"), (0, "twice"), (2, "twice"), (4, "norm"), (4, "twice"),
    ]  # fmt: skip
    assert {line["step"] for line in every_line if line["monitor"] == "training" and "loss" in line} == {1, 2, 3, 4}
    assert all(line["seconds"] >= 0 for line in lines)
    assert [line["double"] for line in lines if "double" in line] == [0, 4, 8]
    assert lines[0]["norm"] == start["norm"]
    assert lines[3]["norm"] == norm(m, 4)["norm"] != start["norm"]


def test_any_callable_will_do(tmp_path: Path) -> None:
    class Counter:
        calls = 0

        def __call__(self, model: Model, step: int) -> dict[str, float]:
            self.calls += 1
            return {"calls": self.calls}

        def method(self, model: Model, step: int) -> dict[str, float]:
            return {"here": 1.0}

    counter = Counter()
    watch = [every(1, counter), every(1, counter.method), every(1, lambda model, step: {})]
    assert [w.name for w in watch] == ["Counter", "method", "<lambda>"]
    m = model()
    tune(m, taught(m), steps=1, watch=watch, log=tmp_path / "log", **SMALL)
    assert counter.calls == 2
    assert {line["monitor"] for line in read_log(tmp_path / "log")} >= {"Counter", "method", "<lambda>"}


def test_two_monitors_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same name.*name="):
        Recorder(model(), [every(1, norm), every(2, norm)], tmp_path / "log")
    Recorder(model(), [every(1, norm), every(2, norm, name="other")], tmp_path / "log")


@pytest.mark.parametrize("steps", [0, -1])
def test_a_cadence_below_one_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        every(steps, norm)


@pytest.mark.parametrize("method", ["lift", "full", "lora"])
def test_training_does_not_notice_monitors(method: Any, tmp_path: Path) -> None:
    """Bit for bit, although this monitor draws numbers and leaves the model in another mode."""

    def rude(m: Model, step: int) -> dict[str, float]:
        assert not m.module.training
        assert not torch.is_grad_enabled()
        m.module.train()
        torch.manual_seed(step)
        return {"drawn": float(torch.rand(3).sum())}

    ours = [model(), model()]
    done = [
        tune(m, taught(m), method=method, steps=3, **options, **SMALL)
        for m, options in zip(ours, [{}, {"watch": [every(1, rude)], "log": tmp_path / "log"}], strict=True)
    ]
    assert done[0].losses == done[1].losses
    for (name, p), q in zip(ours[0].module.named_parameters(), ours[1].module.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.usefixtures("unchecked")  # the type checker of these tests draws from Python's own random state
def test_a_recorder_gives_back_modes_and_random_states(tmp_path: Path) -> None:
    def rude(m: Model, step: int) -> dict[str, float]:
        assert not any(part.training for part in m.module.modules())
        torch.manual_seed(4)
        np.random.seed(4)
        random.seed(4)
        m.module.train()
        if step:
            raise KeyboardInterrupt
        return {}

    m = model()
    recorder = Recorder(m, [every(1, rude)], tmp_path / "log")
    for training in (True, False):
        m.module.train(training)
        m.module.get_submodule("model.layers.1").train(not training)  # frozen parts may be in another mode
        modes = [part.training for part in m.module.modules()]
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        recorder.on_train_begin(None, SimpleNamespace(global_step=0), None)
        with pytest.raises(KeyboardInterrupt):
            recorder.on_step_end(None, SimpleNamespace(global_step=1), None)
        assert [part.training for part in m.module.modules()] == modes
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_monitor_that_fails_says_so_and_training_goes_on(tmp_path: Path) -> None:
    def fragile(m: Model, step: int) -> dict[str, float]:
        if step in (1, 2):
            raise RuntimeError("no room left")
        return {"fine": step}

    watched, alone = model(), model()
    with pytest.warns(
        RuntimeWarning, match=r"'fragile' failed at step 1 \(RuntimeError: no room left\). Training goes on"
    ) as said:
        done = tune(watched, taught(watched), steps=3, watch=[every(1, fragile)], log=tmp_path / "log", **SMALL)
    assert len([w for w in said if "fragile" in str(w.message)]) == 1  # not at every step
    lines = [line for line in read_log(tmp_path / "log") if line["monitor"] == "fragile"]
    assert [(line["step"], line.get("failed"), line.get("fine")) for line in lines] == [
        (0, None, 0), (1, "RuntimeError: no room left", None), (2, "RuntimeError: no room left", None), (3, None, 3),
    ]  # fmt: skip
    assert done.losses == tune(alone, taught(alone), steps=3, **SMALL).losses


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    def broken(m: Model, step: int) -> dict[str, float]:
        return {"nan": float("nan"), "much": float("inf"), "tensor": torch.tensor(2.5), "count": 3}  # type: ignore[dict-item]

    m, log = model(), tmp_path / "log"
    tune(m, taught(m), steps=1, watch=[every(1, broken)], log=log, **SMALL)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in log.read_text().splitlines()]
    found = next(line for line in lines if line["monitor"] == "broken")
    assert found["undefined"] == ["nan", "much"]
    assert (found["nan"], found["much"], found["tensor"], found["count"]) == (None, None, 2.5, 3)


def test_a_name_that_the_log_needs_is_a_failure_of_the_monitor(tmp_path: Path) -> None:
    m = model()
    with pytest.warns(RuntimeWarning, match="cannot give a number called 'step'"):
        tune(m, taught(m), steps=1, watch=[every(1, lambda m, s: {"step": 9}, "x")], log=tmp_path / "log", **SMALL)
    assert steps_of(tmp_path / "log", "x") == [0, 1]


@pytest.mark.parametrize("name", ["recorder", "training"])
def test_names_of_the_recorders_own_lines_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"called '{name}'"):
        Recorder(model(), [every(1, norm, name)], tmp_path / "log")


@pytest.mark.parametrize("budget", [-0.1, float("nan")])
def test_a_negative_budget_is_refused(budget: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share of the training time"):
        Recorder(model(), [norm], tmp_path / "log", budget=budget)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_log_that_a_kill_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_log(log) == []
    whole = [{"step": 0, "monitor": "a", "seconds": 0.1}, {"step": 2, "monitor": "a", "seconds": 0.1}]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    log.write_text(text)
    assert read_log(log) == whole
    for cut in range(1, len(json.dumps(whole[1])) + 1):
        log.write_text(text[:-cut])
        assert read_log(log) == whole[:1]
    log.write_text("")
    assert read_log(log) == []


def test_resuming_drops_later_lines_and_keeps_earlier(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    calls: list[int] = []

    def stop(m: Model, step: int) -> dict[str, float]:
        calls.append(step)
        if step == 5 and calls.count(5) == 1:
            raise KeyboardInterrupt
        return {"call": len(calls)}

    def go() -> None:
        m = model()
        options = {"checkpoints": tmp_path / "saved", "save_every": 3}
        tune(m, taught(m), steps=6, watch=[every(1, stop), every(4, norm)], log=log, **options, **SMALL)

    with pytest.raises(KeyboardInterrupt):
        go()
    assert steps_of(log, "stop") == [0, 1, 2, 3, 4]
    with log.open("a") as file:
        file.write('{"step": 5, "monit')
    first = read_log(log)
    go()
    assert steps_of(log, "stop") == [0, 1, 2, 3, 4, 5, 6]
    assert steps_of(log, "norm") == [0, 4, 6]
    again = read_log(log)
    kept = [line for line in again if line["step"] <= 3 and line.get("event") != "begin"]
    assert kept == [line for line in first if line["step"] <= 3 and line.get("event") != "begin"]
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    # what is measured after resuming is what an unbroken run measures
    m = model()
    tune(m, taught(m), steps=6, watch=[every(4, norm)], log=tmp_path / "unbroken", **SMALL)
    broken = [(line["step"], line["norm"]) for line in again if line["monitor"] == "norm"]
    unbroken = read_log(tmp_path / "unbroken")
    assert broken == [(line["step"], line["norm"]) for line in unbroken if line["monitor"] == "norm"]


def test_a_new_run_does_not_continue_an_old_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "monitor": "norm", "seconds": 0}) + "\n")
    m = model()
    tune(m, taught(m), steps=1, watch=[every(1, norm)], log=log, **SMALL)
    assert steps_of(log, "norm") == [0, 1]
