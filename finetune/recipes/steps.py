"""The structure of a chain of thought disturbed, and its content: what does training on such traces teach, and is a trace read at all?

What comes back is changed: a transcript that cannot be (no thinking, too few steps) is left out. Answers stay as they were.
Source of the disturbances: Li et al. 2025 (arXiv 2502.07374), structure, not content; shares there are of the steps of every trace.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from finetune.recipes.equations import Equation, evaluate
from finetune.recipes.retelling import Steps, draw, noted, require_some, retold
from surgery.model import Model
from surgery.transcript import Transcript

Flaw = Callable[[str, random.Random], str | None]
_SUM = re.compile(
    r"(?<![\d.,)(*/+-])(-?\d+(?:\.\d+)?)((?:\s*[-+*/]\s*\d+(?:\.\d+)?)+)(\s*=\s*)(-?\d+(?:\.\d+)?)(?!\d|[.,]\d)"
)
_TERM = re.compile(r"(\s*)([-+*/])(\s*)(\d+(?:\.\d+)?)")


def shuffle_steps(
    model: Model, transcripts: Sequence[Transcript], *, share: float = 1.0, seed: int = 0
) -> list[Transcript]:
    """The steps of each thinking in another order: a share of them, drawn, change places, and no text is the same as before.

    share: of the steps of a thinking, in (0, 1]; at least two move.
    """

    def shuffled(steps: Steps, rng: random.Random) -> tuple[Steps, dict[str, object]] | None:
        if len(set(steps.bodies)) < 2:
            return None
        members = sorted(rng.sample(range(len(steps)), max(2, round(share * len(steps)))))
        if len({steps.bodies[i] for i in members}) < 2:  # all drawn are alike: one of the others must move
            other = next(i for i in range(len(steps)) if steps.bodies[i] != steps.bodies[members[0]])
            members = sorted({*members[1:], other})
        bodies = list(steps.bodies)
        while tuple(bodies) == steps.bodies:
            order = rng.sample(members, len(members))
            for place, source in zip(members, order, strict=True):
                bodies[place] = steps.bodies[source]
        return replace(steps, bodies=tuple(bodies)), {"moved": members}

    return _changed(
        model, transcripts, "shuffle_steps", share, seed, shuffled, "none has two different steps of thinking."
    )


def delete_steps(
    model: Model, transcripts: Sequence[Transcript], *, share: float = 0.5, matching: str = "", seed: int = 0
) -> list[Transcript]:
    """Each thinking without a share of its steps, drawn; at least one goes, and all may.

    share: in (0, 1]. matching: only steps that this regular expression finds something in (``wait|check``) may go; the share is of those.
    """
    pattern = re.compile(matching)

    def deleted(steps: Steps, rng: random.Random) -> tuple[Steps, dict[str, object]] | None:
        may = [i for i, body in enumerate(steps.bodies) if pattern.search(body)]
        if not may:
            return None
        gone = sorted(rng.sample(may, max(1, round(share * len(may)))))
        return steps.keeping([i for i in range(len(steps)) if i not in gone]), {"deleted": gone}

    return _changed(model, transcripts, "delete_steps", share, seed, deleted, "none has such a step of thinking.")


def insert_steps(
    model: Model, transcripts: Sequence[Transcript], *, share: float = 0.5, seed: int = 0
) -> list[Transcript]:
    """Each thinking with steps from transcripts of other questions put in at drawn places.

    share: how many are put in, as a share of the thinking's own steps, above 0; at least one.
    """
    taken = [(t.question, Steps.of(t, model.markers)) for t in transcripts]
    bodies = {q: [b for question, steps in taken if steps and question != q for b in steps.bodies] for q, _ in taken}

    def inserted(steps: Steps, rng: random.Random, question: str) -> tuple[Steps, dict[str, object]] | None:
        if not bodies[question]:
            return None
        places = []
        for _ in range(max(1, round(share * len(steps)))):
            places.append(rng.randint(0, len(steps)))
            steps = steps.with_step(places[-1], rng.choice(bodies[question]))
        return steps, {"inserted": places}

    if not share > 0:
        raise ValueError(f"share={share}: above 0.")
    kept = []
    for i, transcript in enumerate(transcripts):
        steps = taken[i][1]
        done = inserted(steps, draw("insert_steps", seed, i), transcript.question) if steps else None
        if done:
            kept.append(
                noted(retold(model, transcript, done[0].text()), "insert_steps", share=share, seed=seed, **done[1])
            )
    require_some(kept, len(transcripts), "steps come from transcripts of other questions, and none has thinking.")
    return kept


def corrupt_digits(
    model: Model, transcripts: Sequence[Transcript], *, share: float = 0.5, seed: int = 0
) -> list[Transcript]:
    """A share of the digits of each thinking, drawn, become other digits; at least one. The words and the order of the steps stay.

    share: of the digits, in (0, 1].
    """

    def corrupted(steps: Steps, rng: random.Random) -> tuple[Steps, dict[str, object]] | None:
        bodies = [list(body) for body in steps.bodies]
        places = [(i, j) for i, body in enumerate(bodies) for j, c in enumerate(body) if c in "0123456789"]
        if not places:
            return None
        count = max(1, round(share * len(places)))
        for i, j in sorted(rng.sample(places, count)):
            bodies[i][j] = rng.choice([d for d in "0123456789" if d != bodies[i][j]])
        return replace(steps, bodies=tuple("".join(body) for body in bodies)), {"digits": count}

    return _changed(model, transcripts, "corrupt_digits", share, seed, corrupted, "no thinking has a digit.")


def _changed(
    model: Model, transcripts: Sequence[Transcript], name: str, share: float, seed: int,
    change: Callable[[Steps, random.Random], tuple[Steps, dict[str, object]] | None], why: str,
) -> list[Transcript]:  # fmt: skip
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: a share in (0, 1].")
    kept = []
    for i, transcript in enumerate(transcripts):
        steps = Steps.of(transcript, model.markers)
        done = change(steps, draw(name, seed, i)) if steps else None
        if done:
            kept.append(noted(retold(model, transcript, done[0].text()), name, share=share, seed=seed, **done[1]))
    require_some(kept, len(transcripts), why)
    return kept


# --- one flaw -----------------------------------------------------------------------------------------------------------------


def flip_sign(step: str, rng: random.Random) -> str | None:
    """A plus for a minus or the other way round, the result as it was: ``17 + 30 = -13``. A calculation error."""
    return _with_flaw(step, rng, lambda first, terms, result: [
        (first + _joined(terms, i, _other_sign(terms[i])), result) for i in range(len(terms)) if terms[i][1] in "+-"
    ])  # fmt: skip


def drop_term(step: str, rng: random.Random) -> str | None:
    """One term fewer, the result as it was: ``3 + 5 = 12`` for ``3 + 4 + 5 = 12``. A calculation error; None below three terms."""
    return _with_flaw(step, rng, lambda first, terms, result: [
        (first + _joined(terms[:i] + terms[i + 1 :]), result) for i in range(len(terms)) if len(terms) > 1
    ])  # fmt: skip


def wrong_result(step: str, rng: random.Random) -> str | None:
    """Another result: ``3 + 4 = 8``. A calculation error, off by 1, 2 or 10."""
    return _with_flaw(step, rng, lambda first, terms, result: [
        (first + _joined(terms), _written(evaluate(result), off)) for off in (-10, -2, -1, 1, 2, 10)
    ])  # fmt: skip


def wrong_rule(step: str, rng: random.Random) -> str | None:
    """The wrong operation, rightly computed: ``17 + 30 = 47`` for ``17 - 30 = -13``. A reasoning error: the equation holds."""

    def options(first: str, terms: list[tuple[str, ...]], result: str) -> list[tuple[str, str | None]]:
        sides = [first + _joined(terms, i, _other_sign(terms[i])) for i in range(len(terms)) if terms[i][1] in "+-"]
        return [(side, _written(evaluate("".join(side.split())), 0)) for side in sides]

    return _with_flaw(step, rng, options, holds=True)


FLAWS: tuple[Flaw, ...] = (flip_sign, drop_term, wrong_result, wrong_rule)


def flawed_prefix(
    model: Model, transcripts: Sequence[Transcript], *, flaws: Sequence[Flaw] = FLAWS, seed: int = 0
) -> list[Transcript]:
    """The thinking of each transcript up to a drawn step, that step with exactly one error in it: a prefix to recover from.

    flaws: functions ``(step, rng) -> flawed step``, or None where they do not apply; one that applies somewhere is drawn, then one of the
           steps it applies to. The built-in ones change an equation that held.

    The transcripts end there, unfinished; their span ``flaw`` is the flawed step. `Model.continued` writes on, with the span
    ``continuation`` to train on. Only unflawed transcripts make sense as input. Raises ValueError where no flaw applies anywhere.
    Source: the injected errors of Amjith et al. 2025 (arXiv 2512.17079): one calculation or one reasoning error in a prefix.
    """
    kept = []
    for i, transcript in enumerate(transcripts):
        steps, rng = Steps.of(transcript, model.markers), draw("flawed_prefix", seed, i)
        if steps is None:
            continue
        for flaw in rng.sample(list(flaws), len(flaws)):
            made = [(k, bad) for k, body in enumerate(steps.bodies) if (bad := flaw(body, rng)) not in (None, body)]
            if made:
                kept.append(_flawed(model, transcript, steps, flaw, *rng.choice(made)))
                break
    require_some(kept, len(transcripts), "none of the flaws applies to a step of the thinking.")
    return kept


def _flawed(model: Model, transcript: Transcript, steps: Steps, flaw: Flaw, at: int, bad: str | None) -> Transcript:
    assert bad is not None
    gap = steps.gaps[at] if at < len(steps.gaps) else steps.gap
    prefix = replace(steps.keeping(range(at + 1)), after=gap)
    whole = replace(prefix, bodies=(*prefix.bodies[:-1], bad))
    told = retold(model, transcript, whole.text(), finished=False)
    begin = told.text.rindex(bad)
    inside = [i for i, (b, e) in enumerate(told.offsets) if b < begin + len(bad) and e > begin]
    spans = {**told.spans, "flaw": (inside[0], inside[-1] + 1)}
    name = getattr(flaw, "__name__", type(flaw).__name__)
    return noted(
        replace(told, spans=spans), "flawed_prefix", flaw=name, step=at, steps=len(steps), was=steps.bodies[at], now=bad
    )


_Options = Callable[[str, list[tuple[str, ...]], str], Sequence[tuple[str, str | None]]]


def _with_flaw(step: str, rng: random.Random, options: _Options, holds: bool = False) -> str | None:
    """One of the flawed equations that are possible in a step, put in the place of the right one; None where there is none."""
    possible = []
    for found in _SUM.finditer(step):
        first, rest, equals, result = found.groups()
        if not Equation("".join((first + rest).split()), result).holds:
            continue
        for side, value in options(first, _TERM.findall(rest), result):
            if value is None:
                continue
            made = Equation("".join(side.split()), value)
            if made.holds == holds and (value != result or not holds):
                possible.append(step[: found.start()] + side + equals + value + step[found.end() :])
    return rng.choice(possible) if possible else None


def _joined(terms: Sequence[tuple[str, ...]], at: int | None = None, instead: str = "") -> str:
    return "".join(instead if i == at else "".join(term) for i, term in enumerate(terms))


def _other_sign(term: tuple[str, ...]) -> str:
    return term[0] + {"+": "-", "-": "+"}[term[1]] + term[2] + term[3]


def _written(value: object, off: int) -> str | None:
    """A number as text; None where it is no whole number and no short decimal."""
    if not isinstance(value, Fraction):
        return None
    number = value + off
    if number.denominator == 1:
        return str(number.numerator)
    text = f"{float(number):.6f}".rstrip("0")
    return text if Fraction(text) == number else None
