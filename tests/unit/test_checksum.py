"""Redis's CRC-64 of many rows at once, against one written bit by bit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.checksum import RUN_BYTES, crc64
from core.layout_columns import BINARY, Piece


def bit_by_bit(data: bytes) -> int:
    checksum = 0
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x95AC9329AC4BC9B5 if checksum & 1 else 0)
    return checksum


def test_the_check_value_is_that_of_redis() -> None:
    assert crc64(1, [b"123456789"]).tolist() == [0xE9C6D914C4B8D9CA]


@given(data=st.data(), rows=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_row_has_the_checksum_of_its_pieces(data: st.DataObject, rows: int) -> None:
    pieces: list[Piece] = []
    expected = [b""] * rows
    for kind in data.draw(st.lists(st.sampled_from(["constant", "matrix", "varying"]), max_size=6)):
        size = data.draw(st.sampled_from([0, 1, 7, 8, 9, 40, RUN_BYTES, 2 * RUN_BYTES + 3]))
        if kind == "constant":
            constant = data.draw(st.binary(min_size=size, max_size=size))
            pieces.append(constant)
            parts = [constant] * rows
        elif kind == "matrix":
            flat = data.draw(st.binary(min_size=size * rows, max_size=size * rows))
            pieces.append(np.frombuffer(flat, np.uint8).reshape(rows, size))
            parts = [flat[row * size : (row + 1) * size] for row in range(rows)]
        else:
            longest = min(size, RUN_BYTES)
            drawn = st.lists(st.binary(max_size=longest), min_size=rows + 1, max_size=rows + 1)
            parts = data.draw(drawn)
            pieces.append(pa.array(parts, BINARY)[1:])  # a slice: its offset counts
            parts = parts[1:]
        expected = [row + part for row, part in zip(expected, parts, strict=True)]
    assert crc64(rows, pieces).tolist() == [bit_by_bit(row) for row in expected]


def test_a_varying_piece_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="257 bytes"):
        crc64(1, [pa.array([b"x" * (RUN_BYTES + 1)], BINARY)])
