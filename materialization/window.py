"""What one load covers: the newest row per key of a view's source within a window, in a fixed order.

The rows are staged in DuckDB, which keeps them in memory or on disk as its limit allows: the gate judges the
staged rows before the first is written. Their order depends on nothing but the source, so a load that was
killed finds its place again. Knows which row wins; knows no Redis, no ledger and no Feast object.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import duckdb
import pyarrow as pa

from core.comparison import epoch, within
from core.repository import View
from core.source import Scan, identifier

EVENT = "__event"
EVENT_NS = "__event_ns"
CREATED_NS = "__created_ns"
STAGED = "staged"
SAMPLED = "sampled"
SAMPLE_ROWS = 20_000
# Rows of the source that one pass over it sorts: what bounds the memory of a load.
PARTITION_ROWS = 1_250_000


@dataclass(frozen=True, slots=True)
class Window:
    """Event timestamps from ``start_us`` to ``end_us``, both included, in microseconds since the epoch.

    With ``after_us`` only rows count whose event timestamp is after it or, where the source has created
    timestamps, whose created timestamp is after ``arrived_after_ns``: the new rows and the late ones.
    """

    start_us: int | None
    end_us: int
    after_us: int | None = None
    arrived_after_ns: int | None = None


class ViewSource:
    """A view's columns in its source."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        view: View,
        scan: Scan,
        *,
        timestamp: str,
        created: str | None,
        field_mapping: Mapping[str, str],
    ) -> None:
        """Resolve the columns.

        Raises:
            InvalidSource: a column that the view needs is missing, or a timestamp is no timestamp.
        """
        self.con = con
        self.view = view
        self.scan = scan
        self.keys = {key.name: scan.column(key.name, field_mapping) for key in view.join_keys}
        self.features = {f.name: scan.column(f.name, field_mapping) for f in view.features}
        self.timestamp = scan.column(timestamp, field_mapping)
        self.created = scan.column(created, field_mapping) if created else None
        self._event = identifier(self.timestamp)
        if scan.columns[self.timestamp] in {"VARCHAR", "DATE"}:
            self._event = f"CAST({self._event} AS TIMESTAMPTZ)"
        self._event_ns = epoch(identifier(self.timestamp), scan.columns[self.timestamp], "ns")
        self._created_ns = "NULL::BIGINT"
        if self.created:
            column = identifier(self.created)
            time = epoch(column, scan.columns[self.created], "ns")
            self._created_ns = f"CASE WHEN {column} IS NOT NULL THEN {time} END"

    @property
    def dated(self) -> bool:
        """Whether the source has created timestamps."""
        return self.created is not None

    @property
    def feature_types(self) -> dict[str, str]:
        """DuckDB's type of each feature's column."""
        return {name: self.scan.columns[column] for name, column in self.features.items()}

    def rows_sql(self, window: Window, condition: str = "true") -> str:
        """Every row in the window, by the view's names, with its event and created timestamps."""
        columns = [f"{identifier(c)} AS {identifier(n)}" for n, c in {**self.keys, **self.features}.items()]
        columns.append(f"{self._event} AS {EVENT}")
        columns.append(f"{self._event_ns} AS {EVENT_NS}")
        columns.append(f"{self._created_ns} AS {CREATED_NS}")
        columns += [identifier(name) for name in self.scan.position]
        return (
            f"SELECT {', '.join(columns)} FROM {self.scan.table} WHERE {self._where(window)} AND {condition}"
        )

    def newest_sql(self, window: Window, condition: str = "true") -> str:
        """The newest row of each key: by event timestamp, created timestamp, then place in the source.

        Keys with a null in them are left out: they have no row in Redis.
        """
        known = " AND ".join(f"{identifier(column)} IS NOT NULL" for column in self.keys.values())
        names = [identifier(name) for name in (*self.keys, *self.features)]
        newest = [f"{EVENT_NS} DESC", f"{CREATED_NS} DESC NULLS LAST"]
        newest += [f"{identifier(name)} DESC" for name in self.scan.position]
        partition = f"PARTITION BY {self._key_list} " if self.keys else ""
        return (
            f"SELECT {', '.join(names)}, {EVENT}, {EVENT_NS}, {CREATED_NS} "
            f"FROM ({self.rows_sql(window, f'{condition} AND {known}' if known else condition)}) "
            f"QUALIFY row_number() OVER ({partition}ORDER BY {', '.join(newest)}) = 1"
        )

    def count(self, window: Window) -> int:
        """How many rows lie in the window, older ones of the same key included."""
        return self.measure(window)[0]

    def measure(self, window: Window) -> tuple[int, int]:
        """How many rows lie in the window, and how many of them have a null in their key: not storable."""
        unknown = " OR ".join(f"{identifier(column)} IS NULL" for column in self.keys.values()) or "false"
        sql = (
            f"SELECT count(*), count(*) FILTER (WHERE {unknown}) "
            f"FROM {self.scan.table} WHERE {self._where(window)}"
        )
        ((rows, nameless),) = self.con.execute(sql).fetchall()
        return int(rows), int(nameless)

    def sample_keys(self, window: Window, count: int, seed: int) -> pa.Table:
        """Up to ``count`` distinct keys with a row in the window, drawn at random: a column per join key."""
        columns = [f"{identifier(c)} AS {identifier(n)}" for n, c in self.keys.items()]
        known = " AND ".join(f"{identifier(column)} IS NOT NULL" for column in self.keys.values())
        return self.con.sql(
            f"SELECT * FROM (SELECT DISTINCT {', '.join(columns)} FROM {self.scan.table} "
            f"WHERE {self._where(window)} AND {known}) "
            f"USING SAMPLE reservoir({count} ROWS) REPEATABLE ({seed})"
        ).to_arrow_table()

    def stage(self, window: Window, partitions: int) -> Staged:
        """Read the newest row of every key into the table ``staged``, ordered by key within each partition.

        Each partition is one pass over the source, which takes the keys whose hash falls into it.
        """
        order = f" ORDER BY {self._key_list}" if self.keys else ""
        columns = ", ".join(identifier(column) for column in self.keys.values())
        self.con.execute(f"DROP TABLE IF EXISTS {STAGED}")
        for partition in range(partitions if self.keys else 1):
            own = f"hash({columns}) % {partitions} = {partition}" if partitions > 1 and columns else "true"
            target = f"CREATE TEMP TABLE {STAGED} AS" if partition == 0 else f"INSERT INTO {STAGED}"
            self.con.execute(f"{target} {self.newest_sql(window, own)}{order}")
        sql = f"SELECT count(*), max({EVENT_NS}), max({CREATED_NS}) FROM {STAGED}"
        ((rows, event_ns, created_ns),) = self.con.execute(sql).fetchall()
        some = f"SELECT * FROM {STAGED} WHERE rowid % {max(1, rows // SAMPLE_ROWS)} = 0"
        self.con.execute(f"CREATE OR REPLACE TEMP TABLE {SAMPLED} AS {some}")
        return Staged(self.con, self.view, rows, None if event_ns is None else event_ns // 1000, created_ns)

    @cached_property
    def _key_list(self) -> str:
        return ", ".join(identifier(name) for name in self.keys)

    def _where(self, window: Window) -> str:
        kind, start_us = self.scan.columns[self.timestamp], window.start_us
        late = window.arrived_after_ns is not None
        if window.after_us is not None and not late:  # a bound that DuckDB pushes into the files
            start_us = window.after_us if start_us is None else max(start_us, window.after_us)
        where = within(identifier(self.timestamp), kind, start_us, window.end_us)
        if window.after_us is None:
            return where
        new = f"{self._event_ns} > {window.after_us} * 1000"
        if late:
            new = f"({new} OR {self._created_ns} > {window.arrived_after_ns})"
        return f"{where} AND {new}"


@dataclass(frozen=True, slots=True)
class Staged:
    """The rows of one load: how many, and their newest timestamps.

    ``con`` has them as the table ``staged``, and about ``SAMPLE_ROWS`` of them, always the same ones, as
    ``sampled``.
    """

    con: duckdb.DuckDBPyConnection
    view: View
    rows: int
    newest_event_us: int | None
    newest_created_ns: int | None

    def sample(self, rows: int) -> pa.Table:
        """About ``rows`` of them, spread over all, the same ones every time."""
        step = max(1, min(self.rows, SAMPLE_ROWS) // rows)
        sql = f"SELECT * EXCLUDE ({EVENT_NS}) FROM {SAMPLED} WHERE rowid % {step} = 0 LIMIT {rows}"
        return self.con.sql(sql).to_arrow_table()

    def batches(self, batch_rows: int, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """All rows but the first ``skip`` in their order, ``batch_rows`` at a time."""
        sql = f"SELECT * EXCLUDE ({EVENT_NS}) FROM {STAGED} WHERE rowid >= {skip}"
        return _rebatched(self.con.sql(sql).to_arrow_reader(batch_rows), batch_rows)


def partitions_for(rows: int) -> int:
    """Into how many passes over the source a load of ``rows`` of its rows is cut."""
    return max(1, -(-rows // PARTITION_ROWS))


def _rebatched(reader: pa.RecordBatchReader, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of exactly ``batch_rows`` rows, whatever sizes DuckDB hands out."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in reader:
        while count + batch.num_rows >= batch_rows:
            need = batch_rows - count
            held.append(batch.slice(0, need))
            batch = batch.slice(need)
            yield _joined(held)
            held, count = [], 0
        if batch.num_rows:
            held.append(batch)
            count += batch.num_rows
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)
