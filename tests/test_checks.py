"""The extension's quick answers say yes only where the careful checks would: one property at a time is spoiled."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pyroute import _backend, _check

pytestmark = pytest.mark.skipif(not _backend.HAS_CORE, reason="the compiled floor is not built")

AXES = (("rows", None), ("cols", 6))


class Subclass(np.ndarray):
    pass


def unaligned(shape, dtype):
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(count + 1, np.uint8)[1:].view(dtype).reshape(shape)


@pytest.mark.parametrize("name", _check.DTYPES)
def test_each_type_is_known_by_its_own_name_only(name):
    x = np.zeros((4, 6), _check.DTYPES[name])
    assert _check.is_plain(x, (name,), AXES)
    assert _check.is_plain(x, (*(n for n in _check.DTYPES if n != name), name), None)
    assert not _check.is_plain(x, tuple(n for n in _check.DTYPES if n != name), AXES)
    assert _check.is_plain(x, (), AXES)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((6, 4), np.float32).T,
        np.zeros((4, 12), np.float32)[:, ::2],
        np.broadcast_to(np.float32(0), (4, 6)),
        unaligned((4, 6), np.float32),
        np.zeros((4, 6), ">f4"),
        np.zeros((4, 6), np.float32).view(Subclass),
        np.ma.zeros((4, 6), np.float32),
        np.zeros((4, 5), np.float32),
        np.zeros(6, np.float32),
        np.zeros((1, 4, 6), np.float32),
        np.zeros((4, 6), np.float64),
        np.zeros((4, 6), ml_dtypes.bfloat16),
        np.zeros((4, 6), object),
        np.float32(0),
        [[0.0] * 6] * 4,
        None,
    ],
)
def test_what_is_not_plain(x):
    assert not _check.is_plain(x, ("float32",), AXES)
    assert not _check.is_output(x, _check.DTYPES["float32"], AXES, ())


def test_extents_are_compared_exactly():
    x = np.zeros((4, 6), np.float32)
    for axes, plain in [
        ((("rows", 4), ("cols", 6)), True),
        ((("rows", 4), ("cols", 2**64 + 6)), False),
        ((("rows", 5), ("cols", 6)), False),
        ((("rows", 4.0), ("cols", 6)), False),
        ((("rows",), ("cols", 6)), False),
        ((), False),
    ]:
        assert _check.is_plain(x, ("float32",), axes) is plain


def test_offsets():
    def answer(values, num_rows, num_experts, dtype=np.int64):
        return _check.are_offsets(np.array(values, dtype), num_rows, num_experts)

    assert answer([0, 2, 2, 5], 5, 3)
    assert answer([0, 2, 2, 5], 7, None)
    for values, num_rows, num_experts in [
        ([0, 2, 2, 5], 4, 3), ([0, 2, 2, 5], 5, 2), ([0, 2, 1, 5], 5, 3), ([1, 2, 2, 5], 5, 3), ([0], 5, 0),
        ([0, 2, 2, 5], 2**70, 3), ([[0, 5]], 5, 1), ([0, -1, 2, 5], 5, 3), ([0, 2**62, -(2**62), 5], 5, 3),
    ]:  # fmt: skip
        assert not answer(values, num_rows, num_experts)
    assert not answer([0, 2, 2, 5], 5, 3, np.int32)
    assert not _check.are_offsets([0, 5], 5, 1)
    assert not _check.are_offsets(np.array([0, 9, 5, 9])[::2], 5, 1)


def test_outputs_that_overlap_an_input_by_one_item():
    float32 = _check.DTYPES["float32"]
    memory = np.zeros(100, np.float32)
    out = memory[40:64].reshape(4, 6)
    for first, last, apart in [(0, 40, True), (64, 100, True), (0, 41, False), (63, 100, False), (50, 51, False)]:
        assert _check.is_output(out, float32, AXES, (memory[first:last], None, 5)) is apart
    assert _check.is_output(out, float32, AXES, (memory[45:45],))
    assert not _check.is_output(out, float32, AXES, (memory[::2],))  # not in one piece: looked at closely
    assert not _check.is_output(out, float32, AXES, (np.zeros(3).view(Subclass),))
    assert not _check.is_output(out, _check.DTYPES["float64"], AXES, ())
    out.flags.writeable = False
    assert not _check.is_output(out, float32, AXES, ())
