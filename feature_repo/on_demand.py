"""Features that are computed when they are asked for, the same way in training and in serving.

The function's source is what Feast registers, so all that it needs stands inside it. Feast 0.67 refuses tags
on the fields of an on-demand view, so expectations stand on its inputs only.
"""

from typing import Any

from entities import OWNER
from feast import Field, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64
from views import user_activity

request_time = RequestSource(
    name="request_time",
    schema=[
        Field(
            name="request_timestamp",
            dtype=Int64,
            description="The moment the features are for, in epoch seconds.",
            tags={"min": "0", "nullable": "true", "default": "now"},
        )
    ],
    description="When the prediction is asked for.",
    owner=OWNER,
)


@on_demand_feature_view(
    name="user_at_request",
    sources=[user_activity[["first_basket_at", "last_basket_at", "activity_score"]], request_time],
    schema=[
        Field(name="account_age_days", dtype=Float64),
        Field(name="recent_activity_score", dtype=Float64),
    ],
    mode="python",
    description="Days since the first basket, and the activity score carried to the moment of the request.",
    owner=OWNER,
)
def user_at_request(inputs: dict[str, Any]) -> dict[str, Any]:
    day = 86400.0
    half_life = 7 * day

    def known(*values: Any) -> bool:
        # None online; pandas turns it into NaN, the only value that differs from itself.
        return all(value is not None and value == value for value in values)

    ages = []
    scores = []
    for now, first, last, score in zip(
        inputs["request_timestamp"],
        inputs["first_basket_at"],
        inputs["last_basket_at"],
        inputs["activity_score"],
        strict=True,
    ):
        # A checkout may be stamped a little after the request: no time has passed then, never less.
        ages.append(max(now - first, 0) / day if known(now, first) else None)
        scores.append(score * 0.5 ** (max(now - last, 0) / half_life) if known(now, last, score) else None)
    return {"account_age_days": ages, "recent_activity_score": scores}
