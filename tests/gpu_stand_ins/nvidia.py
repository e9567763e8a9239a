"""DeepGEMM, TransformerEngine, cuBLAS through nvmath, CUTLASS."""

from __future__ import annotations

import ctypes
import enum
import types

import torch

from .shared import done, grouped, grouped_sigmoid, rows_dequantised, weights_dequantised


def m_grouped_fp8_gemm_nt_contiguous(
    a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False,
    use_psum_layout=False, ensure_zero_padding=True, expected_m_for_psum_layout=None,
):  # fmt: skip
    sizes = torch.bincount(grouped_layout.long(), minlength=b[0].shape[0])
    d.copy_(done(grouped(rows_dequantised(a), weights_dequantised(b), sizes)))


def m_grouped_fp8_gemm_nt_masked(
    a, b, d, masked_m, expected_m, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk",
    disable_ue8m0_cast=False,
):  # fmt: skip
    rows, w = rows_dequantised(a), weights_dequantised(b)
    for e, count in enumerate(masked_m.tolist()):
        d[e, :count] = done(rows[e, :count] @ w[e].T)


def k_grouped_fp8_gemm_nt_contiguous(
    a, b, d, ks_cpu, grouped_layout, c=None, recipe=(1, 1, 128), compiled_dims="mn", use_psum_layout=False
):
    def parts(pair):
        codes, scales = pair
        channels, start = codes.numel() // sum(ks_cpu), 0
        for k in ks_cpu:
            block = codes[channels * start : channels * (start + k)].view(channels, k)
            yield rows_dequantised((block, scales[:, start // 128 : (start + k) // 128]))
            start += k

    for e, (left, right) in enumerate(zip(parts(a), parts(b), strict=True)):
        d[e] = done(left @ right.T) + (0 if c is None else c[e])


def fused_topk_with_score_function(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias,
    routing_map_format="bytemap", topk_indices=None, qb_histogram=None, qb_bin_bounds=None, qb_histogram_mode=None,
):  # fmt: skip
    assert score_function == "sigmoid"
    weights, ids = grouped_sigmoid(logits, expert_bias, num_groups, group_topk, topk, scaling_factor)
    dense = torch.zeros_like(logits).scatter_(1, ids, weights)
    return dense, dense != 0


def moe_permute(inp, routing_map, num_out_tokens, max_token_num=-1, map_type="mask"):
    assert map_type == "mask"
    assert routing_map.dtype == torch.int32
    _, tokens = routing_map.T.nonzero(as_tuple=True)
    assert len(tokens) == num_out_tokens
    row_of = torch.full(routing_map.T.shape, -1)
    row_of[routing_map.T != 0] = torch.arange(len(tokens))
    return done(inp[tokens]), row_of.T


def moe_unpermute(
    inp, row_id_map, merging_probs=None, restore_shape=None, map_type="mask", probs=None, pad_offsets=None
):
    assert map_type == "mask"
    y = torch.zeros(restore_shape)
    for e in range(row_id_map.shape[1]):
        tokens = (row_id_map[:, e] >= 0).nonzero()[:, 0]
        y[tokens] += merging_probs[tokens, e, None] * inp[row_id_map[tokens, e]].float()
    return done(y).to(inp.dtype)


class GroupedLinear(torch.nn.Module):
    def __init__(
        self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
        tp_group=None, tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
        return_bias=False, params_dtype=None, parallel_mode=None, device="cuda",
    ):  # fmt: skip
        super().__init__()
        assert not bias
        for e in range(num_gemms):
            w = torch.nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype, device=device))
            self.register_parameter(f"weight{e}", w)

    def forward(self, inp, m_splits, is_first_microbatch=None, out=None, dgrad_out=None):
        return done(grouped(inp, list(self.parameters()), m_splits)).to(inp.dtype)


class fp8_autocast:  # noqa: N801
    def __init__(self, enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
        assert isinstance(fp8_recipe, Float8BlockScaling)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


class Float8BlockScaling:
    pass


class CudaDataType(enum.IntEnum):
    CUDA_R_16BF = 14


class Operation(enum.IntEnum):
    N = 0
    T = 1


class ComputeType(enum.IntEnum):
    COMPUTE_32F = 68


def at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def gemm_grouped_batched_ex(
    handle, transa_array, transb_array, m_array, n_array, k_array, alpha_array, aarray, atype, lda_array, barray,
    btype, ldb_array, beta_array, carray, ctype, ldc_array, group_count, group_size, compute_type,
):  # fmt: skip
    assert set(group_size) == {1}
    assert (set(transa_array), set(transb_array)) == ({Operation.T}, {Operation.N})
    for g in range(group_count):
        m, n, k = m_array[g], n_array[g], k_array[g]
        assert (lda_array[g], ldb_array[g], ldc_array[g]) == (k, k, m)
        a_at, b_at, c_at = (int(at(array, group_count, torch.int64)[g]) for array in (aarray, barray, carray))
        left, right = at(a_at, m * k, torch.bfloat16).view(m, k), at(b_at, n * k, torch.bfloat16).view(n, k)
        alpha = at(alpha_array, group_count, torch.float32)[g]
        at(c_at, m * n, torch.bfloat16).view(n, m).copy_(done(alpha * (right.float() @ left.float().T)))


class DataType(enum.Enum):
    bf16 = 1
    f32 = 2


class LayoutType(enum.Enum):
    RowMajor = 1
    ColumnMajor = 2


class GroupedGemm:
    def __init__(
        self, A=None, B=None, C=None, D=None, alpha=1.0, beta=0.0, element_accumulator=None, element=None, layout=None,
        element_A=None, element_B=None, element_C=None, element_D=None, layout_A=None, layout_B=None, layout_C=None,
        cc=None,
    ):  # fmt: skip
        assert (layout_A, layout_B, layout_C) == (LayoutType.RowMajor, LayoutType.ColumnMajor, LayoutType.RowMajor)
        self.operation = types.SimpleNamespace(run=self._run)

    def run(self, A, B, C, D, alpha=None, beta=None, sync=True, print_module=False, stream=None):
        assert all(b.stride(0) == 1 for b in B)
        self._run((A, B, D))
        return A, B, D

    def _run(self, arguments):
        for a, b, d in zip(*arguments, strict=True):
            d.copy_(done(a.float() @ b.float()))
