"""Each figure draws what its table says, into the axes it is given, and leaves matplotlib as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
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
    "training": pd.DataFrame({"step": [1, 2], "measure": "loss", "value": [2.0, 1.0]}),
    "before-after": pd.DataFrame({"arm": ["base", "lift"], **LINE}),
    "similarity": pd.DataFrame(
        {"index": [0, 1, 2, 3], "part": ["attn.q", "attn.q", "mlp.e0.up", "mlp.e1.up"], "rho": [0.2, 0.7, 0.4, None], "tau": 0.5}
        | {"realigned": [True, False, True, False]}
    ),
}  # fmt: skip


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    return frame if "arm" in frame else pd.concat([frame.assign(arm=arm) for arm in ("lift", "full")])


def test_every_figure_is_tested() -> None:
    assert FRAMES.keys() == figures.FIGURES.keys()


@pytest.mark.parametrize("with_arms", [False, True])
@pytest.mark.parametrize("name", FRAMES)
def test_each_figure_draws_into_the_axes_it_is_given(name: str, with_arms: bool) -> None:
    frame = arms(FRAMES[name]) if with_arms else FRAMES[name]
    copy, before = frame.copy(), dict(mpl.rcParams)
    ax = Figure().subplots()
    found = figures.FIGURES[name](frame, ax=ax)
    assert found is ax
    assert ax.get_xlabel() or name == "before-after"
    assert ax.get_ylabel()
    assert ax.lines or ax.patches
    assert dict(mpl.rcParams) == before
    pd.testing.assert_frame_equal(frame, copy)
    if with_arms and name != "before-after":
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


@pytest.mark.parametrize("name", ["drift", "geometry", "sweep", "training"])
def test_an_unknown_measure_lists_what_there_is(name: str) -> None:
    exists = {
        "drift": "cka, mean_shift",
        "geometry": "effective_rank",
        "sweep": "accuracy, text_nll",
        "training": "loss",
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
