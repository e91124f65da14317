"""Undo: the exact original bytes, or one clear reason why not."""

import json
import shutil

import pytest
import torch

from surgery import Checkpoint, CheckpointError, RemoveDirection, Scale, apply, undo, write
from surgery.record import Record
from surgery.reverse import PATCH
from surgery.tensorfile import TensorFile, save_tensors
from tests.families import FAMILIES, SPARSE_FAMILIES, save_tiny, save_tiny_vlm


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reordered(folder):
    """The same checkpoint with headers as another writer would lay them out: the last tensor first, spaces, and no padding."""
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.dumps(dict(reversed(json.loads(raw[8 : 8 + length]).items())), indent=1).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE_FAMILIES, "llava (vision)", "qwen2-vl (vision)"])
def test_the_original_returns_byte_for_byte(family, shards, tmp_path, monkeypatch):
    if shards == 3:  # and every tensor in many pieces, as large ones are
        monkeypatch.setattr("surgery.writing._CHUNK", 64)
        monkeypatch.setattr("surgery.reverse._BLOCK", 24)
    name, vision, _ = family.partition(" (vision)")
    if vision:
        source = save_tiny_vlm(name, tmp_path / "model", "new" if shards == 1 else "old", dtype=torch.bfloat16)
    else:
        source = save_tiny(name, tmp_path / "model", shards=shards, dtype=torch.bfloat16)
    reordered(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    (source / "record.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    base = Checkpoint(source)
    down = next(
        site for site in base if site.layer == 0 and site.part.endswith("down")
    )  # of an expert where there are some
    edited = apply(RemoveDirection(torch.randn(base.anatomy.d_model)), base, ["*.attn.o", down])

    def ours(folder, _):
        for name in ("README.md", "record.json", "recipe.yml"):
            (folder / name).write_text("ours")

    written = write(edited, tmp_path / "out", seal=ours)
    assert written.hash != written.base_hash == base.hash()
    assert undo(tmp_path / "out", tmp_path / "back") == base.hash()
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize(("limit", "why"), [(0, "asked not to keep"), (100, "more than 0 MiB")])
def test_a_change_over_the_limit_keeps_no_way_back_and_says_so(limit, why, tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    written = write(apply(Scale(0.5), base, "*.mlp.up"), tmp_path / "out", undo_limit=limit)
    assert any(check.startswith("no undo: ") and why in check for check in written.checks)
    assert not (tmp_path / "out" / PATCH).exists()
    with pytest.raises(CheckpointError, match="too large to keep a way back"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_whoever_asks_for_no_way_back_is_told_that_whatever_else_stands_in_its_way(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    written = write(apply(Scale(0.5), base, "*.mlp.up"), tmp_path / "out", dtype=torch.bfloat16, undo_limit=0)
    assert "no undo: it was asked not to keep a way back" in written.checks


def test_what_undo_will_not_bring_back_is_said_when_it_is_written(tmp_path):
    source = save_tiny("llama", tmp_path / "model")
    (source / "model.gguf").write_bytes(bytes(2 << 20))
    (source / "small.bin").write_bytes(b"kept")
    written = write(apply(Scale(0.5), Checkpoint(source), "0.attn.k"), tmp_path / "out")
    assert any(check.endswith("MiB, without model.gguf, which no copy takes along") for check in written.checks)
    undo(tmp_path / "out", tmp_path / "back")
    assert {p.name for p in source.iterdir()} - {p.name for p in (tmp_path / "back").iterdir()} == {"model.gguf"}


def test_another_dtype_keeps_no_way_back(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    written = write(base, tmp_path / "out", dtype=torch.bfloat16)
    assert any("no undo: it was stored as torch.bfloat16" in check for check in written.checks)


@pytest.mark.parametrize("what", ["model", "patch", "format"])
def test_a_folder_that_changed_since_is_refused(what, tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    write(apply(Scale(0.5), base, "*.mlp.up"), tmp_path / "out")
    path = tmp_path / "out" / ("model.safetensors" if what == "model" else PATCH)
    raw = bytearray(path.read_bytes())
    if what == "format":
        path.write_bytes(bytes(raw).replace(b"reverse patch 3", b"reverse patch 9"))
    else:
        raw[-1] ^= 1
        path.write_bytes(raw)
    said = {"model": "not what was written any more", "patch": "is damaged", "format": "not a reverse patch"}
    with pytest.raises(CheckpointError, match=said[what]):
        undo(tmp_path / "out", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_patch_that_would_write_elsewhere_is_refused(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    write(apply(Scale(0.5), base, "*.mlp.up"), tmp_path / "out")
    path = tmp_path / "out" / PATCH
    patch = TensorFile(path)
    tensors = {name: patch[name].clone() for name in patch.tensors}
    save_tensors(path, {**tensors, "side:../away.txt": torch.ones(1, dtype=torch.uint8)}, patch.metadata)
    with pytest.raises(CheckpointError, match=r"names '../away.txt'"):
        undo(tmp_path / "out", tmp_path / "back")
    for name in ("additional_chat_templates/../away.txt", "additional_chat_templates/", "elsewhere/away.txt"):
        save_tensors(path, tensors, {**patch.metadata, "left": json.dumps({name: ""})})
        with pytest.raises(CheckpointError, match=rf"names '{name}'"):
            undo(tmp_path / "out", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_patch_that_leads_elsewhere_leaves_nothing(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    write(apply(Scale(0.5), base, "*.mlp.up"), tmp_path / "out")
    path = tmp_path / "out" / PATCH
    patch = TensorFile(path)
    tensors = {name: patch[name].clone() for name in patch.tensors}
    save_tensors(path, tensors, {**patch.metadata, "base_hash": "0" * 64})
    with pytest.raises(CheckpointError, match="does not lead back to the original"):
        undo(tmp_path / "out", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("change", ["altered", "lost"])
@pytest.mark.parametrize("what", ["a vocabulary", "a large file"])
def test_a_side_file_left_to_the_copy_that_changed_since_is_refused(what, change, tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.reverse.SIDE_LIMIT", 100)
    source = save_tiny("llama", tmp_path / "model")
    name = "tokenizer.json" if what == "a vocabulary" else "notes.txt"
    (source / "notes.txt").write_text("long " * 100)
    write(apply(Scale(0.5), Checkpoint(source), "0.mlp.up"), tmp_path / "out")
    there = (tmp_path / "out" / name).read_bytes()
    if change == "altered":
        (tmp_path / "out" / name).write_text("{}")
    else:
        (tmp_path / "out" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is not what was written any more"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (tmp_path / "out" / name).write_bytes(there)
    undo(tmp_path / "out", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_a_patch_of_the_format_before_is_still_read(tmp_path):
    source = save_tiny("llama", tmp_path / "model")
    write(apply(Scale(0.5), Checkpoint(source), "0.mlp.up"), tmp_path / "out")
    path = tmp_path / "out" / PATCH
    patch = TensorFile(path)
    tensors = {name: patch[name].clone() for name in patch.tensors}
    said = {key: text for key, text in patch.metadata.items() if key != "left"}
    said |= {"format": "model-surgery reverse patch 2", "files": json.dumps(sorted(p.name for p in source.iterdir()))}
    save_tensors(path, tensors, said)
    undo(tmp_path / "out", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_the_record_says_why_there_is_no_way_back(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))

    def seal(folder, written):
        Record("scale", {}, checks=written.checks).save(folder)

    write(base, tmp_path / "out", dtype=torch.bfloat16, seal=seal)
    with pytest.raises(
        CheckpointError, match=r"has no undo\.patch: it was stored as torch\.bfloat16 where the original"
    ):
        undo(tmp_path / "out", tmp_path / "back")
    write(base, tmp_path / "kept", seal=seal)
    (tmp_path / "kept" / "undo.patch").unlink()
    with pytest.raises(CheckpointError, match="it had one when it was written, and the file is gone"):
        undo(tmp_path / "kept", tmp_path / "back")


def test_undo_of_undo_of_two_edits_is_the_first(tmp_path):
    base = Checkpoint(save_tiny("qwen2", tmp_path / "model", dtype=torch.bfloat16))
    write(apply(Scale(0.5), base, "0.mlp.up"), tmp_path / "one")
    write(apply(Scale(-0.0), Checkpoint(tmp_path / "one"), "1.attn.q.h2"), tmp_path / "two")
    undo(tmp_path / "two", tmp_path / "back-one")
    assert files(tmp_path / "back-one") == files(tmp_path / "one")
    undo(tmp_path / "back-one", tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "model")
    shutil.rmtree(tmp_path / "back")


def test_a_patch_of_the_original_is_not_left_in_the_copy(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    write(apply(Scale(0.5), base, "0.mlp.up"), tmp_path / "one")
    write(apply(Scale(0.5), Checkpoint(tmp_path / "one"), "1.mlp.up"), tmp_path / "two", undo_limit=0)
    with pytest.raises(CheckpointError, match="too large to keep a way back"):
        undo(tmp_path / "two", tmp_path / "back")


@pytest.mark.parametrize("room", [True, False])
def test_a_large_patch_of_the_original_returns_or_there_is_no_undo(room, tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.reverse.SIDE_LIMIT", 100)
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    write(apply(Scale(0.5), base, "*.mlp.*"), tmp_path / "one")
    size = (tmp_path / "one" / PATCH).stat().st_size
    one = Checkpoint(tmp_path / "one")
    written = write(apply(Scale(0.5), one, "0.attn.k"), tmp_path / "two", undo_limit=size + (100_000 if room else 1))
    if not room:
        assert any("no undo: with the original's" in check for check in written.checks)
        assert not (tmp_path / "two" / PATCH).exists()
        return
    undo(tmp_path / "two", tmp_path / "back-one")
    assert files(tmp_path / "back-one") == files(tmp_path / "one")


def test_side_files_that_are_rewritten_after_the_write_return(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "heads.csv").write_text("theirs")

    def seal(out, _):
        (out / "chat_template.jinja").write_text("another")
        (out / "tokenizer_config.json").write_text("{}")
        (out / "heads.csv").write_text("ours")

    write(apply(Scale(0.5), Checkpoint(folder), "0.mlp.up"), tmp_path / "out", seal=seal)
    undo(tmp_path / "out", tmp_path / "back")
    assert files(tmp_path / "back") == files(folder)
