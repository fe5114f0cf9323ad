"""Arrow columns to cells: what ``layout_rows`` puts into commands.

Every function gives *pieces* whose concatenation is, row by row, the column's cells as RESP bulk strings.
Numbers, texts, timestamps and lists of floats are encoded a column at a time; any other type cell by cell
through protobuf. Values are those of Feast's materialization (Arrow to numpy to ``feast.type_map``).

Knows no keys, hash fields or commands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core import layout_cells
from core.errors import InvalidFeatureValue
from core.types import Dtype

Bytes: TypeAlias = NDArray[np.uint8]
# A part of every row's command: the same bytes in each, n rows of equal width, or n byte strings.
Piece: TypeAlias = "bytes | Bytes | pa.LargeBinaryArray"

BINARY = pa.large_binary()
CRLF = b"\r\n"


def fixed_width(values: NDArray[Any]) -> Bytes:
    """Numbers, one or some per row, as rows of their bytes."""
    width = values.itemsize * (values.size // max(1, len(values)))
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), width)


def place(piece: Bytes, block: Bytes, at: int) -> None:
    """Write a piece into its columns of the block; eight bytes at a time where it is a column of eight."""
    rows, width = piece.shape
    if width == 8 and piece.strides == (8, 1):
        target: NDArray[Any] = np.ndarray(rows, np.uint64, block.data, at, (block.shape[1],))
        target[:] = piece.view(np.uint64)[:, 0]
    else:
        block[:, at : at + width] = piece


def ragged(rows: Bytes, sizes: NDArray[np.int64]) -> Piece:
    """The first ``sizes[i]`` bytes of each row."""
    if len(sizes) and sizes.min() == sizes.max():
        return rows[:, : int(sizes[0])]
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    data = rows[np.arange(rows.shape[1]) < sizes[:, None]]
    return pa.Array.from_buffers(BINARY, len(sizes), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def by_length(lengths: NDArray[np.int64], text: Callable[[int], bytes]) -> pa.LargeBinaryArray:
    """``text(length)`` for every row."""
    distinct = pa.array(lengths).dictionary_encode()
    texts = pa.array([text(length) for length in distinct.dictionary.to_pylist()], BINARY)
    return texts.take(distinct.indices)


def byte_lengths(raw: pa.LargeBinaryArray) -> NDArray[np.int64]:
    return pc.binary_length(raw).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _varints(values: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.int64]]:
    """Protobuf varints as rows padded with zeros, and their lengths; a negative value takes ten bytes."""
    rest = values.view(np.uint64)
    top = int(rest.max()) if len(rest) else 0
    width = max(1, -(-top.bit_length() // 7))
    rows = np.empty((len(rest), width), np.uint8)
    sizes = np.ones(len(rest), np.int64)
    for place in range(width):
        rows[:, place] = rest & np.uint64(0x7F)
        rest = rest >> np.uint64(7)
        if place + 1 < width:
            more = rest != 0
            rows[more, place] |= 0x80
            sizes += more
    return rows, sizes


def ticks(column: pa.Array, per_second: int) -> NDArray[np.int64]:
    """A timestamp or date column without nulls in whole ticks since the epoch, rounded down.

    Raises:
        InvalidFeatureValue: a moment is so far away that 64 bits cannot hold it.
    """
    if pa.types.is_date32(column.type):
        days = column.view(pa.int32()).to_numpy(zero_copy_only=False).astype(np.int64)
        return days * (86_400 * per_second)  # type: ignore[no-any-return]
    unit = "ms" if pa.types.is_date64(column.type) else column.type.unit
    ticks: NDArray[np.int64] = column.view(pa.int64()).to_numpy(zero_copy_only=False)
    have = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[unit]
    if have >= per_second:
        return ticks // (have // per_second)
    factor = per_second // have
    if len(ticks) and max(-int(ticks.min()), int(ticks.max())) > (1 << 63) // factor - 1:
        raise InvalidFeatureValue("A timestamp is out of range.")
    return ticks * factor


def event_cells(events_us: NDArray[np.int64]) -> list[Piece]:
    """The ``_ts`` values: serialized protobuf Timestamps as bulk strings."""
    seconds, rest = np.divmod(events_us, 1_000_000)
    second_bytes, second_sizes = _varints(seconds)
    nano_bytes, nano_sizes = _varints(rest * 1000)
    second_sizes = np.where(seconds == 0, 0, second_sizes + 1)
    nano_sizes = np.where(rest == 0, 0, nano_sizes + 1)
    tagged_seconds = np.hstack([np.full((len(seconds), 1), 0x08, np.uint8), second_bytes])
    tagged_nanos = np.hstack([np.full((len(seconds), 1), 0x10, np.uint8), nano_bytes])
    sizes = second_sizes + nano_sizes
    head: Piece
    if len(sizes) and sizes.min() == sizes.max():
        head = b"$%d\r\n" % int(sizes[0])
    else:
        head = by_length(sizes, lambda size: b"$%d\r\n" % size)
    return [head, ragged(tagged_seconds, second_sizes), ragged(tagged_nanos, nano_sizes), CRLF]


def cells(column: pa.Array, dtype: Dtype) -> list[Piece]:
    """A column's cells as bulk strings."""
    if pa.types.is_null(column.type):
        return [b"$0\r\n\r\n"]
    encode = _VECTORISED.get(dtype)
    pieces = encode(column, dtype) if encode is not None else None
    return _cell_by_cell(column, dtype) if pieces is None else pieces


def _float_cells(column: pa.Array, dtype: Dtype) -> list[Piece] | None:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return None
    values = column.to_numpy(zero_copy_only=False)  # a null becomes NaN
    if dtype is Dtype.DOUBLE:
        head, values = b"$9\r\n\x29", values.astype("<f8", copy=False)
    else:
        with np.errstate(over="ignore"):
            head, values = b"$5\r\n\x35", values.astype("<f8", copy=False).astype("<f4")
    missing = np.isnan(values)
    if not missing.any():
        return [head, fixed_width(values), CRLF]
    rows = np.empty((len(values), len(head) + values.itemsize), np.uint8)
    rows[:] = np.frombuffer(head + bytes(values.itemsize), np.uint8)
    place(fixed_width(values), rows, len(head))
    rows[missing, 1] = ord("0")
    return [ragged(rows, np.where(missing, 4, rows.shape[1])), CRLF]


def whole_numbers(column: pa.Array, dtype: Dtype) -> NDArray[np.int64]:
    """A numeric column without nulls as integers; a fraction is dropped, as Feast does.

    Raises:
        InvalidFeatureValue: a value is out of the type's range.
    """
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise InvalidFeatureValue(f"{column.type} is no number.")
    values = column.to_numpy(zero_copy_only=False)
    low, high = (-(2.0**31), 2.0**31) if dtype is Dtype.INT32 else (-(2.0**63), 2.0**63)
    if len(values):
        if values.dtype.kind == "f":
            values = np.trunc(values)
            fits = bool(np.isfinite(values).all()) and values.min() >= low and values.max() < high
        else:
            fits = int(low) <= int(values.min()) and int(values.max()) < int(high)
        if not fits:
            raise InvalidFeatureValue("A value is out of range.")
    return values.astype(np.int64, copy=False)  # type: ignore[no-any-return]


def _integer_cells(column: pa.Array, dtype: Dtype) -> list[Piece] | None:
    if not (
        pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
        or pa.types.is_boolean(column.type)
    ):
        return None
    missing = column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    if missing.any():
        zero = pa.scalar(0, pa.int8()).cast(column.type)
        column = pc.if_else(pa.array(missing), zero, column)
    tag = 0x18 if dtype is Dtype.INT32 else 0x20
    return _varint_cells(tag, whole_numbers(column, dtype), missing)


def _varint_cells(
    tag: int, values: NDArray[np.int64], missing: NDArray[np.bool_] | None = None
) -> list[Piece]:
    varints, sizes = _varints(values)
    sizes = sizes + 1
    # "$n\r\n" or, for a varint of nine bytes and more, "$nn\r\n"; then the tag and the varint.
    wide = 1 if varints.shape[1] >= 9 else 0
    rows = np.empty((len(values), 5 + wide + varints.shape[1]), np.uint8)
    rows[:] = np.frombuffer(b"$" + b"0" * wide + b"0\r\n" + bytes([tag]) + bytes(varints.shape[1]), np.uint8)
    rows[:, 1 + wide] += (sizes % 10).astype(np.uint8)
    rows[:, 5 + wide :] = varints
    if not wide:
        taken = 4 + sizes
        if missing is not None and missing.any():
            rows[missing, 1] = ord("0")
            taken[missing] = 4
        return [ragged(rows, taken), CRLF]
    rows[:, 1] += (sizes // 10).astype(np.uint8)
    short = sizes < 10
    # A length of one digit stands one byte further right: move "$" there and start the row at it.
    rows[short, 1] = ord("$")
    starts, taken = short.astype(np.int64), 5 + sizes
    if missing is not None and missing.any():
        rows[missing, 2] = ord("0")
        taken[missing] = 5
    places = np.arange(rows.shape[1])
    data = rows[(places >= starts[:, None]) & (places < taken[:, None])]
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum(taken - starts, out=offsets[1:])
    cells = pa.Array.from_buffers(BINARY, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    return [cells, CRLF]


def _bool_cells(column: pa.Array, _: Dtype) -> list[Piece] | None:
    if not pa.types.is_boolean(column.type):
        return None
    rows = np.empty((len(column), 6), np.uint8)
    rows[:] = np.frombuffer(b"$2\r\n\x38\x00", np.uint8)
    rows[:, 5] = column.fill_null(False).cast(pa.uint8()).to_numpy(zero_copy_only=False)
    if not column.null_count:
        return [rows, CRLF]
    missing = column.is_null().to_numpy(zero_copy_only=False)
    rows[missing, 1] = ord("0")
    return [ragged(rows, np.where(missing, 4, 6)), CRLF]


def epoch_seconds(column: pa.Array) -> NDArray[np.int64]:
    """Seconds since the epoch of timestamps, dates or numbers; the stand-in for NaT where it is null."""
    missing = column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        width = pa.int32() if pa.types.is_date32(column.type) else pa.int64()
        filled = column.view(width).fill_null(0).view(column.type) if column.null_count else column
        values = ticks(filled, 1)
    else:
        zero = pa.scalar(0, pa.int8()).cast(column.type)
        filled = pc.if_else(pa.array(missing), zero, column) if missing.any() else column
        values = whole_numbers(filled, Dtype.INT64)
    return np.where(missing, np.int64(layout_cells.NULL_TIMESTAMP), values) if missing.any() else values


def _timestamp_value_cells(column: pa.Array, _: Dtype) -> list[Piece] | None:
    kind = column.type
    if not (
        pa.types.is_timestamp(kind)
        or pa.types.is_date(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
    ):
        return None
    return _varint_cells(0x40, epoch_seconds(column))


def raw_bytes(column: pa.Array, dtype: Dtype) -> pa.LargeBinaryArray | None:
    """A text or binary column as large_binary; None where it is another, or not of the feature's kind."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        if dtype in _BINARY_DTYPES:
            raise InvalidFeatureValue("A text is no bytes.")
        return column.cast(pa.large_string()).cast(BINARY)
    if dtype in _BINARY_DTYPES and (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        return column.cast(BINARY)
    return None


_BINARY_DTYPES = frozenset({Dtype.BYTES, Dtype.PDF_BYTES, Dtype.IMAGE_BYTES})
_TEXT_TAGS: dict[Dtype, bytes] = {
    Dtype.BYTES: b"\x0a",
    Dtype.PDF_BYTES: b"\x0a",
    Dtype.IMAGE_BYTES: b"\x0a",
    Dtype.STRING: b"\x12",
    Dtype.UUID: b"\xa2\x02",
    Dtype.TIME_UUID: b"\xaa\x02",
    Dtype.DECIMAL: b"\xe2\x02",
}


def _text_cells(column: pa.Array, dtype: Dtype) -> list[Piece] | None:
    raw = raw_bytes(column, dtype)
    return None if raw is None else _length_prefixed_cells(_TEXT_TAGS[dtype], raw)


def _length_prefixed_cells(tag: bytes, raw: pa.LargeBinaryArray) -> list[Piece]:
    """Cells of one length-prefixed protobuf field; a null is an empty cell."""
    sizes = byte_lengths(raw.fill_null(b""))
    if raw.null_count:
        sizes = np.where(raw.is_null().to_numpy(zero_copy_only=False), -1, sizes)
        raw = raw.fill_null(b"")

    def head(length: int) -> bytes:
        if length < 0:
            return b"$0\r\n"
        prefix = tag + layout_cells.varint(length)
        return b"$%d\r\n%b" % (len(prefix) + length, prefix)

    return [by_length(sizes, head), raw, CRLF]


_FLOAT_LISTS: dict[Dtype, tuple[bytes, Any]] = {
    Dtype.DOUBLE_LIST: (b"\x7a", np.dtype("<f8")),
    Dtype.FLOAT_LIST: (b"\x82\x01", np.dtype("<f4")),
}


def _float_list_cells(column: pa.Array, dtype: Dtype) -> list[Piece] | None:
    """Lists of floats, such as embeddings: their packed bytes are Arrow's own buffer."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.list_(kind.value_type))
    elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    if not pa.types.is_floating(kind.value_type):
        return None
    tag, item = _FLOAT_LISTS[dtype]
    missing = column.is_null().to_numpy(zero_copy_only=False)
    counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    with np.errstate(over="ignore"):
        # flatten() leaves out what lies under null lists; a null element becomes NaN, as in Feast.
        values = (
            column.flatten().to_numpy(zero_copy_only=False).astype("<f8", copy=False).astype(item, copy=False)
        )
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts * item.itemsize, out=offsets[1:])
    data = pa.py_buffer(np.ascontiguousarray(values))
    raw = pa.Array.from_buffers(BINARY, len(counts), [None, pa.py_buffer(offsets), data])

    def head(count: int) -> bytes:
        if count < 0:
            return b"$0\r\n"
        size = count * item.itemsize
        packed = b"\x0a" + layout_cells.varint(size) if count else b""
        prefix = tag + layout_cells.varint(len(packed) + size) + packed
        return b"$%d\r\n%b" % (len(prefix) + size, prefix)

    return [by_length(np.where(missing, -1, counts), head), raw, CRLF]


_VECTORISED: dict[Dtype, Callable[[pa.Array, Dtype], list[Piece] | None]] = {
    Dtype.DOUBLE: _float_cells,
    Dtype.FLOAT: _float_cells,
    Dtype.INT32: _integer_cells,
    Dtype.INT64: _integer_cells,
    Dtype.BOOL: _bool_cells,
    Dtype.UNIX_TIMESTAMP: _timestamp_value_cells,
    Dtype.DOUBLE_LIST: _float_list_cells,
    Dtype.FLOAT_LIST: _float_list_cells,
    **dict.fromkeys(_TEXT_TAGS, _text_cells),
}


def _cell_by_cell(column: pa.Array, dtype: Dtype) -> list[Piece]:
    cells = [layout_cells.encode_value(value, dtype) for value in feast_values(column, dtype)]
    raw = pa.array(cells, BINARY)
    return [by_length(byte_lengths(raw), lambda size: b"$%d\r\n" % size), raw, CRLF]


def feast_values(column: pa.Array, dtype: Dtype | None = None) -> list[Any]:
    """The Python values that Feast's materialization sees: numpy's, but for a zone or digits lost."""
    whole = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
    if dtype is Dtype.ZONED_TIMESTAMP or (whole and column.null_count):
        return column.to_pylist()  # type: ignore[no-any-return]
    return list(column.to_numpy(zero_copy_only=False))
