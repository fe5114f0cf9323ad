"""A Feast repository: its feature_store.yaml, and the definitions its registry holds.

Reads the registry's protobuf directly when it is a local file, so that a server worker starts without
importing Feast, which alone takes longer than everything else together. Any other registry, and every
write, goes through Feast itself (``store()``). Knows no Redis bytes and no sources.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from core.errors import FeatureNotFound, FeatureServiceNotFound, InvalidRepository
from core.redis import RedisAddress
from core.types import Dtype, Field

if TYPE_CHECKING:
    from feast import FeatureStore

logger = logging.getLogger(__name__)

DUMMY_JOIN_KEY = "__dummy_id"
_UNSET = re.compile(r"\$\{[^}]*\}?")


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of a view, with the tags its expectations are read from."""

    name: str
    dtype: Dtype
    tags: Mapping[str, str]
    description: str = ""


@dataclass(frozen=True, slots=True)
class SourceColumns:
    """How a view's source names the columns of its rows.

    ``field_mapping`` goes from the source's names to the view's. ``created`` is None where the source has no
    created timestamp. ``push`` names the push source that also feeds the view, if one does.
    """

    timestamp: str
    created: str | None
    field_mapping: Mapping[str, str]
    push: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A feature view that is stored online.

    ``stored_name`` is the name its rows carry in the online store; ``ttl`` zero means rows never expire;
    ``join_keys`` is empty for a view without entities; ``version`` is Feast's number of its definition.
    """

    name: str
    stored_name: str
    join_keys: tuple[Field, ...]
    features: tuple[Feature, ...]
    ttl: timedelta
    description: str = ""
    version: int = 0
    source: SourceColumns | None = None

    def feature(self, name: str) -> Feature:
        """The feature of that name; FeatureNotFound names the view otherwise."""
        return _feature(self, name)


@dataclass(frozen=True, slots=True)
class Projection:
    """Some features of one view, under a name and join keys that a service may rename."""

    view: str
    name: str
    features: tuple[str, ...]
    join_key_map: Mapping[str, str]
    version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDemandView:
    """A view computed at request time from stored features and request-time inputs."""

    name: str
    mode: str
    singleton: bool
    features: tuple[Feature, ...]
    sources: tuple[Projection, ...]
    request_inputs: tuple[Feature, ...]
    function_name: str
    function_body: bytes
    function_source: str

    def feature(self, name: str) -> Feature:
        """The feature of that name; FeatureNotFound names the view otherwise."""
        return _feature(self, name)


@dataclass(frozen=True, slots=True)
class Service:
    """A feature service: projections in the order its author wrote them."""

    name: str
    projections: tuple[Projection, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Definitions:
    """What one project's registry holds, as one immutable snapshot."""

    project: str
    views: Mapping[str, View]
    on_demand: Mapping[str, OnDemandView]
    services: Mapping[str, Service]
    pinned: Mapping[tuple[str, int], View]

    def service(self, name: str) -> Service:
        """The service of that name.

        Raises:
            FeatureServiceNotFound: there is none; the message lists those there are.
        """
        try:
            return self.services[name]
        except KeyError:
            known = ", ".join(sorted(self.services)) or "none; run `banquet apply`"
            raise FeatureServiceNotFound(
                f"There is no feature service {name!r} in project {self.project!r}.",
                hint=f"Known services: {known}.",
            ) from None

    def view(self, name: str, version: int | None = None) -> View | OnDemandView:
        """The view of that name, or the pinned ``version`` of it.

        Raises:
            FeatureNotFound: there is none.
        """
        found: View | OnDemandView | None
        if version is not None:
            found = self.pinned.get((name, version))
        else:
            found = self.views.get(name) or self.on_demand.get(name)
        if found is None:
            wanted = name if version is None else f"{name}@v{version}"
            known = ", ".join(sorted({*self.views, *self.on_demand})) or "none; run `banquet apply`"
            raise FeatureNotFound(f"There is no feature view {wanted!r}.", hint=f"Known views: {known}.")
        return found


class FeastRepository:
    """One Feast repository on disk.

    ``open`` reads feature_store.yaml only; nothing is imported from Feast until ``store`` is called or the
    registry is not a local file.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config
        self.project: str = config["project"]

    @classmethod
    def open(cls, path: Path | str) -> FeastRepository:
        """Read ``<path>/feature_store.yaml``.

        Raises:
            InvalidRepository: the file is missing, is not YAML, lacks what Banquet needs or names an
                environment variable that is not set.
        """
        root = Path(path).expanduser().resolve()
        file = root / "feature_store.yaml"
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as exc:
            raise InvalidRepository(
                f"There is no feature_store.yaml in {root}.",
                hint="Name the Feast repository with `banquet --repo PATH`.",
            ) from exc
        try:
            # Feast expands variables the same way before it parses.
            config = yaml.safe_load(os.path.expandvars(text))
        except yaml.YAMLError as exc:
            raise InvalidRepository(f"{file} is not valid YAML: {exc}.") from exc
        if not isinstance(config, dict) or not isinstance(config.get("project"), str):
            raise InvalidRepository(f"{file} names no project.", hint="Add a line `project: <name>`.")
        for key, value in _texts(config):
            unset = _UNSET.search(value)
            if unset is not None:
                raise InvalidRepository(
                    f"{key} in {file} holds {unset[0]}, and no such environment variable is set.",
                    hint="Export it; Feast expands $NAME and ${NAME} only, and knows no defaults.",
                )
        version = config.get("entity_key_serialization_version", 3)
        if version != 3:
            from core.layout import require_key_version

            require_key_version(version)
        return cls(root, config)

    @cached_property
    def redis(self) -> RedisAddress:
        """The online store's address.

        Raises:
            InvalidRepository: the online store is not Redis, or its address cannot be read.
        """
        store = self.config.get("online_store")
        return RedisAddress.from_online_store(store if isinstance(store, dict) else {"type": store})

    @cached_property
    def registry_file(self) -> Path | None:
        """The registry when it is a local file, else None."""
        registry = self.config.get("registry")
        if registry is None:
            registry = "data/registry.db"
        if isinstance(registry, dict):
            if registry.get("registry_type", "file") != "file" or registry.get("registry_store_type"):
                return None
            registry = registry.get("path", "")
        if not isinstance(registry, str) or "://" in registry:
            return None
        return self.path / registry

    def store(self) -> FeatureStore:
        """Feast's own view of the repository. The first call imports Feast, which takes seconds.

        Raises:
            InvalidRepository: Feast refuses feature_store.yaml.
        """
        return self._store

    @cached_property
    def _store(self) -> FeatureStore:
        with _without_type_checks():
            from feast import FeatureStore
        from feast.errors import FeastError
        from pydantic import ValidationError

        for key in _unknown_keys(self.config):
            logger.warning("%s in %s means nothing to Feast", key, self.path / "feature_store.yaml")
        try:
            return FeatureStore(repo_path=str(self.path))
        except (FeastError, ValidationError) as exc:
            raise InvalidRepository(
                f"Feast cannot open {self.path / 'feature_store.yaml'}: {exc}",
                hint="Run `feast configuration` in that folder for the details.",
            ) from exc

    def fingerprint(self) -> object:
        """A value that changes when the definitions may have changed; cheap for a local registry.

        Raises InvalidRepository where any other registry cannot be read.
        """
        if self.registry_file is not None:
            try:
                stat = self.registry_file.stat()
            except FileNotFoundError:
                return None
            return stat.st_mtime_ns, stat.st_size, stat.st_ino
        # A database has no version of the whole; its rows have to be read to be compared.
        return hashlib.sha256(self._remote_registry().SerializeToString(deterministic=True)).digest()

    def definitions(self) -> Definitions:
        """Read the registry anew.

        Raises:
            InvalidRepository: there is no registry yet, or it cannot be read.
        """
        return parse_registry(self.registry(), self.config)

    def registry(self) -> Any:
        """The registry's protobuf, read anew; raises as ``definitions``."""
        if self.registry_file is None:
            return self._remote_registry()
        from google.protobuf.message import DecodeError

        from core.feast_protos import Registry

        registry = Registry()
        try:
            content = self.registry_file.read_bytes()
            if not content:
                # Feast empties the file before it writes it; no message would be a registry without a view.
                raise InvalidRepository(f"{self.registry_file} is empty.", hint="It may be being written.")
            registry.ParseFromString(content)
        except FileNotFoundError:
            raise InvalidRepository(
                f"There is no registry at {self.registry_file}.", hint="Run `banquet apply` first."
            ) from None
        except DecodeError as exc:
            raise InvalidRepository(
                f"{self.registry_file} is not a Feast registry.", hint="Run `banquet apply` to write it anew."
            ) from exc
        return registry

    def _remote_registry(self) -> Any:
        store = self.store()
        from feast.infra.registry.registry import Registry

        try:
            if isinstance(store.registry, Registry):  # one object, on S3 say: it gives what it read last
                store.refresh_registry()
            # Any other reads anew here, and raises where it cannot; a refresh of it would fail unnoticed.
            return store.registry.proto()
        except Exception as exc:  # each kind of registry has errors of its own
            raise InvalidRepository(
                f"The Feast registry of {self.path} cannot be read ({type(exc).__name__}).",
                hint="Check `registry` in feature_store.yaml, and that what it names answers.",
            ) from exc


@contextmanager
def _without_type_checks() -> Iterator[None]:
    """Let Feast's classes be defined as they are written; does nothing once Feast is imported.

    Feast has typeguard recompile every method of a definition to check what a user's code passes: half of
    the processor time of ``import feast`` (ADR 0115). Definitions from a registry were checked when they
    were applied.
    """
    import typeguard

    checks = typeguard.typechecked
    setattr(typeguard, "typechecked", lambda target: target)  # noqa: B010  a plain assignment is mistyped
    try:
        yield
    finally:
        setattr(typeguard, "typechecked", checks)  # noqa: B010


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a parsed feature_store.yaml with the dotted key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        for part, nested in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(nested, f"{key}.{part}".lstrip("."))


def _unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys that Feast takes without a word and that nothing reads: misspelt ones, most likely.

    Below the stores and the engine Feast refuses them itself.
    """
    from feast.repo_config import RegistryConfig, RepoConfig

    known = {field.alias or name for name, field in RepoConfig.model_fields.items()}
    unknown = sorted(config.keys() - known - RepoConfig.model_fields.keys())
    registry = config.get("registry")
    if isinstance(registry, dict) and registry.get("registry_type", "file") == "file":
        unknown += [f"registry.{key}" for key in sorted(registry.keys() - RegistryConfig.model_fields.keys())]
    return unknown


def parse_registry(registry: Any, config: Mapping[str, Any]) -> Definitions:
    """Turn a registry protobuf into definitions of the project that ``config`` names."""
    project = config["project"]
    options = config.get("registry")
    versioned = bool(isinstance(options, dict) and options.get("enable_online_feature_view_versioning"))
    views: dict[str, View] = {}
    for kind in (registry.feature_views, registry.stream_feature_views):
        for message in _of_project(kind, project):
            views[message.spec.name] = _view(message.spec, message.meta.current_version_number, versioned)
    on_demand: dict[str, OnDemandView] = {}
    for message in _of_project(registry.on_demand_feature_views, project):
        if message.spec.write_to_online_store:
            # Written at push or materialize time: online it is a view like any other.
            views[message.spec.name] = _view(message.spec, message.meta.current_version_number, False)
        else:
            on_demand[message.spec.name] = _on_demand_view(message.spec)
    services = {
        message.spec.name: Service(
            message.spec.name, tuple(_projection(projection) for projection in message.spec.features)
        )
        for message in _of_project(registry.feature_services, project)
    }
    pinned = _pinned_views(registry, project) if versioned else {}
    return Definitions(project=project, views=views, on_demand=on_demand, services=services, pinned=pinned)


def stored_views(registry: Any, config: Mapping[str, Any]) -> list[View]:
    """Every view that may have rows online, whether or not it is served.

    Beside those of ``parse_registry`` they are disabled views, label views (whose rows never expire here) and
    all versions on record.
    """
    from core import feast_protos

    project, options = config["project"], config.get("registry")
    versioned = bool(isinstance(options, dict) and options.get("enable_online_feature_view_versioning"))
    kinds = {
        "feature_view": (registry.feature_views, feast_protos.FeatureView),
        "stream_feature_view": (registry.stream_feature_views, feast_protos.StreamFeatureView),
        "on_demand_feature_view": (registry.on_demand_feature_views, feast_protos.OnDemandFeatureView),
        "label_view": (registry.label_views, feast_protos.LabelView),
    }
    found = []
    for messages, _ in kinds.values():
        for message in (m for m in messages if m.spec.project == project):
            number = getattr(message.meta, "current_version_number", 0)
            found += [_view(message.spec, number, versioned), _view(message.spec, number, False)]
    for record in registry.feature_view_version_history.records if versioned else ():
        if record.project_id == project and record.feature_view_type in kinds:
            _, kind = kinds[record.feature_view_type]
            found.append(_view(kind.FromString(record.feature_view_proto).spec, record.version_number, True))
    labels = {message.spec.name for message in registry.label_views if message.spec.project == project}
    return [replace(view, ttl=timedelta(0)) if view.name in labels else view for view in found]


def _of_project(messages: Iterable[Any], project: str) -> list[Any]:
    return [m for m in messages if m.spec.project == project and not getattr(m.spec, "disabled", False)]


def _features(columns: Iterable[Any]) -> tuple[Feature, ...]:
    return tuple(Feature(c.name, Dtype(c.value_type), dict(c.tags), c.description) for c in columns)


def _view(spec: Any, version: int, versioned: bool) -> View:
    return View(
        name=spec.name,
        stored_name=f"{spec.name}_v{version}" if versioned and version > 0 else spec.name,
        join_keys=tuple(
            Field(column.name, Dtype(column.value_type))
            for column in spec.entity_columns
            if column.name != DUMMY_JOIN_KEY
        ),
        features=_features(spec.features),
        ttl=spec.ttl.ToTimedelta() if hasattr(spec, "ttl") else timedelta(0),
        description=spec.description,
        version=version,
        source=_source_columns(spec) if hasattr(spec, "batch_source") else None,
    )


def _source_columns(spec: Any) -> SourceColumns:
    batch, stream = spec.batch_source, spec.stream_source
    return SourceColumns(
        timestamp=batch.timestamp_field,
        created=batch.created_timestamp_column or None,
        field_mapping=dict(batch.field_mapping),
        push=stream.name if stream.type == stream.PUSH_SOURCE else None,
    )


def _pinned_views(registry: Any, project: str) -> dict[tuple[str, int], View]:
    from core.feast_protos import FeatureView

    pinned = {}
    for record in registry.feature_view_version_history.records:
        if record.project_id == project and record.feature_view_type == "feature_view":
            message = FeatureView.FromString(record.feature_view_proto)
            key = (record.feature_view_name, record.version_number)
            pinned[key] = _view(message.spec, record.version_number, True)
    return pinned


def _projection(message: Any) -> Projection:
    # Feast's own rule: two versions of one view in a service have features of different names.
    pinned = f"@v{message.version_tag}" if message.HasField("version_tag") else ""
    return Projection(
        view=message.feature_view_name,
        name=(message.feature_view_name_alias or message.feature_view_name) + pinned,
        features=tuple(column.name for column in message.feature_columns),
        join_key_map=dict(message.join_key_map),
        version=message.version_tag if message.HasField("version_tag") else None,
    )


def _on_demand_view(spec: Any) -> OnDemandView:
    sources: list[Projection] = []
    inputs: list[Feature] = []
    for source in spec.sources.values():
        kind = source.WhichOneof("source")
        if kind == "request_data_source":
            inputs.extend(_features(source.request_data_source.request_data_options.schema))
        elif kind == "feature_view_projection":
            sources.append(_projection(source.feature_view_projection))
        else:
            view = source.feature_view.spec
            sources.append(Projection(view.name, view.name, tuple(f.name for f in view.features), {}))
    function = spec.feature_transformation.user_defined_function
    if not function.body_text and not function.body:
        function = spec.user_defined_function
    return OnDemandView(
        name=spec.name,
        mode=spec.mode or "pandas",
        singleton=spec.singleton,
        features=_features(spec.features),
        # Protobuf maps have no order of their own.
        sources=tuple(sorted(sources, key=lambda projection: projection.name)),
        request_inputs=tuple(sorted(inputs, key=lambda feature: feature.name)),
        function_name=function.name,
        function_body=function.body,
        function_source=function.body_text,
    )


def _feature(view: View | OnDemandView, name: str) -> Feature:
    for feature in view.features:
        if feature.name == name:
            return feature
    known = ", ".join(feature.name for feature in view.features)
    raise FeatureNotFound(
        f"Feature view {view.name!r} has no feature {name!r}.", hint=f"Its features: {known}."
    )
