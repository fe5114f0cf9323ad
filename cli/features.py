"""Commands for definitions and data: apply, materialize, dataset."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, main
from core.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import TaskID

    from core.repository import FeastRepository
    from materialization.apply import ApplyPlan
    from materialization.report import Progress, RunReport, ViewReport

_SIGNS = {"added": ("+", "green"), "changed": ("~", "yellow"), "removed": ("-", "red")}


def moment(value: str) -> datetime:
    """An ISO 8601 time with a zone, in UTC.

    Raises:
        InvalidRequest: it is not a time, or has no zone.
    """
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidRequest(f"{value!r} is not a time.", hint="Write it as 2026-01-31T12:00:00Z.") from None
    if found.tzinfo is None:
        raise InvalidRequest(f"{value!r} has no time zone.", hint=f"Write it as {value}Z for UTC.")
    return found.astimezone(UTC)


def describe(planned: ApplyPlan) -> str:
    """The plan as text, one object a line."""
    if not planned.changes:
        return "No changes: the registry matches the definitions."
    lines = []
    for change in planned.changes:
        sign, color = _SIGNS[change.action]
        details = f" ({', '.join(change.details)})" if change.details else ""
        lines.append(click.style(f"  {sign} {change.kind} {change.name}{details}", fg=color))
    return "\n".join(lines)


def apply_definitions(repository: FeastRepository) -> ApplyPlan:
    """Plan, then apply where there is something to apply."""
    from materialization import apply

    planned = apply.plan(repository)
    if planned.changes:
        apply.apply(repository, planned)
    return planned


@main.command()
@click.option("--dry-run", is_flag=True, help="Show the plan and change nothing.")
@click.pass_obj
def apply(ctx: Context, dry_run: bool) -> None:
    """Show what changed in the definitions, then register it (`feast apply`)."""
    from core.repository import FeastRepository
    from materialization import apply

    repository = FeastRepository.open(ctx.repo)
    planned = apply.plan(repository)
    if not ctx.as_json:
        click.echo(describe(planned))
    if planned.changes and not dry_run:
        apply.apply(repository, planned)
    changes = [
        {"action": c.action, "kind": c.kind, "name": c.name, "details": list(c.details)}
        for c in planned.changes
    ]
    applied = bool(planned.changes) and not dry_run
    if ctx.as_json:
        ctx.report({"applied": applied, "changes": changes}, "")
    elif applied:
        click.echo(f"Applied {len(changes)} changes to project {repository.project}.")


@main.command()
@click.option("--start", help="Load the window from this time (ISO 8601 with a zone) instead of what is new.")
@click.option("--end", help="Load up to this time; default: now.")
@click.option("--views", help="Only these views, separated by commas.")
@click.option("--force", multiple=True, metavar="VIEW", help="Load this view though it fails the gate.")
@click.option("--dry-run", is_flag=True, help="Show rows, memory and the gate's verdict; write nothing.")
@click.option("--wait", default=0.0, show_default=True, help="Seconds to wait for another run of a view.")
@click.pass_obj
def materialize(
    ctx: Context,
    start: str | None,
    end: str | None,
    views: str | None,
    force: tuple[str, ...],
    dry_run: bool,
    wait: float,
) -> None:
    """Check new and late rows against their expectations, then load them into the online store."""
    from core.repository import FeastRepository

    report = load_views(
        ctx,
        FeastRepository.open(ctx.repo),
        view_names=[name.strip() for name in views.split(",")] if views else None,
        start=moment(start) if start else None,
        end=moment(end) if end else None,
        force=force,
        dry_run=dry_run,
        wait_seconds=wait,
    )
    ctx.report(report.as_json(), "\n".join(_outcome(view) for view in report.views))
    if not report.ok:
        sys.exit(1)


def load_views(ctx: Context, repository: FeastRepository, **window: Any) -> RunReport:
    """Materialize with progress on stderr: a bar on a terminal, nothing otherwise."""
    from materialization.run import materialize

    if ctx.as_json or not sys.stderr.isatty():
        return materialize(repository, **window)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("  {task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>12,.0f} rows/s"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def observe(progress: Progress) -> None:
            if progress.view not in tasks:
                tasks[progress.view] = bars.add_task(progress.view, total=progress.total, rate=0.0)
            bars.update(tasks[progress.view], completed=progress.rows, rate=progress.rows_per_second)

        return materialize(repository, observe=observe, **window)


def _outcome(view: ViewReport) -> str:
    """A view's line, and a line for each thing the gate found."""
    why = f" ({view.reason})" if view.reason else ""
    if view.error is not None:
        lines = [click.style(f"  {view.view}: {view.error}", fg="red")]
    elif view.memory_bytes is not None:
        lines = [
            f"  {view.view}: {view.rows:,} rows due, about {view.memory_bytes / 1e6:,.1f} MB of Redis{why}"
        ]
    else:
        older = f", {view.older:,} older ones left out" if view.older else ""
        lines = [f"  {view.view}: {view.written:,} rows written{older} in {view.seconds:.1f} s{why}"]
    for finding in view.gate.findings if view.gate else ():
        lines.append(click.style(f"    {finding}", fg="yellow" if finding.warning else "red"))
    return "\n".join(lines)


@main.command()
@click.option("--service", help="Feature service to join.")
@click.option(
    "--entities",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet file with join keys, event_timestamp and request-time inputs.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Parquet to write.")
@click.option(
    "--reproduce",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="LOCK",
    help="Rebuild the dataset of a lock and compare; exit 1 where it differs.",
)
@click.pass_obj
def dataset(
    ctx: Context, service: str | None, entities: Path | None, output: Path | None, reproduce: Path | None
) -> None:
    """Build a point-in-time training set and its lock, or rebuild one from its lock."""
    from core.repository import FeastRepository

    repository = FeastRepository.open(ctx.repo)
    if reproduce is not None:
        _reproduce(ctx, repository, reproduce)
        return
    if service is None or entities is None or output is None:
        raise click.UsageError("Give --service, --entities and --output, or --reproduce.")
    from core.dataset import training_dataset

    built = training_dataset(repository, service, entities, output=output)
    data: dict[str, Any] = {
        "rows": built.lock.rows,
        "output": str(output),
        "lock": str(built.lock_path),
        "digest": built.lock.content_digest,
    }
    ctx.report(data, f"{built.lock.rows:,} rows in {output}, lock in {built.lock_path}.")


def _reproduce(ctx: Context, repository: FeastRepository, lock_path: Path) -> None:
    from dataclasses import asdict

    from core.dataset import reproduce

    result = reproduce(repository, lock_path)
    data = {
        "same": result.same,
        "digest": result.content_digest,
        "expected": result.lock.content_digest,
        "moved": [asdict(moved) for moved in result.moved],
    }
    verdict = "The dataset is the same." if result.same else "The dataset differs from its lock."
    ctx.report(data, "\n".join([verdict, *(f"  {moved}" for moved in result.moved)]))
    if not result.same:
        sys.exit(1)
