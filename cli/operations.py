"""Commands that run things: up, serve, redis."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.main import Context, main
from core.errors import InvalidRequest

if TYPE_CHECKING:
    from core.repository import FeastRepository
    from core.settings import Settings

_HOST = "127.0.0.1"
_PORT = 8000


@main.command()
@click.option("--host", default=_HOST, show_default=True)
@click.option("--port", default=_PORT, show_default=True, type=click.IntRange(1, 65535))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes.")
@click.pass_obj
def serve(ctx: Context, host: str, port: int, workers: int) -> None:
    """Serve features and predictions over HTTP."""
    from core.settings import load_settings
    from serving.server import serve as run

    run(ctx.repo, host=host, port=port, workers=workers, settings=load_settings())


@main.command()
@click.option("--host", default=_HOST, show_default=True)
@click.option("--port", default=_PORT, show_default=True, type=click.IntRange(1, 65535))
@click.option("--sources", help="MODULE:FUNCTION that builds the sources, given the repository's path.")
@click.option("--spec", help="MODULE_OR_FILE.py:NAME of the model spec to train where there is no champion.")
@click.option("--no-serve", is_flag=True, help="Stop before serving.")
@click.pass_obj
def up(ctx: Context, host: str, port: int, sources: str | None, spec: str | None, no_serve: bool) -> None:
    """Run the main job: Redis, sources, apply, materialize, train, serve. Repeating it is safe."""
    from core.repository import FeastRepository
    from core.settings import load_settings
    from serving.server import check_port
    from serving.server import serve as run

    settings = load_settings()
    repository = FeastRepository.open(ctx.repo)
    if not no_serve:
        check_port(host, port)
    with _redis(ctx, repository, settings):
        _prepare(ctx, repository, settings, sources, spec)
        if no_serve:
            return
        shown = f"http://{host}:{port}"
        ctx.say(f"\nServing on {shown} (docs: {shown}/docs). Ctrl-C stops everything. Try:\n")
        ctx.say(
            f"  curl -s {shown}/predict -H 'Content-Type: application/json' \\\n"
            f'    -d \'{{"entities": [{{"user_id": 1}}, {{"user_id": 99999999}}]}}\'\n'
        )
        run(ctx.repo, host=host, port=port, settings=settings)


def _prepare(
    ctx: Context, repository: FeastRepository, settings: Settings, sources: str | None, spec: str | None
) -> None:
    from cli.features import apply_definitions, materialize_views
    from cli.models import champion_of, train_model

    if sources:
        with _step(ctx, "Sources") as say:
            say(_build_sources(sources, repository.path))
    with _step(ctx, "Definitions") as say:
        planned = apply_definitions(repository)
        say(f"{len(planned.changes)} changes applied" if planned.changes else "unchanged")
    with _step(ctx, "Online store") as say:
        say(materialize_views(ctx, repository))
    if spec:
        with _step(ctx, "Model") as say:
            say(champion_of(spec, settings) or train_model(repository, settings, spec))


def _build_sources(reference: str, repo: Path) -> str:
    try:
        build = pkgutil.resolve_name(reference)
    except (ImportError, AttributeError, ValueError) as exc:
        raise InvalidRequest(
            f"--sources {reference!r} cannot be imported: {exc}.", hint="Write it as package.module:function."
        ) from exc
    return str(build(repo))


@contextmanager
def _step(ctx: Context, title: str) -> Iterator[object]:
    """Print a step's title at once, its outcome and seconds when it is done."""
    started = time.monotonic()
    outcome = ""

    def say(text: str) -> None:
        nonlocal outcome
        outcome = text

    click.echo(f"{title:<14}", nl=False, err=True)
    try:
        yield say
    except BaseException:
        click.echo("failed", err=True)
        raise
    ctx.say(f"{outcome}  ({time.monotonic() - started:.1f} s)")
