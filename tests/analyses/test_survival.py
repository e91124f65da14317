"""Lengths that were cut off: closed forms, scipy, slow restatements, and coverage where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.statistics import (
    bootstrap,
    followed,
    kaplan_meier,
    logrank,
    page,
    resamples,
    restricted_difference,
    restricted_mean,
)
from tests.oracles import survival as slow


def capped(rng: np.random.Generator, n: int, mean: float = 30, cap: float = 40) -> tuple[np.ndarray, np.ndarray]:
    """Whole lengths, at least 1, all cut off at the same cap."""
    lengths = np.ceil(rng.exponential(mean, size=n))
    return np.minimum(lengths, cap), lengths <= cap


def censored(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths cut off at places of their own."""
    lengths, caps = np.ceil(rng.exponential(20, size=n)), np.ceil(rng.uniform(5, 60, size=n))
    return np.minimum(lengths, caps), lengths <= caps


SAMPLES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(SAMPLES)
def test_the_curve_is_the_product_as_written_and_scipys(sample):
    lengths, ended = (np.array(column) for column in zip(*sample, strict=True))
    found = kaplan_meier(lengths, ended)
    assert found.at(-1) == 1
    for time in range(int(found.followed) + 1 if math.isfinite(found.followed) else 14):
        assert found.at(time) == pytest.approx(slow.share_lasting(lengths, ended, time), abs=1e-12)
    theirs = scipy.stats.ecdf(scipy.stats.CensoredData.right_censored(lengths, ~ended)).sf
    for time, share in zip(found.times, found.share, strict=True):
        assert theirs.evaluate(time) == pytest.approx(share, abs=1e-12)
    assert found.ended.sum() == ended.sum()
    if found.followed < math.inf:
        assert math.isnan(found.at(found.followed + 1))
        assert found.followed == lengths.max()


@settings(max_examples=100, deadline=None)
@given(SAMPLES, st.integers(1, 12))
def test_the_restricted_mean_is_the_area_as_written(sample, until):
    lengths, ended = (np.array(column) for column in zip(*sample, strict=True))
    if until > followed(lengths, ended):
        with pytest.raises(ValueError, match="as far as the lengths were followed"):
            restricted_mean(lengths, ended, until=until, draws=2)
        return
    found = restricted_mean(lengths, ended, until=until, draws=2)
    assert found.value == pytest.approx(slow.restricted_mean(lengths, ended, until), abs=1e-9)
    assert 0 <= found.value <= until


def test_with_one_cap_for_all_it_is_the_mean_of_capped_lengths():
    lengths, ended = capped(np.random.default_rng(0), 60)
    found = restricted_mean(lengths, ended, seed=3)
    assert found.value == pytest.approx(lengths.mean())
    plain = bootstrap(lengths, seed=3)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    shorter = restricted_mean(lengths, ended, until=10)
    assert shorter.value == pytest.approx(np.minimum(lengths, 10).mean())


def test_caps_of_their_own_bias_the_plain_mean_but_not_this_one():
    rng = np.random.default_rng(1)
    lengths, caps = np.ceil(rng.exponential(20, size=20000)), np.ceil(rng.uniform(5, 60, size=20000))
    seen, ended = np.minimum(lengths, caps), lengths <= caps
    true = np.minimum(lengths, 50).mean()
    assert restricted_mean(seen, ended, until=50, draws=2, clusters=np.arange(20000) % 100).value == pytest.approx(
        true, rel=0.03
    )
    assert np.minimum(seen, 50).mean() < 0.85 * true


def test_each_draw_is_the_mean_of_the_items_drawn():
    rng = np.random.default_rng(2)
    lengths, ended = censored(rng, 30)
    labels = rng.integers(0, 7, size=30)
    names, unit = np.unique(labels, return_inverse=True)
    until = 0.5 * float(lengths.max())
    drawn = []
    for count in resamples(len(names), 60, 5):
        rows = np.repeat(np.arange(30), count[unit])
        drawn.append(slow.restricted_mean(lengths[rows].tolist(), ended[rows].tolist(), until))
    found = restricted_mean(lengths, ended, until=until, clusters=labels, draws=60, seed=5, level=0.8)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])))
    assert found.n == len(names)


def test_each_draw_of_a_difference_is_of_the_questions_drawn_for_both():
    rng = np.random.default_rng(12)
    sides, labels = [censored(rng, 30), censored(rng, 20)], (rng.integers(0, 7, size=30), rng.integers(3, 10, size=20))
    names, unit = np.unique(np.concatenate(labels), return_inverse=True)
    until = 0.5 * min(float(lengths.max()) for lengths, _ in sides)
    drawn = []
    for count in resamples(len(names), 60, 5):
        rows = [np.repeat(np.arange(len(own)), count[own]) for own in (unit[:30], unit[30:])]
        base, tuned = (
            slow.restricted_mean(lengths[own].tolist(), ended[own].tolist(), until)
            for (lengths, ended), own in zip(sides, rows, strict=True)
        )
        drawn.append(tuned - base)
    found = restricted_difference(*sides, until=until, clusters=labels, draws=60, seed=5, level=0.8)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])))
    assert found.n == len(names)


def test_the_interval_is_as_wide_as_the_closed_form():
    lengths, ended = censored(np.random.default_rng(3), 500)
    found = restricted_mean(lengths, ended, until=40, draws=4000)
    error = slow.restricted_mean_error(lengths.tolist(), ended.tolist(), 40)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_intervals_cover_the_truth_under_caps_of_their_own():
    rng = np.random.default_rng(4)
    truth = 20 * (1 - math.exp(-40 / 20))  # of an exponential with mean 20, restricted to 40
    hits = 0
    for trial in range(200):
        lengths, caps = rng.exponential(20, size=80), rng.uniform(5, 80, size=80)
        seen, ended = np.minimum(lengths, caps), lengths <= caps
        if followed(seen, ended) < 40:
            continue
        found = restricted_mean(seen, ended, until=40, draws=300, seed=trial)
        hits += found.low <= truth <= found.high
    assert 0.89 <= hits / 200 <= 0.98


def test_all_cut_off_is_at_least_the_cap_and_one_question_has_no_interval():
    for lengths, ended, until in (
        ([8, 8, 8], [False] * 3, 8),
        ([8, 9, 30], [True, False, True], 8),  # they ended, but not before
    ):
        found = restricted_mean(lengths, ended, until=until)
        assert (found.value, found.n) == (8, 3)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert str(found) == "8 (n=3, no interval: none of 3 ended before 8, so it is at least that)"
    for until in (
        None,
        8,
        20,
    ):  # a handful of equal lengths, all known: their mean is, and nothing is of how far others would scatter
        equal = restricted_mean([8, 8, 8], [True] * 3, until=until)
        assert (equal.value, equal.n, equal.method) == (8, 3, "no interval: all draws agree")
        assert math.isnan(equal.low)
    once = restricted_mean([8, 8, 5], [False, False, True])
    assert once.low < once.value == 7 < once.high
    alone = restricted_mean([3, 5], [True, True], clusters=["q", "q"])
    assert alone.value == 4
    assert math.isnan(alone.low)
    assert kaplan_meier([8, 8], [False, False]).median == math.inf
    assert kaplan_meier([1, 2, 3, 4], [True] * 4).median == 2


def test_lengths_that_all_change_alike_leave_no_interval_of_the_change():
    for base, tuned, value in (
        ([3, 4, 5], [4, 5, 6], 1),
        ([3, 4, 5], [3, 4, 5], 0),
        ([5, 5], [5, 5], 0),
        ([3, 3], [8, 8], 5),
    ):
        found = restricted_difference((base, [True] * len(base)), (tuned, [True] * len(base)), until=8)
        assert (found.value, found.n, found.method) == (pytest.approx(value), len(base), "no interval: all draws agree")
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_the_difference_is_of_the_two_means_on_common_ground():
    rng = np.random.default_rng(5)
    base, tuned = capped(rng, 40, cap=40), capped(rng, 40, mean=50, cap=60)
    found = restricted_difference(base, tuned, seed=1)  # by default as far as the base was followed
    assert found.value == pytest.approx(np.minimum(tuned[0], 40).mean() - base[0].mean())
    back = restricted_difference(tuned, base, seed=1)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    with pytest.raises(ValueError, match="not beyond 40"):
        restricted_difference(base, tuned, until=50)
    unknown = restricted_difference(([8, 8], [False, False]), ([8, 9], [True, True]))
    assert (unknown.value, unknown.n, math.isnan(unknown.low), math.isnan(unknown.high)) == (0, 2, True, True)
    assert "none of 4 ended before 8" in str(unknown)
    assert restricted_difference(([8, 8], [False, False]), ([3, 8], [True, False])).value == -2.5
    assert (
        restricted_difference(([1, 2], [1, 1]), ([5, 8], [1, 1])).value == 5
    )  # nothing was cut off: of the plain means


def test_pairing_by_question_narrows_the_difference():
    rng = np.random.default_rng(6)
    ease = rng.exponential(25, size=60)
    question = np.repeat(np.arange(60), 3)
    sides = []
    for shift in (0, 3):
        lengths = np.ceil(ease[question] + rng.uniform(0, 4, size=180) + shift)
        sides.append((np.minimum(lengths, 60), lengths <= 60))
    paired = restricted_difference(*sides, until=60, clusters=(question, question))
    apart = restricted_difference(*sides, until=60, clusters=(question, question + 1000))
    assert paired.value == pytest.approx(apart.value)
    assert paired.n == 60
    assert paired.high - paired.low < 0.3 * (apart.high - apart.low)
    assert paired.low > 0


def test_the_log_rank_test_is_scipys_and_as_written():
    rng = np.random.default_rng(7)
    for _ in range(20):
        (a, a_over), (b, b_over) = censored(rng, 25), censored(rng, 30)
        lengths, ended = np.concatenate([a, b]), np.concatenate([a_over, b_over])
        second = np.arange(55) >= 25
        found = logrank(lengths, ended, second)
        surplus, variance = slow.logrank(lengths, ended, second)
        assert found.z == pytest.approx(surplus / math.sqrt(variance))
        sides = (scipy.stats.CensoredData.right_censored(*side) for side in ((a, ~a_over), (b, ~b_over)))
        assert found.p == pytest.approx(scipy.stats.logrank(*sides).pvalue)
        assert logrank(lengths, ended, second, strata=["one"] * 55).z == pytest.approx(found.z)


def test_strata_add_up_and_find_what_questions_hide():
    rng = np.random.default_rng(8)
    ease = np.repeat(rng.exponential(60, size=40), 2)
    second = np.tile([False, True], 40)
    lengths, ended = np.ceil(ease) + 4 * second, np.ones(80, dtype=bool)
    question = np.repeat(np.arange(40), 2)
    sums = np.sum([slow.logrank(lengths[s], ended[s], second[s]) for s in (question == q for q in range(40))], axis=0)
    found = logrank(lengths, ended, second, strata=question)
    assert found.z == pytest.approx(sums[0] / math.sqrt(sums[1]))
    assert found.z > 3  # the second lasts longer in every question
    assert found.n == 40
    assert abs(logrank(lengths, ended, second).z) < 2
    assert logrank(lengths, ended, ~second, strata=question).z == pytest.approx(-found.z)


def test_the_smallest_samples_have_closed_forms():
    # at 1 one of two ends, of whom half are in the second group: 1/2 expected, 0 seen, variance 1/4; at 2 nothing can vary
    both = logrank([1, 2], [True, True], [0, 1])
    assert str(both) == "z 1, p 0.317 (n=2, log-rank)"
    assert str(logrank([1, 2], [True, True], [0, 1], strata=["q", "q"])) == "z 1, p 0.317 (n=1, log-rank, stratified)"
    # of two levels, Page's test is the sign test: (rises - falls) / sqrt(blocks)
    assert page([[1, 2]]).z == 1
    assert page([[1, 2], [3, 5], [4, 2], [0, 9]]).z == 1


def test_nothing_to_compare_is_no_evidence():
    assert logrank([5, 5], [False, False], [0, 1]).p == 1
    assert page([[1, 1, 1], [2, 2, 2]]).p == 1


def test_pages_test_is_scipys_without_ties():
    rng = np.random.default_rng(9)
    for _ in range(20):
        table = rng.normal(size=(12, 5)) + 0.3 * np.arange(5)
        ranks = scipy.stats.rankdata(table, axis=1)
        theirs = scipy.stats.page_trend_test(ranks, ranked=True, method="asymptotic")
        found = page(table)
        assert min(found.p / 2, 1 - found.p / 2) == pytest.approx(min(theirs.pvalue, 1 - theirs.pvalue))
        assert (found.z > 0) == (theirs.pvalue < 0.5)
        assert found.n == 12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_pages_variance_is_that_of_shuffling_the_tied_blocks(table):
    score, mean, variance = slow.page_by_shuffling(table)
    found = page(table)
    assert found.z == pytest.approx((score - mean) / math.sqrt(variance) if variance else 0.0, abs=1e-9)


def test_trend_points_the_way_the_values_go_and_is_calm_without_one():
    rng = np.random.default_rng(10)
    rising = rng.integers(0, 3, size=(30, 5)) + np.arange(5)
    assert page(rising).z > 4
    assert page(rising[:, ::-1]).z == pytest.approx(-page(rising).z)
    alarms = [page(rng.integers(0, 2, size=(20, 6))).p < 0.05 for _ in range(600)]
    assert 0.03 <= np.mean(alarms) <= 0.07


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kaplan_meier([], []), "an item at least"),
        (lambda: kaplan_meier([1, 2], [True]), "one of each"),
        (lambda: kaplan_meier([1, -1], [True, True]), "not negative"),
        (lambda: kaplan_meier([1, math.nan], [True, True]), "finite"),
        (lambda: kaplan_meier([1, math.inf], [True, True]), "finite"),
        (lambda: kaplan_meier([[1, 2]], [[True, True]]), "one of each"),
        (lambda: kaplan_meier([1, 2], [True, 2]), "true or false"),
        (lambda: restricted_mean([4, 9], [True, False], until=10), "not beyond 9"),
        (lambda: restricted_mean([4, 9], [True, False], until=0), "above 0"),
        (lambda: restricted_mean([4, 9], [True, False], until=math.nan), "above 0"),
        (lambda: restricted_mean([4, 9], [True, True], clusters=["a"]), "one label a value"),
        (lambda: restricted_difference(([1, 2], [1, 1]), ([1], [1])), "in clusters"),
        (lambda: logrank([1, 2], [True, True], [1, 1]), "two groups"),
        (lambda: logrank([1, 2], [True, True], [1, 3]), "two groups"),
        (lambda: logrank([1, 2, 3], [True] * 3, [0, 1, 2]), "two groups"),
        (lambda: logrank([1, 2], [True, True], [0, 1, 0]), "two groups"),
        (lambda: page([[1.0, math.nan]]), "missing values"),
        (lambda: page([1.0, 2.0]), "a table of blocks"),
        (lambda: page([[1.0], [2.0]]), "at least two levels"),
        (lambda: page(np.empty((0, 3))), "a table of blocks"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
