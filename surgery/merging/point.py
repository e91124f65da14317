"""The merged point: weights that are computed when they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.merging.planning import Plan
from surgery.merging.rules import Rule, Source
from surgery.sites import Site
from surgery.weights import Delta, Weights, some_rows


class Merged(Weights):
    """The point a plan describes, as lazy as any other: reading a site calls the rule of the tensor it lives in.

    Weighted means and task arithmetic are points plus vectors, exact where they cancel; other rules are mergekit's. Reads are fp32.
    """

    def __init__(self, plan: Plan, layout: Checkpoint):
        self.anatomy, self.layout, self._form = layout.anatomy, layout, layout
        # with a vocabulary of its own the result is laid out like no model
        self._base = layout if plan.vocabulary is None or plan.layers is not None else Checkpoint(plan.layout)
        self._rules = plan.rules
        self._deltas: dict[str, Delta] = {}
        self._points: dict[tuple[tuple[str, float], ...], Weights] = {}
        self._sums = {site: point for site in layout.shapes() if (point := self._sum(site)) is not None}
        self._last: tuple[str, Tensor | None] = ("", None)

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._form.shapes()

    def dtype(self, site: Site | str) -> torch.dtype:
        return self._form.dtype(site)

    def changed_from(self, layout: Weights) -> set[Site]:
        if layout is not self._base:
            return set(self)
        still = {site for site, point in self._sums.items() if point is self._base}
        return {site for site in self if self.anatomy.places[site].name in self._rules} - still

    def _sum(self, site: Site) -> Weights | None:
        """The point plus vectors that has this site's tensor; None where the rule is no such sum."""
        place = self.anatomy.places[site]
        rule = self._rules.get(place.name)
        if rule is None or rule.sum is None or not all(_is_at(site, *found) for found in rule.inputs.values()):
            return None
        points = {
            rule.names[ref]: source.point for ref, (source, _) in rule.inputs.items() if not self._is_base(source)
        }
        shares = tuple((rule.names[ref], c) for ref, c in rule.sum.items() if c != 0 and rule.names[ref] in points)
        if shares not in self._points:
            try:
                for name, _ in shares:
                    self._deltas.setdefault(name, points[name] - self._base)
            except ValueError:  # of other sites: one ties its head, say
                return None
            total: Weights = self._base
            for name, share in shares:
                total = total + share * self._deltas[name]
            self._points[shares] = total
        return self._points[shares]

    def _is_base(self, source: Source) -> bool:
        return source.is_plain and source.layout.folder == self._base.folder

    def by_rows(self, site: Site) -> bool:
        place = self.anatomy.places[site]
        rule = self._rules.get(place.name)
        return rule is None or site in self._sums or (rule.by_rows and place.is_whole)

    def _read(self, site: Site, rows: slice) -> Tensor:
        if site in self._sums:
            return self._sums[site].rows(site, rows)
        place = self.anatomy.places[site]
        rule = self._rules.get(place.name)
        if rule is None:
            return self._base.rows(site, rows)
        by_rows = rule.by_rows and place.is_whole
        tensor = rule.rows(rows) if by_rows else some_rows(place.take(self._whole(place.name, rule)), rows)
        return tensor.clone() if rows == slice(None) else tensor  # whole, it is the caller's own

    def _whole(self, name: str, rule: Rule) -> Tensor:
        found, tensor = self._last
        if found != name or tensor is None:
            self._last = ("", None)  # the one before is not needed while this one is made
            made = rule.whole()
            tensor = self._base.stored(name) if made is None else made
            self._last = (name, tensor)
        return tensor


def _is_at(site: Site, source: Source, name: str) -> bool:
    """Whether the tensor of a model, by its file's name, is the one at the site."""
    place = source.layout.anatomy.places.get(site)
    return place is not None and place.name == name
