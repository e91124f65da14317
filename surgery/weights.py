"""Weights are points, changes are vectors.

``point - point = vector``, ``point + vector = point``, ``vector + vector = vector``; ``point + point`` is a TypeError. Everything is
lazy: an expression costs nothing until `write` or `installed` walks it, tensor by tensor. Expressions are kept as sums of their
leaves, so ``base + (tuned - base)`` *is* ``tuned``, to the bit.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from surgery.anatomy import Anatomy
from surgery.rounding import Kept, as_dtype
from surgery.sites import Patterns, Site, match

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint

Edit = Callable[[Site, Tensor], Tensor]
Rewiring = Callable[["Weights"], "Weights"]
Indices = int | slice | Iterable[int]  # of layers or heads
_ALL = slice(None)
_PIECE = 1 << 20  # entries of a tensor in work at a time, where only a sum of it is wanted


@dataclass(frozen=True)
class Origin:
    """What a vector remembers of the models it was measured between, so that it can be landed on others.

    layers: how many blocks they have. tied: whether their head is their embedding.
    """

    layers: int
    tied: bool

    @classmethod
    def of(cls, anatomy: Anatomy) -> Origin:
        return cls(anatomy.n_layers, Site(None, "head") in anatomy.ties)


class _Tensors(Mapping[Site, Tensor]):
    """What points and vectors share: sites to tensors, read when asked for."""

    @abstractmethod
    def shapes(self) -> Mapping[Site, torch.Size]:
        """Every site's shape, ``[out, in]`` for matrices, known without reading a tensor."""

    @abstractmethod
    def _read(self, site: Site, rows: slice) -> Tensor:
        """The rows asked for of the tensor at a whole site that exists."""

    def _resolve(self, site: Site | str) -> Site:
        return Site.parse(site).whole

    def _existing(self, site: Site | str) -> Site:
        whole = self._resolve(site)
        if whole not in self.shapes():
            match(str(site), self.shapes())  # raises, listing what exists
        return whole

    def __getitem__(self, site: Site | str) -> Tensor:
        return self._read(self._existing(site), _ALL)

    def rows(self, site: Site | str, rows: slice) -> Tensor:
        """Some rows of the tensor at a site; the others are not computed. Bounds memory where a tensor is huge."""
        return self._read(self._existing(site), rows)

    def by_rows(self, site: Site) -> bool:
        """Whether some rows of the tensor at a whole site cost less than all of it. Where it is so, several threads may read at once."""
        return True

    def strips(self, site: Site, pieces: Iterable[slice]) -> Iterator[Tensor]:
        """The tensor at a whole site, some rows after others; where rows cost as much as all of it, it is computed once."""
        whole = None if self.by_rows(site) else self[site]
        for piece in pieces:
            yield self.rows(site, piece) if whole is None else some_rows(whole, piece)

    def __contains__(self, site: object) -> bool:  # Mapping's own would read the tensor
        return isinstance(site, Site | str) and self._resolve(site) in self.shapes()

    def get(self, site: Site | str, default: Any = None) -> Any:  # Mapping's own expects a KeyError
        return self[site] if site in self else default  # noqa: SIM401 - this is it

    def __iter__(self) -> Iterator[Site]:
        return iter(self.shapes())

    def __len__(self) -> int:
        return len(self.shapes())

    def shape(self, site: Site | str) -> torch.Size:
        """Of one site's tensor, ``[out, in]`` for a matrix; of a head's slice where the site names a head.

        Raises as reading it does for one that is not there.
        """
        return self.shapes()[self._existing(site)]

    @abstractmethod
    def origins(self) -> frozenset[Origin]:
        """The kinds of models that this is, or was measured between; empty where that is not known."""

    def __repr__(self) -> str:
        count = sum(s.numel() for s in self.shapes().values())
        return f"<{type(self).__name__}: {len(self)} tensors, {count / 1e6:.1f} M numbers>"


class Weights(_Tensors):
    """A point: the weights of a model, as a lazy mapping from `Site` to a tensor ``[out, in]``.

    A tensor read from a file or a module has its stored dtype; a computed one is fp32. ``w["12.attn.o.h3"]`` gives one head's slice.
    ``anatomy`` says where sites are; ``layout`` is the checkpoint whose files a written copy will imitate (None where there is none).
    """

    anatomy: Anatomy
    layout: Checkpoint | None

    @abstractmethod
    def dtype(self, site: Site | str) -> torch.dtype:
        """The dtype in which the tensor at a site is stored."""

    def _resolve(self, site: Site | str) -> Site:
        return self.anatomy.resolve(site)

    def origins(self) -> frozenset[Origin]:
        return frozenset({Origin.of(self.anatomy)})

    def __getitem__(self, site: Site | str) -> Tensor:
        tensor = super().__getitem__(site)
        parsed = Site.parse(site)
        return tensor if parsed.head is None else tensor[self.anatomy.head_slice(parsed)]

    def __contains__(self, site: object) -> bool:
        if not super().__contains__(site):
            return False
        parsed = Site.parse(cast(Site | str, site))
        try:
            return parsed.head is None or self.anatomy.head_slice(parsed) is not None
        except ValueError:  # there is no such head
            return False

    def rows(self, site: Site | str, rows: slice) -> Tensor:
        parsed = Site.parse(site)
        return super().rows(site, rows) if parsed.head is None else some_rows(self[site], rows)

    def shape(self, site: Site | str) -> torch.Size:
        whole, parsed = super().shape(site), Site.parse(site)
        if parsed.head is None:
            return whole
        return torch.empty(whole, device="meta")[self.anatomy.head_slice(parsed)].shape

    @overload
    def __sub__(self, other: Weights) -> Delta: ...
    @overload
    def __sub__(self, other: Delta) -> Weights: ...
    def __sub__(self, other: Weights | Delta) -> Delta | Weights:
        if isinstance(other, Delta):
            return self + -other
        if not isinstance(other, Weights):
            return NotImplemented
        require_same_sites(self, other)
        return Difference(_merged([(1.0, self), (-1.0, other)]), self.shapes())

    def __add__(self, other: Delta) -> Weights:
        if isinstance(other, Weights):
            raise TypeError(
                "A model plus a model is not a model. Add a difference: base + 0.5 * (tuned - base), or average: base + 0.5 * (other - base)."
            )
        if not isinstance(other, Delta):
            return NotImplemented
        return Moved(self, other)

    def changed_from(self, layout: Weights) -> set[Site]:
        """The sites at which this point may differ from `layout`; all of them unless a view knows better."""
        return set() if self is layout else set(self)


class Delta(_Tensors):
    """A vector: what separates two points, as a lazy mapping from `Site` to an fp32 tensor ``[out, in]``.

    A site that a Delta lacks is a site it does not move. It has whole tensors: where heads lie only a model knows.
    """

    @property
    def anatomy(self) -> Anatomy | None:
        """The anatomy of the points this vector comes from; None where no point is known."""
        return None

    def _resolve(self, site: Site | str) -> Site:
        parsed = Site.parse(site)
        if parsed.head is not None:
            raise ValueError(f"{parsed} asks a change for one head, but it has whole tensors: ask for {parsed.whole}.")
        return parsed

    def __contains__(self, site: object) -> bool:
        return isinstance(site, Site | str) and Site.parse(site) in self.shapes()

    def terms(self) -> list[tuple[float, _Tensors]]:
        """The leaves this vector is a sum of, with their coefficients; points among them sum to zero."""
        return [(1.0, self)]

    def taken_from(self) -> Weights | None:
        """The point that this vector leads away from: `base` of ``tuned - base``, of its multiples and parts. None where no one is known."""
        return None

    def origins(self) -> frozenset[Origin]:
        leaves = [leaf for _, leaf in self.terms() if leaf is not self]
        own = {Origin.of(self.anatomy)} if not leaves and self.anatomy else set()
        return frozenset(own).union(*(leaf.origins() for leaf in leaves))

    def __add__(self, other: Delta) -> Delta:
        if isinstance(other, Weights):
            return NotImplemented  # Weights.__radd__ is not defined: point first, then vector
        if not isinstance(other, Delta):
            return NotImplemented
        shapes = {**self.shapes(), **other.shapes()}
        clash = [s for s in self.shapes() if s in other.shapes() and self.shapes()[s] != other.shapes()[s]]
        if clash:
            raise ValueError(_shape_clash(self, other, clash))
        return Difference(_merged([*self.terms(), *other.terms()]), shapes)

    def __radd__(self, other: object) -> Delta:
        return self if other == 0 else NotImplemented  # so that sum() works

    def __neg__(self) -> Delta:
        return -1.0 * self

    def __sub__(self, other: Delta) -> Delta:
        return self + -other if isinstance(other, Delta) else NotImplemented

    def __mul__(self, scale: float) -> Delta:
        if not isinstance(scale, int | float):
            return NotImplemented
        if not math.isfinite(scale):
            raise ValueError(f"A change times {scale} is none: give a finite number.")
        return Difference([(scale * c, leaf) for c, leaf in self.terms()], self.shapes())

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Delta:
        return self * (1.0 / scale)

    def keep(
        self,
        at: Patterns = "**",
        *,
        layers: Indices | None = None,
        heads: Indices | None = None,
        anatomy: Anatomy | None = None,
    ) -> Delta:
        """The same vector at some of its sites, nothing elsewhere.

        at:      patterns. One that asks for a head (``*.attn.o.h3``) keeps that head's rows or columns.
        layers:  one layer, a range, a slice (of the model's layers, where a model is known) or any integers; places outside the
                 layers are then not kept.
        heads:   likewise, of the rows of ``attn.q``, ``attn.k`` and ``attn.v`` (these two count key/value heads) and the columns of
                 ``attn.o``; what has no heads is then not kept.
        anatomy: where heads lie; by default that of the points the vector comes from.
        Raises ValueError where nothing is left, for a head that does not exist, and for heads where no anatomy is known.
        """
        anatomy = anatomy or self.anatomy
        chosen = match(at, self)
        if layers is not None:
            there = {s.layer for s in chosen if s.layer is not None}
            depths = [anatomy.n_layers] if anatomy else [origin.layers for origin in self.origins()]
            wanted = _indices(layers, max(depths, default=max(there, default=-1) + 1))
            chosen = [s for s in chosen if s.layer in wanted]
            if not chosen:
                raise ValueError(
                    f"There is no layer {_listed(wanted)} among {_listed(there) or 'none'}: nothing would be kept."
                )
        if anatomy is None and (heads is not None or any(s.head is not None for s in chosen)):
            first = next((s for s in chosen if s.head is not None), chosen[0])
            raise ValueError(
                f"{first}: a change has whole tensors, and this one comes from no model that knows where heads lie. "
                "Say it: delta.keep(..., anatomy=model.anatomy)."
            )
        if heads is not None:
            assert anatomy is not None
            chosen = _heads_of(chosen, heads, anatomy)
        return _Kept(self, chosen, anatomy)

    def norms(self) -> dict[Site, float]:
        """Frobenius norm at each site, a few rows in memory at a time."""
        return {
            site: sum(float(_square(strip)) for strip in self.strips(site, pieces(shape))) ** 0.5
            for site, shape in self.shapes().items()
        }

    def cosines(self, other: Delta) -> dict[Site, float]:
        """Cosine with another vector at each site both have; nan where either is zero."""
        shared = [s for s in self if s in other]
        if not shared:
            raise ValueError("The two vectors have no site in common.")
        clash = [s for s in shared if self.shapes()[s] != other.shapes()[s]]
        if clash:
            raise ValueError(_shape_clash(self, other, clash))
        walks = {site: [v.strips(site, pieces(self.shapes()[site])) for v in (self, other)] for site in shared}
        return {site: _angle(zip(*walk, strict=True)) for site, walk in walks.items()}

    def survival(self, dtype: torch.dtype | str, base: Weights | None = None) -> dict[Site, Kept]:
        """What storing ``base + self`` in `dtype` (``"bfloat16"``, or torch's own) keeps of the change, at each site.

        base: by default the point that the change was taken from. Raises ValueError where that is not known, as of a stored change.
        """
        base = self.taken_from() if base is None else base
        if base is None:
            raise ValueError(
                "This change does not know one point that it was taken from: say it, as in survival(dtype, base)."
            )
        stored = as_dtype(dtype)
        if stored is None:
            raise ValueError(f"{dtype!r} is not one dtype: say which, as in survival('bfloat16', base).")
        moved = base + self

        def walk(site: Site) -> Iterable[tuple[Tensor, Tensor]]:
            return zip(*(point.strips(site, pieces(self.shapes()[site])) for point in (base, moved)), strict=True)

        return {site: _kept(walk(site), stored) for site in self}


def _kept(strips: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Kept:
    asked_square = kept_square = inner = 0.0
    moving = stuck = 0
    for before, after in strips:
        asked, kept = minus(after.float(), before.float()), minus(after.to(dtype).float(), before.float())
        asked_square, kept_square = asked_square + float(_square(asked)), kept_square + float(_square(kept))
        inner += float((asked.double() * kept.double()).sum())
        moving += int((asked != 0).sum())
        stuck += int(((kept == 0) & (asked != 0)).sum())
    return Kept.of(asked_square, kept_square, inner, stuck, moving)


def pieces(shape: torch.Size) -> Iterator[slice]:
    """Slices that together are all rows of a tensor, each of about a million entries: to walk a tensor without holding it."""
    if not shape:
        yield _ALL
        return
    step = max(1, _PIECE // max(1, shape[1:].numel()))
    yield from (slice(start, start + step) for start in range(0, shape[0], step))


def some_rows(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor. A single number has no rows, and is given whole."""
    return tensor[rows] if tensor.ndim else tensor


def minus(a: Tensor, b: Tensor) -> Tensor:
    """``a - b``, and 0 where both are the same infinity or NaN: buffers that no model reads hold such."""
    apart = a - b
    return apart if bool(torch.isfinite(apart).all()) else apart.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)


class Difference(Delta):
    """A sum of points and vectors, ``Σ c_i leaf_i``, whose points' coefficients cancel."""

    def __init__(self, terms: list[tuple[float, _Tensors]], shapes: Mapping[Site, torch.Size]):
        self._terms, self._shapes = terms, shapes

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    @property
    def anatomy(self) -> Anatomy | None:
        leaves = [leaf for _, leaf in self._terms]
        return next((leaf.anatomy for leaf in leaves if isinstance(leaf, Weights | Delta) and leaf.anatomy), None)

    def terms(self) -> list[tuple[float, _Tensors]]:
        return self._terms

    def taken_from(self) -> Weights | None:
        leaves = [leaf.taken_from() for _, leaf in self._terms if isinstance(leaf, Delta)]
        points = [leaf for c, leaf in self._terms if c < 0 and isinstance(leaf, Weights)]
        found = {id(point): point for point in (*leaves, *points)}
        return found.popitem()[1] if len(found) == 1 else None

    def _read(self, site: Site, rows: slice) -> Tensor:
        if not any(site in leaf for _, leaf in self._terms):  # all that moved it has cancelled
            return some_rows(torch.zeros(self._shapes[site]), rows)
        return _sum(self._terms, site, rows)

    def by_rows(self, site: Site) -> bool:
        return all(leaf.by_rows(site) for _, leaf in self._terms if site in leaf)


class Moved(Weights):
    """A point and a vector: ``start + delta``. Sites the vector lacks are the start's own, byte for byte."""

    def __init__(self, start: Weights, delta: Delta):
        clash = [s for s, shape in delta.shapes().items() if start.shapes().get(s) != shape]
        if clash:
            raise ValueError(_shape_clash(start, delta, clash))
        base = start._terms if isinstance(start, Moved) else [(1.0, start)]
        self._terms = _merged([*base, *delta.terms()])
        self._start = start._start if isinstance(start, Moved) else start
        self._touched = {start._resolve(s) for s in delta} | (start._touched if isinstance(start, Moved) else set())
        self.anatomy, self.layout = start.anatomy, start.layout

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._start.shapes()

    def dtype(self, site: Site | str) -> torch.dtype:
        return self._start.dtype(site)

    def terms(self) -> list[tuple[float, _Tensors]]:
        return self._terms

    def _read(self, site: Site, rows: slice) -> Tensor:
        if site not in self._touched:
            return self._start.rows(site, rows)
        if len(self._terms) == 1 and self._terms[0][0] == 1.0:
            return self._terms[0][1].rows(site, rows)
        return _sum(self._terms, site, rows, self._start)

    def by_rows(self, site: Site) -> bool:
        return self._start.by_rows(site) and all(leaf.by_rows(site) for _, leaf in self._terms if site in leaf)

    def changed_from(self, layout: Weights) -> set[Site]:
        return set() if self is layout else self._touched | self._start.changed_from(layout)


class Edited(Weights):
    """A point with an edit applied at some sites."""

    def __init__(self, start: Weights, edit: Edit, sites: Iterable[Site]):
        self._start, self._edit = start, edit
        self._at: dict[Site, list[Site]] = {}
        for site in sites:
            self._at.setdefault(start._resolve(site), []).append(site)
        self.anatomy, self.layout = start.anatomy, start.layout

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._start.shapes()

    def dtype(self, site: Site | str) -> torch.dtype:
        return self._start.dtype(site)

    def _read(self, site: Site, rows: slice) -> Tensor:
        if site not in self._at:
            return self._start.rows(site, rows)
        tensor = self._start[site]
        tensor = tensor.to(torch.float32, copy=True)
        for place in self._at[site]:
            index = (...,) if place.head is None else self.anatomy.head_slice(place)
            edited = self._edit(place, tensor[index])
            if edited.shape != tensor[index].shape:
                raise ValueError(
                    f"The edit turned {place} from {tuple(tensor[index].shape)} into {tuple(edited.shape)}."
                )
            tensor[index] = edited
        return some_rows(tensor, rows)

    def by_rows(self, site: Site) -> bool:
        return site not in self._at and self._start.by_rows(site)

    def changed_from(self, layout: Weights) -> set[Site]:
        return set() if self is layout else set(self._at) | self._start.changed_from(layout)


def apply(edit: Edit | Rewiring, weights: Weights, at: Patterns | None = None) -> Weights:
    """The same weights with an edit applied. Nothing happens until it is read.

    edit: ``(site, W) -> W``, applied in fp32 at the sites that the patterns `at` match; `W` is ``[out, in]``, or a head's rows or columns
          of it; a head whose whole tensor is named too is not edited twice. One with a method ``bound(weights, sites)`` is first
          asked for its form there (what a norm's gain has a say in), one with ``check(site, shape)`` whether it fits, at every site. Or
          ``weights -> weights`` (`SwapLayers`), which takes no patterns.
    Raises ValueError when the patterns match nothing, the edit does not fit or the weights are quantised, TypeError for patterns that are
    missing or too many.
    """
    takes = sum(p.default is p.empty for p in inspect.signature(edit).parameters.values())
    if at is None:
        if takes != 1:
            raise TypeError(
                f"{edit!r} edits one tensor at a time: say at which sites, as in apply(edit, weights, '*.attn.o')."
            )
        return cast(Rewiring, edit)(weights)
    if takes == 1:
        raise TypeError(f"{edit!r} edits the whole model: leave out the sites.")
    named = match(at, weights)
    edit = bound(weights, named) if (bound := getattr(edit, "bound", None)) else edit
    check = getattr(edit, "check", None)
    for site in named:
        require_numbers(weights, site)
        if site.head is not None:
            weights.anatomy.head_slice(site)  # raises on a head that does not exist
        if check is not None:
            check(site, weights.shape(site))
    whole = {site for site in named if site.head is None}
    return Edited(weights, cast(Edit, edit), [s for s in named if s.head is None or s.whole not in whole])


def require_numbers(weights: Weights, site: Site | str, instead: str = "Load the model unquantised.") -> None:
    """Raise ValueError where the tensor at a site holds the codes of a quantised model. instead: what to do then."""
    stored = weights.dtype(site)
    if not stored.is_floating_point or stored.itemsize == 1:
        raise ValueError(
            f"{site} is stored as {stored}: such numbers are codes of a quantised model, not weights. {instead}"
        )


def require_summable(weights: Weights, site: Site) -> None:
    """Raise ValueError where the tensor at a site holds codes; what a family's table does not name may be whole numbers, as masks are."""
    if not site.is_unnamed or weights.dtype(site).is_floating_point:
        require_numbers(weights, site, "Use the original, or load it with transformers, .dequantize() and save it.")


def linear_sites(weights: Weights) -> list[Site]:
    """The attention and MLP matrices of every layer (210 in the specimen)."""
    return weights.anatomy.linear_sites()


def require_point(given: object) -> None:
    """Raise TypeError for a change where a model's weights are wanted."""
    if isinstance(given, Delta):
        raise TypeError(f"{given!r}: a model is wanted, and this is a change: add it to one, as in base + change.")


def require_vector(given: object) -> None:
    """Raise TypeError for a model's weights where a change is wanted."""
    if isinstance(given, Weights):
        raise TypeError(f"{given!r}: a change is wanted, and this is a model: take the difference, as in tuned - base.")


def require_same_sites(a: _Tensors, b: _Tensors, among: Iterable[Site] | None = None) -> None:
    """Raise ValueError naming the first three sites (of all, or `among` some) at which two models differ in presence, shape or ties."""
    one, other = a.shapes(), b.shapes()
    differing = sorted(s for s in (one.keys() | other.keys() if among is None else among) if one.get(s) != other.get(s))
    if differing:
        raise ValueError(_shape_clash(a, b, differing))


def _shape_clash(a: _Tensors, b: _Tensors, sites: list[Site]) -> str:
    def shape(w: _Tensors, site: Site) -> str:
        return str(tuple(w.shapes()[site])) if site in w.shapes() else "absent"

    first = "; ".join(f"{s}: {shape(a, s)} against {shape(b, s)}" for s in sites[:3])
    differ = "1 site differs" if len(sites) == 1 else f"{len(sites)} sites differ"
    return f"These do not have the same anatomy: {differ}, first {first}. Differences need the same architecture and vocabulary."


def _merged(terms: list[tuple[float, _Tensors]]) -> list[tuple[float, _Tensors]]:
    """Terms with equal leaves added up; those that cancel are gone."""
    total: dict[int, tuple[float, _Tensors]] = {}
    for coefficient, leaf in terms:
        before = total.get(id(leaf), (0.0, leaf))[0]
        total[id(leaf)] = (before + coefficient, leaf)
    return [(c, leaf) for c, leaf in total.values() if c != 0.0]


def _sum(terms: list[tuple[float, _Tensors]], site: Site, rows: slice, start: Weights | None = None) -> Tensor:
    """``Σ c_i leaf_i`` at a site, in fp32.

    Points are taken relative to one of them, so that a small change is not lost in large weights: their coefficients sum to one
    in a point (then the origin is `start`, or the heaviest point) and to zero in a vector. Raises ValueError for codes of a quantised model.
    """
    points = [(c, leaf) for c, leaf in terms if isinstance(leaf, Weights) and site in leaf]
    for _, leaf in points:
        require_summable(leaf, site)
    anchor: _Tensors | None = None
    if start is not None:
        anchor = start if any(leaf is start for _, leaf in points) else max(points, key=lambda term: term[0])[1]
    elif points:
        anchor = min(points, key=lambda term: term[0])[1]
    origin = None if anchor is None else anchor.rows(site, rows).float()
    total = None if start is None else origin
    for coefficient, leaf in terms:
        if leaf is anchor or site not in leaf:
            continue
        stored = leaf.rows(site, rows)
        value = stored.to(None if origin is None else origin.device, torch.float32)
        fresh = value is not stored  # nobody else's: arithmetic may happen in place
        if origin is not None and isinstance(leaf, Weights):
            value = minus(value, origin) if site.is_unnamed else value.sub_(origin) if fresh else value - origin
            fresh = True
        if total is None:
            total = value * coefficient
        else:
            value = value.to(total.device)
            total = torch.add(total, value, alpha=coefficient, out=value if fresh else None)
    assert total is not None  # a site exists only where some leaf has it
    return total


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _angle(strips: Iterable[tuple[Tensor, Tensor]]) -> float:
    inner = a_square = b_square = 0.0
    for a, b in strips:
        a, b = a.double(), b.double()
        inner, a_square, b_square = (
            inner + float((a * b).sum()),
            a_square + float(_square(a)),
            b_square + float(_square(b)),
        )
    norms = (a_square * b_square) ** 0.5
    return inner / norms if norms else float("nan")


def _indices(wanted: Indices, count: int) -> set[int]:
    """The integers that a number, a slice of `count` or an iterable stands for."""
    if isinstance(wanted, int):
        return {wanted}
    return set(range(count)[wanted]) if isinstance(wanted, slice) else set(wanted)


def _listed(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    whole = len(numbers) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


def _heads_of(sites: Iterable[Site], heads: Indices, anatomy: Anatomy) -> list[Site]:
    """The heads asked for of every site that has heads; of a site that is one head already, that head if it is asked for."""
    chosen: list[Site] = []
    for site in sites:
        try:
            count = anatomy.heads(site)
        except ValueError:
            continue  # it has none
        wanted = sorted(_indices(heads, count))
        if site.head is None:
            chosen += [Site(site.layer, site.part, head) for head in wanted]
        elif site.head in wanted:
            chosen.append(site)
    if not chosen:
        raise ValueError(
            "None of the sites kept has the heads asked for. Heads are at attn.q, attn.k, attn.v and attn.o."
        )
    return chosen


class _Kept(Delta):
    """A vector at some sites, and of some of them only some heads."""

    def __init__(self, delta: Delta, sites: Iterable[Site], anatomy: Anatomy | None):
        self._delta, self._anatomy = delta, anatomy
        self._at: dict[Site, list[tuple[slice, ...]] | None] = {}
        for site in sites:
            if site.head is None:
                self._at[site] = None
                continue
            assert anatomy is not None
            index, found = anatomy.head_slice(site), self._at.setdefault(site.whole, [])
            if found is not None:  # the whole tensor is not kept already
                found.append(index)

    @property
    def anatomy(self) -> Anatomy | None:
        return self._anatomy

    def shapes(self) -> Mapping[Site, torch.Size]:
        return {s: shape for s, shape in self._delta.shapes().items() if s in self._at}

    def origins(self) -> frozenset[Origin]:
        return self._delta.origins()

    def taken_from(self) -> Weights | None:
        return self._delta.taken_from()

    def _read(self, site: Site, rows: slice) -> Tensor:
        value, heads = self._delta.rows(site, rows), self._at[site]
        if heads is None:
            return value
        kept = torch.zeros(self._delta.shapes()[site], dtype=torch.bool)
        for index in heads:
            kept[index] = True
        return torch.where(some_rows(kept, rows).to(value.device), value, 0.0)

    def by_rows(self, site: Site) -> bool:
        return self._delta.by_rows(site)
