"""Entity keys, hash fields and event timestamps held to Feast's own functions, in both directions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.key_encoding_utils import (
    deserialize_entity_key,
    serialize_entity_key,
    serialize_entity_key_prefix,
)
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from core import layout
from core.errors import InvalidRepository
from core.types import Dtype, Field
from tests.support.feast_values import INT32, INT64, MOMENTS, SECONDS, TEXT

KEY_VALUES = {
    Dtype.STRING: TEXT,
    Dtype.BYTES: st.binary(min_size=1, max_size=40),
    Dtype.INT32: INT32,
    Dtype.INT64: INT64,
    Dtype.UNIX_TIMESTAMP: SECONDS | MOMENTS,
}
# Feast drops NUL at the end of a name when it decodes a key.
NAMES = TEXT.map(lambda text: text.rstrip("\0")).filter(bool)
FIELDS = st.lists(
    st.builds(Field, NAMES, st.sampled_from(sorted(KEY_VALUES))),
    min_size=1,
    max_size=4,
    unique_by=lambda field: field.name,
)


def feast_key(project: str, join_keys: list[Field], row: list[Any]) -> bytes:
    values = [
        python_values_to_proto_values([value], ValueType(int(key.dtype)))[0]
        for key, value in zip(join_keys, row, strict=True)
    ]
    entity_key = EntityKey(join_keys=[key.name for key in join_keys], entity_values=values)
    return bytes(_redis_key(project, entity_key, entity_key_serialization_version=3))


@given(project=TEXT, join_keys=FIELDS, data=st.data(), rows=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_keys_are_feasts_and_decode_to_what_they_were_made_of(
    project: str, join_keys: list[Field], data: st.DataObject, rows: int
) -> None:
    columns = [data.draw(st.lists(KEY_VALUES[key.dtype], min_size=rows, max_size=rows)) for key in join_keys]
    keys = layout.EntityKeys(project, join_keys)
    encoded = keys.encode(columns)
    table = list(zip(*columns, strict=True))
    assert encoded == [feast_key(project, join_keys, list(row)) for row in table]
    for key in encoded:
        assert key.startswith(serialize_entity_key_prefix([field.name for field in join_keys]))
        assert keys.fixed_size in (None, len(key))
        entity_key = deserialize_entity_key(key.removesuffix(project.encode()))
        stored = dict(zip(entity_key.join_keys, entity_key.entity_values, strict=True))
        expected = [getattr(stored[field.name], stored[field.name].WhichOneof("val")) for field in join_keys]
        assert keys.decode(key) == tuple(expected)


def test_a_view_without_entities_has_the_one_key_that_feast_gives_it() -> None:
    placeholder = EntityKey(join_keys=[DUMMY_ENTITY_ID], entity_values=[Value(string_val=DUMMY_ENTITY_VAL)])
    keys = layout.EntityKeys("shop", [])
    assert keys.encode([]) == [_redis_key("shop", placeholder)]
    assert keys.decode(keys.encode([])[0]) == ()


@pytest.mark.parametrize(
    "dtype", sorted(set(Dtype) - set(KEY_VALUES) - {Dtype.INVALID, Dtype.PDF_BYTES, Dtype.IMAGE_BYTES})
)
def test_types_that_feast_cannot_store_in_a_key_are_refused(dtype: Dtype) -> None:
    value = Value(**{"null_val" if dtype is Dtype.NULL else "double_val": 0})
    with pytest.raises(ValueError, match="not supported"):
        serialize_entity_key(EntityKey(join_keys=["k"], entity_values=[value]))
    with pytest.raises(InvalidRepository, match="'k'"):
        layout.EntityKeys("shop", [Field("k", dtype)])


@given(view=TEXT, feature=TEXT)
def test_a_hash_field_is_feasts_hash(view: str, feature: str) -> None:
    assert layout.feature_field(view, feature) == _mmh3(f"{view}:{feature}")


@given(moments=st.lists(MOMENTS | st.sampled_from([datetime(1970, 1, 1)]), max_size=60))  # noqa: DTZ001
@settings(deadline=None)
def test_event_timestamps_are_feasts_in_both_directions(moments: list[datetime]) -> None:
    cells = []
    for moment in moments:
        message = Timestamp()
        message.FromDatetime(moment.replace(tzinfo=UTC))
        cells.append(message.SerializeToString())
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    nanoseconds = [(m.replace(tzinfo=UTC) - epoch) // timedelta(microseconds=1) * 1000 for m in moments]
    assert [layout.encode_timestamp(ns) for ns in nanoseconds] == cells
    assert layout.decode_timestamps([*cells, None]) == [*nanoseconds, None]
