"""`surgery merge` as a user meets it: what is written, what is said, with which exit code, and made again from its record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import writing
from surgery.checkpoint import Checkpoint
from surgery.hashing import hash_bytes
from tests.families import save_tiny
from tests.siblings import sibling

if TYPE_CHECKING:
    from tests.analyses.conftest import Said

ROOT = Path(__file__).parent.parent.parent
RECIPE = """\
# a comment that stays
merge_method: dare_ties
base_model: models/base
models:
  - model: models/a
    parameters: {weight: 0.5, density: 0.5}
  - model: models/b
    parameters: {weight: 0.4, density: 0.6}
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    save_tiny("llama", home / "base", dtype=torch.bfloat16)
    for seed, name in enumerate("ab", 1):
        sibling(home / "base", home / name, seed)
    return home


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with recipe.yml and the models it names."""
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(said: Said, code: int = 2) -> str:
    assert said.code == code, said
    assert "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("surgery: ")
    return lines[0]


def test_no_input_of_a_record_hides_another(surgery, here: Path) -> None:
    for name, source in (("recipe", "models/a"), ("tuned", "models/b")):
        shutil.copytree(here / source, here / name)
    (here / "own.yml").write_text(RECIPE.replace("models/a", "recipe"))
    assert surgery("merge", "own.yml", "merged", "--allow-loops", "-q").code == 0
    assert surgery("diff", "tuned", "models/base", "--to", "model").code == 0
    assert surgery("apply", "models/base", "--add", "model:0.5", "--to", "applied", "--allow-loops", "-q").code == 0
    for folder, known in (("merged", 4), ("applied", 2)):
        inputs = json.loads((here / folder / "record.json").read_text())["inputs"]
        assert len({entry["hash"] for entry in inputs.values()}) == known
        assert surgery("replay", folder, "--to", f"{folder} again").code == 0


def test_a_merge_its_record_and_its_replay(surgery, here: Path) -> None:
    said = surgery("merge", "recipe.yml", "out", "--seed", 3, "--allow-loops", "-q")
    assert said.code == 0, said
    assert "29 sites changed" in said.out
    record = json.loads((here / "out" / "record.json").read_text())
    assert record["command"] == "merge"
    assert record["typed"] == ["surgery", "merge", "recipe.yml", "out", "--seed", "3", "--allow-loops", "-q"]
    assert record["results"]["recipe"] == RECIPE == (here / "out" / "mergekit_config.yml").read_text()
    assert record["results"]["road"] == "stream"
    assert record["seeds"] == {"seed": 3}
    expected = {f"models/{n}": Checkpoint(here / "models" / n).hash() for n in ("base", "a", "b")}
    expected["recipe"] = hash_bytes(RECIPE.encode())
    assert {role: entry["hash"] for role, entry in record["inputs"].items()} == expected
    assert record["inputs"]["recipe"]["ref"] == "recipe.yml"
    assert "dare_ties by the rule of mergekit" in record["checks"][0]
    assert "models/a" in (here / "out" / "README.md").read_text() or '- "a"' in (here / "out" / "README.md").read_text()

    assert surgery("verify", "out").code == 0
    (here / "recipe.yml").unlink()  # the record holds its text
    replayed = surgery("replay", "out", "--to", "again")
    assert replayed.code == 0, replayed
    assert "0 differ" in replayed.out
    assert (here / "again" / "model.safetensors").read_bytes() == (here / "out" / "model.safetensors").read_bytes()

    sibling(here / "models" / "base", here / "other", 9)
    shutil.copyfile(here / "other" / "model.safetensors", here / "models" / "b" / "model.safetensors")
    said = surgery("replay", "out", "--to", "third")
    assert said.code == 2
    assert "The input models/b (models/b) is not what it was" in said.err.splitlines()[-1]


def test_options_change_what_is_written(surgery, here: Path) -> None:
    runs = {"plain": [], "seed": ["--seed", 1], "dtype": ["--dtype", "float32"]}
    for name, words in runs.items():
        said = surgery("merge", "recipe.yml", name, "--allow-loops", "-q", *words)
        assert said.code == 0, said
    plain, seed, dtype = (load_file(here / name / "model.safetensors") for name in runs)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(plain[name], seed[name])
    assert dtype[name].dtype == torch.float32
    assert torch.equal(dtype[name].bfloat16(), plain[name])


def test_a_dry_run_writes_nothing(surgery, here: Path) -> None:
    (here / "recipe.yml").write_text(RECIPE + "parameters: {normalise: true}\n")
    before = sorted(here.rglob("*"))
    said = surgery("merge", "recipe.yml", "out", "--dry-run")
    assert said.code == 0
    assert "dare_ties of 3 models, tensor by tensor; stored in bfloat16, like models/base" in said.out
    assert "models/base (base)" in said.out
    assert "has no parameter normalise: ignored" in said.out
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("dare_ties", "dare_tyes"), "'dare_tyes' is unknown. Did you mean dare_ties?"),
        (("model: models/b\n", "model: models/c\n"), "'models/c' is neither a folder here nor a model"),
        (("weight: 0.4,", ""), "model models/b lacks the parameter 'weight'"),
        (("merge_method:", "merge_method: ["), "is not YAML"),
        (("bfloat16", "bf8"), "dtype 'bf8' is not one of"),
    ],
    ids=["method", "model", "parameter", "yaml", "dtype"],
)
def test_bad_recipes(surgery, here: Path, change: tuple[str, str], said: str) -> None:
    (here / "recipe.yml").write_text(RECIPE.replace(*change))
    assert said in one_line(surgery("merge", "recipe.yml", "out", "-q"))
    assert sorted(p.name for p in here.iterdir()) == ["models", "recipe.yml"]


def test_bad_usage(surgery, here: Path) -> None:
    assert "nothing.yml does not exist" in one_line(surgery("merge", "nothing.yml", "out"))
    assert "exists already" in one_line(surgery("merge", "recipe.yml", "models"))
    assert "no GPU here" in one_line(surgery("merge", "recipe.yml", "out", "--multi-gpu"))
    assert surgery("merge", "recipe.yml").code == 2


def test_a_model_that_is_not_finite_is_refused(surgery, here: Path) -> None:
    path = here / "models" / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    for more in ("", "tokenizer: {source: base}\n"):
        (here / "recipe.yml").write_text(RECIPE + more)
        said = one_line(surgery("merge", "recipe.yml", "out", "-q"))
        assert "norm has 32 values that are NaN or infinite; nothing was written" in said
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing: the source has it"),
        (lambda folder: _drop_layer(folder / "model.safetensors"), "lacks model.layers.2."),
    ],
    ids=["a lost tokenizer", "a dropped layer"],
)
def test_a_fault_of_the_writer_fails_the_check(surgery, here: Path, monkeypatch, fault, said: str) -> None:
    """Planted between writing and proving, in the temporary folder, which nobody needs to hear of."""
    real = writing._copy_side_files

    def sabotage(source, target, dtype):
        real(source, target, dtype)
        fault(target)

    monkeypatch.setattr(writing, "_copy_side_files", sabotage)
    line = one_line(surgery("merge", "recipe.yml", "out", "-q"), 1)
    assert said in line
    assert ".partial" not in line
    assert sorted(p.name for p in here.iterdir()) == ["models", "recipe.yml"]


def _drop_layer(path: Path) -> None:
    tensors = {name: t for name, t in load_file(path).items() if ".layers.2." not in name}
    save_file(tensors, path, metadata={"format": "pt"})


def test_for_real(here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "analyses", "merge", "recipe.yml", "out", "--allow-loops", "-q"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "29 sites changed" in done.stdout
    assert done.stderr == ""
    assert sorted(p.name for p in here.iterdir()) == ["models", "out", "recipe.yml"]
