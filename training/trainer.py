"""From a model spec to a registered version: point-in-time rows, a split by time, fit, judge, register.

Reads features only through ``core.dataset`` and makes the matrix only through ``core.model``, so that the
estimator is fitted on what serving will give it.
"""

from __future__ import annotations

import io
import pickle
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.compiled import SklearnRunner
from core.dataset import training_dataset
from core.errors import InvalidModelSpec
from core.manifest import (
    BASELINE_FILE,
    MODEL_FILE,
    Default,
    GoldenRow,
    ModelManifest,
    ServiceSchema,
    TrainingWindow,
    finite_or_none,
)
from core.model import MATRIX_DTYPES, LoadedModel, MatrixBuilder
from core.online import FeaturePlan
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.repository import FeastRepository
from core.types import Dtype
from training import evaluation
from training.compiler import compile_estimator
from training.spec import MatrixColumns, ModelSpec

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]
Say = Callable[[str], None]

BASELINE_ROWS = 2_000
GOLDEN_ROWS = 20
COMPARED_ROWS = 20_000
MAX_CATEGORIES = 10_000
_LIBRARIES = ("scikit-learn", "numpy", "onnxruntime", "feast", "feast-banquet")


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What came out: the manifest, the alias it got, and whether it beats every baseline."""

    manifest: ModelManifest
    alias: str
    beats_baselines: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        m = self.manifest
        return {
            "name": m.name,
            "version": m.version,
            "alias": self.alias,
            "beats_baselines": self.beats_baselines,
            "metrics": dict(m.metrics),
            "training_rows": m.window.training_rows,
            "holdout_rows": m.window.holdout_rows,
            "form": m.compiled.form,
            "seconds": round(self.seconds, 1),
        }


def train(
    repository: FeastRepository, registry: ModelRegistry, spec: ModelSpec, *, say: Say = lambda _: None
) -> TrainingReport:
    """Train and register one version: champion if the model has none, else challenger.

    Raises:
        InvalidModelSpec: the entity rows, the label or the estimator do not fit the spec.
        FeatureServiceNotFound: the service is not registered.
        DatasetMismatch, EntityFrameError: the point-in-time join could not be made.
    """
    started = time.monotonic()
    entities = entity_rows(repository, spec)
    schema = _schema(repository, spec)
    say(f"joining {len(entities):,} entity rows with {spec.service}")
    dataset = training_dataset(repository, spec.service, entities)
    parts, window = split_by_time(entities["event_timestamp"], spec)
    say(f"fitting on {window.training_rows:,} rows, judging on the last {window.holdout_rows:,}")
    labels, classes = _labels(entities[spec.label], spec, parts["training"])
    values = {feature.name: _raw(dataset.frame[feature.name]) for feature in schema.features}
    vocabulary = {
        f.name: _vocabulary(f.name, values[f.name], parts["training"])
        for f in schema.features
        if f.dtype is Dtype.STRING
    }
    _check_defaults(spec, schema, vocabulary)
    matrix = MatrixBuilder(schema.features, vocabulary, spec.policy).build(values, len(entities))
    columns = MatrixColumns(tuple(values), vocabulary)
    estimator = _fit(spec, columns, matrix, labels, parts)
    pickled = _pickled(spec, estimator)

    compiled, graph = compile_estimator(estimator, matrix[_evenly(len(matrix), COMPARED_ROWS)])
    say(f"runs as {compiled.form}" + (f" ({compiled.reason})" if compiled.reason else ""))
    draft = ModelManifest(
        name=spec.name,
        version=1,
        created=datetime.now(tz=UTC),
        description=spec.description,
        task=spec.task,
        schema=schema,
        label=spec.label,
        classes=classes,
        threshold=spec.threshold,
        policies=dict(spec.policy),
        vocabulary=vocabulary,
        window=window,
        dataset_digest=dataset.lock.content_digest,
        libraries=_libraries(),
        golden=(),
        compiled=compiled,
        artifacts={MODEL_FILE: "0" * 64, compiled.artifact: "0" * 64},
    )
    model = LoadedModel(draft, SklearnRunner(estimator))
    _check_predictions(spec, model, estimator, matrix[parts["holdout"]])
    recency = None if spec.recency_feature is None else columns.index(spec.recency_feature)
    metrics, beats = evaluation.judge(model, matrix, labels, parts, recency=recency)
    sample = _sample(parts["training"])
    golden = _golden(model, values, matrix, sample)
    files = {MODEL_FILE: pickled, BASELINE_FILE: _parquet(dataset.frame.loc[sample, list(values)])}
    if graph is not None:
        files[compiled.artifact] = graph

    def describe(number: int, digests: Mapping[str, str]) -> ModelManifest:
        return replace(
            draft,
            version=number,
            created=datetime.now(tz=UTC),
            metrics=finite_or_none(metrics),
            golden=golden,
            artifacts=dict(digests),
        )

    manifest = registry.register(spec.name, files, describe)
    alias = CHALLENGER if CHAMPION in registry.aliases(spec.name) else CHAMPION
    registry.set_alias(spec.name, alias, manifest.version, why="trained")
    return TrainingReport(manifest, alias, beats, time.monotonic() - started)


def entity_rows(repository: FeastRepository, spec: ModelSpec) -> pd.DataFrame:
    """The spec's entity rows, ordered by event timestamp.

    Raises:
        InvalidModelSpec: they cannot be read, are empty, or lack the label or a zoned ``event_timestamp``.
    """
    import pandas as pd

    if callable(spec.entities):
        frame = spec.entities(repository.path)
    else:
        path = repository.path / spec.entities
        if not path.is_file():
            raise InvalidModelSpec(f"The entity rows of model spec {spec.name!r} are not there: {path}.")
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        if path.suffix == ".csv" and "event_timestamp" in frame:
            frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True)
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


def split_by_time(timestamps: pd.Series[Any], spec: ModelSpec) -> tuple[dict[str, Array], TrainingWindow]:
    """Row positions of the ``training``, ``calibration`` and ``holdout`` parts, in time order.

    A row is left out (the embargo) when its label was not known before the next part began.

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
    parts = {name: np.flatnonzero(mask.to_numpy()) for name, mask in masks.items()}
    for name, rows in parts.items():
        if len(rows) == 0 and (name != "calibration" or spec.calibration):
            raise InvalidModelSpec(
                f"The {name} part of model spec {spec.name!r} is empty: its rows go from {first} to {last}.",
                hint="Shorten holdout, calibration or label_horizon, or bring more rows.",
            )
    used = sum(len(rows) for rows in parts.values())
    window = TrainingWindow(
        start=first.to_pydatetime(),
        split=split.to_pydatetime(),
        end=last.to_pydatetime(),
        training_rows=len(parts["training"]),
        calibration_rows=len(parts["calibration"]),
        holdout_rows=len(parts["holdout"]),
        embargoed_rows=len(timestamps) - used,
    )
    return parts, window


def _schema(repository: FeastRepository, spec: ModelSpec) -> ServiceSchema:
    schema = FeaturePlan.for_service(repository.definitions(), spec.service).schema(spec.service)
    for feature in schema.features:
        if feature.dtype not in MATRIX_DTYPES:
            raise InvalidModelSpec(
                f"Feature {feature.name} is {feature.dtype.name}, which has no place in a numeric matrix.",
                hint="Leave it out of the feature service, or derive a number from it in an on-demand view.",
            )
    names = {feature.name for feature in schema.features}
    unknown = sorted(set(spec.policy) - names)
    if unknown:
        raise InvalidModelSpec(f"Model spec {spec.name!r} has policies for unknown features: {unknown}.")
    return schema


def _labels(column: pd.Series[Any], spec: ModelSpec, training: Array) -> tuple[Array, tuple[Any, ...]]:
    """The labels as an array of one plain dtype, and the classes in its order; a regressor has none."""
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


def _raw(column: pd.Series[Any]) -> Any:
    """A feature column as ``LoadedModel.matrix`` takes it."""
    import pandas as pd

    if isinstance(column.dtype, pd.DatetimeTZDtype):
        seconds = (
            column.astype("int64").to_numpy() / {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[column.dtype.unit]
        )
        return np.where(column.isna(), np.nan, np.floor(seconds))
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return [None if empty else value for value, empty in zip(column, column.isna(), strict=True)]


def _vocabulary(name: str, values: Any, training: Array) -> tuple[str, ...]:
    found = {values[row] for row in training.tolist()} - {None}
    if len(found) > MAX_CATEGORIES:
        raise InvalidModelSpec(
            f"Feature {name} has {len(found):,} distinct values in the training part.",
            hint=f"A string feature is a category, of at most {MAX_CATEGORIES:,}; leave this one out of the "
            "feature service or group it in an on-demand view.",
        )
    return tuple(sorted(found))


def _check_defaults(
    spec: ModelSpec, schema: ServiceSchema, vocabulary: Mapping[str, tuple[str, ...]]
) -> None:
    """A default must be a value that the feature could have."""
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


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _fit(
    spec: ModelSpec, columns: MatrixColumns, matrix: Array, labels: Array, parts: Mapping[str, Array]
) -> Any:
    try:
        estimator = spec.build(columns).fit(matrix[parts["training"]], labels[parts["training"]])
        if spec.calibration is not None:
            from sklearn.calibration import CalibratedClassifierCV
            from sklearn.frozen import FrozenEstimator

            estimator = CalibratedClassifierCV(FrozenEstimator(estimator), method=spec.calibration_method)
            estimator.fit(matrix[parts["calibration"]], labels[parts["calibration"]])
    except InvalidModelSpec:
        raise
    except Exception as exc:
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} could not be built or fitted: "
            f"{type(exc).__name__}: {exc}",
            hint="It gets a float64 matrix with NaN where a value is missing; see ModelSpec.",
        ) from exc
    if hasattr(estimator, "classes_") != (spec.task == "classification"):
        raise InvalidModelSpec(
            f"{type(estimator).__name__} does not do {spec.task}.",
            hint='Set `task` to "classification" or "regression" as the estimator does.',
        )
    return estimator


def _pickled(spec: ModelSpec, estimator: Any) -> bytes:
    import joblib

    content = io.BytesIO()
    try:
        joblib.dump(estimator, content, compress=3)
    except (pickle.PicklingError, AttributeError, TypeError) as exc:
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} cannot be stored: {exc}.",
            hint="A class or function that it uses must live in an installed module, not in the spec's file.",
        ) from exc
    return content.getvalue()


def _check_predictions(spec: ModelSpec, model: LoadedModel, estimator: Any, matrix: Array) -> None:
    """An estimator may predict another class than its most likely one; here the spec has to say so."""
    if spec.task == "regression" or spec.threshold is not None:
        return
    if model.predict(matrix).labels != estimator.predict(matrix).tolist():
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} does not predict its most likely class.",
            hint="Predictions follow the probabilities: set `threshold`, or leave the choice to them.",
        )


def _sample(training: Array) -> Array:
    """Positions of the baseline sample: the same rows for the same training part."""
    generator = np.random.default_rng(0)
    size = min(BASELINE_ROWS, len(training))
    return np.sort(generator.choice(training, size=size, replace=False))


def _evenly(rows: int, at_most: int) -> Array:
    """Positions spread evenly over ``rows``."""
    return np.unique(np.linspace(0, rows - 1, num=min(rows, at_most), dtype=np.int64))


def _parquet(frame: pd.DataFrame) -> bytes:
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    return content.getvalue()


def _golden(
    model: LoadedModel, values: Mapping[str, Any], matrix: Array, sample: Array
) -> tuple[GoldenRow, ...]:
    """Rows spread over the sample, those that miss most among them, with what the model says."""
    missing = np.isnan(matrix[sample]).sum(axis=1)
    by_missing = sample[np.argsort(-missing, kind="stable")]
    spread = sample[_evenly(len(sample), GOLDEN_ROWS)]
    chosen = list(dict.fromkeys([*by_missing[: GOLDEN_ROWS // 4].tolist(), *spread.tolist()]))[:GOLDEN_ROWS]
    predicted = model.predict(matrix[chosen])
    rows = []
    for i, row in enumerate(chosen):
        features = {name: _scalar(column[row]) for name, column in values.items()}
        probabilities = predicted.probabilities
        rows.append(
            GoldenRow(
                features,
                _scalar(predicted.labels[i]),
                None if probabilities is None else tuple(float(p) for p in probabilities[i]),
            )
        )
    return tuple(rows)


def _scalar(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and np.isnan(plain) else plain
