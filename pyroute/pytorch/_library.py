"""How an op is made known to PyTorch, and when a call goes to its kernel without the dispatcher.

Every op is one kernel over the core, a fake kernel that gives shapes to compilers, and a formula for its gradient that
is written in ops again, so that it compiles too. All gradients are of first order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("pyroute", "DEF")
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_PLAIN = (Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # also one that outlived its transform: no memory


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    autocast: Callable[..., tuple[Any, ...]] | None = None,
    mutates: bool = False,
) -> Any:
    """The op ``pyroute::<schema>``.

    ``kernel`` is registered for every device, and says in one sentence that a tensor is not where it can be read.
    ``save(ctx, inputs, output)`` keeps what ``backward(ctx, *grads)`` reads; without a backward, differentiating is an
    error: a gradient that is silently zero or missing is worse. ``autocast(dtype, *args)`` gives the arguments to use
    under autocast; without it the op takes its arguments as they come. An op that mutates has no gradient to define.
    """
    name = schema.partition("(")[0]
    qualified = f"pyroute::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if not mutates:
        torch.library.register_autograd(qualified, backward or _refusal(name), setup_context=save, lib=_LIBRARY)
    op = getattr(torch.ops.pyroute, name).default
    if autocast is not None:
        for device, key in _AUTOCAST.items():
            _LIBRARY.impl(name, _autocast_kernel(op, autocast, device), key.name, with_keyset=True)
    return op if mutates else _shortcut(op, kernel, backward, save)


def _shortcut(
    op: Any, kernel: Callable[..., Any], backward: Callable[..., Any] | None, save: Callable[..., None] | None
) -> Callable[..., Any]:
    """The op, whose gradient is recorded by a Function of its own where nobody but the kernel would see the call.

    The dispatcher records through a Function too, which it makes anew for each call: 30 us more (Zen 4). Its
    ``Function.apply`` asks again for transforms and looks among the arguments for what they leave behind, of which
    plain tensors have none; the ``apply`` below it records: 2 us less.
    """
    record: Any = op
    if backward is not None and save is not None:
        body = {"forward": _forward_of(kernel, save), "backward": staticmethod(backward)}
        function = type(op.name(), (torch.autograd.Function,), body)
        record = super(torch.autograd.Function, function).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not _nobody_watches(_one_device(tensors, False)):
            return op(*args)
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return kernel(*args)
        return record(*args)

    return call


def _forward_of(kernel: Callable[..., Any], save: Callable[..., None]) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        save(ctx, args, output)
        return output

    return staticmethod(forward)


def _one_device(tensors: Any, records: bool) -> str:
    """Where plain tensors lie that a kernel can read as they are, "cpu" or "cuda:<n>"; "" if one is something else.

    With ``records`` a tensor that requires grad is something else.
    """
    device = ""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or (records and tensor.requires_grad) or tensor.is_neg() or _is_wrapped(tensor):
            return ""
        here = "cpu" if tensor.is_cpu else f"cuda:{tensor.get_device()}" if tensor.is_cuda else ""
        if not here or (device and here != device):
            return ""
        device = here
    return device


def constant(function: Any) -> Any:
    """What ``torch.compiler.assume_constant_result`` does, which imports the whole compiler for it: 2 s."""
    function._dynamo_marked_constant = True
    return function


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: no gradient is defined for it; detach its result, or differentiate once only")

    return refuse


def _autocast_kernel(op: Any, autocast: Callable[..., tuple[Any, ...]], device: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(_AUTOCAST[device])

    def cast(_: Any, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*autocast(torch.get_autocast_dtype(device), *args))

    return cast


def _refuse_dual(tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("pyroute has no forward-mode derivatives, got a dual tensor; use backward")


def goes_direct(*tensors: Tensor | None) -> bool:
    """Whether only the kernel would see this call: plain tensors on one device, no gradient to record, nobody tracing.

    The dispatcher costs 12 us a call for an op in Python, 35 us with its autograd registered (Zen 4): more than a gate
    of one token. Memory of a tensor with the negative bit (``is_neg``) holds the negative, which the dispatcher
    writes out. A dual tensor is refused here: below, its tangent would be lost in silence.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        _refuse_dual(tensors)
    return _nobody_watches(_one_device(tensors, torch.is_grad_enabled()))


def _nobody_watches(device: str) -> bool:
    """Plain tensors on one device, no mode, no transform, no tracer, no autocast."""
    return (
        device != ""
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled("cpu" if device == "cpu" else "cuda")
    )
