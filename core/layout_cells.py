"""Cells: the bytes of one feature value or one event timestamp, by hand and a column at a time.

One part of ``core.layout``. A cell is a serialized ``feast.types.Value`` (empty for a null, absent
where no row was written) or, in the field ``_ts:view``, a ``google.protobuf.Timestamp``. Numbers, texts and
timestamps are handled here; other types go through protobuf, in ``layout_values`` and ``layout_messages``.
ADR 0020 has what that gains.

Knows no keys, no hash fields and no statuses.
"""

from __future__ import annotations

import math
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core import layout_messages, layout_values
from core.errors import CorruptCell, InvalidFeatureValue
from core.types import Dtype

Cell = bytes | None

NULL_TIMESTAMP = layout_messages.NULL_TIMESTAMP

_INT32 = range(-(1 << 31), 1 << 31)
_INT64 = range(-(1 << 63), 1 << 63)


def varint(value: int) -> bytes:
    """Protobuf's varint of a signed 64-bit integer: a negative one takes ten bytes."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The unsigned varint at ``at`` and the position after it."""
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


# Encoding


def encode_timestamp(nanoseconds: int) -> bytes:
    """A protobuf Timestamp. ``nanoseconds`` since the epoch, UTC.

    Feast itself stores no more than microseconds (it goes through ``datetime``); a writer that wants its
    bytes rounds down to them first, as ``layout_rows`` does.
    """
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    head = b"\x08" + varint(seconds) if seconds else b""
    return head + b"\x10" + varint(rest) if rest else head


def encode_value(value: Any, dtype: Dtype) -> bytes:
    """The cell that Feast stores for a value of a feature of that type; empty for a missing one.

    Missing are None, NaN, NaT and pandas.NA. A missing timestamp other than None is stored as the number
    that stands for NaT, as Feast does; both decode to None.

    Raises:
        InvalidFeatureValue: ``value`` cannot be of that type.
    """
    kind = type(value)
    if dtype is Dtype.DOUBLE and kind is float:
        return b"" if math.isnan(value) else _DOUBLE.pack(0x29, value)
    if dtype is Dtype.STRING and kind is str:
        try:
            raw: bytes = value.encode()
        except UnicodeEncodeError as exc:
            raise InvalidFeatureValue("A text with lone surrogates cannot be stored.") from exc
        return b"\x12" + varint(len(raw)) + raw
    if kind is int and dtype in _INTEGERS and value in _INTEGERS[dtype][1]:
        return bytes((_INTEGERS[dtype][0],)) + varint(value)
    if dtype is Dtype.BOOL and kind is bool:
        return b"\x38\x01" if value else b"\x38\x00"
    if dtype is Dtype.UNIX_TIMESTAMP and value is not None and layout_values.is_missing(value):
        return _NULL_TIMESTAMP_CELL
    return layout_values.encode(value, dtype)


_DOUBLE = struct.Struct("<Bd")
_unpack_double = _DOUBLE.unpack
_FLOAT = struct.Struct("<Bf")
_INTEGERS = {Dtype.INT32: (0x18, _INT32), Dtype.INT64: (0x20, _INT64)}
_NULL_TIMESTAMP_CELL = b"\x40" + varint(NULL_TIMESTAMP)


# Decoding


def decode_timestamp(cell: bytes) -> int:
    """Nanoseconds since the epoch, UTC.

    Raises:
        CorruptCell: the cell is no Timestamp.
    """
    seconds = rest = at = 0
    try:
        while at < len(cell):
            tag = cell[at]
            value, at = _read_varint(cell, at + 1)
            if tag == 0x08:
                seconds = value - (1 << 64) if value >> 63 else value
            elif tag == 0x10:
                rest = value
    except IndexError:
        raise CorruptCell(
            "A stored event timestamp is no protobuf Timestamp.", hint=layout_messages.FOREIGN_WRITER
        ) from None
    return seconds * 1_000_000_000 + rest


def decode_timestamps(cells: Sequence[Cell]) -> list[int | None]:
    """``decode_timestamp`` by column; None where there is no row (Redis has no such field).

    Raises:
        CorruptCell: a cell is no Timestamp.
    """
    found = _usual_timestamps(cells) if _mostly_different(cells) else None
    return [_EVENTS[cell] for cell in cells] if found is None else found


def decode_value(cell: Cell, dtype: Dtype) -> Any:
    """The Python value of one cell, as Feast gives it; None for an empty or absent one.

    A cell of another type than the declared one decodes by the type it was stored with, as in Feast.

    Raises:
        CorruptCell: the cell is no Feast value.
    """
    return decode_column((cell,), dtype)[0]


def decode_column(cells: Sequence[Cell], dtype: Dtype) -> list[Any]:
    """``decode_value`` by column. Lists, sets and maps in the answer belong to the caller alone.

    Raises:
        CorruptCell: a cell is no Feast value.
    """
    if len(cells) == 1:  # the read of one entity: no comprehension, no dispatch for the commonest types
        cell = cells[0]
        if cell and len(cell) == 9 and cell[0] == 0x29:
            return [_unpack_double(cell)[1]]
        if dtype not in _UUIDS and dtype is not Dtype.FLOAT:
            return [_VALUES[cell]]
    decode = _BY_DTYPE.get(dtype)
    return [_VALUES[cell] for cell in cells] if decode is None else decode(cells, _VALUES)


def decode_json_column(cells: Sequence[Cell], dtype: Dtype) -> list[Any]:
    """The column as the JSON values that ``feast serve`` answers with (see ``layout_messages.to_json``).

    Raises:
        CorruptCell: a cell is no Feast value.
    """
    if dtype in _FLOATS:
        return _finite(_BY_DTYPE[dtype](cells, _JSON_VALUES))
    if dtype in _INTEGERS:
        return _BY_DTYPE[dtype](cells, _JSON_VALUES)
    return [_JSON_VALUES[cell] for cell in cells]


def json_value(value: Any, dtype: Dtype) -> Any:
    """The JSON value that ``feast serve`` answers with for a Python value of that type.

    Raises:
        InvalidFeatureValue: ``value`` cannot be of that type.
    """
    return decode_json_column((encode_value(value, dtype),), dtype)[0]


def json_column(values: Sequence[Any], dtype: Dtype) -> list[Any]:
    """``json_value`` by column.

    Raises:
        InvalidFeatureValue: a value cannot be of that type.
    """
    same = _SAME_IN_JSON.get(dtype)
    return [value if type(value) is same or value is None else json_value(value, dtype) for value in values]


_SAME_IN_JSON: Mapping[Dtype, type] = {Dtype.STRING: str, Dtype.BOOL: bool}


class _Memo(dict[Cell, Any]):
    """Decoded cells by their bytes: real columns repeat few values. Holds immutable values only."""

    LIMIT, LONGEST = 20_000, 64

    def __init__(self, decode: Callable[[bytes], Any], empty: Any = None) -> None:
        self._decode = decode
        self._empty = {None: None, b"": empty}
        super().__init__(self._empty)

    def __missing__(self, cell: bytes) -> Any:
        value = self._decode(cell)
        if len(cell) <= self.LONGEST and not isinstance(value, list | dict | set):
            if len(self) >= self.LIMIT:
                self.clear()
                self.update(self._empty)
            self[cell] = value
        return value


def _decode(cell: bytes) -> Any:
    """The Python value of a cell by its own tag; the commonest types by hand."""
    tag = cell[0]
    try:
        if tag == 0x12:
            size, at = _read_varint(cell, 1)
            if len(cell) == at + size:
                return cell[at:].decode()
        elif tag == 0x20:
            value, at = _read_varint(cell, 1)
            if len(cell) == at:
                return value - (1 << 64) if value >> 63 else value
    except (IndexError, UnicodeDecodeError):
        pass  # protobuf says what is wrong with it
    return layout_messages.to_python(layout_messages.parse(cell))


_VALUES = _Memo(_decode)
_JSON_VALUES = _Memo(lambda cell: layout_messages.to_json(layout_messages.parse(cell)))
# An event at the epoch itself is an empty message.
_EVENTS = _Memo(decode_timestamp, empty=0)

_Words = NDArray[Any]  # of numpy.uint64
_MORE = 0x8080_8080_8080_8080  # the bits that say that a varint goes on

# From so many cells on, numpy's fixed cost is less than what it saves.
_SOME, _MANY = 16, 256


def _float_decoder(form: struct.Struct, tag: int) -> Callable[[Sequence[Cell], _Memo], list[Any]]:
    """A decoder of columns declared DOUBLE or FLOAT: cells of ``form``, whose first byte is ``tag``."""
    size, unpack = form.size, form.unpack
    row = np.dtype([("tag", "u1"), ("value", f"<f{size - 1}")])
    tags, filler = bytes([tag]), bytes([tag]) + bytes(size - 1)

    def one(cell: Cell, others: _Memo) -> Any:
        if cell and len(cell) == size and cell[0] == tag:
            return unpack(cell)[1]
        return others[cell]

    def column(cells: Sequence[Cell], others: _Memo) -> list[Any]:
        if len(cells) < _SOME:
            return [one(cell, others) for cell in cells]
        gaps: list[int] = []
        try:
            joined = b"".join(cells)  # type: ignore[arg-type]
        except TypeError:  # an absent cell
            joined = b""
        if len(joined) != size * len(cells):
            gaps = _gaps(cells)
            joined = b"".join([cell or filler for cell in cells])
        # Every cell starts where its predecessor ends, so if each place holds the tag, each has this size.
        if len(joined) != size * len(cells) or joined[::size] != tags * len(cells):
            return [one(cell, others) for cell in cells]
        values: list[Any] = np.frombuffer(joined, row)["value"].tolist()
        for position in gaps:
            values[position] = None
        return values

    return column


def _integer_decoder(tag: int) -> Callable[[Sequence[Cell], _Memo], list[Any]]:
    """A decoder of columns declared INT32 or INT64, whose cells begin with ``tag``."""

    def column(cells: Sequence[Cell], others: _Memo) -> list[Any]:
        found = _integers(cells, tag) if _mostly_different(cells) else None
        return [others[cell] for cell in cells] if found is None else found

    return column


def _mostly_different(cells: Sequence[Cell]) -> bool:
    """Whether a column is long and varied enough for numpy to beat the memo."""
    return len(cells) >= _MANY and len(set(cells)) * 4 > len(cells)


def _gaps(cells: Sequence[Cell]) -> list[int]:
    """The positions of empty and absent cells."""
    return [position for position, cell in enumerate(cells) if not cell]


def _words(cells: Sequence[Cell], gaps: list[int]) -> tuple[_Words, _Words, NDArray[np.int64]]:
    """The first sixteen bytes of every cell, padded with zeros, as two numbers, and the cells' sizes."""
    filled = [cell or b"" for cell in cells] if gaps else cells
    words = np.array(filled, "S16").view("<u8").reshape(-1, 2)
    sizes = np.fromiter(map(len, filled), np.int64, len(cells))  # type: ignore[arg-type]
    return words[:, 0].copy(), words[:, 1].copy(), sizes


def _sevens(words: _Words) -> _Words:
    """The low seven bits of each byte, put together: a varint of up to eight bytes."""
    words = words & 0x7F7F_7F7F_7F7F_7F7F
    words = words & 0x007F_007F_007F_007F | (words & 0x7F00_7F00_7F00_7F00) >> 1
    words = words & 0x0000_3FFF_0000_3FFF | (words & 0x3FFF_0000_3FFF_0000) >> 2
    return words & 0x0000_0000_0FFF_FFFF | (words & 0x0FFF_FFFF_0000_0000) >> 4


def _integers(cells: Sequence[Cell], tag: int) -> list[Any] | None:
    """The integers of cells that are all of that tag or empty; None where some are something else."""
    gaps = _gaps(cells)
    first, second, sizes = _words(cells, gaps)
    more = np.bitwise_count(first & _MORE >> 8 << 8) + np.bitwise_count(second & _MORE)
    fitting = (first & 0xFF == tag) & (sizes == more + 2)
    if np.count_nonzero(fitting) != len(cells) - len(gaps):
        return None
    # The zeros that pad a varint add nothing to its value.
    values: list[Any] = (_sevens(first >> 8) | _sevens(second) << 49).view(np.int64).tolist()
    for position in gaps:
        values[position] = None
    return values


def _usual_timestamps(cells: Sequence[Cell]) -> list[int | None] | None:
    """Timestamps whose seconds take five bytes (the years 1978 to 3058); None where some are others."""
    gaps = _gaps(cells)
    if gaps and b"" in cells:
        return None
    first, second, sizes = _words(cells, gaps)
    nanos = first >> 48 & 0xFF == 0x10
    more = np.bitwise_count(first >> 56 & _MORE) + np.bitwise_count(second & _MORE)
    usual = (first & 0x0000_8080_8080_80FF == 0x0000_0080_8080_8008) & (sizes == np.where(nanos, 8 + more, 6))
    if np.count_nonzero(usual) != len(cells) - len(gaps):
        return None
    seconds = _sevens(first >> 8 & 0xFF_FFFF_FFFF)
    rest = first >> 56 & 0x7F | _sevens(second) << 7
    events: list[int | None] = (seconds.view(np.int64) * 1_000_000_000 + rest.view(np.int64)).tolist()
    for position in gaps:
        events[position] = None
    return events


def _finite(values: list[Any]) -> list[Any]:
    """Floats as JSON: the numbers that JSON lacks become texts."""
    try:
        if math.isfinite(sum(values)):
            return values
    except TypeError:  # a gap, or a cell of another type
        pass
    return [layout_messages.float_json(value) if type(value) is float else value for value in values]


def _uuid_decoder(convert: Callable[[Any], Any]) -> Callable[[Sequence[Cell], _Memo], list[Any]]:
    return lambda cells, others: [convert(others[cell]) for cell in cells]


def _as_uuid(value: Any) -> Any:
    """Feast once stored UUIDs as texts; the declared type tells them."""
    try:
        return uuid.UUID(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _uuids_in(collection: type[list[Any]] | type[set[Any]]) -> Callable[[Any], Any]:
    return lambda value: collection(map(_as_uuid, value)) if type(value) is collection else value


_Decoder = Callable[[Sequence[Cell], _Memo], list[Any]]
_UUIDS: Mapping[Dtype, _Decoder] = {
    Dtype.UUID: _uuid_decoder(_as_uuid),
    Dtype.TIME_UUID: _uuid_decoder(_as_uuid),
    Dtype.UUID_LIST: _uuid_decoder(_uuids_in(list)),
    Dtype.TIME_UUID_LIST: _uuid_decoder(_uuids_in(list)),
    Dtype.UUID_SET: _uuid_decoder(_uuids_in(set)),
    Dtype.TIME_UUID_SET: _uuid_decoder(_uuids_in(set)),
}
_FLOATS = frozenset({Dtype.DOUBLE, Dtype.FLOAT})
_BY_DTYPE: Mapping[Dtype, _Decoder] = {
    Dtype.DOUBLE: _float_decoder(_DOUBLE, 0x29),
    Dtype.FLOAT: _float_decoder(_FLOAT, 0x35),
    Dtype.INT32: _integer_decoder(0x18),
    Dtype.INT64: _integer_decoder(0x20),
    **_UUIDS,
}
