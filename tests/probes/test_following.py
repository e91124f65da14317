"""What a token is depends on the tokens up to it: the same with a cache and without, wherever the padding is, whatever the batch."""

import copy
import itertools
import random
from contextlib import ExitStack
from itertools import chain

import pytest
import torch
from transformers import DynamicCache

from analyses.controls import planted_tokenizer
from probes.activations import collect
from probes.following import _Reader, following
from probes.recorder import recording
from probes.steering import steered
from surgery.decoding import pad_after_prefix, prefix_cache
from surgery.model import Model
from surgery.rows import rows_apart, rows_are, select_rows
from surgery.transcript import Markers, positions, read_transcript
from tests.families import FAMILIES, tiny

TEXTS = [
    "<think>ab\ncd.</think>yes",
    "<think></think>no",
    "no thoughts at all",
    "<think>never closed > < and </thin",
    "so: <think>a < b</think>\n\nfine</think> <think>again</think>",
    "<thin><think>x",
]
SPANS = [
    "all",
    "prompt",
    "completion",
    "thinking",
    "answer",
    "prompt[-1]",
    "prompt[2:-1]",
    "prompt~/s/",
    "thinking[0]",
    "thinking[:3]",
]
SPANS += ["answer[1:]", "completion[2:5]", "all[:4]"]
SLOW = ["/a./", "thinking~/[ac]/", "sentence[0]", "sentence[1:]", "all~/s|[ac]/", "all~/(s|a): ?<?/"]


def setup(family="llama"):
    model = Model(*tiny(family))
    return model, [model.transcript("s" * (1 + 2 * (i % 3)), text) for i, text in enumerate(TEXTS)]


class Seen:
    """The masks of each pass, by the row's item and the position of the token."""

    def __init__(self, model, spans):
        self.model, self.spans, self.found, self.passes = model, spans, {}, 0

    def __enter__(self):
        self.context = following(self.model)
        follower = self.context.__enter__()

        def look(*_):
            self.passes += 1
            places, items = follower.position.tolist(), follower.items.tolist()
            masks = {span: follower.mask(span).tolist() for span in self.spans}
            for span, mask in masks.items():
                for item, place, row in zip(items, places, mask, strict=True):
                    for at, member in zip(place, row, strict=True):
                        assert at >= 0 or not member
                        if at >= 0 and item >= 0:
                            self.found.setdefault((item, span), {})[at] = member

        backbone = self.model.module.get_submodule(self.model.anatomy.blocks)[0]
        self.hook = backbone.register_forward_pre_hook(look, with_kwargs=False)
        return self

    def __exit__(self, *error):
        self.hook.remove()
        self.context.__exit__(*error)

    def members(self, item, span):
        return [at for at, member in sorted(self.found[item, span].items()) if member]


def padded(rows, pad, where):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    if where == "between":
        return pad_after_prefix(rows, pad)[:2]
    for i, row in enumerate(rows):
        here = slice(width - len(row), None) if where == "left" else slice(0, len(row))
        ids[i, here], mask[i, here] = torch.tensor(row), 1
    return ids, mask


def by_definition(model, transcript, span):
    """A token is in a span if the transcript up to it says so of its last token. After the thinking, answer begins at once."""
    prompt = transcript.spans["prompt"][1]
    if span.startswith("prompt"):
        return positions(transcript, span)
    asked = read_transcript(model.tokenizer, "", transcript.ids[:prompt], (), model.markers)
    found = positions(asked, span) if span.startswith("all") else []  # of the prompt all is known at once
    for at in range(prompt, len(transcript.ids)):
        known = read_transcript(
            model.tokenizer, "", transcript.ids[:prompt], transcript.ids[prompt : at + 1], model.markers
        )
        if at in positions(known, span):
            found.append(at)
    return found


@pytest.mark.parametrize("where", ["left", "right", "between"])
@torch.no_grad()
def test_finished_texts_are_read_by_definition(where):
    model, runs = setup()
    runs = [t for t in runs if "\n\n" not in t.completion]  # blanks after the thinking are answer at once: see below
    assert len(runs) == 5
    ids, mask = padded([list(t.ids) for t in runs], model.pad_id, where)
    with Seen(model, SPANS + SLOW) as seen, rows_are([t.spans["prompt"][1] for t in runs]):
        model.module(input_ids=ids, attention_mask=mask)
    for i, t in enumerate(runs):
        for span in SPANS + SLOW:
            assert seen.members(i, span) == by_definition(model, t, span), (t.text, span)
        assert sorted(seen.found[i, "all"]) == list(range(len(t.ids)))


@torch.no_grad()
def test_markers_of_one_token_give_the_transcripts_spans():
    tokenizer, draw = planted_tokenizer(), random.Random(0)
    model = Model(tiny("llama")[0], tokenizer)
    words = ["a", "k", "\n", "1", "<think>", "</think>", "<end>"]
    for _ in range(60):
        text = "".join(draw.choices(words, weights=[4, 4, 2, 2, 2, 2, 1], k=12))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = draw.randrange(1, 4)
        run = read_transcript(tokenizer, "", ids[:prompt], ids[prompt:], model.markers)
        with Seen(model, ["thinking", "completion", "answer", "thinking[1:]"]) as seen, rows_are([prompt]):
            model.module(input_ids=torch.tensor([ids]))
        for span in ("completion", "thinking", "thinking[1:]"):
            assert seen.members(0, span) == positions(run, span), text
        if "thinking" in run.spans and "answer" in run.spans:
            assert seen.members(0, "answer")[-len(positions(run, "answer")) :] == positions(run, "answer"), text


def pieces(words, decoder="Fuse"):
    """A tokenizer of given words, whatever markers they cut through."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.decoder = getattr(decoders, decoder)()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=words[0], eos_token=words[1])


@torch.no_grad()
def test_tokens_that_reach_over_markers():
    words = [
        "<pad>",
        "<end>",
        "<think",
        "></",
        "think>",
        "<think>",
        "</think>",
        "a",
        "k>",
        "<thin",
        "></think>",
        "<think>b",
    ]
    tokenizer, draw = pieces(words), random.Random(0)
    model, both = Model(tiny("llama")[0], tokenizer), 0
    for _ in range(120):
        ids = [7, *draw.choices(range(2, len(words)), k=9)]
        with Seen(model, ["thinking", "answer"]) as seen, rows_are([1]):
            model.module(input_ids=torch.tensor([ids]))
        text = read_transcript(tokenizer, "", ids[:1], ids[1:], model.markers)
        for span in ("thinking", "answer"):
            assert seen.members(0, span) == by_definition(model, text, span), text.text
        both += "thinking" in text.spans and "answer" in text.spans
    assert both > 30


@torch.no_grad()
def test_markers_whose_characters_are_several_tokens():
    """By the byte: « and » are two each, and neither token alone is a character."""
    tokenizer, draw = pieces(["<pad>", "<end>", "a", "b", "Â", "«", "»"], "ByteLevel"), random.Random(0)
    model = Model(tiny("llama")[0], tokenizer, markers=Markers("«", "»"))
    for _ in range(20):
        first, then, last = (draw.choices([[2], [3], [4, 5], [4, 6]], k=3) for _ in range(3))
        ids = [2, *chain(*first, [4, 5], *then, [4, 6], *last)]
        with Seen(model, ["thinking", "answer"]) as seen, rows_are([1]):
            model.module(input_ids=torch.tensor([ids]))
        text = read_transcript(tokenizer, "", ids[:1], ids[1:], model.markers)
        for span in ("thinking", "answer"):
            assert seen.members(0, span) == by_definition(model, text, span), text.text


@torch.no_grad()
def test_where_it_differs_from_the_whole_text():
    """Of a marker of several tokens only the last one tells; and what follows the thinking is answer at once."""
    model, _ = setup()
    run = model.transcript("s", "<think>ab</think>\n\n")
    start, end = run.spans["thinking"]
    with Seen(model, ["thinking", "answer"]) as seen, rows_are([run.spans["prompt"][1]]):
        model.module(input_ids=torch.tensor([run.ids]))
    assert seen.members(0, "thinking") == [*range(start, end), *range(end, end + len("</think"))]
    opening = range(start - len("<think>"), start - 1)
    assert "answer" not in run.spans
    assert seen.members(0, "answer") == [*opening, *range(end + len("</think>"), end + len("</think>\n\n"))]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_sees_what_reading_sees(family):
    """A generation, prompts padded and their prefix shared or not, and the same tokens read in one pass."""
    model = Model(*tiny(family))
    spans = ["all", "completion", "thinking", "answer", "completion[2:5]", "prompt", "/a|b|c|d|e/"]
    with Seen(model, spans) as seen:
        runs = model.generate(["one", "two and two", "o", "on"], max_new_tokens=9, batch_size=3)
    assert seen.passes >= 2 * 9
    ids, mask = padded([list(t.ids) for t in runs], model.pad_id, "right")
    with Seen(model, spans) as read, rows_are([t.spans["prompt"][1] for t in runs]):
        model.module(input_ids=ids, attention_mask=mask)
    for key, members in read.found.items():
        mine = seen.found[key]
        last = len(runs[key[0]].ids) - 1
        assert all(mine[at] == member for at, member in members.items() if at in mine)
        shared = set(members) - set(mine) - {last}  # the last token is never read
        assert all(key[1] in ("all", "prompt") or not members[at] for at in shared)


@torch.no_grad()
def test_forced_words_are_followed_through_a_cache():
    """Rows of thought put through a cache token by token, in chunks, with the cache copied, repeated and cut back."""
    model, runs = setup()
    run = runs[0]
    prompt, ids = run.spans["prompt"][1], torch.tensor([run.ids])
    spans = ["thinking", "answer", "completion", "thinking[1:3]"]
    with Seen(model, spans) as whole, rows_are([prompt]):
        model.module(input_ids=ids)
    for sizes in ([1] * len(run.ids), [5, 1, 9, 2, 100], [prompt, 100], [prompt + 3, 100]):
        with Seen(model, spans) as seen, rows_are([prompt]):
            cache, at = None, 0
            for size in sizes:
                piece = ids[:, at : at + size]
                if piece.shape[1]:
                    cache = copy.deepcopy(
                        model.module(input_ids=piece, past_key_values=cache, use_cache=True).past_key_values
                    )
                at += size
        assert seen.found == whole.found
    with Seen(model, spans) as seen:
        with rows_are([prompt]):
            cache = model.module(input_ids=ids[:, :-2], use_cache=True).past_key_values
        cache.crop(-(ids.shape[1] - 2 - prompt - 4))  # so many fewer
        assert cache.get_seq_length() == prompt + 4
        cache.batch_repeat_interleave(2)
        model.module(input_ids=ids[:, prompt + 4 :].repeat(2, 1), past_key_values=cache)
    assert {k: v for k, v in seen.found.items() if k[0] == 0} == whole.found
    assert [v for k, v in seen.found.items() if k[0] == 1] == [
        {at: m for at, m in v.items() if at >= prompt + 4} for v in whole.found.values()
    ]


@torch.no_grad()
def test_rows_repeated_halfway():
    """Each copy of a row goes on from where its own row was."""
    model, _ = setup()
    texts = ["<think>ab</think>c", "no thoughts, say I"]
    runs = [model.transcript("s", text) for text in texts]
    ids, prompt = torch.tensor([t.ids for t in runs]), runs[0].spans["prompt"][1]
    half = prompt + 9
    with Seen(model, ["thinking", "thinking[1:]"]) as seen, rows_are([prompt, prompt]):
        cache = model.module(input_ids=ids[:, :half], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with rows_are([prompt] * 4, [0, 2, 1, 3]):
            model.module(input_ids=ids[:, half:].repeat_interleave(2, 0), past_key_values=cache)
    for span in ("thinking", "thinking[1:]"):
        assert seen.members(0, span) == by_definition(model, runs[0], span)
        assert seen.members(2, span) == [at for at in seen.members(0, span) if at >= half] != []
        assert seen.members(1, span) == seen.members(3, span) == []
    asked = []
    with following(model) as follower, rows_are([3, 5], [7, 2]):  # of two that were said to come, each twice
        look = model.module.base_model.layers[0].register_forward_pre_hook(
            lambda *_: asked.extend([follower.items.tolist(), follower.mask("completion").sum(1).tolist()])
        )
        model.module(input_ids=ids[:1, :6].expand(4, -1))
        look.remove()
    assert asked == [[7, 7, 2, 2], [3, 3, 1, 1]]


@torch.no_grad()
def test_several_follow_one_cache_as_each_alone(monkeypatch):
    """Whatever they ask for, whichever markers theirs are, with a cache that is cut back and whose rows leave and change places; and nothing that
    is still there is read again."""
    model, runs = setup()
    other = Model(model.module, model.tokenizer, markers=Markers("a", "e"))
    asking = [(model, ["thinking", "answer[1:]"]), (other, ["thinking", "answer"]), (model, ["completion"])]
    runs = [runs[i] for i in (0, 2, 3)]
    prompts = [t.spans["prompt"][1] for t in runs]
    width = min(len(t.ids) for t in runs)
    ids, read, reads = torch.tensor([t.ids[:width] for t in runs]), _Reader.read, []
    monkeypatch.setattr(_Reader, "read", lambda *given: reads.append(given) or read(*given))

    def followed(asking):
        reads.clear()
        with ExitStack() as stack:
            seen = [stack.enter_context(Seen(*one)) for one in asking]
            with rows_are(prompts):
                taken_back = torch.cat([ids[:, :-6], ids[:, :2]], dim=1)
                cache = model.module(input_ids=taken_back, use_cache=True).past_key_values
            cache.crop(-2)
            for end, rows in ((-5, [0, 1, 2]), (-4, [2, 0, 1]), (-3, [0, 1]), (-2, [1, 0]), (-1, [1])):
                kept = torch.tensor(rows) if end == -5 else kept[rows]
                select_rows(cache, torch.tensor(rows))
                with rows_are([prompts[i] for i in kept], kept.tolist()):
                    model.module(input_ids=ids[kept, end - 1 : end], past_key_values=cache)
        return [one.found for one in seen], len(reads)

    alone = [followed([one]) for one in asking]
    once = sum(width - 4 - prompt for prompt in prompts) + sum(width - 5 - prompt for prompt in prompts) + 3 + 2 + 2 + 1
    assert [times for _, times in alone] == [once, once, 0]
    for order in itertools.permutations(range(3)):
        found, times = followed([asking[i] for i in order])
        assert found == [alone[i][0][0] for i in order]
        assert times == sum(alone[i][1] for i in order)
    (mine,), (others,) = alone[0][0], alone[1][0]
    for (one, _), ((found,), _) in zip(asking, alone, strict=True):
        for (i, span), members in found.items():
            told = by_definition(one, runs[i], span)
            assert [at for at, member in sorted(members.items()) if member] == [at for at in told if at in members]
    assert all(set(mine[item, "thinking"].values()) == {True, False} for item in (0, 2))
    assert mine[0, "thinking"] != others[0, "thinking"]


def test_a_plain_generate_says_where_its_prompts_end():
    model, _ = setup()
    prompts = [model.prompt_ids(q) for q in ("one", "three")]
    ids, mask = padded(prompts, model.pad_id, "left")
    with Seen(model, ["completion", "prompt", "prompt[-1]"]) as seen:
        model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert "generate" in vars(model.module)
    assert "generate" not in vars(model.module)
    for i, row in enumerate(prompts):
        assert seen.members(i, "prompt") == list(range(len(row)))
        assert seen.members(i, "prompt[-1]") == [len(row) - 1]
        assert seen.members(i, "completion") == [len(row), len(row) + 1]
    with following(model), pytest.raises(ValueError, match="Beam search moves rows"):
        model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, num_beams=2)
    bare = model.module.generate(max_new_tokens=2, do_sample=False)
    with following(model):
        assert torch.equal(model.module.generate(max_new_tokens=2, do_sample=False), bare)
        model.module.generation_config.num_beams = 2
        with pytest.raises(ValueError, match="Beam search moves rows"):
            model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)


@torch.no_grad()
def test_a_prompt_may_come_in_pieces():
    model, runs = setup()
    ids, spans = torch.tensor([runs[0].ids]), ["prompt", "prompt[1:3]", "completion", "thinking[:3]", "answer"]
    width = runs[0].spans["prompt"][1]
    found = []
    for cuts in ([], [2, width - 1], [width]):
        cache = DynamicCache(config=model.module.config)
        with Seen(model, spans) as seen, rows_are(width=width):
            for begin, end in itertools.pairwise([0, *cuts, ids.shape[1]]):
                model.module(input_ids=ids[:, begin:end], past_key_values=cache)
        found.append(seen.found)
    assert found[0] == found[1] == found[2]
    whole = pytest.raises(ValueError, match=r"'prompt\[-1\]' needs the whole prompt in one pass")
    with whole, Seen(model, ["prompt[-1]"]), rows_are(width=width):
        model.module(input_ids=ids[:, :2])


@torch.no_grad()
def test_a_pattern_in_all_is_no_more_than_what_it_matches():
    model, _ = setup()
    with Seen(model, ["all~/t|a/"]) as seen, rows_apart():
        runs = model.generate(["two", "two and two"], max_new_tokens=12)
    for i, run in enumerate(runs):
        expected = [at for at in positions(run, "all~/t|a/") if at < len(run.ids) - 1]  # the last token is never read
        assert seen.members(i, "all~/t|a/") == expected
        assert 0 < len(expected) < len(run.ids) - 1


@torch.no_grad()
def test_a_shared_prefix_is_prompt():
    model, _ = setup()
    rows = [[4, 5, 6, 7], [4, 5, 6, 8, 9]]
    with Seen(model, ["prompt", "prompt[-1]", "completion", "thinking"]) as seen, rows_are([4, 5]):
        prefix_cache(model.module, rows[0][:3], 2)
        assert seen.passes == 1
    with following(model) as follower, rows_are([4, 5], [0, 1]):
        asked = []
        hook = model.module.base_model.layers[0].register_forward_pre_hook(
            lambda *_: (asked.append(follower.items.tolist()), follower.mask("prompt[-2:]"))
        )
        with pytest.raises(ValueError, match=r"'prompt\[-2:\]' is not the same in the rows that share this prefix"):
            prefix_cache(model.module, rows[0][:3], 2)
        with rows_apart():
            assert prefix_cache(model.module, rows[0][:3], 2) is None
        hook.remove()
    assert asked == [[-1]]  # it is neither of the two


@pytest.mark.parametrize("over", ["thinking", "completion", "answer", "prompt", "prompt[-1]", "all"])
def test_several_samples_go_on_from_the_same_thoughts(over):
    """What they share is more than their prompt, and is followed as that of each by itself."""
    model, _ = setup()
    prompt, ids = model.prompt_ids("s"), model.tokenizer("<think>abc</think>d", add_special_tokens=False)["input_ids"]
    begun = [read_transcript(model.tokenizer, "s", prompt, ids, model.markers)]
    options = {"temperature": 1.0, "seed": 2, "max_new_tokens": 6}
    v = torch.randn(model.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    with steered(model, v, strength=2, at="1.resid", over=over), recording(model, at="1.resid", over=over) as seen:
        together = model.continued(begun, samples=3, **options)
        acts = seen.of(together)
    with steered(model, v, strength=2, at="1.resid", over=over), rows_apart():
        apart = model.continued(begun, samples=3, **options)
        expected = collect(model, together, at="1.resid", over=over)
    assert [t.ids for t in together] == [t.ids for t in apart]
    if over in ("completion", "answer", "all"):  # also what is written on
        assert [t.ids for t in together] != [t.ids for t in model.continued(begun, samples=3, **options)]
    kept = [
        i for i, at in enumerate(expected.position.tolist()) if at < len(together[int(expected.transcript[i])].ids) - 1
    ]
    torch.testing.assert_close(acts["1.resid"], expected["1.resid"][kept], rtol=1e-4, atol=1e-4)


def ask(model, question, *, rows=None, **given):
    asked = []
    with following(model) as follower:
        hook = model.module.base_model.layers[0].register_forward_pre_hook(lambda *_: asked.append(question(follower)))
        try:
            if rows is None:
                model.module(**given)
            else:
                with rows_are(rows):
                    model.module(**given)
        finally:
            hook.remove()


@torch.no_grad()
def test_what_cannot_be_followed():
    model, _ = setup()
    ids = torch.tensor([[4, 5, 6, 7]])
    for span in ("completion", "thinking", "prompt"):
        with pytest.raises(ValueError, match="Nobody said where the prompts of this pass end"):
            ask(model, lambda f, s=span: f.mask(s), input_ids=ids)
    ask(model, lambda f: f.mask("all"), input_ids=ids)
    for span in ("thinking[-1]", "completion[:-2]", "sentence[-1]", "answer[-3]"):
        with pytest.raises(ValueError, match="counts from an end that is not known while tokens come"):
            ask(model, lambda f, s=span: f.mask(s), rows=[2], input_ids=ids)
    with pytest.raises(ValueError, match="'poem' cannot be followed"):
        ask(model, lambda f: f.mask("poem"), rows=[2], input_ids=ids)
    with pytest.raises(ValueError, match="No span is named"):
        ask(model, lambda f: f.mask(()), rows=[2], input_ids=ids)
    with pytest.raises(ValueError, match="One row goes through, but 2 were announced"):
        ask(model, lambda f: f.mask("completion"), rows=[3, 9], input_ids=ids)  # past the end of the shorter prompt
    with pytest.raises(ValueError, match="needs the whole prompt in one pass"):  # which the second row's goes on after
        ask(model, lambda f: f.mask("prompt~/s/"), rows=[4, 9], input_ids=ids)
    with pytest.raises(ValueError, match="2 rows go through, but 3 were announced"):
        ask(model, lambda f: f.mask("thinking"), rows=[2, 2, 2], input_ids=ids.repeat(2, 1))
    with pytest.raises(ValueError, match="given embeddings, not tokens"):
        ask(model, lambda f: f.mask("all"), inputs_embeds=torch.zeros(1, 3, model.anatomy.d_model))
    with pytest.raises(ValueError, match=r"The attention mask is \(1, 1, 4, 4\), which does not say"):
        ask(model, lambda f: f.mask("all"), input_ids=ids, attention_mask=torch.zeros(1, 1, 4, 4))
    cache = model.module(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="4 tokens in the cache were not followed"):
        ask(model, lambda f: f.mask("thinking"), rows=[2], input_ids=ids, past_key_values=cache)
    cache = DynamicCache(config=model.module.config)
    with following(model) as follower, rows_are([2]):
        stop = model.module.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.module(input_ids=ids, past_key_values=cache)
        stop.remove()
        with pytest.raises(RuntimeError, match="No forward pass is running"):
            follower.mask("all")
    with pytest.raises(ValueError, match="4 tokens in the cache were not followed"):  # the other layers lack them
        ask(model, lambda f: f.mask("thinking"), rows=[2], input_ids=ids, past_key_values=cache)
    cache = DynamicCache(config=model.module.config)
    with following(model), rows_are([2]):
        model.module(input_ids=ids, past_key_values=cache)
    model.module(input_ids=ids, past_key_values=cache)  # of which nobody knows
    with pytest.raises(ValueError, match="8 tokens in the cache were not followed"):
        ask(model, lambda f: f.mask("thinking"), rows=[2], input_ids=ids, past_key_values=cache)
    with following(model) as follower, pytest.raises(RuntimeError, match="No forward pass is running"):
        follower.mask("all")
    with pytest.raises(ValueError, match="Say where the prompts end"), rows_are():
        pass
    with pytest.raises(ValueError, match="1 rows have prompts, but 2 are said to be items"), rows_are([3], [0, 1]):
        pass


def test_nothing_is_left_behind():
    model, _ = setup()

    def failing():
        with following(model), following(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert "generate" not in vars(model.module)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())
    vars(model.module)["generate"] = own = lambda: None
    with following(model):
        assert model.module.generate is not own
    assert model.module.generate is own
    with following(model), ExitStack() as late:  # begun inside a pass, which it does not know
        begun = model.module.model.layers[0].register_forward_pre_hook(
            lambda *_: late.enter_context(following(model)) and None
        )
        model.module(input_ids=torch.tensor([[4, 5, 6, 7]]))
        begun.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


@torch.no_grad()
def test_a_template_that_opens_the_thinking():
    """As reasoners' have it: what is written begins in the thinking, decoded or read, and a teacher does not open it again."""
    module, tokenizer = tiny("llama")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant: {% endif", "assistant: <think>\n{% endif")
    model = Model(module, tokenizer)
    told = [
        model.transcript("s" * (1 + i), text)
        for i, text in enumerate(["<think>\nab\n</think>yes", "cd</think>no", "open"])
    ]
    assert [t.thinking for t in told] == ["ab", "cd", "open"]
    assert [t.answer for t in told] == ["yes", "no", None]
    spans = ["thinking", "answer", "thinking[:2]"]
    ids, mask = padded([list(t.ids) for t in told], model.pad_id, "left")
    with Seen(model, spans) as seen, rows_are([t.spans["prompt"][1] for t in told]):
        model.module(input_ids=ids, attention_mask=mask)
    for i, t in enumerate(told):
        for span in spans:
            assert seen.members(i, span) == by_definition(model, t, span), (i, span)
    with Seen(model, spans) as seen:
        runs = model.generate(["one", "two and two"], max_new_tokens=6)
    for i, run in enumerate(runs):
        assert set(seen.members(i, "thinking")) <= set(positions(run, "thinking")) != set()
