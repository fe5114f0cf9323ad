"""Clients that keep predicting over connections that stay open, and note every answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.waiting import until


@dataclass(frozen=True, slots=True)
class Seen:
    """One prediction: when it was asked for and answered (monotonic seconds), by which version, for whom.

    ``connection`` numbers the connection that it came on, whose other end is one worker.
    """

    asked: float
    answered: float
    version: int
    variant: str
    user: int
    request_id: str
    row: dict[str, Any]
    port: int
    connection: int


@dataclass
class Clients:
    """``connections`` to each of the servers at ``ports``, each asking for a random user at a time.

    What is not a 200, or a connection that breaks, is a failure, noted with its moment; a client whose
    connection broke makes another one. While they are ``resting`` they ask nothing.
    """

    ports: Sequence[int]
    connections: int = 4
    users: int = 2000
    pause_seconds: float = 0.0
    resting: bool = False
    seen: list[Seen] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    _stop: bool = False
    _connections: int = 0

    async def __aenter__(self) -> Clients:
        self._tasks = [
            asyncio.create_task(self._client(port, random.Random(f"{port}-{number}")))
            for port in self.ports
            for number in range(self.connections)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def _client(self, port: int, rng: random.Random) -> None:
        while not self._stop:
            try:
                await self._connection(port, rng)
            except (OSError, asyncio.IncompleteReadError) as exc:
                self._fail(repr(exc))
                await asyncio.sleep(0.01)

    async def _connection(self, port: int, rng: random.Random) -> None:
        """Ask over one connection for as long as it stays open."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        keep = True
        self._connections += 1
        number = self._connections
        try:
            while keep and not self._stop:
                if self.resting:
                    await asyncio.sleep(0.01)
                    continue
                user = rng.randrange(self.users)
                asked = time.monotonic()
                status, answer, keep = await post(
                    reader, writer, "/predict", {"entities": [{"user_id": user}]}
                )
                if status != 200:
                    self._fail(f"{status} {answer}")
                    await asyncio.sleep(0.01)
                else:
                    row = answer["predictions"][0]
                    self.seen.append(
                        Seen(
                            asked,
                            time.monotonic(),
                            answer["model_version"],
                            answer["variant"],
                            user,
                            answer["request_id"],
                            row,
                            port,
                            number,
                        )
                    )
                if self.pause_seconds:
                    await asyncio.sleep(self.pause_seconds)
        finally:
            writer.close()

    async def agreed(self, version: int, answers: int = 100) -> None:
        """Wait until so many answers in a row are of one version, wherever they come from.

        Of the answers between the first and the last of those, none was of another.
        """
        begin = len(self.seen)

        def only() -> bool:
            last = self.seen[max(begin, len(self.seen) - answers) :]
            return len(last) == answers and {one.version for one in last} == {version}

        await until(only, f"version {version} answers everybody")

    def _fail(self, what: str) -> None:
        self.failures.append((time.monotonic(), what))


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: Any
) -> tuple[int, Any, bool]:
    """Send one request and read its answer: status, parsed body, and whether the connection stays open."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    status = int((await reader.readline() or b"HTTP/1.1 0").split()[1])
    length, keep = 0, True
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        elif name.lower() == b"connection":
            keep = value.strip().lower() != b"close"
    if status == 0:
        raise ConnectionResetError("the connection was closed without an answer")
    return status, json.loads(await reader.readexactly(length)), keep
