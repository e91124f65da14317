"""Objectives: what a training step minimises. Each is a function `Predictions -> scalar`, the micro-batch's share of the step's loss.

An objective divides by the totals of the whole optimizer step, so that it does not matter how a batch is split. Objectives add up like
numbers: ``lambda p: nll(p) + 0.1 * kl_to_base(p)``.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from finetune.predictions import Predictions


@runtime_checkable
class Objective(Protocol):
    """A function of predictions. It may also have, as attributes: `columns` (names of the columns that the data must have), `reference`
    (true where it asks for the starting model's logits), `grouped` (true where the data must be groups), and `state_dict` and
    `load_state_dict`, which go into checkpoints."""

    def __call__(self, p: Predictions, /) -> Tensor: ...


def nll(p: Predictions) -> Tensor:
    """Weighted mean of the negative log-likelihood of the learnt tokens, in nats: plain supervised fine-tuning."""
    return (p.weights * p.nll).sum() / p.totals.tokens
