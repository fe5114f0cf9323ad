"""The server's way to Redis: hashes read in one round trip, everybody's over one connection.

Keeps a link to a server, or to the master that Sentinels name, and replaces it when it is lost.
Knows no Feast: keys and fields are bytes made by ``core.layout``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import hiredis

from core.errors import BanquetError, Overloaded, RedisAccessDenied, RedisUnavailable
from core.redis import RedisAddress
from core.redis_link import Dialler, Link, lacks_permission

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_SECONDS = 1.0
DEFAULT_MAX_IN_FLIGHT = 65_536
PIPELINE_KEYS = 1_024
"""Keys asked for at once; a longer read is cut, so that others get their turn between the pieces."""
PIPELINES_AHEAD = 4
"""Pieces of one read that wait for their replies at the same time."""
FIRST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 0.4
"""Pauses between attempts to connect double from the first to the longest, less up to half as jitter."""
MASTER_CHECK_SECONDS = 1.0
"""How often the Sentinels are asked whether the master is still the one connected to."""

Hashes = list[list[bytes | None]]
"""Per key, per field, the value or None."""


class HashFields:
    """Which fields to read of a hash: the constant bytes of an HMGET around its key."""

    __slots__ = ("_frames", "_head", "_tail", "fields")

    def __init__(self, fields: Sequence[bytes]) -> None:
        if not fields:
            raise ValueError("an HMGET names at least one field")
        self.fields = tuple(fields)
        self._head = b"*%d\r\n$5\r\nHMGET\r\n$" % (2 + len(self.fields))
        self._tail = b"\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(field), field) for field in self.fields)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def request(self, keys: Sequence[bytes]) -> bytes:
        """The pipeline that asks for these fields of each key, as RESP."""
        if len(keys) == 1:
            start, _ = self._frame(len(keys[0]))
            return start + keys[0] + self._tail
        lengths = set(map(len, keys))
        if len(lengths) == 1:
            start, between = self._frame(lengths.pop())
            return b"".join((start, between.join(keys), self._tail))
        parts: list[bytes] = []
        for key in keys:
            parts += (self._frame(len(key))[0], key, self._tail)
        return b"".join(parts)

    def _frame(self, length: int) -> tuple[bytes, bytes]:
        """What stands before a key of that length: at the start, and after another key."""
        frame = self._frames.get(length)
        if frame is None:
            start = b"%s%d\r\n" % (self._head, length)
            frame = start, self._tail + start
            if len(self._frames) < 256:
                self._frames[length] = frame
        return frame


class HashReader(Protocol):
    """What the online read needs of Redis; made by ``open_connection``.

    Every method raises ``RedisUnavailable`` while Redis is away, ``RedisReplyError`` where it refuses the
    command and ``Overloaded`` when too much is in flight.
    """

    @property
    def ready(self) -> bool:
        """Whether the last that was heard of Redis was good."""

    @property
    def in_flight(self) -> int:
        """Commands sent and not answered yet."""

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced."""

    async def connect(self) -> None:
        """Make the first attempt; raises what it failed with, and keeps trying in the background."""

    async def close(self) -> None:
        """Fail what is in flight and leave no task behind."""

    async def ping(self) -> None:
        """One round trip."""

    async def read_hashes(self, reads: Sequence[tuple[HashFields, Sequence[bytes]]]) -> list[Hashes]:
        """Per read, per key, per field: the value or None. One round trip up to ``PIPELINE_KEYS`` keys."""

    async def command(self, *arguments: bytes | str | int) -> Any:
        """Any other single command, and its reply."""


def open_connection(
    address: RedisAddress,
    *,
    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
    max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
) -> HashReader:
    """A reader for the address, not connected yet: to every master of a cluster, else to one server.

    ``timeout_seconds`` holds for connecting and for a command where the connection string says nothing.
    Raises ``InvalidRepository`` for an option of the connection string that cannot be honoured.
    """
    if address.kind == "cluster":
        from core.redis_cluster import ClusterConnection

        return ClusterConnection(address, timeout_seconds=timeout_seconds, max_in_flight=max_in_flight)
    return RedisConnection(address, timeout_seconds=timeout_seconds, max_in_flight=max_in_flight)


class RedisConnection:
    """One connection to a server, or to the master that Sentinels name; shared by all callers on a loop.

    After ``timeout_seconds`` without a reply to the oldest request the connection counts as broken: its
    callers get ``RedisUnavailable``, and a background task connects anew. While Redis is away callers fail
    at once.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
    ) -> None:
        self.address = address
        self.reconnects = 0
        self._max_in_flight = max_in_flight
        for_sentinels = address.options.get("sentinel_kwargs")
        if for_sentinels is None:  # as redis-py has it: the password is the master's alone
            for_sentinels = {k: v for k, v in address.options.items() if k.startswith("socket_")}
        self._server = Dialler.of(address, address.options, timeout_seconds)
        self._sentinel = Dialler.of(address, for_sentinels, timeout_seconds)
        self._master: tuple[int, str, int] = (-1, "", 0)
        self._link: Link | None = None
        self._reason: BanquetError = address.unavailable("not connected yet")
        self._attempted = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is a connection."""
        return self._link is not None

    @property
    def in_flight(self) -> int:
        """Commands sent and not answered yet."""
        return self._link.in_flight if self._link else 0

    async def connect(self) -> None:
        """Wait for the first attempt; raises what it failed with, and keeps trying in the background."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"connection to {self.address}")
        await self._attempted.wait()
        if self._link is None:
            raise self._reason

    async def close(self) -> None:
        """Fail what is in flight with ``RedisUnavailable`` and leave no task behind."""
        self._reason = self.address.unavailable("the connection was closed")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def read_hashes(self, reads: Sequence[tuple[HashFields, Sequence[bytes]]]) -> list[Hashes]:
        """Per read, per key, per field: the value or None. One round trip up to ``PIPELINE_KEYS`` keys.

        Raises ``RedisUnavailable``, ``RedisReplyError`` or ``Overloaded``.
        """
        link = self._admit()
        if len(reads) == 1:
            ((fields, keys),) = reads
            if 0 < len(keys) <= PIPELINE_KEYS:
                return [await link.send(fields.request(keys), len(keys))]
        total = sum(len(keys) for _, keys in reads)
        if total > PIPELINE_KEYS:
            replies = await _read_in_pieces(link, reads)
        elif total:
            payload = b"".join([fields.request(keys) for fields, keys in reads if keys])
            replies = await link.send(payload, total)
        else:
            replies = []
        remaining = iter(replies)
        return [list(islice(remaining, len(keys))) for _, keys in reads]

    async def command(self, *arguments: bytes | str | int) -> Any:
        """Any other single command, and its reply; raises as ``read_hashes`` does."""
        (reply,) = await self.pipeline(arguments)
        return reply

    async def pipeline(self, *commands: Sequence[bytes | str | int]) -> list[Any]:
        """Some commands with nothing in between, and their replies; raises as ``read_hashes`` does."""
        payload = b"".join([hiredis.pack_command(tuple(command)) for command in commands])
        return await self._admit().send(payload, len(commands))

    async def ping(self) -> None:
        """One round trip; raises as ``read_hashes`` does."""
        try:
            await self.command(b"PING")
        except RedisAccessDenied as exc:
            if not lacks_permission(exc):
                raise

    def _admit(self) -> Link:
        link = self._link
        if link is None:
            kind = RedisAccessDenied if isinstance(self._reason, RedisAccessDenied) else RedisUnavailable
            raise kind(self._reason.message, hint=self._reason.hint)
        if link.in_flight >= self._max_in_flight:
            raise Overloaded(
                f"{link.in_flight} Redis commands are in flight; the limit is {self._max_in_flight}."
            )
        return link

    async def _keep(self) -> None:
        """Connect, wait until the connection is lost, connect again; for ever."""
        now = asyncio.get_running_loop().time
        failures = 0
        try:
            while True:
                try:
                    link = await self._open()
                except BanquetError as exc:
                    self._reason = exc
                    failures += 1
                except Exception as exc:
                    # A fault of ours; the server outlives it, and the next attempt may succeed.
                    logger.exception("connecting to Redis at %s failed unexpectedly", self.address)
                    self._reason = self.address.unavailable(repr(exc))
                    failures += 1
                else:
                    since = now()
                    self._link = link
                    if self._attempted.is_set():
                        self.reconnects += 1
                        logger.info("connected to Redis at %s again", self.address)
                    self._attempted.set()
                    await self._until_lost(link)
                    self._forget(link)  # it may have been lost before it was ours
                    logger.warning("lost a connection: %s", self._reason.message)
                    failures = failures + 1 if now() - since < LONGEST_PAUSE_SECONDS else 0
                self._attempted.set()
                if failures:
                    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 10))
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  jitter is no secret
        finally:
            self._attempted.set()
            if self._link is not None:
                self._link.drop(self._reason)

    async def _open(self) -> Link:
        if self.address.kind != "sentinel":
            return await self._server.open(self._forget)
        self._master = await self._find_master()
        _, host, port = self._master
        return await replace(self._server, host=host, port=port, must_be_master=True).open(self._forget)

    def _forget(self, link: Link) -> None:
        if link is self._link and link.reason is not None:
            self._link = None
            self._reason = link.reason

    async def _until_lost(self, link: Link) -> None:
        if self.address.kind != "sentinel":
            await asyncio.wait([link.lost])
            return
        while not (await asyncio.wait([link.lost], timeout=MASTER_CHECK_SECONDS))[0]:
            with suppress(BanquetError):  # Sentinels may be away; the master that is there still serves
                master = await self._find_master()
                if master[0] > self._master[0] and master[1:] != self._master[1:]:
                    link.drop(self.address.unavailable(f"the master is {master[1]}:{master[2]} now"))

    async def _find_master(self) -> tuple[int, str, int]:
        """(configuration epoch, host, port) of the master, from the Sentinel with the latest configuration.

        Waits for a majority of the Sentinels or for all that answer. Raises ``RedisUnavailable``.
        """
        questions = [
            asyncio.ensure_future(self._ask(replace(self._sentinel, host=host, port=port)))
            for host, port in self.address.hosts
        ]
        found: list[tuple[int, str, int]] = []
        problems: Counter[str] = Counter()
        try:
            for answer in asyncio.as_completed(questions):
                try:
                    found.append(await answer)
                except BanquetError as exc:
                    problems[exc.message] += 1
                if len(found) > len(questions) // 2:
                    break
        finally:
            for question in questions:
                question.cancel()
            await asyncio.gather(*questions, return_exceptions=True)
        if not found:
            raise self.address.unavailable("no Sentinel names the master: " + " ".join(problems))
        return max(found)

    async def _ask(self, sentinel: Dialler) -> tuple[int, str, int]:
        link = await sentinel.open()
        try:
            request = hiredis.pack_command(("SENTINEL", "MASTER", self.address.master))
            (flat,) = await link.send(request, 1)
        finally:
            link.drop(self.address.unavailable("it was asked and has answered"))
        state = dict(zip(flat[::2], flat[1::2], strict=True))
        peers = int(state[b"num-other-sentinels"])
        if peers < self.address.options.get("min_other_sentinels", 0):
            raise self.address.unavailable(f"a Sentinel sees only {peers} others")
        host = self.address.options.get("force_master_ip") or state[b"ip"].decode()
        return int(state[b"config-epoch"]), host, int(state[b"port"])


async def _read_in_pieces(
    link: Link, reads: Iterable[tuple[HashFields, Sequence[bytes]]]
) -> list[list[bytes | None]]:
    replies: list[list[bytes | None]] = []
    ahead: deque[asyncio.Future[list[Any]]] = deque()
    try:
        for fields, keys in reads:
            for start in range(0, len(keys), PIPELINE_KEYS):
                if len(ahead) == PIPELINES_AHEAD:
                    replies += await ahead.popleft()
                piece = keys[start : start + PIPELINE_KEYS]
                ahead.append(link.send(fields.request(piece), len(piece)))
        while ahead:
            replies += await ahead.popleft()
    finally:
        for pending in ahead:
            pending.add_done_callback(lambda future: future.cancelled() or future.exception())
            pending.cancel()
    return replies
