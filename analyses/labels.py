"""What a probe is asked to read: a label for each transcript, from what the transcripts themselves hold.

asked = labels_of(runs, "right")
probe(model, runs, asked.values, kind=asked.kind)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analyses.tasks import Question, grade
from probes.directions import Length, span_lengths
from probes.fitting import Kind
from surgery.transcript import Transcript, nobody_has


@dataclass(frozen=True)
class Labels:
    """A label for each transcript.

    values: 1 or 0 (classes) or a number; None where the transcript has no label.
    kind:   what `probes.linear.probe` is told.
    said:   what the labels mean, in words.
    """

    values: tuple[float | None, ...]
    kind: Kind
    said: str

    def __str__(self) -> str:
        known = [v for v in self.values if v is not None]
        ones = f", {sum(v == 1 for v in known)} of them 1" if self.kind == "classes" else ""
        return f"{len(known)} of {len(self.values)} transcripts have a label{ones}; {self.said}"


def labels_of(runs: Sequence[Transcript], of: str, *, length: str = "thinking") -> Labels:
    """The labels that transcripts hold.

    of:     ``right``: whether the answer is right, by the ``gold`` of a transcript's `meta`; no answer, no label. ``length``: whether a
            span is long, see `long_or_short`. Or a key of `meta`: of two values the larger, or later in the alphabet, is 1; of more, all
            must be numbers, and are labels as they are.
    length: the span whose length counts.

    Raises ValueError for a key that no transcript has, values that are neither two nor numbers, labels of one class only, and a span that no
    transcript has, or all of whose lengths are unknown.
    """
    if of == "right":
        values: list[float | None] = [None if known is None else float(known) for known in right_or_wrong(runs)]
        labels = Labels(tuple(values), "classes", "1 is a right answer, 0 a wrong one")
    elif of == "length":
        lengths = span_lengths(runs, length)
        if not any(lengths):
            raise ValueError(nobody_has(runs, length))
        found, cut = long_or_short(lengths)
        said = f"1 is {length} of {cut} tokens or more, 0 of fewer; what was cut off before that is left out"
        labels = Labels(tuple(None if v is None else float(v) for v in found), "classes", said)
    else:
        labels = _kept_at(runs, of)
    known = {v for v in labels.values if v is not None}
    if len(known) < 2:
        there = f"all of them are {known.pop():g}" if known else "there is none"
        raise ValueError(f"A probe of {of} needs labels that differ, and {there} ({labels}).")
    return labels


def right_or_wrong(runs: Sequence[Transcript]) -> list[bool | None]:
    """Whether each transcript's answer is right; None where it has no answer. Raises ValueError where one has no gold answer."""
    known = [(gold, t) for t in runs if (gold := gold_of(t)) is not None]
    if len(known) < len(runs):
        raise ValueError("These answers come without their gold answers; `surgery generate` writes them.")
    return [grade(gold, t) for gold, t in known]


def gold_of(transcript: Transcript) -> Question | None:
    """The question that a transcript answers with its gold answer, as `graded_by` keeps it; None where none is kept."""
    if "gold" not in transcript.meta:
        return None
    task = transcript.meta.get("task")
    return Question(transcript.question, str(transcript.meta["gold"]), None, task if isinstance(task, Mapping) else {})


def graded_by(question: Question) -> dict[str, Any]:
    """What a transcript's `meta` must hold for its answer to be graded: ``gold``, and ``task``, which a reasoning-gym scorer looks at.

    Tuples are lists in it, as JSON has them; scorers do not mind. What JSON has no word for is left out with all of ``task``: an answer
    is then right when it is the gold one.
    """
    task = _listed(question.meta)
    try:
        kept = json.loads(json.dumps(task, allow_nan=False)) == task
    except (TypeError, ValueError):
        kept = False
    return {"gold": question.answer, **({"task": task} if kept else {})}


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def long_or_short(lengths: Sequence[Length | None]) -> tuple[list[int | None], int]:
    """1 for a length of so many tokens or more, 0 for fewer, None where that is not known; and how many tokens.

    The cut is the one that deals the lengths most evenly. A censored length is at least what was seen of it, so it is long or not known,
    never short. Raises ValueError where no cut leaves lengths on both sides.
    """
    known = [length for length in lengths if length is not None]
    even = {cut: min(_sides(known, cut)) for cut in sorted({length.tokens for length in known})}
    best = max(even, key=lambda cut: even[cut], default=0)  # of several, the shortest
    if not even.get(best):
        censored = sum(length.censored for length in known)
        raise ValueError(
            f"{len(known)} lengths, {censored} of them cut off, cannot be dealt into long and short: those that ended are all at least as "
            "long as the others. Give more samples, or a higher cap."
        )
    return [None if length is None else _side(length, best) for length in lengths], best


def _side(length: Length, cut: int) -> int | None:
    return 1 if length.tokens >= cut else None if length.censored else 0


def _sides(lengths: Sequence[Length], cut: int) -> tuple[int, int]:
    """How many are short, and long."""
    sides = [_side(length, cut) for length in lengths]
    return sides.count(0), sides.count(1)


def _kept_at(runs: Sequence[Transcript], key: str) -> Labels:
    values = [t.meta.get(key) for t in runs]
    known = [v for v in values if v is not None]
    if not known:
        keys = sorted({name for t in runs for name in t.meta})
        raise ValueError(
            f"No transcript has a label {key!r}: there are right, length, and in meta {', '.join(keys) or 'nothing'}."
        )
    if any(isinstance(v, dict | list) for v in known):
        raise ValueError(f"{key!r} of the transcripts holds lists or mappings: a label is a number or a word.")
    numbers = [None if v is None else _number(v) for v in values]
    real = all(v is None or n is not None for v, n in zip(values, numbers, strict=True))
    levels: list[Any] = sorted({n for n in numbers if n is not None} if real else {str(v) for v in known})
    if len(levels) > 2:
        if not real:
            raise ValueError(
                f"{key!r} has {len(levels)} values, of which some are words ({', '.join(levels[:6])}): a probe reads two classes or a number."
            )
        return Labels(tuple(numbers), "number", f"numbers from {levels[0]:g} to {levels[-1]:g}")
    marks = numbers if real else [None if v is None else str(v) for v in values]
    names = [f"{level:g}" if real else level for level in levels]
    said = f"1 is {key} {names[-1]}" + (f", 0 is {names[0]}" if len(names) > 1 else "")
    return Labels(tuple(None if m is None else float(m == levels[-1]) for m in marks), "classes", said)


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as text; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
