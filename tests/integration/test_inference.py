"""The Open Inference Protocol over HTTP: what its clients need, MLServer's answers where it leaves room."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import chdir
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.manifest import Policy
from core.registry import ModelRegistry
from core.repository import FeastRepository
from core.settings import Settings
from tests.support import packages
from tests.support import shop as source
from tests.support.champions import champion
from tests.support.server import banquet

UNKNOWN = 99


def probabilities() -> bytes:
    """An ONNX classifier of (spend, share): sure of class 1 where there is a share, undecided without."""
    from onnx import TensorProto, helper

    node, double = helper.make_node, TensorProto.DOUBLE
    graph = helper.make_graph(
        [
            node("Gather", ["matrix", "one"], ["share"], axis=1),
            node("IsNaN", ["share"], ["missing"]),
            node("Where", ["missing", "half", "sure"], ["yes"]),
            node("Sub", ["whole", "yes"], ["no"]),
            node("Concat", ["no", "yes"], ["scores"], axis=1),
        ],
        "share",
        [helper.make_tensor_value_info("matrix", double, [None, 2])],
        [helper.make_tensor_value_info("scores", double, [None, 2])],
        [
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("half", double, [1, 1], [0.5]),
            helper.make_tensor("sure", double, [1, 1], [0.875]),
            helper.make_tensor("whole", double, [1, 1], [1.0]),
        ],
    )
    return _content(graph)


def indices() -> bytes:
    """An ONNX classifier without probabilities: class 0 where visits are fewer than 3."""
    from onnx import TensorProto, helper

    node, double = helper.make_node, TensorProto.DOUBLE
    graph = helper.make_graph(
        [
            node("Gather", ["matrix", "one"], ["visits"], axis=1),
            node("GreaterOrEqual", ["visits", "three"], ["many"]),
            node("Cast", ["many"], ["index"], to=TensorProto.INT64),
            node("Squeeze", ["index", "one"], ["scores"]),
        ],
        "visits",
        [helper.make_tensor_value_info("matrix", double, [None, 2])],
        [helper.make_tensor_value_info("scores", TensorProto.INT64, [None])],
        [
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("three", double, [1, 1], [3.0]),
        ],
    )
    return _content(graph)


def _content(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture(scope="module")
def server(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Models with a request-time input and a policy, with classes that are strings, of numbers, by text."""
    from feast import FeatureService

    from materialization import apply

    path = source.write(tmp_path_factory.mktemp("oip"), valkey.connection_string, project="oip")
    repository = FeastRepository.open(path)
    apply.apply(repository, apply.plan(repository))
    store = repository.store()
    with chdir(path):
        behavior = store.get_feature_view("behavior")
        basket = store.get_on_demand_feature_view("basket")
        store.apply(
            [
                FeatureService(name="spending", features=[behavior[["spend"]], basket]),
                FeatureService(name="visiting", features=[behavior[["spend", "visits"]]]),
                FeatureService(name="shelves", features=[store.get_feature_view("stock")]),
            ]
        )
        store.materialize(source.NOW - timedelta(days=500), source.NOW, ["behavior", "stock"])
    policies: dict[str, Policy] = {"behavior__spend": "reject"}
    whole: dict[str, Policy] = {"stock__level": "reject"}
    registry = ModelRegistry(str(path / "models"))
    champion(repository, registry, "buys", "spending", probabilities(),
        task="classification", classes=(0, 1), policies=policies, label="buys",
    )  # fmt: skip
    champion(
        repository, registry, "tier", "visiting", indices(), task="classification", classes=("low", "high")
    )
    champion(repository, registry, "worth", "visiting", packages.linear_graph([1.0, 2.0]))
    champion(repository, registry, "shelves", "shelves", packages.linear_graph([1.0, 2.0]), policies=whole)
    with banquet(path, Settings(registry_url=registry.url, max_entities=600)) as client:
        yield client


def tensor(name: str, data: Sequence[Any], datatype: str = "INT64", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(data), 1], "datatype": datatype, "data": list(data), **more}


def infer(server: httpx.Client, model: str, *inputs: Any, **more: Any) -> httpx.Response:
    return server.post(f"/v2/models/{model}/infer", json={"inputs": list(inputs), **more})


def answered(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    rows = answer["outputs"][0]["shape"][0]
    assert all(o["shape"] == [rows, 1] and len(o["data"]) == rows for o in answer["outputs"])
    return answer | {output["name"]: output for output in answer["outputs"]}


def refused(response: httpx.Response, status: int = 422) -> str:
    """The text that the protocol's clients look for in every error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    error: str = response.json()["error"]
    assert error
    return error


def test_the_server_tells_its_name_and_that_it_is_live_and_ready(server: httpx.Client) -> None:
    metadata = server.get("/v2").json()
    assert metadata.keys() == {"name", "version", "extensions"}
    assert (metadata["name"], metadata["extensions"]) == ("banquet", [])
    assert server.get("/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/ready").json() == {"ready": True}


def test_a_model_tells_its_tensors(server: httpx.Client) -> None:
    expected = {
        "name": "buys",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "user_id", "datatype": "INT64", "shape": [-1, 1]},
            {"name": "amount", "datatype": "FP64", "shape": [-1, 1]},
        ],
        "outputs": [
            {"name": "prediction", "datatype": "INT64", "shape": [-1, 1]},
            {"name": "confidence", "datatype": "FP64", "shape": [-1, 1]},
            {"name": "missing", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "error", "datatype": "BYTES", "shape": [-1, 1]},
        ],
    }
    assert server.get("/v2/models/buys").json() == expected
    assert server.get("/v2/models/buys/versions/1").json() == expected
    assert server.get("/v2/models/buys/ready").json() == {"name": "buys", "ready": True}
    assert server.get("/v2/models/buys/versions/1/ready").status_code == 200


def test_join_keys_and_request_inputs_go_in_and_predictions_come_out(server: httpx.Client) -> None:
    """User 1 has a fresh row, 2 an expired one, 99 none: the policy rejects the last two, row by row."""
    answer = answered(
        infer(server, "buys", tensor("user_id", [1, 2, UNKNOWN]), tensor("amount", [5.0, 1.0, 2.0], "FP64"))
    )
    assert (answer["model_name"], answer["model_version"]) == ("buys", "1")
    assert answer["prediction"]["datatype"] == "INT64"
    assert answer["prediction"]["data"] == [1, None, None]
    assert answer["confidence"]["data"] == [0.875, None, None]
    assert answer["missing"]["data"] == [
        "{}",
        '{"behavior__spend":"OUTSIDE_MAX_AGE","basket__share":"NULL_VALUE"}',
        '{"behavior__spend":"NOT_FOUND","basket__share":"NULL_VALUE"}',
    ]
    texts = answer["error"]["data"]
    assert texts[0] == ""
    assert '"code":"invalid_entity"' in texts[1]
    assert "behavior__spend" in texts[2]


def test_the_answer_equals_that_of_predict(server: httpx.Client) -> None:
    answer = answered(infer(server, "worth", tensor("user_id", [1, 1])))
    other = server.post("/models/worth/predict", json={"entities": {"user_id": [1, 1]}}).json()["predictions"]
    assert answer["prediction"]["data"] == [row["prediction"] for row in other] == [20.5, 20.5]
    assert answer["prediction"]["datatype"] == "FP64"
    assert "confidence" not in answer, "a regressor has none"


def test_classes_that_are_strings_are_bytes_and_a_model_without_probabilities_is_not_confident(
    server: httpx.Client,
) -> None:
    answer = answered(infer(server, "tier", tensor("user_id", [1, 2])))
    assert answer["prediction"]["datatype"] == "BYTES"
    assert answer["prediction"]["data"] == ["high", "low"]
    assert answer["confidence"]["data"] == [None, None]


@pytest.mark.parametrize(
    "sent",
    [
        {"shape": [2], "data": [1, 1]},
        {"shape": [2, 1], "data": [1, 1]},
        {"shape": [2, 1], "data": [[1], [1]]},
        {"shape": [2, 1], "data": [1, 1], "datatype": "INT32"},
        {"shape": [2, 1], "data": [1, 1], "datatype": "UINT8"},
        {"shape": [2, 1], "data": [1, 1], "parameters": {"content_type": "np", "anything": 1}},
        {"shape": [2, 1], "data": [1, 1], "parameters": None},
    ],
)
def test_every_form_of_a_tensor_that_the_protocol_has_is_taken(
    server: httpx.Client, sent: dict[str, Any]
) -> None:
    answer = answered(infer(server, "worth", {"name": "user_id", "datatype": "INT64", **sent}))
    assert answer["prediction"]["data"] == [20.5, 20.5]


def test_the_id_is_echoed_and_made_up_where_there_is_none(server: httpx.Client) -> None:
    user = tensor("user_id", [1])
    assert answered(infer(server, "worth", user, id="42"))["id"] == "42"
    response = infer(server, "worth", user)
    assert answered(response)["id"] == response.headers["x-request-id"]
    # As MLServer's own types are written where nothing is set.
    response = infer(server, "worth", user, id=None, parameters=None, outputs=None)
    assert answered(response)["id"] == response.headers["x-request-id"]
    assert "`id` is an integer" in refused(infer(server, "worth", user, id=42))


def test_only_the_outputs_that_were_asked_for_are_answered_in_their_order(server: httpx.Client) -> None:
    asked = [{"name": "error"}, {"name": "prediction", "parameters": {"binary_data": False}}]
    answer = answered(infer(server, "worth", tensor("user_id", [1]), outputs=asked))
    assert [output["name"] for output in answer["outputs"]] == ["error", "prediction"]
    error = refused(infer(server, "worth", tensor("user_id", [1]), outputs=[{"name": "predict"}]))
    assert "Outputs: prediction, missing, error." in error


def test_versions_are_served_by_number(server: httpx.Client) -> None:
    body = {"inputs": [tensor("user_id", [1])]}
    assert server.post("/v2/models/worth/versions/1/infer", json=body).json()["model_version"] == "1"
    for number in ("2", "latest", "1.0", "-1", "٣", "9" * 30):
        for path in (f"/v2/models/worth/versions/{number}", f"/v2/models/worth/versions/{number}/ready"):
            refused(server.get(path), 404)
        refused(server.post(f"/v2/models/worth/versions/{number}/infer", json=body), 404)


def test_an_unknown_model_is_a_404_everywhere(server: httpx.Client) -> None:
    assert "buys, shelves, tier, worth" in refused(server.get("/v2/models/nothing"), 404)
    refused(server.get("/v2/models/nothing/ready"), 404)
    refused(infer(server, "nothing", tensor("user_id", [1])), 404)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "no `inputs`"),
        ([1], "list of objects"),
        ([{"shape": [1], "datatype": "INT64", "data": [1]}], "no name"),
        ([tensor("user_id", [1]), tensor("user_id", [1])], "`user_id` is given twice"),
        ([tensor("user_id", [1]), tensor("store", [1])], "Unknown field `store`"),
        ([tensor("user", [1])], "Unknown field `user`"),
        ([tensor("user_id", [1.7], "FP64")], "datatype FP64; it must be INT64"),
        ([tensor("user_id", ["1"], "BYTES")], "datatype BYTES; it must be INT64"),
        ([tensor("user_id", [1], "int64")], "datatype int64; it must be INT64"),
        ([{"name": "user_id", "shape": [1], "data": [1]}], "datatype null"),
        ([tensor("user_id", [1, 1.7])], "`user_id` in row 1 is a number, 1.7"),
        ([tensor("user_id", [1, True])], "`user_id` in row 1 is a boolean"),
        ([tensor("user_id", [None])], "`user_id` in row 0 is null"),
        ([tensor("user_id", [2**63])], "`user_id` in row 0"),
        ([tensor("user_id", [])], "empty"),
        ([tensor("user_id", [1, 2]) | {"shape": [3, 1]}], "has 2 values, but its shape is [3, 1]"),
        ([tensor("user_id", [1, 2]) | {"shape": [1, 2]}], "neither [n] nor [n, 1]"),
        ([tensor("user_id", [1]) | {"shape": [-1]}], "neither [n] nor [n, 1]"),
        ([tensor("user_id", [1]) | {"shape": "1"}], "neither [n] nor [n, 1]"),
        ([tensor("user_id", [1]) | {"data": 1}], "not a list"),
        ([tensor("user_id", [1]) | {"data": [[[1]]]}], "`user_id` in row 0 is a list"),
        ([tensor("user_id", [1]) | {"value": 1}], "Unknown field `value`"),
        ([tensor("user_id", [1]) | {"parameters": []}], "must be an object"),
        (
            [{"name": "user_id", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}],
            "binary data",
        ),
        ([tensor("user_id", list(range(601)))], "limit of 600"),
    ],
)
def test_a_tensor_that_is_not_valid_is_a_422_that_names_it(
    server: httpx.Client, inputs: list[Any], says: str
) -> None:
    assert says in refused(infer(server, "worth", *inputs))


def test_request_inputs_are_checked_as_everywhere(server: httpx.Client) -> None:
    user = tensor("user_id", [1])
    assert "`amount` is missing" in refused(infer(server, "buys", user))
    assert "differ in length" in refused(infer(server, "buys", user, tensor("amount", [1.0, 2.0], "FP64")))
    assert "`amount` in row 0 is a string" in refused(
        infer(server, "buys", user, tensor("amount", ["1"], "FP64"))
    )


def test_a_body_that_is_no_json_is_refused_with_an_error_text(server: httpx.Client) -> None:
    path, json_type = "/v2/models/worth/infer", {"content-type": "application/json"}
    assert "binary" in refused(server.post(path, content=b'{"inputs": []}\x00\x01', headers=json_type), 400)
    refused(server.post(path, content=b"\x00", headers={"content-type": "application/octet-stream"}), 415)
    refused(server.get(path), 405)
    refused(server.get("/v2/models"), 404)


def test_a_body_without_a_content_type_is_taken_as_triton_s_client_sends_it(server: httpx.Client) -> None:
    body = json.dumps({"inputs": [tensor("user_id", [1])]}).encode()
    response = server.post("/v2/models/worth/infer", content=body)
    assert "content-type" not in response.request.headers
    assert answered(response)["prediction"]["data"] == [20.5]
    assert server.post("/models/worth/predict", content=body).status_code == 415


def test_a_request_larger_than_a_slice_is_answered_in_order(server: httpx.Client) -> None:
    users = [1 if row % 3 else UNKNOWN for row in range(600)]
    answer = answered(infer(server, "buys", tensor("user_id", users), tensor("amount", [5.0] * 600, "FP64")))
    expected = [None if user == UNKNOWN else 1 for user in users]
    assert answer["prediction"]["data"] == expected
    assert [text != "" for text in answer["error"]["data"]] == [user == UNKNOWN for user in users]


def test_not_ready_is_a_400_with_the_reason(valkey: Any, shop: Path, tmp_path: Path) -> None:
    """The protocol wants a 4xx there; inference itself answers 503, which is worth another try."""
    with banquet(shop, Settings(state_dir=tmp_path)) as server:
        assert "No model has a champion" in refused(server.get("/v2/health/ready"), 400)
        assert server.get("/v2/health/live").status_code == 200


def test_texts_are_bytes_tensors_plain_or_in_base64(server: httpx.Client) -> None:
    plain = answered(infer(server, "shelves", tensor("store_code", ["north", "nowhere"], "BYTES")))
    assert plain["prediction"]["data"] == [pytest.approx(3.2), None]
    coded = tensor(
        "store_code",
        [base64.b64encode(text).decode() for text in (b"north", b"nowhere")],
        "BYTES",
        parameters={"content_type": "base64"},
    )
    assert answered(infer(server, "shelves", coded))["prediction"] == plain["prediction"]
    error = refused(infer(server, "shelves", coded | {"data": ["north!", "x"]}))
    assert "`store_code` in row 0 is not the base64 of a text" in error
    assert "datatype INT64; it must be BYTES" in refused(infer(server, "shelves", tensor("store_code", [1])))
