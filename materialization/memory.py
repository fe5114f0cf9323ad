"""How many bytes of Redis memory rows will take, estimated before they are written.

A model of how Redis and Valkey store a hash: as one compact list while it is small, as a table beyond the
server's ``hash-max-listpack-entries`` and ``-value``. Held to within 20% of ``used_memory`` by a test. Source
of the sizes: ``listpack.c`` and ``server.h`` of Redis 7 and Valkey 8 and 9, jemalloc's size classes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core import layout
from core.layout_rows import EncodedRows
from core.redis_cluster import SLOTS
from core.write_commands import CREATED_DIGITS, created_times_key
from materialization.load import stored_cells

SAMPLE_ROWS = 500

# The key's slot in the keyspace with the object it points to, beside the key's own bytes.
_KEY_OVERHEAD = 40
_LISTPACK_OVERHEAD = 7
# A field of a table: its entry, and the headers and terminators of two strings.
_TABLE_OVERHEAD = 120
_FIELD_OVERHEAD = 24
_SLOT_OVERHEAD = 12
_EMBEDDED_BYTES = 120

_SIZE_CLASSES = sorted(
    {8, *range(16, 129, 16)} | {1 << e | q << (e - 2) for e in range(7, 26) for q in range(4)}
)


@dataclass(frozen=True, slots=True)
class _Server:
    """Up to how many fields of up to how many bytes a hash stays a compact list, and how it allocates.

    ``embeds``: a small value lies in one piece with its field (Valkey from 9 on).
    """

    entries: int
    value_bytes: int
    jemalloc: bool
    embeds: bool

    def allocated(self, size: int) -> int:
        """What the allocator hands out for ``size`` bytes."""
        if not self.jemalloc:  # glibc: multiples of 16, less a word
            return max(24, (size + 8 + 15) // 16 * 16 - 8)
        place = bisect_left(_SIZE_CLASSES, size)
        return _SIZE_CLASSES[place] if place < len(_SIZE_CLASSES) else size


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that rows will add to Redis's memory, and what of it depends on other views of the same keys.

    ``key_bytes`` of them are for keys that are not there yet. Of ``rows`` that are not there yet ``tables``
    lie in hashes that are tables; the others would take ``loosened`` bytes more if theirs were.
    """

    bytes: int = 0
    key_bytes: int = 0
    rows: int = 0
    tables: int = 0
    loosened: int = 0


def estimate(
    client: Any, rows: int, sample: EncodedRows, stored_view: str, *, dated_in: str | None = None
) -> Estimate:
    """What writing ``rows`` rows like the ``sample`` will add to Redis's memory.

    Looks which of the sample's keys and rows are there already: rows cost nothing, keys only the new fields.
    ``dated_in`` is the project where created times are kept beside the rows. ``client`` is a blocking
    redis-py client.
    """
    if not rows:
        return Estimate()
    server = _server(client)
    keys = sample.keys()
    created_keys = [] if dated_in is None else [created_times_key(dated_in, stored_view, key) for key in keys]
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.hmget(key, [layout.timestamp_field(stored_view)])
        pipeline.memory_usage(key, samples=0)
        pipeline.hlen(key)
    for key in created_keys:
        pipeline.exists(key)
    replies = pipeline.execute()
    known = replies[3 * len(keys) :]
    names = [b"    "] * sample.field_count
    names[0] = layout.timestamp_field(stored_view)
    total = key_bytes = tables = loosened = 0
    new: list[int] = []
    rows_cells = stored_cells(sample)
    for row, (key, cells) in enumerate(zip(keys, rows_cells, strict=True)):
        (event,), used, length = replies[3 * row : 3 * row + 3]
        if event is not None:
            continue
        new.append(row)
        parts = [part for pair in zip(names, cells, strict=True) for part in pair]
        bare = 0 if used is not None else _hash_bytes(key, [], server)
        added = _grown_bytes(key, parts, server, used, length) if used else _hash_bytes(key, parts, server)
        total += added
        key_bytes += bare
        if _stays_compact(key, parts, server, used, length) if used else _is_compact(parts, server):
            loosened += bare + _table_bytes(parts, server) - added
        else:
            tables += 1
    scale = rows / len(keys)
    beside = 0.0
    if created_keys and new:
        absent = sum(not known[row] for row in new) / len(new)
        pair = [keys[new[0]], b" " * CREATED_DIGITS + rows_cells[new[0]][0]]
        beside = _created_bytes(len(new) * scale, absent, created_keys[new[0]], pair, server)
    return Estimate(
        round(total * scale + beside),
        round(key_bytes * scale),
        round(len(new) * scale),
        round(tables * scale),
        round(loosened * scale),
    )


def together(views: Sequence[Estimate]) -> list[int]:
    """The bytes of each of some views under the same join keys if all of them are loaded.

    A key is paid once, with the view that has most, and a hash that one view makes a table is one for the
    others' fields too. Taken as if the keys of one view were all among those of the view that has most.
    """
    paid, tables = 0, max(view.tables for view in views)
    found = {}
    for place, view in sorted(enumerate(views), key=lambda pair: -pair[1].key_bytes):
        shared, paid = min(view.key_bytes, paid), max(view.key_bytes, paid)
        compact = view.rows - view.tables
        share = min(1.0, (tables - view.tables) / compact) if compact else 0.0
        found[place] = view.bytes - shared + round(view.loosened * share)
    return [found[place] for place in range(len(views))]


def _server(client: Any) -> _Server:
    """As it says itself, or Redis's defaults where it does not (a managed service, an ACL)."""
    from redis.exceptions import RedisError

    try:
        found = client.config_get("hash-max-listpack-*")
        about = client.info()
        version = str(about.get("valkey_version", "0"))
        return _Server(
            int(found["hash-max-listpack-entries"]),
            int(found["hash-max-listpack-value"]),
            jemalloc=str(about["mem_allocator"]).startswith("jemalloc"),
            embeds=int(version.split(".")[0]) >= 9,
        )
    except (RedisError, KeyError, TypeError, ValueError):
        return _Server(128, 64, jemalloc=True, embeds=False)


def _hash_bytes(key: bytes, parts: Sequence[bytes], server: _Server) -> int:
    total = _KEY_OVERHEAD + server.allocated(len(key) + 12)
    if _is_compact(parts, server):
        return total + server.allocated(_LISTPACK_OVERHEAD + sum(map(_listpack_entry, parts)))
    return total + _TABLE_OVERHEAD + _table_bytes(parts, server)


def _grown_bytes(key: bytes, parts: Sequence[bytes], server: _Server, used: int, length: int) -> int:
    """What ``parts`` add to a hash of ``length`` fields that takes ``used`` bytes."""
    if _stays_compact(key, parts, server, used, length):
        return sum(map(_listpack_entry, parts))
    if not _stays_compact(key, [], server, used, length):
        return _table_bytes(parts, server)
    # It becomes a table: so do the fields that are there, whose names have four bytes.
    value = b" " * max(1, (used - _hash_bytes(key, [], server)) // length - _listpack_entry(b"    ") - 2)
    return _TABLE_OVERHEAD + _table_bytes([*parts, *[b"    ", value] * length], server) - used


def _created_bytes(rows: float, absent: float, key: bytes, pair: Sequence[bytes], server: _Server) -> float:
    """What the created times of ``rows`` new rows take, one hash a slot, each a ``pair`` of field and value.

    ``absent`` is the share of rows whose hash is not there yet.
    """
    hashes = SLOTS * -math.expm1(rows * math.log1p(-1 / SLOTS))
    each = rows / hashes
    if max(map(len, pair)) <= server.value_bytes and each <= server.entries:
        entry = sum(map(_listpack_entry, pair))
        bare = _KEY_OVERHEAD + server.allocated(len(key) + 12)
        fresh = bare + server.allocated(_LISTPACK_OVERHEAD + round(each * entry))
    else:
        entry = _table_bytes(pair, server)
        fresh = round(_hash_bytes(key, [], server) + _TABLE_OVERHEAD + each * entry)
    return absent * hashes * fresh + (1 - absent) * rows * entry


def _stays_compact(key: bytes, parts: Sequence[bytes], server: _Server, used: int, length: int) -> bool:
    """Whether a hash of ``length`` fields and ``used`` bytes is a list and stays one with ``parts``."""
    longest = [b" " * server.value_bytes] * 2 * length
    compact = length + len(parts) // 2 <= server.entries and _is_compact(parts, server)
    return compact and used <= _hash_bytes(key, longest, server)


def _is_compact(parts: Sequence[bytes], server: _Server) -> bool:
    return len(parts) // 2 <= server.entries and max(map(len, parts), default=0) <= server.value_bytes


def _table_bytes(parts: Sequence[bytes], server: _Server) -> int:
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return sum(_table_entry(field, value, server) for field, value in pairs)


def _table_entry(field: bytes, value: bytes, server: _Server) -> int:
    if server.embeds and len(field) + len(value) < _EMBEDDED_BYTES:
        return _SLOT_OVERHEAD + server.allocated(len(field) + len(value) + 6)
    return _FIELD_OVERHEAD + server.allocated(len(field) + 4) + server.allocated(len(value) + 4)


def _listpack_entry(value: bytes) -> int:
    size = len(value) + (1 if len(value) < 64 else 2 if len(value) < 4096 else 5)
    return size + (1 if size < 128 else 2 if size < 16_384 else 3)
