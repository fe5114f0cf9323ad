"""The demo's model on the real data: beats both baselines, is calibrated, and runs compiled."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.registry import ModelRegistry
from core.repository import FeastRepository
from tests.support import demo
from training.spec import MatrixColumns, load_spec
from training.trainer import TrainingReport, train


@pytest.fixture(scope="module")
def report(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    """One training run, as `banquet train` makes it; nothing of it needs the online store."""
    folder = tmp_path_factory.mktemp("model")
    repo = demo.copy(demo_data, folder / "feature_repo", "127.0.0.1:1")
    feast = Path(sys.executable).parent / "feast"
    subprocess.run(
        [str(feast), "apply", "--skip-source-validation"], cwd=repo, check=True, capture_output=True
    )
    registry = ModelRegistry(str(folder / "models"))
    return train(FeastRepository.open(repo), registry, load_spec("demo.model:repurchase"))


def test_it_beats_the_constant_rate_and_recency_alone_on_the_last_weeks(report: TrainingReport) -> None:
    metrics: Any = report.manifest.metrics
    constant, recency = (metrics["baselines"][name] for name in ("constant_rate", "recency_only"))
    assert report.judgement.beats
    assert metrics["roc_auc"] > recency["roc_auc"] + 0.05 > constant["roc_auc"] + 0.05
    assert metrics["log_loss"] < recency["log_loss"] - 0.05 < constant["log_loss"] - 0.05


def test_its_probabilities_are_calibrated_in_every_tenth_of_the_holdout(report: TrainingReport) -> None:
    """The data are those of the weekday on which they are built: up to 0.018, and 0.052 in one tenth."""
    metrics: Any = report.manifest.metrics
    assert metrics["calibration_error"] < 0.03
    assert all(abs(tenth["predicted"] - tenth["observed"]) < 0.08 for tenth in metrics["reliability"])


def test_it_learns_from_about_100k_rows_and_no_part_sees_the_labels_of_the_next(
    report: TrainingReport,
) -> None:
    window = report.manifest.window
    assert window is not None
    parts = window.training_rows, window.calibration_rows, window.holdout_rows
    assert sum(parts) + window.embargoed_rows == 100_000
    assert min(parts) > 5_000
    assert window.embargoed_rows > 2_000
    assert window.end - window.split == timedelta(weeks=6)


def test_it_runs_compiled_and_says_the_same(report: TrainingReport) -> None:
    assert report.manifest.compiled.form == "onnx"
    assert report.manifest.compiled.classes_equal
    assert report.manifest.compiled.max_difference < 1e-6


def test_a_household_of_which_nothing_is_known_gets_a_probability_that_ignores_the_accounts_age() -> None:
    spec = load_spec("demo.model:repurchase")
    names = ("a__x", "user_at_request__account_age_days", "a__y")
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(4000, 3))
    matrix[rng.random(matrix.shape) < 0.3] = np.nan
    labels = (np.nan_to_num(matrix[:, 0]) + rng.normal(size=4000) > 0).astype(int)
    estimator = spec.build(MatrixColumns(names)).fit(matrix, labels)
    older = matrix + np.array([0.0, 1000.0, 0.0])
    assert np.array_equal(estimator.predict_proba(matrix), estimator.predict_proba(older))
    assert 0.2 < estimator.predict_proba(np.full((1, 3), np.nan))[0, 1] < 0.8
