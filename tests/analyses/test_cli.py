"""The command line as a user meets it: what is written, what is said, and with which exit code. Run in this process; a few for real."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from analyses import cli
from analyses.cli.change import diff
from analyses.figures import FIGURES
from analyses.tasks import side_of
from surgery.checkpoint import Checkpoint
from surgery.specimen import _description
from tests.families import save_tiny

if TYPE_CHECKING:
    from tests.analyses.conftest import Said

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and tuned (another tiny llama, a few matrices of its own), both bf16; other: a gpt2."""
    home = tmp_path_factory.mktemp("models")
    save_tiny("llama", home / "base", dtype=torch.bfloat16)
    shutil.copytree(home / "base", home / "tuned")
    tensors = load_file(home / "tuned" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight"):
        chosen = torch.rand(tensors[name].shape, generator=generator) < 0.1
        tensors[name] = torch.where(chosen, tensors[name] * 1.5, tensors[name])
    save_file(tensors, home / "tuned" / "model.safetensors", metadata={"format": "pt"})
    save_tiny("gpt2", home / "other")
    return home


@pytest.fixture(scope="module")
def vector(models: Path) -> Path:
    folder = models / "vector"
    diff(str(models / "tuned"), str(models / "base"), folder)
    return folder


def one_line(said: Said, code: int = 2) -> str:
    assert said.code == code, said
    assert "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("surgery: ")
    return lines[0]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


# --- change a model ---------------------------------------------------------------------------------------------------


def test_base_plus_the_difference_is_the_tuned_model(
    surgery, models: Path, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    said = surgery("apply", models / "base", "--add", f"{vector}:1", "--to=~/again", "--allow-loops", "-q")
    assert said.code == 0, said
    expected, found = tensors_of(models / "tuned"), tensors_of(tmp_path / "again")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert json.loads((tmp_path / "again" / "record.json").read_text())["command"] == "apply"

    assert surgery("verify", tmp_path / "again").code == 0
    replayed = surgery("replay", tmp_path / "again", "--to", tmp_path / "replayed")
    assert replayed.code == 0
    assert "0 differ" in replayed.out

    path = tmp_path / "again" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    said = surgery("verify", tmp_path / "again")
    assert said.code == 1
    assert "model.safetensors" in said.out
    assert "tensor" in said.out
    (tmp_path / "again" / "config.json").unlink()
    assert "config.json is missing" in surgery("verify", tmp_path / "again").out


@pytest.mark.parametrize("words", [[":0.5"], [""], [":-1"], [":0.25", ":0.25"]], ids=str)
def test_strengths(surgery, models: Path, vector: Path, tmp_path: Path, words: list[str]) -> None:
    adds = [word for entry in words for word in ("--add", f"{vector}{entry}")]
    assert (
        surgery(
            "apply", models / "base", *adds, "--to", tmp_path / "x", "--dtype", "float32", "--allow-loops", "-q"
        ).code
        == 0
    )
    strength = sum(float(entry[1:] or 1) if entry else 1.0 for entry in words)
    base, tuned, found = (tensors_of(f) for f in (models / "base", models / "tuned", tmp_path / "x"))
    for name, tensor in base.items():
        expected = tensor.float() + strength * (tuned[name].float() - tensor.float())
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_a_vector_of_another_base_is_noted_before_anything_is_written(
    surgery, models: Path, vector: Path, tmp_path: Path
) -> None:
    lora = ["diff", models / "tuned", models / "base", "--form", "lora", "--rank", 2, "--to", tmp_path / "lora"]
    assert surgery(*lora).code == 0
    for ref in (vector, tmp_path / "lora"):
        words = ["apply", models / "tuned", "--add", ref, "--allow-loops", "-q"]
        note = f"note: {ref} was measured from another base"
        assert note in surgery(*words, "--to", tmp_path / "out", "--dry-run").err
        said = surgery(*words, "--to", tmp_path / ref.name / "out")
        assert said.err.count(note) == 1
        notes = json.loads((tmp_path / ref.name / "out" / "record.json").read_text())["results"]["notes"]
        assert any(line.startswith(note) for line in notes)
        assert (
            "another base"
            not in surgery(*words[:1], models / "base", *words[2:], "--to", tmp_path / "x", "--dry-run").err
        )


def test_stochastic_rounding_is_by_the_seed(surgery, models: Path, vector: Path, tmp_path: Path) -> None:
    for name, words in (("apply", ["--add", f"{vector}:0.01"]), ("edit", ["--scale", "*.mlp.down:0.999"])):
        words = [name, models / "base", *words, "--allow-loops", "-q"]
        for to, seed in (("a", 1), ("b", 2)):
            said = surgery(*words, "--stochastic", "--seed", seed, "--to", tmp_path / name / to)
            assert said.code == 0, said
            assert json.loads((tmp_path / name / to / "record.json").read_text())["seeds"] == {"seed": seed}
        a, b = tensors_of(tmp_path / name / "a"), tensors_of(tmp_path / name / "b")
        assert any(not torch.equal(a[tensor], b[tensor]) for tensor in a)
        replayed = surgery("replay", tmp_path / name / "a")
        assert replayed.code == 0, replayed
        assert (tmp_path / name / "a-again" / "record.json").is_file()
        assert "--seed is of --stochastic" in one_line(surgery(*words, "--seed", 1, "--to", tmp_path / "idle"))


def test_a_recipe_from_check_to_undo(surgery, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {models / 'base'}\nmodels:\n  - model: {models / 'tuned'}\n"
        "    parameters: {weight: 0.7}\ndtype: float32\nout_dtype: bfloat16\n"
    )
    assert surgery("check", recipe).code == 0
    merged = tmp_path / "merged"
    assert surgery("merge", recipe, merged, "--allow-loops", "-q").code == 0
    assert surgery("verify", merged).code == 0
    said = surgery("undo", merged, "-q")
    assert said.code == 0, said
    assert (
        f"{tmp_path / 'merged-original'}: the original's bytes ({Checkpoint(models / 'base').hash()[:16]})" in said.out
    )
    for path in (models / "base").iterdir():
        assert (tmp_path / "merged-original" / path.name).read_bytes() == path.read_bytes()
    assert "exists" in one_line(surgery("undo", merged, "-q"))
    assert "as it was before" in one_line(surgery("verify", f"{merged}-original"))
    assert surgery("undo", merged, "--to", tmp_path / "elsewhere", "-q").code == 0
    (merged / "undo.patch").unlink()
    assert "undo.patch" in one_line(surgery("undo", merged, "--to", tmp_path / "none", "-q"))


def test_the_specimen_is_there_without_a_network(surgery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from surgery.specimen import NAME, fault

    folder = tmp_path / NAME
    save_tiny("llama", folder)
    files = {path.name: _description(path) for path in folder.iterdir()}
    (folder / "provenance.json").write_text(json.dumps({"files": files}))
    assert fault(folder) is None
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    monkeypatch.setenv("SURGERY_SPECIMEN_WHEEL", str(tmp_path / "nowhere"))
    said = surgery("specimen")
    assert (said.code, said.out.strip()) == (0, str(folder))


def test_dry_runs_write_nothing(surgery, models: Path, vector: Path, tmp_path: Path) -> None:
    base, to = models / "base", tmp_path / "out"
    for words in (
        ["apply", base, "--add", vector, "--to", to],
        ["diff", models / "tuned", base, "--to", to],
        ["tune", base, "--to", to],
        ["study", "--model", base, "--to", to],
    ):
        said = surgery(*words, "--dry-run")
        assert said.code == 0, said
        assert said.out.strip()
    assert not list(tmp_path.iterdir())


def test_what_exists_is_told_before_the_work(surgery, models: Path, vector: Path, tmp_path: Path) -> None:
    base, there, recipe = models / "base", tmp_path / "there", tmp_path / "recipe.yml"
    there.mkdir()
    recipe.write_text(f"merge_method: linear\nmodels:\n- model: {base}\n  parameters: {{weight: 1}}\n")
    for words in (
        ["diff", base, base, "--to", there],  # there is no change: found out by reading both
        ["diff", models / "tuned", base, "--to", there, "--dry-run"],
        ["apply", base, "--add", vector, "--to", there, "--dry-run"],
        ["apply", base, "--add", tmp_path / "none", "--to", there],
        ["merge", recipe, there, "--dry-run"],
    ):
        assert "exists already" in one_line(surgery(*words)), words


NOWHERE = "there/is/no/model"
PROBES = ("probe", "probe-calibration", "probe-transfer", "probe-along")
WORDS = {  # of every command with --to, before anything it reads is found missing
    "study": ["--model", NOWHERE],
    "tune": [NOWHERE],
    "diff": [NOWHERE, NOWHERE],
    "apply": [NOWHERE, "--add", NOWHERE],
    "edit": [NOWHERE, "--scale", "**:2"],
    "realign": [NOWHERE, "--change", NOWHERE, "--base", NOWHERE, "--aligned", NOWHERE],
    "arms": [NOWHERE],
    "seeing": [],
    "sweep": [NOWHERE, "--strengths", "1", "--add", NOWHERE],
    "generate": [NOWHERE],
    "direction": [NOWHERE, "--runs", NOWHERE],
    "heads": [NOWHERE, "--direction", NOWHERE, "--runs", NOWHERE],
    "judge": [NOWHERE, "--found", NOWHERE],
    **{verb: [NOWHERE, "--runs", NOWHERE] for verb in PROBES},
    "thinkedit": [NOWHERE],
    "measure early-answers": [NOWHERE],
    "measure drift": [NOWHERE, "--base", NOWHERE],
    "measure geometry": [NOWHERE, "--base", NOWHERE],
    "figure": ["sweep", NOWHERE],
    "undo": [NOWHERE],
}
DRY = (
    "study",
    "tune",
    "diff",
    "apply",
    "edit",
    "realign",
    "arms",
    "seeing",
    "sweep",
    "generate",
    "judge",
    *PROBES,
    "thinkedit",
)


def test_all_commands_with_an_output_are_asked() -> None:
    from analyses.cli.receipts import COMMANDS

    assert COMMANDS.keys() - {"merge"} <= WORDS.keys()  # whose output is a word of its own


@pytest.mark.parametrize("verb", WORDS)
def test_where_no_output_can_be_is_told_before_the_work(surgery, verb: str, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_text("")
    (tmp_path / "astray.png").symlink_to(tmp_path / "nowhere")
    asked = [*verb.split(), *WORDS[verb], *(["--dry-run"] if verb in DRY else [])]
    for to, reason in (
        (tmp_path / "file.png" / "deep" / "out.png", f"{tmp_path / 'file.png'} is a file"),
        (Path("/proc/self/out.png"), "cannot be written to"),  # which no user may
        (tmp_path / "file.png", "exists"),
        (tmp_path / "astray.png", "exists"),
    ):
        said = one_line(surgery(*asked, "--to", to))
        assert str(to) in said
        assert reason in said
        assert "Choose another --to" in said
    assert {path.name for path in tmp_path.iterdir()} == {"file.png", "astray.png"}


@pytest.mark.parametrize("verb", ["thinkedit", "arms", "generate"])
def test_two_commands_are_not_at_work_on_one_output(surgery, verb: str, tmp_path: Path) -> None:
    first = f"from pathlib import Path; from surgery.whole import claim; claim(Path({str(tmp_path / 'out')!r})); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout
        assert other.stdout.readline()
        said = one_line(surgery(verb, *WORDS[verb], "--to", tmp_path / "x" / ".." / "out"))
        other.communicate("\n")
    assert "at work on" in said
    assert "at work on" not in surgery(verb, *WORDS[verb], "--to", tmp_path / "out").err


@pytest.mark.parametrize(
    ("verb", "words", "reason"),
    [
        ("study", ["--device", "warp"], "warp"),
        ("tune", ["--dtype", "int8"], "int8"),
        ("tune", ["--watch", "nll, foo"], "no monitor 'foo'"),
        ("tune", ["--over", "thinking["], "thinking["),
        ("tune", ["--over", "thinkin"], "'thinkin' is not a span"),
        ("tune", ["--mask-thought", "2"], "2"),
        ("tune", ["--prior", "foo"], "foo"),
        ("tune", ["--density", "2"], "density"),
        ("tune", ["--method", "lora", "--refresh", "2"], "refresh"),
        ("tune", ["--scope", "world"], "world"),
        ("tune", ["--block", "7"], "blocks of side 7 do not tile a 24x32 matrix, which is 0.attn.k: choose a side"),
        ("tune", ["--report-to", "foo"], "foo"),
        ("tune", ["--method", "grpo", "--batch-size", "12"], "12"),
        ("arms", ["--device", "warp"], "warp"),
        ("arms", ["--arms", "lift,lift"], "each arm once"),
        ("sweep", ["--strengths", "1", "--add", "foo"], "foo"),
        ("generate", ["--device", "warp"], "warp"),
        ("tune", ["--lr", "nan"], "--lr nan"),
        ("tune", ["--lr", "0"], "--lr 0"),
        ("thinkedit", ["--over", "foo"], "foo"),
        ("thinkedit", ["--like-paper", "--short", "5", "--long", "3"], "short=5"),
        ("thinkedit", ["--over", "/so/"], "thinking"),
        ("thinkedit", ["--dtype", "int8"], "int8"),
        ("thinkedit", ["--device", "warp"], "warp"),
        ("seeing", ["--arms", "merge,foo"], "foo"),
        ("seeing", ["--rule", "foo"], "foo"),
    ],
)
def test_a_dry_run_looks_at_every_option(
    surgery, models: Path, verb: str, words: list[str], reason: str, tmp_path: Path
) -> None:
    model = {"study": ["--model", models / "base"], "seeing": []}.get(verb, [models / "base"])
    assert reason in one_line(surgery(verb, *model, *words, "--to", tmp_path / "out", "--dry-run"))


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [("generate", "--temperature", "-1"), ("generate", "--temperature", "nan"), ("tune", "--save-every", "0"),
     ("tune", "--refresh", "0"), ("tune", "--lora-rank", "0")],
)  # fmt: skip
def test_numbers_have_ranges(surgery, verb: str, option: str, value: str, tmp_path: Path) -> None:
    said = surgery(verb, NOWHERE, option, value, "--to", tmp_path / "out", "--dry-run")
    assert said.code == 2
    assert "Usage" in said.err
    assert option in said.err


@pytest.mark.parametrize("verb", ["study", "generate", "thinkedit", "arms"])
def test_a_dry_run_needs_a_model(surgery, verb: str, tmp_path: Path) -> None:
    model = ["--model", NOWHERE] if verb == "study" else [NOWHERE]
    assert NOWHERE in one_line(surgery(verb, *model, "--to", tmp_path / "out", "--dry-run"))


def test_a_dry_sweep_looks_for_its_sites(unchecked, surgery, models: Path, vector: Path, tmp_path: Path) -> None:
    steered = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(Checkpoint(models / "base").anatomy.d_model)}, steered)
    for words, reason in (
        (["--steer", steered, "--at", "99.resid"], "99.resid"),
        (["--steer", steered, "--at", "1.resid", "--how", "push"], "push"),
        (["--steer", steered, "--at", "1.resid", "--over", "thinking["], "thinking["),
        (["--remove", steered, "--at", "*.attn.foo"], "*.attn.foo"),
        (["--remove", steered, "--at", "*.attn.o", "--layers", "99"], "99"),
    ):
        asked = ["sweep", models / "base", "--strengths", "1", *words, "--to", tmp_path / "out", "--dry-run"]
        assert reason in one_line(surgery(*asked)), words


@pytest.mark.parametrize("strength", ["nan", "inf", "-1e999"])
def test_a_strength_is_a_finite_number(surgery, models: Path, vector: Path, tmp_path: Path, strength: str) -> None:
    adds = ["--add", f"{vector}:{strength}"]
    for words in (
        ["apply", models / "base", *adds, "--to", tmp_path / "out"],
        ["check", "apply", models / "base", *adds],
    ):
        said = one_line(surgery(*words))
        assert "--add" in said
        assert "finite" in said


def test_nothing_added_is_called_nothing(surgery, models: Path, vector: Path, tmp_path: Path) -> None:
    said = surgery("apply", models / "base", "--add", f"{vector}:0", "--to", tmp_path / "same", "--allow-loops", "-q")
    assert said.code == 0, said
    assert said.out.strip().endswith("an exact copy, nothing changed")
    assert "An exact copy, nothing changed." in (tmp_path / "same" / "README.md").read_text()


def test_only_what_is_asked_to_move_is_called_changed(surgery, models: Path, tmp_path: Path) -> None:
    """Merging passes every tensor through its rule; those that come out as they went in have not changed."""
    recipe, base, tuned = tmp_path / "recipe.yml", models / "base", models / "tuned"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- model: {tuned}\n  parameters: {{weight: 0.5}}\n"
    )
    said = surgery("merge", recipe, tmp_path / "merged", "--allow-loops", "-q")
    assert said.code == 0, said
    assert "merged: 2 sites changed; asked" in said.out
    assert "\n2 tensors changed. " in (tmp_path / "merged" / "README.md").read_text()


def test_tune_writes_the_tuned_model(surgery, models: Path, tmp_path: Path) -> None:
    words = ["--steps", 2, "--batch-size", 4, "--watch", "nll,change", "--watch-every", 1, "--lr", 0.01, "-q"]
    said = surgery("tune", models / "base", "--to", tmp_path / "out", *words)
    assert said.code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    watched = [(line["step"], line["monitor"]) for line in lines if line["monitor"] in ("nll", "change")]
    assert watched == [(s, m) for s in (0, 1, 2) for m in ("nll", "change")]
    before, after = tensors_of(models / "base"), tensors_of(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}  # as found
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all("proj" in name for name in changed)
    assert surgery("verify", tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no workshop is left


# --- look and judge ---------------------------------------------------------------------------------------------------


def test_inspect(surgery, models: Path) -> None:
    said = surgery("inspect", models / "base", "--at", "1.attn.*")
    assert said.code == 0
    assert "llama, 3 layers, d 32" in said.out
    assert "1.attn.o" in said.out
    assert "(32, 48)" in said.out
    assert "2.attn.o" not in said.out
    said = surgery("inspect", models / "base", "--names", "--at", "1.attn.*")
    assert said.code == 0
    assert "blocks.1.attn.hook_z" in said.out
    assert "model.layers.1.self_attn.o_proj" in said.out
    assert "2.attn.z" not in said.out


def test_measures(surgery, models: Path, tmp_path: Path) -> None:
    base, tuned = models / "base", models / "tuned"
    jobs = {
        "geometry": [tuned, "--base", base, "--filter-rank", 4, "--k", 2],
        "drift": [tuned, "--base", base, "--count", 10],
        "early-answers": [tuned, "--count", 3, "--traces", "gold"],
    }
    tables = {"geometry": "geometry.csv", "drift": "drift.csv", "early-answers": "curve.csv"}
    for name, words in jobs.items():
        folder = tmp_path / name
        said = surgery("measure", name, *words, "--to", folder, "-q")
        assert said.code == 0, said
        assert said.out.strip()
        record = json.loads((folder / "record.json").read_text())
        assert record["command"] == f"measure {name}"
        assert record["seeds"] == {"seed": 0}
        assert tables[name] in record["outputs"]
        assert surgery("verify", folder).code == 0
        assert surgery("figure", name, folder, "--to", tmp_path / f"{name}.png").code == 0
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "exists" in one_line(surgery("measure", name, *words, "--to", folder, "-q"))
    geometry = (tmp_path / "geometry" / "geometry.csv").read_text().splitlines()
    assert len(geometry) == 1 + 21  # seven matrices in each of three layers
    replayed = surgery("replay", tmp_path / "geometry", "--to", tmp_path / "again")
    assert replayed.code == 0, replayed
    assert "0 differ" in replayed.out


def test_measures_say_what_is_too_small(surgery, models: Path, tmp_path: Path) -> None:
    asked = [models / "tuned", "--base", models / "base", "-q"]
    few = one_line(surgery("measure", "drift", *asked, "--count", 4, "--to", tmp_path / "drift"))
    assert "8 principal angles (k) of the span 'answer' need 18" in few
    assert "the 4 transcripts" in few
    assert "--count" in few
    said = surgery("measure", "drift", *asked, "--count", 4, "--k", 1, "--to", tmp_path / "drift")
    assert said.out.splitlines()[0].split() == ["layer", "span", "mean_shift", "low", "high", "floor", "n"]
    assert said.out.splitlines()[1].split()[-1] == "4"
    at = ["--at", "0.attn.k", "--to", tmp_path / "geometry"]
    cut = one_line_note(surgery("measure", "geometry", *asked, "--k", 1000, *at))
    assert "k 1000 is beyond the short side of 1 of 1 matrices" in cut
    table = load_table(tmp_path / "geometry" / "geometry.csv")
    assert [int(row["k"]) for row in table] == [min(Checkpoint(models / "base")["0.attn.k"].shape)]


def one_line_note(said: Said) -> str:
    assert said.code == 0, said
    (line,) = said.err.strip().splitlines()
    assert line.startswith("note: ")
    return line


def load_table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_figures_refuse(surgery, models: Path, tmp_path: Path) -> None:
    table = tmp_path / "sweep.csv"
    table.write_text("strength,measure,value,low,high\n0,accuracy,0.1,0,0.2\n1,accuracy,0.5,0.4,0.6\n")
    image = tmp_path / "a.png"
    assert surgery("figure", "sweep", table, "--to", image).code == 0
    assert "exists" in one_line(surgery("figure", "sweep", table, "--to", image))
    assert "Choose" in one_line(surgery("figure", "sweeps", table, "--to", tmp_path / "b.png"))
    told = re.split(r"[\s,│]+", surgery("figure", "--help").out)
    assert FIGURES.keys() <= {*told, *(word.rstrip(".") for word in told)}
    assert ".png" in one_line(surgery("figure", "sweep", table, "--to", tmp_path / "b.jpeg"))
    assert "accuracy" in one_line(surgery("figure", "sweep", table, "--to", tmp_path / "b.png", "--measure", "beauty"))
    assert "no table" in one_line(surgery("figure", "drift", tmp_path, "--to", tmp_path / "b.png"))
    assert "one thing" in one_line(
        surgery("figure", "before-after", table, "--to", tmp_path / "b.png", "--measure", "x")
    )
    assert "mean_shift" in one_line(surgery("figure", "drift", table, "--to", tmp_path / "b.png"))
    assert "--x and --y" in one_line(surgery("figure", "sweep", table, "--to", tmp_path / "b.png", "--x", "accuracy"))
    wide = surgery("figure", "sweep", table, "--to", tmp_path / "b.png", "--width", "1e9")
    assert wide.code == 2, wide
    assert "--width" in wide.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "sweep.csv"]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_table_of_something_else_is_no_figure(surgery, tmp_path: Path, name: str) -> None:
    table = tmp_path / "other.csv"
    table.write_text("arm,site,number\nLIFT,0.attn.q,1\n")
    said = one_line(surgery("figure", name, table, "--to", tmp_path / "b.png"))
    assert "arm, site, number" in said, said
    assert not (tmp_path / "b.png").exists()


# --- questions from a file --------------------------------------------------------------------------------------------


def asked(path: Path, count: int) -> list[str]:
    """A file of questions; gives their texts."""
    texts = [f"What is {i} + {i}?" for i in range(count)]
    rows = [{"question": text, "solution": "so", "answer": str(2 * i)} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return texts


def test_a_file_is_judged_on_as_a_whole_and_its_test_side_for_the_asking(
    surgery, models: Path, vector: Path, tmp_path: Path
) -> None:
    texts = asked(tmp_path / "q.jsonl", 40)
    test = sum(side_of(text) == "test" for text in texts)
    assert 10 <= test < 30
    ask = {
        "sweep": (["--add", vector, "--strengths", "1"], f"{32} questions", f"{test} questions"),
        "thinkedit": ([], f"{16} for judging", f"{round(0.4 * test)} for judging"),
        "generate": ([], "40 questions", f"{test} questions"),
    }
    for command, (words, whole, held) in ask.items():
        words = [
            command,
            models / "base",
            *words,
            "--data",
            tmp_path / "q.jsonl",
            "--to",
            tmp_path / "out",
            "--dry-run",
        ]
        said = surgery(*words)
        assert said.code == 0, said
        assert whole in said.out
        assert "--side test leaves those out" in said.err
        said = surgery(*words, "--side", "test")
        assert said.code == 0, said
        assert held in said.out
        assert said.err == ""
        assert surgery(*words, "--side", "all").err == ""
        assert "--count 41" in one_line(surgery(*words, "--count", 41))
        assert "test side" in one_line(surgery(*words, "--count", 30, "--side", "test"))
        assert "choose test or all" in one_line(surgery(*words, "--side", "train"))
    said = surgery("generate", models / "base", "--to", tmp_path / "out", "--dry-run")
    assert said.err == ""
    texts = asked(tmp_path / "few.jsonl", next(i for i in range(14) if side_of(texts[i]) == "test"))
    words = ["generate", models / "base", "--data", tmp_path / "few.jsonl", "--to", tmp_path / "out"]
    assert "None of the" in one_line(surgery(*words, "--side", "test"))


def test_a_small_file_is_enough_to_measure_on_and_is_an_input_of_the_record(
    surgery, models: Path, tmp_path: Path
) -> None:
    asked(tmp_path / "q.jsonl", 9)
    for name, words in (("drift", ["--base", models / "base"]), ("early-answers", ["--traces", "gold"])):
        words = ["measure", name, models / "tuned", *words, "--data", tmp_path / "q.jsonl"]
        said = surgery(*words, "--to", tmp_path / name, "-q")
        assert said.code == 0, said
        assert "note: 9 questions" in said.err
        assert "data" in json.loads((tmp_path / name / "record.json").read_text())["inputs"]
    asked(tmp_path / "q.jsonl", 10)
    assert "The input data" in surgery("replay", tmp_path / "drift", "--to", tmp_path / "again").err


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(surgery, models: Path, vector: Path, tmp_path: Path) -> None:
    base, out = models / "base", tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?", "answer": 2}\n\n{"question": "1+2?", answer}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    before = sorted(tmp_path.rglob("*"))
    tune = ["tune", base, "--steps", 1, "--batch-size", 2, "--to", out, "-q"]
    cases: list[tuple[list[object], list[str]]] = [
        (["inspect", "nobody/nothing-of-this-name"], ["nobody/nothing-of-this-name", "specimen"]),
        (["inspect", tmp_path / "nowhere"], ["nowhere"]),
        (["inspect", empty], [str(empty)]),
        (["inspect", base, "--at", "9.attn.q"], ["9.attn.q"]),
        (["inspect", base, "--names", "--at", "1.attn.q"], ["1.attn.q", "attn.z"]),
        (["inspect", vector, "--names"], ["--names", str(vector)]),
        (["diff", models / "other", base, "--to", out], ["0.attn.k", "anatomy"]),
        (["diff", models / "tuned", empty, "--to", out], [str(empty)]),
        (["apply", models / "other", "--add", vector, "--to", out], []),
        (["apply", base, "--add", f"{vector}:much", "--to", out], ["number", "much"]),
        (["apply", base, "--add", tmp_path / "nowhere", "--to", out], ["nowhere"]),
        (["apply", base, "--add", vector, "--to", out, "--dtype", "int8"], ["int8", "bfloat16"]),
        (["apply", base, "--add", vector, "--to", empty], ["exists"]),
        (["diff", models / "tuned", base, "--to", empty], ["exists"]),
        ([*tune[:-3], "--to", empty], ["exists"]),
        ([*tune, "--density", 1.5], ["density", "1.5"]),
        ([*tune, "--density", 0], ["density"]),
        ([*tune, "--data", tmp_path / "bad.jsonl"], ["line 3"]),
        ([*tune, "--data", tmp_path / "none.jsonl"], ["none.jsonl"]),
        ([*tune, "--data", tmp_path / "absent.jsonl"], ["absent.jsonl"]),
        ([*tune, "--data", "gym:chain_sums"], ["chain_sum"]),
        ([*tune, "--data", "riddles"], ["riddles", "sums"]),
        ([*tune, "--watch", "beauty"], ["beauty", "accuracy"]),
        ([*tune, "--device", "gpu9"], ["gpu9"]),
        (["measure", "geometry", models / "other", "--base", base, "--to", out, "-q"], ["anatomy"]),
        (["measure", "geometry", models / "tuned", "--base", base, "--to", out, "--density", 1.5, "-q"], ["1.5"]),
        (["measure", "geometry", models / "tuned", "--base", base, "--to", out, "--at", "99.*", "-q"], ["99"]),
        (["measure", "early-answers", base, "--to", out, "--traces", "silver", "-q"], ["silver", "gold"]),
        (
            ["measure", "early-answers", base, "--to", out, "--traces", "gold", "--max-new-tokens", 9, "-q"],
            ["--max-new-tokens is of --traces own"],
        ),
        (["verify", empty], ["record.json"]),
        (["replay", empty, "--to", out], ["record.json"]),
        (["undo", tmp_path / "nowhere"], ["There is no folder", "nowhere"]),
        (["undo", vector], ["`surgery diff` made it", "models"]),
        (["inspect", tmp_path / "nowhere", "--on", base], ["nowhere is no vector's folder here"]),
    ]
    for words, parts in cases:
        line = one_line(surgery(*words))
        for part in parts:
            assert part in line, (words, line)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mismatch_names_the_first_three_differences(surgery, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "cut")
    tensors = load_file(models / "base" / "model.safetensors")
    config = json.loads((tmp_path / "cut" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    kept = {name: t for name, t in tensors.items() if ".layers.2." not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    line = one_line(surgery("diff", tmp_path / "cut", models / "base", "--to", tmp_path / "out"))
    assert line.count("2.") >= 3, line
    assert not (tmp_path / "out").exists()


def test_options_that_typer_refuses_exit_with_2(surgery, models: Path) -> None:
    assert surgery("tune", models / "base").code == 2
    assert surgery("tune", models / "base", "--to", "x", "--steps", 0).code == 2
    assert surgery("operate").code == 2


# --- for real ---------------------------------------------------------------------------------------------------------


def words_of(*words: object) -> list[str]:
    return [sys.executable, "-m", "analyses", *map(str, words)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(("option", "parts"), [("--method", ["sgd", "lift"]), ("--select", ["sgd", "largest"])])
def test_exit_codes_of_the_program(option: str, parts: list[str], models: Path, tmp_path: Path) -> None:
    words = words_of("tune", models / "base", "--steps", 1, "--to", tmp_path / "out", option, "sgd", "-q")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert len(said) == 1, done.stderr
    assert said[0].startswith("surgery: ")
    assert all(part in said[0] for part in parts)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_within_a_finalizer_is_not_lost() -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # where Python drops every exception

    def work() -> None:
        with cli.interrupts_heard():
            Dying()
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_interrupt_within_a_wait_is_not_taken_for_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        lock = threading.Lock()
        try:
            raise KeyboardInterrupt
        finally:
            lock.release()  # as the end of a wait does that was interrupted before it had its lock again

    monkeypatch.setattr(cli, "app", wait)
    monkeypatch.setattr(sys, "argv", ["surgery"])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    with pytest.raises(RuntimeError, match="release unlocked"), cli.interrupts_heard():
        threading.Lock().release()


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_tune_resumes(blow: signal.Signals, models: Path, surgery, tmp_path: Path) -> None:
    options = ["--steps", 60, "--batch-size", 2, "--save-every", 10, "--lr", 1e-4, "-q"]
    words = ["tune", models / "base", "--to", tmp_path / "out", *options]
    process = subprocess.Popen(words_of(*words), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    workshop = tmp_path / ".out.tuning" / "checkpoints"
    deadline = time.monotonic() + 90
    while not list(workshop.glob("checkpoint-*/complete.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(blow)
    _, said = process.communicate(timeout=30)
    if blow == signal.SIGINT:
        assert process.returncode == 130, said
        assert "interrupted" in said
    else:
        assert process.returncode == -signal.SIGKILL
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == [".out.tuning"]
    saved = [p for p in workshop.glob("checkpoint-*") if (p / "complete.json").is_file()]
    assert saved
    assert (saved[-1] / "model.safetensors").is_file()
    again = surgery(*words)
    assert again.code == 0, again.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert surgery("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("what", ["early-answers", "drift", "geometry"])
def test_an_output_that_exists_is_told_before_anything_is_loaded(what: str, surgery, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refs = {"early-answers": ["nowhere"]}.get(what, ["nowhere", "--base", "nowhere"])
    done = surgery("measure", what, *refs, "--to", tmp_path / "there")
    assert done.code == 2
    assert "there exists already" in " ".join(done.err.split())
