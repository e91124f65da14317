"""A steering as weights: what ran as a hook, in the model itself, wherever weights can say the same.

Weights act on every token alike, so only what steers over "all" with one strength can be baked. Then:

    add     at attn.out, mlp.out and the streams, where a bias can write the vector; at attn.z through the bias behind it
    ablate  at attn.out and mlp.out by taking the direction out of what the matrix writes, at attn.z and its heads out of what it reads;
            in the stream only from the embedding on, site after site
    clamp   at attn.out, mlp.out and attn.z: both

Everything else is refused with the reason. What is baked is proved: the steered model and the baked one give the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.steering import TEXTS, Placed, Steering, place, several, steered
from surgery.edits import AddDirection, RemoveDirection
from surgery.linalg import project_out
from surgery.model import Model, installed
from surgery.rows import rows_are
from surgery.sites import Site
from surgery.weights import Weights, apply

_EXACT = 1e-5  # of the largest logit: what fp32 arithmetic in another order may differ by
_PROMPTS = tuple(question for question, _ in TEXTS)  # on which a baked model is read where nothing else is said


class BakingError(ValueError):
    """A steering that weights cannot hold."""


@dataclass(frozen=True, eq=False)
class StopReading:
    """Stop a matrix from reading a direction: ``W <- W (I - strength u uᵀ)``. At a head of attn.o, u lies in what the head gives.

    direction: any non-zero vector of length `in`; it is normalised.
    """

    direction: Float[Tensor, " in"]
    strength: float = 1.0

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        return W if self.strength == 0 else project_out(W, self.direction, self.strength, side="in")


@dataclass(frozen=True, eq=False)
class AddToRows:
    """Add a vector to every row of an embedding."""

    vector: Float[Tensor, " d"]

    def __call__(self, site: Site, W: Tensor) -> Tensor:
        return W + self.vector.to(W)


@dataclass(frozen=True)
class Agreement:
    """How far a baked model is from the steered one on probe prompts, in logits.

    difference: the largest. effect: the largest between the steered and the plain model. size: the largest logit of the plain model.
    rounding:   what the arithmetic of the model's dtype may differ by.
    """

    difference: float
    effect: float
    size: float
    rounding: float

    @property
    def holds(self) -> bool:
        """Whether the difference is below a hundredth of the effect, or within rounding and below half the effect: in half precision
        rounding may swallow what was baked."""
        return self.difference <= max(_EXACT * self.size, 0.01 * self.effect, min(self.rounding, 0.5 * self.effect))

    def __str__(self) -> str:
        return (
            f"baked and steered logits differ by at most {self.difference:.2g}, where steering moves them by {self.effect:.2g} "
            f"and rounding by up to {self.rounding:.2g}"
        )


def bake(what: Any, into: Model | Weights, *, closely: bool = False, **options: Any) -> Weights:
    """The weights that do what a steering does: ``write(bake(brief, model, how="ablate", at="14.attn.out", over="all"), folder)``.

    what:    a direction with the `options` of a `Steering`, or a `Steering`, or several.
    into:    a model, whose baked weights are proved to agree with it steered; or a point alone, for which strengths must count in raw units.
    closely: bake also where weights come close but not all the way: behind the norms after attention and MLP of Gemma and OLMo 2. The
             direction is gone from what they add, as asked, but the norm rescales the rest.
    Nothing is computed until the result is written or installed. Raises BakingError, a ValueError, with the reason where weights cannot
    hold the steering, and where the proof fails.

    Differs: with a norm of gain g after the matrix, the direction taken out of the matrix is g * u, because the norm writes
    ``g * y / rms(y)`` and u is absent from that exactly where g * u is absent from y.
    """
    steerings = several(what, options)
    weights = into.weights if isinstance(into, Model) else into
    for steering in steerings:
        _require_everywhere(steering)
    placed = [p for s in steerings for p in place(s, into)]
    baked = _baked(sorted(placed, key=lambda p: weights.anatomy.order(p.site)), weights, closely)
    if isinstance(into, Model):
        proof = agreement(into, steerings, baked)
        if not (closely or proof.holds):
            raise BakingError(f"The baked weights do not do what the steering does: {proof}.")
    return baked


@torch.no_grad()
def agreement(
    model: Model, what: Any, baked: Weights, questions: Sequence[str] = _PROMPTS, **options: Any
) -> Agreement:
    """Compare a model steered with the same model with baked weights installed, on the prompts of some questions."""
    steerings = several(what, options)

    def logits() -> Tensor:
        rows = [model.prompt_ids(q) for q in questions]
        found = []
        for row in rows:
            with rows_are([len(row)]):
                found.append(model.module(input_ids=torch.tensor([row], device=model.device)).logits.float().flatten())
        return torch.cat(found)

    plain = logits()
    with steered(model, steerings):
        wanted = logits()
    with installed(baked, model):
        got = logits()
    size = float(plain.abs().max())
    eps = torch.finfo(next(model.module.parameters()).dtype).eps
    return Agreement(
        float((got - wanted).abs().max()), float((wanted - plain).abs().max()), size, max(_EXACT, 4 * eps) * size
    )


def _require_everywhere(steering: Steering) -> None:
    if steering.is_function:
        raise BakingError("A function of rows cannot be baked: weights can add, ablate and clamp.")
    if set(steering.spans) != {"all"}:
        raise BakingError(
            f"over={', '.join(steering.spans)}: weights act on every token alike, so only a steering over 'all' can be baked."
        )
    if len(steering.strengths) > 1:
        raise BakingError("Strengths that differ from row to row cannot be baked: weights treat all rows alike.")


def _baked(placed: list[Placed], weights: Weights, closely: bool) -> Weights:
    streams = [p for p in placed if p.site.part in ("resid", "mid") and p.steering.how == "ablate"]
    if streams:
        if len(streams) < len(placed):
            raise BakingError(
                "A direction taken out of the stream takes out of what else is added to it: bake one after the other."
            )
        return _without_stream(streams, weights, closely)
    heads = [p for p in placed if p.site.part == "attn.z"]
    for first, then in pairwise(heads):
        hows = (first.steering.how, then.steering.how)
        if first.site.layer == then.site.layer and hows not in (("ablate", "ablate"), ("add", "add")):
            raise BakingError(
                f"{first.site} and {then.site}: what is added to heads lands behind the matrix, where it can no longer be taken out of "
                "what the heads give. Bake a single steering of the heads of a layer."
            )
    heads.reverse()  # of two that change what a matrix reads, the later goes in first: W (I - P2) (I - P1) z
    for one in [*(p for p in placed if p not in heads), *heads]:
        weights = _one(one, weights, closely)
    return weights


def _one(placed: Placed, weights: Weights, closely: bool) -> Weights:
    site, how, strength = placed.site, placed.steering.how, float(placed.steering.strengths[0])
    assert placed.unit is not None
    added = strength * placed.length * placed.unit
    if site.part in ("resid", "mid"):
        if how == "clamp":
            raise BakingError(
                f"{site}: a stream is clamped by what comes to it, and no weight sees that. Clamp attn.out or mlp.out."
            )
        return _add_to_stream(site, added, weights)
    if how == "add":
        return _add(site, added, weights)
    if how == "ablate":
        return _remove(site, placed.unit, strength, weights, closely)
    if site.part == "attn.z" and strength and Site(site.layer, "attn.o.bias") not in weights:
        raise BakingError(
            f"{site}: there is no bias behind the heads of this {weights.anatomy.family} to clamp them with."
        )
    if site.part == "attn.z":  # what is added goes through the matrix as it was
        return _remove(site, placed.unit, 1.0, _add(site, added, weights) if strength else weights, closely)
    changed = _remove(site, placed.unit, 1.0, weights, closely)
    return _add(site, added, changed) if strength else changed


def _add_to_stream(site: Site, vector: Tensor, weights: Weights) -> Weights:
    """A vector added to the stream is one added by what writes to it last."""
    layer = site.layer or 0
    if site.part == "mid":
        return _add(Site(layer, "attn.out"), vector, weights)
    if layer > 0:
        return _add(Site(layer - 1, "mlp.out"), vector, weights)
    if Site(None, "position") in weights:
        return apply(AddToRows(vector), weights, [Site(None, "position")])
    _require_own_embedding(site, weights)
    if weights.anatomy.family.startswith("gemma"):
        raise BakingError(
            f"{site}: this family scales its embedding, so a vector added after it is not one added to its rows."
        )
    return apply(AddToRows(vector), weights, [Site(None, "embed")])


def _require_own_embedding(site: Site, weights: Weights) -> None:
    if Site(None, "head") in weights.anatomy.ties:
        raise BakingError(
            f"{site}: the embedding is also the head here, so changing what enters the stream changes how it is read out."
        )


def _add(site: Site, vector: Tensor, weights: Weights) -> Weights:
    """A vector added to what a branch writes, through a bias."""
    if site.part == "attn.z":
        return _add_to_heads(site, vector, weights)
    matrix = _matrix(site)
    bias = Site(site.layer, f"{matrix.part}.bias")
    if weights.anatomy.norm_after(matrix) is not None:
        raise BakingError(f"{site}: a norm comes after {matrix}, and a norm that only scales cannot add a vector.")
    if bias not in weights:
        raise BakingError(
            f"{site}: there is no bias at {bias} in this {weights.anatomy.family}, and nothing else writes a vector whatever is read."
        )
    return apply(AddDirection(vector), weights, [bias])


def _add_to_heads(site: Site, vector: Tensor, weights: Weights) -> Weights:
    """A vector added to what heads give: through attn.o to its bias, or as a bias of the values, whose weights sum to one."""
    anatomy, matrix = weights.anatomy, Site(site.layer, "attn.o", site.head)
    bias, values = Site(site.layer, "attn.o.bias"), Site(site.layer, "attn.v.bias")
    if bias in weights:
        return apply(AddDirection(weights[matrix].float() @ vector.to(weights[matrix].device)), weights, [bias])
    if values in weights:
        whole = torch.zeros(anatomy.n_heads * anatomy.head_dim)
        whole[anatomy.tap(site).head or slice(None)] = vector.cpu()
        groups = whole.view(anatomy.n_kv_heads, -1, anatomy.head_dim)
        if torch.equal(groups, groups[:, :1].expand_as(groups)):
            return apply(AddDirection(groups[:, 0].reshape(-1)), weights, [values])
        raise BakingError(
            f"{site}: heads that share a value share its bias, and here they are to be given different vectors."
        )
    raise BakingError(
        f"{site}: this {weights.anatomy.family} has a bias neither at attn.v nor at attn.o to hold a vector."
    )


def _remove(site: Site, unit: Tensor, strength: float, weights: Weights, closely: bool) -> Weights:
    if site.part == "attn.z":
        return apply(StopReading(unit, strength), weights, [Site(site.layer, "attn.o", site.head)])
    return _stop_writing(site, unit, strength, weights, closely)


def _stop_writing(branch: Site, unit: Tensor, strength: float, weights: Weights, closely: bool) -> Weights:
    """A branch that no longer writes a direction: taken out of its matrices and its bias."""
    matrix = _matrix(branch)
    matrices = [s for s in weights if s.layer == branch.layer and _writes(s, matrix)]
    if weights.anatomy.norm_after(matrix) is not None and not closely:
        raise BakingError(
            f"{branch}: a norm comes after {matrix} and rescales what is left once a direction is gone, so weights come close but "
            "not all the way. Ask for closely=True to have that."
        )
    return apply(RemoveDirection({branch.layer: unit}, strength), weights, matrices)


def _writes(site: Site, matrix: Site) -> bool:
    """Whether a site is the matrix, its bias, or an expert's of the same name."""
    first, _, last = matrix.part.partition(".")
    words = site.part.removesuffix(".bias").split(".")
    return words[0] == first and words[-1] == last


def _without_stream(placed: list[Placed], weights: Weights, closely: bool) -> Weights:
    """The stream without a direction, from the embedding to the last of the sites."""
    anatomy = weights.anatomy
    stream = [s for s in anatomy.activation_sites() if s.part in ("resid", "mid")]
    sites = [p.site for p in placed]
    unit = placed[0].unit
    assert unit is not None
    if len({*sites}) < len(sites):
        raise BakingError(
            "Several directions are taken out of the stream at once, and each brings a part of the others back unless they are orthogonal: bake "
            "one after the other."
        )
    if sites != stream[: len(sites)]:
        missing = next(s for s in stream if s not in sites)
        raise BakingError(
            f"{sites[-1]}: what is in the stream was written before, and earlier layers read it. Weights hold this only where the direction is "
            f"out of the stream from its beginning: steer {missing} as well, and all others up to {sites[-1]}."
        )
    if any(float(p.steering.strengths[0]) != 1 or p.unit is None or not torch.equal(p.unit, unit) for p in placed):
        raise BakingError(
            "A stream is baked without a direction only where the direction is the same at every site, and the strength 1."
        )
    _require_own_embedding(sites[0], weights)
    entry = [s for s in (Site(None, "embed"), Site(None, "position")) if s in weights]
    weights = apply(StopReading(unit), weights, entry)
    last = anatomy.order(sites[-1])
    for branch in [
        s for s in anatomy.activation_sites() if s.part in ("attn.out", "mlp.out") and anatomy.order(s) < last
    ]:
        weights = _stop_writing(branch, unit, 1.0, weights, closely)
    return weights


def _matrix(branch: Site) -> Site:
    """The matrix that writes what a branch adds."""
    return Site(branch.layer, "attn.o" if branch.part == "attn.out" else "mlp.down")
