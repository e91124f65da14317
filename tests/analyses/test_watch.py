"""The toolkit's measures as monitors: their numbers are those of the measures themselves, and they leave the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from analyses.general_text import GENERAL_TEXT
from analyses.representation import mean_shift
from analyses.scoring import nll
from analyses.tasks import chained_sums
from analyses.watch import WATCHES, AnswerLikelihood, Answers, DriftFromStart, as_transcripts, watches
from finetune.monitors import read_log
from finetune.tune import tune
from probes.activations import collect
from surgery.model import Model
from surgery.transcript import Transcript
from tests.families import tiny

QUESTIONS = chained_sums(4, seed=5, terms=(2, 3))


@pytest.fixture
def model() -> Model:
    return Model(*tiny("llama"))


def taught(m: Model) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS]


def shake(m: Model, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        p = m.weights.parameter("0.mlp.down")
        p.add_(size * torch.randn(p.shape, generator=generator))


def test_answers_are_graded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told = taught(model)
    right, wrong = told[0], model.transcript(QUESTIONS[1].question, "<think>\n</think>\n999999")
    unfinished = model.transcript(QUESTIONS[2].question, "<think>\n1 + ")
    given = [right, wrong, unfinished, told[3]]
    monkeypatch.setattr(model, "generate", lambda asked, **options: given)
    found = Answers(QUESTIONS)(model, 0)
    assert (found["accuracy"], found["missing"], found["n"]) == (0.5, 1, 4)
    assert found["low"] < 0.5 < found["high"]


def test_answers_are_generated_to_the_length_asked(model: Model) -> None:
    found = Answers(QUESTIONS, max_new_tokens=2)(model, 0)
    assert found["n"] == 4
    assert 0 <= found["accuracy"] <= 1


def test_likelihood_is_that_of_the_gold_answers(model: Model) -> None:
    watch = AnswerLikelihood(taught(model))
    assert watch(model, 3)["answer_nll"] == nll(model, taught(model), over="answer").mean.value
    before = watch(model, 0)["answer_nll"]
    shake(model)
    assert watch(model, 1)["answer_nll"] != before


@pytest.mark.parametrize("over", ["completion", "all"])
def test_drift_is_measured_from_when_it_was_made(model: Model, over: str) -> None:
    told = taught(model)
    start = collect(model, told, at="*.resid", over=over)
    watch = DriftFromStart(model, told, layers=[1, 3], over=over)
    assert watch(model, 0) == {"all": 0, "L1": 0, "L3": 0}
    shake(model)
    # first called after the weights have moved, as in a resumed run: the start is still the start
    late = DriftFromStart(model, told, layers=[1, 3], over=over)
    assert late(model, 0)["all"] == 0
    found = watch(model, 1)
    now = collect(model, told, at="*.resid", over=over)
    for layer in (1, 3):
        expected = mean_shift(start[f"{layer}.resid"], now[f"{layer}.resid"])
        assert found[f"L{layer}"] == pytest.approx(expected)
        assert expected > 0
    assert found["all"] == pytest.approx((found["L1"] + found["L3"]) / 2)


def test_default_layers_are_spread_over_the_depth(model: Model) -> None:
    assert list(DriftFromStart(model, taught(model))(model, 0)) == ["all", "L0", "L1", "L2", "L3"]


def test_plain_text_is_a_transcript_of_all_its_tokens(model: Model) -> None:
    for text, transcript in zip(GENERAL_TEXT[:3], as_transcripts(model, GENERAL_TEXT[:3]), strict=True):
        assert transcript.text == text
        assert transcript.spans["all"] == (0, len(model.tokenizer(text, add_special_tokens=False)["input_ids"]))


def test_names(model: Model) -> None:
    made = watches(WATCHES, model, QUESTIONS, GENERAL_TEXT[:2], 7)
    assert [(w.name, w.steps) for w in made] == [(name, 7) for name in WATCHES]
    assert watches([], model, QUESTIONS, [], 1) == []
    with pytest.raises(ValueError, match=r"'beauty'.*accuracy, nll, drift"):
        watches(["nll", "beauty"], model, QUESTIONS, [], 1)


def test_a_resumed_run_measures_drift_from_the_same_start(tmp_path: Any) -> None:
    """The log of a run that was interrupted and resumed is the log of an unbroken one."""

    def go(where: Any, names: Sequence[str], stop: bool = False) -> list[dict[str, Any]]:
        m = Model(*tiny("llama"))
        watched = watches(names, m, QUESTIONS, GENERAL_TEXT[:3], 2)
        calls = []

        class Interrupt:
            def __call__(self, model: Model, step: int) -> dict[str, float]:
                calls.append(step)
                if stop and step == 3:
                    raise KeyboardInterrupt
                return {}

        from finetune.monitors import every

        options: dict[str, Any] = {"steps": 4, "batch_size": 4, "autocast": False, "lr": 1e-2}
        saved = {"checkpoints": where / "saved", "save_every": 2}
        try:
            tune(m, taught(m), watch=[*watched, every(1, Interrupt())], log=where / "log", **options, **saved)
        except KeyboardInterrupt:
            return []
        lines = [line for line in read_log(where / "log") if line["monitor"] in names]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    names = ("nll", "drift", "drift-general", "change")
    unbroken = go(tmp_path / "a", names)
    go(tmp_path / "b", names, stop=True)
    assert go(tmp_path / "b", names) == unbroken
    assert len(unbroken) == 12
    assert unbroken[-3]["all"] > 0
