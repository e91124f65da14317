"""Checkpoints that are whole and of this very run, whatever killed the last attempt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.hashing import hash_bytes
from surgery.whole import write_whole

_COMPLETE = "complete.json"
_RUN = "run.json"


def digest(data: Any) -> str:
    """What data are known by in a run's settings: 16 hexadecimal digits of the hash of their JSON."""
    return hash_bytes(json.dumps(data).encode())[:16]


def require_somewhere(save_every: int | None, folder: object) -> None:
    """Raise ValueError where checkpoints are asked for at no step, or nowhere to save them is said."""
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every={save_every}: a checkpoint every 1 or more steps, or None for none.")
    if save_every and not folder:
        raise ValueError("save_every needs checkpoints, the folder to save to.")


def mark_complete(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Say that everything of a checkpoint is written, and of which run it is."""
    write_whole(checkpoint / _COMPLETE, json.dumps(settings))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a trainer's folder, the oldest first, whole or not."""
    found = (p for p in folder.glob("checkpoint-*") if _step(p).isdecimal())
    return sorted(found, key=lambda p: int(_step(p)))


def is_complete(checkpoint: Path) -> bool:
    """Whether `mark_complete` was called of it."""
    return (checkpoint / _COMPLETE).is_file()


def last_complete(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The latest whole checkpoint of the run with these settings; None without one. Halves left by a kill are removed.

    The folder is marked as this run's. Raises ValueError, and removes nothing, where its checkpoints are another run's, naming what differs,
    or a trainer's that marks neither the folder nor them.
    """
    found = checkpoints(folder)
    whole = [p for p in found if is_complete(p)]
    mark = whole[-1] / _COMPLETE if whole else folder / _RUN
    if found and not mark.is_file():
        raise ValueError(
            f"{folder} holds {found[-1].name}, which is of no run that was begun here: it is left alone. Choose another folder, or remove it."
        )
    if found:
        require_same_run(folder, json.loads(mark.read_text(encoding="utf-8")), settings)
    write_whole(folder / _RUN, json.dumps(settings))
    for half in found:
        if half not in whole:
            shutil.rmtree(half)
    return whole[-1] if whole else None


def _step(checkpoint: Path) -> str:
    return checkpoint.name.rsplit("-", 1)[-1]


def discard(folder: Path) -> None:
    """Remove what a finished run of ours kept to be resumed."""
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / _RUN).unlink(missing_ok=True)


def require_same_run(folder: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, where the settings kept in a folder are not these."""
    settings = json.loads(json.dumps(settings))  # as they were kept: a tuple has become a list
    differing = [f"{k} was {saved.get(k)!r}, now {v!r}" for k, v in settings.items() if saved.get(k) != v]
    if differing:
        raise ValueError(
            f"{folder} holds a checkpoint of another run ({'; '.join(differing[:3])}). Choose another folder, or remove it."
        )
