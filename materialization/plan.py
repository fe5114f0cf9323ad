"""What is due: from what the ledger says was loaded, and what the source and the definition are now.

Pure; knows no Redis, no DuckDB and no Feast object.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import timedelta

from materialization.ledger import Loaded
from materialization.window import Window

# A row may become visible some time after it was stamped: created timestamps this much older than the
# newest one that was loaded count as new. Offering a row twice changes nothing.
ARRIVAL_OVERLAP = timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)

FIRST_LOAD = "first load"
INCREMENTAL = "incremental"
INCREMENTAL_LATE = "incremental, with late rows"
WINDOW = "the window asked for"


WHOLE = "whole"
NEW_ROWS = "new rows"
ASKED = "asked"


@dataclass(frozen=True, slots=True)
class Due:
    """A load to do. ``complete``: once done, everything up to the window's end has been loaded.

    ``kind`` is WHOLE (all rows there are), NEW_ROWS (since the last run) or ASKED (a window that was named).
    """

    window: Window
    reason: str
    complete: bool
    kind: str


def due(
    loaded: Loaded | None,
    *,
    definition: str,
    source: str | None,
    rows_are_gone: bool,
    dated: bool,
    ttl: timedelta,
    end_us: int,
) -> Due:
    """The next incremental load: new rows and late ones, or everything where the ledger cannot be relied on.

    Rows that are older than ``ttl`` at ``end_us`` are left out, as in Feast: they have expired.
    """
    start_us = end_us - ttl // MICROSECOND if ttl else None

    def everything(reason: str) -> Due:
        return Due(Window(start_us, end_us), reason, complete=True, kind=WHOLE)

    if loaded is None:
        return everything(FIRST_LOAD)
    if loaded.definition != definition:
        return everything("full reload: the definition has changed")
    if rows_are_gone:
        return everything("full reload: the rows are gone from Redis")
    if loaded.ttl_us is None:
        return everything("full reload: the ledger does not say for which ttl the rows were loaded")
    if _raised(loaded, ttl):
        return everything("full reload: the ttl was raised")
    if end_us <= loaded.event_us:
        end_us = loaded.event_us
    unchanged = source is not None and source == loaded.source
    if unchanged:
        return Due(Window(start_us, end_us, loaded.event_us), INCREMENTAL, complete=True, kind=NEW_ROWS)
    if dated and loaded.arrived_ns is not None:
        arrived_ns = loaded.arrived_ns - ARRIVAL_OVERLAP // MICROSECOND * 1000
        window = Window(start_us, end_us, loaded.event_us, arrived_ns)
        return Due(window, INCREMENTAL_LATE, complete=True, kind=NEW_ROWS)
    if source is not None:
        return everything("full reload: the source has changed and has no created timestamps")
    # Nothing tells late rows of this source apart.
    return Due(Window(start_us, end_us, loaded.event_us), INCREMENTAL, complete=True, kind=NEW_ROWS)


def due_window(
    loaded: Loaded | None, *, definition: str, ttl: timedelta, start_us: int | None, end_us: int
) -> Due:
    """The load of a window that the caller names."""
    window = Window(start_us, end_us)
    if start_us is None or (ttl and start_us <= end_us - ttl // MICROSECOND):
        return Due(window, WINDOW, complete=loaded is None or end_us >= loaded.event_us, kind=ASKED)
    same = loaded is not None and loaded.definition == definition and not _raised(loaded, ttl)
    joined = loaded is not None and same and start_us <= loaded.event_us <= end_us
    return Due(window, WINDOW, complete=joined, kind=ASKED)


def _raised(loaded: Loaded, ttl: timedelta) -> bool:
    """Whether rows count now that were too old for the last load, or were cleaned away since as expired."""
    if loaded.ttl_us is None:
        return True  # nobody knows
    return bool(loaded.ttl_us) and (not ttl or ttl // MICROSECOND > loaded.ttl_us)


def plan_digest(window: Window, *, definition: str, source: str | None, **staging: object) -> str | None:
    """Equal for two runs that stage the same rows in the same order; None where that cannot be known.

    ``staging`` is whatever else decides which row is staged where.
    """
    if source is None:
        return None
    what = [asdict(window), definition, source, sorted(staging.items())]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
