"""Redis replies as the JSON arrays of Feast's feature server, made from the cells a view at a time.

A view's statuses and timestamps are the same for all its features, so they are written once; floats go from
their cells into text together. Follows ``core.contract``; knows no connection and no request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, repeat

import numpy as np
import orjson
from numpy.typing import NDArray

from core import contract, layout
from core.layout import Cell
from core.types import Dtype, FeatureStatus

JsonColumn = tuple[bytes, bytes]
"""One feature of some entities: its values as a JSON array, and what ``rest`` makes of what stands beside."""

EPOCH = "1970-01-01T00:00:00Z"
FLOATS = frozenset({Dtype.DOUBLE, Dtype.FLOAT})
# By number: an enum's own name is several times slower to ask for.
_STATUS_NAMES = [status.name for status in sorted(FeatureStatus)]
_ONE = {status: b'["%b"]' % status.name.encode() for status in FeatureStatus}
_NULL = b"[null]"
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
    event, timestamps, present = _moment(cells[slot.timestamp])
    row = contract.row_status(event, now_ns, slot.ttl_ns)
    if row is not contract.PRESENT:
        hidden = [(_NULL, rest(_ONE[row], timestamps))]
        return hidden * sum(len(run.names) for run in slot.runs)
    columns: list[JsonColumn] = []
    for run in slot.runs:
        texts = layout.json_cells(cells[run.first : run.first + len(run.names)], run.dtype)
        if _NULL in texts:
            null = rest(_ONE[contract.NULL_VALUE], timestamps)
            columns += [(text, null if text == _NULL else present) for text in texts]
        else:
            columns += zip(texts, repeat(present))
    return columns


@lru_cache(maxsize=16_384)
def _moment(cell: Cell) -> tuple[int | None, bytes, bytes]:
    """A row's event timestamp from its cell, the same as a JSON array, and ``rest`` of what is PRESENT."""
    event = layout.decode_timestamps((cell,))[0]
    timestamps = b'["%b"]' % timestamp(event or 0).encode()
    return event, timestamps, rest(_ONE[contract.PRESENT], timestamps)


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
        present = rest(status_names(of_rows, rows), timestamps[position])
        hidden = [row for row, status in enumerate(of_rows or ()) if status is not contract.PRESENT]
        for run in slot.runs:
            found = by_field[run.first : run.first + len(run.names)]
            texts = layout.floats_json(found, run.dtype, hidden) if run.dtype in FLOATS else None
            if texts is not None:
                columns += zip(texts, repeat(present))
                continue
            for cells in found:
                values, statuses = contract.apply_status(layout.decode_json_column(cells, run.dtype), of_rows)
                same = statuses is None or statuses == of_rows
                names = present if same else rest(status_names(statuses, rows), timestamps[position])
                columns.append((orjson.dumps(values), names))
    return columns


_STATUSES, _TIMESTAMPS = b',"statuses":', b',"event_timestamps":'


def rest(statuses: bytes, timestamps: bytes) -> bytes:
    """What follows a column's values in its JSON object: statuses and event timestamps, JSON arrays."""
    return _STATUSES + statuses + _TIMESTAMPS + timestamps


def joined(slices: Sequence[JsonColumn]) -> JsonColumn:
    """One column of the rows of all slices."""

    def one(arrays: Iterable[bytes]) -> bytes:
        return b"[%b]" % b",".join([array[1:-1] for array in arrays])

    beside = [others.removeprefix(_STATUSES).split(_TIMESTAMPS) for _, others in slices]
    statuses, timestamps = zip(*beside, strict=True)
    return one(values for values, _ in slices), rest(one(statuses), one(timestamps))


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
        together = _together(event_ns, rows)
        if together is not None:
            return together
    texts = [timestamp(int(ns or 0)) for ns in event_ns]
    return [orjson.dumps(texts[start : start + rows]) for start in range(0, len(texts), rows)]


def _together(event_ns: Sequence[int | None] | NDArray[np.int64], rows: int) -> list[bytes] | None:
    """See ``event_timestamps``; None where numpy and orjson do not write what ``timestamp`` does."""
    events = event_ns if isinstance(event_ns, np.ndarray) else [ns or 0 for ns in event_ns]
    try:
        microseconds = (np.asarray(events, np.int64) + 500) // 1000
    except OverflowError:  # past the year 2262
        return None
    # orjson writes a fraction with six digits, protobuf whole milliseconds with three.
    whole = microseconds % 1000 == 0
    if whole.any() and (microseconds[whole] % 1_000_000).any():
        return None
    block = microseconds.view("datetime64[us]").reshape(-1, rows)
    return [orjson.dumps(column, option=_NUMPY_UTC) for column in block]


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
