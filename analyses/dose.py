"""Dose and response: what a change of the model does at each strength, what it costs elsewhere, and what a random one in its place does.

The same call for a steering, an edit of the weights and a task vector:

    found = sweep(model, Steering(brief, at="14.resid", over="thinking"), (-0.4, -0.2, 0.2, 0.4), questions=held_out)
    found = sweep(model, Editing(RemoveDirection(u), "*.attn.o"), (0.5, 1, 2), questions=held_out)
    found = sweep(model, tuned - base, (0.25, 0.5, 0.75, 1), questions=held_out)

    found.frame(), found.plot(measure="length"), found.knees(), found.trend("length")
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from analyses.changes import Change, Editing, acting, confined, digest, settled, stand_in
from analyses.general_text import GENERAL_TEXT
from analyses.scoring import Likelihood, Row, passages, predicted, quiet, surprise
from analyses.shelf import Shelf
from analyses.statistics import Significance, bootstrap, followed, page, restricted_mean, share
from analyses.tasks import Question, grade
from probes.estimates import ALL_AGREE, Estimate, agree, no_interval
from probes.steering import Steering
from surgery.model import Model
from surgery.proof import loops_at_end
from surgery.transcript import Transcript
from surgery.weights import Delta, Weights
from surgery.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# measure -> the column that holds it
COLUMNS = {
    "target": "target",
    "accuracy": "right",
    "length": "length",
    "cut": "cut",
    "loops": "looped",
    "kl": "kl",
    "text_nll": "nats",
}
MEASURES = tuple(COLUMNS)
Target = Callable[[Model, Sequence[Transcript]], Sequence[float | None]]
_PASSAGES = 4  # at a time: a vocabulary is large


class Line(NamedTuple):
    """A change, the layers and the span it is confined to (None where it is not), and which random stand-in for it this is (None: itself)."""

    arm: str
    layers: tuple[int, ...] | None = None
    span: str | None = None
    draw: int | None = None

    def __str__(self) -> str:
        where = (
            []
            if self.layers is None
            else [f"layer{'s' if len(self.layers) > 1 else ''} {' '.join(map(str, self.layers))}"]
        )
        return ", ".join([self.arm, *where, *([self.span] if self.span else [])])

    def columns(self) -> dict[str, str]:
        return {"arm": str(self), "layers": " ".join(map(str, self.layers or ())), "span": self.span or ""}


_UNTOUCHED = Line("untouched")


@dataclass(frozen=True)
class Cell:
    """What one change did at one strength.

    answers:  column -> a value an answer: ``question`` (its index), and of ``right``, ``length``, ``ended``, ``cut``, ``looped`` and
              ``target`` what was measured; None where an answer lacks it.
    passages: column -> a value a passage of general text: ``tokens``, and summed over them ``nats`` and ``kl``.
    """

    line: Line
    strength: float
    answers: Mapping[str, tuple]
    passages: Mapping[str, tuple]

    @property
    def key(self) -> tuple[Line, float]:
        return self.line, self.strength

    def present(self, column: str) -> tuple[list[int], Float[np.ndarray, " answer"]]:
        """A column without its gaps, and the question of each value."""
        pairs = [(q, v) for q, v in zip(self.answers["question"], self.answers[column], strict=True) if v is not None]
        return [q for q, _ in pairs], np.array([float(v) for _, v in pairs])


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep, the untouched model among them (strength 0, once for all arms).

    cells:    in the order they were measured.
    budget:   KL from the untouched model on general text, in nats a token, that marks the knee.
    seed:     of the resampling.
    settings: what was asked, for the record.
    """

    cells: tuple[Cell, ...]
    budget: float
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def frame(self) -> DataFrame:
        """A row an arm, strength and measure, with its interval.

        Columns: arm, layers, span, draw (which random stand-in; empty for the change itself), strength, measure, value, low, high, n,
        missing (answers without it), knee (whether it is the knee of its side), seed, method. Strength 0 is the untouched model in every arm.

        Lengths are restricted means up to one length for all strengths: the shortest to which any of them was followed. A strength
        followed not half as far as the untouched model does not count, and has no mean (NaN).
        """
        import pandas as pd

        marked = {(row["arm"], row["strength"]) for row in self._knees() if row["reached"]}
        rows = []
        for line, cells in self._lines.items():
            for cell in cells:
                knee = line.draw is None and (str(line), cell.strength) in marked
                for measure, (found, missing) in self._found[cell.key].items():
                    place = {**line.columns(), "draw": line.draw, "strength": cell.strength, "measure": measure}
                    numbers = {
                        "value": found.value,
                        "low": found.low,
                        "high": found.high,
                        "n": found.n,
                        "missing": missing,
                    }
                    rows.append({**place, **numbers, "knee": knee, "seed": found.seed, "method": found.method})
        return pd.DataFrame(rows).astype({"draw": "Int64", "seed": "Int64"})

    def knees(self) -> DataFrame:
        """Where each arm becomes dear, on either side of 0. Columns: arm, layers, span, side, strength, kl, reached.

        Walking outwards from 0, the knee is the last strength before the first whose KL from the untouched model on general text is above
        the budget, or NaN. Where none is, `reached` is False and the outermost strength is given; 0 means that the very first step costs more.
        Empty where KL was not measured.
        """
        import pandas as pd

        return pd.DataFrame(self._knees(), columns=["arm", "layers", "span", "side", "strength", "kl", "reached"])

    def trend(self, measure: str = "length", arm: str | None = None) -> Significance:
        """Whether a measure rises (z above 0) or falls with the strength, question by question (on general text, passage by passage).

        Page's test over all strengths of one arm, 0 among them; a question without an answer at some strength is left out. An answer that
        was cut off counts with the length that was seen, and no length counts for more than the frame's means are restricted to.

        Raises ValueError for a measure or an arm that is not there, several arms, or no complete question.
        """
        arms = {str(line): cells for line, cells in self._lines.items() if line.draw is None}
        if arm is None and len(arms) == 1:
            arm = next(iter(arms))
        if arm is None or arm not in arms:
            raise ValueError(
                f"{'Say which arm' if arm is None else f'There is no arm {arm!r}'}: there are {'; '.join(arms)}."
            )
        columns = [self._by_unit(cell, measure) for cell in arms[arm]]
        shared = [unit for unit in columns[0] if all(unit in column for column in columns)]
        if not shared:
            raise ValueError(f"No question has {measure!r} at every strength.")
        return page([[column[unit] for column in columns] for unit in shared])

    def plot(self, ax: Axes | None = None, *, measure: str | None = None) -> Axes:
        """One measure (by default the first) against the strength, the random stand-ins as a band, the knees dotted."""
        from analyses import figures

        table = self.frame()
        return figures.sweep(table, ax, measure=measure or str(table["measure"].iloc[0]))

    def frontier(self, ax: Axes | None = None, *, measure: str | None = None) -> Axes:
        """One measure of effect (by default target, length or accuracy) against KL on general text, a point a strength, beside the random
        stand-ins, the knees ringed. Raises ValueError where KL, or the measure, was not measured."""
        from analyses import figures

        return figures.frontier(self.frame(), ax, measure=measure)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(Path(path), json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """What `save` wrote."""
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**found, "cells": tuple(_cell(c) for c in found["cells"])})

    def _repr_html_(self) -> str:
        return self.frame().to_html(max_rows=24, float_format="%.4g")

    @cached_property
    def _lines(self) -> dict[Line, list[Cell]]:
        """The cells of each line by strength, the untouched model in each."""
        base = next(cell for cell in self.cells if cell.strength == 0)
        lines: dict[Line, list[Cell]] = {}
        for cell in self.cells:
            if cell is not base:
                lines.setdefault(cell.line, [base]).append(cell)
        return {line: sorted(cells, key=lambda c: c.strength) for line, cells in (lines or {base.line: [base]}).items()}

    @cached_property
    def until(self) -> float:
        """What mean lengths are restricted to: as far as all were followed that were followed half as far as the untouched model's."""
        known: list[tuple[float, float]] = []  # how far followed, and the longest
        for cell in sorted(self.cells, key=lambda c: c.strength != 0):  # the untouched model first
            if "length" in cell.answers and len(seen := cell.present("length")[1]):
                known.append((followed(seen, cell.present("ended")[1]), float(seen.max())))
        if not known:
            return 1.0
        far = [reach for reach, _ in known if reach >= min(known[0]) / 2]
        return max(1.0, min([*far, max(longest for _, longest in known)]))

    @cached_property
    def _found(self) -> dict[tuple[Line, float], dict[str, tuple[Estimate, int]]]:
        """Of each cell every measure's estimate, and how many answers lack it."""
        return {cell.key: dict(self._judged(cell)) for cell in self.cells}

    def _judged(self, cell: Cell) -> Iterator[tuple[str, tuple[Estimate, int]]]:
        for measure, column in COLUMNS.items():
            if column in cell.passages:
                yield measure, (Likelihood(cell.passages[column], cell.passages["tokens"], seed=self.seed).mean, 0)
            elif column in cell.answers:
                yield measure, self._judge(cell, measure)

    def _judge(self, cell: Cell, measure: str) -> tuple[Estimate, int]:
        question, values = cell.present(COLUMNS[measure])
        missing = len(cell.answers["question"]) - len(values)
        if measure == "accuracy":  # a missing answer is not right
            question, values = (
                list(cell.answers["question"]),
                np.array([v is True for v in cell.answers["right"]], dtype=float),
            )
        if not len(values):
            return no_interval(math.nan, 0, "no answer has it"), missing
        if measure == "length":
            ended = cell.present("ended")[1]
            if (reach := followed(values, ended)) < self.until:
                return no_interval(math.nan, len(set(question)), f"followed to {reach:g} only"), missing
            return restricted_mean(values, ended, until=self.until, clusters=question, seed=self.seed), missing
        if measure == "target":
            if len(set(question)) > 1 and agree(values):
                return no_interval(float(values[0]), len(set(question)), ALL_AGREE), missing
            return bootstrap(values, clusters=question, seed=self.seed), missing
        return share(values, question, seed=self.seed), missing

    def _knees(self) -> list[dict[str, Any]]:
        rows = []
        for line, cells in self._lines.items():
            if line.draw is not None or any("kl" not in self._found[cell.key] for cell in cells):
                continue
            for side, sign in (("below", -1), ("above", 1)):
                walk = sorted((c for c in cells if c.strength * sign >= 0), key=lambda c: abs(c.strength))
                if len(walk) < 2:
                    continue
                cost = [self._found[c.key]["kl"][0].value for c in walk]
                dear = next((i for i, kl in enumerate(cost) if not kl <= self.budget), None)  # NaN is dear
                at = len(walk) - 1 if dear is None else max(dear - 1, 0)
                found = {"side": side, "strength": walk[at].strength, "kl": cost[at], "reached": dear is not None}
                rows.append({**line.columns(), **found})
        return rows

    def _by_unit(self, cell: Cell, measure: str) -> dict[int, float]:
        """A measure's mean for each question, or passage, of a cell."""
        if measure not in self._found[cell.key]:
            raise ValueError(
                f"There is no measure {measure!r} in this sweep; it has {', '.join(self._found[cell.key])}."
            )
        column = COLUMNS[measure]
        if column in cell.passages:
            return {
                i: total / count
                for i, (total, count) in enumerate(zip(cell.passages[column], cell.passages["tokens"], strict=True))
            }
        of: dict[int, list[float]] = {}
        for question, value in zip(*cell.present(column), strict=True):
            of.setdefault(question, []).append(min(float(value), self.until) if measure == "length" else float(value))
        return {question: sum(values) / len(values) for question, values in of.items()}


def sweep(
    model: Model,
    change: Change | Mapping[str, Change],
    strengths: Sequence[float],
    *,
    questions: Sequence[Question | str],
    layers: Sequence[int | Sequence[int]] | None = None,
    span: str | Sequence[str] | None = None,
    target: Target | None = None,
    measures: Sequence[str] | None = None,
    length: str | None = None,
    controls: int = 5,
    texts: Sequence[str] = GENERAL_TEXT[:16],
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    budget: float = 0.05,
    seed: int = 0,
    to: str | Path | None = None,
    progress: bool = False,
) -> Sweep:
    """Answer questions, and read general text, with a change of the model at each strength, and untouched (strength 0) in any case.

    change     a `Steering`, an `Editing` or a `Delta`; or several by name, each an arm. The strength swept takes the place of its own; a
               delta is multiplied by it
    strengths  finite numbers. 1 is the whole edit or delta; of a steering it is in the steering's units
    layers     each entry (a layer, or several together) is an arm by itself: the part of the change in these layers
    span       likewise, for a steering: each is an arm, the steering over this span in place of its own
    target     what the change is for: ``(model, transcripts) -> a finite number each``, None or NaN where a transcript has none; called
               while the change acts. Its mean over the answers that have one is the measure, not how far it is from the untouched model's
    measures   by default all of these that can be measured:
               ``target``; ``accuracy`` (a missing answer is not right); ``length`` (restricted mean of the tokens of the span `length`: one
               that the cap cut off is longer than was seen, an answer without the span is missing); ``cut`` (share that the cap cut off);
               ``loops`` (share cut off while repeating up to 8 tokens, at least 4 times in a row); and on general text ``kl`` (of the changed
               model from the untouched, nats a token, over the whole vocabulary) and ``text_nll`` (nats a token)
    length     the span whose length is measured: "thinking", "answer" or "completion"; by default the thinking where an answer of the
               untouched model has it, else the answer (`settings` says which)
    controls   random stand-ins for each arm, see `stand_in`
    texts      general text. It has no spans: a steering acts on all of it
    samples, temperature, max_new_tokens, batch_size  as in `Model.generate`
    budget     see `Sweep.knees`
    seed       of sampling, resampling and stand-ins
    to         a folder that keeps every cell as soon as it is measured. A sweep that was interrupted goes on; strengths, layers, spans and
               controls may be added later; what is there is not measured again

    Intervals resample questions, a question's samples together, and passages; of one sample a question, and where all draws agree, shares
    have Wilson intervals, and targets and lengths none.

    Errors: ValueError for strengths that are not finite; an unknown measure; a target that is infinite, or not one each; a layer or a span that the change does not have; a span whose
    length no answer of the untouched model has, or that the cap cut off in all of them. FileExistsError for a folder that holds
    something else, or a sweep with other settings.
    """
    from tqdm.auto import tqdm

    changes = {name: settled(one, model) for name, one in _by_name(change).items()}
    steps = sorted({float(s) for s in strengths} - {0.0})
    if not len(strengths) or not all(map(math.isfinite, steps)):
        raise ValueError(f"strengths {list(strengths)}: give one finite number or more.")
    if controls < 0:
        raise ValueError(f"controls {controls}: a number of random stand-ins, 0 or more.")
    if controls and any(isinstance(one, Steering) and one.direction is None for one in changes.values()):
        raise ValueError(
            "A steering by a function has no direction, and nothing can be drawn in its place: give controls=0."
        )
    chosen = _chosen(measures, questions, target)
    bench = _Bench(
        model,
        list(questions),
        list(texts),
        chosen,
        target,
        length,
        samples,
        temperature,
        max_new_tokens,
        batch_size,
        seed,
    )
    own = list(
        dict.fromkeys(Line(name, group, over) for name in changes for group in _groups(layers) for over in _spans(span))
    )
    # a layer or a span that is not there is an error now, not hours later
    parts = {line: confined(changes[line.arm], model, layers=line.layers, span=line.span) for line in own}
    lines = own + [line._replace(draw=draw) for draw in range(controls) for line in own]
    shelf = Shelf(to, "sweep", _plan(model, changes, bench)) if to is not None else None

    cells: list[Cell] = []
    with tqdm(total=1 + len(lines) * len(steps), desc="strength sweep", disable=not progress, leave=False) as bar:

        def measured(line: Line, strength: float, change: Callable[[], Change | None]) -> Cell:
            held = shelf.find(_part(line, strength)) if shelf else None
            cell = _cell(held) if held else None
            if held:
                bench.length = held.get("span", bench.length)
            if cell is None:
                cell = Cell(line, strength, *bench.measure(change(), strength))
                if line == _UNTOUCHED:
                    bench.require_lengths(cell)
                if shelf:
                    shelf.keep(_part(*cell.key), {**asdict(cell), "span": bench.length})
            bar.update()
            return cell

        cells.append(measured(_UNTOUCHED, 0.0, lambda: None))
        for line in lines:
            part, draw = parts[line._replace(draw=None)], line.draw

            @cache
            def drawn(part: Change = part, draw: int | None = draw) -> Change:
                return part if draw is None else stand_in(part, model, seed=seed, draw=draw)

            cells += [measured(line, strength, drawn) for strength in steps]
    return Sweep(tuple(cells), budget, seed, bench.settings() | {"strengths": steps, "controls": controls})


def lengths(transcripts: Sequence[Transcript], over: str = "thinking") -> tuple[list[int | None], list[bool | None]]:
    """How many tokens a span of each transcript has, and whether it ended by itself; None and None where the transcript lacks it.

    A span that reaches the last token of a transcript that did not finish was cut off: it is at least that long.
    """
    counts: list[int | None] = []
    ended: list[bool | None] = []
    for transcript in transcripts:
        begin, end = transcript.spans.get(over, (0, None))
        counts.append(None if end is None else end - begin)
        ended.append(None if end is None else transcript.finished or end < len(transcript.ids))
    return counts, ended


def _by_name(change: Any) -> dict[str, Change]:
    kinds = {Steering: "steering", Editing: "edit", Delta: "task vector"}
    for kind, name in kinds.items():
        if isinstance(change, kind):
            return {name: change}
    if isinstance(change, Weights):
        raise ValueError("A point is not a change: give its difference from the model's own weights.")
    if not isinstance(change, Mapping) or not change or not all(isinstance(c, tuple(kinds)) for c in change.values()):
        raise ValueError(
            f"{type(change).__name__} cannot be swept: give a Steering, an Editing or a Delta, or several by name."
        )
    return {str(name): one for name, one in change.items()}


def _groups(layers: Sequence[int | Sequence[int]] | None) -> list[tuple[int, ...] | None]:
    return [None] if layers is None else [(entry,) if isinstance(entry, int) else tuple(entry) for entry in layers]


def _spans(span: str | Sequence[str] | None) -> list[str | None]:
    return [span] if span is None or isinstance(span, str) else list(span)


def _chosen(
    measures: Sequence[str] | None, questions: Sequence[Question | str], target: Target | None
) -> tuple[str, ...]:
    """The measures asked for, in the order of the table."""
    if not questions:
        raise ValueError("There is no question to answer.")
    needs = {
        "target": (target is not None, "a target"),
        "accuracy": (all(isinstance(q, Question) for q in questions), "questions with answers"),
    }
    if measures is None:
        return tuple(m for m in MEASURES if m not in needs or needs[m][0])
    unknown = [m for m in measures if m not in MEASURES]
    if unknown or not measures:
        raise ValueError(f"Measures {', '.join(unknown) or '(none)'}: choose of {', '.join(MEASURES)}.")
    for measure in measures:
        if measure in needs and not needs[measure][0]:
            raise ValueError(f"The measure {measure!r} needs {needs[measure][1]}.")
    return tuple(m for m in MEASURES if m in measures)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Bench:
    """What is measured of a model, with or without a change."""

    model: Model
    questions: list[Question | str]
    texts: list[str]
    measures: tuple[str, ...]
    target: Target | None
    length: str | None  # of the default: None until the untouched model has answered
    samples: int
    temperature: float | None
    max_new_tokens: int
    batch_size: int
    seed: int

    def settings(self) -> dict[str, Any]:
        plain = ("length", "samples", "temperature", "max_new_tokens", "batch_size", "seed")
        counts = {"measures": list(self.measures), "questions": len(self.questions), "passages": len(self.texts)}
        return {name: getattr(self, name) for name in plain} | counts

    def measure(self, change: Change | None, strength: float) -> tuple[dict[str, tuple], dict[str, tuple]]:
        """What answers, and what passages show of the model with a change at a strength."""
        if change is None:
            return self._answers(), self._passages()
        if "kl" in self.measures:
            _ = self._untouched  # before the change acts
        if not isinstance(change, Steering):
            with acting(change, self.model, strength):
                return self._answers(), self._passages(self._untouched_if_needed)
        with acting(change, self.model, strength):
            answers = self._answers()
        with acting(replace(change, over="all"), self.model, strength):  # general text has no prompt and no thinking
            return answers, self._passages(self._untouched_if_needed)

    def require_lengths(self, untouched: Cell) -> None:
        """Raise ValueError where the untouched model's answers leave nothing to compare lengths with."""
        if "length" not in self.measures:
            return
        _, ended = untouched.present("ended")
        if not len(ended):
            raise ValueError(
                f"None of the untouched model's {len(untouched.answers['question'])} answers has a span {self.length!r}, so there is no length "
                "to follow. Follow another one, as with --length completion (in Python length='completion')."
            )
        if not ended.any():
            raise ValueError(
                f"The cap of {self.max_new_tokens} tokens cut off all {len(ended)} spans {self.length!r} of the untouched model: how long they "
                "are is not known. Raise --max-new-tokens (in Python max_new_tokens)."
            )

    def _answers(self) -> dict[str, tuple]:
        if not {"target", "accuracy", "length", "cut", "loops"} & set(self.measures):
            return {}
        asked = [q.question if isinstance(q, Question) else q for q in self.questions]
        given = self.model.generate(
            asked,
            samples=self.samples,
            temperature=self.temperature,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        index = [i for i in range(len(asked)) for _ in range(self.samples)]
        found: dict[str, Sequence] = {"question": index}
        if "target" in self.measures and self.target is not None:
            values = list(self.target(self.model, given))
            if len(values) != len(given):
                raise ValueError(
                    f"The target gave {len(values)} numbers for {len(given)} transcripts: one each is needed, or None."
                )
            if endless := [v for v in values if v is not None and math.isinf(v)]:
                raise ValueError(
                    f"The target gave {endless[0]} for {len(endless)} of {len(given)} transcripts: a finite number each is needed, or None."
                )
            found["target"] = [None if v is None or math.isnan(v) else float(v) for v in values]
        if "accuracy" in self.measures:
            asking = [q for q in self.questions if isinstance(q, Question)]
            found["right"] = [grade(asking[i], t) for i, t in zip(index, given, strict=True)]
        if "length" in self.measures:
            if self.length is None:
                self.length = "thinking" if any("thinking" in t.spans for t in given) else "answer"
            found["length"], found["ended"] = lengths(given, self.length)
        if "cut" in self.measures:
            found["cut"] = [not t.finished for t in given]
        if "loops" in self.measures:
            found["looped"] = [
                not t.finished and loops_at_end(t.ids[slice(*t.spans["completion"])]) is not None for t in given
            ]
        return {name: tuple(column) for name, column in found.items()}

    def _passages(self, untouched: dict[int, Tensor] | None = None) -> dict[str, tuple]:
        if not {"kl", "text_nll"} & set(self.measures):
            return {}
        nats, divergence = [0.0] * len(self._rows), [0.0] * len(self._rows)
        with quiet(self.model.module):
            for row, logs, said in self._read():
                nats[row] = float(surprise(logs, said).cpu().double().sum())
                if "kl" in self.measures:
                    before = logs if untouched is None else untouched[row].to(logs.device)
                    divergence[row] = float((logs.exp() * (logs - before)).sum(-1).clamp_min(0).cpu().double().sum())
        columns = {"tokens": [len(scored) for _, scored in self._rows], "kl": divergence, "nats": nats}
        kept = {"tokens", *(COLUMNS[m] for m in self.measures)}
        return {name: tuple(column) for name, column in columns.items() if name in kept}

    @cached_property
    def _rows(self) -> list[Row]:
        return passages(self.model, self.texts)

    @cached_property
    def _untouched(self) -> dict[int, Tensor]:
        """Of each passage the log-probabilities of the untouched model."""
        with quiet(self.model.module):
            return {row: logs.cpu() for row, logs, _ in self._read()}

    @property
    def _untouched_if_needed(self) -> dict[int, Tensor] | None:
        return self._untouched if "kl" in self.measures else None

    def _read(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        # nobody asked: all of a passage is as if the model said it
        return predicted(self.model, self._rows, [0] * len(self._rows), _PASSAGES)


# --- cells on disk ----------------------------------------------------------------------------------------------------


def _part(line: Line, strength: float) -> str:
    """What a cell is called on the shelf."""
    return f"cells/{digest([*line, strength])[:16]}"


def _cell(found: dict[str, Any]) -> Cell:
    arm, layers, span, draw = found["line"]
    line = Line(arm, None if layers is None else tuple(layers), span, draw)
    columns = [{name: tuple(values) for name, values in found[kind].items()} for kind in ("answers", "passages")]
    return Cell(line, found["strength"], *columns)


def _plan(model: Model, changes: Mapping[str, Change], bench: _Bench) -> dict[str, Any]:
    """What the cells of one folder have in common; large things as hashes."""
    large = {"questions": digest(bench.questions), "texts": digest(bench.texts), "target": digest(bench.target)}
    named = {
        "model": digest(dict(model.module.named_parameters())),
        "changes": {name: digest(one) for name, one in changes.items()},
    }
    return {**named, **bench.settings(), **large}
