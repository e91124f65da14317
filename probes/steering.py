"""Change what a model computes while it runs: add a direction to its stream, take it out, or hold it, on the tokens of a span.

``with steered(model, brief, strength=-4, at="14.resid", over="thinking"):`` steers every forward pass inside the block, and nothing
after it: while generating, with and without a cache, and when finished texts are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.capture import coming_later, in_order
from probes.following import Follower, following
from surgery.anatomy import Anatomy
from surgery.model import Model
from surgery.rows import may_leave, rows_apart
from surgery.sites import Patterns, Site, match
from surgery.transcript import Transcript, parse_span
from surgery.weights import Weights

Function = Callable[[Tensor], Tensor]
How = Literal["add", "ablate", "clamp"] | Function | Mapping[Site, Function]
Units = Literal["residual", "raw"] | Mapping[Site, float]

# set while streams are measured: as they are without steering
_measuring: ContextVar[bool] = ContextVar("measuring", default=False)
TEXTS = (  # on which the stream is measured where nothing else is said
    ("What do bees make?", "Bees make honey from the nectar of flowers, and wax for their combs."),
    ("How many days are there in two weeks?", "A week has seven days, so two weeks have fourteen days."),
    (
        "Why is the sky dark at night?",
        "At night the sun is behind the earth, and little light is left to be scattered.",
    ),
)


@dataclass(frozen=True, eq=False)
class Steering:
    """One thing done to the activations at some sites, on the tokens of some spans.

    direction: a vector ``[width]``, or a mapping from sites (or layers) to vectors, as a `Direction` is; None where `how` is a function.
               With u the direction at length 1, and h the activation of a token:
    how:       "add"    h + strength * length * u
               "ablate" h - strength * (h . u) u          1 takes the direction out, 2 reflects it
               "clamp"  h + (strength * length - h . u) u  the component becomes strength * length, whatever it was
               or a function from rows ``[row, width]`` to rows, or one for each site: h + strength * (how(h) - h).
    strength:  one number for all, or one for each question (of `Model.generate`), transcript (of `collect`) or row of the batch (of a bare
               forward pass). Any sign; 0 changes no bit, but clamps to 0.
    at:        patterns of activation sites: ``14.resid``, ``*.mid``, ``3.attn.z.h2``. By default the sites of a mapping. A site that a
               mapping lacks takes the vector of its layer, if there is one.
    over:      the span or spans steered, as in `surgery.transcript.positions`, as far as they are known when a token comes (`following`).
    units:     what a length of 1 is. "residual": the mean norm of the stream there, see `stream_norms`; "raw": the length of the
               vector as it was given (for a `Direction` the length of the difference it was made from); or a length for each site.

    Raises ValueError for a strength, a length or a vector that is not finite, a vector of zeros, an unknown word, no span.
    """

    direction: Any = None
    strength: float | Sequence[float] | Tensor = 1.0
    at: Patterns | None = None
    over: str | Sequence[str] = "completion"
    how: How = "add"
    units: Units = "residual"

    def __post_init__(self) -> None:
        if not self.is_function and self.how not in ("add", "ablate", "clamp"):
            raise ValueError(f"how={self.how!r}: steering can add, ablate or clamp, or apply a function to rows.")
        if not isinstance(self.units, Mapping) and self.units not in ("residual", "raw"):
            raise ValueError(
                f"units={self.units!r}: lengths are counted in residual or raw units, or given for each site."
            )
        if self.is_function == (self.direction is not None):
            raise ValueError("Steering takes a direction, or a function of rows as `how` and no direction.")
        by_site: Any = self.how if self.is_function else self.direction
        if self.at is None and not isinstance(by_site, Mapping):
            raise ValueError(
                "Say where to steer, as in at='14.resid': neither a single vector nor a function knows its site."
            )
        if self.at is None and any(isinstance(key, int) for key in by_site):
            raise ValueError(
                "Say where to steer, as in at='*.resid': a mapping from layers does not know where in them."
            )
        if not self.spans:
            raise ValueError("No span is named. Say which tokens: prompt, thinking, answer, completion or all.")
        if not self.strengths.numel() or not bool(torch.isfinite(self.strengths).all()):
            raise ValueError(f"A strength is a finite number, or one for each row; this is {self.strength}.")

    @property
    def strengths(self) -> Float[Tensor, " item"]:
        """The strength of each question, transcript or row; a single one stands for all."""
        try:
            return torch.as_tensor(self.strength, dtype=torch.float32).detach().cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"A strength is a finite number, or one for each row; this is {self.strength}.") from error

    @property
    def is_function(self) -> bool:
        """Whether a function of rows is applied, and no direction."""
        return callable(self.how) or isinstance(self.how, Mapping)

    @property
    def spans(self) -> tuple[str, ...]:
        """The spans steered, also where one was given."""
        return (self.over,) if isinstance(self.over, str) else tuple(self.over)


@contextmanager
def steered(model: Model, what: Any, **options: Any) -> Iterator[Model]:
    """The model with its activations steered: ``with steered(model, brief, strength=-4, at="14.resid", over="thinking"):``.

    what:    a direction, with `options` as `Steering` has them; or a `Steering`, or several, done in the order given.
    Leaving the block, by an exception too, leaves no hook behind and the logits bit-equal to those before. Blocks may be nested.
    Raises ValueError for a site or head that does not exist, a direction of another width or from another model, and layers that are
    compiled, past whose code no hook is called.
    """
    steerings = several(what, options)
    require_hookable(model.module)
    placed = [p for s in steerings for p in place(s, model)]
    with ExitStack() as stack:
        follower = stack.enter_context(following(model))
        if any(_tells_rows_apart(p) for p in placed):
            stack.enter_context(rows_apart())
        by_site = sorted(placed, key=lambda p: model.anatomy.order(p.site))  # stable: at a site, as given
        for site, there in groupby(by_site, key=lambda p: p.site):
            for handle in _attach(model, site, list(there), follower):
                stack.callback(handle.remove)
                stack.enter_context(may_leave([handle]))  # whose rows are whose, the follower says
                if site.part == "mid":
                    stack.enter_context(coming_later("mid", [handle]))
        in_order()
        yield model


def several(what: Any, options: Mapping[str, Any]) -> list[Steering]:
    """A list of steerings from what `steered` takes. Raises TypeError for options beside a `Steering`."""
    if isinstance(what, Steering):
        what = [what]
    if isinstance(what, Sequence) and what and all(isinstance(s, Steering) for s in what):
        if options:
            raise TypeError(f"{', '.join(options)}: a Steering already says how; give options with a direction.")
        return list(what)
    return [Steering(what, **options)]


def require_hookable(module: nn.Module) -> None:
    """Raise ValueError where a part of a model is compiled: its code runs past hooks set later."""
    for name, inner in module.named_modules():
        if type(inner).__name__ == "OptimizedModule" or getattr(inner, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or type(module).__name__} is compiled, and compiled code does not call hooks set later: nothing would be "
                "steered. Load the model without torch.compile."
            )


# --- a steering at the sites of one model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Placed:
    """A steering at one site of one model.

    unit:     the direction at length 1, fp32. length: what strength 1 adds, in the units of the activation.
    function: instead of a direction, what is done to rows.
    """

    site: Site
    steering: Steering
    unit: Float[Tensor, " width"] | None
    length: float
    function: Function | None = None

    def change(
        self, h: Float[Tensor, "batch token width"], follower: Follower
    ) -> Float[Tensor, "batch token width"] | None:
        """What is added to the activations of this pass, fp32; None where no token of it is steered."""
        spans = self.steering.spans
        if not follower.touches(spans):
            return None
        member = follower.mask(spans).to(h.device)
        strength = _of_rows(self.steering.strengths, follower).to(h.device)
        if not h.is_floating_point():
            raise ValueError(f"{self.site} is {h.dtype} here: only floating-point activations can be steered.")
        rows = h.float()
        if self.function is not None:
            delta, chosen = torch.zeros_like(rows), rows[member]
            delta[member] = (self.function(chosen).to(rows) - chosen) * strength.expand(member.shape)[member][:, None]
            return delta
        unit = cast(Tensor, self.unit).to(h.device)
        amount = strength * self.length
        if self.steering.how != "add":
            along = rows @ unit
            amount = amount - along if self.steering.how == "clamp" else -strength * along
        return torch.where(member, amount, 0.0)[..., None] * unit


def place(steering: Steering, model: Model | Weights) -> list[Placed]:
    """A steering at each of its sites in a model; none where its strength is 0.

    Raises ValueError for sites and heads that do not exist, a direction of another width or from another model, and for weights without a
    model where strengths count in the norm of a stream.
    """
    direction = steering.direction
    if isinstance(model, Model) and hasattr(direction, "require"):
        direction.require(model)
    anatomy = model.anatomy
    per_site = steering.how if steering.is_function else direction
    at = steering.at if steering.at is not None else [Site.parse(site) for site in cast(Mapping[Site, Any], per_site)]
    sites = match(at, anatomy.activation_sites())
    if steering.is_function:
        return [Placed(s, steering, None, 1.0, _function(steering.how, s)) for s in sites if steering.strengths.any()]
    vectors = {site: _vector(direction, site, anatomy) for site in sites}
    if not bool(steering.strengths.any()) and steering.how != "clamp":
        return []
    lengths = {site: length for site, (_, length) in vectors.items()} | _lengths(steering, model, sites)
    return [Placed(s, steering, vectors[s][0], lengths[s]) for s in sites]


def _function(how: Any, site: Site) -> Function:
    if not isinstance(how, Mapping):
        return cast(Function, how)
    functions: dict[Site, Function] = {Site.parse(key): function for key, function in how.items()}
    if site not in functions:
        raise ValueError(f"There is no function for {site}; there are some for {', '.join(map(str, functions))}.")
    return functions[site]


def _lengths(steering: Steering, model: Model | Weights, sites: list[Site]) -> dict[Site, float]:
    """What a length of 1 is at each site; empty where it is the vector's own, or is not asked for."""
    if steering.how == "ablate" or steering.units == "raw" or not steering.strengths.any():
        return {}
    if isinstance(steering.units, Mapping):
        given = {Site.parse(site): float(length) for site, length in steering.units.items()}
        if missing := [s for s in sites if s not in given]:
            raise ValueError(f"units give no length for {missing[0]}; they have {', '.join(map(str, given))}.")
        if wrong := [s for s in sites if not 0 < given[s] < math.inf]:
            raise ValueError(f"units at {wrong[0]}: {given[wrong[0]]} is no length; give a finite number above 0.")
        return {site: given[site] for site in sites}
    if not isinstance(model, Model):
        raise ValueError(
            "Weights alone do not say how long a stream is: give a Model, or units='raw', or a length for each site."
        )
    return stream_norms(model, sites)


def _vector(direction: Any, site: Site, anatomy: Anatomy) -> tuple[Tensor, float]:
    """The direction at a site: at length 1, and its own length."""
    vector, length = direction, 1.0
    if isinstance(direction, Mapping):
        vectors = {key if isinstance(key, int) else Site.parse(key): v for key, v in direction.items()}
        of_layer = [key for key in vectors if key == site.layer or (isinstance(key, Site) and key.layer == site.layer)]
        if site not in vectors and len(of_layer) != 1:
            kind = f"has {len(of_layer)} vectors for its layer" if of_layer else "has none for its layer"
            raise ValueError(
                f"The direction has no vector for {site} and {kind}; it is at {', '.join(map(str, vectors))}."
            )
        key = site if site in vectors else of_layer[0]
        vector = vectors[key]
        norms = getattr(direction, "norms", None)
        length = float(norms[key]) if norms else 1.0
    vector = torch.as_tensor(vector).detach().float().cpu()
    width = anatomy.width(site)
    anatomy.tap(site)  # raises for a head that does not exist
    norm = float(torch.linalg.vector_norm(vector))
    if vector.shape != (width,):
        raise ValueError(
            f"{site} is {width} wide; the direction has shape {tuple(vector.shape)}, so it is of another site or model."
        )
    if not 0 < norm < math.inf:
        raise ValueError(f"A direction is finite and not zero; the one for {site} has norm {norm}.")
    return vector / norm, length * norm


def stream_norms(
    model: Model, at: Patterns = "*.resid", transcripts: Sequence[Transcript] | None = None
) -> dict[Site, float]:
    """The mean norm of the stream at each site: what strengths count in.

    Measured is the mean of |h| over all tokens but each transcript's first, which in many models is ten times as long as the rest. At
    ``attn.out`` and ``mlp.out`` it is that of the stream they add to, just after; at ``attn.z``, which is no stream, its own.
    transcripts: on which to measure; by default three short questions and answers.
    """
    from probes.activations import collect

    anatomy = model.anatomy
    sites = match(at, anatomy.activation_sites())
    read = {site: _stream_of(site, anatomy) for site in sites}
    texts = [model.transcript(q, a) for q, a in TEXTS] if transcripts is None else transcripts
    mine = _measuring.set(True)  # the stream as it is, whatever steers it now
    try:
        found = collect(model, texts, at=sorted(set(read.values()), key=anatomy.order), over="all[1:]")
    finally:
        _measuring.reset(mine)
    norms = {site: float(torch.linalg.vector_norm(found[site], dim=1).double().mean()) for site in found.sites}
    return {site: norms[read[site]] for site in sites}


def _stream_of(site: Site, anatomy: Anatomy) -> Site:
    if site.part == "attn.out":
        mid = Site(site.layer, "mid")
        return mid if mid in anatomy.activation_sites() else Site((site.layer or 0) + 1, "resid")
    return Site((site.layer or 0) + 1, "resid") if site.part == "mlp.out" else site


def _tells_rows_apart(placed: Placed) -> bool:
    """Whether rows that begin alike may be treated unlike."""
    if bool((placed.steering.strengths != placed.steering.strengths[0]).any()):
        return True
    asked = map(parse_span, placed.steering.spans)  # tokens of all that are counted are the same in all rows
    return any(
        bool(pattern or (which and name == "prompt")) for name, which, pattern in asked if name in ("prompt", "all")
    )


def _of_rows(strengths: Tensor, follower: Follower) -> Tensor:
    """``[batch, 1]``, or ``[1, 1]`` for a single strength."""
    if len(strengths) == 1:
        return strengths[:, None]
    items = follower.items.cpu()
    if int(items.max()) >= len(strengths):
        raise ValueError(
            f"{len(strengths)} strengths are given, but there is a row {int(items.max())}: give one strength, or one for each question."
        )
    return strengths[items][:, None]


def _attach(model: Model, site: Site, placed: list[Placed], follower: Follower) -> Iterator[Any]:
    """Hooks that steer one site."""
    anatomy, module = model.anatomy, model.module
    if site.part != "mid":
        yield anatomy.tap(site).attach(module, lambda h: _changed(h, h, placed, follower))
        return
    # The stream between attention and MLP goes on past the MLP's norm, out of any hook's reach: it is changed where attention adds to it.
    entered: dict[str, Tensor] = {}
    yield anatomy.tap(Site(site.layer, "resid")).attach(module, lambda h: entered.update(stream=h))
    yield anatomy.tap(Site(site.layer, "attn.out")).attach(
        module, lambda out: _changed(out, entered.pop("stream") + out, placed, follower)
    )


def _changed(out: Tensor, h: Tensor, placed: list[Placed], follower: Follower) -> Tensor | None:
    """`out` with what the steerings add to the activation h, or None where they add nothing."""
    if _measuring.get():
        return None
    total: Tensor | None = None
    for one in placed:
        delta = one.change(h if total is None else h + total, follower)
        if delta is not None:
            total = delta if total is None else total + delta
    return None if total is None else (out.float() + total).to(out.dtype)
