"""What commands are given to read, and the hashes by which records know it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from surgery.runs import Runs

RUNS = "runs.jsonl"
RunsRef = Annotated[
    str, typer.Option("--runs", help="Answers: a file of `surgery generate`, or its folder.", show_default=False)
]
Input = dict[str, dict[str, str]]
_BETWEEN_SPANS = re.compile(r",(?=[^/]*(?:/[^/]*/[^/]*)*$)")  # a comma that is not within the /.../ of a pattern


def spans_in(over: str) -> list[str]:
    """The spans of a list with commas, as in ``thinking, /so, then/``."""
    return [span.strip() for span in _BETWEEN_SPANS.split(over)]


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


def load_runs(ref: str) -> Runs:
    from surgery.runs import Runs

    return Runs.load(_runs_file(ref))


def model_input(model: Any, ref: str) -> Input:
    return {"model": {"ref": ref, "hash": model.checkpoint.hash()}}


def runs_input(ref: str) -> Input:
    return {"runs": {"ref": ref, "hash": hash_of(_runs_file(ref))}}


def data_input(data: str) -> Input:
    """Of questions from a file, the file; what is generated needs no hash."""
    return {"data": {"ref": data, "hash": hash_of(Path(data))}} if Path(data).is_file() else {}


def _runs_file(ref: str) -> Path:
    return Path(ref) / RUNS if Path(ref).is_dir() else Path(ref)
