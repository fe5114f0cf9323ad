"""Stock Feast and the layout on one real server: what either writes, the other reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, FeatureView, FileSource, RepoConfig, ValueType
from feast import Field as FeastField
from feast.types import Array, Bool, Bytes, Float32, Float64, Int64, Json, Map, String, UnixTimestamp

from core import layout
from core.layout_rows import RowEncoder, assemble, bulk_string, command_head
from core.types import Dtype, Field
from tests.support.feast_values import same

PROJECT = "layout"
NOW = datetime(2026, 5, 1, 12, 30, 45, 678_901, tzinfo=UTC)
USER, STORE = Field("user_id", Dtype.INT64), Field("store", Dtype.STRING)
DTYPES = {
    "spend": (Float64, Dtype.DOUBLE),
    "ratio": (Float32, Dtype.FLOAT),
    "visits": (Int64, Dtype.INT64),
    "city": (String, Dtype.STRING),
    "member": (Bool, Dtype.BOOL),
    "photo": (Bytes, Dtype.BYTES),
    "seen": (UnixTimestamp, Dtype.UNIX_TIMESTAMP),
    "tags": (Array(String), Dtype.STRING_LIST),
    "vector": (Array(Float32), Dtype.FLOAT_LIST),
    "profile": (Json, Dtype.JSON),
    "limits": (Map, Dtype.MAP),
}
FEATURES = [Field(name, dtype) for name, (_, dtype) in DTYPES.items()]


def rows() -> pa.Table:
    moments = [NOW - timedelta(hours=row, microseconds=row * 7) for row in range(4)]
    return pa.table(
        {
            "user_id": pa.array([1, -2, 2**62, 0]),
            "store": pa.array(["north", "", "süd", "a:b"]),
            "ts": pa.array(moments, pa.timestamp("us", tz="UTC")),
            "spend": pa.array([1.5, None, -0.0, 1e300]),
            "ratio": pa.array([0.1, 0.25, None, -3.0], pa.float32()),
            "visits": pa.array([0, -1, 300, None]),
            "city": pa.array(["Köln", "", None, "x" * 300]),
            "member": pa.array([True, False, None, True]),
            "photo": pa.array([b"\x00\xff", b"p", None, b"\r\n"]),
            "seen": pa.array([NOW, None, NOW - timedelta(days=40_000), NOW], pa.timestamp("us", tz="UTC")),
            "tags": pa.array([["a", "b"], [], None, ["c"]]),
            "vector": pa.array([[0.5, -1.0], [0.1], None, []], pa.list_(pa.float32())),
            "profile": pa.array(['{"a": [1, null]}', "3", None, '"text"']),
            "limits": pa.array([json.dumps({"low": 1, "high": 2.5}), "{}", None, '{"deep": {"x": "y"}}']),
        }
    )


@pytest.fixture(scope="module")
def store(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """A repository with a view of two join keys and one without entities, materialized by stock Feast."""
    path = tmp_path_factory.mktemp("layout")
    pq.write_table(rows(), path / "rows.parquet")
    pq.write_table(rows().slice(0, 1), path / "row.parquet")
    (path / "feature_store.yaml").write_text("")
    config = RepoConfig(
        project=PROJECT,
        provider="local",
        registry=str(path / "registry.db"),
        online_store={"type": "redis", "connection_string": valkey.connection_string},
        entity_key_serialization_version=3,
        repo_path=Path(path),
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    shop = Entity(name="shop", join_keys=["store"], value_type=ValueType.STRING)
    schema = [FeastField(name=name, dtype=dtype) for name, (dtype, _) in DTYPES.items()]
    pair = FeatureView(
        name="pair",
        entities=[user, shop],
        schema=[FeastField(name="user_id", dtype=Int64), FeastField(name="store", dtype=String), *schema],
        source=FileSource(path=str(path / "rows.parquet"), timestamp_field="ts"),
    )
    climate = FeatureView(
        name="climate",
        entities=[],
        schema=[FeastField(name="spend", dtype=Float64)],
        source=FileSource(path=str(path / "row.parquet"), timestamp_field="ts"),
    )
    opened = FeatureStore(config=config)
    opened.apply([user, shop, pair, climate])
    opened.materialize(NOW - timedelta(days=30), NOW + timedelta(hours=1))
    yield opened
    opened.teardown()


def encoders() -> list[tuple[RowEncoder, pa.Table]]:
    return [
        (RowEncoder(PROJECT, "pair", [USER, STORE], FEATURES, "ts"), rows()),
        (RowEncoder(PROJECT, "climate", [], [Field("spend", Dtype.DOUBLE)], "ts"), rows().slice(0, 1)),
    ]


def write(client: Any, encoder: RowEncoder, table: pa.Table) -> list[bytes]:
    encoded = encoder.encode(table)
    head = command_head(2 + 2 * encoded.field_count) + bulk_string(b"HSET")
    commands = assemble(len(encoded), head, *encoded.key, *encoded.fields)
    connection = client.connection_pool.get_connection()
    try:
        for chunk, _ in commands.chunks(500):
            connection.send_packed_command([bytes(chunk)])
        for _ in range(len(commands)):
            assert connection.read_response() >= 0
    finally:
        client.connection_pool.release(connection)
    return encoded.keys()


def test_the_bytes_in_redis_are_those_that_stock_feast_wrote(store: FeatureStore, valkey: Any) -> None:
    with valkey.client() as theirs, valkey.client(db=1) as ours:
        ours.flushdb()
        keys = [key for encoder, table in encoders() for key in write(ours, encoder, table)]
        assert set(keys) == set(ours.scan_iter())
        assert {key for key in theirs.scan_iter() if key.endswith(PROJECT.encode())} == set(keys)
        limits = layout.feature_field("pair", "limits")
        for key in keys:
            mine, yours = ours.hgetall(key), theirs.hgetall(key)
            # Map entries stand in a hash table's order in Feast's bytes.
            left, right = (layout.decode_value(hash_.pop(limits, None), Dtype.MAP) for hash_ in (mine, yours))
            assert left == right
            assert mine == yours


def test_stock_feast_reads_what_was_encoded_in_bulk(store: FeatureStore, valkey: Any) -> None:
    table = rows()
    entities = [{"user_id": u.as_py(), "store": s.as_py()} for u, s in zip(table["user_id"], table["store"])]  # noqa: B905
    features = [f"pair:{name}" for name in DTYPES] + ["climate:spend"]
    before = store.get_online_features(features, entities, full_feature_names=True).to_dict()
    with valkey.client() as client:
        for encoder, source in encoders():
            keys = write(client, encoder, source)
            client.delete(*keys)
            write(client, encoder, source)
    after = store.get_online_features(features, entities, full_feature_names=True).to_dict()
    assert same(after, before)
    assert after["pair__city"] == ["Köln", "", None, "x" * 300]
    assert after["pair__visits"] == [0, -1, 300, None]
    assert after["climate__spend"] == [1.5] * 4


def test_what_stock_feast_wrote_is_read_as_stock_feast_reads_it(store: FeatureStore, valkey: Any) -> None:
    table = rows()
    columns = [table["user_id"].to_pylist(), table["store"].to_pylist()]
    entities = [{"user_id": user, "store": shop} for user, shop in zip(*columns, strict=True)]
    read = store.get_online_features([f"pair:{name}" for name in DTYPES], entities).to_dict()
    keys = layout.EntityKeys(PROJECT, [USER, STORE])
    encoded = keys.encode(columns)
    assert [keys.decode(key) for key in encoded] == list(zip(*columns, strict=True))
    with valkey.client() as client:
        hashes = [client.hgetall(key) for key in encoded]
    for name, (_, dtype) in DTYPES.items():
        cells = [row[layout.feature_field("pair", name)] for row in hashes]
        assert same(layout.decode_column(cells, dtype), read[name])
    stamps = layout.decode_timestamps([row[layout.timestamp_field("pair")] for row in hashes])
    assert [datetime.fromtimestamp(0, UTC) + timedelta(microseconds=ns // 1000) for ns in stamps if ns] == (
        table["ts"].to_pylist()
    )
