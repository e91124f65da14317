"""What is coloured is what the spans are, and nothing of the text is lost."""

import html
import re
from itertools import pairwise

import pytest

from probes.activations import collect
from probes.showing import show_spans
from surgery.model import Model
from surgery.transcript import Transcript, positions
from tests.families import tiny

SAID = "<think>One a.\nTwo <b> & b.\n</think>say 3"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
COLOURED = re.compile(r"\x1b\[30;48;2;(\d+;\d+;\d+)m(.*?)\x1b\[0m", re.DOTALL)


@pytest.fixture(scope="module")
def model():
    return Model(*tiny("llama"))


def coloured(shown, span):
    """The text of a span, as a terminal colours it in the first transcript."""
    colour = shown.colours[shown.over.index(span)]
    wanted = ";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    body = str(shown).split("\n", 3)[3]
    return "".join(text for found, text in COLOURED.findall(body) if found == wanted)


@pytest.mark.parametrize("over", ["thinking", "answer", "prompt", "sentence[1]", "/a|b/", "thinking[-1]", "all"])
def test_the_tokens_that_collect_reads(model, over):
    transcript = model.transcript("why?", SAID)
    shown = show_spans(transcript, over)
    read = collect(model, [transcript], at="0.resid", over=over).position.tolist()
    text = "".join(transcript.text[slice(*transcript.offsets[p])] for p in read)
    assert coloured(shown, over) == text.replace("\n", "↵")
    assert shown.counts == (((len(read),), len(transcript.ids)),)


def harmless(text):
    return text.replace("\x1b", "\\x1b").replace("\r", "\\x0d")


def test_no_text_is_lost_or_doubled(model):
    places = ((0, 3), (2, 3), (3, 6), (6, 8))  # the second token is the rest of a character that the first begins
    escape = Transcript("q", (1, 2, 3, 4), "b\x1b\r[2J c", places, {"all": (0, 4), "completion": (1, 4)}, True)
    runs = [model.transcript("why?", SAID), escape]
    shown = show_spans(runs, ("thinking", "/Two/", "completion"))
    for transcript, pieces in zip(runs, shown.pieces, strict=True):
        assert "".join(p.text for p in pieces) == harmless(transcript.text)
        assert all(a.span != b.span for a, b in pairwise(pieces))
    plain = ANSI.sub("", str(shown)).replace("↵", "")
    for transcript in runs:
        assert harmless(transcript.text) in plain
    marked = re.sub(r"<[^>]*>", "", shown._repr_html_())
    assert html.escape(runs[0].text) in marked.replace("↵", "")


def test_text_between_tokens_belongs_to_none():
    transcript = Transcript("q", (1, 2), "ab  cd.", ((0, 2), (4, 6)), {"all": (0, 2)}, True)
    assert [(p.text, p.span) for p in show_spans(transcript, "all[1]").pieces[0]] == [
        ("ab  ", None),
        ("cd", 0),
        (".", None),
    ]


def test_a_token_in_two_spans_has_the_colour_of_the_first(model):
    transcript = model.transcript("why?", SAID)
    shown = show_spans(transcript, ("sentence[0]", "thinking", "completion"))
    sets = [set(positions(transcript, name)) for name in shown.over]
    assert shown.counts[0][0] == (len(sets[0]), len(sets[1] - sets[0]), len(sets[2] - sets[1]))


def test_a_transcript_without_the_span_says_so(model):
    shown = show_spans([model.transcript("q", "3"), model.transcript("q", SAID)], "thinking")
    assert f"transcript 0: thinking 0 of {len(model.transcript('q', '3').ids)} tokens" in str(shown)
    assert [p.span for p in shown.pieces[0]] == [None]
    assert "transcript 0: thinking 0 of" in shown._repr_html_()


def test_a_coloured_line_ends_before_the_break(model):
    for line in str(show_spans(model.transcript("q", SAID))).split("\n"):
        assert line.count("\x1b[30;") == line.count("\x1b[0m")
        assert not ANSI.findall(line) or ANSI.findall(line)[-1] == "\x1b[0m"


def test_colours(model):
    transcript = model.transcript("q", SAID)
    shown = show_spans(transcript, ("thinking", "answer"), colours={"answer": "#102030"})
    assert shown.colours[1] == "#102030"
    assert "48;2;16;32;48m" in str(shown)
    assert "background: #102030" in shown._repr_html_()
    many = show_spans(transcript, [f"thinking[{i}]" for i in range(9)])
    assert len(set(many.colours)) == 7
    for wrong in ({"answer": "red"}, {"prompt": "#102030"}):
        with pytest.raises(ValueError, match="colours are #rrggbb, for thinking, answer"):
            show_spans(transcript, ("thinking", "answer"), colours=wrong)
    with pytest.raises(ValueError, match="'poem' is not a span"):
        show_spans(transcript, "poem")
