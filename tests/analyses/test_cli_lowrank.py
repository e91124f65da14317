"""Vectors of low rank on the command line: as files, as adapters, added to models, looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from surgery.adapter_names import CONFIG, WEIGHTS
from surgery.checkpoint import Checkpoint, load_module
from surgery.delta import StoredDelta
from surgery.lowrank import Adapter
from surgery.record import verify
from tests.families import save_tiny

if TYPE_CHECKING:
    from tests.analyses.conftest import Said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and tuned (both tied); adapter: a LoRA of base that PEFT wrote; merged: what PEFT makes of it."""
    home = tmp_path_factory.mktemp("models")
    save_tiny("llama", home / "base")
    save_tiny("llama", home / "tuned", seed=1)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(load_module(home / "base", "auto"), settings)
    model.save_pretrained(home / "adapter")
    model.merge_and_unload().save_pretrained(home / "merged")  # pyright: ignore[reportCallIssue]
    return home


def one_line(said: Said) -> str:
    assert said.code == 2, said
    assert len(said.err.strip().splitlines()) == 1, said.err
    return said.err


def test_a_low_rank_vector_says_what_it_lost(surgery, models: Path, tmp_path: Path) -> None:
    at = ["--at", "*.attn.*", "--at", "0.mlp.down"]
    said = surgery(
        "diff", models / "tuned", models / "base", "--to", tmp_path / "v", "--form", "low-rank", "--rank", 4, *at
    )
    assert said.code == 0, said
    saved, exact = StoredDelta(tmp_path / "v"), Checkpoint(models / "tuned") - Checkpoint(models / "base")
    assert {s.part for s in saved} == {"attn.norm", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.down"}
    held = saved.factored()
    assert len(held) == 13
    lost = sum(float((saved[s] - exact[s]).square().sum()) for s in held)
    whole = sum(float(exact[s].square().sum()) for s in held)
    worst = max(held, key=lambda s: saved.errors[s])
    assert (
        f"13 matrices; relative error {(lost / whole) ** 0.5:.4g} over all, at most {saved.errors[worst]:.4g}, at {worst}"
        in said.out
    )
    assert verify(tmp_path / "v") == []
    assert surgery("replay", tmp_path / "v", "--to", tmp_path / "again").code == 0
    for form in ("dense", "sparse"):
        assert surgery("diff", models / "tuned", models / "base", "--to", tmp_path / form, "--form", form).code == 0
        assert all(StoredDelta(tmp_path / form).form(s) == form for s in StoredDelta(tmp_path / form))


def test_a_vector_becomes_an_adapter(surgery, models: Path, tmp_path: Path) -> None:
    said = surgery("diff", models / "tuned", models / "base", "--to", tmp_path / "a", "--form", "lora", "--rank", 30)
    assert said.code == 0, said
    assert "21 matrices; relative error 0.0" in said.out
    assert "8 sites, embed, norm, 0.attn.norm" in said.out  # a tied embedding and the norms
    base = Checkpoint(models / "base")
    adapter = Adapter(tmp_path / "a", base)
    exact = Checkpoint(models / "tuned") - base
    assert len(adapter) == 21
    recorded = json.loads((tmp_path / "a" / "record.json").read_text())["results"]["errors"]
    for site in adapter:
        assert float((adapter[site] - exact[site]).norm() / exact[site].norm()) == pytest.approx(
            recorded[str(site)], abs=1e-6
        )
    assert recorded["embed"] == 1
    PeftModel.from_pretrained(load_module(models / "base", "auto"), tmp_path / "a")
    assert surgery("replay", tmp_path / "a", "--to", tmp_path / "again").code == 0


def test_an_adapter_is_added(surgery, models: Path, tmp_path: Path) -> None:
    for strength, name in ((":1.0", "one"), ("", "default"), (":0", "none"), (":-0.5", "half back")):
        said = surgery(
            "apply", models / "base", "--add", f"{models / 'adapter'}{strength}", "--to", tmp_path / name, "-q"
        )
        assert said.code == 0, said
        assert verify(tmp_path / name) == []
    base, merged = (load_file(models / name / "model.safetensors") for name in ("base", "merged"))
    one, default, none, back = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "default", "none", "half back")
    )
    for name in base:
        torch.testing.assert_close(one[name], merged[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(one[name], default[name])
        assert torch.equal(none[name], base[name])
        torch.testing.assert_close(back[name], base[name] - 0.5 * (merged[name] - base[name]), rtol=1e-6, atol=1e-6)
    record = json.loads((tmp_path / "one" / "record.json").read_text())
    before = record["inputs"][str(models / "adapter")]["hash"]
    shutil.copytree(models / "adapter", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    (tmp_path / "lora" / CONFIG).write_text(json.dumps({**config, "lora_alpha": 7}))
    assert surgery("apply", models / "base", "--add", tmp_path / "lora", "--to", tmp_path / "x", "-q").code == 0
    record = json.loads((tmp_path / "x" / "record.json").read_text())
    assert record["inputs"][str(tmp_path / "lora")]["hash"] != before, "alpha is part of an adapter"


def test_what_an_adapter_cannot_be_is_said_wherever_it_is_added(surgery, models: Path, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    get_peft_model(load_module(models / "base", "auto"), settings).save_pretrained(tmp_path / "lora")
    notes = Adapter(tmp_path / "lora", Checkpoint(models / "base")).notes
    assert notes
    words = [
        "--strengths",
        "1",
        "--controls",
        0,
        "--count",
        2,
        "--passages",
        1,
        "--length",
        "completion",
        "--samples",
        6,
        "-q",
    ]
    said = surgery("sweep", models / "base", "--add", tmp_path / "lora", *words, "--to", tmp_path / "out")
    assert f"note: {tmp_path / 'lora'}: {notes[0]}" in said.err


def test_an_adapter_and_a_vector_together(surgery, models: Path, tmp_path: Path) -> None:
    assert surgery("diff", models / "tuned", models / "base", "--to", tmp_path / "v").code == 0
    words = ["--add", f"{tmp_path / 'v'}:0.5", "--add", f"{models / 'adapter'}:2"]
    assert surgery("apply", models / "base", *words, "--to", tmp_path / "both", "-q").code == 0
    base, merged, tuned, both = (
        load_file(folder / "model.safetensors")
        for folder in (models / "base", models / "merged", models / "tuned", tmp_path / "both")
    )
    for name in base:
        expected = base[name] + 0.5 * (tuned[name] - base[name]) + 2 * (merged[name] - base[name])
        torch.testing.assert_close(both[name], expected, rtol=1e-5, atol=1e-5)


def test_a_vector_is_looked_at(surgery, models: Path, tmp_path: Path) -> None:
    for name, form in (("v", ["--form", "low-rank", "--rank", 3]), ("w", [])):
        assert surgery("diff", models / "tuned", models / "base", "--to", tmp_path / name, *form).code == 0
    said = surgery("inspect", tmp_path / "v", "--at", "*.attn.q", "--against", tmp_path / "w", "--on", models / "base")
    assert said.code == 0, said
    v, w, base = StoredDelta(tmp_path / "v"), StoredDelta(tmp_path / "w"), Checkpoint(models / "base")
    kept = v.keep("*.attn.q")
    head, columns, *rows = said.out.splitlines()
    assert head.endswith(f"3 sites, norm {sum(n**2 for n in kept.norms().values()) ** 0.5:.4g}")
    assert columns.split()[:5] == ["site", "shape", "stored", "norm", "cosine"]
    assert len(rows) == 3
    for site, row in zip(kept, rows, strict=True):
        assert row.startswith(str(site))
        assert f"rank 3, error {v.errors[site]:.2g}" in row
        assert f"{kept.norms()[site]:.4g}" in row
        assert f"{kept.cosines(w)[site]:.4f}" in row
        assert f"{kept.norms()[site] / float(base[site].norm()):.2e}" in row
    assert "dense" in surgery("inspect", tmp_path / "w").out
    said = surgery("inspect", models / "adapter", "--on", models / "base", "--against", tmp_path / "w", "--at", "0.*.*")
    assert said.code == 0, said
    assert "rank 2" in said.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diff", "tuned", "base", "--to", "x", "--form", "svd"], "choose auto, dense, sparse, low-rank or lora"),
        (["diff", "tuned", "base", "--to", "x", "--form", "lora"], "need --rank"),
        (["diff", "tuned", "base", "--to", "x", "--rank", "4"], "no other form has one"),
        (["diff", "tuned", "base", "--to", "x", "--at", "*.attn.z"], "'*.attn.z' matches no site"),
        (
            ["diff", "tuned", "base", "--to", "x", "--form", "lora", "--rank", "4", "--at", "norm"],
            "norm: a LoRA of base cannot hold that",
        ),
        (["diff", "base", "base", "--to", "x", "--form", "lora", "--rank", "4"], "The two models are identical"),
        (["inspect", "adapter"], "only its model knows where its modules are. Say which, with --on"),
        (["inspect", "base", "--on", "base"], "compare a vector"),
        (["apply", "tuned", "--add", "merged", "--to", "x"], "it is a model. Take the difference first: surgery diff"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_is_asked_wrongly(surgery, models: Path, tmp_path: Path, words: list[str], said: str) -> None:
    places = {name: models / name for name in ("base", "tuned", "adapter", "merged")} | {"x": tmp_path / "x"}
    assert said in one_line(surgery(*(places.get(word, word) for word in words)))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_adapter_is_refused(surgery, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "adapter", tmp_path / "lora")
    data = (tmp_path / "lora" / WEIGHTS).read_bytes()
    (tmp_path / "lora" / WEIGHTS).write_bytes(data[:-4])
    words = ["apply", models / "base", "--add", tmp_path / "lora", "--to", tmp_path / "x"]
    assert "truncated or padded" in one_line(surgery(*words))
    (tmp_path / "lora" / WEIGHTS).unlink()
    (tmp_path / "lora" / "adapter_model.bin").write_bytes(data)
    assert "can run code when opened and is refused" in one_line(surgery(*words))


def test_a_rank_above_every_matrix_keeps_all_of_it(surgery, models: Path, tmp_path: Path) -> None:
    said = surgery(
        "diff", models / "tuned", models / "base", "--to", tmp_path / "v", "--form", "low-rank", "--rank", 1000
    )
    assert said.code == 0, said.err
    stored = StoredDelta(tmp_path / "v")
    exact = Checkpoint(models / "tuned") - Checkpoint(models / "base")
    assert all(torch.equal(stored[site], exact[site]) for site in exact)
    assert stored.errors == {}


def test_a_vector_is_looked_at_on_a_model_of_another_vocabulary(surgery, models: Path, tmp_path: Path) -> None:
    assert surgery("diff", models / "tuned", models / "base", "--to", tmp_path / "v").code == 0
    longer = tmp_path / "longer"
    shutil.copytree(models / "base", longer)
    config = json.loads((longer / "config.json").read_text())
    tensors = load_file(longer / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embed, embed[:8]])
    (longer / "config.json").write_text(json.dumps(config | {"vocab_size": len(embed) + 8}))
    save_file(tensors, longer / "model.safetensors", metadata={"format": "pt"})
    said = surgery("inspect", tmp_path / "v", "--on", longer, "--at", "embed")
    assert said.code == 0, said.err
    assert "embed" in said.out
