"""Monitors for the training loop, made of the toolkit's own measures: pass them to ``every(n, ...)``, or alone to a `Recorder`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.dose import lengths
from analyses.representation import linear_cka, mean_shift, rows_in, subspace_angles
from analyses.scoring import entropy, nll
from analyses.tasks import Question, accuracy, worked
from finetune.monitors import Watch, every, sometimes
from finetune.movement import ChangeNorm, GradientCourse, Start, UpdateShape, spread_layers
from probes.activations import Activations, collect
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import Transcript, nobody_has, positions, read_transcript

# from cheap to dear: given in this order, a budget of time is first spent on the cheap ones
WATCHES = ("nll", "entropy", "gradient", "change", "drift", "drift-general", "representation", "geometry", "accuracy")

_ON = dict.fromkeys(("nll", "entropy", "drift", "representation", "accuracy"), "questions") | {"drift-general": "texts"}
_COMPONENTS = 8
_LEAST = 4  # rows that debiased CKA needs
_READ = 8  # transcripts whose tokens are compared: more tokens than `Representation` takes of them cost time alone


class Answers:
    """Held-out answers, generated greedily: graded, and their thinking counted.

    Gives accuracy (missing counted as not right), its interval, missing and n; ``thinking_tokens``, the mean length of the thinking of those
    that have any, with what was cut off at `max_new_tokens` counted as far as it was seen; and ``thinking_cut``, the share that was cut off.
    """

    __name__ = "accuracy"

    def __init__(self, questions: Sequence[Question], max_new_tokens: int = 64):
        self._questions, self._length = list(questions), max_new_tokens

    def trial(self, model: Model) -> float:
        """The beginning of one answer, see `finetune.monitors.Monitor`; work is counted in tokens, read and written."""
        (begun,) = model.generate([self._questions[0].question], max_new_tokens=max(1, self._length // 16))
        whole = len(self._questions) * (begun.spans["prompt"][1] + self._length)
        return len(begun.ids) / whole

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
            **_thinking(given),
        }


def _thinking(given: Sequence[Transcript]) -> dict[str, float]:
    counts, ended = lengths(given)
    seen = [(count, over) for count, over in zip(counts, ended, strict=True) if count is not None]
    if not seen:
        return {"thinking_tokens": float("nan"), "thinking_cut": float("nan")}
    return {
        "thinking_tokens": sum(count for count, _ in seen) / len(seen),
        "thinking_cut": sum(not over for _, over in seen) / len(seen),
    }


class AnswerLikelihood:
    """Negative log-likelihood of the gold answer after the gold thinking, in nats per token."""

    __name__ = "nll"

    def __init__(self, transcripts: Sequence[Transcript]):
        self._transcripts = list(transcripts)

    def trial(self, model: Model) -> float:
        """One transcript, see `finetune.monitors.Monitor`."""
        nll(model, self._transcripts[:1], over="answer")
        return _share(self._transcripts)

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        found = nll(model, self._transcripts, over="answer").mean
        return {"answer_nll": found.value, "low": found.low, "high": found.high, "n": found.n}


class TokenEntropy:
    """How unsure the model is at each token of fixed transcripts: the mean entropy of its prediction, in nats, for each span.

    A pass over the transcripts for each span.
    """

    __name__ = "entropy"

    def __init__(self, transcripts: Sequence[Transcript], over: Sequence[str] = ("completion",)):
        self._transcripts, self._over = list(transcripts), tuple(over)

    def trial(self, model: Model) -> float:
        """One transcript, see `finetune.monitors.Monitor`."""
        for span in self._over:
            entropy(model, self._transcripts[:1], over=span)
        return _share(self._transcripts)

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        return {span: entropy(model, self._transcripts, over=span).mean.value for span in self._over}


def _share(transcripts: Sequence[Transcript]) -> float:
    """Of all tokens, those of the first transcript."""
    return len(transcripts[0].ids) / sum(len(t.ids) for t in transcripts)


class DriftFromStart:
    """How far the residual stream has moved since this was made, on fixed transcripts: the normalised mean shift at some layers.

    Gives one number a layer (``L15``) and their mean (``all``), in units of the spread at the start. The first token of a transcript is
    left out, as in `analyses.representation`. Make it before training: a resumed run then measures from the same start. prepared: the
    seconds that reading the start took.
    """

    __name__ = "drift"

    def __init__(
        self,
        model: Model,
        transcripts: Sequence[Transcript],
        layers: Sequence[int] | None = None,
        over: str = "completion",
    ):
        began = time.monotonic()
        depth = model.anatomy.n_layers
        self._transcripts, self._over = list(transcripts), over
        self._layers = sorted({depth // 4, depth // 2, 3 * depth // 4, depth}) if layers is None else list(layers)
        self._start = self._collect(model)
        self.prepared = time.monotonic() - began

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        now = self._collect(model)
        shifts = {f"L{s.layer}": mean_shift(self._start[s], now[s]) for s in now.sites}
        return {"all": sum(shifts.values()) / len(shifts), **shifts}

    def _collect(self, model: Model) -> Activations:
        found = collect(model, self._transcripts, at=[Site(n, "resid") for n in self._layers], over=self._over)
        return found.where(found.position > 0)


class Representation:
    """How the residual stream has changed since this was made, for each span and layer: CKA, subspace angle and mean shift.

    Gives ``thinking.L15.cka``, ``thinking.L15.angle`` (mean principal angle of the top k components, degrees) and ``thinking.L15.shift``
    (`analyses.representation` says what they are), and the mean over layers for each span, ``thinking.cka`` and so on. At the start CKA is 1,
    the others 0. Make it before training.

    layers: residual streams, 0 to n_layers; five spread over the depth by default, the embedding left out.
    over:   spans; a token in several counts in each, the first of a transcript in none.
    k:      principal components whose subspaces are compared; by default 8, of a span of fewer tokens one less than it has.
    rows:   tokens of each span that are compared, drawn once by `seed` where there are more: the cost grows with their square.
    Raises ValueError for a span that no transcript has, and for one with fewer than 4 tokens in all, or too few for k.
    """

    __name__ = "representation"

    def __init__(
        self,
        model: Model,
        transcripts: Sequence[Transcript],
        layers: Sequence[int] | None = None,
        over: Sequence[str] = ("thinking", "answer"),
        *,
        k: int | None = None,
        rows: int = 256,
        seed: int = 0,
    ):
        began = time.monotonic()
        spread = [n + 1 for n in spread_layers(model.anatomy.n_layers, 5)]
        self._sites = [Site(n, "resid") for n in (spread if layers is None else layers)]
        self._transcripts, self._over, self._k = list(transcripts), tuple(over), k or _COMPONENTS
        found = self._collect(model)
        self._rows = {span: _drawn(rows_in(found, self._transcripts, span), rows, seed) for span in self._over}
        least = max(k + 1 if k else 0, _LEAST)
        for span, chosen in self._rows.items():
            if not len(chosen):
                raise ValueError(
                    f"{nobody_has(self._transcripts, span)} Give others (to have a thinking, questions with a worked solution), or leave it out."
                )
            if len(chosen) < least:
                asked = f"{k} principal components" if k else "CKA"
                raise ValueError(
                    f"The span {span!r} has {len(chosen)} tokens in all, but {asked} asks for {least} or more. "
                    f"Give more questions{', or a smaller k' if k else ''}, or leave it out."
                )
        self._start = {(span, s): found[s][chosen] for span, chosen in self._rows.items() for s in self._sites}
        self.prepared = time.monotonic() - began

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        now = self._collect(model)
        means: dict[str, float] = {}
        each: dict[str, float] = {}
        for span, chosen in self._rows.items():
            found = [self._compare(self._start[span, s], now[s][chosen]) for s in self._sites]
            for measure in found[0]:
                means[f"{span}.{measure}"] = sum(one[measure] for one in found) / len(found)
            for site, one in zip(self._sites, found, strict=True):
                each |= {f"{span}.L{site.layer}.{measure}": value for measure, value in one.items()}
        return means | each

    def _compare(self, X: Float[Tensor, "row d"], Y: Float[Tensor, "row d"]) -> dict[str, float]:
        angle, _ = subspace_angles(X, Y, min(self._k, len(X) - 1, X.shape[1]))
        return {"cka": linear_cka(X, Y), "angle": angle, "shift": mean_shift(X, Y)}

    def _collect(self, model: Model) -> Activations:
        return collect(model, self._transcripts, at=self._sites, over=self._over)


def _drawn(rows: Int[Tensor, " row"], count: int, seed: int) -> Int[Tensor, " drawn"]:
    """At most `count` of some rows, in order."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows[chosen.sort().values]


def as_transcripts(model: Model, texts: Sequence[str]) -> list[Transcript]:
    """Plain texts as transcripts without a question: their one span of interest is ``all``. The first token, which nothing predicts, is the prompt."""
    encoded = [list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [read_transcript(model.tokenizer, "", ids[:1], ids[1:], model.markers) for ids in encoded]


def watches(
    names: Sequence[str] | None,
    model: Model,
    questions: Sequence[Question],
    texts: Sequence[str],
    steps: int | None = None,
    *,
    max_new_tokens: int = 64,
) -> list[Watch]:
    """The monitors of these names, each every `steps` optimizer steps; None: as often as the recorder's budget allows.

    names: of `WATCHES`; None: all that there is something to measure on, ``representation`` over those of thinking and answer that have tokens
    enough, and without ``drift``, whose mean shift it has as well.
    Make them before training: some read the model as it is. Raises ValueError for a name that is none of `WATCHES`, and for one that is
    measured on questions, on their worked solutions or on texts where there are none.
    """
    lacking = check_names(names or (), questions, texts)
    teacher = worked(model, questions)
    compared = ("thinking", "answer")
    if names is None:
        compared = tuple(span for span in compared if _count(teacher[:_READ], span) >= _LEAST)
        idle = {*lacking, "drift", *(() if compared else ("representation",))}
        names = [name for name in WATCHES if name not in idle]
    start = Start(model) if {"change", "geometry", "gradient"} & set(names) else None
    makers: Mapping[str, Callable[[], Callable[..., Mapping[str, float]]]] = {
        "accuracy": lambda: Answers(questions, max_new_tokens),
        "nll": lambda: AnswerLikelihood(teacher),
        "entropy": lambda: TokenEntropy(teacher),
        "drift": lambda: DriftFromStart(model, teacher),
        "drift-general": lambda: DriftFromStart(model, as_transcripts(model, texts), over="all"),
        "representation": lambda: Representation(model, teacher[:_READ], over=compared),
        "change": lambda: ChangeNorm(model, start=start),
        "geometry": lambda: UpdateShape(model, start=start),
        "gradient": lambda: GradientCourse(model, start=start),
    }
    made = [(makers[name](), name) for name in names]
    return [every(steps, monitor, name) if steps else sometimes(monitor, name) for monitor, name in made]


def check_names(names: Sequence[str], questions: Sequence[Question], texts: Sequence[str]) -> dict[str, str]:
    """Raise ValueError for names that `watches` refuses; gives those that have nothing to be measured on, and what that would be."""
    lacking = {name: what for name, what in _ON.items() if not {"questions": questions, "texts": texts}[what]}
    for name in names:
        if name not in WATCHES:
            raise ValueError(f"There is no monitor {name!r}. Choose from {', '.join(WATCHES)}.")
        if name in lacking:
            raise ValueError(
                f"{name!r} is measured on {lacking[name]}, and there are none: give some, or leave it out."
            )
    return lacking


def _count(transcripts: Sequence[Transcript], span: str) -> int:
    return sum(len(positions(t, span)) for t in transcripts)
