"""What a planned change of definitions costs: memory in Redis, orphans there, models that would not load.

Everything here is an estimate from a bounded look, and says so; whatever does not answer is unknown, not an
error. Knows the plan, the sources and Redis; changes nothing.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from core import layout
from core.errors import BanquetError, CheckFailed, SchemaMismatch
from core.manifest import ServiceSchema
from core.online import FeaturePlan
from core.registry import ModelRegistry
from core.repository import Definitions, FeastRepository, View, parse_registry
from core.source import connect, identifier
from materialization.apply import ApplyPlan, Change
from materialization.claims import Claims, view_of
from materialization.clean import answers, servers
from materialization.load import row_encoder
from materialization.memory import SAMPLE_ROWS, estimate
from materialization.views import as_us, needs_feast, open_source, settles_ties_by_created
from materialization.window import EVENT_NS, ViewSource, Window

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SAMPLED_KEYS = 20_000
SAMPLE_SECONDS = 2.0
_SCAN_KEYS = 1_000
# More keys than this are counted approximately.
_COUNTED_ROWS = 2_000_000


@dataclass(frozen=True, slots=True)
class Growth:
    """What an added view, or ``features`` added to a view, will take in Redis once materialized.

    ``rows`` and ``bytes`` are None where ``unknown`` says why.
    """

    view: str
    features: tuple[str, ...]
    rows: int | None = None
    bytes: int | None = None
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class Orphans:
    """What the change leaves in Redis that nothing claims any more, until `banquet clean` removes it.

    ``rows`` counts rows by stored view, ``fields`` all hash fields, those of the rows included, ``keys`` the
    hashes that hold nothing else. Extrapolated if fewer keys were ``looked_at`` than there are in ``total``.
    """

    rows: dict[str, int]
    fields: int
    keys: int
    looked_at: int
    total: int

    @property
    def exact(self) -> bool:
        """Whether every key was looked at."""
        return self.looked_at >= self.total


@dataclass(frozen=True, slots=True)
class BrokenModel:
    """A registered model that loads with the definitions as they are and would not after the change."""

    name: str
    version: int
    aliases: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        called = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.name} version {self.version}{called}: {'; '.join(self.problems)}"


@dataclass(frozen=True, slots=True)
class Impact:
    """What the change costs in Redis. ``orphans`` is None if there can be none, or ``unknown`` says why."""

    growth: tuple[Growth, ...] = ()
    orphans: Orphans | None = None
    unknown: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        orphans = self.orphans and {**asdict(self.orphans), "exact": self.orphans.exact}
        return {
            "growth": [asdict(entry) for entry in self.growth],
            "orphans": orphans,
            "unknown": self.unknown,
        }


def impact(repository: FeastRepository, planned: ApplyPlan) -> Impact:
    """What the plan will add to Redis and orphan there. Never fails for want of a source or of Redis."""
    gains = [change for change in planned.changes if _gained(change)]
    loses = _may_orphan(planned.changes)
    if not gains and not loses:
        return Impact()
    try:
        with _quickly(repository) as client:
            growth = tuple(_growth(repository, planned, change, client) for change in gains)
            return Impact(growth, _orphans(repository, planned, client) if loses else None)
    except BanquetError as exc:
        why = str(exc.message)
        growth = tuple(_growth(repository, planned, change, None) for change in gains)
        return Impact(
            tuple(replace(g, unknown=g.unknown or why) for g in growth), None, why if loses else None
        )


@contextmanager
def _quickly(repository: FeastRepository) -> Iterator[Any]:
    """A client that gives up soon, and has been answered."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    retry = Retry(NoBackoff(), 0)
    with repository.redis.session(socket_connect_timeout=1.0, socket_timeout=5.0, retry=retry) as client:
        client.ping()
        yield client


# Memory


def _gained(change: Change) -> tuple[str, ...]:
    """The features that a change of a stored view adds to its rows."""
    if change.kind not in ("feature view", "stream feature view"):
        return ()
    return tuple(f.name for f in change.features if f.action == "added")


def _growth(repository: FeastRepository, planned: ApplyPlan, change: Change, client: Any) -> Growth:
    old = parse_registry(planned.before, repository.config).views.get(change.name)
    new = parse_registry(planned.after, repository.config).views.get(change.name)
    # A new version of a view has rows of its own.
    beside = old is not None and new is not None and old.stored_name == new.stored_name
    gained = Growth(change.name, _gained(change) if beside else ())
    config = repository.store().config
    contents = [*planned.contents.feature_views, *planned.contents.stream_feature_views]
    view = next(view for view in contents if view.name == change.name)
    reason = needs_feast(view)
    if reason is None and not getattr(view.batch_source, "path", None):
        reason = "its source is no file"
    if reason is not None:
        return replace(gained, unknown=f"Rows are not counted: {reason}.")
    end = datetime.now(UTC)
    start_us = as_us(end - view.ttl) if view.ttl else None
    window = Window(start_us, as_us(end))
    con = connect()
    try:
        source = open_source(con, view, config, repository.store()._get_provider().offline_store, window)
        rows = _count_keys(con, source, window)
        gained = replace(gained, rows=rows)
        if client is None:
            return gained
        sample = _sample(con, source, window)
        dated = settles_ties_by_created(view)
        size = _bytes(client, repository.project, source.view, gained, sample, dated=dated)
        return replace(gained, bytes=size)
    except BanquetError as exc:
        return replace(gained, unknown=str(exc.message))
    finally:
        con.close()


def _count_keys(con: DuckDBPyConnection, source: ViewSource, window: Window) -> int:
    """How many entities have a row in the window."""
    rows = source.count(window)
    keys = ", ".join(identifier(name) for name in source.keys)
    if not keys or not rows:
        return min(rows, 1)
    counted = f"count(DISTINCT ({keys}))" if rows <= _COUNTED_ROWS else f"approx_count_distinct(({keys}))"
    ((found,),) = con.execute(f"SELECT {counted} FROM ({source.rows_sql(window, _named(source))})").fetchall()
    return int(found)


def _sample(con: DuckDBPyConnection, source: ViewSource, window: Window) -> pa.Table:
    """Some rows of the window as a load would stage them."""
    position = [identifier(name) for name in (*source.scan.position, EVENT_NS)]
    rows = source.rows_sql(window, _named(source))
    sql = f"SELECT * EXCLUDE ({', '.join(position)}) FROM ({rows}) USING SAMPLE reservoir({SAMPLE_ROWS} ROWS)"
    return con.sql(sql).to_arrow_table()


def _named(source: ViewSource) -> str:
    columns = [identifier(column) for column in source.keys.values()]
    return " AND ".join(f"{column} IS NOT NULL" for column in columns) or "true"


def _bytes(client: Any, project: str, view: View, gained: Growth, sample: pa.Table, *, dated: bool) -> int:
    if not gained.rows or not len(sample):
        return 0
    if not gained.features:
        encoded = row_encoder(project, view).encode(sample)
        return estimate(
            client, gained.rows, encoded, view.stored_name, dated_in=project if dated else None
        ).bytes
    # New fields in rows that are there: what rows with them take more than rows without. Under a name that no
    # view has, so that no row is found and taken for one that costs nothing.
    new = replace(
        view, stored_name="\0", features=tuple(f for f in view.features if f.name in gained.features)
    )
    bare = replace(new, features=())
    with_features, without = (
        estimate(client, gained.rows, row_encoder(project, each).encode(sample), each.stored_name).bytes
        for each in (new, bare)
    )
    return with_features - without


# Orphans


def _may_orphan(changes: Sequence[Change]) -> bool:
    return any(
        change.kind.endswith("view")
        and (
            change.action == "removed"
            or any(feature.action == "removed" for feature in change.features)
            or any(detail.startswith("join keys ") for detail in change.details)
        )
        for change in changes
    )


def _orphans(repository: FeastRepository, planned: ApplyPlan, client: Any) -> Orphans:
    """Look at some keys as the definitions are and as they would be."""
    before = Claims.of_registry(planned.before, repository.config)
    after = Claims.of_registry(planned.after, repository.config)
    rows: Counter[str] = Counter()
    fields = keys = looked_at = total = 0
    nodes = list(servers(client))
    for node in nodes:
        total += int(node.dbsize())
        for own, names in _some_hashes(node, SAMPLED_KEYS // len(nodes), SAMPLE_SECONDS / len(nodes)):
            looked_at += 1
            if own is None or own.project != after.project or not names:
                continue
            was = before.verdict(own.join_keys, sorted(names))
            will = after.verdict(own.join_keys, sorted(names))
            fresh = set(will.orphans) - set(was.orphans)
            rows.update(view_of(name) for name in will.orphan_rows if name in fresh)
            fields += len(fresh)
            keys += bool(fresh) and set(will.orphans) == will.fields
    scale = max(1.0, total / looked_at) if looked_at else 1.0
    return Orphans(
        {name: round(count * scale) for name, count in rows.items()},
        round(fields * scale),
        round(keys * scale),
        looked_at,
        total,
    )


def _some_hashes(
    node: Any, limit: int, seconds: float
) -> Iterator[tuple[layout.StoredKey | None, list[bytes]]]:
    """Keys in the order of a scan, which is that of their hash values and so as good as random."""
    cursor, seen, deadline = 0, 0, time.monotonic() + seconds
    while True:
        cursor, found = node.scan(cursor, count=_SCAN_KEYS)
        entities = {key: own for key in found if (own := layout.stored_key(key)) is not None}
        fields = dict(zip(entities, answers(node, [("HKEYS", key) for key in entities]), strict=True))
        yield from ((entities.get(key), fields.get(key) or []) for key in found)
        seen += len(found)
        if not cursor or seen >= limit or time.monotonic() > deadline:
            return


# Models


def broken_models(
    repository: FeastRepository, planned: ApplyPlan, registry: ModelRegistry
) -> tuple[BrokenModel, ...]:
    """The registered models that the plan would keep from being loaded.

    Raises:
        RegistryUnavailable: the model registry does not answer.
    """
    if not planned.changes:
        return ()
    before = parse_registry(planned.before, repository.config)
    after = parse_registry(planned.after, repository.config)
    broken = []
    for name in registry.models():
        aliases = registry.aliases(name)
        for version in registry.versions(name):
            try:
                trained = registry.manifest(name, version).schema
            except CheckFailed:
                continue  # damaged: it does not load today either
            if not _differences(trained, before):
                problems = _differences(trained, after)
                if problems:
                    called = tuple(sorted(alias for alias, v in aliases.items() if v == version))
                    broken.append(BrokenModel(name, version, called, tuple(problems)))
    return tuple(broken)


def refuse_broken_models(broken: Sequence[BrokenModel]) -> None:
    """Raise SchemaMismatch if there are any; names them all."""
    if broken:
        raise SchemaMismatch(
            f"The change would break registered models: {'. '.join(map(str, broken))}.",
            hint="Serve the change under a new feature service and train on that, or pass --break-models.",
            models=[asdict(model) for model in broken],
        )


def _differences(trained: ServiceSchema, definitions: Definitions) -> list[str]:
    try:
        plan = FeaturePlan.for_service(definitions, trained.service)
    except BanquetError as exc:
        return [exc.message.rstrip(".")]
    return trained.differences(plan.schema(trained.service))
