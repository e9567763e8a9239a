"""Hopper's grouped GEMM on the emulated GPU, through the public API.

Results are exact (sm90_operands.py) and compared byte by byte; what tells rows, columns, blocks of depth and experts
apart is keyed into the scales or into one-hot rows.
"""

from __future__ import annotations

import itertools

import emulated
import numpy as np
import pytest
from emulated import to_device, to_host
from sm90_operands import (
    BF16,
    E4M3,
    KINDS,
    OUTS,
    PAIRS,
    ROWS,
    WEIGHTS,
    Operand,
    expected,
    gradient_operands,
    powers_of_two,
    rows_and_weights,
    same_bytes,
    small_integers,
)

import pyroute
from pyroute.quantization import unchecked_fp8


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    monkeypatch.setenv("PYROUTE_EMULATED_SMS", "3")


def forward(rng, kind, offsets, n, k, rows=None, out="bfloat16", transposed=False):
    rows = offsets[-1] if rows is None else rows
    a, b = rows_and_weights(rng, kind, rows, len(offsets) - 1, n, k, transposed)
    op = pyroute.grouped_gemm_dgrad if transposed else pyroute.grouped_gemm
    emulated.launched()
    got = op(a.device, b.device, to_device(np.asarray(offsets, np.int64)), out_dtype=out)
    kernels = emulated.launched()
    assert kernels[-1].startswith("bf16" if kind == "bfloat16" else kind), kernels
    same_bytes(to_host(got), expected(a.exact, b.exact, offsets, rows, OUTS[out], transposed))
    return kernels[-1]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_ragged_experts_and_rows_past_the_last(kind, out):
    offsets = [0, 130, 130, 131, 258, 515, 643]
    name = forward(np.random.default_rng(0), kind, offsets, 256, 256, rows=700, out=out)
    assert "_128" in name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_few_rows_an_expert(kind, out):
    name = forward(np.random.default_rng(1), kind, [0, 1, 64, 64, 129, 130, 130, 195, 196], 256, 384, out=out)
    assert ("_64" in name) == ("e5m2" not in kind)  # of which there is one tile


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 6, 11, 33, 70])
def test_any_number_of_blocks_of_depth(kind, blocks):
    """Around the number of stages (5, of 128 and of 64 elements), and beyond the 32 scales that a warp holds, twice."""
    depth = blocks * (128 if kind == "fp8" else 64)
    forward(np.random.default_rng(blocks), kind, [0, 131], 128, depth)


@pytest.mark.parametrize("seed", range(4), indirect=True)
@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_short_products(kind, seed):
    """A tile's store may still be reading the staging when the next tile is done."""
    forward(np.random.default_rng(seed), kind, [0, 512, 1024], 512, 16)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("n", [8, 64, 72, 200, 328])
@pytest.mark.parametrize("k", [16, 144, 256])
def test_columns_and_depths_that_are_no_tiles(kind, n, k):
    forward(np.random.default_rng(n), kind, [0, 128, 190, 260], n, k)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles_for_each_block(kind):
    """Several tiles in a block's loop: stages, phases and staging go on from tile to tile."""
    forward(np.random.default_rng(2), kind, [0, 300, 428, 700, 1024], 384, 384)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize(("n", "k"), [(256, 384), (128, 208), (192, 128)])
def test_dgrad(kind, out, n, k):
    forward(np.random.default_rng(3), kind, [0, 130, 130, 131, 400], n, k, rows=450, out=out, transposed=True)


SHAPES = ("fp8_128_overlap", "fp8_128_pair", "fp8_192", "fp8_192_pair")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [64, 128, 200, 256, 384, 520, 960])
def test_other_shapes(shape, n, monkeypatch):
    """Odd numbers of tiles side by side, of which a cluster has one too many; all pairs of scale blocks of 192."""
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", f"{shape}_product")
    rng = np.random.default_rng(n)
    assert forward(rng, "fp8", [0, 130, 130, 131, 258, 530], n, 640, rows=560) == f"{shape}_product"
    forward(rng, "fp8", [0, 70, 300], n, 4352)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_give_the_same_bytes(shape, monkeypatch):
    rng = np.random.default_rng(13)
    a = Operand(rng.normal(size=(300, 512)).astype(E4M3), rng.uniform(0.5, 2, (300, 4)).astype(np.float32), (1, 128))
    b = Operand(
        rng.normal(size=(2, 384, 512)).astype(E4M3), rng.uniform(0.5, 2, (2, 3, 4)).astype(np.float32), (128, 128)
    )
    offsets = to_device(np.asarray([0, 170, 300]))
    want = to_host(pyroute.grouped_gemm(a.device, b.device, offsets))
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", f"{shape}_product")
    got = to_host(pyroute.grouped_gemm(a.device, b.device, offsets))
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def wgrad(rng, kind, offsets, n, k, rows=None, accumulate=False, spoil=False):
    rows = offsets[-1] if rows is None else rows
    grad_out, a = gradient_operands(rng, kind, offsets, rows, n, k)
    want = np.stack([grad_out.exact[i:j].T @ a.exact[i:j] for i, j in itertools.pairwise(offsets)])
    given = to_device(np.asarray(offsets, np.int64))
    emulated.launched()
    if accumulate:
        old = rng.integers(-3, 4, want.shape).astype(np.float32)
        got = pyroute.grouped_gemm_wgrad(grad_out.device, a.device, given, accumulate_into=to_device(old))
        want = want + old
    else:
        got = pyroute.grouped_gemm_wgrad(grad_out.device, a.device, given)
    assert emulated.launched()[-1] == ("bf16" if kind == "bfloat16" else kind) + "_wgrad_product"
    same_bytes(to_host(got), want.astype(np.float32))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("n", "k"), [(256, 128), (80, 272), (16, 16)])
def test_wgrad(kind, accumulate, n, k):
    offsets = [0, 130, 130, 131, 195, 400, 656]
    wgrad(np.random.default_rng(4), kind, offsets, n, k, rows=700, accumulate=accumulate)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 16, 63, 64, 65, 127, 128, 129, 640, 1000])
def test_wgrad_of_any_number_of_rows(kind, rows):
    """What lies behind a segment, the next expert's rows, never takes part."""
    wgrad(np.random.default_rng(rows), kind, [0, rows, rows + 70], 128, 128)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_multiply(kind):
    rng = np.random.default_rng(5)
    forward(rng, kind, [0, 0, 0], 128, 128, rows=70)
    wgrad(rng, kind, [0, 0, 0], 128, 128, rows=70)
    wgrad(rng, kind, [0, 0, 0], 128, 128, rows=70, accumulate=True)
    a, b = rows_and_weights(rng, kind, 0, 2, 128, 128)
    assert to_host(pyroute.grouped_gemm(a.device, b.device, to_device(np.zeros(3, np.int64)))).shape == (0, 128)
    grad_out, a = gradient_operands(rng, kind, [0, 0], 0, 128, 128)
    got = pyroute.grouped_gemm_wgrad(grad_out.device, a.device, to_device(np.zeros(2, np.int64)))
    assert not to_host(got).any()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_a_one_hot_row_is_a_row_of_weights(kind, out):
    """Values that tell expert, column and depth apart, where an error of the layout shows as another number."""
    k, n, experts, rows = 256, 256, 2, 260
    hot = np.arange(rows) * 7 % k
    a = np.zeros((rows, k), np.float32)
    a[np.arange(rows), hot] = 1
    e, col, depth = np.ogrid[:experts, :n, :k]
    b = ((col * 5 + depth * 3 + e * 11) % 31 - 15).astype(np.float32)
    offsets = [0, 129, 260]
    rng = np.random.default_rng(6)
    if kind == "bfloat16":
        weights, one_hot = Operand(b.astype(BF16)), Operand(a.astype(BF16))
    else:
        b = b % 5 if "e5m2" in kind else b  # whole numbers that it has
        weights = Operand(b.astype(WEIGHTS[kind]), powers_of_two(rng, (experts, 2, 2)), (128, 128))
        one_hot = Operand(a.astype(ROWS[kind]), powers_of_two(rng, (rows, 2)), (1, 128))
    got = pyroute.grouped_gemm(one_hot.device, weights.device, to_device(np.asarray(offsets)), out_dtype=out)
    same_bytes(to_host(got), expected(one_hot.exact, weights.exact, offsets, rows, OUTS[out]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("experts", [1, 40])
def test_nan_stays_in_its_row_and_is_canonical(kind, out, experts):
    """Full tiles and single rows, of 128 and of 64 rows."""
    rng = np.random.default_rng(7)
    values = small_integers(rng, (200, 128), ROWS[kind])
    values[[3, 77, 199], [0, 5, 127]] = np.nan
    weights = np.ones((experts, 128, 128), BF16 if kind == "bfloat16" else E4M3)
    offsets = to_device(np.asarray([0] + [200] * experts))
    if kind != "bfloat16":
        a = Operand(values, np.ones((200, 1), np.float32), (1, 128)).device
        b = Operand(weights, np.ones((experts, 1, 1), np.float32), (128, 128)).device
    else:
        a, b = to_device(values), to_device(weights)
    got = to_host(pyroute.grouped_gemm(a, b, offsets, out_dtype=out))
    assert np.isnan(got).any(1).nonzero()[0].tolist() == [3, 77, 199]
    bits, nan = (np.uint16, 0x7FC0) if out == "bfloat16" else (np.uint32, 0x7FC00000)
    assert (got[[3, 77, 199]].view(bits) == nan).all()


@pytest.mark.parametrize("kind", KINDS)
def test_wgrad_does_not_read_the_neighbours_nans(kind):
    rng = np.random.default_rng(8)
    offsets = [0, 70, 200]
    wide = kind == "bfloat16"
    values = [small_integers(rng, (300, 128), dtype) for dtype in (ROWS[kind], BF16 if wide else E4M3)]
    for x in values:
        x[70:200] = np.nan
        x[200:] = np.nan
    if not wide:
        ones = np.ones(((300 + 2 * 127) // 128, 128), np.float32)
        grad_out, a = (Operand(x, ones, (128, 1), offsets).device for x in values)
    else:
        grad_out, a = map(to_device, values)
    got = to_host(pyroute.grouped_gemm_wgrad(grad_out, a, to_device(np.asarray(offsets))))
    exact = [x[:70].astype(np.float64) for x in values]
    same_bytes(got[0], (exact[0].T @ exact[1]).astype(np.float32))
    assert (got[1].view(np.uint32) == 0x7FC00000).all()


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("offsets", [[0, 500, 90], [-7, 40, 10**12], [90, 20, 3], [50, 60, 70]])
def test_offsets_that_are_none_touch_nothing_outside(kind, offsets):
    """The arrays lie against inaccessible pages; results are anything."""
    rng = np.random.default_rng(9)
    given = to_device(np.asarray(offsets, np.int64))
    a, b = rows_and_weights(rng, kind, 90, 2, 128, 128)
    pyroute.grouped_gemm(a.device, b.device, given)
    grad_out, a = gradient_operands(rng, kind, [0, 45, 90], 90, 128, 128)
    if kind == "fp8":
        a, grad_out = (unchecked_fp8(x.device.codes, x.device.scales, (128, 1), "e4m3", given) for x in (a, grad_out))
        pyroute.grouped_gemm_wgrad(grad_out, a, given)
    else:
        pyroute.grouped_gemm_wgrad(grad_out.device, a.device, given)


def test_what_is_not_served_goes_to_the_portable_kernels():
    rng = np.random.default_rng(10)
    offsets = to_device(np.asarray([0, 3, 9]))
    cases = [
        (small_integers(rng, (9, 24), BF16), small_integers(rng, (2, 12, 24), BF16)),  # N is no multiple of 8
        (small_integers(rng, (9, 20), BF16), small_integers(rng, (2, 16, 20), BF16)),  # nor is K
        (small_integers(rng, (9, 32), BF16), small_integers(rng, (2, 16, 32), np.float32)),
    ]
    for a, b in cases:
        emulated.launched()
        got = pyroute.grouped_gemm(to_device(a), to_device(b), offsets, out_dtype="float32")
        assert not any(name.endswith("_product") for name in emulated.launched())
        want = expected(a.astype(np.float64), b.astype(np.float64), [0, 3, 9], 9, np.float32)
        same_bytes(to_host(got), want)
    moved = to_device(cases[0][0], offset=1)  # a view: 2 bytes off
    weights = to_device(small_integers(rng, (2, 16, 24), BF16))
    emulated.launched()
    pyroute.grouped_gemm(moved, weights, offsets)
    assert not any(name.endswith("_product") for name in emulated.launched())


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_a_row_does_not_depend_on_its_batch(kind):
    """Tiles of 64 and of 128 rows, full and partial ones."""
    rng = np.random.default_rng(11)
    if kind == "fp8":
        values = rng.normal(size=(300, 256)).astype(E4M3), rng.normal(size=(1, 128, 256)).astype(E4M3)
        scales = rng.uniform(0.5, 2, (300, 2)).astype(np.float32), rng.uniform(0.5, 2, (1, 1, 2)).astype(np.float32)
        b = Operand(values[1], scales[1], (128, 128)).device
        pick = lambda rows: Operand(values[0][rows], scales[0][rows], (1, 128)).device  # noqa: E731
    else:
        values = rng.normal(size=(300, 256)).astype(BF16), rng.normal(size=(1, 128, 256)).astype(BF16)
        b = to_device(values[1])
        pick = lambda rows: to_device(values[0][rows])  # noqa: E731

    def product(rows):
        return to_host(pyroute.grouped_gemm(pick(rows), b, to_device(np.asarray([0, len(rows)]))))

    whole = product(np.arange(300))
    for rows in ([7], [299, 0, 128, 5], list(range(100, 165))):
        np.testing.assert_array_equal(product(np.asarray(rows)).view(np.uint16), whole[rows].view(np.uint16))


@pytest.mark.parametrize("seed", range(6), indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_of_threads_gives_the_same_bytes(kind, seed):
    rng = np.random.default_rng(12)
    forward(rng, kind, [0, 140, 270, 400], 256, 384)
    wgrad(rng, kind, [0, 140, 141, 300], 128, 128)
