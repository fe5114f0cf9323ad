"""The statistics of a rollout on a real Valkey: they add up, outlive its crashes, and count labels once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import RedisUnavailable
from core.judge import judge
from core.observed import LATENCY_EDGES_SECONDS, PROBABILITY_EDGES, Observed, histogram
from core.redis import RedisAddress
from serving.trial_store import (
    TrialName,
    keep_verdict,
    read_comparison,
    read_disagreements,
    read_trial,
    read_verdicts,
    take_look,
    take_turn,
)
from serving.trials import TrialRecorder
from tests.support.valkey import Cluster, Valkey
from tests.support.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
DURABLE = ("appendonly yes", "appendfsync always")

# A worker of its own: it records some thousand requests of both variants and flushes now and then.
WORKER = """
import random, sys
from core.redis import RedisAddress
from serving.trials import TrialRecorder

port, trial, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng = random.Random(seed)
recorder = TrialRecorder(RedisAddress((("127.0.0.1", port),)), "shop", "m", trial, classes=(0, 1))
for n in range(4000):
    rows = rng.randrange(1, 5)
    scores = [rng.random() for _ in range(rows)]
    seconds = 0.001 * rng.randrange(1, 90)
    recorder.observe(("champion", "challenger")[n % 2], rows, n % 10 == 0, seconds, scores)
    if n % 500 == 0:
        assert recorder.flush()
recorder.close()
"""


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name[:40]}-{time.time_ns()}"


def recorder(address: RedisAddress, trial: str, **options: Any) -> TrialRecorder:
    return TrialRecorder(address, "shop", "m", trial, **{"classes": (0, 1), **options})


@pytest.fixture
def notes(valkey: Valkey, trial: str) -> Iterator[TrialRecorder]:
    found = recorder(valkey.address(), trial)
    yield found
    found.close()


def read(address: RedisAddress, trial: str, step: int = 0) -> dict[str, Observed]:
    with address.session() as client:
        return read_trial(client, TrialName("shop", "m", trial), step)


def test_two_processes_at_once_add_up_exactly(valkey: Valkey, trial: str) -> None:
    import random

    command = [sys.executable, "-c", WORKER, str(valkey.port), trial]
    workers = [subprocess.Popen([*command, str(seed)], cwd=ROOT) for seed in (1, 2)]
    assert [worker.wait(PATIENCE_SECONDS) for worker in workers] == [0, 0]

    found = read(valkey.address(), trial)
    for place, variant in enumerate(("champion", "challenger")):
        rows, seconds, scores = [], [], []
        for seed in (1, 2):
            rng = random.Random(seed)
            for n in range(4000):
                number = rng.randrange(1, 5)
                of_request = [rng.random() for _ in range(number)]
                duration = 0.001 * rng.randrange(1, 90)
                if n % 2 == place:
                    rows.append(number)
                    scores += of_request
                    seconds.append(duration)
        assert found[variant] == Observed(
            rows=sum(rows),
            errors=800 if variant == "champion" else 0,
            rows_squared=sum(number**2 for number in rows),
            latency=histogram(seconds, LATENCY_EDGES_SECONDS),
            scores=histogram(scores, PROBABILITY_EDGES),
        )


def test_what_is_observed_while_a_flush_runs_is_not_lost(valkey: Valkey, trial: str) -> None:
    notes, done = recorder(valkey.address(), trial), threading.Event()

    def flush() -> None:
        while not done.is_set():
            notes.flush()

    thread = threading.Thread(target=flush)
    thread.start()
    for _ in range(200_000):
        notes.observe("champion", 1, 0, 0.01, (0.5,))
    done.set()
    thread.join()
    notes.close()
    found = read(valkey.address(), trial)["champion"]
    assert (found.rows, found.requests, sum(found.scores.values())) == (200_000,) * 3


def test_a_killed_redis_loses_nothing_and_gets_what_was_kept(tmp_path: Path, trial: str) -> None:
    with Valkey(tmp_path, *DURABLE) as server:
        notes = recorder(server.address(), trial)
        notes.observe("challenger", 2, 1, 0.02, [0.25])
        assert notes.flush()
        server.kill()
        for _ in range(3):
            notes.observe("challenger", 1, 0, 0.02, [0.25])
            notes.remember("challenger", "r1", [0], [1], [0.75])
            assert not notes.flush()
        with pytest.raises(RedisUnavailable):
            notes.label("r1", {0: 1})
        server.start()
        assert notes.flush()
        assert notes.flush()
        found = read(server.address(), trial)["challenger"]
        assert (found.rows, found.errors, found.requests) == (5, 1, 4)
        assert notes.label("r1", {0: 1}) == 1
        notes.close()


def test_a_batch_whose_answer_was_lost_is_added_once(
    tmp_path: Path, trial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.trials._TIMEOUT_SECONDS", 1.0)
    with Valkey(tmp_path) as server:
        notes = recorder(server.address(), trial)
        notes.observe("champion", 1, 0, 0.01, [0.5])
        assert notes.flush()
        notes.observe("champion", 1, 0, 0.01, [0.5])
        server.pause()  # it takes the batch from its socket when it resumes, again and again
        assert not notes.flush()
        server.resume()
        assert notes.flush()
        notes.close()
        assert read(server.address(), trial)["champion"].rows == 2


def test_observing_never_waits_for_redis(tmp_path: Path, trial: str) -> None:
    """Memory stays bounded, too: counts take the place of what was gathered."""
    with Valkey(tmp_path) as server:
        notes = recorder(server.address(), trial, sample_rows=100)
        server.pause()
        with ThreadPoolExecutor() as pool:
            flush = pool.submit(notes.flush)
            for n in range(120_000):
                notes.observe("champion", 1, 0, 0.01, (0.5,))
                notes.remember("champion", f"r{n}", (0,), (1,), (0.5,))
            assert len(notes._gathered["champion"].rows) <= 50_001
            assert len(notes._sample["champion"]) <= 200 + 50_001
            server.resume()
            flush.result(PATIENCE_SECONDS)
        notes.close()
        assert read(server.address(), trial)["champion"].rows == 120_000


def test_steps_are_kept_apart(valkey: Valkey, trial: str) -> None:
    """What was observed in a step counts there, also when it is flushed in the next."""
    notes = recorder(valkey.address(), trial)
    notes.observe("champion", 1, 0, 0.01, [0.5])
    notes.begin(1)
    notes.observe("champion", 10, 0, 0.01, [0.5] * 10)
    notes.close()
    address = valkey.address()
    assert [read(address, trial, step)["champion"].rows for step in (0, 1, 2)] == [1, 10, 0]
    assert read(address, trial, 2) == {"champion": Observed(), "challenger": Observed()}


def test_one_at_a_time_judges_and_a_look_is_taken_once(valkey: Valkey, trial: str) -> None:
    name = TrialName("shop", "m", trial)
    with valkey.address().session() as client:
        assert take_turn(client, name, 60.0)
        assert not take_turn(client, name, 60.0)
        another = TrialName("shop", "m", f"{trial}-2")
        assert take_turn(client, another, 0.1)
        wait_until(lambda: take_turn(client, another, 0.1), "the turn has passed")
        assert take_look(client, name, 3)
        assert not take_look(client, name, 3)
        assert read_verdicts(client, name) == {}
        keep_verdict(client, name, 3, {"decision": "abort"})
        assert read_verdicts(client, name) == {3: {"decision": "abort"}}
        assert client.ttl(name.key("looks")) > 0


def test_everything_expires_and_a_trial_is_its_own(valkey: Valkey, trial: str) -> None:
    notes = recorder(valkey.address(), trial, lifetime_seconds=100)
    notes.observe("champion", 1, 0, 0.01, [0.5])
    notes.remember("champion", "r1", [0, 1], [1, 0], [0.75, 0.1])
    notes.compare("r1", {"user_id": [7]}, [1], [0], [0.9], [0.4])
    assert notes.flush()
    notes.label("r1", {0: 1})
    notes.close()
    with valkey.address().session() as client:
        keys = list(client.scan_iter(f"banquet:trial:{{shop:m:{trial}}}*"))
        assert len(keys) == 6
        assert all(0 < client.ttl(key) <= 100 for key in keys)
        assert read_trial(client, TrialName("shop", "m", "another"), 0)["champion"] == Observed()
        assert read_disagreements(client, TrialName("shop", "m", "another")) == []


# Labels


def test_a_label_counts_once_whoever_sends_it_again(notes: TrialRecorder, valkey: Valkey, trial: str) -> None:
    notes.remember("challenger", "r1", [0, 2], [1, 0], [0.75, 0.25])
    notes.remember("champion", "r1", [1], [1], [0.5])
    notes.flush()
    assert notes.label("r1", {0: 1, 2: 1}) == 2
    assert notes.label("r1", {0: 0, 1: 1, 2: 0}) == 1
    assert notes.label("r1", {0: 1, 1: 1, 2: 1}) == 0
    assert notes.label("never predicted", {0: 1}) == 0
    assert notes.label("r1", {}) == 0
    found = read(valkey.address(), trial)
    challenger = found["challenger"]
    assert (challenger.labels, challenger.correct) == (2, 1)
    assert challenger.log_loss.total == pytest.approx(-np.log(0.75) - np.log(0.25))
    assert challenger.positive == histogram([0.75, 0.25], PROBABILITY_EDGES)
    assert challenger.negative == {}
    assert (found["champion"].labels, found["champion"].correct) == (1, 1)


def test_labels_that_are_sent_at_the_same_time_count_once(
    notes: TrialRecorder, valkey: Valkey, trial: str
) -> None:
    for n in range(300):
        notes.remember("challenger", f"r{n}", [0, 1], [1, 0], [0.75, 0.25])
    notes.flush()
    with ThreadPoolExecutor(4) as pool:
        counted = sum(pool.map(lambda n: notes.label(f"r{n % 300}", {0: 1, 1: n % 2}), range(1_200)))
    assert counted == read(valkey.address(), trial)["challenger"].labels == 600


def test_what_is_no_label_leaves_the_prediction_waiting(
    notes: TrialRecorder, valkey: Valkey, trial: str
) -> None:
    notes.remember("champion", "r1", [0], [1])
    notes.flush()
    for nonsense in (None, "1", 2, float("nan"), [1]):
        assert notes.label("r1", {0: nonsense}) == 0
    assert notes.label("r1", {0: 1}) == 1
    found = read(valkey.address(), trial)["champion"]
    assert (found.labels, found.correct, found.log_loss.count) == (1, 1, 0)


def test_labels_of_many_classes_and_of_values(valkey: Valkey, trial: str) -> None:
    several = recorder(valkey.address(), trial, classes=("a", "b", "c"))
    several.remember("champion", "r1", [0, 1], ["a", "b"], [[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]])
    several.flush()
    assert several.label("r1", {0: "a", 1: "c"}) == 2
    several.close()
    values = recorder(valkey.address(), trial + "v", classes=(), score_edges=(1.0, 2.0))
    values.observe("champion", 2, 0, 0.01, [0.5, 1.5])
    values.remember("champion", "r1", [0, 1], [np.float64(3.0), 4.0])
    values.flush()
    assert values.label("r1", {0: 1, 1: 4.5}) == 2
    values.close()
    found = read(valkey.address(), trial)["champion"]
    assert (found.labels, found.correct, found.positive) == (2, 1, {})
    assert found.log_loss.total == pytest.approx(-np.log(0.5) - np.log(1e-6))
    found = read(valkey.address(), trial + "v")["champion"]
    assert found.scores == {0: 1, 1: 1}
    assert (found.squared_error.count, found.squared_error.total) == (2, 4.25)


def test_the_sample_is_bounded_and_even_over_the_whole_trial(valkey: Valkey, trial: str) -> None:
    """Two workers, ten flushes each: every tenth of the trial has its tenth of the sample."""
    workers = [recorder(valkey.address(), trial, sample_rows=1_000) for _ in range(2)]
    for tenth in range(10):
        for number, worker in enumerate(workers):
            for n in range(1_000):
                worker.remember("champion", f"{tenth}-{number}-{n}", [0], [1], [0.5])
            worker.flush()
    name = TrialName("shop", "m", trial)
    with valkey.address().session() as client:
        kept = [field.decode() for field in client.hkeys(name.key("sample", "champion"))]
        assert client.zcard(name.key("order", "champion")) == len(kept) == 1_000
    tenths = np.bincount([int(field[0]) for field in kept])
    assert ((tenths - 100) ** 2 / 100).sum() < 60.7  # chi-square with 9 degrees of freedom, p = 1e-9
    for worker in workers:
        worker.close()


# Shadow


def test_shadow_predictions_are_compared_and_disagreements_listed(
    notes: TrialRecorder, valkey: Valkey, trial: str
) -> None:
    notes.compare(
        "r1", {"user_id": [1, 2, 3]}, [1, 0, 1], [1, 1, None], np.array([0.75, 0.25, 0.5]), [0.5, 0.625, None]
    )
    notes.compare("r2", {"user_id": [4]}, [0.1], [0.1 + 1e-12])
    notes.flush()
    with valkey.address().session() as client:
        found = read_comparison(client, TrialName("shop", "m", trial))
        rows = read_disagreements(client, TrialName("shop", "m", trial))
    assert (found.rows, found.agreed, found.scored) == (4, 2, 2)
    assert (found.agreement, found.mean_difference, found.largest) == (0.5, 0.3125, 0.375)
    assert [row["entity"] for row in rows] == [{"user_id": 3}, {"user_id": 2}]
    assert rows[1] == {
        "request_id": "r1",
        "entity": {"user_id": 2},
        "champion": {"prediction": 0, "score": 0.25},
        "challenger": {"prediction": 1, "score": 0.625},
    }


def test_disagreements_are_capped(
    notes: TrialRecorder, valkey: Valkey, trial: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.trial_store.MOST_DISAGREEMENTS", 200)
    for flush in range(10):
        notes.compare(f"r{flush}", {"user_id": range(1_000)}, [0] * 1_000, [1] * 1_000)
        notes.flush()
    with valkey.address().session() as client:
        rows = read_disagreements(client, TrialName("shop", "m", trial), most=10_000)
        assert read_comparison(client, TrialName("shop", "m", trial)).rows == 10_000
    assert 100 <= len(rows) <= 400
    assert rows[0]["request_id"] == "r9"


def test_a_cluster_keeps_a_trial_together(tmp_path: Path, trial: str) -> None:
    with Cluster(tmp_path) as cluster:
        notes = recorder(cluster.address(), trial)
        notes.observe("champion", 1, 0, 0.01, [0.5])
        notes.remember("challenger", "r1", [0], [1], [0.5])
        notes.compare("r1", {"user_id": [1]}, [1], [0])
        assert notes.flush()
        assert notes.label("r1", {0: 1}) == 1
        notes.close()
        with cluster.address().session() as client:
            found = read_trial(client, TrialName("shop", "m", trial), 0)
            assert (found["champion"].rows, found["challenger"].labels) == (1, 1)
            assert read_comparison(client, TrialName("shop", "m", trial)).rows == 1
            assert len(read_disagreements(client, TrialName("shop", "m", trial))) == 1


def test_recorded_trials_are_judged(notes: TrialRecorder, valkey: Valkey, trial: str) -> None:
    rng = np.random.default_rng(1)
    for n, score in enumerate(rng.beta(2, 4, 8_000).tolist()):
        bad = n % 2 and n % 20 == 1
        scores = [] if bad else [score]
        notes.observe(("champion", "challenger")[n % 2], 1, int(bad), 0.01, scores)
    notes.flush()
    found = read(valkey.address(), trial)
    verdict = judge(found["champion"], found["challenger"], look=1, looks=10)
    assert verdict.decision == "abort"
    assert [one.name for one in verdict.findings if one.outcome == "fail"] == ["errors"]
