"""Probes are scikit-learn's pipelines, judged on questions they have not seen, beside controls that can fail them."""

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.activations import Activations, collect
from probes.calibration import Calibration, calibration
from probes.erasure import Erased
from probes.fitting import BINS, PENALTIES, Settings, crossed, fit_path, select
from probes.held_out import deal, shuffled, units
from probes.linear import ProbeTable, _judge, _spread, _Task, probe, probe_rows, untrained
from probes.transfer import TransferTable, along, transfer
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import positions
from tests.families import FAMILIES, tiny
from tests.oracles import directions as oracle

EMBED, LOW, HIGH = Site(0, "resid"), Site(1, "resid"), Site(2, "resid")


def activations(values, span=None, transcript=None, over=("thinking",)):
    n = len(next(iter(values.values())))
    rows = torch.arange(n) if transcript is None else torch.as_tensor(transcript)
    spans = torch.zeros(n, dtype=torch.long) if span is None else torch.as_tensor(span)
    return Activations(values, rows, torch.full((n,), -1), spans, over)


def world(n=120, d=10, seed=0, effect=2.5):
    """Labels that can be read at HIGH and nowhere else; three answers a question."""
    draw = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=draw) < 0.5).long()
    values = {site: torch.randn(n, d, generator=draw) for site in (EMBED, LOW, HIGH)}
    values[HIGH][:, 0] += effect * y
    return values, y, torch.arange(n) // 3


FAST = {"folds": 3, "draws": 100, "shuffles": 1}


def row(table, site, span="thinking"):
    return next(r for r in table.rows if (r.site, r.span) == (str(site), span))


def test_a_probe_is_the_plain_pipeline():
    """Restated with whole pipelines, one for each penalty and fold, the penalty chosen inside the training rows."""

    def fitted(rows, C, labels=None):
        pipe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
        return pipe.fit(X[rows], (y if labels is None else labels)[rows])

    values, y, g = world()
    X, y, g = values[HIGH].double().numpy(), y.numpy().astype(bool), units(g.numpy())
    y[y.argmax()] = False  # as many ones as zeros: the majority is that of each fold's training rows
    fold = deal(g, y, folds=3, seed=3)
    scores = np.empty(len(y))
    nulls = [shuffled(y, g, seed=4), shuffled(y, g, seed=5)]
    strayed = np.empty((2, len(y)))
    for k in range(3):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        inner = deal(units(g[train]), y[train], folds=3, seed=3)
        losses = dict.fromkeys(PENALTIES, 0.0)
        for C in PENALTIES:
            for j in range(3):
                seen, held = train[inner != j], train[inner == j]
                p = fitted(seen, C).predict_proba(X[held])[:, 1]
                losses[C] -= np.log(np.where(y[held], p, 1 - p)).sum()
        best = min(losses, key=lambda C: losses[C])
        least, penalty = select(X[train], y[train], g[train], Settings("classes", None, 0, 1, 3))
        assert (least, penalty) == (pytest.approx(losses[best] / len(train), abs=1e-3), best)
        scores[test] = fitted(train, best).predict_proba(X[test])[:, 1]
        for own, null in zip(strayed, nulls, strict=True):  # the control is told, and judged by, shuffled labels
            own[test] = fitted(train, best, null).predict_proba(X[test])[:, 1]
    found = row(probe_rows(activations(values), y, g, seed=3, **FAST | {"shuffles": 2}), HIGH)
    controls = [oracle.auc(own, null, fold) for own, null in zip(strayed, nulls, strict=True)]
    assert (found.shuffled, found.shuffled_most) == pytest.approx((sum(controls) / 2, max(controls)), abs=1e-6)
    assert found.value == pytest.approx(oracle.auc(scores, y, fold), abs=1e-6)
    assert found.accuracy == pytest.approx(((scores > 0.5) == y).mean(), abs=1e-6)
    assert found.log_loss == pytest.approx(-np.log(np.where(y, scores, 1 - scores)).mean(), abs=1e-6)
    said = np.array([y[fold != k].mean() > 0.5 for k in range(3)])[fold]
    assert found.majority == pytest.approx((said == y).mean(), abs=1e-6)
    assert found.n == 40
    assert found.rows == 120


@pytest.mark.parametrize("seed", [34, 77])  # of 120 such sets those where a looser fit preferred another penalty
def test_the_penalty_is_the_one_that_exact_fits_prefer(seed):
    """A few directions tell the labels and the rows lie near them: gradients are small long before a weak penalty's fit is done."""
    draw = np.random.default_rng(seed)
    few = draw.normal(size=(40, 8))
    X = few @ (draw.normal(size=(8, 64)) * np.exp(-np.arange(8) / 6)[:, None]) + 0.05 * draw.normal(size=(40, 64))
    y = few[:, 0] + 0.3 * draw.normal(size=40) > 0
    fold, losses = deal(np.arange(40), y, folds=3, seed=0), dict.fromkeys(PENALTIES, 0.0)
    for C, k in product(PENALTIES, range(3)):
        exact = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-8, max_iter=10000))
        p = exact.fit(X[fold != k], y[fold != k]).predict_proba(X[fold == k])[:, 1]
        losses[C] -= np.log(np.where(y[fold == k], p, 1 - p)).sum() / 40
    best = min(losses, key=lambda C: losses[C])
    assert select(X, y, np.arange(40), Settings("classes", None, 0, 1, 0)) == (
        pytest.approx(losses[best], abs=5e-4),
        best,
    )


def test_a_penalty_that_nothing_was_tried_on_is_the_middle_one():
    """Of two questions of one label each, either fold leaves one label to learn from."""
    y, g = np.array([True, True, False]), np.array([0, 0, 1])
    inner, chosen = select(np.eye(3), y, g, Settings("classes", None, 0, 1, 0))
    assert math.isnan(inner)
    assert chosen == 1e-2
    assert math.isnan(select(np.eye(3), y, np.full(3, 7), Settings("classes", None, 0, 1, 0))[0])  # one question alone


def test_what_few_rows_leave_to_be_learned():
    """No more components than the rows span, and of one class alone its share."""
    X, y, fold = np.random.default_rng(0).normal(size=(6, 20)), np.array([1, 1, 1, 0, 0, 0]) > 0, np.arange(6) // 3
    settings = Settings("classes", 50, 0, 1, 0)
    found = crossed({HIGH: X}, y, np.arange(6), fold, settings)
    assert found.predicted.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.chosen == (None, None)
    (said,) = fit_path(X, y, np.arange(1, 5), np.array([0, 5]), [1.0], settings)
    assert ((said > 0) & (said < 1)).all()


def test_a_planted_signal_is_found_where_it_is():
    values, y, g = world()
    table = probe_rows(activations(values), y, g, **FAST)
    assert [r.site for r in table.rows] == ["0.resid", "1.resid", "2.resid"]
    high, low = row(table, HIGH), row(table, LOW)
    assert high.low > 0.6
    assert low.low < 0.5 < low.high
    assert high.low > row(table, HIGH).shuffled
    assert high.selectivity == high.value - high.shuffled
    assert high.embedding == row(table, EMBED).value
    assert 0.2 < high.shuffled_most < 0.7
    assert high.accuracy > high.majority
    assert set(table.chosen[0].sites) == {"2.resid"}
    assert table.chosen[0].value == high.value
    (said,) = table.summary().to_dict("records")
    assert (said["site"], said["value"], said["low"]) == ("2.resid", table.chosen[0].value, table.chosen[0].low)
    assert (said["shuffled"], said["embedding"], said["above"]) == (high.shuffled, high.embedding, True)
    beaten = dataclasses.replace(high, embedding=said["low"])
    rows = tuple(beaten if r is high else r for r in table.rows)
    assert not dataclasses.replace(table, rows=rows).summary()["above"].item()
    mostly = dataclasses.replace(table.chosen[0], sites=("0.resid", "2.resid", "2.resid"))
    assert dataclasses.replace(table, chosen=(mostly,)).summary()["site"].item() == "2.resid"
    assert math.isnan(high.untrained)
    assert math.isnan(high.length)


def test_the_site_is_chosen_without_the_held_out_rows():
    """Many sites of noise: the best of the table beats chance, the chosen ones do not."""
    draw = torch.Generator().manual_seed(0)
    values = {Site(i, "resid"): torch.randn(45, 6, generator=draw) for i in range(16)}
    y = (torch.rand(45, generator=draw) < 0.5).long()
    table = probe_rows(activations(values), y, torch.arange(45), folds=3, draws=100, shuffles=0)
    chosen = table.chosen[0]
    assert max(r.value for r in table.rows) > 0.65
    assert chosen.value < 0.65
    assert chosen.low < 0.5
    assert len(chosen.sites) == 3


def test_a_question_is_never_on_both_sides():
    """The activations know the question, and the label belongs to the question: nothing can be learned for others."""
    draw = torch.Generator().manual_seed(0)
    g = torch.arange(160) // 8
    centres = torch.randn(20, 30, generator=draw) * 3
    y = (torch.arange(20) % 2)[torch.randperm(20, generator=draw)][g]
    acts = activations({HIGH: centres[g] + 0.1 * torch.randn(160, 30, generator=draw)})
    honest = row(probe_rows(acts, y, g, **FAST), HIGH)
    leaky = row(probe_rows(acts, y, torch.arange(160), **FAST), HIGH)
    assert leaky.value > 0.95
    assert honest.low < 0.5
    assert honest.value < 0.8


def test_length_is_told_apart_from_what_goes_with_it():
    """One site knows the length, which goes with the label; another knows the label."""
    draw = torch.Generator().manual_seed(1)
    y = (torch.rand(300, generator=draw) < 0.5).long()
    tokens = (20 + 15 * y + torch.randint(0, 30, (300,), generator=draw)).double()
    values = {site: torch.randn(300, 5, generator=draw) for site in (LOW, HIGH)}
    values[LOW][:, 0] = tokens.float()
    values[HIGH][:, 0] += 2 * y
    table = probe_rows(activations(values), y, torch.arange(300), lengths=tokens, **FAST)
    knows_length, knows_label = row(table, LOW), row(table, HIGH)
    assert knows_length.value == pytest.approx(knows_length.length, abs=0.03)
    assert knows_length.value > 0.7
    assert knows_length.same_length_low < 0.55
    assert knows_length.same_length < 0.62
    assert knows_label.same_length_low > 0.6
    # by hand: pairs of one fold and one bin
    cuts = np.unique(np.quantile(tokens.numpy(), np.linspace(0, 1, BINS + 1)[1:-1]))
    assert len(cuts) == BINS - 1
    task = _Task.of(0, "", np.ones(300, bool), y.tolist(), range(300), tokens.numpy(), "classes", 3, 0)
    part = _Task.of(0, "", np.arange(300) < 100, y.tolist(), range(300), tokens.numpy(), "classes", 3, 0)
    own = tokens[:100].numpy()  # another span's lengths are no measure of this one's
    tenths = np.unique(np.quantile(own, np.linspace(0, 1, BINS + 1)[1:-1]))
    np.testing.assert_array_equal(part.bins, np.searchsorted(tenths, own, side="right"))
    scores, pairs = (
        np.random.default_rng(0).normal(size=300),
        list(zip(task.fold, np.searchsorted(cuts, tokens, side="right"), strict=True)),
    )
    found = _judge(scores, task, Settings("classes", None, 0, 20, 0), within=task.bins)
    assert found.value == pytest.approx(oracle.auc(scores, task.y, pairs))
    assert math.isnan(row(probe_rows(activations(values), y, torch.arange(300), **FAST), LOW).same_length)


def test_a_number_is_ridge_regression():
    from sklearn.linear_model import Ridge

    values, _, g = world(effect=0)
    draw = torch.Generator().manual_seed(2)
    y = (values[HIGH][:, 0] * 2 + 0.5 * torch.randn(120, generator=draw)).double().numpy()
    table = probe_rows(activations(values), y, g, kind="number", lengths=np.arange(120) % 7 + 1, **FAST)
    high = row(table, HIGH)
    assert high.measure == "r2"
    assert high.low > 0.7
    assert row(table, LOW).value < 0.1
    assert abs(high.shuffled) < 0.3
    assert high.same_length > 0.7
    assert math.isnan(high.accuracy)
    X, g = values[HIGH].double().numpy(), units(g.numpy())
    fold, predicted, means = deal(g, y, folds=3, seed=0), np.empty(120), np.empty(120)

    def fitted(rows, C):
        return make_pipeline(StandardScaler(), Ridge(alpha=1 / C)).fit(X[rows], y[rows])

    for k in range(3):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        inner, losses = deal(units(g[train]), y[train], folds=3, seed=0), dict.fromkeys(PENALTIES, 0.0)
        for C, j in product(PENALTIES, range(3)):
            seen, held = train[inner != j], train[inner == j]
            losses[C] += ((fitted(seen, C).predict(X[held]) - y[held]) ** 2).sum()
        predicted[test] = fitted(train, min(losses, key=lambda C: losses[C])).predict(X[test])
        means[test] = y[train].mean()  # of what is compared with, the held-out rows are no part either
    assert high.value == pytest.approx(1 - ((predicted - y) ** 2).sum() / ((means - y) ** 2).sum(), abs=1e-6)


@pytest.mark.parametrize(("signal", "of_length"), [(0.5, 0.0), (0.5, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_a_number_among_rows_of_one_length_is_neither_shrunk_nor_flattered(signal, of_length):
    """Few rows of each length, predictions that know a planted share of what varies among them: over many draws it is told right on average."""
    settings, found = Settings("number", None, 0, 1, 0), []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        known, tokens = draw.standard_normal(50), draw.permutation(50) // 5 + 1.0
        known = of_length * tokens + math.sqrt(signal) * known
        y = known + math.sqrt(1 - signal) * draw.standard_normal(50)
        task = _Task.of(0, "thinking", np.ones(50, bool), y.tolist(), range(50), tokens, "number", 5, seed)
        found.append(_judge(known, task, settings, within=task.bins).value)
    assert np.mean(found) == pytest.approx(signal, abs=0.03)


def test_what_rows_of_one_length_are_compared_with():
    """The mean of those of other questions; where there are none, of all rows of other questions."""
    y, g, within = np.array([1.0, 2.0, 4.0, 9.0]), np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    expected = [(1 - 4) ** 2 / 2, (2 - 4) ** 2 / 2, (4 - 1.5) ** 2 * 2 / 3, (9 - 1.5) ** 2 * 2 / 3]
    np.testing.assert_allclose(_spread(y, g, within), expected)


def test_rows_without_a_label_and_spans():
    values, y, g = world()
    double = {site: torch.cat([v, v.flip(0)]) for site, v in values.items()}
    acts = activations(double, [0] * 120 + [1] * 120, [*range(120), *range(120)], ("thinking", "answer"))
    table = probe_rows(acts, y, g, **FAST)
    assert [(r.site, r.span) for r in table.rows[:4]] == [
        ("0.resid", "thinking"), ("1.resid", "thinking"), ("2.resid", "thinking"), ("0.resid", "answer"),
    ]  # fmt: skip
    plain = probe_rows(activations(values), y, g, **FAST)
    assert repr(row(table, HIGH)) == repr(row(plain, HIGH))
    assert row(table, HIGH, "answer").low < 0.5
    some = [None if i % 5 == 0 else int(v) for i, v in enumerate(y)]
    kept = [i for i in range(120) if i % 5]
    fewer = probe_rows(activations({s: v[kept] for s, v in values.items()}), y[kept], g[kept], **FAST)
    assert row(probe_rows(activations(values), some, g, **FAST), HIGH) == row(fewer, HIGH)


def test_options_change_something():
    values, y, g = world()
    base = row(probe_rows(activations(values), y, g, **FAST), HIGH)
    for options in ({"components": 3}, {"folds": 4}, {"shuffles": 4}, {"seed": 1}, {"draws": 50}):
        other = row(probe_rows(activations(values), y, g, **{**FAST, **options}), HIGH)
        assert dataclasses.astuple(other)[4:] != dataclasses.astuple(base)[4:], options


def test_threads_do_not_matter():
    values, y, g = world(n=60)
    one = probe_rows(activations(values), y, g, **FAST)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = probe_rows(activations(values), y, g, **FAST)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    a, b = (t.frame().drop(columns=["site", "span", "measure"]).to_numpy(float) for t in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_save_and_load(tmp_path):
    values, y, g = world(n=60)
    table = probe_rows(activations(values), y, g, lengths=np.arange(60), **FAST)
    table.save(tmp_path / "t.json")
    again = ProbeTable.load(tmp_path / "t.json")
    assert repr(again) == repr(table)
    assert again.frame().equals(table.frame())
    assert again.chosen == table.chosen
    assert again.about == table.about
    assert "thinking" in table._repr_html_()


def test_what_cannot_be_probed():
    values, y, g = world()
    acts = activations(values)
    with pytest.raises(ValueError, match="All 120 rows over 'thinking' have the same label"):
        probe_rows(acts, torch.ones(120), g)
    with pytest.raises(ValueError, match=r"Two classes are labelled 1 and 0; .* hold 2\. For a number"):
        probe_rows(acts, y + 1, g)
    with pytest.raises(ValueError, match="one group"):
        probe_rows(acts, y, torch.zeros(120))
    with pytest.raises(ValueError, match=r"40 folds of 40 questions.* at most 20"):
        probe_rows(acts, y, g, folds=40)
    with pytest.raises(ValueError, match="No row over 'thinking' has a label"):
        probe_rows(acts, [None] * 120, g)
    with pytest.raises(ValueError, match="NaN or infinite"):
        probe_rows(activations({HIGH: values[HIGH] * float("inf")}), y, g)
    with pytest.raises(ValueError, match="untrained model's rows are not those"):
        probe_rows(acts, y, g, twin=activations({HIGH: values[HIGH][:5]}))


# --- models -----------------------------------------------------------------------------------------------------------------


def runs_of(model, n=24):
    """Half of the answers think in a's, half in b's; what the answer itself says has nothing to do with it."""
    texts = [f"<think>{'ab'[i % 2] * (3 + i % 5)}</think>{'xyz'[i % 3]}" for i in range(n)]
    return [model.transcript(f"q{i // 4}", text) for i, text in enumerate(texts)], [i % 2 for i in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_a_model(family):
    model = Model(*tiny(family))
    runs, labels = runs_of(model)
    ids = torch.tensor([model.prompt_ids("q")])
    before, state = model.module(input_ids=ids).logits, torch.get_rng_state()
    table = probe(model, runs, labels, over="thinking", at="2.resid", folds=2, draws=50, shuffles=0)
    assert torch.equal(model.module(input_ids=ids).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    # the letters can be read off the embedding already, and off a model that never learned anything
    thinking = row(table, HIGH)
    assert thinking.value > 0.9
    assert thinking.embedding > 0.9
    assert thinking.untrained > 0.9
    assert thinking.n == 6


def test_several_spans():
    model = Model(*tiny("qwen3"))
    runs, labels = runs_of(model)
    spans = ("thinking", "answer[-1]")
    table = probe(model, runs, labels, over=spans, at="2.resid", **FAST)
    assert [(r.site, r.span) for r in table.rows] == [(site, span) for span in spans for site in ("0.resid", "2.resid")]
    acts = collect(model, runs, at=["0.resid", "2.resid"], over=spans, pool="mean")
    lengths = [len(positions(runs[i], spans[k])) for i, k in zip(acts.transcript, acts.span, strict=True)]
    by_hand = probe_rows(acts, labels, [t.question for t in runs], lengths=lengths, **FAST)
    for span in spans:
        assert math.isnan(row(by_hand, HIGH, span).untrained)
        assert row(by_hand, HIGH, span).value == row(table, HIGH, span).value
        assert row(by_hand, HIGH, span).length == row(table, HIGH, span).length
    assert table.about["folds"] == 3


def test_the_embedding_that_is_a_control_is_not_chosen():
    """The letters are in the embedding already, so it would win where it may: only sites that were asked for are chosen among."""
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model)
    for at, sites in (("2.resid", {"2.resid"}), (["0.resid", "2.resid"], {"0.resid"})):
        table = probe(model, runs, labels, over="thinking", at=at, **FAST)
        assert [r.site for r in table.rows] == ["0.resid", "2.resid"]
        assert set(table.chosen[0].sites) == sites
    assert table.summary()["site"].item() == "0.resid"


def test_the_untrained_twin():
    model = Model(*tiny("gemma2"))
    state = torch.get_rng_state()
    twin = untrained(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.module.config.to_dict() == model.module.config.to_dict()
    assert not torch.equal(twin.weights["1.attn.o"], model.weights["1.attn.o"])
    assert torch.equal(twin.weights["1.attn.o"], untrained(model, seed=1).weights["1.attn.o"])
    assert not torch.equal(twin.weights["1.attn.o"], untrained(model, seed=2).weights["1.attn.o"])


def test_what_a_model_cannot_be_probed_for():
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model)
    plain = [model.transcript(f"q{i}", "abc") for i in range(24)]
    with pytest.raises(ValueError, match="None of the 24 labelled transcripts has a span thinking; they have"):
        probe(model, plain, labels, over="thinking")
    with pytest.raises(ValueError, match="24 transcripts, 3 labels"):
        probe(model, runs, [0, 1, 1])
    with pytest.raises(ValueError, match="No transcript has a label"):
        probe(model, runs, [None] * 24)
    with pytest.raises(ValueError, match=r"'9\.resid' matches no site"):
        probe(model, runs, labels, at="9.resid")


def test_as_many_rows_as_transcripts_but_not_one_each():
    """Labels and groups stay with their transcripts where half of these have two spans and the others none."""
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model, 16)
    nothing = [model.transcript(f"q{i}", "") for i in range(16)]
    spans = ("thinking", "answer")
    some = probe(model, [*nothing, *runs], [0, 1, 1, 0] * 4 + labels, over=spans, at="1.resid", folds=2, shuffles=0)
    once = probe(model, runs, labels, over=spans, at="1.resid", folds=2, shuffles=0)
    assert [r.rows for r in some.rows] == [16] * 4
    for span in spans:
        a, b = row(some, LOW, span), row(once, LOW, span)
        assert (a.value, a.low, a.length, a.untrained, a.n) == (b.value, b.low, b.length, b.untrained, b.n)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "clases"}, "kind='clases': choose classes or number"),
        ({"components": 0}, "components=0: give a whole number, 1 or more"),
        ({"components": 2.5}, "components=2.5: give a whole number, 1 or more"),
        ({"shuffles": -1}, "shuffles=-1: give a whole number, 0 or more"),
        ({"draws": 1.5}, "draws=1.5: give a whole number, 1 or more"),
        ({"seed": -1}, "seed=-1: give a whole number, 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_told_before_any_pass(options, said, unchecked, monkeypatch):
    """A word that is no kind was taken for a number's, fewer shuffles than none for none; the rest came from scikit-learn and numpy."""
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model)
    with pytest.raises(ValueError, match=said):
        probe_rows(collect(model, runs, at="1.resid", over="answer", pool="mean"), labels, list(range(24)), **options)
    monkeypatch.setattr("probes.linear.collect", None)
    rest = {name: value for name, value in options.items() if name != "kind"}
    calls = [lambda: probe(model, runs, labels, at="1.resid", over="answer", folds=2, **options)]
    if rest:
        sets = {"a": (runs[:12], labels[:12]), "b": (runs[12:], labels[12:])}
        calls += [
            lambda: transfer(model, sets, over="answer", **rest),
            lambda: along(model, runs, labels, over="answer", **rest),
        ]
    if rest and "shuffles" not in rest:
        calls.append(lambda: calibration(model, runs, labels, over="answer", folds=2, **rest))
    for call in calls:
        with pytest.raises(ValueError, match=said):
            call()


def test_one_span_is_read_at_a_time(unchecked):
    """Two spans were read as one, and judged as one."""
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model)
    sets = {"a": (runs[:12], labels[:12]), "b": (runs[12:], labels[12:])}
    for call in (
        lambda over: calibration(model, runs, labels, over=over, folds=2),
        lambda over: transfer(model, sets, over=over),
        lambda over: along(model, runs, labels, over=over),
    ):
        with pytest.raises(
            ValueError, match=r"over=\['prompt', 'answer'\]: one span is read here, as in over='answer'"
        ):
            call(["prompt", "answer"])


@pytest.mark.parametrize("kind", [ProbeTable, Calibration, TransferTable, Erased])
@pytest.mark.parametrize("text", ["{}", "nope", "[]", '{"rows": [{"a": 1}], "chosen": [], "bins": {}, "about": {}}'])
def test_a_file_of_something_else_says_so(kind, text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"table.json holds no {kind.__name__}"):
        kind.load(path)
