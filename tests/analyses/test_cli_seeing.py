"""`surgery seeing`: what it leaves, that it goes on and verifies, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analyses.seeing import Seeing

SHORT = ["--share", 0.001, "--items", 4, "--seeds", 1, "-q"]


def test_it_leaves_tables_figures_and_a_record_and_goes_on(surgery, tmp_path: Path) -> None:
    to = tmp_path / "study"
    said = surgery("seeing", "--to", to, "--arms", "sft,drift", *SHORT)
    assert said.code == 0, said
    assert all(arm in said.out for arm in ("untuned", "sft", "drift"))
    names = {path.name for path in to.iterdir()}
    assert names == {
        *("plan.json", "seed-0.json", "seeing.json", "seeing.csv", "differences.csv", "right.png", "nll.png"),
        "record.json",
    }
    assert list(dict.fromkeys(pd.read_csv(to / "seeing.csv")["arm"])) == ["untuned", "sft", "drift"]
    assert Seeing.load(to / "seeing.json").runs.settings["course"]["steps"] == 1
    assert surgery("verify", to).code == 0
    assert surgery("seeing", "--to", to, *SHORT).code == 2
    (to / "record.json").unlink()  # as if it had been interrupted just before the end
    again = surgery("seeing", "--to", to, "--arms", "sft,drift", *SHORT)
    assert again.code == 0, again
    assert again.out == said.out


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "sft,nothing"], "no arm 'nothing'"),
        (["--share", "0"], "share 0.0"),
    ],
)
def test_bad_input_is_one_line(surgery, tmp_path: Path, words: list[str], message: str) -> None:
    said = surgery("seeing", "--to", tmp_path / "study", *words)
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "study").exists()


def test_a_dry_run_writes_nothing(surgery, tmp_path: Path) -> None:
    said = surgery("seeing", "--to", tmp_path / "study", "--share", "0.5", "--dry-run")
    assert said.code == 0
    assert "40 steps of 64" in said.out
    assert not (tmp_path / "study").exists()
