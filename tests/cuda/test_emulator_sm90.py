"""The emulated GPU's words of csrc/cuda/sm90: the steps of a Hopper kernel, and bugs in it that are reported."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from emulated import launch, to_device, to_host
from probes_sm90 import TILE, RegistersProbeArgs, encode, product_probe, swizzled, tile_probe

SEEDS = pytest.mark.parametrize("seed", range(8), indirect=True)


@SEEDS
@pytest.mark.parametrize("at", [(0, 0), (128, 64), (80, 90), (-16, -3), (250, 99), (300, 0)])
def test_a_tile_there_and_back(at, seed, rng):
    x = rng.integers(0, 255, (100, 256), dtype=np.uint8)
    cols = 251
    out, back, sentence = tile_probe(x, at, cols=cols)
    assert sentence == ""
    padded = np.zeros((400, 800), np.uint8)
    padded[100:200, 100 : 100 + cols] = x[:, :cols]
    tile = padded[100 + at[1] : 164 + at[1], 100 + at[0] : 228 + at[0]]
    assert np.array_equal(out, swizzled(tile))
    grown = np.zeros_like(padded)
    plus_one = (np.ascontiguousarray(swizzled(tile)).view(np.uint32) + 1).view(np.uint8)
    unswizzled = plus_one[np.arange(TILE) ^ ((np.arange(TILE) >> 7 & 7) << 4)].reshape(64, 128)
    grown[100 + at[1] : 164 + at[1], 100 + at[0] : 228 + at[0]] = unswizzled
    expected = np.zeros_like(x)
    expected[:, :cols] = grown[100:200, 100 : 100 + cols]
    assert np.array_equal(back, expected)


@SEEDS
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (1, "is not initialised"),
        (2, "deadlock.*barrier_try_wait.*misses 1 of 2 arrivals and 0 bytes"),
        (3, "not fenced after its initialisation"),
        (4, "deadlock.*barrier_try_wait.*misses 0 of 1 arrivals and 16 bytes"),
        (5, "16 more bytes landed than were expected"),
        (6, "at no multiple of 128"),
        (7, "more than 1 arrivals in a phase|more bytes landed than were expected"),
        (10, "store_tile of what was written without fence_shared_for_copies"),
    ],
)
def test_steps_out_of_the_protocol(wrong, words, seed):
    _, _, sentence = tile_probe(np.ones((64, 128), np.uint8), wrong=wrong)
    assert re.search(words, sentence), sentence


def test_a_tile_that_nobody_waited_for(monkeypatch):
    """No wait, or one for the wrong phase, which passes at once: poison for some seed, or the late bytes."""
    for wrong in (8, 9):
        seen = set()
        for seed in range(20):
            monkeypatch.setenv("PYROUTE_EMULATOR_SEED", str(seed))
            out, _, sentence = tile_probe(np.ones((64, 128), np.uint8), wrong=wrong)
            seen |= {"poison"} if (out == 0x7F).any() else set()
            seen |= {"reported"} if sentence else set()
        assert seen


def test_a_block_must_not_exit_before_its_stores_have_read(monkeypatch):
    sentences = []
    for seed in range(10):
        monkeypatch.setenv("PYROUTE_EMULATOR_SEED", str(seed))
        sentences.append(tile_probe(np.ones((64, 128), np.uint8), wrong=11)[2])
    assert any("before the block's stores have read its shared memory" in sentence for sentence in sentences)


@SEEDS
@pytest.mark.parametrize("kernel", ["e4m3", "bf16", "bf16_transposed"])
def test_matrix_products(kernel, seed, rng):
    dtype = ml_dtypes.float8_e4m3fn if kernel == "e4m3" else ml_dtypes.bfloat16
    depth = 128 if kernel == "e4m3" else 64
    a, b = (rng.integers(-4, 5, (rows, depth)).astype(dtype) for rows in (64, 128))
    turned = (lambda m: np.ascontiguousarray(m.T)) if kernel == "bf16_transposed" else (lambda m: m)
    out, sentence = product_probe(kernel, turned(a), turned(b))
    assert sentence == ""
    assert np.array_equal(out, a.astype(np.float32) @ b.astype(np.float32).T)


@SEEDS
def test_matrix_products_with_bugs(seed):
    a, b = np.ones((64, 128), ml_dtypes.float8_e4m3fn), np.ones((128, 128), ml_dtypes.float8_e4m3fn)
    for wrong, words in (
        (1, "without the 128-byte swizzle"),
        (2, "without matrix_fence"),
        (3, "lanes of a warp ask for different matrix products"),
        (5, "the four warps from warp 0 on asked for different matrix products"),
        (6, "a matrix product after writes without fence_shared_for_copies"),
    ):
        _, sentence = product_probe("e4m3", a, b, wrong=wrong)
        assert words in sentence
    out, _ = product_probe("e4m3", a, b, wrong=4)  # the sums of products that were not waited for
    assert np.isnan(out).all()


@SEEDS
def test_a_cluster_shares_tiles(seed, rng):
    x = rng.integers(0, 255, (128, 128), dtype=np.uint8)
    out, _, sentence = tile_probe(x, kernel="probe_cluster", blocks=4, cluster=2, tile=2 * TILE + 64)
    assert sentence == ""
    assert np.array_equal(out.reshape(4, -1), np.broadcast_to(swizzled(x), (4, 2 * TILE)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (1, "is not initialised|not fenced"),
        (3, "which has exited|a block that has exited|copies into the block's shared memory are under way"),
    ],
)
def test_blocks_of_a_cluster_that_do_not_wait_for_each_other(wrong, words, monkeypatch):
    sentences = []
    for seed in range(30):
        monkeypatch.setenv("PYROUTE_EMULATOR_SEED", str(seed))
        x = np.ones((128, 128), np.uint8)
        sentences.append(tile_probe(x, kernel="probe_cluster", blocks=2, cluster=2, tile=2 * TILE + 64, wrong=wrong)[2])
    found = [sentence for sentence in sentences if sentence]
    assert found
    assert all(re.search(words, sentence) for sentence in found), found


@SEEDS
def test_a_barrier_that_the_peer_may_not_have_initialised_is_a_race(seed, monkeypatch):
    """Whatever the order: also where the peer happens to have done so."""
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "1")
    x = np.ones((128, 128), np.uint8)
    for wrong, words in ((0, "^$"), (1, "race: .* nothing orders the initialisation of the barrier|is not init")):
        sentence = tile_probe(x, kernel="probe_cluster", blocks=2, cluster=2, tile=2 * TILE + 64, wrong=wrong)[2]
        assert re.search(words, sentence), sentence


@SEEDS
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (0, "^$"),
        (1, "deadlock.*take_registers"),
        (2, "take_registers: 160, but a thread has 168"),
        (3, "the four warps from warp 4 on asked for different .* registers"),
    ],
)
def test_registers_are_a_pool(wrong, words, seed):
    out = to_device(np.zeros(1, np.uint32))
    sentence = launch("probe_registers", RegistersProbeArgs(out.pointer, wrong), blocks=1, threads=384)
    assert re.search(words, sentence), sentence
    if wrong == 0:
        assert to_host(out)[0] == 12  # one lane of each warp


def test_maps_that_the_driver_refuses():
    x = to_device(np.zeros((64, 256), np.uint8))
    assert encode(x)[0] == 0
    for bad in (
        {"box": (256, 64)},  # wider than the swizzle
        {"box": (100, 64)},
        {"box": (128, 257)},
        {"box": (0, 64)},
        {"stride": 264},
        {"stride": 128},
        {"item_type": 13},
    ):
        assert encode(x, **bad)[0] == 1, bad
    shifted = to_device(np.zeros((64, 256), np.uint8), offset=8)
    assert encode(shifted)[0] == 1
