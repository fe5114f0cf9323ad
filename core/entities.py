"""Entity rows as a caller sends them: checked against the declared dtypes, turned into columns.

A value is taken only as what it is: 1.7, true and "12" are not Int64 keys. Every complaint names the
field, the row and the type that was expected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from core import json_values
from core.errors import InvalidEntity, InvalidRequest, TooLarge
from core.expectations import Expectation
from core.json_values import describe
from core.repository import Feature
from core.types import Field


class EntitySchema:
    """What an entity row must hold: join keys, never null, and request-time inputs (``dtypes`` has both).

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
        self.dtypes = {field.name: field.dtype for field in join_keys}
        self.dtypes |= {feature.name: feature.dtype for feature in request_inputs}
        self._optional = {f.name for f in request_inputs if f.tags.get("default") == "now"}
        self._required = [name for name in self.dtypes if name not in self._optional]

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
        given = len(self._required)
        try:
            columns = {name: [row[name] for row in entities] for name in self._required}
            if self._optional:
                now = int(time.time())
                for name in self._optional:
                    columns[name] = [row.get(name, now) for row in entities]
                odd = any(len(row) != given + sum(name in row for name in self._optional) for row in entities)
            else:
                odd = set(map(len, entities)) != {given}
            if odd:
                raise self._row_complaint(entities)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise self._row_complaint(entities) from None
        return columns, rows

    def _row_complaint(self, entities: list[Any]) -> InvalidRequest:
        for index, row in enumerate(entities):
            if not isinstance(row, dict):
                return InvalidEntity(
                    f"Row {index} is {describe(row)}, not an object.",
                    hint=f"For example {self._example()}.",
                    field="entities",
                    row=index,
                )
            # A name that is misspelt is both unknown and missing: what was sent is what the caller knows.
            for name in row:
                if name not in self.dtypes:
                    return self._unknown(name, index)
            for name in self._required:
                if name not in row:
                    return self._missing(name, index)
        return InvalidEntity("The entity rows differ in their fields.", field="entities")

    def _from_columns(self, entities: dict[str, Any]) -> tuple[dict[str, list[Any]], int]:
        if entities.keys() != self.dtypes.keys():
            for name in entities:
                if name not in self.dtypes:
                    raise self._unknown(name)
            for name in self._required:
                if name not in entities:
                    raise self._missing(name)
        for name, column in entities.items():
            if not isinstance(column, list):
                raise InvalidEntity(
                    f"Column `{name}` is {describe(column)}, not a list.",
                    hint=f"For example {self._example()}.",
                    field=name,
                )
        lengths = set(map(len, entities.values()))
        if len(lengths) > 1:
            listed = ", ".join(f"{name}: {len(column)}" for name, column in entities.items())
            raise InvalidRequest(
                f"The columns of `entities` differ in length ({listed}).",
                hint="Send as many values in every column.",
                field="entities",
            )
        rows = lengths.pop() if lengths else 0
        self.check_count(rows)
        columns = dict(entities)
        if self._optional:
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
        dtype = self.dtypes[name]
        expectation = self._inputs.get(name)
        if expectation is None and json_values.uniform(column, dtype):
            return column
        checked: list[Any] = []
        for row, value in enumerate(column):
            if value is None and expectation is not None:
                checked.append(None)
            else:
                try:
                    checked.append(json_values.read(value, dtype))
                except json_values.NotOfType:
                    said, hint = json_values.refusal(value, dtype)
                    raise InvalidEntity(
                        f"`{name}` in row {row} {said}.", hint=hint, field=name, row=row, expected=dtype.name
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
        close = get_close_matches(name, self.dtypes, n=1)
        meant = f"; did you mean `{close[0]}`?" if close else "."
        return InvalidEntity(
            f"Unknown field `{name}`{where}{meant}",
            hint=f"Each row needs {self._needs()} and nothing else.",
            field=name,
            row=row,
        )

    def _needs(self) -> str:
        return (
            ", ".join(
                f"`{name}` ({dtype.name}{', optional' if name in self._optional else ''})"
                for name, dtype in self.dtypes.items()
            )
            or "no fields"
        )

    def _example(self) -> str:
        row = ", ".join(
            f'"{name}": {json_values.sample(dtype)}'
            for name, dtype in self.dtypes.items()
            if name in self._required
        )
        return f"[{{{row}}}]"
