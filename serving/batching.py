"""Concurrent requests for the same thing, done together.

When nothing is under way a job starts at once, with whatever else arrived in the same turn of the event
loop; what arrives while a batch runs forms the next one. So batches grow with load and an idle server
adds no wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

from core import handover
from core.handover import Handover

Job = TypeVar("Job")
Result = TypeVar("Result")
Finished = TypeVar("Finished")
Columns = dict[str, list[Any]]


class MicroBatcher(Generic[Job, Result]):
    """Runs jobs in batches of at most ``max_rows`` rows, ``width`` batches at a time.

    ``run`` takes the jobs of one batch and returns their results in order. When a batch of several jobs
    fails, each of them is run again alone, so that one bad job never fails another's.
    """

    def __init__(
        self, run: Callable[[list[Job]], Awaitable[list[Result]]], *, max_rows: int, width: int = 2
    ) -> None:
        self._run = run
        self._max_rows = max_rows
        self._width = width
        self._waiting: deque[tuple[Job, int, Handover[Result]]] = deque()
        self._under_way = 0
        self._scheduled = False
        # That of the first job: asking costs a system call.
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, job: Job, rows: int) -> Handover[Result]:
        """Queue a job of ``rows`` rows; the future holds its result or its own error."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: Handover[Result] = Handover(loop=loop)
        self._waiting.append((job, rows, future))
        if not self._scheduled and self._under_way < self._width:
            self._scheduled = True
            loop.call_soon(self._start)
        return future

    def _start(self) -> None:
        self._scheduled = False
        self._under_way += 1
        handover.run(self._work())

    async def _work(self) -> None:
        try:
            while batch := self._take():
                await self._finish(batch)
        finally:
            self._under_way -= 1

    async def _finish(self, batch: list[tuple[Job, int, Handover[Result]]]) -> None:
        try:
            results = await self._run([job for job, _, _ in batch])
        except Exception as exc:  # noqa: BLE001 — whatever it is, it belongs to the callers
            if len(batch) == 1:
                batch[0][2].fail(exc)
            else:
                await self._one_by_one(batch)
        else:
            for (_, _, future), result in zip(batch, results, strict=True):
                future.deliver(result)

    def _take(self) -> list[tuple[Job, int, Handover[Result]]]:
        batch: list[tuple[Job, int, Handover[Result]]] = []
        total = 0
        while self._waiting and (not batch or total + self._waiting[0][1] <= self._max_rows):
            entry = self._waiting.popleft()
            if not entry[2].done():
                batch.append(entry)
                total += entry[1]
        return batch

    async def _one_by_one(self, batch: list[tuple[Job, int, Handover[Result]]]) -> None:
        for job, _, future in batch:
            try:
                result = (await self._run([job]))[0]
            except Exception as exc:  # noqa: BLE001 — as above
                future.fail(exc)
            else:
                future.deliver(result)


def pieces(columns: Columns, rows: int, slice_rows: int) -> Iterator[tuple[Columns, int]]:
    """Cut columns of ``rows`` rows into slices of at most ``slice_rows``, each with its number of rows."""
    for start in range(0, rows, slice_rows):
        stop = min(start + slice_rows, rows)
        yield {name: column[start:stop] for name, column in columns.items()}, stop - start


class Sliceable(Protocol):
    """A result by column that can be cut by rows."""

    def slice(self, start: int, stop: int) -> Self: ...


Rows = TypeVar("Rows", bound=Sliceable)


class ColumnBatcher(Generic[Rows]):
    """Batches requests that are columns of entities, and cuts a large request into slices.

    ``run`` takes columns and a number of rows and returns a result with as many rows. Between the slices of
    a large request others get their turn.
    """

    def __init__(self, run: Callable[[Columns, int], Awaitable[Rows]], *, slice_rows: int) -> None:
        self._slice_rows = slice_rows
        # No bound method: what `run` holds, a model say, must go when its last request has ended.
        self._batcher: MicroBatcher[tuple[Columns, int], Rows] = MicroBatcher(
            partial(_run_together, run), max_rows=slice_rows
        )

    async def run(
        self, columns: Columns, rows: int, finish: Callable[[Rows, Columns], Finished]
    ) -> list[Finished]:
        """Run ``rows`` rows; ``finish`` is called with the result and the columns of each slice, in order."""
        if rows <= self._slice_rows:
            return [finish(await self._batcher.submit((columns, rows), rows), columns)]
        return [
            finish(await self._batcher.submit((piece, count), count), piece)
            for piece, count in pieces(columns, rows, self._slice_rows)
        ]


async def _run_together(
    run: Callable[[Columns, int], Awaitable[Rows]], jobs: list[tuple[Columns, int]]
) -> list[Rows]:
    if len(jobs) == 1:
        return [await run(*jobs[0])]
    columns = {name: [value for job, _ in jobs for value in job[name]] for name in jobs[0][0]}
    result = await run(columns, sum(rows for _, rows in jobs))
    parts = []
    start = 0
    for _, rows in jobs:
        parts.append(result.slice(start, start + rows))
        start += rows
    return parts
