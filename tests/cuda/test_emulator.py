"""The emulated GPU itself: its words do what CUDA's do, and a planted bug is reported in a sentence."""

from __future__ import annotations

import ctypes
import re

import emulated
import numpy as np
import pytest
from emulated import launch, to_device, to_host

SEEDS = pytest.mark.parametrize("seed", range(6), indirect=True)


class ProbeArgs(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("in", ctypes.c_void_p),
        ("n", ctypes.c_uint32),
        ("wrong", ctypes.c_uint32),
    ]


def run(kernel, x, *, out=None, n=0, wrong=0, blocks=1, threads=32, **shape):
    """The output and the sentence."""
    given = to_device(np.asarray(x, np.uint32))
    made = to_device(np.zeros(given.size if out is None else out, np.uint32))
    sentence = launch(kernel, ProbeArgs(made.pointer, given.pointer, n, wrong), blocks=blocks, threads=threads, **shape)
    return to_host(made), sentence


@SEEDS
def test_a_barrier_separates_writes_from_reads(seed, rng):
    x = rng.integers(0, 1 << 32, 7 * 256, dtype=np.uint32)
    out, sentence = run("probe_barrier", x, blocks=7, threads=256)
    assert sentence == ""
    assert np.array_equal(out.reshape(7, 256), np.roll(x.reshape(7, 256), -1, axis=1))


def test_a_missing_barrier_shows(rng, monkeypatch):
    """As a race, and with races not looked for as a wrong result."""
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "1")
    x = rng.integers(0, 1 << 31, 256, dtype=np.uint32)
    out, sentence = run("probe_barrier", x, wrong=1, threads=256)
    assert re.search(
        r"probe_barrier: thread \d+ of block 0: race: (reads|writes) bytes in shared memory that thread \d+ of block 0 "
        r"(wrote|read), and nothing between orders the two, at probes.cu:\d+$",
        sentence,
    ), sentence
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "0")
    out, sentence = run("probe_barrier", x, wrong=1, threads=256)
    assert sentence == ""
    assert (out == 0x7F7F7F7F).any()  # a neighbour that had not written yet


@SEEDS
def test_a_thread_that_misses_a_barrier_is_named(seed, monkeypatch):
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "0")
    _, sentence = run("probe_barrier", np.arange(256), wrong=2, threads=256)
    assert re.search("thread 7 .*exits, while .* wait at sync_block|1 of the block's have exited", sentence), sentence


@SEEDS
def test_a_deadlock_says_who_waits_where(seed):
    _, sentence = run("probe_barrier", np.arange(128), wrong=3, threads=128)
    assert sentence == (
        "probe_barrier: deadlock, every thread waits: thread 0 of block 0 at ballot; "
        "threads 1-127 of block 0 at sync_block"
    )


@SEEDS
def test_warps_add_up(seed, rng):
    x = rng.integers(0, 1 << 20, 512, dtype=np.uint32)
    out, sentence = run("probe_warp", x, blocks=2, threads=256)
    assert sentence == ""
    assert np.array_equal(out.reshape(-1, 32), np.repeat(x.reshape(-1, 32).sum(1)[:, None], 32, 1))


@SEEDS
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (1, "thread 5 .*exits, while other lanes wait for it at shuffle|names a lane that has exited"),
        (2, "ballot.*while other lanes of it wait at shuffle|shuffle.*while other lanes of it wait at ballot"),
        (3, "does not name the lane that calls it"),
    ],
)
def test_lanes_that_do_not_meet_are_reported(seed, wrong, words):
    _, sentence = run("probe_warp", np.arange(32), wrong=wrong)
    assert re.search(words, sentence), sentence


@SEEDS
def test_words(seed, rng):
    x = rng.integers(0, 9, 32, dtype=np.uint32)
    x[3] = 0
    out, sentence = run("probe_words", x, out=11 * 32)
    assert sentence == ""
    out = out.reshape(11, 32)
    lanes = np.arange(32)
    bits = 1 << lanes.astype(np.uint64)
    assert (out[0] == bits[x & 1 == 1].sum()).all()
    assert [int(bits[x == v].sum()) for v in x] == out[1].tolist()
    assert (out[2] == x.max()).all()
    assert (out[3] == x.min()).all()
    assert (out[4] == x.sum()).all()
    assert np.array_equal(out[5], np.where(lanes < 3, x, np.roll(x, 3)))
    assert (out[6] == x[3]).all()
    assert (out[7, :8] == x[:8].sum()).all()
    assert (out[7, 8:] == x[8:].max()).all()
    assert np.array_equal(out[8], x[lanes ^ 1])
    assert (out[9] == x[9]).all()
    expected = [v.bit_count() + 100 * (32 - v.bit_length()) + 10000 * ((v & -v).bit_length()) for v in x.tolist()]
    assert out[10].tolist() == expected


@SEEDS
def test_the_last_block_sees_all(seed):
    out, sentence = run("probe_last_block", [0], out=20, blocks=19, threads=64)
    assert sentence == ""
    assert out[0] == 19 * 64 * 63 // 2


@SEEDS
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (0, "^$"),
        (1, "race: .* bytes in shared memory"),
        (2, "race: .* bytes in shared memory"),
        (3, "race: .* bytes in shared memory"),
        (4, "race: .* bytes in shared memory"),
        (5, "race: .* bytes in global memory that thread [0-9]+ of block [0-9] (wrote|read)"),
    ],
)
def test_races(wrong, words, seed, monkeypatch):
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "1")
    out, sentence = run("probe_races", [0], out=5 * 64 + 1, blocks=5, threads=64, wrong=wrong)
    assert re.search(words, sentence), sentence
    if wrong == 0:
        t = np.arange(64)
        assert np.array_equal(out[:-1].reshape(5, 64), np.broadcast_to((t ^ 1) + (t ^ 2) + 65, (5, 64)))


def test_memory_that_is_not_there():
    page = 4096 // 4
    for wrong, n in ((1, page), (2, page)):
        _, sentence = run("probe_bounds", np.zeros(page), n=n, wrong=wrong)
        assert "thread 0 of block 0 accessed memory that is not there" in sentence
    for wrong, n, shared in ((3, 1, 0), (4, 1008, 1008)):
        _, sentence = run("probe_bounds", [0], n=n, wrong=wrong, shared=shared)
        assert "block 0 wrote past the end of an object in its shared memory" in sentence
    _, sentence = run("probe_bounds", np.zeros(64), wrong=5)
    assert "no multiple of 16" in sentence
    out, sentence = run("probe_bounds", [0], shared=64)  # and the process goes on
    assert sentence == ""
    assert out[0] == 0x7F


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (6, "a division by zero"),
        (7, "a misaligned address"),
        (8, "an index outside of an array"),
        (9, "a shift by too many bits"),
        (10, "a product that overflows"),
        (11, "a float that no integer of the type holds"),
    ],
)
def test_what_the_language_does_not_define(wrong, words):
    n = 200 if wrong == 11 else 99
    _, sentence = run("probe_bounds", np.zeros(64), n=n, wrong=wrong)
    assert re.search(f"thread 0 of block 0: {words}.* at probes.cu:[0-9]+", sentence), sentence


def test_writes_around_an_array_are_found():
    x = to_device(np.zeros(3, np.uint8))
    ctypes.memset(x.pointer + 3, 0, 1)
    with pytest.raises(AssertionError, match="wrote around an array of 3 bytes"):
        emulated.memory.check()
    emulated.memory.regions.clear()


def test_launches_that_no_gpu_takes(monkeypatch):
    args = ProbeArgs(0, 0, 0, 0)
    assert "the launch bound is 32" in launch("probe_words", args, blocks=1, threads=64)
    assert "multiple of 32" in launch("probe_words", args, blocks=1, threads=31)
    assert "a grid of 0" in launch("probe_words", args, blocks=0, threads=32)
    assert "bytes of dynamic shared memory" in launch("probe_words", args, blocks=1, threads=32, shared=232449)
    assert "clusters of 2 in a grid of 3" in launch("probe_words", args, blocks=3, threads=32, cluster=2)
    monkeypatch.setenv("PYROUTE_EMULATED_ARCH", "80")
    assert "on an older device" in launch("probe_words", args, blocks=2, threads=32, cluster=2)


def test_planted_failures():
    emulated.fail_next("cuLaunchKernelEx", 2)
    x = to_device(np.zeros(32, np.uint32))
    out = to_device(np.zeros(352, np.uint32))
    emulator = emulated.library()
    emulated.launched()
    launch("probe_words", ProbeArgs(out.pointer, x.pointer, 0, 0), blocks=1, threads=32)
    assert emulated.launched() == []
    assert launch("probe_words", ProbeArgs(out.pointer, x.pointer, 0, 0), blocks=1, threads=32) == ""
    assert emulated.launched() == ["probe_words"]
    assert emulator.pyroute_emulator() == 1
