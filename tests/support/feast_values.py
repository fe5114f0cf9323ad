"""Hypothesis strategies: Python values that Feast accepts for each type, and messages it may have stored."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from core.feast_protos import Value, value_pb2
from core.types import Dtype

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
SECONDS = st.integers(-62_135_596_800, 253_402_300_799)  # the years 1 to 9999
# Naive: Feast reads them as UTC.
MOMENTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))  # noqa: DTZ001
ZONES = st.sampled_from([UTC, ZoneInfo("America/New_York"), timezone(timedelta(hours=-7)), None])
FINITE_DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
# What a map may hold: its type is taken from the value, an empty collection has none.
MAP_SCALARS = st.booleans() | INT64 | st.floats() | TEXT | st.uuids() | FINITE_DECIMALS | MOMENTS
MAPS = st.recursive(
    st.dictionaries(TEXT, st.none() | MAP_SCALARS, max_size=3),
    lambda inner: st.dictionaries(
        TEXT,
        inner | st.lists(inner, min_size=1, max_size=2) | st.lists(INT64, min_size=1, max_size=3),
        max_size=3,
    ),
    max_leaves=5,
)

_ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    "BYTES": st.binary(max_size=200),
    "STRING": TEXT,
    "INT32": INT32,
    "INT64": INT64,
    "DOUBLE": st.floats(),
    "FLOAT": st.floats(width=32),
    "BOOL": st.booleans(),
    "UNIX_TIMESTAMP": MOMENTS,
    "UUID": st.uuids(),
    "TIME_UUID": st.builds(uuid.uuid1),
    "DECIMAL": FINITE_DECIMALS,
    "JSON": JSON.map(json.dumps),
}

VALUES: dict[Dtype, st.SearchStrategy[Any]] = {
    **{Dtype[name]: strategy for name, strategy in _ELEMENTS.items()},
    **{Dtype[f"{name}_LIST"]: st.lists(strategy, max_size=40) for name, strategy in _ELEMENTS.items()},
    **{Dtype[f"{name}_SET"]: st.sets(s, max_size=9) for name, s in _ELEMENTS.items() if name != "JSON"},
    Dtype.PDF_BYTES: _ELEMENTS["BYTES"],
    Dtype.IMAGE_BYTES: _ELEMENTS["BYTES"],
    Dtype.MAP: MAPS,
    Dtype.MAP_LIST: st.lists(MAPS, max_size=3),
    Dtype.STRUCT: MAPS,
    Dtype.STRUCT_LIST: st.lists(MAPS, max_size=3),
    Dtype.VALUE_LIST: st.lists(st.none() | st.lists(INT64, max_size=3), max_size=3)
    | st.lists(st.lists(st.lists(TEXT, min_size=1, max_size=2), min_size=1, max_size=2), max_size=2),
    Dtype.VALUE_SET: st.lists(st.lists(st.floats(), max_size=3), max_size=3),
    Dtype.SCALAR_MAP: st.dictionaries(
        INT64
        | st.booleans()
        | st.uuids()
        | FINITE_DECIMALS
        | st.binary(max_size=9)
        | st.floats(allow_nan=False),
        st.none() | MAP_SCALARS,
        max_size=3,
    ),
    Dtype.ZONED_TIMESTAMP: st.builds(lambda moment, zone: moment.replace(tzinfo=zone), MOMENTS, ZONES),
}

_STORED: dict[str, st.SearchStrategy[Any]] = _ELEMENTS | {
    "UNIX_TIMESTAMP": SECONDS | st.just(-(2**63)),
    "UUID": st.uuids().map(str),
    "TIME_UUID": st.uuids().map(str),
    "DECIMAL": FINITE_DECIMALS.map(str),
    "JSON": JSON.map(json.dumps) | TEXT,
}
_MESSAGE_NAMES = {
    "UNIX_TIMESTAMP": "Int64",
    **dict.fromkeys(("UUID", "TIME_UUID", "DECIMAL", "JSON"), "String"),
}


def _collection(name: str, kind: str) -> st.SearchStrategy[Any]:
    message = getattr(value_pb2, _MESSAGE_NAMES.get(name, name.capitalize()) + kind)
    field = f"{name}_{kind}_val".lower()
    return st.lists(_STORED[name], max_size=20).map(lambda values: Value(**{field: message(val=values)}))


def _scalar(name: str) -> st.SearchStrategy[Any]:
    values = SECONDS if name == "UNIX_TIMESTAMP" else _STORED[name]
    return values.map(lambda value: Value(**{f"{name.lower()}_val": value}))


def _map_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(TEXT, inner, max_size=3).map(lambda entries: value_pb2.Map(val=entries))


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    maps, values = _map_of(inner), st.lists(inner, max_size=3)
    return st.one_of(
        maps.map(lambda m: Value(map_val=m)),
        maps.map(lambda m: Value(struct_val=m)),
        st.lists(maps, max_size=2).map(lambda ms: Value(map_list_val=value_pb2.MapList(val=ms))),
        st.lists(maps, max_size=2).map(lambda ms: Value(struct_list_val=value_pb2.MapList(val=ms))),
        values.map(lambda vs: Value(list_val=value_pb2.RepeatedValue(val=vs))),
        values.map(lambda vs: Value(set_val=value_pb2.RepeatedValue(val=vs))),
    )


ZONED = st.builds(
    lambda seconds, zone: Value(
        zoned_timestamp_val=value_pb2.ZonedTimestamp(unix_timestamp=seconds, zone=zone)
    ),
    st.integers(-60_000_000_000, 250_000_000_000) | st.just(-(2**63)),
    st.sampled_from(["", "UTC", "Europe/Berlin", "UTC-07:00", "+05:30", "no such zone"]),
)
FLAT_MESSAGES = st.one_of(
    [_scalar(name) for name in _STORED]
    + [
        _collection(name, kind)
        for name in _STORED
        for kind in ("List", "Set")
        if (name, kind) != ("JSON", "Set")
    ]
    + [ZONED, st.just(Value())]
)
MESSAGES = st.recursive(FLAT_MESSAGES, _compound, max_leaves=4)


def same(left: Any, right: Any) -> bool:
    """Equal in value and type, NaN equal to NaN, at any depth."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return left == right or (left != left and right != right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, set):
        return bool(sorted(map(repr, left)) == sorted(map(repr, right)))
    if isinstance(left, Decimal):
        return str(left) == str(right)
    if isinstance(left, datetime):
        return left == right and left.utcoffset() == right.utcoffset()
    return bool(left == right)
