"""``POST /push``: what is taken can be read, also by stock Feast; what is not valid leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from core import layout
from core.repository import FeastRepository
from core.types import Dtype, Field
from tests.support import every_type
from tests.support.server import banquet, banquet_process

NOW = datetime.now(tz=UTC).replace(microsecond=0)
ITEMS = count(1000)


@pytest.fixture(scope="module")
def repository(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    path = tmp_path_factory.mktemp("pushes")
    return every_type.applied(path, valkey.connection_string, project="pushes")


@pytest.fixture(scope="module")
def server(repository: FeastRepository) -> Iterator[httpx.Client]:
    with banquet(repository.path) as client:
        yield client


@pytest.fixture
def keys(valkey: Any) -> Iterator[Any]:
    """Asserts that a test left no key behind."""
    with redis.Redis.from_url(f"redis://{valkey.connection_string}") as client:
        before = client.dbsize()
        yield
        assert client.dbsize() == before


def shelf_rows(**columns: Any) -> dict[str, Any]:
    """Rows of the push source ``shelf_push``, one unless the columns say otherwise; None drops a column."""
    rows = max((len(column) for column in columns.values() if column is not None), default=1)
    usual = {
        "item_id": [next(ITEMS) for _ in range(rows)],
        "shelf_code": ["low"] * rows,
        "score": [5.0] * rows,
        "grade": ["a"] * rows,
        "count": [3] * rows,
        "seen_at": [NOW.isoformat()] * rows,
    }
    return {name: column for name, column in (usual | columns).items() if column is not None}


def push(server: httpx.Client, df: Any, **more: Any) -> httpx.Response:
    return server.post("/push", json={"push_source_name": "shelf_push", "df": df, **more})


def read(server: httpx.Client, features: list[str], **entities: Any) -> dict[str, Any]:
    response = server.post("/get-online-features", json={"features": features, "entities": entities})
    assert response.status_code == 200, response.text
    answer = response.json()
    return dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))


def refused(response: httpx.Response, *, field: str | None, row: int | None = None, status: int = 422) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem.get("field") == field, problem
    assert problem.get("row") == row, problem
    detail: str = problem["error"]
    return detail


def test_a_push_can_be_read_as_soon_as_it_is_answered(server: httpx.Client) -> None:
    df = shelf_rows(score=[1.0, 2.5], grade=["a", None])
    answer = push(server, df)
    assert (answer.status_code, answer.content) == (200, b"")
    asked = {"item_id": df["item_id"], "shelf_code": ["low", "low"]}
    found = read(server, ["graded:score", "graded:grade", "counted:count"], **asked)
    assert found["score"]["values"] == [1.0, 2.5]
    assert found["grade"]["values"] == ["a", None]
    assert found["grade"]["statuses"] == ["PRESENT", "NULL_VALUE"]
    assert found["count"]["values"] == [3, 3]
    assert found["score"]["event_timestamps"] == [NOW.strftime("%Y-%m-%dT%H:%M:%SZ")] * 2


def test_stock_feast_reads_what_was_pushed(server: httpx.Client, repository: FeastRepository) -> None:
    df = shelf_rows(score=[7.25], shelf_code=["größe"])
    assert push(server, df).status_code == 200
    rows = [{"item_id": df["item_id"][0], "shelf_code": "größe"}]
    stock = repository.store().get_online_features(["graded:score", "graded:grade", "counted:count"], rows)
    found = stock.to_dict()
    assert (found["score"], found["grade"], found["count"]) == ([7.25], ["a"], [3])


def test_the_bytes_in_redis_are_those_of_a_stock_push(
    server: httpx.Client, repository: FeastRepository, valkey: Any
) -> None:
    import pandas as pd

    df = shelf_rows()
    assert push(server, df).status_code == 200
    with redis.Redis.from_url(f"redis://{valkey.connection_string}") as client:
        ours = {key: client.hgetall(key) for key in client.keys("*pushes") if _holds(key, df["item_id"][0])}
        assert len(ours) == 2
        client.delete(*ours)
        frame = pd.DataFrame(df).assign(seen_at=NOW)
        repository.store().push("shelf_push", frame)
        assert {key: client.hgetall(key) for key in ours} == ours


def _holds(key: bytes, item: int) -> bool:
    return item.to_bytes(8, "little") in key


def test_a_row_older_than_the_stored_one_changes_nothing(server: httpx.Client) -> None:
    df = shelf_rows(score=[5.0])
    assert push(server, df).status_code == 200
    older = df | {"score": [1.0], "seen_at": [(NOW - timedelta(seconds=1)).isoformat()]}
    assert push(server, older).status_code == 200
    asked = {"item_id": df["item_id"], "shelf_code": ["low"]}
    assert read(server, ["graded:score"], **asked)["score"]["values"] == [5.0]
    newer = df | {"score": [9.0], "seen_at": [(NOW + timedelta(seconds=1)).isoformat()]}
    assert push(server, newer).status_code == 200
    assert read(server, ["graded:score"], **asked)["score"]["values"] == [9.0]
    metrics = server.get("/metrics").text
    pushed = [line for line in metrics.splitlines() if line.startswith("banquet_pushed_rows_total")]
    assert any("older" in line and "graded" in line and not line.endswith(" 0.0") for line in pushed), pushed


def test_the_newest_of_several_rows_of_one_entity_stays(server: httpx.Client) -> None:
    item = next(ITEMS)
    times = [(NOW - timedelta(minutes=m)).isoformat() for m in (2, 0, 1)]
    df = shelf_rows(item_id=[item] * 3, score=[1.0, 2.0, 3.0], seen_at=times)
    assert push(server, df).status_code == 200
    assert read(server, ["graded:score"], item_id=[item], shelf_code=["low"])["score"]["values"] == [2.0]


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
        ("2026-01-31T14:00:00.25+02:00", "2026-01-31T12:00:00.250Z"),
        ("2026-01-31 12:00:00", "2026-01-31T12:00:00Z"),
        ("2026-01-31T12:00:00.123456", "2026-01-31T12:00:00.123456Z"),
    ],
)
def test_a_time_without_a_zone_is_utc_as_in_feast(server: httpx.Client, sent: str, stored: str) -> None:
    df = shelf_rows(seen_at=[sent])
    assert push(server, df).status_code == 200
    found = read(server, ["counted:count"], item_id=df["item_id"])
    assert found["count"]["event_timestamps"] == [stored]


def test_columns_may_have_the_names_of_the_source_or_of_the_view(server: httpx.Client) -> None:
    df = shelf_rows(score=None, points=[4.5])
    assert push(server, df).status_code == 200
    asked = {"item_id": df["item_id"], "shelf_code": ["low"]}
    assert read(server, ["graded:score"], **asked)["score"]["values"] == [4.5]
    detail = refused(push(server, shelf_rows(points=[4.5])), field="points")
    assert "`score`" in detail


def test_unknown_columns_are_left_alone_and_an_empty_frame_writes_nothing(
    server: httpx.Client, keys: Any
) -> None:
    assert push(server, shelf_rows(rank=[1]) | {name: [] for name in shelf_rows()}).status_code == 200


@pytest.mark.parametrize("position", [0, 1])
def test_every_type_is_taken_in_the_json_it_is_read_in(
    server: httpx.Client, repository: FeastRepository, valkey: Any, position: int
) -> None:
    """But scalar maps, whose keys JSON cannot say, and numbers that JSON lacks."""
    item = next(ITEMS)
    values = {dtype: pair[position] for dtype, pair in every_type.VALUES.items()}
    sent: dict[str, Any] = {
        dtype.name.lower(): layout.json_value(value, dtype) for dtype, value in values.items()
    }
    for dtype in values:
        text = json.dumps(sent[dtype.name.lower()])
        if dtype is Dtype.SCALAR_MAP or "Infinity" in text or "NaN" in text:
            name = dtype.name.lower()
            alone = every_rows(item, {name: sent[name]})
            refused(server.post("/push", json=alone), field=name, row=0)
            sent[name] = None
    assert server.post("/push", json=every_rows(item, sent)).status_code == 200
    key = layout.EntityKeys("pushes", [Field("item_id", Dtype.INT64)]).encode([[item]])[0]
    with redis.Redis.from_url(f"redis://{valkey.connection_string}") as client:
        cells = client.hgetall(key)
    for dtype, value in values.items():
        name = dtype.name.lower()
        expected = b"" if sent[name] is None else layout.encode_value(value, dtype)
        assert cells[layout.feature_field("every", name)] == expected, name


def every_rows(item: int, values: dict[str, Any]) -> dict[str, Any]:
    """A request that pushes one row of ``every``, null where no value is given."""
    columns = {dtype.name.lower(): [values.get(dtype.name.lower())] for dtype in every_type.VALUES}
    df = {**columns, "item_id": [item], "event_timestamp": [NOW.isoformat()], "created": [None]}
    return {"push_source_name": "every_push", "df": df}


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("column", "values", "row", "says"),
    [
        ("item_id", [1, 1.7], 1, "64-bit integer"),
        ("item_id", ["12", 1], 0, "64-bit integer"),
        ("item_id", [1, None], 1, "null"),
        ("item_id", [2**63, 1], 0, "64-bit integer"),
        ("item_id", [True, 1], 0, "boolean"),
        ("shelf_code", ["low", 7], 1, "string"),
        ("score", [1.0, "2"], 1, "number"),
        ("score", [1.0, 10.5], 1, "max 10"),
        ("score", [-0.1, 1.0], 0, "min 0"),
        ("score", [1.0, None], 1, "nullable"),
        ("grade", ["a", "c"], 1, "categories"),
        ("count", [1, 2**31], 1, "32-bit integer"),
        ("count", [1, 1.5], 1, "32-bit integer"),
        ("seen_at", [NOW.isoformat(), None], 1, "RFC 3339"),
        ("seen_at", [NOW.isoformat(), 1_700_000_000], 1, "RFC 3339"),
        ("seen_at", ["yesterday", NOW.isoformat()], 0, "RFC 3339"),
        ("seen_at", [NOW.isoformat(), "2999-01-01T00:00:00Z"], 1, "ahead"),
    ],
)
def test_a_value_that_is_not_valid_is_named_and_no_row_is_written(
    server: httpx.Client, column: str, values: list[Any], row: int, says: str
) -> None:
    assert says in refused(push(server, shelf_rows(**{column: values})), field=column, row=row)


@pytest.mark.usefixtures("keys")
def test_a_frame_that_is_not_valid_is_named_and_no_row_is_written(server: httpx.Client) -> None:
    assert "Send the columns item_id" in refused(push(server, {}), field="item_id")
    refused(push(server, shelf_rows(grade=None)), field="grade")
    refused(push(server, shelf_rows(seen_at=None)), field="seen_at")
    refused(push(server, shelf_rows(grade=["a"]) | {"score": [1.0, 2.0]}), field="score")
    refused(push(server, shelf_rows() | {"score": {"0": 1.0}}), field="score")
    refused(push(server, [1]), field="df")
    refused(push(server, None), field="df")


@pytest.mark.usefixtures("keys")
def test_a_request_that_is_not_valid_is_named_and_no_row_is_written(server: httpx.Client) -> None:
    df = shelf_rows()
    detail = refused(
        server.post("/push", json={"push_source_name": "nothing", "df": df}),
        field="push_source_name",
        status=404,
    )
    assert "every_push, shelf_push" in detail
    refused(server.post("/push", json={"df": df}), field="push_source_name")
    refused(push(server, df, to="everywhere"), field="to")
    refused(push(server, df, allow_registry_cache="yes"), field="allow_registry_cache")
    refused(push(server, df, mode="online"), field="mode")


def test_a_push_offline_appends_to_the_batch_source(valkey: Any, tmp_path: Path) -> None:
    """In both modes; columns that the source lacks or alone has are named."""
    import pandas as pd

    every_type.applied(tmp_path, valkey.connection_string, project="offline_pushes")
    source = tmp_path / "shelf.parquet"
    before = pd.read_parquet(source)
    with banquet(tmp_path) as server:
        df = shelf_rows(score=None, points=[2.5], grade=[None])
        assert "unknown: rank" in refused(push(server, df | {"rank": [1]}, to="offline"), field="rank")
        assert "missing: points" in refused(push(server, shelf_rows(), to="offline"), field="points")
        refused(push(server, df | {"count": ["3"]}, to="online_and_offline"), field="count", row=0)
        pd.testing.assert_frame_equal(pd.read_parquet(source), before)

        assert push(server, df, to="offline").status_code == 200
        asked = {"item_id": df["item_id"], "shelf_code": ["low"]}
        assert read(server, ["graded:score"], **asked)["score"]["statuses"] == ["NOT_FOUND"]
        stored = pd.read_parquet(source)
        assert (stored.dtypes == before.dtypes).all()
        added = stored[stored["item_id"] == df["item_id"][0]]
        assert len(added) == 1, "the two views share the source"
        assert added["points"].tolist() == [2.5]
        assert added["grade"].isna().all()
        assert added["seen_at"].tolist() == [pd.Timestamp(NOW)]

        both = shelf_rows(score=None, points=[3.5])
        assert push(server, both, to="online_and_offline").status_code == 200
        asked = {"item_id": both["item_id"], "shelf_code": ["low"]}
        assert read(server, ["graded:score"], **asked)["score"]["values"] == [3.5]
        assert both["item_id"][0] in pd.read_parquet(source)["item_id"].tolist()


def test_the_metrics_survive_the_import_of_feast_for_an_offline_push(valkey: Any, tmp_path: Path) -> None:
    """Feast sets the variable by which prometheus_client shares counts, in a process that counts already."""
    every_type.applied(tmp_path, valkey.connection_string, project="offline_metrics")
    with banquet_process(tmp_path) as server:
        assert push(server, shelf_rows(score=None, points=[2.5]), to="offline").status_code == 200
        assert 'banquet_requests_total{route="/push",status="200"} 1.0' in server.get("/metrics").text


def test_other_requests_are_answered_while_large_pushes_are_written(server: httpx.Client) -> None:
    rows = 20_000
    df = shelf_rows(item_id=list(range(10_000_000, 10_000_000 + rows)))
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(push, server, df)
        answered = 0
        while not pushing.done():
            assert server.get("/livez").status_code == 200
            answered += 1
        assert pushing.result().status_code == 200
    assert answered >= 10
