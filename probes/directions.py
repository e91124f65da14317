"""Directions: one vector a site, with its length, where it comes from, and how well it tells on questions it was not made from.

Every method takes rows of activations, a label a row (or a transcript) and a group, usually the question, and gives a `Direction`. The
vector points from label 0 to label 1. Its length, in activation units, is how far apart the two classes' means are along it: adding
the vector at that length carries the one mean to the other.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.activations import Activations, collect
from probes.estimates import Estimate, no_interval
from probes.held_out import auc_score, deal, opposite, units
from surgery.edit_lists import direction_file
from surgery.linalg import principal_subspace
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.seeds import seed_from_words
from surgery.sites import Patterns, Site, match
from surgery.tensorfile import save_whole
from surgery.transcript import Transcript, nobody_has, parse_span, positions

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "direction 1"
_NOISE = (
    1e-5  # of a row's usual length: the classes' means differ by less where the very same token was read in all rows
)

Labels = Sequence[Any] | Tensor | np.ndarray
How = Literal["paired", "thresholds"]


class NoSuchSiteError(KeyError):
    """A direction was asked for a site it does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Mapping[Site, Tensor]):
    """A unit vector at each of some sites.

    vectors: site -> unit vector ``[d]``, fp32.
    norms:   site -> length of the raw vector, in activation units. Arithmetic acts on raw vectors, ``norm * unit``.
    about:   how it was made: method, spans, counts, seed, and ``model``, the `surgery.runs.fingerprint` of the model it was measured in.
    auc:     site -> held-out AUC with its interval; empty where none was measured (after a sum, say).
    halves:  site -> cosine between the directions of two disjoint halves of the groups; NaN where a half was too small.

    ``direction["14.mid"]`` and, where the layer has one site only, ``direction[14]`` are unit vectors.
    """

    vectors: Mapping[Site, Float[Tensor, " d"]]
    norms: Mapping[Site, float]
    about: Mapping[str, Any] = field(default_factory=dict)
    auc: Mapping[Site, Estimate] = field(default_factory=dict)
    halves: Mapping[Site, float] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[Site, Tensor] | Mapping[str, Tensor], **about: Any) -> Direction:
        """A direction from raw vectors, which give it its lengths. Raises ValueError for a vector that is zero or not finite."""
        vectors, norms = {}, {}
        for name, given in raw.items():
            vector = torch.as_tensor(given)
            norm = float(torch.linalg.vector_norm(vector.double()))
            if vector.ndim != 1 or not 0 < norm < math.inf:
                raise ValueError(
                    f"The direction at {name} must be one finite, non-zero vector; it has shape {tuple(vector.shape)} and norm {norm}."
                )
            site = Site.parse(name)
            vectors[site], norms[site] = (vector.double() / norm).float().cpu(), norm
        if not vectors:
            raise ValueError("A direction needs at least one site.")
        return cls(vectors, norms, about)

    # --- as a mapping ---------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Site | str | int) -> Float[Tensor, " d"]:
        return self.vectors[self._site(key)]

    def __contains__(self, key: object) -> bool:
        try:
            self._site(key)  # type: ignore[arg-type]
        except (KeyError, ValueError):
            return False
        return True

    def __iter__(self) -> Iterator[Site]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def _site(self, key: Site | str | int) -> Site:
        if isinstance(key, int):
            here = [site for site in self.vectors if site.layer == key]
            if len(here) == 1:
                return here[0]
            said = f"has {', '.join(map(str, here))}: name one" if here else f"has {self._extent}"
            raise NoSuchSiteError(f"Layer {key} was asked of a direction that {said}.")
        site = Site.parse(key)
        if site not in self.vectors:
            raise NoSuchSiteError(f"{site} was asked of a direction that has {self._extent}.")
        return site

    @property
    def sites(self) -> list[Site]:
        """Where it has a vector, in the order of the vectors."""
        return list(self.vectors)

    @property
    def _extent(self) -> str:
        sites = self.sites
        return f"{sites[0]}" if len(sites) == 1 else f"{len(sites)} sites, {sites[0]} to {sites[-1]}"

    def raw(self, key: Site | str | int) -> Float[Tensor, " d"]:
        """The vector at its own length: adding it carries the mean of class 0 to that of class 1, as far as it goes along this line."""
        site = self._site(key)
        return self.vectors[site] * self.norms[site]

    def keep(self, at: Patterns) -> Direction:
        """The direction at some of its sites only. Raises ValueError when a pattern matches none of them."""
        return self._only(match(at, self.sites))

    def _only(self, sites: Sequence[Site]) -> Direction:
        def kept(table: Mapping[Site, Any]) -> dict[Site, Any]:
            return {site: table[site] for site in sites if site in table}

        return Direction(kept(self.vectors), kept(self.norms), self.about, kept(self.auc), kept(self.halves))

    # --- arithmetic, on raw vectors -------------------------------------------------------------------------------------------

    def __mul__(self, factor: float) -> Direction:
        if not math.isfinite(factor) or factor == 0:
            raise ValueError(f"A direction times {factor} has no direction.")
        norms = {site: abs(factor) * norm for site, norm in self.norms.items()}
        if factor > 0:
            return replace(self, norms=norms)
        vectors = {site: -unit for site, unit in self.vectors.items()}
        return replace(self, vectors=vectors, norms=norms, auc={site: opposite(s) for site, s in self.auc.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if divisor == 0:
            raise ValueError("A direction divided by 0 has no direction.")
        return self * (1 / divisor)

    def __neg__(self) -> Direction:
        return self * -1.0

    def __add__(self, other: Direction) -> Direction:
        return self._with(other, 1.0)

    def __sub__(self, other: Direction) -> Direction:
        return self._with(other, -1.0)

    def _with(self, other: Direction, sign: float) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        if set(self.sites) != set(other.sites):
            apart = sorted(set(self.sites) ^ set(other.sites))
            raise ValueError(
                f"Two directions are added site by site, and {len(apart)} sites are in one only, first {apart[0]}: keep(at=...) what they share."
            )
        models = {d.about.get("model") for d in (self, other)} - {None}
        if len(models) > 1:
            raise ValueError(
                "The two directions were measured in different models; carried_to(model) says that one is meant for the other's."
            )
        total = {site: self.raw(site).double() + sign * other.raw(site).double() for site in self.sites}
        gone = [site for site, v in total.items() if v.norm() <= 1e-6 * max(self.norms[site], other.norms[site])]
        if gone:
            raise ValueError(f"The two directions cancel at {gone[0]}: nothing is left of them there.")
        about = {"method": "sum" if sign > 0 else "difference", "of": [dict(self.about), dict(other.about)]}
        return Direction.of(total, **about, **({"model": models.pop()} if models else {}))

    def random(self, seed: int) -> Direction:
        """The control: at each site a random direction of the same length. The vector at a site depends on ``(seed, site)`` only."""
        raw = {}
        for site, unit in self.vectors.items():
            generator = torch.Generator().manual_seed(seed_from_words(seed, site))
            draw = torch.randn(len(unit), generator=generator, dtype=torch.float64)
            raw[site] = draw / draw.norm() * self.norms[site]
        about = {"method": "random", "seed": seed, "like": dict(self.about)}
        return Direction.of(raw, **about, **({"model": self.about["model"]} if "model" in self.about else {}))

    # --- tables ---------------------------------------------------------------------------------------------------------------

    def cosines(self, other: Mapping[Site, Tensor] | None = None) -> pd.DataFrame:
        """Cosines in [-1, 1] between this direction at each of its sites (rows) and another at each of its own (columns), or itself.

        NaN between sites of different width.
        """
        import pandas as pd

        theirs = self if other is None else other
        table = [[_cosine(mine, their) for their in theirs.values()] for mine in self.values()]
        return pd.DataFrame(table, index=[str(s) for s in self], columns=[str(s) for s in theirs])

    def frame(self) -> pd.DataFrame:
        """One row a site: site, layer, part, norm, auc, low, high, n (groups behind the AUC), halves."""
        import pandas as pd

        nothing = no_interval(math.nan, 0, "not judged")
        rows = []
        for site in self.sites:
            auc = self.auc.get(site, nothing)
            rows.append(
                {"site": str(site), "layer": site.layer, "part": site.part, "norm": self.norms[site], "auc": auc.value}
                | {"low": auc.low, "high": auc.high, "n": auc.n, "halves": self.halves.get(site, math.nan)}
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        judged = {site: s.value for site, s in self.auc.items() if not math.isnan(s.value)}
        best = max(judged, key=lambda site: judged[site]) if judged else None
        said = f", held-out AUC up to {judged[best]:.2f} (at {best})" if best else ""
        return f"<Direction {self.about.get('method', '')}: {self._extent}{said}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>" + self.frame().to_html(max_rows=24, float_format="%.4g", index=False)

    def auc_on(
        self, acts: Activations, labels: Labels, groups: Labels | None = None, *, inside: bool = False, seed: int = 0
    ) -> dict[Site, Estimate]:
        """How well the direction as it is tells rows apart that it was not made from: at each shared site the AUC of their projections.

        labels, groups: as for `mean_difference`. inside: compare rows of one group only, as the AUC of pairs does.
        Raises ValueError where the activations are at none of its sites, or of another width.
        """
        shared = [site for site in self.vectors if site in acts.values]
        if not shared:
            raise ValueError(
                f"The direction has {self._extent}; the activations are at {', '.join(map(str, acts.values))}."
            )
        y, g, rows = _classes(acts, labels, groups)
        what = "AUC inside groups" if inside else "AUC"
        found = {}
        for site in shared:
            X, unit = acts.values[site][rows].double(), self.vectors[site].double()
            if X.shape[1] != len(unit):
                raise ValueError(
                    f"The direction at {site} has width {len(unit)}, and the activations there {X.shape[1]}."
                )
            strata = g.numpy() if inside else None
            found[site] = auc_score((X @ unit).numpy(), y.numpy(), g.numpy(), strata, seed=seed, what=what)
        return found

    # --- belonging ------------------------------------------------------------------------------------------------------------

    def require(self, model: Model) -> None:
        """Raise ValueError unless the direction fits the model: its sites, their widths and, where it is known, the model itself."""
        for site, unit in self.vectors.items():
            model.anatomy.tap(site)  # raises where there is no such site
            if len(unit) != (width := model.anatomy.width(site)):
                raise ValueError(
                    f"The direction at {site} has width {len(unit)}, and the model's activations there {width}: it is of another model."
                )
        mine = self.about.get("model")
        if mine is not None and mine != (found := fingerprint(model)):
            raise ValueError(
                f"The direction was measured in another model: its fingerprint is {mine[:16]}, the one here {found[:16]}. Measure it again, or "
                "say carried_to(model) where a direction of one model is meant for another."
            )

    def carried_to(self, model: Model) -> Direction:
        """The same vectors, meant for another model of equal widths (a tuned one, say); the record says where they come from."""
        moved = replace(self, about={k: v for k, v in self.about.items() if k != "model"})
        moved.require(model)
        carried = {"model": fingerprint(model), "measured_in": self.about.get("model")}
        return replace(moved, about={**moved.about, **carried}, auc={}, halves={})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        metadata = {
            "format": _FORMAT,
            "about": json.dumps(dict(self.about)),
            "norms": json.dumps({str(site): norm for site, norm in self.norms.items()}),
            "auc": json.dumps({str(site): asdict(s) for site, s in self.auc.items()}),
            "halves": json.dumps({str(site): c for site, c in self.halves.items()}),
        }
        save_whole(path, {str(site): v for site, v in self.vectors.items()}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """What `save` wrote, or the folder of ``surgery direction``. Raises FileNotFoundError where there is no file, ValueError for a file
        that is no direction."""
        from safetensors import SafetensorError, safe_open

        if not (path := direction_file(path)).is_file():
            raise FileNotFoundError(
                f"There is no direction at {path}: give the safetensors file that Direction.save wrote, or the folder of `surgery direction`."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                vectors = {Site.parse(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if metadata.get("format") != _FORMAT:
                raise ValueError("it does not say that it is one")
            norms, auc, halves = (
                {Site.parse(name): value for name, value in json.loads(metadata[what]).items()}
                for what in ("norms", "auc", "halves")
            )
            scores = {site: Estimate(**{"seed": None, **value}) for site, value in auc.items()}
            if norms.keys() != vectors.keys():
                raise ValueError("its lengths are of other sites than its vectors")
            about = json.loads(metadata["about"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no direction: {error}") from error
        return cls({site: vectors[site] for site in norms}, norms, about, scores, halves)


# --- methods --------------------------------------------------------------------------------------------------------------------


def mean_difference(
    acts: Activations,
    labels: Labels,
    groups: Labels | None = None,
    *,
    model: Model | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Direction:
    """The mean of the rows labelled 1 less the mean of those labelled 0.

    labels: 1 or 0 (or True, False) a row, or a transcript where there are not as many as rows; None leaves it out.
    groups: a name a row or transcript, the question it belongs to; by default each transcript is its own group. Folds of the
            held-out AUC, and its interval, keep a group whole.
    model:  the model the rows were collected from; its fingerprint then goes with the direction.
    Sites at which the classes' means agree (the embedding, where one token was read) are left out; `about` names them. Raises
    ValueError for labels of one class only, or rows that are not finite.
    """
    return _made(acts, labels, groups, _MEAN, model=model, folds=folds, seed=seed)


def contrast_pairs(
    acts: Activations, labels: Labels, groups: Labels, *, model: Model | None = None, folds: int = 5, seed: int = 0
) -> Direction:
    """The mean over matched pairs of the difference inside the pair: what a pair has in common, its question, cancels.

    groups: a name a row or transcript; each must hold rows of both labels. Their means are compared where a side has several.
    The rest as `mean_difference`; the AUC compares inside pairs only. For contrastive activation addition, collect at the token of the
    answer (``over="answer[-1]"``) from questions completed with either answer.
    Raises ValueError for a group that lacks a side.
    Source: Rimsky et al. (2023), arXiv 2312.06681, section 3.
    """
    return _made(acts, labels, groups, _PAIRS, model=model, folds=folds, seed=seed, complete=True)


def pca_of_differences(
    acts: Activations, labels: Labels, groups: Labels, *, model: Model | None = None, folds: int = 5, seed: int = 0
) -> Direction:
    """The first principal component of the differences inside pairs, each taken one way or the other at random, recentred.

    Its sign is that of the mean difference, label 1 being positive. seed decides, besides the folds, which half of the differences is
    turned. Groups, and errors, as `contrast_pairs`; at least three pairs are needed.
    Source: Zou et al. (2023), arXiv 2310.01405, section 3.1 (linear artificial tomography).
    Differs: exactly half of the pairs are turned, so that the recentring takes out as little of the contrast as can be; the sign is
    read from the labels' mean difference, not from a count of pairs.
    """
    return _made(acts, labels, groups, _pca(seed), model=model, folds=folds, seed=seed, complete=True)


def logistic(
    acts: Activations,
    labels: Labels,
    groups: Labels | None = None,
    *,
    C: float = 0.01,
    model: Model | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Direction:
    """The weight of a logistic regression on standardised coordinates, back in the activations' own: it tells the classes apart, and need not
    be what writes them.

    C: inverse strength of the L2 penalty, above 0. The rest as `mean_difference`.
    """
    if not C > 0:
        raise ValueError(f"C={C}: the inverse strength of the penalty is above 0.")
    return _made(acts, labels, groups, _logistic(C), model=model, folds=folds, seed=seed)


def mass_mean(
    acts: Activations,
    labels: Labels,
    groups: Labels | None = None,
    *,
    whitened: bool = False,
    model: Model | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Direction:
    """The mass-mean direction: the difference of the classes' means or, `whitened`, its product with the inverse covariance within classes.

    whitened: best for telling rows of the same distribution apart; plain for rows of another one, and for steering. The rest as `mean_difference`.
    Source: Marks and Tegmark (2023), arXiv 2310.06824, section 5; the inverse is a pseudo-inverse that drops variances below 1e-3 of the largest.
    """
    method = _Method("mass mean, whitened", _whitened) if whitened else _MEAN._replace(name="mass mean")
    return _made(acts, labels, groups, method, model=model, folds=folds, seed=seed)


class _Method(NamedTuple):
    """How a direction is made from rows X ``[row, d]``, their classes y and groups g.

    pairs: 0 compares the classes as wholes; above, inside groups, of which at least so many must hold both.
    """

    name: str
    fit: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairs: int = 0

    def possible(self, y: Tensor, g: Tensor) -> bool:
        if not self.pairs:
            return bool(y.any()) and not bool(y.all())
        return len(np.intersect1d(g[y], g[~y])) >= self.pairs

    def gap(self, X: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return pair_differences(X, y, g).mean(dim=0) if self.pairs else _gap(X, y, g)


def pair_differences(
    X: Float[Tensor, "row d"], y: Bool[Tensor, " row"], g: Int[Tensor, " row"]
) -> Float[Tensor, "pair d"]:
    """For each group that has both classes the mean of its rows of class 1 less that of its rows of class 0, fp64, in the groups' order."""
    count = int(g.max()) + 1
    cell = y.long() * count + g
    sums = torch.zeros(2 * count, X.shape[1], dtype=torch.float64).index_add_(0, cell, X.double())
    rows = torch.bincount(cell, minlength=2 * count)
    both = (rows.view(2, count) > 0).all(dim=0)
    negative, positive = (sums / rows.clamp_min(1)[:, None]).view(2, count, -1)[:, both]
    return positive - negative


def _gap(X: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return X[y].mean(dim=0, dtype=torch.float64) - X[~y].mean(dim=0, dtype=torch.float64)


def _whitened(X: Tensor, y: Tensor, g: Tensor) -> Tensor:
    inside = X.to(torch.float64, copy=True)
    for side in (y, ~y):
        inside[side] -= inside[side].mean(dim=0)
    covariance = inside.T @ inside / len(X)
    return torch.linalg.pinv(covariance, rtol=1e-3, hermitian=True) @ _gap(X, y, g)


def _pca(seed: int) -> _Method:
    def fit(X: Tensor, y: Tensor, g: Tensor) -> Tensor:
        differences = pair_differences(X, y, g)
        count = len(differences)
        turned = torch.from_numpy(np.random.default_rng(seed).permutation(count) % 2 * 2 - 1)
        either = differences * turned[:, None]
        component = principal_subspace(either - either.mean(dim=0), 1, side="in")[:, 0].double()
        return component if component @ differences.mean(dim=0) >= 0 else -component

    return _Method("PCA of differences", fit, pairs=3)


def _logistic(C: float) -> _Method:
    def fit(X: Tensor, y: Tensor, g: Tensor) -> Tensor:
        from sklearn.linear_model import LogisticRegression

        rows = X.double().numpy()
        spread = rows.std(axis=0)
        spread[spread == 0] = 1.0
        found = LogisticRegression(C=C, max_iter=1000).fit((rows - rows.mean(axis=0)) / spread, y.numpy())
        return torch.from_numpy(found.coef_[0] / spread)

    return _Method("logistic", fit)


_MEAN = _Method("mean difference", _gap)
_PAIRS = _Method("contrast pairs", lambda X, y, g: pair_differences(X, y, g).mean(dim=0), pairs=1)


def _made(
    acts: Activations,
    labels: Labels,
    groups: Labels | None,
    method: _Method,
    *,
    model: Model | None,
    folds: int,
    seed: int,
    complete: bool = False,
    **about: Any,
) -> Direction:
    y, g, rows = _classes(acts, labels, groups)
    _require_classes(y, g, method, complete)
    fold = torch.from_numpy(deal(g.numpy(), y.numpy(), folds=folds, seed=seed)) if g.max() > 0 else None
    half = torch.from_numpy(deal(g.numpy(), y.numpy(), folds=2, seed=seed)) if g.max() > 0 else None
    vectors: dict[Site, Tensor] = {}
    norms: dict[Site, float] = {}
    scores: dict[Site, Estimate] = {}
    halves: dict[Site, float] = {}
    for site, values in acts.values.items():
        X = values[rows]
        if not torch.isfinite(X).all():
            raise ValueError(
                f"The activations at {site} hold NaN or infinite values: no direction can be taken from them."
            )
        gap = method.gap(X, y, g)
        if gap.norm() <= _NOISE * X.norm(dim=1).mean():
            continue
        found = method.fit(X, y, g)
        vectors[site] = (found / found.norm()).float()
        norms[site] = float(gap @ (found / found.norm()))
        scores[site] = _held_out(X, y, g, fold, method, seed)
        halves[site] = _agreement(X, y, g, half, method)
    if not vectors:
        raise ValueError("The two classes have the same mean at every site: there is no direction between them.")
    said: dict[str, Any] = {"method": method.name, "over": list(acts.over), "seed": seed, "folds": folds} | about
    said["counts"] = {"rows": len(y), "groups": int(g.max()) + 1, "positive": int(y.sum())} | about.get("counts", {})
    if left := [str(site) for site in acts.values if site not in vectors]:
        said["without_difference"] = left
    if model is not None:
        said["model"] = fingerprint(model)
    return Direction(vectors, norms, said, scores, halves)


def _classes(
    acts: Activations, labels: Labels, groups: Labels | None
) -> tuple[Bool[Tensor, " row"], Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Class and group of the rows that have a label, and which rows they are."""
    given = per_row(acts, labels, "labels")
    kept = [i for i, label in enumerate(given) if label is not None and label == label]
    wrong = sorted({str(given[i]) for i in kept if given[i] not in (0, 1)})
    if wrong:
        raise ValueError(f"Labels are 1 or 0 (None leaves a row out); these hold {', '.join(wrong[:5])}.")
    names = acts.transcript.tolist() if groups is None else per_row(acts, groups, "groups")
    if not kept:
        raise ValueError("No row has a label: nothing is left to take a direction from.")
    g = torch.from_numpy(units([names[i] for i in kept]))
    return torch.tensor([bool(given[i]) for i in kept]), g, torch.tensor(kept)


def per_row(acts: Activations, given: Labels, what: str) -> list[Any]:
    """What was given a row, or a transcript, as one a row. Raises ValueError where it is neither."""
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    if len(values) == len(acts):
        return values
    if len(values) <= int(acts.transcript.max()):
        raise ValueError(
            f"{len(values)} {what} for {len(acts)} rows of {int(acts.transcript.max()) + 1} transcripts: give one a row or one a transcript."
        )
    return [values[i] for i in acts.transcript.tolist()]


def _require_classes(y: Tensor, g: Tensor, method: _Method, complete: bool) -> None:
    if y.all() or not y.any():
        raise ValueError(
            f"All {len(y)} labelled rows have label {int(y[0])}: a direction lies between two classes, so rows of both are needed."
        )
    if complete:
        lacking = np.setxor1d(g[y], g[~y])
        if len(lacking):
            raise ValueError(
                f"{len(lacking)} of {int(g.max()) + 1} groups have rows of one label only: a pair needs both. Leave these rows out with the label None."
            )
    if not method.possible(y, g):
        pairs = len(np.intersect1d(g[y], g[~y]))
        raise ValueError(f"{method.name} needs at least {method.pairs} groups with rows of both labels; {pairs} have.")


def _held_out(X: Tensor, y: Tensor, g: Tensor, fold: Tensor | None, method: _Method, seed: int) -> Estimate:
    """AUC of each row's projection on the direction of the folds it is not in; rows are compared inside a fold, or a pair."""
    what = "held-out AUC inside pairs" if method.pairs else "held-out AUC inside folds"
    if fold is None:
        return no_interval(math.nan, 1, f"{what}, one group only")
    scores = torch.full((len(y),), math.nan, dtype=torch.float64)
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        if method.possible(y[train], g[train]):
            found = method.fit(X[train], y[train], g[train])
            scores[test] = X[test].double() @ (found / found.norm())
    strata = g if method.pairs else fold
    count = int(fold.max()) + 1
    return auc_score(scores.numpy(), y.numpy(), g.numpy(), strata.numpy(), folds=count, seed=seed, what=what)


def _agreement(X: Tensor, y: Tensor, g: Tensor, half: Tensor | None, method: _Method) -> float:
    if half is None or not all(method.possible(y[half == k], g[half == k]) for k in (0, 1)):
        return math.nan
    return _cosine(*(method.fit(X[half == k], y[half == k], g[half == k]) for k in (0, 1)))


# --- the length of the thinking -------------------------------------------------------------------------------------------------


class Length(NamedTuple):
    """How long a span is, in tokens; censored where the generation was cut off inside it, so that it would have been longer."""

    tokens: int
    censored: bool


def span_lengths(runs: Sequence[Transcript], of: str = "thinking", over: str | None = None) -> list[Length | None]:
    """The length of a span in each run; None where the run has no such span: it is missing, not of length 0.

    over: the part that is read (``"thinking[:16]"``), where a run without a token of it is missing too.
    """
    found: list[Length | None] = []
    for run in runs:
        if of not in run.spans or (over is not None and not positions(run, over)):
            found.append(None)
            continue
        begin, end = run.spans[of]
        found.append(Length(end - begin, not run.finished and end == len(run.ids)))
    return found


def longest_and_shortest(
    lengths: Sequence[Length | None], questions: Sequence[Any], share: float = 0.25
) -> list[int | None]:
    """1 for the longest of a question's answers, 0 for its shortest, None for the rest.

    share: of a question's answers on either side, in (0, 0.5]; at least one, and so few that each long one is longer than each
           short one. A censored answer is known to be at least as long as what was seen of it: it may be long, never short.
    """
    if not 0 < share <= 0.5:
        raise ValueError(
            f"share={share}: the share of a question's answers on either side lies above 0 and at most at 0.5."
        )
    labels: list[int | None] = [None] * len(lengths)
    members: dict[Any, list[int]] = {}
    for i, (length, question) in enumerate(zip(lengths, questions, strict=True)):
        if length is not None:
            members.setdefault(question, []).append(i)
    for mine in members.values():
        known = {i: length for i in mine if (length := lengths[i]) is not None}
        short = sorted((i for i, length in known.items() if not length.censored), key=lambda i: known[i].tokens)
        long = sorted(known, key=lambda i: -known[i].tokens)
        for count in range(max(1, int(share * len(mine))), 0, -1):
            if short[count - 1 :] and known[long[count - 1]].tokens > known[short[count - 1]].tokens:
                labels = [
                    1 if i in long[:count] else 0 if i in short[:count] else label for i, label in enumerate(labels)
                ]
                break
    return labels


def by_thresholds(lengths: Sequence[Length | None], short: int = 100, long: int = 1000) -> list[int | None]:
    """1 for answers of more than `long` tokens, 0 for those of fewer than `short`, None for the rest. A censored answer is never short."""
    if not 0 < short <= long:
        raise ValueError(
            f"short={short}, long={long}: the thresholds are lengths in tokens, the short one at most the long one."
        )

    def label(length: Length | None) -> int | None:
        if length is None:
            return None
        return 1 if length.tokens > long else 0 if length.tokens < short and not length.censored else None

    return [label(length) for length in lengths]


def length_direction(
    model: Model,
    runs: Sequence[Transcript],
    *,
    at: Patterns = "*.mid",
    over: str = "thinking",
    of: str | None = None,
    how: How = "paired",
    share: float = 0.25,
    short: int = 100,
    long: int = 1000,
    folds: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> Direction:
    """The direction from short to long thinking: mean activations over a span, long answers' less short ones'.

    runs: answers the model gave; several samples a question for ``how="paired"``.
    over: what is read, averaged within an answer: a span, or a part of one (``"thinking[:16]"``).
    of:   the span whose length counts, in tokens; by default the one that is read (sentences are of the thinking). A model without
          think markers has ``"answer"`` (``"completion"`` counts the end-of-sequence token too, which only answers that ended have, and which would
          then be the direction).
    how:  ``"paired"`` compares, inside each question, its longest with its shortest answers (`longest_and_shortest`, with `share`) and
          averages over questions, so that neither easy questions nor topics count. ``"thresholds"`` is the published recipe: answers of
          under `short` and over `long` tokens, whatever their questions, read one token early.
    Means over answers of different length also differ in how late their tokens come: ``over="thinking[:16]"`` reads all answers at the same
    places. An answer cut off inside the span is never counted short; one without the span, or without the part of it that is read, is
    missing. Questions for the direction, for heads and for judging should be disjoint: that is the caller's part. The AUC of each site is held out by
    question.

    Raises ValueError where no run has the span, where every answer is cut off, where no question has a longer and a shorter answer, and
    where a class is empty.
    Source: ThinkEdit, arXiv 2503.22048, sections 3.1 and 4.
    Differs: pairs by default; fp32; a missing think block is missing rather than of length -1; ``"thresholds"`` counts from our thinking
    span, which begins after the opening marker, so that the token read early is the marker's last.
    """
    name = parse_span(over)[0]
    of = of or ("thinking" if name == "sentence" else name)
    lengths = span_lengths(runs, of)
    _require_lengths(runs, lengths, of)
    lengths = span_lengths(runs, of, over)
    _require_lengths(runs, lengths, over)
    questions = [run.question for run in runs]
    match how:
        case "paired":
            labels, method = longest_and_shortest(lengths, questions, share), _PAIRS
            settings: dict[str, Any] = {"share": share}
        case "thresholds":
            labels, method = by_thresholds(lengths, short, long), _MEAN
            if over != of:
                raise ValueError(f"over={over!r}: thresholds are read over a whole span, such as {of}.")
            settings = {"short": short, "long": long}
        case _:
            raise ValueError(f"how={how!r}: choose paired or thresholds.")
    _require_both(labels, lengths, how, short, long)
    chosen = [i for i, label in enumerate(labels) if label is not None]
    read = [runs[i] if how == "paired" else one_early(runs[i], over) for i in chosen]
    window = over if how == "paired" else ONE_EARLY
    acts = collect(model, read, at=at, over=window, pool="mean", batch_size=batch_size, progress=progress)
    mine = [labels[i] for i in chosen]
    tokens = [length.tokens for i in chosen if (length := lengths[i]) is not None]
    counts = {
        "runs": len(runs),
        "missing": sum(length is None for length in lengths),
        "censored": sum(length is not None and length.censored for length in lengths),
        "questions": len(set(questions)),
        "long": sum(label == 1 for label in mine),
        "short": sum(label == 0 for label in mine),
        "mean_tokens_long": float(np.mean([n for n, label in zip(tokens, mine, strict=True) if label == 1])),
        "mean_tokens_short": float(np.mean([n for n, label in zip(tokens, mine, strict=True) if label == 0])),
    }
    return _made(
        replace(acts, over=(over,)),
        mine,
        [questions[i] for i in chosen],
        method._replace(name=f"length, {how}"),
        model=model,
        folds=folds,
        seed=seed,
        of=of,
        counts=counts,
        family=model.anatomy.family,
        **settings,
    )


ONE_EARLY = "early"


def one_early(run: Transcript, over: str) -> Transcript:
    """The run with its span moved one token to the left, under a name of its own."""
    begin, end = run.require(over)
    return replace(run, spans={**run.spans, ONE_EARLY: (max(begin - 1, 0), max(end - 1, 1))})


def _require_lengths(runs: Sequence[Transcript], lengths: Sequence[Length | None], of: str) -> None:
    found = [length for length in lengths if length is not None]
    if not found:
        raise ValueError(f"{nobody_has(runs, of, 'runs')} A model without think markers is read over 'answer'.")
    if all(length.censored for length in found):
        raise ValueError(
            f"All {len(found)} answers were cut off before their {of} ended: none is known to be short. Generate with more tokens, "
            "--max-new-tokens (in Python max_new_tokens)."
        )


def _require_both(
    labels: Sequence[int | None], lengths: Sequence[Length | None], how: How, short: int, long: int
) -> None:
    if {0, 1} <= set(labels):
        return
    tokens = [length.tokens for length in lengths if length is not None]
    spread = f"the {len(tokens)} lengths run from {min(tokens)} to {max(tokens)} tokens"
    if how == "paired":
        raise ValueError(
            f"No question has two answers of which one is known to be longer ({spread}). Generate several samples a question, at a temperature above 0."
        )
    lacking = f"short (under {short} tokens, not cut off)" if 0 not in labels else f"long (over {long} tokens)"
    raise ValueError(f"No answer is {lacking}; {spread}. Choose thresholds that fit, or how='paired'.")


def _cosine(u: Tensor, v: Tensor) -> float:
    if u.shape != v.shape:
        return math.nan
    return float((u.double() @ v.double()) / (u.double().norm() * v.double().norm()))
