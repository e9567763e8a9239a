"""The tensors of a checkpoint by name, mapped into memory from safetensors files.

The safetensors library reads every file first and refuses what is truncated, overlapping or mis-sized. Its NumPy side
has no float8 and copies each tensor twice (64 MiB in 37 ms where copying takes 8; Zen 4), so the bytes themselves are
mapped here, by the offsets that it has checked. Copied into memory that is warm they come at 10 GB/s, by pread at 5;
asking the system to read ahead changed nothing.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import _check

Array = Any

INDEX = "model.safetensors.index.json"

_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def library(function: str) -> Any:
    """The safetensors package, which nothing else needs."""
    try:
        import safetensors.numpy
    except ImportError as error:
        message = f'{function}: needs the safetensors package: pip install "pyroute-moe[checkpoints]" ({error})'
        raise ImportError(message) from None
    return safetensors


class Checkpoint:
    """A safetensors file, or a folder with an index or with one or more such files.

    ``files`` maps the name of each tensor to its file. A file is opened when its first tensor is read.
    """

    def __init__(self, function: str, path: Any) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise _check.type_error(function, "path", "a file or folder", _check.describe(path))
        self.function, self.path = function, Path(path)
        self._opened: dict[Path, _File] = {}
        library(function)
        try:
            exists = self.path.exists()
        except OSError as error:  # no folder may be entered, or no name is this long
            raise _check.unreadable(function, "path", error) from None
        if not exists:
            raise FileNotFoundError(f"{function}: path must be a file or folder that exists, got {self.path}")
        index = self.path / INDEX if self.path.is_dir() else self.path
        if index.suffix == ".json" and index.exists():
            self.listing, self.files = index, _read_index(function, index)
        else:
            self.listing, self.files = self.path, self._scan()

    def _scan(self) -> dict[str, Path]:
        """Without an index: every tensor of every file."""
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not files:
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
            got = f"only {', '.join(others)}, which can run code when read" if others else "none"
            raise _check.value_error(self.function, "path", f"a folder with safetensors files ({self.path})", got)
        found: dict[str, Path] = {}
        for file in files:
            for name in self._open(file).tensors:
                if name in found:
                    raise self.error(name, "in one file only", f"it in {found[name].name} and {file.name}")
                found[name] = file
        return found

    def _open(self, file: Path) -> _File:
        if file not in self._opened:
            self._opened[file] = _File(self.function, file)
        return self._opened[file]

    def error(self, name: str, expected: str, got: object) -> ValueError:
        """About one tensor, with the file that it is in."""
        file = getattr(self, "files", {}).get(name)
        where = f" of {file.name}" if file else ""
        return _check.value_error(self.function, f"tensor {name}{where}", expected, got)

    def missing(self, name: str) -> ValueError:
        return _check.value_error(self.function, f"tensor {name}", f"in {self.listing}", "none of that name")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Array:
        """A read-only array over the mapped file."""
        file = self.files.get(name)
        if file is None:
            raise self.missing(name)
        if not file.exists():
            raise self.error(name, f"in a file that is there ({file.parent})", "no such file")
        opened = self._open(file)
        if name not in opened.tensors:
            raise self.error(name, f"in the file that {self.listing.name} names", "none of that name there")
        return opened.array(name)

    def check_duplicates(self, names: Iterable[str]) -> None:
        """No opened file may hold one of these tensors beside the file that the index names."""
        for name in names:
            for file, opened in self._opened.items():
                if name in opened.tensors and file != self.files[name]:
                    raise self.error(name, "in one file only", f"another of that name in {file.name}")


class _File:
    """One mapped file; ``tensors`` maps a name to its type, shape and place."""

    def __init__(self, function: str, path: Path) -> None:
        package = library(function)
        try:
            with package.safe_open(path, "np"):
                pass
            with path.open("rb") as file:
                self.start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(self.start - 8), object_pairs_hook=_no_twins)
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except package.SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise _check.value_error(function, f"file {path}", "an intact safetensors file", reason) from None
        except ValueError as error:
            raise _check.value_error(function, f"file {path}", "an intact safetensors file", str(error)) from None
        except OSError as error:  # a folder, a link to nothing, no permission
            raise _check.unreadable(function, f"file {path}", error) from None
        self.function, self.path = function, path
        self.tensors: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def array(self, name: str) -> Array:
        entry = self.tensors[name]
        first, end = entry["data_offsets"]
        if entry["dtype"] not in _TYPES:
            raise _check.type_error(
                self.function, f"tensor {name} of {self.path.name}", "of a type that NumPy has", entry["dtype"]
            )
        flat = np.frombuffer(self.memory, np.uint8, end - first, self.start + first)
        return flat.view(_check.DTYPES[_TYPES[entry["dtype"]]]).reshape(entry["shape"])


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"two entries named {twin}")
    return found


def _read_index(function: str, index: Path) -> dict[str, Path]:
    """The weight map of an index; its files lie beside it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)["weight_map"]
        named = {name: index.parent / file for name, file in weight_map.items()}
    except OSError as error:
        raise _check.unreadable(function, f"file {index}", error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "an index with a weight_map from tensors to files"
        raise _check.value_error(function, f"file {index}", expected, f"{type(error).__name__}: {error}") from None
    for name, file in named.items():
        if file.parent != index.parent or file.suffix != ".safetensors":
            expected = f"in a safetensors file beside {index.name}"
            raise _check.value_error(function, f"tensor {name}", expected, weight_map[name])
    return named
