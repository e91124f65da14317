"""A merge as mergekit's YAML says it, read by mergekit's own classes."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from surgery.recipe_text import RecipeError, one_place, parse_recipe, recipe_text

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import MergeMethod

DTYPES = ("float32", "bfloat16", "float16", "float64")
Compute = Literal["float32", "mergekit"]
_FRACTIONS = ("density", "gamma", "select_topk")  # parameters that are shares of a tensor's entries
_MODEL = "Write a folder or a hub id, with +ADAPTER for a LoRA"
_DTYPE = f"Write one of {', '.join(DTYPES)}"
_WRITE = {  # what to write at a key of mergekit's
    "merge_method": "Write a name, as in merge_method: linear",
    "models": "Write models: and then lines like - model: FOLDER",
    "slices": "Write slices: and then lines like - sources: [{model: FOLDER, layer_range: [0, 12]}]",
    "sources": "Write sources: [{model: FOLDER, layer_range: [0, 12]}]",
    "layer_range": "Write [FIRST, ONE_PAST_LAST], as in [0, 12]",
    "modules": "Write MODULE: {models: [...]} lines under it",
    "model": _MODEL,
    "base_model": _MODEL,
    "path": _MODEL,
    "lora": "Write the folder or the hub id of a LoRA adapter",
    "revision": "Write a revision of the hub's as text",
    "parameters": "Write NAME: VALUE lines under it",
    "value": "Write a number, or a list of numbers",
    "filter": "Write a part of tensors' names, as in filter: mlp",
    "residual_weight": "Write a number",
    "dtype": _DTYPE,
    "out_dtype": _DTYPE,
    "chat_template": "Write auto, a name mergekit knows (chatml, llama3, ...) or a template",
    "tokenizer_source": "Write union, base, or a model's folder or hub id",
    "tokenizer": "Write a mapping, as in tokenizer: {source: base}",
    "source": "Write union, base, or a model's folder or hub id",
    "tokens": "Write TOKEN: {source: MODEL} lines under it",
    "force": "Write true or false",
    "pad_to_multiple_of": "Write a whole number",
}
_OURS = "surgery"  # the one key of a recipe that is not mergekit's; mergekit ignores it


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

    Nothing but the recipe is read; of models that are one folder under several spellings, all have the first. Raises RecipeError for what is no recipe, YAML that is none, keys that mergekit refuses, a method it does
    not have (naming the closest), a base or a number of models the method cannot work with, and parameters it needs and does not get, or
    that are no numbers, or no fractions where they should be; FileNotFoundError for a file that is not there.
    """
    _require_mergekit()
    text, where = recipe_text(source)
    tree = parse_recipe(text, where)
    own = tree.pop(_OURS, None) or {}
    written = _validated(tree, where)
    same = one_spelling(references(written))
    config = swapped(written, lambda ref: same.get(ref, ref))
    method = _method(config.merge_method, where)
    for key in ("dtype", "out_dtype"):
        value = getattr(config, key)
        if value is not None and value.removeprefix("torch.") not in DTYPES:
            raise RecipeError(f"{where}: {key} {value!r} is not one of {', '.join(DTYPES)}.")
    for label, inputs, _ in _groups(config):
        _require_ranges(inputs, f"{where}: {_short(label)}")
    require_inputs(config, same, where)
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


def _validated(tree: dict[str, Any], where: str) -> MergeConfiguration:
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    _require_stacks(tree, where)
    if tree.get("tokenizer_source") and tree.get("tokenizer"):
        raise RecipeError(f"{where} has both tokenizer_source and tokenizer. Keep one of the two.")
    try:
        return MergeConfiguration.model_validate(tree)
    except ValidationError as error:
        deepest = min(error.errors(), key=lambda e: -len(e["loc"]))
        raise RecipeError(_misfit(deepest["loc"], tree, where)) from error
    except RuntimeError as error:  # of the text that names a model
        fix = "Write FOLDER, or OWNER/NAME@REVISION of the hub, with +ADAPTER for a LoRA"
        raise RecipeError(f"{where} names a model that cannot be read ({_short(error)}). {fix}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: {str(error).rstrip('.') or type(error).__name__}.") from error


def _require_stacks(tree: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a recipe, or a module of one, that has none or more than one of the lists of what is merged."""
    modules = tree.get("modules")
    parts: list[tuple[str, Mapping[Any, Any], tuple[str, ...]]] = [(where, tree, ("models", "slices", "modules"))]
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if isinstance(module, Mapping):
            parts.append((f"{where}: modules.{_short(name)}", module, ("models", "slices")))
    for what, part, keys in parts:
        given = [key for key in keys if part.get(key)]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else f"has none of {', '.join(keys[:-1])} and {keys[-1]}"
            raise RecipeError(
                f"{what} {found}. Keep exactly one: models: (whole models) or slices: (ranges of layers)."
            )


def _misfit(loc: tuple[int | str, ...], tree: Any, where: str) -> str:
    """What is at a place that mergekit's classes refuse, and what to write: by the key, whichever branch of a union was tried there last."""
    place, key, found, missing = "", "", tree, None
    for step in loc:
        if isinstance(found, dict) and step in found:
            place, found = f"{place}.{_short(step)}".lstrip("."), found[step]
        elif isinstance(found, list) and isinstance(step, int) and step < len(found):
            place, found = f"{place}[{step}]", found[step]
        elif isinstance(found, dict) and step in _WRITE:
            missing = key = str(step)
            continue
        else:  # the name of a branch, which means nothing to a reader
            continue
        if step in _WRITE or (key == "parameters" and isinstance(step, str)):
            key = str(step)
    fix = _WRITE.get(key, "Write a number, a list of numbers, or entries of filter: and value:")
    at = f"{where}: {place}" if place else where
    if missing:
        return f"{at} has no {missing}. {fix}."
    return f"{at} is {'empty' if found is None else reprlib.repr(found)}. {fix}."


def _method(name: str, where: str) -> MergeMethod:
    from mergekit.merge_methods import registered_methods

    known = {method.spec.name: method for method in registered_methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"{where}: merge_method {name!r} is unknown.{meant} There are: {', '.join(sorted(known))}.")
    return known[name]


def require_inputs(config: MergeConfiguration, same: Mapping[ModelReference, ModelReference], where: str) -> None:
    """Raise RecipeError for models and bases that the method cannot work with. same: each reference as written -> that in `config`."""
    name = config.merge_method
    contract = _method(name, where).spec.contract
    spelt: dict[ModelReference, list[str]] = {}
    for ref, one in same.items():
        spelt.setdefault(one, []).append(_short(ref))
    for label, inputs, base in _groups(config):
        label = _short(label)
        models = [source.model for source in inputs]
        twice = next((ref for ref in models if models.count(ref) > 1), None)
        if twice is not None:
            how = f" ({' and '.join(spelt[twice])} are one)" if len(spelt[twice]) > 1 else ""
            raise RecipeError(
                f"{where}: {label} names {spelt[twice][0]} twice{how}. Name each model once and add up its weights."
            )
        based = base in models and contract.base != "ignored"
        if contract.base == "required" and base is None:
            raise RecipeError(
                f"{where}: {name} needs a base model. Write base_model: the model that the others were tuned from."
            )
        if contract.base != "ignored" and base is not None and not based:
            raise RecipeError(
                f"{where}: {name} needs its base model {spelt[base][0]} in {label}. Add it to the sources there."
            )
        if contract.base == "forbidden" and based:
            raise RecipeError(
                f"{where}: {name} takes no base model. Remove base_model:, and list the model under models:."
            )
        for what, count, least, most in (
            ("models", len(models), contract.min_inputs, contract.max_inputs),
            ("models beside the base", len(models) - based, contract.min_non_base or 0, contract.max_non_base),
        ):
            if count < least or (most is not None and count > most):
                asks = (
                    f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
                )
                listed = ", ".join(spelt[ref][0] + (" (base)" if based and ref == base else "") for ref in models)
                raise RecipeError(
                    f"{where}: {name} takes {asks} {what}, and {label} has {count}{f': {listed}' if listed else ''}. "
                    "Give as many, or choose another merge_method."
                )


def _short(name: object) -> str:
    """A name out of a recipe for a line of a message, however long it is and whatever is in it."""
    text = str(name)
    return text if len(text) <= 200 and text.isprintable() else reprlib.repr(text)


def one_spelling(references: Iterable[ModelReference]) -> dict[ModelReference, ModelReference]:
    """Each reference -> the first of those that lead to the same folders."""
    first: dict[tuple[Any, ...], ModelReference] = {}
    return {ref: first.setdefault(_places(ref), ref) for ref in references}


def _places(ref: ModelReference) -> tuple[Any, ...]:
    parts = [(one_place(part.path), part.revision) if part else None for part in (ref.model, ref.lora)]
    return (*parts, ref.override_architecture)


def swapped(value: Any, swap: Callable[[ModelReference], ModelReference]) -> Any:
    """A copy of a configuration with other references in it."""
    from mergekit.common import ModelReference
    from pydantic import BaseModel

    if isinstance(value, ModelReference):
        return swap(value)
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: swapped(getattr(value, name), swap) for name in type(value).model_fields})
    if isinstance(value, dict):
        return {key: swapped(entry, swap) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(swapped(entry, swap) for entry in value)
    return value


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
                f"{where}: model {_short(source.model)} has layer_range {[first, last]}. Write [FIRST, ONE_PAST_LAST], as in [0, 12]."
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
                        _require_in(parameter.name, scopes, f"{method.spec.name}: model {_short(source.model)}", where)


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
