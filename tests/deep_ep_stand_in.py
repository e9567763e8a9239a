"""What pyroute calls of DeepEP's ``Buffer``, over gloo: its documented arguments and results, not its kernels."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist


class Buffer:
    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        return types.SimpleNamespace(
            get_nvl_buffer_size_hint=lambda row_bytes, ranks: row_bytes * ranks,
            get_rdma_buffer_size_hint=lambda row_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Any, num_experts: int) -> Any:
        assert topk_idx.dtype == torch.int64
        per_rank = num_experts // self.group.size()
        of_rank = torch.where(topk_idx >= 0, topk_idx // per_rank, -1)
        in_rank = (of_rank[:, :, None] == torch.arange(self.group.size())).any(dim=1)
        by_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return in_rank.sum(dim=0).int(), None, by_expert.int(), in_rank, None

    def dispatch(
        self, x: Any, handle: Any = None, topk_idx: Any = None, topk_weights: Any = None, **layout: Any
    ) -> Any:
        if handle is not None:
            return self._send(x, handle), None, None, None, None, None
        in_rank = layout["is_token_in_rank"]
        sent = layout["num_tokens_per_rank"].tolist()
        arriving = torch.empty(self.group.size(), dtype=torch.int32)
        dist.all_to_all_single(arriving, layout["num_tokens_per_rank"], group=self.group)
        handle = (in_rank, sent, arriving.tolist())
        per_rank = len(layout["num_tokens_per_expert"]) // self.group.size()
        token, rank = in_rank.T.nonzero().flip(1).unbind(1)
        ids = topk_idx[token] - per_rank * rank[:, None]
        ids = torch.where((ids >= 0) & (ids < per_rank) & (topk_idx[token] >= 0), ids, -1)
        weights = torch.where(ids >= 0, topk_weights[token], 0)
        rows = tuple(self._send(part, handle) for part in x) if isinstance(x, tuple) else self._send(x, handle)
        assert isinstance(x, tuple) or x.dtype == torch.bfloat16
        return rows, self._swap(ids, sent, handle[2]), self._swap(weights, sent, handle[2]), [], handle, None

    def combine(self, x: Any, handle: Any, topk_weights: Any = None) -> Any:
        assert x.dtype == torch.bfloat16
        return self._sum(x, handle), None if topk_weights is None else self._sum(topk_weights, handle), None

    def _send(self, x: Any, handle: Any) -> Any:
        token = handle[0].T.nonzero()[:, 1]
        return self._swap(x.view(torch.uint8).view(len(x), -1)[token], *handle[1:]).view(x.dtype)

    def _sum(self, rows: Any, handle: Any) -> Any:
        in_rank, sent, arriving = handle
        back = self._swap(rows, arriving, sent)
        total = torch.zeros(len(in_rank), rows.shape[1])
        return total.index_add(0, in_rank.T.nonzero()[:, 1], back.float()).to(rows.dtype)

    def _swap(self, rows: Any, sent: list[int], arriving: list[int]) -> Any:
        received = rows.new_empty(sum(arriving), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), arriving, sent, group=self.group)
        return received
