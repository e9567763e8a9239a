"""Which rank is lost when a collective fails.

The error of a collective says that a connection closed, not whose. So every rank whose collective failed writes so into
the group's store, and waits a little for the others to do the same: who never writes is lost. The first to know writes
that down too, for those who notice later, and the rank that keeps the store stays until they have read it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PATIENCE = 5.0  # seconds that a rank may notice later than the first one; less where the group's timeout is short
_POLL = 0.02


class FailureReport:
    """Finds the lost ranks of one group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        from torch.distributed import distributed_c10d

        self._store: Any = distributed_c10d._get_process_group_store(group)
        self._global_ranks = dist.get_process_group_ranks(group)
        self._rank = group.rank()
        self._patience = min(_PATIENCE, _timeout_of(group) / 4)
        self._failures = 0

    def explain(self, what: str, error: RuntimeError) -> RuntimeError:
        """An error that names the lost ranks, for a failure of ``what``."""
        self._failures += 1
        failed = f"{what} failed on rank {self._name(self._rank)}: {error}"
        lost = self._ask_store(f"pyroute/failure/{self._failures}")
        if lost is None:
            return RuntimeError(
                f"ExpertParallel: {self._keeper()} is lost, and the group's store with it, after {failed}"
            )
        if not lost:
            return RuntimeError(f"ExpertParallel: no rank is lost, but {failed}")
        if self._rank in lost:
            return RuntimeError(f"ExpertParallel: the other ranks gave this one up, and {failed}")
        names = ", ".join(map(self._name, lost))
        who = f"rank {names} is" if len(lost) == 1 else f"ranks {names} are"
        return RuntimeError(f"ExpertParallel: {who} lost, silent for {self._patience:g} s after {failed}")

    def _ask_store(self, key: str) -> list[int] | None:
        """The lost ranks; None if the store is gone, or its keeper stands still: most of its calls know no timeout."""
        found: list[list[int]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                self._store.set_timeout(timedelta(seconds=self._patience))
                found.append(self._find_lost(key))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(3 * self._patience)
        return found[0] if found else None

    def _find_lost(self, key: str) -> list[int]:
        store, deadline = self._store, time.monotonic() + self._patience
        everyone = range(len(self._global_ranks))
        store.set(f"{key}/{self._rank}", "failed")
        while not store.check([f"{key}/lost"]):
            silent = [rank for rank in everyone if not store.check([f"{key}/{rank}"])]
            if not silent or time.monotonic() > deadline:
                if store.add(f"{key}/judges", 1) == 1:
                    store.set(f"{key}/lost", json.dumps(silent))
                break
            time.sleep(_POLL)
        lost: list[int] = json.loads(store.get(f"{key}/lost"))
        store.set(f"{key}/{self._rank}/knows", "")
        if self._global_ranks[self._rank] == 0 and not _launcher_keeps_store():
            self._stay([f"{key}/{rank}/knows" for rank in everyone if rank not in lost])
        return lost

    def _stay(self, keys: list[str]) -> None:
        """Until the others know: the store ends with this process."""
        deadline = time.monotonic() + self._patience
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _keeper(self) -> str:
        """Who keeps the store, if it is not a file: global rank 0, or torchrun itself."""
        if _launcher_keeps_store():
            return "the launcher"
        return f"rank {self._name(self._global_ranks.index(0))}" if 0 in self._global_ranks else "global rank 0"

    def _name(self, rank: int) -> str:
        other = self._global_ranks[rank]
        return str(rank) if other == rank else f"{rank} (global rank {other})"


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _timeout_of(group: dist.ProcessGroup) -> float:
    backend: Any = group._get_backend(group._device_types[0])
    timeout: timedelta | None = getattr(backend.options, "_timeout", None)  # a dry run's backend has none
    return math.inf if timeout is None else timeout.total_seconds()
