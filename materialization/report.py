"""What a run says about itself: progress while it goes on, and what became of each view. Plain records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from core.errors import BanquetError
from materialization.gate import GateResult
from materialization.memory import Estimate


@dataclass(frozen=True, slots=True)
class Progress:
    """A view's load under way, after ``seconds``: ``rows`` of ``total`` are in Redis.

    ``skipped`` of them had been written before this attempt.
    """

    view: str
    rows: int
    total: int
    skipped: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """The rate so far."""
        return (self.rows - self.skipped) / self.seconds if self.seconds > 0 else 0.0


def error_data(error: BanquetError | None) -> dict[str, Any] | None:
    """A view's error as a JSON object."""
    return None if error is None else {"code": error.code, "message": error.message, "hint": error.hint}


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewReport:
    """What a run did for one view. Times are UTC.

    ``rows`` were due, one per key; ``older`` of them met a newer row in Redis. ``memory_bytes`` is a dry
    run's estimate of what Redis will need, with what other views of the run share; ``needed`` is that of the
    view alone. ``error`` is None unless the view failed.
    """

    view: str
    reason: str = ""
    start: datetime | None = None
    end: datetime | None = None
    resumed: bool = False
    rows: int = 0
    written: int = 0
    older: int = 0
    seconds: float = 0.0
    newest_event: datetime | None = None
    gate: GateResult | None = None
    memory_bytes: int | None = None
    needed: Estimate | None = None
    error: BanquetError | None = None

    @property
    def ok(self) -> bool:
        """Whether the view is loaded, or would be, of a dry run."""
        gate = self.gate
        return self.error is None and (gate is None or gate.passed or gate.forced)

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "view": self.view,
            "ok": self.ok,
            "reason": self.reason,
            "start": self.start and self.start.isoformat(),
            "end": self.end and self.end.isoformat(),
            "resumed": self.resumed,
            "rows": self.rows,
            "written": self.written,
            "older": self.older,
            "seconds": round(self.seconds, 3),
            "newest_event": self.newest_event and self.newest_event.isoformat(),
            "gate": self.gate and self.gate.as_json(),
            "memory_bytes": self.memory_bytes,
            "error": error_data(self.error),
        }


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did, view by view."""

    views: tuple[ViewReport, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every view is, or would be, loaded."""
        return all(view.ok for view in self.views)

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"ok": self.ok, "views": [view.as_json() for view in self.views]}


Observer = Callable[[Progress], None]


def joined(first: ViewReport, then: ViewReport) -> ViewReport:
    """One report of an interrupted run's end and what was due after it."""
    newest = [event for event in (first.newest_event, then.newest_event) if event is not None]
    return ViewReport(
        view=then.view,
        reason=then.reason,
        start=first.start,
        end=then.end,
        resumed=True,
        rows=first.rows + then.rows,
        written=first.written + then.written,
        older=first.older + then.older,
        seconds=then.seconds,
        newest_event=max(newest, default=None),
        gate=then.gate,
        error=then.error,
    )
