"""The command that fine-tunes a model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analyses.cli.given import data_input, spans_in, words_in
from analyses.cli.options import (
    CHANGE,
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
)  # fmt: skip
from analyses.cli.written import write_model

if TYPE_CHECKING:
    from analyses.tasks import Question
    from finetune.objectives import Objective
    from finetune.rules import DRIFT
    from surgery.checkpoint import Checkpoint
    from surgery.model import Model
    from surgery.record import Record

# written out, so that a name mistyped is told before libraries are loaded for seconds
METHODS = ("lift", "full", "lora", "shira", "grpo")
OBJECTIVES = {
    "nll": "plain fine-tuning", "dft": "dynamic fine-tuning", "asft": "anchored fine-tuning", "coverage": "direct coverage optimisation, DCO",
    "glow": "gain-based loss weighting",
}  # fmt: skip
_OBJECTIVES = tuple(f"{name} ({paper})" for name, paper in OBJECTIVES.items())
SELECTS = (
    "largest", "smallest", "random", "magnitude", "gradient", "movement", "hybrid", "random-triplets", "smallest-triplets",
)  # fmt: skip
SCOPES = ("matrix", "global")
RULES = ("absolute", "norm", "adaptive", "project", "aligned")


@app.command(rich_help_panel=CHANGE)
def tune(
    model: ModelRef,
    to: To,
    data: Questions = "sums",
    method: Annotated[str, typer.Option(help="lift, full, lora or shira; or grpo, which rewards right answers in the right form.")] = "lift",
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 60,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; by default 1e-3 (lift, lora, shira), 1e-4 (full), 2e-4 (grpo).", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Transcripts a step; of grpo: completions a step.", min=1)] = 16,
    accumulate: Annotated[int, typer.Option(help="Micro-batches a step.", min=1)] = 1,
    over: Annotated[
        str, typer.Option(help="What is learnt: a span, or several with weights, as in 'thinking[:16]:0.5,answer:2'.")
    ] = "completion",
    objective: Annotated[str, typer.Option(help=f"What is minimised: {', '.join(_OBJECTIVES)}.")] = "nll",
    mask_thought: Annotated[
        float | None, typer.Option(help="Hide this share of the tokens to learn in the input, in (0, 1].", show_default=False)
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="lift, grpo: fraction of each matrix, in (0, 1]; default 0.05.", show_default=False)
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="lift, grpo, shira: as many entries as a LoRA of this rank; lora: its rank.", min=1, show_default=False)
    ] = None,
    filter_rank: Annotated[int, typer.Option(help="lift, grpo: rank of the filter that decides what is principal.", min=1)] = 16,
    refresh: Annotated[
        int | None, typer.Option(help="lift, grpo: choose anew every so many steps; by default never.", min=1, show_default=False)
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            help="lift, grpo: largest, or a control: smallest (what the released code trains), random, magnitude, gradient, movement, hybrid, "
            "random-triplets, smallest-triplets."
        ),
    ] = "largest",
    block: Annotated[int, typer.Option(help="lift, grpo: choose blocks of so many rows and columns, as 4.", min=1)] = 1,
    scope: Annotated[str, typer.Option(help="lift, grpo: the budget of each matrix, or global: of all together.")] = "matrix",
    prior: Annotated[
        str | None, typer.Option(metavar="VECTOR", help="DRIFT: bend the gradients toward this task vector's folder.", show_default=False)
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="DRIFT: how strongly; default 1.", show_default=False)] = None,
    rule: Annotated[
        str | None, typer.Option(help="DRIFT: adaptive (the default), norm, absolute, project or aligned.", show_default=False)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="grpo: completions of each question; default 8.", min=2, show_default=False)] = None,
    beta: Annotated[float | None, typer.Option(help="grpo: weight of the KL from the start; default 0.", min=0, show_default=False)] = None,
    length_target: Annotated[
        int | None, typer.Option(help="grpo: also reward, by half, a thinking of about so many tokens; none costs most.", min=1, show_default=False)
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on what is trained.", min=0)] = 0.0,
    watch: Annotated[
        str, typer.Option(help="With commas: accuracy, nll, entropy, gradient, change, geometry, drift, drift-general, representation.")
    ] = "",
    watch_every: Annotated[
        int | None, typer.Option(help="Steps between measurements; by default as many as the budget allows.", min=1, show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of the training time that measuring may take; default 0.03.", min=0, show_default=False)
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="With commas: where else the log goes, as tensorboard (in runs/) or wandb.", show_default=False)
    ] = "",
    save_every: Annotated[
        int | None, typer.Option(help="Checkpoint every so many steps, and the same command resumes; by default none.", min=1, show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Fine-tune on worked questions, watched, and write the tuned model."""
    record = begin_record("tune", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    taught = {
        "--over": over != "completion", "--objective": objective != "nll", "--mask-thought": mask_thought is not None,
    }  # fmt: skip
    reinforced = {
        "--samples": samples is not None, "--beta": beta is not None, "--length-target": length_target is not None
    }  # fmt: skip
    led = {
        "--budget": (budget, watch, "--watch"),
        "--watch-every": (watch_every, watch, "--watch"),
        "--alpha": (alpha, prior, "--prior"),
        "--rule": (rule, prior, "--prior"),
    }
    for what, given, choices, told in (
        ("method", method, METHODS, METHODS), ("objective", objective, OBJECTIVES, _OBJECTIVES), ("select", select, SELECTS, SELECTS),
        ("rule", rule or "adaptive", RULES, RULES), ("scope", scope, SCOPES, SCOPES),
    ):  # fmt: skip
        if given not in choices:
            raise ValueError(f"There is no {what} {given!r}. Choose {', '.join(told)}.")
    _refuse_idle(method, reinforced if method != "grpo" else taught, led)
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"--lr {lr:g}: a learning rate is a finite number above 0.")
    if budget is not None and watch_every is not None:
        raise ValueError("--budget has no use with --watch-every, which says how often; leave one out.")
    from analyses import tasks
    from analyses.general_text import GENERAL_TEXT
    from analyses.watch import check_names, watches
    from finetune.grpo import Reinforced
    from finetune.learner import check_budget
    from finetune.tune import DEFAULTS, tune
    from surgery.model import Model
    from surgery.transcript import positions

    require_new(to)
    require_dtype(dtype)
    each = samples or 8
    if method == "grpo" and batch_size % each:
        raise ValueError(f"--batch-size {batch_size} is no multiple of the {each} samples of each question.")
    learnt = _spans(over)
    others = _reports(report_to)
    loaded = Model.load(model, device=device, dtype="float32")
    base = loaded.checkpoint
    assert base is not None  # loaded from a folder
    questions = tasks.load(data, None if tasks.is_file(data) else steps * batch_size, seed=seed, side="train")
    names = words_in(watch) if watch else []
    held = _held_out(data, seed + 1) if watch else []
    corrupt = _hiding(mask_thought, loaded, seed)
    options: dict[str, Any] = {
        name: value for name, value, usual in (("block", block, 1), ("scope", scope, "matrix")) if value != usual
    }
    pulled = _drift(prior, loaded, base, record, alpha, rule) if prior else None
    if dry_run:
        check_names(names, held, GENERAL_TEXT)
        trains = "lift" if method == "grpo" else method
        chosen = {"filter_rank": filter_rank, "refresh": refresh, "select": select}
        more = {name: value for name, value in chosen.items() if value != DEFAULTS[name]} | options
        check_budget(loaded, trains, density, lora_rank, more)
        if method != "grpo":
            positions(tasks.worked(loaded, questions[:1])[0], list(learnt))  # raises for what is no span
        typer.echo(
            f"{method}: {steps} steps of {batch_size} from {len(questions)} questions of {data}; first:\n{questions[0].question}\n{questions[0].completion(loaded.markers)}"
        )
        return
    workshop = to.with_name(f".{to.name}.tuning")  # logs and checkpoints until the model is written
    watched = watches(names, loaded, held, GENERAL_TEXT[:12], watch_every) if watch else []
    log = workshop / "log.jsonl"
    shared: dict[str, Any] = {
        "steps": steps, "lr": lr, "accumulate": accumulate, "density": density, "lora_rank": lora_rank, "filter_rank": filter_rank,
        "refresh": refresh, "weight_decay": weight_decay, "seed": seed, "save_every": save_every, "progress": not quiet,
        "checkpoints": workshop / "checkpoints" if save_every else None, "callbacks": [pulled] if pulled else [],
        "select": select, "watch": watched, "log": log if watched else None, "budget": 0.03 if budget is None else budget,
        "report_to": others,
    }  # fmt: skip
    if method == "grpo":
        options |= {"groups": batch_size // each, "samples": each, "beta": beta or 0.0}
        done = tune(loaded, questions, method="grpo", reward=_reward(loaded, length_target), options=options, **shared)
    else:
        done = tune(
            loaded,
            tasks.worked(loaded, questions),
            method=method,  # type: ignore[arg-type]
            batch_size=batch_size,
            over=learnt,
            objective=_objective(objective),
            corrupt=corrupt,
            options=options,
            **shared,
        )
    record.inputs |= data_input(data)
    record.results = {"losses": done.losses, "trainable": done.trainable}
    if done.refreshes:
        record.results["refreshes"] = [asdict(refresh) for refresh in done.refreshes]
    if isinstance(done, Reinforced):
        record.results["rounds"] = [_told(asdict(found)) for found in done.rounds]
    if done.shares:
        record.results["shares"] = done.shares
    if pulled:
        record.results["merged"] = pulled.merged().overall

    def keep_log(folder: Path) -> None:
        if watched:
            from analyses.flight import Flight, write_page

            shutil.copyfile(log, folder / "log.jsonl")
            write_page(folder / "log.jsonl")
            if never := Flight.load(log).unmeasured:
                typer.echo(
                    f"note: there was no time to measure {', '.join(never)}: give a larger --budget, or --watch-every, which measures whatever it takes",
                    err=True,
                )

    # what took an hour to train is written even if it loops, and says so
    written = write_model(
        record, loaded.weights, to, model=model, dtype=dtype, allow_loops=True, quiet=quiet, also=keep_log
    )
    shutil.rmtree(workshop, ignore_errors=True)
    typer.echo(f"loss {done.losses[0]:.3f} -> {done.losses[-1]:.3f}, {done.trainable:,} numbers free to move")
    for name, shares in done.shares.items():
        typer.echo(f"share of {name} tokens {shares[0]:.3f} -> {shares[-1]:.3f}")
    if pulled:
        typer.echo(f"effective merge coefficient {record.results['merged']:.3f}")
    typer.echo(written)


def _refuse_idle(method: str, unused: Mapping[str, bool], led: Mapping[str, tuple[object, object, str]]) -> None:
    """An option without effect is an error. unused: of another method. led: options with a value, the one they belong to, and its name."""
    for option, (value, owner, name) in led.items():
        if value is not None and not owner:
            raise ValueError(f"{option} belongs to {name}; without it, it does nothing.")
    for option, given in unused.items():
        if given:
            raise ValueError(f"{option} has no use with --method {method}; leave it out.")


def _reports(words: str) -> list[str]:
    """Where else the log goes. Raises ValueError for a name that transformers does not know, and for one that is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    names = words_in(words) if words else []
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except RuntimeError as error:
        raise ValueError(f"--report-to {words}: {error}") from error
    return names


def _spans(over: str) -> dict[str, float]:
    """ "thinking[:16]:0.5,answer:2" -> {"thinking[:16]": 0.5, "answer": 2.0}; without a number a span weighs 1."""
    from surgery.transcript import parse_span

    found = {}
    for entry in spans_in(over):
        name, colon, weight = entry.rpartition(":")
        if not colon or entry.endswith(("]", "/")):  # the colon is within the brackets or the pattern
            name, weight = entry, "1"
        try:
            found[name] = float(weight)
        except ValueError as error:
            raise ValueError(f"--over {over}: give spans with weights, as in 'thinking[:16]:0.5,answer:2'.") from error
        parse_span(name)
    return found


def _objective(name: str) -> Objective:
    from finetune import objectives

    made = {
        "nll": lambda: objectives.nll, "dft": lambda: objectives.dft, "asft": objectives.asft, "coverage": objectives.coverage,
        "glow": objectives.Glow,
    }  # fmt: skip
    return made[name]()


def _hiding(share: float | None, model: Model, seed: int) -> Any:
    if share is None:
        return None
    from finetune.objectives import MaskedThought

    return MaskedThought(model.pad_id, share, seed=seed)


def _held_out(data: str, seed: int) -> list[Question]:
    """Questions to watch on: 32, or as many as a file has on its test side."""
    from analyses import tasks

    found = tasks.load(data, None if tasks.is_file(data) else 32, seed=seed, side="test")[:32]
    if not found:
        raise ValueError(
            f"--watch measures on questions that are not trained on, and none of those in {data} is on the test side, where one in four goes: "
            "give more questions, or leave --watch out."
        )
    return found


def _reward(model: Model, length: int | None) -> Any:
    from analyses.tasks import grade
    from finetune.rewards import Answer, NearLength, ThinkFormat, Weighted

    parts: dict[str, Any] = {"answer": (Answer(grade), 1.0), "format": (ThinkFormat(model.markers), 0.5)}
    return Weighted(parts | ({"length": (NearLength(length), 0.5)} if length else {}))


def _told(found: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON holds it: what was not measured is left out."""
    nested = {key: _told(value) if isinstance(value, Mapping) else value for key, value in found.items()}
    return {key: value for key, value in nested.items() if not (isinstance(value, float) and math.isnan(value))}


def _drift(prior: str, model: Model, base: Checkpoint, record: Record, alpha: float | None, rule: str | None) -> DRIFT:
    from analyses.cli.dose import vector_of
    from finetune.rules import DRIFT

    change, entry, notes = vector_of(prior, base)
    for note in notes:
        typer.echo(note, err=True)
    record.inputs = {"model": {"ref": str(base.folder), "hash": base.hash()}, "prior": entry}
    return DRIFT(change, model, 1.0 if alpha is None else alpha, rule or "adaptive")  # type: ignore[arg-type]
