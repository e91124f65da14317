"""Erasing a concept from activations by the smallest affine change after which no linear probe can tell anything of it.

For rows x and labels z with covariances S_xx and S_xz, the eraser is ``r(x) = x - W⁺ P W (x - mean)``, where W is the inverse square root of
S_xx and P projects onto the columns of ``W S_xz``. It is exact on the rows it was fitted to, and only there: `check` says what is left on others.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.accumulators import CrossMoments, Moments
from probes.activations import Activations, stream
from probes.directions import Labels, per_row
from probes.estimates import Estimate
from probes.held_out import auc_score, deal, units
from probes.results import reading
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.sites import Patterns, Site
from surgery.tensorfile import save_whole
from surgery.transcript import Transcript
from surgery.whole import write_whole

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "eraser 1"
TOLERANCE = 1e-12  # variances below this share of the largest are rounding: nothing is there to be erased


@dataclass(frozen=True, eq=False)
class Eraser:
    """``x - left (right (x - mean))``, an affine projection of rank k.

    mean: ``[d]``; left: ``[d, k]``; right: ``[k, d]``; ``right @ left`` is the identity, so that erasing twice is erasing once. fp32.
    """

    mean: Float[Tensor, " d"]
    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"]

    @property
    def rank(self) -> int:
        """How many dimensions are taken out."""
        return self.left.shape[1]

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The rows without the concept, computed in fp32, in the dtype they came in. Raises ValueError for another width."""
        if x.shape[-1] != len(self.mean):
            raise ValueError(f"This eraser is for activations of width {len(self.mean)}; these have {x.shape[-1]}.")
        mean, left, right = (t.to(x.device) for t in (self.mean, self.left, self.right))
        wide = x.float()
        return (wide - (wide - mean) @ right.T @ left.T).to(x.dtype)


def eraser(x: Moments, cross: CrossMoments, *, tolerance: float = TOLERANCE) -> Eraser:
    """The eraser of the concept z from x, from streamed moments of the same rows.

    x:         of the activations. cross: of the activations with the labels, a column for each class (or number).
    tolerance: directions with less than this share of the largest variance, in [0, 1), are taken to be constant.
    Raises ValueError where the moments are of different rows, and where x and z do not vary together at all: nothing is to be erased.
    Source: Belrose et al. (2023), arXiv 2306.03819, theorem 4.3 (LEACE).
    Differs: the rank is that of ``W S_xz`` to rounding, where the released code drops singular values below 0.01; covariances are not shrunk.
    """
    if x.count != cross.count or len(x.mean) != len(cross.mean_x):
        raise ValueError(
            f"The activations' moments are of {x.count} rows of width {len(x.mean)}, the labels' of {cross.count} of width {len(cross.mean_x)}: "
            "both must come from the same rows."
        )
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: a share of the largest variance, in [0, 1).")
    values, axes = torch.linalg.eigh(x.covariance(ddof=0))
    live = values > tolerance * values[-1].clamp_min(0)
    if not live.any():
        raise ValueError("The activations do not vary: there is nothing to erase from.")
    root, axes = values[live].sqrt(), axes[:, live]
    whitened = (axes.T @ cross.covariance(ddof=0)) / root[:, None]  # W S_xz, in the principal axes
    span, strength, _ = torch.linalg.svd(whitened, full_matrices=False)
    # in the labels' units alone: the column of a class is at most as long as its standard deviation, a half
    scale = whitened.norm()
    kept = strength > 1e-7 * scale
    if scale <= 1e-12:
        raise ValueError("The activations and the labels do not vary together: there is nothing to erase.")
    span = span[:, kept]
    left, right = axes @ (root[:, None] * span), (axes / root) @ span
    return Eraser(x.mean.float().cpu(), left.float().cpu(), right.T.contiguous().float().cpu())


@dataclass(frozen=True, eq=False, repr=False)
class Erasers(Mapping[Site, Eraser]):
    """An eraser at each of some sites.

    at:    site -> `Eraser`, each fitted to the streams as they are, not as erasers at earlier sites leave them.
    about: over, classes, rows, and the model's fingerprint.
    """

    at: Mapping[Site, Eraser]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: Site | str) -> Eraser:
        return self.at[Site.parse(key)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.at)

    def __len__(self) -> int:
        return len(self.at)

    def __call__(self, acts: Activations) -> Activations:
        """The activations with the concept erased at every site that has an eraser. Raises ValueError where none of their sites has one."""
        if not self.at.keys() & acts.values.keys():
            raise ValueError(
                f"The erasers are for {', '.join(map(str, self.at))}; the activations are at {', '.join(map(str, acts.values))}."
            )
        values = {site: self.at[site](v) if site in self.at else v for site, v in acts.values.items()}
        return Activations(values, acts.transcript, acts.position, acts.span, acts.over)

    def __repr__(self) -> str:
        sites = list(self.at)
        return f"<Erasers at {len(sites)} sites, {sites[0]} to {sites[-1]}, rank {self.at[sites[0]].rank}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors = {
            f"{site}.{name}": getattr(e, name) for site, e in self.at.items() for name in ("mean", "left", "right")
        }
        save_whole(path, tensors, {"format": _FORMAT, "about": json.dumps(dict(self.about))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Erasers:
        """What `save` wrote. Raises FileNotFoundError where there is no file, ValueError for a file of something else."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(
                f"There are no erasers at {path}: give the safetensors file that Erasers.save wrote."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if metadata.get("format") != _FORMAT:
                raise ValueError("it does not say that it holds some")
            parts: dict[Site, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                site, _, part = name.rpartition(".")
                parts.setdefault(Site.parse(site), {})[part] = tensor
            at = {site: Eraser(**found) for site, found in sorted(parts.items())}
            return cls(at, json.loads(metadata["about"]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no erasers: {error}") from error


def leace(acts: Activations, labels: Labels, *, tolerance: float = TOLERANCE) -> Erasers:
    """Erasers of a concept at every site of some activations.

    labels: the class of each row, or transcript where there are not as many as rows: any names; None leaves it out.
    Raises ValueError for one class only, and as `eraser` does.
    """
    given = per_row(acts, labels, "labels")
    kept = torch.tensor([i for i, label in enumerate(given) if label is not None and label == label], dtype=torch.long)
    z, names = _one_hot([given[i] for i in kept.tolist()])
    at = {
        site: eraser(Moments.of(rows[kept]), CrossMoments.of(rows[kept], z), tolerance=tolerance)
        for site, rows in acts.values.items()
    }
    return Erasers(at, {"over": list(acts.over), "classes": names, "rows": len(kept)})


def leace_streamed(
    model: Model,
    transcripts: Sequence[Transcript],
    labels: Sequence[Any],
    *,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = "completion",
    tolerance: float = TOLERANCE,
    batch_size: int = 16,
    progress: bool = False,
) -> Erasers:
    """`leace` on every token of some spans, from one pass that keeps moments and no rows: O(d²) memory a site, however many tokens.

    labels: the class of each transcript; None leaves it out.
    """
    if len(labels) != len(transcripts):
        raise ValueError(f"{len(transcripts)} transcripts, {len(labels)} labels: give one label a transcript.")
    kept = [i for i, label in enumerate(labels) if label is not None and label == label]
    z, names = _one_hot([labels[i] for i in kept])
    own: dict[Site, Moments] = {}
    cross: dict[Site, CrossMoments] = {}
    batches = stream(model, [transcripts[i] for i in kept], at=at, over=over, batch_size=batch_size, progress=progress)
    for batch in batches:
        classes = z[batch.transcript]
        for site, rows in batch.values.items():
            own.setdefault(site, Moments.empty(rows.shape[1])).add_(rows)
            cross.setdefault(site, CrossMoments.empty(rows.shape[1], z.shape[1])).add_(rows, classes)
    erasers = {site: eraser(own[site], cross[site], tolerance=tolerance) for site in own}
    spans = [over] if isinstance(over, str) else list(over)
    rows = next(iter(own.values())).count
    return Erasers(erasers, {"over": spans, "classes": names, "rows": rows, "model": fingerprint(model)})


def _one_hot(labels: Sequence[Any]) -> tuple[Float[Tensor, "row classes"], list[str]]:
    names, z = np.unique([str(label) for label in labels], return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"All {len(labels)} labelled rows are of one class: a concept has at least two.")
    return torch.nn.functional.one_hot(torch.from_numpy(z)).float(), names.tolist()


# --- what is left ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """What a logistic probe finds at a site, before and after erasing.

    told_before, told_after: nats a row that an unpenalised probe, fitted to and judged on the very rows, says more than the classes' shares
                 do. After erasing it is 0 but for rounding: this is the guarantee.
    before, after: held-out AUC of a penalised probe where eraser and probe were fitted on the other folds. 0.5 is chance.
    moved:       mean length of what erasing took away, as a share of the rows' spread about their mean.
    """

    site: str
    told_before: float
    told_after: float
    before: Estimate
    after: Estimate
    moved: float


@dataclass(frozen=True)
class Erased:
    """What `check` found."""

    rows: tuple[Left, ...]

    def frame(self) -> pd.DataFrame:
        """One row a site: told_before, told_after, before, after (with low and high), n, moved."""
        import pandas as pd

        made = []
        for row in self.rows:
            made.append(
                {"site": row.site, "told_before": row.told_before, "told_after": row.told_after}
                | {"before": row.before.value, "before_low": row.before.low, "before_high": row.before.high}
                | {"after": row.after.value, "after_low": row.after.low, "after_high": row.after.high}
                | {"n": row.after.n, "moved": row.moved}
            )
        return pd.DataFrame(made)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Erased:
        """What `save` wrote. Raises ValueError for a file of something else."""
        scores = ("before", "after")
        with reading(path, cls) as found:
            rows = found["rows"]
            return cls(
                tuple(Left(**{**row, **{k: Estimate(**{"seed": None, **row[k]}) for k in scores}}) for row in rows)
            )

    def _repr_html_(self) -> str:
        return self.frame().to_html(max_rows=24, float_format="%.4g", index=False)


def check(
    acts: Activations, labels: Labels, groups: Labels, *, folds: int = 5, C: float = 0.01, seed: int = 0
) -> Erased:
    """Erase two classes from activations and probe for them: on the same rows, where nothing may be left, and on held-out groups.

    labels: 1 or 0 a row or transcript, None leaves it out. groups: kept whole in one fold.
    C: inverse strength of the held-out probes' penalty, above 0.
    Held-out rows are another sample: their classes' means differ by chance after erasing, and by what the eraser could not learn. An AUC after
    erasing far *below* 0.5 is the sign of a fold's means leaning the other way, and no trace of the concept.
    """
    if not C > 0:
        raise ValueError(f"C={C}: the inverse strength of the penalty is above 0.")
    given, names = per_row(acts, labels, "labels"), per_row(acts, groups, "groups")
    kept = [i for i, label in enumerate(given) if label is not None and label == label]
    y = np.array([given[i] for i in kept], dtype=float)
    if set(y) - {0.0, 1.0} or len(set(y)) < 2:
        raise ValueError(f"The check is of two classes, labelled 1 and 0; these labels hold {sorted(set(y))[:5]}.")
    y, g = y.astype(bool), units([names[i] for i in kept])
    fold = deal(g, y, folds=folds, seed=seed)
    rows = []
    for site, values in acts.values.items():
        X = values[kept].float()
        gone = _fitted(X, y)(X)
        before, after = _held_out(X, y, fold, C)
        moved = float((X - gone).norm(dim=1).mean() / (X - X.mean(dim=0)).norm(dim=1).mean())
        scores = [
            auc_score(s, y, g, fold, folds=int(fold.max()) + 1, seed=seed, what="held-out AUC inside folds")
            for s in (before, after)
        ]
        rows.append(Left(str(site), told(X, y), told(gone, y), scores[0], scores[1], moved))
    return Erased(tuple(rows))


def told(X: Float[Tensor, "row d"], y: np.ndarray) -> float:
    """Nats a row that the best linear probe says about y beyond the classes' shares, on the rows it is fitted to; 0 or more.

    At most the classes' entropy, which it reaches where a hyperplane separates them. An unpenalised logistic regression, by Newton's method on the
    rows' principal axes; directions with less than 1e-10 of the largest variance are dropped as rounding.
    """
    rows = X.double() - X.double().mean(dim=0)
    values, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    live = values > 1e-10 * values[-1]
    Z = torch.cat([rows @ (axes[:, live] / values[live].sqrt()), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    target = torch.from_numpy(y).double()
    w = torch.zeros(Z.shape[1], dtype=torch.float64)
    share = float(target.mean())
    w[-1] = math.log(share / (1 - share))
    entropy = best = float(_nats(Z @ w, target))
    for _ in range(50):
        p = torch.sigmoid(Z @ w)
        slope = Z.T @ (target - p) / len(Z)
        curve = (Z * (p * (1 - p))[:, None]).T @ Z / len(Z)
        step = torch.linalg.solve(curve + 1e-12 * torch.eye(len(w), dtype=torch.float64), slope)
        scale = 1.0
        while scale > 1e-6 and _nats(Z @ (w + scale * step), target) > best:
            scale /= 2
        w = w + scale * step
        now = float(_nats(Z @ w, target))
        if best - now < 1e-12:
            break
        best = now
    return entropy - best


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)


def _fitted(X: Tensor, y: np.ndarray) -> Eraser:
    z, _ = _one_hot(y.tolist())
    return eraser(Moments.of(X), CrossMoments.of(X, z))


def _held_out(X: Tensor, y: np.ndarray, fold: np.ndarray, C: float) -> tuple[np.ndarray, np.ndarray]:
    """Each row's score by a probe of the other folds, with the activations as they are and as an eraser of the other folds leaves them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.full((2, len(y)), math.nan)
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        if y[train].all() or not y[train].any():
            continue
        erase = _fitted(X[train], y[train])
        for side, (seen, unseen) in enumerate(((X[train], X[test]), (erase(X[train]), erase(X[test])))):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
            scores[side, test] = probe.fit(seen.numpy(), y[train]).decision_function(unseen.numpy())
    return scores[0], scores[1]
