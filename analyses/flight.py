"""The flight recorder's page: what a training run did, when, and what watching it cost.

    recorder = flight_recorder(model, "runs/a/log.jsonl", questions=held_out, texts=GENERAL_TEXT[:12])
    Trainer(..., callbacks=[recorder])            # or recorder.attach(trainer): its numbers then also go to TensorBoard or W&B

measures during training, for 3 % of its time, and leaves ``runs/a/log.html`` beside the log. `Flight.load` reads any log that a
`Recorder` wrote: its frame, figures and story need no model.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyses import figures
from analyses.report import document, html_table, pair, picture
from analyses.watch import watches
from finetune.monitors import OWN, RECORDER, TRAINING, Recorder, read_log
from surgery.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from analyses.tasks import Question
    from surgery.model import Model

_PLACE = re.compile(r"(?:(?P<span>[\w-]+)\.)?L(?P<layer>\d+)(?:\.(?P<measure>[\w-]+))?")
_SITE = re.compile(
    r"(?P<site>(?P<layer>\d+)(?:\.[a-z][a-z0-9]*)+?)(?:\.(?P<measure>\w*_\w+|relative|principal|absorbed|lost|norm))?"
)
_WIDE, _NARROW = {"width": 5.0}, {"width": 4.0, "ratio": 0.7}

# (monitor, measure) -> what it is called; the order in which they are told
HEADLINES: dict[tuple[str, str], str] = {
    (TRAINING, "loss"): figures.TRAINING_LOSS,
    (TRAINING, "reward"): "reward",
    (TRAINING, "grad_norm"): "norm of the gradient",
    (TRAINING, "mask_overlap"): "overlap of the mask with the one before",
    ("accuracy", "accuracy"): "held-out accuracy",
    ("accuracy", "thinking_tokens"): "length of the thinking (tokens)",
    ("nll", "answer_nll"): "answer NLL (nats per token)",
    ("entropy", "completion"): "entropy over the completion (nats per token)",
    ("change", "all"): "relative change of the weights",
    ("drift", "all"): "drift on task text (spreads of the start)",
    ("drift-general", "all"): "drift on general text (spreads of the start)",
    ("representation", "thinking.cka"): "CKA with the start, over the thinking",
    ("representation", "answer.cka"): "CKA with the start, over the answer",
    ("representation", "thinking.angle"): "subspace angle, over the thinking (degrees)",
    ("representation", "answer.angle"): "subspace angle, over the answer (degrees)",
    ("geometry", "stable_rank"): "stable rank of the change",
    ("geometry", "principal"): "share of the change on principal entries",
    ("geometry", "absorbed"): "share of moved entries that bf16 absorbs",
    ("gradient", "onward"): "cosine of minus the gradient with the change so far",
    (TRAINING, "pull_merged"): "effective merge coefficient",
    (TRAINING, "pull_cosine"): "cosine of the gradient with the injected direction",
    (TRAINING, "pull_injected"): "injected, over the norm of the gradient",
}


def flight_recorder(
    model: Model,
    path: str | Path,
    *,
    questions: Sequence[Question],
    texts: Sequence[str] = (),
    names: Sequence[str] | None = None,
    budget: float = 0.03,
    steps: int | None = None,
    max_new_tokens: int = 64,
    page: bool = True,
) -> Recorder:
    """A `Recorder` of the toolkit's own measures. Make it before training: it measures from the model as it is now.

    path:      the log. questions: held-out, 16 or so, best with worked solutions. texts: general passages, for ``drift-general``.
    names:     which of `analyses.watch.WATCHES`; by default all that there is something to measure on, but for ``drift`` (see `watches`).
    budget:    share of the training time that measuring may take. steps: instead, a fixed cadence.
    page:      whether to write the page, ``log.html`` beside ``log.jsonl``, when training ends.

    A share of a short run is little: 3 % of 60 steps are two steps' time, and reading a few transcripts costs a third of a step. Then ask
    for fewer names or a larger budget; the page says what there was no time for.
    Raises ValueError as `watches` and `Recorder`.
    """
    watched = watches(names, model, questions, texts, steps, max_new_tokens=max_new_tokens)
    return Recorder(model, watched, path, budget=budget, page=write_page if page else None)


def write_page(log: str | Path, to: str | Path | None = None) -> Path:
    """Write the page of a log; by default beside it, under the log's name with ``.html``. Gives its path."""
    log = Path(log)
    return Flight.load(log).page(log.with_suffix(".html") if to is None else to)


@dataclass(frozen=True)
class Curve:
    """One headline number over the run. called: what it is. steps, values, intervals (low, high; None where the log has none): of each measurement,
    at least one."""

    monitor: str
    measure: str
    called: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    intervals: tuple[tuple[float, float] | None, ...]

    @property
    def half(self) -> float | None:
        """The step by which half of the way from the first to the last value was made; None where they are equal or alone.

        Between two measurements the way is a straight line; the first crossing counts.
        """
        first, last = self.values[0], self.values[-1]
        if first == last:
            return None
        done = [(v - first) / (last - first) for v in self.values]
        at = next(i for i, share in enumerate(done) if share >= 0.5)
        here, before = done[at], done[at - 1]
        return self.steps[at - 1] + (self.steps[at] - self.steps[at - 1]) * (0.5 - before) / (here - before)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.called}: {self.values[0]:.3g}{self._interval} at step {self.steps[0]}"
        first, last = self.values[0], self.values[-1]
        if first == last:
            return f"{self.called}: {last:.3g} at the first measurement and at the last"
        lowest, highest = min(self.values), max(self.values)
        told = f"{self.called}: {first:.4g} at step {self.steps[0]}, {last:.4g}{self._interval} at step {self.steps[-1]}; half of that by step {self.half:.0f}"
        for value, word in ((lowest, "lowest"), (highest, "highest")):
            if value not in (first, last):
                told += f"; {word} {value:.3g} at step {self.steps[self.values.index(value)]}"
        return told

    @property
    def _interval(self) -> str:
        """Of the last value, in words that follow it."""
        last = self.intervals[-1]
        return "" if last is None else f" [{last[0]:.3g}, {last[1]:.3g}]"


@dataclass(frozen=True, repr=False)
class Flight:
    """A training run as its recorder saw it: the lines of the log, in order. Shown, it is the run's story."""

    lines: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, path: str | Path) -> Flight:
        """Read the log of a `Recorder`. Raises FileNotFoundError where there is none and ValueError where it is empty."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no log at {path}.")
        lines = tuple(read_log(path))
        if not lines:
            raise ValueError(f"The log {path} has no line: training has not begun.")
        return cls(lines)

    def save(self, path: str | Path) -> Path:
        """Write the lines again, whole or not at all."""
        return write_whole(Path(path), "".join(json.dumps(line) + "\n" for line in self.lines))

    def frame(self) -> DataFrame:
        """A row a number: step, monitor, measure, span, layer, site, value, low, high. What was not finite, and failures, have no row.

        A line's low and high are of the number that it begins with.
        """
        import pandas as pd

        columns = ["step", "monitor", "measure", "span", "layer", "site", "value", "low", "high"]
        return pd.DataFrame(list(self._rows()), columns=columns).astype({"layer": "Int64"})

    def costs(self) -> DataFrame:
        """A row a monitor: measured (how often), failed, steps (median distance), seconds, each (mean), share of the training time."""
        import pandas as pd

        rows = []
        for name in dict.fromkeys(line["monitor"] for line in self.measurements):
            own = [line for line in self.measurements if line["monitor"] == name]
            at, seconds = [line["step"] for line in own], sum(line["seconds"] for line in own)
            gaps = sorted(b - a for a, b in pairwise(at))
            rows.append(
                {
                    "monitor": name,
                    "measured": len(own),
                    "failed": sum("failed" in line for line in own),
                    "steps": gaps[len(gaps) // 2] if gaps else None,
                    "seconds": seconds,
                    "each": seconds / len(own),
                    "share": seconds / self.training_seconds if self.training_seconds else math.nan,
                }
            )
        return pd.DataFrame(rows, columns=["monitor", "measured", "failed", "steps", "seconds", "each", "share"])

    @cached_property
    def measurements(self) -> tuple[Mapping[str, Any], ...]:
        """The lines that are monitors'."""
        return tuple(line for line in self.lines if line["monitor"] not in (RECORDER, TRAINING))

    @property
    def unmeasured(self) -> list[str]:
        """The monitors that the budget never had the time for."""
        seen = {line["monitor"] for line in self.measurements}
        return [name for name, steps in self._begun.get("every", {}).items() if steps is None and name not in seen]

    @property
    def training_seconds(self) -> float:
        """Seconds that training took without its measurements; 0 where the end was not recorded."""
        return self._ended.get("training_seconds", 0.0)

    def headlines(self) -> DataFrame:
        """A row a headline number at a step: step, measure (what it is called; ``loss``), value, low, high. The table of `analyses.figures.training`."""
        import pandas as pd

        rows = [
            {"step": step, "measure": "loss" if curve.measure == "loss" else curve.called, "value": value}
            | dict(zip(("low", "high"), interval or (), strict=False))
            for curve in self.curves
            for step, value, interval in zip(curve.steps, curve.values, curve.intervals, strict=True)
        ]
        return pd.DataFrame(rows, columns=["step", "measure", "value", "low", "high"])

    @property
    def curves(self) -> list[Curve]:
        """The headline numbers that were measured, in the order of `HEADLINES`."""
        found = []
        for (monitor, measure), called in HEADLINES.items():
            own = [(line["step"], _measured(line)) for line in self.lines if line["monitor"] == monitor]
            at = {step: measured[measure] for step, measured in own if measure in measured}
            if at:
                values, intervals = zip(*at.values(), strict=True)
                found.append(Curve(monitor, measure, called, tuple(at), values, intervals))
        return found

    def story(self) -> list[str]:
        """The run in sentences: what it was, what moved and when, where it moved most, what failed, what watching cost."""
        return [*self._what(), *map(str, self.curves), *self._where(), *self._failures(), *self._cost()]

    def plot(
        self, ax: Axes | None = None, *, monitor: str = TRAINING, measure: str = "loss", places: bool = False
    ) -> Axes:
        """One number against the step; `places`: a map of it over the step and the layer (of each span or part).

        Raises ValueError, listing what there is, for a number that was not measured.
        """
        return (course_map if places else course)(self.frame(), ax, monitor=monitor, measure=measure)

    def page(self, to: str | Path) -> Path:
        """Write the self-contained page: boxes, story, curves, maps over layers, costs. Whole or not at all."""
        return write_whole(
            Path(to), document(f"training of {self._begun.get('model', 'a model')}", list(self._sections()))
        )

    def __repr__(self) -> str:
        return "\n".join(self.story())

    def _repr_html_(self) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in self.story()) + "</ul>"

    # --- parts ----------------------------------------------------------------------------------------------------------------

    def _events(self, event: str) -> list[Mapping[str, Any]]:
        return [line for line in self.lines if line["monitor"] == RECORDER and line.get("event") == event]

    @property
    def _begun(self) -> Mapping[str, Any]:
        return next(iter(self._events("begin")), {})

    @property
    def _ended(self) -> Mapping[str, Any]:
        return next(reversed(self._events("end")), {})

    def _rows(self) -> Iterator[dict[str, Any]]:
        for line in self.lines:
            if line["monitor"] == RECORDER:
                continue
            for key, (value, interval) in _measured(line).items():
                low, high = interval or (math.nan, math.nan)
                yield {
                    "step": line["step"],
                    "monitor": line["monitor"],
                    **_placed(key),
                    "value": value,
                    "low": low,
                    "high": high,
                }

    def _what(self) -> list[str]:
        begun, last = self._begun, max(line["step"] for line in self.lines)
        said = f"{last} of {begun.get('steps', last)} optimizer steps of {begun.get('model', 'a model')}"
        if (split := begun.get("accumulate", 1)) > 1:
            said += f", each of {split} micro-batches"
        resumed = [line["step"] for line in self._events("begin")[1:]]
        if resumed:
            said += f"; resumed at step {', '.join(map(str, resumed))}"
        if not self._events("end"):
            said += "; the end was not recorded"
        return [said + "."]

    def _where(self) -> list[str]:
        """For each number that was measured layer by layer, the layer where it went farthest, at its last measurement."""
        table, told = self.frame(), []
        for monitor, measure, least in _MAPPED:
            own: Any = table[(table["monitor"] == monitor) & (table["measure"] == measure) & table["layer"].notna()]
            if own.empty:
                continue
            own = own[own["step"] == own["step"].max()]
            most = own.loc[own["value"].idxmin() if least else own["value"].idxmax()]
            where = most["site"] or f"layer {most['layer']}" + (f" over the {most['span']}" if most["span"] else "")
            told.append(
                f"{_words(monitor, measure)} at step {most['step']}: {'lowest' if least else 'highest'} at {where} ({most['value']:.3g})"
            )
        return told

    def _failures(self) -> list[str]:
        failed: dict[str, list[Mapping[str, Any]]] = {}
        for line in self.measurements:
            if "failed" in line:
                failed.setdefault(line["monitor"], []).append(line)
        told = [
            f"The monitor {name} failed {len(own)} of {sum(x['monitor'] == name for x in self.measurements)} times, first at step {own[0]['step']}: {own[0]['failed']}"
            for name, own in failed.items()
        ]
        lost: dict[str, list[int]] = {}
        for line in self.lines:
            for key in line.get("undefined", ()):
                lost.setdefault(f"{line['monitor']} {key}", []).append(line["step"])
        told += [f"{name} was not finite at step {', '.join(map(str, at))}" for name, at in list(lost.items())[:5]]
        if len(lost) > 5:
            told.append(f"{len(lost) - 5} more numbers were not finite at some step")
        return told

    def _cost(self) -> list[str]:
        if not self.training_seconds:
            return []
        watching = self._ended["measuring_seconds"]
        told = [
            f"Training took {self.training_seconds:.1f} s and watching it {watching:.1f} s more, {watching / self.training_seconds:.1%} of that"
        ]
        chosen = [name for name, steps in self._begun.get("every", {}).items() if steps is None]
        if chosen:
            share = self._ended["budgeted_seconds"] / self.training_seconds
            told[0] += (
                f"; the budget of {self._begun['budget']:.1%} was {'kept' if share <= self._begun['budget'] else 'overdrawn'} ({share:.1%})"
            )
            if self.unmeasured:
                told.append(f"There was no time to measure {', '.join(self.unmeasured)}")
        return told

    def _sections(self) -> Iterator[str]:
        curves, table = self.curves, self.frame()
        yield f"<h1>What training did to {html.escape(str(self._begun.get('model', 'a model')))}</h1>"
        yield f"<p class=soft>{html.escape(self._what()[0])}</p>"
        yield f'<div class="big">{"".join(map(_box, curves[:6]))}</div>'
        yield "<h2>The run</h2><ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in self.story()[1:]) + "</ul>"
        if curves:
            yield "<h2>What moved, and when</h2>"
            yield pair(
                *(
                    picture(_drawn(course, table, c.monitor, c.measure, **_NARROW), html.escape(c.called))
                    for c in curves
                )
            )
        mapped = [(monitor, measure) for monitor, measure, _ in _MAPPED if _has_places(table, monitor, measure)]
        if mapped:
            yield "<h2>Where it moved</h2>"
            yield pair(
                *(picture(_drawn(course_map, table, *both, **_WIDE), html.escape(_words(*both))) for both in mapped)
            )
        costs = self.costs()
        if len(costs):
            yield "<h2>What watching cost</h2>"
            yield html_table(costs)
        plans = [{**line} for line in (*self._events("begin"), *self._events("plan"))]
        yield f"<details><summary>Plan and settings</summary><pre>{html.escape(json.dumps(plans, indent=2))}</pre></details>"


# numbers that are measured in many places: monitor, measure, and whether it is low where much has changed
_MAPPED = (
    ("change", "", False),
    ("drift", "", False),
    ("drift-general", "", False),
    ("representation", "cka", True),
    ("representation", "angle", False),
    ("representation", "shift", False),
    ("geometry", "stable_rank", False),
    ("geometry", "principal", False),
    ("geometry", "absorbed", False),
    ("gradient", "norm", False),
)


def course(frame: Any, ax: Axes | None = None, *, monitor: str = TRAINING, measure: str = "loss") -> Axes:
    """One number of a run against the optimizer step. frame: as `Flight.frame` gives it.

    Raises ValueError, listing what there is, for a number that was not measured.
    """
    own = frame[(frame["monitor"] == monitor) & (frame["measure"] == measure) & frame["layer"].isna()]
    if own.empty:
        raise ValueError(_nothing(frame, monitor, measure))
    called = HEADLINES.get((monitor, measure), _words(monitor, measure))
    return figures.training(own.assign(measure=called), ax, measure=called)


def course_map(frame: Any, ax: Axes | None = None, *, monitor: str, measure: str = "") -> Axes:
    """One number over the step and the layer: a cell a measurement; spans, or parts of a layer, below each other.

    frame: as `Flight.frame` gives it; ``measure`` is empty for monitors that give one number a place. Raises ValueError as `course`.
    """
    import numpy as np

    own = frame[(frame["monitor"] == monitor) & (frame["measure"] == measure) & frame["layer"].notna()]
    if own.empty:
        raise ValueError(_nothing(frame, monitor, measure))
    part = own["site"].str.split(".").str[1:].str.join(".")
    own = own.assign(kind=own["span"].where(own["span"] != "", part))
    kinds = list(dict.fromkeys(own["kind"]))
    table = own.pivot_table(index=["kind", "layer"], columns="step", values="value", sort=True)
    table = table.reindex([(k, layer) for k in kinds for layer in sorted(own[own["kind"] == k]["layer"].unique())])
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()
    image = ax.imshow(np.asarray(table, dtype=float), aspect="auto", interpolation="nearest", cmap="viridis")
    ax.grid(False)
    _few_ticks(ax, [str(s) for s in table.columns], [f"{k} {layer}".strip() for k, layer in table.index])
    ax.set(xlabel="optimizer step", ylabel="layer" if kinds == [""] else "part and layer")
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(_words(monitor, measure))
    return ax


def _few_ticks(ax: Axes, across: Sequence[str], down: Sequence[str]) -> None:
    for axis, names, most in ((ax.xaxis, across, 8), (ax.yaxis, down, 16)):
        at = range(0, len(names), -(-len(names) // most))
        axis.set_ticks(list(at), [names[i] for i in at])


def _drawn(function: Any, table: Any, monitor: str, measure: str, **size: float) -> bytes:
    return figures.png(figures.draw(function, table, monitor=monitor, measure=measure, **size))


def _box(curve: Curve) -> str:
    first, last, interval = curve.values[0], curve.values[-1], curve.intervals[-1]
    sure = f"{interval[0]:.3g} to {interval[1]:.3g}; " if interval else ""
    return f"<div>{html.escape(curve.called)}<b>{last:.3g}</b><span class=soft>{sure}from {first:.3g} at step {curve.steps[0]}</span></div>"


def _measured(line: Mapping[str, Any]) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """What a line says was measured, by name: the number and its interval. A line's low and high are of the number that it begins with."""
    numbers = {key: float(value) for key, value in line.items() if key not in OWN and isinstance(value, int | float)}
    first, edges = next(iter(numbers), None), None
    if first not in ("low", "high") and numbers.keys() >= {"low", "high"}:
        edges = numbers.pop("low"), numbers.pop("high")
    return {key: (value, edges if key == first else None) for key, value in numbers.items()}


def _placed(key: str) -> dict[str, Any]:
    """A number's name taken apart: measure, span, layer and site."""
    if found := _PLACE.fullmatch(key):
        return {
            "measure": found["measure"] or "",
            "span": found["span"] or "",
            "layer": int(found["layer"]),
            "site": "",
        }
    if found := _SITE.fullmatch(key):
        return {"measure": found["measure"] or "", "span": "", "layer": int(found["layer"]), "site": found["site"]}
    return {"measure": key, "span": "", "layer": None, "site": ""}


def _has_places(table: Any, monitor: str, measure: str) -> bool:
    return bool(((table["monitor"] == monitor) & (table["measure"] == measure) & table["layer"].notna()).any())


def _words(monitor: str, measure: str) -> str:
    return f"{monitor} {measure}".strip().replace("_", " ")


def _nothing(frame: Any, monitor: str, measure: str) -> str:
    there = sorted({f"{m} {x}".strip() for m, x in zip(frame["monitor"], frame["measure"], strict=True)})
    return f"{_words(monitor, measure)!r} was not measured there; there is {', '.join(there) or 'nothing'}."
