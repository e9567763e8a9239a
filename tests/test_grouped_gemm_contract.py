"""Grouped GEMM: what it accepts, what it refuses and in which words, and the memory that it may touch."""

import numpy as np
import pytest
from conftest import CPU_FLOORS, assert_same_bytes, guarded, poison
from grouped_gemm_operands import BF16, FLOAT8, MIXES, ROW_BLOCK, TOKEN_BLOCK, WEIGHT_BLOCK, offsets_of, operand
from oracle import grouped_gemm as oracle

from pyroute import Fp8Array, _backend, grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad

needs_core = pytest.mark.skipif(not CPU_FLOORS, reason="needs the compiled floor")


# --- memory ----------------------------------------------------------------------------------------------------------


def fence(x, at):
    """The same operand in memory that ends, or begins, at an inaccessible page."""
    if not isinstance(x, Fp8Array):
        return guarded(x, at=at)
    codes = guarded(x.codes.view(np.uint8), at=at).view(x.codes.dtype)
    return Fp8Array(codes, guarded(x.scales, at=at), x.block, x.format, x.expert_offsets)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize(("kind_a", "kind_b"), MIXES)
def test_no_byte_outside_the_arrays_is_touched(cpu_floor, at, kind_a, kind_b, rng):
    for counts, n, k in [((1,), 1, 1), ((2, 0, 3), 5, 129), ((13,), 13, 9), ((14, 3), 27, 131)]:
        offsets = guarded(offsets_of(*counts), at=at)
        rows, experts = int(offsets[-1]), len(counts)
        a, b = operand(rng, kind_a, (rows, k), ROW_BLOCK)[0], operand(rng, kind_b, (experts, n, k), WEIGHT_BLOCK)[0]
        g = operand(rng, kind_a, (rows, n), ROW_BLOCK)[0]
        tall = operand(rng, kind_b, (rows, k), TOKEN_BLOCK, offsets_of(*counts))[0]
        for op, x, y, shape in (
            (grouped_gemm, a, b, (rows, n)),
            (grouped_gemm_dgrad, g, b, (rows, k)),
            (grouped_gemm_wgrad, g, tall, (experts, n, k)),
        ):
            for out_type in (np.dtype(np.float32), BF16) if op is not grouped_gemm_wgrad else (np.dtype(np.float32),):
                out = guarded(poison(shape, out_type), at=at)
                op(fence(x, at), fence(y, at), offsets, out=out, backend="cpu")
                again = poison(shape, out_type)
                op(x, y, offsets_of(*counts), out=again, backend="cpu")
                assert_same_bytes(out, again)


@pytest.mark.slow
@needs_core
def test_weights_and_rows_beyond_2_to_the_31_elements():
    """Untouched zero pages cost no memory: only the last expert and the last rows hold numbers."""
    experts, n, k = 1100, 1024, 2048
    codes = np.zeros((experts, n, k), FLOAT8["e4m3"])
    codes[-1] = 2
    weights = Fp8Array(codes, np.full((experts, 8, 16), 0.5, np.float32), WEIGHT_BLOCK)
    assert codes.size > 2**31
    out = grouped_gemm(np.ones((2, k), np.float32), weights, offsets_of(*[0] * (experts - 1), 2), backend="cpu")
    np.testing.assert_array_equal(out, np.full((2, n), k, np.float32))
    dgrad = grouped_gemm_dgrad(np.ones((1, n), BF16), weights, offsets_of(*[0] * (experts - 1), 1), backend="cpu")
    np.testing.assert_array_equal(dgrad, np.full((1, k), n, BF16))

    rows = np.zeros((2**31 // k + 3, k), FLOAT8["e4m3"])
    rows[-1] = 2
    a = Fp8Array(rows, np.ones((len(rows), 16), np.float32), ROW_BLOCK)
    out = grouped_gemm(a, np.ones((1, 1, k), BF16), offsets_of(len(rows)), out_dtype="float32", backend="cpu")
    assert out[-1, 0] == 2 * k
    assert not out[:-1].any()


# --- what is accepted ------------------------------------------------------------------------------------------------


def unaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)[1:]
    view = np.frombuffer(memory, x.dtype).reshape(x.shape)
    view[...] = x
    return view


def variants(x):
    """The same numbers in other memory: Fortran order, a slice, reversed strides, an odd address, read-only."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    flipped = np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    return np.asfortranarray(x), wide[..., ::2], flipped, unaligned(x), read_only


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_strided_inputs_give_the_bytes_of_their_copy(floor, dtype, rng):
    offsets, n, k = offsets_of(3, 0, 14), 9, 21
    a, b = rng.standard_normal((17, k)).astype(dtype), rng.standard_normal((3, n, k)).astype(dtype)
    g = rng.standard_normal((17, n)).astype(dtype)
    for op, x, y in ((grouped_gemm, a, b), (grouped_gemm_dgrad, g, b), (grouped_gemm_wgrad, g, a)):
        expected = op(x, y, offsets, backend=floor.backend)
        for other in variants(x):
            assert_same_bytes(op(other, y, offsets, backend=floor.backend), expected)
        for other in variants(y):
            assert_same_bytes(op(x, other, offsets, backend=floor.backend), expected)


def test_inputs_are_not_written(floor, rng):
    offsets = offsets_of(3, 0, 14)
    a, b, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((18, 21), (3, 9, 21), (18, 9)))
    arrays = (a, b, g, offsets)
    copies = [x.copy() for x in arrays]
    for op, x, y in ((grouped_gemm, a, b), (grouped_gemm_dgrad, g, b), (grouped_gemm_wgrad, g, a)):
        op(x, y, offsets, backend=floor.backend)
    for x, copy in zip(arrays, copies, strict=True):
        assert_same_bytes(x, copy)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int16])
def test_offsets_of_any_integer_type(floor, dtype, rng):
    a, b = rng.standard_normal((9, 5)).astype(np.float32), rng.standard_normal((3, 4, 5)).astype(np.float32)
    offsets = offsets_of(3, 0, 5)
    expected = grouped_gemm(a, b, offsets, backend=floor.backend)
    assert_same_bytes(grouped_gemm(a, b, offsets.astype(dtype), backend=floor.backend), expected)
    strided = np.repeat(offsets.astype(dtype), 2)[::2]
    assert_same_bytes(grouped_gemm(a, b, strided, backend=floor.backend), expected)


def test_uint8_codes_are_fp8_codes(floor, rng):
    b, values = operand(rng, "e5m2", (1, 4, 130), WEIGHT_BLOCK)
    a = np.ones((2, 130), np.float32)
    raw = Fp8Array(b.codes.view(np.uint8), b.scales, b.block, "e5m2")
    got = grouped_gemm(a, raw, offsets_of(2), backend=floor.backend)
    assert_same_bytes(got, grouped_gemm(a, b, offsets_of(2), backend=floor.backend))
    product, magnitude = oracle.forward(np.ones((2, 130)), values, offsets_of(2))
    assert (np.abs(got - product) <= oracle.bound(product, magnitude, 23)).all()


@pytest.mark.parametrize(
    ("kind_a", "kind_b", "out_type"),
    [
        ("float32", "float32", "float32"),
        ("float32", "e4m3", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "e4m3", "bfloat16"),
        ("e4m3", "e5m2", "bfloat16"),
    ],
)
def test_default_output_type(floor, kind_a, kind_b, out_type, rng):
    a, b = operand(rng, kind_a, (2, 8), ROW_BLOCK)[0], operand(rng, kind_b, (1, 3, 8), WEIGHT_BLOCK)[0]
    g = operand(rng, kind_a, (2, 3), ROW_BLOCK)[0]
    assert grouped_gemm(a, b, offsets_of(2), backend=floor.backend).dtype.name == out_type
    assert grouped_gemm_dgrad(g, b, offsets_of(2), backend=floor.backend).dtype.name == out_type
    assert grouped_gemm_wgrad(g, a, offsets_of(2), backend=floor.backend).dtype.name == "float32"
    for dtype in ("float32", np.float32, np.dtype(np.float32), "bfloat16", BF16, BF16.type):
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        assert grouped_gemm(a, b, offsets_of(2), out_dtype=dtype, backend=floor.backend).dtype.name == name
    out = np.empty((2, 3), np.float32)
    assert grouped_gemm(a, b, offsets_of(2), out=out, backend=floor.backend) is out


# --- what is refused -------------------------------------------------------------------------------------------------


def f32(*shape):
    return np.ones(shape, np.float32)


def q(*shape, block=ROW_BLOCK, expert_offsets=None):
    scales = np.ones((*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])), np.float32)
    return Fp8Array(np.zeros(shape, np.uint8), scales, block, "e4m3", expert_offsets)


ABC = offsets_of(1, 2)  # two experts, three rows
FORWARD = {"a": f32(3, 5), "b": f32(2, 4, 5), "expert_offsets": ABC}
WGRAD = {"grad_out": f32(3, 4), "a": f32(3, 5), "expert_offsets": ABC}
read_only = f32(3, 4)
read_only.flags.writeable = False
A = f32(3, 4)

REFUSED = [
    ({"a": [[1.0]]}, TypeError, "a must be an array, got list"),
    ({"a": None}, TypeError, "a must be an array, got None"),
    ({"a": f32(3, 5).astype(np.float64)}, TypeError, "a must be float32 or bfloat16, got float64"),
    ({"a": f32(3, 5).astype(np.float16)}, TypeError, "a must be float32 or bfloat16, got float16"),
    ({"a": f32(3, 5).astype(">f4")}, TypeError, "a must be float32 or bfloat16, got float32 of the other byte order"),
    ({"a": np.zeros((3, 5), FLOAT8["e4m3"])}, TypeError, "a must be float32 or bfloat16, got float8_e4m3fn"),
    ({"a": f32(5)}, ValueError, r"a must be of shape \[R, K\], got \[5\]"),
    ({"a": f32(1, 3, 5)}, ValueError, r"a must be of shape \[R, K\], got \[1, 3, 5\]"),
    ({"b": f32(2, 4, 6)}, ValueError, r"b must be of shape \[E, N, K=5\], got \[2, 4, 6\]"),
    ({"b": f32(4, 5)}, ValueError, r"b must be of shape \[E, N, K=5\], got \[4, 5\]"),
    ({"b": q(4, 5, block=WEIGHT_BLOCK)}, ValueError, r"b must be of shape \[E, N, K=5\], got \[4, 5\]"),
    ({"b": np.ma.masked_array(f32(2, 4, 5))}, TypeError, "b must be an array without a mask"),
    ({"expert_offsets": [0, 1, 3]}, TypeError, "expert_offsets must be an array, got list"),
    ({"expert_offsets": ABC.astype(float)}, TypeError, "expert_offsets must be integers, got float64"),
    ({"expert_offsets": ABC[:2]}, ValueError, r"expert_offsets must be of shape \[num_experts \+ 1=3\], got \[2\]"),
    ({"expert_offsets": ABC[None]}, ValueError, "expert_offsets must be of shape"),
    ({"expert_offsets": np.array([0, 2, 1])}, ValueError, r"not decreasing, to at most 3 \(rows\), got \[0, 2, 1\]"),
    ({"expert_offsets": np.array([0, 2, 4])}, ValueError, r"to at most 3 \(rows\), got \[0, 2, 4\]"),
    ({"expert_offsets": np.array([1, 2, 3])}, ValueError, r"from 0, .* got \[1, 2, 3\]"),
    ({"expert_offsets": np.array([0, -1, 3])}, ValueError, r"got \[0, -1, 3\]"),
    ({"a": q(3, 5, expert_offsets=offsets_of(2, 1))}, ValueError, "a must be quantised with the expert_offsets of"),
    ({"out_dtype": "float64"}, ValueError, "out_dtype must be one of 'float32', 'bfloat16', got 'float64'"),
    ({"out_dtype": np.float16}, TypeError, "out_dtype must be float32 or bfloat16"),
    ({"out_dtype": 3}, TypeError, "out_dtype must be float32 or bfloat16, got int"),
    ({"out": f32(3, 5)}, ValueError, r"out must be of shape \[R=3, N=4\], got \[3, 5\]"),
    ({"out": f32(3, 4).astype(np.float64)}, TypeError, "out must be float32, got float64"),
    ({"out": f32(3, 4), "out_dtype": "bfloat16"}, TypeError, "out must be bfloat16, got float32"),
    ({"out": f32(4, 3).T}, ValueError, "out must be C-contiguous, aligned and writeable"),
    ({"out": read_only}, ValueError, "out must be C-contiguous, aligned and writeable"),
    ({"out": [[1.0]]}, TypeError, "out must be an array, got list"),
    ({"a": A, "b": f32(2, 4, 4), "out": A}, ValueError, "out must be memory that no input uses"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, (RuntimeError, TypeError), "backend ('cuda' is not available|must be one for the arrays')"),
]
REFUSED_WGRAD = [
    ({"a": f32(4, 5)}, ValueError, r"a must be of shape \[R=3, K\], got \[4, 5\]"),
    ({"grad_out": f32(3, 4).astype(np.float64)}, TypeError, "grad_out must be float32 or bfloat16, got float64"),
    ({"expert_offsets": np.array([0, 2, 4])}, ValueError, "to at most 3"),
    ({"expert_offsets": np.array([], np.int64)}, ValueError, "expert_offsets must be of shape"),
    ({"a": q(3, 5, expert_offsets=offsets_of(3))}, ValueError, "a must be quantised with the expert_offsets of"),
    ({"out": f32(2, 4, 4)}, ValueError, r"out must be of shape \[E=2, N=4, K=5\], got \[2, 4, 4\]"),
    ({"accumulate_into": f32(3, 4, 5)}, ValueError, r"accumulate_into must be of shape \[E=2, N=4, K=5\]"),
    ({"accumulate_into": f32(2, 4, 5).astype(BF16)}, TypeError, "accumulate_into must be float32, got bfloat16"),
    ({"accumulate_into": f32(2, 4, 5), "out": f32(2, 4, 5)}, ValueError, "out must be None together with accumulate"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED)
def test_refused(change, error, words):
    with pytest.raises(error, match=r"^grouped_gemm: .*" + words):
        grouped_gemm(**{**FORWARD, **change})


@pytest.mark.parametrize(("change", "error", "words"), REFUSED_WGRAD)
def test_refused_wgrad(change, error, words):
    with pytest.raises(error, match=r"^grouped_gemm_wgrad: .*" + words):
        grouped_gemm_wgrad(**{**WGRAD, **change})


def test_refused_dgrad_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"^grouped_gemm_dgrad: b must be of shape \[E, N=4, K\], got \[2, 5, 4\]"):
        grouped_gemm_dgrad(f32(3, 4), f32(2, 5, 4), ABC)
    with pytest.raises(ValueError, match=r"^grouped_gemm_dgrad: out must be of shape \[R=3, K=5\], got \[3, 4\]"):
        grouped_gemm_dgrad(f32(3, 4), f32(2, 4, 5), ABC, out=f32(3, 4))


PLAIN = (None, 1, 1, False)
NATIVE = {
    "a": (f32(3, 5), "float32", *PLAIN),
    "b": (f32(2, 4, 5), "float32", *PLAIN),
    "expert_offsets": ABC,
    "out": f32(3, 4),
    "out_type": "float32",
    "transposed": False,
}


@needs_core
@pytest.mark.parametrize(
    "change",
    [
        {"b": (f32(2, 4, 6), "float32", *PLAIN)},
        {"b": (f32(5), "float32", *PLAIN)},
        {"a": (f32(15), "float32", *PLAIN)},
        {"a": (f32(3, 5), "bfloat16", *PLAIN)},
        {"a": (f32(3, 5), "float64", *PLAIN)},
        {"a": (f32(3, 10)[:, ::2], "float32", *PLAIN)},
        {"a": (f32(3, 5), "float32", f32(2, 1), 1, 128, False)},
        {"a": (f32(3, 5), "float32", f32(3, 1), 0, 128, False)},
        {"a": (f32(3, 5), "float32", f32(3, 1), 2, 128, True)},
        {"expert_offsets": ABC[:2]},
        {"expert_offsets": ABC[:0]},
        {"expert_offsets": ABC + 1},
        {"expert_offsets": ABC * 9},
        {"expert_offsets": ABC[::-1].copy()},
        {"expert_offsets": ABC.astype(np.int32)},
        {"out": f32(3, 5)},
        {"out": read_only},
        {"out_type": "bfloat16"},
        {"out_type": "e4m3"},
        {"transposed": True},
    ],
)
def test_the_extension_itself_refuses_what_does_not_fit(change):
    with pytest.raises(ValueError, match=r"^_core: "):
        _backend.core.grouped_gemm(**{**NATIVE, **change})
