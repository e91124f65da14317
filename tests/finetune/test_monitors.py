"""Laws of the hooks into the training loop: when they are called, what their file holds, and that training does not notice them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analyses.tasks import chained_sums
from finetune.monitors import ChangeNorm, Recorder, every, read_log
from finetune.tune import tune
from surgery.model import Model
from surgery.transcript import Transcript
from surgery.weights import linear_sites
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
    return {"norm": float(sum(p.float().norm() for p in m.module.parameters()))}


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
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["step"], line["monitor"]) for line in lines] == [
        (0, "norm"), (0, "twice"), (2, "twice"), (4, "norm"), (4, "twice"),
    ]  # fmt: skip
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
    assert {line["monitor"] for line in read_log(tmp_path / "log")} == {"Counter", "method", "<lambda>"}


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


def test_a_recorder_gives_back_mode_and_random_state(tmp_path: Path) -> None:
    def rude(m: Model, step: int) -> dict[str, float]:
        torch.manual_seed(4)
        m.module.train(not m.module.training)
        if step:
            raise RuntimeError("a monitor's own error")
        return {}

    m = model()
    recorder = Recorder(m, [every(1, rude)], tmp_path / "log")
    for training in (True, False):
        m.module.train(training)
        before = torch.get_rng_state()
        recorder.on_train_begin(None, SimpleNamespace(global_step=0), None)
        with pytest.raises(RuntimeError):
            recorder.on_step_end(None, SimpleNamespace(global_step=1), None)
        assert m.module.training is training
        assert torch.equal(before, torch.get_rng_state())


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
    assert [line for line in again if line["step"] <= 3] == [line for line in first if line["step"] <= 3]
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    # what is measured after resuming is what an unbroken run measures
    m = model()
    tune(m, taught(m), steps=6, watch=[every(4, norm)], log=tmp_path / "unbroken", **SMALL)
    broken = [(line["step"], line["norm"]) for line in again if line["monitor"] == "norm"]
    assert broken == [(line["step"], line["norm"]) for line in read_log(tmp_path / "unbroken")]


def test_a_new_run_does_not_continue_an_old_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "monitor": "norm", "seconds": 0}) + "\n")
    m = model()
    tune(m, taught(m), steps=1, watch=[every(1, norm)], log=log, **SMALL)
    assert steps_of(log, "norm") == [0, 1]


# --- change -----------------------------------------------------------------------------------------------------------


def test_change_norm_is_the_relative_frobenius_norm() -> None:
    m = model()
    watch = ChangeNorm(m)
    assert set(watch(m, 0).values()) == {0.0}
    start = {s: m.weights[s].clone() for s in linear_sites(m.weights)}
    with torch.no_grad():
        m.weights.parameter("1.mlp.up").mul_(1.25)
        m.weights.parameter("2.attn.k").add_(0.5)
    found = watch(m, 1)
    assert found["1.mlp.up"] == pytest.approx(0.25)
    key = next(s for s in start if str(s) == "2.attn.k")
    assert found["2.attn.k"] == pytest.approx(0.5 * start[key].numel() ** 0.5 / float(start[key].norm()))
    moved = sum(float((m.weights[s] - w).norm()) ** 2 for s, w in start.items())
    assert found["all"] == pytest.approx((moved / sum(float(w.norm()) ** 2 for w in start.values())) ** 0.5)
    assert found["0.attn.q"] == 0
    assert list(ChangeNorm(m, [key])(m, 1)) == ["all", "2.attn.k"]
