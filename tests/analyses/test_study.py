"""The main job from end to end, on a tiny model: what it leaves, what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from analyses import shelf
from analyses import study as module
from analyses.plan import Plan
from analyses.study import STRENGTHS, study
from surgery.record import Record, verify
from tests.families import save_tiny

STAGES = ["arms/lift/tuned.json", "arms/full/tuned.json"] + [
    f"tables/{name}.json" for name in ("accuracy", "sweep", "early_answers", "drift", "geometry")
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")
    return Plan(
        model=str(folder), steps=2, batch_size=2, watch_every=2, watch_items=2, held_out=10, sweep_items=2, sweep_texts=2,
        faith_items=2, drift_items=10, max_new_tokens=4, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert study(plan, folder, progress=False) == folder / "report.html"
    return folder


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The study as it was before the page."""
    folder = tmp_path / "unfinished"
    shutil.copytree(finished, folder)
    (folder / "record.json").unlink()
    return folder


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are really done, as they are done."""
    names: list[str] = []
    write = shelf.write_whole

    def noted(path: Path, text: str) -> Path:
        names.append("/".join(path.parts[-3:] if "arms" in path.parts else path.parts[-2:]))
        return write(path, text)

    monkeypatch.setattr(shelf, "write_whole", noted)
    return names


def test_the_page_is_self_contained(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*(?!["']?data:)""", page)
    assert "http://" not in page
    assert "<script" not in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) >= 12
    assert len(set(images)) == len(images)
    assert page.count("<table") >= 6
    assert "surgery replay" in page
    for heading in ("What it learned", "chain of thought", "representations moved", "Which weights moved"):
        assert heading in page


def test_every_estimate_on_the_page_says_of_how_many_it_is(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    texts = pd.read_csv(finished / "tables" / "drift.csv").groupby("text")["n_transcripts"].max()
    divergence = pd.DataFrame(json.loads((finished / "tables" / "drift.json").read_text())["kl"])
    kl = divergence.groupby("text")["n"].max()
    assert (texts["task"], texts["general"], kl["task"], kl["general"]) == (10, 10, 3, 3)
    passages = pd.read_csv(finished / "tables" / "sweep.csv").query("measure == 'text_nll'")["n"].unique()
    training = pd.read_csv(finished / "tables" / "training.csv")
    watched = int(training[training["measure"] == "held-out accuracy"]["n"].max())
    matrices = pd.read_csv(finished / "tables" / "geometry.csv").groupby(["arm", "layer"]).size().unique()
    for caption in (
        "Held-out accuracy before and after, Wilson intervals (n=10).",
        f"Negative log-likelihood of general text, bootstrap over passages (n={passages.item()}).",
        "Mean shift on the task's text (n=10).",
        "Mean shift on general text (n=10).",
        "Linear CKA on the task's text (n=10): 1 is no change but rotation.",
        "Mean principal angle of the top 8 components (n=10).",
        "in nats per token, bootstrap over texts (task: n=3; general: n=3):",
        f"since step 0, mean over a few layers, on the worked answers to those {watched} sums.",
        f"Energy of the change on the principal entries, mean over a layer's matrices, their range shaded (n={matrices.item()} a layer).",
        f"Effective rank of the change, mean over a layer's matrices, their range shaded (n={matrices.item()} a layer).",
    ):
        assert caption in page, caption


def test_tables_records_and_logs_are_there(finished: Path, plan: Plan) -> None:
    for name in STAGES:
        assert json.loads((finished / name).read_text()), name
    for name in ("before-after", "training", "sweep", "early-answers", "drift", "geometry", "geometry-summary"):
        assert len((finished / "tables" / f"{name}.csv").read_text().splitlines()) > 1, name
    with (finished / "tables/training.csv").open() as table:
        drawn = [row for row in csv.DictReader(table) if row["measure"] == "held-out accuracy"]
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) and row["n"] for row in drawn)
    record = Record.load(finished)
    assert record.command == "study"
    assert record.seeds == {"seed": plan.seed}
    assert record.arguments["held_out"] == 10
    assert set(record.results["headline"]) == {"base", "lift", "full"}
    assert list(record.results["seconds"]) == [name.removesuffix(".json") for name in STAGES]
    for arm in ("lift", "full"):
        lines = [json.loads(line) for line in (finished / "arms" / arm / "log.jsonl").read_text().splitlines()]
        watched = [line for line in lines if line["monitor"] not in ("recorder", "training")]
        assert {line["step"] for line in watched} == {0, 2}
        assert len({line["monitor"] for line in watched}) == 5
    assert not [p for p in finished.rglob("*") if "partial" in p.name]


def test_strength_zero_is_the_base_and_intervals_hold_their_value(finished: Path) -> None:
    rows = json.loads((finished / "tables/sweep.json").read_text())
    zero = [{k: v for k, v in row.items() if k != "arm"} for row in rows if row["strength"] == 0]
    assert zero[: len(zero) // 2] == zero[len(zero) // 2 :]
    for row in rows + json.loads((finished / "tables/accuracy.json").read_text())["rows"]:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] > 0
    nats = {(row["arm"], row["strength"]): row["value"] for row in rows if row["measure"] == "text_nll"}
    assert len(nats) == 2 * len(STRENGTHS)
    assert nats["full", 1.0] != nats["full", 0.0]


def test_verify_passes_and_then_names_what_was_touched(finished: Path, tmp_path: Path) -> None:
    assert verify(finished) == []
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "tables" / "sweep.csv").write_text("nothing")
    assert verify(copy) == ["tables/sweep.csv differs"]


def test_finished_and_foreign_folders_are_refused(finished: Path, unfinished: Path, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"finished study.*--to"):
        study(plan, finished, progress=False)
    with pytest.raises(FileExistsError, match=r"other seed.*plan\.json"):
        study(replace(plan, seed=1), unfinished, progress=False)
    rebuilt = replace(plan, model=str(shutil.copytree(plan.model, tmp_path / "tiny")))
    shutil.copytree(unfinished, tmp_path / "rebuilt")
    held = json.loads((tmp_path / "rebuilt" / "plan.json").read_text())
    (tmp_path / "rebuilt" / "plan.json").write_text(json.dumps(held | {"model": rebuilt.model}))
    save_tiny("llama", Path(rebuilt.model), seed=1)
    with pytest.raises(FileExistsError, match=r"other weights"):
        study(rebuilt, tmp_path / "rebuilt", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a study"):
        study(plan, tmp_path / "mine", progress=False)


def test_only_what_is_missing_is_done_again(unfinished: Path, finished: Path, plan: Plan, done: list[str]) -> None:
    (unfinished / "tables" / "geometry.json").unlink()
    (unfinished / "report.html").unlink()
    study(plan, unfinished, progress=False)
    assert [name for name in done if "clock" not in name] == ["tables/geometry.json"]
    assert verify(unfinished) == []
    for name in STAGES:
        if "arms" not in name:
            assert (unfinished / name).read_bytes() == (finished / name).read_bytes(), name


def test_an_interrupted_study_goes_on_after_the_last_whole_stage(
    finished: Path, plan: Plan, tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    tune = module._Study.tune

    def stop(self: module._Study, arm: str) -> dict:
        if arm == "full":
            raise KeyboardInterrupt
        return tune(self, arm)

    with monkeypatch.context() as patched:
        patched.setattr(module._Study, "tune", stop)
        with pytest.raises(KeyboardInterrupt):
            study(plan, folder, progress=False)
    stages = [name for name in done if "clock" not in name]
    assert stages[-1] == "arms/lift/tuned.json"
    assert not (folder / "record.json").exists()
    assert not (folder / "report.html").exists()
    for name in STAGES[2:]:  # not to be measured again here: a stage whose file is there is skipped
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / name, folder / name)
    done.clear()
    study(plan, folder, progress=False)
    assert [name for name in done if "clock" not in name] == ["arms/full/tuned.json"]
    for path in (finished / "arms").rglob("*.safetensors"):  # and the arms are bit for bit those of the unbroken study
        again = load_file(folder / path.relative_to(finished))
        for name, tensor in load_file(path).items():
            assert torch.equal(again[name], tensor), (path, name)


def test_a_monitor_that_failed_costs_its_numbers_and_not_the_page(unfinished: Path, plan: Plan) -> None:
    log = unfinished / "arms" / "lift" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    keep = ("monitor", "step")
    failed = [
        {**{k: line[k] for k in keep}, "failed": "ValueError: no"}
        if line["monitor"] == "nll" and line["step"] == 2
        else line
        for line in lines
    ]
    assert failed != lines
    log.write_text("".join(json.dumps(line) + "\n" for line in failed))
    study(plan, unfinished, progress=False)
    drawn = [row for row in (unfinished / "tables" / "training.csv").read_text().splitlines() if "answer NLL" in row]
    assert len(drawn) == 3  # two of full tuning, one that LIFT has left


def test_every_stage_has_the_questions_that_its_caption_counts(tmp_path: Path, plan: Plan) -> None:
    few = module._Study(replace(plan, held_out=3, sweep_items=8, faith_items=5, drift_items=6), tmp_path, False)
    assert len(few.test) == 8
