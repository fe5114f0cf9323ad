"""What a run says about itself: progress while it goes on, and what became of each view. Plain records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from core.errors import BanquetError


@dataclass(frozen=True, slots=True)
class Progress:
    """A view's load under way: rows handled and about how many there are, after ``seconds``."""

    view: str
    rows: int
    total: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """The rate so far."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewReport:
    """What a run did for one view. ``error`` is None unless it failed; times are UTC."""

    view: str
    reason: str = ""
    start: datetime | None = None
    end: datetime | None = None
    resumed: bool = False
    source_rows: int = 0
    written: int = 0
    older: int = 0
    seconds: float = 0.0
    newest_event: datetime | None = None
    error: BanquetError | None = None

    @property
    def ok(self) -> bool:
        """Whether the view is loaded."""
        return self.error is None

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "view": self.view,
            "ok": self.ok,
            "reason": self.reason,
            "start": self.start and self.start.isoformat(),
            "end": self.end and self.end.isoformat(),
            "resumed": self.resumed,
            "source_rows": self.source_rows,
            "written": self.written,
            "older": self.older,
            "seconds": round(self.seconds, 3),
            "newest_event": self.newest_event and self.newest_event.isoformat(),
            "error": self.error and {"code": self.error.code, "message": str(self.error)},
        }


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did, view by view."""

    views: tuple[ViewReport, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every view is loaded."""
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
        source_rows=first.source_rows + then.source_rows,
        written=first.written + then.written,
        older=first.older + then.older,
        seconds=then.seconds,
        newest_event=max(newest, default=None),
    )
