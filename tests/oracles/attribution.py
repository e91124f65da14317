"""Attribution restated literally: every vector is made, every token is visited."""

import math

import torch


def head_outputs(z, W, heads):
    """ThinkEdit, section 4: C_tj = W_o[:, columns of j] z_tj, the vector that head j adds at token t. [token, head, d]"""
    width = z.shape[1] // heads
    out = torch.zeros(len(z), heads, len(W), dtype=torch.float64)
    for t in range(len(z)):
        for j in range(heads):
            columns = slice(j * width, (j + 1) * width)
            out[t, j] = W[:, columns].double() @ z[t, columns].double()
    return out


def thinkedit_scores(examples, W, v, heads):
    """ThinkEdit, section 4: the mean over examples of the inner product of the token-mean of C with v / |v|. [head]"""
    scores = torch.zeros(heads, dtype=torch.float64)
    for z in examples:
        mean = head_outputs(z, W, heads).mean(0)
        for j in range(heads):
            scores[j] += mean[j] @ v.double() / v.double().norm() / len(examples)
    return scores


def normed_head_outputs(z, W, heads, gain, epsilon):
    """What each head adds after an RMS norm of the sum of all: gain * C_tj / sqrt(mean((sum_j C_tj)^2) + epsilon). [token, head, d]"""
    out = head_outputs(z, W, heads)
    for t in range(len(z)):
        whole = out[t].sum(0)
        out[t] = gain.double() * out[t] / math.sqrt(float((whole**2).mean()) + epsilon)
    return out


def attention_mass(weights, marked, others, asks, sees):
    """Per query in `asks`: attention on marked keys, on others, and the share of the keys it sees that are marked; then their means.

    weights: [head, query, key]; sees: (query, key) -> bool.
    """
    heads, _, tokens = weights.shape
    mass, rest, even = [[0.0] * heads for _ in range(2)], None, 0.0
    mass, rest = mass
    for q in asks:
        seen = [k for k in range(tokens) if sees(q, k)]
        even += len([k for k in seen if k in marked]) / len(seen) / len(asks)
        for h in range(heads):
            mass[h] += sum(float(weights[h, q, k]) for k in marked) / len(asks)
            rest[h] += sum(float(weights[h, q, k]) for k in others) / len(asks)
    return mass, rest, even
