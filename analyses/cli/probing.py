"""The command that asks what can be read off a model's activations, and where."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from analyses.cli.given import RunsRef, load_runs, model_input, runs_input, spans_in
from analyses.cli.options import LOOK, Device, DryRun, ModelRef, Quiet, Seed, To, app, begin_record, require_new


@app.command(rich_help_panel=LOOK)
def probe(
    model: ModelRef,
    runs: RunsRef,
    to: To,
    of: Annotated[
        str,
        typer.Option(
            help="What is read: right (whether the answer is), length (whether --length is long), or a key of the answers' meta."
        ),
    ] = "right",
    over: Annotated[
        str,
        typer.Option(help="Over which span the activations are averaged; several with commas: prompt,thinking[:16]."),
    ] = "thinking",
    at: Annotated[
        str, typer.Option(help="Where: a pattern of activation sites such as '*.resid', '0-7.mid' or '14.attn.z'.")
    ] = "*.resid",
    length: Annotated[
        str | None,
        typer.Option(help="--of length: the span whose length counts; default thinking.", show_default=False),
    ] = None,
    components: Annotated[
        int | None,
        typer.Option(
            help="Principal components kept; by default all. Wanted where answers are few.", min=1, show_default=False
        ),
    ] = None,
    folds: Annotated[int, typer.Option(help="Parts of the questions, each held out once.", min=2)] = 5,
    shuffles: Annotated[int, typer.Option(help="Labellings at random, probed as a control.", min=0)] = 3,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """What MODEL's activations tell of its answers, at each layer and over each span: on held-out questions, beside four controls."""
    record = begin_record("probe", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    if length is not None and of != "length":
        raise ValueError(f"--length is of --of length; with --of {of} it does nothing.")
    require_new(to)
    from analyses import figures
    from analyses.labels import labels_of
    from probes.linear import probe
    from surgery.model import Model
    from surgery.whole import new_folder

    read = load_runs(runs)
    labels = labels_of(read, of, length=length or "thinking")
    spans = spans_in(over)
    typer.echo(f"{of}: {labels}")
    if dry_run:
        typer.echo(f"{len(read.questions)} questions in {folds} folds; {at} over {', '.join(spans)}; would go to {to}")
        return
    loaded = Model.load(model, device=device, dtype="float32")
    read.require(loaded)
    found = probe(
        loaded,
        read,
        labels.values,
        at=at,
        over=spans,
        kind=labels.kind,
        components=components,
        folds=folds,
        shuffles=shuffles,
        seed=seed,
        progress=not quiet,
    )
    table, summary = found.frame(), found.summary()
    record.inputs = model_input(loaded, model) | runs_input(runs)
    record.results = {"labels": str(labels), "spans": summary.to_dict("records"), "about": dict(found.about)}
    with new_folder(to) as folder:
        found.save(folder / "probes.json")
        table.to_csv(folder / "probes.csv", index=False)
        summary.to_csv(folder / "spans.csv", index=False)
        figures.save(figures.draw(figures.probes, table), folder / "probes.png")
        record.save(folder)
    for line in _in_words(summary):
        typer.echo(line)
    typer.echo(to)


def _in_words(summary: Any) -> list[str]:
    """A line a span: what was found at layers chosen by validation, and which control comes nearest."""
    from probes.linear import CONTROLS

    lines = []
    for row in summary.to_dict("records"):
        controls = {name: row[name] for name in CONTROLS if row[name] == row[name]}
        near = max(controls, key=lambda name: controls[name])
        name = {"auc": "AUC", "r2": "R²"}[row["measure"]]
        above = "above" if row["above"] else "not above"
        lines.append(
            f"{row['span']}: {name} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] over {row['n']} questions, mostly at {row['site']}; "
            f"{above} the best control ({near} {controls[near]:.3f})"
        )
    return lines
