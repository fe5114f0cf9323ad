"""A supervised server in processes of its own, and clients on keep-alive connections that never retry."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.valkey import free_port
from tests.support.waiting import PATIENCE_SECONDS, wait_until


@dataclass(frozen=True)
class Served:
    """The master process and the address of its server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def starts(self) -> bool:
        """True; raises with the log where the master has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.log.read_text(errors='replace')}")
        return True

    def workers(self) -> set[int]:
        """The process ids of the workers, ready or not."""
        return {child.pid for child in psutil.Process(self.process.pid).children()}

    def connection(self) -> http.client.HTTPConnection:
        """A connection of one client; it opens anew after the server has said that it closes."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples that have all these labels, such as ``status="200"``."""
        connection = self.connection()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        lines = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for given, value in lines if all(label in given for label in labels))


@contextmanager
def served(repo: Path, workers: int, environ: Mapping[str, str] | None = None) -> Iterator[Served]:
    """``banquet serve``, until the block ends; all its workers are ready when it begins."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("banquet")), "--repo", str(repo), "serve"]
    log = repo / f"serve-{port}.log"
    # Feast names a metrics folder of its own when it is imported, as other tests of this process do.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("BANQUET_", "PROMETHEUS_"))}
    settings = {"BANQUET_FEATURES_ONLY": "true", "BANQUET_STATE_DIR": str(repo / ".banquet")}
    settings |= {"BANQUET_REDIS_TIMEOUT_S": "30"}  # a busy machine is no Redis that is away
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--workers", str(workers)],
            env={**inherited, **settings, **(environ or {})},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    found = Served(process, port, log)
    try:
        for slot in range(workers):
            labels = "banquet_worker_memory_bytes", f'worker="{slot}"'
            wait_until(
                lambda labels=labels: found.starts() and found.metric(*labels) > 0, f"worker {slot} reports"
            )
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask(connection: http.client.HTTPConnection, body: object) -> tuple[int, Any, str | None]:
    """The status, the answer and the Connection header of one read of features."""
    connection.request("POST", "/get-online-features", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response.getheader("connection")


@dataclass
class Load:
    """What clients saw: answers by status, answers after which the server closed, and failures."""

    answers: Counter[int] = field(default_factory=Counter)
    closed: int = 0
    failures: list[tuple[float, str]] = field(default_factory=list)


@contextmanager
def load(
    server: Served, body: object, expect: object, clients: int = 6, pause: float = 0.0
) -> Iterator[Load]:
    """Clients that ask ``body`` all the time, each on its connection, and check the results against
    ``expect``."""
    seen, stop = Load(), threading.Event()

    def client() -> None:
        connection = server.connection()
        while not stop.is_set():
            try:
                status, answer, closes = ask(connection, body)
            except (OSError, http.client.HTTPException) as exc:
                seen.failures.append((time.monotonic(), repr(exc)))
                connection.close()
                continue
            if status == 200 and [result["values"] for result in answer["results"]] != expect:
                seen.failures.append((time.monotonic(), f"wrong: {answer}"))
            seen.answers[status] += 1
            seen.closed += closes == "close"
            stop.wait(pause)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a client hangs"
