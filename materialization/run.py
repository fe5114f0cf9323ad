"""A materialization of a repository: which views, and what Feast's registry says after it.

Knows no command line; progress and results are plain records. A view that fails leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import TYPE_CHECKING, Any

from core.errors import BanquetError, InvalidRequest, NotFound
from core.repository import FeastRepository
from materialization import views
from materialization.materializer import Materializer, Request
from materialization.memory import Estimate, together
from materialization.report import Observer, RunReport, ViewReport

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

# One view is read and judged while another is written.
PARALLEL = 2
_FIRST_EVENT = datetime(1970, 1, 1, tzinfo=UTC)


def materialize(
    repo: FeastRepository,
    *,
    view_names: Sequence[str] | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    force: Sequence[str] = (),
    dry_run: bool = False,
    wait_seconds: float = 0.0,
    observe: Observer | None = None,
) -> RunReport:
    """Load what is due in every view that is stored online, or in those named, two at a time.

    With ``start`` the window from it to ``end`` is loaded; without, what is new since the last run, late rows
    included. ``end`` is now by default. Views in ``force`` are loaded though they fail the gate. ``dry_run``
    writes nothing: the report says what would be loaded, the gate's verdict and the memory needed. Errors of
    a view are in its report.

    Raises:
        InvalidRequest: a time is naive, or the window is empty.
        NotFound: there is no such view, or ``force`` names one that the run leaves out.
        InvalidRepository: the online store is not Redis, or nothing was applied yet.
    """
    for time in (start, end):
        if time is not None and time.tzinfo is None:
            raise InvalidRequest(f"{time} has no time zone.", hint="Add one, such as +00:00.")
    end = end or datetime.now(UTC)
    if start is not None and start > end:
        raise InvalidRequest(f"The window ends at {end}, before it starts at {start}.")
    views.require_views(repo)
    store = repo.store()
    store.refresh_registry()
    chosen = chosen_views(store, view_names)
    if stray := sorted(set(force) - {view.name for view in chosen}):
        raise NotFound(
            f"Views to force that are none of this run: {', '.join(stray)}.",
            hint=f"Views of this run: {', '.join(view.name for view in chosen) or 'none'}.",
        )
    run = _Run(store, Materializer.of_store(store, parallel=min(PARALLEL, len(chosen))), start, end, dry_run)

    def load(view: Any) -> ViewReport:
        request = Request(
            start=start,
            end=end,
            incremental=start is None,
            force=view.name in force,
            dry_run=dry_run,
            wait_seconds=wait_seconds,
            observe=observe,
        )
        return run.load(view, request)

    with ThreadPoolExecutor(PARALLEL, "banquet-materialize") as executor:
        reports = list(executor.map(load, chosen))
    return RunReport(tuple(_together(chosen, reports)))


def _together(chosen: Sequence[Any], reports: Sequence[ViewReport]) -> list[ViewReport]:
    """A dry run's reports with the memory of each view as one of the views of its join keys."""
    groups: dict[frozenset[str], list[Estimate]] = {}
    for view, report in zip(chosen, reports, strict=True):
        if report.needed:
            groups.setdefault(_join_keys(view), []).append(report.needed)
    sizes = {keys: iter(together(needed)) for keys, needed in groups.items()}
    return [
        replace(report, memory_bytes=next(sizes[_join_keys(view)])) if report.needed else report
        for view, report in zip(chosen, reports, strict=True)
    ]


def _join_keys(view: Any) -> frozenset[str]:
    return frozenset(column.name for column in view.entity_columns)


class _Run:
    """What the views of a run share: the registry, one at a time."""

    def __init__(
        self,
        store: FeatureStore,
        materializer: Materializer,
        start: datetime | None,
        end: datetime,
        dry_run: bool,
    ) -> None:
        self._store = store
        self._materializer = materializer
        self._start = start
        self._end = end
        self._dry_run = dry_run
        # Feast's registries read, change and write back.
        self._registry = Lock()

    def load(self, view: Any, request: Request) -> ViewReport:
        """One view; its errors are in the report."""
        store, began = self._store, _interval_start(view, self._start, self._end)
        if not self._dry_run:
            with self._registry:
                _end_interrupted_state(store, view)
        if (reason := views.needs_feast(view)) is not None:
            with self._registry:
                return _through_feast(store, view, began, self._end, reason, dry_run=self._dry_run)
        try:
            report = self._materializer.load_view(view, request)
        except BanquetError as exc:
            return ViewReport(view=view.name, error=exc)
        if report.ok and not self._dry_run:
            with self._registry:
                store.registry.apply_materialization(view, store.project, began, self._end)
        return report


def chosen_views(store: FeatureStore, names: Sequence[str] | None) -> list[Any]:
    """The views that are stored online, by name; those named, where names are given.

    Raises:
        NotFound: there is no such view.
    """
    found = {view.name: view for view in store._get_feature_views_to_materialize(None)}
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise NotFound(
            f"No view to materialize is called {', '.join(map(repr, unknown))}.",
            hint=f"Views that are stored online: {', '.join(sorted(found)) or 'none'}.",
        )
    return [view for name, view in sorted(found.items()) if names is None or name in names]


def _interval_start(view: FeatureView, start: datetime | None, end: datetime) -> datetime:
    """Where the interval begins that the registry will record, by Feast's own rule for incremental runs."""
    if start is not None:
        return start
    recent = getattr(view, "most_recent_end_time", None)
    if recent is not None:
        return min(views.aware(recent), end)
    ttl: timedelta | None = getattr(view, "ttl", None)
    return max(end - ttl, _FIRST_EVENT) if ttl else _FIRST_EVENT


def _end_interrupted_state(store: FeatureStore, view: Any) -> None:
    """Undo the state that a killed ``feast materialize`` left behind: stock reads fail until it is gone.

    Banquet itself never sets it: its rows are served while they are being replaced.
    """
    from feast.feature_view import FeatureViewState

    if getattr(view, "state", None) != FeatureViewState.MATERIALIZING:
        return
    served = bool(view.materialization_intervals)
    view.state = FeatureViewState.AVAILABLE_ONLINE if served else FeatureViewState.GENERATED
    store.registry.apply_feature_view(view, store.project, commit=True)


def _through_feast(
    store: FeatureStore, view: Any, start: datetime, end: datetime, reason: str, *, dry_run: bool
) -> ViewReport:
    """A view that only Feast's own engine computes: loaded by it, without ledger or gate."""
    report = ViewReport(view=view.name, reason=f"through Feast: {reason}", start=start, end=end)
    if dry_run:
        return report
    try:
        store.materialize(start, end, feature_views=[view.name])
    except Exception as exc:  # noqa: BLE001  a user's function may raise anything
        error = BanquetError(f"Feast could not materialize view {view.name!r}: {exc}")
        return replace(report, error=error)
    return report
