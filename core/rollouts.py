"""Rollouts in a registry: what every front door calls to start, move on or stop one.

Knows the registry and the judge's limits; knows no server and no statistics.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from core import traffic
from core.errors import Conflict, InvalidRequest, ModelNotFound
from core.manifest import ModelManifest
from core.registry import CHALLENGER, CHAMPION, Change, ModelRegistry
from core.traffic import Rollout, Step
from core.verdict import Limits

CANARY_PERCENTS = (5.0, 25.0, 50.0, 100.0)
SHADOW_PERCENTS = (100.0,)
# A step is looked at when its rows have come, and at each doubling of them.
LOOKS_PER_STEP = 5


def start(
    registry: ModelRegistry,
    name: str,
    *,
    kind: Literal["canary", "shadow"],
    version: int | None = None,
    steps: Sequence[Step] | None = None,
    limits: Mapping[str, Any] | None = None,
    automatic: bool = True,
    why: str = "",
    who: str | None = None,
) -> Change:
    """Put a version (default: the challenger) on trial beside the champion.

    Raises:
        ModelNotFound: there is no such model or version, or no challenger.
        Conflict: a rollout is under way, or the two versions cannot answer the same requests.
        InvalidRequest: the steps or the limits are not valid, or the judge could never promote.
    """
    Limits.from_json(limits or {})
    if automatic and kind == "canary" and steps and steps[0].percent == 100:
        raise InvalidRequest(
            "A canary that starts at 100 % has no champion beside it, so there is nothing to judge by.",
            hint="Start with fewer, or promote the version at once.",
            field="steps",
        )
    aliases = registry.aliases(name)
    if not aliases:
        registry.require(name)
    chosen = aliases.get(CHALLENGER) if version is None else version
    if chosen is None:
        raise ModelNotFound(f"Model {name!r} has no challenger.", hint="Name a version to put on trial.")
    manifest = registry.manifest(name, chosen)
    champion = aliases.get(CHAMPION, 0)
    if champion:
        check_comparable(registry.manifest(name, champion), manifest)
    percents = CANARY_PERCENTS if kind == "canary" else SHADOW_PERCENTS
    rollout = Rollout(
        id=f"{name}-{chosen}-{secrets.token_hex(4)}",
        kind=kind,
        version=chosen,
        champion=champion,
        steps=tuple(steps or map(Step, percents)),
        began=(datetime.now(tz=UTC),),
        automatic=automatic,
        limits=dict(limits or {}),
    )
    return registry.change(
        name, f"start {kind}", lambda now: traffic.started(now, rollout, name=name), why=why, who=who
    )


def advance(
    registry: ModelRegistry, name: str, seen: Rollout | None, *, why: str = "", who: str | None = None
) -> Change:
    """Take the next step; past the last one a canary is promoted. Raises as ``traffic.advanced`` does."""
    at = datetime.now(tz=UTC)
    action = "advance"
    if seen is not None and seen.is_last_step:
        action = "promote" if seen.kind == "canary" else "end shadow"
    return registry.change(
        name, action, lambda now: traffic.advanced(now, seen, at, name=name), why=why, who=who
    )


def abort(
    registry: ModelRegistry, name: str, seen: Rollout | None, *, why: str = "", who: str | None = None
) -> Change:
    """Give all traffic back to the champion. Raises as ``traffic.aborted`` does."""
    return registry.change(name, "abort", lambda now: traffic.aborted(now, seen, name=name), why=why, who=who)


def check_comparable(champion: ModelManifest, challenger: ModelManifest) -> None:
    """Raise Conflict unless both answer the same requests with the same kind of answer."""
    mine, theirs = champion.schema, challenger.schema
    differ = [
        what
        for what, same in (
            ("the join keys", mine.join_keys == theirs.join_keys),
            ("the request-time inputs", mine.request_inputs == theirs.request_inputs),
            ("the task", champion.task == challenger.task),
            ("the classes", champion.classes == challenger.classes),
        )
        if not same
    ]
    if differ:
        raise Conflict(
            f"Versions {champion.version} and {challenger.version} of model {champion.name!r} differ in "
            f"{', '.join(differ)}: they cannot share traffic.",
            hint="Register it as a model of its own, or promote it when its clients are ready.",
        )


def planned_looks(rollout: Rollout) -> int:
    """How many looks the judge may take over the whole trial."""
    return LOOKS_PER_STEP * len(rollout.steps)


def look_due(rollout: Rollout, evidence: int, now: datetime) -> int | None:
    """The number (from 1) of the planned look for which there is enough, None before the step's first.

    ``evidence`` is how many times there is, in this step, the least that a look needs.
    """
    if evidence < 1 or (now - rollout.began[-1]).total_seconds() < rollout.step.min_seconds:
        return None
    return LOOKS_PER_STEP * rollout.position + min(evidence.bit_length(), LOOKS_PER_STEP)


def next_look_rows(rollout: Rollout, last: int | None) -> int | None:
    """The rows of this step that the judge waits for after its look ``last``; None where none is left."""
    taken = max(0, (last or 0) - LOOKS_PER_STEP * rollout.position)
    return rollout.step.min_rows << taken if taken < LOOKS_PER_STEP else None
