"""One view from its source into Redis: read, encode and write chunk by chunk, overlapped.

Knows the order of the work and how much of it is under way; knows no ledger, no gate and no Feast object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from core.layout_rows import RowEncoder
from core.types import Field
from core.write import Fence, OnlineWriter, PendingWrite, WriteResult
from materialization.window import CREATED_NS, EVENT, ViewSource, Window

CHUNK_ROWS = 16_384
_PENDING_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class Position:
    """How far a load has come: whole partitions, then whole chunks of the next one."""

    partition: int = 0
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class _Chunk:
    after: Position
    rows: int
    pending: PendingWrite


def load(
    source: ViewSource,
    window: Window,
    writer: OnlineWriter,
    *,
    partitions: int,
    start: Position = Position(),
    settle_ties_by_created: bool = False,
    fence: Fence | None = None,
    done: Callable[[Position, int, WriteResult], None],
) -> WriteResult:
    """Write the newest row of every key in the window.

    ``start`` skips chunks that an earlier attempt has finished; ``done`` is told of each chunk that Redis
    has confirmed, in order: the position after it, its rows and what became of them.
    ``settle_ties_by_created`` lets created timestamps decide against rows that did not come from this
    source. Raises what the reading, the encoding and the writing raise.
    """
    view = source.view
    encoder = RowEncoder(
        writer.project,
        view.stored_name,
        view.join_keys,
        [Field(feature.name, feature.dtype) for feature in view.features],
        EVENT,
    )
    total = WriteResult()
    pending: deque[_Chunk] = deque()

    def finish() -> None:
        nonlocal total
        chunk = pending.popleft()
        result = chunk.pending.result()
        total += result
        done(chunk.after, chunk.rows, result)

    try:
        for partition in range(start.partition, partitions):
            skip = start.chunk if partition == start.partition else 0
            batches = source.batches(window, partition, partitions, CHUNK_ROWS)
            for number, batch in enumerate(batches):
                if number < skip:
                    continue
                created = batch.column(CREATED_NS).to_pylist() if settle_ties_by_created else None
                write = writer.submit(
                    view.stored_name,
                    encoder.encode(batch),
                    created_ns=created,
                    distinct=True,
                    fence=fence,
                )
                pending.append(_Chunk(Position(partition, number + 1), batch.num_rows, write))
                if len(pending) > _PENDING_CHUNKS:
                    finish()
        while pending:
            finish()
    finally:
        for chunk in pending:  # after a failure: nothing may still be writing when the caller goes on
            chunk.pending.abandon()
    return total
