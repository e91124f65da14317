"""Laws of the data recipes: what they leave, that spans stay right, that item i depends on (seed, i), and planted critical tokens."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.tasks import chained_sums, grade
from finetune.examples import Collate, Example, examples, rows_of
from finetune.recipes import (
    FLAWS,
    Equation,
    Steps,
    corrupt_digits,
    critical,
    critical_tokens,
    cut,
    delete_steps,
    equations,
    flawed_prefix,
    grader,
    insert_steps,
    length_pairs,
    long_short,
    one_step_each,
    prefix_entropy,
    prefix_only,
    question_free,
    rejection_sampled,
    retold,
    seldom_right,
    shortest_right,
    shuffle_steps,
)
from finetune.recipes.retelling import completion_text
from finetune.recipes.selection import edit_distance, reasoning_path
from finetune.recipes.steps import drop_term, flip_sign, wrong_result, wrong_rule
from surgery.model import Model
from surgery.runs import Runs
from surgery.transcript import Transcript, read_transcript
from tests.families import tiny
from tests.oracles import recipes as oracle

QUESTIONS = chained_sums(12, seed=5, terms=(4, 6))


def merged() -> Any:
    """The characters' tokenizer, but with words of several characters, learnt from worked sums."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [q.completion() for q in chained_sums(40, seed=1)] + [
        "Wait. So we check it again, therefore it is done.\n\n"
    ] * 9
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<bos>", eos_token="<eos>")


MODEL = Model(*tiny("llama"))
MERGED = Model(tiny("llama")[0], merged())  # its module is not used: only the tokenizer is


def told(model: Model = MODEL, count: int = 12) -> list[Transcript]:
    return [model.transcript(q.question, q.completion(model.markers)) for q in QUESTIONS[:count]]


def say(question: str, thinking: str, answer: str = "7", model: Model = MODEL) -> Transcript:
    return model.transcript(question, f"<think>{thinking}</think>{answer}")


def read_again(model: Model, t: Transcript) -> Transcript:
    start = t.spans["prompt"][1]
    return read_transcript(model.tokenizer, t.question, t.ids[:start], t.ids[start:], model.markers)


def same_reading(model: Model, t: Transcript) -> None:
    """What a transcript says of itself is what reading its tokens says."""
    again = read_again(model, t)
    assert {k: v for k, v in t.spans.items() if k in again.spans} == dict(again.spans)
    assert (t.text, t.offsets, t.finished, t.ids) == (again.text, again.offsets, again.finished, again.ids)


def steps_of(t: Transcript) -> tuple[str, ...]:
    found = Steps.of(t)
    return found.bodies if found else ()


def note(t: Transcript) -> dict[str, Any]:
    return t.meta["recipes"][-1]


# --- taking apart and putting together ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab7 +=.!?\n", max_size=60), st.text(alphabet="1a \n", max_size=6), st.booleans())
def test_steps_put_together_are_the_text(thinking: str, answer: str, closed: bool) -> None:
    for model in (MODEL, MERGED):
        t = model.transcript("q", f"<think>{thinking}" + (f"</think>{answer}" if closed else ""))
        steps = Steps.of(t)
        if steps:
            assert steps.text() == completion_text(t) == f"<think>{thinking}" + (f"</think>{answer}" if closed else "")
            assert len(steps.gaps) == len(steps) - 1
            assert all(body == body.strip() and body for body in steps.bodies)
            assert steps.keeping(range(len(steps))) == steps
        else:
            assert not thinking.strip()


def test_white_space_goes_with_the_step_that_it_stands_before() -> None:
    steps = Steps("<think>", ("a", "b", "c", "d"), ("\n\n", " ", " "), "</think>7")
    assert steps.keeping([0, 2, 3]).text() == "<think>a c d</think>7"
    assert steps.keeping([1, 2]).text() == "<think>b c</think>7"
    assert steps.with_step(1, "NEW").text() == "<think>a NEW\n\nb c d</think>7"  # with what stands before most
    stray = MODEL.transcript("q", "x</think><think>one\ntwo</think>7")
    assert steps_of(stray) == ("one", "two")


def test_steps_are_those_of_a_prompt_that_opens_the_thinking_too() -> None:
    opening = Model(MODEL.module, copy.deepcopy(MODEL.tokenizer))
    opening.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    for plain, t in zip(told(), told(opening), strict=True):
        steps, same = Steps.of(t), Steps.of(plain)
        assert steps
        assert same
        assert (steps.bodies, steps.gaps, steps.after) == (same.bodies, same.gaps, same.after)
        assert steps.before == same.before.removeprefix("<think>\n") == ""
        assert retold(opening, t, steps.text()) == t
    assert Steps.of(opening.transcript("q", "</think>7")) is None
    for recipe in (shuffle_steps, delete_steps, corrupt_digits, flawed_prefix):
        for t, plain in zip(recipe(opening, told(opening)), recipe(MODEL, told()), strict=True):
            assert t.thinking == plain.thinking
            assert t.completion == (plain.completion or "").removeprefix("<think>\n")
            same_reading(opening, t)


def test_the_same_words_give_the_same_transcript() -> None:
    for model in (MODEL, MERGED):
        for t in told(model):
            kept = replace(t, meta={"question": "a name that read_transcript takes", "n": 1})
            assert retold(model, kept, completion_text(kept)) == kept
            unfinished = retold(model, kept, completion_text(kept), finished=False)
            assert unfinished.ids == kept.ids[:-1]
            assert not unfinished.finished
            assert completion_text(unfinished) == completion_text(kept)


def test_cutting_cuts_spans() -> None:
    t = told(MERGED, 1)[0]
    begin, end = t.spans["completion"]
    for n in range(1, end - begin + 3):
        short = cut(t, n)
        if n >= end - begin:
            assert short is t
            continue
        stop = begin + n
        assert short.ids == t.ids[:stop]
        assert len(short.offsets) == stop
        assert t.text.startswith(short.text)
        assert not short.finished
        for name, (b, e) in t.spans.items():
            assert short.spans.get(name) == ((b, min(e, stop)) if b < stop else None)
    with pytest.raises(ValueError, match="at least 1"):
        cut(t, 0)


def test_a_grader_knows_its_questions() -> None:
    right = grader(QUESTIONS, grade)
    assert all(right(t) for t in told())
    assert right(MODEL.transcript(QUESTIONS[0].question, "<think>\n</think>99999")) is False
    assert right(MODEL.transcript(QUESTIONS[0].question, "<think>\n")) is None
    assert grader([QUESTIONS[0], replace(QUESTIONS[0])], grade)(told()[0])  # the same question again
    with pytest.raises(ValueError, match="none of the 12 questions"):
        right(MODEL.transcript("another", "1"))
    with pytest.raises(ValueError, match="read the same"):
        grader([QUESTIONS[0], replace(QUESTIONS[0], answer="other")], grade)


# --- equations ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "hold"),
    [
        ("12 + 5 = 17", ["12+5=17"], [True]),
        ("so 12 + 5 = 18.", ["12+5=18"], [False]),
        ("3 + 4 = 7 + 2 = 9", ["3+4=7+2", "7+2=9"], [False, True]),
        ("1. 3 × 4 = 12\n- 2 x 3 = 6", ["3*4=12", "2*3=6"], [True, True]),
        ("$1,200 / 3 = $400, which", ["1200/3=400"], [True]),
        ("10 / 3 = 3.33 and 10/3 = 3", ["10/3=3.33", "10/3=3"], [True, False]),
        ("10 / 3 = 3.34", ["10/3=3.34"], [False]),
        ("x = 5, y = x + 2", [], []),
        ("(2 + 3) * -4 = -20", ["(2+3)*-4=-20"], [True]),
        ("1 / 0 = 3", ["1/0=3"], [False]),
        ("half of 50 = 25, 20% * 50 = 10", [], []),
        ("x + 3 = 10, x - 3 = 4 and x -3 = 4", [], []),
        ("half of 50 = 25 = 20 + 5", ["25=20+5"], [True]),
        ("1,2345 = 12345", [], []),
        ("20% - 50 = -50", [], []),
        ("he pays 4 * 3 = 12", ["4*3=12"], [True]),
        ("7 = 7. 2 + 2 = 4", ["7=7", "2+2=4"], [True, True]),
        ("9**9**9**9 = 1", [], []),
        ("= 3, 4 =", [], []),
        ("0.1 + 0.2 = 0.3", ["0.1+0.2=0.3"], [True]),
        ("(" * 3000 + "1" + " = 1", [], []),
        ("1" * 6000 + " = 1", [], []),
    ],
)
def test_equations(text: str, found: list[str], hold: list[bool]) -> None:
    made = equations(text)
    assert [str(e) for e in made] == found
    assert [e.holds for e in made] == hold


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/=()., \nx$", max_size=40))
def test_any_text_has_equations_or_none(text: str) -> None:
    for e in equations(text):
        assert isinstance(e.holds, bool)


# --- steps disturbed ----------------------------------------------------------------------------------------------------------

DISTURBANCES: dict[str, Callable[..., list[Transcript]]] = {
    "shuffle": shuffle_steps,
    "delete": delete_steps,
    "insert": insert_steps,
    "digits": corrupt_digits,
    "flawed": flawed_prefix,
}


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.parametrize("model", [MODEL, MERGED], ids=["characters", "merged"])
def test_disturbed_transcripts_are_well_formed(name: str, model: Model) -> None:
    """Spans are those of the text, the prompt and the answer stay, the steps do not, and what was done can be kept in a file."""
    before = told(model)
    after = DISTURBANCES[name](model, before, seed=3)
    assert len(after) == len(before)
    for a, b in zip(before, after, strict=True):
        same_reading(model, b)
        assert b.ids[: b.spans["prompt"][1]] == a.ids[: a.spans["prompt"][1]]
        assert steps_of(a) != steps_of(b)
        assert json.loads(json.dumps(note(b))) == note(b)
        assert "recipes" not in a.meta
        if name != "flawed":
            assert b.answer == a.answer
            assert b.finished


@pytest.mark.parametrize("name", DISTURBANCES)
def test_item_depends_on_seed_and_place_alone(name: str, tmp_path: Any) -> None:
    recipe, before = DISTURBANCES[name], told()
    whole = recipe(MODEL, before, seed=3)
    assert recipe(MODEL, before, seed=3) == whole
    assert [t.ids for t in recipe(MODEL, before, seed=4)] != [t.ids for t in whole]
    assert len({t.ids for t in recipe(MODEL, [*before[:1] * 8, *before], seed=3)[:8]}) > 1
    if name != "insert":  # whose steps come from the others
        others = [*before[:5], *[say(f"q{i}", "1 + 2 = 3\n4 + 5 = 9") for i in range(7)]]
        assert recipe(MODEL, others, seed=3)[:5] == whole[:5]
    Runs(tuple(whole)).save(tmp_path / "runs.jsonl")
    assert [t.ids for t in Runs.load(tmp_path / "runs.jsonl")] == [t.ids for t in whole]


def test_shuffling_permutes() -> None:
    for share in (0.2, 0.5, 1.0):
        for a, b in zip(told(), shuffle_steps(MODEL, told(), share=share, seed=1), strict=True):
            assert Counter(steps_of(a)) == Counter(steps_of(b))
            moved = [i for i, (x, y) in enumerate(zip(steps_of(a), steps_of(b), strict=True)) if x != y]
            assert 2 <= len(moved) <= max(2, round(share * len(steps_of(a))))
            assert set(moved) <= set(note(b)["moved"])
            assert len(note(b)["moved"]) == max(2, round(share * len(steps_of(a))))
            assert Counter(a.text) == Counter(b.text)


def test_shuffling_moves_something_where_steps_repeat() -> None:
    twins = say("q", "aa\naa\naa\naa\naa\nbb")
    for seed in range(20):
        (out,) = shuffle_steps(MODEL, [twins], share=0.1, seed=seed)
        assert steps_of(out) != steps_of(twins)
    alike = say("q", "aa\naa")
    assert shuffle_steps(MODEL, [alike, twins], seed=0)[0].question == "q"
    assert len(shuffle_steps(MODEL, [alike, twins], seed=0)) == 1
    with pytest.raises(ValueError, match="two different steps"):
        shuffle_steps(MODEL, [alike, MODEL.transcript("q", "no thinking")])


def test_deleting_deletes() -> None:
    for share in (0.01, 0.5, 1.0):
        for a, b in zip(told(), delete_steps(MODEL, told(), share=share, seed=1), strict=True):
            gone, n = note(b)["deleted"], len(steps_of(a))
            assert len(gone) == max(1, round(share * n))
            assert steps_of(b) == tuple(body for i, body in enumerate(steps_of(a)) if i not in gone)
    (out,) = delete_steps(MODEL, [say("q", "\na b.\nWait, no.\nc d.\nwait\n")], share=1.0, matching="(?i)wait")
    assert completion_text(out) == "<think>\na b.\nc d.\n</think>7"
    with pytest.raises(ValueError, match="nothing is left"):
        delete_steps(MODEL, told(), matching="no such words")


def test_inserting_inserts_steps_of_others() -> None:
    for a, b in zip(told(), insert_steps(MODEL, told(), share=0.5, seed=1), strict=True):
        assert len(steps_of(b)) == len(steps_of(a)) + max(1, round(0.5 * len(steps_of(a))))
        rest = iter(steps_of(b))
        assert all(body in rest for body in steps_of(a))  # in their order
        foreign = Counter(steps_of(b)) - Counter(steps_of(a))
        assert set(foreign) <= {body for t in told() if t.question != a.question for body in steps_of(t)}
    two = [say("q", "one"), say("r", "other")]
    assert {note(insert_steps(MODEL, two, seed=seed)[0])["inserted"][0] for seed in range(20)} == {
        0,
        1,
    }  # before, after
    with pytest.raises(ValueError, match="other questions"):
        insert_steps(MODEL, [say("q", "one\ntwo"), say("q", "three")])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "b c", "d."]), min_size=1, max_size=4), st.integers(0, 4))
def test_a_step_more_stands_where_it_is_put(bodies: list[str], at: int) -> None:
    steps = Steps("<think>\n", tuple(bodies), ("\n",) * (len(bodies) - 1), "\n</think>7")
    more = steps.with_step(min(at, len(bodies)), "NEW")
    assert more.bodies == (*bodies[:at], "NEW", *bodies[at:])
    assert more.text() == "<think>\n" + "\n".join(more.bodies) + "\n</think>7"


def test_digits_change_and_nothing_else() -> None:
    for share in (0.01, 0.5, 1.0):
        for a, b in zip(told(), corrupt_digits(MODEL, told(), share=share, seed=1), strict=True):
            assert len(a.text) == len(b.text)
            changed = [(x, y) for x, y in zip(a.text, b.text, strict=True) if x != y]
            digits = sum(c.isdigit() for c in a.thinking or "")
            assert len(changed) == max(1, round(share * digits)) == note(b)["digits"]
            assert all(x.isdigit() and y.isdigit() for x, y in changed)


@pytest.mark.parametrize("recipe", [shuffle_steps, delete_steps, corrupt_digits, insert_steps])
def test_a_share_is_a_share(recipe: Any) -> None:
    for share in (0.0, -1.0, float("nan")) + (() if recipe is insert_steps else (1.5,)):
        with pytest.raises(ValueError, match="share"):
            recipe(MODEL, told(), share=share)
    with pytest.raises(ValueError, match="no transcripts"):
        recipe(MODEL, [])


# --- one flaw -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flaw", "step", "made"),
    [
        (flip_sign, "17 - 30 = -13", {"17 + 30 = -13"}),
        (flip_sign, "so 3 + 4 - 5 = 2.", {"so 3 - 4 - 5 = 2.", "so 3 + 4 + 5 = 2."}),
        (flip_sign, "7 - 0 = 7", {None}),
        (flip_sign, "3 * 4 = 12", {None}),
        (flip_sign, "3 + 4 = 8", {None}),
        (flip_sign, "x + 4 = 8", {None}),
        (drop_term, "3 + 4 + 5 = 12", {"3 + 5 = 12", "3 + 4 = 12"}),
        (drop_term, "3 + 4 = 7", {None}),
        (wrong_result, "3 + 4 = 7", {f"3 + 4 = {n}" for n in (-3, 5, 6, 8, 9, 17)}),
        (wrong_result, "0.5 + 0.25 = 0.75", {f"0.5 + 0.25 = {n}" for n in ("-9.25", "-1.25", "-0.25", "1.75", "2.75", "10.75")}),
        (wrong_rule, "17 - 30 = -13", {"17 + 30 = 47"}),
        (wrong_rule, "3 + 4 = 7, then more", {"3 - 4 = -1, then more"}),
        (wrong_rule, "3 * 4 = 12", {None}),
        (wrong_rule, "3 + 0 = 3", {None}),
    ],
)  # fmt: skip
def test_flaws(flaw: Any, step: str, made: set[str | None]) -> None:
    assert {flaw(step, random.Random(seed)) for seed in range(60)} == made


def test_a_prefix_has_exactly_one_flaw_and_ends_with_it() -> None:
    used = set()
    for seed in range(4):
        for model in (MODEL, MERGED):
            for a, b in zip(told(model), flawed_prefix(model, told(model), seed=seed), strict=True):
                did = note(b)
                k = did["step"]
                used.add(did["flaw"])
                assert steps_of(b)[:-1] == steps_of(a)[:k]
                assert steps_of(b)[-1] == did["now"] != did["was"] == steps_of(a)[k]
                assert not b.finished
                assert "answer" not in b.spans
                assert completion_text(b).endswith(did["now"] + "\n")
                span = b.span_text("flaw")
                assert span is not None
                assert did["now"] in span or span in did["now"]
                if model is MODEL:
                    begin, end = b.spans["flaw"]
                    assert "".join(b.text[slice(*b.offsets[i])] for i in range(begin, end)) == did["now"]
                wrong = [not e.holds for e in equations(completion_text(b))]
                assert sum(wrong) == (did["flaw"] != "wrong_rule")
    assert used == {"flip_sign", "wrong_result", "wrong_rule"}  # sums of two terms have none to drop
    assert {f.__name__ for f in FLAWS} == used | {"drop_term"}


def test_flaws_are_the_callers() -> None:
    (out, *_) = flawed_prefix(MODEL, told(), flaws=[lambda step, _: step.replace("=", "is") if "=" in step else None])
    assert " is " in note(out)["now"]
    (twice,) = flawed_prefix(MODEL, [say("q", "one\ntwo")], flaws=[lambda step, _: "one" if step == "two" else None])
    assert completion_text(twice) == "<think>one\none\n"
    assert twice.spans["flaw"] == (len(twice.ids) - 4, len(twice.ids) - 1)  # the second, which was written last
    with pytest.raises(ValueError, match="none of the flaws"):
        flawed_prefix(MODEL, told(), flaws=[lambda step, _: step])


def test_a_flawed_prefix_is_written_on_and_learnt_after_it() -> None:
    flawed = flawed_prefix(MODEL, told(count=4))
    on = MODEL.continued(flawed, samples=2, seed=1, max_new_tokens=6)
    assert len(on) == 8
    for i, t in enumerate(on):
        start = flawed[i // 2]
        assert t.ids[: len(start.ids)] == start.ids
        assert t.spans["given"] == (start.spans["prompt"][1], len(start.ids))
        assert t.spans["continuation"] == (len(start.ids), len(t.ids))
        assert (t.meta["sample"], t.meta["recipes"]) == (i % 2, start.meta["recipes"])
        ((example,),) = examples([t], over="continuation")
        assert [k for k, w in enumerate(example.weights) if w] == list(range(len(start.ids), len(t.ids)))
        same_reading(MODEL, t)
    alone = MODEL.continued(flawed[:1], samples=2, seed=1, max_new_tokens=6)
    assert [t.ids for t in alone] == [t.ids for t in on[:2]]
    greedy = MODEL.continued(flawed, max_new_tokens=6)
    for t, start in zip(greedy, flawed, strict=True):
        assert list(t.ids[len(start.ids) :]) == oracle.greedy(MODEL, start.ids, 6)[: len(t.ids) - len(start.ids)]
    with pytest.raises(ValueError, match="has ended"):
        MODEL.continued(told(count=1))


# --- selection ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_edit_distance_is_levenshteins(a: list[int], b: list[int]) -> None:
    assert edit_distance(a, b) == oracle.edit_distance(a, b) == edit_distance(b, a)


def right(t: Transcript) -> bool | None:
    return None if t.answer is None else t.answer == "7"


SAMPLES = [
    say("q1", "3 + 4 = 7"),  # 0
    say("q1", "so 3 + 4 = 7"),  # 1: the same equations, other words
    say("q1", "4 + 3 = 7"),  # 2: another way
    say("q1", "3 + 4 = 8"),  # 3: right by luck
    say("q1", "3 + 4 = 7", "8"),  # 4: wrong
    say("q2", "one two three four five six"),  # 5: no equations: its words are its way
    say("q2", "one two three four\nfive six"),  # 6: the same words
    say("q2", "one"),  # 7
    say("q3", "1 + 1 = 2", "2"),  # 8: never right
    MODEL.transcript("q3", "<think>and on and on"),  # 9: no answer
]


def test_rejection_sampling_keeps_right_and_distinct() -> None:
    kept = rejection_sampled(SAMPLES, right)
    texts = [completion_text(t) for t in kept]
    # of 0 and 1, the one farther from 2: 1 has three characters more that 2 lacks
    assert texts == [completion_text(SAMPLES[i]) for i in (1, 2, 5, 7)]
    assert note(kept[0]) == {"name": "rejection_sampled", "samples": 5, "right": 3, "ways": 2}
    assert [completion_text(t) for t in rejection_sampled(SAMPLES, right, cap=1)] == [texts[0], texts[2]]
    unchecked = rejection_sampled(SAMPLES, right, check=False)
    assert completion_text(SAMPLES[3]) in [completion_text(t) for t in unchecked]
    assert len(rejection_sampled([say("q", "3 + 4 = 7\n1 + 1 = 2"), say("q", "1 + 1 = 2\n3 + 4 = 7")], right)) == 2
    one = rejection_sampled(SAMPLES, right, path=lambda t: None)
    assert [completion_text(t) for t in one] == [completion_text(SAMPLES[i]) for i in (0, 5)]


def test_the_representative_is_the_farthest_from_other_ways() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc", k=rng.randint(1, 5))) + f" 1 + {k % 3} = {1 + k % 3}" for k in range(12)]
    prompts = ["q"] * 8 + ["q, in other words"] * 4  # which do not count
    samples = [replace(say(prompt, text), question="q") for prompt, text in zip(prompts, texts, strict=True)]
    kept = rejection_sampled(samples, right)
    told = lambda t: t.ids[t.spans["completion"][0] :]  # noqa: E731
    ways: dict[Any, list[Transcript]] = {}
    for t in samples:
        ways.setdefault(reasoning_path(t), []).append(t)
    assert len(kept) == len(ways) == 3
    for t in kept:
        way = reasoning_path(t)
        far = [
            sum(edit_distance(told(m), told(o)) for w, others in ways.items() if w != way for o in others)
            for m in ways[way]
        ]
        assert t.ids == ways[way][far.index(max(far))].ids


def test_shortest_right() -> None:
    kept = shortest_right(SAMPLES, right)
    assert [completion_text(t) for t in kept] == [completion_text(SAMPLES[i]) for i in (0, 7)]
    asked_at_length = replace(say("q1, in many more words than these", "3+4=7"), question="q1")
    assert (
        shortest_right([SAMPLES[0], asked_at_length], right)[0].ids == asked_at_length.ids
    )  # the prompt does not count
    with pytest.raises(ValueError, match="none is right"):
        shortest_right(SAMPLES, lambda t: None)
    with pytest.raises(ValueError, match="none is right"):
        rejection_sampled(SAMPLES, lambda t: False)
    with pytest.raises(ValueError, match="cap=0"):
        rejection_sampled(SAMPLES, right, cap=0)


LONG = [say(f"q{i}", "first this\nthen that\nand so on", "7") for i in range(400)]
SHORT = [say(f"q{i}", "this", "7") for i in range(400)]


def test_long_and_short_are_mixed_pair_by_pair() -> None:
    mixture = long_short(LONG, SHORT)
    assert len(mixture) == 800
    assert [note(t)["part"] for t in mixture[:4]] == ["long", "short", "long", "short"]
    for share in (0.2, 0.8):
        part = Counter(note(t)["part"] for t in long_short(LONG, SHORT, short_share=share, seed=1))
        assert max(part.values()) == 400
        assert part["short"] / part.total() == pytest.approx(share, abs=0.04)
    assert long_short(LONG, SHORT, short_share=0.2, seed=2) != long_short(LONG, SHORT, short_share=0.2, seed=1)
    some = long_short(LONG[:50], SHORT[:50], short_share=0.2, seed=1)
    assert some == long_short(LONG, SHORT, short_share=0.2, seed=1)[: len(some)]


def test_pairs_that_do_not_fit_are_left_out() -> None:
    wrong = say("q0", "this", "8")
    other_prompt = replace(SHORT[1], ids=(5, *SHORT[1].ids[1:]))
    longer = say("q2", "first this\nthen that\nand so on and on", "7")
    unthinking = MODEL.transcript("q3", "7")
    later = say("q4", "first this\nthen that\nand so on and on", "7")
    shorts = [LONG[0], wrong, other_prompt, longer, unthinking, SHORT[4], SHORT[9]]
    kept = long_short([*LONG[:5], later], shorts)
    assert [t.ids for t in kept] == [LONG[4].ids, SHORT[4].ids]
    assert len(long_short(LONG[:5], [wrong], same=lambda a, b: True)) == 2
    with pytest.raises(ValueError, match="same question, prompt and answer"):
        long_short(LONG[:5], [wrong])
    with pytest.raises(ValueError, match="short_share"):
        long_short(LONG, SHORT, short_share=1.0)


def test_length_pairs() -> None:
    data = [
        say("q1", "a"),
        say("q1", "a b c d"),
        say("q1", "a b c d e f", "8"),
        say("q2", "a"),
        MODEL.transcript("q1", "7"),
    ]
    ((chosen, rejected),) = length_pairs(data)
    assert (chosen.transcript.thinking, rejected.transcript.thinking) == ("a b c d e f", "a")
    assert (chosen.columns, rejected.columns) == ({"positive": 1.0}, {"positive": 0.0})
    ((chosen, _),) = length_pairs(data, right)
    assert chosen.transcript.thinking == "a b c d"
    assert sum(chosen.weights) == len(chosen.transcript.ids) - chosen.transcript.spans["prompt"][1]
    ((first, second),) = length_pairs(data, right, prefer="short", over="answer")
    assert (first.transcript.thinking, second.transcript.thinking) == ("a", "a b c d")
    assert sum(first.weights) == 1
    assert len(length_pairs(data, right, least_gap=6)) == 1
    with pytest.raises(ValueError, match="differ by 7 tokens"):
        length_pairs(data, right, least_gap=7)
    groups = length_pairs(LONG + SHORT, prefer="random", seed=3)
    long_first = [len(a.transcript.ids) > len(b.transcript.ids) for a, b in groups]
    assert 160 < sum(long_first) < 240
    assert [
        len(a.transcript.ids) > len(b.transcript.ids)
        for a, b in length_pairs(LONG[:9] + SHORT[:9], prefer="random", seed=3)
    ] == long_first[:9]
    others = length_pairs(LONG + SHORT, prefer="random", seed=4)
    assert [len(a.transcript.ids) > len(b.transcript.ids) for a, b in others] != long_first
    batch = Collate(0)(rows_of(examples(groups[:2])))
    assert batch["positive"].tolist() == [1, 0, 1, 0]
    assert batch["group"].tolist() == [0, 0, 1, 1]


@pytest.mark.usefixtures("unchecked")
def test_what_is_preferred_is_a_choice_of_three() -> None:
    for wrong in ({"prefer": "longest"}, {"least_gap": 0}):
        with pytest.raises(ValueError, match="prefer"):
            length_pairs(LONG + SHORT, **wrong)  # type: ignore[arg-type]


def test_prefixes() -> None:
    data = [t for i in range(300) for t in (LONG[i], SHORT[i])]
    kept = prefix_only(data, 5, whole_share=0.1, seed=2)
    assert [t.question for t in kept] == [f"q{i}" for i in range(300)]
    whole = [note(t)["whole"] for t in kept]
    assert 15 < sum(whole) < 50
    for t, is_whole, source in zip(kept, whole, LONG, strict=False):
        begin, end = t.spans["completion"]
        assert t.finished == is_whole
        assert t.ids == (source.ids if is_whole else source.ids[: begin + 5])
        assert end - begin == (len(source.ids) - begin if is_whole else 5)
    assert [note(t)["whole"] for t in prefix_only(LONG[:50], 5, seed=2)] == whole[:50]
    assert not any(note(t)["whole"] for t in prefix_only(data, 5, whole_share=0))
    assert all(note(t)["whole"] for t in prefix_only(data, 5, whole_share=1))
    with pytest.raises(ValueError, match="whole_share"):
        prefix_only(data, whole_share=1.1)
    with pytest.raises(ValueError, match="at least 1"):
        prefix_only(data, 0, whole_share=0)


def test_entropy_of_prefixes() -> None:
    assert prefix_entropy(LONG, 5) == 0
    assert prefix_entropy([LONG[0], SHORT[0]], 12) == pytest.approx(math.log(2))
    four = [say("q", c * 3) for c in "abcd"]
    assert prefix_entropy(four, 8) == pytest.approx(math.log(4))
    assert prefix_entropy(four, 7) == 0  # <think> has seven characters
    with pytest.raises(ValueError, match="no transcripts"):
        prefix_entropy([])


def beginning(module: Any) -> Model:
    """A tokenizer that begins every text with <bos> and ends none."""
    from tokenizers.processors import TemplateProcessing

    _, tokenizer = tiny("llama")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return Model(module, tokenizer)


def test_no_question_no_template() -> None:
    for model, start in ((MODEL, ()), (beginning(MODEL.module), (1,))):
        before = [replace(t, meta={"k": 1}) for t in told(model)]
        for a, b in zip(before, question_free(model, before), strict=True):
            p = a.spans["prompt"][1]
            assert b.ids == (*start, *a.ids[p:])
            assert b.question == a.question
            assert a.question not in b.text
            assert b.spans["prompt"] == (0, len(start))
            assert (b.thinking, b.answer) == (a.thinking, a.answer)
            assert (b.meta["k"], note(b)) == (1, {"name": "question_free", "dropped": p})
            same_reading(model, b)
            ((example,),) = examples([b])
            labels = Collate(0)(rows_of([(example,)]))["labels"][0]
            assert (labels != -100).tolist() == [i > 0 for i in range(len(b.ids))]
    with pytest.raises(ValueError, match="something precedes"):
        question_free(MODEL, [retold(MODEL, SHORT[0], "a", finished=False)])


def test_recipes_follow_one_another() -> None:
    data = question_free(MODEL, shuffle_steps(MODEL, rejection_sampled([say("q", "3 + 4 = 7\n7 + 0 = 7")], right)))
    assert [step["name"] for step in data[0].meta["recipes"]] == ["rejection_sampled", "shuffle_steps", "question_free"]


# --- critical tokens ----------------------------------------------------------------------------------------------------------


# A planted model without memory: after each token its likeliest followers are known, so the critical tokens are too. It writes
# <think> a b c k e </think> 7 <end>. Replaced by either of their likeliest rivals, k, 7 and <end> lead to another answer; of the others at
# least one rival comes back to the same way.
FOLLOWERS = {
    "q": ["<think>", "a", "b"],
    "<think>": ["a", "b", "c"],  # skipping a step does no harm
    "a": ["b", "c", "k"],
    "b": ["c", "x", "y"],  # x and y lead back to c
    "x": ["c", "a", "b"],
    "y": ["c", "a", "b"],
    "c": ["k", "m", "n"],  # m and n lead to another answer
    "m": ["</think>2", "e", "x"],
    "n": ["</think>2", "e", "x"],
    "k": ["e", "x", "</think>"],  # one rival comes back, the other is as good
    "e": ["</think>", "</think>2", "x"],  # one fails, one does not
    "</think>": ["7", "8", "9"],
    "</think>2": ["8", "9", "7"],
    "7": ["<end>", "8", "9"],
    "8": ["<end>", "7", "9"],
    "9": ["<end>", "7", "8"],
}


def chain() -> Model:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *FOLLOWERS]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("<think>|</think>2|</think>|<end>|<pad>|."), "isolated")
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")
    n = len(words)
    with torch.random.fork_rng():
        module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=n, hidden_size=n + n % 2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                num_key_value_heads=1, head_dim=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
                eos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        for name, p in module.named_parameters():
            if "norm" in name:
                p.fill_(1)
        module.model.embed_tokens.weight[:, :n] = torch.eye(n)
        for word, followers in FOLLOWERS.items():
            for rank, follower in enumerate(followers):
                module.lm_head.weight[words.index(follower), words.index(word)] = 3.0 - rank
    return Model(module, tokenizer)


def test_planted_critical_tokens_are_found() -> None:
    model = chain()
    (t,) = model.generate(["q"])
    assert t.text == "q<think>abcke</think>7<end>"
    answered = lambda t: (t.text.count("7<end>") == 1) if t.finished else None  # noqa: E731
    (example,) = critical_tokens(model, [t], answered)
    assert [t.text[slice(*t.offsets[i])] for i, w in enumerate(example.weights) if w] == ["k", "7", "<end>"]
    assert {i for i, w in enumerate(example.weights) if w} == oracle.critical(model, t, answered, 2, 64)
    did = note(example.transcript)
    assert (did["critical"], did["tried"], did["greedy"], did["unanswered"]) == (3, 9, 1, 0)
    assert did["outside_answer"] == pytest.approx(2 / 3)  # k and the end
    (more,) = critical_tokens(model, [t], answered, alternatives=1)
    assert {i for i, w in enumerate(more.weights) if w} == oracle.critical(model, t, answered, 1, 64) == {5, 7, 8, 9}


def test_only_the_completion_is_tried_and_what_is_known_of_it_stays() -> None:
    model = chain()
    (t,) = model.generate(["aq"])
    kept = replace(t, meta={"gold": "7<end>"})
    (example,) = critical_tokens(model, [kept], lambda u: u.text.count(u.meta["gold"]) == 1, over="all")
    assert (note(example.transcript)["critical"], note(example.transcript)["tried"]) == (3, 9)
    longer = model.transcript("q", "<think>abcke</think>78")  # after 7 it would have ended, as well
    (example,) = critical_tokens(model, [longer], lambda u: u.text.endswith(("7<end>", "78<end>")))
    assert [longer.text[slice(*longer.offsets[i])] for i, w in enumerate(example.weights) if w] == ["k", "7"]


def test_what_fails_only_where_texts_share_a_prefix_is_not_critical(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where roundings in a batch tip an arg max: all that share a cache go wrong here, and none that is computed from its beginning."""
    model = chain()
    (t,) = model.generate(["q"])
    answered = lambda t: t.text.count("7<end>") == 1  # noqa: E731
    real = critical.decode

    def tipped(
        model: Model, rows: torch.Tensor, mask: torch.Tensor, length: int, past: object = None
    ) -> list[list[int]]:
        told = real(model, rows, mask, length, past)
        return told if past is None else [model.tokenizer.encode("8<end>")] * len(told)

    monkeypatch.setattr(critical, "decode", tipped)
    (believed,) = critical_tokens(model, [t], answered, confirm=False)
    assert note(believed.transcript)["critical"] == note(believed.transcript)["tried"] == 9
    (example,) = critical_tokens(model, [t], answered)
    assert {i for i, w in enumerate(example.weights) if w} == oracle.critical(model, t, answered, 2, 64)


FAMILIES = ["llama", "qwen3", "gpt2", "gpt-neox", "gemma2", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_critical_tokens_are_the_literal_ones(family: str) -> None:
    """On random models whose attention matters: shared prefixes, holes in the masks and positions are right, or these would differ."""
    model = Model(*tiny(family))
    given_ = [model.transcript(f"q{i}", text) for i, text in enumerate(["<think>ab c</think>7", "x + y = z"])]
    begun = [replace(cut(t, 3), finished=False) for t in given_]
    transcripts = [replace(t, finished=False) for t in model.continued(begun, max_new_tokens=4)]

    def lucky(ids: Sequence[int]) -> bool:
        return zlib.crc32(bytes(ids)) % 3 == 0

    ends = model.tokenizer.eos_token
    some = False
    model.tokenizer.eos_token = None  # none ends by itself: every text is written to its full length
    try:
        for t in transcripts:
            verdict: Callable[[Transcript], bool | None] = lambda u, t=t: u.ids == t.ids or lucky(u.ids)  # noqa: E731
            start = t.spans["prompt"][1]
            expected = set()
            for p in range(start, len(t.ids)):
                with torch.no_grad():
                    logits = model.module(input_ids=torch.tensor([t.ids[:p]])).logits[0, -1]
                rivals = [i for i in logits.argsort(descending=True).tolist() if i != t.ids[p]][:2]
                texts = [[*t.ids[:p], r, *oracle.greedy(model, [*t.ids[:p], r], 5)] for r in rivals]
                if not any(map(lucky, texts)):
                    expected.add(p)
            for options in ({"batch_size": 3, "confirm": False}, {"batch_size": 64}):
                try:
                    (found,) = critical_tokens(model, [t], verdict, max_new_tokens=5, **options)
                except ValueError:
                    assert not expected
                else:
                    assert {i for i, w in enumerate(found.weights) if w} == expected
            some = some or bool(expected)
        assert some
    finally:
        model.tokenizer.eos_token = ends


def test_critical_tokens_say_what_they_cannot_do() -> None:
    model = chain()
    (t,) = model.generate(["q"])
    with pytest.raises(ValueError, match="none is right"):
        critical_tokens(model, [t], lambda t: None)
    with pytest.raises(ValueError, match="no token of a right answer is critical"):
        critical_tokens(model, [t], lambda t: True)
    for wrong in ({"alternatives": 0}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            critical_tokens(model, [t], right, **wrong)


def test_what_is_tried_and_how_long() -> None:
    model = chain()
    (t,) = model.generate(["q"])
    answered: Callable[[Transcript], bool | None] = lambda t: t.text.count("7<end>") == 1  # noqa: E731
    (example,) = critical_tokens(model, [t], answered, over="answer")
    assert [i for i, w in enumerate(example.weights) if w] == [t.spans["answer"][0]]
    assert note(example.transcript)["outside_answer"] == 0
    assert note(example.transcript)["unanswered"] == 0
    bare = model.transcript("q", "<think>abcke</think>")  # it has no answer to try
    assert len(critical_tokens(model, [bare, t], lambda u: u.ids == bare.ids or answered(u), over="answer")) == 1
    (short,) = critical_tokens(model, [t], answered, max_new_tokens=2)  # no way back is short enough
    assert sum(short.weights) > sum(critical_tokens(model, [t], answered)[0].weights)
    assert note(short.transcript)["unanswered"] > 0
    taught = model.transcript("q", "<think>bcke</think>7")  # it would have written a first
    (other,) = critical_tokens(model, [taught], answered)
    assert note(other.transcript)["greedy"] < 1


def test_critical_tokens_are_the_only_ones_learnt() -> None:
    model = chain()
    (t,) = model.generate(["q"])
    found: Sequence[Example] = critical_tokens(model, [t], lambda t: t.text.count("7<end>") == 1)
    labels = Collate(0)(rows_of(examples(found)))["labels"]
    assert [i for i, label in enumerate(labels[0].tolist()) if label != -100] == [
        i for i, w in enumerate(found[0].weights) if w
    ]


def test_recipes_go_into_tune() -> None:
    """The first loss is the mean negative log-likelihood of the critical tokens, and groups of two are taken as they are."""
    from finetune.tune import tune

    model = chain()
    (t,) = model.generate(["q"])
    (example,) = critical_tokens(model, [t], lambda t: t.text.count("7<end>") == 1)
    with torch.no_grad():
        logs = model.module(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1)
    nats = [-float(logs[i - 1, t.ids[i]]) for i, w in enumerate(example.weights) if w]
    done = tune(model, [example], method="full", steps=1, batch_size=1, autocast=False)
    assert done.losses == [pytest.approx(sum(nats) / len(nats), rel=1e-5)]
    pairs = length_pairs(LONG[:2] + SHORT[:2])
    assert len(tune(Model(*tiny("llama")), pairs, method="lift", steps=1, batch_size=2, autocast=False).losses) == 1


def test_equations_are_frozen_values() -> None:
    assert Equation("1+1", "2") == equations("1 + 1 = 2")[0]
    assert re.fullmatch(r"\S+=\S+", str(equations("1 + 1 = 2")[0]))


# --- direct coverage optimisation ---------------------------------------------------------------------------------------------


def test_single_steps_are_the_completion_once() -> None:
    for t in told(count=3):
        steps = one_step_each([t])
        begin, end = t.spans["completion"]
        learnt = [[i for i, w in enumerate(e.weights) if w] for e in steps]
        assert [i for part in learnt for i in part] == list(range(begin, end))  # each token once, in order
        assert len(steps) == len(t.sentences) + 1
        for number, (e, part) in enumerate(zip(steps, learnt, strict=True)):
            assert e.transcript.ids == t.ids[: part[-1] + 1]  # what comes before, and nothing after
            assert e.columns == {"step": number}
            assert e.transcript.meta["recipes"][-1] == {"name": "one_step_each", "step": number}
        assert [part[-1] + 1 for part in learnt[:-1]] == [stop for _, stop in t.sentences]
    plain = MODEL.transcript("a question", "an answer")
    (only,) = one_step_each([plain])
    assert sum(only.weights) == len(plain.ids) - plain.spans["completion"][0]
    with pytest.raises(ValueError, match="no transcripts"):
        one_step_each([])


def test_coverage_of_single_steps_is_step_wise_coverage() -> None:
    """-log(1 - (1 - p)^N) of every step, by the model's own probabilities; the sum over steps of N = 1 is the cross-entropy."""
    from finetune.objectives import coverage
    from finetune.predictions import predict

    (t,) = told(count=1)
    steps = one_step_each([t])
    batch = Collate(MODEL.pad_id)(rows_of(examples(steps)))
    with torch.no_grad():
        p = predict(MODEL.module, batch)
        logs = MODEL.module(input_ids=torch.tensor([t.ids])).logits[0].double().log_softmax(-1)
    nats = [-float(logs[i - 1, t.ids[i]]) for i in range(len(t.ids))]
    totals = [sum(nats[i] for i, w in enumerate(e.weights) if w) for e in steps]
    for samples in (1, 16):
        expected = [-math.log(-math.expm1(samples * math.log1p(-math.exp(-nll)))) for nll in totals]
        assert float(coverage(samples)(p)) == pytest.approx(sum(expected) / len(steps), rel=1e-4)
    begin, end = t.spans["completion"]
    assert sum(totals) == pytest.approx(sum(nats[begin:end]))


def test_questions_that_are_seldom_answered_rightly() -> None:
    def sample(question: str, answer: str) -> Transcript:
        return MODEL.transcript(question, f"<think>so</think>{answer}")

    shares = {"never": 0, "once": 1, "twice": 2, "always": 10}
    samples = [sample(q, "yes" if k < right else "no") for k in range(10) for q, right in shares.items()]

    def right(t: Transcript) -> bool | None:
        return True if t.answer == "yes" else None  # an abstention is not right

    for below in (0.05, 0.1, 0.11, 0.2, 0.21, 1.0):
        assert seldom_right(samples, right, below=below) == [q for q, n in shares.items() if n / 10 < below]
    assert seldom_right(samples, right) == ["never"]
    with pytest.raises(ValueError, match="nothing is left to learn: no question is answered rightly by less"):
        seldom_right([t for t in samples if t.question == "always"], right)
    with pytest.raises(ValueError, match="below=0"):
        seldom_right(samples, right, below=0)
