"""What has been loaded, in Redis beside the rows it describes: watermarks, the run under way, the lease.

A Redis that is lost takes its ledger with it, so the next run knows that it must load everything. Knows no
source and no SQL. Per view one hash, ``banquet:{<project>:<stored view>}:ledger``, and the lease beside it;
the braces keep the two in one slot of a cluster.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from core.errors import AlreadyRunning, LeaseLost
from core.write import Fence
from materialization.processes import has_died, this_process
from materialization.window import Window

LEASE_SECONDS = 30.0

# KEYS[1] is the lease, ARGV[1] the token that must hold it.
_HELD = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
_RENEW = _HELD + "return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
_RELEASE = _HELD + "return redis.call('DEL', KEYS[1])"
_SET = _HELD + "redis.call('HSET', KEYS[2], unpack(ARGV, 2)) return 1"
_FINISH = (
    _HELD
    + "redis.call('HDEL', KEYS[2], 'run', 'rows_done') "
    + "if #ARGV > 1 then redis.call('HSET', KEYS[2], unpack(ARGV, 2)) end return 1"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the view's rows in Redis came from.

    Every row of the source with an event timestamp up to ``event_us`` and, where the source has created
    timestamps, created up to ``arrived_ns`` has been offered to Redis, unless it was older than ``ttl_us``
    (microseconds; 0: none was; None: not recorded). ``definition`` and ``source`` are digests of the
    view's definition and of the source's files at that time.
    """

    definition: str
    event_us: int
    arrived_ns: int | None
    source: str | None
    ttl_us: int | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that has begun and not ended: its plan, and how far it came.

    ``plan`` is a digest of everything that decides which row is staged where, ``rows_done`` how many of them
    from the first on are in Redis. ``arrived_ns``, ``source`` and ``ttl_us`` are those that ``Loaded`` will
    have; ``complete`` says whether it will be recorded at all; ``kind`` is ``plan.Due.kind``.
    """

    plan: str | None
    window: Window
    partitions: int
    reason: str
    complete: bool
    kind: str
    arrived_ns: int | None
    source: str | None
    ttl_us: int | None = None
    rows_done: int = 0


class Ledger:
    """The ledger of one view."""

    def __init__(self, client: Any, project: str, stored_view: str) -> None:
        """``client`` is a blocking redis-py client of the online store."""
        self.client = client
        self._view = stored_view
        self.key, self.lease_key = ledger_keys(project, stored_view)

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The Redis keys of the ledger and of the lease."""
        return self.key, self.lease_key

    def loaded(self) -> Loaded | None:
        """What has been loaded; None if nothing has, or Redis has lost it."""
        record = self._read("loaded")
        return None if record is None else Loaded(**record)

    def unfinished(self) -> Unfinished | None:
        """The run that was interrupted, if any."""
        record = self._read("run")
        if record is None:
            return None
        rows_done = int(self.client.hget(self.key, "rows_done") or 0)
        return Unfinished(window=Window(**record.pop("window")), rows_done=rows_done, **record)

    def begin(self, run: Unfinished, fence: Fence) -> None:
        """Record a run before its first row is written."""
        record = asdict(run)
        rows_done = record.pop("rows_done")
        self._fenced(_SET, fence, "run", json.dumps(record), "rows_done", rows_done)

    def advance(self, rows_done: int, fence: Fence) -> None:
        """Record that the first ``rows_done`` rows of the run are in Redis."""
        self._fenced(_SET, fence, "rows_done", rows_done)

    def note(self, fence: Fence, **records: Any) -> None:
        """Record values as JSON, such as the verdict of a gate that let nothing through."""
        pairs = [part for name, value in records.items() for part in (name, json.dumps(value))]
        self._fenced(_SET, fence, *pairs)

    def finish(self, fence: Fence, loaded: Loaded | None, witnesses: Sequence[bytes], **records: Any) -> None:
        """Record the end of the run, and further ``records`` as JSON.

        ``loaded`` None leaves the watermarks as they are. ``witnesses`` are some of the keys that have a
        row now: if all are gone, so are the rows.
        """
        if loaded is not None:
            records["loaded"] = asdict(loaded)
        if witnesses:
            records["witnesses"] = [key.hex() for key in witnesses]
        pairs = [part for name, value in records.items() for part in (name, json.dumps(value))]
        self._fenced(_FINISH, fence, *pairs)

    def _fenced(self, script: str, fence: Fence, *arguments: Any) -> None:
        """Change the ledger only while the lease is held.

        Raises:
            LeaseLost: it is not.
        """
        if not self.client.eval(script, 2, fence.key, self.key, fence.token, *arguments):
            raise LeaseLost(
                f"The lease on view {self._view!r} is gone: another run has taken it over, or Redis has lost "
                "its data.",
                hint="Run it again.",
                view=self._view,
            )

    def rows_are_gone(self) -> bool:
        """Whether none of the keys that the last run left is there any more."""
        witnesses = self._read("witnesses")
        return bool(witnesses) and not any(self.client.exists(bytes.fromhex(key)) for key in witnesses)

    def holder(self) -> dict[str, Any] | None:
        """The living process that holds the view now, if any."""
        token = self.client.get(self.lease_key)
        holder = None if token is None else json.loads(token)
        return None if holder is None or has_died(holder) else holder

    def recall(self, name: str) -> Any:
        """A value that was recorded, or None."""
        return self._read(name)

    @contextmanager
    def lease(self, wait_seconds: float = 0.0) -> Iterator[Fence]:
        """Hold the view against other runs; released at the block's end, or ``LEASE_SECONDS`` after a crash.

        A holder that died on this machine is noticed at once.

        Raises:
            AlreadyRunning: another run still holds it after ``wait_seconds``.
        """
        from redis.exceptions import RedisError

        token = json.dumps({**this_process(), "id": uuid.uuid4().hex, "since": time.time()}).encode()
        deadline = time.monotonic() + wait_seconds
        while not self.client.set(self.lease_key, token, nx=True, px=int(LEASE_SECONDS * 1000)):
            holder = self.client.get(self.lease_key)
            if holder is not None and has_died(json.loads(holder)):
                self.client.eval(_RELEASE, 1, self.lease_key, holder)
            elif holder is not None and time.monotonic() >= deadline:
                raise self._already_running(json.loads(holder))
            elif holder is not None:
                time.sleep(0.1)
        stop = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(token, stop), daemon=True)
        renewal.start()
        try:
            yield Fence(self.lease_key, token)
        finally:
            stop.set()
            renewal.join()
            with suppress(RedisError):  # it then ends by itself
                self.client.eval(_RELEASE, 1, self.lease_key, token)

    def _renew(self, token: bytes, stop: threading.Event) -> None:
        from redis.exceptions import RedisError

        while not stop.wait(LEASE_SECONDS / 3):
            try:
                if not self.client.eval(_RENEW, 1, self.lease_key, token, int(LEASE_SECONDS * 1000)):
                    return  # lost: the fence stops the writer
            except RedisError:
                continue  # the writer meets the same failure and decides

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
        text = self.client.hget(self.key, name)
        return None if text is None else json.loads(text)


def ledger_keys(project: str, stored_view: str) -> tuple[bytes, bytes]:
    """The Redis keys of a view's ledger and of its lease."""
    name = f"banquet:{{{project}:{stored_view}}}"
    return f"{name}:ledger".encode(), f"{name}:lease".encode()
