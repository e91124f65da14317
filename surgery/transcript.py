"""Say "thinking", not "token 412".

A `Transcript` is one question and its completion as token ids, with the spans that matter: ``prompt``, ``completion``,
``thinking`` (strictly between the think markers), ``answer`` (after them, without the end-of-sequence token) and ``all``. Spans are half-open
token ranges. A span that is not there is absent, never empty by accident: a completion that opens its thinking and never
closes it has no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_ROLES = ("prompt", "completion", "thinking", "answer", "all", "sentence")
_PICKED = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<which>-?\d+|-?\d*:-?\d*)\])?")
_WRITTEN = re.compile(r"(?:(?P<name>[\w-]+)~)?/(?P<pattern>.+)/", re.DOTALL)
SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s)|\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Markers:
    """The text around the thinking. They need not be single tokens."""

    open: str = "<think>"
    close: str = "</think>"


THINK = Markers()
_NOTED = "ends_besides"  # where `also_ends` notes them


@dataclass(frozen=True)
class Transcript:
    """A question and its completion, without padding.

    ids:      token ids of prompt and completion.
    offsets:  for each token the half-open range of characters of `text` it covers.
    spans:    name -> half-open token range.
    finished: whether the completion ended by itself (end-of-sequence seen).
    meta:     whatever the caller wants to keep with it.
    """

    question: str
    ids: tuple[int, ...]
    text: str
    offsets: tuple[Span, ...]
    spans: Mapping[str, Span]
    finished: bool
    meta: Mapping[str, Any] = field(default_factory=dict)

    def span_text(self, span: str | Span) -> str | None:
        """The text of a span, stripped; None when the transcript has no such span."""
        if isinstance(span, str):
            if span not in self.spans:
                return None
            span = self.spans[span]
        begin, end = span
        return self.text[self.offsets[begin][0] : self.offsets[end - 1][1]].strip() if end > begin else ""

    @property
    def prompt(self) -> str | None:
        """The text before the completion, chat template and all, stripped."""
        return self.span_text("prompt")

    @property
    def completion(self) -> str | None:
        """All that the model wrote, think marks too, stripped."""
        return self.span_text("completion")

    @property
    def thinking(self) -> str | None:
        """The text between the think marks, stripped; None where there are none."""
        return self.span_text("thinking")

    @property
    def answer(self) -> str | None:
        """The text after the thinking, stripped; None where the thinking never closes."""
        return self.span_text("answer")

    @cached_property
    def sentences(self) -> tuple[Span, ...]:
        """Token spans of the sentences of the thinking, in order and without gaps: a line is a sentence, and so is what ends in . ! or ?

        A token that reaches over a boundary belongs to the sentence it begins in.
        """
        if "thinking" not in self.spans:
            return ()
        begin, end = self.spans["thinking"]
        if end == begin:
            return ()
        start = self.offsets[begin][0]
        text = self.text[start : self.offsets[end - 1][1]]
        bounds, cut = [begin], begin
        for piece in SENTENCE.finditer(text):
            if not piece.group().strip():
                continue
            while cut < end and self.offsets[cut][0] < start + piece.end():
                cut += 1
            if cut > bounds[-1]:
                bounds.append(cut)
        bounds[-1] = end
        return tuple(pairwise(bounds))

    def require(self, span: str) -> Span:
        """The span, or a ValueError that says what the transcript has instead."""
        if span not in self.spans:
            raise ValueError(
                f"The transcript of {self.question[:60]!r} has no span {span!r}; it has {', '.join(self.spans)}."
            )
        return self.spans[span]

    def __repr__(self) -> str:
        return f"<Transcript {self.question[:40]!r}: {', '.join(f'{k} {b}:{e}' for k, (b, e) in self.spans.items())}>"


def read_transcript(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    markers: Markers = THINK,
    **meta: Any,
) -> Transcript:
    """Find the spans in a prompt and a completion given as token ids.

    Markers are looked for in the completion only, but for a prompt that ends in the opening one, as some reasoners' chat templates have it:
    the completion then begins inside the thinking.
    """
    ids = (*prompt_ids, *completion_ids)
    eos = end_tokens(tokenizer)
    stop = next((i for i in range(len(prompt_ids), len(ids)) if ids[i] in eos), len(ids))
    finished = stop < len(ids)
    ids = ids[: stop + 1]
    text, offsets = _offsets(tokenizer, ids)
    start = len(prompt_ids)
    spans: dict[str, Span] = {"all": (0, len(ids)), "prompt": (0, start), "completion": (start, len(ids))}
    body_at = offsets[start][0] if start < len(ids) else len(text)
    body_end = offsets[stop][0] if finished else len(text)
    begun = stop > start and opens_thinking(text[:body_at], markers)
    opened = body_at if begun else text.find(markers.open, body_at, body_end)
    if opened < 0:
        if stop > start:
            spans["answer"] = (start, stop)
    else:
        closed = text.find(markers.close, opened, body_end)
        inner = body_at if begun else opened + len(markers.open)
        first = _first_token_from(offsets, inner, start)
        last = first  # strictly between: a token that reaches into the closing marker is not thinking
        while last < stop and (closed < 0 or offsets[last][1] <= closed) and offsets[last][0] < body_end:
            last += 1
        spans["thinking"] = (first, min(last, stop))
        if closed >= 0:
            after = _first_token_from(offsets, closed + len(markers.close), last)
            if after < stop and text[offsets[after][0] : body_end].strip():
                spans["answer"] = (after, stop)
    return Transcript(question, tuple(ids), text, tuple(offsets), spans, finished, dict(meta))


def opens_thinking(prompt: str, markers: Markers) -> bool:
    """Whether a prompt ends in the opening marker, so that what is written after it is thinking."""
    return bool(markers.open) and prompt.rstrip().endswith(markers.open)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a completion: the tokenizer's own, and those noted on it by `also_ends`."""
    return _as_ids(tokenizer.eos_token_id) | getattr(tokenizer, _NOTED, set())


def also_ends(tokenizer: PreTrainedTokenizerBase, ids: int | list[int] | None) -> None:
    """Note on a tokenizer what else ends a completion: a chat model's generation settings name the end of a turn, its tokenizer the end of a text."""
    setattr(tokenizer, _NOTED, _as_ids(ids))


def _as_ids(ids: Any) -> set[int]:
    return set() if ids is None else {int(i) for i in ids} if isinstance(ids, list | tuple) else {int(ids)}


def _first_token_from(offsets: Sequence[Span], char: int, at: int) -> int:
    """The first token, from `at` on, that begins at or after a character."""
    while at < len(offsets) and offsets[at][0] < char:
        at += 1
    return at


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The decoded text and each token's characters in it.

    Encoding the text again gives the offsets at once when it gives the same tokens; a model is free to emit others, and then the
    prefixes are decoded one by one.
    """
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if tokenizer.is_fast:
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == list(ids):
            return text, [(int(b), int(e)) for b, e in again["offset_mapping"]]
    offsets, end = [], 0
    for count in range(1, len(ids) + 1):
        begin = end
        prefix = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        end = max(begin, len(prefix.rstrip("\ufffd")))  # half a character decodes to the replacement mark
        offsets.append((begin, end))
    return text, offsets


def require_several(transcripts: Sequence[Transcript]) -> None:
    """Raise ValueError for one transcript where a list of them belongs, and for a list of something else."""
    if isinstance(transcripts, Transcript):
        raise ValueError("A list of transcripts was expected, not one: write [transcript].")
    for transcript in transcripts:
        _require_transcript(transcript)


def _require_transcript(given: object) -> None:
    if not isinstance(given, Transcript):
        raise ValueError(
            f"A transcript was expected, not a {type(given).__name__} ({given!r:.60}). model.generate(questions) makes them, and "
            "model.transcript(question, completion) one of a text."
        )


def positions(transcript: Transcript, over: str | Sequence[str]) -> list[int]:
    """Token positions of a span, or of several together: sorted, each once; none where the transcript lacks the span.

    over: ``prompt``, ``thinking``, ``answer``, ``completion``, ``all``, or a name of the transcript's own; tokens of it:
    ``thinking[-1]`` the last, ``thinking[:16]`` the first sixteen; ``sentence[2]`` the third sentence of the thinking, ``sentence[-1]``
    the last; ``/therefore/`` the tokens of the completion that overlap a match of a regular expression, ``prompt~/not/`` those of the
    prompt. Raises ValueError, listing what can be asked for, on anything else.
    """
    _require_transcript(transcript)
    wanted = (over,) if isinstance(over, str) else over
    return sorted({i for text in wanted for i in _one_span(transcript, text)})


def parse_span(over: str) -> tuple[str, str | None, str | None]:
    """What is asked for, taken apart: a span's name, which of its tokens (or sentences), and a regular expression in it.

    ``thinking[:16]`` is ("thinking", ":16", None), ``/so/`` is ("completion", None, "so"). Raises ValueError on anything else.
    """
    written, picked = _WRITTEN.fullmatch(over), _PICKED.fullmatch(over)
    if written:
        return written["name"] or "completion", None, written["pattern"]
    if picked is None:
        raise ValueError(_no_span(_ROLES, over))
    return picked["name"], picked["which"], None


def nobody_has(transcripts: Sequence[Transcript], over: str | Sequence[str], called: str = "transcripts") -> str:
    """What to say where none of some transcripts has a span, nor any of several."""
    wanted = (over,) if isinstance(over, str) else over
    held = sorted({name for t in transcripts for name in t.spans})
    return f"None of the {len(transcripts)} {called} has a span {' or '.join(wanted)}; they have {', '.join(held) or 'nothing'}."


def _one_span(transcript: Transcript, over: str) -> Sequence[int]:
    name, which, pattern = parse_span(over)
    if pattern is not None:
        return _matching(transcript, _tokens(transcript, name, over), pattern)
    if name == "sentence":
        spans = transcript.sentences if which is None else _chosen(transcript.sentences, which)
        return [i for span in spans for i in range(*span)]
    tokens = _tokens(transcript, name, over)
    return tokens if which is None else _chosen(tokens, which)


def _tokens(transcript: Transcript, name: str, over: str) -> Sequence[int]:
    if name not in transcript.spans and name not in _ROLES[:-1]:
        raise ValueError(_no_span([*_ROLES, *transcript.spans], over))
    return range(*transcript.spans[name]) if name in transcript.spans else ()


def _chosen(items: Sequence[Any], which: str) -> Sequence[Any]:
    if ":" not in which:
        at = int(which)
        return items[at:][:1] if at >= -len(items) else ()
    begin, end = (int(part) if part else None for part in which.split(":"))
    return items[begin:end]


def _matching(transcript: Transcript, tokens: Sequence[int], pattern: str) -> list[int]:
    if not tokens:
        return []
    start, end = transcript.offsets[tokens[0]][0], transcript.offsets[tokens[-1]][1]
    try:
        found = [m.span() for m in re.compile(pattern).finditer(transcript.text, start, end)]
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
    return [i for i in tokens if any(transcript.offsets[i][0] < e and transcript.offsets[i][1] > b for b, e in found)]


def _no_span(names: Iterable[str], over: str) -> str:
    return (
        f"{over!r} is not a span. Ask for {', '.join(dict.fromkeys(names))}; for tokens of one, as in thinking[-1], thinking[:16] or sentence[2]; "
        "or for what a regular expression matches, as in /therefore/ or prompt~/not/."
    )
