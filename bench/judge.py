"""How often the judge is wrong, and how soon it is right: simulated canaries of known truth.

    python bench/judge.py [--trials 1000]

A trial is a canary of 5, 25, 50 and 100 % with five planned looks a step, at 1,000, 2,000, ... 16,000 rows of
the challenger, and looks for critical errors in between; at 100 % the champion's rows are those of the step
before. Seeded: the same command gives the same numbers. Writes bench/results/judge.json and judge.svg, and
the table of docs/rollouts.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import report  # noqa: E402 — the folder is no package: its files are scripts

from core import intervals  # noqa: E402
from core.judge import judge  # noqa: E402
from core.observed import (  # noqa: E402
    LATENCY_EDGES_SECONDS,
    LEAST_PROBABILITY,
    PROBABILITY_EDGES,
    Moments,
    Observed,
)
from core.verdict import Limits  # noqa: E402

Array = NDArray[Any]

SHARES = (0.05, 0.25, 0.5, 1.0)
LOOKS_AT = (1_000, 2_000, 4_000, 8_000, 16_000)
# Looks that are not planned, in the first step: a server looks every second.
BETWEEN = (5, 10, 20, 50, 100, 200, 500)
LOOKS = len(SHARES) * len(LOOKS_AT)
DOCUMENT = HERE.parent / "docs" / "rollouts.md"

_SCORE_POINTS = np.array([0.0, *PROBABILITY_EDGES, 1.0])
_SCORES = (_SCORE_POINTS[1:] + _SCORE_POINTS[:-1]) / 2


@dataclass(frozen=True)
class Variant:
    """What a variant does, as the simulation knows it; scores stand for a rare-ish class (Beta(2, 4)).

    ``shuffled`` is the share of rows that get the score of another row: the distribution stays, the knowledge
    goes. Rows of a request of ``rows_per_request`` fail together.
    """

    error_rate: float = 0.001
    median_seconds: float = 0.005
    added_seconds: float = 0.0
    reversed: bool = False
    shift: float = 0.0
    shuffled: float = 0.0
    rows_per_request: int = 1

    def latency(self) -> Array:
        """The probability of each latency bucket: lognormal, sigma 0.4."""
        edges = np.array([0.0, *LATENCY_EDGES_SECONDS, np.inf]) - self.added_seconds
        return np.diff(stats.lognorm(0.4, scale=self.median_seconds).cdf(edges))

    def scores(self) -> Array:
        """The probability of each score bin, times that of the label given the bin: shape (2, bins)."""
        points = _SCORE_POINTS if not self.reversed else 1 - _SCORE_POINTS[::-1]
        marginal = np.diff(stats.beta(2, 4).cdf(np.clip(points - self.shift, 0, 1)))
        truth = _SCORES
        if self.reversed:
            marginal, truth = marginal[::-1], 1 - _SCORES
        chance = truth * (1 - self.shuffled) + self.shuffled * float(marginal @ truth)
        return np.stack([marginal * (1 - chance), marginal * chance])


@dataclass(frozen=True)
class Scenario:
    """A challenger, the champion beside it, and the right verdict; without ``paid`` a look costs no alpha."""

    challenger: Variant | None
    right: str
    champion: Variant = Variant()
    labels: bool = False
    limits: Limits = field(default_factory=Limits)
    paid: bool = True


def shuffled_for(accuracy_drop: float) -> float:
    """The share of rows to shuffle for a drop of accuracy; accuracy falls in proportion to it."""
    return accuracy_drop / (_accuracy(Variant()) - _accuracy(Variant(shuffled=1.0)))


def _accuracy(variant: Variant) -> float:
    negative, positive = variant.scores()
    return float(np.where(_SCORES > 0.5, positive, negative).sum())


# As hard as it gets: an identical challenger is at the limit of every check.
NO_WORSE = Limits(
    error_rate=0.001,
    p99_ratio=1.0,
    p99_slack_seconds=0.0,
    score_distance=0.0,
    log_loss_increase=0.0,
    accuracy_drop=0.0,
    auc_drop=0.0,
    tolerance=0.0,
)
ACCURACY_ONLY = Limits(require_labels=True).leaving_out("log_loss", "auc")
SCENARIOS = {
    "identical": Scenario(Variant(), "promote"),
    "identical, labels": Scenario(Variant(), "promote", labels=True),
    "identical, both 5 % errors": Scenario(Variant(0.05), "promote", Variant(0.05)),
    "identical, 0.9 % errors, 20 rows at once": Scenario(
        Variant(0.009, rows_per_request=20), "not abort", Variant(0.009, rows_per_request=20)
    ),
    "identical, every limit at nothing": Scenario(Variant(), "not abort", labels=True, limits=NO_WORSE),
    "the same, looks not paid for": Scenario(
        Variant(), "not abort", labels=True, limits=NO_WORSE, paid=False
    ),
    "no traffic": Scenario(None, "inconclusive"),
    "NaN for every row": Scenario(Variant(1.0), "abort"),
    "25 % errors": Scenario(Variant(0.25), "abort"),
    "5 % errors": Scenario(Variant(0.05), "abort"),
    "2 % errors": Scenario(Variant(0.02), "abort"),
    "+50 ms": Scenario(Variant(added_seconds=0.05), "abort"),
    "wrong model: scores reversed": Scenario(Variant(reversed=True), "abort"),
    "wrong model: scores shuffled, no labels": Scenario(Variant(shuffled=1.0), "abort"),
    "wrong model: scores shuffled, labels": Scenario(Variant(shuffled=1.0), "abort", labels=True),
    "accuracy -5 points": Scenario(Variant(shuffled=shuffled_for(0.05)), "abort", labels=True),
    "accuracy -5 points, no other quality check": Scenario(
        Variant(shuffled=shuffled_for(0.05)), "abort", labels=True, limits=ACCURACY_ONLY
    ),
    "accuracy -2 points, the limit itself": Scenario(
        Variant(shuffled=shuffled_for(0.02)), "not promote", labels=True, limits=ACCURACY_ONLY
    ),
    "1 % errors, the limit itself": Scenario(Variant(0.01), "not promote", Variant(0.0)),
}


def windows(variant: Variant, rows: list[int], trials: int, rng: np.random.Generator, *, labels: bool) -> Any:
    """What the variant did in growing windows of ``rows``: a function of trial and window."""
    steps = np.diff([0, *rows])
    requests = steps // variant.rows_per_request
    latency, scores, errors, losses = [], [], [], []
    loss = -np.log(np.maximum(np.stack([1 - _SCORES, _SCORES]), LEAST_PROBABILITY)).ravel()
    for number in requests.tolist():
        latency.append(rng.multinomial(number, variant.latency(), trials))
        failed = rng.binomial(number, variant.error_rate, trials) * variant.rows_per_request
        errors.append(failed)
        chances = variant.scores().ravel()
        left = number * variant.rows_per_request - failed
        scores.append(rng.multinomial(left, chances / chances.sum()))
    latency, scores, errors = (np.cumsum(np.stack(one), axis=0) for one in (latency, scores, errors))
    losses = np.stack([scores @ loss, scores @ loss**2], axis=-1)
    by_label = scores.reshape(*scores.shape[:2], 2, -1)
    correct = np.where(_SCORES > 0.5, by_label[:, :, 1], by_label[:, :, 0]).sum(axis=-1)
    totals = np.cumsum(requests)

    def at(trial: int, window: int) -> Observed:
        negative, positive = by_label[window, trial]
        number = int(totals[window]) * variant.rows_per_request
        found = Observed(
            rows=number,
            errors=int(errors[window, trial]),
            rows_squared=number * variant.rows_per_request,
            latency=_sparse(latency[window, trial]),
            scores=_sparse(negative + positive),
        )
        if not labels:
            return found
        # A label each for every row: the best case for the quality checks.
        count = int(negative.sum() + positive.sum())
        return replace(
            found,
            labels=count,
            correct=int(correct[window, trial]),
            log_loss=Moments(count, *losses[window, trial].tolist()),
            positive=_sparse(positive),
            negative=_sparse(negative),
        )

    return at


def _sparse(counts: Array) -> dict[int, int]:
    places = np.flatnonzero(counts)
    return dict(zip(places.tolist(), counts[places].tolist(), strict=True))


def simulate(scenario: Scenario, trials: int, seed: int) -> dict[str, Any]:
    """Verdicts of many trials, the challenger's rows and all rows until then, and aborts over all looks.

    ``all_looks`` goes on after a promotion would have been given: the share of trials that are aborted at
    any of the looks, which alpha bounds for a challenger that is as good.
    """
    rng = np.random.default_rng(seed)
    verdicts = {"promote": 0, "abort": 0, "inconclusive": 0}
    challenger_rows: dict[str, list[int]] = {name: [] for name in verdicts}
    all_rows: dict[str, list[int]] = {name: [] for name in verdicts}
    checks: dict[str, int] = {}
    aborted_anywhere = 0
    sources = [_step(scenario, share, trials, rng, first=not place) for place, share in enumerate(SHARES)]
    for trial in range(trials):
        verdict, mine, all_of_them, aborted = "", 0, 0, False
        for place, (share, source) in enumerate(zip(SHARES, sources, strict=True)):
            step_verdict, step_rows = "", 0
            for rows, look, champion, challenger in source(trial, place):
                looks = LOOKS if scenario.paid else 1
                found = judge(champion, challenger, scenario.limits, look=min(look, looks), looks=looks)
                aborted = aborted or found.decision == "abort"
                if step_verdict or verdict:
                    continue
                step_rows = rows
                if found.decision != "inconclusive":
                    step_verdict = found.decision
                    for one in found.findings:
                        checks[one.name] = checks.get(one.name, 0) + (one.outcome == "fail")
            if verdict:
                continue
            mine, all_of_them = mine + step_rows, all_of_them + round(step_rows / share)
            if step_verdict != "promote":
                verdict = step_verdict or "inconclusive"
            elif share == SHARES[-1]:
                verdict = "promote"
        aborted_anywhere += aborted
        verdicts[verdict] += 1
        challenger_rows[verdict].append(mine)
        all_rows[verdict].append(all_of_them)
    return {
        "trials": trials,
        "right": scenario.right,
        "verdicts": {name: count / trials for name, count in verdicts.items()},
        "all_looks": aborted_anywhere / trials,
        "challenger_rows": {name: median(found) for name, found in challenger_rows.items() if found},
        "all_rows": {name: median(found) for name, found in all_rows.items() if found},
        "failed_checks": {name: count / trials for name, count in checks.items() if count},
    }


def _step(scenario: Scenario, share: float, trials: int, rng: np.random.Generator, *, first: bool) -> Any:
    """One step of all trials: for a trial, the looks with their rows, number and both variants."""
    if scenario.challenger is None:
        return lambda _, place: [
            (0, 1 + n + place * len(LOOKS_AT), Observed(rows=1), Observed()) for n in range(len(LOOKS_AT))
        ]
    looks_at = [*(BETWEEN if first else ()), *LOOKS_AT]
    per_request = scenario.challenger.rows_per_request
    looks_at = [max(per_request, rows // per_request * per_request) for rows in looks_at]
    champion_share = min(share, 0.5)
    times = round((1 - champion_share) / champion_share)
    challenger = windows(scenario.challenger, looks_at, trials, rng, labels=scenario.labels)
    champion = windows(
        scenario.champion, [rows * times for rows in looks_at], trials, rng, labels=scenario.labels
    )
    between = len(looks_at) - len(LOOKS_AT)

    def looks(trial: int, place: int) -> Any:
        for n, rows in enumerate(looks_at):
            number = 0 if n < between else 1 + n - between + place * len(LOOKS_AT)
            yield rows, number, champion(trial, n), challenger(trial, n)

    return looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1_000)
    arguments = parser.parse_args()
    # The same questions come again and again where samples have planned sizes.
    for name in ("critical_counts", "proportion", "proportion_anytime"):
        setattr(intervals, name, cache(getattr(intervals, name)))

    found = {}
    for seed, (name, scenario) in enumerate(SCENARIOS.items()):
        began = time.process_time()
        found[name] = simulate(scenario, arguments.trials, seed)
        print(f"{name:42} {found[name]['verdicts']} {time.process_time() - began:.0f} s", flush=True)
    rows = []
    for name, one in found.items():
        verdicts = one["verdicts"]
        usual = max(verdicts, key=lambda verdict: verdicts[verdict])
        shares = [f"{verdicts[verdict]:.1%}" for verdict in ("promote", "abort", "inconclusive")]
        until = one["challenger_rows"][usual]
        checks = one["failed_checks"]
        most = max(checks, key=lambda check: checks[check]) if checks else ""
        rows.append([name, one["right"], *shares, most, f"{until:,.0f}", f"{one['all_rows'][usual]:,.0f}"])
    header = ["the challenger", "right", "promote", "abort", "inconclusive", "fails most"]
    header += ["its rows until then (median)", "rows of both"]
    text = report.table(header, rows)
    print(text)
    limits = Limits().as_json()
    report.write_json("judge", {"machine": report.machine(), "limits": limits, "scenarios": found})
    groups = {
        name: {usual: float(rows)}
        for name, one in found.items()
        for usual in [max(one["verdicts"], key=lambda verdict: one["verdicts"][verdict])]
        if (rows := one["challenger_rows"][usual]) and one["right"] == usual
    }
    report.bar_chart("judge", "How soon the judge knows", "Rows of the challenger until the verdict", groups)
    identical = [one["all_looks"] for name, one in found.items() if name.startswith("identical")]
    note = (
        f"{arguments.trials:,} trials a row, seeded (`make bench-judge`). Over all {LOOKS} looks, even those "
        f"after a promotion, an identical challenger is aborted in at most {max(identical):.1%} of the "
        f"trials, also where every limit is at nothing; alpha is {limits['alpha']:.0%}. If looks were not "
        f"paid for, it would be {found['the same, looks not paid for']['all_looks']:.1%} there."
    )
    if not report.replace_section(DOCUMENT, "judge", f"{text}\n\n{note}"):
        print(f"{DOCUMENT.name} has no section for the table")


if __name__ == "__main__":
    main()
