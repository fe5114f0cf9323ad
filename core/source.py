"""A Feast file source as a DuckDB table expression: where its files are and how they are scanned.

Knows paths, file systems and formats; knows no join, no feature view and no offline store.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import duckdb

from core.errors import InvalidSource

if TYPE_CHECKING:
    from feast.data_source import DataSource

_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Scan:
    """A source as DuckDB reads it.

    ``table`` is a table expression, ``columns`` its column names with their DuckDB types, ``position`` the
    columns that order its rows as they lie in the files (empty where the reader knows none), ``location``
    what a message calls it.
    """

    table: str
    columns: Mapping[str, str]
    position: tuple[str, ...]
    location: str

    def column(self, name: str, field_mapping: Mapping[str, str]) -> str:
        """The source's own name of the column that Feast knows as ``name``.

        ``field_mapping`` is Feast's: from the source's names to the feature view's.

        Raises:
            InvalidSource: the source has no such column.
        """
        for source_name, mapped in field_mapping.items():
            if mapped == name and source_name in self.columns:
                return source_name
        if name in self.columns:
            return name
        raise InvalidSource(
            f"{self.location} has no column {name!r}.",
            hint=f"Its columns: {', '.join(self.columns)}. Correct the definition or set field_mapping.",
        )


def connect(
    *, memory_limit: str | None = None, threads: int | None = None, temp_directory: Path | None = None
) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that reads naive timestamps as UTC and never downloads an extension."""
    options: dict[str, Any] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    if memory_limit is not None:
        options["memory_limit"] = memory_limit
    if threads is not None:
        options["threads"] = str(threads)
    if temp_directory is not None:
        options["temp_directory"] = str(temp_directory)
    con = duckdb.connect(config=options)
    con.execute("SET timezone = 'UTC'")
    return con


def identifier(name: str) -> str:
    """``name`` quoted as a SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """``text`` quoted as a SQL string."""
    return "'" + text.replace("'", "''") + "'"


def resolve(uri: str, repo_path: Path | str | None) -> str:
    """The absolute path of a local ``uri``, taken from the repository; any other URL as it is."""
    if uri.startswith("file:"):
        uri = url2pathname(urlsplit(uri).path)
    elif "://" in uri:
        return uri
    return str(Path(repo_path or ".").absolute() / uri)


def scan(con: duckdb.DuckDBPyConnection, source: DataSource, repo_path: Path | str | None) -> Scan:
    """``source`` as ``con`` can read it.

    Raises:
        InvalidSource: it is not a file source, has no files, or they cannot be read.
    """
    from feast.data_format import DeltaFormat
    from feast.infra.offline_stores.file_source import FileSource

    if not isinstance(source, FileSource):
        raise InvalidSource(
            f"BanquetOfflineStore reads FileSource only, not {type(source).__name__} ({source.name}).",
            hint="Use a FileSource, or the offline store that belongs to that source.",
        )
    location = resolve(source.path, repo_path)
    if isinstance(source.file_format, DeltaFormat):
        return _scan_delta(con, source, location)
    files = _register_remote(con, source, location) if "://" in location else local_files(location)
    return _scan_files(con, files, location)


def scan_parquet(con: duckdb.DuckDBPyConnection, location: str) -> Scan:
    """The Parquet files that an absolute local path, folder or glob names.

    Raises:
        InvalidSource: there are none, or they cannot be read.
    """
    return _scan_files(con, local_files(location), location)


def _scan_files(con: duckdb.DuckDBPyConnection, files: Sequence[str], location: str) -> Scan:
    if not files:
        raise InvalidSource(f"{location} holds no Parquet file.", hint="Check the path of the FileSource.")
    options = ", union_by_name=true" if len(files) > 1 else ""
    listed = ", ".join(literal(_escape(file)) for file in files)
    table = f"read_parquet([{listed}]{options})"
    columns = _describe(con, table, location)
    position = tuple(name for name in ("file_index", "file_row_number") if name not in columns)
    return Scan(table, columns, position, location)


def local_files(location: str) -> list[str]:
    """The Parquet files that a path, a folder or a glob names, sorted.

    In a folder every file counts, at any depth, except where it or a folder above it starts with a dot or
    an underscore: the rule of Arrow, Spark and Hive.
    """
    path = Path(location)
    if path.is_file():
        return [location]
    if path.is_dir():
        return sorted(
            str(file)
            for file in path.rglob("*")
            if file.is_file() and not any(part[0] in "._" for part in file.relative_to(path).parts)
        )
    if _WILDCARD.search(location):
        anchor = Path(path.anchor)
        return sorted(str(file) for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
    return []


def _escape(file: str) -> str:
    """DuckDB expands wildcards in every path it is given; these are paths of files already."""
    return _WILDCARD.sub(lambda match: f"[{match[0]}]", file)


def _describe(con: duckdb.DuckDBPyConnection, table: str, location: str) -> dict[str, str]:
    try:
        rows = con.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()
    except duckdb.Error as exc:
        raise InvalidSource(f"{location} cannot be read as Parquet: {exc}") from exc
    return {row[0]: row[1] for row in rows}


def _scan_delta(con: duckdb.DuckDBPyConnection, source: Any, location: str) -> Scan:
    try:
        deltalake = import_module("deltalake")
    except ImportError as exc:
        raise InvalidSource(
            f"{location} is a Delta table, which needs the package deltalake.",
            hint="Install feast-banquet[delta].",
        ) from exc
    options = {key: value for key, value in (source.resolve_credentials() or {}).items() if value}
    if source.s3_endpoint_override:
        options["AWS_ENDPOINT_URL"] = source.s3_endpoint_override
    name = f"delta_{abs(hash(location))}"
    try:
        con.register(
            name, deltalake.DeltaTable(location, storage_options=options or None).to_pyarrow_dataset()
        )
    except Exception as exc:
        raise InvalidSource(f"{location} cannot be read as a Delta table: {exc}") from exc
    return Scan(name, _describe(con, name, location), (), location)


def _register_remote(con: duckdb.DuckDBPyConnection, source: Any, location: str) -> Sequence[str]:
    raise InvalidSource(f"{location}: object storage is not supported yet.")
