"""How much worse a challenger may be, and what the judge says of it: limits, findings, a verdict.

Frozen records and their JSON. Pure; knows nothing of how a finding is come by: that is ``core.judge``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from core.errors import InvalidRequest

Outcome = Literal["pass", "fail", "inconclusive"]
Decision = Literal["promote", "abort", "inconclusive"]

CHECKS = (
    "critical_errors",
    "errors",
    "p99",
    "p99_increase",
    "scores",
    "log_loss",
    "accuracy",
    "auc",
    "squared_error",
)
QUALITY_CHECKS = ("log_loss", "accuracy", "auc", "squared_error")
# A shadow's latency is not what a client waits for.
LATENCY_CHECKS = ("p99", "p99_increase")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much worse a challenger may be, and how sure the judge has to be.

    ``error_rate`` and ``p99_seconds`` are absolute; where the champion itself is over one, the challenger may
    be as bad and ``tolerance``, a share of the champion's value, worse. ``critical_error_rate`` aborts at
    once, unless the champion may be as bad. ``p99_ratio`` and ``p99_slack_seconds`` limit the challenger's
    p99 to champion * ratio + slack. ``score_distance`` is a Kolmogorov-Smirnov distance: at no threshold may
    the share of rows above it move by more. ``log_loss_increase`` is in nats, the two drops are absolute,
    ``squared_error_increase`` is relative.

    ``min_rows`` counts independent rows (see ``Observed``) or requests, ``min_labels`` rows with a label, per
    variant. Without ``require_labels`` a promotion waits for a quality check only when there are enough
    labels and they speak against the challenger. ``without`` names checks to leave out.
    Raises ``InvalidRequest``.
    """

    error_rate: float = 0.01
    critical_error_rate: float = 0.2
    p99_seconds: float = 0.5
    p99_ratio: float = 1.2
    p99_slack_seconds: float = 0.01
    score_distance: float = 0.1
    log_loss_increase: float = 0.05
    accuracy_drop: float = 0.02
    auc_drop: float = 0.02
    squared_error_increase: float = 0.1
    tolerance: float = 0.2
    min_rows: int = 500
    min_labels: int = 500
    alpha: float = 0.05
    require_labels: bool = False
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "require_labels":
                right = isinstance(value, bool)
            elif one.name == "without":
                right = all(name in CHECKS for name in value)
            elif one.name == "alpha":
                right = _is_number(value) and 0 < value <= 0.5
            else:
                right = _is_number(value) and value >= 0
            if not right:
                raise InvalidRequest(
                    f"The limit {one.name} is {value!r}.",
                    hint=f"Checks are {', '.join(CHECKS)}."
                    if one.name == "without"
                    else "Limits are numbers of 0 or more, alpha is above 0 and at most 0.5.",
                )

    def leaving_out(self, *checks: str) -> Limits:
        """These limits without some checks."""
        return replace(self, without=tuple(sorted({*self.without, *checks})))

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "without": list(self.without)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Limits:
        """The limits that ``as_json`` gives, defaults for what is missing; raises ``InvalidRequest``."""
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InvalidRequest(f"There is no limit {unknown[0]}.", hint=f"Limits: {', '.join(known)}.")
        without = given.get("without", ())
        if not isinstance(without, list | tuple):
            raise InvalidRequest(f"The limit without is {without!r}.", hint="It is a list of checks.")
        return cls(**{**given, "without": tuple(without)})


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: it fails where ``low`` is above ``limit``, passes where ``high`` is not.

    ``champion`` and ``challenger`` are the values compared, None without data. ``low`` and ``high`` are
    bounds of the challenger's value, or of the difference where the limit is one, each at this look's share
    of alpha. ``samples`` are the champion's and the challenger's. A promotion waits for a ``required`` check.
    """

    name: str
    outcome: Outcome
    champion: float | None
    challenger: float | None
    limit: float
    low: float
    high: float
    samples: tuple[int, int]
    required: bool
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with the challenger, and every check that led to it."""

    decision: Decision
    findings: tuple[Finding, ...]
    look: int
    looks: int

    @property
    def reasons(self) -> list[str]:
        """The sentences that decided: of what failed, else of what a promotion waits for, else of all."""
        failed = [one.text for one in self.findings if one.outcome == "fail"]
        waiting = [one.text for one in self.findings if one.required and one.outcome != "pass"]
        return failed or waiting or [one.text for one in self.findings if one.required]

    def as_json(self) -> dict[str, Any]:
        """A JSON object; an infinite bound is null."""
        findings = [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in asdict(one).items()
            }
            for one in self.findings
        ]
        return {"decision": self.decision, "look": self.look, "looks": self.looks, "findings": findings}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
