"""Bulk encoding held to stock Feast: the same batch through Feast's own conversion and its Redis store."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import hiredis
import pyarrow as pa
import pytest
from feast import Entity, FeatureView, FileSource
from feast import Field as FeastField
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.types import Array, Float64, Int64, Set, String, Struct, from_value_type
from feast.utils import _convert_arrow_to_proto, make_tzaware
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from core import layout_messages
from core.layout_rows import EncodedRows, RowEncoder, assemble, bulk_string, command_head
from core.types import Dtype, Field
from tests.support.feast_values import INT32, INT64, JSON, MOMENTS, SECONDS, TEXT, same

PROJECT, VIEW = "shop", "user_behavior_v2"
EXACT_IN_FLOAT = st.integers(-(2**53), 2**53)
WHOLE_FLOATS = st.floats(-(2.0**62), 2.0**62) | st.just(float("nan"))
NANOS = st.integers(-(2**62), 2**62)
STRUCTS = st.fixed_dictionaries({"a": INT64, "b": TEXT, "c": st.lists(st.floats(), min_size=1, max_size=2)})
STRUCT_TYPE = pa.struct({"a": pa.int64(), "b": pa.string(), "c": pa.list_(pa.float64())})
Strategy = st.SearchStrategy[Any]


def lists(element: Strategy) -> Strategy:
    return st.lists(element, max_size=5)


# What Feast can materialize: dtype, Arrow type, values, and whether nulls may be among them.
COLUMNS: list[tuple[Dtype, pa.DataType, Strategy, bool]] = [
    (Dtype.DOUBLE, pa.float64(), st.floats(), True),
    (Dtype.DOUBLE, pa.int64(), EXACT_IN_FLOAT, True),
    (Dtype.FLOAT, pa.float32(), st.floats(width=32), True),
    (Dtype.FLOAT, pa.float64(), st.floats(), True),
    (Dtype.FLOAT, pa.int32(), INT32, True),
    (Dtype.INT64, pa.int64(), INT64, False),
    (Dtype.INT64, pa.int64(), EXACT_IN_FLOAT, True),
    (Dtype.INT64, pa.uint8(), st.integers(0, 255), True),
    (Dtype.INT64, pa.uint64(), st.integers(0, 2**63 - 1), False),
    (Dtype.INT64, pa.float64(), WHOLE_FLOATS, True),
    (Dtype.INT64, pa.bool_(), st.booleans(), True),
    (Dtype.INT32, pa.int32(), INT32, True),
    (Dtype.INT32, pa.int64(), INT32, True),
    (Dtype.INT32, pa.float64(), st.floats(-(2.0**31), 2.0**31 - 1), True),
    (Dtype.BOOL, pa.bool_(), st.booleans(), True),
    (Dtype.BOOL, pa.int64(), st.integers(0, 1), False),
    (Dtype.STRING, pa.string(), TEXT, True),
    (Dtype.STRING, pa.large_string(), TEXT, True),
    (Dtype.STRING, pa.dictionary(pa.int32(), pa.string()), TEXT, True),
    (Dtype.STRING, pa.int64(), INT64, False),
    (Dtype.STRING, pa.float64(), st.floats(), True),
    (Dtype.STRING, pa.bool_(), st.booleans(), True),
    (Dtype.BYTES, pa.binary(), st.binary(min_size=1, max_size=200), True),
    (Dtype.BYTES, pa.large_binary(), st.binary(min_size=1, max_size=9), True),
    (Dtype.BYTES, pa.binary(3), st.binary(min_size=3, max_size=3), True),
    (Dtype.PDF_BYTES, pa.binary(), st.binary(min_size=1, max_size=9), True),
    (Dtype.IMAGE_BYTES, pa.binary(), st.binary(min_size=1, max_size=9), True),
    (Dtype.UNIX_TIMESTAMP, pa.timestamp("ns"), NANOS, True),
    (Dtype.UNIX_TIMESTAMP, pa.timestamp("us", tz="Europe/Berlin"), NANOS, True),
    (Dtype.UNIX_TIMESTAMP, pa.timestamp("ms", tz="UTC"), NANOS, True),
    (Dtype.UNIX_TIMESTAMP, pa.timestamp("s"), SECONDS, True),
    (Dtype.UNIX_TIMESTAMP, pa.date32(), INT32, True),
    (Dtype.UNIX_TIMESTAMP, pa.int64(), SECONDS, False),
    (Dtype.BYTES_LIST, pa.list_(pa.binary()), lists(st.binary(max_size=9)), True),
    (Dtype.STRING_LIST, pa.list_(pa.string()), lists(st.none() | TEXT), True),
    (Dtype.INT32_LIST, pa.list_(pa.int32()), lists(INT32), True),
    (Dtype.INT64_LIST, pa.large_list(pa.int64()), lists(INT64), True),
    (Dtype.DOUBLE_LIST, pa.list_(pa.float64()), lists(st.none() | st.floats()), True),
    (Dtype.DOUBLE_LIST, pa.large_list(pa.float32()), lists(st.floats(width=32)), True),
    (Dtype.FLOAT_LIST, pa.list_(pa.float32()), lists(st.none() | st.floats(width=32)), True),
    (Dtype.FLOAT_LIST, pa.list_(pa.float64()), lists(st.floats()), True),
    (Dtype.FLOAT_LIST, pa.list_(pa.float32(), 3), st.tuples(*[st.floats(width=32)] * 3), True),
    (Dtype.BOOL_LIST, pa.list_(pa.bool_()), lists(st.none() | st.booleans()), True),
    (Dtype.UNIX_TIMESTAMP_LIST, pa.list_(pa.timestamp("us")), lists(st.none() | MOMENTS), True),
    (Dtype.UUID_LIST, pa.list_(pa.string()), lists(st.uuids().map(str)), True),
    (Dtype.TIME_UUID_LIST, pa.list_(pa.string()), lists(st.uuids().map(str)), True),
    (Dtype.DECIMAL_LIST, pa.list_(pa.string()), lists(st.integers().map(str)), True),
    (Dtype.BYTES_SET, pa.list_(pa.binary()), lists(st.binary(max_size=2)), True),
    (Dtype.STRING_SET, pa.list_(pa.string()), lists(TEXT), True),
    (Dtype.INT32_SET, pa.list_(pa.int32()), lists(INT32), True),
    (Dtype.INT64_SET, pa.list_(pa.int64()), lists(INT64), True),
    (Dtype.DOUBLE_SET, pa.list_(pa.float64()), lists(st.floats(allow_nan=False)), True),
    (Dtype.FLOAT_SET, pa.list_(pa.float32()), lists(st.floats(allow_nan=False, width=32)), True),
    (Dtype.BOOL_SET, pa.list_(pa.bool_()), lists(st.booleans()), True),
    (Dtype.UNIX_TIMESTAMP_SET, pa.list_(pa.timestamp("us")), lists(MOMENTS), True),
    (Dtype.UUID_SET, pa.list_(pa.string()), lists(st.uuids().map(str)), True),
    (Dtype.TIME_UUID_SET, pa.list_(pa.string()), lists(st.uuids().map(str)), True),
    (Dtype.DECIMAL_SET, pa.list_(pa.string()), lists(st.integers().map(str)), True),
    (Dtype.MAP, pa.string(), st.dictionaries(TEXT, INT64, max_size=3).map(json.dumps), True),
    (Dtype.MAP, STRUCT_TYPE, STRUCTS, True),
    (Dtype.MAP_LIST, pa.string(), st.lists(st.dictionaries(TEXT, INT64), max_size=2).map(json.dumps), True),
    (Dtype.STRUCT, STRUCT_TYPE, STRUCTS, True),
    (Dtype.STRUCT_LIST, pa.list_(STRUCT_TYPE), st.lists(STRUCTS, max_size=2), True),
    (Dtype.JSON, pa.string(), JSON.map(json.dumps), True),
    (Dtype.JSON, pa.struct({"a": pa.int64()}), st.fixed_dictionaries({"a": INT64}), True),
    (Dtype.JSON_LIST, pa.list_(pa.string()), lists(JSON.map(json.dumps)), True),
    (Dtype.UUID, pa.string(), st.uuids().map(str), True),
    (Dtype.TIME_UUID, pa.string(), st.uuids().map(str), True),
    (Dtype.DECIMAL, pa.string(), st.integers().map(str), True),
    (
        Dtype.DECIMAL,
        pa.decimal128(20, 4),
        st.integers(-(10**15), 10**15).map(lambda i: Decimal(i) / 10000),
        True,
    ),
    (
        Dtype.VALUE_LIST,
        pa.list_(pa.list_(pa.int64())),
        st.lists(st.lists(INT64, max_size=3), max_size=3),
        True,
    ),
    (Dtype.VALUE_SET, pa.list_(pa.list_(pa.string())), st.lists(lists(TEXT), max_size=3), True),
]
# Entries of a map and texts of a set stand in no certain order in Feast's bytes.
UNORDERED = (Dtype.MAP, Dtype.MAP_LIST, Dtype.STRUCT, Dtype.STRUCT_LIST)
KEYS: list[tuple[Dtype, pa.DataType, Strategy]] = [
    (Dtype.INT64, pa.int64(), INT64),
    (Dtype.INT64, pa.int32(), INT32),
    (Dtype.INT64, pa.float64(), EXACT_IN_FLOAT),
    (Dtype.INT32, pa.int32(), INT32),
    (Dtype.STRING, pa.string(), TEXT),
    (Dtype.STRING, pa.int64(), INT64),
    (Dtype.BYTES, pa.binary(), st.binary(min_size=1, max_size=9)),
    (Dtype.UNIX_TIMESTAMP, pa.timestamp("us", tz="UTC"), NANOS),
    (Dtype.UNIX_TIMESTAMP, pa.int64(), SECONDS),
]
EVENTS: list[tuple[pa.DataType, Strategy]] = [
    (pa.timestamp("us", tz="UTC"), MOMENTS),
    (pa.timestamp("us"), st.integers(1_600_000_000_000_000, 1_900_000_000_000_000)),
    (pa.timestamp("ms", tz="America/New_York"), st.integers(-(10**12), 10**13)),
    (pa.timestamp("s"), st.integers(0, 2) | st.integers(1_600_000_000, 2_500_000_000)),
    (pa.timestamp("ns"), st.integers(-(10**15), 9 * 10**15).map(lambda us: us * 1000)),
]


NESTED = {
    Dtype.STRUCT: Struct({"a": Int64, "b": String, "c": Array(Float64)}),
    Dtype.STRUCT_LIST: Array(Struct({"a": Int64, "b": String, "c": Array(Float64)})),
    Dtype.VALUE_LIST: Array(Array(Int64)),
    Dtype.VALUE_SET: Set(Set(String)),
}


def feast_rows(
    batch: pa.RecordBatch, join_keys: list[Field], features: list[Field]
) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Each row's Redis key and hash as stock Feast writes them."""
    kinds = {field.name: ValueType(int(field.dtype)) for field in [*join_keys, *features]}
    view = FeatureView(
        name=VIEW,
        entities=[
            Entity(name=key.name, join_keys=[key.name], value_type=kinds[key.name]) for key in join_keys
        ],
        schema=[
            FeastField(name=f.name, dtype=NESTED.get(f.dtype) or from_value_type(kinds[f.name]))
            for f in [*join_keys, *features]
        ],
        source=FileSource(path="x.parquet", timestamp_field="ts"),
    )
    written = []
    for entity_key, values, moment, _ in _convert_arrow_to_proto(
        batch, view, {key.name: kinds[key.name] for key in join_keys}
    ):
        stamp = Timestamp()
        stamp.FromDatetime(make_tzaware(moment))
        cells = {_mmh3(f"{VIEW}:{name}"): message.SerializeToString() for name, message in values.items()}
        row = {f"_ts:{VIEW}".encode(): stamp.SerializeToString(), **cells}
        written.append((_redis_key(PROJECT, entity_key), row))
    return written


def our_rows(rows: EncodedRows) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Each row's Redis key and hash as the commands carry them, read by a RESP parser."""
    head = command_head(2 + 2 * rows.field_count) + bulk_string(b"HSET")
    commands = assemble(len(rows), head, *rows.key, *rows.fields)
    assert commands.offsets[0] == 0
    assert commands.offsets[-1] == len(commands.data)
    written = []
    for start, stop in zip(commands.offsets[:-1], commands.offsets[1:], strict=True):
        reader = hiredis.Reader()
        reader.feed(commands.data[start:stop].tobytes())
        name, key, *pairs = reader.gets()
        assert name == b"HSET"
        assert reader.gets() is False
        written.append((key, dict(zip(pairs[::2], pairs[1::2], strict=True))))
    assert rows.keys() == [key for key, _ in written]
    return written


def arrow(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Integers are ticks of a timestamp column; a dictionary column is encoded from its values."""
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    if (pa.types.is_timestamp(kind) or pa.types.is_date32(kind)) and isinstance(
        next(iter(values), None), int
    ):
        return pa.array(values, pa.int32() if pa.types.is_date32(kind) else pa.int64()).view(kind)
    return pa.array(values, kind)


def check(batch: pa.RecordBatch, join_keys: list[Field], features: list[Field]) -> None:
    ours = our_rows(RowEncoder(PROJECT, VIEW, join_keys, features, "ts").encode(batch))
    theirs = feast_rows(batch, join_keys, features)
    unordered = {
        _mmh3(f"{VIEW}:{field.name}")
        for field in features
        if field.dtype in UNORDERED or field.dtype.name.endswith("_SET")
    }
    for (our_key, our_hash), (their_key, their_hash) in zip(ours, theirs, strict=True):
        assert our_key == their_key
        assert our_hash.keys() == their_hash.keys()
        for field, cell in their_hash.items():
            if field in unordered:
                mine, yours = (
                    layout_messages.to_python(layout_messages.parse(c)) for c in (our_hash[field], cell)
                )
                assert same(mine, yours)
            else:
                assert our_hash[field] == cell


@pytest.mark.parametrize(
    ("dtype", "kind", "values", "nullable"),
    COLUMNS,
    ids=[f"{d.name}-{kind}"[:60] for d, kind, _, _ in COLUMNS],
)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_column_is_stored_as_feast_stores_it(
    dtype: Dtype, kind: pa.DataType, values: Strategy, nullable: bool, data: st.DataObject
) -> None:
    column = data.draw(st.lists(st.none() | values if nullable else values, min_size=1, max_size=8))
    drawn = [value for value in column if value is not None]
    batch = pa.record_batch(
        {
            "k": pa.array(range(len(column)), pa.int64()),
            "ts": pa.array([1_700_000_000] * len(column), pa.timestamp("s")),
            "f": arrow([*drawn[:1], *column], kind)[
                len(drawn[:1]) :
            ],  # a slice: offsets within buffers count
        }
    )
    check(batch, [Field("k", Dtype.INT64)], [Field("f", dtype)])


@given(data=st.data(), rows=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_keys_and_event_timestamps_are_stored_as_feast_stores_them(data: st.DataObject, rows: int) -> None:
    kinds = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3))
    names = data.draw(st.lists(TEXT.filter(bool), min_size=len(kinds), max_size=len(kinds), unique=True))
    event_kind, events = data.draw(st.sampled_from(EVENTS))
    columns = {
        f"key {name}": arrow(data.draw(st.lists(values, min_size=rows, max_size=rows)), kind)
        for name, (_, kind, values) in zip(names, kinds, strict=True)
    }
    columns["ts"] = arrow(data.draw(st.lists(events, min_size=rows, max_size=rows)), event_kind)
    columns["f"] = pa.array([0.5] * rows)
    join_keys = [Field(f"key {name}", dtype) for name, (dtype, _, _) in zip(names, kinds, strict=True)]
    check(pa.record_batch(columns), join_keys, [Field("f", Dtype.DOUBLE)])
