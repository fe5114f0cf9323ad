"""Labels by request id: they reach the rollout under way, and the judge decides by them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from core import rollouts
from core.registry import CHAMPION, ModelRegistry
from core.settings import Settings
from core.traffic import Step
from tests.support import trials
from tests.support.clients import Clients, post
from tests.support.server import banquet
from tests.support.trials import MODEL, Honest, Inverted
from tests.support.waiting import PATIENCE_SECONDS, wait_until

Scene = tuple[ModelRegistry, httpx.Client]


@pytest.fixture
def scene(valkey: Any, tmp_path: Path) -> Iterator[Scene]:
    """A server whose challenger says the opposite of the champion for users between two scores."""
    repo = trials.scene(tmp_path / "repo", valkey.address(), f"feedback{time.time_ns()}")
    registry = ModelRegistry(str(tmp_path / "models"))
    for estimator in (Honest(), Inverted()):
        trials.register_version(repo, registry, estimator)
    registry.set_alias(MODEL, CHAMPION, 1)
    with banquet(repo.path, Settings(registry_url=registry.url, state_dir=tmp_path)) as client:
        yield registry, client


def test_labels_abort_a_challenger_that_only_they_tell_from_the_champion(scene: Scene) -> None:
    """Its scores are distributed as the champion's; they are only those of the wrong users."""
    registry, client = scene
    steps = [Step(50, 1, 300), Step(100, 1, 300)]
    limits = {"require_labels": True, "min_labels": 300, **trials.ANY_LATENCY}
    rollouts.start(registry, MODEL, kind="canary", version=2, steps=steps, limits=limits)
    wait_until(lambda: trials.under_way(client), "the rollout has arrived")
    port = client.base_url.port
    assert port is not None

    async def predict_and_tell() -> None:
        async with Clients([port], connections=4, pause_seconds=0.01) as clients:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            told = 0
            while registry.latest(MODEL).rollout is not None:  # type: ignore[union-attr]
                await asyncio.sleep(0.05)
                # A few at a time: predictions come faster than labels can follow.
                for seen in clients.seen[told : told + 50]:
                    if seen.answered > time.monotonic() - 1.5:
                        break
                    body = {"request_id": seen.request_id, "labels": [trials.label(seen.user)]}
                    status, answer, _ = await post(reader, writer, "/feedback", body)
                    assert (status, answer["labels"]) == (200, 1)
                    told += 1
            writer.close()
            assert not clients.failures

    asyncio.run(asyncio.wait_for(predict_and_tell(), 3 * PATIENCE_SECONDS))
    last = registry.latest(MODEL)
    assert last is not None
    assert (last.action, last.who) == ("abort", "judge")
    assert "Accuracy" in last.why or "Log loss" in last.why or "AUC" in last.why
    assert "scores" not in last.why


def test_a_label_counts_once_and_only_while_a_rollout_is_under_way(scene: Scene) -> None:
    registry, client = scene
    before = client.post("/predict", json={"entities": [{"user_id": 1}]}).json()["request_id"]
    told = {"request_id": before, "labels": [1]}
    assert client.post("/feedback", json=told).json() == {
        "request_id": before,
        "labels": 1,
        "counted": 0,
    }
    rollouts.start(registry, MODEL, kind="canary", version=2, automatic=False)
    wait_until(lambda: trials.under_way(client), "the rollout has arrived")
    answer = client.post("/predict", json={"entities": {"user_id": [1, 2, 3]}}).json()
    about = {"request_id": answer["request_id"], "labels": [1, None, 0]}
    counted = 0

    def both() -> bool:
        """Those of either variant are written when they are."""
        nonlocal counted
        counted += client.post("/feedback", json=about).json()["counted"]
        return counted >= 2

    wait_until(both, "labels count")
    assert counted == 2
    assert client.post("/feedback", json=about).json()["counted"] == 0
    late = {**about, "labels": [None, 1]}
    assert client.post("/feedback", json=late).json() == {
        "request_id": answer["request_id"],
        "labels": 1,
        "counted": 1,
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"labels": [1]}, "request_id"),
        ({"request_id": 7, "labels": [1]}, "request_id"),
        ({"request_id": "x"}, "labels"),
        ({"request_id": "x", "labels": []}, "labels"),
        ({"request_id": "x", "labels": 1}, "labels"),
        ({"request_id": "x", "labels": [[1]]}, "labels"),
        ({"request_id": "x", "labels": [1], "model": "m"}, "model"),
        ({"request_id": "x", "labels": [1] * 10_001}, "labels"),
    ],
)
def test_what_is_no_feedback_is_a_422(scene: Scene, body: Any, field: str) -> None:
    answer = scene[1].post("/feedback", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
