"""Rows are the streams of the module itself, whatever the batch; there is no padding among them."""

import pytest
import torch

from probes.activations import Activations, collect
from surgery.model import Model
from surgery.sites import Site
from tests.families import FAMILIES, tiny

TEXTS = [f"<think>{'ab' * (3 * i % 7)}</think>{i}" for i in range(8)]


def setup(family):
    model = Model(*tiny(family))
    return model, [model.transcript("q" * (1 + i % 3), text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streams_of_the_module(family):
    model, runs = setup(family)
    acts = collect(model, runs, at="*.resid", over="all", batch_size=3)
    assert [str(s) for s in acts.sites] == ["0.resid", "1.resid", "2.resid", "3.resid"]
    assert len(acts) == sum(len(t.ids) for t in runs)
    for i, t in enumerate(runs):
        mine = acts.where(acts.transcript == i)
        assert mine.position.tolist() == list(range(len(t.ids)))
        last = []
        norm = model.module.get_submodule(model.anatomy.hook_point(Site(3, "resid")))
        hook = norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
        ids = torch.tensor([t.ids])
        with torch.no_grad():
            states = model.module(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            ).hidden_states
        hook.remove()
        for layer in range(3):
            torch.testing.assert_close(mine[f"{layer}.resid"], states[layer][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine["3.resid"], last[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt-neox"])
def test_between_attention_and_mlp(family):
    """The next stream less what the MLP adds: the module's own last branch, hooked."""
    model, runs = setup(family)
    acts = collect(model, runs[:1], at=["1.mid", "2.resid"], over="all")
    block = model.module.get_submodule(f"{model.anatomy.blocks}.1")
    branch = "post_feedforward_layernorm" if family in ("gemma2", "gemma3", "olmo2") else "mlp"
    added = []
    hook = block.get_submodule(branch).register_forward_hook(lambda _, args, out: added.append(out))
    ids = torch.tensor([runs[0].ids])
    with torch.no_grad():
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    hook.remove()
    torch.testing.assert_close(acts["1.mid"], acts["2.resid"] - added[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_eight_is_eight_of_one(family):
    model, runs = setup(family)
    together, alone = (collect(model, runs, over=("thinking", "answer"), batch_size=n) for n in (8, 1))
    assert torch.equal(together.transcript, alone.transcript)
    assert torch.equal(together.position, alone.position)
    for site in together.sites:
        torch.testing.assert_close(together[site], alone[site], rtol=1e-4, atol=1e-4)
    rows = [(i, p) for i, t in enumerate(runs) for name in ("thinking", "answer") for p in range(*t.spans[name])]
    assert list(zip(together.transcript.tolist(), together.position.tolist(), strict=True)) == rows


def test_the_pass_stops_at_the_last_site():
    model, runs = setup("llama")
    called = []
    hooks = [b.register_forward_hook(lambda *_, i=i: called.append(i)) for i, b in enumerate(model.module.model.layers)]
    collect(model, runs[:1], at=["0.resid", "1.resid"])
    assert called == [0]
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks for m in model.module.modules())


def test_save_and_load(tmp_path):
    model, runs = setup("llama")
    acts = collect(model, runs, at=["*.resid", "1.mid"], over=("thinking", "answer"))
    acts.save(tmp_path / "a.safetensors")
    again = Activations.load(tmp_path / "a.safetensors")
    assert again.over == ("thinking", "answer")
    assert again.sites == sorted(acts.sites)
    assert all(torch.equal(again[s], acts[s]) for s in acts.sites)
    assert torch.equal(again.position, acts.position)
    assert torch.equal(again.transcript, acts.transcript)


def test_what_cannot_be_collected():
    model, runs = setup("llama")
    with pytest.raises(ValueError, match=r"'\*\.attn\.o' matches no site.*have: mid, resid"):
        collect(model, runs, at="*.attn.o")
    with pytest.raises(ValueError, match=r"'1\.resid\.h0' matches no site"):
        collect(model, runs, at="1.resid.h0")
    with pytest.raises(ValueError, match=r"None of the 8 transcripts has a span poem; they have all, answer"):
        collect(model, runs, over="poem")
    acts = collect(model, runs)
    for wrong in ("*.resid", "7.resid"):
        with pytest.raises(ValueError):
            acts[wrong]
