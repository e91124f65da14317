"""The command that asks whether a vision-language model learns to reason better by DRIFT than by training or merging alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from analyses.cli.given import words_in
from analyses.cli.options import LOOK, DryRun, Quiet, To, app, begin_record


@app.command(rich_help_panel=LOOK)
def seeing(
    to: To,
    seeds: Annotated[int, typer.Option(help="Worlds of models, each made anew.", min=1)] = 3,
    arms: Annotated[
        str, typer.Option(help="With commas, of merge, sft, drift, random, permuted, flipped, merge-sft, sft-merge.")
    ] = "merge,sft,drift,random,merge-sft,sft-merge",
    alpha: Annotated[float, typer.Option(help="DRIFT's strength.")] = 1.0,
    rule: Annotated[str, typer.Option(help="DRIFT's rule: absolute, norm, adaptive, project or aligned.")] = "adaptive",
    items: Annotated[int, typer.Option(help="Held-out pictured sums.", min=1)] = 256,
    share: Annotated[
        float, typer.Option(help="Share of every training's steps; 0.01 shows no more than that it runs.", min=0, max=1)
    ] = 1.0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Vision and reasoning in small: pictured sums by training, DRIFT and merges, with paired intervals. Interrupted, it resumes."""
    record = begin_record("seeing", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    from analyses import figures
    from analyses.seeing import Course
    from analyses.seeing import seeing as study
    from analyses.seeing.study import check_settings
    from analyses.shelf import require_unfinished

    require_unfinished(to, "study")
    course, chosen = Course().shortened(share), words_in(arms)
    check_settings(range(seeds), chosen, alpha, rule, items)
    if dry_run:
        typer.echo(
            f"{seeds} seeds: four models each, then {', '.join(chosen)}, {course.steps} steps of {course.batch_size} on {course.examples} "
            f"pictured sums; {items} held out; would go to {to}"
        )
        return
    given: Any = {"arms": chosen, "alpha": alpha, "rule": rule}
    found = study(tuple(range(seeds)), course=course, items=items, to=to, progress=not quiet, **given)
    found.save(to / "seeing.json")
    table: Any = found.frame()
    table.to_csv(to / "seeing.csv", index=False)
    for measure in ("right", "nll"):
        figures.save(figures.draw(found.plot, measure=measure), to / f"{measure}.png")
    if "drift" in chosen and len(chosen) > 1:
        found.differences("drift").to_csv(to / "differences.csv", index=False)
    record.results = {"donors": dict(found.donors), "coefficients": dict(found.coefficients)}
    record.save(to, reproducible=["seeing.csv"])
    wide = table.pivot(index="arm", columns="measure", values="value").loc[list(found.coefficients)]
    typer.echo(wide.to_string(float_format="%.3f"))
