"""Commands on what other commands left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from analyses.cli.arms import arms
from analyses.cli.change import apply, diff, edit, merge, realign
from analyses.cli.dose import sweep
from analyses.cli.look import drift, early_answers, geometry
from analyses.cli.options import RECEIPTS, Quiet, app, require_new
from analyses.cli.probing import probe, probe_along, probe_calibration, probe_transfer
from analyses.cli.seeing import seeing
from analyses.cli.start import study
from analyses.cli.think import direction, generate, heads, judge, thinkedit
from analyses.cli.tuning import tune

COMMANDS: dict[str, Callable[..., object]] = {
    "study": study,
    "tune": tune,
    "diff": diff,
    "apply": apply,
    "merge": merge,
    "edit": edit,
    "realign": realign,
    "measure early-answers": early_answers,
    "measure drift": drift,
    "measure geometry": geometry,
    "sweep": sweep,
    "generate": generate,
    "direction": direction,
    "heads": heads,
    "judge": judge,
    "probe": probe,
    "probe-calibration": probe_calibration,
    "probe-transfer": probe_transfer,
    "probe-along": probe_along,
    "thinkedit": thinkedit,
    "seeing": seeing,
    "arms": arms,
}


@app.command(rich_help_panel=RECEIPTS)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that a surgery command made.")],
) -> None:
    """Hash the outputs again; names the file or tensor that is not as recorded."""
    from surgery.record import verify

    problems = verify(folder)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder}: everything is as recorded")


@app.command(rich_help_panel=RECEIPTS)
def replay(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that a surgery command made.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="New folder; by default FOLDER-again.", show_default=False)
    ] = None,
) -> None:
    """Run the recorded command again and compare; says how today's environment differs."""
    from surgery.record import Record, compare_environment, environment, replay

    record = Record.load(folder)
    for grade, difference in compare_environment(record.environment, environment(), record.command):
        typer.echo(f"{grade}: {difference}", err=True)
    again = replay(folder, to or _beside(folder, "again"), COMMANDS)
    typer.echo(f"{len(again.equal)} output{'' if len(again.equal) == 1 else 's'} equal, {len(again.differing)} differ")
    for name in again.differing[:20]:
        typer.echo(f"  {name}")
    if not again.ok:
        raise typer.Exit(1)


@app.command(rich_help_panel=RECEIPTS)
def undo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model that a surgery command wrote.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="New folder; by default FOLDER-original.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """The original of a written model, byte for byte, from the way back kept beside it.

    The folder is as the original was: with the record that it had, where it had one, and none of the undoing.
    """
    from surgery.reverse import undo

    to = to or _beside(folder, "original")
    require_new(to)
    base_hash = undo(folder, to, progress=not quiet)
    typer.echo(f"{to}: the original's bytes ({base_hash[:16]})")


def _beside(folder: Path, what: str) -> Path:
    """A folder's neighbour, named after it."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-{what}")
