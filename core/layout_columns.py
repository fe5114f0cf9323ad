"""Arrow columns to cells: what ``layout_rows`` puts into commands and ``layout_dump`` into listpacks.

Numbers, texts, timestamps and lists of floats are encoded a column at a time; any other type cell by cell
through protobuf. Values are those of Feast's materialization (Arrow to numpy to ``feast.type_map``).
``Cells`` holds them as *pieces*, whose concatenation is, row by row, what they stand for.

Knows no keys, hash fields or commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def by_length(lengths: NDArray[np.int64], text: Callable[[int], bytes]) -> Piece:
    """``text(length)`` for every row."""
    distinct = pa.array(lengths).dictionary_encode()
    texts = [text(length) for length in distinct.dictionary.to_pylist()]
    if len(texts) == 1:
        return texts[0]
    if texts and len(set(map(len, texts))) == 1 and texts[0]:
        table = np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), -1)
        return table[distinct.indices.to_numpy()]
    return pa.array(texts, BINARY).take(distinct.indices)


def filtered(piece: Piece, keep: NDArray[np.bool_]) -> Piece:
    """The piece of the rows where ``keep`` is true."""
    if isinstance(piece, bytes):
        return piece
    return piece[keep] if isinstance(piece, np.ndarray) else piece.filter(pa.array(keep))


@dataclass(frozen=True, slots=True)
class Cells:
    """A column's cells: in each row a head, then ``length`` bytes of the body.

    Attributes:
        lengths: bytes of each row's body, or one number where they are alike; -1 where the cell is empty.
        body: pieces.
        head: what precedes a body, where it depends on its length a function of that.
    """

    lengths: NDArray[np.int64] | int
    body: tuple[Piece, ...] = ()
    head: bytes | Callable[[int], bytes] = b""

    @property
    def longest(self) -> int:
        """The largest cell's size in bytes."""
        if isinstance(self.lengths, int):
            return self._size(self.lengths)
        return self._size(int(self.lengths.max())) if len(self.lengths) else 0

    def sizes(self) -> NDArray[np.int64] | int:
        """Bytes of each row's cell, or one number where they are alike."""
        if isinstance(self.lengths, int):
            return self._size(self.lengths)
        if isinstance(self.head, bytes):
            return np.where(self.lengths < 0, 0, self.lengths + len(self.head))
        distinct, places = np.unique(self.lengths, return_inverse=True)
        sizes = np.array([self._size(length) for length in distinct.tolist()], np.int64)
        return sizes[places]

    def framed(self, before: Callable[[int], bytes], after: Callable[[int], bytes] | bytes) -> list[Piece]:
        """Each cell between what ``before`` and ``after`` make of its size."""

        def start(length: int) -> bytes:
            return before(self._size(length)) + self._head(length)

        def end(length: int) -> bytes:
            return after if isinstance(after, bytes) else after(self._size(length))

        if isinstance(self.lengths, int):
            return [start(self.lengths), *self.body, end(self.lengths)]
        last = after if isinstance(after, bytes) else by_length(self.lengths, end)
        return [by_length(self.lengths, start), *self.body, last]

    def filter(self, keep: NDArray[np.bool_]) -> Cells:
        """The rows where ``keep`` is true."""
        lengths = self.lengths if isinstance(self.lengths, int) else self.lengths[keep]
        return Cells(lengths, tuple(filtered(piece, keep) for piece in self.body), self.head)

    def _size(self, length: int) -> int:
        return len(self._head(length)) + max(length, 0)

    def _head(self, length: int) -> bytes:
        if length < 0:
            return b""
        return self.head if isinstance(self.head, bytes) else self.head(length)


def _uniform(lengths: NDArray[np.int64]) -> NDArray[np.int64] | int:
    """One number for lengths that are all alike."""
    return int(lengths[0]) if len(lengths) and lengths.min() == lengths.max() else lengths


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


def event_cells(events_us: NDArray[np.int64]) -> Cells:
    """The ``_ts`` values: serialized protobuf Timestamps."""
    seconds, rest = np.divmod(events_us, 1_000_000)
    second_bytes, second_sizes = _varints(seconds)
    nano_bytes, nano_sizes = _varints(rest * 1000)
    second_sizes = np.where(seconds == 0, 0, second_sizes + 1)
    nano_sizes = np.where(rest == 0, 0, nano_sizes + 1)
    tagged_seconds = np.hstack([np.full((len(seconds), 1), 0x08, np.uint8), second_bytes])
    tagged_nanos = np.hstack([np.full((len(seconds), 1), 0x10, np.uint8), nano_bytes])
    body = (ragged(tagged_seconds, second_sizes), ragged(tagged_nanos, nano_sizes))
    return Cells(_uniform(second_sizes + nano_sizes), body)


def cells(column: pa.Array, dtype: Dtype) -> Cells:
    """A column's cells."""
    if pa.types.is_null(column.type):
        return Cells(-1)
    encode = _VECTORISED.get(dtype)
    found = encode(column, dtype) if encode is not None else None
    return _cell_by_cell(column, dtype) if found is None else found


def _float_cells(column: pa.Array, dtype: Dtype) -> Cells | None:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return None
    values = column.to_numpy(zero_copy_only=False)  # a null becomes NaN
    if dtype is Dtype.DOUBLE:
        head, values = b"\x29", values.astype("<f8", copy=False)
    else:
        with np.errstate(over="ignore"):
            head, values = b"\x35", values.astype("<f8", copy=False).astype("<f4")
    return _fixed_width_cells(head, fixed_width(values), np.isnan(values))


def _fixed_width_cells(head: bytes, rows: Bytes, missing: NDArray[np.bool_]) -> Cells:
    width = rows.shape[1]
    if not missing.any():
        return Cells(width, (rows,), head)
    body = ragged(rows, np.where(missing, 0, width))
    return Cells(_uniform(np.where(missing, -1, width)), (body,), head)


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


def _integer_cells(column: pa.Array, dtype: Dtype) -> Cells | None:
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


def _varint_cells(tag: int, values: NDArray[np.int64], missing: NDArray[np.bool_] | None = None) -> Cells:
    varints, sizes = _varints(values)
    head = bytes([tag])
    if missing is None or not missing.any():
        return Cells(_uniform(sizes), (ragged(varints, sizes),), head)
    body = ragged(varints, np.where(missing, 0, sizes))
    return Cells(_uniform(np.where(missing, -1, sizes)), (body,), head)


def _bool_cells(column: pa.Array, _: Dtype) -> Cells | None:
    if not pa.types.is_boolean(column.type):
        return None
    values = column.fill_null(False).cast(pa.uint8()).to_numpy(zero_copy_only=False)
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return _fixed_width_cells(b"\x38", fixed_width(values), missing)


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


def _timestamp_value_cells(column: pa.Array, _: Dtype) -> Cells | None:
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


def _text_cells(column: pa.Array, dtype: Dtype) -> Cells | None:
    raw = raw_bytes(column, dtype)
    if raw is None:
        return None
    tag = _TEXT_TAGS[dtype]
    lengths = byte_lengths(raw.fill_null(b""))
    if raw.null_count:
        lengths = np.where(raw.is_null().to_numpy(zero_copy_only=False), -1, lengths)
    return Cells(_uniform(lengths), (raw.fill_null(b""),), lambda length: tag + layout_cells.varint(length))


_FLOAT_LISTS: dict[Dtype, tuple[bytes, Any]] = {
    Dtype.DOUBLE_LIST: (b"\x7a", np.dtype("<f8")),
    Dtype.FLOAT_LIST: (b"\x82\x01", np.dtype("<f4")),
}


def _float_list_cells(column: pa.Array, dtype: Dtype) -> Cells | None:
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

    def head(size: int) -> bytes:
        packed = b"\x0a" + layout_cells.varint(size) if size else b""
        return tag + layout_cells.varint(len(packed) + size) + packed

    return Cells(_uniform(np.where(missing, -1, counts * item.itemsize)), (raw,), head)


_VECTORISED: dict[Dtype, Callable[[pa.Array, Dtype], Cells | None]] = {
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


def _cell_by_cell(column: pa.Array, dtype: Dtype) -> Cells:
    found = [layout_cells.encode_value(value, dtype) for value in feast_values(column, dtype)]
    raw = pa.array(found, BINARY)
    return Cells(_uniform(byte_lengths(raw)), (raw,))


def feast_values(column: pa.Array, dtype: Dtype | None = None) -> list[Any]:
    """The Python values that Feast's materialization sees: numpy's, but for a zone or digits lost."""
    whole = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
    if dtype is Dtype.ZONED_TIMESTAMP or (whole and column.null_count):
        return column.to_pylist()  # type: ignore[no-any-return]
    return list(column.to_numpy(zero_copy_only=False))
