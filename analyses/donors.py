"""Donors of reasoning vectors: what reinforcement changed in a fine-tuned model, and what that change does in a sibling.

    pair  = train_pair(base, demonstrations, questions, reward, start="sequential")
    found = transfer(sibling, pair.vector, questions=held_out, others=pair.others, start=pair.start)
    found.frame(), found.rank, found.trend(), found.plot()      # a row an arm and alpha; among random vectors; along alpha

Source: Zbeeb et al., "Reasoning Vectors: Transferring Chain-of-Thought Capabilities via Task Arithmetic", arXiv 2509.01363: the vector
    is ``theta_RL - theta_SFT``. Differs: what the RL run began from is recorded, as the vector means another thing in either case; and the
    vector is judged beside random and permuted ones of the same size, and beside the plain fine-tuning vector.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analyses.dose import Cell, Sweep, sweep
from analyses.general_text import GENERAL_TEXT
from analyses.statistics import Significance, holm, mcnemar, page, share_difference, wilson
from analyses.tasks import Question
from finetune.grpo import Reinforced, grpo
from finetune.rewards import Reward
from finetune.tune import Tuned, tune
from probes.estimates import Estimate
from surgery.delta import save_delta
from surgery.drawn import Noise, Permuted
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.seeds import seed_from_numbers
from surgery.transcript import Transcript
from surgery.weights import Delta
from surgery.whole import new_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Start = Literal["sequential", "independent"]
VECTOR, PERMUTED = "vector", "permuted"
_ALPHAS = (-1.0, -0.5, 0.5, 1.0, 1.5)
_FILES = ("arms", "random", "prompted")


# --- the pair -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pair:
    """A donor pair, three live models.

    start:      what the reinforced model began from: "sequential" the supervised one, "independent" the base.
    base, supervised, reinforced: the models. tuned, rounds: what the two runs did.
    """

    start: Start
    base: Model
    supervised: Model
    reinforced: Model
    tuned: Tuned
    rounds: Reinforced

    @property
    def vector(self) -> Delta:
        """The reasoning vector ``reinforced - supervised``."""
        return self.reinforced.weights - self.supervised.weights

    @property
    def others(self) -> dict[str, Delta]:
        """The vectors it is compared with: what fine-tuning alone changed, and what both, or reinforcement alone, changed."""
        return {
            "supervised - base": self.supervised.weights - self.base.weights,
            "reinforced - base": self.reinforced.weights - self.base.weights,
        }

    def geometry(self, target: Model | None = None) -> DataFrame:
        """A row a site: norm of the vector, the same over the norm of the target's weights, cosine with ``supervised - base``.

        target: the model the vector is for, by default the base. Columns: site, norm, relative (NaN where the target has no such site, or only
        zeros there), cosine (NaN where either vector is zero).
        """
        import pandas as pd

        point, vector, plain = (target or self.base).weights, self.vector, self.others["supervised - base"]
        norms, angles = vector.norms(), vector.cosines(plain)
        sizes = {site: float(point[site].float().norm()) if site in point else 0.0 for site in norms}
        rows = [
            {
                "site": str(site),
                "norm": norm,
                "relative": norm / sizes[site] if sizes[site] else math.nan,
                "cosine": angles.get(site, math.nan),
            }
            for site, norm in norms.items()
        ]
        return pd.DataFrame(rows)

    def save(self, to: str | Path) -> Path:
        """Write the vector and ``supervised - base`` as delta folders, and how they came about, to a new folder, whole or not at all."""
        said = {
            "start": self.start,
            "tuned": asdict(self.tuned),
            "rounds": asdict(self.rounds),
            "hashes": {name: fingerprint(getattr(self, name)) for name in ("base", "supervised", "reinforced")},
        }
        with new_folder(Path(to)) as partial:
            save_delta(self.vector, partial / VECTOR, base_hash=said["hashes"]["supervised"])
            save_delta(self.others["supervised - base"], partial / "supervised", base_hash=said["hashes"]["base"])
            (partial / "pair.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        return Path(to)


def train_pair(
    base: Model,
    demonstrations: Sequence[Transcript],
    questions: Sequence[Any],
    reward: Reward,
    *,
    start: Start = "sequential",
    supervise: Mapping[str, Any] | None = None,
    reinforce: Mapping[str, Any] | None = None,
) -> Pair:
    """Fine-tune a copy of a model on demonstrations, and reinforce a copy of that ("sequential") or of the base ("independent").

    supervise, reinforce: options of `tune` and of `grpo`. The base itself is not touched.
    Raises ValueError for another start, and as `tune` and `grpo` do.
    """
    if start not in ("sequential", "independent"):
        raise ValueError(
            f"There is no start {start!r}. Choose sequential (from the supervised model) or independent (from the base)."
        )
    supervised = _copy(base)
    tuned = tune(supervised, demonstrations, **(supervise or {}))
    reinforced = _copy(supervised if start == "sequential" else base)
    rounds = grpo(reinforced, questions, reward, **(reinforce or {}))
    return Pair(start, base, supervised, reinforced, tuned, rounds)


def _copy(model: Model) -> Model:
    return Model(copy.deepcopy(model.module), model.tokenizer, model.checkpoint, model.markers)


# --- the transfer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """What a reasoning vector, its controls and a prompt did in a sibling.

    start:    see `Pair`; None where it is not known.
    arms:     the vector, permuted, and the other vectors, at every alpha; the untouched sibling at 0.
    random:   random vectors of the same norm in every tensor, at alpha 1.
    prompted: the sibling, and the sibling with the vector at alpha 1, asked with the prompt; None where there was none.
    prompt:   its words. seed: of the controls.
    """

    start: Start | None
    arms: Sweep
    random: Sweep
    prompted: Sweep | None
    prompt: str | None
    seed: int

    def frame(self) -> DataFrame:
        """A row an arm and alpha, on the same questions.

        Columns: arm, alpha, draw (which random vector), accuracy with low and high (a missing answer is not right), n, missing; difference
        from the untouched sibling with difference_low and difference_high (Tango's interval of pairs); p (McNemar's, exact) and, for
        the arms at alpha 1 and the prompts, holm (adjusted for these, random vectors not among them); kl from the untouched sibling on
        general text and text_nll, in nats a token.
        """
        import pandas as pd

        rows = [row for kind, found in self._sweeps for row in self._rows(kind, found)]
        family = [i for i, row in enumerate(rows) if row["holm"] is None]
        for i, adjusted in zip(family, holm([rows[i]["p"] for i in family]) if family else (), strict=True):
            rows[i]["holm"] = float(adjusted)
        return pd.DataFrame(rows).astype({"draw": "Int64"})

    @property
    def rank(self) -> float:
        """One-sided p-value of the vector's accuracy at alpha 1 among the random vectors': ``(1 + as good or better) / (1 + draws)``."""
        own = next(cell for cell in self.arms.cells if cell.line.arm == VECTOR and cell.strength == 1.0)
        drawn = [_right(cell).mean() for cell in self.random.cells if cell.strength]
        return (1 + sum(other >= _right(own).mean() for other in drawn)) / (1 + len(drawn))

    def trend(self, arm: str = VECTOR) -> Significance:
        """Whether accuracy rises (z above 0) with alpha, question by question, the untouched sibling at 0 among the levels; a missing
        answer is not right. Raises ValueError for an arm that is not there."""
        levels = sorted((c for c in self.arms.cells if c.line.arm == arm or not c.strength), key=lambda c: c.strength)
        if len(levels) < 2:
            raise ValueError(f"There is no arm {arm!r}: there are {', '.join({c.line.arm for c in self.arms.cells})}.")
        return page(np.stack([_right(cell) for cell in levels], axis=1))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy against alpha, an arm a line with its interval; the random vectors as grey marks at alpha 1."""
        return figure(self.frame(), ax)

    def save(self, to: str | Path) -> Path:
        """Write everything to a new folder."""
        with new_folder(Path(to)) as partial:
            for name in _FILES:
                if (found := getattr(self, name)) is not None:
                    found.save(partial / f"{name}.json")
            said = {"start": self.start, "prompt": self.prompt, "seed": self.seed}
            write_whole(partial / "transfer.json", json.dumps(said) + "\n")
        return Path(to)

    @classmethod
    def load(cls, path: str | Path) -> Transfer:
        """What `save` wrote."""
        folder = Path(path)
        said = json.loads((folder / "transfer.json").read_text(encoding="utf-8"))
        files = {name: folder / f"{name}.json" for name in _FILES}
        parts: dict[str, Any] = {name: Sweep.load(file) if file.is_file() else None for name, file in files.items()}
        return cls(**said, **parts)

    def _repr_html_(self) -> str:
        return self.frame().to_html(max_rows=24, float_format="%.4g")

    @cached_property
    def _untouched(self) -> Cell:
        return next(cell for cell in self.arms.cells if cell.strength == 0)

    @property
    def _sweeps(self) -> list[tuple[str, Sweep]]:
        return [("", self.arms), ("random", self.random)] + ([("prompt", self.prompted)] if self.prompted else [])

    def _rows(self, kind: str, found: Sweep) -> list[dict[str, Any]]:
        return [self._row(kind, cell) for cell in found.cells if cell.strength or kind != "random"]

    def _row(self, kind: str, cell: Cell) -> dict[str, Any]:
        right, before = _right(cell), _right(self._untouched)
        share, change = wilson(int(right.sum()), len(right)), share_difference(before, right)
        if cell is self._untouched:
            change = Estimate(0.0, 0.0, 0.0, change.n, None, "by definition")
        tokens = sum(cell.passages["tokens"])
        tested = cell is not self._untouched and kind != "random" and (kind == "prompt" or cell.strength == 1.0)
        return {
            "arm": (f"{VECTOR} + prompt" if cell.strength else kind) if kind == "prompt" else kind or cell.line.arm,
            "alpha": cell.strength,
            "draw": int(cell.line.arm.removeprefix("random ")) if kind == "random" else None,
            "accuracy": share.value,
            "low": share.low,
            "high": share.high,
            "n": share.n,
            "missing": cell.answers["right"].count(None),
            "difference": change.value,
            "difference_low": change.low,
            "difference_high": change.high,
            "p": mcnemar(before, right),
            "holm": None if tested else math.nan,
            **{name: sum(cell.passages[column]) / tokens for name, column in (("kl", "kl"), ("text_nll", "nats"))},
        }


def transfer(
    sibling: Model,
    vector: Delta,
    alphas: Sequence[float] = _ALPHAS,
    *,
    questions: Sequence[Question],
    others: Mapping[str, Delta] | None = None,
    start: Start | None = None,
    prompt: str | None = "Think step by step.",
    draws: int = 20,
    texts: Sequence[str] = GENERAL_TEXT[:16],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Transfer:
    """Add a reasoning vector to a sibling at several strengths, and judge it beside its controls; greedy answers, the model unchanged.

    alphas:    strengths, finite; 1 is added, as the controls are compared there.
    others:    further vectors by name, at the same alphas. The vector's entries in another order are always among the arms ("permuted").
    prompt:    words put after each question, for the prompt alone and together with the vector; None leaves that out.
    draws:     random vectors of equal norm in every tensor, 1 or more, at alpha 1.
    texts:     general text that shows what the change costs. seed: of the controls.
    Raises ValueError for an other vector called "vector" or "permuted", no draws, and as `sweep`.
    """
    named = dict(others or {})
    if taken := {VECTOR, PERMUTED} & named.keys():
        raise ValueError(f"The name {min(taken)!r} is taken: call the other vector something else.")
    if draws < 1:
        raise ValueError(f"draws={draws}: a vector means something beside 1 random vector or more.")
    shared: dict[str, Any] = {
        "controls": 0, "measures": ("accuracy", "kl", "text_nll"), "texts": texts, "max_new_tokens": max_new_tokens,
        "batch_size": batch_size, "seed": seed, "progress": progress,
    }  # fmt: skip
    arms = sweep(
        sibling,
        {VECTOR: vector, PERMUTED: Permuted(vector, seed), **named},
        sorted({*map(float, alphas), 1.0}),
        questions=questions,
        **shared,
    )
    drawn = {f"random {draw}": Noise(vector, seed_from_numbers(seed, draw)) for draw in range(draws)}
    random = sweep(sibling, drawn, [1.0], questions=questions, **shared)
    prompted = None
    if prompt is not None:
        asked = [replace(q, question=f"{q.question}\n{prompt}") for q in questions]
        prompted = sweep(sibling, {VECTOR: vector}, [1.0], questions=asked, **shared)
    return Transfer(start, arms, random, prompted, prompt, seed)


def figure(table: DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy against alpha from the table of `Transfer.frame`: each arm a line with its interval, random vectors grey, prompts marked."""
    import matplotlib.pyplot as plt

    from analyses.style import CYCLE, paper

    with plt.rc_context(paper()):
        if ax is None:
            _, ax = plt.subplots()
        untouched = table[table["alpha"] == 0].iloc[0]
        ax.axhline(untouched["accuracy"], color="#666666", linewidth=0.8, linestyle=":", label="untouched")
        drawn = table[table["arm"] == "random"]
        ax.plot(
            drawn["alpha"], drawn["accuracy"], "_", color="#999999", markersize=9, label=f"{len(drawn)} random vectors"
        )
        apart = ("random", "untouched", "prompt", f"{VECTOR} + prompt")
        swept = [a for a in table["arm"].unique() if a not in apart]
        for colour, arm in zip(CYCLE * len(swept), swept, strict=False):
            own: Any = table[table["arm"].isin([arm, "untouched"])]
            own = own.sort_values("alpha")
            ax.plot(own["alpha"], own["accuracy"], "o-", color=colour, markersize=3, label=arm)
            ax.fill_between(own["alpha"], own["low"], own["high"], color=colour, alpha=0.12, linewidth=0)
        for marker, arm in zip("sD", ("prompt", f"{VECTOR} + prompt"), strict=True):
            own: Any = table[table["arm"] == arm]
            ax.plot(own["alpha"], own["accuracy"], marker, color="black", markersize=4, label=arm if len(own) else None)
        ax.set_xlabel("alpha")
        ax.set_ylabel("accuracy")
        ax.set_ylim(-0.02, 1.02)
        ax.legend()
    return ax


def _right(cell: Cell) -> np.ndarray:
    """Whether each question was answered right; a missing answer is not."""
    return np.array([value is True for value in cell.answers["right"]], dtype=float)
