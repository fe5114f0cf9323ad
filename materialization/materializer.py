"""One view's load: its lease, its plan, its rows, its ledger.

Knows neither the registry nor a command line: ``run`` and ``engine`` decide which views, and tell Feast.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from core.redis import RedisAddress
from core.source import connect
from core.write import Fence, OnlineWriter, WriteResult
from materialization import views
from materialization.ledger import Ledger, Loaded, Unfinished
from materialization.load import CHUNK_ROWS, Position, load
from materialization.plan import Due, due, due_window, plan_digest, resumable
from materialization.report import Observer, Progress, ViewReport, joined
from materialization.window import Survey, ViewSource, Window, partitions_for

if TYPE_CHECKING:
    from feast import FeatureView, RepoConfig
    from feast.infra.offline_stores.offline_store import OfflineStore

MEMORY_LIMIT = "400MB"


class Materializer:
    """Loads the views of one project, as its feature_store.yaml describes it."""

    def __init__(
        self,
        config: RepoConfig,
        offline_store: OfflineStore,
        *,
        memory_limit: str = MEMORY_LIMIT,
        threads: int | None = None,
        temp_directory: Path | None = None,
    ) -> None:
        """Read the online store's address.

        Raises:
            InvalidRepository: the online store is not Redis.
        """
        self._config = config
        self._offline_store = offline_store
        self._duckdb = {"memory_limit": memory_limit, "threads": threads}
        self._temp_directory = temp_directory
        online = config.online_store
        self.address = RedisAddress.from_online_store(online.model_dump())
        self._ttl_seconds = getattr(online, "key_ttl_seconds", None)

    def load_view(
        self,
        view: FeatureView,
        *,
        end: datetime,
        start: datetime | None = None,
        incremental: bool = True,
        wait_seconds: float = 0.0,
        observe: Observer | None = None,
    ) -> ViewReport:
        """Load what is due up to ``end``; or, not ``incremental``, every row from ``start`` to ``end``.

        A run that was interrupted is finished first.

        Raises:
            AlreadyRunning: another run holds the view and did not end within ``wait_seconds``.
            BanquetError: as the source, the encoding and Redis raise.
        """
        started = time.monotonic()
        stored = views.stored_view(view, self._config)
        with self.address.session() as client:
            ledger = Ledger(client, self._config.project, stored.stored_name)
            with ledger.lease(wait_seconds) as fence, self._connection() as con:
                task = _Task(self, view, ledger, fence, con, observe, started)
                return task.run(end, start, incremental)

    @contextmanager
    def writer(self) -> Iterator[OnlineWriter]:
        """A writer for this project's online store."""
        with OnlineWriter(self.address, self._config.project, key_ttl_seconds=self._ttl_seconds) as writer:
            yield writer

    def open_source(self, con: duckdb.DuckDBPyConnection, view: FeatureView, window: Window) -> ViewSource:
        """The view's source for a window."""
        return views.open_source(con, view, self._config, self._offline_store, window)

    def digests(self, view: FeatureView) -> tuple[str, str | None]:
        """Of the view's definition and its source's files."""
        return views.definition_digest(view, self._config), views.source_fingerprint(view, self._config)

    @contextmanager
    def _connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with tempfile.TemporaryDirectory(
            prefix="banquet-", dir=self._temp_directory, ignore_cleanup_errors=True
        ) as spill:
            con = connect(temp_directory=Path(spill), **self._duckdb)  # type: ignore[arg-type]
            try:
                yield con
            finally:
                con.close()


class _Task:
    """One view's turn within a run."""

    def __init__(
        self,
        materializer: Materializer,
        view: FeatureView,
        ledger: Ledger,
        fence: Fence,
        con: duckdb.DuckDBPyConnection,
        observe: Observer | None,
        started: float,
    ) -> None:
        self._materializer = materializer
        self._view = view
        self._ledger = ledger
        self._fence = fence
        self._con = con
        self._observe = observe
        self._started = started
        self._ttl = view.ttl or timedelta(0)
        self._dated = bool(view.batch_source.created_timestamp_column)
        self._definition, self._source = materializer.digests(view)

    def run(self, end: datetime, start: datetime | None, incremental: bool) -> ViewReport:
        unfinished = self._ledger.unfinished()
        report = None
        if unfinished is not None and self._can_resume(unfinished):
            source = self._open(unfinished.window)
            report = self._load(unfinished, source, source.survey(unfinished.window), resumed=True)
        loaded, end_us = self._ledger.loaded(), views.as_us(end)
        if incremental:
            wanted = due(
                loaded,
                definition=self._definition,
                source=self._source,
                rows_are_gone=self._ledger.rows_are_gone(),
                dated=self._dated,
                ttl=self._ttl,
                end_us=end_us,
            )
        else:
            wanted = due_window(
                loaded,
                definition=self._definition,
                ttl=self._ttl,
                start_us=None if start is None else views.as_us(start),
                end_us=end_us,
            )
        if report is not None and unfinished is not None and unfinished.window == wanted.window:
            return report
        source = self._open(wanted.window)
        survey = source.survey(wanted.window)
        then = self._load(self._planned(wanted, survey, loaded), source, survey, resumed=False)
        return then if report is None else joined(report, then)

    def _open(self, window: Window) -> ViewSource:
        return self._materializer.open_source(self._con, self._view, window)

    def _layout(self, partitions: int) -> dict[str, object]:
        return {"partitions": partitions, "chunk_rows": CHUNK_ROWS, "duckdb": duckdb.__version__}

    def _can_resume(self, run: Unfinished) -> bool:
        layout = self._layout(run.partitions)
        return resumable(run, definition=self._definition, source=self._source, **layout)

    def _planned(self, wanted: Due, survey: Survey, loaded: Loaded | None) -> Unfinished:
        partitions = partitions_for(survey.rows)
        plan = plan_digest(
            wanted, definition=self._definition, source=self._source, **self._layout(partitions)
        )
        seen = (survey.newest_created_ns, loaded.arrived_ns if loaded else None)
        arrived = [ns for ns in seen if ns is not None]
        return Unfinished(
            plan=plan,
            window=wanted.window,
            partitions=partitions,
            reason=wanted.reason,
            complete=wanted.complete,
            arrived_ns=min(max(arrived), time.time_ns()) if arrived else None,
            source=self._source,
            position=Position(),
        )

    def _load(self, run: Unfinished, source: ViewSource, survey: Survey, *, resumed: bool) -> ViewReport:
        started = time.monotonic()
        if not resumed:
            self._ledger.begin(run)
        rows = 0

        def done(position: Position, count: int, _: WriteResult) -> None:
            nonlocal rows
            rows += count
            self._ledger.advance(position)
            if self._observe is not None:
                self._observe(Progress(self._view.name, rows, survey.keys, time.monotonic() - started))

        with self._materializer.writer() as writer:
            result = load(
                source,
                run.window,
                writer,
                partitions=run.partitions,
                start=run.position,
                settle_ties_by_created=self._dated and views.takes_pushes(self._view),
                fence=self._fence,
                done=done,
            )
        self._ledger.check(self._fence)
        loaded = None
        if run.complete:
            loaded = Loaded(self._definition, run.window.end_us, run.arrived_ns, run.source)
        self._ledger.finish(loaded, [])
        return self._report(run, survey, result, resumed)

    def _report(self, run: Unfinished, survey: Survey, result: WriteResult, resumed: bool) -> ViewReport:
        start_us, newest = run.window.start_us, survey.newest_event_us
        return ViewReport(
            view=self._view.name,
            reason=run.reason,
            start=None if start_us is None else views.as_datetime(start_us),
            end=views.as_datetime(run.window.end_us),
            resumed=resumed,
            source_rows=survey.rows,
            written=result.written,
            older=result.older,
            seconds=time.monotonic() - self._started,
            newest_event=None if newest is None else views.as_datetime(newest),
        )
