"""Commands that look at a model, judge it, or draw what was found; they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.cli.given import Input, Side, data_input, questions_to_judge_on
from analyses.cli.options import (
    LOOK,
    Device,
    Dtype,
    ModelRef,
    Questions,
    Quiet,
    Seed,
    To,
    app,
    begin_record,
    require_new,
)

if TYPE_CHECKING:
    from surgery.preflight import Report
    from surgery.record import Record
    from surgery.sites import Site
    from surgery.weights import Delta


@app.command(rich_help_panel=LOOK)
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="WHAT", help="A model ('specimen', a folder, a hub id), or a vector's or adapter's folder."
        ),
    ],
    at: Annotated[str, typer.Option(help="Pattern of sites: '*.attn.o', '0-3.mlp.*', '**'.")] = "**",
    against: Annotated[
        str | None,
        typer.Option(help="Of a vector: another one's folder; gives cosines.", show_default=False),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="Of a vector: the model it would be added to; gives its size there and what storing it keeps. An adapter needs it.",
            show_default=False,
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--names", help="What activation sites are called in TransformerLens and Hugging Face.")
    ] = False,
) -> None:
    """What a checkpoint holds, or how large a vector is: by site."""
    from surgery.adapter_names import CONFIG
    from surgery.headers import DELTA

    if any((Path(model) / name).is_file() for name in (DELTA, CONFIG)):
        if names:
            raise ValueError(f"--names is of a model's activation sites; {model} holds a vector.")
        _inspect_vector(model, at, against, on)
        return
    if against is not None or on is not None:
        there = "holds none" if Path(model).is_dir() else "is no vector's folder here"
        raise ValueError(f"--against and --on compare a vector; {model} {there}.")
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
    if names:
        from surgery.windows import names as table

        typer.echo(table(anatomy, at).to_string())
        return
    for site in match(at, weights):
        tensor = weights[site].float()
        typer.echo(
            f"{site!s:24} {tuple(tensor.shape)!s:16} {str(weights.dtype(site)).removeprefix('torch.'):10} norm {float(tensor.norm()):.4g}  mean|W| {float(tensor.abs().mean()):.4g}"
        )


def _inspect_vector(ref: str, at: str, against: str | None, on: str | None) -> None:
    """A vector's norm at every site, and what it is to a model or to another vector."""
    from surgery.adapter_names import CONFIG
    from surgery.checkpoint import Checkpoint
    from surgery.delta import StoredDelta, read_vector
    from surgery.lowrank import Adapter
    from surgery.model import find

    base = None if on is None else Checkpoint(find(on))
    adapters = [folder for folder in (ref, against) if folder is not None and (Path(folder) / CONFIG).is_file()]
    if adapters and base is None:
        raise ValueError(
            f"{adapters[0]} is an adapter: only its model knows where its modules are. Say which, with --on."
        )

    def read(folder: str) -> Delta:
        return StoredDelta(folder) if base is None else read_vector(folder, base)

    vector = read(ref)
    kept = vector.keep(at)
    norms = kept.norms()
    cosines = {} if against is None else kept.cosines(read(against))
    columns = f"{'site':24} {'shape':16} {'stored':18} {'norm':>10}"
    columns += f" {'cosine':>8}" if against else ""
    columns += f" {'of |W|':>10} {'unmoved':>8} {'kept':>8}" if base else ""
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    typer.echo(f"{ref}: {len(kept)} sites, norm {whole:.4g}")
    for note in vector.notes if isinstance(vector, Adapter) else []:
        typer.echo(f"note: {note}")
    typer.echo(columns)
    for site, norm in norms.items():
        line = f"{site!s:24} {tuple(kept.shape(site))!s:16} {_stored_as(vector, site):18} {norm:10.4g}"
        if against:
            line += f" {cosines[site]:8.4f}" if site in cosines else f" {'-':>8}"
        if base and base.shapes().get(site) == kept.shape(site):
            survival = kept.keep(site).survival(base.dtype(site), base)[site]
            size = float(base[site].float().norm())
            line += f" {norm / size if size else float('nan'):10.2e} {survival.unmoved:8.1%} {survival.cosine:8.4f}"
        typer.echo(line)


def _stored_as(vector: Delta, site: Site) -> str:
    from surgery.delta import StoredDelta
    from surgery.lowrank import Factored

    form = vector.form(site) if isinstance(vector, StoredDelta) else ""
    if isinstance(vector, Factored) and site in vector.factored():
        error = vector.errors.get(site, 0.0) if isinstance(vector, StoredDelta) else 0.0
        return f"rank {vector.rank(site)}" + (f", error {error:.2g}" if error else "")
    return form or "dense"


@app.command(rich_help_panel=LOOK)
def check(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT",
            help="RECIPE.yml · merge RECIPE.yml · apply MODEL · or a MODEL by itself.",
            show_default=False,
        ),
    ],
    add: Annotated[
        list[str] | None,
        typer.Option("--add", help="With apply: VECTOR:STRENGTH, a delta's or adapter's folder.", show_default=False),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Where the output would go.", show_default=False)] = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """What would go wrong, and what it would take, from headers alone: seconds, whatever the models' size.

    Of a model on the hub that is not in the local cache, headers and small files are fetched, and no weights.
    """
    import json

    report = _checked(what, add or [], to, dtype)
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


def _checked(what: list[str], add: list[str], to: Path | None, dtype: str | None) -> Report:
    from analyses.cli.change import _strength
    from surgery.preflight import check_apply, check_model, check_recipe

    command, words = (what[0], what[1:]) if what[0] in ("apply", "merge") and not Path(what[0]).exists() else ("", what)
    recipe = command == "merge" or Path(words[0]).suffix in (".yml", ".yaml") if words else False
    if command == "merge" and len(words) == 2 and to is None:
        to = Path(words.pop())  # as in `surgery merge RECIPE OUT`
    if (
        len(words) != 1
        or (command == "apply") != bool(add)
        or (dtype and command != "apply")
        or (to and not command and not recipe)
    ):
        raise ValueError(
            f"surgery check {' '.join(what)}: write check RECIPE.yml, check merge RECIPE.yml [OUT], check apply MODEL --add VECTOR:0.7 "
            "[--dtype bfloat16], or check MODEL."
        )
    if recipe:
        if not Path(words[0]).is_file():
            raise FileNotFoundError(f"There is no recipe {words[0]}.")
        return check_recipe(words[0], to)
    if command:
        return check_apply(words[0], [_strength(entry)[0] for entry in add], to, dtype)
    return check_model(words[0])


measure = typer.Typer(help="Judge a model, or compare two.", no_args_is_help=True)


@measure.command("early-answers")
def early_answers(
    model: ModelRef,
    to: To,
    data: Questions = "sums",
    count: Annotated[
        int | None, typer.Option(help="Questions; by default 64, of a file at most.", min=2, show_default=False)
    ] = None,
    side: Side = None,
    traces: Annotated[str, typer.Option(help="own: what the model writes; gold: the worked solutions.")] = "own",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="--traces own: longest completion, in tokens; default 64.", min=1, show_default=False),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Is the chain of thought used? Cut it after each sentence and read the answer."""
    record = begin_record("measure early-answers", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    require_new(to)
    from analyses.faithfulness import early_answers
    from analyses.tasks import worked
    from surgery.model import Model

    if traces not in ("own", "gold"):
        raise ValueError(f"--traces {traces!r}: choose own or gold.")
    if max_new_tokens is not None and traces == "gold":
        raise ValueError("--max-new-tokens is of --traces own: nothing is written where the worked solutions are cut.")
    loaded = Model.load(model, device=device, dtype="float32")
    questions = questions_to_judge_on(data, count, 64, side, seed)
    told = None if traces == "own" else worked(loaded, questions)
    found = early_answers(loaded, questions, told, max_new_tokens=max_new_tokens or 64, seed=seed, progress=not quiet)
    _save_measure(
        record,
        to,
        {"model": (model, loaded)},
        lambda folder: found.save(folder / "early_answers.json"),
        {"curve": found.curve(), "summary": found.summary()},
        data_input(data),
    )
    typer.echo(found)


@measure.command()
def drift(
    model: ModelRef,
    base: Annotated[str, typer.Option(help="The model to compare with.", show_default=False)],
    to: To,
    data: Questions = "sums",
    count: Annotated[
        int | None, typer.Option(help="Questions; by default 48, of a file at most.", min=4, show_default=False)
    ] = None,
    side: Side = None,
    k: Annotated[int, typer.Option(help="Principal components whose span is compared, for the angles.", min=1)] = 8,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """How far the residual streams of two models are apart, by layer and span, on the same worked questions."""
    record = begin_record("measure drift", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    require_new(to)
    from analyses.representation import drift
    from analyses.tasks import worked
    from surgery.model import Model

    after, before = (Model.load(ref, device=device, dtype="float32") for ref in (model, base))
    questions = questions_to_judge_on(data, count, 48, side, seed)
    told = worked(before, questions)
    spans = [s for s in ("thinking", "answer") if any(s in t.spans for t in told)]
    found = drift(before, after, told, over=spans, k=k, seed=seed, progress=not quiet)
    _save_measure(
        record,
        to,
        {"model": (model, after), "base": (base, before)},
        lambda folder: found.save(folder / "drift.json"),
        {"drift": found.frame()},
        data_input(data),
    )
    table = found.frame().query("measure == 'mean_shift'").rename(columns={"value": "mean_shift", "n_transcripts": "n"})
    columns = ["layer", "span", "mean_shift", "low", "high", "floor", "n"]
    typer.echo(table[columns].to_string(index=False, float_format="%.3f"))


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
    k: Annotated[
        int, typer.Option(help="Dimension of the principal subspaces; at most a matrix's short side is taken.", min=1)
    ] = 8,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Which weights moved: changed fractions, principal mask, spectra, rotation, rank."""
    record = begin_record("measure geometry", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    require_new(to)
    from analyses.geometry import geometry
    from surgery.checkpoint import Checkpoint
    from surgery.model import find
    from surgery.weights import require_same_sites

    after, before = Checkpoint(find(model)), Checkpoint(find(base))
    require_same_sites(after, before)
    found = geometry(before, after, at=at, density=density, filter_rank=filter_rank, k=k, progress=not quiet)
    if cut := found.cut():
        typer.echo(f"note: {cut}", err=True)
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
        str,
        typer.Argument(
            metavar="FIGURE",
            help="early-answers, drift, geometry, sweep, frontier, training, before-after, similarity, probes, probe-transfer, probe-along, "
            "reliability, heads, lens, lengths, accuracy-under-length, trade-off, paired, edit, edit-shares, edit-steering or edit-layers.",
        ),
    ],
    table: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            help="A .csv table, the log.jsonl of a watched training, or the folder of a command that has one.",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Image file: .png, .pdf or .svg.", show_default=False)],
    measure: Annotated[
        str | None, typer.Option(help="Which column or measure to draw, where there are several.", show_default=False)
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            "--x", help="trade-off: the measure to the right; by default what was learnt.", show_default=False
        ),
    ] = None,
    y: Annotated[
        str | None,
        typer.Option("--y", help="trade-off: the measure upwards; by default what was kept.", show_default=False),
    ] = None,
    width: Annotated[float, typer.Option(help="Inches.", min=1, max=100)] = 5.5,
) -> None:
    """Draw a saved table."""
    import pandas as pd

    from analyses import figures
    from analyses.flight import Flight

    if name not in figures.FIGURES:
        raise ValueError(f"There is no figure {name!r}. Choose {', '.join(figures.FIGURES)}.")
    if to.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--to {to}: the name must end in .png, .pdf or .svg.")
    require_new(to)
    path = _table_in(table, name)
    given = {"measure": measure, "x": x, "y": y}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    several = [n for n, f in figures.FIGURES.items() if "measure" in signature(f).parameters]
    if measure is not None and name not in several:
        raise ValueError(f"{name} draws one thing; --measure is for {', '.join(several)}.")
    if (x or y) and name != "trade-off":
        raise ValueError(f"{name} has its own axes; --x and --y are for trade-off.")
    try:
        frame = Flight.load(path).headlines() if path.suffix == ".jsonl" else pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is no table: {error}") from error
    try:
        drawn = figures.draw(figures.FIGURES[name], frame, width=width, **options)
    except KeyError as error:
        raise ValueError(
            f"{path} is no table for {name}: it lacks {error.args[0]!r}, and has the columns {', '.join(map(str, frame.columns))}."
        ) from error
    typer.echo(figures.save(drawn, to))


def _save_measure(
    record: Record, to: Path, inputs: dict[str, tuple[str, Any]], save: Callable[[Path], object], tables: dict[str, Any],
    others: Input | None = None,
) -> None:  # fmt: skip
    """A measure's folder: its own file, its tables as CSV, its record; whole or not at all."""
    from surgery.whole import new_folder

    with new_folder(to) as folder:
        save(folder)
        for name, table in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        record.inputs = {
            role: {"ref": ref, "hash": getattr(found, "checkpoint", found).hash()}
            for role, (ref, found) in inputs.items()
        } | (others or {})
        record.save(folder)


_TABLES = {
    "early-answers": ["curve.csv", "early-answers.csv"],
    "lengths": ["lengths.csv", "answers.csv"],
    "accuracy-under-length": ["answers.csv"],
    "frontier": ["sweep.csv"],
    "training": ["training.csv", "log.jsonl"],
    "probe-transfer": ["transfer.csv"],
    "probe-along": ["along.csv"],
    "trade-off": ["arms.csv"],
    "paired": ["differences.csv"],
}


def _tables_of(figure: str) -> list[str]:
    """The names that a figure's table has in a folder, its own first."""
    return ["edit.csv"] if figure.startswith("edit") else _TABLES.get(figure, [f"{figure}.csv"])


def _table_in(table: Path, figure: str) -> Path:
    """The CSV of a figure: the file itself, or the one in a measure's or study's folder."""
    from analyses.figures import FIGURES

    if table.is_file():
        return table
    names = _tables_of(figure)
    for name in names:  # its own before one in a folder within
        if there := [table / name] if (table / name).is_file() else sorted(table.rglob(name)):
            if len(there) > 1:
                raise ValueError(f"{table} has several tables for {figure}: give one of {', '.join(map(str, there))}.")
            return there[0]
    found = sorted({p.name for kind in ("*.csv", "log.jsonl") for p in table.rglob(kind)}) if table.is_dir() else []
    drawn = [other for other in FIGURES if set(_tables_of(other)) & set(found)]
    raise FileNotFoundError(
        f"{table} has no table for {figure} ({' or '.join(names)}); it has {', '.join(found) or 'no tables'}"
        f"{', which are drawn as ' * bool(drawn)}{', '.join(drawn)}."
    )
