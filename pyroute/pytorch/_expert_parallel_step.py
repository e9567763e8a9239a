"""One call of an expert-parallel layer, forward and backward, as two autograd functions with the shared expert between.

    x --- ToExperts: dispatch, experts, start of combine --- token --- FromExperts: end of combine, weighted sum --- y
                                            shared(x), while the results travel

Backward, autograd takes the functions in reverse of the order in which they were called: FromExperts starts sending
the gradients of y, the shared expert runs its backward pass while they travel, ToExperts waits for them. ``token`` is
an empty tensor that ties the two together.

What keeps the bytes those of one process:

- A rank's rows arrive in the order of ranks, then of its tokens, then of slots. The stable order of ``plan_routes``
  makes every expert's rows those of the ranks' batches one after the other, so sums over an expert's rows have the
  order that they would have there.
- Every routed slot's result comes back as a row of its own, and so does its gradient: the sum over a token's slots
  is made where the token lives, by the same operation, in the order of slots.
- An expert sees each row as a token with one slot. With weights on the output the weight there is 1 going forward,
  which multiplies exactly, and the routing weight going backward, where the gradient passes through it. Weights on
  the input multiply before the rows are sent, and their gradients are made where the tokens live.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._activation import Activation
from .._moe_arguments import MoeGradients, WeightOn
from . import moe
from ._expert_exchange import Agreement, Arriving, Ranks
from ._expert_payload import Payload, pack, unpack
from ._expert_routes import Arrived, Route
from .permutation import RoutePlan, permute, unpermute, unpermute_backward_kernel
from .quantization import dequantize_fp8


class LayerOptions(NamedTuple):
    """What a call needs to know of the layer besides its parameters."""

    activation: Activation
    limit: float | None
    alpha: float | None
    weight_on: WeightOn
    precision: moe.Precision | None
    payload: Payload | None

    @property
    def of_experts(self) -> tuple[Any, ...]:
        """The options of the op on one rank; weights on the input are multiplied before rows are sent."""
        on = "output" if self.weight_on == "input" else self.weight_on
        block = (1, 128)
        return (block, block, self.activation, self.limit, self.alpha, on, "", self.precision or "")


@dataclasses.dataclass(eq=False)
class Step:
    """What both functions of a call share."""

    ranks: Ranks
    options: LayerOptions
    route: Route
    agreed: Agreement
    results: Arriving | None = None
    gradients: Arriving | None = None

    @property
    def weights_travel(self) -> bool:
        on = self.options.weight_on
        return on == "pre_down" or (on == "output" and self.agreed.records)


class ToExperts(torch.autograd.Function):
    """From x and the routing weights to results on their way back."""

    @staticmethod
    def forward(ctx: Any, step: Step, x: Tensor, topk_weights: Tensor, anchor: Any, *params: Tensor | None) -> Tensor:
        ranks, route, agreed, options = step.ranks, step.route, step.agreed, step.options
        weights = topk_weights.to(torch.float32)
        described = route.describe_rows(weights if step.weights_travel else None)
        routes = ranks.all_to_all("the dispatch of routes", described, route.row_counts, agreed.rows_in)
        if options.weight_on == "input":
            packed = pack(_weigh(route.slots, x, permute(x, route.slots), weights)[0], None, options.payload)
        else:
            packed = pack(x, route.rows, options.payload)
        rows = ranks.all_to_all("the dispatch of tokens", packed, route.row_counts, agreed.rows_in)
        arrived = Arrived.of(routes.wait(), sum(agreed.slots_in), step.weights_travel)
        received = rows.wait()
        if options.payload is not None:
            received = dequantize_fp8(unpack(received, x.shape[1], options.payload), x.dtype)
        results, gate_up = _run_experts(step, arrived, received, params)
        step.results = ranks.all_to_all("the combine of results", results, agreed.slots_in, route.slot_counts)
        if agreed.records:
            ctx.step = step
            ctx.save_for_backward(x, topk_weights, received, gate_up, *arrived, *params)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    @torch._disable_dynamo  # with compiled autograd the backward pass is a graph too
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step
        x, topk_weights, received, gate_up, *rest = ctx.saved_tensors
        arrived, params = Arrived(*rest[:4]), rest[4:]
        by_row, needs = step.options.weight_on != "input", step.agreed
        names = MoeGradients._fields
        wanted = {name for name, need in zip(names[2:], ctx.needs_input_grad[4:], strict=True) if need}
        wanted |= {"x"} if needs.needs_x or (needs.needs_weights and not by_row) else set()
        wanted |= {"topk_weights"} if needs.needs_weights and by_row else set()
        grads = _run_backward(step, arrived, received, gate_up, params, wanted)
        of_x = of_weights = None
        if "x" in wanted:
            of_x = _send_back(step, "the combine of gradients", grads.x)
        if "topk_weights" in wanted:
            of_weights = _send_back(step, "the combine of the weights' gradients", grads.topk_weights)
        grad_x, grad_weights = _at_home(step, x, topk_weights, of_x, of_weights)
        of_params = [
            None if grad is None or name not in wanted else grad.to(parameter.dtype)
            for name, grad, parameter in zip(names[2:], grads[2:], params, strict=True)
        ]
        _, needs_x, needs_weights, *_ = ctx.needs_input_grad
        return None, grad_x if needs_x else None, grad_weights if needs_weights else None, None, *of_params


class FromExperts(torch.autograd.Function):
    """From results on their way back to the sum over each token's slots."""

    @staticmethod
    def forward(ctx: Any, step: Step, token: Tensor, topk_weights: Tensor) -> Tensor:
        assert step.results is not None
        results = step.results.wait()
        step.results = None
        weights = topk_weights.to(torch.float32) if step.options.weight_on == "output" else None
        ctx.step = step
        ctx.save_for_backward(step.route.rows.row_to_token, step.route.rows.token_to_row)
        return unpermute(results, step.route.slots, weights)

    @staticmethod
    @torch._disable_dynamo
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step
        row_to_token, token_to_row = ctx.saved_tensors
        rows = step.route.rows._replace(row_to_token=row_to_token, token_to_row=token_to_row)
        with torch.no_grad():
            send = permute(grad_y, rows)
        counts = step.route.row_counts
        step.gradients = step.ranks.all_to_all("the dispatch of gradients", send, counts, step.agreed.rows_in)
        # with create_graph it requires a gradient, which makes once_differentiable refuse those of ToExperts' results
        return None, grad_y.new_empty(0, requires_grad=torch.is_grad_enabled()), None


def _run_experts(step: Step, arrived: Arrived, received: Tensor, params: Any) -> tuple[Tensor, Tensor]:
    """[R, hidden] results in the order of slots, and what the backward pass keeps of them.

    Rows that came as codes are quantised to the same values again by FP8 experts of the same scales: 448 times a scale,
    divided by 448, is that scale for every float32.
    """
    w_gate_up, w_down, b_gate_up, b_down = params
    if len(w_down) == 0:
        return received, received.new_empty(0)
    weights = arrived.weights if step.options.weight_on == "pre_down" else torch.ones_like(arrived.weights)
    x, x_row = arrived.slots_of(received, step.options.precision)
    given = (x, arrived.local_slot, weights, w_gate_up, None, w_down, None, b_gate_up, b_down)
    if step.agreed.records:
        return moe.saved_kernel(*given, *step.options.of_experts, x_row=x_row)
    return moe.moe_kernel(*given, *step.options.of_experts, x_row=x_row), received.new_empty(0)


def _run_backward(
    step: Step, arrived: Arrived, received: Tensor, gate_up: Tensor, params: Any, wanted: set[str]
) -> MoeGradients:
    """Gradients of the slots that are here and of the parameters; those that are not wanted are empty."""
    assert step.gradients is not None
    grad_rows = step.gradients.wait()
    step.gradients = None
    w_gate_up, w_down, b_gate_up, b_down = params
    if len(w_down) == 0:
        return MoeGradients(grad_rows, arrived.weights, w_gate_up, w_down, b_gate_up, b_down)
    (grad_y, _), (x, x_row) = (arrived.slots_of(rows, step.options.precision) for rows in (grad_rows, received))
    grads = moe.backward_kernel(
        grad_y, gate_up, x, arrived.local_slot, arrived.weights, w_gate_up, None, w_down, None, b_gate_up, b_down,
        *step.options.of_experts, ",".join(wanted), x_row=x_row,
    )  # fmt: skip
    return MoeGradients(*grads)


def _send_back(step: Step, what: str, slots: Tensor) -> Arriving:
    return step.ranks.all_to_all(what, slots, step.agreed.slots_in, step.route.slot_counts)


def _at_home(
    step: Step, x: Tensor, topk_weights: Tensor, of_x: Arriving | None, of_weights: Arriving | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of this rank's tokens and of their weights, of what comes back for each slot."""
    slots = step.route.slots
    if step.options.weight_on == "input":
        if of_x is None:
            return None, None
        rows, weights = of_x.wait(), topk_weights.to(torch.float32)
        return unpermute(rows, slots, weights), _weigh(slots, x, rows, weights)[1].to(topk_weights.dtype)
    grad_x = None if of_x is None else unpermute(of_x.wait(), slots)
    if of_weights is None:
        return grad_x, None
    place = slots.token_to_row.long()
    padded = torch.cat([of_weights.wait().view(-1), x.new_zeros(1, dtype=torch.float32)])  # -1: the last
    return grad_x, padded[place].to(topk_weights.dtype)


def _weigh(slots: RoutePlan, x: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each slot's weight times its token of x, and the product of each token with its rows.

    Both are what the backward pass of unpermute computes.
    """
    weighted, dots = unpermute_backward_kernel(x, rows, slots.row_to_token, slots.token_to_row, weights)
    return weighted, dots
