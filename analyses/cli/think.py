"""Commands of reasoning length: generate, direction, heads, judge, and thinkedit, which is all of them with an edit."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.cli.given import (
    RUNS,
    RunsRef,
    Side,
    data_input,
    hash_of,
    load_runs,
    model_input,
    questions_to_judge_on,
    require_model,
    runs_input,
)
from analyses.cli.options import (
    CHANGE,
    LOOK,
    Device,
    DryRun,
    Dtype,
    ModelRef,
    Questions,
    Quiet,
    Seed,
    To,
    app,
    begin_record,
    require_dtype,
    require_new,
)
from analyses.cli.written import AllowLoops, write_model

if TYPE_CHECKING:
    from analyses.thinkedit import Found, Judged, ThinkEdit
    from probes.directions import Direction
    from surgery.model import Model
    from surgery.runs import Runs

Over = Annotated[
    str,
    typer.Option(
        help="What is read, and whose length counts: thinking; or answer, for a model without think marks; of either a part, answer[:16]."
    ),
]
Site = Annotated[str, typer.Option(help="Where the stream is read: attention (after it) or mlp (after it).")]
Share = Annotated[float, typer.Option(help="Of all heads, those that are edited; in (0, 1].")]
Strength = Annotated[float, typer.Option(help="0 does nothing, 1 removes the direction, 2 reflects it.")]
LikePaper = Annotated[
    bool,
    typer.Option(
        "--like-paper",
        help="The published recipe: absolute thresholds, read one token early, heads ranked on short answers.",
    ),
]
Short = Annotated[
    int | None, typer.Option(help="--like-paper: short is under so many tokens; default 100.", show_default=False)
]
Long = Annotated[
    int | None, typer.Option(help="--like-paper: long is over so many tokens; default 1000.", show_default=False)
]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy; by default 0 for one sample, 1 for several.", min=0, show_default=False),
]
Controls = Annotated[int, typer.Option(help="Random heads, and random directions: how many of each.", min=0)]
Sweeps = Annotated[bool, typer.Option("--sweeps/--no-sweeps", help="Other shares and strengths too.")]
Steer = Annotated[bool, typer.Option("--steer", help="Steer along the direction too, everywhere and layer by layer.")]
Heat = Annotated[float, typer.Option(help="Of all answers.", min=0)]
BatchSize = Annotated[int, typer.Option(help="Answers at once.", min=1)]
Passages = Annotated[int, typer.Option(help="Passages of general text.", min=1, max=40)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest completion, in tokens: a longer answer is cut off.", min=1)]


@app.command(rich_help_panel=LOOK)
def generate(
    model: ModelRef,
    to: Annotated[
        Path,
        typer.Option("--to", help="New file, ending in .jsonl; or new folder, with a record.", show_default=False),
    ],
    data: Questions = "sums",
    count: Annotated[
        int | None, typer.Option(help="Questions; by default all of a file, else 64.", min=1, show_default=False)
    ] = None,
    side: Side = None,
    samples: Annotated[int, typer.Option(help="Answers to each.", min=1)] = 1,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: Annotated[int, typer.Option(help="Answers at once.", min=1)] = 32,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Let MODEL answer questions, and keep the answers token by token."""
    record = begin_record("generate", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    require_new(to)
    from analyses.labels import graded_by
    from analyses.tasks import is_file
    from surgery.model import Model
    from surgery.runs import Runs, fingerprint

    questions = questions_to_judge_on(data, count, None if is_file(data) else 64, side, seed)
    if dry_run:
        require_model(model, device)
        typer.echo(
            f"{len(questions)} questions of {data}, {samples} answers each, would go to {to}; first:\n{questions[0].question}"
        )
        return
    loaded = Model.load(model, device=device, dtype="float32")
    told = loaded.generate(
        [q.question for q in questions],
        samples=samples,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=not quiet,
    )
    gold = {q.question: graded_by(q) for q in questions}
    kept = tuple(replace(t, meta={**t.meta, **gold[t.question]}) for t in told)
    runs = Runs(kept, fingerprint(loaded), {"model": model, **record.arguments, "typed": record.typed})
    if to.suffix == ".jsonl":
        runs.save(to)
    else:
        from surgery.whole import new_folder

        record.inputs = model_input(loaded, model) | data_input(data)
        with new_folder(to) as folder:
            # the words typed would differ on replay
            Runs(kept, runs.model, record.arguments).save(folder / RUNS)
            record.save(folder)
    ended = sum(t.finished for t in kept)
    typer.echo(f"{to}: {len(kept)} answers to {len(questions)} questions, {ended} ended by themselves")


@app.command(rich_help_panel=LOOK)
def direction(
    model: ModelRef,
    runs: RunsRef,
    to: To,
    of: Annotated[
        str, typer.Option(help="length (from short answers to long ones) or right (from wrong answers to right ones).")
    ] = "length",
    at: Annotated[
        str, typer.Option(help="Where: a pattern of activation sites such as '*.mid' or '14.resid'.")
    ] = "*.mid",
    over: Over = "thinking",
    like_paper: LikePaper = False,
    short: Short = None,
    long: Long = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """A direction of MODEL's stream from its own answers: one vector a site, with the AUC on questions it was not made from."""
    record = begin_record("direction", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    if of not in ("length", "right"):
        raise ValueError(f"--of {of}: choose length or right.")
    if of == "right" and like_paper:
        raise ValueError("--like-paper is a recipe for --of length.")
    recipe = _recipe(like_paper, short, long, **({"over": over} if of == "length" else {}))
    require_new(to)
    read = load_runs(runs)
    from surgery.edit_lists import DIRECTION
    from surgery.model import Model
    from surgery.whole import new_folder

    loaded = Model.load(model, device=device, dtype="float32")
    read.require(loaded)
    if of == "length":
        from probes.directions import length_direction

        how: dict[str, Any] = {"how": recipe.how, "short": recipe.short, "long": recipe.long}
        found = length_direction(loaded, read, at=at, over=over, of=recipe.span, seed=seed, progress=not quiet, **how)
    else:
        found = _of_right_answers(loaded, read, at, over, seed, quiet)
    found = replace(found, about={**found.about, "questions": _names(read)})
    table = found.frame()
    record.inputs = model_input(loaded, model) | runs_input(runs)
    record.results = {"about": dict(found.about), "sites": table.to_dict("records")}
    with new_folder(to) as folder:
        found.save(folder / DIRECTION)
        table.to_csv(folder / "direction.csv", index=False)
        record.save(folder)
    typer.echo(table.to_string(index=False, float_format="%.3f"))
    typer.echo(to)


@app.command(rich_help_panel=LOOK)
def heads(
    model: ModelRef,
    direction: Annotated[
        str,
        typer.Option(
            "--direction",
            help="A length direction: the folder of `surgery direction`, or its file.",
            show_default=False,
        ),
    ],
    runs: RunsRef,
    to: To,
    share: Share = 0.04,
    strength: Strength = 1.0,
    over: Over = "thinking",
    like_paper: LikePaper = False,
    short: Short = None,
    long: Long = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Which heads of MODEL write the brief side of a length direction; and `edits.yml`, with which `surgery edit` takes it out of them."""
    record = begin_record("heads", {k: v for k, v in locals().items() if k not in ("to", "quiet")})
    from surgery.whole import new_folder

    require_new(to)
    recipe = {
        "over": over,
        "share": share,
        "strength": strength,
        "like_paper": like_paper,
        "short": short,
        "long": long,
    }
    loaded, found, inputs = found_heads(model, direction, runs, recipe, device=device, quiet=quiet)
    table: Any = found.frame()
    record.inputs = model_input(loaded, model) | inputs
    record.results = {"heads": [str(s) for s in found.heads()], "share": share, "strength": strength}
    with new_folder(to) as folder:
        found.save(folder)
        table.to_csv(folder / "heads.csv", index=False)
        record.save(folder)
    typer.echo(
        table[table["edited"]][["rank", "site", "score", "low", "high", "n"]].to_string(
            index=False, float_format="%.4g"
        )
    )
    typer.echo(shlex.join(["surgery", "edit", model, "--edits", str(to / "edits.yml"), "--to", "OUT"]))


def found_heads(
    model: str,
    direction: str,
    runs: str,
    options: Mapping[str, Any],
    *,
    device: str,
    quiet: bool,
) -> tuple[Model, Found, dict[str, dict[str, str]]]:
    """The model, the heads that write the brief side of a direction in answers, and what of the direction and answers a record holds.

    options: of the recipe, as they were typed. Says so where the answers are to the questions that the direction is from.
    """
    from analyses.thinkedit import Found, rank_heads
    from probes.directions import Direction
    from surgery.edit_lists import direction_file
    from surgery.model import Model

    file = direction_file(direction)
    along = Direction.load(file)
    recipe = _recipe(**options, site=_site_of(along))
    read = load_runs(runs)
    shared = set(_names(read)) & set(along.about.get("questions", ()))
    if shared:
        typer.echo(
            f"note: {len(shared)} of the {len(read.questions)} questions are the direction's own: heads are better ranked on others",
            err=True,
        )
    loaded = Model.load(model, device=device, dtype="float32")
    read.require(loaded)
    ranked = rank_heads(loaded, along, read, recipe, progress=not quiet)
    inputs = runs_input(runs) | {"direction": {"ref": direction, "hash": hash_of(file)}}
    return loaded, Found(along, ranked, recipe), inputs


@app.command(rich_help_panel=LOOK)
def judge(
    model: ModelRef,
    found: Annotated[
        str,
        typer.Option(
            "--found",
            help="What was found: the folder of `surgery heads` or of `surgery thinkedit`.",
            show_default=False,
        ),
    ],
    to: To,
    data: Questions = "sums",
    count: Annotated[
        int | None, typer.Option(help="Questions; by default 24, of a file at most.", min=2, show_default=False)
    ] = None,
    side: Side = None,
    samples: Annotated[int, typer.Option(help="Answers to each.", min=1)] = 1,
    controls: Controls = 3,
    sweeps: Sweeps = True,
    steer: Steer = False,
    temperature: Heat = 1.0,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 32,
    passages: Passages = 16,
    device: Device = "auto",
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """What taking a found direction out of its heads does to MODEL, beside random heads and random directions; nothing is edited.

    Give questions that neither direction nor heads were found on; of generated ones, those of another --seed. Interrupted, the same command
    goes on.
    """
    record = begin_record("judge", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    require_new(to)
    from analyses import thinkedit
    from surgery.model import Model
    from surgery.whole import new_folder

    inside = Path(found) / "thinkedit" / "found"
    folder = inside if inside.is_dir() else Path(found)
    if not (folder / "heads.safetensors").is_file():
        raise FileNotFoundError(
            f"{found} holds no heads: give the folder of `surgery heads` or of `surgery thinkedit`."
        )
    known = thinkedit.Found.load(folder)
    questions = questions_to_judge_on(data, count, 24, side, seed)
    heads = known.heads()
    if dry_run:
        require_model(model, device)
        typer.echo(
            f"{len(heads)} heads at strength {known.recipe.strength:g}, judged on {len(questions)} questions of {data}, {samples} answers each; "
            f"would go to {to}"
        )
        return
    if shared := {q.question for q in questions} & set(known.contributions.question):
        typer.echo(f"note: {len(shared)} of the {len(questions)} questions are those the heads were found on", err=True)
    loaded = Model.load(model, device=device, dtype="float32")
    known.direction.require(loaded)
    workshop = to.with_name(f".{to.name}.judge")  # measurements until all are there
    judged = thinkedit.judge(
        loaded, known, questions, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
        to=workshop, progress=not quiet, **_panels(controls, sweeps, steer, passages),
    )  # fmt: skip
    effects = judged.effects()
    files = {name: hash_of(folder / f"{name}.safetensors") for name in ("direction", "heads")}
    record.inputs = model_input(loaded, model) | data_input(data)
    record.inputs |= {
        name: {"ref": str(folder / f"{name}.safetensors"), "hash": known_by} for name, known_by in files.items()
    }
    record.results = {
        "heads": [str(s) for s in heads],
        "questions": len(questions),
        "effects": effects.to_dict("records"),
    }
    with new_folder(to) as made:
        judged.save(made / "judged")
        _write_judged(judged, made)
        record.save(made)
    shutil.rmtree(workshop, ignore_errors=True)
    typer.echo(effects.to_string(index=False, float_format="%.4g"))
    typer.echo(to)


@app.command(rich_help_panel=CHANGE)
def thinkedit(
    model: ModelRef,
    to: To,
    data: Questions = "sums",
    count: Annotated[
        int | None,
        typer.Option(
            help="Questions: two fifths each for the direction and for judging, one for heads; by default 60, of a file at most.",
            min=10,
            show_default=False,
        ),
    ] = None,
    side: Side = None,
    samples: Annotated[int, typer.Option(help="Answers to a question of the first two parts.", min=2)] = 4,
    share: Share = 0.04,
    strength: Strength = 1.0,
    site: Site = "attention",
    over: Over = "thinking",
    like_paper: LikePaper = False,
    short: Short = None,
    long: Long = None,
    controls: Controls = 3,
    sweeps: Sweeps = True,
    steer: Steer = False,
    temperature: Heat = 1.0,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 32,
    passages: Passages = 16,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Seed = 0,
    allow_loops: AllowLoops = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """MODEL without what makes it think briefly: length direction, the heads that write it, the edit, and what it does beside controls.

    Questions for the direction, for the heads and for judging are different ones. Interrupted, the same command goes on.
    """
    record = begin_record("thinkedit", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    recipe = _recipe(like_paper, short, long, over=over, share=share, strength=strength, site=site)
    if strength == 0:
        raise ValueError("--strength 0 does nothing: give one above 0, up to 2.")
    require_new(to)
    from analyses.thinkedit import split, thinkedit
    from surgery.model import Model
    from surgery.sites import match

    questions = questions_to_judge_on(data, count, 60, side, seed)
    parts = [len(part) for part in split(questions, seed=seed)]
    require_dtype(dtype)
    if dry_run:
        match(recipe.at, require_model(model, device).anatomy.activation_sites())
        typer.echo(
            f"{parts[0]} questions of {data} for the direction and {parts[1]} for the heads, {samples} answers each; {parts[2]} for judging; "
            f"{share:.1%} of the heads at strength {strength:g}; would go to {to}"
        )
        return
    loaded = Model.load(model, device=device, dtype="float32")
    base = loaded.checkpoint
    assert base is not None  # loaded from a folder
    workshop = to.with_name(f".{to.name}.thinkedit")  # answers and measurements until the model is written
    done = thinkedit(
        loaded, questions, recipe, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
        to=workshop, progress=not quiet, **_panels(controls, sweeps, steer, passages),
    )  # fmt: skip
    heads, effects = done.found.heads(), done.frame()
    record.inputs = data_input(data)
    record.results = {
        "heads": [str(s) for s in heads],
        "direction": {"file": "thinkedit/found/direction.safetensors", **dict(done.found.direction.about)},
        "auc": {str(s): [a.value, a.low, a.high, a.n] for s, a in done.found.direction.auc.items()},
        "questions": dict(zip(("direction", "heads", "judging"), parts, strict=True)),
        "effects": effects.to_dict("records"),
    }
    written = write_model(
        record, done.edited(base), to, model=model, dtype=dtype, allow_loops=allow_loops, quiet=quiet,
        also=lambda folder: _write_found(done, folder), reproducible=["*.safetensors", "*.csv"],
    )  # fmt: skip
    shutil.rmtree(workshop, ignore_errors=True)
    typer.echo(effects.to_string(index=False, float_format="%.4g"))
    typer.echo(f"{len(heads)} heads: {', '.join(map(str, heads))}")
    typer.echo(written)


def _panels(controls: int, sweeps: bool, steer: bool, passages: int) -> dict[str, Any]:
    """What is measured beside the edit itself, as `analyses.thinkedit.judge` takes it."""
    from analyses.general_text import GENERAL_TEXT
    from analyses.thinkedit import SHARES, STRENGTHS

    return {
        "controls": controls,
        "texts": GENERAL_TEXT[:passages],
        "strengths": STRENGTHS if sweeps else (),
        "shares": SHARES if sweeps else (),
        "steering": (-0.08, -0.04, 0.04, 0.08) if steer else (),
        "layerwise": (-1.0, 1.0) if steer else (),
    }


def _write_found(done: ThinkEdit, folder: Path) -> None:
    """What was found, as files that reload, tables and figures."""
    from analyses import figures

    inside = folder / "thinkedit"
    done.save(inside)
    _write_judged(done.judged, inside)
    tables = {"heads": done.found.frame(), "lengths": done.lengths(), "direction": done.found.direction.frame()}
    for name, table in tables.items():
        table.to_csv(inside / f"{name}.csv", index=False)
    for name, draw in (("lengths", figures.lengths), ("heads", figures.heads)):
        figures.save(figures.draw(draw, tables[name]), inside / "figures" / f"{name}.png")


def _write_judged(judged: Judged, folder: Path) -> None:
    """What an edit does, as tables and figures."""
    from analyses import figures

    panels, answers = judged.frame(), judged.answers()
    for name, table in (("effects", judged.effects()), ("edit", panels), ("answers", answers)):
        table.to_csv(folder / f"{name}.csv", index=False)
    drawn = {"accuracy-under-length": figures.draw(figures.accuracy_under_length, answers)}
    for panel in dict.fromkeys(panels["panel"]):
        for measure in ("length", "accuracy"):
            if ((panels["panel"] == panel) & (panels["measure"] == measure)).any():
                drawn[f"{panel}-{measure}"] = figures.draw(figures.edit_sweep, panels, panel=panel, measure=measure)
    for name, figure in drawn.items():
        figures.save(figure, folder / "figures" / f"{name}.png")


def _of_right_answers(model: Any, runs: Runs, at: str, over: str, seed: int, quiet: bool) -> Direction:
    from analyses.labels import right_or_wrong
    from probes.activations import collect
    from probes.directions import mean_difference
    from surgery.transcript import positions

    known = right_or_wrong(runs)
    having = [i for i, t in enumerate(runs) if positions(t, over)]
    if not having:
        raise ValueError(f"None of the {len(runs)} answers has a span {over!r}.")
    labels = [known[i] for i in having]
    read = [runs[i] for i in having]
    acts = collect(model, read, at=at, over=over, pool="mean", progress=not quiet)
    return mean_difference(acts, labels, [t.question for t in read], model=model, seed=seed)


def _recipe(like_paper: bool = False, short: int | None = None, long: int | None = None, **options: Any) -> Any:
    from analyses.thinkedit import PAPER, Recipe

    given = {name: value for name, value in (("short", short), ("long", long)) if value is not None}
    if given and not like_paper:
        raise ValueError(
            f"--{next(iter(given))} is a threshold of --like-paper: without it, each question's answers are compared."
        )
    return replace(PAPER if like_paper else Recipe(), **given, **options)


def _site_of(direction: Direction) -> str:
    """Which of the recipe's sites a direction was read at."""
    parts = {site.part for site in direction}
    if parts not in ({"mid"}, {"resid"}):
        raise ValueError(
            f"Heads are edited along a direction at mid or at resid; this one is at {', '.join(sorted(parts))}."
        )
    return "attention" if parts == {"mid"} else "mlp"


def _names(runs: Runs) -> list[str]:
    """The questions, each as a short hash."""
    from surgery.hashing import hash_bytes

    return sorted(hash_bytes(q.encode())[:16] for q in runs.questions)
