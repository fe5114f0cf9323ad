"""``POST /push`` and ``POST /write-to-online-store``: feature rows in, as Feast's feature server takes them.

Every row is checked before any is written. Online rows go through ``core.write`` (newer wins), offline rows
through Feast's offline store; both block, so they run in threads of their own, and no more wait for one than
there is room for. Feast is imported at the first push to the offline store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from core.errors import InvalidRequest, InvalidRow, InvalidSource, Overloaded
from core.feature_rows import CheckedRows, check_rows
from core.push import OfflineTarget, append_offline, fed_views, offline_rows, offline_targets
from core.repository import FeastRepository, View
from core.write import OnlineWriter, WriteResult, encode_rows
from serving import bodies
from serving.catalog import Catalog
from serving.metrics import RequestMetrics

_ONLINE, _OFFLINE, _BOTH = "online", "offline", "online_and_offline"
_THREADS = 2
_MAX_WAITING = 64


class FeatureWriter:
    """Writes checked rows of one repository, online and offline, in threads."""

    def __init__(self, repository: FeastRepository, metrics: RequestMetrics) -> None:
        self._repository = repository
        self._metrics = metrics
        self._online = ThreadPoolExecutor(_THREADS, "banquet-push")
        # One thread: Feast's file store reads a whole file and writes it anew.
        self._offline = ThreadPoolExecutor(1, "banquet-push-offline")
        self._waiting = 0
        # Connects at the first push.
        ttl = repository.config["online_store"].get("key_ttl_seconds")
        self._writer = OnlineWriter(repository.redis, repository.project, key_ttl_seconds=ttl)

    async def write(
        self,
        views: Sequence[View],
        df: dict[str, Any],
        *,
        online: bool,
        offline: bool,
        wire_names: bool = False,
    ) -> None:
        """Check ``df`` against every view, then write it; returns when every row can be read.

        Raises:
            InvalidRow: a row is not valid; nothing was written.
            RedisUnavailable: Redis did not answer; sending the same rows again is safe.
            Overloaded: too many writes are waiting.
        """

        def work() -> None:
            now = datetime.now(tz=UTC)
            checked = [check_rows(view, df, now=now, wire_names=wire_names) for view in views]
            targets = offline_targets(self._repository, views) if offline else []
            tables = [offline_rows(target, checked, df) for target in targets]
            if online:
                for rows in checked:
                    result = self._write_online(rows)
                    self._metrics.pushed(rows.view.name, result.written, result.older)
            for target, table in zip(targets, tables, strict=True):
                if checked[0].rows:
                    self._write_offline(target, table)

        if self._waiting >= _MAX_WAITING:
            raise Overloaded("Too many pushes are waiting.", hint="Push fewer, larger batches.")
        self._waiting += 1
        try:
            pool = self._offline if offline else self._online
            await asyncio.get_running_loop().run_in_executor(pool, work)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Let the writes under way end and drop the connections."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._online.shutdown(cancel_futures=True)
        self._offline.shutdown(cancel_futures=True)
        self._writer.close()

    def _write_online(self, rows: CheckedRows) -> WriteResult:
        if rows.rows == 0:
            return WriteResult()
        encoded = encode_rows(self._repository.project, rows.view, rows.columns, rows.event_ns)
        return self._writer.write(rows.view.stored_name, encoded, created_ns=rows.created_ns)

    def _write_offline(self, target: OfflineTarget, table: Any) -> None:
        try:
            append_offline(self._repository, target, table)
        except InvalidSource as exc:
            raise InvalidRow(
                f"The batch source of view {target.view!r} does not take the rows.",
                hint="Compare the values of the columns that the view does not declare with the source.",
                field="df",
                view=target.view,
            ) from exc


class PushEndpoint:
    """Pushes rows to every view that a push source feeds."""

    def __init__(self, catalog: Catalog, writer: FeatureWriter) -> None:
        self._catalog = catalog
        self._writer = writer

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        request = bodies.parse(body)
        bodies.check_fields(
            request, ("push_source_name", "df", "to", "allow_registry_cache", "transform_on_write")
        )
        source, df = _name(request, "push_source_name"), _frame(request)
        to = request.get("to", _ONLINE)
        if to not in (_ONLINE, _OFFLINE, _BOTH):
            raise InvalidRequest(
                "`to` is none of online, offline and online_and_offline.",
                hint='Leave it out to push to "online".',
                field="to",
            )
        await _refresh_if_asked(request, self._catalog)
        views = fed_views(self._catalog.definitions, source)
        await self._writer.write(views, df, online=to != _OFFLINE, offline=to != _ONLINE)
        return b""


class WriteOnlineEndpoint:
    """Writes rows of one view, as Feast's remote online store sends them.

    It has transformed them already; features are written as they come.
    """

    def __init__(self, catalog: Catalog, writer: FeatureWriter) -> None:
        self._catalog = catalog
        self._writer = writer

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        request = bodies.parse(body)
        bodies.check_fields(
            request, ("feature_view_name", "df", "allow_registry_cache", "transform_on_write")
        )
        name, df = _name(request, "feature_view_name"), _frame(request)
        await _refresh_if_asked(request, self._catalog)
        view = self._catalog.definitions.view(name)
        if not isinstance(view, View):
            raise InvalidRequest(
                f"{name!r} is computed at request time and has no rows.",
                hint="Write to the views it is computed from.",
                field="feature_view_name",
            )
        await self._writer.write([view], df, online=True, offline=False, wire_names=True)
        return b"null"


async def _refresh_if_asked(request: dict[str, Any], catalog: Catalog) -> None:
    cached = bodies.flag(request, "allow_registry_cache", default=True)
    bodies.flag(request, "transform_on_write", default=True)
    if not cached:
        await catalog.refresh_definitions()


def _name(request: dict[str, Any], field: str) -> str:
    value = request.get(field)
    if type(value) is not str or not value:
        raise InvalidRequest(f"`{field}` is missing or not a name.", field=field)
    return value


def _frame(request: dict[str, Any]) -> dict[str, Any]:
    df = request.get("df")
    if not isinstance(df, dict):
        raise InvalidRequest(
            "`df` must be an object of columns.",
            hint='For example {"user_id": [1], "clicks": [3], "event_timestamp": ["2026-01-31T12:00:00Z"]}.',
            field="df",
        )
    return df
