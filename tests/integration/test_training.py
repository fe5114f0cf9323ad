"""Training on a real repository: what is registered, that it serves what was trained, what is refused."""

from __future__ import annotations

import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import TunedThresholdClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from core.errors import FeatureServiceNotFound, InvalidModelSpec
from core.manifest import BASELINE_FILE, MODEL_FILE, SKOPS_FILE, Default, ModelManifest
from core.model import LoadedModel
from core.online import FeaturePlan
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.repository import FeastRepository
from core.trust import Trust
from core.types import Dtype, Field
from tests.support import subscriptions
from training.spec import MatrixColumns, ModelSpec
from training.trainer import TrainingReport, train

FEATURES = [
    "usage__calls",
    "usage__minutes",
    "usage__quality",
    "usage__plan",
    "usage__trial",
    "usage__renewed_at",
    "value__price_per_minute",
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    """Definitions applied, no online store anywhere: training needs none."""
    from materialization import apply

    repository = FeastRepository.open(subscriptions.write(tmp_path_factory.mktemp("training") / "repo"))
    apply.apply(repository, apply.plan(repository))
    return repository


def pipeline(columns: MatrixColumns) -> Any:
    """Imputation with indicators, one-hot categories, a linear model."""
    codes = [[-1.0, *category] for category in columns.category_codes]
    categories = make_pipeline(
        SimpleImputer(strategy="constant", fill_value=-1.0), OneHotEncoder(categories=codes)
    )
    numeric = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    return make_pipeline(
        ColumnTransformer(
            [("numeric", numeric, columns.numeric), ("categories", categories, columns.categorical)]
        ),
        LogisticRegression(max_iter=500),
    )


def boosted(columns: MatrixColumns) -> Any:
    return HistGradientBoostingClassifier(
        max_iter=15, categorical_features=columns.categorical, random_state=0
    )


def with_a_generator(columns: MatrixColumns) -> Any:
    """Fits, and cannot be pickled by anyone: dill, once imported, teaches pickle to take lambdas."""
    pipeline = make_pipeline(boosted(columns))
    pipeline.trace = (step for step in ())
    return pipeline


def spec(**changes: Any) -> ModelSpec:
    described: dict[str, Any] = {
        "name": "churn",
        "service": "churn_v1",
        "entities": "labels.parquet",
        "label": "left",
        "build": pipeline,
        "holdout": timedelta(days=12),
        "label_horizon": timedelta(days=2),
        "calibration": timedelta(days=10),
        "recency_feature": "usage__minutes",
        "description": "Who leaves.",
    }
    return ModelSpec(**{**described, **changes})


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    return ModelRegistry(str(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def report(repository: FeastRepository, registry: ModelRegistry) -> TrainingReport:
    return train(repository, registry, spec())


@pytest.fixture(scope="module")
def entities(repository: FeastRepository) -> pd.DataFrame:
    frame: pd.DataFrame = pd.read_parquet(repository.path / "labels.parquet")
    return frame.sort_values("event_timestamp", ignore_index=True)


@pytest.fixture(scope="module")
def manifest(report: TrainingReport) -> ModelManifest:
    return report.manifest


def test_the_manifest_says_what_the_model_reads(manifest: ModelManifest) -> None:
    assert list(manifest.feature_names) == FEATURES
    assert [f.dtype for f in manifest.schema.features] == [
        Dtype.INT64,
        Dtype.DOUBLE,
        Dtype.FLOAT,
        Dtype.STRING,
        Dtype.BOOL,
        Dtype.UNIX_TIMESTAMP,
        Dtype.DOUBLE,
    ]
    ttl = subscriptions.TTL.total_seconds()
    assert [f.ttl_seconds for f in manifest.schema.features] == [ttl] * 6 + [0.0]
    assert manifest.schema.join_keys == (Field("customer_id", Dtype.INT64),)
    assert manifest.schema.request_inputs == (Field("price", Dtype.DOUBLE),)
    assert (manifest.label, manifest.task, manifest.classes) == ("left", "classification", (0, 1))
    assert manifest.libraries.keys() >= {"python", "scikit-learn", "numpy", "onnxruntime"}
    assert len(manifest.dataset_digest) == 64


def test_the_vocabulary_comes_from_the_training_part_alone(manifest: ModelManifest) -> None:
    assert manifest.vocabulary == {"usage__plan": ("basic", "family", "pro")}


def test_the_window_accounts_for_every_row(manifest: ModelManifest, entities: pd.DataFrame) -> None:
    window = manifest.window
    moments = entities["event_timestamp"]
    assert (window.start, window.end) == (moments.min(), moments.max())
    assert window.split == moments.max() - timedelta(days=12)
    assert window.holdout_rows == (moments > window.split).sum()
    parts = window.training_rows, window.calibration_rows, window.holdout_rows
    assert sum(parts) + window.embargoed_rows == subscriptions.ROWS
    assert min(*parts, window.embargoed_rows) > 100


def test_the_package_is_whole_and_as_small_as_it_should_be(
    manifest: ModelManifest, registry: ModelRegistry, entities: pd.DataFrame
) -> None:
    assert set(manifest.artifacts) == {MODEL_FILE, BASELINE_FILE, "model.onnx"}
    registry.verify("churn", manifest.version)
    content = io.BytesIO(registry.artifact(manifest, BASELINE_FILE))
    kinds = {field.name: str(field.type) for field in pq.read_schema(content)}
    assert list(kinds) == FEATURES
    assert (kinds["usage__calls"], kinds["usage__trial"]) == ("int64", "bool")
    baseline = pd.read_parquet(content)
    assert len(baseline) == min(2_000, manifest.window.training_rows)
    assert subscriptions.NEW_PLAN not in set(baseline["usage__plan"])
    assert {"basic", "family", "pro"} <= set(baseline["usage__plan"])


def test_golden_rows_miss_every_feature_at_least_once(manifest: ModelManifest) -> None:
    assert len(manifest.golden) == 20
    for name in FEATURES:
        values = [row.features[name] for row in manifest.golden]
        assert None in values
        assert set(values) != {None}
    for row in manifest.golden:
        assert row.probabilities is not None
        assert sum(row.probabilities) == pytest.approx(1.0)
        assert row.prediction == int(np.argmax(row.probabilities))


def test_it_runs_compiled_and_exactly(manifest: ModelManifest) -> None:
    compiled = manifest.compiled
    assert (compiled.form, compiled.artifact, compiled.classes_equal) == ("onnx", "model.onnx", True)
    assert compiled.max_difference < 1e-12
    assert compiled.rows_checked == subscriptions.ROWS - manifest.window.embargoed_rows


def test_metrics_are_those_of_the_holdout_beside_both_baselines(report: TrainingReport) -> None:
    metrics: Any = report.manifest.metrics
    assert report.judgement.beats
    constant, recency = metrics["baselines"]["constant_rate"], metrics["baselines"]["recency_only"]
    assert constant["roc_auc"] == 0.5
    assert metrics["log_loss"] < recency["log_loss"] < constant["log_loss"]
    assert metrics["roc_auc"] > recency["roc_auc"] > 0.5
    assert {"brier", "accuracy", "calibration_error"} <= metrics.keys()
    assert sum(group["rows"] for group in metrics["reliability"]) == report.manifest.window.holdout_rows


def test_the_loaded_package_predicts_what_the_estimator_does(
    manifest: ModelManifest, registry: ModelRegistry, repository: FeastRepository
) -> None:
    """Raw values as the online read gives them, against the unpickled estimator on the same matrix."""
    serves = FeaturePlan.for_service(repository.definitions(), "churn_v1").schema("churn_v1")
    model = LoadedModel.load(registry, "churn", manifest.version, serves)
    usage = subscriptions.snapshots().tail(200)
    values: dict[str, list[Any]] = {
        f"usage__{name}": [None if pd.isna(v) else v for v in usage[name]]
        for name in ("calls", "minutes", "quality", "plan", "trial", "renewed_at")
    }
    values["value__price_per_minute"] = [None, 0.5] * 100
    matrix = model.matrix(values, 200)
    estimator = joblib.load(io.BytesIO(registry.artifact(manifest, MODEL_FILE)))
    found = model.predict(matrix)
    assert found.probabilities is not None
    assert np.allclose(found.probabilities, estimator.predict_proba(matrix), rtol=0, atol=1e-12)
    assert found.labels == estimator.predict(matrix).tolist()


def test_the_report_is_json(report: TrainingReport) -> None:
    tree = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (tree["name"], tree["version"], tree["alias"]) == ("churn", report.manifest.version, report.alias)
    assert tree["form"] == "onnx"
    assert tree["beats_baselines"] is True


def test_the_first_version_is_champion_and_the_next_challenger(
    repository: FeastRepository, tmp_path: Path
) -> None:
    registry = ModelRegistry(str(tmp_path))
    model = spec(build=boosted, calibration=None, recency_feature=None)
    said: list[str] = []
    assert train(repository, registry, model, say=said.append).alias == CHAMPION
    assert train(repository, registry, model).alias == CHALLENGER
    assert train(repository, registry, model).alias == CHALLENGER
    assert registry.aliases("churn") == {CHAMPION: 1, CHALLENGER: 3}
    first, second = registry.manifest("churn", 1), registry.manifest("churn", 2)
    assert first.dataset_digest == second.dataset_digest
    assert first.golden == second.golden
    assert any("2,400 entity rows" in line for line in said)


def test_a_model_stored_by_skops_is_trained_and_served_without_a_pickle(
    repository: FeastRepository, tmp_path: Path
) -> None:
    registry = ModelRegistry(str(tmp_path), Trust.of(unpickle=False))
    said: list[str] = []
    model = spec(build=boosted, calibration=None, recency_feature=None, format="skops")
    manifest = train(repository, registry, model, say=said.append).manifest
    assert set(manifest.artifacts) == {SKOPS_FILE, BASELINE_FILE, "model.onnx"}
    assert "skops" in manifest.libraries
    assert any("BANQUET_SKOPS_TRUSTED=" in line for line in said)
    assert LoadedModel.load(registry, "churn", 1, manifest.schema).manifest == manifest


def test_a_regressor_is_judged_by_its_errors(repository: FeastRepository, tmp_path: Path) -> None:
    model = spec(
        task="regression",
        label="score",
        build=lambda columns: HistGradientBoostingRegressor(
            max_iter=15, categorical_features=columns.categorical
        ),
        calibration=None,
        recency_feature=None,
    )
    report = train(repository, ModelRegistry(str(tmp_path)), model)
    metrics: Any = report.manifest.metrics
    assert report.judgement.beats
    assert metrics["rmse"] < metrics["baselines"]["mean"]["rmse"]
    assert metrics["mae"] < metrics["baselines"]["mean"]["mae"]
    assert (report.manifest.classes, report.manifest.compiled.form) == ((), "onnx")
    assert all(isinstance(row.prediction, float) for row in report.manifest.golden)


def test_a_classifier_without_probabilities_keeps_its_string_labels(
    repository: FeastRepository, tmp_path: Path
) -> None:
    registry = ModelRegistry(str(tmp_path))
    model = spec(
        label="mood",
        build=lambda columns: make_pipeline(SimpleImputer(), StandardScaler(), LinearSVC()),
        calibration=None,
        recency_feature=None,
    )
    report = train(repository, registry, model)
    manifest = report.manifest
    assert manifest.classes == ("bad", "good", "so-so")
    assert manifest.metrics["accuracy"] > manifest.metrics["baselines"]["most_common"]["accuracy"]
    loaded = LoadedModel.load(registry, "churn", 1, manifest.schema)
    found = loaded.predict(loaded.matrix({name: [None] for name in FEATURES}, 1))
    assert found.labels[0] in manifest.classes
    assert found.confidences is None


def test_policies_reach_the_matrix_and_the_manifest(repository: FeastRepository, tmp_path: Path) -> None:
    """An estimator that takes no NaN can be fitted where every feature is rejected or has a default."""
    policy: Any = dict.fromkeys(FEATURES, Default(0.0)) | {
        "usage__plan": Default("basic"),
        "usage__minutes": "reject",
    }
    unfit = spec(build=lambda columns: LogisticRegression(max_iter=5000), calibration=None)
    with pytest.raises(InvalidModelSpec, match="contains NaN"):
        train(repository, ModelRegistry(str(tmp_path)), unfit)
    numbers = spec(
        build=lambda columns: make_pipeline(
            ColumnTransformer([("used", StandardScaler(), columns.numeric)]),
            LogisticRegression(),
        ),
        policy=policy,
        calibration=None,
    )
    report = train(repository, ModelRegistry(str(tmp_path)), numbers)
    manifest = report.manifest
    assert manifest.policies == policy
    assert manifest.window.rejected_rows > 100
    assert all(row.features["usage__minutes"] is not None for row in manifest.golden)


class Fussy(TransformerMixin, BaseEstimator):
    """A transformer that transforms nothing but what it was fitted on."""

    def fit(self, matrix: Any, labels: Any = None) -> Fussy:
        self.rows_ = len(matrix)
        return self

    def transform(self, matrix: Any) -> Any:
        if len(matrix) != self.rows_:
            raise ValueError("not on a Sunday")
        return matrix


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"service": "with_list"}, "usage__devices is STRING_LIST"),
        ({"policy": {"usage__call": "reject"}}, "unknown features: usage__call"),
        ({"policy": {"usage__plan": Default("gold")}}, "'gold' of feature usage__plan"),
        ({"recency_feature": "usage__age"}, "no feature 'usage__age'"),
        ({"label": "gone"}, "no column 'gone'"),
        ({"task": "regression", "calibration": None}, "does not do regression"),
        ({"build": lambda columns: 1 / 0}, "ZeroDivisionError"),
        ({"build": lambda columns: "no estimator"}, "AttributeError"),
        ({"build": lambda columns: columns.index("usage__callz")}, "no feature 'usage__callz'"),
        (
            {
                "build": with_a_generator,
            },
            "cannot be stored",
        ),
        (
            {"build": lambda columns: make_pipeline(Fussy(), boosted(columns)), "calibration": None},
            "fails on held-out row 0: not on a Sunday",
        ),
        (
            {
                "build": lambda columns: TunedThresholdClassifierCV(
                    boosted(columns), scoring="recall", cv=2, random_state=0
                ),
                "calibration": None,
            },
            "does not predict its most likely class",
        ),
    ],
)
def test_what_cannot_serve_is_not_registered(
    repository: FeastRepository, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    registry = ModelRegistry(str(tmp_path))
    with pytest.raises(InvalidModelSpec, match=says):
        train(repository, registry, spec(**changes))
    assert registry.models() == []


def test_an_unknown_service_lists_those_there_are(repository: FeastRepository, tmp_path: Path) -> None:
    with pytest.raises(FeatureServiceNotFound) as caught:
        train(repository, ModelRegistry(str(tmp_path)), spec(service="churn_v2"))
    assert "churn_v1" in (caught.value.hint or "")
