"""A vision-language model: its language tower has a language model's own names, in every layout, on disk and live."""

import json

import pytest
import torch

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint
from surgery.model import Model
from surgery.sites import Site
from surgery.writing import write
from tests.families import VLM_FAMILIES, save_tiny_vlm, tiny_language, tiny_vlm

ONE_LAYOUT = ("idefics3", "smolvlm")
LAYOUTS = [(f, layout) for f in VLM_FAMILIES for layout in ("old", "new", "module")[: 1 if f in ONE_LAYOUT else 3]]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_the_tower_has_the_plain_names(family, layout, tied, tmp_path):
    host = Checkpoint(save_tiny_vlm(family, tmp_path / "host", layout, tied=tied))
    live = Model.load(tmp_path / "host")
    module, _ = tiny_language(family, tied=tied)
    plain = Anatomy.of(module.config, [n for n, _ in module.named_parameters()])
    for anatomy in (host.anatomy, live.anatomy):
        assert [s for s in anatomy.places if not s.is_unnamed] == list(plain.places)
        assert anatomy.ties == plain.ties
        assert anatomy.linear_sites() == plain.linear_sites()
        assert (anatomy.n_layers, anatomy.n_heads, anatomy.n_kv_heads, anatomy.head_dim) == (3, 4, 2, plain.head_dim)
        assert any(s.is_unnamed for s in anatomy.places)
    assert set(host) == set(live.weights)  # by site, the file is the module, whatever the file calls it
    assert all(torch.equal(host[s], live.weights[s]) for s in host)
    assert {p.name for p in host.anatomy.places.values()} == set(host.tensors)
    assert len(host) == len(host.tensors)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_check_passes_on_every_tower(family, tied):
    module = tiny_vlm(family, tied=tied)
    anatomy = Anatomy.of(module.config, [n for n, _ in module.named_parameters()])
    before = {n: p.clone() for n, p in module.named_parameters()}
    anatomy.check(module)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_check_finds_a_tower_mistaken():
    module = tiny_vlm("llava")
    anatomy = Anatomy.of(module.config, [n for n, _ in module.named_parameters()])
    wrong = {**anatomy.places, Site.unnamed("beside"): anatomy.places[Site(1, "mlp.down")]}
    object.__setattr__(anatomy, "places", wrong)
    with pytest.raises(
        RuntimeError, match=r"file:beside \(stored as .*1\.mlp\.down.*\) was perturbed and the logits of a text moved"
    ):
        anatomy.check(module)


def test_a_live_vision_language_model_is_written_whole(tmp_path):
    """What moved beside the language tower too, under the file's own names."""
    host = Checkpoint(save_tiny_vlm("llava", tmp_path / "host", "old"))
    live = Model.load(host.folder)
    with torch.no_grad():
        for parameter in live.module.parameters():
            parameter.mul_(1.5)
    write(live.weights, tmp_path / "moved")
    moved = Checkpoint(tmp_path / "moved")
    assert list(moved.tensors) == list(host.tensors)
    assert all(torch.equal(moved.stored(n), 1.5 * host.stored(n)) for n in host.tensors)


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_a_config_as_the_hub_has_it(family, tmp_path):
    """Flat, the language model's settings beside the rest: as these families were first published."""
    folder = save_tiny_vlm(family, tmp_path / "host", "old", tied=False)
    nested = Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    flat = Checkpoint(folder)
    assert list(flat) == list(nested)
    assert flat.anatomy.n_kv_heads == 2
    assert set(Model.load(folder).weights) == set(flat)


def test_a_family_without_a_table(tmp_path):
    folder = save_tiny_vlm("llava", tmp_path / "host")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vipllava"}))
    with pytest.raises(
        ValueError,
        match=r"host is a 'vipllava' model, a family without a table\. Known: gemma3, idefics3, llava, .*added as data",
    ):
        Checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "opt"}}))
    with pytest.raises(ValueError, match=r"host is a 'opt' model, a family without a table\. Known: gemma2"):
        Checkpoint(folder)
