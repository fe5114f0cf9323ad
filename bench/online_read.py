"""In-process latency of one online read: stock Feast, Banquet, and the raw round trips they share.

A child of bench/serving.py, run in turns within one process. Banquet is timed from entity columns to
decoded columns with statuses, on uvloop and without a task, as in a worker. The raw round trip sends the
same bytes, made beforehand, on a blocking socket, and parses the replies with hiredis without decoding any
value; "loop" does so with a bare protocol on uvloop, which is what an event loop costs whoever uses one.
Prints JSON: per number of entities and contender the median milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis
import uvloop

from core import handover
from core.online import FeaturePlan, OnlineReader
from core.redis_connection import open_connection
from core.repository import FeastRepository

SIZES = (1, 10, 100, 1000)
ROUNDS = 9
USERS = 100_000


def raw_reader(port: int) -> Callable[[bytes, int], list[object]]:
    """A blocking round trip: a pipeline's bytes and its number of replies in, the replies out."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    parser = hiredis.Reader()
    buffer = memoryview(bytearray(1 << 18))

    def read(payload: bytes, count: int) -> list[object]:
        connection.sendall(payload)
        replies: list[object] = []
        while len(replies) < count:
            parser.feed(buffer[: connection.recv_into(buffer)])
            while (reply := parser.gets()) is not False:
                replies.append(reply)
        return replies

    return read


class RawProtocol(asyncio.Protocol):
    """A pipeline's bytes out, its replies parsed; ``done`` is called when all are there."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done
        self._parser = hiredis.Reader()
        self._left = 0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol."""
        self.transport = transport

    def send(self, payload: bytes, count: int) -> None:
        """Ask for ``count`` replies."""
        self._left = count
        self.transport.write(payload)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio's protocol."""
        self._parser.feed(data)
        while self._left and self._parser.gets() is not False:
            self._left -= 1
        if not self._left:
            self._done()


def loop_times(loop: asyncio.AbstractEventLoop, port: int, payloads: list[bytes], count: int) -> list[float]:
    """Seconds of each round trip on the loop, one after the other."""
    ended = loop.create_future()
    times: list[float] = []
    started = 0.0

    def following() -> None:
        nonlocal started
        if started:
            times.append(time.perf_counter() - started)
        if len(times) == len(payloads):
            ended.set_result(None)
            return
        payload = payloads[len(times)]
        started = time.perf_counter()
        protocol.send(payload, count)

    async def run() -> None:
        await loop.create_connection(lambda: protocol, "127.0.0.1", port)
        following()
        await ended
        protocol.transport.close()

    protocol = RawProtocol(following)
    loop.run_until_complete(run())
    return times


def main() -> None:
    """Measure and print."""
    from feast import FeatureStore

    repo = Path(os.environ["BENCH_REPO"])
    store = FeatureStore(repo_path=str(repo), fs_yaml_file=repo / "stock.yaml")
    service = store.get_feature_service("users")
    repository = FeastRepository.open(repo)
    plan = FeaturePlan.for_service(repository.definitions(), "users")
    (group,) = plan._groups.values()
    raw = raw_reader(repository.redis.port)
    loop = uvloop.new_event_loop()
    connection = open_connection(repository.redis)
    reader = OnlineReader(connection)
    loop.run_until_complete(connection.connect())
    draw = random.Random(5)

    def milliseconds(size: int, contender: str, repeats: int) -> float:
        """The median of ``repeats`` reads of ``size`` entities, different ones each time."""
        drawn = [draw.sample(range(USERS), size) for _ in range(repeats)]
        times = []
        if contender == "banquet":
            ended = loop.create_future()

            async def read_all() -> None:
                try:
                    for ids in drawn:
                        started = time.perf_counter()
                        await reader.read(plan, {"user_id": ids}, size)
                        times.append(time.perf_counter() - started)
                finally:
                    ended.set_result(None)

            async def as_the_server_does() -> None:
                handover.run(read_all())
                await ended

            loop.run_until_complete(as_the_server_does())
        elif contender in ("raw", "loop"):
            payloads = [group.hash_fields.request(group.encoder.encode([ids])) for ids in drawn]
            if contender == "loop":
                times += loop_times(loop, repository.redis.port, payloads, size)
                payloads = []
            for payload in payloads:
                started = time.perf_counter()
                raw(payload, size)
                times.append(time.perf_counter() - started)
        else:
            for ids in drawn:
                rows = [{"user_id": user} for user in ids]
                started = time.perf_counter()
                store.get_online_features(features=service, entity_rows=rows).to_dict()
                times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e3

    found: dict[str, dict[str, list[float]]] = {}
    for size in SIZES:
        cells: dict[str, list[float]] = {"stock": [], "banquet": [], "raw": [], "loop": []}
        for turn in range(ROUNDS + 1):
            for contender, times in cells.items():
                repeats = max(5, (200 if contender == "stock" else 4000) // (size + 20))
                taken = milliseconds(size, contender, repeats)
                if turn:  # the first is for warming up
                    times.append(taken)
        found[str(size)] = cells
    print(json.dumps(found))
    loop.run_until_complete(connection.close())


if __name__ == "__main__":
    main()
