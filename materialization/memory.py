"""How many bytes of Redis memory rows will take, estimated before they are written.

A model of how Redis and Valkey store a hash: as one compact list while it is small, as a table beyond the
server's ``hash-max-listpack-entries`` and ``-value``. Held to within 20% of ``used_memory`` by a test. Source
of the sizes: ``listpack.c`` and ``server.h`` of Redis 7 and Valkey 8 and 9, jemalloc's size classes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core import layout
from core.layout_rows import EncodedRows
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


def estimate_bytes(client: Any, rows: int, sample: EncodedRows, stored_view: str) -> int:
    """What writing ``rows`` rows like the ``sample`` will add to Redis's memory, in bytes.

    Looks which of the sample's keys and rows are there already: those cost nothing, or only their fields.
    ``client`` is a blocking redis-py client.
    """
    if not rows:
        return 0
    server = _server(client)
    keys = sample.keys()
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.hmget(key, [layout.timestamp_field(stored_view)])
        pipeline.memory_usage(key)
    replies = pipeline.execute()
    total = 0
    names = [b"    "] * sample.field_count
    names[0] = layout.timestamp_field(stored_view)
    for key, cells, (event,), used in zip(
        keys, stored_cells(sample), replies[::2], replies[1::2], strict=True
    ):
        parts = [part for pair in zip(names, cells, strict=True) for part in pair]
        if event is not None:
            continue
        if used is not None:
            total += sum(map(_listpack_entry, parts))
        else:
            total += _hash_bytes(key, parts, server)
    return round(total * rows / len(keys))


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
    if len(parts) // 2 <= server.entries and max(map(len, parts)) <= server.value_bytes:
        return total + server.allocated(_LISTPACK_OVERHEAD + sum(map(_listpack_entry, parts)))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return total + _TABLE_OVERHEAD + sum(_table_entry(field, value, server) for field, value in pairs)


def _table_entry(field: bytes, value: bytes, server: _Server) -> int:
    if server.embeds and len(field) + len(value) < _EMBEDDED_BYTES:
        return _SLOT_OVERHEAD + server.allocated(len(field) + len(value) + 6)
    return _FIELD_OVERHEAD + server.allocated(len(field) + 4) + server.allocated(len(value) + 4)


def _listpack_entry(value: bytes) -> int:
    size = len(value) + (1 if len(value) < 64 else 2 if len(value) < 4096 else 5)
    return size + (1 if size < 128 else 2 if size < 16_384 else 3)
