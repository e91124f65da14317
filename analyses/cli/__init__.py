"""The command line. Each command is a function whose signature declares its options once: `replay` calls the same function.

Nothing heavy is imported before a command runs, so that ``--help`` is immediate.

options    what commands share
given      what they read, and its hashes
start      specimen, study
tuning     tune
change     diff, apply, merge, edit, realign
written    how every command that makes a model writes it
arms       arms
look       inspect, check, measure, figure
dose       sweep
think      generate, direction, heads, judge, thinkedit
probing    probe, probe-calibration, probe-transfer, probe-along
seeing     seeing
receipts   verify, replay, undo
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from analyses.cli.options import app

# isort: off
from analyses.cli import start as start  # the help is in the order of these lines
from analyses.cli import tuning as tuning
from analyses.cli import change as change
from analyses.cli import arms as arms
from analyses.cli import look as look
from analyses.cli import dose as dose
from analyses.cli import think as think
from analyses.cli import probing as probing
from analyses.cli import seeing as seeing
from analyses.cli import receipts as receipts
# isort: on

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


INTERRUPTED = "surgery: interrupted; nothing half-written was left"


def main() -> None:
    """The console script: one clear line for what went wrong, and an exit code that says what kind it was."""
    try:
        sys.argv[1:] = map(_at_home, sys.argv[1:])
        with interrupts_heard():
            app()
    except KeyboardInterrupt:
        typer.echo(INTERRUPTED, err=True)
        sys.exit(130)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer's, for an interrupt
            typer.echo(INTERRUPTED, err=True)
        raise
    except (ValueError, OSError, KeyError, FloatingPointError) as error:
        typer.echo(f"surgery: {error.args[0] if isinstance(error, KeyError) and error.args else error}", err=True)
        sys.exit(1 if type(error).__name__ == "VerificationError" else 2)


def _at_home(word: str) -> str:
    """A word with its ``~/`` spelt out: shells leave it in ``--to=~/out`` and where it is quoted, and the output would be in a folder called
    ``~``."""
    option, given, path = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{given}{os.path.expanduser(path)}" if path.startswith("~/") else word


@contextmanager
def interrupts_heard() -> Iterator[None]:
    """An interrupt that falls into a finalizer, where Python drops every exception, comes once more: a collection of garbage, half a second
    at the end of each training, hands its signals to the first finalizer it calls. One that falls into a wait for a thread, just where the
    thread's lock is not held, is turned by Python into an error about that lock: it is an interrupt again."""
    usual, again = sys.unraisablehook, threading.Timer(0, lambda: None)

    def hear(lost: UnraisableHookArgs) -> None:
        nonlocal again
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            usual(lost)
            return
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hear
    try:
        yield
    except RuntimeError as error:
        before: BaseException | None = error
        while before is not None and not isinstance(before, KeyboardInterrupt):
            before = before.__context__
        if before is None:
            raise
        raise KeyboardInterrupt from error
    finally:
        again.cancel()
        sys.unraisablehook = usual
