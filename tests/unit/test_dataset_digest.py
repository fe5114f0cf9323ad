"""The content digest: the same for the same content, whatever wrote it; another for any other content."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.dataset_lock import content_digest

COLUMNS = {
    "int": pa.array([1, None, 3], pa.int32()),
    "double": pa.array([0.5, None, float("nan")]),
    "bool": pa.array([True, None, False]),
    "text": pa.array(["a", None, "ü"]),
    "bytes": pa.array([b"", None, b"\0"]),
    "time": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
    "date": pa.array([1, None, 3], pa.date32()),
    "decimal": pa.array([Decimal("1.50"), None, Decimal("-2.25")]),
    "list": pa.array([[1, None], None, []]),
    "texts": pa.array([["x", "y"], None, [None]]),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}]),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(3),
    "category": pa.array(["p", None, "q"]).dictionary_encode(),
}


def table() -> pa.Table:
    return pa.table(COLUMNS)


def test_chunks_encodings_and_files_make_no_difference(tmp_path: Path) -> None:
    digest = content_digest(table())
    chunked = pa.concat_tables([table().slice(0, 1), table().slice(1)])
    assert content_digest(chunked) == digest
    for options in ({}, {"compression": "zstd", "row_group_size": 1, "use_dictionary": False}):
        pq.write_table(table(), tmp_path / "t.parquet", **options)
        assert content_digest(pq.read_table(tmp_path / "t.parquet")) == digest
    large = table().set_column(3, "text", table()["text"].cast(pa.large_string()).dictionary_encode())
    assert content_digest(large) == digest


def test_what_lies_under_a_null_makes_no_difference() -> None:
    mask = np.array([False, True])
    one, other = (pa.table({"n": pa.array(np.array([1, under]), mask=mask)}) for under in (5, 6))
    assert content_digest(one) == content_digest(other)


@pytest.mark.parametrize("name", sorted(set(COLUMNS) - {"null"}))
def test_every_change_of_a_value_makes_a_difference(name: str) -> None:
    digests = {content_digest(table().select([name]))}
    column = COLUMNS[name]
    for order in ([1, 0, 2], [0, 2, 1], [0, 1, 1], [0, 0, 2]):
        digests.add(content_digest(pa.table({name: column.take(pa.array(order))})))
    digests.add(content_digest(pa.table({"other": column})))
    digests.add(content_digest(pa.table({name: column.slice(0, 2)})))
    assert len(digests) == 7


def test_a_null_is_no_zero_no_empty_text_no_nan() -> None:
    kinds = [
        ("n", pa.int64(), 0),
        ("t", pa.string(), ""),
        ("f", pa.float64(), float("nan")),
        ("b", pa.bool_(), False),
    ]
    for name, kind, empty in kinds:
        null, value = (content_digest(pa.table({name: pa.array([v], kind)})) for v in (None, empty))
        assert null != value


def test_types_and_column_order_make_a_difference() -> None:
    narrow = pa.table({"a": pa.array([1], pa.int32()), "b": pa.array([1], pa.int32())})
    assert content_digest(narrow) != content_digest(narrow.select(["b", "a"]))
    assert content_digest(narrow) != content_digest(
        narrow.cast(pa.schema([("a", pa.int64()), ("b", pa.int32())]))
    )


@settings(deadline=None)
@given(
    values=st.lists(
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=3)), max_size=20
    ),
    cut=st.integers(0, 20),
)
def test_slices_of_nested_columns_hash_as_copies_do(values: list[list[str | None] | None], cut: int) -> None:
    whole = pa.array(values, pa.list_(pa.string()))
    sliced = whole.slice(min(cut, len(whole)))
    copied = pa.array(sliced.to_pylist(), pa.list_(pa.string()))
    assert content_digest(pa.table({"c": sliced})) == content_digest(pa.table({"c": copied}))
