"""Objectives: what a training step minimises. Each is a function `Predictions -> scalar`, the micro-batch's share of the step's loss.

An objective divides by the totals of the whole optimizer step, so that it does not matter how a batch is split. Those made here add up
like numbers, and with any function of predictions: ``nll + 0.1 * kl_to_base``. What a part needs (columns, the starting model, groups, a
state in checkpoints) the sum needs too; a bare lambda over the same parts would not say so.

Sums over tokens are weighted by the data's token weights. An objective that scores whole sequences takes their sums or means over the
learnt tokens and raises ValueError for a sequence that has none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint

from finetune.examples import IGNORED, require_numbers
from finetune.predictions import Predictions

IMPROBABLE = 0.01
POSITIVE = "positive"  # the column by which `aft` and `dpo` tell a good sequence from a bad one
_STRIP = 1 << 24  # entries of the logits in work at a time, where a sum over the vocabulary is wanted


@runtime_checkable
class Objective(Protocol):
    """A function of predictions. It may also have, as attributes: `columns` (names of the columns that the data must have), `reference`
    (true where it asks for the starting model's logits), `grouped` (true where the data must be groups), `fault` (says what is wrong with a
    group of these columns, None where nothing is), `shares` (name -> which tokens count, whose share of the learnt tokens' weight, in
    [0, 1], the trainer logs by that name), `state_dict` and `load_state_dict`, which go into checkpoints, and `reset`, called where a run
    begins."""

    def __call__(self, p: Predictions, /) -> Tensor: ...


class Additive:
    """An objective that can be added to others and scaled: ``a + b``, ``a - b``, ``0.1 * a``."""

    columns: tuple[str, ...] = ()
    reference: bool = False
    grouped: bool = False
    shares: Mapping[str, Callable[[Predictions], Tensor]] = MappingProxyType({})

    def __call__(self, p: Predictions, /) -> Tensor:
        raise NotImplementedError

    def fault(self, columns: Mapping[str, Sequence[float]]) -> str | None:
        """What is wrong with a group of sequences that has these columns; None where nothing is."""
        return None

    def __add__(self, other: Objective) -> Sum:
        if not callable(other):
            return NotImplemented
        return Sum((*_parts(self), *_parts(other)))

    def __radd__(self, other: Any) -> Any:
        if callable(other):
            return Sum((*_parts(other), *_parts(self)))
        return self if other == 0 else NotImplemented  # so that sum() works

    def __mul__(self, scale: float) -> Sum:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            return NotImplemented
        if not math.isfinite(scale):
            raise ValueError(f"An objective is scaled by a finite number, not by {scale}.")
        return Sum(tuple((scale * factor, part) for factor, part in _parts(self)))

    __rmul__ = __mul__

    def __neg__(self) -> Sum:
        return -1.0 * self

    def __sub__(self, other: Objective) -> Sum:
        if not callable(other):
            return NotImplemented
        return Sum((*_parts(self), *((-factor, part) for factor, part in _parts(other))))


@dataclass(frozen=True, repr=False)
class Sum(Additive):
    """``Σ factor · objective``. It needs what any part needs; its state is its parts'."""

    parts: tuple[tuple[float, Objective], ...]

    def __call__(self, p: Predictions, /) -> Tensor:
        shares = [factor * part(p) for factor, part in self.parts]
        return torch.stack(shares).sum()

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for _, part in self.parts for name in getattr(part, "columns", ())))

    @property
    def reference(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "reference", False) for _, part in self.parts)

    @property
    def grouped(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "grouped", False) for _, part in self.parts)

    @property
    def shares(self) -> Mapping[str, Callable[[Predictions], Tensor]]:  # type: ignore[override]
        return {name: which for _, part in self.parts for name, which in getattr(part, "shares", {}).items()}

    def fault(self, columns: Mapping[str, Sequence[float]]) -> str | None:
        """The first that any part finds."""
        judges = (getattr(part, "fault", None) for _, part in self.parts)
        return next((wrong for judge in judges if judge and (wrong := judge(columns))), None)

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts that have one, by position."""
        return {str(i): part.state_dict() for i, part in self._stateful()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each part its state back. Raises ValueError when they are not those of these parts."""
        expected = {str(i): part for i, part in self._stateful()}
        if expected.keys() != state.keys():
            raise ValueError(f"The state has parts {sorted(state)}, this objective ({self!r}) has {sorted(expected)}.")
        for name, part in expected.items():
            part.load_state_dict(state[name])

    def reset(self) -> None:
        """Let each part that remembers something forget it."""
        for _, part in self.parts:
            if reset := getattr(part, "reset", None):
                reset()

    def _stateful(self) -> Iterator[tuple[int, Any]]:
        return ((i, part) for i, (_, part) in enumerate(self.parts) if hasattr(part, "state_dict"))

    def __repr__(self) -> str:
        return " + ".join(_name(part) if factor == 1 else f"{factor:g} * {_name(part)}" for factor, part in self.parts)


@dataclass(frozen=True, repr=False)
class _Written(Additive):
    """A function as an objective that adds."""

    loss: Callable[[Predictions], Tensor]
    name: str
    columns: tuple[str, ...] = ()
    reference: bool = False
    grouped: bool = False
    shares: Mapping[str, Callable[[Predictions], Tensor]] = field(default_factory=dict, hash=False)
    judge: Callable[[Mapping[str, Sequence[float]]], str | None] | None = None

    def __call__(self, p: Predictions, /) -> Tensor:
        return self.loss(p)

    def fault(self, columns: Mapping[str, Sequence[float]]) -> str | None:
        return self.judge(columns) if self.judge else None

    def __repr__(self) -> str:
        return self.name


def objective(
    loss: Callable[[Predictions], Tensor] | None = None,
    *,
    name: str | None = None,
    columns: tuple[str, ...] = (),
    reference: bool = False,
    grouped: bool = False,
    shares: Mapping[str, Callable[[Predictions], Tensor]] = MappingProxyType({}),
    fault: Callable[[Mapping[str, Sequence[float]]], str | None] | None = None,
) -> Any:
    """Make a function of predictions an objective that adds and says what it needs; also as a decorator, ``@objective(reference=True)``.

    columns: names of the columns that the data must have. reference: it calls ``p.reference``. grouped: the data must be groups.
    shares: name -> which tokens count: their share is logged. fault: says what is wrong with a group of these columns, so that a run ends
    before it begins.
    """
    if loss is None:
        return functools.partial(
            objective, name=name, columns=columns, reference=reference, grouped=grouped, shares=shares, fault=fault
        )
    made = _Written(
        loss, name or getattr(loss, "__name__", type(loss).__name__), tuple(columns), reference, grouped, shares, fault
    )
    object.__setattr__(made, "__doc__", loss.__doc__)
    return made


def _parts(part: Any) -> tuple[tuple[float, Objective], ...]:
    return part.parts if isinstance(part, Sum) else ((1.0, part),)


def _name(part: Objective) -> str:
    return repr(part) if isinstance(part, Additive) else getattr(part, "__name__", type(part).__name__)


# --- by the token -----------------------------------------------------------------------------------------------------


@objective
def nll(p: Predictions) -> Float[Tensor, ""]:
    """Weighted mean of the negative log-likelihood of the learnt tokens, in nats: plain supervised fine-tuning."""
    return (p.weights * p.nll).sum() / p.totals.tokens


def improbable(p: Predictions) -> Bool[Tensor, " token"]:
    """Tokens whose probability is below 0.01."""
    return p.nll.detach() > -math.log(IMPROBABLE)


@objective(shares={"improbable": improbable})
def dft(p: Predictions) -> Float[Tensor, ""]:
    """Dynamic fine-tuning: each token's loss times its own probability, which has no gradient. In nats.

    The gradient is that of the probabilities' sum, so tokens that the model finds impossible teach almost nothing: the share of tokens
    with a probability below 0.01 is logged as ``improbable``.
    Source: Wu et al., "On the Generalization of SFT", arXiv 2508.05629.
    """
    return (p.weights * p.nll.detach().neg().exp() * p.nll).sum() / p.totals.tokens


@objective(reference=True)
def kl_to_base(p: Predictions) -> Float[Tensor, ""]:
    """Weighted mean over the learnt tokens of KL(π_0 ‖ π), in nats, 0 or more: what the starting model knew must be kept.

    π_0 is the frozen starting model, at the same places of the same text.
    Source: Zhu et al., "Anchored Supervised Fine-Tuning", arXiv 2509.23753 (its anchor).
    """
    return (p.weights * kl_divergence(_reference(p), p.logits)).sum() / p.totals.tokens


@objective(reference=True)
def kl_from_base(p: Predictions) -> Float[Tensor, ""]:
    """Weighted mean over the learnt tokens of KL(π ‖ π_0), in nats, 0 or more: nothing the starting model would not say."""
    return (p.weights * kl_divergence(p.logits, _reference(p))).sum() / p.totals.tokens


@objective
def entropy(p: Predictions) -> Float[Tensor, ""]:
    """Weighted mean entropy of the predictions at the learnt tokens, in nats. ``nll - 0.01 * entropy`` keeps them open."""
    return (p.weights * _by_strips(_entropy, p.logits)).sum() / p.totals.tokens


def asft(weight: float = 0.05) -> Additive:
    """Anchored supervised fine-tuning: `dft` plus `weight` times `kl_to_base`. weight 0 is `dft`.

    Source: Zhu et al., arXiv 2509.23753. Its released code's default is 0.1, its README's example 0.05.
    Raises ValueError for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"asft({weight}): the anchor's weight is 0 or more.")
    return dft + weight * kl_to_base if weight else dft


def kl_divergence(first: Float[Tensor, "token vocab"], second: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    """KL(softmax(first) ‖ softmax(second)) of each row, in nats. The vocabulary is taken some tokens at a time, also backwards."""
    return _by_strips(_kl, first, second)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    one = first.log_softmax(-1)
    return (one.exp() * (one - second.log_softmax(-1))).sum(-1)


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _by_strips(of: Callable[..., Tensor], *logits: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    """A function of each row of some logits; what it needs backwards is computed again, a strip at a time."""
    tokens, vocabulary = logits[0].shape
    step = max(1, _STRIP // vocabulary)
    if tokens <= step:
        return of(*logits)
    strips = zip(*(x.split(step) for x in logits), strict=True)
    return torch.cat([checkpoint(of, *strip, use_reentrant=False, preserve_rng_state=False) for strip in strips])


def _reference(p: Predictions) -> Tensor:
    if p.reference is None:
        raise ValueError(
            "This objective compares with the starting model, and nobody offers its logits. In a sum with functions of your own, write "
            "nll + 0.1 * kl_to_base rather than a lambda, or mark the function: objective(loss, reference=True)."
        )
    return p.reference()


# --- by the sequence --------------------------------------------------------------------------------------------------


def coverage(samples: int = 16) -> Additive:
    """Direct coverage optimisation (DCO, direct-coverage-opt): minus the log of the chance that one of `samples` answers is the target. In nats.

    ``-log(1 - (1 - p)^N)`` with p the probability of the whole target. The gradient is that of cross-entropy times `coverage_factor`, which
    fades once p is large beside 1/N: confidence beyond what N tries need is not learnt. N = 1 is the sequence's cross-entropy. Long
    targets have p near 0 and are then learnt as by cross-entropy: it acts on short ones, or step by step, on the examples of
    `finetune.recipes.one_step_each`, whose N is the width of a search over steps.
    samples: N, 1 or more: the tries there will be at test time. Mean over the step's sequences.
    Source: Chen et al., "Rethinking Fine-Tuning when Scaling Test-Time Compute", arXiv 2502.07154.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"coverage({samples}): how many answers are tried is a whole number, 1 or more.")

    def loss(p: Predictions) -> Tensor:
        total = _total(p)  # -log p
        value, factor = _coverage(-total.detach().double(), samples)
        # the closed forms give value and gradient where the formula would round to log 0 or 0/0
        return (
            (value - factor * total.detach()).to(total.dtype) + factor.to(total.dtype) * total
        ).sum() / p.totals.sequences

    return objective(loss, name=f"coverage({samples})")


def coverage_factor(log_p: Float[Tensor, " row"], samples: int) -> Float[Tensor, " row"]:
    """F = N p (1-p)^(N-1) / (1 - (1-p)^N), in [0, 1]: by how much N tries shrink the gradient of a target of log-probability `log_p`.

    Source: arXiv 2502.07154.
    """
    return _coverage(log_p.double(), samples)[1].to(log_p.dtype)


def _coverage(log_p: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The loss and the factor, float64, for log p ≤ 0 from -inf to 0."""
    log_p = log_p.clamp(max=0)
    miss = torch.log1p(-log_p.exp())  # log(1 - p): -inf at p = 1
    hit = torch.log(-torch.expm1(samples * miss))  # log(1 - (1 - p)^N)
    rare = log_p < -30 - math.log(samples)  # there 1 - (1 - p)^N is N p to the last bit, also where p itself underflows
    hit = torch.where(rare, math.log(samples) + log_p, hit)
    others = (samples - 1) * miss if samples > 1 else torch.zeros_like(miss)
    return -hit, torch.exp(math.log(samples) + log_p + others - hit)


class Glow(Additive):
    """Gain-based loss weighting: a sequence counts by how little its loss has improved since it was last seen.

    With ℓ̄ the mean loss of its tokens, the weight is ``clamp(alpha * (1 - σ(beta * (ℓ̄_before - ℓ̄_now))), low, high)``, without
    gradient, and 1 where a sequence is seen for the first time: the first epoch is plain fine-tuning. Mean over the step's sequences
    of weight times ℓ̄, in nats.
    alpha, beta: above 0. The source names no defaults; its code mentions 3 and 10. low, high: bounds of the weight.

    What it remembers, one number a sequence, is of one run and goes into its checkpoints; the processes of a distributed run share it. Measuring
    without gradients leaves it as it is; in a trainer's evaluation, whose sequences have no past, every weight is 1.
    Source: "Learning from Mistakes: Negative Reasoning Samples Enhance Out-of-Domain Generalization".
    Differs: a sequence without a past has weight 1, where the code takes the batch's mean loss for its past, which would depend on how
    a batch is split.
    """

    def __init__(self, alpha: float = 3.0, beta: float = 10.0, *, low: float = 0.5, high: float = 5.0):
        if not (alpha > 0 and beta > 0 and 0 <= low <= high):
            raise ValueError(
                f"Glow(alpha={alpha}, beta={beta}, low={low}, high={high}): alpha and beta are above 0, and 0 <= low <= high."
            )
        self.alpha, self.beta, self.low, self.high = alpha, beta, low, high
        self.before: dict[int, float] = {}

    def __call__(self, p: Predictions, /) -> Tensor:
        means = _total(p) / p.per_row(p.weights)
        if not p.numbered and not torch.is_grad_enabled():
            return means.sum() / p.totals.sequences
        require_numbers("Glow", p.numbered)
        weights = self.weights(p.sample, means.detach())
        if torch.is_grad_enabled():
            self._remember(p.sample, means.detach())
        return (weights * means).sum() / p.totals.sequences

    def weights(self, sample: Int[Tensor, " row"], loss: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """What sequences with these numbers and these mean losses would count now."""
        before = torch.tensor([self.before.get(int(s), math.nan) for s in sample], dtype=loss.dtype, device=loss.device)
        weights = (self.alpha * torch.sigmoid(-self.beta * (before - loss))).clamp(self.low, self.high)
        return torch.where(before.isnan(), 1.0, weights)

    def _remember(self, sample: Tensor, loss: Tensor) -> None:
        seen = list(zip(sample.tolist(), loss.tolist(), strict=True))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, seen)
            seen = [one for theirs in everyone for one in theirs]
        self.before.update(seen)

    def state_dict(self) -> dict[str, Any]:
        """The mean loss of each sequence when it was last seen."""
        return {"sample": list(self.before), "loss": list(self.before.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.before = dict(zip(state["sample"], state["loss"], strict=True))

    def reset(self) -> None:
        """Forget all sequences."""
        self.before = {}

    def __repr__(self) -> str:
        return f"Glow(alpha={self.alpha:g}, beta={self.beta:g}, low={self.low:g}, high={self.high:g})"


# --- by the group -----------------------------------------------------------------------------------------------------


def aft(boundary: float | None = None, *, likelihood: float = 1.0) -> Additive:
    """Alignment fine-tuning: of the answers to one question, the better ones must score above the worse, but no further.

    A group holds the answers to a question; the column ``positive`` ranks them (1 and 0, or any grades: every pair with unequal grades is
    compared). An answer's score s is the mean log-probability of its tokens. The loss of a group is
    ``log(1 + Σ exp(s_worse - s_better))`` over its pairs, plus `likelihood` times the mean of -s over the answers of the best grade. In
    nats, mean over the step's groups.

    boundary: how worse answers are kept from being pushed down for ever. None: their scores have no gradient at all. A number B: each
              pair adds ``exp(T - s_worse)`` with ``T = 2 s* - 2 B - s_better``, s* the lowest score graded above the worse answer; the
              pull on a single worse answer then vanishes at s* - B, and is upwards below it. T has no gradient.
    likelihood: 0 or more; 0 leaves the ranking alone.
    Raises ValueError for a group whose answers all have the same grade.
    Source: Wang et al., "Making Large Language Models Better Reasoners with Alignment", arXiv 2309.02144.
    Differs: that T has no gradient is decided here; the likelihood is a mean over answers and not over all their tokens.
    """
    if likelihood < 0:
        raise ValueError(f"aft(likelihood={likelihood}): the weight of the likelihood is 0 or more.")

    def loss(p: Predictions) -> Tensor:
        scores, grades = -_total(p) / p.per_row(p.weights), _column(p, POSITIVE)
        shares = []
        for rows in _groups(p):
            s, grade = scores[rows], grades[rows]
            _refuse(p, rows, _nothing_to_rank)
            best = s[grade == grade.max()]
            shares.append(torch.log1p(_pairs(s, grade, boundary).sum()) - likelihood * best.mean())
        return torch.stack(shares).sum() / p.totals.groups

    settings = ", ".join(
        ([] if boundary is None else [f"{boundary:g}"]) + ([] if likelihood == 1 else [f"likelihood={likelihood:g}"])
    )
    return objective(loss, name=f"aft({settings})", columns=(POSITIVE,), grouped=True, fault=_nothing_to_rank)


def _pairs(s: Float[Tensor, " row"], grade: Float[Tensor, " row"], boundary: float | None) -> Float[Tensor, " pair"]:
    """What each pair of a better and a worse answer adds inside the logarithm."""
    better, worse = (grade[:, None] > grade[None, :]).nonzero(as_tuple=True)
    if boundary is None:
        return torch.exp(s.detach()[worse] - s[better])
    above = (
        torch.where(grade[:, None] > grade[None, :], s.detach()[:, None], torch.inf).min(0).values
    )  # s* of each worse answer
    stop = 2 * above[worse] - 2 * boundary - s.detach()[better]
    return torch.exp(s[worse] - s[better]) + torch.exp(stop - s[worse])


def dpo(beta: float = 0.1, *, per_token: bool = False) -> Additive:
    """Direct preference optimisation on pairs: ``-log σ(beta * ((chosen - its start) - (rejected - its start)))``, in nats.

    A group is two answers to one question, of which the column ``positive`` is larger for the chosen one; what is compared is the sum of the
    log-probabilities of an answer's learnt tokens under the model and under the starting model. Mean over the step's groups. ThinkPO is this
    with a long solution chosen and a short one rejected.
    beta: above 0. per_token: compare means instead of sums, so that length alone gives no margin.
    Raises ValueError for a group that is not two answers, one of them preferred.
    Source: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7; Yang et al., "Thinking Preference
    Optimization", arXiv 2502.13173.
    """
    if not beta > 0:
        raise ValueError(f"dpo({beta}): beta is above 0.")

    def loss(p: Predictions) -> Tensor:
        start = cross_entropy(_reference(p), p.targets, reduction="none")
        margin = p.per_row(p.weights * (start - p.nll))
        margin = margin / _learnt(p) if per_token else margin
        grades = _column(p, POSITIVE)
        _learnt(p)
        shares = []
        for rows in _groups(p):
            _refuse(p, rows, _not_a_pair)
            chosen, rejected = rows[grades[rows].argsort(descending=True)]
            shares.append(-logsigmoid(beta * (margin[chosen] - margin[rejected])))
        return torch.stack(shares).sum() / p.totals.groups

    name = f"dpo({beta:g}, per_token=True)" if per_token else f"dpo({beta:g})"
    return objective(loss, name=name, columns=(POSITIVE,), reference=True, grouped=True, fault=_not_a_pair)


def _nothing_to_rank(columns: Mapping[str, Sequence[float]]) -> str | None:
    grades = columns[POSITIVE]
    if len(set(grades)) > 1:
        return None
    return f"All of its {len(grades)} answers have {POSITIVE} = {grades[0]:g}: there is nothing to compare. Leave such groups out of the data."


def _not_a_pair(columns: Mapping[str, Sequence[float]]) -> str | None:
    grades = columns[POSITIVE]
    if len(grades) == 2 and grades[0] != grades[1]:
        return None
    return f"Its {POSITIVE} is {_listed(grades)}: dpo compares two answers, one of them preferred."


def _refuse(p: Predictions, rows: Tensor, judge: Callable[[Mapping[str, Sequence[float]]], str | None]) -> None:
    if wrong := judge({POSITIVE: _column(p, POSITIVE)[rows].tolist()}):
        raise ValueError(f"The group of sequences {_listed(p.sample[rows].tolist())}: {wrong}")


def _learnt(p: Predictions) -> Float[Tensor, " row"]:
    """The weight of each sequence's learnt tokens. Raises ValueError where one has none: its score would be that of certainty."""
    learnt = p.per_row(p.weights)
    if not bool((learnt > 0).all()):
        raise ValueError(
            f"Sequences {_listed(p.sample[learnt <= 0].tolist())} have no token to learn, so they have no score. Leave them out."
        )
    return learnt


def _total(p: Predictions) -> Float[Tensor, " row"]:
    """The negative log-likelihood of each sequence's learnt tokens."""
    _learnt(p)
    return p.per_row(p.weights * p.nll)


def _groups(p: Predictions) -> list[Int[Tensor, " row"]]:
    return [(p.group == g).nonzero().squeeze(1) for g in p.group.unique()]


def _column(p: Predictions, name: str) -> Float[Tensor, " row"]:
    if name not in p.columns:
        there = ", ".join(p.columns) or "none"
        raise ValueError(
            f"The objective needs the column {name!r} of the data; its columns are: {there}. Give Example(..., columns=...)."
        )
    return p.columns[name]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


# --- of the input -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedThought:
    """Masked thought: some of the tokens to learn are hidden in the input, while all of them stay to be predicted.

    Each learnt token is replaced by `mask_id` with a probability that rises linearly from 0 to `rate` over the first `warmup` of
    training and then stays. Prompts and labels are left alone, and so is the attention mask, where `mask_id` is the padding too.
    What is hidden depends on (seed, step, sequence) alone, not on the batch it is in.
    rate: in [0, 1]; the source uses 0.4 on GSM8K and 0.2 on larger mixtures. warmup: fraction of training, in [0, 1].
    Source: Chen et al., "Masked Thought", arXiv 2403.02178.
    """

    mask_id: int
    rate: float = 0.4
    warmup: float = 2 / 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rate <= 1 and 0 <= self.warmup <= 1):
            raise ValueError(f"{self}: rate and warmup are fractions in [0, 1].")

    def rate_at(self, step: int, steps: int) -> float:
        """The probability of hiding a token when `step` of `steps` optimizer steps are done."""
        rising = self.warmup * steps
        return self.rate * min(1.0, step / rising) if rising else self.rate

    def __call__(self, batch: dict[str, Tensor], step: int, steps: int, /) -> dict[str, Tensor]:
        """The same batch with other `input_ids`; the batch given is left as it is."""
        import numpy as np

        require_numbers("MaskedThought", "sample" in batch)
        ids, learnt = batch["input_ids"], (batch["labels"] != IGNORED).cpu()
        rate, hidden = self.rate_at(step, steps), torch.zeros(ids.shape, dtype=torch.bool)
        for i, sample in enumerate(batch["sample"].tolist()):
            at = learnt[i].nonzero().squeeze(1)
            draws = np.random.default_rng((self.seed, step, int(sample))).random(len(at))
            hidden[i, at[torch.from_numpy(draws < rate)]] = True
        return batch | {"input_ids": torch.where(hidden.to(ids.device), self.mask_id, ids)}
