"""Places have names.

A `Site` is a layer, a part and perhaps a head: ``12.mlp.down``, ``12.attn.o.h3``, ``12.resid``, ``embed``.
Patterns match sites segment by segment: ``*.attn.o``, ``0-5.mlp.*``, ``*.attn.o.h3``, ``**``.

Weights live at ``embed``, ``norm``, ``head`` and, in each layer, ``attn.q``, ``attn.k``, ``attn.v``, ``attn.o``, ``mlp.gate``,
``mlp.up``, ``mlp.down`` and the norms; a bias adds ``.bias``. Where a layer has experts they are ``mlp.e0.down`` and so on, chosen by
``mlp.router``, and one that all tokens pass ``mlp.shared.down``, with its gate ``mlp.shared_router``. The language tower of a vision-language model
has these same names. Activations live at ``resid``, the stream *entering* block *l* (so ``{n_layers}.resid`` leaves the last block, before the final
norm), and ``mid``, the stream between attention and MLP; at ``attn.out`` and ``mlp.out``, what each adds to it; and at ``attn.z``, what the heads
give to ``attn.o``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, total_ordering

_HEAD = re.compile(r"h(\d+)$")
UNNAMED = "file:"


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in a model.

    layer: 0-based block index, None for places outside the blocks.
    part:  what it is, dotted: ``mlp.down``, ``mlp.e3.down``, ``attn.q.bias``, ``resid``. A tensor that the family's table does not
           name keeps its file name: ``file:visual.patch_embed.proj.weight``.
    head:  0-based head index, or None for the whole tensor. In ``attn.k`` and ``attn.v`` it counts key/value heads.
    """

    layer: int | None
    part: str
    head: int | None = None

    def __str__(self) -> str:
        text = self.part if self.layer is None else f"{self.layer}.{self.part}"
        return text if self.head is None else f"{text}.h{self.head}"

    def __lt__(self, other: Site) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[bool, int, str, int]:
        return (self.layer is not None, self.layer or 0, self.part, -1 if self.head is None else self.head)

    @property
    def whole(self) -> Site:
        """The tensor a head belongs to."""
        return Site(self.layer, self.part)

    @property
    def is_unnamed(self) -> bool:
        """Whether the family's table does not name this tensor."""
        return self.part.startswith(UNNAMED)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The inverse of ``str(site)``. Raises ValueError on text that is no site, a pattern for example."""
        if isinstance(text, Site):
            return text
        if text.startswith(UNNAMED):
            return cls(None, text)
        segments = text.split(".")
        if not all(segments) or any(c in text for c in "*?[] "):
            raise ValueError(f"{text!r} is not a site. A site looks like 12.mlp.down, 12.attn.o.h3, 12.resid or embed.")
        head = _HEAD.fullmatch(segments[-1])
        if head and len(segments) > 1:
            segments = segments[:-1]
        layer = int(segments.pop(0)) if segments[0].isdecimal() else None
        if not segments:
            raise ValueError(
                f"{text!r} names a layer but no part of it. A site looks like {text}.mlp.down or {text}.resid."
            )
        return cls(layer, ".".join(segments), int(head[1]) if head else None)

    @classmethod
    def unnamed(cls, name: str) -> Site:
        """The site of a tensor that the family's table does not name: it is carried, never dropped."""
        return cls(None, UNNAMED + name)


Patterns = str | Site | Iterable[str | Site]


def match(patterns: Patterns, sites: Iterable[Site]) -> list[Site]:
    """The sites, in their own order, that any of the patterns names.

    A pattern has the segments of a site. ``*`` stands for one segment (or a piece of one), ``**`` for any number, ``4-8`` for
    layers four to eight; a last segment ``h3`` asks for head 3 of every tensor the rest matches. Raises ValueError, listing
    what exists, when a pattern matches nothing, and for no pattern at all.
    """
    wanted = [patterns] if isinstance(patterns, str | Site) else list(patterns)
    if not wanted:
        raise ValueError("No site is named: the list of patterns is empty. Name sites, as in '*.attn.o', or all, '**'.")
    existing = list(sites)
    texts = [str(s) for s in existing]
    chosen: dict[Site, None] = {}
    for pattern in wanted:
        whole, head = _split_head(str(pattern))
        test = _compiled(whole)
        hits = [s for s, text in zip(existing, texts, strict=True) if test(text)]
        if not hits:
            raise ValueError(nothing_matched(str(pattern), existing))
        for site in hits:
            chosen[Site(site.layer, site.part, head) if head is not None else site] = None
    order = {s: i for i, s in enumerate(existing)}
    return sorted(chosen, key=lambda s: (order[s.whole] if s.head is not None else order[s], s.head or 0))


def _split_head(pattern: str) -> tuple[str, int | None]:
    rest, _, last = pattern.rpartition(".")
    head = _HEAD.fullmatch(last)
    return (rest, int(head[1])) if head and rest and not pattern.startswith(UNNAMED) else (pattern, None)


@cache
def _compiled(pattern: str):
    if pattern.startswith(UNNAMED):
        return lambda text: fnmatchcase(text, pattern)
    wanted = pattern.split(".")
    return lambda text: not text.startswith(UNNAMED) and _segments_match(wanted, text.split("."))


def _segments_match(wanted: list[str], found: list[str]) -> bool:
    if not wanted:
        return not found
    if wanted[0] == "**":
        return any(_segments_match(wanted[1:], found[i:]) for i in range(len(found) + 1))
    return bool(found) and _segment_matches(wanted[0], found[0]) and _segments_match(wanted[1:], found[1:])


def _segment_matches(wanted: str, found: str) -> bool:
    first, dash, last = wanted.partition("-")
    if dash and first.isdecimal() and last.isdecimal():
        return found.isdecimal() and int(first) <= int(found) <= int(last)
    return fnmatchcase(found, wanted)


def nothing_matched(pattern: str, sites: list[Site]) -> str:
    """What to say of a pattern that names none of the sites: the nearest name, and what exists."""
    layers = [s.layer for s in sites if s.layer is not None]
    parts = sorted({s.part for s in sites if s.layer is not None})
    outside = [str(s) for s in sites if s.layer is None]
    layer, dot, part = pattern.partition(".")
    near = difflib.get_close_matches(part or layer, parts + outside, n=1, cutoff=0.6)
    meant = [f"{layer if dot else '*'}.{name}" if name in parts else name for name in near]
    lines = [f"The pattern {pattern!r} matches no site."]
    matrix = pattern.removesuffix(".bias")
    if matrix != pattern and any(_compiled(matrix)(str(s)) for s in sites):
        lines.append(
            f"This model has no bias at {matrix}. AddDirection at {matrix} itself, of rank one, writes a direction without one."
        )
    elif meant and meant[0] != pattern:  # equal where only the layer does not exist
        lines[0] += f" Did you mean {meant[0]}?"
    if layers:
        lines.append(f"Layers {min(layers)} to {max(layers)} have: {', '.join(parts)}.")
    if outside:
        lines.append(f"Outside the layers: {', '.join(outside[:12])}{', ...' if len(outside) > 12 else ''}.")
    return " ".join(lines)
