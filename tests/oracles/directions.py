"""Directions and their judgement as the papers' equations say, one row at a time."""

from collections.abc import Sequence

import numpy as np
import torch


def class_means(X: np.ndarray, y: Sequence[int]) -> np.ndarray:
    """Rimsky et al. 2023, section 3: the mean of the positive rows less that of the negative ones."""
    sums, counts = np.zeros((2, X.shape[1])), [0, 0]
    for row, label in zip(X.astype(float), y, strict=True):
        sums[int(label)] += row
        counts[int(label)] += 1
    return sums[1] / counts[1] - sums[0] / counts[0]


def pairs(X: np.ndarray, y: Sequence[int], g: Sequence[object]) -> np.ndarray:
    """For each group with both labels, as they come, the difference of its sides' means."""
    found = []
    for name in dict.fromkeys(g):
        mine = [i for i, other in enumerate(g) if other == name]
        sides = [[X[i].astype(float) for i in mine if int(y[i]) == side] for side in (0, 1)]
        if sides[0] and sides[1]:
            found.append(np.mean(sides[1], axis=0) - np.mean(sides[0], axis=0))
    return np.array(found)


def first_component(differences: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Zou et al. 2023, section 3.1: the first principal component of recentred differences, each one way or the other."""
    either = differences * turned[:, None]
    component = np.linalg.svd(either - either.mean(axis=0), full_matrices=False)[2][0]
    return component if component @ differences.mean(axis=0) > 0 else -component


def mass_mean(X: np.ndarray, y: Sequence[int]) -> np.ndarray:
    """Marks and Tegmark 2023, section 5: the inverse covariance within classes times the difference of the means."""
    y = np.asarray(y, dtype=bool)
    centred = X.astype(float).copy()
    for i in range(len(X)):
        centred[i] -= X[y == y[i]].mean(axis=0, dtype=float)
    covariance = sum(np.outer(row, row) for row in centred) / len(X)
    return np.linalg.pinv(covariance, rcond=1e-3, hermitian=True) @ class_means(X, y)


def auc(scores: Sequence[float], labels: Sequence[int], strata: Sequence[object]) -> float:
    """Mann and Whitney 1947: every pair of one stratum, one after the other."""
    won = asked = 0.0
    for s, y, k in zip(scores, labels, strata, strict=True):
        for t, z, m in zip(scores, labels, strata, strict=True):
            if y and not z and k == m:
                won += 1.0 if s > t else 0.5 if s == t else 0.0
                asked += 1
    return won / asked if asked else float("nan")


def published_length_direction(module, path: str, rows: Sequence[tuple[list[int], int, int]], short: int, long: int):
    """ThinkEdit's recipe (arXiv 2503.22048, section 3.1): one example at a time, unpadded.

    rows: token ids, and where the thinking begins and ends. path: the module whose input is read. The mean over ``[begin - 1, end - 1)`` in
    each example, then over the examples of more than `long` tokens of thinking less those of fewer than `short`.
    """
    sides: tuple[list, list] = ([], [])
    for ids, begin, end in rows:
        seen = []
        hook = module.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            module(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        hook.remove()
        mean = seen[0][0, begin - 1 : end - 1].double().mean(dim=0)
        if end - begin > long:
            sides[1].append(mean)
        elif end - begin < short:
            sides[0].append(mean)
    return torch.stack(sides[1]).mean(dim=0) - torch.stack(sides[0]).mean(dim=0)
