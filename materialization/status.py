"""How each view stands: what is loaded, how fresh it is, what the gate said, whether a run is under way.

Reads the ledgers and, to count rows, the keys of the online store. Writes nothing; knows no source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from core import layout
from core.repository import Definitions, FeastRepository, View
from materialization.ledger import Ledger
from materialization.views import as_datetime

# Up to so many keys in the database they are counted; beyond, a random sample is.
COUNTED_KEYS = 200_000
SAMPLED_KEYS = 5_000
_PAGE = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewStatus:
    """One view. Times are UTC; what is not known is None.

    ``keys`` is the number of rows in Redis, an estimate where ``keys_estimated``. ``watermark`` is the event
    timestamp up to which everything has been loaded, ``freshness`` the age of the newest event in it.
    ``last_run`` is the last finished run's report as JSON, ``gate`` the last verdict, ``interrupted_rows``
    how many rows a run had written that did not end, ``running`` who holds the view now.
    """

    view: str
    keys: int
    keys_estimated: bool
    watermark: datetime | None
    newest_event: datetime | None
    freshness: timedelta | None
    last_run: Mapping[str, Any] | None
    gate: Mapping[str, Any] | None
    interrupted_rows: int | None
    running: str | None

    def as_json(self) -> dict[str, Any]:
        """A JSON object; durations in seconds."""
        return {
            "view": self.view,
            "keys": self.keys,
            "keys_estimated": self.keys_estimated,
            "watermark": self.watermark and self.watermark.isoformat(),
            "newest_event": self.newest_event and self.newest_event.isoformat(),
            "freshness_seconds": self.freshness and round(self.freshness.total_seconds(), 3),
            "last_run": self.last_run,
            "gate": self.gate,
            "interrupted_rows": self.interrupted_rows,
            "running": self.running,
        }


def status(repo: FeastRepository, *, now: datetime | None = None) -> tuple[ViewStatus, ...]:
    """Every view that is stored online, by name.

    Raises:
        InvalidRepository: there is no registry, or the online store is not Redis.
        RedisUnavailable: Redis does not answer.
    """
    definitions = repo.definitions()
    now = now or datetime.now(UTC)
    with repo.redis.session() as client:
        counts, estimated = _count(client, definitions)
        return tuple(
            _status(client, definitions.project, view, counts[name], estimated, now)
            for name, view in sorted(definitions.views.items())
        )


def _status(client: Any, project: str, view: View, keys: int, estimated: bool, now: datetime) -> ViewStatus:
    ledger = Ledger(client, project, view.stored_name)
    loaded, unfinished, holder = ledger.loaded(), ledger.unfinished(), ledger.holder()
    newest_us = ledger.recall("newest_event_us")
    newest = None if newest_us is None else as_datetime(newest_us)
    return ViewStatus(
        view=view.name,
        keys=keys,
        keys_estimated=estimated,
        watermark=None if loaded is None else as_datetime(loaded.event_us),
        newest_event=newest,
        freshness=None if newest is None else now - newest,
        last_run=ledger.recall("report"),
        gate=ledger.recall("gate"),
        interrupted_rows=None if unfinished is None or holder else unfinished.rows_done,
        running=None if holder is None else f"process {holder['pid']} on {holder['host']}",
    )


def _count(client: Any, definitions: Definitions) -> tuple[dict[str, int], bool]:
    """Rows per view, and whether they are estimates."""
    total = int(_summed(client.dbsize()))
    if total <= COUNTED_KEYS:
        return _rows(client, definitions, client.scan_iter(count=_PAGE)), False
    pipeline = client.pipeline(transaction=False)
    for _ in range(SAMPLED_KEYS):
        pipeline.randomkey()
    found = [key for key in pipeline.execute() if key is not None]
    counts = _rows(client, definitions, found)
    return {name: round(count * total / len(found)) for name, count in counts.items()}, True


def _rows(client: Any, definitions: Definitions, keys: Iterable[bytes]) -> dict[str, int]:
    """How many of the keys hold a row of each view."""
    counts = dict.fromkeys(definitions.views, 0)
    groups: dict[bytes, tuple[layout.EntityKeys, list[View]]] = {}
    for view in definitions.views.values():
        encoder = layout.EntityKeys(definitions.project, view.join_keys)
        groups.setdefault(encoder.prefix, (encoder, []))[1].append(view)
    for page in _pages(keys):
        pipeline = client.pipeline(transaction=False)
        asked: list[list[View]] = []
        for key in page:
            for encoder, views in groups.values():
                if encoder.decode(key) is not None:
                    pipeline.hmget(key, [layout.timestamp_field(view.stored_name) for view in views])
                    asked.append(views)
        for views, events in zip(asked, pipeline.execute(raise_on_error=False), strict=True):
            if isinstance(events, list):
                for view, event in zip(views, events, strict=True):
                    counts[view.name] += event is not None
    return counts


def _pages(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    page: list[bytes] = []
    for key in keys:
        page.append(key)
        if len(page) == _PAGE:
            yield page
            page = []
    yield page


def _summed(size: Any) -> int:
    """DBSIZE of a server, or of a cluster's nodes together."""
    return sum(size.values()) if isinstance(size, dict) else int(size)
