"""The offline half of the stream: checked rows are gathered, appended to their sources, acknowledged.

Rows wait here so that a source is not rewritten, or a file added, for every few events; their entries stay
pending in Redis until they are appended, so a crash loses none of them. Knows no Redis and no event.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import InvalidRequest, Unavailable
from core.push import OfflineTarget, append_offline
from core.repository import FeastRepository
from materialization.stream_events import Batch

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# An append of a single file rewrites it: appends may take up to a tenth of the time.
REST_PER_APPEND = 9.0
MAX_REST_SECONDS = 60.0
MAX_ROWS = 500_000
RETRY_SECONDS = (0.2, 1.0, 5.0, 15.0, 30.0)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What is kept of a batch until it is appended: not its events, nor what was written online."""

    ids: Sequence[bytes]
    rows: int
    tables: Sequence[tuple[OfflineTarget, pa.Table]]


class OfflineAppender:
    """Appends batches in a thread of its own.

    An append is due ``seconds`` after the first row came or with ``rows`` rows, but not before the last one
    is nine times as long ago as it took (``MAX_REST_SECONDS`` at most), unless half of ``MAX_ROWS`` wait.
    """

    def __init__(
        self,
        repository: FeastRepository,
        acknowledge: Callable[[Sequence[bytes]], None],
        *,
        seconds: float,
        rows: int,
    ) -> None:
        self._repository = repository
        self._acknowledge = acknowledge
        self._seconds, self._limit = seconds, rows
        self._changed = threading.Condition()
        self._batches: list[_Waiting] = []
        self._waiting = 0
        self._first = 0.0
        self._rest_until = 0.0
        self._closing: float | None = None
        # Held while entries become acknowledged, so that who reads the pending ones does not mistake them.
        self.lock = threading.Lock()
        self.held: set[bytes] = set()
        self.appended = 0
        self.appends = 0
        self.error: str | None = None
        self.failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="banquet-stream-offline", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that are not appended yet."""
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether no more rows should come."""
        return self._waiting >= MAX_ROWS

    def add(self, batch: Batch) -> None:
        """Take a batch over; its entries are acknowledged once every source has its rows."""
        waiting = _Waiting([entry.id for entry in batch.entries], batch.rows, batch.offline)
        with self._changed:
            self.held.update(waiting.ids)
            if not self._batches:
                self._first = time.monotonic()
            self._batches.append(waiting)
            self._waiting += batch.rows
            self._changed.notify()

    def close(self, patience_seconds: float = 30.0) -> None:
        """Append what waits. After ``patience_seconds`` of failures it is left pending in the stream."""
        with self._changed:
            self._closing = time.monotonic() + patience_seconds
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while batches := self._next():
                began = time.monotonic()
                done: set[tuple[str, Any]] = set()
                if self._until_done(lambda b=batches, d=done: self._append(b, d)):  # type: ignore[misc]
                    self._until_done(lambda b=batches: self._settle(b))  # type: ignore[misc]
                ended = time.monotonic()
                self._rest_until = ended + min(REST_PER_APPEND * (ended - began), MAX_REST_SECONDS)
                with self._changed:
                    self._waiting -= sum(batch.rows for batch in batches)
        except Exception as exc:  # noqa: BLE001 — handed to the thread that reads
            self.failed = exc

    def _next(self) -> list[_Waiting]:
        """What is to be appended, when it is due; nothing once all is done."""
        with self._changed:
            while (left := self._due_in()) > 0:
                if self._closing is not None and not self._batches:
                    return []
                self._changed.wait(left)
            batches, self._batches = self._batches, []
            return batches

    def _due_in(self) -> float:
        if not self._batches:
            return 3600.0
        if self._closing is not None or self._waiting >= MAX_ROWS // 2:
            return 0.0
        now = time.monotonic()
        due = now if self._waiting >= self._limit else self._first + self._seconds
        return max(due, self._rest_until) - now

    def _append(self, batches: Sequence[_Waiting], done: set[tuple[str, Any]]) -> None:
        """Append the tables of each source as one; ``done`` remembers what a failed attempt has appended."""
        import pyarrow as pa

        parts: dict[tuple[str, pa.Schema], tuple[OfflineTarget, list[pa.Table]]] = {}
        for batch in batches:
            for target, table in batch.tables:
                key = (target.view, table.schema)
                parts.setdefault(key, (target, []))[1].append(table)
        for key, (target, tables) in parts.items():
            if key not in done:
                rows = pa.concat_tables(tables).combine_chunks()
                append_offline(self._repository, target, rows)
                done.add(key)
                self.appended += rows.num_rows
                self.appends += 1

    def _settle(self, batches: Sequence[_Waiting]) -> None:
        ids = [name for batch in batches for name in batch.ids]
        with self.lock:
            self._acknowledge(ids)
            self.held.difference_update(ids)

    def _until_done(self, step: Callable[[], None]) -> bool:
        """Repeat a step that fails; False when it was given up because of ``close``."""
        attempt = 0
        while True:
            try:
                step()
            except InvalidRequest:
                raise  # this offline store takes no rows, and never will
            except Exception as exc:  # a full disk, an object store that is away: the rows wait
                if isinstance(exc, Unavailable) and not exc.retryable:
                    raise
                self.error = str(exc)
                logger.warning("cannot append offline, trying again: %s", exc)
            else:
                self.error = None
                return True
            pause = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)]
            attempt += 1
            with self._changed:
                if self._closing is None:
                    self._changed.wait(pause)
                elif time.monotonic() > self._closing:
                    return False
                else:
                    self._changed.wait(min(pause, 1.0))
