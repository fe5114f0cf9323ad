"""A Feast file source as a DuckDB table expression: where its files are and how they are scanned.

Knows paths, file systems and formats; knows no join, no feature view and no offline store.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import os
import re
import threading
import uuid
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
    import pyarrow as pa
    from feast.data_source import DataSource
    from fsspec.spec import AbstractFileSystem

UNREADABLE = (duckdb.DataError, duckdb.IOException, duckdb.InvalidInputException)
"""What DuckDB raises where a source's files or values are not what its columns promise."""

_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Scan:
    """A source as DuckDB reads it.

    ``table`` is a table expression, ``columns`` its column names with their DuckDB types, ``position`` the
    columns that order its rows as they lie in the files (empty where the reader knows none), ``location``
    what a message calls it, ``files`` the local files behind it.
    """

    table: str
    columns: Mapping[str, str]
    position: tuple[str, ...]
    location: str
    files: tuple[str, ...] = ()

    def state(self) -> object:
        """Changes when a local file behind it does."""
        try:
            found = [os.stat(file) for file in self.files]
        except FileNotFoundError as exc:
            raise InvalidSource(f"{exc.filename} went away while it was read.") from exc
        return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in found]

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
    # Ahead of their use, whole row groups of local files only cost memory, and so time (ADR 0105).
    con.execute("SET disable_parquet_prefetching = true")
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
    files = _register_remote(con, source) if "://" in location else local_files(location)
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
    position: tuple[str, ...] = ("file_row_number",)
    if len(files) > 1:
        position = ("file_index", *position)
    if columns.keys() & set(position):
        # The source's own columns hide what DuckDB would say.
        position = ()
    return Scan(table, columns, position, location, () if "://" in files[0] else tuple(files))


def local_files(location: str) -> list[str]:
    """The Parquet files that a path, a folder or a glob names, sorted.

    In a folder every file counts, at any depth, except where it or a folder above it starts with a dot or
    an underscore: the rule of Spark and Hive, which holds no partition's name (``_day=1``) against it.
    """
    path = Path(location)
    if path.is_file():
        return [location]
    if path.is_dir():
        return sorted(
            str(file)
            for file in path.rglob("*")
            if file.is_file() and not any(map(_hidden, file.relative_to(path).parts))
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
    name = f"delta_{uuid.uuid4().hex}"
    con.register(name, _open_delta(source, location).to_pyarrow_dataset())
    return Scan(name, _describe(con, name, location), (), location)


def _open_delta(source: Any, location: str) -> Any:
    library = delta(location)
    try:
        return library.DeltaTable(location, storage_options=delta_options(source))
    except Exception as exc:
        # deltalake raises whatever its Rust side met.
        raise InvalidSource(f"{location} cannot be read as a Delta table: {exc}") from exc


def delta(location: str) -> Any:
    """The package deltalake. Raises InvalidSource, with the way out, where it is not installed."""
    try:
        return import_module("deltalake")
    except ImportError as exc:
        raise InvalidSource(
            f"{location} is a Delta table, which needs the package deltalake.",
            hint="Install feast-banquet[delta].",
        ) from exc


def delta_options(source: Any) -> dict[str, str] | None:
    """deltalake's storage options for a FileSource."""
    options = {key: value for key, value in (source.resolve_credentials() or {}).items() if value}
    if source.s3_endpoint_override:
        options["AWS_ENDPOINT_URL"] = source.s3_endpoint_override
        if source.s3_endpoint_override.startswith("http://"):
            options["AWS_ALLOW_HTTP"] = "true"
    return options or None


def file_system(
    location: str, endpoint: str | None = None, credentials: Mapping[str, str] | None = None
) -> tuple[AbstractFileSystem, str]:
    """The file system of a local path or URL, and the path there.

    S3, GCS and Azure go through Arrow, which brings them along; any other scheme goes through fsspec.
    ``endpoint`` and ``credentials`` (Feast's AWS_* names) are for S3; without them AWS's environment
    variables and its own chain decide.

    Raises:
        InvalidSource: the scheme is unknown or its package is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.arrow import ArrowFSWrapper

    scheme = urlsplit(location).scheme if "://" in location else ""
    try:
        if scheme in {"s3", "s3a"}:
            from feast.infra.offline_stores.file_source import FileSource

            # boto3 and deltalake read these variables; Arrow does not.
            named = (
                endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
            )
            system, _ = FileSource.create_filesystem_and_path(
                location.replace("s3a://", "s3://", 1), named, dict(credentials or {})
            )
            return ArrowFSWrapper(system), location.split("://", 1)[1]
        if scheme in {"gs", "gcs", "abfs", "abfss"}:
            from pyarrow.fs import FileSystem

            system, path = FileSystem.from_uri(location)
            return ArrowFSWrapper(system), path
        system, path = url_to_fs(location, use_listings_cache=False)
    except (ImportError, ValueError, OSError) as exc:
        raise InvalidSource(f"{location} cannot be opened: {exc}") from exc
    return system, path


def files_in(system: AbstractFileSystem, path: str) -> list[str]:
    """``local_files`` for any file system. Raises OSError where it cannot be listed."""
    from fsspec.utils import glob_translate

    if system.isfile(path):
        return [path]
    if wildcard := _WILDCARD.search(path):
        root = path[: wildcard.start()].rpartition("/")[0]
        matches = re.compile(glob_translate(path)).match
        return [file for file in _listed(system, root) if matches(file)]
    root = path.rstrip("/") + "/"
    return [file for file in _listed(system, path) if not any(map(_hidden, file[len(root) :].split("/")))]


def _listed(system: AbstractFileSystem, folder: str) -> list[str]:
    """Every file at any depth, sorted; none where there is no such folder."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    if isinstance(system, ArrowFSWrapper):
        # fsspec's own listing leaves out what it could not list: rows would be missing without a word.
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(folder.rstrip("/"), allow_not_found=True, recursive=True)
        return sorted(info.path for info in system.fs.get_file_info(selector) if info.type == FileType.File)
    return sorted(system.find(folder))


def _hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def source_files(source: Any, repo_path: Path | str | None) -> tuple[AbstractFileSystem, list[str]]:
    """The Parquet files of a FileSource, a Delta table's current ones included, and their file system.

    Raises:
        InvalidSource: they cannot be listed.
    """
    from feast.data_format import DeltaFormat

    location = resolve(source.path, repo_path)
    credentials = source.resolve_credentials()
    system, path = file_system(location, source.s3_endpoint_override, credentials)
    if isinstance(source.file_format, DeltaFormat):
        files = _open_delta(source, location).file_uris()
        return system, sorted(file_system(f, source.s3_endpoint_override, credentials)[1] for f in files)
    try:
        return system, files_in(system, path)
    except OSError as exc:
        raise InvalidSource(f"{location} cannot be listed: {exc}") from exc


def source_schema(source: Any, repo_path: Path | str | None) -> pa.Schema:
    """The columns of a FileSource, those of its partitions included, by its first file.

    Feast's own reading of it takes neither the source's credentials nor a Delta table behind plain HTTP.

    Raises:
        InvalidSource: it has no files, or they cannot be read.
    """
    import pyarrow as pa
    from feast.data_format import DeltaFormat
    from pyarrow.parquet import ParquetDataset

    location = resolve(source.path, repo_path)
    if isinstance(source.file_format, DeltaFormat):
        return pa.schema(_open_delta(source, location).schema().to_arrow())
    system, files = source_files(source, repo_path)
    if not files:
        raise InvalidSource(f"{location} holds no Parquet file.", hint="Check the path of the FileSource.")
    try:
        return ParquetDataset(files, filesystem=system).schema
    except (OSError, pa.ArrowInvalid) as exc:
        raise InvalidSource(f"{location} cannot be read as Parquet: {exc}") from exc


def source_state(source: Any) -> list[tuple[str, int, str]]:
    """Path, size and time of change of every file of a remote FileSource.

    Raises:
        InvalidSource: they cannot be listed.
    """
    system, files = source_files(source, None)
    try:
        found = [system.info(file) for file in files]
    except OSError as exc:
        raise InvalidSource(f"{source.path} cannot be listed: {exc}") from exc
    changed = ("mtime", "LastModified", "updated", "created")
    return [
        (file, int(info["size"]), str(next((info[name] for name in changed if info.get(name)), "")))
        for file, info in zip(files, found, strict=True)
    ]


def _register_remote(con: duckdb.DuckDBPyConnection, source: Any) -> list[str]:
    """Give ``con`` the source's file system under a scheme of its own; return the files in it."""
    system, files = source_files(source, None)
    con.execute("SET disable_parquet_prefetching = false")
    scheme = f"source{uuid.uuid4().hex}"
    con.register_filesystem(_scheme_only(system, scheme))
    return [f"{scheme}://{file}" for file in files]


def _scheme_only(system: AbstractFileSystem, scheme: str) -> AbstractFileSystem:
    """``system`` read-only under ``scheme``: DuckDB tells its file systems apart by that alone."""
    from fsspec.spec import AbstractFileSystem

    class Routed(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
        cachable = False
        protocol = scheme

        def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
            return _Shared(system.open(self._strip(path), mode))

        def glob(self, path: str, **_: Any) -> list[str]:
            return [path]

        def info(self, path: str, **_: Any) -> Any:
            return system.info(self._strip(path))

        def modified(self, path: str) -> Any:
            return system.modified(self._strip(path))

        @staticmethod
        def _strip(path: str) -> str:
            return path.split("://", 1)[1]

    return Routed()


class _Shared:
    """A file that several threads read: DuckDB seeks in one call and reads in another, and others in between.

    Each thread has a place of its own, by its number: a thread of DuckDB's keeps nothing else in Python.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        # Arrow's files read at a place, without one that threads would share.
        self._read_at = getattr(getattr(file, "stream", None), "read_at", None)
        self._lock = threading.Lock()
        self._places: dict[int, int] = {}

    def seek(self, place: int) -> int:
        self._places[threading.get_ident()] = place
        return place

    def tell(self) -> int:
        return self._places.get(threading.get_ident(), 0)

    def read(self, size: int) -> bytes:
        place = self.tell()
        if self._read_at is not None:
            content: bytes = self._read_at(size, place)
        else:
            with self._lock:
                self._file.seek(place)
                content = self._file.read(size)
        self.seek(place + len(content))
        return content

    def close(self) -> None:
        self._file.close()
