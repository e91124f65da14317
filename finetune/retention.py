"""Keeping what a model knew while it learns something else: losses beside the objective, added once an optimizer step.

Each is a term ``(module, step) -> scalar`` for `tune(terms=[...])` and `finetune.hosts.Surgical`; ``step`` optimizer steps are done.

BehaviourCloning  KL(π_0 ‖ π) on texts of the source
Kickstarting      KL(π ‖ π_0) on what the learner itself says to the source's questions, fading
EWC               a spring on every weight, as stiff as the weight mattered to the source
Replay            the source's own loss

Source: Wołczyk et al., "Fine-tuning Reinforcement Learning Models is Secretly a Forgetting Mitigation Problem", arXiv 2402.02868, which
    compares the four. Their coefficients are not those of language models: each weight here is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from finetune.checkpoints import digest
from finetune.examples import Collate, Example, Group, Item, Over, examples, rows_of
from finetune.objectives import kl_divergence
from finetune.pieces import are_pieces
from finetune.predictions import Predictions, predict
from surgery.borrowing import evaluating
from surgery.hashing import Digest
from surgery.model import Model
from surgery.seeds import seed_from_numbers
from surgery.sites import Patterns, match
from surgery.tensorfile import save_whole

_FISHER, _START = "fisher.", "start."


class BehaviourCloning:
    """`weight` times the mean over tokens of KL(π_0 ‖ π), in nats: on texts of the source, say what the starting model said.

    start:      the starting model: a second copy, which nobody trains. source: transcripts, or examples with weights of their own.
    over:       the span whose tokens are compared. batch_size: texts a step, drawn without repetition until all were seen; what step
                s draws depends on (seed, s) alone, so that a resumed run goes on as it would have.
    Raises ValueError for a weight that is not above 0, for sources without the span, and, when called, where `start` shares parameters
    with the module that trains.
    """

    def __init__(
        self, start: Model, source: Sequence[Item], *, weight: float = 1.0, over: Over = "completion", batch_size: int = 8, seed: int = 0
    ):  # fmt: skip
        self._start, self._weight = start, _positive(self, weight)
        self._texts = _Texts(source, over, batch_size, seed)

    def __call__(self, module: nn.Module, step: int, /) -> Float[Tensor, ""]:
        now, then = _both(module, self._start, self._texts.batch(step))
        return self._weight * _mean(now, kl_divergence(then.logits, now.logits))

    def __repr__(self) -> str:
        return f"BehaviourCloning({self._texts!r}, weight={self._weight:g})"


class Kickstarting:
    """`weight` times the mean over tokens of KL(π ‖ π_0), in nats, on answers that the learner gives to the source's questions.

    learner:    the model that trains; it generates `batch_size` answers of at most `max_new_tokens` tokens in every step, by (seed, step)
                and its weights alone. That costs as much as generating does.
    start:      the starting model: a second copy, which nobody trains.
    until:      the weight falls linearly to 0 over so many steps, and nothing is generated from then on; None keeps it.
    Raises ValueError for a weight that is not above 0 and, when called, where `start` shares parameters with the module that trains or
    `learner` does not.
    Source: Schmitt et al., "Kickstarting Deep Reinforcement Learning", arXiv 1803.03835.
    """

    def __init__(
        self, learner: Model, start: Model, questions: Sequence[str], *, weight: float = 1.0, until: int | None = None,
        batch_size: int = 8, max_new_tokens: int = 64, temperature: float = 1.0, seed: int = 0,
    ):  # fmt: skip
        if not questions:
            raise ValueError("There are no questions to ask the learner.")
        if until is not None and until < 1:
            raise ValueError(f"until={until}: the weight falls to 0 over 1 or more steps, or None keeps it.")
        self._learner, self._start, self._questions = learner, start, list(questions)
        self._weight, self._until = _positive(self, weight), until
        self._batch_size, self._length, self._heat, self._seed = batch_size, max_new_tokens, temperature, seed

    def __call__(self, module: nn.Module, step: int, /) -> Float[Tensor, ""]:
        if not _shared(module, self._learner.module):
            raise ValueError("Kickstarting's learner is not the model that trains: give the one that is tuned.")
        weight = self.weight_at(step)
        if not weight:
            return torch.zeros((), device=next(module.parameters()).device)
        batch = Collate(0)(rows_of(examples(self.answers(step))))
        now, then = _both(module, self._start, batch)
        return weight * _mean(now, kl_divergence(now.logits, then.logits))

    def weight_at(self, step: int) -> float:
        """The weight when `step` optimizer steps are done."""
        return self._weight if self._until is None else self._weight * max(0.0, 1 - step / self._until)

    def answers(self, step: int) -> list[Any]:
        """What the learner, as it now is, says in this step: transcripts."""
        asked = [self._questions[i] for i in drawn(len(self._questions), self._batch_size, self._seed, step)]
        draw = seed_from_numbers(self._seed, step)
        with evaluating(self._learner.module):
            said = self._learner.generate(asked, temperature=self._heat, seed=draw, max_new_tokens=self._length)
        torch.clear_autocast_cache()  # some versions of torch would give the pass that learns these casts, which have no gradient
        return said

    def __repr__(self) -> str:
        return (
            f"Kickstarting(<{len(self._questions)} questions, {digest(self._questions)}>, weight={self._weight:g}, until={self._until}, batch_size={self._batch_size}, "
            f"max_new_tokens={self._length}, temperature={self._heat:g}, seed={self._seed})"
        )


class Replay:
    """`weight` times the mean negative log-likelihood, in nats per token, of texts of the source: they are trained on as well.

    Arguments and errors are those of `BehaviourCloning`, without a starting model.
    """

    def __init__(
        self, source: Sequence[Item], *, weight: float = 1.0, over: Over = "completion", batch_size: int = 8, seed: int = 0
    ):  # fmt: skip
        self._weight, self._texts = _positive(self, weight), _Texts(source, over, batch_size, seed)

    def __call__(self, module: nn.Module, step: int, /) -> Float[Tensor, ""]:
        p = predict(module, _moved(self._texts.batch(step), module), pieces=are_pieces())
        return self._weight * _mean(p, p.nll)

    def __repr__(self) -> str:
        return f"Replay({self._texts!r}, weight={self._weight:g})"


class EWC:
    """Elastic weight consolidation: ``weight / 2 · Σ F_i (θ_i - θ0_i)²`` over the weights that `fisher` watches and that train.

    Raises ValueError for a weight that is not above 0 and, when called, where a watched parameter is not there, has another shape, or where
    none of them trains (an adapter trains others).
    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, equation 3.
    """

    def __init__(self, fisher: Fisher, *, weight: float = 1.0):
        self._fisher, self._weight = fisher, _positive(self, weight)

    def __call__(self, module: nn.Module, step: int, /) -> Float[Tensor, ""]:
        own = {
            name.replace(".base_layer.", "."): p for name, p in module.named_parameters()
        }  # PEFT's name beside an adapter
        shares = []
        for name, importance in self._fisher.diagonal.items():
            if name not in own or own[name].shape != importance.shape:
                there = f"has shape {tuple(own[name].shape)}" if name in own else "is not there"
                raise ValueError(
                    f"EWC watches {name} of shape {tuple(importance.shape)}, which {there} in the model that trains."
                )
            if own[name].requires_grad:
                start, importance = self._fisher.start[name].to(own[name].device), importance.to(own[name].device)
                shares.append((importance * (own[name].float() - start).square()).sum())
        if not shares:
            raise ValueError(
                "None of the parameters that EWC watches trains: it holds weights, not the adapter beside them."
            )
        return self._weight / 2 * torch.stack(shares).sum()

    def __repr__(self) -> str:
        return f"EWC({self._fisher!r}, weight={self._weight:g})"


@dataclass(frozen=True, repr=False)
class Fisher:
    """How much each weight mattered to a source: the diagonal of the Fisher information, and the weights it was measured at.

    start, diagonal: by parameter name, float32; the diagonal is 0 or more. sequences: over how many it is the mean.
    """

    start: Mapping[str, Tensor]
    diagonal: Mapping[str, Tensor]
    sequences: int

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        tensors = {_START + n: t for n, t in self.start.items()} | {_FISHER + n: t for n, t in self.diagonal.items()}
        save_whole(path, tensors, {"sequences": str(self.sequences)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """Read what `save` wrote. Raises ValueError for another kind of file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors, about = {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
        if "sequences" not in about:
            raise ValueError(f"{path} holds no Fisher information: write one with fisher_diagonal(...).save(path).")

        def of(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        return cls(of(_START), of(_FISHER), int(about["sequences"]))

    def __repr__(self) -> str:
        sums = Digest()
        for name in sorted(self.diagonal):
            sums.update(
                f"{name} {float(self.diagonal[name].double().sum())!r} {float(self.start[name].double().sum())!r}".encode()
            )
        return f"<Fisher: {len(self.diagonal)} tensors, {self.sequences} sequences, {sums.hexdigest()[:16]}>"


def fisher_diagonal(
    model: Model, source: Sequence[Item], *, over: Over = "completion", at: Patterns | None = None,
    sampled: bool = False, seed: int = 0, progress: bool = False,
) -> Fisher:  # fmt: skip
    """The mean over sequences of the squared gradient of their log-likelihood, one number a weight; a sequence in memory at a time.

    The log-likelihood is the sum over a sequence's learnt tokens, by their weights.
    at:      patterns of the sites to watch; None is every parameter. Two float32 copies of what is watched are kept.
    sampled: False takes the tokens of the source (the empirical Fisher). True draws each from the model's own prediction there, text before
             it being the source's: the Fisher information itself, in expectation. Draws of sequence i depend on (seed, i).
    Raises ValueError for sources without the span and patterns that match nothing. The model is afterwards as before.
    """
    from tqdm.auto import tqdm

    groups, watched = examples(source, over), _watched(model, at)
    diagonal = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in watched.items()}
    sequences = [member for group in groups for member in group]
    with evaluating(model.module), _differentiable(watched.values()):
        for i, example in enumerate(tqdm(sequences, desc="fisher", disable=not progress, leave=False)):
            p = predict(model.module, _moved(Collate(0)(rows_of([(example,)])), model.module))
            likelihood = -(p.weights * (_drawn(p, (seed, i)) if sampled else p.nll)).sum()
            for name, gradient in zip(
                watched, torch.autograd.grad(likelihood, list(watched.values()), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    diagonal[name] += gradient.float().square() / len(sequences)
    start = {name: p.detach().float().clone() for name, p in watched.items()}
    return Fisher(start, diagonal, len(sequences))


def drawn(count: int, size: int, seed: int, step: int) -> list[int]:
    """Which of `count` items step `step` takes, `size` of them: in a new order every time all have been seen."""
    orders: dict[int, np.ndarray] = {}
    found = []
    for place in range(step * size, (step + 1) * size):
        turn, at = divmod(place, count)
        if turn not in orders:
            orders[turn] = np.random.default_rng((seed, turn)).permutation(count)
        found.append(int(orders[turn][at]))
    return found


class _Texts:
    """Examples in batches by the step."""

    def __init__(self, source: Sequence[Item], over: Over, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least one text a step.")
        self.groups: list[Group] = [(e,) for group in examples(source, over) for e in group]
        self._batch_size, self._seed = min(batch_size, len(self.groups)), seed

    def batch(self, step: int) -> dict[str, Tensor]:
        chosen: list[tuple[Example, ...]] = [
            self.groups[i] for i in drawn(len(self.groups), self._batch_size, self._seed, step)
        ]
        return Collate(0)(rows_of(chosen))

    def __repr__(self) -> str:
        known = digest([(e.transcript.ids, e.weights) for (e,) in self.groups])
        return f"<{len(self.groups)} texts, {known}>, batch_size={self._batch_size}, seed={self._seed}"


def _both(module: nn.Module, start: Model, batch: dict[str, Tensor]) -> tuple[Predictions, Predictions]:
    if _shared(module, start.module):
        raise ValueError("The starting model is the one that trains. Give a second copy of it: Model.load(...).")
    with torch.no_grad(), evaluating(start.module):
        then = predict(start.module, _moved(batch, start.module))
    now = predict(module, _moved(batch, module), pieces=are_pieces())
    return now, replace(then, raw=then.raw.to(now.raw.device))


def _mean(p: Predictions, values: Tensor) -> Tensor:
    return (p.weights * values).sum() / p.weights.sum()


def _drawn(p: Predictions, seed: tuple[int, int]) -> Tensor:
    """The negative log-likelihood of tokens drawn from the predictions themselves."""
    generator = torch.Generator().manual_seed(seed_from_numbers(*seed))
    chances = p.logits.detach().softmax(-1).cpu()
    tokens = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(p.logits.device)
    return torch.nn.functional.cross_entropy(p.logits, tokens, reduction="none")


def _watched(model: Model, at: Patterns | None) -> dict[str, nn.Parameter]:
    parameters = dict(model.module.named_parameters())
    if at is None:
        return parameters
    chosen = {id(model.weights.parameter(site.whole)) for site in match(at, model.weights)}
    return {name: p for name, p in parameters.items() if id(p) in chosen}


def _shared(one: nn.Module, other: nn.Module) -> bool:
    theirs = {id(p) for p in other.parameters()}
    return any(id(p) in theirs for p in one.parameters())


def _moved(batch: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    device = next(module.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _positive(term: object, weight: float) -> float:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(
            f"{type(term).__name__}(weight={weight}): the weight is above 0; leave the term out instead of weighting it 0."
        )
    return weight


@contextmanager
def _differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters for a while."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, needed in before:
            p.requires_grad_(needed)
