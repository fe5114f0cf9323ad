"""Prometheus metrics of the server. The only module that names them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# Where prometheus_client looks for the counts that workers share.
_SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class RequestMetrics:
    """What every request leaves behind: a count by route and status, and a latency."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._requests = Counter(
            "banquet_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "banquet_request_seconds",
            "Seconds from the first byte read to the answer.",
            ["route"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._rows = Counter(
            "banquet_predictions", "Rows predicted.", ["model", "version"], registry=self.registry
        )
        self._statuses = Counter(
            "banquet_feature_values",
            "Feature values that were not PRESENT.",
            ["feature", "status"],
            registry=self.registry,
        )
        self._pushed = Counter(
            "banquet_pushed_rows",
            "Rows pushed online; an older one is not written.",
            ["view", "outcome"],
            registry=self.registry,
        )
        self._refresh_failures = Counter(
            "banquet_refresh_failures",
            "Failed refreshes; the old state stays.",
            ["what"],
            registry=self.registry,
        )
        self._refresh_failing = Gauge(
            "banquet_refresh_failing",
            "1 while definitions or models cannot be read anew and the old state serves.",
            ["what"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._versions = Gauge(
            "banquet_model_version",
            "Version that an alias serves, 0 where it is gone.",
            ["model", "alias"],
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self._memory = Gauge(
            "banquet_worker_memory_bytes",
            "Resident memory of a worker.",
            ["worker"],
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self._refused = Gauge(
            "banquet_model_versions_refused",
            "Versions that an alias points to and that failed their checks.",
            ["model"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._dropped = Counter(
            "banquet_shadow_dropped_rows",
            "Rows that a shadow had no time for.",
            ["model"],
            registry=self.registry,
        )
        self._aliases: dict[str, dict[str, int]] = {}
        self._children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._row_children: dict[tuple[str, int], Counter] = {}
        self._status_children: dict[tuple[str, str], Counter] = {}

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        child = self._children.get((route, status))
        if child is None:
            child = self._requests.labels(route, str(status)), self._latency.labels(route)
            self._children[route, status] = child
        child[0].inc()
        child[1].observe(seconds)

    def predicted(self, model: str, version: int, rows: int) -> None:
        """Count predicted rows."""
        child = self._row_children.get((model, version))
        if child is None:
            child = self._row_children[model, version] = self._rows.labels(model, str(version))
        child.inc(rows)

    def missing(self, feature: str, status: str, values: int) -> None:
        """Count feature values that were not PRESENT."""
        child = self._status_children.get((feature, status))
        if child is None:
            child = self._status_children[feature, status] = self._statuses.labels(feature, status)
        child.inc(values)

    def pushed(self, view: str, written: int, older: int) -> None:
        """Count pushed rows: those written, and those that Redis had a newer one for."""
        self._pushed.labels(view, "written").inc(written)
        self._pushed.labels(view, "older").inc(older)

    def refresh_failed(self, what: str) -> None:
        """Count a background refresh that failed."""
        self._refresh_failures.labels(what).inc()

    def refresh_failing(self, what: str, failing: bool) -> None:
        """Record whether the last refresh failed."""
        self._refresh_failing.labels(what).set(failing)

    def serving(self, model: str, aliases: Mapping[str, int]) -> None:
        """Record which versions the aliases of a model serve."""
        # Not removed: prometheus_client cannot take a label from the files that workers share.
        for alias in self._aliases.get(model, {}).keys() - aliases.keys():
            self._versions.labels(model, alias).set(0)
        for alias, version in aliases.items():
            self._versions.labels(model, alias).set(version)
        self._aliases[model] = dict(aliases)

    def refused(self, model: str, versions: Collection[int]) -> None:
        """Record how many versions that an alias points to have failed their checks: alert above 0."""
        self._refused.labels(model).set(len(versions))

    def dropped(self, model: str, rows: int) -> None:
        """Count rows that a shadow had no time for."""
        self._dropped.labels(model).inc(rows)

    def memory(self, worker: int, resident_bytes: int) -> None:
        """Record the resident memory of the worker in this slot."""
        self._memory.labels(str(worker)).set(resident_bytes)

    def text(self) -> bytes:
        """The metrics of every worker in Prometheus' text format."""
        registry = self.registry
        # Importing Feast sets the variable, long after prometheus_client has chosen where to count.
        if values.ValueClass is not values.MutexValue:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        found: bytes = generate_latest(registry)
        return found


def share_counts(folder: str, slot: int) -> None:
    """Count in files of ``folder`` from now on, for a worker that has ``slot`` to itself while it lives.

    Files are kept by slot and not by process id, so that a replaced worker's successor counts on in them and
    there are never more files than workers at one time.
    """
    os.environ[_SHARED_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]


def forget_worker(folder: str, slot: int) -> None:
    """Drop the gauges of a worker that has ended; what it counted stays counted."""
    mark_process_dead(slot, folder)  # type: ignore[no-untyped-call]
