"""`banquet clean`: what no definition claims goes, all else stays, whoever writes or dies meanwhile."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from core import layout
from core.errors import Conflict
from core.redis import RedisAddress
from core.repository import FeastRepository, stored_views
from core.types import Dtype, Field
from core.write import OnlineWriter, created_times_key, encode_rows
from materialization.clean import CleanReport, _Cleaning, clean
from materialization.ledger import ledger_keys
from tests.support.registered import AView, register, registry_of, repository
from tests.support.valkey import Cluster, SentinelTrio, Valkey

ROOT = Path(__file__).parents[2]
QUICK = 10_000_000
HOUR = timedelta(hours=1)


@pytest.fixture
def server(valkey: Valkey) -> Iterator[Valkey]:
    """The session's server, emptied: these tests count keys."""
    with valkey.client(db=7) as client:
        client.flushdb()
        yield valkey
        client.flushdb()


@pytest.fixture
def shop(server: Valkey, tmp_path: Path) -> FeastRepository:
    return a_repository(server, tmp_path / "shop", "fraud")


def a_repository(server: Valkey, path: Path, project: str, **options: Any) -> FeastRepository:
    repo = repository(path, server.address(), project, **options)
    text = (path / "feature_store.yaml").read_text().replace(f":{server.port}", f":{server.port},db=7")
    (path / "feature_store.yaml").write_text(text)
    return FeastRepository.open(repo.path)


def write(
    repo: FeastRepository,
    view: AView,
    users: Sequence[int] = (1, 2, 3),
    *,
    age: timedelta = timedelta(0),
    created: bool = False,
) -> list[bytes]:
    """A row per user into a view, whether or not the registry has it; returns the keys."""
    stored = stored_views(registry_of(repo, [view]), repo.config)[0]
    event_ns = (time.time_ns() - int(age.total_seconds() * 1e9)) // 1000 * 1000
    columns: dict[str, list[Any]] = {
        name: [f"{name}{user}" if dtype is Dtype.STRING else user for user in users]
        for name, dtype in view.join_keys.items()
    }
    columns |= {name: [float(user) for user in users] for name in view.features}
    rows = encode_rows(repo.project, stored, columns, [event_ns] * len(users))
    with OnlineWriter(repo.redis, repo.project) as writer:
        writer.write(stored.stored_name, rows, created_ns=[event_ns] * len(users) if created else None)
    return rows.keys()


def contents(repo: FeastRepository) -> dict[bytes, dict[bytes, bytes]]:
    """Every hash in the database."""
    with repo.redis.session() as client:
        return {key: client.hgetall(key) for key in client.scan_iter(_type="hash")}


def run(repo: FeastRepository, **options: Any) -> CleanReport:
    return clean(repo, keys_per_second=QUICK, **options)


PROFILE = AView("profile")
BEHAVIOR = AView("behavior", ttl=HOUR)
VISITS = AView("visits", join_keys={"user_id": Dtype.INT64, "store": Dtype.STRING})
CLIMATE = AView("climate", join_keys={})


def test_a_removed_view_loses_its_rows_and_the_others_keep_theirs(shop: FeastRepository) -> None:
    """Single and composite keys and no entity at all; a hash left empty is gone."""
    everything = [PROFILE, BEHAVIOR, VISITS, CLIMATE]
    for view in everything:
        write(shop, view, [1] if view is CLIMATE else [1, 2, 3])
    before = contents(shop)
    for removed in (BEHAVIOR, VISITS, CLIMATE):
        everything.remove(removed)
        register(shop, everything)
        report = run(shop)
        assert list(report.removed_views) == [removed.name]
    assert run(shop).fields == 0
    kept = contents(shop)
    assert len(kept) == 3
    wanted = {layout.timestamp_field("profile"), *(layout.feature_field("profile", f) for f in "ab")}
    for key, fields in kept.items():
        assert fields == {name: before[key][name] for name in wanted}


def test_a_removed_feature_loses_its_field_only(shop: FeastRepository) -> None:
    keys = write(shop, PROFILE)
    register(shop, [AView("profile", features=["a"])])
    report = run(shop)
    assert (report.features, report.fields, report.keys) == (3, 3, 0)
    found = contents(shop)
    for key in keys:
        assert set(found[key]) == {layout.timestamp_field("profile"), layout.feature_field("profile", "a")}


def test_rows_past_their_ttl_go_after_the_grace(shop: FeastRepository) -> None:
    write(shop, PROFILE, [1, 2])
    write(shop, BEHAVIOR, [1], age=2 * HOUR, created=True)
    write(shop, BEHAVIOR, [2], age=HOUR / 2, created=True)
    (gone,) = write(shop, BEHAVIOR, [4], age=2 * HOUR, created=True)
    register(shop, [PROFILE, BEHAVIOR])
    assert run(shop, expired_for=2 * HOUR).fields == 0
    report = run(shop)
    assert report.expired == {"behavior": 2}
    assert (report.fields, report.keys) == (6, 1)
    found = contents(shop)
    assert gone not in found
    with shop.redis.session() as client:  # what the writer remembered of the row is gone as well
        assert not client.exists(created_times_key("fraud", "behavior", gone))
    rows = [key for key, fields in found.items() if layout.timestamp_field("behavior") in fields]
    assert rows == layout.EntityKeys("fraud", (Field("user_id", Dtype.INT64),)).encode([[2]])


@pytest.mark.parametrize(("ours", "theirs"), [("fraud", "prodfraud"), ("prodfraud", "fraud")])
def test_a_project_whose_name_ends_like_ours_keeps_every_byte(
    server: Valkey, tmp_path: Path, ours: str, theirs: str
) -> None:
    """Same views, same entities, same join keys; only a key read in full tells them apart (trap 8)."""
    mine = a_repository(server, tmp_path / "mine", ours)
    other = a_repository(server, tmp_path / "other", theirs)
    for view in (PROFILE, BEHAVIOR, VISITS):
        write(other, view, age=2 * HOUR, created=True)
    with other.redis.session() as client:
        client.hset(ledger_keys(theirs, "behavior")[0], "report", "{}")
        client.hset("session:fraud", mapping={"abcd": "1", "_ts:behavior": "2"})
        client.set("counter:fraud", 1)
    theirs_before = contents(other)
    for view in (PROFILE, BEHAVIOR, VISITS):
        write(mine, view, age=2 * HOUR, created=True)
    register(mine, [])
    report = run(mine, whole_project=True)
    assert report.removed_views == {"profile": 3, "behavior": 3, "visits": 3}
    assert contents(other) == theirs_before


def test_the_statistics_of_a_rollout_stay(shop: FeastRepository) -> None:
    write(shop, PROFILE)
    register(shop, [])
    key = "banquet:trial:{fraud:model:1}"
    with shop.redis.session() as client:
        for name in (f"{key}:counts:champion:100", f"{key}:fraud", f"{key}:fraud:ledger"):
            client.hset(name, "rows", 1)
    assert run(shop, whole_project=True).removed_views == {"profile": 3}
    assert len(contents(shop)) == 3


def test_a_registry_without_views_does_not_empty_the_store(shop: FeastRepository) -> None:
    write(shop, PROFILE)
    register(shop, [])
    with pytest.raises(Conflict, match="every row"):
        run(shop)
    assert len(contents(shop)) == 3


def test_a_dry_run_removes_nothing_and_says_what_a_run_then_does(shop: FeastRepository) -> None:
    users = range(2000)
    write(shop, PROFILE, users)
    write(shop, BEHAVIOR, range(0, 2000, 2))
    write(shop, VISITS, range(500))
    register(shop, [PROFILE])
    before = contents(shop)
    planned = run(shop, dry_run=True)
    assert contents(shop) == before
    with shop.redis.session() as client:
        used = sum(client.memory_usage(key, samples=0) for key in before)
        done = run(shop)
        freed = used - sum(client.memory_usage(key, samples=0) for key in contents(shop))
    assert (done.removed_views, done.fields, done.keys) == (
        planned.removed_views,
        planned.fields,
        planned.keys,
    )
    assert done.removed_views == {"behavior": 1000, "visits": 500}
    assert done.keys == 500
    assert planned.bytes is not None
    assert abs(planned.bytes - freed) < 0.2 * freed


def test_what_is_not_served_but_registered_stays(server: Valkey, tmp_path: Path) -> None:
    """Disabled views, versions on record, precomputed vectors, fields and hashes that are not Feast's."""
    repo = a_repository(server, tmp_path / "repo", "fraud", versioned=True)
    old, new = AView("profile", version=1), AView("profile", features=["b", "c"], version=2)
    first = AView("profile", features=["z"])
    disabled = AView("paused", disabled=True)
    vectors = AView("__precomputed__everything", features=["vector"])
    dropped = AView("profile", features=["q"], version=3)
    for view in (first, disabled, vectors):
        write(repo, view)
    for view in (old, new, dropped):
        write_version(repo, view)
    with repo.redis.session() as client:
        (key,) = layout.EntityKeys("fraud", (Field("user_id", Dtype.INT64),)).encode([[1]])
        client.hset(key, "a note", "mine")
        client.hset(b"\x01\x00\x00\x00fraud", "abcd", "1")
    register(repo, [new, disabled], history=[first, old, new], services=["everything"])
    report = run(repo)
    assert report.removed_views == {"profile_v3": 3}
    assert report.fields == 6
    assert contents(repo)[key][b"a note"] == b"mine"


def write_version(repo: FeastRepository, view: AView) -> None:
    """A row under the versioned name."""
    write(repo, AView(f"{view.name}_v{view.version}", features=view.features))


def test_a_join_key_of_another_type_or_name_orphans_the_rows(shop: FeastRepository) -> None:
    write(shop, PROFILE)
    register(shop, [AView("profile", join_keys={"user_id": Dtype.INT32})])
    assert run(shop).removed_views == {"profile": 3}
    write(shop, PROFILE)
    register(shop, [AView("profile", join_keys={"buyer_id": Dtype.INT64})])
    assert run(shop).removed_views == {"profile": 3}
    write(shop, PROFILE)
    register(shop, [PROFILE])
    assert run(shop).fields == 0


def test_ledgers_of_removed_views_go_first_and_those_of_living_views_stay(shop: FeastRepository) -> None:
    write(shop, PROFILE)
    write(shop, BEHAVIOR, created=True)
    held = AView("held")
    write(shop, held)
    with shop.redis.session() as client:
        for view in ("profile", "behavior", "held"):
            client.hset(ledger_keys("fraud", view)[0], "report", "{}")
        client.set(ledger_keys("fraud", "held")[1], "somebody", ex=60)
    register(shop, [PROFILE])
    report = run(shop)
    assert report.ledgers == ["behavior"]
    assert report.busy == ["held"]
    with shop.redis.session() as client:
        left = set(client.scan_iter("banquet:*", _type="hash"))
        assert left == {ledger_keys("fraud", view)[0] for view in ("profile", "held")}
        client.delete(ledger_keys("fraud", "held")[1])
    assert run(shop).ledgers == ["held"]
    assert {field for fields in contents(shop).values() for field in fields if field.startswith(b"_ts")} == {
        b"_ts:profile"
    }


def test_a_row_rewritten_between_look_and_removal_survives(shop: FeastRepository) -> None:
    """The row is renewed after the cleaning has seen it expired, by a command that gets in between."""
    keys = write(shop, BEHAVIOR, range(200), age=2 * HOUR)
    register(shop, [BEHAVIOR])

    class Interrupted(_Cleaning):
        def _measure(self, node: Any, work: Any) -> None:
            write(shop, BEHAVIOR, range(0, 200, 2))
            super()._measure(node, work)

    report = Interrupted(shop, False, timedelta(0), QUICK, False, None).run()
    assert report.rewritten == 100
    assert report.expired == {"behavior": 100}
    assert set(contents(shop)) == set(keys[::2])
    assert run(shop).fields == 0


def test_a_writer_that_races_with_clean_loses_no_row(shop: FeastRepository) -> None:
    """Rows expire and are renewed all the time; whatever was written last and is fresh must be there."""
    users = list(range(40))
    register(shop, [BEHAVIOR])

    class Slow(_Cleaning):
        def _measure(self, node: Any, work: Any) -> None:
            super()._measure(node, work)
            time.sleep(0.005)  # time enough between look and removal for the writer to come in between

    stop = threading.Event()
    failures: list[int] = []
    pause = random.Random(1)

    def renew() -> None:
        while not stop.is_set():
            keys = write(shop, BEHAVIOR, users, age=2 * HOUR)
            time.sleep(pause.uniform(0, 0.01))
            write(shop, BEHAVIOR, users)
            found = contents(shop)
            failures.extend(
                user for user, key in zip(users, keys, strict=True) if len(found.get(key, {})) != 3
            )
            with shop.redis.session() as client:
                client.delete(*keys)

    writer = threading.Thread(target=renew)
    writer.start()
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            Slow(shop, False, timedelta(0), QUICK, False, None).run()
    finally:
        stop.set()
        writer.join()
    assert failures == []


def test_a_view_applied_meanwhile_keeps_its_rows(shop: FeastRepository) -> None:
    """The definitions are looked at again before anything is removed."""
    write(shop, PROFILE)
    register(shop, [BEHAVIOR])

    class Interrupted(_Cleaning):
        def _measure(self, node: Any, work: Any) -> None:
            register(shop, [BEHAVIOR, PROFILE])
            super()._measure(node, work)

    report = Interrupted(shop, False, timedelta(0), QUICK, False, None).run()
    assert (report.rewritten, report.fields) == (3, 0)
    assert len(contents(shop)) == 3


def test_a_killed_clean_is_finished_by_the_next(shop: FeastRepository) -> None:
    write(shop, PROFILE, range(20_000))
    write(shop, BEHAVIOR, range(20_000))
    register(shop, [PROFILE])
    script = (
        "import sys; from pathlib import Path; from core.repository import FeastRepository;"
        "from materialization.clean import clean;"
        "clean(FeastRepository.open(Path(sys.argv[1])), keys_per_second=20_000,"
        " observe=lambda p: p.fields and (print(p.fields, flush=True), sys.stdin.read()))"
    )
    command = [sys.executable, "-c", script, str(shop.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdin is not None
    assert int(process.stdout.readline())  # it has removed some, and waits
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    rows = sum(layout.timestamp_field("behavior") in fields for fields in contents(shop).values())
    assert 0 < rows < 20_000
    report = run(shop)
    assert report.removed_views == {"behavior": rows}
    assert all(len(fields) == 3 for fields in contents(shop).values())


def test_the_load_is_bounded(shop: FeastRepository) -> None:
    """10,000 keys at 20,000 a second take half a second for the ledgers and half a second for the rows."""
    write(shop, PROFILE, range(10_000))
    register(shop, [PROFILE])
    began = time.monotonic()
    clean(shop, keys_per_second=20_000)
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_behind_sentinel_and_on_a_cluster(kind: str, tmp_path: Path) -> None:
    servers: Any = SentinelTrio(tmp_path / "servers") if kind == "sentinel" else Cluster(tmp_path / "servers")
    with servers:
        address: RedisAddress = servers.address()
        mine = repository(tmp_path / "mine", address, "fraud")
        other = repository(tmp_path / "other", address, "prodfraud")
        write(other, BEHAVIOR, range(300), age=2 * HOUR)
        write(mine, PROFILE, range(300))
        write(mine, BEHAVIOR, range(300), age=2 * HOUR, created=True)
        write(mine, VISITS, range(300))
        theirs = {key: fields for key, fields in contents(mine).items() if key.endswith(b"prodfraud")}
        with mine.redis.session() as client:
            client.hset(ledger_keys("fraud", "visits")[0], "report", "{}")
        register(mine, [PROFILE, BEHAVIOR])
        report = run(mine)
        assert report.expired == {"behavior": 300}
        assert report.removed_views == {"visits": 300}
        assert report.ledgers == ["visits"]
        found = contents(mine)
        assert {key: fields for key, fields in found.items() if key.endswith(b"prodfraud")} == theirs
        assert len(found) == 600
