"""Megatron-Core: pyroute behind its fusion switches on CPU tensors, and a router for its layer spec.

    from pyroute.integrations import megatron as pyroute_megatron

    pyroute_megatron.install()  # moe_router_fusion and moe_permute_fusion, without TransformerEngine
    MoESubmodules(experts=..., router=pyroute_megatron.TopKRouter)

The router needs no :func:`install`. Dispatchers, losses, process groups and checkpoints stay Megatron's.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import package_info
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.transformer.moe import grouped_gemm_util, moe_utils, router
from torch import Tensor

from ..pytorch import grouped_gemm, router_logits
from . import transformer_engine as te
from ._stack import Bindings, leave_alone, warn_if_untested, where_on_cpu

TESTED = ("0.16",)

_FUSED: dict[str, Callable[..., Any]] = {
    "fused_compute_score_for_moe_aux_loss": te.fused_compute_score_for_moe_aux_loss,
    "fused_moe_aux_loss": te.fused_moe_aux_loss,
    "fused_permute": te.moe_permute,
    "fused_permute_and_pad_with_probs": te.moe_permute_and_pad_with_probs,
    "fused_permute_with_probs": te.moe_permute_with_probs,
    "fused_sort_chunks_by_index": te.moe_sort_chunks_by_index,
    "fused_sort_chunks_by_index_with_probs": te.moe_sort_chunks_by_index_with_probs,
    "fused_topk_with_score_function": te.fused_topk_with_score_function,
    "fused_unpermute": te.moe_unpermute,
}

_bindings = Bindings()


def install() -> None:
    """Serve CPU tensors wherever Megatron asks TransformerEngine or grouped_gemm; a second call changes nothing.

    With ``moe_router_fusion`` and ``moe_permute_fusion`` the router, the balance loss and the dispatchers' permutation
    are pyroute's; ``GroupedMLP`` finds a ``grouped_gemm``. Tensors on other devices go where they went.
    """
    if _bindings:
        return
    warn_if_untested("megatron", "megatron-core", package_info.__version__, TESTED)
    for module in (moe_utils, megatron_te):
        for name, ours in _FUSED.items():
            _bindings.bind(module, name, where_on_cpu(ours, getattr(module, name, None)))
    _bindings.bind(moe_utils, "HAVE_TE", True)
    if not hasattr(moe_utils, "te_general_gemm"):  # its own router asks for the name, which only an import would give
        _bindings.bind(moe_utils, "te_general_gemm", None)
    theirs = getattr(grouped_gemm_util.ops, "gmm", None)
    ops = types.SimpleNamespace(gmm=where_on_cpu(gmm, theirs))
    _bindings.bind(grouped_gemm_util, "ops", ops)
    if grouped_gemm_util.grouped_gemm is None:
        _bindings.bind(grouped_gemm_util, "grouped_gemm", types.SimpleNamespace(ops=ops))


def uninstall() -> None:
    """Give Megatron its functions back."""
    _bindings.restore()


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """``grouped_gemm.ops.gmm``: the rows of expert e times ``b[e]``.

    Parameters
    ----------
    a : float32 or bfloat16 [num_rows, k]
    b : [num_experts, k, n]; with ``trans_b`` [num_experts, n, k]
    batch_sizes : integer [num_experts]
        Rows of each expert, in order; their sum is num_rows.

    Returns
    -------
    [num_rows, n] of a's dtype
    """
    offsets = torch.nn.functional.pad(batch_sizes.to(a.device).long().cumsum(0), (1, 0))
    return grouped_gemm(a, b, offsets, transposed=not trans_b).to(a.dtype)


class TopKRouter(router.TopKRouter):
    """Megatron's ``TopKRouter`` on pyroute: for ``MoESubmodules(router=TopKRouter)``; runs without CUDA too.

    The configuration, parameters, buffers, losses, their scale and the bias update are Megatron's. The product is
    float32 (float64 with ``moe_router_dtype="fp64"``), rounded once to the router's type; scores and choice are
    float32 whatever that type, so that experts do not tie in bfloat16. Sinkhorn routing, quantile balancing and
    routing replay are Megatron's own, said in a warning.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **options: Any) -> None:
        on_cpu = not torch.cuda.is_available()
        super().__init__(_without_buffers(config) if on_cpu else config, pg_collection, **options)
        if on_cpu:
            self._make_buffers(config)
        self.unserved = _unserved(config)
        if self.unserved:
            leave_alone("megatron", *self.unserved)

    def _make_buffers(self, config: Any) -> None:
        """Those of Megatron's constructor, which asks for them on a CUDA device."""
        self.config = config
        self.routing_type = config.moe_router_load_balancing_type
        self.enable_expert_bias = config.moe_router_enable_expert_bias
        kept = {"expert_bias": self.enable_expert_bias}
        counted = {"local_tokens_per_expert": self.enable_expert_bias}
        counted["global_tokens_per_expert"] = counted["ga_steps"] = self.get_aux_loss_coeff("global_aux_loss") > 0
        for name, wanted in {**kept, **counted}.items():
            shape = () if name == "ga_steps" else (config.num_moe_experts,)
            if wanted:
                delattr(self, name)
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32), persistent=name in kept)

    def gating(self, input: Tensor) -> Tensor:
        """The logits of ``input`` [..., hidden]."""
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype, input.dtype)
        x = input.reshape(-1, input.shape[-1])
        if dtype == torch.float64:
            logits = torch.nn.functional.linear(x.double(), self.weight.double())
        else:
            logits = router_logits(*(t.float() if t.dtype == torch.float16 else t for t in (x, self.weight)))
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return logits.to(dtype).reshape(*input.shape[:-1], -1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Dense ``probs`` and ``routing_map`` [tokens, experts] of ``logits`` [sequence, batch, experts]."""
        if self.unserved:
            return super().routing(logits, padding_mask=padding_mask, **options)
        config = self.config
        seq_length, bsz = logits.shape[:2]
        flat = logits.reshape(-1, config.num_moe_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        flat = self.apply_z_loss(flat, padding_mask=padding)
        probs, routing_map = te.fused_topk_with_score_function(
            flat, self.topk, config.moe_router_pre_softmax, config.moe_router_num_groups,
            config.moe_router_group_topk, config.moe_router_topk_scaling_factor, self.score_function, self.expert_bias,
        )  # fmt: skip
        if config.moe_expert_capacity_factor is not None:
            probs, routing_map = moe_utils.apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=config.moe_expert_capacity_factor,
                drop_policy=config.moe_token_drop_policy,
                pad_to_capacity=config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs = self._with_aux_losses(probs, flat, seq_length, bsz, padding)
        self._apply_expert_bias(routing_map, padding_mask=padding)
        return probs, routing_map

    def _with_aux_losses(
        self, probs: Tensor, logits: Tensor, seq_length: int, bsz: int, padding: Tensor | None
    ) -> Tensor:
        routing_map, scores = te.fused_compute_score_for_moe_aux_loss(logits, self.topk, self.score_function)
        if padding is not None:
            routing_map, scores = (t.masked_fill(padding[:, None], 0) for t in (routing_map, scores))
        masked = {"with_padding_mask": padding is not None}
        probs = self._apply_aux_loss(probs, scores, routing_map, **masked)
        probs = self._apply_seq_aux_loss(probs, scores, routing_map, seq_length, bsz, **masked)
        return self._apply_global_aux_loss(probs, scores, routing_map, **masked)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the load for the bias update, where a gradient will be asked for. Megatron compiles this sum."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            real = routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += real.sum(dim=0)


def _without_buffers(config: Any) -> Any:
    """The configuration of the same router with no buffer to make."""
    plain = copy.copy(config)
    plain.moe_router_enable_expert_bias = False
    plain.moe_router_load_balancing_type = "none"
    return plain


def _unserved(config: Any) -> tuple[str, str] | None:
    """A setting of the router that stays Megatron's, and why."""
    if config.moe_router_load_balancing_type == "sinkhorn":
        return "moe_router_load_balancing_type='sinkhorn'", "it chooses by iteration over the whole batch"
    if config.moe_router_load_balancing_type == "quantile_balancing":
        return (
            "moe_router_load_balancing_type='quantile_balancing'",
            "its bias moves logits, in buffers of Megatron's own",
        )
    if getattr(config, "moe_enable_routing_replay", False):
        return "moe_enable_routing_replay", "its records hold the choices of Megatron's own function"
    return None
