"""The server's way to Redis: hashes read in one round trip on one event loop.

Knows RESP and no Feast: keys and fields are bytes made by ``core.layout``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from core.redis import RedisAddress


class HashFields:
    """Which fields to read of a hash: the constant bytes of an HMGET around its key."""

    def __init__(self, fields: Sequence[bytes]) -> None:
        self.fields = tuple(fields)

    def request(self, keys: Sequence[bytes]) -> bytes:
        """The pipeline that asks for these fields of each key, as RESP."""
        tail = b"".join(b"$%d\r\n%s\r\n" % (len(field), field) for field in self.fields)
        head = b"*%d\r\n$5\r\nHMGET\r\n" % (2 + len(self.fields))
        return b"".join(b"%s$%d\r\n%s\r\n%s" % (head, len(key), key, tail) for key in keys)


class HashReader(Protocol):
    """What the online read needs of Redis; made by ``open_connection``."""

    async def connect(self) -> None:
        """Make the first attempt; raises what it failed with, and keeps trying in the background."""

    async def close(self) -> None:
        """Fail what is in flight and leave no task behind."""

    async def ping(self) -> None:
        """One round trip; raises ``RedisUnavailable`` where there is none."""

    async def read_hashes(
        self, reads: Sequence[tuple[HashFields, Sequence[bytes]]]
    ) -> list[list[list[bytes | None]]]:
        """Per read, per key, per field: the value or None. One round trip."""
        ...

    async def command(self, *arguments: bytes | str | int) -> Any:
        """Any other single command."""


def open_connection(address: RedisAddress) -> HashReader:
    """A reader for the address: multiplexed for a server or a Sentinel master, redis-py's for a cluster."""
    raise NotImplementedError
