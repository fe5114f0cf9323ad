"""feature_store.yaml as Banquet reads it: what Feast would take without a word is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from core.errors import InvalidRepository
from core.repository import FeastRepository

STORE = """\
project: shop
provider: local
registry: {registry}
online_store: {{type: redis, connection_string: "127.0.0.1:6379"}}
offline_store: {{type: core.offline.BanquetOfflineStore}}
entity_key_serialization_version: 3
{more}
"""


def written(path: Path, *, registry: str = "registry.db", more: str = "") -> Path:
    (path / "feature_store.yaml").write_text(STORE.format(registry=registry, more=more))
    return path


@pytest.mark.parametrize(
    ("registry", "key"),
    [
        ("${REGISTRY_OF_NOBODY}", "registry"),
        ("{path: '${REGISTRY_OF_NOBODY}/registry.db'}", "registry.path"),
        ("{path: '${REGISTRY_OF_NOBODY:-registry.db}'}", "registry.path"),
    ],
)
def test_a_variable_that_is_not_set_is_named(tmp_path: Path, registry: str, key: str) -> None:
    """Feast leaves it as it stands, and apply makes a file of that name."""
    with pytest.raises(InvalidRepository, match=rf"^{key} in .* holds \$\{{REGISTRY_OF_NOBODY"):
        FeastRepository.open(written(tmp_path, registry=registry))


def test_a_variable_that_is_set_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_OF_SOMEBODY", "elsewhere.db")
    repository = FeastRepository.open(written(tmp_path, registry="${REGISTRY_OF_SOMEBODY}"))
    assert repository.registry_file == tmp_path / "elsewhere.db"


def test_a_variable_in_a_comment_harms_nobody(tmp_path: Path) -> None:
    assert FeastRepository.open(written(tmp_path, more="# ${NOT_SET}")).project == "shop"


def test_keys_that_nothing_reads_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Feast's configuration allows any; a misspelt one is then without effect."""
    misspelt = written(
        tmp_path,
        registry="{path: registry.db, cache_ttl: 5}",
        more="entity_key_serialisation_version: 3\nmaterialization: {}\nflags: {}",
    )
    with caplog.at_level(logging.WARNING):
        FeastRepository.open(misspelt).store()
    told = [text.partition(" in ")[0] for text in caplog.messages if "means nothing to Feast" in text]
    assert told == ["entity_key_serialisation_version", "registry.cache_ttl"]


def test_an_empty_registry_file_is_not_taken_for_a_registry_without_views(tmp_path: Path) -> None:
    """`feast apply` empties the file before it writes it, under the eyes of every server."""
    repository = FeastRepository.open(written(tmp_path))
    (tmp_path / "registry.db").touch()
    with pytest.raises(InvalidRepository, match="is empty"):
        repository.definitions()
