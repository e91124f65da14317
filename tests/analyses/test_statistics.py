"""Intervals: closed forms, scipy, and coverage on data whose truth is known."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from analyses.statistics import (
    Estimate,
    bootstrap,
    crossed_bootstrap,
    holm,
    mcnemar,
    paired_bootstrap,
    percentile,
    resamples,
    share,
    share_difference,
    tango,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 200), (86, 200), (999, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_is_scipys(k, n, level):
    found = wilson(k, n, level)
    expected = scipy.stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert found.value == k / n
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert (found.n, found.seed, found.level) == (n, None, level)


def test_wilson_bounds_solve_the_score_equation():
    # the interval's ends p are where |k/n - p| = z sqrt(p (1 - p) / n)
    found = wilson(7, 40)
    for p in (found.low, found.high):
        assert abs(7 / 40 - p) == pytest.approx(1.959963985 * math.sqrt(p * (1 - p) / 40), rel=1e-8)


def test_no_trials_say_nothing():
    empty = wilson(0, 0)
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.n) == (0.0, 1.0, 0)


def test_estimate_prints_short():
    assert str(Estimate(0.43, 0.36, 0.5, 200, None, "wilson")) == "0.43 [0.36, 0.5] (n=200)"


def test_a_share_is_never_certain():
    assert share([0.0] * 64, range(64)) == wilson(0, 64)
    assert share([1.0, 0.0, 0.0], list("abc")) == wilson(1, 3)
    twice = share([1.0, 0.0, 1.0, 1.0], list("aabb"), seed=3)
    assert twice == bootstrap([1.0, 0.0, 1.0, 1.0], clusters=list("aabb"), seed=3)
    assert share([True] * 4, list("aabb")) == wilson(2, 2)  # two questions, however often each was answered
    # each question half right: all draws agree on a half, which three questions do not make certain
    alike = share([1.0, 0.0] * 3, list("aabbcc"))
    z = scipy.stats.norm.ppf(0.975)
    reach = z / 2 / math.sqrt(3 + z * z)  # Wilson's, of a half of 3
    assert alike.value == 0.5
    assert (alike.low, alike.high, alike.n) == (pytest.approx(0.5 - reach), pytest.approx(0.5 + reach), 3)
    assert math.isnan(share([1.0, 0.0], list("aa")).low)  # one question says nothing of how much another would differ
    for values, message in (([0.5], "0 and 1"), ([], "nothing to estimate from")):
        with pytest.raises(ValueError, match=message):
            share(values, ["a"] * len(values))


@pytest.mark.parametrize(
    ("won", "lost", "n"),
    [(0, 0, 8), (12, 2, 50), (1, 4, 9), (5, 5, 10), (0, 3, 7), (6, 0, 6), (0, 6, 6), (1.5, 0.5, 4)],
)
def test_tango_bounds_solve_the_score_equation(won, lost, n):
    found = tango(won, lost, n, 0.9)
    assert (found.value, found.n, found.level) == (pytest.approx((won - lost) / n), n, 0.9)
    for end, z in ((found.low, 1.6448536), (found.high, -1.6448536)):
        if end in (-1, 1):  # the difference is there itself
            assert end == found.value
            continue

        def unlikely(q, end=end):  # of q lost and q + end won, the rest alike
            counts = ((lost, q), (won, q + end), (n - won - lost, 1 - 2 * q - end))
            return -sum(scipy.special.xlogy(count, p) for count, p in counts)

        q = scipy.optimize.minimize_scalar(
            unlikely, bounds=(max(0, -end), (1 - end) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        assert (won - lost - n * end) / math.sqrt(n * (2 * q + end - end**2)) == pytest.approx(z, abs=1e-4)


def test_a_difference_of_shares_is_never_certain():
    nobody = share_difference([1.0, 0.0] * 4, [1.0, 0.0] * 4)
    assert nobody.value == 0
    assert [-nobody.low, nobody.high] == pytest.approx([wilson(0, 8).high] * 2)  # as many turned as none of 8
    assert share_difference([1, 0, 0, 1], [1, 1, 1, 0]) == tango(2, 1, 4)
    mixed = [0.5, 0.0, 1.0], [0.5, 1.0, 1.0]
    assert share_difference(*mixed, seed=4) == paired_bootstrap(*mixed, seed=4)
    # several answers a question, and each question alike: a third of three turned
    assert share_difference([1 / 3, 2 / 3, 1], [0, 1 / 3, 2 / 3]).low == pytest.approx(tango(0, 1, 3).low)
    with pytest.raises(ValueError, match="between 0 and 1"):
        share_difference([0.5], [2.0])
    with pytest.raises(ValueError, match="nan won and 1 lost of 3"):
        tango(math.nan, 1, 3)
    with pytest.raises(ValueError, match="1 won and 3 lost of 3"):
        tango(1, 3, 3)


def test_bootstrap_agrees_with_the_normal_interval_on_many_items():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    found = bootstrap(values, draws=4000)
    se = values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * se, abs=0.15 * se)
    assert found.high == pytest.approx(values.mean() + 1.96 * se, abs=0.15 * se)
    assert "4000" in found.method


def test_bootstrap_is_its_literal_restatement():
    rng = np.random.default_rng(1)
    values, labels = rng.normal(size=30), rng.integers(0, 6, size=30)
    found = bootstrap(values, clusters=labels, draws=300, seed=5)
    drawn = []
    names = np.unique(labels)
    for count in resamples(len(names), 300, 5):
        drawn_names = np.repeat(names, count)
        sample = np.concatenate([values[labels == name] for name in drawn_names])
        drawn.append(np.mean(sample))
    assert found.low == pytest.approx(np.quantile(drawn, 0.025))
    assert found.high == pytest.approx(np.quantile(drawn, 0.975))
    assert found.n == len(names)


def test_an_interval_of_width_zero_says_that_all_draws_agree():
    for found in (
        bootstrap([2.0] * 3),
        paired_bootstrap([1.0, 2.0], [1.5, 2.5]),
        crossed_bootstrap(np.full((2, 4), 0.7)),
    ):
        assert found.low == pytest.approx(found.high)
        assert found.method.endswith("draws, which all agree")
    assert "agree" not in bootstrap([1.0, 2.0]).method
    assert "agree" not in bootstrap([1.0]).method  # it has no interval


def test_a_statistic_of_ones_own():
    values = np.random.default_rng(2).normal(size=60)
    fast, slow = bootstrap(values, draws=200), bootstrap(values, statistic=np.mean, draws=200)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high))
    labels = np.arange(60) % 7  # 9 items of some clusters, 8 of others
    fast, slow = (bootstrap(values, clusters=labels, statistic=own, draws=200) for own in (None, np.mean))
    assert (fast.value, fast.low, fast.high, fast.n) == pytest.approx((slow.value, slow.low, slow.high, slow.n))
    pairs = np.stack([values, 2 * values + 0.1], axis=1)
    slope = bootstrap(pairs, statistic=lambda rows: np.polyfit(rows[:, 0], rows[:, 1], 1)[0], draws=50)
    assert slope.low == pytest.approx(2)
    assert slope.high == pytest.approx(2)


def test_seeds_and_items_are_drawn_apart_from_each_other():
    effect = np.random.default_rng(7).normal(size=30)
    spread = math.sqrt(2 * effect.var() / 30)  # of the mean of rows less that of columns
    for table in (effect[:, None] - effect, effect[:, None] + effect):
        found = crossed_bootstrap(table, draws=4000)
        assert (found.high - found.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)


def test_seeds_decide_the_draws():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_intervals_cover_the_truth_and_need_clusters_to():
    # 40 questions, 5 answers each, strongly alike within a question: true mean 0
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(40), 5)
    hits, naive, trials = 0, 0, 300
    for trial in range(trials):
        values = rng.normal(size=40)[labels] + 0.5 * rng.normal(size=200)
        clustered = bootstrap(values, clusters=labels, draws=400, seed=trial)
        ignoring = bootstrap(values, draws=400, seed=trial)
        hits += clustered.low <= 0 <= clustered.high
        naive += ignoring.low <= 0 <= ignoring.high
    assert 0.90 <= hits / trials <= 0.98
    assert naive / trials < 0.8


def test_wider_levels_are_wider():
    values = np.random.default_rng(5).normal(size=80)
    narrow, wide = bootstrap(values, level=0.5), bootstrap(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_narrows_the_interval_of_correlated_arms():
    rng = np.random.default_rng(6)
    base = rng.normal(size=100)
    tuned = base + 0.3 + 0.1 * rng.normal(size=100)
    paired = paired_bootstrap(base, tuned)
    assert paired.value == pytest.approx((tuned - base).mean())
    assert paired.low > 0
    assert paired.high - paired.low < 0.3 * (bootstrap(tuned).high - bootstrap(tuned).low)
    assert paired_bootstrap(tuned, base).value == pytest.approx(-paired.value)


def test_one_unit_gives_no_interval():
    found = bootstrap([0.2, 0.4], clusters=["only", "only"])
    assert found.value == pytest.approx(0.3)
    assert found.n == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_resamples_draw_every_unit_equally():
    counts = resamples(7, 5000, 0)
    assert (counts.sum(axis=1) == 7).all()
    assert np.allclose(counts.mean(axis=0), 1, atol=0.06)


def test_percentile_takes_the_quantiles():
    found = percentile(5.0, np.arange(1001.0), n=9, seed=2, level=0.9)
    assert (found.low, found.high, found.n, found.seed) == (pytest.approx(50), pytest.approx(950), 9, 2)


def test_holm_by_hand_and_by_its_closure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    # any hypothesis is rejected by Holm exactly when every subset that holds it is rejected by Bonferroni
    rng = np.random.default_rng(7)
    for _ in range(50):
        p = rng.uniform(size=4) ** 2
        subsets = [[i for i in range(4) if mask >> i & 1] for mask in range(1, 16)]
        closed = [max(min(1.0, len(s) * min(p[i] for i in s)) for s in subsets if j in s) for j in range(4)]
        assert holm(p) == pytest.approx(closed)


def test_the_ends_of_what_may_be_asked():
    """p-values of 0 and 1 are p-values, one question is a question, and one that is right each time is one right of one."""
    assert holm([0.0, 1.0]).tolist() == [0.0, 1.0]
    assert tango(1, 0, 1).value == 1
    assert share([1, 1, 1], ["a"] * 3) == wilson(1, 1)
    assert share([0, 0], ["a"] * 2) == wilson(0, 1)


def test_mcnemar_is_the_binomial_test():
    rng = np.random.default_rng(8)
    for _ in range(20):
        a, b = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
        lost, won = int((a > b).sum()), int((b > a).sum())
        assert mcnemar(a, b) == pytest.approx(scipy.stats.binomtest(lost, lost + won).pvalue)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar([False] * 10, [True] * 10) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wilson(5, 3), "5 successes in 3"),
        (lambda: wilson(1, 3, level=95), "level=95"),
        (lambda: bootstrap([]), "no values"),
        (lambda: bootstrap([1.0, math.nan]), "1 of 2 values are NaN"),
        (lambda: bootstrap([1.0, 2.0], clusters=["a"]), "one label a value"),
        (lambda: bootstrap([[1.0, 2.0]]), "give a statistic"),
        (lambda: bootstrap([1.0, 2.0], draws=0), "at least 1"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "same items"),
        (lambda: holm([0.2, 1.2]), r"\[0, 1\]"),
        (lambda: holm([-0.2, 0.5]), r"\[0, 1\]"),
        (lambda: tango(1, 1, 4, level=95), "level=95"),
        (lambda: tango(-1, 2, 4), "-1 won and 2 lost of 4"),
        (lambda: tango(2, -1, 4), "2 won and -1 lost of 4"),
        (lambda: tango(0, 0, 0), "of 0 questions"),
        (lambda: share_difference([0.5, -0.5], [0.5, 0.5]), "between 0 and 1"),
        (lambda: share_difference([0.5, 0.5], [0.5, 1.5]), "between 0 and 1"),
        (lambda: crossed_bootstrap(np.zeros((0, 3))), r"this one has shape \(0, 3\)"),
        (lambda: crossed_bootstrap(np.array([[0.0, math.nan]])), "without gaps"),
        (lambda: mcnemar([1, 0], [1]), "same items"),
        (lambda: mcnemar([1, 0.5], [1, 0]), "right/wrong"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
