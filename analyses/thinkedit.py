"""ThinkEdit: find what makes a model think briefly, and take it out of the few heads that write it.

    runs   = model.generate(questions, samples=4)               # several answers a question
    length = length_direction(model, runs)                      # from short to long, within questions
    heads  = writers_of(model, -length, runs).top(share=0.04)   # who writes the brief direction
    edited = apply(RemoveDirection(length), model.weights, at=heads)

`find` is these lines with disjoint questions for direction and heads; `judge` adds what they need beside them: questions that neither
saw, other strengths and shares, random heads of the same layers and random directions. `thinkedit` does all of it.

Source: Sun et al. 2025, "ThinkEdit: Interpretable Weight Editing to Mitigate Overly Short Thinking in Reasoning Models", arXiv 2503.22048.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.changes import Editing, digest
from analyses.dose import Cell, Line, Sweep, sweep
from analyses.statistics import followed, restricted_difference, restricted_mean, share_difference
from analyses.tasks import Question
from probes.attribution import Contributions, writers_of
from probes.directions import (
    ONE_EARLY,
    Direction,
    by_thresholds,
    length_direction,
    longest_and_shortest,
    one_early,
    span_lengths,
)
from probes.estimates import Estimate, no_interval, percentile, resampled_means
from probes.steering import Steering
from surgery.anatomy import Anatomy
from surgery.edit_lists import DIRECTION
from surgery.edits import RemoveDirection
from surgery.model import Model
from surgery.runs import Runs, fingerprint
from surgery.sites import Site
from surgery.tensorfile import save_tensors
from surgery.transcript import Transcript, parse_span
from surgery.weights import Weights, apply

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

SHARES = (0.01, 0.02, 0.04, 0.08, 0.16)
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
PANELS = ("strengths", "shares", "steering", "layers")
_AT = " at "


@dataclass(frozen=True)
class Recipe:
    """How direction and heads are found, and what is done with them.

    share:    of all heads, those edited; in (0, 1].
    strength: w in [0, 2]: 0 does nothing, 1 removes the direction, 2 reflects it.
    site:     where the stream is read: ``attention`` (``l.mid``, after the attention of the layer whose heads are edited) or ``mlp``
              (``l+1.resid``, after the layer's MLP).
    over:     what is read: ``thinking``, or ``answer`` for a model without think marks (not ``completion``, whose last token, the end of
              the sequence, only answers that ended have). With a part of it, ``thinking[:16]``, all answers are read at the same places. The
              length that counts is that of the whole span.
    how:      ``paired``: each question's longest answers against its shortest; ``thresholds``: answers of under `short` tokens against those
              of over `long`, whatever their questions, read one token early.
    rank:     ``contrast``: by what a head writes along the brief direction in short answers more than in long ones of the same question;
              ``short``: by what it writes in short answers, also what it writes in all answers alike.
    """

    share: float = 0.04
    strength: float = 1.0
    site: Literal["attention", "mlp"] = "attention"
    over: str = "thinking"
    how: Literal["paired", "thresholds"] = "paired"
    rank: Literal["contrast", "short"] = "contrast"
    short: int = 100
    long: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share}: of all heads, in (0, 1].")
        if not 0 <= self.strength <= 2:
            raise ValueError(
                f"strength {self.strength}: in [0, 2]; 0 does nothing, 1 removes the direction, 2 reflects it."
            )
        for name, words in (
            ("site", ("attention", "mlp")),
            ("how", ("paired", "thresholds")),
            ("rank", ("contrast", "short")),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {' or '.join(words)}.")

        name, _, pattern = parse_span(self.over)
        if name not in ("thinking", "answer", "completion") or pattern is not None:
            raise ValueError(
                f"over {self.over!r}: a length is that of thinking or of answer; choose one, or a part of it such as thinking[:16]."
            )
        if self.how == "thresholds":
            by_thresholds([], self.short, self.long)  # raises where they are no two lengths
        if self.how == "thresholds" and self.over != self.span:
            raise ValueError(f"over {self.over!r}: thresholds are read over a whole span, such as {self.span}.")

    @property
    def span(self) -> str:
        """The span whose length counts."""
        return self.over.partition("[")[0]

    @property
    def at(self) -> str:
        """Pattern of the sites at which the stream is read."""
        return "*.mid" if self.site == "attention" else "*.resid"


PAPER = Recipe(how="thresholds", rank="short")
"""The published recipe: absolute thresholds, the last-token window, 4 % of the heads, ranked on short answers."""


@dataclass(frozen=True, eq=False)
class Found:
    """A length direction, and the heads that write its brief side.

    direction:     from short to long, at each site it was read.
    contributions: what every head writes along the brief direction, question by question (of how they are ranked, see `Recipe`).
    recipe:        how they were found.
    """

    direction: Direction
    contributions: Contributions
    recipe: Recipe

    def heads(self, share: float | None = None) -> list[Site]:
        """The heads to edit, the strongest writer first. share: of all heads; by default the recipe's."""
        return self.contributions.top(share=self.recipe.share if share is None else share)

    def edit(self, strength: float | None = None) -> RemoveDirection:
        """The edit of `heads`: from each head, the direction along which it was ranked is removed."""
        return RemoveDirection(self._vectors(), self.recipe.strength if strength is None else strength)

    def _vectors(self) -> dict[Site, Tensor]:
        pairs = zip(self.contributions.sites, self.contributions.at, strict=True)
        return {site.whole: self.direction[at] for site, at in pairs if site.head is not None}

    def edited(self, weights: Weights) -> Weights:
        """The weights with the edit at the heads. Nothing happens until they are written or installed."""
        return apply(self.edit(), weights, at=self.heads())

    def frame(self) -> DataFrame:
        """A row a head: layer, head, site, score, low, high, n, rank (1 is the strongest writer) and edited."""
        table: Any = self.contributions.frame()
        chosen = {str(site) for site in self.heads()}
        table = table[table["head"].notna()].sort_values("score", ascending=False, kind="stable")
        return table.assign(rank=range(1, len(table) + 1), edited=table["site"].isin(chosen)).reset_index(drop=True)

    def save(self, folder: str | Path) -> None:
        """``direction.safetensors``, ``heads.safetensors``, ``recipe.json``, and the edit as a list for ``surgery edit --edits``: ``edits.yml``
        with its vectors in ``removed.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.direction.save(folder / DIRECTION)
        self.contributions.save(folder / "heads.safetensors")
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n", encoding="utf-8")
        heads, vectors = self.heads(), self._vectors()
        written = sorted({site.whole for site in heads})
        save_tensors(folder / "removed.safetensors", {str(site): vectors[site].contiguous() for site in written}, {})
        edit = {
            "direction": "removed.safetensors",
            "at": [str(site) for site in heads],
            "strength": self.recipe.strength,
        }
        (folder / "edits.yml").write_text(f"edits:\n  - remove: {json.dumps(edit)}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Found:
        folder = Path(folder)
        recipe = Recipe(**json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        return cls(Direction.load(folder / DIRECTION), Contributions.load(folder / "heads.safetensors"), recipe)


def split(
    questions: Sequence[Question], shares: Sequence[float] = (0.4, 0.2, 0.4), *, seed: int = 0
) -> tuple[list[Question], ...]:
    """Questions for the direction, for the heads and for judging: disjoint, each text once, dealt at random.

    Raises ValueError where a part would have fewer than two.
    """
    each = list({q.question: q for q in questions}.values())
    random.Random(f"split {seed}").shuffle(each)
    bounds = [round(len(each) * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
    parts = tuple(each[a:b] for a, b in pairwise(bounds))
    if min(map(len, parts)) < 2:
        raise ValueError(
            f"{len(each)} different questions are too few to deal into {len(shares)} parts of two or more: give more."
        )
    return parts


def find(
    model: Model,
    for_direction: Sequence[Transcript],
    for_heads: Sequence[Transcript],
    recipe: Recipe = Recipe(),
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> Found:
    """The length direction from some runs, and from others the heads that write its brief side.

    Raises ValueError where a question is among both, and as `length_direction` and `writers_of` do.
    """
    both = {t.question for t in for_direction} & {t.question for t in for_heads}
    if both:
        raise ValueError(
            f"{len(both)} questions are used for both the direction and the heads, first {min(both)[:60]!r}: keep them apart."
        )
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    direction = length_direction(
        model,
        for_direction,
        at=recipe.at,
        over=recipe.over,
        of=recipe.span,
        how=recipe.how,
        short=recipe.short,
        long=recipe.long,
        seed=seed,
        **shared,
    )
    return Found(direction, rank_heads(model, direction, for_heads, recipe, **shared), recipe)


def rank_heads(
    model: Model,
    direction: Direction,
    runs: Sequence[Transcript],
    recipe: Recipe = Recipe(),
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> Contributions:
    """What every head writes along the brief side of a length direction, in runs that are read as the recipe says.

    Raises ValueError where no run is short, or for ``rank="contrast"`` where no question has a longer and a shorter answer.
    Source: the ranking of ThinkEdit, arXiv 2503.22048, by linearity. Differs: ``rank="contrast"`` subtracts what the head writes in long answers to
    the same question: what a head writes in all answers alike is not what makes one short.
    """
    lengths = span_lengths(runs, recipe.span, recipe.over)
    if recipe.rank == "contrast" or recipe.how == "paired":
        labels = longest_and_shortest(lengths, [t.question for t in runs])
    else:
        labels = by_thresholds(lengths, recipe.short, recipe.long)
    wanted = (0, 1) if recipe.rank == "contrast" else (0,)
    chosen = [i for i, label in enumerate(labels) if label in wanted]
    if not chosen:
        raise ValueError(
            f"None of the {len(runs)} runs counts as short ({sum(n is not None for n in lengths)} have a span {recipe.over!r}): heads are ranked on "
            "short answers. Give more samples a question, a higher cap, or thresholds that fit."
        )
    read = [runs[i] if recipe.how == "paired" else one_early(runs[i], recipe.over) for i in chosen]
    over = recipe.over if recipe.how == "paired" else ONE_EARLY
    found = writers_of(model, -direction, read, over=over, batch_size=batch_size, progress=progress)
    return _contrast(found, [labels[chosen[i]] == 0 for i in found.transcript]) if recipe.rank == "contrast" else found


def _contrast(found: Contributions, short: Sequence[bool]) -> Contributions:
    """Short less long answers, a row a question."""
    members: dict[str, tuple[list[int], list[int]]] = {}
    for row, (question, is_short) in enumerate(zip(found.question, short, strict=True)):
        members.setdefault(question, ([], []))[0 if is_short else 1].append(row)
    pairs = {q: (a, b) for q, (a, b) in members.items() if a and b}
    if not pairs:
        raise ValueError(
            "No question has both a shorter and a longer answer with a token to read: give more samples a question."
        )
    scores = torch.stack([found.scores[a].mean(0) - found.scores[b].mean(0) for a, b in pairs.values()])
    return replace(
        found, scores=scores, transcript=tuple(found.transcript[a[0]] for a, _ in pairs.values()), question=tuple(pairs)
    )


# --- judging ------------------------------------------------------------------------------------------------------------------


def random_heads(heads: Iterable[Site], anatomy: Anatomy, *, seed: int) -> list[Site]:
    """As many heads of the same layers, drawn at random: where a layer has enough others, from those; the control of what heads matter."""
    by: dict[int, list[int]] = {}
    for site in heads:
        assert site.layer is not None
        assert site.head is not None
        by.setdefault(site.layer, []).append(site.head)
    drawn: list[Site] = []
    for layer, taken in sorted(by.items()):
        every = range(anatomy.n_heads)
        others = [h for h in every if h not in taken]
        pool = others if len(others) >= len(taken) else list(every)
        chosen = random.Random(f"heads {seed} {layer}").sample(pool, len(taken))
        drawn += [Site(layer, "attn.o", h) for h in sorted(chosen)]
    return drawn


@dataclass(frozen=True, eq=False)
class Judged:
    """What an edit does to answers on which neither direction nor heads were found, beside its controls.

    sweeps: ``strengths``: the edit at other strengths, at the recipe's share of heads. ``shares``: at other shares, at its strength. Each
            with arms ``edit``, ``random heads 0`` and so on (as many, of the same layers) and ``random directions 0`` and so on (at the
            same heads). Where it was asked for, ``steering``: the raw direction added at every layer, and ``layers``: at one alone; beside
            random directions as long as it.
    recipe: of the edit.
    """

    sweeps: Mapping[str, Sweep]
    recipe: Recipe

    def frame(self) -> DataFrame:
        """A row a panel, arm, place on its axis and measure: panel, x, arm, draw, measure, value, low, high, n, missing.

        x is a strength, a share, or in the panel ``layers`` a layer, whose arms are then strengths. x = 0 is the untouched model.
        """
        import pandas as pd

        tables = [_panel(name, found.frame()) for name, found in self.sweeps.items()]
        return pd.concat(tables, ignore_index=True)

    def effects(self) -> DataFrame:
        """What the edit, as the recipe has it, changed: a row a measure.

        Columns: measure, before, after, difference, low, high (95 %, questions or passages resampled in pairs, of accuracy as `share_difference`;
        general text in nats a token of all passages; of lengths the restricted mean, see `Sweep.frame`; NaN where no answer has the span, or none
        was followed that far; without low and high where the lengths of all questions changed alike, or none did), n,
        heads_low, heads_high (smallest and largest difference of the random heads), heads_p, and so for random directions. A p is the share
        of controls, the edit counted among them, that change the measure as much either way: with 19 controls it cannot be below 0.05. NaN
        where the edit's difference is, and without controls.
        """
        import pandas as pd

        before, after = self._compared()
        strengths = self.sweeps["strengths"]
        rows = [
            _effect(measure, before, after, strengths.until, strengths.seed)
            for measure in ("length", "accuracy", "text_nll", "kl")
        ]
        return pd.DataFrame([row for row in rows if row is not None])

    def answers(self) -> DataFrame:
        """A row an answer of the untouched and of the edited model: arm, question, tokens, ended, right."""
        import pandas as pd

        before, after = self._compared()
        names = {"question": "question", "length": "tokens", "ended": "ended", "right": "right"}
        tables = [
            pd.DataFrame({named: cell.answers[name] for name, named in names.items() if name in cell.answers}).assign(
                arm=arm
            )
            for arm, cell in (("untouched", before), ("edited", after["edit"]))
        ]
        return pd.concat(tables, ignore_index=True)

    def _compared(self) -> tuple[Cell, dict[str, Cell]]:
        """The untouched model's cell, and of each arm the one at the recipe's strength."""
        cells = self.sweeps["strengths"].cells
        before = next(cell for cell in cells if cell.strength == 0)
        return before, {cell.line.arm: cell for cell in cells if cell.strength == self.recipe.strength}

    def plot(self, ax: Axes | None = None, *, panel: str = "strengths", measure: str = "length") -> Axes:
        """One measure along one panel, the controls as bands."""
        from analyses import figures

        return figures.edit_sweep(self.frame(), ax, panel=panel, measure=measure)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, found in self.sweeps.items():
            found.save(folder / f"{name}.json")
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Judged:
        folder = Path(folder)
        recipe = Recipe(**json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        there = [name for name in PANELS if (folder / f"{name}.json").is_file()]
        return cls({name: Sweep.load(folder / f"{name}.json") for name in there}, recipe)


def judge(
    model: Model,
    found: Found,
    questions: Sequence[Question],
    *,
    strengths: Sequence[float] = STRENGTHS,
    shares: Sequence[float] = SHARES,
    controls: int = 3,
    steering: Sequence[float] = (),
    layerwise: Sequence[float] = (),
    seed: int = 0,
    to: str | Path | None = None,
    **options: Any,
) -> Judged:
    """The edit at other strengths and shares, with random heads and random directions, on questions of its own.

    strengths, shares: beside the recipe's own; without other shares there is no such panel. controls: how many of each kind; 0 for none.
    steering, layerwise: multiples of the raw direction to add at all layers together, and at each alone; empty leaves the panel out.
    to: a folder in which finished cells are kept, so that it can be interrupted. options: as in `sweep` (samples, max_new_tokens ...).
    """
    recipe, anatomy = found.recipe, model.anatomy
    if recipe.strength == 0:
        raise ValueError(
            "An edit of strength 0 does nothing, and there is nothing to judge: give a strength above 0, up to 2."
        )
    options = {"seed": seed, "length": recipe.span, "questions": list(questions), **options}

    def arms(share: float, suffix: str = "") -> dict[str, Editing]:
        heads, edit = found.heads(share), found.edit()
        made = {f"edit{suffix}": Editing(edit, tuple(heads))}
        for draw in range(controls):
            other = replace(found, direction=found.direction.random(seed + draw))
            made[f"random heads {draw}{suffix}"] = Editing(edit, tuple(random_heads(heads, anatomy, seed=seed + draw)))
            made[f"random directions {draw}{suffix}"] = Editing(other.edit(), tuple(heads))
        return made

    def run(panel: str, change: Any, at: Iterable[float], **more: Any) -> Sweep:
        kept = None if to is None else Path(to) / panel
        return sweep(model, change, sorted(set(at)), to=kept, **{"controls": 0, **options, **more})

    sweeps = {"strengths": run("strengths", arms(recipe.share), {*strengths, recipe.strength})}
    if others := sorted({*shares} - {recipe.share}):
        made = {name: arm for share in others for name, arm in arms(share, f"{_AT}{share:g}").items()}
        other = run("shares", made, [recipe.strength])
        here = [cell for cell in sweeps["strengths"].cells if cell.strength == recipe.strength]  # measured already
        same = (replace(cell, line=Line(f"{cell.line.arm}{_AT}{recipe.share:g}")) for cell in here)
        sweeps["shares"] = replace(other, cells=(*other.cells, *same))
    push = Steering(found.direction, over=recipe.span, units="raw")
    if steering:
        sweeps["steering"] = run("steering", push, steering, controls=controls)
    if layerwise:
        there = sorted({site.layer for site in found.direction if site.layer is not None})
        sweeps["layers"] = run("layers", push, layerwise, layers=there, controls=controls)
    return Judged(sweeps, recipe)


def _panel(name: str, table: Any) -> DataFrame:
    """A sweep's table with its axis in a column x, and the numbers of random draws out of the arms' names."""
    table = table.assign(panel=name, x=table["strength"])
    if name == "shares":
        share = table["arm"].str.rpartition(_AT)
        table = table.assign(arm=share[0], x=share[2].astype(float).where(table["strength"] != 0, 0.0))
        # the untouched model is in every arm of the sweep, and once on the axis
        table = table.drop_duplicates(["arm", "x", "measure"])
    if name == "layers":
        layer = table["layers"].astype(float)
        table = table.assign(arm=table["strength"].map("{:+g}".format), x=layer)
    named = table["arm"].str.extract(r"^(random \w+) (\d+)$")
    arm, draw = named[0].fillna(table["arm"]), table["draw"].fillna(named[1].astype("Int64"))
    if name == "steering":
        arm = arm.where(draw.isna(), "random directions")
    if name == "layers":
        arm = arm.where(draw.isna(), "random directions, " + arm)
    table = table.assign(arm=arm, draw=draw)
    if name == "layers":  # whatever stands in for it, the untouched model is one line
        table = table[draw.isna() | (table["strength"] != 0)]
    return table[["panel", "x", "arm", "draw", "measure", "value", "low", "high", "n", "missing"]]


def _effect(measure: str, before: Cell, after: Mapping[str, Cell], until: float, seed: int) -> dict[str, Any] | None:
    """A row of `Judged.effects`; None where the measure was not taken."""
    taken = {"length": "length" in before.answers, "accuracy": bool(_right(before))}
    if not (taken[measure] if measure in taken else len(_nats(measure, before)[0])):
        return None
    nothing = no_interval(math.nan, 0, "no answer has it")
    change = _difference(measure, before, after["edit"], until, seed) or nothing
    start = _value(measure, before, until)
    row: dict[str, Any] = {
        "measure": measure,
        "before": start,
        "after": start + change.value,
        "difference": change.value,
    }
    row |= {"low": change.low, "high": change.high, "n": change.n}
    for kind in ("heads", "directions"):
        drawn = [
            _difference(measure, before, c, until, seed)
            for arm, c in after.items()
            if arm.startswith(f"random {kind} ")
        ]
        values = [d.value for d in drawn if d is not None]
        extreme = 1 + sum(abs(v) >= abs(change.value) for v in values)
        row |= {f"{kind}_low": min(values, default=math.nan), f"{kind}_high": max(values, default=math.nan)}
        row[f"{kind}_p"] = extreme / (1 + len(values)) if values and not math.isnan(change.value) else math.nan
    return row


def _value(measure: str, cell: Cell, until: float) -> float:
    if measure == "length":
        _, lengths, ended = _lengths(cell)
        return restricted_mean(lengths, ended, until=until, draws=1).value if _reaches(cell, until) else math.nan
    if measure == "accuracy":
        return float(np.mean(list(_right(cell).values())))
    sums, tokens = _nats(measure, cell)
    return float(sums.sum() / tokens.sum())


def _difference(measure: str, before: Cell, after: Cell, until: float, seed: int) -> Estimate | None:
    """How a measure changed, question by question (of general text, passage by passage); None where it was not taken."""
    if measure == "length":
        if not (_reaches(before, until) and _reaches(after, until)):
            return None
        (asked, *base), (answered, *edited) = _lengths(before), _lengths(after)
        return restricted_difference(
            (base[0], base[1]), (edited[0], edited[1]), until=until, clusters=(asked, answered), seed=seed
        )
    if measure == "accuracy":
        base, edited = _right(before), _right(after)
        shared = sorted(base.keys() & edited.keys())
        return share_difference([base[k] for k in shared], [edited[k] for k in shared], seed=seed) if shared else None
    (base, tokens), (edited, _) = _nats(measure, before), _nats(measure, after)
    if not (len(base) and len(edited)):
        return None
    apart = edited - base
    drawn = resampled_means(apart, tokens, 2000, seed)
    return percentile(float(apart.sum() / tokens.sum()), drawn, n=len(tokens), seed=seed)


def _reaches(cell: Cell, until: float) -> bool:
    """Whether there are lengths, followed as far as means of them are restricted to."""
    if not any(n is not None for n in cell.answers.get("length", ())):
        return False
    _, lengths, ended = _lengths(cell)
    return followed(lengths, ended) >= until


def _lengths(cell: Cell) -> tuple[list[int], list[int], list[bool]]:
    """Question, length and whether it ended, of the answers that have the span."""
    columns = (cell.answers[name] for name in ("question", "length", "ended"))
    kept = [row for row in zip(*columns, strict=True) if row[1] is not None]
    return [q for q, _, _ in kept], [n for _, n, _ in kept], [e for _, _, e in kept]


def _right(cell: Cell) -> dict[int, float]:
    """Of each question the share of right answers; a missing one is not right."""
    of: dict[int, list[bool]] = {}
    for question, right in zip(cell.answers["question"], cell.answers.get("right", ()), strict=False):
        of.setdefault(question, []).append(right is True)
    return {question: sum(rights) / len(rights) for question, rights in of.items()}


def _nats(measure: str, cell: Cell) -> tuple[Float[np.ndarray, " passage"], Float[np.ndarray, " passage"]]:
    """Of each passage of general text the sum over its tokens, and their number; nothing where it was not taken."""
    column = {"text_nll": "nats", "kl": "kl"}[measure]
    sums = np.array(cell.passages.get(column, ()), dtype=float)
    return sums, np.array(cell.passages["tokens"] if len(sums) else (), dtype=float)


# --- the whole ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ThinkEdit:
    """What was found, what it does, and on which answers: see `thinkedit`.

    parts: how many questions were for the direction, the heads and judging.
    """

    found: Found
    judged: Judged
    runs: Runs
    parts: tuple[int, int, int]

    def edited(self, weights: Weights) -> Weights:
        """The weights with the edit. Nothing happens until they are written or installed."""
        return self.found.edited(weights)

    def frame(self) -> DataFrame:
        """The headline: see `Judged.effects`."""
        return self.judged.effects()

    def lengths(self) -> DataFrame:
        """A row an answer that direction and heads were found on: arm, question, tokens, ended."""
        import pandas as pd

        lengths = span_lengths(self.runs, self.found.recipe.span)
        rows = [
            {"arm": "untouched", "question": t.question, "tokens": n and n.tokens, "ended": n and not n.censored}
            for t, n in zip(self.runs, lengths, strict=True)
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Length against strength, beside the controls."""
        return self.judged.plot(ax)

    def save(self, folder: str | Path) -> None:
        """Everything, in a folder that `load` reads without the model."""
        folder = Path(folder)
        self.found.save(folder / "found")
        self.judged.save(folder / "judged")
        self.runs.save(folder / "runs.jsonl")
        (folder / "parts.json").write_text(json.dumps(self.parts) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ThinkEdit:
        """What `save` wrote."""
        folder = Path(folder)
        parts = tuple(json.loads((folder / "parts.json").read_text(encoding="utf-8")))
        return cls(
            Found.load(folder / "found"), Judged.load(folder / "judged"), Runs.load(folder / "runs.jsonl"), parts
        )

    def _repr_html_(self) -> str:
        return self.frame().to_html(index=False, float_format="%.4g")


def thinkedit(
    model: Model,
    questions: Sequence[Question],
    recipe: Recipe = Recipe(),
    *,
    samples: int = 4,
    judged_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    to: str | Path | None = None,
    progress: bool = False,
    **panels: Any,
) -> ThinkEdit:
    """Generate, find the length direction and the heads that write its brief side, and judge the edit: each on questions of its own.

    questions: dealt 2 : 1 : 2 to direction, heads and judging (`split`).
    samples:   answers a question of the first two parts; judged_samples: of the third.
    temperature, max_new_tokens: of all answers. An answer that reaches the cap counts as longer than was seen.
    to:        a folder in which answers and finished measurements are kept, so that the same call goes on where it stopped; those to other
               questions, of another model or with other settings of the generation are kept beside them.
    panels:    as in `judge`: strengths, shares, controls, steering, layerwise, texts ...

    Raises ValueError as `split`, `find` and `judge` do; FileExistsError where `to` holds measurements of these answers with another recipe.
    """
    parts = split(questions, seed=seed)
    asked = [q.question for q in (*parts[0], *parts[1])]
    about = {
        "questions": len(asked),
        "samples": samples,
        "temperature": temperature,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    generation: dict[str, Any] = {
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "progress": progress,
    }
    identity = fingerprint(model)
    own = None if to is None else Path(to) / digest([identity, about, parts])[:16]
    if own is not None and (own / "runs.jsonl").is_file():
        runs = Runs.load(own / "runs.jsonl")
    else:
        runs = Runs(tuple(model.generate(asked, samples=samples, seed=seed, **generation)), identity, about)
        if own is not None:
            runs.save(own / "runs.jsonl")
    found = find(
        model,
        runs.of(q.question for q in parts[0]),
        runs.of(q.question for q in parts[1]),
        recipe,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    # other noise than in the answers above
    judged = judge(model, found, parts[2], seed=seed + 1, samples=judged_samples, to=own, **generation, **panels)
    return ThinkEdit(found, judged, runs, (len(parts[0]), len(parts[1]), len(parts[2])))
