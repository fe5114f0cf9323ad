"""`verify` and `status`: every difference between online and offline is found and named with its cause."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from feast import Entity, Field, ValueType
from feast.types import Float64, String

from core.errors import Conflict, NotFound
from core.repository import FeastRepository
from materialization.ledger import Ledger
from materialization.run import materialize
from materialization.status import ViewStatus, status
from materialization.verify import Cause, ViewVerification, verify
from tests.support.loads import (
    MIXED_FIELDS,
    NOW,
    USER,
    a_view,
    everything,
    mixed_events,
    repository,
    write_rows,
)
from tests.support.valkey import Valkey

DAY = timedelta(days=1)


@pytest.fixture
def repo(server: Valkey, tmp_path: Path) -> FeastRepository:
    """Users 1 to 5, loaded; user 5's only row was past the ttl by then."""
    rows = [(user, f"2026-04-2{user}", f"2026-04-2{user}", float(user)) for user in (1, 2, 3, 4)]
    write_rows(tmp_path / "events" / "1.parquet", [*rows, (5, "2026-01-01", "2026-01-01", 5.0)])
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "events", ttl=30 * DAY)])
    assert materialize(repo, end=NOW).ok
    return repo


def checked(repo: FeastRepository) -> ViewVerification:
    (found,) = verify(repo, sample=50, seed=1).views
    assert found.error is None
    return found


def causes(found: ViewVerification) -> dict[int, Cause]:
    return {difference.key["user_id"]: difference.cause for difference in found.differences}


def a_push(repo: FeastRepository, user: int, event: datetime, value: float) -> None:
    rows = {"user_id": [user], "event_timestamp": [event], "created": [event], "value": [value]}
    repo.store().write_to_online_store("behavior", pd.DataFrame(rows))


def redis_key(server: Valkey, user: int) -> bytes:
    (key,) = [key for key in everything(server) if user.to_bytes(8, "little") in key]
    return key


def test_after_a_load_only_what_had_expired_differs_and_does_no_harm(repo: FeastRepository) -> None:
    found = checked(repo)
    assert found.ok
    assert found.entities == 5
    assert found.as_of == NOW
    assert causes(found) == {5: Cause.EXPIRED}


def test_a_row_that_expired_after_it_was_loaded_is_hidden_on_both_sides(repo: FeastRepository) -> None:
    assert materialize(repo, end=NOW + 20 * DAY).ok
    found = checked(repo)
    assert found.ok
    assert causes(found) == {5: Cause.EXPIRED}


def test_every_difference_is_named_with_its_cause(
    repo: FeastRepository, server: Valkey, tmp_path: Path
) -> None:
    write_rows(
        tmp_path / "events" / "2.parquet",
        [
            (1, "2026-04-25", "2026-05-02", 10.0),
            (2, "2026-04-22", "2026-05-02", 20.0),
            (6, "2026-04-25", "2026-05-02", 60.0),
        ],
    )
    a_push(repo, 3, NOW, 33.0)
    a_push(repo, 7, NOW, 77.0)
    with server.client() as client:
        client.delete(redis_key(server, 4))
    found = checked(repo)
    assert not found.ok
    assert causes(found) == {
        1: Cause.LATE_ROW,
        2: Cause.LATE_ROW,
        3: Cause.FOREIGN_WRITE,
        4: Cause.MISSING_ENTITY,
        5: Cause.EXPIRED,
        6: Cause.LATE_ROW,
        7: Cause.FOREIGN_WRITE,
    }
    (second,) = [d for d in found.differences if d.key["user_id"] == 2]
    assert second.features == {"value": (2.0, 20.0)}
    assert (second.online_event, second.offline_event) == (datetime(2026, 4, 22, tzinfo=UTC),) * 2
    json.dumps(found.as_json())

    # The next run brings the late rows, and user 4, whose row is as new as any that had been seen.
    assert materialize(repo, end=NOW + DAY * 2).ok
    expected = {3: Cause.FOREIGN_WRITE, 5: Cause.EXPIRED, 7: Cause.FOREIGN_WRITE}
    assert causes(checked(repo)) == expected


def test_a_foreign_value_under_the_same_event_timestamp_is_found(
    repo: FeastRepository, server: Valkey
) -> None:
    from core import layout
    from core.types import Dtype

    with server.client() as client:
        field = layout.feature_field("behavior", "value")
        client.hset(redis_key(server, 2), field, layout.encode_value(-1.0, Dtype.DOUBLE))
    found = checked(repo)
    assert causes(found) == {2: Cause.FOREIGN_WRITE, 5: Cause.EXPIRED}


def test_rows_of_an_older_definition_are_named_as_such(repo: FeastRepository, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "events" / "1.parquet",
        [(user, f"2026-04-2{user}", f"2026-04-2{user}", float(user)) for user in (1, 2, 3, 4)],
        city=["Oslo"] * 4,
    )
    schema = [Field(name="value", dtype=Float64), Field(name="city", dtype=String)]
    repo.store().apply([a_view(tmp_path / "events", ttl=30 * DAY, schema=schema)])
    found = checked(repo)
    assert causes(found) == dict.fromkeys((1, 2, 3, 4), Cause.CHANGED_DEFINITION)
    assert {tuple(difference.features) for difference in found.differences} == {("city",)}


def test_composite_keys_and_every_scalar_type_agree_after_a_load(server: Valkey, tmp_path: Path) -> None:
    frame = mixed_events()
    frame["region"] = [f"r{i % 3}" for i in range(len(frame))]
    frame.to_parquet(tmp_path / "e.parquet")
    region = Entity(name="region", join_keys=["region"], value_type=ValueType.STRING)
    repo = repository(tmp_path / "repo", server)
    views = [
        a_view(tmp_path / "e.parquet", "both", schema=MIXED_FIELDS, entities=[USER, region]),
        a_view(tmp_path / "e.parquet", "none", schema=MIXED_FIELDS, entities=[]),
    ]
    repo.store().apply([USER, region, *views])
    assert materialize(repo, end=NOW).ok
    both, none = verify(repo, sample=400).views
    assert (both.differences, none.differences) == ((), ())
    assert both.entities > 200
    assert none.entities == 1


def test_a_view_that_was_never_loaded_and_one_that_is_unknown(server: Valkey, tmp_path: Path) -> None:
    write_rows(tmp_path / "e.parquet", [(1, "2026-04-20", "2026-04-20", 1.0)])
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "e.parquet")])
    found = verify(repo)
    assert not found.ok
    assert isinstance(found.views[0].error, Conflict)
    with pytest.raises(NotFound):
        verify(repo, view_names=["nothing"])


def the_status(repo: FeastRepository, now: datetime = NOW) -> ViewStatus:
    (found,) = status(repo, now=now)
    return found


def test_status_tells_how_a_view_stands(repo: FeastRepository) -> None:
    found = the_status(repo, NOW + timedelta(hours=1))
    assert (found.view, found.keys, found.keys_estimated) == ("behavior", 4, False)
    assert found.watermark == NOW
    assert found.newest_event == datetime(2026, 4, 24, tzinfo=UTC)
    assert found.freshness == NOW + timedelta(hours=1) - datetime(2026, 4, 24, tzinfo=UTC)
    assert found.last_run is not None
    assert (found.last_run["reason"], found.last_run["written"]) == ("first load", 4)
    assert found.gate is not None
    assert found.gate["passed"]
    assert (found.interrupted_rows, found.running) == (None, None)
    json.dumps(found.as_json())
    assert materialize(repo, end=NOW + DAY).ok
    assert the_status(repo).newest_event == datetime(2026, 4, 24, tzinfo=UTC)


def test_status_of_an_empty_store_and_of_a_running_load(
    repo: FeastRepository, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.client() as client:
        with Ledger(client, "shop", "behavior").lease():
            assert "process" in str(the_status(repo).running)
        client.flushall()
        found = the_status(repo)
        assert (found.keys, found.watermark, found.newest_event, found.last_run) == (0, None, None, None)


def test_status_counts_many_keys_from_a_sample(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("materialization.status.COUNTED_KEYS", 100)
    write_rows(tmp_path / "e.parquet", [(user, "2026-04-20", "2026-04-20", 1.0) for user in range(3000)])
    repo = repository(tmp_path / "repo", server)
    repo.store().apply([USER, a_view(tmp_path / "e.parquet")])
    assert materialize(repo, end=NOW).ok
    with server.client() as client:
        client.mset({f"other:{i}": "x" for i in range(1000)})
    found = the_status(repo)
    assert found.keys_estimated
    assert 2700 < found.keys < 3300
