"""What has been loaded, in Redis beside the rows it describes: watermarks, the run under way, the lease.

A Redis that is lost takes its ledger with it, so the next run knows that it must load everything. Knows no
source and no SQL. One hash per view, ``banquet:ledger:<project>:<stored view>``, and beside it the lease.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import AlreadyRunning, LeaseLost
from core.write import Fence
from materialization.load import Position
from materialization.window import Window

LEASE_SECONDS = 30.0
_WITNESSES = 8

_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the view's rows in Redis came from.

    Every row of the source with an event timestamp up to ``event_us`` and, where the source has created
    timestamps, created up to ``arrived_ns`` has been offered to Redis. ``definition`` and ``source`` are
    digests of the view's definition and of the source's files at that time.
    """

    definition: str
    event_us: int
    arrived_ns: int | None
    source: str | None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that has begun and not ended: its plan, and how far it came.

    ``plan`` is a digest of everything that decides which rows stand in which chunk. ``arrived_ns`` and
    ``source`` are those that ``Loaded`` will have; ``complete`` says whether it will be recorded at all.
    """

    plan: str | None
    window: Window
    partitions: int
    reason: str
    complete: bool
    arrived_ns: int | None
    source: str | None
    position: Position


class Ledger:
    """The ledger of one view."""

    def __init__(self, client: Any, project: str, stored_view: str) -> None:
        """``client`` is a blocking redis-py client of the online store."""
        self._client = client
        self._view = stored_view
        self.key = f"banquet:ledger:{project}:{stored_view}".encode()
        self._lease_key = f"banquet:lease:{project}:{stored_view}".encode()

    def loaded(self) -> Loaded | None:
        """What has been loaded; None if nothing has, or Redis has lost it."""
        record = self._read("loaded")
        return None if record is None else Loaded(**record)

    def unfinished(self) -> Unfinished | None:
        """The run that was interrupted, if any."""
        record = self._read("run")
        if record is None:
            return None
        position = self._client.hget(self.key, "position") or b"0:0"
        partition, chunk = (int(number) for number in position.split(b":"))
        window = Window(**record.pop("window"))
        return Unfinished(window=window, position=Position(partition, chunk), **record)

    def begin(self, run: Unfinished) -> None:
        """Record a run before its first row is written."""
        record = asdict(run)
        del record["position"]
        self._client.hset(
            self.key, mapping={"run": json.dumps(record), "position": _position_text(run.position)}
        )

    def advance(self, position: Position) -> None:
        """Record that every chunk up to ``position`` is in Redis."""
        self._client.hset(self.key, "position", _position_text(position))

    def finish(self, loaded: Loaded | None, witnesses: list[bytes]) -> None:
        """Record the end of the run. ``loaded`` None leaves the watermarks as they are.

        ``witnesses`` are some of the keys that were written: if all are gone, so are the rows.
        """
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.hdel(self.key, "run", "position")
            if loaded is not None:
                pipeline.hset(self.key, "loaded", json.dumps(asdict(loaded)))
            if witnesses:
                chosen = witnesses[:: max(1, len(witnesses) // _WITNESSES)][:_WITNESSES]
                pipeline.hset(self.key, "witnesses", json.dumps([key.hex() for key in chosen]))
            pipeline.execute()

    def rows_are_gone(self) -> bool:
        """Whether none of the keys that the last run left is there any more."""
        witnesses = self._read("witnesses")
        return bool(witnesses) and not any(self._client.exists(bytes.fromhex(key)) for key in witnesses)

    def record(self, name: str, value: Any) -> None:
        """Keep a JSON value, such as the last gate result, beside the watermarks."""
        self._client.hset(self.key, name, json.dumps(value))

    def recall(self, name: str) -> Any:
        """A value that ``record`` kept, or None."""
        return self._read(name)

    @contextmanager
    def lease(self, wait_seconds: float = 0.0) -> Iterator[Fence]:
        """Hold the view against other runs; released at the block's end, or ``LEASE_SECONDS`` after a crash.

        A holder that died on this machine is noticed at once.

        Raises:
            AlreadyRunning: another run still holds it after ``wait_seconds``.
        """
        token = json.dumps({**_identity(), "id": uuid.uuid4().hex, "since": time.time()}).encode()
        deadline = time.monotonic() + wait_seconds
        while not self._client.set(self._lease_key, token, nx=True, px=int(LEASE_SECONDS * 1000)):
            holder = self._client.get(self._lease_key)
            if holder is not None and _has_died(json.loads(holder)):
                self._client.eval(_RELEASE, 1, self._lease_key, holder)
            elif holder is not None and time.monotonic() >= deadline:
                raise self._already_running(json.loads(holder))
            elif holder is not None:
                time.sleep(0.1)
        stop = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(token, stop), daemon=True)
        renewal.start()
        try:
            yield Fence(self._lease_key, token)
        finally:
            stop.set()
            renewal.join()
            self._client.eval(_RELEASE, 1, self._lease_key, token)

    def _renew(self, token: bytes, stop: threading.Event) -> None:
        from redis.exceptions import RedisError

        while not stop.wait(LEASE_SECONDS / 3):
            try:
                if not self._client.eval(_RENEW, 1, self._lease_key, token, int(LEASE_SECONDS * 1000)):
                    return  # lost: the fence stops the writer
            except RedisError:
                continue  # the writer meets the same failure and decides

    def check(self, fence: Fence) -> None:
        """Raises ``LeaseLost`` if another run has taken over."""
        if self._client.get(fence.key) != fence.token:
            raise LeaseLost(f"Another run has taken view {self._view!r} over.")

    def _already_running(self, holder: dict[str, Any]) -> AlreadyRunning:
        seconds = time.time() - holder["since"]
        return AlreadyRunning(
            f"View {self._view!r} is being materialized by process {holder['pid']} on {holder['host']}, "
            f"for {seconds:.0f} s.",
            hint="Wait for it, or pass --wait SECONDS. A run that crashed is released after "
            f"{LEASE_SECONDS:.0f} s.",
            view=self._view,
        )

    def _read(self, name: str) -> Any:
        text = self._client.hget(self.key, name)
        return None if text is None else json.loads(text)


def _position_text(position: Position) -> str:
    return f"{position.partition}:{position.chunk}"


def _identity() -> dict[str, Any]:
    """Who this process is: enough to tell, on the same machine, that it is gone."""
    return {
        "host": socket.gethostname(),
        "namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _has_died(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname() or holder["namespace"] != _pid_namespace():
        return False
    if holder["started"] is not None:
        return bool(_started(holder["pid"]) != holder["started"])
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _pid_namespace() -> str | None:
    """Containers on one machine number their processes apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if it is gone or the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]
