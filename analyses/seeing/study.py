"""The arms of every seed, judged on the same items; and what comes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from analyses.arms import UNTUNED, Arms, Run
from analyses.seeing.answers import answers, judge, surprise
from analyses.seeing.learning import fit, taught
from analyses.seeing.models import Course, World, duplicate, holding, world
from analyses.seeing.pictures import pictured, stream, written_sums
from analyses.shelf import Shelf
from surgery.model import Model
from surgery.sites import Site
from surgery.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from finetune.rules import Rule

Arm = Literal["merge", "sft", "drift", "random", "permuted", "flipped", "merge-sft", "sft-merge"]
ARMS: tuple[Arm, ...] = ("merge", "sft", "drift", "random", "merge-sft", "sft-merge")
Measure = Literal["right", "read", "worked", "text", "nll"]
_SAID: dict[Measure, str] = {
    "right": "held-out pictured sums right",
    "read": "pictured digits read right",
    "worked": "sums right as read",
    "text": "the same sums right as text",
    "nll": "gold completion (nats per token)",
}
_WHOLE = Course()
_SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of D, among which the merge without training is chosen


@dataclass(frozen=True)
class Seeing:
    """What every arm got, item by item and seed by seed.

    runs:         an arm with a seed each, all on the same items. Measures: ``right``, ``read`` and ``worked`` (see `judge`) and ``text`` (the
                  same sums right as text, without pictures), all 0 or 1; and ``nll`` (of the gold completion, nats a token; lower is better).
    coefficients: arm -> its effective merge coefficient along D, one a seed: 0 is the model before, 1 the expert's matrices.
    donors:       what the models were that the arms began with: name -> one share a seed.
    """

    runs: Arms
    coefficients: Mapping[str, tuple[float, ...]]
    donors: Mapping[str, tuple[float, ...]]

    def frame(self) -> DataFrame:
        """A row an arm and measure. Columns: arm, measure, value, low, high (95 %, seeds and items both resampled), n (items), seeds, by_seed
        (the seeds' own means), coefficient (mean of the seeds)."""
        table: Any = self.runs.frame()
        along = {arm: float(np.mean(found)) for arm, found in self.coefficients.items()}
        return table.assign(coefficient=table["arm"].map(along))

    def differences(self, base: str = "drift") -> DataFrame:
        """Every other arm minus one, on the same items after the same seeds. Columns: arm, base, measure, and as in `frame`.

        Raises ValueError for an arm that is not there.
        """
        return self.runs.differences(base)

    def plot(self, ax: Axes | None = None, *, measure: Measure = "right") -> Axes:
        """A measure of every arm as a bar with its interval, and a dot a seed. Raises ValueError for a measure that is not there."""
        from analyses import figures

        table: Any = self.frame()
        table = table[table["measure"] == measure]
        if table.empty:
            raise ValueError(f"There is no measure {measure!r} in this study; it has {', '.join(self.runs.measures)}.")
        ax = figures.before_after(table, ax)
        for place, means in enumerate(table["by_seed"]):
            ax.plot([place] * len(means), means, "o", color="black", markersize=3, alpha=0.6)
        top = 1.1 * float(table["high"].max()) if measure == "nll" else 1.0
        ax.set(ylabel=_SAID[measure], ylim=(0, top))
        ax.tick_params(axis="x", rotation=30)
        return ax

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(Path(path), json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Seeing:
        """What `save` wrote."""
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        runs = tuple(_run(run) for run in said["runs"]["runs"])
        columns = [{name: tuple(found) for name, found in said[kind].items()} for kind in ("coefficients", "donors")]
        return cls(Arms(runs, said["runs"]["settings"]), *columns)

    def _repr_html_(self) -> str:
        return self.frame().to_html(float_format="%.3g")


def seeing(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    course: Course = _WHOLE,
    arms: Sequence[Arm] = ARMS,
    alpha: float = 1.0,
    rule: Rule = "adaptive",
    items: int = 256,
    to: str | Path | None = None,
    progress: bool = False,
) -> Seeing:
    """Make the models anew for every seed, tune the vision-language one in every arm, and judge all on the same held-out items.

    seeds       of everything that is drawn while models are made and tuned; the held-out items are the same for all
    course      sizes and lengths
    arms        in the order of the table, after the untuned model; merge-sft and sft-merge are matched to drift and sft, which are made for them
                anyway
    alpha, rule of DRIFT, see there
    items       held-out sums, none of whose expressions and pictures was learned from
    to          a folder that keeps every seed as soon as it is judged: a study that was interrupted goes on

    Errors: ValueError for no or repeated seeds, an unknown arm or rule, or no items; FileExistsError for a folder that holds something else, or a
    study with other settings.
    Source: the vision-language setting of DRIFT (Directional Reasoning Injection for Fine-Tuning), with the controls that its paper lacks.
    Differs: models and task are small enough to be made here; encoder and projector stay as they are while the arms train, as there.
    """
    from tqdm.auto import tqdm

    check_settings(seeds, arms, alpha, rule, items)
    settings = {"course": asdict(course), "arms": list(arms), "alpha": alpha, "rule": rule, "items": items}
    shelf = Shelf(to, "study", settings) if to is not None else None
    found: list[dict[str, Any]] = []
    for seed in tqdm(seeds, desc="seeing", disable=not progress, leave=False):
        done = shelf.find(f"seed-{seed}") if shelf else None
        if done is None:
            done = _one_seed(seed, course, arms, alpha, rule, items)
            if shelf:
                shelf.keep(f"seed-{seed}", done)
        found.append(done)
    runs = tuple(_run(run) for one in found for run in one["runs"])
    columns = [
        {name: tuple(one[kind][name] for one in found) for name in found[0][kind]}
        for kind in ("coefficients", "donors")
    ]
    return Seeing(Arms(runs, settings), *columns)


def check_settings(seeds: Sequence[int], arms: Sequence[str], alpha: float, rule: str, items: int) -> None:
    """Raise ValueError for what `seeing` refuses."""
    from finetune.rules import Rule

    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)}: give one seed or more, each once.")
    for arm in arms:
        if arm not in get_args(Arm):
            raise ValueError(_no_arm(arm))
    if not arms or len(set(arms)) < len(arms):
        raise ValueError(f"arms {list(arms)}: give one arm or more, each once.")
    if rule not in get_args(Rule) or not math.isfinite(alpha):
        raise ValueError(
            f"rule {rule!r} at alpha {alpha}: choose of {', '.join(get_args(Rule))}, at a finite strength."
        )
    if items < 1:
        raise ValueError(f"items {items}: ask for at least one held-out sum.")


def _one_seed(seed: int, course: Course, arms: Sequence[Arm], alpha: float, rule: Rule, items: int) -> dict[str, Any]:
    from finetune.rules import merge_coefficients

    made = world(seed, course)
    written = written_sums(items, seed=stream(0, "held out"), side="test", terms=course.long)
    shown = pictured(written, made.digits, seed=stream(0, "held out pictures"), side="test")
    cap = 12 * course.long[1]  # a term adds two tokens as read and at most ten in its line
    found: list[Run] = []
    along: dict[str, float] = {}
    tuning = Tuning(made, course, alpha, rule)
    for arm in (UNTUNED, *arms):
        model = tuning.model(arm)
        values = judge(shown, answers(model, shown, made.digits.pixels, max_new_tokens=cap))
        values["text"] = judge(written, answers(model, written, max_new_tokens=cap))["right"]
        values["nll"] = surprise(model, shown, made.digits.pixels).tolist()
        found.append(Run(arm, seed, {name: tuple(column) for name, column in values.items()}))
        along[arm] = merge_coefficients(made.host.weights, model.weights, made.prior).overall
    donors = {
        name: float(np.mean(judge(written, answers(model, written, max_new_tokens=cap))["right"]))
        for name, model in (("base, as text", made.base), ("expert, as text", made.expert))
    }
    donors["encoder, held-out pictures"] = made.encoder
    return {"runs": [asdict(run) for run in found], "coefficients": along, "donors": donors}


class Tuning:
    """The arms of one world: what each does to its own copy of the vision-language model."""

    def __init__(self, made: World, course: Course, alpha: float = 1.0, rule: Rule = "adaptive"):
        self._made, self._course, self._alpha, self._rule = made, course, alpha, rule
        questions = written_sums(course.examples, seed=stream(made.seed, "examples"), terms=course.long)
        self._rows = taught(made.host, pictured(questions, made.digits, seed=stream(made.seed, "example pictures")))
        self._ready: dict[str, Model] = {UNTUNED: made.host}

    def model(self, arm: str) -> Model:
        """The tuned model of an arm; made once."""
        if arm not in self._ready:
            self._ready[arm] = self._make(arm)
        return self._ready[arm]

    def _make(self, arm: str) -> Model:
        from finetune.rules import matched_merge

        host, prior = self._made.host, self._made.prior
        match arm:
            case "merge":
                cost = self.shares()
                return holding(host, host.weights + min(cost, key=lambda share: cost[share]) * prior)
            case "sft":
                return self._sft(duplicate(host))
            case "drift":
                return self._sft(duplicate(host), bent=True)
            case "random" | "permuted" | "flipped":
                return self._sft(duplicate(host), bent=True, control=arm)
            case "merge-sft":
                return self._sft(holding(host, matched_merge(host.weights, prior, self._beyond())))
            case "sft-merge":
                sft = self.model("sft")
                return holding(sft, matched_merge(sft.weights, prior, self._beyond()))
        raise ValueError(_no_arm(arm))

    def shares(self) -> dict[float, float]:
        """Share of D -> mean surprise of the model that it makes without training, on training sums and pictures drawn anew."""
        made, course = self._made, self._course
        written = written_sums(course.develop, seed=stream(made.seed, "develop"), terms=course.long)
        shown = pictured(written, made.digits, seed=stream(made.seed, "develop pictures"))
        cost = {}
        for share in _SHARES:
            with made.host.installed(made.host.weights + share * made.prior):
                cost[share] = float(surprise(made.host, shown, made.digits.pixels).mean())
        return cost

    def _beyond(self) -> dict[Site, float]:
        """How much further along D drift came than sft, at every site."""
        from finetune.rules import merge_coefficients

        start, prior = self._made.host.weights, self._made.prior
        sft, drift = (merge_coefficients(start, self.model(arm).weights, prior).sites for arm in ("sft", "drift"))
        return {site: drift[site] - sft[site] for site in drift}

    def _sft(self, model: Model, bent: bool = False, control: Any = None) -> Model:
        from finetune.rules import DRIFT

        made, course = self._made, self._course
        bending: dict[str, Any] = {
            "alpha": self._alpha,
            "rule": self._rule,
            "control": control,
            "seed": stream(made.seed, "control"),
        }
        callbacks = [DRIFT(made.prior, model, **bending)] if bent else []
        shown: dict[str, Any] = {"pixels": made.digits.pixels, "callbacks": callbacks}
        fit(model, self._rows, course.steps, made.seed, batch_size=course.batch_size, lr=course.lr, **shown)
        return model


def _no_arm(arm: str) -> str:
    return f"There is no arm {arm!r}. Choose of {', '.join(get_args(Arm))}; the untuned model is there in any case."


def _run(found: Mapping[str, Any]) -> Run:
    return Run(found["arm"], found["seed"], {name: tuple(column) for name, column in found["values"].items()})
