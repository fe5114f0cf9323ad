"""Redis replies as the JSON arrays of Feast's feature server, made from the cells a view at a time.

A view's statuses and timestamps are the same for all its features, so they are written once; floats go from
their cells into text together. Follows ``core.contract``; knows no connection and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain

import numpy as np
import orjson
from numpy.typing import NDArray

from core import contract, layout
from core.layout import Cell
from core.types import Dtype, FeatureStatus

JsonColumn = tuple[bytes, bytes, bytes]
"""One feature of some entities: its values, their statuses, their event timestamps, each a JSON array."""

EPOCH = "1970-01-01T00:00:00Z"
FLOATS = frozenset({Dtype.DOUBLE, Dtype.FLOAT})
# By number: an enum's own name is several times slower to ask for.
_STATUS_NAMES = [status.name for status in sorted(FeatureStatus)]
_ONE = {status: b'["%b"]' % status.name.encode() for status in FeatureStatus}
_MANY_TIMESTAMPS = 8
_NUMPY_UTC = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent fields of one dtype."""

    dtype: Dtype
    first: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ViewSlot:
    """Where one projection's cells lie within the reply to its group's HMGET."""

    name: str
    ttl_ns: int
    runs: tuple[Run, ...]
    timestamp: int


def one_entity(slot: ViewSlot, cells: Sequence[Cell], now_ns: int) -> list[JsonColumn]:
    """A view's columns of one entity, run by run; raises CorruptCell."""
    event = layout.decode_timestamps(cells[slot.timestamp : slot.timestamp + 1])[0]
    row = contract.row_status(event, now_ns, slot.ttl_ns)
    statuses, timestamps = _ONE[row], b'["%b"]' % timestamp(event or 0).encode()
    columns: list[JsonColumn] = []
    for run in slot.runs:
        found = cells[run.first : run.first + len(run.names)]
        if row is not contract.PRESENT:
            columns += [(b"[null]", statuses, timestamps)] * len(found)
            continue
        texts = layout.float_texts(found, run.dtype) if run.dtype in FLOATS else None
        if texts is not None:
            columns += [(b"[%b]" % text, statuses, timestamps) for text in texts]
            continue
        for cell in found:
            text = layout.json_text(cell, run.dtype)
            status = _ONE[contract.NULL_VALUE] if text == b"null" else statuses
            columns.append((b"[%b]" % text, status, timestamps))
    return columns


def entities(slots: Sequence[ViewSlot], by_field: Sequence[Sequence[Cell]], now_ns: int) -> list[JsonColumn]:
    """The columns of the views of a group, slot by slot and run by run, from the cells by field.

    Raises:
        CorruptCell: a cell is no Feast value or no Timestamp.
    """
    rows = len(by_field[0])
    moments = list(chain.from_iterable([by_field[slot.timestamp] for slot in slots]))
    usual = layout.timestamp_array(moments) if len(moments) >= _MANY_TIMESTAMPS else None
    events = layout.decode_timestamps(moments) if usual is None else usual
    timestamps = event_timestamps(events, rows)
    columns: list[JsonColumn] = []
    for position, slot in enumerate(slots):
        of_rows = contract.row_statuses(events[position * rows : (position + 1) * rows], now_ns, slot.ttl_ns)
        names = status_names(of_rows, rows)
        hidden = [row for row, status in enumerate(of_rows or ()) if status is not contract.PRESENT]
        for run in slot.runs:
            found = by_field[run.first : run.first + len(run.names)]
            texts = layout.floats_json(found, run.dtype, hidden) if run.dtype in FLOATS else None
            if texts is not None:
                columns += [(text, names, timestamps[position]) for text in texts]
                continue
            for cells in found:
                values, statuses = contract.apply_status(layout.decode_json_column(cells, run.dtype), of_rows)
                same = statuses is None or statuses == of_rows
                columns.append(
                    (
                        orjson.dumps(values),
                        names if same else status_names(statuses, rows),
                        timestamps[position],
                    )
                )
    return columns


def joined(slices: Sequence[JsonColumn]) -> JsonColumn:
    """One column of the rows of all slices."""
    values, statuses, timestamps = (
        b"[%b]" % b",".join([array[1:-1] for array in arrays]) for arrays in zip(*slices, strict=True)
    )
    return values, statuses, timestamps


def status_names(statuses: Sequence[FeatureStatus] | None, rows: int) -> bytes:
    """The statuses as a JSON array; None stands for PRESENT everywhere."""
    if statuses is None:
        return repeated("PRESENT", rows)
    return orjson.dumps([_STATUS_NAMES[status] for status in statuses])


@lru_cache(maxsize=1024)
def repeated(text: str, rows: int) -> bytes:
    """A JSON array of one text."""
    return orjson.dumps([text] * rows)


def event_timestamps(event_ns: Sequence[int | None] | NDArray[np.int64], rows: int) -> list[bytes]:
    """Event timestamps as JSON arrays of ``rows`` each, as ``timestamp`` has them; None is the epoch."""
    if len(event_ns) >= _MANY_TIMESTAMPS:
        try:
            nanoseconds = np.asarray(event_ns, np.int64)
        except TypeError:
            nanoseconds = np.array([ns or 0 for ns in event_ns])
        microseconds = (nanoseconds + 500) // 1000
        # orjson writes a fraction with six digits, protobuf whole milliseconds with three.
        whole = microseconds % 1000 == 0
        if not whole.any() or not (microseconds[whole] % 1_000_000).any():
            block = microseconds.view("datetime64[us]").reshape(-1, rows)
            return [orjson.dumps(column, option=_NUMPY_UTC) for column in block]
    texts = [timestamp(int(ns or 0)) for ns in event_ns]
    return [orjson.dumps(texts[start : start + rows]) for start in range(0, len(texts), rows)]


@lru_cache(maxsize=16_384)
def timestamp(event_ns: int) -> str:
    """A row's event timestamp as protobuf's JSON has it, in UTC, to the microsecond as in Feast's server."""
    seconds, microseconds = divmod((event_ns + 500) // 1000, 1_000_000)
    hours, rest = divmod(seconds, 3600)
    text = f"{_hour(hours)}{rest // 60:02d}:{rest % 60:02d}"
    if microseconds == 0:
        return text + "Z"
    if microseconds % 1000 == 0:
        return f"{text}.{microseconds // 1000:03d}Z"
    return f"{text}.{microseconds:06d}Z"


@lru_cache(maxsize=4096)
def _hour(hours: int) -> str:
    return datetime.fromtimestamp(hours * 3600, tz=UTC).isoformat()[:14]
