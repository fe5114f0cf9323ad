"""Banquet's Feast offline store: point-in-time retrieval of file sources on DuckDB.

    offline_store: {type: core.offline.BanquetOfflineStore, memory_limit: 2GB, threads: 2}

Translates between Feast's interface and ``core.source`` and ``core.point_in_time``; knows no SQL of the
join and no training dataset.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

import duckdb
import pandas as pd
import pyarrow as pa
from feast import FeatureView, OnDemandFeatureView, RepoConfig
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _get_requested_feature_views_to_features_dict

from core.errors import EntityFrameError, InvalidSource
from core.point_in_time import ViewJoin, epoch, point_in_time_join, within
from core.source import Scan, connect, identifier, scan

EVENT_TIMESTAMP = "event_timestamp"


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


@contextmanager
def _duckdb(config: RepoConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    store = config.offline_store
    with tempfile.TemporaryDirectory(prefix="banquet-", ignore_cleanup_errors=True) as scratch:
        spill = (
            Path(config.repo_path or ".") / store.temp_directory if store.temp_directory else Path(scratch)
        )
        con = connect(memory_limit=store.memory_limit, threads=store.threads, temp_directory=spill)
        try:
            yield con
        finally:
            con.close()


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

        ``entity_df`` is a DataFrame, an Arrow table, or SQL for DuckDB. The time column is
        ``event_timestamp``, or the only one of a time type.
        """
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        requested, _ = _get_requested_feature_views_to_features_dict(feature_refs, feature_views, on_demand)
        entities = _Entities(config, entity_df)

        def evaluate() -> pa.Table:
            table, timestamp = entities.table, entities.timestamp
            with _duckdb(config) as con:
                views = [
                    _view_join(con, config, view, features, full_feature_names)
                    for view, features in requested.items()
                ]
                _refuse_collisions(table, views, on_demand, full_feature_names)
                joined = point_in_time_join(
                    con, table, timestamp, views, known_by_then=filter_by_created_timestamp
                )
            for name in joined.features.column_names:
                table = table.append_column(name, joined.features[name])
            return table

        def metadata() -> RetrievalMetadata:
            keys = [name for name in entities.table.column_names if name != entities.timestamp]
            return RetrievalMetadata(feature_refs, keys, *entities.range)

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
            with _duckdb(config) as con:
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
                    f"WHERE {_window(table, timestamp_field, start_date, end_date)} "
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
            with _duckdb(config) as con:
                table = scan(con, data_source, config.repo_path)
                columns = _pulled_columns(
                    table, join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column
                )
                return con.sql(
                    f"SELECT {columns} FROM {table.table} "
                    f"WHERE {_window(table, timestamp_field, start_date, end_date)}"
                ).to_arrow_table()

        return BanquetRetrievalJob(config, evaluate)


class _Entities:
    """The entity rows as Arrow, and their time column."""

    def __init__(self, config: RepoConfig, entity_df: pd.DataFrame | pa.Table | str | None) -> None:
        self._config = config
        self._given = entity_df

    @cached_property
    def _typed(self) -> tuple[pa.Table, str]:
        table = self._read()
        timestamp = _timestamp_column(table)
        if pa.types.is_string(table.schema.field(timestamp).type):
            parsed = pd.to_datetime(table[timestamp].to_pandas(), utc=True, format="ISO8601")
            position = table.column_names.index(timestamp)
            table = table.set_column(position, timestamp, pa.Array.from_pandas(parsed))
        return table, timestamp

    def _read(self) -> pa.Table:
        given = self._given
        if isinstance(given, str):
            with _duckdb(self._config) as con:
                return con.sql(given).to_arrow_table()
        if isinstance(given, pd.DataFrame):
            try:
                return pa.Table.from_pandas(given, preserve_index=False)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as exc:
                raise EntityFrameError(
                    f"The entity rows do not convert to Arrow: {exc}",
                    hint="Give each column values of one type.",
                ) from exc
        if isinstance(given, pa.Table):
            return given
        raise EntityFrameError(
            f"Entity rows cannot be a {type(given).__name__}.",
            hint="Give a pandas DataFrame, an Arrow table or a SQL query.",
        )

    @property
    def table(self) -> pa.Table:
        return self._typed[0]

    @property
    def timestamp(self) -> str:
        return self._typed[1]

    @property
    def range(self) -> tuple[datetime | None, datetime | None]:
        """The first and last time, aware; None where there is none."""
        times = pd.to_datetime(self.table[self.timestamp].to_pandas(), utc=True).dropna()
        if times.empty:
            return None, None
        return times.min().to_pydatetime(warn=False), times.max().to_pydatetime(warn=False)


def _timestamp_column(table: pa.Table) -> str:
    if EVENT_TIMESTAMP in table.column_names:
        return EVENT_TIMESTAMP
    times: list[str] = [field.name for field in table.schema if pa.types.is_timestamp(field.type)]
    if len(times) == 1:
        return times[0]
    raise EntityFrameError(
        f"The entity rows have no column {EVENT_TIMESTAMP!r} and {len(times)} columns of a time type.",
        hint=f"Name the time of each row {EVENT_TIMESTAMP!r}.",
    )


def _view_join(
    con: duckdb.DuckDBPyConnection,
    config: RepoConfig,
    view: FeatureView,
    features: list[str],
    full_feature_names: bool,
) -> ViewJoin:
    source = view.batch_source
    if source is None:
        raise InvalidSource(f"Feature view {view.name!r} has no batch source.", hint="Give it a FileSource.")
    table = scan(con, source, config.repo_path)
    prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
    mapping = source.field_mapping or {}
    created = source.created_timestamp_column
    return ViewJoin(
        name=view.projection.name_to_use(),
        scan=table,
        keys={
            view.projection.join_key_map.get(column.name, column.name): table.column(column.name, mapping)
            for column in view.entity_columns
            if column.name != DUMMY_ENTITY_ID
        },
        features={prefix + feature: table.column(feature, mapping) for feature in features},
        timestamp=table.column(source.timestamp_field, mapping),
        created=table.column(created, mapping) if created else None,
        ttl=view.ttl or timedelta(0),
    )


def _refuse_collisions(
    table: pa.Table, views: list[ViewJoin], on_demand: list[OnDemandFeatureView], full_feature_names: bool
) -> None:
    names = [name for view in views for name in view.features]
    for view in on_demand:
        prefix = f"{view.projection.name_to_use()}__" if full_feature_names else ""
        names += [prefix + feature.name for feature in view.projection.features]
    taken = sorted(set(table.column_names) & set(names))
    if taken:
        raise EntityFrameError(
            f"The entity rows have columns named like features: {', '.join(taken)}.",
            hint="Rename them, or ask for full_feature_names=True.",
        )


def _pulled_columns(
    table: Scan, keys: list[str], features: list[str], timestamp: str, created: str | None
) -> str:
    """The select list of a pull; no features named means every column, as in Feast's other stores."""
    wanted = [*keys, *features, timestamp, *([created] if created else [])]
    for name in wanted:
        table.column(name, {})
    if not features:
        wanted = list(table.columns)
    columns = [identifier(name) for name in dict.fromkeys(wanted)]
    if not keys and DUMMY_ENTITY_ID not in table.columns:
        columns.append(f"'{DUMMY_ENTITY_VAL}' AS {DUMMY_ENTITY_ID}")
    return ", ".join(columns)


def _window(table: Scan, timestamp: str, start: datetime | None, end: datetime | None) -> str:
    kind = table.columns[timestamp]
    return within(identifier(timestamp), kind, _microseconds(start), _microseconds(end))


def _microseconds(time: datetime | None) -> int | None:
    """Since the epoch; a naive time is UTC."""
    if time is None:
        return None
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
