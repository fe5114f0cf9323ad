"""Two feature views over the same users: 3 slow features and 10 fast ones, as a shop would have them.

Three on-demand views compute the same in Feast's three ways; only bench/on_demand.py asks for them.
"""

from datetime import timedelta
from typing import Any

import pandas as pd
from feast import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RequestSource,
    ValueType,
)
from feast.on_demand_feature_view import on_demand_feature_view
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
        batch_source=FileSource(path="data/user_behavior", timestamp_field="event_timestamp"),
    ),
)
basket = RequestSource(name="basket", schema=[Field(name="total", dtype=Float64)])
used = [user_behavior[["signal_0", "signal_1"]], basket]
computed = [Field(name="share", dtype=Float64), Field(name="above", dtype=Float64)]


@on_demand_feature_view(sources=used, schema=computed, mode="python")
def by_column(inputs: dict[str, Any]) -> dict[str, Any]:
    """A python view: lists in, lists out."""
    rows = list(zip(inputs["signal_0"], inputs["signal_1"], inputs["total"], strict=True))
    return {
        "share": [total / (first + second) for first, second, total in rows],
        "above": [first - second for first, second, _ in rows],
    }


@on_demand_feature_view(sources=used, schema=computed, mode="python", singleton=True)
def by_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """A singleton python view: one row's values in and out."""
    first, second = inputs["signal_0"], inputs["signal_1"]
    return {"share": inputs["total"] / (first + second), "above": first - second}


@on_demand_feature_view(sources=used, schema=computed, mode="pandas")
def by_frame(inputs: pd.DataFrame) -> pd.DataFrame:
    """A pandas view."""
    found = pd.DataFrame()
    found["share"] = inputs["total"] / (inputs["signal_0"] + inputs["signal_1"])
    found["above"] = inputs["signal_0"] - inputs["signal_1"]
    return found


users = FeatureService(name="users", features=[user_demographics, user_behavior])
