"""Redis's CRC-64 of many byte strings at once: what ends every serialised value that RESTORE takes.

The checksum (Jones: polynomial ad93d23594c935a9, reflected, from zero; ``crc64.c`` of Redis and Valkey) is
linear over XOR: that of a string is the XOR of what each byte contributes at its distance from the end. So
bytes that are the same in every row are folded once, and the others looked up a column at a time.

Knows no listpack and no command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.layout_columns import Bytes, Piece

_POLYNOMIAL = 0x95AC9329AC4BC9B5  # reflected
# The longest run of bytes that is folded at once, and so the longest varying piece.
RUN_BYTES = 256

_Checksums = NDArray[np.uint64]


def crc64(rows: int, pieces: Sequence[Piece]) -> _Checksums:
    """The checksum of every row's pieces, one after the other.

    Raises:
        ValueError: an Arrow piece has a value of more than ``RUN_BYTES``.
    """
    state = np.zeros(rows, np.uint64)
    found = np.empty(rows, np.uint64)  # reused: a fresh array per column would cost as much as the look-up
    started = False
    for width, constant, columns in _runs(pieces):
        if started:
            state = _shifted(state, width, found)
        started = True
        if constant:
            state ^= constant
        for distance, column in columns:
            np.take(_tables()[distance], column, out=found, mode="clip")
            state ^= found
    return state


_Run = tuple["int | NDArray[np.int64]", np.uint64, list[tuple[int, Bytes]]]


def _runs(pieces: Sequence[Piece]) -> Iterator[_Run]:
    """Runs of at most ``RUN_BYTES``: their width, the constant bytes' checksum, the other bytes' columns."""
    columns: list[tuple[int, bytes | Bytes]] = []  # from where, and constants or one column per byte
    width = 0
    for piece in pieces:
        if isinstance(piece, pa.LargeBinaryArray):
            if width:
                yield _run(width, columns)
            yield _varying(piece)
            columns, width = [], 0
            continue
        size = len(piece) if isinstance(piece, bytes) else piece.shape[1]
        for start in range(0, size, RUN_BYTES):
            part = min(size - start, RUN_BYTES)
            if width + part > RUN_BYTES:
                yield _run(width, columns)
                columns, width = [], 0
            some = piece[start : start + part] if isinstance(piece, bytes) else _columns(piece, start, part)
            columns.append((width, some))
            width += part
    if width:
        yield _run(width, columns)


def _columns(piece: Bytes, start: int, count: int) -> Bytes:
    """Some of its columns as contiguous rows: a look-up by a strided column takes four times as long."""
    return np.ascontiguousarray(piece[:, start : start + count].T)


def _run(width: int, parts: list[tuple[int, bytes | Bytes]]) -> _Run:
    constant, varying = 0, []
    for start, part in parts:
        for place, column in enumerate(part, start):
            if isinstance(column, int):
                constant ^= int(_tables()[width - 1 - place, column])
            else:
                varying.append((width - 1 - place, column))
    return width, np.uint64(constant), varying


def _varying(piece: pa.LargeBinaryArray) -> _Run:
    """Strings of varying length, with zeros before the shorter ones: those change no checksum."""
    _, bounds, data = piece.buffers()
    offsets = np.frombuffer(bounds, np.int64)[piece.offset : piece.offset + len(piece) + 1]
    sizes = np.diff(offsets)
    width = int(sizes.max()) if len(sizes) else 0
    if width > RUN_BYTES:
        raise ValueError(f"a piece of {width} bytes is too long")
    block = np.zeros((width, len(piece)), np.uint8)
    raw = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    for distance in range(width):
        rows = np.flatnonzero(sizes > distance)
        block[width - 1 - distance, rows] = raw[offsets[rows + 1] - 1 - distance]
    return sizes, np.uint64(0), [(width - 1 - place, column) for place, column in enumerate(block)]


def _shifted(state: _Checksums, width: int | NDArray[np.int64], found: _Checksums) -> _Checksums:
    """The checksums as they are after ``width`` more zero bytes."""
    octets = np.ascontiguousarray(state.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8).T)
    out = np.zeros(len(state), np.uint64)
    if isinstance(width, int):
        for table, column in zip(_shift(width), octets, strict=True):
            np.take(table, column, out=found, mode="clip")
            out ^= found
        return out
    tables = _shifts(int(width.max()) if len(width) else 0)
    for place, column in enumerate(octets):
        np.take(tables, width * (8 * 256) + place * 256 + column, out=found, mode="clip")
        out ^= found
    return out


@cache
def _tables() -> _Checksums:
    """What a byte contributes when so many others follow it: ``[distance, byte]``."""
    first = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        first = np.where(
            first & np.uint64(1), (first >> np.uint64(1)) ^ np.uint64(_POLYNOMIAL), first >> np.uint64(1)
        )
    tables = np.empty((RUN_BYTES, 256), np.uint64)
    tables[0] = first
    for distance in range(1, RUN_BYTES):
        before = tables[distance - 1]
        tables[distance] = first[before & np.uint64(0xFF)] ^ (before >> np.uint64(8))
    return tables


@cache
def _shift(width: int) -> _Checksums:
    """What each byte of a checksum becomes after ``width`` zero bytes: ``[place, byte]``, low byte first."""
    values = np.arange(256, dtype=np.uint64)
    return np.stack(
        [
            _tables()[width - 1 - place] if place < width else values << np.uint64(8 * (place - width))
            for place in range(8)
        ]
    )


@cache
def _shifts(longest: int) -> _Checksums:
    """``_shift`` of all widths to ``longest``, one after the other."""
    return np.concatenate([_shift(width).reshape(-1) for width in range(longest + 1)])
