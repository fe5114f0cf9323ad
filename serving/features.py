"""``POST /get-online-features``: Feast's own feature-server API, with honest statuses.

The answer equals that of ``feast serve`` field for field, save where stock is wrong: statuses follow the
read contract, features stand in the order of the request, and bad input is a 4xx
(docs/feature-server.md lists the differences).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import orjson

from core import layout
from core.entities import EntitySchema
from core.errors import InvalidRequest, NotFound
from core.online import FeaturePlan
from core.online_json import EPOCH, JsonColumn, repeated, rest
from core.repository import DUMMY_JOIN_KEY, Definitions
from core.types import Dtype, Field
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
_SAME_IN_JSON = frozenset({Dtype.INT32, Dtype.INT64, Dtype.STRING})


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
        names = _names(plan, full=full_names)
        columns, rows, echoed = _entities(request.get("entities"), served, self._catalog.definitions)
        asked = {name: columns[name] for name in served.columns}
        results = [_given(columns[key.name], key, rows) for key in echoed]
        results += await served.read(asked, rows)
        given = tuple(key.name for key in echoed)
        return _written(results, _metadata(plan, given + names, with_versions=with_versions))


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


@lru_cache(maxsize=256)
def _names(plan: FeaturePlan, *, full: bool) -> tuple[str, ...]:
    if full:
        return tuple(plan.names)
    names = tuple(plan.short_names[name] for name in plan.names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(
            f"Two of the views have a feature named {twice!r}.",
            hint="Set `full_feature_names` to true.",
            field="full_feature_names",
        )
    return names


@lru_cache(maxsize=256)
def _metadata(plan: FeaturePlan, names: tuple[str, ...], *, with_versions: bool) -> bytes:
    metadata: dict[str, Any] = {"feature_names": names}
    if with_versions:
        metadata["feature_view_metadata"] = [
            {"name": name, "version": version} if version else {"name": name}
            for name, version in plan.view_versions.items()
        ]
    return orjson.dumps(metadata)


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


def _given(column: list[Any], key: Field, rows: int) -> JsonColumn:
    # Numbers and texts are answered as they were given, now that they have been checked.
    given = column if key.dtype in _SAME_IN_JSON else layout.json_column(column, key.dtype)
    return orjson.dumps(given), _beside_keys(rows)


@lru_cache(maxsize=1024)
def _beside_keys(rows: int) -> bytes:
    return rest(repeated("PRESENT", rows), repeated(EPOCH, rows))


def _written(results: Sequence[JsonColumn], metadata: bytes) -> bytes:
    parts: list[bytes] = []
    separator = b'{"values":'
    for values, others in results:
        parts += (separator, values, others)
        separator = b'},{"values":'
    return b"".join((b'{"results":[', *parts, b"}" if parts else b"", b'],"metadata":', metadata, b"}"))
