"""The toolkit's measures as monitors: their numbers are those of the measures themselves, and they leave the model alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from analyses.general_text import GENERAL_TEXT
from analyses.representation import drift, linear_cka, mean_shift, subspace_angles
from analyses.scoring import nll
from analyses.tasks import Question, chained_sums
from analyses.watch import (
    WATCHES,
    AnswerLikelihood,
    Answers,
    DriftFromStart,
    Representation,
    TokenEntropy,
    as_transcripts,
    watches,
)
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
    # the thinking of all four, of which one was cut off, counted as far as it was seen
    tokens = [t.spans["thinking"][1] - t.spans["thinking"][0] for t in given]
    assert found["thinking_tokens"] == sum(tokens) / 4
    assert found["thinking_cut"] == (0 if unfinished.finished else 0.25)


def test_a_trial_does_a_small_part_of_the_work(model: Model) -> None:
    """Of every monitor that was not made by measuring once; its share is that of the tokens, or entries, it touches."""
    tune(model, taught(model), method="full", steps=1, batch_size=4, autocast=False)
    sizes = [W.numel() for site, W in model.weights.items() if site.layer is not None and W.ndim == 2]
    tokens = [len(t.ids) for t in taught(model)]
    prompt, _ = taught(model)[0].spans["completion"]
    entries = max(sizes) / sum(sizes)
    shares = {
        "nll": tokens[0] / sum(tokens), "entropy": tokens[0] / sum(tokens), "change": entries, "gradient": entries,
        "geometry": entries, "accuracy": (prompt + 2) / (4 * (prompt + 32)),
    }  # fmt: skip
    for watch in watches(WATCHES, model, QUESTIONS, GENERAL_TEXT[:2], max_new_tokens=32):
        monitor: Any = watch.monitor
        if hasattr(monitor, "prepared"):
            assert not hasattr(monitor, "trial")
        else:
            optimizer = [None] if hasattr(monitor, "before_step") else []
            assert monitor.trial(model, *optimizer) == pytest.approx(shares[watch.name])


def test_answers_that_do_not_think_have_no_length_of_thinking(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [model.transcript(q.question, q.answer) for q in QUESTIONS]
    monkeypatch.setattr(model, "generate", lambda asked, **options: given)
    found = Answers(QUESTIONS)(model, 0)
    assert found["accuracy"] == 1
    assert math.isnan(found["thinking_tokens"])
    assert math.isnan(found["thinking_cut"])


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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_entropy_is_that_of_each_tokens_distribution(family: str) -> None:
    model = Model(*tiny(family))
    told = taught(model)
    found = TokenEntropy(told, over=("thinking", "answer"))(model, 0)
    for span in ("thinking", "answer"):
        nats, tokens = 0.0, 0
        for t in told:
            with torch.no_grad():
                p = model.module(input_ids=torch.tensor([t.ids])).logits[0].double().softmax(-1)
            for i in range(*t.spans[span]):
                nats -= sum(float(x) * math.log(float(x)) for x in p[i - 1] if x > 0)
                tokens += 1
        assert found[span] == pytest.approx(nats / tokens, rel=1e-4)
        assert 0 < found[span] < math.log(100)


def test_representation_is_the_measures_own_numbers(model: Model) -> None:
    told = taught(model)
    start = collect(model, told, at="*.resid", over=("thinking", "answer"))
    watch = Representation(model, told, layers=[1, 3], k=2)
    assert watch.prepared > 0
    still = watch(model, 0)
    assert [still[f"thinking.{m}"] for m in ("cka", "shift")] == pytest.approx([1, 0])
    assert still["thinking.angle"] == pytest.approx(0, abs=1e-5)
    shake(model)
    found = watch(model, 1)
    now = collect(model, told, at="*.resid", over=("thinking", "answer"))
    for i, span in enumerate(("thinking", "answer")):
        each = []
        for layer in (1, 3):
            X, Y = (a[f"{layer}.resid"][a.span == i] for a in (start, now))
            expected = {"cka": linear_cka(X, Y), "angle": subspace_angles(X, Y, 2)[0], "shift": mean_shift(X, Y)}
            for measure, value in expected.items():
                assert found[f"{span}.L{layer}.{measure}"] == pytest.approx(value, abs=1e-6)
            each.append(expected)
        for measure in ("cka", "angle", "shift"):
            assert found[f"{span}.{measure}"] == pytest.approx(sum(e[measure] for e in each) / 2, abs=1e-6)
    assert found["thinking.cka"] < 0.9999
    assert found["thinking.angle"] > 0.1


def test_representation_of_many_tokens_is_of_a_fixed_draw(model: Model) -> None:
    told = taught(model)
    # by default all layers of three, and of a span of five tokens four components
    short = Representation(model, [model.transcript("q", "<think>ab</think>12345")], over=["answer"])(model, 0)
    assert {f"answer.L{layer}.cka" for layer in (1, 2, 3)} == {k for k in short if ".L" in k and k.endswith("cka")}
    assert short["answer.angle"] < 1e-6
    few = Representation(model, told, layers=[2], over=["thinking"], k=2, rows=12)
    again = Representation(model, told, layers=[2], over=["thinking"], k=2, rows=12)
    other = Representation(model, told, layers=[2], over=["thinking"], k=2, rows=12, seed=1)
    shake(model)
    found = few(model, 1)
    assert found == again(model, 1) != other(model, 1)
    assert found == few(model, 1)


def test_a_token_in_several_spans_is_a_row_of_each(model: Model) -> None:
    told = taught(model)
    together = Representation(model, told, layers=[2], over=("thinking", "completion"), k=2)
    alone = Representation(model, told, layers=[2], over=("completion",), k=2)
    shake(model)
    expected = alone(model, 1)
    found = together(model, 1)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_representation_never_has_the_first_token_of_a_text(model: Model) -> None:
    texts = as_transcripts(model, GENERAL_TEXT[:3])
    first = Representation(model, texts, layers=[2], over=("all",), k=2)
    rest = Representation(model, texts, layers=[2], over=("completion",), k=2)
    shake(model)
    assert list(first(model, 1).values()) == pytest.approx(list(rest(model, 1).values()))


def test_representation_says_what_it_lacks(model: Model) -> None:
    bare = [model.transcript(q.question, q.answer) for q in QUESTIONS]
    with pytest.raises(ValueError, match="None of the 4 transcripts has a span thinking; they have"):
        Representation(model, bare)
    with pytest.raises(
        ValueError, match=r"'answer' has \d+ tokens in all, but 40 principal components asks for 41 or more"
    ):
        Representation(model, taught(model), over=["answer"], k=40)
    with pytest.raises(
        ValueError, match=r"None of the 4 transcripts has a span thinking.*questions with a worked solution"
    ):
        watches(["representation"], model, [Question(q.question, q.answer) for q in QUESTIONS], [])


@pytest.mark.parametrize("over", ["completion", "all"])
def test_drift_is_measured_from_when_it_was_made(model: Model, over: str) -> None:
    told = taught(model)
    start = collect(model, told, at="*.resid", over=over)
    start = start.where(start.position > 0)
    watch = DriftFromStart(model, told, layers=[1, 3], over=over)
    assert watch(model, 0) == {"all": 0, "L1": 0, "L3": 0}
    shake(model)
    # first called after the weights have moved, as in a resumed run: the start is still the start
    late = DriftFromStart(model, told, layers=[1, 3], over=over)
    assert late(model, 0)["all"] == 0
    found = watch(model, 1)
    now = collect(model, told, at="*.resid", over=over)
    now = now.where(now.position > 0)
    for layer in (1, 3):
        expected = mean_shift(start[f"{layer}.resid"], now[f"{layer}.resid"])
        assert found[f"L{layer}"] == pytest.approx(expected)
        assert expected > 0
    assert found["all"] == pytest.approx((found["L1"] + found["L3"]) / 2)


def test_drift_on_general_text_leaves_out_the_first_token_of_each(model: Model) -> None:
    texts = GENERAL_TEXT[:3]
    told = as_transcripts(model, texts)
    layers = [0, 1, 2, 3]
    (watch,) = watches(["drift-general"], model, [], texts)
    start = collect(model, told, at="*.resid", over="all")
    shake(model)
    found, now = watch.monitor(model, 1), collect(model, told, at="*.resid", over="all")
    keep = start.position > 0
    for layer in layers:
        expected = mean_shift(start[f"{layer}.resid"][keep], now[f"{layer}.resid"][keep])
        assert found[f"L{layer}"] == pytest.approx(expected)
    assert drift(start.where(keep), now.where(keep), told, over="all", k=2, draws=2).frame().query(
        "measure == 'mean_shift'"
    )["value"].mean() == pytest.approx(found["all"], rel=1e-5)


def test_default_layers_are_spread_over_the_depth(model: Model) -> None:
    assert list(DriftFromStart(model, taught(model))(model, 0)) == ["all", "L0", "L1", "L2", "L3"]


def test_plain_text_is_a_transcript_of_all_its_tokens(model: Model) -> None:
    for text, transcript in zip(GENERAL_TEXT[:3], as_transcripts(model, GENERAL_TEXT[:3]), strict=True):
        assert transcript.text == text
        count = len(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert (transcript.spans["all"], transcript.spans["completion"]) == ((0, count), (1, count))


def test_names(model: Model) -> None:
    made = watches(WATCHES, model, QUESTIONS, GENERAL_TEXT[:2], 7)
    assert [(w.name, w.steps) for w in made] == [(name, 7) for name in WATCHES]
    assert watches([], model, QUESTIONS, [], 1) == []
    assert {w.steps for w in watches(["nll", "change"], model, QUESTIONS, [])} == {None}
    with pytest.raises(ValueError, match=r"'beauty'.*nll, entropy, .*accuracy"):
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

    names = ("nll", "drift", "drift-general", "change", "representation", "geometry", "entropy")
    unbroken = go(tmp_path / "a", names)
    go(tmp_path / "b", names, stop=True)
    assert go(tmp_path / "b", names) == unbroken
    assert len(unbroken) == 21
    assert next(line["all"] for line in reversed(unbroken) if line["monitor"] == "drift") > 0
