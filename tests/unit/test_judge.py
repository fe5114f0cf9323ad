"""The judge: what it decides, what can never happen, and its statistics beside those of scipy and sklearn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from core import intervals
from core.errors import InvalidRequest
from core.judge import judge
from core.observed import (
    LATENCY_EDGES_SECONDS,
    PROBABILITY_EDGES,
    Moments,
    Observed,
    histogram,
    value_edges,
)
from core.verdict import CHECKS, LATENCY_CHECKS, Limits

LAST = {"look": 5, "looks": 10}


def observed(
    rows: int = 20_000,
    *,
    error_rate: float = 0.0,
    seconds: float = 0.005,
    shift: float = 0.0,
    seed: int = 1,
    labels: int = 0,
    quality: float = 1.0,
) -> Observed:
    """A variant that answered ``rows`` requests of one row; its scores are calibrated where quality is 1."""
    rng = np.random.default_rng(seed)
    errors = round(rows * error_rate)
    latency = seconds * rng.lognormal(0, 0.3, rows)
    scores = np.clip(rng.beta(2, 4, rows - errors) + shift, 0.001, 0.999)
    found = Observed(
        rows=rows,
        errors=errors,
        rows_squared=rows,
        latency=histogram(latency, LATENCY_EDGES_SECONDS),
        scores=histogram(scores, PROBABILITY_EDGES),
    )
    if not labels:
        return found
    score = scores[:labels]
    chance = np.where(rng.random(len(score)) < quality, score, score.mean())
    truth = rng.random(len(score)) < chance
    return replace(
        found,
        labels=len(score),
        correct=int(((score > 0.5) == truth).sum()),
        log_loss=Moments.of(-np.log(np.where(truth, score, 1 - score))),
        positive=histogram(score[truth], PROBABILITY_EDGES),
        negative=histogram(score[~truth], PROBABILITY_EDGES),
    )


CHAMPION = observed()

DECISIONS = {
    "the same again": (CHAMPION, observed(seed=2), "promote", None),
    "no traffic at all": (Observed(), Observed(), "inconclusive", None),
    "no traffic for the challenger": (CHAMPION, Observed(), "inconclusive", None),
    "no traffic for the champion": (Observed(), observed(seed=2), "inconclusive", None),
    "a few good rows": (CHAMPION, observed(100, seed=2), "inconclusive", None),
    "5 % errors": (CHAMPION, observed(5_000, error_rate=0.05, seed=2), "abort", "errors"),
    "errors, and the champion has as many": (
        observed(error_rate=0.05),
        observed(error_rate=0.05, seed=2),
        "promote",
        None,
    ),
    "many errors, and the champion has as many": (
        observed(error_rate=0.9),
        observed(error_rate=0.9, seed=2),
        "promote",
        None,
    ),
    "errors, and twice the champion's": (
        observed(error_rate=0.05),
        observed(error_rate=0.1, seed=2),
        "abort",
        "errors",
    ),
    "30 rows, none a number": (CHAMPION, observed(30, error_rate=1.0, seed=2), "abort", "critical_errors"),
    "the same without a champion": (
        Observed(),
        observed(30, error_rate=1.0, seed=2),
        "abort",
        "critical_errors",
    ),
    "one bad row": (CHAMPION, observed(1, error_rate=1.0, seed=2), "inconclusive", None),
    "50 ms slower": (CHAMPION, observed(seconds=0.055, seed=2), "abort", "p99_increase"),
    "5 ms slower": (CHAMPION, observed(seconds=0.008, seed=2), "promote", None),
    "half a second": (
        observed(seconds=0.2),
        observed(seconds=0.3, seed=2),
        "abort",
        "p99",
    ),
    "as slow as a slow champion": (
        observed(seconds=0.4),
        observed(seconds=0.4, seed=2),
        "promote",
        None,
    ),
    "other scores": (CHAMPION, observed(shift=0.3, seed=2), "abort", "scores"),
    "labels, as good": (observed(labels=20_000), observed(labels=20_000, seed=2), "promote", None),
    "labels, no better than the base rate": (
        observed(labels=20_000),
        observed(labels=20_000, quality=0.0, seed=2),
        "abort",
        "auc",
    ),
    "too few labels to tell": (observed(labels=100), observed(labels=100, seed=2), "promote", None),
}


@pytest.mark.parametrize(
    ("champion", "challenger", "decision", "failed"), DECISIONS.values(), ids=DECISIONS.keys()
)
def test_decides(champion: Observed, challenger: Observed, decision: str, failed: str | None) -> None:
    verdict = judge(champion, challenger, **LAST)
    assert verdict.decision == decision, verdict.reasons
    if failed:
        assert failed in {one.name for one in verdict.findings if one.outcome == "fail"}
    assert all(reason.endswith(".") for reason in verdict.reasons)
    json.dumps(verdict.as_json(), allow_nan=False)


def test_a_request_with_many_bad_rows_is_one_piece_of_evidence() -> None:
    rows = 1_000
    one = replace(
        observed(rows, error_rate=1.0), rows_squared=rows**2, latency=histogram([0.1], LATENCY_EDGES_SECONDS)
    )
    assert one.independent_rows == 1
    assert judge(CHAMPION, one, **LAST).decision == "inconclusive"


def test_checks_can_be_left_out() -> None:
    slow = observed(seconds=0.8, seed=2)
    assert judge(CHAMPION, slow, **LAST).decision == "abort"
    verdict = judge(CHAMPION, slow, Limits().leaving_out(*LATENCY_CHECKS), **LAST)
    assert verdict.decision == "promote"
    assert not set(LATENCY_CHECKS) & {one.name for one in verdict.findings}
    assert judge(CHAMPION, slow, Limits(without=CHECKS), **LAST).decision == "inconclusive"


def test_only_a_critical_breach_decides_at_a_look_that_was_not_planned() -> None:
    for look in (0, 11):
        assert judge(CHAMPION, observed(seed=2), look=look, looks=10).decision == "inconclusive"
        bad = observed(5_000, error_rate=0.05, seed=2)
        assert judge(CHAMPION, bad, look=look, looks=10).decision == "inconclusive"
        worst = observed(100, error_rate=1.0, seed=2)
        assert judge(CHAMPION, worst, look=look, looks=10).decision == "abort"
    with pytest.raises(ValueError, match="one look"):
        judge(CHAMPION, CHAMPION, look=1, looks=0)


def test_labels_can_be_made_a_condition() -> None:
    limits = Limits(require_labels=True)
    few = observed(labels=100), observed(labels=100, seed=2)
    assert judge(*few, limits, **LAST).decision == "inconclusive"
    many = observed(labels=20_000), observed(labels=20_000, seed=2)
    assert judge(*many, limits, **LAST).decision == "promote"
    assert judge(CHAMPION, observed(seed=2), limits, **LAST).decision == "inconclusive"


def test_labels_that_speak_against_the_challenger_hold_a_promotion_up() -> None:
    champion = observed(labels=800)
    worse = observed(labels=800, seed=2)
    worse = replace(worse, correct=champion.correct - 40)
    verdict = judge(champion, worse, **LAST)
    assert verdict.decision == "inconclusive"
    assert any("Accuracy" in reason for reason in verdict.reasons)


def test_a_regressor_is_judged_by_its_squared_error() -> None:
    rng = np.random.default_rng(3)

    def with_errors(base: Observed, spread: float) -> Observed:
        return replace(base, squared_error=Moments.of(rng.normal(0, spread, 20_000) ** 2))

    champion = with_errors(CHAMPION, 1.0)
    assert judge(champion, with_errors(observed(seed=2), 1.0), **LAST).decision == "promote"
    worse = judge(champion, with_errors(observed(seed=2), 1.3), **LAST)
    assert [one.name for one in worse.findings if one.outcome == "fail"] == ["squared_error"]


@pytest.mark.parametrize(
    "given_limits", [{"error_rate": -1}, {"alpha": 0}, {"alpha": True}, {"without": ("speed",)}, {"speed": 1}]
)
def test_wrong_limits_are_refused(given_limits: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        Limits.from_json(given_limits)


def test_limits_survive_json() -> None:
    limits = Limits(error_rate=0.02).leaving_out("p99")
    assert Limits.from_json(json.loads(json.dumps(limits.as_json()))) == limits


# What can never happen


counts = st.dictionaries(st.integers(0, 160), st.integers(1, 5_000), max_size=6)
sums = st.builds(Moments, st.integers(0, 1_000), st.integers(0, 500), st.integers(0, 2_000))


@st.composite
def any_observed(draw: Callable[..., object]) -> Observed:
    rows = draw(st.integers(0, 20_000))
    labels = draw(st.integers(0, 3_000))
    return Observed(
        rows=rows,
        errors=draw(st.integers(0, rows)),
        rows_squared=rows * draw(st.integers(1, 20)),
        latency=draw(counts),
        scores=draw(counts),
        labels=labels,
        correct=draw(st.integers(0, labels)),
        log_loss=draw(sums),
        positive=draw(counts),
        negative=draw(counts),
        squared_error=draw(sums),
    )


@given(any_observed(), any_observed(), any_observed())
def test_workers_add_up_in_any_order(one: Observed, two: Observed, three: Observed) -> None:
    assert (one + two) + three == one + (two + three)
    assert one + two == two + one
    assert one + Observed() == one


@given(any_observed(), any_observed())
def test_counts_carry_everything_and_add_up_like_the_records(one: Observed, two: Observed) -> None:
    assert Observed.from_counts(one.counts()) == one
    added = {name: str(number) for name, number in one.counts().items()}
    for name, number in two.counts().items():
        added[name] = str(float(added.get(name, 0)) + number)
    added["of_a_later_release"] = "1"
    whole = {
        name: number for name, number in added.items() if name.rpartition(":")[2] in ("total", "squares")
    }
    whole |= {name: str(int(float(number))) for name, number in added.items() if name not in whole}
    assert Observed.from_counts(whole) == one + two


@settings(max_examples=60, deadline=None)
@given(any_observed(), any_observed(), st.integers(1, 20_000), st.integers(1, 12))
def test_more_errors_never_turn_abort_into_promote(
    champion: Observed, challenger: Observed, more: int, look: int
) -> None:
    order = ("abort", "inconclusive", "promote")
    before = judge(champion, challenger, look=look, looks=10).decision
    worse = replace(challenger, errors=min(challenger.rows, challenger.errors + more))
    assert order.index(judge(champion, worse, look=look, looks=10).decision) <= order.index(before)


@settings(max_examples=40, deadline=None)
@given(any_observed(), st.booleans())
def test_no_data_of_either_variant_never_passes(some: Observed, swapped: bool) -> None:
    pair = (Observed(), some) if swapped else (some, Observed())
    assert judge(*pair, **LAST).decision != "promote"


@settings(max_examples=40, deadline=None)
@given(any_observed(), any_observed())
def test_more_looks_never_make_a_decision_easier(champion: Observed, challenger: Observed) -> None:
    few = judge(champion, challenger, look=1, looks=2).decision
    many = judge(champion, challenger, look=1, looks=50).decision
    assert many in (few, "inconclusive") or few == "abort"


# The statistics, beside other people's


@settings(deadline=None)
@given(st.integers(1, 1_000_000), st.floats(0, 1), st.floats(1e-7, 0.2))
def test_exact_bounds_are_those_of_scipy(trials: int, rate: float, alpha: float) -> None:
    successes = round(trials * rate)
    low, high = intervals.proportion(successes, trials, alpha)
    wanted = stats.binomtest(successes, trials).proportion_ci(1 - 2 * alpha, "exact")
    assert low == pytest.approx(wanted.low, rel=1e-6, abs=1e-12)
    assert high == pytest.approx(wanted.high, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(st.floats(1e-3, 1e5), st.floats(1e-3, 1e5), st.floats(1e-6, 1 - 1e-6))
def test_quantiles_exist_for_fractional_counts(successes: float, failures: float, share: float) -> None:
    x = intervals.beta_quantile(share, successes, failures)
    assert 0 <= x <= 1
    if 1e-12 < x < 1 - 1e-12:
        assert stats.beta.cdf(x, successes, failures) == pytest.approx(share, rel=1e-6)


@given(st.integers(0, 100_000), st.floats(1e-7, 0.2))
def test_counts_that_contradict_a_rate_are_those_of_scipy(trials: int, alpha: float) -> None:
    many, few = intervals.critical_counts(trials, 0.01, alpha)
    source = stats.binom(trials, 0.01)
    assert source.sf(many - 1) <= alpha * (1 + 1e-9)
    assert many == 0 or source.sf(many - 2) > alpha * (1 - 1e-9)
    assert few == -1 or source.cdf(few) <= alpha * (1 + 1e-9)
    assert source.cdf(few + 1) > alpha * (1 - 1e-9)


@settings(deadline=None)
@given(st.integers(1, 5_000), st.floats(0, 1), st.floats(1e-5, 0.1))
def test_bounds_for_all_times_are_where_the_mixture_reaches_one_in_alpha(
    trials: int, rate: float, alpha: float
) -> None:
    successes = round(trials * rate)
    low, high = intervals.proportion_anytime(successes, trials, alpha)
    exact = intervals.proportion(successes, trials, alpha / 2)
    assert low <= exact[0] + 1e-12
    assert high >= exact[1] - 1e-12
    for bound in {low, high} - {0.0, 1.0}:
        mixed = stats.betabinom(trials, 1, 1).logpmf(successes)
        against = stats.binom(trials, bound).logpmf(successes)
        assert mixed - against == pytest.approx(-math.log(alpha), rel=1e-6)


def test_bounds_for_all_times_hold_at_all_times() -> None:
    rng = np.random.default_rng(7)
    truth, alpha, runs = 0.2, 0.05, 400
    missed = 0
    for _ in range(runs):
        successes = np.cumsum(rng.random(1_000) < truth)
        bounds = [intervals.proportion_anytime(int(successes[n - 1]), n, alpha) for n in range(10, 1_001, 30)]
        missed += any(not low <= truth <= high for low, high in bounds)
    assert missed / runs <= alpha


def test_the_area_and_its_variance_are_those_of_sklearn_and_of_resampling() -> None:
    rng = np.random.default_rng(5)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        return np.round(rng.normal(1, 1, 300) * 4), np.round(rng.normal(0, 1, 500) * 4)

    def binned(values: np.ndarray) -> np.ndarray:
        return np.bincount(values.astype(int) + 40, minlength=80)

    areas, variances = [], []
    for _ in range(400):
        positive, negative = sample()
        area, variance = intervals.area_under_curve(binned(positive), binned(negative))
        areas.append(area)
        variances.append(variance)
    truth = np.r_[np.ones(300), np.zeros(500)]
    assert areas[-1] == pytest.approx(roc_auc_score(truth, np.r_[positive, negative]), abs=1e-12)
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.2)


def test_the_distance_is_that_of_scipy_and_its_margin_covers_it() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.integers(0, 40, 900), np.minimum(39, rng.integers(0, 44, 700))
    binned = np.bincount(first, minlength=40), np.bincount(second, minlength=40)
    distance, low, high = intervals.distribution_distance(*binned, (900, 700), 0.01)
    assert distance == pytest.approx(stats.ks_2samp(first, second).statistic)
    assert low <= 4 / 44 <= high


def test_quantile_bounds_cover_the_quantile_and_say_when_there_is_too_little() -> None:
    rng = np.random.default_rng(8)
    edges = LATENCY_EDGES_SECONDS
    truth = stats.lognorm(0.3, scale=0.01).ppf(0.99)
    missed = 0
    for _ in range(300):
        sample = 0.01 * rng.lognormal(0, 0.3, 2_000)
        dense = np.bincount(np.searchsorted(edges, sample), minlength=len(edges) + 1)
        low, high = intervals.upper_quantile(dense.tolist(), edges, 0.01, 0.05)
        missed += not low <= truth <= high
        assert high < 2 * low
    assert missed / 300 <= 0.1
    few = np.bincount(np.searchsorted(edges, sample[:100]), minlength=len(edges) + 1)
    assert intervals.upper_quantile(few.tolist(), edges, 0.01, 0.05)[1] == math.inf


def test_buckets_are_half_open_and_half_a_second_is_an_edge() -> None:
    assert 0.5 in LATENCY_EDGES_SECONDS
    place = LATENCY_EDGES_SECONDS.index(0.5)
    assert histogram([0.5, 0.5001, 99.0], LATENCY_EDGES_SECONDS) == {
        place: 1,
        place + 1: 1,
        len(LATENCY_EDGES_SECONDS): 1,
    }
    assert histogram([], PROBABILITY_EDGES) == {}
    edges = value_edges([float(n) for n in range(1_000)] + [math.nan], bins=10)
    assert edges == tuple(float(n) for n in range(100, 1_000, 100))
    assert value_edges([2.0] * 50) == (2.0,)
    assert value_edges([]) == ()


def test_an_identical_challenger_is_seldom_aborted_over_all_looks() -> None:
    """60 trials of ten looks at growing windows, both right at the limits: aborts stay under alpha."""
    rng = np.random.default_rng(11)
    shares = np.diff(stats.lognorm(0.4, scale=0.01).cdf([0, *LATENCY_EDGES_SECONDS, np.inf]))
    scores = np.diff(stats.beta(2, 4).cdf([0, *PROBABILITY_EDGES, 1]))

    def window(rows: int) -> Observed:
        latency, score = rng.multinomial(rows, shares), rng.multinomial(rows, scores)
        return Observed(
            rows=rows,
            errors=int(rng.binomial(rows, 0.01)),
            rows_squared=rows,
            latency={place: int(number) for place, number in enumerate(latency) if number},
            scores={place: int(number) for place, number in enumerate(score) if number},
        )

    limits = Limits(p99_ratio=1.0, p99_slack_seconds=0.0, score_distance=0.0)
    aborted = 0
    for _ in range(60):
        champion, challenger = Observed(), Observed()
        for look in range(1, 11):
            champion += window(900)
            challenger += window(300)
            if judge(champion, challenger, limits, look=look, looks=10).decision == "abort":
                aborted += 1
                break
    assert aborted / 60 <= limits.alpha


def test_no_sentence_speaks_of_infinity() -> None:
    """Requests past the last edge, and bounds that too few rows leave open."""
    slow, few = observed(seconds=1e6, seed=2), observed(700, seed=3)
    for one, two in ((CHAMPION, slow), (slow, CHAMPION), (few, few), (slow, slow), (CHAMPION, Observed())):
        for finding in judge(one, two, Limits(min_rows=50), look=1, looks=20).findings:
            assert not re.search(r"\binf\b|nan", finding.text), finding.text

    def p99(one: Observed, two: Observed) -> str:
        found = judge(one, two, Limits(min_rows=50), look=1, looks=20).findings
        return next(finding.text for finding in found if finding.name == "p99")

    few = replace(few, latency={10: 60})
    assert "and not bounded above yet, the limit is 500 ms." in p99(few, few)
    assert "p99 latency: more than 16 s against" in p99(CHAMPION, slow)
