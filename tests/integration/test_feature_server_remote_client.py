"""A stock Feast ``FeatureStore`` with ``online_store: {type: remote}`` reads and pushes through Banquet."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
import requests

from core import layout
from core.repository import FeastRepository
from core.types import Dtype, Field
from tests.support import every_type
from tests.support.server import banquet

NOW = datetime.now(tz=UTC).replace(microsecond=0)
UNKNOWN = 99


def remote_store(repository: Path, project: str, server: httpx.Client, folder: Path) -> Any:
    """Feast's own client, which has the registry of ``repository`` and reads from ``server``."""
    from feast import FeatureStore

    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        f"project: {project}\nprovider: local\nregistry: {repository / 'registry.db'}\n"
        f"online_store: {{type: remote, path: {str(server.base_url).rstrip('/')}}}\n"
        "offline_store: {type: file}\nentity_key_serialization_version: 3\n"
    )
    return FeatureStore(repo_path=str(folder))


@pytest.fixture(scope="module")
def shop_client(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with banquet(shop) as server:
        yield remote_store(shop, "shop", server, tmp_path_factory.mktemp("remote") / "shop")


@pytest.fixture(scope="module")
def native(shop: Path) -> Any:
    """Stock Feast on the same Redis."""
    return FeastRepository.open(shop).store()


def statuses(response: Any) -> dict[str, list[str]]:
    from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

    names = response.proto.metadata.feature_names.val
    return {
        name: [FieldStatus.Name(status) for status in result.statuses]
        for name, result in zip(names, response.proto.results, strict=True)
    }


@pytest.mark.parametrize("full", [False, True])
def test_it_reads_references_as_the_native_store_does(shop_client: Any, native: Any, full: bool) -> None:
    features = [
        "profile:city", "behavior:spend", "behavior:visits", "profile:age", "profile:member", "behavior:tags",
        "visits:count", "climate:temperature",
    ]  # fmt: skip
    rows = [{"user_id": 1, "store_code": "north"}, {"user_id": 1, "store_code": "süd"}]
    found = shop_client.get_online_features(features, rows, full_feature_names=full).to_dict()
    assert found == native.get_online_features(features, rows, full_feature_names=full).to_dict()
    assert len(found) == 10


def test_it_reads_a_feature_service(shop_client: Any, native: Any) -> None:
    rows = [{"user_id": 1}, {"user_id": 1}]
    service = shop_client.get_feature_service("plain")
    found = shop_client.get_online_features(service, rows).to_dict()
    assert found == native.get_online_features(native.get_feature_service("plain"), rows).to_dict()
    assert found["spend"] == [12.5, 12.5]


def test_it_sees_the_true_statuses(shop_client: Any) -> None:
    response = shop_client.get_online_features(
        ["behavior:spend"], [{"user_id": user} for user in (1, 2, 3, UNKNOWN)]
    )
    assert response.to_dict()["spend"] == [12.5, None, None, None]
    assert statuses(response)["spend"] == ["PRESENT", "OUTSIDE_MAX_AGE", "NULL_VALUE", "NOT_FOUND"]


def test_it_reads_on_demand_features_and_entityless_views(shop_client: Any) -> None:
    rows = [{"user_id": 1, "amount": 5.0}, {"user_id": 1, "amount": 25.0}]
    features = ["basket:share", "decades:decade", "rates:spend_per_visit", "climate:temperature"]
    assert shop_client.get_online_features(features, rows, full_feature_names=True).to_dict() == {
        "user_id": [1, 1],
        "basket__share": [0.4, 2.0],
        "decades__decade": [4, 4],
        "rates__spend_per_visit": [3.125, 3.125],
        "climate__temperature": [21.5, 21.5],
    }


def test_its_row_read_takes_only_present_values(shop_client: Any) -> None:
    """``online_read`` asks with one join key only, so it is tried on views of one."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    keys = [
        EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user)]) for user in (1, 2, UNKNOWN)
    ]
    provider = shop_client._get_provider()
    view = shop_client.get_feature_view("behavior")
    rows = provider.online_read(shop_client.config, view, keys, ["spend", "tags"])
    assert [values["spend"].double_val for _, values in rows] == [12.5, 0.0, 0.0]
    assert [values["spend"].WhichOneof("val") for _, values in rows] == ["double_val", None, None]
    assert list(rows[0][1]["tags"].string_list_val.val) == ["a", "b"]
    assert rows[0][0] is not None


def test_a_refusal_reaches_the_caller_with_its_reason(shop_client: Any) -> None:
    with pytest.raises(RuntimeError, match=r"422.*`user_id` in row 1 is a number, 1.7"):
        shop_client.get_online_features(["profile:age"], [{"user_id": 1}, {"user_id": 1.7}])
    with pytest.raises(RuntimeError, match=r"404.*Feature view 'profile' has no feature 'nothing'"):
        shop_client.get_online_features(["profile:nothing"], [{"user_id": 1}])


@pytest.fixture(scope="module")
def every(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FeastRepository, Any]]:
    repository = every_type.applied(
        tmp_path_factory.mktemp("every"), valkey.connection_string, project="remote_pushes"
    )
    with banquet(repository.path) as server:
        folder = tmp_path_factory.mktemp("remote") / "every"
        yield repository, remote_store(repository.path, "remote_pushes", server, folder)


def test_it_pushes_and_both_stores_read_it(every: tuple[FeastRepository, Any]) -> None:
    from feast.data_source import PushMode

    repository, client = every
    frame = pd.DataFrame(
        {
            "item_id": [7, 8],
            "shelf_code": ["low", "größe"],
            "score": [1.5, 2.5],
            "grade": ["a", None],
            "count": pd.array([3, None], dtype="Int32"),
            "seen_at": [NOW, NOW - timedelta(seconds=0.25)],
        }
    )
    client.push("shelf_push", frame, to=PushMode.ONLINE)
    features = ["graded:score", "graded:grade", "counted:count"]
    rows = [{"item_id": 7, "shelf_code": "low"}, {"item_id": 8, "shelf_code": "größe"}]
    for store in (client, repository.store()):
        found = store.get_online_features(features, rows).to_dict()
        assert (found["score"], found["grade"]) == ([1.5, 2.5], ["a", None])
        assert found["count"] == [3, None]


def test_an_older_push_of_the_client_changes_nothing(every: tuple[FeastRepository, Any]) -> None:
    _, client = every
    columns = {"item_id": [9], "shelf_code": ["low"], "grade": ["a"], "count": [3]}
    for score, at in ((5.0, NOW), (1.0, NOW - timedelta(microseconds=1))):
        client.push("shelf_push", pd.DataFrame({**columns, "score": [score], "seen_at": [at]}))
    found = client.get_online_features(["graded:score"], [{"item_id": 9, "shelf_code": "low"}])
    assert found.to_dict()["score"] == [5.0]


def test_a_push_that_breaks_an_expectation_is_refused_to_the_client(
    every: tuple[FeastRepository, Any],
) -> None:
    _, client = every
    frame = pd.DataFrame(
        {"item_id": [9], "shelf_code": ["low"], "grade": ["z"], "score": [1.0], "count": [1]}
    )
    with pytest.raises(RuntimeError, match=r"422.*categories"):
        client.write_to_online_store("graded", frame.assign(seen_at=NOW))


def test_every_type_the_client_can_send_is_stored_as_stock_encodes_it(
    every: tuple[FeastRepository, Any], valkey: Any
) -> None:
    """Some types Feast's client itself cannot put into JSON, whatever server it talks to."""
    import redis
    from feast import ValueType
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import python_values_to_proto_values

    _, client = every
    view, provider = client.get_feature_view("every"), client._get_provider()
    key = EntityKey(join_keys=["item_id"], entity_values=[Value(int64_val=1)])
    stored = layout.EntityKeys("remote_pushes", [Field("item_id", Dtype.INT64)]).encode([[1]])[0]
    nothing = {dtype.name.lower(): Value() for dtype in every_type.VALUES}
    unsendable = set()
    with redis.Redis.from_url(f"redis://{valkey.connection_string}") as raw:
        for age, (dtype, (ordinary, edge)) in enumerate(every_type.VALUES.items()):
            for later, value in enumerate((ordinary, edge)):
                name = dtype.name.lower()
                encoded = python_values_to_proto_values([value], ValueType[dtype.name])[0]
                at = NOW - timedelta(hours=1) + timedelta(seconds=2 * age + later)
                row = (key, {**nothing, name: encoded}, at, None)
                try:
                    provider.online_write_batch(client.config, view, [row], None)
                except (TypeError, requests.exceptions.InvalidJSONError):
                    unsendable.add((dtype.name, value is edge))
                    continue
                except RuntimeError:
                    # Refused: JSON has no keys but texts, which no scalar map has.
                    assert dtype is Dtype.SCALAR_MAP
                    continue
                cell = raw.hget(stored, layout.feature_field("every", name))
                assert cell == encoded.SerializeToString(deterministic=True), (name, value)
    # Sets, bytes, decimals and datetimes, and numbers that JSON lacks.
    kinds = ("BYTES", "_SET", "DECIMAL", "ZONED")
    floats = {("DOUBLE", True), ("FLOAT", True), ("DOUBLE_LIST", True), ("FLOAT_LIST", True)}
    assert floats <= unsendable
    assert all(any(kind in name for kind in kinds) for name, _ in unsendable - floats)
