"""The stream consumer: events from a Redis Stream, checked as pushes are, written online and offline.

At least once: an entry is acknowledged when its rows are in both stores, and ``core.write``'s newer-wins
makes a second delivery harmless. ``stream_events`` judges entries, ``stream_group`` speaks to Redis,
``stream_offline`` gathers rows for the offline store; this module is the loop. docs/stream.md, ADR 0070.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from core.errors import BanquetError, LeaseLost, RedisUnavailable
from core.repository import FeastRepository
from core.write import OnlineWriter
from materialization.stream_events import Batch, Entry, PushSources, Refusal
from materialization.stream_group import LEASE_SECONDS, StreamGroup, default_stream
from materialization.stream_offline import OfflineAppender

logger = logging.getLogger(__name__)

Destination = Literal["online", "offline", "online_and_offline"]

# From one read to the next. A batch costs about as much as 25 events, so at a high rate they should come by
# the hundred; but an event may wait for so long before it is read, and it has 100 ms in all.
LINGER_SECONDS = 0.02
CLAIM_SECONDS = 2.0
TRIM_SECONDS = 5.0
OUTAGE_PAUSE_SECONDS = 0.5
_DELAYS_KEPT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How a consumer reads and writes.

    ``stream`` None is ``banquet:events:<project>``. ``batch`` is how many entries are read at once.
    ``append_seconds`` and ``append_rows`` say when rows go to the offline store. ``max_length`` is how many
    acknowledged entries may stay in the stream, None for all. ``dead_length`` is how many dead letters stay.
    """

    stream: str | None = None
    group: str = "banquet"
    consumer: str | None = None
    to: Destination = "online_and_offline"
    batch: int = 1000
    append_seconds: float = 5.0
    append_rows: int = 50_000
    max_length: int | None = 100_000
    dead_stream: str | None = None
    dead_length: int = 1_000_000
    report_seconds: float = 10.0


@dataclass(slots=True)
class StreamCounts:
    """What a consumer has done since it started.

    ``entries`` were handled, a second delivery counted again; ``rows`` of them went into views, ``written``
    online or ``older`` than what was there, counted per view; ``appended`` are rows in the offline store;
    ``refused`` became dead letters; ``reclaimed`` were taken over, from dead consumers or from before a
    restart; ``deleted`` were pending when somebody deleted them from the stream.
    """

    entries: int = 0
    rows: int = 0
    written: int = 0
    older: int = 0
    appended: int = 0
    refused: int = 0
    reclaimed: int = 0
    deleted: int = 0
    trimmed: int = 0


@dataclass(frozen=True, slots=True)
class StreamReport:
    """The state of a consumer.

    ``seconds`` since it started; ``per_second`` entries since the last report. ``lag_entries`` and
    ``lag_seconds`` as ``stream_group.Lag`` has them, for the whole group; ``waiting_rows`` are those of this
    consumer that wait for the offline store. ``online_ms`` has percentiles of the time from an entry's
    addition to its rows being readable, since the last report. ``error`` is what the offline store said last.
    """

    seconds: float
    counts: StreamCounts
    per_second: float
    lag_entries: int | None
    lag_seconds: float | None
    pending: int | None
    waiting_rows: int
    online_ms: dict[str, float]
    error: str | None

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: one flat object."""
        found = asdict(self)
        counts = found.pop("counts")
        for name in ("seconds", "per_second", "lag_seconds"):
            found[name] = None if found[name] is None else round(found[name], 3)
        return {**counts, **found}


@dataclass(slots=True)
class _Pace:
    """When something is due again."""

    every: float
    due: float = 0.0

    def reached(self) -> bool:
        now = time.monotonic()
        if now < self.due:
            return False
        self.due = now + self.every
        return True


@dataclass(slots=True)
class _Since:
    """What the next report is about."""

    moment: float = field(default_factory=time.monotonic)
    entries: int = 0
    delays_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_DELAYS_KEPT))


class StreamConsumer:
    """Reads, checks, writes, acknowledges, until ``stop``."""

    def __init__(
        self,
        repository: FeastRepository,
        options: StreamOptions | None = None,
        *,
        observe: Callable[[StreamReport], None] | None = None,
    ) -> None:
        self._options = options or StreamOptions()
        self._observe = observe
        self._repository = repository
        self._online = self._options.to != "offline"
        self._offline = self._options.to != "online"
        self._sources = PushSources(repository, online=self._online, offline=self._offline)
        self._group = StreamGroup(
            repository.redis,
            self._options.stream or default_stream(repository.project),
            self._options.group,
            self._options.consumer,
            dead_stream=self._options.dead_stream,
            dead_length=self._options.dead_length,
        )
        self._stop = threading.Event()
        self._lost: BanquetError | None = None
        self._began = time.monotonic()
        self._counts = StreamCounts()
        self._since = _Since()

    @property
    def place(self) -> StreamGroup:
        """The consumer's place in its group."""
        return self._group

    def stop(self) -> None:
        """End soon: what has been read is written and acknowledged first. For signal handlers too."""
        self._stop.set()

    def run(self) -> StreamReport:
        """Consume until ``stop``; the final report.

        Redis may go away and come back meanwhile.

        Raises:
            RedisUnavailable: Redis did not answer at the start, or denies access.
            AlreadyRunning, LeaseLost: another consumer has this one's name.
            InvalidRepository: the definitions cannot be used.
            InvalidRequest: the offline store takes no rows.
        """
        self._sources.refresh()
        if self._offline:
            self._repository.store()  # imports Feast before the first event waits for it
        self._group.join()
        # Else a full collection goes through all of Feast every few seconds, and events wait 100 ms for it.
        gc.collect()
        gc.freeze()
        ttl = self._repository.config["online_store"].get("key_ttl_seconds")
        renewal = threading.Thread(target=self._renew, name="banquet-stream-lease", daemon=True)
        renewal.start()
        writer = OnlineWriter(self._repository.redis, self._repository.project, key_ttl_seconds=ttl)
        appender = OfflineAppender(
            self._repository,
            self._group.acknowledge,
            seconds=self._options.append_seconds,
            rows=self._options.append_rows,
        )
        try:
            self._loop(writer, appender)
        finally:
            self._stop.set()
            appender.close()
            writer.close()
            renewal.join()
            try:
                report = self._report(appender)
                self._group.leave()
            except RedisUnavailable as exc:
                logger.warning("Redis is away at the end: %s", exc)
                report = self._summary(appender, None)
            self._group.close()
            gc.unfreeze()
        if appender.failed is not None:
            raise appender.failed
        return report

    def _loop(self, writer: OnlineWriter, appender: OfflineAppender) -> None:
        recover, away = True, False
        claim, trim = _Pace(CLAIM_SECONDS), _Pace(TRIM_SECONDS)
        report = _Pace(self._options.report_seconds, time.monotonic() + self._options.report_seconds)
        while not self._stop.is_set() and appender.failed is None:
            if self._lost is not None:
                raise self._lost
            try:
                if recover:
                    self._recover(writer, appender)
                    recover = False
                    if away:
                        away = False
                        logger.warning("Redis is back.")
                if claim.reached():
                    self._claim(writer, appender)
                if trim.reached() and self._options.max_length is not None:
                    self._counts.trimmed += self._group.trim(self._options.max_length)
                if report.reached() and self._observe is not None:
                    self._observe(self._report(appender))
                if appender.full:
                    self._stop.wait(0.1)
                    continue
                entries = self._group.read(self._options.batch)
                if entries:
                    next_read = time.monotonic() + LINGER_SECONDS
                    self._handle(entries, writer, appender)
                    self._stop.wait(max(0.0, next_read - time.monotonic()))
            except RedisUnavailable as exc:
                if not exc.retryable:
                    raise
                if not away:
                    away = True
                    logger.warning("Redis is away, trying until it is back: %s", exc)
                # What was delivered and not handled, or delivered in an answer that was lost.
                recover = True
                self._stop.wait(OUTAGE_PAUSE_SECONDS)

    def _recover(self, writer: OnlineWriter, appender: OfflineAppender) -> None:
        """Handle what was delivered to this consumer before and is neither acknowledged nor held."""
        after = b"0"
        while not self._stop.is_set():
            with appender.lock:
                entries = self._group.own_pending(after, self._options.batch)
                fresh = [entry for entry in entries if entry.id not in appender.held]
            if not entries:
                return
            after = entries[-1].id
            self._counts.reclaimed += len(fresh)
            self._handle(fresh, writer, appender)

    def _claim(self, writer: OnlineWriter, appender: OfflineAppender) -> None:
        while not self._stop.is_set() and not appender.full:
            entries = self._group.claim_abandoned(self._options.batch)
            if not entries:
                return
            self._counts.reclaimed += len(entries)
            self._handle([e for e in entries if e.id not in appender.held], writer, appender)

    def _handle(self, entries: Sequence[Entry], writer: OnlineWriter, appender: OfflineAppender) -> None:
        """Check, write online, then hand over to the offline store or acknowledge."""
        gone = [entry.id for entry in entries if not entry.fields]
        batches, refused = self._sources.check(entry for entry in entries if entry.fields)
        if self._online:
            self._write(batches, writer)
        for batch in batches:
            self._counts.rows += batch.rows
            if self._offline:
                appender.add(batch)
        if not self._offline:
            gone += [entry.id for batch in batches for entry in batch.entries]
        self._group.acknowledge(gone)
        self._refuse(refused)
        self._counts.entries += len(entries)
        self._counts.deleted += sum(not entry.fields for entry in entries)

    def _write(self, batches: Sequence[Batch], writer: OnlineWriter) -> None:
        writes = [
            writer.submit(checked.view.stored_name, encoded, created_ns=checked.created_ns)
            for batch in batches
            for checked, encoded in batch.online
        ]
        for write in writes:
            result = write.result()
            self._counts.written += result.written
            self._counts.older += result.older
        now = time.time() * 1000
        self._since.delays_ms.extend(now - entry.added_ms for batch in batches for entry in batch.entries)

    def _refuse(self, refused: Sequence[Refusal]) -> None:
        if refused:
            self._counts.refused += self._group.refuse(refused)
            logger.info("refused %d events, the first one because: %s", len(refused), refused[0].error)

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 3):
            try:
                self._group.renew()
            except LeaseLost as exc:
                self._lost = exc
                return
            except BanquetError:
                continue  # the loop meets the same failure and reports it

    def _report(self, appender: OfflineAppender) -> StreamReport:
        return self._summary(appender, self._group.lag())

    def _summary(self, appender: OfflineAppender, lag: Any) -> StreamReport:
        since, self._since = self._since, _Since(entries=self._counts.entries)
        self._counts.appended = appender.appended
        now = time.monotonic()
        delays = sorted(since.delays_ms)
        percentiles = {
            name: round(delays[int(share * (len(delays) - 1))], 1)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
            if delays
        }
        return StreamReport(
            seconds=now - self._began,
            counts=replace(self._counts),
            per_second=(self._counts.entries - since.entries) / max(now - since.moment, 1e-9),
            lag_entries=None if lag is None else lag.undelivered,
            lag_seconds=None if lag is None else lag.seconds,
            pending=None if lag is None else lag.pending,
            waiting_rows=appender.waiting,
            online_ms=percentiles,
            error=appender.error,
        )
