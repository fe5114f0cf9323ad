"""``POST /predict`` and ``POST /models/{name}/predict``: entity rows in, predictions out, as JSON bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import orjson

from core.errors import ModelNotFound
from core.types import FeatureStatus, is_version
from serving import bodies
from serving.batching import Columns
from serving.catalog import Catalog
from serving.deployment import Share, pick
from serving.predictor import Answer, ServedModel
from serving.problems import row_error

_FIELDS = ("entities", "explain")


class PredictEndpoint:
    """Predicts with a model (``name`` or ``name@alias``), or with the default model when it is None."""

    def __init__(self, catalog: Catalog, name: str | None = None, version: str | None = None) -> None:
        self._catalog = catalog
        self._name = name
        self._version = version

    async def __call__(self, body: bytes, request_id: str) -> bytes:
        target = self._catalog.target(self._name, version_number(self._version, self._name))
        request = bodies.parse(body)
        bodies.check_fields(request, _FIELDS)
        columns, rows = target.served.entities.columns(request.get("entities"))
        explain = bodies.flag(request, "explain")
        shares = target.shares(columns, rows)
        share = shares[0]
        if share.rows is None:
            served = share.served

            def encode(answer: Answer, columns: Columns) -> bytes:
                return orjson.dumps(_rows(served, answer, columns, explain=explain), default=plain)

            slices = await share.predict(columns, rows, encode, request_id)
            predictions = slices[0] if len(slices) == 1 else b"[%s]" % b",".join([s[1:-1] for s in slices])
        else:
            predictions = await _mixed(shares, columns, rows, request_id, explain=explain)
        head = {
            "model_name": share.served.name,
            "model_version": share.served.version,
            "variant": share.variant,
            "request_id": request_id,
            "predictions": orjson.Fragment(predictions),
        }
        return orjson.dumps(head)


async def _mixed(
    shares: Sequence[Share], columns: Columns, rows: int, request_id: str, *, explain: bool
) -> bytes:
    """The predictions of several versions in the order of the request; rows not of the first share say so."""

    async def one(share: Share) -> None:
        def encode(answer: Answer, columns: Columns) -> list[dict[str, Any]]:
            return _rows(share.served, answer, columns, explain=explain)

        assert share.rows is not None
        slices = await share.predict(pick(columns, share.rows), len(share.rows), encode, request_id)
        other = (
            {} if share is shares[0] else {"model_version": share.served.version, "variant": share.variant}
        )
        for place, row in zip(share.rows, chain.from_iterable(slices), strict=True):
            predictions[place] = row | other

    predictions: list[dict[str, Any]] = [{}] * rows
    await asyncio.gather(*map(one, shares))
    return orjson.dumps(predictions, default=plain)


def version_number(text: str | None, model: str | None) -> int | None:
    """The version that a path names; raises ModelNotFound for what cannot be one."""
    if text is None:
        return None
    if not is_version(text):
        raise ModelNotFound(f"Model {model!r} has no version {text!r}.", hint="Versions are integers.")
    return int(text)


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
    if len(keys) == 1:
        entities = [{keys[0]: value} for value in columns[keys[0]]]
    else:
        entities = [{key: columns[key][i] for key in keys} for i in range(answer.rows)]
    missing = answer.missing
    if not missing and not answer.errors and not explain:
        return [
            {"entity": entity, "prediction": prediction, "confidence": confidence, "missing": {}}
            for entity, prediction, confidence in zip(
                entities, answer.predictions, answer.confidences, strict=True
            )
        ]
    present = FeatureStatus.PRESENT
    rows = []
    for i, entity in enumerate(entities):
        row: dict[str, Any] = {"entity": entity}
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
