"""Geometry of a change: how many weights moved, which, and what that did to each matrix's spectrum and principal subspaces.

Three sets of entries of a matrix are asked about:

principal  the `density` fraction that is largest after rank reduction: what LIFT trains
low        the `density` fraction of smallest magnitude
the moved  entries that changed in float32; that changed once both models are stored in bf16; and, where everything
           changed, the `density` fraction that changed most ("largest")

Chance is the density: a change that has nothing to do with a set has that share of its moved entries, and of its energy, in
it. ``enrichment`` is the share divided by chance: 1 is indifferent, 1 / density is all of it.

`finetune.movement` has the few of these numbers that a training loop has time for, and an estimate of the stable rank.

Almost every spectral number grows with the size of the change: compare changes beside their ``norm_ratio``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.statistics import bootstrap
from finetune.lift import budget, principal_indices
from finetune.movement import energy_share, stored_change
from surgery.linalg import each_matrix, principal_angles, singular_system, singular_values
from surgery.sites import Patterns, Site, match
from surgery.weights import Delta, Weights, linear_sites
from surgery.whole import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Decomposition:
    """What a base matrix contributes to the geometry of any change of it: computed once, used for every arm.

    spectrum    all singular values, largest first
    U, V        orthonormal columns spanning its top-k left and right singular subspaces
    principal   flat positions of its principal entries, ascending
    low         flat positions of its smallest entries, as many
    """

    W: Float[Tensor, "out in"]
    spectrum: Float[Tensor, " short"]
    U: Float[Tensor, "out k"]
    V: Float[Tensor, "in k"]
    principal: Int[Tensor, " count"]
    low: Int[Tensor, " count"]


def decompose(W: Float[Tensor, "out in"], *, density: float = 0.05, filter_rank: int = 16, k: int = 8) -> Decomposition:
    """Decompose a base matrix.

    density      fraction of the entries in each set, in (0, 1]
    filter_rank  rank of the reduction that decides which entries are principal
    k            dimension of the principal subspaces; at most the matrix's short side is taken
    """
    count = budget(W.shape, density)
    spectrum, U, V = singular_system(W, min(k, *W.shape))
    # ties (many in bf16) go to the lowest positions
    low = W.detach().float().abs().flatten().argsort(stable=True)[:count].sort().values
    return Decomposition(W.float(), spectrum, U, V, principal_indices(W, filter_rank, count).long(), low)


@dataclass(frozen=True)
class Change:
    """One matrix's change, in numbers without units unless said. NaN where a ratio has nothing to divide by.

    entries              of the matrix
    density              fraction of them in each set: the share that chance gives, of entries and of energy
    changed              fraction that differ in float32, 0 to 1
    changed_stored       fraction that still differ when both are rounded to bf16
    energy_*             share of ||dW||_F^2 on the set, 0 to 1; energy_stored_* of the change left after rounding
    overlap_changed_*    share of the entries that changed in float32 that are in the set
    overlap_stored_*     likewise for those that changed as stored
    overlap_largest_*    likewise for the `density` fraction that changed most
    norm_ratio           ||dW||_F / ||W||_F
    spectral_ratio       ||dW||_2 / ||W||_2
    effective_rank       exp of the entropy of the singular values of dW over their sum: 1 to the short side (0: no change)
    stable_rank          ||dW||_F^2 / ||dW||_2^2: 1 to the short side (0: no change)
    spectral_drift       ||s(W + dW) - s(W)||_2 / ||s(W)||_2 over all singular values
    angle_u_*, angle_v_* degrees, 0 to 90, between the top-k left (right) singular subspaces before and after
    gap                  (s_k - s_{k+1}) / s_k of the base: where it is near 0, the angles mean nothing (1: there is no s_{k+1})

    Source: Liu et al. (2025), arXiv 2511.08567, for the stored update, spectral drift and rotation; principal entries from
    arXiv 2506.00772; effective rank: Roy and Vetterli (2007), with p_i = s_i / sum(s).
    Differs: "stored" compares bf16 values exactly, where the paper takes a relative tolerance of 1e-3 that amounts to it.
    """

    entries: int
    density: float
    changed: float
    changed_stored: float
    energy_principal: float
    energy_low: float
    energy_stored_principal: float
    energy_stored_low: float
    overlap_changed_principal: float
    overlap_changed_low: float
    overlap_stored_principal: float
    overlap_stored_low: float
    overlap_largest_principal: float
    overlap_largest_low: float
    norm_ratio: float
    spectral_ratio: float
    effective_rank: float
    stable_rank: float
    spectral_drift: float
    angle_u_mean: float
    angle_u_max: float
    angle_v_mean: float
    angle_v_max: float
    gap: float


def change(base: Decomposition, W: Float[Tensor, "out in"]) -> Change:
    """The geometry of going from a decomposed base matrix to ``W``.

    Errors: ValueError for another shape.
    """
    if W.shape != base.W.shape:
        raise ValueError(f"a {tuple(base.W.shape)} matrix cannot have changed into a {tuple(W.shape)} one")
    W = W.detach().float()
    moved = (W - base.W).flatten()
    stored = stored_change(base.W, W).flatten()
    count, k = len(base.principal), base.V.shape[1]
    largest = torch.zeros(len(moved), dtype=torch.bool)
    largest[moved.abs().topk(count).indices] = True
    largest &= moved != 0  # fewer entries than that may have moved
    sets = {"principal": base.principal, "low": base.low}
    shares = {
        **{f"energy_{name}": energy_share(moved, at) for name, at in sets.items()},
        **{f"energy_stored_{name}": energy_share(stored, at) for name, at in sets.items()},
        **{f"overlap_changed_{name}": _share(moved != 0, at) for name, at in sets.items()},
        **{f"overlap_stored_{name}": _share(stored != 0, at) for name, at in sets.items()},
        **{f"overlap_largest_{name}": _share(largest, at) for name, at in sets.items()},
    }
    s = base.spectrum
    size, length = float(moved.double().square().sum()), float(s.square().sum().sqrt())
    ranks = {"spectral_ratio": 0.0, "effective_rank": 0.0, "stable_rank": 0.0, "spectral_drift": 0.0}
    turned = [torch.zeros(1)] * 2
    if size:
        d = singular_values(moved.view_as(W))
        p = d / d.sum()
        after, *subspaces = singular_system(W, k)
        ranks = {
            "spectral_ratio": _ratio(float(d[0]), float(s[0])),
            "effective_rank": float(torch.special.entr(p).sum().exp()),
            "stable_rank": size / float(d[0]) ** 2,
            "spectral_drift": _ratio(float((after - s).norm()), length),
        }
        pairs = zip((base.U, base.V), subspaces, strict=True)
        turned = [torch.rad2deg(principal_angles(before, after)) for before, after in pairs]
    rotation = {f"angle_{side}_mean": float(t.mean()) for side, t in zip("uv", turned, strict=True)}
    rotation |= {f"angle_{side}_max": float(t.max()) for side, t in zip("uv", turned, strict=True)}
    return Change(
        entries=len(moved),
        density=count / len(moved),
        changed=float((moved != 0).double().mean()),
        changed_stored=float((stored != 0).double().mean()),
        norm_ratio=_ratio(math.sqrt(size), length),
        gap=_ratio(float(s[k - 1] - s[k]), float(s[k - 1])) if k < len(s) else 1.0,
        **shares,
        **ranks,
        **rotation,
    )


@dataclass(frozen=True)
class GeometryRow:
    """The change of one matrix in one arm. k: dimension of the subspaces compared, at most the matrix's short side."""

    arm: str
    site: str
    layer: int | None
    part: str
    change: Change
    k: int


@dataclass(frozen=True)
class Geometry:
    """What `geometry` found; reloads without a model."""

    rows: tuple[GeometryRow, ...]
    filter_rank: int
    k: int

    def frame(self) -> "pd.DataFrame":
        """One row a matrix and arm: arm, site, layer, part, every number of `Change`, and enrichments beside the overlaps, and
        the k of the matrix."""
        import pandas as pd

        table = pd.DataFrame([{**asdict(row), **asdict(row.change)} for row in self.rows]).drop(columns="change")
        for name in [c for c in table.columns if c.startswith(("overlap_", "energy_"))]:
            table[f"enrichment_{name}"] = table[name] / table["density"]
        return table.assign(filter_rank=self.filter_rank)

    def cut(self) -> str | None:
        """Where fewer than k dimensions were compared, in words; None where all matrices have as many."""
        rows = {row.site: row.k for row in self.rows}
        short = [site for site, k in rows.items() if k < self.k]
        if not short:
            return None
        least = min(short, key=lambda site: rows[site])
        return (
            f"k {self.k} is beyond the short side of {len(short)} of {len(rows)} matrices, first {short[0]} (least {rows[least]}, {least}): there "
            "all directions of that side are compared, whose angles are 0 whatever moved"
        )

    def summary(self, *, draws: int = 2000, seed: int = 0) -> "pd.DataFrame":
        """Means over matrices: columns arm, part ("all" is every part), measure, value, low, high, n, n_matrices, method, seed.

        Matrices weigh equally. The 95 % intervals resample layers, whose matrices stay together: n counts layers. Matrices
        where a measure is NaN are left out of it.
        """
        import pandas as pd

        table = self.frame()
        fixed = {"arm", "site", "layer", "part", "entries", "filter_rank", "k"}
        rows = []
        for arm, of_arm in table.groupby("arm", sort=False):
            for part, some in [*of_arm.groupby("part", sort=False), ("all", of_arm)]:
                for measure in [c for c in table.columns if c not in fixed]:
                    known = some[some[measure].notna()]
                    if not len(known):
                        continue
                    layers = known["layer"].fillna(-1).to_numpy()  # what is outside the layers stays together too
                    e = bootstrap(known[measure].to_numpy(), clusters=layers, draws=draws, seed=seed)
                    rows.append(
                        {"arm": arm, "part": part, "measure": measure, "value": e.value, "low": e.low, "high": e.high}
                        | {"n": e.n, "n_matrices": len(known), "method": e.method, "seed": seed}
                    )
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_whole(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Geometry":
        """What `save` wrote."""
        found: dict[str, Any] = json.loads(Path(path).read_text())
        rows = tuple(
            GeometryRow(**{"k": found["k"], **row, "change": Change(**row["change"])}) for row in found["rows"]
        )
        return cls(**{**found, "rows": rows})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Measures against layers, one line an arm."""
        from analyses import figures

        return figures.geometry(self.frame(), ax)

    def _repr_html_(self) -> str:
        return self.frame().to_html(max_rows=24, float_format="%.4g")


def geometry(
    base: Weights,
    tuned: Weights | Delta | Mapping[str, Weights | Delta],
    *,
    at: Patterns | None = None,
    density: float = 0.05,
    filter_rank: int = 16,
    k: int = 8,
    progress: bool = False,
) -> Geometry:
    """The geometry of one change of a model, or of several of the same base (which is then decomposed once).

    tuned        the changed weights, the change itself, or arms by name: ``{"lift": w1, "full": w2}``. One alone is the
                 arm "tuned". A site that a Delta lacks is unchanged
    at           matrices to look at; every attention and MLP matrix by default
    density      fraction of entries in the principal and the low set, in (0, 1]
    filter_rank  rank of the reduction behind the principal set
    k            dimension of the principal subspaces; of a matrix with a shorter side, that side's (`Geometry.cut` says where)

    Errors: ValueError for a pattern that matches nothing or a site that is not a matrix, for a density out of range, for
    arms of another shape, and for weights that lack a site.
    """
    from tqdm.auto import tqdm

    arms = {"tuned": tuned} if isinstance(tuned, Weights | Delta) else dict(tuned)
    sites = linear_sites(base) if at is None else match(at, base)
    if not arms:
        raise ValueError("no change to look at: give tuned weights, a Delta, or a dict of them")
    if flat := [str(s) for s in sites if len(base.shape(s)) != 2]:
        raise ValueError(f"geometry is about matrices; {', '.join(flat[:3])} {'is' if len(flat) == 1 else 'are'} not")
    for name, arm in arms.items():
        shapes = {s: tuple(arm.shapes()[s]) if s in arm else None for s in sites}
        wrong = [
            s
            for s, shape in shapes.items()
            if shape not in (tuple(base.shape(s)), None) or (shape is None and isinstance(arm, Weights))
        ]
        if wrong:
            there = f"has shape {shapes[wrong[0]]}" if shapes[wrong[0]] else "is not there"
            raise ValueError(
                f"The arm {name!r} is of another model: in it {wrong[0]} {there}, in the base it has shape {tuple(base.shape(wrong[0]))} "
                f"({len(wrong)} such). Compare models of one architecture."
            )
    with tqdm(total=len(sites), desc="geometry", disable=not progress, leave=False) as bar:

        def look(site: Site) -> list[GeometryRow]:
            W = base[site].detach().cpu()
            before = decompose(W, density=density, filter_rank=filter_rank, k=k)
            rows = []
            for name, arm in arms.items():
                if isinstance(arm, Weights):
                    after = arm[site].detach().cpu()
                else:
                    after = before.W + arm[site].cpu() if site in arm else before.W
                rows.append(
                    GeometryRow(name, str(site), site.layer, site.part, change(before, after), before.V.shape[1])
                )
            bar.update()
            return rows

        found = each_matrix(look, sites)
    by_arm = [rows[i] for i in range(len(arms)) for rows in found]
    return Geometry(tuple(by_arm), filter_rank, k)


def _share(chosen: Bool[Tensor, " n"], at: Int[Tensor, " count"]) -> float:
    return _ratio(float(chosen[at].sum()), float(chosen.sum()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
