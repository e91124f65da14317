"""What will go wrong, and what it will take, before a byte of a weight is read: `surgery check`.

`check_model`, `check_apply` and `check_recipe` read configurations, tokenizer files and the headers of safetensors files, all of it
without torch, in a second or so whatever the models' size (a recipe that needs mergekit's tables of architectures asks `surgery.merging`
for its plan, which takes some seconds). Of a model that is on the hub and not here no more than these is fetched, and the forecast says
how much the rest is. A `Report` holds every problem found, each with what to do about it, and a
forecast of memory, disk and time.
"""

from __future__ import annotations

import os
import reprlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.adapter_names import CONFIG
from surgery.headers import DELTA
from surgery.preflight.compare import compare
from surgery.preflight.facts import (
    SHORT,
    Facts,
    Problem,
    check_adapter,
    check_delta,
    examine,
    hub_cache,
    locate,
    moved_by_adapter,
    moved_by_delta,
)
from surgery.preflight.forecast import Forecast, forecast, in_bytes
from surgery.preflight.hub import Hub
from surgery.preflight.recipe import Plan, Source, lint
from surgery.recipe_text import is_yaml, recipe_name
from surgery.whole import hindrance

if TYPE_CHECKING:
    from surgery.merging import Plan as Merge
    from surgery.merging import Recipe

__all__ = ["Forecast", "Problem", "Report", "check_apply", "check_model", "check_recipe"]

_ORDER = ("error", "warning", "note")


@dataclass(frozen=True)
class Report:
    """What a check found. problems: gravest first, each once. forecast: None where the job could not run, or where none was asked about."""

    subject: str
    problems: tuple[Problem, ...]
    forecast: Forecast | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing found would make the command fail or write garbage."""
        return not any(p.severity == "error" for p in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        said = None if self.forecast is None else self.forecast.as_dict()
        return {
            "subject": self.subject,
            "ok": self.ok,
            "problems": [asdict(p) for p in self.problems],
            "forecast": said,
        }

    def __str__(self) -> str:
        lines = []
        for p in self.problems:
            lines += [f"{p.severity:8} {p.where} {p.found}.", f"{'':8} -> {p.fix}."]
        if self.forecast is not None:
            lines += [*([""] if lines else []), str(self.forecast)]
        counts = [(sum(p.severity == s for p in self.problems), s) for s in _ORDER]
        words = ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for n, s in counts if n)
        return "\n".join([*lines, f"{self.subject}: {words or 'no problems found'}"])


def check_model(ref: str | os.PathLike[str]) -> Report:
    """What is wrong with one model by itself. Raises ValueError for what is neither text nor a path, as the others do."""
    ref = _as_text("ref", ref, "a folder or a hub id")
    with Hub() as hub:
        _, problems = examine(ref, hub.place(ref))
        return _report(ref, hub.named(problems))


def check_apply(
    ref: str | os.PathLike[str],
    adds: Sequence[str | os.PathLike[str]],
    to: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
) -> Report:
    """Whether MODEL plus deltas or adapters can be written, and what that takes.

    adds: folders of deltas or adapters, or their hub ids. to: the output folder, if it is known. dtype: what to store, as found by default.
    """
    ref = _as_text("ref", ref, "a folder or a hub id")
    if not isinstance(adds, Sequence) or isinstance(adds, str | bytes):
        raise ValueError(f"adds={reprlib.repr(adds)}: give a list of folders or hub ids, as in adds=['vectors/lift'].")
    named = [_as_text("adds", add, "folders or hub ids") for add in adds]
    with Hub() as hub:
        facts, problems = examine(ref, hub.place(ref))
        problems += _output(to)
        moved = 0
        for add in named:
            place = hub.place(add)
            if isinstance(place, Problem):
                problems.append(place)
                continue
            folder = place.folder
            if (folder / DELTA).is_file():
                problems += check_delta(place, facts) if facts else []
                moved += moved_by_delta(folder / DELTA, place.sizes.get(DELTA))
            elif (folder / CONFIG).is_file():
                problems += check_adapter(place, facts) if facts else []
                moved += moved_by_adapter(place, facts) if facts else 0
            else:
                there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
                found = f"holds neither a delta nor an adapter (there is: {there})"
                fix = f"For a model, take the difference first: surgery diff {add} BASE --to VECTOR"
                problems.append(Problem("error", "delta", str(folder), found, fix))
        dtype = None if dtype == "auto" else dtype
        if dtype is not None and dtype not in (*SHORT.values(), "fp32", "bf16", "fp16"):
            problems.append(
                Problem("error", "dtype", "--dtype", f"is {dtype!r}", "Choose float32, bfloat16 or float16")
            )
        return _with_forecast(
            f"apply {ref}", problems, facts, to, hub, models=1 + len(named), moved=moved, method=None, dtype=dtype
        )


def check_recipe(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any], to: str | os.PathLike[str] | None = None
) -> Report:
    """Whether a mergekit recipe can be run, and what that takes. recipe: what `merge` takes. to: the output folder, if it is known."""
    source = _source_of(recipe)
    subject = recipe_name(source)
    plan, problems = lint(source)
    problems += _output(to)
    if plan is None:
        return _report(subject, problems)
    with Hub() as hub:
        found: dict[str, Facts] = {}
        beside = None if isinstance(source, Mapping) or is_yaml(source) else Path(source).parent
        for model in plan.sources:
            facts, wrong = _source(model, beside, hub)
            problems += wrong
            if facts:
                found[model.text] = facts
        problems += _ranges(plan, found)
        first = plan.base or plan.slices[0][0]
        reference = found.get(first.text)
        aligned = bool(plan.recipe.get("tokenizer_source") or plan.recipe.get("tokenizer"))
        stacked = all(len(sources) == 1 for sources in plan.slices)
        for facts in found.values():
            if reference is not None and facts is not reference:
                problems += compare(reference, facts, layers=not plan.layered, vocabulary=not aligned and not stacked)
        judged = not hub.download and not any(p.severity == "error" for p in problems)  # a plan reads whole models
        made = None
        if judged and (aligned or _is_beyond_a_table(plan, found)):
            made, wrong = _planned(recipe, subject)
            problems += wrong
        dtype = plan.recipe.get("out_dtype") or plan.recipe.get("dtype")
        dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
        job = {
            "models": len(plan.sources),
            "moved": None,
            "method": plan.method,
            "dtype": dtype,
            "share": _share(plan, reference),
            "executor": (made is not None and made.road == "executor") or any(p.kind == "family" for p in problems),
            "lined_up": aligned,
        }
        return _with_forecast(subject, problems, reference, to, hub, **job)


def _source_of(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
) -> str | os.PathLike[str] | Mapping[str, Any]:
    if isinstance(recipe, str | os.PathLike | Mapping):
        return recipe
    from surgery.merging import Recipe  # torch, and mergekit's rules: whoever has one has them

    return recipe.text if isinstance(recipe, Recipe) else recipe


def _as_text(name: str, given: object, what: str) -> str:
    if not isinstance(given, str | os.PathLike):
        raise ValueError(f"{name}={reprlib.repr(given)}: give {what} as text or a path.")
    return os.fspath(given)


def _is_beyond_a_table(plan: Plan, found: dict[str, Facts]) -> bool:
    """Whether the names of tensors decide if the recipe can be run, in mergekit's tables or in the files.

    By parts of a model, by layers of one with a tower or with experts, or where one's files hold its experts packed and another's do not.
    """
    anatomies = [facts.anatomy for facts in found.values() if facts.anatomy is not None]
    packed = {any(place.expert is not None for place in a.places.values()) for a in anatomies if a.n_experts}
    return (
        "modules" in plan.recipe
        or len(packed) == 2
        or (plan.layered and any(a.tower or a.n_experts for a in anatomies))
    )


def _planned(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any], subject: str
) -> tuple[Merge | None, list[Problem]]:
    """What `merge` would do, and what it says to the recipe before it computes anything."""
    from surgery.merging import plan

    try:
        return plan(recipe), []
    except (ValueError, OSError) as error:
        found, _, fix = str(error).removesuffix(".").rpartition(". ")
        said = f"cannot be merged: {found or fix}"
        return None, [Problem("error", "plan", subject, said, fix if found else "Correct the recipe")]


def _source(source: Source, beside: Path | None, hub: Hub) -> tuple[Facts | None, list[Problem]]:
    facts, problems = examine(source.model, hub.place(source.model))
    problems = [_of_the_executor(p) if p.kind == "family" else p for p in problems]
    there = None if beside is None or Path(source.model).is_absolute() else beside / source.model
    if facts is None and there is not None and locate(there)[0] is not None:
        fix = f"A recipe's paths start at the working directory: run it in {beside}, or write {there.resolve()}"
        problems = [Problem("error", "reference", source.model, "is not here, but is beside the recipe", fix)]
    if source.lora:
        place = hub.place(source.lora)
        if isinstance(place, Problem):
            problems.append(place)
        elif not (place.folder / CONFIG).is_file():
            fix = "After + comes the folder of a LoRA adapter"
            problems.append(Problem("error", "adapter", str(place.folder), f"has no {CONFIG}", fix))
        elif facts:
            problems += check_adapter(place, facts)
    return facts, problems


def _of_the_executor(problem: Problem) -> Problem:
    """A family without a table, in a recipe: our stream cannot merge it, and mergekit's own executor does."""
    found = f"{problem.found}: mergekit's own executor merges it, and less is verified"
    return replace(problem, severity="warning", found=found, fix="Nothing to do if that is enough")


def _ranges(plan: Plan, found: dict[str, Facts]) -> Iterable[Problem]:
    for sources in plan.slices:
        for source in sources:
            facts = found.get(source.text)
            layers = facts.get("num_hidden_layers") if facts else None
            if source.layers and type(layers) is int and source.layers[1] > layers:
                words = f"is asked for layers {source.layers[0]} to {source.layers[1] - 1}, but has 0 to {layers - 1}"
                yield Problem(
                    "error", "layers", source.text, words, f"Write layer_range: [{source.layers[0]}, {layers}] or less"
                )


def _share(plan: Plan, reference: Facts | None) -> float:
    """Layers of the result over layers of the reference."""
    layers = reference.get("num_hidden_layers") if reference else None
    if not plan.layered or type(layers) is not int or layers < 1:
        return 1.0
    return sum(s[0].layers[1] - s[0].layers[0] for s in plan.slices if s and s[0].layers) / layers


def _output(to: str | os.PathLike[str] | None) -> list[Problem]:
    if to is None:
        return []
    path = Path(to)
    if path.exists() or path.is_symlink():
        return [
            Problem(
                "error",
                "output",
                str(path),
                "exists already and is never overwritten",
                "Choose another folder, or remove it",
            )
        ]
    reason = hindrance(path)
    return (
        [Problem("error", "output", str(path), f"cannot be made: {reason}", "Choose another folder")] if reason else []
    )


def _with_forecast(
    subject: str,
    problems: list[Problem],
    facts: Facts | None,
    to: str | os.PathLike[str] | None,
    hub: Hub,
    **job: Any,
) -> Report:
    problems = hub.named(problems)
    if facts is None or not facts.tensors:
        return _report(subject, problems)
    out = Path(to if to is not None else "out")
    made = forecast(facts, to=out, download=hub.download, **job)
    problems += _room(made, out, str(to or Path.cwd()))
    if made.machine is not None and made.memory is not None and made.memory > made.machine:
        found = f"would need {in_bytes(made.memory)} of memory, and this machine has {in_bytes(made.machine)}"
        problems.append(Problem("warning", "memory", subject, found, "Run it on a larger machine"))
    return _report(subject, problems, made)


def _room(made: Forecast, out: Path, where: str) -> Iterable[Problem]:
    """Whether there is space for the result, and for what is downloaded first."""
    cache, parent = _existing(hub_cache()), _existing(out)
    together = made.download if cache.stat().st_dev == parent.stat().st_dev else 0
    if made.disk + together > made.free:
        found = f"has {in_bytes(made.free)} free, and the result takes {in_bytes(made.disk)}"
        found += f" after a download of {in_bytes(together)}" if together else ""
        yield Problem("error", "disk", where, found, "Make room, or write to another disk")
    free = shutil.disk_usage(cache).free
    if not together and made.download > free:
        found = f"has {in_bytes(free)} free, and the download takes {in_bytes(made.download)}"
        yield Problem(
            "error", "disk", str(hub_cache()), found, "Make room, or name a folder on another disk in HF_HOME"
        )


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _report(subject: str, problems: list[Problem], made: Forecast | None = None) -> Report:
    once = dict.fromkeys(problems)
    return Report(subject, tuple(sorted(once, key=lambda p: _ORDER.index(p.severity))), made)
