"""`banquet models` as its user meets it: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from core import rollouts
from core.manifest import MANIFEST_FILE, MODEL_FILE
from core.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelRegistry
from core.traffic import Step
from tests.support import packages
from tests.support.registered import repository
from tests.support.valkey import Valkey

KEY = "k" * 32


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelRegistry:
    """Three versions of churn: the first is champion, the second challenger; one of loyalty."""
    monkeypatch.setenv("BANQUET_REGISTRY_URL", str(tmp_path))
    registry = ModelRegistry(str(tmp_path))
    for _ in range(3):
        packages.register(registry)
    packages.register(registry, name="loyalty")
    registry.set_alias("churn", CHAMPION, 1, why="trained", who="ana")
    registry.set_alias("churn", CHALLENGER, 2, why="trained", who="ana")
    return registry


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def data(*arguments: str) -> Any:
    result = CliRunner().invoke(main, ["--json", "models", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_list_is_aligned_and_complete(registry: ModelRegistry) -> None:
    assert run("list").stdout.splitlines() == [
        "churn      3 versions  challenger: 2, champion: 1",
        "loyalty    1 version   no alias",
    ]


def test_a_model_whose_history_is_damaged_hides_no_other(registry: ModelRegistry, tmp_path: Path) -> None:
    (tmp_path / "churn/history/2.json").write_text("{")
    lines = run("list").stdout.splitlines()
    assert "churn/history/2.json" in lines[0]
    assert lines[1].startswith("loyalty")
    verified = run("verify")
    assert verified.exit_code == 1
    assert "churn/history: churn/history/2.json" in verified.stdout
    assert "churn/1: ok" in verified.stdout


@pytest.mark.parametrize(
    "command",
    ["show chrun", "show chrun/1", "verify chrun", "promote chrun", "promote chrun --version 1",
     "rollback chrun", "history chrun", "alias chrun x 1", "alias chrun x --delete", "prune chrun --keep 1",
     "pins chrun@x"],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_those_that_exist(registry: ModelRegistry, command: str) -> None:
    result = run(*command.split())
    assert result.exit_code == 2
    assert "There is no model 'chrun'." in result.stderr
    assert "Models: churn, loyalty." in result.stderr


@pytest.mark.parametrize(
    "reference",
    ["../churn", "churn/../loyalty/1", "models:/../1", "churn@../x", "churn/1/../2", "churn/1x", "/etc"],
)  # fmt: skip
def test_a_reference_cannot_leave_the_registry(registry: ModelRegistry, reference: str) -> None:
    for command in ("show", "verify", "pins"):
        result = run(command, reference)
        assert result.exit_code == 2
        assert "invalid_request" in result.stderr or "model_not_found" in result.stderr


def test_an_alias_comes_and_goes(registry: ModelRegistry) -> None:
    assert run("alias", "churn", "audited", "3").stdout == "churn: audited: 3, challenger: 2, champion: 1\n"
    assert run("alias", "churn", "audited", "--delete", "--why", "old").exit_code == 0
    assert registry.aliases("churn") == {CHAMPION: 1, CHALLENGER: 2}
    assert registry.history("churn")[-1].action == "remove audited"
    gone = run("alias", "churn", "audited", "--delete")
    assert gone.exit_code == 2
    assert "Its aliases: challenger, champion." in gone.stderr
    assert run("alias", "churn", "../x", "1").exit_code == 2
    assert run("alias", "churn", "x").exit_code == 2
    assert run("alias", "churn", "x", "1", "--delete").exit_code == 2


def test_the_champion_is_not_removed_in_passing(registry: ModelRegistry) -> None:
    moved = run("alias", "churn", "champion", "2")
    assert (moved.exit_code, "promote churn --version 2" in moved.stderr) == (2, True)
    removed = run("alias", "churn", "champion", "--delete")
    assert (removed.exit_code, "stops serving" in removed.stderr) == (2, True)
    assert registry.aliases("churn")[CHAMPION] == 1
    assert run("alias", "churn", "champion", "--delete", "--leave-no-champion").exit_code == 0
    assert CHAMPION not in registry.aliases("churn")


def test_prune_says_what_it_does(registry: ModelRegistry) -> None:
    dry = run("prune", "churn", "--older-than", "0s", "--dry-run")
    assert dry.stdout.splitlines() == [
        "churn/3: would be removed",
        "churn/1: kept, champion",
        "churn/2: kept, challenger",
    ]
    assert run("prune", "churn", "--older-than", "0s").stdout.splitlines()[0] == "churn/3: removed"
    assert registry.versions("churn") == [1, 2]
    assert run("prune", "churn").exit_code == 2


def test_a_dry_run_of_prune_needs_no_limit(registry: ModelRegistry) -> None:
    dry = run("prune", "churn", "--dry-run")
    assert (dry.exit_code, dry.stdout.splitlines()[0]) == (0, "churn/3: would be removed")
    assert "Removing takes --keep, --older-than or both." in dry.stderr
    assert registry.versions("churn") == [1, 2, 3]


def test_verify_finds_an_edited_manifest_and_says_what_it_cannot_find(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    whole = run("verify")
    assert whole.exit_code == 0
    assert "can write digests that match" in whole.stderr
    manifest = tmp_path / "churn/2" / MANIFEST_FILE
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    edited = run("verify")
    assert edited.exit_code == 1
    assert "churn/2: manifest.json of model churn version 2 differs from its digest." in edited.stdout


def test_a_registry_gets_its_signatures(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANQUET_REGISTRY_KEY", KEY)
    before = run("verify")
    assert before.exit_code == 1
    assert "churn/1: The manifest of churn/1 is not signed." in before.stdout
    assert run("sign", "churn", "loyalty").stdout.splitlines() == [
        "churn/1: signed",
        "churn/2: signed",
        "churn/3: signed",
        "churn/history: 2 entries signed",
        "loyalty/1: signed",
    ]
    assert run("verify").exit_code == 0
    assert run("sign", "churn").stdout == "Everything is signed by the first key.\n"
    assert run("promote", "churn").exit_code == 0


def test_pins_are_what_the_setting_takes(
    registry: ModelRegistry, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path_factory.mktemp("etc") / "pins.json"
    file.write_text(run("pins").stdout)
    assert list(json.loads(file.read_text())) == ["churn/1", "churn/2"]
    monkeypatch.setenv("BANQUET_PINNED_MODELS", str(file))
    assert run("verify", "churn/2").exit_code == 0
    refused = run("verify", "churn/3")
    assert (refused.exit_code, "not among the pinned versions" in refused.stdout) == (1, True)
    assert list(data("pins", "churn/3")) == ["churn/3"]
    registry.store.replace(b"swapped", "churn", "1", MODEL_FILE)
    assert "digest_mismatch" in run("pins").stderr


@pytest.mark.parametrize("command", ["advance", "promote", "abort", "start", "status"])
def test_a_rollout_of_an_unknown_name_is_answered_with_those_that_exist(
    registry: ModelRegistry, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory, command: str
) -> None:
    repo = repository(tmp_path_factory.mktemp("repo"), valkey.address(), "unknown")
    result = CliRunner().invoke(main, ["--repo", str(repo.path), "rollout", command, "chrun"])
    assert (result.exit_code, "Models: churn, loyalty." in result.stderr) == (2, True), result.output


@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("models promote churn", "champion: 2, previous: 1"),
        ("models rollback churn", "challenger: 2, champion: 3, previous: 1"),
        ("rollout abort churn", "challenger: 2, champion: 1, previous: 3"),
    ],
)
def test_what_ends_a_rollout_says_so(registry: ModelRegistry, command: str, left: str) -> None:
    if left.count("3"):
        registry.set_alias("churn", PREVIOUS, 3)
    steps = [Step(5), Step(50)]
    rollouts.start(registry, "churn", kind="canary", steps=steps)
    as_text = CliRunner().invoke(main, command.split())
    assert as_text.stdout == f"churn: {left}; ended: canary of version 2 at 5 %\n"
    if registry.aliases("churn")[CHAMPION] != 1:
        registry.promote("churn", 1)
    registry.set_alias("churn", PREVIOUS, 3)
    rollouts.start(registry, "churn", kind="canary", version=2, steps=steps)
    ended = json.loads(CliRunner().invoke(main, ["--json", *command.split()]).stdout)["ended_rollout"]
    assert (ended["kind"], ended["version"], len(ended["began"])) == ("canary", 2, 1)
    assert data("alias", "churn", "audited", "3")["ended_rollout"] is None
