"""The command line's own habits: what every command takes, wherever it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.main import main


def commands(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name)


@pytest.mark.parametrize("command", list(commands(main)), ids=" ".join)
def test_every_command_takes_json_after_its_name(command: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(main, [*command, "--json", "--help"])
    assert shown.exit_code == 0, shown.output
    assert "--json" in shown.output


@pytest.mark.parametrize("words", ["--json models list", "models list --json"])
def test_json_means_the_same_before_and_after_the_command(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANQUET_STATE_DIR", str(tmp_path))
    assert json.loads(CliRunner().invoke(main, words.split()).stdout) == []


def test_an_error_of_a_command_with_json_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANQUET_STATE_DIR", str(tmp_path))
    found = CliRunner().invoke(main, ["models", "history", "nobody", "--json"])
    assert found.exit_code == 2
    assert json.loads(found.stderr)["code"] == "model_not_found"
