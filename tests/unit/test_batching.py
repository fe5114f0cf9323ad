"""Micro-batching: jobs meet in batches, and never hurt each other."""

from __future__ import annotations

import asyncio

import pytest

from serving.batching import MicroBatcher
from tests.support import clock


class Doubler:
    """Doubles numbers, remembers its batches, refuses negative ones."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.delay_s = delay_s

    async def __call__(self, jobs: list[int]) -> list[int]:
        self.batches.append(jobs)
        await asyncio.sleep(self.delay_s)
        if any(job < 0 for job in jobs):
            raise ValueError(f"negative in {jobs}")
        return [job * 2 for job in jobs]


def test_jobs_of_one_turn_share_a_batch_and_later_ones_form_the_next() -> None:
    async def scenario() -> None:
        work = Doubler(0.02)
        batcher = MicroBatcher(work, max_rows=100, width=1)
        first = [batcher.submit(n, 1) for n in (1, 2)]
        await asyncio.sleep(0.005)
        second = [batcher.submit(n, 1) for n in (3, 4, 5)]
        assert await asyncio.gather(*first, *second) == [2, 4, 6, 8, 10]
        assert work.batches == [[1, 2], [3, 4, 5]]

    clock.run(scenario())


def test_a_batch_never_exceeds_its_rows_unless_one_job_does() -> None:
    async def scenario() -> None:
        work = Doubler()
        batcher = MicroBatcher(work, max_rows=10, width=1)
        futures = [batcher.submit(n, rows) for n, rows in ((1, 6), (2, 6), (3, 4), (4, 50), (5, 1))]
        assert await asyncio.gather(*futures) == [2, 4, 6, 8, 10]
        assert work.batches == [[1], [2, 3], [4], [5]]

    asyncio.run(scenario())


def test_a_bad_job_fails_alone() -> None:
    async def scenario() -> None:
        batcher = MicroBatcher(Doubler(), max_rows=100)
        results = await asyncio.gather(*(batcher.submit(n, 1) for n in (1, -1, 3)), return_exceptions=True)
        assert results[0] == 2
        assert results[2] == 6
        assert isinstance(results[1], ValueError)

    asyncio.run(scenario())


def test_a_cancelled_job_is_not_run_and_does_not_disturb_the_rest() -> None:
    async def scenario() -> None:
        work = Doubler()
        batcher = MicroBatcher(work, max_rows=100)
        gone, stays = batcher.submit(1, 1), batcher.submit(2, 1)
        gone.cancel()
        assert await stays == 4
        assert work.batches == [[2]]
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(scenario())


@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_job_of_many_gets_its_own_result(width: int) -> None:
    async def scenario() -> None:
        work = Doubler(0.0001)
        batcher = MicroBatcher(work, max_rows=7, width=width)

        async def client(start: int) -> None:
            for n in range(start, start + 50):
                assert await batcher.submit(n, 1 + n % 3) == 2 * n

        await asyncio.gather(*(client(100 * i) for i in range(20)))
        assert batcher._under_way == 0

    asyncio.run(scenario())
