"""Golden vectors of every router: ``python tests/golden/make_routers.py`` writes routers.npz beside itself.

One function per model, written from the formula that its paper or its published code gives, with the model's constants,
in float64, for one token. It imports nothing of pyroute and shares no table with it: a wrong preset must disagree.

routers.npz holds per model ``<model>/logits`` float32 [T, E], ``/bias`` float32 [E] where the model has one, ``/ids``
int32 [T, k] best first with ties to the lower id, ``/weights`` float64 [T, k]; ``deepseek-v4-hash/ids`` is an input.
"""

from __future__ import annotations

from math import exp, inf, log1p, sqrt
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("routers.npz")


def sigmoid(z):
    return 1 / (1 + exp(-z)) if z >= 0 else exp(z) / (1 + exp(z))


def softmax(z):
    top = max(z)
    e = [exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def best(keys, k):
    """The k best positions, best first, ties to the lower position."""
    return sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k]


def deepseek_v2(z, _bias):
    """DeepSeek-V2, device-limited routing: 8 groups by their best expert, 3 kept; no normalisation, x 16."""
    s = softmax(z)
    kept = best([max(s[20 * g : 20 * g + 20]) for g in range(8)], 3)
    ids = best([s[e] if e // 20 in kept else -inf for e in range(160)], 6)
    return ids, [16.0 * s[e] for e in ids]


def deepseek_v2_lite(z, _bias):
    s = softmax(z)
    ids = best(s, 6)
    return ids, [s[e] for e in ids]


def deepseek_v3(z, b):
    """DeepSeek-V3, equations 13 to 16 and section 2.1.2: groups by the sum of their two best biased affinities."""
    s = [sigmoid(v) for v in z]
    c = [x + y for x, y in zip(s, b, strict=True)]
    kept = best([sum(sorted(c[32 * g : 32 * g + 32])[-2:]) for g in range(8)], 4)
    ids = best([c[e] if e // 32 in kept else -inf for e in range(256)], 8)
    total = sum(s[e] for e in ids)
    return ids, [2.5 * s[e] / total for e in ids]


def sqrt_softplus(z):
    return sqrt(log1p(exp(z)) if z < 30 else z + log1p(exp(-z)))


def deepseek_v4(factor):
    def flash_or_pro(z, b):
        s = [sqrt_softplus(v) for v in z]
        ids = best([x + y for x, y in zip(s, b, strict=True)], 6)
        total = sum(s[e] for e in ids) + 1e-20
        return ids, [factor * (s[e] / total) for e in ids]

    return flash_or_pro


def deepseek_v4_hash(z, ids):
    """The first layers of V4: a table over token ids chooses, the learnt logits weigh."""
    s = [sqrt_softplus(v) for v in z]
    total = sum(s[e] for e in ids) + 1e-20
    return ids, [1.5 * (s[e] / total) for e in ids]


def ernie(z, b):
    """ERNIE 4.5: softmax affinities, a bias that chooses, a normaliser that is clamped at 1e-12."""
    s = softmax(z)
    ids = best([x + y for x, y in zip(s, b, strict=True)], 6)
    total = max(sum(s[e] for e in ids), 1e-12)
    return ids, [s[e] / total for e in ids]


def biased_sigmoid(k, factor, eps):
    """Kimi K2 and GLM-4.5 (DeepSeek-V3 with one group), MiniMax-M2 (no factor, no eps), LFM2 (eps 1e-6)."""

    def router(z, b):
        s = [sigmoid(v) for v in z]
        ids = best([x + y for x, y in zip(s, b, strict=True)], k)
        total = sum(s[e] for e in ids) + eps
        return ids, [factor * s[e] / total for e in ids]

    return router


def softmax_of_the_chosen(k):
    """gpt-oss and Granite: top-k of the logits, then a softmax over those k."""

    def router(z, _bias):
        ids = best(z, k)
        return ids, softmax([z[e] for e in ids])

    return router


def llama4(z, _bias):
    """Llama 4: the best expert, gated by the sigmoid of its logit (which scales the expert's input)."""
    ids = best(z, 1)
    return ids, [sigmoid(z[ids[0]])]


def normalised_softmax(k):
    """Mixtral (equation 1 of its paper gives softmax of the top-k, which is the same), Qwen3."""

    def router(z, _bias):
        s = softmax(z)
        ids = best(s, k)
        total = sum(s[e] for e in ids)
        return ids, [s[e] / total for e in ids]

    return router


def plain_softmax(k):
    """OLMoE, Qwen1.5-MoE: softmax over all experts, the best k as they are."""

    def router(z, _bias):
        s = softmax(z)
        ids = best(s, k)
        return ids, [s[e] for e in ids]

    return router


# model: (router, experts, centre of the bias or None)
MODELS = {
    "deepseek-v2": (deepseek_v2, 160, None),
    "deepseek-v2-lite": (deepseek_v2_lite, 64, None),
    "deepseek-v3": (deepseek_v3, 256, -0.1),
    "deepseek-v4": (deepseek_v4(1.5), 256, 8.0),  # the released biases lie near 8
    "deepseek-v4-pro": (deepseek_v4(2.5), 384, 0.0),
    "ernie-4.5": (ernie, 64, 0.0),
    "glm-4.5": (biased_sigmoid(8, 2.5, 1e-20), 160, 0.0),
    "glm-4.5-air": (biased_sigmoid(8, 1.0, 1e-20), 128, 0.2),
    "gpt-oss": (softmax_of_the_chosen(4), 128, None),
    "gpt-oss-20b": (softmax_of_the_chosen(4), 32, None),
    "granite-moe": (softmax_of_the_chosen(8), 32, None),
    "granite-moe-3b": (softmax_of_the_chosen(8), 40, None),
    "kimi-k2": (biased_sigmoid(8, 2.827, 1e-20), 384, 0.0),
    "lfm2-moe": (biased_sigmoid(4, 1.0, 1e-6), 32, -0.3),
    "llama4": (llama4, 16, None),
    "llama4-maverick": (llama4, 128, None),
    "minimax-m2": (biased_sigmoid(8, 1.0, 0.0), 256, 0.0),
    "mixtral": (normalised_softmax(2), 8, None),
    "olmoe": (plain_softmax(8), 64, None),
    "qwen2-moe": (plain_softmax(4), 60, None),
    "qwen3-moe": (normalised_softmax(8), 128, None),
    "qwen3-next": (normalised_softmax(10), 512, None),
}


def expected(model, logits, bias):
    """ids int32 [T, k] and weights float64 [T, k] for these inputs."""
    router = MODELS[model][0]
    b = None if bias is None else [float(v) for v in bias]
    rows = [router([float(v) for v in row], b) for row in logits]
    return np.array([ids for ids, _ in rows], np.int32), np.array([weights for _, weights in rows], np.float64)


def expected_hash(logits, ids):
    rows = [deepseek_v4_hash([float(v) for v in row], list(chosen)) for row, chosen in zip(logits, ids, strict=True)]
    return np.array([weights for _, weights in rows], np.float64)


def draw(rng, experts, biased):
    """Rows of distinct logits at several scales, a row of ties, rows that strain the scores, an even row."""
    steps = lambda: rng.choice(np.arange(-1024, 1024), experts, replace=False)  # noqa: E731
    rows = [steps() / 1024, steps() / 512, steps() / 512, steps() / 256, steps() / 256]
    rows.append(-22.0 - (steps() + 1024) / 256)  # -30..-22: tiny sigmoids, where the eps of a normaliser shows
    rows.append(rng.integers(-3, 4, experts).astype(float))
    rows.append(np.zeros(experts))
    if not biased:  # with a bias, float32 scores round into the key: keep those apart
        rows.append(steps() / 16)  # +-64: sigmoids saturate, logits do not tie
        rows.append(np.where(np.arange(experts) == experts - 1, 88.0, steps() / 1024))
    return np.array(rows, np.float32)


def steady(model, logits, bias):
    """Whether float32 rounding of a key cannot change the ids: they survive moves of 4e-6 (8 has a spacing of 9.5e-7).

    Equal logits move together, so that ties stay ties.
    """
    ids, _ = expected(model, logits[None], bias)
    rng = np.random.default_rng(1)
    values, of_expert = np.unique(logits, return_inverse=True)
    moves = (rng.uniform(-4e-6, 4e-6, len(values))[of_expert] for _ in range(16))
    return all(np.array_equal(expected(model, logits[None], bias + move)[0], ids) for move in moves)


def main():
    arrays = {}
    rng = np.random.default_rng(20250101)
    for model, (_, experts, centre) in MODELS.items():
        bias = None if centre is None else (centre + rng.permutation(experts) / 2048).astype(np.float32)
        if model == "ernie-4.5":
            bias[0] = -1.5  # never chosen: the row below then leaves the others a sum under the clamp
        logits = draw(rng, experts, bias is not None)
        while bias is not None and not all(steady(model, row, bias.astype(np.float64)) for row in logits):
            logits = draw(rng, experts, True)
        if model == "ernie-4.5":
            logits = np.vstack([logits, np.where(np.arange(experts) == 0, 40.0, logits[0]).astype(np.float32)])
        arrays[f"{model}/logits"] = logits
        if bias is not None:
            arrays[f"{model}/bias"] = bias
        arrays[f"{model}/ids"], arrays[f"{model}/weights"] = expected(model, logits, bias)
    logits = draw(rng, 256, False)
    ids = np.array([rng.choice(256, 6, replace=False) for _ in logits], np.int32)
    ids[1, 5] = ids[1, 0]  # tables of released checkpoints name an expert twice
    arrays["deepseek-v4-hash/logits"], arrays["deepseek-v4-hash/ids"] = logits, ids
    arrays["deepseek-v4-hash/weights"] = expected_hash(logits, ids)
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
