"""Spans of every kind of completion."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery.transcript import Transcript, positions, read_transcript
from tests.families import characters

TOKENIZER = characters()
EOS = TOKENIZER.eos_token_id


def read(completion: str, *, eos: bool = True, prompt: str = "Q: <think>no</think>\n"):
    ids = [TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion)]
    return read_transcript(TOKENIZER, "Q", ids[0], ids[1] + [EOS] * eos, task="sum")


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize(
    ("completion", "thinking", "answer"),
    [
        ("<think>\n1 + 2 = 3\n</think>\n-13", "1 + 2 = 3", "-13"),
        ("<think></think>5", "", "5"),
        ("so <think>a</think>b</think>", "a", "b</think>"),
        ("just five", None, "just five"),
        ("<think>\nand on", "and on", None),
        ("<think>", "", None),
        ("<think>a</think>", "a", None),
        ("<think>a</think>\n \n", "a", None),
    ],
)
def test_spans(completion, thinking, answer, eos):
    t = read(completion, eos=eos)
    assert (t.thinking, t.answer, t.finished) == (thinking, answer, eos)
    assert t.spans["all"] == (0, len(t.ids))
    assert t.spans["prompt"][1] == t.spans["completion"][0]
    if t.answer is not None:
        assert t.spans["answer"][1] == len(t.ids) - eos
    assert t.meta == {"task": "sum"}


def test_nothing_after_the_end_and_nothing_at_all():
    t = read_transcript(TOKENIZER, "Q", [5, 6], [7, EOS, EOS, 8])
    assert t.ids == (5, 6, 7, EOS)
    assert t.finished
    assert read("", eos=False).spans.keys() == {"all", "prompt", "completion"}
    with pytest.raises(
        ValueError, match=r"The transcript of 'Q' has no span 'thinking'; it has all, prompt, completion, answer"
    ):
        read("five").require("thinking")


def merged():
    """Characters, and tokens across the markers' borders: a line break with '<', '>' with a line break, two digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = dict(TOKENIZER.get_vocab().items())
    vocabulary = {**base, "Ċ<": len(base), ">Ċ": len(base) + 1, "12": len(base) + 2}
    plain = Tokenizer(models.BPE(vocabulary, [("Ċ", "<"), (">", "Ċ"), ("1", "2")], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def test_tokens_that_reach_over_a_marker_are_in_neither():
    tokenizer = merged()
    ids = tokenizer("<think>\n12 + 1\n</think>\n13", add_special_tokens=False)["input_ids"]
    t = read_transcript(tokenizer, "Q", [], ids)
    assert (t.thinking, t.answer) == ("12 + 1", "13")


def test_tokens_that_do_not_encode_to_themselves():
    tokenizer = merged()
    text = "<think>\n12 + 1\n</think>\n13"
    apart = [tokenizer.get_vocab()[c.replace("\n", "Ċ").replace(" ", "Ġ")] for c in text]
    assert apart != tokenizer(text, add_special_tokens=False)["input_ids"]
    t = read_transcript(tokenizer, "Q", [], [*apart, tokenizer.eos_token_id])
    assert t.text == text + "<eos>"
    assert [t.text[b:e] for b, e in t.offsets] == [*text, "<eos>"]
    assert (t.thinking, t.answer) == ("12 + 1", "13")
    assert t.spans["thinking"] == (7, 15)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab1. !?\n", max_size=60))
def test_sentences_tile_the_thinking(inside):
    t = read(f"<think>{inside}</think>x")
    begin, end = t.spans["thinking"]
    assert t.text[t.offsets[begin][0] : t.offsets[end - 1][1]] == inside or end == begin
    if not inside.strip():
        assert t.sentences == ()
        return
    edges = [edge for span in t.sentences for edge in span]
    assert edges[0] == begin
    assert edges[-1] == end
    assert edges[1:-1:2] == edges[2:-1:2]
    assert all(t.span_text(s) for s in t.sentences)
    assert all("\n" not in (t.span_text(s) or "") for s in t.sentences)


def test_sentences_by_hand():
    t = read("<think>\n12.5 + 1 = 13.5\nGood. Is it? Yes\n\n</think>13.5")
    assert [t.span_text(s) for s in t.sentences] == ["12.5 + 1 = 13.5", "Good.", "Is it?", "Yes"]


def test_a_token_over_a_boundary_is_of_the_sentence_it_begins_in():
    offsets = ((0, 3), (3, 6), (6, 8), (8, 9))  # One|. T|wo|.
    t = Transcript("Q", (5, 6, 7, 8), "One. Two.", offsets, {"thinking": (0, 4)}, finished=False)
    assert t.sentences == ((0, 2), (2, 4))


def test_tokens_that_are_not_those_of_their_text_and_half_characters():
    """What a model emits need not be how its tokenizer would write it; of a character in two tokens the last one has it."""
    letters = Tokenizer(models.BPE({"a": 0, "b": 1, "Ã": 2, "©": 3, "ab": 4}, [("a", "b")]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t = read_transcript(PreTrainedTokenizerFast(tokenizer_object=letters), "Q", [4], [0, 1, 2, 3, 0])
    assert t.text == "ababéa"
    assert t.offsets == ((0, 2), (2, 3), (3, 4), (4, 4), (4, 5), (5, 6))


def test_positions_of_spans_and_of_tokens_in_them():
    run = read("<think>one.\ntwo is not three.\n</think>not4", eos=False, prompt="not q")
    begin, end = run.spans["thinking"]

    def text(over):
        return "".join(run.text[slice(*run.offsets[i])] for i in positions(run, over))

    assert positions(run, "thinking") == list(range(begin, end))
    assert positions(run, "thinking[-1]") == [end - 1]
    assert positions(run, "thinking[:3]") == [begin, begin + 1, begin + 2]
    assert positions(run, "thinking[999]") == positions(run, "thinking[-999]") == []
    assert positions(run, ["answer", "thinking[0]", "thinking[:2]"]) == [begin, begin + 1, *range(*run.spans["answer"])]
    assert text("sentence[0]").strip() == "one."
    assert text("sentence[-1]").strip() == "two is not three."
    assert positions(run, "sentence") == positions(run, "sentence[:]") == list(range(begin, end))
    assert text("/not/") == "notnot"  # of the completion, not of the prompt
    assert positions(run, "prompt~/not/") == [0, 1, 2]
    assert text("answer~/n.t/") == "not"
    assert positions(run, "thinking~/four/") == []


def test_spans_that_are_absent_or_do_not_exist():
    bare = read("4")
    assert positions(bare, ["thinking", "thinking[-1]", "sentence[0]", "thinking~/a/"]) == []
    for over in ("thinkin", "thinking[", "thinking[a]", "412", "poem~/a/"):
        with pytest.raises(ValueError, match=r"is not a span\. Ask for prompt, completion, thinking.*or prompt~/not/"):
            positions(bare, over)
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing \)"):
        positions(bare, "/(/")


@pytest.mark.parametrize(
    ("completion", "thinking", "answer"),
    [
        ("1 + 2 = 3\n</think>\n3", "1 + 2 = 3", "3"),
        ("and on", "and on", None),
        ("</think>3", "", "3"),
        ("", None, None),
    ],
)
def test_a_prompt_that_opens_the_thinking(completion, thinking, answer):
    t = read(completion, prompt="Q: what?\nassistant: <think>\n")
    assert (t.thinking, t.answer) == (thinking, answer)
