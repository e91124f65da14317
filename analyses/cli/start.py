"""Commands to start with."""

from __future__ import annotations

from typing import Annotated

import typer

from analyses.cli.given import require_model
from analyses.cli.options import START, Device, DryRun, Quiet, Seed, To, app
from analyses.plan import Plan


@app.command(rich_help_panel=START)
def specimen() -> None:
    """The default model, once, into the cache; says where it is."""
    from surgery.specimen import specimen

    typer.echo(specimen())


@app.command(rich_help_panel=START)
def study(
    to: To,
    model: Annotated[str, typer.Option(help="'specimen', a folder, or a hub id.")] = "specimen",
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each arm.", min=1)] = Plan.steps,
    batch_size: Annotated[int, typer.Option(help="Transcripts a step.", min=2)] = Plan.batch_size,
    watch_every: Annotated[
        int, typer.Option(help="Steps between measurements while training.", min=1)
    ] = Plan.watch_every,
    watch_items: Annotated[int, typer.Option(help="Questions of those measurements.", min=1)] = Plan.watch_items,
    held_out: Annotated[int, typer.Option(help="Held-out questions before and after.", min=2)] = Plan.held_out,
    sweep_items: Annotated[int, typer.Option(help="Questions at each strength.", min=1)] = Plan.sweep_items,
    sweep_texts: Annotated[
        int, typer.Option(help="General passages at each strength.", min=1, max=40)
    ] = Plan.sweep_texts,
    faith_items: Annotated[int, typer.Option(help="Questions whose thinking is cut.", min=2)] = Plan.faith_items,
    drift_items: Annotated[
        int, typer.Option(help="Questions whose activations are compared.", min=6)
    ] = Plan.drift_items,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)] = Plan.max_new_tokens,
    device: Device = "auto",
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """The main job: tune two ways, take the task vectors, measure, and write one page. Interrupted, it resumes."""
    arguments = {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")}
    plan = Plan(**arguments)
    from analyses.shelf import require_unfinished

    require_unfinished(to, "study")
    if dry_run:
        require_model(model, device)
        typer.echo(plan.in_words())
        return
    from analyses.study import study

    typer.echo(study(plan, to, progress=not quiet))
