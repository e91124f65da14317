"""DRIFT: gradients bent toward a vector while a model is tuned on other data.

`pull` is the rule, a pure function of one gradient and one tensor of the vector. `DRIFT` applies it once an optimizer step, in any
transformers Trainer. `merge_coefficients` says how far along the vector a model has come, and `matched_merge` goes as far without training.

Source: "Directional Reasoning Injection for Fine-Tuning MLLMs", arXiv 2510.15050, and its released code for the three rules "absolute",
    "norm" and "adaptive".
Differs: the paper writes ``g + a·scale·D`` with a = -1; here as in its code ``g - a·scale·D`` with a = 1, the same thing: descent moves the
    weights along D. The rules "project" and "aligned" are not the paper's. The pull acts on the accumulated, reduced and clipped
    gradient of a whole step, so that its strength does not depend on how a batch is split; ``legacy=True`` acts on every micro-batch
    as the released code does. A vector that fits nothing is an error, where that code goes on without a word.
"""

from __future__ import annotations

import functools
import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from finetune.distributed import is_partitioned, is_sharded, require_fsdp2, steps_apart
from finetune.lift import LIFT, lift_of
from finetune.lift.ledger import held
from finetune.shares import Share, require_same_word, share_of
from surgery.across import EMBED, HEAD, land
from surgery.anatomy import Place
from surgery.drawn import Alike, Noise, Permuted
from surgery.hashing import Digest
from surgery.lowrank import factor_pair
from surgery.model import LiveWeights, Model
from surgery.sites import Site, match
from surgery.tensorfile import raw_bytes
from surgery.weights import Delta, Indices, Weights, pieces, require_same_sites
from surgery.whole import write_whole

if TYPE_CHECKING:
    from pandas import DataFrame

Rule = Literal["absolute", "norm", "adaptive", "project", "aligned"]
Control = Literal["random", "permuted", "flipped"]
Store = Literal["memory", "pinned", "lazy"]
Form = Literal["gradient", "update"]
Where = str | Site | Sequence[str | Site]
Schedule = Callable[[int, int], float]
PRESETS = ("default", "attn", "mlp", "norm", "bias", "full")
_ALL = "all"
_CHECKPOINTED = "_checkpoint_wrapped_module."  # in names, where an engine computes layers again in the backward pass


# --- the rule ---------------------------------------------------------------------------------------------------------


def pull(
    grad: Float[Tensor, "*shape"], delta: Float[Tensor, "*shape"], alpha: float = 1.0, rule: Rule = "adaptive"
) -> Float[Tensor, "*shape"]:
    """A gradient bent so that descent moves the weights along `delta`: ``g - c·D``, with the factor c that the rule gives.

    With ``‖·‖`` the Frobenius norm, ``D̂ = D/‖D‖`` and cos the cosine between g and D:

    absolute: ``g - a·D``.
    norm:     ``g - a·‖g‖·D̂``.
    adaptive: ``g - a·(1 + cos)/2·‖g‖·D̂``: strongest where the loss pushes away from D, off where it already goes along it.
    project:  ``g - a·<g, D̂>·D̂`` where the loss pushes away from D (``<g, D> > 0``), else g: with a = 1 the conflict is removed.
    aligned:  ``g - a·‖g‖·D̂`` where the loss already goes along D (``<g, D> < 0``), else g.

    Gives a new tensor of the gradient's dtype, computed in fp32. Where `delta` is zero the gradient is left as it is. A negative alpha
    pushes away. Raises ValueError for tensors of different shapes and an unknown rule.
    Source: arXiv 2510.15050 (absolute, norm, adaptive).
    """
    if grad.shape != delta.shape:
        raise ValueError(f"The gradient is {tuple(grad.shape)} and the vector {tuple(delta.shape)}: shapes must agree.")
    bent = grad.to(torch.float32, copy=True)
    delta = delta.float()
    _bend_(bent, delta, float(torch.linalg.vector_norm(delta, dtype=torch.float64)), alpha, rule)
    return bent.to(grad.dtype)


@dataclass(frozen=True)
class _Bend:
    """What a pull met and did at one tensor, as numbers on its device: <g, D>, ‖g‖, the factor c of D that was taken from g; and ‖D‖."""

    inner: Tensor
    norm: Tensor
    factor: Tensor
    length: float


_Total = Callable[[Tensor], Tensor]  # sums over the processes that have the rest of a tensor


def _bend_(grad: Tensor, delta: Tensor, length: float, alpha: float, rule: Rule, total: _Total | None = None) -> _Bend:
    """Bend an fp32 gradient in place. length: ‖D‖, of the whole tensor where these are a part."""
    seen = _measure(grad, delta, length, alpha, rule, total)
    if alpha and length:
        grad.addcmul_(delta, seen.factor, value=-1)
    return seen


def _measure(
    grad: Tensor, delta: Tensor, length: float, alpha: float, rule: Rule, total: _Total | None = None
) -> _Bend:
    inner, norm = _inner(grad, delta), torch.linalg.vector_norm(grad)
    if total is not None:
        inner, norm = total(torch.stack([inner, norm.square()]))
        norm = norm.sqrt()
    if not length:
        return _Bend(inner, norm, torch.zeros_like(norm), length)
    match rule:
        case "absolute":
            factor = torch.full_like(norm, alpha)
        case "norm":
            factor = alpha / length * norm
        case "adaptive":
            cosine = torch.where(norm > 0, inner / (norm * length), 0.0)
            factor = alpha / length * (1 + cosine) / 2 * norm
        case "project":
            factor = alpha / length**2 * inner.clamp(min=0)
        case "aligned":
            factor = torch.where(inner < 0, alpha / length * norm, 0.0)
        case _:
            raise ValueError(f"There is no rule {rule!r}. Choose {', '.join(get_args(Rule))}.")
    return _Bend(inner, norm, factor, length)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


# --- how far along the vector -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """The effective merge coefficient: how much of a vector a model's displacement holds, ``<W - W_0, D> / ‖D‖²``.

    0 is the start, 1 as far along D as the merge ``W_0 + D``. overall: over all tensors together; sites: each by itself.
    """

    overall: float
    sites: dict[Site, float]

    def frame(self) -> DataFrame:
        """One row a site, and the row "all"."""
        from pandas import DataFrame

        rows = {_ALL: self.overall, **{str(site): value for site, value in self.sites.items()}}
        return DataFrame({"site": list(rows), "merged": list(rows.values())})


def merge_coefficients(start: Weights, now: Weights, prior: Delta) -> Merged:
    """The effective merge coefficient of what lies between two points, along a vector; at the sites at which it is not zero.

    Read a few rows at a time, summed in float64. Raises ValueError where the points or the vector do not fit each other, or the vector is zero.
    """
    require_same_sites(start, now)
    prior = land(prior, start).delta
    moved = now - start
    inner, square = {}, {}
    for site, shape in prior.shapes().items():
        walk = zip(*(v.strips(site, pieces(shape)) for v in (moved, prior)), strict=True)
        sums = [(_exact(a, b), _exact(b, b)) for a, b in walk]
        if total := sum(s for _, s in sums):
            inner[site], square[site] = sum(i for i, _ in sums), total
    if not square:
        raise ValueError("The vector is zero everywhere: nothing can be measured along it.")
    return _merged(inner, square)


def matched_merge(base: Weights, prior: Delta, merged: Merged | Mapping[Site, float] | float) -> Weights:
    """The displacement-matched merge: ``base + c·D`` with each site's own coefficient, as a view.

    merged: what `DRIFT.merged` or `merge_coefficients` gave, a coefficient for each site (others do not move), or one number for all.
    It goes exactly as far along the vector as the trained model did, without its training. Raises ValueError for a vector that
    does not fit `base`, and for a site that the vector does not move.
    """
    prior = land(prior, base).delta
    if isinstance(merged, int | float):
        return base + float(merged) * prior
    factors = merged.sites if isinstance(merged, Merged) else dict(merged)
    if strange := [site for site in factors if site not in prior]:
        raise ValueError(
            f"There is a coefficient for {strange[0]}, which the vector does not move; it moves {_some(prior)}."
        )
    return base + _Scaled(prior, factors)


def _merged(inner: Mapping[Site, float], square: Mapping[Site, float]) -> Merged:
    overall = sum(inner.values()) / sum(square[site] for site in inner)
    return Merged(overall, {site: value / square[site] for site, value in inner.items()})


def _exact(a: Tensor, b: Tensor) -> float:
    """The inner product in float64, a piece at a time."""
    flat = a.reshape(-1), b.reshape(-1).to(a.device)
    step = 1 << 20
    return sum(float(torch.dot(*(x[at : at + step].double() for x in flat))) for at in range(0, flat[0].numel(), step))


# --- controls ---------------------------------------------------------------------------------------------------------


def controlled(prior: Delta, control: Control, seed: int = 0) -> Delta:
    """What a prior is compared with, lazily, tensor by tensor.

    random:   Gaussian noise of the same Frobenius norm. permuted: the same entries in a random order. flipped: ``-D``.
    The draw at a site depends on ``(seed, site)`` only. Raises ValueError for an unknown control.
    """
    match control:
        case "random":
            return Noise(prior, seed)
        case "permuted":
            return Permuted(prior, seed)
        case "flipped":
            return -prior
    raise ValueError(f"There is no control {control!r}. Choose {', '.join(get_args(Control))}.")


class _Scaled(Alike):
    """Some sites of a vector, each times a number of its own."""

    def __init__(self, delta: Delta, factors: Mapping[Site, float]):
        super().__init__(delta)
        self._factors = factors
        self._shapes = {site: shape for site, shape in delta.shapes().items() if site in factors}

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def _read(self, site: Site, rows: slice) -> Tensor:
        return self._factors[site] * self._delta.rows(site, rows)

    def by_rows(self, site: Site) -> bool:
        return self._delta.by_rows(site)


# --- the callback -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What DRIFT saw at a site, or over all of them together (site "all").

    step:     optimizer steps done.
    merged:   the effective merge coefficient so far (see `Merged`).
    cosine:   between the gradient and the prior, in [-1, 1], before the pull; above 0 the loss pushes away from the prior. nan without
              a gradient. In the form "update" it is minus the optimizer's own step that stands for the gradient.
    injected: the norm of what was put in, over that of the gradient.
    """

    step: int
    site: str
    merged: float
    cosine: float
    injected: float


@dataclass(frozen=True)
class Readings:
    """What DRIFT saw over a run. settings: what it ran with, the hash of its prior among it."""

    lines: tuple[Reading, ...]
    settings: dict[str, Any]

    def frame(self) -> DataFrame:
        """One row a step and site."""
        from pandas import DataFrame

        return DataFrame([asdict(line) for line in self.lines], columns=list(Reading.__dataclass_fields__))

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_whole(path, json.dumps({"settings": self.settings, "lines": [*map(_row, self.lines)]}))

    @classmethod
    def load(cls, path: str | Path) -> Readings:
        """Read what `save` wrote."""
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(tuple(Reading(*line) for line in said["lines"]), said["settings"])


class DRIFT(TrainerCallback):
    """Bends the gradients of a model toward a vector once every optimizer step: ``Trainer(..., callbacks=[DRIFT(prior, model)])``.

    It acts after accumulation, reduction over processes and clipping, just before the optimizer's step: with torch's optimizers on
    ``.grad``, with `LIFT` on the entries it has gathered, whose norms and cosines are then those of the chosen entries alone. The
    prior is of the starting weights and does not move with the training; a run that resumes checks that it is the same one.

    Weights that an engine deals out to several processes (FSDP2, ZeRO stages 1 to 3; `finetune.hosts.Surgical`) are bent where they lie, by the
    norms and cosines of whole tensors; each process then keeps its part of the prior alone. Make it before they are dealt out, alike in every
    process, all of which call `merged` together.

    prior:  what to pull toward: ``expert - start``, ``expert2 - expert1``, a stored, sparse or low-rank vector, an adapter. It is
            landed on the model (`surgery.across.land`): on the language tower of a vision-language model, for one.
    model:  the model to be trained, as it is before training.
    alpha:  the strength, 1 in the paper; negative pushes away, 0 leaves every bit as it would be without. Or a mapping from
            patterns and presets to strengths, which also says where; the last entry that names a site decides.
    rule:   see `pull`.
    at:     where: patterns of sites, or presets: "default" the attention and MLP matrices, "attn", "mlp", "norm" the layers' norms,
            "bias" the matrices' biases, "full" every tensor of the language model; "embed" and "head" are sites themselves.
    layers: one layer, a range, a slice or any integers: only there; what is outside the layers is then left out.
    schedule: ``(steps done, steps in all) -> number``, by which every strength is multiplied in the coming step: ``lambda step, steps: 1 - step
            / steps`` lets the pull fade. Asked once an optimizer step; a run that resumes goes on with the one it is given, of the same name.
    form:   "gradient" bends the gradient. "update" is the decoupled form: it bends the optimizer's own step by the same rule,
            after it was taken, so that the strength is in units of that step whatever the optimizer makes of gradients; it keeps a
            copy of the tensors over the step.
    normalise: for "absolute", scale each tensor of the prior to the norm of the model's own; the other rules know no scale.
    control, seed: pull toward a stand-in instead (see `controlled`).
    store:  where the prior lies: "memory" fp32 beside the parameters; "pinned" in page-locked memory of the host, copied when used;
            "lazy" is read again every step (with LIFT: at every refresh).
    rank:   keep only the best approximation of each matrix of this rank, as factors; `errors` has the relative error of each.
    legacy: bend every micro-batch's gradient as it arrives, before accumulation and clipping, as the released code does: the
            strength then depends on how a batch is split. What has strength 0 is measured once a step.
    least:  fraction in (0, 1] of the tensors asked for that the prior must move and the training must train.
    log_every: measure the effective merge coefficient every so many steps, and at the end. `readings` has all; the Trainer's own log
            gets ``pull_merged``, ``pull_cosine`` and ``pull_injected`` with its next line.

    Raises ValueError for a prior that fits nothing, too little, or another width, that is zero or not finite; for patterns that match
    nothing and options out of range; for weights that are dealt out already; when training begins, for weights that are frozen (an adapter's
    base), processes with different priors, and a checkpoint of another prior. RuntimeError when a step brings no gradient to any of its tensors.
    Source: arXiv 2510.15050. Differs: see this module.
    """

    def __init__(
        self,
        prior: Delta,
        model: Model,
        alpha: float | Mapping[str, float] = 1.0,
        rule: Rule = "adaptive",
        at: Where = "default",
        *,
        layers: Indices | None = None,
        schedule: Schedule | None = None,
        form: Form = "gradient",
        normalise: bool = True,
        control: Control | None = None,
        seed: int = 0,
        store: Store = "memory",
        rank: int | None = None,
        legacy: bool = False,
        least: float = 0.9,
        log_every: int = 10,
    ):
        _check_options(rule, form, store, rank, legacy, least, log_every, alpha, at)
        weights = model.weights
        _require_together(model)
        strengths = _strengths(alpha, at, layers, weights)
        prior = _fitted(prior, strengths, weights)
        if store == "lazy" and any(leaf is weights for leaf in _leaves(prior, set())):
            raise ValueError(
                "The prior is measured from the model that will be trained, and read lazily it would move with it. Use store='memory', or "
                "measure it from the model's checkpoint: expert - Checkpoint(folder)."
            )
        if control is not None:
            prior = controlled(prior, control, seed)
        self.rule: Rule = rule
        self.form, self.legacy, self._least, self._every = form, legacy, least, log_every
        self._model, self._asked, self._schedule = model, list(strengths), schedule
        self._parts, self.errors, digest = _parts(
            prior, strengths, weights, store, rank, normalise and rule == "absolute"
        )
        _require_share(self._asked, [part.site for part in self._parts], least)
        self.settings: dict[str, Any] = {
            "prior": digest, "rule": rule, "form": form, "normalise": normalise, "control": control, "seed": seed, "rank": rank,
            "legacy": legacy, "alpha": {str(part.site): part.alpha for part in self._parts},
        }  # fmt: skip
        if schedule is not None:
            self.settings["schedule"] = getattr(schedule, "__name__", type(schedule).__name__)
        self._lines: list[Reading] = []
        self._handles: list[Any] = []
        self._fresh: Reading | None = None
        self._starts: dict[Site, float] = {}
        self._memory: dict[str, Any] = {}
        weakref.finalize(self, _remove, self._handles)

    # what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if not steps_apart(optimizer):
            raise ValueError(
                "DeepSpeed steps inside its own engine, where DRIFT cannot reach the gradient. Put finetune.hosts.Surgical before the trainer "
                "among its bases, or use DDP or FSDP2."
            )
        require_fsdp2()
        self._meet()
        self._require_trainable()
        self._take_up(state)
        self._memory = {"settings": self.settings, "starts": {str(s): v for s, v in self._starts.items()}, "lines": []}
        self._memory["lines"] += map(_row, self._lines)
        state.stateful_callbacks[self._key] = self._memory  # saved with every checkpoint
        if self.legacy:
            self._hook()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.legacy:
            self._strengthen(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.legacy:
            self._strengthen(state)
        hooked = self._hooked()
        lift = lift_of(given.get("optimizer"))
        gathered = {g.parameter: (g.indices, g.grad) for g in lift.gathered()} if lift else {}
        act = _Part.remember if self.form == "update" else _Part.bend
        acted = sum([act(part, self.rule, lift, gathered) for part in self._parts if part.parameter not in hooked])
        if not acted and not self.legacy:
            raise RuntimeError(
                f"Step {state.global_step + 1} brought no gradient to any of the {len(self._parts)} tensors of the prior (first "
                f"{self._parts[0].site}): the optimizer works on other tensors than the model DRIFT was given."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.form == "update":
            lift = lift_of(given.get("optimizer"))
            for part in self._parts:
                part.move(self.rule, lift)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self._read(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._fresh is None or logs is None:
            return
        said = {f"pull_{name}": getattr(self._fresh, name) for name in ("merged", "cosine", "injected")}
        logs.update(said)
        state.log_history[-1].update(said)
        self._fresh = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._lines or self._lines[-1].step != state.global_step:
            self._read(state.global_step)
        self.close()

    # what it tells

    @property
    def readings(self) -> Readings:
        """What it saw so far."""
        return Readings(tuple(self._lines), dict(self.settings))

    @torch.no_grad()
    def merged(self) -> Merged:
        """The effective merge coefficient of the model as it is now. Before training begins it is 0."""
        if not self._starts:
            return Merged(0.0, {part.site: 0.0 for part in self._parts})
        live = self._live()
        inner = {part.site: part.along(live.get(part.place.name)) - self._starts[part.site] for part in self._parts}
        return _merged(inner, {part.site: part.length**2 for part in self._parts})

    def close(self) -> None:
        """Remove the hooks of the legacy form, and what a step that failed has left; the end of training does this too."""
        _remove(self._handles)
        for part in self._parts:
            part.before = None

    def __enter__(self) -> DRIFT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # inside

    @property
    def _key(self) -> str:
        return f"DRIFT {self.settings['prior']}"

    def _live(self) -> dict[str, nn.Parameter]:
        return {name.replace(_CHECKPOINTED, ""): p for name, p in self._model.module.named_parameters()}

    def _meet(self) -> None:
        """Takes up the live parameters, which an engine may have put in the place of others, and what of each lies here."""
        live = self._live()
        for part in self._parts:
            part.meet(live.get(part.place.name, part.parameter))
        if any(part.share and part.share.is_whole for part in self._parts):
            raise ValueError(
                "This DRIFT has a part of its prior, from a training by several processes that had parts of the model, and here each process has "
                "the whole model. Make another one."
            )
        if not (shares := [part.share for part in self._parts if part.share]):
            return
        if self.legacy:
            raise ValueError(
                "legacy bends every micro-batch's gradient before it is reduced, and this model's weights are dealt out to several processes, which "
                "have parts of it. Leave legacy out, or use DDP."
            )
        if self.form == "update" and not all(share.writes for share in shares):
            raise ValueError(
                "The form 'update' moves the weights after a step, and ZeRO steps on copies of its own. Use form='gradient', FSDP2, or stage 0."
            )
        require_same_word(self.settings["prior"], shares[0].group, "prior of DRIFT")

    def _require_trainable(self) -> None:
        trained = [part.site for part in self._parts if part.parameter.requires_grad]
        if len(trained) < self._least * len(self._asked):
            raise ValueError(
                f"Only {len(trained)} of the {len(self._asked)} tensors asked for are trained, and have a gradient to bend; frozen: "
                f"{_some(s for s in self._asked if s not in set(trained))}. A LoRA adapter leaves the model's own weights frozen: use LIFT "
                "or full tuning, or say where with at=."
            )

    @torch.no_grad()
    def _take_up(self, state: Any) -> None:
        """Where the run began: measured at its first step, taken from the checkpoint by one that resumes."""
        self._lines, self._fresh = [], None
        if not state.global_step:
            self._starts = {part.site: part.along() for part in self._parts}
            return
        saved = state.stateful_callbacks.get(self._key)
        if saved is None or saved["settings"] != self.settings:
            others = [v["settings"] for k, v in state.stateful_callbacks.items() if k.startswith("DRIFT ")]
            raise ValueError(_other_run([saved["settings"]] if saved else others, self.settings))
        self._starts = {Site.parse(s): value for s, value in saved["starts"].items()}
        self._lines = [Reading(*line) for line in saved["lines"]]

    def _strengthen(self, state: Any) -> None:
        if self._schedule is None:
            return
        factor = float(self._schedule(state.global_step, state.max_steps))
        if not math.isfinite(factor):
            raise ValueError(
                f"The schedule gave {factor} at step {state.global_step + 1}: what strengths are multiplied by is a finite number."
            )
        for part in self._parts:
            part.factor = factor

    def _hooked(self) -> set[nn.Parameter]:
        """Whose gradients hooks bend: of the legacy form all that are pulled. Where nothing is, a hook alone would change in which pieces
        gradients arrive, and so the last bits."""
        return {part.parameter for part in self._parts if part.alpha} if self.legacy else set()

    def _hook(self) -> None:
        by_parameter: dict[nn.Parameter, list[_Part]] = {}
        hooked = self._hooked()
        for part in self._parts:
            if part.parameter in hooked:
                by_parameter.setdefault(part.parameter, []).append(part)

        self.close()
        self._handles += [
            p.register_hook(_bender(parts, self.rule)) for p, parts in by_parameter.items() if p.requires_grad
        ]

    def _read(self, step: int) -> None:
        merged = self.merged()
        fresh = Reading(step, _ALL, merged.overall, *_together(part.seen for part in self._parts if part.seen))
        lines = [fresh]
        for part in self._parts:
            seen = _together([part.seen] if part.seen else [])
            lines.append(Reading(step, str(part.site), merged.sites[part.site], *seen))
        self._fresh = fresh
        self._lines += lines
        self._memory.setdefault("lines", []).extend(map(_row, lines))


def _row(reading: Reading) -> list[Any]:
    return list(asdict(reading).values())


def _together(seen: Iterable[_Bend]) -> tuple[float, float]:
    """Cosine and injected share over some tensors as if they were one; nan where nothing was seen."""
    numbers = [(float(s.inner), float(s.norm), float(s.factor), s.length) for s in seen]
    gradient = math.sqrt(sum(norm**2 for _, norm, _, _ in numbers))
    prior = math.sqrt(sum(length**2 for *_, length in numbers))
    if not gradient or not prior:
        return math.nan, math.nan
    put_in = math.sqrt(sum((factor * length) ** 2 for *_, factor, length in numbers))
    return sum(inner for inner, *_ in numbers) / (gradient * prior), put_in / gradient


# --- one tensor at a time ---------------------------------------------------------------------------------------------

_Gathered = Mapping[Tensor, tuple[Tensor, Tensor]]


@dataclass
class _Held:
    """A tensor of the prior, wherever it lies: read anew, or held whole or as two factors."""

    parts: list[Tensor]
    pinned: bool = False
    read: Callable[[], Tensor] | None = None
    where: slice | Tensor | None = None  # which of its entries are wanted, flat; None for all, as they lie

    def __call__(self, device: torch.device) -> Tensor:
        if self.read is not None:
            return self._wanted(self.read()).to(device, torch.float32)
        here = [part.to(device, non_blocking=True) for part in self.parts]
        if not self.pinned:
            self.parts = here
        return here[0] if len(here) == 1 and self.where is None else self._wanted(functools.reduce(torch.matmul, here))

    def cut(self, where: slice | Tensor) -> _Held:
        """Of these entries alone, flat; no others are held any more, but for what factors need."""
        if len(self.parts) != 1:
            return replace(self, where=where)
        kept = replace(self, where=where)._wanted(self.parts[0]).clone()
        return replace(self, parts=[kept.pin_memory() if self.parts[0].is_pinned() else kept])

    def _wanted(self, whole: Tensor) -> Tensor:
        if self.where is None:
            return whole
        return whole.reshape(-1)[self.where.to(whole.device) if isinstance(self.where, Tensor) else self.where]


@dataclass
class _Chosen:
    """The prior at the entries that LIFT trains. members: which of those are this site's, None for all."""

    indices: Tensor
    members: Tensor | None
    delta: Tensor
    length: float

    def of(self, compact: Tensor) -> Tensor:
        return compact if self.members is None else compact[self.members]

    def put_(self, compact: Tensor, value: Tensor) -> None:
        if self.members is not None:
            compact[self.members] = value
        elif value is not compact:
            compact.copy_(value)


@dataclass
class _Part:
    """One tensor of the prior, and the live parameter that it is, or is a piece of."""

    site: Site
    parameter: nn.Parameter
    place: Place
    alpha: float
    scale: float  # of the prior, where it is normalised
    length: float  # ‖D‖
    prior: _Held
    factor: float = 1.0  # of the schedule, in this step
    seen: _Bend | None = None
    before: Any = None  # what the form "update" keeps over a step
    chosen: _Chosen | None = None
    share: Share | None = None  # of the parameter, where other processes have the rest
    members: Tensor | None = None  # which entries of the share are this tensor's; None for all

    @property
    def strength(self) -> float:
        return self.alpha * self.scale * self.factor

    def delta(self) -> Tensor:
        return self.prior(self.parameter.device)

    def meet(self, parameter: nn.Parameter) -> None:
        """Go on with this parameter, or with what of it lies in this process and that much of the prior, for good."""
        if self.share is not None:
            if parameter is not self.parameter:
                self.parameter, self.share = parameter, self.share.again(str(self.site), parameter)
            return
        self.parameter, self.share = parameter, share_of(str(self.site), parameter)
        if self.share is None:
            return
        where: slice | Tensor = slice(self.share.begin, self.share.begin + self.share.count)
        if not self.place.is_whole:
            at = torch.arange(where.start, where.stop, device=parameter.device)
            self.members, where = self.place.find(at, self.share.whole)
        self.prior = self.prior.cut(where)

    @property
    def total(self) -> _Total | None:
        return None if self.share is None else self.share.total

    def along(self, live: nn.Parameter | None = None) -> float:
        """<W, D> as the weights are. live: the parameter that they are in by now; by default the one that is trained."""
        now = (
            self
            if live is None
            else replace(self, parameter=live, share=self.share and replace(self.share, parameter=live))
        )
        mine = _exact(now._value(), self.delta())
        return mine if self.share is None else self.share.sum(mine)

    def _value(self) -> Tensor:
        """The weights as they are: of a share what lies here, flat, as the prior then is."""
        if self.share is None:
            return self.place.take(self.parameter.detach())
        return self._mine(self.share.values())

    def _mine(self, here: Tensor) -> Tensor:
        return here if self.members is None else here[self.members]

    def _put_here_(self, here: Tensor, mine: Tensor) -> None:
        if self.members is not None:
            here[self.members] = mine.to(here.dtype)
        elif mine is not here:
            here.copy_(mine)

    @torch.no_grad()
    def bend(self, rule: Rule, lift: LIFT | None, gathered: _Gathered) -> bool:
        """Bend the gradient that has arrived, in place; whether one had."""
        self.seen = None
        if self.parameter in gathered:
            indices, grad = gathered[self.parameter]
            chosen = self._among(indices)
            mine = chosen.of(grad)
            self.seen = _bend_(mine, chosen.delta, chosen.length, self.strength, rule, self.total)
            chosen.put_(grad, mine)
        elif self.share is not None:
            if (here := self.share.gradient()) is not None:
                mine = self._mine(here).float()
                self.seen = _bend_(mine, self.delta(), self.length, self.strength, rule, self.total)
                self._put_here_(here, mine)
                self.share.put_gradient_(here)
        elif self.parameter.grad is not None:
            self.bend_(self.parameter.grad, rule)
        return self.seen is not None

    def bend_(self, grad: Tensor, rule: Rule) -> None:
        """Bend this tensor's piece of a parameter's gradient in place."""
        mine = self.place.take(grad).float()
        self.seen = _bend_(mine, self.delta(), self.length, self.strength, rule)
        if mine is not grad:
            _put_(self.place, grad, mine)

    @torch.no_grad()
    def remember(self, rule: Rule, lift: LIFT | None, gathered: _Gathered) -> bool:
        """Keep what the optimizer is about to change; whether it will."""
        self.before = None
        if lift is not None and self.parameter in gathered:
            self.before = gathered[self.parameter][0], lift.values(self.parameter)
        elif self.parameter.grad is not None:
            self.before = self._value().to(torch.float32, copy=True)
        return self.before is not None

    @torch.no_grad()
    def move(self, rule: Rule, lift: LIFT | None) -> None:
        """Bend the step that the optimizer has taken since `remember`: minus the step stands for the gradient."""
        before, self.before, self.seen = self.before, None, None
        if isinstance(before, Tensor):
            now, delta, strength = self._value().to(torch.float32, copy=True), self.delta(), self.strength
            self.seen = _measure(before.sub_(now), delta, self.length, strength, rule, self.total)
            if strength and self.share is not None:
                self._put_here_(self.share.values(), now.addcmul_(delta, self.seen.factor))
            elif strength:
                _put_(self.place, self.parameter.data, now.addcmul_(delta, self.seen.factor))
        elif before is not None:
            assert lift is not None
            indices, old = before
            self._move_chosen(indices, old, rule, lift)

    def _move_chosen(self, indices: Tensor, old: Tensor, rule: Rule, lift: LIFT) -> None:
        """`move` for LIFT, whose step may have ended with another choice: what it let go is in the weights alone."""
        chosen, current, flat = self._among(indices), lift.state[self.parameter]["indices"], held(self.parameter)
        at = torch.searchsorted(current, indices)
        stays = at < len(current)
        stays[stays.clone()] = current[at[stays]] == indices[stays]
        values = lift.values(self.parameter)
        now = flat.index_select(0, indices).float()
        now[stays] = values[at[stays]]
        strength = self.strength
        self.seen = _measure(chosen.of(old - now), chosen.delta, chosen.length, strength, rule, self.total)
        if strength:
            move = torch.zeros_like(now)
            chosen.put_(move, self.seen.factor * chosen.delta)
            flat.index_copy_(0, indices[~stays].long(), (now + move)[~stays].to(flat.dtype))
            lift.set_values_(self.parameter, values.index_add_(0, at[stays], move[stays]))

    def _among(self, indices: Tensor) -> _Chosen:
        """The prior at the chosen entries: read when the choice is new."""
        if self.chosen is None or self.chosen.indices is not indices:
            delta, members, where = self.delta().reshape(-1), None, indices
            if self.members is not None:  # of a share, whose prior has the entries that are there
                at = torch.searchsorted(self.members, indices).clamp_(max=max(0, len(self.members) - 1))
                members = (self.members[at] == indices).nonzero().squeeze(1) if len(self.members) else indices[:0]
                where = at[members]
            elif not self.place.is_whole and self.share is None:
                members, where = self.place.find(indices, self.parameter.shape)
            delta = delta.index_select(0, where)
            square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            length = math.sqrt(square if self.share is None else self.share.sum(square))
            self.chosen = _Chosen(indices, members, delta, length)
        return self.chosen


def _bender(parts: Sequence[_Part], rule: Rule) -> Callable[[Tensor], Tensor]:
    """A hook for a parameter that bends every gradient as it arrives."""

    @torch.no_grad()
    def bent(grad: Tensor) -> Tensor:
        grad = grad.clone()
        for part in parts:
            part.bend_(grad, rule)
        return grad

    return bent


def _put_(place: Place, stored: Tensor, value: Tensor) -> None:
    """Write a site's tensor into the stored one, in place."""
    piece = stored if place.expert is None else stored[place.expert]
    piece = piece.T if place.transposed and piece.ndim == 2 else piece
    if place.rows is None:
        piece.copy_(value)
    else:
        piece[place.rows] = value.to(piece.dtype)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


# --- what is asked for, and whether it is there -----------------------------------------------------------------------


def _parts(
    prior: Delta, strengths: Mapping[Site, float], weights: LiveWeights, store: Store, rank: int | None, normalise: bool
) -> tuple[list[_Part], dict[Site, float], str]:
    """Every tensor of the prior that is not zero, bound to its parameter; the errors of its low-rank form; a hash of it all."""
    parts, errors, digest = [], {}, Digest()
    for site in prior:
        if site not in strengths:
            continue
        value = prior[site].float()
        length = float(torch.linalg.vector_norm(value, dtype=torch.float64))
        if not math.isfinite(length):
            raise ValueError(f"The prior is NaN or infinite at {site}.")
        digest.update(f"{site} {tuple(value.shape)}".encode())
        digest.update(raw_bytes(value.cpu()))
        if not length:
            continue
        held = [value]
        if rank is not None and value.ndim == 2 and rank * sum(value.shape) < value.numel():
            left, right, errors[site] = factor_pair(value, rank)
            held, length = [left, right], float(torch.linalg.vector_norm(left @ right, dtype=torch.float64))
        parameter = weights.parameter(site)
        scale = float(torch.linalg.vector_norm(weights[site], dtype=torch.float64)) / length if normalise else 1.0
        place, alpha = weights.anatomy.places[site], strengths[site]
        parts.append(_Part(site, parameter, place, alpha, scale, length, _hold(prior, site, held, store, parameter)))
    return parts, errors, digest.hexdigest()[:32]


def _hold(prior: Delta, site: Site, tensors: list[Tensor], store: Store, parameter: nn.Parameter) -> _Held:
    match store:
        case "memory":
            return _Held([t.to(parameter.device) for t in tensors])
        case "pinned":
            return _Held([t.cpu().pin_memory() if torch.cuda.is_available() else t for t in tensors], pinned=True)
        case "lazy":
            return _Held([], read=lambda: prior[site])


def _strengths(
    alpha: float | Mapping[str, float], at: Where, layers: Indices | None, weights: Weights
) -> dict[Site, float]:
    """The strength at every site asked for, in the order of the model."""
    if not isinstance(alpha, Mapping):
        words = [at] if isinstance(at, str | Site) else list(at)
        alpha = {str(word): alpha for word in words}
    found = {site: float(a) for word, a in alpha.items() for site in _asked(word, weights)}
    if layers is not None:
        wanted = _numbers(layers, weights.anatomy.n_layers)
        found = {site: a for site, a in found.items() if site.layer in wanted}
        if not found:
            raise ValueError(f"None of the sites asked for is in layers {sorted(wanted)}.")
    return {site: found[site] for site in weights if site in found}


def _asked(word: str, weights: Weights) -> list[Site]:
    if word not in PRESETS:
        sites = match(word, weights)
        if heads := [site for site in sites if site.head is not None]:
            raise ValueError(
                f"{heads[0]} is one head, but norms and cosines are those of whole tensors. Ask for {heads[0].whole}."
            )
        return sites
    linear = weights.anatomy.linear_sites()
    match word:
        case "default":
            sites = linear
        case "attn" | "mlp":
            sites = [site for site in linear if site.part.startswith(f"{word}.")]
        case "norm":
            sites = [site for site in weights if site.layer is not None and site.part.endswith("norm")]
        case "bias":
            sites = [site for line in linear if (site := Site(line.layer, f"{line.part}.bias")) in weights]
        case _:
            sites = [site for site in weights if not site.is_unnamed]
    if not sites:
        raise ValueError(f"The preset {word!r} names nothing in this {weights.anatomy.family} model.")
    return sites


def _numbers(layers: Indices, count: int) -> set[int]:
    if isinstance(layers, int):
        return {layers}
    return set(range(count)[layers]) if isinstance(layers, slice) else set(layers)


def _fitted(prior: Delta, strengths: Mapping[Site, float], weights: Weights) -> Delta:
    """The prior at the sites asked for, as it fits the model."""
    by_token = {EMBED, HEAD} if strengths.keys() & {EMBED, HEAD} else set()  # a tie decides what moves
    inside = [site for site in prior if site in strengths or site in by_token]
    beyond = [site for site in prior if (site.layer or 0) >= weights.anatomy.n_layers]  # a deeper model's: land says so
    if not inside:
        raise ValueError(
            f"The prior moves none of the {len(strengths)} tensors asked for, first {_some(strengths)}; it moves {_some(prior)}. A prior "
            "that fits nothing would train as if there were none."
        )
    return land(_Scaled(prior, dict.fromkeys([*inside, *beyond], 1.0)), weights).delta


def _require_together(model: Model) -> None:
    """Raises ValueError where an engine has dealt the weights out already, so that no process can compare a prior with them."""
    for name, p in model.module.named_parameters():
        if is_sharded(p) or is_partitioned(p):
            raise ValueError(
                f"{name} is dealt out to several processes already, and DRIFT looks at whole weights when it is made. Load the model and make "
                "DRIFT first, before fully_shard, the trainer or a configuration of ZeRO stage 3."
            )


def _require_share(asked: Sequence[Site], found: Sequence[Site], least: float) -> None:
    if not found:
        raise ValueError(
            f"The prior is zero at all of the {len(asked)} tensors asked for: its two models are the same there."
        )
    if len(found) < least * len(asked):
        there = set(found)
        raise ValueError(
            f"The prior moves {len(found)} of the {len(asked)} tensors asked for ({len(found) / len(asked):.0%}, at least {least:.0%} "
            f"wanted); it leaves out {_some(s for s in asked if s not in there)}. Ask only for what it has (at=, layers=), or lower least."
        )


def _leaves(thing: Any, seen: set[int]) -> Iterator[Any]:
    """A vector or point and all that it is made of, each once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    for value in vars(thing).values():
        for one in value if isinstance(value, list) else [value]:
            one = one[1] if isinstance(one, tuple) and len(one) == 2 else one
            if isinstance(one, Delta | Weights):
                yield from _leaves(one, seen)


def _other_run(saved: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> str:
    if not saved:
        return "The checkpoint was written by a run without DRIFT: go on without it, or begin anew in another folder."
    then, here = saved[0]["alpha"], now["alpha"]
    if then.keys() != here.keys():
        return (
            f"The checkpoint was written by a DRIFT that acted on {len(then)} tensors ({_first(then)}), now on {len(here)} ({_first(here)}). Give "
            "the at= and layers= of that run, and an expert with the same tensors."
        )
    differing = [key for key in {**now, **saved[0]} if saved[0].get(key) != now.get(key)]
    if "prior" in differing:
        return (
            "The prior differs from the one this run began with. It is of the weights before training: measure it from those, not from "
            "a checkpoint's, or keep it in a file with save_delta and read it back."
        )
    told = "; ".join(
        f"{key} was {_in_words(saved[0].get(key))}, now {_in_words(now.get(key))}" for key in differing[:3]
    )
    return f"The checkpoint was written by a DRIFT with other settings: {told}."


def _in_words(setting: Any) -> str:
    """A setting of a run; strengths that are all alike as one number, others by the first that there are."""
    if not isinstance(setting, Mapping):
        return "none" if setting is None else str(setting)
    alike = set(setting.values())
    return (
        str(alike.pop())
        if len(alike) == 1
        else ", ".join(f"{alpha} at {site}" for site, alpha in [*setting.items()][:4]) + ", ..."
    )


def _first(names: Iterable[str]) -> str:
    return _some(map(Site.parse, names))


def _some(sites: Iterable[Site]) -> str:
    listed = [str(site) for site in sites]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") if listed else "nothing"


def _check_options(
    rule: str, form: str, store: str, rank: int | None, legacy: bool, least: float, log_every: int,
    alpha: float | Mapping[str, float], at: Where,
) -> None:  # fmt: skip
    for name, value, words in (("rule", rule, Rule), ("form", form, Form), ("store", store, Store)):
        if value not in get_args(words):
            raise ValueError(f"There is no {name} {value!r}. Choose {', '.join(get_args(words))}.")
    if rank is not None and (rank < 1 or store == "lazy"):
        raise ValueError(
            f"rank={rank} with store={store!r}: a rank is 1 or more, and its factors are held, not read again."
        )
    if legacy and form == "update":
        raise ValueError(
            "legacy bends every micro-batch's gradient; the form 'update' acts after the step. Choose one."
        )
    if not 0 < least <= 1 or log_every < 1:
        raise ValueError(f"least={least} is a fraction in (0, 1], and log_every={log_every} is 1 step or more.")
    if isinstance(alpha, Mapping) and (not alpha or at != "default"):
        raise ValueError("A mapping of strengths says itself where they act: it may not be empty, and at= is left out.")
    numbers = list(alpha.values()) if isinstance(alpha, Mapping) else [alpha]
    if not all(math.isfinite(a) for a in numbers):
        raise ValueError(f"alpha={alpha}: strengths are finite numbers.")
