"""`surgery sweep`: three kinds of change, what it leaves, that it resumes, verifies and replays, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from analyses import cli
from analyses.cli.change import diff
from analyses.dose import Sweep
from probes.directions import Direction
from surgery.model import Model
from surgery.record import Record
from tests.families import HIDDEN, save_tiny, tiny

SHORT = ["--count", 2, "--passages", 2, "--max-new-tokens", 6, "--length", "completion", "--samples", 6, "-q"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, whose answers tend to end, another model, their difference, and a vector."""
    home = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        save_tiny("llama", home / name, tied=False)
        model = Model(*tiny("llama", tied=False))
        end = int(model.tokenizer.eos_token_id)  # type: ignore[arg-type]
        with torch.no_grad():
            mean = model.module.base_model(input_ids=torch.arange(4, 100)[None]).last_hidden_state[0].mean(0)
            model.module.lm_head.weight[end] = 6 * mean / mean.square().sum()  # type: ignore[union-attr, index]
            model.module.model.layers[1].mlp.down_proj.weight.mul_(1 + 0.1 * seed)  # type: ignore[union-attr]
        model.module.save_pretrained(home / name)
    diff(str(home / "tuned"), str(home / "base"), home / "vector")
    save_file({"u": torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))}, home / "u.safetensors")
    return home


def test_each_kind_of_change_is_swept_and_leaves_table_figure_and_record(surgery, home: Path, tmp_path: Path) -> None:
    kinds = {
        "task vector": ["--add", home / "vector", "--strengths", "0.5,1"],
        "steering, completion": [
            "--steer",
            home / "u.safetensors",
            "--at",
            "1.resid",
            "--over",
            "completion",
            "--strengths",
            "-0.3,0.3",
        ],
        "edit, layer 1": [
            "--remove",
            home / "u.safetensors",
            "--at",
            "*.mlp.down",
            "--layers",
            "1",
            "--strengths",
            "1,2",
        ],
    }
    for i, (arm, words) in enumerate(kinds.items()):
        to = tmp_path / str(i)
        said = surgery("sweep", home / "base", *words, "--to", to, "--controls", 1, *SHORT)
        assert said.code == 0, said
        assert arm in said.out
        assert "knee" in said.out
        assert {p.name for p in to.iterdir()} == {
            "cells",
            "plan.json",
            "sweep.json",
            "sweep.csv",
            "knees.csv",
            "sweep.png",
            "frontier.png",
            "record.json",
        }
        table = pd.read_csv(to / "sweep.csv")
        assert set(table["arm"]) == {arm}
        assert len(table) == 3 * 2 * 6
        assert (to / "sweep.csv").read_text() == Sweep.load(to / "sweep.json").frame().to_csv(index=False)
        assert set(Record.load(to).inputs) == {"model", "change"}
        assert surgery("verify", to).code == 0
    figure = surgery("figure", "sweep", tmp_path / "0", "--to", tmp_path / "kl.png", "--measure", "kl")
    assert figure.code == 0, figure
    figure = surgery("figure", "frontier", tmp_path / "0", "--to", tmp_path / "f.png", "--measure", "accuracy")
    assert figure.code == 0, figure


def test_a_saved_direction_knows_where_it_acts(surgery, home: Path, tmp_path: Path) -> None:
    (tmp_path / "brief").mkdir()
    Direction.of({"1.mid": torch.ones(HIDDEN)}).save(tmp_path / "brief" / "direction.safetensors")
    words = ["--steer", tmp_path / "brief", "--strengths", "0.3", "--controls", 0, "--to", tmp_path / "out"]
    said = surgery("sweep", home / "base", *words, *SHORT)
    assert said.code == 0, said
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert table.query("strength == 0.3 and measure == 'kl'")["value"].item() > 0


def test_it_replays_and_resumes(surgery, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sweep", home / "base", "--add", home / "vector", "--strengths", "0.5,1", "--controls", 0, *SHORT]
    assert surgery(*words, "--to", tmp_path / "whole").code == 0
    replayed = surgery("replay", tmp_path / "whole", "--to", tmp_path / "again")
    assert replayed.code == 0, replayed
    assert "2 outputs equal, 0 differ" in replayed.out
    assert "finished sweep" in surgery(*words, "--to", tmp_path / "whole").err

    from analyses import dose

    measure, calls = dose._Bench.measure, []

    def stopped(self, change, strength):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(strength)
        return measure(self, change, strength)

    with monkeypatch.context() as patched:
        patched.setattr(dose._Bench, "measure", stopped)
        assert surgery(*words, "--to", tmp_path / "broken").code == 130
    assert not (tmp_path / "broken" / "record.json").exists()
    assert surgery(*words, "--to", tmp_path / "broken").code == 0
    assert (tmp_path / "broken" / "sweep.csv").read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()


def test_lengths_are_of_the_answer_where_the_model_writes_no_thinking(surgery, home: Path, tmp_path: Path) -> None:
    short = [word for word in SHORT if word not in ("--length", "completion")]
    words = ["sweep", home / "base", "--add", home / "vector", "--strengths", "1", "--controls", 0, *short]
    said = surgery(*words, "--to", tmp_path / "out")
    assert said.code == 0, said
    assert "length is counted over answer" in said.out
    assert Record.load(tmp_path / "out").results["length"] == "answer"
    assert Sweep.load(tmp_path / "out" / "sweep.json").settings["length"] == "answer"
    whole = (tmp_path / "out" / "sweep.csv").read_text()
    (tmp_path / "out" / "record.json").unlink()  # as if it had been interrupted just before the end
    again = surgery(*words, "--to", tmp_path / "out")
    assert again.code == 0, again
    assert (tmp_path / "out" / "sweep.csv").read_text() == whole
    assert Record.load(tmp_path / "out").results["length"] == "answer"
    said = surgery(*words, "--length", "thinking", "--to", tmp_path / "thinking")
    assert "--length" in said.err
    said = surgery(*words, "--length", "completion", "--max-new-tokens", 1, "--samples", 1, "--to", tmp_path / "cut")
    assert "--max-new-tokens" in said.err


def test_lengths_that_were_all_cut_off_have_no_interval(surgery, home: Path, tmp_path: Path) -> None:
    model = Model.load(str(home / "base"), dtype="float32")
    end = int(model.tokenizer.eos_token_id)  # type: ignore[arg-type]
    with torch.no_grad():
        model.module.lm_head.weight[end] = 0  # as likely as any  # type: ignore[union-attr, operator]
    model.module.save_pretrained(tmp_path / "endless")
    model.tokenizer.save_pretrained(tmp_path / "endless")
    diff(str(tmp_path / "endless"), str(home / "base"), tmp_path / "vector")
    words = ["--add", tmp_path / "vector", "--strengths", 1, "--controls", 0, *SHORT]
    said = surgery("sweep", home / "base", *words, "--to", tmp_path / "out")
    assert said.code == 0, said
    line = "task vector at strength 1: length: no interval: none of 12 ended before 6, so it is at least that"
    assert line in said.out.splitlines()
    row = pd.read_csv(tmp_path / "out" / "sweep.csv").query("measure == 'length' and strength == 1").iloc[0]
    assert (row["value"], row["n"], row["method"]) == (6, 2, line.partition("length: ")[2])
    assert row[["low", "high"]].isna().all()


def test_a_file_of_questions_that_changed_is_told_by_name(surgery, home: Path, tmp_path: Path) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(2)))
    words = ["--add", home / "vector", "--strengths", "1", "--controls", 0, "--data", data]
    assert surgery("sweep", home / "base", *words, "--to", tmp_path / "out", *SHORT).code == 0
    assert set(Record.load(tmp_path / "out").inputs) == {"model", "change", "data"}
    data.write_text(data.read_text().replace("1?", "2?"))
    assert "The input data" in surgery("replay", tmp_path / "out", "--to", tmp_path / "again").err


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(surgery, home: Path, tmp_path: Path) -> None:
    words = [
        "--steer",
        home / "u.safetensors",
        "--at",
        "*.resid",
        "--over",
        "thinking,answer~/a,b/",
        "--layers",
        "0,1-2",
        "--strengths",
        "1,2,3",
    ]
    said = surgery("sweep", home / "base", *words, "--to", tmp_path / "out", "--dry-run")
    assert said.code == 0
    assert "4 arms at 3 strengths" in said.out
    assert "73 times" in said.out  # 1 + 4 * (1 + 5) * 3
    again = [*words[:-1], "2,0,1,2.0"]  # what the untouched model does is measured once, and each strength too
    said = surgery("sweep", home / "base", *again, "--to", tmp_path / "out", "--dry-run")
    assert "4 arms at 2 strengths" in said.out
    assert "49 times" in said.out
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_exit_code_2(surgery, home: Path, tmp_path: Path, unchecked: None) -> None:
    u, vector = home / "u.safetensors", home / "vector"
    cases: list[tuple[list[object], str]] = [
        (["--strengths", "1"], "One change"),
        (["--strengths", "1", "--add", vector, "--steer", u], "One change"),
        (["--strengths", "much", "--add", vector], "--strengths much: give finite numbers"),
        (["--strengths", "nan", "--add", vector], "--strengths nan: give finite numbers"),
        (["--strengths", "1", "--add", vector, "--at", "*.attn.o"], "--at is of"),
        (["--strengths", "1", "--remove", u, "--at", "*.attn.o", "--over", "thinking"], "--over is of --steer"),
        (["--strengths", "1", "--remove", u], "--remove needs --at"),
        (["--strengths", "1", "--remove", u, "--at", "*.mlp.wrong"], "*.mlp.wrong"),
        (["--strengths", "1", "--steer", u], "Say where to steer"),
        (["--strengths", "1", "--steer", u, "--at", "9.resid"], "9.resid"),
        (["--strengths", "1", "--steer", u, "--at", "1.resid", "--how", "shout"], "shout"),
        (["--strengths", "1", "--steer", tmp_path / "none.safetensors", "--at", "1.resid"], "none.safetensors"),
        (["--strengths", "1", "--add", vector, "--layers", "3-1"], "--layers 3-1"),
        (["--strengths", "1", "--add", vector, "--length", "thinking"], "no length"),
        (["--strengths", "1", "--add", vector, "--data", "songs"], "songs"),
    ]
    for i, (words, says) in enumerate(cases):
        said = surgery(
            "sweep",
            home / "base",
            *words,
            "--to",
            tmp_path / f"out{i}",
            *[w for w in SHORT if w not in ("--length", "completion")],
        )
        assert said.code == 2, (words, said)
        lines = said.err.strip().splitlines()
        assert len(lines) == 1, said.err
        assert says in lines[0], said.err
    assert not list(tmp_path.iterdir())


def test_it_can_be_replayed_by_name() -> None:
    from analyses.cli.receipts import COMMANDS

    assert COMMANDS["sweep"] is cli.dose.sweep
    assert json.dumps(cli.dose._groups("3,7,10-12")) == "[[3], [7], [10, 11, 12]]"
