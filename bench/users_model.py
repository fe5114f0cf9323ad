"""The model of the serving bench: the demo's estimator, 80 small boosted trees, on all 13 features."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from training.spec import MatrixColumns, ModelSpec

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.base import ClassifierMixin


def labels(repo: Path) -> pd.DataFrame:
    """Some users a little after their rows' timestamps, with a label that their features explain in part."""
    import numpy as np
    import pandas as pd

    frame = pd.read_parquet(repo / "data" / "user_behavior").iloc[:6000]
    noise = np.random.default_rng(3).normal(scale=20.0, size=len(frame))
    return pd.DataFrame(
        {
            "user_id": frame["user_id"],
            "event_timestamp": frame["event_timestamp"] + pd.Timedelta(seconds=1),
            "churned": (frame["signal_0"] + noise < 50.0).astype(int),
        }
    )


def build(columns: MatrixColumns) -> ClassifierMixin:  # noqa: ARG001 — the signature of a spec
    """The unfitted estimator; it takes missing values as they are."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=80, max_leaf_nodes=8, min_samples_leaf=100, early_stopping=False, random_state=0
    )


churn = ModelSpec(
    name="churn",
    service="users",
    entities=labels,
    label="churned",
    build=build,
    holdout=timedelta(days=2),
    label_horizon=timedelta(0),
)
