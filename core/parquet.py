"""Writing Parquet so that a reader sees all of a write or none of it.

A file is replaced by a rename; a folder grows by files that appear under their name when complete. Knows
file systems and Arrow; knows no feature view.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core.errors import InvalidSource
from core.source import files_in

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

_ROWS_PER_FILE = 1_000_000


def replace(system: AbstractFileSystem, path: str, write: Callable[[Any], None]) -> None:
    """Write a file as a whole: ``write`` gets an open binary file; on an error ``path`` stays as it was."""
    parent, _, name = path.rpartition("/")
    system.makedirs(parent or "/", exist_ok=True)
    draft = f"{parent}/.{name}.{uuid.uuid4().hex}"
    try:
        with system.open(draft, "wb") as file:
            write(file)
        system.mv(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            system.rm(draft)
        raise


def write_table(system: AbstractFileSystem, path: str, table: pa.Table) -> None:
    """Replace the file ``path``, or, where the name does not end with .parquet, the folder's content."""
    if path.endswith(".parquet"):
        replace(system, path, lambda file: pq.write_table(table, file))
        return
    before = files_in(system, path) if system.exists(path) else []
    add_files(system, path, table)
    for file in before:
        system.rm(file)


def add_files(
    system: AbstractFileSystem, folder: str, table: pa.Table, partition_by: Sequence[str] = ()
) -> list[str]:
    """Add the rows to a folder as new files and return their paths, in Hive's layout where partitioned.

    Names begin with the time, so that files added later sort later.
    """
    stem = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    written = []
    for directory, part in _partitions(table, partition_by):
        for number, start in enumerate(range(0, max(part.num_rows, 1), _ROWS_PER_FILE)):
            path = "/".join([folder.rstrip("/"), *directory, f"{stem}-{number}.parquet"])
            rows = part.slice(start, _ROWS_PER_FILE)
            replace(system, path, lambda file, rows=rows: pq.write_table(rows, file))  # type: ignore[misc]
            written.append(path)
    return written


def _partitions(table: pa.Table, by: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    from urllib.parse import quote

    if not by:
        yield [], table
        return
    for values in table.select(by).group_by(list(by)).aggregate([]).to_pylist():
        mask: Any = None
        for name, value in values.items():
            same = pc.is_null(table[name]) if value is None else pc.equal(table[name], value)
            mask = same if mask is None else pc.and_(mask, same)
        names = [
            f"{name}={'__HIVE_DEFAULT_PARTITION__' if value is None else quote(str(value), safe='')}"
            for name, value in values.items()
        ]
        yield names, table.filter(mask).drop_columns(list(by))


def append(system: AbstractFileSystem, path: str, rows: pa.Table) -> None:
    """Add rows to a file (rewritten with the rows last) or to a folder (in new files).

    The rows take the columns of the source in their order and its types, times in its unit; a folder in
    Hive's layout is kept so. Two local writers take turns at one file.

    Raises:
        InvalidSource: there is nothing at ``path``, it is a glob, or the rows do not fit its columns.
    """
    files = files_in(system, path)
    if not files or (files[0] != path and not system.isdir(path)):
        raise InvalidSource(
            f"Rows cannot be added to {path}.",
            hint="Only an existing file or folder takes new rows; no glob does.",
        )
    if files[0] != path:
        partitions = _hive_names(files[0], path)
        with system.open(files[-1], "rb") as file:
            schema = pq.read_schema(file)
        for name in partitions:
            if name not in schema.names and name in rows.column_names:
                schema = schema.append(rows.schema.field(name))
        add_files(system, path, conform(rows, schema, path), partitions)
        return
    with _turn(system, path), system.open(path, "rb") as existing:
        old = pq.ParquetFile(existing)
        new = conform(rows, old.schema_arrow, path)

        def write(file: Any) -> None:
            with pq.ParquetWriter(file, old.schema_arrow) as writer:
                for group in range(old.num_row_groups):
                    writer.write_table(old.read_row_group(group))
                writer.write_table(new)

        replace(system, path, write)


def _hive_names(file: str, folder: str) -> list[str]:
    directories = file[len(folder.rstrip("/")) + 1 :].split("/")[:-1]
    return [part.partition("=")[0] for part in directories if "=" in part]


@contextlib.contextmanager
def _turn(system: AbstractFileSystem, path: str) -> Iterator[None]:
    """Keep other processes of this machine from rewriting the same file; object storage has no such lock."""
    if "file" not in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        yield
        return
    target = Path(path)
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def conform(rows: pa.Table, schema: pa.Schema, location: str) -> pa.Table:
    """``rows`` with the columns of ``schema``, in its order and types.

    Raises:
        InvalidSource: a column is missing or not known, or a value does not fit; says which.
    """
    missing = [name for name in schema.names if name not in rows.column_names]
    unknown = [name for name in rows.column_names if name not in schema.names]
    if missing or unknown:
        said = [f"no {', '.join(missing)}"] if missing else []
        said += [f"{', '.join(unknown)}, which it has not"] if unknown else []
        raise InvalidSource(
            f"The rows for {location} have {' and '.join(said)}.",
            hint=f"Its columns: {', '.join(schema.names)}.",
        )
    columns = []
    for field in schema:
        options = pc.CastOptions(target_type=field.type, allow_time_truncate=True)
        try:
            columns.append(pc.cast(rows[field.name], options=options))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
            raise InvalidSource(f"Column {field.name!r} of {location} is {field.type}: {exc}") from exc
    return pa.table(columns, schema=schema)
