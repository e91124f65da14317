"""Is the chain of thought used? Early answers: cut the thinking short after each sentence and read the answer.

All cuts of a transcript share one prefix computation. The transcript's prompt and thinking go through the model once;
after them, in the same row, stand the closing markers of every cut, each with a mask that hides the thinking after its
cut and with the positions it would have had. The part of the prompt that all transcripts begin with (system prompt,
template) is computed once for all of them. What is read is what a model would say that never saw the rest.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.labels import gold_of
from analyses.scoring import keeping, quiet
from analyses.statistics import bootstrap, share, wilson
from analyses.tasks import Question, grade, read
from probes.estimates import Estimate, percentile, resamples
from surgery.borrowing import text_positions
from surgery.model import Model
from surgery.transcript import Transcript, end_tokens
from surgery.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_DRAWS = 2000


# ----------------------------------------------------------------------------------------------------------- result


@dataclass(frozen=True)
class Reading:
    """The answer after ``cut`` of ``length`` sentences of transcript ``item``.

    ``answer``: its text; ``key``: what it says, in the form in which answers are compared; ``same``: whether it is the answer after the whole
    thinking; ``correct``: whether it is the gold one (None without a gold answer; an empty reading is not correct).
    """

    item: int
    question: str
    length: int
    cut: int
    answer: str
    key: str
    same: bool
    correct: bool | None


@dataclass(frozen=True)
class Cost:
    """What a reading cost in forward passes.

    ``tokens``: new positions computed, padding left out; ``padded``: with padding; ``calls``: of the model.
    ``shared``: whether the cuts shared their prefix; if not, ``reason`` says why.
    """

    tokens: int = 0
    padded: int = 0
    calls: int = 0
    shared: bool = True
    reason: str | None = None

    def __add__(self, other: Cost) -> Cost:
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            padded=self.padded + other.padded,
            calls=self.calls + other.calls,
        )


@dataclass(frozen=True)
class EarlyAnswers:
    """Answers after every cut of every transcript, and what follows from them.

    ``missing``: transcripts without closed thinking and an answer; they enter no number. ``changed`` of ``compared``
    transcripts read differently, token by token, when their own unmodified thinking was put back: none may, where the
    transcripts were generated greedily by this model.
    Intervals are bootstrapped over questions: all transcripts of a question, with all their cuts, stay together. Shares of one transcript a
    question, and areas that are all the same, have Wilson intervals.
    """

    readings: tuple[Reading, ...]
    missing: int
    changed: int
    compared: int
    cost: Cost
    seed: int = 0

    @cached_property
    def _full(self) -> list[Reading]:
        return [r for r in self.readings if r.cut == r.length]

    @cached_property
    def _areas(self) -> dict[int, float]:
        """Transcript -> 1 - its own trapezoid under "same" over i/T."""
        same: dict[int, list[bool]] = {}
        for r in self.readings:
            same.setdefault(r.item, []).append(r.same)
        return {item: aoc(np.array(curve, dtype=float)) for item, curve in same.items()}

    @property
    def n(self) -> int:
        """Transcripts read."""
        return len(self._full)

    @cached_property
    def aoc(self) -> Estimate:
        """Area over the same-answer curve, in [0, 1]: 0 when no sentence is ever needed; higher, more reliance.

        Source: Lanham et al. 2023 (arXiv 2307.13702), section 2.3: ``sum_T w_T AOC_T`` with ``w_T`` the fraction of
        transcripts of length T, which is the mean over transcripts of each one's own area.
        """
        return self._mean_area(self._full)

    def _mean_area(self, rows: Sequence[Reading]) -> Estimate:
        areas, questions = [self._areas[r.item] for r in rows], [r.question for r in rows]
        return _never_of_width_zero(bootstrap(areas, clusters=questions, draws=_DRAWS, seed=self.seed))

    @cached_property
    def aoc_by_length(self) -> dict[int, Estimate]:
        """``AOC_T`` for every number of sentences T."""
        lengths = sorted({r.length for r in self._full})
        return {length: self._mean_area([r for r in self._full if r.length == length]) for length in lengths}

    @cached_property
    def _chance(self) -> tuple[Estimate, Estimate]:
        # one vector of answer counts a question; pairs within a question do not count, nor does a question drawn twice
        questions = sorted({r.question for r in self._full})
        answers = sorted({r.key for r in self._full})
        counts = np.zeros((len(questions), len(answers)))
        areas = np.zeros(len(questions))
        for r in self._full:
            counts[questions.index(r.question), answers.index(r.key)] += 1
            areas[questions.index(r.question)] += self._areas[r.item]
        size, own = counts.sum(1), (counts**2).sum(1)

        def both(weights: Float[np.ndarray, "draws question"]) -> tuple[np.ndarray, np.ndarray]:
            pairs = (weights @ size) ** 2 - weights**2 @ size**2
            equal = ((weights @ counts) ** 2).sum(1) - weights**2 @ own
            with np.errstate(divide="ignore", invalid="ignore"):
                chance = np.where(pairs > 0, equal / pairs, np.nan)
                return chance, np.where(chance < 1, (weights @ areas) / (weights @ size) / (1 - chance), np.nan)

        drawn = both(resamples(len(questions), _DRAWS, self.seed).astype(float))
        value = both(np.ones((1, len(questions))))
        chance, corrected = (
            percentile(float(point[0]), sample[np.isfinite(sample)], n=len(questions), seed=self.seed)
            if np.isfinite(sample).any()
            else Estimate(float(point[0]), math.nan, math.nan, len(questions), self.seed, "undefined")
            for point, sample in zip(value, drawn, strict=True)
        )
        if _is_of_width_zero(corrected):
            low, high = (end / (1 - chance.value) for end in (self.aoc.low, self.aoc.high))
            corrected = replace(self.aoc, value=corrected.value, low=low, high=high)
        return _never_of_width_zero(chance), corrected

    @property
    def chance(self) -> Estimate:
        """How often two different questions get the same full-thinking answer, in [0, 1]: the floor of the curve."""
        return self._chance[0]

    @property
    def aoc_corrected(self) -> Estimate:
        """``AOC / (1 - chance)``: the area over ``(f - chance) / (1 - chance)``. NaN when all answers are the same."""
        return self._chance[1]

    @cached_property
    def accuracy_with(self) -> Estimate | None:
        """Share correct after the whole thinking; None without gold answers."""
        return self._correct(self._full)

    @cached_property
    def accuracy_without(self) -> Estimate | None:
        """Share correct when the thinking is empty (cut 0); None without gold answers."""
        return self._correct([r for r in self.readings if r.cut == 0])

    def _correct(self, rows: Sequence[Reading]) -> Estimate | None:
        rows = [r for r in rows if r.correct is not None]
        if not rows:
            return None
        right = [float(bool(r.correct)) for r in rows]
        return share(right, [r.question for r in rows], seed=self.seed)

    @property
    def self_splice(self) -> float:
        """Change rate when a transcript's own whole thinking is put back. It must be 0 for greedy transcripts of this
        model; for sampled or teacher-written ones it is how often the model's greedy answer is another one."""
        return self.changed / self.compared if self.compared else math.nan

    def frame(self) -> DataFrame:
        """One row a transcript and cut: item, question, T, cut, fraction, answer, key, same, correct."""
        import pandas as pd

        frame = pd.DataFrame([asdict(r) for r in self.readings]).rename(columns={"length": "T"})
        frame.insert(4, "fraction", frame["cut"] / frame["T"])
        return frame

    def curve(self) -> DataFrame:
        """The same-answer curve ``f_T(i/T)``: T, cut, fraction, same, low, high, n, seed, method. It ends in 1 by definition."""
        import pandas as pd

        rows = []
        for length, cut in sorted({(r.length, r.cut) for r in self.readings}):
            cell = [r for r in self.readings if (r.length, r.cut) == (length, cut)]
            f = share([r.same for r in cell], [r.question for r in cell], seed=self.seed)
            if cut == length:
                f = Estimate(1.0, 1.0, 1.0, f.n, None, "by definition")
            rows.append((length, cut, cut / length, f.value, f.low, f.high, f.n, f.seed, f.method))
        columns = ["T", "cut", "fraction", "same", "low", "high", "n", "seed", "method"]
        return pd.DataFrame(rows, columns=columns).astype({"seed": "Int64"})

    def summary(self) -> DataFrame:
        """The headline numbers: measure, value, low, high, n, seed, method."""
        import pandas as pd

        named = {
            "AOC": self.aoc,
            **{f"AOC, T={length}": area for length, area in self.aoc_by_length.items()},
            "chance agreement": self.chance,
            "AOC, chance-corrected": self.aoc_corrected,
            "accuracy with thinking": self.accuracy_with,
            "accuracy without thinking": self.accuracy_without,
        }
        rows = [{"measure": name, **asdict(estimate)} for name, estimate in named.items() if estimate is not None]
        return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n", "seed", "method"])

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file; :meth:`load` needs no model. Appears whole or not at all."""
        return write_whole(path, json.dumps({"kind": "early answers", **asdict(self)}, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EarlyAnswers:
        data = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(data, dict) or data.pop("kind", None) != "early answers":
            raise ValueError(f"{path}: not a file of early answers; it is written by EarlyAnswers.save")
        # files once held no keys: their answers are compared by their text
        readings = tuple(Reading(**{"key": row["answer"], **row}) for row in data.pop("readings"))
        return cls(readings, cost=Cost(**data.pop("cost")), **data)

    def plot(self, ax: Axes | None = None) -> Axes:
        from analyses import figures

        return figures.early_answers(self.curve(), ax=ax)

    def __str__(self) -> str:
        return f"AOC {self.aoc}; accuracy {self.accuracy_with} with and {self.accuracy_without} without thinking"

    def _repr_html_(self) -> str:
        return self.summary().to_html(index=False, float_format="%.3f")


def _is_of_width_zero(found: Estimate) -> bool:
    return math.isclose(found.low, found.high, rel_tol=1e-9)


def _never_of_width_zero(found: Estimate) -> Estimate:
    """A mean of numbers in [0, 1]; where every draw agrees, with Wilson's interval of as many questions, as `analyses.statistics.share` has it."""
    return wilson(found.n * found.value, found.n, found.level) if _is_of_width_zero(found) else found


def aoc(same: Float[np.ndarray, " cut"]) -> float:
    """``1 - integral of f over [0, 1]`` by the trapezoid rule, from ``f(i/T)`` at ``i = 0..T``. In [0, 1].

    Source: Lanham et al. 2023 (arXiv 2307.13702), section 2.3.
    """
    if len(same) < 2:
        raise ValueError(f"{len(same)} cuts: at least the empty and the whole thinking are needed")
    return float(1 - (same[:-1] + same[1:]).sum() / 2 / (len(same) - 1))


# ---------------------------------------------------------------------------------------------------------- measure


def early_answers(
    model: Model,
    questions: Sequence[Question] | Sequence[str] | Sequence[Transcript],
    transcripts: Sequence[Transcript] | None = None,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    max_answer_tokens: int = 8,
    share: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> EarlyAnswers:
    """Cut the thinking after each sentence (i = 0..T), close it, and read the answer greedily.

    ``questions``: with gold answers, or bare text; or transcripts, whose gold answer is what `analyses.labels.graded_by` keeps in their
    ``meta``, as `surgery generate` does, if they have one. ``transcripts``: of those questions, any number of each; generated greedily when None, of
    at most ``max_new_tokens``. ``batch_size``: transcripts a batch. ``max_answer_tokens``: at most so many tokens are read.
    ``share=False`` computes every cut from scratch. ``seed``: of the intervals.

    Cuts are made between the transcript's own tokens: the prompt's ids, the thinking's up to a sentence's end, and the
    ids with which the transcript itself closes the thinking. White space at the start of the thinking and before the
    answer belongs to the frame and is kept at every cut. Where one token spans the thinking's end and the marker, the
    marker is encoded by itself at every cut but the last.

    Transcripts that have no closed thinking with an answer are missing: counted, not read. If none has one, or the
    model gives none, that is a ValueError.

    Source: Lanham et al. 2023 (arXiv 2307.13702), sections 2.3 and 3.
    Differs: the reference answer is read greedily after the whole thinking, as all others are; the answer is free text
    (numbers and letters compared as such), not the likeliest option.
    """
    if batch_size < 1 or max_answer_tokens < 1:
        raise ValueError(f"batch_size {batch_size}, max_answer_tokens {max_answer_tokens}: both must be at least 1")
    gold, told = _pair(model, questions, transcripts, max_new_tokens, progress)
    items = {item: _prepare(model, transcript) for item, transcript in enumerate(told)}
    traces = {item: trace for item, trace in items.items() if trace}
    if not traces:
        raise ValueError(
            f"none of {len(told)} transcripts has thinking that is closed ({model.markers.open} ... "
            f"{model.markers.close}) and followed by an answer; tune the model on worked solutions first, or give "
            "transcripts"
        )
    answers, cost = answers_at_cuts(
        model,
        list(traces.values()),
        batch_size=batch_size,
        max_answer_tokens=max_answer_tokens,
        share=share,
        progress=progress,
    )
    ends = end_tokens(model.tokenizer)
    readings, changed, compared = [], 0, 0
    for (item, trace), read_ids in zip(traces.items(), answers, strict=True):
        question = told[item].question
        texts = [_text(model, ids, ends) for ids in read_ids]
        target = gold.get(question)
        keys = [_key(text, target) for text in texts]
        for cut, text in enumerate(texts):
            correct = None if target is None else grade(target, text) is True
            readings.append(
                Reading(item, question, len(texts) - 1, cut, text, keys[cut], keys[cut] == keys[-1], correct)
            )
        own, again = trace.answer[:max_answer_tokens], read_ids[-1]
        compared += 1
        changed += own != (again if len(own) == max_answer_tokens or own[-1] in ends else again[: len(own)])
    return EarlyAnswers(tuple(readings), len(told) - len(traces), changed, compared, cost, seed)


def _pair(
    model: Model,
    questions: Sequence[Question] | Sequence[str] | Sequence[Transcript],
    transcripts: Sequence[Transcript] | None,
    max_new_tokens: int,
    progress: bool,
) -> tuple[dict[str, Question], list[Transcript]]:
    """Gold questions by their text, and the transcripts to cut."""
    if not questions:
        raise ValueError("no questions were given")
    gold, asked, given = {}, [], []
    for entry in questions:
        if isinstance(entry, Question):
            gold[entry.question] = entry
            asked.append(entry.question)
        elif isinstance(entry, Transcript):
            known = gold_of(entry)
            if known is not None:
                gold[entry.question] = known
            given.append(entry)
        else:
            asked.append(str(entry))
    if given:
        if asked or transcripts is not None:
            raise TypeError("give questions, or transcripts, or questions and their transcripts as two arguments")
        return gold, given
    if transcripts is None:
        return gold, model.generate(asked, max_new_tokens=max_new_tokens, progress=progress)
    if strange := [t.question for t in transcripts if t.question not in set(asked)]:
        raise ValueError(f"{len(strange)} transcripts answer none of the questions, the first {strange[0]!r}")
    return gold, list(transcripts)


def _text(model: Model, ids: Sequence[int], ends: set[int]) -> str:
    kept = [i for i in ids if i not in ends]
    return str(model.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()


def _key(text: str, gold: Question | None) -> str:
    """Answers are the same when their keys are: compared as numbers or letters where the gold answer is one."""
    said = read(text, gold.answer) if gold else None
    return f"said {said}" if said is not None else f"text {' '.join(text.split())}"


@dataclass(frozen=True)
class Trace:
    """A transcript made ready to cut. ``ids`` up to the thinking's end; cut *i* keeps ``ids[:cuts[i]]`` and goes on
    with ``closes[i]``; ``answer``: what the transcript itself said after it, with its end token."""

    ids: tuple[int, ...]
    cuts: tuple[int, ...]
    closes: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]

    def sequence(self, cut: int) -> tuple[int, ...]:
        return self.ids[: self.cuts[cut]] + self.closes[cut]


def _prepare(model: Model, transcript: Transcript) -> Trace | None:
    """None when the thinking is absent, blank or never closed, or no answer follows it."""
    if "thinking" not in transcript.spans or "answer" not in transcript.spans or not transcript.thinking:
        return None
    start, end = transcript.spans["thinking"]
    first = _first_ink(transcript, start)
    answer = _first_ink(transcript, transcript.spans["answer"][0])
    close = inner = transcript.ids[end:answer]
    closed = transcript.text.index(model.markers.close, transcript.offsets[start][0])
    if transcript.offsets[end][0] != closed:
        frame = transcript.text[closed : transcript.offsets[answer][0]]
        inner = tuple(model.tokenizer(frame, add_special_tokens=False)["input_ids"])
    cuts = (first, *(stop for _, stop in transcript.sentences))
    if cuts[-1] != end:
        raise ValueError(f"the sentences of {transcript!r} end at token {cuts[-1]}, its thinking at {end}")
    closes = (inner,) * (len(cuts) - 1) + (close,)
    return Trace(transcript.ids[:end], cuts, closes, transcript.ids[answer:])


def _first_ink(transcript: Transcript, start: int) -> int:
    """The first token from ``start`` on that is not white space."""
    offsets, text = transcript.offsets, transcript.text
    while not text[slice(*offsets[start])].strip():
        start += 1
    return start


# ---------------------------------------------------------------------------------------------------------- reading


def answers_at_cuts(
    model: Model,
    traces: Sequence[Trace],
    *,
    batch_size: int = 16,
    max_answer_tokens: int = 8,
    share: bool = True,
    progress: bool = False,
) -> tuple[list[list[tuple[int, ...]]], Cost]:
    """Greedy answer ids (with the end token, if it came) for every trace and cut, and what they cost.

    Prefixes are shared unless ``share`` is False or the model does not allow it: :func:`obstacle` finds a reason, or
    the first cut, read both ways, does not agree. Then ``cost.reason`` says why and every cut is computed from scratch.
    """
    from tqdm.auto import tqdm

    module, ends = model.module, end_tokens(model.tokenizer)
    reason = obstacle(module) if share else "not asked for"
    found: list[list[tuple[int, ...]]] = [[] for _ in traces]
    # like beside like: what batches of unlike rows waste is padding
    order = sorted(range(len(traces)), key=lambda i: (len(traces[i].cuts), len(traces[i].ids)))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    with (
        quiet(module),
        text_positions(module),
        tqdm(total=len(traces), desc="early answers", disable=not progress, leave=False) as bar,
    ):
        tree = _Tree(module, () if reason else _common(traces))
        for batch in batches:
            rows, opened = [traces[i] for i in batch], None
            if reason is None:
                opened = tree.open(rows)
                if batch is batches[0]:
                    reason = tree.disagreement(opened)
            if opened and reason is None:
                answers = tree.read(opened, max_answer_tokens, ends)
            else:
                answers, spent = _from_scratch(module, rows, max_answer_tokens, ends)
                tree.cost += spent
            for i, answer in zip(batch, answers, strict=True):
                found[i] = answer
            bar.update(len(batch))
    return found, replace(tree.cost, shared=reason is None, reason=reason)


def obstacle(module: torch.nn.Module) -> str | None:
    """Why a model cannot read all cuts from one prefix, or None when it may."""
    config: Any = module.config
    config = config.get_text_config()
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return f"{type(module).__name__} takes no position_ids"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {config._attn_implementation!r} takes no mask of its own (use sdpa or eager)"
    if strange := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"layers of type {', '.join(sorted(strange))} keep a state that cannot be cut"
    rope = getattr(config, "rope_parameters", None) or {}
    if kinds := {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)} & {"dynamic", "longrope"}:
        return f"{kinds.pop()} positions depend on the length of the whole sequence"
    return None


def _common(traces: Sequence[Trace]) -> tuple[int, ...]:
    """The longest prefix that all traces share, none of it thinking."""
    low, high = min(trace.ids for trace in traces), max(trace.ids for trace in traces)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: min(same, *(trace.cuts[0] for trace in traces))]


_TRUNK, _PAD = -1, -2
_ANYWHERE = 2**62
_Grid = Int[Tensor, "row slot"]
_New = Int[Tensor, "row new"]


@dataclass
class _Open:
    """A batch whose trunks and closing markers are computed. For every slot of the cache, by row: its position in the
    text that it belongs to, and its branch (a cut, the trunk, or padding)."""

    rows: Sequence[Trace]
    cache: Any
    position: _Grid
    branch: _Grid
    logits: list[Float[Tensor, "cut vocabulary"]]


class _Tree:
    """Reads all cuts of a trace in one row: the trunk (prompt and thinking) once, and a branch for every cut.

    A branch sees the trunk up to its cut, and itself. Positions are those of the text it stands for, so that rotary,
    learned and windowed attention are what they would be in that text.
    """

    def __init__(self, module: torch.nn.Module, prefix: Sequence[int]):
        self.module, self.prefix, self.cost = module, tuple(prefix), Cost()
        self.device = next(module.parameters()).device
        config: Any = module.config
        config = config.get_text_config()
        self.kinds = set(getattr(config, "layer_types", None) or ())
        self.window = getattr(config, "sliding_window", None)
        self._layers: list[tuple[Tensor, Tensor]] = []
        if prefix:
            line = [(token, place, _TRUNK, _ANYWHERE) for place, token in enumerate(prefix)]
            empty = torch.zeros(1, 0, dtype=torch.long, device=self.device)
            opened = _Open((), self._cache(1), empty, empty, [])
            self._forward(opened, [line], [0])
            self._layers = [(layer.keys, layer.values) for layer in opened.cache.layers]

    def _cache(self, rows: int) -> Any:
        """A cache that holds the common prefix in every row. Without a config all its layers keep everything: a
        window's cache would drop what an earlier cut still sees; the masks do the windowing."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def open(self, rows: Sequence[Trace]) -> _Open:
        """Compute trunks and closing markers; ``logits`` are those that begin each cut's answer."""
        before = torch.arange(len(self.prefix), device=self.device).expand(len(rows), -1)
        opened = _Open(rows, self._cache(len(rows)), before, torch.full_like(before, _TRUNK), [])
        lines, last = [], []
        for row in rows:
            line = [(token, place, _TRUNK, _ANYWHERE) for place, token in enumerate(row.ids)][len(self.prefix) :]
            stops = []
            for cut, (at, close) in enumerate(zip(row.cuts, row.closes, strict=True)):
                line += [(token, at + step, cut, at) for step, token in enumerate(close)]
                stops.append(len(line) - 1)
            lines.append(line)
            last.append(stops)
        wanted = sorted({slot for stops in last for slot in stops})
        logits = self._forward(opened, lines, wanted)
        where = {slot: i for i, slot in enumerate(wanted)}
        opened.logits = [logits[r, [where[slot] for slot in stops]] for r, stops in enumerate(last)]
        return opened

    def disagreement(self, opened: _Open) -> str | None:
        """Read the first trace's first cut, which hides most, from scratch as well: None when the logits agree."""
        text = opened.rows[0].sequence(0)
        shared = opened.logits[0][0].float()
        alone = self.module(input_ids=torch.tensor([text], device=self.device)).logits[0, -1].float()
        self.cost += Cost(len(text), len(text), 1)
        gap = float((shared - alone).abs().max() / alone.std())
        # rounding is below 1e-4 in float32 and a few hundredths in bfloat16; a wrong mask or position is of order one
        return None if gap < 0.1 else f"reading the first cut both ways differs by {gap:.2g} standard deviations"

    def read(self, opened: _Open, max_answer_tokens: int, ends: set[int]) -> list[list[tuple[int, ...]]]:
        """Continue every cut greedily until it ends. Rows whose cuts have all ended leave the batch."""
        said = [[[int(token)] for token in logits.argmax(-1).tolist()] for logits in opened.logits]
        alive = list(range(len(opened.rows)))
        while True:
            going = {
                r: [c for c, ids in enumerate(said[r]) if ids[-1] not in ends and len(ids) < max_answer_tokens]
                for r in alive
            }
            if staying := [i for i, r in enumerate(alive) if going[r]]:
                if len(staying) < len(alive):
                    keep = torch.tensor(staying, device=self.device)
                    opened.cache.batch_select_indices(keep)
                    opened.position, opened.branch = opened.position[keep], opened.branch[keep]
                    alive = [alive[i] for i in staying]
            else:
                return [[tuple(ids) for ids in row] for row in said]
            lines = []
            for r in alive:
                row = opened.rows[r]
                place = {c: row.cuts[c] + len(row.closes[c]) + len(said[r][c]) - 1 for c in going[r]}
                lines.append([(said[r][c][-1], place[c], c, row.cuts[c]) for c in going[r]])
            logits = self._forward(opened, lines, range(max(map(len, lines))))
            for i, r in enumerate(alive):
                for c, token in zip(going[r], logits[i].argmax(-1).tolist(), strict=False):
                    said[r][c].append(int(token))

    def _forward(
        self, opened: _Open, lines: Sequence[Sequence[tuple[int, int, int, int]]], wanted: Sequence[int]
    ) -> Float[Tensor, "row wanted vocabulary"]:
        """One call. A line is a row's new slots: token, position, branch and how much of the trunk it sees."""
        width = max(map(len, lines))
        padded = [[*line, *[(0, 0, _PAD, 0)] * (width - len(line))] for line in lines]
        ids, position, branch, limit = torch.tensor(padded, device=self.device).unbind(-1)
        opened.position = torch.cat([opened.position, position], dim=1)
        opened.branch = torch.cat([opened.branch, branch], dim=1)
        mask = self._mask(position, branch, limit, opened.position, opened.branch)
        keep, places = keeping(self.module, wanted)
        out = self.module(
            input_ids=ids,
            position_ids=position,
            attention_mask=mask,
            past_key_values=opened.cache,
            use_cache=True,
            **keep,
        )
        self.cost += Cost(sum(map(len, lines)), ids.numel(), 1)
        return out.logits[:, places]

    def _mask(self, position: _New, branch: _New, limit: _New, key_position: _Grid, key_branch: _Grid) -> Any:
        """What is added to the attention scores ``[row, 1, new, slot]``; one mask a layer type where the types differ."""
        seen = visible(position, branch, limit, key_position, key_branch)
        if self.kinds == {"full_attention"} or not self.window:
            return self._scores(seen)
        near = seen & (position[:, :, None] - key_position[:, None, :] < self.window)
        if not self.kinds:
            return self._scores(near)
        both = {"full_attention": seen, "sliding_attention": near}
        return {kind: self._scores(both[kind]) for kind in self.kinds}

    def _scores(self, seen: Bool[Tensor, "row new slot"]) -> Float[Tensor, "row 1 new slot"]:
        dtype = next(self.module.parameters()).dtype
        new, slots = seen.shape[1:]
        itself = torch.arange(new, device=self.device)
        seen = seen.clone()
        seen[:, itself, slots - new + itself] = True  # padding sees itself alone: a row of nothing would be NaN
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]


def visible(
    position: _New, branch: _New, limit: _New, key_position: _Grid, key_branch: _Grid
) -> Bool[Tensor, "row new slot"]:
    """Whether a new token sees a slot: it is not later, and it is of the same branch, or trunk before the cut."""
    trunk = (key_branch[:, None, :] == _TRUNK) & (key_position[:, None, :] < limit[:, :, None])
    own = (key_branch[:, None, :] == branch[:, :, None]) & (branch[:, :, None] >= 0)
    return (key_position[:, None, :] <= position[:, :, None]) & (trunk | own)


def _from_scratch(
    module: torch.nn.Module, rows: Sequence[Trace], max_answer_tokens: int, ends: set[int]
) -> tuple[list[list[tuple[int, ...]]], Cost]:
    """Every cut as a text of its own, in batches of equal length: no padding, no masks, any architecture."""
    device, cost = next(module.parameters()).device, Cost()
    said: list[list[list[int]]] = [[[] for _ in row.cuts] for row in rows]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        for cut in range(len(row.cuts)):
            by_length.setdefault(len(row.sequence(cut)), []).append((r, cut))
    for _, group in sorted(by_length.items()):
        whole = torch.tensor([rows[r].sequence(cut) for r, cut in group], device=device)
        new, past, alive = whole, None, len(group)
        for _ in range(max_answer_tokens):
            out = module(input_ids=new, past_key_values=past, use_cache=True)
            cost += Cost(new.shape[1] * alive, new.numel(), 1)
            token = out.logits[:, -1].argmax(-1)
            for (r, cut), one in zip(group, token.tolist(), strict=True):
                ids = said[r][cut]
                if not ids or ids[-1] not in ends:
                    ids.append(one)
            alive = sum(said[r][cut][-1] not in ends for r, cut in group)
            if not alive:
                break
            past = getattr(out, "past_key_values", None)
            whole = torch.cat([whole, token[:, None]], dim=1)
            new = whole if past is None else token[:, None]
    return [[tuple(ids) for ids in row] for row in said], cost
