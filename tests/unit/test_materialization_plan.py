"""What is due, as a truth table over what the ledger, the source and the definition say."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from materialization.ledger import Loaded
from materialization.plan import (
    ASKED,
    FIRST_LOAD,
    INCREMENTAL,
    INCREMENTAL_LATE,
    NEW_ROWS,
    WHOLE,
    due,
    due_window,
    plan_digest,
)
from materialization.window import Window

DAY_US = 86_400_000_000
HOUR_NS = 3_600_000_000_000
LOADED = Loaded(definition="d1", event_us=100 * DAY_US, arrived_ns=101 * DAY_US * 1000, source="s1", ttl_us=0)
END = 110 * DAY_US


def planned(loaded: Loaded | None = LOADED, **changes: Any) -> Any:
    state = {
        "definition": "d1",
        "source": "s2",
        "rows_are_gone": False,
        "dated": True,
        "ttl": timedelta(0),
        "end_us": END,
    }
    return due(loaded, **{**state, **changes})


@pytest.mark.parametrize(
    ("loaded", "changes", "reason"),
    [
        (None, {}, FIRST_LOAD),
        (LOADED, {"definition": "d2"}, "full reload: the definition has changed"),
        (LOADED, {"rows_are_gone": True}, "full reload: the rows are gone from Redis"),
        (LOADED, {"dated": False}, "full reload: the source has changed and has no created timestamps"),
    ],
)
def test_everything_is_due_where_the_ledger_cannot_be_relied_on(
    loaded: Loaded | None, changes: dict[str, Any], reason: str
) -> None:
    found = planned(loaded, **changes)
    assert (found.window, found.reason, found.kind) == (Window(None, END), reason, WHOLE)
    assert found.complete


def test_a_changed_source_brings_new_rows_and_late_ones() -> None:
    found = planned()
    assert (found.reason, found.kind) == (INCREMENTAL_LATE, NEW_ROWS)
    assert found.window == Window(None, END, 100 * DAY_US, 101 * DAY_US * 1000 - HOUR_NS)


@pytest.mark.parametrize("dated", [True, False])
def test_an_unchanged_source_has_no_late_rows(dated: bool) -> None:
    found = planned(source="s1", dated=dated)
    assert (found.window, found.reason) == (Window(None, END, 100 * DAY_US), INCREMENTAL)


def test_a_source_that_cannot_be_seen_and_has_no_created_timestamps_brings_new_rows_only() -> None:
    found = planned(source=None, dated=False)
    assert found.window == Window(None, END, 100 * DAY_US)


def test_expired_rows_are_left_out() -> None:
    assert planned(None, ttl=timedelta(days=10)).window.start_us == 100 * DAY_US
    assert planned(ttl=timedelta(days=10)).window.start_us == 100 * DAY_US


@pytest.mark.parametrize(
    ("before", "now", "whole"),
    [
        (10, 20, True),
        (10, 0, True),
        (10, 10, False),
        (10, 5, False),
        (0, 20, False),
        (None, 20, True),
        (None, 0, True),
    ],
)
def test_a_raised_ttl_brings_back_the_rows_that_were_too_old(
    before: int | None, now: int, whole: bool
) -> None:
    """0 days: no row is ever too old; None: a ledger that does not know, so that everything is due once."""
    loaded = replace(LOADED, ttl_us=None if before is None else before * DAY_US)
    found = planned(loaded, ttl=timedelta(days=now))
    assert (found.kind == WHOLE) is whole
    assert found.window.start_us == (END - now * DAY_US if now else None)
    assert (found.window.after_us is None) is whole
    # Nor does a window that continues the old rows close the gap before them.
    window = due_window(
        loaded, definition="d1", ttl=timedelta(days=now), start_us=100 * DAY_US - 1, end_us=101 * DAY_US
    )
    assert window.complete is not whole


def test_the_watermark_never_moves_back() -> None:
    found = planned(end_us=90 * DAY_US)
    assert found.window.end_us == 100 * DAY_US


@pytest.mark.parametrize(
    ("loaded", "start_day", "end_day", "complete"),
    [
        (None, None, 110, True),
        (None, 50, 110, False),
        (LOADED, None, 110, True),
        (LOADED, None, 90, False),
        (LOADED, 99, 110, True),
        (LOADED, 100, 110, True),
        (LOADED, 101, 110, False),
        (LOADED, 50, 90, False),
    ],
)
def test_a_window_moves_the_watermark_only_where_it_leaves_no_gap(
    loaded: Loaded | None, start_day: int | None, end_day: int, complete: bool
) -> None:
    start_us = None if start_day is None else start_day * DAY_US
    found = due_window(loaded, definition="d1", ttl=timedelta(0), start_us=start_us, end_us=end_day * DAY_US)
    assert (found.window, found.kind) == (Window(start_us, end_day * DAY_US), ASKED)
    assert found.complete is complete


def test_a_window_that_reaches_back_to_the_ttl_holds_every_row_that_counts() -> None:
    found = due_window(
        None, definition="d1", ttl=timedelta(days=10), start_us=100 * DAY_US, end_us=110 * DAY_US
    )
    assert found.complete


def test_a_window_under_a_new_definition_does_not_continue_the_old_rows() -> None:
    found = due_window(LOADED, definition="d2", ttl=timedelta(0), start_us=99 * DAY_US, end_us=END)
    assert not found.complete


def test_a_plan_is_the_same_only_if_all_that_orders_its_rows_is() -> None:
    def digest(end_us: int = 2, **changes: Any) -> str | None:
        return plan_digest(
            Window(1, end_us), **{"definition": "d", "source": "s", "partitions": 1, **changes}
        )

    assert digest() == digest()
    others = [
        digest(3),
        digest(definition="e"),
        digest(source="t"),
        digest(partitions=2),
        digest(duckdb="2"),
    ]
    assert len({digest(), *others}) == 6
    assert digest(source=None) is None
