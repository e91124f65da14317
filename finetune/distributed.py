"""LIFT in several processes: what they must agree on, and how each chooses from the rows that it holds.

Replicated weights (DDP): every process has all the weights and its share of the batch. What LIFT gathers is averaged over the processes
when a step begins, compact: at density 0.05 a twentieth of what DDP would send, and once an optimizer step however many micro-batches
there are. All processes then take the same step. `exempt_from_ddp` keeps DDP from reducing, and from holding, the dense gradients as well.

Sharded weights (FSDP2, ``fully_shard``): every process has some rows of each matrix, and gradients arrive reduced. No matrix is ever put
together to choose its entries (`finetune.lift.shards`), and each process saves and loads a state of its own.

DeepSpeed is neither: under it a Trainer drops the optimizer that it was given and lets an AdamW of its own step, for which LIFT's hooks
leave no gradient, so that nothing would be learnt. It is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

if TYPE_CHECKING:
    from finetune.lift import LIFT

_PIECE = 1 << 22  # entries that are widened at once
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks for what it is to leave alone


@dataclass(frozen=True)
class Peers:
    """The processes that train one model together: a torch.distributed group of two or more."""

    group: Any

    @classmethod
    def of(cls, group: Any = None) -> Peers | None:
        """The processes of a group, by default all of them; None where there is only this one."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        return cls(group)

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def average_(
        self, flat: Float[Tensor, " total"], parts: Sequence[Float[Tensor, " part"]], here: list[bool]
    ) -> None:
        """Averages gradients over the processes, in place. flat: all `parts` in one tensor. here: which of them arrived in this process.

        One that arrived only elsewhere counts as zero here, and has then arrived; one that arrived nowhere becomes zero, and has not.
        """
        arrived = torch.tensor(here, dtype=torch.int32, device=flat.device)
        dist.all_reduce(arrived, dist.ReduceOp.MAX, group=self.group)
        for part, mine in zip(parts, here, strict=True):
            if not mine:
                part.zero_()
        dist.all_reduce(flat, group=self.group)
        flat.div_(self.count)
        here[:] = [bool(flag) for flag in arrived.tolist()]

    def average_whole_(self, params: Sequence[Tensor]) -> None:
        """Averages the whole gradients in `.grad` over the processes, in place; one that is only elsewhere counts as zero here."""
        if not params:
            return
        arrived = torch.tensor([p.grad is not None for p in params], dtype=torch.int32, device=params[0].device)
        dist.all_reduce(arrived, dist.ReduceOp.MAX, group=self.group)
        for p, anywhere in zip(params, arrived.tolist(), strict=True):
            if anywhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=self.group)
                p.grad.div_(self.count)

    def agreed(self, chosen: Sequence[Int[Tensor, " count"]]) -> list[Tensor]:
        """The first process's tensors in all of them: eigensolvers of different machines may differ in the last digit."""
        if not chosen:
            return []
        lengths = torch.tensor([len(tensor) for tensor in chosen], device=chosen[0].device)
        dist.broadcast(lengths, group=self.group, group_src=0)
        agreed = []
        for tensor, length in zip(chosen, lengths.tolist(), strict=True):
            agreed.append(tensor.clone() if len(tensor) == length else tensor.new_empty(length))
            dist.broadcast(agreed[-1], group=self.group, group_src=0)
        return agreed

    def require_same(self, named: Mapping[str, Tensor]) -> None:
        """Raises ValueError in every process, naming the first tensor that is not the same in all, byte for byte."""
        sums = torch.stack([_checksum(tensor) for tensor in named.values()])
        low, high = sums.clone(), sums
        dist.all_reduce(low, dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        differing = [name for name, same in zip(named, (low == high).tolist(), strict=True) if not same]
        if differing:
            raise ValueError(
                f"{differing[0]} (of {len(differing)} such) does not start out the same in all {self.count} processes, so they would train "
                "different models: load the same checkpoint in each, and draw what is drawn by the same seed."
            )


def exempt_from_ddp(module: nn.Module, lift: LIFT) -> list[str]:
    """Tells DistributedDataParallel, before it wraps `module`, to leave LIFT's parameters alone. Gives the names.

    LIFT averages their gradients itself; DDP would reduce zeros beside it, through buffers as large as all of them. Where nothing else is
    trained the smallest parameter stays with DDP, which insists on one (for a module whose forward goes through the wrapper).
    """
    own = {id(p): p for group in lift.param_groups for p in group["params"]}
    named = {name: p for name, p in module.named_parameters() if id(p) in own}
    if not any(p.requires_grad and id(p) not in own for p in module.parameters()) and named:
        del named[min(named, key=lambda name: named[name].numel())]
    names = sorted({*getattr(module, _IGNORED, ()), *named})
    setattr(module, _IGNORED, names)
    return list(named)


def under_deepspeed() -> bool:
    """Whether accelerate, by a launcher or a Trainer's arguments, lets DeepSpeed train in this process."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    return AcceleratorState._shared_state.get("distributed_type") is DistributedType.DEEPSPEED


def refuse_deepspeed() -> None:
    """Raises ValueError where LIFT would find its place taken by DeepSpeed's engine."""
    if under_deepspeed():
        raise ValueError(
            "DeepSpeed steps by an optimizer of its own, for which LIFT leaves no gradient: this run would train nothing. Use DDP "
            "(torchrun, without a DeepSpeed configuration) or FSDP2 (fully_shard) with LIFT."
        )


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: a DTensor's own rows, any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process may hold a part only."""
    return hasattr(tensor, "device_mesh")


@dataclass(frozen=True)
class Shards:
    """The processes over whose rows a matrix is dealt out, in order."""

    group: Any

    @classmethod
    def of(cls, name: str, matrix: Any) -> Shards:
        """Raises ValueError for a DTensor that is not sharded by rows, over one dimension of its mesh."""
        by_rows = [i for i, placement in enumerate(matrix.placements) if placement.is_shard(0)]
        if len(by_rows) != 1 or not all(p.is_shard(0) or p.is_replicate() for p in matrix.placements):
            raise ValueError(
                f"LIFT takes matrices sharded by rows over one dimension of a mesh, as fully_shard makes them; {name} is placed "
                f"{tuple(matrix.placements)}."
            )
        return cls(matrix.device_mesh.get_group(by_rows[0]))

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def total(self, numbers: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sums over the processes."""
        summed = numbers.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def each(self, number: int, device: torch.device) -> list[int]:
        """One number of every process, in order."""
        mine = torch.tensor([number], device=device)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.group)
        return [int(n) for n in found]

    def before(self, number: int, device: torch.device) -> int:
        """What of such a number the processes before this one have."""
        return sum(self.each(number, device)[: self.rank])


def _checksum(tensor: Tensor) -> Int[Tensor, ""]:
    """A number that depends on every byte and its place."""
    flat = tensor.detach().reshape(-1)
    words = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE].long()
        total += (piece * (torch.arange(start, start + len(piece), device=words.device) % 65521 + 1)).sum()
    return total
