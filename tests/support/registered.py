"""A repository whose registry is written by hand: quick to make, quick to change, without importing Feast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from core import feast_protos
from core.redis import RedisAddress
from core.repository import FeastRepository
from core.types import Dtype


@dataclass(frozen=True, slots=True)
class AView:
    """A view to register; ``join_keys`` and ``features`` by name and type."""

    name: str
    join_keys: Mapping[str, Dtype] = field(default_factory=lambda: {"user_id": Dtype.INT64})
    features: Sequence[str] = ("a", "b")
    ttl: timedelta = timedelta(0)
    version: int = 0
    disabled: bool = False


def repository(
    path: Path, address: RedisAddress, project: str, *, versioned: bool = False
) -> FeastRepository:
    """A repository with no definition registered yet."""
    path.mkdir(parents=True, exist_ok=True)
    kind = {"standalone": "redis", "sentinel": "redis_sentinel", "cluster": "redis_cluster"}[address.kind]
    hosts = ",".join([f"{host}:{port}" for host, port in address.hosts])
    (path / "feature_store.yaml").write_text(
        f"""
project: {project}
provider: local
registry: {{path: registry.db, enable_online_feature_view_versioning: {str(versioned).lower()}}}
online_store:
  {{type: redis, redis_type: {kind}, connection_string: "{hosts}", sentinel_master: {address.master}}}
offline_store: {{type: core.offline.BanquetOfflineStore}}
entity_key_serialization_version: 3
"""
    )
    return FeastRepository.open(path)


def register(
    repo: FeastRepository,
    views: Iterable[AView],
    *,
    history: Iterable[AView] = (),
    services: Iterable[str] = (),
) -> None:
    """Make these the registry's definitions; ``history`` are versions on record."""
    registry = registry_of(repo, views)
    for view in history:
        record = registry.feature_view_version_history.records.add()
        record.project_id, record.feature_view_name = repo.project, view.name
        record.version_number, record.feature_view_type = view.version, "feature_view"
        record.feature_view_proto = _message(repo.project, view).SerializeToString()
    for name in services:
        service = registry.feature_services.add()
        service.spec.name, service.spec.project = name, repo.project
    assert repo.registry_file is not None
    aside = repo.registry_file.with_suffix(".new")
    aside.write_bytes(registry.SerializeToString())
    aside.replace(repo.registry_file)


def registry_of(repo: FeastRepository, views: Iterable[AView]) -> Any:
    """A registry protobuf with these views."""
    registry = feast_protos.Registry(version_id="by hand")
    registry.feature_views.extend(_message(repo.project, view) for view in views)
    return registry


def _message(project: str, view: AView) -> Any:
    message = feast_protos.FeatureView()
    spec = message.spec
    spec.name, spec.project, spec.disabled = view.name, project, view.disabled
    spec.ttl.FromTimedelta(view.ttl)
    for name, dtype in (view.join_keys or {"__dummy_id": Dtype.STRING}).items():
        spec.entity_columns.add(name=name, value_type=int(dtype))
    for name in view.features:
        spec.features.add(name=name, value_type=int(Dtype.DOUBLE))
    message.meta.current_version_number = view.version
    return message
