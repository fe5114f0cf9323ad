"""The sole online write: encoded rows into Redis hashes, where a row loses only to a newer one.

Materialization, push and stream all write through ``OnlineWriter``. "Newer" compares event timestamps and,
where the caller gives them, created timestamps between equal ones; the comparison and the write are one
atomic step against every other writer, Feast's own included. How, and what it costs: docs/adr/0050.

Knows Redis and, through ``core.layout``, Feast's bytes; knows no source and no schedule.
"""

from __future__ import annotations

import itertools
import time
from binascii import crc_hqx
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core import layout
from core.errors import BanquetError, LeaseLost, RedisUnavailable
from core.layout_columns import Piece
from core.layout_rows import Commands, EncodedRows, RowEncoder, assemble, bulk_string, command_head
from core.redis import RedisAddress
from core.redis_channels import ChannelPool
from core.repository import View
from core.types import Dtype, Field

# A transaction of a slice holds up other clients of Redis for about a millisecond.
SLICE_ROWS = 256
SLICE_BYTES = 1 << 20
CONNECTIONS = 3
_SLOTS = 16384
OPTIMISTIC_ATTEMPTS = 3
# Below it, preparing the columns costs more than it saves.
BULK_ROWS = 64
RETRY_DELAYS_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0)

_ARROW = {
    Dtype.INT64: pa.int64(),
    Dtype.INT32: pa.int32(),
    Dtype.DOUBLE: pa.float64(),
    Dtype.FLOAT: pa.float32(),
    Dtype.STRING: pa.string(),
    Dtype.BOOL: pa.bool_(),
}

_SCRIPT = b"""
local function timestamp(bytes)
  local parts = {0, 0}
  local i, n = 1, #bytes
  while i <= n do
    local slot = bytes:byte(i) == 8 and 1 or 2
    local low, high, shift, at = 0, 0, 1, 0
    repeat
      i = i + 1
      local b = bytes:byte(i)
      if at < 5 then low = low + (b % 128) * shift else high = high + (b % 128) * shift end
      at = at + 1
      shift = at == 5 and 1 or shift * 128
    until b < 128
    if high >= 268435456 then high = high - 536870912 end
    parts[slot] = high * 34359738368 + low
    i = i + 1
  end
  return parts[1], parts[2]
end
local rows, width, field = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local ttl, dated, fence = tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6]
if fence ~= '' and redis.call('GET', KEYS[#KEYS]) ~= fence then return -1 end
local at, written = 7, 0
for row = 1, rows do
  local key, side, created = KEYS[row], nil, nil
  if dated then side, created, at = KEYS[rows + row], ARGV[at], at + 1 end
  local new, old = ARGV[at + 1], redis.call('HGET', key, field)
  local newer = true
  if old == new then
    local known = dated and redis.call('HGET', side, key)
    newer = not (known and known:sub(21) == old and created < known:sub(1, 20))
  elseif old then
    local s0, n0 = timestamp(old)
    local s1, n1 = timestamp(new)
    newer = s1 > s0 or (s1 == s0 and n1 > n0)
  end
  if newer then
    for first = at, at + width - 1, 4000 do
      redis.call('HSET', key, unpack(ARGV, first, math.min(first + 3999, at + width - 1)))
    end
    if dated then redis.call('HSET', side, key, created .. new) end
    if ttl > 0 then
      redis.call('EXPIRE', key, ttl)
      if dated then redis.call('EXPIRE', side, ttl) end
    end
    written = written + 1
  end
  at = at + width
end
return written
"""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """How many rows were written, and how many were left because Redis holds a newer one."""

    written: int = 0
    older: int = 0

    def __add__(self, other: WriteResult) -> WriteResult:
        return WriteResult(self.written + other.written, self.older + other.older)


@dataclass(frozen=True, slots=True)
class Fence:
    """A lease that must still be held when rows are written: ``key`` must hold ``token``."""

    key: bytes
    token: bytes


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
    cells += [[layout.encode_value(v, f.dtype) for v in columns[f.name]] for f in view.features]
    heads = [bulk_string(name) for name in names]
    fields = [
        b"".join(part for head, cell in zip(heads, row, strict=True) for part in (head, bulk_string(cell)))
        for row in zip(*cells, strict=True)
    ]
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


class _Batch:
    """Encoded rows as the commands that write them; slices of it are written one by one."""

    def __init__(
        self,
        writer: OnlineWriter,
        stored_view: str,
        rows: EncodedRows,
        created_ns: Sequence[int | None] | None,
    ) -> None:
        self.event_ns = rows.event_ns
        self.created_ns = created_ns
        self.field_count = rows.field_count
        self.stored_view = stored_view
        self.timestamp_field = layout.timestamp_field(stored_view)
        self._rows = rows
        self.names = assemble(len(rows), *rows.key)
        look = command_head(3) + bulk_string(b"HGET")
        self.lookups = assemble(len(rows), look, *rows.key, bulk_string(self.timestamp_field))
        head = command_head(2 + 2 * rows.field_count) + bulk_string(b"HSET")
        expire: tuple[Piece, ...] = ()
        self._tail = 0
        if writer.key_ttl_seconds:
            start = command_head(3) + bulk_string(b"EXPIRE")
            seconds = bulk_string(b"%d" % writer.key_ttl_seconds)
            expire = (start, *rows.key, seconds)
            self._tail = len(start) + len(seconds)
        self.writes = assemble(len(rows), head, *rows.key, *rows.fields, *expire)
        self._head = len(head)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def keys(self) -> list[bytes]:
        """The Redis keys."""
        return self._rows.keys()

    def slices(self, limit: int) -> Iterator[range]:
        """Ranges of at most ``limit`` rows and about ``SLICE_BYTES``, in order."""
        start, offsets = 0, self.writes.offsets
        while start < len(self):
            stop = min(start + limit, len(self))
            while stop - start > 1 and offsets[stop] - offsets[start] > SLICE_BYTES:
                stop = start + (stop - start) // 2
            yield range(start, stop)
            start = stop

    def fields(self, row: int) -> memoryview:
        """The row's hash fields and their values as bulk strings, the timestamp first."""
        name = int(self.names.offsets[row + 1] - self.names.offsets[row])
        start = int(self.writes.offsets[row]) + self._head + name
        stop = int(self.writes.offsets[row + 1]) - (self._tail + name if self._tail else 0)
        return memoryview(self.writes.data)[start:stop]  # type: ignore[arg-type]


class OnlineWriter:
    """Writes encoded rows of one project. Blocking and thread-safe; close it, or use it in a ``with`` block.

    ``key_ttl_seconds`` is Feast's setting of that name: a written key expires that long after its last
    write. ``unchecked`` is its ``skip_dedup``: the later write wins, whatever the timestamps. Otherwise bulk
    writes of distinct keys go through optimistic transactions, all else through a script on the server.
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
        batch = _Batch(self, stored_view, rows, created_ns)
        limit = SLICE_ROWS
        if self._address.kind == "cluster":
            apply, limit = self._write_to_cluster, 16 * SLICE_ROWS
        elif self._unchecked:
            apply = self._write_unchecked
        elif distinct and created_ns is None:
            apply = partial(self._write_optimistically, fence=fence)
        else:
            apply = partial(self._write_by_script, fence=fence)
        return PendingWrite(
            [self._executor.submit(self._persist, apply, batch, part) for part in batch.slices(limit)]
        )

    def _persist(
        self, apply: Callable[[_Batch, range], WriteResult], batch: _Batch, part: range
    ) -> WriteResult:
        """Apply, and again after a pause while Redis is away: a failover is not a failed run."""
        for delay in RETRY_DELAYS_SECONDS:
            try:
                return apply(batch, part)
            except RedisUnavailable as exc:
                if not exc.retryable:
                    raise
                time.sleep(delay)
        return apply(batch, part)

    def _write_unchecked(self, batch: _Batch, part: range) -> WriteResult:
        with self._pool.channel() as channel:
            commands = len(part) * (2 if self.key_ttl_seconds else 1)
            channel.exchange([_between(batch.writes, part)], commands)
        return WriteResult(len(part))

    def _write_optimistically(self, batch: _Batch, part: range, fence: Fence | None) -> WriteResult:
        """Watch the keys, read their timestamps, write the newer rows in a transaction.

        Redis discards the transaction if anyone has touched a watched key since, so the comparison still
        holds when the rows are written.
        """
        keys = _between(batch.names, part)
        look: list[bytes | memoryview] = [command_head(1 + len(part)), bulk_string(b"WATCH"), keys]
        if fence is not None:
            name = bulk_string(fence.key)
            look = [command_head(2 + len(part)), bulk_string(b"WATCH"), keys, name]
            look += [command_head(2), bulk_string(b"GET"), name]
        look.append(_between(batch.lookups, part))
        for _ in range(OPTIMISTIC_ATTEMPTS):
            with self._pool.channel() as channel:
                replies = channel.exchange(look, 1 + (fence is not None) + len(part))
                if fence is not None and replies[1] != fence.token:
                    channel.exchange([_UNWATCH], 1)
                    raise LeaseLost
                kept = _not_older(batch.event_ns[part.start : part.stop], replies[-len(part) :])
                if not kept:
                    channel.exchange([_UNWATCH], 1)
                    return WriteResult(older=len(part))
                if len(kept) == len(part):
                    writes = [_between(batch.writes, part)]
                else:
                    rows = (part.start + row for row in kept)
                    writes = [_between(batch.writes, range(row, row + 1)) for row in rows]
                commands = len(kept) * (2 if self.key_ttl_seconds else 1)
                replies = channel.exchange([_MULTI, *writes, _EXEC], 2 + commands)
            if replies[-1] is not None:
                return WriteResult(len(kept), len(part) - len(kept))
        # Somebody writes these keys all the time: let the server compare and write in one go.
        return self._write_by_script(batch, part, fence)

    def _write_by_script(self, batch: _Batch, part: range, fence: Fence | None) -> WriteResult:
        with self._pool.channel() as channel:
            call = self._script_call(batch, part, channel.script(_SCRIPT), fence)
            (written,) = channel.exchange([call], 1)
        if written < 0:
            raise LeaseLost
        return WriteResult(written, len(part) - written)

    def _write_to_cluster(self, batch: _Batch, part: range) -> WriteResult:
        """The script once per hash slot, pipelined to the node that owns the slot."""
        slots: dict[int, list[int]] = {}
        for row in part:
            slots.setdefault(_slot(batch.keys[row]), []).append(row)
        nodes: dict[str, list[list[int]]] = {}
        for slot, rows in slots.items():
            nodes.setdefault(self._pool.node_of(slot), []).append(rows)
        written = 0
        for node, groups in nodes.items():
            with self._pool.channel(node) as channel:
                sha = channel.script(_SCRIPT)
                calls = [self._script_call(batch, rows, sha, None) for rows in groups]
                written += sum(channel.exchange(calls, len(calls)))
        return WriteResult(written, len(part) - written)

    def _script_call(self, batch: _Batch, part: Sequence[int], sha: bytes, fence: Fence | None) -> bytes:
        dated = batch.created_ns is not None
        names: list[bytes | memoryview] = [_between(batch.names, range(row, row + 1)) for row in part]
        if dated:
            names += [
                bulk_string(created_times_key(self.project, batch.stored_view, batch.keys[row]))
                for row in part
            ]
        if fence is not None:
            names.append(bulk_string(fence.key))
        token = b"" if fence is None else fence.token
        settings = [b"%d" % len(part), b"%d" % (2 * batch.field_count), batch.timestamp_field]
        settings += [b"%d" % self.key_ttl_seconds, b"%d" % dated, token]
        arguments = 3 + len(names) + len(settings) + len(part) * (2 * batch.field_count + dated)
        call: list[bytes | memoryview] = [command_head(arguments), bulk_string(b"EVALSHA"), bulk_string(sha)]
        call += [bulk_string(b"%d" % len(names)), *names, *map(bulk_string, settings)]
        for row in part:
            if batch.created_ns is not None:
                created = batch.created_ns[row]
                call.append(bulk_string(b"%020d" % (0 if created is None else created + (1 << 63))))
            call.append(batch.fields(row))
        return b"".join(call)


class PendingWrite:
    """A write under way."""

    def __init__(self, slices: Sequence[Future[WriteResult]]) -> None:
        self._slices = slices

    def result(self) -> WriteResult:
        """Wait for the end.

        Raises:
            LeaseLost: another run holds the fence.
            RedisUnavailable: Redis stayed away. Writing the same rows again is safe.
            RedisReplyError: Redis refused a command.

        ``details["rows_written"]`` of an error says how many rows were written all the same.
        """
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
        begun = [future for future in self._slices if not future.cancel()]
        wait(begun)
        return begun


def created_times_key(project: str, stored_view: str, key: bytes) -> bytes:
    """The hash that keeps the created timestamp of the row at ``key``, in the same cluster slot as it.

    Feast's layout has no place for it. Only rows written with created timestamps have one: those of views
    that take pushes. A field is an entity key; its value is 20 digits of created time, then the bytes of the
    event timestamp it belongs to.
    """
    name = f"banquet:created:{project}:{stored_view}:".encode()
    return name + b"{%d}" % _slot_tags()[_slot(key)]


def _slot(key: bytes) -> int:
    from redis.crc import key_slot

    return int(key_slot(key))


@cache
def _slot_tags() -> Mapping[int, int]:
    """Per hash slot the least number whose digits lie in it: the same in every process."""
    tags: dict[int, int] = {}
    for number in itertools.count():
        tags.setdefault(crc_hqx(b"%d" % number, 0) % _SLOTS, number)
        if len(tags) == _SLOTS:
            return tags
    raise AssertionError("unreachable")


def _not_older(event_ns: NDArray[np.int64], stored: Sequence[bytes | None]) -> Sequence[int]:
    """The indexes whose event timestamp is at least the stored one."""
    if not any(cell is not None for cell in stored):
        return range(len(stored))
    previous = layout.decode_timestamps(stored)
    new = event_ns.tolist()
    return [row for row, old in enumerate(previous) if old is None or new[row] >= old]


def _between(commands: Commands, part: range) -> memoryview:
    """The bytes of some commands in a row."""
    start, stop = commands.offsets[part.start], commands.offsets[part.stop]
    return memoryview(commands.data)[start:stop]  # type: ignore[arg-type]


_MULTI = command_head(1) + bulk_string(b"MULTI")
_EXEC = command_head(1) + bulk_string(b"EXEC")
_UNWATCH = command_head(1) + bulk_string(b"UNWATCH")
