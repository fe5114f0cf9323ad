"""Commands that look at the online store: status, verify."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, main

if TYPE_CHECKING:
    from materialization.status import ViewStatus
    from materialization.verify import Difference, Verification

_SHOWN_DIFFERENCES = 20
_RELOAD = "`banquet materialize --views VIEW --start TIME`"
# By materialization.verify.Cause.
_WAYS_OUT = {
    "late row": "it came after the last run; `banquet materialize` loads it",
    "changed definition": "`banquet materialize` loads the view anew",
    "missing entity": f"Redis has lost it; {_RELOAD} loads it anew",
    "foreign write": "a push, a stream or another writer put it there; "
    f"where the source's row is newer, {_RELOAD} puts that back",
}


@main.command()
@click.pass_obj
def status(ctx: Context) -> None:
    """How each view stands online.

    Keys in Redis, the watermark up to which everything is loaded, the newest event and its age, the gate's
    last verdict, and a run that is under way or was interrupted.
    """
    from core.repository import FeastRepository
    from materialization.status import status as look

    views = look(FeastRepository.open(ctx.repo))
    header = f"{'view':<28}{'keys':>12}  {'watermark':<17}  {'newest event':<17}  {'freshness':>10}  gate"
    ctx.report([view.as_json() for view in views], "\n".join([header, *map(_status_line, views)]))


def _status_line(view: ViewStatus) -> str:
    keys = f"{'~' if view.keys_estimated else ''}{view.keys:,}"
    times = [
        moment.strftime("%Y-%m-%d %H:%M") if moment else "never"
        for moment in (view.watermark, view.newest_event)
    ]
    gate = "none" if view.gate is None else "passed" if view.gate["passed"] else "FAILED"
    notes = ""
    if view.running:
        notes = f"  (a run is under way: {view.running})"
    elif view.interrupted_rows is not None:
        notes = f"  (interrupted after {view.interrupted_rows:,} rows; the next run resumes)"
    age = _age(view.freshness)
    line = f"{view.view:<28}{keys:>12}  {times[0]:<17}  {times[1]:<17}  {age:>10}  {gate}{notes}"
    if gate == "FAILED" and view.gate is not None:
        failed = [finding for finding in view.gate["findings"] if finding["severity"] == "error"]
        line += "".join(f"\n  {_finding_text(finding)}" for finding in failed)
        line += "\n  the rows of the last run that passed stay online"
    return line


def _finding_text(finding: Mapping[str, Any]) -> str:
    where = f"{finding['column']}: " if finding["column"] else ""
    rows = "" if finding["rows"] is None else f", {finding['rows']:,} rows"
    return f"{where}{finding['expectation']} {finding['expected']}, observed {finding['observed']}{rows}"


def _age(span: timedelta | None) -> str:
    if span is None:
        return "-"
    seconds = span.total_seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


@main.command()
@click.option("--sample", default=1_000, show_default=True, type=click.IntRange(1), help="Entities per view.")
@click.option("--views", help="Only these views, separated by commas.")
@click.option("--seed", type=int, help="Draw the same sample again.")
@click.pass_obj
def verify(ctx: Context, sample: int, views: str | None, seed: int | None) -> None:
    """Compare rows online with the historical join.

    Exit code 1 where one differs; each difference is named with its cause.
    """
    from core.repository import FeastRepository
    from materialization.verify import verify as compare

    found = compare(
        FeastRepository.open(ctx.repo),
        view_names=[name.strip() for name in views.split(",")] if views else None,
        sample=sample,
        seed=seed,
    )
    ctx.report(found.as_json(), _verification_text(found))
    if not found.ok:
        sys.exit(1)


def _verification_text(found: Verification) -> str:
    lines = []
    for view in found.views:
        if view.error is not None:
            lines.append(click.style(f"{view.view}: {view.error}", fg="red"))
            continue
        harmful = [difference for difference in view.differences if not difference.harmless]
        harmless = len(view.differences) - len(harmful)
        verdict = f"{len(harmful)} differ{'s' if len(harmful) == 1 else ''}" if harmful else "all equal"
        expired = f"; {harmless} expired ones were never loaded" if harmless else ""
        text = f"{view.view}: {view.entities:,} entities compared, {verdict}{expired}"
        lines.append(click.style(text, fg="red" if harmful else None))
        lines += [f"  {_difference_line(difference)}" for difference in harmful[:_SHOWN_DIFFERENCES]]
        if len(harmful) > _SHOWN_DIFFERENCES:
            lines.append(f"  and {len(harmful) - _SHOWN_DIFFERENCES} more; --json lists all")
    causes = {d.cause for view in found.views for d in view.differences if not d.harmless}
    return "\n".join([*lines, *(f"{cause}: {_WAYS_OUT[cause]}" for cause in sorted(causes))])


def _difference_line(difference: Difference) -> str:
    key = ", ".join(f"{name}={value}" for name, value in difference.key.items())
    events = " online, ".join(
        moment.isoformat() if moment else "no row"
        for moment in (difference.online_event, difference.offline_event)
    )
    features = "".join(
        f"; {name}: {online!r} online, {offline!r} offline"
        for name, (online, offline) in difference.features.items()
    )
    return f"{key}: {difference.cause} ({events} offline){features}"
