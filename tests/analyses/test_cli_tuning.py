"""The command that fine-tunes: every option reaches the training, and idle ones are errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from analyses.cli.tuning import METHODS, OBJECTIVES, RULES, SELECTS, tune
from analyses.tasks import side_of
from finetune.lift.selection import Select
from finetune.rules import Rule
from finetune.tune import Method
from surgery.checkpoint import Checkpoint
from surgery.delta import save_delta
from tests.families import save_tiny

SCRIPTED = {"random-triplets", "smallest-triplets"}  # further controls, from Python
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
    ],
    ids=" ".join,
)
def test_options_change_the_model(words: list[str], surgery, base: Path, plain: str, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert done.code == 0, done.err
    assert Checkpoint(tmp_path / "out").hash() != plain
    assert surgery("verify", tmp_path / "out").code == 0


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
