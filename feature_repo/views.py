"""Stored features and the sources they come from.

Expectations stand beside the fields they are about, as tags: `min`, `max`, `nullable`, `max_null_rate`,
`outlier_sigma` and `categories` (a JSON list). Feast tags are strings.
"""

import json
from datetime import timedelta

from entities import OWNER, user
from feast import FeatureView, Field, FileSource, PushSource
from feast.types import Bool, Float64, Int64, String

AGE_BANDS = ["19-24", "25-34", "35-44", "45-54", "55-64", "65+"]
INCOME_BANDS = [
    "Under 15K",
    "15-24K",
    "25-34K",
    "35-49K",
    "50-74K",
    "75-99K",
    "100-124K",
    "125-149K",
    "150-174K",
    "175-199K",
    "200-249K",
    "250K+",
]


def _source(name: str, description: str) -> FileSource:
    return FileSource(
        name=f"{name}_source",
        path=f"data/{name}.parquet",
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        description=description,
        owner=OWNER,
    )


user_demographics = FeatureView(
    name="user_demographics",
    entities=[user],
    # What a survey said does not expire; households that were not asked have no row at all.
    ttl=timedelta(0),
    schema=[
        Field(
            name="age",
            dtype=Int64,
            description="Years, the middle of the age band.",
            tags={"min": "18", "max": "100", "nullable": "false"},
        ),
        Field(
            name="age_band",
            dtype=String,
            description="Age of the main shopper, as the survey asked it.",
            tags={"nullable": "false", "categories": json.dumps(AGE_BANDS)},
        ),
        Field(
            name="income",
            dtype=Float64,
            description="US dollars a year, the middle of the income band.",
            tags={"min": "0", "max": "1000000", "nullable": "false"},
        ),
        Field(
            name="income_band",
            dtype=String,
            description="Household income, as the survey asked it.",
            tags={"nullable": "false", "categories": json.dumps(INCOME_BANDS)},
        ),
        Field(
            name="household_size",
            dtype=Int64,
            description="Persons; 5 stands for five or more.",
            tags={"min": "1", "max": "5", "nullable": "false"},
        ),
        Field(
            name="kids_count",
            dtype=Int64,
            description="Children; 3 stands for three or more.",
            tags={"min": "0", "max": "3", "nullable": "false"},
        ),
        Field(
            name="home_owner",
            dtype=Bool,
            description="Owns the home (true) or rents it (false), known or probable.",
            tags={"nullable": "true", "max_null_rate": "0.5"},
        ),
        Field(
            name="marital_status",
            dtype=String,
            description="Married or Unmarried, where known.",
            tags={
                "nullable": "true",
                "max_null_rate": "0.4",
                "categories": json.dumps(["Married", "Unmarried"]),
            },
        ),
        Field(
            name="location",
            dtype=String,
            description="The store with most visits in the last 90 days; none without a visit.",
            tags={"nullable": "true", "max_null_rate": "0.2"},
        ),
    ],
    source=_source("demographics", "Survey answers and home store, written every Monday."),
    description="Who lives in the household. Known for about a third of the households.",
    owner=OWNER,
    tags={"cadence": "weekly"},
)

user_behavior = FeatureView(
    name="user_behavior",
    entities=[user],
    # Written daily, so three days leave room for two failed nights. A household without a basket in 30 days
    # gets no more snapshots and expires.
    ttl=timedelta(days=3),
    schema=[
        Field(
            name="purchase_amount_7d",
            dtype=Float64,
            description="US dollars spent in the last 7 days.",
            tags={"min": "0", "nullable": "false", "outlier_sigma": "30"},
        ),
        Field(
            name="purchase_amount_30d",
            dtype=Float64,
            description="US dollars spent in the last 30 days.",
            tags={"min": "0", "nullable": "false", "outlier_sigma": "30"},
        ),
        Field(
            name="baskets_7d",
            dtype=Int64,
            description="Baskets paid in the last 7 days.",
            tags={"min": "0", "max": "200", "nullable": "false"},
        ),
        Field(
            name="baskets_30d",
            dtype=Int64,
            description="Baskets paid in the last 30 days.",
            tags={"min": "1", "max": "500", "nullable": "false"},
        ),
        Field(
            name="distinct_products_7d",
            dtype=Int64,
            description="Different products bought in the last 7 days.",
            tags={"min": "0", "nullable": "false"},
        ),
        Field(
            name="distinct_products_30d",
            dtype=Int64,
            description="Different products bought in the last 30 days.",
            tags={"min": "1", "nullable": "false"},
        ),
        Field(
            name="coupons_used_7d",
            dtype=Int64,
            description="Purchases paid with a coupon in the last 7 days.",
            tags={"min": "0", "nullable": "false"},
        ),
        Field(
            name="coupons_used_30d",
            dtype=Int64,
            description="Purchases paid with a coupon in the last 30 days.",
            tags={"min": "0", "nullable": "false"},
        ),
        Field(
            name="shopping_days_30d",
            dtype=Int64,
            description="Days with a basket among the last 30.",
            tags={"min": "1", "max": "30", "nullable": "false"},
        ),
        Field(
            name="average_basket_7d",
            dtype=Float64,
            description="US dollars per basket in the last 7 days; none without a basket.",
            tags={"min": "0", "nullable": "true", "max_null_rate": "0.6"},
        ),
        Field(
            name="average_basket_30d",
            dtype=Float64,
            description="US dollars per basket in the last 30 days.",
            tags={"min": "0", "nullable": "false"},
        ),
        Field(
            name="days_since_last_basket",
            dtype=Float64,
            description="Days between the last basket and the snapshot.",
            tags={"min": "0", "max": "30", "nullable": "false"},
        ),
        Field(
            name="favourite_store",
            dtype=String,
            description="The store with most baskets in the last 30 days.",
            tags={"nullable": "false"},
        ),
    ],
    source=_source("behavior", "Trailing windows over the baskets, written every night for the day before."),
    description="What the household bought in the last 7 and 30 days, as of the last midnight.",
    owner=OWNER,
    tags={"cadence": "daily"},
)

user_activity_push = PushSource(
    name="user_activity_push",
    batch_source=_source("activity", "One event per checkout."),
    description="Checkouts, pushed as they happen.",
    owner=OWNER,
)

user_activity = FeatureView(
    name="user_activity",
    entities=[user],
    # A household that has not been seen for two months is treated like one that was never seen.
    ttl=timedelta(days=60),
    schema=[
        Field(
            name="basket_amount",
            dtype=Float64,
            description="US dollars paid at the last checkout.",
            tags={"min": "0", "nullable": "false", "outlier_sigma": "30"},
        ),
        Field(
            name="basket_products",
            dtype=Int64,
            description="Different products in the last basket.",
            tags={"min": "1", "nullable": "false"},
        ),
        Field(
            name="basket_coupon_used",
            dtype=Bool,
            description="Whether a coupon was used at the last checkout.",
            tags={"nullable": "false"},
        ),
        Field(
            name="baskets_total",
            dtype=Int64,
            description="Baskets since the household was first seen.",
            tags={"min": "1", "nullable": "true"},
        ),
        Field(
            name="days_between_baskets",
            dtype=Float64,
            description="Mean days from one basket to the next since the first; none after a single one.",
            tags={"min": "0", "nullable": "true"},
        ),
        Field(
            name="first_basket_at",
            dtype=Int64,
            description="When the household was first seen, in epoch seconds.",
            tags={"min": "0", "nullable": "true"},
        ),
        Field(
            name="last_basket_at",
            dtype=Int64,
            description="When the last checkout was, in epoch seconds: the event's own time.",
            tags={"min": "0", "nullable": "false"},
        ),
        Field(
            name="activity_score",
            dtype=Float64,
            description="Baskets so far, each halved for every 7 days that passed until the last one.",
            tags={"min": "0", "nullable": "true"},
        ),
    ],
    source=user_activity_push,
    description="The last checkout of the household and its running state.",
    owner=OWNER,
    tags={"cadence": "event"},
)
