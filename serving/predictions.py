"""``POST /predict`` and ``POST /models/{name}/predict``: entity rows in, predictions out, as JSON bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson

from core.types import FeatureStatus
from serving import bodies
from serving.batching import Columns
from serving.catalog import Catalog
from serving.predictor import Answer, ServedModel
from serving.problems import row_error

_FIELDS = ("entities", "explain")


class PredictEndpoint:
    """Predicts with one model, or with the server's default model when ``model`` is None."""

    def __init__(self, catalog: Catalog, model: str | None = None) -> None:
        self._catalog = catalog
        self._model = model

    async def __call__(self, body: bytes, request_id: str) -> bytes:
        served = self._catalog.model(self._model)
        request = bodies.parse(body)
        bodies.check_fields(request, _FIELDS)
        columns, rows = served.entities.columns(request.get("entities"))
        explain = bodies.flag(request, "explain")

        def encode(answer: Answer, columns: Columns) -> bytes:
            return orjson.dumps(_rows(served, answer, columns, explain=explain), default=plain)

        slices = await served.predict(columns, rows, encode)
        head = {
            "model_name": served.name,
            "model_version": served.version,
            "variant": "champion",
            "request_id": request_id,
            "predictions": orjson.Fragment(
                slices[0] if len(slices) == 1 else b"[%s]" % b",".join([part[1:-1] for part in slices])
            ),
        }
        return orjson.dumps(head)


def plain(value: Any) -> Any:
    """What orjson cannot encode itself, as JSON: sets as lists, bytes as base64, decimals as text."""
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, bytes):
        import base64

        return base64.b64encode(value).decode()
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def iso(event_ns: int | None) -> str | None:
    """A timestamp in nanoseconds as RFC 3339 with microseconds, UTC."""
    if event_ns is None:
        return None
    moment = datetime.fromtimestamp(event_ns // 1_000_000_000, tz=UTC)
    return moment.replace(microsecond=event_ns % 1_000_000_000 // 1000).isoformat()


def _rows(
    served: ServedModel, answer: Answer, columns: dict[str, list[Any]], *, explain: bool
) -> list[dict[str, Any]]:
    keys = [key.name for key in served.plan.join_keys]
    missing = answer.missing()
    present = FeatureStatus.PRESENT
    rows = []
    for i in range(answer.vectors.rows):
        row: dict[str, Any] = {"entity": {key: columns[key][i] for key in keys}}
        error = answer.errors.get(i)
        if error is None:
            row["prediction"] = answer.predictions[i]
            row["confidence"] = answer.confidences[i]
        else:
            row["error"] = {"code": error.code, "detail": error.message, **row_error(error)}
        row["missing"] = {name: s[i].name for name, s in missing if s[i] is not present}
        if explain:
            row["features"] = _explained(served, answer, i)
        rows.append(row)
    return rows


def _explained(served: ServedModel, answer: Answer, row: int) -> dict[str, Any]:
    vectors = answer.vectors
    features = {}
    for name in served.plan.names:
        statuses = vectors.statuses[name]
        view = served.plan.stored_in.get(name)
        features[name] = {
            "value": vectors.values[name][row],
            "status": (statuses[row] if statuses else FeatureStatus.PRESENT).name,
            "event_timestamp": iso(vectors.event_ns[view][row]) if view else None,
        }
    return features
