"""``feast.types.Value`` messages to Python values and to JSON.

One part of ``core.layout``; numbers and texts take a quicker way in ``layout_cells``. Python values are those
of ``OnlineResponse.to_dict()``, JSON values those of ``feast serve``; ADR 0021 lists where either is not
followed. Knows no Redis keys and no columns.
"""

from __future__ import annotations

import base64
import json
import math
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from decimal import InvalidOperation as InvalidDecimal
from typing import Any
from zoneinfo import ZoneInfo

from google.protobuf.message import DecodeError

from core.errors import CorruptCell
from core.feast_protos import Value

NULL_TIMESTAMP = -(1 << 63)  # numpy's NaT, which Feast stores for a missing timestamp

FOREIGN_WRITER = "Something other than Feast wrote it; materialize the view again."


def parse(cell: bytes) -> Any:
    """The Value message of a cell.

    Raises:
        CorruptCell: the cell is no serialized Value.
    """
    try:
        return Value.FromString(cell)
    except DecodeError as exc:
        raise CorruptCell(
            f"A stored value of {len(cell)} bytes is no Feast value.",
            hint=FOREIGN_WRITER,
        ) from exc


def to_python(message: Any) -> Any:
    """The Python value of a Value message, as ``OnlineResponse.to_dict()`` gives it; None for a null.

    Raises:
        CorruptCell: the message holds what no writer of Feast would store, such as the year 300,000.
    """
    return _converted(message, _TO_PYTHON)


def to_json(message: Any) -> Any:
    """The JSON value that ``feast serve`` gives for a Value message; None for a null.

    A timestamp is seconds since the epoch, bytes are base64, a number that JSON lacks is the text "NaN",
    "Infinity" or "-Infinity", a JSON feature stays the text it is. Unlike there, a missing timestamp is None
    and not the number that stands for it, and a scalar map, which Feast's server leaves out, is an object
    with its keys as texts.

    Raises:
        CorruptCell: as ``to_python``.
    """
    return _converted(message, _TO_JSON)


def _converted(message: Any, converters: dict[str, Callable[[Any], Any]]) -> Any:
    kind = message.WhichOneof("val")
    if kind is None:
        return None
    try:
        return converters[kind](getattr(message, kind))
    except (ValueError, OverflowError, OSError, InvalidDecimal) as exc:
        raise CorruptCell(f"A stored {kind.removesuffix('_val')} cannot be decoded: {exc}.") from exc


def instant(seconds: int) -> datetime | None:
    """The UTC datetime of a stored timestamp; None for the number that stands for a missing one."""
    return None if seconds == NULL_TIMESTAMP else datetime.fromtimestamp(seconds, tz=UTC)


def _zoned_instant(message: Any) -> datetime | None:
    if message.unix_timestamp == NULL_TIMESTAMP:
        return None
    return datetime.fromtimestamp(message.unix_timestamp, tz=_zone(message.zone))


_OFFSET = re.compile(r"(?:UTC|GMT)?([+-])(\d{2}):?(\d{2})")


def _zone(name: str) -> tzinfo:
    if not name:
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, KeyError, OSError):
        found = _OFFSET.fullmatch(name.strip())
        if not found:
            return UTC
        sign, hours, minutes = found.groups()
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        return timezone(-offset if sign == "-" else offset)


def _parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _map_key_value(message: Any) -> Any:
    kind = message.WhichOneof("key")
    if kind is None:
        return None
    value = getattr(message, kind)
    if kind == "unix_timestamp_key":
        return instant(value)
    if kind in ("uuid_key", "time_uuid_key"):
        return uuid.UUID(value)
    return Decimal(value) if kind == "decimal_key" else value


def _map_key_text(message: Any) -> str:
    kind = message.WhichOneof("key")
    if kind is None:
        return "null"
    value = getattr(message, kind)
    if isinstance(value, bytes):
        return _base64(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _elements_of(convert: Callable[[Any], Any], into: type = list) -> Callable[[Any], Any]:
    return lambda message: into(convert(element) for element in message.val)


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Feast stores a missing element of a text-like collection as an empty text."""
    return lambda text: convert(text) if text else None


def _same(value: Any) -> Any:
    return value


def _null(_: Any) -> None:
    return None


def float_json(value: float) -> float | str:
    """A float as JSON: NaN and the infinities, which JSON lacks, as texts."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _zoned_json(message: Any) -> str | None:
    moment = _zoned_instant(message)
    return None if moment is None else moment.isoformat()


def _maps(convert: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    def one(message: Any) -> dict[str, Any]:
        return {key: convert(value) for key, value in message.val.items()}

    return one, lambda message: [one(entry) for entry in message.val]


_python_map, _python_map_list = _maps(to_python)
_json_map, _json_map_list = _maps(to_json)

_TO_PYTHON: dict[str, Callable[[Any], Any]] = {
    "null_val": _null,
    "unix_timestamp_val": instant,
    "json_val": _parsed_json,
    "uuid_val": uuid.UUID,
    "time_uuid_val": uuid.UUID,
    "decimal_val": Decimal,
    "zoned_timestamp_val": _zoned_instant,
    "map_val": _python_map,
    "struct_val": _python_map,
    "map_list_val": _python_map_list,
    "struct_list_val": _python_map_list,
    "list_val": _elements_of(to_python),
    "set_val": _elements_of(to_python),
    "scalar_map_val": lambda m: {_map_key_value(entry.key): to_python(entry.value) for entry in m.val},
    "json_list_val": _elements_of(_parsed_json),
}
_TO_JSON: dict[str, Callable[[Any], Any]] = {
    "null_val": _null,
    "bytes_val": _base64,
    "double_val": float_json,
    "float_val": float_json,
    "unix_timestamp_val": lambda seconds: None if seconds == NULL_TIMESTAMP else seconds,
    "zoned_timestamp_val": _zoned_json,
    "map_val": _json_map,
    "struct_val": _json_map,
    "map_list_val": _json_map_list,
    "struct_list_val": _json_map_list,
    "list_val": _elements_of(to_json),
    "set_val": _elements_of(to_json),
    "scalar_map_val": lambda m: {_map_key_text(entry.key): to_json(entry.value) for entry in m.val},
    "json_list_val": _elements_of(_same),
}
_SCALARS = (
    "bytes",
    "string",
    "int32",
    "int64",
    "double",
    "float",
    "bool",
    "json",
    "uuid",
    "time_uuid",
    "decimal",
)
for _name in _SCALARS:
    _TO_PYTHON.setdefault(f"{_name}_val", _same)
    _TO_JSON.setdefault(f"{_name}_val", _same)
for _name, _to_python, _to_json in (
    ("bytes", _same, _base64),
    ("string", _same, _same),
    ("int32", _same, _same),
    ("int64", _same, _same),
    ("double", _same, float_json),
    ("float", _same, float_json),
    ("bool", _same, _same),
    ("unix_timestamp", instant, _same),
    ("uuid", _or_none(uuid.UUID), _same),
    ("time_uuid", _or_none(uuid.UUID), _same),
    ("decimal", _or_none(Decimal), _same),
):
    for _collection, _into in (("list", list), ("set", set)):
        _TO_PYTHON[f"{_name}_{_collection}_val"] = _elements_of(_to_python, _into)
        _TO_JSON[f"{_name}_{_collection}_val"] = _elements_of(_to_json)
