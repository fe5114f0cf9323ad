"""How good a model is on rows it has not seen, beside baselines that anyone could have.

Pure: a model, a matrix and labels in, numbers out. Knows no Feast, no registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.model import LoadedModel

Array = NDArray[Any]
# Metrics of which less is better; of the others more is.
_LESS = frozenset({"log_loss", "brier", "calibration_error", "mae", "rmse"})


@dataclass(frozen=True, slots=True)
class Judgement:
    """Metrics on the held-out rows, with those of ``baselines`` by name among them.

    ``by`` are the metrics that decide whether the model beats a baseline.
    """

    metrics: Mapping[str, Any]
    by: tuple[str, ...]

    @property
    def beats(self) -> bool:
        """Whether the model is better than every baseline by every metric that decides."""
        return all(self._better(metric, values) for values in self._baselines.values() for metric in self.by)

    @property
    def not_better(self) -> dict[str, list[str]]:
        """Per other metric the baselines that the model does not beat."""
        found = {
            metric: [name for name, values in self._baselines.items() if not self._better(metric, values)]
            for metric in self.metrics
            if metric not in self.by
        }
        return {metric: names for metric, names in found.items() if names}

    @property
    def _baselines(self) -> Mapping[str, Mapping[str, Any]]:
        baselines: Mapping[str, Mapping[str, Any]] = self.metrics["baselines"]
        return baselines

    def _better(self, metric: str, baseline: Mapping[str, Any]) -> bool:
        """Whether the model is better; also where one of the two has no such metric."""
        if metric not in baseline or metric not in self.metrics:
            return True
        ours, theirs = self.metrics[metric], baseline[metric]
        return bool(ours < theirs if metric in _LESS else ours > theirs)


def judge(
    model: LoadedModel,
    matrix: Array,
    labels: Array,
    parts: Mapping[str, Array],
    *,
    recency: int | None = None,
) -> Judgement:
    """Metrics on the held-out rows, of the model and of each baseline.

    Args:
        model: what is judged.
        matrix: float64 (rows, features), all rows.
        labels: shape (rows,): classes, or a regressor's values.
        parts: positions of the ``training`` and ``holdout`` rows.
        recency: the column of the recency-only baseline, which needs a binary classifier.

    Beating a baseline means a lower ``log_loss`` and a higher ``roc_auc``, or a lower ``rmse``, or a higher
    ``accuracy`` where there are no probabilities.
    """
    training, holdout = parts["training"], parts["holdout"]
    predicted = model.predict(matrix[holdout])
    truth = labels[holdout]
    classes = np.array(model.manifest.classes)
    if not len(classes):
        metrics = value_metrics(truth, np.array(predicted.labels))
        mean = np.full(len(truth), labels[training].mean())
        metrics["baselines"] = {"mean": value_metrics(truth, mean)}
        return Judgement(metrics, ("rmse",))
    known, truth = np.searchsorted(classes, labels[training]), np.searchsorted(classes, truth)
    constant = constant_probabilities(known, len(classes), len(truth))
    if predicted.probabilities is None:
        found = np.searchsorted(classes, np.array(predicted.labels))
        metrics = {
            "accuracy": float((found == truth).mean()),
            "baselines": {"most_common": {"accuracy": float((truth == constant[0].argmax()).mean())}},
        }
        return Judgement(metrics, ("accuracy",))
    metrics = probability_metrics(truth, predicted.probabilities)
    baselines = {"constant_rate": probability_metrics(truth, constant)}
    if len(classes) == 2:
        metrics["reliability"] = reliability(truth, predicted.probabilities[:, 1])
        if recency is not None:
            guess = recency_probabilities(matrix[training, recency], known, matrix[holdout, recency])
            baselines["recency_only"] = probability_metrics(truth, guess)
    metrics["baselines"] = baselines
    return Judgement(metrics, tuple(name for name in ("log_loss", "roc_auc") if name in metrics))


def probability_metrics(labels: Array, probabilities: Array) -> dict[str, Any]:
    """Metrics of class probabilities.

    Args:
        labels: class indices, shape (rows,).
        probabilities: shape (rows, classes), each row summing to 1.

    Returns:
        ``log_loss`` and ``accuracy``; ``roc_auc`` where every class occurs (one against the rest, averaged,
        for more than two); for two classes also ``brier`` and ``calibration_error``.
    """
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    classes = np.arange(probabilities.shape[1])
    metrics: dict[str, Any] = {
        "log_loss": float(log_loss(labels, probabilities, labels=classes)),
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
    }
    binary = len(classes) == 2
    if len(np.unique(labels)) == len(classes):
        scores = probabilities[:, 1] if binary else probabilities
        metrics["roc_auc"] = float(roc_auc_score(labels, scores, multi_class="ovr", labels=classes))
    if binary:
        metrics["brier"] = float(brier_score_loss(labels, probabilities[:, 1]))
        metrics["calibration_error"] = calibration_error(reliability(labels, probabilities[:, 1]))
    return metrics


def reliability(labels: Array, probability: Array, bins: int = 10) -> list[dict[str, float]]:
    """Predicted against observed rates in ``bins`` groups of equally many rows, by ascending probability."""
    order = np.argsort(probability, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    return [
        {
            "predicted": float(probability[group].mean()),
            "observed": float(labels[group].mean()),
            "rows": len(group),
        }
        for group in groups
    ]


def calibration_error(table: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: the mean distance of predicted and observed rates, weighted by rows.

    Naeini, Cooper, Hauskrecht: Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.
    """
    rows = sum(group["rows"] for group in table)
    return float(sum(abs(g["predicted"] - g["observed"]) * g["rows"] for g in table) / rows)


def value_metrics(labels: Array, values: Array) -> dict[str, Any]:
    """Mean absolute error, root mean squared error and R² of predicted values."""
    error = values - labels
    spread = float(((labels - labels.mean()) ** 2).sum())
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": 1.0 - float((error**2).sum()) / spread if spread else 0.0,
    }


def constant_probabilities(train_labels: Array, classes: int, rows: int) -> Array:
    """The baseline that gives every row the class rates of the training part."""
    rates = np.bincount(train_labels, minlength=classes) / len(train_labels)
    return np.tile(rates, (rows, 1))


def recency_probabilities(train: Array, train_labels: Array, holdout: Array) -> Array:
    """The baseline that knows one feature only: logistic regression on log(1 + recency), missing marked.

    Args:
        train, holdout: the recency feature, shape (rows,), NaN where missing.
        train_labels: class indices, shape (rows,).
    """
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def shaped(column: Array) -> Array:
        return np.log1p(np.maximum(column, 0.0)).reshape(-1, 1)

    imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    model = make_pipeline(imputer, LogisticRegression(max_iter=1000)).fit(shaped(train), train_labels)
    found: Array = model.predict_proba(shaped(holdout))
    return found
