"""Half a minute of load with Redis killed in the middle: never a wrong value, all of it comes back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import psutil

from tests.support import shop as source
from tests.support.server import banquet_process
from tests.support.valkey import Valkey
from tests.support.waiting import until

STRETCH_SECONDS = 7.0
CONNECTIONS = 32
AGES = {1: 41, 2: 52, 3: None, 4: 24, 99: None}


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, users: list[int]
) -> tuple[int, Any]:
    body = json.dumps({"features": ["profile:age"], "entities": {"user_id": users}}).encode()
    head = (
        "POST /get-online-features HTTP/1.1\r\nhost: x\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    status = int((await reader.readline()).split()[1])
    length = 0
    while (line := await reader.readline()) != b"\r\n":
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return status, json.loads(await reader.readexactly(length))


async def client(number: int, port: int, enough: asyncio.Event, log: list[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    users = list(AGES)
    users = users[number % 5 :] + users[: number % 5]
    while not enough.is_set():
        status, answer = await ask(reader, writer, users)
        log.append(status)
        if status == 200:
            assert answer["results"][1]["values"] == [AGES[user] for user in users]
        else:
            assert answer["code"] == "redis_unavailable"
            await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()


def test_load_with_redis_killed_and_restarted(shop: Path, valkey: Valkey, tmp_path: Path) -> None:
    """On a server and a Redis of its own; the values are copied from the session's Redis."""
    with Valkey(tmp_path, "appendonly yes") as redis:
        with valkey.client() as old, redis.client() as new:
            for key in old.scan_iter(b"*shop"):
                new.restore(key, 0, old.dump(key), replace=True)
        repo = tmp_path / "repo"
        source.write(repo, redis.connection_string)
        (repo / "registry.db").write_bytes((shop / "registry.db").read_bytes())
        with banquet_process(repo) as http:
            port = http.base_url.port
            assert port is not None
            (process,) = [
                p for p in psutil.process_iter(["cmdline"]) if str(port) in (p.info["cmdline"] or [])
            ]
            asyncio.run(load(port, redis, process))
            assert http.get("/readyz").status_code == 200


async def load(port: int, redis: Valkey, process: psutil.Process) -> None:
    log: list[int] = []  # the status of each answer
    enough = asyncio.Event()
    clients = [asyncio.create_task(client(n, port, enough, log)) for n in range(CONNECTIONS)]
    await asyncio.sleep(STRETCH_SECONDS)
    memory = [process.memory_info().rss]
    await asyncio.sleep(STRETCH_SECONDS)
    redis.kill()
    await until(lambda: log.count(503) > 50 * CONNECTIONS, "it is missed")
    await asyncio.to_thread(redis.start)
    await until(lambda: log[-1] == 200, "it is found again")
    recovered = len(log)
    await asyncio.sleep(STRETCH_SECONDS)
    memory.append(process.memory_info().rss)
    await asyncio.sleep(STRETCH_SECONDS)
    enough.set()
    await asyncio.gather(*clients)
    memory.append(process.memory_info().rss)

    assert set(log) == {200, 503}
    assert log[recovered:].count(503) <= CONNECTIONS  # what was under way when it came back
    # The outage itself may cost buffers once; what must not be is growth that goes on.
    assert memory[2] - memory[1] < 4_000_000, f"memory keeps growing: {memory}"
    assert memory[2] - memory[0] < 16_000_000, f"memory grew: {memory}"
    threads = process.num_threads()
    assert threads < 40, f"{threads} threads"
