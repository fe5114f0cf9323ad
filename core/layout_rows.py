"""Batches of rows to Redis commands: the bulk half of ``core.layout``.

A ``RowEncoder`` turns a record batch of one view's rows into the pieces of Redis commands, all rows at once:
each row's key and its fields block (``_ts:view`` and every feature, as Feast would have stored them), already
as RESP bulk strings. ``assemble`` joins pieces and constants into one buffer of commands::

    rows = encoder.encode(batch)
    head = command_head(2 + 2 * rows.field_count) + bulk_string(b"HSET")
    commands = assemble(len(rows), head, *rows.key, *rows.fields)
    socket.sendall(commands.data)

The pieces of several views that share the key can stand in one command (the second view's ``fields`` after
the first's), a script's arguments can follow the key, and rows can be dropped first with ``filter``.
Nulls, NaN and units become what Feast's own materialization stores; ADR 0022 lists the few places where Feast
damages a value and this module does not. Knows no connection and no newer-wins rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from core import layout, layout_columns
from core.errors import InvalidEntity, InvalidFeatureValue, InvalidSource
from core.layout_columns import BINARY, Bytes, Cells, Piece, filtered
from core.types import Dtype, Field


def command_head(arguments: int) -> bytes:
    """The head of a RESP command: ``arguments`` counts the bulk strings that follow, its name included."""
    return b"*%d\r\n" % arguments


def bulk_string(value: bytes) -> bytes:
    """A RESP bulk string."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def command(*arguments: bytes) -> bytes:
    """A whole RESP command."""
    return command_head(len(arguments)) + b"".join(map(bulk_string, arguments))


def _bulk_head(size: int) -> bytes:
    return b"$%d\r\n" % size


@dataclass(frozen=True, slots=True)
class Commands:
    """One command per row in one buffer; command i is ``data[offsets[i]:offsets[i + 1]]``."""

    data: Bytes
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def between(self, part: range) -> memoryview:
        """The bytes of some commands in a row."""
        start, stop = self.offsets[part.start], self.offsets[part.stop]
        return memoryview(self.data)[start:stop]  # type: ignore[arg-type]

    def chunks(self, size: int) -> Iterator[tuple[memoryview, int]]:
        """Whole commands of about ``size`` bytes together (one at least), and how many they are."""
        start = 0
        while start < len(self):
            limit = self.offsets[start] + size
            stop = max(start + 1, int(np.searchsorted(self.offsets, limit, side="right")) - 1)
            yield memoryview(self.data)[self.offsets[start] : self.offsets[stop]], stop - start  # type: ignore[arg-type]
            start = stop


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """The rows of one view as pieces of commands.

    Attributes:
        key: pieces of the key as one bulk string.
        fields: pieces of ``2 * field_count`` bulk strings: ``_ts:view`` and each feature's field with their
            values, in the encoder's order of features.
        field_count: number of hash fields per row, the timestamp's among them.
        event_ns: each row's event timestamp as stored (rounded down to microseconds, as Feast stores it),
            nanoseconds since the epoch, UTC.
        cells: what ``fields`` is made of, the name and the cells of each hash field; empty where the rows
            were encoded one by one.
    """

    rows: int
    key: tuple[Piece, ...]
    fields: tuple[Piece, ...]
    field_count: int
    event_ns: NDArray[np.int64]
    cells: tuple[tuple[bytes, Cells], ...] = ()

    def __len__(self) -> int:
        return self.rows

    def filter(self, keep: NDArray[np.bool_]) -> EncodedRows:
        """The rows where ``keep`` is true, in their order."""
        return replace(
            self,
            rows=int(np.count_nonzero(keep)),
            key=tuple(filtered(piece, keep) for piece in self.key),
            fields=tuple(filtered(piece, keep) for piece in self.fields),
            event_ns=self.event_ns[keep],
            cells=tuple((name, cells.filter(keep)) for name, cells in self.cells),
        )

    def keys(self) -> list[bytes]:
        """The Redis keys themselves: for cluster slots, for reports."""
        commands = assemble(self.rows, *self.key)
        data = commands.data.tobytes()
        bounds = zip(commands.offsets[:-1].tolist(), commands.offsets[1:].tolist(), strict=True)
        return [data[data.index(b"\n", start) + 1 : stop - 2] for start, stop in bounds]


def assemble(rows: int, *pieces: Piece) -> Commands:
    """Join the pieces of every row, in order, into one buffer."""
    runs = list(_adjacent(pieces))
    if len(runs) == 1 and not isinstance(runs[0][0], pa.LargeBinaryArray):
        block = _block(rows, runs[0])
        return Commands(block.reshape(-1), np.arange(rows + 1, dtype=np.int64) * block.shape[1])
    joined = pc.binary_join_element_wise(*(_joinable(rows, run) for run in runs), pa.scalar(b"", BINARY))
    _, bounds, data = joined.buffers()
    offsets = np.frombuffer(bounds, np.int64)[joined.offset : joined.offset + rows + 1]
    # Arrow may reserve more than it fills.
    return Commands(np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0])


def _adjacent(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Runs of pieces whose width is the same in every row, and the others singly."""
    run: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, bytes | np.ndarray):
            run.append(piece)
            continue
        if run:
            yield run
            run = []
        yield [piece]
    if run:
        yield run


def _joinable(rows: int, run: list[Piece]) -> pa.LargeBinaryArray | pa.Scalar:
    """A run as an argument of Arrow's join."""
    if isinstance(run[0], pa.LargeBinaryArray):
        return run[0]
    constants = [piece for piece in run if isinstance(piece, bytes)]
    if len(constants) == len(run):
        return pa.scalar(b"".join(constants), BINARY)
    block = _block(rows, run)
    offsets = np.arange(rows + 1, dtype=np.int64) * block.shape[1]
    return pa.Array.from_buffers(BINARY, rows, [None, pa.py_buffer(offsets), pa.py_buffer(block)])


def _block(rows: int, run: list[Piece]) -> Bytes:
    """Adjacent pieces of fixed width as one contiguous matrix."""
    template = b"".join(piece if isinstance(piece, bytes) else bytes(piece.shape[1]) for piece in run)
    block = np.empty((rows, len(template)), np.uint8)
    block[:] = np.frombuffer(template, np.uint8)
    at = 0
    for piece in run:
        if isinstance(piece, np.ndarray):
            layout_columns.place(piece, block, at)
        at += len(piece) if isinstance(piece, bytes) else piece.shape[1]
    return block


class RowEncoder:
    """Encodes the rows of one view.

    Attributes:
        keys: the view's entity keys.
        field_count: hash fields per row.
    """

    def __init__(
        self,
        project: str,
        stored_view_name: str,
        join_keys: Sequence[Field],
        features: Sequence[Field],
        timestamp_column: str,
        columns: dict[str, str] | None = None,
    ) -> None:
        """Prepare the constant parts.

        Args:
            project: the Feast project.
            stored_view_name: the view's name in the online store.
            join_keys: the view's join keys; empty for a view without entities.
            features: the view's features.
            timestamp_column: the batches' column of event timestamps.
            columns: the batches' column of each join key or feature that has another name there.

        Raises:
            InvalidRepository: a join key is of a type that Feast cannot store in a key.
        """
        self.keys = layout.EntityKeys(project, join_keys)
        self.features = tuple(features)
        self.field_count = 1 + len(self.features)
        self._timestamp_column = timestamp_column
        self._columns = columns or {}
        self._names = [layout.timestamp_field(stored_view_name)]
        self._names += [layout.feature_field(stored_view_name, f.name) for f in self.features]

    def encode(self, batch: pa.RecordBatch | pa.Table) -> EncodedRows:
        """Encode every row of the batch.

        Raises:
            InvalidSource: a column is missing, or the timestamp column is not one of timestamps.
            InvalidEntity: a join key is null or cannot be of its type.
            InvalidFeatureValue: an event timestamp is null, or a value cannot be of its feature's type.
        """
        events = _event_us(self._column(batch, self._timestamp_column), self._timestamp_column)
        cells = [layout_columns.event_cells(events)]
        for feature in self.features:
            column = self._column(batch, self._columns.get(feature.name, feature.name))
            try:
                cells.append(layout_columns.cells(column, feature.dtype))
            except (InvalidFeatureValue, pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
                reason = exc.message if isinstance(exc, InvalidFeatureValue) else str(exc)
                raise InvalidFeatureValue(
                    f"Column {feature.name!r} cannot be stored as {feature.dtype.name}: {reason}",
                    column=feature.name,
                    dtype=feature.dtype.name,
                ) from exc
        fields: list[Piece] = []
        for name, column in zip(self._names, cells, strict=True):
            fields += [bulk_string(name), *column.framed(_bulk_head, layout_columns.CRLF)]
        return EncodedRows(
            rows=batch.num_rows,
            key=self._key(batch),
            fields=tuple(fields),
            field_count=self.field_count,
            event_ns=events * 1000,
            cells=tuple(zip(self._names, cells, strict=True)),
        )

    def _column(self, batch: pa.RecordBatch | pa.Table, name: str) -> pa.Array:
        index = batch.schema.get_field_index(name)
        if index < 0:
            raise InvalidSource(f"The source has no column {name!r}.", column=name)
        column = batch.column(index)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def _key(self, batch: pa.RecordBatch | pa.Table) -> tuple[Piece, ...]:
        if not self.keys.join_keys:
            return (bulk_string(self.keys.encode([])[0]),)
        pieces: list[Piece] = [self.keys.prefix]
        variable: list[NDArray[np.int64]] = []
        constant = len(self.keys.prefix) + len(self.keys.suffix)
        for position in self.keys.order:
            key = self.keys.join_keys[position]
            column = self._column(batch, self._columns.get(key.name, key.name))
            if column.null_count:
                raise InvalidEntity(
                    f"Join key {key.name!r} is null in {column.null_count} of {len(column)} rows.",
                    field=key.name,
                )
            parts, sizes = _key_value(column, key)
            pieces += parts
            constant += 8
            if isinstance(sizes, int):
                constant += sizes
            else:
                variable.append(sizes)
        pieces.append(self.keys.suffix + layout_columns.CRLF)
        if not variable:
            return (b"$%d\r\n" % constant, *pieces)
        return (
            layout_columns.by_length(np.sum(variable, axis=0) + constant, _bulk_head),
            *pieces,
        )


def _key_value(column: pa.Array, key: Field) -> tuple[list[Piece], NDArray[np.int64] | int]:
    """The pieces of one join key's values, and their lengths (one number where all are alike)."""
    try:
        if key.dtype in (Dtype.STRING, Dtype.BYTES):
            return _text_key_value(column, key.dtype)
        if key.dtype is Dtype.UNIX_TIMESTAMP:
            values = layout_columns.epoch_seconds(column)
        else:
            values = layout_columns.whole_numbers(column, key.dtype)
    except (InvalidFeatureValue, pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
        raise InvalidEntity(
            f"Join key {key.name!r} cannot be {key.dtype.name}: {exc}", field=key.name
        ) from exc
    size = 4 if key.dtype is Dtype.INT32 else 8
    head = layout.value_head(key.dtype, bytes(size))[:8]
    return [head, layout_columns.fixed_width(values.astype(f"<i{size}"))], size


def _text_key_value(column: pa.Array, dtype: Dtype) -> tuple[list[Piece], NDArray[np.int64]]:
    raw = layout_columns.raw_bytes(column, dtype)
    if raw is None:
        if dtype is Dtype.BYTES:
            raise InvalidFeatureValue(f"{column.type} is no bytes.")
        raw = pa.array([str(value).encode() for value in layout_columns.feast_values(column)], BINARY)
    sizes = layout_columns.byte_lengths(raw)
    heads = np.empty((len(sizes), 2), "<u4")
    heads[:, 0] = dtype
    heads[:, 1] = sizes
    return [layout_columns.fixed_width(heads), raw], sizes


def _event_us(column: pa.Array, name: str) -> NDArray[np.int64]:
    """Event timestamps in microseconds since the epoch, UTC; a naive column is read as UTC, as Feast does."""
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
        raise InvalidSource(f"Timestamp column {name!r} is {column.type}, not a timestamp.", column=name)
    if column.null_count:
        raise InvalidFeatureValue(
            f"Timestamp column {name!r} is null in {column.null_count} of {len(column)} rows.", column=name
        )
    return layout_columns.ticks(column, 1_000_000)
