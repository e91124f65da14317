"""`surgery apply` across layouts: a language model's vector on a vision-language model, and what it says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from analyses import cli
from surgery.checkpoint import Checkpoint
from tests.families import save_tiny, save_tiny_vlm

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Said:
    code: int
    out: str
    err: list[str]


@pytest.fixture
def surgery(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command as the console script does, in this process."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        return Said(int(left.value.code or 0), out, err.splitlines())

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model before and after, the vector between them, and a vision-language model."""
    home = tmp_path_factory.mktemp("home")
    save_tiny("llama", home / "base")
    save_tiny("llama", home / "tuned", seed=1)
    save_tiny_vlm("llava", home / "host", "old", seed=2)
    cli.change.diff(str(home / "tuned"), str(home / "base"), home / "vector")
    return home


def test_a_vector_lands_by_itself(home: Path):
    words = ["apply", home / "host", "--add", f"{home / 'vector'}:0.7", "--to", home / "moved", "--quiet"]
    said = subprocess.run(
        [sys.executable, "-m", "analyses", *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert said.returncode == 0, said.stderr
    note = f"note: {home / 'vector'}: embed: rows 0 to 99 of 104; the model's other 4 stay"
    assert note in said.stderr.splitlines()
    base, tuned, host, moved = (Checkpoint(home / name) for name in ("base", "tuned", "host", "moved"))
    for site in host:
        if site.is_unnamed:
            assert torch.equal(moved[site], host[site])
            continue
        change = torch.zeros_like(host[site])
        change[: len(base[site])] = tuned[site] - base[site]
        torch.testing.assert_close(moved[site], host[site] + 0.7 * change, rtol=0, atol=1e-6)
    record = json.loads((home / "moved" / "record.json").read_text())
    assert record["results"]["notes"] == [
        f"note: {home / 'vector'} was measured from another base than this model",
        note,
    ]


def test_what_the_model_lacks_is_listed_a_line_each(home: Path, surgery):
    other = save_tiny_vlm("llava", home / "other", "new", seed=3)
    assert surgery("diff", other, home / "host", "--to", home / "all").code == 0  # across layouts
    said = surgery("apply", home / "tuned", "--add", home / "all", "--to", home / "never", "--dry-run")
    assert said.code == 0, said.err
    beside = [s for s in Checkpoint(home / "host") if s.is_unnamed]
    assert len(beside) > 20
    assert said.err == [
        f"note: {home / 'all'} was measured from another base than this model",
        *(f"note: {home / 'all'}: {s}: not in this model, left out" for s in beside),
        f"note: {home / 'all'}: embed: rows 0 to 99 of 104; the vector's other 4 are left out",
    ]
    assert not (home / "never").exists()


def test_a_vector_that_does_not_fit_is_one_clear_error(home: Path, surgery):
    save_tiny("gpt2", home / "gpt2")
    said = surgery("apply", home / "gpt2", "--add", home / "vector", "--to", home / "never", "--quiet")
    assert said.code == 2
    assert said.err[0].startswith(f"surgery: The vector does not fit {home / 'gpt2'}: ")
    assert "first 0.attn.k: (24, 32) against (32, 32); 0.attn.o: " in said.err[0]
    assert len(said.err) == 1
    assert not (home / "never").exists()


def test_tokens_that_differ_are_said(home: Path, surgery):
    host = save_tiny_vlm("llava", home / "shifted", seed=2)
    path = host / "tokenizer.json"
    said = json.loads(path.read_text())
    words = said["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(said))
    found = surgery("apply", host, "--add", home / "vector", "--to", home / "never", "--dry-run")
    assert found.code == 0, found.err
    assert "tokens: 2 of the 100 common rows of embed and head stand for other tokens, first row" in found.err[-1]
