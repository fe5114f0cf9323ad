"""Banquet's Feast offline store: point-in-time retrieval of file sources on DuckDB.

    offline_store: {type: core.offline.BanquetOfflineStore, memory_limit: 2GB, threads: 2}

Feast's interface in front of ``core.retrieval``, ``core.source`` and ``core.parquet``; knows no SQL of the
join and no training dataset.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
from feast import FeatureView, OnDemandFeatureView, RepoConfig
from feast.data_format import DeltaFormat
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel
from feast.saved_dataset import SavedDatasetStorage
from feast.utils import _get_requested_feature_views_to_features_dict, compute_non_entity_date_range

from core import parquet
from core.comparison import epoch
from core.errors import EntityFrameError, InvalidSource
from core.point_in_time import point_in_time_join
from core.retrieval import (
    EPOCH,
    EVENT_TIMESTAMP,
    EntityRows,
    check_columns,
    join_keys,
    keys_seen,
    on_demand_views,
    session,
    view_join,
    window,
)
from core.source import (
    Scan,
    delta,
    delta_options,
    file_system,
    identifier,
    literal,
    resolve,
    scan,
    source_schema,
)


class BanquetOfflineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]  # Feast ships no types
    """The ``offline_store`` section of feature_store.yaml."""

    type: Literal["core.offline.BanquetOfflineStore"] = "core.offline.BanquetOfflineStore"

    memory_limit: str | None = None
    """DuckDB's memory, such as 2GB; beyond it, it spills to disk. Default: 80% of the machine's."""

    threads: int | None = None
    """DuckDB's threads. Default: one per core."""

    temp_directory: str | None = None
    """Where DuckDB spills to; relative to the repository. Default: a folder of the system's."""

    staging_location: str | None = None
    """Where ``to_remote_storage`` writes: a folder or an object storage URL."""

    staging_location_endpoint_override: str | None = None
    """The endpoint of an S3-compatible ``staging_location``."""


class BanquetRetrievalJob(RetrievalJob):  # type: ignore[misc]  # Feast ships no types
    """A retrieval that runs when its result is asked for."""

    def __init__(
        self,
        config: RepoConfig,
        evaluate: Callable[[], pa.Table],
        *,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: Callable[[], RetrievalMetadata] | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._evaluate = evaluate
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._describe = metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:  # noqa: ARG002
        return self._evaluate()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand_feature_views

    @cached_property
    def _metadata(self) -> RetrievalMetadata | None:
        return self._describe() if self._describe else None

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def persist(
        self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None
    ) -> None:
        """Write the result where ``storage`` says: a .parquet file, a folder, or a Delta table."""
        source = storage.to_data_source()
        location = _location(source, self._config)
        system, path = file_system(location, source.s3_endpoint_override, source.resolve_credentials())
        if not allow_overwrite and system.exists(path):
            raise SavedDatasetLocationAlreadyExists(location=location)
        table = self.to_arrow(timeout=timeout)
        if isinstance(source.file_format, DeltaFormat):
            options = delta_options(source)
            delta(location).write_deltalake(location, table, mode="overwrite", storage_options=options)
        else:
            parquet.write_table(system, path, table)

    def supports_remote_storage_export(self) -> bool:
        return self._config.offline_store.staging_location is not None

    def to_remote_storage(self) -> list[str]:
        """Write the result as Parquet files to a new folder of ``staging_location``; return their URLs."""
        store = self._config.offline_store
        if store.staging_location is None:
            raise InvalidSource(
                "offline_store has no staging_location.",
                hint="Set it in feature_store.yaml: a folder or a URL.",
            )
        location = resolve(f"{store.staging_location.rstrip('/')}/{uuid.uuid4()}", self._config.repo_path)
        system, path = file_system(location, store.staging_location_endpoint_override)
        files = parquet.add_files(system, path, self.to_arrow())
        return [location + file[len(path) :] for file in files]


class BanquetOfflineStore(OfflineStore):  # type: ignore[misc]  # Feast ships no types
    """Feast's offline-store interface for ``FileSource``, on DuckDB."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Exactly the entity rows in their order, payload untouched, beside the features as of each.

        ``entity_df`` is a DataFrame, an Arrow table, or SQL for DuckDB, whose relative paths are taken from
        the repository. The time column is ``event_timestamp``, or the only one of a time type.

        Without ``entity_df``, the entity rows are the keys that any of the views has a row for between
        ``start_date`` and ``end_date``, in order of the keys, each as of ``end_date`` (as Feast's file,
        BigQuery and Spark stores have it); the defaults are Feast's.

        Running the job raises EntityFrameError for entity rows that cannot be joined, InvalidSource for a
        source that cannot be read. A range that ends before it starts is an EntityFrameError at once.
        """
        on_demand = on_demand_views(feature_refs, project, registry)
        requested, _ = _get_requested_feature_views_to_features_dict(feature_refs, feature_views, on_demand)
        entities = None if entity_df is None else EntityRows(config, entity_df)
        if entities is None:
            start, end = compute_non_entity_date_range(
                feature_views, start_date=start_date, end_date=end_date
            )
            if start > end:
                raise EntityFrameError(
                    f"start_date {start.isoformat()} is after end_date {end.isoformat()}.",
                    hint="Give them the other way round.",
                )

        def evaluate() -> pa.Table:
            with session(config) as con:
                views = [
                    view_join(
                        con,
                        config,
                        view.batch_source,
                        name=view.projection.name_to_use(),
                        keys=join_keys(view),
                        features={_result_name(view, f, full_feature_names): f for f in features},
                        ttl=view.ttl,
                    )
                    for view, features in requested.items()
                ]
                table = entities.table if entities else keys_seen(con, views, start, end)
                check_columns(table, views, on_demand, full_feature_names)
                joined = point_in_time_join(
                    con,
                    table,
                    entities.timestamp if entities else EVENT_TIMESTAMP,
                    views,
                    known_by_then=filter_by_created_timestamp,
                )
            for name in joined.features.column_names:
                table = table.append_column(name, joined.features[name])
            return table

        def metadata() -> RetrievalMetadata:
            if entities is None:
                keys = dict.fromkeys(key for view in feature_views for key in join_keys(view))
                return RetrievalMetadata(feature_refs, list(keys), start, end)
            others = [name for name in entities.table.column_names if name != entities.timestamp]
            return RetrievalMetadata(feature_refs, others, *entities.range)

        return BanquetRetrievalJob(
            config,
            evaluate,
            full_feature_names=full_feature_names,
            on_demand_feature_views=on_demand,
            metadata=metadata,
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row per key in the window, both ends included. Names are the source's own."""

        def evaluate() -> pa.Table:
            with session(config) as con:
                table = scan(con, data_source, config.repo_path)
                columns = _pulled_columns(
                    table, join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column
                )
                time = epoch(identifier(timestamp_field), table.columns[timestamp_field], "ns")
                newest = [f"{time} DESC"]
                if created_timestamp_column:
                    newest.append(f"{identifier(created_timestamp_column)} DESC NULLS LAST")
                newest += [f"{name} DESC" for name in table.position]
                keys = ", ".join(map(identifier, join_key_columns))
                over = f"{f'PARTITION BY {keys} ' if keys else ''}ORDER BY {', '.join(newest)}"
                return con.sql(
                    f"SELECT {columns} FROM {table.table} "
                    f"WHERE {window(table, timestamp_field, start_date, end_date)} "
                    f"QUALIFY row_number() OVER ({over}) = 1"
                ).to_arrow_table()

        return BanquetRetrievalJob(config, evaluate)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row in the window, both ends included. Names are the source's own."""

        def evaluate() -> pa.Table:
            with session(config) as con:
                table = scan(con, data_source, config.repo_path)
                columns = _pulled_columns(
                    table, join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column
                )
                return con.sql(
                    f"SELECT {columns} FROM {table.table} "
                    f"WHERE {window(table, timestamp_field, start_date, end_date)}"
                ).to_arrow_table()

        return BanquetRetrievalJob(config, evaluate)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """The columns of a file source with their Arrow types: what a push must bring."""
        if not isinstance(data_source, FileSource):
            found: Iterable[tuple[str, str]] = data_source.get_table_column_names_and_types(config)
            return found
        schema = source_schema(data_source, config.repo_path)
        return [(field.name, str(field.type)) for field in schema]

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Add rows to the view's batch source; readers see all of them or none.

        Columns may carry the source's names or the view's and stand in any order.

        Raises:
            InvalidSource: the source takes no rows, or these do not have its columns and types.
        """
        source = feature_view.batch_source
        if not isinstance(source, FileSource):
            raise InvalidSource(f"Feature view {feature_view.name!r} has no FileSource to write to.")
        original = {mapped: name for name, mapped in (source.field_mapping or {}).items()}
        table = table.rename_columns([original.get(name, name) for name in table.column_names])
        location = _location(source, config)
        if isinstance(source.file_format, DeltaFormat):
            options = delta_options(source)
            library = delta(location)
            existing = library.DeltaTable(location, storage_options=options)
            rows = parquet.conform(table, pa.schema(existing.schema().to_arrow()), location)
            library.write_deltalake(existing, rows, mode="append")
        else:
            system, path = file_system(location, source.s3_endpoint_override, source.resolve_credentials())
            parquet.append(system, path, table)
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,  # noqa: ARG004 — Feast's signature
        logging_config: LoggingConfig,
        registry: BaseRegistry,  # noqa: ARG004 — Feast's signature
    ) -> None:
        """Add logged features to their destination, in Hive's layout where it has ``partition_by``."""
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            raise InvalidSource(
                f"Feature logs cannot go to a {type(destination).__name__}.",
                hint="Use a FileLoggingDestination.",
            )
        table = ds.dataset(data, format="parquet").to_table() if isinstance(data, Path) else data
        location = resolve(destination.path, config.repo_path)
        system, path = file_system(location, destination.s3_endpoint_override)
        parquet.add_files(system, path, table, destination.partition_by or ())

    @staticmethod
    def get_monitoring_max_timestamp(
        config: RepoConfig, data_source: DataSource, timestamp_field: str
    ) -> datetime | None:
        """The newest event timestamp of a source, None where it has no rows."""
        with session(config) as con:
            table = scan(con, data_source, config.repo_path)
            time = epoch(identifier(timestamp_field), table.columns[timestamp_field], "us")
            newest = con.execute(f"SELECT max({time}) FROM {table.table}").fetchall()[0][0]
        return None if newest is None else EPOCH + timedelta(microseconds=newest)

    # Feast's monitoring keeps its tables as Parquet beside the repository; its own file store does the same.

    @staticmethod
    def ensure_monitoring_tables(config: RepoConfig) -> None:
        _file_store().ensure_monitoring_tables(_as_file_store(config))

    @staticmethod
    def save_monitoring_metrics(config: RepoConfig, *args: Any, **kwargs: Any) -> None:
        _file_store().save_monitoring_metrics(_as_file_store(config), *args, **kwargs)

    @staticmethod
    def query_monitoring_metrics(config: RepoConfig, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        metrics: list[dict[str, Any]] = _file_store().query_monitoring_metrics(
            _as_file_store(config), *args, **kwargs
        )
        return metrics

    @staticmethod
    def clear_monitoring_baseline(config: RepoConfig, *args: Any, **kwargs: Any) -> None:
        _file_store().clear_monitoring_baseline(_as_file_store(config), *args, **kwargs)


def _file_store() -> Any:
    from feast.infra.offline_stores.dask import DaskOfflineStore

    return DaskOfflineStore


def _as_file_store(config: RepoConfig) -> Any:
    from feast.infra.offline_stores.dask import DaskOfflineStoreConfig

    return SimpleNamespace(offline_store=DaskOfflineStoreConfig(), repo_path=config.repo_path)


def _location(source: DataSource, config: RepoConfig) -> str:
    return resolve(source.path, config.repo_path)


def _result_name(view: FeatureView, feature: str, full_feature_names: bool) -> str:
    return f"{view.projection.name_to_use()}__{feature}" if full_feature_names else feature


def _pulled_columns(
    table: Scan, keys: list[str], features: list[str], timestamp: str, created: str | None
) -> str:
    """The select list of a pull, as Feast's file store has it.

    Without features it is every column; without keys the constant that stands in for one is added, which
    Feast's materialization needs.
    """
    wanted = [*keys, *features, timestamp, *([created] if created else [])]
    for name in wanted:
        table.column(name, {})
    if not features:
        wanted = list(table.columns)
    columns = [identifier(name) for name in dict.fromkeys(wanted)]
    if not keys and DUMMY_ENTITY_ID not in table.columns:
        columns.append(f"{literal(DUMMY_ENTITY_VAL)} AS {DUMMY_ENTITY_ID}")
    return ", ".join(columns)
