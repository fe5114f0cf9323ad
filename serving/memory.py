"""The resident memory of this process: measured, reported, and what happens past a limit."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serving.metrics import RequestMetrics

log = logging.getLogger("banquet.serving")

_LOOK_SECONDS = 2.0
# A limit that a fresh worker is past already must not make workers come and go all the time.
_SETTLE_SECONDS = 5.0


def resident_bytes() -> int:
    """Bytes of this process that are in physical memory, pages shared with other processes included."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil  # comes with Feast

    return int(psutil.Process().memory_info().rss)


class MemoryWatch:
    """Looks every few seconds; past the limit it warns once and asks for a replacement, where one can come.

    Args:
        slot: the worker's number in the metrics.
        limit_bytes: 0: no limit.
        recycle: asks for a replacement of this process, given the reason; None: nobody can replace it.
        measure: gives the resident bytes.
    """

    def __init__(
        self,
        metrics: RequestMetrics,
        slot: int,
        limit_bytes: int,
        recycle: Callable[[str], None] | None,
        measure: Callable[[], int] = resident_bytes,
    ) -> None:
        self._metrics = metrics
        self._slot = slot
        self._limit = limit_bytes
        self._recycle = recycle
        self._measure = measure
        self._began = time.monotonic()
        self._fresh = 0
        self._warned = False

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(_LOOK_SECONDS)

    def look(self, now: float) -> None:
        """One look at the moment ``now``, in seconds of the monotonic clock."""
        resident = self._measure()
        self._metrics.memory(self._slot, resident)
        if not self._fresh:
            self._fresh = resident
        if not self._limit or resident <= self._limit:
            return
        what = f"{resident / 1e6:.0f} MB of memory, past its limit of {self._limit / 1e6:.0f} MB"
        if self._recycle is None:
            self._warn(f"this process holds {what}; nobody is there to replace it")
        elif self._fresh > self._limit:
            self._warn(f"this worker holds {what}, as it did when it was new: a new one would help nothing")
        else:
            self._warn(f"this worker holds {what}")
            if now - self._began >= _SETTLE_SECONDS:
                self._recycle(f"it holds {what}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", text)
