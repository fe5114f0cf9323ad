"""The entity rows of a join as numbers: keys numbered from 0, times as integers since the epoch.

Knows Arrow, DuckDB's types and the as-of search; knows no source and no feature view.
"""

# ruff: noqa: S608  SQL is built from names made here
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import duckdb
import numpy as np
import pyarrow as pa

from core.as_of import Asked
from core.comparison import NANOSECOND_TYPES, epoch, not_a_time
from core.errors import EntityFrameError, InvalidSource

# What nanoseconds in 64 bits reach, in microseconds; times beyond compare as the nearest end, as in
# ``core.comparison.epoch``.
_REACH_US = 9_223_372_036_854_775


class NumberedRows:
    """The entity rows that have a time. ``key_types`` has the DuckDB type of each key column.

    Raises:
        EntityFrameError: a column is missing, or ``timestamp`` is no time.
    """

    def __init__(
        self, con: duckdb.DuckDBPyConnection, entities: pa.Table, keys: Sequence[str], timestamp: str
    ) -> None:
        for column in (*keys, timestamp):
            if column not in entities.column_names:
                raise EntityFrameError(
                    f"The entity rows have no column {column!r}.",
                    hint=f"Their columns: {', '.join(entities.column_names)}.",
                )
        self.names = {key: f"k{number}" for number, key in enumerate(keys)}
        columns = {name: entities[key] for key, name in self.names.items()}
        columns |= {"t": entities[timestamp], "row": pa.array(np.arange(entities.num_rows))}
        kind = _types(con, pa.table({"t": entities[timestamp]}))["t"]
        self._unit = "ns" if kind in NANOSECOND_TYPES else "us"
        try:
            time = epoch("t", kind, self._unit)
        except InvalidSource as exc:
            raise not_a_time(timestamp, kind) from exc
        con.register("entity_rows", pa.table(columns))
        try:
            selected = "".join(f"{name}, " for name in self.names.values())
            query = f"SELECT row, {selected}{time} AS t FROM entity_rows WHERE t IS NOT NULL"
            self._rows = con.sql(query).to_arrow_table()
        finally:
            con.unregister("entity_rows")
        types = _types(con, self._rows.slice(0, 0))
        self.key_types = {key: types[name] for key, name in self.names.items()}

    def numbered(self, keys: Sequence[str]) -> Numbered:
        """The rows whose ``keys`` (names in the entity rows) are all there, by the numbers of those."""
        rows = self._rows
        names = [self.names[key] for key in keys]
        missing = np.zeros(rows.num_rows, np.bool_)
        for name in names:
            if rows[name].null_count:
                missing |= np.asarray(rows[name].is_null())
        if missing.any():
            rows = rows.filter(pa.array(~missing))
        codes, count = np.zeros(rows.num_rows, np.int64), 1
        for name in names:
            own, several = _numbers(rows[name])
            codes, count = (own, several) if count == 1 else _numbers(pa.array(codes * several + own))
        first = np.zeros(count if rows.num_rows else 0, np.int64)
        first[codes[::-1]] = np.arange(rows.num_rows)[::-1]
        distinct = {name: rows[name].take(pa.array(first)) for name in names}
        distinct["code"] = pa.array(np.arange(len(first)))
        row, times = rows["row"].to_numpy(), rows["t"].to_numpy()
        return Numbered(row, codes, times, self._unit, pa.table(distinct))


class Numbered:
    """Entity rows by the numbers of their keys; ``keys`` has the distinct keys, each with its ``code``."""

    def __init__(
        self, rows: np.ndarray, codes: np.ndarray, times: np.ndarray, unit: str, keys: pa.Table
    ) -> None:
        self.keys = keys
        order = np.argsort(_roughly(codes, times, keys.num_rows))
        self._rows, self._codes, self._times = rows[order], codes[order], times[order]
        self._unit = unit

    def asked(self, unit: str) -> Asked:
        """The rows with their times in ``us`` or ``ns``, in about the order of key and time."""
        return self._in_nanoseconds if unit == "ns" else self._in_microseconds

    @cached_property
    def _in_nanoseconds(self) -> Asked:
        times = self._times
        if self._unit == "us":
            times = np.clip(times, -_REACH_US, _REACH_US) * 1000
        return Asked(self._rows, self._codes, times, times)

    @cached_property
    def _in_microseconds(self) -> Asked:
        down = up = self._times
        if self._unit == "ns":
            down, up = down // 1000, -(-up // 1000)
        return Asked(self._rows, self._codes, down, up)


def _types(con: duckdb.DuckDBPyConnection, table: pa.Table) -> dict[str, str]:
    con.register("described", table)
    try:
        return {name: kind for name, kind, *_ in con.execute("DESCRIBE described").fetchall()}
    finally:
        con.unregister("described")


def _numbers(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, int]:
    """The place of each value among the distinct ones, and how many these are; no value may be null."""
    chunked = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    if pa.types.is_dictionary(chunked.type):
        chunked = chunked.cast(chunked.type.value_type)
    # Arrow's chunks share one dictionary here.
    encoded = chunked.dictionary_encode()
    if not encoded.num_chunks:
        return np.zeros(0, np.int64), 0
    indices = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    return indices, len(encoded.chunk(0).dictionary)


def _roughly(codes: np.ndarray, times: np.ndarray, count: int) -> np.ndarray:
    """Integers in about the order of key and time: as much of the time as 63 bits hold beside the key."""
    if not len(codes):
        return codes
    # Unsigned, because two times can be further apart than a signed integer says.
    since = times.view(np.uint64) - np.uint64(int(times.min()) % (1 << 64))
    room = 63 - count.bit_length()
    cut = max(int(since.max()).bit_length() - room, 0)
    return (codes << room) | (since >> np.uint64(cut)).astype(np.int64)
