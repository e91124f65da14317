"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file, whole or not at all, its folder made where it is missing; gives its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder beside `to` that becomes `to` when the block ends well and vanishes when it does not.

    All of it is on the disk before it has its name, so that a power cut leaves it whole or not at all too. Leftovers of processes that were killed are removed. Raises FileExistsError when `to` exists.
    """
    if to.exists() or to.is_symlink():
        raise FileExistsError(f"{to} exists already and is never overwritten. Choose another --to, or remove it.")
    to.parent.mkdir(parents=True, exist_ok=True)
    for stale in to.parent.glob(f".{glob.escape(to.name)}.partial-*"):
        pid = stale.name.rsplit("-", 1)[-1]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    partial = to.parent / f".{to.name}.partial-{os.getpid()}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            flush(path)
        flush(partial)
        os.rename(partial, to)
        flush(to.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """A file's bytes, or the names in a folder, are on the disk when this returns; what is there already costs next to nothing."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
