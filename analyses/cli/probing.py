"""The commands that ask what can be read off a model's activations: where, how surely, from what data, and when."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.cli.given import RunsRef, load_runs, model_input, require_model, runs_input, spans_in, words_in
from analyses.cli.options import LOOK, Device, DryRun, ModelRef, Quiet, Seed, To, app, begin_record, require_new

if TYPE_CHECKING:
    from analyses.labels import Labels
    from probes.calibration import CalibrationRow
    from surgery.runs import Runs

Of = Annotated[
    str,
    typer.Option(
        help="What is read: right (whether the answer is), length (whether --length is long), or a key of the answers' meta."
    ),
]
At = Annotated[
    str, typer.Option(help="Where: a pattern of activation sites such as '*.resid', '0-7.mid' or '14.attn.z'.")
]
Chosen = Annotated[
    str,
    typer.Option(
        help="Where: a pattern of activation sites such as '14.resid'; of several one is chosen inside the training folds."
    ),
]
Over = Annotated[str, typer.Option(help="Over which span the activations are averaged.")]
OfLength = Annotated[
    str | None,
    typer.Option("--length", help="--of length: the span whose length counts; default thinking.", show_default=False),
]
Components = Annotated[
    int | None,
    typer.Option(
        help="Principal components kept; by default all. Wanted where answers are few.", min=1, show_default=False
    ),
]
Folds = Annotated[int, typer.Option(help="Parts of the questions, each held out once.", min=2)]
Shuffles = Annotated[int, typer.Option(help="Labellings at random, probed as a control.", min=0)]


@app.command(rich_help_panel=LOOK)
def probe(
    model: ModelRef,
    runs: RunsRef,
    to: To,
    of: Of = "right",
    over: Annotated[
        str,
        typer.Option(help="Over which span the activations are averaged; several with commas: prompt,thinking[:16]."),
    ] = "thinking",
    at: At = "*.resid",
    length: OfLength = None,
    components: Components = None,
    folds: Folds = 5,
    shuffles: Shuffles = 3,
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
    from probes.linear import probe, require_folds
    from surgery.model import Model
    from surgery.transcript import parse_span
    from surgery.whole import new_folder

    read = load_runs(runs)
    labels = labels_of(read, of, length=length or "thinking")
    spans = spans_in(over)
    for span in spans:
        parse_span(span)
    typer.echo(f"{of}: {labels}")
    require_folds(read, labels.values, over=spans, kind=labels.kind, folds=folds)
    if dry_run:
        _look(model, device, at)
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


@app.command(rich_help_panel=LOOK)
def probe_calibration(
    model: ModelRef,
    runs: RunsRef,
    to: To,
    of: Of = "right",
    over: Over = "thinking",
    at: Chosen = "*.resid",
    length: OfLength = None,
    bins: Annotated[int, typer.Option(help="Of the reliability diagram and of the calibration error.", min=2)] = 10,
    components: Components = None,
    folds: Folds = 5,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Whether a probe's probabilities are what they say: reliability, ECE and Brier on held-out questions, before and after scaling."""
    record = begin_record(
        "probe-calibration", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")}
    )
    require_new(to)
    from analyses import figures
    from probes.calibration import calibration
    from probes.linear import require_folds
    from surgery.model import Model
    from surgery.transcript import parse_span
    from surgery.whole import new_folder

    parse_span(over)
    read, labels = _two_classes(runs, of, length)
    require_folds(read, labels.values, over=(over,), folds=folds)
    if dry_run:
        _look(model, device, at)
        typer.echo(f"{len(read.questions)} questions in {folds} folds; {at} over {over}; would go to {to}")
        return
    loaded = Model.load(model, device=device, dtype="float32")
    read.require(loaded)
    found = calibration(
        loaded,
        read,
        labels.values,
        at=at,
        over=over,
        bins=bins,
        components=components,
        folds=folds,
        seed=seed,
        progress=not quiet,
    )
    table, curve = found.frame(), found.curve()
    record.inputs = model_input(loaded, model) | runs_input(runs)
    record.results = {"labels": str(labels), "scalings": table.to_dict("records"), "about": dict(found.about)}
    with new_folder(to) as folder:
        found.save(folder / "calibration.json")
        table.to_csv(folder / "calibration.csv", index=False)
        curve.to_csv(folder / "reliability.csv", index=False)
        figures.save(figures.draw(figures.reliability, curve, ratio=0.65), folder / "reliability.png")
        record.save(folder)
    for row in found.rows:
        typer.echo(surety_in_words(row))
    typer.echo(to)


@app.command(rich_help_panel=LOOK)
def probe_transfer(
    model: ModelRef,
    runs: Annotated[
        list[str],
        typer.Option(
            "--runs",
            help="Answers, twice or more: NAME=PATH, or a path that names them; a file of `surgery generate`, or its folder.",
            show_default=False,
        ),
    ],
    to: To,
    of: Of = "right",
    over: Over = "thinking",
    at: Chosen = "*.resid",
    length: OfLength = None,
    components: Components = None,
    folds: Folds = 5,
    shuffles: Shuffles = 3,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Whether what a probe learned from some answers holds for others: all pairs of --runs, on questions that were not learned from."""
    record = begin_record("probe-transfer", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    require_new(to)
    from analyses import figures
    from probes.linear import require_folds
    from probes.transfer import transfer
    from surgery.model import Model
    from surgery.transcript import parse_span
    from surgery.whole import new_folder

    parse_span(over)
    refs = _named(runs)
    sets = {name: _two_classes(ref, of, length, f"{name}, ") for name, ref in refs.items()}
    for name, (read, labels) in sets.items():
        require_folds(read, labels.values, over=(over,), folds=folds, called=f"questions of {name}")
    if dry_run:
        _look(model, device, at)
        asked = ", ".join(f"{len(read.questions)} of {name}" for name, (read, _) in sets.items())
        typer.echo(f"questions in {folds} folds: {asked}; {at} over {over}; would go to {to}")
        return
    loaded = Model.load(model, device=device, dtype="float32")
    for read, _ in sets.values():
        read.require(loaded)
    found = transfer(
        loaded,
        {name: (read, labels.values) for name, (read, labels) in sets.items()},
        at=at,
        over=over,
        components=components,
        folds=folds,
        shuffles=shuffles,
        seed=seed,
        progress=not quiet,
    )
    table = found.frame()
    record.inputs = model_input(loaded, model)
    for name, ref in refs.items():
        record.inputs[f"runs {name}"] = runs_input(ref)["runs"]
    record.results = {
        "labels": {name: str(labels) for name, (_, labels) in sets.items()},
        "pairs": table.to_dict("records"),
        "about": dict(found.about),
    }
    with new_folder(to) as folder:
        found.save(folder / "transfer.json")
        table.to_csv(folder / "transfer.csv", index=False)
        figures.save(figures.draw(figures.probe_transfer, table), folder / "transfer.png")
        record.save(folder)
    for row in found.rows:
        where = "held out of it" if row.trained == row.tested else f"judged in {row.tested}"
        typer.echo(_auc_in_words(f"trained in {row.trained}, {where}", row))
    typer.echo(to)


@app.command(rich_help_panel=LOOK)
def probe_along(
    model: ModelRef,
    runs: RunsRef,
    to: To,
    of: Of = "right",
    over: Annotated[str, typer.Option(help="The span along which is read: thinking or answer.")] = "thinking",
    fractions: Annotated[
        str, typer.Option(help="After which fractions of the span, with commas; 0 is before it.")
    ] = "0,0.25,0.5,0.75,1",
    at: Chosen = "*.resid",
    length: OfLength = None,
    components: Components = None,
    folds: Folds = 5,
    shuffles: Shuffles = 3,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """What is known before the thinking and after each part of it: a probe for each place, and one shared by all."""
    record = begin_record("probe-along", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    require_new(to)
    from analyses import figures
    from probes.linear import require_folds
    from probes.transfer import along
    from surgery.model import Model
    from surgery.transcript import parse_span
    from surgery.whole import new_folder

    parse_span(over)
    read, labels = _two_classes(runs, of, length)
    try:
        places = [float(word) for word in words_in(fractions)]
    except ValueError as error:
        raise ValueError(f"--fractions {fractions}: numbers from 0 to 1 with commas, as 0,0.5,1.") from error
    require_folds(read, labels.values, over=(over,), folds=folds)
    if dry_run:
        _look(model, device, at)
        typer.echo(f"{len(read.questions)} questions in {folds} folds; {at} along {over}; would go to {to}")
        return
    loaded = Model.load(model, device=device, dtype="float32")
    read.require(loaded)
    found = along(
        loaded,
        read,
        labels.values,
        at=at,
        over=over,
        fractions=places,
        components=components,
        folds=folds,
        shuffles=shuffles,
        seed=seed,
        progress=not quiet,
    )
    table = found.frame()
    record.inputs = model_input(loaded, model) | runs_input(runs)
    record.results = {"labels": str(labels), "pairs": table.to_dict("records"), "about": dict(found.about)}
    with new_folder(to) as folder:
        found.save(folder / "along.json")
        table.to_csv(folder / "along.csv", index=False)
        figures.save(figures.draw(figures.probe_along, table), folder / "along.png")
        record.save(folder)
    for row in found.rows:
        if row.trained in (row.tested, "all"):
            whose = "the shared probe" if row.trained == "all" else "its own probe"
            typer.echo(_auc_in_words(f"after {row.tested} of the {over}, {whose}", row))
    typer.echo(to)


def _look(model: str, device: str, at: str) -> None:
    """For a dry run. Raises ValueError for a model, device or site that there is not."""
    from surgery.sites import match

    match(at, require_model(model, device).anatomy.activation_sites())


def _two_classes(ref: str, of: str, length: str | None, whose: str = "") -> tuple[Runs, Labels]:
    """Answers and their labels, which it says. Raises ValueError for labels that are numbers."""
    from analyses.labels import labels_of

    if length is not None and of != "length":
        raise ValueError(f"--length is of --of length; with --of {of} it does nothing.")
    read = load_runs(ref)
    labels = labels_of(read, of, length=length or "thinking")
    if labels.kind != "classes":
        raise ValueError(
            f"--of {of} is of numbers ({labels.said}), and this is of two classes; `surgery probe` reads numbers."
        )
    typer.echo(f"{whose}{of}: {labels}")
    return read, labels


def _named(refs: list[str]) -> dict[str, str]:
    """NAME=PATH, or a path that names itself, as name -> path. Raises ValueError for fewer than two, or two of one name."""
    named: dict[str, str] = {}
    for ref in refs:
        name, mark, path = ref.partition("=")
        if not mark:
            name, path = Path(ref).stem, ref
        if name in named:
            raise ValueError(f"--runs {ref}: there is a {name} already; name them apart, as {name}2={path}.")
        named[name] = path
    if len(named) < 2:
        raise ValueError(
            f"A transfer is between sets of answers, and there is {', '.join(named)} only: give --runs twice or more."
        )
    return named


def surety_in_words(row: CalibrationRow) -> str:
    """What is printed of one scaling."""
    chance = f"{'above' if row.ece > row.ece_floor else 'within'} chance ({row.ece_floor:.3f})"
    chance = "what is chance unknown" if math.isnan(row.ece_floor) else chance
    return (
        f"{row.scaling}: Brier {row.brier:.3f} {_ends(row.brier_low, row.brier_high)} (always the share {row.base:.3f}, length alone "
        f"{row.length:.3f}), ECE {row.ece:.3f} {_ends(row.ece_low, row.ece_high)}, {chance}; {row.n} questions, mostly at {row.site}"
    )


def _ends(low: float, high: float) -> str:
    from probes.estimates import ALL_AGREE

    return f"({ALL_AGREE})" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"


def _auc_in_words(what: str, row: Any) -> str:
    from probes.linear import CONTROLS

    controls = {name: value for name in CONTROLS if (value := getattr(row, name)) == value}
    near = max(controls, key=lambda name: controls[name])
    return f"{what}: AUC {row.value:.3f} [{row.low:.3f}, {row.high:.3f}] over {row.n} questions (best control: {near} {controls[near]:.3f})"


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
