"""One function a figure: a table in, Axes out. ``ax=None`` draws into the current figure's axes; nothing is shown or saved here.

Tables with a column ``arm`` are drawn with one line an arm; without it there is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def sweep(frame: DataFrame, ax: Axes | None = None, *, measure: str = "accuracy") -> Axes:
    """A measure against the strength of a task vector; 0 is the base and 1 the tuned model.

    frame: columns strength, measure, value, low, high and perhaps arm.
    """
    ax = _axes(ax)
    table: Any = frame[frame["measure"] == measure]
    if table.empty:
        raise ValueError(
            f"There is no measure {measure!r} in this table; it has {', '.join(sorted(frame['measure'].unique()))}."
        )
    for i, (arm, line) in enumerate(_arms(table)):
        line = line.sort_values("strength")
        ax.plot(line["strength"], line["value"], color=colour(arm, i), marker="o", markersize=3, label=arm or None)
        ax.fill_between(
            line["strength"],
            line["low"].astype(float),
            line["high"].astype(float),
            color=colour(arm, i),
            alpha=0.15,
            linewidth=0,
        )
    for strength in (0, 1):
        ax.axvline(strength, color="black", linestyle=":", linewidth=0.7)
    ax.set(
        xlabel="strength of the task vector",
        ylabel={"accuracy": "held-out accuracy", "text_nll": "general text (nats per token)"}.get(measure, measure),
    )
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


FIGURES: dict[str, Callable[..., Axes]] = {
    "early-answers": early_answers,
    "drift": drift,
    "geometry": geometry,
    "sweep": sweep,
    "training": training,
    "before-after": before_after,
    "similarity": similarity,
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


def _arms(frame: Any) -> Iterator[tuple[str, Any]]:
    if "arm" not in frame:
        yield "", frame
        return
    for arm in dict.fromkeys(frame["arm"]):
        yield str(arm), frame[frame["arm"] == arm]
