"""An event loop whose clock jumps to the next timer: seconds pass at once, and a slow machine adds none.

For scenarios without threads, processes and sockets: nothing else is waited for.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Jumps(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left to wait for")
        self.now += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumps = _Jumps()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run`` on such a loop."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(scenario)
