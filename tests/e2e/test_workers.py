"""Workers come and go, by choice or by force, and clients on keep-alive connections notice nothing."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.valkey import Valkey
from tests.support.workers import ask, load, served, wait

BODY = {"features": ["profile:age"], "entities": {"user_id": [1, 2]}}
VALUES = [[1, 2], [41, 52]]


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
        assert server.metric("banquet_requests_total", *asked) == 40.0
        assert server.metric("banquet_worker_memory_bytes", 'worker="0"') > 30e6
        assert server.metric("banquet_worker_memory_bytes", 'worker="1"') > 30e6
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
    gone, alive = psutil.wait_procs(workers, timeout=5)
    assert (len(gone), alive) == (2, [])


def test_no_request_fails_while_workers_are_replaced_every_200_requests(repo: Path) -> None:
    """The replacement is there before the old worker drains, an idle connection is not cut, and nothing that
    was counted is lost."""
    pids: set[int] = set()
    fewest = 2
    with served(repo, 2, {"BANQUET_MAX_REQUESTS": "200"}) as server:
        idle = server.connection()
        assert ask(idle, BODY)[0] == 200
        with load(server, BODY, VALUES) as seen:
            until = time.monotonic() + 60
            while len(pids) < 6 and time.monotonic() < until:
                now = server.workers()
                fewest = min(fewest, len(now))
                pids |= now
                time.sleep(0.02)
            # Its worker has long been told to go.
            assert ask(idle, BODY)[::2] == (200, "close")
        assert seen.failures == []
        assert len(pids) >= 6
        assert fewest == 2
        assert seen.answers[200] >= 200 * 3
        assert seen.closed > 0
        asked = ('route="/get-online-features"', 'status="200"')
        assert server.metric("banquet_requests_total", *asked) == seen.answers[200] + 2


def test_a_worker_past_its_memory_limit_is_replaced_without_a_failed_request(repo: Path) -> None:
    with served(repo, 1) as server:
        fresh = server.metric("banquet_worker_memory_bytes") / 1e6
    big = {"features": ["profile:age"], "entities": {"user_id": [1, 2] * 5000}}
    with served(repo, 1, {"BANQUET_MEMORY_LIMIT_MB": str(round(fresh) + 6)}) as server:
        before = server.workers()
        with load(server, BODY, VALUES, pause=0.01) as seen:
            # Answers that are large and asked for at once have to be in memory at once.
            with load(server, big, [[1, 2] * 5000, [41, 52] * 5000]) as heavy:
                wait(lambda: server.workers() > before, "the replacement has been started", 30)
            wait(lambda: not server.workers() & before, "the old worker has gone")
        assert seen.failures == heavy.failures == []
    text = server.log.read_text()
    assert "past its limit" in text
    assert "is to be replaced" in text


def test_a_killed_worker_costs_what_it_had_in_flight_and_is_replaced(repo: Path) -> None:
    with served(repo, 2) as server:
        before = server.workers()
        with load(server, BODY, VALUES) as seen:
            wait(lambda: seen.answers[200] > 300, "the load runs")
            os.kill(min(before), signal.SIGKILL)
            killed = time.monotonic()
            wait(lambda: len(server.workers() - before) == 1, "there is a new one", 5)
            wait(lambda: server.metric("banquet_worker_memory_bytes", "worker=") > 0, "it answers")
            answered = seen.answers[200]
            wait(lambda: seen.answers[200] > answered + 300, "the load goes on", 10)
        # A client has one request in flight and one connection.
        assert len(seen.failures) <= 6
        assert all(moment - killed < 1.0 for moment, _ in seen.failures), seen.failures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_is_in_flight(repo: Path, valkey: Valkey, number: signal.Signals) -> None:
    """Redis holds the replies back until after the signal."""
    answers: list[tuple[int, Any, str | None]] = []
    with served(repo, 2) as server:
        connections = [server.connection() for _ in range(8)]
        for connection in connections:
            assert ask(connection, BODY)[0] == 200
        threads = [
            threading.Thread(target=lambda c: answers.append(ask(c, BODY)), args=(c,)) for c in connections
        ]
        with valkey.client() as client:
            client.client_pause(1200, all=True)
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert answers == []
        server.process.send_signal(number)
        for thread in threads:
            thread.join(10)
        assert server.process.wait(10) == 0
    assert [(status, closes) for status, _, closes in answers] == [(200, "close")] * 8


def test_a_hangup_replaces_every_worker_and_one_that_cannot_start_ends_nothing(repo: Path) -> None:
    store = repo / "feature_store.yaml"
    good = store.read_text()
    with served(repo, 2) as server, load(server, BODY, VALUES, pause=0.005) as seen:
        before = server.workers()
        store.write_text("not: [a, repository")
        server.process.send_signal(signal.SIGHUP)
        wait(lambda: "The others go on" in server.log.read_text(), "a replacement has failed")
        assert before <= server.workers()
        store.write_text(good)
        wait(lambda: not before & server.workers(), "all have been replaced", 30)
        wait(lambda: len(server.workers()) == 2, "there are two")
    assert seen.failures == []
    assert set(seen.answers) == {200}


def test_workers_end_when_their_master_is_killed(repo: Path) -> None:
    """Otherwise they would keep the port from the next server."""
    with served(repo, 2) as server:
        workers = [psutil.Process(pid) for pid in server.workers()]
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert alive == []
