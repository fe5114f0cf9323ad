"""Rows as serialised hashes: what RESTORE takes, and what DUMP would have given after HSET.

A small hash lies in Redis as one *listpack*, its fields and values one after the other; RESTORE of a key
that is not there yet puts it in place as it is, where HSET finds and appends field by field. Source of the
bytes: ``listpack.c``, ``rdb.c`` and ``cluster.c`` of Redis 7 and Valkey 7 to 9.

Knows no connection, and not whether the server at hand takes these bytes: ``core.restore`` asks it.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core.checksum import crc64
from core.layout_columns import CRLF, Cells, Piece, by_length, fixed_width
from core.layout_rows import EncodedRows

HASH_LISTPACK = 16  # RDB_TYPE_HASH_LISTPACK
# The longest field or value of a listpack by Redis's default, ``hash-max-listpack-value``.
LONGEST = 64

_HEADER_BYTES = 6
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_INTEGER_WIDTHS = ((0xF1, 2), (0xF2, 3), (0xF3, 4), (0xF4, 8))
_DIGITS = b"-0123456789"


def storable(rows: EncodedRows) -> NDArray[np.bool_]:
    """Which rows ``dumps`` can express: those whose fields and values are short, and texts.

    A value that reads as a number lies in a listpack as a number, and is left to Redis: of all of Feast's
    only a FLOAT can, one in some hundred thousand.
    """
    fits = np.ones(len(rows), bool)
    names = [name for name, _ in rows.cells]
    if not names or len(set(names)) < len(names) or max(map(len, names)) > LONGEST:
        return np.zeros(len(rows), bool)
    for _, cells in rows.cells:
        if cells.longest > LONGEST:
            fits &= cells.sizes() <= LONGEST
        if isinstance(cells.head, bytes) and cells.body and (cells.head or b"0")[0] in _DIGITS:
            fits &= ~_digits(cells.body[0], len(rows), signed=not cells.head)
    return fits


def dumps(rows: EncodedRows, rdb_version: int) -> list[Piece]:
    """Every row as one bulk string, its hash as DUMP would give it; the rows must be ``storable``."""
    entries: list[Piece] = []
    total: NDArray[np.int64] | int = _HEADER_BYTES + 1
    for name, cells in rows.cells:
        field = _entry(name)
        entries += [field, *cells.framed(_head, _tail)]
        total = total + len(field) + _entry_sizes(cells)
    count = (2 * len(rows.cells)).to_bytes(2, "little")

    def start(size: int) -> bytes:
        return bytes([HASH_LISTPACK]) + _rdb_length(size) + size.to_bytes(4, "little") + count

    end = b"\xff" + rdb_version.to_bytes(2, "little")

    def bulk(size: int) -> bytes:
        return b"$%d\r\n" % (len(start(size)) + size - _HEADER_BYTES - 1 + len(end) + 8)

    if isinstance(total, int):
        bulk_head: Piece = bulk(total)
        entries.insert(0, start(total))
    else:
        bulk_head = by_length(total, bulk)
        entries.insert(0, by_length(total, start))
    entries.append(end)
    checksums = crc64(len(rows), entries)
    return [bulk_head, *entries, fixed_width(checksums.astype("<u8", copy=False)), CRLF]


def _entry(value: bytes) -> bytes:
    """A listpack's entry: a text, or a number where the text is one."""
    if not _INTEGER.fullmatch(value) or not -(1 << 63) <= int(value) < 1 << 63:
        return _head(len(value)) + value + _tail(len(value))
    number = int(value)
    if 0 <= number < 128:
        body = bytes([number])
    elif -4096 <= number < 4096:
        body = bytes([0xC0 | (number & 0x1FFF) >> 8, number & 0xFF])
    else:
        code, width = next((c, w) for c, w in _INTEGER_WIDTHS if -1 << 8 * w - 1 <= number < 1 << 8 * w - 1)
        body = bytes([code]) + number.to_bytes(width, "little", signed=True)
    return body + bytes([len(body)])


def _head(size: int) -> bytes:
    """What precedes a text of at most ``LONGEST`` bytes."""
    return bytes([0x80 | size]) if size < 64 else bytes([0xE0, size])


def _tail(size: int) -> bytes:
    """What follows a text of at most ``LONGEST`` bytes: its entry's size, for those who read backwards."""
    return bytes([len(_head(size)) + size])


def _entry_sizes(cells: Cells) -> NDArray[np.int64] | int:
    sizes = cells.sizes()
    if isinstance(sizes, int):
        return sizes + 2 + (sizes > 63)
    return sizes + 2 + (sizes > 63)


def _rdb_length(size: int) -> bytes:
    if size < 1 << 6:
        return bytes([size])
    if size < 1 << 14:
        return (0x4000 | size).to_bytes(2, "big")
    return b"\x80" + size.to_bytes(4, "big")


def _digits(piece: Piece, rows: int, *, signed: bool) -> NDArray[np.bool_]:
    """Where a piece has nothing but digits, or a sign and digits."""
    pattern = "^-?[0-9]+$" if signed else "^[0-9]+$"
    if isinstance(piece, bytes):
        return np.full(rows, bool(re.match(pattern.encode(), piece)))
    if isinstance(piece, pa.LargeBinaryArray):
        found = pc.match_substring_regex(piece, pattern)
        return found.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    digits = piece - np.uint8(ord("0")) < 10
    if signed:
        digits[:, :1] |= piece[:, :1] == ord("-")
    return np.asarray(digits.all(axis=1) & (piece.shape[1] > 0))
