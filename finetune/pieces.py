"""A backward pass in pieces: no weight keeps its gradient back until another pass through it has given its own.

Autograd hands over the gradient of a weight when all that was computed with it has gone backward. Where a step goes through the model more than
once, for the prompt that all rows begin with and then for the rows, the dense gradients of all weights exist together by then, although whoever
takes them may want one at a time (`finetune.lift`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PIECES: ContextVar[bool] = ContextVar("pieces", default=False)


@contextmanager
def in_pieces(allowed: bool) -> Iterator[None]:
    """What is computed within goes backward in pieces, where `allowed`: a trainer says it around its loss."""
    token = _PIECES.set(allowed)
    try:
        yield
    finally:
        _PIECES.reset(token)


def are_pieces() -> bool:
    """Whether what is computed now goes backward in pieces."""
    return _PIECES.get()


class _Apart(torch.autograd.Function):
    """What lies before it goes backward in a pass of its own, begun where the gradients of all that is behind have arrived."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.before = before
        return tuple(tensor.detach() for tensor in before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        there = [(t, gradient) for t, gradient in zip(ctx.before, gradients, strict=True) if gradient is not None]
        torch.autograd.backward([t for t, _ in there], [gradient for _, gradient in there])
        return None, None


def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, before which `backward` goes on by itself once it has all their gradients: a backward pass of its own, in which weights
    get more of their gradients. What has no gradient is given back as it is.

    For one `backward` that fills in ``.grad``. torch.autograd.grad of what lies before, and a second pass over a graph that was kept, end here.
    """
    before = [tensor for tensor in tensors if tensor.requires_grad]
    if not before:
        return list(tensors)
    anchor = torch.empty(0, device=before[0].device, requires_grad=True)  # by which the outputs have gradients
    after = dict(zip(map(id, before), _Apart.apply(anchor, before), strict=True))
    return [after.get(id(tensor), tensor) for tensor in tensors]


def cut_cache(cache: Any) -> None:
    """`cut` for the keys and values of a KV cache."""
    found = iter(cut([tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]))
    for layer in cache.layers:
        layer.keys, layer.values = next(found), next(found)


def may_cut(module: nn.Module, gathered: Sequence[Tensor]) -> bool:
    """Whether nobody sees that a weight's gradient arrives in pieces: what looks at it must add up. gathered: weights whose one hook does."""
    adding = {id(p) for p in gathered}
    return not any(
        p._backward_hooks or len(p._post_accumulate_grad_hooks or ()) > (id(p) in adding) for p in module.parameters()
    )
