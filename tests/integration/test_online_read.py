"""The online read on rows that stock Feast wrote: values as stock reads them, statuses by the contract."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from core.errors import FeatureNotFound, FeatureServiceNotFound, InvalidRequest
from core.online import FeaturePlan, FeatureVectors, OnlineReader
from core.redis_connection import open_connection
from core.repository import FeastRepository
from core.types import FeatureStatus as S
from tests.support import shop as source

NOW_NS = int(source.NOW.timestamp()) * 1_000_000_000
UNKNOWN = 99


def read(shop: Path, plan: FeaturePlan, columns: dict[str, list[Any]]) -> FeatureVectors:
    async def scenario() -> FeatureVectors:
        connection = open_connection(FeastRepository.open(shop).redis)
        await connection.connect()
        try:
            rows = len(next(iter(columns.values()), [None]))
            return await OnlineReader(connection).read(plan, columns, rows, NOW_NS)
        finally:
            await connection.close()

    return asyncio.run(scenario())


@pytest.fixture(scope="module")
def definitions(shop: Path) -> Any:
    return FeastRepository.open(shop).definitions()


def test_each_status_is_what_the_contract_says(shop: Path, definitions: Any) -> None:
    plan = FeaturePlan.for_references(
        definitions, ["behavior:spend", "behavior:visits", "profile:age", "profile:city"]
    )
    vectors = read(shop, plan, {"user_id": [1, 2, 3, 4, UNKNOWN]})
    assert vectors.values["behavior__spend"] == [12.5, None, None, None, None]
    assert vectors.statuses["behavior__spend"] == [
        S.PRESENT, S.OUTSIDE_MAX_AGE, S.NULL_VALUE, S.NOT_FOUND, S.NOT_FOUND,
    ]  # fmt: skip
    assert vectors.values["profile__age"] == [41, 52, None, 24, None]
    assert vectors.statuses["profile__age"] == [S.PRESENT, S.PRESENT, S.NULL_VALUE, S.PRESENT, S.NOT_FOUND]
    assert vectors.values["profile__city"] == ["Oslo", "Rome", None, "", None]
    assert vectors.event_ns["behavior"][1] == int(source.ago(days=5).timestamp()) * 1_000_000_000
    assert vectors.event_ns["behavior"][4] is None


def test_present_values_equal_those_of_stock_feast(shop: Path, definitions: Any) -> None:
    """Compared through Feast's own client, on the rows where stock is right.

    It raises for a singleton on-demand view with several rows, and leaves Python-mode on-demand features
    out when full names are asked for.
    """
    store = FeastRepository.open(shop).store()
    entities = {"user_id": [1, 1, 2], "store_code": ["north", "süd", "north"], "amount": [5.0, 1.0, 2.0]}
    service = FeaturePlan.for_service(definitions, "everything")
    names = [name for name in service.names if not name.startswith("decades")]
    references = [name.replace("__", ":", 1) for name in names]
    plan = FeaturePlan.for_references(definitions, references)
    vectors = read(shop, plan, entities)
    stock = store.get_online_features(
        references,
        [dict(zip(entities, row, strict=True)) for row in zip(*entities.values(), strict=True)],
    ).to_dict()
    assert sorted(plan.short_names.values()) == sorted(set(stock) - set(entities))
    compared = 0
    for name in plan.names:
        statuses = vectors.statuses[name] or [S.PRESENT] * 3
        for row, status in enumerate(statuses):
            if status is S.PRESENT:
                expected = stock[plan.short_names[name]][row]
                assert vectors.values[name][row] == expected, name
                compared += 1
    assert compared >= 30


def test_names_stand_in_the_order_of_the_service(definitions: Any) -> None:
    plan = FeaturePlan.for_service(definitions, "plain")
    assert plan.names == ["behavior__spend", "behavior__visits", "profile__city", "profile__age"]
    references = ["profile:city", "behavior:visits", "profile:age"]
    assert FeaturePlan.for_references(definitions, references).names == [
        "profile__city", "behavior__visits", "profile__age",
    ]  # fmt: skip


def test_views_with_the_same_join_keys_share_one_read(definitions: Any) -> None:
    plan = FeaturePlan.for_service(definitions, "everything")
    asked = {tuple(group.columns): len(group.slots) for group in plan._groups.values()}
    assert asked == {("user_id",): 2, ("store_code",): 1, ("store_code", "user_id"): 1, (): 1}


def test_a_renamed_join_key_reads_the_other_entity(shop: Path, definitions: Any) -> None:
    plan = FeaturePlan.for_service(definitions, "renamed")
    assert [key.name for key in plan.join_keys] == ["buyer_id", "seller_id"]
    vectors = read(shop, plan, {"buyer_id": [1, 2], "seller_id": [4, 1]})
    assert vectors.values["buyer__age"] == [41, 52]
    assert vectors.values["seller__age"] == [24, 41]
    assert vectors.values["seller__city"] == ["", "Oslo"]


def test_a_view_without_entities_gives_every_row_its_one_value(shop: Path, definitions: Any) -> None:
    plan = FeaturePlan.for_references(definitions, ["climate:temperature", "profile:age"])
    vectors = read(shop, plan, {"user_id": [1, 2, UNKNOWN]})
    assert vectors.values["climate__temperature"] == [21.5] * 3
    assert vectors.statuses["climate__temperature"] is None


def test_repeated_entities_are_read_once_and_answered_each(shop: Path, definitions: Any) -> None:
    plan = FeaturePlan.for_references(definitions, ["profile:age"])
    group = next(iter(plan._groups.values()))
    keys, index = group.keys({"user_id": [2, 1, 2, 2]}, 4)
    assert (len(keys), index) == (2, [0, 1, 0, 0])
    vectors = read(shop, plan, {"user_id": [2, 1, 2, 2]})
    assert vectors.values["profile__age"] == [52, 41, 52, 52]


def test_on_demand_features_run_in_every_mode_and_pass_missing_inputs_on(
    shop: Path, definitions: Any
) -> None:
    plan = FeaturePlan.for_references(
        definitions, ["basket:share", "decades:decade", "rates:spend_per_visit"]
    )
    assert list(plan.request_inputs) == ["amount"]
    vectors = read(shop, plan, {"user_id": [1, 2, UNKNOWN], "amount": [5.0, 1.0, 2.0]})
    assert vectors.values["basket__share"] == [0.4, None, None]
    assert vectors.values["decades__decade"] == [4, 5, None]
    assert vectors.values["rates__spend_per_visit"] == [3.125, None, None]
    assert vectors.statuses["basket__share"] == [S.PRESENT, S.NULL_VALUE, S.NULL_VALUE]
    assert vectors.event_ns.keys() == {"behavior", "profile"}


def test_the_time_to_live_boundary_is_inclusive(shop: Path, definitions: Any) -> None:
    plan = FeaturePlan.for_references(definitions, ["behavior:visits"])
    event = int(source.ago(hours=6).timestamp()) * 1_000_000_000
    ttl = 3 * 86_400 * 1_000_000_000

    async def scenario() -> list[Any]:
        connection = open_connection(FeastRepository.open(shop).redis)
        await connection.connect()
        try:
            reader = OnlineReader(connection)
            found = [await reader.read(plan, {"user_id": [1]}, 1, event + ttl + late) for late in (0, 1)]
            return [vectors.statuses["behavior__visits"] for vectors in found]
        finally:
            await connection.close()

    assert asyncio.run(scenario()) == [None, [S.OUTSIDE_MAX_AGE]]


@pytest.mark.parametrize(
    ("references", "error"),
    [
        (["behavior"], InvalidRequest),
        ([":spend"], InvalidRequest),
        (["behavior:"], InvalidRequest),
        (["behavior@vx:spend"], InvalidRequest),
        (["behavior:spend", "behavior:spend"], InvalidRequest),
        (["behavior:nothing"], FeatureNotFound),
        (["nothing:spend"], FeatureNotFound),
        (["behavior@v7:spend"], FeatureNotFound),
    ],
)
def test_references_that_name_nothing_are_refused(
    definitions: Any, references: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        FeaturePlan.for_references(definitions, references)


def test_an_unknown_service_is_refused_with_the_known_ones(definitions: Any) -> None:
    with pytest.raises(FeatureServiceNotFound, match="everything, plain, renamed"):
        FeaturePlan.for_service(definitions, "nothing")
