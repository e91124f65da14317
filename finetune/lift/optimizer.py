"""LIFT, the optimizer: AdamW over chosen entries, which are chosen anew now and then."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from finetune.distributed import Peers, Shards, is_sharded, local_part
from finetune.lift.ledger import Ledger, Stack, age_dtype
from finetune.lift.selection import (
    OF_GRADIENTS,
    Choice,
    Matrix,
    Select,
    budget,
    check_block,
    check_select,
    choose,
    position_dtype,
)
from finetune.lift.shards import SHARDED, choose_shards
from surgery.seeds import seed_from_numbers
from surgery.sites import Site, match
from surgery.weights import linear_sites

if TYPE_CHECKING:
    from surgery.model import LiveWeights
    from surgery.weights import Delta, Weights

Scope = Literal["matrix", "global"]
Override = float | Mapping[str, Any] | None
_CHOICE = (  # what entries depend on: a saved state of other ones is of another run
    "density", "lora_rank", "scope", "overrides", "block", "select", "filter_rank", "seed", "refresh", "min_change", "grow_to", "agreement",
    "processes", "shard",
)  # fmt: skip


@dataclass(frozen=True)
class Refresh:
    """What a refresh found and did.

    step: after which step. overlap: intersection over union of the old and the new mask over all parameters of the group, in [0, 1].
    by_parameter: the same for each matrix, by name (or by position where the optimizer was given no names).
    adopted: whether the new mask was taken up; not where too little would have changed. warm: for how many matrices the filter was
    begun from the last refresh's, the others' being exact.
    """

    step: int
    overlap: float
    by_parameter: dict[str, float]
    adopted: bool = True
    warm: int = 0


@dataclass(frozen=True)
class Gathered:
    """The gradient of one optimizer step at the chosen entries of a parameter: what is written to `grad` changes the step.

    name: the parameter's; of one that holds several matrices, those of its first and its last, ``0.mlp.e0.gate to 0.mlp.e7.up``.
    """

    name: str
    parameter: Tensor
    indices: Int[Tensor, " count"]
    grad: Float[Tensor, " count"]


class LIFT(torch.optim.Optimizer):
    """AdamW over the principal entries of each matrix; every other entry keeps its bytes.

    params: 2-D parameters, or (name, parameter) pairs, or groups of either, as for any torch optimizer. A parameter
        that appears twice (tied weights) counts once. Where matrices of one shape lie in one parameter, one above the other, as a
        mixture's experts do, (names, parameter) has the names of all, and each is treated as a matrix of its own. `matrices_of` gives
        a model's. Put the model on its device first.
    lr, betas, eps, weight_decay: as in AdamW; weight decay is decoupled and acts on the chosen entries.
    density, lora_rank: the budget of each matrix, exactly one of them (see `budget`).
    scope: "matrix" spends each matrix's budget in it; "global" adds the budgets of the group up and takes the largest scores wherever
        they are, each matrix's scores divided by the root mean square of its weights (of what is compared, where that is no weight).
    overrides: pattern of names (`12.mlp.*`, `*.attn.q`) -> a budget of its own, a density or {"lora_rank": 8}, or None, which leaves the
        matrix as it is: freeze it, or give it to another optimizer. The last pattern that names a matrix decides.
    block: choose 4x4 squares, say, in place of entries: `block=4` (see `principal_indices`).
    filter_rank: the rank of the filter through which entries are compared (see `principal_indices`).
    refresh: after every so many steps choose anew, by the weights as they then are; None keeps the first choice.
        Entries that stay keep moments and age; newcomers start at zero with age zero; leavers keep their
        drifted value. `refreshes` lists what each refresh did.
    min_change: take up a new choice only where at least this fraction of it is new, in [0, 1].
    grow_to: nobody leaves: a refresh adds its choice to what there is, until this density is reached, in (0, 1].
    agreement: 1, or a fraction below: the filter of a refresh is begun from that of the last one, which costs about a tenth, with about
        this share of the entries or more being those of the exact one: an estimate (see `warm_subspace`), kept over all matrices, while a
        single one may miss as much again; where it is not reached, the filter is exact.
    select, seed: which entries (see `principal_indices`); a random choice depends on (seed, refresh, matrix) only. "gradient" and
        "movement" choose by the gradient of the first step and of the one after each `refresh` steps, which then exists whole.

    All of these can be set per group; a scheduler finds `lr` where it expects it. With density 1 in float32 the result
    is torch.optim.AdamW(foreach=False)'s, bit for bit.

    Gradients: a hook on each parameter gathers the chosen entries as soon as its gradient is complete, adds them to
    a compact float32 accumulator and frees `.grad`, so at most one layer's dense gradient exists at a time (where a backward pass is of more
    than one pass through the model, autograd keeps all of them back; `finetune.hosts.Surgical` takes it in pieces, `finetune.pieces`). Hence:
    clip with `clip_grad_norm_` of this object, not with torch's; `step` uses up what was gathered, so that a training
    loop that only calls `model.zero_grad()` is right too; `zero_grad` drops what was gathered. `close` (or the end of a
    `with` block, or of the object's life) removes the hooks. A trainer clips with torch's: write ``class T(Surgical, Trainer)``
    (`finetune.hosts`), with or without an objective, or its max_grad_norm does nothing to what is trained here, and the grad_norm that it
    logs is that of other parameters.

    State of each parameter, `state[p]`: `indices` (int32), `exp_avg`, `exp_avg_sq` (float32) and `age` (int16, saturating where the
    bias correction has long become 1, else int32): 14 bytes for each chosen entry, as a float32 weight is its own master. A bfloat16
    one has its lower 16 bits in `low`, so that no step is lost in rounding; a float16 one, what it lacks, in float32. With an agreement
    below 1 there is the filter's `basis` too. The accumulator (4 bytes) takes the place of gradients. `state_dict` holds all of it at
    its own precision: a resumed run goes on bit for bit.

    Several processes (`finetune.distributed`): gradients of weights that every process has whole are averaged over `process_group`, by
    default all processes, when they are first asked for in a step, and all then take the same step. Weights sharded by rows (FSDP2) are
    chosen and trained where they lie, chosen as the whole would be; each process saves and loads a state of its own. All processes make
    the same calls.

    Raises ValueError or TypeError, naming the parameter, for anything that is not a contiguous float32, bfloat16 or
    float16 matrix that requires a gradient, and for weights that are not the same in all processes.
    Source: arXiv 2506.00772, Algorithm 1. Differs: see `finetune.lift`.
    """

    refreshes: list[Refresh]

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        density: float | None = None,
        lora_rank: int | None = None,
        scope: Scope = "matrix",
        overrides: Mapping[str, Override] | None = None,
        block: int = 1,
        filter_rank: int = 16,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int | None = None,
        min_change: float = 0.0,
        grow_to: float | None = None,
        agreement: float = 1.0,
        select: Select = "largest",
        seed: int = 0,
        process_group: Any = None,
    ):
        self._process_group, self._peers = process_group, Peers.of(process_group)
        self.refreshes = []
        self._ledgers: list[list[Ledger]] = []
        self._handles: list[Any] = []
        self._closed = False
        defaults = {
            "lr": lr, "density": density, "lora_rank": lora_rank, "scope": scope, "overrides": dict(overrides or {}), "block": block,
            "filter_rank": filter_rank, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "refresh": refresh,
            "min_change": min_change, "grow_to": grow_to, "agreement": agreement, "select": select, "seed": seed,
            "steps": 0, "chosen_at": -1,
        }  # fmt: skip
        super().__init__(params, defaults)
        weakref.finalize(self, _remove, self._handles)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters and chooses their entries. Raises as the constructor does."""
        listed = param_group["params"]
        listed = _named([listed] if isinstance(listed, Tensor) else list(listed), f"{len(self.param_groups)}.")
        options = self.defaults | param_group
        _check_options(options)
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        stacks, own = _stacks([(names, p) for names, p in listed if id(p) not in seen], options["overrides"])
        if own and not stacks:
            raise ValueError("the overrides leave out every parameter of the group: nothing is left to train")
        for stack in stacks:
            _check_parameter(stack, options, [own.get(name) or _budget_of(options) for name in stack.trained])
        where, stacks = _processes(stacks, options, self._peers)
        budgets = {
            "overrides": dict(options["overrides"]),
            "own": {name: limit for name, limit in own.items() if limit},
        }
        super().add_param_group({**param_group, **where, **budgets, "params": [(s.name, s.parameter) for s in stacks]})
        group = self.param_groups[-1]
        first = sum(len(stack.trained) for ledger in chain(*self._ledgers) for stack in ledger.stacks)
        try:
            self._ledgers.append(self._opened(group, stacks, first))
        except Exception:
            self.param_groups.pop()
            raise
        for ledger in self._ledgers[-1]:
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
        self._reopen()
        if not any(any(ledger.gathered) for ledger in chain(*self._ledgers)):
            named = list(self._parameters())
            frozen = [name for name, p in named if not p.requires_grad]
            raise RuntimeError(
                f"no gradient has arrived: {len(frozen)} of {len(named)} parameters, first {frozen[0]}, were frozen since LIFT was given them, as by "
                "PEFT where it puts an adapter beside a model's own weights; give LIFT what trains, after that"
                if frozen
                else "no gradient has arrived since the last step: call backward on a loss before step"
            )
        for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
            if not any(any(ledger.gathered) for ledger in ledgers):
                continue
            for ledger in ledgers:
                ledger.update(group)
            group["steps"] += 1
            if group["refresh"] and group["steps"] % group["refresh"] == 0 and group["select"] not in OF_GRADIENTS:
                self._refresh(group, ledgers)
            for ledger in ledgers:
                ledger.waiting = _awaits_gradients(group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gathered gradients, and `.grad` where there is one."""
        self._reopen()
        for ledger in chain(*self._ledgers):
            ledger.gathered = [False] * len(ledger.params)
        super().zero_grad(set_to_none)

    def gathered(self) -> list[Gathered]:
        """The gathered gradients of the coming step, of each parameter that got one."""
        self._collect()
        return [
            Gathered(ledger.names[i], p, ledger.indices[i], ledger.views["grad"][i])
            for ledger in chain(*self._ledgers)
            for i, p in enumerate(ledger.params)
            if ledger.gathered[i]
        ]

    def gradients(self) -> Iterator[tuple[str, Float[Tensor, " count"]]]:
        """The gathered gradients, by the parameter's name: float32 at its chosen entries; writing to one changes the coming step."""
        return ((found.name, found.grad) for found in self.gathered())

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Float[Tensor, ""]:
        """Scales the gathered gradients to a joint 2-norm of at most `max_norm`, and gives the norm they had before.

        The same rule as torch.nn.utils.clip_grad_norm_, on the entries that are trained. infinity only measures.
        """
        arrived = [grad for _, grad in self.gradients()]
        total = self._norm()
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in arrived:
            grad.mul_(scale.to(grad.device))
        return total

    def _norm(self) -> Float[Tensor, ""]:
        norms = []
        for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
            of = [
                grad
                for ledger in ledgers
                for grad, here in zip(ledger.views["grad"], ledger.gathered, strict=True)
                if here
            ]
            norm, shards = get_total_norm(of), _shards(group, ledgers)
            norms.append(shards.total(norm.square()[None])[0].sqrt() if shards else norm)
        return get_total_norm(norms) if len(norms) > 1 else norms[0]

    def values(self, parameter: Tensor) -> Float[Tensor, " count"]:
        """The chosen entries of a parameter in the precision they are trained in, as a copy. KeyError for one that is not trained here."""
        ledger, i = self._place(parameter)
        return ledger.values(i)

    @torch.no_grad()
    def set_values_(self, parameter: Tensor, values: Float[Tensor, " count"]) -> None:
        """Changes the parameter's chosen entries to these float32 values, kept in full."""
        ledger, i = self._place(parameter)
        ledger.set_values_(i, values)

    def delta(self, weights: "LiveWeights", base: "Weights") -> "Delta":
        """What training has changed since `base`, as a sparse vector: all entries that ever were among the chosen and moved.

        weights: `Model.weights` of the model that is trained. base: the weights training began from, a checkpoint say, read a tensor
        at a time. The vector is a copy: it stays as it is when training goes on. `save_delta` writes it, `base + delta` is the tuned
        model (in float32 to a rounding), `tuned - delta` the base.
        Raises ValueError where more has changed than was ever trained, so that `base` is not what training began from, or nothing has.
        """
        from finetune.overlay import Entries

        if any(group["shard"] is not None for group in self.param_groups):
            raise ValueError(
                "no process has all of a sharded model: save it whole, and take the difference of the two checkpoints"
            )
        moved = {id(p): 0 for _, p in self._parameters()}
        sites = [site for site in weights if id(weights.parameter(site)) in moved]
        if not sites:
            raise ValueError("this optimizer trains none of these weights: give those of the model it was made for")
        entries: dict[Site, tuple[Tensor, Tensor]] = {}
        for site in sites:
            change = (weights[site].detach().float() - base[site].to(weights[site].device).float()).reshape(-1)
            at = change.nonzero().squeeze(1)
            entries[site] = (at.to(position_dtype(len(change))).cpu(), change[at].cpu())
            moved[id(weights.parameter(site))] += len(at)
        if not any(moved.values()):
            raise ValueError("nothing has changed since the base: there is no delta")
        self._require_trained(moved)
        return Entries(entries, {site: weights.shape(site) for site in sites}, weights.anatomy)

    def _require_trained(self, moved: Mapping[int, int]) -> None:
        """That no parameter has more entries that moved than could have been trained."""
        for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
            if group["scope"] == "global":  # any number of them may have been in one matrix
                continue
            choices = 1 + (group["steps"] // group["refresh"] if group["refresh"] else 0)
            for name, p, chosen in chain(*(zip(at.names, at.params, at.indices, strict=True) for at in ledgers)):
                if moved[id(p)] > choices * len(chosen):
                    raise ValueError(
                        f"{name} differs from the base in {moved[id(p)]} entries, and at most {choices * len(chosen)} were ever "
                        "trained: give the weights that training began from"
                    )

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter, the groups and the log of refreshes."""
        self._meet()
        return {**super().state_dict(), "refreshes": [asdict(done) for done in self.refreshes]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state at its own precision. Load the weights it belongs to as well: they are the masters.

        Raises ValueError where the state is of other parameters or of entries chosen in another way, and leaves the optimizer as it was.
        """
        self._meet()
        saved = state_dict["state"]
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        order = {id(p): k for k, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))}
        if len(ids) != len(order):
            raise ValueError(f"the saved state is of {len(ids)} parameters, this optimizer has {len(order)}")
        arriving: list[tuple[Ledger, list[dict[str, Tensor]]]] = []
        for ledger in chain(*self._ledgers):
            found = [saved.get(ids[order[id(p)]], {}) for p in ledger.params]
            for p, name, own in zip(ledger.params, ledger.names, found, strict=True):
                _check_saved(p, name, own, ledger.state_keys)
            arriving.append((ledger, found))
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            differing = [
                f"{key} was {theirs.get(key)!r}, is {group[key]!r}" for key in _CHOICE if theirs.get(key) != group[key]
            ]
            if differing:
                raise ValueError(
                    f"the saved state is of entries chosen in another way, another run's: {'; '.join(differing)}"
                )
        # The base class would cast everything to the parameter's type; it gets the groups only.
        super().load_state_dict({**state_dict, "state": {}})
        for ledger, found in arriving:
            ledger.restore(found)
        for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
            for ledger in ledgers:
                ledger.waiting = _awaits_gradients(group)
        self.refreshes[:] = [Refresh(**done) for done in state_dict.get("refreshes", ())]
        self._link_state()

    def let_deepspeed_step(self) -> None:
        """For a host whose DeepSpeed engine steps by this optimizer: gradients that arrive under DeepSpeed are refused otherwise."""
        for ledger in chain(*self._ledgers):
            ledger.hosted = True

    def close(self) -> None:
        """Removes the hooks from the parameters: gradients then stay in `.grad`, and `step` raises RuntimeError."""
        self._closed = True
        _remove(self._handles)

    def __enter__(self) -> "LIFT":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for ledger in chain(*self._ledgers):
            yield from zip(ledger.names, ledger.params, strict=True)

    def _place(self, parameter: Tensor) -> tuple[Ledger, int]:
        for ledger in chain(*self._ledgers):
            for i, p in enumerate(ledger.params):
                if p is parameter:
                    return ledger, i
        raise KeyError("this optimizer does not train that parameter")

    def _collect(self) -> None:
        """Chooses by the gradients that wait for it, and gathers them and those that were put into `.grad` by hand."""
        if self._closed:
            raise RuntimeError("this optimizer was closed: its hooks no longer gather gradients")
        self._meet()
        for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
            peers, whole = self._peers if group["shard"] is None else None, _awaits_gradients(group)
            if whole:
                params = [p for ledger in ledgers for p in ledger.params]
                if peers:
                    peers.average_whole_(params)
                if any(p.grad is not None for p in params):
                    self._refresh(group, ledgers)
            for ledger in ledgers:
                for i, p in enumerate(ledger.params):
                    if p.grad is not None:
                        ledger.gather(i, p)
                if peers and not ledger.averaged:
                    if not whole:
                        peers.average_(ledger.flat["grad"], ledger.views["grad"], ledger.gathered)
                    ledger.averaged = True

    def _meet(self) -> None:
        """Takes up what a host did after this object was made: other processes that it began to work with, parameters that it put in the
        place of others (accelerate does, where it shards a model).
        """
        if self._peers is None and (peers := Peers.of(self._process_group)):
            self._peers = peers
            for group, ledgers in zip(self.param_groups, self._ledgers, strict=True):
                group |= _processes([stack for ledger in ledgers for stack in ledger.stacks], group, peers)[0]
                chosen = [pair for ledger in ledgers for pair in zip(ledger.names, ledger.indices, strict=True)]
                if group["shard"] is None:
                    peers.require_same({f"what was chosen of {name}": indices for name, indices in chosen})
        known = {id(p) for _, p in self._parameters()}
        replaced = [group for group in self.param_groups if any(id(p) not in known for p in group["params"])]
        if not replaced:
            return
        if any(group["steps"] for group in replaced):
            raise RuntimeError("the optimizer's parameters were replaced by others in the middle of training")
        _remove(self._handles)
        self.state.clear()
        first = 0
        for k, group in enumerate(self.param_groups):
            before = {stack.name: stack for ledger in self._ledgers[k] for stack in ledger.stacks}
            stacks = [
                replace(before[name], parameter=p)
                for name, p in zip(group["param_names"], group["params"], strict=True)
            ]
            where, stacks = _processes(stacks, group, self._peers)
            group |= where
            self._ledgers[k] = self._opened(group, stacks, first)
            first += sum(len(stack.trained) for stack in stacks)
        self._handles += [handle for ledger in chain(*self._ledgers) for handle in ledger.hook()]
        self._link_state()

    def _reopen(self) -> None:
        """The gradients of another step may arrive."""
        for ledger in chain(*self._ledgers):
            ledger.averaged = False

    def _opened(self, group: dict[str, Any], stacks: list[Stack], first: int) -> list[Ledger]:
        """Ledgers of a new group, one for each device and dtype, with its first choice of entries."""
        positions = list(accumulate((len(stack.trained) for stack in stacks), initial=first))
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, stack in enumerate(stacks):
            alike.setdefault((stack.parameter.device, stack.parameter.dtype), []).append(i)
        ledgers = [
            Ledger([stacks[i] for i in own], [positions[i] for i in own], age_dtype(group["betas"]))
            for own in alike.values()
        ]
        by_gradient = group["select"] in OF_GRADIENTS
        # no gradient is there yet: what stands here until one is, is never trained
        found = self._chosen(group | {"select": "random"} if by_gradient else group, ledgers)
        for ledger, choices in zip(ledgers, found, strict=True):
            ledger.waiting = by_gradient
            new = _positions(ledger, choices)
            ledger.bases = _bases(choices)
            ledger.adopt(new, ledger.stays(new))
        return ledgers

    def _chosen(self, group: dict[str, Any], ledgers: list[Ledger]) -> list[list[list[Choice]]]:
        """Choices of every ledger's parameters, one for each matrix, by the weights (and gradients) as they are."""
        matrices = [m for ledger in ledgers for m in _matrices(group, ledger)]
        select, rank, together = group["select"], group["filter_rank"], group["scope"] == "global"
        if group["shard"] is not None:
            shards = _shards(group, ledgers)
            assert shards is not None
            found = choose_shards(matrices, shards, select, rank, together=together)
        else:
            found = choose(
                matrices, select, rank, block=group["block"], together=together, agreement=group["agreement"]
            )
            if self._peers:
                agreed = self._peers.agreed([choice.indices for choice in found])
                found = [replace(choice, indices=indices) for choice, indices in zip(found, agreed, strict=True)]
        choices = iter(found)
        return [
            [[_NOTHING if name is None else next(choices) for name in stack.matrices] for stack in ledger.stacks]
            for ledger in ledgers
        ]

    def _refresh(self, group: dict[str, Any], ledgers: list[Ledger]) -> None:
        """Chooses anew; not logged where it is the first choice, which had to wait for a gradient."""
        group["chosen_at"] = group["steps"]
        if group["grow_to"] and group["steps"] and _full(group, ledgers):
            for ledger in ledgers:
                ledger.waiting = False
            return
        found = self._chosen(group, ledgers)
        new = [_positions(ledger, choices) for ledger, choices in zip(ledgers, found, strict=True)]
        stays = [ledger.stays(indices) for ledger, indices in zip(ledgers, new, strict=True)]
        warm = sum(choice.warm for choices in chain(*found) for choice in choices)
        shards = _shards(group, ledgers)
        done, fresh = _compared(group["steps"], ledgers, new, stays, warm, shards)
        adopted = fresh >= group["min_change"] or not group["steps"]
        for ledger, choices, indices, stay in zip(ledgers, found, new, stays, strict=True):
            ledger.waiting = False
            ledger.bases = _bases(choices)
            if adopted:
                ledger.adopt(indices, stay)
        if group["steps"]:
            self.refreshes.append(replace(done, adopted=adopted))
        self._link_state()

    def _link_state(self) -> None:
        for ledger in chain(*self._ledgers):
            for i, p in enumerate(ledger.params):
                self.state[p] = ledger.state(i)


_NOTHING = Choice(torch.zeros(0, dtype=torch.int32), None, False)


def _positions(ledger: Ledger, choices: list[list[Choice]]) -> list[Tensor]:
    """The chosen positions of each parameter, from those of its matrices."""
    return [
        stack.joined([choice.indices.to(stack.parameter.device) for choice in own])
        for stack, own in zip(ledger.stacks, choices, strict=True)
    ]


def _bases(choices: list[list[Choice]]) -> list[Tensor | None]:
    """The filters' bases of each parameter, one matrix's above the other's; zeros for a matrix that has none, and will have none."""
    stacked: list[Tensor | None] = []
    for own in choices:
        there = next((choice.basis for choice in own if choice.basis is not None), None)
        stacked.append(
            None if there is None else torch.cat([torch.zeros_like(there) if c.basis is None else c.basis for c in own])
        )
    return stacked


def _compared(
    step: int,
    ledgers: list[Ledger],
    new: list[list[Tensor]],
    stays: list[list[tuple[Tensor, Tensor]]],
    warm: int,
    shards: Shards | None,
) -> tuple[Refresh, float]:
    """The overlap of old and new masks, and the fraction of the new ones that is new."""
    rows: list[list[int]] = []  # of each matrix, how many entries stay, were there and are there now
    for ledger, found, stay in zip(ledgers, new, stays, strict=True):
        for stack, before, after, (_, same) in zip(ledger.stacks, ledger.indices, found, stay, strict=True):
            counts = stack.counts(after)
            staying = [int(part.sum()) for part in same.split(counts)]
            of = zip(stack.matrices, staying, stack.counts(before), counts, strict=True)
            rows += [numbers for name, *numbers in of if name is not None]
    names = [name for ledger in ledgers for stack in ledger.stacks for name in stack.trained]
    kept, old, now = torch.tensor(rows, dtype=torch.int64).T
    if shards:
        counted = shards.total(torch.stack([kept, old, now]).view(-1).to(ledgers[0].params[0].device))
        kept, old, now = counted.view(3, -1).cpu()
    joint = old + now - kept
    by_parameter = {name: k / n if n else 1.0 for name, k, n in zip(names, kept.tolist(), joint.tolist(), strict=True)}
    overlap, fresh = int(kept.sum()) / int(joint.sum()), 1 - int(kept.sum()) / int(now.sum())
    return Refresh(step, overlap, by_parameter, warm=warm), fresh


def _processes(
    stacks: list[Stack], options: dict[str, Any], peers: Peers | None
) -> tuple[dict[str, int | None], list[Stack]]:
    """How many processes train a group's parameters, and which rows of them are here; the stacks, which know it too. Raises where whole ones
    are not the same in all."""
    shards = _sharded(stacks, options)
    if shards:
        return {"processes": shards.count, "shard": shards.rank}, [_dealt(stack, shards) for stack in stacks]
    if peers:
        peers.require_same({stack.name: stack.parameter for stack in stacks})
    return {"processes": peers.count if peers else 1, "shard": None}, stacks


def _dealt(stack: Stack, shards: Shards) -> Stack:
    """A stack of a sharded parameter, with what the processes before this one have of it where that says which matrices are here."""
    mine = local_part(stack.parameter)
    return replace(stack, begin=shards.before(mine.numel(), mine.device)) if len(stack.matrices) > 1 else stack


def lift_of(optimizer: Any) -> LIFT | None:
    """The `LIFT` that an optimizer is, alone or inside accelerate's; None of another."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, LIFT) else None


def matrices_of(weights: "LiveWeights") -> list[tuple[str | tuple[str, ...], nn.Parameter]]:
    """What `LIFT` is given to train every attention and MLP matrix of a live model, by their sites' names.

    Experts that are stored as one tensor are matrices of their own, under the names of all, in the order in which they lie. Other matrices
    that are one parameter (q, k and v in some families) are one to LIFT too, by the name of the first.
    """
    held: dict[nn.Parameter, list[Site]] = {}
    for site in linear_sites(weights):
        held.setdefault(weights.parameter(site), []).append(site)

    def begins(site: Site) -> int:
        p = weights.parameter(site)
        return int(weights.anatomy.places[site].take(torch.empty(p.shape, device="meta")).storage_offset())

    return [
        (str(sites[0]) if p.ndim == 2 else tuple(str(site) for site in sorted(sites, key=begins)), p)
        for p, sites in held.items()
    ]


def _sharded(stacks: list[Stack], options: dict[str, Any]) -> Shards | None:
    """The processes over which the parameters of a group are dealt out; None where each is whole. Raises for what cannot be done so."""
    dealt = {stack.name: stack.parameter for stack in stacks if is_sharded(stack.parameter)}
    if not dealt:
        return None
    whole = next((stack.name for stack in stacks if not is_sharded(stack.parameter)), None)
    if whole is not None:
        raise ValueError(f"{next(iter(dealt))} is sharded and {whole} is not: put them into groups of their own")
    found = [Shards.of(name, p) for name, p in dealt.items()]
    if any(shards.group is not found[0].group for shards in found):
        raise ValueError(
            "the parameters of a group are sharded over different processes: put them into groups of their own"
        )
    if options["select"] not in SHARDED:
        raise ValueError(
            f"of sharded weights entries are chosen by {', '.join(SHARDED)}; got select={options['select']!r}"
        )
    for key, idle in (("block", 1), ("grow_to", None), ("agreement", 1.0)):
        if options[key] != idle:
            raise ValueError(f"{key}={options[key]} needs whole matrices; {next(iter(dealt))} is sharded")
    return found[0]


def _shards(group: dict[str, Any], ledgers: list[Ledger]) -> Shards | None:
    return None if group["shard"] is None else Shards.of(ledgers[0].names[0], ledgers[0].params[0])


def _matrices(group: dict[str, Any], ledger: Ledger) -> list[Matrix]:
    own, block = group["own"], group["block"]
    refreshes = group["steps"] // group["refresh"] if group["refresh"] else 0
    grows = bool(group["grow_to"] and group["steps"])
    found = []
    for stack, first, basis, indices in zip(ledger.stacks, ledger.positions, ledger.bases, ledger.indices, strict=True):
        count, p = len(stack.matrices), stack.parameter
        parts = zip(
            stack.matrices,
            stack.apart(p.detach()),
            [None] * count if p.grad is None else stack.apart(p.grad),
            [None] * count if basis is None else basis.chunk(count),
            stack.within(indices) if grows else [None] * count,
            strict=True,
        )
        for position, (name, W, gradient, start, old) in enumerate((at for at in parts if at[0] is not None), first):
            found.append(
                Matrix(
                    name=f"{name} after {group['steps']} steps",
                    W=W,
                    count=budget(stack.shape, **(own.get(name) or _budget_of(group)), block=block),
                    seed=seed_from_numbers(group["seed"], refreshes, position),
                    own=name in own,
                    gradient=gradient,
                    start=start,
                    old=old,
                    cap=budget(stack.shape, density=group["grow_to"], block=block) if grows else 0,
                    height=None if group["shard"] is None else stack.shape[0],
                )
            )
    return found


def _full(group: dict[str, Any], ledgers: list[Ledger]) -> bool:
    """Whether a growing mask has reached its cap."""
    matrices = [m for ledger in ledgers for m in _matrices(group, ledger)]
    if group["scope"] == "matrix":
        return all(m.old is not None and len(m.old) >= m.cap for m in matrices)
    return sum(len(m.old) for m in matrices if m.old is not None) >= sum(m.cap for m in matrices)


def _awaits_gradients(group: dict[str, Any]) -> bool:
    """Whether the coming step chooses entries by its gradients."""
    due = group["steps"] // group["refresh"] * group["refresh"] if group["refresh"] else 0
    return group["select"] in OF_GRADIENTS and group["chosen_at"] < due


def _named(listed: list[Any], prefix: str) -> list[tuple[tuple[str, ...], Tensor]]:
    """Each parameter with the names of its matrices; one without a name is called by its position."""
    pairs = [entry if isinstance(entry, tuple) else (f"{prefix}{i}", entry) for i, entry in enumerate(listed)]
    return [((names,) if isinstance(names, str) else tuple(names), p) for names, p in pairs]


def require_tiles(params: Iterable[Any], block: int, overrides: Mapping[str, Override] | None = None) -> None:
    """Raise ValueError where blocks of a side do not tile a matrix that `LIFT` would train of these parameters."""
    stacks, _ = _stacks(_named(list(params), ""), overrides or {})
    for stack in stacks:
        _require_tile(stack, block)


def _require_tile(stack: Stack, block: int) -> None:
    try:
        check_block(stack.shape, block)
    except ValueError as reason:
        raise ValueError(
            f"{reason}, which is {stack.name}: choose a side that divides both, or leave it out by an override of None"
        ) from reason


def _stacks(
    listed: Iterable[tuple[tuple[str, ...], Tensor]], overrides: Mapping[str, Override]
) -> tuple[list[Stack], dict[str, dict[str, Any] | None]]:
    """Each parameter once with the matrices of it that are trained, without those that have none; and the matrices' own budgets."""
    unique: dict[int, tuple[tuple[str, ...], Tensor]] = {}
    for names, p in listed:
        unique.setdefault(id(p), (names, p))
    own = _overridden([name for names, _ in unique.values() for name in names], overrides)
    left = {name for name, limit in own.items() if limit is None}
    stacks = [
        Stack(_called(names), p, tuple(None if name in left else name for name in names))
        for names, p in unique.values()
        if not left.issuperset(names)
    ]
    return stacks, own


def _called(names: tuple[str, ...]) -> str:
    """What a parameter that holds these matrices is called."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _budget_of(options: dict[str, Any]) -> dict[str, Any]:
    return {"density": options["density"], "lora_rank": options["lora_rank"]}


def _overridden(names: Iterable[str], overrides: Mapping[str, Override]) -> dict[str, dict[str, Any] | None]:
    """The parameters that have a budget of their own, or None: left out."""
    sites = [Site.parse(name) for name in names] if overrides else []
    found: dict[str, dict[str, Any] | None] = {}
    for pattern, own in overrides.items():
        limit: dict[str, Any] | None = None
        if own is not None:
            limit = dict(own) if isinstance(own, Mapping) else {"density": own}
            if set(limit) - {"density", "lora_rank"}:
                raise ValueError(f"the override of {pattern!r} is a density, {{'lora_rank': n}} or None: got {own!r}")
            budget((1, 1), **limit)
        found |= {str(site): limit for site in match(pattern, sites)}
    return found


def _check_saved(p: Tensor, name: str, found: dict[str, Tensor], keys: tuple[str, ...]) -> None:
    if set(found) - {"basis"} != {"indices", *keys}:
        raise ValueError(f"the saved state of {name} is not LIFT's: it holds {sorted(found) or 'nothing'}")
    if len(found["indices"]) and int(found["indices"].max()) >= p.numel():
        raise ValueError(
            f"the saved state of {name} has entries that a {tuple(p.shape)} matrix lacks: it is another model's"
        )


def _check_options(group: dict[str, Any]) -> None:
    budget((1, 1), group["density"], group["lora_rank"])
    check_select(group["select"])
    if group["scope"] not in get_args(Scope):
        raise ValueError(f"scope is one of {', '.join(get_args(Scope))}: got {group['scope']!r}")
    if group["refresh"] is not None and (group["refresh"] != int(group["refresh"]) or group["refresh"] < 1):
        raise ValueError(f"refresh is a number of steps, 1 or more, or None: got {group['refresh']}")
    if group["filter_rank"] < 1:
        raise ValueError(f"filter_rank must be at least 1, got {group['filter_rank']}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas lie in [0, 1), got {group['betas']}")
    for key in ("lr", "eps", "weight_decay", "seed"):
        if not group[key] >= 0:
            raise ValueError(f"{key} must be 0 or more, got {group[key]}")
    if not 0 <= group["min_change"] <= 1:
        raise ValueError(f"min_change is a fraction in [0, 1], got {group['min_change']}")
    for key in ("grow_to", "agreement"):
        if group[key] is not None and not 0 < group[key] <= 1:
            raise ValueError(f"{key} is a fraction in (0, 1], got {group[key]}")
    given = [key for key, idle in (("min_change", 0.0), ("grow_to", None), ("agreement", 1.0)) if group[key] != idle]
    if given and not group["refresh"]:
        raise ValueError(f"{' and '.join(given)} says what a refresh does: give refresh, a number of steps, as well")
    if group["agreement"] < 1 and group["select"] != "largest":
        raise ValueError(
            f'agreement is of select="largest", the choice with a filter; {group["select"]!r} is always exact'
        )


def _check_parameter(stack: Stack, options: dict[str, Any], limits: list[dict[str, Any]]) -> None:
    name, p, count = stack.name, stack.parameter, len(stack.matrices)
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = (
            "not supported"
            if p.is_floating_point()
            else "quantised weights have no entries of their own to train; `finetune.overlay` lays trainable ones beside them"
        )
        raise TypeError(f"LIFT trains float32, bfloat16 and float16 weights; {name} is {p.dtype} ({reason})")
    if count == 1 and (p.ndim != 2 or p.numel() == 0):
        raise ValueError(
            f"LIFT trains matrices; {name} has shape {tuple(p.shape)}: leave it frozen or give it to another optimizer, or, where matrices "
            "lie in it one above the other, name each of the matrices"
        )
    if count > 1 and (p.ndim < 2 or p.numel() == 0 or p.shape[:-1].numel() % count):
        raise ValueError(f"{name} has shape {tuple(p.shape)}, which is not {count} matrices of one shape")
    if not p.is_contiguous():
        raise ValueError(f"LIFT needs contiguous parameters; {name} is a strided view: make it contiguous first")
    if not p.requires_grad:
        raise ValueError(f"{name} does not require a gradient, so it cannot be trained: leave it out")
    _require_tile(stack, options["block"])
    if options["grow_to"] is not None:
        least = max(budget(stack.shape, **limit) for limit in limits)
        most = budget(stack.shape, density=options["grow_to"])
        if least > most:
            raise ValueError(
                f"{name} begins with {least} entries, more than the {most} that grow_to={options['grow_to']} allows"
            )


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
