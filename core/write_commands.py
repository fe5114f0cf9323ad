"""Encoded rows as the commands that compare them with what is stored, and write them.

``core.write`` writes the slices of a batch in the way it chooses. Here too are the hashes that keep created
timestamps, and the lease that a write may have to hold. Knows no connection.
"""

from __future__ import annotations

import itertools
from binascii import crc_hqx
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from core import layout
from core.layout_columns import Piece
from core.layout_rows import Commands, EncodedRows, assemble, bulk_string, command, command_head

SLICE_BYTES = 1 << 20
_SLOTS = 16384
CREATED_DIGITS = 20
MULTI, EXEC, UNWATCH = command(b"MULTI"), command(b"EXEC"), command(b"UNWATCH")

# Answers with the number of rows written; -1 if the lease is lost.
COMPARE_AND_WRITE = b"""
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
class Fence:
    """A lease that must still be held when rows are written: ``key`` must hold ``token``."""

    key: bytes
    token: bytes


class Batch:
    """Encoded rows as the commands that compare and write them; slices of it are written one by one."""

    def __init__(
        self,
        project: str,
        stored_view: str,
        rows: EncodedRows,
        created_ns: Sequence[int | None] | None = None,
        *,
        key_ttl_seconds: int = 0,
    ) -> None:
        self._project = project
        self._stored_view = stored_view
        self._key_ttl_seconds = key_ttl_seconds
        self.event_ns = rows.event_ns
        self._created_ns = created_ns
        self._timestamp_field = layout.timestamp_field(stored_view)
        self._rows = rows
        self.names = assemble(len(rows), *rows.key)
        head = command_head(2 + 2 * rows.field_count) + bulk_string(b"HSET")
        expire: tuple[Piece, ...] = ()
        self._tail = 0
        if key_ttl_seconds:
            start = command_head(3) + bulk_string(b"EXPIRE")
            seconds = bulk_string(b"%d" % key_ttl_seconds)
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

    @cached_property
    def lookups(self) -> Commands:
        """What reads the rows' stored timestamps."""
        look = command_head(3) + bulk_string(b"HGET")
        return assemble(len(self), look, *self._rows.key, bulk_string(self._timestamp_field))

    def slices(self, limit: int) -> Iterator[range]:
        """Ranges of at most ``limit`` rows and about ``SLICE_BYTES``, in order."""
        return slices(self.writes.offsets, limit)

    def _fields(self, row: int) -> memoryview:
        """The row's hash fields and their values as bulk strings, the timestamp first."""
        name = int(self.names.offsets[row + 1] - self.names.offsets[row])
        start = int(self.writes.offsets[row]) + self._head + name
        stop = int(self.writes.offsets[row + 1]) - (self._tail + name if self._tail else 0)
        return memoryview(self.writes.data)[start:stop]  # type: ignore[arg-type]

    def script_call(self, part: Sequence[int], sha: bytes, fence: Fence | None) -> bytes:
        """The call of ``COMPARE_AND_WRITE`` for some of the rows."""
        dated = self._created_ns is not None
        names: list[bytes | memoryview] = [self.names.between(range(row, row + 1)) for row in part]
        if dated:
            names += [
                bulk_string(created_times_key(self._project, self._stored_view, self.keys[row]))
                for row in part
            ]
        if fence is not None:
            names.append(bulk_string(fence.key))
        token = b"" if fence is None else fence.token
        settings = [b"%d" % len(part), b"%d" % (2 * self._rows.field_count), self._timestamp_field]
        settings += [b"%d" % self._key_ttl_seconds, b"%d" % dated, token]
        arguments = 3 + len(names) + len(settings) + len(part) * (2 * self._rows.field_count + dated)
        call: list[bytes | memoryview] = [command_head(arguments), bulk_string(b"EVALSHA"), bulk_string(sha)]
        call += [bulk_string(b"%d" % len(names)), *names, *map(bulk_string, settings)]
        for row in part:
            if self._created_ns is not None:
                created = self._created_ns[row]
                call.append(bulk_string(created_bytes(created)))
            call.append(self._fields(row))
        return b"".join(call)


def slices(offsets: NDArray[np.int64], limit: int) -> Iterator[range]:
    """Ranges of at most ``limit`` commands and about ``SLICE_BYTES``, in order."""
    start, end = 0, len(offsets) - 1
    while start < end:
        stop = min(start + limit, end)
        while stop - start > 1 and offsets[stop] - offsets[start] > SLICE_BYTES:
            stop = start + (stop - start) // 2
        yield range(start, stop)
        start = stop


def created_bytes(created_ns: int | None) -> bytes:
    """A created timestamp as ``CREATED_DIGITS`` digits that sort as it does; none comes before all."""
    return b"%0*d" % (CREATED_DIGITS, 0 if created_ns is None else created_ns + (1 << 63))


def created_times_key(project: str, stored_view: str, key: bytes) -> bytes:
    """The hash that keeps the created timestamp of the row at ``key``, in the same cluster slot as it.

    Feast's layout has no place for it. Only rows written with created timestamps have one: those of views
    that take pushes. A field is an entity key; its value is 20 digits of created time, then the bytes of the
    event timestamp it belongs to.
    """
    name = f"banquet:created:{project}:{stored_view}:".encode()
    return name + b"{%d}" % _slot_tags()[key_slot(key)]


def key_slot(key: bytes) -> int:
    from redis.crc import key_slot as slot

    return int(slot(key))


@cache
def _slot_tags() -> Mapping[int, int]:
    """Per hash slot the least number whose digits lie in it: the same in every process."""
    tags: dict[int, int] = {}
    for number in itertools.count():
        tags.setdefault(crc_hqx(b"%d" % number, 0) % _SLOTS, number)
        if len(tags) == _SLOTS:
            return tags
    raise AssertionError("unreachable")
