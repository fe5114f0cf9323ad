"""JSON arrays made from cells say what the read by values says, whatever the cells and however many."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from core import contract, layout
from core.online_json import (
    EPOCH,
    JsonColumn,
    Run,
    ViewSlot,
    entities,
    event_timestamps,
    joined,
    one_entity,
    rest,
    status_names,
    timestamp,
)
from core.types import Dtype

NOW_NS = time.time_ns()
TTL_NS = 10 * 86_400 * 10**9
DTYPES = (Dtype.DOUBLE, Dtype.DOUBLE, Dtype.FLOAT, Dtype.INT64, Dtype.STRING)
SLOT = ViewSlot(
    "view",
    TTL_NS,
    (
        Run(Dtype.DOUBLE, 0, ("a", "b")),
        Run(Dtype.FLOAT, 2, ("c",)),
        Run(Dtype.INT64, 3, ("d",)),
        Run(Dtype.STRING, 4, ("e",)),
    ),
    timestamp=5,
)

doubles = st.one_of(
    st.floats(width=64), st.none(), st.sampled_from([0.0, -0.0, 1e16, 5e-324, math.inf, -math.inf])
)
singles = st.one_of(st.floats(width=32, allow_nan=False), st.none())
integers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.none())
texts = st.one_of(st.text(max_size=5), st.just("null"), st.none())
events = st.one_of(
    st.integers(NOW_NS - 2 * TTL_NS, NOW_NS).map(lambda ns: ns // 1000 * 1000),
    st.integers(NOW_NS // 10**9 - 1000, NOW_NS // 10**9).map(lambda s: s * 10**9),
    st.none(),
)


@st.composite
def rows(draw: st.DrawFn, count: st.SearchStrategy[int]) -> list[list[bytes | None]]:
    found = []
    for _ in range(draw(count)):
        event = draw(events)
        if event is None:
            found.append([None] * 6)
            continue
        values = [draw(s) for s in (doubles, doubles, singles, integers, texts)]
        cells: list[bytes | None] = [
            layout.encode_value(value, dtype) for value, dtype in zip(values, DTYPES, strict=True)
        ]
        found.append([*cells, layout.encode_timestamp(event)])
    return found


def expected(by_field: list[tuple[bytes | None, ...]]) -> list[tuple[list[Any], list[str], list[str]]]:
    """One value at a time: the contract's own functions on decoded cells."""
    moments = [None if cell is None else layout.decode_timestamp(cell) for cell in by_field[5]]
    of_rows = [contract.row_status(event, NOW_NS, TTL_NS) for event in moments]
    found = []
    for cells, dtype in zip(by_field[:5], DTYPES, strict=True):
        values, statuses = [], []
        for cell, row in zip(cells, of_rows, strict=True):
            value = layout.decode_json_column([cell], dtype)[0] if row is contract.PRESENT else None
            values.append(value)
            statuses.append(contract.value_status(row, value).name)
        found.append((values, statuses, [timestamp(ns or 0) for ns in moments]))
    return found


def parsed(columns: list[JsonColumn]) -> list[tuple[list[Any], list[str], list[str]]]:
    objects = [orjson.loads(b'{"values":%b%b}' % column) for column in columns]
    return [(found["values"], found["statuses"], found["event_timestamps"]) for found in objects]


@settings(max_examples=150, deadline=None)
@given(rows(st.sampled_from([1, 2, 5, 20, 40])))
def test_columns_equal_the_contract_applied_value_by_value(found: list[list[bytes | None]]) -> None:
    by_field = list(zip(*found, strict=True))
    assert parsed(entities([SLOT], by_field, NOW_NS)) == expected(by_field)
    for row in found:
        assert parsed(one_entity(SLOT, row, NOW_NS)) == expected([(cell,) for cell in row])


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_floats_have_one_text_however_they_are_written(numbers: list[float]) -> None:
    cells = [layout.encode_value(number, Dtype.DOUBLE) for number in numbers]
    expected = [orjson.dumps(number) for number in numbers]
    assert layout.json_cells(cells, Dtype.DOUBLE) == [b"[%b]" % text for text in expected]
    assert layout.floats_json([cells, cells], Dtype.DOUBLE) == [b"[%b]" % b",".join(expected)] * 2


LATEST_NS = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp()) * 10**9
moments = st.one_of(st.integers(0, 2**62), st.integers(2**62, LATEST_NS)).map(lambda ns: ns // 1000 * 1000)


@given(st.lists(st.one_of(st.none(), moments), min_size=1))
def test_timestamps_are_written_alike_alone_and_together(event_ns: list[int | None]) -> None:
    texts = [timestamp(ns or 0) for ns in event_ns]
    assert event_timestamps(event_ns * 12, len(event_ns)) == [orjson.dumps(texts)] * 12
    assert timestamp(0) == EPOCH


def test_slices_join_to_one_column() -> None:
    first = b"[1,2]", rest(status_names(None, 2), b'["a","b"]')
    second = b"[null]", rest(status_names([contract.NOT_FOUND], 1), b'["c"]')
    statuses, timestamps = b'["PRESENT","PRESENT","NOT_FOUND"]', b'["a","b","c"]'
    assert joined([first, second]) == (b"[1,2,null]", rest(statuses, timestamps))
