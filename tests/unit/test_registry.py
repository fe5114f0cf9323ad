"""The model registry: what is visible, what is refused, how aliases move."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import fsspec
import pytest

from core.errors import (
    Conflict,
    DamagedRegistry,
    DigestMismatch,
    InvalidManifest,
    InvalidRequest,
    ModelNotFound,
    RegistryUnavailable,
)
from core.manifest import DIGEST_FILE, MANIFEST_FILE, MODEL_FILE
from core.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelRegistry
from tests.support import packages


@pytest.fixture(params=["folder", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelRegistry]:
    """A registry on the local filesystem, and one on an object store's terms (whole objects, no rename)."""
    if request.param == "folder":
        yield ModelRegistry(str(tmp_path / "models"))
    else:
        root = f"memory://{uuid.uuid4().hex}"
        yield ModelRegistry(root)
        memory = fsspec.filesystem("memory")
        if memory.exists(root):
            memory.rm(root, recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(str(tmp_path))


def test_versions_count_up_and_keep_their_files(registry: ModelRegistry) -> None:
    first, second = packages.register(registry), packages.register(registry)
    assert (first.version, second.version) == (1, 2)
    assert registry.models() == ["churn"]
    assert registry.versions("churn") == [1, 2]
    assert registry.manifest("churn", 2) == second
    assert registry.artifact(second, MODEL_FILE) == b"pickled"
    assert registry.verify("churn", 1) == first


def test_an_empty_registry_has_nothing(registry: ModelRegistry) -> None:
    assert registry.models() == []
    assert registry.versions("churn") == []
    assert registry.aliases("churn") == {}
    assert registry.history("churn") == []


def test_a_registration_that_fails_half_way_is_never_visible(registry: ModelRegistry) -> None:
    def fail(version: int, digests: Any) -> Any:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        registry.register("churn", {MODEL_FILE: b"x"}, fail)
    assert registry.versions("churn") == []
    assert registry.models() == []
    with pytest.raises(ModelNotFound):
        registry.resolve("models:/churn/1")
    assert packages.register(registry).version == 2


def test_files_without_a_manifest_are_no_version(folder: ModelRegistry, tmp_path: Path) -> None:
    """The state a kill leaves between the last artifact and the manifest."""
    packages.register(folder)
    (tmp_path / "churn/1" / MANIFEST_FILE).unlink()
    assert folder.versions("churn") == []
    with pytest.raises(ModelNotFound, match="no model 'churn'"):
        folder.manifest("churn", 1)


def test_references_in_mlflows_words(registry: ModelRegistry) -> None:
    packages.register(registry)
    packages.register(registry)
    registry.set_alias("churn", CHAMPION, 1)
    registry.set_alias("churn", CHALLENGER, 2)
    for reference, version in {
        "models:/churn@champion": 1,
        "models:/churn@challenger": 2,
        "models:/churn/2": 2,
        "churn": 1,
        "churn@challenger": 2,
        "churn/1": 1,
    }.items():
        assert registry.resolve(reference) == ("churn", version)


@pytest.mark.parametrize(
    "reference", ["models:/churn/9", "models:/churn@previous", "models:/other", "churn/0"]
)
def test_a_reference_to_nothing_says_what_there_is(registry: ModelRegistry, reference: str) -> None:
    packages.register(registry)
    with pytest.raises(ModelNotFound) as caught:
        registry.resolve(reference)
    assert caught.value.hint is not None
    expected = "Models: churn." if "other" in reference else "Its "
    assert caught.value.hint.startswith(expected)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../churn", "/etc", "a\\b", "-x", ".hidden", "ü", "a\0b", "x" * 129, "a b"]
)
def test_a_name_cannot_leave_its_folder(registry: ModelRegistry, name: str) -> None:
    for call in (
        lambda: registry.versions(name),
        lambda: registry.aliases(name),
        lambda: registry.history(name),
        lambda: registry.manifest(name, 1),
        lambda: registry.resolve(f"models:/{name}/1"),
        lambda: registry.register(name, {}, lambda v, d: packages.manifest()),
        lambda: registry.promote(name, 1),
        lambda: registry.rollback(name),
    ):
        with pytest.raises(InvalidRequest):
            call()


@pytest.mark.parametrize(
    "reference", ["models:/churn/../1", "models:/churn/-1", "models:/churn/1/x", "a@b@c", ""]
)
def test_a_malformed_reference_is_refused(registry: ModelRegistry, reference: str) -> None:
    with pytest.raises(InvalidRequest):
        registry.resolve(reference)


def test_an_alias_name_is_checked_like_a_model_name(registry: ModelRegistry) -> None:
    packages.register(registry)
    with pytest.raises(InvalidRequest):
        registry.set_alias("churn", "../champion", 1)


def test_an_alias_points_to_registered_versions_only(registry: ModelRegistry) -> None:
    packages.register(registry)
    with pytest.raises(ModelNotFound, match="no version 2"):
        registry.set_alias("churn", CHAMPION, 2)
    with pytest.raises(ModelNotFound):
        registry.promote("churn", 7)
    assert registry.aliases("churn") == {}


def test_of_two_first_versions_at_once_one_is_champion_and_one_its_challenger(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 comes between the look of version 1, which found no champion, and what it writes."""
    for _ in range(2):
        packages.register(registry)
    create = registry.store.create

    def late(*args: Any) -> None:
        monkeypatch.setattr(registry.store, "create", create)
        registry.introduce("churn", 2)
        create(*args)

    monkeypatch.setattr(registry.store, "create", late)
    assert registry.introduce("churn", 1, why="trained").aliases == {CHAMPION: 2, CHALLENGER: 1}
    assert [change.action for change in registry.history("churn")] == ["introduce", "introduce"]


def test_promote_and_rollback_swap_champion_and_previous(registry: ModelRegistry) -> None:
    for _ in range(3):
        packages.register(registry)
    registry.set_alias("churn", CHAMPION, 1)
    registry.set_alias("churn", CHALLENGER, 2)
    assert registry.promote("churn").aliases == {CHAMPION: 2, PREVIOUS: 1}
    assert registry.promote("churn", 3).aliases == {CHAMPION: 3, PREVIOUS: 2}
    assert registry.rollback("churn").aliases == {CHAMPION: 2, PREVIOUS: 3}
    assert registry.rollback("churn").aliases == {CHAMPION: 3, PREVIOUS: 2}
    assert registry.aliases("churn") == {CHAMPION: 3, PREVIOUS: 2}
    assert registry.resolve("models:/churn@previous") == ("churn", 2)


def test_promoting_another_version_leaves_the_challenger(registry: ModelRegistry) -> None:
    for _ in range(3):
        packages.register(registry)
    registry.set_alias("churn", CHALLENGER, 2)
    assert registry.promote("churn", 3).aliases == {CHAMPION: 3, CHALLENGER: 2}


def test_a_change_that_makes_no_sense_is_a_conflict(registry: ModelRegistry) -> None:
    packages.register(registry)
    with pytest.raises(ModelNotFound, match="no challenger"):
        registry.promote("churn")
    registry.promote("churn", 1)
    with pytest.raises(Conflict, match="champion already"):
        registry.promote("churn", 1)
    with pytest.raises(Conflict, match="no previous"):
        registry.rollback("churn")
    assert len(registry.history("churn")) == 1


def test_history_says_who_when_and_why_and_is_never_rewritten(registry: ModelRegistry) -> None:
    packages.register(registry)
    packages.register(registry)
    registry.set_alias("churn", CHAMPION, 1, why="trained")
    before = registry.history("churn")
    registry.promote("churn", 2, why="better on May", who="ana")
    registry.rollback("churn", why="complaints", who="bo")
    history = registry.history("churn")
    assert history[:1] == before
    assert [(c.action, c.who, c.why) for c in history[1:]] == [
        ("promote", "ana", "better on May"),
        ("rollback", "bo", "complaints"),
    ]
    assert [c.aliases for c in history] == [
        {CHAMPION: 1},
        {CHAMPION: 2, PREVIOUS: 1},
        {CHAMPION: 1, PREVIOUS: 2},
    ]
    assert history[0].who
    assert [c.when for c in history] == sorted(c.when for c in history)
    assert all(c.when.tzinfo is UTC for c in history)
    assert [c.number for c in history] == list(range(1, len(history) + 1))


def test_history_is_in_the_order_of_its_numbers(registry: ModelRegistry) -> None:
    packages.register(registry)
    for number in range(12):
        registry.set_alias("churn", f"alias{number}", 1)
    assert [len(change.aliases) for change in registry.history("churn")] == list(range(1, 13))


def test_a_crash_between_history_and_aliases_heals_with_the_next_change(
    folder: ModelRegistry, tmp_path: Path
) -> None:
    packages.register(folder)
    packages.register(folder)
    folder.set_alias("churn", CHAMPION, 1)
    stale = (tmp_path / "churn/aliases.json").read_text()
    folder.promote("churn", 2)
    (tmp_path / "churn/aliases.json").write_text(stale)
    assert folder.rollback("churn").aliases == {CHAMPION: 1, PREVIOUS: 2}
    assert folder.aliases("churn") == {CHAMPION: 1, PREVIOUS: 2}


def test_aliases_are_replaced_whole(folder: ModelRegistry, tmp_path: Path) -> None:
    """A reader holding the old file keeps the old content: the new one is another file under its name."""
    packages.register(folder)
    folder.set_alias("churn", CHAMPION, 1)
    with (tmp_path / "churn/aliases.json").open() as held:
        folder.set_alias("churn", "with_a_longer_name", 1)
        assert json.load(held) == {CHAMPION: 1}
    assert not list((tmp_path / "churn").glob(".*"))


@pytest.mark.parametrize("file", [MODEL_FILE, "baseline.parquet", "model.onnx"])
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "swapped"])
def test_any_artifact_that_differs_from_its_digest_is_refused(
    folder: ModelRegistry, tmp_path: Path, file: str, damage: str
) -> None:
    manifest = packages.register(folder)
    packages.register(folder, {MODEL_FILE: b"other", "baseline.parquet": b"other", "model.onnx": b"other"})
    path = tmp_path / "churn/1" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        other = (tmp_path / "churn/2" / file).read_bytes()
        path.write_bytes({"altered": b"X" + content[1:], "truncated": content[:-1], "swapped": other}[damage])
    with pytest.raises(DigestMismatch, match=file) as caught:
        folder.artifact(manifest, file)
    assert caught.value.hint is not None
    with pytest.raises(DigestMismatch):
        folder.verify("churn", 1)
    assert folder.verify("churn", 2).version == 2


def test_a_package_moved_to_another_name_or_version_is_refused(folder: ModelRegistry, tmp_path: Path) -> None:
    packages.register(folder)
    (tmp_path / "churn/1").rename(tmp_path / "churn/5")
    with pytest.raises(DigestMismatch, match="churn/5 says it is churn/1"):
        folder.manifest("churn", 5)


def test_a_truncated_manifest_is_refused(folder: ModelRegistry, tmp_path: Path) -> None:
    packages.register(folder)
    path = tmp_path / "churn/1" / MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DigestMismatch, match=r"manifest.json of model churn version 1 differs"):
        folder.manifest("churn", 1)
    path.with_name(DIGEST_FILE).unlink()  # as an older release registered it
    with pytest.raises(InvalidManifest, match="not JSON"):
        folder.manifest("churn", 1)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"champion": "1"}', '{"champion": 7}'])
def test_aliases_json_is_only_a_copy(folder: ModelRegistry, tmp_path: Path, text: str) -> None:
    """Damaged, edited or replaced by an older one, it moves no traffic, and the next change mends it."""
    packages.register(folder)
    folder.set_alias("churn", CHAMPION, 1)
    (tmp_path / "churn/aliases.json").write_text(text)
    assert folder.resolve("churn") == ("churn", 1)
    folder.set_alias("churn", "pinned", 1)
    assert json.loads((tmp_path / "churn/aliases.json").read_text()) == {CHAMPION: 1, "pinned": 1}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda tree: tree.pop("who"), "lacks or should not have: who"),
        (lambda tree: tree["aliases"].update(champion="1"), "aliases.champion should be a int"),
        (lambda tree: tree["aliases"].update(champion=True), "aliases.champion should be a int"),
        (lambda tree: tree.update(number=2), "it is entry 2"),
        (lambda tree: tree.update(rollout={"id": "x"}), "rollout"),
    ],
)
def test_a_history_entry_of_another_shape_is_refused(
    folder: ModelRegistry, tmp_path: Path, edit: Callable[[Any], object], says: str
) -> None:
    packages.register(folder)
    folder.set_alias("churn", CHAMPION, 1)
    path = tmp_path / "churn/history/1.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(DamagedRegistry, match=says):
        folder.aliases("churn")


def test_the_latest_change_is_asked_for_cheaply(folder: ModelRegistry, tmp_path: Path) -> None:
    """What a server asks every second: while nothing follows, no entry is read again."""
    packages.register(folder)
    assert folder.latest("churn") is None
    first = folder.set_alias("churn", CHAMPION, 1)
    assert folder.latest("churn", first) is first
    second = folder.set_alias("churn", "pinned", 1)
    assert folder.latest("churn", first) == second == folder.latest("churn")


def test_a_damaged_history_entry_is_named(folder: ModelRegistry, tmp_path: Path) -> None:
    packages.register(folder)
    folder.set_alias("churn", CHAMPION, 1)
    (tmp_path / "churn/history/1.json").write_text('{"aliases": {"champion": 1}')
    with pytest.raises(DamagedRegistry, match=r"churn/history/1\.json"):
        folder.history("churn")
    with pytest.raises(DamagedRegistry):
        folder.promote("churn", 1)


def test_strange_folders_are_no_models(folder: ModelRegistry, tmp_path: Path) -> None:
    packages.register(folder)
    for name in ("lost+found", ".cache", "churn/notes", "churn/01x", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "README").write_text("not a model")
    assert folder.models() == ["churn"]
    assert folder.versions("churn") == [1]


def test_an_unknown_kind_of_url_says_what_to_install() -> None:
    with pytest.raises(InvalidRequest, match="nosuch") as caught:
        ModelRegistry("nosuch://models").models()
    assert "BANQUET_REGISTRY_URL" in (caught.value.hint or "")


def test_a_store_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = ModelRegistry(str(tmp_path / "file"))
    with pytest.raises(RegistryUnavailable) as caught:
        packages.register(registry)
    assert caught.value.retryable
