"""The point-in-time join: for each entity row, the newest row of each view at that row's timestamp.

Pure DuckDB and Arrow: knows scans, keys and timestamps; knows no Feast and no file.

Per view, two passes over the source. The first reads keys and timestamps only: a semi-join with the entity
rows' keys and the range of their timestamps cut the source down, then an ASOF join finds for each entity
row the timestamp of its newest source row. The second pass fetches the features of exactly those
(key, timestamp) pairs; a pair that several source rows share is settled there. The cost is linear in
rows plus events (a sort of what the cuts leave), and only keys and timestamps are ever sorted.

Times are compared as integers since the epoch, in nanoseconds where the source has them and in
microseconds otherwise, so that neither side is rounded.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

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
            # Where the files give each row a position, nothing depends on the order of a scan.
            con.execute(f"SET preserve_insertion_order = {not view.scan.position}")
            join = _Join(con, view, keys, key_types, known_by_then, expired)
            tables.append(join.run(rows))
            statuses[view.name] = join.status
            if expired:
                event_ns[view.name] = join.event_ns
    finally:
        con.execute("RESET preserve_insertion_order")
        con.execute("DROP TABLE IF EXISTS entity")
        con.execute("DROP TABLE IF EXISTS found")
    columns = {name: table[name] for table in tables for name in table.column_names}
    return Joined(pa.table(columns), statuses, event_ns)


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
    """The two passes over one view's source; in each statement ``s`` is the source, ``e`` the entity rows."""

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
        self.time = epoch(_column(view.timestamp), kinds[view.timestamp], self.unit)
        self.available = epoch(_column(available), kinds[available], self.unit) if available else None
        # What identifies a source row, short of ties: names in table `found`, values in the source.
        self.entity_keys: list[str] = []
        self.identity: dict[str, str] = {}
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
            self.identity[name] = sides[1]
        self.names = list(self.identity)
        self.identity["t"] = self.time
        if self.available:
            self.identity["c"] = self.available
        self.features = ", ".join(
            f"{_column(name)} AS f{number}" for number, name in enumerate(view.features.values())
        )

    def run(self, rows: int) -> pa.Table:
        """The features, one row per entity row; sets ``status`` and, for expired rows, ``event_ns``."""
        self.status = np.full(rows, FeatureStatus.NOT_FOUND, np.int8)
        self.event_ns = np.zeros(rows if self.expired else 0, np.int64)
        found = self._find()
        table = self._fetch(found) if found else self._no_rows()
        if table.num_rows < rows:
            at = np.full(rows, -1, np.int64)
            at[table["row"].to_numpy()] = np.arange(table.num_rows)
            table = table.combine_chunks().take(pa.array(at, mask=at < 0))
        return table.drop_columns(["row"]).rename_columns(list(self.view.features))

    def _find(self) -> int:
        """Create ``found``: per entity row the identity of its newest source row. Return how many count."""
        bounds = self.con.execute(f"SELECT min({self.upper}), max({self.unit}) FROM entity").fetchall()
        lowest, highest = bounds[0]
        if lowest is None:
            return 0
        scale = 1000 if self.unit == "ns" else 1
        start = (lowest - self.ttl) // scale if self.ttl and not self.expired else None
        kind = self.view.scan.columns[self.view.timestamp]
        self.where = within(_column(self.view.timestamp), kind, start, -(-highest // scale))
        source = f"SELECT {_aliased(self.identity)} FROM {self.view.scan.table} AS s WHERE {self.where}"
        on = [f"{entity} = s.{name}" for name, entity in zip(self.names, self.entity_keys, strict=True)]
        if on:
            source = f"SELECT s.* FROM ({source}) s SEMI JOIN entity e ON {' AND '.join(on)}"
        at = "t"
        if self.available:
            # Known from max(event, created time) on; the newest event among those known then, for each.
            at = "known"
            by = f"PARTITION BY {', '.join(self.names)}" if self.names else ""
            newest = f"max(row(t, c)) OVER ({by} ORDER BY greatest(t, c))"
            source = (
                f"SELECT * REPLACE (newest[1] AS t, newest[2] AS c) FROM "
                f"(SELECT *, greatest(t, c) AS known, {newest} AS newest FROM ({source}) WHERE c IS NOT NULL)"
            )
        # 64 bits hold the difference unless the ttl spans centuries.
        upper = f"e.{self.upper}" if lowest - self.ttl > -(1 << 63) else f"e.{self.upper}::HUGEINT"
        fresh = f"s.t >= {upper} - {self.ttl}" if self.ttl else "true"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE found AS "
            f"SELECT e.row, {', '.join(f's.{name}' for name in self.identity)} FROM entity e "
            f"ASOF JOIN ({source}) s ON {' AND '.join([*on, f'e.{self.unit} >= s.{at}'])}"
            + ("" if self.expired else f" WHERE {fresh}")
        )
        if self.expired:
            # The newest row is found whatever its age; what is past its ttl goes only then.
            found = self.con.execute("SELECT row, t FROM found").fetchnumpy()
            self.status[found["row"]] = FeatureStatus.OUTSIDE_MAX_AGE
            self.event_ns[found["row"]] = found["t"] * (1000 // scale)
            self.con.execute(
                f"DELETE FROM found s WHERE NOT (SELECT {fresh} FROM entity e WHERE e.row = s.row)"
            )
        found_rows = self.con.execute("SELECT row FROM found").fetchnumpy()["row"]
        self.status[found_rows] = FeatureStatus.PRESENT
        return len(found_rows)

    def _fetch(self, found: int) -> pa.Table:
        """The features of the rows in ``found``, behind their row numbers, in order."""
        on = " AND ".join(f"{value} = f.{name}" for name, value in self.identity.items())
        # Where source rows share an identity there are more rows than that, at worst millions for each:
        # the limit stops before they pile up.
        table = self.con.sql(
            f"SELECT * FROM (SELECT f.row, {self.features} FROM {self.view.scan.table} AS s "
            f"JOIN found f ON {on} WHERE {self.where} LIMIT {found + 1}) ORDER BY row"
        ).to_arrow_table()
        return table if table.num_rows == found else self._fetch_tied()

    def _fetch_tied(self) -> pa.Table:
        """``_fetch`` where several source rows share an identity: the last written of them counts."""
        scan = self.view.scan
        table, position = f"{scan.table} AS s", list(scan.position)
        if not position:
            table, position = f"(SELECT *, row_number() OVER () AS place FROM {scan.table}) AS s", ["place"]
        newest = [f"s.{name} DESC" for name in position]
        if self.view.created:
            newest.insert(0, f"{_column(self.view.created)} DESC NULLS LAST")
        same = " AND ".join(f"{value} = f.{name}" for name, value in self.identity.items())
        on = " AND ".join(f"w.{name} = f.{name}" for name in self.identity)
        return self.con.sql(
            f"SELECT f.row, w.* EXCLUDE ({', '.join(self.identity)}) FROM found f JOIN ("
            f"SELECT {_aliased(self.identity)}, {self.features} FROM {table} SEMI JOIN found f ON {same} "
            f"WHERE {self.where} QUALIFY row_number() OVER ("
            f"PARTITION BY {', '.join(self.identity.values())} ORDER BY {', '.join(newest)}) = 1"
            f") w ON {on} ORDER BY f.row"
        ).to_arrow_table()

    def _no_rows(self) -> pa.Table:
        query = f"SELECT 0::BIGINT AS row, {self.features} FROM {self.view.scan.table} AS s LIMIT 0"
        return self.con.sql(query).to_arrow_table()


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


def _aliased(expressions: Mapping[str, str]) -> str:
    return ", ".join(f"{value} AS {name}" for name, value in expressions.items())
