"""Verifiable rewards: small callables ``(question, transcript) -> number``, higher is better, or None to abstain.

    reward = Weighted({"answer": (Answer(grade), 1.0), "format": (ThinkFormat(), 0.1), "length": (Overlong(256, 64), 0.5)})

`question` is whatever `finetune.grpo.grpo` was given as one: a text, or an object that has the text as ``question``. A grader says
whether a transcript answers it: True, False, or None where there is no answer (``analyses.tasks.grade`` is one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from surgery.transcript import THINK, Markers, Transcript, opens_thinking

Grader = Callable[[Any, Transcript], bool | None]


@runtime_checkable
class Reward(Protocol):
    """What a completion is worth; None abstains: the completion then counts neither in its group's mean nor in its deviation, and has no
    advantage. Its tokens stay among those that the loss is averaged over, and the KL, where it has a weight, acts on them."""

    def __call__(self, question: Any, transcript: Transcript, /) -> float | None: ...


@dataclass(frozen=True)
class Answer:
    """Whether the answer is right: `right`, `wrong`, or `missing` where there is none (None abstains).

    ``Answer(grade, wrong=0.1)`` is the three-level reward of ReFT: 1 right, 0.1 an answer but wrong, 0 none.

    Source: Luong et al., "ReFT: Reasoning with Reinforced Fine-Tuning", arXiv 2401.08967, section 3.2 (three levels).
    """

    grader: Grader
    right: float = 1.0
    wrong: float = 0.0
    missing: float | None = 0.0

    def __call__(self, question: Any, transcript: Transcript) -> float | None:
        grade = self.grader(question, transcript)
        return self.missing if grade is None else self.right if grade else self.wrong


@dataclass(frozen=True)
class ThinkFormat:
    """1 where the completion opens its thinking at once, closes it, each marker once, and has text in the thinking and an answer after
    it; else 0. After a prompt that ends in the opening marker the completion has none of its own.

    Source: DeepSeek-AI, "DeepSeek-R1", arXiv 2501.12948, section 2.2.2 (format reward).
    """

    markers: Markers = THINK

    def __call__(self, question: Any, transcript: Transcript) -> float:
        text = transcript.completion or ""
        if opens_thinking(transcript.prompt or "", self.markers):
            text = self.markers.open + text
        once = text.count(self.markers.open) == text.count(self.markers.close) == 1
        body = text.removeprefix(self.markers.open)
        return float(once and body != text and bool(transcript.thinking) and bool(transcript.answer))


@dataclass(frozen=True)
class NearLength:
    """How near a span is to `target` tokens: ``-min(1, |n - target| / target)``, in [-1, 0]. A span that is missing has no tokens: -1,
    so that leaving the thinking out is worth no more than the worst length of it.

    Source: Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", arXiv 2503.04697, equation 1 (its length term).
    Differs: relative to the target, and bounded, so that one long completion does not outweigh the answers of a whole group.
    """

    target: int
    over: str = "thinking"

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"NearLength({self.target}): a target is 1 token or more.")

    def __call__(self, question: Any, transcript: Transcript) -> float:
        n = _tokens(transcript, self.over) or 0
        return -min(1.0, abs(n - self.target) / self.target)


@dataclass(frozen=True)
class CosineLength:
    """Right answers are worth more when short, wrong ones cost less when long: half a cosine between the values at no length and at
    `longest` tokens.

    right, wrong: values at length 0 and at `longest`; no answer counts as wrong. beyond: the value from `longest` on, whatever the answer;
    None takes that at `longest`. over: the span whose tokens are counted; abstains where it is missing.

    Source: Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373, section 4.2: ``a + (b - a)
    (1 + cos(pi n / N)) / 2`` with a the value at N and b the value at 0. Differs: default values are those of TRL's cosine-scaled reward.
    """

    grader: Grader
    longest: int
    right: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)
    beyond: float | None = None
    over: str = "completion"

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"CosineLength(longest={self.longest}): a length is 1 token or more.")

    def __call__(self, question: Any, transcript: Transcript) -> float | None:
        n = _tokens(transcript, self.over)
        if n is None:
            return None
        if n >= self.longest and self.beyond is not None:
            return self.beyond
        start, end = self.right if self.grader(question, transcript) else self.wrong
        return end + (start - end) * (1 + math.cos(math.pi * min(n, self.longest) / self.longest)) / 2


@dataclass(frozen=True)
class Overlong:
    """0 up to ``longest - buffer`` tokens of completion, then falling evenly to -1 at `longest` and beyond.

    Source: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476, equation 13.
    """

    longest: int
    buffer: int

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.longest:
            raise ValueError(f"Overlong({self.longest}, {self.buffer}): the buffer is 1 up to longest tokens.")

    def __call__(self, question: Any, transcript: Transcript) -> float:
        surplus = (_tokens(transcript, "completion") or 0) - (self.longest - self.buffer)
        return -min(1.0, max(0, surplus) / self.buffer)


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of rewards by name. A part that abstains adds nothing; where all that have a weight abstain, so does the sum.

    parts: name -> (reward, weight); weight 0 only measures. Raises ValueError for weights that are not finite, or all 0.
    """

    parts: Mapping[str, tuple[Reward, float]]

    def __post_init__(self) -> None:
        weights = {name: weight for name, (_, weight) in self.parts.items()}
        if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
            raise ValueError(f"Weights {weights}: finite numbers, and one that is not 0 at least.")

    def each(self, question: Any, transcript: Transcript) -> dict[str, float | None]:
        """Every part's own value, without its weight."""
        return {name: reward(question, transcript) for name, (reward, _) in self.parts.items()}

    def total(self, values: Mapping[str, float | None]) -> float | None:
        """The sum of values that `each` gave."""
        weights = {name: weight for name, (_, weight) in self.parts.items() if weight}
        given = [weight * value for name, weight in weights.items() if (value := values[name]) is not None]
        return sum(given) if given else None

    def __call__(self, question: Any, transcript: Transcript) -> float | None:
        return self.total(self.each(question, transcript))


def described(reward: Any) -> str:
    """A reward in words that are the same in every process: its class and settings, functions by name."""
    if isinstance(reward, Mapping):
        return "{" + ", ".join(f"{name}: {described(value)}" for name, value in reward.items()) + "}"
    if isinstance(reward, tuple):
        return "(" + ", ".join(map(described, reward)) + ")"
    if is_dataclass(reward) and not isinstance(reward, type):
        settings = ", ".join(f"{f.name}={described(getattr(reward, f.name))}" for f in fields(reward))
        return f"{type(reward).__name__}({settings})"
    if callable(reward):
        return f"{reward.__module__}.{getattr(reward, '__qualname__', type(reward).__qualname__)}"
    return repr(reward)


def _tokens(transcript: Transcript, over: str) -> int | None:
    begin, end = transcript.spans.get(over, (0, None))
    return None if end is None else end - begin
