"""What a feature read and a push answer when something behind them fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from core.settings import Settings
from tests.support import every_type
from tests.support.server import banquet
from tests.support.valkey import Valkey
from tests.support.waiting import wait_until


def test_a_failing_on_demand_function_marks_its_row_only(valkey: Any, tmp_path: Path) -> None:
    """Stock answers 500 for all rows; here the row's value is INVALID, a status that Feast has."""
    every_type.applied(tmp_path, valkey.connection_string, project="on_demand")
    with banquet(tmp_path) as server:
        body = {
            "features": ["roots:root", "counted:count"],
            "entities": {"item_id": [1, 2, 3], "number": [4.0, -1.0, 9.0]},
            "full_feature_names": True,
        }
        answer = server.post("/get-online-features", json=body).json()
        names = answer["metadata"]["feature_names"]
        found = dict(zip(names, answer["results"], strict=True))
        assert found["roots__root"]["values"] == [2.0, None, 3.0]
        assert found["roots__root"]["statuses"] == ["PRESENT", "INVALID", "PRESENT"]
        assert found["counted__count"]["statuses"] == ["NOT_FOUND"] * 3
        alone = {"features": ["roots:root"], "entities": {"number": [16.0]}}
        assert server.post("/get-online-features", json=alone).json() == {
            "metadata": {"feature_names": ["root"]},
            "results": [
                {"values": [4.0], "statuses": ["PRESENT"], "event_timestamps": ["1970-01-01T00:00:00Z"]}
            ],
        }


def test_reads_and_pushes_are_503_while_redis_is_away_and_work_again_after(tmp_path: Path) -> None:
    with Valkey(tmp_path) as redis:
        every_type.applied(tmp_path / "repo", redis.connection_string, project="away")
        settings = Settings(features_only=True, state_dir=tmp_path, redis_timeout_s=5)
        with banquet(tmp_path / "repo", settings) as server:
            assert _read(server).status_code == 200
            assert _push(server).status_code == 200
            redis.stop()
            for response in (_read(server), _push(server), server.get("/readyz")):
                assert response.status_code == 503
                assert response.headers["retry-after"]
                assert response.json()["code"] == "redis_unavailable"
            assert server.get("/livez").status_code == 200
            redis.start()
            wait_until(lambda: _read(server).status_code == 200, "reads work again")
            assert _push(server).status_code == 200
            assert _read(server).json()["results"][1]["values"] == [3]


def _read(server: httpx.Client) -> httpx.Response:
    body = {"features": ["counted:count"], "entities": {"item_id": [1]}}
    return server.post("/get-online-features", json=body)


def _push(server: httpx.Client) -> httpx.Response:
    df = {
        "item_id": [1], "shelf_code": ["low"], "score": [1.0], "grade": ["a"], "count": [3],
        "seen_at": ["2026-01-31T12:00:00Z"],
    }  # fmt: skip
    return server.post("/push", json={"push_source_name": "shelf_push", "df": df})
