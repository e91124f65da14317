"""How figures look. A style is a dict for ``plt.rc_context``; nothing global is ever set."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, told apart by readers with any colour vision.
COLOURS = {
    "base": "#666666",
    "lift": "#0072B2",
    "full": "#D55E00",
    "lora": "#009E73",
    "shira": "#F0E442",
    "smallest": "#CC79A7",
    "random": "#E69F00",
    "magnitude": "#56B4E9",
}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666"]


def paper(width: float = 5.5, ratio: float = 0.62) -> Any:
    """Settings for a figure `width` inches wide (5.5 is the text width of the NeurIPS style) and `ratio` as high."""
    return {
        "figure.figsize": (width, width * ratio),
        "figure.dpi": 150,
        "svg.hashsalt": "model surgery",  # the same figure has the same bytes
        "savefig.dpi": 150,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.5,
    }


def colour(name: str, position: int = 0) -> str:
    """The colour of an arm wherever it is drawn; others take the cycle."""
    return COLOURS.get(name, CYCLE[position % len(CYCLE)])
