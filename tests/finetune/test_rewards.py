"""Each reward is its formula, on transcripts read from text; what is missing abstains or counts as said."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.tasks import Question, grade
from finetune.rewards import Answer, CosineLength, NearLength, Overlong, ThinkFormat, Weighted, described
from surgery.transcript import Markers, Transcript, read_transcript
from tests.families import VOCABULARY, characters

TOKENIZER = characters()
QUESTION = Question("2 + 2?", "4")


def said(text: str, end: bool = True) -> Transcript:
    """A transcript of one token a character; the end token is one more."""
    ids = [VOCABULARY[{" ": "Ġ", "\n": "Ċ"}.get(c, c)] for c in text]
    return read_transcript(TOKENIZER, "2 + 2?", [1], ids + [TOKENIZER.eos_token_id] * end)


def goes_on(text: str, prompt: str = "2 + 2?<think>\n") -> Transcript:
    """What is said after a prompt that has opened the thinking."""
    ids = [[VOCABULARY[{" ": "Ġ", "\n": "Ċ"}.get(c, c)] for c in part] for part in (prompt, text)]
    return read_transcript(TOKENIZER, "2 + 2?", *ids)


def of_length(tokens: int, answer: str = "4") -> Transcript:
    return said("x" * (tokens - 2) + " " + answer, end=False)


# --- the answer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "three"),
    [
        ("<think>two and two</think>4", 1.0, 1.0),
        ("4", 1.0, 1.0),
        ("<think>two</think>5", 0.0, 0.1),
        ("<think>never closed 4", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_answer_grades(text: str, plain: float, three: float) -> None:
    assert Answer(grade)(QUESTION, said(text)) == plain
    assert Answer(grade, wrong=0.1)(QUESTION, said(text)) == three
    assert Answer(grade, missing=None)(QUESTION, said(text)) == (plain if said(text).answer else None)
    assert Answer(grade, right=-2.0)(QUESTION, said(text)) == (-2.0 if plain else 0.0)


# --- the format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>so</think>4", True),
        ("<think>so</think>\n4\n", True),
        ("<think></think>4", False),
        ("<think> </think>4", False),
        ("<think>so</think>", False),
        ("<think>so</think> ", False),
        ("<think>so 4", False),
        ("so</think>4", False),
        ("4", False),
        ("", False),
        ("Well, <think>so</think>4", False),
        ("<think>so</think>4<think>more</think>5", False),
        ("<think>so<think>so</think>4", False),
        ("<think>so</think>4</think>", False),
        ("</think>so<think>4", False),
    ],
)
def test_format_is_one_thinking_at_the_start_and_an_answer(text: str, good: bool) -> None:
    assert ThinkFormat()(QUESTION, said(text)) == float(good)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("so</think>4", True),
        ("so\n</think>\n4\n", True),
        ("</think>4", False),
        ("so</think>", False),
        ("so 4", False),
        ("<think>so</think>4", False),
        ("so</think>4</think>", False),
        ("so</think>4<think>more</think>5", False),
        ("", False),
    ],
)
def test_format_goes_on_where_the_prompt_has_opened_the_thinking(text: str, good: bool) -> None:
    assert ThinkFormat()(QUESTION, goes_on(text)) == float(good)
    assert ThinkFormat()(QUESTION, goes_on(text, "Say <think>, then 4.")) == ThinkFormat()(QUESTION, said(text))


def test_format_takes_other_markers() -> None:
    other = Markers("[", "]")
    ids = [VOCABULARY[c] for c in "[so]4"]
    transcript = read_transcript(TOKENIZER, "2 + 2?", [1], ids, other)
    assert ThinkFormat(other)(QUESTION, transcript) == 1
    assert ThinkFormat()(QUESTION, transcript) == 0


# --- lengths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "value"), [(10, 0.0), (5, -0.5), (15, -0.5), (20, -1.0), (90, -1.0), (0, -1.0)])
def test_near_length_falls_on_either_side(tokens: int, value: float) -> None:
    assert NearLength(10)(QUESTION, said(f"<think>{'x' * tokens}</think>4")) == pytest.approx(value)


def test_near_length_counts_the_span_asked_for_and_none_of_it_as_no_tokens() -> None:
    assert NearLength(10, over="answer")(QUESTION, said("x" * 10)) == 0
    assert NearLength(10)(QUESTION, said("x" * 10)) == -1


def test_leaving_the_thinking_out_does_not_pay() -> None:
    """Of right answers, one with a thinking too short is worth more than one without any."""
    reward = Weighted({"answer": (Answer(grade), 1.0), "length": (NearLength(10), 0.5)})
    near, short, bare = (
        reward(QUESTION, said(f"{text}4")) for text in ("<think>xxxxxxxxx</think>", "<think>x</think>", "")
    )
    assert near is not None
    assert short is not None
    assert bare is not None
    assert near > short > bare


@given(n=st.integers(2, 300), longest=st.integers(1, 200), right=st.booleans())
@settings(max_examples=60, deadline=None)
def test_cosine_length_is_its_formula(n: int, longest: int, right: bool) -> None:
    found = CosineLength(grade, longest)(QUESTION, of_length(n, "4" if right else "5"))
    low, high = (0.5, 1.0) if right else (-1.0, -0.5)
    share = min(n, longest) / longest if right else 1 - min(n, longest) / longest
    assert found == pytest.approx(low + 0.5 * (high - low) * (1 + math.cos(math.pi * share)))


def test_cosine_length_prefers_short_right_and_long_wrong_answers() -> None:
    reward = CosineLength(grade, 50)
    right, wrong = ([reward(QUESTION, of_length(n, a)) for n in (5, 20, 49)] for a in ("4", "5"))
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)
    assert min(right) > max(wrong)


def test_cosine_length_beyond_and_missing() -> None:
    reward = CosineLength(grade, 50, beyond=-10.0)
    assert [reward(QUESTION, of_length(n)) for n in (50, 51)] == [-10.0, -10.0]
    assert reward(QUESTION, of_length(49)) > 0
    assert reward(QUESTION, said("<think>no answer")) < 0
    assert CosineLength(grade, 50, over="thinking")(QUESTION, said("4")) is None
    assert CosineLength(grade, 50, right=(2.0, 0.0))(QUESTION, of_length(25)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("tokens", "value"), [(1, 0.0), (60, 0.0), (61, -1 / 40), (80, -0.5), (100, -1.0), (400, -1.0)]
)
def test_overlong_is_dapos_equation(tokens: int, value: float) -> None:
    assert Overlong(100, 40)(QUESTION, said("x" * tokens, end=False)) == pytest.approx(value)
    whole = Overlong(100, 100)  # from the first token on
    assert whole(QUESTION, said("x" * tokens, end=False)) == pytest.approx(-min(tokens / 100, 1))


# --- sums ---------------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_adds_what_does_not_abstain() -> None:
    cosine = CosineLength(grade, 10, over="thinking")
    reward = Weighted({"answer": (Answer(grade), 2.0), "cosine": (cosine, 0.5), "seen": (ThinkFormat(), 0.0)})
    full, bare = said("<think>xxxxx</think>4"), said("4")
    assert reward.each(QUESTION, full) == {"answer": 1.0, "cosine": pytest.approx(0.75), "seen": 1.0}
    assert reward(QUESTION, full) == pytest.approx(2.0 + 0.375)
    assert reward.each(QUESTION, bare) == {"answer": 1.0, "cosine": None, "seen": 0.0}
    assert reward(QUESTION, bare) == 2.0
    assert Weighted({"cosine": (cosine, 1.0)})(QUESTION, bare) is None


def test_a_part_of_weight_0_only_measures() -> None:
    answer = Answer(grade, missing=None)
    reward = Weighted({"answer": (answer, 1.0), "length": (Overlong(256, 64), 0.0)})
    for transcript in (said("<think>two</think>4"), said("5"), said("<think>no answer")):
        assert reward(QUESTION, transcript) == answer(QUESTION, transcript)
        assert reward.each(QUESTION, transcript)["length"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weighted({}), "Weights"),
        (lambda: Weighted({"a": (ThinkFormat(), 0.0)}), "not 0"),
        (lambda: Weighted({"a": (ThinkFormat(), math.nan)}), "nan"),
        (lambda: NearLength(0), "target"),
        (lambda: CosineLength(grade, 0), "longest=0"),
        (lambda: Overlong(10, 0), "buffer"),
        (lambda: Overlong(10, 11), "buffer"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_description_is_the_same_in_another_process_and_tells_settings_apart() -> None:
    code = (
        "from finetune.rewards import *; from analyses.tasks import grade;"
        "print(described(Weighted({'a': (Answer(grade, wrong=0.1), 1.0), 'b': (Overlong(9, 3), 0.5)})))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == described(Weighted({"a": (Answer(grade, wrong=0.1), 1.0), "b": (Overlong(9, 3), 0.5)}))
    assert "analyses.tasks.grade" in there
    assert described(Answer(grade)) != described(Answer(grade, wrong=0.1))
    assert described(Answer(grade)) != described(Answer(lambda q, t: True))


def test_importing_rewards_is_cheap() -> None:
    code = "import sys, finetune.rewards; print([m for m in ('trl', 'transformers', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
