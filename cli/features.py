"""Commands for definitions and data: apply, materialize, dataset."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, main
from core.errors import InvalidRequest

if TYPE_CHECKING:
    from core.repository import FeastRepository
    from materialization.apply import ApplyPlan

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
@click.option("--service", required=True, help="Feature service to join.")
@click.option(
    "--entities",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet or CSV file with join keys, event_timestamp and request-time inputs.",
)
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet to write."
)
@click.pass_obj
def dataset(ctx: Context, service: str, entities: Path, output: Path) -> None:
    """Build a point-in-time training set and its lock."""
    from core.dataset import training_dataset

    from core.repository import FeastRepository

    built = training_dataset(FeastRepository.open(ctx.repo), service, entities, output=output)
    data: dict[str, Any] = {
        "rows": built.lock.rows,
        "output": str(output),
        "lock": str(built.lock_path),
        "digest": built.lock.content_digest,
    }
    ctx.report(data, f"{built.lock.rows:,} rows in {output}, lock in {built.lock_path}.")
