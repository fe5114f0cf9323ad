"""``POST /get-online-features``: Feast's own feature-server API, with honest statuses.

The answer equals that of ``feast serve`` field for field, save where stock is wrong: statuses follow the
read contract, features stand in the order of the request, and bad input is a 4xx
(docs/feature-server.md lists the differences).
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from core import layout
from core.errors import InvalidRequest
from core.online import FeaturePlan, FeatureVectors
from core.repository import DUMMY_JOIN_KEY
from core.types import Dtype, FeatureStatus
from serving import bodies
from serving.batching import Columns
from serving.catalog import Catalog

_FIELDS = (
    "entities",
    "feature_service",
    "features",
    "full_feature_names",
    "include_feature_view_version_metadata",
)
_EPOCH = "1970-01-01T00:00:00Z"
# Python's values of these types are Feast's JSON values as they are.
_SAME_IN_JSON = frozenset({Dtype.INT32, Dtype.INT64, Dtype.STRING, Dtype.BOOL})
_PRESENT = FeatureStatus.PRESENT.name

Result = dict[str, list[Any]]


class OnlineFeaturesEndpoint:
    """Reads features of a service or of references, by columns of entity values."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        request = bodies.parse(body)
        bodies.check_fields(request, _FIELDS)
        full_names = bodies.flag(request, "full_feature_names")
        served = self._catalog.features(_wanted(request))
        plan = served.plan
        names = plan.names if full_names else _short_names(plan)
        entities = request.get("entities")
        if not isinstance(entities, dict):
            raise InvalidRequest(
                "`entities` must be an object of columns.",
                hint='For example {"entities": {"user_id": [1, 2]}}.',
                field="entities",
            )
        dummy = entities.pop(DUMMY_JOIN_KEY, None)
        if not plan.join_keys and not plan.request_inputs:
            rows = len(dummy) if isinstance(dummy, list) else 1
            columns: Columns = {}
        else:
            columns, rows = served.entities.columns(entities)
        keys = [key for key in entities if key not in plan.request_inputs]

        def encode(vectors: FeatureVectors, columns: Columns) -> list[Result]:
            return [_given(columns[key], vectors.rows) for key in keys] + _results(plan, vectors)

        slices = await served.read(columns, rows, encode)
        payload: dict[str, Any] = {
            "metadata": {"feature_names": [*keys, *names]},
            "results": slices[0] if len(slices) == 1 else _joined(slices),
        }
        return orjson.dumps(payload)


def _wanted(request: dict[str, Any]) -> str | tuple[str, ...]:
    service, features = request.get("feature_service"), request.get("features")
    if service is not None:
        if features:
            raise InvalidRequest("Give either `feature_service` or `features`, not both.", field="features")
        if not isinstance(service, str) or not service:
            raise InvalidRequest("`feature_service` must be a name.", field="feature_service")
        return service
    if not isinstance(features, list) or not features or not all(type(f) is str for f in features):
        raise InvalidRequest(
            "The request names no features.",
            hint='Give `feature_service`, or `features` such as ["user_behavior:purchase_amount_30d"].',
            field="features",
        )
    return tuple(features)


def _short_names(plan: FeaturePlan) -> list[str]:
    names = [plan.short_names[name] for name in plan.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(
            f"Two of the views have a feature named {twice!r}.",
            hint="Set `full_feature_names` to true.",
            field="full_feature_names",
        )
    return names


def _given(column: list[Any], rows: int) -> Result:
    return {"values": column, "statuses": [_PRESENT] * rows, "event_timestamps": [_EPOCH] * rows}


def _results(plan: FeaturePlan, vectors: FeatureVectors) -> list[Result]:
    times = {
        view: [_EPOCH if ns is None else timestamp(ns) for ns in events]
        for view, events in vectors.event_ns.items()
    }
    present = [_PRESENT] * vectors.rows
    computed = [_EPOCH] * vectors.rows
    results = []
    for name in plan.names:
        statuses = vectors.statuses[name]
        view = plan.stored_in.get(name)
        results.append(
            {
                "values": _json_values(vectors.values[name], plan.dtypes[name]),
                "statuses": [s.name for s in statuses] if statuses else present,
                "event_timestamps": times[view] if view else computed,
            }
        )
    return results


def _json_values(values: list[Any], dtype: Dtype) -> list[Any]:
    if dtype in _SAME_IN_JSON:
        return values
    if dtype is Dtype.DOUBLE or dtype is Dtype.FLOAT:
        # A number that JSON lacks is the only one that differs from itself when subtracted.
        return [v if v is None or v - v == 0.0 else layout.json_value(v, dtype) for v in values]
    return [None if value is None else layout.json_value(value, dtype) for value in values]


def _joined(slices: list[list[Result]]) -> list[Result]:
    return [
        {part: [entry for result in column for entry in result[part]] for part in column[0]}
        for column in zip(*slices, strict=True)
    ]


@lru_cache(maxsize=65_536)
def timestamp(event_ns: int) -> str:
    """A row's event timestamp as protobuf's JSON has it, in UTC, to the microsecond as in Feast's server."""
    seconds, microseconds = divmod((event_ns + 500) // 1000, 1_000_000)
    text = datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S")
    if microseconds == 0:
        return text + "Z"
    if microseconds % 1000 == 0:
        return f"{text}.{microseconds // 1000:03d}Z"
    return f"{text}.{microseconds:06d}Z"
