"""From XADD to /predict: how long until an event counts in a prediction, at a steady rate of events.

    python bench/stream.py [--rate 5000] [--seconds 20] [--to online_and_offline] [--consumers 1]

Real processes on one machine: Valkey, one `banquet serve` worker with the model of the serving bench,
`banquet stream`, and a producer of events with 10 features. Beside them a probe adds an event with a value of
its own for a user of its own every 50 ms, then asks POST /predict for that user until the answer is made from
that value. What it prints covers adding, delivery, checking, the online write, the read and the prediction.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402 — the folder is no package: its files are scripts
from userbase import USERS, Userbase, free_port, userbase, wait_for  # noqa: E402

PYTHON_BIN = Path(sys.executable).parent
STREAM = "banquet:events:bench"
PROBE_SECONDS = 0.05
AIM_MS = 100.0


def event(user: int, first: float) -> dict[str, str]:
    """The fields of an entry."""
    row: dict[str, Any] = {"user_id": user, "event_timestamp": datetime.now(tz=UTC).isoformat()}
    row |= {"signal_0": first, **{f"signal_{i}": first + i for i in range(1, 10)}}
    return {"push_source": "user_behavior_push", "event": json.dumps(row)}


def produce(port: int, rate: int) -> None:
    """Add events at ``rate`` a second until killed, those of 5 ms together; catches up after a delay."""
    rng = random.Random(1)
    client = redis.Redis(port=port)
    began, added = time.perf_counter(), 0
    while True:
        due = int((time.perf_counter() - began) * rate)
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(min(due - added, 200)):
                pipeline.xadd(STREAM, event(rng.randrange(USERS), rng.random()))
            added += len(pipeline.execute())
        if due - added < 200:
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


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used; the one number here that a busy machine hardly moves."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    """Asks /predict over one connection that stays open."""

    def __init__(self, port: int) -> None:
        self._port = port
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

    def signal(self, user: int) -> float | None:
        """The value of the user's first signal that a prediction is made from."""
        body = json.dumps({"entities": [{"user_id": user}], "explain": True})
        self._connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        (row,) = json.loads(text)["predictions"]
        value: float | None = row["features"]["user_behavior__signal_0"]["value"]
        return value


def probe(client: Any, server: Server, seconds: float) -> list[float]:
    """Milliseconds from just before XADD to the answer that knows the event, one per probe."""
    delays, number = [], 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        number += 1
        user, value = USERS + 10 + number % 97, float(number)
        began = time.perf_counter()
        client.xadd(STREAM, event(user, value))
        while server.signal(user) != value:
            if time.perf_counter() - began > 30:
                raise TimeoutError("an event did not reach /predict in 30 s")
            time.sleep(0.001)
        delays.append((time.perf_counter() - began) * 1000)
        time.sleep(max(0.0, began + PROBE_SECONDS - time.perf_counter()))
    return delays


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum."""
    ordered = sorted(values)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in shares.items()}


def measure(scene: Userbase, options: argparse.Namespace) -> dict[str, Any]:
    """One run at the rate, and one without other events."""
    port = free_port()
    banquet = str(PYTHON_BIN / "banquet")
    client: Any = redis.Redis(port=scene.redis_port)
    client.delete(STREAM)
    stream = [banquet, "--repo", ".", "--json", "stream", "--report-seconds", "1", "--to", options.to]
    with ExitStack() as stack:
        stack.enter_context(process(scene, "serve", banquet, "--repo", ".", "serve", "--port", str(port)))
        names = [f"stream-{number}" for number in range(options.consumers)]
        pids = [stack.enter_context(process(scene, name, *stream)).pid for name in names]
        valkey = int(client.info("server")["process_id"])
        server = Server(port)
        wait_for(server.ready, "the server is ready", 120.0)
        members = options.consumers
        wait_for(
            lambda: len(client.xinfo_consumers(STREAM, "banquet")) == members, "the consumers read", 120.0
        )
        server = Server(port)  # the connection has been idle for too long
        probe(client, server, 3.0)
        idle = probe(client, server, 5.0)
        producer = [sys.executable, __file__, "--produce", str(scene.redis_port), "--rate", str(options.rate)]
        before = _added(client)
        with process(scene, "producer", *producer):
            wait_for(lambda: _added(client) > before, "the producer adds", 60.0)
            server = Server(port)
            probe(client, server, 3.0)
            began, before = time.perf_counter(), _added(client)
            cpu = [sum(map(cpu_seconds, pids)), cpu_seconds(valkey)]
            handled = _read(client)
            loads = [os.getloadavg()[0]]
            busy = probe(client, server, options.seconds)
            loads.append(os.getloadavg()[0])
            rate = (_added(client) - before) / (time.perf_counter() - began)
            handled = _read(client) - handled
            spent = [sum(map(cpu_seconds, pids)) - cpu[0], cpu_seconds(valkey) - cpu[1]]
        wait_for(lambda: _drained(client), "everything is acknowledged", 120.0)
    reports = [
        json.loads(line) for line in (scene.folder / "stream-0.log").read_text().splitlines() if line.strip()
    ]
    steady = [r for r in reports if r["event"] == "report" and r["per_second"] > options.rate / 10]
    return {
        "rate": round(rate),
        "probes": len(busy),
        "to_predict_ms": percentiles(busy),
        "to_predict_ms_without_load": percentiles(idle),
        "to_online_ms_by_second": [r["online_ms"] for r in steady],
        "load_average": loads,
        "consumer_cpu_us_per_event": round(spent[0] / handled * 1e6, 1),
        "redis_cpu_us_per_event": round(spent[1] / handled * 1e6, 1),
        "consumers": options.consumers,
        "to": options.to,
        "summary": {k: reports[-1][k] for k in ("entries", "written", "older", "appended", "refused")},
    }


def _added(client: Any) -> int:
    return int(client.xinfo_stream(STREAM)["entries-added"])


def _read(client: Any) -> int:
    (group,) = client.xinfo_groups(STREAM)
    return int(group["entries-read"])


def _drained(client: Any) -> bool:
    (group,) = client.xinfo_groups(STREAM)
    return group["lag"] == 0 and group["pending"] == 0


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=int, default=5000, help="events a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--consumers", type=int, default=1)
    parser.add_argument("--to", default="online_and_offline")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "banquet-bench-stream")
    parser.add_argument("--produce", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.produce:
        produce(options.produce, options.rate)
        return
    with userbase(options.scratch) as scene:
        found = measure(scene, options)
    report.write_json("stream", {"machine": report.machine(), **found})
    rows = [
        [name, *found[key].values()]
        for name, key in (
            (f"{found['rate']:,} events/s", "to_predict_ms"),
            ("probes alone", "to_predict_ms_without_load"),
        )
    ]
    print(report.table(["XADD to /predict, ms", *found["to_predict_ms"]], rows))
    seconds = found["to_online_ms_by_second"]
    within = sum(second["p99"] <= AIM_MS for second in seconds)
    low, high = found["load_average"]
    print(
        f"\n{found['probes']} probes; load average {low:.1f} to {high:.1f} on {os.cpu_count()} cores. All "
        f"events: p99 from XADD to the online store within {AIM_MS:.0f} ms in {within} of {len(seconds)} "
        f"seconds. Processor time per event: {found['consumer_cpu_us_per_event']} us in the consumer, "
        f"{found['redis_cpu_us_per_event']} us in Valkey. {found['summary']}"
    )


if __name__ == "__main__":
    main()
