"""Confidence bounds that the judge compares with its limits. Pure: numbers in, numbers out.

Written with the standard library: importing scipy.special takes a server worker half a second. Every
``alpha`` is one-sided: each of the two bounds misses the truth with at most this probability. Counts may be
fractions, as effective sample sizes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

Interval = tuple[float, float]

# More evidence than this is not needed, and the continued fraction takes about the square root of it.
_MOST_TRIALS = 1e6


def proportion(successes: float, trials: float, alpha: float) -> Interval:
    """Exact bounds of a proportion: Clopper and Pearson, Biometrika 26 (1934).

    (0, 1) where there are no trials.
    """
    if trials <= 0:
        return 0.0, 1.0
    if trials > _MOST_TRIALS:
        successes, trials = successes * _MOST_TRIALS / trials, _MOST_TRIALS
    failures = trials - successes
    low = beta_quantile(alpha, successes, failures + 1) if successes > 0 else 0.0
    high = beta_quantile(1 - alpha, successes + 1, failures) if failures > 0 else 1.0
    return low, high


def proportion_anytime(successes: float, trials: float, alpha: float) -> Interval:
    """Bounds of a proportion that hold at every sample size at once, however often they are looked at.

    The beta-binomial mixture with a uniform prior: the mixed likelihood ratio against any p is a martingale
    that starts at 1 and reaches 1 / alpha with probability alpha at most (Ville), so the p at which it stays
    below are a confidence sequence. Robbins, Annals of Mathematical Statistics 41 (1970); Howard, Ramdas,
    McAuliffe, Sekhon, Annals of Statistics 49 (2021).
    """
    if trials <= 0:
        return 0.0, 1.0
    failures = trials - successes
    mixed = _log_beta(1 + successes, 1 + failures)

    def excess(p: float) -> float:
        if not 0 < p < 1:
            return math.inf
        likelihood = (successes * math.log(p) if successes else 0.0) + (
            failures * math.log1p(-p) if failures else 0.0
        )
        return mixed - likelihood + math.log(alpha)

    rate = successes / trials
    low = _crossing(excess, 0.0, rate) if successes else 0.0
    high = _crossing(excess, 1.0, rate) if failures else 1.0
    return low, high


def difference(
    first: tuple[float, float], second: tuple[float, float], alpha: float, factor: float = 1.0
) -> Interval:
    """Bounds of one proportion minus ``factor`` times another, each given as (successes, trials).

    Newcombe's square-and-add (Statistics in Medicine 17, 1998, method 10) with Clopper-Pearson bounds in
    place of Wilson's, which are too narrow for rare events at small alpha; the general form is Zou and
    Donner's MOVER (Statistics in Medicine 27, 2008). (-factor, 1) where one has no trials.
    """
    if first[1] <= 0 or second[1] <= 0:
        return -factor, 1.0
    p, q = first[0] / first[1], second[0] / second[1]
    (p_low, p_high), (q_low, q_high) = proportion(*first, alpha), proportion(*second, alpha)
    gap = p - factor * q
    return (
        gap - math.hypot(p - p_low, factor * (q_high - q)),
        gap + math.hypot(p_high - p, factor * (q - q_low)),
    )


def upper_quantile(counts: Sequence[int], edges: Sequence[float], tail: float, alpha: float) -> Interval:
    """Bounds of the value that a share ``tail`` of a sample's source exceeds, whatever its distribution.

    Args:
        counts: observations per bucket, ``len(edges) + 1``; bucket i holds (edges[i - 1], edges[i]].
        edges: ascending.

    Returns:
        Edges: the quantile lies above the first if more observations than a share ``tail`` exceed it,
        by the binomial test; and the reverse. 0 and infinity where there are too few. Conover, Practical
        Nonparametric Statistics, 3rd edition (1999), section 3.2.
    """
    trials = sum(counts)
    low, high, above = 0.0, math.inf, 0
    most, least = critical_counts(trials, tail, alpha)
    for place in range(len(edges) - 1, -1, -1):
        above += counts[place + 1]
        if above <= least:
            high = edges[place]
        if above >= most:
            low = edges[place]
            break
    return low, high


def critical_counts(trials: int, rate: float, alpha: float) -> tuple[float, float]:
    """From which count on, and up to which, a binomial sample contradicts ``rate``: (many, few).

    P(count >= many) <= alpha and P(count <= few) <= alpha. ``few`` is -1 and ``many`` above ``trials`` where
    no count does.
    """
    middle, step = trials * rate, math.sqrt(trials * rate * (1 - rate)) + 1
    many = math.floor(middle)
    reach = math.ceil(step * 12) + 24
    first, last = many, min(trials + 1, many + reach)
    while first < last:  # the smallest count whose upper tail is at most alpha
        count = (first + last) // 2
        if count > trials or beta_cdf(rate, count, trials - count + 1) <= alpha:
            last = count
        else:
            first = count + 1
    many = first
    first, last = max(-1, math.floor(middle) - reach), math.ceil(middle)
    while first < last:  # the largest count whose lower tail is at most alpha
        count = (first + last + 1) // 2
        if count < trials and 1 - beta_cdf(rate, count + 1, trials - count) <= alpha:
            first = count
        else:
            last = count - 1
    return many, first


def distribution_distance(
    first: Sequence[float], second: Sequence[float], trials: tuple[float, float], alpha: float
) -> tuple[float, float, float]:
    """The Kolmogorov-Smirnov distance of two binned samples, and its bounds.

    Args:
        first, second: observations per bin, the same bins.
        trials: how many independent observations each counts for.

    Returns:
        (distance, low, high): the largest difference between the shares up to and including a bin. The
        margin is that of Massart's inequality (Annals of Probability 18, 1990) for two samples, with the
        constant 2: Wei and Dudley, Statistics and Probability Letters 82 (2012). (0, 0, 1) without data.
    """
    totals = sum(first), sum(second)
    if not all(totals) or min(trials) <= 0:
        return 0.0, 0.0, 1.0
    largest = 0.0
    below = [0.0, 0.0]
    for one, two in zip(first, second, strict=True):
        below[0] += one / totals[0]
        below[1] += two / totals[1]
        largest = max(largest, abs(below[0] - below[1]))
    margin = math.sqrt(math.log(2 / alpha) / 2 * (1 / trials[0] + 1 / trials[1]))
    return largest, max(0.0, largest - margin), min(1.0, largest + margin)


def area_under_curve(positive: Sequence[int], negative: Sequence[int]) -> tuple[float, float]:
    """The area under the ROC curve of binned scores, ties counting half, and the variance of the estimate.

    Args:
        positive, negative: rows per score bin by label; at least two of each.

    DeLong, DeLong, Clarke-Pearson, Biometrics 44 (1988): the variances of the placement values.
    """
    positives, negatives = sum(positive), sum(negative)
    area = square_p = square_n = 0.0
    below_n = below_p = 0
    for p, n in zip(positive, negative, strict=True):
        place_p = (below_n + n / 2) / negatives
        place_n = 1 - (below_p + p / 2) / positives
        area += p * place_p
        square_p += p * place_p**2
        square_n += n * place_n**2
        below_n += n
        below_p += p
    area /= positives
    spread_p = max(0.0, square_p - positives * area**2) / (positives - 1)
    spread_n = max(0.0, square_n - negatives * area**2) / (negatives - 1)
    return area, spread_p / positives + spread_n / negatives


def normal(estimate: float, variance: float, alpha: float) -> Interval:
    """Bounds of an estimate that is normal with a known variance, as sums of many rows are."""
    margin = NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance)
    return estimate - margin, estimate + margin


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b): its continued fraction by Lentz's method.

    NIST Digital Library of Mathematical Functions, 8.17.22 (https://dlmf.nist.gov/8.17#v).
    """
    if x <= 0 or a <= 0 or b <= 0:
        return 1.0 if a <= 0 else 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges quickly on the other side
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    total = d
    for m in range(1, 20_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + even * d) or tiny)
        c = (1 + even / c) or tiny
        total *= c * d
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + odd * d) or tiny)
        c = (1 + odd / c) or tiny
        total *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return min(1.0, front * total)


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = ``share``: Newton's method kept within a bracket that shrinks."""
    low, high = 0.0, 1.0
    mean = a / (a + b)
    spread = math.sqrt(mean * (1 - mean) / (a + b + 1))
    x = mean + NormalDist().inv_cdf(share) * spread
    if not 0 < x < 1:
        x = mean * 0.5 if share < 0.5 else (1 + mean) / 2
    log_beta = _log_beta(a, b)
    for _ in range(200):
        if not 0 < x < 1:  # so close to an end that there is no number between
            break
        gap = beta_cdf(x, a, b) - share
        if gap > 0:
            high = x
        else:
            low = x
        density = math.exp((a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - log_beta)
        following = x - gap / density if density > 0 else -1.0
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - x) <= 1e-12 * x:
            return following
        x = following
    return x


def _crossing(excess: Callable[[float], float], outer: float, inner: float) -> float:
    """Where a function that is positive at ``outer`` and not at ``inner`` changes sign, by bisection."""
    for _ in range(60):
        middle = (outer + inner) / 2
        if excess(middle) > 0:
            outer = middle
        else:
            inner = middle
    return outer


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
