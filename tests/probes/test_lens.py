"""At the last site the lens shows the model's own logits; before it, the module's own norm and head say what it must."""

import math
from dataclasses import replace

import pytest
import torch

import probes.lens
from probes.lens import Lens, lens, unembed
from surgery.model import Model
from tests.families import FAMILIES, tiny

TEXTS = [f"<think>{'ab' * (1 + 3 * i % 7)}</think>{i}" for i in range(6)]


def setup(family, **options):
    model = Model(*tiny(family, **options))
    return model, [model.transcript("q" * (1 + i % 3), text) for i, text in enumerate(TEXTS)]


def logits_of(model, t, **options):
    ids = torch.tensor([t.ids])
    with torch.no_grad():
        return model.module(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_last_stream_has_the_models_own_logits(family, tied):
    model, runs = setup(family, tied=tied)
    found = lens(model, runs, at=["1.resid", "3.resid"], over="all", top=3, batch_size=4)
    assert float(found.kl[:, 1].abs().max()) < 1e-5
    assert bool((found.agrees[:, 1] == 1).all())
    assert float(found.kl[:, 0].max()) > 0.1
    for i, t in enumerate(runs):
        mine = found.transcript == i
        assert found.position[mine].tolist() == list(range(len(t.ids)))
        assert found.token[mine].tolist() == list(t.ids)
        logp = logits_of(model, t).logits[0].log_softmax(-1)
        expected = [-float(logp[p, t.ids[p + 1]]) for p in range(len(t.ids) - 1)]
        assert found.nll[mine, 1][:-1].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert math.isnan(found.nll[mine, 1][-1])
        best = logp.topk(3)
        assert torch.equal(found.top[mine, 1], best.indices)
        torch.testing.assert_close(found.probability[mine, 1], best.values.exp(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_earlier_stream_goes_through_the_modules_own_norm_and_head(family):
    model, runs = setup(family)
    t = runs[3]
    found = lens(model, [t], at="*.resid", over="thinking")
    out = logits_of(model, t, output_hidden_states=True)
    final = out.logits[0].log_softmax(-1)
    norm = {"gpt2": "transformer.ln_f", "gpt-neox": "gpt_neox.final_layer_norm"}.get(family, "model.norm")
    rows = list(range(*t.spans["thinking"]))
    for layer in range(3):
        with torch.no_grad():
            logits = model.module.get_output_embeddings()(model.module.get_submodule(norm)(out.hidden_states[layer][0]))
            if family == "gemma2":
                logits = 6.0 * torch.tanh(logits / 6.0)
        logp = logits.log_softmax(-1)[rows]
        kl = (final[rows].exp() * (final[rows] - logp)).sum(-1)
        torch.testing.assert_close(found.kl[:, layer], kl, rtol=1e-3, atol=1e-4)
        expected = torch.stack([-logp[k, t.ids[p + 1]] for k, p in enumerate(rows)])
        torch.testing.assert_close(found.nll[:, layer], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [100, 300, 1 << 24])
def test_neither_batches_nor_pieces_matter(rows, monkeypatch):
    monkeypatch.setattr(probes.lens, "_ROWS", rows)
    model, runs = setup("qwen2")
    found, alone = lens(model, runs, batch_size=6), lens(model, runs, batch_size=1)
    for name in ("transcript", "position", "token", "following", "final", "top"):
        assert torch.equal(getattr(found, name), getattr(alone, name))
    torch.testing.assert_close(found.kl, alone.kl, rtol=1e-4, atol=1e-5)
    rows = [(i, p) for i, t in enumerate(runs) for p in range(*t.spans["completion"])]
    assert list(zip(found.transcript.tolist(), found.position.tolist(), strict=True)) == rows


def test_in_half_precision_too():
    model, runs = setup("gemma2", dtype=torch.bfloat16)
    found = lens(model, runs, at="3.resid", over="all")
    assert float(found.kl.abs().max()) < 1e-2
    assert unembed(model, torch.randn(2, 32)).dtype == torch.float32


def test_committed():
    final = torch.tensor([5, 5, 5, 5])
    top = torch.tensor([[1, 2, 5], [5, 5, 5], [5, 1, 5], [5, 5, 1]])[:, :, None]
    nothing = torch.zeros(4, 3)
    made = Lens((), *[torch.zeros(4).long()] * 4, nothing, nothing, top, nothing[:, :, None], final, {}, (), ())
    object.__setattr__(made, "sites", ("a", "b", "c"))
    assert made.committed.tolist() == [2, 0, 2, 3]


def test_tables_and_files(tmp_path):
    model, runs = setup("llama")
    found = lens(model, runs, over=("thinking", "answer"))
    table = found.frame(draws=100)
    assert set(table["measure"]) == {"kl", "nll", "agreement"}
    assert list(table.columns) == ["layer", "site", "measure", "value", "low", "high", "n"]
    last = table[table["site"] == "3.resid"].set_index("measure")["value"]
    assert last["agreement"] == 1
    assert last["kl"] == pytest.approx(0, abs=1e-5)
    whole = lens(model, runs, at="1.resid", over="completion")  # with the last token, after which nothing comes
    values = whole.frame(draws=10).set_index("measure")["value"]
    for measure, rows in (("kl", whole.kl), ("nll", whole.nll)):
        each = [float(rows[whole.transcript == i].nanmean()) for i in range(len(runs))]
        assert values[measure] == pytest.approx(sum(each) / len(each), rel=1e-5)
    ends = [
        replace(t, spans={**t.spans, "end": (len(t.ids) - (3 if i else 1), len(t.ids))}) for i, t in enumerate(runs)
    ]
    table_of_ends = lens(model, ends, at="1.resid", over="end").frame(draws=10).set_index("measure")
    assert math.isfinite(table_of_ends.loc["nll", "value"])  # of the first nothing follows its only token
    t = runs[2]
    words = found.table(2)
    assert "".join(words[words["site"] == "0.resid"]["token"]) == "".join(
        model.tokenizer.decode([t.ids[p]]) for name in ("thinking", "answer") for p in range(*t.spans[name])
    )
    found.save(tmp_path / "l.safetensors")
    again = Lens.load(tmp_path / "l.safetensors")
    assert again.frame(draws=100).equals(table)
    assert again.table(2).equals(words)


def test_what_the_lens_cannot_read(unchecked):
    model, runs = setup("llama")
    with pytest.raises(ValueError, match=r"0\.attn\.out is no stream"):
        lens(model, runs, at="*.attn.out")
    with pytest.raises(ValueError, match="matches no site"):
        lens(model, runs, at="9.resid")
    with pytest.raises(ValueError, match="top=0"):
        lens(model, runs, top=0)
    with pytest.raises(ValueError, match="has a span thinking"):
        lens(model, [model.transcript("q", "a")], over="thinking")
    with pytest.raises(ValueError, match="There is no transcript 9"):
        lens(model, runs).table(9)


def test_a_family_whose_logits_are_made_otherwise():
    model, runs = setup("llama")
    hook = model.module.lm_head.register_forward_hook(lambda *_: None)
    scaled = model.module.register_forward_hook(lambda _, __, out: setattr(out, "logits", 2 * out.logits))
    with pytest.raises(ValueError, match="logits of this llama are not its final norm and head alone"):
        lens(model, runs)
    scaled.remove()
    hook.remove()
    assert unembed(model, torch.zeros(2, 32)).shape == (2, 100)
