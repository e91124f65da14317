"""What of a parameter one process steps on, where an engine has dealt it out: rows of it (FSDP2), or flat pieces (DeepSpeed's ZeRO).

Whatever the engine, a share is some consecutive entries of the parameter in row-major order, with their gradient, reduced, before a step.
Norms and inner products of whole tensors are sums over shares; nothing is put together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from finetune.distributed import Shards, is_partitioned, is_sharded, local_part


@dataclass(frozen=True)
class Share(ABC):
    """Entries `begin` to ``begin + count`` of a parameter, flat, that is dealt out, or was and is whole again; other processes of `group` have the rest.

    whole: the parameter's shape. writes: whether the weights can be written to through `values`.
    """

    writes: ClassVar[bool] = False

    parameter: Any
    group: Any
    whole: torch.Size
    begin: int
    count: int

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Whether this process has the rest as well by now."""

    def again(self, name: str, parameter: Any) -> Share:
        """The same entries of the parameter that has taken the place of this one: dealt out anew, or whole. All processes call this.

        Raises ValueError where this process has others of it.
        """
        share = share_of(name, parameter) or replace(self, parameter=parameter)
        if (share.whole, share.begin, share.count) != (self.whole, self.begin, self.count):
            raise ValueError(
                f"{name} is dealt out in another way than before: here are {share.count} entries from {share.begin} on, before {self.count} "
                f"from {self.begin} on. Make anew what looks at it."
            )
        return share

    def values(self) -> Float[Tensor, " count"]:
        """What the optimizer steps on, or stepped on."""
        if self.is_whole:
            return self.parameter.detach().reshape(-1)[self.begin : self.begin + self.count]
        return self._dealt()

    @abstractmethod
    def _dealt(self) -> Float[Tensor, " count"]:
        """`values` while the parameter is dealt out."""

    @abstractmethod
    def gradient(self) -> Float[Tensor, " count"] | None:
        """The reduced gradient that the optimizer will meet; None without one. What is written to it counts after `put_gradient_`."""

    def put_gradient_(self, gradient: Float[Tensor, " count"]) -> None:
        """Have the optimizer meet this gradient: the one that `gradient` gave, changed in place."""
        there = self.gradient()
        if there is not None and there.data_ptr() != gradient.data_ptr():
            there.copy_(gradient)

    def total(self, numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sums over the processes, all of which call this."""
        summed = numbers.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def sum(self, number: float) -> float:
        """`total` of one number."""
        return float(self.total(torch.tensor(number, dtype=torch.float64, device=self.parameter.device)))


class Rows(Share):
    """Of a DTensor sharded by rows, as ``fully_shard`` makes it."""

    writes = True

    @property
    def is_whole(self) -> bool:
        return not is_sharded(self.parameter)

    def _dealt(self) -> Float[Tensor, " count"]:
        return local_part(self.parameter.detach()).reshape(-1)

    def gradient(self) -> Float[Tensor, " count"] | None:
        grad = self.parameter.grad
        return None if grad is None else local_part(grad).reshape(-1)


class Fragment(Share):
    """At ZeRO stages 1 and 2: the part of a parameter that falls into this process's piece of all parameters in a row; perhaps none."""

    @property
    def is_whole(self) -> bool:
        return not hasattr(self.parameter, "_hp_mapping")

    def _dealt(self) -> Float[Tensor, " count"]:
        here = self.parameter._hp_mapping
        return self.parameter.new_empty(0) if here is None else here.get_hp_fragment()

    def gradient(self) -> Float[Tensor, " count"] | None:
        here = self.parameter._hp_mapping
        if here is None:
            return self.parameter.new_empty(0)
        return here.get_lp_grad_fragment(self.parameter._index_in_param_group).view(-1)


class Partition(Share):
    """At ZeRO stage 3: an equal part of every parameter, the last one filled up."""

    @property
    def is_whole(self) -> bool:
        return not is_partitioned(self.parameter)

    def _dealt(self) -> Float[Tensor, " count"]:
        p = self.parameter
        own = p._z3_optimizer.get_local_fp32_param(p) if p.requires_grad else p.ds_tensor
        return own.detach().view(-1)[: self.count]

    def gradient(self) -> Float[Tensor, " count"] | None:
        return self._padded()[: self.count] if self.parameter.requires_grad else None

    def put_gradient_(self, gradient: Float[Tensor, " count"]) -> None:
        padded = self._padded()
        padded[: self.count] = gradient
        self.parameter._z3_optimizer.set_local_grad_for_param(padded, self.parameter)

    def _padded(self) -> Tensor:
        return self.parameter._z3_optimizer.get_local_fp32_grad_for_param(self.parameter).view(-1)


def share_of(name: str, parameter: Any) -> Share | None:
    """This process's share of a parameter; None where it has it all. All processes call this, in the same order.

    Raises ValueError for a DTensor that is not sharded by rows.
    """
    if is_sharded(parameter):
        shards, mine = Shards.of(name, parameter), local_part(parameter.detach())
        width = parameter.shape[1:].numel()
        first = shards.before(len(mine), mine.device)
        return Rows(parameter, shards.group, parameter.shape, first * width, mine.numel())
    if is_partitioned(parameter):
        count, shape = parameter.ds_tensor.ds_numel, parameter.ds_shape
        begin = dist.get_rank(parameter.ds_process_group) * count
        here = max(0, min(count, shape.numel() - begin))
        return Partition(parameter, parameter.ds_process_group, shape, begin, here)
    if hasattr(parameter, "_hp_mapping"):
        here = parameter._hp_mapping
        begin, count = (0, 0) if here is None else (here.lp_fragment_address.start, here.lp_fragment_address.numel)
        return Fragment(parameter, parameter._dp_group, parameter.shape, begin, count)
    return None


def require_same_word(word: str, group: Any, what: str) -> None:
    """Raises ValueError in every process where `word` is not the same in all."""
    words: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(words, word, group=group)
    if len(set(words)) > 1:
        raise ValueError(
            f"The {what} is not the same in all {len(words)} processes. Make it alike in each, of files rather than of a model that one of them "
            "alone has loaded."
        )


@torch.no_grad()
def norm_of(shares: Sequence[Share]) -> Float[Tensor, ""]:
    """The joint 2-norm of the gradients of shares over all processes, which all call this."""
    found = [grad for share in shares if (grad := share.gradient()) is not None]
    return (
        shares[0].total(torch.stack([torch.linalg.vector_norm(grad.float()).square() for grad in found]).sum()).sqrt()
    )


@torch.no_grad()
def clip_shares_(shares: Sequence[Share], max_norm: float) -> Float[Tensor, ""]:
    """Scales the gradients of shares to a joint 2-norm of at most `max_norm` over all processes; gives the norm they had before.

    The same rule as torch.nn.utils.clip_grad_norm_. infinity only measures. All processes call this.
    """
    norm = norm_of(shares)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for share in shares if max_norm < math.inf else ():
        if (grad := share.gradient()) is not None:
            share.put_gradient_(grad.mul_(scale.to(grad.dtype)))
    return norm


def shares_of(module: nn.Module) -> dict[str, Share]:
    """The shares of all that trains in a module, by name; none where this process has it all."""
    named = ((name, share_of(name, p)) for name, p in module.named_parameters() if p.requires_grad)
    return {name: share for name, share in named if share is not None}
