"""The demo's model: does a household buy again within 7 days?

``banquet train --spec demo.model:repurchase`` reads it. The choices and what they were measured against are
in docs/adr/0011-demo-model.md.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from demo.sources import entities
from training.spec import MatrixColumns, ModelSpec

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

# Nearly every household enters in the first weeks of the data, so its age tells the calendar and not the
# customer: a model that learns it is out of calibration when the calendar moves on.
_UNUSED = ("user_at_request__account_age_days",)


def build(columns: MatrixColumns) -> Pipeline:
    """Boosted trees of 8 leaves; they route a missing value themselves, so nothing is imputed."""
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline

    unused = {columns.index(name) for name in _UNUSED}
    used = [column for column in columns.numeric if column not in unused]
    return make_pipeline(
        ColumnTransformer([("used", "passthrough", used)]),
        HistGradientBoostingClassifier(
            max_iter=80,
            learning_rate=0.1,
            max_leaf_nodes=8,
            min_samples_leaf=100,
            early_stopping=False,
            random_state=0,
        ),
    )


repurchase = ModelSpec(
    name="repurchase",
    service="repurchase_v1",
    entities=entities,
    label="label",
    build=build,
    holdout=timedelta(weeks=6),
    label_horizon=timedelta(days=7),
    calibration=timedelta(weeks=4),
    recency_feature="user_behavior__days_since_last_basket",
    description="Whether the household buys again within 7 days.",
)
