"""Each figure draws what its table says, into the axes it is given, and leaves matplotlib as it was."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses import figures
from analyses.style import COLOURS, colour, paper

LINE = {"value": [0.1, 0.5], "low": [0.0, 0.4], "high": [0.2, 0.6]}
DRIFT = {"layer": [0, 1], "span": "answer", "floor": 0.05}
GEOMETRY = {
    "layer": [0, 0, 1, 1],
    "energy_principal": [0.2, 0.4, 0.6, 0.8],
    "effective_rank": [1.0, 2, 3, 4],
    "density": 0.05,
}
FRAMES: dict[str, pd.DataFrame] = {
    "early-answers": pd.DataFrame(
        {"T": [2, 2, 2, 3, 3], "fraction": [0, 0.5, 1, 0, 1], "same": [0.2, 0.5, 1, 0.1, 1], "low": 0.1, "high": 1.0, "n": 7}
    ),
    "drift": pd.concat([pd.DataFrame({**DRIFT, **LINE, "measure": m}) for m in ("mean_shift", "cka")]),
    "geometry": pd.DataFrame(GEOMETRY),
    "sweep": pd.concat([pd.DataFrame({"strength": [1.0, 0.0], **LINE, "measure": m}) for m in ("accuracy", "text_nll")]),
    "frontier": pd.concat(
        [
            pd.DataFrame({"strength": [0.0, 2.0, -1.0], "measure": "length", "value": [5.0, 9.0, 3.0], "low": 2.0, "high": 9.5}),
            pd.DataFrame({"strength": [2.0, -1.0, 0.0], "measure": "kl", "value": [0.4, 0.1, 0.0], "low": 0.0, "high": 0.5}),
        ]
    ),
    "training": pd.DataFrame({"step": [1, 2], "measure": "loss", "value": [2.0, 1.0]}),
    "before-after": pd.DataFrame({"arm": ["base", "lift"], **LINE}),
    "trade-off": pd.DataFrame(
        {"arm": ["untuned", "untuned", "lift", "lift", "full", "full"], "measure": ["completion_nll", "text_nll"] * 3}
        | {"value": [2.0, 3.0, 0.5, 3.2, 0.5, 3.3]}
        | {"low": [1.9, 2.9, 0.4, 3.1, 0.4, 3.2], "high": [2.1, 3.1, 0.6, 3.3, 0.6, 3.4]}
        | {"by_seed": [(2.0,), (3.0,), (0.4, 0.6), (3.1, 3.3), (0.4, 0.6), (3.2, 3.4)]}
    ),
    "paired": pd.DataFrame(
        {"arm": ["lora", "full"] * 2, "base": "lift", "measure": ["completion_nll"] * 2 + ["text_nll"] * 2}
        | {"value": [0.1, -0.2, 0.0, 0.3], "low": [-0.1, -0.3, -0.1, 0.2], "high": [0.3, -0.1, 0.1, 0.4]}
        | {"by_seed": ["(0.0, 0.2)", "(-0.2, -0.2)", "(0.0, 0.0)", "(0.3, 0.3)"]}
    ),
    "similarity": pd.DataFrame(
        {"index": [0, 1, 2, 3], "part": ["attn.q", "attn.q", "mlp.e0.up", "mlp.e1.up"], "rho": [0.2, 0.7, 0.4, None], "tau": 0.5}
        | {"realigned": [True, False, True, False]}
    ),
    "probes": pd.DataFrame(
        {"layer": [1, 0, 0, 1], "span": ["thinking", "thinking", "answer", "answer"], "measure": "auc"}
        | {"value": [0.9, 0.6, 0.7, 0.7], "low": 0.5, "high": 0.95, "shuffled": [0.5, 0.5, 0.4, 0.6], "untrained": None}
        | {"embedding": [0.6, 0.6, 0.55, 0.55], "length": 0.58}
    ),
    "reliability": pd.DataFrame(
        {"scaling": ["none", "none", "platt", "platt"], "said": [0.2, 0.9, 0.3, 0.7], "was": [0.3, 0.7, 0.3, 0.7]}
        | {"low": [0.1, 0.5, 0.1, 0.5], "high": [0.4, 0.8, 0.4, 0.8], "n": 5, "rows": 10}
    ),
    "probe-transfer": pd.DataFrame(
        {"trained": ["a", "a", "b", "b"], "tested": ["a", "b"] * 2, "value": [0.9, 0.4, 0.6, 0.8], "low": 0.3, "high": 0.95}
    ),
    "probe-along": pd.DataFrame(
        {"trained": ["1", "0", "0", "all", "all"], "tested": [1.0, 0.0, 1.0, 0.0, 1.0], "value": [0.9, 0.5, 0.4, 0.6, 0.7], "low": 0.3, "high": 0.95}
        | {"n": 5, "shuffled": [0.5, 0.4, 0.9, 0.9, 0.9], "untrained": None, "embedding": 0.45, "length": 0.3}
    ),
    "heads": pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, None], "score": [0.5, -1.0, 2.0, 9.0], "site": "0.attn.o.h0"}),
    "lens": pd.DataFrame({"position": [4, 4, 5, 5], "token": ["a", "a", " b", " b"], "site": ["0.resid", "1.resid"] * 2}
        | {"word": ["x", "$y", "\n", "w"], "probability": [0.1, 0.9, 0.2, 0.8]}),
    "lengths": pd.DataFrame({"tokens": [3, 9, None, 30], "ended": [True, True, None, False]}),
    "accuracy-under-length": pd.DataFrame({"tokens": [3, 9, None, 30], "right": [False, True, None, None]}),
    **{
        name: pd.DataFrame(
            {"panel": panel, "x": [0.0, 1.0] * 3, "arm": ["+0", "+0", "lift", "lift", "full", "full"], "draw": None, "measure": "length"}
            | {column: numbers * 3 for column, numbers in LINE.items()}
        )
        for name, panel in (("edit", "strengths"), ("edit-shares", "shares"), ("edit-steering", "steering"), ("edit-layers", "layers"))
    },
}  # fmt: skip

MAPS = ("heads", "lens", "probe-transfer")  # of one arm


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    return frame if "arm" in frame else pd.concat([frame.assign(arm=arm) for arm in ("lift", "full")])


def test_every_figure_is_tested() -> None:
    assert FRAMES.keys() == figures.FIGURES.keys()


@pytest.mark.parametrize("with_arms", [False, True])
@pytest.mark.parametrize("name", FRAMES)
def test_each_figure_draws_into_the_axes_it_is_given(name: str, with_arms: bool) -> None:
    with_arms = with_arms and name not in MAPS
    frame = arms(FRAMES[name]) if with_arms else FRAMES[name]
    copy, before = frame.copy(), dict(mpl.rcParams)
    ax = Figure().subplots()
    found = figures.FIGURES[name](frame, ax=ax)
    assert found is ax
    assert ax.get_xlabel() or name == "before-after"
    assert ax.get_ylabel()
    assert ax.lines or ax.patches or ax.images
    assert dict(mpl.rcParams) == before
    pd.testing.assert_frame_equal(frame, copy)
    if with_arms and name not in ("before-after", "paired"):  # they name arms along an axis
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert any("lift" in label for label in labels)
        assert any("full" in label for label in labels)
        assert {COLOURS["lift"], COLOURS["full"]} <= {line.get_color() for line in ax.lines}


def test_lines_are_the_tables_numbers_in_order() -> None:
    ax = figures.sweep(FRAMES["sweep"], Figure().subplots())
    assert ax.lines[0].get_xydata().tolist() == [[0.0, 0.5], [1.0, 0.1]]  # by strength, whatever the table's order
    ax = figures.geometry(FRAMES["geometry"], Figure().subplots(), measure="effective_rank")
    assert ax.lines[0].get_xydata().tolist() == [[0, 1.5], [1, 3.5]]
    assert len(ax.lines) == 1  # chance is drawn for shares only
    ax = figures.geometry(FRAMES["geometry"], Figure().subplots())
    assert list(ax.lines[1].get_ydata()) == [0.05, 0.05]
    ax = figures.early_answers(FRAMES["early-answers"], Figure().subplots())
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.2, 0.5, 1], [0.1, 1]]
    ax = figures.before_after(FRAMES["before-after"], Figure().subplots())
    assert [bar.get_height() for bar in ax.patches] == [0.1, 0.5]


def test_where_gold_and_own_thinking_were_cut_the_gold_is_drawn() -> None:
    gold = FRAMES["early-answers"].assign(arm="lift", traces="gold")
    both = pd.concat([gold, gold.assign(traces="own", same=0.9)])
    ax = figures.early_answers(both, Figure().subplots())
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.2, 0.5, 1], [0.1, 1]]
    assert "gold" in ax.get_xlabel()
    alone = figures.early_answers(both[both["traces"] == "own"], Figure().subplots())
    assert list(alone.lines[0].get_ydata()) == [0.9, 0.9, 0.9]


def test_a_trade_off_is_of_what_the_table_has() -> None:
    answers = FRAMES["trade-off"].replace({"completion_nll": "answer_nll"})
    assert figures.trade_off(answers, Figure().subplots()).get_xlabel() == "answer nll"
    with pytest.raises(ValueError, match=r"'beauty'.*answer_nll, text_nll"):
        figures.trade_off(answers, Figure().subplots(), x="beauty")
    with pytest.raises(ValueError, match="one measure"):
        figures.trade_off(answers[answers["measure"] == "text_nll"], Figure().subplots())


def test_several_answers_to_a_question_are_drawn_together() -> None:
    answers = pd.DataFrame(
        {"arm": "edited", "tokens": 5, "right": [True] * 8 + [False] * 8, "question": [i // 4 for i in range(16)]}
    )
    band = figures.accuracy_under_length(answers, Figure().subplots()).collections[0].get_paths()[0].vertices
    low = figures.accuracy_under_length(answers.assign(question=range(16)), Figure().subplots()).collections[0]
    assert band[:, 1].min() < low.get_paths()[0].vertices[:, 1].min()


def test_a_frontier_pairs_effect_and_cost_by_strength_and_rings_the_knee() -> None:
    own = FRAMES["frontier"].assign(draw=None, knee=FRAMES["frontier"]["strength"] == 2)
    random = own.assign(draw=0, knee=False, value=own["value"] / 2)
    ax = figures.frontier(pd.concat([own, random]), Figure().subplots())
    lines = {line.get_label(): line for line in ax.lines}
    path = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert [line.get_xydata().tolist() for line in path] == [
        [[0.05, 1.5], [0, 2.5], [0.2, 4.5]],
        [[0.1, 3], [0, 5], [0.4, 9]],
    ]
    assert path[0] is lines["random"]  # of a removal they have the norm of the direction, not of the change
    assert path[0].get_color() != path[1].get_color()
    assert lines["knee"].get_xydata().tolist() == [[0.4, 9]]
    assert [text.get_text() for text in ax.texts] == ["-1", "2"]  # not the untouched model
    dots = {
        float(d.get_xdata()[0]): d.get_markerfacecolor()
        for d in ax.lines
        if len(d.get_xdata()) == 1 and d is not lines["knee"]
    }
    assert dots[0.1] == "white" != dots[0.4]
    assert [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == ":"] == [[5.0, 5.0]]
    assert ax.get_ylabel() == figures.SWEEP_LABELS["length"]
    at = ax.transScale.transform([(0, 1), (0.1, 1), (0.4, 1)])[:, 0]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0])  # square roots
    small = own.assign(value=own["value"].where(own["measure"] != "kl", own["value"] / 100))
    drawn = figures.draw(figures.frontier, small).axes[0]
    shown = [t.get_window_extent() for t in drawn.get_xticklabels() if 0 <= t.get_position()[0] <= drawn.get_xlim()[1]]
    assert len(shown) > 2
    assert all(left.x1 < right.x0 for left, right in pairwise(shown)), (
        "the numbers of the axis do not lie on each other"
    )
    for wrong, options in (
        (own[own["measure"] == "length"], {}),
        (own, {"measure": "kl"}),
        (own, {"measure": "beauty"}),
    ):
        with pytest.raises(ValueError, match="A frontier is of KL and a measure of effect"):
            figures.frontier(wrong, Figure().subplots(), **options)


def test_a_trade_off_keeps_the_arms_apart_however_far_off_the_untuned_model_is() -> None:
    values = [3.0, *FRAMES["trade-off"]["value"][2:]]
    near, far = (FRAMES["trade-off"].assign(value=[x, *values]) for x in (0.7, 200.0))
    for frame, at, name in ((near, [0.7, 3.0], "untuned"), (far, [0.62, 3.0], "untuned, off the chart:\n200, 3")):
        ax = figures.trade_off(frame, Figure().subplots())
        (cross,) = [line for line in ax.lines if line.get_marker() == "+"]
        assert cross.get_xydata()[0].tolist() == pytest.approx(at)
        assert cross.get_label() == name


def test_pairs_are_filled_where_their_interval_leaves_out_zero() -> None:
    ax = figures.paired(FRAMES["paired"], Figure().subplots(), measure="text_nll")
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_markersize() == 5]
    assert [line.get_xydata().tolist() for line in dots] == [[[0.0, 0]], [[0.3, 1]]]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [True, False]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["lora", "full"]
    assert ax.get_xlabel() == "text nll: more than lift"


def test_similarity_draws_a_dot_a_module_and_the_threshold() -> None:
    ax = figures.similarity(FRAMES["similarity"], Figure().subplots())
    *dots, threshold = ax.lines
    assert [line.get_xydata().tolist() for line in dots] == [[[0, 0.2]], [[1, 0.7]], [[2, 0.4]]]
    filled = [line.get_markerfacecolor() == line.get_color() for line in dots]
    assert filled == [True, False, True]  # what was realigned
    assert dots[0].get_color() == dots[1].get_color() != dots[2].get_color()
    assert list(threshold.get_ydata()) == [0.5, 0.5]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["attn.q", "mlp.up", "threshold 0.5"]
    counted = FRAMES["similarity"].assign(tau=None)
    assert len(figures.similarity(counted, Figure().subplots()).lines) == 3


def test_probes_are_drawn_above_the_best_of_their_controls() -> None:
    ax = figures.probes(FRAMES["probes"], Figure().subplots())
    thinking, floor, answer, lower, chance = ax.lines
    assert thinking.get_xydata().tolist() == [[0, 0.6], [1, 0.9]]  # by layer, whatever the table's order
    assert list(floor.get_ydata()) == [0.6, 0.6]
    assert list(answer.get_ydata()) == [0.7, 0.7]
    assert list(lower.get_ydata()) == [0.58, 0.6]
    assert floor.get_color() == thinking.get_color() != answer.get_color()
    assert list(chance.get_ydata()) == [0.5, 0.5]
    assert ax.get_ylabel() == "held-out AUC"
    assert ax.get_xlabel() == "layer (residual stream entering it)"
    more = FRAMES["probes"].assign(
        same_length=0.55, same_length_low=0.5, same_length_high=0.6, accuracy=0.8, majority=0.7
    )
    ax = figures.probes(more, Figure().subplots(), measure="same_length")
    assert list(ax.lines[3].get_ydata()) == [0.4, 0.6]  # shuffled labels
    assert ax.get_ylabel() == "held-out AUC among spans of about equal length"
    places = FRAMES["probes"].assign(site=["1.mid", "0.resid", "0.mid", "1.mid"])
    ax = figures.probes(places, Figure().subplots())
    assert [line.get_xydata().tolist() for line in ax.lines[:4:2]] == [[[1, 0.9]], [[0, 0.7], [1, 0.7]]]
    assert len(ax.lines) == 5  # no embedding
    assert ax.get_xlabel() == "layer"
    ax = figures.probes(places.assign(site=["1.mid", "0.resid", "0.mid", "1.resid"]), Figure().subplots())
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {
        "mid, thinking",
        "mid, answer",
        "resid, thinking",
        "resid, answer",
    }
    ax = figures.probes(more, Figure().subplots(), measure="accuracy")
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.8, 0.8], [0.7, 0.7]] * 2


def test_what_was_said_is_drawn_against_what_was() -> None:
    ax = figures.reliability(FRAMES["reliability"], Figure().subplots())
    same, first, second = (line for line in ax.lines if len(line.get_xdata()) == 2)
    assert same.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert first.get_xydata().tolist() == [[0.2, 0.3], [0.9, 0.7]]
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["as it is", "by Platt's line"]
    assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1  # intervals may be anywhere within
    bars = [bar.get_segments() for bar in ax.collections]
    assert bars[0][1].tolist() == [[0.9, 0.5], [0.9, 0.8]]


def test_a_transfer_is_a_map_with_its_numbers() -> None:
    ax = figures.probe_transfer(FRAMES["probe-transfer"], Figure().subplots())
    (image,) = ax.images
    assert image.get_array().tolist() == [[0.9, 0.4], [0.6, 0.8]]
    assert image.get_clim() == (0, 1)
    assert [text.get_text() for text in ax.texts][1] == "0.40\n[0.30, 0.95]"
    assert len(ax.patches) == 2  # the diagonal


def test_the_course_of_a_probe_is_its_own_and_the_shared_line() -> None:
    ax = figures.probe_along(FRAMES["probe-along"], Figure().subplots())
    own, best, shared, chance = ax.lines
    assert own.get_xydata().tolist() == [
        [0, 0.5],
        [1, 0.9],
    ]  # by place, whatever the table's order, and not what was trained elsewhere
    assert list(best.get_ydata()) == [0.45, 0.5]
    assert list(shared.get_ydata()) == [0.6, 0.7]
    assert list(chance.get_ydata()) == [0.5, 0.5]


def test_cosines_are_a_map_symmetric_about_nothing() -> None:
    names = [f"{layer}.mid" for layer in range(30)]
    table = pd.DataFrame([[(i - j) / 30 for j in range(30)] for i in range(30)], names, names)
    ax = figures.cosines(table, Figure().subplots())
    (image,) = ax.images
    assert image.get_clim() == (-1, 1)
    assert image.get_array()[29, 0] == pytest.approx(29 / 30)
    assert [label.get_text() for label in ax.get_yticklabels()] == names[::3]


def test_there_is_no_half_a_layer_or_head() -> None:
    for name, axes in (("heads", ("x", "y")), ("drift", ("x",)), ("geometry", ("x",))):
        ax = figures.FIGURES[name](FRAMES[name], Figure().subplots())
        ticks = [tick for axis in axes for tick in getattr(ax, f"get_{axis}ticks")()]
        assert ticks == [int(tick) for tick in ticks], name


def test_a_map_of_heads_is_symmetric_about_nothing_and_has_holes() -> None:
    ax = figures.heads(FRAMES["heads"], Figure().subplots(), chosen=["1.attn.o.h0"])
    (image,) = ax.images
    assert image.get_clim() == (-2, 2)
    assert image.get_array().filled(7).tolist() == [[0.5, -1.0], [2.0, 7.0]]  # the last head was not scored
    assert [patch.get_xy() for patch in ax.patches] == [(-0.5, 0.5)]
    ranked = FRAMES["heads"].assign(
        site=["0.attn.o.h0", "0.attn.o.h1", "1.attn.o.h0", None], edited=[True, False, True, None]
    )
    ax = figures.heads(ranked, Figure().subplots())  # what is edited is outlined; its score is along the brief side
    assert [patch.get_xy() for patch in ax.patches] == [(-0.5, -0.5), (-0.5, 0.5)]
    assert ax.figure.axes[1].get_ylabel() == "contribution along the brief direction"
    long = FRAMES["heads"].rename(columns={"score": "value"}).assign(measure="kl")
    both = pd.concat([long, long.assign(measure="nll", value=3.0)])
    assert figures.heads(both, Figure().subplots(), measure="nll").images[0].get_clim() == (-3, 3)
    with pytest.raises(ValueError, match=r"'beauty'.*kl, nll"):
        figures.heads(both, Figure().subplots(), measure="beauty")
    with pytest.raises(ValueError, match="A map shows one arm; here are lift, full"):
        figures.heads(arms(FRAMES["heads"]), Figure().subplots())


def test_a_lens_shows_words_and_probabilities() -> None:
    ax = figures.lens(FRAMES["lens"], Figure().subplots())
    assert ax.images[0].get_array().tolist() == [[0.1, 0.2], [0.9, 0.8]]
    assert {text.get_text(): text.get_position() for text in ax.texts} == {
        "x": (0, 0),
        r"\$y": (0, 1),
        "⏎": (1, 0),
        "w": (1, 1),
    }
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "·b"]


@pytest.mark.parametrize("name", ["drift", "geometry", "sweep", "training", "probes", "paired"])
def test_an_unknown_measure_lists_what_there_is(name: str) -> None:
    exists = {
        "drift": "cka, mean_shift",
        "geometry": "effective_rank",
        "sweep": "accuracy, text_nll",
        "training": "loss",
        "paired": "completion_nll, text_nll",
        "probes": "value, same_length, accuracy",
    }
    with pytest.raises(ValueError, match=f"'beauty'.*{exists[name]}"):
        figures.FIGURES[name](FRAMES[name], Figure().subplots(), measure="beauty")


@pytest.mark.parametrize(("name", "measure"), [("drift", "cka"), ("geometry", "effective_rank"), ("sweep", "text_nll")])
def test_measure_chooses(name: str, measure: str) -> None:
    default = figures.draw(figures.FIGURES[name], FRAMES[name])
    assert figures.png(figures.draw(figures.FIGURES[name], FRAMES[name], measure=measure)) != figures.png(default)


def test_an_interval_that_is_not_there_is_not_drawn() -> None:
    frame = pd.DataFrame(
        {"T": 2, "fraction": [0.0, 1.0], "same": [0.5, 1.0], "low": [None, None], "high": [None, None], "n": 1}
    )
    assert len(figures.early_answers(frame, Figure().subplots()).lines) == 1


def test_a_watched_number_is_drawn_with_its_interval() -> None:
    rows = {"step": [0, 16, 32], "measure": "held-out accuracy", "arm": "lift", "value": [0.0, 0.25, 0.4]}
    plain = figures.training(pd.DataFrame(rows), Figure().subplots(), measure="held-out accuracy")
    assert not plain.collections
    table = pd.DataFrame({**rows, "low": [0.0, 0.1, None], "high": [0.2, 0.5, None]})
    (band,) = figures.training(table, Figure().subplots(), measure="held-out accuracy").collections
    (path,) = band.get_paths()
    assert {tuple(corner) for corner in np.round(np.asarray(path.vertices), 6)} >= {
        (0, 0),
        (0, 0.2),
        (16, 0.1),
        (16, 0.5),
    }


def test_without_axes_the_current_ones_are_used() -> None:
    import matplotlib.pyplot as plt

    try:
        _, ax = plt.subplots()
        assert figures.training(FRAMES["training"]) is ax
    finally:
        plt.close("all")


@pytest.mark.parametrize("ending", [".png", ".pdf", ".svg"])
def test_a_saved_figure_is_the_same_bytes_again(ending: str, tmp_path: Path) -> None:
    def saved(name: str) -> bytes:
        drawn = figures.draw(figures.sweep, FRAMES["sweep"])
        return figures.save(drawn, tmp_path / "new" / f"{name}{ending}").read_bytes()

    first = saved("a")
    if ending != ".svg":  # its ids are drawn at random
        assert saved("b") == first
    assert not [p for p in (tmp_path / "new").iterdir() if ".part" in p.name]


def test_drawing_sets_nothing_global_and_uses_the_style() -> None:
    before: dict[str, Any] = dict(mpl.rcParams)
    drawn = figures.draw(figures.sweep, FRAMES["sweep"], width=4.0, ratio=0.5)
    assert dict(mpl.rcParams) == before
    assert tuple(drawn.get_size_inches()) == (4, 2)
    ax: Axes = drawn.axes[0]
    assert not ax.spines["top"].get_visible()
    assert paper(3.0)["figure.figsize"][0] == 3


def test_an_arm_has_one_colour_and_others_take_the_cycle() -> None:
    assert colour("lift", 3) == colour("lift", 5) == COLOURS["lift"]
    assert colour("mine", 0) != colour("mine", 1)


def test_lengths_mark_what_was_cut_off_and_leave_out_what_is_missing() -> None:
    ax = figures.lengths(FRAMES["lengths"], Figure().subplots())
    assert ax.lines[0].get_ydata().sum() == 3 + 1  # the last step is drawn twice
    assert ax.get_legend().get_texts()[0].get_text() == "3 answers, 1 cut off"
    assert ax.collections[1].get_hatch() == "////"
    ax = figures.accuracy_under_length(FRAMES["accuracy-under-length"], Figure().subplots())
    assert [ax.lines[0].get_ydata()[i] for i in (0, -1)] == [0, pytest.approx(1 / 3)]
    assert len(ax.lines[0].get_xdata()) == 30
    for draw in (figures.lengths, figures.accuracy_under_length):
        with pytest.raises(ValueError, match="No answer in this table has a length"):
            draw(pd.DataFrame({"tokens": [None], "ended": [None], "right": [None]}), Figure().subplots())


def test_controls_of_an_edit_are_bands_of_their_draws() -> None:
    rows = [("edit", None, 0, 1.0), ("edit", None, 1, 2.0)]
    rows += [("random heads", draw, x, 1.0 + x * draw) for draw in (0, 1, 2) for x in (0, 1)]
    table = pd.DataFrame([{"panel": "strengths", "arm": a, "draw": d, "x": x, "value": v} for a, d, x, v in rows])
    table = table.assign(measure="length", low=table["value"], high=table["value"])
    ax = figures.edit_sweep(table, Figure().subplots())
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2]]
    band = ax.collections[1].get_paths()[0].vertices
    assert {tuple(corner) for corner in band.tolist()} == {(0, 1), (1, 1), (1, 3)}
    dashes = ax.collections[-1].get_offsets().tolist()  # at one place, or of one draw, the band has no area
    assert sorted(dashes) == [[0, 1], [0, 1], [0, 1], [1, 1], [1, 2], [1, 3]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["edit", "random heads (range of 3)"]
    ax = figures.edit_sweep(FRAMES["edit-layers"], Figure().subplots(), panel="layers")
    assert list(ax.lines[0].get_ydata()) == [0.1, 0.1]  # the untouched model
    assert len(ax.lines) == 3
