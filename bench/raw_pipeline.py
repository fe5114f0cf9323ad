"""The limit of Redis: the reads of the serving bench with nothing around them.

    python bench/raw_pipeline.py ENTITIES CONNECTIONS SECONDS

A child of bench/serving.py. Each connection asks for the features of some users with the bytes that Banquet
sends, made beforehand, and asks again as soon as the replies are there; they are parsed by hiredis and looked
at no further. One process on uvloop. Prints JSON as bench/wrk.lua does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import uvloop
from online_read import USERS, RawProtocol

from core.online import FeaturePlan
from core.repository import FeastRepository

_PAYLOADS = 500


class Asking:
    """One connection that asks until ``until`` (of ``time.perf_counter``) and notes each read's seconds."""

    def __init__(
        self, payloads: list[bytes], entities: int, until: float, ended: asyncio.Future[None]
    ) -> None:
        self.protocol = RawProtocol(self._answered)
        self.seconds: list[float] = []
        self._payloads = payloads
        self._entities = entities
        self._until = until
        self._ended = ended
        self._sent = 0.0

    def ask(self) -> None:
        """Send the next read."""
        self._sent = time.perf_counter()
        self.protocol.send(random.choice(self._payloads), self._entities)

    def _answered(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._sent)
        if now < self._until:
            self.ask()
        elif not self._ended.done():
            self._ended.set_result(None)


async def run(port: int, payloads: list[bytes], entities: int, connections: int, seconds: float) -> None:
    """Measure and print."""
    loop = asyncio.get_running_loop()
    ended = [loop.create_future() for _ in range(connections)]
    began, cpu = time.perf_counter(), time.process_time()
    asking = [Asking(payloads, entities, began + seconds, end) for end in ended]
    for one in asking:
        await loop.create_connection(lambda one=one: one.protocol, "127.0.0.1", port)
    for one in asking:
        one.ask()
    await asyncio.gather(*ended)
    taken, cpu = time.perf_counter() - began, time.process_time() - cpu
    times = sorted(second for one in asking for second in one.seconds)
    found = {
        "requests": len(times),
        "seconds": taken,
        "p50_ms": statistics.median(times) * 1e3,
        "p99_ms": times[int(len(times) * 0.99)] * 1e3,
        "cpu_us": cpu / len(times) * 1e6,
        "rps": len(times) / taken,
    }
    print(json.dumps(found))
    for one in asking:
        one.protocol.transport.close()


def main() -> None:
    """Make the reads beforehand, then measure."""
    entities, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    repository = FeastRepository.open(Path(os.environ["BENCH_REPO"]))
    (group,) = FeaturePlan.for_service(repository.definitions(), "users")._groups.values()
    draw = random.Random(7)
    payloads = [
        group.hash_fields.request(group.encoder.encode([draw.sample(range(USERS), entities)]))
        for _ in range(_PAYLOADS)
    ]
    uvloop.run(run(repository.redis.port, payloads, entities, connections, seconds))


if __name__ == "__main__":
    main()
