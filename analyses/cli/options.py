"""What commands share: the app, the options that mean the same everywhere, the start of a record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from surgery.record import Record

app = typer.Typer(
    help="Change a language model's reasoning, and know what you changed.\n\nMODEL is 'specimen' (the default model), a folder, or a hub id. Output goes "
    "to a new folder, whole or not at all, with a record of how it was made. Exit codes: 0 done, 1 a check failed, 2 bad usage or input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

To = Annotated[Path, typer.Option("--to", help="New folder for the output.", show_default=False)]
ModelRef = Annotated[str, typer.Argument(metavar="MODEL", help="'specimen', a folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Dtype = Annotated[
    str | None, typer.Option(help="Store as float32, bfloat16 or float16; by default as found.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Every random choice follows from it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Questions = Annotated[
    str,
    typer.Option(
        help="'sums', 'gym:NAME' (a reasoning-gym task), or a file of JSON lines with question, answer and perhaps solution."
    ),
]

START, CHANGE, LOOK, RECEIPTS = "Start here", "Change a model", "Look and judge", "Receipts"


def begin_record(command: str, arguments: dict[str, Any]) -> Record:
    """What is about to run; `arguments` are those of the command's function, so that it can be called again."""
    from surgery.record import Record, typed

    seeds = {"seed": arguments["seed"]} if "seed" in arguments else {}
    return Record(command, dict(arguments), typed(), seeds=seeds)


def require_new(to: Path) -> None:
    """Raise where nothing can be made at `to`, or another command is making it: before long work, rather than after it."""
    from surgery import whole

    whole.require_new(to)
    whole.claim(to)


def require_dtype(dtype: str | None) -> None:
    """Raise ValueError for a --dtype in which no weights are stored: before they are made, rather than after it."""
    from surgery.rounding import as_dtype

    as_dtype(dtype)
