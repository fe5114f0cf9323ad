"""Blocking connections for bulk work: RESP goes out as given, replies come in parsed.

For the online write and the ledger's scripts; the server reads through ``core.redis_connection``. Knows no
Feast bytes and no rule of who wins.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hiredis

from core.errors import BanquetError
from core.layout_rows import bulk_string, command_head
from core.redis import RedisAddress


class ChannelPool:
    """Connections to the server, or to each node of a cluster, that are idle between exchanges."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._client: Any = None
        self._idle: dict[str, list[Channel]] = {}

    @contextmanager
    def channel(self, node: str = "") -> Iterator[Channel]:
        """A connection for the length of the block; it is dropped if the block fails.

        Raises ``RedisUnavailable``, ``RedisAccessDenied`` or ``RedisReplyError`` for the block's errors.
        """
        with self._lock:
            idle = self._idle.setdefault(node, [])
            channel = idle.pop() if idle else None
        with self._address.translated():
            if channel is None:
                channel = Channel(self._address, self._connection(node))
            try:
                yield channel
            except BaseException as exc:
                channel.close()
                if node:
                    self._forget_topology()
                if isinstance(exc, OSError):  # from the socket itself, not by way of redis-py
                    raise self._address.unavailable(str(exc)) from exc
                raise
        with self._lock:
            idle.append(channel)

    def node_of(self, slot: int) -> str:
        """The name of the cluster node that owns a hash slot."""
        with self._address.translated():
            return str(self._connected().nodes_manager.get_node_from_slot(slot).name)

    def close(self) -> None:
        """Close every idle connection."""
        with self._lock:
            channels = [channel for idle in self._idle.values() for channel in idle]
            self._idle.clear()
            client, self._client = self._client, None
        for channel in channels:
            channel.close()
        if client is not None:
            client.close()

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._address.client()
            return self._client

    def _connection(self, node: str) -> Any:
        client = self._connected()
        if node:
            found = client.get_node(node_name=node)
            if found is None:
                raise self._address.unavailable(f"node {node} has left the cluster")
            client = client.get_redis_connection(found)
        return client.connection_pool.get_connection()

    def _forget_topology(self) -> None:
        """After a failure in a cluster: the next attempt asks anew which node owns which slot."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


class Channel:
    """One connection: RESP out as given, parsed replies in."""

    def __init__(self, address: RedisAddress, connection: Any) -> None:
        self._address = address
        self._connection = connection
        # redis-py made the connection (TLS, credentials, database, Sentinel's master); it offers no way to
        # read many replies at once, so they are read from its socket.
        self._socket = connection._sock
        self._reader = hiredis.Reader()
        self._buffer = memoryview(bytearray(1 << 16))
        self._scripts: dict[bytes, bytes] = {}

    def exchange(
        self, payload: Sequence[bytes | memoryview], replies: int, *, expected: str | None = None
    ) -> list[Any]:
        """Send commands and wait for their ``replies``.

        Raises the error that the first error reply stands for, once all replies are in. Errors of the code
        ``expected`` are answers like any other: ``hiredis.ReplyError`` among the replies.
        """
        # The replies to a slice are small: the server can hold them until all of it is sent.
        self._socket.sendall(payload[0] if len(payload) == 1 else b"".join(payload))
        received: list[Any] = []
        while len(received) < replies:
            count = self._socket.recv_into(self._buffer)
            if not count:
                raise ConnectionError("the connection was closed")
            self._reader.feed(self._buffer[:count])
            while (reply := self._reader.gets()) is not False:
                received.append(reply)
        for reply in received:
            errors = reply if isinstance(reply, list) else (reply,)
            for error in errors:
                if isinstance(error, hiredis.ReplyError):
                    text = str(error)
                    if expected is None or not text.startswith(expected):
                        raise self._refused(text)
        return received

    def script(self, source: bytes) -> bytes:
        """The digest of a script that this server has loaded."""
        if source not in self._scripts:
            load = [command_head(3), *map(bulk_string, (b"SCRIPT", b"LOAD", source))]
            (digest,) = self.exchange(load, 1)
            self._scripts[source] = digest
        return self._scripts[source]

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _refused(self, reply: str) -> BanquetError:
        if reply.startswith("NOSCRIPT"):  # the server restarted, or its scripts were flushed
            return self._address.unavailable(reply)
        return self._address.reply_error(reply)
