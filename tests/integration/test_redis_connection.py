"""The online connection against real servers: what it reads, and what it does when they fail."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from core.errors import (
    BanquetError,
    InvalidRepository,
    NotRedis,
    Overloaded,
    RedisAccessDenied,
    RedisReplyError,
    RedisUnavailable,
)
from core.redis import RedisAddress
from core.redis_connection import PIPELINE_KEYS, HashFields, HashReader, open_connection
from tests.support.valkey import Valkey, certificate, fill, free_port, tls_front
from tests.support.waiting import until, wait_until

FIELDS = (b"\x00\x01\x02\x03", b"\r\n$1", b"_ts:view")
KEYS = [b"entity:%05d" % index for index in range(3000)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as running:
        fill(running, KEYS, FIELDS)
        yield running


@asynccontextmanager
async def connected(address: RedisAddress, **limits: Any) -> AsyncIterator[HashReader]:
    connection = open_connection(address, **limits)
    try:
        await connection.connect()
        yield connection
    finally:
        await connection.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on the server's event loop and see that it left no task behind."""

    async def whole() -> None:
        await scenario
        assert asyncio.all_tasks() == {asyncio.current_task()}

    uvloop.run(whole())


def values(key: bytes, fields: tuple[bytes, ...] = FIELDS) -> list[bytes]:
    """What ``fill`` wrote."""
    return [b"%s/%s" % (key, field) for field in fields]


def test_reads_of_any_shape_come_back_in_order(server: Valkey) -> None:
    async def scenario() -> None:
        async with connected(server.address()) as connection:
            every, first = HashFields(FIELDS), HashFields(FIELDS[:1])
            assert await connection.read_hashes([]) == []
            assert await connection.read_hashes([(every, [])]) == [[]]
            assert await connection.read_hashes([(every, KEYS[:1])]) == [[values(KEYS[0])]]
            assert await connection.read_hashes([(every, [b"nobody", KEYS[1]])]) == [
                [[None, None, None], values(KEYS[1])]
            ]
            assert await connection.read_hashes([(every, KEYS[:2]), (first, []), (first, KEYS[2:5])]) == [
                [values(key) for key in KEYS[:2]],
                [],
                [values(key, FIELDS[:1]) for key in KEYS[2:5]],
            ]
            long = [(every, KEYS), (first, KEYS[: PIPELINE_KEYS + 1])]
            assert await connection.read_hashes(long) == [
                [values(key) for key in KEYS],
                [values(key, FIELDS[:1]) for key in KEYS[: PIPELINE_KEYS + 1]],
            ]
            assert await connection.command("HGET", KEYS[0], FIELDS[0]) == values(KEYS[0])[0]
            assert connection.in_flight == 0

    run(scenario())


def test_callers_at_the_same_time_get_their_own_and_some_may_give_up(server: Valkey) -> None:
    async def scenario() -> None:
        async with connected(server.address()) as connection:
            fields = HashFields(FIELDS)
            tasks = [asyncio.create_task(connection.read_hashes([(fields, [key])])) for key in KEYS[:500]]
            await asyncio.sleep(0)
            for task in tasks[::3]:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            for index, (key, outcome) in enumerate(zip(KEYS, outcomes, strict=False)):
                if index % 3:
                    assert outcome == [[values(key)]]
                else:
                    assert isinstance(outcome, asyncio.CancelledError)
            long = asyncio.create_task(connection.read_hashes([(fields, KEYS)]))
            await asyncio.sleep(0.001)
            long.cancel()
            assert await connection.read_hashes([(fields, KEYS[:1])]) == [[values(KEYS[0])]]
            assert connection.in_flight == 0
            assert connection.reconnects == 0

    run(scenario())


def test_a_refused_command_fails_its_caller_alone(server: Valkey) -> None:
    with server.client() as client:
        client.set("text", "no hash")

    async def scenario() -> None:
        async with connected(server.address()) as connection:
            fields = HashFields(FIELDS)
            good, bad, other = await asyncio.gather(
                connection.read_hashes([(fields, KEYS[:2])]),
                connection.read_hashes([(fields, [KEYS[0], b"text", KEYS[1]])]),
                connection.read_hashes([(fields, KEYS[2:4])]),
                return_exceptions=True,
            )
            assert good == [[values(key) for key in KEYS[:2]]]
            assert isinstance(bad, RedisReplyError)
            assert "WRONGTYPE" in bad.message
            assert other == [[values(key) for key in KEYS[2:4]]]
            assert connection.reconnects == 0

    run(scenario())


@pytest.mark.parametrize(("username", "password"), [(None, "p@ss=word"), ("reader", "12345")])
def test_a_password_and_an_acl_user_open_the_door(
    tmp_path: Path, username: str | None, password: str
) -> None:
    with Valkey(tmp_path, username=username, password=password) as guarded:
        if username:
            with guarded.client() as client:
                client.acl_setuser(
                    "hashes", enabled=True, passwords=["+least"], keys=["*"], commands=["+hmget", "+hget"]
                )
                client.acl_setuser("default", enabled=False)
        config = {"type": "redis", "connection_string": guarded.connection_string}
        fill(guarded, KEYS[:1], FIELDS)

        async def scenario() -> None:
            async with connected(RedisAddress.from_online_store(config)) as connection:
                await connection.ping()
            wrong_secrets: list[tuple[dict[str, Any], str]] = [
                ({"password": "wrong", "db": 1}, "WRONGPASS"),
                ({"username": None, "password": None}, "NOAUTH"),
            ]
            for wrong, reply in wrong_secrets:
                with pytest.raises(RedisAccessDenied, match=reply):
                    async with connected(guarded.address(**wrong)):
                        pass
            if username:
                least = guarded.address(username="hashes", password="least", client_name="banquet")
                async with connected(least) as connection:
                    await connection.ping()
                    assert await connection.read_hashes([(HashFields(FIELDS), KEYS[:1])]) == [
                        [values(KEYS[0])]
                    ]
                    with pytest.raises(RedisAccessDenied, match="NOPERM"):
                        await connection.command("SET", "a", "b")
                    assert await connection.command("HGET", KEYS[0], FIELDS[0]) == values(KEYS[0])[0]

        run(scenario())
        with RedisAddress.from_online_store(config).session() as client:
            assert client.ping()
        with pytest.raises(RedisAccessDenied), guarded.address(password="wrong").session() as client:
            client.ping()


def test_the_database_index_is_honoured(server: Valkey) -> None:
    fill(server, [b"only in 3"], FIELDS, db=3)

    async def scenario() -> None:
        read = [(HashFields(FIELDS), [b"only in 3"])]
        async with connected(server.address(db=3)) as connection:
            assert await connection.read_hashes(read) == [[values(b"only in 3")]]
        async with connected(server.address()) as connection:
            assert await connection.read_hashes(read) == [[[None, None, None]]]
        with pytest.raises(RedisReplyError, match="index is out of range"):
            async with connected(server.address(db=99)):
                pass

    run(scenario())


def test_a_unix_socket_is_honoured(tmp_path: Path) -> None:
    path = Path("/tmp") / f"banquet-{os.getpid()}.sock"  # a socket's path must be short
    try:
        with Valkey(tmp_path, f"unixsocket {path}") as server:
            fill(server, KEYS[:1], FIELDS)

            async def scenario() -> None:
                async with connected(server.address(unix_socket_path=str(path))) as connection:
                    assert await connection.read_hashes([(HashFields(FIELDS), KEYS[:1])]) == [
                        [values(KEYS[0])]
                    ]

            run(scenario())
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificates with the openssl command")
def test_tls_verifies_the_server_unless_told_otherwise(server: Valkey, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path)

    async def scenario(port: int) -> None:
        def secure(host: str, **options: Any) -> RedisAddress:
            return RedisAddress(hosts=((host, port),), options={"ssl": True, **options})

        read = [(HashFields(FIELDS), KEYS)]
        for address in (
            secure("localhost", ssl_ca_certs=str(pem)),
            secure("127.0.0.1", ssl_ca_data=pem.read_text()),
            secure("127.0.0.1", ssl_cert_reqs="none"),
        ):
            async with connected(address) as connection:
                assert await connection.read_hashes(read) == [[values(key) for key in KEYS]]
            with address.session() as client:
                assert client.ping()
        with pytest.raises(RedisUnavailable, match="certificate verify failed"):
            async with connected(secure("localhost")):
                pass
        plain = RedisAddress(hosts=(("localhost", port),))
        with pytest.raises((NotRedis, RedisUnavailable)):
            async with connected(plain):
                pass

    with tls_front(server, pem, key) as port:
        run(scenario(port))
    with pytest.raises(RedisUnavailable):
        run(_ping(server.address(ssl=True, ssl_ca_certs=str(pem))))


async def _ping(address: RedisAddress, **limits: Any) -> None:
    async with connected(address, **limits) as connection:
        await connection.ping()


def test_what_listens_but_is_not_redis_is_named_as_such() -> None:
    async def scenario() -> None:
        async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

        listener = await asyncio.start_server(answer_http, "127.0.0.1", 0)
        async with listener:
            address = RedisAddress(hosts=(("127.0.0.1", listener.sockets[0].getsockname()[1]),))
            with pytest.raises(NotRedis, match="is not Redis"):
                async with connected(address):
                    pass

    run(scenario())


def test_a_server_that_never_answers_costs_the_timeout_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = RedisAddress(
            hosts=(mute.getsockname(),), options={"socket_timeout": 0.2, "socket_connect_timeout": 0.3}
        )
        with pytest.raises(RedisUnavailable, match=r"within 0\.3 s|within 0\.2 s"):
            run(_ping(address))


def test_nobody_there_at_the_start_is_an_error_and_heals_by_itself(tmp_path: Path) -> None:
    server = Valkey(tmp_path)

    async def scenario() -> None:
        connection = open_connection(server.address())
        with pytest.raises(RedisUnavailable, match="does not answer"):
            await connection.connect()
        assert not connection.ready
        with pytest.raises(RedisUnavailable):
            await connection.ping()
        await asyncio.to_thread(server.start)
        await until(lambda: connection.ready, "it is back")
        await connection.ping()
        await connection.close()
        with pytest.raises(RedisUnavailable, match="closed"):
            await connection.ping()

    try:
        run(scenario())
    finally:
        server.kill()


def test_a_stalled_server_fails_everyone_within_the_timeout_then_at_once(tmp_path: Path) -> None:
    async def scenario(server: Valkey) -> None:
        async with connected(server.address(), timeout_seconds=1.0) as connection:
            fields = HashFields(FIELDS)
            assert await connection.read_hashes([(fields, KEYS[:1])]) == [[values(KEYS[0])]]
            server.pause()
            started = time.monotonic()
            reads = [connection.read_hashes([(fields, [key])]) for key in KEYS[:50]]
            outcomes = await asyncio.gather(*reads, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {RedisUnavailable}
            assert time.monotonic() - started < 25, "each waited for its own timeout"
            late = asyncio.ensure_future(connection.read_hashes([(fields, KEYS[:1])]))
            for _ in range(3):  # turns of the loop, no time
                await asyncio.sleep(0)
            assert isinstance(late.exception(), RedisUnavailable)
            server.resume()
            await until(lambda: connection.ready, "it is back")
            assert await connection.read_hashes([(fields, KEYS[:1])]) == [[values(KEYS[0])]]

    with Valkey(tmp_path) as server:
        fill(server, KEYS[:1], FIELDS)
        run(scenario(server))


def test_a_server_that_loads_its_data_is_not_ready_yet(tmp_path: Path) -> None:
    async def scenario(server: Valkey) -> None:
        connection = open_connection(server.address())
        with pytest.raises(RedisUnavailable, match="LOADING"):
            await connection.connect()
        await connection.close()

    with Valkey(tmp_path, "key-load-delay 20000", "loading-process-events-interval-bytes 1024") as server:
        fill(server, KEYS[:1000], FIELDS)
        with server.client() as client:
            client.save()
        server.kill()
        server.start(wait=False)
        wait_until(lambda: _listens(server.port), "it listens")
        run(scenario(server))


def _listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 10):
        return True


def test_too_much_in_flight_is_refused_at_once(tmp_path: Path) -> None:
    async def scenario(server: Valkey) -> None:
        async with connected(server.address(), max_in_flight=100, timeout_seconds=30) as connection:
            fields = HashFields(FIELDS)
            server.pause()
            try:
                tasks = [asyncio.create_task(connection.read_hashes([(fields, [key])])) for key in KEYS[:150]]
                await asyncio.sleep(0)
                assert connection.in_flight == 100
            finally:
                server.resume()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert outcomes[:100] == [[[values(key)]] for key in KEYS[:100]]
            assert {type(outcome) for outcome in outcomes[100:]} == {Overloaded}
            assert len((await connection.read_hashes([(fields, KEYS)]))[0]) == len(KEYS)

    with Valkey(tmp_path) as server:
        fill(server, KEYS, FIELDS)
        run(scenario(server))


def test_killed_and_restarted_under_load_it_gives_no_wrong_value_and_recovers(
    tmp_path: Path,
) -> None:
    """16 callers all the time; the server is killed twice, paused once, and back each time."""
    outcomes: Counter[str] = Counter()
    tasks_seen: set[int] = set()

    async def caller(connection: HashReader, number: int, enough: asyncio.Event) -> None:
        fields = HashFields(FIELDS)
        while not enough.is_set():
            number = (number + 7) % len(KEYS)
            keys = [KEYS[number], b"nobody", KEYS[number - 1]]
            try:
                ((first, nobody, second),) = await connection.read_hashes([(fields, keys)])
            except BanquetError as exc:
                outcomes[type(exc).__name__] += 1
                await asyncio.sleep(0.002)
            else:
                right = (first, nobody, second) == (values(keys[0]), [None] * 3, values(keys[2]))
                outcomes["right" if right else "wrong"] += 1

    async def scenario(server: Valkey) -> None:
        async def more(what: str) -> None:
            seen = outcomes[what] + 100
            await until(lambda: outcomes[what] > seen, f"more is {what}")

        async with connected(server.address(), timeout_seconds=1.0) as connection:
            enough = asyncio.Event()
            callers = [asyncio.create_task(caller(connection, n * 100, enough)) for n in range(16)]
            for _ in range(2):
                await more("right")
                server.kill()
                await more("RedisUnavailable")
                assert not connection.ready
                tasks_seen.add(len(asyncio.all_tasks()))
                await asyncio.to_thread(server.start)
                await until(lambda: connection.ready, "it is back")
                tasks_seen.add(len(asyncio.all_tasks()))
            server.pause()
            await until(lambda: not connection.ready, "silence is noticed")
            server.resume()
            await until(lambda: connection.ready, "it is back")
            await more("right")
            enough.set()
            await asyncio.gather(*callers)
            assert connection.in_flight == 0
            assert connection.reconnects >= 3

    with Valkey(tmp_path, "appendonly yes", "appendfsync always") as server:
        fill(server, KEYS, FIELDS)
        run(scenario(server))
    assert outcomes.keys() == {"right", "RedisUnavailable"}
    assert len(tasks_seen) == 1, "the number of tasks moved"


def test_a_read_of_100000_keys_leaves_the_loop_to_others(server: Valkey) -> None:
    """Pauses are counted as shares of the processor time of the whole, which no slow machine stretches."""

    async def scenario() -> None:
        async with connected(server.address(), timeout_seconds=30) as connection:
            fields = HashFields(FIELDS)
            keys = KEYS * 34
            pauses: list[float] = []
            small_reads = 0
            done = asyncio.Event()

            async def heartbeat() -> None:
                while not done.is_set():
                    started = time.thread_time()
                    await asyncio.sleep(0.001)
                    pauses.append(time.thread_time() - started)

            async def small() -> None:
                nonlocal small_reads
                while not done.is_set():
                    assert await connection.read_hashes([(fields, KEYS[:1])]) == [[values(KEYS[0])]]
                    small_reads += 1

            others = [asyncio.create_task(heartbeat()), asyncio.create_task(small())]
            began = time.thread_time()
            (hashes,) = await connection.read_hashes([(fields, keys)])
            whole = time.thread_time() - began
            done.set()
            await asyncio.gather(*others)
            assert len(hashes) == len(keys) > 100_000
            assert hashes[:: len(KEYS)] == [values(KEYS[0])] * 34
            assert sorted(pauses)[len(pauses) // 2] < whole / 20
            assert max(pauses) < whole / 2
            assert small_reads > 5

    gc.collect()
    gc.freeze()  # what other tests left on the heap is not the connection's to carry
    try:
        run(scenario())
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("kind", ["standalone", "sentinel", "cluster"])
def test_the_blocking_session_says_that_nobody_is_there(kind: Any) -> None:
    address = RedisAddress(hosts=(("127.0.0.1", free_port()),), kind=kind)
    with pytest.raises(RedisUnavailable, match="does not answer"), address.session() as client:
        client.ping()


def test_the_blocking_session_translates_what_redis_refuses(server: Valkey, tmp_path: Path) -> None:
    with server.client() as client:
        client.set("text", "no hash")
        client.acl_setuser("looker", enabled=True, nopass=True, keys=["*"], commands=["+get"])
    with pytest.raises(RedisReplyError, match="WRONGTYPE"), server.address().session() as client:
        client.hgetall("text")
    with (
        pytest.raises(RedisAccessDenied, match="NOPERM"),
        server.address(username="looker").session() as client,
    ):
        client.hgetall("text")
    with pytest.raises(InvalidRepository, match="soket_timeout"):
        server.address(soket_timeout=1).client()
    with Valkey(tmp_path, f"replicaof 127.0.0.1 {free_port()}") as replica:
        with pytest.raises(RedisUnavailable, match="READONLY"), replica.address().session() as client:
            client.set("text", "more")
        run(_no_writes(replica.address()))


async def _no_writes(address: RedisAddress) -> None:
    """A refused write drops the connection, since it may have been to the master; it is back at once."""
    async with connected(address) as connection:
        with pytest.raises(RedisUnavailable, match="READONLY"):
            await connection.command("SET", "text", "more")
        await until(lambda: connection.ready, "it is back")
        await connection.ping()
