"""The memory of results: kept when an array goes and handed out again, since fresh pages cost more than most ops.

A result of 64 KiB or more is an ordinary array that owns its data (it may be viewed, resized, pickled, exported, kept
for ever). When its last reference goes its memory is kept for the next result of that size. At most a sixteenth of
the machine's or container's memory is kept, or ``PYROUTE_CACHE_LIMIT`` (bytes, or a number with K, M or G); what was
unused longest goes first. Of blocks of 16 MiB and more that had no use for a second the next result to go tells the
system, which takes their pages when memory is short; a failed allocation releases everything that is kept and tries
again before it is a MemoryError.
"""

from __future__ import annotations

from typing import NamedTuple

from . import _backend, _check


class CacheInfo(NamedTuple):
    """Bytes and blocks of the cpu backend's memory; all zero without it."""

    in_use: int  # bytes of living results and workspaces
    kept: int  # bytes that wait for the next call
    limit: int  # of ``kept``
    fresh: int  # blocks that came from the system so far
    recycled: int  # blocks that were handed out again


def cache_info() -> CacheInfo:
    """What is in use and what is kept.

    Examples
    --------
    >>> pyroute.cache_info().kept <= pyroute.cache_info().limit
    True
    """
    return CacheInfo(*_backend.core.memory_info()) if _backend.HAS_CORE else CacheInfo(0, 0, 0, 0, 0)


def set_cache_limit(num_bytes: int) -> None:
    """Keep at most this many bytes; 0 keeps nothing. What is kept above it is released."""
    num_bytes = _check.integer("set_cache_limit", "num_bytes", num_bytes, 0, 2**62)
    if _backend.HAS_CORE:
        _backend.core.set_memory_limit(num_bytes)


def empty_cache() -> int:
    """Give everything that is kept back to the system; its bytes."""
    return _backend.core.release_memory() if _backend.HAS_CORE else 0
