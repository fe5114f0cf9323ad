"""Entries of an event stream as feature rows: read, checked as a push is, or refused with the reason.

An entry has the fields ``push_source`` and either ``event``, one row as a JSON object, or ``rows``, a JSON
list of them. It is taken as a whole or refused as a whole. Knows no Redis; ``core.feature_rows`` knows what a
valid row is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from core.errors import BanquetError, InvalidFeatureValue, InvalidRequest, InvalidRow, PushSourceNotFound
from core.feature_rows import CheckedRows, check_rows
from core.json_text import repeated_key
from core.layout_rows import EncodedRows
from core.push import OfflineTarget, fed_views, offline_rows, offline_targets
from core.repository import Definitions, FeastRepository, View
from core.write import encode_rows

if TYPE_CHECKING:
    import pyarrow as pa

REFRESH_SECONDS = 2.0
REMOTE_REFRESH_SECONDS = 30.0

_FIELDS = (b"push_source", b"event", b"rows")


class Entry(NamedTuple):
    """One entry of a stream, as Redis delivers it."""

    id: bytes
    fields: Mapping[bytes, bytes]

    @property
    def added_ms(self) -> int:
        """When it was added, milliseconds since the epoch by the clock of Redis."""
        return int(self.id.split(b"-")[0])

    @property
    def arrived_ns(self) -> int:
        """When it was added, nanoseconds since the epoch.

        Entries of one millisecond follow each other by a microsecond, up to the thousandth: so their created
        timestamps keep the order of the stream, and a second delivery gets the same ones as the first.
        """
        milliseconds, _, sequence = self.id.partition(b"-")
        return int(milliseconds) * 1_000_000 + min(int(sequence or 0), 999) * 1_000


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry that is not written, and why."""

    entry: Entry
    error: BanquetError


@dataclass(frozen=True, slots=True)
class Batch:
    """Checked entries of one push source.

    ``online`` has the rows of each view as they were checked and as they are encoded, ``offline`` the table
    for each batch source.
    """

    entries: Sequence[Entry]
    rows: int
    online: Sequence[tuple[CheckedRows, EncodedRows]]
    offline: Sequence[tuple[OfflineTarget, pa.Table]]


class _Event(NamedTuple):
    entry: Entry
    rows: list[dict[str, Any]]


class PushSources:
    """The push sources of a repository as its registry defines them now."""

    def __init__(self, repository: FeastRepository, *, online: bool = True, offline: bool = True) -> None:
        self._repository = repository
        self._online = online
        self._offline = offline
        self._definitions: Definitions | None = None
        self._fingerprint: object = None
        self._targets: dict[str, list[OfflineTarget]] = {}
        self._looked = 0.0

    def refresh(self, *, now: bool = False) -> bool:
        """Read the registry anew if it changed; True if it did.

        A registry that is not a local file is looked at every ``REMOTE_REFRESH_SECONDS``, a local one every
        ``REFRESH_SECONDS``, or at once with ``now``.
        """
        local = self._repository.registry_file is not None
        wait = REFRESH_SECONDS if local else REMOTE_REFRESH_SECONDS
        moment = time.monotonic()
        if self._definitions is not None and moment - self._looked < wait and not (now and local):
            return False
        self._looked = moment
        fingerprint = self._repository.fingerprint()
        if self._definitions is not None and fingerprint == self._fingerprint:
            return False
        self._definitions = self._repository.definitions()
        self._fingerprint = fingerprint
        if self._offline and self._targets:
            self._repository.store().refresh_registry()
        self._targets.clear()
        return True

    def check(self, entries: Iterable[Entry]) -> tuple[list[Batch], list[Refusal]]:
        """Check entries as ``POST /push`` checks its rows: column by column, many entries at a time.

        Raises:
            InvalidRepository: the definitions cannot be used.
            InvalidSource: a batch source cannot be read.
        """
        refused: list[Refusal] = []
        alike: dict[tuple[str, frozenset[str]], list[_Event]] = {}
        for entry in entries:
            try:
                source, rows = read_entry(entry)
                alike.setdefault((source, frozenset(rows[0])), []).append(_Event(entry, rows))
            except InvalidRequest as error:
                refused.append(Refusal(entry, error))
        batches: list[Batch] = []
        present = datetime.now(tz=UTC)
        for (source, columns), events in alike.items():
            try:
                views = self._views(source)
            except PushSourceNotFound as error:
                refused += [Refusal(event.entry, error) for event in events]
                continue
            # Halves of a batch that has a bad entry, until each bad one stands alone.
            parts = [events]
            while parts:
                part = parts.pop()
                try:
                    batches.append(self._batch(source, views, columns, part, present))
                except (InvalidRequest, InvalidFeatureValue) as error:
                    middle = len(part) // 2
                    if middle:
                        parts += [part[middle:], part[:middle]]
                    else:
                        refused.append(Refusal(part[0].entry, error))
        return batches, refused

    def _views(self, source: str) -> list[View]:
        self.refresh()
        assert self._definitions is not None
        try:
            return fed_views(self._definitions, source)
        except PushSourceNotFound:
            if not self.refresh(now=True):
                raise
            return fed_views(self._definitions, source)

    def _batch(
        self,
        source: str,
        views: Sequence[View],
        columns: Iterable[str],
        events: Sequence[_Event],
        present: datetime,
    ) -> Batch:
        rows = [row for event in events for row in event.rows]
        given = {name: [row[name] for row in rows] for name in columns}
        arrived = [event.entry.arrived_ns for event in events for _ in event.rows]
        checked = [check_rows(view, given, now=present, arrived_ns=arrived) for view in views]
        online, offline = [], []
        if self._offline:
            if source not in self._targets:
                self._targets[source] = offline_targets(self._repository, views)
            offline = [(target, offline_rows(target, checked, given)) for target in self._targets[source]]
        if self._online:
            project = self._repository.project
            online = [
                (part, encode_rows(project, part.view, part.columns, part.event_ns)) for part in checked
            ]
        return Batch([event.entry for event in events], len(arrived), online, offline)


def read_entry(entry: Entry) -> tuple[str, list[dict[str, Any]]]:
    """The push source that an entry names, and its rows, which all have the same columns.

    Raises:
        InvalidRequest: a field is missing or unknown, or is not what it must be.
        InvalidRow: the rows have different columns.
    """
    for name in entry.fields:
        if name not in _FIELDS:
            raise InvalidRequest(
                f"Unknown field `{_text(name)}`.",
                hint="An entry has the fields push_source and event, or push_source and rows.",
            )
    source = _text(entry.fields.get(b"push_source", b""))
    if not source:
        raise InvalidRequest("The field push_source is missing.", field="push_source")
    if (b"event" in entry.fields) == (b"rows" in entry.fields):
        raise InvalidRequest(
            "An entry has either the field event or the field rows.",
            hint="event is one row as a JSON object, rows a JSON list of them.",
            field="event",
        )
    if b"event" in entry.fields:
        rows = [_parsed("event", entry.fields[b"event"])]
    else:
        rows = _parsed("rows", entry.fields[b"rows"])
        if type(rows) is not list or not rows:
            raise InvalidRequest("The field rows is not a JSON list with a row in it.", field="rows")
    for number, row in enumerate(rows):
        if type(row) is not dict:
            what = "The field event" if b"event" in entry.fields else f"Row {number} of the field rows"
            raise InvalidRequest(f"{what} is not a JSON object.", field="event")
        if row.keys() != rows[0].keys():
            odd = min(row.keys() ^ rows[0].keys())
            raise InvalidRow(
                f"Row {number} differs from row 0 in its columns.",
                hint="Send the same columns in every row, null where there is no value.",
                field=odd,
                row=number,
            )
    return source, rows


def _parsed(field: str, text: bytes) -> Any:
    try:
        parsed = orjson.loads(text)
        repeated = repeated_key(text, parsed)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequest(f"The field {field} is not valid JSON: {exc}.", field=field) from None
    except RecursionError:
        raise InvalidRequest(f"The field {field} is nested too deeply.", field=field) from None
    if repeated is not None:
        raise InvalidRequest(f"The field {field} names the key `{repeated}` twice.", field=repeated)
    return parsed


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
