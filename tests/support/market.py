"""A Feast repository for the offline side alone: SQLite online, sources of every layout.

``apply`` lays one down and runs `feast apply` in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd

DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)

OURS = """type: core.offline.BanquetOfflineStore
  memory_limit: 512MB
  threads: 2
  staging_location: staged"""

DEFINITIONS = """
from datetime import timedelta

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.STRING)

spend = FeatureView(
    name="spend", entities=[user], ttl=timedelta(days=2),
    schema=[
        Field(name="user_id", dtype=Int64), Field(name="amount", dtype=Float64),
        Field(name="note", dtype=String),
    ],
    source=FileSource(
        name="spend", path="data/spend.parquet", timestamp_field="event_timestamp",
        created_timestamp_column="created",
    ),
)
# Everything the source calls otherwise: key, time, created time and feature.
visits = FeatureView(
    name="visits", entities=[user, shop], ttl=timedelta(0),
    schema=[
        Field(name="user_id", dtype=Int64), Field(name="shop_id", dtype=String),
        Field(name="count", dtype=Int64),
    ],
    source=FileSource(
        name="visits", path="data/visits", timestamp_field="event_timestamp",
        created_timestamp_column="created",
        field_mapping={"uid": "user_id", "at": "event_timestamp", "made": "created", "n": "count"},
    ),
)
weather = FeatureView(
    name="weather", entities=[], ttl=timedelta(days=30), schema=[Field(name="degrees", dtype=Float64)],
    source=FileSource(name="weather", path="data/weather.parquet", timestamp_field="event_timestamp"),
)
clicks = FeatureView(
    name="clicks", entities=[user], ttl=timedelta(days=2),
    schema=[Field(name="user_id", dtype=Int64), Field(name="clicks", dtype=Int64)],
    source=PushSource(name="clicks_push", batch_source=FileSource(
        name="clicks", path="data/clicks", timestamp_field="event_timestamp",
        field_mapping={"n_clicks": "clicks"},
    )),
)
days = FeatureView(
    name="days", entities=[user], ttl=timedelta(days=60),
    schema=[Field(name="user_id", dtype=Int64), Field(name="level", dtype=Int64)],
    source=FileSource(name="days", path="data/days/*/*.parquet", timestamp_field="day"),
)
request = RequestSource(name="request", schema=[Field(name="budget", dtype=Float64)])


@on_demand_feature_view(sources=[spend[["amount"]], request], schema=[Field(name="left", dtype=Float64)])
def rest(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"left": inputs["budget"] - inputs["amount"]})


everything = FeatureService(
    name="everything", features=[spend[["note"]], visits, weather, rest],
    logging_config=LoggingConfig(
        destination=FileLoggingDestination(path="logs", partition_by=["__log_date"]), sample_rate=1.0
    ),
)
pair = FeatureService(name="pair", features=[
    spend[["amount"]].with_name("buyer").with_join_key_map({"user_id": "buyer_id"}),
    spend[["amount"]].with_name("seller").with_join_key_map({"user_id": "seller_id"}),
])
"""

_STORE = """
project: offline
provider: local
registry: registry.db
online_store: {{type: sqlite, path: online.db}}
offline_store:
  {offline}
entity_key_serialization_version: 3
"""


def stamps(*days: float) -> pd.DatetimeIndex:
    return pd.DatetimeIndex([START + timedelta(days=day) for day in days])


def write_sources(data: Path) -> None:
    data.mkdir()
    pd.DataFrame(
        {
            "user_id": [1, 1, 2, 1],
            "amount": [10.0, 11.0, 20.0, None],
            "note": ["a", "b", None, "d"],
            "event_timestamp": stamps(0, 1, 1, 2),
            "created": stamps(0, 1, 1, 4),
        }
    ).to_parquet(data / "spend.parquet")
    (data / "visits").mkdir()
    for name, count, made in (("a", 1, 3), ("b", 2, 2)):
        pd.DataFrame(
            {"uid": [1, 2], "shop_id": ["x", "y"], "at": stamps(0, 1), "made": stamps(made, made), "n": count}
        ).to_parquet(data / "visits" / f"{name}.parquet", coerce_timestamps="us")
    pd.DataFrame({"degrees": [-3.0, 4.0], "event_timestamp": stamps(0, 2)}).to_parquet(
        data / "weather.parquet"
    )
    (data / "clicks").mkdir()
    pd.DataFrame({"user_id": [1], "n_clicks": [5], "event_timestamp": stamps(0)}).to_parquet(
        data / "clicks" / "0.parquet"
    )
    for month in ("2024-01", "2024-02"):
        folder = data / "days" / f"month={month}"
        folder.mkdir(parents=True)
        day = pd.Timestamp(f"{month}-01").date()
        pd.DataFrame({"user_id": [1], "level": [int(month[-1])], "day": [day]}).to_parquet(
            folder / "0.parquet"
        )


def apply(path: Path, offline: str = OURS) -> Path:
    """Write the repository to ``path`` and run `feast apply` there."""
    path.mkdir(parents=True)
    (path / "feature_store.yaml").write_text(_STORE.format(offline=offline))
    (path / "definitions.py").write_text(DEFINITIONS)
    write_sources(path / "data")
    run_apply(path)
    return path


def run_apply(path: Path) -> None:
    """Run `feast apply`, as a user does."""
    feast = Path(sys.executable).parent / "feast"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([feast, "apply"], cwd=path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
