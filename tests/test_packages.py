"""Importing is free, and what a package offers is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import packages_distributions
from pathlib import Path
from types import FunctionType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("surgery", "probes", "finetune", "analyses")
HEAVY = ("torch", "transformers", "trl", "peft", "matplotlib", "pandas", "transformer_lens", "nnsight", "mergekit")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def test_importing_is_silent_and_loads_nothing_heavy() -> None:
    code = f"""
import sys
import surgery, probes, finetune, analyses, analyses.cli
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""
    done = python("-W", "error", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_offered_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        found = getattr(module, name)
        assert found.__name__ == name
        assert found.__module__.startswith(package + ".")
        assert inspect.getdoc(found), name
        methods = (FunctionType, property, cached_property, classmethod, staticmethod)
        offered = [m for m, v in vars(found).items() if isinstance(v, methods) and not m.startswith("_")]
        assert not [m for m in offered if not inspect.getdoc(getattr(found, m))], name
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        _ = module.nothing_of_that_name


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = f"""
import runpy, sys
sys.argv = ["surgery", "--help"]
try:
    runpy.run_module("analyses", run_name="__main__")
finally:
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, heavy
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    for command in ("specimen", "study", "tune", "diff", "apply", "inspect", "measure", "figure", "verify", "replay"):
        assert f" {command} " in done.stdout, command


def imported(package: str) -> Iterator[tuple[Path, str]]:
    """Each file of a package, and what it imports, at its top or inside a function: the first part of its name."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_left_and_only_analyses_draws(package: str) -> None:
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    forbidden = set(later) | (set() if package == "analyses" else {"matplotlib"})
    assert not [(path, name) for path, name in imported(package) if name in forbidden]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_asked_for(package: str) -> None:
    """A library that only comes along with another may go with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["interp"]]
    names = {canonicalize_name(Requirement(line).name) for line in asked}
    homes = packages_distributions()
    there = {*sys.stdlib_module_names, *PACKAGES}
    others = {name: path for path, name in imported(package) if name not in there}
    assert {n: p for n, p in others.items() if not names & {canonicalize_name(home) for home in homes[n]}} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_of_contents_names_every_module(package: str) -> None:
    contents = importlib.import_module(package).__doc__ or ""
    for path in (ROOT / package).glob("*.py"):
        if not path.stem.startswith("_"):
            assert path.stem in contents, path
