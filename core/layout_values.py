"""Python values to ``feast.types.Value`` messages: lists, sets, maps, JSON, zoned timestamps, and the rest.

One part of ``core.layout``; numbers and texts take a quicker way in ``layout_cells``. Values become messages
as ``feast.type_map`` makes them. Where Feast 0.67 would fail on a value that it could store, this module
stores it; ADR 0021 lists these places. Knows no Redis keys and no columns.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, tzinfo
from decimal import Decimal
from decimal import InvalidOperation as InvalidDecimal
from typing import Any

import numpy as np

from core.errors import InvalidFeatureValue
from core.feast_protos import Value, value_pb2
from core.layout_messages import NULL_TIMESTAMP
from core.types import Dtype

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def encode(value: Any, dtype: Dtype) -> bytes:
    """The serialized Value of a Python value; empty for a missing one. Map entries are sorted by key.

    Raises:
        InvalidFeatureValue: ``value`` cannot be of that type.
    """
    if is_missing(value):
        return b""
    try:
        return to_message(value, dtype).SerializeToString(deterministic=True)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError, InvalidDecimal) as exc:
        raise InvalidFeatureValue(
            f"A value of type {type(value).__name__} cannot be {dtype.name}: {exc}", dtype=dtype.name
        ) from exc


def is_missing(value: Any) -> bool:
    """Whether a scalar stands for null: None, NaN, NaT, pandas.NA."""
    if value is None:
        return True
    if isinstance(value, float | Decimal | np.floating):
        return math.isnan(value)
    if isinstance(value, np.datetime64):
        return bool(np.isnat(value))
    return type(value).__name__ in ("NAType", "NaTType")


def to_message(value: Any, dtype: Dtype) -> Any:
    """The Value message of a Python value that is not missing."""
    if dtype in _ELEMENTS:
        kind, message, convert = _ELEMENTS[dtype]
        return Value(**{kind: message(val=convert(_elements(value, dtype)))})
    return _BUILDERS[dtype](value)


def _elements(value: Any, dtype: Dtype) -> list[Any]:
    if isinstance(value, bytes | bytearray) and dtype not in (Dtype.BYTES_LIST, Dtype.BYTES_SET):
        value = json.loads(value)
    is_set = dtype.name.endswith("_SET")
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "M":
            # Feast drops a fraction of a second of datetimes (in lists) and rounds numpy's down (in sets);
            # nanoseconds would come out of tolist() as plain integers.
            value = list(value) if is_set else value.astype("datetime64[us]").tolist()
        else:
            value = value.tolist()
    if isinstance(value, str | bytes | Mapping):
        raise TypeError("a collection is needed")
    elements = list(value)
    if not is_set:
        return elements
    # The order of a set of numbers is Python's own and so Feast's; that of texts changes with every process.
    if elements and isinstance(elements[0], int | float | bool):
        return list(set(elements))
    return list(dict.fromkeys(elements))


def _each(convert: Callable[[Any], Any], default: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda elements: [default if element is None else convert(element) for element in elements]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is no bytes")
    return value


def _integer(value: Any) -> int:
    return value.__index__()  # type: ignore[no-any-return]


def _decimal_text(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else _text(value)


def _uuid_text(value: Any) -> str:
    return str(value) if isinstance(value, uuid.UUID) else _text(value)


def epoch_seconds(value: Any) -> int:
    """Seconds since the epoch as Feast stores a timestamp: a naive datetime is UTC, a fraction is dropped."""
    if isinstance(value, datetime):
        aware = value.replace(tzinfo=UTC) if value.utcoffset() is None else value
        return int(aware.timestamp())
    if isinstance(value, date):
        return int((value - _EPOCH.date()).total_seconds())
    if isinstance(value, np.datetime64):
        return int(value.astype("datetime64[s]").astype(np.int64))
    return int(value)


def _timestamp_element(value: Any) -> int:
    return NULL_TIMESTAMP if is_missing(value) else epoch_seconds(value)


def _json_text(value: Any) -> str:
    if isinstance(value, str):
        json.loads(value)
        return value
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """Arrow hands nested values out as numpy arrays, which JSON does not know."""
    if isinstance(value, np.ndarray):
        return [_plain(element) for element in value.tolist()]
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return value.item() if isinstance(value, np.generic) else value


_ELEMENTS: dict[Dtype, tuple[str, Any, Callable[[list[Any]], list[Any]]]] = {}
for _name, _message, _convert in (
    ("bytes", "Bytes", _each(_bytes, b"")),
    ("string", "String", _each(_text, "")),
    ("int32", "Int32", _each(_integer, 0)),
    ("int64", "Int64", _each(_integer, 0)),
    ("double", "Double", _each(float, 0.0)),
    ("float", "Float", _each(float, 0.0)),
    ("bool", "Bool", _each(bool, False)),
    ("unix_timestamp", "Int64", _each(_timestamp_element, NULL_TIMESTAMP)),
    ("uuid", "String", _each(_uuid_text, "")),
    ("time_uuid", "String", _each(_uuid_text, "")),
    ("decimal", "String", _each(_decimal_text, "")),
    ("json", "String", _each(_json_text, "null")),
):
    for _collection in ("List", "Set") if _name != "json" else ("List",):
        _ELEMENTS[Dtype[f"{_name}_{_collection}".upper()]] = (
            f"{_name}_{_collection.lower()}_val",
            getattr(value_pb2, _message + _collection),
            _convert,
        )


def _map(value: Any) -> Any:
    message = value_pb2.Map()
    for key, entry in _mapping(value).items():
        message.val[_text(key)].CopyFrom(_inferred(entry))
    return message


def _map_list(value: Any) -> Any:
    if isinstance(value, str | bytes):
        value = json.loads(value)
    if isinstance(value, Mapping):
        raise TypeError("a list of maps is needed")
    return value_pb2.MapList(val=[_map(entry) for entry in value])


def _mapping(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, str | bytes):
        value = json.loads(value)
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | np.ndarray) and all(isinstance(item, tuple) for item in value):
        return dict(value)  # an Arrow map column gives pairs
    raise TypeError("a mapping is needed")


def _scalar_map(value: Any) -> Any:
    entries = [
        value_pb2.ScalarMapEntry(key=_map_key(key), value=_inferred(entry))
        for key, entry in _mapping(value).items()
    ]
    return value_pb2.ScalarMap(val=entries)


def _map_key(key: Any) -> Any:
    if isinstance(key, bool | np.bool_):
        return value_pb2.MapKey(bool_key=bool(key))
    if isinstance(key, np.int32):
        return value_pb2.MapKey(int32_key=int(key))
    if isinstance(key, int | np.integer):
        return value_pb2.MapKey(int64_key=int(key))
    if isinstance(key, np.float32):
        return value_pb2.MapKey(float_key=float(key))
    if isinstance(key, float):
        return value_pb2.MapKey(double_key=key)
    if isinstance(key, uuid.UUID):
        return value_pb2.MapKey(uuid_key=str(key))
    if isinstance(key, Decimal):
        return value_pb2.MapKey(decimal_key=str(key))
    if isinstance(key, bytes):
        return value_pb2.MapKey(bytes_key=key)
    if isinstance(key, datetime):
        return value_pb2.MapKey(unix_timestamp_key=epoch_seconds(key))
    raise TypeError(f"{type(key).__name__} is no key of a scalar map")


def _nested(value: Any) -> Any:
    return value_pb2.RepeatedValue(val=[_nested_element(element) for element in value])


def _nested_element(value: Any) -> Any:
    if value is None:
        return Value()
    elements = list(value)
    if any(isinstance(element, list | set | tuple | np.ndarray) for element in elements):
        return Value(list_val=_nested(elements))
    return _inferred(elements)


def _inferred(value: Any) -> Any:
    """A value inside a map or a nested collection, whose type Feast takes from the value itself.

    An empty collection is stored as null: it has no type, and no field could hold it.
    """
    if is_missing(value):
        return Value()
    if isinstance(value, Mapping):
        keys_are_text = all(isinstance(key, str) for key in value)
        return to_message(value, Dtype.MAP if keys_are_text else Dtype.SCALAR_MAP)
    if isinstance(value, list | tuple | set | np.ndarray):
        if len(value) == 0:
            return Value()
        elements = list(value)
        if isinstance(elements[0], Mapping):
            return to_message(elements, Dtype.MAP_LIST)
        types = {_inferred_type(element) for element in elements}
        if len(types) > 1:
            raise TypeError("the elements of a list inside a map are of different types")
        return to_message(value, Dtype[f"{types.pop().name}_{'SET' if isinstance(value, set) else 'LIST'}"])
    return to_message(value, _inferred_type(value))


_INFERRED: tuple[tuple[type | tuple[type, ...], Dtype], ...] = (
    ((bool, np.bool_), Dtype.BOOL),
    ((np.int32, np.int16, np.int8, np.uint16, np.uint8), Dtype.INT32),
    ((int, np.integer), Dtype.INT64),
    (np.float32, Dtype.FLOAT),
    ((float, np.floating), Dtype.DOUBLE),
    (str, Dtype.STRING),
    (bytes, Dtype.BYTES),
    ((date, np.datetime64), Dtype.UNIX_TIMESTAMP),
    (uuid.UUID, Dtype.UUID),
    (Decimal, Dtype.DECIMAL),
)


def _inferred_type(value: Any) -> Dtype:
    for types, dtype in _INFERRED:
        if isinstance(value, types):
            return dtype
    raise TypeError(f"a {type(value).__name__} inside it has no Feast type")


def _zoned(value: Any) -> Any:
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    if not isinstance(value, datetime):
        raise TypeError("a datetime is needed")
    return value_pb2.ZonedTimestamp(unix_timestamp=epoch_seconds(value), zone=_zone_name(value.tzinfo))


def _zone_name(zone: tzinfo | None) -> str:
    """The IANA name, else the fixed offset; empty for a naive datetime, which is UTC."""
    return "" if zone is None else getattr(zone, "key", None) or str(zone)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError("a number is needed")
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_ | int | np.integer):
        raise TypeError("a truth value is needed")
    return bool(value)


def _scalar_text(value: Any) -> str:
    if isinstance(value, np.ndarray | list | tuple | set | Mapping):
        raise TypeError("a text is needed")
    return str(value)


_BUILDERS: Mapping[Dtype, Callable[[Any], Any]] = {
    Dtype.BYTES: lambda v: Value(bytes_val=_bytes(v)),
    Dtype.PDF_BYTES: lambda v: Value(bytes_val=_bytes(v)),
    Dtype.IMAGE_BYTES: lambda v: Value(bytes_val=_bytes(v)),
    Dtype.STRING: lambda v: Value(string_val=_scalar_text(v)),
    Dtype.INT32: lambda v: Value(int32_val=int(v)),
    Dtype.INT64: lambda v: Value(int64_val=int(v)),
    Dtype.DOUBLE: lambda v: Value(double_val=_number(v)),
    Dtype.FLOAT: lambda v: Value(float_val=_number(v)),
    Dtype.BOOL: lambda v: Value(bool_val=_boolean(v)),
    Dtype.UNIX_TIMESTAMP: lambda v: Value(unix_timestamp_val=epoch_seconds(v)),
    Dtype.MAP: lambda v: Value(map_val=_map(v)),
    Dtype.MAP_LIST: lambda v: Value(map_list_val=_map_list(v)),
    Dtype.STRUCT: lambda v: Value(struct_val=_map(v)),
    Dtype.STRUCT_LIST: lambda v: Value(struct_list_val=_map_list(v)),
    Dtype.JSON: lambda v: Value(json_val=_json_text(v)),
    Dtype.UUID: lambda v: Value(uuid_val=_uuid_text(v)),
    Dtype.TIME_UUID: lambda v: Value(time_uuid_val=_uuid_text(v)),
    Dtype.DECIMAL: lambda v: Value(decimal_val=_decimal_text(v)),
    Dtype.VALUE_LIST: lambda v: Value(list_val=_nested(v)),
    Dtype.VALUE_SET: lambda v: Value(set_val=_nested(v)),
    Dtype.SCALAR_MAP: lambda v: Value(scalar_map_val=_scalar_map(v)),
    Dtype.ZONED_TIMESTAMP: lambda v: Value(zoned_timestamp_val=_zoned(v)),
}
