"""One view's load: its lease, its plan, the gate, its rows, its ledger.

Knows neither the registry nor a command line: ``run`` and ``engine`` decide which views, and tell Feast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from core.errors import BanquetError, GateFailed, InvalidRepository, InvalidSource
from core.redis import RedisAddress
from core.repository import View
from core.source import UNREADABLE, connect
from core.write import Fence, OnlineWriter, WriteResult
from materialization import views
from materialization.distribution import profile
from materialization.gate import GateResult, Limits, judge
from materialization.ledger import Ledger, Loaded, Unfinished
from materialization.load import load, row_encoder
from materialization.memory import SAMPLE_ROWS, Estimate, estimate
from materialization.plan import MICROSECOND, WHOLE, Due, due, due_window, plan_digest
from materialization.processes import scratch_folder
from materialization.report import Observer, Progress, ViewReport, joined
from materialization.window import Staged, ViewSource, Window, partitions_for

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView, RepoConfig
    from feast.infra.offline_stores.offline_store import OfflineStore

ENGINE = "materialization.engine.BulkComputeEngine"
MEMORY_LIMIT = "300MB"
SHARED_MEMORY_LIMIT = "250MB"
_WITNESSES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of one view: everything new up to ``end``, or, not ``incremental``, a window.

    ``start`` None begins at the first row. ``force`` loads rows that fail the gate.
    """

    end: datetime
    start: datetime | None = None
    incremental: bool = True
    force: bool = False
    dry_run: bool = False
    wait_seconds: float = 0.0
    observe: Observer | None = None


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
        self._memory_limit = memory_limit
        self._threads = threads
        self._temp_directory = temp_directory
        self.address = RedisAddress.from_online_store(config.online_store.model_dump())

    @classmethod
    def of_store(cls, store: FeatureStore, *, parallel: int = 1) -> Materializer:
        """For a Feast store, by the settings of its ``batch_engine`` where that is Banquet's.

        ``parallel`` views at a time share the memory.

        Raises:
            InvalidRepository: the online store is not Redis.
        """
        provider: Any = store._get_provider()
        config = store.config
        engine = config.batch_engine_config
        settings = engine if isinstance(engine, dict) and engine.get("type") == ENGINE else {}
        folder = settings.get("temp_directory")
        return cls(
            config,
            provider.offline_store,
            memory_limit=settings.get("memory_limit")
            or (MEMORY_LIMIT if parallel < 2 else SHARED_MEMORY_LIMIT),
            threads=settings.get("threads"),
            temp_directory=Path(config.repo_path or ".") / folder if folder else None,
        )

    @property
    def rows_expire(self) -> bool:
        """Whether Redis forgets rows by itself."""
        return bool(self._config.online_store.key_ttl_seconds)

    def load_view(self, view: FeatureView, request: Request) -> ViewReport:
        """Load what is due; an interrupted run is finished first. A failed gate is in the report.

        Raises:
            AlreadyRunning: another run holds the view and did not end within ``request.wait_seconds``.
            InvalidRepository: the rows fit neither memory nor disk.
            BanquetError: as the source, the encoding and Redis raise.
        """
        stored = self.stored_view(view)
        with self.address.session() as client, self.connection() as con:
            ledger = Ledger(client, self.project, stored.stored_name)
            task = _Task(self, view, ledger, con, request)
            if request.dry_run:
                return task.preview()
            with ledger.lease(request.wait_seconds) as fence:
                return task.run(fence)

    @property
    def project(self) -> str:
        """The Feast project."""
        return str(self._config.project)

    def stored_view(self, view: FeatureView) -> View:
        """The view as it lies in the online store."""
        return views.stored_view(view, self._config)

    @contextmanager
    def writer(self) -> Iterator[OnlineWriter]:
        """A writer for this project's online store."""
        online = self._config.online_store
        with OnlineWriter(
            self.address,
            self.project,
            key_ttl_seconds=online.key_ttl_seconds,
            unchecked=online.skip_dedup,
        ) as writer:
            yield writer

    @contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB of its own, with room to spill.

        Raises:
            InvalidRepository: within the block, what it was asked to hold fits neither memory nor disk.
            InvalidSource: within the block, a source's rows are not of the types that its definition needs.
        """
        with scratch_folder(self._temp_directory) as spill:
            con = connect(memory_limit=self._memory_limit, threads=self._threads, temp_directory=spill)
            try:
                yield con
            except duckdb.OutOfMemoryException as exc:
                raise InvalidRepository(
                    f"The rows to load do not fit into memory_limit ({self._memory_limit}) and the disk at "
                    f"{spill.parent}: {str(exc).splitlines()[0]}",
                    hint="Make room there, or set memory_limit or temp_directory of batch_engine in "
                    "feature_store.yaml.",
                ) from exc
            except UNREADABLE as exc:
                raise InvalidSource(
                    f"A source cannot be read as it is defined: {str(exc).splitlines()[0]}",
                    hint="Mend its rows, or name another column in the definition.",
                ) from exc
            finally:
                con.close()

    def open_source(self, con: duckdb.DuckDBPyConnection, view: FeatureView, window: Window) -> ViewSource:
        """The view's source for a window."""
        return views.open_source(con, view, self._config, self._offline_store, window)

    def digests(self, view: FeatureView) -> tuple[str, str | None]:
        """Of the view's definition and its source's files."""
        return views.definition_digest(view, self._config), views.source_fingerprint(view, self._config)

    def estimate(self, client: Any, staged: Staged, *, dated: bool) -> Estimate:
        """What the staged rows will add to Redis's memory; ``dated``: with created times beside them."""
        if not staged.rows:
            return Estimate()
        name = staged.view.stored_name
        sample = row_encoder(self.project, staged.view).encode(staged.sample(SAMPLE_ROWS))
        return estimate(client, staged.rows, sample, name, dated_in=self.project if dated else None)


class _Task:
    """One view's turn within a run, under its lease."""

    def __init__(
        self,
        materializer: Materializer,
        view: FeatureView,
        ledger: Ledger,
        con: duckdb.DuckDBPyConnection,
        request: Request,
    ) -> None:
        self._materializer = materializer
        self._view = view
        self._ledger = ledger
        self._con = con
        self._request = request
        self._started = time.monotonic()
        self._ttl = view.ttl or timedelta(0)
        self._dated = bool(view.batch_source.created_timestamp_column)
        self._settles_ties = views.settles_ties_by_created(view)
        self._definition, self._source = materializer.digests(view)

    def run(self, fence: Fence) -> ViewReport:
        """Finish what was interrupted, then do what is due."""
        unfinished = self._ledger.unfinished()
        report = None
        if unfinished is not None and self._can_resume(unfinished):
            staged = self._open(unfinished.window).stage(unfinished.window, unfinished.partitions)
            report = self._load(unfinished, staged, fence, gate=None)
        wanted = self.due()
        if report is not None and unfinished is not None and unfinished.window == wanted.window:
            return report
        then = self._gated(wanted, fence)
        return then if report is None else joined(report, then)

    def preview(self) -> ViewReport:
        """What ``run`` would find due, and how the gate would judge it; writes nothing."""
        wanted = self.due()
        source = self._open(wanted.window)
        rows, nameless = source.measure(wanted.window)
        partitions = partitions_for(rows)
        staged = source.stage(wanted.window, partitions)
        gate = self._judge(wanted, source, staged, nameless)
        run = self._planned(wanted, staged, partitions)
        needed = self._materializer.estimate(self._ledger.client, staged, dated=self._settles_ties)
        return self._report(run, staged, WriteResult(), gate=gate, needed=needed)

    def due(self) -> Due:
        """What the ledger and the request make due."""
        request, loaded = self._request, self._ledger.loaded()
        end_us = views.as_us(request.end)
        if not request.incremental:
            start_us = None if request.start is None else views.as_us(request.start)
            return due_window(
                loaded, definition=self._definition, ttl=self._ttl, start_us=start_us, end_us=end_us
            )
        return due(
            loaded,
            definition=self._definition,
            source=self._source,
            rows_are_gone=not self._materializer.rows_expire and self._ledger.rows_are_gone(),
            dated=self._dated,
            ttl=self._ttl,
            end_us=end_us,
        )

    def _gated(self, wanted: Due, fence: Fence) -> ViewReport:
        source = self._open(wanted.window)
        rows, nameless = source.measure(wanted.window)
        partitions = partitions_for(rows)
        staged = source.stage(wanted.window, partitions)
        gate = self._judge(wanted, source, staged, nameless)
        run = self._planned(wanted, staged, partitions)
        if not gate.passed and not gate.forced:
            self._ledger.note(fence, gate=self._gate_record(gate))
            error = GateFailed(
                f"View {self._view.name!r} is not loaded: {gate.summary}.",
                hint="Correct the source or the expectation; "
                f"`banquet materialize --force {self._view.name}` loads it all the same.",
            )
            return self._report(run, staged, WriteResult(), gate=gate, error=error)
        self._ledger.begin(run, fence)
        return self._load(run, staged, fence, gate=gate)

    def _open(self, window: Window) -> ViewSource:
        return self._materializer.open_source(self._con, self._view, window)

    def _judge(self, wanted: Due, source: ViewSource, staged: Staged, nameless: int) -> GateResult:
        loaded = self._ledger.loaded()
        # Under another ttl another share of the rows counts: nothing to compare their number with.
        same_ttl = loaded is None or loaded.ttl_us == self._ttl // MICROSECOND
        gate = judge(
            staged,
            source.feature_types,
            limits=Limits.parse(self._view.name, self._view.tags or {}),
            end_us=wanted.window.end_us,
            whole=wanted.kind == WHOLE,
            nameless=nameless,
            reference=self._ledger.recall(_reference(wanted.kind)) if same_ttl else None,
        )
        return replace(gate, forced=self._request.force and not gate.passed)

    def _gate_record(self, gate: GateResult) -> dict[str, Any]:
        return {**gate.as_json(), "at": datetime.now(UTC).isoformat()}

    def _staging(self, partitions: int) -> dict[str, object]:
        return {"partitions": partitions, "duckdb": duckdb.__version__}

    def _can_resume(self, run: Unfinished) -> bool:
        plan = plan_digest(
            run.window, definition=self._definition, source=self._source, **self._staging(run.partitions)
        )
        return plan is not None and plan == run.plan

    def _planned(self, wanted: Due, staged: Staged, partitions: int) -> Unfinished:
        loaded = self._ledger.loaded()
        seen = (staged.newest_created_ns, loaded.arrived_ns if loaded else None)
        arrived = [ns for ns in seen if ns is not None]
        return Unfinished(
            plan=plan_digest(
                wanted.window, definition=self._definition, source=self._source, **self._staging(partitions)
            ),
            window=wanted.window,
            partitions=partitions,
            reason=wanted.reason,
            complete=wanted.complete,
            kind=wanted.kind,
            # A clock ahead of ours must not hide what arrives until ours has caught up.
            arrived_ns=min(max(arrived), time.time_ns()) if arrived else None,
            source=self._source,
            ttl_us=self._ttl // MICROSECOND,
        )

    def _load(self, run: Unfinished, staged: Staged, fence: Fence, *, gate: GateResult | None) -> ViewReport:
        began, view = time.monotonic(), self._view.name

        def done(rows_done: int) -> None:
            self._ledger.advance(rows_done, fence)
            if self._request.observe is not None:
                seconds = time.monotonic() - began
                self._request.observe(Progress(view, rows_done, staged.rows, run.rows_done, seconds))

        with self._materializer.writer() as writer:
            result = load(
                staged,
                writer,
                skip=run.rows_done,
                settle_ties_by_created=self._settles_ties,
                fence=fence,
                done=done,
            )
            witnesses = row_encoder(writer.project, staged.view).encode(staged.sample(_WITNESSES)).keys()
        loaded = None
        if run.complete:
            loaded = Loaded(self._definition, run.window.end_us, run.arrived_ns, run.source, run.ttl_us)
        report = self._report(run, staged, result, gate=gate)
        records: dict[str, Any] = {"report": {**report.as_json(), "at": datetime.now(UTC).isoformat()}}
        newest = [
            us for us in (self._ledger.recall("newest_event_us"), staged.newest_event_us) if us is not None
        ]
        records["newest_event_us"] = max(newest, default=None)
        if gate is not None:
            records["gate"] = self._gate_record(gate)
        if staged.rows and (gate is None or gate.passed):
            records[_reference(run.kind)] = profile(staged)
        self._ledger.finish(fence, loaded, witnesses, **records)
        return report

    def _report(
        self,
        run: Unfinished,
        staged: Staged,
        result: WriteResult,
        *,
        gate: GateResult | None,
        error: BanquetError | None = None,
        needed: Estimate | None = None,
    ) -> ViewReport:
        start_us, newest = run.window.start_us, staged.newest_event_us
        return ViewReport(
            view=self._view.name,
            reason=run.reason,
            start=None if start_us is None else views.as_datetime(start_us),
            end=views.as_datetime(run.window.end_us),
            resumed=run.rows_done > 0,
            rows=staged.rows,
            written=result.written,
            older=result.older,
            seconds=time.monotonic() - self._started,
            newest_event=None if newest is None else views.as_datetime(newest),
            gate=gate,
            memory_bytes=needed.bytes if needed else None,
            needed=needed,
            error=error,
        )


def _reference(kind: str) -> str:
    """The ledger's name for the profile that the next run of that kind is compared with."""
    return f"profile {kind}"
