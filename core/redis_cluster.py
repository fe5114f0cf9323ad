"""Hashes read from a Redis Cluster: which master holds which key, and a connection to each of them.

Knows slots, redirections and failover; what happens on one connection is ``core.redis_connection``'s.
"""

from __future__ import annotations

import asyncio
import logging
import random
from binascii import crc_hqx
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from core.errors import BanquetError, RedisReplyError, RedisUnavailable
from core.redis import RedisAddress
from core.redis_connection import PIPELINE_KEYS, Hashes, HashFields, RedisConnection

logger = logging.getLogger(__name__)

SLOTS = 16_384
REDIRECTIONS = 5
"""How many redirections the read of one key follows."""
LOOK_SECONDS = 1.0
"""How often the cluster is asked for its slots."""
ANXIOUS_LOOK_SECONDS = 0.1
"""How often it is asked while a master is away or keys are moving."""

Place = tuple[str, int]
_T = TypeVar("_T")


def slot_of(key: bytes) -> int:
    """The slot of a key: CRC16 of the key, or of what its first pair of braces holds.

    https://valkey.io/topics/cluster-spec/#hash-tags
    """
    start = key.find(b"{") + 1
    if start:
        end = key.find(b"}", start)
        if end > start:
            key = key[start:end]
    return crc_hqx(key, 0) % SLOTS


class ClusterConnection:
    """A connection to every master of a cluster; replicas are never read.

    A background task keeps the table of slots. A key that moved since is followed (MOVED, ASK). While a
    master is away the reads of its keys fail with ``RedisUnavailable``, the others go on.
    """

    def __init__(self, address: RedisAddress, *, timeout_seconds: float | None, max_in_flight: int) -> None:
        self.address = address
        self._limits: dict[str, Any] = {"timeout_seconds": timeout_seconds, "max_in_flight": max_in_flight}
        self._table: list[RedisConnection | None] = [None] * SLOTS
        self._known: list[Place] = list(address.hosts)
        self._unlisted: set[Place] = set()
        self._past_reconnects = 0
        self._reason: BanquetError = address.unavailable("not connected yet")
        self._look_again = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        # Made here so that an option which cannot be honoured is refused now, not in the background.
        self._nodes = {place: self._connection_to(place) for place in address.hosts}

    @property
    def ready(self) -> bool:
        """Whether every slot has a master that is connected."""
        return all(node is not None and node.ready for node in set(self._table))

    @property
    def in_flight(self) -> int:
        """Commands sent and not answered yet, over all masters."""
        return sum(node.in_flight for node in self._nodes.values())

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced, over all masters."""
        return self._past_reconnects + sum(node.reconnects for node in self._nodes.values())

    async def connect(self) -> None:
        """Learn the slots and connect; raises what the first attempt failed with, and keeps trying."""
        try:
            await self._look()
        finally:
            self._keeper = self._keeper or asyncio.create_task(self._keep(), name=f"slots of {self.address}")

    async def close(self) -> None:
        """Fail what is in flight and leave no task behind."""
        self._reason = self.address.unavailable("the connection was closed")
        self._table = [None] * SLOTS
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    async def ping(self) -> None:
        """One round trip to every master; raises ``RedisUnavailable`` if one does not answer."""
        masters = set(self._table)
        await _all(self._master(node).ping() for node in masters)

    async def command(self, *arguments: bytes | str | int) -> Any:
        """A command that names no key, to any master that answers."""
        for node in self._nodes.values():
            if node.ready:
                return await node.command(*arguments)
        raise self._away()

    async def read_hashes(self, reads: Sequence[tuple[HashFields, Sequence[bytes]]]) -> list[Hashes]:
        """Per read, per key, per field: the value or None. One round trip to each master concerned.

        Raises ``RedisUnavailable`` where a key's master is away, ``RedisReplyError`` or ``Overloaded``.
        """
        answers: list[list[Any]] = [[None] * len(keys) for _, keys in reads]
        shares: dict[RedisConnection, dict[int, list[int]]] = {}
        table = self._table
        for index, (_, keys) in enumerate(reads):
            for position, key in enumerate(keys):
                share = shares.setdefault(self._master(table[slot_of(key)]), {})
                share.setdefault(index, []).append(position)

        async def fetch(node: RedisConnection, share: dict[int, list[int]]) -> None:
            wanted = [(reads[i][0], [reads[i][1][p] for p in positions]) for i, positions in share.items()]
            found = await self._read_from(node, wanted)
            for (index, positions), hashes in zip(share.items(), found, strict=True):
                for position, values in zip(positions, hashes, strict=True):
                    answers[index][position] = values

        if len(shares) == 1:
            await fetch(*shares.popitem())
        else:
            await _all(fetch(node, share) for node, share in shares.items())
        return answers

    async def _read_from(
        self, node: RedisConnection, reads: list[tuple[HashFields, list[bytes]]]
    ) -> list[Hashes]:
        try:
            return await node.read_hashes(reads)
        except RedisUnavailable:
            self._look_again.set()
            raise
        except RedisReplyError as exc:
            if _redirection(exc) is None:
                raise
        # Some of the keys moved. Each is asked for alone, so that each can say where it went.
        self._look_again.set()
        return [
            [
                values
                for start in range(0, len(keys), PIPELINE_KEYS)
                for values in await _all(
                    self._follow(node, fields, key) for key in keys[start : start + PIPELINE_KEYS]
                )
            ]
            for fields, keys in reads
        ]

    async def _follow(self, node: RedisConnection, fields: HashFields, key: bytes) -> list[bytes | None]:
        asking = False
        for _ in range(REDIRECTIONS):
            try:
                request = (b"HMGET", key, *fields.fields)
                *_, values = await node.pipeline(*([(b"ASKING",)] if asking else []), request)
            except RedisReplyError as exc:
                redirection = _redirection(exc)
                if redirection is None:
                    raise
                kind, place = redirection
                asking = kind == "ASK"
                node = await self._connected_to((place[0] or node.address.host, place[1]))
            else:
                return list(values)
        raise self.address.unavailable(f"a key moved more than {REDIRECTIONS} times while it was read")

    def _master(self, node: RedisConnection | None) -> RedisConnection:
        if node is None:
            self._look_again.set()
            raise self._away()
        return node

    def _away(self) -> RedisUnavailable:
        return RedisUnavailable(self._reason.message, hint=self._reason.hint)

    def _connection_to(self, place: Place) -> RedisConnection:
        return RedisConnection(replace(self.address, hosts=(place,), kind="standalone"), **self._limits)

    async def _connected_to(self, place: Place) -> RedisConnection:
        """The connection to a node, made if need be; raises ``RedisUnavailable`` if it cannot be made."""
        if place not in self._nodes:
            self._nodes[place] = self._connection_to(place)
        await self._nodes[place].connect()
        return self._nodes[place]

    async def _keep(self) -> None:
        """Look at the slots again and again; for ever."""
        while True:
            calm = self.ready
            await asyncio.sleep(ANXIOUS_LOOK_SECONDS)
            if calm:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._look_again.wait(), LOOK_SECONDS - ANXIOUS_LOOK_SECONDS)
            try:
                await self._look()
            except BanquetError as exc:
                self._reason = exc
            except Exception as exc:  # a fault of ours; the server outlives it
                logger.exception("asking %s for its slots failed unexpectedly", self.address)
                self._reason = self.address.unavailable(repr(exc))

    async def _look(self) -> None:
        """Ask for the slots, connect to new masters, let go of nodes that are none any more."""
        self._look_again.clear()
        masters = await self._masters()
        await asyncio.gather(*map(self._connected_to, set(masters.values())), return_exceptions=True)
        table: list[RedisConnection | None] = [None] * SLOTS
        for (first, last), place in masters.items():
            table[first : last + 1] = [self._nodes[place]] * (last + 1 - first)
        self._table = table
        if None in table:
            self._reason = self.address.unavailable("a part of the slots has no master")
        unlisted = self._nodes.keys() - set(masters.values())
        for place in unlisted & self._unlisted:  # not in its first round: a reader may hold it still
            node = self._nodes.pop(place)
            self._past_reconnects += node.reconnects
            await node.close()
        self._unlisted = unlisted

    async def _masters(self) -> dict[tuple[int, int], Place]:
        """(first slot, last slot) -> master, as any connected node has it; raises if none has.

        Asks another node every time: one that is cut off from the others must not be believed for long.
        """
        problem: BanquetError | None = None
        for fallback in (False, True):
            if fallback:  # nobody is connected: whoever was known once may answer
                for outcome in await asyncio.gather(
                    *map(self._connected_to, self._known), return_exceptions=True
                ):
                    problem = outcome if isinstance(outcome, BanquetError) else problem
            for (host, _), node in random.sample(list(self._nodes.items()), len(self._nodes)):
                if not node.ready:
                    continue
                try:
                    slots = await node.command(b"CLUSTER", b"SLOTS")
                except BanquetError as exc:
                    problem = exc
                    continue
                # An empty or missing host means the one that was asked.
                places = [
                    ((first, last), [((name or b"").decode() or host, port) for name, port, *_ in nodes])
                    for first, last, *nodes in slots
                ]
                self._known = list(dict.fromkeys([*self.address.hosts, *(p for _, ps in places for p in ps)]))
                return {span: members[0] for span, members in places}
        raise problem or self._away()


def _redirection(error: RedisReplyError) -> tuple[str, Place] | None:
    """("MOVED" or "ASK", where to), or None for another reply."""
    kind, *rest = str(error.details.get("reply")).split(" ")
    if kind not in ("MOVED", "ASK") or len(rest) < 2:
        return None
    host, _, port = rest[1].rpartition(":")
    return kind, (host, int(port))


async def _all(work: Iterable[Awaitable[_T]]) -> list[_T]:
    """The results of all of it, once all of it has ended; raises the first error."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
