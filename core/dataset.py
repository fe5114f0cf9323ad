"""Point-in-time training sets: the sole historical read, on any Feast offline store (contract 2).

Returns exactly the rows it was given, in their order, with features by name in the order of the service;
anything else from the offline store is an error. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core import contract, dataset_lock, layout
from core.comparison import not_a_time
from core.dataset_lock import DatasetLock, Moved
from core.errors import Conflict, DatasetMismatch, EntityFrameError, InvalidSource
from core.online import FeaturePlan, FeatureVectors
from core.repository import FeastRepository
from core.types import Dtype, FeatureStatus, feature_name

if TYPE_CHECKING:
    import pandas as pd

TIMESTAMP = "event_timestamp"
_ROW = "banquet_row"
_OURS = "core.offline.BanquetOfflineStore"
_ROWS_PER_GROUP = 128 * 1024


@dataclass(frozen=True)
class Dataset:
    """Entity columns, then ``view__feature`` columns; a row for each entity row, in their order."""

    table: pa.Table
    lock: DatasetLock
    lock_path: Path | None = None

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The table as pandas has it."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What became of an attempt to rebuild a dataset.

    ``content_digest`` is None where it could not be rebuilt at all; ``moved`` names the inputs that are not
    what they were, whether or not that changed the content.
    """

    lock: DatasetLock
    content_digest: str | None
    moved: tuple[Moved, ...]

    @property
    def same(self) -> bool:
        """The rebuilt dataset has the digest in the lock."""
        return self.content_digest == self.lock.content_digest


def training_dataset(
    repository: FeastRepository,
    service: str,
    entities: pd.DataFrame | pa.Table | Path,
    *,
    output: Path | None = None,
) -> Dataset:
    """Join the features of ``service`` to the entity rows, each as of its own ``event_timestamp``.

    Args:
        repository: where the definitions are.
        service: the feature service.
        entities: join keys, request-time inputs, ``event_timestamp`` and any other columns, which come back
            as they are; or a Parquet file of them. Naive times are UTC.
        output: a .parquet file to write, with ``<name>.lock.json`` beside it; each appears when complete.

    Raises:
        FeatureServiceNotFound: there is no such service.
        EntityFrameError: the entity rows cannot be joined.
        InvalidSource: a source cannot be read.
        DatasetMismatch: the offline store returned other rows than it was given.
        Conflict: ``output`` holds the entity rows, or is a file that is no training set.
    """
    if output is not None:
        _check_output(output, entities)
    rows = _entity_table(entities)
    # Before Feast is imported, which takes seconds.
    plan, needed = _planned(repository, service, rows)
    # Sources that change while the join runs must not end up in the lock as what was read.
    sources = dataset_lock.source_fingerprints(repository, service)
    table = _join(repository, service, rows, plan, needed)
    path = entities if isinstance(entities, Path) else None
    lock = DatasetLock(
        service=service,
        rows=table.num_rows,
        content_digest=dataset_lock.content_digest(table),
        columns=dataset_lock.column_types(table),
        definitions=dataset_lock.definition_digests(repository, service),
        sources=sources,
        entities=dataset_lock.EntityRows(
            str(path.absolute()) if path else None,
            tuple(rows.column_names),
            rows.num_rows,
            dataset_lock.content_digest(rows),
        ),
        offline_store=_offline_store(repository),
    )
    if output is None:
        return Dataset(table, lock)
    return _write(table, lock, output)


def reproduce(repository: FeastRepository, lock_path: Path) -> Reproduction:
    """Rebuild a dataset from its lock and compare.

    Raises:
        InvalidLock: the lock cannot be read.
        FeatureServiceNotFound, FeatureNotFound: the service, or a view of it, is gone.
        DatasetMismatch: the offline store returned other rows than it was given.
    """
    lock = DatasetLock.read(lock_path)
    folder = lock_path.parent
    entities = lock.entities
    now = replace(
        lock,
        definitions=dataset_lock.definition_digests(repository, lock.service),
        sources=dataset_lock.source_fingerprints(repository, lock.service),
        offline_store=_offline_store(repository),
        libraries=dataset_lock.libraries(),
    )
    file = folder / (entities.path or lock.dataset or "")
    try:
        rows = _entity_table(file)
        rows = rows.select(list(entities.columns))
    except (EntityFrameError, KeyError):
        gone = Moved("entities", str(file), f"{entities.rows} rows", "unreadable")
        return Reproduction(lock, None, (*dataset_lock.differences(lock, now), gone))
    found = replace(entities, rows=rows.num_rows, digest=dataset_lock.content_digest(rows))
    moved = dataset_lock.differences(lock, replace(now, entities=found))
    try:
        joined = _join(repository, lock.service, rows, *_planned(repository, lock.service, rows))
        digest = dataset_lock.content_digest(joined)
    except (InvalidSource, EntityFrameError):
        if not moved:
            raise
        return Reproduction(lock, None, moved)
    return Reproduction(lock, digest, moved)


def historical_vectors(
    repository: FeastRepository, service: str, entities: pd.DataFrame | pa.Table | Path
) -> FeatureVectors:
    """What the online read would have answered for each entity row at its ``event_timestamp``.

    Values have the types the online store gives back, statuses follow ``core.contract``: the same join as
    for training, without its ttl, which is applied after it. On-demand features are computed by Feast's own
    transformation for training; they are PRESENT, or NULL_VALUE where they are empty.

    Raises:
        FeatureServiceNotFound: there is no such service.
        EntityFrameError: the entity rows cannot be joined.
        InvalidSource: a source cannot be read, or is not a file.
    """
    from core.point_in_time import point_in_time_join
    from core.retrieval import session, view_join

    definitions = repository.definitions()
    plan = FeaturePlan.for_service(definitions, service)
    rows = _entity_table(entities)
    _check_entities(plan, service, rows)
    stored, _ = dataset_lock.views_behind(definitions, service)
    config = repository.store().config
    with session(config) as con:
        joins = [
            view_join(
                con,
                config,
                dataset_lock.batch_source(repository, projection),
                name=name,
                keys={projection.join_key_map.get(k.name, k.name): k.name for k in view.join_keys},
                features={feature_name(name, f): f for f in projection.features},
                ttl=view.ttl,
            )
            for name, (projection, view) in stored.items()
        ]
        joined = point_in_time_join(con, rows, TIMESTAMP, joins, expired=True)
    vectors = FeatureVectors(rows.num_rows, {}, {}, {})
    for name, (projection, view) in stored.items():
        statuses = [FeatureStatus(status) for status in joined.statuses[name]]
        for feature in projection.features:
            column = feature_name(name, feature)
            values = _as_online(joined.features[column], view.feature(feature).dtype)
            vectors.values[column], vectors.statuses[column] = contract.apply_status(values, statuses)
        vectors.event_ns[name] = [
            None if status is FeatureStatus.NOT_FOUND else int(event)
            for status, event in zip(statuses, joined.event_ns[name], strict=True)
        ]
    computed = _on_demand(repository, plan, rows, joined.features)
    for column, found in computed.items():
        values = [None if value != value else value for value in _as_online(found, plan.dtypes[column])]
        vectors.values[column], vectors.statuses[column] = contract.apply_status(values, None)
    return vectors


def _on_demand(
    repository: FeastRepository, plan: FeaturePlan, rows: pa.Table, features: pa.Table
) -> dict[str, pa.ChunkedArray]:
    """The service's on-demand features, by Feast's own transformation for training."""
    wanted = [name for name in plan.names if name not in plan.stored_in]
    if not wanted:
        return {}
    from feast.infra.offline_stores.offline_store import RetrievalMetadata

    from core.offline import BanquetRetrievalJob
    from core.retrieval import on_demand_views

    store = repository.store()
    references = [name.replace("__", ":", 1) for name in wanted]
    table = pa.table({n: t[n] for t in (rows, features) for n in t.column_names})
    job = BanquetRetrievalJob(
        store.config,
        lambda: table,
        full_feature_names=True,
        on_demand_feature_views=on_demand_views(references, repository.project, store.registry),
        metadata=lambda: RetrievalMetadata(references, []),
    )
    computed = job.to_arrow()
    return {name: computed[name] for name in wanted}


def _as_online(column: pa.ChunkedArray, dtype: Dtype) -> list[Any]:
    """Values as the online store gives them back: through its own bytes and back."""
    values = column.to_pylist()
    if pa.types.is_map(column.type):
        values = [None if value is None else dict(value) for value in values]
    return layout.decode_column([layout.encode_value(value, dtype) for value in values], dtype)


def _entity_table(entities: pd.DataFrame | pa.Table | Path) -> pa.Table:
    try:
        if isinstance(entities, Path):
            return pq.read_table(entities)
        if isinstance(entities, pa.Table):
            return entities
        return pa.Table.from_pandas(entities, preserve_index=False)
    except (OSError, pa.ArrowInvalid, pa.ArrowTypeError) as exc:
        raise EntityFrameError(
            f"The entity rows cannot be read: {exc}",
            hint="Write them as a Parquet file." if isinstance(entities, Path) else None,
        ) from exc


def _planned(repository: FeastRepository, service: str, rows: pa.Table) -> tuple[FeaturePlan, list[str]]:
    """The plan of the service, and the columns of the entity rows that its join needs."""
    plan = FeaturePlan.for_service(repository.definitions(), service)
    return plan, _check_entities(plan, service, rows)


def _check_entities(plan: FeaturePlan, service: str, rows: pa.Table) -> list[str]:
    """The columns that the join needs, which must be there; the rest must not be named like a feature."""
    needed = [TIMESTAMP, *(key.name for key in plan.join_keys), *plan.request_inputs]
    absent = [name for name in needed if name not in rows.column_names]
    if absent:
        raise EntityFrameError(
            f"The entity rows have no column {', '.join(absent)}.", hint=_columns_needed(plan, service)
        )
    taken = [name for name in rows.column_names if name in plan.dtypes]
    if taken:
        raise EntityFrameError(
            f"The entity rows have columns named like features: {', '.join(taken)}.", hint="Rename them."
        )
    kind = rows.schema.field(TIMESTAMP).type
    if not _holds(kind, Dtype.UNIX_TIMESTAMP):
        raise not_a_time(TIMESTAMP, kind)
    for name, definition in plan.request_inputs.items():
        kind = rows.schema.field(name).type
        # A time may come as seconds here: functions do as they like with it.
        if definition.dtype is not Dtype.UNIX_TIMESTAMP and not _holds(kind, definition.dtype):
            raise EntityFrameError(
                f"Request-time input {name!r} is {kind} in the entity rows, {definition.dtype.name} in the "
                "definitions.",
                hint=f"Convert the column {name!r} of the entity rows.",
            )
    return needed


def _columns_needed(plan: FeaturePlan, service: str) -> str:
    keys = ", ".join(f"{key.name} ({key.dtype.name})" for key in plan.join_keys)
    inputs = ", ".join(f"{name} ({input.dtype.name})" for name, input in plan.request_inputs.items())
    parts = [f"{service} needs {TIMESTAMP}, the time of each row"]
    parts += [f"the join keys {keys}"] if keys else []
    parts += [f"the request-time inputs {inputs}"] if inputs else []
    clocks = [name for name, input in plan.request_inputs.items() if input.tags.get("default") == "now"]
    told = [f" {name} is {TIMESTAMP} in epoch seconds." for name in clocks]
    return "; ".join(parts) + "." + "".join(told)


def _holds(kind: pa.DataType, dtype: Dtype) -> bool:
    """Whether a column of ``kind`` can hold values of ``dtype``, by its kind alone.

    Whole floats are integers with gaps, text may be a time. Other dtypes than these are not judged.
    """
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if dtype in {Dtype.INT32, Dtype.INT64, Dtype.FLOAT, Dtype.DOUBLE, Dtype.DECIMAL}:
        holds = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    elif dtype is Dtype.BOOL:
        holds = types.is_boolean(kind)
    elif dtype is Dtype.STRING:
        holds = text
    else:
        holds = dtype is not Dtype.UNIX_TIMESTAMP or types.is_timestamp(kind) or types.is_date(kind) or text
    return bool(holds or types.is_null(kind))


def _join(
    repository: FeastRepository, service: str, rows: pa.Table, plan: FeaturePlan, needed: list[str]
) -> pa.Table:
    """``rows`` with the features of ``service``, whatever the offline store makes of their order.

    The store gets the columns it needs and a row number; everything else stays here, so that no store can
    lose, convert or trip over a label.
    """
    numbered = rows.select(list(dict.fromkeys(needed)))
    numbered = numbered.append_column(_ROW, pa.array(np.arange(rows.num_rows)))
    store = repository.store()
    # Feast hands an Arrow table through; only our own store is known to take one.
    given = numbered if _offline_store(repository) == _OURS else numbered.to_pandas()
    job = store.get_historical_features(given, store.get_feature_service(service), full_feature_names=True)
    found = job.to_arrow()
    lacking = [name for name in (_ROW, *plan.names) if name not in found.column_names]
    if lacking:
        raise DatasetMismatch(f"The offline store returned no column {', '.join(lacking)}.")
    order = found[_ROW].to_numpy()
    if not np.array_equal(np.sort(order), np.arange(rows.num_rows)):
        raise DatasetMismatch(
            f"The offline store returned {found.num_rows} rows for {rows.num_rows} entity rows"
            f" ({len(np.unique(order))} of them distinct).",
            hint=f"Set `offline_store: {{type: {_OURS}}}`.",
        )
    features = found.select(plan.names)
    if not np.array_equal(order, np.arange(rows.num_rows)):
        features = features.take(pa.array(np.argsort(order)))
    return pa.table(
        {name: table[name] for table in (rows, features) for name in table.column_names},
        metadata=rows.schema.metadata,
    )


def _offline_store(repository: FeastRepository) -> str:
    store = repository.config.get("offline_store")
    return str(store.get("type", "dask") if isinstance(store, dict) else store or "dask")


def _check_output(output: Path, entities: object) -> None:
    """Nothing is overwritten but an earlier training set, which has its lock beside it."""
    if isinstance(entities, Path) and output.resolve() == entities.resolve():
        raise Conflict(f"{output} holds the entity rows.", hint="Write to another file.")
    lock = output.with_suffix(".lock.json")
    if output.exists() and not lock.exists():
        raise Conflict(
            f"{output} exists and is no training set: there is no {lock.name} beside it.",
            hint="Write to another file, or delete this one first.",
        )


def _write(table: pa.Table, lock: DatasetLock, output: Path) -> Dataset:
    from fsspec.implementations.local import LocalFileSystem

    from core import parquet

    output = output.absolute()
    lock_path = output.with_suffix(".lock.json")
    entities = lock.entities
    if entities.path:
        entities = replace(entities, path=dataset_lock.relative(Path(entities.path), output.parent))
    lock = replace(lock, dataset=output.name, entities=entities)
    system = LocalFileSystem()
    # The lock goes first and comes last: a dataset without one is plainly unfinished.
    lock_path.unlink(missing_ok=True)
    parquet.replace(
        system, str(output), lambda file: pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP)
    )
    parquet.replace(system, str(lock_path), lambda file: file.write(lock.to_json().encode()))
    return Dataset(table, lock, lock_path)
