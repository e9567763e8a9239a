"""What the adapters of other stacks share: names lent and given back, versions, settings that are left alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gating import Gating
from ..pytorch._library import constant
from ..pytorch.gating import topk_gating_by_text
from ..router_config import RouterConfig

_ABSENT = object()


class Bindings:
    """Attributes of other packages' modules and classes, replaced until :meth:`restore`."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._before)

    def bind(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Every attribute as it was, in reverse order; nothing the second time."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def warn_if_untested(adapter: str, stack: str, version: str, tested: tuple[str, ...]) -> None:
    """A warning for a version that does not begin with one of ``tested``."""
    if not any(f"{version}.".startswith(f"{known}.") for known in tested):
        message = f"pyroute.integrations.{adapter}: tested with {stack} {', '.join(tested)}, this is {version}"
        warnings.warn(message, stacklevel=3)


def leave_alone(adapter: str, what: str, reason: str) -> None:
    """Say that ``what`` stays with its stack, and why. Python shows equal warnings once."""
    warnings.warn(f"pyroute.integrations.{adapter}: {what} is left as it is: {reason}", stacklevel=3)


def where_on_cpu(ours: Callable[..., Any], theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    """``ours`` for calls whose tensors are all on the CPU, ``theirs`` for the others if there is one."""
    if theirs is None:
        return ours

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (ours if all(t.is_cpu for t in tensors) else theirs)(*args, **kwargs)

    return call


def gate(
    logits: Tensor, rule: tuple[int, int, str], bias: Tensor | None = None, *, topk_idx: Tensor | None = None,
    **others: Any,
) -> Gating:  # fmt: skip
    """``topk_gating`` by the RouterConfig of ``rule`` (experts, top_k, score) and ``others``, under a compiler too."""
    return topk_gating_by_text(logits, rule_text(*rule, **others), bias, topk_idx)


@constant
def rule_text(num_experts: int, top_k: int, score: str, **others: Any) -> str:
    """The rule as ops carry it: a compiler takes constants from functions, and RouterConfigs only from outside."""
    return _text(num_experts, top_k, score, **others)


@functools.lru_cache(maxsize=256)
def _text(*rule: Any, **others: Any) -> str:
    return str(RouterConfig(*rule, **others))
