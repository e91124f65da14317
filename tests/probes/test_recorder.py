"""What comes by while generating is what `collect` reads afterwards, whatever the padding, the batches and the cache."""

import pytest
import torch

from probes.activations import collect
from probes.attribution import ablated
from probes.recorder import recording
from probes.steering import steered
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import Markers, read_transcript
from tests.families import FAMILIES, tiny

QUESTIONS = ["what is 1+1?", "and now 12+30?", "a much longer question about sums?", "b?"]


def setup(family="llama"):
    return Model(*tiny(family))


def agree(recorded, model, runs, over, at):
    """The rows of `collect`, less each transcript's last token."""
    acts = collect(model, runs, at=at, over=over)
    ends = torch.tensor([len(t.ids) - 1 for t in runs])
    acts = acts.where(acts.position < ends[acts.transcript])
    assert len(acts)
    for name in ("transcript", "position", "span"):
        assert torch.equal(getattr(recorded, name), getattr(acts, name))
    assert recorded.over == acts.over
    for site in acts.sites:
        torch.testing.assert_close(recorded[site], acts[site], rtol=2e-3, atol=2e-3)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen2-moe"])
def test_generating_in_batches_with_samples(family):
    """Shared prefixes, left padding or both; rows that end early; one token a pass from the cache."""
    model, at = setup(family), ["1.resid", "2.attn.out", "1.attn.z.h2", "3.resid"]
    with recording(model, at=at, over="all") as seen:
        runs = model.generate(QUESTIONS, samples=2, max_new_tokens=12, batch_size=3, seed=1)
    assert len({len(t.ids) for t in runs}) > 1
    agree(seen.of(runs), model, runs, "all", at)
    assert hooks(model) == 0
    assert "generate" not in vars(model.module)


def words(model, texts, width=None):
    """A batch padded on the left."""
    rows = [model.prompt_ids(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[model.pad_id] * (width - len(r)) + r for r in rows])
    return rows, ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_modules_own_generate(family, cache):
    model = setup(family)
    rows, ids, mask = words(model, QUESTIONS)
    with recording(model, at="*.mid", over=("completion", "prompt")) as seen:
        out = model.module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            use_cache=cache,
            pad_token_id=0,
            eos_token_id=2,
        )
    runs = [
        read_transcript(model.tokenizer, q, row, new.tolist())
        for q, row, new in zip(QUESTIONS, rows, out[:, ids.shape[1] :], strict=True)
    ]
    agree(seen.of(runs), model, runs, ("completion", "prompt"), "*.mid")


class Scripted:
    """Generation that says what it is told to, so that there are spans: one text a row."""

    def __init__(self, model, texts):
        self.rows = [[*model.tokenizer(t, add_special_tokens=False)["input_ids"], 2] for t in texts]

    def __call__(self, ids, scores):
        width = self.start if hasattr(self, "start") else ids.shape[1]
        self.start = width
        forced = torch.full_like(scores, -torch.inf)
        for row, said in enumerate(self.rows):
            forced[row, said[min(ids.shape[1] - width, len(said) - 1)]] = 0
        return forced


SAID = ["<think>one. two. so x</think>3", "<think>b</think>", "no thought at all", "<think>never. closed"]
OVER = [
    "thinking",
    "answer",
    ("answer", "thinking"),
    "thinking[-1]",
    "thinking[:3]",
    "sentence[1]",
    "/two|a.l/",
    "prompt~/[0-9]+/",
    "completion",
]


def said(model, texts, over, at="2.resid"):
    rows, ids, mask = words(model, QUESTIONS)
    with recording(model, at=at, over=over) as seen:
        out = model.module.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=2,
            logits_processor=[Scripted(model, texts)],
        )  # fmt: skip
    new = out[:, ids.shape[1] :].tolist()
    return seen, [
        read_transcript(model.tokenizer, q, row, n, model.markers)
        for q, row, n in zip(QUESTIONS, rows, new, strict=True)
    ]


@pytest.mark.parametrize("over", OVER, ids=str)
def test_spans_that_open_and_close_while_generating(over):
    model = setup()
    seen, runs = said(model, SAID, over)
    assert [t.span_text("completion") for t in runs] == [f"{text}<eos>" for text in SAID]
    agree(seen.of(runs), model, runs, over, "2.resid")


def test_only_the_rows_of_the_span_are_kept():
    model = setup()
    seen, runs = said(model, SAID, "thinking")
    kept = sum(len(p.rows) for p in seen._passes)
    thought = sum(len(range(*t.spans["thinking"])) for t in runs if "thinking" in t.spans)
    closing = sum(len("</think") for t in runs if t.text.count("</think>"))  # thinking until its last character comes
    assert kept == thought + closing
    assert all(len(v) == len(p.rows) for p in seen._passes for v in p.values.values())


def test_markers_of_ones_own():
    model = setup()
    model.markers = Markers("((", "))")
    seen, runs = said(model, ["((one))two", "three", "((four))", "((five))six"], ("thinking", "answer"))
    assert [t.thinking for t in runs] == ["one", None, "four", "five"]
    agree(seen.of(runs), model, runs, ("thinking", "answer"), "2.resid")


def test_equal_texts_are_each_taken_once():
    """Rows may be treated unlike and yet say the same: each transcript has its own row's activations."""
    model = setup()
    apart = model.anatomy.tap(Site(3, "resid")).attach(
        model.module, lambda x: x + 1e-3 * torch.arange(len(x))[:, None, None]
    )
    with recording(model, at="3.resid", over="completion") as seen:
        runs = model.generate([QUESTIONS[0]] * 3, max_new_tokens=5)
    apart.remove()
    assert len({t.ids for t in runs}) == 1
    acts = seen.of(runs)
    first, *others = (acts.where(acts.transcript == i)["3.resid"] for i in range(3))
    for i, other in enumerate(others, start=1):
        torch.testing.assert_close(other - first, torch.full_like(first, i * 1e-3), rtol=1e-2, atol=1e-5)


def test_a_cache_whose_rows_are_repeated():
    model = setup()
    begun, then = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11, 12], [13, 14], [15, 16], [17, 18]])
    with recording(model, at="2.mid", over="all") as seen, torch.no_grad():
        cache = model.module(input_ids=begun, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        model.module(input_ids=then, past_key_values=cache)
    rows = torch.cat([begun.repeat_interleave(2, 0), then], 1).tolist()
    runs = [read_transcript(model.tokenizer, "", row[:3], row[3:]) for row in rows]
    agree(seen.of(runs), model, runs, "all", "2.mid")


def test_a_cache_that_was_cut():
    model = setup()
    with recording(model, at="2.mid", over="all"), torch.no_grad():
        cache = model.module(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        cache.crop(-1)
        with pytest.raises(ValueError, match="The 2 tokens in the cache were not recorded as they are"):
            model.module(input_ids=torch.tensor([[8]]), past_key_values=cache)


def test_several_calls_and_a_choice_of_transcripts():
    model = setup()
    with recording(model, at="1.resid", over="completion") as seen:
        first = model.generate(QUESTIONS[:2], max_new_tokens=5)
        second = model.generate(QUESTIONS[2:], max_new_tokens=7)
    runs = [second[1], first[0]]
    agree(seen.of(runs), model, runs, "completion", "1.resid")


def test_generation_is_what_it_was():
    model = setup()
    plain = model.generate(QUESTIONS, samples=2, max_new_tokens=8)
    with recording(model, at="**", over="all"):
        again = model.generate(QUESTIONS, samples=2, max_new_tokens=8)
    assert [t.ids for t in again] == [t.ids for t in plain]


@pytest.mark.parametrize("site", ["1.resid", "1.mid", "1.attn.out", "2.mlp.out", "1.attn.z.h2", "3.resid"])
def test_what_steers_or_silences_inside_is_recorded(site):
    """The block around or inside the other: what is kept is what the model went on with."""
    model = setup()
    vector = torch.ones(model.anatomy.width(Site.parse(site)))

    def steering():
        return steered(model, vector, strength=2.0, at=site, over="all", units="raw")

    sites = sorted({site, "1.attn.out"})  # to which the steering of 1.mid adds
    with recording(model, at=sites, over="all") as seen, steering():
        runs = model.generate(QUESTIONS, max_new_tokens=4)
    with steering():
        agree(seen.of(runs), model, runs, "all", sites)
    with recording(model, at="1.attn.z.h2", over="all") as seen, ablated(model, "1.attn.o.h2"):
        runs = model.generate(QUESTIONS[:2], max_new_tokens=2)
    assert not seen.of(runs)["1.attn.z.h2"].any()


def test_an_exception_leaves_nothing_behind():
    model = setup()

    def stop(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recording(model, at="1.resid"):
        model.module.generate(torch.tensor([[5, 6]]), logits_processor=[stop], max_new_tokens=2)
    with pytest.raises(ValueError, match="matches no site"), recording(model, at="9.resid"):
        pass
    assert hooks(model) == 0
    assert "generate" not in vars(model.module)


def test_layers_that_run_without_hooks():
    model = setup()
    block = model.module.model.layers[1]
    block.__class__ = type("Compiled", (block.__class__,), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with (
        pytest.raises(ValueError, match=r"hook on model\.layers\.1 never ran"),
        recording(model, at=["1.resid", "2.resid"]),
    ):
        model.generate("b?", max_new_tokens=3)
    assert hooks(model) == 0


def test_what_was_not_recorded():
    model = setup()
    with recording(model, at="1.resid", over="thinking") as seen:
        runs = model.generate("b?", max_new_tokens=3)
    with pytest.raises(ValueError, match="None of the 1 transcripts has a span thinking"):
        seen.of(runs)
    with recording(model, at="1.resid") as seen:
        model.generate("b?", max_new_tokens=3)
    with pytest.raises(
        ValueError, match="of 'c\\?' was not generated in this block, or not to its end: 1 texts went through"
    ):
        seen.of([model.transcript("c?", "1")])
    ids = torch.tensor([model.prompt_ids("b?")])
    with torch.no_grad():
        cache = model.module(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="in the cache were not"), recording(model, at="1.resid", over="all"):
            model.module(input_ids=ids[:, :1], past_key_values=cache)
    assert hooks(model) == 0
