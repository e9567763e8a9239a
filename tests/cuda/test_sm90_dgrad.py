"""Weights that are transposed once for many dgrads on Hopper: the same bytes, and no transposition in the calls."""

from __future__ import annotations

import emulated
import ml_dtypes
import numpy as np
import pytest
from emulated import to_device, to_host
from sm90_operands import Operand, expected, powers_of_two, rows_and_weights, same_bytes, small_integers

import pyroute

E4M3 = ml_dtypes.float8_e4m3fn
OFFSETS = [0, 130, 130, 131, 400]


def weights(rng, n=192, k=272):
    return rows_and_weights(rng, "fp8", 450, 4, n, k, transposed=True)


@pytest.mark.parametrize(("n", "k"), [(256, 384), (192, 272), (16, 16), (144, 128)])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_dgrad_reads_what_was_transposed_before(n, k, out):
    g, b = weights(np.random.default_rng(0), n, k)
    offsets = to_device(np.asarray(OFFSETS))
    emulated.launched()
    kept = b.device.with_transposed_codes()
    assert emulated.launched() == ["transpose_bytes"]
    pitch = -(-n // 128) * 128
    want = np.zeros((4, k, pitch), np.uint8)
    want[:, :, :n] = to_host(b.device.codes).view(np.uint8).swapaxes(1, 2)
    np.testing.assert_array_equal(to_host(kept.codes_transposed), want)
    assert kept.nbytes == b.device.nbytes + want.nbytes
    for _ in range(2):
        got = pyroute.grouped_gemm_dgrad(g.device, kept, offsets, out_dtype=out)
        kernels = emulated.launched()
        assert "transpose_bytes" not in kernels
        assert kernels[-1].endswith("_product")
        same_bytes(to_host(got), to_host(pyroute.grouped_gemm_dgrad(g.device, b.device, offsets, out_dtype=out)))
        assert "transpose_bytes" in emulated.launched()
    exact = expected(g.exact, b.exact, OFFSETS, 450, to_host(got).dtype, transposed=True)
    same_bytes(to_host(got), exact)


def test_forward_reads_the_codes_as_they_are():
    rng = np.random.default_rng(1)
    a, b = rows_and_weights(rng, "fp8", 20, 2, 64, 128)
    got = pyroute.grouped_gemm(a.device, b.device.with_transposed_codes(), to_device(np.asarray([0, 7, 20])))
    same_bytes(to_host(got), expected(a.exact, b.exact, [0, 7, 20], 20, to_host(got).dtype))


def test_only_what_a_kernel_would_read_is_made(monkeypatch):
    rng = np.random.default_rng(2)

    def stays(q):
        emulated.launched()
        return q.with_transposed_codes() is q and not emulated.launched()

    assert stays(pyroute.quantize_fp8(np.ones((2, 16, 16), np.float32), block=(128, 128)))  # on the CPU
    assert stays(Operand(small_integers(rng, (2, 24, 16), E4M3), powers_of_two(rng, (2, 1, 1)), (128, 128)).device)
    assert stays(Operand(small_integers(rng, (2, 16, 16), E4M3), powers_of_two(rng, (2, 16, 1)), (1, 128)).device)
    assert stays(Operand(small_integers(rng, (16, 16), E4M3), powers_of_two(rng, (1, 1)), (128, 128)).device)
    served = Operand(small_integers(rng, (2, 16, 16), E4M3), powers_of_two(rng, (2, 1, 1)), (128, 128)).device
    for kernels in ("portable", "general"):
        monkeypatch.setenv("PYROUTE_GROUPED_GEMM", kernels)
        assert stays(served)
    monkeypatch.delenv("PYROUTE_GROUPED_GEMM")
    assert not stays(served)


def test_rows_of_another_type_do_without():
    """The copy is of no use to kernels that read the weights as they lie."""
    rng = np.random.default_rng(3)
    _, b = weights(rng)
    g = to_device(small_integers(rng, (450, 192), ml_dtypes.bfloat16))
    offsets = to_device(np.asarray(OFFSETS))
    got = pyroute.grouped_gemm_dgrad(g, b.device.with_transposed_codes(), offsets)
    same_bytes(to_host(got), to_host(pyroute.grouped_gemm_dgrad(g, b.device, offsets)))


def test_a_part_of_the_experts_and_a_copy_are_without():
    kept = weights(np.random.default_rng(4))[1].device.with_transposed_codes()
    assert kept.codes_transposed is not None
    assert kept[1:3].codes_transposed is None
    again = pyroute.Fp8Array(kept.codes, kept.scales, kept.block)
    assert again.codes_transposed is None


def test_moe_backward_takes_it():
    rng = np.random.default_rng(5)
    x = to_device(rng.standard_normal((30, 64)).astype(ml_dtypes.bfloat16))
    ids, by = to_device(rng.integers(0, 4, (30, 2)).astype(np.int32)), to_device(rng.random((30, 2), np.float32))
    wide = [to_device(rng.standard_normal(shape).astype(np.float32)) for shape in ((4, 96, 64), (4, 64, 48))]
    plain = [pyroute.quantize_fp8(w, block=(128, 128)) for w in wide]
    grad_y = to_device(rng.standard_normal((30, 64)).astype(ml_dtypes.bfloat16))
    results = []
    for weights in (plain, [w.with_transposed_codes() for w in plain]):
        _, saved = pyroute.moe_forward(
            x, ids, by, *weights, quantize_activations=True, quantize_gradients=True, return_saved=True
        )
        emulated.launched()
        results.append(to_host(pyroute.moe_backward(grad_y, saved)))
        transposed = emulated.launched().count("transpose_bytes")
        assert transposed == (6 if weights is plain else 4)  # wgrad's operands, two for each weight
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or a.tobytes() == b.tobytes()
