"""The truth table of the read contract."""

from __future__ import annotations

import numpy as np
import pytest

from core.contract import apply_status, row_status, row_statuses, value_status
from core.types import FeatureStatus as S

NOW, TTL = 1_000, 100


@pytest.mark.parametrize(
    ("event", "ttl", "expected"),
    [
        (None, TTL, S.NOT_FOUND),
        (None, 0, S.NOT_FOUND),
        (NOW, TTL, S.PRESENT),
        (NOW - TTL + 1, TTL, S.PRESENT),
        (NOW - TTL, TTL, S.PRESENT),
        (NOW - TTL - 1, TTL, S.OUTSIDE_MAX_AGE),
        (0, TTL, S.OUTSIDE_MAX_AGE),
        (0, 0, S.PRESENT),
        (-5, 0, S.PRESENT),
        (NOW + 5, TTL, S.PRESENT),
    ],
)
def test_a_row_is_not_found_expired_or_present(event: int | None, ttl: int, expected: S) -> None:
    assert row_status(event, NOW, ttl) is expected


@pytest.mark.parametrize("row", list(S))
@pytest.mark.parametrize("value", [None, 0, "", False, 1.5])
def test_only_an_empty_value_in_a_present_row_is_null(row: S, value: object) -> None:
    expected = S.NULL_VALUE if row is S.PRESENT and value is None else row
    assert value_status(row, value) is expected


@pytest.mark.parametrize("ttl", [0, TTL])
@pytest.mark.parametrize(
    "events",
    [[], [NOW], [None], [NOW, None, 5], [NOW - TTL, NOW - TTL - 1], [NOW, NOW - 1]],
)
def test_columns_agree_with_single_rows(events: list[int | None], ttl: int) -> None:
    expected = [row_status(event, NOW, ttl) for event in events]
    found = row_statuses(events, NOW, ttl)
    assert (found or [S.PRESENT] * len(events)) == expected
    assert (found is None) == all(status is S.PRESENT for status in expected)
    if events and None not in events:
        assert row_statuses(np.array(events), NOW, ttl) == found


def test_values_of_missing_and_expired_rows_are_hidden() -> None:
    values, statuses = apply_status([1, 2, None, 4], [S.PRESENT, S.OUTSIDE_MAX_AGE, S.PRESENT, S.NOT_FOUND])
    assert values == [1, None, None, None]
    assert statuses == [S.PRESENT, S.OUTSIDE_MAX_AGE, S.NULL_VALUE, S.NOT_FOUND]
    assert apply_status([1, 2], None) == ([1, 2], None)
    assert apply_status([1, None], None) == ([1, None], [S.PRESENT, S.NULL_VALUE])
