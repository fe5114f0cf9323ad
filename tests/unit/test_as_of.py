"""The as-of search against a loop, where the moments are too long to be sorted in one go."""

from __future__ import annotations

import numpy as np
import pytest

from core.as_of import Asked, Moments, newest


@pytest.mark.parametrize("ttl", [0, 40])
@pytest.mark.parametrize("span", [100, 1 << 40, 1 << 51])
def test_the_newest_of_each_key_is_found_whatever_the_span(span: int, ttl: int) -> None:
    # Times within 100 of each other, at the far end of the span: in its higher bits they are all the same.
    random = np.random.default_rng(span + ttl)
    keys, events, rows = 1_000, 20_000, 3_000
    scale = Moments(origin=-5, span=span, keys=keys)
    assert scale.fit
    end = scale.origin + span
    code, time = random.integers(0, keys, events), end - random.integers(1, 100, events)
    places = random.permutation(events)
    asked_code, asked_at = random.integers(0, keys, rows), end - random.integers(-10, 110, rows)
    asked = Asked(np.arange(rows), asked_code, asked_at, asked_at)

    found = newest(code * span + (time - scale.origin), places, asked, scale, ttl, None)

    expected = {}
    for row, (key, at) in enumerate(zip(asked_code, asked_at, strict=True)):
        mine = np.flatnonzero((code == key) & (time <= at))
        if len(mine):
            best = max(mine, key=lambda i: (time[i], places[i]))
            expected[row] = (places[best], time[best], not ttl or at - time[best] <= ttl)
    answered = zip(found.row, found.place, found.time, found.fresh, strict=True)
    assert {row: tuple(rest) for row, *rest in answered} == expected


def test_moments_that_do_not_fit_say_so() -> None:
    assert Moments(origin=0, span=1 << 40, keys=1 << 22).fit
    assert not Moments(origin=0, span=1 << 40, keys=1 << 23).fit
    assert not Moments(origin=0, span=1 << 62, keys=1).fit
