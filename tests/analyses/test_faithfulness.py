import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analyses.controls import items
from analyses.faithfulness import (
    Cost,
    EarlyAnswers,
    Reading,
    Trace,
    _common,
    _prepare,
    _Tree,
    answers_at_cuts,
    aoc,
    early_answers,
    obstacle,
    visible,
)
from analyses.labels import graded_by
from analyses.scoring import entropy, nll, predicted, quiet, text_nll
from analyses.statistics import wilson
from analyses.tasks import Question
from probes.estimates import resamples
from surgery.model import Model
from surgery.runs import Runs
from surgery.transcript import read_transcript
from tests import families
from tests.oracles import faithfulness as oracle


def tiny(family, **options):
    return Model(*families.tiny(family, **options))


def told(model, count=5, seed=0):
    questions = items(count, rho=0.5, seed=seed)
    return [model.transcript(q.question, q.completion(), **graded_by(q)) for q in questions]


def traces(model, transcripts):
    return [trace for t in transcripts if (trace := _prepare(model, t))]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_shared_prefix_is_brute_force(family):
    model = tiny(family)
    transcripts = told(model)
    ready = traces(model, transcripts)
    found, cost = answers_at_cuts(model, ready, batch_size=3, max_answer_tokens=5)
    assert cost.shared, cost.reason
    opened = _Tree(model.module, _common(ready))
    with torch.inference_mode():
        shared = opened.open(ready).logits
    eos, pad, moved = model.tokenizer.eos_token_id, model.pad_id, 0.0
    for transcript, answers, logits in zip(transcripts, found, shared, strict=True):
        texts = oracle.sequences(transcript)
        assert len(texts) == len(answers) == len(transcript.sentences) + 1
        for text, answer, logit in zip(texts, answers, logits, strict=True):
            assert torch.allclose(logit, oracle.logits(model.module, text), atol=2e-4, rtol=1e-4)
            assert answer == oracle.answer(model.module, text, 5, eos, pad)
        moved = max(moved, float((logits[0] - logits[-1]).abs().max()))
    assert moved > 0.02, "if the cut made no difference to the logits, agreement would prove nothing"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention(attention):
    model = tiny("gemma3")
    model.module.set_attn_implementation(attention)
    ready = traces(model, told(model))
    shared, cost = answers_at_cuts(model, ready)
    alone, _ = answers_at_cuts(model, ready, share=False)
    assert cost.shared
    assert shared == alone


def test_an_answer_that_was_cut_off_is_compared_as_far_as_it_goes():
    model = tiny("llama")
    run = told(model, 1)[0]
    (trace,) = traces(model, [run])
    said = answers_at_cuts(model, [trace], max_answer_tokens=4)[0][0][-1]
    prompt = run.spans["prompt"][1]
    before = trace.sequence(len(trace.cuts) - 1)[prompt:]
    for answer, changed in ((said[:2], 0), ((said[0], said[1] ^ 1), 1)):
        cut = read_transcript(model.tokenizer, run.question, run.ids[:prompt], [*before, *answer])
        found = early_answers(model, [cut])
        assert (found.compared, found.changed) == (1, changed)


def test_a_batch_of_eight_is_eight_batches_of_one():
    model = tiny("qwen3")
    ready = traces(model, told(model, 8))
    together, _ = answers_at_cuts(model, ready, batch_size=8)
    assert together == [answers_at_cuts(model, [one])[0][0] for one in ready]
    assert together == answers_at_cuts(model, ready, batch_size=1)[0]


def test_cuts_and_rows_that_end_early_leave_the_others_alone():
    model = tiny("qwen3", seed=1)
    ready = traces(model, told(model, 12))
    endless, _ = answers_at_cuts(model, ready, max_answer_tokens=8)

    def stops(token):
        """For every trace, when each of its cuts would end if this token ended answers."""
        return [[ids.index(token) + 1 if token in ids else 8 for ids in row] for row in endless]

    # let the token end answers that makes whole rows end at the most different steps
    end = max({t for row in endless for ids in row for t in ids}, key=lambda t: len({max(row) for row in stops(t)}))
    assert len({max(row) for row in stops(end)}) > 1, "no row would ever leave its batch before another"
    assert len({step for row in stops(end) for step in row}) > 3
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
    shared, cost = answers_at_cuts(model, ready, batch_size=12, max_answer_tokens=8)
    assert cost.shared
    assert shared == answers_at_cuts(model, ready, max_answer_tokens=8, share=False)[0]
    for row, before, steps in zip(shared, endless, stops(end), strict=True):
        assert [list(ids) for ids in row] == [list(ids[:step]) for ids, step in zip(before, steps, strict=True)]


def test_cost_counts_positions_without_padding():
    model = tiny("llama")
    ready = traces(model, told(model, 6))
    shared, cost = answers_at_cuts(model, ready, batch_size=3)
    _, alone = answers_at_cuts(model, ready, batch_size=3, share=False)
    steps = sum(len(ids) - 1 for row in shared for ids in row)
    scratch = sum(len(t.sequence(c)) for t in ready for c in range(len(t.cuts)))
    prefix = len(_common(ready))
    first = min(ready, key=lambda t: (len(t.cuts), len(t.ids)))
    trunks = sum(len(t.ids) - prefix + sum(map(len, t.closes)) for t in ready)
    assert alone.tokens == scratch + steps
    assert cost.tokens == prefix + trunks + steps + len(first.sequence(0))
    assert cost.padded >= cost.tokens
    assert cost.tokens < 0.6 * alone.tokens  # short prompts: the study's are longer, and the share smaller


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_images_seen_before_change_no_answer(family, share):
    model = Model(families.tiny_vlm(family, seed=3), families.characters())
    ready = traces(model, told(model))
    expected = answers_at_cuts(model, ready, share=False, max_answer_tokens=5)[0]
    for kept in (torch.tensor([[-3]]), torch.zeros(3, 1, dtype=torch.long)):
        model.module.base_model.rope_deltas = kept  # how far the last batch's images moved its positions
        found, cost = answers_at_cuts(model, ready, batch_size=3, share=share, max_answer_tokens=5)
        assert found == expected
        assert cost.shared == share, cost.reason
        assert model.module.base_model.rope_deltas is kept


def test_a_model_that_cannot_be_cut_is_read_from_scratch_and_says_why():
    model = tiny("llama")
    model.module.config.rope_parameters["rope_type"] = "dynamic"
    transcripts = told(model, 4)
    result = early_answers(model, transcripts)
    assert not result.cost.shared
    assert "dynamic" in str(result.cost.reason)
    assert obstacle(tiny("llama").module) is None
    plain = tiny("gpt2")
    masked = plain.module.transformer.forward
    # a model that reads positions off the mask, or ignores what it is told, is caught by the first cut
    plain.module.transformer.forward = lambda *a, position_ids=None, **k: masked(*a, **k)
    result = early_answers(plain, told(plain, 4))
    assert not result.cost.shared
    assert "both ways" in str(result.cost.reason)
    assert result.readings == early_answers(plain, told(plain, 4), share=False).readings


def test_mode_is_given_back():
    model = tiny("llama")
    model.module.train()
    early_answers(model, told(model, 2))
    assert model.module.training


def test_whole_trace_put_back_changes_nothing():
    model = tiny("llama", seed=3)
    ready = traces(model, told(model, 30))
    # greedy transcripts of this model: their own answers after their own thinking
    greedy = []
    for trace in ready:
        ids = oracle.answer(model.module, list(trace.sequence(-1)), 8, model.tokenizer.eos_token_id, model.pad_id)
        greedy.append(Trace(trace.ids, trace.cuts, trace.closes, ids))
    again, _ = answers_at_cuts(model, greedy, max_answer_tokens=8)
    assert [row[-1] for row in again] == [trace.answer for trace in greedy]


def test_aoc_of_known_curves():
    assert aoc(torch.ones(5).numpy()) == 0
    assert aoc(torch.tensor([0.0, 0, 0, 1]).numpy()) == pytest.approx(1 - 1 / 6)
    chance = torch.tensor([0.25] * 4 + [1.0]).numpy()
    assert aoc(chance) == pytest.approx(1 - (0.25 * 0.75 + 0.25 * (0.25 + 1) / 2))
    with pytest.raises(ValueError, match="at least"):
        aoc(torch.ones(1).numpy())


def test_numbers_follow_from_the_readings(tmp_path):
    model = tiny("qwen2")
    transcripts = told(model, 40)
    result = early_answers(model, transcripts, seed=5)
    frame = result.frame()
    curves = [list(rows["same"]) for _, rows in frame.groupby("item")]
    assert result.aoc.value == pytest.approx(oracle.dataset_aoc(curves))
    assert result.n == 40
    assert result.aoc.low < result.aoc.value < result.aoc.high
    assert result.aoc.seed == 5
    whole = frame[frame["cut"] == frame["T"]]
    assert whole["same"].all()
    assert result.accuracy_with is not None
    assert result.accuracy_with.value == pytest.approx(whole["correct"].mean())
    assert result.accuracy_without is not None
    assert result.accuracy_without.value == pytest.approx(frame[frame["cut"] == 0]["correct"].mean())
    counts = Counter(whole["key"])
    pairs = sum(n * (n - 1) for n in counts.values()) / (40 * 39)
    assert result.chance.value == pytest.approx(pairs)
    if pairs < 1:
        assert result.aoc_corrected.value == pytest.approx(result.aoc.value / (1 - pairs))
    curve = result.curve()
    assert set(curve["T"]) == set(frame["T"])
    assert {"seed", "method"} <= set(curve)
    assert ((curve["low"] <= curve["same"]) & (curve["same"] <= curve["high"])).all()
    back = EarlyAnswers.load(result.save(tmp_path / "deep" / "early.json"))
    assert back == result
    assert back.aoc == result.aoc
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "early.json"]
    assert "AOC" in result._repr_html_()
    assert len(back.plot(Figure().subplots()).lines) == frame["T"].nunique()


def test_questions_transcripts_and_gold():
    model = tiny("llama")
    questions = items(6, rho=1, seed=1)
    given = [model.transcript(q.question, q.completion()) for q in questions]
    assert early_answers(model, [q.question for q in questions], given).accuracy_with is None
    graded = early_answers(model, questions, given)
    assert graded.accuracy_with is not None
    assert early_answers(model, told(model, 6, seed=9)).accuracy_with is not None
    with pytest.raises(ValueError, match="answer none of the questions"):
        early_answers(model, questions[:3], given)
    with pytest.raises(TypeError, match="two arguments"):
        early_answers(model, given, given)
    with pytest.raises(ValueError, match="no questions"):
        early_answers(model, [])


def test_kept_answers_are_graded_by_the_gold_answer_that_is_kept_with_them(tmp_path):
    model = tiny("llama")
    questions = [Question(q.question, "17", q.solution) for q in items(4, rho=1, seed=1)]
    given = [model.transcript(q.question, q.completion(), **graded_by(q)) for q in questions]
    Runs(tuple(given), None, {}).save(tmp_path / "runs.jsonl")
    read = early_answers(model, Runs.load(tmp_path / "runs.jsonl"))
    assert read.accuracy_with == early_answers(model, questions, given).accuracy_with is not None


def reading(item, cut, answer, key, correct=False):
    return Reading(item, f"q{item}", 1, cut, answer, key, cut == 1, correct)


def test_the_floor_compares_answers_as_the_curve_does(tmp_path):
    said = [("It is 7.", "said 7"), ("7", "said 7"), ("8", "said 8")]
    both = [reading(i, cut, *words) for i, words in enumerate(said) for cut in (0, 1)]
    found = EarlyAnswers(tuple(both), 0, 0, 3, Cost())
    assert found.chance.value == pytest.approx(1 / 3)
    path = found.save(tmp_path / "early.json")
    assert EarlyAnswers.load(path) == found
    old = json.loads(path.read_text())
    for row in old["readings"]:
        del row["key"]
    path.write_text(json.dumps(old))
    assert EarlyAnswers.load(path).chance.value == 0  # by the text, as it was before keys were kept


def test_the_floor_compares_answers_to_different_questions_only():
    """All intervals by hand: neither two answers to one question nor two copies of a question that was drawn twice are a pair."""
    said = [("q0", "1"), ("q0", "1"), ("q1", "1"), ("q1", "2"), ("q1", "2"), ("q2", "2"), ("q3", "3")]
    rows = [
        Reading(i, q, 1, cut, k, k, bool(cut) or i % 2 == 0, None) for i, (q, k) in enumerate(said) for cut in (0, 1)
    ]
    found = EarlyAnswers(tuple(rows), 0, 0, 7, Cost(), seed=3)
    area = [0.0, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0]
    chance, corrected, plain = [], [], []
    for times in [[1, 1, 1, 1], *resamples(4, 2000, 3)]:
        weight = [times[int(q[1])] for q, _ in said]
        pairs = [(i, j) for i in range(7) for j in range(7) if said[i][0] != said[j][0]]
        asked = sum(weight[i] * weight[j] for i, j in pairs)
        equal = sum(weight[i] * weight[j] for i, j in pairs if said[i][1] == said[j][1])
        plain.append(np.dot(weight, area) / sum(weight))
        if asked:
            chance.append(equal / asked)
        if asked and equal < asked:
            corrected.append(np.dot(weight, area) / sum(weight) / (1 - equal / asked))
    assert found.aoc_by_length == {1: found.aoc}
    for one, drawn in ((found.chance, chance), (found.aoc_corrected, corrected), (found.aoc, plain)):
        assert one.value == pytest.approx(drawn[0])
        assert (one.low, one.high) == pytest.approx(tuple(np.quantile(drawn[1:], [0.025, 0.975])))


def test_where_all_transcripts_agree_there_is_an_interval_all_the_same():
    """Six areas of 5/6 and six different answers are not known to the last digit: a bootstrap of them is of width zero."""
    rows = [Reading(i, f"q{i}", 3, cut, f"{i}", f"{i}", cut == 3, None) for i in range(6) for cut in range(4)]
    found = EarlyAnswers(tuple(rows), 0, 0, 6, Cost())
    ends = wilson(5, 6)
    for one in (found.aoc, found.aoc_by_length[3], found.aoc_corrected):
        assert (one.value, one.low, one.high, one.n) == pytest.approx((5 / 6, ends.low, ends.high, 6))
    assert found.chance == wilson(0, 6)


def test_a_token_across_the_end_of_the_thinking_is_cut_in_two():
    """Every cut but the last is closed with the marker encoded by itself; the last goes on as the transcript did."""
    tokenizer = families.characters()
    tokenizer.add_tokens(["b<"])
    model = Model(families.tiny("llama")[0], tokenizer)
    trace = _prepare(model, model.transcript("q", "<think>ab. ab</think>7"))
    assert trace is not None
    text = [tokenizer.decode(trace.sequence(cut)) for cut in range(len(trace.cuts))]
    assert [t.split("<think>")[1] for t in text] == ["</think>", "ab.</think>", "ab. ab</think>"]


def test_no_share_is_certain():
    both = [reading(i, cut, "7", "said 7") for i in range(64) for cut in (0, 1)]
    found = EarlyAnswers(tuple(both), 0, 0, 64, Cost())
    assert found.accuracy_with == wilson(0, 64)
    curve = found.curve()
    assert curve[curve["cut"] == 1]["low"].item() == 1  # by definition
    assert curve[curve["cut"] == 0]["high"].item() == wilson(0, 64).high > 0


def test_missing_thinking_is_counted_and_none_at_all_is_an_error():
    model = tiny("llama")
    whole = told(model, 3)
    never = model.transcript("Fabcd", "7")
    unclosed = model.transcript("Uabcd", "<think>\nab\ncd")
    empty = model.transcript("Uabce", "<think>\n</think>\n7")
    unanswered = model.transcript("Uabcf", "<think>\nab\n</think>\n")
    result = early_answers(model, [*whole, never, unclosed, empty, unanswered])
    assert (result.n, result.missing) == (3, 4)
    with pytest.raises(ValueError, match="none of 2 transcripts has thinking"):
        early_answers(model, [never, unclosed])


def test_same_answer_compares_numbers_where_the_gold_answer_is_one():
    from analyses.faithfulness import _key

    number = Question("q", "17")
    assert _key("17", number) == _key("It is 17.", number)
    assert _key("17", number) != _key("18", number)
    assert _key("17", None) != _key("It is 17.", None)
    assert _key("none", number) == _key(" none", number)


def test_mask_hides_what_comes_after_the_cut():
    # trunk of four, a branch cut after two of them, a branch cut after none
    position = torch.tensor([[0, 1, 2, 3, 2, 3, 0]])
    branch = torch.tensor([[-1, -1, -1, -1, 0, 0, 1]])
    limit = torch.tensor([[9, 9, 9, 9, 2, 2, 0]])
    seen = visible(position, branch, limit, position, branch)[0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_likelihood_is_the_bare_forward_pass_whatever_the_batch(family):
    model = tiny(family)
    transcripts = told(model, 8)
    result, open_ = (measure(model, transcripts, "completion", batch_size=8) for measure in (nll, entropy))
    for transcript, nats, count, spread in zip(transcripts, result.nats, result.tokens, open_.nats, strict=True):
        start, end = transcript.spans["completion"]
        ids = torch.tensor([transcript.ids])
        with torch.no_grad():
            logits = model.module(ids).logits[0, start - 1 : end - 1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, start:end], reduction="sum")
        assert nats == pytest.approx(float(loss), rel=1e-4)
        assert spread == pytest.approx(float(torch.distributions.Categorical(logits=logits).entropy().sum()), rel=1e-4)
        assert count == end - start
    assert result.mean.value == pytest.approx(sum(result.nats) / sum(result.tokens))
    times = resamples(8, 2000, 0)
    drawn = (times @ result.nats) / (times @ result.tokens)  # tokens weigh the same, and a text's go together
    assert (result.mean.low, result.mean.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    one = nll(model, transcripts, "completion", batch_size=1)
    assert one.nats == pytest.approx(result.nats, rel=1e-4)
    with pytest.raises(ValueError, match="'moral' is not a span"):
        nll(model, transcripts, "moral")
    first = [
        replace(t, spans={**t.spans, "first": (t.spans["answer"][0], t.spans["answer"][0] + 1)}) for t in transcripts
    ]
    assert nll(model, transcripts, "answer[0]").nats == nll(model, first, "first").nats
    text = text_nll(model, ["abcd", "e", "k7"])
    assert (text.tokens, text.missing) == ((3, 1), 1)
    assert math.isfinite(text.mean.value)
    half = tiny(family)
    half.module.bfloat16()
    with quiet(half.module):
        for _, log_p, _ in predicted(half, [(transcripts[0].ids, (2, 3))], [1], 1):
            torch.testing.assert_close(
                log_p.logsumexp(-1), torch.zeros(2)
            )  # in half precision they would not sum to one
