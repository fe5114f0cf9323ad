"""``POST /get-online-features`` beside a running ``feast serve`` on the same Redis, field for field.

Where the two differ, the test says how; docs/feature-server.md lists it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import every_type
from tests.support.server import banquet, feast_serve

UNKNOWN = 99
NEVER = "1970-01-01T00:00:00Z"
STORED = [
    "profile:age", "profile:city", "profile:member",
    "behavior:visits", "behavior:spend", "behavior:seen_at", "behavior:tags",
    "stock:level", "stock:ratio", "visits:count", "climate:temperature", "clicks:clicks_1h",
]  # fmt: skip
FRESH = {"user_id": [1, 1], "store_code": ["north", "north"]}
# Fresh, expired, with nulls, with a profile only, unknown.
ALL = {"user_id": [1, 2, 3, 4, UNKNOWN], "store_code": ["north", "süd", "north", "süd", "nowhere"]}


@pytest.fixture(scope="module")
def stock(shop: Path) -> Iterator[httpx.Client]:
    with feast_serve(shop) as client:
        yield client


@pytest.fixture(scope="module")
def ours(shop: Path) -> Iterator[httpx.Client]:
    with banquet(shop) as client:
        yield client


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/get-online-features", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def by_name(answer: dict[str, Any]) -> dict[str, Any]:
    names = answer["metadata"]["feature_names"]
    assert len(set(names)) == len(names) == len(answer["results"])
    return dict(zip(names, answer["results"], strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "asked",
    [{"features": STORED}, {"feature_service": "plain"}, {"features": ["visits:count"]}],
    ids=["references", "service", "one view"],
)
def test_fresh_rows_are_answered_with_the_very_json_of_stock(
    stock: httpx.Client, ours: httpx.Client, asked: dict[str, Any], full: bool
) -> None:
    body = {**asked, "entities": FRESH, "full_feature_names": full}
    theirs, found = ask(stock, body), ask(ours, body)
    assert theirs.keys() == found.keys() == {"metadata", "results"}
    assert by_name(theirs) == by_name(found)


@pytest.mark.parametrize("full", [False, True])
def test_names_stand_in_the_order_of_the_request_after_the_keys(ours: httpx.Client, full: bool) -> None:
    """Stock takes the order from a set: it changes with PYTHONHASHSEED."""
    features = ["profile:city", "behavior:spend", "profile:age", "behavior:visits"]
    body = {"features": features, "entities": {"user_id": [1]}, "full_feature_names": full}
    expected = [f.replace(":", "__") if full else f.partition(":")[2] for f in features]
    assert ask(ours, body)["metadata"]["feature_names"] == ["user_id", *expected]
    service = {"feature_service": "plain", "entities": {"user_id": [1]}}
    names = ask(ours, service)["metadata"]["feature_names"]
    assert names == ["user_id", "spend", "visits", "city", "age"]
    both = {"features": ["visits:count"], "entities": {"store_code": ["north"], "user_id": [1]}}
    assert ask(ours, both)["metadata"]["feature_names"] == ["store_code", "user_id", "count"]


def test_missing_and_expired_rows_differ_from_stock_in_status_and_in_hidden_values_only(
    stock: httpx.Client, ours: httpx.Client
) -> None:
    body = {"features": STORED, "entities": ALL}
    theirs, found = by_name(ask(stock, body)), by_name(ask(ours, body))
    assert theirs.keys() == found.keys()
    seen = set()
    for name, result in found.items():
        other = theirs[name]
        assert result["event_timestamps"] == other["event_timestamps"], name
        assert set(other["statuses"]) == {"PRESENT"}, "stock calls everything PRESENT on Redis"
        for row, status in enumerate(result["statuses"]):
            value, stored = result["values"][row], other["values"][row]
            seen.add(status)
            if status == "PRESENT":
                assert value == stored, (name, row)
            else:
                assert value is None
            if status == "NOT_FOUND":
                assert stored is None
                assert result["event_timestamps"][row] == NEVER
            if status == "NULL_VALUE":
                # A missing timestamp is the number that stands for it.
                assert stored in (None, -(2**63))
    assert seen == {"PRESENT", "NOT_FOUND", "NULL_VALUE", "OUTSIDE_MAX_AGE"}
    assert found["spend"]["statuses"] == [
        "PRESENT", "OUTSIDE_MAX_AGE", "NULL_VALUE", "NOT_FOUND", "NOT_FOUND",
    ]  # fmt: skip
    assert theirs["spend"]["values"][1] == 7.0, "stock serves the expired value"


def test_on_demand_features_equal_those_of_stock_where_it_computes_them(
    stock: httpx.Client, ours: httpx.Client
) -> None:
    entities = {"user_id": [1], "amount": [5.0]}
    for features in (["basket:share"], ["decades:decade"], ["rates:spend_per_visit", "behavior:spend"]):
        needed = entities if features == ["basket:share"] else {"user_id": [1]}
        body = {"features": features, "entities": needed}
        assert by_name(ask(stock, body)) == by_name(ask(ours, body)), features


def test_python_on_demand_features_are_there_with_full_names_and_for_several_rows(
    stock: httpx.Client, ours: httpx.Client
) -> None:
    full = {
        "features": ["basket:share"],
        "entities": {"user_id": [1], "amount": [5.0]},
        "full_feature_names": True,
    }
    assert ask(stock, full)["metadata"]["feature_names"] == ["user_id"], "stock drops it"
    found = by_name(ask(ours, full))
    assert found["basket__share"] == {"values": [0.4], "statuses": ["PRESENT"], "event_timestamps": [NEVER]}
    rows = {"features": ["decades:decade"], "entities": {"user_id": [1, 2, 3]}}
    assert by_name(ask(stock, rows))["decade"]["values"] == [4], "stock computes the first row only"
    decade = by_name(ask(ours, rows))["decade"]
    assert decade["values"] == [4, 5, None]
    assert decade["statuses"] == ["PRESENT", "PRESENT", "NULL_VALUE"]


def test_an_on_demand_function_never_sees_an_expired_value(stock: httpx.Client, ours: httpx.Client) -> None:
    body = {"features": ["rates:spend_per_visit"], "entities": {"user_id": [2]}}
    assert by_name(ask(stock, body))["spend_per_visit"]["values"] == [3.5]
    assert by_name(ask(ours, body))["spend_per_visit"]["values"] == [None]


def test_join_keys_of_other_views_are_repeated_as_stock_does(stock: httpx.Client, ours: httpx.Client) -> None:
    for body in (
        {"features": ["profile:age"], "entities": {"store_code": ["north"], "user_id": [1]}},
        {"features": ["climate:temperature"], "entities": {"store_code": ["north", "x"]}},
        {"features": ["climate:temperature"], "entities": {"__dummy_id": ["", ""]}},
        {"features": ["profile:age"], "entities": {"user_id": [1], "__dummy_id": [""]}},
    ):
        assert ask(stock, body) == ask(ours, body)


def test_renamed_views_and_keys_equal_those_of_stock(stock: httpx.Client, ours: httpx.Client) -> None:
    entities = {"buyer_id": [1, 2], "seller_id": [4, 1]}
    body = {"feature_service": "renamed", "entities": entities, "full_feature_names": True}
    assert by_name(ask(stock, body)) == by_name(ask(ours, body))


def test_view_versions_are_told_as_stock_does(stock: httpx.Client, ours: httpx.Client) -> None:
    body = {
        "features": ["behavior:spend", "profile:age"],
        "entities": {"user_id": [1]},
        "include_feature_view_version_metadata": True,
    }
    theirs, found = ask(stock, body)["metadata"], ask(ours, body)["metadata"]
    assert found["feature_view_metadata"] == [{"name": "behavior"}, {"name": "profile"}]
    assert sorted(theirs["feature_view_metadata"], key=lambda m: m["name"]) == found["feature_view_metadata"]


def test_a_view_without_entities_needs_none(stock: httpx.Client, ours: httpx.Client) -> None:
    body = {"features": ["climate:temperature"], "entities": {}}
    assert stock.post("/get-online-features", json=body).status_code == 500
    assert by_name(ask(ours, body))["temperature"]["values"] == [21.5]


def test_health_answers_200_on_both(stock: httpx.Client, ours: httpx.Client) -> None:
    assert stock.get("/health").status_code == ours.get("/health").status_code == 200


def test_a_server_without_a_model_is_ready_to_serve_features(ours: httpx.Client) -> None:
    assert ours.get("/readyz").status_code == 200


def test_every_feature_type_has_the_json_of_stock(valkey: Any, tmp_path: Path) -> None:
    """Values of item 3 are at the edges of their types, those of item 2 are null."""
    repository = every_type.applied(tmp_path, valkey.connection_string)
    every_type.store_rows(repository)
    names = [dtype.name.lower() for dtype in every_type.VALUES]
    body = {"features": [f"every:{name}" for name in names], "entities": {"item_id": [1, 2, 3, UNKNOWN]}}
    with feast_serve(tmp_path) as stock, banquet(tmp_path) as ours:
        theirs, found = by_name(ask(stock, body)), by_name(ask(ours, body))
    assert list(found) == ["item_id", *names]
    for name in names:
        assert found[name]["event_timestamps"] == theirs[name]["event_timestamps"]
        assert found[name]["statuses"] == ["PRESENT", "NULL_VALUE", "PRESENT", "NOT_FOUND"], name
        if name == "scalar_map":
            assert theirs[name]["values"] == [None] * 4, "stock does not convert scalar maps"
            assert found[name]["values"] == [{"1": "a", "2": "b"}, None, {"true": None}, None]
        else:
            assert found[name]["values"] == theirs[name]["values"], name
            assert None not in (found[name]["values"][0], found[name]["values"][2]), name
