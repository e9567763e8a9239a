"""Modules with the public signatures of the GPU peers, computing in plain torch on the CPU.

Each function has the parameters of the version that the peer's file names, in order and with their defaults, so that a
call that the library would refuse is refused here. ``Faults`` makes all of them wrong, or raise.
"""

from __future__ import annotations

import types
from typing import Any

from . import nvidia, serving, training
from .shared import Faults

__all__ = ["Faults", "modules"]


def modules() -> dict[str, types.ModuleType]:
    """By name, with what each holds."""
    held: dict[str, dict[str, Any]] = {
        "deep_gemm": {
            f.__name__: f
            for f in (
                nvidia.m_grouped_fp8_gemm_nt_contiguous,
                nvidia.m_grouped_fp8_gemm_nt_masked,
                nvidia.k_grouped_fp8_gemm_nt_contiguous,
            )
        },
        "transformer_engine.common.recipe": {"Float8BlockScaling": nvidia.Float8BlockScaling},
        "transformer_engine.pytorch": {
            "moe_permute": nvidia.moe_permute,
            "moe_unpermute": nvidia.moe_unpermute,
            "GroupedLinear": nvidia.GroupedLinear,
            "fp8_autocast": nvidia.fp8_autocast,
        },
        "transformer_engine.pytorch.router": {"fused_topk_with_score_function": nvidia.fused_topk_with_score_function},
        "vllm._custom_ops": {"grouped_topk": serving.grouped_topk},
        "vllm.model_executor.layers.fused_moe": {"fused_experts": serving.vllm_fused_experts},
        "vllm.model_executor.layers.fused_moe.config": {"fp8_w8a8_moe_quant_config": serving.fp8_w8a8_moe_quant_config},
        "vllm.model_executor.layers.fused_moe.moe_permute_unpermute": {
            "moe_permute": serving.vllm_permute,
            "moe_unpermute": serving.vllm_unpermute,
        },
        "sgl_kernel": {
            "moe_fused_gate": serving.moe_fused_gate,
            "fp8_blockwise_scaled_grouped_mm": serving.fp8_blockwise_scaled_grouped_mm,
        },
        "sglang.srt.layers.moe.fused_moe_triton.fused_moe": {"fused_experts": serving.sglang_fused_experts},
        "sglang.srt.layers.moe.moe_runner": {"MoeRunnerConfig": serving.MoeRunnerConfig},
        "sglang.srt.layers.moe.topk": {"StandardTopKOutput": serving.StandardTopKOutput},
        "sonicmoe.enums": {"ActivationType": training.ActivationType},
        "sonicmoe.functional": {"moe_general_routing_inputs": training.moe_general_routing_inputs},
        "scattermoe.parallel_experts": {
            "flatten_sort_count": training.flatten_sort_count,
            "parallel_linear": training.parallel_linear,
        },
        "megablocks": {"ops": types.SimpleNamespace(gather=training.gather, scatter=training.scatter)},
        "grouped_gemm": {
            "ops": types.SimpleNamespace(gmm=training.gmm),
            "backend": types.SimpleNamespace(gmm=training.backend_gmm),
        },
        "nvmath": {"CudaDataType": nvidia.CudaDataType},
        "nvmath.bindings": {
            "cublas": types.SimpleNamespace(
                create=lambda: 1,
                set_stream=lambda handle, stream_id: None,
                Operation=nvidia.Operation,
                ComputeType=nvidia.ComputeType,
                gemm_grouped_batched_ex=nvidia.gemm_grouped_batched_ex,
            )
        },
        "cutlass_cppgen": {
            "DataType": nvidia.DataType,
            "LayoutType": nvidia.LayoutType,
            "op": types.SimpleNamespace(GroupedGemm=nvidia.GroupedGemm),
        },
        "cuda": {"cuda": types.SimpleNamespace(CUstream=lambda address: address)},
    }
    made: dict[str, types.ModuleType] = {}
    for name, attributes in held.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            made.setdefault(path, types.ModuleType(path))
            if i > 1:
                setattr(made[".".join(parts[: i - 1])], parts[i - 1], made[path])
        vars(made[name]).update(attributes)
    return made
