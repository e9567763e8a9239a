"""NVRTC, NVIDIA's compiler as a library: kernels from their sources on the user's machine, without a GPU or a driver.

PyTorch's and CuPy's wheels bring it as ``nvidia-cuda-nvrtc``, a CUDA toolkit has it too. It is called through ctypes;
where it lies in a place that only CuPy knows, through CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class CompileError(RuntimeError):
    """The compiler's own words, on one line."""


class Compiler(NamedTuple):
    """One NVRTC: ``compile(source, name, options)`` gives a cubin."""

    version: tuple[int, int]
    where: str
    compile: Callable[[bytes, str, list[str]], bytes]


OLDEST = (12, 1)  # 12.0 ends the process by a segmentation fault on every file, for sm_90a


@functools.cache
def find(newest_major: int) -> Compiler | None:
    """The newest NVRTC whose cubins a driver of this CUDA major version takes, or None."""
    found = [compiler for path in _libraries() if (compiler := _load(path)) and serves(compiler, newest_major)]
    if found:
        return max(found, key=lambda compiler: compiler.version)
    compiler = _through_cupy()
    return compiler if compiler and serves(compiler, newest_major) else None


def serves(compiler: Compiler, newest_major: int) -> bool:
    return compiler.version >= OLDEST and compiler.version[0] <= newest_major


def _libraries() -> Iterator[str]:
    """Where a libnvrtc may lie: the wheels, a toolkit, what the loader knows."""
    spec = importlib.util.find_spec("nvidia")
    roots = (spec and spec.submodule_search_locations) or ()
    folders = [Path(root) / part for root in roots for part in _WHEEL_FOLDERS]
    folders += [Path(os.environ[name]) / "lib64" for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    for folder in folders:
        yield from (str(path) for path in sorted(folder.glob("libnvrtc.so.*")))
    yield from (f"libnvrtc.so.{major}" for major in (13, 12))


_WHEEL_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")


def _load(path: str) -> Compiler | None:
    try:
        # libnvrtc opens this one by its bare name, which works once it is there
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
            return None
    except (OSError, AttributeError):
        return None
    return Compiler((major.value, minor.value), path, functools.partial(_compile, library))


def _compile(library: ctypes.CDLL, source: bytes, name: str, options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    _checked(library, library.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None))
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), words):
            raise CompileError(_one_line(_text(library, program, "ProgramLog").decode(errors="replace")))
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _checked(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _checked(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _checked(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(library.nvrtcGetErrorString(result).decode())


def _through_cupy() -> Compiler | None:
    try:
        from cupy.cuda import nvrtc

        version = nvrtc.getVersion()
    except Exception:  # CuPy is not installed, or has no NVRTC itself
        return None

    def compile_(source: bytes, name: str, options: list[str]) -> bytes:
        program = nvrtc.createProgram(source.decode(), name, (), ())
        try:
            nvrtc.compileProgram(program, options)
            return bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy takes the last byte for the end of a string
        except nvrtc.NVRTCError as error:
            raise CompileError(_one_line(nvrtc.getProgramLog(program) or str(error))) from None
        finally:
            nvrtc.destroyProgram(program)

    return Compiler(version, "CuPy", compile_)


def _one_line(log: str) -> str:
    lines = [line.strip() for line in log.strip("\0").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no log")
