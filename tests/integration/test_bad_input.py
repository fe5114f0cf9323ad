"""Bad input over HTTP: a 4xx that names the field and the way out, and nothing reaches Redis or the model."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from core.registry import ModelRegistry
from core.repository import FeastRepository
from core.settings import Settings
from tests.support import packages
from tests.support.champions import champion
from tests.support.server import banquet, banquet_process

MAX_ENTITIES = 300
MAX_BODY_BYTES = 100_000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The shop with a model, and limits small enough to reach."""
    registry = ModelRegistry(str(tmp_path_factory.mktemp("models")))
    champion(
        FeastRepository.open(shop), registry, "worth", "plain",
        packages.linear_graph([1.0, 2.0, 0.0, 0.0]), vocabulary={"profile__city": ("Oslo", "Rome")},
    )  # fmt: skip
    settings = Settings(registry_url=registry.url, max_entities=MAX_ENTITIES, max_body_bytes=MAX_BODY_BYTES)
    with banquet(shop, settings) as client:
        yield client


@pytest.fixture
def untouched(server: httpx.Client, valkey: Any) -> Iterator[None]:
    """Asserts that a test read nothing from Redis, wrote nothing to it and predicted nothing."""

    def seen() -> tuple[Any, ...]:
        with redis.Redis.from_url(f"redis://{valkey.connection_string}") as client:
            calls = client.info("commandstats")
            counted = [
                calls.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("hmget", "hset", "evalsha")
            ]
            counted.append(client.dbsize())
        metrics = server.get("/metrics").text.splitlines()
        return (*counted, [line for line in metrics if line.startswith("banquet_predictions_total")])

    before = seen()
    yield
    assert seen() == before


@cache
def operations(address: str) -> dict[str, Any]:
    """What a server's OpenAPI document says of each path."""
    found: dict[str, Any] = httpx.get(address, trust_env=False).json()["paths"]
    return found


def documented(address: str, request: httpx.Request) -> set[int]:
    """The statuses that the document at ``address`` has for a request; any, where there is no such route."""
    for path, methods in operations(address).items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.url.path):
            operation = methods.get(request.method.lower())
            return {405} if operation is None else set(map(int, operation["responses"]))
    return {404}


def problem(response: httpx.Response, status: int, field: str | None = None, row: int | None = None) -> str:
    """Asserts what every refusal has; returns what it says."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body.get("field") == field, body
    assert body.get("row") == row, body
    assert "Traceback" not in response.text
    assert status in documented(str(response.url.copy_with(raw_path=b"/openapi.json")), response.request)
    error: str = body["error"]
    return error


ROUTES = {
    "predict": lambda entities: ("/predict", {"entities": entities}),
    "named": lambda entities: ("/models/worth/predict", {"entities": entities}),
    "features": lambda entities: (
        "/get-online-features",
        {"features": ["profile:age"], "entities": entities},
    ),
}


# What stock Feast takes for user 1, or answers 500 to (trap 24), and its like.
VALUES = [
    pytest.param(1.7, "number, 1.7", id="a fraction"),
    pytest.param(1.0, "number, 1.0", id="a whole float"),
    pytest.param(True, "boolean, true", id="a boolean"),
    pytest.param("12", 'string, "12"', id="a numeric string"),
    pytest.param("abc", 'string, "abc"', id="a text"),
    pytest.param(None, "null", id="null"),
    pytest.param(2**63, "out of the range of a 64-bit integer (Int64)", id="beyond 64 bits"),
    pytest.param(2**70, "out of the range of a 64-bit integer (Int64)", id="beyond any integer type"),
    pytest.param(1.5e30, "out of the range of a 64-bit integer (Int64)", id="a large float"),
    pytest.param([1], "list", id="a list"),
    pytest.param({"id": 1}, "object", id="an object"),
]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("value", "says"), VALUES)
def test_a_value_that_is_no_int64_is_named_with_its_row_and_type(
    server: httpx.Client, route: str, value: Any, says: str
) -> None:
    path, body = ROUTES[route]({"user_id": [1, value]})
    text = problem(server.post(path, json=body), 422, "user_id", row=1)
    assert text.startswith(f"`user_id` in row 1 is {'null' if value is None else ''}")
    assert says in text
    if "range" in says:
        assert "from -9223372036854775808 to 9223372036854775807" in text
    else:
        assert "it must be a 64-bit integer (Int64)" in text


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("entities", "field", "says"),
    [
        ({}, "user_id", "`user_id` is missing"),
        ({"user": [1]}, "user", "Unknown field `user`"),
        ({"user_id": []}, "entities", "empty"),
        ({"user_id": 1}, "user_id", "not a list"),
        ({"user_id": {"0": 1}}, "user_id", "not a list"),
        ({"user_id": [1], "age": [41]}, "age", "Unknown field `age`"),
        (None, "entities", "entities"),
        ("user_id", "entities", "entities"),
        (1, "entities", "entities"),
    ],
    ids=str,
)
def test_columns_that_are_not_those_of_the_entities_are_named(
    server: httpx.Client, route: str, entities: Any, field: str, says: str
) -> None:
    path, body = ROUTES[route](entities)
    assert says in problem(server.post(path, json=body), 422, field)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("entities", "field", "row", "says"),
    [
        ([], "entities", None, "empty"),
        ([1], "entities", 0, "Row 0 is an integer"),
        ([{"user_id": 1}, []], "entities", 1, "Row 1 is a list"),
        ([{"user_id": 1}, {}], "user_id", 1, "`user_id` is missing in row 1"),
        ([{"user_id": 1}, {"user_id": 1, "x": 1}], "x", 1, "Unknown field `x` in row 1"),
        ([{"user_id": 1}, {"user": 1}], "user", 1, "Unknown field `user` in row 1"),
    ],
    ids=str,
)
def test_rows_that_are_not_entities_are_named(
    server: httpx.Client, entities: Any, field: str, row: int | None, says: str
) -> None:
    assert says in problem(server.post("/predict", json={"entities": entities}), 422, field, row)


AGE = ["profile:age"]
KEY_PAIR = {"features": ["visits:count"]}
BASKET = {"features": ["basket:share"]}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("body", "status", "field", "says"),
    [
        ({}, 422, "features", "names no features"),
        ({"features": []}, 422, "features", "names no features"),
        ({"features": "profile:age"}, 422, "features", "list of strings"),
        ({"features": [1]}, 422, "features", "list of strings"),
        ({"features": ["age"]}, 422, "features", "'age' is malformed"),
        ({"features": ["profile:"]}, 422, "features", "malformed"),
        ({"features": ["profile@v:age"]}, 422, "features", "malformed"),
        ({"features": ["profile@v²:age"]}, 422, "features", "malformed"),
        ({"features": ["profile@v" + "9" * 5000 + ":age"]}, 422, "features", "malformed"),
        ({"features": [*AGE, *AGE]}, 422, "features", "twice"),
        ({"features": ["profile:nothing"]}, 404, "features", "age, city, member"),
        ({"features": ["nothing:age"]}, 404, "features", "Known views: basket"),
        ({"feature_service": "nothing"}, 404, "feature_service", "everything"),
        ({"feature_service": ""}, 422, "feature_service", "must be a name"),
        ({"feature_service": 1}, 422, "feature_service", "must be a name"),
        ({"feature_service": "plain", "features": AGE}, 422, "features", "not both"),
        ({"feature_service": "renamed"}, 422, "full_feature_names", "'age'"),
        ({**KEY_PAIR, "entities": {"user_id": [1, 2], "store_code": ["a"]}}, 422, "entities", "user_id: 2"),
        ({**KEY_PAIR, "entities": {"user_id": [1]}}, 422, "store_code", "`store_code` is missing"),
        (
            {**KEY_PAIR, "entities": {"user_id": [1], "store_code": [7]}},
            422,
            "store_code",
            "must be a string",
        ),
        ({**BASKET, "entities": {"user_id": [1]}}, 422, "amount", "input `amount` is missing"),
        ({**BASKET, "entities": {"user_id": [1], "amount": ["5"]}}, 422, "amount", "must be a number"),
        ({"features": AGE, "full_feature_names": 1}, 422, "full_feature_names", "true or false"),
        ({"features": AGE, "full_names": True}, 422, "full_names", "Unknown field"),
    ],
    ids=str,
)
def test_a_read_of_what_is_not_there_is_named(
    server: httpx.Client, body: dict[str, Any], status: int, field: str, says: str
) -> None:
    response = server.post("/get-online-features", json={"entities": {"user_id": [1]}, **body})
    row = 0 if says in ("must be a string", "must be a number") else None
    assert says in problem(response, status, field, row)


@pytest.mark.usefixtures("untouched")
def test_models_and_fields_that_are_not_there_are_named(server: httpx.Client) -> None:
    entities = {"entities": {"user_id": [1]}}
    assert "Models: worth" in problem(server.post("/models/nothing/predict", json=entities), 404)
    assert "Known fields" in problem(
        server.post("/predict", json={**entities, "explian": True}), 422, "explian"
    )
    assert "true or false" in problem(
        server.post("/predict", json={**entities, "explain": "yes"}), 422, "explain"
    )


BODIES = [
    pytest.param(b"", 400, None, "empty", id="an empty body"),
    pytest.param(b"{", 400, None, "not valid JSON", id="half a body"),
    pytest.param(b"user_id=1", 400, None, "not valid JSON", id="a form"),
    pytest.param(b"[1]", 400, None, "must be a JSON object", id="a list"),
    pytest.param(b"\xff\xfe\x00", 400, None, "not valid JSON", id="no UTF-8"),
    pytest.param(b'{"entities": {"user_id": [NaN]}}', 400, None, "not valid JSON", id="NaN"),
    pytest.param(b'{"entities": {"user_id": [Infinity]}}', 400, None, "not valid JSON", id="Infinity"),
    pytest.param(b'{"entities": {"user_id": [1],}}', 400, None, "not valid JSON", id="a trailing comma"),
    pytest.param(
        b'{"entities": {"user_id": [1], "user_id": [2]}}', 400, "user_id", "`user_id` twice", id="a key twice"
    ),
    pytest.param(
        b'{"entities": [{"user_id": 1, "user_\\u0069d": 2}]}',
        400,
        "user_id",
        "twice",
        id="a key twice, disguised",
    ),
    pytest.param(b'{"entities": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", 400, None, "", id="deep JSON"),
    pytest.param(
        b'{"entities": {"user_id": ["\\ud800"]}}', 400, None, "not valid JSON", id="half a character"
    ),
]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("path", ["/predict", "/models/worth/predict", "/get-online-features", "/push",
                                  "/write-to-online-store", "/v2/models/worth/infer"])  # fmt: skip
@pytest.mark.parametrize(("body", "status", "field", "says"), BODIES)
def test_a_body_that_is_not_json_is_a_400(
    server: httpx.Client, path: str, body: bytes, status: int, field: str | None, says: str
) -> None:
    assert says in problem(server.post(path, content=body, headers=JSON), status, field)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("depth", [900, 1020])
def test_json_as_deep_as_the_parser_takes_it_is_refused_as_a_value(server: httpx.Client, depth: int) -> None:
    deep = b'{"entities": {"user_id": [' + b"[" * depth + b"]" * depth + b"]}}"
    assert server.post("/predict", content=deep, headers=JSON).status_code in (400, 422)
    frame = b'{"push_source_name": "clicks_push", "df": {"user_id": [' + b"[" * depth + b"]" * depth + b"]}}"
    assert server.post("/push", content=frame, headers=JSON).status_code in (400, 422)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("path", ["/predict", "/get-online-features", "/push", "/v2/models/worth/infer"])
def test_a_body_over_the_limit_is_a_413_with_the_limit(server: httpx.Client, path: str) -> None:
    body = json.dumps({"entities": {"user_id": [1] * MAX_BODY_BYTES}}).encode()
    assert f"larger than {MAX_BODY_BYTES} bytes" in problem(
        server.post(path, content=body, headers=JSON), 413
    )

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    response = server.post(path, content=chunks(), headers=JSON)
    assert "BANQUET_MAX_BODY_BYTES" in problem(response, 413)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("route", ROUTES)
def test_too_many_entities_are_a_422_with_the_limit(server: httpx.Client, route: str) -> None:
    path, body = ROUTES[route]({"user_id": [1] * (MAX_ENTITIES + 1)})
    text = problem(server.post(path, json=body), 422, "entities")
    assert f"{MAX_ENTITIES + 1} entities are more than the limit of {MAX_ENTITIES}" in text
    assert "BANQUET_MAX_ENTITIES" in text


def test_as_many_entities_as_the_limit_are_answered(server: httpx.Client) -> None:
    for make in ROUTES.values():
        path, body = make({"user_id": [1] * MAX_ENTITIES})
        assert server.post(path, json=body).status_code == 200
    without_keys = {
        "features": ["climate:temperature"],
        "entities": {"__dummy_id": [""] * (MAX_ENTITIES + 1)},
    }
    problem(server.post("/get-online-features", json=without_keys), 422, "entities")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("path", ["/predict", "/get-online-features", "/push", "/write-to-online-store"])
@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "text/json", "", "application/json-seq"],
)
def test_another_content_type_is_a_415(server: httpx.Client, path: str, kind: str | None) -> None:
    body = b'{"entities": {"user_id": [1]}}'
    headers = {} if kind is None else {"content-type": kind}
    text = problem(server.post(path, content=body, headers=headers), 415, "content-type")
    assert "Content-Type: application/json" in text


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("path", ["/predict", "/push", "/v2/models/worth/infer"])
def test_a_body_that_is_compressed_is_a_415_that_says_so(server: httpx.Client, path: str) -> None:
    body = gzip.compress(b'{"entities": {"user_id": [1]}}')
    response = server.post(path, content=body, headers={**JSON, "content-encoding": "gzip"})
    assert "encoded as gzip" in problem(response, 415, "content-encoding")


@pytest.mark.parametrize("given", ["x" * 3000, "\u00e9"])
@pytest.mark.parametrize("path", ["/nothing", "/predict"])
def test_a_request_id_that_is_long_or_no_ascii_is_replaced(
    server: httpx.Client, path: str, given: str
) -> None:
    sent = {b"x-request-id": given.encode("latin-1"), b"content-type": b"application/json"}
    response = server.post(path, content=b"{", headers=sent)
    assert len(response.json()["request_id"]) == 26
    assert response.headers["x-request-id"] == response.json()["request_id"]


def test_a_content_type_with_parameters_is_taken(server: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    body = b'{"entities": {"user_id": [1]}}'
    assert server.post("/predict", content=body, headers=headers).status_code == 200


@pytest.mark.usefixtures("untouched")
def test_a_wrong_method_is_a_405_and_a_wrong_address_a_404(server: httpx.Client) -> None:
    for path in (
        "/predict",
        "/models/worth/predict",
        "/get-online-features",
        "/push",
        "/v2/models/worth/infer",
    ):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            response = server.request(method, path)
            assert "Use POST" in problem(response, 405), (method, path)
    assert "Use GET" in problem(server.post("/livez"), 405)
    for path in (
        "/nothing",
        "/models//predict",
        "/Predict",
        "/get_online_features",
        "/v2/models",
    ):
        assert "/docs" in problem(server.post(path, json={}, follow_redirects=False), 404), path


def test_the_server_still_answers_after_all_of_that(server: httpx.Client) -> None:
    response = server.post("/predict", json={"entities": [{"user_id": 1}]})
    assert response.json()["predictions"][0]["prediction"] == 20.5


def test_answers_do_not_depend_on_the_hash_seed(shop: Path) -> None:
    """Two processes with different seeds give the same bytes, in the order of the request."""
    bodies = [
        {"feature_service": "everything", "entities": {"store_code": ["north", "süd"], "user_id": [1, 2],
                                                        "amount": [5.0, 1.0]}},
        {"features": ["behavior:tags", "profile:city", "behavior:spend", "climate:temperature"],
         "entities": {"user_id": [1, 2, 3, 99]}, "full_feature_names": True,
         "include_feature_view_version_metadata": True},
    ]  # fmt: skip
    answers = []
    for seed in ("1", "2"):
        with banquet_process(shop, {"PYTHONHASHSEED": seed}) as client:
            answers.append([client.post("/get-online-features", json=body).content for body in bodies])
    assert answers[0] == answers[1]
    assert all(b'"PRESENT"' in content for content in answers[0])


def test_the_root_says_where_to_look(server: httpx.Client) -> None:
    found = server.get("/").json()
    assert found["models"] == ["worth"]
    for path in (found["docs"], found["health"], found["metrics"]):
        assert server.get(path).status_code == 200, path
