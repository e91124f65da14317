"""Does what a probe learned in one place hold in another: other data, or another time of the thinking?

found = transfer(model, {"sums": (sums, sums_right), "gsm8k": (gsm8k, gsm8k_right)}, at="14.resid", over="answer")
found.matrix()                                  # trained x tested; off the diagonal is what a claim rests on
along(model, runs, right, at="14.resid")        # is it known before the thinking, and when?

All sets share one dealing of the questions into folds, and every cell is cross-fitted over it: a question is never on both sides, also where
two sets ask it, and a probe has learned from as many rows off the diagonal as on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.activations import Activations
from probes.directions import Labels, per_row, span_lengths
from probes.fitting import Crossed, Settings, crossed, length_bins, of_length
from probes.held_out import auc, auc_score, deal, require_two_a_fold, shuffled, units
from probes.linear import EMBEDDING, gathered, labelled, require_folds, require_one_span, rows_at
from probes.results import reading
from surgery.model import Model
from surgery.sites import Patterns, Site
from surgery.transcript import Transcript, nobody_has
from surgery.whole import write_whole

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"  # the training set that is all sets together
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TransferRow:
    """A probe trained in one set, judged on held-out questions of a set.

    trained, tested: the sets; ``trained`` may be ``all`` of them. site: chosen in most folds, inside the training rows.
    value, low, high, n: AUC, 0.5 is chance, with its 95 % interval over the `n` questions of ``tested``, widened as that of any cross-fitted
                 number, see `probes.held_out.auc_score`. It is of the probe that was learned: from few rows this leans somewhere by
                 chance, and where nothing is shared the interval then misses 0.5 more often than one time in twenty. rows: of ``tested``.
    learned:     rows of ``trained``, of which each fold's probe saw those of other folds.
    same_length, same_length_low, same_length_high: the AUC among rows of about equal length.
    shuffled, shuffled_least, shuffled_most: AUC where labels are shuffled in both sets: mean, and range over the shuffles.
    untrained, embedding, length: AUC in a model with random weights, at ``0.resid``, and of the length alone. NaN where there was none.
    """

    trained: str
    tested: str
    site: str
    value: float
    low: float
    high: float
    n: int
    rows: int
    learned: int
    same_length: float
    same_length_low: float
    same_length_high: float
    shuffled: float
    shuffled_least: float
    shuffled_most: float
    untrained: float
    embedding: float
    length: float


@dataclass(frozen=True)
class TransferTable:
    """What `transfer` or `along` found; reloads without a model. rows: one a pair of sets. about: folds, seed, draws and the like."""

    rows: tuple[TransferRow, ...]
    about: Mapping[str, Any]

    def frame(self) -> pd.DataFrame:
        """One row a pair, with the columns of `TransferRow`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def matrix(self, column: str = "value") -> pd.DataFrame:
        """A column of the table, trained down, tested across."""
        frame = self.frame()
        sides = [list(dict.fromkeys(frame[side])) for side in ("trained", "tested")]
        return frame.pivot(index="trained", columns="tested", values=column).reindex(index=sides[0], columns=sides[1])

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TransferTable:
        """What `save` wrote. Raises ValueError for a file of something else."""
        with reading(path, cls) as found:
            return cls(tuple(TransferRow(**row) for row in found["rows"]), found["about"])

    def __repr__(self) -> str:
        said = []
        for name, mine in (("on itself", True), ("elsewhere", False)):
            values = [row.value for row in self.rows if (row.trained == row.tested) == mine]
            said += [f"{name} {min(values):.2f} to {max(values):.2f}"] if values else []
        return f"<TransferTable: {len(self.rows)} pairs, AUC {', '.join(said)}>"

    def _repr_html_(self) -> str:
        return self.matrix().to_html(float_format="%.3f")


def transfer(
    model: Model,
    sets: Mapping[str, tuple[Sequence[Transcript], Sequence[Any] | np.ndarray]],
    *,
    at: Patterns = "*.resid",
    over: str = "thinking",
    components: int | None = None,
    folds: int = 5,
    shuffles: int = 3,
    draws: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> TransferTable:
    """Train a probe in each set, judge it in each: the matrix of held-out AUCs, the diagonal cross-validated.

    sets: name -> (transcripts, a label of 1, 0 or None for each). Rows stand for transcripts, averaged over the span; questions are groups.
    at:   of several sites each fold of each training set chooses its own, by validation inside it.

    Other arguments and errors as `probes.linear.probe`; ValueError also for fewer than two sets, and a set with one class only.
    """
    require_one_span(over)
    Settings("classes", components, shuffles, draws, seed)  # raises before any pass
    texts = [text for runs, _ in sets.values() for text in runs]
    for name, (runs, given) in sets.items():
        if len(runs) != len(given):
            raise ValueError(f"{name}: {len(runs)} transcripts, {len(given)} labels: give one label a transcript.")
    _require_several(list(sets))
    for name, (runs, given) in sets.items():
        try:
            require_folds(runs, given, over=(over,), folds=folds)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    labels = [label for _, given in sets.values() for label in given]
    named = [name for name, (runs, _) in sets.items() for _ in runs]
    found = gathered(
        model, texts, labels, None, at=at, over=(over,), seed=seed, batch_size=batch_size, progress=progress
    )
    return transfer_rows(
        found.acts,
        found.labels,
        found.groups,
        [named[i] for i in found.index],
        lengths=found.lengths,
        twin=found.twin,
        components=components,
        folds=folds,
        shuffles=shuffles,
        draws=draws,
        seed=seed,
        among=found.asked,
    )


def along(
    model: Model,
    transcripts: Sequence[Transcript],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    at: Patterns = "*.resid",
    over: str = "thinking",
    fractions: Sequence[float] = FRACTIONS,
    components: int | None = None,
    folds: int = 5,
    shuffles: int = 3,
    draws: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> TransferTable:
    """What is known after each fraction of a span: a probe for each place, and one shared by all (``trained`` is ``all``), judged at each.

    over:      a span of a transcript, ``thinking`` or ``answer``. What has none, or one that was cut off, is left out: a part of it is the
               part of nothing known.
    fractions: in [0, 1]. At f the last of the first f of the span's tokens (to the nearest whole one) is read, by itself; where that is none of
               them, as at 0, the token before the span.

    A place is known only when all is said, so that it gives away the length of the whole: beside each number stands what that length alone
    gives, and the AUC among spans of about equal length. Other arguments and errors as `probes.linear.probe`; labels are of two classes.
    """
    require_one_span(over)
    Settings("classes", components, shuffles, draws, seed)  # raises before any pass
    if len(labels) != len(transcripts):
        raise ValueError(f"{len(transcripts)} transcripts, {len(labels)} labels: give one label a transcript.")
    places = tuple(dict.fromkeys(float(f) for f in fractions))
    if not places or not all(0 <= f <= 1 for f in places):
        raise ValueError(f"Fractions of {over} lie in [0, 1], and there is at least one; these are {list(fractions)}.")
    lengths = span_lengths(transcripts, over)
    if not any(length is not None for length in lengths):
        raise ValueError(nobody_has(transcripts, over))
    whole = [i for i, length in enumerate(lengths) if length is not None and length.tokens and not length.censored]
    if not whole:
        raise ValueError(f"No {over} of {len(transcripts)} transcripts is there to its end: give a higher cap.")
    texts = [_marked(transcripts[i], over, places) for i in whole]
    known = [labels[i] for i in whole]
    named = None if groups is None else [groups[i] for i in whole]
    require_folds(texts, known, named, over=(over,), folds=folds)
    found = gathered(
        model,
        texts,
        known,
        named,
        at=at,
        over=[_mark(j) for j in range(len(places))],
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    spans = [texts[i].spans[over] for i in found.index]
    return transfer_rows(
        found.acts,
        found.labels,
        found.groups,
        [f"{places[k]:g}" for k in found.acts.span.tolist()],
        lengths=[end - begin for begin, end in spans],
        twin=found.twin,
        shared=True,
        components=components,
        folds=folds,
        shuffles=shuffles,
        draws=draws,
        seed=seed,
        among=found.asked,
    )


def _mark(number: int) -> str:
    return f"place-{number}"


def _marked(transcript: Transcript, over: str, places: Sequence[float]) -> Transcript:
    """With a span of one token at each place."""
    begin, end = transcript.spans[over]
    last = [begin + round(f * (end - begin)) - 1 for f in places]
    return replace(
        transcript, spans={**transcript.spans} | {_mark(j): (i, i + 1) for j, i in enumerate(last) if i >= 0}
    )


def transfer_rows(
    acts: Activations,
    labels: Labels,
    groups: Labels,
    sets: Labels,
    *,
    lengths: Labels | None = None,
    twin: Activations | None = None,
    shared: bool = False,
    components: int | None = None,
    folds: int = 5,
    shuffles: int = 3,
    draws: int = 1000,
    seed: int = 0,
    among: Iterable[Site] | None = None,
) -> TransferTable:
    """`transfer` on activations already collected; labels, groups, sets, lengths: one a row, or a transcript.

    Groups of one name are one group, whatever set they are in. shared: train also in all sets together. Other arguments as of
    `probes.linear.probe_rows`.
    """
    kept, y = labelled(per_row(acts, labels, "labels"), "classes", ", ".join(acts.over))
    named, whose = per_row(acts, sets, "sets"), per_row(acts, groups, "groups")
    names = [str(name) for name in dict.fromkeys(named[i] for i in kept)]
    part = np.array([names.index(str(named[i])) for i in kept])
    g = units([whose[i] for i in kept])
    _require_several(names)
    if shared and ALL in names:
        raise ValueError(f"A set is called {ALL!r}, as all of them together are: give it another name.")
    for k, name in enumerate(names):
        mine = part == k
        if y[mine].min() == y[mine].max():
            raise ValueError(f"All {mine.sum()} rows of {name} have the same label: a probe needs rows that differ.")
        require_two_a_fold(g[mine], folds, f"questions of {name}")
    tokens = None if lengths is None else np.asarray(per_row(acts, lengths, "lengths"), dtype=float)[kept]
    wanted = list(acts.values if among is None else among)
    values = {site: rows_at(acts, site, kept) for site in wanted}
    others: dict[str, Mapping[Site, np.ndarray]] = {}
    if twin is not None:
        others["untrained"] = {site: rows_at(twin, site, kept) for site in wanted}
    if EMBEDDING in acts.values:
        others["embedding"] = {EMBEDDING: rows_at(acts, EMBEDDING, kept)}
    fold = deal(g, 2 * part + y, folds=folds, seed=seed)  # like labels of each set go to all folds
    settings = Settings("classes", components, shuffles, draws, seed)
    nulls = []
    for i in range(shuffles):
        null = y.copy()
        for k in range(len(names)):
            null[part == k] = shuffled(y[part == k], g[part == k], seed=seed + 1 + i)
        nulls.append(null)
    rows: list[TransferRow] = []
    for trained in [*names, *([ALL] if shared else [])]:
        learn = part == names.index(trained) if trained != ALL or not shared else np.ones(len(y), dtype=bool)
        real = crossed(values, y, g, fold, settings, learn=learn)
        controls = {name: crossed(X, y, g, fold, settings, learn=learn) for name, X in others.items()}
        if tokens is not None:
            plain = replace(settings, components=None)
            controls["length"] = crossed({EMBEDDING: of_length(tokens)}, y, g, fold, plain, learn=learn)
        without = [crossed(values, null, g, fold, settings, learn=learn, chosen=real.chosen) for null in nulls]
        for k, tested in enumerate(names):
            cell = _Cell(part == k, y, g, fold, tokens, settings)
            beside = {name: cell.auc(other) for name, other in controls.items()}
            strayed = [replace(cell, y=null).auc(found) for null, found in zip(nulls, without, strict=True)] or [
                math.nan
            ]
            beside |= {
                "shuffled": sum(strayed) / len(strayed),
                "shuffled_least": min(strayed),
                "shuffled_most": max(strayed),
            }
            rows.append(cell.row(trained, tested, real, int(learn.sum()), beside))
    about = {
        "over": list(acts.over),
        "components": components,
        "folds": folds,
        "shuffles": shuffles,
        "draws": draws,
        "seed": seed,
    }
    return TransferTable(tuple(rows), about)


def _require_several(sets: Sequence[str]) -> None:
    if len(sets) < 2:
        raise ValueError(
            f"A transfer is between sets, and there is {f'{sets[0]} only' if sets else 'none'}: give two or more."
        )


@dataclass(frozen=True, eq=False)
class _Cell:
    """The rows that a probe is judged on."""

    mine: Bool[np.ndarray, " row"]
    y: Bool[np.ndarray, " row"]
    g: Int[np.ndarray, " row"]
    fold: Int[np.ndarray, " row"]
    tokens: Float[np.ndarray, " row"] | None
    settings: Settings

    def auc(self, found: Crossed) -> float:
        return auc(found.predicted[self.mine], self.y[self.mine], self.fold[self.mine])

    def row(self, trained: str, tested: str, found: Crossed, learned: int, beside: Mapping[str, float]) -> TransferRow:
        mine, fold = self.mine, self.fold[self.mine]
        given = found.predicted[mine], self.y[mine], self.g[mine]
        options: dict[str, Any] = {
            "folds": int(self.fold.max()) + 1,
            "draws": self.settings.draws,
            "seed": self.settings.seed,
        }
        score = auc_score(*given, fold, what="held-out AUC", **options)
        ends = [math.nan] * 3
        if self.tokens is not None:
            bins = length_bins(self.tokens[mine])
            same = auc_score(*given, fold * (bins.max() + 1) + bins, **options)
            ends = [same.value, same.low, same.high]
        return TransferRow(
            trained=trained,
            tested=tested,
            site=str(found.site),
            value=score.value,
            low=score.low,
            high=score.high,
            n=score.n,
            rows=int(mine.sum()),
            learned=learned,
            same_length=ends[0],
            same_length_low=ends[1],
            same_length_high=ends[2],
            shuffled=beside["shuffled"],
            shuffled_least=beside["shuffled_least"],
            shuffled_most=beside["shuffled_most"],
            untrained=beside.get("untrained", math.nan),
            embedding=beside.get("embedding", math.nan),
            length=beside.get("length", math.nan),
        )
