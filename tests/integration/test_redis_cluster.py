"""The online connection to a real cluster: slots, keys that move, a master that dies."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from core import layout
from core.errors import BanquetError, InvalidRepository, RedisAccessDenied, RedisReplyError, RedisUnavailable
from core.redis import RedisAddress
from core.redis_cluster import slot_of
from core.redis_connection import HashFields, HashReader, open_connection
from core.repository import Feature, View
from core.types import Dtype, Field
from core.write import OnlineWriter, encode_rows
from tests.support.valkey import Cluster, Valkey, certificate, free_port, tls_front
from tests.support.waiting import until, wait_until

FIELDS = HashFields([b"a", b"b"])
KEYS = [b"entity:%04d" % index for index in range(3000)] + [b"{tag}%d" % index for index in range(200)]


def row(key: bytes) -> list[bytes]:
    return [key + b"/a", key + b"/b"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), masters=3, replicas=1) as running:
        with running.address().session() as client, client.pipeline() as pipeline:
            for key in KEYS:
                pipeline.hset(key, mapping=dict(zip(("a", "b"), row(key), strict=True)))
            pipeline.execute()
        yield running


class Callers:
    """Callers who read single keys and count what they get, until told to stop."""

    def __init__(self, connection: HashReader, number: int = 8, keys: list[bytes] = KEYS) -> None:
        self.outcomes: Counter[str] = Counter()
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._call(connection, keys[n::number])) for n in range(number)]

    async def _call(self, connection: HashReader, keys: list[bytes]) -> None:
        for one, other in itertools.pairwise(itertools.cycle(keys)):
            if self._stop.is_set():
                return
            try:
                (rows,) = await connection.read_hashes([(FIELDS, [one, other])])
            except BanquetError as exc:
                self.outcomes[type(exc).__name__] += 1
                await asyncio.sleep(0.002)
            else:
                self.outcomes["right" if rows == [row(one), row(other)] else "wrong"] += 1

    async def until_more(self) -> None:
        """Wait until every caller has read again, and some of them many times."""
        enough = self.outcomes["right"] + 200
        await until(lambda: self.outcomes["right"] > enough, "more has been read")

    async def stop(self) -> Counter[str]:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        return self.outcomes


def test_reads_span_the_masters_in_order(cluster: Cluster) -> None:
    async def scenario() -> None:
        connection = open_connection(cluster.address())
        await connection.connect()
        assert connection.ready
        await connection.ping()
        only_b = HashFields([b"b"])
        found = await connection.read_hashes([(FIELDS, KEYS), (only_b, []), (only_b, [KEYS[5], b"nobody"])])
        assert found == [[row(key) for key in KEYS], [], [[row(KEYS[5])[1]], [None]]]
        assert b"cluster_enabled:1" in await connection.command("INFO", "cluster")
        assert connection.in_flight == 0
        await connection.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(RedisUnavailable, match="closed"):
            await connection.read_hashes([(FIELDS, KEYS[:1])])

    asyncio.run(scenario())


def test_keys_are_found_while_their_slot_moves_and_after(cluster: Cluster) -> None:
    """The slot of {tag} moves from master to master, key by key, while callers read them."""
    slot = slot_of(b"{tag}")
    tagged = [key for key in KEYS if key.startswith(b"{tag}")]
    source, target = (cluster.masters[slot * 3 // 16384], cluster.masters[(slot * 3 // 16384 + 1) % 3])

    def on(node: Valkey, *command: Any) -> Any:
        with node.client() as client:
            return client.execute_command(*command)

    async def scenario() -> None:
        connection = open_connection(cluster.address(), timeout_seconds=30)
        await connection.connect()
        callers = Callers(connection, keys=tagged)
        await callers.until_more()
        on(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.node_id(source))
        on(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.node_id(target))
        with source.client() as client:
            for key in tagged[::2]:
                client.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 30_000)
                await asyncio.sleep(0.002)
            assert (await connection.read_hashes([(FIELDS, tagged)])) == [[row(key) for key in tagged]]
            for key in tagged[1::2]:
                client.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 30_000)
        for node in (target, source, *(n for n in cluster.masters if n not in (source, target))):
            on(node, "CLUSTER", "SETSLOT", slot, "NODE", cluster.node_id(target))
        await callers.until_more()
        assert (await connection.read_hashes([(FIELDS, tagged)])) == [[row(key) for key in tagged]]
        assert (await callers.stop()).keys() == {"right"}
        await connection.close()

    asyncio.run(scenario())


def test_a_dead_master_costs_errors_only_until_its_replica_takes_over(cluster: Cluster) -> None:
    async def scenario() -> None:
        connection = open_connection(cluster.address(), timeout_seconds=5)
        await connection.connect()
        callers = Callers(connection)
        await callers.until_more()
        tasks = len(asyncio.all_tasks())
        victim, heir = cluster.masters[0], cluster.replicas[0]
        kept = [key for key in KEYS if slot_of(key) >= 16384 // 3 + 1][:20]
        victim.kill()
        await until(lambda: not connection.ready, "it is noticed")
        assert await connection.read_hashes([(FIELDS, kept)]) == [[row(key) for key in kept]]
        await asyncio.to_thread(wait_until, lambda: _serves(heir), "the replica is a master")
        await until(lambda: connection.ready, "the heir is found")
        assert await connection.read_hashes([(FIELDS, KEYS)]) == [[row(key) for key in KEYS]]
        await asyncio.to_thread(victim.start)
        await callers.until_more()
        outcomes = await callers.stop()
        assert outcomes.keys() == {"right", "RedisUnavailable"}
        await until(lambda: len(asyncio.all_tasks()) <= tasks - 8, "no more tasks than before")
        await connection.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def _serves(node: Valkey) -> bool:
    with node.client() as client:
        try:
            return bool(client.role()[0] == b"master" and client.cluster("info")["cluster_state"] == "ok")
        except redis.ConnectionError:
            return False


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificates with the openssl command")
def test_a_cluster_behind_tls_lets_an_acl_user_write_and_read(tmp_path: Path) -> None:
    """Every node is named by its TLS port, and every connection to it has to introduce itself."""
    pem, key = certificate(tmp_path)
    ports = [free_port() for _ in range(3)]
    text = ",".join(f"127.0.0.1:{port}" for port in ports) + f",ssl=true,ssl_ca_certs={pem}"
    secrets = {"username": "features", "password": "s3cret"}
    with ExitStack() as stack:
        guarded = stack.enter_context(Cluster(tmp_path, announced=ports, **secrets))
        for node, port in zip(guarded.nodes, ports, strict=True):
            stack.enter_context(tls_front(node, pem, key, port))

        def address(password: str) -> RedisAddress:
            config = {
                "type": "redis",
                "redis_type": "redis_cluster",
                "connection_string": f"{text},username=features,password={password}",
            }
            return RedisAddress.from_online_store(config)

        view = View(
            name="v", stored_name="v", join_keys=(Field("id", Dtype.INT64),),
            features=(Feature("a", Dtype.DOUBLE, {}),), ttl=timedelta(0),
        )  # fmt: skip
        with OnlineWriter(address("s3cret"), "guarded") as writer:
            columns = {"id": list(range(500)), "a": [1.5] * 500}
            assert writer.write("v", encode_rows("guarded", view, columns, [1] * 500)).written == 500
        keys = layout.EntityKeys("guarded", view.join_keys).encode([range(500)])

        async def scenario() -> None:
            connection = open_connection(address("s3cret"))
            await connection.connect()
            (found,) = await connection.read_hashes([(HashFields([layout.feature_field("v", "a")]), keys)])
            assert layout.decode_column([cell for (cell,) in found], Dtype.DOUBLE) == [1.5] * 500
            await connection.close()
            wrong = open_connection(address("wrong"))
            with pytest.raises(RedisAccessDenied):
                await wrong.connect()
            await wrong.close()

        asyncio.run(scenario())


def test_a_server_that_is_no_cluster_and_an_option_unknown_are_refused(tmp_path: Path) -> None:
    async def scenario(address: RedisAddress) -> None:
        connection = open_connection(address)
        with pytest.raises(RedisReplyError, match="cluster support disabled"):
            await connection.connect()
        await connection.close()

    with Valkey(tmp_path) as server:
        asyncio.run(scenario(RedisAddress(hosts=(("127.0.0.1", server.port),), kind="cluster")))
    with pytest.raises(InvalidRepository, match="colour"):
        open_connection(RedisAddress(hosts=(("127.0.0.1", 1),), kind="cluster", options={"colour": "red"}))
