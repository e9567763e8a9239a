"""Results in recycled memory are ordinary arrays, and what they leave behind is kept, bounded and released."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest

import pyroute
from pyroute import _backend

pytestmark = pytest.mark.skipif(not _backend.HAS_CORE, reason="the compiled floor is not built")

MiB = 1 << 20


@pytest.fixture(autouse=True)
def no_cache_before_and_after():
    gc.collect()
    before = pyroute.cache_info().limit
    pyroute.set_cache_limit(256 * MiB)
    pyroute.empty_cache()
    yield
    pyroute.set_cache_limit(before)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def empty(num_bytes: int) -> np.ndarray:
    return _backend.empty((num_bytes,), np.uint8)


def test_the_next_result_of_a_size_takes_the_memory_of_the_last():
    x = np.ones((300, 1000), np.float32)
    first = pyroute.quantize_fp8(x)
    at, recycled = address(first.codes), pyroute.cache_info().recycled
    del first
    again = pyroute.quantize_fp8(x)
    assert address(again.codes) == at
    assert pyroute.cache_info().recycled > recycled


def test_results_own_aligned_writeable_memory():
    for num_bytes in (1, 1000, 65535, 65536, 100_001, 3 * MiB, 20 * MiB):
        array = empty(num_bytes)
        assert array.flags.owndata
        assert array.flags.writeable
        assert array.base is None
        assert num_bytes < 65536 or address(array) % (4096 if num_bytes < 2 * MiB else 2 * MiB) == 0
        array[0] = array[-1] = 1


def test_small_arrays_and_objects_stay_numpys():
    before = pyroute.cache_info()
    arrays = [empty(65535), _backend.empty((0, 10**9), np.int8), _backend.empty((9999,), object)]
    assert pyroute.cache_info() == before
    assert arrays[2][5] is None


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        ((1 << 40, 1 << 10), "float32", MemoryError),
        ((1 << 62, 1 << 10), "float32", ValueError),
        ((1 << 70,), "float32", OverflowError),
        ((-1,), "float32", ValueError),
        ((1.5,), "float32", TypeError),
        (3, "float32", TypeError),
        ((1,) * 33, "float32", ValueError),
        ((3,), "nonsense", TypeError),
    ],
)
def test_impossible_arrays(shape, dtype, error):
    with pytest.raises(error):
        _backend.empty(shape, dtype)
    assert address(np.empty(MiB, np.uint8)) % MiB != 0  # NumPy's own handler is back


def test_memory_is_kept_only_when_every_view_is_gone():
    array = empty(MiB)
    array[:] = 7
    view, exported, gone = array[10:20], memoryview(array), weakref.ref(array)
    del array
    gc.collect()
    assert pyroute.cache_info().kept == 0
    assert view.tolist() == [7] * 10
    del view
    exported.release()
    del exported
    assert gone() is None
    assert pyroute.cache_info().kept == MiB


def test_dlpack_keeps_the_memory():
    array = empty(MiB)
    array[:] = 9
    other = np.from_dlpack(array)
    del array
    assert empty(MiB).ctypes.data != other.ctypes.data
    assert (other == 9).all()


def test_copies_are_numpys():
    array = empty(MiB)
    array[:] = np.arange(MiB) % 251
    in_use = pyroute.cache_info().in_use
    for other in (array.copy(), copy.deepcopy(array), pickle.loads(pickle.dumps(array)), array + 0):
        assert other.tobytes() == array.tobytes()
    assert pyroute.cache_info().in_use == in_use


def test_resize_moves_the_contents():
    array = empty(MiB)
    array[:] = np.arange(MiB) % 251
    expected = array.copy()
    array.resize((3 * MiB,), refcheck=False)
    assert (array[:MiB] == expected).all()
    assert not array[MiB:].any()
    array.resize((100,), refcheck=False)
    assert (array == expected[:100]).all()
    del array
    assert pyroute.cache_info().in_use == 0


def test_the_limit_holds_and_is_checked():
    pyroute.set_cache_limit(2 * MiB)
    arrays = [empty(MiB) for _ in range(5)]
    assert pyroute.cache_info().in_use == 5 * MiB
    arrays.clear()
    assert pyroute.cache_info().kept == 2 * MiB
    pyroute.set_cache_limit(0)
    assert pyroute.cache_info().kept == 0
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match=r"^set_cache_limit: num_bytes must be in 0\.\."):
            pyroute.set_cache_limit(bad)
    for bad in (1.5, "1G", None, True):
        with pytest.raises(TypeError, match=r"^set_cache_limit: num_bytes must be an integer, got "):
            pyroute.set_cache_limit(bad)


def test_empty_cache_says_what_it_released():
    arrays = [empty(MiB), empty(3 * MiB)]
    arrays.clear()
    assert pyroute.cache_info().kept == 4 * MiB
    assert pyroute.empty_cache() == 4 * MiB
    assert pyroute.empty_cache() == 0


def test_threads_never_share_a_block():
    failures = []

    def work(number):
        for i in range(200):
            array = empty(MiB + 4096 * (i % 3))
            array[:: 1 << 14] = number
            if (array[:: 1 << 14] != number).any():
                failures.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pyroute.cache_info().in_use == 0


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("text", "limit"), [("0", 0), ("12345", 12345), ("64K", 1 << 16), ("1.5M", 3 << 19), ("2G", 2 << 30)]
)
def test_the_variable_sets_the_limit(text, limit):
    assert int(run("import pyroute; print(pyroute.cache_info().limit)", PYROUTE_CACHE_LIMIT=text)) == limit


def test_nonsense_in_the_variable_is_passed_over():
    default = int(run("import pyroute; print(pyroute.cache_info().limit)", PYROUTE_CACHE_LIMIT=""))
    assert 64 * MiB <= default <= max(64 * MiB, os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES") // 16)
    for nonsense in ("lots", "-1", "1T", "1GB", "nan", "1e300"):
        assert int(run("import pyroute; print(pyroute.cache_info().limit)", PYROUTE_CACHE_LIMIT=nonsense)) == default


def test_arrays_that_outlive_the_package_and_the_interpreter():
    code = """
    import atexit, sys
    import numpy as np
    import pyroute
    a = pyroute.quantize_fp8(np.ones((512, 512), np.float32)).codes
    class Last:
        def __del__(self, a=a):
            assert a.size == 512 * 512
    atexit.register(lambda last=Last(): None)
    np.kept_for_ever = a
    for name in [n for n in sys.modules if n.startswith("pyroute")]:
        del sys.modules[name]
    del pyroute, a
    """
    assert run(code) == ""


def test_a_forked_child_keeps_nothing_of_its_parent():
    code = """
    import os
    import numpy as np
    from pyroute import _backend, cache_info
    live, freed = _backend.empty((1 << 20,), np.uint8), _backend.empty((1 << 20,), np.uint8)
    live[:], freed[:] = 1, 2
    del freed
    child = os.fork()
    if child == 0:
        fresh = _backend.empty((1 << 20,), np.uint8)
        fresh[:] = 3
        os._exit(0 if cache_info().kept == 0 and (live == 1).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache_info().kept == 1 << 20
    print(live[5])
    """
    assert run(code, PYROUTE_CACHE_LIMIT="1G").strip() == "1"


def lazily_free() -> int:
    """Bytes of this process that the kernel may take when it runs short; skips where it does not say."""
    try:
        with open("/proc/self/smaps_rollup") as rollup:
            return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("LazyFree"))
    except (OSError, StopIteration):
        pytest.skip("no LazyFree in /proc/self/smaps_rollup")


def test_large_blocks_are_offered_to_the_system_once_they_are_idle():
    sizes = (24 * MiB, 20 * MiB, 8 * MiB)  # the last one too small to be offered
    arrays = [empty(size) for size in sizes]
    for array in arrays:
        array[:] = 1
    before = lazily_free()
    del arrays[:], array
    assert lazily_free() == before  # the next call will want them
    time.sleep(1.1)
    busy = empty(24 * MiB)
    busy[:] = 2
    del busy  # only now is anything looked at
    assert lazily_free() - before == 20 * MiB
    again = empty(20 * MiB)
    again[:] = 3
    assert lazily_free() == before
    assert (again == 3).all()


def test_kept_memory_makes_room_before_a_memory_error():
    code = """
    import resource
    import numpy as np
    from pyroute import _backend, cache_info
    array = _backend.empty((400 << 20,), np.uint8)
    del array
    assert cache_info().kept >= 400 << 20
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20),) * 2)
    array = _backend.empty((480 << 20,), np.uint8)
    assert cache_info().kept == 0
    try:
        _backend.empty((480 << 20,), np.uint8)
    except MemoryError as error:
        print(error)
    """
    assert run(code, PYROUTE_CACHE_LIMIT="1G").startswith("Unable to allocate 480. MiB")
