"""Parts sum to the whole, scores by linearity are those of vectors made one by one, and a silenced head takes away what it was said to write."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.activations import collect
from probes.attention import attention
from probes.attribution import (
    Ablations,
    Contributions,
    ablated,
    ablations,
    contributions,
    logit_contributions,
    writers_of,
)
from probes.lens import lens, unembed
from probes.results import interval
from probes.steering import steered
from surgery.edits import RemoveDirection, Scale
from surgery.model import Model, installed
from surgery.sites import Site
from surgery.weights import apply
from tests.families import FAMILIES, HEADS, LAYERS, SPARSE_FAMILIES, VLM_FAMILIES, characters, tiny, tiny_vlm
from tests.oracles.attribution import head_outputs, normed_head_outputs, thinkedit_scores

TEXTS = [f"<think>{'ab' * (1 + 3 * i % 7)}</think>{i}" for i in range(6)]
VLMS = tuple(f for f in VLM_FAMILIES if f not in FAMILIES)
POST_NORM = ("gemma2", "gemma3", "olmo2")
SERIAL = tuple(f for f in FAMILIES if f != "gpt-neox")  # whose attention and MLP do not read the same stream


def setup(family, **options):
    model = Model(tiny_vlm(family), characters()) if family in VLMS else Model(*tiny(family, **options))
    return model, [model.transcript("q" * (1 + i % 3), text) for i, text in enumerate(TEXTS)]


def direction(seed=0, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def total(found, kind):
    table = found.frame(draws=2)
    return float(table[table["kind"] == kind]["score"].sum())


def per_transcript(model, runs, site, vector, over="thinking"):
    acts = collect(model, runs, at=site, over=over)
    along = acts[site] @ vector / vector.norm()
    return torch.stack([along[acts.transcript == i].mean() for i in range(len(runs))])


@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE_FAMILIES, *VLMS])
@pytest.mark.parametrize("at", ["3.resid", "2.resid", "1.mid"])
def test_the_parts_sum_to_the_stream(family, at):
    if family == "gpt-neox" and at == "1.mid":
        pytest.skip("attention and MLP read the same stream: there is none between them")
    model, runs = setup(family)
    u = direction()
    found = contributions(model, u, runs, at=at)
    assert total(found, "stream") == pytest.approx(
        total(found, "embed") + total(found, "attention") + total(found, "mlp"), rel=1e-4, abs=1e-4
    )
    torch.testing.assert_close(found.scores[:, -1].float(), per_transcript(model, runs, at, u), rtol=1e-4, atol=1e-4)
    layers = {"3.resid": 3, "2.resid": 2, "1.mid": 2}[at]
    assert len(found.heads.sites) == layers * HEADS
    for layer in range(layers):
        mine = [i for i, s in enumerate(found.sites) if s.layer == layer and s.part in ("attn.o", "attn.o.bias")]
        whole = found.scores[:, found.sites.index(Site(layer, "attn.out"))]
        torch.testing.assert_close(found.scores[:, mine].sum(1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_vectors_made_one_by_one(family):
    """Gains and epsilons as the family's own module code has them."""
    model, runs = setup(family)
    u = direction(1)
    found = writers_of(model, u, runs, at="3.resid")
    acts = collect(model, runs, at="*.attn.z", over="thinking")
    for layer in range(LAYERS):
        W = model.weights[f"{layer}.attn.o"]
        gain = epsilon = None
        if family in POST_NORM:
            raw = model.weights[f"{layer}.attn.out_norm"]
            gain = raw if family == "olmo2" else 1 + raw
            epsilon = model.module.config.rms_norm_eps
        for i in range(len(runs)):
            z = acts.where(acts.transcript == i)[f"{layer}.attn.z"]
            made = head_outputs(z, W, HEADS) if gain is None else normed_head_outputs(z, W, HEADS, gain, epsilon)
            expected = made.mean(0) @ (u / u.norm()).double()
            columns = [found.sites.index(Site(layer, "attn.o", h)) for h in range(HEADS)]
            torch.testing.assert_close(found.scores[i, columns], expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_scored_in_single():
    """Activations as bf16 has them, and all that is made of them in fp32."""
    model, runs = setup("llama")
    model.module.bfloat16()
    u = direction(1)
    found = contributions(model, u, runs)
    before = per_transcript(model, runs, "3.resid", u)
    torch.testing.assert_close(found.scores[:, -1].float(), before, rtol=1e-5, atol=1e-5)
    z = collect(model, runs, at="1.attn.z", over="thinking")
    made = head_outputs(z["1.attn.z"], model.weights["1.attn.o"].float(), HEADS) @ (u / u.norm()).double()
    columns = [found.sites.index(Site(1, "attn.o", h)) for h in range(HEADS)]
    for i in range(len(runs)):
        expected = made[z.transcript == i].mean(0)
        torch.testing.assert_close(found.scores[i, columns], expected, rtol=1e-4, atol=1e-5)
    silenced = ablations(model, u, runs, "1.attn.o.h2", how="zero").projection[:, 0]
    with ablated(model, "1.attn.o.h2"):
        after = per_transcript(model, runs, "3.resid", u)
    torch.testing.assert_close(silenced.float(), before - after, rtol=1e-4, atol=1e-5)
    alike = [model.transcript("", "1")] * model.anatomy.vocab
    on_average = logit_contributions(model, alike).scores[0]
    one_by_one = logit_contributions(model, alike, against=range(len(alike))).scores.mean(0)
    torch.testing.assert_close(on_average, one_by_one, rtol=1e-5, atol=1e-7)


def test_a_direction_a_layer_ranks_heads_as_thinkedit_does():
    model, runs = setup("llama")
    vectors = {Site(layer, "mid"): direction(layer) for layer in range(LAYERS)}
    found = writers_of(model, vectors, runs)
    assert [str(s) for s in found.at] == [f"{layer}.mid" for layer in range(LAYERS) for _ in range(HEADS)]
    acts = collect(model, runs, at="*.attn.z", over="thinking")
    literal = torch.stack(
        [
            thinkedit_scores(
                [acts.where(acts.transcript == i)[f"{layer}.attn.z"] for i in range(len(runs))],
                model.weights[f"{layer}.attn.o"],
                vectors[Site(layer, "mid")],
                HEADS,
            )
            for layer in range(LAYERS)
        ]
    )
    torch.testing.assert_close(found.matrix(), literal, rtol=1e-4, atol=1e-5)
    ranked = literal.flatten().argsort(descending=True)
    assert [(s.layer, s.head) for s in found.top(count=5)] == [(int(i) // HEADS, int(i) % HEADS) for i in ranked[:5]]
    assert found.top(share=0.25) == found.top(count=3)
    assert found.top(share=0.01) == found.top(count=1)
    assert found.top(share=0.3) == found.top(count=4)  # of 12, to the nearest
    assert (
        len(writers_of(model, vectors[Site(1, "mid")], runs, at="1.mid").top(share=0.25)) == 3
    )  # of all heads, not of those scored


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt-neox"])
def test_a_batch_of_six_is_six_of_one(family):
    model, runs = setup(family)
    together, alone = (
        contributions(model, direction(), runs, over=("prompt", "thinking"), batch_size=n) for n in (6, 1)
    )
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-4, atol=1e-4)
    assert together.transcript == alone.transcript == tuple(range(6))


def test_two_planted_heads_are_found():
    model, runs = setup("qwen3")
    u = direction(2)
    planted = [Site(0, "attn.o", 3), Site(2, "attn.o", 1)]
    silent = apply(RemoveDirection(u), model.weights, at=["*.attn.o", "*.mlp.down", "embed"][:2])

    class Write:
        def __call__(self, site, W):
            return W + torch.outer(u / u.norm(), torch.ones(W.shape[1]))

    with installed(apply(Write(), silent, at=planted), model):
        found = writers_of(model, u, runs, at="3.resid")
    others = [i for i, s in enumerate(found.sites) if s not in planted]
    assert float(found.scores[:, others].abs().max()) < 1e-4
    strongest = found.scores.mean(0).abs().argsort(descending=True)[:2]
    assert {found.sites[i] for i in strongest.tolist()} == set(planted)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt-neox"])
def test_an_edited_head_writes_no_more(family):
    """In the first layer, so that nothing the head reads changes; through a norm's gain too."""
    model, runs = setup(family)
    u = {Site(0, "mid"): direction(4)}
    before, head = writers_of(model, u, runs), Site(0, "attn.o", 1)
    for strength, left in ((1.0, 0.0), (0.5, 0.5)):
        with installed(apply(RemoveDirection(u, strength), model.weights, at=head), model):
            after = writers_of(model, u, runs)
        if strength == 1 or family not in POST_NORM:  # elsewhere the norm's scale has moved a little
            assert after.score(head) == pytest.approx(left * before.score(head), abs=1e-5)
        if family not in POST_NORM:
            others = [i for i, s in enumerate(before.sites) if s != head]
            torch.testing.assert_close(after.scores[:, others], before.scores[:, others], rtol=1e-4, atol=1e-5)


def test_the_pass_ends_at_the_last_site():
    model, runs = setup("llama")
    called = []
    hooks = [b.register_forward_hook(lambda *_, i=i: called.append(i)) for i, b in enumerate(model.module.model.layers)]
    contributions(model, direction(), runs[:1], at="1.mid")
    assert called == [0]
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("against", [None, 7])
def test_logits_are_the_sum_of_what_parts_write(family, against):
    model, runs = setup(family, tied=False)
    others = None if against is None else [against + i for i in range(len(runs))]  # another token for each transcript
    found = logit_contributions(model, runs, over="answer", against=against if family == "gpt2" else others)
    for k, i in enumerate(found.transcript):
        t, other = runs[i], against if family == "gpt2" or others is None else others[i]
        ids = torch.tensor([t.ids])
        with torch.no_grad():
            logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        cap = getattr(model.module.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.atanh(logits / cap)
        rows = [
            logits[p - 1, t.ids[p]] - (logits[p - 1].mean() if other is None else logits[p - 1, other])
            for p in range(*t.spans["answer"])
        ]
        expected = float(torch.stack(rows).mean())
        tolerance = {"rel": 1e-3, "abs": 2e-3} if cap else {"rel": 1e-4, "abs": 1e-4}
        assert float(found.scores[k, -1]) == pytest.approx(expected, **tolerance)
        parts = [j for j, s in enumerate(found.sites[:-1]) if s.part not in ("attn.o", "attn.o.bias")]
        assert float(found.scores[k, parts].sum()) == pytest.approx(float(found.scores[k, -1]), rel=1e-4, abs=1e-4)
    assert set(found.frame(draws=2)["kind"]) >= {"head", "attention", "mlp", "embed", "stream"}


# --- silencing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_silencing_a_head_is_scaling_its_columns_to_nothing(family):
    model, runs = setup(family)
    ids = torch.tensor([runs[1].ids])
    run = lambda: model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # noqa: E731
    with torch.no_grad():
        before = run()
        with ablated(model, ["0.attn.o.h2", "2.attn.o.h0"]):
            silenced = run()
        assert torch.equal(run(), before)
        edited = apply(Scale(0), model.weights, at=["0.attn.o.h2", "2.attn.o.h0"])
        with installed(edited, model):
            torch.testing.assert_close(silenced, run(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(silenced, before)
    with ablated(model, ["0.attn.o.h2", "2.attn.o.h0"]):
        run().sum().backward()
    learnt = model.anatomy.places[Site(2, "attn.o")].take(model.weights.parameter("2.attn.o").grad)
    width = model.anatomy.head_dim
    assert not learnt[:, :width].any()
    assert learnt[:, width:].any()


@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE_FAMILIES, *VLMS])
def test_a_layer_that_is_silenced_adds_nothing(family):
    model, runs = setup(family)

    def streams(*sites):
        acts = collect(model, runs, at=sites, over="all")
        return [acts[site] for site in sites]

    with ablated(model, ["1.attn.out", "1.mlp.out"]):
        before, after = streams("1.resid", "2.resid")
        assert torch.equal(before, after)
    if family in SERIAL:
        with ablated(model, "1.attn.out"):
            assert torch.equal(*streams("1.resid", "1.mid"))
    fixed = torch.linspace(-1, 1, model.anatomy.width(Site(1, "mlp.out")))
    with ablated(model, "1.mlp.out", to={Site(1, "mlp.out"): fixed}):
        assert torch.equal(streams("1.mlp.out")[0], fixed.expand_as(before))
    assert not torch.equal(*streams("1.resid", "2.resid"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silenced_layer_takes_away_what_it_wrote(family):
    """Heads' shares are frozen behind a norm; what a whole layer adds is what comes out of it."""
    model, runs = setup(family)
    at = "2.resid" if family == "gpt-neox" else "1.mid"
    part = Site(1, "mlp.out") if family == "gpt-neox" else Site(1, "attn.out")
    said = contributions(model, direction(), runs, at=at)
    done = ablations(model, direction(), runs, [part, Site(0, "mlp.out")], at=at, how="zero", batch_size=4)
    torch.testing.assert_close(
        done.projection[:, done.sites.index(part)], said.scores[:, said.sites.index(part)], rtol=1e-3, atol=1e-4
    )
    table = done.frame(draws=20)
    assert set(table["site"]) == {str(part), "0.mlp.out"}
    assert table["head"].isna().all()
    mean = ablations(model, direction(), runs, part, at=at, how="mean", batch_size=4)
    assert float(mean.projection.mean()) == pytest.approx(0, abs=1e-4)  # on average nothing was taken away


def test_a_token_in_two_spans_is_one_token():
    model, runs = setup("llama")
    spans = ("thinking", ("thinking", "thinking[:1]"))
    once, twice = (ablations(model, direction(), runs, "1.mlp.out", over=over, how="mean") for over in spans)
    torch.testing.assert_close(twice.projection, once.projection)


@pytest.mark.parametrize("family", [f for f in SERIAL if f not in POST_NORM])
def test_a_silenced_head_takes_away_what_it_wrote(family):
    """Where it writes, before anything has read it, and where no norm stands between."""
    model, runs = setup(family)
    vectors = {Site(layer, "mid"): direction(layer) for layer in range(LAYERS)}
    said = writers_of(model, vectors, runs)
    heads = said.top(count=4)
    done = ablations(model, vectors, runs, heads, how="zero", batch_size=3)
    order = [said.sites.index(s) for s in done.sites]
    torch.testing.assert_close(done.projection, said.scores[:, order], rtol=1e-3, atol=1e-4)
    assert [str(s) for s in done.at] == [f"{s.layer}.mid" for s in done.sites]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox"])
@pytest.mark.parametrize("how", ["zero", "mean"])
def test_the_effect_on_the_next_token(family, how):
    model, runs = setup(family)
    head = Site(1, "attn.o", 2)
    found = ablations(model, direction(), runs, [head], over="completion", how=how, batch_size=4)
    width = model.anatomy.head_dim
    if how == "mean":
        acts = collect(model, runs, at="1.attn.z", over="completion")
        fixed = torch.stack([acts["1.attn.z"][acts.transcript == i].mean(0) for i in range(len(runs))]).mean(0)

    def silence(_, args):
        z = args[0].clone()
        z[..., 2 * width : 3 * width] = 0 if how == "zero" else fixed[2 * width : 3 * width]
        return (z, *args[1:])

    module = model.module.get_submodule(model.anatomy.tap(Site(1, "attn.z")).path)
    for i, t in enumerate(runs):
        ids = torch.tensor([t.ids])

        def run(ids=ids):
            return model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().log_softmax(-1)

        with torch.no_grad():
            was = run()
            hook = module.register_forward_pre_hook(silence)
            now = run()
            hook.remove()
        rows = list(range(*t.spans["completion"]))
        kl = (was[rows].exp() * (was[rows] - now[rows])).sum(-1).mean()
        rise = torch.stack([was[p, t.ids[p + 1]] - now[p, t.ids[p + 1]] for p in rows if p + 1 < len(t.ids)]).mean()
        assert float(found.kl[i, 0]) == pytest.approx(float(kl), rel=1e-3, abs=1e-4)
        assert float(found.nll[i, 0]) == pytest.approx(float(rise), rel=1e-3, abs=1e-3)
    assert float(found.kl.min()) > 0


def test_an_exception_leaves_no_hook():
    model, _ = setup("llama")
    with pytest.raises(RuntimeError, match="stop"), ablated(model, "*.attn.o.h1"):
        raise RuntimeError("stop")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


def test_layers_that_run_without_hooks():
    """What torch.compile does to a block: its forward is called directly, and no hook of it."""
    model, runs = setup("llama")
    o = model.module.model.layers[1].self_attn.o_proj
    o.__class__ = type("Compiled", (o.__class__,), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(ValueError, match=r"The hook on \S+ never ran.*before torch\.compile"):
        writers_of(model, direction(), runs)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


# --- tables, files, errors ------------------------------------------------------------------------------------------------------


def test_tables_and_files(tmp_path):
    model, runs = setup("gpt2")
    found = contributions(model, direction(), runs, at="2.mid")
    table = found.frame(draws=200)
    assert list(table.columns) == ["layer", "head", "site", "kind", "at", "score", "low", "high", "n"]
    assert set(table["kind"]) == {"head", "bias", "attention", "mlp", "embed", "stream"}
    assert (table["low"] <= table["score"]).all()
    assert (table["score"] <= table["high"]).all()
    assert set(table["n"]) == {3}  # six transcripts of three questions
    assert math.isnan(contributions(model, direction(), runs[:1]).frame()["low"].iloc[0])
    head = found.top(count=1)[0]
    assert found.score(head) == pytest.approx(float(found.heads.scores.mean(0).max()))
    found.save(tmp_path / "c.safetensors")
    again = Contributions.load(tmp_path / "c.safetensors")
    assert again.frame(draws=200).equals(table)
    assert torch.equal(again.scores, found.scores)
    done = ablations(model, direction(), runs, [head])
    done.save(tmp_path / "a.safetensors")
    assert Ablations.load(tmp_path / "a.safetensors").frame(draws=20).equals(done.frame(draws=20))
    with pytest.raises(ValueError, match="saved by another kind of result"):
        Contributions.load(tmp_path / "a.safetensors")
    cut = replace(
        runs[0],
        ids=runs[0].ids[:-1],
        offsets=runs[0].offsets[:-1],
        spans={"all": (0, len(runs[0].ids) - 1), "end": (len(runs[0].ids) - 2, len(runs[0].ids) - 1)},
    )
    whole = [replace(t, spans={**t.spans, "end": (len(t.ids) - 3, len(t.ids) - 2)}) for t in runs[1:]]
    table = ablations(model, direction(), [cut, *whole], [head], over="end").frame(draws=20).set_index("measure")
    assert math.isfinite(table.loc["nll", "value"])  # nothing comes after the cut one's last token
    assert table["n"].to_dict() == {"projection": 3, "kl": 3, "nll": 3}


def test_the_interval_is_that_of_drawing_whole_questions():
    """One statistic a draw, a draw at a time, each question with all its transcripts."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 2, generator=generator).double()
    question = list("aabbbcdde")
    low, high, n = interval(values, question, draws=400, seed=3)
    groups = [[i for i, q in enumerate(question) if q == name] for name in sorted(set(question))]
    counts = np.random.default_rng(3).multinomial(5, np.full(5, 1 / 5), size=400)
    drawn = []
    for count in counts:
        rows = [i for group, times in zip(groups, count, strict=True) for _ in range(times) for i in group]
        drawn.append(values[rows].mean(0).numpy())
    assert n == 5
    np.testing.assert_allclose(low, np.quantile(drawn, 0.025, axis=0))
    np.testing.assert_allclose(high, np.quantile(drawn, 0.975, axis=0))
    with pytest.raises(ValueError, match="level=2"):
        interval(values, question, level=2)


class Coded(torch.nn.Linear):
    """A linear layer that holds whole numbers, which it multiplies by their step where it computes."""

    def __init__(self, layer):
        super().__init__(*reversed(layer.weight.shape), bias=False, device="meta")
        self.step = layer.weight.detach().abs().max() / 127
        codes = (layer.weight.detach() / self.step).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.step).T


def test_codes_of_a_quantised_model_are_no_weights():
    model, runs = setup("llama")
    coded = Model(tiny("llama", tied=False)[0], model.tokenizer)
    attention = coded.module.model.layers[1].self_attn
    attention.o_proj = Coded(attention.o_proj)
    coded.module.lm_head = Coded(coded.module.lm_head)
    words = "is stored as torch.int8: such numbers are codes of a quantised model"
    for scored in (writers_of, contributions):
        with pytest.raises(ValueError, match=rf"1\.attn\.o {words}"):
            scored(coded, direction(), runs, at="2.mid")
    with pytest.raises(ValueError, match=rf"head {words}"):
        logit_contributions(coded, runs)


def test_what_cannot_be_attributed(unchecked):
    model, runs = setup("llama")
    u = direction()
    with pytest.raises(ValueError, match=r"shape \(5,\); this model's stream is 32 wide"):
        contributions(model, u[:5], runs)
    with pytest.raises(ValueError, match="length nan"):
        contributions(model, u * math.nan, runs)
    with pytest.raises(ValueError, match="length 0"):
        contributions(model, u * 0, runs)
    with pytest.raises(ValueError, match=r"'9\.mid' matches no site"):
        contributions(model, {"9.mid": u}, runs)
    with pytest.raises(ValueError, match=r"at 1\.attn\.out; parts are scored in the stream"):
        contributions(model, {"1.attn.out": u}, runs)
    with pytest.raises(ValueError, match="read at one site"):
        contributions(model, u, runs, at="*.mid")
    with pytest.raises(ValueError, match=r"at 1: name stream sites, as in 3\.mid"):
        contributions(model, {1: u}, runs)
    with pytest.raises(ValueError, match="has no site"):
        contributions(model, {}, runs)
    with pytest.raises(ValueError, match=r"No head writes before 0\.resid"):
        writers_of(model, u, runs, at="0.resid")
    plain = [model.transcript("q", "no thoughts")]
    with pytest.raises(ValueError, match="None of the 1 transcripts has a span thinking; they have all, answer"):
        writers_of(model, u, plain)
    found = writers_of(model, u, runs)
    for wrong in ({}, {"share": 0.1, "count": 1}):
        with pytest.raises(ValueError, match="one of the two"):
            found.top(**wrong)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        found.top(share=0)
    with pytest.raises(ValueError, match="13 heads were asked for; 12 of 12 were scored"):
        found.top(count=13)
    with pytest.raises(ValueError, match="matches no site"):
        found.score("0.mlp.out")
    with pytest.raises(
        ValueError,
        match=r"against=' the': a token is meant by its id, as in tokenizer\(text, add_special_tokens=False\)",
    ):
        logit_contributions(model, runs, against=" the")
    with pytest.raises(ValueError, match="from 0 to 99; 1 were given"):
        logit_contributions(model, runs, against=[3])
    with pytest.raises(ValueError, match=r"1\.attn\.o names no part that can be silenced.*3\.mlp\.out"):
        ablations(model, u, runs, "1.attn.o")
    with pytest.raises(ValueError, match=r"1\.mlp\.out writes after 1\.mid"):
        ablations(model, u, runs, "1.mlp.out", at="1.mid")
    with (
        pytest.raises(ValueError, match=r"what passes 1\.mlp\.out takes a vector of 32 numbers there; got nothing"),
        ablated(model, "1.mlp.out", to={}),
    ):
        pass
    with pytest.raises(ValueError, match=r"1\.attn\.o\.h9 does not exist"):
        ablations(model, u, runs, "1.attn.o.h9")
    with pytest.raises(ValueError, match=r"2\.attn\.o\.h1 writes after 1\.mid"):
        ablations(model, u, runs, "2.attn.o.h1", at="1.mid")
    with pytest.raises(ValueError, match="'zero' or with its 'mean'"):
        ablations(model, u, runs, "2.attn.o.h1", how="noise")


def test_silencing_inside_a_steering_of_the_stream():
    """What is added to the stream between attention and MLP stays when the attention beside it is silenced, whichever block is around the other."""
    model = Model(*tiny("llama"))
    run = [model.transcript("ab", "cd")]

    def steering():
        return steered(model, torch.ones(32), strength=2.0, at="1.mid", over="all", units="raw")

    entering = collect(model, run, at="1.resid", over="all")["1.resid"]
    with steering(), ablated(model, "1.attn.out"):
        inside = collect(model, run, at="1.mid", over="all")["1.mid"]
    with ablated(model, "1.attn.out"), steering():
        around = collect(model, run, at="1.mid", over="all")["1.mid"]
    torch.testing.assert_close(around, entering + 2)
    torch.testing.assert_close(inside, around)


def test_an_adapter_in_the_module():
    """Heads are scored by the matrix that mixes them: with an adapter beside it they were scored without, silently."""
    peft = pytest.importorskip("peft")
    model, runs = setup("llama")
    before = len(model.weights)  # read before the adapter comes, they stay those of the base
    adapted = peft.get_peft_model(model.module, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    for ask in (contributions, writers_of):
        with pytest.raises(
            ValueError, match=r"adapter beside its own tensors, first at model.layers.0.self_attn.o_proj"
        ):
            ask(model, direction(), runs, at="3.resid")
    with pytest.raises(ValueError, match="adapter"):
        logit_contributions(model, runs)
    merged = Model(adapted.merge_and_unload(), model.tokenizer)
    table = contributions(merged, direction(), runs, at="3.resid").frame().set_index("site")["score"]
    assert len(merged.weights) == before
    assert sum(table[f"1.attn.o.h{h}"] for h in range(HEADS)) == pytest.approx(table["1.attn.out"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_batch_holds_a_transcript(size, unchecked):
    """Batches of less than none left every score at zero, without a word."""
    model, runs = setup("llama")
    for call in (
        lambda: contributions(model, direction(), runs, at="2.resid", batch_size=size),
        lambda: logit_contributions(model, runs, batch_size=size),
        lambda: ablations(model, direction(), runs, "1.attn.out", at="2.resid", batch_size=size),
        lambda: attention(model, runs, to="prompt", batch_size=size),
        lambda: lens(model, runs, batch_size=size),
        lambda: collect(model, runs, batch_size=size),
    ):
        with pytest.raises(ValueError, match=f"batch_size={size}: give a whole number, 1 or more"):
            call()


def test_numbers_that_mean_nothing(unchecked):
    model, runs = setup("llama")
    with pytest.raises(ValueError, match=r"count=1\.5: give a whole number"):
        contributions(model, direction(), runs, at="2.resid").top(count=1.5)
    for against in (1.5, [1.5] * len(runs)):
        with pytest.raises(ValueError, match=r"against=1\.5: give a whole number"):
            logit_contributions(model, runs, against=against)
    fixed = {Site(1, "attn.out"): torch.full((32,), math.nan)}
    with pytest.raises(ValueError, match=r"1\.attn\.out.*NaN or infinite"), ablated(model, "1.attn.out", to=fixed):
        pass
    with pytest.raises(ValueError, match=r"width 3.*32"):
        unembed(model, torch.ones(2, 3))
