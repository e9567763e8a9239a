"""Hugging Face transformers v5 on pyroute: experts, plain and FP8, routers, and the classes outside its interfaces.

    from pyroute.integrations import transformers as pyroute_transformers

    pyroute_transformers.install()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="pyroute")
    pyroute_transformers.swap(model)  # or for a model that is there: experts, routers, Llama 4, ...

Models keep their weights and checkpoints. What cannot be exchanged is named, with the reason, and left as it is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from . import swapping
from .experts import experts_forward
from .fp8 import fp8_experts_forward
from .swapping import Swapped, restore, swap

__all__ = [
    "NAME",
    "TESTED",
    "Swapped",
    "experts_forward",
    "fp8_experts_forward",
    "install",
    "restore",
    "swap",
    "uninstall",
]

NAME = "pyroute"
TESTED = ("5.23",)


def install(*, routers: bool | Iterable[str] = False) -> None:
    """Make ``experts_implementation="pyroute"`` known to transformers; a second call changes nothing.

    Parameters
    ----------
    routers : bool or model types
        Also exchange the routers and the MoE classes outside the experts interface in every model that
        ``from_pretrained`` or ``from_config`` builds from now on, of these model types (``["deepseek_v3"]``), or of all
        of them, whose modules are imported for it (4 s). A model that is there: :func:`swap`.

    Raises
    ------
    ImportError
        If transformers is not installed or has no experts interface (before version 5).
    """
    plain, fp8 = _interfaces()
    version = ".".join(sys.modules["transformers"].__version__.split(".")[:2])
    if version not in TESTED:
        message = f"pyroute.integrations.transformers: tested with transformers {', '.join(TESTED)}, this is {version}"
        warnings.warn(message, stacklevel=2)
    plain.register(NAME, experts_forward)
    if fp8 is not None:
        fp8.register(NAME, fp8_experts_forward)
    if routers:
        swapping.register(None if routers is True else routers)


def uninstall() -> None:
    """Take the name and the classes back.

    Models that still have the name as their implementation fail at their next call, saying so; models that were built
    with other routers keep them until :func:`restore`.
    """
    for interface in _interfaces():
        if interface is not None:
            interface._global_mapping.pop(NAME, None)
    swapping.unregister()


def _interfaces() -> tuple[Any, Any]:
    """The registries of plain and of FP8 experts, the second None where transformers has none."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(f"pyroute.integrations.transformers: needs transformers 5 or newer: {error}") from error
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:
        return ExpertsInterface, None
    return ExpertsInterface, FP8ExpertsInterface
