"""`surgery check` as a user meets it: what it says, with which exit code, and that it reads and loads next to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery.checkpoint import Checkpoint
from surgery.delta import save_delta
from tests.families import save_tiny

ROOT = Path(__file__).parent.parent.parent
RECIPE = """
merge_method: {method}
models:
  - model: base
    parameters: {{weight: 0.5}}
  - model: tuned
    parameters: {{weight: 0.5}}
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("check")
    save_tiny("llama", place / "base", dtype=torch.bfloat16)
    save_tiny("llama", place / "tuned", dtype=torch.bfloat16, seed=1)
    base = Checkpoint(place / "base")
    save_delta(Checkpoint(place / "tuned") - base, place / "vector", base_hash=base.hash())
    (place / "good.yml").write_text(RECIPE.format(method="linear"))
    (place / "bad.yml").write_text(RECIPE.format(method="liner"))
    (place / "recipe.yaml").write_text(RECIPE.format(method="linear"))
    return place


def surgery(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analyses", "check", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["good.yml"], 0, "good.yml: no problems found"),
        (["recipe.yaml"], 0, "recipe.yaml: no problems found"),
        (["merge", "good.yml", "out"], 0, "forecast memory"),
        (["merge", "good.yml", "tuned"], 1, "exists already and is never overwritten"),
        (["bad.yml"], 1, "Write merge_method: linear"),
        (["base"], 0, "base: no problems found"),
        (["apply", "base", "--add", "vector:0.7", "--to", "out"], 0, "apply base: no problems found"),
        (["apply", "base", "--add", "vector", "--dtype", "auto"], 0, "apply base: no problems found"),
        (["apply", "base", "--add", "vector", "--dtype", "int8"], 1, "is 'int8'"),
        (["apply", "base", "--add", "vectr"], 1, "Did you mean vector?"),
        (["nowhere"], 1, "nowhere is not here"),
        (["nowhere.yml"], 2, "There is no recipe nowhere.yml"),
        (["apply", "base"], 2, "write check RECIPE.yml"),
        (["base", "tuned"], 2, "write check RECIPE.yml"),
        (["base", "--add", "vector"], 2, "write check RECIPE.yml"),
        (["good.yml", "--dtype", "float32"], 2, "write check RECIPE.yml"),
        (["apply", "base", "--add", "vector:much"], 2, "number"),
        ([], 2, "Missing argument"),
    ],
)
def test_words_and_exit_codes(home: Path, words: list[str], code: int, said: str) -> None:
    done = surgery(home, *words)
    assert done.returncode == code, done
    assert said in (done.stdout if code < 2 else done.stderr)
    assert "Traceback" not in done.stderr
    assert not (home / "out").exists()


def test_options_change_something(home: Path) -> None:
    as_found = json.loads(surgery(home, "apply", "base", "--add", "vector", "--json").stdout)
    wide = json.loads(surgery(home, "apply", "base", "--add", "vector", "--json", "--dtype", "float32").stdout)
    assert as_found["ok"] is True
    assert as_found["problems"] == []
    assert wide["forecast"] != as_found["forecast"]
    bad = json.loads(surgery(home, "bad.yml", "--json").stdout)
    assert bad["ok"] is False
    assert [p["kind"] for p in bad["problems"]] == ["method"]


def test_nothing_heavy_is_imported(home: Path) -> None:
    code = """
import sys
sys.argv = ["surgery", "check", "good.yml"]
from analyses.cli import main
try:
    main()
except SystemExit as leaving:
    assert not leaving.code
heavy = [name for name in ("torch", "transformers", "mergekit", "numpy", "huggingface_hub") if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
