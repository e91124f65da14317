"""A mergekit recipe, looked at as plain data: nothing of mergekit is imported where its version is the one tabled here."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from surgery.hub_ids import hub_id
from surgery.preflight.facts import Problem, Severity, locate
from surgery.recipe_text import RecipeError, one_place, parse_recipe, recipe_name, recipe_text

TABLED = "0.1.5"  # the mergekit that the table below describes; another is asked itself, which takes a second or two
PLAIN = ("linear", "task_arithmetic")  # what runs through our own stream
_TOP = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "name", "surgery",
)  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_COMPUTE = ("float32", "mergekit")
_SEEDS = 2**32
Scope = Literal["shared", "input", "non_base"]


@dataclass(frozen=True)
class Parameter:
    """scope: one value for all models, one for each, or one for each but the base. flag: true or false, else a number."""

    scope: Scope
    required: bool = False
    flag: bool = False


@dataclass(frozen=True)
class Method:
    """What a merge method asks for. base: required, optional, or ignored (an ordinary input). inputs, others: least and most, of all models and of
    all but the base."""

    base: str = "ignored"
    inputs: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


_WEIGHT = {"weight": Parameter("non_base", required=True)}
_FLAG, _NUMBER = Parameter("shared", flag=True), Parameter("shared")
_T = {"t": Parameter("shared", required=True)}
_VECTORS = {
    "int8_mask": _FLAG, "normalize": _FLAG, "rescale": _FLAG, "lambda": _NUMBER, **_WEIGHT, "density": Parameter("non_base"),
}  # fmt: skip
_PAIR, _MANY = ((2, 2), (0, None)), ((1, None), (0, None))
_TABLE = {
    "linear": Method(parameters={"weight": Parameter("input", required=True), "normalize": _FLAG}),
    "slerp": Method("required", *_PAIR, _T),
    "nearswap": Method("required", *_PAIR, _T),
    "arcee_fusion": Method("required", *_PAIR),
    "nuslerp": Method("optional", (1, None), (2, 2), {**_WEIGHT, "nuslerp_row_wise": _FLAG, "nuslerp_flatten": _FLAG}),
    "multislerp": Method("optional", (1, None), (1, None), {**_WEIGHT, "normalize_weights": _FLAG, "eps": _NUMBER}),
    "passthrough": Method(inputs=(1, 1), parameters={"scale": Parameter("input")}),
    "karcher": Method(parameters={"max_iter": _NUMBER, "tol": _NUMBER}),
    "model_stock": Method("required", (3, None), parameters={"filter_wise": _FLAG}),
    "ram": Method("required", parameters={"epsilon": _NUMBER}),
    "ramplus_tl": Method("required", parameters={"r": _NUMBER, "alpha": _NUMBER, "epsilon": _NUMBER}),
    "sce": Method("required", parameters={"int8_mask": _FLAG, "select_topk": _NUMBER}),
    **{name: Method("required", parameters=_VECTORS) for name in ("task_arithmetic", "ties", "dare_ties", "dare_linear")},
    **{name: Method("required", parameters={**_VECTORS, "gamma": Parameter("non_base")}) for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{name: Method("required", parameters={**_VECTORS, "epsilon": Parameter("non_base")}) for name in ("della", "della_linear")},
}  # fmt: skip


def methods() -> dict[str, Method]:
    """The merge methods of the installed mergekit, by name; those of `TABLED` where none is installed."""
    if installed() in (None, TABLED):
        return dict(_TABLE)
    return asked()


def asked() -> dict[str, Method]:
    """The same, from the installed mergekit itself. Imports it."""
    from mergekit.merge_methods import registered_methods

    found = {}
    for method in registered_methods():
        spec, contract = method.spec, method.spec.contract
        parameters = {p.name: Parameter(p.scope.value, p.required, p.value_type is bool) for p in spec.parameters}
        least, most = contract.min_non_base or 0, contract.max_non_base
        found[spec.name] = Method(
            contract.base.value, (contract.min_inputs, contract.max_inputs), (least, most), parameters
        )
    return found


def installed() -> str | None:
    try:
        return version("mergekit")
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Source:
    """One model of a slice. text: as written, where it is written first; model, lora: folders or hub ids, with ``@revision`` where one is given; layers: first and one past
    last, None for all."""

    text: str
    model: str
    lora: str | None = None
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a recipe asks for, as far as it can be understood. slices: each a list of sources merged with one another."""

    method: str
    base: Source | None
    slices: tuple[tuple[Source, ...], ...]
    layered: bool
    recipe: Mapping[str, Any]

    @property
    def sources(self) -> list[Source]:
        """Every model once, the base first."""
        found = {
            s.text: s for s in ([self.base] if self.base else []) + [s for sources in self.slices for s in sources]
        }
        return list(found.values())


def lint(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Plan | None, list[Problem]]:
    """A recipe's plan and what is wrong with the recipe by itself; the models are not looked at. source: as of `recipe_text`.

    Of models that are one folder under several spellings, all have the first. Raises RecipeError for what is no source of a recipe.
    """
    where = recipe_name(source)
    try:
        tree = parse_recipe(*recipe_text(source))
    except (RecipeError, FileNotFoundError) as error:
        said, _, fix = str(error).removesuffix(".").rpartition(". ")
        return None, [Problem("error", "recipe", where, said.removeprefix(f"{where} "), fix)]
    return _Lint(where, tree).run()


class _Slice(NamedTuple):
    """Models that are merged with one another. scopes: the parameters of the slice and of its module. base: the slice's own, or the recipe's."""

    sources: list[Source]
    scopes: tuple[Mapping[str, Any], ...]
    base: Source | None


class _Lint:
    def __init__(self, where: str, recipe: Mapping[str, Any]) -> None:
        self.where, self.recipe = where, recipe
        self.problems: list[Problem] = []
        self.spelt: dict[tuple[str | None, ...], list[str]] = {}  # where a reference leads -> how it is written

    def say(self, severity: Severity, kind: str, key: str, found: str, fix: str) -> None:
        self.problems.append(Problem(severity, kind, f"{self.where}, {key}" if key else self.where, found, fix))

    def run(self) -> tuple[Plan | None, list[Problem]]:
        recipe = self.recipe
        self.known_keys(recipe, _TOP, "")
        name, method = self.method()
        base = self.source(recipe.get("base_model"), "base_model") if recipe.get("base_model") is not None else None
        slices = self.slices(base)
        self.choices()
        self.own()
        if method is not None and slices:
            self.contract(name, method, slices)
            self.parameters(name, method, slices)
        layered = any(source.layers is not None for piece in slices for source in piece.sources)
        plan = Plan(name, base, tuple(tuple(s.sources) for s in slices), layered, recipe) if slices or base else None
        return plan, self.problems

    def method(self) -> tuple[str, Method | None]:
        name, known = self.recipe.get("merge_method"), methods()
        if installed() is None and name not in PLAIN:
            self.say(
                "error", "method", "merge_method", "needs mergekit, which is not installed", "pip install mergekit"
            )
        if not isinstance(name, str):
            self.say("error", "method", "", "names no merge_method", f"Write merge_method: {', '.join(sorted(known))}")
            return "", None
        if name not in known:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
            fix = f"Write merge_method: {near[0]}" if near else f"Choose {', '.join(sorted(known))}"
            self.say(
                "error",
                "method",
                "merge_method",
                f"is {_show(name)}, which mergekit {installed() or TABLED} does not have",
                fix,
            )
            return name, None
        return name, known[name]

    def known_keys(self, found: Mapping[Any, Any], known: tuple[str, ...], key: str) -> None:
        for name in found:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                fix = f"Write {near[0]}" if near else f"Remove it, or choose {', '.join(known)}"
                self.say(
                    "warning", "key", key, f"has the key {_show(name)}, which mergekit does not know and ignores", fix
                )

    def source(self, entry: Any, key: str, outer: Mapping[str, Any] | None = None) -> Source | None:
        """A model reference, ``path@revision+adapter`` or the same as a mapping."""
        lora: Any = None
        model = entry
        if isinstance(entry, Mapping):
            model, lora = _as_text(entry.get("model")), _as_text(entry.get("lora"))
        if isinstance(model, str) and lora is None:
            model, *rest = model.split("+")
            lora = rest[0] if len(rest) == 1 else None
            if len(rest) > 1:
                model = None
        if not isinstance(model, str) or not model.strip() or not isinstance(lora, str | None):
            self.say(
                "error",
                "reference",
                key,
                f"is {_show(entry)}, not a model",
                "Write a folder or a hub id, with +ADAPTER for a LoRA",
            )
            return None
        text = model if lora is None else f"{model}+{lora}"
        outer = outer or {}
        parameters = self.settings(outer, f"{key}.parameters")
        layers = self.layer_range(outer["layer_range"], key) if "layer_range" in outer else None
        folders = _reference(model), lora and _reference(lora)
        spelt = self.spelt.setdefault(tuple(folder and _place(folder) for folder in folders), [])
        if text not in spelt:
            spelt.append(text)
        return Source(spelt[0], *folders, layers, parameters)

    def settings(self, outer: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """The parameters of a part of the recipe."""
        found = outer.get("parameters")
        if found is None or isinstance(found, dict):
            return found or {}
        self.say("error", "parameter", key, f"is {_show(found)}, not a mapping", "Write NAME: VALUE lines under it")
        return {}

    def layer_range(self, found: Any, key: str) -> tuple[int, int] | None:
        if (
            isinstance(found, list)
            and len(found) == 2
            and all(type(n) is int for n in found)
            and 0 <= found[0] < found[1]
        ):
            return found[0], found[1]
        self.say(
            "error", "layers", key, f"has layer_range {_show(found)}", "Write [FIRST, ONE_PAST_LAST], as in [0, 12]"
        )
        return None

    def slices(self, base: Source | None) -> list[_Slice]:
        given = [k for k in ("models", "slices", "modules") if self.recipe.get(k)]
        if len(given) != 1:
            words = "has none of models, slices and modules" if not given else f"has {' and '.join(given)}"
            self.say(
                "error", "recipe", "", words, "Keep exactly one: models: (whole models) or slices: (ranges of layers)"
            )
            return []
        found: list[_Slice] = []
        modules = self.recipe["modules"] if given == ["modules"] else {"": self.recipe}
        if not isinstance(modules, dict):
            self.say(
                "error", "recipe", "modules", f"is {_show(modules)}, not a mapping", "Write MODULE: {models: [...]}"
            )
            return []
        for name, module in modules.items():
            key = f"modules.{name}." if name else ""
            if not isinstance(module, dict):
                self.say("error", "recipe", key.rstrip("."), f"is {_show(module)}", "Write models: or slices: in it")
                continue
            own = self.settings(module, f"{key}parameters") if name else {}
            whole = self.listed(module, "models", key)
            if whole:
                found.append(_Slice([], ({}, own), base))
            for i, entry in enumerate(whole):
                source = self.entry(entry, f"{key}models[{i}]", ("model", "parameters"))
                if source:
                    found[-1].sources.append(source)
            if whole and base and base.text not in [s.text for s in found[-1].sources]:  # as mergekit completes it
                found[-1].sources.append(base)
            for i, entry in enumerate(self.listed(module, "slices", key)):
                here = f"{key}slices[{i}]"
                if not isinstance(entry, dict) or not isinstance(entry.get("sources"), list) or not entry["sources"]:
                    self.say(
                        "error", "recipe", here, "has no sources", "Write sources: [{model: ..., layer_range: [0, 12]}]"
                    )
                    continue
                self.known_keys(entry, ("sources", "base_model", "parameters"), here)
                sources = [
                    self.entry(e, f"{here}.sources[{j}]", ("model", "layer_range", "parameters"))
                    for j, e in enumerate(entry["sources"])
                ]
                kept = [s for s in sources if s]
                self.lengths(kept, here)
                its = entry.get("base_model")
                its_base = base if its is None else self.source(its, f"{here}.base_model")
                found.append(_Slice(kept, (self.settings(entry, f"{here}.parameters"), own), its_base))
        return [piece for piece in found if piece.sources]

    def listed(self, module: Mapping[str, Any], name: str, key: str) -> list[Any]:
        entries = module.get(name) or []
        if not isinstance(entries, list):
            self.say(
                "error",
                "recipe",
                f"{key}{name}",
                f"is {_show(entries)}, not a list",
                f"Write {name}: and then lines that begin with -",
            )
            return []
        return entries

    def entry(self, entry: Any, key: str, known: tuple[str, ...]) -> Source | None:
        if not isinstance(entry, dict):
            self.say("error", "recipe", key, f"is {_show(entry)}", "Write - model: FOLDER")
            return None
        self.known_keys(entry, known, key)
        if "layer_range" in known and "layer_range" not in entry:
            self.say("error", "layers", key, "has no layer_range", "Write layer_range: [FIRST, ONE_PAST_LAST]")
        return self.source(entry.get("model"), key, entry)

    def lengths(self, sources: list[Source], key: str) -> None:
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(lengths) > 1:
            self.say(
                "error",
                "layers",
                key,
                f"merges ranges of {' and '.join(map(str, sorted(lengths)))} layers",
                "Give all its sources equally many layers",
            )

    def choices(self) -> None:
        recipe = self.recipe
        for key in ("dtype", "out_dtype"):
            said = recipe.get(key)
            if said is not None and (not isinstance(said, str) or said.removeprefix("torch.") not in _DTYPES):
                near = difflib.get_close_matches(str(said), _DTYPES, n=1, cutoff=0.4)
                fix = f"Write {key}: {near[0]}" if near else f"Choose {', '.join(_DTYPES)}"
                self.say("error", "dtype", key, f"is {_show(said)}, which is no dtype of weights", fix)
        if recipe.get("tokenizer_source") and recipe.get("tokenizer"):
            self.say("error", "tokenizer", "", "has both tokenizer_source and tokenizer", "Keep one of the two")
        tokenizer = recipe.get("tokenizer")
        if isinstance(tokenizer, dict):
            self.known_keys(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
            tokens = tokenizer.get("tokens")
            for token, row in tokens.items() if isinstance(tokens, dict) else ():
                if isinstance(row, dict):
                    self.known_keys(row, ("source", "force"), f"tokenizer.tokens.{token}")
        source = recipe.get("tokenizer_source") or (tokenizer.get("source") if isinstance(tokenizer, dict) else None)
        if source == "base" and not recipe.get("base_model"):
            self.say(
                "warning",
                "tokenizer",
                "tokenizer_source",
                "is base, but there is no base_model: it is then the first model's",
                "Write base_model: MODEL, or name the model in tokenizer_source",
            )
        template = recipe.get("chat_template")
        if template is not None and template != "auto" and not _is_template(template):
            names = _templates()
            near = difflib.get_close_matches(str(template), names, n=1, cutoff=0.4)
            fix = (
                f"Write chat_template: {near[0]}"
                if near
                else f"Choose auto, {', '.join(names)}, or write the template itself"
            )
            self.say(
                "error",
                "template",
                "chat_template",
                f"is {_show(template)}, neither a template nor the name of one",
                fix,
            )

    def own(self) -> None:
        """What a recipe says to us alone."""
        own = self.recipe.get("surgery")
        if own is None:
            return
        if not isinstance(own, dict):
            self.say("error", "recipe", "", f"surgery is {_show(own)}, not a mapping", "Write surgery: {seed: 3}")
            return
        for name in own:
            if name not in ("seed", "compute"):
                near = difflib.get_close_matches(str(name), ("seed", "compute"), n=1)
                fix = f"Write {near[0]}" if near else "Remove it, or choose seed or compute"
                self.say("error", "recipe", "", f"surgery has the key {_show(name)}, which it does not know", fix)
        seed, compute = own.get("seed", 0), own.get("compute", _COMPUTE[0])
        if type(seed) is not int or not 0 <= seed < _SEEDS:
            fix = f"Write a whole number from 0 to {_SEEDS - 1}"
            self.say("error", "recipe", "", f"surgery.seed is {_show(seed)}", fix)
        if compute not in _COMPUTE:
            fix = f"Write {' or '.join(f'compute: {name}' for name in _COMPUTE)}"
            self.say("error", "recipe", "", f"surgery.compute is {_show(compute)}", fix)

    def contract(self, name: str, method: Method, slices: list[_Slice]) -> None:
        if method.base == "required" and any(piece.base is None for piece in slices):
            self.say(
                "error",
                "base",
                "",
                f"has no base_model, which {name} needs",
                "Write base_model: the model that the others were tuned from",
            )
            return
        for i, (sources, _, base) in enumerate(slices):
            key = "models" if self.recipe.get("models") else f"slices[{i}]"
            texts = [s.text for s in sources]
            twice = next((t for t in texts if texts.count(t) > 1), None)
            if twice:
                how = next(
                    (
                        f" ({' and '.join(spelt)} are one)"
                        for spelt in self.spelt.values()
                        if spelt[0] == twice and spelt[1:]
                    ),
                    "",
                )
                self.say(
                    "error", "models", key, f"names {twice} twice{how}", "Name each model once and add up its weights"
                )
            others = [s for s in sources if not base or s.text != base.text or method.base == "ignored"]
            if method.base == "required" and base and len(others) == len(sources):
                fix = f"Add {base.text} to the sources of this slice"
                self.say("error", "base", key, f"does not contain the base_model {base.text}, which {name} needs", fix)
            for count, (least, most), what in (
                (len(sources), method.inputs, "models"),
                (len(others), method.others, "models beside the base"),
            ):
                if count < least or (most is not None and count > most):
                    asks = (
                        f"exactly {least}"
                        if least == most
                        else f"at least {least}"
                        if count < least
                        else f"at most {most}"
                    )
                    fix = (
                        "Write slices: one model each"
                        if name == "passthrough"
                        else f"Give {asks}, or choose another merge_method"
                    )
                    self.say("error", "models", key, f"has {count} {what}; {name} takes {asks}", fix)

    def parameters(
        self,
        name: str,
        method: Method,
        slices: list[_Slice],
    ) -> None:
        top = self.settings(self.recipe, "parameters")
        self.named(name, method, top, "parameters", per_model=False)
        missing: dict[str, list[str]] = {}
        for i, (sources, scopes, base) in enumerate(slices):
            key = "models" if self.recipe.get("models") else f"slices[{i}].sources"
            self.named(name, method, scopes[0], f"slices[{i}].parameters", per_model=False)
            for j, source in enumerate(sources):
                self.named(name, method, source.parameters, f"{key}[{j}].parameters", per_model=True)
            for parameter, spec in method.parameters.items():
                asked = (
                    [None]
                    if spec.scope == "shared"
                    else [s for s in sources if spec.scope == "input" or not base or s.text != base.text]
                )
                for source in asked:
                    given = [
                        s[parameter] for s in ([source.parameters] if source else []) + [*scopes, top] if parameter in s
                    ]
                    if not given and (spec.required or parameter == "density"):
                        missing.setdefault(parameter, []).append(source.text if source else "")
                    elif given and not any(_covers(v) for v in given):
                        found = f"gives {parameter} only for some tensors" + (f" of {source.text}" if source else "")
                        severity: Severity = "error" if spec.required else "note"
                        self.say(
                            severity,
                            "parameter",
                            "parameters",
                            found,
                            f"Add an entry without filter: - value: ... to {parameter}",
                        )
        for parameter, models in missing.items():
            self.lacks(name, method, parameter, models, slices[0].base)
        self.sums(name, slices, top)

    def lacks(self, name: str, method: Method, parameter: str, models: list[str], base: Source | None) -> None:
        whom = sorted({m for m in models if m})
        words = f"gives no {parameter}" + (f" for {', '.join(whom[:3])}" if whom else "") + f", which {name} "
        where = "under parameters:" if not whom else "under the model's parameters:, or once for all under parameters:"
        if parameter == "density" and not method.parameters[parameter].required:
            if name != "task_arithmetic":
                self.say(
                    "warning",
                    "parameter",
                    "",
                    words + "then takes to be 1: nothing is dropped",
                    f"Write density: 0.5 {where}",
                )
            return
        if base and whom == [base.text] and method.base == "ignored":
            words += f"asks of every input: base_model {base.text} is one of them"
            self.say(
                "error",
                "parameter",
                "",
                words,
                f"List {base.text} under models: with its {parameter}, or drop base_model",
            )
            return
        self.say(
            "error",
            "parameter",
            "",
            words + "needs",
            f"Write {parameter}: {'0.5' if parameter == 't' else '1.0'} {where}",
        )

    def named(self, name: str, method: Method, found: Mapping[Any, Any], key: str, *, per_model: bool) -> None:
        for parameter, value in found.items():
            if parameter not in method.parameters:
                known = sorted(method.parameters)
                near = difflib.get_close_matches(str(parameter), known, n=1)
                fix = f"Write {near[0]}" if near else f"Remove it; {name} has {', '.join(known) or 'no parameters'}"
                self.say(
                    "warning",
                    "parameter",
                    key,
                    f"has {_show(parameter)}, which {name} does not know and mergekit ignores",
                    fix,
                )
                continue
            spec = method.parameters[parameter]
            if per_model and spec.scope == "shared":
                found_words = f"has {parameter}, which is one for all models: here mergekit ignores it"
                self.say("warning", "parameter", key, found_words, f"Move {parameter} to the recipe's own parameters:")
            for number in _scalars(value):
                self.scalar(parameter, spec, number, key)

    def scalar(self, parameter: str, spec: Parameter, value: Any, key: str) -> None:
        if spec.flag:
            if not isinstance(value, bool) and value not in (0, 1, "true", "false"):
                self.say(
                    "error", "parameter", key, f"has {parameter}: {_show(value)}", f"Write {parameter}: true or false"
                )
            return
        number = _number(value)
        if number is None or not math.isfinite(number):
            self.say(
                "error",
                "parameter",
                key,
                f"has {parameter}: {_show(value)}, not a number",
                "Write a number, a list of numbers, or entries of filter: and value:",
            )
        elif parameter in ("density", "select_topk", "gamma") and not 0 <= number <= 1:
            self.say(
                "error",
                "parameter",
                key,
                f"has {parameter}: {number:g}",
                f"{parameter} is a fraction: write a number from 0 to 1",
            )
        elif parameter == "t" and not 0 <= number <= 1:
            self.say(
                "warning",
                "parameter",
                key,
                f"has t: {number:g}, beyond both models",
                "Write a number from 0 (the base) to 1 (the other)",
            )

    def sums(self, name: str, slices: list[_Slice], top: Mapping[str, Any]) -> None:
        if name != "linear":
            return
        for i, (sources, scopes, _) in enumerate(slices):
            divided = next((s["normalize"] for s in (*scopes, top) if "normalize" in s), True)
            if divided not in (True, "true"):
                continue
            weights = [
                next((s["weight"] for s in (x.parameters, *scopes, top) if "weight" in s), None) for x in sources
            ]
            numbers = [_number(w) for w in weights]
            if (
                numbers
                and all(n is not None for n in numbers)
                and abs(math.fsum(n for n in numbers if n is not None)) < 1e-8
            ):
                self.say(
                    "error",
                    "parameter",
                    f"slices[{i}]" if not self.recipe.get("models") else "models",
                    "has weights that sum to 0, and linear divides by their sum",
                    "Change a weight, or write normalize: false under parameters:",
                )


# --- values -------------------------------------------------------------------------------------------------------------------


def _scalars(setting: Any) -> Iterator[Any]:
    """The single values of a setting: a number, a list of numbers over the layers, or entries of filter and value."""
    if isinstance(setting, list):
        for entry in setting:
            if isinstance(entry, dict):
                yield from (
                    _scalars(entry.get("value")) if not isinstance(entry.get("value"), dict) else [entry["value"]]
                )
            elif isinstance(entry, list):
                yield entry
            else:
                yield entry
    elif isinstance(setting, dict):
        value = setting.get("value")
        yield from _scalars(value) if isinstance(value, list) else [value]
    else:
        yield setting


def _covers(setting: Any) -> bool:
    """Whether a setting has a value for every tensor."""
    entries = setting if isinstance(setting, list) else [setting]
    conditional = [e for e in entries if isinstance(e, dict)]
    return len(conditional) < len(entries) or any(e.get("filter") in (None, "*") for e in conditional)


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return math.inf


def _is_template(said: Any) -> bool:
    return isinstance(said, str) and (said in _templates() or ("{" in said and len(said) >= 20))


def _templates() -> list[str]:
    from importlib.util import find_spec

    spec = find_spec("mergekit")
    home = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else Path()
    return sorted(p.stem for p in (home / "_data" / "chat_templates").glob("*.jinja"))


def _show(value: Any) -> str:
    return reprlib.repr(value)


def _as_text(entry: Any) -> Any:
    """A model's path and revision as a mapping, in the one text that means the same; anything else as it is."""
    if not isinstance(entry, Mapping):
        return entry
    path, revision = entry.get("path"), entry.get("revision")
    return f"{path}@{revision}" if isinstance(path, str) and isinstance(revision, str) else path


def _place(reference: str) -> str:
    """Where a reference leads: its folder, of a hub id in the local cache too, else as written."""
    return one_place(str(locate(reference)[0] or reference))


def _reference(text: str) -> str:
    """What is looked for: to mergekit too, a folder has no revisions."""
    name = text.split("@")[0]
    return name if hub_id(text) is None or Path(name).expanduser().is_dir() else text
