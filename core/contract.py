"""The read contract: what status a value carries, online and in the historical join alike.

Pure. Timestamps are integer nanoseconds since the epoch, UTC; durations are integer nanoseconds.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from core.types import FeatureStatus

PRESENT = FeatureStatus.PRESENT
NULL_VALUE = FeatureStatus.NULL_VALUE
NOT_FOUND = FeatureStatus.NOT_FOUND
OUTSIDE_MAX_AGE = FeatureStatus.OUTSIDE_MAX_AGE


def row_status(event_ns: int | None, now_ns: int, ttl_ns: int) -> FeatureStatus:
    """The status of an entity's row in a view at ``now_ns``.

    ``event_ns`` is None where the entity has no row; ``ttl_ns`` zero means that rows never expire. The
    boundary is inclusive, as in Feast's historical join: a row exactly one ttl old still counts.
    """
    if event_ns is None:
        return NOT_FOUND
    if ttl_ns and event_ns < now_ns - ttl_ns:
        return OUTSIDE_MAX_AGE
    return PRESENT


def value_status(row: FeatureStatus, value: object) -> FeatureStatus:
    """The status of one value in a row of that status."""
    return NULL_VALUE if row is PRESENT and value is None else row


def row_statuses(
    events_ns: list[int | None] | NDArray[np.int64], now_ns: int, ttl_ns: int
) -> list[FeatureStatus] | None:
    """``row_status`` of every row; None when all are PRESENT, which is the case worth being fast in.

    An array has a timestamp for every row.
    """
    if isinstance(events_ns, np.ndarray):
        if not ttl_ns or events_ns.min() >= now_ns - ttl_ns:
            return None
        events_ns = events_ns.tolist()
    elif None not in events_ns:
        found = cast(list[int], events_ns)
        if not ttl_ns or not found or min(found) >= now_ns - ttl_ns:
            return None
    return [row_status(event, now_ns, ttl_ns) for event in events_ns]


def apply_status(
    values: list[object], rows: list[FeatureStatus] | None
) -> tuple[list[object], list[FeatureStatus] | None]:
    """Hide the values of rows that are not PRESENT and give each value its status.

    Returns the values, None where the row is missing or expired, and their statuses, or None in place of
    the statuses when every value is PRESENT.
    """
    if rows is None:
        if None not in values:
            return values, None
        return values, [NULL_VALUE if value is None else PRESENT for value in values]
    shown = [value if row is PRESENT else None for value, row in zip(values, rows, strict=True)]
    return shown, [value_status(row, value) for row, value in zip(rows, shown, strict=True)]
