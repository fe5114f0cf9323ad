"""A loaded model package: feature columns to one matrix by name, missing-value policy, predictions.

The same for serving, batch scoring and evaluation. Loading refuses a package that would not predict here
what it predicted when it was trained. Knows no Redis and no HTTP, and imports scikit-learn only for a
package that has no compiled form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from core import estimator_file
from core.compiled import MAX_DIFFERENCE, OnnxRunner, Runner, SklearnRunner
from core.errors import GoldenMismatch, LibraryMismatch, PredictionFailed, SchemaMismatch
from core.manifest import Default, ModelManifest, Policy, ServedFeature, ServiceSchema
from core.registry import ModelRegistry
from core.types import Dtype

Matrix = NDArray[np.float64]

MATRIX_DTYPES = frozenset(
    {Dtype.INT32, Dtype.INT64, Dtype.FLOAT, Dtype.DOUBLE, Dtype.BOOL, Dtype.STRING, Dtype.UNIX_TIMESTAMP}
)
# Compiled and scikit-learn's answers may differ by MAX_DIFFERENCE, and processors in the last digits.
_GOLDEN_TOLERANCE = 2 * MAX_DIFFERENCE


class Predictions(NamedTuple):
    """Per row a label (a class or a value), and the probability of that class where the model gives one.

    ``probabilities`` has shape (rows, classes). What a row in ``errors`` has in the others means nothing.
    """

    labels: list[Any]
    confidences: list[float] | None
    probabilities: NDArray[Any] | None
    errors: Mapping[int, PredictionFailed]


_NO_ERRORS: Mapping[int, PredictionFailed] = MappingProxyType({})


class MatrixBuilder:
    """Feature columns, by name, to the one matrix that training, batch scoring and serving share."""

    def __init__(
        self,
        features: Sequence[ServedFeature],
        vocabulary: Mapping[str, Sequence[str]],
        policies: Mapping[str, Policy],
    ) -> None:
        defaults = {name: policy.default for name, policy in policies.items() if isinstance(policy, Default)}
        self._names = [feature.name for feature in features]
        self._codes: list[tuple[int, dict[str | None, float]]] = []
        self._timestamps: list[int] = []
        self._defaults: list[tuple[int, float]] = []
        for i, feature in enumerate(features):
            default = defaults.get(feature.name)
            if feature.dtype is Dtype.STRING:
                codes: dict[str | None, float] = {
                    text: float(code) for code, text in enumerate(vocabulary[feature.name])
                }
                codes[None] = codes.get(cast("str | None", default), np.nan)
                self._codes.append((i, codes))
            elif default is not None:
                self._defaults.append((i, float(default)))
            if feature.dtype is Dtype.UNIX_TIMESTAMP:
                self._timestamps.append(i)
        self._singles = [i for i, feature in enumerate(features) if feature.dtype is Dtype.FLOAT]

    def build(self, values: Mapping[str, Sequence[Any]], rows: int) -> Matrix:
        """See ``LoadedModel.matrix``."""
        columns: list[Sequence[Any]] = [values[name] for name in self._names]
        nan = np.nan
        for i, codes in self._codes:
            columns[i] = [codes.get(value, nan) for value in columns[i]]
        for i in self._timestamps:
            columns[i] = [_epoch_seconds(value) for value in columns[i]]
        # numpy reads None as NaN, and booleans as 0 and 1, when it makes floats.
        matrix = np.array(columns, dtype=np.float64).reshape(len(columns), rows)
        if self._singles:
            # A Float32 feature is float32 in Redis, whatever its source had.
            with np.errstate(over="ignore"):
                for i in self._singles:
                    matrix[i] = matrix[i].astype(np.float32)
        if not np.isfinite(matrix).all():
            matrix[np.isinf(matrix)] = nan
        for i, default in self._defaults:
            matrix[i, np.isnan(matrix[i])] = default
        return np.ascontiguousarray(matrix.T)


class LoadedModel:
    """A package that has passed its checks (``load``), ready to predict."""

    def __init__(self, manifest: ModelManifest, runner: Runner) -> None:
        self.manifest = manifest
        self._runner = runner
        self._builder = MatrixBuilder(manifest.schema.features, manifest.vocabulary, manifest.policies)
        self._rejects = [name for name, policy in manifest.policies.items() if policy == "reject"]

    @classmethod
    def load(cls, registry: ModelRegistry, name: str, number: int, serves: ServiceSchema) -> LoadedModel:
        """Load a version for a repository that ``serves`` this schema.

        Raises:
            Unsigned, SignatureMismatch, NotPinned: the manifest is not to be trusted; checked first of all.
            DigestMismatch: an artifact was altered; checked before anything is parsed or unpickled.
            SchemaMismatch: the feature service has other features than the model was trained on.
            LibraryMismatch: scikit-learn has another version.
            PickleRefused, UntrustedType: reading the estimator is not allowed here.
            GoldenMismatch: the model does not reproduce its recorded predictions.
        """
        manifest = registry.verify(name, number)
        _check_schema(manifest, serves)
        _check_libraries(manifest)
        runner: Runner
        if manifest.compiled.form == "onnx":
            runner = OnnxRunner(registry.artifact(manifest, manifest.compiled.artifact))
        else:
            runner = SklearnRunner(load_estimator(registry, manifest))
        model = cls(manifest, runner)
        model.check_golden()
        return model

    def matrix(self, values: Mapping[str, Sequence[Any]], rows: int) -> Matrix:
        """The float64 matrix (rows, features) in the manifest's order, from columns by feature name.

        None and NaN become NaN or the policy's default, and so does an infinity; a string is its index in
        the vocabulary, NaN where it was not seen in training; a timestamp is whole epoch seconds; a boolean
        0 or 1.
        """
        return self._builder.build(values, rows)

    def rejected(self, values: Mapping[str, Sequence[Any]], rows: int) -> dict[int, list[str]]:
        """The rows that miss a feature whose policy is ``reject``, and those features."""
        found: dict[int, list[str]] = {}
        for name in self._rejects:
            column = values[name]
            for row in range(rows):
                if is_missing(column[row]):
                    found.setdefault(row, []).append(name)
        return found

    def predict(self, matrix: Matrix) -> Predictions:
        """Predict every row of the matrix. Safe to call from several threads.

        A row on which the model fails, or for which it gives NaN or infinity, is in ``errors`` and spoils
        no other: several requests may share one call.
        """
        try:
            scores = self._runner.scores(matrix)
        except Exception as exc:  # noqa: BLE001 — whatever an estimator raises, the other rows get theirs
            return self._predict_apart(matrix, exc)
        classes = self.manifest.classes
        errors = _NO_ERRORS if np.isfinite(scores).all() else _not_numbers(scores)
        if not classes:
            return Predictions(scores.tolist(), None, None, errors)
        if scores.ndim == 1:
            return Predictions([classes[i] for i in scores.tolist()], None, None, errors)
        threshold = self.manifest.threshold
        chosen = scores.argmax(axis=1) if threshold is None else (scores[:, 1] >= threshold).astype(np.int64)
        confidences = scores[np.arange(len(scores)), chosen]
        return Predictions([classes[i] for i in chosen.tolist()], confidences.tolist(), scores, errors)

    def _predict_apart(self, matrix: Matrix, failure: Exception) -> Predictions:
        """Predict halves of a matrix on which the model failed, down to the rows that it fails on."""
        if len(matrix) == 1:
            error = PredictionFailed(hint="Its missing-value policy may need a default or `reject`.")
            error.__cause__ = failure
            nothing = np.full((1, len(self.manifest.classes)), np.nan)
            return Predictions([None], [np.nan], nothing, {0: error})
        half = len(matrix) // 2
        first, second = self.predict(matrix[:half]), self.predict(matrix[half:])
        sure = first.confidences is not None and second.confidences is not None
        return Predictions(
            [*first.labels, *second.labels],
            [*(first.confidences or ()), *(second.confidences or ())] if sure else None,
            np.concatenate([first.probabilities, second.probabilities]) if sure else None,
            {**first.errors, **{half + row: error for row, error in second.errors.items()}},
        )

    def check_golden(self) -> None:
        """Predict the recorded rows, which also warms the runner up; raises GoldenMismatch."""
        golden = self.manifest.golden
        if not golden:
            return
        values = {name: [row.features[name] for row in golden] for name in self.manifest.feature_names}
        found = self.predict(self.matrix(values, len(golden)))
        for i, row in enumerate(golden):
            if i in found.errors:
                difference = math.inf
            elif row.probabilities is not None and found.probabilities is not None:
                difference = float(np.abs(found.probabilities[i] - np.array(row.probabilities)).max())
            elif self.manifest.classes:
                difference = 0.0 if found.labels[i] == row.prediction else 1.0
            else:
                expected = float(row.prediction)  # type: ignore[arg-type]
                difference = abs(found.labels[i] - expected) / max(abs(expected), 1.0)
            if not difference <= _GOLDEN_TOLERANCE:
                off = f"it differs by {difference:.3g}, allowed are {_GOLDEN_TOLERANCE:g}"
                raise GoldenMismatch(
                    f"Model {self.manifest.name} version {self.manifest.version} does not reproduce golden "
                    f"row {i}: {off if i not in found.errors else 'it fails, or gives no number'}.",
                    hint="Serve it with the library versions in its manifest, or train it anew.",
                    row=i,
                    difference=difference,
                )


def load_estimator(registry: ModelRegistry, manifest: ModelManifest) -> Any:
    """The fitted estimator of a package. Raises DigestMismatch, and as ``estimator_file.load``."""
    file = manifest.estimator_file
    what = f"{file} of model {manifest.name} version {manifest.version}"
    return estimator_file.load(registry.artifact(manifest, file), file, registry.trust, what)


def _check_schema(manifest: ModelManifest, serves: ServiceSchema) -> None:
    differences = manifest.schema.differences(serves)
    if differences:
        raise SchemaMismatch(
            f"Model {manifest.name} version {manifest.version} was trained on another "
            f"{manifest.schema.service!r}: {'; '.join(differences)}.",
            hint="Train a version on the present definitions, or restore the ones it was trained on.",
            differences=differences,
        )


def _check_libraries(manifest: ModelManifest) -> None:
    trained = manifest.libraries.get("scikit-learn")
    try:
        here = version("scikit-learn")
    except PackageNotFoundError:
        here = None
    # A compiled form runs without scikit-learn, so a server need not have it at all.
    if here is None and manifest.compiled.form != "sklearn":
        return
    if trained is not None and trained != here:
        raise LibraryMismatch(
            f"Model {manifest.name} version {manifest.version} was trained with scikit-learn {trained}; "
            f"here is {here or 'none'}.",
            hint=f"Install scikit-learn=={trained}, or train the model anew.",
            library="scikit-learn",
        )


def _not_numbers(scores: NDArray[Any]) -> dict[int, PredictionFailed]:
    finite = np.isfinite(scores) if scores.ndim == 1 else np.isfinite(scores).all(axis=1)
    message = "The model gives no number for this row."
    return {row: PredictionFailed(message) for row in np.flatnonzero(~finite).tolist()}


def is_missing(value: Any) -> bool:
    """None, NaN and the infinities, as the matrix has it."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _epoch_seconds(value: Any) -> float:
    """Whole seconds, as Redis holds them; a datetime without a zone is UTC, as Feast reads it."""
    if isinstance(value, datetime):
        if value != value:  # pandas' NaT is a datetime
            return np.nan
        return float((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() // 1)
    return np.nan if value is None else float(value)
