"""vLLM and SGLang."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .shared import done, experts, grouped, grouped_sigmoid, rows_dequantised, weights_dequantised


def grouped_topk(scores, num_expert_group, topk_group, topk, renormalize, routed_scaling_factor, bias, scoring_func=0):
    assert (renormalize, scoring_func) == (True, 1)
    return grouped_sigmoid(scores, bias, num_expert_group, topk_group, topk, routed_scaling_factor)


def vllm_permute(
    hidden_states, a1q_scale, topk_ids, n_expert, n_local_expert=-1, expert_map=None, permuted_hidden_states=None,
    scratch=None,
):  # fmt: skip
    slots = topk_ids.reshape(-1).argsort(stable=True)
    inverse = torch.empty_like(slots)
    inverse[slots] = torch.arange(len(slots))
    ends = torch.bincount(topk_ids.reshape(-1), minlength=n_expert).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    return done(hidden_states[slots // topk_ids.shape[1]]), None, starts, inverse.int(), slots.int()


def vllm_unpermute(out, permuted_hidden_states, topk_weights, inv_permuted_idx, expert_first_token_offset=None):
    rows = permuted_hidden_states[inv_permuted_idx.long()].float().view(*topk_weights.shape, -1)
    out.copy_(done((rows * topk_weights[..., None]).sum(dim=1)))


def vllm_fused_experts(
    hidden_states, w1, w2, topk_weights, topk_ids, activation="silu", apply_router_weight_on_input=False,
    global_num_experts=-1, expert_map=None, quant_config=None,
):  # fmt: skip
    if quant_config is not None:
        assert quant_config["block_shape"] == [128, 128]
        w1, w2 = (weights_dequantised((w, quant_config[s])) for w, s in ((w1, "w1_scale"), (w2, "w2_scale")))
    return done(experts(hidden_states, w1, w2, topk_weights, topk_ids))


def fp8_w8a8_moe_quant_config(
    w1_scale, w2_scale, a1_scale=None, a2_scale=None, w1_bias=None, w2_bias=None, per_act_token_quant=False,
    per_out_ch_quant=False, block_shape=None, a1_gscale=None, a2_gscale=None, g1_alphas=None, g2_alphas=None,
    gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None,
):  # fmt: skip
    return {"w1_scale": w1_scale, "w2_scale": w2_scale, "block_shape": block_shape}


def moe_fused_gate(
    input_tensor, bias, num_expert_group, topk_group, topk, num_fused_shared_experts=0, routed_scaling_factor=0,
    apply_routed_scaling_factor_on_output=False,
):  # fmt: skip
    scale = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    return grouped_sigmoid(input_tensor, bias, num_expert_group, topk_group, topk, scale)


def fp8_blockwise_scaled_grouped_mm(
    output, a_ptrs, b_ptrs, out_ptrs, a_scales_ptrs, b_scales_ptrs, a, b, scales_a, scales_b, stride_a, stride_b,
    stride_c, layout_sfa, layout_sfb, problem_sizes, expert_offsets, workspace,
):  # fmt: skip
    assert b.stride(1) == 1  # column-major [E, K, N]
    w = weights_dequantised((b.transpose(1, 2), scales_b.transpose(1, 2)))
    assert expert_offsets.tolist() == [0, *problem_sizes[:-1, 0].cumsum(0).tolist()]
    output.copy_(done(grouped(rows_dequantised((a, scales_a)), w, problem_sizes[:, 0])))


class StandardTopKOutput(NamedTuple):
    topk_weights: Any
    topk_ids: Any
    router_logits: Any


class MoeRunnerConfig:
    def __init__(self, inplace=True, no_combine=False):
        self.inplace = inplace


def sglang_fused_experts(
    hidden_states, w1, w2, topk_output, moe_runner_config, b1=None, b2=None, use_fp8_w8a8=False, use_int8_w8a8=False,
    use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, w1_scale=None, w2_scale=None, w1_zp=None,
    w2_zp=None, a1_scale=None, a2_scale=None, block_shape=None,
):  # fmt: skip
    assert not moe_runner_config.inplace
    weights, ids, _ = topk_output
    return done(experts(hidden_states, w1, w2, weights, ids))
