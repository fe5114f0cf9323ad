"""Leads the rollouts of a server: ships what was seen of them, asks the judge, moves them on.

Every worker of every host runs one; a lock in Redis lets one of them judge at a time, and the registry's
history takes each step only once. Statistics that cannot be read are no evidence: a rollout waits while Redis
is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core import records, rollouts
from core.errors import BanquetError, Conflict, ModelNotFound, RedisUnavailable
from core.judge import judge
from core.observed import Observed
from core.redis import RedisAddress
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.traffic import Rollout
from core.verdict import LATENCY_CHECKS, Limits, Verdict
from serving.trial_store import (
    Comparison,
    TrialName,
    keep_verdict,
    read_comparison,
    read_trial,
    read_verdicts,
    take_look,
    take_turn,
)

if TYPE_CHECKING:  # `banquet rollout status` looks without a server
    from serving.catalog import Catalog

log = logging.getLogger("banquet.serving")

_TURN_SECONDS = 1.0
JUDGE = "judge"


@dataclass(frozen=True, slots=True)
class Sight:
    """A rollout as it stands: what both variants did since its step began, and what to make of it now.

    ``look`` is the planned look that ``verdict`` is of, None between two of them. ``said`` is what the judge
    decided at ``last``, the last of this step's looks that it took; None where it took none.
    """

    model: str
    rollout: Rollout
    champion: Observed
    challenger: Observed
    compared: Comparison
    verdict: Verdict
    look: int | None
    last: int | None = None
    said: str | None = None

    @property
    def seconds(self) -> float:
        """How long the step has been under way."""
        return (datetime.now(tz=UTC) - self.rollout.began[-1]).total_seconds()

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        found: dict[str, Any] = {
            "model": self.model,
            "rollout": records.as_data(self.rollout),
            "step": {
                "position": self.rollout.position,
                "percent": self.rollout.step.percent,
                "seconds": round(self.seconds, 1),
            },
            "rows": {CHAMPION: self.champion.rows, CHALLENGER: self.challenger.rows},
            "errors": {CHAMPION: self.champion.errors, CHALLENGER: self.challenger.errors},
            "judge": {
                "look": self.last,
                "decision": self.said,
                "next_look_rows": rollouts.next_look_rows(self.rollout, self.last),
            },
            "verdict": self.verdict.as_json(),
        }
        if self.compared.rows:
            found["compared"] = {
                "rows": self.compared.rows,
                "agreement": self.compared.agreement,
                "mean_difference": self.compared.mean_difference,
                "largest_difference": self.compared.largest,
            }
        return found


def look_at(
    client: Any, project: str, model: str, rollout: Rollout, now: datetime, *, take: bool = False
) -> Sight:
    """What there is to see of a rollout, and the judge's verdict on it.

    ``take`` spends the planned look that is due; where it was spent already, the verdict knows only critical
    errors. Without it the verdict is what the judge would say if it looked now. At 100 % the champion answers
    nobody, so the challenger is held against what the champion did in the step before. Raises redis-py's
    errors: ``RedisAddress.translated``.
    """
    trial = TrialName(project, model, rollout.id)
    seen = read_trial(client, trial, rollout.position)
    if rollout.kind == "canary" and rollout.step.percent == 100 and rollout.position:
        seen[CHAMPION] = read_trial(client, trial, rollout.position - 1)[CHAMPION]
    limits = Limits.from_json({"min_rows": rollout.step.min_rows, **rollout.limits})
    if rollout.kind == "shadow":
        limits = limits.leaving_out(*LATENCY_CHECKS)
    look = rollouts.look_due(rollout, _evidence(rollout, seen, limits), now)
    if take and look is not None and not take_look(client, trial, look):
        look = None
    looks = rollouts.planned_looks(rollout)
    verdict = judge(seen[CHAMPION], seen[CHALLENGER], limits, look=look or 0, looks=looks)
    if take and look is not None:
        keep_verdict(client, trial, look, verdict.as_json())
    if take:
        return Sight(model, rollout, seen[CHAMPION], seen[CHALLENGER], Comparison(), verdict, look)
    first = rollouts.LOOKS_PER_STEP * rollout.position + 1
    said = {look: said for look, said in read_verdicts(client, trial).items() if look >= first}
    last = max(said, default=None)
    return Sight(
        model,
        rollout,
        seen[CHAMPION],
        seen[CHALLENGER],
        read_comparison(client, trial),
        verdict,
        look,
        last,
        said[last]["decision"] if last is not None else None,
    )


def _evidence(rollout: Rollout, seen: Mapping[str, Observed], limits: Limits) -> int:
    """How many times there is what a look needs: rows, and labels where a promotion needs them.

    Looks that came before their labels would be spent on nothing.
    """
    enough = seen[CHALLENGER].rows // rollout.step.min_rows
    if limits.require_labels:
        labels = min(variant.labels for variant in seen.values())
        enough = min(enough, labels // max(1, limits.min_labels))
    return enough


class Conductor:
    """The rollouts of the models that ``catalog`` serves."""

    def __init__(
        self, catalog: Catalog, registry: ModelRegistry, address: RedisAddress, project: str
    ) -> None:
        self._catalog = catalog
        self._registry = registry
        self._address = address
        self._project = project
        self._task: asyncio.Task[None] | None = None

    @cached_property
    def _client(self) -> Any:
        return self._address.client()

    async def start(self) -> None:
        """Begin to lead."""
        self._task = asyncio.create_task(self._lead())

    async def stop(self) -> None:
        """Ship what was seen and stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for deployment in self._catalog.deployments.values():
            if deployment.trial is not None:
                await asyncio.to_thread(deployment.trial.recorder.close)

    def status(self, model: str) -> Sight:
        """The rollout under way; raises ModelNotFound where there is none. Blocking."""
        change = self._registry.latest(model)
        if change is None or change.rollout is None:
            raise ModelNotFound(
                f"Model {model!r} has no rollout under way.",
                hint=f"Start one: `banquet rollout start {model}`.",
            )
        with self._address.translated():
            return look_at(self._client, self._project, model, change.rollout, datetime.now(tz=UTC))

    async def _lead(self) -> None:
        while True:
            await asyncio.sleep(_TURN_SECONDS)
            moved = False
            for recorder in self._catalog.ended_recorders():
                await asyncio.to_thread(recorder.close)
            for name, deployment in list(self._catalog.deployments.items()):
                rollout = deployment.change.rollout
                if rollout is None:
                    continue
                try:
                    if deployment.trial is not None:
                        await asyncio.to_thread(deployment.trial.recorder.flush)
                    moved |= await asyncio.to_thread(self._turn, name, rollout)
                except RedisUnavailable as exc:
                    log.debug("the rollout of %s waits: %s", name, exc)
                except Conflict:
                    moved = True  # another worker was first
                except BanquetError as exc:
                    log.warning("the rollout of %s waits: %s", name, exc)
                except Exception:
                    log.exception("the rollout of %s cannot be led", name)
            if moved:
                await self._catalog.refresh_models()

    def _turn(self, name: str, rollout: Rollout) -> bool:
        """Judge, and act on it; whether anything changed."""
        refused = self._catalog.refused.get((name, rollout.version))
        if refused is not None:
            self._abort(name, rollout, f"version {rollout.version} failed its checks: {refused.message}")
            return True
        if not rollout.automatic:
            return False
        with self._address.translated():
            if not take_turn(self._client, TrialName(self._project, name, rollout.id), _TURN_SECONDS):
                return False
            now = datetime.now(tz=UTC)
            sight = look_at(self._client, self._project, name, rollout, now, take=True)
        if sight.verdict.decision == "abort":
            self._abort(name, rollout, " ".join(sight.verdict.reasons))
        elif sight.verdict.decision == "promote":
            rows = f"{sight.challenger.rows:,} rows beside {sight.champion.rows:,} of the champion"
            why = f"Every check passed at look {sight.look} of {sight.verdict.looks}: {rows}."
            rollouts.advance(self._registry, name, rollout, why=why, who=JUDGE)
        else:
            return False
        return True

    def _abort(self, name: str, rollout: Rollout, why: str) -> None:
        rollouts.abort(self._registry, name, rollout, why=why, who=JUDGE)
        log.error("the rollout of %s version %d is aborted: %s", name, rollout.version, why)
