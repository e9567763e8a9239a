"""The same work in PyTorch, and in DeepGEMM where it is installed; a column that cannot be made says why it fails."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ....pytorch._tensors import tensor
from ..peers import package_version
from ..peers.torch_eager import combine, grouped_sigmoid
from .clock import Column


def torch_column(name: str, call: Callable[[], Any], **options: Any) -> Column:
    return Column(name, [call], peer="torch", version=torch.__version__, **options)


def eager_gate(logits: list[torch.Tensor], bias: torch.Tensor, c: Any) -> Column:
    def of(z: torch.Tensor) -> Callable[[], Any]:
        return lambda: grouped_sigmoid(z, bias, c.num_groups, c.topk_groups, c.top_k, c.scaling_factor)

    return Column("torch eager", [of(z) for z in logits], peer="torch", version=torch.__version__)


def index_rows(x: torch.Tensor, token_of: torch.Tensor) -> Column:
    return torch_column("torch index_select", lambda: torch.index_select(x, 0, token_of))


def weighted_sum(rows: torch.Tensor, row_of: torch.Tensor, weights: torch.Tensor) -> Column:
    by_row = torch.empty(rows.shape[0], 1, dtype=rows.dtype, device=rows.device)
    by_row[row_of.reshape(-1), 0] = weights.reshape(-1).to(rows.dtype)
    shape = (*row_of.shape, rows.shape[1])
    return torch_column("torch mul, index, sum", lambda: combine(rows, by_row, row_of.reshape(-1), shape))


def gemm(o: Any) -> Iterator[Column]:
    ends = o.offsets[1:].to(torch.int32)
    transposed = o.w.transpose(1, 2)
    yield torch_column("torch grouped_mm bfloat16", lambda: torch._grouped_mm(o.a, transposed, offs=ends))
    if o.a.is_cuda:
        yield torch_column("torch scaled_grouped_mm FP8", _scaled(o, ends))
        yield _deep_gemm(o)


def _scaled(o: Any, ends: torch.Tensor) -> Callable[[], Any]:
    """One scale per row of a and per output column: the recipe that PyTorch has on Hopper."""
    scale_a = o.a.abs().amax(dim=1).float() / 448
    scale_b = o.w.abs().amax(dim=2).float() / 448
    a = (o.a / scale_a[:, None]).to(torch.float8_e4m3fn)
    b = (o.w / scale_b[..., None]).to(torch.float8_e4m3fn).transpose(1, 2)
    return lambda: torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs=ends, out_dtype=torch.bfloat16)


def _import_deep_gemm() -> tuple[Any, Column]:
    """The module or None, and the column that raises what importing it raised."""

    def fail() -> Any:
        raise failure

    failure: Exception = ImportError()
    column = Column("DeepGEMM", [fail], peer="deep_gemm", version="")
    try:
        return importlib.import_module("deep_gemm"), column
    except Exception as error:  # it may also fail to load on this card
        failure = error
        return None, column


def _deep_gemm(o: Any) -> Column:
    """Its contiguous layout takes segments in multiples of 128 rows; fewer rows go through the masked one."""
    deep_gemm, missing = _import_deep_gemm()
    if deep_gemm is None:
        return missing
    experts, n, k = o.w.shape
    a, w = _codes(o.a8), _codes(o.w8)
    out = torch.empty(o.a.shape[0], n, dtype=torch.bfloat16, device=o.a.device)
    if o.rows % 128 == 0:
        expert = torch.arange(experts, device=o.a.device, dtype=torch.int32).repeat_interleave(o.rows)

        def run() -> torch.Tensor:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, w, out, expert, disable_ue8m0_cast=True)
            return out
    else:
        most = 128  # rows of an expert's part of the masked layout
        codes = torch.zeros(experts, most, k, dtype=torch.float8_e4m3fn, device=o.a.device)
        scales = torch.ones(experts, most, a[1].shape[1], device=o.a.device)
        codes.view(torch.uint8)[:, : o.rows] = a[0].view(torch.uint8).view(experts, o.rows, k)
        scales[:, : o.rows] = a[1].view(experts, o.rows, -1)
        padded = torch.empty(experts, most, n, dtype=torch.bfloat16, device=o.a.device)
        counts = torch.full((experts,), o.rows, dtype=torch.int32, device=o.a.device)

        def run() -> torch.Tensor:
            deep_gemm.m_grouped_fp8_gemm_nt_masked((codes, scales), w, padded, counts, o.rows, disable_ue8m0_cast=True)
            return padded[:, : o.rows]

    return Column("DeepGEMM", [run], peer="deep_gemm", version=_version())


def _version() -> str:
    for distribution in ("sgl-deep-gemm", "deep-gemm", "deep_gemm"):
        try:
            return package_version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _codes(q: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(q.codes).view(torch.float8_e4m3fn), tensor(q.scales)


def dgrad(o: Any, grad: torch.Tensor) -> Iterator[Column]:
    ends = o.offsets[1:].to(torch.int32)
    yield torch_column("torch grouped_mm bfloat16", lambda: torch._grouped_mm(grad, o.w, offs=ends))


def wgrad(o: Any, grad: torch.Tensor) -> Iterator[Column]:
    ends = o.offsets[1:].to(torch.int32)
    yield torch_column("torch grouped_mm bfloat16", lambda: torch._grouped_mm(grad.t(), o.a, offs=ends))
    if grad.is_cuda:
        yield _deep_gemm_wgrad(o, grad)


def _deep_gemm_wgrad(o: Any, grad: torch.Tensor) -> Column:
    """Both operands with the tokens of an expert contiguous, float32 sums added to what is there."""
    deep_gemm, missing = _import_deep_gemm()
    if deep_gemm is None:
        return missing
    experts, n, k = o.w.shape
    sizes = [o.rows] * experts
    counts = torch.tensor(sizes, dtype=torch.int32, device=grad.device)
    left, right = (_by_channel(x, o.rows) for x in (grad, o.a))
    out = torch.zeros(experts, n, k, device=grad.device)  # it adds

    def run() -> torch.Tensor:
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(left, right, out, sizes, counts, out)
        return out

    def first() -> torch.Tensor:
        out.zero_()
        return run()

    return Column("DeepGEMM", [run], peer="deep_gemm", version=_version(), first=first)


def _by_channel(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of each expert as [channels, rows], one after the other; scales of 128 tokens, [channels, tokens / 128]."""
    blocks = x.float().view(-1, 128, x.shape[1])
    scales = blocks.abs().amax(dim=1).clamp(1e-4) / 448
    codes = (blocks / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8).view(-1, rows, x.shape[1])
    return codes.transpose(1, 2).contiguous().view(-1).view(torch.float8_e4m3fn), scales.t()


def grouped_mm_layer(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    """A layer as it is written in PyTorch: sort, gather, grouped_mm, SwiGLU, grouped_mm, weigh and add."""
    experts, top_k = w_down.shape[0], ids.shape[1]
    order = ids.reshape(-1).argsort(stable=True)
    ends = torch.bincount(ids.reshape(-1), minlength=experts).cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    gate, up = torch._grouped_mm(rows, w_gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    out = torch._grouped_mm(hidden, w_down.transpose(1, 2), offs=ends)
    out = out * weights.reshape(-1)[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // top_k, out)


def layer(step: Callable[[Callable[..., torch.Tensor]], Callable[[], Any]]) -> Column:
    return torch_column("torch grouped_mm bfloat16", step(grouped_mm_layer), graph=False)
