"""A consumer's place in a consumer group of a Redis Stream: delivery, acknowledgement, dead letters, lag.

Nothing that was delivered is forgotten: what this consumer or a dead one has not acknowledged is handed out
again. Why by leases: docs/adr/0071. Knows no events and no feature rows. Blocking; every method but
``renew`` is for one thread at a time, ``acknowledge`` for another one as well.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from core.errors import AlreadyRunning, InvalidRequest, LeaseLost, RedisReplyError, RedisUnavailable
from core.redis import DEFAULT_SOCKET_TIMEOUT_SECONDS, RedisAddress
from materialization.processes import has_died, this_process
from materialization.stream_events import Entry, Refusal

LEASE_SECONDS = 15.0
# A claim by two at once goes to the first: it resets how long the entry has lain idle.
CLAIM_IDLE_SECONDS = 0.5
BLOCK_SECONDS = 0.5
_PAGE = 1000

_RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
# Deleting a consumer that has pending entries would lose them.
_DISMISS = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
# Only what is still pending is moved, so an entry becomes one dead letter however often it was delivered.
_REFUSE = """
local at, moved = 3, 0
while at <= #ARGV do
  local id, count = ARGV[at], tonumber(ARGV[at + 1])
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if not pending.err and #pending == 1 then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, at + 2, at + 1 + count))
    redis.call('XACK', KEYS[1], ARGV[1], id)
    moved = moved + 1
  end
  at = at + 2 + count
end
return moved
"""
# The oldest entry that any group still needs bounds what is deleted; LIMIT keeps the newest ones.
_TRIM = """
local excess = redis.call('XLEN', KEYS[1]) - tonumber(ARGV[1])
if excess <= 0 then return 0 end
local bound, bound_ms, bound_seq = nil, nil, nil
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
  local needed = info['last-delivered-id']
  if info['pending'] > 0 then
    needed = redis.call('XPENDING', KEYS[1], info['name'])[2]
  end
  local ms, seq = needed:match('(%d+)-(%d+)')
  ms, seq = tonumber(ms), tonumber(seq)
  if not bound or ms < bound_ms or (ms == bound_ms and seq < bound_seq) then
    bound, bound_ms, bound_seq = needed, ms, seq
  end
end
if not bound then return 0 end
return redis.call('XTRIM', KEYS[1], 'MINID', '~', bound, 'LIMIT', excess)
"""


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a group is behind.

    ``undelivered`` entries wait to be read (None where Redis cannot tell, after entries were deleted),
    ``pending`` ones are read and not acknowledged; ``seconds`` is how long the oldest undelivered one has
    waited.
    """

    undelivered: int | None
    pending: int
    seconds: float


class StreamGroup:
    """One consumer of one group of one stream."""

    def __init__(
        self,
        address: RedisAddress,
        stream: str,
        group: str,
        consumer: str | None = None,
        *,
        dead_stream: str | None = None,
        dead_length: int = 1_000_000,
    ) -> None:
        """``consumer`` defaults to a name of this process; ``dead_length`` is how many dead letters stay."""
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.stream, self.group = stream, group
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}"
        self.dead_stream = dead_stream or dead_letters(stream)
        if address.kind == "cluster" and _slot(self.dead_stream) != _slot(stream):
            raise InvalidRequest(
                f"The streams {stream!r} and {self.dead_stream!r} are in different slots of the cluster.",
                hint=f"Name the stream of dead letters {dead_letters(stream)!r}.",
            )
        self._dead_length = dead_length
        self._address = address
        self._token = json.dumps({**this_process(), "id": uuid.uuid4().hex})
        timeout = float(address.options.get("socket_timeout") or DEFAULT_SOCKET_TIMEOUT_SECONDS)
        self._block_ms = int(1000 * min(BLOCK_SECONDS, timeout / 2))
        # A read that is sent again delivers other entries, and those of the first answer are forgotten:
        # after a failure the caller reads its own pending ones.
        self._client: Any = address.client(retry=Retry(NoBackoff(), 0))

    def join(self) -> None:
        """Make stream and group where there are none, and take the consumer's name.

        Raises:
            AlreadyRunning: a live consumer has that name.
        """
        with self._address.translated():
            self._create()
            name = self._lease(self.consumer)
            milliseconds = int(LEASE_SECONDS * 1000)
            while not self._client.set(name, self._token, nx=True, px=milliseconds):
                holder = self._client.get(name)
                if holder is not None and not has_died(json.loads(holder)):
                    raise AlreadyRunning(
                        f"Another consumer of group {self.group!r} is named {self.consumer!r}.",
                        hint="Name each one differently, or leave out --consumer. The name of one that "
                        f"crashed is free after {LEASE_SECONDS:.0f} s.",
                    )
                if holder is not None:
                    self._client.eval(_RELEASE, 1, name, holder)

    def renew(self) -> None:
        """Show that this consumer lives; due every third of ``LEASE_SECONDS``. Thread-safe.

        Raises:
            LeaseLost: another consumer has taken the name.
        """
        with self._address.translated():
            name, milliseconds = self._lease(self.consumer), int(LEASE_SECONDS * 1000)
            if not self._client.eval(_RENEW, 1, name, self._token, milliseconds):
                raise LeaseLost(
                    f"Another consumer of group {self.group!r} has taken the name {self.consumer!r}.",
                    hint="Name each consumer differently.",
                )

    def leave(self) -> None:
        """Give the name back, and the place in the group if nothing is pending."""
        with suppress(RedisReplyError), self._address.translated():
            self._client.eval(_DISMISS, 1, self.stream, self.group, self.consumer)
        with self._address.translated():
            self._client.eval(_RELEASE, 1, self._lease(self.consumer), self._token)

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()

    def read(self, count: int) -> list[Entry]:
        """New entries, as soon as there is one; none after ``BLOCK_SECONDS`` without."""
        return self._read(">", count, block=self._block_ms)

    def own_pending(self, after: bytes, count: int) -> list[Entry]:
        """Entries after that id which this consumer was given and has not acknowledged.

        One that was deleted from the stream in the meantime has no fields.
        """
        return self._read(after, count)

    def _read(self, after: str | bytes, count: int, **options: Any) -> list[Entry]:
        try:
            with self._address.translated():
                found = self._client.xreadgroup(
                    self.group, self.consumer, {self.stream: after}, count=count, **options
                )
        except RedisReplyError as exc:
            if not exc.details.get("reply", "").startswith("NOGROUP"):
                raise
            # Redis lost its data, or somebody deleted the group. What is there now is read from the start.
            with self._address.translated():
                self._create()
            return []
        if not found:
            return []
        # RESP3 answers with a map of pages, RESP2 with pairs.
        entries = next(iter(found.values()))[0] if isinstance(found, dict) else found[0][1]
        return [Entry(name, fields) for name, fields in entries]

    def _create(self) -> None:
        from redis.exceptions import ResponseError

        try:
            self._client.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except ResponseError as exc:
            if "BUSYGROUP" not in str(exc) and getattr(exc, "status_code", None) != "BUSYGROUP":
                raise

    def claim_abandoned(self, count: int) -> list[Entry]:
        """Take over entries of consumers that are gone; the caller asks again while there are some."""
        claimed: list[Entry] = []
        with self._address.translated():
            for other in self._client.xinfo_consumers(self.stream, self.group):
                name = other["name"].decode()
                if name == self.consumer:
                    continue
                lease = self._lease(name)
                holder = self._client.get(lease)
                if holder is not None and not has_died(json.loads(holder)):
                    continue
                # Without a lease it has been silent for as long, or is no consumer of ours.
                idle = int(1000 * (LEASE_SECONDS if holder is None else CLAIM_IDLE_SECONDS))
                if other["pending"]:
                    ids = self._pending_ids(name, idle, count)
                    if ids:
                        found = self._client.xclaim(self.stream, self.group, self.consumer, idle, ids)
                        claimed += [Entry(id_, fields) for id_, fields in found if id_ is not None]
                elif other["idle"] > idle:
                    self._client.eval(_DISMISS, 1, self.stream, self.group, name)
                    if holder is not None:
                        self._client.eval(_RELEASE, 1, lease, holder)
        return claimed

    def _pending_ids(self, consumer: str, idle_ms: int, count: int) -> list[bytes]:
        found = self._client.xpending_range(
            self.stream, self.group, "-", "+", count, consumername=consumer, idle=idle_ms
        )
        return [entry["message_id"] for entry in found]

    def acknowledge(self, ids: Sequence[bytes]) -> None:
        """These entries are done with. Thread-safe."""
        with self._address.translated():
            for start in range(0, len(ids), _PAGE):
                self._client.xack(self.stream, self.group, *ids[start : start + _PAGE])

    def refuse(self, refusals: Sequence[Refusal]) -> int:
        """Move entries to the stream of dead letters with the reason; how many became dead letters."""
        moved = 0
        with self._address.translated():
            for start in range(0, len(refusals), 100):
                arguments: list[bytes | str | int] = [self.group, self._dead_length]
                for refusal in refusals[start : start + 100]:
                    letter = _letter(refusal)
                    arguments += [refusal.entry.id, len(letter), *letter]
                moved += self._client.eval(_REFUSE, 2, self.stream, self.dead_stream, *arguments)
        return moved

    def trim(self, length: int) -> int:
        """Delete entries that every group has acknowledged, oldest first, while there are more than
        ``length``; how many were deleted. Redis deletes by nodes of about 100.
        """
        with self._address.translated():
            return int(self._client.eval(_TRIM, 1, self.stream, length))

    def lag(self) -> Lag:
        """How far the group is behind, by the clock of this machine."""
        with self._address.translated():
            for info in self._client.xinfo_groups(self.stream):
                if info["name"].decode() == self.group:
                    after = b"(" + info["last-delivered-id"]
                    oldest = self._client.xrange(self.stream, after, "+", count=1)
                    undelivered, seconds = info.get("lag"), 0.0
                    if oldest:
                        seconds = max(0.0, time.time() - int(oldest[0][0].split(b"-")[0]) / 1000)
                    else:
                        undelivered = 0
                    return Lag(undelivered, info["pending"], seconds)
        raise RedisUnavailable(f"Redis has lost group {self.group!r} of stream {self.stream!r}.")

    def _lease(self, consumer: str) -> str:
        return f"banquet:stream:{{{self.stream}}}:{self.group}:{consumer}"


def default_stream(project: str) -> str:
    """The stream that a project's events are read from unless another one is named."""
    return f"banquet:events:{project}"


def dead_letters(stream: str) -> str:
    """The stream of dead letters of a stream, in the same slot of a cluster."""
    return f"{stream}:dead" if "{" in stream else f"{{{stream}}}:dead"


def _letter(refusal: Refusal) -> list[bytes | str]:
    """The entry's own fields, then why it is here; an entry with very many fields is cut."""
    letter: list[bytes | str] = []
    for name, value in list(refusal.entry.fields.items())[:100]:
        letter += [name, value]
    error = refusal.error
    letter += ["entry_id", refusal.entry.id, "code", error.code, "reason", error.message]
    if error.hint:
        letter += ["hint", error.hint]
    for detail in ("field", "row", "view"):
        if error.details.get(detail) is not None:
            letter += [detail, str(error.details[detail])]
    return letter


def _slot(key: str) -> int:
    from redis.crc import key_slot

    return int(key_slot(key.encode()))
