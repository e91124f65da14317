"""A merge as mergekit's YAML says it, read by mergekit's own classes."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from surgery.yaml_text import load_yaml

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import MergeMethod

DTYPES = ("float32", "bfloat16", "float16", "float64")
Compute = Literal["float32", "mergekit"]
_FRACTIONS = ("density", "gamma", "select_topk")  # parameters that are shares of a tensor's entries
_OURS = "surgery"  # the one key of a recipe that is not mergekit's; mergekit ignores it
_MAX_TEXT = 1 << 20


class RecipeError(ValueError):
    """A recipe that cannot be merged: the message says what is asked, what there is and what to do."""


@dataclass(frozen=True)
class Recipe:
    """A merge as mergekit's YAML says it.

    text:    the YAML itself. config: mergekit's own reading of it.
    seed:    of the random methods; from ``surgery: {seed: 3}``, else 0.
    compute: ``float32``, or ``mergekit`` for mergekit's choice of dtype; from ``surgery: {compute: ...}``.
    unused:  names of parameters it sets that the method does not have. mergekit ignores them, and so do we.
    """

    text: str
    config: MergeConfiguration
    seed: int = 0
    compute: Compute = "float32"
    unused: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """Name of the merge method."""
        return self.config.merge_method

    @property
    def base(self) -> str | None:
        """The base model's reference, if there is one."""
        return None if self.config.base_model is None else str(self.config.base_model)

    @property
    def models(self) -> list[str]:
        """Every model's reference as written, each once, the base first."""
        return [str(ref) for ref in references(self.config)]


def read_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file, from YAML text (with a line break, or in braces), or from a mapping, in which paths and numpy's numbers may be.

    Nothing but the recipe is read. Raises RecipeError for what is no recipe, YAML that is none, keys that mergekit refuses, a method it does
    not have (naming the closest), a base or a number of models the method cannot work with, and parameters it needs and does not get, or
    that are no numbers, or no fractions where they should be; FileNotFoundError for a file that is not there.
    """
    _require_mergekit()
    text, where = _recipe_text(source)
    tree = _parse(text, where)
    own = tree.pop(_OURS, None) or {}
    config = _validated(tree, where)
    method = _method(config.merge_method, where)
    for key in ("dtype", "out_dtype"):
        value = getattr(config, key)
        if value is not None and value.removeprefix("torch.") not in DTYPES:
            raise RecipeError(f"{where}: {key} {value!r} is not one of {', '.join(DTYPES)}.")
    groups = _groups(config)
    for label, inputs, base in groups:
        _require_ranges(inputs, f"{where}: {label}")
        try:
            method.validate_inputs([source.model for source in inputs], base, group_name=label)
        except ValueError as error:
            raise RecipeError(f"{where}: {_for_recipe(str(error), config.merge_method)}") from error
    _require_parameters(config, method, where)
    known = {p.name: p.value_type for p in method.spec.parameters}
    _require_values(config, known, where)
    unused = tuple(sorted({name for settings in _settings(config) for name in settings or ()} - set(known)))
    seed, compute = _own_settings(own, where)
    return Recipe(text, config, seed, compute, unused)


def _require_mergekit() -> None:
    try:
        import mergekit.config  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise RecipeError(
            f'Recipes need mergekit, which is not installed ({error}): pip install "mergekit>=0.1.5"'
        ) from error


def _recipe_text(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, str]:
    """The YAML and what to call it in messages."""
    import yaml

    if isinstance(source, Mapping):
        return yaml.safe_dump(_plain(source, ""), sort_keys=False), "The recipe"
    if not isinstance(source, str | os.PathLike) or (isinstance(source, str) and not source.strip(" ")):
        raise RecipeError(
            f"A recipe is the path of a YAML file, YAML text or a mapping, and this is {reprlib.repr(source)}."
        )
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        text, where = source, "The recipe"
    else:
        path = Path(source)
        if not path.is_file():
            there = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {there}. A recipe is a YAML file in mergekit's format.")
        if path.stat().st_size > _MAX_TEXT:
            raise RecipeError(f"{path} has {path.stat().st_size} bytes; a recipe has a few hundred. Is it a recipe?")
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not text ({error.reason} at byte {error.start}).") from error
    if len(text) > _MAX_TEXT:
        raise RecipeError(f"{where} has {len(text)} characters; a recipe has a few hundred. Is it a recipe?")
    return text, where


def _plain(value: Any, place: str) -> Any:
    """What is in a mapping, as YAML has it: a path as its text, a number of numpy as one of Python."""
    if isinstance(value, Mapping):
        return {key: _plain(entry, f"{place}.{key}".lstrip(".")) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{place}.{i}") for i, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None or type(plain) in (bool, int, float, str):
        return plain
    raise RecipeError(f"The recipe: {place} is {reprlib.repr(value)}. Write text, a number, a list or a mapping.")


def _parse(text: str, where: str) -> dict[str, Any]:
    import yaml

    try:
        tree = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        said = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"{where} is not YAML{at}: {said}.") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{where} is a {type(tree).__name__}, not a mapping. A recipe begins like merge_method: linear"
        )
    return tree


def _validated(tree: dict[str, Any], where: str) -> MergeConfiguration:
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    try:
        return MergeConfiguration.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: -len(e["loc"]))
        place = ".".join(str(step) for step in first["loc"] if not _is_type_name(step)) or "the top"
        there = "" if first["type"] == "missing" else f" is {reprlib.repr(first['input'])}"
        raise RecipeError(f"{where}: at {place}{there}: {first['msg'].rstrip('.')}.") from error
    except (RuntimeError, TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: {str(error).rstrip('.') or type(error).__name__}.") from error


def _is_type_name(step: object) -> bool:
    """Whether a step of pydantic's location is the branch of a union it tried, which means nothing to a reader."""
    return isinstance(step, str) and (step[:1].isupper() or "[" in step or step in ("bool", "int", "float", "str"))


def _method(name: str, where: str) -> MergeMethod:
    from mergekit.merge_methods import registered_methods

    known = {method.spec.name: method for method in registered_methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"{where}: merge_method {name!r} is unknown.{meant} There are: {', '.join(sorted(known))}.")
    return known[name]


def _for_recipe(said: str, method: str) -> str:
    """mergekit's complaint about a method's inputs, with what to do."""
    if "requires a base input" in said or "Base input is not present" in said:
        return f"{method} needs a base model, as an input of every slice: add base_model: (and, with slices, list it among the sources). mergekit: {said}"
    return f"{method}: {said}"


def _own_settings(own: object, where: str) -> tuple[int, Compute]:
    if not isinstance(own, dict):
        raise RecipeError(f"{where}: {_OURS}: is a mapping, as in {_OURS}: {{seed: 3}}.")
    unknown = sorted(set(map(str, own)) - {"seed", "compute"})
    if unknown:
        raise RecipeError(f"{where}: {_OURS}: has no {unknown[0]!r}; it has seed and compute.")
    seed, compute = own.get("seed", 0), own.get("compute", "float32")
    if compute not in ("float32", "mergekit"):
        raise RecipeError(f"{where}: {_OURS}: compute: is float32 or mergekit, not {compute!r}.")
    return valid_seed(seed, where), compute


def valid_seed(seed: object, where: str) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise RecipeError(f"{where}: a seed is a whole number from 0 to {2**32 - 1}, not {seed!r}.")
    return seed


def references(config: MergeConfiguration) -> list[ModelReference]:
    """Every model of a recipe in the order written, the base first, each once."""
    found = [config.base_model] if config.base_model else []
    for _, inputs, base in _groups(config):
        found += [base] if base else []
        found += [source.model for source in inputs]
    return list(dict.fromkeys(found))


def _groups(config: MergeConfiguration) -> list[tuple[str, list[Any], ModelReference | None]]:
    """The sets of inputs that are merged with each other: what to call each, its inputs, its base."""
    found: list[tuple[str, list[Any], ModelReference | None]] = []
    for name, module in (config.modules or {"": config}).items():
        before = f"{name}." if name else ""
        if module.models:
            inputs: list[Any] = list(module.models)
            if config.base_model and config.base_model not in [m.model for m in inputs]:
                inputs.append(SimpleNamespace(model=config.base_model, parameters=None))  # as mergekit does
            found.append((f"{before}models", inputs, config.base_model))
        for index, piece in enumerate(module.slices or ()):
            found.append((f"{before}slices[{index}]", list(piece.sources), piece.base_model or config.base_model))
    return found


def _settings(config: MergeConfiguration) -> Iterator[Mapping[str, Any] | None]:
    """All the mappings of parameters in a recipe."""
    yield config.parameters
    for module in [config, *(config.modules or {}).values()]:
        yield module.parameters
        for piece in module.slices or ():
            yield piece.parameters
    for _, inputs, _ in _groups(config):
        for source in inputs:
            yield source.parameters


def _require_ranges(inputs: Iterable[Any], where: str) -> None:
    for source in inputs:
        first, last = getattr(source, "layer_range", (0, 1))  # those of whole models have none
        if not 0 <= first < last:
            raise RecipeError(
                f"{where}: model {source.model} has layer_range {[first, last]}. Write [FIRST, ONE_PAST_LAST], as in [0, 12]."
            )


def _require_parameters(config: MergeConfiguration, method: MergeMethod, where: str) -> None:
    """Raise RecipeError for a parameter the method needs and no scope sets. That a filter reaches every tensor is seen by `plan`."""
    needed = [p for p in method.spec.parameters if p.required]
    for name, module in (config.modules or {"": config}).items():
        shared = [config.parameters, module.parameters]
        pieces = [
            (None, inputs, base) for label, inputs, base in _groups(config) if label == f"{name}.models".lstrip(".")
        ]
        pieces += [(s.parameters, s.sources, s.base_model or config.base_model) for s in module.slices or ()]
        for own, inputs, base in pieces:
            for parameter in needed:
                if parameter.scope == "shared":
                    _require_in(parameter.name, [*shared, own], f"{method.spec.name}", where)
                    continue
                for source in inputs:
                    if parameter.scope == "input" or source.model != base:
                        scopes = [*shared, own, source.parameters]
                        _require_in(parameter.name, scopes, f"{method.spec.name}: model {source.model}", where)


def _require_values(config: MergeConfiguration, known: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a parameter of the method that is not what it takes, for some tensors or all: no finite number, no fraction, no flag."""
    for settings in _settings(config):
        for name, setting in (settings or {}).items():
            for value in _single(setting) if name in known else ():
                if fault := _fault(name, known[name] is bool, value):
                    raise RecipeError(f"{where}: the parameter {name} is {fault}.")


def _fault(name: str, flag: bool, value: Any) -> str | None:
    """What a parameter's value is, and what to write, where it cannot be that."""
    if value == []:
        return f"an empty list. Write a number, as in {name}: 0.5"
    if flag:
        known = isinstance(value, bool) or value in (0, 1) or str(value).lower() in ("true", "false")
        return None if known else f"{reprlib.repr(value)}. Write true or false"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{reprlib.repr(value)}, which is no number. Write a number, as in {name}: 0.5"
    if not math.isfinite(number):
        return f"{number}, and nothing can be weighed by that. Write a finite number"
    if name in _FRACTIONS and not 0 <= number <= 1:
        return f"{value}, which is a fraction. Write a number from 0 to 1"
    return None


def _single(setting: Any) -> Iterator[Any]:
    """The single values of a setting: one, those of a gradient, or of entries with filters. A list without any is one itself."""
    if hasattr(setting, "value"):
        yield from _single(setting.value)
    elif isinstance(setting, list) and setting:
        for entry in setting:
            yield from _single(entry)
    else:
        yield setting


def _require_in(name: str, scopes: Iterable[Mapping[str, Any] | None], who: str, where: str) -> None:
    if not any(scope and scope.get(name) is not None for scope in scopes):
        raise RecipeError(
            f"{where}: {who} lacks the parameter {name!r}. Set it under parameters:, as in parameters: {{{name}: 0.5}}."
        )
