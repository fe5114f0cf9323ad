"""`feast apply` with its plan known first, and guards that refuse what would corrupt the online store."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InvalidRepository
from core.layout import colliding_fields
from core.repository import FeastRepository

_ACTIONS = {"CREATE": "added", "UPDATE": "changed", "DELETE": "removed"}


@dataclass(frozen=True, slots=True)
class Change:
    """One object that the plan adds, changes or removes; ``details`` names the properties that change."""

    action: str
    kind: str
    name: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApplyPlan:
    """What an apply would do. ``contents`` is Feast's own parsed repository."""

    changes: tuple[Change, ...]
    contents: Any


def plan(repository: FeastRepository) -> ApplyPlan:
    """Compare the definitions in the repository with the registry.

    Raises:
        InvalidRepository: a definition cannot be imported or is refused by Feast, or two features of one
            entity would share a hash field.
    """
    from feast.repo_operations import _get_repo_contents

    store = repository.store()
    with _inside(repository.path):
        try:
            contents = _get_repo_contents(repository.path, repository.project, store.config)
            _refuse_colliding_features(contents)
            registry_diff, _, _ = store.plan(contents)
        except (SystemExit, InvalidRepository):
            raise
        except Exception as exc:
            # The definitions are the user's code; whatever they raise is what they need to read.
            raise InvalidRepository(
                f"The definitions in {repository.path} cannot be applied: {type(exc).__name__}: {exc}",
                hint="Correct them; `feast plan` in that folder shows the traceback.",
            ) from exc
    changes = []
    for diff in registry_diff.feast_object_diffs:
        action = _ACTIONS.get(diff.transition_type.name)
        details = tuple(
            changed.property_name
            for changed in diff.feast_object_property_diffs
            if _plain(changed.val_existing) != _plain(changed.val_declared)
        )
        if action and not diff.name.startswith("__dummy") and (details or action != "changed"):
            changes.append(Change(action, diff.feast_object_type.value, diff.name, details))
    return ApplyPlan(tuple(changes), contents)


def apply(repository: FeastRepository, planned: ApplyPlan) -> None:
    """Carry out a plan.

    Raises:
        InvalidRepository: a source does not exist or Feast refuses an object.
    """
    from feast.repo_operations import extract_objects_for_apply_delete

    store = repository.store()
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
                hint="Check that the sources exist and the online store answers.",
            ) from exc


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


def _refuse_colliding_features(contents: Any) -> None:
    by_entities: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for view in [*contents.feature_views, *contents.stream_feature_views]:
        pairs = by_entities.setdefault(tuple(sorted(view.entities)), [])
        pairs += [(view.name, feature.name) for feature in view.features]
    for pairs in by_entities.values():
        for group in colliding_fields(pairs):
            names = " and ".join(f"{view}:{feature}" for view, feature in group)
            raise InvalidRepository(
                f"{names} have the same 32-bit hash field and would overwrite each other in Redis.",
                hint="Rename one of them.",
            )
