"""Ways of tuning, side by side: the same training questions, several seeds each, judged by what they learnt and what they kept.

    found = arms("specimen", {"lift": {}, "smallest": {"select": "smallest"}, "full": {"method": "full"}}, train, target=held_out, seeds=3)
    found.differences()     # each arm minus the first: paired by question, seeds and questions resampled

Every run of the folder is a file, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from analyses.changes import digest
from analyses.scoring import nll, text_nll
from analyses.shelf import Shelf
from analyses.statistics import crossed_bootstrap, share, share_difference
from analyses.tasks import Question, grade, worked
from surgery.borrowing import give_back_memory
from surgery.checkpoint import Checkpoint
from surgery.model import Model, find
from surgery.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

UNTUNED = "untuned"
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


@dataclass(frozen=True)
class Run:
    """One arm with one seed. values: measure -> a number for every question or passage, in the order of the data."""

    arm: str
    seed: int
    values: Mapping[str, tuple[float, ...]]
    losses: tuple[float, ...] = ()
    trainable: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Arms:
    """Runs of several arms and seeds, the untuned model first. settings: what was asked, for the record."""

    runs: tuple[Run, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """The arms, in order, without the untuned model."""
        return list(dict.fromkeys(run.arm for run in self.runs if run.arm != UNTUNED))

    @property
    def measures(self) -> list[str]:
        return list(self.runs[0].values)

    def table(self, arm: str, measure: str) -> Float[np.ndarray, "seed item"]:
        """A measure's values: a row a seed, a column a question. Raises ValueError for an arm or a measure that is not there."""
        rows = [run.values[measure] for run in self.runs if run.arm == arm and measure in run.values]
        if not rows:
            raise ValueError(
                f"There is no {measure!r} of {arm!r}: arms are {', '.join([UNTUNED, *self.arms])}; measures are {', '.join(self.measures)}."
            )
        return np.array(rows, dtype=float)

    def frame(self, *, draws: int = 2000, seed: int = 0) -> DataFrame:
        """A row an arm and measure. Columns: arm, measure, value, low, high, n (questions), seeds, by_seed (the seeds' own means).

        Every question and passage counts once, however long: ``text_nll`` is the mean of the passages' own nats a token (a sweep's, and
        `analyses.scoring.text_nll`'s mean, is nats a token of all passages), and so are ``answer_nll`` and ``completion_nll``.
        Seeds and questions are resampled. Of one seed a share of right answers has Wilson's interval, of as many questions; so it has where all
        are right with every seed, or all wrong, as every draw then is.
        """
        import pandas as pd

        return pd.DataFrame(
            {"arm": arm, "measure": measure, **_row(self.table(arm, measure), draws, seed)}
            for arm in (UNTUNED, *self.arms)
            for measure in self.measures
        )

    def differences(self, base: str | None = None, *, draws: int = 2000, seed: int = 0) -> DataFrame:
        """Each arm minus `base` (the first arm, or `untuned`), on the same questions and seeds. Columns as in `frame`.

        Of one seed, and where two arms have the very same questions right with every seed, a difference of shares has Tango's interval.
        """
        import pandas as pd

        base = self.arms[0] if base is None else base
        rows = []
        for arm in self.arms:
            for measure in self.measures if arm != base else ():
                ours, theirs = self.table(arm, measure), self.table(base, measure)
                if len(theirs) not in (1, len(ours)):
                    raise ValueError(f"{arm} has {len(ours)} seeds, {base} {len(theirs)}: there are no pairs of them.")
                rows.append({"arm": arm, "base": base, "measure": measure, **_row(ours, draws, seed, theirs)})
        return pd.DataFrame(rows)

    def plot(self, x: str, y: str, ax: Axes | None = None) -> Axes:
        """What was kept against what was learnt: a point an arm with its intervals, a small mark a seed."""
        from analyses.figures import trade_off

        return trade_off(self.frame(), ax, x=x, y=y)

    def save(self, path: str | Path) -> None:
        """One JSON file, which `load` reads."""
        write_whole(
            Path(path), json.dumps({"runs": [asdict(run) for run in self.runs], "settings": dict(self.settings)}) + "\n"
        )

    @classmethod
    def load(cls, path: str | Path) -> Arms:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(tuple(_run(run) for run in found["runs"]), found["settings"])


def arms(
    model: str,
    ways: Mapping[str, Mapping[str, Any]],
    train: Sequence[Question],
    *,
    target: Sequence[Question],
    to: str | Path,
    choices: Mapping[str, Sequence[Question]] | None = None,
    texts: Sequence[str] = (),
    generate: int = 0,
    seeds: int = 3,
    max_new_tokens: int = 64,
    device: str = "auto",
    progress: bool = False,
    **shared: Any,
) -> Arms:
    """Tune a fresh copy of `model` in every way with every seed, and judge each.

    ways:     name -> options of `tune` ({"method": "lora", "lora_rank": 16}). shared: options of all of them (steps, batch_size).
    train:    worked questions; every seed sees them in another order. seeds: 0, 1, ... up to so many, the same for every way.
    target:   held-out questions: measures ``completion_nll`` and ``answer_nll`` (nats a token after the gold text before it; a question
              without a solution has only the latter) and, for the first `generate` of them, ``accuracy`` of greedy answers (1 or 0; an answer that
              is missing counts 0).
    choices:  name -> questions with named options, for what should have been kept: measures ``NAME_nll`` (nats of the right option
              among them) and ``NAME_accuracy``. texts: general text, ``text_nll``.
    to:       folder for the runs. A finished run found there is not done again; another comparison's folder is an error, as is one of
              a model of the same name with other weights.

    Raises ValueError for no ways, no seeds, a way named "untuned", options that `tune` does not take, and questions that cannot be judged.
    """
    if not ways or seeds < 1 or UNTUNED in ways:
        raise ValueError(
            f"{len(ways)} ways and {seeds} seeds: at least 1 of each is needed, and {UNTUNED!r} is not a way."
        )
    judge = _Judge(target, choices or {}, tuple(texts), generate, max_new_tokens)
    settings = {
        "model": model, "weights": Checkpoint(find(model)).hash(), "ways": {name: dict(way) for name, way in ways.items()}, "shared": shared, "train": digest(list(train)),
        "judge": judge.settings(), "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    shelf = Shelf(to, "comparison", settings)
    wanted = [(UNTUNED, 0), *((name, seed) for seed in range(seeds) for name in ways)]
    bar = _bar(len(wanted), progress)
    runs = []
    for name, seed in wanted:
        part = f"runs/{name}-{seed}"
        done = shelf.find(part)
        if done is None:
            bar.set_postfix_str(f"{name}, seed {seed}")
            done = asdict(_one(model, name, seed, ways.get(name), train, judge, device, shared))
            shelf.keep(part, done)
            give_back_memory()
        runs.append(_run(done))
        bar.update()
    bar.close()
    return Arms(tuple(runs), settings)


def option_nll(model: Model, questions: Sequence[Question], *, batch_size: int = 16) -> tuple[list[float], list[bool]]:
    """How a model chooses among the options that each question names: nats of the right one among them, and whether it is the likeliest.

    The options are ``meta["options"]``, or those of a last line "Answer format: a/b/c". An option's score is the log-likelihood of all its
    tokens as an answer, and the scores are normalised over the options: 0 is certain, log(options) a guess.
    Raises ValueError where a question names no options, an empty one, or its answer is none of them.
    """
    named = [options(question) for question in questions]
    tried = [
        model.transcript(question.question, option)
        for question, known in zip(questions, named, strict=True)
        for option in known
    ]
    scores = iter(-np.array(nll(model, tried, "answer", batch_size=batch_size).nats))
    nats, right = [], []
    for question, known in zip(questions, named, strict=True):
        found = np.array([next(scores) for _ in known])
        gold = known.index(question.answer)
        nats.append(float(np.logaddexp.reduce(found) - found[gold]))
        right.append(int(found.argmax()) == gold)
    return nats, right


def options(question: Question) -> list[str]:
    """The options that a question names."""
    stated = _FORMAT.search(question.question)
    found = list(question.meta.get("options") or (stated.group(1).split("/") if stated else ()))
    if len(found) < 2 or question.answer not in found:
        raise ValueError(
            f"{question.question[:60]!r} needs options among which the answer {question.answer!r} is: give meta['options'], or end the "
            f"question with a line 'Answer format: a/b/c'. Found {found or 'none'}."
        )
    if not all(option.strip() for option in found):
        raise ValueError(
            f"{question.question[:60]!r} names the options {found}: an option without a word has no likelihood; leave it out."
        )
    return found


@dataclass(frozen=True)
class _Judge:
    target: Sequence[Question]
    choices: Mapping[str, Sequence[Question]]
    texts: tuple[str, ...]
    generate: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.target or self.generate > len(self.target):
            raise ValueError(
                f"{len(self.target)} target questions, {self.generate} to be answered: give at least as many, and 1 or more."
            )
        for questions in self.choices.values():
            for question in questions:
                options(question)

    def settings(self) -> dict[str, Any]:
        return {
            "target": digest(list(self.target)), "generate": self.generate, "texts": digest(list(self.texts)),
            "choices": {name: digest(list(questions)) for name, questions in self.choices.items()},
        }  # fmt: skip

    def __call__(self, model: Model) -> dict[str, tuple[float, ...]]:
        told = worked(model, self.target)
        found: dict[str, Sequence[float]] = {"answer_nll": nll(model, told, "answer").per_item}
        if all("thinking" in t.spans for t in told):
            found["completion_nll"] = nll(model, told, "completion").per_item
        if self.generate:
            asked = self.target[: self.generate]
            given = model.generate([q.question for q in asked], max_new_tokens=self.max_new_tokens, batch_size=64)
            found["accuracy"] = [float(grade(q, t) is True) for q, t in zip(asked, given, strict=True)]
        for name, questions in self.choices.items():
            nats, right = option_nll(model, questions)
            found |= {f"{name}_nll": nats, f"{name}_accuracy": [float(r) for r in right]}
        if self.texts:
            found["text_nll"] = text_nll(model, self.texts).per_item
        return {name: tuple(values) for name, values in found.items()}


def _one(
    ref: str, name: str, seed: int, way: Mapping[str, Any] | None, train: Sequence[Question], judge: _Judge, device: str,
    shared: Mapping[str, Any],
) -> Run:  # fmt: skip
    from finetune.tune import tune

    model = Model.load(ref, device=device, dtype="float32")
    if way is None:
        return Run(name, seed, _autocast(model, judge))
    done = tune(model, worked(model, train), seed=seed, **{**shared, **way})
    return Run(name, seed, _autocast(model, judge), tuple(done.losses), done.trainable, done.seconds)


def _autocast(model: Model, judge: _Judge) -> dict[str, tuple[float, ...]]:
    """Judged as trained: in bf16 over fp32 weights, alike for every arm."""
    import torch

    with torch.autocast(model.device.type, torch.bfloat16):
        return judge(model)


def _row(
    ours: Float[np.ndarray, "seed item"], draws: int, seed: int, theirs: Float[np.ndarray, "#seed item"] | None = None
) -> dict[str, Any]:
    """Values, or what they have more than theirs. Of right and wrong, one seed, or seeds that are all alike, are a share of as many questions."""
    table = ours if theirs is None else ours - theirs
    one = len(table) == 1 or table.min() == table.max()
    if one and theirs is None and np.isin(ours, (0, 1)).all():
        found = share(ours[0], range(ours.shape[1]))
    elif one and theirs is not None and np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        found = share_difference(theirs[0], ours[0])
    else:
        found = crossed_bootstrap(table, draws=draws, seed=seed)
    means = tuple(round(float(mean), 6) for mean in table.mean(1))
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "seeds": len(table),
        "by_seed": means,
    }


def _run(found: Mapping[str, Any]) -> Run:
    values = {name: tuple(numbers) for name, numbers in found["values"].items()}
    return Run(found["arm"], found["seed"], values, tuple(found["losses"]), found["trainable"], found["seconds"])


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="arms", disable=not progress, leave=False)
