"""Feast's Redis layout, byte for byte: entity keys, hash fields, values and timestamps.

A view's row for an entity lies in the Redis hash whose key is the serialized entity key followed by the
project's name. Each feature is one hash field, the murmur hash of ``view:feature``, whose value (a *cell*)
is a serialized ``feast.types.Value``; the row's event timestamp is the field ``_ts:view``. Source: Feast
0.67, ``infra/key_encoding_utils.py`` and ``infra/online_stores/redis.py``.

This module, with ``layout_values`` (values that go through protobuf) and ``layout_columns`` (whole Arrow
columns), is the only place that knows these bytes. Knows no connection, no ttl, no statuses.
"""

from __future__ import annotations

import math
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

import mmh3
import numpy as np
from numpy.typing import NDArray

from core import layout_values
from core.errors import InvalidEntity, InvalidFeatureValue, InvalidRepository, UnsupportedKeyVersion
from core.types import Dtype, Field

KEY_VERSION = 3
NULL_TIMESTAMP = layout_values.NULL_TIMESTAMP

_INT32 = range(-(1 << 31), 1 << 31)
_INT64 = range(-(1 << 63), 1 << 63)

Cell = bytes | None


def require_key_version(version: object) -> None:
    """Refuse entity keys of another serialization version than 3.

    Raises:
        UnsupportedKeyVersion: ``version`` is not 3.
    """
    if version != KEY_VERSION:
        raise UnsupportedKeyVersion(
            f"entity_key_serialization_version is {version}; Banquet reads and writes version {KEY_VERSION}.",
            hint=f"Set `entity_key_serialization_version: {KEY_VERSION}` in feature_store.yaml, run "
            "`feast apply` and materialize every view again: keys of another version lie under other Redis "
            "keys and are not found (`feast teardown` with the old setting removes them).",
        )


# Hash fields


def feature_field(stored_view_name: str, feature: str) -> bytes:
    """The hash field of a feature: four bytes, murmur3 x86 32 of ``view:feature``, little endian."""
    return struct.pack("<I", mmh3.hash(f"{stored_view_name}:{feature}", signed=False))


def timestamp_field(stored_view_name: str) -> bytes:
    """The hash field of a row's event timestamp."""
    return b"_ts:" + stored_view_name.encode()


def colliding_fields(pairs: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, str], ...]]:
    """Groups of different (stored view name, feature) pairs that share one hash field.

    Two such features of one entity overwrite each other in Redis, unnoticed by Feast.
    """
    by_field = sorted({(feature_field(*pair), pair) for pair in pairs})
    groups = (tuple(pair for _, pair in group) for _, group in groupby(by_field, key=lambda item: item[0]))
    return [group for group in groups if len(group) > 1]


# Entity keys


def _seconds(value: Any) -> int:
    if isinstance(value, datetime):
        return layout_values.epoch_seconds(value)
    return value.__index__()  # type: ignore[no-any-return]


_KEY_VALUES: Mapping[Dtype, Callable[[Any], bytes]] = {
    Dtype.STRING: str.encode,
    Dtype.BYTES: bytes,
    Dtype.INT32: struct.Struct("<i").pack,
    Dtype.INT64: struct.Struct("<q").pack,
    Dtype.UNIX_TIMESTAMP: lambda value: struct.pack("<q", _seconds(value)),
}
_KEY_SIZES: Mapping[Dtype, int] = {Dtype.INT32: 4, Dtype.INT64: 8, Dtype.UNIX_TIMESTAMP: 8}
_KEY_DECODERS: Mapping[int, Callable[[bytes], object]] = {
    Dtype.STRING: bytes.decode,
    Dtype.BYTES: bytes,
    Dtype.INT32: lambda raw: struct.unpack("<i", raw)[0],
    Dtype.INT64: lambda raw: struct.unpack("<q", raw)[0],
    Dtype.UNIX_TIMESTAMP: lambda raw: struct.unpack("<q", raw)[0],
}


class EntityKeys:
    """The Redis keys of one project's entities under given join keys.

    A view without entities has no join keys here; its one row lies under Feast's placeholder entity.

    Attributes:
        join_keys: as given.
        prefix: what all these keys begin with; it holds the names of the join keys, sorted as Feast sorts.
        suffix: what they all end with, the project's name.
        fixed_size: the length of every key in bytes, None where it depends on the values.
        order: positions in ``join_keys`` in the order in which the values stand in the key.
    """

    def __init__(self, project: str, join_keys: Sequence[Field]) -> None:
        """Prepare the constant parts.

        Raises:
            InvalidRepository: a join key is of a type that Feast cannot store in a key.
        """
        self.join_keys = tuple(join_keys)
        for key in self.join_keys:
            if key.dtype not in _KEY_VALUES:
                raise InvalidRepository(
                    f"Join key {key.name!r} is {key.dtype.name}, which Feast cannot store in an entity key.",
                    hint=f"It may be one of {', '.join(dtype.name for dtype in _KEY_VALUES)}.",
                )
        placed = self.join_keys or (PLACEHOLDER,)
        self.order = sorted(range(len(placed)), key=lambda position: placed[position].name)
        self.prefix = struct.pack("<I", len(placed)) + b"".join(
            struct.pack("<II", Dtype.STRING, len(name)) + name
            for name in (placed[position].name.encode() for position in self.order)
        )
        self.suffix = project.encode()
        sizes = [_KEY_SIZES.get(key.dtype) for key in placed]
        self.fixed_size: int | None = None
        if self.join_keys and None not in sizes:
            values = sum(8 + size for size in sizes if size is not None)
            self.fixed_size = len(self.prefix) + values + len(self.suffix)
        if not self.join_keys:
            self._placeholder_key = self.prefix + struct.pack("<II", Dtype.STRING, 0) + self.suffix
            self.fixed_size = len(self._placeholder_key)

    def encode(self, columns: Sequence[Sequence[Any]]) -> list[bytes]:
        """The keys of n entities, given one column of n values per join key.

        Without join keys ``columns`` is empty and the answer is the one key there is. A UNIX_TIMESTAMP value
        is seconds since the epoch or a datetime (a naive one is read as UTC, as Feast does).

        Raises:
            InvalidEntity: a value cannot be of its join key's type; names the join key and the row.
        """
        if not self.join_keys:
            return [self._placeholder_key]
        try:
            if len(columns) == 1:
                return self._encode_single(columns[0])
            parts = [
                [value_head(key.dtype, raw) for raw in map(_KEY_VALUES[key.dtype], column)]
                for key, column in zip(self.join_keys, columns, strict=True)
            ]
        except (TypeError, AttributeError, ValueError, OverflowError, struct.error) as exc:
            raise self._invalid(columns) from exc
        prefix, suffix = self.prefix, self.suffix
        ordered = [parts[position] for position in self.order]
        return [prefix + b"".join(values) + suffix for values in zip(*ordered, strict=True)]

    def _encode_single(self, column: Sequence[Any]) -> list[bytes]:
        dtype = self.join_keys[0].dtype
        size, to_bytes, suffix = _KEY_SIZES.get(dtype), _KEY_VALUES[dtype], self.suffix
        if size is None:
            prefix = self.prefix
            return [prefix + value_head(dtype, raw) + suffix for raw in map(to_bytes, column)]
        head = self.prefix + struct.pack("<II", dtype, size)
        return [head + to_bytes(value) + suffix for value in column]

    def _invalid(self, columns: Sequence[Sequence[Any]]) -> InvalidEntity:
        for key, column in zip(self.join_keys, columns, strict=True):
            for row, value in enumerate(column):
                try:
                    _KEY_VALUES[key.dtype](value)
                except (TypeError, AttributeError, ValueError, OverflowError, struct.error):
                    return InvalidEntity(
                        f"Join key {key.name!r} of row {row} cannot be {key.dtype.name}: {_shown(value)}.",
                        field=key.name,
                        row=row,
                    )
        return InvalidEntity("The columns do not fit the join keys.")

    def decode(self, key: bytes) -> tuple[Any, ...] | None:
        """The values in a Redis key in the order of ``join_keys``, by the types that the key itself names.

        None where the key is not one of these: other join keys, another project (even one whose name ends
        like this one's), or no entity key at all. UNIX_TIMESTAMP values are seconds since the epoch.
        """
        if not key.startswith(self.prefix):
            return None
        at = len(self.prefix)
        stored: list[Any] = []
        try:
            for _ in self.order:
                kind, size = struct.unpack_from("<II", key, at)
                at += 8 + size
                stored.append(_KEY_DECODERS[kind](key[at - size : at]))
        except (KeyError, ValueError, struct.error):
            return None
        if key[at:] != self.suffix or at > len(key):
            return None
        values: list[Any] = [None] * len(stored)
        for position, value in zip(self.order, stored, strict=True):
            values[position] = value
        return tuple(values) if self.join_keys else ()


PLACEHOLDER = Field("__dummy_id", Dtype.STRING)


def value_head(dtype: Dtype, raw: bytes) -> bytes:
    """A key value's bytes with the type and length that precede them."""
    return struct.pack("<II", dtype, len(raw)) + raw


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Timestamps


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


def encode_timestamp(nanoseconds: int) -> bytes:
    """A protobuf Timestamp. ``nanoseconds`` since the epoch, UTC.

    Feast itself stores no more than microseconds (it goes through ``datetime``); a writer that wants its
    bytes rounds down to them first, as ``layout_columns`` does.
    """
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    head = b"\x08" + varint(seconds) if seconds else b""
    return head + b"\x10" + varint(rest) if rest else head


def decode_timestamp(cell: bytes) -> int:
    """Nanoseconds since the epoch, UTC."""
    seconds = rest = at = 0
    while at < len(cell):
        tag = cell[at]
        value, at = _read_varint(cell, at + 1)
        if tag == 0x08:
            seconds = value - (1 << 64) if value >> 63 else value
        elif tag == 0x10:
            rest = value
    return seconds * 1_000_000_000 + rest


def decode_timestamps(cells: Sequence[Cell]) -> list[int | None]:
    """``decode_timestamp`` by column; None where there is no row (Redis has no such field)."""
    if len(cells) >= _VECTOR_ROWS:
        found = _usual_timestamps(cells)
        if found is not None:
            return found
    return [_EVENTS[cell] for cell in cells]


def _usual_timestamps(cells: Sequence[Cell]) -> list[int | None] | None:
    """Timestamps whose seconds take five bytes (the years 1978 to 3058); None where some are others."""
    raw, sizes, gaps = _padded(cells, 12)
    more = raw >= 0x80
    with_nanos = raw[:, 6] == 0x10
    usual = (raw[:, 0] == 0x08) & more[:, 1:5].all(axis=1) & ~more[:, 5]
    usual &= sizes == np.where(with_nanos, 8 + more[:, 7:].sum(axis=1), 6)
    if np.count_nonzero(usual) != len(cells) - len(gaps) or b"" in cells:
        return None
    groups = (raw & 0x7F).astype(np.int64)
    nanoseconds = groups[:, 1:6] @ _WEIGHTS[:5] * 1_000_000_000 + groups[:, 7:] @ _WEIGHTS[:5]
    events: list[int | None] = nanoseconds.tolist()
    for row in gaps:
        events[row] = None
    return events


# Values: encoding


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
    if kind is int and (
        (dtype is Dtype.INT64 and value in _INT64) or (dtype is Dtype.INT32 and value in _INT32)
    ):
        return (b"\x20" if dtype is Dtype.INT64 else b"\x18") + varint(value)
    if dtype is Dtype.BOOL and kind is bool:
        return b"\x38\x01" if value else b"\x38\x00"
    if dtype is Dtype.UNIX_TIMESTAMP and value is not None and layout_values.is_missing(value):
        return NULL_TIMESTAMP_CELL
    return layout_values.encode(value, dtype)


_DOUBLE = struct.Struct("<Bd")
NULL_TIMESTAMP_CELL = b"\x40" + varint(NULL_TIMESTAMP)


# Values: decoding


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
    if dtype is Dtype.DOUBLE or dtype is Dtype.FLOAT:
        found = _numbers(cells, dtype)
        if found is not None:
            return found
    elif dtype in _INTEGER_TAGS and len(cells) >= _VECTOR_ROWS:
        integers = _integers(cells, _INTEGER_TAGS[dtype])
        if integers is not None:
            return integers
    values = [_VALUES[cell] for cell in cells]
    if dtype in _UUIDS:
        return [_UUIDS[dtype](value) for value in values]
    return values


def decode_json_column(cells: Sequence[Cell], dtype: Dtype) -> list[Any]:
    """The column as the JSON values that ``feast serve`` answers with (see ``layout_values.to_json``).

    Raises:
        CorruptCell: a cell is no Feast value.
    """
    if dtype is Dtype.DOUBLE or dtype is Dtype.FLOAT:
        found = _numbers(cells, dtype)
        if found is not None:
            return _finite(found)
    elif dtype in _INTEGER_TAGS and len(cells) >= _VECTOR_ROWS:
        integers = _integers(cells, _INTEGER_TAGS[dtype])
        if integers is not None:
            return integers
    return [_JSON_VALUES[cell] for cell in cells]


def json_value(value: Any, dtype: Dtype) -> Any:
    """The JSON value that ``feast serve`` answers with for a Python value of that type.

    Raises:
        InvalidFeatureValue: ``value`` cannot be of that type.
    """
    return decode_json_column((encode_value(value, dtype),), dtype)[0]


def json_column(values: list[Any], dtype: Dtype) -> list[Any]:
    """``json_value`` by column; None stays None."""
    if dtype in _SAME_IN_JSON:
        return values
    if dtype is Dtype.DOUBLE or dtype is Dtype.FLOAT:
        return _finite(values)
    return [None if value is None else json_value(value, dtype) for value in values]


_SAME_IN_JSON = frozenset({Dtype.INT32, Dtype.INT64, Dtype.STRING, Dtype.BOOL})


# From this many cells on, numpy's fixed cost is less than what it saves.
_VECTOR_ROWS = 32

_NUMBERS = {
    Dtype.DOUBLE: (0x29, np.dtype([("tag", "u1"), ("value", "<f8")]), struct.Struct("<Bd").unpack),
    Dtype.FLOAT: (0x35, np.dtype([("tag", "u1"), ("value", "<f4")]), struct.Struct("<Bf").unpack),
}


def _numbers(cells: Sequence[Cell], dtype: Dtype) -> list[Any] | None:
    """The floats of cells that are all of that type or empty; None where some are something else."""
    tag, row, unpack = _NUMBERS[dtype]
    size, rows = row.itemsize, len(cells)
    if rows < _VECTOR_ROWS:
        try:
            found = [value for kind, value in map(unpack, cells) if kind == tag]  # type: ignore[arg-type]
        except (TypeError, struct.error):  # an absent or empty cell
            fitting = [cell for cell in cells if not cell or (len(cell) == size and cell[0] == tag)]
            found = [unpack(cell)[1] if cell else None for cell in fitting]
        return found if len(found) == rows else None
    try:
        joined = b"".join(cells)  # type: ignore[arg-type]
        gaps = len(joined) != size * rows
    except TypeError:
        gaps = True
    if gaps:
        filler = bytes([tag]) + bytes(size - 1)
        joined = b"".join([cell or filler for cell in cells])
    # Every cell starts where its predecessor ends, so if each place holds the tag, each has this size.
    if len(joined) != size * rows or joined[::size] != bytes([tag]) * rows:
        return None
    values: list[Any] = np.frombuffer(joined, row)["value"].tolist()
    if gaps:
        return [value if cell else None for value, cell in zip(values, cells, strict=True)]
    return values


_INTEGER_TAGS = {Dtype.INT32: 0x18, Dtype.INT64: 0x20}
_WEIGHTS = np.array([1 << 7 * place for place in range(10)], np.uint64).view(np.int64)


def _padded(cells: Sequence[Cell], width: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[int]]:
    """The cells as rows of ``width`` bytes, cut or padded with zeros, their sizes, and where none is."""
    gaps = [row for row, cell in enumerate(cells) if not cell] if None in cells or b"" in cells else []
    filled = [cell or b"" for cell in cells] if gaps else cells
    sizes = np.fromiter(map(len, filled), np.int64, len(cells))  # type: ignore[arg-type]
    return np.array(filled, f"S{width}").view(np.uint8).reshape(-1, width), sizes, gaps


def _integers(cells: Sequence[Cell], tag: int) -> list[Any] | None:
    """The integers of cells that are all of that tag or empty; None where some are something else."""
    raw, sizes, gaps = _padded(cells, 11)
    fitting = (raw[:, 0] == tag) & (sizes == 2 + (raw[:, 1:] >= 0x80).sum(axis=1))
    if np.count_nonzero(fitting) != len(cells) - len(gaps):
        return None
    # The zeros that pad a varint add nothing to its value.
    values: list[Any] = ((raw[:, 1:] & 0x7F).astype(np.int64) @ _WEIGHTS).tolist()
    for row in gaps:
        values[row] = None
    return values


def _finite(values: list[Any]) -> list[Any]:
    """Floats as JSON: the numbers that JSON lacks become texts."""
    try:
        if math.isfinite(sum(values)):
            return values
    except TypeError:  # a gap
        pass
    return [None if value is None else layout_values.float_json(value) for value in values]


class _Memo(dict[Cell, Any]):
    """Decoded cells by their bytes: real columns repeat few values. Holds immutable values only."""

    LIMIT, LONGEST = 50_000, 64

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
    return layout_values.to_python(layout_values.parse(cell))


def _as_uuid(value: Any) -> Any:
    try:
        return uuid.UUID(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Feast once stored UUIDs as texts; the declared type tells them.
_UUIDS: Mapping[Dtype, Callable[[Any], Any]] = {
    Dtype.UUID: _as_uuid,
    Dtype.TIME_UUID: _as_uuid,
    Dtype.UUID_LIST: lambda value: list(map(_as_uuid, value)) if isinstance(value, list) else value,
    Dtype.TIME_UUID_LIST: lambda value: list(map(_as_uuid, value)) if isinstance(value, list) else value,
    Dtype.UUID_SET: lambda value: set(map(_as_uuid, value)) if isinstance(value, set) else value,
    Dtype.TIME_UUID_SET: lambda value: set(map(_as_uuid, value)) if isinstance(value, set) else value,
}

_VALUES = _Memo(_decode)
_JSON_VALUES = _Memo(lambda cell: layout_values.to_json(layout_values.parse(cell)))
# An event at the epoch itself is an empty message.
_EVENTS = _Memo(decode_timestamp, empty=0)
