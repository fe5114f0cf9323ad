"""Signatures and pins: each attack on a registry by someone who can write to it and has no key."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.errors import (
    DamagedRegistry,
    DigestMismatch,
    HistoryRewritten,
    InvalidRequest,
    InvalidSetting,
    NotPinned,
    SignatureMismatch,
    Unsigned,
)
from core.manifest import DIGEST_FILE, MANIFEST_FILE, MODEL_FILE, SIGNATURE_FILE, CompiledForm
from core.model import LoadedModel
from core.registry import CHAMPION, ModelRegistry
from core.settings import load_settings
from core.trust import Trust
from tests.support import packages

KEY, OTHER = "k" * 32, "o" * 32


def opened(path: Path, keys: str = KEY) -> ModelRegistry:
    return ModelRegistry(str(path), Trust.of(keys))


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return opened(tmp_path / "models")


@pytest.fixture
def churn(tmp_path: Path) -> Path:
    return tmp_path / "models/churn"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


# Packages


def test_what_was_registered_with_the_key_is_read_with_it(registry: ModelRegistry) -> None:
    packages.register_linear(registry)
    registry.set_alias("churn", CHAMPION, 1)
    registry.promote("churn", packages.register_linear(registry).version)
    assert registry.verify("churn", 2).version == 2
    assert LoadedModel.load(registry, "churn", 1, packages.SCHEMA).manifest.version == 1
    assert [change.aliases[CHAMPION] for change in registry.history("churn")] == [1, 2]


def test_a_pickle_swapped_with_its_digest_runs_without_a_key_and_not_with_one(
    tmp_path: Path, registry: ModelRegistry, churn: Path
) -> None:
    """Why digests are not enough: who can write the file can write its digest."""
    packages.register_linear(registry, compiled=CompiledForm("sklearn", MODEL_FILE, 0.0, True, 0))
    fired = tmp_path / "fired"
    bomb = pickle.dumps(packages.Bomb(fired))
    (churn / "1" / MODEL_FILE).write_bytes(bomb)
    artifacts = json.loads((churn / "1" / MANIFEST_FILE).read_text())["artifacts"]
    manifest = churn / "1" / MANIFEST_FILE
    edit(manifest, artifacts=artifacts | {MODEL_FILE: hashlib.sha256(bomb).hexdigest()})
    with pytest.raises(SignatureMismatch):
        LoadedModel.load(registry, "churn", 1, packages.SCHEMA)
    with pytest.raises(DigestMismatch, match=MANIFEST_FILE):
        LoadedModel.load(ModelRegistry(registry.url), "churn", 1, packages.SCHEMA)
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (churn / "1" / DIGEST_FILE).write_text(f"{digest}  {MANIFEST_FILE}\n")
    assert not fired.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 — None predicts nothing
        LoadedModel.load(ModelRegistry(registry.url), "churn", 1, packages.SCHEMA)
    assert fired.exists()


@pytest.mark.parametrize("damage", ["edited", "spaced", "signature of another", "emptied", "nonsense"])
def test_a_manifest_that_is_not_the_signed_one_is_refused(
    registry: ModelRegistry, churn: Path, damage: str
) -> None:
    packages.register(registry)
    packages.register(registry)
    manifest, signature = churn / "1" / MANIFEST_FILE, churn / "1" / SIGNATURE_FILE
    if damage == "edited":
        edit(manifest, threshold=None, description="better")
    elif damage == "spaced":
        manifest.write_bytes(manifest.read_bytes() + b"\n")
    elif damage == "signature of another":
        shutil.copy(churn / "2" / SIGNATURE_FILE, signature)
    else:
        signature.write_bytes(b"" if damage == "emptied" else b"\xff\xe9 nonsense")
    with pytest.raises(SignatureMismatch, match="churn/1") as caught:
        registry.manifest("churn", 1)
    assert caught.value.code == "signature_mismatch"
    assert registry.manifest("churn", 2).version == 2


def test_without_a_signature_nothing_loads_where_a_key_is_set(registry: ModelRegistry, churn: Path) -> None:
    packages.register(ModelRegistry(registry.url))
    with pytest.raises(Unsigned, match="churn/1 is not signed") as caught:
        registry.manifest("churn", 1)
    assert "banquet models sign churn" in (caught.value.hint or "")


def test_a_signed_package_copied_over_another_is_refused(registry: ModelRegistry, churn: Path) -> None:
    packages.register(registry)
    packages.register(registry)
    shutil.copytree(churn / "1", churn / "2", dirs_exist_ok=True)
    with pytest.raises(DigestMismatch, match="churn/2 says it is churn/1"):
        registry.manifest("churn", 2)


@pytest.mark.parametrize("what", ["package", "history"])
def test_a_copy_from_another_registry_or_model_is_refused(
    tmp_path: Path, registry: ModelRegistry, churn: Path, what: str
) -> None:
    elsewhere = opened(tmp_path / "staging", OTHER)
    for each in (registry, elsewhere):
        packages.register(each)
        each.set_alias("churn", CHAMPION, 1)
    folder = "1" if what == "package" else "history"
    shutil.copytree(tmp_path / "staging/churn" / folder, churn / folder, dirs_exist_ok=True)
    with pytest.raises(SignatureMismatch):
        _ = registry.manifest("churn", 1) if what == "package" else registry.latest("churn")
    # The same key and another model: its name is signed with the entry.
    packages.register(registry, name="loyalty")
    registry.set_alias("loyalty", CHAMPION, 1)
    shutil.copytree(tmp_path / "models/loyalty/history", churn / "history", dirs_exist_ok=True)
    with pytest.raises(SignatureMismatch, match=r"churn/history/1\.json"):
        registry.latest("churn")


# History


@pytest.fixture
def promoted(registry: ModelRegistry) -> ModelRegistry:
    """Version 1, 2, then 3 was champion; ``history/3.json`` says so."""
    for version in (1, 2, 3):
        packages.register(registry)
        registry.promote("churn", version)
    return registry


def test_an_edited_entry_is_refused(promoted: ModelRegistry, churn: Path) -> None:
    edit(churn / "history/3.json", aliases={"champion": 1, "previous": 2})
    with pytest.raises(SignatureMismatch, match=r"churn/history/3\.json"):
        promoted.resolve("churn")
    with pytest.raises(SignatureMismatch):
        promoted.rollback("churn")


def test_an_entry_without_a_signature_is_refused(promoted: ModelRegistry, churn: Path) -> None:
    edit(churn / "history/3.json", signature=None)
    with pytest.raises(Unsigned, match=r"churn/history/3\.json is not signed"):
        promoted.resolve("churn")


def test_entries_that_changed_places_are_refused(promoted: ModelRegistry, churn: Path) -> None:
    shutil.copy(churn / "history/1.json", churn / "history/4.json")
    with pytest.raises(DamagedRegistry, match="it is entry 1"):
        promoted.resolve("churn")


def test_an_older_alias_file_moves_nothing(promoted: ModelRegistry, churn: Path) -> None:
    (churn / "aliases.json").write_text('{"champion": 1}')
    assert promoted.resolve("churn") == ("churn", 3)


def test_a_server_never_goes_back_behind_what_it_has_seen(promoted: ModelRegistry, churn: Path) -> None:
    """The newest entries removed: who has seen them refuses; who has not cannot know."""
    seen = promoted.latest("churn")
    (churn / "history/3.json").unlink()
    with pytest.raises(HistoryRewritten, match=r"churn/history/3\.json is gone") as caught:
        promoted.latest("churn", seen)
    assert caught.value.code == "history_rewritten"
    fresh = promoted.latest("churn")
    assert fresh is not None
    assert fresh.aliases[CHAMPION] == 2


def test_a_history_that_took_another_turn_is_refused(promoted: ModelRegistry, churn: Path) -> None:
    """Entry 3 removed and written anew by someone with the key: valid, and not what was seen."""
    seen = promoted.latest("churn")
    kept = (churn / "history/3.json").read_bytes()
    (churn / "history/3.json").unlink()
    promoted.rollback("churn")
    promoted.rollback("churn")
    with pytest.raises(HistoryRewritten, match="not what it was"):
        promoted.latest("churn", seen)
    # The entry of the first turn put back under those of the second does not fit.
    (churn / "history/3.json").write_bytes(kept)
    for read in (promoted.latest, promoted.history, promoted.rollback):
        with pytest.raises(HistoryRewritten, match=r"history/4\.json does not follow"):
            read("churn")
    with pytest.raises(HistoryRewritten):
        promoted.latest("churn", seen)


def test_a_gap_in_the_history_is_noticed(promoted: ModelRegistry, churn: Path) -> None:
    (churn / "history/2.json").unlink()
    with pytest.raises(HistoryRewritten, match=r"churn/history/2\.json is gone"):
        promoted.latest("churn")


def test_the_chain_holds_without_a_key_too(tmp_path: Path, churn: Path) -> None:
    """Not against someone who means it, who can write a whole chain; against an accident."""
    registry = ModelRegistry(str(tmp_path / "models"))
    packages.register(registry)
    for number in range(3):
        registry.set_alias("churn", f"a{number}", 1)
    edit(churn / "history/2.json", why="another reason")
    with pytest.raises(HistoryRewritten, match=r"history/3\.json does not follow"):
        registry.latest("churn")


# Keys


def test_a_key_is_replaced_without_a_pause(promoted: ModelRegistry, tmp_path: Path) -> None:
    """Readers get "new,old", `sign` makes every signature new, readers drop the old one."""
    both, new = opened(tmp_path / "models", f"{OTHER},{KEY}"), opened(tmp_path / "models", OTHER)
    seen = both.latest("churn")
    assert both.sign("churn") == ([1, 2, 3], [1, 2, 3])
    assert both.sign("churn") == ([], [])
    assert both.latest("churn", seen) is seen
    assert [new.verify("churn", version).version for version in (1, 2, 3)] == [1, 2, 3]
    assert len(new.history("churn")) == 3
    with pytest.raises(SignatureMismatch):
        promoted.manifest("churn", 1)


def test_sign_vouches_for_what_was_there_before_the_key(tmp_path: Path, registry: ModelRegistry) -> None:
    before = ModelRegistry(registry.url)
    packages.register(before)
    before.set_alias("churn", CHAMPION, 1)
    assert registry.sign("churn") == ([1], [1])
    assert registry.resolve("churn") == ("churn", 1)
    assert registry.verify("churn", 1).version == 1
    assert registry.promote("churn", packages.register(registry).version).number == 2
    with pytest.raises(InvalidRequest, match="no key"):
        before.sign("churn")


def test_sign_does_not_vouch_for_what_another_signed_or_what_is_damaged(
    registry: ModelRegistry, churn: Path
) -> None:
    packages.register(registry)
    registry.set_alias("churn", CHAMPION, 1)
    edit(churn / "history/1.json", why="edited")
    with pytest.raises(SignatureMismatch):
        registry.sign("churn")
    packages.register(ModelRegistry(registry.url))
    (churn / "2" / MODEL_FILE).write_bytes(b"swapped")
    with pytest.raises(DigestMismatch):
        registry.sign("churn")
    assert not (churn / "2" / SIGNATURE_FILE).exists()


@pytest.mark.parametrize("keys", ["short", f"{KEY},", f"{KEY},short", " , "])
def test_a_key_that_is_none_is_refused(keys: str) -> None:
    with pytest.raises(InvalidSetting, match="BANQUET_REGISTRY_KEY"):
        Trust.of(keys)


def test_keys_are_shown_nowhere(tmp_path: Path) -> None:
    settings = load_settings({"BANQUET_REGISTRY_KEY": KEY, "BANQUET_REGISTRY_URL": str(tmp_path)})
    registry = ModelRegistry.of(settings)
    assert KEY not in repr(settings) + str(settings.model_dump()) + repr(Trust.of(KEY))
    packages.register(registry)
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


# Pins


def test_only_pinned_versions_load(tmp_path: Path, churn: Path) -> None:
    plain = ModelRegistry(str(tmp_path / "models"))
    packages.register(plain)
    packages.register(plain)
    pins = tmp_path / "pins.json"
    pins.write_text(json.dumps({"churn/1": plain.manifest_digest("churn", 1)}))
    pinned = ModelRegistry.of(
        load_settings({"BANQUET_REGISTRY_URL": plain.url, "BANQUET_PINNED_MODELS": str(pins)})
    )
    assert pinned.verify("churn", 1).version == 1
    with pytest.raises(NotPinned, match="version 2 is not among"):
        pinned.manifest("churn", 2)
    edit(churn / "1" / MANIFEST_FILE, description="edited")
    with pytest.raises(NotPinned, match="not the one that was pinned"):
        pinned.manifest("churn", 1)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"churn": "a"}', '{"churn/1": "abc"}', '{"churn/0": "%s"}' % ("a" * 64)]
)
def test_a_file_that_is_no_pins_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pins.json").write_text(text)
    with pytest.raises(InvalidSetting):
        Trust.of("", tmp_path / "pins.json")
    with pytest.raises(InvalidSetting, match="cannot be read"):
        Trust.of("", tmp_path / "absent.json")


# Places


def test_a_link_leads_to_no_other_package(tmp_path: Path, churn: Path) -> None:
    """Symbolic links are followed, and what they lead to is held to the same digests, names and numbers."""
    registry = ModelRegistry(str(tmp_path / "models"))
    packages.register(registry)
    packages.register(registry, {MODEL_FILE: b"other", "baseline.parquet": b"other", "model.onnx": b"other"})
    (churn / "3").symlink_to(churn / "1")
    with pytest.raises(DigestMismatch, match="says it is churn/1"):
        registry.manifest("churn", 3)
    (churn / "1" / MODEL_FILE).unlink()
    (churn / "1" / MODEL_FILE).symlink_to(churn / "2" / MODEL_FILE)
    with pytest.raises(DigestMismatch, match=MODEL_FILE):
        registry.verify("churn", 1)
    (tmp_path / "models/loyalty").symlink_to(churn)
    with pytest.raises(DigestMismatch, match="says it is churn/2"):
        registry.manifest("loyalty", 2)
