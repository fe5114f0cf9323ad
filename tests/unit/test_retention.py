"""Pruning: what it removes, what it never does, and what a reader sees of it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core import traffic
from core.errors import Conflict, InvalidRequest, ModelNotFound
from core.manifest import MANIFEST_FILE, MODEL_FILE
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.retention import prune
from core.traffic import Rollout, Step
from core.trust import Trust
from tests.support import packages

NOW = datetime.now(tz=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    """Five versions, 50, 40, 30, 20 and 10 days old; signed."""
    registry = ModelRegistry(str(tmp_path), Trust.of("k" * 32))
    for age in (50, 40, 30, 20, 10):
        packages.register(registry, created=NOW - age * DAY)
    return registry


def test_only_what_is_beyond_every_limit_goes(registry: ModelRegistry) -> None:
    assert prune(registry, "churn", keep=4, older_than=45 * DAY, dry_run=True).versions == (1,)
    assert prune(registry, "churn", keep=1, older_than=35 * DAY, dry_run=True).versions == (1, 2)
    assert prune(registry, "churn", older_than=5 * DAY, dry_run=True).versions == (1, 2, 3, 4, 5)
    assert registry.versions("churn") == [1, 2, 3, 4, 5]
    done = prune(registry, "churn", keep=2)
    assert done.versions == (1, 2, 3)
    assert done.kept == {4: "among the newest 2", 5: "among the newest 2"}
    assert registry.versions("churn") == [4, 5]


def test_a_version_in_use_stays(registry: ModelRegistry) -> None:
    registry.set_alias("churn", CHAMPION, 1)
    registry.set_alias("churn", "audited", 2)
    rollout = Rollout(id="r", kind="canary", version=3, champion=1, steps=(Step(10),), began=(NOW,))
    registry.change("churn", "canary", lambda now: replace(now, rollout=rollout))
    done = prune(registry, "churn", older_than=timedelta(0))
    assert done.versions == (4, 5)
    assert done.kept == {1: "champion", 2: "audited", 3: "in a rollout"}
    assert registry.versions("churn") == [1, 2, 3]


def test_a_number_is_never_used_again(registry: ModelRegistry, tmp_path: Path) -> None:
    prune(registry, "churn", older_than=timedelta(0))
    assert registry.versions("churn") == []
    assert sorted(path.name for path in (tmp_path / "churn/5").iterdir()) == [".claim"]
    assert packages.register(registry).version == 6


def test_the_history_says_what_was_removed(registry: ModelRegistry) -> None:
    prune(registry, "churn", keep=3, why="disk")
    last = registry.latest("churn")
    assert last is not None
    assert (last.action, last.why) == ("prune", "1, 2: disk")


def test_a_version_that_comes_into_use_meanwhile_stays(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process promotes between the look and the removal."""
    change = registry.change

    def late(*args: object, **options: object) -> object:
        monkeypatch.setattr(registry, "change", change)
        registry.store.replace(kept, "churn", "1", MANIFEST_FILE)  # as the other had seen it
        registry.set_alias("churn", CHAMPION, 1)
        registry.store.remove("churn", "1", MANIFEST_FILE)
        return change(*args, **options)  # type: ignore[arg-type]

    kept = registry.store.read("churn", "1", MANIFEST_FILE) or b""
    monkeypatch.setattr(registry, "change", late)
    with pytest.raises(Conflict, match="Version 1 of model 'churn' came into use"):
        prune(registry, "churn", keep=3)
    assert registry.versions("churn") == [1, 2, 3, 4, 5]
    assert registry.verify("churn", 1).version == 1


def test_an_alias_cannot_be_set_to_what_is_being_removed(registry: ModelRegistry) -> None:
    """The other order: the removal is first, and the promotion that had seen the version finds it gone."""
    seen = []

    def to_the_first(now: traffic.Traffic) -> traffic.Traffic:
        if not seen:
            seen.append(now)
            prune(registry, "churn", keep=3)
        return traffic.Traffic({**now.aliases, CHALLENGER: 1})

    with pytest.raises(ModelNotFound, match="no version 1"):
        registry.change("churn", "set challenger", to_the_first)
    assert registry.aliases("churn") == {}


def test_what_interrupted_steps_left_goes_after_a_day(registry: ModelRegistry, tmp_path: Path) -> None:
    for version in (2, 4):
        (tmp_path / "churn" / str(version) / MANIFEST_FILE).unlink()
    yesterday = time.time() - 90_000
    os.utime(tmp_path / "churn/2/.claim", (yesterday, yesterday))
    done = prune(registry, "churn", keep=5)
    assert (done.versions, done.leftovers) == ((), (2,))
    assert [path.name for path in (tmp_path / "churn/2").iterdir()] == [".claim"]
    assert (tmp_path / "churn/4" / MODEL_FILE).exists()
    assert registry.latest("churn") is None


def test_nothing_outside_a_version_is_removed_through_a_link(
    registry: ModelRegistry, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "precious").write_text("kept")
    (tmp_path / "churn/1/folder").symlink_to(outside)
    (tmp_path / "churn/1/file").symlink_to(outside / "precious")
    assert prune(registry, "churn", keep=4).versions == (1,)
    assert (outside / "precious").read_text() == "kept"


def test_a_damaged_version_is_not_touched(registry: ModelRegistry, tmp_path: Path) -> None:
    (tmp_path / "churn/1" / MANIFEST_FILE).write_text("{")
    done = prune(registry, "churn", keep=1)
    assert done.kept[1] == "not sound (signature_mismatch)"
    assert (tmp_path / "churn/1" / MODEL_FILE).exists()


def test_a_limit_and_a_model_are_needed(registry: ModelRegistry) -> None:
    with pytest.raises(InvalidRequest, match="needs a limit"):
        prune(registry, "churn")
    with pytest.raises(ModelNotFound, match="no model 'other'"):
        prune(registry, "other", keep=1)
