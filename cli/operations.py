"""Commands that run things: up, serve, stream, redis."""

from __future__ import annotations

import fcntl
import json
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.main import Context, main
from core.errors import InvalidRequest

if TYPE_CHECKING:
    from core.embedded import EmbeddedRedis, RedisState
    from core.repository import FeastRepository
    from core.settings import Settings
    from materialization.stream import StreamReport

_HOST = "127.0.0.1"
_PORT = 8000


@main.command()
@click.option("--host", default=_HOST, show_default=True)
@click.option("--port", default=_PORT, show_default=True, type=click.IntRange(1, 65535))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes.")
@click.pass_obj
def serve(ctx: Context, host: str, port: int, workers: int) -> None:
    """Serve features and predictions over HTTP."""
    from serving.server import serve as run

    run(ctx.repo, host=host, port=port, workers=workers, settings=ctx.settings)


@main.command()
@click.option("--host", default=_HOST, show_default=True)
@click.option("--port", default=_PORT, show_default=True, type=click.IntRange(1, 65535))
@click.option("--sources", help="MODULE:FUNCTION that builds the sources, given the repository's path.")
@click.option("--spec", help="MODULE_OR_FILE.py:NAME of the model spec to train where there is no champion.")
@click.option("--no-serve", is_flag=True, help="Stop before serving.")
@click.pass_obj
def up(ctx: Context, host: str, port: int, sources: str | None, spec: str | None, no_serve: bool) -> None:
    """Run the main job, from definitions to an API.

    Redis, sources, apply, materialize, train where there is no champion, serve. Repeating it is safe.
    """
    from core.repository import FeastRepository
    from serving.server import check_port, serve_here

    repository = FeastRepository.open(ctx.repo)
    # Ended by a supervisor, it must still stop the Redis it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as turn:
        turn.enter_context(_turn(ctx))
        if not no_serve:
            check_port(host, port)
        with embedded_redis(repository, ctx.settings).in_use() as redis:
            ctx.say(f"{'Redis':<14}{_redis_line(redis)}")
            _prepare(ctx, repository, sources, spec)
            if no_serve:
                return

            def announce() -> None:
                turn.close()
                shown = f"http://{host}:{port}"
                ctx.say(f"\nServing on {shown} (docs: {shown}/docs). Ctrl-C stops everything. Try:\n")
                ctx.say(
                    f"  curl -s {shown}/predict -H 'Content-Type: application/json' \\\n"
                    f'    -d \'{{"entities": [{{"user_id": 1}}, {{"user_id": 99999999}}]}}\'\n'
                )

            serve_here(ctx.repo, host=host, port=port, settings=ctx.settings, announce=announce)


@contextmanager
def _turn(ctx: Context) -> Iterator[None]:
    """One `up` of a folder prepares at a time, until it listens: then the next one sees whether it can."""
    ctx.settings.state_dir.mkdir(parents=True, exist_ok=True)
    with (ctx.settings.state_dir / "up.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ctx.say("Waiting for another `banquet up` that prepares this folder.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(ctx: Context, repository: FeastRepository, sources: str | None, spec: str | None) -> None:
    from cli.features import apply_definitions, load_views
    from cli.models import train_unless_there

    if sources:
        with _step(ctx, "Sources") as say:
            say(_build_sources(sources, repository.path))
    with _step(ctx, "Definitions") as say:
        planned = apply_definitions(ctx, repository)
        say(f"{len(planned.changes)} changes applied" if planned.changes else "unchanged")
    with _step(ctx, "Online store") as say:
        report = load_views(ctx, repository)
        for view in report.views:
            if view.error is not None:
                raise view.error
        say(f"{sum(view.written for view in report.views):,} rows written")
    if spec:
        with _step(ctx, "Model") as say:
            say(train_unless_there(ctx, repository, spec))


def embedded_redis(repository: FeastRepository, settings: Settings) -> EmbeddedRedis:
    """The server that stands in where nobody listens at the repository's local address."""
    from core.embedded import EmbeddedRedis

    return EmbeddedRedis(settings.state_dir / "redis", repository.redis)


def _redis_line(state: RedisState) -> str:
    if not state.running:
        return f"No Redis answers at {state.address}."
    kind = ", embedded" if state.embedded else ""
    return f"{state.version} at {state.address}{kind}"


@main.command()
@click.option("--stream", help="Redis key of the stream.  [default: banquet:events:<project>]")
@click.option(
    "--group", default="banquet", show_default=True, help="Consumer group; its members share the work."
)
@click.option("--consumer", help="Name in the group, if not one of this process.")
@click.option(
    "--to",
    default="online_and_offline",
    show_default=True,
    type=click.Choice(["online", "offline", "online_and_offline"]),
    help="Where the rows go.",
)
@click.option(
    "--append-seconds", default=5.0, show_default=True, help="Gather rows this long for the offline store."
)
@click.option(
    "--max-length", default=100_000, show_default=True, help="Acknowledged entries that stay; -1: all."
)
@click.option("--dead-letters", help="Redis key of the stream of refused events.  [default: {<stream>}:dead]")
@click.option("--report-seconds", default=10.0, show_default=True, help="Seconds between reports of the lag.")
@click.pass_obj
def stream(
    ctx: Context,
    stream: str | None,
    group: str,
    consumer: str | None,
    to: Literal["online", "offline", "online_and_offline"],
    append_seconds: float,
    max_length: int,
    dead_letters: str | None,
    report_seconds: float,
) -> None:
    """Write the events of a Redis Stream online and offline.

    Until Ctrl-C; bad ones become dead letters.
    """
    from core.repository import FeastRepository
    from materialization.stream import StreamConsumer, StreamOptions

    def observe(report: StreamReport) -> None:
        if ctx.as_json:
            click.echo(json.dumps({"event": "report", **report.as_json()}))
        else:
            ctx.say(_stream_line(report))

    options = StreamOptions(
        stream=stream,
        group=group,
        consumer=consumer,
        to=to,
        append_seconds=append_seconds,
        max_length=None if max_length < 0 else max_length,
        dead_stream=dead_letters,
        report_seconds=report_seconds,
    )
    consumer_ = StreamConsumer(FeastRepository.open(ctx.repo), options, observe=observe)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: consumer_.stop())
    place = consumer_.place
    ctx.say(f"Reading {place.stream} as {place.consumer} of group {place.group}.")
    ctx.say(f"Dead letters go to {place.dead_stream}.")
    report = consumer_.run()
    if ctx.as_json:
        click.echo(json.dumps({"event": "summary", **report.as_json()}))
    else:
        click.echo(_stream_line(report))
    if report.waiting_rows:
        sys.exit(1)


def _stream_line(report: StreamReport) -> str:
    counts, lag = report.counts, report.lag_entries
    behind = "lag unknown" if lag is None else f"lag {lag:,} entries"
    if report.lag_seconds is not None:
        behind += f", {report.lag_seconds:.1f} s"
    delays = "".join(f", {name} {value:,.0f} ms" for name, value in report.online_ms.items())
    text = (
        f"{report.per_second:,.0f} events/s; {behind}; {counts.written:,} rows written online{delays}; "
        f"{counts.appended:,} appended, {report.waiting_rows:,} waiting; {counts.refused:,} dead letters"
    )
    return f"{text}; offline store: {report.error}" if report.error else text


@main.group()
def redis() -> None:
    """The embedded Redis, for a local address where nobody listens."""


def _redis_command(ctx: Context, act: Callable[[EmbeddedRedis], RedisState]) -> None:
    from dataclasses import asdict

    from core.repository import FeastRepository

    state = act(embedded_redis(FeastRepository.open(ctx.repo), ctx.settings))
    ctx.report({**asdict(state), "running": state.running}, _redis_line(state))


@redis.command("start")
@click.pass_obj
def redis_start(ctx: Context) -> None:
    """Start it, unless a Redis answers already; it stays until `redis stop`."""
    _redis_command(ctx, lambda embedded: embedded.start())


@redis.command("stop")
@click.pass_obj
def redis_stop(ctx: Context) -> None:
    """Stop it; its data stays."""

    def stop(embedded: EmbeddedRedis) -> RedisState:
        embedded.stop()
        return embedded.status()

    _redis_command(ctx, stop)


@redis.command("status")
@click.pass_obj
def redis_status(ctx: Context) -> None:
    """Say what answers at the repository's address."""
    _redis_command(ctx, lambda embedded: embedded.status())


def _build_sources(reference: str, repo: Path) -> str:
    try:
        build = pkgutil.resolve_name(reference)
    except (ImportError, AttributeError, ValueError) as exc:
        raise InvalidRequest(
            f"--sources {reference!r} cannot be imported: {exc}.", hint="Write it as package.module:function."
        ) from exc
    return str(build(repo))


@contextmanager
def _step(ctx: Context, title: str) -> Iterator[Callable[[str], None]]:
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
