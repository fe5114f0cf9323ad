"""The online connection through Sentinels: it finds the master and follows a failover."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from core.errors import BanquetError, RedisAccessDenied, RedisUnavailable
from core.redis import RedisAddress
from core.redis_connection import HashFields, HashReader, open_connection
from tests.support.valkey import SentinelTrio, Valkey, fill
from tests.support.waiting import until, wait_until

FIELDS = HashFields([b"value"])
KEYS = [b"entity:%03d" % index for index in range(200)]


class Callers:
    """Callers who read single keys and count what they see: written before the failover, or after."""

    def __init__(self, connection: HashReader, number: int = 4) -> None:
        self.seen: Counter[str] = Counter()
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._call(connection, start * 50)) for start in range(number)]

    async def _call(self, connection: HashReader, number: int) -> None:
        while not self._stop.is_set():
            number = (number + 1) % len(KEYS)
            key = KEYS[number]
            try:
                (((value,),),) = await connection.read_hashes([(FIELDS, [key])])
            except BanquetError as exc:
                self.seen[type(exc).__name__] += 1
                await asyncio.sleep(0.002)
            else:
                names = {key + b"/value": "before", b"after": "after"}
                self.seen[names.get(value or b"", "wrong")] += 1

    async def until_more(self, what: str) -> None:
        """Wait until every caller has seen it again, some of them many times."""
        enough = self.seen[what] + 100
        await until(lambda: self.seen[what] > enough, f"there is more from {what}")

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)


def test_a_failover_costs_errors_only_while_there_is_no_master(tmp_path: Path) -> None:
    """The master hangs, the replica is promoted, the old master wakes and still thinks it is one.

    One connection notices by its timeout; the other has none and must hear of it from the Sentinels.
    """

    async def scenario(trio: SentinelTrio) -> None:
        quick = open_connection(trio.address(), timeout_seconds=1.0)
        patient = open_connection(trio.address(), timeout_seconds=None)
        await asyncio.gather(quick.connect(), patient.connect())
        crowd = [Callers(quick), Callers(patient)]
        await until(lambda: all(c.seen["before"] > 50 for c in crowd), "everybody reads")
        tasks = len(asyncio.all_tasks())

        old = trio.master
        old.pause()
        await asyncio.to_thread(wait_until, lambda: trio.master is not old, "the replica is promoted")
        new = trio.master
        await asyncio.to_thread(wait_until, lambda: _is_master(new), "it is the master itself")
        for callers in crowd:
            await callers.until_more("before")

        with new.client() as client:
            for key in KEYS:
                client.hset(key, "value", b"after")
        for callers in crowd:  # what was on its way has arrived
            await callers.until_more("after")
        before = [callers.seen["before"] for callers in crowd]
        old.resume()
        await asyncio.sleep(1.0)
        assert [callers.seen["before"] for callers in crowd] == before, "the old master was believed"
        assert len(asyncio.all_tasks()) <= tasks + 4, "the number of tasks grew"  # four questions at most
        for callers in crowd:
            await callers.stop()
            assert callers.seen.keys() - {"RedisUnavailable"} == {"before", "after"}
        await asyncio.gather(quick.close(), patient.close())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with SentinelTrio(tmp_path, password="s3cret") as trio:
        fill(trio.master, KEYS, [b"value"])
        with trio.master.client() as client:
            client.wait(1, 5000)
        asyncio.run(_refusals(trio))
        with trio.address().session() as client:
            assert client.hget(KEYS[0], "value") == KEYS[0] + b"/value"
        asyncio.run(scenario(trio))


def _is_master(server: Valkey) -> bool:
    with server.client() as client:
        return bool(client.role()[0] == b"master")


async def _refusals(trio: SentinelTrio) -> None:
    """A password the master does not take, and Sentinels too lonely to be believed."""
    for address, error, words in (
        (trio.address(password="wrong"), RedisAccessDenied, "WRONGPASS"),
        (trio.address(min_other_sentinels=5), RedisUnavailable, "sees only 2 others"),
    ):
        connection = open_connection(address)
        with pytest.raises(error, match=words):
            await connection.connect()
        await connection.close()


def test_sentinels_with_a_password_of_their_own_are_asked_with_it(tmp_path: Path) -> None:
    async def named(address: RedisAddress) -> bool:
        connection = open_connection(address)
        try:
            await connection.connect()
            return connection.ready
        finally:
            await connection.close()

    with SentinelTrio(tmp_path, password="s3cret", sentinel_password="lookout") as trio:

        def address(more: str) -> RedisAddress:
            hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in trio.sentinels)
            config = {
                "type": "redis",
                "redis_type": "redis_sentinel",
                "sentinel_master": trio.name,
                "connection_string": f"{hosts},password=s3cret{more}",
            }
            return RedisAddress.from_online_store(config)

        known = address(',sentinel_kwargs={"password": "lookout"}')
        assert asyncio.run(named(known))
        assert "lookout" not in str(known)
        with known.session() as client:
            assert client.ping()
        with pytest.raises(RedisUnavailable, match="no Sentinel names the master"):
            asyncio.run(named(address("")))


def test_sentinels_that_are_away_or_know_no_such_master_are_named(tmp_path: Path) -> None:
    async def scenario(address: RedisAddress, words: str) -> None:
        connection = open_connection(address)
        with pytest.raises(RedisUnavailable, match=words):
            await connection.connect()
        await connection.close()

    sentinel = Valkey(tmp_path, sentinel=True)
    address = RedisAddress(hosts=(("127.0.0.1", sentinel.port),), kind="sentinel", master="nobody")
    asyncio.run(scenario(address, "no Sentinel names the master"))
    with sentinel:
        asyncio.run(scenario(address, "No such master"))
