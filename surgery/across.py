"""A vector as it fits another model: a language model's on the language tower of a vision-language model, or between vocabularies padded
to different lengths.

Sites have the same names in every family and layout, so nothing is mapped by hand. `land` says what it had to leave out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from surgery.anatomy import Anatomy
from surgery.sites import Site
from surgery.weights import Delta, Weights, pieces, require_point, require_vector

EMBED, HEAD = Site(None, "embed"), Site(None, "head")
_BY_TOKEN = ("embed", "head", "head.bias")  # one row a token


@dataclass(frozen=True)
class Landed:
    """A vector as it fits a model.

    delta:      the vector at the model's sites, with the model's shapes: ``model + 0.7 * landed.delta``.
    unmatched:  the sites the vector moves and the model lacks; they are left out.
    restricted: site -> which rows the two have in common, where the vocabularies differ in length.
    notes:      what else should be known: where a tie decided, where tokens differ.
    """

    delta: Delta
    unmatched: list[Site]
    restricted: dict[Site, str]
    notes: list[str] = field(default_factory=list)

    def in_words(self) -> list[str]:
        """One line for each thing left out, restricted or worth knowing; empty where the vector fits as it is."""
        return [f"{s}: not in this model, left out" for s in self.unmatched] + [*self.restricted.values(), *self.notes]


def land(delta: Delta, on: Weights, *, base: str | os.PathLike[str] | None = None) -> Landed:
    """The vector as it fits the model `on`, lazily: nothing is read, except where embedding and head must be compared.

    Sites that both have, with equal shapes, are taken as they are. ``embed`` and ``head`` may differ in their number of rows: the rows
    that both have move. A vector from models whose head is tied to the embedding moves both in a model where they are two; the
    reverse lands only if the vector moves both alike. `base` is the folder of the model the vector was measured from (by default that
    of its own checkpoint): where it and `on` have a ``tokenizer.json``, the common rows are checked to stand for the same tokens.

    Raises ValueError, naming the first three sites, where layers or widths differ; where the two have no site in common; and where one
    matrix would have to move in two ways; TypeError for a model in place of the vector, or a vector in place of the model.
    """
    require_vector(delta)
    require_point(on)
    _require_fit(delta, on)
    takes, notes = _takes(delta, on)
    if not takes:
        first = ", ".join(str(s) for s in list(delta)[:3])
        raise ValueError(f"The vector and {_name(on)} have no site in common: the vector moves {first}.")
    there, here = delta.shapes(), on.shapes()
    restricted = {s: _rows_in_words(s, there[t][0], here[s][0]) for s, t in takes.items() if there[t] != here[s]}
    used = {*takes.values(), HEAD} if HEAD in on.anatomy.ties else set(takes.values())
    as_it_is = not restricted and all(s == t for s, t in takes.items()) and len(takes) == len(there)
    if any(s.part in _BY_TOKEN for s in takes):
        common = min(min(there[t][0], here[s][0]) for s, t in takes.items() if s.part in _BY_TOKEN)
        notes = [*notes, *_other_tokens(delta, on, base, common)]
    return Landed(
        delta if as_it_is else _Fitted(delta, {s: here[s] for s in takes}, takes, on.anatomy),
        sorted(s for s in there if s not in used),
        restricted,
        notes,
    )


def _require_fit(delta: Delta, on: Weights) -> None:
    there, here, depth = delta.shapes(), on.shapes(), on.anatomy.n_layers
    for origin in delta.origins():
        if origin.layers != depth:
            beyond = [s for s in there if s.layer is not None and s.layer >= depth][:3] or list(there)[:3]
            raise ValueError(
                f"The vector was measured on a model of {origin.layers} layers, and {_name(on)} has {depth}: layers do not correspond. "
                f"It moves {', '.join(map(str, beyond))}."
            )
    misfits = [s for s, shape in there.items() if not _fits(s, shape, here.get(s), depth)]
    if misfits:
        first = "; ".join(
            f"{s}: {tuple(there[s])} against {tuple(here[s]) if s in here else 'absent'}" for s in misfits[:3]
        )
        count = "1 site differs" if len(misfits) == 1 else f"{len(misfits)} sites differ"
        raise ValueError(
            f"The vector does not fit {_name(on)}: {count}, first {first}. Layers and widths must be the same; only the rows of embed and "
            "head, one a token, may be more or fewer."
        )


def _fits(site: Site, there: torch.Size, here: torch.Size | None, depth: int) -> bool:
    if here is None:
        return site.layer is None or site.layer < depth
    return there == here or (site.part in _BY_TOKEN and there[1:] == here[1:])


def _takes(delta: Delta, on: Weights) -> tuple[dict[Site, Site], list[str]]:
    """The model's site -> the vector's site whose change it takes; and what a tie had to do with it, in words."""
    there, here = delta.shapes(), on.shapes()
    takes = {s: s for s in there if s in here}
    if EMBED not in there and HEAD not in there:
        return takes, []
    tied_here, tied_there = HEAD in on.anatomy.ties, {origin.tied for origin in delta.origins()}
    if len(tied_there) == 2:
        raise ValueError(
            "The vector is a sum of vectors from models that tie the head to the embedding and from models that do not, so what it means "
            "for either is lost. Land each part by itself, then add."
        )
    if tied_here and (HEAD in there or tied_there == {False}):
        return _one_for_two(delta, on, takes)
    if not tied_here and tied_there == {True} and EMBED in there:
        takes[HEAD] = EMBED
        return takes, ["head: moves as embed does, to which the vector's own models tie it"]
    if not tied_here and not tied_there and HEAD not in there:
        return takes, ["embed: moves alone; whether the vector's own models tie the head to it is not known"]
    return takes, []


def _one_for_two(delta: Delta, on: Weights, takes: dict[Site, Site]) -> tuple[dict[Site, Site], list[str]]:
    """A vector from models with two matrices, on a model in which one serves as both: it must move both alike."""
    embed, head = (_moves(delta, site) for site in (EMBED, HEAD))
    if not embed and not head:
        return takes, []
    if embed and head and _equal(delta, EMBED, HEAD):
        return takes, ["embed: one matrix with the head here; the vector moves both alike"]
    moved = "embed and head differently" if embed and head else f"{EMBED if embed else HEAD} alone"
    raise ValueError(
        f"{_name(on)} ties head to embed, one matrix for both, but the vector moves {moved}. Leave both out, with "
        'keep(at=["*.attn.**", "*.mlp.**"]), or use a model that does not tie them.'
    )


def _moves(delta: Delta, site: Site) -> bool:
    return site in delta.shapes() and any(bool(strip.any()) for strip in _strips(delta, site))


def _equal(delta: Delta, one: Site, other: Site) -> bool:
    if delta.shapes()[one] != delta.shapes()[other]:
        return False
    return all(torch.equal(a, b) for a, b in zip(_strips(delta, one), _strips(delta, other), strict=True))


def _strips(delta: Delta, site: Site) -> Iterator[Tensor]:
    return delta.strips(site, pieces(delta.shapes()[site]))


def _rows_in_words(site: Site, there: int, here: int) -> str:
    rest = (
        f"the model's other {here - there} stay" if here > there else f"the vector's other {there - here} are left out"
    )
    return f"{site}: rows 0 to {min(there, here) - 1} of {max(there, here)}; {rest}"


def _other_tokens(delta: Delta, on: Weights, base: str | os.PathLike[str] | None, common: int) -> list[str]:
    """In words, whether the common rows stand for different tokens; nothing where the tokens of either are not known."""
    points = [leaf for _, leaf in delta.terms() if isinstance(leaf, Weights)]
    folder = base if base is not None else next((p.layout.folder for p in points if p.layout), None)
    there = _tokens(folder)
    here = _tokens(on.layout.folder if on.layout else None)
    if not there or not here:
        return []
    other = [i for i in range(common) if i in there and i in here and there[i] != here[i]]
    if not other:
        return []
    i = other[0]
    return [
        f"tokens: {len(other)} of the {common} common rows of embed and head stand for other tokens, first row {i}: {there[i]!r} where the "
        f"vector was measured, {here[i]!r} here"
    ]


def _tokens(folder: str | os.PathLike[str] | None) -> dict[int, str]:
    """Row -> token, as a folder's tokenizer.json has them; empty where there is none."""
    path = None if folder is None else Path(folder) / "tokenizer.json"
    if path is None or not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, added = said["model"]["vocab"], said.get("added_tokens") or []
        if isinstance(vocabulary, dict):
            tokens = {int(i): token for token, i in vocabulary.items()}
        else:  # a unigram model's: [token, score] in order
            tokens = {i: entry[0] for i, entry in enumerate(vocabulary)}
        return tokens | {int(entry["id"]): entry["content"] for entry in added}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}.") from error


def _name(on: Weights) -> str:
    return str(on.layout.folder) if on.layout else f"this {on.anatomy.family} model"


class _Fitted(Delta):
    """A vector at another model's sites, with that model's shapes: rows it does not have do not move."""

    def __init__(self, delta: Delta, shapes: Mapping[Site, torch.Size], takes: Mapping[Site, Site], anatomy: Anatomy):
        self._delta, self._shapes, self._takes, self._anatomy = delta, shapes, takes, anatomy

    @property
    def anatomy(self) -> Anatomy:
        return self._anatomy

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def by_rows(self, site: Site) -> bool:
        return self._delta.by_rows(self._takes[site])

    def _read(self, site: Site, rows: slice) -> Tensor:
        there, shape = self._takes[site], self._shapes[site]
        have = self._delta.shapes()[there]
        if have == shape:
            return self._delta.rows(there, rows)
        first, last, _ = rows.indices(shape[0])
        value = (
            self._delta.rows(there, slice(first, min(last, have[0]))) if first < have[0] else torch.empty(0, *have[1:])
        )
        missing = torch.zeros(max(0, last - first) - len(value), *have[1:], device=value.device)
        return torch.cat([value.float(), missing])
