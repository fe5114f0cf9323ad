"""`banquet apply`: the plan says what changes, nothing else, and refuses what would corrupt the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.errors import InvalidRepository
from core.repository import FeastRepository
from materialization import apply
from tests.support import shop as source


@pytest.fixture
def repository(valkey: Any, tmp_path: Path) -> FeastRepository:
    return FeastRepository.open(
        source.write(
            tmp_path / "repo", valkey.connection_string, project=f"p{tmp_path.name.replace('-', '')}"
        )
    )


def edit(repository: FeastRepository, old: str, new: str) -> FeastRepository:
    """Change the definitions; a new object, because Feast's store caches its registry."""
    path = repository.path / "definitions.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return FeastRepository.open(repository.path)


def test_the_plan_names_what_is_added_changed_and_removed_and_is_empty_after(
    repository: FeastRepository,
) -> None:
    first = apply.plan(repository)
    assert {change.action for change in first.changes} == {"added"}
    assert ("feature view", "profile") in {(change.kind, change.name) for change in first.changes}
    apply.apply(repository, first)
    assert apply.plan(FeastRepository.open(repository.path)).changes == ()

    repository = edit(repository, "ttl=timedelta(days=30)", "ttl=timedelta(days=31)")
    changed = apply.plan(repository).changes
    assert [(c.action, c.name, c.details) for c in changed] == [("changed", "visits", ("ttl 30 d -> 31 d",))]
    apply.apply(repository, apply.plan(repository))

    repository = edit(
        repository,
        'renamed = FeatureService(\n    name="renamed"',
        'other = FeatureService(\n    name="other"',
    )
    actions = {(c.action, c.name) for c in apply.plan(repository).changes}
    assert actions == {("removed", "renamed"), ("added", "other")}


def test_two_features_with_one_hash_field_are_refused_by_name(repository: FeastRepository) -> None:
    """Among a few hundred thousand names some pair collides; the test finds one."""
    from core.layout import feature_field

    seen: dict[bytes, str] = {}
    pair: tuple[str, str] | None = None
    for number in range(1_000_000):
        name = f"f{number}"
        other = seen.setdefault(feature_field("profile", name), name)
        if other != name:
            pair = (other, name)
            break
    assert pair is not None
    fields = ", ".join(f'Field(name="{name}", dtype=Int64)' for name in pair)
    repository = edit(
        repository, 'Field(name="age", dtype=Int64),', f'Field(name="age", dtype=Int64), {fields},'
    )
    with pytest.raises(InvalidRepository, match="same 32-bit hash field") as refused:
        apply.plan(repository)
    assert all(f"profile:{name}" in refused.value.message for name in pair)


def test_a_definition_that_fails_says_so_and_leaves_nothing_behind(repository: FeastRepository) -> None:
    import sys

    repository = edit(repository, "ttl=timedelta(days=30)", "ttl=timedelta(days=1 / 0)")
    with pytest.raises(InvalidRepository, match="ZeroDivisionError"):
        apply.plan(repository)
    assert "definitions" not in sys.modules
    assert str(repository.path) not in sys.path


def test_a_definition_of_the_wrong_type_is_told_by_argument_and_type(repository: FeastRepository) -> None:
    """In a process of its own: what Feast checks is settled when it is first imported (ADR 0115)."""
    import subprocess
    import sys

    edit(repository, "ttl=timedelta(days=30)", 'ttl="30d"')
    code = "from cli.main import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "--repo", str(repository.path), "apply", "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "invalid_repository" in ran.stderr
    assert 'argument "ttl" (str)' in ran.stderr
    assert "timedelta" in ran.stderr
