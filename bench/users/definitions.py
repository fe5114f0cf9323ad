"""Two feature views over the same users: 3 slow features and 10 fast ones, as a shop would have them."""

from __future__ import annotations

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Float64, Int64, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)

user_demographics = FeatureView(
    name="user_demographics",
    entities=[user],
    ttl=timedelta(days=365),
    schema=[
        Field(name="user_id", dtype=Int64),
        Field(name="age", dtype=Int64),
        Field(name="location", dtype=String),
        Field(name="income", dtype=Float64),
    ],
    source=FileSource(path="data/user_demographics.parquet", timestamp_field="event_timestamp"),
)
user_behavior = FeatureView(
    name="user_behavior",
    entities=[user],
    ttl=timedelta(days=30),
    schema=[
        Field(name="user_id", dtype=Int64),
        *(Field(name=f"signal_{i}", dtype=Float64) for i in range(10)),
    ],
    source=PushSource(
        name="user_behavior_push",
        batch_source=FileSource(path="data/user_behavior.parquet", timestamp_field="event_timestamp"),
    ),
)
users = FeatureService(name="users", features=[user_demographics, user_behavior])
