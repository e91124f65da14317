"""Geometry of a change, restated literally from full float64 SVDs and Python sets."""

import math

import numpy as np
import torch


def to_bf16(A):
    """Round to nearest even, by the bits: the upper 16 of a float32, after adding half of what is cut off."""
    bits = np.asarray(A, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16).astype(np.uint32) << 16).view(np.float32)


def geometry(W0, W1, density, filter_rank, k):
    """analyses C.1 (1), (3), (4), (5) and C.2 for numpy float32 matrices; keys as in `Change`."""
    count = max(1, int(density * W0.size))
    D = W1.astype(np.float32) - W0.astype(np.float32)
    stored = to_bf16(W1).astype(float) - to_bf16(W0).astype(float)
    U0, s0, V0 = np.linalg.svd(W0.astype(float), full_matrices=False)
    U1, s1, V1 = np.linalg.svd(W1.astype(float), full_matrices=False)
    d = np.linalg.svd(D.astype(float), compute_uv=False)
    reduced = (U0[:, :filter_rank] * s0[:filter_rank]) @ V0[:filter_rank]
    sets = {
        "principal": set(np.argsort(-np.abs(reduced).ravel(), kind="stable")[:count].tolist()),
        "low": set(np.argsort(np.abs(W0).ravel(), kind="stable")[:count].tolist()),
    }
    moved = {
        "changed": set(np.flatnonzero(D).tolist()),
        "stored": set(np.flatnonzero(stored).tolist()),
        "largest": set(np.argsort(-np.abs(D).ravel(), kind="stable")[:count].tolist())
        & set(np.flatnonzero(D).tolist()),
    }
    found = {
        "changed": len(moved["changed"]) / W0.size,
        "changed_stored": len(moved["stored"]) / W0.size,
        "norm_ratio": np.linalg.norm(D) / np.linalg.norm(W0),
        "spectral_ratio": d[0] / s0[0],
        "spectral_drift": np.linalg.norm(s1 - s0) / np.linalg.norm(s0),
        "stable_rank": (d**2).sum() / d[0] ** 2,
        "effective_rank": math.exp(-sum(p * math.log(p) for p in d / d.sum() if p > 0)),
        "gap": (s0[k - 1] - s0[k]) / s0[k - 1],
    }
    for where, indices in sets.items():
        at = sorted(indices)
        found[f"energy_{where}"] = (D.ravel()[at].astype(float) ** 2).sum() / (D.astype(float) ** 2).sum()
        found[f"energy_stored_{where}"] = (stored.ravel()[at] ** 2).sum() / (stored**2).sum()
        for name, entries in moved.items():
            found[f"overlap_{name}_{where}"] = len(entries & indices) / len(entries)
    for side, before, after in (("u", U0[:, :k], U1[:, :k]), ("v", V0[:k].T, V1[:k].T)):
        cosines = np.linalg.svd(before.T @ after, compute_uv=False).clip(0, 1)
        found[f"angle_{side}_mean"] = np.degrees(np.arccos(cosines)).mean()
        found[f"angle_{side}_max"] = np.degrees(np.arccos(cosines)).max()
    return found


def rotation(n, i, j, degrees):
    """The rotation of R^n by an angle in the plane of axes i and j."""
    R = torch.eye(n, dtype=torch.float64)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    R[i, i], R[j, j], R[i, j], R[j, i] = c, c, -s, s
    return R
