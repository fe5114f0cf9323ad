"""Pushed rows: taken as a whole or refused with the field and the row."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import json_values
from core.errors import InvalidRow
from core.feature_rows import MAX_AHEAD, check_rows
from core.repository import Feature, SourceColumns, View
from core.types import Dtype, Field

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
NOON_NS = 1_769_860_800 * 10**9
VIEW = View(
    name="basket",
    stored_name="basket",
    join_keys=(Field("user_id", Dtype.INT64),),
    features=(Feature("amount", Dtype.DOUBLE, {"min": "0"}), Feature("tags", Dtype.STRING_LIST, {})),
    ttl=timedelta(0),
    source=SourceColumns(timestamp="at", created="loaded", field_mapping={"amt": "amount"}),
)
ROW: dict[str, Any] = {"user_id": [1], "amount": [2], "tags": [["a"]], "at": ["2026-01-31T12:00:00Z"]}


def test_checked_rows_have_a_column_for_each_key_and_feature_and_times_in_nanoseconds() -> None:
    checked = check_rows(VIEW, {**ROW, "loaded": ["2026-01-31T12:00:00.5+00:00"], "more": [1]}, now=NOW)
    assert checked.columns == {"user_id": [1], "amount": [2.0], "tags": [["a"]]}
    assert (checked.rows, checked.event_ns) == (1, [NOON_NS])
    assert checked.created_ns == [NOON_NS + 500_000_000]


def test_a_row_without_a_created_timestamp_was_created_when_it_arrived() -> None:
    later = NOW + timedelta(seconds=3)
    for row in (ROW, {**ROW, "loaded": [None]}):
        assert check_rows(VIEW, row, now=later).created_ns == [NOON_NS + 3 * 10**9]
        assert check_rows(VIEW, row, now=later, arrived_ns=[5]).created_ns == [5]


def test_the_names_of_the_remote_client_are_taken_where_they_are_asked_for_only() -> None:
    wire = {**ROW, "event_timestamp": ROW["at"], "created": ["2026-01-31T11:00:00"]}
    del wire["at"]
    assert check_rows(VIEW, wire, now=NOW, wire_names=True).created_ns == [NOON_NS - 3600 * 10**9]
    with pytest.raises(InvalidRow, match="`at` of view 'basket' is missing"):
        check_rows(VIEW, wire, now=NOW)


def test_a_row_may_be_a_day_ahead_and_no_more() -> None:
    at_most = NOW + MAX_AHEAD
    assert check_rows(VIEW, {**ROW, "at": [at_most.isoformat()]}, now=NOW).rows == 1
    with pytest.raises(InvalidRow, match="ahead") as caught:
        check_rows(VIEW, {**ROW, "at": [(at_most + timedelta(microseconds=1)).isoformat()]}, now=NOW)
    assert caught.value.details["field"] == "at"
    assert caught.value.details["row"] == 0


def test_a_complaint_names_the_column_as_it_was_sent() -> None:
    given = {"user_id": [1, 1], "amt": [1, -1], "tags": [None, None], "at": ROW["at"] * 2}
    with pytest.raises(InvalidRow, match=r"`amt` in row 1: -1.0 does not meet min") as caught:
        check_rows(VIEW, given, now=NOW)
    assert caught.value.details == {"field": "amt", "row": 1, "view": "basket"}


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (Dtype.INT64_LIST, [1, None]),
        (Dtype.INT64_LIST, [1, 1.5]),
        (Dtype.INT64_LIST, 1),
        (Dtype.STRING_SET, ["a", 1]),
        (Dtype.FLOAT, 1e39),
        (Dtype.DOUBLE, "NaN"),
        (Dtype.BOOL, 1),
        (Dtype.BYTES, "not base64!"),
        (Dtype.UUID, "1234"),
        (Dtype.DECIMAL, 1.5),
        (Dtype.DECIMAL, "one"),
        (Dtype.JSON, "{"),
        (Dtype.MAP, [1]),
        (Dtype.MAP, "[1]"),
        (Dtype.STRUCT_LIST, {"a": 1}),
        (Dtype.SCALAR_MAP, {"a": 1}),
        (Dtype.UNIX_TIMESTAMP, "2026-01-31T12:00:00"),
        (Dtype.UNIX_TIMESTAMP, 1.5),
        (Dtype.UNIX_TIMESTAMP, 10**15),
        (Dtype.ZONED_TIMESTAMP, "2026-01-31T12:00:00"),
    ],
)
def test_a_json_value_that_is_not_of_its_type_is_refused(dtype: Dtype, value: Any) -> None:
    with pytest.raises(json_values.NotOfType):
        json_values.read(value, dtype)
    said, _ = json_values.refusal(value, dtype)
    assert not said.endswith(dtype.name), "a sentence says what is wanted"


def test_json_too_deep_to_store_is_refused() -> None:
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    for dtype in (Dtype.JSON, Dtype.MAP, Dtype.VALUE_LIST):
        with pytest.raises(json_values.NotOfType):
            json_values.read({"a": deep} if dtype is Dtype.MAP else deep, dtype)
    assert json_values.describe(deep) == "a list"


@settings(max_examples=200)
@given(
    st.sampled_from([Dtype.INT32, Dtype.INT64, Dtype.DOUBLE, Dtype.FLOAT, Dtype.BOOL, Dtype.STRING]),
    st.sampled_from([st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.text(max_size=3)]),
    st.data(),
)
def test_a_column_that_is_taken_at_once_holds_nothing_that_one_by_one_would_refuse(
    dtype: Dtype, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    column = data.draw(st.lists(values | st.sampled_from([0.5, 3.5e38, -3.5e38, 1.7e308]), max_size=4))
    if json_values.uniform(column, dtype):
        assert [json_values.read(value, dtype) for value in column] == column


def test_ordinary_columns_are_taken_at_once() -> None:
    for dtype, column in (
        (Dtype.DOUBLE, [0.5, -1e300]),
        (Dtype.FLOAT, [0.5, 3.4e38]),
        (Dtype.BOOL, [True, False]),
    ):
        assert json_values.uniform(column, dtype)


@pytest.mark.parametrize("nothing", [True, False])
def test_a_null_among_numbers_stays_one(nothing: bool) -> None:
    view = replace(VIEW, features=(Feature("score", Dtype.DOUBLE, {}),))
    scores = [None if nothing else 0.5, None]
    given = {"user_id": [1, 2], "score": scores, "at": ROW["at"] * 2}
    assert check_rows(view, given, now=NOW).columns["score"] == scores
