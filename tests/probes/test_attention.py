"""Attention on marked tokens is that of tables of tokens by tokens, and that of the model while it generates."""

import pytest
import torch

from probes.attention import AttentionMass, attention, eager
from surgery.model import Model
from surgery.transcript import positions
from tests.families import FAMILIES, HEADS, LAYERS, VLM_FAMILIES, WINDOW, tiny, tiny_language, tiny_vlm
from tests.oracles.attribution import attention_mass

SLIDING = {"mistral": (0, 1, 2), "gemma2": (0, 2), "gemma3": (0, 2)}
QUESTIONS = ["sum no commas", "no", "say no twice: no"]
TEXTS = ["<think>abab</think>1", "<think>ab</think>", "plain"]
TO, OVER = "prompt~/no/", "completion"


def setup(family):
    model = Model(*tiny(family))
    return model, [model.transcript(q, text) for q, text in zip(QUESTIONS, TEXTS, strict=True)]


def literal(model, t, family, layer, weights):
    marked = positions(t, TO)
    others = [p for p in range(*t.spans["prompt"]) if p not in marked and p != 0]
    window = WINDOW if layer in SLIDING.get(family, ()) else len(t.ids)
    return attention_mass(weights, marked, others, positions(t, OVER), lambda q, k: q - window < k <= q)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("queries", [1, 6, 128])
def test_the_mass_in_whole_tables(family, queries):
    model, runs = setup(family)
    found = attention(model, runs, to=TO, over=OVER, queries=queries, batch_size=2)
    assert found.mass.shape == (3, LAYERS, HEADS)
    for i, t in enumerate(runs):
        ids = torch.tensor([t.ids])
        with torch.no_grad(), eager(model):
            tables = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
        for layer in range(LAYERS):
            mass, others, even = literal(model, t, family, layer, tables[layer][0])
            assert found.mass[i, layer].tolist() == pytest.approx(mass, abs=1e-5)
            assert found.others[i, layer].tolist() == pytest.approx(others, abs=1e-5)
            assert float(found.uniform[i, layer]) == pytest.approx(even, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_single(dtype):
    model, runs = setup("llama")
    model.module.to(dtype)
    found = attention(model, runs, to=TO, over=OVER, batch_size=1)
    for i, t in enumerate(runs):
        ids = torch.tensor([t.ids])
        with torch.no_grad(), eager(model):
            tables = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
        mass, others, even = literal(model, t, "llama", 1, tables[1][0].float())
        assert found.mass[i, 1].tolist() == pytest.approx(mass, abs=1e-5)
        assert found.others[i, 1].tolist() == pytest.approx(others, abs=1e-5)
        assert float(found.uniform[i, 1]) == pytest.approx(even, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "gpt-neox"])
def test_the_mass_while_generating(family):
    """Every token is generated over the cache, and its attention looked at as it comes."""
    model, _ = setup(family)
    (t,) = model.generate("say no: no", max_new_tokens=12)
    found = attention(model, [t], to=TO, over="completion")
    prompt = t.spans["prompt"][1]
    ids = torch.tensor([t.ids[:prompt]])
    with eager(model), torch.no_grad():
        out = model.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(t.ids) - prompt + 1,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
    marked = positions(t, TO)
    steps = out.attentions[1:]  # the first is the prompt's; then one a token
    assert out.sequences[0].tolist()[: len(t.ids)] == list(t.ids)
    for layer in range(LAYERS):
        mass = torch.zeros(HEADS)
        for number in range(len(t.ids) - prompt):
            seen = steps[number][layer][0, :, 0]
            first = prompt + number + 1 - seen.shape[1]  # a sliding cache has dropped what came before
            mass += sum((seen[:, p - first] for p in marked if p >= first), torch.zeros(HEADS))
        torch.testing.assert_close(found.mass[0, layer].float(), mass / (len(t.ids) - prompt), rtol=1e-4, atol=1e-5)


def test_a_batch_of_three_is_three_of_one():
    model, runs = setup("gemma2")
    together, alone = (attention(model, runs, to=TO, batch_size=n) for n in (3, 1))
    for name in ("mass", "uniform", "others"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_the_language_of_a_vision_language_model_looks_as_it_does_alone(family):
    """Read in pieces, after a generation of somebody else's too."""
    language, tokenizer = tiny_language(family)
    alone, tower = Model(language, tokenizer), Model(tiny_vlm(family, language=language), tokenizer)
    runs = [alone.transcript(q, text) for q, text in zip(QUESTIONS, TEXTS, strict=True)]
    with torch.no_grad():
        tower.module.generate(input_ids=torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3, do_sample=False)
    expected, found = (attention(model, runs, to=TO, queries=4) for model in (alone, tower))
    torch.testing.assert_close(found.mass, expected.mass, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_attention_comes_back(family):
    model, runs = setup(family)
    before = model.module.config._attn_implementation
    ids = torch.tensor([runs[0].ids])
    run = lambda: model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # noqa: E731
    with torch.no_grad():
        logits = run()
        attention(model, runs, to=TO)
        assert torch.equal(run(), logits)
    with pytest.raises(RuntimeError, match="stop"), eager(model):
        raise RuntimeError("stop")
    assert model.module.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_tables_and_files(tmp_path):
    model, runs = setup("llama")
    found = attention(model, runs, to=TO)
    table = found.frame(draws=100)
    assert list(table.columns) == ["layer", "head", "measure", "value", "low", "high", "n"]
    assert set(table["measure"]) == {"mass", "excess", "per_token"}
    mean = table[table["measure"] == "mass"]["value"].mean()
    summary = found.summary(draws=100).set_index("measure")
    assert summary.loc["mass", "value"] == pytest.approx(mean)
    found.save(tmp_path / "a.safetensors")
    assert AttentionMass.load(tmp_path / "a.safetensors").frame(draws=100).equals(table)


def test_what_thinking_takes_is_counted_question_by_question():
    model, _ = setup("llama")
    plain = [model.transcript(q, text) for q in QUESTIONS for text in ("1", "12")][
        :-1
    ]  # one answer to the last question
    thought = [model.transcript(q, "<think>ab</think>1") for q in [*QUESTIONS[1:], "another no"]]
    before, after = (attention(model, runs, to=TO, over="answer") for runs in (plain, thought))
    table = before.drop(after, draws=200).set_index("measure")
    shared = torch.stack(
        [before.mass[2:4].mean(), before.mass[4].mean()]
    )  # the last two questions, and each weighs the same
    expected = (shared.mean() - after.mass[:2].mean()).item()
    assert table.loc["mass", "value"] == pytest.approx(expected)
    lost = [
        float(s - after.mass[i].mean()) for i, s in enumerate(shared)
    ]  # of two, 95 % of draws reach from one to the other
    assert table.loc["mass", ["low", "high"]].tolist() == pytest.approx(sorted(lost))
    assert set(table["n"]) == {2}
    assert before.drop(before)["value"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no question in common"):
        before.drop(attention(model, thought[2:], to=TO, over="answer"))


def test_even_attention_has_no_excess():
    """With queries of nothing every score is equal, and so is attention on all that is seen."""
    model, runs = setup("llama")
    with torch.no_grad():
        for name, w in model.module.named_parameters():
            if "q_proj" in name:
                w.zero_()
    found = attention(model, runs, to=TO)
    torch.testing.assert_close(found.mass, found.uniform[:, :, None].expand_as(found.mass), rtol=1e-5, atol=1e-6)
    measures = found.frame(draws=2).groupby("measure")["value"].apply(lambda v: float(v.abs().max()))
    assert measures["excess"] < 1e-6
    assert measures["per_token"] < 1e-6


def test_a_prompt_that_is_marked_as_a_whole_has_no_other_tokens():
    """Such a transcript counts for all but the comparison with the prompt's others, and does not spoil that of the rest."""
    model, runs = setup("llama")
    some = attention(model, runs[:1], to=TO)
    whole = attention(model, runs[1:2], to="prompt")
    mixed = AttentionMass(
        *(torch.cat([getattr(some, n), getattr(whole, n)]) for n in ("mass", "uniform", "others", "marked", "unmarked")),
        (0, 1), (*some.question, *whole.question), some.to, some.over,
    )  # fmt: skip
    assert (float(some.unmarked[0]) > 0, float(whole.unmarked[0])) == (True, 0.0)
    of = {
        name: t.summary(draws=10).set_index("measure")
        for name, t in (("some", some), ("whole", whole), ("mixed", mixed))
    }
    assert of["mixed"].loc["per_token", "value"] == of["some"].loc["per_token", "value"]
    assert of["mixed"]["n"].to_dict() == {"mass": 2, "excess": 2, "per_token": 1}
    assert list(of["whole"].index) == ["mass", "excess"] == list(whole.frame(draws=10)["measure"].unique())
    assert mixed.drop(mixed, draws=10).set_index("measure")["n"].to_dict() == {"mass": 2, "excess": 2, "per_token": 1}


def test_what_cannot_be_looked_at(unchecked):
    model, runs = setup("llama")
    with pytest.raises(ValueError, match="0 have the first, 3 the second"):
        attention(model, runs, to="prompt~/yes/")
    with pytest.raises(ValueError, match="queries=0"):
        attention(model, runs, to=TO, queries=0)
    assert attention(model, runs, to=TO, over="answer").transcript == (0, 2)
