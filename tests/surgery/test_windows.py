"""Windows show the very tensors of the model, both ways, and leave the model as it was."""

import copy
import logging
import subprocess
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from surgery.checkpoint import Checkpoint
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import apply
from surgery.windows import hub_id, names, site_of, twin
from tests.families import FAMILIES, SPARSE_FAMILIES, VLM_FAMILIES, characters, save_tiny_vlm, tiny, tiny_vlm

IDS = torch.arange(4, 24)[None]
MASK = torch.ones_like(IDS)


def logits(model):
    with torch.no_grad():
        return model.module(input_ids=IDS, attention_mask=MASK).logits


def through_bridge(bridge):
    with torch.no_grad():
        return bridge(IDS, attention_mask=MASK)


def through_nnsight(window):
    with window.trace(input_ids=IDS, attention_mask=MASK):
        seen = window.output.logits.save()
    return seen.detach()


OPEN = {"bridge": (Model.bridge, through_bridge), "nnsight": (Model.nnsight, through_nnsight)}
BOTH = pytest.mark.parametrize("kind", OPEN)


def shaken(_, weight):
    """An edit that no norm takes back, as it would a factor."""
    return weight + 0.3 * torch.sin(torch.arange(weight.numel())).view(weight.shape)


def state(model):
    """What opening a window must not touch."""
    module = model.module
    return {
        "modules": [(name, type(m), m.training, vars(m).get("forward")) for name, m in module.named_modules()],
        "hooks": [len(d) for m in module.modules() for n, d in vars(m).items() if "hooks" in n and isinstance(d, dict)],
        "parameters": [
            (name, id(p), p.data_ptr(), p._version, p.requires_grad) for name, p in module.named_parameters()
        ],
        "buffers": [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()],
        "config": module.config.to_dict(),
        "attention": module.config._attn_implementation,
        "generation": module.generation_config.to_dict(),
        "tokenizer": (len(model.tokenizer), model.tokenizer.padding_side, str(model.tokenizer.special_tokens_map)),
        "encoded": model.tokenizer("ab c")["input_ids"],
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
    }


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_show_both_ways_and_the_model_is_as_it_was(family, kind):
    """In place, swapped in by `installed`, and made through the window: the logits of one are always those of the other."""
    model = Model(*tiny(family))
    before, untouched = logits(model), state(model)
    make, run = OPEN[kind]
    window = make(model)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(run(window), before, **close)
    assert state(model) == untouched
    for pattern in ("*.attn.q.h1", "*.attn.k", "*.attn.v.h0", "*.mlp.up", "*.attn.o.h2", "embed"):
        with model.installed(apply(shaken, model.weights, pattern)):
            inside = logits(model)
            assert not torch.allclose(inside, before, **close)
            torch.testing.assert_close(run(window), inside, **close)
    torch.testing.assert_close(run(window), before, **close)
    weights = {id(p): p for name, p in model.module.named_parameters() if "bias" not in name}
    with torch.no_grad():
        for p in weights.values():
            p.mul_(0.9)
    moved = logits(model)
    assert not torch.allclose(moved, before, **close)
    torch.testing.assert_close(run(window), moved, **close)
    theirs = [p for p in window.parameters() if id(p) in weights]
    assert len(theirs) == len(weights)
    with torch.no_grad():
        for p in theirs:
            p.mul_(1 / 0.9)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@BOTH
def test_logits_are_bit_equal_afterwards_and_after_an_exception(kind, monkeypatch):
    model = Model(*tiny("gemma2"))
    before, untouched = logits(model), state(model)
    make, run = OPEN[kind]
    run(make(model))
    assert torch.equal(logits(model), before)
    monkeypatch.setattr(type(model.tokenizer), "__deepcopy__", lambda *_: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        make(model)
    monkeypatch.undo()
    assert state(model) == untouched
    assert torch.equal(logits(model), before)


@BOTH
def test_settings_of_logging_and_warnings_are_given_back(kind, capfd):
    logger = logging.getLogger("transformers")
    level, filters = logger.level, list(warnings.filters)
    OPEN[kind][0](Model(*tiny("llama")))
    assert logger.level == level
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")


def test_the_bridge_is_eager_whatever_the_model_is():
    """It computes attention itself, from the masks that an implementation gets: flex attention's are no tensors."""
    model = Model(*tiny("mistral"))
    before = logits(model)
    model.module.set_attn_implementation("flex_attention")
    torch.testing.assert_close(through_bridge(model.bridge()), before, rtol=1e-4, atol=1e-4)
    assert model.module.config._attn_implementation == "flex_attention"


@BOTH
def test_a_hook_on_the_model_does_not_act_in_a_window(kind):
    model = Model(*tiny("llama"))
    plain = logits(model)
    with torch.no_grad():
        model.module(
            input_ids=IDS, attention_mask=MASK, output_hidden_states=True
        )  # transformers keeps hooks of its own
    hook = model.anatomy.tap(Site(1, "resid")).attach(model.module, lambda x: 2 * x)
    make, run = OPEN[kind]
    window = make(model)
    assert not torch.allclose(logits(model), plain)
    torch.testing.assert_close(run(window), plain, rtol=1e-4, atol=1e-4)
    hook.remove()


def test_a_twin_has_the_tensors_and_nothing_else_in_common():
    module, _ = tiny("gpt2")
    with torch.no_grad():
        states = module(input_ids=IDS, output_hidden_states=True).hidden_states
    handle = module.transformer.h[0].register_forward_hook(lambda *_: None)
    double = twin(module)
    assert all(a is b for a, b in zip(module.parameters(), double.parameters(), strict=True))
    assert all(a is b for a, b in zip(module.buffers(), double.buffers(), strict=True))
    assert not {id(m) for m in module.modules()} & {id(m) for m in double.modules()}
    assert double.config is not module.config
    assert double.transformer.h[0].attn.config is double.config
    assert double.lm_head.weight is double.transformer.wte.weight
    with torch.no_grad():
        again = double(input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))
    handle.remove()
    compiled = copy.copy(module)
    compiled.transformer.h[0] = torch.compile(module.transformer.h[0])
    with pytest.raises(ValueError, match=r"1 module\(s\) of this model are compiled.*Open the window first"):
        twin(compiled)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_a_hook_of_the_bridge_and_leads_back(family):
    model = Model(*tiny(family))
    a, bridge = model.anatomy, model.bridge()
    table = names(a)
    assert list(table.index) == [str(s) for s in a.activation_sites()]
    hooks = bridge.hook_dict
    for text, row in table.iterrows():
        site = Site.parse(text)
        assert hooks[row.transformer_lens] is hooks[row.bridge], row.bridge
        assert hooks[row.bridge].name == row.bridge
        for name in (text, row.transformer_lens, row.bridge, f"{row.module}.{row.side}"):
            assert site_of(name, a) == site
    for layer in range(a.n_layers):
        for name in (
            f"blocks.{layer}.hook_resid_post",
            f"blocks.{layer}.hook_out",
            f"resid_post.{layer}",
            f"{a.blocks}.{layer}.output",
        ):
            assert site_of(name, a) == Site(layer + 1, "resid")
    assert site_of("resid_pre.1", a) == Site(1, "resid")
    assert site_of("z.2", a) == Site(2, "attn.z")
    with pytest.raises(
        ValueError,
        match=r"'blocks\.1\.hook_resid_pos' names no activation site.*Near it are blocks\.1\.hook_resid_post",
    ):
        site_of("blocks.1.hook_resid_pos", a)
    with pytest.raises(ValueError, match="names no activation site"):
        site_of("blocks.3.hook_resid_pre", a)  # there are three layers


def test_names_of_some_and_from_a_file(tmp_path):
    model = Model(*tiny("gpt2"))
    some = names(model.anatomy, ["1.attn.z.h3", "3.resid"])
    assert list(some.index) == ["1.attn.z.h3", "3.resid"]
    assert list(some.width) == [8, 32]
    assert list(some.module) == ["transformer.h.1.attn.c_proj", "transformer.ln_f"]
    assert list(some.transformer_lens) == ["blocks.1.attn.hook_z", "blocks.2.hook_resid_post"]
    with pytest.raises(ValueError, match=r"1\.mid\.h0 does not exist"):
        names(model.anatomy, "1.mid.h0")
    for layout in ("old", "new"):  # what the file calls the modules does not matter
        file = Checkpoint(save_tiny_vlm("llava", tmp_path / layout, layout))
        assert names(file.anatomy).equals(names(Model(tiny_vlm("llava"), characters()).anatomy))


@pytest.mark.filterwarnings("ignore:.*does not support fold_ln")
@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE_FAMILIES])
def test_compatibility_mode_does_not_reach_the_model(family):
    model = Model(*tiny(family))
    before = logits(model)
    bridge = model.bridge()
    if family in SPARSE_FAMILIES:
        with pytest.raises(RuntimeError, match="does not support compatibility mode"):
            bridge.enable_compatibility_mode()
    else:
        bridge.enable_compatibility_mode(disable_warnings=True)
        through_bridge(bridge)
    assert torch.equal(logits(model), before)


WITHOUT_ADAPTER = {"qwen2-vl", "smolvlm"}
NEEDS_TORCHVISION = {"qwen2.5-vl"}


@BOTH
@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_the_language_tower_of_a_vision_language_model(family, kind, monkeypatch, capfd):
    """Opening installs nothing: no process is started."""
    monkeypatch.setattr(subprocess, "Popen", None)
    model = Model(tiny_vlm(family), characters())
    make, run = OPEN[kind]
    if kind == "bridge" and family in WITHOUT_ADAPTER:
        with pytest.raises(ValueError, match=r"TransformerLens has no adapter for .*model\.nnsight\(\) opens any"):
            make(model)
        return
    if kind == "bridge" and family in NEEDS_TORCHVISION and find_spec("torchvision") is None:
        with pytest.raises(ImportError, match="needs the optional torchvision"):
            make(model)
        return
    window = make(model)
    assert capfd.readouterr() == ("", "")
    with model.installed(apply(shaken, model.weights, "1.attn.q")):
        torch.testing.assert_close(run(window), logits(model), rtol=1e-4, atol=1e-4)
    if kind == "bridge":
        for text, row in names(model.anatomy).iterrows():
            assert window.hook_dict[row.transformer_lens].name == row.bridge, text


def test_nnsight_may_have_been_imported_before(monkeypatch):
    import nnsight  # noqa: F401

    monkeypatch.delitem(sys.modules, "anyio.streams.tls", raising=False)  # to import it now would raise
    through_nnsight(Model(*tiny("llama")).nnsight())


def test_where_the_library_is_not_installed(monkeypatch):
    model = Model(*tiny("llama"))
    for package in ("nnsight", "transformer_lens.factories.architecture_adapter_factory"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"nnsight cannot be imported.*pip install 'model-surgery\[interp\]'"):
        model.nnsight()
    with pytest.raises(ImportError, match=r"transformer-lens cannot be imported.*pip install"):
        model.bridge()


def test_where_the_library_is_too_old(monkeypatch):
    """It is installed, so nothing says that it is not."""
    model = Model(*tiny("llama"))
    monkeypatch.setitem(sys.modules, "nnsight", types.ModuleType("nnsight"))
    with pytest.raises(ImportError, match=r"cannot import name 'TransformersModel'.*pip install"):
        model.nnsight()


def test_the_hub_id(tmp_path):
    model = Model(*tiny("llama"))
    config = model.module.config
    for path, found in {
        "": None,
        str(tmp_path): None,
        "/home/me/hub/models--owner--a-model.v2/snapshots/abc123": "owner/a-model.v2",
        "owner/a-model": "owner/a-model",
        "surgery/sites.py": None,  # a folder or file that is here
    }.items():
        config._name_or_path = path
        assert hub_id(model) == found, path


OFFLINE = """
import socket, subprocess, torch
def refuse(*_, **__): raise OSError("not here")
socket.socket.connect = socket.getaddrinfo = subprocess.Popen.__init__ = refuse
from surgery.checkpoint import Checkpoint
from surgery.model import Model
from tests.families import tiny
model = Model(*tiny("qwen3"))
bridge, window = model.bridge(), model.nnsight()
ids = torch.arange(4, 24)[None]
with window.trace(input_ids=ids):
    seen = window.output.logits.save()
with torch.no_grad():
    assert torch.allclose(bridge(ids), seen, atol=1e-4)
assert bridge("ab c").shape[-1] == 100
import anyio._backends._asyncio, anyio.streams.tls, anyio.streams.file  # what an HTTP client imports when it is first used
"""


def test_without_a_network_and_without_a_word():
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=120, cwd=root, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
