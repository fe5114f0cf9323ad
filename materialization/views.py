"""Feast's feature views as loads see them: the stored view, its source in DuckDB, what identifies both.

The only module here that reads Feast's objects; it writes nothing.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InvalidRepository
from core.repository import DUMMY_JOIN_KEY, FeastRepository, Feature, View
from core.source import Scan, local_files, resolve, scan, source_state
from core.types import Dtype, Field
from materialization.window import ViewSource, Window

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureView, RepoConfig
    from feast.infra.offline_stores.offline_store import OfflineStore

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def require_views(repo: FeastRepository) -> None:
    """Refuse a repository that was never applied: Feast would take it for one without views.

    Raises:
        InvalidRepository: there is no registry, or it holds no view of the project.
    """
    if not repo.definitions().views:
        raise InvalidRepository(
            f"No feature view of project {repo.project!r} is registered.", hint="Run `banquet apply` first."
        )


def stored_view(view: FeatureView, config: RepoConfig) -> View:
    """The view as it lies in the online store."""
    from feast.infra.online_stores.helpers import compute_versioned_name

    return View(
        name=view.name,
        stored_name=compute_versioned_name(view, config.registry.enable_online_feature_view_versioning),
        join_keys=tuple(
            Field(column.name, _dtype(column))
            for column in view.entity_columns
            if column.name != DUMMY_JOIN_KEY
        ),
        features=tuple(Feature(f.name, _dtype(f), dict(f.tags), f.description) for f in view.features),
        ttl=view.ttl or timedelta(0),
        description=view.description,
    )


def _dtype(column: Any) -> Dtype:
    return Dtype(column.dtype.to_value_type().value)


def needs_feast(view: FeatureView) -> str | None:
    """Why only Feast's own engine can compute this view; None if its rows are read as they are."""
    if getattr(view, "feature_transformation", None):
        return "it has a transformation"
    if getattr(view, "aggregations", None):
        return "it has aggregations"
    if getattr(view, "source_views", None):
        return "it is computed from other views"
    if getattr(view, "offline", False):
        return "it is also written offline"
    if getattr(view, "enable_validation", False):
        return "Feast validates it"
    return None


def settles_ties_by_created(view: FeatureView) -> bool:
    """Whether created times decide between equal event times: rows may also come from a push or a stream."""
    return bool(getattr(view, "stream_source", None) and view.batch_source.created_timestamp_column)


def open_source(
    con: duckdb.DuckDBPyConnection,
    view: FeatureView,
    config: RepoConfig,
    offline_store: OfflineStore,
    window: Window,
) -> ViewSource:
    """The view's source in ``con``: files as they lie, any other as the offline store pulls the window.

    Raises:
        InvalidSource: the source cannot be read or lacks a column.
    """
    from feast.infra.offline_stores.file_source import FileSource

    source = view.batch_source
    if isinstance(source, FileSource):
        found = scan(con, source, config.repo_path)
    else:
        found = _pull(con, view, config, offline_store, window)
    return ViewSource(
        con,
        stored_view(view, config),
        found,
        timestamp=source.timestamp_field,
        created=source.created_timestamp_column or None,
        field_mapping=source.field_mapping or {},
    )


def _pull(
    con: duckdb.DuckDBPyConnection,
    view: FeatureView,
    config: RepoConfig,
    offline_store: OfflineStore,
    window: Window,
) -> Scan:
    source = view.batch_source
    back = {mapped: name for name, mapped in (source.field_mapping or {}).items()}

    def own(name: str) -> str:
        return str(back.get(name, name))

    # Late rows are among the newest rows of the whole window, not only of its new part.
    start = window.start_us if window.after_us is None or source.created_timestamp_column else window.after_us
    job = offline_store.pull_latest_from_table_or_query(
        config=config,
        data_source=source,
        join_key_columns=[own(c.name) for c in view.entity_columns if c.name != DUMMY_JOIN_KEY],
        feature_name_columns=[own(feature.name) for feature in view.features],
        timestamp_field=own(source.timestamp_field),
        created_timestamp_column=own(source.created_timestamp_column) or None,
        start_date=as_datetime(start if start is not None else 0),
        end_date=as_datetime(window.end_us),
    )
    name = f"pulled_{view.name}"
    con.register(name, job.to_arrow())
    columns = {row[0]: row[1] for row in con.execute(f'DESCRIBE "{name}"').fetchall()}
    return Scan(f'"{name}"', columns, (), f"The source of {view.name!r}")


def definition_digest(view: FeatureView, config: RepoConfig) -> str:
    """What a row in Redis depends on besides its source's rows: a change means that all rows are due anew."""
    stored, source = stored_view(view, config), view.batch_source
    what = [
        stored.stored_name,
        [(key.name, int(key.dtype)) for key in stored.join_keys],
        sorted((feature.name, int(feature.dtype)) for feature in stored.features),
        [
            source.timestamp_field,
            source.created_timestamp_column,
            sorted((source.field_mapping or {}).items()),
        ],
        getattr(source, "path", None) or source.name,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def source_fingerprint(view: FeatureView, config: RepoConfig) -> str | None:
    """Changes when the source's files do (names, sizes, times of change); None where it has none.

    Raises:
        InvalidSource: the files of a remote source cannot be listed.
    """
    path = getattr(view.batch_source, "path", None)
    if not path:
        return None
    location = resolve(path, config.repo_path)
    digest = hashlib.sha256()
    if "://" in location:
        digest.update(json.dumps(source_state(view.batch_source)).encode())
        return digest.hexdigest()[:16]
    root = Path(location)
    files = sorted(map(str, root.rglob("*"))) if root.is_dir() else local_files(location)
    for file in files:
        stat = Path(file).stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n".encode())
    return digest.hexdigest()[:16]


def as_datetime(us: int) -> datetime:
    """Microseconds since the epoch as a time in UTC."""
    return _EPOCH + timedelta(microseconds=us)


def as_us(time: datetime) -> int:
    """Microseconds since the epoch, rounded down; a naive time is UTC, as in Feast."""
    return (aware(time) - _EPOCH) // timedelta(microseconds=1)


def aware(time: datetime) -> datetime:
    """``time`` with a zone; a naive one is UTC, as in Feast."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
