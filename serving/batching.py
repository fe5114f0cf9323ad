"""Concurrent requests for the same thing, done together.

When nothing is under way a job starts at once, with whatever else arrived in the same turn of the event
loop; what arrives while a batch runs forms the next one. So batches grow with load and an idle server
adds no wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

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
        self._waiting: deque[tuple[Job, int, asyncio.Future[Result]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._scheduled = False

    def submit(self, job: Job, rows: int) -> asyncio.Future[Result]:
        """Queue a job of ``rows`` rows; the future holds its result or its own error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((job, rows, future))
        if not self._scheduled and self._under_way < self._width:
            self._scheduled = True
            loop.call_soon(self._start)
        return future

    def _start(self) -> None:
        self._scheduled = False
        self._under_way += 1
        task = asyncio.ensure_future(self._work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        try:
            while batch := self._take():
                await self._finish(batch)
        finally:
            # Counted down here, not when the task object is done: a job submitted in between would wait
            # for a worker that has already left.
            self._under_way -= 1

    async def _finish(self, batch: list[tuple[Job, int, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._run([job for job, _, _ in batch])
        except Exception as exc:  # noqa: BLE001 — whatever it is, it belongs to the callers
            if len(batch) == 1:
                _fail(batch[0][2], exc)
            else:
                await self._one_by_one(batch)
        else:
            for (_, _, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _take(self) -> list[tuple[Job, int, asyncio.Future[Result]]]:
        batch: list[tuple[Job, int, asyncio.Future[Result]]] = []
        total = 0
        while self._waiting and (not batch or total + self._waiting[0][1] <= self._max_rows):
            entry = self._waiting.popleft()
            if not entry[2].done():
                batch.append(entry)
                total += entry[1]
        return batch

    async def _one_by_one(self, batch: list[tuple[Job, int, asyncio.Future[Result]]]) -> None:
        for job, _, future in batch:
            try:
                result = (await self._run([job]))[0]
            except Exception as exc:  # noqa: BLE001 — as above
                _fail(future, exc)
            else:
                if not future.done():
                    future.set_result(result)


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
        finished = []
        for start in range(0, rows, self._slice_rows):
            stop = min(start + self._slice_rows, rows)
            piece = {name: column[start:stop] for name, column in columns.items()}
            finished.append(finish(await self._batcher.submit((piece, stop - start), stop - start), piece))
        return finished


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


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
