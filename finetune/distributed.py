"""LIFT in several processes: what they must agree on, and how each chooses from the rows that it holds.

Replicated weights (DDP): every process has all the weights and its share of the batch. What LIFT gathers is averaged over the processes
when a step begins, compact: at density 0.05 a twentieth of what DDP would send, and once an optimizer step however many micro-batches
there are. All processes then take the same step. `exempt_from_ddp` keeps DDP from reducing, and from holding, the dense gradients as well.

Sharded weights (FSDP2, ``fully_shard``): every process has some rows of each matrix, of an expert mostly all or none, and gradients arrive
reduced. No matrix is ever put together to choose its entries (`finetune.lift.shards`), and each process saves and loads a state of its own. A Trainer takes no optimizer
under FSDP; one with `finetune.hosts.Surgical` among its bases takes LIFT. `tune` gives each process the whole model afterwards
(`finetune.dealt`).

DeepSpeed at ZeRO stage 0 replicates the weights as DDP does, but a Trainer drops the optimizer that it was given there for an AdamW of its
own, for which LIFT's hooks leave no gradient, and the engine steps inside backward, before anything is clipped or bent. A trainer with
`finetune.hosts.Surgical` among its bases keeps the optimizer and has the engine step where other engines do (`step_apart_`). Stages 1 to 3, and
DeepSpeed's own bf16 and fp16, step on flat pieces or copies of the weights: refused with LIFT. What bends gradients, as `finetune.rules.DRIFT`
does, finds the pieces of stages 1 to 3 in `finetune.shares`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
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
    return _engine() == "DEEPSPEED"


def under_fsdp() -> bool:
    """Whether accelerate, by a launcher or a Trainer's arguments, shards the model that trains in this process by torch's FSDP."""
    return _engine() == "FSDP"


def require_fsdp2() -> None:
    """Raises ValueError where accelerate shards by FSDP1, which keeps weights in flat pieces of no matrix."""
    from accelerate.state import AcceleratorState

    if under_fsdp() and AcceleratorState._shared_state["fsdp_plugin"].fsdp_version == 1:
        raise ValueError(
            "FSDP1 keeps weights in flat pieces of no matrix. Shard by FSDP2: fsdp_config={'version': 2, ...}, or fsdp_version: 2 for accelerate."
        )


def _engine() -> str | None:
    from accelerate.state import AcceleratorState

    kind = AcceleratorState._shared_state.get("distributed_type")
    return None if kind is None else kind.name


def refuse_deepspeed() -> None:
    """Raises ValueError where LIFT would find its place taken by DeepSpeed's engine."""
    if under_deepspeed():
        raise ValueError(
            "DeepSpeed steps by an optimizer of its own, for which LIFT leaves no gradient: this run would train nothing. Put "
            "finetune.hosts.Surgical before the trainer among its bases, or use DDP (torchrun, without a DeepSpeed configuration) or FSDP2 "
            "(fully_shard) with LIFT."
        )


def deepspeed_config() -> Mapping[str, Any]:
    """The configuration by which accelerate lets DeepSpeed train in this process; empty where it does not."""
    from accelerate.state import AcceleratorState
    from accelerate.utils.deepspeed import get_active_deepspeed_plugin

    if not under_deepspeed() or AcceleratorState._shared_state.get("deepspeed_plugins") is None:
        return {}
    plugin: Any = get_active_deepspeed_plugin(AcceleratorState())
    return plugin.deepspeed_config


def require_whole_steps(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a DeepSpeed configuration by which no optimizer meets the whole weights and their gradients, as LIFT must."""
    zero = config.get("zero_optimization", {})
    if stage := int(zero.get("stage", 0)):
        dealt = {
            1: "the weights that the optimizer steps on",
            2: "gradients, and the weights that the optimizer steps on,",
        }
        raise ValueError(
            f"ZeRO stage {stage} deals {dealt.get(stage, 'weights and gradients')} out to the processes in flat pieces, and LIFT works on "
            "whole matrices. Set zero_optimization.stage to 0, or use DDP or FSDP2."
        )
    for low in ("bf16", "fp16"):
        if config.get(low, {}).get("enabled", False):
            raise ValueError(
                f"DeepSpeed's {low} steps on flat fp32 copies of the weights, and LIFT works on the weights. Turn {low} off in its "
                "configuration and in the trainer's arguments, and load the model with dtype='bfloat16' (LIFT keeps what a step of 16-bit "
                "weights loses) or 'float32'. Or use DDP or FSDP2."
            )
    if "optimizer" in config:
        raise ValueError(
            "The DeepSpeed configuration names an optimizer of its own beside LIFT. Leave optimizer out of it."
        )
    if _offloads(config):
        raise ValueError("offload_optimizer puts DeepSpeed's CPUAdam in the optimizer's place. Leave it out with LIFT.")


def require_bare_gradients(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a DeepSpeed configuration under which no gradient lies between backward and step as it is, for DRIFT to bend."""
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    if config.get("fp16", {}).get("enabled", False):
        raise ValueError(
            "DeepSpeed's fp16 keeps scaled gradients, which DRIFT cannot measure. Compute in bf16 or fp32."
        )
    if stage == 0 and config.get("bf16", {}).get("enabled", False):
        raise ValueError(
            "DeepSpeed's bf16 at ZeRO stage 0 keeps gradients in copies that DRIFT does not reach. Use stage 1, 2 or 3, or turn bf16 off in its "
            "configuration and in the trainer's arguments."
        )
    if _offloads(config):
        raise ValueError(
            "offload_optimizer keeps gradients on the host, where DRIFT does not reach them. Leave it out."
        )


def _offloads(config: Mapping[str, Any]) -> bool:
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def step_apart_(accelerator: Any, optimizer: Any, lift: LIFT | None, bent: bool = False) -> None:
    """Changes a DeepSpeed engine that works on whole weights: it steps when the trainer calls `optimizer.step`, which accelerate leaves empty,
    and no longer inside `accelerator.backward`; between the two lie the reduced gradients, which are then the trainer's to clip. With
    LIFT nothing is reduced by the engine: `Peers` does, compact. An engine that steps on pieces is changed so where gradients are to be `bent`
    in between, as they then lie in pieces (`finetune.shares`); one that steps on copies is left as it is.

    lift: the optimizer that was given. Raises ValueError where the engine steps by another, or its processes do not all have the whole model,
    and RuntimeError where accelerate has let go of the engine.
    """
    wrapper = accelerator.deepspeed_engine_wrapped
    if wrapper is None:
        raise RuntimeError(
            "A trainer trains once under DeepSpeed: its engine is gone afterwards. Make another trainer to go on."
        )
    engine = wrapper.engine
    whole = engine.optimizer is engine.basic_optimizer and engine.torch_autocast_z0_gradscaler is None
    if lift is not None and not (
        whole and engine.optimizer is lift and engine.dp_world_size == accelerator.num_processes
    ):
        raise ValueError(
            f"DeepSpeed steps by {type(engine.optimizer).__name__} in LIFT's place, or deals the model out. Use a configuration of ZeRO stage 0 "
            "alone, or DDP or FSDP2."
        )
    pieces = bent and engine.zero_optimization()
    if not (whole or pieces):
        return

    def backward(loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        engine.backward(loss, **options)

    def step(_: Any) -> None:
        engine.step()

    wrapper.backward, optimizer.step = backward, MethodType(step, optimizer)  # a scheduler looks for a method
    engine._config.gradient_clipping = 0.0
    if pieces:
        engine.optimizer.clip_grad = 0.0
    engine.enable_backward_allreduce = lift is None
    optimizer.steps_apart = True
    if lift is not None:
        lift.let_deepspeed_step()


def steps_apart(optimizer: Any) -> bool:
    """Whether the gradients of a step are there before a trainer calls `optimizer.step`."""
    return not under_deepspeed() or getattr(optimizer, "steps_apart", False)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter under ZeRO stage 3, which is empty outside of a forward or backward pass."""
    return hasattr(tensor, "ds_id")


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
