"""Coroutines that go on the moment what they wait for is there, without a task and a turn of the event loop.

A task is made, entered, woken by a callback that the loop has to queue, and torn down; for a request that
waits once, for one round trip, that costs more than its headers do. ADR 0085 has the numbers.

Knows no Redis and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Handover(asyncio.Future[Result]):
    """A future that, when it is done by ``deliver`` or ``fail``, continues a coroutine that ``run`` drives.

    The coroutine runs within that call, until it waits again or ends. Any other waiter gets the result as
    from any other future. At most one such coroutine waits for it.
    """

    waiter: Callable[[], None] | None = None

    def deliver(self, result: Result) -> None:
        """Set the result, unless it is done already."""
        if not self.done():
            self.set_result(result)
            if self.waiter is not None:
                self.waiter()

    def fail(self, error: Exception) -> None:
        """Set the error, unless it is done already."""
        if not self.done():
            self.set_exception(error)
            if self.waiter is not None:
                self.waiter()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine up to where it first has to wait, and on from there whenever it need not wait longer.

    It must handle its own errors; what it raises goes to whoever made it continue. As it is no task,
    ``asyncio.timeout`` and ``asyncio.current_task`` are not for it.
    """
    _Run(coroutine).go_on()


class _Run:
    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine

    def go_on(self, _: object = None) -> None:
        try:
            awaited = self._coroutine.send(None)
        except StopIteration:
            return
        if type(awaited) is Handover:
            awaited._asyncio_future_blocking = False
            awaited.waiter = self.go_on
        elif awaited is None:  # asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(self.go_on)
        else:
            awaited._asyncio_future_blocking = False
            awaited.add_done_callback(self.go_on)
