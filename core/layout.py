"""Feast's Redis layout, byte for byte: entity keys, hash fields, values and timestamps.

A view's row for an entity lies in the Redis hash whose key is the serialized entity key followed by the
project's name. Each feature is one hash field, the murmur hash of ``view:feature``, whose value (a *cell*)
is a serialized ``feast.types.Value``; the row's event timestamp is the field ``_ts:view``. Source: Feast
0.67, ``infra/key_encoding_utils.py`` and ``infra/online_stores/redis.py``.

Here are the keys and fields, and the functions for cells by their public names. ``layout_cells``,
``layout_values`` and ``layout_messages`` hold the cells; ``layout_rows`` and ``layout_columns`` encode in
bulk. Together they are the only place that knows these bytes; none of them knows a connection, a ttl or a
status.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby, repeat
from typing import Any, NamedTuple

import mmh3

from core import layout_values
from core.errors import InvalidEntity, InvalidRepository, UnsupportedKeyVersion
from core.layout_cells import (
    NULL_TIMESTAMP,
    Cell,
    decode_column,
    decode_floats,
    decode_json_column,
    decode_timestamp,
    decode_timestamps,
    decode_value,
    encode_column,
    encode_timestamp,
    encode_value,
    floats_json,
    json_cells,
    json_column,
    json_value,
    timestamp_array,
)
from core.types import Dtype, Field

__all__ = [
    "KEY_VERSION",
    "NULL_TIMESTAMP",
    "Cell",
    "EntityKeys",
    "StoredKey",
    "colliding_fields",
    "decode_column",
    "decode_floats",
    "decode_json_column",
    "decode_timestamp",
    "decode_timestamps",
    "decode_value",
    "encode_column",
    "encode_timestamp",
    "encode_value",
    "feature_field",
    "floats_json",
    "json_cells",
    "json_column",
    "json_value",
    "require_key_version",
    "stored_key",
    "timestamp_array",
    "timestamp_field",
]

KEY_VERSION = 3


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
_KEY_CODES: Mapping[Dtype, str] = {Dtype.INT32: "i", Dtype.INT64: "q"}
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

    STORED_AS_DECLARED = frozenset(_KEY_VALUES)
    """The types that a join key may have; a key names the very type that was declared."""

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
        self._pack: Callable[[bytes, int, bytes], bytes] | None = None
        if len(placed) == 1 and placed[0].dtype in _KEY_CODES:
            # The commonest key by far: one number between constant bytes.
            kind = placed[0].dtype
            self._head = self.prefix + struct.pack("<II", kind, _KEY_SIZES[kind])
            self._pack = struct.Struct(f"<{len(self._head)}s{_KEY_CODES[kind]}{len(self.suffix)}s").pack
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
        if self._pack is not None:
            return list(map(self._pack, repeat(self._head), column, repeat(self.suffix)))
        dtype = self.join_keys[0].dtype
        to_bytes, prefix, suffix = _KEY_VALUES[dtype], self.prefix, self.suffix
        return [prefix + value_head(dtype, raw) + suffix for raw in map(to_bytes, column)]

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


class StoredKey(NamedTuple):
    """What a Redis key says of itself: its join keys in the order it has them, and whose it is.

    Every key of a view without entities has the one join key ``PLACEHOLDER``.
    """

    join_keys: tuple[Field, ...]
    project: bytes


def stored_key(key: bytes) -> StoredKey | None:
    """Read an entity key whose join keys are not known beforehand; None where it is none.

    Lengths stand before all that varies, so what is left after the last value is the whole name of the
    project: a key of ``prodfraud`` cannot be taken for one of ``fraud``.
    """
    try:
        (count,) = _COUNT.unpack_from(key)
        if not 0 < count < len(key) // 16 + 1:
            return None
        at, names, kinds = 4, [], []
        for _ in range(count):
            kind, size = _HEAD.unpack_from(key, at)
            at += 8 + size
            if kind != Dtype.STRING or at > len(key):
                return None
            names.append(key[at - size : at].decode())
        for _ in range(count):
            kind, size = _HEAD.unpack_from(key, at)
            at += 8 + size
            if at > len(key):
                return None
            kinds.append(Dtype(kind))
    except (ValueError, struct.error):
        return None
    return StoredKey(tuple(map(Field, names, kinds)), key[at:])


_COUNT = struct.Struct("<I")
_HEAD = struct.Struct("<II")


def value_head(dtype: Dtype, raw: bytes) -> bytes:
    """A key value's bytes with the type and length that precede them."""
    return struct.pack("<II", dtype, len(raw)) + raw


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
