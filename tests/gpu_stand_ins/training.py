"""SonicMoE, ScatterMoE, MegaBlocks, grouped_gemm."""

from __future__ import annotations

import enum

import torch

from .shared import done, grouped


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"


def moe_general_routing_inputs(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
    is_inference_mode_enabled=False, is_concatenated_gate_up=False,
):  # fmt: skip
    assert activation_type is ActivationType.SWIGLU
    assert bool((token_indices.diff() >= 0).all())
    y = torch.zeros(x.shape)
    for e in range(E):
        slots = (expert_indices == e).nonzero()[:, 0]
        tokens = token_indices[slots].long()
        z = x[tokens].float() @ w1[:, :, e].float().T
        rows = (torch.nn.functional.silu(z[:, ::2]) * z[:, 1::2]) @ w2[:, :, e].float().T
        y = y.index_add(0, tokens, rows * router_scores[slots, None])
    return done(y.to(x.dtype)), None


def flatten_sort_count(expert_idxs, num_experts):
    by_expert, slots = torch.sort(expert_idxs.flatten())
    return by_expert, slots, torch.bincount(expert_idxs.flatten(), minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, expert_biases=None,
    gates=None, grouped_in=False, grouped_out=False,
):  # fmt: skip
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    sizes = expert_offsets.diff(prepend=torch.zeros(1, dtype=expert_offsets.dtype))
    out = grouped(rows, expert_weights.transpose(1, 2), sizes).to(inputs.dtype)
    if not grouped_out:
        out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
    if gates is not None:
        out = done((gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1))
    return out


def gather(x, indices, bin_ids, bins, top_k, /):
    assert bool((bin_ids.diff() >= 0).all())
    return done(x[indices.long() // top_k])


def scatter(x, indices, bin_ids, weights, bins, top_k):
    weighted = x.float() * weights[indices.long(), None]
    y = torch.zeros(len(indices) // top_k, x.shape[1])
    return done(y.index_add(0, indices.long() // top_k, weighted).to(x.dtype))


def backend_gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.is_cpu
    if trans_a:
        pairs = zip(a.float().split(batch_sizes.tolist()), b.float().split(batch_sizes.tolist()), strict=True)
        return done(torch.stack([left.T @ right for left, right in pairs])).to(a.dtype)
    return done(grouped(a, b if trans_b else b.transpose(1, 2), batch_sizes)).to(a.dtype)


def gmm(a, b, batch_sizes, trans_b=False):
    return backend_gmm(a, b, batch_sizes, trans_b=trans_b)
