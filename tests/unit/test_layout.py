"""The layout's literal bytes, its refusals, and what it does with what Feast would not have written."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import layout, layout_cells
from core.errors import CorruptCell, InvalidEntity, InvalidFeatureValue, UnsupportedKeyVersion
from core.types import Dtype, Field

USER = Field("user_id", Dtype.INT64)
BROKEN_LAST = b"\x08\x80\x80\x80\x80\x01\x10\x80\x80\x80\x80\x80"


def test_an_integer_key_has_the_documented_bytes() -> None:
    [key] = layout.EntityKeys("shop", [USER]).encode([[42]])
    assert key == (
        b"\x01\0\0\0"
        + b"\x02\0\0\0\x07\0\0\0user_id"
        + b"\x04\0\0\0\x08\0\0\0"
        + b"\x2a"
        + bytes(7)
        + b"shop"
    )


def test_join_keys_stand_sorted_by_name_in_the_key_and_decode_in_the_given_order() -> None:
    keys = layout.EntityKeys("p", [Field("store", Dtype.STRING), Field("item", Dtype.INT32)])
    [key] = keys.encode([["north"], [7]])
    assert key == (
        b"\x02\0\0\0"
        + b"\x02\0\0\0\x04\0\0\0item"
        + b"\x02\0\0\0\x05\0\0\0store"
        + b"\x03\0\0\0\x04\0\0\0\x07\0\0\0"
        + b"\x02\0\0\0\x05\0\0\0north"
        + b"p"
    )
    assert keys.decode(key) == ("north", 7)


@pytest.mark.parametrize("version", [0, 1, 2, 4, None, "3"])
def test_another_key_version_is_refused_with_the_way_to_migrate(version: object) -> None:
    with pytest.raises(UnsupportedKeyVersion, match="materialize every view again"):
        layout.require_key_version(version)


def test_key_version_three_is_accepted() -> None:
    layout.require_key_version(3)


def test_keys_of_other_projects_and_join_keys_decode_to_none() -> None:
    keys = layout.EntityKeys("fraud", [USER])
    for other in (
        layout.EntityKeys("prodfraud", [USER]).encode([[1]])[0],
        layout.EntityKeys("frau", [USER]).encode([[1]])[0],
        layout.EntityKeys("fraud", [Field("user", Dtype.INT64)]).encode([[1]])[0],
        layout.EntityKeys("fraud", [USER, Field("z", Dtype.INT64)]).encode([[1], [2]])[0],
        keys.encode([[1]])[0][:-1],
        keys.prefix,
        b"",
        b"session:fraud",
    ):
        assert keys.decode(other) is None


def test_a_text_value_that_ends_like_a_longer_project_name_is_not_taken_for_it() -> None:
    name = [Field("name", Dtype.STRING)]
    short, long = layout.EntityKeys("fraud", name), layout.EntityKeys("prodfraud", name)
    [key] = short.encode([["prod"]])
    assert short.decode(key) == ("prod",)
    assert long.decode(key) is None


def test_a_key_of_a_changed_type_still_decodes() -> None:
    [key] = layout.EntityKeys("p", [Field("user_id", Dtype.STRING)]).encode([["a"]])
    assert layout.EntityKeys("p", [USER]).decode(key) == ("a",)


@pytest.mark.parametrize(
    ("dtype", "column", "row"),
    [
        (Dtype.INT64, [1, 2**63], 1),
        (Dtype.INT64, [1.0], 0),
        (Dtype.INT64, ["1"], 0),
        (Dtype.INT64, [None], 0),
        (Dtype.INT32, [-(2**31) - 1], 0),
        (Dtype.STRING, ["a", 1], 1),
        (Dtype.STRING, ["\ud800"], 0),
        (Dtype.BYTES, ["a"], 0),
        (Dtype.UNIX_TIMESTAMP, ["2026-01-01"], 0),
    ],
)
def test_a_key_value_that_does_not_fit_is_named(dtype: Dtype, column: list[Any], row: int) -> None:
    for join_keys, columns in (
        ([Field("k", dtype)], [column]),
        ([Field("a", Dtype.INT64), Field("k", dtype)], [[0] * len(column), column]),
    ):
        with pytest.raises(InvalidEntity, match=rf"'k' of row {row} cannot be {dtype.name}") as caught:
            layout.EntityKeys("p", join_keys).encode(columns)
        assert caught.value.details == {"field": "k", "row": row}


def test_numpy_integers_are_keys_like_pythons() -> None:
    keys = layout.EntityKeys("p", [USER])
    assert keys.encode([np.array([5, 6])]) == keys.encode([[5, 6]])  # type: ignore[list-item]


def test_columns_of_different_lengths_are_refused() -> None:
    keys = layout.EntityKeys("p", [USER, Field("b", Dtype.INT64)])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        keys.encode([[1, 2], [1]])


def test_hash_fields_have_the_known_bytes() -> None:
    assert layout.feature_field("user_behavior", "score") == bytes.fromhex("a339a799")
    assert layout.timestamp_field("user_behavior") == b"_ts:user_behavior"


def test_features_that_share_a_hash_field_are_found() -> None:
    one, other = ("v", "f37660"), ("v", "f43618")
    assert layout.feature_field(*one) == layout.feature_field(*other)
    assert layout.colliding_fields([one, ("v", "a"), other, one]) == [(one, other)]
    assert layout.colliding_fields([one, one, ("v", "a")]) == []


CELLS: Sequence[tuple[Any, Dtype, str]] = [
    (1.5, Dtype.DOUBLE, "29 000000000000f83f"),
    (1.5, Dtype.FLOAT, "35 0000c03f"),
    (0, Dtype.INT64, "20 00"),
    (300, Dtype.INT64, "20 ac02"),
    (-1, Dtype.INT64, "20 ffffffffffffffffff01"),
    (-1, Dtype.INT32, "18 ffffffffffffffffff01"),
    (False, Dtype.BOOL, "38 00"),
    ("", Dtype.STRING, "12 00"),
    ("é", Dtype.STRING, "12 02 c3a9"),
    (b"\x00", Dtype.BYTES, "0a 01 00"),
    (b"\x00", Dtype.PDF_BYTES, "0a 01 00"),
    (datetime(1970, 1, 1, tzinfo=UTC), Dtype.UNIX_TIMESTAMP, "40 00"),
    ([], Dtype.INT64_LIST, "72 00"),
    ([1, 2], Dtype.INT64_LIST, "72 04 0a 02 01 02"),
    (Decimal("1.50"), Dtype.DECIMAL, "e202 04 312e3530"),
    ({"a": 1}, Dtype.JSON, "8202 08 7b2261223a20317d"),
]


@pytest.mark.parametrize(("value", "dtype", "cell"), CELLS)
def test_values_have_the_documented_bytes_and_come_back(value: Any, dtype: Dtype, cell: str) -> None:
    assert layout.encode_value(value, dtype).hex() == cell.replace(" ", "")
    assert layout.decode_value(bytes.fromhex(cell), dtype) == value


@pytest.mark.parametrize("missing", [None, float("nan"), np.float64("nan"), pd.NA, pd.NaT])
@pytest.mark.parametrize("dtype", [Dtype.DOUBLE, Dtype.INT64, Dtype.STRING, Dtype.BOOL, Dtype.INT64_LIST])
def test_a_missing_value_is_an_empty_cell(missing: Any, dtype: Dtype) -> None:
    assert layout.encode_value(missing, dtype) == b""


@pytest.mark.parametrize("missing", [pd.NaT, np.datetime64("NaT"), float("nan")])
def test_a_missing_timestamp_is_stored_as_feasts_number_and_decodes_to_none(missing: Any) -> None:
    cell = layout.encode_value(missing, Dtype.UNIX_TIMESTAMP)
    assert cell.hex() == "40" + "80" * 9 + "01"
    assert layout.decode_value(cell, Dtype.UNIX_TIMESTAMP) is None
    assert layout.decode_json_column([cell], Dtype.UNIX_TIMESTAMP) == [None]
    assert layout.encode_value(None, Dtype.UNIX_TIMESTAMP) == b""


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (2**63, Dtype.INT64),
        (2**31, Dtype.INT32),
        (float("inf"), Dtype.INT64),
        ("x", Dtype.INT64),
        ("1.5", Dtype.DOUBLE),
        ([1.0], Dtype.DOUBLE),
        ("yes", Dtype.BOOL),
        ("text", Dtype.BYTES),
        ("\ud800", Dtype.STRING),
        (["a"], Dtype.STRING),
        ("abc", Dtype.STRING_LIST),
        ([1, "a"], Dtype.INT64_LIST),
        ([2**31], Dtype.INT32_LIST),
        ("{", Dtype.JSON),
        ([1], Dtype.MAP),
        ({1: 2}, Dtype.MAP),
        ({"a": object()}, Dtype.MAP),
        ({"a": [1, "b"]}, Dtype.MAP),
        ({"a": 1}, Dtype.SCALAR_MAP),
        (5, Dtype.ZONED_TIMESTAMP),
        (5, Dtype.UUID),
        (5, Dtype.NULL),
    ],
)
def test_a_value_that_cannot_be_of_its_type_is_refused(value: Any, dtype: Dtype) -> None:
    with pytest.raises(InvalidFeatureValue):
        layout.encode_value(value, dtype)


@pytest.mark.parametrize("rows", [1, 15, 16, 400])
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, -0.0, float("inf"), 1e300], Dtype.DOUBLE),
        ([0.5, 0.1], Dtype.FLOAT),
        ([0, 1, -1, 2**62, -(2**63), 300, 128], Dtype.INT64),
        ([0, 1, -1, 2**31 - 1, -(2**31)], Dtype.INT32),
        (["", "a", "é" * 100], Dtype.STRING),
        ([True, False], Dtype.BOOL),
    ],
)
@pytest.mark.parametrize("gap", [b"", None])
def test_long_and_short_columns_with_and_without_gaps_decode_alike(
    values: list[Any], dtype: Dtype, rows: int, gap: bytes | None
) -> None:
    column = [values[row % len(values)] for row in range(rows)]
    cells: list[bytes | None] = [layout.encode_value(value, dtype) for value in column]
    expected = [float(np.float32(value)) if dtype is Dtype.FLOAT else value for value in column]
    assert layout.decode_column(cells, dtype) == expected
    cells[rows // 2], expected[rows // 2] = gap, None
    assert layout.decode_column(cells, dtype) == expected


@pytest.mark.parametrize("gap", [b"", None, b"\x12\x01x"])
@pytest.mark.parametrize(
    "dtype", [Dtype.INT64, Dtype.INT32, Dtype.UNIX_TIMESTAMP, Dtype.STRING, Dtype.DOUBLE]
)
def test_a_long_column_of_different_values_decodes_as_its_cells_do_one_by_one(
    dtype: Dtype, gap: bytes | None
) -> None:
    """Such columns go through numpy; every length of varint is among them."""
    bits = range(1, 32) if dtype is not Dtype.INT64 else range(1, 64)
    numbers = [sign * (1 << bit) + step for bit in bits for sign in (1, -1) for step in range(20)]
    numbers = [number for number in numbers if -(2**31) <= number < 2**31 or dtype is Dtype.INT64]
    as_value = {Dtype.STRING: str, Dtype.DOUBLE: float}.get(dtype, int)
    cells: list[bytes | None] = [layout.encode_value(as_value(n), dtype) for n in numbers if abs(n) < 2**63]
    for column in (cells, [*cells, gap], [gap, *cells, cells[0]]):
        assert layout.decode_column(column, dtype) == [layout.decode_value(cell, dtype) for cell in column]
        one_by_one = [layout.decode_json_column([cell], dtype)[0] for cell in column]
        assert layout.decode_json_column(column, dtype) == one_by_one


@pytest.mark.parametrize("broken", [b"\x20", b"\x20\x80", b"\x20" + b"\x80" * 10, b"\x20\xff\xff\x80"])
def test_a_broken_cell_in_a_long_column_is_an_error(broken: bytes) -> None:
    cells = [layout.encode_value(number, Dtype.INT64) for number in range(1000)]
    with pytest.raises(CorruptCell):
        layout.decode_column([*cells, broken], Dtype.INT64)


@pytest.mark.parametrize("rows", [1, 40, 400])
def test_a_column_whose_type_was_changed_decodes_by_what_is_stored(rows: int) -> None:
    stored = [layout.encode_value(7, Dtype.INT64), layout.encode_value("seven", Dtype.STRING)] * rows
    for dtype in (Dtype.DOUBLE, Dtype.FLOAT, Dtype.INT64, Dtype.STRING, Dtype.UUID, Dtype.MAP):
        assert layout.decode_column(stored, dtype) == [7, "seven"] * rows


def test_an_integer_cell_as_long_as_a_double_is_not_taken_for_one() -> None:
    cell = layout.encode_value(2**55, Dtype.INT64)
    assert len(cell) == 9
    for rows in (1, 50):
        assert layout.decode_column([cell] * rows, Dtype.DOUBLE) == [2**55] * rows


def test_numbers_that_json_lacks_become_texts() -> None:
    values = [1.5, float("nan"), float("inf"), float("-inf")]
    cells = [b"\x29" + np.float64(value).tobytes() for value in values]
    for times in (1, 20):
        assert layout.decode_json_column([*cells, None] * times, Dtype.DOUBLE) == (
            [1.5, "NaN", "Infinity", "-Infinity", None] * times
        )


def test_json_values_of_python_values_are_those_of_their_cells() -> None:
    assert layout.json_value(b"\x01", Dtype.BYTES) == "AQ=="
    assert layout.json_value(datetime(1970, 1, 2, tzinfo=UTC), Dtype.UNIX_TIMESTAMP) == 86400
    assert layout.json_value({"a": 1}, Dtype.JSON) == '{"a": 1}'
    assert layout.json_value(None, Dtype.INT64) is None


def test_a_scalar_map_is_a_json_object_with_its_keys_as_texts() -> None:
    for key, text in ((7, "7"), (True, "true"), (b"\x01", "AQ=="), (Decimal("1.50"), "1.50")):
        assert layout.json_value({key: float("nan")}, Dtype.SCALAR_MAP) == {text: None}
        assert layout.json_value({key: [1, 2]}, Dtype.SCALAR_MAP) == {text: [1, 2]}


def test_on_demand_values_become_json_as_if_they_had_been_stored() -> None:
    assert layout.json_column([1, np.int64(2), 3.0, None], Dtype.INT64) == [1, 2, 3, None]
    assert layout.json_column([0.1, float("nan"), float("inf"), 1], Dtype.DOUBLE) == [
        0.1,
        None,
        "Infinity",
        1.0,
    ]
    assert layout.json_column([0.1], Dtype.FLOAT) == [float(np.float32(0.1))]
    assert layout.json_column(["a", None, 5], Dtype.STRING) == ["a", None, "5"]
    with pytest.raises(InvalidFeatureValue):
        layout.json_column([2**63], Dtype.INT64)


@pytest.mark.parametrize(
    "cell",
    [b"\x20", b"\x20\x80", b"\x12\x05ab", b"\x29\x00", b"\x12\x01\xff", b"\x07", b"\x72\x04\x0a\x09\x01"],
)
@pytest.mark.parametrize("dtype", [Dtype.DOUBLE, Dtype.INT64, Dtype.STRING])
@pytest.mark.parametrize("rows", [1, 40, 400])
def test_a_broken_cell_is_an_error_and_never_a_value(cell: bytes, dtype: Dtype, rows: int) -> None:
    with pytest.raises(CorruptCell):
        layout.decode_column([cell] * rows, dtype)


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [("4080808080808080807f", Dtype.UNIX_TIMESTAMP), ("a20201 78", Dtype.UUID), ("e20201 78", Dtype.DECIMAL)],
)
def test_a_cell_that_holds_no_value_of_its_type_is_an_error(cell: str, dtype: Dtype) -> None:
    with pytest.raises(CorruptCell):
        layout.decode_value(bytes.fromhex(cell), dtype)


def test_decoded_collections_are_never_shared_between_calls() -> None:
    cell = layout.encode_value([1, 2], Dtype.INT64_LIST)
    first, second = layout.decode_column([cell, cell], Dtype.INT64_LIST)
    first.append(3)
    assert second == [1, 2]
    assert layout.decode_value(cell, Dtype.INT64_LIST) == [1, 2]


def test_the_memo_of_decoded_cells_stays_bounded() -> None:
    memo = layout_cells._Memo(len)
    for number in range(2 * memo.LIMIT):
        assert memo[b"%09d" % number] == 9
        assert memo.column([b"%09d" % -number] * 20, lambda cells: [9] * len(cells)) == [9] * 20
    assert len(memo.known) <= memo.LIMIT + 2
    assert memo[b"x" * 1000] == 1000
    assert b"x" * 1000 not in memo.known
    assert memo[None] is None
    assert memo[b""] is None


@pytest.mark.parametrize(
    "nanoseconds", [0, 1, -1, 999, 5_000_100_000, 1_700_000_000_123_456_789, -(10**18), 5 * 10**18]
)
def test_event_timestamps_keep_their_nanoseconds(nanoseconds: int) -> None:
    cell = layout.encode_timestamp(nanoseconds)
    assert layout.decode_timestamp(cell) == nanoseconds
    assert layout.decode_timestamps([cell, None]) == [nanoseconds, None]
    assert layout.decode_timestamps([cell, None] * 300) == [nanoseconds, None] * 300


@pytest.mark.parametrize("other", [None, b"", b"\x08\x05", b"\x08\x05\x10\x80\x80\x01", b"\x10\x01"])
def test_a_long_column_of_different_event_timestamps_decodes_as_its_cells_do_one_by_one(
    other: bytes | None,
) -> None:
    steps = [0, 1, 127, 128, 999, 16_384, 999_999, 2_097_152, 268_435_456, 999_999_999]
    moments = [seconds * 10**9 + step for seconds in range(2**28, 2**33, 2**27) for step in steps]
    cells = [layout.encode_timestamp(nanoseconds) for nanoseconds in moments]
    assert layout.decode_timestamps(cells) == moments
    expected = layout.decode_timestamps([other])
    assert layout.decode_timestamps([*cells, other]) == moments + expected
    together = layout.timestamp_array(cells)
    assert together is not None
    assert together.tolist() == moments
    assert layout.timestamp_array([*cells, other]) is None


@pytest.mark.parametrize(
    "broken", [b"\x08", b"\x08\x80\x80\x80\x80", b"\x08\x80\x80\x80\x80\x01\x10\x80", BROKEN_LAST]
)
@pytest.mark.parametrize("company", [0, 500])
def test_a_broken_event_timestamp_is_an_error(broken: bytes, company: int) -> None:
    cells = [layout.encode_timestamp(10**18 + number) for number in range(company)]
    with pytest.raises(CorruptCell):
        layout.decode_timestamps([*cells, broken])
    assert layout.timestamp_array([*cells, broken]) is None


@given(
    st.integers(0, 2**36).map(lambda seconds: layout.encode_timestamp(seconds * 10**9)),
    st.binary(max_size=7).map(lambda rest: b"\x10" + rest),
    st.booleans(),
)
def test_an_array_of_event_timestamps_has_nothing_that_its_cells_do_not_say(
    seconds: bytes, rest: bytes, whole: bool
) -> None:
    cell = seconds if whole else seconds + rest
    found = layout.timestamp_array([cell, cell])
    if found is not None:
        assert found.tolist() == [layout.decode_timestamp(cell)] * 2


def test_a_stored_timestamp_at_the_epoch_is_empty_and_not_absent() -> None:
    assert layout.encode_timestamp(0) == b""
    assert layout.decode_timestamps([b"", None]) == [0, None]
    assert layout.decode_timestamps([b"", None] * 30) == [0, None] * 30
