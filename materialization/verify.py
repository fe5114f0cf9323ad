"""Online against offline: what Redis holds for some entities, and what the source says it should hold.

The offline side is the point-in-time join that training uses, as of the watermark up to which each view has
been loaded. Every difference is named with its cause. Reads only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from core import layout
from core.errors import BanquetError, Conflict
from core.layout_rows import EncodedRows
from core.point_in_time import ViewJoin, point_in_time_join
from core.repository import FeastRepository, View
from core.types import FeatureStatus
from materialization import views
from materialization.ledger import Ledger, Loaded
from materialization.load import row_encoder, stored_cells
from materialization.materializer import Materializer
from materialization.report import error_data
from materialization.run import chosen_views
from materialization.window import EVENT, ViewSource, Window

if TYPE_CHECKING:
    from feast import FeatureView

SAMPLE = 1000
_AS_OF = "__as_of"
_CREATED = "__created"
_RANDOM_KEYS = 20


class Cause(StrEnum):
    """Why a row in Redis is not the one that the source gives."""

    LATE_ROW = "late row"
    """It reached the source after the last run; the next incremental run loads it."""

    EXPIRED = "expired"
    """It was past the view's ttl when it was due and was not loaded; both sides give the model a null."""

    CHANGED_DEFINITION = "changed definition"
    """The view or its source is defined otherwise than when it was loaded."""

    FOREIGN_WRITE = "foreign write"
    """Redis holds a row that did not come from the source: a push, a stream, another writer."""

    MISSING_ENTITY = "missing entity"
    """Redis has lost the row, or the run that should have loaded it did not."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One entity whose row in one view differs. ``features`` are those that differ, by (online, offline)."""

    view: str
    key: Mapping[str, Any]
    cause: Cause
    online_event: datetime | None
    offline_event: datetime | None
    features: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def harmless(self) -> bool:
        """Whether a model gets the same values all the same."""
        return self.cause is Cause.EXPIRED

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "view": self.view,
            "key": {name: _plain(value) for name, value in self.key.items()},
            "cause": str(self.cause),
            "online_event": self.online_event and self.online_event.isoformat(),
            "offline_event": self.offline_event and self.offline_event.isoformat(),
            "features": {
                n: {"online": _plain(a), "offline": _plain(b)} for n, (a, b) in self.features.items()
            },
        }


@dataclass(frozen=True, slots=True)
class ViewVerification:
    """One view: how many entities were compared, as of when, and what differs. ``error``: it was not."""

    view: str
    entities: int = 0
    as_of: datetime | None = None
    differences: tuple[Difference, ...] = ()
    error: BanquetError | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs that matters."""
        return self.error is None and all(difference.harmless for difference in self.differences)

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "view": self.view,
            "ok": self.ok,
            "entities": self.entities,
            "as_of": self.as_of and self.as_of.isoformat(),
            "differences": [difference.as_json() for difference in self.differences],
            "error": error_data(self.error),
        }


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found, view by view."""

    views: tuple[ViewVerification, ...]

    @property
    def ok(self) -> bool:
        """Whether online and offline agree wherever it matters."""
        return all(view.ok for view in self.views)

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"ok": self.ok, "views": [view.as_json() for view in self.views]}


def verify(
    repo: FeastRepository,
    *,
    view_names: Sequence[str] | None = None,
    sample: int = SAMPLE,
    seed: int | None = None,
) -> Verification:
    """Compare about ``sample`` entities per view, half of them drawn from Redis and half from the source.

    A view that has not been loaded, or whose source is no file, is reported with an error.

    Raises:
        NotFound: there is no such view.
        InvalidRepository: the online store is not Redis.
        RedisUnavailable: Redis does not answer.
    """
    views.require_views(repo)
    store = repo.store()
    materializer = Materializer.of_store(store)
    found = []
    with repo.redis.session() as client:
        for view in chosen_views(store, view_names):
            if views.needs_feast(view):
                continue
            try:
                found.append(_Check(materializer, client, view, sample, random.Random(seed)).run())  # noqa: S311
            except BanquetError as exc:
                found.append(ViewVerification(view.name, error=exc))
    return Verification(tuple(found))


class _Check:
    """The comparison of one view."""

    def __init__(
        self, materializer: Materializer, client: Any, view: FeatureView, sample: int, rng: random.Random
    ) -> None:
        self._materializer = materializer
        self._client = client
        self._feast_view = view
        self._sample = sample
        self._rng = rng
        self._view: View = materializer.stored_view(view)
        self._project = materializer.project
        self._keys = layout.EntityKeys(self._project, self._view.join_keys)
        self._fields = [layout.timestamp_field(self._view.stored_name)]
        self._fields += [layout.feature_field(self._view.stored_name, f.name) for f in self._view.features]

    def run(self) -> ViewVerification:
        loaded = Ledger(self._client, self._project, self._view.stored_name).loaded()
        if loaded is None:
            raise Conflict(
                f"View {self._view.name!r} has not been loaded, or Redis has lost its ledger.",
                hint="Run `banquet materialize`.",
            )
        window = Window(None, loaded.event_us)
        with self._materializer.connection() as con:
            source = self._materializer.open_source(con, self._feast_view, window)
            entities = self._entities(source, window)
            if not entities.num_rows:
                return ViewVerification(self._view.name, 0, views.as_datetime(loaded.event_us))
            expected = self._offline(source, entities, loaded)
        differences = self._compare(entities, expected, loaded)
        as_of = views.as_datetime(loaded.event_us)
        return ViewVerification(self._view.name, entities.num_rows, as_of, tuple(differences))

    def _entities(self, source: ViewSource, window: Window) -> pa.Table:
        """Distinct keys in the source's types: from Redis, and from the source."""
        names = [key.name for key in self._view.join_keys]
        if not names:
            return pa.table({_AS_OF: pa.array([0], pa.int64())})
        half = max(1, self._sample // 2)
        picked = source.sample_keys(window, half, self._rng.randrange(1 << 30))
        stored = self._stored_keys(self._sample - half)
        if not stored:
            return picked
        online = pa.table({name: [key[i] for key in stored] for i, name in enumerate(names)})
        both = pa.concat_tables([picked, online.cast(picked.schema)])
        return both.group_by(names).aggregate([])

    def _stored_keys(self, wanted: int) -> list[tuple[Any, ...]]:
        """Random keys of the view that Redis holds."""
        found: dict[tuple[Any, ...], None] = {}
        pipeline = self._client.pipeline(transaction=False)
        for _ in range(min(_RANDOM_KEYS * wanted, 20_000)):
            pipeline.randomkey()
        for key in set(pipeline.execute()) - {None}:
            values = self._keys.decode(key)
            if values is not None:
                found[values] = None
        return list(found)[:wanted]

    def _offline(self, source: ViewSource, entities: pa.Table, loaded: Loaded) -> dict[str, Any]:
        """The row that the join finds for each entity: its features, event and created time, and status."""
        as_of = pa.array([loaded.event_us] * entities.num_rows, pa.int64()).cast(pa.timestamp("us", tz="UTC"))
        extra = {_CREATED: source.created} if source.created else {}
        join = ViewJoin(
            name=self._view.name,
            scan=source.scan,
            keys=source.keys,
            features={**source.features, **extra},
            timestamp=source.timestamp,
            created=source.created,
            ttl=self._view.ttl,
        )
        table = entities if _AS_OF not in entities.column_names else entities.drop_columns([_AS_OF])
        table = table.append_column(_AS_OF, as_of)
        joined = point_in_time_join(source.con, table, _AS_OF, [join], expired=True)
        statuses = [FeatureStatus(status) for status in joined.statuses[self._view.name]]
        created: Sequence[datetime | None] = [None] * entities.num_rows
        if extra:
            created = joined.features[_CREATED].to_pylist()
        return {
            "statuses": statuses,
            "events": [int(ns) // 1000 for ns in joined.event_ns[self._view.name]],
            "created": created,
            "rows": self._encoded(entities, joined.features, joined.event_ns[self._view.name]),
        }

    def _encoded(self, entities: pa.Table, features: pa.Table, event_ns: Any) -> EncodedRows:
        columns = {name: entities[name] for name in entities.column_names if name != _AS_OF}
        columns |= {feature.name: features[feature.name] for feature in self._view.features}
        columns[EVENT] = pa.array(event_ns // 1000).cast(pa.timestamp("us", tz="UTC"))
        return row_encoder(self._project, self._view).encode(pa.table(columns).combine_chunks())

    def _compare(self, entities: pa.Table, expected: Mapping[str, Any], loaded: Loaded) -> list[Difference]:
        rows: EncodedRows = expected["rows"]
        pipeline = self._client.pipeline(transaction=False)
        redis_keys = rows.keys()
        for key in redis_keys:
            pipeline.hmget(key, self._fields)
        online = pipeline.execute()
        offline = stored_cells(rows)
        definition, source = self._materializer.digests(self._feast_view)
        keys = entities.select([key.name for key in self._view.join_keys]).to_pylist()
        differences = []
        for row, (here, there) in enumerate(zip(online, offline, strict=True)):
            status = expected["statuses"][row]
            found = None if here[0] is None else layout.decode_timestamp(here[0]) // 1000
            due = None if status is FeatureStatus.NOT_FOUND else expected["events"][row]
            # An expired row is hidden on both sides, and the join has hidden its values already.
            compared = found is not None and found == due and status is not FeatureStatus.OUTSIDE_MAX_AGE
            values = self._differing(here, there) if compared else {}
            if found == due and not values:
                continue
            late = _is_late(expected["created"][row], loaded, changed=source != loaded.source)
            differences.append(
                Difference(
                    self._view.name,
                    keys[row] if keys else {},
                    _cause(found, due, status, late=late, redefined=loaded.definition != definition),
                    None if found is None else views.as_datetime(found),
                    None if due is None else views.as_datetime(due),
                    values,
                )
            )
        return differences

    def _differing(
        self, online: Sequence[bytes | None], offline: Sequence[bytes]
    ) -> dict[str, tuple[Any, Any]]:
        """Features whose values differ; equal values may have different bytes (a map's order)."""
        values = {}
        for feature, here, there in zip(self._view.features, online[1:], offline[1:], strict=True):
            if (here or b"") != there:
                pair = layout.decode_column([here, there], feature.dtype)
                if pair[0] != pair[1]:
                    values[feature.name] = (pair[0], pair[1])
        return values


def _is_late(created: Any, loaded: Loaded, *, changed: bool) -> bool:
    """Whether the offline row came after what had been loaded; without created timestamps, whether it may."""
    if created is None or loaded.arrived_ns is None:
        return changed
    return views.as_us(created) * 1000 > loaded.arrived_ns


def _cause(
    online: int | None, offline: int | None, status: FeatureStatus, *, late: bool, redefined: bool
) -> Cause:
    """Why an online row (its event timestamp) is not the offline one."""
    if offline is None or (online is not None and online > offline):
        return Cause.FOREIGN_WRITE
    if status is FeatureStatus.OUTSIDE_MAX_AGE and online is None:
        return Cause.EXPIRED
    if redefined:
        return Cause.CHANGED_DEFINITION
    if late:
        return Cause.LATE_ROW
    return Cause.MISSING_ENTITY if online is None else Cause.FOREIGN_WRITE


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
