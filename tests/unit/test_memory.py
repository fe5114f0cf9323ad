"""A worker's memory is reported at every look; past the limit it warns once and asks to be replaced."""

from __future__ import annotations

import logging
import time

import psutil
import pytest

from serving.memory import MemoryWatch, resident_bytes
from serving.metrics import RequestMetrics

MB = 1_000_000


def watch(limit: int, supervised: bool = True) -> tuple[MemoryWatch, list[int], list[str], RequestMetrics]:
    """A watch with a limit in MB, the memory in MB that it will see last, the reasons it gave."""
    held, reasons, metrics = [50], [], RequestMetrics()
    recycle = reasons.append if supervised else None
    return MemoryWatch(metrics, 3, limit * MB, recycle, lambda: held[0] * MB), held, reasons, metrics


def test_resident_memory_is_what_the_system_says() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_every_look_is_reported_under_the_workers_number() -> None:
    looking, held, reasons, metrics = watch(0)
    looking.look(0.0)
    held[0] = 70
    looking.look(2.0)
    assert b'banquet_worker_memory_bytes{worker="3"} 7e+07' in metrics.text()
    assert reasons == []


def test_past_the_limit_it_warns_once_and_asks_when_it_has_settled(caplog: pytest.LogCaptureFixture) -> None:
    looking, held, reasons, _ = watch(60)
    began = time.monotonic()
    looking.look(began)
    held[0] = 70
    with caplog.at_level(logging.WARNING):
        looking.look(began + 1)
        assert reasons == []
        looking.look(began + 10)
        looking.look(began + 12)
    assert reasons[0] == "it holds 70 MB of memory, past its limit of 60 MB"
    assert len(caplog.records) == 1


def test_a_limit_below_a_new_worker_and_a_process_without_a_supervisor_only_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for looking, held, reasons, _ in (watch(40), watch(60, supervised=False)):
        caplog.clear()
        looking.look(time.monotonic())
        held[0] = 90
        looking.look(time.monotonic() + 100)
        assert reasons == []
        assert len(caplog.records) == 1
