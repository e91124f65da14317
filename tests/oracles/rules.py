"""DRIFT restated literally, for tests: each rule as a loop over entries in Python's own floats.

Paper: arXiv 2510.15050, the three ways of scaling the prior (absolute, by the gradient's norm, adaptive). The paper writes
g + a * scale * D with a = -1; with a = 1 that is g - a * scale * D, as here.
"""

import math

from torch import Tensor, tensor


def _numbers(tensor_: Tensor) -> list[float]:
    return [float(x) for x in tensor_.double().flatten()]


def bent(grad: Tensor, delta: Tensor, a: float, rule: str) -> Tensor:
    """The bent gradient, in float64."""
    g, d = _numbers(grad), _numbers(delta)
    g_norm = math.sqrt(sum(x * x for x in g))
    d_norm = math.sqrt(sum(x * x for x in d))
    dot = sum(x * y for x, y in zip(g, d, strict=True))
    if d_norm == 0:
        return grad.double()
    d_hat = [x / d_norm for x in d]
    if rule == "absolute":
        out = [x - a * y for x, y in zip(g, d, strict=True)]
    elif rule == "norm":
        out = [x - a * g_norm * y for x, y in zip(g, d_hat, strict=True)]
    elif rule == "adaptive":
        cos = dot / (g_norm * d_norm) if g_norm else 0.0
        out = [x - a * (1 + cos) / 2 * g_norm * y for x, y in zip(g, d_hat, strict=True)]
    elif rule == "project":
        along = dot / d_norm
        out = [x - a * along * y if dot > 0 else x for x, y in zip(g, d_hat, strict=True)]
    elif rule == "aligned":
        out = [x - a * g_norm * y if dot < 0 else x for x, y in zip(g, d_hat, strict=True)]
    else:
        raise KeyError(rule)
    return tensor(out, dtype=grad.double().dtype).view(grad.shape)


def merge_coefficient(before: list[Tensor], after: list[Tensor], prior: list[Tensor]) -> float:
    """<W - W_0, D> / ||D||^2 over several tensors as if they were one."""
    top = bottom = 0.0
    for w0, w, d in zip(before, after, prior, strict=True):
        for x0, x, y in zip(_numbers(w0), _numbers(w), _numbers(d), strict=True):
            top += (x - x0) * y
            bottom += y * y
    return top / bottom
