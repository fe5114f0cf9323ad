"""Frozen dataclasses as JSON text and back, strictly.

An unknown key, a missing key or a value of another type is an error that names its place. Knows the types
that records are made of (``Literal``, unions, tuples, mappings, enums by name, aware datetimes), and no
record.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")


class NotJSON(ValueError):
    """The text is no JSON; says where."""


class NotRecord(ValueError):
    """The JSON is not of the record's shape; says where."""


def to_json(record: Any) -> str:
    """The text of a record. Raises ValueError for NaN and infinity, which JSON has not."""
    return json.dumps(as_data(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(kind: type[Record], text: str | bytes, name: str) -> Record:
    """The record of type ``kind`` that ``text`` is; ``name`` is what errors call it.

    Raises:
        NotJSON, NotRecord: it is not.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as exc:
        raise NotJSON(str(exc)) from exc
    record: Record = _read(kind, tree, name)
    return record


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key is repeated")
    return tree


def as_data(value: Any) -> Any:
    """A record, or what stands in one, as what JSON is made of."""
    if is_dataclass(value):
        return {f.name: as_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return {key: as_data(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [as_data(entry) for entry in value]
    return value


@cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` (parsed JSON) as ``kind`` (a type hint of a record)."""

    def refuse(expected: str) -> NotRecord:
        return NotRecord(f"{where} should be {expected}, not {type(value).__name__}")

    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise refuse(f"one of {', '.join(typing.get_args(kind))}")
    if origin in (typing.Union, types.UnionType):
        reasons = []
        for option in typing.get_args(kind):
            try:
                return _read(option, value, where)
            except NotRecord as exc:
                # Its text alone: a kept exception keeps every frame below it, and what they load.
                reasons.append(str(exc))
        raise NotRecord(reasons[-1])
    if origin is tuple:
        if not isinstance(value, list):
            raise refuse("a list")
        return tuple(_read(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise refuse("an object")
        return {key: _read(typing.get_args(kind)[1], v, f"{where}.{key}") for key, v in value.items()}
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise refuse("an object")
        hints = _hints(typing.cast(type, kind))
        if set(value) != set(hints):
            odd = sorted(set(value) ^ set(hints))
            raise NotRecord(f"{where} lacks or should not have: {', '.join(odd)}")
        return typing.cast(type, kind)(
            **{k: _read(hint, value[k], f"{where}.{k}") for k, hint in hints.items()}
        )
    if issubclass(kind, Enum):
        if not isinstance(value, str) or value not in kind.__members__:
            raise refuse(f"the name of a {kind.__name__}")
        return kind[value]
    if kind is datetime:
        try:
            moment = datetime.fromisoformat(value)
        except (TypeError, ValueError) as exc:
            raise refuse("an ISO 8601 time") from exc
        if moment.tzinfo is None:
            raise refuse("a time with its UTC offset")
        return moment.astimezone(UTC)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise refuse(f"a {kind.__name__}")
    return value
