"""ThinkEdit as its paper states it, step by step and on one example at a time: every token's output of every head is formed.

Source: arXiv 2503.22048 and its released code: direction, ranking of heads, edit. Llama-like modules only; lengths are counts of thinking tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def taps(module, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """One example's residual after attention, ``[token, H]`` a layer, and input of the output projection, ``[token, heads * d]`` a layer."""
    after, inputs, hooks = {}, {}, []
    for index, layer in enumerate(module.model.layers):
        hooks += [
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, index=index: after.update({index: args[0][0].clone()})
            ),
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, index=index: inputs.update({index: args[0][0].clone()})
            ),
        ]
    try:
        with torch.no_grad():
            module(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [after[i] for i in sorted(after)], [inputs[i] for i in sorted(inputs)]


def direction(module, examples: Sequence[tuple[Sequence[int], int, int]], *, short: int, long: int) -> Tensor:
    """``v_l = mean over long of a_l(e) - mean over short of a_l(e)``, ``[layer, H]``: the length direction.

    examples: (ids, start, end) with the thinking's half-open token span; ``a_l(e)`` is the mean of the residual after attention over
    positions start - 1 to end - 2. Short: fewer than `short` tokens of thinking; long: more than `long`.
    """
    means: dict[bool, list[Tensor]] = {True: [], False: []}
    for ids, start, end in examples:
        if end - start < short or end - start > long:
            streams, _ = taps(module, ids)
            means[end - start > long].append(torch.stack([a[start - 1 : end - 1].double().mean(0) for a in streams]))
    return torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)


def scores(module, examples: Sequence[tuple[Sequence[int], int, int]], v: Tensor, *, short: int) -> Tensor:
    """``s_lj = mean over short examples of < mean_t W_o[:, j] z_tj , -v_l / |v_l| >``, ``[layer, head]``: what ranks heads."""
    heads, width = module.config.num_attention_heads, module.config.head_dim
    found = []
    for ids, start, end in examples:
        if end - start >= short:
            continue
        _, inputs = taps(module, ids)
        outputs = []  # [token, head, H] of every layer
        for index, layer in enumerate(module.model.layers):
            z = inputs[index][start - 1 : end - 1].view(-1, heads, width)
            W = layer.self_attn.o_proj.weight.detach()
            outputs.append(torch.stack([z[:, j] @ W[:, j * width : (j + 1) * width].T for j in range(heads)], dim=1))
        units = [-v[index] / v[index].norm() for index in range(len(v))]
        rows = [
            torch.stack([c[:, j].mean(0) @ u.to(c) for j in range(heads)]) for c, u in zip(outputs, units, strict=True)
        ]
        found.append(torch.stack(rows).double())
    return torch.stack(found).mean(0)


def top(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs of the highest scores, the highest first."""
    order = torch.argsort(scores.flatten(), descending=True, stable=True)[:count]
    return [divmod(int(i), scores.shape[1]) for i in order]


def edited(W: Tensor, v: Tensor, heads: Sequence[int], width: int, strength: float = 1.0) -> Tensor:
    """``A <- A (I - w u u^T)`` with ``A = W_o[:, j]^T`` and ``u = -v / |v|``, head by head: the edit."""
    W, u = W.clone().float(), (-v / v.norm()).float()
    for j in heads:
        A = W[:, j * width : (j + 1) * width].T
        W[:, j * width : (j + 1) * width] = (A - strength * torch.outer(A @ u, u)).T
    return W
