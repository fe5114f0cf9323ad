"""``POST /get-online-features``: Feast's own feature-server API, with honest statuses.

The answer equals that of ``feast serve`` field for field, save where stock is wrong: statuses follow the
read contract, features stand in the order of the request, and bad input is a 4xx
(docs/feature-server.md lists the differences).
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from core import layout
from core.entities import EntitySchema
from core.errors import InvalidRequest, NotFound
from core.online import FeaturePlan, FeatureVectors
from core.repository import DUMMY_JOIN_KEY, Definitions
from core.types import FeatureStatus, Field
from serving import bodies
from serving.batching import Columns
from serving.catalog import Catalog
from serving.predictor import ServedFeatures

_FIELDS = (
    "entities",
    "feature_service",
    "features",
    "full_feature_names",
    "include_feature_view_version_metadata",
)
_EPOCH = "1970-01-01T00:00:00Z"
_PRESENT = FeatureStatus.PRESENT.name
# By number: an enum's own name is several times slower to ask for.
_STATUS_NAMES = [status.name for status in sorted(FeatureStatus)]

# The values of one column are a list; statuses and timestamps are JSON already, as bytes.
Result = dict[str, Any]


class OnlineFeaturesEndpoint:
    """Reads features of a service or of references, by columns of entity values."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        request = bodies.parse(body)
        bodies.check_fields(request, _FIELDS)
        full_names = bodies.flag(request, "full_feature_names")
        with_versions = bodies.flag(request, "include_feature_view_version_metadata")
        wanted = _wanted(request)
        try:
            served = self._catalog.features(wanted)
        except NotFound as exc:
            exc.details.setdefault("field", "features" if isinstance(wanted, tuple) else "feature_service")
            raise
        plan = served.plan
        names = plan.names if full_names else _short_names(plan)
        columns, rows, echoed = _entities(request.get("entities"), served, self._catalog.definitions)
        results = [_given(layout.json_column(columns[key.name], key.dtype), rows) for key in echoed]

        def encode(vectors: FeatureVectors, _: Columns) -> list[Result]:
            return _results(plan, vectors)

        # Requests are read together, so they have to bring the same columns.
        asked = {name: columns[name] for name in served.columns}
        slices = await served.read(asked, rows, encode)
        results += slices[0] if len(slices) == 1 else _joined(slices)
        metadata: dict[str, Any] = {"feature_names": [*(key.name for key in echoed), *names]}
        if with_versions:
            metadata["feature_view_metadata"] = [
                {"name": name, "version": version} if version else {"name": name}
                for name, version in plan.view_versions.items()
            ]
        for result in results:
            for part in ("statuses", "event_timestamps"):
                result[part] = orjson.Fragment(result[part])
        return orjson.dumps({"results": results, "metadata": metadata})


def _wanted(request: dict[str, Any]) -> str | tuple[str, ...]:
    service, features = request.get("feature_service"), request.get("features")
    if service is not None:
        if features:
            raise InvalidRequest("Give either `feature_service` or `features`, not both.", field="features")
        if not isinstance(service, str) or not service:
            raise InvalidRequest("`feature_service` must be a name.", field="feature_service")
        return service
    if features is not None and not (isinstance(features, list) and all(type(f) is str for f in features)):
        raise InvalidRequest("`features` must be a list of strings.", field="features")
    if not features:
        raise InvalidRequest(
            "The request names no features.",
            hint='Give `feature_service`, or `features` such as ["user_behavior:purchase_amount_30d"].',
            field="features",
        )
    return tuple(features)


@lru_cache(maxsize=128)
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


def _entities(
    entities: Any, served: ServedFeatures, definitions: Definitions
) -> tuple[Columns, int, list[Field]]:
    """The checked columns, their length, and the join keys that the answer repeats in the request's order."""
    if not isinstance(entities, dict):
        raise InvalidRequest(
            "`entities` must be an object of columns.",
            hint='For example {"entities": {"user_id": [1, 2]}}.',
            field="entities",
        )
    plan, schema = served.plan, served.entities
    placeholder = entities.pop(DUMMY_JOIN_KEY, None)
    keys = {key.name: key for key in plan.join_keys}
    if not entities.keys() <= schema.dtypes.keys():
        # One set of entity rows often serves several calls, so the join keys of other views may stand in it.
        others = {key.name: key for view in definitions.views.values() for key in view.join_keys}
        keys |= {name: others[name] for name in entities if name not in keys and name in others}
        schema = EntitySchema(list(keys.values()), list(plan.request_inputs.values()), schema.max_entities)
    if entities or keys or plan.request_inputs:
        columns, rows = schema.columns(entities)
    else:
        columns, rows = {}, len(placeholder) if isinstance(placeholder, list) else 1
        schema.check_count(rows)
    if isinstance(placeholder, list) and len(placeholder) != rows:
        raise InvalidRequest(
            f"The columns of `entities` differ in length ({DUMMY_JOIN_KEY}: {len(placeholder)}).",
            hint=f"Leave {DUMMY_JOIN_KEY} out, or send as many values in it as in the others.",
            field=DUMMY_JOIN_KEY,
        )
    return columns, rows, [keys[name] for name in entities if name in keys]


def _given(column: list[Any], rows: int) -> Result:
    return {
        "values": column,
        "statuses": _repeated(_PRESENT, rows),
        "event_timestamps": _repeated(_EPOCH, rows),
    }


def _results(plan: FeaturePlan, vectors: FeatureVectors) -> list[Result]:
    times = {view: timestamps(events) for view, events in vectors.event_ns.items()}
    present, computed = _repeated(_PRESENT, vectors.rows), _repeated(_EPOCH, vectors.rows)
    results = []
    for name in plan.names:
        statuses = vectors.statuses[name]
        view = plan.stored_in.get(name)
        results.append(
            {
                "values": vectors.values[name],
                "statuses": _names(statuses) if statuses else present,
                "event_timestamps": times[view] if view else computed,
            }
        )
    return results


def _joined(slices: list[list[Result]]) -> list[Result]:
    return [
        {
            "values": [value for result in column for value in result["values"]],
            "statuses": _concatenated([result["statuses"] for result in column]),
            "event_timestamps": _concatenated([result["event_timestamps"] for result in column]),
        }
        for column in zip(*slices, strict=True)
    ]


def _concatenated(arrays: list[bytes]) -> bytes:
    return b"[%b]" % b",".join([array[1:-1] for array in arrays])


def _names(statuses: list[FeatureStatus]) -> bytes:
    return orjson.dumps([_STATUS_NAMES[status] for status in statuses])


@lru_cache(maxsize=1024)
def _repeated(text: str, rows: int) -> bytes:
    return orjson.dumps([text] * rows)


def timestamps(event_ns: list[int | None]) -> bytes:
    """Rows' event timestamps as a JSON array, each as ``timestamp`` has it; without a row the epoch."""
    if len(event_ns) >= _MANY_TIMESTAMPS:
        microseconds = (np.array([ns or 0 for ns in event_ns]) + 500) // 1000
        fractions = microseconds % 1_000_000
        # orjson writes a fraction with six digits, protobuf whole milliseconds with three.
        if not ((fractions % 1000 == 0) & (fractions != 0)).any():
            return orjson.dumps(microseconds.view("datetime64[us]"), option=_NUMPY_UTC)
    return orjson.dumps([timestamp(ns or 0) for ns in event_ns])


_MANY_TIMESTAMPS = 8
_NUMPY_UTC = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z


@lru_cache(maxsize=16_384)
def timestamp(event_ns: int) -> str:
    """A row's event timestamp as protobuf's JSON has it, in UTC, to the microsecond as in Feast's server."""
    seconds, microseconds = divmod((event_ns + 500) // 1000, 1_000_000)
    hours, rest = divmod(seconds, 3600)
    text = f"{_hour(hours)}{rest // 60:02d}:{rest % 60:02d}"
    if microseconds == 0:
        return text + "Z"
    if microseconds % 1000 == 0:
        return f"{text}.{microseconds // 1000:03d}Z"
    return f"{text}.{microseconds:06d}Z"


@lru_cache(maxsize=4096)
def _hour(hours: int) -> str:
    return datetime.fromtimestamp(hours * 3600, tz=UTC).isoformat()[:14]
