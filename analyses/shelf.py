"""Finished parts of long work in a folder, a file each, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.record import RECORD
from surgery.whole import write_whole

_PLAN = "plan.json"


def require_unfinished(to: Path, kind: str) -> None:
    """Raise FileExistsError where a folder holds finished work, which has its record: only what was interrupted goes on."""
    if (to / RECORD).exists():
        raise FileExistsError(
            f"{to} holds a finished {kind}; nothing is overwritten. Choose another --to, or remove it."
        )


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
        elif self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not a {kind}. Choose another folder, or remove it.")

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
