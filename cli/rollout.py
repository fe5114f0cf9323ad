"""Commands for rollouts: put a version on trial beside the champion, watch it, move it on, stop it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.main import Context, main
from cli.models import change_data, open_registry, report_change
from core.errors import InvalidRequest

if TYPE_CHECKING:
    from core.registry import ModelRegistry
    from core.traffic import Rollout, Step
    from serving.conductor import Sight

_WHY = click.option("--why", default="", help="Kept in the history.")


@main.group()
def rollout() -> None:
    """Canary and shadow: a version beside the champion."""


@rollout.command()
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="Default: the challenger.")
@click.option(
    "--kind",
    type=click.Choice(["canary", "shadow"]),
    default="canary",
    show_default=True,
    help="A canary answers for a share of the entities; a shadow's predictions nobody sees.",
)
@click.option("--steps", help="Percents, growing.  [default: 5,25,50,100; of a shadow: 100]")
@click.option("--step-seconds", default=300.0, show_default=True, help="Least time of a step.")
@click.option("--step-rows", default=1000, show_default=True, help="Least rows that the version predicts.")
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="A limit of the judge's.")
@click.option("--require-labels", is_flag=True, help="Promote only on quality, once labels have come.")
@click.option("--manual", is_flag=True, help="The judge only tells; a person takes each step.")
@_WHY
@click.pass_obj
def start(
    ctx: Context,
    name: str,
    version: int | None,
    kind: Literal["canary", "shadow"],
    steps: str | None,
    step_seconds: float,
    step_rows: int,
    limits: tuple[str, ...],
    require_labels: bool,
    manual: bool,
    why: str,
) -> None:
    """Put a version on trial."""
    from core import rollouts

    percents = _percents(steps, rollouts.CANARY_PERCENTS if kind == "canary" else rollouts.SHADOW_PERCENTS)
    given: dict[str, Any] = dict(map(_limit, limits))
    if require_labels:
        given["require_labels"] = True
    registry = open_registry(ctx)
    change = rollouts.start(
        registry,
        name,
        kind=kind,
        version=version,
        steps=_steps(percents, step_seconds, step_rows),
        limits=given,
        automatic=not manual,
        why=why,
    )
    report_change(ctx, registry, name, change)


@rollout.command()
@click.argument("name")
@click.option("--watch", is_flag=True, help="Again every two seconds until it ends.")
@click.option(
    "--disagreements",
    type=click.IntRange(1),
    metavar="N",
    help="The newest N rows on which the last shadow and the champion disagreed.",
)
@click.pass_obj
def status(ctx: Context, name: str, watch: bool, disagreements: int | None) -> None:
    """What was seen of both versions, and what the judge says."""
    from datetime import UTC, datetime

    from core.repository import FeastRepository
    from serving.conductor import look_at
    from serving.trial_store import TrialName, read_disagreements

    repository = FeastRepository.open(ctx.repo)
    registry = open_registry(ctx)
    with repository.redis.session() as client:

        def report(data: dict[str, Any], text: str) -> None:
            if disagreements is not None:
                shadow = _last_shadow(registry, name)
                trial = TrialName(repository.project, name, shadow.id)
                rows = data["disagreements"] = read_disagreements(client, trial, most=disagreements)
                text = "\n".join([text, *_disagreement_lines(shadow, rows)])
            ctx.report(data, text)

        while (change := registry.latest(name)) is not None and change.rollout is not None:
            sight = look_at(client, repository.project, name, change.rollout, datetime.now(tz=UTC))
            report(sight.as_json(), _status_text(sight))
            if not watch:
                return
            time.sleep(2)
        report(*_none_under_way(registry, name))


@rollout.command()
@click.argument("name")
@_WHY
@click.pass_obj
def advance(ctx: Context, name: str, why: str) -> None:
    """Take the next step now; past the last one the version is promoted."""
    from core import rollouts

    registry = open_registry(ctx)
    report_change(ctx, registry, name, rollouts.advance(registry, name, None, why=why))


@rollout.command()
@click.argument("name")
@_WHY
@click.pass_obj
def promote(ctx: Context, name: str, why: str) -> None:
    """Make the version on trial champion now, whatever its step."""
    registry = open_registry(ctx)
    _require(registry, name)
    report_change(ctx, registry, name, registry.promote(name, why=why))


@rollout.command()
@click.argument("name")
@_WHY
@click.pass_obj
def abort(ctx: Context, name: str, why: str) -> None:
    """Give all traffic back to the champion."""
    from core import rollouts

    registry = open_registry(ctx)
    report_change(ctx, registry, name, rollouts.abort(registry, name, None, why=why))


def _percents(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return default
    try:
        return tuple(float(part.strip().removesuffix("%")) for part in text.split(","))
    except ValueError as exc:
        raise InvalidRequest(f"--steps {text!r} is no list of percents.", hint="Write 5,25,50,100.") from exc


def _steps(percents: tuple[float, ...], seconds: float, rows: int) -> list[Step]:
    from core.traffic import Step

    return [Step(percent, seconds, rows) for percent in percents]


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip().replace("-", "_"), float(value)
    except ValueError as exc:
        raise InvalidRequest(
            f"--limit {text!r} is not NAME=NUMBER.", hint="Such as error_rate=0.02."
        ) from exc


def _require(registry: ModelRegistry, name: str) -> None:
    from core.errors import Conflict

    change = registry.latest(name)
    if change is None:
        registry.require(name)
    if change is None or change.rollout is None:
        raise Conflict(
            f"Model {name!r} has no rollout under way.", hint=f"Start one: `banquet rollout start {name}`."
        )


def _none_under_way(registry: ModelRegistry, name: str) -> tuple[dict[str, Any], str]:
    """No rollout is under way: how the last one ended, as JSON data and as text."""
    last = registry.latest(name)
    if last is None:
        registry.require(name)
    text = f"{name}: no rollout under way."
    if last is not None:
        text += f" Last change: {last.action} by {last.who}, {last.when:%Y-%m-%d %H:%M:%S} UTC. {last.why}"
    return {"model": name, "rollout": None, "last": last and change_data(last)}, text.rstrip()


def _last_shadow(registry: ModelRegistry, name: str) -> Rollout:
    from core.errors import Conflict

    for entry in reversed(registry.history(name)):
        if entry.rollout is not None and entry.rollout.kind == "shadow":
            return entry.rollout
    raise Conflict(
        f"Model {name!r} has had no shadow, and only a shadow predicts the champion's rows.",
        hint=f"Start one: `banquet rollout start {name} --kind shadow`.",
    )


def _disagreement_lines(shadow: Rollout, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"  disagreements of the shadow of version {shadow.version}: {'' if rows else 'none kept'}".rstrip()
    ]
    for row in rows:
        keys = ", ".join(f"{name}={value}" for name, value in row["entity"].items())
        said = ", ".join(f"{variant} {_said(row[variant])}" for variant in ("champion", "challenger"))
        lines.append(f"    {keys}: {said}; request {row['request_id']}")
    return lines


def _said(answer: dict[str, Any]) -> str:
    score = answer.get("score")
    prediction = "failed" if answer["prediction"] is None else str(answer["prediction"])
    return f"{prediction} ({score:.4g})" if isinstance(score, int | float) else prediction


def _status_text(sight: Sight) -> str:
    rollout = sight.rollout
    step, number = rollout.step, rollout.position + 1
    lines = [
        f"{sight.model}: {rollout.kind} of version {rollout.version} beside {rollout.champion}, "
        f"step {number} of {len(rollout.steps)}, {step.percent:g} %, for {sight.seconds:.0f} s",
        f"  rows       champion {sight.champion.rows:,}, challenger {sight.challenger.rows:,}",
        f"  judge      {_judge_text(sight)}",
    ]
    marks = {"pass": "ok", "fail": "FAIL", "inconclusive": "undecided"}
    if sight.compared.rows:
        compared = sight.compared
        lines.append(f"  compared   {compared.rows:,} rows, {compared.agreement:.2%} of them alike")
    lines += [f"  {marks[finding.outcome]:<11}{finding.text}" for finding in sight.verdict.findings]
    return "\n".join(lines)


def _judge_text(sight: Sight) -> str:
    """What the judge said last and what it waits for."""
    from core import rollouts

    rollout, step = sight.rollout, sight.rollout.step
    if not rollout.automatic:
        return f"would say {sight.verdict.decision}; the rollout is manual: a person decides"
    rows = rollouts.next_look_rows(rollout, sight.last)
    looks = f"look {sight.last} of {rollouts.planned_looks(rollout)}"
    if rows is None:
        return f"{sight.said} at {looks}, the last of this step: a person decides, advance or abort"
    waits = []
    if sight.challenger.rows < rows:
        waits.append(f"{rows:,} rows of the challenger (so far {sight.challenger.rows:,})")
    if rollout.limits.get("require_labels"):
        waits.append("labels of both")
    if sight.seconds < step.min_seconds:
        waits.append(f"{step.min_seconds - sight.seconds:.0f} s more")
    waiting = f"looks next after {' and '.join(waits)}" if waits else "is about to look"
    return waiting if sight.last is None else f"{sight.said} at {looks}; {waiting}"
