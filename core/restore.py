"""Keys that are not there yet: their rows go in whole, by RESTORE, which Redis refuses where a key exists.

That refusal is the comparison: a row of a new key needs no other, so nothing is watched or read first, and
Redis takes a finished hash where HSET would append field by field. The rows of keys that exist are left to
``core.write``. What it gains, and when it is not used: docs/adr/0080.

Asks the server itself whether it takes these bytes as its own. Knows no timestamps and no source.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import hiredis
import numpy as np
from numpy.typing import NDArray

from core import layout
from core.errors import LeaseLost, RedisAccessDenied, RedisReplyError, RedisUnavailable
from core.layout_dump import HASH_LISTPACK, LONGEST, dumps, storable
from core.layout_rows import EncodedRows, assemble, bulk_string, command, command_head
from core.redis_channels import Channel, ChannelPool
from core.write_commands import EXEC, MULTI, UNWATCH, Fence, created_bytes, created_times_key, slices

# Below it, asking the server first costs more than it saves.
LEAST_ROWS = 1024
# With so many of a sample of the keys there, trying each would cost more than it saves.
TAKEN_SHARE = 0.5
_SAMPLED_KEYS = 32

# Of so many rows at a time: the server allocates all commands of a transaction before it runs the first.
_TRANSACTION_ROWS = 64
_BUSY = "BUSYKEY"

# For rows with created timestamps. Answers with the rows whose keys exist; -1 if the lease is lost.
_SCRIPT = b"""
local rows, ttl, field, fence = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if fence ~= '' and redis.call('GET', KEYS[#KEYS]) ~= fence then return -1 end
local taken = {}
for row = 1, rows do
  local reply = redis.pcall('RESTORE', KEYS[row], ttl, ARGV[4 + row])
  if not reply.err then
    local side = KEYS[rows + row]
    redis.call('HSET', side, KEYS[row], ARGV[4 + rows + row] .. redis.call('HGET', KEYS[row], field))
    if ttl ~= '0' then redis.call('PEXPIRE', side, ttl) end
  elseif reply.err:find('^%-?BUSYKEY') then
    taken[#taken + 1] = row - 1
  else
    return reply
  end
end
return taken
"""


class NewKeys:
    """Finds out which batches of a project's rows are best written by RESTORE, and on what terms."""

    def __init__(self, pool: ChannelPool, project: str, key_ttl_seconds: int) -> None:
        self._pool = pool
        self._project = project
        # Milliseconds, as RESTORE takes them.
        self.ttl = b"%d" % (1000 * key_ttl_seconds)
        self._lock = threading.Lock()
        # Per hash fields the version of RDB that the server writes, None where it is not to be used.
        self._versions: dict[tuple[bytes, ...], int | None] = {}

    def take(
        self, stored_view: str, rows: EncodedRows, created_ns: Sequence[int | None] | None
    ) -> Restoration | None:
        """The batch prepared for RESTORE, or None where the server refuses it or it would not pay."""
        if len(rows) < LEAST_ROWS or not rows.cells:
            return None
        fits = storable(rows)
        if 2 * np.count_nonzero(fits) < len(rows):
            return None
        places, left = np.flatnonzero(fits), np.flatnonzero(~fits)
        if len(places) < len(rows):
            rows = rows.filter(fits)
            created_ns = None if created_ns is None else [created_ns[place] for place in places.tolist()]
        try:
            with self._pool.channel() as channel:
                version = self._rdb_version(channel, rows)
                if version is None or self._mostly_there(channel, rows):
                    return None
        except (RedisReplyError, RedisAccessDenied):
            self._refuse(rows)
            return None
        except RedisUnavailable:  # the other ways wait until it is back
            return None
        return Restoration(self, stored_view, rows, places, left.tolist(), created_ns, version)

    def _refuse(self, rows: EncodedRows) -> None:
        with self._lock:
            self._versions[_names(rows)] = None

    def _mostly_there(self, channel: Channel, rows: EncodedRows) -> bool:
        """Whether most of the keys exist, by a sample."""
        sample = np.zeros(len(rows), bool)
        sample[:: max(1, len(rows) // _SAMPLED_KEYS)] = True
        keys = rows.filter(sample).keys()
        (found,) = channel.exchange([command(b"EXISTS", *keys)], 1)
        return bool(found > TAKEN_SHARE * len(keys))

    def _rdb_version(self, channel: Channel, rows: EncodedRows) -> int | None:
        """The server's version of RDB; None if it would keep such a hash in another form than ours.

        The server writes a row of these fields, and another of the longest values, by HSET and shows its own
        bytes; ours must come out of RESTORE as the same. The probes are gone before anyone can see them.
        """
        names = _names(rows)
        with self._lock:
            if names not in self._versions:
                self._versions[names] = self._ask(channel, rows)
            return self._versions[names]

    def _ask(self, channel: Channel, rows: EncodedRows) -> int | None:
        first = np.zeros(len(rows), bool)
        first[0] = True
        row = rows.filter(first)
        probe, wide = (b"banquet:probe:" + uuid.uuid4().hex.encode() + end for end in (b"", b":wide"))
        longest = [part for name in _names(rows) for part in (name, bytes(LONGEST))]
        fields = assemble(1, *row.fields).data.tobytes()
        hset = command_head(2 + 2 * row.field_count) + bulk_string(b"HSET") + bulk_string(probe) + fields
        *_, (_, wide_dump, _, dump, _) = channel.exchange(
            [
                MULTI,
                command(b"HSET", wide, *longest),
                command(b"DUMP", wide),
                hset,
                command(b"DUMP", probe),
                command(b"DEL", wide, probe),
                EXEC,
            ],
            7,
        )
        if not wide_dump[0] == dump[0] == HASH_LISTPACK:
            return None
        version = int.from_bytes(dump[-10:-8], "little")
        ours = assemble(1, *dumps(row, version)).data.tobytes()
        restore = command_head(4) + bulk_string(b"RESTORE") + bulk_string(probe) + bulk_string(b"0") + ours
        *_, (_, restored, _) = channel.exchange(
            [
                MULTI,
                restore,
                command(b"DUMP", probe),
                command(b"DEL", probe),
                EXEC,
            ],
            5,
        )
        return version if restored == dump else None


class Restoration:
    """A batch to be written by RESTORE, slice by slice.

    Attributes:
        left: the places of the batch's rows that are not in it, to be written in another way.
    """

    def __init__(
        self,
        owner: NewKeys,
        stored_view: str,
        rows: EncodedRows,
        places: NDArray[np.int64],
        left: list[int],
        created_ns: Sequence[int | None] | None,
        rdb_version: int,
    ) -> None:
        self._owner = owner
        self._rows = rows
        self._places = places
        self.left = left
        self._field = layout.timestamp_field(stored_view)
        hashes = dumps(rows, rdb_version)
        self._created: list[bytes] | None = None
        if created_ns is None:
            head = command_head(4) + bulk_string(b"RESTORE")
            self._commands = assemble(len(rows), head, *rows.key, bulk_string(owner.ttl), *hashes)
        else:
            self._commands = assemble(len(rows), *hashes)
            self._keys = assemble(len(rows), *rows.key)
            self._created = [created_bytes(ns) for ns in created_ns]
            keys = rows.keys()
            self._sides = [created_times_key(owner._project, stored_view, key) for key in keys]

    def slices(self, limit: int) -> Iterator[range]:
        """Ranges of at most ``limit`` rows, in order."""
        return slices(self._commands.offsets, limit)

    def write(self, part: range, fence: Fence | None) -> list[int]:
        """Write a slice and return the places in the batch of the rows that another way must write.

        Those are the rows of keys that exist, or all of them once the server refuses.

        Raises:
            LeaseLost: another run holds the fence.
            RedisUnavailable: Redis is away. Writing the same rows again is safe.
        """
        try:
            with self._owner._pool.channel() as channel:
                if self._created is not None:
                    taken = self._by_script(channel, part, fence, self._created)
                elif fence is not None:
                    taken = self._in_transactions(channel, part, fence)
                else:
                    replies = channel.exchange([self._commands.between(part)], len(part), expected=_BUSY)
                    taken = _busy(replies)
        except (RedisReplyError, RedisAccessDenied):
            self._owner._refuse(self._rows)
            taken = list(range(len(part)))
        return [int(self._places[part.start + row]) for row in taken]

    def _in_transactions(self, channel: Channel, part: range, fence: Fence) -> list[int]:
        """Each transaction takes place only if nobody has touched the lease since it was seen to be held.

        The look at the lease for the next one goes out with the one before it: no further round trip.
        """
        look = command(b"WATCH", fence.key) + command(b"GET", fence.key)
        _, holder = channel.exchange([look], 2)
        taken: list[int] = []
        start = part.start
        while start < part.stop:
            if holder != fence.token:
                channel.exchange([UNWATCH], 1)
                raise LeaseLost
            some = range(start, min(start + _TRANSACTION_ROWS, part.stop))
            more = some.stop < part.stop
            commands: list[bytes | memoryview] = [MULTI, self._commands.between(some), EXEC]
            if more:
                commands.append(look)
            replies = channel.exchange(commands, len(some) + 2 + 2 * more, expected=_BUSY)
            done = replies[len(some) + 1]
            if done is not None:
                taken += [some.start - part.start + row for row in _busy(done)]
                start = some.stop
            elif not more:  # the lease was renewed, or is another's now
                replies = channel.exchange([look], 2)
            holder = replies[-1]
        return taken

    def _by_script(
        self, channel: Channel, part: range, fence: Fence | None, created: Sequence[bytes]
    ) -> list[int]:
        """The created timestamps go in beside the rows, of those alone whose keys are new."""
        keys = 2 * len(part) + (fence is not None)
        settings = [
            b"%d" % len(part),
            self._owner.ttl,
            self._field,
            b"" if fence is None else fence.token,
        ]
        call: list[bytes | memoryview] = [
            command_head(3 + keys + len(settings) + 2 * len(part)),
            *map(bulk_string, (b"EVALSHA", channel.script(_SCRIPT), b"%d" % keys)),
            self._keys.between(part),
            *map(bulk_string, self._sides[part.start : part.stop]),
        ]
        if fence is not None:
            call.append(bulk_string(fence.key))
        call += [*map(bulk_string, settings), self._commands.between(part)]
        call += map(bulk_string, created[part.start : part.stop])
        (taken,) = channel.exchange(call, 1)
        if taken == -1:
            raise LeaseLost
        return list(taken)


def _busy(replies: Sequence[Any]) -> list[int]:
    """Which keys exist, by the replies to RESTORE."""
    return [row for row, reply in enumerate(replies) if isinstance(reply, hiredis.ReplyError)]


def _names(rows: EncodedRows) -> tuple[bytes, ...]:
    return tuple(name for name, _ in rows.cells)
