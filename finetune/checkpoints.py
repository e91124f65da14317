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


def digest(data: Any) -> str:
    """What data are known by in a run's settings: 16 hexadecimal digits of the hash of their JSON."""
    return hash_bytes(json.dumps(data).encode())[:16]


def mark_complete(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Say that everything of a checkpoint is written, and of which run it is."""
    write_whole(checkpoint / _COMPLETE, json.dumps(settings))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a trainer's folder, the oldest first, whole or not."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]))


def last_complete(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The latest whole checkpoint of the run with these settings; None without one. Halves left by a kill are removed.

    Raises ValueError, naming what differs, where it is another run's.
    """
    found = checkpoints(folder)
    whole = [p for p in found if (p / _COMPLETE).is_file()]
    for half in set(found) - set(whole):
        shutil.rmtree(half)
    if not whole:
        return None
    require_same_run(folder, json.loads((whole[-1] / _COMPLETE).read_text(encoding="utf-8")), settings)
    return whole[-1]


def require_same_run(folder: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, where the settings kept in a folder are not these."""
    settings = json.loads(json.dumps(settings))  # as they were kept: a tuple has become a list
    differing = [f"{k} was {saved.get(k)!r}, now {v!r}" for k, v in settings.items() if saved.get(k) != v]
    if differing:
        raise ValueError(
            f"{folder} holds a checkpoint of another run ({'; '.join(differing[:3])}). Choose another folder, or remove it."
        )
