"""Every kernel compiles, by nvcc and by NVRTC, without spills; images are found, made, kept and shared as promised."""

from __future__ import annotations

import ctypes
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
from compiled import ARCHS, ROOMS

from pyroute._device import images, nvrtc

ROOT = Path(__file__).resolve().parents[2]
CUBINS = [(room, arch) for room in ROOMS for arch in compiled.archs_of(room)]


def test_every_room_has_an_image_for_every_architecture():
    if not compiled.HAS_FATBINS:
        pytest.skip("this build has no fatbins")
    asked = os.environ.get("PYROUTE_CUDA_ARCHS")  # what the build was told to compile for, in place of all
    expected = {f"sm_{number}" for number in asked.split(";")} if asked else set(ARCHS)
    assert set((images._KERNELS / "architectures").read_text().split()[2:]) == expected
    for room in ROOMS:
        assert (images._KERNELS / f"{room}.fatbin").is_file(), room
    for room, arch in CUBINS:
        assert compiled.resources(room, arch), (room, arch)


@pytest.mark.parametrize("room", ROOMS)
def test_no_kernel_spills_or_uses_local_memory(room):
    if not compiled.HAS_FATBINS:
        pytest.skip("this build has no fatbins")
    for arch in compiled.archs_of(room):
        for kernel, used in compiled.resources(room, arch).items():
            # on the newest a word or two of a kernel for float64 costs nothing that counts
            few = 8 if arch in ("sm_100a", "sm_120a") and "float64" in kernel else 0
            assert used.stack <= few, (kernel, arch, used)
            assert used.local == 0, (kernel, arch, used)


@pytest.mark.parametrize("room", ROOMS)
def test_subnormals_are_kept(room):
    """-fmad=false alone is not checked here: a division's own steps are fused."""
    if not compiled.HAS_FATBINS:
        pytest.skip("this build has no fatbins")
    for kernel, text in compiled.sass(room, "sm_90a").items():
        own = re.split(r"\.weak\s+\$__internal_", text)[0]  # without the subroutines of IEEE divisions
        flushing = re.findall(r"([A-Z]\S*\.FTZ\S*) (.*);", own)
        # conversions divide integers; a sum with zero is a sign of an IEEE reciprocal; half of an approximate inverse
        # root, and x times it, are the first steps of an IEEE root
        roots = {operands.split(", ")[1] for name, operands in flushing if operands.endswith(", 0.5 ")}
        own_steps = [
            operands for _, operands in flushing if "-RZ" in operands or roots & set(re.findall(r"R\d+", operands))
        ]
        bad = [(n, operands) for n, operands in flushing if n[:3] not in ("F2I", "I2F") and operands not in own_steps]
        assert not bad, kernel


TRAPS = ("sm90/grouped_gemm", "sm_90a", "-DPYROUTE_HANG_TRAP")  # tests/cuda/real.py makes these where a product hangs


@pytest.mark.parametrize(("room", "arch", "more"), [*((*cubin, "-DPLAIN") for cubin in CUBINS), TRAPS])
def test_nvrtc_takes_every_source_without_a_warning(room, arch, more):
    """To PTX that is not optimised, in a fifth of the time: what comes after the language is the same as nvcc's."""
    compiler = compiled.compiler()
    if compiler.where == "CuPy":
        pytest.skip("needs libnvrtc")
    library = ctypes.CDLL(compiler.where)
    source = (compiled.SOURCES / f"{room}.cu").read_bytes()
    flags = [flag for flag in images.options_for(arch.replace("sm_", "compute_")) if flag != "-lineinfo"]
    options = [flag.encode() for flag in (*flags, more, "-G")]
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, room.encode(), 0, None, None) == 0
    result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = nvrtc._text(library, program, "ProgramLog").decode().strip("\0 \n")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert (result, log) == (0, "")


def test_nvrtc_through_cupy_gives_the_same_bytes():
    through = nvrtc._through_cupy()
    direct = compiled.compiler()
    if through is None or direct.where == "CuPy" or through.version != direct.version:
        pytest.skip("needs CuPy with the same NVRTC")
    source = (compiled.SOURCES / "permutation.cu").read_bytes()
    for arch in ARCHS:
        options = images.options_for(arch)
        assert through.compile(source, "permutation.cu", options) == direct.compile(source, "permutation.cu", options)


def test_an_nvrtc_that_crashes_or_is_newer_than_the_driver_is_not_used(monkeypatch):
    compilers = {name: nvrtc.Compiler(version, name, None) for name, version in VERSIONS.items()}
    monkeypatch.setattr(nvrtc, "_load", compilers.get)
    monkeypatch.setattr(nvrtc, "_through_cupy", lambda: compilers["crashes"])
    for found, expected in (
        (["crashes", "old", "new"], {12: "old", 13: "new"}),
        (["new", "crashes"], {12: None, 13: "new"}),
    ):
        monkeypatch.setattr(nvrtc, "_libraries", lambda found=found: iter(found))
        for major, name in expected.items():
            assert nvrtc.find.__wrapped__(major) == (name and compilers[name])


VERSIONS = {"crashes": (12, 0), "old": (12, 1), "new": (13, 0)}


def test_an_error_of_nvrtc_is_one_sentence():
    compiler = compiled.compiler()
    for made in (compiler, nvrtc._through_cupy()):
        if made:
            with pytest.raises(nvrtc.CompileError, match=r"^x\.cu\(2\): error: \S.*$"):
                made.compile(b"\nnonsense;", "x.cu", images.options_for("sm_80"))
    with pytest.raises(nvrtc.CompileError):
        compiler.compile(b"", "x.cu", ["-arch=sm_1"])


@pytest.mark.parametrize(
    ("capability", "code"),
    [(80, "sm_80"), (86, "sm_86"), (89, "sm_89"), (90, "sm_90a"), (100, "sm_100a"), (103, "sm_103a"), (120, "sm_120a")],
)
def test_nvrtc_compiles_for_the_card_itself(capability, code):
    assert images.arch(capability) == code
    assert images.runs_on(code, capability)


def test_which_code_runs_where():
    runs = {
        "sm_80": [80, 86, 87, 89],
        "sm_86": [86, 87, 89],
        "sm_90": [90],
        "sm_90a": [90],
        "sm_100": [100, 103],
        "sm_100a": [100],
        "sm_100f": [100, 103],
        "sm_120a": [120],
        "sm_120": [120, 121],
    }
    for code, cards in runs.items():
        every = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
        assert [card for card in every if images.runs_on(code, card)] == cards, code


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A package with fatbins for sm_80 and sm_90a by CUDA 13.0, without sources; an environment without settings."""
    for name in ("PYROUTE_CUDA_DRIVER", "PYROUTE_CUDA_IMAGES", "PYROUTE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "pyroute" / "_kernels"
    folder.mkdir(parents=True)
    (folder / "architectures").write_text("cuda 13.0\nsm_80\nsm_90a\n")
    (folder / "gating.fatbin").write_bytes(b"fat")
    monkeypatch.setattr(images, "_KERNELS", folder)
    images.route.cache_clear()
    yield folder
    images.route.cache_clear()


def test_fatbins_come_first(kernels):
    for capability in (80, 86, 89, 90):
        assert images.route(capability, 13000) == images.Route("fatbins")
    assert images.image("gating", 90, 13000) == b"fat"


def test_a_room_without_a_fatbin_is_compiled(kernels, monkeypatch):
    monkeypatch.setattr(nvrtc, "find", lambda newest_major: None)
    with pytest.raises(
        RuntimeError, match=r"^the package was built without the kernels of sm90/moe, and there is no NV"
    ):
        images.image("sm90/moe", 90, 13000)
    compiler, asked = counting()
    monkeypatch.setattr(nvrtc, "find", lambda newest_major: compiler)
    (kernels / "csrc" / "cuda" / "sm90").mkdir(parents=True)
    (kernels / "csrc" / "cuda" / "sm90" / "moe.cu").write_text("kernel")
    monkeypatch.setenv("PYROUTE_CACHE_DIR", str(kernels / "cache"))
    assert images.image("sm90/moe", 90, 13000) == b"\x7fELF made"
    assert len(asked) == 1


def test_why_there_are_no_kernels(kernels, monkeypatch):
    def why(capability, version):
        images.route.cache_clear()
        return images.route(capability, version).why_not

    assert why(100, 13000).startswith("the kernels were built for sm_80, sm_90a only, and the kernels' sources are not")
    assert why(90, 12080).startswith("the kernels were built by CUDA 13.0, newer than the driver, and ")
    (kernels / "csrc").mkdir()
    monkeypatch.setattr(nvrtc, "find", lambda newest_major: None)
    assert "and there is no NVRTC for this driver" in why(100, 13000)
    monkeypatch.setenv("PYROUTE_CUDA_IMAGES", "fatbins")
    assert why(100, 13000) == "the kernels were built for sm_80, sm_90a only"
    monkeypatch.setenv("PYROUTE_CUDA_IMAGES", "nvrtc")
    assert why(90, 13000).startswith("PYROUTE_CUDA_IMAGES allows no fatbins, and there is no NVRTC")
    with pytest.raises(RuntimeError, match=r"^no CUDA kernels for compute capability 9\.0: PYROUTE_CUDA_IMAGES"):
        images.image("gating", 90, 13000)
    monkeypatch.delenv("PYROUTE_CUDA_IMAGES")
    (kernels / "architectures").unlink()
    assert why(90, 13000).startswith("the package was built without nvcc, and ")


def counting(made: bytes = b"\x7fELF made"):
    """A compiler, and what it was asked for."""
    asked = []

    def compile_(source, name, options):
        asked.append((source, name, tuple(options)))
        return made

    return nvrtc.Compiler((13, 0), "a test", compile_), asked


@pytest.fixture
def sources(kernels, monkeypatch):
    """A source tree of one room with one header; cubins are kept in the folder that comes back."""
    cuda = kernels / "csrc" / "cuda"
    cuda.mkdir(parents=True)
    (cuda / "gating.cu").write_text("kernel")
    (cuda / "gating.cuh").write_text("header")
    cache = kernels / "cache"
    monkeypatch.setenv("PYROUTE_CACHE_DIR", str(cache))
    return cuda, cache


def test_a_cubin_is_made_once_and_private_to_its_user(sources):
    compiler, asked = counting()
    for _ in range(3):
        assert images.cubin(compiler, "gating", "sm_90a") == b"\x7fELF made"
    assert len(asked) == 1
    assert asked[0][:2] == (b"kernel", "gating.cu")
    assert "-fmad=false" in asked[0][2]
    assert "-arch=sm_90a" in asked[0][2]
    (kept,) = sources[1].iterdir()
    assert kept.name.startswith("gating-sm_90a-")
    assert stat.S_IMODE(sources[1].stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_cubin_is_made_anew_when_anything_changes(sources):
    cuda, cache = sources
    compiler, asked = counting()
    newer = compiler._replace(version=(13, 1))
    images.cubin(compiler, "gating", "sm_90a")
    images.cubin(compiler, "gating", "sm_80")
    images.cubin(newer, "gating", "sm_90a")
    (cuda / "gating.cuh").write_text("another header")
    images.cubin(compiler, "gating", "sm_90a")
    (cuda / "gating.cu").write_text("another kernel")
    images.cubin(compiler, "gating", "sm_90a")
    assert len(asked) == len(list(cache.iterdir())) == 5


def test_a_damaged_cubin_is_made_anew(sources):
    compiler, asked = counting()
    images.cubin(compiler, "gating", "sm_90a")
    (kept,) = sources[1].iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"X" + whole[1:]):
        kept.write_bytes(damaged)
        before = len(asked)
        assert images.cubin(compiler, "gating", "sm_90a") == b"\x7fELF made"
        assert len(asked) == before + 1
        assert kept.read_bytes() == whole


def test_no_folder_no_cache(sources, monkeypatch, tmp_path):
    compiler, asked = counting()
    in_the_way = tmp_path / "a file"
    in_the_way.write_text("")
    monkeypatch.setenv("PYROUTE_CACHE_DIR", str(in_the_way / "cache"))
    for _ in range(2):
        assert images.cubin(compiler, "gating", "sm_90a") == b"\x7fELF made"
    assert len(asked) == 2
    monkeypatch.delenv("PYROUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    images.cubin(compiler, "gating", "sm_90a")
    assert [path.name[:14] for path in (tmp_path / "xdg" / "pyroute").iterdir()] == ["gating-sm_90a-"]


def test_a_full_disk_leaves_nothing_behind(sources, monkeypatch):
    compiler, _ = counting()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert images.cubin(compiler, "gating", "sm_90a") == b"\x7fELF made"
    assert list(sources[1].iterdir()) == []


def test_processes_that_compile_at_the_same_time(sources):
    code = f"""
import sys
from pathlib import Path
from pyroute._device import images, nvrtc
images._KERNELS = Path({str(sources[0].parent.parent)!r})
made = b"\\x7fELF" + bytes(1 << 20)
compiler = nvrtc.Compiler((13, 0), "a test", lambda source, name, options: made)
for _ in range(20):
    assert images.cubin(compiler, "gating", "sm_90a") == made
    for kept in Path({str(sources[1])!r}).glob("gating*"):
        if sys.argv[1] == "0":
            kept.unlink(missing_ok=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    children = [subprocess.Popen([sys.executable, "-c", code, str(i)], env=environment) for i in range(4)]
    assert [child.wait(60) for child in children] == [0, 0, 0, 0]
    assert not list(sources[1].glob(".*"))


def test_a_compiler_that_fails_names_the_room(sources):
    def compile_(source, name, options):
        raise nvrtc.CompileError("gating.cu(1): error: no")

    with pytest.raises(
        RuntimeError, match=r"^NVRTC does not compile the kernels of gating for sm_90a: gating\.cu\(1\)"
    ):
        images.cubin(nvrtc.Compiler((13, 0), "a test", compile_), "gating", "sm_90a")
