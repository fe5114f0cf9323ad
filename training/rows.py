"""Rows to learn from: entity rows checked and split by time, and what the matrix needs to know of them.

Knows pandas and the spec; no estimator, no registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.dataset import training_dataset
from core.errors import InvalidModelSpec
from core.manifest import Default, ServiceSchema, TrainingWindow
from core.model import MATRIX_DTYPES, Matrix, MatrixBuilder, is_missing
from core.online import FeaturePlan
from core.repository import FeastRepository
from core.types import Dtype
from training.spec import MatrixColumns, ModelSpec

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Array = NDArray[Any]

MAX_CATEGORIES = 10_000


@dataclass(frozen=True, slots=True)
class Examples:
    """Everything a model is fitted and judged on; rows are in the order of their event timestamps.

    Attributes:
        schema: what the feature service serves.
        table: entity columns and features, as the point-in-time join gave them.
        values: each feature's raw values, as ``MatrixBuilder`` takes them.
        columns: what an estimator's author is told of the matrix.
        matrix: float64 (rows, features).
        labels: shape (rows,): classes, or a regressor's values.
        classes: the distinct labels in order; empty for a regressor.
        parts: row positions of ``training``, ``calibration`` and ``holdout``.
        window: the same in times and numbers.
        dataset_digest: the content digest of the dataset's lock.
    """

    schema: ServiceSchema
    table: pa.Table
    values: Mapping[str, Any]
    columns: MatrixColumns
    matrix: Matrix
    labels: Array
    classes: tuple[Any, ...]
    parts: Mapping[str, Array]
    window: TrainingWindow
    dataset_digest: str


def gather(repository: FeastRepository, spec: ModelSpec, say: Callable[[str], None]) -> Examples:
    """Read the spec's entity rows, join the features as of each row's own time, split, make the matrix.

    Raises:
        InvalidModelSpec: rows, labels or features do not fit the spec.
        FeatureServiceNotFound: the service is not registered.
        DatasetMismatch, EntityFrameError: the point-in-time join could not be made.
    """
    entities = entity_rows(repository, spec)
    schema = FeaturePlan.for_service(repository.definitions(), spec.service).schema(spec.service)
    check_features(schema, spec)
    say(f"joining {len(entities):,} entity rows with {spec.service}")
    dataset = training_dataset(repository, spec.service, entities)
    frame = dataset.frame
    values = {feature.name: raw_values(frame[feature.name], feature.dtype) for feature in schema.features}
    parts, window = split_by_time(entities["event_timestamp"], rejected_rows(values, spec), spec)
    labels, classes = labels_and_classes(entities[spec.label], spec, parts["training"])
    vocabulary = {
        feature.name: vocabulary_of(feature.name, values[feature.name], parts["training"])
        for feature in schema.features
        if feature.dtype is Dtype.STRING
    }
    check_defaults(spec, schema, vocabulary)
    return Examples(
        schema=schema,
        table=dataset.table,
        values=values,
        columns=MatrixColumns(tuple(values), vocabulary),
        matrix=MatrixBuilder(schema.features, vocabulary, spec.policy).build(values, len(frame)),
        labels=labels,
        classes=classes,
        parts=parts,
        window=window,
        dataset_digest=dataset.lock.content_digest,
    )


def entity_rows(repository: FeastRepository, spec: ModelSpec) -> pd.DataFrame:
    """The spec's entity rows, ordered by event timestamp.

    Raises:
        InvalidModelSpec: they cannot be read, are empty, or lack the label or a zoned ``event_timestamp``.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    if callable(spec.entities):
        frame = spec.entities(repository.path)
    else:
        path = repository.path / spec.entities
        if not path.is_file():
            raise InvalidModelSpec(f"The entity rows of model spec {spec.name!r} are not there: {path}.")
        # Not pandas.read_parquet: it reads through a Python file, whose threads may abort the process at its
        # end (apache/arrow#50482).
        frame = pd.read_csv(path) if path.suffix == ".csv" else pq.read_table(path).to_pandas()
        if path.suffix == ".csv" and "event_timestamp" in frame:
            frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True)
    if not isinstance(frame, pd.DataFrame):
        raise InvalidModelSpec(
            f"The entity rows of model spec {spec.name!r} are a {type(frame).__name__}, not a DataFrame."
        )
    for column in ("event_timestamp", spec.label):
        if column not in frame:
            raise InvalidModelSpec(f"The entity rows of model spec {spec.name!r} have no column {column!r}.")
    if not isinstance(frame["event_timestamp"].dtype, pd.DatetimeTZDtype):
        raise InvalidModelSpec(
            f"event_timestamp in the entity rows of {spec.name!r} has no time zone.",
            hint="Make it UTC, with pd.to_datetime(..., utc=True).",
        )
    if frame.empty or frame[spec.label].isna().any() or frame["event_timestamp"].isna().any():
        raise InvalidModelSpec(
            f"The entity rows of model spec {spec.name!r} are empty, or miss labels or timestamps.",
            hint="Leave out rows whose label is not known yet.",
        )
    ordered: pd.DataFrame = frame.sort_values("event_timestamp", kind="stable", ignore_index=True)
    return ordered


def rejected_rows(values: Mapping[str, Any], spec: ModelSpec) -> Array:
    """Which rows miss a feature whose policy is ``reject``: the model will never be asked about such rows."""
    rejected = np.zeros(len(next(iter(values.values()))), dtype=bool)
    for name, policy in spec.policy.items():
        if policy == "reject":
            rejected |= np.fromiter((is_missing(value) for value in values[name]), dtype=bool)
    return rejected


def split_by_time(
    timestamps: pd.Series[Any], rejected: Array, spec: ModelSpec
) -> tuple[dict[str, Array], TrainingWindow]:
    """Row positions of the ``training``, ``calibration`` and ``holdout`` parts, in time order.

    Rejected rows are left out, and so is (the embargo) a row whose label was not known before the next part
    began.

    Args:
        timestamps: ascending, UTC-aware.
        rejected: bool, shape (rows,).
        spec: says how long the parts are.

    Raises:
        InvalidModelSpec: a part would be empty.
    """
    first, last = timestamps.iloc[0], timestamps.iloc[-1]
    split = last - spec.holdout
    calibration = split - spec.calibration if spec.calibration else split
    known = timestamps + spec.label_horizon
    masks = {
        "training": known <= calibration,
        "calibration": (timestamps > calibration) & (known <= split),
        "holdout": timestamps > split,
    }
    parts = {name: np.flatnonzero(mask.to_numpy() & ~rejected) for name, mask in masks.items()}
    for name, rows in parts.items():
        if len(rows) == 0 and (name != "calibration" or spec.calibration):
            raise InvalidModelSpec(
                f"The {name} part of model spec {spec.name!r} is empty: its rows go from {first} to {last}.",
                hint="Shorten holdout, calibration or label_horizon, or bring more rows.",
            )
    used = sum(len(rows) for rows in parts.values())
    window = TrainingWindow(
        start=first.floor("us").to_pydatetime(),
        split=split.floor("us").to_pydatetime(),
        end=last.floor("us").to_pydatetime(),
        training_rows=len(parts["training"]),
        calibration_rows=len(parts["calibration"]),
        holdout_rows=len(parts["holdout"]),
        embargoed_rows=len(timestamps) - used - int(rejected.sum()),
        rejected_rows=int(rejected.sum()),
    )
    return parts, window


def check_features(schema: ServiceSchema, spec: ModelSpec) -> None:
    """Raise InvalidModelSpec where a feature cannot be a column, or a policy is for no feature."""
    for feature in schema.features:
        if feature.dtype not in MATRIX_DTYPES:
            raise InvalidModelSpec(
                f"Feature {feature.name} is {feature.dtype.name}, which has no place in a numeric matrix.",
                hint="Leave it out of the feature service, or derive a number from it in an on-demand view.",
            )
    unknown = sorted(set(spec.policy) - {feature.name for feature in schema.features})
    if unknown:
        raise InvalidModelSpec(
            f"Model spec {spec.name!r} has policies for unknown features: {', '.join(unknown)}."
        )


def labels_and_classes(
    column: pd.Series[Any], spec: ModelSpec, training: Array
) -> tuple[Array, tuple[Any, ...]]:
    """The labels as an array of one plain dtype, and the classes in its order; a regressor has none.

    Raises:
        InvalidModelSpec: the labels are of several types or of one that cannot be a class, or the rows at
            the positions ``training`` lack a class.
    """
    if spec.task == "regression":
        try:
            values = column.to_numpy(dtype=np.float64)
        except (TypeError, ValueError) as exc:
            raise InvalidModelSpec(
                f"The label {spec.label!r} of a regressor must be numeric: {exc}."
            ) from exc
        return values, ()
    kinds = {type(label) for label in column.tolist()}
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        raise InvalidModelSpec(
            f"The label {spec.label!r} has values of type {', '.join(sorted(k.__name__ for k in kinds))}.",
            hint="A class is an integer, a string or a boolean, the same type in every row.",
        )
    labels = np.array(column.tolist())
    classes, seen = np.unique(labels), np.unique(labels[training])
    if len(classes) < 2 or len(seen) < len(classes):
        raise InvalidModelSpec(
            f"The training part of model spec {spec.name!r} has {len(seen)} of {len(classes)} classes.",
            hint="A classifier needs two or more classes, each of them in the training part.",
        )
    if spec.threshold is not None and len(classes) > 2:
        raise InvalidModelSpec(f"Model spec {spec.name!r} has a threshold but {len(classes)} classes.")
    return labels, tuple(classes.tolist())


def raw_values(column: pd.Series[Any], dtype: Dtype) -> Any:
    """A feature column as ``LoadedModel.matrix`` takes it: an array of float64, or a list of strings."""
    import pandas as pd

    if dtype is Dtype.UNIX_TIMESTAMP and not pd.api.types.is_numeric_dtype(column):
        moments = pd.to_datetime(column, utc=True).astype("datetime64[us, UTC]")
        seconds = moments.astype("int64").to_numpy() // 1_000_000
        return np.where(moments.isna(), np.nan, seconds.astype(np.float64))
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return [None if empty else value for value, empty in zip(column, column.isna(), strict=True)]


def vocabulary_of(name: str, values: Any, training: Array) -> tuple[str, ...]:
    """The distinct strings at the positions ``training``; raises InvalidModelSpec for too many."""
    found = {values[row] for row in training.tolist()} - {None}
    if len(found) > MAX_CATEGORIES:
        raise InvalidModelSpec(
            f"Feature {name} has {len(found):,} distinct values in the training part.",
            hint=f"A string feature is a category, of at most {MAX_CATEGORIES:,}; leave this one out of the "
            "feature service or group it in an on-demand view.",
        )
    return tuple(sorted(found))


def check_defaults(spec: ModelSpec, schema: ServiceSchema, vocabulary: Mapping[str, tuple[str, ...]]) -> None:
    """Raise InvalidModelSpec for a default that is no value the feature could have."""
    for feature in schema.features:
        policy = spec.policy.get(feature.name)
        if not isinstance(policy, Default):
            continue
        text = feature.dtype is Dtype.STRING
        fits = policy.default in vocabulary[feature.name] if text else not isinstance(policy.default, str)
        if not fits:
            wanted = "a value seen in training" if text else "a number"
            raise InvalidModelSpec(
                f"The default {policy.default!r} of feature {feature.name} is not {wanted}."
            )
