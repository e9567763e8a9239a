"""The kernels' images: nvcc's fatbins where the package was built with them, else NVRTC's cubins, kept on disk.

``PYROUTE_CUDA_IMAGES`` set to ``fatbins`` or ``nvrtc`` allows only one of the two. Cubins are kept in
``PYROUTE_CACHE_DIR``, by default ``$XDG_CACHE_HOME/pyroute`` or ``~/.cache/pyroute``; a folder that cannot be written
is no error. A cubin's name holds a digest of all that it depends on, so nothing there is ever stale.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from . import nvrtc


def _kernels_folder() -> Path:
    """Where the build put them: in the package; after an editable install it has a second folder, which was built."""
    folders = [Path(root).resolve() / "_kernels" for root in sys.modules[__package__.partition(".")[0]].__path__]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


_KERNELS = _kernels_folder()

# As CMake gives nvcc: no contraction, IEEE division and square roots, subnormals kept, lines for the profilers.
FLAGS = ("-std=c++17", "-fmad=false", "-lineinfo")

_compiling = threading.Lock()


class Route(NamedTuple):
    """How a card's kernels come: ``how`` in a few words, or empty with ``why_not``."""

    how: str
    why_not: str = ""


def arch(capability: int) -> str:
    """The code that NVRTC makes for a card: instructions of 9.0 and later that tensor cores need are in the a forms."""
    return f"sm_{capability}" if capability < 90 else f"sm_{capability}a"


def runs_on(code: str, capability: int) -> bool:
    """Whether code for ``sm_80``, ``sm_90a`` or ``sm_100f`` runs on a card: without an a, on later minors too."""
    number, kind = code.removeprefix("sm_").rstrip("af"), code[-1]
    major, minor = divmod(int(number), 10)
    if kind == "a" or major != capability // 10:
        return int(number) == capability
    return minor <= capability % 10


@functools.cache
def route(capability: int, driver_version: int) -> Route:
    """Fatbins if they hold code for the card that the driver takes, else NVRTC, else why neither."""
    if _emulated():
        return Route("emulated")
    allowed = os.environ.get("PYROUTE_CUDA_IMAGES", "")
    why_not = "PYROUTE_CUDA_IMAGES allows no fatbins" if allowed == "nvrtc" else _no_fatbins(capability, driver_version)
    if not why_not:
        return Route("fatbins")
    if allowed == "fatbins":
        return Route("", why_not)
    if not _sources().is_dir():
        return Route("", f"{why_not}, and the kernels' sources are not installed")
    compiler = nvrtc.find(driver_version // 1000)
    if compiler is None:
        return Route("", f"{why_not}, and there is no NVRTC for this driver (12.1 or newer; with CuPy, PyTorch, CUDA)")
    through = " through CuPy" if compiler.where == "CuPy" else ""
    return Route(f"NVRTC {compiler.version[0]}.{compiler.version[1]}{through}")


def image(room: str, capability: int, driver_version: int) -> bytes:
    """The code of ``csrc/cuda/<room>.cu`` for a card."""
    chosen = route(capability, driver_version)
    if not chosen.how:
        raise RuntimeError(f"no CUDA kernels for compute capability {capability / 10}: {chosen.why_not}")
    if chosen.how == "emulated":
        return room.encode()
    fatbin = _KERNELS / f"{room}.fatbin"
    if chosen.how == "fatbins" and fatbin.is_file():
        return fatbin.read_bytes()
    compiler = nvrtc.find(driver_version // 1000)  # a build for sm_90 lacks what only sm_90a can do
    if compiler is None:
        raise RuntimeError(f"the package was built without the kernels of {room}, and there is no NVRTC")
    return cubin(compiler, room, arch(capability))


def cubin(compiler: nvrtc.Compiler, room: str, code: str, *more: str) -> bytes:
    """NVRTC's cubin, from the disk if it was made before; one thread at a time. ``more``: options beside the usual."""
    options = [*options_for(code), *more]
    with _compiling:
        path = _cached(room, code, _digest(room, compiler.version, options))
        if path and (kept := _read(path)):
            return kept
        try:
            source = (_sources() / "cuda" / f"{room}.cu").read_bytes()
            made = compiler.compile(source, f"{room}.cu", options)
        except nvrtc.CompileError as error:
            raise RuntimeError(f"NVRTC does not compile the kernels of {room} for {code}: {error}") from None
        if path:
            _write(path, made)
        return made


def options_for(code: str) -> list[str]:
    csrc = _sources()
    # the argument structs' headers have functions for the host too, which NVRTC takes for the device's
    return [*FLAGS, "-default-device", f"-arch={code}", f"-I{csrc}", f"-I{csrc / 'cuda' / 'nvrtc'}"]


def _emulated() -> bool:
    """The tests' driver has the kernels compiled in and finds them by the room's name."""
    return "emulated" in os.path.basename(os.environ.get("PYROUTE_CUDA_DRIVER", ""))


def _no_fatbins(capability: int, driver_version: int) -> str:
    """Why the fatbins do not serve; empty if they do."""
    try:
        # "cuda 13.0", then one architecture a line
        toolkit, *codes = (_KERNELS / "architectures").read_text().split("\n")
    except OSError:
        return "the package was built without nvcc"
    version = toolkit.removeprefix("cuda ")
    if int(version.split(".")[0]) > driver_version // 1000:
        return f"the kernels were built by CUDA {version}, newer than the driver"
    codes = [code for code in codes if code]
    if any(runs_on(code, capability) for code in codes):
        return ""
    return f"the kernels were built for {', '.join(codes)} only"


def _sources() -> Path:
    """``csrc`` as installed, or of the source tree that this is."""
    installed = _KERNELS / "csrc"
    return installed if installed.is_dir() else _KERNELS.parent.parent / "csrc"


def _digest(room: str, version: tuple[int, int], options: list[str]) -> str:
    """Of the source, every header, the options and the compiler."""
    csrc = _sources()
    places = [*csrc.glob("*.h"), *csrc.glob("cuda/**/*.h"), *csrc.glob("cuda/**/*.cuh"), csrc / "cuda" / f"{room}.cu"]
    digest = hashlib.sha256(repr((version, options)).encode())
    for path in sorted(places):
        digest.update(f"\0{path.relative_to(csrc)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _cached(room: str, code: str, digest: str) -> Path | None:
    """Where a cubin is kept; None where there is no home."""
    folder = os.environ.get("PYROUTE_CACHE_DIR")
    if not folder:
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:
            return None
        folder = os.path.join(home, "pyroute")
    return Path(folder) / f"{room.replace('/', '-')}-{code}-{digest}.cubin"


def _read(path: Path) -> bytes | None:
    """A kept cubin, if it is whole: its digest follows it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    made, digest = data[:-32], data[-32:]
    return made if hashlib.sha256(made).digest() == digest else None


def _write(path: Path, made: bytes) -> None:
    """All or nothing, whatever other processes do at the same time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(made + hashlib.sha256(made).digest())
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
