"""The command line in this process, for every test that uses it."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import pytest
import typer.main

from analyses import cli

typer.main.get_command = functools.cache(typer.main.get_command)  # looks through all commands at each call, 0.05 s


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def surgery(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command as the console script does, in this process."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        return Said(int(left.value.code or 0), out, err)

    return run
