"""What the layout costs, beside protobuf doing the same: decoding by column, encoding in bulk.

Run with ``python -m bench.layout``. Times are CPU microseconds, the best of several turns; only ratios taken
in one run mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from core import layout
from core.feast_protos import Value
from core.layout_rows import RowEncoder, assemble, bulk_string, command_head
from core.types import Dtype, Field

RNG = np.random.default_rng(7)
CITIES = ["Berlin", "Paris", "New York", "São Paulo"]


def columns(rows: int, mixed: bool) -> list[tuple[list[Any], Dtype]]:
    """Thirteen columns: doubles, or the types that a real service mixes, a tenth of each missing."""
    doubles = [(RNG.random(rows).tolist(), Dtype.DOUBLE) for _ in range(13)]
    if not mixed:
        return doubles
    mix = [
        *doubles[:4],
        *[(RNG.integers(0, 100, rows).tolist(), Dtype.INT64) for _ in range(3)],
        *[(RNG.integers(0, 10**12, rows).tolist(), Dtype.INT64) for _ in range(2)],
        *[(RNG.choice(CITIES, rows).tolist(), Dtype.STRING) for _ in range(2)],
        (RNG.choice([True, False], rows).tolist(), Dtype.BOOL),
        (RNG.random(rows).tolist(), Dtype.FLOAT),
    ]
    return [([None if RNG.random() < 0.1 else value for value in column], dtype) for column, dtype in mix]


def by_protobuf(cells: Sequence[bytes | None]) -> list[Any]:
    """The least that parsing with protobuf can do."""
    values: list[Any] = []
    for cell in cells:
        message = Value.FromString(cell) if cell else None
        kind = message and message.WhichOneof("val")
        values.append(getattr(message, kind) if kind else None)
    return values


def cost(work: Callable[[], object], turns: int = 7) -> float:
    """CPU seconds of one call, the best of some turns."""
    calls = 1
    while True:
        best = min(_timed(work, calls) for _ in range(turns))
        if best > 0.01:
            return best / calls
        calls *= 4


def _timed(work: Callable[[], object], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        work()
    return time.process_time() - started


def decoding() -> None:
    print(f"{'decode 13 columns':34}{'rows':>6}{'layout us':>12}{'protobuf us':>13}{'ratio':>7}")
    for mixed in (False, True):
        for rows in (1, 10, 50, 100, 1000):
            encoded = [
                ([layout.encode_value(value, dtype) for value in column], dtype)
                for column, dtype in columns(rows, mixed)
            ]
            ours = cost(lambda e=encoded: [layout.decode_column(cells, dtype) for cells, dtype in e])  # type: ignore[misc]
            theirs = cost(lambda e=encoded: [by_protobuf(cells) for cells, _ in e])  # type: ignore[misc]
            name = "mixed types, a tenth missing" if mixed else "doubles"
            print(f"{name:34}{rows:6}{ours * 1e6:12.1f}{theirs * 1e6:13.1f}{theirs / ours:7.1f}")
    keys = layout.EntityKeys("shop", [Field("user_id", Dtype.INT64)])
    for rows in (1, 50, 1000):
        stamps = [layout.encode_timestamp(16 * 10**17 + int(ns)) for ns in RNG.integers(0, 10**15, rows)]
        users = RNG.integers(0, 10**9, rows).tolist()
        decoded = cost(lambda s=stamps: layout.decode_timestamps(s))  # type: ignore[misc]
        keyed = cost(lambda u=users: keys.encode([u]))  # type: ignore[misc]
        print(f"{'timestamps, read again':34}{rows:6}{decoded * 1e6:12.1f}")
        print(f"{'integer keys':34}{rows:6}{keyed * 1e6:12.1f}")


def encoding(rows: int = 200_000) -> None:
    moments = pa.array(RNG.integers(16 * 10**14, 17 * 10**14, rows), pa.int64()).view(
        pa.timestamp("us", tz="UTC")
    )
    doubles = {f"f{i}": RNG.random(rows) for i in range(10)}
    tables: dict[str, dict[str, Any]] = {
        "10 doubles": doubles,
        "10 doubles, a tenth null": {k: pa.array(v, mask=RNG.random(rows) < 0.1) for k, v in doubles.items()},
        "3 integers, 3 texts, 2 bools, 2 times": {
            **{f"f{i}": RNG.integers(0, 10**6, rows) for i in range(3)},
            **{f"f{i}": pa.array(RNG.choice(CITIES, rows)) for i in range(3, 6)},
            **{f"f{i}": pa.array(RNG.random(rows) < 0.5) for i in range(6, 8)},
            **{f"f{i}": moments for i in range(8, 10)},
        },
    }
    dtypes = [Dtype.INT64] * 3 + [Dtype.STRING] * 3 + [Dtype.BOOL] * 2 + [Dtype.UNIX_TIMESTAMP] * 2
    print(f"\n{'encode to commands':40}{'s per million rows':>20}{'bytes per row':>15}")
    for name, data in tables.items():
        kinds = [Dtype.DOUBLE] * 10 if "double" in name else dtypes
        features = [Field(f"f{i}", dtype) for i, dtype in enumerate(kinds)]
        encoder = RowEncoder("shop", "user_behavior", [Field("id", Dtype.INT64)], features, "ts")
        table = pa.table({"id": pa.array(range(rows), pa.int64()), "ts": moments, **data})
        head = command_head(2 + 2 * encoder.field_count) + bulk_string(b"HSET")
        size = 0

        def run(encoder: RowEncoder = encoder, table: pa.Table = table, head: bytes = head) -> None:
            nonlocal size
            size = 0
            for batch in table.to_batches(max_chunksize=20_000):
                encoded = encoder.encode(batch)
                size += assemble(len(encoded), head, *encoded.key, *encoded.fields).data.nbytes

        print(f"{name:40}{cost(run, 3) / rows * 1e6:20.2f}{size / rows:15.0f}")


if __name__ == "__main__":
    decoding()
    encoding()
