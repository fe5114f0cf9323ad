"""`feast apply` with its plan known first, and guards that refuse what would corrupt the online store.

Knows the definitions before and after; what a change costs in Redis and which models it breaks is
``materialization.impact``. Removes nothing from Redis: that is ``materialization.clean`` (ADR 0076).
"""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from core.errors import InvalidRepository
from core.layout import colliding_fields
from core.repository import Definitions, FeastRepository, Feature, View, parse_registry, stored_views
from core.types import Field, feature_name

_ACTIONS = {"CREATE": "added", "UPDATE": "changed", "DELETE": "removed"}
# What is said in more detail than by the name of Feast's property.
_SPELLED_OUT = frozenset({"features", "ttl", "entities", "entity_columns"})


@dataclass(frozen=True, slots=True)
class FeatureChange:
    """A feature that a view, or a service under ``view__feature``, gains, loses or changes."""

    action: str
    name: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One object that the plan adds, changes or removes.

    ``details`` says what changes in it, ``features`` what becomes of its features.
    """

    action: str
    kind: str
    name: str
    details: tuple[str, ...] = ()
    features: tuple[FeatureChange, ...] = ()


@dataclass(frozen=True, slots=True)
class ApplyPlan:
    """What an apply would do.

    ``before`` and ``after`` are the registry's protobuf as it is and as it would be; ``contents`` is Feast's
    own parsed repository.
    """

    changes: tuple[Change, ...]
    contents: Any
    before: Any
    after: Any


def plan(repository: FeastRepository) -> ApplyPlan:
    """Compare the definitions in the repository with the registry. Needs no Redis.

    Raises:
        InvalidRepository: a definition cannot be imported or is refused by Feast, or two features of one
            entity would share a hash field.
    """
    # Before the store, which would import Feast without its checks of what definitions pass to it.
    from feast.repo_operations import _get_repo_contents

    store = repository.store()
    with _inside(repository.path):
        try:
            contents = _get_repo_contents(repository.path, repository.project, store.config)
            _keep_versions(store.registry.proto(), contents, repository.project)
            registry_diff, _, _ = store.plan(contents)
            before = store.registry.proto()
            after = _registry_after(repository, before, contents, registry_diff)
        except (SystemExit, InvalidRepository):
            raise
        except Exception as exc:
            # The definitions are the user's code; whatever they raise is what they need to read.
            raise InvalidRepository(
                f"The definitions in {repository.path} cannot be applied: {type(exc).__name__}: {exc}",
                hint="Correct them; `feast plan` in that folder shows the traceback.",
            ) from exc
    refuse_colliding_features(stored_views(after, repository.config))
    old, new = parse_registry(before, repository.config), parse_registry(after, repository.config)
    changes = []
    for diff in registry_diff.feast_object_diffs:
        action = _ACTIONS.get(diff.transition_type.name)
        if action is None or diff.name.startswith("__dummy"):
            continue
        properties = [
            changed.property_name
            for changed in diff.feast_object_property_diffs
            if _plain(changed.val_existing) != _plain(changed.val_declared)
        ]
        if action == "changed" and not properties:
            continue
        details = _view_details(old.views.get(diff.name), new.views.get(diff.name))
        features = _feature_changes(_features(old, diff), _features(new, diff))
        if "features" in properties and not features:
            details.append("order of the features")
        details += [name for name in properties if name not in _SPELLED_OUT]
        if action == "changed" and not details and not features:
            details = properties
        kind = diff.feast_object_type.value
        changes.append(Change(action, kind, diff.name, tuple(details), tuple(features)))
    return ApplyPlan(tuple(changes), contents, before, after)


def apply(repository: FeastRepository, planned: ApplyPlan) -> None:
    """Carry out a plan. Rows of removed views and features stay in Redis until `banquet clean`.

    Raises:
        InvalidRepository: a source does not exist or Feast refuses an object.
    """
    from feast.repo_operations import extract_objects_for_apply_delete

    store = repository.store()
    online = store.config.online_store
    if hasattr(online, "full_scan_for_deletion"):
        # Feast would look for the keys of a removed view by a pattern that also fits those of any project
        # whose name ends like this one's, and remove the view's fields there too.
        online.full_scan_for_deletion = False
    with _inside(repository.path):
        try:
            provider = store._get_provider()
            for view in planned.contents.feature_views:
                if view.batch_source is not None:
                    provider.validate_data_source(store.config, view.batch_source)
            to_apply, to_delete, _, _ = extract_objects_for_apply_delete(
                repository.project, store.registry, planned.contents
            )
            store.apply(to_apply, objects_to_delete=to_delete, partial=False)
        except Exception as exc:
            raise InvalidRepository(
                f"Feast could not apply the definitions: {type(exc).__name__}: {exc}",
                hint="Check that the sources exist and the registry can be written.",
            ) from exc


def refuse_colliding_features(views: Sequence[View]) -> None:
    """Two features under the same join keys must not have the same hash field.

    Raises:
        InvalidRepository: two have; the message names them.
    """
    by_keys: dict[frozenset[str], list[tuple[str, str]]] = {}
    for view in views:
        pairs = by_keys.setdefault(frozenset(key.name for key in view.join_keys), [])
        pairs += [(view.stored_name, feature.name) for feature in view.features]
    for pairs in by_keys.values():
        for group in colliding_fields(pairs):
            names = " and ".join(f"{view}:{feature}" for view, feature in group)
            raise InvalidRepository(
                f"{names} have the same 32-bit hash field and would overwrite each other in Redis.",
                hint="Rename one of these features or its view; another entity for it would do as well.",
            )


def _keep_versions(before: Any, contents: Any, project: str) -> None:
    """Give every view the version number it has: Feast's apply resets it to 0 on views that do not change.

    With versions stored online, the rows that were loaded would then be looked for under another name.
    """
    views = [*contents.feature_views, *contents.stream_feature_views, *contents.on_demand_feature_views]
    declared = {view.name: view for view in views}
    for kind in (before.feature_views, before.stream_feature_views, before.on_demand_feature_views):
        for message in kind:
            view = declared.get(message.spec.name)
            number = message.meta.current_version_number
            if message.spec.project == project and view is not None and number:
                view.current_version_number = number


def _registry_after(repository: FeastRepository, before: Any, contents: Any, registry_diff: Any) -> Any:
    """The registry as it would be, with the versions that Feast will number and restore."""
    from feast.version_utils import parse_version

    after = contents.to_registry_proto()
    project = repository.project
    kinds = ("feature_views", "stream_feature_views", "on_demand_feature_views", "label_views")
    for kind in (*kinds, "feature_services", "entities", "data_sources"):
        for message in getattr(after, kind):
            spec = message if kind == "data_sources" else message.spec
            spec.project = project
    known: dict[str, int] = {}
    for message in (message for kind in kinds[:3] for message in getattr(before, kind)):
        if message.spec.project == project:
            known[message.spec.name] = message.meta.current_version_number
    declared = {message.spec.name for kind in kinds for message in getattr(after, kind)}
    history: dict[str, dict[int, Any]] = {}
    for record in before.feature_view_version_history.records:
        if record.project_id == project and record.feature_view_name in declared:
            after.feature_view_version_history.records.append(record)
            history.setdefault(record.feature_view_name, {})[record.version_number] = record
    new_versions = {
        diff.name
        for diff in registry_diff.feast_object_diffs
        if diff.transition_type.name == "UPDATE"
        and hasattr(diff.new_feast_object, "_schema_or_udf_changed")
        and diff.new_feast_object._schema_or_udf_changed(diff.current_feast_object)
    }
    for message in (message for kind in kinds[:3] for message in getattr(after, kind)):
        name, (latest, pinned) = message.spec.name, parse_version(message.spec.version or "latest")
        if not latest:
            if pinned in history.get(name, {}):
                stored = type(message).FromString(history[name][pinned].feature_view_proto)
                message.spec.CopyFrom(stored.spec)
            message.meta.current_version_number = pinned
        elif name in new_versions:
            message.meta.current_version_number = max(history.get(name, {0: None})) + 1
        elif name in known:
            message.meta.current_version_number = known[name]
    return after


def _view_details(old: View | None, new: View | None) -> list[str]:
    if old is None or new is None:
        return []
    details = []
    if old.ttl != new.ttl:
        details.append(f"ttl {span(old.ttl)} -> {span(new.ttl)}")
    if old.join_keys != new.join_keys:
        details.append(f"join keys {_keys(old.join_keys)} -> {_keys(new.join_keys)}")
    return details


def span(time: timedelta) -> str:
    """A ttl in words."""
    if not time:
        return "none"
    days, rest = divmod(time, timedelta(days=1))
    parts = [f"{days} d"] if days else []
    return " ".join([*parts, str(rest)] if rest or not days else parts)


def _keys(keys: Sequence[Field]) -> str:
    return ", ".join(f"{key.name} {key.dtype.name}" for key in keys) or "none"


def _features(definitions: Definitions, diff: Any) -> dict[str, Feature]:
    """The features of the object that a difference is about, by name."""
    kind, name = diff.feast_object_type.value, diff.name
    if kind == "feature service":
        service = definitions.services.get(name)
        return {
            feature_name(projection.name, feature): definitions.view(
                projection.view, projection.version
            ).feature(feature)
            for projection in (service.projections if service else ())
            for feature in projection.features
        }
    view = definitions.views.get(name) or definitions.on_demand.get(name)
    return {feature.name: feature for feature in view.features} if view and "view" in kind else {}


def _feature_changes(old: Mapping[str, Feature], new: Mapping[str, Feature]) -> list[FeatureChange]:
    changes = [FeatureChange("added", n, (new[n].dtype.name,)) for n in new if n not in old]
    changes += [FeatureChange("removed", n, (old[n].dtype.name,)) for n in old if n not in new]
    for name in (n for n in new if n in old):
        was, now, details = old[name], new[name], []
        if was.dtype is not now.dtype:
            details.append(f"{was.dtype.name} -> {now.dtype.name}")
        for tag in sorted({*was.tags, *now.tags}):
            before, after = was.tags.get(tag), now.tags.get(tag)
            if before != after:
                details.append(f"{tag} {before or 'none'} -> {after or 'none'}")
        if was.description != now.description:
            details.append("description")
        if details:
            changes.append(FeatureChange("changed", name, tuple(details)))
    return changes


def _plain(value: Any) -> Any:
    """A property without the times at which Feast registered it, which differ at every comparison."""
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.message import Message

    if isinstance(value, Message):
        value = MessageToDict(value)
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items() if name != "meta"}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    return value


@contextlib.contextmanager
def _inside(path: Path) -> Iterator[None]:
    """Feast imports definitions as top-level modules of the working directory and prints as it goes."""
    # Feast registers the source text of functions, and finds it through this cache.
    linecache.checkcache()
    added = str(path) not in sys.path
    if added:
        sys.path.insert(0, str(path))
    try:
        with contextlib.chdir(path), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # Feast warns that on-demand views are slow in offline retrieval, each time one is applied.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="feast.feature_store")
            yield
    finally:
        if added:
            sys.path.remove(str(path))
        # A second repository may call its modules the same; it must not be given these.
        for name, module in list(sys.modules.items()):
            if "." not in name and str(getattr(module, "__file__", None) or "").startswith(f"{path}/"):
                del sys.modules[name]
