"""Representation measures, restated literally and slowly in numpy."""

import itertools
import math

import numpy as np


def hsic_u(K, L):
    """Song et al. (2012), JMLR 13: the unbiased estimate as the U-statistic it is, one term for each ordered quadruple.

    (1 / (n)_4) sum over distinct (i, j, q, r) of K_ij L_ij + K_ij L_qr - 2 K_ij L_iq.
    """
    n, total = len(K), 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
    return total / math.perm(n, 4)


def hsic_1(K, L):
    """Song et al. (2012), equation 5, on kernel matrices with their diagonals removed."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    inner = (
        np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return inner / (n * (n - 3))


def debiased_cka(X, Y, hsic=hsic_1):
    K, L = X @ X.T, Y @ Y.T
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def mean_shift(X, Y):
    """analyses B.1: ||mean Y - mean X|| / sqrt(tr Cov(X))."""
    return np.linalg.norm(Y.mean(0) - X.mean(0)) / math.sqrt(np.trace(np.cov(X.T)))


def relative_change(X, Y):
    return np.linalg.norm(Y - X) / np.linalg.norm(X - X.mean(0))


def principal_basis(X, k):
    return np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:k].T


def subspace_angles(X, Y, k):
    """B.2: cos of the angles are the singular values of U'V; here from scipy, which also resolves small angles."""
    from scipy.linalg import subspace_angles as angles

    found = np.rad2deg(angles(principal_basis(X, k), principal_basis(Y, k)))
    return found.mean(), found.max()


def kl(p_logits, q_logits):
    """Sum over the vocabulary of p log(p / q), in nats."""
    p = np.exp(p_logits - p_logits.max())
    p /= p.sum()
    q = np.exp(q_logits - q_logits.max())
    q /= q.sum()
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))
