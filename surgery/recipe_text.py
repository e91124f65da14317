"""A recipe's YAML, from wherever it is given, and which of its models are one folder: read without torch, numpy or mergekit."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.yaml_text import load_yaml

_MAX_TEXT = 1 << 20


class RecipeError(ValueError):
    """A recipe that cannot be merged: the message says what is asked, what there is and what to do."""


def recipe_text(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, str]:
    """The YAML of a file, of text (with a line break, or in braces) or of a mapping, and what to call it in messages.

    Raises RecipeError for anything else and for a file that is no text or too long, FileNotFoundError for one that is not there.
    """
    import yaml

    where = recipe_name(source)
    if isinstance(source, Mapping):
        return yaml.safe_dump(_plain(source, ""), sort_keys=False), where
    if is_yaml(source):
        text = str(source)
    else:
        path = Path(source)
        if not path.is_file():
            there = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {there}. A recipe is a YAML file in mergekit's format.")
        if path.stat().st_size > _MAX_TEXT:
            raise RecipeError(
                f"{path} has {path.stat().st_size} bytes; a recipe has a few hundred. Name the recipe itself."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path} is not text ({error.reason} at byte {error.start}). Name the recipe itself."
            ) from error
    if len(text) > _MAX_TEXT:
        raise RecipeError(f"{where} has {len(text)} characters; a recipe has a few hundred. Name the recipe itself.")
    return text, where


def recipe_name(source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """What messages call a recipe: the file's path, if it is one. Raises RecipeError for what is no source of a recipe."""
    if not isinstance(source, str | os.PathLike | Mapping) or (isinstance(source, str) and not source.strip(" ")):
        raise RecipeError(
            f"A recipe is the path of a YAML file, YAML text or a mapping, and this is {reprlib.repr(source)}."
        )
    return "The recipe" if isinstance(source, Mapping) or is_yaml(source) else str(Path(source))


def is_yaml(source: str | os.PathLike[str]) -> bool:
    """Whether this is a recipe's text, and not a file's path."""
    return isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{"))


def _plain(value: Any, place: str) -> Any:
    """What is in a mapping, as YAML has it: a path as its text, a number of numpy as one of Python."""
    if isinstance(value, Mapping):
        return {key: _plain(entry, f"{place}.{key}".lstrip(".")) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{place}.{i}") for i, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    import numpy as np

    plain = value.item() if isinstance(value, np.generic) else value
    if type(plain) in (bool, int, float, str):
        return plain
    raise RecipeError(f"The recipe: {place} is {reprlib.repr(value)}. Write text, a number, a list or a mapping.")


def parse_recipe(text: str, where: str) -> dict[str, Any]:
    """The mapping that a recipe's YAML is. Raises RecipeError, in one line, for what is no YAML or no mapping."""
    import yaml

    try:
        tree = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        said = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"{where} is not YAML{at}: {said if said.isprintable() else ascii(said)}. Correct it."
        ) from error
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"is {reprlib.repr(tree)}, not a mapping"
        raise RecipeError(f"{where} {found}. Write at least merge_method: and models: (see mergekit's examples).")
    return tree


def one_place(path: str) -> str:
    """The folder that a path leads to, however it is spelt (``a``, ``a/``, ``./a``, a link); what is no folder here, as written."""
    place = os.path.expanduser(path)
    return os.path.realpath(place) if os.path.isdir(place) else path
