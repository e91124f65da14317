"""What recipes are made of: a transcript's text taken apart into steps and put together again, cut short, graded, and noted upon."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar, runtime_checkable

from surgery.model import Model
from surgery.transcript import SENTENCE, THINK, Markers, Transcript, opens_thinking, read_transcript

Grader = Callable[[Transcript], bool | None]
_BODY = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)


@runtime_checkable
class Asked(Protocol):
    """A question as `analyses.tasks` has them, or anything else with its text."""

    @property
    def question(self) -> str: ...


Q = TypeVar("Q", bound=Asked)


def grader(questions: Iterable[Q], grade: Callable[[Q, Transcript], bool | None]) -> Grader:
    """Grades transcripts by the questions they answer: ``grader(questions, tasks.grade)``.

    The grader raises ValueError for a transcript of another question; this function, where two unlike questions read the same.
    """
    by_text: dict[str, Q] = {}
    for question in questions:
        if by_text.setdefault(question.question, question) != question:
            raise ValueError(f"Two questions with different answers read the same: {question.question[:80]!r}.")

    def graded(transcript: Transcript) -> bool | None:
        if transcript.question not in by_text:
            raise ValueError(
                f"{transcript.question[:80]!r} is none of the {len(by_text)} questions the grader knows: give it the questions "
                "that the transcripts answer."
            )
        return grade(by_text[transcript.question], transcript)

    return graded


def completion_text(transcript: Transcript) -> str:
    """The completion as it stands in the text, white space and all, without what marks its end."""
    begin, end = transcript.require("completion")
    return transcript.text[_at(transcript, begin) : _at(transcript, end - transcript.finished)]


def retold(model: Model, transcript: Transcript, completion: str, finished: bool | None = None) -> Transcript:
    """The same prompt with another completion, tokenised as `Model.transcript` does; `meta` is kept.

    finished: whether the end-of-sequence token follows; by default as in the transcript. The same text gives the same tokens, unless a
    model wrote others for it than its tokenizer would.
    """
    start = transcript.require("prompt")[1]
    ended = model.transcript(transcript.question, completion)
    ids = ended.ids[ended.require("prompt")[1] :]
    if not (transcript.finished if finished is None else finished) and ended.finished:
        ids = ids[:-1]
    told = read_transcript(model.tokenizer, transcript.question, transcript.ids[:start], ids, model.markers)
    return replace(told, meta=dict(transcript.meta))


def cut(transcript: Transcript, tokens: int) -> Transcript:
    """The transcript after so many tokens of its completion (at least 1): spans are cut too, or go where nothing of them is left.

    It is whole, and the same object, where it is no longer than that.
    """
    if tokens < 1:
        raise ValueError(f"{tokens} tokens of a completion: at least 1 is needed.")
    begin, end = transcript.require("completion")
    stop = begin + tokens
    if stop >= end:
        return transcript
    spans = {name: (b, min(e, stop)) for name, (b, e) in transcript.spans.items() if b < stop}
    text = transcript.text[: transcript.offsets[stop - 1][1]]
    return Transcript(
        transcript.question, transcript.ids[:stop], text, transcript.offsets[:stop], spans, False, transcript.meta
    )


@dataclass(frozen=True)
class Steps:
    """A completion taken apart: what stands before the first step, the steps, what lies between them, and what comes after.

    Steps are the sentences of the thinking (a line, or what ends in . ! or ?) without the white space around them. gaps: the white space
    before each step but the first, so one fewer. Unlike `Transcript.sentences` they end at characters, not at tokens.
    """

    before: str
    bodies: tuple[str, ...]
    gaps: tuple[str, ...]
    after: str

    @classmethod
    def of(cls, transcript: Transcript, markers: Markers = THINK) -> Steps | None:
        """None where the transcript has no thinking, or none with a word in it."""
        text = completion_text(transcript)
        if opens_thinking(transcript.prompt or "", markers):
            begin = 0
        elif (opened := text.find(markers.open)) >= 0:
            begin = opened + len(markers.open)
        else:
            return None
        closed = text.find(markers.close, begin)
        end = len(text) if closed < 0 else closed
        if not text[begin:end].strip():
            return None
        parts = [found.groups() for piece in _sentences(text[begin:end]) if (found := _BODY.fullmatch(piece))]
        gaps = [left[2] + right[0] for left, right in pairwise(parts)]
        return cls(
            text[:begin] + parts[0][0], tuple(body for _, body, _ in parts), tuple(gaps), parts[-1][2] + text[end:]
        )

    def __len__(self) -> int:
        return len(self.bodies)

    @property
    def gap(self) -> str:
        """What lies between most steps; a line break where there is only one."""
        return max(self.gaps, key=self.gaps.count) if self.gaps else "\n"

    def text(self) -> str:
        """The completion again."""
        between = (*self.gaps, "")[: len(self)]
        return self.before + "".join(body + gap for body, gap in zip(self.bodies, between, strict=True)) + self.after

    def keeping(self, members: Sequence[int]) -> Steps:
        """Some of the steps, in the order given by ascending number, each with the white space that was before it."""
        return replace(
            self,
            bodies=tuple(self.bodies[i] for i in members),
            gaps=tuple(self.gaps[i - 1] for i in members[1:]),
        )

    def with_step(self, at: int, body: str) -> Steps:
        """One step more, before the one numbered `at`; at the end for their number."""
        bodies = (*self.bodies[:at], body, *self.bodies[at:])
        gaps = (*self.gaps[: max(at - 1, 0)], self.gap, *self.gaps[max(at - 1, 0) :])
        return replace(self, bodies=bodies, gaps=gaps)


def _sentences(text: str) -> list[str]:
    """A text in pieces that end where its sentences do; each has a word in it, and together they are the text."""
    cuts = [0]
    for piece in SENTENCE.finditer(text):
        if piece.group().strip():
            cuts.append(piece.end())
    cuts[-1] = len(text)
    return [text[b:e] for b, e in pairwise(cuts)]


def noted(transcript: Transcript, recipe: str, **what: Any) -> Transcript:
    """The transcript with a line more in ``meta["recipes"]``: the recipe's name and what it did."""
    told = [*transcript.meta.get("recipes", ()), {"name": recipe, **what}]
    return replace(transcript, meta={**transcript.meta, "recipes": told})


def draw(recipe: str, seed: int, item: int) -> random.Random:
    """The random numbers of one item of one recipe."""
    return random.Random(f"{recipe} {seed} {item}")


def by_question(transcripts: Iterable[Transcript]) -> dict[str, list[Transcript]]:
    """The transcripts of each question, both in order of appearance."""
    found: dict[str, list[Transcript]] = {}
    for transcript in transcripts:
        found.setdefault(transcript.question, []).append(transcript)
    return found


def thinking_length(transcript: Transcript) -> int | None:
    """Tokens of thinking; None where there is no thinking."""
    begin, end = transcript.spans.get("thinking", (0, 0))
    return end - begin if "thinking" in transcript.spans else None


def require_some(left: Sequence[Any], of: int, why: str) -> None:
    """Raise ValueError where a recipe leaves nothing."""
    if not left:
        raise ValueError(f"Of {of} transcripts nothing is left to learn: {why}" if of else "There are no transcripts.")


def _at(transcript: Transcript, token: int) -> int:
    """The character of the text at which a token begins; the text's end after the last."""
    return transcript.offsets[token][0] if token < len(transcript.offsets) else len(transcript.text)
