"""The sole online write: encoded rows into Redis hashes, where a row loses only to a newer one.

Materialization, push and stream all write through ``OnlineWriter``. "Newer" compares event timestamps and,
where the caller gives them, created timestamps between equal ones; the comparison and the write are one
atomic step against every other writer, Feast's own included. How, and what it costs: docs/adr/0080.

Knows Redis and, through ``core.layout``, Feast's bytes; knows no source and no schedule.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core import layout
from core.errors import BanquetError, LeaseLost, RedisUnavailable
from core.layout_rows import EncodedRows, RowEncoder, bulk_string, command, command_head
from core.redis import RedisAddress
from core.redis_channels import ChannelPool
from core.repository import View
from core.restore import NewKeys, Restoration
from core.types import Dtype, Field
from core.write_commands import (
    COMPARE_AND_WRITE,
    EXEC,
    MULTI,
    UNWATCH,
    Batch,
    Fence,
    created_times_key,
    key_slot,
)

__all__ = [
    "Fence",
    "OnlineWriter",
    "PendingWrite",
    "WriteResult",
    "created_times_key",
    "encode_rows",
]

# A transaction of a slice holds up other clients of Redis for about a millisecond.
SLICE_ROWS = 256
# WATCH looks for each key among those watched already, so its cost grows with their square.
WATCHED_ROWS = 64
CONNECTIONS = 3
OPTIMISTIC_ATTEMPTS = 3
# Below it, preparing the columns costs more than it saves.
BULK_ROWS = 128
RETRY_DELAYS_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0)

_ARROW = {
    Dtype.INT64: pa.int64(),
    Dtype.INT32: pa.int32(),
    Dtype.DOUBLE: pa.float64(),
    Dtype.FLOAT: pa.float32(),
    Dtype.STRING: pa.string(),
    Dtype.BOOL: pa.bool_(),
}


@dataclass(frozen=True, slots=True)
class WriteResult:
    """How many rows were written, and how many were left because Redis holds a newer one."""

    written: int = 0
    older: int = 0

    def __add__(self, other: WriteResult) -> WriteResult:
        return WriteResult(self.written + other.written, self.older + other.older)


def encode_rows(
    project: str, view: View, columns: Mapping[str, Sequence[Any]], event_ns: Sequence[int]
) -> EncodedRows:
    """Encode rows of Python values: pushes and events. Bulk loads use ``layout_rows.RowEncoder`` itself.

    ``columns`` holds a sequence per join key and per feature of the view. Event timestamps (nanoseconds
    since the epoch, UTC) are rounded down to microseconds, as Feast stores them.

    Raises:
        InvalidEntity: a join key's value cannot be of its type.
        InvalidFeatureValue: a feature's value cannot be of its type.
    """
    dtypes = {key.dtype for key in view.join_keys} | {feature.dtype for feature in view.features}
    if len(event_ns) >= BULK_ROWS and dtypes <= _ARROW.keys():
        return _encode_columns(project, view, columns, event_ns)
    event_ns = [ns // 1000 * 1000 for ns in event_ns]
    keys = layout.EntityKeys(project, view.join_keys).encode([columns[key.name] for key in view.join_keys])
    if not view.join_keys:
        keys *= len(event_ns)
    names = [layout.timestamp_field(view.stored_name)]
    names += [layout.feature_field(view.stored_name, feature.name) for feature in view.features]
    cells = [[layout.encode_timestamp(ns) for ns in event_ns]]
    cells += [layout.encode_column(columns[f.name], f.dtype) for f in view.features]
    parts: list[Iterable[bytes]] = []
    for name, column in zip(names, cells, strict=True):
        heads = {size: bulk_string(name) + b"$%d\r\n" % size for size in set(map(len, column))}
        parts += [[heads[len(cell)] for cell in column], column, itertools.repeat(b"\r\n", len(column))]
    fields = list(map(b"".join, zip(*parts, strict=True)))
    return EncodedRows(
        rows=len(keys),
        key=(pa.array([bulk_string(key) for key in keys], pa.large_binary()),),
        fields=(pa.array(fields, pa.large_binary()),),
        field_count=len(names),
        event_ns=np.array(event_ns, np.int64),
    )


def _encode_columns(
    project: str, view: View, columns: Mapping[str, Sequence[Any]], event_ns: Sequence[int]
) -> EncodedRows:
    """``encode_rows`` by column: the same bytes, several times faster for many rows."""
    features = [Field(feature.name, feature.dtype) for feature in view.features]
    fields = (*view.join_keys, *features)
    arrays = [pa.array(columns[field.name], _ARROW[field.dtype]) for field in fields]
    arrays.append(pa.array([ns // 1000 for ns in event_ns], pa.int64()).cast(pa.timestamp("us", tz="UTC")))
    # By number, as a feature may have any name.
    names = {field.name: str(number) for number, field in enumerate(fields)}
    batch = pa.record_batch(arrays, names=[*names.values(), "event"])
    encoder = RowEncoder(project, view.stored_name, view.join_keys, features, "event", names)
    return encoder.encode(batch)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one call of ``submit`` asks for."""

    stored_view: str
    rows: EncodedRows
    created_ns: Sequence[int | None] | None
    distinct: bool
    fence: Fence | None

    def some(self, places: Sequence[int]) -> _Plan:
        """Some of the rows, in their order."""
        keep = np.zeros(len(self.rows), bool)
        keep[places] = True
        created = self.created_ns
        if created is not None:
            created = [created[place] for place in np.flatnonzero(keep).tolist()]
        return replace(self, rows=self.rows.filter(keep), created_ns=created)


class OnlineWriter:
    """Writes encoded rows of one project. Blocking and thread-safe; close it, or use it in a ``with`` block.

    ``key_ttl_seconds`` is Feast's setting of that name: a written key expires that long after its last
    write. ``unchecked`` is its ``skip_dedup``: the later write wins, whatever the timestamps. Bulk writes
    of new keys go in by RESTORE, those of distinct keys that exist through optimistic transactions, all else
    through a script on the server.
    """

    def __init__(
        self,
        address: RedisAddress,
        project: str,
        *,
        key_ttl_seconds: int | None = None,
        unchecked: bool = False,
        connections: int = CONNECTIONS,
    ) -> None:
        self.project = project
        self._unchecked = unchecked
        self.key_ttl_seconds = key_ttl_seconds or 0
        self._address = address
        self._pool = ChannelPool(address)
        self._new_keys = NewKeys(self._pool, project, self.key_ttl_seconds)
        self._executor = ThreadPoolExecutor(connections, "banquet-write")

    def __enter__(self) -> OnlineWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connections; writes in flight end first."""
        self._executor.shutdown(cancel_futures=True)
        self._pool.close()

    def write(self, stored_view: str, rows: EncodedRows, **options: Any) -> WriteResult:
        """``submit`` and wait until Redis has confirmed every row."""
        return self.submit(stored_view, rows, **options).result()

    def submit(
        self,
        stored_view: str,
        rows: EncodedRows,
        *,
        created_ns: Sequence[int | None] | None = None,
        distinct: bool = False,
        fence: Fence | None = None,
    ) -> PendingWrite:
        """Begin to write every row that is not older than what is stored.

        Args:
            stored_view: the view's name in the online store.
            rows: the encoded rows.
            created_ns: created timestamps, nanoseconds since the epoch, that decide between equal event
                timestamps; None for a row without one. Without the argument the later write decides.
            distinct: promises that no key occurs twice, which the optimistic way needs.
            fence: a lease to hold while writing. Takes no part in a Redis Cluster.
        """
        pending = PendingWrite(self._executor)
        plan = _Plan(stored_view, rows, created_ns, distinct, fence)
        new = None
        if self._address.kind != "cluster":
            new = self._new_keys.take(stored_view, rows, created_ns)
        if new is None:
            self._compare(plan, pending)
        else:
            self._restore(plan, new, pending)
        return pending

    def _restore(self, plan: _Plan, new: Restoration, pending: PendingWrite) -> None:
        """Write the rows of new keys by RESTORE; compare those that are left, once it is known which."""
        parts = list(new.slices(SLICE_ROWS))
        left = list(new.left)
        lock = threading.Lock()
        open_parts = len(parts)

        def restore(part: range) -> WriteResult:
            nonlocal open_parts
            taken = new.write(part, plan.fence)
            with lock:
                left.extend(taken)
                open_parts -= 1
                last = open_parts == 0
            if last and left:
                self._compare(plan.some(left), pending)
            return WriteResult(len(part) - len(taken))

        pending.begin(partial(self._persist, restore), parts)

    def _compare(self, plan: _Plan, pending: PendingWrite) -> None:
        """Write the rows that are not older than what is stored."""
        batch = Batch(
            self.project,
            plan.stored_view,
            plan.rows,
            plan.created_ns,
            key_ttl_seconds=self.key_ttl_seconds,
        )
        limit = SLICE_ROWS
        if self._address.kind == "cluster":
            apply, limit = self._write_to_cluster, 16 * SLICE_ROWS
        elif self._unchecked:
            apply = self._write_unchecked
        elif plan.distinct and plan.created_ns is None:
            apply, limit = (
                partial(self._write_optimistically, fence=plan.fence),
                min(SLICE_ROWS, WATCHED_ROWS),
            )
        else:
            apply = partial(self._write_by_script, fence=plan.fence)
        pending.begin(partial(self._persist, partial(apply, batch)), batch.slices(limit))

    def _persist(self, apply: Callable[[range], WriteResult], part: range) -> WriteResult:
        """Apply, and again after a pause while Redis is away: a failover is not a failed run."""
        for delay in RETRY_DELAYS_SECONDS:
            try:
                return apply(part)
            except RedisUnavailable as exc:
                if not exc.retryable:
                    raise
                time.sleep(delay)
        return apply(part)

    def _write_unchecked(self, batch: Batch, part: range) -> WriteResult:
        with self._pool.channel() as channel:
            commands = len(part) * (2 if self.key_ttl_seconds else 1)
            channel.exchange([batch.writes.between(part)], commands)
        return WriteResult(len(part))

    def _write_optimistically(self, batch: Batch, part: range, fence: Fence | None) -> WriteResult:
        """Watch the keys, read their timestamps, write the newer rows in a transaction.

        Redis discards the transaction if anyone has touched a watched key since, so the comparison still
        holds when the rows are written.
        """
        keys = batch.names.between(part)
        look: list[bytes | memoryview] = [command_head(1 + len(part)), bulk_string(b"WATCH"), keys]
        if fence is not None:
            name = bulk_string(fence.key)
            look = [
                command_head(2 + len(part)),
                bulk_string(b"WATCH"),
                keys,
                name,
                command(b"GET", fence.key),
            ]
        look.append(batch.lookups.between(part))
        for _ in range(OPTIMISTIC_ATTEMPTS):
            with self._pool.channel() as channel:
                replies = channel.exchange(look, 1 + (fence is not None) + len(part))
                if fence is not None and replies[1] != fence.token:
                    channel.exchange([UNWATCH], 1)
                    raise LeaseLost
                kept = _not_older(batch.event_ns[part.start : part.stop], replies[-len(part) :])
                if not kept:
                    channel.exchange([UNWATCH], 1)
                    return WriteResult(older=len(part))
                if len(kept) == len(part):
                    writes = [batch.writes.between(part)]
                else:
                    rows = (part.start + row for row in kept)
                    writes = [batch.writes.between(range(row, row + 1)) for row in rows]
                commands = len(kept) * (2 if self.key_ttl_seconds else 1)
                replies = channel.exchange([MULTI, *writes, EXEC], 2 + commands)
            if replies[-1] is not None:
                return WriteResult(len(kept), len(part) - len(kept))
        # Somebody writes these keys all the time: let the server compare and write in one go.
        return self._write_by_script(batch, part, fence)

    def _write_by_script(self, batch: Batch, part: range, fence: Fence | None) -> WriteResult:
        with self._pool.channel() as channel:
            call = batch.script_call(part, channel.script(COMPARE_AND_WRITE), fence)
            (written,) = channel.exchange([call], 1)
        if written < 0:
            raise LeaseLost
        return WriteResult(written, len(part) - written)

    def _write_to_cluster(self, batch: Batch, part: range) -> WriteResult:
        """The script once per hash slot, pipelined to the node that owns the slot."""
        slots: dict[int, list[int]] = {}
        for row in part:
            slots.setdefault(key_slot(batch.keys[row]), []).append(row)
        nodes: dict[str, list[list[int]]] = {}
        for slot, rows in slots.items():
            nodes.setdefault(self._pool.node_of(slot), []).append(rows)
        written = 0
        for node, groups in nodes.items():
            with self._pool.channel(node) as channel:
                sha = channel.script(COMPARE_AND_WRITE)
                calls = [batch.script_call(rows, sha, None) for rows in groups]
                written += sum(channel.exchange(calls, len(calls)))
        return WriteResult(written, len(part) - written)


class PendingWrite:
    """A write under way, slice by slice; the end of one may begin others."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._slices: list[Future[WriteResult]] = []
        self._abandoned = False

    def begin(self, write: Callable[[range], WriteResult], parts: Iterable[range]) -> None:
        """Write some more slices, unless the write was abandoned."""
        with self._lock:
            if not self._abandoned:
                self._slices += [self._executor.submit(write, part) for part in parts]

    def result(self) -> WriteResult:
        """Wait for the end.

        Raises:
            LeaseLost: another run holds the fence.
            RedisUnavailable: Redis stayed away. Writing the same rows again is safe.
            RedisReplyError: Redis refused a command.

        ``details["rows_written"]`` of an error says how many rows were written all the same.
        """
        known = -1
        while known < len(self._slices):
            known = len(self._slices)
            wait(self._slices, return_when=FIRST_EXCEPTION)
        finished = self.abandon()
        total = sum((f.result() for f in finished if f.exception() is None), WriteResult())
        for future in finished:
            error = future.exception()
            if isinstance(error, BanquetError):
                error.details["rows_written"] = total.written
            if error is not None:
                raise error
        return total

    def abandon(self) -> list[Future[WriteResult]]:
        """Begin no further slice, wait for those under way, and return what was begun."""
        with self._lock:
            self._abandoned = True
        begun = [future for future in self._slices if not future.cancel()]
        wait(begun)
        return begun


def _not_older(event_ns: NDArray[np.int64], stored: Sequence[bytes | None]) -> Sequence[int]:
    """The indexes whose event timestamp is at least the stored one."""
    if not any(cell is not None for cell in stored):
        return range(len(stored))
    previous = layout.decode_timestamps(stored)
    new = event_ns.tolist()
    return [row for row, old in enumerate(previous) if old is None or new[row] >= old]
