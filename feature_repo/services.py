"""What models read."""

from entities import OWNER
from feast import FeatureService
from on_demand import user_at_request
from views import user_activity, user_behavior, user_demographics

repurchase_v1 = FeatureService(
    name="repurchase_v1",
    features=[
        user_demographics[["age", "income", "household_size", "kids_count"]],
        user_behavior[
            [
                "purchase_amount_7d",
                "purchase_amount_30d",
                "baskets_7d",
                "baskets_30d",
                "distinct_products_30d",
                "coupons_used_30d",
                "shopping_days_30d",
                "average_basket_30d",
                "days_since_last_basket",
            ]
        ],
        user_activity[["basket_amount", "basket_products", "days_between_baskets"]],
        user_at_request,
    ],
    description="Features of the repurchase model: does the household buy again within 7 days?",
    owner=OWNER,
)
