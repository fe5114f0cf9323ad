"""Point-in-time training sets: the sole historical read, on any Feast offline store.

Returns exactly the rows it was given, in their order, with features by name in the order of the service;
anything else from the offline store is an error. Knows no model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import DatasetMismatch, EntityFrameError
from core.online import FeaturePlan
from core.repository import FeastRepository

if TYPE_CHECKING:
    import pandas as pd

_ROW = "banquet_row"
TIMESTAMP = "event_timestamp"


@dataclass(frozen=True, slots=True)
class DatasetLock:
    """What a dataset was made of."""

    service: str
    rows: int
    content_digest: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Entity columns, then ``view__feature`` columns, a row for each entity row."""

    frame: pd.DataFrame
    lock: DatasetLock
    lock_path: Path | None = None


def training_dataset(
    repository: FeastRepository, service: str, entities: pd.DataFrame | Path, *, output: Path | None = None
) -> Dataset:
    """Join the features of ``service`` to the entity rows, each as of its own ``event_timestamp``.

    Raises:
        FeatureServiceNotFound: there is no such service.
        EntityFrameError: the entity rows cannot be joined.
        DatasetMismatch: the offline store returned other rows than it was given.
    """
    import pandas as pd

    frame = pd.read_parquet(entities) if isinstance(entities, Path) else entities
    plan = FeaturePlan.for_service(repository.definitions(), service)
    needed = [TIMESTAMP, *(key.name for key in plan.join_keys), *plan.request_inputs]
    absent = [name for name in needed if name not in frame]
    if absent:
        raise EntityFrameError(
            f"The entity rows have no column {', '.join(absent)}.",
            hint=f"{service} needs {', '.join(needed)}.",
        )
    store = repository.store()
    given = frame.reset_index(drop=True)
    given = given.assign(**{_ROW: range(len(given))})
    job = store.get_historical_features(given, store.get_feature_service(service), full_feature_names=True)
    found = job.to_df().sort_values(_ROW, ignore_index=True)
    if len(found) != len(given) or not (found[_ROW] == given[_ROW]).all():
        raise DatasetMismatch(
            f"The offline store returned {len(found)} rows for {len(given)} entity rows.",
            hint="Set `offline_store: {type: core.offline.BanquetOfflineStore}`.",
        )
    lacking = [name for name in plan.names if name not in found]
    if lacking:
        raise DatasetMismatch(f"The offline store returned no column {', '.join(lacking)}.")
    joined = pd.concat([frame.reset_index(drop=True), found[plan.names]], axis=1)
    lock = DatasetLock(service, len(joined), _digest(joined))
    if output is not None:
        joined.to_parquet(output, index=False)
    return Dataset(joined, lock)


def _digest(frame: Any) -> str:
    import pandas as pd

    hashed = pd.util.hash_pandas_object(frame.astype(str), index=False)
    return hashlib.sha256(hashed.to_numpy().tobytes()).hexdigest()
