"""Feature rows as a producer sends them: checked against their view, turned into columns.

A push and a stream event come through here before they are written. All rows of a batch are checked before
any of them is used, so a bad row leaves nothing behind. Knows no HTTP and no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from core import json_values
from core.errors import InvalidRow
from core.expectations import Expectation
from core.json_values import describe
from core.repository import DUMMY_JOIN_KEY, Feature, View
from core.types import Dtype

# A row dated in the future wins against every row until then, so a wrong year must not come in.
MAX_AHEAD = timedelta(days=1)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EVENT_TIMESTAMP, _CREATED = "event_timestamp", "created"


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The rows of one view, by column.

    ``columns`` has a column for each join key and each feature of the view. ``event_ns`` are the event
    timestamps, nanoseconds since the epoch, UTC. ``created_ns`` are the created timestamps, None where the
    view's source has none. ``names`` maps the columns that were used to the names they were sent under.
    """

    view: View
    rows: int
    columns: dict[str, list[Any]]
    event_ns: list[int]
    created_ns: list[int] | None
    names: dict[str, str]


def check_rows(
    view: View,
    given: Mapping[str, Any],
    *,
    now: datetime,
    arrived_ns: Sequence[int] | None = None,
    wire_names: bool = False,
) -> CheckedRows:
    """Check ``given``, columns of JSON values, against ``view``.

    Columns may have the names of the view's source or, after its field mapping, those of the view; columns
    that the view does not know are left alone, as another view of the same push source may need them. A
    timestamp without a time zone is UTC, as everywhere in Feast. A row without a created timestamp was
    created when it arrived.

    Args:
        view: what the rows belong to.
        given: a list of values per column.
        now: the present, time-zone aware.
        arrived_ns: when each row arrived, nanoseconds since the epoch; without it, all arrived ``now``.
        wire_names: take timestamps also under the names that Feast's remote client always uses,
            ``event_timestamp`` and ``created``.

    Raises:
        InvalidRow: a column is missing or of another length, a value is not of its type or does not meet an
            expectation, or a timestamp is missing, unreadable or more than ``MAX_AHEAD`` ahead.
    """
    named, names = _view_names(view, given)
    source = view.source
    event_name = source.timestamp if source is not None else _EVENT_TIMESTAMP
    created_name = source.created if source is not None else None
    if wire_names:
        event_name = event_name if event_name in named else _EVENT_TIMESTAMP
        created_name = created_name if created_name is None or created_name in named else _CREATED
    needed = [*(key.name for key in view.join_keys), *(f.name for f in view.features), event_name]
    for name in needed:
        if name not in named:
            raise InvalidRow(
                f"Column `{name}` of view {view.name!r} is missing.",
                hint=f"Send the columns {', '.join(needed)}.",
                field=name,
                view=view.name,
            )
    used = [*needed, *([created_name] if created_name in named else [])]
    rows = _length(view, {name: named[name] for name in used})
    columns = {key.name: _keys(view, names[key.name], key.dtype, named[key.name]) for key in view.join_keys}
    columns |= {f.name: _features(view, names[f.name], f, named[f.name]) for f in view.features}
    created_ns = None
    if created_name is not None:
        arrived_ns = arrived_ns if arrived_ns is not None else [_nanoseconds(now)] * rows
        created_ns = [
            arrived_ns[row] if value is None else _nanoseconds(_moment(view, names[created_name], value, row))
            for row, value in enumerate(named.get(created_name) or [None] * rows)
        ]
    events_ns = _events(view, names[event_name], named[event_name], now + MAX_AHEAD)
    return CheckedRows(view, rows, columns, events_ns, created_ns, names)


def _view_names(view: View, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The columns under the view's names, and the names they were sent under."""
    mapping = view.source.field_mapping if view.source is not None else {}
    named: dict[str, Any] = {}
    names: dict[str, str] = {}
    for sent, column in given.items():
        name = mapping.get(sent, sent)
        if name in named:
            raise InvalidRow(
                f"Columns `{names[name]}` and `{sent}` are both {name!r} of view {view.name!r}.",
                hint="Send one of them.",
                field=sent,
                view=view.name,
            )
        if name != DUMMY_JOIN_KEY:
            named[name], names[name] = column, sent
    return named, names


def _length(view: View, columns: Mapping[str, Any]) -> int:
    for name, column in columns.items():
        if not isinstance(column, list):
            raise InvalidRow(
                f"Column `{name}` is {describe(column)}, not a list.",
                hint='Send every column as a list, as `frame.to_dict("list")` gives it.',
                field=name,
                view=view.name,
            )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        usual = next(iter(lengths.values()))
        odd = next(name for name, length in lengths.items() if length != usual)
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidRow(
            f"The columns differ in length ({listed}).",
            hint="Send as many values in every column.",
            field=odd,
            view=view.name,
        )
    return next(iter(lengths.values()))


def _keys(view: View, name: str, dtype: Dtype, values: list[Any]) -> list[Any]:
    if json_values.uniform(values, dtype):
        return values
    return [_value(view, name, dtype, value, row) for row, value in enumerate(values)]


def _features(view: View, name: str, feature: Feature, values: list[Any]) -> list[Any]:
    expectation = Expectation.parse(view.name, feature)
    if expectation.empty:
        present = [value for value in values if value is not None] if None in values else values
        if json_values.uniform(present, feature.dtype):
            return values
    checked = []
    for row, value in enumerate(values):
        missing = value is None
        if feature.dtype is Dtype.UNIX_TIMESTAMP:
            missing = missing or json_values.is_missing_timestamp(value)
        checked.append(None if missing else _value(view, name, feature.dtype, value, row))
        broken = expectation.check_value(checked[-1])
        if broken is not None:
            raise InvalidRow(
                f"`{name}` in row {row}: {broken}.",
                hint=f"The definition of {view.name}:{feature.name} expects it in its tags.",
                field=name,
                row=row,
                view=view.name,
            )
    return checked


def _value(view: View, name: str, dtype: Dtype, value: Any, row: int) -> Any:
    try:
        found = json_values.read(value, dtype, naive_zone=UTC)
    except json_values.NotOfType:
        found = None
    if found is None:
        said, hint = json_values.refusal(value, dtype)
        raise InvalidRow(
            f"`{name}` in row {row} {said}.",
            hint=hint,
            field=name,
            row=row,
            expected=dtype.name,
            view=view.name,
        )
    return found


def _events(view: View, name: str, values: list[Any], latest: datetime) -> list[int]:
    events = [_moment(view, name, value, row) for row, value in enumerate(values)]
    if events and max(events) > latest:
        row = next(row for row, event in enumerate(events) if event > latest)
        raise InvalidRow(
            f"`{name}` in row {row} is {describe(values[row])}, more than {MAX_AHEAD.days} day ahead.",
            hint="It would hide every newer row until then. A time without a zone is read as UTC.",
            field=name,
            row=row,
            view=view.name,
        )
    return list(map(_nanoseconds, events))


def _moment(view: View, name: str, value: Any, row: int) -> datetime:
    try:
        return json_values.moment(value, UTC)
    except (ValueError, OverflowError):
        raise InvalidRow(
            f"`{name}` in row {row} is {describe(value)}; it must be an RFC 3339 string.",
            hint='For example "2026-01-31T12:00:00Z".',
            field=name,
            row=row,
            view=view.name,
        ) from None


def _nanoseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
