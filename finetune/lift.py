"""LIFT: fine-tune only the principal weights, those that are largest after rank reduction.

`principal_indices` says which entries those are; `LIFT` is the optimizer that trains them and nothing else.

Source: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
    Supervised Fine-Tuning", arXiv 2506.00772, Algorithm 1.
Differs: the released code's configurations train the *smallest* entries, which is `select="smallest"` here. Masters are
    float32, bias correction follows each entry's own age, gradients are gathered and freed as they arrive, and
    weight decay acts.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm

from surgery.linalg import STRIP, each_matrix, low_rank_factors

Select = Literal["largest", "smallest", "random", "magnitude"]


def budget(shape: tuple[int, int] | torch.Size, density: float | None = None, lora_rank: int | None = None) -> int:
    """How many entries of a matrix of this shape are trained; exactly one of the two budgets must be given.

    density: fraction of the entries, in (0, 1]; rounded down, at least one entry.
    lora_rank: as many entries as a LoRA adapter of this rank has parameters, `(out + in) * lora_rank`, at most all.
    Raises ValueError for both, neither, or a value out of range.
    Source: arXiv 2506.00772, section 3 (lora_rank).
    """
    if (density is None) == (lora_rank is None):
        raise ValueError(f"give exactly one of density and lora_rank, got density={density} and lora_rank={lora_rank}")
    out, into = shape
    if density is not None:
        if not 0 < density <= 1:
            raise ValueError(f"density is a fraction in (0, 1], got {density}")
        return max(1, int(density * out * into))
    assert lora_rank is not None
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
    return min((out + into) * lora_rank, out * into)


def principal_indices(
    W: Float[Tensor, "out in"], rank: int, count: int, select: Select = "largest", seed: int = 0
) -> Int[Tensor, " count"]:
    """The flat positions of the `count` principal entries of W, ascending: int32, or int64 from 2**31 entries on.

    rank: how much of the spectrum the filter keeps, 1 or more (from the short side on it filters nothing).
    count: 1 up to all entries.
    select: "largest" |entries| of the rank-`rank` part of W (LIFT); "smallest" ones (what the released code trains);
        "magnitude": the largest |W| themselves; "random": `count` entries drawn by `seed`. The last two ignore `rank`.
    Exact: the same set as a float64 SVD gives (a float32 SVD's own rounding moves an entry now and then). Among entries
    equal to the threshold, the lowest positions are taken. Raises ValueError for bad arguments and for a W that is not
    finite.
    Source: arXiv 2506.00772, Algorithm 1.
    """
    if W.ndim != 2:
        raise ValueError(f"principal entries are those of a matrix, got shape {tuple(W.shape)}")
    if not 1 <= count <= W.numel():
        raise ValueError(f"count {count} asked of a matrix with {W.numel()} entries")
    if rank < 1:
        raise ValueError(f"the filter's rank must be at least 1, got {rank}")
    if select not in get_args(Select):
        raise ValueError(f"select is one of {', '.join(get_args(Select))}: got {select!r}")
    W, filtered = W.detach(), select in ("largest", "smallest") and rank < min(W.shape) and count < W.numel()
    if not filtered and not torch.isfinite(W).all():  # the filter sees for itself
        raise ValueError("the matrix holds NaN or infinite entries")
    if count == W.numel():
        found = torch.arange(count, device=W.device)
    elif select == "random":
        generator = torch.Generator().manual_seed(seed)
        found = torch.randperm(W.numel(), generator=generator)[:count].sort().values.to(W.device)
    else:
        found = _largest(_score(W, rank, select), W, count)
    return found.to(torch.int32 if W.numel() < 2**31 else torch.int64)


def _score(W: Tensor, rank: int, select: Select) -> Callable[[slice], Tensor]:
    """What entries are compared by, for the rows asked for; the score of the whole matrix never exists at once."""
    if select == "magnitude" or rank >= min(W.shape):
        sign = -1.0 if select == "smallest" else 1.0
        return lambda rows: W[rows].to(torch.promote_types(W.dtype, torch.float32)).abs().mul_(sign)
    left, right = low_rank_factors(W, rank)
    across = right.T.contiguous()
    if select == "smallest":
        return lambda rows: (left[rows] @ across).abs_().neg_()
    return lambda rows: (left[rows] @ across).abs_()


def _largest(score: Callable[[slice], Tensor], W: Float[Tensor, "out in"], count: int) -> Int[Tensor, " count"]:
    """Ascending positions of the `count` largest scores; ties at the threshold go to the lowest positions."""
    out, into = W.shape
    # Some of the rows bound the threshold from below, so that only a few candidates are ever ordered.
    sample = score(slice(None, None, max(1, out * into // 32768))).view(-1)
    reach = min(sample.numel(), math.ceil(1.1 * count / W.numel() * sample.numel()) + 32)
    below = sample.kthvalue(sample.numel() - reach + 1).values
    step = max(1, STRIP // into) if W.device.type == "cpu" else out
    for bound in (below, -math.inf):
        positions, candidates = [], []
        for start in range(0, out, step):
            scores = score(slice(start, start + step)).view(-1)
            at = (scores >= bound).nonzero().squeeze(1)
            positions.append(at + start * into)
            candidates.append(scores[at])
        if sum(map(len, positions)) >= count:
            break
    position, candidate = torch.cat(positions), torch.cat(candidates)
    threshold = candidate.kthvalue(len(candidate) - count + 1).values
    kept = candidate >= threshold
    surplus = int(kept.sum()) - count
    if surplus:
        kept[(candidate == threshold).nonzero().squeeze(1)[-surplus:]] = False
    return position[kept]


@dataclass(frozen=True)
class Refresh:
    """What a refresh did: after which step, and how much of the old mask it kept.

    overlap: intersection over union of the old and the new mask over all parameters of the group, in [0, 1].
    by_parameter: the same for each parameter, by name (or by position where the optimizer was given no names).
    """

    step: int
    overlap: float
    by_parameter: dict[str, float]


class LIFT(torch.optim.Optimizer):
    """AdamW over the principal entries of each matrix; every other entry keeps its bytes.

    params: 2-D parameters, or (name, parameter) pairs, or groups of either, as for any torch optimizer. A parameter
        that appears twice (tied weights) counts once. Put the model on its device first.
    lr, betas, eps, weight_decay: as in AdamW; weight decay is decoupled and acts on the chosen entries.
    density, lora_rank: the budget of each matrix, exactly one of them (see `budget`).
    filter_rank: the rank of the filter through which entries are compared (see `principal_indices`).
    refresh: after every so many steps choose anew, by the weights as they then are; None keeps the first choice.
        Entries that stay keep moments, age and master; newcomers start at zero with age zero; leavers keep their
        drifted value. `refreshes` lists what each refresh did.
    select, seed: which entries (see `principal_indices`); a random choice depends on (seed, refresh, parameter) only.

    All of these can be set per group; a scheduler finds `lr` where it expects it. With density 1 in float32 the result
    is torch.optim.AdamW(foreach=False)'s, bit for bit.

    Gradients: a hook on each parameter gathers the chosen entries as soon as its gradient is complete, adds them to
    a compact float32 accumulator and frees `.grad`, so at most one layer's dense gradient exists at a time. Hence:
    clip with `clip_grad_norm_` of this object, not with torch's; `step` uses up what was gathered, so that a training
    loop that only calls `model.zero_grad()` is right too; `zero_grad` drops what was gathered. `close` (or the end of a
    `with` block, or of the object's life) removes the hooks.

    State of each parameter, `state[p]`: `indices` (int32), `master`, `exp_avg`, `exp_avg_sq` (float32) and `age`
    (int16, saturating where the bias correction has long become 1, else int32): 18 bytes for each chosen entry. The
    accumulator (4 bytes) takes the place of gradients. `state_dict` holds all of it at its own precision: a resumed
    run goes on bit for bit.

    Raises ValueError or TypeError, naming the parameter, for anything that is not a contiguous float32, bfloat16 or
    float16 matrix that requires a gradient; RuntimeError under more than one process, whose gathered
    gradients nobody would reduce.
    Source: arXiv 2506.00772, Algorithm 1. Differs: see this module.
    """

    refreshes: list[Refresh]

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        density: float | None = None,
        lora_rank: int | None = None,
        filter_rank: int = 16,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int | None = None,
        select: Select = "largest",
        seed: int = 0,
    ):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            if world > 1:
                raise RuntimeError(f"LIFT works in one process; here are {world}, whose gradients it would not reduce")
        self.refreshes = []
        self._ledgers: list[list[_Ledger]] = []
        self._handles: list[Any] = []
        self._closed = False
        defaults = {
            "lr": lr,
            "density": density,
            "lora_rank": lora_rank,
            "filter_rank": filter_rank,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "refresh": refresh,
            "select": select,
            "seed": seed,
            "steps": 0,
        }
        super().__init__(params, defaults)
        weakref.finalize(self, _remove, self._handles)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters and chooses their entries. Raises as the constructor does."""
        listed = param_group["params"]
        listed = [listed] if isinstance(listed, Tensor) else list(listed)
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        unique = []
        for entry in listed:
            p = entry[1] if isinstance(entry, tuple) else entry
            if id(p) not in seen:
                seen.add(id(p))
                unique.append(entry)
        super().add_param_group({**param_group, "params": unique})
        group = self.param_groups[-1]
        try:
            _check_options(group)
            names = self._names(len(self.param_groups) - 1)
            for name, p in zip(names, group["params"], strict=True):
                _check_parameter(name, p)
            by_device: dict[torch.device, list[int]] = {}
            for i, p in enumerate(group["params"]):
                by_device.setdefault(p.device, []).append(i)
            first = sum(len(earlier["params"]) for earlier in self.param_groups[:-1])
            ledgers = []
            for members in by_device.values():
                params, own = [group["params"][i] for i in members], [names[i] for i in members]
                ledgers.append(_Ledger.opened(params, own, [first + i for i in members], group))
        except Exception:
            self.param_groups.pop()
            raise
        self._ledgers.append(ledgers)
        for ledger in ledgers:
            self._handles += ledger.hook()
        self._link_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One AdamW step on the gathered gradients, which it uses up; then a refresh, where one is due.

        A parameter that got no gradient is left alone, as by AdamW. Raises RuntimeError where none got any, and
        ValueError, naming the parameter, where a refresh meets weights that are not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._collect()
        if not any(any(ledger.gathered) for ledger in chain(*self._ledgers)):
            raise RuntimeError("no gradient has arrived since the last step: call backward on a loss before step")
        for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
            if not any(any(ledger.gathered) for ledger in ledgers):
                continue
            for ledger in ledgers:
                ledger.update(group)
            group["steps"] += 1
            if group["refresh"] and group["steps"] % group["refresh"] == 0:
                self._refresh(group, ledgers)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gathered gradients, and `.grad` where there is one."""
        for ledger in chain(*self._ledgers):
            ledger.gathered = [False] * len(ledger.params)
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Float[Tensor, ""]:
        """Scales the gathered gradients to a joint 2-norm of at most `max_norm`, and gives the norm they had before.

        The same rule as torch.nn.utils.clip_grad_norm_, on the entries that are trained. infinity only measures.
        """
        arrived = [grad for _, grad in self.gradients()]
        total = get_total_norm(arrived)
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in arrived:
            grad.mul_(scale.to(grad.device))
        return total

    def gradients(self) -> Iterator[tuple[str, Float[Tensor, " count"]]]:
        """The gathered gradients, by the parameter's name: float32 at its chosen entries; writing to one changes the coming step."""
        self._collect()
        for ledger in chain(*self._ledgers):
            yield from (
                (name, grad)
                for name, grad, here in zip(ledger.names, ledger.views["grad"], ledger.gathered, strict=True)
                if here
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state at its own precision. Load the weights it belongs to as well: masters are theirs.

        Raises ValueError where the state is of other parameters or another budget, and leaves the optimizer as it was.
        """
        saved = state_dict["state"]
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        places = [(ledger, i) for ledger in chain(*self._ledgers) for i in range(len(ledger.params))]
        order = {id(p): k for k, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))}
        if len(ids) != len(order):
            raise ValueError(f"the saved state is of {len(ids)} parameters, this optimizer has {len(order)}")
        arriving = []
        for ledger, i in places:
            p, name = ledger.params[i], ledger.names[i]
            found = saved.get(ids[order[id(p)]], {})
            if set(found) != set(_STATE):
                raise ValueError(f"the saved state of {name} is not LIFT's: it holds {sorted(found) or 'nothing'}")
            if len(found["indices"]) != len(ledger.indices[i]) or int(found["indices"].max()) >= p.numel():
                raise ValueError(
                    f"the saved state of {name} has {len(found['indices'])} entries, here are {len(ledger.indices[i])} "
                    f"of a {tuple(p.shape)} matrix: the budget or the model differs"
                )
            arriving.append(found)
        # The base class would cast everything to the parameter's type; it gets the groups only.
        super().load_state_dict({**state_dict, "state": {}})
        for (ledger, i), found in zip(places, arriving, strict=True):
            ledger.restore(i, found)
        self._link_state()

    def close(self) -> None:
        """Removes the hooks from the parameters: gradients then stay in `.grad`, and `step` raises RuntimeError."""
        self._closed = True
        _remove(self._handles)

    def __enter__(self) -> "LIFT":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _names(self, group_index: int) -> list[str]:
        group = self.param_groups[group_index]
        return list(group.get("param_names", [f"{group_index}.{i}" for i in range(len(group["params"]))]))

    def _collect(self) -> None:
        """Gathers gradients that were put into `.grad` by hand."""
        if self._closed:
            raise RuntimeError("this optimizer was closed: its hooks no longer gather gradients")
        for ledger in chain(*self._ledgers):
            for i, p in enumerate(ledger.params):
                if p.grad is not None:
                    ledger.gather(i, p)

    def _refresh(self, group: dict[str, Any], ledgers: list["_Ledger"]) -> None:
        kept: dict[str, int] = {}
        counts: dict[str, int] = {}
        for ledger in ledgers:
            for name, indices, survivors in zip(ledger.names, ledger.indices, ledger.refresh(group), strict=True):
                kept[name], counts[name] = survivors, len(indices)
        self._link_state()
        shared, total = sum(kept.values()), sum(counts.values())
        by_parameter = {name: n / (2 * counts[name] - n) for name, n in kept.items()}
        self.refreshes.append(Refresh(group["steps"], shared / (2 * total - shared), by_parameter))

    def _link_state(self) -> None:
        for ledger in chain(*self._ledgers):
            for i, p in enumerate(ledger.params):
                self.state[p] = {"indices": ledger.indices[i], **{key: ledger.views[key][i] for key in _STATE[1:]}}


_STATE = ("indices", "master", "exp_avg", "exp_avg_sq", "age")


@dataclass
class _Ledger:
    """The compact state of one group's parameters on one device: flat tensors, and each parameter's part of them.

    Flat, so that a step is a handful of operations whatever the number of parameters.
    """

    params: list[Tensor]
    names: list[str]
    positions: list[int]  # of the parameters in the whole optimizer: what a random choice depends on
    indices: list[Tensor]
    flat: dict[str, Tensor]
    views: dict[str, list[Tensor]]
    gathered: list[bool]
    ages: list[int | None]  # a parameter's age, or None where its entries differ in age

    @classmethod
    def opened(cls, params: list[Tensor], names: list[str], positions: list[int], group: dict[str, Any]) -> "_Ledger":
        indices = _choose(params, names, positions, group, refreshes=0)
        counts = [len(chosen) for chosen in indices]
        device, total = params[0].device, sum(counts)
        flat = {key: torch.zeros(total, device=device) for key in ("master", "exp_avg", "exp_avg_sq", "grad")}
        flat["age"] = torch.zeros(total, dtype=_age_dtype(group["betas"]), device=device)
        views = {key: list(whole.split(counts)) for key, whole in flat.items()}
        for p, chosen, master in zip(params, indices, views["master"], strict=True):
            master.copy_(_values(p).index_select(0, chosen))
        return cls(params, names, positions, indices, flat, views, [False] * len(params), [0] * len(params))

    def hook(self) -> list[Any]:
        def gatherer(i: int) -> Callable[[Tensor], None]:
            return lambda p: self.gather(i, p)

        return [p.register_post_accumulate_grad_hook(gatherer(i)) for i, p in enumerate(self.params)]

    @torch.no_grad()
    def gather(self, i: int, p: Tensor) -> None:
        assert p.grad is not None
        part = p.grad.reshape(-1).index_select(0, self.indices[i])
        if self.gathered[i]:
            self.views["grad"][i].add_(part)
        else:
            self.views["grad"][i].copy_(part)
            self.gathered[i] = True
        p.grad = None

    def update(self, group: dict[str, Any]) -> None:
        """AdamW, in the order of operations of torch's single-tensor form, then the new values into the parameters."""
        starts = [0]
        for chosen in self.indices:
            starts.append(starts[-1] + len(chosen))
        # Neighbours that got a gradient and have one common age are updated together: usually that is everything.
        common = [(here, age) for here, age in zip(self.gathered, self.ages, strict=True)]
        for (here, age), members in groupby(range(len(self.params)), key=common.__getitem__):
            if here:
                run = list(members)
                self._adamw(slice(starts[run[0]], starts[run[-1] + 1]), age, group)
        for i, (p, here, age) in enumerate(zip(self.params, self.gathered, self.ages, strict=True)):
            if here:
                _values(p).index_copy_(0, self.indices[i].long(), self.views["master"][i].to(p.dtype))
                self.ages[i] = None if age is None else age + 1
        self.gathered = [False] * len(self.params)

    def _adamw(self, run: slice, age: int | None, group: dict[str, Any]) -> None:
        master, mean, square, grad, ages = (
            self.flat[key][run] for key in ("master", "exp_avg", "exp_avg_sq", "grad", "age")
        )
        (beta1, beta2), lr, eps = group["betas"], float(group["lr"]), group["eps"]
        ages.add_(ages < torch.iinfo(ages.dtype).max)
        if group["weight_decay"]:
            master.mul_(1 - lr * group["weight_decay"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if age is not None:
            scale = (1 - beta2 ** (age + 1)) ** 0.5
            denominator = (square.sqrt() / scale).add_(eps)
            master.addcdiv_(mean, denominator, value=-(lr / (1 - beta1 ** (age + 1))))
            return
        # Entries of several ages: the same two scalars, looked up for each entry by its own age.
        oldest = int(ages.max())
        scales = [(1 - beta2**t) ** 0.5 for t in range(1, oldest + 1)]
        steps = [-(lr / (1 - beta1**t)) for t in range(1, oldest + 1)]
        lookup = ages.to(torch.int32).sub_(1)
        denominator = square.sqrt().div_(square.new_tensor(scales).index_select(0, lookup)).add_(eps)
        master.add_(square.new_tensor(steps).index_select(0, lookup).mul_(mean).div_(denominator))

    def refresh(self, group: dict[str, Any]) -> list[int]:
        """Chooses anew by the weights as they are; gives how many entries of each parameter stayed."""
        chosen = _choose(self.params, self.names, self.positions, group, refreshes=group["steps"] // group["refresh"])
        survivors = []
        for i, (old, new) in enumerate(zip(self.indices, chosen, strict=True)):
            before = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
            stays = old[before] == new
            values = _values(self.params[i]).index_select(0, new).float()
            for key in _STATE[1:]:
                view = self.views[key][i]
                fresh = values if key == "master" else torch.zeros_like(view)
                view.copy_(torch.where(stays, view[before], fresh))
            self.indices[i] = new
            self.ages[i] = _common_age(self.views["age"][i])
            survivors.append(int(stays.sum()))
        return survivors

    def restore(self, i: int, found: dict[str, Tensor]) -> None:
        self.indices[i] = found["indices"].to(self.indices[i], copy=True)
        for key in _STATE[1:]:
            self.views[key][i].copy_(found[key])
        self.ages[i] = _common_age(self.views["age"][i])
        self.gathered[i] = False


def _values(p: Tensor) -> Tensor:
    return p.detach().view(-1)


def _common_age(ages: Tensor) -> int | None:
    youngest, oldest = (int(extreme) for extreme in ages.aminmax())
    return youngest if youngest == oldest < torch.iinfo(ages.dtype).max else None


def _age_dtype(betas: tuple[float, float]) -> torch.dtype:
    # int16 saturates at 32767 steps: exact where 1 - beta**32767 is already 1 in float32
    return torch.int16 if max(betas) ** torch.iinfo(torch.int16).max < 2**-25 else torch.int32


def _choose(
    params: list[Tensor], names: list[str], positions: list[int], group: dict[str, Any], refreshes: int
) -> list[Tensor]:
    def one(i: int) -> Tensor:
        count = budget(params[i].shape, group["density"], group["lora_rank"])  # type: ignore[arg-type]
        seed = _seed(group["seed"], refreshes, positions[i])
        try:
            return principal_indices(params[i].detach(), group["filter_rank"], count, group["select"], seed)
        except ValueError as reason:
            raise ValueError(f"cannot choose entries of {names[i]} after {group['steps']} steps: {reason}") from reason

    members = range(len(params))
    at_once = params[0].device.type == "cpu" and sum(p.numel() for p in params) > 2**18  # below, threads cost more
    return each_matrix(one, members) if at_once else [one(i) for i in members]


def _seed(*parts: int) -> int:
    from numpy.random import SeedSequence

    return int(SeedSequence(parts).generate_state(1)[0])


def _check_options(group: dict[str, Any]) -> None:
    budget((1, 1), group["density"], group["lora_rank"])
    if group["select"] not in get_args(Select):
        raise ValueError(f"select is one of {', '.join(get_args(Select))}: got {group['select']!r}")
    if group["refresh"] is not None and (group["refresh"] != int(group["refresh"]) or group["refresh"] < 1):
        raise ValueError(f"refresh is a number of steps, 1 or more, or None: got {group['refresh']}")
    if group["filter_rank"] < 1:
        raise ValueError(f"filter_rank must be at least 1, got {group['filter_rank']}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas lie in [0, 1), got {group['betas']}")
    for key in ("lr", "eps", "weight_decay", "seed"):
        if not group[key] >= 0:
            raise ValueError(f"{key} must be 0 or more, got {group[key]}")


def _check_parameter(name: str, p: Tensor) -> None:
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = "not supported" if p.is_floating_point() else "quantised weights have no entries of their own to train"
        raise TypeError(f"LIFT trains float32, bfloat16 and float16 weights; {name} is {p.dtype} ({reason})")
    if p.ndim != 2 or p.numel() == 0:
        raise ValueError(
            f"LIFT trains matrices; {name} has shape {tuple(p.shape)}: leave it frozen or give it to another optimizer"
        )
    if not p.is_contiguous():
        raise ValueError(f"LIFT needs contiguous parameters; {name} is a strided view: make it contiguous first")
    if not p.requires_grad:
        raise ValueError(f"{name} does not require a gradient, so it cannot be trained: leave it out")


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
