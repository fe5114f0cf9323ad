"""Pushed rows are encoded to the same bytes, whether they come one by one or by the hundred."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from core.layout_rows import EncodedRows, assemble
from core.repository import Feature, View
from core.types import Dtype, Field
from core.write import BULK_ROWS, encode_rows

VALUES: dict[Dtype, st.SearchStrategy[Any]] = {
    Dtype.INT64: st.integers(-(2**63), 2**63 - 1),
    Dtype.INT32: st.integers(-(2**31), 2**31 - 1),
    Dtype.DOUBLE: st.floats(allow_nan=False),
    Dtype.FLOAT: st.floats(width=32, allow_nan=False),
    Dtype.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    Dtype.BOOL: st.booleans(),
}
VIEW = View(
    name="v",
    stored_name="v",
    join_keys=(Field("id", Dtype.INT64), Field("code", Dtype.STRING)),
    features=tuple(Feature(dtype.name, dtype, {}) for dtype in VALUES),
    ttl=timedelta(0),
)
ROW = st.tuples(
    VALUES[Dtype.INT64],
    VALUES[Dtype.STRING],
    *(st.none() | values for values in VALUES.values()),
    st.integers(0, 2**62),
)


def blocks(rows: EncodedRows) -> list[bytes]:
    """Per row its key and its fields."""
    commands = assemble(len(rows), *rows.key, *rows.fields)
    bounds = zip(commands.offsets[:-1], commands.offsets[1:], strict=True)
    data = bytes(commands.data)
    return [data[start:stop] for start, stop in bounds]


def encoded(rows: list[tuple[Any, ...]]) -> EncodedRows:
    *columns, events = map(list, zip(*rows, strict=True))
    names = ["id", "code", *(dtype.name for dtype in VALUES)]
    return encode_rows("shop", VIEW, dict(zip(names, columns, strict=True)), events)


@settings(deadline=None, max_examples=50)
@given(st.lists(ROW, min_size=1, max_size=20))
def test_many_rows_have_the_bytes_of_single_ones(rows: list[tuple[Any, ...]]) -> None:
    many = (rows * BULK_ROWS)[: BULK_ROWS + 3]
    together = encoded(many)
    assert blocks(together) == [block for row in many for block in blocks(encoded([row]))]
    assert blocks(encoded(rows)) == [block for row in rows for block in blocks(encoded([row]))]
    assert together.event_ns.tolist() == [row[-1] // 1000 * 1000 for row in many]
