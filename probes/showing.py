"""Which tokens are meant? `show_spans` colours them, in a terminal and in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from surgery.transcript import Transcript, positions

# light enough for black text, and apart for the colour-blind (tints of Okabe and Ito's palette)
_COLOURS = ("#f6c667", "#8fd0f0", "#86d9b9", "#f2a98a", "#e3b4d0", "#f3ec8c", "#a9c4e4")
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Piece:
    """A run of text with one meaning. span: which of the spans its tokens are in, or None."""

    text: str
    span: int | None


@dataclass(frozen=True)
class Shown:
    """Transcripts with the tokens of some spans coloured: ``str()`` gives it for a terminal, a notebook draws it by itself.

    over:    the spans, in the order in which they claim a token.
    colours: one ``#rrggbb`` a span.
    pieces:  for each transcript its text in order, cut where the colour changes.
    counts:  for each transcript the number of its tokens in each span, and of all its tokens.
    """

    over: tuple[str, ...]
    colours: tuple[str, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    counts: tuple[tuple[tuple[int, ...], int], ...]

    def __str__(self) -> str:
        legend = "  ".join(_ansi(name, colour) for name, colour in zip(self.over, self.colours, strict=True))
        blocks = [legend]
        for number, (pieces, counts) in enumerate(zip(self.pieces, self.counts, strict=True)):
            text = "".join(p.text if p.span is None else _ansi(p.text, self.colours[p.span]) for p in pieces)
            blocks.append(f"{self._title(number, *counts)}\n{text}")
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        legend = " ".join(_mark(name, c) for name, c in zip(self.over, self.colours, strict=True))
        blocks = [f"<p>{legend}</p>"]
        for number, (pieces, counts) in enumerate(zip(self.pieces, self.counts, strict=True)):
            text = "".join(
                html.escape(p.text) if p.span is None else _mark(p.text, self.colours[p.span]) for p in pieces
            )
            title = html.escape(self._title(number, *counts))
            blocks.append(f'<p>{title}</p><pre style="white-space: pre-wrap">{text}</pre>')
        return f"<div>{''.join(blocks)}</div>"

    def _title(self, number: int, counts: Sequence[int], total: int) -> str:
        said = ", ".join(f"{name} {count}" for name, count in zip(self.over, counts, strict=True))
        return f"transcript {number}: {said} of {total} tokens"


def show_spans(
    transcripts: Transcript | Sequence[Transcript],
    over: str | Sequence[str] = ("prompt", "thinking", "answer"),
    *,
    colours: Mapping[str, str] | None = None,
) -> Shown:
    """Colour the tokens that spans name: the very ones that `collect` reads and that steering touches.

    over:    spans as everywhere (``thinking``, ``sentence[0]``, ``/regex/``). A token in several is coloured by the first.
    colours: span -> ``#rrggbb``, for those that are not to have their default. Raises ValueError for a span that is not in `over`, or
             where a colour is not of this form. A transcript without a span shows none of it, and its heading says 0.
    """
    shown = [transcripts] if isinstance(transcripts, Transcript) else list(transcripts)
    spans = (over,) if isinstance(over, str) else tuple(over)
    given = colours or {}
    strange = [name for name, colour in given.items() if name not in spans or not _HEX.fullmatch(colour)]
    if strange:
        raise ValueError(
            f"The colour {given[strange[0]]!r} of {strange[0]!r} cannot be used: colours are #rrggbb, for {', '.join(spans)}."
        )
    chosen = tuple(given.get(name, default) for name, default in zip(spans, cycle(_COLOURS), strict=False))
    owners = [_owners(t, spans) for t in shown]
    pieces = tuple(_pieces(t, owner) for t, owner in zip(shown, owners, strict=True))
    counts = tuple(
        (tuple(list(owner.values()).count(k) for k in range(len(spans))), len(t.ids))
        for t, owner in zip(shown, owners, strict=True)
    )
    return Shown(spans, chosen, pieces, counts)


def _owners(transcript: Transcript, spans: Sequence[str]) -> dict[int, int]:
    """Token position -> the first span that has it."""
    found: dict[int, int] = {}
    for k, name in enumerate(spans):
        for position in positions(transcript, name):
            found.setdefault(position, k)
    return found


def _pieces(transcript: Transcript, owner: Mapping[int, int]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    done = 0

    def say(end: int, span: int | None) -> None:
        nonlocal done
        text = transcript.text[done:end]
        done = max(done, end)
        if not text:
            return
        text = _harmless(text)
        if pieces and pieces[-1].span == span:
            text = pieces.pop().text + text
        pieces.append(Piece(text, span))

    for position, (begin, end) in enumerate(transcript.offsets):
        say(begin, None)  # text between tokens belongs to none
        say(end, owner.get(position))
    say(len(transcript.text), None)
    return tuple(pieces)


def _ansi(text: str, colour: str) -> str:
    """Black on the colour, line by line: a terminal paints the rest of a line that is left coloured."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    start, stop = f"\x1b[30;48;2;{red};{green};{blue}m", "\x1b[0m"
    return "\n".join(f"{start}{line}{stop}" if line else "" for line in _breaks_shown(text).split("\n"))


def _mark(text: str, colour: str) -> str:
    return f'<mark style="background: {colour}; color: #000">{html.escape(_breaks_shown(text))}</mark>'


def _breaks_shown(text: str) -> str:
    """A line break has no colour of its own."""
    return text.replace("\n", "\u21b5\n")


def _harmless(text: str) -> str:
    """Control characters would act on the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
