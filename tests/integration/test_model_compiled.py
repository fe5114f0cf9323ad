"""Compiled models: they say what scikit-learn says where that is hard, and load without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx")

from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_selection import SelectKBest
from sklearn.frozen import FrozenEstimator
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from core.compiled import OnnxRunner, SklearnRunner
from core.manifest import MODEL_FILE, GoldenRow, ServedFeature, ServiceSchema
from core.model import LoadedModel
from core.registry import ModelRegistry
from core.types import Dtype
from tests.support import packages
from training.compiler import compare, compile_estimator

Array = NDArray[Any]

ROWS = 2_500
NUMERIC, CATEGORICAL = [0, 1, 2, 4], [3, 5]
# Of the same arithmetic in float64, only the order of additions differs.
EXACT = 1e-12


def _data() -> tuple[Array, Array]:
    """Columns that rounding to float32 or losing NaN would spoil, and a target that depends on them.

    Normal numbers; epoch seconds; money; 40 category codes; a constant; 3 category codes.
    """
    rng = np.random.default_rng(7)
    seconds = 1.75e9 + rng.integers(0, 30 * 86_400, ROWS)
    shops, plans = rng.integers(0, 40, ROWS), rng.integers(0, 3, ROWS)
    matrix = np.column_stack(
        [
            rng.normal(size=ROWS),
            seconds,
            np.round(rng.gamma(2, 50, ROWS), 2),
            shops,
            np.full(ROWS, 5.0),
            plans,
        ]
    )
    target = (
        matrix[:, 0]
        + np.sin(seconds / 86_400)
        + np.sin(shops * 7.0) * (plans - 1)
        + rng.normal(size=ROWS) / 2
    )
    matrix[:, :4][rng.random((ROWS, 4)) < 0.15] = np.nan
    return matrix.astype(np.float64), target


MATRIX, TARGET = _data()
BINARY = (TARGET > 0).astype(np.int64)
NAMED = np.array(["high", "low", "middle"])[np.digitize(TARGET, [-0.7, 0.7])]


def prepared(*final: Any) -> Any:
    """The pipeline that a numeric and categorical matrix with gaps usually gets."""
    codes = [[-1.0, *map(float, range(40))], [-1.0, 0.0, 1.0, 2.0]]
    return make_pipeline(
        ColumnTransformer(
            [
                (
                    "numeric",
                    make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler()),
                    NUMERIC,
                ),
                (
                    "categories",
                    make_pipeline(
                        SimpleImputer(strategy="constant", fill_value=-1.0), OneHotEncoder(categories=codes)
                    ),
                    CATEGORICAL,
                ),
            ]
        ),
        *final,
    )


def calibrated(estimator: Any, labels: Array, method: str) -> Any:
    half = ROWS // 2
    fitted = FrozenEstimator(estimator.fit(MATRIX[:half], labels[:half]))
    return CalibratedClassifierCV(fitted, method=method).fit(MATRIX[half:], labels[half:])


def hist(**options: Any) -> Any:
    return HistGradientBoostingClassifier(max_iter=25, random_state=0, **options)


def encoded(**options: Any) -> Any:
    return make_pipeline(
        SimpleImputer(), OneHotEncoder(handle_unknown="ignore", **options), LogisticRegression()
    )


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "logistic": lambda: prepared(LogisticRegression()).fit(MATRIX, BINARY),
    "logistic, boolean labels": lambda: prepared(LogisticRegression()).fit(MATRIX, BINARY > 0),
    "logistic, three string labels": lambda: prepared(LogisticRegression()).fit(MATRIX, NAMED),
    "gradient boosting": lambda: prepared(GradientBoostingClassifier(n_estimators=20, random_state=0)).fit(
        MATRIX, BINARY
    ),
    "gradient boosting, exponential loss": lambda: prepared(
        GradientBoostingClassifier(n_estimators=20, loss="exponential", random_state=0)
    ).fit(MATRIX, BINARY),
    "gradient boosting, three classes": lambda: prepared(
        GradientBoostingClassifier(n_estimators=8, random_state=0)
    ).fit(MATRIX, NAMED),
    "histogram boosting with gaps": lambda: hist().fit(MATRIX, BINARY),
    "histogram boosting, categories": lambda: hist(categorical_features=CATEGORICAL).fit(MATRIX, BINARY),
    "histogram boosting, categories, three classes": lambda: hist(categorical_features=CATEGORICAL).fit(
        MATRIX, NAMED
    ),
    "histogram boosting of single leaves": lambda: hist(min_samples_leaf=ROWS).fit(MATRIX, BINARY),
    "random forest with gaps": lambda: RandomForestClassifier(20, max_depth=8, random_state=0).fit(
        MATRIX, BINARY
    ),
    "random forest, three classes": lambda: RandomForestClassifier(10, max_depth=6, random_state=0).fit(
        MATRIX, NAMED
    ),
    "extra trees": lambda: ExtraTreesClassifier(10, max_depth=6, random_state=0).fit(MATRIX, BINARY),
    "decision tree with gaps": lambda: DecisionTreeClassifier(max_depth=8, random_state=0).fit(
        MATRIX, BINARY
    ),
    "sigmoid over histogram boosting": lambda: calibrated(hist(), BINARY, "sigmoid"),
    "isotonic over histogram boosting": lambda: calibrated(hist(), BINARY, "isotonic"),
    "isotonic over a forest": lambda: calibrated(
        RandomForestClassifier(10, max_depth=6, random_state=0), BINARY, "isotonic"
    ),
    "isotonic over a pipeline, three classes": lambda: calibrated(
        prepared(LogisticRegression()), NAMED, "isotonic"
    ),
    "sigmoid over folds of a support vector machine": lambda: CalibratedClassifierCV(
        prepared(LinearSVC()), cv=3
    ).fit(MATRIX, BINARY),
    "linear discriminant": lambda: make_pipeline(SimpleImputer(), LinearDiscriminantAnalysis()).fit(
        MATRIX, BINARY
    ),
    "grid search": lambda: GridSearchCV(
        prepared(LogisticRegression()), {"logisticregression__C": [0.1, 1]}, cv=2
    ).fit(MATRIX, BINARY),
    "every scaler": lambda: make_pipeline(
        SimpleImputer(), RobustScaler(), MaxAbsScaler(), MinMaxScaler(clip=True), LogisticRegression()
    ).fit(MATRIX, BINARY),
    "selection, union, logarithm, passthrough": lambda: make_pipeline(
        FeatureUnion(
            [
                (
                    "imputed",
                    make_pipeline(
                        SimpleImputer(), FunctionTransformer(np.abs), FunctionTransformer(np.log1p)
                    ),
                ),
                ("missing", MissingIndicator()),
            ]
        ),
        SelectKBest(k=5),
        ColumnTransformer(
            [("kept", "passthrough", [0, 2]), ("gone", "drop", [1])], remainder=StandardScaler()
        ),
        LogisticRegression(),
    ).fit(MATRIX, BINARY),
    "one-hot of rounded numbers, first dropped": lambda: encoded(drop="first").fit(
        MATRIX[:, [3, 4, 5]], BINARY
    ),
    "one-hot with a category for gaps": lambda: make_pipeline(
        OneHotEncoder(handle_unknown="ignore"), LogisticRegression()
    ).fit(MATRIX[:, [3, 5]], BINARY),
    "an imputer of an empty column": lambda: make_pipeline(
        SimpleImputer(add_indicator=True), StandardScaler(), LogisticRegression()
    ).fit(np.column_stack([np.full(ROWS, np.nan), MATRIX]), BINARY),
}

REGRESSORS: dict[str, Callable[[], Any]] = {
    "ridge": lambda: prepared(Ridge()).fit(MATRIX, TARGET),
    "poisson": lambda: prepared(PoissonRegressor()).fit(MATRIX, np.exp(TARGET)),
    "gradient boosting": lambda: prepared(GradientBoostingRegressor(n_estimators=20, random_state=0)).fit(
        MATRIX, TARGET
    ),
    "histogram boosting, categories": lambda: HistGradientBoostingRegressor(
        max_iter=25, categorical_features=CATEGORICAL
    ).fit(MATRIX, TARGET),
    "histogram boosting, gamma loss": lambda: HistGradientBoostingRegressor(max_iter=25, loss="gamma").fit(
        MATRIX, np.exp(TARGET)
    ),
    "random forest with gaps": lambda: RandomForestRegressor(10, max_depth=8, random_state=0).fit(
        MATRIX, TARGET
    ),
    "decision tree": lambda: DecisionTreeRegressor(max_depth=6, random_state=0).fit(MATRIX, TARGET),
}


def matrix_for(estimator: Any) -> Array:
    """Rows of the width that the estimator was fitted on, half of which it has not seen."""
    fresh = MATRIX[::-1].copy()
    fresh[:, 0] *= 1.5
    both = np.vstack([MATRIX, fresh])
    width = estimator.n_features_in_
    if width == 7:
        return np.column_stack([np.full(len(both), np.nan), both])
    return {6: both, 3: both[:, [3, 4, 5]], 2: both[:, [3, 5]]}[width]


@pytest.mark.filterwarnings("ignore:Skipping features without any observed values")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_compiled_classifier_gives_the_same_probabilities_and_classes(name: str) -> None:
    estimator = CLASSIFIERS[name]()
    matrix = matrix_for(estimator)
    form, content = compile_estimator(estimator, matrix)
    assert (form.form, form.reason, form.classes_equal) == ("onnx", "", True)
    assert form.max_difference < EXACT
    assert form.rows_checked == len(matrix)
    assert content is not None
    runner = OnnxRunner(content)
    expected = estimator.predict_proba(matrix)
    for rows in (0, 1, 2, 50):
        found = runner.scores(matrix[:rows])
        assert found.shape == (rows, len(estimator.classes_))
        assert np.allclose(found, expected[:rows], rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_compiled_regressor_gives_the_same_values(name: str) -> None:
    estimator = REGRESSORS[name]()
    form, content = compile_estimator(estimator, MATRIX)
    assert (form.form, form.reason) == ("onnx", "")
    assert form.max_difference < EXACT
    assert content is not None
    for rows in (0, 1, 50):
        found = OnnxRunner(content).scores(MATRIX[:rows])
        assert found.shape == (rows,)
        if rows:
            assert np.allclose(found, estimator.predict(MATRIX[:rows]), rtol=EXACT)


@pytest.mark.parametrize("labels", [BINARY, NAMED], ids=["two", "three"])
@pytest.mark.parametrize("final", [LinearSVC(), RidgeClassifier()], ids=["svm", "ridge"])
def test_a_classifier_without_probabilities_compiles_to_its_classes(final: Any, labels: Array) -> None:
    estimator = prepared(final).fit(MATRIX, labels)
    form, content = compile_estimator(estimator, MATRIX)
    assert (form.form, form.classes_equal) == ("onnx", True)
    assert content is not None
    found = OnnxRunner(content).scores(MATRIX[:50])
    assert estimator.classes_[found].tolist() == estimator.predict(MATRIX[:50]).tolist()
    assert SklearnRunner(estimator).scores(MATRIX[:50]).tolist() == found.tolist()


def test_an_estimator_of_its_own_kind_goes_through_skl2onnx() -> None:
    pytest.importorskip("skl2onnx")
    form, _ = compile_estimator(
        make_pipeline(SimpleImputer(), StandardScaler(), GaussianNB()).fit(MATRIX, BINARY), MATRIX
    )
    assert form.form == "onnx"
    assert form.max_difference < 1e-5


class Doubler(TransformerMixin, BaseEstimator):
    """A transformer that no converter knows."""

    def fit(self, matrix: Array, labels: Any = None) -> Doubler:
        self.n_features_in_ = matrix.shape[1]
        return self

    def transform(self, matrix: Array) -> Array:
        return matrix * 2


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (
            make_pipeline(Doubler(), SimpleImputer(), LogisticRegression()),
            "onnx: not covered: the transformer Doubler",
        ),
        (make_pipeline(SimpleImputer(), SVC(gamma="auto")), "the estimator SVC"),
        (
            make_pipeline(SimpleImputer(), QuantileTransformer(n_quantiles=100), LogisticRegression()),
            "does not end",
        ),
        (TransformedTargetRegressor(make_pipeline(SimpleImputer(), Ridge())), "TransformedTargetRegressor"),
    ],
    ids=["unknown", "no probabilities", "endless", "target"],
)
def test_what_does_not_compile_stays_scikit_learn_and_says_why(estimator: Any, reason: str) -> None:
    small = MATRIX[:200]
    form, content = compile_estimator(estimator.fit(small, BINARY[:200]), small)
    assert (form.form, form.artifact, content) == ("sklearn", MODEL_FILE, None)
    assert reason in form.reason
    assert len(form.reason) < 1_000


@pytest.mark.parametrize(
    ("found", "difference", "equal"),
    [
        ([[0.4, 0.6], [0.7, 0.3]], 0.0, True),
        ([[0.4, 0.6], [0.6, 0.4]], 0.1, True),
        ([[0.51, 0.49], [0.7, 0.3]], 0.11, False),
        ([[0.4, 0.6], [0.3, 0.7]], 0.4, False),
        ([[0.4, 0.6], [np.nan, np.nan]], np.inf, True),
        ([[0.6], [0.3]], np.inf, False),
    ],
)
def test_the_comparison_sees_every_way_to_differ(found: Any, difference: float, equal: bool) -> None:
    expected = np.array([[0.4, 0.6], [0.7, 0.3]])
    assert compare(expected, np.array(found), classifier=True) == (pytest.approx(difference), equal)


def test_a_tie_may_go_either_way() -> None:
    expected, found = np.array([[0.5, 0.5]]), np.array([[0.5 - 1e-15, 0.5 + 1e-15]])
    assert compare(expected, found, classifier=True) == (pytest.approx(1e-15), True)


def test_values_are_compared_relatively() -> None:
    found = compare(np.array([1000.0, 0.1]), np.array([1001.0, 0.1001]), classifier=False)
    assert found == (pytest.approx(0.001), True)


def package(registry: ModelRegistry, estimator: Any) -> None:
    """Register an estimator over the six columns with golden rows, as training does."""
    import io

    import joblib

    form, content = compile_estimator(estimator, MATRIX)
    dtypes = [Dtype.DOUBLE, Dtype.UNIX_TIMESTAMP, Dtype.DOUBLE, Dtype.INT64, Dtype.FLOAT, Dtype.INT64]
    names = [f"v__{i}" for i in range(6)]
    pickled = io.BytesIO()
    joblib.dump(estimator, pickled)
    files = {MODEL_FILE: pickled.getvalue(), "baseline.parquet": b""}
    if content is not None:
        files[form.artifact] = content
    golden = tuple(
        GoldenRow(
            {n: None if np.isnan(v) else float(v) for n, v in zip(names, row, strict=True)},
            estimator.predict(row[None])[0].item(),
            tuple(estimator.predict_proba(row[None])[0].tolist()),
        )
        for row in MATRIX[:20]
    )
    packages.register(
        registry,
        files,
        task="classification",
        classes=(0, 1),
        schema=ServiceSchema(
            "s", tuple(ServedFeature(n, d, 0.0) for n, d in zip(names, dtypes, strict=True)), ()
        ),
        golden=golden,
        compiled=form,
    )


_LOAD = """
import sys
from core.model import LoadedModel
from core.registry import ModelRegistry

registry = ModelRegistry(sys.argv[1])
model = LoadedModel.load(registry, "churn", 1, registry.manifest("churn", 1).schema)
model.predict(model.matrix({name: [None] for name in model.manifest.feature_names}, 1))
heavy = ("feast", "joblib", "onnx", "pandas", "scipy", "skl2onnx", "sklearn")
print([name for name in heavy if name in sys.modules])
"""


def loaded_modules(registry: ModelRegistry) -> str:
    found = subprocess.run(
        [sys.executable, "-c", _LOAD, registry.url], check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def test_a_compiled_model_loads_without_scikit_learn_pandas_or_feast(tmp_path: Path) -> None:
    registry = ModelRegistry(str(tmp_path))
    package(registry, CLASSIFIERS["sigmoid over histogram boosting"]())
    assert registry.manifest("churn", 1).compiled.form == "onnx"
    assert loaded_modules(registry) == "[]"


def test_a_model_that_did_not_compile_loads_and_predicts_all_the_same(tmp_path: Path) -> None:
    registry = ModelRegistry(str(tmp_path))
    estimator = make_pipeline(SimpleImputer(), QuantileTransformer(n_quantiles=20), LogisticRegression()).fit(
        MATRIX, BINARY
    )
    package(registry, estimator)
    manifest = registry.manifest("churn", 1)
    assert manifest.compiled.form == "sklearn"
    model = LoadedModel.load(registry, "churn", 1, manifest.schema)
    assert model.predict(MATRIX[:50]).labels == estimator.predict(MATRIX[:50]).tolist()


def test_predictions_are_the_same_from_many_threads(tmp_path: Path) -> None:
    registry = ModelRegistry(str(tmp_path))
    package(registry, CLASSIFIERS["histogram boosting, categories"]())
    model = LoadedModel.load(registry, "churn", 1, registry.manifest("churn", 1).schema)
    expected = model.predict(MATRIX).probabilities
    slices = [slice(start, start + 1 + start % 7) for start in range(0, 700, 2)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda part: model.predict(MATRIX[part]).probabilities, slices))
    assert expected is not None
    for probabilities, part in zip(found, slices, strict=True):
        assert np.allclose(probabilities, expected[part], rtol=0, atol=EXACT)
