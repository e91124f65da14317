"""`surgery edit` and `surgery realign` as a user meets them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from analyses import cli
from probes.directions import Direction
from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta
from surgery.edits import RemoveDirection, Scale, SwapLayers
from surgery.lowrank import Adapter, Factored, save_adapter
from surgery.model import Model
from surgery.realign import safelora, safemerge
from surgery.runs import fingerprint
from surgery.sites import Site
from surgery.weights import apply, linear_sites
from tests.families import save_tiny

if TYPE_CHECKING:
    from tests.analyses.conftest import Said

ROOT = Path(__file__).parent.parent.parent
U = torch.randn(32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def surgery(surgery):
    """What a random model says falls into loops by nature, so `edit` and `realign` are told to allow them."""
    return lambda *words: surgery(*words, *(("--allow-loops",) if words[0] in ("edit", "realign") else ()))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, aligned and tuned models, two adapters on the aligned one, a vector file and a list of edits."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("base", "aligned", "tuned")):
        save_tiny("llama", home / name, seed=seed)
    save_tiny("gpt2", home / "gpt2")
    cli.change.diff(str(home / "tuned"), str(home / "aligned"), home / "vector")
    aligned = Checkpoint(home / "aligned")
    for seed, name in enumerate(("adapter", "safe")):
        g = torch.Generator().manual_seed(seed)
        shapes = {s: aligned.shape(s) for s in linear_sites(aligned)}
        pairs = {s: (torch.randn(m, 2, generator=g), torch.randn(2, n, generator=g)) for s, (m, n) in shapes.items()}
        save_adapter(Factored(pairs), home / name, aligned)
    save_file({"u": U}, home / "u.safetensors")
    (home / "edits.yml").write_text(
        "edits:\n"
        '  - remove: {direction: u.safetensors, at: "*.attn.o"}\n'
        '  - scale: {factor: 0.5, at: "1.mlp.down"}\n'
        "  - swap: {layers: [0, 2]}\n"
    )
    return home


def one_line(said: Said) -> str:
    assert said.code == 2, said
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("surgery: ")
    return lines[0]


def same(folder: Path, point) -> None:
    written = Checkpoint(folder)
    assert set(written) == set(point)
    for site in point:
        torch.testing.assert_close(written[site], point[site].float(), rtol=0, atol=1e-6)


def check_receipt(surgery, folder: Path, inputs: set[str]) -> None:
    record = json.loads((folder / "record.json").read_text())
    assert set(record["inputs"]) == inputs
    assert all(len(entry["hash"]) == 64 for entry in record["inputs"].values())
    assert surgery("verify", folder).code == 0
    again = folder.with_name(f"{folder.name}-again")
    said = surgery("replay", folder, "--to", again)
    assert said.code == 0, said
    assert "0 differ" in said.out


# --- edit -------------------------------------------------------------------------------------------------------------


def test_a_list_and_options_are_done_in_order(surgery, home: Path, tmp_path: Path) -> None:
    words = ["--edits", home / "edits.yml", "--scale", "0.attn.q.h1:0", "--scale", "norm:2"]
    words += ["--remove", home / "u.safetensors", "--at", "2.mlp.down", "--strength", 0.5]
    said = surgery("edit", home / "base", *words, "--to", tmp_path / "out", "-q")
    assert said.code == 0, said
    point = apply(RemoveDirection(U), Checkpoint(home / "base"), "*.attn.o")
    point = apply(SwapLayers(0, 2), apply(Scale(0.5), point, "1.mlp.down"))
    point = apply(Scale(2.0), apply(Scale(0.0), point, "0.attn.q.h1"), "norm")
    same(tmp_path / "out", apply(RemoveDirection(U, 0.5), point, "2.mlp.down"))
    check_receipt(surgery, tmp_path / "out", {"model", str(home / "edits.yml"), str(home / "u.safetensors")})


def test_unedited_tensors_keep_their_bytes(surgery, home: Path, tmp_path: Path) -> None:
    assert surgery("edit", home / "base", "--scale", "1.mlp.up:3", "--to", tmp_path / "out", "-q").code == 0
    before, after = (load_file(f / "model.safetensors") for f in (home / "base", tmp_path / "out"))
    changed = [n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]


def test_a_donor_is_an_input(surgery, home: Path, tmp_path: Path) -> None:
    (tmp_path / "edits.yml").write_text(f"edits:\n  - replace: {{layers: [1], from: {home / 'tuned'}}}\n")
    said = surgery("edit", home / "base", "--edits", tmp_path / "edits.yml", "--to", tmp_path / "out", "-q")
    assert said.code == 0, said
    assert torch.equal(Checkpoint(tmp_path / "out")["1.mlp.up"], Checkpoint(home / "tuned")["1.mlp.up"])
    check_receipt(surgery, tmp_path / "out", {"model", str(tmp_path / "edits.yml"), str(home / "tuned")})


def test_a_changed_input_is_noticed_on_replay(surgery, home: Path, tmp_path: Path) -> None:
    save_file({"u": U}, tmp_path / "u.safetensors")
    words = ["--remove", tmp_path / "u.safetensors", "--at", "0.attn.o"]
    assert surgery("edit", home / "base", *words, "--to", tmp_path / "out", "-q").code == 0
    save_file({"u": U + 1}, tmp_path / "u.safetensors")
    said = surgery("replay", tmp_path / "out", "--to", tmp_path / "again")
    assert said.code == 2
    assert "u.safetensors" in said.err
    assert "not what it was" in said.err


def test_a_direction_of_another_model_is_not_removed_unless_carried(surgery, home: Path, tmp_path: Path) -> None:
    base, tuned, file = home / "base", home / "tuned", tmp_path / "d" / "direction.safetensors"
    file.parent.mkdir()
    sites = {Site(layer, "mid"): U + layer for layer in range(3)}
    direction = Direction.of(sites, model=fingerprint(Model.load(base, dtype="float32")))
    direction.save(file)
    (tmp_path / "edits.yml").write_text('edits:\n  - remove: {direction: d, at: "*.attn.o"}\n')
    option, listed = ["--remove", file.parent, "--at", "*.attn.o"], ["--edits", tmp_path / "edits.yml"]
    for words in (option, listed):
        line = one_line(surgery("edit", tuned, *words, "--to", tmp_path / "out", "-q"))
        assert "The direction was measured in another model: its fingerprint is" in line
        assert "say carried_to(model)" in line
        assert not (tmp_path / "out").exists()
        assert surgery("edit", base, *words, "--to", tmp_path / "out", "--dry-run").code == 0
    one = ["--remove", f"{file}:1.mid", "--at", "*.attn.o"]  # a vector by itself is of no model
    assert surgery("edit", tuned, *one, "--to", tmp_path / "out", "--dry-run").code == 0
    direction.carried_to(Model.load(tuned)).save(file)
    said = surgery("edit", tuned, *option, "--to", tmp_path / "out", "-q")
    assert said.code == 0, said
    same(tmp_path / "out", apply(RemoveDirection(direction), Checkpoint(tuned), "*.attn.o"))
    save_file({str(site): vector for site, vector in sites.items()}, file)  # nothing is known of where it is from
    assert surgery("edit", base, *option, "--to", tmp_path / "other", "--dry-run").code == 0


def test_a_dry_run_lists_the_sites(surgery, home: Path, tmp_path: Path) -> None:
    words = ["--edits", home / "edits.yml", "--scale", "1.attn.o.h2:0"]
    said = surgery("edit", home / "base", *words, "--to", tmp_path / "out", "--dry-run")
    assert said.code == 0, said
    assert "remove: direction 'u.safetensors', at '*.attn.o': 3 sites" in said.out
    assert "\n  1.attn.o (32, 48)\n" in said.out
    assert "scale: factor 0.5, at '1.mlp.down': 1 site\n" in said.out
    assert "swap: layers [0, 2]: 18 sites" in said.out
    assert f"20 sites of {home / 'base'} would change" in said.out
    assert not list(tmp_path.iterdir())


def test_edit_refuses(surgery, home: Path, tmp_path: Path) -> None:
    base, out, u = home / "base", tmp_path / "out", home / "u.safetensors"
    (tmp_path / "bad.yml").write_text("edits:\n  - scale: {factor: 0.5, at: norm}\n  - shrink: {}\n")
    before = sorted(tmp_path.iterdir())
    for words, parts in (
        ([], ["No edit is asked for"]),
        (["--edits", tmp_path / "bad.yml"], ["bad.yml, edit 2", "'shrink'", "Edits are"]),
        (["--edits", tmp_path / "none.yml"], ["none.yml is not a file"]),
        (["--scale", "1.mlp.up"], ["--scale 1.mlp.up"]),
        (["--scale", "2:1.mlp.up"], ["--scale 2:1.mlp.up", "sites and then a factor", "'1.mlp.up'"]),
        (["--scale", ":2"], ["--scale :2", "sites and then a factor"]),
        (["--scale", "1.mlp.up:much"], ["--scale 1.mlp.up:much", "finite number", "'much'"]),
        (["--scale", "9.mlp.up:2"], ["--scale 9.mlp.up:2", "matches no site"]),
        (["--remove", u], ["--remove", "at is missing"]),
        (["--remove", u, "--at", "*.mlp.up"], ["0.mlp.up is (40, 32)", "length 32"]),
        (["--remove", tmp_path / "v.safetensors", "--at", "*.attn.o"], ["there is no file"]),
        (["--remove", f"{u}:v", "--at", "*.attn.o"], ["no tensor 'v'", "it has u"]),
        (["--at", "*.attn.o"], ["--remove"]),
        (["--scale", "norm:2", "--strength", 2], ["--remove"]),
        (["--scale", "norm:2", "--dtype", "int8"], ["int8"]),
        (["--scale", "norm:nan"], ["finite number"]),
    ):
        line = one_line(surgery("edit", base, *words, "--to", out, "-q"))
        assert all(part in line for part in parts), (words, line)
    assert "exists" in one_line(surgery("edit", base, "--scale", "norm:2", "--to", home / "tuned", "-q"))
    assert sorted(tmp_path.iterdir()) == before


# --- realign ----------------------------------------------------------------------------------------------------------


def arguments(home: Path, change: str = "adapter") -> list[object]:
    return [home / "aligned", "--change", home / change, "--base", home / "base", "--aligned", home / "aligned"]


@pytest.mark.parametrize("change", ["adapter", "vector"])
def test_realign_writes_the_model_and_the_table(surgery, home: Path, tmp_path: Path, change: str) -> None:
    words = ["--tau", 0.6, "--projection", "shrink"]
    said = surgery("realign", *arguments(home, change), *words, "--to", tmp_path / "out", "-q")
    assert said.code == 0, said
    base, aligned = Checkpoint(home / "base"), Checkpoint(home / "aligned")
    vector = Adapter(home / "adapter", aligned) if change == "adapter" else StoredDelta(home / "vector")
    found = safelora(vector, aligned - base, tau=0.6, projection="shrink")
    same(tmp_path / "out", aligned + found.delta)
    assert f"{sum(m.realigned for m in found.modules)} of 21 modules realigned" in said.out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "similarity.csv"), found.frame(), check_exact=False)
    check_receipt(surgery, tmp_path / "out", {"model", "change", "base", "aligned"})
    results = json.loads((tmp_path / "out" / "record.json").read_text())["results"]
    kept = {name: results[name] for name in ("judged", "realigned", "blind", "tau")}
    assert kept == {"judged": 21, "realigned": sum(m.realigned for m in found.modules), "blind": 0, "tau": 0.6}
    norms = (math.sqrt(sum(norm**2 for norm in found.frame()[column])) for column in ("norm_before", "norm_after"))
    assert (results["norm_before"], results["norm_after"]) == pytest.approx(tuple(norms))
    assert surgery("figure", "similarity", tmp_path / "out", "--to", tmp_path / "rho.png").code == 0
    assert (tmp_path / "rho.png").read_bytes().startswith(b"\x89PNG")


def test_safemerge_and_every_option(surgery, home: Path, tmp_path: Path) -> None:
    """Each option changes the model that is written, and is the one of the function."""
    base, aligned = Checkpoint(home / "base"), Checkpoint(home / "aligned")
    change, safe = (Adapter(home / name, aligned) for name in ("adapter", "safe"))
    alignment = aligned - base
    low = sorted(m.rho for m in safelora(change, alignment).modules)[10]
    jobs = {
        "plain": (["--tau", low], safelora(change, alignment, tau=low)),
        "exact": (["--tau", low, "--projection", "exact", "--cut", 0.4], safelora(change, alignment, tau=low, projection="exact", cut=0.4)),
        "count": (["--mode", "count"], safelora(change, alignment, count=10)),
        "three": (["--mode", "count", "--count", 3], safelora(change, alignment, count=3)),
        "at": (["--tau", low, "--at", "*.attn.*"], safelora(change, alignment, tau=low, at="*.attn.*")),
        "merge": (["--tau", low, "--safe", home / "safe"], safemerge(change, safe, alignment, tau=low)),
        "peft": (["--tau", low, "--safe", home / "safe", "--form", "peft"], safemerge(change, safe, alignment, tau=low, form="peft")),
        "half": (["--tau", low, "--safe", home / "safe", "--weight", 0.5], safemerge(change, safe, alignment, tau=low, weight=0.5)),
    }  # fmt: skip
    hashes = set()
    for name, (words, found) in jobs.items():
        said = surgery("realign", *arguments(home), *words, "--to", tmp_path / name, "-q")
        assert said.code == 0, said
        same(tmp_path / name, aligned + found.delta)
        hashes.add(Checkpoint(tmp_path / name).hash())
    assert len(hashes) == len(jobs)
    assert set(json.loads((tmp_path / "merge" / "record.json").read_text())["inputs"]) == {
        "model",
        "change",
        "safe",
        "base",
        "aligned",
    }


def test_a_dry_realign_shows_the_table(surgery, home: Path, tmp_path: Path) -> None:
    said = surgery("realign", *arguments(home), "--to", tmp_path / "out", "--dry-run", "-q")
    assert said.code == 0, said
    assert len(said.out.strip().splitlines()) == 1 + 21 + 1
    assert "2.mlp.down" in said.out
    assert "of 21 modules realigned" in said.out
    assert not list(tmp_path.iterdir())


def test_realign_refuses(surgery, home: Path, tmp_path: Path) -> None:
    normal = arguments(home)
    for words, parts in (
        ([*normal, "--mode", "some"], ["--mode some", "threshold or count"]),
        ([*normal, "--count", 3], ["--count has no use", "threshold"]),
        ([*normal, "--mode", "count", "--tau", 0.5], ["--tau has no use", "count"]),
        ([*normal, "--mode", "count", "--count", 22], ["count=22", "1 to 21"]),
        ([*normal, "--weight", 0.5], ["--weight has no use", "without --safe"]),
        ([*normal, "--form", "peft"], ["--form has no use"]),
        ([*normal, "--projection", "round"], ["--projection round", "shrink"]),
        ([*normal, "--cut", 0.1], ["cut belongs to the exact projection"]),
        ([*normal, "--safe", home / "safe", "--projection", "paper"], ["--projection has no use", "and --safe"]),
        ([*normal, "--safe", home / "safe", "--form", "round"], ["--form round", "exact, peft"]),
        ([*normal, "--safe", home / "safe", "--weight", 2], ["weight=2.0"]),
        ([*normal, "--at", "*.attn.z"], ["matches no site"]),
        (arguments(home, "nowhere"), ["nowhere"]),
        (
            [home / "aligned", "--change", home / "adapter", "--base", home / "gpt2", "--aligned", home / "aligned"],
            ["anatomy"],
        ),
        ([home / "gpt2", "--change", home / "adapter", "--base", home / "base", "--aligned", home / "aligned"], []),
        ([home / "gpt2", "--change", home / "vector", "--base", home / "base", "--aligned", home / "aligned"], []),
    ):
        line = one_line(surgery("realign", *words, "--to", tmp_path / "out", "-q"))
        assert all(part in line for part in parts), (words, line)
    assert "exists" in one_line(surgery("realign", *normal, "--to", home / "tuned", "-q"))
    assert not list(tmp_path.iterdir())


# --- for real ---------------------------------------------------------------------------------------------------------


def test_the_program(home: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "analyses",
        "edit",
        home / "base",
        "--scale",
        "1.mlp.up:2",
        "--to",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 site changed" in done.stdout
