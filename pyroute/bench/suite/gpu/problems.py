"""The work that columns compete at on a GPU: inputs as tensors, and the distance of a result from the answer.

Weights and rows are random: zeros run faster. Products and layers are compared with float64 at some rows, the gate with
the NumPy backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import pyroute

from ...._device.arrays import DeviceArray
from ....pytorch import _tensors
from ....quantization import Fp8Array
from ....router_config import RouterConfig
from .peers import Calls

TENSORS = tuple[torch.Tensor, ...]


def on_device(t: torch.Tensor) -> DeviceArray:
    made: DeviceArray = _tensors.array("bench", "tensor", t)
    return made


def tensor(x: Any) -> torch.Tensor:
    return _tensors.tensor(x)


def fp8(x: torch.Tensor, block: tuple[int, int], offsets: Any = None) -> Fp8Array:
    return pyroute.quantize_fp8(on_device(x), block=block, expert_offsets=offsets)


def codes_of(q: Fp8Array) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(q.codes).view(torch.float8_e4m3fn), tensor(q.scales)


def worst_row(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest |row - exact| / |exact| in the 2-norm; infinite for a NaN or another shape."""
    if got.shape != exact.shape or not torch.isfinite(got.float()).all():
        return float("inf")
    exact = exact.double()
    distance = (got.double() - exact).norm(dim=-1)
    return float((distance / exact.norm(dim=-1).clamp(min=1e-300)).max()) if exact.numel() else 0.0


@dataclasses.dataclass
class Gate:
    logits: Sequence[torch.Tensor]  # float32 [T, E] each
    bias: torch.Tensor | None  # only where experts are chosen by sigmoid scores plus a bias
    config: RouterConfig

    @functools.cached_property
    def exact(self) -> pyroute.Gating:
        logits, bias = (None if x is None else x.cpu().numpy() for x in (self.logits[0], self.bias))
        return pyroute.topk_gating(logits, self.config, bias=bias, backend="numpy")

    def error(self, weights: torch.Tensor, ids: torch.Tensor) -> float:
        """Relative error of the worst weight; one token in a thousand may choose otherwise, where two keys tie."""
        exact, (tokens, experts) = self.exact, self.logits[0].shape
        if tuple(ids.shape) != exact.topk_idx.shape or tuple(weights.shape) != exact.topk_idx.shape:
            return float("inf")
        ids = ids.long().cpu()
        if tokens and (int(ids.min()) < 0 or int(ids.max()) >= experts):
            return float("inf")
        found, right = torch.zeros(2, tokens, experts, dtype=torch.float64)
        found.scatter_(1, ids, weights.double().cpu())
        right.scatter_(1, torch.from_numpy(exact.topk_idx).long(), torch.from_numpy(exact.topk_weights).double())
        same = ((found != 0) == (right != 0)).all(dim=1)
        if int((~same).sum()) > tokens // 1000 or not torch.isfinite(found).all():
            return float("inf")
        return float(((found - right).abs() / torch.where(right != 0, right, 1))[same].max()) if same.any() else 0.0


@dataclasses.dataclass
class Moves:
    """Tokens [T, H], the rows [T * k, H] of their experts in the order of a plan, and the weights of the way back."""

    x: torch.Tensor
    ids: torch.Tensor  # int32 [T, k]
    weights: torch.Tensor  # float32 [T, k]
    num_experts: int

    @functools.cached_property
    def plan(self) -> pyroute.RoutePlan:
        return pyroute.plan_routes(on_device(self.ids), self.num_experts)

    @functools.cached_property
    def token_of(self) -> torch.Tensor:
        return tensor(self.plan.row_to_token).long()

    @functools.cached_property
    def row_of(self) -> torch.Tensor:
        return tensor(self.plan.token_to_row).long()

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        return self.x[self.token_of]

    @functools.cached_property
    def routing_map(self) -> torch.Tensor:
        """bool [T, E]"""
        empty = torch.zeros(self.x.shape[0], self.num_experts, dtype=torch.bool, device=self.x.device)
        return empty.scatter_(1, self.ids.long(), True)

    @functools.cached_property
    def sums(self) -> torch.Tensor:
        """In parts: float32 rows of every slot would fill the card."""
        parts = zip(self.row_of.split(512), self.weights.split(512), strict=True)
        return torch.cat([(self.rows[r].float() * w[..., None]).sum(dim=1) for r, w in parts])


@dataclasses.dataclass
class Products:
    """Rows [E * rows, K], weights [E, N, K] and a gradient [E * rows, N], in bfloat16 and FP8."""

    a: torch.Tensor
    w: torch.Tensor
    rows: int  # of every expert

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return torch.arange(self.w.shape[0] + 1, device=self.a.device, dtype=torch.int64) * self.rows

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        return self.offsets[1:].to(torch.int32)

    @functools.cached_property
    def grad(self) -> torch.Tensor:
        return torch.randn(self.a.shape[0], self.w.shape[1], device=self.a.device).to(torch.bfloat16)

    @functools.cached_property
    def a8(self) -> Fp8Array:
        return fp8(self.a, (1, 128))

    @functools.cached_property
    def w8(self) -> Fp8Array:
        return fp8(self.w, (128, 128))

    @property
    def a_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        return codes_of(self.a8)

    @property
    def w_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        return codes_of(self.w8)

    @functools.cached_property
    def sample(self) -> torch.Tensor:
        return torch.linspace(0, self.a.shape[0] - 1, 32, device=self.a.device).long()

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """Some rows' first columns of the product of the bfloat16 operands, in float64."""
        pairs = zip(self.sample, self.sample // self.rows, strict=True)
        return torch.stack([self.w[e, :64].double() @ self.a[r].double() for r, e in pairs])

    def error(self, d: torch.Tensor) -> float:
        total, n = self.a.shape[0], self.w.shape[1]
        return (
            worst_row(d.reshape(total, n)[self.sample][:, :64], self.exact) if d.numel() == total * n else float("inf")
        )

    def error_of_rows(self, d: torch.Tensor) -> float:
        """Of the last expert's first rows in the gradient of a."""
        last = slice((self.w.shape[0] - 1) * self.rows, None)
        exact = self.grad[last][:32].double() @ self.w[-1, :, :64].double()
        return worst_row(d[last][:32, :64], exact) if d.shape == self.a.shape else float("inf")

    def error_of_weights(self, d: torch.Tensor) -> float:
        """Of some rows of the last expert's weights."""
        last = slice((self.w.shape[0] - 1) * self.rows, None)
        exact = self.grad[last, :64].double().T @ self.a[last].double()
        return worst_row(d[-1, :64], exact) if d.shape == self.w.shape else float("inf")


@dataclasses.dataclass
class Layer:
    """Routed experts for given ids and weights: bfloat16 tensors that require gradients, and the one that comes in."""

    x: torch.Tensor  # [T, H]
    ids: torch.Tensor  # int32 [T, k]
    weights: torch.Tensor  # float32 [T, k]
    w_gate_up: torch.Tensor  # [E, 2I, H]
    w_down: torch.Tensor  # [E, H, I]

    @property
    def inputs(self) -> TENSORS:
        return self.x, self.weights, self.w_gate_up, self.w_down

    @property
    def detached(self) -> TENSORS:
        return tuple(t.detach() for t in self.inputs)

    @functools.cached_property
    def upstream(self) -> torch.Tensor:
        return torch.randn_like(self.x)

    @property
    def codes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes and scales of both weights."""
        return [codes_of(fp8(w.detach(), (128, 128))) for w in (self.w_gate_up, self.w_down)]

    def forward(self, layer: Callable[..., torch.Tensor], *, gate_up: Callable[..., Any] = lambda w: w) -> Calls:
        """``layer(x, ids, weights, w_gate_up, w_down)`` without gradients; ``gate_up`` makes its order of rows."""
        x, weights, w_gate_up, w_down = self.detached
        own = gate_up(w_gate_up)
        return Calls([torch.no_grad()(lambda: layer(x, self.ids, weights, own, w_down))])

    def step(
        self,
        layer: Callable[..., torch.Tensor],
        *,
        gate_up: Callable[..., Any] = lambda w: w,
        gate_up_back: Callable[..., Any] = lambda grad: grad,
    ) -> Calls:
        """Forward and backward; ``gate_up_back`` undoes the order for the comparison, which is not timed."""
        x, weights, w_gate_up, w_down = self.inputs
        own = gate_up(w_gate_up.detach()).requires_grad_()
        given = (x, weights, own, w_down)

        def run() -> Any:
            y = layer(x, self.ids, weights, own, w_down)
            return y.detach(), torch.autograd.grad(y, given, self.upstream)

        def read(got: Any) -> Any:
            y, (grad_x, grad_weights, grad_gate_up, grad_down) = got
            return y, (grad_x, grad_weights, gate_up_back(grad_gate_up), grad_down)

        return Calls([run], read, graph=False)

    @functools.cached_property
    def sample(self) -> torch.Tensor:
        return torch.linspace(0, self.x.shape[0] - 1, 8, device=self.x.device).long().unique()

    def slot(self, tokens: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some tokens at one expert, in float64: y, the gradients of y's input and of z, and the activation."""
        w_gate_up, w_down = self.w_gate_up[expert].detach().double(), self.w_down[expert].detach().double()
        gate, up = (self.x[tokens].detach().double() @ w_gate_up.T).chunk(2, dim=-1)
        s = gate.sigmoid()
        hidden = gate * s * up
        grad_hidden = self.upstream[tokens].double() @ w_down
        grad_z = torch.cat([grad_hidden * up * s * (1 + gate * (1 - s)), grad_hidden * gate * s], dim=-1)
        return hidden @ w_down.T, grad_z @ w_gate_up, grad_z, hidden

    @functools.cached_property
    def exact(self) -> TENSORS:
        """float64: y, the gradients of x and of the weights for some tokens, and the usual size of the last."""
        parts = []
        for t in self.sample:
            slots = [self.slot(t[None], int(e)) for e in self.ids[t]]
            w = self.weights[t].detach().double()
            y, grad = (torch.cat([part[i] for part in slots]) for i in (0, 1))
            up = self.upstream[t].double()
            # gradients of the weights are products of long rows, which may cancel: this is the size of what does not
            typical = up.norm() * y.norm()[None] / len(up) ** 0.5
            parts.append((w @ y, w @ grad, y @ up, typical))
        return tuple(torch.stack(column) for column in zip(*parts, strict=True))

    @functools.cached_property
    def exact_weights(self) -> TENSORS:
        """float64: some rows of the gradients of the first token's first expert."""
        e = int(self.ids[0, 0])
        tokens, slots = (self.ids == e).nonzero(as_tuple=True)
        w = self.weights[tokens, slots].detach().double()[:, None]
        *_, grad_z, hidden = self.slot(tokens, e)
        rows = (w * grad_z[:, :8]).T @ self.x[tokens].detach().double()
        return rows, (w * self.upstream[tokens, :8].double()).T @ hidden

    def error(self, y: torch.Tensor) -> float:
        return worst_row(y[self.sample], self.exact[0]) if y.shape == self.x.shape else float("inf")

    def error_of_step(self, got: Any) -> float:
        """Of y and every gradient, the worst."""
        y, (grad_x, grad_weights, grad_gate_up, grad_down) = got
        if any(g.shape != t.shape for g, t in zip(got[1], self.inputs, strict=True)):
            return float("inf")
        e, (_, rows, weights, typical) = int(self.ids[0, 0]), self.exact
        sizes = torch.maximum(weights.norm(dim=-1, keepdim=True), typical)
        pairs = [(grad_x[self.sample], rows), (grad_gate_up[e, :8], self.exact_weights[0])]
        pairs += [(grad_down[e, :8], self.exact_weights[1])]
        of_weights = ((grad_weights[self.sample].double() - weights).norm(dim=-1, keepdim=True) / sizes).max()
        return max(self.error(y), float(of_weights.nan_to_num(torch.inf)), *(worst_row(a, b) for a, b in pairs))
