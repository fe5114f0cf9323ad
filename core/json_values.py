"""JSON values as values of Feast's types, each taken only as what it is.

1.7, true and "12" are not Int64. Entity rows and pushed rows both come through here; knows no rows and no
columns, only single values.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import Any
from uuid import UUID

from core import layout
from core.errors import InvalidFeatureValue
from core.types import Dtype


class NotOfType(ValueError):
    """A JSON value is not of the type it should be; the message for the caller is ``refusal``."""


def read(value: Any, dtype: Dtype, *, naive_zone: tzinfo | None = None) -> Any:
    """The Python value that ``value``, as a JSON parser gives it, stands for.

    Bytes are base64, timestamps Unix seconds or RFC 3339 strings, UUIDs and decimals strings, sets and lists
    JSON lists, maps and structs objects or JSON in a string (as Feast's own client sends them).

    Args:
        value: anything but null, which is the caller's concern.
        dtype: the declared type.
        naive_zone: the time zone of a timestamp that names none; None refuses it.

    Raises:
        NotOfType: it is not of that type.
    """
    try:
        if dtype in _ELEMENTS:
            if type(value) is not list:
                raise ValueError
            element = _ELEMENTS[dtype]
            return [_element(entry, element, naive_zone) for entry in value]
        return _scalar(value, dtype, naive_zone)
    except _REFUSALS as exc:
        raise NotOfType(dtype.name) from exc


def uniform(column: list[Any], dtype: Dtype) -> bool:
    """Whether every value can stay as it is, found out at the speed of ``map``, ``min`` and ``sum``.

    Knows integers, finite floats, strings and booleans; says False of a column that it is not sure of.
    """
    expected = _EXACT.get(dtype)
    if expected is None or set(map(type, column)) != {expected}:
        return False
    if expected is int:
        low, high = _INT_RANGES[dtype]
        return bool(low <= min(column) and max(column) <= high)
    if dtype is Dtype.FLOAT:
        return bool(min(column) >= -_LARGEST_SINGLE and max(column) <= _LARGEST_SINGLE and _finite(column))
    return expected is not float or _finite(column)


def _finite(column: list[float]) -> bool:
    # A sum hides no NaN and no infinity; one that overflows only costs the slow way.
    return math.isfinite(sum(column))


def refusal(value: Any, dtype: Dtype) -> tuple[str, str | None]:
    """What is wrong with a value that ``read`` refuses, to go behind its name in a sentence; the way out.

    A JSON parser gives an integer of more than 64 bits as a float: what only its size keeps from being of the
    type is said to be that.
    """
    if dtype in _INT_RANGES and type(value) in (int, float):
        low, high = _INT_RANGES[dtype]
        if not low <= value <= high and (type(value) is int or value.is_integer()):
            return f"is out of the range of {_wanted(dtype)}", f"It must be from {low} to {high}."
    return f"is {describe(value)}; it must be {_wanted(dtype)}", _HINTS.get(dtype)


def _wanted(dtype: Dtype) -> str:
    """What a value of that type looks like in JSON."""
    if dtype in _ELEMENTS:
        return f"a list, and each element of it {_wanted(_ELEMENTS[dtype])}"
    return _WANTED.get(dtype, dtype.name)


def sample(dtype: Dtype) -> str:
    """An example, as JSON text."""
    return _SAMPLES.get(dtype, "...")


def describe(value: Any) -> str:
    """The value's JSON type and, where it is short, the value."""
    if value is None:
        return "null"
    name = _JSON_TYPES.get(type(value), f"a {type(value).__name__}")
    if not isinstance(value, bool | int | float | str):
        return name
    text = f'"{value}"' if isinstance(value, str) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"{name}, {text}" if len(text) <= 40 else name


def moment(value: Any, naive_zone: tzinfo | None = None) -> datetime:
    """The aware datetime that an RFC 3339 string stands for, in UTC.

    Raises:
        ValueError: it is no such string, or names no time zone and ``naive_zone`` is None.
    """
    if type(value) is not str:
        raise ValueError("not a string")
    found = datetime.fromisoformat(value)
    if found.tzinfo is None:
        if naive_zone is None:
            raise ValueError("no time zone")
        found = found.replace(tzinfo=naive_zone)
    return found.astimezone(UTC)


def is_missing_timestamp(value: Any) -> bool:
    """Whether it is the number that stands for a missing timestamp, as Feast's own client sends it."""
    return type(value) is int and value == layout.NULL_TIMESTAMP


def _scalar(value: Any, dtype: Dtype, naive_zone: tzinfo | None) -> Any:
    if dtype is Dtype.UNIX_TIMESTAMP:
        if type(value) is int:
            return None if is_missing_timestamp(value) else datetime.fromtimestamp(value, tz=UTC)
        return moment(value, naive_zone)
    check = _CHECKS.get(dtype)
    if check is not None:
        return check(value)
    if value is None:
        raise ValueError
    layout.encode_value(value, dtype)  # refuses what the type cannot hold
    return value


def _element(value: Any, dtype: Dtype, naive_zone: tzinfo | None) -> Any:
    if value == "" and dtype in _MISSING_AS_TEXT:
        return value
    return _scalar(value, dtype, naive_zone)


def _integer(dtype: Dtype) -> Callable[[Any], int]:
    low, high = _INT_RANGES[dtype]

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return check


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _single(value: Any) -> float:
    number = _number(value)
    struct.pack("<f", number)  # refuses what is beyond its range
    return number


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return check


def _text_as(convert: Callable[[str], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not str:
            raise ValueError
        return convert(value)

    return check


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise ValueError from exc


def _zoned(value: Any) -> datetime:
    moment(value)
    return datetime.fromisoformat(value)


# What parsers of texts, of numbers and of structures raise for what they do not take.
_REFUSALS = (
    ValueError,
    TypeError,
    ArithmeticError,
    OSError,
    RecursionError,
    struct.error,
    InvalidFeatureValue,
)
_INT_RANGES = {Dtype.INT64: (-(2**63), 2**63 - 1), Dtype.INT32: (-(2**31), 2**31 - 1)}
_EXACT: dict[Dtype, type] = {
    Dtype.INT64: int,
    Dtype.INT32: int,
    Dtype.STRING: str,
    Dtype.BOOL: bool,
    Dtype.DOUBLE: float,
    Dtype.FLOAT: float,
}
_LARGEST_SINGLE = 3.4028234663852886e38
_CHECKS: Mapping[Dtype, Callable[[Any], Any]] = {
    Dtype.INT64: _integer(Dtype.INT64),
    Dtype.INT32: _integer(Dtype.INT32),
    Dtype.STRING: _exactly(str),
    Dtype.BOOL: _exactly(bool),
    Dtype.DOUBLE: _number,
    Dtype.FLOAT: _single,
    Dtype.BYTES: _text_as(_base64),
    Dtype.PDF_BYTES: _text_as(_base64),
    Dtype.IMAGE_BYTES: _text_as(_base64),
    Dtype.UUID: _text_as(UUID),
    Dtype.TIME_UUID: _text_as(UUID),
    Dtype.DECIMAL: _text_as(Decimal),
    Dtype.ZONED_TIMESTAMP: _zoned,
}
_ELEMENTS: dict[Dtype, Dtype] = {
    Dtype[f"{dtype.name}_{kind}"]: dtype
    for dtype in (*_CHECKS, Dtype.UNIX_TIMESTAMP)
    for kind in ("LIST", "SET")
    if f"{dtype.name}_{kind}" in Dtype.__members__
}
# Feast stores a missing element of these collections as an empty text, and its client sends it so.
_MISSING_AS_TEXT = frozenset({Dtype.UUID, Dtype.TIME_UUID, Dtype.DECIMAL})
_JSON_TYPES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_WANTED = {
    Dtype.INT64: "a 64-bit integer (Int64)",
    Dtype.INT32: "a 32-bit integer (Int32)",
    Dtype.STRING: "a string (String)",
    Dtype.BOOL: "true or false (Bool)",
    Dtype.DOUBLE: "a number (Float64)",
    Dtype.FLOAT: "a number (Float32)",
    Dtype.UNIX_TIMESTAMP: "Unix seconds or an RFC 3339 string with a time zone (UnixTimestamp)",
    Dtype.ZONED_TIMESTAMP: "an RFC 3339 string with a time zone (ZonedTimestamp)",
    Dtype.BYTES: "a base64 string (Bytes)",
    Dtype.PDF_BYTES: "a base64 string (PdfBytes)",
    Dtype.IMAGE_BYTES: "a base64 string (ImageBytes)",
    Dtype.UUID: "a UUID string (Uuid)",
    Dtype.TIME_UUID: "a UUID string (TimeUuid)",
    Dtype.DECIMAL: "a decimal number in a string (Decimal)",
    Dtype.JSON: "an object, or JSON text in a string (Json)",
    Dtype.MAP: "an object, or one as JSON text in a string (Map)",
    Dtype.STRUCT: "an object, or one as JSON text in a string (Struct)",
    Dtype.MAP_LIST: "a list of objects, or of objects as JSON text in strings (Array(Map))",
    Dtype.STRUCT_LIST: "a list of objects, or of objects as JSON text in strings (Array(Struct))",
    Dtype.JSON_LIST: "a list of objects, or of JSON texts in strings (Array(Json))",
    Dtype.VALUE_LIST: "a list of lists (Array(Array))",
    Dtype.VALUE_SET: "a list of lists (Set(Array))",
    Dtype.SCALAR_MAP: "a map whose keys are no texts, which JSON cannot say (ScalarMap)",
}
_HINTS = {
    Dtype.INT64: "Send it as a bare JSON integer, such as 12.",
    Dtype.INT32: "Send it as a bare JSON integer, such as 12.",
    Dtype.STRING: 'Send it in quotes, such as "12".',
    Dtype.SCALAR_MAP: "Write this feature with Feast or by materialization.",
}
_SAMPLES = {
    Dtype.INT64: "1",
    Dtype.INT32: "1",
    Dtype.STRING: '"a"',
    Dtype.BOOL: "true",
    Dtype.DOUBLE: "1.5",
    Dtype.FLOAT: "1.5",
    Dtype.UNIX_TIMESTAMP: '"2026-01-31T12:00:00Z"',
}
