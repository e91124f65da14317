"""The command line in this process, for every test that uses it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from analyses import cli


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
