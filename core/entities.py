"""Entity rows as a caller sends them: checked against the declared dtypes, turned into columns.

A value is taken only as what it is: 1.7, true and "12" are not Int64 keys. Every complaint names the
field, the row and the type that was expected.
"""

from __future__ import annotations

import base64
import binascii
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

from core.errors import InvalidEntity, InvalidRequest, TooLarge
from core.expectations import Expectation
from core.repository import Feature
from core.types import Dtype, Field

Check = Callable[[Any], Any]


class EntitySchema:
    """What an entity row must hold: join keys, never null, and request-time inputs.

    An input whose definition has the tag ``default: now`` may be left out; it is then the server's clock in
    epoch seconds.
    """

    def __init__(
        self, join_keys: Sequence[Field], request_inputs: Sequence[Feature], max_entities: int
    ) -> None:
        self.join_keys = tuple(join_keys)
        self.max_entities = max_entities
        self._inputs = {
            feature.name: Expectation.parse("request inputs", feature) for feature in request_inputs
        }
        self._dtypes = {field.name: field.dtype for field in join_keys}
        self._dtypes |= {feature.name: feature.dtype for feature in request_inputs}
        self._optional = {f.name for f in request_inputs if f.tags.get("default") == "now"}
        self._required = [name for name in self._dtypes if name not in self._optional]

    def columns(self, entities: Any) -> tuple[dict[str, list[Any]], int]:
        """Turn rows ``[{...}, ...]`` or columns ``{name: [...]}`` into checked columns.

        Returns:
            The columns, one per join key and request-time input, and the number of rows.

        Raises:
            InvalidEntity: a field is missing, unknown, or holds a value that is not of its type.
            InvalidRequest: there are no entities, or the columns differ in length.
            TooLarge: there are more rows than the limit.
        """
        if isinstance(entities, list):
            columns, rows = self._from_rows(entities)
        elif isinstance(entities, dict):
            columns, rows = self._from_columns(entities)
        else:
            raise InvalidRequest(
                "`entities` must be a list of rows or an object of columns.",
                hint=f"For example {self._example()}.",
                field="entities",
            )
        for name, column in columns.items():
            columns[name] = self._checked(name, column)
        return columns, rows

    def _from_rows(self, entities: list[Any]) -> tuple[dict[str, list[Any]], int]:
        rows = len(entities)
        self.check_count(rows)
        now = int(time.time())
        given = len(self._required)
        try:
            columns = {name: [row[name] for row in entities] for name in self._required}
            for name in self._optional:
                columns[name] = [row.get(name, now) for row in entities]
            if any(len(row) != given + sum(name in row for name in self._optional) for row in entities):
                raise self._row_complaint(entities)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise self._row_complaint(entities) from None
        return columns, rows

    def _row_complaint(self, entities: list[Any]) -> InvalidRequest:
        for index, row in enumerate(entities):
            if not isinstance(row, dict):
                return InvalidEntity(
                    f"Row {index} is {_describe(row)}, not an object.",
                    hint=f"For example {self._example()}.",
                    field="entities",
                    row=index,
                )
            for name in self._required:
                if name not in row:
                    return self._missing(name, index)
            for name in row:
                if name not in self._dtypes:
                    return self._unknown(name, index)
        return InvalidEntity("The entity rows differ in their fields.", field="entities")

    def _from_columns(self, entities: dict[str, Any]) -> tuple[dict[str, list[Any]], int]:
        for name in entities:
            if name not in self._dtypes:
                raise self._unknown(name)
        for name in self._required:
            if name not in entities:
                raise self._missing(name)
        for name in entities:
            if not isinstance(entities[name], list):
                raise InvalidEntity(
                    f"Column `{name}` is {_describe(entities[name])}, not a list.",
                    hint=f"For example {self._example()}.",
                    field=name,
                )
        lengths = {name: len(column) for name, column in entities.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise InvalidRequest(
                f"The columns of `entities` differ in length ({listed}).",
                hint="Send as many values in every column.",
                field="entities",
            )
        rows = next(iter(lengths.values()), 0)
        self.check_count(rows)
        columns = dict(entities)
        for name in self._optional - entities.keys():
            columns[name] = [int(time.time())] * rows
        return columns, rows

    def check_count(self, rows: int) -> None:
        """Raise InvalidRequest for no rows, TooLarge for more than the limit."""
        if rows == 0:
            raise InvalidRequest(
                "`entities` is empty.",
                hint=f"Send at least one row, such as {self._example()}.",
                field="entities",
            )
        if rows > self.max_entities:
            raise TooLarge(
                f"{rows} entities are more than the limit of {self.max_entities}.",
                hint="Send them in several requests, or raise BANQUET_MAX_ENTITIES.",
                field="entities",
                limit=self.max_entities,
            )

    def _checked(self, name: str, column: list[Any]) -> list[Any]:
        dtype = self._dtypes[name]
        expectation = self._inputs.get(name)
        if expectation is None and dtype in _EXACT and _uniform(column, dtype):
            return column
        check = _CHECKS.get(dtype, _anything)
        checked: list[Any] = []
        for row, value in enumerate(column):
            if value is None and expectation is not None:
                checked.append(None)
            else:
                try:
                    checked.append(check(value))
                except (TypeError, ValueError, OverflowError, InvalidOperation, binascii.Error):
                    wanted = _WANTED.get(dtype, dtype.name)
                    raise InvalidEntity(
                        f"`{name}` in row {row} is {_describe(value)}; it must be {wanted}.",
                        hint=_HINTS.get(dtype),
                        field=name,
                        row=row,
                        expected=dtype.name,
                    ) from None
            if expectation is not None:
                broken = expectation.check_value(checked[-1])
                if broken is not None:
                    raise InvalidEntity(f"`{name}` in row {row}: {broken}.", field=name, row=row)
        return checked

    def _missing(self, name: str, row: int | None = None) -> InvalidEntity:
        where = "" if row is None else f" in row {row}"
        kind = "Request-time input" if name in self._inputs else "Join key"
        return InvalidEntity(
            f"{kind} `{name}` is missing{where}.",
            hint=f"Each row needs {self._needs()}.",
            field=name,
            row=row,
        )

    def _unknown(self, name: str, row: int | None = None) -> InvalidEntity:
        where = "" if row is None else f" in row {row}"
        return InvalidEntity(
            f"Unknown field `{name}`{where}.",
            hint=f"Each row needs {self._needs()} and nothing else.",
            field=name,
            row=row,
        )

    def _needs(self) -> str:
        return (
            ", ".join(
                f"`{name}` ({dtype.name}{', optional' if name in self._optional else ''})"
                for name, dtype in self._dtypes.items()
            )
            or "no fields"
        )

    def _example(self) -> str:
        row = ", ".join(
            f'"{name}": {_SAMPLES.get(dtype, "...")}'
            for name, dtype in self._dtypes.items()
            if name in self._required
        )
        return f"[{{{row}}}]"


def _uniform(column: list[Any], dtype: Dtype) -> bool:
    """Whether every value is exactly of the type, at the speed of ``map`` and ``min``."""
    expected = _EXACT[dtype]
    if set(map(type, column)) != {expected}:
        return False
    if expected is int:
        low, high = _INT_RANGES[dtype]
        return bool(low <= min(column) and max(column) <= high)
    return True


def _integer(dtype: Dtype) -> Check:
    low, high = _INT_RANGES[dtype]

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise TypeError
        return value

    return check


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _exactly(kind: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return check


def _timestamp(value: Any) -> datetime:
    if type(value) is int:
        return datetime.fromtimestamp(value, tz=UTC)
    if type(value) is not str:
        raise TypeError
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError
    return moment.astimezone(UTC)


def _bytes(value: Any) -> bytes:
    if type(value) is not str:
        raise TypeError
    return base64.b64decode(value, validate=True)


def _uuid(value: Any) -> UUID:
    if type(value) is not str:
        raise TypeError
    return UUID(value)


def _decimal(value: Any) -> Decimal:
    if type(value) is not str:
        raise TypeError
    return Decimal(value)


def _anything(value: Any) -> Any:
    if value is None:
        raise TypeError
    return value


def _describe(value: Any) -> str:
    """The value's JSON type and, where it is short, the value."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    name = names.get(type(value), f"a {type(value).__name__}")
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    if isinstance(value, str):
        text = f'"{value}"'
    return f"{name}, {text}" if isinstance(value, bool | int | float | str) and len(text) <= 40 else name


_INT_RANGES = {Dtype.INT64: (-(2**63), 2**63 - 1), Dtype.INT32: (-(2**31), 2**31 - 1)}
_EXACT: dict[Dtype, type] = {Dtype.INT64: int, Dtype.INT32: int, Dtype.STRING: str}
_CHECKS: dict[Dtype, Check] = {
    Dtype.INT64: _integer(Dtype.INT64),
    Dtype.INT32: _integer(Dtype.INT32),
    Dtype.STRING: _exactly(str),
    Dtype.JSON: _anything,
    Dtype.BOOL: _exactly(bool),
    Dtype.DOUBLE: _number,
    Dtype.FLOAT: _number,
    Dtype.UNIX_TIMESTAMP: _timestamp,
    Dtype.BYTES: _bytes,
    Dtype.UUID: _uuid,
    Dtype.TIME_UUID: _uuid,
    Dtype.DECIMAL: _decimal,
}
_WANTED = {
    Dtype.INT64: "a 64-bit integer (Int64)",
    Dtype.INT32: "a 32-bit integer (Int32)",
    Dtype.STRING: "a string (String)",
    Dtype.BOOL: "true or false (Bool)",
    Dtype.DOUBLE: "a number (Float64)",
    Dtype.FLOAT: "a number (Float32)",
    Dtype.UNIX_TIMESTAMP: "Unix seconds or an RFC 3339 string with a time zone (UnixTimestamp)",
    Dtype.BYTES: "a base64 string (Bytes)",
    Dtype.UUID: "a UUID string (Uuid)",
    Dtype.TIME_UUID: "a UUID string (TimeUuid)",
    Dtype.DECIMAL: "a decimal number in a string (Decimal)",
}
_HINTS = {
    Dtype.INT64: "Send it as a bare JSON integer, such as 12.",
    Dtype.INT32: "Send it as a bare JSON integer, such as 12.",
    Dtype.STRING: 'Send it in quotes, such as "12".',
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
