"""Written whole or not at all, read or refused with a reason; what nothing touched keeps its bytes."""

import contextlib
import dataclasses
import fcntl
import glob
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery import whole
from surgery.checkpoint import Checkpoint, load_module, point_hash
from surgery.delta import StoredDelta, save_delta
from surgery.edits import Scale
from surgery.headers import read_folder
from surgery.model import Model
from surgery.preflight import check_model
from surgery.reverse import PATCH
from surgery.side_files import HUB_FILES
from surgery.sites import Site
from surgery.tensorfile import CheckpointError, raw_bytes, read_header
from surgery.weights import apply
from surgery.whole import hindrance, new_folder
from surgery.writing import write
from tests.families import FAMILIES, TEMPLATE, save_tiny, tiny

SIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path / "model", shards=3)


def nothing_left(folder: Path, but: tuple[str, ...] = ("model",)) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(but)


def bytes_of(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes in a folder, by name, found without the code under test."""
    found = {}
    for file in path.glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = raw[start + begin : start + end]
    return found


# --- reading and writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_was_edited_changes(family, tied, shards, tmp_path):
    source = save_tiny(family, tmp_path / "model", tied=tied, shards=shards, dtype=torch.bfloat16)
    base = Checkpoint(source)
    edited = apply(Scale(0.5), apply(lambda _, W: W + 0.1, base, "*.mlp.up"), ["1.attn.o.h2", "0.attn.k"])
    written = write(edited, tmp_path / "out")
    before, after = bytes_of(source), bytes_of(tmp_path / "out")
    touched = {base.anatomy.places[s].name for s in edited.changed_from(base)}
    assert {name for name in before if before[name] != after[name]} == touched
    assert before.keys() == after.keys()
    again = Checkpoint(tmp_path / "out")
    for site in base:
        assert torch.equal(again[site], edited[site].to(torch.bfloat16))
    assert set(written.kept) == edited.changed_from(base)
    for site, kept in written.kept.items():
        direct = (edited[site] - base[site].float()).double()
        got = (again[site].float() - base[site].float()).double()
        assert kept.asked == pytest.approx(float(direct.norm()), rel=1e-4)
        assert kept.kept == pytest.approx(float(got.norm()), rel=1e-4)
        assert kept.cosine == pytest.approx(float((direct * got).sum() / direct.norm() / got.norm()), rel=1e-4)
        assert kept.entries == int((direct != 0).sum())
        assert kept.unmoved == pytest.approx(float(((got == 0) & (direct != 0)).sum() / (direct != 0).sum()), abs=1e-6)
    assert written.hash == again.hash()
    assert written.base_hash == base.hash()
    assert written.hashes == again.hashes()
    # the layout: files, their metadata, the tensors in each; tokenizer, template and configuration
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in source.iterdir()} | {PATCH}
    for file in base.files:
        (mine, metadata), (theirs, found) = read_header(tmp_path / "out" / file), read_header(source / file)
        assert [(t.name, t.dtype, t.shape) for t in mine] == [(t.name, t.dtype, t.shape) for t in theirs]
        assert metadata == found == {"format": "pt"}
    for name in SIDE:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    if shards > 1:
        assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((source / INDEX).read_text())
    # and transformers, which knows nothing of sites, loads it
    module = load_module(tmp_path / "out", "auto")
    assert (module.get_output_embeddings().weight is module.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_a_copy(family, tied, tmp_path):
    source = save_tiny(family, tmp_path / "model", tied=tied, shards=2)
    written = write(Checkpoint(source), tmp_path / "out")
    assert bytes_of(source) == bytes_of(tmp_path / "out")
    assert written.hash == written.base_hash == Checkpoint(source).hash()
    assert str(written).endswith("an exact copy, nothing changed")
    assert written.kept == {}
    single = save_tiny(family, tmp_path / "single", tied=tied)
    assert Checkpoint(single).hash() == written.hash  # whatever files it is split into
    tensors, hashes = Checkpoint(single).tensors, Checkpoint(single).hashes()
    name = next(name for name, tensor in tensors.items() if len(tensor.shape) == 2)
    for other in ({"dtype": torch.int32}, {"shape": tensors[name].shape[::-1]}):  # the same bytes, but other numbers
        assert point_hash(tensors | {name: dataclasses.replace(tensors[name], **other)}, hashes) != written.hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_another_dtype(family, dtype, tmp_path):
    found = torch.bfloat16 if dtype == torch.float32 else torch.float32
    source = save_tiny(family, tmp_path / "model", dtype=found, shards=2)
    base = Checkpoint(source)
    edited = apply(Scale(1.001), base, "1.attn.o")
    written = write(edited, tmp_path / "out", dtype=dtype)
    again = Checkpoint(tmp_path / "out")
    for site in base:
        assert again[site].dtype == dtype
        assert torch.equal(again[site], edited[site].to(dtype))
    direct = (edited["1.attn.o"] - base["1.attn.o"].float()).norm()  # of what was there, not of its rounding
    assert written.kept[Site(1, "attn.o")].asked == pytest.approx(float(direct), rel=1e-4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == again.nbytes == base.nbytes * dtype.itemsize // found.itemsize
    assert Model.load(tmp_path / "out").module.dtype == dtype
    assert written.hash == again.hash()
    copied = write(base, tmp_path / "copy", dtype=dtype)
    assert "an exact copy" not in str(copied)  # nothing was edited, but every byte is another
    with pytest.raises(ValueError, match=r"Weights cannot be stored as torch\.int8"):
        write(base, tmp_path / "never", dtype=torch.int8)
    assert not (tmp_path / "never").exists()


def test_a_file_that_repeats_the_tied_head_stays_consistent(tmp_path):
    source = save_tiny("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint(source)
    assert "head" in base
    assert [str(s) for s in base if s.layer is None] == ["embed", "norm"]
    write(apply(Scale(0.5), base, "embed"), tmp_path / "out")
    after = bytes_of(tmp_path / "out")
    assert after["lm_head.weight"] == after["model.embed_tokens.weight"] != bytes_of(source)["lm_head.weight"]


def with_head(folder: Path, change) -> Path:
    """The folder with `change` made to its tensors, which it is given with the name of the embedding."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embed = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))
    change(tensors, embed)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("family", "same_bytes"), [("llama", True), ("gpt2", False)])
def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(family, same_bytes, tmp_path):
    def apart(tensors, embed):
        tensors["lm_head.weight"] = tensors[embed].flip(0).clone()
        if same_bytes:  # in another dtype they are other numbers
            tensors |= {"lm_head.weight": (half := tensors[embed].bfloat16()), embed: half.view(torch.float16).clone()}

    source = with_head(save_tiny(family, tmp_path / "model"), apart)
    module = load_module(source, "auto")  # transformers keeps the two apart
    assert not torch.equal(module.get_output_embeddings().weight, module.get_input_embeddings().weight)
    base = Checkpoint(source)
    words = (
        r"config\.json says .*lm_head\.weight.*(embed_tokens|wte)\.weight.*Set tie_word_embeddings to false in it\.$"
    )
    for job in (
        lambda: base["embed"],
        lambda: write(apply(Scale(0.5), base, "embed"), tmp_path / "out"),
        lambda: write(apply(Scale(0.5), base, "0.attn.o"), tmp_path / "out"),  # before the work, not after it
        lambda: write(base, tmp_path / "out"),
        lambda: save_delta(
            base - Checkpoint(save_tiny(family, tmp_path / "other", seed=1)), tmp_path / "out", base_hash=""
        ),
        lambda: Model.load(source),
    ):
        with pytest.raises(CheckpointError, match=words):
            job()
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write(apply(Scale(0.5), Checkpoint(source), "embed"), tmp_path / "out")
    assert bytes_of(tmp_path / "out")["lm_head.weight"] == bytes_of(source)["lm_head.weight"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_file_may_hold_the_head_alone(family, tmp_path):
    source, plain = save_tiny(family, tmp_path / "model"), Checkpoint(save_tiny(family, tmp_path / "plain"))
    with_head(source, lambda tensors, embed: tensors.update({"lm_head.weight": tensors.pop(embed)}))
    base = Checkpoint(source)
    assert base.anatomy.resolve("head") == base.anatomy.resolve("embed")
    assert torch.equal(base["embed"], plain["embed"])
    assert {str(site) for site in base} == {str(site) for site in plain}
    write(apply(Scale(0.5), base, "embed"), tmp_path / "out")
    module = load_module(tmp_path / "out", "auto")
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert torch.equal(module.get_input_embeddings().weight, 0.5 * plain["embed"])
    assert torch.equal(Model.load(source).weights["embed"], plain["embed"])


def test_a_bare_backbone_with_buffers(tmp_path):
    """GPT-2's own files: no prefix, and attention masks among the weights."""
    source = save_tiny("gpt2", tmp_path / "model")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors")
    base = Checkpoint(source)
    assert "file:h.0.attn.bias" in base
    edited = apply(Scale(0.5), base, "*.mlp.up")
    write(edited, tmp_path / "out")
    model = Model.load(source)
    with model.installed(edited):
        for site in model.weights:
            assert torch.equal(model.weights[site], edited[site])
    assert bytes_of(tmp_path / "out")["h.0.attn.bias"] == bytes_of(source)["h.0.attn.bias"]


def test_names_in_files_are_not_names_in_modules(tmp_path):
    source = save_tiny("gpt-neox", tmp_path / "model", tied=False)
    base, model = Checkpoint(source), Model.load(source)
    assert base.anatomy.places[next(s for s in base if s.part == "head")].name == "embed_out.weight"
    assert "embed_out.weight" not in dict(model.module.named_parameters())
    write(apply(Scale(2.0), model.weights, "head"), tmp_path / "out")  # a live module is written under its files' names
    assert torch.equal(Checkpoint(tmp_path / "out")["head"], 2 * base["head"])
    assert bytes_of(tmp_path / "out").keys() == bytes_of(source).keys()


class Elsewhere(torch.Tensor):
    """A tensor as on an accelerator: in no arithmetic with those of the processor, until it is brought over."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        assert func is not torch.Tensor.numpy, "can't convert device type tensor to numpy"
        assert not any(type(a) is torch.Tensor and a.ndim for a in args), "tensors on different devices"
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # whole tensors, and pieces of fused ones
def test_a_live_model_on_an_accelerator_is_written(family, tmp_path):
    model = Model.load(str(save_tiny(family, tmp_path / "model")))
    for layer in model.module.modules():
        for name, p in layer._parameters.items():
            layer._parameters[name] = None if p is None else p.detach().as_subclass(Elsewhere)
    write(apply(Scale(0.5), model.weights, "*.attn.o"), tmp_path / "out")
    assert torch.equal(Checkpoint(tmp_path / "out")["1.attn.o"], 0.5 * Checkpoint(tmp_path / "model")["1.attn.o"])
    assert bytes(raw_bytes(torch.ones(1).as_subclass(Elsewhere))) == bytes.fromhex("0000803f")


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "mixtral"]
)  # whole tensors, pieces of fused ones, packed on loading
def test_what_a_narrower_live_model_leaves_alone_keeps_its_bytes(family, dtype, tmp_path):
    """Files in float32 under a config that says bfloat16, which is what transformers loads them as."""
    source = save_tiny(family, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model, before = Model.load(source, dtype=dtype), bytes_of(source)
    assert model.module.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    places = Checkpoint(source).anatomy.places
    write(model.weights, tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == before
    with torch.no_grad():
        model.weights.parameter("norm").add_(1)  # as training does
    edited = apply(Scale(0.5), model.weights, "1.attn.o")
    written = write(edited, tmp_path / "out")
    after = bytes_of(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {
        places[Site.parse(s)].name for s in ("norm", "1.attn.o")
    }
    assert {str(site) for site in written.kept} == {"norm", "1.attn.o"}
    assert torch.equal(Checkpoint(tmp_path / "out")["norm"], model.weights["norm"].float())


@pytest.mark.parametrize("shape", [(), (0, 3)], ids=["a number", "no rows"])
def test_tensors_without_rows_are_read_and_written(shape, tmp_path):
    folder, name = (
        save_tiny("gpt-neox", tmp_path / "model"),
        "gpt_neox.layers.0.attention.masked_bias",
    )  # of the older files
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: torch.full(shape, 3.0)}, file, metadata={"format": "pt"})
    base = Checkpoint(folder)
    written = write(apply(Scale(0.5), base, "0.attn.o"), tmp_path / "out")
    assert written.hashes[name] == Checkpoint(tmp_path / "out").hashes()[name]
    assert load_file(tmp_path / "out" / "model.safetensors")[name].shape == shape
    assert torch.equal(base[f"file:{name}"], torch.full(shape, 3.0))
    if shape == ():
        save_delta(base - apply(lambda _, W: W - 1, base, f"file:{name}"), tmp_path / "vector", base_hash="x")
        assert torch.equal(StoredDelta(tmp_path / "vector")[f"file:{name}"], torch.ones(shape))


def test_a_buffer_of_minus_infinity_is_carried(tmp_path):
    """As in GPT-NeoX's own files in half precision: transformers does not read it. What the model does read stays checked."""
    name = "gpt_neox.layers.0.attention.masked_bias"
    buffers = {name: torch.tensor(float("-inf")).half(), name.replace("0", "1"): torch.tensor(float("nan")).half()}

    def saved(folder, seed):
        made = save_tiny("gpt-neox", folder, dtype=torch.float16, seed=seed)
        return with_head(made, lambda tensors, _: tensors.update(buffers))

    base, tuned = Checkpoint(saved(tmp_path / "model", 0)), Checkpoint(saved(tmp_path / "tuned", 1))
    site = f"file:{name}"
    written = {
        "edited": apply(Scale(0.5), base, "0.attn.o"),
        "half": base + 0.5 * (tuned - base),
        "whole": base + (tuned - base),
    }
    for to, point in written.items():
        write(point, tmp_path / to)
        assert bytes_of(tmp_path / to)[name] == bytes_of(base.folder)[name]
    delta = tuned - base
    save_delta(delta, tmp_path / "vector", base_hash="")
    assert site not in StoredDelta(tmp_path / "vector")
    assert all(delta[f"file:{n}"] == 0 for n in buffers)
    assert delta.norms()[Site.parse(site)] == 0
    assert delta.survival("bfloat16", base)[Site.parse(site)].entries == 0
    with pytest.raises(ValueError, match=r"file:.*NaN or infinite; nothing was written"):
        write(apply(lambda _, W: W * 0 + float("inf"), base, site), tmp_path / "never")
    for value in (float("-inf"), float("nan")):
        with_head(base.folder, lambda tensors, embed: tensors[embed].view(-1)[5:6].fill_(value))  # noqa: B023 - at once
        with pytest.raises(ValueError, match=r"embed has 1 values that are NaN or infinite; nothing was written"):
            write(apply(Scale(0.5), Checkpoint(base.folder), "0.attn.o"), tmp_path / "never")
        with pytest.raises(ValueError, match=r"The change at embed is NaN or infinite"):
            save_delta(tuned - Checkpoint(base.folder), tmp_path / "never", base_hash="")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_mask_of_whole_numbers_is_carried_however_weights_are_rounded(rounding, tmp_path):
    """As in older GPT-2 and GPT-NeoX files: a sum reaches it, and rounds it to no neighbour."""
    masks = {"gpt_neox.layers.0.attention.bias": torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)}

    def saved(folder, seed):
        made = save_tiny("gpt-neox", folder, dtype=torch.float16, seed=seed)
        return with_head(made, lambda tensors, _: tensors.update(masks))

    base, tuned = Checkpoint(saved(tmp_path / "model", 0)), Checkpoint(saved(tmp_path / "tuned", 1))
    write(base + 0.5 * (tuned - base), tmp_path / "half", rounding=rounding, dtype=torch.bfloat16)
    for name in masks:
        assert bytes_of(tmp_path / "half")[name] == bytes_of(base.folder)[name]


def test_a_live_model_without_files(tmp_path):
    module, tokenizer = tiny("llama")
    with pytest.raises(ValueError, match=r"no checkpoint behind it.*Use module\.save_pretrained"):
        write(Model(module, tokenizer).weights, tmp_path / "out")
    assert nothing_left(tmp_path, ())


def test_weights_in_other_formats_are_not_carried_along(folder, tmp_path):
    for name in ("pytorch_model.bin", "model.gguf", "optimizer.pt", ".hidden"):
        (folder / name).write_bytes(b"stale")
    (folder / "notes.txt").write_text("kept")
    write(apply(Scale(0.0), Checkpoint(folder), "0.attn.o"), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "notes.txt" in names
    assert not names & {"pytorch_model.bin", "model.gguf", "optimizer.pt", ".hidden"}
    assert Model.load(tmp_path / "out").tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_honour_the_umask(folder, tmp_path, umask):
    before = os.umask(umask)
    try:
        write(apply(Scale(0.0), Checkpoint(folder), "0.attn.o"), tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def test_files_that_are_links_are_read_and_copied(folder, tmp_path):
    """The hub's cache is a folder of links into its own repository; a link to elsewhere is refused by name."""
    blobs, linked = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    linked.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (linked / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "alias").symlink_to(linked)
    write(Checkpoint(tmp_path / "alias"), tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()} | {PATCH}
    for name in ("model-00001-of-00003.safetensors", "notes.txt"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "elsewhere")
        refuse(
            folder,
            f"{name} is a link out of the folder, to {tmp_path / 'elsewhere'}, and is refused",
            "Put the file itself there",
        )
        (folder / name).unlink()
        shutil.copy(blobs / "model-00001-of-00003.safetensors", folder / "model-00001-of-00003.safetensors")


def test_writing_says_nothing(folder, tmp_path, capfd, monkeypatch):
    said = logging.Handler()
    said.emit = pytest.fail
    monkeypatch.setattr(logging.getLogger(), "handlers", [said])
    write(Checkpoint(folder), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


# --- folders that are not checkpoints -----------------------------------------------------------------------------------------


def refuse(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder)
    for words in (folder.name, *said):
        assert words in str(error.value), str(error.value)


def test_no_such_folder(tmp_path):
    refuse(tmp_path / "none", "is not a folder", "config.json and safetensors files")


def test_an_empty_folder(tmp_path):
    refuse(tmp_path, "has no config.json (there is: nothing)", "A checkpoint is a folder with")


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    refuse(tmp_path, "has no config.json (there is: holiday.jpg)")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_config_that_says_nothing(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json")


def test_a_family_without_a_table(folder):
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(
        ValueError, match=r"is a 'bloom' model, a family without a table\. Known: .*llama.*anatomies\.toml"
    ):
        Checkpoint(folder)


def test_a_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, "lacks 1 of 3 shards, first model-00002-of-00003.safetensors", "Download it again")


@pytest.mark.parametrize("shards", [1, 3])
def test_another_format_beside_the_shards_is_left_aside(shards, tmp_path):
    """As in Mistral's repositories."""
    folder = save_tiny("mistral", tmp_path / "model", shards=shards)
    names = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"]
    before = Checkpoint(folder)
    for name in names:
        save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / name)
    base = Checkpoint(folder)
    assert base.files == before.files
    assert base.hash() == before.hash()
    assert not [p for p in check_model(str(folder)).problems if p.severity == "error"]
    write(apply(Scale(0.5), base, "0.attn.o"), tmp_path / "out")
    assert not set(names) & {p.name for p in (tmp_path / "out").iterdir()}
    present = [p.name for p in folder.iterdir()]  # and the hub is not asked for them
    assert {*present} - {*filter_repo_objects(present, **HUB_FILES)} == {*names}


def test_an_extra_shard(folder):
    save_file({"x": torch.ones(1)}, folder / "model-00004-of-00004.safetensors")
    refuse(folder, "model-00004-of-00004.safetensors, which model.safetensors.index.json does not mention", "Remove")


def test_no_weights_at_all(folder):
    for path in folder.glob("*safetensors*"):
        path.unlink()
    refuse(folder, "has no weights: neither model.safetensors nor model.safetensors.index.json is there")


def test_shards_without_their_index(folder):
    (folder / INDEX).unlink()
    refuse(folder, "has 3 safetensors files", "but no model.safetensors.index.json to say which belong")


def test_pickles_are_refused_with_the_way_out(folder):
    for path in folder.glob("*safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refuse(folder, "holds pickles (pytorch_model.bin)", "can run code", "save_pretrained(NEW_FOLDER)")


def test_what_a_folder_is_called_says_nothing_of_its_files(folder):
    jar = folder.rename(folder.with_name("pickles"))
    shard = min(jar.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:20])
    assert [fault.kind for fault in read_folder(jar).faults] == ["file"]
    shard.write_bytes(b"PK\x03\x04" + bytes(40))
    assert [fault.kind for fault in read_folder(jar).faults] == ["pickle"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(folder, path.name, "truncated" if keep < 0 else "is not a complete safetensors file")


def test_a_padded_file(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    refuse(folder, path.name, "truncated or padded", "its header promises", "Download it again")


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 10**8 + 1])
def test_a_header_of_absurd_length(folder, length):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refuse(folder, path.name, f"with a header that claims {length}")


def with_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe",
        b"[" * 50_000,
        [],
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)  # fmt: skip
def test_a_corrupted_header(tmp_path, header):
    path = tmp_path / "model.safetensors"
    with_header(path, header, b"\0" * 4)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors (has a damaged header|is not a complete|is truncated)"
    ):
        read_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_in_a_header_is_found_or_harmless(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, 8 + int.from_bytes(raw[:8], "little") - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):  # nothing else may come out
        for tensor in read_header(path)[0]:
            assert 0 <= tensor.begin <= tensor.end <= len(raw)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin"])
def test_an_index_that_points_outside(folder, name):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    refuse(folder, f"points to {name!r}", "inside the folder itself")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(folder, text):
    (folder / INDEX).write_text(text)
    refuse(folder, "is not a safetensors index")


def test_an_index_of_another_checkpoint(folder):
    index = json.loads((folder / INDEX).read_text())
    kept = dict(index["weight_map"])
    file = index["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(index))
    refuse(folder, f"{file} contains model.norm.weight", "does not mention it")
    other = next(f for f in kept.values() if f != file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**kept, "model.norm.weight": other}}))
    refuse(folder, f"{file} contains model.norm.weight", f"says it is in {other}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {**kept, "ghost": file}}))
    refuse(folder, f"promises ghost in {file}, which does not contain it")


def test_a_required_tensor_that_is_not_there(tmp_path):
    source = save_tiny("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"llama of 3 layers but lacks 1 of its tensors, first model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        Checkpoint(source)


# --- writes that fail ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("edited", ["embed", "1.mlp.up", "2.attn.v"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_source_that_is_not_finite(family, edited, bad, tmp_path):
    source = save_tiny(family, tmp_path / "model")
    name = Checkpoint(source).anatomy.places[next(s for s in Checkpoint(source) if str(s) == "1.mlp.up")].name
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1\.mlp\.up has 1 values? that (is|are) NaN or infinite; nothing was written"
    ):
        write(apply(Scale(0.5), Checkpoint(source), edited), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_edit_that_overflows_the_stored_dtype(tmp_path):
    source = save_tiny("llama", tmp_path / "model", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"0\.attn\.o has \d+ values"):
        write(apply(Scale(1e9), Checkpoint(source), "0.attn.o"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_edit_that_raises(folder, tmp_path):
    def broken(site, W):
        raise ZeroDivisionError(str(site))

    with pytest.raises(ZeroDivisionError, match=r"2\.mlp\.up"):
        write(apply(broken, Checkpoint(folder), "2.mlp.up"), tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_what_exists_is_never_overwritten(folder, tmp_path, what):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to(tmp_path / "nowhere")}[what]()
    with pytest.raises(FileExistsError, match=r"out exists already and is never overwritten\. Choose another"):
        write(Checkpoint(folder), out)
    assert nothing_left(tmp_path, ("model", "out"))


def test_a_written_file_that_is_damaged_is_found(folder, tmp_path, monkeypatch):
    import surgery.writing as writing

    real = writing._copy_side_files

    def sabotage(source, target, dtype):
        real(source, target, dtype)
        path = target / "model-00002-of-00003.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(writing, "_copy_side_files", sabotage)
    last = read_header(folder / "model-00002-of-00003.safetensors")[0][-1].name
    with pytest.raises(CheckpointError, match=f"{last} as loaded differs from {last} as computed"):
        write(Checkpoint(folder), tmp_path / "out")
    assert nothing_left(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from surgery.whole import new_file, new_folder
with {make}(Path(sys.argv[1])) as partial:
    print(partial, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("make", ["new_folder", "new_file"])
def test_leftovers_of_the_dead_are_removed_and_of_the_living_not(make, tmp_path):
    """Whoever has the number that a leftover was given: one of a living process that never had to do with it, or with a thread of it, is nobody's."""
    out, holders, partials = tmp_path / "o[u]t", [], []
    for dies in (True, False):
        holders.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER.format(make=make), str(out)], stdout=subprocess.PIPE, text=True
            )
        )
        partials.append(Path(holders[-1].stdout.readline().strip()))
        assert partials[-1].exists()
        if dies:
            holders[-1].kill()
            holders[-1].wait()
    other = tmp_path / ".o[u]t.partial-note"
    other.mkdir()
    borrowed = tmp_path / f".o[u]t.partial-{os.getppid()}"
    borrowed.mkdir()
    try:
        assert not partials[0].exists()  # the second came past it
        with getattr(whole, make)(out):
            assert [p.exists() for p in (partials[1], borrowed, other)] == [True, False, True]
        assert out.exists()
    finally:
        holders[1].kill()
        holders[1].wait()


@pytest.mark.parametrize("make", [new_folder, whole.new_file])
def test_one_process_can_make_the_same_output_twice_at_a_time(make, tmp_path):
    with make(tmp_path / "out") as other:
        with make(tmp_path / "out") as partial:
            assert partial != other
            assert partial.exists()
        if make is new_folder:
            (tmp_path / "out").rmdir()
    assert nothing_left(tmp_path, ("out",))


@pytest.mark.parametrize("make", [new_folder, whole.new_file])
def test_a_name_that_another_process_has_by_then_is_left_to_it(make, tmp_path, monkeypatch):
    numbers = iter([7, 8])

    def draw(_):
        theirs = tmp_path / f".out.partial-{(number := next(numbers))}"
        if number == 7:
            theirs.mkdir() if make is new_folder else theirs.touch()
        return number

    monkeypatch.setattr(whole.secrets, "randbelow", draw)
    with make(tmp_path / "out") as partial:
        assert partial.name == ".out.partial-8"
    assert nothing_left(tmp_path, (".out.partial-7", "out"))


@pytest.mark.parametrize("make", [new_folder, whole.new_file])
def test_what_another_process_takes_for_a_leftover_before_it_has_its_lock_is_made_anew(make, tmp_path, monkeypatch):
    real, taken, other = fcntl.flock, [], []

    def late(opened, how):
        if not taken:
            taken.extend(tmp_path.iterdir())
            theirs = os.open(taken[0], os.O_RDONLY)
            real(theirs, fcntl.LOCK_EX)
            other.append(threading.Timer(0.2, lambda: (whole._remove(taken[0]), os.close(theirs))))
            other[0].start()
        real(opened, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with make(tmp_path / "out") as partial:
        other[0].join()
        assert partial.exists()
    assert nothing_left(tmp_path, ("out",))


def test_nothing_stays_open(tmp_path):
    opened = os.listdir("/proc/self/fd")
    with new_folder(tmp_path / "folder"), whole.new_file(tmp_path / "file"):
        pass
    assert os.listdir("/proc/self/fd") == opened


def test_the_trial_whether_a_folder_can_be_made_has_no_name(tmp_path, monkeypatch):
    """A kill in the middle of it left a folder that never went."""
    real, seen = tempfile.TemporaryFile, []

    def tried(**asked):
        opened = real(**asked)
        seen.append(list(asked["dir"].iterdir()))
        return opened

    monkeypatch.setattr(tempfile, "TemporaryFile", tried)
    assert hindrance(tmp_path / "deep/er/out") is None
    assert seen == [[]]


def test_an_error_within_is_told_as_it_is(tmp_path):
    with pytest.raises(FileExistsError, match="of another thing"), new_folder(tmp_path / "out"):
        raise FileExistsError("of another thing")
    assert nothing_left(tmp_path, ())


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "deep/er/out") as partial:
        (partial / "x").touch()
        assert not (tmp_path / "deep/er/out").exists()
    assert nothing_left(tmp_path / "deep/er", ("out",))
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep/er/next") as partial:  # noqa: PT012
        (partial / "x").touch()
        raise KeyboardInterrupt
    assert nothing_left(tmp_path / "deep/er", ("out",))


# --- a full disk, an interrupt, a kill: real processes -------------------------------------------------------------------------

SERVER = """
import os, sys, traceback
import torch, transformers
from transformers import LlamaForCausalLM
from surgery import Checkpoint, write
from surgery.edits import Scale
from surgery.weights import apply
torch.set_num_threads(1)
print("up", flush=True)
for line in sys.stdin:  # imports take seconds: each writer is a fork of one process that has done them
    source, to, limit = line.split()
    pid = os.fork()
    if pid == 0:
        try:
            if int(limit):
                import resource, signal
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
            write(apply(Scale(0.5), Checkpoint(source), "**.attn.*"), to)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            while error and not isinstance(error, KeyboardInterrupt):
                error = error.__context__  # of a lock that an interrupted wait did not hold
            os._exit(130 if error else 1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """Starts a write in a process of its own: (source, to, limit on a file's bytes) -> its id, and its end to wait for."""
    log = tmp_path_factory.mktemp("log") / "err"
    with log.open("w") as err:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
        )
    assert server.stdin
    assert server.stdout
    stdin, stdout = server.stdin, server.stdout
    assert stdout.readline() == "up\n"

    def start(source, to, limit=0):
        print(source, to, limit, file=stdin, flush=True)
        pid = int(stdout.readline())
        return pid, lambda: (int(stdout.readline()), log.read_text())

    yield start
    stdin.close()
    server.wait(timeout=30)
    stdout.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A llama of some 50 MB: long enough in writing to be caught at it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.families import characters

    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(
        vocab_size=100, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")
    characters().save_pretrained(folder)
    return folder


def test_a_full_disk(large, writer, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode  # fmt: skip
    before = Checkpoint(large).hash()
    try:
        status, err = writer(large, disk / "out", 0 if mounted else 9_000_000)[1]()
        assert os.waitstatus_to_exitcode(status) == 1
        assert ("No space left on device" if mounted else "File too large") in err.splitlines()[-1]
        assert nothing_left(disk, ())
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    assert Checkpoint(large).hash() == before


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_at_any_moment(large, writer, tmp_path, blow):
    before = Checkpoint(large).hash()
    caught = 0
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        pid, end = writer(large, out)
        begun = str(tmp_path / f".out{attempt}.partial-*" / "*.safetensors")
        while not out.exists() and not glob.glob(
            begun
        ):  # a folder may go while it is looked through, which pathlib's glob minds
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.2) if attempt else 0.0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, blow)
        ended, err = end()
        status = os.waitstatus_to_exitcode(ended)
        if out.exists():  # it was faster: then the model is whole
            assert Checkpoint(out).hash() != before
            load_module(out, "auto")
            continue
        caught += 1
        assert status == (-signal.SIGKILL if blow == signal.SIGKILL else 130), err
        left = [path.name for path in tmp_path.glob(f".out{attempt}.partial-*")]
        assert len(left) == (blow == signal.SIGKILL)
        if left and caught == 1:
            write(apply(Scale(0.5), Checkpoint(large), "0.attn.q"), out)
            assert not any(tmp_path.glob(f".out{attempt}.partial-*"))
    assert caught, "the writer was never caught at it"
    assert Checkpoint(large).hash() == before
