"""The historical read says, value by value and status by status, what the online read says at that moment."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from core.dataset import historical_vectors, training_dataset
from core.online import FeaturePlan, FeatureVectors, OnlineReader
from core.redis_connection import open_connection
from core.repository import FeastRepository
from core.types import FeatureStatus
from tests.support import shop as source

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NOW_NS = int(source.NOW.timestamp()) * 1_000_000_000


def online(repository: FeastRepository, plan: FeaturePlan, rows: pd.DataFrame) -> FeatureVectors:
    async def scenario() -> FeatureVectors:
        connection = open_connection(repository.redis)
        await connection.connect()
        try:
            columns = {name: rows[name].tolist() for name in rows.columns}
            return await OnlineReader(connection).read(plan, columns, len(rows), NOW_NS)
        finally:
            await connection.close()

    return asyncio.run(scenario())


@pytest.mark.parametrize("service", ["everything", "plain", "renamed"])
def test_a_vector_is_the_same_from_redis_and_from_the_sources(shop: Path, service: str) -> None:
    repository = FeastRepository.open(shop)
    plan = FeaturePlan.for_service(repository.definitions(), service)
    choices: dict[str, list[Any]] = {
        "user_id": [1, 2, 3, 4, 99],
        "buyer_id": [1, 2, 3, 99],
        "seller_id": [4, 1, 99],
        "store_code": ["north", "süd", "west"],
        "amount": [5.0, 0.0],
    }
    names = [*(key.name for key in plan.join_keys), *plan.request_inputs]
    rows = pd.DataFrame(list(itertools.product(*(choices[name] for name in names))), columns=names)

    asked = online(repository, plan, rows)
    built = historical_vectors(repository, service, rows.assign(event_timestamp=source.NOW))
    seen = set()
    for name in plan.names:
        assert built.values[name] == asked.values[name], name
        present = [FeatureStatus.PRESENT] * len(rows)
        assert (built.statuses[name] or present) == (asked.statuses[name] or present), name
        seen |= set(asked.statuses[name] or present)
    for view, events in asked.event_ns.items():
        assert built.event_ns[view] == events
    if service == "everything":
        assert seen == {*FeatureStatus} - {FeatureStatus.INVALID}


def test_a_training_set_holds_the_values_that_are_served(shop: Path) -> None:
    repository = FeastRepository.open(shop)
    rows = pd.DataFrame({"user_id": [3, 1, 99, 1, 2], "label": list("abcde"), "event_timestamp": source.NOW})
    plan = FeaturePlan.for_service(repository.definitions(), "plain")
    asked = online(repository, plan, rows[["user_id"]])
    dataset = training_dataset(repository, "plain", rows)
    assert dataset.table.column_names == [*rows.columns, *plan.names]
    for name in plan.names:
        assert dataset.table[name].to_pylist() == asked.values[name]
