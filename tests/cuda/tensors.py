"""PyTorch's CPU tensors in the place of CUDA tensors, for machines without a GPU.

``emulate()`` makes pyroute.pytorch take every CPU tensor for one on the emulated GPU, whose memory is the host's: same
wrapping, same allocator but for where its bytes lie, same device code. With a real GPU nothing is replaced.
"""

from __future__ import annotations

import sys
from typing import Any

import emulated
import torch

from pyroute.pytorch import _tensors

DEVICE = torch.device("cuda" if emulated.REAL else "cpu")


class HostMemory(_tensors.TensorMemory):
    """PyTorch's host memory, at multiples of 256 bytes and with poison in it, on the default stream."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.device = 0
        self.allocations = 0

    def allocate(self, num_bytes: int) -> tuple[int, Any]:
        self.allocations += 1
        memory = torch.full((num_bytes + 256,), emulated.POISON, dtype=torch.uint8)
        start = -memory.data_ptr() % 256
        memory = memory[start : start + num_bytes]
        return memory.data_ptr(), memory

    def stream(self) -> int:
        return 0


memory = HostMemory()


def emulate(replace: Any = setattr) -> None:
    """``replace(module, name, value)`` may be pytest's ``monkeypatch.setattr``, which puts everything back."""
    if emulated.REAL:
        return
    emulated.build()
    for name, module in list(sys.modules.items()):
        if name.startswith("pyroute.") and hasattr(module, "on_host"):
            replace(module, "on_host", lambda tensor: False)
    replace(_tensors, "DEVICE_TYPES", ("cpu",))
    replace(_tensors, "_memory", lambda device: memory)
