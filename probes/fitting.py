"""Fits on some rows that predict others; the strength of the penalty is chosen on folds inside the rows they learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.held_out import deal, units
from surgery.numbers import require_whole
from surgery.sites import Site

Kind = Literal["classes", "number"]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, 1 / alpha of the ridge
INNER = 3  # folds inside the training folds on which the penalty is chosen
BINS = 10  # of the span's length, inside which pairs are of about equal length
_DONE = 1e-4  # the gradient, of a mean loss in nats, at which a fit is done: at 1e-3 another penalty seems the best now and then


@dataclass(frozen=True)
class Settings:
    """How probes are fitted and judged. Raises ValueError for what means nothing."""

    kind: Kind
    components: int | None
    shuffles: int
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: choose classes or number.")
        if self.components is not None:
            require_whole("components", self.components, 1)
        require_whole("shuffles", self.shuffles, 0)
        require_whole("draws", self.draws, 1)
        require_whole("seed", self.seed, 0)


def select(X: np.ndarray, y: np.ndarray, g: np.ndarray, settings: Settings) -> tuple[float, float]:
    """The smallest validation loss a row over the penalties, on folds inside these rows, and its penalty; NaN and the middle one where no fold
    leaves rows to learn from."""
    nothing = math.nan, PENALTIES[len(PENALTIES) // 2]
    g = units(g)
    if g.max() < 1:
        return nothing
    fold = deal(g, y, folds=INNER, seed=settings.seed)
    total, judged = np.zeros(len(PENALTIES)), 0
    for k in range(int(fold.max()) + 1):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if y[train].min() == y[train].max():
            continue
        for i, predicted in enumerate(fit_path(X, y, train, test, PENALTIES, settings)):
            total[i] += loss(predicted, y[test], settings.kind).sum()
        judged += len(test)
    best = int(total.argmin())
    return (float(total[best] / judged), PENALTIES[best]) if judged else nothing


def fit_path(
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    penalties: Sequence[float],
    settings: Settings,
) -> list[np.ndarray]:
    """Predictions on `test` of probes fitted on `train`, one for each inverse strength, each begun where the one before ended."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps: list[Any] = [StandardScaler()]
    if settings.components is not None:
        most = min(settings.components, len(train) - 1, X.shape[1])
        steps.append(
            PCA(most, svd_solver="covariance_eigh" if X.shape[1] < 2000 else "randomized", random_state=settings.seed)
        )
    prepare = make_pipeline(*steps)
    with np.errstate(
        invalid="ignore"
    ):  # the share of variance explained is 0/0 where all rows are one token's embedding
        rows, unseen = prepare.fit_transform(X[train]), prepare.transform(X[test])
    if settings.kind == "number":
        return [Ridge(alpha=1 / c).fit(rows, y[train]).predict(unseen) for c in penalties]
    regression = LogisticRegression(warm_start=True, max_iter=2000, tol=_DONE)
    return [regression.set_params(C=c).fit(rows, y[train]).predict_proba(unseen)[:, 1] for c in penalties]


def loss(predicted: np.ndarray, y: np.ndarray, kind: Kind) -> np.ndarray:
    """Of each row: nats, or the squared error."""
    if kind == "number":
        return (predicted - y) ** 2
    said = np.where(y, predicted, 1 - predicted)
    return -np.log(np.clip(said, 1e-12, None))


@dataclass(frozen=True, eq=False)
class Crossed:
    """Each row's probability of class 1 by a probe that saw no row of its fold, and the site and penalty chosen in each fold.

    A fold whose training rows are all of one class chose nothing and says their mean.
    """

    predicted: Float[np.ndarray, " row"]
    chosen: tuple[tuple[Site, float] | None, ...]

    @property
    def site(self) -> Site:
        """The site chosen in most folds."""
        sites = [pair[0] for pair in self.chosen if pair]
        return max(dict.fromkeys(sites), key=sites.count)


def crossed(
    values: Mapping[Site, Float[np.ndarray, "row d"]],
    y: Bool[np.ndarray, " row"],
    g: Int[np.ndarray, " row"],
    fold: Int[np.ndarray, " row"],
    settings: Settings,
    *,
    learn: Bool[np.ndarray, " row"] | None = None,
    chosen: Sequence[tuple[Site, float] | None] | None = None,
) -> Crossed:
    """Fit on the rows of all folds but one that `learn` keeps (by default all), predict every row of that one; site and penalty are those of the
    smallest validation loss inside the training rows, or as given."""
    learn = np.ones(len(y), dtype=bool) if learn is None else learn
    predicted, found = np.empty(len(y)), []
    for k in range(int(fold.max()) + 1):
        train, test = np.flatnonzero(learn & (fold != k)), np.flatnonzero(fold == k)
        if y[train].min() == y[train].max():
            predicted[test] = y[train].mean()
            found.append(None)
            continue
        best = chosen[k] if chosen is not None else None
        if best is None:
            tried = {site: select(X[train], y[train], g[train], settings) for site, X in values.items()}
            site = min(tried, key=lambda s: tried[s][0])
            best = site, tried[site][1]
        (predicted[test],) = fit_path(values[best[0]], y, train, test, best[1:], settings)
        found.append(best)
    return Crossed(predicted, tuple(found))


def length_bins(tokens: Float[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """For each row the bin of its length, among at most `BINS` that hold about as many rows each."""
    cuts = np.unique(np.quantile(tokens, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.searchsorted(cuts, tokens, side="right")


def of_length(tokens: Float[np.ndarray, " row"]) -> Float[np.ndarray, "row 2"]:
    """What a probe sees that is told the length alone: it, and its logarithm."""
    return np.stack([tokens, np.log1p(tokens)], axis=1)
