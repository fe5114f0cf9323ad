"""From XADD to /predict: how long until an event counts in a prediction, at a steady rate of events.

    python bench/stream.py [--rate 5000] [--seconds 60] [--to online_and_offline] [--consumers 1]
        [--keep]

Real processes on one machine: Valkey, one `banquet serve` worker with the model of the serving bench,
`banquet stream`, and a producer of events with 10 features. Beside them a probe adds an event every 20 ms, on
a schedule that waits for nothing, each for another user and with a value of its own, and asks POST /predict
for all the users whose event it has not seen yet until the answer is made from it. So the time covers adding,
delivery, checking, the online write, the read and the prediction, and up to 4 ms until the probe asks again;
what one slow answer holds up is counted in every event that waits for it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hiredis
import redis

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402 — the folder is no package: its files are scripts
from userbase import USERS, Userbase, cpu_seconds, free_port, userbase, wait_for  # noqa: E402

PYTHON_BIN = Path(sys.executable).parent
STREAM = "banquet:events:bench"
PROBE_SECONDS = 0.02
ASK_SECONDS = 0.004
PROBED_USERS = 2000  # beyond those of the producer, each probed again after 40 s
AIM_MS = 100.0


def event(user: int, first: float) -> dict[str, str]:
    """The fields of an entry."""
    row: dict[str, Any] = {"user_id": user, "event_timestamp": datetime.now(tz=UTC).isoformat()}
    row |= {"signal_0": first, **{f"signal_{i}": first + i for i in range(1, 10)}}
    return {"push_source": "user_behavior_push", "event": json.dumps(row)}


def produce(port: int, rate: int) -> None:
    """Add events at ``rate`` a second until killed, those of 5 ms together; catches up after a delay.

    The commands are made before, all but their timestamps, so that the producer takes little of the machine.
    """
    rng = random.Random(1)
    made = [event(rng.randrange(USERS), rng.random()) for _ in range(20_000)]
    size = len("2026-01-01T00:00:00.000000+00:00")
    commands = []
    for fields in made:
        own = json.loads(fields["event"])["event_timestamp"]
        fields["event"] = fields["event"].replace(own, "?" * size)
        arguments = [item for field in fields.items() for item in field]
        commands.append(hiredis.pack_command(("XADD", STREAM, "*", *arguments)).split(b"?" * size))
    assert all(len(parts) == 2 for parts in commands)
    connection, reader = socket.create_connection(("127.0.0.1", port)), hiredis.Reader()
    began, added = time.perf_counter(), 0
    while True:
        due = min(int((time.perf_counter() - began) * rate) - added, 1000)
        moment = datetime.now(tz=UTC).isoformat(timespec="microseconds").encode()
        batch = [commands[number % len(commands)] for number in range(added, added + due)]
        connection.sendall(b"".join([moment.join(parts) for parts in batch]))
        added += due
        while due:
            reader.feed(connection.recv(1 << 16))
            while (reply := reader.gets()) is not False:
                if isinstance(reply, Exception):
                    raise reply
                due -= 1
        time.sleep(0.005)


@contextmanager
def process(scene: Userbase, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the scene, ended with the block; what it prints goes to ``<name>.log``."""
    with (scene.folder / f"{name}.log").open("wb") as log, (scene.folder / f"{name}.err").open("wb") as err:
        started = subprocess.Popen(command, env=scene.environment, cwd=scene.repo, stdout=log, stderr=err)
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()


def spent_by(groups: dict[str, list[int]]) -> dict[str, float]:
    """Processor seconds of each group of processes, and of this one, the probe."""
    return {
        **{name: sum(map(cpu_seconds, pids)) for name, pids in groups.items()},
        "probe": time.process_time(),
    }


class Server:
    """Asks /predict over one connection that stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ready(self) -> bool:
        """Whether it serves."""
        try:
            self._connection.request("GET", "/readyz")
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return False
        return answer.status == 200

    def signals(self, users: Sequence[int]) -> list[float | None]:
        """The value of each user's first signal that a prediction is made from."""
        body = json.dumps({"entities": {"user_id": users}, "explain": True})
        self._connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        rows = json.loads(text)["predictions"]
        return [row["features"]["user_behavior__signal_0"]["value"] for row in rows]


class Probe:
    """Adds an event every ``PROBE_SECONDS`` and asks /predict for those that it does not know yet.

    ``delays`` has a pair per event: the second since the start, and the milliseconds from just before XADD to
    the answer that knows it.
    """

    def __init__(self, redis_port: int, server_port: int) -> None:
        self._client: Any = redis.Redis(port=redis_port)
        self._server = Server(server_port)
        self._waiting: dict[int, tuple[float, float]] = {}
        self._number = 0
        self._failed: Exception | None = None
        self.delays: list[tuple[float, float]] = []

    def run(self, seconds: float) -> list[tuple[float, float]]:
        """Probe for so long, until the last event is known; the delays."""
        self.delays = []
        began = time.perf_counter()
        adding = threading.Thread(target=self._add, args=(began, seconds), daemon=True)
        adding.start()
        while adding.is_alive() or self._waiting:
            asked = time.perf_counter()
            waiting = list(self._waiting.items())
            if waiting and asked - waiting[0][1][0] > 30:
                raise TimeoutError("an event did not reach /predict in 30 s")
            values = self._server.signals([user for user, _ in waiting]) if waiting else []
            now = time.perf_counter()
            for (user, (added, value)), found in zip(waiting, values, strict=True):
                if found == value:
                    del self._waiting[user]
                    self.delays.append((added - began, (now - added) * 1000))
            time.sleep(max(0.0, asked + ASK_SECONDS - time.perf_counter()))
        if self._failed is not None:
            raise self._failed
        return self.delays

    def _add(self, began: float, seconds: float) -> None:
        try:
            for number in range(int(seconds / PROBE_SECONDS)):
                time.sleep(max(0.0, began + number * PROBE_SECONDS - time.perf_counter()))
                self._number += 1
                user, value = USERS + 10 + self._number % PROBED_USERS, float(self._number)
                entry = event(user, value)
                self._waiting[user] = (time.perf_counter(), value)
                self._client.xadd(STREAM, entry)
        except Exception as exc:  # noqa: BLE001 — handed to the thread that asks
            self._failed = exc


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum."""
    ordered = sorted(values)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in shares.items()}


def measure(scene: Userbase, options: argparse.Namespace) -> dict[str, Any]:
    """One run at the rate, and a short one without other events."""
    port = free_port()
    banquet = str(PYTHON_BIN / "banquet")
    client: Any = redis.Redis(port=scene.redis_port)
    client.delete(STREAM)
    stream = [banquet, "--repo", ".", "--json", "stream", "--report-seconds", "1", "--to", options.to]
    with ExitStack() as stack:
        serve = [banquet, "--repo", ".", "serve", "--port", str(port)]
        server = stack.enter_context(process(scene, "serve", *serve)).pid
        names = [f"stream-{number}" for number in range(options.consumers)]
        pids = [stack.enter_context(process(scene, name, *stream)).pid for name in names]
        valkey = int(client.info("server")["process_id"])
        wait_for(Server(port).ready, "the server is ready", 120.0)
        wait_for(lambda: len(_members(client)) == options.consumers, "the consumers read", 120.0)
        Probe(scene.redis_port, port).run(2.0)  # all of it has run once
        idle = Probe(scene.redis_port, port).run(5.0)
        command = [sys.executable, __file__, "--produce", str(scene.redis_port), "--rate", str(options.rate)]
        added = _added(client)
        with process(scene, "producer", *command) as producer:
            wait_for(lambda: _added(client) > added, "the producer adds", 60.0)
            probe = Probe(scene.redis_port, port)
            probe.run(3.0)
            groups = {
                "consumer": pids,
                "Valkey": [valkey],
                "server": [server],
                "producer": [producer.pid],
            }
            loads, began, first = [os.getloadavg()[0]], time.perf_counter(), time.time()
            added, read, told = _added(client), _read(client), [len(reports(scene, name)) for name in names]
            used = spent_by(groups)
            busy = probe.run(options.seconds)
            seconds = time.perf_counter() - began
            used = {name: spent - used[name] for name, spent in spent_by(groups).items()}
            added, read = _added(client) - added, _read(client) - read
            last = time.time()
            steady = [
                line
                for name, before in zip(names, told, strict=True)
                for line in reports(scene, name)[before + 1 :]  # the first one began before
                if line["event"] == "report" and line["online_ms"]
            ]
            loads.append(os.getloadavg()[0])
        wait_for(lambda: _drained(client), "everything is acknowledged", 120.0)
    ends = [reports(scene, name)[-1] for name in names]
    totals = ("entries", "written", "older", "appended", "refused")
    return {
        "events_per_second": {"added": round(added / seconds), "read": round(read / seconds)},
        "seconds": round(last - first, 1),
        "probes": len(busy),
        "to_predict_ms": percentiles([delay for _, delay in busy]),
        "to_predict_ms_alone": percentiles([delay for _, delay in idle]),
        "to_predict_ms_by_second": by_second(busy),
        "within_aim": sum(delay <= AIM_MS for _, delay in busy) / len(busy),
        "to_online_ms_by_second": [line["online_ms"] for line in steady],
        "lag_entries_max": max(line["lag_entries"] or 0 for line in steady),
        "lag_ms_max": round(1000 * max(line["lag_seconds"] or 0.0 for line in steady)),
        "load_average": loads,
        "cpu_us_per_event": {name: round(used[name] / read * 1e6, 1) for name in ("consumer", "Valkey")},
        "cpu_of_a_core": {name: round(spent / seconds, 3) for name, spent in used.items()},
        "consumers": options.consumers,
        "to": options.to,
        "summary": {name: sum(end[name] for end in ends) for name in totals},
    }


def reports(scene: Userbase, consumer: str) -> list[dict[str, Any]]:
    """What a consumer has reported so far."""
    lines = (scene.folder / f"{consumer}.log").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def by_second(delays: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """The percentiles of each second's events."""
    seconds: dict[int, list[float]] = {}
    for second, delay in delays:
        seconds.setdefault(int(second), []).append(delay)
    return [percentiles(found) for _, found in sorted(seconds.items())]


def _members(client: Any) -> list[Any]:
    found: list[Any] = client.xinfo_consumers(STREAM, "banquet")
    return found


def _added(client: Any) -> int:
    return int(client.xinfo_stream(STREAM)["entries-added"])


def _read(client: Any) -> int:
    (group,) = client.xinfo_groups(STREAM)
    return int(group["entries-read"])


def _drained(client: Any) -> bool:
    (group,) = client.xinfo_groups(STREAM)
    return group["lag"] == 0 and group["pending"] == 0


def tables(found: dict[str, Any]) -> str:
    """What docs/stream.md shows."""
    names = list(found["to_predict_ms"])
    seconds = found["to_online_ms_by_second"]
    worst = {name: max(second[name] for second in seconds) for name in ("p50", "p99", "max")}
    rows = [
        [f"XADD to /predict, {found['probes']:,} probes", *found["to_predict_ms"].values()],
        ["the same without other events", *found["to_predict_ms_alone"].values()],
        ["XADD to the online store, all events, worst second", *(worst.get(name, "") for name in names)],
    ]
    low, high = found["load_average"]
    cores = ", ".join(f"{name} {100 * share:.0f}%" for name, share in found["cpu_of_a_core"].items())
    cost, rate = found["cpu_us_per_event"], found["events_per_second"]
    return (
        report.table([f"{rate['added']:,} events/s, {found['seconds']:.0f} s, in ms", *names], rows)
        + f"\n\nWithin {AIM_MS:.0f} ms: {100 * found['within_aim']:.2f}% of the probes. Greatest lag once a "
        f"second: {found['lag_entries_max']} entries, {found['lag_ms_max']} ms. Processor time per event: "
        f"{cost['consumer']} us in the consumer, {cost['Valkey']} us in Valkey with the server's reads. "
        f"Of a core: {cores}. Load average {low:.1f} to {high:.1f} on {os.cpu_count()} cores."
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=int, default=5000, help="events a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--consumers", type=int, default=1)
    parser.add_argument("--to", default="online_and_offline")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "banquet-bench-stream")
    parser.add_argument("--keep", action="store_true", help="write bench/results and the table in docs")
    parser.add_argument("--produce", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.produce:
        produce(options.produce, options.rate)
        return
    with userbase(options.scratch) as scene:
        found = measure(scene, options)
    text = tables(found)
    print(text, found["summary"], sep="\n\n")
    if not options.keep:
        return
    report.write_json("stream", {"machine": report.machine(), **found})
    seconds = list(enumerate(found["to_predict_ms_by_second"]))
    lines = {
        name: [(float(second), values[name]) for second, values in seconds] for name in ("p50", "p99", "max")
    }
    rate = found["events_per_second"]["added"]
    report.line_chart("stream", f"XADD to /predict at {rate:,} events/s", ("seconds", "ms"), lines)
    picture = "\n\n[By second](../bench/results/stream.svg)."
    report.replace_section(HERE.parent / "docs" / "stream.md", "stream", text + picture)


if __name__ == "__main__":
    main()
