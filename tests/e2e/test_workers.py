"""Workers come and go, by choice or by force, and clients on keep-alive connections notice nothing."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.valkey import Valkey
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from tests.support.workers import Served, ask, load, served

BODY = {"features": ["profile:age"], "entities": {"user_id": [1, 2]}}
VALUES = [[1, 2], [41, 52]]


def has_ended(process: psutil.Process) -> bool:
    """Whether it has ended, also where nobody asks for its exit status, as in some containers."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def repo(shop: Path, tmp_path: Path) -> Path:
    """A repository that a test may break."""
    return Path(shutil.copytree(shop, tmp_path / "repo"))


def test_workers_share_the_port_and_the_counts_and_end_together(repo: Path) -> None:
    with served(repo, 2) as server:
        workers = [psutil.Process(pid) for pid in server.workers()]
        assert len(workers) == 2
        for _ in range(40):  # a new connection each, so that both get some
            connection = server.connection()
            assert ask(connection, BODY)[1]["results"][1]["values"] == VALUES[1]
            connection.close()
        asked = ('route="/get-online-features"', 'status="200"')
        wait_until(lambda: server.metric("banquet_requests_total", *asked) == 40.0, "both have counted")
        assert server.metric("banquet_worker_memory_bytes", 'worker="0"') > 30e6
        assert server.metric("banquet_worker_memory_bytes", 'worker="1"') > 30e6
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_SECONDS) == 0
    assert len(workers) == 2
    assert all(map(has_ended, workers))


def told_to_go(server: Served) -> set[int]:
    """The workers that have asked to be replaced."""
    return set(map(int, re.findall(r"worker (\d+) is to be replaced", server.log.read_text())))


def test_no_request_fails_while_workers_are_replaced_every_200_requests(repo: Path) -> None:
    """The replacement is there before the old worker drains, an idle connection is not cut, and nothing that
    was counted is lost."""
    pids: set[int] = set()
    fewest = 2
    with served(repo, 2, {"BANQUET_MAX_REQUESTS": "200", "BANQUET_KEEP_ALIVE_S": "600"}) as server:
        first = server.workers()
        idle = server.connection()
        assert ask(idle, BODY)[0] == 200

        def enough() -> bool:
            nonlocal fewest
            now = server.workers()
            fewest = min(fewest, len(now))
            pids.update(now)
            return len(pids) >= 6 and len(first & now) <= 1 and first <= told_to_go(server)

        with load(server, BODY, VALUES) as seen:
            # One of the first is left: it drains until its idle connection has said something.
            wait_until(enough, "workers have come and gone", pause_seconds=0.02)
            assert ask(idle, BODY)[::2] == (200, "close")
        assert seen.failures == []
        assert fewest == 2
        assert seen.answers[200] >= 200 * 3
        assert seen.closed > 0
        asked = ('route="/get-online-features"', 'status="200"')
        expected = seen.answers[200] + 2
        wait_until(lambda: server.metric("banquet_requests_total", *asked) == expected, "all have counted")


def test_a_worker_past_its_memory_limit_is_replaced_without_a_failed_request(repo: Path) -> None:
    with served(repo, 1) as server:
        fresh = server.metric("banquet_worker_memory_bytes") / 1e6
    big = {"features": ["profile:age"], "entities": {"user_id": [1, 2] * 5000}}
    with served(repo, 1, {"BANQUET_MEMORY_LIMIT_MB": str(round(fresh) + 6)}) as server:
        before = server.workers()
        with load(server, BODY, VALUES, pause=0.01) as seen:
            # Answers that are large and asked for at once have to be in memory at once.
            with load(server, big, [[1, 2] * 5000, [41, 52] * 5000]) as heavy:
                wait_until(lambda: server.workers() > before, "the replacement has been started")
            wait_until(lambda: not server.workers() & before, "the old worker has gone")
        assert seen.failures == heavy.failures == []
    text = server.log.read_text()
    assert "past its limit" in text
    assert "is to be replaced" in text


def test_a_killed_worker_costs_what_it_had_in_flight_and_is_replaced(repo: Path) -> None:
    with served(repo, 2) as server:
        before = server.workers()
        with load(server, BODY, VALUES) as seen:
            wait_until(lambda: seen.answers[200] > 300, "the load runs")
            killed = time.monotonic()
            os.kill(min(before), signal.SIGKILL)
            wait_until(lambda: len(server.workers() - before) == 1, "there is a new one")
            wait_until(lambda: server.metric("banquet_worker_memory_bytes", "worker=") > 0, "it answers")
            answered = seen.answers[200]
            wait_until(lambda: seen.answers[200] > answered + 300, "the load goes on")
            recovered = time.monotonic()
        # A client has one request in flight and one connection.
        assert len(seen.failures) <= 6
        assert all(killed <= moment <= recovered for moment, _ in seen.failures), seen.failures


def have_been_read(server: Served, connections: Sequence[http.client.HTTPConnection]) -> bool:
    """Whether a request went out on each connection, and nothing of it is left in the kernel's buffers."""
    if any(connection._HTTPConnection__state != "Request-sent" for connection in connections):
        return False
    queues = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, _, queue, *_ = line.split()
        queues[int(here.split(":")[1], 16), int(there.split(":")[1], 16)] = queue
    ports = [connection.sock.getsockname()[1] for connection in connections]
    ends = [(server.port, port) for port in ports] + [(port, server.port) for port in ports]
    return all(queues[end] == "00000000:00000000" for end in ends)


def refuses(server: Served) -> bool:
    """Whether no worker takes a new connection."""
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port), 10):
        return False
    return True


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel's buffers are looked into")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_is_in_flight(repo: Path, valkey: Valkey, number: signal.Signals) -> None:
    """Redis hangs until the server takes no more connections."""
    answers: list[tuple[int, Any, str | None]] = []
    with served(repo, 2) as server:
        connections = [server.connection() for _ in range(8)]
        for connection in connections:
            assert ask(connection, BODY)[0] == 200
        threads = [
            threading.Thread(target=lambda c: answers.append(ask(c, BODY)), args=(c,)) for c in connections
        ]
        valkey.pause()
        try:
            for thread in threads:
                thread.start()
            wait_until(lambda: have_been_read(server, connections), "the workers have the requests")
            assert answers == []
            server.process.send_signal(number)
            wait_until(lambda: refuses(server), "the server is stopping")
        finally:
            valkey.resume()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert server.process.wait(PATIENCE_SECONDS) == 0
    assert [(status, closes) for status, _, closes in answers] == [(200, "close")] * 8


def test_a_hangup_replaces_every_worker_and_one_that_cannot_start_ends_nothing(repo: Path) -> None:
    store = repo / "feature_store.yaml"
    good = store.read_text()
    with served(repo, 2) as server, load(server, BODY, VALUES, pause=0.005) as seen:
        before = server.workers()
        store.write_text("not: [a, repository")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "The others go on" in server.log.read_text(), "a replacement has failed")
        assert before <= server.workers()
        store.write_text(good)
        wait_until(lambda: not before & server.workers(), "all have been replaced")
        wait_until(lambda: len(server.workers()) == 2, "there are two")
    assert seen.failures == []
    assert set(seen.answers) == {200}


def test_workers_end_when_their_master_is_killed(repo: Path) -> None:
    """Otherwise they would keep the port from the next server."""
    with served(repo, 2) as server:
        workers = [psutil.Process(pid) for pid in server.workers()]
        server.process.kill()
        server.process.wait()
        wait_until(lambda: all(map(has_ended, workers)), "the workers have ended")
