"""Monitors for the training loop, made of the toolkit's own measures: pass them to ``every(n, ...)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from analyses.representation import mean_shift
from analyses.scoring import nll
from analyses.tasks import Question, accuracy
from finetune.monitors import ChangeNorm, Monitor, Watch, every
from probes.activations import Activations, collect
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import Transcript, read_transcript

WATCHES = ("accuracy", "nll", "drift", "drift-general", "change")


class Answers:
    """Held-out accuracy: generates greedily and grades. Gives accuracy (missing counted as not right), its interval, and missing."""

    __name__ = "accuracy"

    def __init__(self, questions: Sequence[Question], max_new_tokens: int = 64):
        self._questions, self._length = list(questions), max_new_tokens

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        given = model.generate(
            [q.question for q in self._questions], max_new_tokens=self._length, batch_size=len(self._questions)
        )
        found = accuracy(self._questions, given)
        overall = found.overall
        return {
            "accuracy": overall.value,
            "low": overall.low,
            "high": overall.high,
            "missing": found.missing,
            "n": found.n,
        }


class AnswerLikelihood:
    """Negative log-likelihood of the gold answer after the gold thinking, in nats per token."""

    __name__ = "nll"

    def __init__(self, transcripts: Sequence[Transcript]):
        self._transcripts = list(transcripts)

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        found = nll(model, self._transcripts, over="answer").mean
        return {"answer_nll": found.value, "low": found.low, "high": found.high, "n": found.n}


class DriftFromStart:
    """How far the residual stream has moved since this was made, on fixed transcripts: the normalised mean shift at some layers.

    Gives one number a layer (``L15``) and their mean (``all``), in units of the spread at the start. Make it before training: a
    resumed run then measures from the same start.
    """

    __name__ = "drift"

    def __init__(
        self,
        model: Model,
        transcripts: Sequence[Transcript],
        layers: Sequence[int] | None = None,
        over: str = "completion",
    ):
        depth = model.anatomy.n_layers
        self._transcripts, self._over = list(transcripts), over
        self._layers = sorted({depth // 4, depth // 2, 3 * depth // 4, depth}) if layers is None else list(layers)
        self._start = self._collect(model)

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        now = self._collect(model)
        shifts = {f"L{s.layer}": mean_shift(self._start[s], now[s]) for s in now.sites}
        return {"all": sum(shifts.values()) / len(shifts), **shifts}

    def _collect(self, model: Model) -> Activations:
        return collect(model, self._transcripts, at=[Site(n, "resid") for n in self._layers], over=self._over)


def as_transcripts(model: Model, texts: Sequence[str]) -> list[Transcript]:
    """Plain texts as transcripts without a question: their one span of interest is ``all``."""
    encoded = [list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [read_transcript(model.tokenizer, "", ids[:1], ids[1:], model.markers) for ids in encoded]


def watches(
    names: Sequence[str],
    model: Model,
    questions: Sequence[Question],
    texts: Sequence[str],
    steps: int,
    *,
    max_new_tokens: int = 64,
) -> list[Watch]:
    """The monitors of these names, each every `steps` optimizer steps. Raises ValueError for a name that is none of `WATCHES`."""
    unknown = [name for name in names if name not in WATCHES]
    if unknown:
        raise ValueError(f"There is no monitor {unknown[0]!r}. Choose from {', '.join(WATCHES)}.")
    teacher = [model.transcript(q.question, q.completion(model.markers)) for q in questions]
    makers: Mapping[str, Callable[[], Monitor]] = {
        "accuracy": lambda: Answers(questions, max_new_tokens),
        "nll": lambda: AnswerLikelihood(teacher),
        "drift": lambda: DriftFromStart(model, teacher),
        "drift-general": lambda: DriftFromStart(model, as_transcripts(model, texts), over="all"),
        "change": lambda: ChangeNorm(model),
    }
    return [every(steps, makers[name](), name) for name in names]
