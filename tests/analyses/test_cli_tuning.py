"""The command that fine-tunes: every option reaches the training, and idle ones are errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgery.checkpoint import Checkpoint
from surgery.delta import save_delta
from tests.families import save_tiny

SHORT = ["--steps", "2", "--batch-size", "4", "--quiet"]


def surgery(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analyses", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    to = tmp_path_factory.mktemp("plain") / "out"
    done = surgery("tune", base, *SHORT, "--to", to)
    assert done.returncode == 0, done.stderr
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
def test_options_change_the_model(words: list[str], base: Path, plain: str, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Checkpoint(tmp_path / "out").hash() != plain
    assert surgery("verify", tmp_path / "out").returncode == 0


def test_drift_pulls_toward_a_vector_and_says_how_far(base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "expert"
    assert surgery("tune", base, *SHORT, "--method", "full", "--lr", "0.01", "--to", tuned).returncode == 0
    save_delta(Checkpoint(tuned) - Checkpoint(base), tmp_path / "prior", base_hash=Checkpoint(base).hash())
    done = surgery(
        "tune",
        base,
        *SHORT,
        "--prior",
        tmp_path / "prior",
        "--alpha",
        "2",
        "--method",
        "full",
        "--to",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert f"effective merge coefficient {record['results']['merged']:.3f}" in done.stdout
    assert record["results"]["merged"] > 0
    assert set(record["inputs"]) == {"model", "prior"}


def test_a_watched_run_leaves_its_page(base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, "--watch", "nll,change", "--watch-every", "1", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "log.jsonl").is_file()
    assert "<html" in (tmp_path / "out" / "log.html").read_text()


def test_grpo_says_when_nothing_is_ever_rewarded_differently(base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, "--method", "grpo", "--samples", "2", "--to", tmp_path / "out")
    assert done.returncode == 2
    assert "reward" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "rlhf"], "There is no objective 'rlhf'"),
        (["--alpha", "1"], "--alpha is of --prior"),
        (["--samples", "4"], "--samples is of --method grpo"),
        (["--method", "grpo", "--watch", "nll"], "--watch has no use with --method grpo"),
        (["--method", "grpo", "--samples", "3"], "no multiple of the 3 samples"),
        (["--method", "full", "--block", "4"], "full does not have them: leave out block"),
        (["--over", "thinking:much"], "give spans with weights"),
        (["--method", "magic"], "There is no method 'magic'"),
    ],
)
def test_bad_usage_is_one_clear_error(words: list[str], message: str, base: Path, tmp_path: Path) -> None:
    done = surgery("tune", base, *SHORT, *words, "--to", tmp_path / "out")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
