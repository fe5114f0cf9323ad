"""What Feast asks for, as the point-in-time join takes it: entity rows, and feature views on their sources.

Knows Feast's objects and no SQL of the join; ``core.offline`` is Feast's interface in front of it.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from feast import FeatureView, Field, OnDemandFeatureView, RepoConfig
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID
from feast.infra.registry.base_registry import BaseRegistry
from feast.type_map import feast_value_type_to_pa

from core.comparison import within
from core.errors import EntityFrameError, InvalidRepository, InvalidSource
from core.point_in_time import ViewJoin
from core.source import UNREADABLE, Scan, connect, identifier, literal, scan

EVENT_TIMESTAMP = "event_timestamp"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@contextmanager
def session(config: RepoConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB as the ``offline_store`` section says; its spill files go when it closes."""
    store = config.offline_store
    with tempfile.TemporaryDirectory(prefix="banquet-", ignore_cleanup_errors=True) as scratch:
        spill = (
            Path(config.repo_path or ".") / store.temp_directory if store.temp_directory else Path(scratch)
        )
        con = connect(memory_limit=store.memory_limit, threads=store.threads, temp_directory=spill)
        try:
            yield con
        except duckdb.OutOfMemoryException as exc:
            raise InvalidRepository(
                f"The work does not fit into offline_store.memory_limit ({store.memory_limit or 'default'}): "
                f"{str(exc).splitlines()[0]}",
                hint="Raise memory_limit, or give temp_directory a larger disk.",
            ) from exc
        except UNREADABLE as exc:
            raise InvalidSource(f"A source cannot be read: {exc}") from exc
        finally:
            con.close()


class EntityRows:
    """The entity rows as Arrow, and their time column."""

    def __init__(self, config: RepoConfig, entity_df: pd.DataFrame | pa.Table | str) -> None:
        self._config = config
        self._given = entity_df

    @cached_property
    def _typed(self) -> tuple[pa.Table, str]:
        table = self._read()
        timestamp = _timestamp_column(table)
        kind = table.schema.field(timestamp).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            try:
                parsed = pd.to_datetime(table[timestamp].to_pandas(), utc=True, format="ISO8601")
            except ValueError as exc:
                raise EntityFrameError(
                    f"Column {timestamp!r} of the entity rows does not read as times: {exc}",
                    hint="Write them as ISO 8601, or give the column a time type.",
                ) from exc
            position = table.column_names.index(timestamp)
            table = table.set_column(position, timestamp, pa.Array.from_pandas(parsed))
        return table, timestamp

    def _read(self) -> pa.Table:
        given = self._given
        if isinstance(given, str):
            with session(self._config) as con:
                con.execute(
                    f"SET file_search_path = {literal(str(Path(self._config.repo_path or '.').absolute()))}"
                )
                try:
                    return con.sql(given).to_arrow_table()
                except duckdb.Error as exc:
                    raise EntityFrameError(f"The entity query fails: {exc}") from exc
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


def join_keys(view: FeatureView) -> dict[str, str]:
    """What the entity rows call the view's join keys, and the keys."""
    return {
        view.projection.join_key_map.get(column.name, column.name): column.name
        for column in view.entity_columns
        if column.name != DUMMY_ENTITY_ID
    }


def view_join(
    con: duckdb.DuckDBPyConnection,
    config: RepoConfig,
    source: DataSource | None,
    *,
    name: str,
    keys: Mapping[str, str],
    features: Mapping[str, str],
    ttl: timedelta | None,
) -> ViewJoin:
    """One view's side of the join: ``keys`` and ``features`` map names of the result to the view's own."""
    if source is None:
        raise InvalidSource(f"Feature view {name!r} has no batch source.", hint="Give it a FileSource.")
    table = scan(con, source, config.repo_path)
    mapping = source.field_mapping or {}
    created = source.created_timestamp_column
    return ViewJoin(
        name=name,
        scan=table,
        keys={asked: table.column(key, mapping) for asked, key in keys.items()},
        features={asked: table.column(feature, mapping) for asked, feature in features.items()},
        timestamp=table.column(source.timestamp_field, mapping),
        created=table.column(created, mapping) if created else None,
        ttl=ttl or timedelta(0),
    )


def on_demand_views(references: list[str], project: str, registry: BaseRegistry) -> list[OnDemandFeatureView]:
    """The on-demand views among feature references, each able to transform a table.

    Feast calls the function of a singleton view, which takes one row, with whole columns; here it gets rows.
    """
    views = OnDemandFeatureView.get_requested_odfvs(references, project, registry)
    return [_row_by_row(view) if view.singleton and view.mode == "python" else view for view in views]


def _row_by_row(view: OnDemandFeatureView) -> OnDemandFeatureView:
    changed = copy.copy(view)
    changed.feature_transformation = _Singleton(view.feature_transformation.udf)
    return changed


class _Singleton:
    """Stands in for Feast's transformation where only tables are transformed."""

    def __init__(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._function = function

    def transform_arrow(self, table: pa.Table, features: Sequence[Field]) -> pa.Table:
        results = [self._function(row) for row in table.to_pylist()]
        columns = {}
        for feature in features:
            kind = feast_value_type_to_pa(feature.dtype.to_value_type())
            columns[feature.name] = pa.array([result[feature.name] for result in results], kind)
        return pa.table(columns)


def keys_seen(
    con: duckdb.DuckDBPyConnection, views: Sequence[ViewJoin], start: datetime, end: datetime
) -> pa.Table:
    """The distinct keys of every view's rows in the window; null where another view's key is meant."""
    queries = []
    for view in views:
        own = [identifier(name) for name in view.keys.values()]
        named = [f"{name} AS {identifier(key)}" for name, key in zip(own, view.keys, strict=True)]
        present = "".join(f" AND {name} IS NOT NULL" for name in own)
        within_window = window(view.scan, view.timestamp, start, end)
        if own:
            queries.append(
                f"(SELECT DISTINCT {', '.join(named)} FROM {view.scan.table} WHERE {within_window}{present})"
            )
    columns = {}
    if queries:
        union = " UNION ALL BY NAME ".join(queries)
        seen = con.sql(f"SELECT DISTINCT * FROM ({union}) ORDER BY ALL").to_arrow_table()
        columns = {name: seen[name] for name in seen.column_names}
    rows = seen.num_rows if queries else 1
    columns[EVENT_TIMESTAMP] = pa.array(np.full(rows, _microseconds(end)), pa.timestamp("us", "UTC"))
    return pa.table(columns)


def check_columns(
    table: pa.Table,
    views: Sequence[ViewJoin],
    on_demand: Sequence[OnDemandFeatureView],
    full_feature_names: bool,
) -> None:
    """Refuse what would end in two columns of one name, or in an on-demand view without its inputs."""
    names = [name for view in views for name in view.features]
    for view in on_demand:
        prefix = f"{view.projection.name_to_use()}__" if full_feature_names else ""
        names += [prefix + feature.name for feature in view.projection.features]
        absent = [name for name in view.get_request_data_schema() if name not in table.column_names]
        if absent:
            raise EntityFrameError(
                f"The entity rows have no column {', '.join(absent)}, "
                f"which on-demand view {view.name!r} takes as input."
            )
    taken = sorted(set(table.column_names) & set(names))
    if taken:
        raise EntityFrameError(
            f"The entity rows have columns named like features: {', '.join(taken)}.",
            hint="Rename them, or ask for full_feature_names=True.",
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EntityFrameError(
            f"Several of the features asked for would be called {', '.join(twice)}.",
            hint="Ask for full_feature_names=True, or give one of the views another name in the service.",
        )


def window(table: Scan, timestamp: str, start: datetime | None, end: datetime | None) -> str:
    kind = table.columns[timestamp]
    return within(identifier(timestamp), kind, _microseconds(start), _microseconds(end))


def _microseconds(time: datetime | None) -> int | None:
    """Since the epoch; a naive time is UTC."""
    if time is None:
        return None
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time
    return (aware - EPOCH) // timedelta(microseconds=1)
