"""The sole online write on a real Valkey: newer wins, atomically, in Feast's own bytes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

import core.write
from core import layout
from core.errors import LeaseLost, RedisAccessDenied, RedisReplyError, RedisUnavailable
from core.layout_rows import EncodedRows
from core.redis import RedisAddress
from core.repository import Feature, View
from core.types import Dtype, Field
from core.write import Fence, OnlineWriter, WriteResult, encode_rows
from tests.support.valkey import Cluster, SentinelTrio, Valkey, certificate, tls_front

SECOND = 1_000_000_000
NOW = 1_760_000_000 * SECOND


def a_view(name: str = "behavior", features: int = 2) -> View:
    return View(
        name=name,
        stored_name=name,
        join_keys=(Field("user_id", Dtype.INT64),),
        features=tuple(Feature(f"f{i}", Dtype.DOUBLE, {}) for i in range(features)),
        ttl=timedelta(0),
    )


VIEW = a_view()


def rows(
    ids: Sequence[int], values: Sequence[float], event_ns: Sequence[int], view: View = VIEW
) -> EncodedRows:
    columns = {"user_id": ids, **{f.name: values for f in view.features}}
    return encode_rows("shop", view, columns, event_ns)


def stored(client: object, user: int, view: View = VIEW) -> tuple[float | None, int | None]:
    """The first feature's value and the event timestamp in Redis."""
    (key,) = layout.EntityKeys("shop", view.join_keys).encode([[user]])
    fields = [layout.feature_field(view.stored_name, "f0"), layout.timestamp_field(view.stored_name)]
    cell, event = client.hmget(key, fields)  # type: ignore[attr-defined]
    return layout.decode_value(cell, Dtype.DOUBLE), layout.decode_timestamps([event])[0]


@pytest.fixture
def writer(server: Valkey) -> Iterator[OnlineWriter]:
    with OnlineWriter(server.address(), "shop") as writer:
        yield writer


WAYS = pytest.mark.parametrize("distinct", [True, False], ids=["optimistic", "script"])


@WAYS
def test_an_older_row_never_replaces_a_newer_one(
    server: Valkey, writer: OnlineWriter, distinct: bool
) -> None:
    users = list(range(1000))
    assert (
        writer.write("behavior", rows(users, [1.0] * 1000, [NOW] * 1000), distinct=distinct).written == 1000
    )
    mixed = [NOW - SECOND if user % 2 else NOW + SECOND for user in users]
    found = writer.write("behavior", rows(users, [2.0] * 1000, mixed), distinct=distinct)
    assert found == WriteResult(written=500, older=500)
    with server.client() as client:
        for user in (0, 1, 998, 999):
            expected = (1.0, NOW) if user % 2 else (2.0, NOW + SECOND)
            assert stored(client, user) == expected


@WAYS
@pytest.mark.parametrize(
    ("old", "new", "wins"),
    [
        (NOW, NOW + 1000, True),
        (NOW, NOW - 1000, False),
        (-5 * SECOND, -4 * SECOND - 1000, True),
        (-4 * SECOND, -5 * SECOND, False),
        (-SECOND, 0, True),
        (0, -1000, False),
        (0, 1000, True),
        (NOW + 999_999_000, NOW + SECOND, True),
        (-62_135_596_800 * SECOND // 10, NOW, True),
    ],
)
def test_event_timestamps_compare_to_the_microsecond_before_and_after_1970(
    server: Valkey, writer: OnlineWriter, distinct: bool, old: int, new: int, wins: bool
) -> None:
    writer.write("behavior", rows([1], [1.0], [old]), distinct=distinct)
    writer.write("behavior", rows([1], [2.0], [new]), distinct=distinct)
    with server.client() as client:
        assert stored(client, 1) == ((2.0, new) if wins else (1.0, old))


@WAYS
def test_without_created_timestamps_the_later_write_settles_a_tie(
    server: Valkey, writer: OnlineWriter, distinct: bool
) -> None:
    for value in (1.0, 2.0):
        assert writer.write("behavior", rows([1], [value], [NOW]), distinct=distinct).written == 1
    with server.client() as client:
        assert stored(client, 1) == (2.0, NOW)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [(10, 11, 2.0), (11, 10, 1.0), (10, 10, 2.0), (None, 10, 2.0), (10, None, 1.0), (-10, -9, 2.0)],
)
def test_created_timestamps_settle_a_tie(
    server: Valkey, writer: OnlineWriter, first: int | None, second: int | None, value: float
) -> None:
    writer.write("behavior", rows([1], [1.0], [NOW]), created_ns=[first])
    writer.write("behavior", rows([1], [2.0], [NOW]), created_ns=[second])
    with server.client() as client:
        assert stored(client, 1) == (value, NOW)


def test_a_created_timestamp_of_an_earlier_event_decides_nothing(
    server: Valkey, writer: OnlineWriter
) -> None:
    writer.write("behavior", rows([1], [1.0], [NOW]), created_ns=[99])
    writer.write("behavior", rows([1], [2.0], [NOW + SECOND]), created_ns=[5])
    writer.write("behavior", rows([1], [3.0], [NOW + SECOND]), created_ns=[6])
    with server.client() as client:
        assert stored(client, 1) == (3.0, NOW + SECOND)


def test_rows_of_one_write_that_share_a_key_are_settled_in_order(
    server: Valkey, writer: OnlineWriter
) -> None:
    writer.write("behavior", rows([1, 1, 1], [1.0, 3.0, 2.0], [NOW, NOW + SECOND, NOW]))
    with server.client() as client:
        assert stored(client, 1) == (3.0, NOW + SECOND)


@WAYS
def test_views_of_one_key_do_not_disturb_each_other(
    server: Valkey, writer: OnlineWriter, distinct: bool
) -> None:
    other = a_view("profile")
    writer.write("behavior", rows([1], [1.0], [NOW]), distinct=distinct)
    writer.write("profile", rows([1], [2.0], [NOW - 9 * SECOND], other), distinct=distinct)
    with server.client() as client:
        assert stored(client, 1) == (1.0, NOW)
        assert stored(client, 1, other) == (2.0, NOW - 9 * SECOND)


@WAYS
def test_a_written_key_expires_by_key_ttl_seconds(server: Valkey, distinct: bool) -> None:
    with OnlineWriter(server.address(), "shop", key_ttl_seconds=500) as writer, server.client() as client:
        result = writer.write("behavior", rows(range(300), [1.0] * 300, [NOW] * 300), distinct=distinct)
        assert result.written == 300
        assert {400 < client.ttl(key) <= 500 for key in client.scan_iter(count=1000)} == {True}
        assert client.dbsize() == 300


def test_a_row_of_thousands_of_features_is_written_at_once(server: Valkey, writer: OnlineWriter) -> None:
    wide = a_view("wide", 5000)
    for distinct in (True, False):
        writer.write("wide", rows([1], [1.0], [NOW], wide), distinct=distinct)
    with server.client() as client:
        assert [client.hlen(key) for key in client.scan_iter()] == [5001]


@WAYS
def test_a_writer_whose_lease_was_taken_over_writes_nothing(
    server: Valkey, writer: OnlineWriter, distinct: bool
) -> None:
    with server.client() as client:
        client.set(b"lease", b"mine")
        fence = Fence(b"lease", b"mine")
        assert writer.write("behavior", rows([1], [1.0], [NOW]), distinct=distinct, fence=fence).written == 1
        client.set(b"lease", b"theirs")
        with pytest.raises(LeaseLost):
            writer.write("behavior", rows([1], [2.0], [NOW + 1]), distinct=distinct, fence=fence)
        assert stored(client, 1) == (1.0, NOW)


def test_writers_that_race_on_the_same_keys_leave_the_newest_row(server: Valkey) -> None:
    """Four writers, two ways, the same keys: whatever the interleaving, the newest row stays."""
    users, rounds = 300, 30
    versions = list(range(4 * rounds))
    random.Random(7).shuffle(versions)

    def race(mine: list[int], distinct: bool) -> None:
        with OnlineWriter(server.address(), "shop") as writer:
            for version in mine:
                batch = rows(range(users), [float(version)] * users, [NOW + version * 1000] * users)
                writer.write("behavior", batch, distinct=distinct)

    with ThreadPoolExecutor(4) as executor:
        for outcome in [executor.submit(race, versions[i::4], i % 2 == 0) for i in range(4)]:
            outcome.result()
    newest = max(versions)
    with server.client() as client:
        assert {stored(client, user) for user in range(users)} == {(float(newest), NOW + newest * 1000)}


def test_a_refused_command_is_an_error_that_names_it(server: Valkey, writer: OnlineWriter) -> None:
    (key,) = layout.EntityKeys("shop", VIEW.join_keys).encode([[7]])
    with server.client() as client:
        client.set(key, "not a hash")
    for distinct in (True, False):
        with pytest.raises(RedisReplyError, match="WRONGTYPE"):
            writer.write("behavior", rows(range(20), [1.0] * 20, [NOW] * 20), distinct=distinct)


def test_a_failed_write_says_how_many_rows_it_wrote(server: Valkey, writer: OnlineWriter) -> None:
    (key,) = layout.EntityKeys("shop", VIEW.join_keys).encode([[900]])
    with server.client() as client:
        client.set(key, "not a hash")
        with pytest.raises(RedisReplyError) as caught:
            writer.write("behavior", rows(range(1000), [1.0] * 1000, [NOW] * 1000), distinct=True)
        assert caught.value.details["rows_written"] == client.dbsize() - 1 >= 256


def test_a_wrong_password_is_refused_at_once(tmp_path: Path) -> None:
    with Valkey(tmp_path, password="right") as server:
        address = server.address(password="wrong")
        with OnlineWriter(address, "shop") as writer, pytest.raises(RedisAccessDenied):
            writer.write("behavior", rows([1], [1.0], [NOW]))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits for as long as a server takes to come back on a slow machine."""
    monkeypatch.setattr("core.write.RETRY_DELAYS_SECONDS", (*core.write.RETRY_DELAYS_SECONDS, *[1.0] * 60))


@pytest.mark.usefixtures("patient")
def test_a_server_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server, OnlineWriter(server.address(), "shop") as writer:
        writer.write("behavior", rows([1], [1.0], [NOW]))
        server.kill()
        threading.Timer(0.4, server.start).start()
        for distinct in (True, False):
            assert writer.write("behavior", rows([2], [1.0], [NOW]), distinct=distinct).written == 1


def test_a_server_that_stays_away_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.write.RETRY_DELAYS_SECONDS", (0.01, 0.01))
    with Valkey(tmp_path) as server:
        address = server.address()
    with OnlineWriter(address, "shop") as writer, pytest.raises(RedisUnavailable) as caught:
        writer.write("behavior", rows([1], [1.0], [NOW]))
    assert caught.value.details["rows_written"] == 0


@pytest.mark.usefixtures("patient")
def test_a_sentinel_failover_in_the_middle_is_survived(tmp_path: Path) -> None:
    with SentinelTrio(tmp_path) as trio, OnlineWriter(trio.address(), "shop") as writer:
        writer.write("behavior", rows(range(100), [1.0] * 100, [NOW] * 100), distinct=True)
        trio.master.kill()
        assert writer.write("behavior", rows(range(100), [2.0] * 100, [NOW + SECOND] * 100)).written == 100
        with trio.master.client() as client:
            assert stored(client, 5) == (2.0, NOW + SECOND)


def test_rows_go_through_tls(server: Valkey, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path)
    with tls_front(server, pem, key) as port:
        address = RedisAddress(hosts=(("127.0.0.1", port),), options={"ssl": True, "ssl_ca_certs": str(pem)})
        with OnlineWriter(address, "shop") as writer:
            batch = rows(range(2000), [1.0] * 2000, [NOW] * 2000)
            for distinct in (True, False):
                assert writer.write("behavior", batch, distinct=distinct).written == 2000


def test_a_cluster_gets_each_row_on_the_node_of_its_slot(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster, OnlineWriter(cluster.address(), "shop") as writer:
        users = list(range(2000))
        dated = [5] * 2000
        batch = rows(users, [1.0] * 2000, [NOW] * 2000)
        assert writer.write("behavior", batch, distinct=True, created_ns=dated).written == 2000
        older = rows(users, [2.0] * 2000, [NOW - 1000 if user < 700 else NOW for user in users])
        assert writer.write("behavior", older, created_ns=[6] * 2000) == WriteResult(1300, 700)
        with cluster.address().session() as client:
            assert {stored(client, user) for user in users[:700]} == {(1.0, NOW)}
            assert {stored(client, user) for user in users[700:]} == {(2.0, NOW)}
