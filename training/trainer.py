"""From a model spec to a registered version: point-in-time rows, a split by time, fit, judge, register.

Reads features only through ``core.dataset`` and makes the matrix only through ``core.model``, so that the
estimator is fitted on what serving will give it. The estimator that was judged is the one that is
registered: it is not fitted again on the held-out rows.
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core import estimator_file
from core.compiled import SklearnRunner
from core.errors import BanquetError, InvalidModelSpec
from core.manifest import (
    BASELINE_FILE,
    MODEL_FILE,
    CompiledForm,
    GoldenRow,
    ModelManifest,
    finite_or_none,
)
from core.model import LoadedModel, is_missing
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.repository import FeastRepository
from training import evaluation, rows
from training.compiler import compile_estimator
from training.evaluation import Judgement
from training.rows import Examples
from training.spec import ModelSpec

Array = NDArray[Any]
Say = Callable[[str], None]

BASELINE_ROWS = 2_000
GOLDEN_ROWS = 20
COMPARED_ROWS = 20_000
_LIBRARIES = ("scikit-learn", "numpy", "skops", "onnxruntime", "feast", "feast-banquet")


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What came out: the manifest, the alias it got, and how the model stands beside the baselines."""

    manifest: ModelManifest
    alias: str
    judgement: Judgement
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        m = self.manifest
        return {
            "name": m.name,
            "version": m.version,
            "alias": self.alias,
            "beats_baselines": self.judgement.beats,
            "judged_by": list(self.judgement.by),
            "not_better": self.judgement.not_better,
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
    examples = rows.gather(repository, spec, say)
    recency = None if spec.recency_feature is None else examples.columns.index(spec.recency_feature)
    window, parts = examples.window, examples.parts
    say(f"fitting on {window.training_rows:,} rows, judging on the last {window.holdout_rows:,}")
    estimator = _fit(spec, examples)
    stored = _stored(registry, spec, estimator, say)
    file = estimator_file.FILES[spec.format]
    draft = _draft(spec, examples)
    model = LoadedModel(draft, SklearnRunner(estimator))
    _check_predictions(spec, model, estimator, examples.matrix[parts["holdout"]])

    used = np.concatenate(list(parts.values()))
    compiled, graph = compile_estimator(
        estimator, examples.matrix[used[_evenly(len(used), COMPARED_ROWS)]], file
    )
    say(f"runs as {compiled.form}" + (f" ({compiled.reason})" if compiled.reason else ""))
    judgement = evaluation.judge(model, examples.matrix, examples.labels, parts, recency=recency)
    sample = _sample(parts["training"])
    golden = _golden(model, examples, sample)
    baseline = examples.table.select(examples.columns.names).take(sample)
    files = {file: stored, BASELINE_FILE: _parquet(baseline)}
    if graph is not None:
        files[compiled.artifact] = graph

    def describe(number: int, digests: Mapping[str, str]) -> ModelManifest:
        return replace(
            draft,
            version=number,
            created=datetime.now(tz=UTC),
            metrics=finite_or_none(judgement.metrics),
            golden=golden,
            compiled=compiled,
            artifacts=dict(digests),
        )

    manifest = registry.register(spec.name, files, describe)
    aliases = registry.introduce(spec.name, manifest.version, why="trained").aliases
    alias = CHAMPION if aliases[CHAMPION] == manifest.version else CHALLENGER
    return TrainingReport(manifest, alias, judgement, time.monotonic() - started)


def _draft(spec: ModelSpec, examples: Examples) -> ModelManifest:
    """The manifest as far as it is known before the model is compiled and judged."""
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
        schema=examples.schema,
        label=spec.label,
        classes=examples.classes,
        threshold=spec.threshold,
        policies=dict(spec.policy),
        vocabulary=examples.columns.vocabulary,
        window=examples.window,
        dataset_digest=examples.dataset_digest,
        libraries=libraries,
        golden=(),
        compiled=CompiledForm("sklearn", MODEL_FILE, 0.0, True, 0),
        artifacts={MODEL_FILE: "0" * 64},
    )


def _fit(spec: ModelSpec, examples: Examples) -> Any:
    def part(name: str) -> tuple[Array, Array]:
        positions = examples.parts[name]
        return examples.matrix[positions], examples.labels[positions]

    try:
        estimator = spec.build(examples.columns).fit(*part("training"))
        if spec.calibration is not None:
            from sklearn.calibration import CalibratedClassifierCV
            from sklearn.frozen import FrozenEstimator

            estimator = CalibratedClassifierCV(FrozenEstimator(estimator), method=spec.calibration_method)
            estimator.fit(*part("calibration"))
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


def _stored(registry: ModelRegistry, spec: ModelSpec, estimator: Any, say: Say) -> bytes:
    """The estimator in the spec's format; says which types a server would have to trust."""
    file = estimator_file.FILES[spec.format]
    try:
        content = estimator_file.dump(estimator, file)
    except BanquetError:
        raise
    except Exception as exc:
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} cannot be stored as {spec.format}: {exc}.",
            hint="A class or function that it uses must live in an installed module, not in the spec's file.",
        ) from exc
    if spec.format == "skops":
        odd = estimator_file.untrusted_types(content, registry.trust, file)
        if odd:
            say(f"to be read, {file} needs BANQUET_SKOPS_TRUSTED={','.join(odd)}")
    return content


def _check_predictions(spec: ModelSpec, model: LoadedModel, estimator: Any, matrix: Array) -> None:
    """Raise InvalidModelSpec for predictions that are not numbers, or not the most likely class.

    An estimator may well predict another class than its most likely one; here the spec has to say so.
    """
    predicted = model.predict(matrix)
    for row, error in predicted.errors.items():
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} fails on held-out row {row}: "
            f"{error.__cause__ or error.message}",
            hint="It must predict any row, with NaN wherever a value can be missing or a category new.",
        ) from error
    if spec.task == "regression" or spec.threshold is not None:
        return
    if predicted.labels != estimator.predict(matrix).tolist():
        raise InvalidModelSpec(
            f"The estimator of model spec {spec.name!r} does not predict its most likely class.",
            hint="Predictions follow the probabilities: set `threshold`, or leave the choice to them.",
        )


def _sample(training: Array) -> Array:
    """Positions of the baseline sample: the same rows for the same training part."""
    generator = np.random.default_rng(0)
    size = min(BASELINE_ROWS, len(training))
    return np.sort(generator.choice(training, size=size, replace=False))


def _evenly(count: int, at_most: int) -> Array:
    """Positions spread evenly over ``count`` rows."""
    return np.unique(np.linspace(0, count - 1, num=min(count, at_most), dtype=np.int64))


def _parquet(table: pa.Table) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def _golden(model: LoadedModel, examples: Examples, sample: Array) -> tuple[GoldenRow, ...]:
    """Rows spread over the sample, those that miss most among them, with what the model says."""
    matrix = examples.matrix
    missing = np.isnan(matrix[sample]).sum(axis=1)
    by_missing = sample[np.argsort(-missing, kind="stable")]
    spread = sample[_evenly(len(sample), GOLDEN_ROWS)]
    chosen = list(dict.fromkeys([*by_missing[: GOLDEN_ROWS // 4].tolist(), *spread.tolist()]))[:GOLDEN_ROWS]
    predicted = model.predict(matrix[chosen])
    golden = []
    for i, row in enumerate(chosen):
        features = {name: _scalar(column[row]) for name, column in examples.values.items()}
        probabilities = predicted.probabilities
        golden.append(
            GoldenRow(
                features,
                _scalar(predicted.labels[i]),
                None if probabilities is None else tuple(float(p) for p in probabilities[i]),
            )
        )
    return tuple(golden)


def _scalar(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if is_missing(plain) else plain
