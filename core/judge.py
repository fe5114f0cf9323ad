"""Whether a challenger may replace the champion: what both did in one window of time, held against limits.

Pure: no clock, no I/O. Each check puts bounds around how much worse the challenger is. Wholly beyond the
limit the check fails, wholly within it passes, anything else is inconclusive: too little data never passes.
One failed check aborts; a promotion needs every required check to pass.

A trial is looked at a planned number of times, and every look spends its share of ``alpha``: alpha / looks,
the linear spending function of Lan and DeMets (Biometrika 70, 1983; Kim and DeMets, Biometrika 74, 1987,
rho = 1) with Bonferroni's inequality in place of the joint distribution of the looks, so that it holds
whether windows grow or start anew with each step. Aborting is also split over the checks, since any of them
can; promoting is not, since all of them must (intersection-union test: Berger, Technometrics 24, 1982). The
check for a critical error rate is the exception: its bounds hold at every sample size at once, so it may be
looked at at any time and needs no minimum sample. ADR 0050 has the reasons, docs/rollouts.md the rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from core import intervals
from core.observed import LATENCY_EDGES_SECONDS, Counts, Moments, Observed
from core.verdict import (
    CHECKS,
    LATENCY_CHECKS,
    QUALITY_CHECKS,
    Decision,
    Finding,
    Limits,
    Outcome,
    Verdict,
)

_TAIL = 0.01
_FEWEST_OF_A_CLASS = 10


def judge(
    champion: Observed, challenger: Observed, limits: Limits | None = None, *, look: int, looks: int
) -> Verdict:
    """Compare what both variants did in the same window.

    ``look`` counts the planned looks from 1 to ``looks``, over the whole trial. Any other number stands for a
    look that was not planned: there only a critical error rate can decide. Without rows of the champion it
    excuses nothing, and nothing passes. Raises ``ValueError`` where ``looks`` is below 1.
    """
    if looks < 1:
        raise ValueError("a trial needs one look at least")
    findings = tuple(_Look(champion, challenger, limits or Limits(), look, looks).findings())
    required = [one.outcome for one in findings if one.required]
    decision: Decision = "inconclusive"
    if any(one.outcome == "fail" for one in findings):
        decision = "abort"
    elif required and all(outcome == "pass" for outcome in required):
        decision = "promote"
    return Verdict(decision, findings, look, looks)


class _Look:
    """One look at a trial: both variants and how much alpha there is to spend."""

    def __init__(
        self, champion: Observed, challenger: Observed, limits: Limits, look: int, looks: int
    ) -> None:
        self._champion = champion
        self._challenger = challenger
        self._limits = limits
        self._planned = 1 <= look <= looks
        self._pass_alpha = limits.alpha / looks
        self._fail_alpha = self._pass_alpha / max(1, len(CHECKS) - len(set(limits.without)))

    def findings(self) -> Iterable[Finding]:
        """Every check that is not left out and that there can be data for."""
        checks = {name: getattr(self, f"_{name}") for name in CHECKS if name not in self._limits.without}
        labelled = False
        for name, check in checks.items():
            found = check()
            if found is not None:
                labelled = labelled or name in QUALITY_CHECKS
                yield found
        if self._limits.require_labels and not labelled:
            nothing = None, None, 0.0, -math.inf, math.inf, (0, 0)
            yield Finding("labels", "inconclusive", *nothing, True, "Labels are required and none have come.")

    # Errors

    def _critical_errors(self) -> Finding:
        champion, challenger = _failed(self._champion), _failed(self._challenger)
        alpha = self._fail_alpha / 2
        limit = self._limits.critical_error_rate
        if champion[1]:
            limit = max(limit, intervals.proportion_anytime(*champion, alpha)[1])
        low, high = intervals.proportion_anytime(*challenger, alpha)
        outcome: Outcome = "fail" if low > limit else "pass" if high <= limit else "inconclusive"
        shown = f"; it is at least {low:.1%}, and {limit:.1%} stops a trial at once" if low > limit else ""
        return Finding(
            "critical_errors",
            outcome,
            _ratio(*champion),
            _ratio(*challenger),
            limit,
            low,
            high,
            (self._champion.rows, self._challenger.rows),
            False,
            f"Errors: {_percent(_ratio(*challenger))} of the challenger's rows, "
            f"{_percent(_ratio(*champion))} of the champion's{shown}.",
        )

    def _errors(self) -> Finding:
        """Allowed is the limit, or the champion's rate and ``tolerance`` of it where that is more.

        Failing takes evidence against both, at the whole alpha (intersection-union); passing takes one of
        the two, each at half of it.
        """
        champion, challenger = _failed(self._champion), _failed(self._challenger)
        limit, factor = self._limits.error_rate, 1 + self._limits.tolerance
        low = intervals.proportion(*challenger, self._fail_alpha)[0]
        high = intervals.proportion(*challenger, self._pass_alpha / 2)[1]
        beside_low = intervals.difference(challenger, champion, self._fail_alpha, factor)[0]
        beside_high = intervals.difference(challenger, champion, self._pass_alpha / 2, factor)[1]
        rates = _ratio(*champion), _ratio(*challenger)
        return self._finding(
            "errors",
            rates,
            (low, high),
            low > limit and beside_low > 0,
            high <= limit or beside_high <= 0,
            max(limit, factor * (rates[0] or 0.0)),
            (self._champion.rows, self._challenger.rows),
            enough=min(champion[1], challenger[1]) >= self._limits.min_rows,
            title="Error rate",
            show=_percent,
        )

    # Latency

    def _p99(self) -> Finding:
        low, high = self._p99_of(self._champion)
        limits = self._limits
        allowed = self._lifted(limits.p99_seconds, limits.p99_slack_seconds, low, high)
        return self._latency("p99", allowed, "p99 latency")

    def _p99_increase(self) -> Finding:
        low, high = self._p99_of(self._champion)
        ratio, slack = self._limits.p99_ratio, self._limits.p99_slack_seconds
        allowed = low * ratio + slack, high * ratio + slack
        return self._latency("p99_increase", allowed, "p99 latency beside the champion's")

    def _latency(self, name: str, allowed: tuple[float, float], title: str) -> Finding:
        requests = self._champion.requests, self._challenger.requests
        low, high = self._p99_of(self._challenger)
        surely, maybe = allowed
        return self._finding(
            name,
            (_p99_seen(self._champion.latency), _p99_seen(self._challenger.latency)),
            (low, high),
            low > maybe,
            high <= surely,
            maybe if low > maybe else surely,
            requests,
            enough=min(requests) >= self._limits.min_rows,
            title=title,
            show=_milliseconds,
        )

    def _p99_of(self, variant: Observed) -> intervals.Interval:
        counts = _dense(variant.latency, len(LATENCY_EDGES_SECONDS) + 1)
        low, _ = intervals.upper_quantile(counts, LATENCY_EDGES_SECONDS, _TAIL, self._fail_alpha / 2)
        _, high = intervals.upper_quantile(counts, LATENCY_EDGES_SECONDS, _TAIL, self._pass_alpha / 2)
        return low, high

    # Scores

    def _scores(self) -> Finding:
        bins = max((*self._champion.scores, *self._challenger.scores), default=0) + 1
        counts = _dense(self._champion.scores, bins), _dense(self._challenger.scores, bins)
        rows = sum(counts[0]), sum(counts[1])
        trials = tuple(
            number * variant.independent_rows / variant.rows if variant.rows else 0.0
            for number, variant in zip(rows, (self._champion, self._challenger), strict=True)
        )
        both = trials[0], trials[1]
        distance, low, _ = intervals.distribution_distance(*counts, both, self._fail_alpha)
        _, _, high = intervals.distribution_distance(*counts, both, self._pass_alpha)
        limit = self._limits.score_distance
        return self._finding(
            "scores",
            (0.0, distance) if all(rows) else (None, None),
            (low, high),
            low > limit,
            high <= limit,
            limit,
            rows,
            enough=min(both) >= self._limits.min_rows,
            title="Distance of the scores from the champion's",
            show=_plain,
        )

    # Quality, of rows whose label has come

    def _log_loss(self) -> Finding | None:
        first, second = self._champion.log_loss, self._challenger.log_loss
        if not first.count and not second.count:
            return None
        if min(first.count, second.count) < 2:
            bounds = -math.inf, math.inf
        else:
            bounds = self._normal(
                second.mean - first.mean, first.variance / first.count + second.variance / second.count
            )
        return self._quality(
            "log_loss", "Log loss", (_mean(first), _mean(second)), bounds, self._limits.log_loss_increase, 1
        )

    def _accuracy(self) -> Finding | None:
        variants = self._champion, self._challenger
        first, second = ((float(variant.correct), float(variant.labels)) for variant in variants)
        if not first[1] and not second[1]:
            return None
        bounds = (
            intervals.difference(first, second, self._fail_alpha)[0],
            intervals.difference(first, second, self._pass_alpha)[1],
        )
        values = _ratio(*first), _ratio(*second)
        return self._quality("accuracy", "Accuracy", values, bounds, self._limits.accuracy_drop, -1)

    def _auc(self) -> Finding | None:
        pairs = [(one.positive, one.negative) for one in (self._champion, self._challenger)]
        if not any(positive or negative for positive, negative in pairs):
            return None
        enough = min(sum(counts.values()) for pair in pairs for counts in pair) >= _FEWEST_OF_A_CLASS
        bounds: intervals.Interval = (-math.inf, math.inf)
        values: tuple[float | None, float | None] = None, None
        if enough:
            bins = max(place for pair in pairs for counts in pair for place in counts) + 1
            (first, first_variance), (second, second_variance) = (
                intervals.area_under_curve(_dense(positive, bins), _dense(negative, bins))
                for positive, negative in pairs
            )
            values = first, second
            bounds = self._normal(first - second, first_variance + second_variance)
        return self._quality("auc", "AUC", values, bounds, self._limits.auc_drop, -1)

    def _squared_error(self) -> Finding | None:
        first, second = self._champion.squared_error, self._challenger.squared_error
        if not first.count and not second.count:
            return None
        factor = 1 + self._limits.squared_error_increase
        low, high, limit = -math.inf, math.inf, 0.0
        if min(first.count, second.count) >= 2:
            limit = first.mean * factor
            variance = first.variance * factor**2 / first.count + second.variance / second.count
            low, high = self._normal(second.mean, variance)
        return self._finding(
            "squared_error",
            (_mean(first), _mean(second)),
            (low, high),
            low > limit,
            high <= limit,
            limit,
            (first.count, second.count),
            enough=min(first.count, second.count) >= self._limits.min_labels,
            title="Mean squared error",
            show=_plain,
            labels=True,
        )

    def _normal(self, estimate: float, variance: float) -> intervals.Interval:
        low, _ = intervals.normal(estimate, variance, self._fail_alpha)
        _, high = intervals.normal(estimate, variance, self._pass_alpha)
        return low, high

    def _quality(
        self,
        name: str,
        title: str,
        values: tuple[float | None, float | None],
        bounds: intervals.Interval,
        limit: float,
        sign: int,
    ) -> Finding:
        """A check of a difference; ``sign`` 1 where more is worse, -1 where less is."""
        labels = self._champion.labels, self._challenger.labels
        return self._finding(
            name,
            values,
            bounds,
            bounds[0] > limit,
            bounds[1] <= limit,
            limit,
            labels,
            enough=min(labels) >= self._limits.min_labels and None not in values,
            title=f"{title}, {'rise' if sign > 0 else 'drop'} from the champion's",
            show=_plain,
            labels=True,
            worse=None if None in values else sign * (values[1] - values[0]),  # type: ignore[operator]
        )

    # The common part

    def _lifted(self, limit: float, slack: float, low: float, high: float) -> tuple[float, float]:
        """An absolute limit, lifted where the champion is over it: what is surely and what is maybe allowed.

        ``low`` and ``high`` are the champion's bounds.
        """
        factor = 1 + self._limits.tolerance
        return (
            limit if low <= limit else low * factor + slack,
            limit if high <= limit else high * factor + slack,
        )

    def _finding(
        self,
        name: str,
        values: tuple[float | None, float | None],
        bounds: intervals.Interval,
        fails: bool,
        passes: bool,
        limit: float,
        samples: tuple[int, int],
        *,
        enough: bool,
        title: str,
        show: Callable[[float | None], str],
        labels: bool = False,
        worse: float | None = None,
    ) -> Finding:
        low, high = bounds
        outcome: Outcome = "inconclusive"
        if enough and self._planned:
            outcome = "fail" if fails else "pass" if passes else "inconclusive"
        estimate = worse if worse is not None else values[1]
        against = enough and estimate is not None and estimate > limit
        seen = f"{title}: {show(values[1])} against the champion's {show(values[0])}"
        if name == "scores":
            seen = f"{title}: {show(values[1])}"
        elif worse is not None:
            seen += f", {show(abs(worse))} {'worse' if worse > 0 else 'better'}"
        what = "labels" if labels else "requests" if name in LATENCY_CHECKS else "rows"
        if outcome == "fail":
            known = f"at least {show(low)}, over the limit of {show(limit)}"
        elif outcome == "pass":
            known = f"at most {show(high)}, within the limit of {show(limit)}"
        elif not enough:
            known = f"too few {what}: {samples[1]:,} of the challenger, {samples[0]:,} of the champion"
        elif not self._planned:
            known = "this look was not planned, so it decides nothing"
        else:
            known = f"{_between(low, high, show)}, the limit is {show(limit)}"
        required = self._limits.require_labels or against if labels else True
        return Finding(name, outcome, *values, limit, low, high, samples, required, f"{seen}; {known}.")


def _failed(variant: Observed) -> tuple[float, float]:
    """Errors and rows, as many as there are independent ones."""
    if not variant.rows:
        return 0.0, 0.0
    trials = variant.independent_rows
    return variant.errors / variant.rows * trials, trials


def _p99_seen(latency: Counts) -> float | None:
    """The edge that at most one request in a hundred exceeds, infinite past the last; None without any."""
    left = sum(latency.values()) * _TAIL
    if not left:
        return None
    for place in sorted(latency, reverse=True):
        left -= latency[place]
        if left < 0:
            return LATENCY_EDGES_SECONDS[place] if place < len(LATENCY_EDGES_SECONDS) else math.inf
    return None


def _dense(counts: Counts, bins: int) -> list[int]:
    filled = [0] * bins
    for place, number in counts.items():
        filled[place] = number
    return filled


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Moments) -> float | None:
    return values.mean if values.count else None


def _between(low: float, high: float, show: Callable[[float], str]) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f"between {show(low)} and {show(high)}"
    if math.isfinite(low):
        return f"at least {show(low)} and not bounded above yet"
    return f"at most {show(high)} and not bounded below yet" if math.isfinite(high) else "not bounded yet"


def _percent(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.2%}"


def _milliseconds(value: float | None) -> str:
    if value == math.inf:
        return f"more than {LATENCY_EDGES_SECONDS[-1]:g} s"
    return "nothing" if value is None else f"{value * 1000:.3g} ms"


def _plain(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.3f}"
