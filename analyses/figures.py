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


def early_answers(curve: DataFrame, ax: Axes | None = None) -> Axes:
    """Share of answers already given after a part of the thinking, ``f(i/T)``, with intervals; one line for each length T (and arm).

    curve: columns T, fraction, same, low, high, n and perhaps arm. A line that is high at 0 needs no thinking.
    Source: the first figure of Lanham et al. 2023 (arXiv 2307.13702).
    """
    ax = _axes(ax)
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
        xlabel="share of the thinking given", ylabel="same answer as with all of it", xlim=(0, 1), ylim=(-0.03, 1.03)
    )
    ax.legend()
    return ax


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
    table: Any = frame[frame["measure"] == measure]
    if table.empty:
        raise ValueError(
            f"There is no measure {measure!r} in this table; it has {', '.join(sorted(frame['measure'].unique()))}."
        )
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
    ax.set(xlabel="layer", ylabel=measure.replace("_", " "))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


SWEEP_LABELS = {
    "accuracy": "held-out accuracy",
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
    table: Any = frame[frame["measure"] == measure]
    if table.empty:
        raise ValueError(
            f"There is no measure {measure!r} in this table; it has {', '.join(sorted(frame['measure'].unique()))}."
        )
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


def training(frame: DataFrame, ax: Axes | None = None, *, measure: str = "loss") -> Axes:
    """A training curve. frame: columns step, measure, value and perhaps arm."""
    ax = _axes(ax)
    table: Any = frame[frame["measure"] == measure]
    if table.empty:
        raise ValueError(
            f"There is no measure {measure!r} in this table; it has {', '.join(sorted(frame['measure'].unique()))}."
        )
    for i, (arm, line) in enumerate(_arms(table)):
        ax.plot(
            line["step"],
            line["value"],
            color=colour(arm, i),
            label=arm or None,
            marker="o" if len(line) < 20 else None,
            markersize=3,
        )
    ax.set(xlabel="optimizer step", ylabel=measure)
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
    ax.set(xticks=range(len(frame)), xticklabels=list(frame["arm"]), ylabel="held-out accuracy", ylim=(0, 1))
    ax.grid(axis="x", visible=False)
    return ax


def trade_off(frame: Any, ax: Axes | None = None, *, x: str = "answer_nll", y: str = "text_nll") -> Axes:
    """One measure of tuned arms against another: a dot an arm with both intervals, a small ring a seed; the cross is the untuned model.

    frame: columns arm, measure, value, low, high and perhaps by_seed, a sequence of the seeds' means.
    """
    ax = _axes(ax)
    table = frame.set_index(["arm", "measure"])
    for i, arm in enumerate(name for name in dict.fromkeys(frame["arm"]) if name != "untuned"):
        shade, (across, up) = colour(arm, i), (table.loc[(arm, measure)] for measure in (x, y))
        reach = [[[row["value"] - row["low"]], [row["high"] - row["value"]]] for row in (across, up)]
        look = {"fmt": "o", "color": shade, "capsize": 2, "markersize": 5, "linewidth": 1}
        ax.errorbar(across["value"], up["value"], xerr=reach[0], yerr=reach[1], label=arm, **look)
        if "by_seed" in table:
            ax.plot(across["by_seed"], up["by_seed"], "o", markerfacecolor="none", color=shade, markersize=3, alpha=0.7)
    ax.plot(
        *([table.loc[("untuned", measure)]["value"]] for measure in (x, y)),
        "+",
        color="black",
        markersize=9,
        label="untuned",
    )
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


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
    """The share of right answers among those of fewer than x tokens, at 30 lengths, with Wilson intervals; missing answers are not right.

    frame: columns arm, tokens, right. An answer that was cut off is at least as long as it was seen.
    Source: the cumulative accuracy of Sun et al. 2025 (arXiv 2503.22048). Differs: nothing is drawn where no answer is that short.
    """
    from analyses.statistics import wilson

    ax = _axes(ax)
    known = frame[frame["tokens"].notna()]
    if known.empty:
        raise ValueError("No answer in this table has a length.")
    limits = np.linspace(float(known["tokens"].min()) + 1, float(known["tokens"].max()) + 1, 30)
    for i, (arm, table) in enumerate(_arms(known)):
        below = [table[table["tokens"].astype(float) < limit] for limit in limits]
        points = [
            (limit, wilson(int(t["right"].eq(True).sum()), len(t)))
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
    smallest to the largest of their draws.

    frame: columns panel, x, arm, draw, measure, value, low, high. In the panel ``layers`` the untouched model is the dotted line.
    """
    from matplotlib.ticker import MaxNLocator

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
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def heads(frame: Any, ax: Axes | None = None, *, measure: str | None = None, chosen: Iterable[Any] = ()) -> Axes:
    """A number for every attention head as a map, layer against head, in colours symmetric about 0; heads without one are white.

    frame:  columns layer, head and score (of contributions), or measure and value (of ablations and of attention). What is no head is not
            drawn. One arm at a time.
    chosen: heads to outline, as sites or their names: those an edit took, for example.
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
    for site in map(Site.parse, chosen):
        corner = (float(site.head or 0) - 0.5, float(site.layer or 0) - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1))
    ax.figure.colorbar(image, ax=ax, label=HEAD_LABELS.get(str(name), str(name)))
    ax.grid(visible=False)
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
             none), and perhaps arm. A layer says something where its line is above its dotted one.
    measure: ``value``, or ``same_length``, over shuffled labels, or ``accuracy``, over the commoner class.
    """
    ax = _axes(ax)
    if measure not in PROBE_MEASURES:
        raise ValueError(f"There is no measure {measure!r} of probes; there are {', '.join(PROBE_MEASURES)}.")
    ends, controls, said = PROBE_MEASURES[measure]
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
    ax.set(xlabel="layer (residual stream entering it)", ylabel=f"{name}{said}" if ends else said, ylim=(None, 1.02))
    ax.legend()
    return ax


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
    "training": training,
    "before-after": before_after,
    "similarity": similarity,
    "trade-off": trade_off,
    "probes": probes,
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
        figure.canvas.draw()
    return figure


def sweeps(frame: DataFrame, *, width: float = 9.0) -> Figure:
    """Every measure of a strength sweep side by side, see `sweep`."""
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
            sweep(frame, ax, measure=measure)
            if measure != measures[0] and ax.get_legend():
                ax.get_legend().remove()
        for ax in figure.axes[len(measures) :]:
            ax.remove()
        figure.canvas.draw()
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


def _visible(token: Any) -> str:
    """A token as a label: what is blank shows, and a dollar sign begins no formula."""
    return str(token).replace("\n", "⏎").replace(" ", "·").replace("$", r"\$")


def _arms(frame: Any) -> Iterator[tuple[str, Any]]:
    if "arm" not in frame:
        yield "", frame
        return
    for arm in dict.fromkeys(frame["arm"]):
        yield str(arm), frame[frame["arm"] == arm]
