"""Labels of a probe: what cut-off answers allow to be said, and what cannot be asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from analyses.labels import graded_by, labels_of, long_or_short
from analyses.tasks import Question, grade, reasoning_gym
from probes.directions import Length
from surgery.transcript import Transcript


def told(thinking: int | None = 3, answer: str = "7", finished: bool = True, **meta) -> Transcript:
    """A transcript of a prompt, thinking of so many tokens, and an answer of one; without `answer` the cap cut off the thinking."""
    pieces = ["q", *["t"] * (thinking or 0), *([answer] if answer else [])]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    offsets = tuple((end - len(piece), end) for end, piece in zip(ends, pieces, strict=True))
    spans = {"prompt": (0, 1), "all": (0, len(pieces))}
    spans |= {} if thinking is None else {"thinking": (1, 1 + thinking)}
    spans |= {"answer": (len(pieces) - 1, len(pieces))} if answer else {}
    return Transcript("q", tuple(range(len(pieces))), "".join(pieces), offsets, spans, finished, meta)


def test_an_answer_is_right_wrong_or_missing():
    runs = [told(gold="7"), told(gold="8"), told(answer="", finished=False, gold="7")]
    found = labels_of(runs, "right")
    assert found.values == (1.0, 0.0, None)
    assert found.kind == "classes"
    assert str(found) == "2 of 3 transcripts have a label, 1 of them 1; 1 is a right answer, 0 a wrong one"
    with pytest.raises(ValueError, match=r"without their gold answers"):
        labels_of([told(), told(gold="1")], "right")
    with pytest.raises(ValueError, match=r"needs labels that differ, and all of them are 1 \("):
        labels_of(runs[:1], "right")
    with pytest.raises(ValueError, match=r"and there is none \(0 of 1"):
        labels_of(runs[2:], "right")


def test_answers_of_a_gym_task_are_graded_by_its_own_scorer():
    """The target by itself has the value of the gold expression, but it does not use the numbers as asked."""
    question = reasoning_gym("countdown", 1, seed=3)[0]
    right, wrong = told(answer=f"({question.answer})"), told(answer=str(question.meta["target"]))
    assert [grade(question, t) for t in (right, wrong)] == [True, False]
    runs = [replace(t, question=question.question, meta=graded_by(question)) for t in (right, wrong)]
    assert labels_of(runs, "right").values == (1.0, 0.0)
    with pytest.raises(ValueError, match="all of them are 1"):  # what the scorer looks at is needed
        labels_of([replace(t, meta={"gold": question.answer}) for t in runs], "right")


@pytest.mark.parametrize(
    "name", ["sudoku", "knights_knaves", "maze", "word_ladder", "shortest_path", "prime_factorization"]
)
def test_a_gym_task_is_graded_alike_after_a_round_trip(name):
    question = reasoning_gym(name, 1, seed=1)[0]
    again = json.loads(json.dumps(graded_by(question)))
    kept = Question(question.question, again["gold"], None, again["task"])
    for said in (question.answer, f"answer: {question.answer}", "7", "none at all"):
        assert grade(kept, said) == grade(question, said)


def test_what_json_would_change_is_not_kept_for_the_grading():
    kept = graded_by(Question("q", "7", None, {"source": "file", "line": 3}))
    assert kept == {"gold": "7", "task": {"source": "file", "line": 3}}
    assert json.loads(json.dumps(kept)) == kept
    for value in ({1: 2}, float("nan"), float("inf"), object()):
        assert graded_by(Question("q", "7", None, {"source": "x", "more": value})) == {"gold": "7"}


def test_what_was_cut_off_is_long_or_not_known_and_never_short():
    lengths = [Length(2, False), Length(9, False), Length(9, True), Length(1, True), None, Length(3, False)]
    assert long_or_short(lengths) == ([0, 1, 1, None, None, 0], 9)
    # every cut by hand: the most even one
    assert long_or_short([Length(n, False) for n in (1, 2, 3, 4, 4, 4)])[1] == 4
    assert long_or_short([Length(n, False) for n in (5, 5, 5, 6)]) == ([0, 0, 0, 1], 6)
    for hopeless in ([Length(4, True), Length(6, True)], [Length(3, False)] * 4, [Length(3, True), Length(3, False)]):
        with pytest.raises(ValueError, match=r"cannot be dealt into long and short"):
            long_or_short(hopeless)
    runs = [told(n) for n in (1, 2, 5, 6)] + [told(4, answer="", finished=False), told(None)]
    found = labels_of(runs, "length")
    assert found.values == (0.0, 0.0, 1.0, 1.0, 1.0, None)
    assert "thinking of 4 tokens or more" in found.said
    with pytest.raises(ValueError, match=r"has a span summary; they have all, answer, prompt, thinking"):
        labels_of(runs, "length", length="summary")


def test_any_key_of_meta_is_two_classes_or_a_number():
    def of(*values) -> tuple:
        found = labels_of([told(k=v) if v is not None else told() for v in values], "k")
        return found.values, found.kind, found.said

    assert of(True, False, None) == ((1.0, 0.0, None), "classes", "1 is k 1, 0 is 0")
    assert of("hot", None, "cold") == ((1.0, None, 0.0), "classes", "1 is k hot, 0 is cold")
    assert of(10, 9) == ((1.0, 0.0), "classes", "1 is k 10, 0 is 9")
    assert of("10", 9, 2.5) == ((10.0, 9.0, 2.5), "number", "numbers from 2.5 to 10")
    for values, said in (
        (("a", "b", "c"), r"has 3 values, of which some are words \(a, b, c\)"),
        ((1, 2, "inf"), r"has 3 values, of which some are words"),
        (([1], [2]), "lists or mappings"),
        (("a", "a"), "all of them are 1"),
        ((None, None), r"No transcript has a label 'k': there are right, length, and in meta nothing"),
    ):
        with pytest.raises(ValueError, match=said):
            of(*values)
