"""The value codec held to Feast's own functions, in both directions, for every type of Feast 0.67."""

from __future__ import annotations

from typing import Any

import pytest
from feast.feature_server_utils import _value_to_native
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.value_type import ValueType
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core import layout
from core.types import Dtype
from tests.support.feast_values import FLAT_MESSAGES, MESSAGES, VALUES, same

MAPS = (Dtype.MAP, Dtype.MAP_LIST, Dtype.STRUCT, Dtype.STRUCT_LIST)


def test_dtypes_are_feasts_value_types() -> None:
    ours = {dtype.name: int(dtype) for dtype in Dtype if dtype is not Dtype.INVALID}
    theirs = {kind.name: kind.value for kind in ValueType if kind is not ValueType.UNKNOWN}
    assert ours == theirs


def test_there_is_a_strategy_for_every_storable_type() -> None:
    assert set(VALUES) == set(Dtype) - {Dtype.INVALID, Dtype.NULL}


@pytest.mark.parametrize("dtype", sorted(VALUES), ids=lambda dtype: dtype.name)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_value_is_encoded_as_feast_encodes_it(dtype: Dtype, data: st.DataObject) -> None:
    value = data.draw(st.none() | VALUES[dtype])
    # Feast looks at the first value that is not empty: without one, b"" would be stored as null.
    company = [b"x"] if value == b"" else []
    theirs, *_ = python_values_to_proto_values([value, *company], ValueType(int(dtype)))
    ours = layout.encode_value(value, dtype)
    if dtype in MAPS or dtype.name.endswith("_SET"):
        # Feast writes map entries in a hash table's order and sets in that of the process.
        assert same(
            feast_value_type_to_python_type(Value.FromString(ours)), feast_value_type_to_python_type(theirs)
        )
    else:
        assert ours == theirs.SerializeToString()


@given(
    messages=st.lists(FLAT_MESSAGES, max_size=4), dtype=st.sampled_from(Dtype), times=st.sampled_from([1, 20])
)
@settings(max_examples=300, deadline=None)
def test_cells_of_any_types_decode_as_feast_decodes_them_whatever_type_is_declared(
    messages: list[Any], dtype: Dtype, times: int
) -> None:
    check_decoding(messages * times, dtype)


@given(messages=st.lists(MESSAGES, max_size=4))
@settings(max_examples=300, deadline=None)
def test_nested_cells_decode_as_feast_decodes_them(messages: list[Any]) -> None:
    check_decoding(messages, Dtype.MAP)


@pytest.mark.parametrize("dtype", sorted(VALUES), ids=lambda dtype: dtype.name)
@given(data=st.data(), times=st.sampled_from([1, 30]))
@settings(max_examples=15, deadline=None)
def test_a_column_of_one_type_with_gaps_decodes_as_feast_decodes_it(
    dtype: Dtype, data: st.DataObject, times: int
) -> None:
    values = data.draw(st.lists(st.none() | VALUES[dtype], max_size=5))
    check_decoding(python_values_to_proto_values(values, ValueType(int(dtype))) * times, dtype)


def check_decoding(messages: list[Any], dtype: Dtype) -> None:
    cells = [message.SerializeToString() for message in messages] + [None]
    kind = ValueType(int(dtype))
    if dtype is not Dtype.SCALAR_MAP:  # Feast's server leaves scalar maps out
        json = [_value_to_native(message) for message in messages] + [None]
        assert same(layout.decode_json_column(cells, dtype), json)
    try:
        python = [feast_value_type_to_python_type(message, kind) for message in messages] + [None]
    except ValueError:  # Feast takes any text of a UUID feature for a UUID, and fails
        assume(False)
    assert same(layout.decode_column(cells, dtype), python)
