"""Who the features are about."""

from feast import Entity, ValueType

OWNER = "growth@example.com"

user = Entity(
    name="user",
    join_keys=["user_id"],
    value_type=ValueType.INT64,
    description="A household that shops with a loyalty card.",
    owner=OWNER,
)
