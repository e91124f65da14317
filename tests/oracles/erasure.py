"""LEACE as its theorem says, with square roots and pseudo-inverses of whole matrices."""

import numpy as np


def leace(X: np.ndarray, Z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3: ``r(x) = x - W⁺ P W (x - E[X])``, fitted to rows X with labels Z."""
    X, Z = X.astype(float), Z.astype(float)
    mean = X.mean(axis=0)
    xx = (X - mean).T @ (X - mean) / len(X)
    xz = (X - mean).T @ (Z - Z.mean(axis=0)) / len(X)
    values, axes = np.linalg.eigh(xx)
    root = axes @ np.diag(np.sqrt(np.clip(values, 0, None))) @ axes.T
    W = np.linalg.pinv(root, rcond=1e-6, hermitian=True)
    image = W @ xz
    P = image @ np.linalg.pinv(image, rcond=1e-6)
    return np.array(
        [row - np.linalg.pinv(W, rcond=1e-6, hermitian=True) @ P @ W @ (row - mean) for row in x.astype(float)]
    )
