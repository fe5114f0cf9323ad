"""Request bodies: refused where parsers would guess."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from serving import bodies
from serving.problems import MalformedBody


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'{"entities": NaN}',
        b'{"entities": Infinity}',
        b'{"a": 1,}',
        b"\xff\xfe",
        b'{"entities": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        bodies.parse(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"entities": {"user_id": [1], "user_id": [2]}}',
        b'{"entities": [{"user_id": 1, "user_id": 2}]}',
        b'{"entities": [{"user_id": 1}, {"user_id": 1, "user_id": 2}]}',
        b'{"entities": {"user_id": [1]}, "entities": {"user_id": [2]}}',
        b'{"entities": {"user_id": [1], "user_\\u0069d": [2]}}',
        b'{"explain": true, "explain": false}',
        b'{"inputs": [{"name": "a", "name": "b"}]}',
        b'{"inputs": [{"name": "a"}, {"name" :"a", "name"\t: "b"}]}',
        b'{"df": {"user_id": [1], "user_id": [2]}}',
        b'{"df": {"tags": [{"a": 1, "a": 2}]}}',
        b'{"entities": {"user_id": [{"a": 1, "a": 2}]}}',
        b'{"entities": [{"user_id": 1}, {"at": {"a": 1, "a": 2}}]}',
        b'{"entities": [{"user_id": 1}, {"user_id": 2, "at": 1, "at": 2}]}',
    ],
)
def test_a_key_given_twice_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="twice"):
        bodies.parse(body)


@pytest.mark.parametrize(
    "body",
    [
        {"entities": {"user_id": ["user_id", "entities"]}},
        {"entities": [{"user_id": "user_id"}, {"user_id": '"user_id": 1, "user_id": 2'}]},
        {"df": {"note": ['"a": 1, "a": 2', '{"a":{"a":1}}'], "a": [{"a": {"a": ["a"]}}]}},
    ],
)
def test_a_value_that_looks_like_a_key_is_no_repetition(body: dict[str, object]) -> None:
    assert bodies.parse(json.dumps(body).encode()) == body


keys = st.sampled_from(["a", "b", "entities", "user_id", "ü", 'q"'])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, max_size=4), st.booleans())
def test_a_body_without_repetition_passes_unchanged(body: dict[str, object], escaped: bool) -> None:
    assert bodies.parse(json.dumps(body, ensure_ascii=escaped).encode()) == body


def test_unknown_fields_and_flags_that_are_none_are_refused() -> None:
    bodies.check_fields({"a": 1}, ("a", "b"))
    with pytest.raises(InvalidRequest, match="Unknown field `c`") as caught:
        bodies.check_fields({"c": 1}, ("a", "b"))
    assert caught.value.details["field"] == "c"
    assert bodies.flag({}, "explain") is False
    assert bodies.flag({"explain": True}, "explain") is True
    for wrong in (1, "true", None):
        with pytest.raises(InvalidRequest):
            bodies.flag({"explain": wrong}, "explain")
