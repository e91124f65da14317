"""The compact state of LIFT: what there is of each chosen entry, and a step of AdamW on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from finetune.distributed import local_part, refuse_deepspeed
from finetune.lift.halves import LOW, joined, split
from finetune.lift.selection import position_dtype
from surgery.linalg import side_by_side

MOMENTS = ("exp_avg", "exp_avg_sq")
_AT_ONCE = 1 << 16  # entries on the CPU that are updated together: they stay in the cache


@dataclass(frozen=True)
class Stack:
    """A parameter and the matrices, all of one shape, that lie in it one above the other: mostly one, the parameter itself.

    name: of the parameter. matrices: their names, in the order in which they lie; None for one that is left as it is.
    begin: where several lie in a sharded parameter, how many of its entries the processes before this one have.
    """

    name: str
    parameter: Tensor
    matrices: tuple[str | None, ...]
    begin: int = 0

    @property
    def trained(self) -> list[str]:
        return [name for name in self.matrices if name is not None]

    @property
    def shape(self) -> torch.Size:
        """Of each matrix."""
        if len(self.matrices) == 1:
            return self.parameter.shape
        return torch.Size((self.parameter.shape[:-1].numel() // len(self.matrices), self.parameter.shape[-1]))

    @property
    def edges(self) -> list[int]:
        """Where each matrix begins among the entries that this process has of the parameter, and where the last one ends."""
        here, size = local_part(self.parameter).numel(), self.shape.numel()
        inner = [min(max(i * size - self.begin, 0), here) for i in range(1, len(self.matrices))]
        return [0, *inner, here]

    def apart(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the parameter's shape, matrix by matrix: of a sharded one, the rows that this process has of each, perhaps none."""
        rows = local_part(tensor).reshape(-1, self.shape[-1])
        return list(rows.split([(end - begin) // self.shape[-1] for begin, end in pairwise(self.edges)]))

    def counts(self, positions: Tensor) -> list[int]:
        """How many of the parameter's ascending flat positions, those of this process, lie in each matrix."""
        inner = torch.tensor(self.edges[1:-1], dtype=positions.dtype, device=positions.device)
        found = torch.searchsorted(positions, inner).tolist()
        return [end - begin for begin, end in pairwise([0, *found, len(positions)])]

    def within(self, positions: Tensor) -> list[Tensor]:
        """The parameter's ascending flat positions as each matrix's own."""
        own = position_dtype(self.shape.numel())
        parts = positions.split(self.counts(positions))
        return [(part - begin).to(own) for part, begin in zip(parts, self.edges, strict=False)]

    def joined(self, within: list[Tensor]) -> Tensor:
        """`within` undone."""
        if len(within) == 1:
            return within[0]
        kept = position_dtype(self.parameter.numel())
        return torch.cat([part.to(kept) + begin for part, begin in zip(within, self.edges, strict=False)])


@dataclass
class Ledger:
    """The compact state of one group's parameters of one device and dtype: flat tensors, and each parameter's part of them.

    Flat, so that a step is few operations whatever the number of parameters. What moved in from outside, `moments`, ages and lower
    halves, starts at zero with every new entry.
    """

    stacks: list[Stack]
    positions: list[
        int
    ]  # of each parameter's first matrix among the whole optimizer's: what a random choice depends on
    age_dtype: torch.dtype
    indices: list[Tensor] = field(init=False)
    bases: list[Tensor | None] = field(
        init=False
    )  # of the matrices' filters, to begin from at the next refresh, one above the other
    averaged: bool = False  # over processes, the gradients of the coming step
    waiting: bool = False  # for whole gradients to choose by: they stay in `.grad`
    hosted: bool = False  # by a trainer that has DeepSpeed step by this optimizer
    params: list[Tensor] = field(init=False)
    names: list[str] = field(init=False)
    flat: dict[str, Tensor] = field(init=False)
    views: dict[str, list[Tensor]] = field(init=False)
    gathered: list[bool] = field(init=False)
    ages: list[tuple[int, ...]] = field(init=False)  # the ages there are among a parameter's entries

    def __post_init__(self) -> None:
        self.params, self.names = [s.parameter for s in self.stacks], [s.name for s in self.stacks]
        self.indices = [torch.zeros(0, dtype=torch.int32, device=p.device) for p in self.params]
        self.bases = [None] * len(self.params)
        self._lay_out({})
        self.gathered, self.ages = [False] * len(self.params), [(0,)] * len(self.params)

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The tensors of `flat` that a resumed run needs."""
        return (*MOMENTS, "age", *(("low",) if LOW[self.params[0].dtype] else ()))

    def hook(self) -> list[Any]:
        def gatherer(i: int) -> Callable[[Tensor], None]:
            def on_gradient(p: Tensor) -> None:
                if not self.waiting:
                    self.gather(i, p)

            return on_gradient

        return [p.register_post_accumulate_grad_hook(gatherer(i)) for i, p in enumerate(self.params)]

    @torch.no_grad()
    def gather(self, i: int, p: Tensor) -> None:
        """Add the chosen entries of `.grad` to what is gathered already, and free it."""
        assert p.grad is not None
        if not self.hosted:
            refuse_deepspeed()  # a host that knows nothing of LIFT has begun by now
        if self.averaged:
            raise RuntimeError(
                f"a gradient of {self.names[i]} arrives after those of this step were averaged over the processes: call step (or zero_grad) "
                "between clipping and the next backward"
            )
        grad, mine = held(p.grad), self.views["grad"][i]
        if self.gathered[i]:
            mine.add_(grad.index_select(0, self.indices[i]))
        elif grad.dtype == mine.dtype:
            torch.index_select(grad, 0, self.indices[i], out=mine)
        else:
            mine.copy_(grad.index_select(0, self.indices[i]))
        self.gathered[i] = True
        p.grad = None

    def values(self, i: int) -> Tensor:
        """The chosen entries of a parameter, in full precision."""
        return joined(held(self.params[i]).index_select(0, self.indices[i]), self._low(i))

    def set_values_(self, i: int, values: Tensor) -> None:
        stored, low = split(values, self.params[i].dtype)
        held(self.params[i]).scatter_(0, self.indices[i].long(), stored)
        if low is not None:
            self.views["low"][i].copy_(low)

    def update(self, group: dict[str, Any]) -> None:
        """AdamW on every parameter that got a gradient; uses the gradients up."""
        # Where nothing scales a weight, its step can be added to it: memory is gone through once, not twice.
        added = self.params[0].dtype == torch.float32 and not group["weight_decay"]

        def together(members: list[int]) -> None:
            run, ages = self._run(members), self.ages[members[0]]
            start = (lambda i: torch.zeros_like(self.views["grad"][i])) if added else self.values
            values = torch.cat([start(i) for i in members])
            count = self.flat["age"][run]
            count.add_(count < torch.iinfo(count.dtype).max)
            grown = tuple(sorted({min(age + 1, torch.iinfo(count.dtype).max) for age in ages}))
            mean, square, grad = (self.flat[key][run] for key in (*MOMENTS, "grad"))
            adamw_(values, mean, square, grad, count, grown, group)
            for i, part in zip(members, values.split([len(self.indices[i]) for i in members]), strict=True):
                if added:
                    held(self.params[i]).index_add_(0, self.indices[i], part)
                else:
                    self.set_values_(i, part)
                self.ages[i] = grown

        runs = list(self._together())
        if self._on_cpu:  # where adding at positions is done on one thread
            side_by_side(together, runs)
        else:
            for members in runs:
                together(members)
        self.gathered = [False] * len(self.params)

    def _together(self) -> Iterator[list[int]]:
        """Neighbours that got a gradient and whose entries have the same ages; on the CPU as many as fit its cache."""
        limit = _AT_ONCE if self._on_cpu else float("inf")
        common = [(here, ages) for here, ages in zip(self.gathered, self.ages, strict=True)]
        for (here, _), members in groupby(range(len(self.params)), key=common.__getitem__):
            if not here:
                continue
            run: list[int] = []
            for i in members:
                if run and sum(len(self.indices[k]) for k in run) + len(self.indices[i]) > limit:
                    yield run
                    run = []
                run.append(i)
            yield run

    @property
    def _on_cpu(self) -> bool:
        return self.params[0].device.type == "cpu"

    def _run(self, members: list[int]) -> slice:
        return slice(self._starts[members[0]], self._starts[members[-1] + 1])

    def stays(self, new: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each parameter's new entries: where they are among the old ones, and whether they are."""
        found = []
        for old, now in zip(self.indices, new, strict=True):
            if not len(old):
                found.append((torch.zeros_like(now), torch.zeros_like(now, dtype=torch.bool)))
                continue
            before = torch.searchsorted(old, now).clamp_(max=len(old) - 1)
            found.append((before, old[before] == now))
        return found

    def adopt(self, new: list[Tensor], stays: list[tuple[Tensor, Tensor]]) -> None:
        """Go over to new entries: those that stay keep all they have, the others start at zero."""

        def kept(view: Tensor, before: Tensor, stay: Tensor) -> Tensor:
            return torch.where(stay, view[before], 0) if len(view) else torch.zeros_like(before, dtype=view.dtype)

        self.indices = new
        self._lay_out(
            {key: [kept(v, *at) for v, at in zip(self.views[key], stays, strict=True)] for key in self.state_keys}
        )
        self._count_ages()

    def restore(self, saved: list[dict[str, Tensor]]) -> None:
        """Take up the saved state of every parameter."""
        device = self.params[0].device
        self.indices = [own["indices"].to(device, copy=True) for own in saved]
        self.bases = [own["basis"].to(device, copy=True) if "basis" in own else None for own in saved]
        self._lay_out({key: [own[key].to(device) for own in saved] for key in self.state_keys})
        self._count_ages()
        self.gathered = [False] * len(self.params)

    def state(self, i: int) -> dict[str, Tensor]:
        basis = {} if (found := self.bases[i]) is None else {"basis": found}
        return {"indices": self.indices[i], **{key: self.views[key][i] for key in self.state_keys}, **basis}

    def _low(self, i: int) -> Tensor | None:
        return self.views["low"][i] if "low" in self.views else None

    def _lay_out(self, parts: dict[str, list[Tensor]]) -> None:
        """Flat tensors for the entries there now are, filled with `parts`, or zero."""
        counts = [len(chosen) for chosen in self.indices]
        self._starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        low = LOW[self.params[0].dtype]
        dtypes = (
            dict.fromkeys((*MOMENTS, "grad"), torch.float32) | {"age": self.age_dtype} | ({"low": low} if low else {})
        )
        device = self.params[0].device
        self.flat = {
            key: torch.cat(parts[key]).to(dtype)
            if key in parts
            else torch.zeros(sum(counts), dtype=dtype, device=device)
            for key, dtype in dtypes.items()
        }
        self.views = {key: list(whole.split(counts)) for key, whole in self.flat.items()}

    def _count_ages(self) -> None:
        self.ages = [tuple(view.unique().tolist()) for view in self.views["age"]]


def adamw_(
    values: Tensor,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    ages: Tensor,
    among: tuple[int, ...],
    group: dict[str, Any],
) -> None:
    """One AdamW step on flat float32 tensors, in place, in the order of operations of torch's single-tensor form.

    ages: steps of each entry, this one counted. among: the ages there are.
    """
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    if group["weight_decay"]:
        values.mul_(1 - lr * group["weight_decay"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if len(among) == 1:
        denominator = (square.sqrt() / (1 - beta2 ** among[0]) ** 0.5).add_(group["eps"])
        values.addcdiv_(mean, denominator, value=-(lr / (1 - beta1 ** among[0])))
        return
    # Entries of several ages: the same two scalars, looked up for each entry by its own age.
    scales, steps = (torch.ones(max(among, default=0) + 1, dtype=torch.float64) for _ in range(2))
    for age in among:
        scales[age], steps[age] = (1 - beta2**age) ** 0.5, -(lr / (1 - beta1**age))
    lookup = ages.to(torch.int32)
    denominator = square.sqrt().div_(scales.to(square).index_select(0, lookup)).add_(group["eps"])
    values.add_(steps.to(square).index_select(0, lookup).mul_(mean).div_(denominator))


def held(tensor: Tensor) -> Tensor:
    """A parameter, or its gradient, as the flat tensor that positions count in: of a sharded one, this process's rows."""
    return local_part(tensor.detach()).reshape(-1)


def age_dtype(betas: tuple[float, float]) -> torch.dtype:
    # int16 saturates at 32767 steps: exact where 1 - beta**32767 is already 1 in float32
    return torch.int16 if max(betas) ** torch.iinfo(torch.int16).max < 2**-25 else torch.int32
