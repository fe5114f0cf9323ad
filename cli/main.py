"""The ``banquet`` command: options that all commands share, and how errors reach the terminal.

Imports nothing heavy: each command imports what it runs, so that ``--help`` answers at once.
Exit codes: 0 done, 1 a check failed or something is away, 2 the call or the repository is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.errors import BanquetError, InvalidInput, InvalidRequest, NotFound

if TYPE_CHECKING:
    from core.settings import Settings

_JSON_HELP = "Print results and errors as JSON."


class Context:
    """What every command gets: where the repository is, and how to report."""

    def __init__(self, repo: Path, as_json: bool) -> None:
        self.repo = repo
        self.as_json = as_json

    @cached_property
    def settings(self) -> Settings:
        """The ``BANQUET_*`` variables, read once.

        Raises:
            InvalidSetting: one is unknown or has no valid value.
        """
        from core.settings import load_settings

        return load_settings()

    def say(self, message: str) -> None:
        """A line of progress, on stderr so that stdout stays the result."""
        click.echo(message, err=True)

    def report(self, data: Any, text: str) -> None:
        """The result: ``data`` as JSON when asked for, else ``text``."""
        click.echo(json.dumps(data, indent=2, default=str) if self.as_json else text)


def bytes_text(count: float) -> str:
    """Bytes for people: kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def counted(number: int, name: str) -> str:
    """A number and what it counts: ``1 row``, ``2,000 rows``."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


class _Command(click.Command):
    """A command that takes ``--json`` after its name as well as before it, and refuses a wrong setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--json"], is_flag=True, expose_value=False, callback=_report_as_json, help=_JSON_HELP
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        # Whether the command reads them or not: a misspelt setting must not be found out in production.
        _ = ctx.obj.settings
        return super().invoke(ctx)


def _report_as_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.obj.as_json = True


class _Group(click.Group):
    """Lists commands in the order they are used, and turns Banquet's errors into messages."""

    command_class = _Command
    group_class = type

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 — click's signature
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BanquetError as error:
            as_json = isinstance(ctx.obj, Context) and ctx.obj.as_json
            show(error, as_json=as_json)
            sys.exit(2 if isinstance(error, InvalidInput | NotFound) else 1)


class _FrontDoor(_Group):
    """The root: tells a wrong call in JSON too, where ``--json`` stands anywhere in it."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if "--json" not in words:
            return super().main(words, *others, **options)
        try:
            sys.exit(super().main(words, *others, **{**options, "standalone_mode": False}))
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else self.name
            show(InvalidRequest(error.format_message(), hint=f"See `{path} --help`."), as_json=True)
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(1)


def show(error: BanquetError, *, as_json: bool = False) -> None:
    """Print an error with its code and the way out, on stderr."""
    if as_json:
        body = {"code": error.code, "detail": error.message, "hint": error.hint, **error.details}
        click.echo(json.dumps(body, default=str), err=True)
        return
    click.secho(f"Error ({error.code}): ", fg="red", bold=True, nl=False, err=True)
    click.echo(error.message, err=True)
    if error.hint:
        click.echo(f"  {error.hint}", err=True)


@click.group(cls=_FrontDoor, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--repo",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("feature_repo"),
    show_default=True,
    help="The Feast repository: the folder with feature_store.yaml.",
)
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
@click.version_option(package_name="feast-banquet", prog_name="banquet")
@click.pass_context
def main(ctx: click.Context, repo: Path, as_json: bool) -> None:
    """Serve models on Feast features: one definition for training and serving."""
    ctx.obj = Context(repo, as_json)


from cli import features, models, online, operations, rollout  # noqa: E402 — commands register on `main`

__all__ = ["features", "main", "models", "online", "operations", "rollout"]
