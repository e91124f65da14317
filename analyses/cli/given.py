"""What commands are given to read, and the hashes by which records know it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from analyses.tasks import Question
    from surgery.checkpoint import Checkpoint
    from surgery.runs import Runs

RUNS = "runs.jsonl"
RunsRef = Annotated[
    str, typer.Option("--runs", help="Answers: a file of `surgery generate`, or its folder.", show_default=False)
]
Side = Annotated[
    str | None,
    typer.Option(
        "--side",
        help="Of --data: test leaves out what `surgery tune` trains on, three in four of a file; by default all of a file, and of what is "
        "generated the test side.",
        show_default=False,
    ),
]
Input = dict[str, dict[str, str]]
_BETWEEN_SPANS = re.compile(r",(?=[^/]*(?:/[^/]*/[^/]*)*$)")  # a comma that is not within the /.../ of a pattern


def spans_in(over: str) -> list[str]:
    """The spans of a list with commas, as in ``thinking, /so, then/``."""
    return [span.strip() for span in _BETWEEN_SPANS.split(over)]


def words_in(listed: str) -> list[str]:
    """The words of a list with commas, with or without blanks."""
    return [word.strip() for word in listed.split(",")]


def questions_to_judge_on(
    data: str, count: int | None, usual: int | None, side: str | None, seed: int
) -> list[Question]:
    """Questions of `--data`, `--count` and `--side`; says how many of a whole file `surgery tune` trains on.

    usual: how many where no count is given, of a file at most; None: all of it.
    """
    from analyses import tasks

    if side not in (None, "test", "all"):
        raise ValueError(f"--side {side}: choose test or all.")
    file = tasks.is_file(data)
    found = questions_of(data, count, usual, seed=seed, side=side or ("all" if file else "test"))
    trained = sum(tasks.side_of(q.question) == "train" for q in found)
    if file and side is None and trained:
        typer.echo(
            f"note: {len(found)} questions of {data}, and `surgery tune` trains on {trained} of them: --side test leaves those out",
            err=True,
        )
    return found


def questions_of(
    data: str, count: int | None, usual: int | None, *, seed: int, side: str = "all", option: str = "--count"
) -> list[Question]:
    """As many questions as `option` says; without it the usual number, or of a file with fewer all."""
    from analyses import tasks

    chosen: Any = side
    if not tasks.is_file(data):
        return tasks.load(data, usual if count is None else count, seed=seed, side=chosen)
    found = tasks.load(data, seed=seed, side=chosen)
    where = " on the test side" if side == "test" else ""
    if not found:
        raise ValueError(
            f"None of the questions of {data} is{where}, where one in four goes: give more questions, or others to judge on."
        )
    if count is not None and count > len(found):
        raise ValueError(f"{option} {count}: {data} has {len(found)} questions{where}. Ask for fewer, or leave it out.")
    return found[: usual if count is None else count]


def hash_of(path: Path) -> str:
    """Of a model's folder, of a safetensors file's tensors, or of another file's bytes."""
    from surgery.checkpoint import Checkpoint
    from surgery.hashing import hash_file

    if path.is_dir():
        return Checkpoint(path).hash()
    return hash_of_tensors(path) if path.suffix == ".safetensors" else hash_file(path)


def hash_of_tensors(path: Path) -> str:
    import json

    from surgery.hashing import hash_bytes
    from surgery.tensorfile import hash_file_tensors

    return hash_bytes(json.dumps(hash_file_tensors(path), sort_keys=True).encode())


def require_model(ref: str, device: str = "cpu") -> Checkpoint:
    """The checkpoint that a run would load, and onto which device: for a dry run, which loads none. Raises as loading does."""
    from surgery.checkpoint import Checkpoint
    from surgery.model import find, pick_device

    pick_device(device)
    return Checkpoint(find(ref))


def load_runs(ref: str) -> Runs:
    from surgery.runs import Runs

    return Runs.load(_runs_file(ref))


def model_input(model: Any, ref: str) -> Input:
    return {"model": {"ref": ref, "hash": model.checkpoint.hash()}}


def runs_input(ref: str) -> Input:
    return {"runs": {"ref": ref, "hash": hash_of(_runs_file(ref))}}


def data_input(data: str, role: str = "data") -> Input:
    """Of questions from a file, the file; what is generated needs no hash."""
    from analyses.tasks import is_file

    return {role: {"ref": data, "hash": hash_of(Path(data))}} if is_file(data) else {}


def _runs_file(ref: str) -> Path:
    return Path(ref) / RUNS if Path(ref).is_dir() else Path(ref)
