"""Prerequisite learning (arXiv 2410.19290) restated densely, for tests: W + 2 B_k A_k + 2 B A as whole matrices, plain AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]


def train(
    module: Any,
    names: Sequence[str],
    transposed: bool,
    batches: Sequence[tuple[str, Sequence[tuple[Sequence[int], Sequence[float]]]]],
    frozen: Mapping[str, Sequence[Pair]],
    start: Sequence[Tensor],
    lr: float,
) -> tuple[list[Pair], list[float]]:
    """One stage: minimise the NLL of each batch's learnt tokens over one adapter, the batch's frozen version (if any) in place.

    batches: version and rows of (ids, token weights). start: A of each matrix; B begins at zero. alpha is twice the rank, so the
    product counts double.
    """
    weights = {name: p.detach() for name, p in module.named_parameters()}
    pairs = []
    for name, down in zip(names, start, strict=True):
        out = weights[name + ".weight"].shape[1 if transposed else 0]
        pairs.append((down.clone().requires_grad_(), torch.zeros(out, len(down)).requires_grad_()))
    optimizer = torch.optim.AdamW([t for pair in pairs for t in pair], lr=lr, weight_decay=0.0)
    losses = []
    for step, (version, rows) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(batches))
        moved = dict(weights)
        for i, name in enumerate(names):
            change = sum(2 * B @ A for A, B in [pairs[i], *([frozen[version][i]] if version in frozen else [])])
            moved[name + ".weight"] = weights[name + ".weight"] + (change.T if transposed else change)
        nats, count = torch.zeros(()), 0.0
        for ids, token_weights in rows:
            out = torch.func.functional_call(module, moved, (torch.tensor([list(ids)]),))
            logs = out.logits[0].log_softmax(-1)
            for t in range(1, len(ids)):
                if token_weights[t]:
                    nats = nats - token_weights[t] * logs[t - 1, ids[t]]
                    count += token_weights[t]
        loss = nats / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([t for pair in pairs for t in pair], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return [(A.detach(), B.detach()) for A, B in pairs], losses
