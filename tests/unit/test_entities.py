"""Entity rows are taken only as what they are, and every complaint says where and what."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from core.entities import EntitySchema
from core.errors import InvalidEntity, InvalidRequest, TooLarge
from core.repository import Feature
from core.types import Dtype, Field

USER = EntitySchema([Field("user_id", Dtype.INT64)], [], 5)
PAIR = EntitySchema(
    [Field("store", Dtype.STRING), Field("user_id", Dtype.INT32)],
    [Feature("amount", Dtype.DOUBLE, {"min": "0"}), Feature("at", Dtype.INT64, {"default": "now"})],
    5,
)


def test_rows_and_columns_give_the_same_columns() -> None:
    expected = ({"user_id": [1, 2, 2]}, 3)
    assert USER.columns([{"user_id": 1}, {"user_id": 2}, {"user_id": 2}]) == expected
    assert USER.columns({"user_id": [1, 2, 2]}) == expected


@pytest.mark.parametrize("value", [1.7, 1.0, True, False, "12", "", None, [], {}, 2**63, -(2**63) - 1])
@pytest.mark.parametrize("shape", ["rows", "columns"])
def test_what_is_not_an_int64_is_refused_with_its_row(value: Any, shape: str) -> None:
    entities: Any = {"user_id": [1, value]} if shape == "columns" else [{"user_id": 1}, {"user_id": value}]
    with pytest.raises(InvalidEntity, match=r"`user_id` in row 1 is .*Int64") as caught:
        USER.columns(entities)
    assert caught.value.details == {"field": "user_id", "row": 1, "expected": "INT64"}


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 0])
def test_the_ends_of_the_range_are_taken(value: int) -> None:
    assert USER.columns({"user_id": [value]})[0] == {"user_id": [value]}


@pytest.mark.parametrize(
    ("dtype", "given", "taken"),
    [
        (Dtype.STRING, "süd", "süd"),
        (Dtype.STRING, "", ""),
        (Dtype.BOOL, True, True),
        (Dtype.DOUBLE, 2, 2.0),
        (Dtype.BYTES, "AAE=", b"\x00\x01"),
        (Dtype.UNIX_TIMESTAMP, 0, datetime(1970, 1, 1, tzinfo=UTC)),
        (Dtype.UNIX_TIMESTAMP, "2026-01-31T14:00:00+02:00", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        (Dtype.UUID, "6f9619ff-8b86-d011-b42d-00c04fc964ff", UUID("6f9619ff-8b86-d011-b42d-00c04fc964ff")),
    ],
)
def test_each_type_is_taken_in_its_json_form(dtype: Dtype, given: Any, taken: Any) -> None:
    assert EntitySchema([Field("key", dtype)], [], 5).columns({"key": [given]})[0] == {"key": [taken]}


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (Dtype.STRING, 5),
        (Dtype.BOOL, 1),
        (Dtype.DOUBLE, float("nan")),
        (Dtype.DOUBLE, float("inf")),
        (Dtype.DOUBLE, True),
        (Dtype.BYTES, "not base64!"),
        (Dtype.UNIX_TIMESTAMP, "2026-01-31T14:00:00"),
        (Dtype.UNIX_TIMESTAMP, "yesterday"),
        (Dtype.UNIX_TIMESTAMP, True),
        (Dtype.UNIX_TIMESTAMP, 10**30),
        (Dtype.UUID, "12"),
        (Dtype.DECIMAL, "1,5"),
        (Dtype.INT32, 2**31),
    ],
)
def test_each_type_refuses_what_it_is_not(dtype: Dtype, given: Any) -> None:
    with pytest.raises(InvalidEntity, match="`key` in row 0"):
        EntitySchema([Field("key", dtype)], [], 5).columns({"key": [given]})


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([], "empty"),
        ({"user_id": []}, "empty"),
        ({}, "`user_id` is missing"),
        ("1", "must be a list of rows"),
        (None, "must be a list of rows"),
        ([1], "Row 0 is an integer, 1, not an object"),
        ([{"user_id": 1}, None], "Row 1 is null"),
        ([{}], "`user_id` is missing in row 0"),
        ([{"user_id": 1}, {"user": 1}], "Unknown field `user` in row 1; did you mean `user_id`"),
        ([{"user_id": 1, "x": 2}], "Unknown field `x` in row 0"),
        ({"user_id": [1], "x": [2]}, "Unknown field `x`"),
        ({"user_id": 1}, "Column `user_id` is an integer, 1, not a list"),
        ({"user_id": "12"}, "not a list"),
    ],
)
def test_malformed_entities_are_refused(entities: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        USER.columns(entities)


def test_ragged_columns_are_refused_with_their_lengths() -> None:
    with pytest.raises(InvalidRequest, match=r"store: 2, user_id: 1, amount: 1"):
        PAIR.columns({"store": ["a", "b"], "user_id": [1], "amount": [1.0]})


def test_too_many_entities_are_refused_with_the_limit() -> None:
    with pytest.raises(TooLarge, match="6 entities are more than the limit of 5") as caught:
        USER.columns({"user_id": [1] * 6})
    assert caught.value.details["limit"] == 5


def test_request_time_inputs_stand_beside_the_keys_and_may_be_null() -> None:
    columns, rows = PAIR.columns([{"store": "a", "user_id": 1, "amount": None, "at": 7}])
    assert (columns, rows) == ({"store": ["a"], "user_id": [1], "amount": [None], "at": [7]}, 1)


@pytest.mark.parametrize("shape", ["rows", "columns"])
def test_an_input_that_defaults_to_now_may_be_left_out(shape: str) -> None:
    entities: Any = {"store": ["a"], "user_id": [1], "amount": [2.5]}
    if shape == "rows":
        entities = [{"store": "a", "user_id": 1, "amount": 2.5}]
    before = int(time.time())
    columns, _ = PAIR.columns(entities)
    assert before <= columns["at"][0] <= time.time()


def test_only_some_rows_may_leave_a_defaulted_input_out() -> None:
    row = {"store": "a", "user_id": 1, "amount": 2.5}
    columns, _ = PAIR.columns([{**row, "at": 3}, row])
    assert columns["at"][0] == 3
    assert columns["at"][1] > 3
    with pytest.raises(InvalidEntity, match="Unknown field `x` in row 1"):
        PAIR.columns([row, {**row, "x": 1}])


def test_expectations_of_request_time_inputs_hold_at_the_door() -> None:
    with pytest.raises(InvalidEntity, match=r"`amount` in row 0: .*min"):
        PAIR.columns([{"store": "a", "user_id": 1, "amount": -1.0}])


@pytest.mark.parametrize("entities", [[{"userid": 1}], {"userid": [1]}], ids=["rows", "columns"])
def test_a_misspelt_join_key_is_named_with_the_one_that_is_meant(entities: Any) -> None:
    with pytest.raises(InvalidEntity, match=r"Unknown field `userid`.*; did you mean `user_id`\?") as caught:
        USER.columns(entities)
    assert caught.value.details["field"] == "userid"
    assert caught.value.hint == "Each row needs `user_id` (INT64) and nothing else."
