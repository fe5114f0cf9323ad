"""The point-in-time join: for each entity row, the newest row of each view at that row's timestamp.

Pure DuckDB and Arrow: knows scans, keys and timestamps; knows no Feast and no file.

Per view, the source is read twice. The first time keys and timestamps only: a join with the numbered
keys of the entity rows and the range of their timestamps cut it down to candidates, among which each
entity row's newest is found: by ``core.as_of`` in memory, or by an ASOF join of DuckDB, which spills, where
there are too many. The second time the features of exactly those rows, by their place in the files. The cost
is linear in rows plus events (a sort of what the cuts leave), and no feature is ever sorted.

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
import pyarrow.compute as pc

from core.as_of import BYTES_PER_ROW, Asked, Moments, newest
from core.comparison import NANOSECOND_TYPES, comparable, epoch, within
from core.errors import EntityFrameError, InvalidSource
from core.numbered_rows import Numbered, NumberedRows
from core.source import Scan, identifier
from core.types import FeatureStatus

_MICROSECOND = timedelta(microseconds=1)
_SECOND_US = 1_000_000
# Within it, core.comparison.within drops no bound of a time.
_EXACT_US = 9_000_000_000_000_000


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
    in_memory: int | None = None,
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
        in_memory: how many candidates and entity rows are searched in memory at most; more are left to
            DuckDB, which spills. By default what an eighth of its ``memory_limit`` holds.

    Raises:
        EntityFrameError: a key or the timestamp is missing or of a type that does not compare.
        InvalidSource: the source's timestamp is not a time.
    """
    keys = list(dict.fromkeys(key for view in views for key in view.keys))
    entity_rows = NumberedRows(con, entities, keys, timestamp)
    rows = entities.num_rows
    room = (_memory_limit(con) // 8 // BYTES_PER_ROW if in_memory is None else in_memory) - rows
    numbered: dict[tuple[str, ...], Numbered] = {}
    compared: dict[tuple[str, ...], _Keys] = {}
    tables: list[pa.Table] = []
    statuses: dict[str, np.ndarray] = {}
    event_ns: dict[str, np.ndarray] = {}
    try:
        for view in views:
            join = _Join(con, view, entity_rows, known_by_then, expired, room)
            own, sides = tuple(view.keys), tuple(join.entity_keys)
            if own not in numbered:
                numbered[own] = entity_rows.numbered(own)
            if sides not in compared:
                compared[sides] = _Keys(con, numbered[own], sides, len(compared))
            join.keys = compared[sides]
            # Where the files give each row a place, nothing depends on the order of a scan.
            con.execute(f"SET preserve_insertion_order = {not _place(view.scan.position)}")
            tables.append(_unchanged(view.scan, partial(join.run, rows)))
            statuses[view.name] = join.status
            if expired:
                event_ns[view.name] = join.event_ns
    finally:
        con.execute("RESET preserve_insertion_order")
        for table in ("copy", "candidate", "found", "winner"):
            con.execute(f"DROP TABLE IF EXISTS {table}")
        for made in compared.values():
            made.drop()
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


def _memory_limit(con: duckdb.DuckDBPyConnection) -> int:
    """Bytes."""
    size, unit = con.execute("SELECT current_setting('memory_limit')").fetchall()[0][0].split()
    return int(float(size) * 1024 ** ["bytes", "KiB", "MiB", "GiB", "TiB"].index(unit))


class _Keys:
    """The distinct keys of the entity rows as one view compares them.

    ``table`` has them as k0.. with their ``code``; ``rows``, for statements, the entity rows with theirs,
    ``asked`` and ``upper``.
    """

    def __init__(
        self, con: duckdb.DuckDBPyConnection, numbered: Numbered, compared: Sequence[str], number: int
    ) -> None:
        self._con, self._numbered = con, numbered
        self.table, self.rows, self.count = f"key{number}", f"coded{number}", numbered.keys.num_rows
        con.register("distinct_keys", numbered.keys)
        selected = "".join(f"{key} AS k{i}, " for i, key in enumerate(compared))
        con.execute(f"CREATE TEMP TABLE {self.table} AS SELECT {selected}code FROM distinct_keys e")
        con.unregister("distinct_keys")

    def asked(self, unit: str) -> Asked:
        """The entity rows with their times in ``us`` or ``ns``."""
        return self._numbered.asked(unit)

    def load(self, unit: str) -> None:
        """Make ``rows`` with times in ``unit``."""
        asked = self.asked(unit)
        columns = {"row": asked.row, "code": asked.code, "asked": asked.at, "upper": asked.upper}
        self._con.register(self.rows, pa.table(columns))

    def drop(self) -> None:
        """Take both tables away."""
        self._con.execute(f"DROP TABLE IF EXISTS {self.table}")
        self._con.unregister(self.rows)


def _equal(keys: Sequence[str]) -> str:
    """SQL that ``keys`` are those of a row ``k`` of the numbered keys."""
    return " AND ".join(f"{key} = k.k{i}" for i, key in enumerate(keys)) or "true"


class _Join:
    """One view's join. In every statement ``s`` is the source, ``e`` the entity rows."""

    keys: _Keys
    winner: pa.Table | None = None

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        view: ViewJoin,
        entities: NumberedRows,
        known_by_then: bool,
        expired: bool,
        room: int,
    ) -> None:
        self.con, self.view, self.expired, self.room = con, view, expired, room
        kinds = view.scan.columns
        available = view.created if known_by_then else None
        nanoseconds = {kinds[name] for name in (view.timestamp, available) if name} & NANOSECOND_TYPES
        self.unit = "ns" if nanoseconds else "us"
        self.ttl = view.ttl // _MICROSECOND * (1000 if nanoseconds else 1)
        # The same keys on both sides, in a form that compares by value.
        self.entity_keys: list[str] = []
        self.source_keys: list[str] = []
        for key, source_key in view.keys.items():
            kind, source_kind = entities.key_types[key], kinds[source_key]
            sides = comparable(f"e.{entities.names[key]}", kind, _column(source_key), source_kind)
            if sides is None:
                raise EntityFrameError(
                    f"Key {key!r} is {kind} in the entity rows, {source_kind} in the source of "
                    f"{view.name!r}.",
                    hint=f"Convert the column {key!r} of the entity rows.",
                )
            self.entity_keys.append(sides[0])
            self.source_keys.append(sides[1])
        # What of a source row the join looks at: names in the table `candidate`, values in the source.
        self.looked_at = {
            "code": "k.code",
            "t": epoch(_column(view.timestamp), kinds[view.timestamp], self.unit),
        }
        if available:
            self.looked_at["c"] = epoch(_column(available), kinds[available], self.unit)
        self.features = ", ".join(
            f"{_column(name)} AS f{number}" for number, name in enumerate(view.features.values())
        )

    def run(self, rows: int) -> pa.Table:
        """The features, one row per entity row; sets ``status`` and, for expired rows, ``event_ns``."""
        self.winner = None
        self.status = np.full(rows, FeatureStatus.NOT_FOUND, np.int8)
        self.event_ns = np.zeros(rows if self.expired else 0, np.int64)
        asked = self.keys.asked(self.unit)
        found = 0
        if len(asked.row):
            lowest, highest = int(asked.upper.min()), int(asked.at.max())
            self._look(lowest, highest)
            searched = self._search()
            found = self._find(lowest, highest) if searched is None else searched
        table = self._fetch(found)
        places = table["row"].to_numpy()
        columns = [_spread(column, places, rows) for column in table.columns[1:]]
        return pa.table(columns, names=list(self.view.features))

    def _look(self, lowest: int, highest: int) -> None:
        """Set ``source``, what it is to be read ``where``, and ``place``, which tells its rows apart.

        ``bounds`` are microseconds between which ``where`` keeps the times, both included, if it does.
        """
        scan = self.view.scan
        scale = 1000 if self.unit == "ns" else 1
        start = (lowest - self.ttl) // scale if self.ttl and not self.expired else None
        end = -(-highest // scale)
        kind = scan.columns[self.view.timestamp]
        self.where = within(_column(self.view.timestamp), kind, start, end)
        self.bounds = None
        if start is not None and -_EXACT_US < start <= end < _EXACT_US:
            # A source in seconds or milliseconds is cut at the nearest of its own.
            self.bounds = start - _SECOND_US, end + _SECOND_US
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
            self.source, self.place, self.where = "copy AS s", "s.rowid", "true"

    def _candidates(self, looked_at: Mapping[str, str]) -> str:
        """SQL for the source rows in range whose keys are asked for."""
        columns = ", ".join(f"{value} AS {name}" for name, value in looked_at.items())
        return (
            f"SELECT {columns}, {self.place} AS place "
            f"FROM {self.source} JOIN {self.keys.table} k ON {_equal(self.source_keys)} WHERE {self.where}"
        )

    def _search(self) -> int | None:
        """Set ``winner``, found in memory, and return how many count; None where that is not possible."""
        if "c" in self.looked_at or self.room < 0:
            return None
        kind = self.view.scan.columns[self.view.timestamp]
        time = epoch(_column(self.view.timestamp), kind, "us")
        scale = self._scale(time)
        if scale is None or not scale.fit:
            return None
        looked_at = {"moment": f"k.code * {scale.span} + ({time} - {scale.origin})"}
        if self.unit == "ns":
            # Whole microseconds leave more of the 64 bits to the keys.
            looked_at["part"] = f"{self.looked_at['t']} % 1000 <> 0"
        query = f"{self._candidates(looked_at)} LIMIT {self.room + 1}"
        candidates = self.con.sql(query).to_arrow_table()
        if candidates.num_rows > self.room:
            return None
        if self.unit == "ns" and pc.any(candidates["part"]).as_py():
            return None
        found = newest(
            candidates["moment"].to_numpy(),
            candidates["place"].to_numpy(),
            self.keys.asked("us"),
            scale,
            self.view.ttl // _MICROSECOND,
            self._made if self.view.created else None,
        )
        row, place = found.row[found.fresh], found.place[found.fresh]
        if self.expired:
            self.status[found.row] = FeatureStatus.OUTSIDE_MAX_AGE
            self.event_ns[found.row] = found.time * 1000
        self.status[row] = FeatureStatus.PRESENT
        self.winner = pa.table({"row": row, "place": place})
        if len(place) and self.place == "s.file_row_number":
            # Skips row groups by the numbers of their rows, and need not read times once more.
            self.where = f"{self.place} BETWEEN {place.min()} AND {place.max()}"
        return len(row)

    def _scale(self, time: str) -> Moments | None:
        """How keys and ``time``, microseconds, make moments; None where no source row is in range."""
        if self.bounds:
            origin, last = self.bounds
            scale = Moments(origin, last - origin + 1, self.keys.count)
            if scale.fit:
                return scale
        # The range that was asked for is open, or wider than 64 bits: perhaps the source's own is not.
        query = f"SELECT min({time}), max({time}) FROM {self.source} WHERE {self.where}"
        origin, last = self.con.execute(query).fetchall()[0]
        return None if origin is None else Moments(origin, last - origin + 1, self.keys.count)

    def _find(self, lowest: int, highest: int) -> int:
        """Create ``found``: per entity row the identity of its newest candidate. Return how many count.

        ``identity`` is what candidates that tie have in common. A key's number and the time make one integer
        where they fit, which sorts in two thirds of the time of two columns.
        """
        made = {"made": _column(self.view.created)} if self.view.created else {}
        looked_at = self._candidates(self.looked_at | made)
        self.con.execute(f"CREATE OR REPLACE TEMP TABLE candidate AS {looked_at}")
        oldest, last = self.con.execute("SELECT min(t), max(t) FROM candidate").fetchall()[0]
        if oldest is None:
            return 0
        # Entity rows' times were rounded up by at most one for the ttl.
        ttl = self.ttl if self.ttl <= highest - oldest else 0
        span = last - oldest + 1
        self.keys.load(self.unit)
        entities = f"(SELECT * FROM {self.keys.rows} WHERE asked >= {oldest})"
        small = max(map(abs, (lowest, highest, oldest))) < 1 << 61
        if small and self.keys.count * span < 1 << 63 and "c" not in self.looked_at:
            self.identity = {"moment": f"(s.code * {span} + (s.t - {oldest}))"}
            first = f"code * {span}"
            entities = (
                f"(SELECT row, {first} + (least(asked, {last}) - {oldest}) AS moment, {first} AS first, "
                f"{first} + greatest(upper - {ttl} - {oldest}, 0) AS fresh FROM {entities})"
            )
            candidates = f"(SELECT {self.identity['moment']} AS moment FROM candidate s)"
            on, time = "e.moment >= s.moment", f"moment % {span} + {oldest}"
            known, fresh = "s.moment >= e.first", "s.moment >= e.fresh"
        else:
            self.identity = {"code": "s.code", "t": "s.t"}
            candidates, on, time = "candidate", "e.code = s.code AND e.asked >= s.t", "t"
            upper = "upper" if lowest - ttl > -(1 << 63) else "upper::HUGEINT"
            known, fresh = "true", f"s.t >= e.{upper} - {ttl}"
        if "c" in self.looked_at:
            # Known from max(event, created time) on; the newest event among those known then, for each.
            self.identity["c"] = "s.c"
            candidates = (
                "(SELECT * REPLACE (newest[1] AS t, newest[2] AS c) FROM (SELECT *, greatest(t, c) AS known, "
                "max(row(t, c)) OVER (PARTITION BY code ORDER BY greatest(t, c)) AS newest "
                "FROM candidate WHERE c IS NOT NULL))"
            )
            on = "e.code = s.code AND e.asked >= s.known"
        if not ttl:
            fresh = "true"
        identity = ", ".join(f"s.{name}" for name in self.identity)
        counts = known if self.expired else f"{known} AND {fresh}"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE found AS SELECT e.row, {identity}, {fresh} AS fresh "
            f"FROM {entities} e ASOF JOIN {candidates} s ON {on} WHERE {counts}"
        )
        if self.expired:
            # The newest row is found whatever its age; what is past its ttl goes only then.
            found = self.con.execute(f"SELECT row, {time} AS t FROM found").fetchnumpy()
            self.status[found["row"]] = FeatureStatus.OUTSIDE_MAX_AGE
            self.event_ns[found["row"]] = found["t"] * (1 if self.unit == "ns" else 1000)
            self.con.execute("DELETE FROM found WHERE NOT fresh")
        found_rows = self.con.execute("SELECT row FROM found").fetchnumpy()["row"]
        self.status[found_rows] = FeatureStatus.PRESENT
        self._settle(len(found_rows))
        return len(found_rows)

    def _settle(self, found: int) -> None:
        """Create ``winner``: per row found the place of the candidate that counts."""
        same = " AND ".join(f"f.{name} = {value}" for name, value in self.identity.items())
        # Where candidates tie there are more pairs than rows, at worst millions for each row: the limit
        # stops before they pile up.
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE winner AS SELECT f.row, s.place FROM found f "
            f"JOIN candidate s ON {same} LIMIT {found + 1}"
        )
        if self.con.execute("SELECT count(*) FROM winner").fetchall()[0][0] == found:
            return
        identity = ", ".join(f"{value} AS {name}" for name, value in self.identity.items())
        settled = " AND ".join(f"f.{name} = s.{name}" for name in self.identity)
        newest = "s.made DESC NULLS LAST, s.place DESC" if self.view.created else "s.place DESC"
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE winner AS SELECT f.row, s.place FROM found f JOIN ("
            f"SELECT {identity}, s.place FROM candidate s SEMI JOIN found f ON {same} QUALIFY row_number() "
            f"OVER (PARTITION BY {', '.join(self.identity.values())} ORDER BY {newest}) = 1) s ON {settled}"
        )

    def _fetch(self, found: int) -> pa.Table:
        """The features of the winners, behind their row numbers."""
        if not found:
            query = f"SELECT 0::BIGINT AS row, {self.features} FROM {self.view.scan.table} AS s LIMIT 0"
            return self.con.sql(query).to_arrow_table()
        if self.winner is None:
            return self._read_at("winner", f"w.row, {self.features}")
        self.con.register("won", self.winner)
        try:
            return self._read_at("won", f"w.row, {self.features}")
        finally:
            self.con.unregister("won")

    def _made(self, places: np.ndarray) -> pa.ChunkedArray:
        """When the rows at ``places`` were created."""
        assert self.view.created
        self.con.register("tied", pa.table({"row": np.arange(len(places)), "place": places}))
        try:
            read = self._read_at("tied", f"w.row, {_column(self.view.created)} AS made")
        finally:
            self.con.unregister("tied")
        return read["made"].take(pa.array(np.argsort(read["row"].to_numpy())))

    def _read_at(self, places: str, columns: str) -> pa.Table:
        """``columns`` of the source rows ``s`` whose places the table ``places``, ``w``, has."""
        return self.con.sql(
            f"SELECT {columns} FROM {self.source} JOIN {places} w ON {self.place} = w.place "
            f"WHERE {self.where}"
        ).to_arrow_table()


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


def _column(name: str) -> str:
    return f"s.{identifier(name)}"
