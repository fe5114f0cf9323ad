"""A materialization killed anywhere by `kill -9` is resumed: nothing done twice, the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from feast import Field
from feast.feature_view import FeatureViewState
from feast.types import Float64

from core.repository import FeastRepository
from materialization.ledger import Ledger
from tests.support.children import materializing, wait_halted
from tests.support.loads import NOW, USER, a_view, everything, repository, write_rows
from tests.support.valkey import Valkey
from tests.support.waiting import PATIENCE_SECONDS

KILLS = int(os.environ.get("TEST_KILLS", "20"))
ROWS = 6_000
CHUNK_ROWS = 300


@pytest.fixture(scope="module")
def repo(own_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    path = tmp_path_factory.mktemp("repo")
    rng = random.Random(1)
    rows = [
        (user, f"2026-04-{rng.randint(1, 28):02}", "2026-04-29", rng.random())
        for user in range(ROWS)
        for _ in range(2)
    ]
    write_rows(path / "events.parquet", rows, **{f"f{i}": [i / 3] * len(rows) for i in range(5)})
    repo = repository(path / "repo", own_valkey)
    schema = [Field(name=name, dtype=Float64) for name in ("value", *(f"f{i}" for i in range(5)))]
    repo.store().apply([USER, a_view(path / "events.parquet", schema=schema)])
    return repo


def complete(repo: FeastRepository, **options: Any) -> dict[str, Any]:
    """Run to the end in a process of its own."""
    with materializing(repo.path, NOW, chunk_rows=CHUNK_ROWS, **options) as (process, answers):
        process.join(3 * PATIENCE_SECONDS)
        assert process.exitcode == 0
        (report,) = answers.get()
    assert report["ok"], report
    return report


def rows_done(server: Valkey) -> int | None:
    """How far the interrupted run came by its ledger; None if no run is under way."""
    with server.client() as client:
        unfinished = Ledger(client, "shop", "behavior").unfinished()
    return None if unfinished is None else unfinished.rows_done


@pytest.mark.timeout(1800)
def test_a_run_killed_anywhere_is_resumed_and_leaves_the_same_bytes(
    own_valkey: Valkey, repo: FeastRepository
) -> None:
    assert complete(repo)["written"] == ROWS
    expected = everything(own_valkey)
    assert len(expected) == ROWS
    rng = random.Random(int(os.environ.get("TEST_SEED", "1")))
    interrupted = 0
    for kill in range(KILLS):
        with own_valkey.client() as client:
            client.flushall()
        with materializing(repo.path, NOW, chunk_rows=CHUNK_ROWS) as (process, _):
            # Wherever it is by then: before its first chunk, between two, within one, at its end.
            target = rng.randrange(-ROWS // 10, ROWS)
            while process.is_alive() and (rows_done(own_valkey) or 0) < target:
                time.sleep(0.001)
            process.join(rng.uniform(0.0, 0.02))
            process.kill()
            process.join()
        done = rows_done(own_valkey)
        report = complete(repo)
        assert everything(own_valkey) == expected, f"after kill {kill} at row {done}"
        if done:
            interrupted += 1
            assert report["resumed"]
            # The run that was resumed wrote what was left; the incremental one after it found nothing.
            assert report["written"] == ROWS - done, f"after kill {kill} at row {done}"
        assert rows_done(own_valkey) is None
    assert interrupted >= KILLS // 4, "the kills missed the writing"
    repo.store().refresh_registry()
    view = repo.store().get_feature_view("behavior")
    assert view.state == FeatureViewState.AVAILABLE_ONLINE
    assert view.most_recent_end_time == NOW


def test_a_run_killed_again_and_again_gets_on(own_valkey: Valkey, repo: FeastRepository) -> None:
    """Each attempt dies soon after its first chunks; the position only grows, and the end is reached."""
    with own_valkey.client() as client:
        client.flushall()
    positions = [0]
    while len(positions) < 5:
        halt_at = positions[-1] + 5 * CHUNK_ROWS
        with materializing(repo.path, NOW, chunk_rows=CHUNK_ROWS, halt_at=halt_at) as (process, _):
            wait_halted(process)
            process.kill()
            process.join()
        done = rows_done(own_valkey)
        assert done == halt_at
        positions.append(done)
    complete(repo)
    assert len(everything(own_valkey)) == ROWS


def test_a_source_that_changed_in_between_is_loaded_from_the_start(
    own_valkey: Valkey, tmp_path: Path
) -> None:
    with own_valkey.client() as client:
        client.flushall()
    rows = [(user, "2026-04-20", "2026-04-21", 1.0) for user in range(5000)]
    write_rows(tmp_path / "events.parquet", rows)
    repo = repository(tmp_path / "repo", own_valkey)
    repo.store().apply([USER, a_view(tmp_path / "events.parquet")])
    with materializing(repo.path, NOW, chunk_rows=50, slice_rows=50, halt_at=50) as (process, _):
        wait_halted(process)
        process.kill()
        process.join()
    assert rows_done(own_valkey)
    write_rows(tmp_path / "events.parquet", [*rows, (0, "2026-04-22", "2026-04-22", 2.0)])
    report = complete(repo)
    assert not report["resumed"]
    assert report["reason"] == "first load"
    assert report["written"] == 5000


def test_a_dead_runs_lease_does_not_hold_up_the_next(own_valkey: Valkey, repo: FeastRepository) -> None:
    with own_valkey.client() as client:
        client.flushall()
    with materializing(repo.path, NOW, chunk_rows=50, slice_rows=50, halt_at=50) as (process, _):
        wait_halted(process)
        process.kill()
        process.join()
    with own_valkey.client() as client:
        assert client.exists(Ledger(client, "shop", "behavior").lease_key)
    complete(repo)


def test_a_lease_that_expired_is_lost_to_its_holder(own_valkey: Valkey, repo: FeastRepository) -> None:
    """A run that was stopped for longer than its lease must not go on over the run that replaced it."""
    with own_valkey.client() as client:
        client.flushall()
        ledger = Ledger(client, "shop", "behavior")
        with materializing(repo.path, NOW, chunk_rows=50, slice_rows=50, halt_at=50) as (process, answers):
            wait_halted(process)
            client.delete(ledger.lease_key)  # as its expiry would
            with ledger.lease():
                os.kill(process.pid, signal.SIGCONT)
                (report,) = answers.get()
            assert report["error"]["code"] == "lease_lost"
    assert complete(repo, wait_seconds=60)["ok"]
