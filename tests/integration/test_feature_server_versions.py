"""Pinned versions of a feature view are read as stock Feast reads them, by reference."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.online import FeaturePlan
from core.repository import FeastRepository
from tests.support.server import banquet

NOW = datetime.now(tz=UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def versioned(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, httpx.Client]]:
    """A view whose version 0 says that user 1 is 30, and whose version 1, with a city, that they are 31."""
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
    from feast.types import Int64, String

    path: Path = tmp_path_factory.mktemp("versioned")
    (path / "feature_store.yaml").write_text(
        "project: versioned\nprovider: local\n"
        "registry: {path: registry.db, enable_online_feature_view_versioning: true}\n"
        f'online_store: {{type: redis, connection_string: "{valkey.connection_string}"}}\n'
        "offline_store: {type: file}\nentity_key_serialization_version: 3\n"
    )
    store = FeatureStore(repo_path=str(path))
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    batch = FileSource(name="people", path="people.parquet", timestamp_field="event_timestamp")
    source = PushSource(name="people_push", batch_source=batch)
    fields = [Field(name="user_id", dtype=Int64), Field(name="age", dtype=Int64)]
    row: dict[str, Any] = {"user_id": [1], "age": [30], "event_timestamp": [NOW]}

    def apply(*more: Field) -> None:
        view = FeatureView(
            name="people", entities=[user], ttl=timedelta(0), source=source, schema=[*fields, *more]
        )
        store.apply([user, view])

    apply()
    store.push("people_push", pd.DataFrame(row))
    apply(Field(name="city", dtype=String))
    with banquet(path) as server:
        df = {**row, "age": [31], "city": ["Oslo"], "event_timestamp": [NOW.isoformat()]}
        pushed = server.post("/push", json={"push_source_name": "people_push", "df": df})
        assert pushed.status_code == 200, pushed.text
        yield FeastRepository.open(path).store(), server


@pytest.mark.parametrize(
    ("reference", "age"),
    [("people:age", 31), ("people@latest:age", 31), ("people@v1:age", 31), ("people@v0:age", 30)],
)
@pytest.mark.parametrize("full", [False, True])
def test_each_version_has_its_own_rows(
    versioned: tuple[Any, httpx.Client], reference: str, age: int, full: bool
) -> None:
    stock, server = versioned
    body = {"features": [reference], "entities": {"user_id": [1]}, "full_feature_names": full}
    answer = server.post("/get-online-features", json=body).json()
    found = {
        name: result["values"]
        for name, result in zip(answer["metadata"]["feature_names"], answer["results"], strict=True)
    }
    assert (
        found == stock.get_online_features([reference], [{"user_id": 1}], full_feature_names=full).to_dict()
    )
    assert list(found.values()) == [[1], [age]]


def test_several_versions_stand_side_by_side(versioned: tuple[Any, httpx.Client]) -> None:
    _, server = versioned
    body = {
        "features": ["people@v0:age", "people@v1:age", "people:age"],
        "entities": {"user_id": [1]},
        "full_feature_names": True,
        "include_feature_view_version_metadata": True,
    }
    answer = server.post("/get-online-features", json=body).json()
    assert answer["metadata"] == {
        "feature_names": ["user_id", "people@v0__age", "people@v1__age", "people__age"],
        "feature_view_metadata": [{"name": "people"}],
    }
    assert [result["values"] for result in answer["results"]] == [[1], [30], [31], [31]]


def test_a_version_that_is_not_there_and_a_feature_twice_are_refused(
    versioned: tuple[Any, httpx.Client],
) -> None:
    _, server = versioned
    for features, status in ((["people@v2:age"], 404), (["people:age", "people@latest:age"], 422)):
        body = {"features": features, "entities": {"user_id": [1]}}
        response = server.post("/get-online-features", json=body)
        assert (response.status_code, response.json()["field"]) == (status, "features")


def test_a_service_names_the_features_of_a_pinned_view_by_their_version(
    versioned: tuple[Any, httpx.Client],
) -> None:
    """As stock Feast does, so that two versions of a view in one service do not collide."""
    from feast import FeatureService

    stock, _ = versioned
    view = stock.get_feature_view("people")
    view.projection.version_tag = 0
    service = FeatureService(name="pinned", features=[view[["age"]]])
    assert service.feature_view_projections[0].version_tag == 0
    stock.apply(service)
    expected = stock.get_online_features(
        stock.get_feature_service("pinned"), [{"user_id": 1}], full_feature_names=True
    ).to_dict()
    assert expected == {"user_id": [1], "people@v0__age": [30]}
    repository = FeastRepository.open(Path(stock.repo_path))
    assert FeaturePlan.for_service(repository.definitions(), "pinned").names == ["people@v0__age"]
