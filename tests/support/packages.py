"""Model packages small enough for unit tests: a linear model over two or three columns, as ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.manifest import (
    BASELINE_FILE,
    MODEL_FILE,
    CompiledForm,
    GoldenRow,
    ModelManifest,
    ServedFeature,
    ServiceSchema,
    TrainingWindow,
)
from core.registry import ModelRegistry
from core.types import Dtype, Field

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
GRAPH_FILE = "model.onnx"
SCHEMA = ServiceSchema(
    service="churn_v1",
    features=(
        ServedFeature("account__spend", Dtype.DOUBLE, 86400.0),
        ServedFeature("account__visits", Dtype.INT64, 86400.0),
    ),
    join_keys=(Field("user_id", Dtype.INT64),),
    request_inputs=(Field("basket_value", Dtype.DOUBLE),),
)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def manifest(
    version: int = 1, artifacts: Mapping[str, str] | None = None, /, **changes: Any
) -> ModelManifest:
    """A regressor's manifest, spend + 2 visits, with whatever the test wants to be different."""
    described: dict[str, Any] = {
        "name": "churn",
        "version": version,
        "created": NOON,
        "task": "regression",
        "schema": SCHEMA,
        "label": "churned",
        "window": TrainingWindow(NOON, NOON, NOON, 10, 0, 5, 2, 1),
        "dataset_digest": "d" * 64,
        "libraries": {"python": "3.11"},
        "golden": (
            GoldenRow({"account__spend": 3.0, "account__visits": 4}, 11.0, None),
            GoldenRow({"account__spend": 0.5, "account__visits": 0}, 0.5, None),
        ),
        "compiled": CompiledForm("onnx", GRAPH_FILE, 0.0, True, 2),
        "artifacts": artifacts or {MODEL_FILE: "0" * 64, BASELINE_FILE: "1" * 64, GRAPH_FILE: "2" * 64},
    }
    return ModelManifest(**{**described, **changes})


def register(
    registry: ModelRegistry, files: Mapping[str, bytes] | None = None, /, **changes: Any
) -> ModelManifest:
    """Register a package whose files are opaque bytes, unless the test brings its own."""
    content = files or {MODEL_FILE: b"pickled", BASELINE_FILE: b"rows", GRAPH_FILE: b"graph"}
    name = changes.get("name", "churn")
    return registry.register(name, content, lambda version, digests: manifest(version, digests, **changes))


def linear_graph(weights: Sequence[float]) -> bytes:
    """An ONNX regressor: the weighted sum of its columns."""
    from onnx import TensorProto, helper

    rows = helper.make_tensor_value_info("matrix", TensorProto.DOUBLE, [None, len(weights)])
    value = helper.make_tensor_value_info("value", TensorProto.DOUBLE, [None, 1])
    coefficients = helper.make_tensor("weights", TensorProto.DOUBLE, [len(weights), 1], list(weights))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["matrix", "weights"], ["value"])],
        "linear",
        [rows],
        [value],
        [coefficients],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    content: bytes = model.SerializeToString()
    return content


def register_linear(
    registry: ModelRegistry, *, weights: Sequence[float] = (1.0, 2.0), **changes: Any
) -> ModelManifest:
    """Register a package that can be loaded: its graph really is spend + 2 visits."""
    files = {MODEL_FILE: b"never unpickled", BASELINE_FILE: b"rows", GRAPH_FILE: linear_graph(weights)}
    return register(registry, files, **changes)
