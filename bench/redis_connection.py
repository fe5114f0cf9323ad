"""How close the online connection comes to a bare socket: `python bench/redis_connection.py [asyncio]`.

Per number of keys (15 fields each, values of 9 bytes), medians of calls made in random turns:

raw       one blocking socket: send the bytes, receive as many as the answer has
parsed    the same, and hiredis makes Python objects of them
loop      an asyncio protocol of a dozen lines: no timeout, no queue, no errors; what an event loop costs
ours      RedisConnection.read_hashes
redis-py  an asyncio pipeline of redis-py, which has hiredis too
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hiredis
import redis.asyncio

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.redis_connection import HashFields, open_connection
from tests.support.valkey import Valkey

SIZES = (1, 10, 100, 1000)
KEYS = [b"user_id:%032d" % index for index in range(max(SIZES))]
FIELDS = [os.urandom(4) for _ in range(13)] + [b"_ts:user_demographics", b"_ts:user_behavior"]
VALUE = b"\x29" + os.urandom(8)
SECONDS_PER_SIZE = 4.0


class BareSocket:
    """A blocking client of a dozen lines."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 18)
        self._view = memoryview(self._buffer)

    def raw(self, request: bytes, size: int) -> None:
        self._socket.sendall(request)
        while size > 0:
            size -= self._socket.recv_into(self._buffer)

    def parsed(self, request: bytes, count: int) -> list[Any]:
        self._socket.sendall(request)
        reader, replies = hiredis.Reader(), []
        while len(replies) < count:
            reader.feed(self._view[: self._socket.recv_into(self._buffer)])
            while (reply := reader.gets()) is not False:
                replies.append(reply)
        return replies


class BareProtocol(asyncio.Protocol):
    """An asyncio client that serves one caller at a time."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._reader = hiredis.Reader()

    def ask(self, request: bytes, count: int) -> asyncio.Future[list[Any]]:
        self._count, self._replies = count, []
        self._answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._replies.append(reply)
        if len(self._replies) == self._count:
            self._answer.set_result(self._replies)


async def measure(port: int, connection: Any, theirs: redis.asyncio.Redis) -> None:
    bare, fields = BareSocket(port), HashFields(FIELDS)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(BareProtocol, "127.0.0.1", port)
    names = ["raw", "parsed", "loop", "ours", "redis-py"]
    print(f"{'keys':>5}" + "".join(f"{name:>10}" for name in names) + "   microseconds; ours / parsed, loop")
    for count in SIZES:
        keys = KEYS[:count]
        request = fields.request(keys)
        size = count * (len(b"*15\r\n") + len(FIELDS) * len(b"$9\r\n" + VALUE + b"\r\n"))

        async def ours(keys: list[bytes] = keys) -> list[Any]:
            return (await connection.read_hashes([(fields, keys)]))[0]

        async def redis_py(keys: list[bytes] = keys) -> list[Any]:
            pipeline = theirs.pipeline(transaction=False)
            for key in keys:
                pipeline.hmget(key, FIELDS)
            return await pipeline.execute()

        assert await ours() == await redis_py() == bare.parsed(request, count)
        times: dict[str, list[float]] = {name: [] for name in names}
        end = time.perf_counter() + SECONDS_PER_SIZE
        while time.perf_counter() < end:
            for name in random.sample(names, len(names)):
                started = time.perf_counter()
                if name == "raw":
                    bare.raw(request, size)
                elif name == "parsed":
                    bare.parsed(request, count)
                elif name == "loop":
                    await protocol.ask(request, count)
                elif name == "ours":
                    await ours()
                else:
                    await redis_py()
                times[name].append(time.perf_counter() - started)
        middle = {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}
        ratios = f"{middle['ours'] / middle['parsed']:.2f}, {middle['ours'] / middle['loop']:.2f}"
        print(f"{count:>5}" + "".join(f"{middle[name]:>10.0f}" for name in names) + f"   {ratios}")
    transport.close()


async def throughput(connection: Any) -> None:
    fields = HashFields(FIELDS)
    for callers in (1, 8, 32, 128):
        end, done = time.perf_counter() + 1.0, 0

        async def caller(end: float = end) -> None:
            nonlocal done
            while time.perf_counter() < end:
                await connection.read_hashes([(fields, KEYS[:1])])
                done += 1

        await asyncio.gather(*(caller() for _ in range(callers)))
        print(f"{callers:>4} callers, 1 key each: {done} reads/s")


async def main(server: Valkey) -> None:
    connection = open_connection(server.address())
    await connection.connect()
    async with redis.asyncio.Redis(port=server.port) as theirs:
        await measure(server.port, connection, theirs)
    await throughput(connection)
    await connection.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, Valkey(Path(directory)) as server:
        with server.client() as client, client.pipeline(transaction=False) as pipeline:
            for key in KEYS:
                pipeline.hset(key, mapping=dict.fromkeys(FIELDS, VALUE))
            pipeline.execute()
        if "asyncio" in sys.argv:
            asyncio.run(main(server))
        else:
            import uvloop

            uvloop.run(main(server))
