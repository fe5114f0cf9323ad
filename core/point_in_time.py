"""The point-in-time join: for each entity row, the newest row of each view at that row's timestamp.

Pure DuckDB and Arrow: knows scans, keys and timestamps; knows no Feast and no file.

Per view, the source is read twice. The first time keys and timestamps only: a semi-join with the entity rows'
keys and the range of their timestamps cut it down to candidates, an ASOF join finds for each entity row the
timestamp of its newest candidate, and ties are settled among the candidates. The second time the features of
exactly those rows, by their place in the files. The cost is linear in rows plus events (a sort of what the
cuts leave), and no feature is ever sorted but those of the result.

Times are compared as integers since the epoch, in nanoseconds where the source has them and in
microseconds otherwise, so that neither side is rounded.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import duckdb
import numpy as np
import pyarrow as pa

from core.errors import EntityFrameError, InvalidSource
from core.source import Scan, identifier
from core.types import FeatureStatus

_NANOSECOND_TYPES = {"TIMESTAMP_NS", "TIMESTAMPTZ_NS"}
_ZONED_TYPES = {"TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ_NS"}
_NAIVE_TYPES = {"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"}
_CAST_TO_TIMESTAMP = {"VARCHAR", "DATE", '"NULL"'}
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewJoin:
    """One view's side of the join, in the names of its source.

    ``keys`` maps columns of the entity rows to columns of the source, ``features`` names of the result to
    columns of the source; ``ttl`` zero means that rows never expire.
    """

    name: str
    scan: Scan
    keys: Mapping[str, str]
    features: Mapping[str, str]
    timestamp: str
    created: str | None
    ttl: timedelta


@dataclass(frozen=True, slots=True)
class Joined:
    """What the join found: one row per entity row, in their order.

    ``features`` has the views' features in the order asked for. ``statuses`` has per view an int8 array of
    PRESENT, NOT_FOUND or OUTSIDE_MAX_AGE; without ``expired=True`` a row past its ttl is NOT_FOUND.
    ``event_ns``, with ``expired=True`` only, has the time of the row found, in nanoseconds since the epoch;
    where the status is NOT_FOUND it means nothing.
    """

    features: pa.Table
    statuses: Mapping[str, np.ndarray]
    event_ns: Mapping[str, np.ndarray]


def point_in_time_join(
    con: duckdb.DuckDBPyConnection,
    entities: pa.Table,
    timestamp: str,
    views: Sequence[ViewJoin],
    *,
    known_by_then: bool = False,
    expired: bool = False,
) -> Joined:
    """Join ``views`` to ``entities`` as of column ``timestamp``.

    A source row counts from its event timestamp until ``ttl`` later, both ends included. Of several, the
    newest event timestamp wins, then the newest created timestamp, then the last one in the files; its
    nulls are kept. A null key or timestamp matches nothing. Naive times are UTC.

    Args:
        con: from ``core.source.connect``; the join's temporary tables live and die in it.
        entities: the entity rows.
        timestamp: the column of their timestamps.
        views: what to join.
        known_by_then: count a source row only from its created timestamp on (Feast's
            ``filter_by_created_timestamp``); views without one are unaffected.
        expired: tell rows past their ttl from entities without a row, at the price of reading the source
            from its beginning.

    Raises:
        EntityFrameError: a key or the timestamp is missing or of a type that does not compare.
        InvalidSource: the source's timestamp is not a time.
    """
    keys = list(dict.fromkeys(key for view in views for key in view.keys))
    for column in (*keys, timestamp):
        if column not in entities.column_names:
            raise EntityFrameError(
                f"The entity rows have no column {column!r}.",
                hint=f"Their columns: {', '.join(entities.column_names)}.",
            )
    key_types = _load_entities(con, entities, keys, timestamp)
    rows = entities.num_rows
    tables: list[pa.Table] = []
    statuses: dict[str, np.ndarray] = {}
    event_ns: dict[str, np.ndarray] = {}
    try:
        for view in views:
            join = _Join(con, view, keys, key_types, known_by_then, expired)
            # Where the files give each row a place, nothing depends on the order of a scan.
            con.execute(f"SET preserve_insertion_order = {not _place(view.scan.position)}")
            tables.append(_unchanged(view.scan, partial(join.run, rows)))
            statuses[view.name] = join.status
            if expired:
                event_ns[view.name] = join.event_ns
    finally:
        con.execute("RESET preserve_insertion_order")
        for table in ("entity", "copy", "candidate", "found", "winner"):
            con.execute(f"DROP TABLE IF EXISTS {table}")
    columns = {name: table[name] for table in tables for name in table.column_names}
    return Joined(pa.table(columns), statuses, event_ns)


def _unchanged(scan: Scan, read: Callable[[], pa.Table]) -> pa.Table:
    """What ``read`` makes of ``scan``, whose files must stay as they are between the two readings.

    Raises:
        InvalidSource: they changed every time.
    """
    for _ in range(3):
        before = scan.state()
        table = read()
        if scan.state() == before:
            return table
    raise InvalidSource(f"{scan.location} changes while it is read.", hint="Run it again later.")


def epoch(expression: str, kind: str, unit: str) -> str:
    """SQL for the time ``expression`` of DuckDB type ``kind`` as an integer since the epoch.

    ``unit`` is ``us`` (rounded down) or ``ns``.

    Raises:
        InvalidSource: ``kind`` is no time.
    """
    if kind in _CAST_TO_TIMESTAMP:
        expression, kind = _as_timestamp(expression, kind)
    if kind in _NANOSECOND_TYPES:
        nanoseconds = f"epoch_ns({expression})"
        # DuckDB divides towards zero; times before 1970 are rounded down like the others.
        down = f"(({nanoseconds} - ({nanoseconds} % 1000 + 1000) % 1000) // 1000)"
        return nanoseconds if unit == "ns" else down
    if kind not in _NAIVE_TYPES | _ZONED_TYPES:
        raise InvalidSource(
            f"A timestamp has the type {kind}.", hint="Store it as a timestamp, a date or ISO 8601 text."
        )
    microseconds = f"epoch_us({expression})"
    if unit == "us":
        return microseconds
    # Nanoseconds in 64 bits reach from 1677 to 2262; times beyond compare as the nearest end.
    return f"(least(greatest({microseconds}, -9223372036854775), 9223372036854775) * 1000)"


def _load_entities(
    con: duckdb.DuckDBPyConnection, entities: pa.Table, keys: Sequence[str], timestamp: str
) -> dict[str, str]:
    """Create the table ``entity`` and return the keys' types.

    Its columns: the row number, the keys as k0.., and the time as ``us``, ``us_up`` (rounded up) and ``ns``.
    """
    columns = {f"k{i}": entities[key] for i, key in enumerate(keys)}
    columns["t"] = entities[timestamp]
    columns["row"] = pa.array(np.arange(entities.num_rows, dtype=np.int64))
    con.register("entity_rows", pa.table(columns))
    try:
        described = con.execute("DESCRIBE SELECT * FROM entity_rows").fetchall()
        types = {name: kind for name, kind, *_ in described}
        kind = types["t"]
        try:
            down, nanoseconds = epoch("t", kind, "us"), epoch("t", kind, "ns")
        except InvalidSource as exc:
            raise EntityFrameError(
                f"Column {timestamp!r} of the entity rows has the type {kind}, which is no time.",
                hint="Make it timestamps, with a time zone or in UTC.",
            ) from exc
        up = down
        if kind in _NANOSECOND_TYPES:
            up = f"(({nanoseconds} + (1000 - {nanoseconds} % 1000) % 1000) // 1000)"
        selected = "".join(f"k{i}, " for i in range(len(keys)))
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE entity AS SELECT row, {selected}"
            f"{down} AS us, {up} AS us_up, {nanoseconds} AS ns FROM entity_rows WHERE t IS NOT NULL"
        )
    finally:
        con.unregister("entity_rows")
    return {key: types[f"k{i}"] for i, key in enumerate(keys)}


class _Join:
    """One view's join. In every statement ``s`` is the source, ``e`` the entity rows."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        view: ViewJoin,
        keys: Sequence[str],
        key_types: Mapping[str, str],
        known_by_then: bool,
        expired: bool,
    ) -> None:
        self.con, self.view, self.expired = con, view, expired
        kinds = view.scan.columns
        available = view.created if known_by_then else None
        nanoseconds = {kinds[name] for name in (view.timestamp, available) if name} & _NANOSECOND_TYPES
        self.unit, self.upper = ("ns", "ns") if nanoseconds else ("us", "us_up")
        self.ttl = view.ttl // _MICROSECOND * (1000 if nanoseconds else 1)
        # What of a source row the join looks at: names in the table `candidate`, values in the source.
        self.entity_keys: list[str] = []
        self.looked_at: dict[str, str] = {}
        for key, source_key in view.keys.items():
            name, kind, source_kind = f"k{keys.index(key)}", key_types[key], kinds[source_key]
            sides = comparable(f"e.{name}", kind, _column(source_key), source_kind)
            if sides is None:
                raise EntityFrameError(
                    f"Key {key!r} is {kind} in the entity rows, {source_kind} in the source of "
                    f"{view.name!r}.",
                    hint=f"Convert the column {key!r} of the entity rows.",
                )
            self.entity_keys.append(sides[0])
            self.looked_at[name] = sides[1]
        self.keys = list(self.looked_at)
        self.looked_at["t"] = epoch(_column(view.timestamp), kinds[view.timestamp], self.unit)
        if available:
            self.looked_at["c"] = epoch(_column(available), kinds[available], self.unit)
        # Equal in these, source rows tie.
        self.identity = list(self.looked_at)
        if view.created:
            self.looked_at["made"] = _column(view.created)
        self.features = ", ".join(
            f"{_column(name)} AS f{number}" for number, name in enumerate(view.features.values())
        )

    def run(self, rows: int) -> pa.Table:
        """The features, one row per entity row; sets ``status`` and, for expired rows, ``event_ns``."""
        self.status = np.full(rows, FeatureStatus.NOT_FOUND, np.int8)
        self.event_ns = np.zeros(rows if self.expired else 0, np.int64)
        bounds = self.con.execute(f"SELECT min({self.upper}), max({self.unit}) FROM entity").fetchall()
        lowest, highest = bounds[0]
        found = 0
        if lowest is not None:
            self._look(lowest, highest)
            found = self._find(lowest)
        table = self._fetch(found)
        places = table["row"].to_numpy()
        columns = [_spread(column, places, rows) for column in table.columns[1:]]
        return pa.table(columns, names=list(self.view.features))

    def _look(self, lowest: int, highest: int) -> None:
        """Create ``candidate``: of the source rows in range whose keys are asked for, times and places."""
        scan = self.view.scan
        scale = 1000 if self.unit == "ns" else 1
        start = (lowest - self.ttl) // scale if self.ttl and not self.expired else None
        kind = scan.columns[self.view.timestamp]
        self.where = within(_column(self.view.timestamp), kind, start, -(-highest // scale))
        self.source, self.place = f"{scan.table} AS s", _place(scan.position)
        if not self.place:
            # Rows that have no place in a file get one in a copy of what is needed of them.
            needed = {*self.view.keys.values(), *self.view.features.values(), self.view.timestamp}
            if self.view.created:
                needed.add(self.view.created)
            columns = ", ".join(map(_column, sorted(needed)))
            self.con.execute(
                f"CREATE OR REPLACE TEMP TABLE copy AS SELECT {columns} FROM {self.source} WHERE {self.where}"
            )
            self.source, self.place = "copy AS s", "s.rowid"
        columns = ", ".join(f"{value} AS {name}" for name, value in self.looked_at.items())
        semi_join = ""
        if self.keys:
            on = zip(self.entity_keys, self.keys, strict=True)
            same = " AND ".join(f"{entity} = {self.looked_at[name]}" for entity, name in on)
            semi_join = f"SEMI JOIN entity e ON {same}"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE candidate AS SELECT {columns}, {self.place} AS place "
            f"FROM {self.source} {semi_join} WHERE {self.where}"
        )

    def _find(self, lowest: int) -> int:
        """Create ``found``: per entity row the identity of its newest candidate. Return how many count."""
        identity = ", ".join(f"s.{name}" for name in self.identity)
        source, at = "candidate", "t"
        if "c" in self.identity:
            # Known from max(event, created time) on; the newest event among those known then, for each.
            by = f"PARTITION BY {', '.join(self.keys)}" if self.keys else ""
            newest = f"max(row(t, c)) OVER ({by} ORDER BY greatest(t, c))"
            source, at = (
                f"(SELECT * REPLACE (newest[1] AS t, newest[2] AS c) FROM (SELECT *, "
                f"greatest(t, c) AS known, {newest} AS newest FROM candidate WHERE c IS NOT NULL))",
                "known",
            )
        on = [f"{entity} = s.{name}" for entity, name in zip(self.entity_keys, self.keys, strict=True)]
        # 64 bits hold the difference unless the ttl spans centuries.
        upper = f"e.{self.upper}" if lowest - self.ttl > -(1 << 63) else f"e.{self.upper}::HUGEINT"
        fresh = f"s.t >= {upper} - {self.ttl}" if self.ttl else "true"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE found AS SELECT e.row, {identity} FROM entity e "
            f"ASOF JOIN {source} s ON {' AND '.join([*on, f'e.{self.unit} >= s.{at}'])}"
            + ("" if self.expired else f" WHERE {fresh}")
        )
        if self.expired:
            # The newest row is found whatever its age; what is past its ttl goes only then.
            found = self.con.execute("SELECT row, t FROM found").fetchnumpy()
            self.status[found["row"]] = FeatureStatus.OUTSIDE_MAX_AGE
            self.event_ns[found["row"]] = found["t"] * (1 if self.unit == "ns" else 1000)
            self.con.execute(
                f"DELETE FROM found s WHERE NOT (SELECT {fresh} FROM entity e WHERE e.row = s.row)"
            )
        found_rows = self.con.execute("SELECT row FROM found").fetchnumpy()["row"]
        self.status[found_rows] = FeatureStatus.PRESENT
        self._settle(len(found_rows))
        return len(found_rows)

    def _settle(self, found: int) -> None:
        """Create ``winner``: per row found the place of the candidate that counts."""
        same = " AND ".join(f"f.{name} = s.{name}" for name in self.identity)
        # Where candidates tie there are more pairs than rows, at worst millions for each row: the limit
        # stops before they pile up.
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE winner AS SELECT f.row, s.place FROM found f "
            f"JOIN candidate s ON {same} LIMIT {found + 1}"
        )
        if self.con.execute("SELECT count(*) FROM winner").fetchall()[0][0] == found:
            return
        identity = ", ".join(f"s.{name}" for name in self.identity)
        newest = "s.made DESC NULLS LAST, s.place DESC" if self.view.created else "s.place DESC"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE winner AS SELECT f.row, s.place FROM found f JOIN ("
            f"SELECT {identity}, s.place FROM candidate s SEMI JOIN found f ON {same} "
            f"QUALIFY row_number() OVER (PARTITION BY {identity} ORDER BY {newest}) = 1) s ON {same}"
        )

    def _fetch(self, found: int) -> pa.Table:
        """The features of the winners, behind their row numbers."""
        if not found:
            query = f"SELECT 0::BIGINT AS row, {self.features} FROM {self.view.scan.table} AS s LIMIT 0"
        else:
            query = (
                f"SELECT w.row, {self.features} FROM {self.source} JOIN winner w ON {self.place} = w.place "
                f"WHERE {self.where}"
            )
        return self.con.sql(query).to_arrow_table()


def _spread(column: pa.ChunkedArray, places: np.ndarray, rows: int) -> pa.Array:
    """A column of ``rows`` values with those of ``column`` at ``places`` and nulls elsewhere."""
    kind = column.type
    if not pa.types.is_primitive(kind) or kind.bit_width % 8:
        at = np.full(rows, -1, np.int64)
        at[places] = np.arange(len(places))
        return column.combine_chunks().take(pa.array(at, mask=at < 0))
    # Several times faster than ``take``, which most columns are worth.
    width = np.dtype(f"i{kind.bit_width // 8}")
    values, valid = np.zeros(rows, width), np.zeros(rows, np.bool_)
    start = 0
    for chunk in column.chunks:
        there = places[start : start + len(chunk)]
        values[there] = np.frombuffer(chunk.buffers()[1], width, len(chunk), chunk.offset * width.itemsize)
        valid[there] = np.asarray(chunk.is_valid()) if chunk.null_count else True
        start += len(chunk)
    bits = np.packbits(valid, bitorder="little")
    return pa.Array.from_buffers(kind, rows, [pa.py_buffer(bits), pa.py_buffer(values)])


def _place(position: Sequence[str]) -> str:
    """SQL for a number that grows with a row's position in its files; empty where it is not known."""
    if position == ("file_row_number",):
        return "s.file_row_number"
    if position == ("file_index", "file_row_number"):
        # 2^40 rows in a file, 2^23 files.
        return "(s.file_index * 1099511627776 + s.file_row_number)"
    return ""


def comparable(left: str, left_kind: str, right: str, right_kind: str) -> tuple[str, str] | None:
    """SQL for both sides of a key so that ``=`` compares them by value; None where they never compare.

    Integers and decimals compare at any width, and so do whole floating-point numbers (pandas turns
    integers with gaps into them); times compare as instants, UUIDs with their text.
    """
    families = (_family(left_kind), _family(right_kind))
    if "null" in families:
        return f"CAST({left} AS {right_kind})", right
    if families == ("time", "time"):
        unit = "ns" if {left_kind, right_kind} & _NANOSECOND_TYPES else "us"
        return epoch(left, left_kind, unit), epoch(right, right_kind, unit)
    if families == ("float", "integer"):
        return _whole(left), right
    if families == ("integer", "float"):
        return left, _whole(right)
    if families in {("text", "UUID"), ("UUID", "text")}:
        return f"TRY_CAST({left} AS UUID)", f"TRY_CAST({right} AS UUID)"
    if families[0] == families[1] or set(families) <= {"integer", "float", "decimal"}:
        return left, right
    return None


def _whole(expression: str) -> str:
    return f"CASE WHEN {expression} = trunc({expression}) THEN TRY_CAST({expression} AS HUGEINT) END"


def _family(kind: str) -> str:
    if kind.removeprefix("U") in {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}:
        return "integer"
    if kind in {"FLOAT", "DOUBLE"}:
        return "float"
    if kind.startswith("DECIMAL"):
        return "decimal"
    if kind == "VARCHAR" or kind.startswith("ENUM"):
        return "text"
    if kind == "DATE" or kind in _NAIVE_TYPES | _ZONED_TYPES:
        return "time"
    return "null" if kind == '"NULL"' else kind


def within(expression: str, kind: str, start: int | None, end: int | None) -> str:
    """SQL that a time lies between two times, both included, in a form DuckDB pushes into Parquet.

    ``kind`` is the type of ``expression``; ``start`` and ``end`` are microseconds since the epoch, None for
    no bound. A null time is outside.
    """
    conditions = [f"{expression} IS NOT NULL"]
    if kind in _CAST_TO_TIMESTAMP:
        expression, kind = _as_timestamp(expression, kind)
    reach = 9_000_000_000_000_000 if kind in _NANOSECOND_TYPES else 1 << 60
    for operator, bound in ((">=", start), ("<=", end)):
        if bound is None:
            continue
        if abs(bound) > reach:
            if (operator == ">=") == (bound > 0):
                conditions.append("false")
            continue
        time = f"make_timestamptz({bound})" if kind in _ZONED_TYPES else f"make_timestamp({bound})"
        conditions.append(f"{expression} {operator} CAST({time} AS {kind})")
    return " AND ".join(conditions)


def _as_timestamp(expression: str, kind: str) -> tuple[str, str]:
    target = "TIMESTAMP WITH TIME ZONE" if kind == "VARCHAR" else "TIMESTAMP"
    return f"CAST({expression} AS {target})", target


def _column(name: str) -> str:
    return f"s.{identifier(name)}"
