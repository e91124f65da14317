"""Activations while generating: what was computed anyway, kept as it came by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.activations import Activations, Rows, as_spans
from probes.capture import require_seen, tapped
from probes.following import Follower, following
from surgery.model import Model
from surgery.rows import KeptByRow, may_leave
from surgery.sites import Patterns, Site, match
from surgery.transcript import Transcript, parse_span

_RECORDED = "recorded_passes"  # the attribute under which a cache keeps whose tokens are in it, so that a copy of it keeps it too


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one forward pass added. parents: for each row the node it continues, or -1. tokens: the real ones of each row.

    first: number of the first row's node. rows, position: of each kept activation, its row in the batch and its place in the text.
    """

    first: int
    parents: list[int]
    tokens: list[list[int]]
    rows: Int[Tensor, " kept"]
    position: Int[Tensor, " kept"]
    values: dict[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Recorded(KeptByRow):
    """Whose tokens are in a cache: the node that each row continues, and how many columns there are."""

    nodes: list[int]
    length: int

    def select(self, rows: Sequence[int]) -> _Recorded:
        return _Recorded([self.nodes[i] for i in rows], self.length)


class Recording:
    """What `recording` has seen. Ask with `of` for the rows of the transcripts that were generated."""

    def __init__(self, model: Model, follower: Follower, sites: Sequence[Site], over: tuple[str, ...]):
        self.sites, self.over = list(sites), over
        self._wide = tuple(dict.fromkeys(map(_known_at_once, over)))
        self._model, self._follower = model, follower
        self._passes: list[_Pass] = []
        self._nodes = 0
        # passes that run, each inside the one before, and which of their rows are kept
        self._open: list[tuple[_Pass, Tensor] | None] = []

    def __repr__(self) -> str:
        return f"<Recording of {len(self._passes)} passes over {', '.join(self.over)} at {len(self.sites)} sites>"

    def of(self, transcripts: Sequence[Transcript]) -> Activations:
        """The rows of transcripts that were generated in the block: those `collect` would give, in the same order.

        There is none for a transcript's last token, which nothing was computed from. Raises ValueError for a transcript that was not
        generated in the block, and when none has any of the spans.
        """
        chains, wanted = self._chains(), Rows.of(transcripts, self.over, None)
        starts = [0, *accumulate(len(p.rows) for p in self._passes)]
        rows, sources = [], []
        for i, transcript in enumerate(transcripts):
            where = self._places(_taken(chains, transcript), starts)
            for row in range(wanted.starts[i], wanted.starts[i + 1]):
                position = int(wanted.position[row])
                if position == len(transcript.ids) - 1:
                    continue
                if position not in where:
                    raise ValueError(
                        f"Token {position} of the transcript of {transcript.question[:60]!r} is {self.over[int(wanted.span[row])]} in it, "
                        "but was not when it came by: the transcript was read with other markers."
                    )
                rows.append(row)
                sources.append(where[position])
        if not rows:
            raise ValueError(
                f"Nothing was computed from a token of {' or '.join(self.over)} while these transcripts were generated."
            )
        kept = [p for p in self._passes if len(p.rows)]
        values = {site: torch.cat([p.values[site] for p in kept])[sources].float().cpu() for site in self.sites}
        return Activations(values, wanted.transcript[rows], wanted.position[rows], wanted.span[rows], self.over)

    # while passes run

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the backbone: which rows of the pass will be kept, and what they continue."""
        self._open.append(None)  # `after` comes also where what follows fails
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        position, mask = self._follower.position, self._follower.mask(self._wide)
        cache = kwargs.get("past_key_values")
        parents = _continued(cache, len(position))
        tokens = [row[real].tolist() for row, real in zip(ids, position >= 0, strict=True)]
        rows = mask.nonzero()[:, 0]
        begun = _Pass(self._nodes, parents, tokens, rows.cpu(), position[mask].cpu())
        self._open[-1] = (begun, mask.flatten().nonzero()[:, 0])
        self._nodes += len(tokens)

    def see(self, site: Site, value: Tensor) -> None:
        """Keep the rows of a forward pass's activation ``[batch, token, d]`` that are recorded, if any; called by the hook at the site."""
        running = self._open[-1] if self._open else None
        if running is not None and len(running[1]):
            running[0].values[site] = value.detach().flatten(0, 1)[running[1].to(value.device)]

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A hook of the backbone: the pass counts, and stays with the cache. output: None where it failed."""
        running = self._open.pop() if self._open else None
        if running is None or output is None:
            return
        ended = running[0]
        if len(ended.rows):
            require_seen(self._model, self.sites, ended.values)
        self._passes.append(ended)
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None:
            nodes = list(range(ended.first, ended.first + len(ended.tokens)))
            setattr(cache, _RECORDED, _Recorded(nodes, int(cache.get_seq_length())))

    # afterwards

    def _chains(self) -> dict[tuple[int, ...], list[list[tuple[int, int]]]]:
        """The tokens of each text that went through -> the texts with these tokens, each a list of (pass, row)."""
        of_node = {p.first + row: (k, row) for k, p in enumerate(self._passes) for row in range(len(p.tokens))}
        continued = {parent for p in self._passes for parent in p.parents}
        chains: dict[tuple[int, ...], list[list[tuple[int, int]]]] = defaultdict(list)
        for leaf in (node for node in of_node if node not in continued):
            chain, node = [], leaf
            while node >= 0:
                number, row = of_node[node]
                chain.append((number, row))
                node = self._passes[number].parents[row]
            chain.reverse()
            chains[tuple(t for number, row in chain for t in self._passes[number].tokens[row])].append(chain)
        return chains

    def _places(self, chain: Iterable[tuple[int, int]], starts: Sequence[int]) -> dict[int, int]:
        """position -> which of all kept rows, along one text."""
        found: dict[int, int] = {}
        for number, row in chain:
            mine = self._passes[number]
            for at in (mine.rows == row).nonzero()[:, 0].tolist():
                found[int(mine.position[at])] = starts[number] + at
        return found


@contextmanager
def recording(
    model: Model, *, at: Patterns = "*.resid", over: str | Sequence[str] = "completion"
) -> Iterator[Recording]:
    """Keep the activations of every forward pass inside the block, at sites over spans, without another pass.

    ::

        with recording(model, at="14.mid", over="thinking") as seen:
            runs = model.generate(questions)
        acts = seen.of(runs)

    at, over: as in `collect`. What only the end can tell (``thinking[-1]``, ``/regex/``) keeps the rows of the whole span until then.
    Whatever the padding, the batches and the cache are, the rows are those of `collect`: of what is steered or silenced, as the model went
    on with it, whichever block is around the other. They stay on the model's device until asked
    for with `of`. Nothing is left on the model, also after an exception.
    """
    sites = match(at, model.anatomy.activation_sites())
    backbone = model.module.base_model
    with following(model) as follower:
        seen = Recording(model, follower, sites, as_spans(over))
        handles = []
        try:
            handles.append(backbone.register_forward_pre_hook(seen.before, with_kwargs=True))
            handles.append(backbone.register_forward_hook(seen.after, with_kwargs=True, always_call=True))
            with tapped(model, sites, seen.see) as taps, may_leave([*handles, *taps]):
                yield seen
        finally:
            for handle in handles:
                handle.remove()


def _known_at_once(over: str) -> str:
    """The span itself, or the wider one of which a part is meant that only the end can tell."""
    name, which, pattern = parse_span(over)
    if name == "sentence":
        return "thinking"
    return name if pattern or (which and "-" in which) else over


def _continued(cache: Any, batch: int) -> list[int]:
    """The nodes that the rows of a pass continue: what is in the cache, each row of it repeated where there are now more."""
    past = 0 if cache is None else int(cache.get_seq_length())
    if not past:
        return [-1] * batch
    held: _Recorded = getattr(cache, _RECORDED, _Recorded([], 0))
    if held.length != past or not held.nodes or batch % len(held.nodes):
        raise ValueError(
            f"The {past} tokens in the cache were not recorded as they are: fill the cache inside the block, and do not cut it."
        )
    return [node for node in held.nodes for _ in range(batch // len(held.nodes))]


def _taken(chains: dict[tuple[int, ...], list[Any]], transcript: Transcript) -> Any:
    """A text of these tokens; of several, each is taken once before one is taken again. The last token need not have gone through."""
    for tokens in (transcript.ids, transcript.ids[:-1]):
        if tokens in chains:
            same = chains[tokens]
            same.append(same.pop(0))
            return same[-1]
    raise ValueError(
        f"The transcript of {transcript.question[:60]!r} was not generated in this block, or not to its end: "
        f"{len(chains)} texts went through, and none has its {len(transcript.ids)} tokens."
    )
