"""Gating in float64, token by token, from the definitions; derivatives by complex steps.

A router is given as a plain dict of the fields of its rule. Choices come with a margin: how far the keys may move
before another expert or another order would be right.
"""

from __future__ import annotations

import itertools

import numpy as np


def sigmoid(z):
    r = z.real
    with np.errstate(over="ignore"):
        return np.where(r >= 0, 1 / (1 + np.exp(-z)), np.exp(z) / (1 + np.exp(z)))


def sqrt_softplus(z):
    # value and first derivative by hand: complex log1p loses small real parts
    value = np.sqrt(np.logaddexp(0.0, z.real))
    if not np.iscomplexobj(z):
        return value
    with np.errstate(all="ignore"):
        slope = np.where(z.real < -300, 0.5 * np.exp(0.5 * z.real), sigmoid(z.real) / (2 * value))
    return value + 1j * z.imag * slope


def softmax(z):
    e = np.exp(z - z.real.max())
    return e / e.sum()


def scores(row, score):
    """Scores of one token."""
    return {"softmax": softmax, "sigmoid": sigmoid, "sqrtsoftplus": sqrt_softplus}[score](row)


def ranked(keys):
    """Positions by key, largest first; NaN last; ties to the lower position."""
    return sorted(range(len(keys)), key=lambda e: (np.isnan(keys[e]), -keys[e] if not np.isnan(keys[e]) else 0, e))


def _margin(keys, order, count):
    """Smallest gap among the first ``count`` + 1 of an order; equal keys are decided by id and lose nothing."""
    gaps = [keys[a] - keys[b] for a, b in itertools.pairwise(order[: count + 1])]
    return min([g for g in gaps if g != 0 and not np.isnan(g)], default=np.inf)


def choose(row, rule, bias=None):
    """Ids of one token, best first, and the margin of the choice."""
    num_experts, k = rule["num_experts"], rule["top_k"]
    s = scores(row, rule["score"])
    keys = row if bias is None else s + bias
    groups = rule.get("num_groups", 1)
    if groups == 1:
        order = ranked(keys)
        return order[:k], _margin(keys, order, k)
    group_keys = s if bias is None else keys
    size = num_experts // groups
    kept = rule["topk_groups"]
    n = {"max": 1, "top2_sum": 2, "topn_sum": k // kept}[rule["group_score"]]
    group_scores = []
    for g in range(groups):
        members = group_keys[g * size : (g + 1) * size]
        group_scores.append(sum(members[e] for e in ranked(members)[:n]))
    group_order = ranked(group_scores)
    allowed = sorted(e for g in group_order[:kept] for e in range(g * size, (g + 1) * size))
    order = [allowed[i] for i in ranked([keys[e] for e in allowed])]
    return order[:k], min(_margin(keys, order, k), _margin(group_scores, group_order, kept))


def weights(row, ids, rule):
    """Weights of one token at given ids; -1 is not routed. Works for complex logits."""
    routed = [j for j, e in enumerate(ids) if e >= 0]
    out = np.zeros(len(ids), row.dtype)
    if not routed:
        return out
    chosen = np.array([ids[j] for j in routed])
    is_post = rule.get("score_stage", "pre") == "post"
    w = softmax(row[chosen]) if is_post else scores(row, rule["score"])[chosen]
    eps = rule.get("renormalize_eps", 1e-20)
    if rule.get("renormalize") == "sum":
        w = w / (w.sum() + eps)
    elif rule.get("renormalize") == "clamp":
        w = w / (w.sum() if w.sum().real >= eps else eps)
    out[routed] = w * rule.get("scaling_factor", 1.0)
    return out


def load_fractions(topk_idx, rule, mask):
    counts = np.zeros(rule["num_experts"])
    for token, ids in enumerate(topk_idx):
        for e in ids:
            if mask[token] and e >= 0:
                counts[e] += 1
    return rule["num_experts"] * counts / (rule["top_k"] * max(1, mask.sum()))


def balance_rows(z, topk_idx, rule, mask, sequence=None, reduced=None):
    """Each token's share of the balance loss; their sum is the loss."""
    sequence = np.zeros(len(z), int) if sequence is None else np.asarray(sequence)
    rows = np.zeros(len(z), z.dtype)
    names = sorted({int(s) for s, real in zip(sequence, mask, strict=True) if real})
    for name in names:
        members = mask & (sequence == name)
        f, tokens = load_fractions(topk_idx, rule, members), members.sum()
        if reduced is not None:
            f, tokens = rule["num_experts"] * np.asarray(reduced[0]) / (rule["top_k"] * reduced[1]), reduced[1]
        for t in np.flatnonzero(members):
            p = scores(z[t], rule["score"])
            if rule["score"] != "softmax":
                p = p / (p.sum() + 1e-20)
            rows[t] = (f * p).sum() / (tokens * len(names))
    return rows


def z_rows(z, mask):
    """Each token's share of the z-loss."""
    rows = np.zeros(len(z), z.dtype)
    for t in np.flatnonzero(mask):
        m = z[t].real.max()
        rows[t] = (m + np.log(np.exp(z[t] - m).sum())) ** 2 / mask.sum()
    return rows


def gradient(z, grad_weights, topk_idx, rule, mask, *, balance_coef=0.0, z_coef=0.0, sequence=None, reduced=None):
    """Gradient of the logits by complex steps: exact to rounding, no subtraction."""
    step = 1e-60
    grad = np.zeros(z.shape)
    ids = np.where(mask[:, None], topk_idx, -1)
    for e in range(z.shape[1]):
        moved = z.astype(complex)
        moved[:, e] += 1j * step
        rows = np.array([(grad_weights[t] * weights(moved[t], ids[t], rule)).sum() for t in range(len(z))])
        if balance_coef:
            rows = rows + balance_coef * balance_rows(moved, ids, rule, mask, sequence, reduced)
        if z_coef:
            rows = rows + z_coef * z_rows(moved, mask)
        grad[:, e] = rows.imag / step
    return grad


def expert_choice(z, capacity, mask):
    """Each expert's tokens by score, and the scores; -1 and 0 past the last real token."""
    p = np.array([softmax(row) for row in z]).reshape(z.shape)
    num_experts = z.shape[1]
    idx, w = np.full((num_experts, capacity), -1), np.zeros((num_experts, capacity))
    real = np.flatnonzero(mask)
    for e in range(num_experts):
        order = [int(real[i]) for i in ranked([p[t, e] for t in real])][:capacity]
        idx[e, : len(order)] = order
        w[e, : len(order)] = p[order, e]
    return idx, w


def needed_bias(z, rule, bias, mask):
    """By token that counts: the largest key that was not chosen, less every score."""
    rows = []
    for t in np.flatnonzero(mask):
        s = scores(z[t], rule["score"])
        if np.isfinite(s).all():
            rows.append(sorted(s + bias)[-rule["top_k"] - 1] - s)
    return np.array(rows).reshape(-1, rule["num_experts"])


def quantile_bias(z, rule, bias, mask):
    """Of every expert the value with tokens * top_k / num_experts (rounded down) below it; then mean 0."""
    needed = needed_bias(z, rule, bias, mask)
    if len(needed) == 0:
        return bias
    found = np.sort(needed, axis=0)[len(needed) * rule["top_k"] // rule["num_experts"]]
    return found - found.mean()
