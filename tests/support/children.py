"""Materializations in processes of their own, started fast (Feast is imported once) and killed at will."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any


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
    import materialization.load
    from core.repository import FeastRepository
    from materialization.run import materialize

    materialization.load.CHUNK_ROWS = chunk_rows
    core.write.SLICE_ROWS = slice_rows
    core.restore.LEAST_ROWS = options.pop("restore_rows", 1)  # so that small chunks are restored too
    report = materialize(FeastRepository.open(path), end=end, **options)
    answers.put([view.as_json() for view in report.views])


@contextmanager
def materializing(
    path: Path, end: datetime, *, chunk_rows: int = 16_384, slice_rows: int = 256, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A child that materializes: the process, and the queue of its answer. Killed when the block ends."""
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
