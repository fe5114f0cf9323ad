"""Every type and key shape that stock Feast can materialize, from the file to Redis: the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import (
    Array,
    Bool,
    Bytes,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    Map,
    Set,
    String,
    Struct,
    UnixTimestamp,
    Uuid,
)
from feast.types import Decimal as Decimal_

from core.feast_protos import Value
from materialization.run import materialize
from tests.support.loads import NOW, START, everything, repository
from tests.support.valkey import Valkey

ROWS = 40
MICROS = [int(START.timestamp()) * 10**6 + i * 3_333_333_333 for i in range(ROWS)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("types")) as server:
        yield server


def some_null(values: list[Any]) -> list[Any]:
    return [None if i % 5 == 3 else value for i, value in enumerate(values)]


NUMBERS = list(range(-3, ROWS - 3))
FLOATS = [n / 7 for n in NUMBERS[:-3]] + [float("nan"), float("inf"), -0.0]
TEXTS = [f"é {n}" * (n % 4) for n in range(ROWS)]

# name: Feast's type, the file's type, values
COLUMNS: dict[str, tuple[FeastType, pa.DataType, list[Any]]] = {
    "double": (Float64, pa.float64(), some_null(FLOATS)),
    "double_from_whole": (Float64, pa.int64(), NUMBERS),
    "single": (Float32, pa.float32(), some_null(FLOATS)),
    "whole": (Int64, pa.int64(), [n * (1 << 57) for n in range(-20, 20)]),
    "whole_nullable": (Int64, pa.int64(), some_null(NUMBERS)),
    "whole_from_narrow": (Int64, pa.uint8(), some_null([n % 256 for n in range(ROWS)])),
    "whole_from_float": (Int64, pa.float64(), some_null([float(n) for n in NUMBERS])),
    "narrow": (Int32, pa.int32(), some_null(NUMBERS)),
    "flag": (Bool, pa.bool_(), some_null([n % 2 == 0 for n in NUMBERS])),
    "text": (String, pa.string(), some_null(TEXTS)),
    "text_large": (String, pa.large_string(), TEXTS),
    "text_dictionary": (String, pa.dictionary(pa.int32(), pa.string()), some_null(TEXTS)),
    "blob": (Bytes, pa.binary(), some_null([b"\x00\xff" * (n % 3 + 1) for n in range(ROWS)])),
    "time_us": (UnixTimestamp, pa.timestamp("us", tz="UTC"), some_null(MICROS)),
    "time_ns": (UnixTimestamp, pa.timestamp("ns"), some_null([m * 1000 + 7 for m in MICROS])),
    "time_berlin": (UnixTimestamp, pa.timestamp("ms", tz="Europe/Berlin"), [m // 1000 for m in MICROS]),
    "time_date": (UnixTimestamp, pa.date32(), [date(1969, 12, 20) + timedelta(n) for n in range(ROWS)]),
    "doubles": (Array(Float64), pa.list_(pa.float64()), some_null([FLOATS[: n % 4] for n in range(ROWS)])),
    "singles": (Array(Float32), pa.list_(pa.float32()), [FLOATS[: n % 4] for n in range(ROWS)]),
    "wholes": (Array(Int64), pa.list_(pa.int64()), some_null([NUMBERS[: n % 4] for n in range(ROWS)])),
    "narrows": (Array(Int32), pa.list_(pa.int32()), [NUMBERS[: n % 4] for n in range(ROWS)]),
    "flags": (Array(Bool), pa.list_(pa.bool_()), [[True, False][: n % 3] for n in range(ROWS)]),
    "texts": (Array(String), pa.list_(pa.string()), some_null([TEXTS[: n % 4] for n in range(ROWS)])),
    "blobs": (Array(Bytes), pa.list_(pa.binary()), [[b"a", b""][: n % 3] for n in range(ROWS)]),
    "times": (
        Array(UnixTimestamp),
        pa.list_(pa.timestamp("us", tz="UTC")),
        [MICROS[: n % 3] for n in range(ROWS)],
    ),
    "text_set": (Set(String), pa.list_(pa.string()), [[f"{n}"] for n in range(ROWS)]),
    "whole_set": (Set(Int64), pa.list_(pa.int64()), [[n] for n in range(ROWS)]),
    "json": (Json, pa.string(), [json.dumps({"a": [n, None, "é"]}) for n in range(ROWS)]),
    "struct": (
        Struct({"a": Int64, "b": String}),
        pa.struct({"a": pa.int64(), "b": pa.string()}),
        [{"a": n, "b": f"{n}"} for n in range(ROWS)],
    ),
    "map": (Map, pa.string(), [json.dumps({"k": n}) for n in range(ROWS)]),
    "decimal": (Decimal_, pa.decimal128(20, 4), [Decimal(n) / 10000 for n in range(ROWS)]),
    "uuid": (Uuid, pa.string(), [str(UUID(int=n)) for n in range(ROWS)]),
}


KEYS: dict[str, tuple[Entity, pa.DataType, list[Any]]] = {
    "id64": (Entity(name="id64", value_type=ValueType.INT64), pa.int64(), [n * 10**15 for n in NUMBERS]),
    "id32": (Entity(name="id32", value_type=ValueType.INT32), pa.int32(), NUMBERS),
    "name": (
        Entity(name="name", value_type=ValueType.STRING),
        pa.string(),
        [f"é{{{n}}}" for n in range(ROWS)],
    ),
    "blob_key": (
        Entity(name="blob_key", value_type=ValueType.BYTES),
        pa.binary(),
        [bytes([n, 0, 255]) for n in range(ROWS)],
    ),
    "moment": (
        Entity(name="moment", value_type=ValueType.UNIX_TIMESTAMP),
        pa.timestamp("us", tz="UTC"),
        [m // 10**6 * 10**6 for m in MICROS],
    ),
}
SHAPES: dict[str, list[str]] = {
    "by_id64": ["id64"],
    "by_id32": ["id32"],
    "by_name": ["name"],
    "by_blob": ["blob_key"],
    "by_moment": ["moment"],
    "by_two": ["name", "id64"],
    "by_three": ["id32", "id64", "name"],
    "by_nothing": [],
}
EVENT_TYPES = {
    "event_us": (pa.timestamp("us", tz="UTC"), MICROS),
    "event_ns": (pa.timestamp("ns"), [m * 1000 + 999 for m in MICROS]),
    "event_ms": (pa.timestamp("ms", tz="America/New_York"), [m // 1000 for m in MICROS]),
}


@pytest.mark.filterwarnings("ignore:Discarding nonzero nanoseconds:UserWarning")  # stock Feast's
def _same_but_for_order(ours: bytes, stock: bytes) -> bool:
    """Stock writes map entries and the texts of a set in an order that changes with the hash seed."""
    messages = [Value.FromString(cell) for cell in (ours, stock)]
    kinds = [message.WhichOneof("val") or "" for message in messages]
    if kinds[0] != kinds[1] or len(ours) != len(stock):
        return False
    if kinds[0].endswith("_set_val"):
        return sorted(getattr(messages[0], kinds[0]).val) == sorted(getattr(messages[1], kinds[1]).val)
    return ("map" in kinds[0] or "struct" in kinds[0]) and bool(messages[0] == messages[1])


# Stock says so of the nanosecond timestamps that it cuts to microseconds, as Banquet does.
@pytest.mark.filterwarnings("ignore:Discarding nonzero nanoseconds:UserWarning")
def test_every_type_and_key_shape_has_stock_feasts_bytes(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours by HSET, and by RESTORE."""
    arrays = {name: pa.array(values, kind) for name, (_, kind, values) in COLUMNS.items()}
    arrays |= {name: pa.array(values, kind) for name, (_, kind, values) in KEYS.items()}
    arrays |= {name: pa.array(values, kind) for name, (kind, values) in EVENT_TYPES.items()}
    pq.write_table(pa.table(arrays), tmp_path / "rows.parquet")
    entities = [entity for entity, _, _ in KEYS.values()]
    views = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        source = FileSource(
            name=name,
            path=str(tmp_path / "rows.parquet"),
            timestamp_field=list(EVENT_TYPES)[number % len(EVENT_TYPES)],
            field_mapping={"double": "twice"} if number == 0 else None,
        )
        schema = [Field(name=column, dtype=kind) for column, (kind, *_) in COLUMNS.items()]
        if number == 0:
            schema[0] = Field(name="twice", dtype=Float64)
        views.append(
            FeatureView(
                name=name,
                entities=[KEYS[key][0] for key in shape],
                schema=schema,
                source=source,
                ttl=timedelta(0),
            )
        )
    stock = repository(tmp_path / "stock", server, db=0, engine="local", offline="file")
    ours = {db: repository(tmp_path / f"ours{db}", server, db=db) for db in (1, 2)}
    for repo in (stock, *ours.values()):
        repo.store().apply([*entities, *views])
    stock.store().materialize(START, NOW)
    expected = everything(server, 0)
    assert len(expected) > 6 * ROWS
    for db, repo in ours.items():
        with server.client() as client:
            client.config_resetstat()
            report = materialize(repo, start=START, end=NOW)
            assert report.ok, json.dumps(report.as_json(), indent=1)
            assert ("cmdstat_restore" in client.info("commandstats")) == (db == 2)
        found = everything(server, db)
        assert set(found) == set(expected)
        for key, row in expected.items():
            assert set(found[key]) == set(row)
            for name, cell in row.items():
                assert found[key][name] == cell or _same_but_for_order(found[key][name], cell), (key, name)
        monkeypatch.setattr("core.restore.LEAST_ROWS", 1)
