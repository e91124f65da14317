"""The proof finds what went wrong between computing and loading, and names it; what is right it lets pass."""

import json
import re
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery.proof as proof
import surgery.writing as writing
from surgery import Checkpoint, Scale, apply, write
from surgery.checkpoint import load_module
from surgery.proof import VerificationError, loops_at_end
from surgery.tensorfile import TensorFile, save_tensors
from tests.families import FAMILIES, SPARSE_FAMILIES, save_tiny


def planted(fault, monkeypatch):
    """`fault(folder)` happens after the files are written and before they are proved, as a bug of the writer's would."""
    real = writing._copy_side_files

    def sabotage(source, target, dtype):
        real(source, target, dtype)
        fault(target)

    monkeypatch.setattr(writing, "_copy_side_files", sabotage)


def tensors_of(path):
    file = TensorFile(path)
    return {name: file[name].clone() for name in file.tensors}


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = tensors_of(path)
    change(tensors)
    save_tensors(path, tensors, {"format": "pt"})


def config(**said):
    def fault(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **said}))

    return fault


def rename(tensors):
    tensors["model.layers.1.mlp.upp_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def drop_layer(tensors):
    for name in [n for n in tensors if n.startswith("model.layers.2.")]:
        del tensors[name]


def infinite(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")


def template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def lost(name):
    return lambda folder: (folder / name).unlink()


NAMED_TEMPLATE = "additional_chat_templates/tools.jinja"
FAULTS = {
    "a lost template": (lost("chat_template.jinja"), "chat_template.jinja is missing: the source has it"),
    "a lost tokenizer": (lost("tokenizer.json"), "tokenizer.json is missing"),
    "a lost processor": (lost("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "a lost named template": (lost(NAMED_TEMPLATE), f"{NAMED_TEMPLATE} is missing"),
    "another named template": (lambda f: (f / NAMED_TEMPLATE).write_text("x"), f"{NAMED_TEMPLATE} differs"),
    "another chat template": (template, "chat_template.jinja differs"),
    "an untied head": (config(tie_word_embeddings=False), "config.json differs"),
    "another rope": (config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}), "config.json differs"),
    "a renamed tensor": (
        lambda f: rewrite(f, rename),
        "written model lacks model.layers.1.mlp.up_proj.weight, which was computed",
    ),
    "a tensor too many": (
        lambda f: rewrite(f, lambda tensors: tensors.update({"model.stray": torch.ones(1)})),
        "written model has model.stray, which nobody computed",
    ),
    "a dropped layer": (lambda f: rewrite(f, drop_layer), r"written model lacks model.layers.2.* \(9 such\)"),
    "a damaged configuration": (lambda f: (f / "config.json").write_text("{"), "config.json differs"),
    "a NaN": (lambda f: rewrite(f, infinite), "layers.0.mlp.up_proj.weight as loaded differs"),
}


@pytest.mark.parametrize("offload", [False, True], ids=["whole", "left on disk"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_nothing_is_left(name, offload, tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "model")
    (source / "additional_chat_templates").mkdir()
    (source / NAMED_TEMPLATE).write_text("{{ messages }}")
    (source / "preprocessor_config.json").write_text("{}")
    fault, said = FAULTS[name]
    planted(fault, monkeypatch)
    if offload:
        monkeypatch.setattr(proof, "SHARE", 0)
        said = said.replace("as loaded", "on disk")
    with pytest.raises(VerificationError, match=said) as error:
        write(apply(Scale(0.5), Checkpoint(source), "1.mlp.down"), tmp_path / "out")
    assert ".partial" not in str(error.value)
    assert "ownload" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("offload", [False, True], ids=["whole", "left on disk"])
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_dropped_expert_is_named(family, offload, tmp_path, monkeypatch):
    source = save_tiny(family, tmp_path / "model")
    lost = r"layers\.2\.\w+\.experts\.3\."

    def drop(tensors):
        gone = [name for name in tensors if re.search(lost, name)]
        assert gone
        for name in gone:
            del tensors[name]

    planted(lambda folder: rewrite(folder, drop), monkeypatch)
    if offload:
        monkeypatch.setattr(proof, "SHARE", 0)
    with pytest.raises(VerificationError, match=rf"lacks model\.{lost}"):
        write(apply(Scale(0.5), Checkpoint(source), "1.attn.o"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_fault_of_the_index_is_named(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "model", shards=2)

    def swap(folder):
        path = folder / "model.safetensors.index.json"
        said = json.loads(path.read_text())
        one, other = list(said["weight_map"])[:2]
        said["weight_map"][one], said["weight_map"][other] = said["weight_map"][other], said["weight_map"][one]
        path.write_text(json.dumps(said))

    planted(swap, monkeypatch)
    with pytest.raises(
        VerificationError,
        match=r"written model cannot be read: model-0000\d-of-00002.safetensors contains .* says it is in",
    ):
        write(Checkpoint(source), tmp_path / "out")


def test_a_configuration_that_does_not_load_is_named(tmp_path, monkeypatch):
    """Had the side files not been compared, loading would still have told, and of the written model."""
    source = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(proof, "_side_files", lambda *_: "not looked at")
    for fault, said in (
        (config(num_hidden_layers=4), r"4 layers but lacks 9 of its tensors"),
        (config(vocab_size=90), ""),
    ):
        with monkeypatch.context() as planting:
            planted(fault, planting)
            with pytest.raises(VerificationError, match=rf"written model failed to load: .*{said}") as error:
                write(Checkpoint(source), tmp_path / "out")
        assert ".partial" not in str(error.value)
        assert "ownload" not in str(error.value)


def test_nothing_is_spilled_beside_the_source(tmp_path, monkeypatch):
    """A store of models may be one that nobody writes to. The copy fits into memory here, the source, twice its size, does not."""
    source = Checkpoint(save_tiny("llama", tmp_path / "store" / "model"))
    monkeypatch.setattr(proof, "free_memory", lambda: int(0.75 * source.nbytes / proof.SHARE))
    monkeypatch.setattr(proof, "_greedy", lambda *_: [1] * 8)
    places, real = [], proof.load_module

    def load(folder, dtype, *, offload=None):
        places.extend([offload] if offload else [])
        return real(folder, dtype, offload=offload)

    monkeypatch.setattr(proof, "load_module", load)
    write(source, tmp_path / "out", dtype=torch.bfloat16, loops="report")
    assert [place.parent for place in places] == [tmp_path]


def test_a_configuration_that_only_the_logits_tell_apart(tmp_path, monkeypatch):
    """Had the side files not been compared, the predicted logits would still have told."""
    source = save_tiny("llama", tmp_path / "model")
    planted(config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}), monkeypatch)
    monkeypatch.setattr(proof, "_side_files", lambda *_: "not looked at")
    with pytest.raises(VerificationError, match=r"logits are up to .* from the predicted ones"):
        write(Checkpoint(source), tmp_path / "out")


@pytest.mark.parametrize("offload", [False, True], ids=["whole", "left on disk"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_passes_with_equal_logits(family, tied, offload, tmp_path, monkeypatch):
    source = save_tiny(family, tmp_path / "model", tied=tied, shards=2, dtype=torch.bfloat16)
    if offload:
        monkeypatch.setattr(proof, "SHARE", 0)
    written = write(apply(Scale(0.5), Checkpoint(source), ["*.mlp.down", "*.attn.o.h1"]), tmp_path / "out")
    assert any("probe tokens as predicted (max difference 0)" in check for check in written.checks), written.checks
    with torch.no_grad():
        ids = proof.probe_ids(100)
        one, other = (load_module(tmp_path / name, "auto")(input_ids=ids).logits for name in ("model", "out"))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("ids", "period"),
    [
        ([1, 2, 3, 4] * 4, [1, 2, 3, 4]),
        ([9, 5, 5, 5, 5], [5]),
        ([1, 2, 3] * 3, None),
        ([9, *[1, 2, 3, 4, 5, 6, 7, 8] * 4], [1, 2, 3, 4, 5, 6, 7, 8]),
        (list(range(40)), None),
        ([], None),
    ],
)
def test_a_loop_is_what_repeats_at_the_end(ids, period):
    assert loops_at_end(ids) == period


def test_a_model_that_begins_to_loop_is_refused(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "model", tied=False)
    base = Checkpoint(source)
    silent = apply(
        Scale(0.0), base, ["*.attn.o", "*.mlp.down"]
    )  # what follows depends on the last token alone: a cycle
    said = iter([[1] * 8, list(range(8))] * 3)  # the written model's, then the source's
    monkeypatch.setattr(proof, "_greedy", lambda *_: next(said))
    with pytest.raises(VerificationError, match=r"falls into a loop .* which the source's does not"):
        write(silent, tmp_path / "out", loops="refuse")
    assert not (tmp_path / "out").exists()
    written = write(silent, tmp_path / "out", loops="report")
    assert any("which the source does not fall into" in check for check in written.checks)


def test_a_model_without_attention_and_mlp_does_loop(tmp_path):
    """The same, generated: such a model maps a token to the next, so it must cycle; random weights cycle fast."""
    base = Checkpoint(save_tiny("llama", tmp_path / "model", tied=True))
    silent = apply(Scale(0.0), base, ["*.attn.o", "*.mlp.down"])
    written = write(silent, tmp_path / "out", loops="report")
    assert any("a loop" in check for check in written.checks)


def test_what_may_still_be_taken_is_less_what_is_in_use(tmp_path):
    import psutil

    limits, used = resource.getrlimit(resource.RLIMIT_DATA), psutil.Process().memory_info().data
    room = 300 << 20
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, limits[1]))
    try:
        assert 0 < proof.free_memory() <= room + (8 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    for said, used in (("cache 700\nrss 20\ntotal_rss 30\n", 30), ("anon 40\nfile 900\n", 40)):
        (tmp_path / "memory.stat").write_text(said)
        assert proof._in_use(tmp_path / "memory.stat") == used


@pytest.mark.parametrize(
    ("line", "home", "limit", "used"),
    [
        ("0::/slürm/job/step/task\n", "", "memory.max", "anon 100\n"),
        ("4:memory:/slürm/job/step/task\n", "memory", "memory.limit_in_bytes", "total_rss 100\n"),
    ],
)
def test_a_limit_of_a_group_further_out_holds_too(tmp_path, line, home, limit, used):
    """A batch system limits a job, and runs its processes in groups within that group which have no limit of their own."""
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text(line, encoding="utf-8")
    job = groups / home / "slürm" / "job"
    (job / "step" / "task").mkdir(parents=True)
    for folder, said in ((job, "5000\n"), (job / "step", "max\n"), (job / "step" / "task", "max\n")):
        (folder / limit).write_text(said)
        (folder / "memory.stat").write_text(used)
    assert list(proof._groups_leave(groups, own)) == [4900]


def test_a_file_of_several_dtypes_is_written_as_it_is(tmp_path):
    """bf16 weights and fp32 norms: loading makes one dtype of them, the files keep theirs."""
    folder = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = {name: t.float() + 2**-20 if "norm" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    written = write(apply(Scale(0.5), Checkpoint(folder), "*.attn.o"), tmp_path / "out")
    assert any("as read back" in check for check in written.checks)
    for name, t in load_file(tmp_path / "out" / "model.safetensors").items():
        assert t.dtype == tensors[name].dtype
        assert torch.equal(t, tensors[name] * (0.5 if "o_proj" in name else 1))
