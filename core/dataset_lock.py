"""The lock beside a training set: what it was made of, in a form that can be compared later.

Fingerprints of the definitions, the source files and the entity rows, and a digest of the content that
does not depend on who wrote the file, with what compression or in what chunks. Knows no join.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import InvalidLock, InvalidSource
from core.repository import Definitions, FeastRepository, OnDemandView, Projection, View

if TYPE_CHECKING:
    from feast.data_source import DataSource

LOCK_VERSION = 1
AS_OF = (
    "the newest row at or before event_timestamp and no older than the view's ttl, both ends included; "
    "ties by created timestamp"
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source; ``path`` is relative to the repository where it lies within.

    ``mtime_us`` is when it changed, in microseconds since the epoch.
    """

    path: str
    size: int
    mtime_us: int
    rows: int


@dataclass(frozen=True, slots=True)
class SourceFingerprint:
    """The source behind one view. Without ``files`` it is one that only its own store can look into."""

    view: str
    location: str
    schema: Mapping[str, str]
    files: tuple[SourceFile, ...]

    @property
    def rows(self) -> int:
        """The rows of all files."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True, slots=True)
class EntityRows:
    """The entity rows: their digest, and where to find them again.

    ``path`` is relative to the lock. Without one they are read back from the dataset's own file, whose
    first ``columns`` they are.
    """

    path: str | None
    columns: tuple[str, ...]
    rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetLock:
    """What a training set was made of; ``definitions`` maps each definition to its digest."""

    service: str
    rows: int
    content_digest: str
    columns: Mapping[str, str]
    definitions: Mapping[str, str]
    sources: tuple[SourceFingerprint, ...]
    entities: EntityRows
    offline_store: str
    as_of: str = AS_OF
    dataset: str | None = None
    created: str = field(default_factory=lambda: datetime.now(tz=UTC).isoformat(timespec="seconds"))
    libraries: Mapping[str, str] = field(default_factory=lambda: libraries())
    lock_version: int = LOCK_VERSION

    def to_json(self) -> str:
        """The lock file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> DatasetLock:
        """Read a lock file.

        Raises:
            InvalidLock: there is none, or it is not one that this release reads.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("lock_version") != LOCK_VERSION:
                raise InvalidLock(
                    f"{path} is a lock of version {raw.get('lock_version')}, not {LOCK_VERSION}."
                )
            raw["sources"] = tuple(
                SourceFingerprint(
                    **{**source, "files": tuple(SourceFile(**file) for file in source["files"])}
                )
                for source in raw["sources"]
            )
            raw["entities"] = EntityRows(**{**raw["entities"], "columns": tuple(raw["entities"]["columns"])})
            return cls(**raw)
        except FileNotFoundError as exc:
            raise InvalidLock(f"There is no lock at {path}.") from exc
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            raise InvalidLock(f"{path} is not the lock of a dataset: {exc!r}.") from exc


@dataclass(frozen=True, slots=True)
class Moved:
    """One input that is not what it was: ``kind`` is definition, source, entities or library."""

    kind: str
    name: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.was} -> {self.now}"


def differences(old: DatasetLock, new: DatasetLock) -> tuple[Moved, ...]:
    """Every input that differs between two locks of one dataset."""
    moved = [
        Moved("definition", name, _short(was), _short(now))
        for name, was, now in _changed(old.definitions, new.definitions)
    ]
    before = {source.view: source for source in old.sources}
    after = {source.view: source for source in new.sources}
    for view in before.keys() & after.keys():
        moved += _moved_source(before[view], after[view])
    if old.entities.digest != new.entities.digest:
        name = old.entities.path or old.dataset or "rows"
        was, now = (f"{e.rows} rows, digest {_short(e.digest)}" for e in (old.entities, new.entities))
        moved.append(Moved("entities", name, was, now))
    moved += [
        Moved("library", name, was or "absent", now or "absent")
        for name, was, now in _changed(old.libraries, new.libraries)
    ]
    return tuple(moved)


def _moved_source(old: SourceFingerprint, new: SourceFingerprint) -> Iterable[Moved]:
    if old.location != new.location:
        yield Moved("source", old.view, old.location, new.location)
        return
    for column, was, now in _changed(old.schema, new.schema):
        yield Moved(
            "source", f"{old.view} ({old.location}) column {column}", was or "absent", now or "absent"
        )
    files = [{file.path: file for file in side.files} for side in (old, new)]
    for path, was, now in _changed(*files):
        yield Moved("source", f"{old.view} {path}", _file(was), _file(now))


def _file(file: SourceFile | None) -> str:
    if file is None:
        return "absent"
    at = datetime.fromtimestamp(file.mtime_us / 1e6, tz=UTC).isoformat()
    return f"{file.rows} rows, {file.size} bytes, changed {at}"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*old, *new])
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "absent"


def views_behind(
    definitions: Definitions, service: str
) -> tuple[dict[str, tuple[Projection, View]], dict[str, OnDemandView]]:
    """Every view that a service reads, also behind on-demand views: stored ones and on-demand ones.

    Stored views go by the name they have in the service; each projection has the features that are read.

    Raises:
        FeatureServiceNotFound, FeatureNotFound: the service or a view does not exist.
    """
    stored: dict[str, tuple[Projection, View]] = {}
    on_demand: dict[str, OnDemandView] = {}

    def need(projection: Projection) -> None:
        view = definitions.view(projection.view, projection.version)
        if isinstance(view, View):
            known, _ = stored.get(projection.name, (projection, view))
            features = tuple(dict.fromkeys([*known.features, *projection.features]))
            stored[projection.name] = (replace(known, features=features), view)
        elif projection.name not in on_demand:
            on_demand[projection.name] = view
            for source in view.sources:
                need(source)

    for projection in definitions.service(service).projections:
        need(projection)
    return stored, on_demand


def definition_digests(repository: FeastRepository, service: str) -> dict[str, str]:
    """A digest for the service and for each view behind it: of what decides values, not of descriptions."""
    definitions = repository.definitions()
    stored, on_demand = views_behind(definitions, service)
    digests = {
        f"service {service}": _digest(
            [
                (p.view, p.name, p.version, p.features, dict(p.join_key_map))
                for p in definitions.service(service).projections
            ]
        )
    }
    for name, computed in on_demand.items():
        digests[f"on-demand view {name}"] = _digest(
            [
                computed.mode,
                computed.singleton,
                [(f.name, int(f.dtype)) for f in computed.features],
                [(f.name, int(f.dtype)) for f in computed.request_inputs],
                [(s.view, s.name, s.version, s.features) for s in computed.sources],
                computed.function_source or hashlib.sha256(computed.function_body).hexdigest(),
            ]
        )
    for name, (projection, view) in stored.items():
        source = batch_source(repository, projection)
        message = source.to_proto()
        for described in ("description", "owner", "tags", "meta"):
            message.ClearField(described)
        digests[f"view {name}"] = _digest(
            [
                view.name,
                [(key.name, int(key.dtype)) for key in view.join_keys],
                [(f, int(view.feature(f).dtype)) for f in projection.features],
                view.ttl.total_seconds(),
                hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest(),
            ]
        )
    return digests


def batch_source(repository: FeastRepository, projection: Projection) -> DataSource:
    """The source that the view behind ``projection`` is read from in training."""
    store = repository.store()
    if projection.version:
        view = store.registry.get_feature_view_by_version(
            projection.view, repository.project, projection.version
        )
    else:
        view = store.registry.get_any_feature_view(projection.view, repository.project)
    return view.batch_source


def source_fingerprints(repository: FeastRepository, service: str) -> tuple[SourceFingerprint, ...]:
    """What the sources behind a service hold now; a source whose files are gone or out of reach has none."""
    stored, _ = views_behind(repository.definitions(), service)
    return tuple(
        _fingerprint(repository, name, batch_source(repository, projection))
        for name, (projection, _) in stored.items()
    )


def _fingerprint(repository: FeastRepository, view: str, source: DataSource) -> SourceFingerprint:
    import pyarrow.parquet as pq
    from feast.infra.offline_stores.file_source import FileSource

    from core.source import source_files

    location = getattr(source, "path", "") or f"{type(source).__name__} {source.name}"
    unseen = SourceFingerprint(view, location, {}, ())
    if not isinstance(source, FileSource):
        return unseen
    try:
        system, found = source_files(source, repository.path)
    except InvalidSource:
        # The offline store may yet reach what this process cannot; where it is ours, the join says why not.
        return unseen
    files: list[SourceFile] = []
    schema: dict[str, str] = {}
    for file in found:
        info = system.info(file)
        modified = info.get("mtime") or info.get("LastModified") or 0
        modified = modified.timestamp() if isinstance(modified, datetime) else float(modified)
        rows = 0
        if file.endswith((".parquet", ".pq")) or "." not in file.rpartition("/")[2]:
            with system.open(file, "rb") as opened:
                parquet = pq.ParquetFile(opened)
                rows = parquet.metadata.num_rows
                schema |= {field.name: str(field.type) for field in parquet.schema_arrow}
        files.append(SourceFile(_within(file, repository.path), info["size"], round(modified * 1e6), rows))
    return SourceFingerprint(view, location, schema, tuple(files))


def _within(file: str, repository: Path) -> str:
    try:
        return Path(file).relative_to(repository).as_posix()
    except ValueError:
        return file


def relative(path: Path, to: Path) -> str:
    """``path`` as seen from the folder ``to``."""
    return Path(os.path.relpath(path.absolute(), to.absolute())).as_posix()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def libraries() -> dict[str, str]:
    """The versions of what makes a dataset."""
    found = {"python": platform.python_version()}
    for name in ("feast-banquet", "feast", "duckdb", "pyarrow", "pandas", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def column_types(table: pa.Table) -> dict[str, str]:
    """Each column's type, the same however Arrow happens to hold it."""
    return {field.name: str(_plain(field.type)) for field in table.schema}


def content_digest(table: pa.Table) -> str:
    """A digest of names, types, values and order: equal for equal tables, whatever their chunks or encoding.

    Nulls differ from NaN; the values that lie under nulls do not count.
    """
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = _plain(column.type)
        digest.update(f"{name}\0{kind}\0{len(column)}\0".encode())
        # One pass per slice keeps the copies small.
        for start in range(0, len(column), 1 << 20):
            chunk = column.slice(start, 1 << 20).cast(kind).combine_chunks()
            _feed(digest, chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk)
    return digest.hexdigest()


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain(field.type)) for field in kind])
    return kind


def _feed(digest: Any, array: pa.Array) -> None:
    kind = array.type
    digest.update(np.packbits(np.asarray(array.is_valid())).tobytes())
    if pa.types.is_null(kind):
        return
    if pa.types.is_large_list(kind) or pa.types.is_map(kind) or pa.types.is_fixed_size_list(kind):
        if pa.types.is_map(kind):
            array = array.cast(pa.large_list(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        digest.update(np.asarray(lengths, np.int64).tobytes())
        _feed(digest, array.flatten())
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            _feed(digest, child)
    elif pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        lengths = pc.fill_null(pc.binary_length(array), 0)
        digest.update(np.asarray(lengths, np.int64).tobytes())
        present = array.drop_null()
        _, offsets, data = present.cast(pa.large_binary()).buffers()
        if len(present) and data is not None:
            bounds = np.frombuffer(offsets, np.int64)[present.offset : present.offset + len(present) + 1]
            digest.update(data[int(bounds[0]) : int(bounds[-1])])
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(np.asarray(array.fill_null(False))).tobytes())
    elif pa.types.is_decimal(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_string(kind):
        text = array.cast(pa.string()) if pa.types.is_decimal(kind) else array
        target = pa.large_string() if pa.types.is_string(text.type) else pa.large_binary()
        _feed(digest, text.cast(target))
    else:
        if pa.types.is_temporal(kind):
            array = array.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
        digest.update(np.ascontiguousarray(np.asarray(array.fill_null(0))).tobytes())
