"""What one variant of a rollout did in a window of time: counts that add up over workers and hosts.

The record that servers fill and the judge reads. Pure; knows no Redis, though ``counts`` is what a hash
takes by HINCRBY and HINCRBYFLOAT.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

# Sixteen buckets an octave, 4.4 % apart, from 0.2 ms to 16 s; half a second is one of the edges.
LATENCY_EDGES_SECONDS = tuple(0.5 * 2 ** (step / 16) for step in range(-11 * 16, 5 * 16 + 1))
# Even in log odds, 13 % apart: as fine near 0, where the scores of rare events are, as elsewhere.
PROBABILITY_EDGES = tuple(1 / (1 + math.exp(-step / 8)) for step in range(-80, 81))
# A probability of 0 for what then happens costs this much and no more: -log(1e-6) = 13.8.
LEAST_PROBABILITY = 1e-6

Counts = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Moments:
    """How many values, their sum and the sum of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @classmethod
    def of(cls, values: Iterable[float]) -> Moments:
        """Those of some values."""
        found = list(values)
        return cls(len(found), math.fsum(found), math.fsum(value * value for value in found))

    @property
    def mean(self) -> float:
        """The mean; there must be a value."""
        return self.total / self.count

    @property
    def variance(self) -> float:
        """The unbiased variance of the values; there must be two."""
        return max(0.0, self.squares - self.total * self.mean) / (self.count - 1)


@dataclass(frozen=True, slots=True)
class Observed:
    """Counts of one variant in one window; ``a + b`` is both together. The mappings are read only.

    ``rows`` are predictions asked for, ``errors`` those among them without a number (the model failed, or
    gave NaN); a row that its missing-value policy refuses is neither. ``rows_squared`` is the sum of the
    squared rows per request. ``latency`` counts requests by bucket of LATENCY_EDGES_SECONDS: bucket i holds
    (edges[i - 1], edges[i]]. ``scores`` counts rows by score bin in the same way: the probability of the last
    class of two, of the predicted class of more, or a regressor's value; its edges are fixed at the start.

    Of rows whose label has come: ``labels`` of them, ``correct`` of these predicted right, ``log_loss`` of
    the true class (nats), ``positive`` and ``negative`` scores by bin where there are two classes, or
    ``squared_error`` of a regressor.
    """

    rows: int = 0
    errors: int = 0
    rows_squared: int = 0
    latency: Counts = field(default_factory=dict)
    scores: Counts = field(default_factory=dict)
    labels: int = 0
    correct: int = 0
    log_loss: Moments = Moments()
    positive: Counts = field(default_factory=dict)
    negative: Counts = field(default_factory=dict)
    squared_error: Moments = Moments()

    def __add__(self, other: Observed) -> Observed:
        both: dict[str, Any] = {}
        for name in _NAMES:
            mine, theirs = getattr(self, name), getattr(other, name)
            both[name] = _merged(mine, theirs) if isinstance(mine, Mapping) else mine + theirs
        return Observed(**both)

    @property
    def requests(self) -> int:
        """How many requests the rows came in."""
        return sum(self.latency.values())

    @property
    def independent_rows(self) -> float:
        """How many independent rows the rows count for: rows of one request stand and fall together.

        Kish's effective sample size, rows² / sum of the squared rows per request: the number of requests
        where all are of one size, and right whatever the correlation within a request, at the price of some
        evidence where there is none. Kish, Survey Sampling (1965), section 5.4.
        """
        return self.rows**2 / self.rows_squared if self.rows_squared else 0.0

    def counts(self) -> dict[str, int | float]:
        """The record as a flat mapping without zeros: whole numbers, and floats for sums of floats."""
        flat: dict[str, int | float] = {}
        for name in _NAMES:
            value = getattr(self, name)
            if isinstance(value, Moments):
                parts = {"count": value.count, "total": value.total, "squares": value.squares}
                flat |= {f"{name}:{part}": number for part, number in parts.items()}
            elif isinstance(value, Mapping):
                flat |= {f"{name}:{place}": number for place, number in value.items()}
            else:
                flat[name] = value
        return {name: number for name, number in flat.items() if number}

    @classmethod
    def from_counts(cls, flat: Mapping[str, int | float | str]) -> Observed:
        """The record that ``counts`` gives; numbers may be texts, names of a later release are left out."""
        nested: dict[str, dict[str, int | float | str]] = {}
        plain: dict[str, int] = {}
        for name, number in flat.items():
            head, _, part = name.partition(":")
            if part:
                nested.setdefault(head, {})[part] = number
            elif head in _WHOLE:
                plain[head] = int(number)
        histograms = {
            name: {int(place): int(number) for place, number in nested.get(name, {}).items()}
            for name in _HISTOGRAMS
        }
        sums = {
            name: Moments(int(of.get("count", 0)), float(of.get("total", 0)), float(of.get("squares", 0)))
            for name in _SUMS
            for of in [nested.get(name, {})]
        }
        return cls(**plain, **histograms, **sums)  # type: ignore[arg-type]


_NAMES = tuple(one.name for one in fields(Observed))
_HISTOGRAMS = ("latency", "scores", "positive", "negative")
_SUMS = ("log_loss", "squared_error")
_WHOLE = frozenset(_NAMES) - {*_HISTOGRAMS, *_SUMS}


def histogram(values: Iterable[float], edges: Sequence[float]) -> dict[int, int]:
    """How many values lie in each bucket (edges[i - 1], edges[i]], without empty ones."""
    found: dict[int, int] = {}
    for value in values:
        place = bisect_left(edges, value)
        found[place] = found.get(place, 0) + 1
    return found


def value_edges(sample: Sequence[float], bins: int = 100) -> tuple[float, ...]:
    """Edges of a regressor's score bins: the quantiles of some of its predictions, without repeats.

    They have to be those of the champion, fixed before the trial starts.
    """
    ordered = sorted(value for value in sample if math.isfinite(value))
    if not ordered:
        return ()
    places = {ordered[min(len(ordered) - 1, step * len(ordered) // bins)] for step in range(1, bins)}
    return tuple(sorted(places))


def _merged(mine: Counts, theirs: Counts) -> dict[int, int]:
    both = dict(mine)
    for place, number in theirs.items():
        both[place] = both.get(place, 0) + number
    return both
