"""The group relative policy gradient, restated literally: one completion at a time, no padding, no cache, no batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def advantages(rewards: list[list[float | None]], scale: str) -> list[list[float]]:
    """Â_i = (r_i - mean(r)) / std(r) of DeepSeekMath (arXiv 2402.03300), section 4.1.2, with TRL's 1e-4 beside the deviation; 0 where
    the reward is missing, which then counts nowhere."""
    everything = torch.tensor([r for group in rewards for r in group if r is not None])
    found = []
    for group in rewards:
        given = torch.tensor([r for r in group if r is not None])
        spread = {"group": lambda g: g.std(), "batch": lambda g: everything.std(), "none": lambda g: None}[scale](given)
        row = []
        for r in group:
            if r is None:
                row.append(0.0)
                continue
            centred = r - float(given.mean())
            row.append(centred if spread is None else centred / (float(spread) + 1e-4))
        found.append(row)
    return found


def log_probabilities(module: Any, ids: list[int], start: int, temperature: float) -> Tensor:
    """log π(o_t | q, o_<t) of every token from `start` on."""
    logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / temperature
    return torch.stack([logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids))])


def loss(
    module: Any, reference: Any, completions: list[tuple[list[int], int]], advantage: list[float], *, kind: str, beta: float,
    temperature: float, longest: int,
) -> Tensor:  # fmt: skip
    """-J of equation 3, on-policy (the ratio is π / sg(π)), its KL of equation 4; and how the other losses average over tokens.

    completions: token ids of prompt and completion, and where the completion begins.
    """
    terms = []
    for (ids, start), a in zip(completions, advantage, strict=True):
        logs = log_probabilities(module, ids, start, temperature)
        ratio = torch.exp(logs - logs.detach())
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        with torch.no_grad():
            other = log_probabilities(reference, ids, start, temperature)
        kl = ratio * (
            torch.exp(other - logs) - (other - logs) - 1
        )  # the ratio: DeepSeek-V3.2 (arXiv 2512.02556), section 3.1
        terms.append(-(surrogate - beta * kl))
    if kind == "grpo":
        return torch.stack([t.mean() for t in terms]).mean()
    tokens = torch.cat(terms)
    return tokens.sum() / (len(terms) * longest if kind == "dr_grpo" else len(tokens))
