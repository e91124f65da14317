"""How every command that makes a model writes it: proved, with its record and its card, there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from surgery.record import Record
    from surgery.weights import Weights
    from surgery.writing import Written

Stochastic = Annotated[
    bool, typer.Option("--stochastic", help="Round at random (by --seed), so that small changes survive on average.")
]
AllowLoops = Annotated[
    bool, typer.Option("--allow-loops", help="Write a model even if a short generation falls into a loop.")
]


def write_model(
    record: Record,
    point: Weights,
    to: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    stochastic: bool = False,
    seed: int = 0,
    allow_loops: bool = False,
    quiet: bool = False,
    also: Callable[[Path], object] | None = None,
    reproducible: Sequence[str] = ("*.safetensors",),
) -> Written:
    """Write a point, and seal it with a card and the record.

    model: the name by which the command got the model that the point starts from. also: puts more files into the folder before it is sealed.
    reproducible: what a replay will compare.
    """
    from surgery.card import CARD, model_card
    from surgery.rounding import as_dtype
    from surgery.writing import write

    def seal(folder: Path, written: Written) -> None:
        if model is not None:
            record.inputs = {"model": {"ref": model, "hash": written.base_hash}, **record.inputs}
        record.checks, record.results = written.checks, {**record.results, **written.as_dict()}
        if also is not None:
            also(folder)
        source = point.layout.folder if point.layout else folder
        (folder / CARD).write_text(model_card(record, written, source), encoding="utf-8")
        record.save(folder, reproducible=reproducible)

    return write(
        point,
        to,
        dtype=as_dtype(dtype),
        rounding="stochastic" if stochastic else "nearest",
        seed=seed,
        loops="report" if allow_loops else "refuse",
        seal=seal,
        progress=not quiet,
    )
