"""The command that fine-tunes: every option reaches the training, and idle ones are errors."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

from analyses.cli.tuning import METHODS, OBJECTIVES, RULES, SELECTS, _spans, tune
from analyses.tasks import side_of
from finetune.lift.selection import Select
from finetune.rules import Rule
from finetune.tune import Method
from surgery.checkpoint import Checkpoint
from surgery.delta import save_delta
from tests.families import save_tiny

SCRIPTED = {"random-triplets", "smallest-triplets"}  # further controls, from Python
NLL = "answer NLL (nats per token)"
ABSENT = next(name for name in ("mlflow", "dvclive", "swanlab") if find_spec(name) is None)
SHORT = ["--steps", "2", "--batch-size", "4", "--quiet"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    to = tmp_path_factory.mktemp("plain") / "out"
    tune(str(base), to, steps=2, batch_size=4, quiet=True)
    return Checkpoint(to).hash()


@pytest.mark.parametrize(
    "words",
    [
        ["--over", "thinking:0.5,answer:2"],
        ["--objective", "dft", "--block", "4"],
        ["--objective", "asft", "--mask-thought", "0.9", "--scope", "global"],
        ["--select", "movement", "--lr", "0.01"],
        ["--over", "thinking[:16]"],
        ["--over", "thinking[:16]:0.5, answer[-1]"],
        ["--over", "/[0-9]{1,3}/:0.5, answer"],
        ["--refresh", "1"],
        ["--weight-decay", "0.5"],
        ["--lora-rank", "2"],
        ["--filter-rank", "2"],
        ["--density", "0.1"],
        ["--batch-size", "2"],
        ["--seed", "1"],
    ],
    ids=" ".join,
)
def test_options_change_the_model(words: list[str], surgery, base: Path, plain: str, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert Checkpoint(tmp_path / "out").hash() != plain
    assert surgery("verify", tmp_path / "out").code == 0


def test_micro_batches_reach_the_training(surgery, base: Path, tmp_path: Path) -> None:
    """They change nothing but what is in memory at a time: the log says that they were made."""
    watched = ["--watch", "change", "--watch-every", "2"]
    done = surgery("tune", base, *SHORT, *watched, "--accumulate", "2", "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert begun(tmp_path / "out")["accumulate"] == 2


def begun(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.jsonl").read_text().split("\n")[0])


def test_the_budget_of_what_is_watched_is_asked_for(surgery, base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, "--watch", "change,nll", "--budget", "50", "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert begun(tmp_path / "out")["budget"] == 50
    assert "<html" in (tmp_path / "out" / "log.html").read_text()
    drawn = tmp_path / "a.png"
    assert surgery("figure", "training", tmp_path / "out", "--to", drawn, "--measure", NLL).code == 0
    asked = surgery("figure", "training", tmp_path / "out" / "log.jsonl", "--to", tmp_path / "b.png", "--measure", "x")
    assert f"it has {NLL}, loss, norm of the gradient, relative change of the weights" in asked.err


def test_what_was_asked_for_and_never_measured_is_said(surgery, base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, "--watch", "nll,change", "--budget", "0", "--to", tmp_path / "out")
    assert "note: there was no time to measure nll, change" in done.err
    assert "--watch-every" in done.err


def test_refreshes_are_in_the_record(surgery, base: Path, tmp_path: Path) -> None:
    words = ["--refresh", "1", "--lr", "0.1", "--watch", "change", "--watch-every", "2"]
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert done.code == 0, done.err
    kept = json.loads((tmp_path / "out" / "record.json").read_text())["results"]["refreshes"]
    assert [one["step"] for one in kept] == [1, 2]
    assert all(0 < one["overlap"] < 1 and one["adopted"] for one in kept)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["mask_overlap"] for line in lines if "mask_overlap" in line] == [one["overlap"] for one in kept]


def test_spans_are_read_as_everywhere() -> None:
    assert _spans("thinking[:16]") == {"thinking[:16]": 1.0}
    assert _spans("thinking:0.5,answer:2") == {"thinking": 0.5, "answer": 2.0}
    assert _spans("thinking[:16]:0.5, sentence[-1]") == {"thinking[:16]": 0.5, "sentence[-1]": 1.0}
    assert _spans("/so, then: 1/, prompt~/a:2/:3") == {"/so, then: 1/": 1.0, "prompt~/a:2/": 3.0}


@pytest.mark.parametrize(
    "words", [["--rule", "norm"], ["--rule", "project"], ["--alpha", "3"], ["--lr", "0.01"]], ids=" ".join
)
def test_options_of_a_prior_change_the_model(
    words: list[str], surgery, base: Path, prior: Path, pulled: str, tmp_path: Path
) -> None:
    done = surgery("tune", base, *SHORT, "--prior", prior, *words, "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert Checkpoint(tmp_path / "out").hash() != pulled


@pytest.fixture(scope="module")
def prior(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    tune(str(base), folder / "expert", method="full", lr=0.01, steps=2, batch_size=4, quiet=True)
    save_delta(Checkpoint(folder / "expert") - Checkpoint(base), folder / "change", base_hash=Checkpoint(base).hash())
    return folder / "change"


@pytest.fixture(scope="module")
def pulled(base: Path, prior: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    to = tmp_path_factory.mktemp("pulled") / "out"
    tune(str(base), to, prior=str(prior), steps=2, batch_size=4, quiet=True)
    return Checkpoint(to).hash()


GRPO = ["--method", "grpo", "--samples", "4", "--batch-size", "8", "--steps", "2", "--quiet", "--length-target", "12"]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt to think a little before it answers, so that its completions differ in length."""
    folder = tmp_path_factory.mktemp("thinker")
    base = save_tiny("llama", folder / "base")
    tune(str(base), folder / "out", method="full", lr=0.01, steps=60, batch_size=8, quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")
def reinforced(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("reinforced") / "out"
    tune(str(thinker), to, method="grpo", samples=4, batch_size=8, steps=2, length_target=12, quiet=True)
    return to


def test_grpo_rewards_answer_format_and_length(surgery, thinker: Path, reinforced: Path) -> None:
    assert Checkpoint(reinforced).hash() != Checkpoint(thinker).hash()
    assert surgery("verify", reinforced).code == 0
    rounds = json.loads((reinforced / "record.json").read_text())["results"]["rounds"]
    assert [one["step"] for one in rounds] == [1, 2]
    assert all(set(one["parts"]) == {"answer", "format", "length"} for one in rounds)
    assert all(-1 <= one["parts"]["length"] <= 0 for one in rounds)


@pytest.mark.parametrize(
    "words",
    [["--beta", "5"], ["--samples", "2"], ["--lr", "0.01"], ["--length-target", "3"], ["--seed", "1"]],
    ids=" ".join,
)
def test_options_of_grpo_change_the_model(
    words: list[str], surgery, thinker: Path, reinforced: Path, tmp_path: Path
) -> None:
    done = surgery("tune", thinker, *GRPO, *words, "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert Checkpoint(tmp_path / "out").hash() != Checkpoint(reinforced).hash()


def test_drift_pulls_toward_a_vector_and_says_how_far(surgery, base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "expert"
    assert surgery("tune", base, *SHORT, "--method", "full", "--lr", "0.01", "--to", tuned).code == 0
    save_delta(Checkpoint(tuned) - Checkpoint(base), tmp_path / "prior", base_hash=Checkpoint(base).hash())
    pulled = ["--prior", tmp_path / "prior", "--alpha", "2", "--method", "full"]
    done = surgery("tune", base, *SHORT, *pulled, "--to", tmp_path / "out")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert f"effective merge coefficient {record['results']['merged']:.3f}" in done.out
    assert record["results"]["merged"] > 0
    assert set(record["inputs"]) == {"model", "prior"}


def test_a_watched_run_leaves_its_page(surgery, base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, "--watch", "nll,change", "--watch-every", "1", "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "log.jsonl").is_file()
    assert "<html" in (tmp_path / "out" / "log.html").read_text()


def test_a_file_with_few_questions_is_watched_on_those_it_has(surgery, base: Path, tmp_path: Path) -> None:
    def tuned(name: str, count: int):
        texts = [f"What is {i} + {i}?" for i in range(count)]
        rows = [{"question": q, "solution": "so", "answer": str(2 * i)} for i, q in enumerate(texts)]
        (tmp_path / f"{name}.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ["--data", tmp_path / f"{name}.txt", "--watch", "nll", "--watch-every", "1"]
        return texts, surgery("tune", base, *SHORT, *data, "--to", tmp_path / name)

    texts, done = tuned("some", 14)
    assert 0 < sum(side_of(text) == "test" for text in texts) < 32
    assert done.code == 0, done.err
    texts, done = tuned("few", next(i for i in range(14) if side_of(texts[i]) == "test"))
    assert done.code == 2
    assert "none of those in" in done.err
    assert not (tmp_path / "few").exists()


def test_grpo_is_watched_and_takes_the_options_of_lift(surgery, base: Path, tmp_path: Path) -> None:
    words = [
        "--method",
        "grpo",
        "--samples",
        "2",
        "--watch",
        "nll",
        "--watch-every",
        "1",
        "--select",
        "random",
        "--block",
        "4",
        "--scope",
        "global",
    ]
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert "same reward" in done.err  # of a model that answers nothing
    lines = [json.loads(line) for line in (tmp_path / ".out.tuning" / "log.jsonl").read_text().splitlines()]
    assert "nll" in {line["monitor"] for line in lines}


def test_a_file_of_questions_is_an_input_of_the_record(surgery, base: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + {i}?", "solution": "so", "answer": str(2 * i)} for i in range(14)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = surgery("tune", base, *SHORT, "--data", tmp_path / "q.jsonl", "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert set(json.loads((tmp_path / "out" / "record.json").read_text())["inputs"]) == {"model", "data"}


def test_grpo_says_when_nothing_is_ever_rewarded_differently(surgery, base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, "--method", "grpo", "--samples", "2", "--to", tmp_path / "out")
    assert done.code == 2
    assert "reward" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "rlhf"], "There is no objective 'rlhf'"),
        (["--objective", "dco"], "coverage (direct coverage optimisation, DCO)"),
        (["--alpha", "1"], "--alpha belongs to --prior"),
        (["--watch-every", "2"], "--watch-every belongs to --watch"),
        (["--samples", "4"], "--samples has no use with --method lift"),
        (["--method", "grpo", "--objective", "dft"], "--objective has no use with --method grpo"),
        (["--method", "grpo", "--samples", "3"], "no multiple of the 3 samples"),
        (["--method", "full", "--block", "4"], "full does not have them: leave out block"),
        (["--over", "thinking:much"], "give spans with weights"),
        (["--over", "thoughts[:2]"], "'thoughts[:2]' is not a span"),
        (["--budget", "0.1"], "--budget belongs to --watch"),
        (["--watch", "nll", "--watch-every", "1", "--budget", "0.1"], "--budget has no use with --watch-every"),
        (["--length-target", "9"], "--length-target has no use with --method lift"),
        (["--report-to", "nowhere"], "nowhere is not supported"),
        (["--report-to", ABSENT], f"requires {ABSENT} to be installed"),
        (["--method", "magic"], "There is no method 'magic'"),
    ],
)
def test_bad_usage_is_one_clear_error(
    words: list[str], message: str, surgery, unchecked: None, base: Path, tmp_path: Path
) -> None:
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_the_choices_are_those_of_the_library() -> None:
    assert (get_args(Method), get_args(Select), get_args(Rule)) == (METHODS, SELECTS, RULES)


def test_the_help_names_every_choice(surgery) -> None:
    words = set(re.findall(r"[\w-]+", surgery("tune", "--help").out))
    assert words >= {*OBJECTIVES, *get_args(Method), *get_args(Select), *get_args(Rule)} - SCRIPTED
