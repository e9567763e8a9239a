"""The same bytes whatever the floating-point mode of the calling thread: flushed subnormals, other rounding, traps."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
from contextlib import contextmanager

import moe_problems
import numpy as np
import pytest
from conftest import assert_same_bytes

import pyroute
from pyroute import RouterConfig

FLUSH, ZERO, UPWARD, TRAP_INVALID_AND_INEXACT = 0x8000, 0x40, 0x4000, 0x1080
MODES = {
    "flush": FLUSH,
    "zero": ZERO,
    "flush and zero": FLUSH | ZERO,
    "upward": UPWARD,
    "traps": TRAP_INVALID_AND_INEXACT,
}

glibc_on_x86 = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
pytestmark = pytest.mark.skipif(not glibc_on_x86, reason="the mode is set through glibc's fesetmode, on x86-64")


class _Mode(ctypes.Structure):
    _fields_ = (("x87", ctypes.c_uint16), ("reserved", ctypes.c_uint16), ("mxcsr", ctypes.c_uint32))


@contextmanager
def float_mode(bits: int):
    """The control bits of MXCSR turned over for this thread."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    before, changed, after = _Mode(), _Mode(), _Mode()
    assert libm.fegetmode(ctypes.byref(before)) == 0
    changed.x87, changed.mxcsr = before.x87, before.mxcsr ^ bits
    libm.fesetmode(ctypes.byref(changed))
    try:
        yield
        libm.fegetmode(ctypes.byref(after))
    finally:
        libm.fesetmode(ctypes.byref(before))
    control = 0xFFC0
    assert after.mxcsr & control == changed.mxcsr & control, "an op left another mode behind"


class Work:
    """Every room, on numbers of which some are subnormal or have subnormal products."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.logits = rng.standard_normal((9, 16), np.float32) * 3
        self.logits[:, :8] = -100  # their sigmoids are subnormal
        self.logits[0, 3] = np.nan
        self.config = RouterConfig(16, 10, score="sigmoid", renormalize=False)
        self.x = rng.standard_normal((9, 256), np.float32)
        self.x[:, ::3] *= np.float32(1e-39)
        self.x[4] *= np.float32(1e-20)
        self.w = rng.standard_normal((16, 128, 256), np.float32) * np.float32(1e-20)
        self.grad = rng.standard_normal((9, 10), np.float32) * np.float32(1e-38)
        self.crowd = np.array([0] + [40] * 16)  # more rows than the kernels for a few take
        self.many = np.tile(self.x, (5, 1))[:40]
        self.layer = moe_problems.Problem("fp8_weights", scale=1e-38)

    def results(self) -> list[np.ndarray]:
        gating = pyroute.topk_gating(self.logits, self.config)
        plan = pyroute.plan_routes(gating.topk_idx, 16)
        rows = pyroute.permute(self.x, plan)
        w8, x8 = pyroute.quantize_fp8(self.w, block=(128, 128)), pyroute.quantize_fp8(self.x, block=(1, 128))
        found = [gating.topk_idx, gating.topk_weights, w8.codes, w8.scales, x8.codes, x8.scales, x8.dequantize()]
        found += [rows, pyroute.unpermute(rows, plan, gating.topk_weights)]
        found.append(pyroute.topk_gating_backward(self.grad, self.logits, gating, self.config))
        for w in (self.w, w8):
            few = pyroute.grouped_gemm(rows, w, plan.expert_offsets)
            many = pyroute.grouped_gemm(self.many, w, self.crowd)
            found += [few, many, pyroute.grouped_gemm_dgrad(many, w, self.crowd)]
        found.append(pyroute.grouped_gemm_wgrad(few, rows, plan.expert_offsets))
        return [*found, self.layer.forward("cpu"), *(g for g in self.layer.gradients("cpu") if g is not None)]


@pytest.mark.parametrize("mode", MODES)
def test_bytes_do_not_depend_on_the_mode_of_the_caller(cpu_floor, threads, mode):
    work = Work()
    expected = work.results()
    with float_mode(MODES[mode]):
        found = work.results()
    for a, b in zip(found, expected, strict=True):
        assert_same_bytes(a, b)


def test_the_work_depends_on_the_mode(rng):
    """NumPy's own arithmetic, which stays in the caller's mode, shows that the modes above are set."""
    x = rng.standard_normal(64, np.float32)
    expected = x * np.float32(1e-39)
    for mode in ("flush", "zero", "upward"):
        with float_mode(MODES[mode]):
            found = x * np.float32(1e-39)
        assert found.tobytes() != expected.tobytes()
