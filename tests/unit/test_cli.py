"""The command line's own habits: what every command takes, wherever it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.features import moment
from cli.main import main
from core.errors import InvalidRequest


def commands(group: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


COMMANDS = dict(commands(main))


def needed(command: click.Command) -> list[str]:
    """Values for what the command cannot do without."""
    words = []
    for parameter in command.params:
        if parameter.required:
            value = parameter.type.choices[0] if isinstance(parameter.type, click.Choice) else "x"
            words += [parameter.opts[0], value] if isinstance(parameter, click.Option) else [value]
    return words


@pytest.mark.parametrize("command", list(COMMANDS), ids=" ".join)
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


@pytest.mark.parametrize(
    "words",
    [
        "status --json --nope",
        "--json status --nope",
        "--json --nope status",
        "nothing --json",
        "verify --sample many --json",
        "train --json",
        "models nothing --json",
        "serve --port 0 --json",
        "dataset --json",
    ],
)
def test_a_wrong_call_with_json_is_told_in_json(words: str) -> None:
    found = CliRunner().invoke(main, words.split())
    told = json.loads(found.stderr)
    assert (found.exit_code, told["code"], found.stdout) == (2, "invalid_request", "")
    assert told["detail"]
    assert "--help" in told["hint"]


@pytest.mark.parametrize("command", list(COMMANDS), ids=" ".join)
@pytest.mark.parametrize("setting", ["BANQUET_FOO=1", "BANQUET_MAX_ENTITIES=0"])
def test_every_command_refuses_a_wrong_setting_before_it_does_anything(
    command: tuple[str, ...], setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, [*command, "--json", *needed(COMMANDS[command])])
    assert found.exit_code == 2
    assert json.loads(found.stderr)["code"] == "invalid_setting"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["2026-09-01", "2026-09-01T12:30"])
def test_the_way_out_of_a_time_without_a_zone_is_a_time(value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        moment(value)
    assert caught.value.hint is not None
    written = caught.value.hint.split()[3]
    assert moment(written).isoformat() == datetime.fromisoformat(value).replace(tzinfo=UTC).isoformat()
