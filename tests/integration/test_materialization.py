"""Materialization on a real Valkey, against stock Feast: same keys, same fields, same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Bool, Float32, Float64, Int32, Int64, String, UnixTimestamp

from core.repository import FeastRepository
from materialization.run import materialize
from tests.support.valkey import Valkey

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
START = NOW - timedelta(days=30)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("materialization"), "databases 16") as server:
        yield server


@pytest.fixture
def server(valkey: Valkey) -> Valkey:
    with valkey.client() as client:
        client.flushall()
    return valkey


def everything(server: Valkey, db: int = 0) -> dict[bytes, dict[bytes, bytes]]:
    """Every key of Feast's in a database, with its fields; Banquet's own bookkeeping left out."""
    with server.client(db=db) as client:
        keys = [key for key in client.scan_iter(count=5000) if not key.startswith(b"banquet:")]
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        return dict(zip(keys, pipeline.execute(), strict=True))


def repository(path: Path, server: Valkey, *, db: int, engine: str, offline: str = "file") -> FeastRepository:
    path.mkdir(parents=True, exist_ok=True)
    (path / "feature_store.yaml").write_text(
        f"""
project: shop
provider: local
registry: registry-{db}.db
online_store: {{type: redis, connection_string: "{server.connection_string},db={db}"}}
offline_store: {{type: {offline}}}
batch_engine: {{type: {engine}}}
entity_key_serialization_version: 3
"""
    )
    return FeastRepository.open(path)


BANQUET = "materialization.engine.BulkComputeEngine"


def events(n: int = 400, users: int = 120) -> pd.DataFrame:
    """Several rows per user, ties of event time that the created time settles, nulls, all scalar types."""
    rng = np.random.default_rng(3)
    seconds = rng.integers(0, 20 * 86400, n) // 3600 * 3600
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(-5, users, n),
            "event_timestamp": pd.to_datetime(START) + pd.to_timedelta(seconds, unit="s"),
            "created": pd.to_datetime(START) + pd.to_timedelta(seconds + rng.permutation(n), unit="s"),
            "amount": rng.normal(size=n),
            "count": rng.integers(-(1 << 40), 1 << 40, n),
            "small": rng.integers(-1000, 1000, n).astype("int32"),
            "rate": rng.random(n).astype("float32"),
            "city": [f"city {i % 7} é" for i in range(n)],
            "active": rng.random(n) < 0.5,
            "seen": pd.to_datetime(START) + pd.to_timedelta(rng.integers(0, 10**6, n), unit="s"),
        }
    )
    frame.loc[rng.random(n) < 0.1, "amount"] = np.nan
    frame.loc[rng.random(n) < 0.1, "city"] = None
    return frame


FIELDS = [
    Field(name="amount", dtype=Float64),
    Field(name="count", dtype=Int64),
    Field(name="small", dtype=Int32),
    Field(name="rate", dtype=Float32),
    Field(name="city", dtype=String),
    Field(name="active", dtype=Bool),
    Field(name="seen", dtype=UnixTimestamp),
]


def apply(store: FeatureStore, path: Path, ttl: timedelta = timedelta(days=60)) -> None:
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(
        name="events",
        path=str(path),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    view = FeatureView(name="behavior", entities=[user], schema=FIELDS, source=source, ttl=ttl)
    store.apply([user, view])


def test_both_doors_write_what_stock_feast_writes(server: Valkey, tmp_path: Path) -> None:
    events().to_parquet(tmp_path / "events.parquet")
    stores = []
    for db, engine in ((0, "local"), (1, BANQUET), (2, BANQUET)):
        repo = repository(tmp_path / str(db), server, db=db, engine=engine)
        apply(repo.store(), tmp_path / "events.parquet")
        stores.append(repo)
    stores[0].store().materialize(START, NOW)
    stores[1].store().materialize(START, NOW)
    report = materialize(stores[2], start=START, end=NOW)
    assert report.ok, report.as_json()
    expected = everything(server, 0)
    assert len(expected) > 100
    assert everything(server, 1) == expected
    assert everything(server, 2) == expected
    for repo in stores:
        view = repo.store().get_feature_view("behavior")
        assert view.materialization_intervals == [(START, NOW)]
        assert view.state.name == "AVAILABLE_ONLINE"
    row = {"user_id": 1}
    refs = ["behavior:amount", "behavior:city", "behavior:seen"]
    answers = [repo.store().get_online_features(refs, [row]).to_dict() for repo in stores]
    assert answers[0] == answers[1] == answers[2]
