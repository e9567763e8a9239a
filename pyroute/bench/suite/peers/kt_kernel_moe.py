"""kt-kernel (KTransformers): the one other CPU library that multiplies experts in 128 x 128 block FP8.

Its pool spins on for longer than the pause between columns, so it runs alone.
"""

from __future__ import annotations

import kt_kernel
import numpy as np
import torch
from kt_kernel import kt_kernel_ext
from kt_kernel.kt_kernel_ext import moe

from . import Work, column, package_version
from .torch_eager import array, tensor

NAME = "kt-kernel"
_threads = 1
_pools: dict[int, object] = {}
CLASSES = {"fp8": ("AMXFP8_MOE", "AVX2FP8_MOE"), "bfloat16": ("AMXBF16_MOE", "AVX2BF16_MOE")}  # AMX: and AVX-512


def version() -> str:
    return f"{package_version('kt-kernel')} {kt_kernel.__cpu_variant__}"


def set_threads(n: int) -> None:
    global _threads
    _threads = n


def pool():
    """One pool of threads for each number of them, for the life of the process."""
    if _threads not in _pools:
        config = kt_kernel_ext.WorkerPoolConfig()
        config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [_threads]
        _pools[_threads] = kt_kernel_ext.CPUInfer(config)
    return _pools[_threads]


def loaded(p, kind: str):
    """The library's own copy of the weights."""
    s, (gate_up, down) = p.shape, p.weights.pair(kind)
    infer, on_gpu = pool(), torch.zeros(s.num_experts, dtype=torch.bool)
    config = moe.MOEConfig(s.num_experts, s.top_k, s.hidden, s.intermediate, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, infer.backend_, 1024
    codes = [w.codes.view(np.uint8) if kind == "fp8" else w.view(np.uint8) for w in (gate_up, down)]
    half = codes[0].shape[1] // 2
    config.gate_projs = [[c[:half].ctypes.data for c in codes[0]]]
    config.up_projs = [[c[half:].ctypes.data for c in codes[0]]]
    config.down_projs = [[c.ctypes.data for c in codes[1]]]
    if kind == "fp8":
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 8, 128, False
        half = gate_up.scales.shape[1] // 2
        config.gate_scales = [[c[:half].ctypes.data for c in gate_up.scales]]
        config.up_scales = [[c[half:].ctypes.data for c in gate_up.scales]]
        config.down_scales = [[c.ctypes.data for c in down.scales]]
    else:
        config.gate_scales = config.up_scales = config.down_scales = [[0] * s.num_experts]
    made = next(getattr(moe, name) for name in CLASSES[kind] if hasattr(moe, name))(config)
    order = torch.arange(s.num_experts, dtype=torch.int64)
    infer.submit(made.load_weights_task(order.data_ptr()))
    infer.sync()
    return made, (on_gpu, order, codes)


def layer(p, kind: str):
    if p.wide:
        return None
    infer, (made, _) = pool(), p.weights.memo(("kt", kind, _threads), lambda: loaded(p, kind))
    x, out = tensor(p.x16), torch.zeros(p.x16.shape, dtype=torch.bfloat16)
    ids, weights = torch.from_numpy(p.gating.topk_idx).long(), tensor(p.gating.topk_weights)
    count, k = torch.tensor([len(x)], dtype=torch.int32), ids.shape[1]

    def run():
        pointers = ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr()
        infer.submit(made.forward_task(count.data_ptr(), k, *pointers, False))
        infer.sync()
        return out

    return Work(run, array)


@column("layer", "kt-kernel FP8", kind="fp8", alone=True)
def layer_fp8(p):
    return layer(p, "fp8")


@column("layer", "kt-kernel bfloat16", kind="bfloat16", alone=True)
def layer_bfloat16(p):
    return layer(p, "bfloat16")
