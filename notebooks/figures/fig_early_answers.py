"""The early-answers figure of a saved measure or study: record -> table -> figure.

    python notebooks/figures/fig_early_answers.py FOLDER FIGURE.pdf

FOLDER is the output of `surgery measure early-answers` or `surgery study`; its record is checked before anything is drawn.
"""

import sys
from pathlib import Path

import pandas as pd

from analyses import figures
from surgery.record import Record, verify


def main(folder: Path, image: Path) -> Path:
    record = Record.load(folder)
    if problems := verify(folder):
        raise SystemExit(f"{folder} is not as recorded: {problems[0]}")
    table = next(path for path in (folder / "curve.csv", folder / "tables" / "early-answers.csv") if path.is_file())
    curve = pd.read_csv(table)
    if "traces" in curve:  # a study has both: the gold traces are the same for every arm
        curve = curve[curve["traces"] == "gold"]
    figure = figures.draw(figures.early_answers, curve)
    figure.axes[0].set_title(f"{record.command}, seed {record.seeds['seed']}")
    return figures.save(figure, image)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
