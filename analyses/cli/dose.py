"""The command that sweeps a change of a model over strengths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.cli.change import vector_of
from analyses.cli.given import Side, data_input, hash_of, questions_to_judge_on, require_model, spans_in
from analyses.cli.options import LOOK, Device, DryRun, ModelRef, Questions, Quiet, Seed, To, app, begin_record

if TYPE_CHECKING:
    from analyses.changes import Change
    from surgery.checkpoint import Checkpoint


@app.command(rich_help_panel=LOOK)
def sweep(
    model: ModelRef,
    strengths: Annotated[
        str, typer.Option("--strengths", help="As in '-0.4,-0.2,0.2,0.4'; 0 is always measured.", show_default=False)
    ],
    to: To,
    add: Annotated[
        str | None,
        typer.Option("--add", help="A task vector: a delta's or a LoRA adapter's folder.", show_default=False),
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(
            "--steer",
            metavar="DIRECTION",
            help="A direction to steer along: a .safetensors file, or the folder of `surgery direction`.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            "--remove",
            metavar="DIRECTION",
            help="A direction, likewise, no longer to be written by --at.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            help="Sites: of --steer as in '14.resid', of --remove as in '*.attn.o'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            help="Of --steer: a span, or several with commas, each an arm; default completion.", show_default=False
        ),
    ] = None,
    how: Annotated[
        str | None, typer.Option(help="Of --steer: add (the default), ablate or clamp.", show_default=False)
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            help="Of --steer: residual (the default; multiples of the stream's norm) or raw.", show_default=False
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="As in '3,7,10-12': each an arm, only these layers changed.", show_default=False)
    ] = None,
    controls: Annotated[
        int,
        typer.Option(
            help="Random stand-ins for each arm: of --add noise of the same norm, else random directions.", min=0
        ),
    ] = 5,
    data: Questions = "sums",
    count: Annotated[
        int | None, typer.Option(help="Questions; by default 32, of a file at most.", min=1, show_default=False)
    ] = None,
    side: Side = None,
    samples: Annotated[int, typer.Option(help="Answers to each; one is greedy.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)] = 64,
    length: Annotated[
        str | None,
        typer.Option(
            help="Span whose length is measured: thinking, answer or completion; by default thinking, or answer where MODEL writes none.",
            show_default=False,
        ),
    ] = None,
    passages: Annotated[int, typer.Option(help="Passages of general text.", min=1, max=40)] = 16,
    budget: Annotated[float, typer.Option(help="KL on general text, nats a token, that marks the knee.", min=0)] = 0.05,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """What a steering, an edit or a task vector does at each strength, and what it costs; beside random ones. Interrupted, it resumes."""
    record = begin_record("sweep", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    if sum(ref is not None for ref in (add, steer, remove)) != 1:
        raise ValueError("One change is swept: give --add VECTOR, --steer DIRECTION or --remove DIRECTION.")
    idle = {"--at": at if add else None} | ({} if steer else {"--over": over, "--how": how, "--units": units})
    for option, value in idle.items():
        if value is not None:
            raise ValueError(
                f"{option} is of {'--steer or --remove' if option == '--at' else '--steer'}; without it, it does nothing."
            )
    steps, groups = _numbers(strengths), _groups(layers)
    from analyses import figures
    from analyses.changes import require_fit
    from analyses.dose import sweep
    from analyses.general_text import GENERAL_TEXT
    from analyses.shelf import require_unfinished
    from surgery.model import Model

    require_unfinished(to, "sweep")
    questions = questions_to_judge_on(data, count, 32, side, seed)
    ref = str(add or steer or remove)
    if dry_run:
        there = require_model(model, device)
        require_fit(
            _change(there, add, steer, remove, at, how, units)[0],
            there,
            groups or [None],
            spans_in(over) if over else [None],
        )
        arms, levels = len(groups or [0]) * len(spans_in(over or "")), len({*steps} - {0.0})
        typer.echo(
            f"{ref}: {arms} arm{'s'[: arms > 1]} at {levels} strengths, each with {controls} random stand-ins: {len(questions)} questions "
            f"({samples} samples) and {passages} passages, {1 + arms * (1 + controls) * levels} times; would go to {to}"
        )
        return
    loaded = Model.load(model, device=device, dtype="float32")
    base = loaded.checkpoint
    assert base is not None  # loaded from a folder
    change, entry, notes = _change(base, add, steer, remove, at, how, units)
    for note in notes:
        typer.echo(note, err=True)
    record.inputs = {"model": {"ref": model, "hash": base.hash()}, "change": entry} | data_input(data)
    found = sweep(
        loaded,
        change,
        steps,
        questions=questions,
        layers=groups,
        span=spans_in(over) if over else None,
        length=length,
        controls=controls,
        texts=GENERAL_TEXT[:passages],
        samples=samples,
        max_new_tokens=max_new_tokens,
        budget=budget,
        seed=seed,
        to=to,
        progress=not quiet,
    )
    table, knees = found.frame(), found.knees()
    found.save(to / "sweep.json")
    table.to_csv(to / "sweep.csv", index=False)
    knees.to_csv(to / "knees.csv", index=False)
    figures.save(figures.panels(figures.sweep, table), to / "sweep.png")
    figures.save(figures.draw(figures.frontier, table), to / "frontier.png")
    counted = found.settings["length"]
    record.results = {"knees": knees.to_dict("records"), "length": counted, "notes": notes}
    record.save(to, reproducible=["sweep.csv", "knees.csv"])
    typer.echo(
        table[table["draw"].isna()]
        .pivot_table(index=["arm", "strength"], columns="measure", values="value", sort=False)
        .to_string(float_format="%.4g")
    )
    typer.echo(f"length is counted over {counted}")
    unsure: Any = table[table["draw"].isna() & table["low"].isna() & table["seed"].isna()]
    for row in unsure.to_dict("records"):
        typer.echo(f"{row['arm']} at strength {row['strength']:g}: {row['measure']}: {row['method']}")
    for row in knees.to_dict("records"):
        where = (
            f"the knee {row['side']} 0 is at {row['strength']:g}"
            if row["reached"]
            else f"no knee {row['side']} 0, up to {row['strength']:g}"
        )
        typer.echo(f"{row['arm']}: {where} (KL {row['kl']:.3g}, budget {budget:g})")


def _change(
    base: Checkpoint, add: str | None, steer: str | None, remove: str | None, at: list[str] | None, how: str | None, units: str | None
) -> tuple[Change, dict[str, str], list[str]]:  # fmt: skip
    """The change that is swept, its entry in the record, and what a reader should know of it."""
    if add:
        return vector_of(add, base)
    from surgery.edit_lists import direction_file

    path = str(direction_file(str(steer or remove)))
    return _steering(path, at, how, units) if steer else _removal(path, at), _input(path), []


def _numbers(text: str) -> list[float]:
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"--strengths {text}: give finite numbers with commas, as in '-0.4,-0.2,0.2,0.4'.")
    return found


def _groups(text: str | None) -> list[list[int]] | None:
    """ "3,7,10-12" -> [[3], [7], [10, 11, 12]]."""
    if text is None:
        return None
    groups = []
    for entry in text.split(","):
        first, _, last = entry.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ValueError(f"--layers {text}: give layers with commas, as in '3,7,10-12'.")
        groups.append(list(range(int(first), int(last or first) + 1)))
    return groups


def _steering(path: str, at: list[str] | None, how: str | None, units: str | None) -> Change:
    from probes.steering import Steering

    given: dict[str, Any] = {"at": at, "how": how, "units": units}
    return Steering(_direction(path), **{name: value for name, value in given.items() if value is not None})


def _removal(path: str, at: list[str] | None) -> Change:
    from analyses.changes import Editing
    from surgery.edits import RemoveDirection

    if not at:
        raise ValueError(
            "--remove needs --at: which sites are no longer to write the direction, as in --at '*.attn.o'."
        )
    return Editing(RemoveDirection(_direction(path)), tuple(at))


def _direction(path: str) -> Any:
    """A direction with its sites, where the file is one; else a single vector."""
    from probes.directions import Direction
    from surgery.edit_lists import read_numbers

    try:
        return Direction.load(path)
    except (ValueError, FileNotFoundError):
        return read_numbers(path)


def _input(ref: str) -> dict[str, str]:
    file, named, _ = ref.partition(".safetensors:")
    return {"ref": ref, "hash": hash_of(Path(file + ".safetensors" if named else file))}
