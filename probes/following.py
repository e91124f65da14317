"""Follow a model token by token: which of the tokens of the pass that runs now are thinking, which answer, which padding.

A hook sees a few rows of activations. In a prefill they are whole prompts, in decoding one token a row, under a shared prefix a
piece of the prompt; there may be padding on the left, on the right or in between. The `Follower` knows which tokens they are.

What a token is depends on the tokens up to it, itself included, and on nothing later; so it is the same with a cache and
without, while generating and when a finished text is read. That differs from `surgery.transcript.positions`, which knows the
whole text, in two ways. A marker of several tokens is known only at its last one: those before it still count as what
came before (the first tokens of a closing marker as thinking, those of an opening one as answer). And what follows the
thinking is answer at once, also where nothing but blanks will come.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from surgery.model import Model
from surgery.rows import KeptByRow, Rows, may_leave, rows_are, rows_now
from surgery.transcript import Markers, end_tokens, opens_thinking, parse_span, positions, read_transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HISTORY = (
    "followed_rows"  # the attribute under which a cache keeps what went into it, so that a copy of it keeps it too
)
_OTHER, _THINKING, _ANSWER = 0, 1, 2
_KINDS = {"thinking": _THINKING, "answer": _ANSWER}


class Follower:
    """What the tokens of the forward pass that runs now are. Ask from a hook inside the model; made by `following`."""

    def __init__(self, model: Model):
        self._reader = _Reader(model.tokenizer, model.markers)
        self._signature = list(inspect.signature(model.module.base_model.forward).parameters)
        # those that run, each inside the one before, their caches, and what those held when the pass began
        self._passes: list[tuple[_Pass | None, Any, _History | None]] = []

    def mask(self, over: str | Sequence[str]) -> Bool[Tensor, "batch token"]:
        """Which tokens of this pass are real and in the span, or in any of several.

        over: as in `surgery.transcript.positions`, but only what is known when a token comes: of the completion and its parts no
              ``[-1]``. ``/regex/`` and ``sentence[2]`` read the text anew at every token, and are slow.
        Raises ValueError for a span that cannot be told in this pass, saying why; RuntimeError outside of a pass.
        """
        return self._running().mask((over,) if isinstance(over, str) else tuple(over))

    def touches(self, over: str | Sequence[str]) -> bool:
        """Whether any token of this pass is in the span."""
        return self._running().touches((over,) if isinstance(over, str) else tuple(over))

    @property
    def position(self) -> Int[Tensor, "batch token"]:
        """The place of each token of this pass in its row's transcript, 0-based; -1 for padding and after the end."""
        return self._running().position

    @property
    def items(self) -> Int[Tensor, " batch"]:
        """Which question or transcript each row is; the row's own number where nobody said, -1 for one row that stands for several."""
        return self._running().items

    def _running(self) -> _Pass:
        running = self._passes[-1][0] if self._passes else None
        if running is None:
            raise RuntimeError("No forward pass is running: ask from a hook inside the model.")
        return running

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the backbone: a pass begins."""
        given = {**dict(zip(self._signature, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self._passes.append((None, cache, None))  # `after` comes also where what follows fails
        history = getattr(cache, _HISTORY, None)
        begun = _Pass(self._reader, given.get("input_ids"), given.get("attention_mask"), past, history)
        self._passes[-1] = (begun, cache, history)

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook of the backbone: the pass has ended, and what went through stays with the cache. output: None where it failed."""
        ended, cache, held = self._passes.pop() if self._passes else (None, None, None)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if ended is not None and cache is not None and output is not None and ended.ids is not None:
            there = getattr(cache, _HISTORY, None)
            setattr(cache, _HISTORY, ended.history(None if there is held else there))


@contextmanager
def following(model: Model) -> Iterator[Follower]:
    """Follow every forward pass inside the block; nothing of it is left on the model afterwards.

    Prompts end where whoever runs the batch says so (`surgery.rows.rows_are`, as `Model.generate` and `collect` do), and, in a
    plain ``model.module.generate``, where generation begins. Beam search moves rows between passes and is refused.
    """
    follower, module = Follower(model), model.module
    kept = vars(module).get("generate")
    handles = []
    try:
        handles.append(module.base_model.register_forward_pre_hook(follower.before, with_kwargs=True))
        handles.append(module.base_model.register_forward_hook(follower.after, always_call=True))
        vars(module)["generate"] = _announcing(module)
        with may_leave(handles):
            yield follower
    finally:
        for handle in handles:
            handle.remove()
        if kept is None:
            vars(module).pop("generate", None)
        else:
            vars(module)["generate"] = kept


def _announcing(module: Any) -> Callable[..., Any]:
    """The module's own `generate`, saying where its prompts end unless somebody else has."""
    generate = module.generate

    @wraps(generate)
    def announced(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or module.generation_config
        if (kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1:
            raise ValueError(
                "Beam search moves rows between passes, which cannot be followed. Generate with num_beams=1."
            )
        asked = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        mask = kwargs.get("attention_mask")
        shown = asked if mask is None else mask
        if rows_now() is not None or shown is None:
            return generate(*args, **kwargs)
        with rows_are(width=shown.shape[1]):
            return generate(*args, **kwargs)

    return announced


# --- one pass -------------------------------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """How far the completions of a cache's rows have been read: the columns, and each row's place after them."""

    columns: int = 0
    places: tuple[_Place, ...] = ()


@dataclass(frozen=True)
class _History(KeptByRow):
    """What went into a cache: the tokens ``[batch, past]``, what was said of the rows, and of each kind of reader how far it has read."""

    ids: Tensor
    rows: Rows | None
    read: Mapping[_Kind, _Reading]

    def expanded(self, batch: int, past: int) -> _History | None:
        """The same for a cache whose rows were repeated, or cut to `past` tokens; None where that cannot be it."""
        held, length = self.ids.shape
        if length < past or batch % held:
            return None
        times = batch // held
        ids = self.ids[:, :past].repeat_interleave(times, 0) if times > 1 else self.ids[:, :past]
        return _History(ids, self.rows, self._placed([i for i in range(held) for _ in range(times)], past))

    def select(self, rows: Sequence[int]) -> _History:
        return _History(self.ids[list(rows)], self.rows, self._placed(rows, self.ids.shape[1]))

    def _placed(self, rows: Sequence[int], past: int) -> dict[_Kind, _Reading]:
        """The readings of some rows that went no further than `past` tokens."""
        return {
            kind: _Reading(reading.columns, tuple(reading.places[i] for i in rows))
            for kind, reading in self.read.items()
            if reading.columns <= past
        }


class _Pass:
    """One forward pass. past: how many columns are in the cache already."""

    def __init__(self, reader: _Reader, ids: Tensor | None, attention: Any, past: int, history: _History | None):
        self._reader, self.ids, self._attention, self._past = reader, ids, attention, past
        self._rows = rows_now() or (history.rows if history else None)
        self._history = history if ids is None or history is None else history.expanded(len(ids), past)
        self._masks: dict[tuple[str, ...], Tensor] = {}
        self._touched: dict[tuple[str, ...], bool] = {}
        known = self._history.read if self._history is not None else {}
        self._read, self._places = known.get(reader.kind, _Reading())

    def mask(self, over: tuple[str, ...]) -> Tensor:
        if over not in self._masks:
            found = [self._one(text) for text in over]
            if not found:
                raise ValueError("No span is named. Say which tokens: prompt, thinking, answer, completion or all.")
            self._masks[over] = torch.stack(found).any(0) if len(found) > 1 else found[0]
        return self._masks[over]

    def touches(self, over: tuple[str, ...]) -> bool:
        if over not in self._touched:
            self._touched[over] = bool(self.mask(over).any())
        return self._touched[over]

    @cached_property
    def position(self) -> Tensor:
        return self._positions.masked_fill(~self._alive, -1)[:, self._past :]

    @cached_property
    def items(self) -> Tensor:
        batch, said = len(self._tokens), self._rows and self._rows.items
        if not said:
            return torch.arange(batch, device=self._tokens.device)
        if batch == 1 < len(said):
            return torch.full((1,), -1, device=self._tokens.device)
        return torch.tensor(said, device=self._tokens.device).repeat_interleave(self._times(len(said)))

    def history(self, there: _History | None) -> _History:
        """What the cache holds after this pass. there: what another follower of the same pass has left with it."""
        before = there or self._history
        read = dict(before.read) if before is not None else {}
        own, kind = _Reading(self._read, self._places), self._reader.kind
        if own.places:  # of the two that are alike, the one that has read further
            read[kind] = max(own, read.get(kind, own), key=lambda reading: reading.columns)
        return _History(self._all_ids if self._knows_ids else self._tokens, self._rows, read)

    # what the columns are, those in the cache included: [batch, past + token]

    @property
    def _tokens(self) -> Tensor:
        if self.ids is None:
            raise ValueError("This pass is given embeddings, not tokens: which tokens they are cannot be followed.")
        return self.ids

    @property
    def _knows_ids(self) -> bool:
        return self._past == 0 or self._history is not None

    @cached_property
    def _all_ids(self) -> Tensor:
        if self._past == 0:
            return self._tokens
        if self._history is None:
            raise ValueError(
                f"The {self._past} tokens in the cache were not followed: fill it inside the block, or begin without one."
            )
        return torch.cat([self._history.ids.to(self._tokens.device), self._tokens], dim=1)

    @cached_property
    def _real(self) -> Tensor:
        batch, new = self._tokens.shape
        shape = (batch, self._past + new)
        if self._attention is None:
            return torch.ones(shape, dtype=torch.bool, device=self._tokens.device)
        if not isinstance(self._attention, Tensor) or self._attention.ndim != 2 or self._attention.shape[1] != shape[1]:
            found = (
                tuple(self._attention.shape) if isinstance(self._attention, Tensor) else type(self._attention).__name__
            )
            raise ValueError(
                f"The attention mask is {found}, which does not say which tokens are padding. Give one of shape {shape}."
            )
        return self._attention.to(self._tokens.device).bool()

    @cached_property
    def _positions(self) -> Tensor:
        return self._real.cumsum(1) - 1

    @cached_property
    def _prompt_lengths(self) -> Tensor:
        """``[batch, 1]`` tokens of each row's prompt; ``[rows, 1]`` in a pass over a prefix that several rows share; the
        largest integer where all so far is prompt and more of it will come."""
        rows, (batch, columns) = self._rows, self._real.shape
        if rows is None:
            raise ValueError(
                "Nobody said where the prompts of this pass end, so its completion is not known. Run it through Model.generate or "
                "collect, say so (`with surgery.rows.rows_are([prompt tokens of each row]):`), or take over='all'."
            )
        device = self._tokens.device
        if rows.width is not None:
            if columns < rows.width:
                return torch.full((batch, 1), torch.iinfo(torch.long).max, device=device)
            return self._real[:, : rows.width].sum(1, keepdim=True)
        lengths = torch.tensor(rows.prompts, device=device)[:, None]
        if batch == 1 < len(lengths):
            if int(self._real.sum()) > int(lengths.min()):
                raise ValueError(f"One row goes through, but {len(lengths)} were announced, and they differ by here.")
            return lengths
        return lengths.repeat_interleave(self._times(len(lengths)), 0)

    def _times(self, announced: int) -> int:
        batch = len(self._tokens)
        if batch % announced:
            raise ValueError(f"{batch} rows go through, but {announced} were announced.")
        return batch // announced

    @cached_property
    def _completion(self) -> Tensor:
        """Which columns are completion, up to its end token and with it."""
        said = self._real & (self._positions >= self._prompt_lengths)
        if not self._reader.ends.numel():
            return said
        ends = said & torch.isin(self._all_ids, self._reader.ends.to(said.device))
        return said & ((ends.cumsum(1) - ends.long()) == 0)

    @cached_property
    def _alive(self) -> Tensor:
        """Which columns are real and not after the end; without an end where nobody said where prompts do."""
        if self._rows is None or not self._knows_ids or self._shared:
            return self._real
        return self._completion | (self._real & (self._positions < self._prompt_lengths))

    @cached_property
    def _shared(self) -> bool:
        """Whether this is the prefix of several rows at once: all prompt."""
        return (
            self._rows is not None
            and self._rows.prompts is not None
            and len(self._tokens) == 1 < len(self._rows.prompts)
        )

    # spans

    def _one(self, over: str) -> Tensor:
        name, which, pattern = parse_span(over)
        now = slice(self._past, None)
        place = self._positions[:, now]
        if name == "all" and not pattern:
            return self._alive[:, now] & _picked(over, which, place)
        if name not in ("prompt", "completion", "thinking", "answer", "sentence", "all"):
            raise ValueError(
                f"{over!r} cannot be followed: a pass knows prompt, completion, thinking, answer, sentence and all."
            )
        lengths = self._prompt_lengths
        if name in ("prompt", "all"):
            prompt = self._real[:, now] & (place < lengths)
            inside = self._prompt_matches(over) if pattern else _picked(over, which, place, lengths)
            asked = self._agreed(over, prompt & inside)
            return asked if name == "prompt" or self._shared else asked | self._reread(over, which)
        if self._shared:
            return torch.zeros_like(self._real[:, now])
        if pattern or name == "sentence":
            return self._reread(over, which)
        if name == "completion":
            return self._completion[:, now] & _picked(over, which, place - lengths)
        kind, ordinal = self._kinds
        return (kind == _KINDS[name]) & _picked(over, which, ordinal)

    def _agreed(self, over: str, member: Tensor) -> Tensor:
        """The one row that stands for several, where they agree."""
        if len(member) == len(self._tokens):
            return member
        if bool((member != member[:1]).any()):
            raise ValueError(
                f"{over!r} is not the same in the rows that share this prefix: run them inside `surgery.rows.rows_apart()`."
            )
        return member[:1]

    @cached_property
    def _kinds(self) -> tuple[Tensor, Tensor]:
        """Of each token of this pass, what it is, and how many of the kind came before it in its row."""
        batch, columns = self._all_ids.shape
        places = self._places or (_Place(),) * batch
        begun = self._completion[:, : self._read].any(1).tolist()
        ids, said = (t[:, self._read :].tolist() for t in (self._all_ids, self._completion))
        kinds, ordinals, after = [], [], []
        for row in range(batch):
            place, kind, ordinal = places[row], [], []
            for column, (token, counts) in enumerate(zip(ids[row], said[row], strict=True), self._read):
                if counts:
                    if not begun[row]:
                        begun[row], place = True, self._reader.after(self._prompt_before(row, column))
                    place, what, before = self._reader.read(place, token)
                else:
                    what, before = _OTHER, 0
                kind.append(what)
                ordinal.append(before)
            kinds.append(kind)
            ordinals.append(ordinal)
            after.append(place)
        self._places, start, self._read = tuple(after), self._past - self._read, columns
        both = torch.tensor([kinds, ordinals], device=self._tokens.device)[:, :, start:]
        return both[0], both[1]

    def _prompt_before(self, row: int, column: int) -> list[int]:
        """The last tokens of a row's prompt, which ends before a column."""
        return self._all_ids[row, :column][self._real[row, :column]][-_TAIL:].tolist()

    def _reread(self, over: str, which: str | None) -> Tensor:
        """Membership by definition: what the transcript up to and including each token says of that token."""
        if which is not None and "-" in which:
            raise ValueError(_not_yet(over))
        found = torch.zeros(self._tokens.shape, dtype=torch.bool)
        for row, (ids, real, said, length) in enumerate(
            zip(self._all_ids, self._real, self._completion, self._prompt_lengths[:, 0].tolist(), strict=True)
        ):
            tokens = ids[real].tolist()
            for column in said[self._past :].nonzero()[:, 0].tolist():
                at = int(self._positions[row, self._past + column])
                so_far = read_transcript(
                    self._reader.tokenizer, "", tokens[:length], tokens[length : at + 1], self._reader.markers
                )
                found[row, column] = at in positions(so_far, over)
        return found.to(self._tokens.device)

    def _prompt_matches(self, over: str) -> Tensor:
        """Which tokens of the prompts a regular expression matches; they must be in this pass as a whole, or in none of it."""
        member, lengths = torch.zeros(self._tokens.shape, dtype=torch.bool), self._prompt_lengths[:, 0].tolist()
        for row, (ids, real) in enumerate(zip(self._all_ids, self._real, strict=True)):
            if not bool((self._positions[row, self._past :] < lengths[row]).any()):
                continue
            tokens = ids[real].tolist()
            if self._past or self._shared or len(tokens) < lengths[row]:
                raise ValueError(
                    f"{over!r} needs the whole prompt in one pass: run the rows inside `surgery.rows.rows_apart()`."
                )
            prompt = read_transcript(self._reader.tokenizer, "", tokens[: lengths[row]], (), self._reader.markers)
            hits = torch.tensor(positions(prompt, over), dtype=torch.long)
            member[row] = torch.isin(self._positions[row].cpu(), hits)
        return member.to(self._tokens.device)


def _picked(over: str, which: str | None, ordinal: Tensor, count: Tensor | None = None) -> Tensor:
    """Which of the tokens of a span, numbered from 0, are asked for. count: how many there are, where that is known."""
    if which is None:
        return torch.ones_like(ordinal, dtype=torch.bool)
    begin, end = _bounds(which)
    if min(begin or 0, end or 0) < 0:
        if count is None:
            raise ValueError(_not_yet(over))
        if bool((count == torch.iinfo(torch.long).max).any()):
            raise ValueError(f"{over!r} needs the whole prompt in one pass.")
    member = torch.ones_like(ordinal, dtype=torch.bool)
    for bound, inside in ((begin, torch.ge), (end, torch.lt)):
        if bound is not None:
            member = member & inside(ordinal, bound if bound >= 0 or count is None else count + bound)
    return member


def _bounds(which: str) -> tuple[int | None, int | None]:
    """``2`` -> (2, 3), ``-1`` -> (-1, None), ``:16`` -> (None, 16)."""
    if ":" not in which:
        at = int(which)
        return at, at + 1 if at != -1 else None
    begin, end = (int(part) if part else None for part in which.split(":"))
    return begin, end


def _not_yet(over: str) -> str:
    return (
        f"{over!r} counts from an end that is not known while tokens come. Count from the beginning, as in thinking[:16]; "
        "of the prompt, prompt[-1] is known."
    )


# --- reading markers ------------------------------------------------------------------------------------------------------------


_Kind = tuple[int, Markers]  # what readers that read alike have in common
_TAIL = 48  # tokens of a prompt's end in which an opening marker is looked for, and the white space after it


class _Place(NamedTuple):
    """How far a completion has been read. where: 0 before the thinking, 1 in it, 2 after it."""

    where: int = 0
    recent: tuple[int, ...] = ()  # tokens since the last marker, as many as a marker may have
    rest: str | None = ""  # text between the last marker and `recent`; None where tokens have been let go in between
    thought: int = 0
    answered: int = 0


class _Reader:
    """Tells thinking from answer token by token, with the state in a `_Place`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: Markers):
        self.tokenizer, self.markers = tokenizer, markers
        self.ends = torch.tensor(sorted(end_tokens(tokenizer)), dtype=torch.long)
        self._end_ids = end_tokens(tokenizer)
        self.kind: _Kind = id(tokenizer), markers
        self._longest = max(len(markers.open.encode()), len(markers.close.encode()))
        self._may_close: dict[int, bool] = {}

    def after(self, prompt: Sequence[int]) -> _Place:
        """Where a completion begins, given the end of its prompt: in the thinking, where a chat template has opened it."""
        return _Place(where=1) if opens_thinking(self._text(prompt), self.markers) else _Place()

    def read(self, place: _Place, token: int) -> tuple[_Place, int, int]:
        """The next token of a completion: the new place, what the token is, and how many of the kind came before it."""
        if token in self._end_ids:
            return place, _OTHER, 0
        if place.where == 2:
            return place._replace(answered=place.answered + 1), _ANSWER, place.answered
        recent, rest = (*place.recent, token), place.rest
        if len(recent) > self._longest:
            recent, rest = recent[-self._longest :], None
        if self._may_complete(token):
            text = (rest or "") + self._text(recent)
            marker = self.markers.close if place.where else self.markers.open
            if (at := text.find(marker)) >= 0:
                rest = text[at + len(marker) :]
                where = place.where + 1
                if self.markers.close in rest:
                    where = 2
                return _Place(where, (), rest), _OTHER, 0
        if place.where:
            return place._replace(recent=recent, rest=rest, thought=place.thought + 1), _THINKING, place.thought
        return place._replace(recent=recent, rest=rest, answered=place.answered + 1), _ANSWER, place.answered

    def _may_complete(self, token: int) -> bool:
        """Whether a token can be the last of a marker: whether it holds a marker's last character (which several may share if it is not ASCII)."""
        if token not in self._may_close:
            last = {self.markers.open[-1], self.markers.close[-1]}
            text = self._text((token,))
            self._may_close[token] = any(not char.isascii() or char in text for char in last)
        return self._may_close[token]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
