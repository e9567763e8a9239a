"""Classes of transformers exchanged for subclasses on pyroute: in a model that is there, or by its registry."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .outside import FORWARDS, REASONS
from .routers import RULE, NoRuleError, router_forward, rule_of

_ROUTER = re.compile(r"(Router|MoE\w*Gate)$")
_subclasses: dict[type, type] = {}
_registered: dict[str, type] = {}


class Swapped(NamedTuple):
    """What :func:`swap` did with the MoE classes of a model.

    Attributes
    ----------
    swapped : dict from a class to what it runs as
        "experts" by transformers' interface, "module", or the RouterConfig of a router.
    left : dict from a class that keeps its own forward to the reason
    """

    swapped: dict[str, str]
    left: dict[str, str]


def subclass(original: type) -> type | None:
    """The class that runs ``original`` on pyroute, of the same name, or None."""
    if hasattr(original, "_pyroute_original"):
        return None
    if original not in _subclasses:
        forward: Callable[..., Any] | None = FORWARDS.get(original.__name__)
        if forward is None and _ROUTER.search(original.__name__) and "Llama4" not in original.__name__:
            forward = router_forward
        if forward is None:
            return None
        body = {"forward": forward, "_pyroute_original": original, "__module__": original.__module__}
        _subclasses[original] = type(original.__name__, (original,), body)
    return _subclasses[original]


def swap(model: Any, *, experts: bool = True, routers: bool = True) -> Swapped:
    """Run the MoE layers of a model on pyroute; ``restore(model)`` takes it back.

    Experts of transformers' interface get the implementation "pyroute", the experts of Llama 4, DBRX, JetMoE,
    LongCat-Flash and Step-3.7 and every router whose rule is a RouterConfig another forward. Weights stay where they
    are.

    Parameters
    ----------
    model : a transformers model
    experts, routers : bool
        Which of the two.

    Returns
    -------
    Swapped

    Warns
    -----
    UserWarning
        For every MoE class that is left as it is, with the reason.
    """
    swapped: dict[str, str] = {}
    left: dict[str, str] = {}
    for module in model.modules():
        original = type(module)
        name = original.__name__
        if hasattr(original, "_pyroute_original"):
            continue
        if name in REASONS and experts:
            left[name] = REASONS[name]
        elif experts and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
            swapped[name] = "experts"
        elif (other := subclass(original)) is not None and (experts if name in FORWARDS else routers):
            module.__class__ = other
            if name in FORWARDS:
                swapped[name] = "module"
                continue
            try:
                swapped[name] = str(rule_of(module).config)
            except NoRuleError as reason:
                module.__class__ = original
                left[name] = str(reason)
    if "experts" in swapped.values():
        from . import install  # the name may not be known yet

        install()
        model.set_experts_implementation("pyroute")
    for name, why in left.items():
        warnings.warn(f"pyroute.integrations.transformers: {name} is left as it is: {why}", stacklevel=2)
    return Swapped(swapped, left)


def restore(model: Any, experts_implementation: str = "eager") -> None:
    """Give a model its own classes back, and its experts this implementation if they had "pyroute"."""
    for module in model.modules():
        original = getattr(type(module), "_pyroute_original", None)
        if original is not None:
            module.__class__ = original
            module.__dict__.pop(RULE, None)
    configs = (getattr(module, "config", None) for module in model.modules())
    if any(getattr(config, "_experts_implementation", None) == "pyroute" for config in configs):
        model.set_experts_implementation(experts_implementation)


# --- by transformers' own registry of classes -------------------------------------------------------------------------


def register(families: Iterable[str] | None) -> None:
    """Routers and uncovered MoE classes of these model types, or of all, for every model that is built from now on."""
    from transformers.monkey_patching import register_patch_mapping

    for family in all_families() if families is None else families:
        path = f"transformers.models.{family}.modeling_{family}"
        try:
            modeling = importlib.import_module(path)
        except ImportError as error:
            raise ValueError(
                f"install: routers must be model types of transformers, got '{family}' ({error})"
            ) from None
        for name, original in list(vars(modeling).items()):
            if isinstance(original, type) and original.__module__ == path and name not in _registered:
                other = subclass(original)
                if other is not None:
                    register_patch_mapping({name: other}, overwrite=True)
                    _registered[name] = other


def unregister() -> None:
    """Take every class back, also from transformers' lists of what to record, where building a model has put it."""
    if not _registered:
        return
    from transformers import PreTrainedModel
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    current = get_patch_mapping()
    unregister_patch_mapping([name for name, other in _registered.items() if current.get(name) is other])
    _registered.clear()
    waiting: list[Any] = [PreTrainedModel]
    while waiting:
        model_class = waiting.pop()
        waiting += model_class.__subclasses__()
        recorded = vars(model_class).get("_can_record_outputs") or {}
        for output, recorders in list(recorded.items()):
            recorded[output] = _theirs(recorders)


def _theirs(recorders: Any) -> Any:
    if isinstance(recorders, list):
        return [_theirs(recorder) for recorder in recorders]
    if isinstance(recorders, type):
        return getattr(recorders, "_pyroute_original", recorders)
    target = getattr(recorders, "target_class", None)
    if target is not None:
        recorders.target_class = getattr(target, "_pyroute_original", target)
    return recorders


def all_families() -> list[str]:
    """Model types with MoE classes that pyroute exchanges or covers."""
    import transformers

    marks = ("@use_experts_implementation", *(f"class {name}(" for name in FORWARDS))
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    found = {p.parent.name for p in files if any(mark in p.read_text(encoding="utf-8") for mark in marks)}
    return sorted(found)
