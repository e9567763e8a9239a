"""FP8: activations in 1x128 blocks and weights in 128x128 blocks, there and back; DeepSeek-V3's hidden size."""

import pytest

import pyroute
from pyroute.bench.suite import shapes

MODEL, TOKENS = "deepseek-v3", 4096


@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["1x128", "128x128"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_fp8(shape, timed, dtype, block):
    s = shape(MODEL, TOKENS)
    x = shapes.states(s, dtype)
    q = pyroute.quantize_fp8(x, block=block)
    part = pyroute.quantize_fp8(x[:256], block=block, backend="numpy")
    assert q.codes[:256].tobytes() == part.codes.tobytes()
    assert q.scales[: len(part.scales)].tobytes() == part.scales.tobytes()
    timed(
        "quantize_fp8",
        f"{s.name} {dtype} {block[0]}x{block[1]}",
        lambda: pyroute.quantize_fp8(x, block=block),
        nbytes=x.nbytes + q.nbytes,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantize_fp8(shape, timed, dtype):
    s = shape(MODEL, TOKENS)
    x = shapes.states(s)
    q, part = pyroute.quantize_fp8(x), pyroute.quantize_fp8(x[:256])
    ours = pyroute.dequantize_fp8(q, dtype)
    assert ours[:256].tobytes() == pyroute.dequantize_fp8(part, dtype, backend="numpy").tobytes()
    timed(
        "dequantize_fp8", f"{s.name} {dtype}", lambda: pyroute.dequantize_fp8(q, dtype), nbytes=q.nbytes + ours.nbytes
    )
