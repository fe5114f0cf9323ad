"""How good a model is on rows it has not seen, beside baselines that anyone could have.

Pure: labels and scores in, numbers out. Knows no Feast, no registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
