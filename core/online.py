"""The sole online read: a feature plan, resolved once, and the reader that runs it on Redis.

A request costs one round trip whatever the number of views and entities: views that share join keys
share one HMGET, and each distinct key is read once. Statuses follow ``core.contract``. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import Any

from core import contract, layout
from core.errors import BanquetError, InvalidRequest, OnDemandFailed
from core.manifest import ServedFeature, ServiceSchema
from core.on_demand import OnDemandTransformation
from core.online_json import FLOATS, JsonColumn, Run, ViewSlot, entities, one_entity
from core.redis_connection import Hashes, HashFields, HashReader
from core.repository import Definitions, Feature, OnDemandView, Projection, View
from core.types import Dtype, FeatureStatus, Field, feature_name, is_version

Cells = Sequence[bytes | None]
Decoder = Callable[[Cells, Dtype], list[Any]]


@dataclass(slots=True)
class FeatureVectors:
    """Feature values of ``rows`` entities, by column.

    ``statuses`` holds None in place of a column whose values are all PRESENT. ``event_ns`` gives, per view,
    each row's event timestamp in nanoseconds since the epoch (UTC), None where there is no row.
    ``errors`` holds the rows for which an on-demand view failed.
    """

    rows: int
    values: dict[str, list[Any]]
    statuses: dict[str, list[FeatureStatus] | None]
    event_ns: dict[str, list[int | None]]
    errors: dict[int, BanquetError] = field(default_factory=dict)

    def slice(self, start: int, stop: int) -> FeatureVectors:
        """The rows from ``start`` to before ``stop``."""
        if start == 0 and stop == self.rows:
            return self
        return FeatureVectors(
            rows=stop - start,
            values={name: column[start:stop] for name, column in self.values.items()},
            statuses={name: column and column[start:stop] for name, column in self.statuses.items()},
            event_ns={name: column[start:stop] for name, column in self.event_ns.items()},
            errors={row - start: error for row, error in self.errors.items() if start <= row < stop},
        )

    @classmethod
    def joined(cls, parts: Sequence[FeatureVectors]) -> FeatureVectors:
        """The rows of several reads of one plan, in order; there must be one."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        present = FeatureStatus.PRESENT
        statuses: dict[str, list[FeatureStatus] | None] = {}
        for name in first.statuses:
            columns = [part.statuses[name] or [present] * part.rows for part in parts]
            some = any(part.statuses[name] for part in parts)
            statuses[name] = list(chain.from_iterable(columns)) if some else None
        errors, start = {}, 0
        for part in parts:
            errors.update({start + row: error for row, error in part.errors.items()})
            start += part.rows
        return cls(
            rows=start,
            values={name: [v for part in parts for v in part.values[name]] for name in first.values},
            statuses=statuses,
            event_ns={view: [t for part in parts for t in part.event_ns[view]] for view in first.event_ns},
            errors=errors,
        )


class _KeyGroup:
    """The views that live in the same Redis hash and are asked for by the same request columns."""

    def __init__(self, project: str, keys: Mapping[str, tuple[str, Dtype]]) -> None:
        self.columns = [column for column, _ in keys.values()]
        self.encoder = layout.EntityKeys(project, [Field(name, dtype) for name, (_, dtype) in keys.items()])
        self.slots: list[ViewSlot] = []
        self._fields: list[bytes] = []

    def add(self, view: View, name: str, features: Sequence[str]) -> None:
        runs = []
        by_dtype = sorted(features, key=lambda feature: view.feature(feature).dtype)
        for dtype, alike in groupby(by_dtype, key=lambda feature: view.feature(feature).dtype):
            run = list(alike)
            runs.append(Run(dtype, len(self._fields), tuple(feature_name(name, f) for f in run)))
            self._fields += [layout.feature_field(view.stored_name, f) for f in run]
        ttl_ns = round(view.ttl.total_seconds() * 1e6) * 1000
        self.slots.append(ViewSlot(name, ttl_ns, tuple(runs), timestamp=len(self._fields)))
        self._fields.append(layout.timestamp_field(view.stored_name))

    @cached_property
    def hash_fields(self) -> HashFields:
        """The HMGET of all fields, complete once every view has been added."""
        return HashFields(self._fields)

    def keys(self, columns: Mapping[str, Sequence[Any]], rows: int) -> tuple[list[bytes], list[int] | None]:
        """The distinct Redis keys, and each row's position among them (None: row i has key i)."""
        if not self.columns:
            return self.encoder.encode([]), [0] * rows
        keys = self.encoder.encode([columns[column] for column in self.columns])
        if rows == 1 or len(set(keys)) == rows:
            return keys, None
        position: dict[bytes, int] = {}
        index = [position.setdefault(key, len(position)) for key in keys]
        return list(position), index


class FeaturePlan:
    """Everything a read needs, resolved from the definitions once.

    Attributes:
        names: the requested features, ``view__feature``, in the order of the request.
        dtypes: the declared dtype of each name in ``names``.
        short_names: each name's feature without its view.
        join_keys: the entity columns a request has to bring.
        request_inputs: the request-time inputs it has to bring, with their expectations in ``tags``.
        stored_in: the stored view behind each name that is read and not computed.
        ttls_s: each stored view's time to live in seconds, zero for never.
        computes: whether on-demand views are among them.
        view_versions: Feast's version number of each stored view's definition, by the name it goes by.
    """

    def __init__(self, definitions: Definitions, projections: Iterable[Projection]) -> None:
        """Resolve the projections.

        Raises:
            FeatureNotFound: a view or feature does not exist.
            InvalidRepository: an on-demand view cannot run here.
        """
        self.names: list[str] = []
        self.dtypes: dict[str, Dtype] = {}
        self.short_names: dict[str, str] = {}
        self.stored_in: dict[str, str] = {}
        self.ttls_s: dict[str, float] = {}
        self.view_versions: dict[str, int] = {}
        self.request_inputs: dict[str, Feature] = {}
        self._definitions = definitions
        self._groups: dict[tuple[tuple[str, str], ...], _KeyGroup] = {}
        self._needed: dict[str, tuple[Projection, dict[str, None]]] = {}
        self._transformations: dict[str, OnDemandTransformation] = {}
        self._join_keys: dict[str, Field] = {}
        wanted = list(projections)
        on_demand: list[tuple[Projection, OnDemandView]] = []
        for projection in wanted:
            view = definitions.view(projection.view, projection.version)
            for feature in projection.features:
                name = feature_name(projection.name, feature)
                self.names.append(name)
                self.dtypes[name] = view.feature(feature).dtype
                self.short_names[name] = feature
            if isinstance(view, OnDemandView):
                on_demand.append((projection, view))
            else:
                self._need(projection)
        for projection, view in on_demand:
            self._need_sources(view, seen=(projection.view,))
        self._place_views()
        for projection, view in on_demand:
            self._add_transformation(projection.name, view)
        self.join_keys = tuple(self._join_keys.values())
        self._group_list = list(self._groups.values())
        stored = [
            name for g in self._group_list for slot in g.slots for run in slot.runs for name in run.names
        ]
        self._order = [stored.index(name) for name in self.names if name in self.stored_in]
        self.computes = bool(self._transformations)

    @classmethod
    def for_service(cls, definitions: Definitions, service: str) -> FeaturePlan:
        """The plan of a feature service. Raises FeatureServiceNotFound where there is none."""
        return cls(definitions, definitions.service(service).projections)

    @classmethod
    def for_references(cls, definitions: Definitions, references: Sequence[str]) -> FeaturePlan:
        """The plan of ``view:feature`` (or ``view@v2:feature``) references, in their order.

        Raises:
            InvalidRequest: a reference is malformed or given twice.
            FeatureNotFound: a view or feature does not exist.
        """
        projections = []
        seen = set()
        for reference in references:
            view, colon, feature = reference.partition(":")
            view = view.removesuffix("@latest")
            base, _, version = view.partition("@v")
            if not colon or not base or not feature or ("@" in view and not is_version(version)):
                raise InvalidRequest(
                    f"Feature reference {reference!r} is malformed.",
                    hint="Write it as view:feature, or view@v2:feature for a pinned version.",
                    field="features",
                )
            if (view, feature) in seen:
                raise InvalidRequest(f"Feature {reference!r} is asked for twice.", field="features")
            seen.add((view, feature))
            pinned = int(version) if version else None
            projections.append(Projection(base, view, (feature,), {}, pinned))
        return cls(definitions, projections)

    def schema(self, service: str) -> ServiceSchema:
        """What the plan serves, as a model's manifest records it under the name of its service."""
        return ServiceSchema(
            service=service,
            features=tuple(
                ServedFeature(name, self.dtypes[name], self.ttls_s.get(self.stored_in.get(name, ""), 0.0))
                for name in self.names
            ),
            join_keys=self.join_keys,
            request_inputs=tuple(Field(f.name, f.dtype) for f in self.request_inputs.values()),
        )

    def _need(self, projection: Projection) -> None:
        known = self._needed.setdefault(projection.name, (projection, {}))
        known[1].update(dict.fromkeys(projection.features))

    def _need_sources(self, view: OnDemandView, seen: tuple[str, ...]) -> None:
        for source in view.sources:
            found = self._definitions.view(source.view, source.version)
            if not isinstance(found, OnDemandView):
                self._need(source)
            elif source.view not in seen:
                self._need_sources(found, (*seen, source.view))

    def _place_views(self) -> None:
        for projection, features in self._needed.values():
            view = self._definitions.view(projection.view, projection.version)
            assert isinstance(view, View)
            keys = {
                key.name: (projection.join_key_map.get(key.name, key.name), key.dtype)
                for key in view.join_keys
            }
            for column, dtype in keys.values():
                self._join_keys.setdefault(column, Field(column, dtype))
            identity = tuple(sorted((name, column) for name, (column, _) in keys.items()))
            group = self._groups.get(identity)
            if group is None:
                group = self._groups[identity] = _KeyGroup(self._definitions.project, keys)
            group.add(view, projection.name, list(features))
            self.ttls_s[projection.name] = view.ttl.total_seconds()
            self.view_versions.setdefault(projection.name.partition("@v")[0], view.version)
            self.stored_in |= {feature_name(projection.name, f): projection.name for f in features}

    def _add_transformation(self, name: str, view: OnDemandView) -> None:
        if name in self._transformations:
            return
        for source in view.sources:
            found = self._definitions.view(source.view, source.version)
            if isinstance(found, OnDemandView):
                self._add_transformation(source.name, found)
        self.request_inputs |= {feature.name: feature for feature in view.request_inputs}
        self._transformations[name] = OnDemandTransformation(view, name, list(self._join_keys))


class OnlineReader:
    """Runs plans on one Redis connection."""

    def __init__(self, connection: HashReader) -> None:
        self._connection = connection

    async def read(
        self,
        plan: FeaturePlan,
        columns: Mapping[str, Sequence[Any]],
        rows: int,
        now_ns: int | None = None,
        *,
        as_json: bool = False,
    ) -> FeatureVectors:
        """Read the plan's features for ``rows`` entities.

        Args:
            plan: what to read.
            columns: the plan's join keys and request-time inputs, each of length ``rows``, already checked.
            rows: number of entities.
            now_ns: the moment that ttls are held against, nanoseconds since the epoch; default: now.
            as_json: give values as the JSON that Feast's feature server answers with, not as Python values.

        Raises:
            InvalidEntity: a key value does not fit its type.
            RedisUnavailable: Redis did not answer.
            Overloaded: too many reads are waiting.
        """
        now_ns = time.time_ns() if now_ns is None else now_ns
        found = await self._hashes(plan, columns, rows)

        def decoded(decode: Decoder) -> FeatureVectors:
            vectors = FeatureVectors(rows, {}, {}, {})
            for group, hashes in found:
                _decode(group, hashes, now_ns, decode, vectors)
            return vectors

        vectors = decoded(layout.decode_json_column if as_json else layout.decode_column)
        if plan._transformations:
            # On-demand functions take Python values, whatever the answer is to hold.
            stored = decoded(layout.decode_column).values if as_json else vectors.values
            _transform(plan, {**columns, **stored}, vectors)
            if as_json:
                for name, dtype in plan.dtypes.items():
                    if name not in plan.stored_in:
                        vectors.values[name] = layout.json_column(vectors.values[name], dtype)
        return vectors

    async def read_json(
        self, plan: FeaturePlan, columns: Mapping[str, Sequence[Any]], rows: int, now_ns: int | None = None
    ) -> list[JsonColumn]:
        """What ``read`` gives with ``as_json``, as text, in the order of ``plan.names``; nothing computed."""
        now_ns = time.time_ns() if now_ns is None else now_ns
        found: list[JsonColumn] = []
        for group, hashes in await self._hashes(plan, columns, rows):
            if rows == 1:
                for slot in group.slots:
                    found += one_entity(slot, hashes[0], now_ns)
            else:
                found += entities(group.slots, list(zip(*hashes, strict=True)), now_ns)
        return [found[position] for position in plan._order]

    async def _hashes(
        self, plan: FeaturePlan, columns: Mapping[str, Sequence[Any]], rows: int
    ) -> list[tuple[_KeyGroup, Hashes]]:
        """Per key group each row's cells, by field."""
        groups = plan._group_list
        asked = [group.keys(columns, rows) for group in groups]
        replies = await self._connection.read_hashes(
            [(group.hash_fields, keys) for group, (keys, _) in zip(groups, asked, strict=True)]
        )
        return [
            (group, hashes if index is None else [hashes[position] for position in index])
            for group, (_, index), hashes in zip(groups, asked, replies, strict=True)
        ]


def _decode(group: _KeyGroup, hashes: Hashes, now_ns: int, decode: Decoder, into: FeatureVectors) -> None:
    by_field: list[Cells] = list(zip(*hashes, strict=True))
    values, statuses = into.values, into.statuses
    count = into.rows
    of_all = layout.decode_timestamps(list(chain(*[by_field[slot.timestamp] for slot in group.slots])))
    for position, slot in enumerate(group.slots):
        events = of_all[position * count : (position + 1) * count]
        rows = contract.row_statuses(events, now_ns, slot.ttl_ns)
        into.event_ns[slot.name] = events
        for run in slot.runs:
            found = by_field[run.first : run.first + len(run.names)]
            if rows is None and run.dtype in FLOATS:
                numbers = layout.decode_floats(found, run.dtype)
                if numbers is not None:
                    values.update(zip(run.names, numbers, strict=True))
                    statuses.update(dict.fromkeys(run.names))
                    continue
            for name, cells in zip(run.names, found, strict=True):
                values[name], statuses[name] = contract.apply_status(decode(cells, run.dtype), rows)


def _transform(plan: FeaturePlan, available: dict[str, Sequence[Any]], vectors: FeatureVectors) -> None:
    for transformation in plan._transformations.values():
        failed: dict[int, BanquetError] = {}
        try:
            computed = transformation(available, vectors.rows)
        except OnDemandFailed:
            computed, failed = _row_by_row(transformation, available, vectors.rows)
        for name, values in computed.items():
            shown, statuses = contract.apply_status(values, None)
            for row in failed:
                assert statuses is not None
                statuses[row] = FeatureStatus.INVALID
            vectors.values[name], vectors.statuses[name] = shown, statuses
        vectors.errors |= failed
        available |= computed


def _row_by_row(
    transformation: OnDemandTransformation, available: Mapping[str, Sequence[Any]], rows: int
) -> tuple[dict[str, list[Any]], dict[int, BanquetError]]:
    """One bad row must not take the others down: find which rows the function fails on."""
    names = [feature_name(transformation.name, out.name) for out in transformation.outputs]
    computed: dict[str, list[Any]] = {name: [None] * rows for name in names}
    failed: dict[int, BanquetError] = {}
    for row in range(rows):
        try:
            one = transformation({name: [column[row]] for name, column in available.items()}, 1)
        except OnDemandFailed as exc:
            failed[row] = exc
        else:
            for name in names:
                computed[name][row] = one[name][0]
    return computed, failed
