"""`surgery generate`, `direction`, `heads` and `thinkedit` as a user meets them, on the planted length model."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses import cli
from analyses.cli.given import spans_in
from analyses.cli.probing import surety_in_words
from analyses.controls import PlantedLength, planted_length
from analyses.thinkedit import PANELS, Judged, ThinkEdit
from probes.calibration import CalibrationRow
from surgery.checkpoint import Checkpoint
from surgery.edits import RemoveDirection
from surgery.runs import Runs
from surgery.weights import apply
from tests.families import save_tiny

ROOT = Path(__file__).parent.parent.parent
TWO = ["--share", 2 / 16]


@pytest.fixture(scope="module")
def planted() -> PlantedLength:
    return planted_length(seed=0)


@pytest.fixture(scope="module")
def home(planted: PlantedLength, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model, questions for it, answers to the first of these and to others, and their direction."""
    home = tmp_path_factory.mktemp("home")
    planted.model.module.save_pretrained(home / "model")
    planted.model.tokenizer.save_pretrained(home / "model")
    for name, seed in (("first", 1), ("second", 2)):
        lines = [json.dumps({"question": q.question, "answer": q.answer}) for q in planted.questions(20, seed=seed)]
        (home / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        options = {"samples": 5, "max_new_tokens": 48, "seed": seed, "quiet": True}
        cli.think.generate(str(home / "model"), home / f"{name}-runs.jsonl", str(home / f"{name}.jsonl"), **options)
    cli.think.direction(str(home / "model"), str(home / "first-runs.jsonl"), home / "length", quiet=True)
    save_tiny("llama", home / "tiny")
    return home


def verified(surgery, folder: Path, inputs: set[str]) -> dict:
    record = json.loads((folder / "record.json").read_text())
    assert set(record["inputs"]) == inputs
    assert all(len(entry["hash"]) == 64 for entry in record["inputs"].values())
    assert surgery("verify", folder).code == 0
    said = surgery("replay", folder, "--to", folder.with_name(f"{folder.name}-again"))
    assert said.code == 0, said
    assert ", 0 differ" in said.out
    return record


def test_answers_are_kept_in_a_file_or_a_folder(surgery, home: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        home / "model",
        "--data",
        home / "second.jsonl",
        "--count",
        3,
        "--samples",
        2,
        "--max-new-tokens",
        9,
    ]
    words += ["--seed", 4, "-q"]
    assert "3 questions" in surgery(*words, "--to", tmp_path / "t.jsonl", "--dry-run").out
    assert not list(tmp_path.iterdir())
    said = surgery(*words, "--to", tmp_path / "t.jsonl")
    assert said.code == 0, said
    assert "6 answers to 3 questions" in said.out
    assert surgery(*words, "--to", tmp_path / "folder").code == 0
    alone, kept = Runs.load(tmp_path / "t.jsonl"), Runs.load(tmp_path / "folder" / "runs.jsonl")
    assert alone.transcripts == kept.transcripts
    assert alone.about["samples"] == kept.about["samples"] == 2
    assert {t.meta["gold"] for t in kept} == {"7"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "t.jsonl"]
    verified(surgery, tmp_path / "folder", {"model", "data"})
    assert surgery(*words, "--temperature", 0.2, "--to", tmp_path / "cold.jsonl").code == 0
    assert Runs.load(tmp_path / "cold.jsonl").transcripts != alone.transcripts


def test_a_direction_and_its_judgement(surgery, home: Path, planted: PlantedLength, tmp_path: Path) -> None:
    said = surgery(
        "direction", home / "model", "--runs", home / "first-runs.jsonl", "--of", "length", "--to", tmp_path / "d", "-q"
    )
    assert said.code == 0, said
    record = verified(surgery, tmp_path / "d", {"model", "runs"})
    from probes.directions import Direction

    found = Direction.load(tmp_path / "d" / "direction.safetensors")
    assert float(found["2.mid"] @ -planted.direction) > 0.95
    assert found.about["model"] == Runs.load(home / "first-runs.jsonl").model
    assert [row["site"] for row in record["results"]["sites"]] == [f"{layer}.mid" for layer in range(4)]
    assert len(pd.read_csv(tmp_path / "d" / "direction.csv")) == 4
    words = ["direction", home / "model", "--runs", home / "first-runs.jsonl", "-q"]
    for i, more in enumerate(
        (["--of", "right"], ["--over", "completion"], ["--at", "2.resid"], ["--like-paper", "--short", 6, "--long", 20])
    ):
        assert surgery(*words, *more, "--to", tmp_path / str(i)).code == 0, more
        other = Direction.load(tmp_path / str(i) / "direction.safetensors")
        assert other.sites != found.sites or not torch.allclose(other.raw("2.mid"), found.raw("2.mid"), atol=1e-3)


def test_heads_and_the_edit_they_ask_for(surgery, home: Path, planted: PlantedLength, tmp_path: Path) -> None:
    words = ["heads", home / "model", "--direction", home / "length", "-q", *TWO]
    said = surgery(*words, "--runs", home / "second-runs.jsonl", "--strength", 1.5, "--to", tmp_path / "h h")
    assert said.code == 0, said
    command = ["surgery", "edit", str(home / "model"), "--edits", str(tmp_path / "h h" / "edits.yml"), "--to", "OUT"]
    assert shlex.split(said.out.splitlines()[-1]) == command
    assert "note" not in said.err
    record = verified(surgery, tmp_path / "h h", {"model", "runs", "direction"})
    assert set(record["results"]["heads"]) == {str(s) for s in planted.heads}
    assert len(pd.read_csv(tmp_path / "h h" / "heads.csv")) == 16
    out = tmp_path / "edited"
    edited = surgery(
        "edit", home / "model", "--edits", tmp_path / "h h" / "edits.yml", "--to", out, "--allow-loops", "-q"
    )
    assert edited.code == 0, edited
    from probes.directions import Direction

    base, found = Checkpoint(home / "model"), Direction.load(home / "length")
    expected = apply(RemoveDirection(found, 1.5), base, planted.heads)
    written = Checkpoint(out)
    for site in base:
        torch.testing.assert_close(written[site], expected[site].float(), rtol=0, atol=1e-6)
    removed = surgery(
        "edit",
        home / "model",
        "--remove",
        home / "length",
        "--at",
        "1.attn.o.h2",
        "--to",
        tmp_path / "r",
        "--allow-loops",
        "-q",
    )
    assert removed.code == 0, removed
    one = apply(RemoveDirection(found), base, "1.attn.o.h2")["1.attn.o"]
    torch.testing.assert_close(Checkpoint(tmp_path / "r")["1.attn.o"], one, rtol=0, atol=1e-6)
    at_once = ["--remove", home / "length", "--heads", 2 / 16, "--runs", home / "second-runs.jsonl", "--strength", 1.5]
    said = surgery("edit", home / "model", *at_once, "--to", tmp_path / "once", "--allow-loops", "-q")
    assert said.code == 0, said
    for site in base:
        assert torch.equal(Checkpoint(tmp_path / "once")[site], written[site])
    assert (tmp_path / "once" / "heads.csv").read_text() == (tmp_path / "h h" / "heads.csv").read_text()
    assert (
        verified(surgery, tmp_path / "once", {"model", "runs", "direction"})["results"]["heads"]
        == record["results"]["heads"]
    )
    named = [word for head in planted.heads for word in ("--at", head)]
    assert (
        surgery("edit", home / "model", "--remove", home / "length", *named, "--to", tmp_path / "n", "--dry-run").code
        == 0
    )
    again = surgery(*words, "--runs", home / "first-runs.jsonl", "--to", tmp_path / "same")
    assert again.code == 0
    assert "note: 20 of the 20 questions are the direction's own" in again.err


def test_a_probe_over_layers_and_spans(surgery, home: Path, tmp_path: Path) -> None:
    words = ["probe", home / "model", "--runs", home / "first-runs.jsonl", "--folds", 2, "-q"]
    words += ["--of", "length", "--over", "prompt,thinking[:1]", "--at", "2.mid", "--components", 8, "--shuffles", 1]
    said = surgery(*words, "--to", tmp_path / "p", "--dry-run")
    assert said.out.startswith(
        "length: 100 of 100 transcripts have a label, 49 of them 1; 1 is thinking of 7 tokens or more"
    )
    assert "20 questions in 2 folds; 2.mid over prompt, thinking[:1]" in said.out
    assert not list(tmp_path.iterdir())
    said = surgery(*words, "--to", tmp_path / "p")
    assert said.code == 0, said
    record = verified(surgery, tmp_path / "p", {"model", "runs"})
    table = pd.read_csv(tmp_path / "p" / "probes.csv").set_index(["site", "span"])
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        "probes.json",
        "probes.csv",
        "spans.csv",
        "probes.png",
        "record.json",
    }
    assert len(table) == 4  # the embedding is a control
    # the mood is drawn with the first token of the thinking: the prompt knows nothing of it
    assert table.loc[("2.mid", "thinking[:1]"), "low"] > table.loc[("2.mid", "prompt"), "value"]
    assert table.loc[("2.mid", "thinking[:1]"), "length"] == 0.5
    assert [row["span"] for row in record["results"]["spans"]] == ["prompt", "thinking[:1]"]
    assert "thinking[:1]: AUC " in said.out
    drawn = surgery("figure", "probes", tmp_path / "p", "--measure", "accuracy", "--to", tmp_path / "p.png")
    assert drawn.code == 0, drawn


PROBES = {
    "probe-calibration": ({"calibration.json", "calibration.csv", "reliability.csv", "reliability.png"}, "reliability"),
    "probe-transfer": ({"transfer.json", "transfer.csv", "transfer.png"}, "probe-transfer"),
    "probe-along": ({"along.json", "along.csv", "along.png"}, "probe-along"),
}


@pytest.mark.parametrize("command", PROBES)
def test_how_sure_a_probe_is_and_where_it_holds(surgery, home: Path, tmp_path: Path, command: str) -> None:
    runs = {"first": home / "first-runs.jsonl"}
    words = [command, home / "model", "--of", "length", "--at", "2.mid", "--components", 4, "--folds", 2, "-q"]
    if command == "probe-transfer":
        runs["second"] = home / "second-runs.jsonl"
        words += [word for name, path in runs.items() for word in ("--runs", f"{name}={path}")]
    else:
        words += ["--runs", runs["first"], *(["--fractions", "0,0.5"] if command == "probe-along" else ["--bins", 4])]
    if command != "probe-along":
        words += ["--over", "thinking[:1]"]
    said = surgery(*words, "--to", tmp_path / "p", "--dry-run")
    assert said.code == 0, said
    assert "length: 100 of 100 transcripts have a label" in said.out
    assert not list(tmp_path.iterdir())
    said = surgery(*words, "--to", tmp_path / "p")
    assert said.code == 0, said
    files, figure = PROBES[command]
    assert {p.name for p in (tmp_path / "p").iterdir()} == files | {"record.json"}
    assert surgery("figure", figure, tmp_path / "p", "--to", tmp_path / "p.png").code == 0
    inputs = {"model", *([f"runs {name}" for name in runs] if command == "probe-transfer" else ["runs"])}
    record = verified(surgery, tmp_path / "p", inputs)
    if command == "probe-calibration":
        assert [row["scaling"] for row in record["results"]["scalings"]] == ["none", "temperature", "platt"]
        assert "platt: Brier 0." in said.out
        return
    # the mood is drawn with the first token of the thinking: whatever the questions, it is known then, and before it is not
    at = {(row["trained"], row["tested"]): row for row in record["results"]["pairs"]}
    if command == "probe-transfer":
        assert at["first", "second"]["low"] > 0.5
        assert "trained in first, judged in second: AUC " in said.out
    else:
        assert at["0.5", "0.5"]["low"] > 0.5 > at["0", "0"]["low"]
        assert "after 0.5 of the thinking, the shared probe: AUC " in said.out


def test_where_all_draws_agree_no_interval_is_printed() -> None:
    """As of a temperature so high that a half is said of everything, whose Brier score is the same whatever is true."""
    numbers = {f.name: 0.25 for f in fields(CalibrationRow)} | {
        "scaling": "temperature",
        "site": "2.mid",
        "n": 12,
        "rows": 24,
    }
    said = surety_in_words(CalibrationRow(**numbers | {"brier_low": math.nan, "brier_high": math.nan}))
    assert "Brier 0.250 (no interval: all draws agree) (always the share 0.250" in said
    assert "ECE 0.250 [0.250, 0.250], within chance (0.250); 12 questions" in said
    said = surety_in_words(
        CalibrationRow(**numbers | {"ece_low": math.nan, "ece_high": math.nan, "ece_floor": math.nan})
    )
    assert "ECE 0.250 (no interval: all draws agree), what is chance unknown; 12 questions" in said


def test_a_comma_in_a_pattern_does_not_end_a_span() -> None:
    assert spans_in("prompt, thinking[:2]") == ["prompt", "thinking[:2]"]
    assert spans_in("prompt~/a,b/,/c,/,answer") == ["prompt~/a,b/", "/c,/", "answer"]


def test_thinkedit_from_questions_to_a_judged_model(
    surgery, home: Path, planted: PlantedLength, tmp_path: Path
) -> None:
    words = [
        "thinkedit",
        home / "model",
        "--data",
        home / "first.jsonl",
        "--count",
        20,
        "--samples",
        5,
        "--max-new-tokens",
        40,
        *TWO,
    ]
    words += ["--controls", 1, "--no-sweeps", "--passages", 2, "--allow-loops", "-q"]
    out = tmp_path / "out"
    said = surgery(*words, "--to", out, "--dry-run")
    assert "8 questions" in said.out
    assert not list(tmp_path.iterdir())
    said = surgery(*[2 if word == 40 else word for word in words], "--to", out)
    assert (said.code, "Generate with more" in said.err, "--max-new-tokens" in said.err) == (2, True, True)
    said = surgery(*words, "--to", out)
    assert said.code == 0, said
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    record = json.loads((out / "record.json").read_text())
    assert set(record["results"]["heads"]) == {str(s) for s in planted.heads}
    assert record["results"]["questions"] == {"direction": 8, "heads": 4, "judging": 8}
    assert {row["measure"] for row in record["results"]["effects"]} == {"length", "accuracy", "text_nll", "kl"}
    changed = {s for s in Checkpoint(out) if not torch.equal(Checkpoint(out)[s], Checkpoint(home / "model")[s])}
    assert {str(s) for s in changed} == {"1.attn.o", "2.attn.o"}
    again = ThinkEdit.load(out / "thinkedit")
    pd.testing.assert_frame_equal(again.judged.frame(), pd.read_csv(out / "thinkedit" / "edit.csv"), check_dtype=False)
    drawn = {path.stem for path in (out / "thinkedit" / "figures").glob("*.png")}
    assert drawn == {"lengths", "accuracy-under-length", "heads", "strengths-length", "strengths-accuracy"}
    verified(surgery, out, {"model", "data"})
    drawn = surgery("figure", "edit", out / "thinkedit", "--measure", "accuracy", "--to", tmp_path / "edit.png")
    assert drawn.code == 0, drawn
    assert surgery("figure", "lengths", out / "thinkedit", "--to", tmp_path / "lengths.png").code == 0
    for figure in ("heads", "edit", "lengths"):
        drawn = surgery("figure", figure, out, "--to", tmp_path / f"{figure} of all.png")
        assert drawn.code == 0, drawn


def test_heads_are_judged_later(surgery, home: Path, tmp_path: Path) -> None:
    found, out = tmp_path / "found", tmp_path / "out"
    words = ["heads", home / "model", "--direction", home / "length", "--runs", home / "second-runs.jsonl", *TWO, "-q"]
    assert surgery(*words, "--to", found).code == 0
    words = ["judge", home / "model", "--found", found, "--data", home / "first.jsonl", "--count", 8, "--controls", 1]
    words += ["--no-sweeps", "--passages", 2, "--max-new-tokens", 40, "-q"]
    said = surgery(*words, "--to", out, "--dry-run")
    assert "2 heads at strength 1, judged on 8 questions" in said.out
    said = surgery(*words, "--to", out)
    assert said.code == 0, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found", "out"]
    effects = pd.read_csv(out / "effects.csv").set_index("measure")
    assert effects.loc["length", "difference"] > 0
    judged = Judged.load(out / "judged")
    pd.testing.assert_frame_equal(judged.frame(), pd.read_csv(out / "edit.csv"), check_dtype=False)
    record = verified(surgery, out, {"model", "data", "direction", "heads"})
    assert record["results"]["heads"] == json.loads((found / "record.json").read_text())["results"]["heads"]
    assert (out / "figures" / "strengths-length.png").is_file()
    for figure in ("lengths", "accuracy-under-length", "edit"):
        drawn = surgery("figure", figure, out, "--to", tmp_path / f"{figure}.png")
        assert drawn.code == 0, drawn
        (tmp_path / f"{figure}.png").unlink()
    said = surgery("figure", "heads", out, "--to", tmp_path / "heads.png")
    assert "no table for heads (heads.csv)" in said.err
    assert (
        "it has answers.csv, edit.csv, effects.csv, which are drawn as lengths, accuracy-under-length, edit, "
        in said.err
    )
    assert "note: " in surgery(*words[:4], "--data", home / "second.jsonl", *words[6:], "--to", tmp_path / "again").err
    for words, part in (
        (["judge", home / "model", "--found", home], "holds no heads"),
        (["judge", home / "tiny", "--found", found], "another model"),
    ):
        said = surgery(*words, "--to", tmp_path / "none")
        assert (said.code, part in said.err) == (2, True), said


def test_thinkedit_like_the_paper_with_all_panels(surgery, home: Path, tmp_path: Path) -> None:
    words = [
        "thinkedit",
        home / "model",
        "--data",
        home / "first.jsonl",
        "--count",
        15,
        "--samples",
        4,
        "--max-new-tokens",
        32,
        *TWO,
    ]
    words += ["--like-paper", "--short", 6, "--long", 20, "--steer", "--site", "mlp", "--controls", 1, "--passages", 1]
    said = surgery(*words, "--allow-loops", "-q", "--to", tmp_path / "out")
    assert said.code == 0, said
    done = ThinkEdit.load(tmp_path / "out" / "thinkedit")
    assert (done.found.recipe.how, done.found.recipe.site) == ("thresholds", "mlp")
    drawn = {path.stem for path in (tmp_path / "out" / "thinkedit" / "figures").glob("*.png")}
    panels = {f"{panel}-{measure}" for panel in PANELS for measure in ("length", "accuracy")}
    assert drawn == {"lengths", "accuracy-under-length", "heads"} | panels


def test_what_is_refused_is_one_line(surgery, home: Path, tmp_path: Path, unchecked) -> None:
    model, runs, out = home / "model", home / "first-runs.jsonl", tmp_path / "out"
    for words, parts in (
        (["direction", model, "--runs", runs, "--of", "speed"], ["--of speed", "length or right"]),
        (["direction", model, "--runs", home / "first.jsonl"], ["does not begin with the line", "surgery generate"]),
        (["direction", model, "--runs", home / "none.jsonl"], ["no such file"]),
        (["direction", model, "--runs", runs, "--short", 5], ["--short", "--like-paper"]),
        (["direction", model, "--runs", runs, "--like-paper"], ["over 1000 tokens"]),
        (["direction", model, "--runs", runs, "--at", "9.mid"], ["9.mid"]),
        (["direction", model, "--runs", runs, "--of", "right", "--like-paper"], ["--like-paper"]),
        (["direction", home / "tiny", "--runs", runs], ["another model"]),
        (["heads", model, "--direction", home / "none", "--runs", runs], ["none"]),
        (["heads", home / "tiny", "--direction", home / "length", "--runs", runs], ["another model"]),
        (["heads", model, "--direction", home / "length", "--runs", runs, "--share", 2], ["share 2"]),
        (["probe", model, "--runs", runs, "--of", "mood"], ["No transcript has a label 'mood'", "gold"]),
        (["probe", model, "--runs", runs, "--of", "gold"], ["labels that differ", "all of them are 1"]),
        (["probe", model, "--runs", runs, "--length", "answer"], ["--length is of --of length"]),
        (["probe", model, "--runs", runs, "--over", "doubts"], ["doubts"]),
        (["probe", model, "--runs", runs, "--over", "sentence[99]"], ["has a span sentence[99]", "thinking"]),
        (["probe", model, "--runs", runs, "--at", "9.resid"], ["9.resid"]),
        (["probe-along", model, "--runs", runs, "--of", "length", "--at", "9.resid", "--dry-run"], ["9.resid"]),
        (["probe", home / "tiny", "--runs", runs], ["another model"]),
        *(
            (
                [command, model, "--runs", runs, "--of", "length", "--folds", 20, "--dry-run"],
                ["20 folds of 20 questions", "at most 10"],
            )
            for command in ("probe", "probe-calibration", "probe-along")
        ),
        (
            [
                "probe-transfer",
                model,
                "--runs",
                f"a={runs}",
                "--runs",
                f"b={runs}",
                "--of",
                "length",
                "--folds",
                20,
                "--dry-run",
            ],
            ["20 folds of 20 questions of a", "at most 10"],
        ),
        (["probe", model, "--runs", runs, "--of", "length", "--over", "prompt[40]", "--dry-run"], ["prompt[40]"]),
        (["probe-calibration", model, "--runs", runs, "--length", "answer"], ["--length is of --of length"]),
        (["probe-transfer", model, "--runs", runs, "--of", "length"], ["there is", "only", "--runs twice"]),
        (["probe-transfer", model, "--runs", runs, "--runs", runs, "--of", "length"], ["already", "name them apart"]),
        (["probe-along", model, "--runs", runs, "--of", "length", "--fractions", "half"], ["--fractions half"]),
        (["probe-along", model, "--runs", runs, "--of", "length", "--fractions", "2"], ["lie in [0, 1]"]),
        (["edit", model, "--remove", home / "length", "--heads", 0.1], ["--heads", "--runs"]),
        (
            ["edit", model, "--remove", home / "length", "--heads", 0.1, "--at", "*.attn.o", "--runs", runs],
            ["give one"],
        ),
        (["edit", model, "--remove", home / "length", "--heads", 2, "--runs", runs], ["share 2"]),
        (["edit", model, "--remove", home / "length", "--at", "*.attn.o", "--runs", runs], ["--runs is of --heads"]),
        (
            ["edit", model, "--remove", home / "length", "--at", "*.attn.o", "--over", "answer"],
            ["--over is of --heads"],
        ),
        (["edit", model, "--heads", 0.1, "--runs", runs], ["--remove"]),
        (["edit", model, "--remove", home / "none", "--heads", 0.1, "--runs", runs], ["none"]),
        (["thinkedit", model, "--strength", 0], ["--strength 0"]),
        (["thinkedit", model, "--strength", "nan"], ["strength nan"]),
        (["thinkedit", model, "--site", "head"], ["attention or mlp"]),
        (["generate", model, "--data", home / "none.jsonl"], ["none.jsonl"]),
    ):
        said = surgery(*words, "--to", out)
        assert said.code == 2, (words, said)
        lines = [line for line in said.err.strip().splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, said.err
        assert all(part in lines[0] for part in parts), (words, lines)
    assert "exists" in surgery("generate", model, "--to", home / "length").err
    assert "exists" in surgery("probe", model, "--runs", runs, "--to", home / "length").err
    assert (
        "exists"
        in surgery(
            "edit", model, "--remove", home / "length", "--heads", 0.1, "--runs", runs, "--to", home / "length"
        ).err
    )
    assert not list(tmp_path.iterdir())


def test_the_program(home: Path, tmp_path: Path) -> None:
    words = ["generate", home / "model", "--data", home / "first.jsonl", "--count", 2, "--max-new-tokens", 5]
    command = [sys.executable, "-m", "analyses", *words, "--to", tmp_path / "t.jsonl", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 answers to 2 questions" in done.stdout
    assert len(Runs.load(tmp_path / "t.jsonl")) == 2
