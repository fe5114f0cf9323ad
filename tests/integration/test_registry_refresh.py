"""Definitions that change under a running server, in a registry file and in a database."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.repository import FeastRepository
from core.settings import Settings
from materialization import apply
from tests.support import shop
from tests.support.server import banquet
from tests.support.waiting import wait_until


def repository(path: Path, redis: str, kind: str) -> FeastRepository:
    """The shop, applied to its registry, a file or a database."""
    shop.write(path, redis, project=f"refresh_{kind}")
    settings = path / "feature_store.yaml"
    if kind == "sql":
        database = f"registry: {{registry_type: sql, path: 'sqlite:///{path}/registry.sqlite'}}"
        settings.write_text(settings.read_text().replace("registry: registry.db", database))
    repo = FeastRepository.open(path)
    apply.apply(repo, apply.plan(repo))
    return repo


def failures(server: httpx.Client) -> float:
    found = re.search(
        r'refresh_failures_total{[^}]*"definitions"[^}]*} ([0-9.]+)', server.get("/metrics").text
    )
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("kind", ["file", "sql"])
def test_changed_definitions_are_served_and_an_unreadable_registry_changes_nothing(
    valkey: Any, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Feast's registry in a database has no version, and a refresh of it swallows what it cannot read."""
    repo = repository(tmp_path / "repo", valkey.connection_string, kind)
    settings = Settings(features_only=True, state_dir=tmp_path, registry_refresh_s=0.05)
    with banquet(repo.path, settings) as server:

        def asked(feature: str) -> int:
            body = {"features": [f"profile:{feature}"], "entities": {"user_id": [1]}}
            return server.post("/get-online-features", json=body).status_code

        assert (asked("age"), asked("height")) == (200, 404)
        add_a_feature(repo)
        wait_until(lambda: asked("height") == 200, "the new feature is served")

        caplog.clear()
        before = failures(server)
        with unreadable(repo.path, kind):
            wait_until(lambda: failures(server) > before + 1, "looks that fail are counted")
            assert asked("height") == 200
            assert server.get("/readyz").status_code == 200
            told = [text for text in caplog.messages if "refresh of the definitions failed" in text]
            assert len(told) == 1, "the same failure is told of once"
            assert "the old state stays" in told[0]
        add_a_feature(repo, "weight")
        wait_until(lambda: asked("weight") == 200, "the registry is read again")


def add_a_feature(repo: FeastRepository, name: str = "height") -> None:
    """Give the view `profile` one more."""
    file = repo.path / "definitions.py"
    age = 'Field(name="age", dtype=Int64)'
    file.write_text(file.read_text().replace(age, f'{age}, Field(name="{name}", dtype=Int64)', 1))
    apply.apply(repo, apply.plan(repo))


@contextmanager
def unreadable(path: Path, kind: str) -> Iterator[None]:
    """A registry file that is none, or a database without one of its tables, for the length of a block."""
    if kind == "sql":
        rename_table(path, "feature_views", "elsewhere")
        yield
        rename_table(path, "elsewhere", "feature_views")
        return
    file, aside = path / "registry.db", path / "registry.aside"
    (path / "registry.new").write_bytes(b"no registry")
    aside.hardlink_to(file)  # the file is never gone: that would be another failure
    (path / "registry.new").rename(file)
    yield
    aside.rename(file)


def rename_table(path: Path, name: str, to: str) -> None:
    with closing(sqlite3.connect(path / "registry.sqlite", timeout=30)) as database, database:
        database.execute(f"ALTER TABLE {name} RENAME TO {to}")
