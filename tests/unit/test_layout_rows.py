"""Bulk encoding: the literal commands, how pieces combine, and where it departs from Feast on purpose."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import hiredis
import numpy as np
import pyarrow as pa
import pytest

from core import layout
from core.errors import InvalidEntity, InvalidFeatureValue, InvalidSource
from core.layout_rows import EncodedRows, RowEncoder, assemble, bulk_string, command_head
from core.types import Dtype, Field

USER = Field("user_id", Dtype.INT64)
SECOND = 1_700_000_000


def batch(rows: int, **columns: Any) -> pa.RecordBatch:
    moments = pa.array([SECOND * 10**6] * rows, pa.int64()).view(pa.timestamp("us", tz="UTC"))
    return pa.record_batch({"user_id": pa.array(range(rows), pa.int64()), "ts": moments, **columns})


def encoder(*features: Field, **options: Any) -> RowEncoder:
    return RowEncoder("shop", "v", options.pop("join_keys", [USER]), features, "ts", **options)


def parse(data: bytes) -> list[list[bytes]]:
    reader = hiredis.Reader()
    reader.feed(data)
    commands = []
    while (command := reader.gets()) is not False:
        commands.append(command)
    return commands


def hset(rows: EncodedRows) -> list[list[bytes]]:
    head = command_head(2 + 2 * rows.field_count) + bulk_string(b"HSET")
    return parse(assemble(len(rows), head, *rows.key, *rows.fields).data.tobytes())


def cells(column: pa.Array, dtype: Dtype) -> list[Any]:
    """What the cells of a column decode to."""
    rows = encoder(Field("f", dtype)).encode(batch(len(column), f=column))
    return layout.decode_column([command[-1] for command in hset(rows)], dtype)


def test_a_row_is_one_command_of_the_documented_bytes() -> None:
    rows = encoder(Field("score", Dtype.DOUBLE)).encode(batch(1, score=pa.array([1.5])))
    assert assemble(1, b"*6\r\n$4\r\nHSET\r\n", *rows.key, *rows.fields).data.tobytes() == (
        b"*6\r\n$4\r\nHSET\r\n"
        + b"$39\r\n"
        + (b"\x01\0\0\0" + b"\x02\0\0\0\x07\0\0\0user_id" + b"\x04\0\0\0\x08\0\0\0" + bytes(8) + b"shop")
        + b"\r\n$5\r\n_ts:v\r\n$6\r\n\x08\x80\xe2\xcf\xaa\x06\r\n"
        + b"$4\r\n"
        + layout.feature_field("v", "score")
        + b"\r\n$9\r\n\x29"
        + np.float64(1.5).tobytes()
        + b"\r\n"
    )


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows_encodes(rows: int) -> None:
    text = pa.array(["x" * row for row in range(rows)], pa.string())
    encoded = encoder(Field("t", Dtype.STRING)).encode(batch(rows, t=text))
    assert [layout.decode_value(command[-1], Dtype.STRING) for command in hset(encoded)] == text.to_pylist()
    assert len(encoded) == len(encoded.keys()) == rows


def test_pieces_of_two_views_and_constants_stand_in_one_command() -> None:
    doubles = encoder(Field("d", Dtype.DOUBLE)).encode(batch(2, d=pa.array([1.0, None])))
    texts = RowEncoder("shop", "w", [USER], [Field("t", Dtype.STRING)], "ts").encode(
        batch(2, t=pa.array(["a", "bc"]))
    )
    head = command_head(2 + 2 * (doubles.field_count + texts.field_count) + 1) + bulk_string(b"FCALL")
    commands = parse(
        assemble(2, head, *doubles.key, *doubles.fields, *texts.fields, bulk_string(b"end")).data.tobytes()
    )
    assert [command[0] for command in commands] == [b"FCALL"] * 2
    assert [command[1] for command in commands] == doubles.keys()
    assert commands[1][5] == b""
    assert commands[1][6:] == [
        b"_ts:w",
        commands[0][7],
        layout.feature_field("w", "t"),
        b"\x12\x02bc",
        b"end",
    ]


def test_filtered_rows_are_the_kept_ones_in_order() -> None:
    source = batch(5, d=pa.array([0.0, None, 2.0, 3.0, None]), t=pa.array(["", "a", None, "ccc", "d"]))
    rows = encoder(Field("d", Dtype.DOUBLE), Field("t", Dtype.STRING)).encode(source)
    keep = np.array([True, False, True, True, False])
    assert hset(rows.filter(keep)) == [
        command for command, kept in zip(hset(rows), keep, strict=True) if kept
    ]
    assert rows.filter(keep).keys() == [rows.keys()[0], rows.keys()[2], rows.keys()[3]]
    assert hset(rows.filter(np.zeros(5, bool))) == []


@pytest.mark.parametrize("size", [1, 100, 1_000, 10**9])
def test_chunks_are_whole_commands_of_about_the_size_asked_for(size: int) -> None:
    rows = encoder(Field("t", Dtype.STRING)).encode(batch(50, t=pa.array(["x" * row for row in range(50)])))
    commands = assemble(len(rows), b"*6\r\n" + bulk_string(b"HSET"), *rows.key, *rows.fields)
    chunks = list(commands.chunks(size))
    assert sum(count for _, count in chunks) == len(commands) == 50
    assert b"".join(chunk for chunk, _ in chunks) == commands.data.tobytes()
    for chunk, count in chunks:
        assert len(parse(bytes(chunk))) == count
        assert len(chunk) <= size or count == 1


def test_columns_may_have_other_names_in_the_source() -> None:
    source = pa.record_batch({"uid": [1], "ts": [datetime(2026, 1, 1, tzinfo=UTC)], "raw": [2.0]})
    rows = encoder(Field("f", Dtype.DOUBLE), columns={"user_id": "uid", "f": "raw"}).encode(source)
    assert rows.keys() == layout.EntityKeys("shop", [USER]).encode([[1]])
    assert hset(rows)[0][-2:] == [layout.feature_field("v", "f"), layout.encode_value(2.0, Dtype.DOUBLE)]


def test_a_view_without_entities_writes_its_one_row() -> None:
    rows = encoder(Field("f", Dtype.INT64), join_keys=[]).encode(batch(2, f=pa.array([1, 300])))
    assert rows.keys() == layout.EntityKeys("shop", []).encode([]) * 2


def test_event_timestamps_are_stored_to_the_microsecond_as_feast_stores_them() -> None:
    nanoseconds = pa.array([SECOND * 10**9 + 1_999], pa.int64()).view(pa.timestamp("ns"))
    rows = encoder().encode(pa.record_batch({"user_id": [1], "ts": nanoseconds}))
    assert rows.event_ns.tolist() == [SECOND * 10**9 + 1_000]
    assert layout.decode_timestamp(hset(rows)[0][-1]) == SECOND * 10**9 + 1_000


@pytest.mark.parametrize(
    "texts", [["x" * 200_000, "", None, "é" * 100], ["", "", ""], [None, None, "a"], ["\0", "\r\n", "$"]]
)
def test_texts_of_any_length_and_content_are_stored_whole(texts: list[str | None]) -> None:
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        assert cells(pa.array(texts, kind), Dtype.STRING) == texts


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 1, 127, 128, 2**56 - 1, 2**56, 2**63 - 1, -1, -(2**63), None],
        [2**55, None, 0],
        [2**62, 2**62],
        [None, 5],
    ],
)
def test_integers_of_every_length_are_stored(numbers: list[int | None]) -> None:
    assert cells(pa.array(numbers, pa.int64()), Dtype.INT64) == numbers


def test_an_all_null_column_without_a_type_is_stored_as_nulls() -> None:
    for dtype in (Dtype.DOUBLE, Dtype.STRING, Dtype.UNIX_TIMESTAMP, Dtype.MAP):
        assert cells(pa.nulls(3), dtype) == [None] * 3


def test_integers_keep_all_their_digits_beside_a_null() -> None:
    """Feast's conversion goes through float64 there."""
    assert cells(pa.array([2**53 + 1, None]), Dtype.INT64) == [2**53 + 1, None]
    assert cells(pa.array([7, None]), Dtype.STRING) == ["7", None]


def test_seconds_beside_a_null_stay_timestamps() -> None:
    """Feast stores every value of such a column as missing."""
    assert cells(pa.array([SECOND, None]), Dtype.UNIX_TIMESTAMP) == [
        datetime.fromtimestamp(SECOND, UTC),
        None,
    ]
    assert cells(pa.array([float(SECOND), None]), Dtype.UNIX_TIMESTAMP)[0] == datetime.fromtimestamp(
        SECOND, UTC
    )


def test_lists_of_nanosecond_timestamps_are_stored_in_seconds() -> None:
    """Feast stores the nanoseconds as if they were seconds."""
    moments = pa.array([[SECOND * 10**9]], pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("ns")))
    assert cells(moments, Dtype.UNIX_TIMESTAMP_LIST) == [[datetime.fromtimestamp(SECOND, UTC)]]


def test_lists_of_integers_may_hold_nulls() -> None:
    """Feast fails on them, though it has a default for lists that are not Arrow's."""
    assert cells(pa.array([[1, 2], None, []]), Dtype.INT64_LIST) == [[1, 2], None, []]


def test_zoned_timestamps_keep_the_zone_of_their_column() -> None:
    """Feast fails on Arrow timestamps for this type."""
    moment = datetime(2026, 5, 1, 12, tzinfo=ZoneInfo("America/New_York"))
    [stored, missing] = cells(
        pa.array([moment, None], pa.timestamp("us", "America/New_York")), Dtype.ZONED_TIMESTAMP
    )
    assert stored == moment
    assert stored.utcoffset() == moment.utcoffset()
    assert missing is None


def test_arrow_maps_are_stored() -> None:
    """Feast fails on them."""
    column = pa.array([[("a", 1), ("b", 2)], None], pa.map_(pa.string(), pa.int64()))
    assert cells(column, Dtype.MAP) == [{"a": 1, "b": 2}, None]
    assert cells(pa.array([[(1, "x")]], pa.map_(pa.int64(), pa.string())), Dtype.SCALAR_MAP) == [{1: "x"}]


def test_floats_of_another_width_than_declared_are_stored() -> None:
    """Feast refuses float32 and small integers for a Float64 feature."""
    assert cells(pa.array([0.5], pa.float32()), Dtype.DOUBLE) == [0.5]
    assert cells(pa.array([3], pa.int8()), Dtype.DOUBLE) == [3.0]


def test_sets_do_not_depend_on_the_process() -> None:
    rows = encoder(Field("f", Dtype.STRING_SET)).encode(batch(1, f=pa.array([["b", "a", "b"]])))
    assert hset(rows)[0][-1] == bytes.fromhex("ba01060a01620a0161")


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pa.array([2**31]), Dtype.INT32),
        (pa.array([2.0**63]), Dtype.INT64),
        (pa.array([float("inf")]), Dtype.INT64),
        (pa.array([2**64 - 1], pa.uint64()), Dtype.INT64),
        (pa.array(["a"]), Dtype.INT64),
        (pa.array(["a"]), Dtype.DOUBLE),
        (pa.array(["a"]), Dtype.BYTES),
        (pa.array(["a"]), Dtype.UNIX_TIMESTAMP),
        (pa.array([0.5]), Dtype.BOOL),
        (pa.array(["{"]), Dtype.JSON),
        (pa.array([[1]]), Dtype.DOUBLE),
        (pa.array([1]), Dtype.STRING_LIST),
    ],
)
def test_a_column_that_cannot_be_of_its_type_is_refused_by_name(column: pa.Array, dtype: Dtype) -> None:
    with pytest.raises(InvalidFeatureValue, match=f"'f' cannot be stored as {dtype.name}") as caught:
        encoder(Field("f", dtype)).encode(batch(1, f=column))
    assert caught.value.details["column"] == "f"


def test_missing_columns_and_event_timestamps_are_refused_by_name() -> None:
    with pytest.raises(InvalidSource, match="no column 'f'"):
        encoder(Field("f", Dtype.INT64)).encode(batch(1))
    with pytest.raises(InvalidSource, match="'ts' is int64"):
        encoder().encode(pa.record_batch({"user_id": [1], "ts": [5]}))
    with pytest.raises(InvalidFeatureValue, match="'ts' is null in 1 of 2 rows"):
        encoder().encode(pa.record_batch({"user_id": [1, 2], "ts": [datetime(2026, 1, 1, tzinfo=UTC), None]}))


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pa.array([1, None]), Dtype.INT64),
        (pa.array([2**31, 1]), Dtype.INT32),
        (pa.array(["a", "b"]), Dtype.INT64),
        (pa.array(["a", "b"]), Dtype.BYTES),
    ],
)
def test_a_join_key_column_that_does_not_fit_is_refused_by_name(column: pa.Array, dtype: Dtype) -> None:
    source = pa.record_batch({"k": column, "ts": [datetime(2026, 1, 1, tzinfo=UTC)] * 2})
    with pytest.raises(InvalidEntity, match="'k'") as caught:
        encoder(join_keys=[Field("k", dtype)]).encode(source)
    assert caught.value.details["field"] == "k"
