"""The mixture is the base at 0 and the tuned model at 1, and in between and beyond what the formula says."""

import math

import pytest
import torch
from transformers import DynamicCache

from probes.activations import collect
from probes.mixing import mix_logits, mixed
from probes.recorder import recording
from probes.steering import steered
from surgery.decoding import prefix_cache
from surgery.edits import Scale
from surgery.model import Model
from surgery.rows import rows_are
from surgery.weights import apply
from tests.families import FAMILIES, tiny

QUESTIONS = ["one", "two and two", "a much longer question, it is", "on"]
IDS = torch.arange(4, 24)[None]


def pair(family="llama", other=None):
    return Model(*tiny(family)), Model(*tiny(other or family, seed=7))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def tokens(model, **options):
    return [t.ids for t in model.generate(QUESTIONS, max_new_tokens=6, batch_size=3, **options)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_are_the_two_models(family):
    base, tuned = pair(family)
    ends, reads = [tokens(base), tokens(tuned)], [logits(base), logits(tuned)]
    between = []
    for other in (tuned, tuned_weights(base, tuned)):
        for s in (0.0, 1.0):
            with mixed(base, other, s):
                assert torch.equal(logits(base), reads[int(s)])
                assert tokens(base) == ends[int(s)]
        with mixed(base, other, [0.0, 1.0, 1.0, 0.0]):
            assert tokens(base) == [ends[0][0], ends[1][1], ends[1][2], ends[0][3]]
        with mixed(base, other, 0.4):
            between.append(tokens(base))
    assert between[0] == between[1]
    assert tokens(base) == ends[0]
    assert torch.equal(logits(base), reads[0])


def tuned_weights(base, tuned):
    """The tuned model's point, as weights of the base."""
    return base.weights + (tuned.weights - base.weights)


@pytest.mark.parametrize("scale", [-0.5, 0.3, 1.6])
def test_the_formula(scale):
    base, tuned = pair()
    low, high = logits(base).double().log_softmax(-1), logits(tuned).double().log_softmax(-1)
    with mixed(base, tuned, scale):
        got = logits(base).double().log_softmax(-1)
    torch.testing.assert_close(got, ((1 - scale) * low + scale * high).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "other"), [("llama", "llama"), ("gemma2", "gemma2"), ("gpt2", "mistral"), ("qwen2", "gpt-neox")]
)
def test_decoding_is_the_argmax_of_the_formula(family, other):
    """Token by token without any cache, each question by itself: also of two architectures, and with a shared prefix or none."""
    base, tuned = pair(family, other)
    with mixed(base, tuned, [0.5, 0.2, 1.4, 0.8]):
        found = base.generate(QUESTIONS, max_new_tokens=6)
    for scale, run in zip((0.5, 0.2, 1.4, 0.8), found, strict=True):
        ids = list(run.ids[: run.spans["prompt"][1]])
        while len(ids) < len(run.ids):
            now = torch.tensor([ids])
            ids.append(int(mix_logits(logits(base, now)[0, -1], logits(tuned, now)[0, -1], scale).argmax()))
        assert tuple(ids) == run.ids


def test_a_prefix_is_shared_unless_the_other_model_has_windows():
    for family, shared in (("gpt2", True), ("mistral", False)):
        base, other = pair("gpt2", family)
        with mixed(base, other, 0.5), rows_are([4, 4]), torch.no_grad():
            assert (prefix_cache(base.module, [4, 5, 6], 2) is not None) == shared


def test_samples_do_not_depend_on_the_batch():
    base, tuned = pair()
    with mixed(base, tuned, 0.5):
        options = {"samples": 2, "temperature": 2.0, "seed": 3, "max_new_tokens": 5}
        together = [t.ids for t in base.generate(QUESTIONS, **options)]
        assert [t.ids for t in base.generate(QUESTIONS, batch_size=3, **options)] == together
        assert len(set(together)) == len(together)


def test_rows_that_generation_repeats_keep_their_questions_scale():
    base, tuned = pair()
    rows = IDS.repeat(4, 1)
    expected = torch.cat([logits(base, rows)[:2], logits(tuned, rows)[2:]])
    with mixed(base, tuned, [0.0, 1.0]), rows_are([20, 20], [0, 1]):
        assert torch.equal(logits(base, rows), expected)


def test_a_floor_rules_out_what_the_base_all_but_excludes():
    low, high = torch.tensor([[0.0, -1.0, -5.0]]), torch.tensor([[0.0, 1.0, 50.0]])
    assert mix_logits(low, high, 2.0).argmax().item() == 2
    half = [side.bfloat16() for side in (low + 0.3, high * 1.1)]  # of a model in bf16: mixed in fp32
    assert torch.equal(mix_logits(*half, 0.7), half[0].float() + 0.7 * (half[1].float() - half[0].float()))
    ruled = mix_logits(low, high, 2.0, floor=0.1)
    assert ruled.argmax().item() == 1
    assert ruled.isinf().tolist() == [[False, False, True]]
    just = torch.tensor([0.0, math.log(0.5)])  # the very share is enough
    assert torch.equal(mix_logits(just, just, 0.5, floor=0.5), just)
    base, tuned = pair()
    with mixed(base, tuned, 3.0, floor=0.999):
        greedy = tokens(base)
    assert greedy == tokens(base)  # only the base's own first choice is left


def test_a_steered_mixture_steers_a_model_with_two_weights_twice():
    base, _ = pair()
    other = apply(Scale(0.5), base.weights, "*.mlp.down")
    u = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with steered(base, u, strength=0.5, at="1.resid", over="completion"):
        with base.installed(other):
            wanted = tokens(base)
        with mixed(base, other, 1.0):
            assert tokens(base) == wanted
        plain = tokens(base)
        with mixed(base, other, 0.0):
            assert tokens(base) == plain


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_steered_and_recorded_inside_a_mixture(scale):
    """The other weights' passes go through the same module, in the middle of the base's: whoever follows these is not put off."""
    base, tuned = pair()
    other = tuned_weights(base, tuned)
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    push = {"strength": 1.0, "at": "1.resid", "over": "completion"}
    with steered(base, v, **push), mixed(base, other, scale):
        outside = tokens(base)
    with mixed(base, other, scale), steered(base, v, **push):
        assert tokens(base) == outside
    with mixed(base, other, scale), recording(base, at="1.resid") as seen:
        runs = base.generate(QUESTIONS, max_new_tokens=6, batch_size=3)
    assert [t.ids for t in runs] != outside
    found, expected = seen.of(runs), collect(base, runs, at="1.resid", over="completion")
    kept = [i for i, at in enumerate(expected.position.tolist()) if at < len(runs[int(expected.transcript[i])].ids) - 1]
    assert found.position.tolist() == expected.position[kept].tolist()
    torch.testing.assert_close(found["1.resid"], expected["1.resid"][kept], rtol=1e-4, atol=1e-4)


def test_everything_is_given_back():
    base, tuned = pair()
    before = logits(base)
    data = {n: p.data_ptr() for n, p in base.module.named_parameters()}

    def failing(other):
        with mixed(base, other, 0.5):
            logits(base)
            raise KeyboardInterrupt

    for other in (tuned, tuned_weights(base, tuned)):
        with pytest.raises(KeyboardInterrupt):
            failing(other)
        with mixed(base, other, 0.5):
            with pytest.raises(AttributeError):
                base.module(input_ids=IDS, attention_mask="no mask")
            assert not torch.equal(logits(base), before)
    for model in (base, tuned):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())
    assert {n: p.data_ptr() for n, p in base.module.named_parameters()} == data
    assert torch.equal(logits(base), before)


def test_what_cannot_be_mixed(unchecked):
    base, tuned = pair()
    for scale in (float("nan"), [], [0.5, float("inf")]):
        with pytest.raises(ValueError, match="A scale is a finite number"), mixed(base, tuned, scale):
            pass
    for floor in (-0.1, 1.0):
        with (
            pytest.raises(ValueError, match=r"A floor is a share .* in \[0, 1\)"),
            mixed(base, tuned, 0.5, floor=floor),
        ):
            pass
    stranger = Model(*tiny("llama", seed=7))
    stranger.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="do not have the same tokens"), mixed(base, stranger, 0.5):
        pass
    with (
        pytest.raises(ValueError, match="do not have the same anatomy"),
        mixed(base, Model(*tiny("gpt2")).weights, 0.5),
    ):
        pass
    few = mixed(base, tuned, [0.1, 0.2])
    with few, rows_are([1, 1, 1], [0, 1, 2]), pytest.raises(ValueError, match="2 scales are given for 3 rows"):
        logits(base, IDS.repeat(3, 1))
    with mixed(base, tuned, 0.5), pytest.raises(ValueError, match="The loss would be the base's alone"):
        base.module(input_ids=IDS, labels=IDS)
    cache = base.module(input_ids=IDS, use_cache=True).past_key_values
    with mixed(base, tuned, 0.5), pytest.raises(ValueError, match="20 tokens in the cache were not read by both"):
        base.module(input_ids=IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("outside", [True, False])
def test_steering_and_mixing(outside):
    """Weights of this model are steered with it, another model is not; either block may be around the other."""
    model, other = Model(*tiny("llama")), Model(*tiny("llama", seed=1))
    edited, ids = apply(Scale(0.3), model.weights, "*.attn.o"), torch.tensor([[1, 40, 50, 60]])

    def steering():
        return steered(model, torch.ones(32), strength=2.0, at="1.resid", over="all", units="raw")

    with torch.no_grad(), steering():
        base = model.module(ids).logits
        with model.installed(edited):
            both = model.module(ids).logits
    with torch.no_grad():
        for tuned, logits in ((edited, both), (other, other.module(ids).logits)):
            first, second = (steering(), mixed(model, tuned, 0.5))[:: 1 if outside else -1]
            with first, second:
                torch.testing.assert_close(model.module(ids).logits, (base + logits) / 2)


def test_what_is_done_to_a_cache_is_done_to_both():
    base, tuned = pair()
    rows = torch.cat([IDS, IDS.flip(1)])
    with mixed(base, tuned, 0.5), torch.no_grad():
        whole = base.module(input_ids=rows, use_cache=True)
        cache = whole.past_key_values
        cache.crop(8 - rows.shape[1])
        cache.batch_repeat_interleave(2)
        again = base.module(input_ids=rows[:, 8:].repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(again, whole.logits[:, 8:].repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)
    with mixed(base, tuned, 0.5), torch.no_grad():
        cache = DynamicCache(config=base.module.config)
        for piece in (rows[:, :3], rows[:, 3:8]):  # a prefix, without its logits
            base.module.base_model(input_ids=piece, past_key_values=cache)
        again = base.module(input_ids=rows[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole.logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_logits_that_cannot_be_mixed():
    logits = torch.ones(3)
    for floor in (-1.0, 1.0, 2.0, math.nan):
        with pytest.raises(ValueError, match=f"A floor is a share .* this is {floor}"):
            mix_logits(logits, logits, 0.5, floor=floor)
    with pytest.raises(ValueError, match="A scale is a finite number"):
        mix_logits(logits, logits, math.nan)
