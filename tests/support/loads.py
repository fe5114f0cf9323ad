"""A Feast repository over Parquet files for tests of materialization: made, applied, and read back whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Bool, Float32, Float64, Int32, Int64, String, UnixTimestamp

from core.repository import FeastRepository
from tests.support.valkey import Valkey

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
START = NOW - timedelta(days=30)
BANQUET = "materialization.engine.BulkComputeEngine"
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)


def everything(server: Valkey, db: int = 0) -> dict[bytes, dict[bytes, bytes]]:
    """Every key of Feast's in a database, with its fields; Banquet's own bookkeeping left out."""
    with server.client(db=db) as client:
        keys = [key for key in client.scan_iter(count=5000) if not key.startswith(b"banquet:")]
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        return dict(zip(keys, pipeline.execute(), strict=True))


def repository(
    path: Path,
    server: Valkey,
    *,
    db: int = 0,
    engine: str = BANQUET,
    offline: str = "core.offline.BanquetOfflineStore",
    online: str = "",
) -> FeastRepository:
    """An empty repository of project ``shop``; ``online`` is more of the online_store section, as YAML."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "feature_store.yaml").write_text(
        f"""
project: shop
provider: local
registry: registry.db
online_store: {{type: redis, connection_string: "{server.connection_string},db={db}", {online}}}
offline_store: {{type: {offline}}}
batch_engine: {{type: {engine}}}
entity_key_serialization_version: 3
"""
    )
    return FeastRepository.open(path)


def a_view(
    path: Path,
    name: str = "behavior",
    *,
    created: str | None = "created",
    schema: Sequence[Field] = (Field(name="value", dtype=Float64),),
    ttl: timedelta = timedelta(0),
    tags: Mapping[str, str] | None = None,
    entities: Sequence[Entity] = (USER,),
    **more: Any,
) -> FeatureView:
    """A view of the Parquet file or folder at ``path``."""
    source = FileSource(
        name=f"{name}_source",
        path=str(path),
        timestamp_field="event_timestamp",
        created_timestamp_column=created or "",
        **more,
    )
    return FeatureView(
        name=name, entities=list(entities), schema=list(schema), source=source, ttl=ttl, tags=dict(tags or {})
    )


def write_rows(
    path: Path, rows: Sequence[tuple[int, str, str | None, float | None]], **more: Sequence[Any]
) -> None:
    """(user, event, created, value) rows as a Parquet file; times are ISO 8601, UTC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    users, events, created, values = zip(*rows, strict=True)
    columns = {
        "user_id": np.array(users, "int64"),
        "event_timestamp": pd.to_datetime(list(events), utc=True, format="ISO8601"),
        "created": pd.to_datetime(list(created), utc=True, format="ISO8601"),
        "value": np.array(values, "float64"),
    }
    pd.DataFrame({**columns, **more}).to_parquet(path)


def values(repo: FeastRepository, users: Sequence[int], feature: str = "behavior:value") -> list[Any]:
    """One feature of some users as stock Feast reads it."""
    rows = [{"user_id": user} for user in users]
    found = repo.store().get_online_features([feature], rows).to_dict()
    return list(found[feature.split(":")[1]])


def mixed_events(n: int = 400, users: int = 120) -> pd.DataFrame:
    """Several rows per user, ties of event time that the created time settles, nulls, every scalar type."""
    rng = np.random.default_rng(3)
    seconds = rng.integers(0, 20 * 86400, n) // 3600 * 3600
    start = pd.to_datetime(START)
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(-5, users, n),
            "event_timestamp": start + pd.to_timedelta(seconds, unit="s"),
            "created": start + pd.to_timedelta(seconds + rng.permutation(n), unit="s"),
            "amount": rng.normal(size=n),
            "count": rng.integers(-(1 << 40), 1 << 40, n),
            "small": rng.integers(-1000, 1000, n).astype("int32"),
            "rate": rng.random(n).astype("float32"),
            "city": [f"city {i % 7} é" for i in range(n)],
            "active": rng.random(n) < 0.5,
            "seen": start + pd.to_timedelta(rng.integers(0, 10**6, n), unit="s"),
        }
    )
    frame.loc[rng.random(n) < 0.1, "amount"] = np.nan
    frame.loc[rng.random(n) < 0.1, "city"] = None
    return frame


MIXED_FIELDS = [
    Field(name="amount", dtype=Float64),
    Field(name="count", dtype=Int64),
    Field(name="small", dtype=Int32),
    Field(name="rate", dtype=Float32),
    Field(name="city", dtype=String),
    Field(name="active", dtype=Bool),
    Field(name="seen", dtype=UnixTimestamp),
]
