"""Objectives restated literally, for tests: one sequence, one token, one word of the vocabulary at a time, in Python's floats.

A sequence is a list of (logits, target, weight). Probabilities are exponentials over their sum, without any care for overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Token = tuple[Sequence[float], int, float]  # logits, target, weight
Text = Sequence[Token]


def softmax(logits: Sequence[float]) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def probability(token: Token) -> float:
    return softmax(token[0])[token[1]]


def kl(first: Sequence[float], second: Sequence[float]) -> float:
    """sum over v of p(v) log(p(v) / q(v))."""
    return sum(p * math.log(p / q) for p, q in zip(softmax(first), softmax(second), strict=True))


def mean_over_tokens(texts: Sequence[Text], value) -> float:
    """Σ w value / Σ w over all the tokens of all the texts."""
    tokens = [token for text in texts for token in text]
    return sum(token[2] * value(token) for token in tokens) / sum(token[2] for token in tokens)


def nll(texts: Sequence[Text]) -> float:
    return mean_over_tokens(texts, lambda t: -math.log(probability(t)))


def dft(texts: Sequence[Text]) -> float:
    """arXiv 2508.05629: sg(p) · (-log p), token by token."""
    return mean_over_tokens(texts, lambda t: -probability(t) * math.log(probability(t)))


def dft_logit_gradient(texts: Sequence[Text]) -> list[list[float]]:
    """d/dz_v of Σ w (-p_target) / Σ w: softmax's derivative, p_y (p_v - [v = y])."""
    total = sum(t[2] for text in texts for t in text)
    rows = []
    for text in texts:
        for logits, target, weight in text:
            p = softmax(logits)
            rows.append([weight / total * p[target] * (p[v] - (v == target)) for v in range(len(p))])
    return rows


def entropy(texts: Sequence[Text]) -> float:
    return mean_over_tokens(texts, lambda t: -sum(p * math.log(p) for p in softmax(t[0])))


def kl_to_base(texts: Sequence[Text], base: Sequence[Text]) -> float:
    """Σ w KL(π_0 || π) / Σ w; base holds the starting model's logits of the same tokens."""
    pairs = [(t, b) for text, other in zip(texts, base, strict=True) for t, b in zip(text, other, strict=True)]
    return sum(t[2] * kl(b[0], t[0]) for t, b in pairs) / sum(t[2] for t, _ in pairs)


def kl_from_base(texts: Sequence[Text], base: Sequence[Text]) -> float:
    return kl_to_base(
        [[(b[0], 0, t[2]) for t, b in zip(x, y, strict=True)] for x, y in zip(texts, base, strict=True)], texts
    )


def sequence_probability(text: Text) -> float:
    """Π p_t (weights as exponents)."""
    return math.prod(probability(t) ** t[2] for t in text)


def coverage(texts: Sequence[Text], samples: int) -> float:
    """arXiv 2502.07154: -log(1 - (1 - p)^N), mean over texts."""
    return sum(-math.log(1 - (1 - sequence_probability(text)) ** samples) for text in texts) / len(texts)


def mean_loss(text: Text) -> float:
    return sum(t[2] * -math.log(probability(t)) for t in text) / sum(t[2] for t in text)


def glow_weight(before: float, now: float, alpha: float, beta: float, low: float, high: float) -> float:
    """clamp(α (1 - σ(β Δ)), low, high) with Δ = before - now."""
    gain = before - now
    return min(high, max(low, alpha * (1 - 1 / (1 + math.exp(-beta * gain)))))


def aft(groups: Sequence[Sequence[tuple[Text, float]]], boundary: float | None, likelihood: float) -> float:
    """arXiv 2309.02144: log(1 + ΣΣ ...) + likelihood; a group is a list of (text, grade)."""
    total = 0.0
    for group in groups:
        scored = [(-mean_loss(text), grade) for text, grade in group]
        inside = 1.0
        for s_n, worse in scored:
            above = [s for s, grade in scored if grade > worse]
            for s_p in above:
                inside += math.exp(s_n - s_p)
                if boundary is not None:
                    T = 2 * min(above) - 2 * boundary - s_p
                    inside += math.exp(T - s_n)
        best = [s for s, grade in scored if grade == max(g for _, g in scored)]
        total += math.log(inside) - likelihood * sum(best) / len(best)
    return total / len(groups)


def dpo(pairs: Sequence[tuple[Text, Text]], base: Sequence[tuple[Text, Text]], beta: float) -> float:
    """arXiv 2305.18290, equation 7, mean over pairs of (chosen, rejected)."""
    total = 0.0
    for (chosen, rejected), (chosen_0, rejected_0) in zip(pairs, base, strict=True):
        log_ratio = math.log(sequence_probability(chosen) / sequence_probability(chosen_0))
        other = math.log(sequence_probability(rejected) / sequence_probability(rejected_0))
        total += -math.log(1 / (1 + math.exp(-beta * (log_ratio - other))))
    return total / len(pairs)


def ewc(theta, start, fisher, weight: float) -> float:
    """arXiv 1612.00796, equation 3: Σ λ/2 F_i (θ_i - θ*_i)², over flat lists."""
    return sum(weight / 2 * f * (t - s) ** 2 for t, s, f in zip(theta, start, fisher, strict=True))
