"""What a prediction costs: the matrix and the compiled form, beside scikit-learn and a DataFrame.

Run with ``python -m bench.model_predict``. The best of many turns, contenders in turn within one process,
one thread; only ratios taken in one run mean anything. ``treelite`` is measured where it is installed.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from sklearn.calibration import CalibratedClassifierCV  # noqa: E402
from sklearn.compose import ColumnTransformer  # noqa: E402
from sklearn.ensemble import (  # noqa: E402
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.frozen import FrozenEstimator  # noqa: E402
from sklearn.impute import SimpleImputer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import OneHotEncoder, StandardScaler  # noqa: E402

from core.compiled import OnnxRunner  # noqa: E402
from core.manifest import ServedFeature  # noqa: E402
from core.model import MatrixBuilder  # noqa: E402
from core.types import Dtype  # noqa: E402
from training.compiler import compile_estimator  # noqa: E402

Array = NDArray[Any]
COLUMNS, CATEGORICAL = 12, [10, 11]
NAMES = [f"view__{i}" for i in range(COLUMNS)]
ROWS = 20_000


def data() -> tuple[Array, Array]:
    """Ten numeric columns and two of category codes, a tenth of it all missing."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(ROWS, COLUMNS))
    matrix[:, CATEGORICAL] = rng.integers(0, 8, (ROWS, 2))
    score = matrix[:, 0] + np.sin(matrix[:, 10]) + rng.normal(size=ROWS)
    matrix[rng.random(matrix.shape) < 0.1] = np.nan
    return matrix, (score > 0).astype(np.int64)


def prepared(final: Any) -> Any:
    """Imputation with indicators, scaling, one-hot categories, then ``final``."""
    numeric = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    codes = [[-1.0, *map(float, range(8))]] * 2
    categories = make_pipeline(
        SimpleImputer(strategy="constant", fill_value=-1.0), OneHotEncoder(categories=codes)
    )
    parts = [("numeric", numeric, list(range(10))), ("categories", categories, CATEGORICAL)]
    return make_pipeline(ColumnTransformer(parts), final)


def estimators() -> dict[str, Any]:
    """What is measured, unfitted."""
    boosted = HistGradientBoostingClassifier(max_iter=100, early_stopping=False)
    return {
        "logistic regression, prepared": prepared(LogisticRegression()),
        "gradient boosting 100x3, prepared": prepared(GradientBoostingClassifier()),
        "histogram boosting 100": boosted,
        "histogram boosting 100, categories": HistGradientBoostingClassifier(
            max_iter=100, early_stopping=False, categorical_features=CATEGORICAL
        ),
        "histogram boosting 100, calibrated": CalibratedClassifierCV(boosted),
        "random forest 100, depth 8": RandomForestClassifier(100, max_depth=8),
    }


def fitted(estimator: Any, matrix: Array, labels: Array) -> Any:
    """Fit on one half; a calibrated one calibrates on the other."""
    half = len(matrix) // 2
    if isinstance(estimator, CalibratedClassifierCV):
        base = estimator.estimator.fit(matrix[:half], labels[:half])
        return CalibratedClassifierCV(FrozenEstimator(base)).fit(matrix[half:], labels[half:])
    return estimator.fit(matrix[:half], labels[:half])


def microseconds(contenders: dict[str, Callable[[], Any]], turns: int = 15) -> dict[str, float]:
    """The best of several turns of each, taken in turn."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(turns):
        for name, call in contenders.items():
            call()
            started = time.perf_counter()
            calls = 0
            while calls < 3 or (calls < 200 and time.perf_counter() - started < 0.02):
                call()
                calls += 1
            best[name] = min(best[name], (time.perf_counter() - started) / calls * 1e6)
    return best


def treelite_predict(estimator: Any) -> Callable[[Array], Any] | None:
    """treelite's own predictor, for what it converts and where it is installed."""
    try:
        import treelite
        import treelite.gtil
    except ImportError:
        return None
    try:
        model = treelite.sklearn.import_model(estimator)
    except Exception:  # noqa: BLE001 — a comparison only
        return None
    return lambda matrix: treelite.gtil.predict(model, matrix, nthread=1)


def measure_model(title: str, estimator: Any, matrix: Array) -> None:
    """Print one model's lines."""
    form, content = compile_estimator(estimator, matrix)
    assert content is not None, form.reason
    compiled, other = OnnxRunner(content), treelite_predict(estimator)
    print(
        f"\n{title}: {len(content) / 1e3:.0f} kB, differs by {form.max_difference:.1g} on {len(matrix)} rows"
    )

    def contenders(part: Array) -> dict[str, Callable[[], Any]]:
        records = [dict(zip(NAMES, row, strict=True)) for row in part.tolist()]

        def tutorial() -> Any:
            return estimator.predict(pd.DataFrame(records)), estimator.predict_proba(pd.DataFrame(records))

        found: dict[str, Callable[[], Any]] = {
            "compiled": lambda: compiled.scores(part),
            "scikit-learn": lambda: estimator.predict_proba(part),
            "records, DataFrame, predict and predict_proba": tutorial,
        }
        if other is not None:
            found["treelite"] = lambda: other(part)
        return found

    for rows in (1, 50, 1000):
        report(f"{rows:>5} rows", microseconds(contenders(np.ascontiguousarray(matrix[-rows:]))))


def measure_matrix(matrix: Array) -> None:
    """Print the lines of the matrix: ten columns of doubles, two of strings."""
    numeric, text = NAMES[:10], NAMES[10:]
    features = [ServedFeature(name, Dtype.DOUBLE, 0.0) for name in numeric]
    features += [ServedFeature(name, Dtype.STRING, 0.0) for name in text]
    builder = MatrixBuilder(features, dict.fromkeys(text, tuple("abcdefgh")), {})
    print("\nthe matrix from columns of Python values, and a DataFrame of its numeric ones")

    def contenders(rows: int) -> dict[str, Callable[[], Any]]:
        values: dict[str, list[Any]] = {n: matrix[-rows:, i].tolist() for i, n in enumerate(numeric)}
        values |= {name: ["c"] * rows for name in text}
        return {
            "compiled": lambda: builder.build(values, rows),
            "DataFrame": lambda: pd.DataFrame(values)[numeric].to_numpy(),
        }

    for rows in (1, 50, 1000):
        report(f"{rows:>5} rows", microseconds(contenders(rows)))


def main() -> None:
    """Print a table."""
    matrix, labels = data()
    for title, estimator in estimators().items():
        measure_model(title, fitted(estimator, matrix, labels), matrix)
    measure_matrix(matrix)


def report(title: str, found: dict[str, float]) -> None:
    """One line: microseconds of ours, and how many times that each other one takes."""
    ours = found.pop("compiled")
    others = "  ".join(f"{name} {value / ours:.1f}x" for name, value in found.items())
    print(f"{title}  {ours:9.1f} us   {others}")


if __name__ == "__main__":
    main()
