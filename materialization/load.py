"""Staged rows into Redis: encoded and written chunk by chunk, overlapped.

Knows the order of the work and how much of it is under way; knows no ledger, no gate and no Feast object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import hiredis

from core.layout_rows import EncodedRows, RowEncoder, assemble
from core.repository import View
from core.types import Dtype, Field
from core.write import Fence, OnlineWriter, PendingWrite, WriteResult
from materialization.window import CREATED_NS, EVENT, Staged

CHUNK_ROWS = 16_384
_PENDING_CHUNKS = 2


def row_encoder(project: str, view: View) -> RowEncoder:
    """The encoder of a view's staged rows."""
    features = [Field(feature.name, feature.dtype) for feature in view.features]
    return RowEncoder(project, view.stored_name, view.join_keys, features, EVENT)


def stored_cells(rows: EncodedRows) -> list[list[bytes]]:
    """Per row the values of its hash fields, the timestamp first, then the view's features."""
    reader = hiredis.Reader()
    reader.feed(assemble(len(rows), *rows.fields).data.tobytes())
    return [[reader.gets() for _ in range(2 * rows.field_count)][1::2] for _ in range(len(rows))]


@dataclass(frozen=True, slots=True)
class _Chunk:
    end: int
    pending: PendingWrite


def load(
    staged: Staged,
    writer: OnlineWriter,
    *,
    skip: int = 0,
    settle_ties_by_created: bool = False,
    fence: Fence | None = None,
    done: Callable[[int], None],
) -> WriteResult:
    """Write the staged rows, but for the first ``skip``, which an earlier attempt has written.

    ``done`` is told after each chunk that Redis has confirmed how many rows from the first on are now
    written. ``settle_ties_by_created`` lets created timestamps decide against rows that did not come from
    this source. Raises what the encoding and the writing raise.
    """
    view = staged.view
    encoder = row_encoder(writer.project, view)
    # Feast stores a time in a key to the second: two keys of the source may be one in Redis.
    distinct = all(key.dtype is not Dtype.UNIX_TIMESTAMP for key in view.join_keys)
    pending: deque[_Chunk] = deque()
    total = WriteResult()

    def finish() -> WriteResult:
        chunk = pending.popleft()
        result = chunk.pending.result()
        done(chunk.end)
        return result

    end = skip
    try:
        for batch in staged.batches(CHUNK_ROWS, skip):
            end += batch.num_rows
            created = batch.column(CREATED_NS).to_pylist() if settle_ties_by_created else None
            rows = encoder.encode(batch)
            write = writer.submit(view.stored_name, rows, created_ns=created, distinct=distinct, fence=fence)
            pending.append(_Chunk(end, write))
            if len(pending) > _PENDING_CHUNKS:
                total += finish()
        while pending:
            total += finish()
    finally:
        for chunk in pending:  # after a failure: nothing may still be writing when the caller goes on
            chunk.pending.abandon()
    return total
