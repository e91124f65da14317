"""AUCs count every pair, intervals redraw whole questions, folds and shuffles keep them whole."""

import numpy as np
import pytest

from probes.held_out import auc, auc_score, deal, mean_score, require_two_a_fold, shuffled, units
from tests.oracles import directions as oracle


def rows(seed: int, n: int = 40, ties: bool = False):
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 4, n).astype(float) if ties else draw.normal(size=n)
    return scores, draw.random(n) < 0.4, draw.integers(0, 9, n), draw.integers(0, 3, n)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_every_pair_counts(seed, ties):
    scores, labels, _, strata = rows(seed, ties=ties)
    assert auc(scores, labels) == pytest.approx(oracle.auc(scores, labels, [0] * len(scores)))
    assert auc(scores, labels, strata) == pytest.approx(oracle.auc(scores, labels, strata))
    assert auc(-scores, labels, strata) == pytest.approx(1 - auc(scores, labels, strata))


def copies(groups, times):
    """Row indices of a resample, and for each row which copy of its group it is."""
    index, copy = [], []
    for group, count in enumerate(times):
        for k in range(count):
            mine = np.flatnonzero(groups == group)
            index += list(mine)
            copy += [(group, k)] * len(mine)
    return index, copy


@pytest.mark.parametrize("inside", [False, True])
def test_the_interval_redraws_whole_groups(inside):
    """Each draw restated by copying rows; strata inside a group are copied with it and stay apart."""
    scores, labels, groups, strata = rows(1, ties=True)
    groups = units(groups)
    kept = groups if inside else strata
    found = auc_score(scores, labels, groups, kept, draws=60, seed=3)
    count = groups.max() + 1
    drawn = []
    for times in np.random.default_rng(3).multinomial(count, np.full(count, 1 / count), size=60):
        index, copy = copies(groups, times)
        drawn.append(oracle.auc(scores[index], labels[index], [str(c) for c in copy] if inside else kept[index]))
    low, high = np.quantile([d for d in drawn if d == d], [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.n == count
    wider = auc_score(scores, labels, groups, kept, folds=5, draws=60, seed=3)
    assert wider.low == pytest.approx(max(0, found.value - 1.5 * (found.value - low)))
    assert wider.high == pytest.approx(min(1, found.value + 1.5 * (high - found.value)))


def test_cross_fitted_intervals_hold_the_truth():
    """Rows without any signal, cross-fitted: chance is outside about one 95 % interval in twenty; without the widening in one of six."""
    plain = widened = 0
    for trial in range(150):
        draw = np.random.default_rng(trial)
        X, y, g = draw.normal(size=(60, 30)), np.arange(60) % 2 == 1, np.arange(60)
        fold, scores = deal(g, y, seed=trial), np.empty(60)
        for k in range(5):
            train = fold != k
            scores[~train] = X[~train] @ (X[train & y].mean(axis=0) - X[train & ~y].mean(axis=0))
        for folds in (None, 5):
            found = auc_score(scores, y, g, fold, folds=folds, draws=200)
            if folds:
                widened += found.low <= 0.5 <= found.high
            else:
                plain += found.low <= 0.5 <= found.high
    assert plain / 150 < 0.92
    assert 0.92 <= widened / 150 <= 1


def test_scores_that_all_tie_have_no_interval():
    """Every draw gives 0.5, which says nothing of how sure that is."""
    y, g = np.arange(12) % 2 == 1, np.arange(12) // 2
    found = auc_score(g.astype(float), y, g, g)
    assert found.value == 0.5
    assert np.isnan([found.low, found.high]).all()
    assert found.n == 6


@pytest.mark.parametrize(
    ("questions", "folds", "said"), [(20, 20, "at most 10"), (7, 5, "at most 3"), (3, 2, "at least 4")]
)
def test_a_fold_of_one_question_compares_nothing_between_questions(questions, folds, said):
    with pytest.raises(ValueError, match=f"{folds} folds of {questions} questions.* {said}"):
        require_two_a_fold(np.arange(questions), folds)
    require_two_a_fold(np.arange(2 * folds), folds)


def test_rows_without_a_score_are_left_out():
    scores, labels, groups, strata = rows(2)
    for missing in (np.arange(len(scores)) % 3 == 0, strata == 1):  # in the latter a whole stratum goes
        holes = np.where(missing, np.nan, scores)
        seen = ~missing
        assert auc_score(holes, labels, groups, strata) == auc_score(
            scores[seen], labels[seen], groups[seen], strata[seen]
        )


def test_a_perfect_score_is_not_certain():
    groups, labels = np.arange(20) // 2, np.arange(20) % 2
    found = auc_score(labels * 1.0, labels, groups, groups)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.6915, abs=1e-3)  # Clopper and Pearson, 10 of 10
    found = auc_score(-labels * 1.0, labels, groups)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(0.3085, abs=1e-3)


def test_one_group_has_no_interval():
    found = auc_score([1.0, 2.0], [0, 1], [7, 7])
    assert found.value == 1
    assert np.isnan(found.low)
    assert np.isnan(auc_score([1.0, 2.0], [1, 1], [1, 2]).value)


def test_the_interval_of_a_ratio():
    draw = np.random.default_rng(0)
    hits, groups = draw.random(60) < 0.7, np.repeat(np.arange(20), 3)
    found = mean_score(hits.astype(float), np.ones(60), groups, draws=200, seed=1)
    assert found.value == pytest.approx(hits.mean())
    assert found.low < found.value < found.high
    turned = mean_score(hits.astype(float), np.ones(60), groups, flip=True, draws=200, seed=1)
    assert (turned.value, turned.low, turned.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))


def test_a_widened_interval_ends_where_the_number_does():
    rare, one = np.arange(20) == 3, np.ones(20)  # one error in 20: the bootstrap's interval begins at 0
    assert mean_score(rare * 1.0, one, np.arange(20), folds=5).low == 0
    assert mean_score(rare * 1.0, one, np.arange(20), folds=5, flip=True).high == 1
    scores, labels = np.arange(12) % 2 + 1.5 * (np.arange(12) == 4), np.arange(12) % 2  # a single pair is lost
    found = auc_score(scores, labels, np.arange(12) // 2, np.arange(12) // 2, folds=5)
    assert (found.value, found.high) == (pytest.approx(5 / 6), 1)
    found = auc_score(-scores, labels, np.arange(12) // 2, np.arange(12) // 2, folds=5)
    assert (found.value, found.low) == (pytest.approx(1 / 6), 0)


def test_an_auc_that_most_draws_lack_has_no_interval():
    """Two groups of ten hold all that can be compared, and few draws have both."""
    labels, strata = np.arange(10) != 1, np.arange(10).clip(1)
    found = auc_score(np.arange(10.0, 0, -1), labels, np.arange(10), strata)
    assert found.value == 1
    assert np.isnan([found.low, found.high]).all()


def test_a_group_is_held_out_whole_and_folds_are_alike():
    draw = np.random.default_rng(0)
    groups = draw.integers(0, 50, 300)
    groups = np.unique(groups, return_inverse=True)[1]
    labels = draw.random(50)[groups] < 0.5
    fold = deal(groups, labels, folds=5, seed=1)
    assert all(len(set(fold[groups == g])) == 1 for g in set(groups))
    assert set(fold) == set(range(5))
    shares = [np.mean([labels[groups == g].mean() for g in set(groups[fold == k])]) for k in range(5)]
    assert max(shares) - min(shares) < 0.15
    assert (deal(groups, labels, folds=5, seed=2) != fold).any()
    assert deal(np.array([0, 0, 1]), [0, 1, 1], folds=5).tolist() in ([0, 0, 1], [1, 1, 0])
    with pytest.raises(ValueError, match="one group"):
        deal(np.zeros(4, dtype=int), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="1 folds"):
        deal(groups, labels, folds=1)


def test_shuffling_leaves_groups_as_alike_and_their_labels_to_chance():
    groups = np.repeat(np.arange(6), 4)
    constant = np.repeat([0, 0, 0, 1, 1, 1], 4)
    new = shuffled(constant, groups, seed=1)
    assert all(len(set(new[groups == g])) == 1 for g in range(6))
    assert new.sum() == constant.sum()
    assert any((shuffled(constant, groups, seed=s) != constant).any() for s in range(3))
    mixed = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool).ravel()
    order = np.random.default_rng(0).permutation(24)  # rows of a group need not stand together
    groups, mixed = groups[order], mixed[order]

    def ones(y):
        return [int(y[groups == g].sum()) for g in range(6)]

    draws = [shuffled(mixed, groups, seed=s) for s in range(200)]
    assert all(sorted(ones(new)) == sorted(ones(mixed)) for new in draws)
    assert (shuffled(mixed, groups, seed=1) == draws[1]).all()
    # every group has every share as often, and every row of it is a one as often
    assert np.mean([ones(new) for new in draws], axis=0) == pytest.approx(np.full(6, sum(ones(mixed)) / 6), abs=0.5)
    assert np.mean(draws, axis=0) == pytest.approx(np.full(24, mixed.mean()), abs=0.15)
    uneven = np.repeat(np.arange(5), [1, 2, 5, 7, 9])
    assert sum(shuffled(mixed, uneven, seed=3)) == mixed.sum()


def test_what_is_the_same_in_all_of_a_group_is_told_by_no_shuffled_label():
    """Rows of a prompt with several answers: a score that tells questions by their share of ones tells nothing once labels are shuffled."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 6)
    share = rng.random(40)
    labels = rng.random(240) < share[groups]
    scores = share[groups]
    assert auc(scores, labels) > 0.75
    null = [auc(scores, shuffled(labels, groups, seed=s)) for s in range(200)]
    assert np.mean(null) == pytest.approx(0.5, abs=0.03)
    assert np.quantile(null, 0.975) < auc(scores, labels)


def test_rows_that_do_not_pair():
    with pytest.raises(ValueError, match=r"a score, a label and a stratum a row; got shapes \(2,\), \(3,\)"):
        auc([1.0, 2.0], [0, 1, 1])


def test_what_no_auc_is_of():
    """Scores of NaN counted as lost, labels of another kind as ones, and one fold divided by zero."""
    with pytest.raises(ValueError, match="1 of 3 scores are NaN: leave their rows out"):
        auc([1.0, np.nan, 2.0], [0, 1, 1])
    for call in (auc, lambda s, y: auc_score(s, y, [0, 1])):
        with pytest.raises(ValueError, match="labels are 1 or 0"):
            call([1.0, 2.0], [5, 7])
    for folds in (0, 1, -1, 1.5):
        with pytest.raises(ValueError, match=f"folds={folds}: give a whole number, 2 or more"):
            auc_score([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1], [0, 1, 2, 3], folds=folds)
