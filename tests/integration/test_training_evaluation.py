"""Metrics against definitions written out by hand, and the verdict on a model beside its baselines."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from core.model import LoadedModel
from tests.support import packages
from training import evaluation

Array = NDArray[Any]
RNG = np.random.default_rng(3)
_START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def the_same_numbers_whatever_ran_before() -> None:
    RNG.bit_generator.state = _START


def test_probability_metrics_are_what_their_definitions_say() -> None:
    labels = RNG.integers(0, 2, 60)
    second = np.round(RNG.uniform(0.05, 0.95, 60), 2)
    found = evaluation.probability_metrics(labels, np.column_stack([1 - second, second]))
    of_label = [p if label else 1 - p for p, label in zip(second, labels, strict=True)]
    assert found["log_loss"] == pytest.approx(-sum(map(math.log, of_label)) / 60)
    assert found["brier"] == pytest.approx(sum((1 - p) ** 2 for p in of_label) / 60)
    assert found["accuracy"] == pytest.approx(
        sum(p > 0.5 or (p == 0.5 and not label) for p, label in zip(of_label, labels, strict=True)) / 60
    )
    pairs = list(itertools.product(second[labels == 1], second[labels == 0]))
    wins = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
    assert found["roc_auc"] == pytest.approx(wins / len(pairs))


def test_a_holdout_that_lacks_a_class_has_no_roc_auc() -> None:
    found = evaluation.probability_metrics(np.zeros(4, int), np.tile([0.7, 0.3], (4, 1)))
    assert "roc_auc" not in found
    assert found["log_loss"] == pytest.approx(-math.log(0.7))


def test_three_classes_are_judged_one_against_the_rest() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    sure = np.eye(3)[labels] * 0.7 + 0.1
    found = evaluation.probability_metrics(labels, sure)
    assert (found["accuracy"], found["roc_auc"]) == (1.0, 1.0)
    assert "brier" not in found


def test_reliability_groups_equally_many_rows_by_ascending_probability() -> None:
    probability = np.array([0.9, 0.1, 0.8, 0.2])
    labels = np.array([1, 0, 0, 0])
    assert evaluation.reliability(labels, probability, bins=2) == [
        {"predicted": pytest.approx(0.15), "observed": 0.0, "rows": 2},
        {"predicted": pytest.approx(0.85), "observed": 0.5, "rows": 2},
    ]
    assert len(evaluation.reliability(labels, probability, bins=10)) == 4


def test_the_calibration_error_weighs_groups_by_their_rows() -> None:
    table = [
        {"predicted": 0.2, "observed": 0.3, "rows": 30.0},
        {"predicted": 0.8, "observed": 0.6, "rows": 10.0},
    ]
    assert evaluation.calibration_error(table) == pytest.approx((0.1 * 30 + 0.2 * 10) / 40)


def test_probabilities_drawn_from_themselves_are_calibrated() -> None:
    probability = RNG.uniform(size=50_000)
    labels = (RNG.uniform(size=50_000) < probability).astype(int)
    good = evaluation.calibration_error(evaluation.reliability(labels, probability))
    bad = evaluation.calibration_error(evaluation.reliability(labels, probability**2))
    assert good < 0.01 < 0.1 < bad


def test_value_metrics_are_what_their_definitions_say() -> None:
    found = evaluation.value_metrics(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 6.0]))
    assert found == {
        "mae": pytest.approx(1.0),
        "rmse": pytest.approx(math.sqrt(3)),
        "r2": pytest.approx(1 - 9 / 2),
    }
    assert evaluation.value_metrics(np.ones(2), np.ones(2))["r2"] == 0.0


def test_the_constant_baseline_gives_the_training_rates() -> None:
    found = evaluation.constant_probabilities(np.array([0, 0, 0, 2]), 3, 2)
    assert found.tolist() == [[0.75, 0.0, 0.25], [0.75, 0.0, 0.25]]


def test_the_recency_baseline_learns_from_one_column_and_takes_gaps() -> None:
    days = RNG.exponential(20, 4_000)
    labels = (RNG.uniform(size=4_000) < 1 / (1 + days)).astype(int)
    days[:100] = np.nan
    labels[:100] = 1
    found = evaluation.recency_probabilities(days, labels, np.array([0.0, 5.0, 50.0, np.nan]))[:, 1]
    assert found[0] > found[1] > found[2]
    assert found[3] > 0.5
    assert np.allclose(
        evaluation.recency_probabilities(days * np.nan, labels, np.array([1.0, np.nan]))[:, 1],
        labels.mean(),
        atol=0.01,
    )


class Column:
    """A model whose probability is the first column of the matrix, or whose answer is."""

    def __init__(self, form: str) -> None:
        self.form = form

    def scores(self, matrix: Array) -> Array:
        first = matrix[:, 0]
        if self.form == "probabilities":
            return np.column_stack([1 - first, first])
        return (first > 0.5).astype(np.int64) if self.form == "classes" else first


def judged(
    truth: Array, form: str = "probabilities", classes: tuple[Any, ...] = ("no", "yes"), **options: Any
) -> evaluation.Judgement:
    """The verdict on 4,000 rows, the first half training; column 0 is what the model says, column 1 noise."""
    says = RNG.uniform(0.02, 0.98, len(truth)) if "says" not in options else options.pop("says")
    matrix = np.column_stack([says, RNG.uniform(size=len(truth))])
    task = "classification" if classes else "regression"
    model = LoadedModel(packages.manifest(golden=(), task=task, classes=classes), Column(form))
    half = len(truth) // 2
    parts = {"training": np.arange(half), "holdout": np.arange(half, len(truth))}
    return evaluation.judge(model, matrix, truth, parts, **options)


def test_a_model_that_knows_beats_both_baselines_and_one_that_does_not_beats_none() -> None:
    says = RNG.uniform(0.02, 0.98, 4_000)
    truth = np.where(RNG.uniform(size=4_000) < says, "yes", "no")
    found = judged(truth, says=says, recency=1)
    assert found.beats
    assert set(found.metrics["baselines"]) == {"constant_rate", "recency_only"}
    assert found.metrics["calibration_error"] < 0.05
    assert len(found.metrics["reliability"]) == 10
    assert found.by == ("log_loss", "roc_auc")
    found = judged(truth, recency=1)
    assert not found.beats


def test_what_does_not_decide_is_told_where_a_baseline_is_as_good() -> None:
    """A constant rate that is right on average has hardly a calibration error, whatever it is worth."""
    constant = {"log_loss": 0.69, "roc_auc": 0.5, "accuracy": 0.55, "calibration_error": 0.01}
    recency = {"log_loss": 0.59, "roc_auc": 0.7, "accuracy": 0.75, "calibration_error": 0.03}
    ours = {"log_loss": 0.51, "roc_auc": 0.8, "accuracy": 0.75, "calibration_error": 0.02, "reliability": []}
    metrics = {**ours, "baselines": {"constant_rate": constant, "recency_only": recency}}
    found = evaluation.Judgement(metrics, ("log_loss", "roc_auc"))
    assert found.beats
    assert found.not_better == {"accuracy": ["recency_only"], "calibration_error": ["constant_rate"]}
    assert not evaluation.Judgement(metrics, ("log_loss", "accuracy")).beats


def test_a_model_no_better_than_recency_does_not_beat_the_baselines() -> None:
    says = RNG.uniform(0.02, 0.98, 4_000)
    truth = np.where(RNG.uniform(size=4_000) < says, "yes", "no")
    noisy = np.clip(says + RNG.normal(0, 0.3, 4_000), 0.02, 0.98)
    model = LoadedModel(
        packages.manifest(golden=(), task="classification", classes=("no", "yes")), Column("probabilities")
    )
    parts = {"training": np.arange(2_000), "holdout": np.arange(2_000, 4_000)}
    found = evaluation.judge(model, np.column_stack([noisy, says]), truth, parts, recency=1)
    assert found.metrics["roc_auc"] > found.metrics["baselines"]["constant_rate"]["roc_auc"]
    assert not found.beats


def test_a_model_without_probabilities_is_judged_by_its_accuracy() -> None:
    says = RNG.uniform(size=400)
    truth = np.where(says > 0.5, "yes", "no")
    found = judged(truth, "classes", says=says)
    assert (found.metrics["accuracy"], found.beats) == (1.0, True)
    found = judged(np.array(["yes"] * 399 + ["no"]), "classes")
    assert not found.beats


def test_a_regressor_is_judged_against_the_mean() -> None:
    says = RNG.uniform(size=400)
    found = judged(says + RNG.normal(0, 0.1, 400), "values", (), says=says)
    assert found.beats
    assert found.metrics["r2"] > 0.5
    found = judged(RNG.normal(0, 0.1, 400), "values", ())
    assert not found.beats
