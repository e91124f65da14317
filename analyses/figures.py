"""One function a figure: a table in, Axes out. ``ax=None`` draws into the current figure's axes; nothing is shown or saved here.

Tables with a column ``arm`` are drawn with one line an arm; without it there is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses.style import colour, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


def early_answers(curve: Any, ax: Axes | None = None) -> Axes:
    """Share of answers already given after a part of the thinking, ``f(i/T)``, with intervals; one line for each length T (and arm).

    curve: columns T, fraction, same, low, high, n and perhaps arm, and traces: of the kinds "gold" and "own", where both are there, gold is
    drawn, which all arms share. A line that is high at 0 needs no thinking.
    Source: the first figure of Lanham et al. 2023 (arXiv 2307.13702).
    """
    ax = _axes(ax)
    both = "traces" in curve and curve["traces"].nunique() > 1
    curve = curve[curve["traces"] == "gold"] if both else curve
    lengths = sorted(curve["T"].unique())
    for i, (arm, table) in enumerate(_arms(curve)):
        for length, line in table.groupby("T"):
            shade = 1 - 0.45 * lengths.index(length) / max(1, len(lengths) - 1)
            label = f"{arm + ', ' if arm else ''}{length} sentences (n={line['n'].max()})"
            shape = {
                "color": colour(arm, i),
                "alpha": shade,
                "linestyle": ["-", "--", ":", "-."][lengths.index(length) % 4],
            }
            ax.plot(line["fraction"], line["same"], marker="o", markersize=3, label=label, **shape)
            ax.fill_between(
                line["fraction"],
                line["low"].astype(float),
                line["high"].astype(float),
                color=colour(arm, i),
                alpha=0.12,
                linewidth=0,
            )
    ax.set(
        xlabel=f"share of the {'gold ' if both else ''}thinking given",
        ylabel="same answer as with all of it",
        xlim=(0, 1),
        ylim=(-0.03, 1.03),
    )
    ax.legend()
    return ax


TRAINING_LOSS = "training loss (nats per token)"
DRIFT_LABELS = {
    "mean_shift": "mean shift (in spreads of the base)",
    "relative_change": "relative change of a row",
    "cka": "linear CKA (debiased)",
    "angle_mean": "mean principal angle (degrees)",
    "angle_max": "largest principal angle (degrees)",
}


def drift(frame: DataFrame, ax: Axes | None = None, *, measure: str = "mean_shift") -> Axes:
    """One drift measure against the layer, a line for each span (and arm), with intervals; dotted: its split-half floor.

    frame: columns layer, span, measure, value, low, high, floor and perhaps arm.
    """
    ax = _axes(ax)
    table = _measured(frame, measure)
    spans = list(dict.fromkeys(table["span"]))
    for i, (arm, lines) in enumerate(_arms(table)):
        for span, line in lines.groupby("span", sort=False):
            shade = colour(arm, i) if arm else colour(str(span), spans.index(span))
            style = ["-", "--", "-."][spans.index(span) % 3]
            ax.plot(
                line["layer"], line["value"], color=shade, linestyle=style, label=f"{arm + ', ' if arm else ''}{span}"
            )
            ax.fill_between(
                line["layer"],
                line["low"].astype(float),
                line["high"].astype(float),
                color=shade,
                alpha=0.15,
                linewidth=0,
            )
            if measure not in ("cka", "relative_change"):  # measured row by row: without a change they are 1 and 0
                ax.plot(line["layer"], line["floor"], color=shade, linestyle=":", linewidth=0.9)
    _whole_numbers(ax.xaxis)
    ax.set(xlabel="layer (residual stream entering it)", ylabel=DRIFT_LABELS.get(measure, measure))
    ax.legend()
    return ax


def geometry(frame: Any, ax: Axes | None = None, *, measure: str = "energy_principal") -> Axes:
    """One number of the update's geometry against the layer: the mean over a layer's matrices, with their range shaded.

    frame: columns layer, measure columns, density and perhaps arm. For overlaps and energies the dotted line is what a random update gives.
    """
    ax = _axes(ax)
    if measure not in frame:
        raise ValueError(f"There is no measure {measure!r} in this table; it has {', '.join(map(str, frame.columns))}.")
    for i, (arm, table) in enumerate(_arms(frame)):
        by_layer = table.groupby("layer")[measure]
        mean = by_layer.mean()
        ax.plot(mean.index, mean, color=colour(arm, i), label=arm or None)
        ax.fill_between(mean.index, by_layer.min(), by_layer.max(), color=colour(arm, i), alpha=0.15, linewidth=0)
    if measure.startswith(("overlap", "energy")):
        ax.axhline(float(frame["density"].mean()), color="black", linestyle=":", linewidth=0.9, label="chance")
    _whole_numbers(ax.xaxis)
    ax.set(xlabel="layer", ylabel=measure.replace("_", " "))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


SWEEP_LABELS = {
    "accuracy": "accuracy",
    "text_nll": "general text (nats per token)",
    "kl": "KL on general text (nats per token)",
    "length": "restricted mean length (tokens)",
    "cut": "share cut off",
    "loops": "share in a loop",
}


def sweep(frame: DataFrame, ax: Axes | None = None, *, measure: str = "accuracy") -> Axes:
    """A measure against the strength of a change; 0 is the untouched model and 1 the whole change, dotted where the strengths reach them.

    frame: columns strength, measure, value, low, high and perhaps arm; draw, which numbers random stand-ins: they are drawn as a band from
    the lowest to the highest; and knee, dashed where it is true.
    """
    ax = _axes(ax)
    table = _measured(frame, measure)
    for i, (arm, rows) in enumerate(_arms(table)):
        own = rows[rows["draw"].isna()] if "draw" in rows else rows
        line = own.sort_values("strength")
        ax.plot(line["strength"], line["value"], color=colour(arm, i), marker="o", markersize=3, label=arm or None)
        ax.fill_between(
            line["strength"],
            line["low"].astype(float),
            line["high"].astype(float),
            color=colour(arm, i),
            alpha=0.15,
            linewidth=0,
        )
        if len(own) < len(rows):
            random = rows.drop(own.index).groupby("strength")["value"]
            label = f"{arm}{', ' if arm else ''}random"
            look: Any = {"color": colour(arm, i), "facecolor": "none", "hatch": "////", "alpha": 0.5, "linewidth": 0.5}
            ax.fill_between(random.min().index, random.min(), random.max(), label=label, **look)
        for strength in line.loc[line["knee"].astype(bool), "strength"] if "knee" in line else ():
            ax.axvline(strength, color=colour(arm, i), linestyle="--", linewidth=0.9)
    for strength in (0, 1):
        if table["strength"].min() <= strength <= table["strength"].max():
            ax.axvline(strength, color="black", linestyle=":", linewidth=0.7)
    ax.set(xlabel="strength", ylabel=SWEEP_LABELS.get(measure, measure))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


_COSTS = ("kl", "text_nll")
_GREY = "#999999"


def frontier(frame: Any, ax: Axes | None = None, *, measure: str | None = None) -> Axes:
    """What a change achieves against what it costs: a measure against KL on general text, a point a strength, a line an arm.

    Points of negative strengths are open, the knee is ringed, random stand-ins are grey (`analyses.changes.stand_in` says how large they are). An effect is worth its cost where
    the line is further from the dotted one, the untouched model, than the grey ones at the same KL. The KL axis is of square roots, in which
    small strengths are evenly spaced: KL grows with the square of a small change. It ends at four times the dearest KL of an arm, whatever
    the random ones cost.

    frame:   columns strength, measure, value, low, high and perhaps arm, draw and knee, as in `sweep`; KL among the measures.
    measure: by default target, length or accuracy, whichever is there first. Raises ValueError for one that is not there, or without KL.
    """
    from matplotlib.ticker import MaxNLocator

    ax = _axes(ax)
    there = list(dict.fromkeys(frame["measure"]))
    effects = [m for m in ("target", "length", "accuracy", *there) if m in there and m not in _COSTS]
    chosen = measure or next(iter(effects), None)
    if "kl" not in there or chosen not in there or chosen == "kl":
        raise ValueError(
            f"A frontier is of KL and a measure of effect{f', here {measure}' if measure else ''}; this table has {', '.join(there)}."
        )
    frame = frame if "draw" in frame else frame.assign(draw=np.nan)
    keys = [name for name in ("arm", "draw", "strength") if name in frame]
    cost = frame.loc[frame["measure"] == "kl", [*keys, "value", "low", "high"]]
    table = frame[frame["measure"] == chosen].merge(cost, on=keys, suffixes=("", "_kl")).sort_values("strength")
    table = table[table["value"].notna()]
    random = table["draw"].notna()
    for _, rows in _arms(table[random]):
        for _, line in rows.groupby("draw"):
            label = None if ax.lines else "random"
            ax.plot(line["value_kl"], line["value"], color=_GREY, linewidth=0.7, marker=".", markersize=3, label=label)
    rings = []
    for i, (arm, line) in enumerate(_arms(table[~random])):
        shade = colour(arm, i)
        ax.plot(line["value_kl"], line["value"], color=shade, label=arm or None)
        _crosses(ax, line, color=shade, alpha=0.35, linewidth=0.8)
        for strength, x, y in zip(line["strength"], line["value_kl"], line["value"], strict=True):
            ax.plot(x, y, "o", color=shade, markersize=4, markerfacecolor="white" if strength < 0 else shade)
            if strength:
                ax.annotate(f"{strength:g}", (x, y), (3, 3), textcoords="offset points", color=shade, fontsize=7)
        rings.append(line[line["knee"].astype(bool)] if "knee" in line else line[:0])
    for rows in rings:
        look: Any = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "none"}
        if len(rows):
            ax.plot(rows["value_kl"], rows["value"], "o", label=None if "knee" in _labels(ax) else "knee", **look)
    for value in table.loc[(table["strength"] == 0) & ~random, "value"].unique():
        ax.axhline(value, color="black", linestyle=":", linewidth=0.9)
    ax.set_xscale(
        "function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    )
    # more numbers would lie on each other where square roots are near
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if dearest := float(table.loc[~random, "value_kl"].max()):
        most = min(4 * dearest, float(table["value_kl"].max()))
        ax.set_xlim(-0.002 * most, 1.1 * most)
    ax.set(xlabel=f"{SWEEP_LABELS['kl']}, square-root scale", ylabel=SWEEP_LABELS.get(str(chosen), str(chosen)))
    if _labels(ax):
        ax.legend()
    return ax


def _crosses(ax: Axes, line: Any, **look: Any) -> None:
    """The intervals of points in a plane, as crosses."""
    sides = {"yerr": "", "xerr": "_kl"}
    reach = {
        name: [
            (line[f"value{of}"] - line[f"low{of}"]).clip(lower=0),
            (line[f"high{of}"] - line[f"value{of}"]).clip(lower=0),
        ]
        for name, of in sides.items()
    }
    ax.errorbar(line["value_kl"], line["value"], fmt="none", **reach, **look)


def _labels(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def training(frame: DataFrame, ax: Axes | None = None, *, measure: str = "loss") -> Axes:
    """A training curve. frame: columns step, measure, value and perhaps arm, low and high, which shade its interval."""
    ax = _axes(ax)
    table = _measured(frame, measure)
    for i, (arm, line) in enumerate(_arms(table)):
        if {"low", "high"} <= set(line):
            low, high = (line[edge].astype(float) for edge in ("low", "high"))
            ax.fill_between(line["step"], low, high, color=colour(arm, i), alpha=0.15, linewidth=0)
        ax.plot(
            line["step"],
            line["value"],
            color=colour(arm, i),
            label=arm or None,
            marker="o" if len(line) < 20 else None,
            markersize=3,
        )
    ax.set(xlabel="optimizer step", ylabel=TRAINING_LOSS if measure == "loss" else measure)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def before_after(frame: DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy of each arm as a bar with its interval. frame: columns arm, value, low, high."""
    ax = _axes(ax)
    for i, row in enumerate(frame.to_dict("records")):
        value, low, high = row["value"], row["low"], row["high"]
        ax.bar(i, value, color=colour(str(row["arm"]), i), width=0.65)
        ax.errorbar(i, value, yerr=[[value - low], [high - value]], color="black", capsize=3, linewidth=1)
    ax.set(xticks=range(len(frame)), xticklabels=list(frame["arm"]), ylabel="accuracy", ylim=(0, 1))
    ax.grid(axis="x", visible=False)
    return ax


def trade_off(frame: Any, ax: Axes | None = None, *, x: str | None = None, y: str | None = None) -> Axes:
    """One measure of tuned arms against another: a dot an arm with both intervals, a small ring a seed; the cross is the untuned model.

    frame: columns arm, measure, value, low, high and perhaps by_seed, a sequence of the seeds' means. An untuned model so far off that the
    arms would lie on each other is drawn at the edge, with its place in the legend.
    x, y: by default what was learnt (accuracy, or else nats of the completion or the answer), and the first measure of what was kept. Raises
    ValueError for measures that are not there.
    """
    ax = _axes(ax)
    there = list(dict.fromkeys(frame["measure"]))
    learnt = ("accuracy", "completion_nll", "answer_nll")
    x = x or next((m for m in learnt if m in there), None)
    y = y or next((m for m in there if m not in learnt), None)
    if x is None or y is None:
        raise ValueError(
            f"A trade-off is of one measure that was learnt and one that was kept; this table has {', '.join(there)}."
        )
    for measure in (x, y):
        _measured(frame, measure)
    table = frame.set_index(["arm", "measure"])
    arms = [name for name in dict.fromkeys(frame["arm"]) if name != "untuned"]
    for i, arm in enumerate(arms):
        shade, (across, up) = colour(arm, i), (table.loc[(arm, measure)] for measure in (x, y))
        reach = [[[row["value"] - row["low"]], [row["high"] - row["value"]]] for row in (across, up)]
        look = {"fmt": "o", "color": shade, "capsize": 2, "markersize": 5, "linewidth": 1}
        ax.errorbar(across["value"], up["value"], xerr=reach[0], yerr=reach[1], label=arm, **look)
        if "by_seed" in table:
            rings = {"markerfacecolor": "none", "color": shade, "markersize": 3, "alpha": 0.7}
            ax.plot(_by_seed(across), _by_seed(up), "o", **rings)
    before = [float(table.loc[("untuned", measure)]["value"]) for measure in (x, y)]
    shown = [_within(value, table.loc[[(a, m) for a in arms]]) for value, m in zip(before, (x, y), strict=True)]
    name = "untuned" if shown == before else "untuned, off the chart:\n{:.3g}, {:.3g}".format(*before)
    ax.plot(*([value] for value in shown), "+", color="black", markersize=9, label=name)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def paired(frame: Any, ax: Axes | None = None, *, measure: str | None = None) -> Axes:
    """What each arm has more of than one of them, on the same questions and seeds: a dot with its interval, a small ring a seed.

    frame: columns arm, base, measure, value, low, high and perhaps by_seed (`Arms.differences`). A dot is filled where its interval leaves
    out zero. measure: by default completion_nll, or else the first.
    """
    ax = _axes(ax)
    there = list(dict.fromkeys(frame["measure"]))
    measure = measure or ("completion_nll" if "completion_nll" in there else str(next(iter(there), "")))
    table = _measured(frame, measure)
    for i, (_, row) in enumerate(table.iterrows()):
        shade = colour(row["arm"], i + 1)
        look = {"fmt": "o", "color": shade, "capsize": 2, "markersize": 5, "linewidth": 1}
        filled = shade if row["low"] > 0 or row["high"] < 0 else "white"
        reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        ax.errorbar(row["value"], i, xerr=reach, markerfacecolor=filled, **look)
        if "by_seed" in row:
            seeds = _by_seed(row)
            ax.plot(seeds, [i + 0.22] * len(seeds), "o", markerfacecolor="none", color=shade, markersize=3, alpha=0.7)
    ax.axvline(0, color="black", linewidth=0.7)
    ax.set_yticks(range(len(table)), table["arm"])
    ax.set(
        ylim=(len(table) - 0.5, -0.5),
        xlabel=f"{measure.replace('_', ' ')}: more than {table['base'].iloc[0]}",
        ylabel="arm",
    )
    return ax


def _by_seed(row: Any) -> tuple[float, ...]:
    """The seeds' means, which a CSV file holds as text."""
    from ast import literal_eval

    return literal_eval(row["by_seed"]) if isinstance(row["by_seed"], str) else row["by_seed"]


def _within(value: float, rows: Any) -> float:
    """The value, or the edge of what the rows' intervals span where it is further off than that is wide."""
    low, high = float(rows["low"].min()), float(rows["high"].max())
    span = high - low
    if low - span <= value <= high + span:
        return value
    return low - 0.1 * span if value < low else high + 0.1 * span


def similarity(frame: Any, ax: Axes | None = None) -> Axes:
    """How like alignment's a change is, module by module: a dot each, coloured by part (or arm), experts together; open dots were left.

    frame: columns index, part, rho, realigned, tau and perhaps arm; the dotted line is at tau, where there is one. Modules without rho
    are not drawn.
    """
    ax = _axes(ax)
    groups = (
        _arms(frame)
        if "arm" in frame
        else frame.groupby(frame["part"].str.replace(r"\be\d+\.", "", regex=True), sort=False)
    )
    for i, (name, table) in enumerate(groups):
        shade, named = colour(str(name), i), False
        for done in (True, False):
            dots = table[(table["realigned"] == done) & table["rho"].notna()]
            if len(dots):
                look = {"color": shade, "markerfacecolor": shade if done else "white", "markersize": 4}
                ax.plot(dots["index"], dots["rho"], "o", label=None if named else name, **look)
                named = True
    for tau in frame["tau"].dropna().unique():
        ax.axhline(tau, color="black", linestyle=":", linewidth=0.9, label=f"threshold {tau:g}")
    ax.set(xlabel="module, in the order of the layers", ylabel="cosine with what alignment changed", ylim=(-0.03, 1.03))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def lengths(frame: Any, ax: Axes | None = None) -> Axes:
    """How long answers are, an outline an arm; hatched: those that the cap cut off, which are at least that long.

    frame: columns arm, tokens, ended; answers without the span (no tokens) are left out.
    Source: the length histogram of Sun et al. 2025 (arXiv 2503.22048).
    """
    ax = _axes(ax)
    known = frame[frame["tokens"].notna()]
    if known.empty:
        raise ValueError("No answer in this table has a length.")
    edges = np.linspace(0, float(known["tokens"].max()) + 1, 31)
    for i, (arm, table) in enumerate(_arms(known)):
        shade, tokens = colour(arm, i), table["tokens"].astype(float)
        cut = tokens[table["ended"].astype(float) == 0]
        counts, stopped = (np.histogram(some, edges)[0] for some in (tokens, cut))
        label = f"{arm + ', ' if arm else ''}{len(tokens)} answers, {len(cut)} cut off"
        ax.step(edges, [*counts, counts[-1]], where="post", color=shade, label=label)
        ax.fill_between(edges, [*counts, counts[-1]], step="post", color=shade, alpha=0.2, linewidth=0)
        look: Any = {"facecolor": "none", "edgecolor": shade, "hatch": "////", "linewidth": 0}
        ax.fill_between(edges, [*stopped, stopped[-1]], step="post", **look)
    ax.set(xlabel="tokens", ylabel="answers")
    ax.legend()
    return ax


def accuracy_under_length(frame: Any, ax: Axes | None = None) -> Axes:
    """The share of right answers among those of fewer than x tokens, at 30 lengths, with intervals (see `share`); missing answers are not right.

    frame: columns arm, tokens, right, and question where one was answered several times: its answers stay together. An answer that was cut off is at
    least as long as it was seen.
    Source: the cumulative accuracy of Sun et al. 2025 (arXiv 2503.22048). Differs: nothing is drawn where no answer is that short.
    """
    from analyses.statistics import share

    ax = _axes(ax)
    known = frame[frame["tokens"].notna()]
    if known.empty:
        raise ValueError("No answer in this table has a length.")
    limits = np.linspace(float(known["tokens"].min()) + 1, float(known["tokens"].max()) + 1, 30)
    for i, (arm, table) in enumerate(_arms(known)):
        below = [table[table["tokens"].astype(float) < limit] for limit in limits]
        points = [
            (limit, share(t["right"].eq(True).to_numpy(), t.get("question", t.index).to_numpy()))
            for limit, t in zip(limits, below, strict=True)
            if len(t)
        ]
        x = [limit for limit, _ in points]
        ax.plot(x, [e.value for _, e in points], color=colour(arm, i), label=arm or None)
        ax.fill_between(
            x, [e.low for _, e in points], [e.high for _, e in points], color=colour(arm, i), alpha=0.15, linewidth=0
        )
    ax.set(xlabel="answers of fewer tokens than", ylabel="share right", ylim=(-0.03, 1.03))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


_PANEL_AXES = {
    "strengths": "strength of the edit (0 is the model as it was, 1 removes the direction)",
    "shares": "share of heads edited",
    "steering": "multiple of the length direction added at every layer",
    "layers": "layer at which the direction is added",
}


def edit_sweep(frame: Any, ax: Axes | None = None, *, panel: str = "strengths", measure: str = "length") -> Axes:
    """A measure along one panel of a judged edit: a line an arm with intervals; random heads and random directions as bands, from the
    smallest to the largest of their draws, each of which is a dash.

    frame: columns panel, x, arm, draw, measure, value, low, high. In the panel ``layers`` the untouched model is the dotted line.
    """
    ax = _axes(ax)
    table = frame[(frame["panel"] == panel) & (frame["measure"] == measure)]
    if table.empty:
        there = sorted({f"{p}: {m}" for p, m in zip(frame["panel"], frame["measure"], strict=True)})
        raise ValueError(
            f"There is no measure {measure!r} in a panel {panel!r} of this table; it has {', '.join(there)}."
        )
    if panel == "layers":
        ax.axhline(
            float(table[table["arm"] == "+0"]["value"].iloc[0]),
            color="black",
            linestyle=":",
            linewidth=0.9,
            label="untouched",
        )
        table = table[table["arm"] != "+0"]
        _whole_numbers(ax.xaxis)
    for i, (arm, lines) in enumerate(_arms(table)):
        shade = colour(arm, i)
        if lines["draw"].notna().any():
            of = lines.groupby("x")["value"]
            ax.fill_between(
                of.min().index,
                of.min(),
                of.max(),
                color=shade,
                alpha=0.18,
                linewidth=0,
                label=f"{arm} (range of {lines['draw'].nunique()})",
            )
            ax.scatter(lines["x"], lines["value"], color=shade, marker="_", s=40, linewidth=1)
            continue
        line = lines.sort_values("x")
        ax.plot(line["x"], line["value"], color=shade, marker="o", markersize=3, label=arm)
        ax.fill_between(
            line["x"], line["low"].astype(float), line["high"].astype(float), color=shade, alpha=0.15, linewidth=0
        )
    ax.set(xlabel=_PANEL_AXES.get(panel, panel), ylabel=SWEEP_LABELS.get(measure, measure))
    ax.legend()
    return ax


HEAD_LABELS = {
    "score": "contribution along the direction",
    "projection": "component along the direction that is lost",
    "kl": "KL of the next token (nats)",
    "nll": "rise of the next token's loss (nats)",
    "mass": "attention on the marked tokens",
    "excess": "attention above an even share",
    "per_token": "attention above other prompt tokens'",
}


def heads(
    frame: Any, ax: Axes | None = None, *, measure: str | None = None, chosen: Iterable[Any] | None = None
) -> Axes:
    """A number for every attention head as a map, layer against head, in colours symmetric about 0; heads without one are white.

    frame:  columns layer, head and score (of contributions), or measure and value (of ablations and of attention). What is no head is not
            drawn. One arm at a time.
    chosen: heads to outline, as sites or their names; by default those that a column ``edited`` marks. A table that has it is of what
            heads write along the brief side of a length direction, as `surgery heads` ranks them.
    Source: the head heat map of ThinkEdit, arXiv 2503.22048.
    """
    from matplotlib.patches import Rectangle

    from surgery.sites import Site

    ax = _axes(ax)
    table, name = frame[frame["head"].notna()], measure
    if "arm" in table and table["arm"].nunique() > 1:
        raise ValueError(
            f"A map shows one arm; here are {', '.join(map(str, table['arm'].unique()))}. Take the rows of one."
        )
    if "measure" in table:
        known = list(dict.fromkeys(table["measure"]))
        name = known[0] if measure is None and known else measure
        table, column = table[table["measure"] == name], "value"
    else:
        known, column = [str(c) for c in table.columns], measure or "score"
        name = column
    if table.empty or column not in table:
        raise ValueError(
            f"There is no measure {name!r} of heads in this table; it has {', '.join(known) or 'no heads'}."
        )
    layers, places = (table[c].to_numpy(int) for c in ("layer", "head"))
    grid = np.full((layers.max() + 1, places.max() + 1), np.nan)
    grid[layers, places] = table[column].to_numpy(float)
    most = float(np.nanmax(np.abs(grid))) or 1.0
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", origin="lower", interpolation="none")
    ranked = "edited" in table
    edited = list(table.loc[table["edited"].astype(bool), "site"]) if ranked else []
    for site in map(Site.parse, edited if chosen is None else chosen):
        corner = (float(site.head or 0) - 0.5, float(site.layer or 0) - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1))
    label = HEAD_LABELS.get(str(name), str(name))
    if ranked and name == "score":
        label = "contribution along the brief direction"
    ax.figure.colorbar(image, ax=ax, label=label)
    ax.grid(visible=False)
    _whole_numbers(ax.xaxis, ax.yaxis)
    ax.set(xlabel="head", ylabel="layer")
    return ax


def lens(frame: Any, ax: Axes | None = None) -> Axes:
    """What each stream says comes next, token by token: its likeliest token, coloured by that token's probability.

    frame: one transcript's columns position, token, site, word and probability; the last stream, the model's own word, is on top. From forty
    tokens on the words are left out.
    """
    ax = _axes(ax)
    sites, places = list(dict.fromkeys(frame["site"])), list(dict.fromkeys(frame["position"]))
    grid = frame.pivot(index="site", columns="position", values="probability").loc[sites, places].to_numpy(float)
    image = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="none")
    if len(places) < 40:
        for row in frame.to_dict("records"):
            shade = "white" if row["probability"] > 0.6 else "black"
            spot = (places.index(row["position"]), sites.index(row["site"]))
            ax.text(*spot, _visible(row["word"]), color=shade, fontsize=6, ha="center", va="center", clip_on=True)
    tokens = frame.drop_duplicates("position")["token"]
    step = max(1, len(places) // 40)
    labels = [_visible(t) for t in tokens][::step]
    ax.set_xticks(range(0, len(places), step), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    ax.set_yticks(range(len(sites)), sites)
    ax.figure.colorbar(image, ax=ax, label="probability of the likeliest token")
    ax.grid(visible=False)
    ax.set(xlabel="token read", ylabel="stream")
    return ax


# What a probe's table has to draw: the ends of its interval, the controls of which the best is drawn dotted, and its name.
PROBE_MEASURES = {
    "value": (("low", "high"), ("shuffled", "untrained", "embedding", "length"), ""),
    "same_length": (("same_length_low", "same_length_high"), ("shuffled",), " among spans of about equal length"),
    "accuracy": ((), ("majority",), "held-out accuracy"),
}


def probes(frame: Any, ax: Axes | None = None, *, measure: str = "value") -> Axes:
    """What probes read at each layer, a line a span (and arm) with intervals; dotted: the best of their controls there.

    frame:   columns layer, span, measure, value, low, high and the controls shuffled, untrained, embedding and length (NaN where there was
             none), and perhaps arm, or site: then each place in a layer is an arm. A layer says something where its line is above its
             dotted one.
    measure: ``value``, or ``same_length``, over shuffled labels, or ``accuracy``, over the commoner class.
    """
    ax = _axes(ax)
    if measure not in PROBE_MEASURES:
        raise ValueError(f"There is no measure {measure!r} of probes; there are {', '.join(PROBE_MEASURES)}.")
    ends, controls, said = PROBE_MEASURES[measure]
    frame, stream = _by_place(frame)
    spans = list(dict.fromkeys(frame["span"]))
    for i, (arm, lines) in enumerate(_arms(frame)):
        for span, line in lines.groupby("span", sort=False):
            line = line.sort_values("layer")
            shade = colour(arm, i) if arm else colour(str(span), spans.index(span))
            style = ["-", "--", "-."][spans.index(span) % 3]
            ax.plot(
                line["layer"], line[measure], color=shade, linestyle=style, label=f"{arm + ', ' if arm else ''}{span}"
            )
            if ends:
                low, high = (line[end].astype(float) for end in ends)
                ax.fill_between(line["layer"], low, high, color=shade, alpha=0.15, linewidth=0)
            floor = line[list(controls)].astype(float).max(axis=1)
            ax.plot(line["layer"], floor, color=shade, linestyle=":", linewidth=0.9)
    name, chance = {"auc": ("held-out AUC", 0.5), "r2": ("held-out R²", 0.0)}[str(frame["measure"].iloc[0])]
    if ends:
        ax.axhline(chance, color="black", linewidth=0.5)
    where = "layer (residual stream entering it)" if stream else "layer"
    _whole_numbers(ax.xaxis)
    ax.set(xlabel=where, ylabel=f"{name}{said}" if ends else said, ylim=(None, 1.02))
    ax.legend()
    return ax


def reliability(curve: Any, ax: Axes | None = None) -> Axes:
    """What was said against what was, a line a scaling (and arm) with intervals over questions; on the dotted line they are the same.

    curve: columns scaling, said, was, low, high and rows, as `Calibration.curve` gives them, and perhaps arm. Points are of equally many rows.
    Source: the reliability diagram of Murphy and Winkler (1977).
    """
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=0.9)
    scalings = list(dict.fromkeys(curve["scaling"]))
    for i, (arm, lines) in enumerate(_arms(curve)):
        for scaling, line in lines.groupby("scaling", sort=False):
            place = scalings.index(scaling)
            name = {"none": "as it is", "temperature": "by a temperature", "platt": "by Platt's line"}.get(
                scaling, scaling
            )
            ends = (line["low"].astype(float), line["high"].astype(float))
            off = [np.clip(line["was"] - ends[0], 0, None), np.clip(ends[1] - line["was"], 0, None)]
            ax.errorbar(
                line["said"],
                line["was"],
                yerr=off,
                color=colour(arm, i) if arm else colour("", place),
                linestyle=["-", "--", "-."][place % 3],
                marker="o",
                markersize=3,
                elinewidth=0.7,
                label=f"{arm + ', ' if arm else ''}{name}",
            )
    ax.set(xlabel="probability that the probe says", ylabel="share that is so", xlim=(0, 1), ylim=(-0.03, 1.03))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def probe_transfer(frame: Any, ax: Axes | None = None) -> Axes:
    """AUCs of probes trained in one set (down) and judged in another (across), with their intervals, in colours symmetric about chance.

    frame: columns trained, tested, value, low, high, as `TransferTable.frame` gives them. The diagonal, framed, is held out too.
    """
    ax = _axes(ax)
    sides = [[str(name) for name in dict.fromkeys(frame[side])] for side in ("trained", "tested")]
    values = np.full((len(sides[0]), len(sides[1])), np.nan)
    for row in frame.to_dict("records"):
        i, j = sides[0].index(str(row["trained"])), sides[1].index(str(row["tested"]))
        values[i, j] = row["value"]
        strong = "white" if abs(row["value"] - 0.5) > 0.33 else "black"
        said = f"{row['value']:.2f}\n[{row['low']:.2f}, {row['high']:.2f}]"
        ax.text(j, i, said, ha="center", va="center", color=strong, fontsize=7)
        if str(row["trained"]) == str(row["tested"]):
            ax.add_patch(_frame_of(i, j))
    image = ax.imshow(values, cmap="RdBu_r", vmin=0, vmax=1, interpolation="none", aspect="auto")
    ax.set_xticks(range(len(sides[1])), sides[1])
    ax.set_yticks(range(len(sides[0])), sides[0])
    ax.figure.colorbar(image, ax=ax, label="held-out AUC")
    ax.grid(visible=False)
    ax.set(xlabel="judged in", ylabel="trained in")
    return ax


def _frame_of(row: int, column: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=1)


def probe_along(frame: Any, ax: Axes | None = None) -> Axes:
    """What is known after each fraction: a probe of each place's own, and one shared by all, with intervals; dotted: the best of the own's controls.

    frame: columns trained, tested, value, low, high and the controls, as `probes.transfer.along` gives them, and perhaps arm.
    """
    ax = _axes(ax)
    controls = ["shuffled", "untrained", "embedding", "length"]
    for i, (arm, table) in enumerate(_arms(frame)):
        shared = table["trained"].astype(str) == "all"
        own = table["trained"].where(~shared).astype(float) == table["tested"].astype(
            float
        )  # as read from a table: "1" and 1.0
        kinds = (("a probe for each place", own, "-"), ("one probe for all", shared, "--"))
        for place, (name, mine, style) in enumerate(kinds):
            line = table[mine].assign(tested=lambda t: t["tested"].astype(float)).sort_values("tested")
            shade = colour(arm, i) if arm else colour("", place)
            label = f"{arm + ', ' if arm else ''}{name} (n={line['n'].max()})"
            ax.plot(line["tested"], line["value"], color=shade, linestyle=style, marker="o", markersize=3, label=label)
            low, high = (line[end].astype(float) for end in ("low", "high"))
            ax.fill_between(line["tested"], low, high, color=shade, alpha=0.15, linewidth=0)
            if name == kinds[0][0]:
                best = line[controls].astype(float).max(axis=1)
                label = f"{arm + ', ' if arm else ''}the best control of the former"
                ax.plot(line["tested"], best, color=shade, linestyle=":", linewidth=0.9, label=label)
    ax.axhline(0.5, color="black", linewidth=0.5)
    ax.set(xlabel="share of the span that is written", ylabel="held-out AUC", xlim=(-0.02, 1.02), ylim=(None, 1.02))
    ax.legend()
    return ax


def _by_place(frame: Any) -> tuple[Any, bool]:
    """The places in a layer as arms, where there are several, and whether there is but the stream that enters it. The embedding, which is
    in the table as a control, is no place by itself."""
    if "site" not in frame or "arm" in frame:
        return frame, True
    place = frame["site"].str.replace(r"^\d+\.", "", regex=True)
    asked = set(place[frame["site"] != "0.resid"]) or {"resid"}
    frame = frame[place.isin(asked)]
    return (frame if len(asked) == 1 else frame.assign(arm=place[place.isin(asked)])), asked == {"resid"}


def cosines(table: Any, ax: Axes | None = None) -> Axes:
    """Cosines between directions, or between one direction's sites, as a map from -1 to 1, in colours symmetric about 0.

    table: rows and columns named, as `Direction.cosines` gives it; NaN, between widths, is white.
    """
    ax = _axes(ax)
    rows, columns = ([str(name) for name in axis] for axis in (table.index, table.columns))
    image = ax.imshow(table.to_numpy(float), cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", interpolation="none")
    for names, place in ((columns, ax.xaxis), (rows, ax.yaxis)):
        step = -(-len(names) // 12)  # about a dozen names fit
        place.set_ticks(range(0, len(names), step), names[::step])
    ax.tick_params(axis="x", rotation=90)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    ax.grid(visible=False)
    return ax


FIGURES: dict[str, Callable[..., Axes]] = {
    "early-answers": early_answers,
    "drift": drift,
    "geometry": geometry,
    "sweep": sweep,
    "frontier": frontier,
    "training": training,
    "before-after": before_after,
    "similarity": similarity,
    "trade-off": trade_off,
    "paired": paired,
    "probes": probes,
    "reliability": reliability,
    "probe-transfer": probe_transfer,
    "probe-along": probe_along,
    "lengths": lengths,
    "accuracy-under-length": accuracy_under_length,
    "edit": edit_sweep,
    "edit-shares": partial(edit_sweep, panel="shares"),
    "edit-steering": partial(edit_sweep, panel="steering"),
    "edit-layers": partial(edit_sweep, panel="layers"),
    "heads": heads,
    "lens": lens,
}


def draw(function: Callable[..., Axes], *args: Any, width: float = 5.5, ratio: float = 0.62, **options: Any) -> Figure:
    """A finished figure in the house style, drawn off screen."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plt.rc_context(paper(width, ratio)):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        function(*args, ax=figure.subplots(), **options)
        figure.draw_without_rendering()
    return figure


def panels(function: Callable[..., Axes], frame: DataFrame, *, width: float = 9.0) -> Figure:
    """Every measure of a table side by side, drawn by a function that takes ``measure=`` (`sweep`, `paired`)."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = list(dict.fromkeys(frame["measure"]))
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    with plt.rc_context(paper(width, 0.3 * rows)):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        for measure, ax in zip(measures, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
            function(frame, ax, measure=measure)
            if measure != measures[0] and ax.get_legend():
                ax.get_legend().remove()
        for ax in figure.axes[len(measures) :]:
            ax.remove()
        figure.draw_without_rendering()
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Save a figure, whole or not at all; the ending (.png, .pdf, .svg) decides the format. The file holds no date: it is reproducible."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part{path.suffix}")
    metadata = (
        {"Software": None}
        if path.suffix == ".png"
        else {"CreationDate": None}
        if path.suffix == ".pdf"
        else {"Date": None}
    )
    figure.savefig(part, metadata=metadata)
    return part.replace(path)


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.gca()


def _whole_numbers(*axes: Any) -> None:
    """Ticks of layers and heads: there is no half of one."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def _measured(frame: Any, measure: str) -> Any:
    """The rows of one measure. Raises ValueError where there are none."""
    table = frame[frame["measure"] == measure]
    if table.empty:
        raise ValueError(
            f"There is no measure {measure!r} in this table; it has {', '.join(sorted(frame['measure'].unique())) or 'none'}."
        )
    return table


def _visible(token: Any) -> str:
    """A token as a label: what is blank shows, and a dollar sign begins no formula."""
    return str(token).replace("\n", "⏎").replace(" ", "·").replace("$", r"\$")


def _arms(frame: Any) -> Iterator[tuple[str, Any]]:
    if "arm" not in frame:
        yield "", frame
        return
    for arm in dict.fromkeys(frame["arm"]):
        yield str(arm), frame[frame["arm"] == arm]
