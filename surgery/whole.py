"""Files and folders that are there whole or not at all, and whether there can be one."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from surgery.hashing import hash_bytes


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file, whole or not at all, its folder made where it is missing; gives its path."""
    path = Path(path)
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, to be written to, that takes its place when the block ends well and vanishes when it does not."""
    with _beside(path, lambda partial: partial.touch(exist_ok=False)) as partial:
        yield partial
        os.replace(partial, path)


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder beside `to` that becomes `to` when the block ends well and vanishes when it does not.

    All of it is on the disk before it has its name, so that a power cut leaves it whole or not at all too. Raises FileExistsError when `to` exists.
    """
    require_new(to)
    with _beside(to, Path.mkdir) as partial:
        yield partial
        for path in partial.rglob("*"):
            flush(path)
        flush(partial)
        os.rename(partial, to)
        flush(to.parent)


@contextmanager
def _beside(to: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A file or folder beside `to`, whose folder is made where it is missing, that is gone when the block ends, unless it has another name by then.

    What processes that were killed have left of this kind is removed: what no process holds a lock on, which the system gives back with the process.
    (Its number says little: it may be another's by now, or a process's of another machine or container.)
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    for stale in to.parent.glob(f".{glob.escape(to.name)}.partial-*"):
        if stale.name.rpartition("-")[2].isdecimal():
            with _locked(stale, wait=False) as nobodys:
                if nobodys:
                    _remove(stale)
    while True:
        partial = to.parent / f".{to.name}.partial-{secrets.randbelow(10**6)}"
        try:
            make(partial)
        except FileExistsError:
            continue
        with _locked(partial, wait=True):
            if not partial.exists():  # another process took it for a leftover before it had its lock
                continue
            try:
                yield partial
            finally:
                _remove(partial)
        return


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether a file or folder is this block's alone: False where another has it, where it is gone, and where there are no locks (some network drives)."""
    import fcntl

    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_new(to: Path) -> None:
    """Raise where no file or folder can be made at `to`: before long work, rather than after it.

    FileExistsError where there is one, or a link to nowhere; OSError where a file is in the way, or its folder cannot be written to.
    """
    if to.exists() or to.is_symlink():
        raise FileExistsError(f"{to} exists already and is never overwritten. Choose another --to, or remove it.")
    if reason := hindrance(to):
        raise OSError(f"{to} cannot be made: {reason}. Choose another --to.")


def hindrance(to: Path) -> str | None:
    """Why nothing new can be made at `to`, or within it where it is a folder: in words, None where it can. Tried, and taken back: permissions alone
    do not tell of all that is read-only."""
    to = to.absolute()
    there = next(p for p in (to, *to.parents) if p.exists())
    if not there.is_dir():
        return f"{there} is a file"
    try:
        with tempfile.TemporaryFile(dir=there):  # it has no name: a kill leaves nothing behind
            pass
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror})"
    return None


def claim(to: Path) -> None:
    """Keep `to` for this process until it ends. Raises FileExistsError where another process of the user, on this machine, has it: of two that work
    on one output, one would lose its hours, or both spoil what they keep to go on from."""
    import fcntl

    place = int(hash_bytes(str(to.resolve()).encode())[:14], 16)
    try:
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        raise FileExistsError(f"Another command is at work on {to}. Wait for it, or choose another --to.") from error


@cache
def _claims() -> int:
    """A file whose bytes stand for outputs: the system gives a lock back when its process ends, however it does."""
    path = Path(tempfile.gettempdir()) / f"surgery-{os.getuid()}.claims"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def flush(path: Path) -> None:
    """A file's bytes, or the names in a folder, are on the disk when this returns; what is there already costs next to nothing."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
