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
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import orjson
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
    head = b"\x08" + _second(seconds) if seconds else b""
    return head + b"\x10" + varint(rest) if rest else head


_second = lru_cache(256)(varint)  # events of a stream share few of them


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


def encode_column(values: Sequence[Any], dtype: Dtype) -> list[bytes]:
    """``encode_value`` by column.

    Raises:
        InvalidFeatureValue: a value cannot be of that type.
    """
    if dtype is Dtype.DOUBLE and set(map(type, values)) == {float}:
        pack = _DOUBLE.pack
        return [b"" if value != value else pack(0x29, value) for value in values]
    return [encode_value(value, dtype) for value in values]


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
    return _EVENTS.column(cells, _timestamps)


def timestamp_array(cells: Sequence[Cell]) -> NDArray[np.int64] | None:
    """``decode_timestamps`` as an array; None if a cell is absent or not as in the years 1978 to 2242."""
    try:
        joined = b"".join([cell.ljust(12, b"\0") for cell in cells])  # type: ignore[union-attr]
    except AttributeError:  # an absent cell
        return None
    return _usual_timestamps(joined, len(cells))


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
    return _VALUES.values(cells) if decode is None else decode(cells, _VALUES)


def decode_floats(columns: Sequence[Sequence[Cell]], dtype: Dtype) -> list[list[float]] | None:
    """Several columns of one length and of dtype DOUBLE or FLOAT, as Python values and as JSON alike.

    None where that is not to be had at once: a cell is missing or of another type, or a number is not finite.
    """
    return _FLOATS[dtype].values(columns)


def floats_json(
    columns: Sequence[Sequence[Cell]], dtype: Dtype, hidden: Sequence[int] = ()
) -> list[bytes] | None:
    """Columns of one length and of dtype DOUBLE or FLOAT, each as a JSON array; null in ``hidden`` rows.

    None where that is not to be had at once: a cell is missing or of another type, or a number is not finite.
    """
    return _FLOATS[dtype].json(columns, hidden)


def decode_json_column(cells: Sequence[Cell], dtype: Dtype) -> list[Any]:
    """The column as the JSON values that ``feast serve`` answers with (see ``layout_messages.to_json``).

    Raises:
        CorruptCell: a cell is no Feast value.
    """
    if dtype in _FLOATS:
        return _finite(_BY_DTYPE[dtype](cells, _JSON_VALUES))
    if dtype in _INTEGERS:
        return _BY_DTYPE[dtype](cells, _JSON_VALUES)
    return _JSON_VALUES.values(cells)


def json_cells(cells: Sequence[Cell], dtype: Dtype) -> list[bytes]:
    """Each cell as a JSON array of its own, of the value that ``decode_json_column`` gives for it.

    Raises:
        CorruptCell: a cell is no Feast value.
    """
    if dtype not in _FLOATS:
        return _JSON_CELLS.values(cells)
    texts = _FLOATS[dtype].cells(cells)
    return [_json_array(value) for value in decode_json_column(cells, dtype)] if texts is None else texts


def _json_array(value: Any) -> bytes:
    return orjson.dumps([value])


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
    if dtype in _INTEGERS and set(map(type, values)) == {int}:
        within = _INTEGERS[dtype][1]
        if min(values) in within and max(values) in within:
            return list(values)
    same = _SAME_IN_JSON.get(dtype)
    return [value if type(value) is same or value is None else json_value(value, dtype) for value in values]


_SAME_IN_JSON: Mapping[Dtype, type] = {Dtype.STRING: str, Dtype.BOOL: bool}


class _Memo:
    """Decoded cells by their bytes: real columns repeat few values. Holds immutable values only."""

    LIMIT, LONGEST = 20_000, 64
    LEARNT = 256  # cells of one column that are remembered, so that a column of ever new ones costs little

    def __init__(
        self, decode: Callable[[bytes], Any], *, empty: Any = None, absent: Any = None, often: bool = True
    ) -> None:
        """``empty`` and ``absent``: what such cells stand for; ``often``: whether columns resemble others."""
        self._decode = decode
        self._often = often
        self._empty = {None: absent, b"": empty}
        self.known: dict[Cell, Any] = dict(self._empty)

    def __getitem__(self, cell: Cell) -> Any:
        try:
            return self.known[cell]
        except KeyError:
            assert cell is not None
            value = self._decode(cell)
        if len(cell) <= self.LONGEST and not isinstance(value, list | dict | set):
            self._make_room(1)
            self.known[cell] = value
        return value

    def values(self, cells: Sequence[Cell]) -> list[Any]:
        """The values of a column."""
        known = self.known
        try:
            return [known[cell] for cell in cells]
        except KeyError:
            return [self[cell] for cell in cells]

    def column(
        self, cells: Sequence[Cell], together: Callable[[Sequence[Cell]], list[Any] | None]
    ) -> list[Any]:
        """The values of a column. ``together`` decodes one with unknown cells faster, or says None."""
        known = self.known
        try:
            return [known[cell] for cell in cells]
        except KeyError:
            values = together(cells) if len(cells) >= _SOME else None
        if values is None:
            return [self[cell] for cell in cells]
        if self._often or len(set(cells)) * 2 <= len(cells):
            self._make_room(self.LEARNT)
            known.update(zip(cells[: self.LEARNT], values, strict=False))
        return values

    def _make_room(self, count: int) -> None:
        if len(self.known) + count > self.LIMIT:
            self.known.clear()
            self.known.update(self._empty)


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
_JSON_CELLS = _Memo(lambda cell: _json_array(_JSON_VALUES[cell]), empty=b"[null]", absent=b"[null]")
# An event at the epoch itself is an empty message.
# Views loaded from batches have few different ones, views of events hardly one twice.
_EVENTS = _Memo(decode_timestamp, empty=0, often=False)

# From so many cells on, numpy's fixed cost is less than what it saves: with floats, with varints.
_FEW, _SOME = 8, 24


class _Floats:
    """Cells of one float type: ``form`` is a tag and the number."""

    def __init__(self, form: struct.Struct, tag: int) -> None:
        self._size, self._tag, self._unpack = form.size, tag, form.unpack
        self._row = np.dtype([("tag", "u1"), ("value", f"<f{form.size - 1}")])
        self._tags, self._filler = bytes([tag]), bytes([tag]) + bytes(form.size - 1)
        self._nan = form.pack(tag, math.nan)
        self._code = "x" + form.format[-1]

    def block(self, columns: Sequence[Sequence[Cell]]) -> NDArray[Any] | None:
        """The numbers of several columns of one length; None if a cell is missing or of another type."""
        try:
            return self._numbers(b"".join(map(b"".join, columns)), len(columns) * len(columns[0]))  # type: ignore[arg-type]
        except TypeError:  # an absent cell
            return None

    def values(self, columns: Sequence[Sequence[Cell]]) -> list[list[float]] | None:
        """See ``decode_floats``."""
        rows = len(columns[0])
        if rows < _FEW:
            numbers = self._unpacked(list(chain.from_iterable(columns)))
            if numbers is None or not math.isfinite(sum(numbers)):
                return None
            return [list(numbers[start : start + rows]) for start in range(0, len(numbers), rows)]
        found = self.block(columns)
        if found is None or not np.isfinite(found).all():
            return None
        values: list[list[float]] = found.reshape(len(columns), -1).tolist()
        return values

    def json(self, columns: Sequence[Sequence[Cell]], hidden: Sequence[int]) -> list[bytes] | None:
        """See ``floats_json``."""
        if hidden:
            # JSON has no NaN, so orjson writes null.
            columns = [list(column) for column in columns]
            for column in columns:
                for row in hidden:
                    column[row] = self._nan  # type: ignore[index]
        numbers = self.block(columns)
        if numbers is None:
            return None
        block = numbers.reshape(len(columns), -1).astype(np.float64)
        texts = [orjson.dumps(column, option=orjson.OPT_SERIALIZE_NUMPY) for column in block]
        if not np.isfinite(block).all() and any(text.count(b"null") != len(hidden) for text in texts):
            return None
        return texts

    def cells(self, cells: Sequence[Cell]) -> list[bytes] | None:
        """See ``json_cells``; None where that is not to be had at once, as in ``json``."""
        numbers = self._unpacked(cells)
        if numbers is None:
            return None
        text = orjson.dumps(numbers)
        return None if b"null" in text else text.replace(b",", b"] [").split(b" ")

    def column(self, cells: Sequence[Cell], others: _Memo) -> list[Any]:
        """The numbers of a column; what is of another type is left to ``others``."""
        if len(cells) >= _FEW:
            gaps = _gaps(cells)
            filled: Sequence[Any] = [cell or self._filler for cell in cells] if gaps else cells
            numbers = self._numbers(b"".join(filled), len(cells))
            if numbers is not None:
                values: list[Any] = numbers.tolist()
                for position in gaps:
                    values[position] = None
                return values
        return [self._one(cell, others) for cell in cells]

    def _one(self, cell: Cell, others: _Memo) -> Any:
        if cell and len(cell) == self._size and cell[0] == self._tag:
            return self._unpack(cell)[1]
        return others[cell]

    def _unpacked(self, cells: Sequence[Cell]) -> tuple[float, ...] | None:
        """The numbers of a few cells; None if one is missing or of another type."""
        try:
            joined = b"".join(cells)  # type: ignore[arg-type]
        except TypeError:  # an absent cell
            return None
        if not self._fits(joined, len(cells)):
            return None
        return struct.unpack("<" + self._code * len(cells), joined)

    def _fits(self, joined: bytes, count: int) -> bool:
        # Every cell starts where its predecessor ends, so if each place holds the tag, each has this size.
        return len(joined) == self._size * count and joined[:: self._size] == self._tags * count

    def _numbers(self, joined: bytes, count: int) -> NDArray[Any] | None:
        if not self._fits(joined, count):
            return None
        found: NDArray[Any] = np.frombuffer(joined, self._row)["value"]
        return found


def _integer_decoder(tag: int) -> Callable[[Sequence[Cell], _Memo], list[Any]]:
    """A decoder of columns declared INT32 or INT64, whose cells begin with ``tag``."""
    together = partial(_integers, tag=tag)
    return lambda cells, others: others.column(cells, together)


def _gaps(cells: Sequence[Cell]) -> list[int]:
    """The positions of empty and absent cells."""
    return [position for position, cell in enumerate(cells) if not cell]


def _rows(cells: Sequence[Cell], gaps: list[int], filler: bytes, width: int) -> NDArray[np.uint8] | None:
    """The cells' bytes as rows, padded with zeros, the filler where there is a gap.

    None if one is longer, or has nothing but a tag: the padding would pass for the number zero.
    """
    filled: Sequence[Any] = [cell or filler for cell in cells] if gaps else cells
    raw = b"".join([cell.ljust(width, b"\0") for cell in filled])
    if len(raw) != width * len(cells) or min(map(len, filled)) < 2:
        return None
    return np.frombuffer(raw, np.uint8).reshape(-1, width)


def _varint_weights(rows: int, *places: Sequence[int]) -> NDArray[np.float64]:
    """A matrix that sums seven-bit groups; each column has those of the bytes at ``places``, lowest first.

    In floats, because those have a fast matrix product; sums below 2**53 are exact.
    """
    weights = np.zeros((rows, len(places)))
    for column, group in enumerate(places):
        weights[group, column] = 128.0 ** np.arange(len(group))
    return weights


# In a varint every byte but the last has the high bit, and the last is zero only in the number zero. So in
# a padded row the high bit says exactly that the next byte is not zero.
_INTEGER_WEIGHTS = _varint_weights(10, range(7), range(7, 10))


def _integers(cells: Sequence[Cell], tag: int) -> list[Any] | None:
    """The integers of cells that are all of that tag or empty; None where some are something else."""
    gaps = _gaps(cells)
    raw = _rows(cells, gaps, bytes((tag, 0)), 11)
    if raw is None or (raw[:, 0] != tag).any() or (raw[:, 10] > 1).any():
        return None
    if ((raw[:, 1:10] >= 0x80) != (raw[:, 2:] > 0)).any():
        return None
    low, high = ((raw[:, 1:] & 0x7F) @ _INTEGER_WEIGHTS).astype(np.uint64).T
    values: list[Any] = (low | high << 49).view(np.int64).tolist()
    for position in gaps:
        values[position] = None
    return values


# The seconds of the years 1978 to 2242 take five bytes, the last below 0x20, and as nanoseconds are an int64;
# a fraction follows under the tag 0x10.
_SECONDS_MASK = np.uint64(0xEFE080808080FF)
_SECONDS_FORM = np.uint64(0x8080808008)
_LOW_BITS, _HIGH_BITS = np.uint64(0x7F7F7F7F7F7F00), np.uint64(0x80808080808000)
_TIMESTAMP_WEIGHTS = _varint_weights(12, range(1, 6), range(7, 12))
_TIMESTAMP_FILLER = b"\x08\x80\x80\x80\x80\x01"
_FIRST_USUAL_NS = (1 << 28) * 1_000_000_000


def _timestamps(cells: Sequence[Cell]) -> list[int | None] | None:
    """Timestamps and absent cells; None where some are not usual."""
    gaps = _gaps(cells) if None in cells else []
    found = timestamp_array([cell or _TIMESTAMP_FILLER for cell in cells] if gaps else cells)
    if found is None or (gaps and b"" in cells):
        return None
    events: list[int | None] = found.tolist()
    for position in gaps:
        events[position] = None
    return events


def _usual_timestamps(joined: bytes, count: int) -> NDArray[np.int64] | None:
    """Timestamps whose seconds take five bytes, each padded to twelve; None where some are others."""
    if len(joined) != 12 * count or not count:
        return None
    # Eight bytes of each at a time: 08 s s s s s 10 n, and, from the 10 on, 10 n n n n n 0 0.
    head: NDArray[np.uint64] = np.ndarray(count, "<u8", joined, 0, (12,))
    if (head & _SECONDS_MASK != _SECONDS_FORM).any():
        return None
    rest = np.ndarray(count, "<u8", joined, 4, (12,)) >> 16
    not_zero = ((rest & _LOW_BITS) + _LOW_BITS | rest) & _HIGH_BITS
    # The tag stands for a high bit of its own: what follows it is not zero either.
    if ((rest | (rest & 0x10) << 3) << 8 & _HIGH_BITS != not_zero).any():
        return None
    raw = np.frombuffer(joined, np.uint8).reshape(-1, 12)
    seconds, nanoseconds = ((raw & 0x7F) @ _TIMESTAMP_WEIGHTS).astype(np.int64).T
    events: NDArray[np.int64] = seconds * 1_000_000_000 + nanoseconds
    return events if events.min() >= _FIRST_USUAL_NS else None


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
_FLOATS = {Dtype.DOUBLE: _Floats(_DOUBLE, 0x29), Dtype.FLOAT: _Floats(_FLOAT, 0x35)}
_BY_DTYPE: Mapping[Dtype, _Decoder] = {
    **{dtype: floats.column for dtype, floats in _FLOATS.items()},
    Dtype.INT32: _integer_decoder(0x18),
    Dtype.INT64: _integer_decoder(0x20),
    **_UUIDS,
}
