"""From a model spec to a registered version: point-in-time rows, a split by time, fit, judge, register.

Reads features only through ``core.dataset`` and makes the matrix only through ``core.model``, so that the
estimator is fitted on what serving will give it.
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.compiled import SklearnRunner, compile_estimator
from core.dataset import training_dataset
from core.errors import InvalidModelSpec
from core.manifest import (
    BASELINE_FILE,
    MODEL_FILE,
    CompiledForm,
    GoldenRow,
    ModelManifest,
    ServiceSchema,
    TrainingWindow,
    finite_or_none,
)
from core.model import MATRIX_DTYPES, LoadedModel
from core.online import FeaturePlan
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.repository import FeastRepository
from core.types import Dtype
from training import evaluation
from training.spec import MatrixColumns, ModelSpec

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]
Say = Callable[[str], None]

BASELINE_ROWS = 2_000
GOLDEN_ROWS = 20
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
        f.name: _vocabulary(values[f.name], parts["training"])
        for f in schema.features
        if f.dtype is Dtype.STRING
    }
    draft = _draft(spec, schema, classes, vocabulary, window, dataset.lock.content_digest)
    matrix = LoadedModel(draft, _NoRunner()).matrix(values, len(entities))
    estimator = _fit(spec, MatrixColumns(draft.feature_names, vocabulary), matrix, labels, parts)

    sample = _sample(parts["training"])
    compiled, graph = compile_estimator(estimator, matrix[sample], spec.task, classes)
    say(f"runs as {compiled.form}" + (f" ({compiled.reason})" if compiled.reason else ""))
    model = LoadedModel(replace(draft, compiled=compiled), SklearnRunner(estimator, spec.task, classes))
    metrics, beats = _judge(spec, model, matrix, labels, parts, draft.feature_names)
    files = _files(estimator, compiled, graph, dataset.frame, list(values), sample)
    golden = _golden(model, values, matrix, sample)

    def describe(number: int, digests: Mapping[str, str]) -> ModelManifest:
        return replace(
            draft,
            version=number,
            created=datetime.now(tz=UTC),
            metrics=finite_or_none(metrics),
            golden=golden,
            compiled=compiled,
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
        "calibration": (timestamps >= calibration) & (known <= split),
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


class _NoRunner:
    """Stands where the estimator is not fitted yet and only the matrix is wanted."""

    def scores(self, matrix: Array) -> Array:
        raise NotImplementedError


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
    """Class indices and the classes; for a regressor the values and no classes."""
    if spec.task == "regression":
        return column.to_numpy(dtype=np.float64), ()
    classes, labels = np.unique(column.to_numpy(), return_inverse=True)
    seen = np.unique(labels[training])
    if len(seen) < len(classes) or len(classes) < 2:
        raise InvalidModelSpec(
            f"The training part of model spec {spec.name!r} has {len(seen)} of {len(classes)} classes.",
            hint="A classifier needs two or more classes, each of them in the training part.",
        )
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


def _vocabulary(values: Any, training: Array) -> tuple[str, ...]:
    return tuple(sorted({values[row] for row in training.tolist()} - {None}))


def _draft(
    spec: ModelSpec,
    schema: ServiceSchema,
    classes: tuple[Any, ...],
    vocabulary: Mapping[str, tuple[str, ...]],
    window: TrainingWindow,
    dataset_digest: str,
) -> ModelManifest:
    """The manifest as far as it is known before fitting."""
    libraries = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return ModelManifest(
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
        vocabulary=dict(vocabulary),
        window=window,
        dataset_digest=dataset_digest,
        libraries=libraries,
        golden=(),
        compiled=CompiledForm("sklearn", MODEL_FILE, 0.0, True, 0),
        artifacts={MODEL_FILE: "0" * 64},
    )


def _fit(
    spec: ModelSpec, columns: MatrixColumns, matrix: Array, labels: Array, parts: Mapping[str, Array]
) -> Any:
    try:
        estimator = spec.build(columns).fit(matrix[parts["training"]], labels[parts["training"]])
    except InvalidModelSpec:
        raise
    except Exception as exc:
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} could not be built or fitted: "
            f"{type(exc).__name__}: {exc}",
            hint="It gets a float64 matrix with NaN where a value is missing; see ModelSpec.",
        ) from exc
    if spec.calibration is None:
        return estimator
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    calibrated = CalibratedClassifierCV(FrozenEstimator(estimator), method=spec.calibration_method)
    return calibrated.fit(matrix[parts["calibration"]], labels[parts["calibration"]])


def _judge(
    spec: ModelSpec,
    model: LoadedModel,
    matrix: Array,
    labels: Array,
    parts: Mapping[str, Array],
    names: tuple[str, ...],
) -> tuple[dict[str, Any], bool]:
    """Metrics on the holdout for the model and each baseline, and whether the model beats them all."""
    training, holdout = parts["training"], parts["holdout"]
    predicted = model.predict(matrix[holdout])
    truth = labels[holdout]
    if spec.task == "regression":
        metrics = evaluation.value_metrics(truth, np.array(predicted.labels))
        mean = np.full(len(truth), labels[training].mean())
        metrics["baselines"] = {"mean": evaluation.value_metrics(truth, mean)}
        return metrics, metrics["rmse"] < metrics["baselines"]["mean"]["rmse"]
    classes = model.manifest.classes
    if predicted.probabilities is None:
        index = {value: i for i, value in enumerate(classes)}
        found = np.array([index[label] for label in predicted.labels])
        most_common = np.bincount(labels[training]).argmax()
        metrics = {
            "accuracy": float((found == truth).mean()),
            "baselines": {"most_common": {"accuracy": float((truth == most_common).mean())}},
        }
        return metrics, metrics["accuracy"] > metrics["baselines"]["most_common"]["accuracy"]
    metrics = evaluation.probability_metrics(truth, predicted.probabilities)
    if len(classes) == 2:
        metrics["reliability"] = evaluation.reliability(truth, predicted.probabilities[:, 1])
    constant = evaluation.constant_probabilities(labels[training], len(classes), len(truth))
    baselines = {"constant_rate": evaluation.probability_metrics(truth, constant)}
    if spec.recency_feature is not None:
        column = MatrixColumns(names).index(spec.recency_feature)
        recency = evaluation.recency_probabilities(
            matrix[training, column], labels[training], matrix[holdout, column]
        )
        baselines["recency_only"] = evaluation.probability_metrics(truth, recency)
    metrics["baselines"] = baselines
    beats = all(
        metrics["log_loss"] < baseline["log_loss"]
        and metrics.get("roc_auc", 1.0) > baseline.get("roc_auc", 0.0)
        for baseline in baselines.values()
    )
    return metrics, beats


def _sample(training: Array) -> Array:
    """Positions of the baseline sample: the same rows for the same training part."""
    generator = np.random.default_rng(0)
    size = min(BASELINE_ROWS, len(training))
    return np.sort(generator.choice(training, size=size, replace=False))


def _files(
    estimator: Any,
    compiled: CompiledForm,
    graph: bytes | None,
    frame: pd.DataFrame,
    names: list[str],
    sample: Array,
) -> dict[str, bytes]:
    import joblib

    pickled, baseline = io.BytesIO(), io.BytesIO()
    joblib.dump(estimator, pickled, compress=3)
    frame.loc[sample, names].to_parquet(baseline, index=False)
    files = {MODEL_FILE: pickled.getvalue(), BASELINE_FILE: baseline.getvalue()}
    return files if graph is None else {**files, compiled.artifact: graph}


def _golden(
    model: LoadedModel, values: Mapping[str, Any], matrix: Array, sample: Array
) -> tuple[GoldenRow, ...]:
    """Rows spread over the sample, those that miss most among them, with what the model says."""
    missing = np.isnan(matrix[sample]).sum(axis=1)
    by_missing = sample[np.argsort(-missing, kind="stable")]
    spread = sample[np.linspace(0, len(sample) - 1, num=min(GOLDEN_ROWS, len(sample)), dtype=int)]
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
