"""A direction that two planted sets share carries over, another one does not, a turned one misleads; and no question is on both sides."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from probes.activations import Activations, collect
from probes.fitting import Crossed, Settings, select
from probes.held_out import deal, shuffled, units
from probes.transfer import TransferTable, _marked, along, transfer, transfer_rows
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import Transcript
from tests.families import tiny
from tests.oracles import directions as oracle

EMBED, HIGH = Site(0, "resid"), Site(2, "resid")
FAST = {"folds": 3, "draws": 100, "shuffles": 1}


def activations(values):
    n = len(next(iter(values.values())))
    return Activations(values, torch.arange(n), torch.full((n,), -1), torch.zeros(n, dtype=torch.long), ("answer",))


def planted(seed=0, questions=50, d=8, turned=True):
    """Sets whose label is the first coordinate, the same one lower down, the second, and the first turned over; a label a
    question, two rows."""
    draw = torch.Generator().manual_seed(seed)
    names = ["here", "shifted", "elsewhere", *(["turned"] if turned else [])]
    n = 2 * questions * len(names)
    part = torch.arange(n) // (2 * questions)
    y = (torch.rand(n // 2, generator=draw) < 0.5).long().repeat_interleave(2)
    X = torch.randn(n, d, generator=draw)
    X[part == 1] -= 3
    for k, (axis, sign) in enumerate([(0, 1), (0, 1), (1, 1), (0, -1)][: len(names)]):
        X[part == k, axis] += 2.5 * sign * y[part == k]
    return activations({HIGH: X}), y, torch.arange(n) // 2, [names[k] for k in part]


def cell(table, trained, tested):
    return next(r for r in table.rows if (r.trained, r.tested) == (trained, tested))


def test_what_is_shared_carries_over_and_what_is_not_does_not():
    found = transfer_rows(*planted(), **FAST)
    assert len(found.rows) == 16
    for name in ("here", "shifted", "elsewhere", "turned"):
        assert cell(found, name, name).low > 0.8
        assert abs(cell(found, name, name).shuffled - 0.5) < 0.2
    for pair in (("here", "shifted"), ("shifted", "here")):
        assert cell(found, *pair).low > 0.8
    for pair in (("here", "elsewhere"), ("elsewhere", "here"), ("elsewhere", "turned")):
        assert cell(found, *pair).low < 0.5 < cell(found, *pair).high
    for pair in (("here", "turned"), ("turned", "shifted")):
        assert cell(found, *pair).high < 0.2
    one = cell(found, "here", "turned")
    assert (one.n, one.rows, one.learned, one.site) == (50, 100, 100, "2.resid")
    matrix = found.matrix()
    assert matrix.index.tolist() == matrix.columns.tolist() == ["here", "shifted", "elsewhere", "turned"]
    assert matrix.loc["here", "turned"] == one.value
    assert "on itself 0.9" in repr(found)


def test_without_a_shared_direction_it_is_chance_on_average():
    """Each probe leans somewhere by chance, which its interval does not know of: it covers 0.5 less often than nineteen times in twenty."""
    found = []
    for seed in range(12):
        acts, y, g, sets = planted(seed, turned=False)
        table = transfer_rows(acts, y, g, sets, folds=3, draws=100, shuffles=0)
        found += [r for r in table.rows if r.trained != r.tested and "elsewhere" in (r.trained, r.tested)]
    assert len(found) == 48
    assert np.mean([r.value for r in found]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([r.low <= 0.5 <= r.high for r in found]) > 0.8


def test_a_pair_is_the_plain_pipeline():
    """Each fold by hand: learn in one set from all other questions, judge the other's rows that fell into the fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    acts, y, g, sets = planted(questions=20, turned=False)
    X, y, g = acts[HIGH].double().numpy(), y.numpy().astype(bool), units(g.numpy())
    part = np.array([["here", "shifted", "elsewhere"].index(name) for name in sets])
    fold = deal(g, 2 * part + y, folds=3, seed=1)
    assert all(len(np.unique(g[(fold == k) & (part == p)])) in (6, 7) for k in range(3) for p in range(3))
    scores, strayed, nulls = np.full(len(y), np.nan), np.full((2, len(y)), np.nan), np.stack([y, y])
    for i, p in np.ndindex(2, 3):  # labels are dealt out again inside each set
        nulls[i, part == p] = shuffled(y[part == p], g[part == p], seed=2 + i)
    for k in range(3):
        train, test = (part == 2) & (fold != k), (part == 0) & (fold == k)
        _, C = select(X[train], y[train], g[train], Settings("classes", None, 1, 1, 1))
        pipe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(X[train], y[train])
        scores[test] = pipe.predict_proba(X[test])[:, 1]
        for own, null in zip(strayed, nulls, strict=True):
            own[test] = pipe.fit(X[train], null[train]).predict_proba(X[test])[:, 1]
    mine = part == 0
    tokens = np.arange(len(y)) * 7 % 40 + 1.0
    options = {"folds": 3, "draws": 50, "seed": 1, "shuffles": 2}
    found = cell(transfer_rows(acts, y, g, sets, lengths=tokens, **options), "elsewhere", "here")
    assert found.value == pytest.approx(oracle.auc(scores[mine], y[mine], fold[mine]), abs=1e-6)
    controls = [oracle.auc(own[mine], null[mine], fold[mine]) for own, null in zip(strayed, nulls, strict=True)]
    assert [found.shuffled_least, found.shuffled_most] == pytest.approx(sorted(controls), abs=1e-6)
    assert found.shuffled == pytest.approx(sum(controls) / 2, abs=1e-6)
    tenths = np.searchsorted(np.quantile(tokens[mine], np.linspace(0.1, 0.9, 9)), tokens[mine], side="right")
    pairs = list(zip(fold[mine], tenths, strict=True))  # rows of one fold and about one length
    assert found.same_length == pytest.approx(oracle.auc(scores[mine], y[mine], pairs), abs=1e-6)


def test_a_question_that_two_sets_ask_is_never_on_both_sides():
    """The activations know the question and nothing else, and both sets label it alike: a probe that had seen it there would know it here."""
    draw = torch.Generator().manual_seed(0)
    g = torch.arange(160) // 4 % 20
    centres = 3 * torch.randn(20, 30, generator=draw)
    y = (torch.arange(20) % 2)[torch.randperm(20, generator=draw)][g]
    acts = activations({HIGH: centres[g] + 0.1 * torch.randn(160, 30, generator=draw)})
    sets = ["a"] * 80 + ["b"] * 80
    honest = cell(transfer_rows(acts, y, g, sets, **FAST), "a", "b")
    leaky = cell(transfer_rows(acts, y, g + 20 * (torch.arange(160) // 80), sets, **FAST), "a", "b")
    assert leaky.low > 0.5  # two in three were seen there
    assert honest.low < 0.5
    assert honest.value < 0.8
    assert honest.n == 20


def test_length_is_told_apart_from_what_goes_with_it():
    acts, y, g, sets = planted(questions=60, turned=False)
    draw = np.random.default_rng(0)
    lengths = 20 + 15 * y.numpy() + draw.integers(0, 30, len(y))
    acts.values[HIGH][:, 0] = torch.from_numpy(
        lengths
    ).float()  # the first coordinate now knows the length, and the label through it
    found = cell(transfer_rows(acts, y, g, sets, lengths=lengths, twin=acts, **FAST), "here", "shifted")
    assert found.length == pytest.approx(found.value, abs=0.06)
    assert found.value > 0.7
    assert found.same_length_low < 0.55
    assert found.untrained == found.value
    plain = cell(transfer_rows(acts, y, g, sets, **FAST), "here", "shifted")
    assert all(map(math.isnan, (plain.length, plain.same_length, plain.untrained, plain.embedding)))


def test_the_site_is_chosen_where_it_is_learned():
    acts, y, g, sets = planted(questions=30, turned=False)
    noise = torch.randn(acts[HIGH].shape, generator=torch.Generator().manual_seed(1))
    both = dataclasses.replace(acts, values={EMBED: noise, HIGH: acts[HIGH]})
    found = transfer_rows(both, y, g, sets, **FAST)
    assert {r.site for r in found.rows} == {"2.resid"}
    assert cell(found, "here", "here").embedding < 0.7
    assert Crossed(np.empty(0), ((EMBED, 1.0), None, (HIGH, 1.0), (HIGH, 0.1))).site == HIGH
    only = transfer_rows(both, y, g, sets, among=[EMBED], **FAST)
    assert cell(only, "here", "here").value == cell(found, "here", "here").embedding


def test_options_change_something_and_files_hold_all(tmp_path):
    given = planted(questions=10, turned=False)
    base = transfer_rows(*given, folds=2, draws=50)
    for options in ({"components": 2}, {"folds": 3}, {"seed": 1}, {"draws": 40}, {"shuffles": 1}, {"shared": True}):
        other = transfer_rows(*given, **{"folds": 2, "draws": 50, **options})
        a, b = other.rows[1], base.rows[1]
        assert (a.low, a.shuffled) != (b.low, b.shuffled) or len(other.rows) == 12, options
    assert a.shuffled_least < a.shuffled < a.shuffled_most
    other.save(tmp_path / "t.json")
    again = TransferTable.load(tmp_path / "t.json")
    assert again.frame().equals(other.frame())
    assert repr(again) == repr(other)
    assert "all" in again._repr_html_()
    assert cell(again, "all", "here").learned == 60


def test_what_cannot_be_transferred():
    acts, y, g, sets = planted(questions=10, turned=False)
    with pytest.raises(ValueError, match="there is here only"):
        transfer_rows(acts, y, g, ["here"] * len(y))
    with pytest.raises(ValueError, match="All 20 rows of shifted have the same label"):
        transfer_rows(acts, torch.where(torch.tensor([s == "shifted" for s in sets]), 1, y), g, sets)
    with pytest.raises(ValueError, match=r"6 folds of 10 questions of here.* at most 5"):
        transfer_rows(acts, y, g, sets, folds=6)
    with pytest.raises(ValueError, match="called 'all'"):
        transfer_rows(acts, y, g, ["all", *sets[1:]], shared=True)


# --- models -----------------------------------------------------------------------------------------------------------------


def runs_of(model, n=24, mark="q"):
    """Half of the answers think in a's, half in b's, the last letter tells which; the first third of the thinking is x's."""
    texts = [f"<think>{'x' * (2 + i % 3)}{'ab'[i % 2] * (4 + 2 * (i % 3))}</think>{'xyz'[i % 3]}" for i in range(n)]
    return [model.transcript(f"{mark * (1 + i // 4 % 3)}{i // 4}", text) for i, text in enumerate(texts)], [
        i % 2 for i in range(n)
    ]


def test_sets_of_transcripts():
    model = Model(*tiny("llama"))
    (first, labels), (second, others) = runs_of(model), runs_of(model, mark="other ")
    sets = {"first": (first, labels), "second": ([*second, *first[:4]], [*others, None, None, *labels[2:4]])}
    found = transfer(model, sets, at="2.resid", folds=2, draws=50, components=4)
    assert [(r.trained, r.tested) for r in found.rows] == [
        ("first", "first"),
        ("first", "second"),
        ("second", "first"),
        ("second", "second"),
    ]
    assert [r.rows for r in found.rows] == [24, 26, 24, 26]
    assert [r.n for r in found.rows] == [6, 7, 6, 7]
    assert cell(found, "first", "second").value > 0.8
    with pytest.raises(ValueError, match="first: 24 transcripts, 3 labels"):
        transfer(model, {"first": (first, [0, 1, 1])})


def test_along_the_thinking():
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model)
    cut = dataclasses.replace(runs[0], finished=False, ids=runs[0].ids[: runs[0].spans["thinking"][1]])
    found = along(
        model, [*runs, cut], [*labels, 1], at="2.resid", fractions=(0, 0.25, 1), folds=2, draws=50, components=4
    )
    assert found.matrix().index.tolist() == ["0", "0.25", "1", "all"]
    assert found.matrix().columns.tolist() == ["0", "0.25", "1"]
    assert {r.rows for r in found.rows} == {24}  # that cut off is not among them
    for place in ("0", "0.25"):  # nothing is known before it is thought
        assert cell(found, place, place).low <= 0.5 or math.isnan(cell(found, place, place).low)
    assert cell(found, "1", "1").value > 0.9
    assert cell(found, "all", "1").learned == 72
    # by hand: the tokens that are read
    spans = [t.spans["thinking"] for t in runs]
    rows = [[b - 1, b + round(0.25 * (e - b)) - 1, e - 1] for b, e in spans]
    acts = collect(model, runs, at="2.resid", over="all")
    at = {(t, p): i for i, (t, p) in enumerate(zip(acts.transcript.tolist(), acts.position.tolist(), strict=True))}
    X = acts["2.resid"][[at[t, p] for t, mine in enumerate(rows) for p in mine]]
    by_hand = transfer_rows(
        activations({HIGH: X}),
        np.repeat(labels, 3),
        np.repeat([t.question for t in runs], 3),
        ["0", "0.25", "1"] * 24,
        lengths=np.repeat([e - b for b, e in spans], 3),
        shared=True,
        folds=2,
        draws=50,
        components=4,
    )
    for mine, theirs in zip(by_hand.rows, found.rows, strict=True):
        assert (mine.value, mine.length, mine.same_length) == pytest.approx(
            (theirs.value, theirs.length, theirs.same_length), abs=1e-6, nan_ok=True
        )


def test_before_a_text_there_is_no_place():
    text = Transcript("", (4, 5), "ab", ((0, 1), (1, 2)), {"all": (0, 2), "thinking": (0, 2)}, True)
    assert _marked(text, "thinking", (0.0, 0.5, 1.0)).spans == {**text.spans, "place-1": (0, 1), "place-2": (1, 2)}


def test_sets_that_cannot_be_compared_are_told_before_any_pass(unchecked, monkeypatch):
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model)
    monkeypatch.setattr("probes.linear.collect", None)
    for sets, options, said in (
        ({"first": (runs, labels)}, {}, "A transfer is between sets, and there is first only"),
        ({}, {}, "A transfer is between sets, and there is none"),
        (
            {"first": (runs, labels), "second": (runs, [1] * 24)},
            {"folds": 2},
            "second: All 24 rows over 'thinking' have the same label",
        ),
        (
            {"first": (runs, labels), "second": (runs[:4], labels[:4])},
            {"folds": 2},
            "second: All rows are of one group",
        ),
        (
            {"first": (runs, labels), "second": (runs, labels)},
            {"folds": 6},
            "first: 6 folds of 6 questions.* at most 3",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            transfer(model, sets, **options)
    with pytest.raises(ValueError, match=r"6 folds of 6 questions.* at most 3"):
        along(model, runs, labels, folds=6)
    with pytest.raises(ValueError, match="All 24 rows over 'thinking' have the same label"):
        along(model, runs, [1] * 24, folds=2)


def test_what_has_no_course():
    model = Model(*tiny("llama"))
    runs, labels = runs_of(model, 4)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        along(model, runs, labels, fractions=(0, 2))
    with pytest.raises(ValueError, match="4 transcripts, 1 labels"):
        along(model, runs, [1])
    with pytest.raises(ValueError, match="has a span doubts"):
        along(model, runs, labels, over="doubts")
    cut = [dataclasses.replace(t, finished=False, ids=t.ids[: t.spans["thinking"][1]]) for t in runs]
    with pytest.raises(ValueError, match="is there to its end"):
        along(model, cut, labels)
