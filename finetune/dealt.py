"""A module that an engine (FSDP2, DeepSpeed) deals out to several processes while it trains, whole in each of them before and afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.distributed import Peers, is_partitioned, under_deepspeed, under_fsdp
from surgery.borrowing import own_parts


@dataclass(frozen=True)
class _Kept:
    """A parameter of before, and where the module has the one that stands for it."""

    parameter: nn.Parameter
    part: nn.Module
    name: str

    @property
    def now(self) -> Tensor:
        return getattr(self.part, self.name)


@contextmanager
def dealt_out(trainer: Any) -> Iterator[None]:
    """A trainer's module is its engine's to deal out for the length of a ``with`` block, all processes together; nothing where there is none.

    Afterwards each process has the module whole: every part of its own class, with its own hooks and parameters, tied where they were, with
    what was learnt, on the device that trained. Until then those parameters lie on the CPU as they were, and the engine has others. After an
    error, of which other processes may know nothing, what they learnt cannot be asked for: the weights are then those of before the block.
    (DeepSpeed with an optimizer that was given, which is LIFT, deals nothing out and has the parameters themselves.)

    Raises ValueError where the processes do not begin with the same weights, and where FSDP2 is to keep them on the CPU between passes.
    """
    if not (under_fsdp() or under_deepspeed()):
        yield
        return
    module, optimizer = trainer.model, trainer.optimizer
    if under_fsdp():
        _require_no_offload(trainer.accelerator.state.fsdp_plugin)
    if peers := Peers.of():
        peers.require_same(dict(module.named_parameters()))
    with own_parts(module):
        kept = [] if under_deepspeed() and optimizer is not None else _lend(module, optimizer)
        try:
            yield
            for one in kept:
                if one.parameter.requires_grad:
                    one.parameter.data.copy_(_whole(one.now))
        finally:
            for one in kept:
                one.parameter.data = one.parameter.data.to(one.now.device)
            if under_fsdp():
                _forget(module)


def _require_no_offload(plugin: Any) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "The launcher has FSDP2 keep the weights on the CPU between passes, with which no training here was tried. Leave fsdp_offload_params out."
        )
    plugin.cpu_ram_efficient_loading = False  # each process has all the weights


def _lend(module: nn.Module, optimizer: Any) -> list[_Kept]:
    """Puts parameters of the same values in the place of a module's own, in its optimizer too; gives its own, which go to the CPU."""
    lent: dict[nn.Parameter, nn.Parameter] = {}
    kept = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in lent:
                lent[parameter] = nn.Parameter(parameter.data, parameter.requires_grad)
                kept.append(_Kept(parameter, part, name))
            setattr(part, name, lent[parameter])
    for group in optimizer.param_groups if optimizer else ():
        group["params"] = [lent.get(parameter, parameter) for parameter in group["params"]]
    for one in kept:
        one.parameter.data = one.parameter.data.cpu()
    return kept


def _forget(module: nn.Module) -> None:
    """Has torch deal a module out another time, which it remembers to have done beside the module."""
    from torch.distributed._composable_state import _module_state_mapping

    for part in module.modules():
        _module_state_mapping.pop(part, None)


@torch.no_grad()
def _whole(tensor: Any) -> Tensor:
    """All of a tensor, of which each process may have some rows; all of them ask together."""
    if is_partitioned(tensor):
        from peft.utils.integrations import gather_params_ctx

        with gather_params_ctx(tensor, modifier_rank=None):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
