"""Rows of new keys written by RESTORE: the hashes are those of HSET, and newer still wins, atomically."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import core.write
from core import layout
from core.errors import LeaseLost, RedisReplyError
from core.layout_rows import EncodedRows
from core.repository import Feature, View
from core.types import Dtype, Field
from core.write import Fence, OnlineWriter, WriteResult, created_times_key, encode_rows
from tests.support.valkey import SentinelTrio, Valkey
from tests.support.waiting import PATIENCE_SECONDS

SECOND = 1_000_000_000
NOW = 1_760_000_000 * SECOND
KEYS = (Field("user_id", Dtype.INT64),)
TYPES = {"number": Dtype.DOUBLE, "single": Dtype.FLOAT, "text": Dtype.STRING, "count": Dtype.INT64}


def a_view(name: str = "behavior") -> View:
    features = tuple(Feature(name, dtype, {}) for name, dtype in TYPES.items())
    return View(name=name, stored_name=name, join_keys=KEYS, features=features, ttl=timedelta(0))


VIEW = a_view()


def rows(users: Sequence[int], version: int = 0, *, texts: Sequence[str | None] | None = None) -> EncodedRows:
    """Rows that say in every feature which version they are, a fifth with nulls."""
    columns = {
        "user_id": users,
        "number": [float(version)] * len(users),
        "single": [None if user % 5 == 0 else float(version) for user in users],
        "text": texts or [f"{version}" for _ in users],
        "count": [None if user % 5 == 1 else version - (1 << 40) for user in users],
    }
    return encode_rows("shop", VIEW, columns, [NOW + version * 1000] * len(users))


def key_of(user: int) -> bytes:
    return layout.EntityKeys("shop", KEYS).encode([[user]])[0]


def versions(client: Any, users: Sequence[int]) -> set[tuple[Any, Any, Any]]:
    """What the users' rows say of their version: the number, the text, the event timestamp."""
    fields = [layout.feature_field("behavior", name) for name in ("number", "text")]
    pipeline = client.pipeline(transaction=False)
    for user in users:
        pipeline.hmget(key_of(user), [*fields, layout.timestamp_field("behavior")])
    return {
        (
            layout.decode_value(number, Dtype.DOUBLE),
            layout.decode_value(text, Dtype.STRING),
            (layout.decode_timestamp(event) - NOW) // 1000,
        )
        for number, text, event in pipeline.execute()
    }


def calls(client: Any, command: str) -> int:
    """How often the server has run a command without refusing it."""
    stats = client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})
    return int(stats["calls"]) - int(stats.get("failed_calls", 0)) - int(stats.get("rejected_calls", 0))


@pytest.fixture
def server(server: Valkey, monkeypatch: pytest.MonkeyPatch) -> Valkey:
    monkeypatch.setattr("core.restore.LEAST_ROWS", 1)
    with server.client() as client:
        client.config_resetstat()
    return server


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """RESTORE is tried though most keys exist."""
    monkeypatch.setattr("core.restore.TAKEN_SHARE", 2.0)


@pytest.fixture
def writer(server: Valkey) -> Iterator[OnlineWriter]:
    with OnlineWriter(server.address(), "shop") as writer:
        yield writer


WAYS = pytest.mark.parametrize("dated", [False, True], ids=["undated", "dated"])


def write(writer: OnlineWriter, batch: EncodedRows, *, dated: bool = False, **options: Any) -> WriteResult:
    created = [5] * len(batch) if dated else None
    return writer.write("behavior", batch, created_ns=created, distinct=True, **options)


@WAYS
def test_new_keys_are_restored_to_what_hset_would_have_made(
    server: Valkey, writer: OnlineWriter, monkeypatch: pytest.MonkeyPatch, dated: bool
) -> None:
    users = list(range(2000))
    texts = [None if user % 7 == 0 else "x" * (user % 63) for user in users]
    assert write(writer, rows(users, texts=texts), dated=dated) == WriteResult(2000)
    with server.client(db=1) as other, server.client() as client:
        restored, kept = calls(client, "restore"), [client.hgetall(key_of(user)) for user in users]
        assert restored >= 1950  # all but those whose text does not fit, and the probe
        monkeypatch.setattr("core.restore.LEAST_ROWS", 1 << 30)
        with OnlineWriter(server.address(db=1), "shop") as plain:
            write(plain, rows(users, texts=texts), dated=dated)
        assert calls(client, "restore") == restored
        used = [0, 0]
        for user, fields in zip(users, kept, strict=True):
            key = key_of(user)
            assert other.hgetall(key) == fields
            assert other.object("encoding", key) == client.object("encoding", key)
            used[0] += client.memory_usage(key)
            used[1] += other.memory_usage(key)
        # The allocator hands out a few bytes more or less than asked for, so keys differ singly.
        assert used[0] < 1.01 * used[1], used
        assert sorted(other.keys()) == sorted(client.keys())  # no probe is left behind


@pytest.mark.usefixtures("always")
@WAYS
def test_the_rows_of_keys_that_exist_are_compared(server: Valkey, writer: OnlineWriter, dated: bool) -> None:
    write(writer, rows(range(0, 600, 2), 5), dated=dated)
    assert write(writer, rows(range(600), 3), dated=dated) == WriteResult(written=300, older=300)
    assert write(writer, rows(range(900), 7), dated=dated) == WriteResult(written=900)
    with server.client() as client:
        assert versions(client, range(900)) == {(7.0, "7", 7)}


@WAYS
def test_keys_that_hold_another_view_only_gain_this_one(
    server: Valkey, writer: OnlineWriter, dated: bool
) -> None:
    other = encode_rows(
        "shop",
        a_view("profile"),
        {"user_id": range(500), **dict.fromkeys(TYPES, [None] * 500)},
        [NOW + 9 * SECOND] * 500,
    )
    writer.write("profile", other, distinct=True)
    assert write(writer, rows(range(1000), 3), dated=dated) == WriteResult(1000)
    with server.client() as client:
        assert versions(client, range(1000)) == {(3.0, "3", 3)}
        assert [client.hlen(key_of(user)) for user in (0, 499, 500, 999)] == [10, 10, 5, 5]


def test_a_batch_of_known_keys_is_not_tried(server: Valkey, writer: OnlineWriter) -> None:
    write(writer, rows(range(500), 1))
    with server.client() as client:
        before = calls(client, "restore")
        assert write(writer, rows(range(500), 2)) == WriteResult(500)
        assert client.info("errorstats").get("errorstat_BUSYKEY") is None
        assert calls(client, "restore") == before


def test_a_restored_rows_created_timestamp_settles_ties(server: Valkey, writer: OnlineWriter) -> None:
    def write_at(text: str, created: int) -> WriteResult:
        batch = rows(range(100), 1, texts=[text] * 100)
        return writer.write("behavior", batch, created_ns=[created] * 100, distinct=True)

    assert write_at("a", 10).written == 100
    with server.client() as client:
        side = created_times_key("shop", "behavior", key_of(7))
        event = client.hget(key_of(7), layout.timestamp_field("behavior"))
        assert client.hget(side, key_of(7)) == b"%020d" % (10 + (1 << 63)) + event
    assert write_at("b", 9) == WriteResult(older=100)
    assert write_at("c", 11) == WriteResult(100)
    with server.client() as client:
        assert versions(client, range(100)) == {(1.0, "c", 1)}


@WAYS
def test_a_restored_key_expires_by_key_ttl_seconds(server: Valkey, dated: bool) -> None:
    with OnlineWriter(server.address(), "shop", key_ttl_seconds=500) as writer, server.client() as client:
        assert write(writer, rows(range(300)), dated=dated).written == 300
        assert calls(client, "restore") >= 300
        assert {400 < client.ttl(key) <= 500 for key in client.scan_iter(count=1000)} == {True}
        assert client.dbsize() == 300 * (1 + dated)


@WAYS
def test_a_writer_whose_lease_was_taken_over_restores_nothing(
    server: Valkey, writer: OnlineWriter, dated: bool
) -> None:
    fence = Fence(b"lease", b"mine")
    with server.client() as client:
        client.set(b"lease", b"mine")
        assert write(writer, rows(range(100)), dated=dated, fence=fence).written == 100
        client.set(b"lease", b"theirs")
        size = client.dbsize()
        with pytest.raises(LeaseLost):
            write(writer, rows(range(100, 200)), dated=dated, fence=fence)
        assert client.dbsize() == size


@WAYS
def test_nothing_is_restored_after_the_lease_was_taken_over(
    server: Valkey, writer: OnlineWriter, dated: bool
) -> None:
    """The keys there are when another run takes the lease are all there ever are, wherever the writer is."""
    with server.client() as client:
        client.set(b"lease", b"mine")

        def take_over() -> int:
            while client.dbsize() < 1000 and not written.done():
                pass
            pipeline = client.pipeline(transaction=True)
            pipeline.set(b"lease", b"theirs")
            pipeline.dbsize()
            return int(pipeline.execute()[1])

        with ThreadPoolExecutor(1) as executor:
            batch, fence = rows(range(20_000)), Fence(b"lease", b"mine")
            written = executor.submit(write, writer, batch, dated=dated, fence=fence)
            size = take_over()
            error = written.exception()
        assert error is None or isinstance(error, LeaseLost)
        assert client.dbsize() == size


def test_a_lease_that_is_renewed_all_the_time_lets_every_row_through(
    server: Valkey, writer: OnlineWriter
) -> None:
    with server.client() as client:
        client.set(b"lease", b"mine")
        with ThreadPoolExecutor(1) as executor:
            batch, fence = rows(range(5000)), Fence(b"lease", b"mine")
            written = executor.submit(write, writer, batch, fence=fence)
            while not written.done():
                client.pexpire(b"lease", 30_000)
                time.sleep(0.001)
        assert written.result() == WriteResult(5000)
        assert versions(client, range(5000)) == {(0.0, "0", 0)}
        assert calls(client, "exec") > 5000 // 64


def test_without_the_check_new_keys_are_restored_and_others_overwritten(server: Valkey) -> None:
    with OnlineWriter(server.address(), "shop", unchecked=True) as writer, server.client() as client:
        write(writer, rows(range(400), 5))
        assert calls(client, "restore") >= 400
        assert write(writer, rows(range(700), 3)) == WriteResult(700)
        assert versions(client, range(700)) == {(3.0, "3", 3)}


@pytest.mark.parametrize(
    "settings",
    [
        ["user default on nopass ~* &* +@all -restore"],
        ["user default on nopass ~* &* +@all -dump"],
        ["user default on nopass ~* &* +@all -exists"],
        ["user default on nopass %RW~*shop %RW~lease &* +@all"],
        ["hash-max-listpack-entries 4"],
        ["hash-max-listpack-value 63"],
    ],
    ids=["restore", "dump", "exists", "probe", "entries", "value"],
)
def test_where_restore_is_refused_or_would_store_otherwise_rows_go_by_hset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    monkeypatch.setattr("core.restore.LEAST_ROWS", 1)
    with Valkey(tmp_path, *settings) as server, OnlineWriter(server.address(), "shop") as writer:
        assert write(writer, rows(range(500), 1)).written == 500
        assert write(writer, rows(range(1000), 2)).written == 1000
        with server.client() as client:
            assert versions(client, range(1000)) == {(2.0, "2", 2)}
            assert client.dbsize() == 1000
            assert calls(client, "restore") <= 1  # the probe's
            if "entries" in settings[0]:
                assert client.object("encoding", key_of(1)) == b"hashtable"


@pytest.mark.parametrize("sanitize", ["yes", "no", "clients"])
def test_a_server_that_looks_closely_at_what_it_restores_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sanitize: str
) -> None:
    monkeypatch.setattr("core.restore.LEAST_ROWS", 1)
    settings = f"sanitize-dump-payload {sanitize}"
    with Valkey(tmp_path, settings) as server, OnlineWriter(server.address(), "shop") as writer:
        assert write(writer, rows(range(1000))).written == 1000
        with server.client() as client:
            assert calls(client, "restore") == 1001


def test_a_permission_that_is_taken_away_in_between_changes_nothing(
    server: Valkey, writer: OnlineWriter
) -> None:
    write(writer, rows(range(300), 1))
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-restore")
        try:
            assert write(writer, rows(range(300, 900), 1)).written == 600
            assert write(writer, rows(range(900, 1200), 1)).written == 300
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+restore")
        assert versions(client, range(1200)) == {(1.0, "1", 1)}


def test_a_key_of_another_type_is_an_error_that_names_it(server: Valkey, writer: OnlineWriter) -> None:
    with server.client() as client:
        client.set(key_of(900), "not a hash")
        with pytest.raises(RedisReplyError, match="WRONGTYPE") as caught:
            write(writer, rows(range(1000)))
        assert caught.value.details["rows_written"] == client.dbsize() - 1 == 999


@pytest.mark.usefixtures("always")
@WAYS
def test_writers_that_race_for_new_keys_leave_the_newest_row(server: Valkey, dated: bool) -> None:
    """Round by round four writers, one of them Feast's plain HSET, meet on keys that nobody has yet.

    The plain one writes the newest version, as it would overwrite a newer one itself.
    """
    users, rounds = 300, 25
    rng = random.Random(3)
    start = threading.Barrier(4)

    def restore(mine: Sequence[int]) -> None:
        with OnlineWriter(server.address(), "shop") as writer:
            for number, version in enumerate(mine):
                batch = rows(range(number * users, (number + 1) * users), version)
                start.wait(PATIENCE_SECONDS)
                write(writer, batch, dated=dated)

    def script(mine: Sequence[int]) -> None:
        with OnlineWriter(server.address(), "shop") as writer:
            for number, version in enumerate(mine):
                begin = number * users
                parts = [rows(range(begin + at, begin + at + 30), version) for at in range(0, users, 30)]
                start.wait(PATIENCE_SECONDS)
                for part in parts:
                    plain = EncodedRows(part.rows, part.key, part.fields, part.field_count, part.event_ns)
                    writer.write("behavior", plain, created_ns=[5] * len(plain) if dated else None)

    def hset(newest: int) -> None:
        names = [layout.timestamp_field("behavior")]
        names += [layout.feature_field("behavior", name) for name in TYPES]
        cells = [layout.encode_timestamp(NOW + newest * 1000)]
        cells += [
            layout.encode_value(value, dtype)
            for value, dtype in zip((float(newest), None, f"{newest}", None), TYPES.values(), strict=True)
        ]
        mapping = dict(zip(names, cells, strict=True))
        with server.client() as client:
            for number in range(rounds):
                order = list(range(number * users, (number + 1) * users))
                rng.shuffle(order)
                start.wait(PATIENCE_SECONDS)
                for user in order[: users // 2]:
                    client.hset(key_of(user), mapping=mapping)

    orders = [[rng.randrange(1, 9) for _ in range(rounds)] for _ in range(3)]
    with ThreadPoolExecutor(4) as executor:
        racing = [executor.submit(restore, orders[0]), executor.submit(restore, orders[1])]
        racing += [executor.submit(script, orders[2]), executor.submit(hset, 9)]
        for outcome in racing:
            outcome.result()
    with server.client() as client:
        assert calls(client, "restore") > users * rounds // 20, "hardly a key was restored"
        assert client.info("errorstats")["errorstat_BUSYKEY"]["count"] > users, "hardly a key was raced for"
        for number in range(rounds):
            newest = max(order[number] for order in orders)
            found = versions(client, range(number * users, (number + 1) * users))
            assert found <= {(9.0, "9", 9), (float(newest), f"{newest}", newest)}
            assert (9.0, "9", 9) in found


def test_restored_rows_survive_a_failover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.restore.LEAST_ROWS", 1)
    # As long as a failover takes on a slow machine.
    monkeypatch.setattr("core.write.RETRY_DELAYS_SECONDS", (*core.write.RETRY_DELAYS_SECONDS, *[1.0] * 60))
    with SentinelTrio(tmp_path) as trio, OnlineWriter(trio.address(), "shop") as writer:
        write(writer, rows(range(300), 1))
        trio.master.kill()
        assert write(writer, rows(range(600), 2)).written == 600
        with trio.master.client() as client:
            assert versions(client, range(600)) == {(2.0, "2", 2)}
