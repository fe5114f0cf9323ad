"""Promotions, rollouts and rollbacks under clients that never stop: who answered whom, and in which order.

The machine of the tests is busy: nothing here is shown by how long it took.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from cli.rollout import _status_text
from core import rollouts
from core.manifest import MODEL_FILE
from core.registry import CHALLENGER, CHAMPION, Change, ModelRegistry
from core.repository import FeastRepository
from core.traffic import Split, Step
from serving.conductor import Sight, look_at
from serving.trial_store import TrialName, read_trial
from tests.support import trials
from tests.support.clients import Clients, Seen
from tests.support.trials import ANY_LATENCY, MODEL, Failing, Honest, Nothing, Slow, Wrong
from tests.support.valkey import Valkey
from tests.support.waiting import PATIENCE_SECONDS, until, wait_until
from tests.support.workers import Served, served

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Scene:
    """A repository, a registry and the servers of both."""

    repo: FeastRepository
    registry: ModelRegistry
    servers: Sequence[Served]

    @property
    def ports(self) -> list[int]:
        return [server.port for server in self.servers]

    def environ(self) -> dict[str, str]:
        return environ(self.registry.url)

    async def banquet(self, *arguments: str) -> str:
        """Run the command as a user would; what it prints."""
        command = [str(Path(sys.executable).with_name("banquet")), "--repo", str(self.repo.path), *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BANQUET_")}
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**inherited, **self.environ()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()

    def start(self, version: int, percents: Sequence[float], **options: Any) -> Change:
        """Start a rollout with steps of a second and some hundred rows."""
        rows = options.pop("rows", 400)
        steps = [Step(percent, 1.0, rows) for percent in percents]
        return rollouts.start(self.registry, MODEL, version=version, steps=steps, **options)

    async def until_over(self) -> Change:
        """Wait until no rollout is under way; the change that ended it."""
        await until(lambda: self.latest.rollout is None, "the rollout is over", 3 * PATIENCE_SECONDS)
        return self.latest

    @property
    def latest(self) -> Change:
        change = self.registry.latest(MODEL)
        assert change is not None
        return change

    def serves(self) -> tuple[int, str | None]:
        """The champion and the rollout of a worker of the first server."""
        connection = self.servers[0].connection()
        connection.request("GET", "/health")
        model = json.loads(connection.getresponse().read())["models"][MODEL]
        connection.close()
        return model["version"], model["rollout"]

    def look(self) -> Sight:
        """What `banquet rollout status` shows."""
        rollout = self.latest.rollout
        assert rollout is not None
        with self.repo.redis.session() as client:
            return look_at(client, self.repo.project, MODEL, rollout, datetime.now(tz=UTC))

    def rows(self, trial_id: str, steps: int) -> Counter[str]:
        """The rows that each variant answered in a whole trial."""
        found: Counter[str] = Counter()
        with self.repo.redis.session() as client:
            for step in range(steps):
                of_step = read_trial(client, TrialName(self.repo.project, MODEL, trial_id), step)
                found.update({variant: seen.rows for variant, seen in of_step.items()})
        return found


def environ(registry_url: str) -> dict[str, str]:
    # The estimators live in this folder's modules.
    return {
        "BANQUET_REGISTRY_URL": registry_url,
        "BANQUET_FEATURES_ONLY": "false",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def repo(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    return trials.scene(tmp_path_factory.mktemp("rollouts"), valkey.address(), "rollouts")


def registry_at(path: Path, repo: FeastRepository, *estimators: Any) -> ModelRegistry:
    """A registry with these versions, the first of them champion."""
    registry = ModelRegistry(str(path / "models"))
    for estimator in estimators:
        trials.register_version(repo, registry, estimator)
    registry.set_alias(MODEL, CHAMPION, 1)
    return registry


# Two hosts


def test_promotion_canary_and_rollback_on_two_servers_of_two_workers(
    repo: FeastRepository, tmp_path: Path
) -> None:
    """No request fails, and every answer is of the version that the history has for that user then."""
    registry = registry_at(tmp_path, repo, Honest(), Honest(), Honest())
    with ExitStack() as stack:
        servers = [stack.enter_context(served(repo.path, 2, environ(registry.url))) for _ in range(2)]
        scene = Scene(repo, registry, servers)
        seen = asyncio.run(_moves(scene))
    history = registry.history(MODEL)
    actions = [change.action for change in history]
    assert actions == [
        "set champion",
        "promote",
        "start canary",
        "advance",
        "advance",
        "promote",
        "rollback",
    ], history
    _check_shares(_states(seen, history), history)
    # Both servers, each version, every stretch: the checks above had something to check.
    assert {(one.port, one.version) for one in seen} == {(p, v) for p in scene.ports for v in (1, 2, 3)}


async def _moves(scene: Scene) -> list[Seen]:
    async with Clients(scene.ports, connections=3, pause_seconds=0.002) as clients:
        await clients.agreed(1)
        await scene.banquet("models", "promote", MODEL, "--version", "2")
        await clients.agreed(2)
        await scene.banquet(
            *("rollout", "start", MODEL, "--version", "3", "--steps", "20,50,100", "--step-rows", "700"),
            *("--step-seconds", "3", "--limit", "score_distance=0.3"),
            *(part for name, limit in ANY_LATENCY.items() for part in ("--limit", f"{name}={limit}")),
        )
        await scene.until_over()
        assert scene.latest.action == "promote", scene.latest
        await clients.agreed(3)
        await scene.banquet("models", "rollback", MODEL)
        await clients.agreed(2)
    assert clients.failures == []
    return clients.seen


def _moment(change: Change) -> float:
    """When a change was written, on the clock of the clients."""
    return change.when.timestamp() - time.time() + time.monotonic()


def _who(change: Change) -> Callable[[int], int]:
    """The version that answers a user while this change is the last."""
    champion, rollout = change.aliases[CHAMPION], change.rollout
    if rollout is None or rollout.kind == "shadow":
        return lambda _: champion
    split = Split(rollout, ["user_id"])
    return lambda user: rollout.version if split.chosen({"user_id": [user]}, 1)[0] else champion


def _states(seen: Sequence[Seen], history: Sequence[Change]) -> list[tuple[Seen, int]]:
    """For each answer the place in the history of the earliest state that its worker can have been in.

    A worker takes changes in their order, some of them together, and a connection leads to one worker: its
    answers must be those of states that never go back, and of none that had not been written yet. That every
    change arrives is for the caller to wait for.
    """
    begins, whose = [_moment(change) for change in history], [_who(change) for change in history]
    reached: dict[int, int] = {}
    found = []
    for one in seen:
        state = reached.get(one.connection, 0)
        while state < len(history) and whose[state](one.user) != one.version:
            state += 1
        assert state < len(history), f"{one} is of no state from {history[reached.get(one.connection, 0)]} on"
        assert begins[state] <= one.answered, f"{one} is of {history[state]}, which was not there yet"
        reached[one.connection] = state
        found.append((one, state))
    return found


def _check_shares(states: Sequence[tuple[Seen, int]], history: Sequence[Change]) -> None:
    """Each step of the rollout answers its share of the users by the challenger, and keeps those it had."""
    kept: set[int] = set()
    for place, change in enumerate(history):
        if change.rollout is None:
            continue
        settled = [one for one, state in states if state == place]
        everybody = {one.user for one in settled}
        canary = {one.user for one in settled if one.version == change.rollout.version}
        assert len(everybody) > 200
        assert kept & everybody <= canary
        kept |= canary
        expected = change.rollout.step.percent / 100
        # Five standard deviations, and the answers by which a state may be taken for the one before.
        tolerance = 5 * (expected * (1 - expected) / len(everybody)) ** 0.5 + 0.05
        assert len(canary) / len(everybody) == pytest.approx(expected, abs=tolerance)


# Challengers that misbehave, on one server

CHAMPIONS = (Honest(), Honest(), Failing(), Slow(), Wrong(), Nothing())
IDENTICAL, FAILING, SLOW, WRONG, NOTHING = 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def single(repo: FeastRepository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One server of one worker; version 1 is champion."""
    registry = registry_at(tmp_path_factory.mktemp("one"), repo, *CHAMPIONS)
    with served(repo.path, 1, environ(registry.url)) as server:
        yield Scene(repo, registry, [server])


@pytest.fixture
def one(single: Scene) -> Scene:
    """The same for every test, whatever the one before has left: its last change has arrived."""
    if single.latest.rollout is not None:
        rollouts.abort(single.registry, MODEL, None)
    if single.latest.aliases[CHAMPION] != 1:
        single.registry.promote(MODEL, 1)
    wait_until(lambda: single.serves() == (1, None), "version 1 serves alone")
    return single


@pytest.mark.parametrize(
    ("version", "action", "why"),
    [
        (IDENTICAL, "promote", "Every check passed"),
        (FAILING, "abort", "Error rate"),
        (SLOW, "abort", "p99 latency beside the champion's"),
        (WRONG, "abort", "Distance of the scores"),
        (NOTHING, "abort", "stops a trial at once"),
    ],
    ids=["identical", "5 % errors", "200 ms late", "wrong", "NaN"],
)
def test_a_canary_ends_as_its_challenger_deserves(one: Scene, version: int, action: str, why: str) -> None:
    """Prints in how many requests: docs/rollouts.md has those of a run."""
    limits: dict[str, float] = {"p99_seconds": 15.0} if version == SLOW else ANY_LATENCY
    if version == IDENTICAL:
        limits = {**limits, "score_distance": 0.2}
    rows = 300 if version == SLOW else 900

    async def run() -> tuple[Change, Clients, str]:
        async with Clients(one.ports, connections=12) as clients:
            await clients.agreed(1)
            started = one.start(version, [50, 100], kind="canary", limits=limits, rows=rows)
            ended = await one.until_over()
            await clients.agreed(version if action == "promote" else 1)
            arrived = time.monotonic()
            await clients.agreed(version if action == "promote" else 1)
        assert started.rollout is not None
        left = {seen.version for seen in clients.seen if seen.asked > arrived}
        assert left == ({version} if action == "promote" else {1})
        return ended, clients, started.rollout.id

    ended, clients, trial_id = asyncio.run(run())
    assert (ended.action, ended.who) == (action, "judge"), ended
    assert why in ended.why
    assert clients.failures == []
    seen = one.rows(trial_id, 2)
    print(f"{type(CHAMPIONS[version - 1]).__name__}: {action} after {seen}; {ended.why}")
    if action == "promote":
        assert ended.aliases[CHAMPION] == version
    else:
        assert ended.aliases[CHAMPION] == 1


def test_without_traffic_a_rollout_waits(one: Scene) -> None:
    async def run() -> None:
        one.start(WRONG, [50, 100], kind="canary")
        await until(lambda: one.serves()[1] is not None, "the rollout has begun")
        await asyncio.sleep(3)  # as many turns of the judge
        told = await one.banquet("rollout", "status", MODEL)
        assert "judge      looks next after 400 rows of the challenger (so far 0)" in told
        assert one.latest.action == "start canary"
        await one.banquet("rollout", "abort", MODEL)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("version", "action", "agreement"),
    [
        (IDENTICAL, "end shadow", 1.0),
        (SLOW, "end shadow", 1.0),
        (FAILING, "abort", 0.95),
        (WRONG, "abort", 0.0),
        (NOTHING, "abort", 0.0),
    ],
    ids=["identical", "200 ms late", "5 % errors", "wrong", "NaN"],
)
def test_a_shadow_ends_as_its_challenger_deserves_and_no_client_notices(
    one: Scene, version: int, action: str, agreement: float
) -> None:
    """The champion answers all, a challenger that takes 200 ms delays nobody by as much, and it stays."""

    async def run() -> tuple[Clients, Sight, Change]:
        async with Clients(one.ports, connections=6) as clients:
            one.start(
                version, [100], kind="shadow", limits={"score_distance": 0.2}, automatic=False, rows=400
            )
            await until(lambda: one.look().compared.rows >= 400, "the shadow has predicted")
            sight = one.look()
            rollouts.abort(one.registry, MODEL, None)
            one.start(version, [100], kind="shadow", limits={"score_distance": 0.2}, rows=400)
            ended = await one.until_over()
        return clients, sight, ended

    clients, sight, ended = asyncio.run(run())
    assert (ended.action, ended.who) == (action, "judge"), ended
    assert ended.aliases[CHAMPION] == 1
    assert sight.compared.agreement == pytest.approx(agreement, abs=0.06)
    assert (sight.compared.largest > 0.1) is (version == WRONG)
    assert f"{sight.compared.agreement:.2%} of them alike" in _status_text(sight)
    assert clients.failures == []
    assert {(seen.version, seen.variant) for seen in clients.seen} == {(1, "champion")}
    assert all("error" not in seen.row for seen in clients.seen)
    assert median(seen.answered - seen.asked for seen in clients.seen) < 0.2


def test_a_damaged_challenger_ends_its_rollout_with_the_reason(one: Scene) -> None:
    version = trials.register_version(one.repo, one.registry, Honest()).version
    (Path(one.registry.url) / MODEL / str(version) / MODEL_FILE).write_bytes(b"swapped")

    async def run() -> Clients:
        async with Clients(one.ports, connections=2) as clients:
            one.start(version, [50, 100], kind="canary", automatic=False)
            await one.until_over()
            await clients.agreed(1)
        return clients

    clients = asyncio.run(run())
    assert one.latest.action == "abort"
    assert f"version {version} failed its checks: {MODEL_FILE} of model {MODEL}" in one.latest.why
    assert "differs from its digest" in one.latest.why
    assert clients.failures == []
    assert {seen.version for seen in clients.seen} == {1}
    one.registry.set_alias(MODEL, CHALLENGER, IDENTICAL)


# What dies

# The commands themselves, over and over, in one process that is killed somewhere in one of them.
_COMMANDS = """
import sys
from itertools import cycle
from cli.main import main

start = ["rollout", "start", "scores", "--version"]
for command in cycle((
    [*start, "2", "--manual"], ["rollout", "advance", "scores"], ["rollout", "promote", "scores"],
    ["models", "promote", "scores", "--version", "1"], [*start, "2", "--kind", "shadow", "--manual"],
    ["rollout", "abort", "scores"],
)):
    main(command, standalone_mode=False)
"""


def test_commands_killed_anywhere_leave_a_whole_history_and_a_server_that_answers(one: Scene) -> None:
    """`rollout start`, `advance`, `promote`, `abort` and `models promote`, each a whole step or none."""
    folder = Path(one.registry.url) / MODEL
    rng = random.Random(2)

    def kill_one() -> None:
        if one.latest.rollout is not None:
            rollouts.abort(one.registry, MODEL, None)
        if one.latest.aliases[CHAMPION] != 1:
            one.registry.promote(MODEL, 1)
        one.registry.set_alias(MODEL, CHALLENGER, IDENTICAL)  # a change, wherever the killed one had got to
        # It has mended what the killed one left.
        assert json.loads((folder / "aliases.json").read_text()) == one.registry.aliases(MODEL)
        before = one.latest.number
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS],
            env={**os.environ, **one.environ()},
            stdout=subprocess.DEVNULL,
        )
        try:
            while not (folder / "history" / f"{before + 2}.json").exists():
                assert process.poll() is None
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        finally:
            process.kill()
            process.wait()
        history = one.registry.history(MODEL)  # every entry follows from the one before
        assert [change.number for change in history] == list(range(1, len(history) + 1))

    async def run() -> Clients:
        async with Clients(one.ports, connections=2, pause_seconds=0.005) as clients:
            for _ in range(6):
                await asyncio.to_thread(kill_one)
            one.registry.set_alias(MODEL, CHALLENGER, IDENTICAL)
            assert json.loads((folder / "aliases.json").read_text()) == one.registry.aliases(MODEL)
        return clients

    clients = asyncio.run(run())
    assert clients.failures == []
    _states(clients.seen, one.registry.history(MODEL))


def test_a_worker_killed_in_a_canary_costs_what_it_had_not_written_yet(
    repo: FeastRepository, tmp_path: Path
) -> None:
    """Its connections break, the other worker and the successor go on with the same split and statistics."""
    registry = registry_at(tmp_path, repo, Honest(), Honest())
    steps = [Step(50, 1.0, 400), Step(100, 1.0, 400)]
    # Before the server, so that every answer is one of the rollout's.
    rollout = rollouts.start(registry, MODEL, kind="canary", version=2, steps=steps, automatic=False).rollout
    assert rollout is not None
    with served(repo.path, 2, environ(registry.url)) as server:
        scene = Scene(repo, registry, [server])

        def written() -> int:
            return scene.rows(rollout.id, 1).total()

        async def run() -> tuple[Clients, float, float]:
            async with Clients(scene.ports, connections=6, pause_seconds=0.005) as clients:
                await until(lambda: written() > 200, "there are statistics")
                await asyncio.sleep(random.Random(3).random())
                before, kept = server.workers(), written()
                os.kill(min(before), signal.SIGKILL)
                killed = time.monotonic()
                at_risk = len(clients.seen) + clients.connections - kept
                await until(lambda: len(server.workers() - before) == 1, "there is another")
                answered = len(clients.seen)
                await until(lambda: len(clients.seen) > answered + 500, "the service goes on")
                recovered = time.monotonic()
            await until(lambda: written() >= len(clients.seen) - at_risk, "the others' rows are written")
            # An answer may have been noted and then lost with its connection.
            assert written() <= len(clients.seen) + len(clients.failures)
            rollouts.advance(registry, MODEL, None)
            rollouts.advance(registry, MODEL, None)
            return clients, killed, recovered

        clients, killed, recovered = asyncio.run(run())
        # A client has one request in flight, then a connection to make.
        assert len(clients.failures) <= 6 * 2, clients.failures
        assert all(killed <= moment <= recovered for moment, _ in clients.failures), clients.failures
        _states(clients.seen, registry.history(MODEL))
        wait_until(lambda: scene.serves() == (2, None), "the promotion has arrived")


def test_a_canary_waits_while_redis_is_away_and_goes_on(tmp_path: Path) -> None:
    with Valkey(tmp_path, "appendonly yes", "appendfsync always") as redis:
        repo = trials.scene(tmp_path / "repo", redis.address(), "away")
        registry = registry_at(tmp_path, repo, Honest(), Honest())
        with served(repo.path, 1, environ(registry.url)) as server:
            scene = Scene(repo, registry, [server])

            async def run() -> tuple[Clients, float, float]:
                async with Clients(scene.ports, connections=4, pause_seconds=0.002) as clients:
                    limits = {**ANY_LATENCY, "score_distance": 0.3, "critical_error_rate": 0.5}
                    scene.start(2, [50, 100], kind="canary", limits=limits, rows=700)
                    await until(lambda: scene.look().challenger.rows > 100, "there are statistics")
                    redis.kill()
                    away = time.monotonic()
                    await asyncio.sleep(2)
                    assert scene.latest.action == "start canary"
                    await asyncio.to_thread(redis.start)
                    answered = len(clients.seen)
                    await until(lambda: len(clients.seen) > answered + 100, "the service goes on")
                    back = time.monotonic()
                    ended = await scene.until_over()
                assert (ended.action, ended.who) == ("promote", "judge"), ended
                return clients, away, back

            clients, away, back = asyncio.run(run())
    assert clients.failures
    assert all(text.startswith("503") and "redis_unavailable" in text for _, text in clients.failures)
    assert all(away <= moment <= back for moment, _ in clients.failures)
