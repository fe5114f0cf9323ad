"""Waiting for conditions, never for durations.

A limit here only ends a hang: no test shows anything by how soon its condition held, so that a machine many
times slower changes no outcome.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import redis

PATIENCE_SECONDS = 180.0
_NOT_YET = (redis.RedisError, OSError, http.client.HTTPException, httpx.TransportError)


def wait_until(
    condition: Callable[[], Any],
    what: str,
    seconds: float = PATIENCE_SECONDS,
    *,
    pause_seconds: float = 0.01,
) -> None:
    """Poll until the condition holds; an error of Redis or of the network counts as not yet."""
    for _ in _in_vain(condition, what, seconds):
        time.sleep(pause_seconds)


async def until(
    condition: Callable[[], Any],
    what: str,
    seconds: float = PATIENCE_SECONDS,
    *,
    pause_seconds: float = 0.01,
) -> None:
    """``wait_until`` that leaves the event loop to others; the condition itself runs on it."""
    for _ in _in_vain(condition, what, seconds):
        await asyncio.sleep(pause_seconds)


def _in_vain(condition: Callable[[], Any], what: str, seconds: float) -> Iterator[None]:
    """Once per time that the condition does not hold, up to ``seconds``."""
    deadline = time.monotonic() + seconds
    while not _holds(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain until {what}")
        yield


def _holds(condition: Callable[[], Any]) -> bool:
    with suppress(*_NOT_YET):
        return bool(condition())
    return False
