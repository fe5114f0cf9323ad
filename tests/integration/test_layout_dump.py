"""Serialised hashes held to the server's own: the bytes that DUMP gives after HSET."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hiredis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import layout
from core.layout_dump import LONGEST, dumps, storable
from core.layout_rows import EncodedRows, RowEncoder, assemble
from core.types import Dtype, Field
from tests.integration.test_layout_rows import COLUMNS, arrow
from tests.support.valkey import Valkey

USER = Field("user_id", Dtype.INT64)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with Valkey(tmp_path_factory.mktemp("dump"), "rdbcompression no") as server, server.client() as client:
        client.config_set("hash-max-listpack-entries", 512)
        yield client


def encoded(columns: dict[str, tuple[Dtype, pa.Array]], events_us: list[int] | None = None) -> EncodedRows:
    rows = len(next(iter(columns.values()))[1])
    events = events_us or [1_700_000_000_123_456] * rows
    batch = {name: column for name, (_, column) in columns.items()}
    batch |= {"user_id": pa.array(range(rows)), "ts": pa.array(events, pa.timestamp("us", tz="UTC"))}
    features = [Field(name, dtype) for name, (dtype, _) in columns.items()]
    return RowEncoder("shop", "v", [USER], features, "ts").encode(pa.record_batch(batch))


def parsed(rows: EncodedRows, pieces: Any) -> list[list[bytes]]:
    reader = hiredis.Reader()
    data = assemble(len(rows), *pieces)
    found = []
    for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        reader.feed(data.data[start:stop].tobytes())
        row = []
        while (part := reader.gets()) is not False:
            row.append(part)
        found.append(row)
    return found


def check(client: Any, rows: EncodedRows) -> np.ndarray[Any, Any]:
    """Hold the storable rows to the server; the others must be ones that it stores in another form."""
    pipeline = client.pipeline(transaction=False)
    fits = storable(rows)
    hashes = parsed(rows, rows.fields)
    for row, fields in enumerate(hashes):
        pipeline.execute_command("HSET", row, *fields)
        pipeline.dump(row)
        pipeline.object("encoding", row)
        pipeline.delete(row)
    replies = pipeline.execute()
    server = [dump for dump, fit in zip(replies[1::4], fits, strict=True) if fit]
    version = int.from_bytes(replies[1][-10:-8], "little")
    some = rows.filter(fits)
    if len(some):
        assert [dump for (dump,) in parsed(some, dumps(some, version))] == server
    for fit, fields, encoding in zip(fits, hashes, replies[2::4], strict=True):
        if not fit:
            assert encoding == b"hashtable" or any(part.isdigit() for part in fields[1::2])
    return fits


@given(data=st.data(), rows=st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_rows_of_any_types_are_the_servers_own_bytes(client: Any, data: st.DataObject, rows: int) -> None:
    columns = {}
    for number in range(data.draw(st.integers(1, 4))):
        dtype, kind, values, nullable = data.draw(st.sampled_from(COLUMNS))
        drawn = data.draw(
            st.lists(st.none() | values if nullable else values, min_size=rows + 1, max_size=rows + 1)
        )
        columns[f"f{number}"] = (dtype, arrow(drawn, kind)[1:])
    moments = st.integers(-(10**15), 4 * 10**15) | st.integers(-3, 3).map(lambda n: n * 10**6)
    check(client, encoded(columns, data.draw(st.lists(moments, min_size=rows, max_size=rows))))


@pytest.mark.parametrize("null", [False, True])
def test_values_of_up_to_64_bytes_fit(client: Any, null: bool) -> None:
    sizes = [0, 1, 60, 61, 62, 63, 64]  # two bytes more in the cell
    texts: list[str | None] = ["x" * size for size in sizes]
    rows = encoded({"text": (Dtype.STRING, pa.array([*texts, None] if null else texts))})
    assert check(client, rows).tolist() == [True] * 5 + [False] * 2 + [True] * null
    assert LONGEST == 64


@pytest.mark.parametrize("null", [False, True])
def test_a_float_whose_bytes_read_as_a_number_is_left_to_the_server(client: Any, null: bool) -> None:
    digits = np.frombuffer(b"12340000-123999999 9", "<f4").tolist()
    column = pa.array([*digits, 1.5, *([None] if null else [])], pa.float32())
    fits = check(client, encoded({"f": (Dtype.FLOAT, column)}))
    assert fits.tolist() == [False, False, True, False, True, True] + [True] * null


def test_numbers_of_all_sizes_and_signs_fit(client: Any) -> None:
    whole = [0, 1, -1, 127, 128, 4095, 4096, 2**31, -(2**63), 2**63 - 1, None]
    assert check(client, encoded({"i": (Dtype.INT64, pa.array(whole))})).all()


@pytest.mark.parametrize("name", ["f104771", "f169864", "f1231", "f1447436"])
def test_a_field_whose_hash_reads_as_a_number_is_stored_as_one(client: Any, name: str) -> None:
    """``f169864`` of view ``v`` hashes to ``2067``, ``f104771`` to ``0772``, which is none."""
    assert check(client, encoded({name: (Dtype.DOUBLE, pa.array([0.5, None]))})).all()
    if name == "f169864":
        assert layout.feature_field("v", name) == b"2067"


@pytest.mark.parametrize("features", [1, 5, 126, 127, 128, 129, 511])
@pytest.mark.parametrize("size", [0, 60])
def test_rows_of_many_fields_are_the_servers_own_bytes(client: Any, features: int, size: int) -> None:
    """From one byte of length to five, that is to a listpack of over 16 kB."""
    texts = pa.array(["x" * size, "y" * (size // 2)])
    assert check(client, encoded({f"f{i}": (Dtype.STRING, texts) for i in range(features)})).all()


def test_two_features_of_one_hash_field_are_left_to_the_server() -> None:
    rows = encoded({"a": (Dtype.DOUBLE, pa.array([1.0]))})
    twice = EncodedRows(
        rows.rows, rows.key, rows.fields, rows.field_count, rows.event_ns, (*rows.cells, rows.cells[-1])
    )
    assert storable(rows).all()
    assert not storable(twice).any()


def test_a_view_whose_name_is_too_long_for_a_listpack_is_left_to_the_server() -> None:
    batch = pa.record_batch({"user_id": [1], "ts": pa.array([0], pa.timestamp("us")), "a": [0.5]})
    for name, fits in (("v" * 60, True), ("v" * 61, False)):
        rows = RowEncoder("shop", name, [USER], [Field("a", Dtype.DOUBLE)], "ts").encode(batch)
        assert storable(rows).tolist() == [fits]
