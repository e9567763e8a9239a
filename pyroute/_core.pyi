from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def threads_available() -> bool: ...
def empty(shape: tuple[int, ...] | list[int], dtype: Any) -> _Array: ...
def is_plain(x: Any, dtypes: tuple[str, ...], axes: tuple[tuple[str, int | None], ...] | None) -> bool: ...
def is_output(out: Any, dtype: Any, axes: tuple[tuple[str, int | None], ...], inputs: tuple[Any, ...]) -> bool: ...
def are_offsets(x: Any, num_rows: int, num_experts: int | None) -> bool: ...
def name_dtypes(names: dict[Any, str]) -> None: ...
def memory_info() -> tuple[int, int, int, int, int]: ...
def set_memory_limit(bytes: int) -> None: ...
def release_memory() -> int: ...
def set_memory_fill(byte: int) -> None: ...
def plan_routes(topk_idx: _Array, num_experts: int, alignment: int) -> tuple[_Array, _Array, _Array, _Array]: ...
def permute(x: _Array, row_to_token: _Array, token_to_row: _Array, rows: _Array) -> None: ...
def permute_quantize(
    x: _Array,
    row_to_token: _Array,
    token_to_row: _Array,
    block_cols: int,
    power_of_two: bool,
    codes: _Array,
    scales: _Array,
) -> None: ...
def unpermute(
    rows: _Array, row_to_token: _Array, token_to_row: _Array, topk_weights: _Array | None, out: _Array
) -> None: ...
def unpermute_backward(
    grad_y: _Array,
    rows: _Array,
    row_to_token: _Array,
    token_to_row: _Array,
    topk_weights: _Array,
    grad_rows: _Array,
    grad_topk_weights: _Array,
) -> None: ...
def quantize_fp8(
    x: _Array,
    block: tuple[int, int],
    format: str,
    power_of_two: bool,
    expert_offsets: _Array | None,
    codes: _Array,
    scales: _Array,
) -> None: ...
def dequantize_fp8(
    codes: _Array, scales: _Array, block: tuple[int, int], format: str, expert_offsets: _Array | None, out: _Array
) -> None: ...
def compiler() -> str: ...
def probe_fma(rounds: int, threads: int) -> float: ...
def probe_read(source: np.ndarray[Any, Any], threads: int) -> int: ...
def probe_copy(destination: np.ndarray[Any, Any], source: np.ndarray[Any, Any], threads: int) -> int: ...
def moe_activate(
    gate_up: _Array,
    bias: _Array | None,
    expert_offsets: _Array,
    row_to_token: _Array,
    row_weights: _Array | None,
    activation: tuple[int, float, float, float],
    hidden: _Array,
) -> None: ...
def moe_activate_backward(
    gate_up: _Array,
    bias: _Array | None,
    expert_offsets: _Array,
    row_to_token: _Array,
    row_weights: _Array | None,
    activation: tuple[int, float, float, float],
    grad_hidden: _Array,
    hidden: _Array,
    grad_gate_up: _Array,
    grad_row_weights: _Array | None,
) -> None: ...
def moe_add_bias(
    rows: _Array, bias: _Array, expert_offsets: _Array, row_to_token: _Array, row_weights: _Array | None
) -> None: ...
def moe_add_bias_dots(
    rows: _Array, bias: _Array, expert_offsets: _Array, row_to_token: _Array, dots: _Array
) -> None: ...
def moe_bias_grad(
    rows: _Array, expert_offsets: _Array, row_to_token: _Array, row_weights: _Array | None, grad_bias: _Array
) -> None: ...
def grouped_gemm(
    a: tuple[Any, ...],
    b: tuple[Any, ...],
    expert_offsets: _Array,
    out: _Array,
    out_type: str,
    transposed: bool,
) -> None: ...
def grouped_gemm_wgrad(
    grad_out: tuple[Any, ...],
    a: tuple[Any, ...],
    expert_offsets: _Array,
    out: _Array,
    accumulate: bool,
) -> None: ...
def topk_gating(
    router: tuple[Any, ...],
    logits: _Array,
    type: str,
    bias: _Array | None,
    given_idx: _Array | None,
    token_mask: _Array | None,
    topk_idx: _Array,
    topk_weights: _Array,
    tokens_per_expert: _Array,
) -> None: ...
def topk_gating_backward(
    router: tuple[Any, ...],
    grad_weights: _Array,
    logits: _Array,
    type: str,
    topk_idx: _Array,
    token_mask: _Array | None,
    fractions: _Array | None,
    scales: _Array | None,
    sequence: _Array | None,
    z_scale: float,
    grad_logits: _Array,
) -> None: ...
def expert_choice(
    logits: _Array, type: str, tokens: _Array, keys: _Array, token_idx: _Array, token_weights: _Array
) -> None: ...
def gating_loss_terms(
    score: str,
    logits: _Array,
    type: str,
    fractions: _Array | None,
    scales: _Array | None,
    sequence: _Array | None,
    terms: _Array,
) -> None: ...
def __getattr__(name: str) -> Any: ...
