"""Prometheus metrics of the server. The only module that names them.

What every request leaves behind is noted in memory and counted a few times a second (``flush``): a count in a
file that workers share costs as much as a read of Redis' answer does.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

log = logging.getLogger("banquet.serving")

# Where prometheus_client looks for the counts that workers share.
_SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
FLUSH_SECONDS = 0.2
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
        self._answered: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        self._counted: defaultdict[tuple[Counter, str, str], int] = defaultdict(int)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._answered[route, status].append(seconds)

    def predicted(self, model: str, version: int, rows: int) -> None:
        """Count predicted rows."""
        self._counted[self._rows, model, str(version)] += rows

    def missing(self, feature: str, status: str, values: int) -> None:
        """Count feature values that were not PRESENT."""
        self._counted[self._statuses, feature, status] += values

    async def run(self) -> None:
        """Flush every ``FLUSH_SECONDS`` until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                self.flush()
            except Exception:
                log.exception("some counts were lost")

    def flush(self) -> None:
        """Bring what was noted since the last time to where every worker's ``text`` finds it."""
        answered, self._answered = self._answered, defaultdict(list)
        for (route, status), seconds in answered.items():
            self._requests.labels(route, status).inc(len(seconds))
            latency = self._latency.labels(route)
            # As Histogram.observe, which takes one value at a time.
            latency._sum.inc(sum(seconds))
            buckets = np.searchsorted(latency._upper_bounds, seconds)
            for bucket, count in enumerate(np.bincount(buckets).tolist()):
                if count:
                    latency._buckets[bucket].inc(count)
        counted, self._counted = self._counted, defaultdict(int)
        for (counter, *labels), count in counted.items():
            counter.labels(*labels).inc(count)

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
        """The metrics of every worker in Prometheus' text format: the others' as of their last flush."""
        self.flush()
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
