"""Coroutines without a task: they go on within `deliver`, and wait for anything else as a task would."""

from __future__ import annotations

import asyncio

import pytest

from core import handover
from core.handover import Handover


def test_a_coroutine_goes_on_before_deliver_returns() -> None:
    async def scenario() -> None:
        future: Handover[int] = Handover()
        seen: list[int] = []

        async def wait() -> None:
            seen.append(await future)

        handover.run(wait())
        assert seen == []
        future.deliver(3)
        assert seen == [3]

    asyncio.run(scenario())


def test_an_error_is_raised_where_the_coroutine_waits() -> None:
    async def scenario() -> None:
        future: Handover[int] = Handover()
        seen: list[str] = []

        async def wait() -> None:
            try:
                await future
            except ValueError as exc:
                seen.append(str(exc))

        handover.run(wait())
        future.fail(ValueError("no"))
        future.deliver(3)  # it is done already
        assert seen == ["no"]

    asyncio.run(scenario())


def test_it_waits_for_futures_tasks_and_sleep_as_a_task_does() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()
        seen: list[object] = []

        async def wait() -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            seen.append(await asyncio.gather(*(asyncio.to_thread(int, digit) for digit in "12")))
            try:
                await asyncio.get_running_loop().run_in_executor(None, int, "x")
            except ValueError:
                seen.append("refused")
            ended.set()

        handover.run(wait())
        await asyncio.wait_for(ended.wait(), 5)
        assert seen == [[1, 2], "refused"]

    asyncio.run(scenario())


def test_a_task_may_wait_for_it_too_and_be_cancelled() -> None:
    async def scenario() -> None:
        first: Handover[int] = Handover()
        second: Handover[int] = Handover()
        asyncio.get_running_loop().call_soon(first.deliver, 1)
        assert await first == 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second, 0.01)
        second.deliver(2)
        assert second.cancelled()

    asyncio.run(scenario())
