"""What is noted while requests run is counted as prometheus_client itself would have counted it."""

from __future__ import annotations

import asyncio
import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from serving import metrics
from serving.metrics import RequestMetrics

SECONDS = st.one_of(st.floats(0, 5), st.sampled_from(metrics._LATENCY_BUCKETS_S))
ANSWERED = st.tuples(st.sampled_from(["/predict", "/push"]), st.sampled_from([200, 422]), SECONDS)


def samples(text: bytes) -> dict[str, float]:
    found = re.findall(r"^(\w+{.*}) (\S+)$", text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in found if "_created" not in name}


@given(st.lists(st.lists(ANSWERED)))
def test_requests_counted_together_are_those_counted_one_by_one(
    turns: list[list[tuple[str, int, float]]],
) -> None:
    ours, registry = RequestMetrics(), CollectorRegistry()
    requests = Counter("banquet_requests", "", ["route", "status"], registry=registry)
    latency = Histogram(
        "banquet_request_seconds", "", ["route"], buckets=metrics._LATENCY_BUCKETS_S, registry=registry
    )
    for turn in turns:
        for route, status, seconds in turn:
            ours.observe(route, status, seconds)
            requests.labels(route, status).inc()
            latency.labels(route).observe(seconds)
        ours.flush()
    found, expected = samples(ours.text()), samples(generate_latest(registry))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= 1e-9 * max(1.0, value), name


def test_the_text_has_all_that_this_process_noted() -> None:
    ours = RequestMetrics()
    ours.predicted("churn", 3, 5)
    ours.predicted("churn", 3, 2)
    ours.missing("view__a", "NOT_FOUND", 4)
    found = samples(ours.text())
    assert found == {
        'banquet_predictions_total{model="churn",version="3"}': 7.0,
        'banquet_feature_values_total{feature="view__a",status="NOT_FOUND"}': 4.0,
    }


def test_a_flush_that_fails_is_not_the_last() -> None:
    """The worker counts on after an error, a full disk say."""

    class Failing(RequestMetrics):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1
            if self.flushes == 1:
                raise OSError("no space left on device")
            again.set()

    async def run() -> None:
        task = asyncio.create_task(Failing().run())
        await asyncio.wait_for(again.wait(), 30)
        task.cancel()

    again = asyncio.Event()
    asyncio.run(run())
