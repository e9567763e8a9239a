"""What vLLM and SGLang call in each of their processes, by entry point.

Each does nothing, and imports nothing, unless its environment variable is 1.
"""

from __future__ import annotations

import os


def vllm() -> None:
    """Of the group ``vllm.general_plugins``; asked for by ``PYROUTE_VLLM=1``."""
    if os.environ.get("PYROUTE_VLLM") == "1":
        from . import vllm as adapter

        adapter.install()


def sglang() -> None:
    """Of the group ``sglang.srt.plugins``; asked for by ``PYROUTE_SGLANG=1``."""
    if os.environ.get("PYROUTE_SGLANG") == "1":
        from . import sglang as adapter

        adapter.register()
