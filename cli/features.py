"""Commands for definitions and data: apply, materialize, dataset."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, bytes_text, counted, main
from core.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import TaskID

    from core.repository import FeastRepository
    from materialization.apply import ApplyPlan
    from materialization.clean import CleanReport
    from materialization.impact import BrokenModel, Impact
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
        raise InvalidRequest(
            f"{value!r} has no time zone.", hint=f"Write it as {found.isoformat()}Z for UTC."
        )
    return found.astimezone(UTC)


def describe(planned: ApplyPlan) -> str:
    """The plan as text, one object a line, its features below it."""
    if not planned.changes:
        return "No changes: the registry matches the definitions."
    lines = []
    for change in planned.changes:
        sign, color = _SIGNS[change.action]
        details = f" ({'; '.join(change.details)})" if change.details else ""
        lines.append(click.style(f"  {sign} {change.kind} {change.name}{details}", fg=color))
        for feature in change.features:
            sign, color = _SIGNS[feature.action]
            details = f" ({'; '.join(feature.details)})" if feature.details else ""
            lines.append(click.style(f"      {sign} {feature.name}{details}", fg=color))
    return "\n".join(lines)


def describe_impact(found: Impact) -> str:
    """What the plan costs in Redis, in the lines that there is something to say about."""
    lines = []
    for entry in found.growth:
        what = f"{entry.view}: {', '.join(entry.features)}" if entry.features else entry.view
        rows = "an unknown number of rows" if entry.rows is None else counted(entry.rows, "row")
        size = "memory unknown" if entry.bytes is None else f"about {bytes_text(entry.bytes)} of Redis"
        lines.append(f"  {what}: {rows}, {size}" + (f" ({entry.unknown})" if entry.unknown else ""))
    if found.orphans is not None and found.orphans.fields:
        left = found.orphans
        rows = "".join(f", {counted(count, 'row')} of {view}" for view, count in sorted(left.rows.items()))
        about = "" if left.exact else f"about, from {left.looked_at:,} of {left.total:,} keys: "
        lines.append(
            f"  orphaned in Redis: {about}{counted(left.fields, 'field')}, {counted(left.keys, 'whole key')}"
            f"{rows}; `banquet clean` removes them"
        )
    if found.unknown:
        lines.append(f"  orphaned in Redis: unknown ({found.unknown})")
    return "\n".join(lines)


def apply_definitions(ctx: Context, repository: FeastRepository) -> ApplyPlan:
    """Plan, then apply where there is something to apply; raises SchemaMismatch rather than break a model."""
    from cli.models import open_registry
    from materialization import apply, impact

    planned = apply.plan(repository)
    if planned.changes:
        impact.refuse_broken_models(impact.broken_models(repository, planned, open_registry(ctx)))
        apply.apply(repository, planned)
    return planned


@main.command()
@click.option("--dry-run", is_flag=True, help="Show the plan and change nothing.")
@click.option("--break-models", is_flag=True, help="Apply though registered models would not load any more.")
@click.pass_obj
def apply(ctx: Context, dry_run: bool, break_models: bool) -> None:
    """Show what changed in the definitions, then register it.

    The plan names each feature and what the change costs in Redis. It is `feast apply` with guards: see
    docs/apply-and-clean.md.
    """
    from dataclasses import asdict

    from cli.models import open_registry
    from core.errors import RegistryUnavailable
    from core.repository import FeastRepository
    from materialization import apply, impact

    repository = FeastRepository.open(ctx.repo)
    planned = apply.plan(repository)
    cost = impact.impact(repository, planned)
    models: tuple[BrokenModel, ...] | None
    try:
        models = impact.broken_models(repository, planned, open_registry(ctx))
    except RegistryUnavailable as exc:
        if not (dry_run or break_models):
            raise
        models, unknown = None, exc.message
    if not ctx.as_json:
        click.echo("\n".join(filter(None, [describe(planned), describe_impact(cost)])))
        if models is None:
            click.secho(f"  models that this would break: unknown ({unknown})", fg="yellow")
        for model in models or ():
            click.secho(f"  ! would break model {model}", fg="red")
    if models and not break_models:
        impact.refuse_broken_models(models)
    applied = bool(planned.changes) and not dry_run
    if applied:
        apply.apply(repository, planned)
    if ctx.as_json:
        broken = None if models is None else [asdict(model) for model in models]
        changes = [asdict(change) for change in planned.changes]
        ctx.report(
            {"applied": applied, "changes": changes, "redis": cost.as_json(), "broken_models": broken}, ""
        )
    elif applied:
        click.echo(f"Applied {counted(len(planned.changes), 'change')} to project {repository.project}.")


@main.command()
@click.option("--dry-run", is_flag=True, help="Show what would be removed and remove nothing.")
@click.option(
    "--expired-for", default="0s", show_default=True, help="Keep expired rows this much longer: 90s, 36h, 7d."
)
@click.option(
    "--rate",
    default=20_000,
    show_default=True,
    type=click.IntRange(1),
    help="Most keys to pass per second.",
)
@click.option("--whole-project", is_flag=True, help="Allow it where no view is registered: removes all rows.")
@click.pass_obj
def clean(ctx: Context, dry_run: bool, expired_for: str, rate: int, whole_project: bool) -> None:
    """Remove orphans and expired rows from Redis.

    Orphans are rows and fields that no definition claims any more.
    """
    from core.repository import FeastRepository
    from materialization.clean import CleanProgress
    from materialization.clean import clean as remove

    run = partial(
        remove,
        FeastRepository.open(ctx.repo),
        dry_run=dry_run,
        expired_for=duration(expired_for),
        keys_per_second=rate,
        whole_project=whole_project,
    )
    if ctx.as_json or not sys.stderr.isatty():
        report = run()
    else:
        with click.progressbar(length=1, label="  clean", file=sys.stderr) as bar:

            def observe(progress: CleanProgress) -> None:
                bar.length = max(progress.total, 1)
                bar.update(progress.passed - bar.pos)

            report = run(observe=observe)
    ctx.report(report.as_json(), _cleaned(report))


def duration(text: str) -> timedelta:
    """A span of time such as 90s, 15m, 36h or 7d.

    Raises:
        InvalidRequest: it is none.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if not text[:-1].isdecimal() or text[-1] not in units:
        raise InvalidRequest(f"{text!r} is not a duration.", hint="Write it as 90s, 15m, 36h or 7d.")
    return timedelta(seconds=int(text[:-1]) * units[text[-1]])


def _cleaned(report: CleanReport) -> str:
    lines = [
        f"  {counted(rows, 'row')} of {view}, which no definition has"
        for view, rows in report.removed_views.items()
    ]
    if report.features:
        lines.append(f"  {counted(report.features, 'field')} of features that no definition has")
    lines += [f"  {counted(rows, 'row')} of {view} past the ttl" for view, rows in report.expired.items()]
    if report.rewritten:
        lines.append(f"  left alone, because they were being written: {report.rewritten:,}; run it again")
    lines += [f"  left alone, because a materialization holds it: {view}" for view in report.busy]
    size = "" if report.bytes is None else f", about {bytes_text(report.bytes)}"
    if not report.fields:
        return "\n".join([*lines, f"Nothing to remove; {report.looked:,} keys of the project looked at."])
    verb = "To remove" if report.dry_run else "Removed"
    total = f"{verb}: {counted(report.fields, 'field')}, {counted(report.keys, 'whole key')}{size}"
    return "\n".join([*lines, f"{total}; {report.looked:,} keys of the project looked at."])


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
    """Load new and late rows into the online store.

    Each view's rows are held against its expectations first; a view that fails is not loaded, and the exit
    code is 1.
    """
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
    from core.errors import GateFailed

    why = f" ({view.reason})" if view.reason else ""
    if isinstance(view.error, GateFailed):
        text = f"  {view.view}: not loaded, its rows fail the gate{why}"
        lines = [click.style(text, fg="red"), f"    {view.error.hint}"]
    elif view.error is not None:
        lines = [click.style(f"  {view.view}: {view.error.message}", fg="red")]
        lines += [f"    {view.error.hint}"] if view.error.hint else []
    elif view.memory_bytes is not None:
        size = bytes_text(view.memory_bytes)
        lines = [f"  {view.view}: {counted(view.rows, 'row')} due, about {size} of Redis{why}"]
        if not view.ok:
            lines.append(click.style("    would not be loaded: its rows fail the gate", fg="red"))
    else:
        older = f", {view.older:,} older ones left out" if view.older else ""
        forced = ", though they fail the gate" if view.gate and view.gate.forced else ""
        written = counted(view.written, "row")
        lines = [f"  {view.view}: {written} written{older} in {view.seconds:.1f} s{why}{forced}"]
    for finding in view.gate.findings if view.gate else ():
        lines.append(click.style(f"    - {finding}", fg="yellow" if finding.warning else "red"))
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
    """Build a point-in-time training set and its lock.

    With --reproduce, rebuild one from its lock and compare.
    """
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
