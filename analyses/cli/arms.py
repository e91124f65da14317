"""The command that tunes in several ways with several seeds, and compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from analyses.cli.given import data_input, questions_of, require_model, words_in
from analyses.cli.options import CHANGE, Device, DryRun, ModelRef, Questions, Quiet, To, app, begin_record

WAYS: dict[str, dict[str, Any]] = {
    "lift": {"method": "lift"},
    "smallest": {"method": "lift", "select": "smallest"},
    "random": {"method": "lift", "select": "random"},
    "magnitude": {"method": "lift", "select": "magnitude"},
    "lora": {"method": "lora"},
    "shira": {"method": "shira"},
    "full": {"method": "full"},
}
USUAL = [way for way in WAYS if way != "shira"]  # whose random entries LIFT trains as well, in less time


@app.command(rich_help_panel=CHANGE)
def arms(
    model: ModelRef,
    to: To,
    ways: Annotated[str, typer.Option("--arms", help=f"With commas, of {', '.join(WAYS)}; the first is what others are compared with.")] = ",".join(USUAL),
    data: Questions = "sums",
    seeds: Annotated[int, typer.Option(help="Runs of each arm.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.", min=1)] = 32,
    batch_size: Annotated[int, typer.Option(help="Transcripts a step.", min=1)] = 16,
    target: Annotated[str | None, typer.Option(help="Held-out questions; by default the test side of --data.", show_default=False)] = None,
    items: Annotated[
        int | None,
        typer.Option(help="Held-out questions, and of each --keep; by default 100, of a file at most.", min=2, show_default=False),
    ] = None,
    answered: Annotated[int, typer.Option(help="Of those, how many are also answered and graded.", min=0)] = 50,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="JSONL of questions with options, for what should not be forgotten; may be repeated.", show_default=False),
    ] = None,
    passages: Annotated[int, typer.Option(help="Passages of general text.", min=0, max=40)] = 16,
    device: Device = "auto",
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Tune in several ways with several seeds; say what each learnt and what it kept, with paired intervals."""
    record = begin_record("arms", {k: v for k, v in locals().items() if k not in ("to", "dry_run", "quiet")})
    from analyses import tasks
    from analyses.arms import arms as compare
    from analyses.figures import draw, paired, panels, save, trade_off
    from analyses.general_text import GENERAL_TEXT
    from analyses.shelf import require_unfinished

    require_unfinished(to, "comparison")
    chosen = words_in(ways)
    if unknown := [way for way in chosen if way not in WAYS]:
        raise ValueError(f"There is no arm {unknown[0]!r}. Choose from {', '.join(WAYS)}.")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--arms {ways}: each arm once; --seeds says how often each is run.")
    train = tasks.load(data, None if tasks.is_file(data) else steps * batch_size, seed=0, side="train")
    side = "all" if target else "test"
    held = questions_of(target or data, items, 100, seed=1, side=side, option="--items")
    files = {path: Path(path).stem for path in keep or ()}
    stems = [Path(path).stem for path in keep or ()]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise ValueError(
            f"Two files of --keep are called {twice[0]!r}, which is what their measures would be called: rename one."
        )
    kept = {stem: questions_of(path, items, 100, seed=1, option="--items") for path, stem in files.items()}
    record.inputs = data_input(data) | (data_input(target, "target") if target else {})
    for path, stem in files.items():
        record.inputs |= data_input(path, f"keep {stem}")
    if dry_run:
        require_model(model, device)
        typer.echo(
            f"{len(chosen)} arms x {seeds} seeds of {steps} steps; {len(train)} questions to learn, {len(held)} held out, kept: {', '.join(kept) or 'text only'}"
        )
        return
    found = compare(
        model, {way: WAYS[way] for way in chosen}, train, target=held, to=to, choices=kept, texts=GENERAL_TEXT[:passages],
        generate=min(answered, len(held)), seeds=seeds, device=device, progress=not quiet, steps=steps, batch_size=batch_size,
    )  # fmt: skip
    record.inputs |= {"model": {"ref": model, "hash": found.settings["weights"]}}
    found.save(to / "arms.json")
    found.frame().to_csv(to / "arms.csv", index=False)
    if len(chosen) > 1:
        differences = found.differences()
        differences.to_csv(to / "differences.csv", index=False)
        save(panels(paired, differences), to / "differences.png")
    if kept or passages:
        save(draw(trade_off, found.frame()), to / "trade_off.png")
    record.results = {"rows": found.frame().to_dict("records")}
    record.save(to, reproducible=["arms.csv", "differences.csv"])
    typer.echo(found.frame().drop(columns=["by_seed"]).round(4).to_string(index=False))
