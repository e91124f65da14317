"""A live model: weights lent and given back, text that depends on its seed alone."""

import pytest
import torch

from probes.activations import collect, gradients
from probes.attention import attention
from probes.lens import lens
from surgery.decoding import pad_after_prefix, prefix_cache
from surgery.edits import Scale
from surgery.model import Model, find, pick_device
from surgery.rounding import as_dtype
from surgery.runs import fingerprint
from surgery.transcript import read_transcript
from surgery.weights import apply
from surgery.writing import write
from tests.families import FAMILIES, save_tiny, tiny

IDS = torch.arange(4, 24)[None]
QUESTIONS = ["one", "two and two", "a much longer question, it is", "on"]


def logits(model):
    with torch.no_grad():
        return model.module(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_installed_is_what_is_written_and_is_given_back(family, tied, tmp_path):
    model = Model.load(save_tiny(family, tmp_path / "model", tied=tied))
    edited = apply(Scale(0.5), model.weights, ["*.attn.q.h1", "*.mlp.up", "embed"])
    before, parameters = logits(model), {n: (p, p.clone()) for n, p in model.module.named_parameters()}
    with model.installed(edited):
        inside = logits(model)
        assert (model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight) == tied
    assert not torch.equal(inside, before)
    write(edited, tmp_path / "out")
    assert torch.equal(logits(Model.load(tmp_path / "out")), inside)

    def interrupted():
        with model.installed(edited):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits(model), before)
    for name, parameter in model.module.named_parameters():
        assert parameter is parameters[name][0]
        assert torch.equal(parameter, parameters[name][1])
    other = Model(*tiny("llama" if family == "gpt2" else "gpt2", tied=tied))
    with pytest.raises(ValueError, match="do not have the same anatomy"), model.installed(other.weights):
        pass


def test_a_parameter_in_anothers_place_is_read():
    model = Model(*tiny("llama"))
    weights, layer = model.weights, model.module.get_submodule("model.layers.0.mlp.down_proj")
    before = weights["0.mlp.down"].clone()
    layer.weight = torch.nn.Parameter(2 * layer.weight.detach())
    assert weights.parameter("0.mlp.down") is layer.weight
    assert torch.equal(weights["0.mlp.down"], 2 * before)


def test_an_autocast_around_several_weights_computes_with_each():
    """Its casts are kept by parameter, and would outlive what was in the parameter."""
    model = Model(*tiny("llama"))
    edited = apply(Scale(0.5), model.weights, ["*.mlp.up"])

    def seen():
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model)

    plain = seen()
    with model.installed(edited):
        inside = seen()
    assert not torch.equal(plain, inside)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), plain)
        with model.installed(edited):
            assert torch.equal(logits(model), inside)
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_does_not_matter(family):
    model = Model(*tiny(family))
    together = model.generate(QUESTIONS, max_new_tokens=8)
    alone = [model.generate(q, max_new_tokens=8)[0] for q in QUESTIONS]
    assert [t.ids for t in together] == [t.ids for t in alone]
    assert [t.question for t in together] == QUESTIONS
    assert all(t.prompt == model.prompt(q).strip() for t, q in zip(together, QUESTIONS, strict=True))
    sampled = model.generate(QUESTIONS, samples=2, temperature=5.0, seed=3, max_new_tokens=6)
    assert [t.meta["sample"] for t in sampled] == [0, 1] * 4
    assert [
        t.ids for t in model.generate(QUESTIONS, samples=2, temperature=5.0, seed=3, max_new_tokens=6, batch_size=3)
    ] == [t.ids for t in sampled]
    assert [t.ids for t in model.generate(QUESTIONS[:2], samples=1, temperature=5.0, seed=3, max_new_tokens=6)] == [
        sampled[0].ids,
        sampled[2].ids,
    ]
    assert sampled[0].ids != sampled[1].ids
    assert [t.ids for t in model.generate(QUESTIONS, samples=2, temperature=5.0, seed=4, max_new_tokens=6)] != [
        t.ids for t in sampled
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_changes_nothing(family):
    model = Model(*tiny(family))
    prompts = [model.prompt_ids(q) for q in QUESTIONS]
    ids, mask, start = pad_after_prefix(prompts, 0)
    assert start > 3
    assert [pad_after_prefix(prompts, 0, most=most)[2] for most in (3, start + 1)] == [3, start]
    plain, plain_mask, none = pad_after_prefix(prompts, 0, share=False)
    assert none == 0
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == prompts
    assert [row[m.bool()].tolist() for row, m in zip(plain, plain_mask, strict=True)] == prompts
    with torch.no_grad():
        cache = prefix_cache(model.module, prompts[0][:start], len(prompts))
        assert (cache is None) == (family in ("mistral", "gemma2", "gemma3"))  # windows
        if cache is None:
            return
        where = (mask.cumsum(1) - 1).clamp_min(0)
        shared = model.module(
            input_ids=ids[:, start:], attention_mask=mask, position_ids=where[:, start:], past_key_values=cache
        ).logits
        where = (plain_mask.cumsum(1) - 1).clamp_min(0)
        whole = model.module(input_ids=plain, attention_mask=plain_mask, position_ids=where).logits
    torch.testing.assert_close(shared[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heat", [0.7, 2.0])
def test_samples_follow_the_temperature(heat):
    model = Model(*tiny("llama"))
    count = 3000
    runs = model.generate("one", samples=count, temperature=heat, max_new_tokens=1, batch_size=1000)
    ids = torch.tensor([model.prompt_ids("one")])
    with torch.no_grad():
        expected = count * (model.module(input_ids=ids).logits[0, -1].double() / heat).softmax(0)
    found = torch.bincount(torch.tensor([t.ids[ids.shape[1]] for t in runs]), minlength=len(expected)).double()
    common = expected >= 5
    observed = torch.cat([found[common], found[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    degrees = len(wanted) - 1
    chi = float(((observed - wanted) ** 2 / wanted).sum())
    assert abs(chi - degrees) < 4.5 * (2 * degrees) ** 0.5


def test_requests_that_cannot_be(tmp_path):
    model = Model(*tiny("llama"))
    for wrong in (
        {"samples": 0},
        {"samples": 2, "temperature": 0.0},
        {"temperature": -1.0},
        {"samples": 2, "temperature": float("nan")},
    ):
        with pytest.raises(ValueError, match=r"samples=\d at temperature=.*ask for at least one sample"):
            model.generate("one", **wrong)
    assert model.generate([]) == []
    with pytest.raises(ValueError, match=r"There is no device 'abacus' here\. Use auto, cpu"):
        pick_device("abacus")
    for dtype in ("int8", "float31"):
        with pytest.raises(ValueError, match=rf"'{dtype}' is not a dtype of weights\. Choose float32"):
            as_dtype(dtype)
    with pytest.raises(FileNotFoundError, match=r"'no/such-model' is neither a folder here nor a model that the hub"):
        find("no/such-model")
    with pytest.raises(ValueError, match=r"is not a folder\. A checkpoint is a folder with"):
        Model.load(tmp_path / "none")


def test_a_text_beyond_learned_positions():
    """On a CPU it was an IndexError without a number in it; on a GPU it ends the process's use of it."""
    model = Model(*tiny("gpt2"))
    run = model.transcript("a" * 600, "b")
    refused = pytest.raises(ValueError, match=r"\d+ tokens.* gpt2 has 512 positions")
    for read in (collect, gradients, lens):
        with refused:
            read(model, [run], at="1.resid", over="all")
    with refused:
        attention(model, [run], to="prompt")
    with refused:
        model.generate("a" * 480, max_new_tokens=40)
    assert len(model.generate("a" * 480, max_new_tokens=4)[0].ids) <= 512
    Model(*tiny("llama")).generate("a" * 600, max_new_tokens=1)  # rotary ones go on


@pytest.mark.usefixtures("unchecked")
def test_a_chat_of_several_turns():
    """A list of messages is no question: it went into the template as it prints. What the error names does go on with a chat."""
    model = Model(*tiny("llama"))
    said = [("user", "hi"), ("assistant", "yo"), ("user", "and?")]
    chat = [{"role": role, "content": text} for role, text in said]
    for asked in ([chat], chat):
        with pytest.raises(
            ValueError, match=r"A question is a text, not a (list|dict).*apply_chat_template.*continued"
        ):
            model.generate(asked, max_new_tokens=2)
    with pytest.raises(ValueError, match="A question is a text"):
        model.transcript(chat, "yes")
    ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    (run,) = model.continued([read_transcript(model.tokenizer, "and?", ids, [])], max_new_tokens=3)
    alone = model.module.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0].tolist()
    assert list(run.ids) == alone
    assert run.prompt == "<bos>user: hiassistant: yo<eos>user: and?assistant:"


def test_a_wrapped_module():
    """What a wrapper adds has no site: neither a PEFT model nor the module under it, with the adapter in it, is taken for a damaged download."""
    peft = pytest.importorskip("peft")
    module, tokenizer = tiny("llama")
    early, plain = Model(module, tokenizer), module.model.layers[0].self_attn.o_proj.weight.detach().clone()
    adapted = peft.get_peft_model(module, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    for wrapped in (adapted, module):
        with pytest.raises(ValueError, match=r"adapter.*Model\(peft_model.merge_and_unload\(\), tokenizer\)"):
            Model(wrapped, tokenizer)
    with pytest.raises(ValueError, match=r"adapter.*merge_and_unload"):
        len(early.weights)
    adapted.add_adapter("other", peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    known = [fingerprint(early)]
    with adapted.disable_adapter():
        known.append(fingerprint(early))
    adapted.set_adapter("other")
    known.append(fingerprint(early))
    adapted.set_adapter("default")
    module.model.layers[0].self_attn.o_proj.scaling["default"] *= 2
    known.append(fingerprint(early))
    assert len(set(known)) == 4  # each computes something else
    module.model.layers[0].self_attn.o_proj.scaling["default"] /= 2
    assert fingerprint(early) == known[0]
    assert not torch.equal(Model(adapted.merge_and_unload(), tokenizer).weights["0.attn.o"], plain)
    with pytest.raises(ValueError, match=r"OptimizedModule.*not a transformers model.*_orig_mod"):
        Model(torch.compile(tiny("llama")[0]), tokenizer)
    with pytest.raises(ValueError, match=r"DataParallel.*not a transformers model.*module.module"):
        Model(torch.nn.DataParallel(tiny("llama")[0]), tokenizer)
    with pytest.raises(
        ValueError, match=r"LlamaModel has no head that gives logits: give what AutoModelForCausalLM makes"
    ):
        Model(tiny("llama")[0].model, tokenizer)
    with pytest.raises(ValueError, match=r"There is no tokenizer: .* AutoTokenizer"):
        Model(tiny("llama")[0], None)


def test_a_teachers_transcript():
    model = Model(*tiny("llama"))
    t = model.transcript("why", "<think>\na\n</think>\nb", source="teacher")
    assert (t.thinking, t.answer, t.finished, t.meta) == ("a", "b", True, {"source": "teacher"})
    assert t.prompt == model.prompt("why").strip() != ""


def test_what_cannot_be_generated(unchecked):
    """A negative batch was a KeyError, and half a sample Python's word for it."""
    model = Model(*tiny("llama"))
    begun = [read_transcript(model.tokenizer, "one", model.prompt_ids("one"), [])]
    for write_on in (lambda **how: model.generate(QUESTIONS, **how), lambda **how: model.continued(begun, **how)):
        for bad in (0, -1, 1.5, "2", True):
            with pytest.raises(ValueError, match=f"batch_size={bad!r}: give a whole number, 1 or more"):
                write_on(batch_size=bad)
        for bad in (0, -1, 1.5, "2"):
            with pytest.raises(ValueError, match=f"max_new_tokens={bad!r}: give a whole number, 1 or more"):
                write_on(max_new_tokens=bad)
        for bad in (1.5, "2"):
            with pytest.raises(ValueError, match=f"samples={bad!r}: give a whole number"):
                write_on(samples=bad)
    with pytest.raises(ValueError, match=r"not one: write \[transcript\]"):
        model.continued(begun[0])
    with pytest.raises(ValueError, match="A transcript was expected, not a str"):
        model.continued(["one"])
    for text in (None, ["a"]):
        with pytest.raises(ValueError, match="A completion is a text, not a"):
            model.transcript("q", text)


def test_a_change_is_no_model(tmp_path, unchecked):
    model = Model.load(save_tiny("llama", tmp_path / "model"))
    change = model.weights - model.weights
    with pytest.raises(
        TypeError, match=r"a model is wanted, and this is a change: add it to one, as in base \+ change"
    ):
        write(change, tmp_path / "out")
    with pytest.raises(TypeError, match="a model is wanted, and this is a change"), model.installed(change):
        pass


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_change_has_a_finite_strength(scale):
    """`installed` computed with the NaN that came of it."""
    change = Model(*tiny("llama")).weights - Model(*tiny("llama", seed=1)).weights
    with pytest.raises(ValueError, match=f"A change times {scale} is none: give a finite number"):
        scale * change


def test_words_that_mean_nothing_to_a_write(tmp_path, unchecked):
    """A word that is not one of the three generated, and refused nothing; a dtype by name was an AttributeError."""
    point = Model.load(save_tiny("llama", tmp_path / "model")).weights
    for name, options, said in (
        ("loops", {"loops": "refus"}, "loops='refus': choose refuse, report or ignore"),
        ("limit", {"undo_limit": -1}, "undo_limit=-1: bytes, 0 or more"),
        ("nan", {"undo_limit": float("nan")}, "undo_limit=nan: bytes, 0 or more"),
        (
            "dtype",
            {"dtype": "bfloat16"},
            "Weights cannot be stored as 'bfloat16': give a torch.dtype of floating point, such as torch.bfloat16",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            write(point, tmp_path / name, **options)
        assert not (tmp_path / name).exists()
    with pytest.raises(ValueError, match="5 is not a dtype of weights"):
        as_dtype(5)
