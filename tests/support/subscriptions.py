"""A Feast repository for training tests: daily snapshots of subscribers, and who left.

Every dtype a matrix can hold occurs, with gaps; an on-demand view takes a request-time input. Labels follow
from the very snapshot that a row's point-in-time join finds, so a model can learn them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

DAYS = 60
END = datetime.now(tz=UTC).replace(hour=0, minute=0, second=0, microsecond=0)
START = END - timedelta(days=DAYS)
CUSTOMERS = 60
ROWS = 2_400
TTL = timedelta(days=3)
# Offered in the last week only: no training part has seen it.
NEW_PLAN = "launch"

_STORE = """\
project: subscriptions
provider: local
registry: registry.db
online_store: {type: redis, connection_string: "127.0.0.1:1"}
offline_store: {type: core.offline.BanquetOfflineStore}
entity_key_serialization_version: 3
"""

_DEFINITIONS = """\
from datetime import timedelta
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Float32, Float64, Int64, String, UnixTimestamp

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.INT64)
usage = FeatureView(
    name="usage", entities=[customer], ttl=timedelta(days=3),
    source=FileSource(name="usage", path="usage.parquet", timestamp_field="event_timestamp"),
    schema=[
        Field(name="customer_id", dtype=Int64), Field(name="calls", dtype=Int64),
        Field(name="minutes", dtype=Float64), Field(name="quality", dtype=Float32),
        Field(name="plan", dtype=String), Field(name="trial", dtype=Bool),
        Field(name="renewed_at", dtype=UnixTimestamp), Field(name="devices", dtype=Array(String)),
    ],
)
offer = RequestSource(name="offer", schema=[Field(name="price", dtype=Float64)])


@on_demand_feature_view(
    sources=[usage[["minutes"]], offer], schema=[Field(name="price_per_minute", dtype=Float64)], mode="python"
)
def value(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"price_per_minute": [
        None if minutes is None else price / (1.0 + minutes)
        for minutes, price in zip(inputs["minutes"], inputs["price"])
    ]}


churn_v1 = FeatureService(
    name="churn_v1",
    features=[usage[["calls", "minutes", "quality", "plan", "trial", "renewed_at"]], value],
)
with_list = FeatureService(name="with_list", features=[usage[["calls", "devices"]]])
"""


def write(path: Path) -> Path:
    """Write definitions, the source and ``labels.parquet`` below ``path``; returns ``path``."""
    path.mkdir(parents=True)
    (path / "feature_store.yaml").write_text(_STORE)
    (path / "definitions.py").write_text(_DEFINITIONS)
    usage = snapshots()
    usage.to_parquet(path / "usage.parquet", coerce_timestamps="us")
    labels(usage).to_parquet(path / "labels.parquet", coerce_timestamps="us")
    return path


def snapshots() -> pd.DataFrame:
    """One row per customer and day; every value may be missing."""
    rng = np.random.default_rng(11)
    rows = CUSTOMERS * DAYS
    day = np.repeat(np.arange(DAYS), CUSTOMERS)
    gone = rng.random((rows, 6)) < 0.08
    plans = rng.choice(["basic", "family", "pro"], rows)
    plans = np.where((day >= DAYS - 7) & (rng.random(rows) < 0.1), NEW_PLAN, plans)
    seconds = rng.integers(0, 200 * 86_400, rows)
    return pd.DataFrame(
        {
            "customer_id": np.tile(np.arange(CUSTOMERS), DAYS),
            "calls": pd.Series(rng.poisson(4, rows), dtype="Int64").mask(gone[:, 0]),
            "minutes": pd.Series(np.round(rng.gamma(2, 30, rows), 1)).mask(gone[:, 1]),
            "quality": pd.Series(rng.normal(size=rows).astype(np.float32)).mask(gone[:, 2]),
            "plan": pd.Series(plans, dtype=object).mask(gone[:, 3], None),
            "trial": pd.Series(rng.random(rows) < 0.2, dtype="boolean").mask(gone[:, 4]),
            "renewed_at": pd.Series(pd.to_datetime(END) - pd.to_timedelta(seconds, unit="s")).mask(
                gone[:, 5]
            ),
            "devices": [["phone"]] * rows,
            "event_timestamp": pd.to_datetime(START) + pd.to_timedelta(day, unit="D"),
        }
    )


def labels(usage: pd.DataFrame) -> pd.DataFrame:
    """Entity rows some hours after a snapshot, in no order; every tenth customer has no snapshots at all."""
    rng = np.random.default_rng(12)
    chosen = usage.iloc[rng.choice(len(usage), ROWS, replace=False)].reset_index(drop=True)
    score = (
        chosen["minutes"].fillna(60.0).to_numpy() / 25
        - chosen["calls"].astype("float64").fillna(4.0).to_numpy() / 2
        + np.where(chosen["plan"] == "pro", 1.5, -0.5)
        + rng.logistic(size=ROWS)
    )
    unknown = rng.random(ROWS) < 0.1
    hours = pd.to_timedelta(rng.integers(1, 20, ROWS), unit="h")
    return pd.DataFrame(
        {
            "customer_id": chosen["customer_id"].mask(unknown, chosen["customer_id"] + 10_000),
            "event_timestamp": chosen["event_timestamp"] + hours,
            "price": np.round(rng.uniform(5, 20, ROWS), 2),
            "left": (score > 0).astype(np.int64),
            "mood": np.array(["bad", "good", "so-so"])[np.digitize(score, [-1.0, 1.0])],
            "score": score,
        }
    )
