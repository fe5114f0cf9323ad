"""A service for which Feast keeps precomputed vectors: they are never what is served."""

from __future__ import annotations

from contextlib import chdir
from datetime import timedelta
from pathlib import Path
from typing import Any

from core.repository import FeastRepository
from materialization import apply
from tests.support import shop
from tests.support.server import banquet


def test_a_push_is_seen_at_once_and_one_unknown_entity_fails_no_other(valkey: Any, tmp_path: Path) -> None:
    """Stock goes on serving the vector from before the push, and raises where one entity has none."""
    from feast import FeatureService

    path = shop.write(tmp_path, valkey.connection_string, project="precomputed")
    repository = FeastRepository.open(path)
    apply.apply(repository, apply.plan(repository))
    store = repository.store()
    with chdir(path):
        views = [store.get_feature_view("profile")[["age"]], store.get_feature_view("clicks")]
        store.apply([FeatureService(name="ready", features=views, precompute_online=True)])
        store.materialize(shop.NOW - timedelta(days=500), shop.NOW, ["profile", "clicks"])
        assert store.precompute_feature_service("ready") > 0
    with banquet(path) as server:
        row = {"user_id": [1], "clicks_1h": [40], "event_timestamp": [shop.NOW.isoformat()]}
        pushed = server.post("/push", json={"push_source_name": "clicks_push", "df": row})
        assert pushed.status_code == 200, pushed.text
        service = store.get_feature_service("ready")
        stock = store.get_online_features(service, [{"user_id": 1}], full_feature_names=True).to_dict()
        assert stock["clicks__clicks_1h"] == [3], "stock serves the precomputed vector"
        body = {"feature_service": "ready", "entities": {"user_id": [1, 4, 99]}}
        answer = server.post("/get-online-features", json=body).json()
        found = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
        assert found["clicks_1h"]["values"] == [40, None, None]
        assert found["clicks_1h"]["statuses"] == ["PRESENT", "NOT_FOUND", "NOT_FOUND"]
        assert found["age"]["values"] == [41, 24, None]
