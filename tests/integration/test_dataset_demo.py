"""The demo's real data: what a model is served equals what it would be trained on, at the same moment."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from core.dataset import historical_vectors
from core.online import FeaturePlan, FeatureVectors, OnlineReader
from core.redis_connection import open_connection
from core.repository import FeastRepository
from core.types import FeatureStatus
from materialization import apply
from materialization.run import materialize
from tests.support import demo

SERVICE = "repurchase_v1"
PAIRS = 1_000


@pytest.fixture(scope="module")
def repository(demo_data: Path, valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    folder = tmp_path_factory.mktemp("parity") / "feature_repo"
    path = demo.copy(demo_data, folder, valkey.connection_string)
    config = path / "feature_store.yaml"
    config.write_text(config.read_text().replace("project: banquet", "project: parity"))
    repository = FeastRepository.open(path)
    apply.apply(repository, apply.plan(repository))
    # From the beginning: an incremental run leaves out what is past its ttl already, which is then not found.
    materialize(repository, start=datetime(2000, 1, 1, tzinfo=UTC))
    return repository


def test_a_thousand_served_vectors_equal_their_historical_rows(repository: FeastRepository) -> None:
    now = datetime.now(tz=UTC).replace(microsecond=0)
    plan = FeaturePlan.for_service(repository.definitions(), SERVICE)
    drawn = random.Random(11)
    # Households with and without demographics, and some that never were.
    users = [drawn.randint(1, 2_600) for _ in range(PAIRS)]
    rows = pd.DataFrame({"user_id": users, "request_timestamp": int(now.timestamp())})

    async def online() -> FeatureVectors:
        connection = open_connection(repository.redis)
        await connection.connect()
        try:
            columns = {name: rows[name].tolist() for name in rows.columns}
            at = int(now.timestamp()) * 10**9
            return await OnlineReader(connection).read(plan, columns, PAIRS, at)
        finally:
            await connection.close()

    served = asyncio.run(online())
    built = historical_vectors(repository, SERVICE, rows.assign(event_timestamp=now))
    seen: Counter[FeatureStatus] = Counter()
    for name in plan.names:
        assert served.values[name] == built.values[name], name
        present = [FeatureStatus.PRESENT] * PAIRS
        statuses = served.statuses[name] or present
        assert statuses == (built.statuses[name] or present), name
        seen.update(statuses)
    assert served.event_ns == built.event_ns
    assert seen[FeatureStatus.PRESENT] > PAIRS * 5
    assert {FeatureStatus.NOT_FOUND, FeatureStatus.OUTSIDE_MAX_AGE} <= seen.keys()


def test_a_vector_of_another_moment_is_another(repository: FeastRepository) -> None:
    now = datetime.now(tz=UTC)
    rows = pd.DataFrame({"user_id": range(1, 200), "request_timestamp": 0, "event_timestamp": now})
    today, before = (
        historical_vectors(repository, SERVICE, rows.assign(event_timestamp=now - timedelta(days=age)))
        for age in (0, 90)
    )
    assert (
        today.values["user_behavior__purchase_amount_30d"]
        != before.values["user_behavior__purchase_amount_30d"]
    )
