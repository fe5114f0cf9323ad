"""Training and serving agree: an online vector equals the historical row for the same entity and moment."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
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

PAIRS = 1_000
SERVICE = "repurchase_v1"


@pytest.fixture(scope="module")
def repository(demo_data: Path, valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    """The demo on its real data, loaded from its first day on, so that expired rows are online too."""
    path = demo.copy(demo_data, tmp_path_factory.mktemp("parity") / "repo", valkey.connection_string)
    repository = FeastRepository.open(path)
    apply.apply(repository, apply.plan(repository))
    report = materialize(repository, start=datetime(2020, 1, 1, tzinfo=UTC))
    assert report.ok, report
    return repository


def online(repository: FeastRepository, columns: dict[str, list[Any]], now_ns: int) -> FeatureVectors:
    async def read() -> FeatureVectors:
        connection = open_connection(repository.redis)
        await connection.connect()
        try:
            plan = FeaturePlan.for_service(repository.definitions(), SERVICE)
            return await OnlineReader(connection).read(plan, columns, PAIRS, now_ns)
        finally:
            await connection.close()

    return asyncio.run(read())


def test_a_thousand_online_vectors_equal_their_historical_rows(repository: FeastRepository) -> None:
    """Value by value and status by status, on real households, unknown ones among them."""
    rng = np.random.default_rng(11)
    users = [int(user) for user in rng.integers(1, 2_700, PAIRS)]
    now = pd.Timestamp.now(tz="UTC").floor("s")
    moments = [int(now.timestamp())] * PAIRS
    entities = pd.DataFrame(
        {"user_id": users, "request_timestamp": moments, "event_timestamp": [now] * PAIRS}
    )
    then = historical_vectors(repository, SERVICE, entities)
    found = online(repository, {"user_id": users, "request_timestamp": moments}, moments[0] * 1_000_000_000)
    plan = FeaturePlan.for_service(repository.definitions(), SERVICE)
    seen: Counter[FeatureStatus] = Counter()
    for name in plan.names:
        present = [FeatureStatus.PRESENT] * PAIRS
        online_statuses = found.statuses[name] or present
        seen.update(online_statuses)
        assert online_statuses == (then.statuses[name] or present), name
        for user, here, there in zip(users, found.values[name], then.values[name], strict=True):
            same = here == there or (
                isinstance(here, float) and math.isclose(here, there, rel_tol=1e-12, abs_tol=0.0)
            )
            assert same, f"{name} of user {user}: {here!r} online, {there!r} in history"
    # The equality would mean little if everything had one status.
    assert {FeatureStatus.PRESENT, FeatureStatus.NOT_FOUND, FeatureStatus.OUTSIDE_MAX_AGE} <= set(seen)
    assert min(seen.values()) > 20
