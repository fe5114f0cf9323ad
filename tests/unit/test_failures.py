"""What the log says while requests fail."""

from __future__ import annotations

import asyncio
import logging

import pytest

from core.errors import Overloaded, RedisUnavailable
from serving import failures
from serving.failures import FailureLog


def test_a_thousand_failures_are_three_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first with its hint, one for the others, one when it is over; another code has lines of its own."""
    monkeypatch.setattr(failures, "SUMMARY_SECONDS", 0.05)
    caplog.set_level(logging.INFO, logger="banquet.serving")

    async def fail() -> None:
        log = FailureLog()
        for number in range(1000):
            log.note(RedisUnavailable(f"away {number}.", hint="Start it."), f"id-{number}")
        log.note(Overloaded(), "alone")
        while "over, none" not in caplog.text:
            await asyncio.sleep(0.01)
        log.note(RedisUnavailable("away again.", hint="Start it."), "id-later")

    asyncio.run(asyncio.wait_for(fail(), 30))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "redis_unavailable: away 0. Start it., request_id=id-0"),
        ("WARNING", "overloaded: Too many requests are in flight., request_id=alone"),
        ("WARNING", "redis_unavailable: 999 more in 0.05 s, the last: away 999., request_id=id-999"),
        ("INFO", "redis_unavailable: over, none for 0.05 s; 1000 requests failed"),
        ("WARNING", "redis_unavailable: away again. Start it., request_id=id-later"),
    ]
