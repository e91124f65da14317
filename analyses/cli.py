"""The command line. Each command is a function whose signature declares its options once: `replay` calls the same function.

Nothing heavy is imported before a command runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.plan import Plan

if TYPE_CHECKING:
    from surgery.record import Record
    from surgery.weights import Delta, Weights

app = typer.Typer(
    help="Change a language model's reasoning, and know what you changed.\n\nMODEL is 'specimen' (the default model), a folder, or a hub id. Output goes "
    "to a new folder, whole or not at all, with a record of how it was made. Exit codes: 0 done, 1 a check failed, 2 bad usage or input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
measure = typer.Typer(help="Judge a model, or compare two.", no_args_is_help=True)

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
        help="'sums', 'gym:NAME' (a reasoning-gym task), or a .jsonl file with question, answer and perhaps solution."
    ),
]

START, CHANGE, LOOK, RECEIPTS = "Start here", "Change a model", "Look and judge", "Receipts"


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
    if dry_run:
        typer.echo(plan.in_words())
        return
    from analyses.study import study

    typer.echo(study(plan, to, progress=not quiet))


@app.command(rich_help_panel=CHANGE)
def tune(
    model: ModelRef,
    to: To,
    data: Questions = "sums",
    method: Annotated[str, typer.Option(help="lift, full or lora.")] = "lift",
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 60,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by default 1e-3 (lift, lora) or 1e-4 (full).", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Transcripts a step.", min=1)] = 16,
    accumulate: Annotated[int, typer.Option(help="Micro-batches a step.", min=1)] = 1,
    density: Annotated[
        float | None, typer.Option(help="lift: fraction of each matrix, in (0, 1]; default 0.05.", show_default=False)
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(help="lift: as many entries as a LoRA of this rank; lora: its rank.", show_default=False),
    ] = None,
    filter_rank: Annotated[
        int, typer.Option(help="lift: rank of the filter that decides what is principal.", min=1)
    ] = 16,
    refresh: Annotated[
        int | None, typer.Option(help="lift: choose anew every so many steps.", show_default=False)
    ] = None,
    select: Annotated[
        str,
        typer.Option(help="lift: largest, or a control: smallest (what the released code trains), random, magnitude."),
    ] = "largest",
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on what is trained.", min=0)] = 0.0,
    watch: Annotated[str, typer.Option(help="Comma-separated: accuracy, nll, drift, drift-general, change.")] = "",
    watch_every: Annotated[int, typer.Option(help="Steps between measurements.", min=1)] = 20,
    save_every: Annotated[
        int | None,
        typer.Option(help="Checkpoint every so many steps; the same command then resumes.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on worked questions, watched, and write the tuned model."""
    record = _record("tune", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    from analyses import tasks
    from analyses.general_text import GENERAL_TEXT
    from analyses.watch import watches
    from finetune.tune import tune
    from surgery.checkpoint import write
    from surgery.model import Model, as_dtype

    if to.exists():
        raise FileExistsError(f"{to} exists already and is never overwritten. Choose another --to, or remove it.")
    loaded = Model.load(model, device=device, dtype="float32")
    base = loaded.checkpoint
    assert base is not None  # loaded from a folder
    generated = not data.endswith((".jsonl", ".json"))
    questions = tasks.load(data, steps * batch_size if generated else None, seed=seed, side="train")
    if dry_run:
        typer.echo(
            f"{method}: {steps} steps of {batch_size} from {len(questions)} questions of {data}; first:\n{questions[0].question}\n{questions[0].completion(loaded.markers)}"
        )
        return
    named = [name for name in watch.split(",") if name]
    workshop = to.with_name(f".{to.name}.tuning")  # logs and checkpoints until the model is written
    watched = (
        watches(named, loaded, tasks.load(data, 32, seed=seed + 1, side="test"), GENERAL_TEXT[:12], watch_every)
        if named
        else []
    )
    done = tune(
        loaded,
        [loaded.transcript(q.question, q.completion(loaded.markers)) for q in questions],
        method=method,  # type: ignore[arg-type] - tune names the choices
        steps=steps, lr=lr, batch_size=batch_size, accumulate=accumulate, density=density, lora_rank=lora_rank,
        filter_rank=filter_rank, refresh=refresh, select=select,  # type: ignore[arg-type]
        weight_decay=weight_decay, seed=seed, watch=watched, log=workshop / "log.jsonl" if watched else None,
        checkpoints=workshop / "checkpoints" if save_every else None, save_every=save_every, progress=not quiet,
    )  # fmt: skip
    written = write(loaded.weights, to, dtype=as_dtype(dtype), progress=not quiet)
    if watched:
        (workshop / "log.jsonl").replace(to / "log.jsonl")
    shutil.rmtree(workshop, ignore_errors=True)
    record.inputs = {"model": {"ref": model, "hash": written.base_hash}}
    record.checks, record.results = (
        written.checks,
        {**written.as_dict(), "losses": done.losses, "trainable": done.trainable},
    )
    record.save(to, reproducible=["*.safetensors"])
    typer.echo(f"loss {done.losses[0]:.3f} -> {done.losses[-1]:.3f}, {done.trainable:,} numbers free to move")
    typer.echo(written)


@app.command(rich_help_panel=CHANGE)
def diff(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that changed.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it changed from.")],
    to: To,
    dry_run: DryRun = False,
) -> None:
    """A task vector as a file: TUNED - BASE, sparse where that is smaller."""
    record = _record("diff", {"tuned": tuned, "base": base})
    from surgery.checkpoint import Checkpoint
    from surgery.delta import save_delta
    from surgery.model import find

    a, b = Checkpoint(find(tuned)), Checkpoint(find(base))
    vector = a - b
    if dry_run:
        typer.echo(f"{vector!r} would go to {to}")
        return
    base_hash = b.hash()
    save_delta(vector, to, base_hash=base_hash)
    record.inputs = {"tuned": {"ref": tuned, "hash": a.hash()}, "base": {"ref": base, "hash": base_hash}}
    record.save(to)
    typer.echo(to)


@app.command(rich_help_panel=CHANGE)
def apply(
    model: ModelRef,
    to: To,
    add: Annotated[
        list[str],
        typer.Option("--add", help="VECTOR:STRENGTH, a delta folder and a number (default 1); may be repeated."),
    ],
    dtype: Dtype = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """MODEL plus task vectors, streamed to a new model folder and verified."""
    record = _record("apply", {"model": model, "add": add, "dtype": dtype})
    from surgery.checkpoint import Checkpoint, write
    from surgery.delta import StoredDelta
    from surgery.model import as_dtype, find

    base = Checkpoint(find(model))
    point: Weights = base
    record.inputs = {}
    for entry in add:
        folder, strength = _strength(entry)
        vector = StoredDelta(folder)
        scaled: Delta = strength * vector
        point = point + scaled
        record.inputs[folder] = {
            "ref": folder,
            "hash": _file_hash(Path(folder) / "delta.safetensors"),
            "base": vector.base_hash,
        }
    if dry_run:
        typer.echo(f"{point!r}: {len(point.changed_from(base))} sites of {model} would change; would go to {to}")
        return
    written = write(point, to, dtype=as_dtype(dtype), progress=not quiet)
    record.inputs["model"] = {"ref": model, "hash": written.base_hash}
    foreign = [ref for ref, entry in record.inputs.items() if entry.get("base", written.base_hash) != written.base_hash]
    record.checks, record.results = written.checks, written.as_dict()
    record.save(to, reproducible=["*.safetensors"])
    for ref in foreign:
        typer.echo(f"note: {ref} was measured from another base than {model}", err=True)
    typer.echo(written)


@app.command(rich_help_panel=LOOK)
def inspect(
    model: ModelRef, at: Annotated[str, typer.Option(help="Pattern of sites: '*.attn.o', '0-3.mlp.*', '**'.")] = "**"
) -> None:
    """What a checkpoint holds: anatomy, and shape, dtype, size and norm by site."""
    from surgery.checkpoint import Checkpoint
    from surgery.model import find
    from surgery.sites import match

    weights = Checkpoint(find(model))
    anatomy = weights.anatomy
    typer.echo(
        f"{model}: {anatomy.family}, {anatomy.n_layers} layers, d {anatomy.d_model}, {anatomy.n_heads} heads ({anatomy.n_kv_heads} kv) of {anatomy.head_dim}, vocabulary {anatomy.vocab}"
    )
    typer.echo(
        f"{len(weights)} sites in {len(weights.files)} file(s), {weights.nbytes / 1e6:.1f} MB"
        + "".join(f"; {a} tied to {b}" for a, b in anatomy.ties.items())
    )
    for site in match(at, weights):
        tensor = weights[site].float()
        typer.echo(
            f"{site!s:24} {tuple(tensor.shape)!s:16} {str(weights.dtype(site)).removeprefix('torch.'):10} norm {float(tensor.norm()):.4g}  mean|W| {float(tensor.abs().mean()):.4g}"
        )


@measure.command("early-answers")
def early_answers(
    model: ModelRef,
    to: To,
    data: Questions = "sums",
    count: Annotated[int, typer.Option(help="How many questions.", min=2)] = 64,
    traces: Annotated[str, typer.Option(help="own: what the model writes; gold: the worked solutions.")] = "own",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Is the chain of thought used? Cut it after each sentence and read the answer."""
    record = _record("measure early-answers", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    from analyses import tasks
    from analyses.faithfulness import early_answers
    from surgery.model import Model

    if traces not in ("own", "gold"):
        raise ValueError(f"--traces {traces!r}: choose own or gold.")
    loaded = Model.load(model, device=device, dtype="float32")
    questions = tasks.load(data, count, seed=seed, side="test" if not data.endswith("jsonl") else "all")
    told = None if traces == "own" else [loaded.transcript(q.question, q.completion(loaded.markers)) for q in questions]
    found = early_answers(loaded, questions, told, max_new_tokens=max_new_tokens, seed=seed, progress=not quiet)
    _save_measure(
        record,
        to,
        {"model": (model, loaded)},
        lambda folder: found.save(folder / "early_answers.json"),
        {"curve": found.curve(), "summary": found.summary()},
    )
    typer.echo(found)


@measure.command()
def drift(
    model: ModelRef,
    base: Annotated[str, typer.Option(help="The model to compare with.", show_default=False)],
    to: To,
    data: Questions = "sums",
    count: Annotated[int, typer.Option(help="How many questions.", min=4)] = 48,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """How far the residual streams of two models are apart, by layer and span, on the same worked questions."""
    record = _record("measure drift", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    from analyses import tasks
    from analyses.representation import drift
    from surgery.model import Model

    after, before = (Model.load(ref, device=device, dtype="float32") for ref in (model, base))
    questions = tasks.load(data, count, seed=seed, side="test" if not data.endswith("jsonl") else "all")
    told = [before.transcript(q.question, q.completion(before.markers)) for q in questions]
    spans = [s for s in ("thinking", "answer") if any(s in t.spans for t in told)]
    found = drift(before, after, told, over=spans, seed=seed, progress=not quiet)
    _save_measure(
        record,
        to,
        {"model": (model, after), "base": (base, before)},
        lambda folder: found.save(folder / "drift.json"),
        {"drift": found.frame()},
    )
    table = found.frame().query("measure == 'mean_shift'")
    typer.echo(table[["layer", "span", "value", "low", "high", "floor"]].to_string(index=False, float_format="%.3f"))


@measure.command()
def geometry(
    model: ModelRef,
    base: Annotated[str, typer.Option(help="The model it changed from.", show_default=False)],
    to: To,
    at: Annotated[
        str | None, typer.Option(help="Pattern of matrices; by default all of attention and MLP.", show_default=False)
    ] = None,
    density: Annotated[float, typer.Option(help="Size of the principal set, a fraction in (0, 1].")] = 0.05,
    filter_rank: Annotated[int, typer.Option(help="Rank of the filter that decides what is principal.", min=1)] = 16,
    k: Annotated[int, typer.Option(help="Dimension of the principal subspaces.", min=1)] = 8,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Which weights moved: changed fractions, principal mask, spectra, rotation, rank."""
    record = _record("measure geometry", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    from analyses.geometry import geometry
    from surgery.checkpoint import Checkpoint
    from surgery.model import find
    from surgery.weights import require_same_sites

    after, before = Checkpoint(find(model)), Checkpoint(find(base))
    require_same_sites(after, before)
    found = geometry(before, after, at=at, density=density, filter_rank=filter_rank, k=k, progress=not quiet)
    summary = found.summary(seed=seed)
    _save_measure(
        record,
        to,
        {"model": (model, after), "base": (base, before)},
        lambda folder: found.save(folder / "geometry.json"),
        {"geometry": found.frame(), "summary": summary},
    )
    typer.echo(
        summary.query("part == 'all'")[["measure", "value", "low", "high", "n"]].to_string(
            index=False, float_format="%.4g"
        )
    )


app.add_typer(measure, name="measure", rich_help_panel=LOOK)


@app.command(rich_help_panel=LOOK)
def figure(
    name: Annotated[
        str, typer.Argument(metavar="FIGURE", help="early-answers, drift, geometry, sweep, training or before-after.")
    ],
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="A .csv table, or the folder of a measure or study that has one.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Image file: .png, .pdf or .svg.", show_default=False)],
    measure: Annotated[
        str | None, typer.Option(help="Which column or measure to draw, where there are several.", show_default=False)
    ] = None,
    width: Annotated[float, typer.Option(help="Inches.", min=1)] = 5.5,
) -> None:
    """Draw a saved table."""
    import pandas as pd

    from analyses import figures

    if name not in figures.FIGURES:
        raise ValueError(f"There is no figure {name!r}. Choose {', '.join(figures.FIGURES)}.")
    if to.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--to {to}: the name must end in .png, .pdf or .svg.")
    if to.exists():
        raise FileExistsError(f"{to} exists already and is never overwritten. Choose another --to, or remove it.")
    path = _table_in(table, name)
    options: dict[str, Any] = {} if measure is None else {"measure": measure}
    if measure is not None and name in ("early-answers", "before-after"):
        raise ValueError(f"{name} draws one thing; --measure is for drift, geometry, sweep and training.")
    frame = pd.read_csv(path)
    drawn = figures.draw(figures.FIGURES[name], frame, width=width, **options)
    typer.echo(figures.save(drawn, to))


@app.command(rich_help_panel=RECEIPTS)
def verify(folder: Annotated[Path, typer.Argument(help="A folder that a surgery command made.")]) -> None:
    """Hash the outputs again; names the file or tensor that is not as recorded."""
    from surgery.record import verify

    problems = verify(folder)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder}: everything is as recorded")


@app.command(rich_help_panel=RECEIPTS)
def replay(folder: Annotated[Path, typer.Argument(help="A folder that a surgery command made.")], to: To) -> None:
    """Run the recorded command again and compare; says how today's environment differs."""
    from surgery.record import Record, compare_environment, environment, replay

    for grade, difference in compare_environment(Record.load(folder).environment, environment()):
        typer.echo(f"{grade}: {difference}", err=True)
    again = replay(folder, to, COMMANDS)
    typer.echo(f"{len(again.equal)} outputs equal, {len(again.differing)} differ")
    for name in again.differing[:20]:
        typer.echo(f"  {name}")
    if not again.ok:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., object]] = {
    "study": study,
    "tune": tune,
    "diff": diff,
    "apply": apply,
    "measure early-answers": early_answers,
    "measure drift": drift,
    "measure geometry": geometry,
}


def _record(command: str, arguments: dict[str, Any]) -> Record:
    from surgery.record import Record, typed

    seeds = {"seed": arguments["seed"]} if "seed" in arguments else {}
    return Record(command, dict(arguments), typed(), seeds=seeds)


def _save_measure(
    record: Record, to: Path, inputs: dict[str, tuple[str, Any]], save: Callable[[Path], object], tables: dict[str, Any]
) -> None:
    """A measure's folder: its own file, its tables as CSV, its record; whole or not at all."""
    from surgery.checkpoint import new_folder

    with new_folder(to) as folder:
        save(folder)
        for name, table in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        record.inputs = {
            role: {"ref": ref, "hash": getattr(found, "checkpoint", found).hash()}
            for role, (ref, found) in inputs.items()
        }
        record.save(folder)


def _strength(entry: str) -> tuple[str, float]:
    folder, colon, number = entry.rpartition(":")
    if not colon or Path(entry).is_dir():
        return entry, 1.0
    try:
        return folder, float(number)
    except ValueError as error:
        raise ValueError(f"--add {entry}: after the last colon comes a number, as in {folder}:0.7.") from error


def _file_hash(path: Path) -> str:
    import hashlib
    import json

    from surgery.checkpoint import hash_file_tensors

    return hashlib.sha256(json.dumps(hash_file_tensors(path), sort_keys=True).encode()).hexdigest()


def _table_in(table: Path, figure: str) -> Path:
    """The CSV of a figure: the file itself, or the one in a measure's or study's folder."""
    if table.is_file():
        return table
    names = {"early-answers": ["curve.csv", "early-answers.csv"]}.get(figure, [f"{figure}.csv"])
    for folder in (table, table / "tables"):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    found = sorted(p.name for p in table.rglob("*.csv")) if table.is_dir() else []
    raise FileNotFoundError(
        f"{table} has no table for {figure} ({' or '.join(names)}); it has {', '.join(found) or 'no tables'}."
    )


def main() -> None:
    """The console script: one clear line for what went wrong, and an exit code that says what kind it was."""
    try:
        app()
    except SystemExit as leaving:
        if leaving.code == 130:  # typer's, for an interrupt
            typer.echo("surgery: interrupted; nothing half-written was left", err=True)
        raise
    except (ValueError, OSError, KeyError, FloatingPointError) as error:
        typer.echo(f"surgery: {error.args[0] if isinstance(error, KeyError) and error.args else error}", err=True)
        sys.exit(1 if type(error).__name__ == "VerificationError" else 2)


if __name__ == "__main__":
    main()
