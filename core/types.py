"""Frozen records that cross package borders. Pure: imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


def is_version(text: str) -> bool:
    """Whether it can be a version's number; a "²" is a digit to Python and none to ``int``."""
    return text.isascii() and text.isdecimal() and len(text) <= 9


class FeatureStatus(IntEnum):
    """Feast's ``FieldStatus``, by the same names and numbers.

    Stored values have one of the last four; INVALID is that of an on-demand feature whose function failed.
    """

    INVALID = 0
    PRESENT = 1
    NULL_VALUE = 2
    NOT_FOUND = 3
    OUTSIDE_MAX_AGE = 4


class Dtype(IntEnum):
    """Feast's ``ValueType.Enum``, by the same names and numbers (held to it by a test)."""

    INVALID = 0
    BYTES = 1
    STRING = 2
    INT32 = 3
    INT64 = 4
    DOUBLE = 5
    FLOAT = 6
    BOOL = 7
    UNIX_TIMESTAMP = 8
    BYTES_LIST = 11
    STRING_LIST = 12
    INT32_LIST = 13
    INT64_LIST = 14
    DOUBLE_LIST = 15
    FLOAT_LIST = 16
    BOOL_LIST = 17
    UNIX_TIMESTAMP_LIST = 18
    NULL = 19
    MAP = 20
    MAP_LIST = 21
    BYTES_SET = 22
    STRING_SET = 23
    INT32_SET = 24
    INT64_SET = 25
    DOUBLE_SET = 26
    FLOAT_SET = 27
    BOOL_SET = 28
    UNIX_TIMESTAMP_SET = 29
    PDF_BYTES = 30
    IMAGE_BYTES = 31
    JSON = 32
    JSON_LIST = 33
    STRUCT = 34
    STRUCT_LIST = 35
    UUID = 36
    TIME_UUID = 37
    UUID_LIST = 38
    TIME_UUID_LIST = 39
    UUID_SET = 40
    TIME_UUID_SET = 41
    VALUE_LIST = 42
    VALUE_SET = 43
    DECIMAL = 44
    DECIMAL_LIST = 45
    DECIMAL_SET = 46
    SCALAR_MAP = 47
    ZONED_TIMESTAMP = 48


@dataclass(frozen=True, slots=True)
class Field:
    """A named, typed column: a join key, a feature or a request-time input."""

    name: str
    dtype: Dtype


def feature_name(view: str, feature: str) -> str:
    """The name of a feature everywhere outside Feast's own API: ``view__feature``."""
    return f"{view}__{feature}"
