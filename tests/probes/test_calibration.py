"""Probabilities are judged as the definitions say, on questions no part of them has seen; planted ones come out as they were planted."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss

from probes import fitting
from probes.activations import Activations
from probes.calibration import Calibration, _lines, calibration, calibration_rows, line_through, log_odds, reliability
from probes.fitting import Settings, crossed
from probes.held_out import deal, mean_score, shuffled
from surgery.model import Model
from surgery.sites import Site
from tests.families import tiny
from tests.oracles import calibration as oracle

EMBED, HIGH = Site(0, "resid"), Site(2, "resid")


def said_and_was(seed, questions=60, each=4, too_sure=1.0):
    """True probabilities, each question's rows alike, and labels drawn from them; said with log odds `too_sure` times the true ones."""
    draw = np.random.default_rng(seed)
    g = np.arange(questions * each) // each
    odds = draw.normal(size=questions)[g] + 0.5 * draw.normal(size=len(g))
    return expit(too_sure * odds), draw.random(len(g)) < expit(odds), g


@pytest.mark.parametrize("bins", [2, 5])
def test_scores_are_the_definitions(bins):
    p, y, g = said_and_was(0, questions=10)
    p[:3] = 0.0, 1.0, 0.5  # the ends, and an edge of the bins
    found = reliability(p, y, g, bins=bins)
    wide = oracle.equal_width(p.tolist(), bins)
    assert found.ece.value == pytest.approx(oracle.ece(p, y, wide))
    assert found.brier.value == pytest.approx(oracle.brier(p, y))
    assert found.brier.value == pytest.approx(brier_score_loss(y, p))
    assert found.log_loss == pytest.approx(log_loss(y, np.clip(p, 1e-12, 1 - 1e-12)))
    ranks = np.argsort(np.argsort(p))
    mass = (ranks * bins // len(p)).tolist()
    assert [b.rows for b in found.bins] == [len(p) // bins] * bins
    assert found.ece_mass.value == pytest.approx(oracle.ece(p, y, mass))
    parts = found.reliability, found.resolution, found.uncertainty
    assert parts == pytest.approx(oracle.murphy(p, y, mass))
    means = np.array([b.said for b in found.bins])
    assert list(means) == sorted(means)
    assert brier_score_loss(y, means[mass]) == pytest.approx(parts[0] - parts[1] + parts[2])
    assert found.brier.n == 10


def test_intervals_redraw_whole_questions():
    p, y, g = (x[:-3] for x in said_and_was(1, questions=8))  # one question has fewer rows than the others
    found = reliability(p, y, g, bins=4, draws=60, seed=3)
    wide = np.array(oracle.equal_width(p.tolist(), 4))
    drawn, noise = [], []
    gap = {b: ((p - y) * (wide == b)).sum() / len(p) for b in set(wide.tolist())}
    for times in np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=60):
        index = np.concatenate([np.flatnonzero(g == q) for q in range(8) for _ in range(times[q])])
        drawn.append(oracle.ece(p[index], y[index], wide[index].tolist()))
        noise.append(sum(abs(((p - y)[index] * (wide[index] == b)).sum() / len(index) - gap[b]) for b in gap))
    value = found.ece.value
    random, as_said = np.random.default_rng(3), []  # labels drawn as the probabilities say
    for _ in range(60):
        ones = [random.random() < one for one in p]
        as_said.append(oracle.ece(p, ones, wide.tolist()))
    assert found.floor == pytest.approx(max(np.quantile(noise, 0.95), np.quantile(as_said, 0.95)))
    high = value + max(np.quantile(drawn, 0.975) - value, np.quantile(as_said, 0.975) - np.median(as_said))
    reached = 0 if value <= found.floor else max(0, 2 * value - high)
    assert (found.ece.low, found.ece.high) == pytest.approx((reached, high))
    wider = reliability(p, y, g, bins=4, draws=60, seed=3, folds=5)
    assert wider.ece.high - value == pytest.approx(1.5 * (found.ece.high - value))
    assert wider.brier.high - wider.brier.low == pytest.approx(1.5 * (found.brier.high - found.brier.low))
    wrong = reliability([1.0] * 9 + [0.5], [False] * 10, np.arange(10), folds=5).brier
    assert (wrong.value, wrong.high) == (pytest.approx(0.925), 1.0)  # no squared distance is above 1


def test_what_is_calibrated_is_within_chance_and_what_is_too_sure_is_not():
    """The true ECE is zero, or known from very many rows; over many draws of questions, floors and intervals hold what they say."""
    p, y, _ = said_and_was(99, 3000, too_sure=3)
    truth = oracle.ece(p.tolist(), y.tolist(), (p * 10).astype(int).tolist())
    assert truth > 0.1
    below = seen = covered = nothing = vague = 0
    for trial in range(200):
        p, y, g = said_and_was(trial)
        below += (found := reliability(p, y, g, draws=200)).ece.value < found.floor
        nothing += found.ece.low == 0
        below += found.ece_mass.value < found.floor_mass
        p, y, g = said_and_was(trial, too_sure=3)
        seen += (found := reliability(p, y, g, draws=200)).ece.value > found.floor
        covered += found.ece.low <= truth <= found.ece.high
        half = (
            np.random.default_rng(trial).random(40) < 0.5
        )  # all are said to be 0.55: one bin, which may be right by chance
        found = reliability(np.full(40, 0.55), half, np.arange(40), draws=200).ece
        vague += found.low <= 0.05 <= found.high and found.low <= found.value <= found.high
    assert below / 400 > 0.9
    assert nothing / 200 > 0.9
    assert vague / 200 > 0.9
    assert seen / 200 > 0.95
    assert covered / 200 > 0.88


@pytest.mark.parametrize(("p", "y"), [([0.9] * 3, [1] * 3), ([1.0, 0.0, 1.0], [1, 0, 1])])
def test_rows_that_all_agree_leave_no_interval_and_the_floor_that_they_say(p, y):
    """Of three answers that are right, and said to be so at 0.9, nobody can tell whether 0.9 is too little."""
    found = reliability(p, y, list("abc"))
    for one in (found.brier, found.ece, found.ece_mass):
        assert math.isnan(one.low)
        assert math.isnan(one.high)
        assert one.method.endswith("no interval: all draws agree")
    assert found.ece.value == pytest.approx(abs(p[0] - y[0]))
    assert found.ece.value <= found.floor == found.floor_mass
    half = mean_score(np.ones(4), np.full(4, 2.0), list("aabb"))
    assert (half.value, half.method) == (0.5, "mean, no interval: all draws agree")
    assert math.isnan(half.low)


@pytest.mark.parametrize("each", [1, 4], ids=["a row a question", "four that are always alike"])
def test_answers_that_are_all_right_are_no_sign_of_too_little_said(each):
    """As probabilities differ a little, so do draws of groups; that 0.9 is too little, ten right answers do not say, and 0.3 they do."""
    g = np.arange(10 * each) // each
    for said, seen in ((0.9, False), (0.3, True)):
        p = np.random.default_rng(0).normal(said, 0.005, size=10)[g]
        found = reliability(p, np.ones(len(p)), g, bins=2)  # not a bin for each answer, where every gap is a draw's
        assert (found.ece.value > found.floor, found.ece_mass.value > found.floor_mass) == (seen, seen)
        assert (found.ece.low == 0) != seen
        assert found.ece.high - found.ece.value > 0.1
    apart = reliability(
        np.repeat([0.06, 0.93], 10), np.repeat([0, 1], 10), np.arange(20)
    )  # a probe that is never wrong
    assert apart.ece.value < apart.floor


def test_a_floor_holds_what_chance_makes_of_few_labels():
    """Calibrated and nearly alike: one in twenty is above its floor, as often as all labels are the same or not."""
    random = np.random.default_rng(0)
    p = random.normal(0.9, 0.01, size=12)
    above = [
        found.ece.value > found.floor
        for found in (reliability(p, random.random(12) < p, np.arange(12), draws=200) for _ in range(100))
    ]
    assert np.mean(above) < 0.1


def test_a_bin_of_ones_only_does_not_say_it_is_sure():
    found = reliability(np.repeat([0.1, 0.9], 10), np.repeat([0, 1], 10), np.arange(20) // 2, bins=2)
    assert [(b.was, b.n, b.rows) for b in found.bins] == [(0, 5, 10), (1, 5, 10)]
    assert found.bins[0].high == pytest.approx(1 - 0.025 ** (1 / 5))
    assert found.bins[1].low == pytest.approx(0.025 ** (1 / 5))
    half = reliability(np.repeat([0.1, 0.9], 10), np.arange(20) % 2, np.arange(20) // 2, bins=2).bins[0]
    assert half.was == 0.5  # in each of its groups, so in every draw of them: there is nothing to judge the spread by
    assert math.isnan(half.low)
    assert math.isnan(half.high)
    # bins are closed below, those of equal width and those of equal rows, but for the last, which holds a 1
    assert reliability([1.0, 0.9], [0, 1], ["a", "b"]).ece.value == pytest.approx(0.45)
    assert [b.rows for b in reliability([0.1, 0.2, 0.3], [0, 1, 1], list("abc"), bins=2).bins] == [1, 2]
    alone = reliability([0.2, 0.7], [0, 1], ["q", "q"])
    assert math.isnan(alone.brier.low)
    assert math.isnan(alone.ece.low)
    assert math.isnan(alone.floor)


def test_a_line_through_log_odds():
    draw = np.random.default_rng(0)
    z = draw.normal(size=40000)
    y = draw.random(40000) < expit(z / 3 + 0.5)
    slope, offset = line_through(z, y, "platt")
    assert (slope, offset) == pytest.approx((1 / 3, 0.5), abs=0.03)
    assert line_through(z, draw.random(40000) < expit(z / 3), "temperature") == pytest.approx((1 / 3, 0), abs=0.03)
    assert line_through(z, y, "none") == (1, 0)
    assert line_through(z, draw.random(40000) < expit(-z), "temperature") == pytest.approx(
        (0, 0), abs=1e-3
    )  # never turned over
    apart = line_through(np.array([-1.0, -2, 1, 2]), np.array([False, False, True, True]), "platt")
    assert np.isfinite(apart).all()


def activations(values):
    n = len(next(iter(values.values())))
    return Activations(values, torch.arange(n), torch.full((n,), -1), torch.zeros(n, dtype=torch.long), ("answer",))


def planted(seed=0, questions=150, d=40, apart=2.0):
    """A label a question, two Gaussian clouds: the true probability of 1 is the logistic function of `apart` times the first coordinate."""
    draw = torch.Generator().manual_seed(seed)
    y = (torch.rand(questions, generator=draw) < 0.5).long().repeat_interleave(2)
    X = torch.randn(2 * questions, d, generator=draw)
    X[:, 0] += apart * (y - 0.5)
    return {EMBED: torch.randn(2 * questions, d, generator=draw), HIGH: X}, y, torch.arange(2 * questions) // 2


def test_a_planted_probe_is_calibrated():
    values, y, g = planted(questions=400, d=3)
    none, temperature, platt = calibration_rows(activations(values), y, g, draws=200).rows
    assert [r.scaling for r in (none, temperature, platt)] == ["none", "temperature", "platt"]
    p = expit(2 * values[HIGH][:, 0].numpy())
    for row in (none, temperature, platt):
        assert row.site == "2.resid"
        assert row.brier == pytest.approx(brier_score_loss(y, p), abs=0.01)
        assert row.brier_low < (p * (1 - p)).mean() < row.brier_high
        assert row.ece < row.ece_floor
        assert row.ece_mass < row.ece_mass_floor
    assert temperature.slope == pytest.approx(1, abs=0.15)
    assert (none.slope, none.offset) == (1, 0)
    assert none.base == pytest.approx(0.25, abs=0.01)
    assert none.embedding == pytest.approx(0.25, abs=0.02)
    assert none.shuffled == pytest.approx(0.25, abs=0.02)
    assert math.isnan(none.untrained)
    assert math.isnan(none.length)


def test_a_planted_probe_that_is_too_sure_is_seen_and_cooled(monkeypatch):
    """With the least of the penalties, forty coordinates and few rows: all but one of them are noise."""
    monkeypatch.setattr(fitting, "PENALTIES", (1.0,))
    values, y, g = planted(apart=1.0)
    found = calibration_rows(activations({HIGH: values[HIGH]}), y, g, draws=200)
    none, temperature, platt = found.rows
    assert none.ece > none.ece_floor
    for scaled in (temperature, platt):
        assert scaled.ece < scaled.ece_floor
        assert scaled.slope < 0.6
        assert scaled.brier < none.brier
        assert scaled.log_loss < none.log_loss
        assert scaled.reliability < none.reliability
    assert temperature.offset == 0
    curve = found.curve()
    assert set(curve["scaling"]) == {"none", "temperature", "platt"}
    assert curve.groupby("scaling")["rows"].sum().tolist() == [300] * 3


def test_the_lines_see_nothing_that_is_judged():
    values, y, g = planted(questions=30, d=5)
    X, labels, mine = {HIGH: values[HIGH].double().numpy()}, y.bool().numpy(), np.arange(60) >= 20
    settings = Settings("classes", None, 0, 10, 0)
    other = np.where(mine, labels, ~labels)
    assert _lines(X, labels, g.numpy(), mine, (HIGH, 0.01), settings) == _lines(
        X, other, g.numpy(), mine, (HIGH, 0.01), settings
    )
    other = np.where(mine, ~labels, labels)
    assert _lines(X, labels, g.numpy(), mine, (HIGH, 0.01), settings) != _lines(
        X, other, g.numpy(), mine, (HIGH, 0.01), settings
    )


def test_the_lines_of_questions_that_are_known_by_name_are_flat():
    """The activations know the question and nothing else: a probe that had seen the validation questions would be sure, and right."""
    draw = torch.Generator().manual_seed(0)
    g = torch.arange(160) // 8
    X = 3 * torch.randn(20, 30, generator=draw)[g] + 0.1 * torch.randn(160, 30, generator=draw)
    y = (torch.arange(20) % 2)[torch.randperm(20, generator=draw)][g].bool()
    everything = np.ones(160, bool)
    settings = Settings("classes", None, 0, 10, 0)
    assert (
        _lines({HIGH: X.double().numpy()}, y.numpy(), g.numpy(), everything, (HIGH, 1.0), settings)["temperature"][0]
        < 0.3
    )


def test_what_is_judged_is_by_the_lines_of_the_other_folds():
    values, y, g = planted(questions=20, d=3)
    X, labels, groups = {HIGH: values[HIGH].double().numpy()}, y.bool().numpy(), g.numpy()
    found = calibration_rows(activations({HIGH: values[HIGH]}), y, g, folds=3, draws=20)
    fold, settings = deal(groups, labels, folds=3), Settings("classes", None, 1, 20, 0)
    real, null = crossed(X, labels, groups, fold, settings), shuffled(labels, groups, seed=1)
    lines = [_lines(X, labels, groups, fold != k, real.chosen[k], settings)["platt"] for k in range(3)]
    slope, offset = np.array(lines).T
    p = expit(slope[fold] * log_odds(real.predicted) + offset[fold])
    row = found.rows[2]
    assert (row.slope, row.offset) == pytest.approx((np.median(slope), np.median(offset)))
    assert row.brier == pytest.approx(brier_score_loss(labels, p))
    others = np.array([labels[fold != k].mean() for k in range(3)])[fold]
    assert row.base == pytest.approx(((others - labels) ** 2).mean())
    strayed = crossed(X, null, groups, fold, settings, chosen=real.chosen).predicted
    assert row.shuffled == pytest.approx(brier_score_loss(null, strayed))


def test_the_length_alone_is_beside_it():
    values, y, g = planted(questions=60, d=3)
    lengths = 20 + 15 * y.numpy() + np.arange(120) % 5
    row = calibration_rows(activations(values), y, g, lengths=lengths, folds=3, draws=50).rows[0]
    assert row.length < 0.05 < row.brier


def test_options_change_something():
    values, y, g = planted(questions=20, d=3)
    given = {"folds": 2, "draws": 50}
    base = calibration_rows(activations(values), y, g, **given).rows[1]
    for options in ({"components": 2}, {"folds": 3}, {"seed": 1}, {"draws": 40}, {"bins": 4}, {"among": [EMBED]}):
        assert calibration_rows(activations(values), y, g, **{**given, **options}).rows[1] != base, options


def test_save_and_load(tmp_path):
    values, y, g = planted(questions=20, d=3)
    found = calibration_rows(
        activations(values), y, g, twin=activations(values), lengths=np.arange(40), folds=3, draws=50
    )
    found.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again == found
    assert repr(again) == repr(found)
    assert "temperature" in again._repr_html_()
    assert found.rows[0].untrained == pytest.approx(found.rows[0].brier)


def test_what_cannot_be_judged():
    values, y, g = planted(questions=20, d=3)
    acts = activations(values)
    with pytest.raises(ValueError, match=r"go from 0.5 to 1.5"):
        reliability([0.5, 1.5], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="one of each a row"):
        reliability([0.5], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="1 bins"):
        reliability([0.5, 0.5], [0, 1], [0, 1], bins=1)
    with pytest.raises(ValueError, match=r"20 folds of 20 questions.* at most 10"):
        calibration_rows(acts, y, g, folds=20)
    with pytest.raises(ValueError, match="hold 2"):
        calibration_rows(acts, y + 1, g)
    with pytest.raises(ValueError, match="a calibration is of one span"):
        calibration_rows(dataclasses.replace(acts, over=("prompt", "answer")), y, g)


def test_a_models_probe():
    model = Model(*tiny("llama"))
    runs = [
        model.transcript(f"q{i // 4}", f"<think>{'ab'[i % 2] * (3 + i % 5)}</think>{'xyz'[i % 3]}") for i in range(24)
    ]
    found = calibration(model, runs, [i % 2 for i in range(24)], at="2.resid", folds=2, draws=50, bins=3, components=4)
    row = found.rows[0]
    assert (row.site, row.n, row.rows) == ("2.resid", 6, 24)
    assert max(row.brier, row.embedding, row.untrained) < row.base
    assert row.length > 0.15
    assert found.about["over"] == "thinking"
    assert log_odds(np.array([0.5]))[0] == 0
