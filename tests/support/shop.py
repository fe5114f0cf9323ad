"""A small Feast repository that has one of everything the online read must handle.

``write`` lays it down on disk; ``now`` is the moment its rows are relative to.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd

NOW = datetime.now(tz=UTC).replace(microsecond=0)

_STORE = """\
project: {project}
provider: local
registry: registry.db
online_store:
  type: redis
  connection_string: "{connection_string}"
offline_store:
  type: {offline}
entity_key_serialization_version: 3
"""

_DEFINITIONS = """\
from datetime import timedelta
from typing import Any

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Json, Map, String, UnixTimestamp

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
store = Entity(name="store", join_keys=["store_code"], value_type=ValueType.STRING)


def source(name, **options):
    return FileSource(
        name=name, path=f"{name}.parquet", timestamp_field="event_timestamp", created_timestamp_column="created", **options
    )


profile = FeatureView(
    name="profile", entities=[user], ttl=timedelta(0), source=source("profile"),
    schema=[Field(name="user_id", dtype=Int64), Field(name="age", dtype=Int64), Field(name="city", dtype=String),
            Field(name="member", dtype=Bool)],
)
behavior = FeatureView(
    name="behavior", entities=[user], ttl=timedelta(days=3), source=source("behavior"),
    schema=[Field(name="user_id", dtype=Int64), Field(name="spend", dtype=Float64), Field(name="visits", dtype=Int64),
            Field(name="seen_at", dtype=UnixTimestamp), Field(name="tags", dtype=Array(String))],
)
stock = FeatureView(
    name="stock", entities=[store], ttl=timedelta(days=3), source=source("stock", field_mapping={"lvl": "level"}),
    schema=[Field(name="store_code", dtype=String), Field(name="level", dtype=Int32), Field(name="ratio", dtype=Float32)],
)
visits = FeatureView(
    name="visits", entities=[store, user], ttl=timedelta(days=30), source=source("visits"),
    schema=[Field(name="store_code", dtype=String), Field(name="user_id", dtype=Int64), Field(name="count", dtype=Int64)],
)
climate = FeatureView(
    name="climate", entities=[], ttl=timedelta(0), source=source("climate"),
    schema=[Field(name="temperature", dtype=Float64)],
)
clicks = FeatureView(
    name="clicks", entities=[user], ttl=timedelta(days=1),
    source=PushSource(name="clicks_push", batch_source=source("clicks")),
    schema=[Field(name="user_id", dtype=Int64), Field(name="clicks_1h", dtype=Int64)],
)
request = RequestSource(name="basket", schema=[Field(name="amount", dtype=Float64)])

FACTOR = 2.0


@on_demand_feature_view(
    sources=[behavior[["spend"]], request], schema=[Field(name="share", dtype=Float64)], mode="python"
)
def basket(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"share": [
        None if spend is None or amount is None or spend == 0 else amount / spend
        for spend, amount in zip(inputs["spend"], inputs["amount"])
    ]}


@on_demand_feature_view(
    sources=[profile[["age"]]], schema=[Field(name="decade", dtype=Int64)], mode="python", singleton=True
)
def decades(inputs: dict[str, Any]) -> dict[str, Any]:
    age = inputs["age"]
    return {"decade": None if age is None else age // 10}


@on_demand_feature_view(
    sources=[behavior[["spend", "visits"]]], schema=[Field(name="spend_per_visit", dtype=Float64)], mode="pandas"
)
def rates(inputs: pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame()
    frame["spend_per_visit"] = inputs["spend"] / inputs["visits"]
    return frame


everything = FeatureService(
    name="everything",
    features=[
        profile, behavior[["visits", "spend", "seen_at", "tags"]], stock, visits, climate, basket, decades, rates,
    ],
)
plain = FeatureService(name="plain", features=[behavior[["spend", "visits"]], profile[["city", "age"]]])
renamed = FeatureService(
    name="renamed",
    features=[
        profile[["age"]].with_name("buyer").with_join_key_map({"user_id": "buyer_id"}),
        profile[["age", "city"]].with_name("seller").with_join_key_map({"user_id": "seller_id"}),
    ],
)
"""


def write(
    path: Path,
    connection_string: str,
    *,
    project: str = "shop",
    offline: str = "core.offline.BanquetOfflineStore",
) -> Path:
    """Write the repository and its sources below ``path``; returns ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    settings = _STORE.format(project=project, connection_string=connection_string, offline=offline)
    (path / "feature_store.yaml").write_text(settings)
    (path / "definitions.py").write_text(_DEFINITIONS)
    for name, frame in sources().items():
        # Arrow's default of microseconds is what upstream jobs write.
        frame.to_parquet(path / f"{name}.parquet", coerce_timestamps="us")
    return path


def ago(**span: float) -> datetime:
    """A moment before ``NOW``."""
    return NOW - timedelta(**span)


def sources() -> dict[str, pd.DataFrame]:
    """The source tables: user 1 has everything fresh, 2 is expired, 3 has nulls, 4 has a profile only."""
    profile = pd.DataFrame(
        {
            "user_id": [1, 2, 3, 4],
            "age": pd.array([41, 52, None, 24], dtype="Int64"),
            "city": ["Oslo", "Rome", None, ""],
            "member": pd.array([True, False, None, True], dtype="boolean"),
            "event_timestamp": [ago(days=400)] * 4,
        }
    )
    behavior = pd.DataFrame(
        {
            "user_id": [1, 1, 2, 3],
            "spend": [99.0, 12.5, 7.0, None],
            "visits": pd.array([9, 4, 2, None], dtype="Int64"),
            "seen_at": pd.to_datetime([ago(days=3), ago(days=1), ago(days=5), None], utc=True),
            "tags": [["old"], ["a", "b"], [], None],
            "event_timestamp": [ago(days=2), ago(hours=6), ago(days=5), ago(days=1)],
        }
    )
    stock = pd.DataFrame(
        {
            "store_code": ["north", "süd"],
            "lvl": pd.array([3, -1], dtype="Int32"),
            "ratio": pd.array([0.1, 2.5], dtype="Float32"),
            "event_timestamp": [ago(days=1), ago(days=9)],
        }
    )
    visits = pd.DataFrame(
        {
            "store_code": ["north", "north", "süd"],
            "user_id": [1, 2, 1],
            "count": [5, 6, 7],
            "event_timestamp": [ago(days=1, seconds=0.25)] * 3,
        }
    )
    climate = pd.DataFrame({"temperature": [21.5], "event_timestamp": [ago(hours=1)]})
    clicks = pd.DataFrame({"user_id": [1], "clicks_1h": [3], "event_timestamp": [ago(hours=2)]})
    frames = {
        "profile": profile,
        "behavior": behavior,
        "stock": stock,
        "visits": visits,
        "climate": climate,
        "clicks": clicks,
    }
    for frame in frames.values():
        frame["created"] = frame["event_timestamp"] + timedelta(minutes=5)
    return frames
