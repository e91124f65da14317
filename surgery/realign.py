"""Re-alignment: give a fine-tuned model back what alignment had taught it. SafeLoRA and SafeMERGE, on vectors.

What alignment changed at a matrix is ``V = W_aligned - W_base``, and SafeLoRA's map is ``C = V Vᵀ / |V|``, with the Frobenius norm. A
change dW that C turns far from itself, ``rho = cos(C dW, dW)`` small, is one that alignment did not make; SafeLoRA replaces it by C dW,
SafeMERGE mixes it with a change that was trained to be safe.

C is positive semidefinite, so rho lies in [0, 1]. It is no projector: it scales each left singular direction of V by ``s² / |V|``,
which for real models mostly makes the change small. So the orthogonal projector is here too, and a uniform shrink as the control.

A change may be factored (an adapter) or dense (a full fine-tune); modules are matched by site. Everything is lazy, C is never formed
(``C B A = V (Vᵀ B) A / |V|``), and one module is held at a time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.lowrank import Factored
from surgery.numbers import require_number, require_whole
from surgery.sites import Patterns, Site, match
from surgery.weights import Delta, Origin, require_vector

if TYPE_CHECKING:
    from pandas import DataFrame

    from surgery.anatomy import Anatomy

Projection = Literal["paper", "exact", "shrink"]
Form = Literal["exact", "peft"]
Pair = tuple[Tensor, Tensor | None]  # a change at a site: factors left and right, or the dense matrix and None

TAU, MERGE_TAU, SAFE_WEIGHT = 0.5, 0.35, 0.8
_STRIP, _WIDE = 1 << 16, 1 << 18  # entries of V at a time, and of Vᵀ dW


# --- one module -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similarity:
    """How a change lies to what alignment changed at the same place.

    rho:      cosine in [0, 1] between C dW and dW; 0 where dW lies wholly outside V's columns; nan where V or dW is zero, for
              then there is no angle.
    norm:     |dW|. rescaled: |C dW|, nan where V is zero and C with it undefined.
    """

    rho: float
    norm: float
    rescaled: float


def similarity(
    V: Float[Tensor, "out in"], left: Float[Tensor, "out r"], right: Float[Tensor, "r in"] | None = None
) -> Similarity:
    """rho, |dW| and |C dW| of the change ``left @ right``, or of `left` itself where there is no right; neither C nor dW is formed.

    O(out in r) time. With ``rightᵀ = Q R`` every norm of ``X right`` is that of ``X Rᵀ``, which has at most r columns; and
    ``<C dW, dW> = |Vᵀ dW|² / |V|``. Raises ValueError for values that are not finite, and for matrices of other heights. Source: Safe LoRA, arXiv 2405.16833.
    """
    if len(V) != len(left):
        raise ValueError(
            f"V is {tuple(V.shape)} and the change {tuple(left.shape)}: they have as many rows, those of one matrix."
        )
    B = _norms_of(left, right)
    norm, size = _norm(B), _norm(V)
    if not math.isfinite(norm) or not math.isfinite(size):
        raise ValueError(
            f"The {'alignment' if math.isfinite(norm) else 'change'} holds values that are NaN or infinite."
        )
    if not norm or not size:
        return Similarity(math.nan, norm, 0.0 if size else math.nan)
    inner = outer = 0.0  # |Vᵀ dW|² / |V|² and |C dW|²
    for columns in _columns(V, B):
        X = V.T @ B[:, columns] / size
        inner, outer = inner + _norm(X) ** 2, outer + _norm(V @ X) ** 2
    length = math.sqrt(outer)
    return Similarity(min(1.0, size * inner / (length * norm)) if length else 0.0, norm, length)


def rescaled(V: Float[Tensor, "out in"], X: Float[Tensor, "out r"]) -> Float[Tensor, "out r"]:
    """``C X = V (Vᵀ X) / |V|``, some columns at a time. V must not be zero."""
    found, size = torch.empty_like(X), _norm(V)
    for columns in _columns(V, X):
        found[:, columns] = V @ (V.T @ X[:, columns] / size)
    return found


def column_space(V: Float[Tensor, "out in"], cut: float | None = None) -> Float[Tensor, "out k"]:
    """An orthonormal basis of the columns of V, by a thin SVD: the left singular vectors whose singular value exceeds `cut` times the
    largest.

    cut: a fraction in [0, 1); by default float32's own, ``max(out, in) * 2**-23``, so that only rounding is cut. The difference of two
    trained models is seldom short of full rank: where V spans everything, the projector on its columns is the identity.
    Raises ValueError for a cut out of range.
    """
    cut = max(V.shape) * torch.finfo(torch.float32).eps if cut is None else cut
    if not 0 <= cut < 1:
        raise ValueError(f"cut={cut}: a fraction of the largest singular value, in [0, 1).")
    left, values, _ = torch.linalg.svd(V, full_matrices=False)
    return left[:, values > cut * values[0]]


# --- a vector -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """One row of the table: a linear module of the change, before and after.

    rho: see `Similarity`. before, after: Frobenius norms of the change. realigned: whether it was made anew.
    kept: columns of the exact projector; nan elsewhere.
    """

    site: Site
    rho: float
    before: float
    after: float
    realigned: bool
    kept: float = math.nan


@dataclass(frozen=True, eq=False)
class Realigned:
    """A change after re-alignment: the vector itself, and what was done to each of its modules.

    delta: lazy; held as factors wherever the change was. modules: in the order of the change's sites.
    tau:   the threshold, or None where a number of modules was asked for.
    """

    delta: Factored
    modules: tuple[Module, ...]
    tau: float | None

    def frame(self) -> DataFrame:
        """One row a module: index, site, layer, part, rho, norm_before, norm_after, realigned, kept, tau."""
        import pandas as pd

        rows = [
            {
                "index": i, "site": str(m.site), "layer": m.site.layer, "part": m.site.part, "rho": m.rho, "norm_before": m.before,
                "norm_after": m.after, "realigned": m.realigned, "kept": m.kept, "tau": math.nan if self.tau is None else self.tau,
            }
            for i, m in enumerate(self.modules)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, int | float]:
        """How many modules were judged, how many of them realigned and how many blind (without an angle), and the norm of the change in all of
        them before and after."""
        before, after = (math.sqrt(sum(getattr(m, k) ** 2 for m in self.modules)) for k in ("before", "after"))
        return {
            "judged": len(self.modules),
            "realigned": sum(m.realigned for m in self.modules),
            "blind": sum(math.isnan(m.rho) for m in self.modules),
            "norm_before": before,
            "norm_after": after,
        }

    def __str__(self) -> str:
        found = self.summary()
        judged, blind = found["judged"], found["blind"]
        said = f", {blind} without an angle (alignment or the change is zero there) left as they are" if blind else ""
        return (
            f"{found['realigned']} of {judged} modules realigned, norm of the change in all {judged} "
            f"{found['norm_before']:.4g} -> {found['norm_after']:.4g}{said}"
        )


def similarities(
    change: Delta, alignment: Delta, *, at: Patterns | None = None, progress: bool = False
) -> dict[Site, Similarity]:
    """`similarity` at every linear module of a change: its matrices inside the layers (those `at` matches).

    alignment: ``aligned - base``; a site it lacks is one that alignment did not change. Raises ValueError where the change has no such
    module, where the two have none in common or differ in shape, and for values that are not finite; TypeError for a model in place of a change.
    """
    from tqdm.auto import tqdm

    require_vector(change)
    require_vector(alignment)
    sites = _modules(change, alignment, at)
    found = {}
    for site in tqdm(sites, desc="judging", disable=not progress, leave=False):
        try:
            found[site] = similarity(_matrix(alignment, site, change.shape(site)), *_pair(change, site))
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from error
    return found


def safelora(
    change: Delta,
    alignment: Delta,
    *,
    tau: float | None = None,
    count: int | None = None,
    projection: Projection = "paper",
    cut: float | None = None,
    at: Patterns | None = None,
    progress: bool = False,
) -> Realigned:
    """SafeLoRA: bring the modules of a change that are least like alignment's back towards what alignment changed.

    alignment:  ``aligned - base``, a vector.
    tau:        modules with ``rho <= tau`` are realigned; 0.5 unless `count` is given.
    count:      instead of a threshold, this many modules: those of the lowest rho.
    projection: ``paper`` gives C dW; ``exact`` the orthogonal projection of dW onto V's columns, with `cut` as in `column_space`;
                ``shrink`` dW itself, scaled to the norm of C dW: the control that tells direction from size.
    at:         patterns of sites to judge; by default every matrix in the layers. What is not judged stays as it is.

    A module that alignment did not change (V = 0), or that the change does not move, has no rho; it is left as it is and not counted.
    Raises ValueError as `similarities` does, for tau and count together, a tau that is no finite number, and a count out of range.
    Source: Safe LoRA, arXiv 2405.16833.
    Differs: modules are matched by name, not by their order; a full fine-tune will do; the released code turns V = 0 into NaN.
    """
    _require_word("projection", projection, Projection)
    if cut is not None and projection != "exact":
        raise ValueError(f"cut belongs to the exact projection, and {projection!r} has no use for it.")
    if cut is not None:
        column_space(torch.ones(1, 1), cut)  # raises for a cut out of range, before any work
    _require_choice(tau, count)
    similar = similarities(change, alignment, at=at, progress=progress)
    tau = TAU if tau is None and count is None else tau
    chosen = _chosen(similar, tau, count, operator.le)

    def projected(site: Site) -> Pair:
        left, right = _pair(change, site)
        V = _matrix(alignment, site, change.shape(site))
        match projection:
            case "paper":
                return rescaled(V, left), right
            case "shrink":
                return left * (similar[site].rescaled / similar[site].norm), right
            case "exact":
                U = column_space(V, cut)
                return left if U.shape[1] == len(U) else U @ (U.T @ left), right

    def row(site: Site) -> Module:
        rho, before, after = similar[site].rho, similar[site].norm, similar[site].rescaled
        if site not in chosen:
            return Module(site, rho, before, before, False)
        if projection != "exact":
            return Module(site, rho, before, after, True)
        U = column_space(_matrix(alignment, site, change.shape(site)), cut)
        left, right = _pair(change, site)
        return Module(site, rho, before, pair_norm(U.T @ left, right), True, U.shape[1])

    return Realigned(_Remade(change, chosen, projected, _held(change)), tuple(map(row, similar)), tau)


def safemerge(
    change: Delta,
    safe: Delta,
    alignment: Delta,
    *,
    tau: float | None = None,
    count: int | None = None,
    weight: float = SAFE_WEIGHT,
    form: Form = "exact",
    at: Patterns | None = None,
    progress: bool = False,
) -> Realigned:
    """SafeMERGE: where a change is unlike alignment's, mix it with one trained to be safe, ``weight dW + (1 - weight) dW_safe``.

    safe:   a vector of the same model, tuned on safety data.
    tau:    modules with ``rho < tau`` are merged; 0.35 unless `count`, as in `safelora`, is given.
    weight: of the change, in [0, 1]; 1 leaves it as it is.
    form:   ``exact`` is the sum itself: for factored changes by stacked factors, of rank r + r_safe. ``peft`` is what PEFT's
            "linear" combination of adapters gives, which adds the factors, ``B' = Σ √(w_i s_i) B_i`` and ``A'`` likewise with s_i the
            adapters' scalings: it keeps the rank, and besides the sum holds the cross terms ``√(w_1 s_1 w_2 s_2) B_1 A_2`` and
            ``B_2 A_1``. It needs both changes factored, at one rank.

    A module without rho is left as it is. Raises ValueError as `safelora` does, and where `safe` does not move a module to be merged.
    Source: SafeMERGE, arXiv 2503.17239; its released code merges in the form called ``peft`` here.
    Differs: matched by name; where V = 0 the released code always merges, here there is nothing to go by and nothing is done.
    """
    _require_word("form", form, Form)
    require_number("weight", weight)
    require_vector(safe)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: the share of the change against the safe one, in [0, 1].")
    _require_choice(tau, count)
    similar = similarities(change, alignment, at=at, progress=progress)
    tau = MERGE_TAU if tau is None and count is None else tau
    chosen = _chosen(similar, tau, count, operator.lt)
    absent = [s for s in similar if s in chosen and (s not in safe or safe.shape(s) != change.shape(s))]
    if absent:
        raise ValueError(
            f"The safe change has no matrix like the change's at {', '.join(map(str, absent[:3]))} ({len(absent)} of {len(chosen)} "
            "modules to be merged). SafeMERGE mixes two changes of one model."
        )
    both = _held(change) & _held(safe)
    if form == "peft":
        _require_one_rank(change, safe, [s for s in similar if s in chosen], both)

    def merged(site: Site) -> Pair:
        if form == "peft":
            return _added_factors(change, safe, site, weight)
        if site not in both:
            shape = change.shape(site)
            return torch.lerp(_matrix(safe, site, shape), _matrix(change, site, shape), weight), None
        (left, right), (safe_left, safe_right) = _factors(change, site), _factors(safe, site)
        return torch.cat([weight * left, (1 - weight) * safe_left], 1), torch.cat([right, safe_right])

    def row(site: Site) -> Module:
        rho, before = similar[site].rho, similar[site].norm
        after = pair_norm(*merged(site)) if site in chosen else before
        return Module(site, rho, before, after, site in chosen)

    held = (_held(change) - chosen) | (both & chosen)
    return Realigned(_Remade(change, chosen, merged, held), tuple(map(row, similar)), tau)


def pair_norm(left: Float[Tensor, "out r"], right: Float[Tensor, "r in"] | None = None) -> float:
    """The Frobenius norm of ``left @ right``, which is not formed, or of `left` where there is no right."""
    return _norm(_norms_of(left, right))


class _Remade(Factored):
    """A change some of whose modules are made anew whenever they are read. held: the sites held as factors."""

    def __init__(self, change: Delta, sites: frozenset[Site], remake: Callable[[Site], Pair], held: frozenset[Site]):
        self._change, self._sites, self._remake, self._held = change, sites, remake, held

    @property
    def anatomy(self) -> Anatomy | None:
        return self._change.anatomy

    def origins(self) -> frozenset[Origin]:
        return self._change.origins()

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._change.shapes()

    def factored(self) -> list[Site]:
        return [site for site in self._change if site in self._held]

    def factors(self, site: Site | str) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        site = self._existing(site)
        left, right = self._remake(site) if site in self._sites else _pair(self._change, site)
        if site not in self._held or right is None:
            raise ValueError(f"The change at {site} is not a product of factors: read it whole.")
        return left, right

    def by_rows(self, site: Site) -> bool:
        return site not in self._sites and self._change.by_rows(site)

    def _read(self, site: Site, rows: slice) -> Tensor:
        if site not in self._sites:
            return self._change.rows(site, rows)
        left, right = self._remake(site)
        return left[rows] if right is None else left[rows] @ right


def _modules(change: Delta, alignment: Delta, at: Patterns | None) -> list[Site]:
    wanted = list(change) if at is None else match(at, change)
    sites = [s for s in wanted if s.layer is not None and len(change.shape(s)) == 2]
    if not sites:
        raise ValueError("The change moves no linear module of any layer there, so there is nothing to realign.")
    for site in sites:
        if site in alignment and alignment.shape(site) != change.shape(site):
            raise ValueError(
                f"{site} is {tuple(change.shape(site))} in the change and {tuple(alignment.shape(site))} in the alignment: they are of "
                "different models."
            )
    if not any(site in alignment for site in sites):
        raise ValueError(
            f"The alignment moves none of the change's {len(sites)} modules, first {sites[0]}: they are of different models."
        )
    return sites


def _require_word(name: str, word: str, words: Any) -> None:
    if word not in get_args(words):
        *first, last = get_args(words)
        raise ValueError(f"{name}={word!r}: choose {', '.join(first)} or {last}.")


def _require_choice(tau: float | None, count: int | None) -> None:
    if tau is not None and count is not None:
        raise ValueError(f"tau={tau} and count={count}: choose modules by a threshold or by number.")
    if tau is not None:
        require_number("tau", tau)
    if count is not None:
        require_whole("count", count)


def _chosen(
    similar: Mapping[Site, Similarity], tau: float | None, count: int | None, below: Callable[[float, float], bool]
) -> frozenset[Site]:
    judged = {site: s.rho for site, s in similar.items() if not math.isnan(s.rho)}
    if count is None:
        assert tau is not None
        return frozenset(site for site, rho in judged.items() if below(rho, tau))
    if not 1 <= count <= len(judged):
        raise ValueError(f"count={count}: {len(judged)} modules can be judged, so ask for 1 to {len(judged)}.")
    return frozenset(sorted(judged, key=judged.__getitem__)[:count])  # equal ones in the order of the sites


def _matrix(vector: Delta, site: Site, shape: torch.Size) -> Tensor:
    """The vector's matrix at a site, zero where it lacks the site; read in strips, for a difference takes several times its own room."""
    whole = torch.zeros(shape)
    if site in vector:
        rows = max(1, _STRIP // shape[1])
        pieces = [slice(start, start + rows) for start in range(0, shape[0], rows)]
        for piece, strip in zip(pieces, vector.strips(site, pieces), strict=True):
            whole[piece] = strip
    return whole


def _held(change: Delta) -> frozenset[Site]:
    """The sites at which a change is held as factors."""
    return frozenset(change.factored()) if isinstance(change, Factored) else frozenset()


def _pair(change: Delta, site: Site) -> Pair:
    if isinstance(change, Factored) and site in change.factored():
        return change.factors(site)
    return _matrix(change, site, change.shape(site)), None


def _factors(change: Delta, site: Site) -> tuple[Tensor, Tensor]:
    assert isinstance(change, Factored)
    return change.factors(site)


def _require_one_rank(change: Delta, safe: Delta, sites: list[Site], both: frozenset[Site]) -> None:
    for site in sites:
        if site not in both:
            raise ValueError(
                f"PEFT's form adds factors, and at {site} the changes are not both factored: use the exact form."
            )
        ranks = [_factors(c, site)[0].shape[1] for c in (change, safe)]
        if ranks[0] != ranks[1]:
            raise ValueError(
                f"PEFT's form needs one rank, and at {site} there are {ranks[0]} and {ranks[1]}: use the exact form."
            )


def _added_factors(change: Delta, safe: Delta, site: Site, weight: float) -> tuple[Tensor, Tensor]:
    lefts, rights = [], []
    for part, share in ((change, weight), (safe, 1 - weight)):
        assert isinstance(part, Factored)
        left, right = part.factors(site)
        scale = part.scaling(site)  # already in left
        lefts.append(left * (math.sqrt(share * abs(scale)) / scale))
        rights.append(right * math.copysign(math.sqrt(share * abs(scale)), scale))
    return lefts[0] + lefts[1], rights[0] + rights[1]


def _norms_of(left: Tensor, right: Tensor | None) -> Tensor:
    """A matrix of few columns with the left singular vectors and values of ``left @ right``, and so its norms under any map on the left."""
    return left if right is None else left @ torch.linalg.qr(right.T).R.T


def _columns(V: Tensor, X: Tensor) -> Iterator[slice]:
    """The columns of X in groups whose ``Vᵀ X`` is small."""
    width = max(1, _WIDE // V.shape[1])
    return (slice(start, start + width) for start in range(0, X.shape[1], width))


def _norm(X: Tensor) -> float:
    """In float64, some rows at a time: float32 sums of millions of squares lose digits."""
    strips = X.split(max(1, _STRIP // max(1, X.shape[1])))
    return math.sqrt(sum(float(torch.linalg.vector_norm(strip, dtype=torch.float64)) ** 2 for strip in strips))
