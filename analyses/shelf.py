"""Finished parts of long work in a folder, a file each, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.record import RECORD
from surgery.whole import claim, hindrance, write_whole

_PLAN = "plan.json"


def require_unfinished(to: Path, kind: str) -> None:
    """Raise where no work of this kind can begin or go on in a folder: FileExistsError where it holds finished work, which has its record, or
    something else, or where another command is at work in it; OSError where it cannot be made or written to."""
    if (to / RECORD).exists():
        raise FileExistsError(
            f"{to} holds a finished {kind}; nothing is overwritten. Choose another --to, or remove it."
        )
    _require_own(to, kind)
    if reason := hindrance(to):
        raise OSError(f"There can be no {kind} in {to}: {reason}. Choose another --to.")
    claim(to)


def _require_own(folder: Path, kind: str) -> None:
    """Raise FileExistsError where there is something that is not unfinished work."""
    if (folder / _PLAN).is_file() or not (folder.exists() or folder.is_symlink()):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not a {kind}. Choose another --to, or remove it.")


class Shelf:
    """kind: what the work is called, in errors. plan: what all its parts have in common, as JSON holds it.

    Raises FileExistsError for a folder with another plan, naming what differs, and for one that holds something else, and ValueError for
    one whose plan is damaged. Nothing is written before the folder is claimed, or the first part kept.
    """

    def __init__(self, folder: str | Path, kind: str, plan: Mapping[str, Any]):
        self._folder, self._plan = Path(folder), json.loads(json.dumps(plan))
        path = self._folder / _PLAN
        if path.is_file():
            held = _read(path, f"Choose another folder, or remove {folder}: the {kind} then begins anew", dict)
            unlike = [name for name in self._plan if self._plan[name] != held.get(name)]
            if unlike:
                raise FileExistsError(
                    f"{folder} holds a {kind} with other {', '.join(unlike)} (see {path}). Choose another folder, or remove it."
                )
        _require_own(self._folder, kind)

    def claim(self) -> None:
        """Write the plan, for work that leaves other files in the folder before its first part is finished."""
        if not (self._folder / _PLAN).exists():
            write_whole(self._folder / _PLAN, json.dumps(self._plan, indent=2) + "\n")

    def find(self, name: str) -> Any:
        """The part of this name, or None where it is not finished. Raises ValueError for a damaged one."""
        path = self._folder / f"{name}.json"
        return _read(path, "Remove that file: this part is then done again") if path.is_file() else None

    def keep(self, name: str, part: Any) -> None:
        """Keep a part, which JSON can hold; one of that name is replaced."""
        self.claim()
        write_whole(self._folder / f"{name}.json", json.dumps(part) + "\n")


def _read(path: Path, fix: str, kind: type = object) -> Any:
    """What a file of JSON holds. Raises ValueError in one line, with what to do, for one that is damaged or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {fix}.") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} is damaged (it holds a {type(found).__name__}). {fix}.")
    return found
