"""Materialization on a real Valkey, by both doors: stock Feast's bytes, new and late rows, gate, state."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from feast import BatchFeatureView, Entity, FeatureView, Field, PushSource, ValueType
from feast.feature_view import FeatureViewState
from feast.types import Float64, String

from core import layout
from core.errors import (
    AlreadyRunning,
    GateFailed,
    InvalidRepository,
    InvalidRequest,
    InvalidSource,
    NotFound,
)
from core.repository import FeastRepository
from core.types import Dtype
from materialization.ledger import Ledger
from materialization.report import Progress, ViewReport
from materialization.run import materialize
from tests.support import table_source
from tests.support.loads import (
    MIXED_FIELDS,
    NOW,
    START,
    USER,
    a_view,
    everything,
    mixed_events,
    repository,
    values,
    write_rows,
)
from tests.support.table_source import TableSource
from tests.support.valkey import Cluster, Valkey

VALUE = Field(name="value", dtype=Float64)


@pytest.fixture
def repo(server: Valkey, tmp_path: Path) -> FeastRepository:
    """One view, ``behavior``, over the folder ``events``."""
    write_rows(
        tmp_path / "events" / "1.parquet",
        [
            (1, "2026-04-01", "2026-04-01", 1.0),
            (1, "2026-04-02", "2026-04-02", 1.5),
            (2, "2026-04-20", "2026-04-20", 2.0),
            (3, "2026-04-20", "2026-04-21", None),
        ],
    )
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "events")])
    return repo


def load(repo: FeastRepository, end: datetime = NOW, **options: Any) -> ViewReport:
    """Materialize what is due and expect no failure."""
    (report,) = materialize(repo, end=end, **options).views
    assert report.error is None, report.as_json()
    return report


def test_both_doors_write_what_stock_feast_writes(server: Valkey, tmp_path: Path) -> None:
    mixed_events().to_parquet(tmp_path / "events.parquet")
    view = a_view(tmp_path / "events.parquet", schema=MIXED_FIELDS, ttl=timedelta(days=60))
    stock = repository(tmp_path / "0", server, db=0, engine="local", offline="file")
    plugin, banquet = (repository(tmp_path / str(db), server, db=db) for db in (1, 2))
    for repo in (stock, plugin, banquet):
        repo.store().apply([USER, view])
    stock.store().materialize(START, NOW)
    plugin.store().materialize(START, NOW)
    load(banquet, start=START)
    expected = everything(server, 0)
    assert len(expected) > 100
    assert everything(server, 1) == expected
    assert everything(server, 2) == expected
    for repo in (stock, plugin, banquet):
        stored = repo.store().get_feature_view("behavior")
        assert stored.materialization_intervals == [(START, NOW)]
        assert stored.state == FeatureViewState.AVAILABLE_ONLINE


def test_rows_that_fit_neither_memory_nor_disk_are_an_error_that_says_so(
    server: Valkey, tmp_path: Path
) -> None:
    events = pd.DataFrame({"user_id": range(200_000), "event_timestamp": NOW, "created": NOW, "value": 1.0})
    events.to_parquet(tmp_path / "events.parquet")
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "events.parquet")])
    settings = repo.path / "feature_store.yaml"
    limited = "batch_engine: {memory_limit: 1MB, temp_directory: spill, "
    settings.write_text(settings.read_text().replace("batch_engine: {", limited))
    (report,) = materialize(FeastRepository.open(repo.path), end=NOW).views
    assert isinstance(report.error, InvalidRepository)
    assert "memory_limit (1MB)" in report.error.message
    assert str(repo.path / "spill") in report.error.message
    assert everything(server, 0) == {}
    assert list((repo.path / "spill").iterdir()) == []


def test_a_second_run_finds_nothing_new(repo: FeastRepository) -> None:
    first = load(repo)
    assert (first.reason, first.rows, first.written) == ("first load", 3, 3)
    again = load(repo, NOW + timedelta(hours=1))
    assert (again.reason, again.rows, again.written) == ("incremental", 0, 0)
    assert values(repo, [1, 2, 3, 4]) == [1.5, 2.0, None, None]
    intervals = repo.store().get_feature_view("behavior").materialization_intervals
    assert [end for _, end in intervals] == [NOW, NOW + timedelta(hours=1)]
    assert intervals[1][0] == NOW


def test_an_incremental_run_loads_new_rows_and_late_ones(repo: FeastRepository, tmp_path: Path) -> None:
    """Users 1 and 2 get rows from before the watermark; that of user 2 is older than what is stored.

    The row of user 3 is offered again: it was created within an hour of the newest that had been seen.
    """
    load(repo)
    write_rows(
        tmp_path / "events" / "2.parquet",
        [
            (1, "2026-04-10", "2026-05-02", 10.0),
            (2, "2026-04-10", "2026-05-02", 20.0),
            (5, "2026-05-02", "2026-05-02", 50.0),
        ],
    )
    report = load(repo, NOW + timedelta(days=2))
    assert (report.rows, report.written, report.older) == (4, 3, 1)
    assert values(repo, [1, 2, 5]) == [10.0, 2.0, 50.0]


def test_stock_materialize_incremental_loads_late_rows_too(repo: FeastRepository, tmp_path: Path) -> None:
    repo.store().materialize(START, NOW)
    write_rows(tmp_path / "events" / "2.parquet", [(1, "2026-04-10", "2026-05-02", 10.0)])
    repo.store().materialize_incremental(NOW + timedelta(days=2))
    assert values(repo, [1]) == [10.0]


def test_a_correction_of_the_same_event_replaces_it(repo: FeastRepository, tmp_path: Path) -> None:
    load(repo)
    write_rows(tmp_path / "events" / "2.parquet", [(2, "2026-04-20", "2026-04-30", 22.0)])
    load(repo, NOW + timedelta(days=2))
    assert values(repo, [2]) == [22.0]


def test_a_row_that_was_stamped_before_it_became_visible_is_not_missed(
    repo: FeastRepository, tmp_path: Path
) -> None:
    """Created half an hour before the newest row that the first run saw, in a file that came after it."""
    load(repo)
    write_rows(tmp_path / "events" / "2.parquet", [(7, "2026-04-19", "2026-04-20T23:30:00", 7.0)])
    load(repo, NOW + timedelta(days=2))
    assert values(repo, [7]) == [7.0]


def test_a_flushed_redis_is_loaded_again(repo: FeastRepository, server: Valkey) -> None:
    load(repo)
    expected = everything(server)
    with server.client() as client:
        client.flushall()
    assert load(repo, NOW + timedelta(hours=1)).reason == "first load"
    assert everything(server) == expected


def test_rows_that_vanished_without_their_ledger_are_loaded_again(
    repo: FeastRepository, server: Valkey
) -> None:
    load(repo)
    expected = everything(server)
    with server.client() as client:
        client.delete(*expected)
    assert load(repo, NOW + timedelta(hours=1)).reason == "full reload: the rows are gone from Redis"
    assert everything(server) == expected


def test_a_new_feature_is_written_for_rows_that_have_not_changed(
    repo: FeastRepository, tmp_path: Path
) -> None:
    load(repo)
    rows = [(1, "2026-04-02", "2026-04-02", 1.5), (2, "2026-04-20", "2026-04-20", 2.0)]
    write_rows(tmp_path / "events" / "1.parquet", rows, city=["Oslo", "Lima"])
    schema = [VALUE, Field(name="city", dtype=String)]
    repo.store().apply([a_view(tmp_path / "events", schema=schema)])
    assert load(repo, NOW + timedelta(hours=1)).reason == "full reload: the definition has changed"
    assert values(repo, [1, 2], "behavior:city") == ["Oslo", "Lima"]


def test_a_changed_source_without_created_timestamps_is_loaded_whole(server: Valkey, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "events", created=None)])
    write_rows(tmp_path / "events" / "1.parquet", [(1, "2026-04-02", None, 1.0)])
    load(repo)
    write_rows(tmp_path / "events" / "2.parquet", [(1, "2026-04-03", None, 2.0)])
    report = load(repo, NOW + timedelta(hours=1))
    assert report.reason == "full reload: the source has changed and has no created timestamps"
    assert values(repo, [1]) == [2.0]


def test_rows_older_than_the_ttl_are_left_out(server: Valkey, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "e.parquet", ttl=timedelta(days=20))])
    rows = [(1, "2026-04-11T12:00:00", "2026-04-12", 1.0), (2, "2026-04-11T11:59:59", "2026-04-12", 2.0)]
    write_rows(tmp_path / "e.parquet", rows)
    load(repo)
    assert values(repo, [1, 2]) == [1.0, None]


def test_rows_that_a_raised_ttl_makes_count_are_loaded_by_the_next_run(
    server: Valkey, tmp_path: Path
) -> None:
    write_rows(
        tmp_path / "e.parquet", [(1, "2026-03-01", "2026-03-01", 1.0), (2, "2026-04-20", "2026-04-20", 2.0)]
    )
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "e.parquet", ttl=timedelta(days=20))])
    assert load(repo).written == 1
    assert values(repo, [1, 2]) == [None, 2.0]
    repo.store().apply([USER, a_view(tmp_path / "e.parquet", ttl=timedelta(days=200))])
    later = load(repo, NOW + timedelta(hours=1))
    assert (later.reason, later.rows) == ("full reload: the ttl was raised", 2)
    assert values(repo, [1, 2]) == [1.0, 2.0]
    assert load(repo, NOW + timedelta(hours=2)).reason == "incremental"


def test_a_pushed_row_is_not_replaced_by_an_older_one(repo: FeastRepository) -> None:
    pushed = pd.DataFrame({"user_id": [1], "event_timestamp": [NOW], "created": [NOW], "value": [99.0]})
    repo.store().write_to_online_store("behavior", pushed)
    report = load(repo)
    assert (report.written, report.older) == (2, 1)
    assert values(repo, [1]) == [99.0]


def test_an_explicit_window_loads_that_window(repo: FeastRepository) -> None:
    report = load(repo, datetime(2026, 4, 10, tzinfo=UTC), start=datetime(2026, 4, 1, tzinfo=UTC))
    assert (report.rows, report.written) == (1, 1)
    assert values(repo, [1, 2]) == [1.5, None]
    assert load(repo).reason == "first load"
    assert values(repo, [1, 2]) == [1.5, 2.0]


def test_a_killed_stock_run_leaves_no_state_behind(repo: FeastRepository) -> None:
    """What `kill -9` leaves of a stock run: the view MATERIALIZING, for which every stock read fails."""
    store = repo.store()
    view = store.get_feature_view("behavior")
    view.state = FeatureViewState.MATERIALIZING
    store.registry.apply_feature_view(view, "shop", commit=True)
    load(repo)
    assert store.get_feature_view("behavior").state == FeatureViewState.AVAILABLE_ONLINE
    assert values(repo, [2]) == [2.0]


def test_a_naive_time_an_empty_window_and_an_unknown_view_are_refused(repo: FeastRepository) -> None:
    with pytest.raises(InvalidRequest, match="no time zone"):
        materialize(repo, end=datetime(2026, 5, 1))  # noqa: DTZ001
    with pytest.raises(InvalidRequest, match="before it starts"):
        materialize(repo, start=NOW, end=START)
    with pytest.raises(NotFound, match="'nothing'"):
        materialize(repo, view_names=["nothing"], end=NOW)


def test_a_view_that_another_run_holds_is_waited_for_or_left(repo: FeastRepository) -> None:
    with repo.redis.session() as client:
        ledger = Ledger(client, "shop", "behavior")
        with ledger.lease():
            (report,) = materialize(repo, end=NOW).views
            assert isinstance(report.error, AlreadyRunning)
            assert "process" in str(report.error)
        with ledger.lease():
            release = threading.Timer(0.5, client.delete, [ledger.lease_key])
            began = time.monotonic()
            release.start()
            assert load(repo, wait_seconds=60).written == 3
            assert time.monotonic() - began > 0.3


def test_a_failed_gate_writes_nothing_and_the_other_views_go_on(server: Valkey, tmp_path: Path) -> None:
    rows = [(user, "2026-04-20", "2026-04-20", float(user)) for user in range(1, 21)]
    write_rows(tmp_path / "e.parquet", rows)
    strict = [Field(name="value", dtype=Float64, tags={"max": "18"})]
    repo = repository(tmp_path / "repo", server)
    views = [
        a_view(tmp_path / "e.parquet", "a_strict", schema=strict),
        a_view(tmp_path / "e.parquet", "open"),
    ]
    repo.store().apply([USER, *views])
    report = materialize(repo, end=NOW)
    failed, loaded = report.views
    assert not report.ok
    assert isinstance(failed.error, GateFailed)
    assert failed.gate is not None
    (finding,) = failed.gate.findings
    assert (finding.column, finding.expectation, finding.observed, finding.rows) == ("value", "max", 20.0, 2)
    assert {key["user_id"] for key in finding.sample_keys} == {19, 20}
    assert loaded.written == 20
    assert values(repo, [1], "open:value") == [1.0]
    assert repo.store().get_feature_view("a_strict").materialization_intervals == []
    with server.client() as client:
        assert all(b"_ts:a_strict" not in fields for fields in everything(server).values())
        gate = Ledger(client, "shop", "a_strict").recall("gate")
    assert (gate["passed"], gate["forced"]) == (False, False)

    forced, _ = materialize(repo, end=NOW, force=["a_strict"]).views
    assert forced.ok
    assert forced.written == 20
    with server.client() as client:
        gate = Ledger(client, "shop", "a_strict").recall("gate")
    assert (gate["passed"], gate["forced"]) == (False, True)


def test_a_view_whose_times_are_no_times_is_an_error_and_the_other_views_go_on(
    server: Valkey, tmp_path: Path
) -> None:
    write_rows(tmp_path / "good.parquet", [(1, "2026-04-20", "2026-04-20", 1.0)])
    bad = pd.read_parquet(tmp_path / "good.parquet").assign(event_timestamp="around noon")
    bad.to_parquet(tmp_path / "bad.parquet")
    repo = repository(tmp_path / "repo", server)
    views = [a_view(tmp_path / "bad.parquet", "a_bad"), a_view(tmp_path / "good.parquet", "good")]
    repo.store().apply([USER, *views])
    failed, loaded = materialize(repo, end=NOW).views
    assert isinstance(failed.error, InvalidSource)
    assert "around noon" in str(failed.error)
    assert loaded.written == 1


def test_a_failed_gate_stops_one_view_of_stock_materialize_and_is_its_error(
    server: Valkey, tmp_path: Path
) -> None:
    write_rows(tmp_path / "e.parquet", [(1, "2026-04-20", "2026-04-20", 1.0)])
    strict = [Field(name="value", dtype=Float64, tags={"max": "0"})]
    repo = repository(tmp_path / "repo", server)
    views = [
        a_view(tmp_path / "e.parquet", "a_strict", schema=strict),
        a_view(tmp_path / "e.parquet", "open"),
    ]
    repo.store().apply([USER, *views])
    with pytest.raises(GateFailed, match="a_strict"):
        repo.store().materialize(START, NOW)
    assert values(repo, [1], "open:value") == [1.0]
    assert repo.store().get_feature_view("a_strict").state != FeatureViewState.MATERIALIZING
    assert repo.store().get_feature_view("open").state == FeatureViewState.AVAILABLE_ONLINE


def test_a_dry_run_of_rows_that_fail_the_gate_is_not_ok_until_they_are_forced(
    server: Valkey, tmp_path: Path
) -> None:
    write_rows(tmp_path / "e.parquet", [(1, "2026-04-20", "2026-04-20", 1.0)])
    repo = repository(tmp_path / "repo", server)
    strict = [Field(name="value", dtype=Float64, tags={"max": "0"})]
    repo.store().apply([USER, a_view(tmp_path / "e.parquet", schema=strict)])
    report = materialize(repo, end=NOW, dry_run=True)
    assert not report.ok
    assert not report.views[0].as_json()["ok"]
    assert materialize(repo, end=NOW, dry_run=True, force=["behavior"]).ok
    with pytest.raises(NotFound, match="behaviour"):
        materialize(repo, end=NOW, force=["behaviour"])


def test_a_full_load_that_shrank_fails_the_gate(repo: FeastRepository, tmp_path: Path) -> None:
    load(repo)
    write_rows(tmp_path / "events" / "1.parquet", [(1, "2026-04-02", "2026-04-02", 1.5)])
    repo.store().apply([a_view(tmp_path / "events", created=None)])
    (report,) = materialize(repo, end=NOW + timedelta(hours=1)).views
    assert isinstance(report.error, GateFailed)
    assert "row count" in str(report.error)


@pytest.mark.parametrize("already", [0, 1000])
def test_a_dry_run_writes_nothing_and_knows_the_memory(server: Valkey, tmp_path: Path, already: int) -> None:
    """Within 20% of what Redis then uses, for new rows and where half of the rows are there already."""
    repo = repository(tmp_path / "repo", server)
    rows = [(user, "2026-04-20", "2026-04-20", user / 3) for user in range(2000)]
    write_rows(tmp_path / "e.parquet", rows, **{f"f{i}": [i / 7] * 2000 for i in range(12)})
    schema = [VALUE, *(Field(name=f"f{i}", dtype=Float64) for i in range(12))]
    repo.store().apply([USER, a_view(tmp_path / "e.parquet", schema=schema)])
    if already:
        write_rows(tmp_path / "part.parquet", rows[:already], **{f"f{i}": [0.0] * already for i in range(12)})
        part = repository(tmp_path / "other", server)
        part.store().apply([USER, a_view(tmp_path / "part.parquet", schema=schema)])
        load(part)
        with server.client() as client:
            client.delete(*Ledger(client, "shop", "behavior").keys)
    before = everything(server)
    report = load(repo, dry_run=True)
    assert (report.rows, report.written, report.error) == (2000, 0, None)
    assert report.gate is not None
    assert report.gate.passed
    assert everything(server) == before
    with server.client() as client:
        assert client.keys("banquet:*") == []
        used = client.info("memory")["used_memory"]
        load(repo)
        grown = client.info("memory")["used_memory"] - used
    assert report.memory_bytes is not None
    assert 0.8 < report.memory_bytes / grown < 1.2


def test_a_dry_run_knows_the_memory_of_every_kind_of_row(server: Valkey, tmp_path: Path) -> None:
    """Within 20% for what each view adds alone and for all at once.

    Mixed types, long strings that make a hash a table, created times beside a view that takes pushes, keys
    that are there already, a second load.
    """
    rows = [(user, "2026-04-20", "2026-04-20", user / 3) for user in range(1500)]
    long = Field(name="text", dtype=String)
    write_rows(tmp_path / "long.parquet", rows, text=["long " * (15 + user % 40) for user, *_ in rows])
    write_rows(tmp_path / "pushed.parquet", rows)
    mixed_events(6000, 1500).to_parquet(tmp_path / "mixed.parquet")
    pushes = PushSource(name="pushes", batch_source=a_view(tmp_path / "pushed.parquet", "p").batch_source)
    repo = repository(tmp_path / "repo", server)
    repo.store().apply(
        [
            USER,
            a_view(tmp_path / "mixed.parquet", "a_mixed", schema=MIXED_FIELDS),
            FeatureView(name="b_pushed", entities=[USER], schema=[VALUE], source=pushes, ttl=timedelta(0)),
            a_view(tmp_path / "long.parquet", "c_long", schema=[long]),
        ]
    )

    def grown(**options: Any) -> tuple[int, int]:
        """Bytes as a dry run tells them, and as Redis grows in the run."""
        told = sum(
            view.memory_bytes or 0 for view in materialize(repo, end=NOW, dry_run=True, **options).views
        )
        with server.client() as client:
            used = client.info("memory")["used_memory"]
            assert materialize(repo, end=NOW, **options).ok
            return told, client.info("memory")["used_memory"] - used

    for name in ("a_mixed", "b_pushed", "c_long"):
        told, taken = grown(view_names=[name])
        assert 0.8 < told / taken < 1.2, name
    assert grown(start=START)[0] == 0
    with server.client() as client:
        client.flushall()
    told, taken = grown()
    assert 0.8 < told / taken < 1.2


def test_progress_counts_the_rows_that_redis_has_confirmed(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("materialization.load.CHUNK_ROWS", 100)
    repo = repository(tmp_path / "repo", server)
    write_rows(tmp_path / "e.parquet", [(user, "2026-04-20", "2026-04-20", 1.0) for user in range(950)])
    repo.store().apply([USER, a_view(tmp_path / "e.parquet")])
    seen: list[Progress] = []
    load(repo, observe=seen.append)
    assert [(p.view, p.rows, p.total) for p in seen] == [
        ("behavior", min(rows, 950), 950) for rows in range(100, 1001, 100)
    ]
    assert seen[-1].rows_per_second > 0


def test_key_ttl_seconds_and_skip_dedup_mean_what_they_mean_in_feast(server: Valkey, tmp_path: Path) -> None:
    repo = repository(tmp_path / "repo", server, online="key_ttl_seconds: 5000, skip_dedup: true")
    write_rows(tmp_path / "e.parquet", [(1, "2026-04-20", "2026-04-20", 1.0)])
    repo.store().apply([USER, a_view(tmp_path / "e.parquet")])
    pushed = pd.DataFrame({"user_id": [1], "event_timestamp": [NOW], "created": [NOW], "value": [99.0]})
    repo.store().write_to_online_store("behavior", pushed)
    load(repo)
    assert values(repo, [1]) == [1.0]
    with server.client() as client:
        assert [4000 < client.ttl(key) <= 5000 for key in everything(server)] == [True]


def test_keys_that_are_times_of_one_second_are_one_key(server: Valkey, tmp_path: Path) -> None:
    """Feast's key holds whole seconds; of the rows that fall together the newest stays, in every order."""
    moment = pd.Timestamp("2026-04-01T10:00:00", tz="UTC")
    n = 600
    frame = pd.DataFrame(
        {
            "moment": [moment + pd.Timedelta(i // 2, "s") + pd.Timedelta(i % 2, "ms") for i in range(n)],
            "event_timestamp": [START + timedelta(hours=1 + (i % 2 == i // 2 % 2)) for i in range(n)],
            "created": [START] * n,
            "value": [float(i) for i in range(n)],
        }
    )
    frame.to_parquet(tmp_path / "e.parquet")
    by_time = Entity(name="moment", join_keys=["moment"], value_type=ValueType.UNIX_TIMESTAMP)
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([by_time, a_view(tmp_path / "e.parquet", entities=[by_time])])
    load(repo)
    found = [
        layout.decode_value(fields[layout.feature_field("behavior", "value")], Dtype.DOUBLE)
        for fields in everything(server).values()
    ]
    newest = frame.loc[frame.groupby(frame.moment.dt.floor("s")).event_timestamp.idxmax(), "value"]
    assert sorted(found) == sorted(newest)


def test_a_cluster_gets_the_rows_that_a_single_server_gets(server: Valkey, tmp_path: Path) -> None:
    rows = [(user, "2026-04-20", "2026-04-20", float(user)) for user in range(700)]
    write_rows(tmp_path / "e.parquet", rows)
    view = a_view(tmp_path / "e.parquet")
    single = repository(tmp_path / "single", server)
    single.store().apply([USER, view])
    load(single)
    with Cluster(tmp_path) as cluster:
        nodes = ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)
        spread = repository(tmp_path / "spread", server)
        config = spread.path / "feature_store.yaml"
        text = config.read_text().replace(f"{server.connection_string},db=0", nodes)
        config.write_text(text.replace("type: redis,", "type: redis, redis_type: redis_cluster,"))
        spread = FeastRepository.open(spread.path)
        spread.store().apply([USER, view])
        assert load(spread).written == 700
        assert load(spread, NOW + timedelta(hours=1)).reason == "incremental"
        assert values(spread, [1, 699]) == [1.0, 699.0]
        found: dict[bytes, dict[bytes, bytes]] = {}
        for node in cluster.masters:
            found |= everything(node)
        assert found == everything(server)


def test_a_source_that_is_no_file_comes_by_way_of_its_offline_store(server: Valkey, tmp_path: Path) -> None:
    """New rows and late ones: what the store calls the newest of the whole window is cut to what is new."""
    times = pd.to_datetime(["2026-04-20", "2026-04-20", "2026-04-21"], utc=True)
    table_source.TABLES["orders"] = pd.DataFrame(
        {"uid": [1, 2, 2], "at": times, "made": times, "v": [1.0, 2.0, 2.5]}
    )
    source = TableSource(
        name="orders",
        timestamp_field="at",
        created_timestamp_column="made",
        field_mapping={"uid": "user_id", "v": "value"},
    )
    repo = repository(tmp_path / "repo", server, offline="tests.support.table_source.TableOfflineStore")
    view = FeatureView(name="behavior", entities=[USER], schema=[VALUE], source=source, ttl=timedelta(0))
    repo.store().apply([USER, view])
    assert load(repo).written == 2
    assert values(repo, [1, 2]) == [1.0, 2.5]
    late = pd.DataFrame({"uid": [1], "at": [times[2]], "made": [NOW], "v": [11.0]})
    table_source.TABLES["orders"] = pd.concat([table_source.TABLES["orders"], late])
    report = load(repo, NOW + timedelta(days=1))
    assert (report.reason, report.rows) == ("incremental, with late rows", 2)
    assert values(repo, [1, 2]) == [11.0, 2.5]


@pytest.mark.filterwarnings("ignore:Batch feature views are experimental:RuntimeWarning")
def test_a_view_that_transforms_goes_through_feasts_own_engine(server: Valkey, tmp_path: Path) -> None:
    write_rows(tmp_path / "e.parquet", [(1, "2026-04-20", "2026-04-20", 2.0)])
    batch = a_view(tmp_path / "e.parquet").batch_source
    view = BatchFeatureView(
        name="behavior",
        entities=[USER],
        schema=[Field(name="value", dtype=Float64)],
        source=batch,
        mode="pandas",
        udf=doubled,
        udf_string="doubled",
        ttl=timedelta(days=90),
        online=True,
        offline=False,
    )
    repo = repository(tmp_path / "repo", server, offline="file")
    repo.store().apply([USER, view])
    assert load(repo, start=START).reason == "through Feast: it has a transformation"
    assert values(repo, [1]) == [4.0]
    with server.client() as client:
        client.flushall()
    repo.store().materialize(START, NOW)
    assert values(repo, [1]) == [4.0]


def doubled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(value=frame["value"] * 2)
