"""Materializations in processes of their own, started fast (Feast is imported once) and killed at will."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from tests.support.waiting import wait_until


def context() -> Any:
    """A multiprocessing context whose children are forked from a server that has imported Feast."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["materialization.run", "materialization.engine", "core.offline"])
    return found


def run_materialize(
    path: Path, end: datetime, chunk_rows: int, slice_rows: int, answers: Any, options: dict[str, Any]
) -> None:
    """Materialize the repository at ``path`` and put the reports as JSON into ``answers``."""
    import core.restore
    import core.write
    import materialization.ledger
    import materialization.load
    from core.repository import FeastRepository
    from materialization.run import materialize

    materialization.load.CHUNK_ROWS = chunk_rows
    core.write.SLICE_ROWS = slice_rows
    core.restore.LEAST_ROWS = options.pop("restore_rows", 1)  # so that small chunks are restored too
    if halt_at := options.pop("halt_at", None):
        _halt_at(materialization.ledger.Ledger, halt_at)
    report = materialize(FeastRepository.open(path), end=end, **options)
    answers.put([view.as_json() for view in report.views])


def _halt_at(ledger: Any, halt_at: int) -> None:
    """Stop this process, until SIGCONT, when so many rows have been noted as done."""
    advance, halted = ledger.advance, False

    def and_halt(self: Any, rows_done: int, *more: Any) -> None:
        nonlocal halted
        advance(self, rows_done, *more)
        if rows_done >= halt_at and not halted:
            halted = True
            os.kill(os.getpid(), signal.SIGSTOP)

    ledger.advance = and_halt


def wait_halted(process: Any) -> None:
    """Wait until a child has stopped itself."""
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "it has halted")


@contextmanager
def materializing(
    path: Path, end: datetime, *, chunk_rows: int = 16_384, slice_rows: int = 256, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A child that materializes: the process, and the queue of its answer. Killed when the block ends.

    With ``halt_at`` it stops in the middle, once so many rows are done, and waits to be killed or continued.
    """
    spawn = context()
    answers = spawn.SimpleQueue()
    process = spawn.Process(
        target=run_materialize, args=(path, end, chunk_rows, slice_rows, answers, options), daemon=True
    )
    process.start()
    try:
        yield process, answers
    finally:
        process.kill()
        process.join()
        answers.close()
