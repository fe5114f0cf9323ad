"""The model registry in an S3 bucket, through s3fs, on a real S3 server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import ModelNotFound, RegistryUnavailable
from core.manifest import MANIFEST_FILE
from core.model import LoadedModel
from core.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelRegistry
from core.trust import Trust
from tests.support import bucket, packages
from tests.support.bucket import Bucket

ROOT = Path(__file__).parents[2]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with bucket.running(monkeypatch) as running:
        yield running


@pytest.fixture
def registry(s3: Bucket) -> ModelRegistry:
    return ModelRegistry(s3.url, Trust.of("k" * 32))


def test_a_model_from_registration_to_rollback(registry: ModelRegistry) -> None:
    assert registry.models() == []
    packages.register_linear(registry)
    packages.register_linear(registry)
    registry.set_alias("churn", CHAMPION, 1)
    registry.set_alias("churn", CHALLENGER, 2)
    assert registry.promote("churn").aliases == {CHAMPION: 2, PREVIOUS: 1}
    assert registry.resolve("churn@previous") == ("churn", 1)
    assert LoadedModel.load(registry, "churn", 2, packages.SCHEMA).manifest.version == 2
    assert registry.rollback("churn").aliases == {CHAMPION: 1, PREVIOUS: 2}
    assert [change.action for change in registry.history("churn")][-2:] == ["promote", "rollback"]
    assert json.loads(registry.store.read("churn", "aliases.json") or b"") == registry.aliases("churn")
    assert registry.models() == ["churn"]
    with pytest.raises(ModelNotFound, match="no version 7"):
        registry.promote("churn", 7)


def test_an_interrupted_registration_is_never_visible(registry: ModelRegistry) -> None:
    packages.register(registry)
    registry.store.remove("churn", "1", MANIFEST_FILE)
    assert (registry.models(), registry.versions("churn")) == ([], [])
    assert packages.register(registry).version == 2


def test_versions_cost_one_listing(s3: Bucket, registry: ModelRegistry) -> None:
    for _ in range(12):
        packages.register(registry)
    with s3.counted() as requests:
        assert registry.versions("churn") == list(range(1, 13))
    assert requests == {"GET": 1}
    with s3.counted() as requests:
        assert registry.models() == ["churn"]
    assert requests == {"GET": 1}


def test_what_a_server_asks_every_second_is_two_small_reads(s3: Bucket, registry: ModelRegistry) -> None:
    packages.register(registry)
    for number in range(5):
        known = registry.set_alias("churn", f"a{number}", 1)
    with s3.counted() as requests:
        assert registry.latest("churn", known) is known
    assert requests == {"GET": 2}


def test_a_store_that_is_away_is_unavailable_and_comes_back(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    registry = ModelRegistry(s3.url)
    packages.register(registry)
    known = registry.set_alias("churn", CHAMPION, 1)
    with s3.away():
        for call in (
            registry.models,
            lambda: registry.resolve("churn"),
            lambda: registry.latest("churn", known),
            lambda: packages.register(registry),
        ):
            with pytest.raises(RegistryUnavailable) as caught:
                call()
            assert caught.value.retryable
    assert registry.latest("churn", known) is known
    assert packages.register(registry).version == 2


# Tries to create each of some objects; prints the numbers of those that it did.
_CREATE = """
import sys, time
from core.object_store import ObjectStore

store, own = ObjectStore(sys.argv[1]), []
store.children()
print("ready", flush=True)
began = float(sys.stdin.readline())
for number in range(int(sys.argv[2])):
    # Of three objects one is created by both at once, and one by each of them ahead of the other.
    behind = 0.05 * (number % 3 == (1 if sys.argv[3] == "one" else 2))
    time.sleep(max(0.0, began + 0.1 * number + behind - time.time()))
    try:
        store.create(sys.argv[3].encode(), "race", str(number))
    except FileExistsError:
        continue
    own.append(number)
print(own)
"""

# Registers versions and makes each champion; prints them.
_WRITE = """
import sys
from core.errors import Conflict
from core.registry import ModelRegistry
from tests.support import packages

registry = ModelRegistry(sys.argv[1])
registry.models()
print("ready", flush=True)
sys.stdin.readline()
own = []
for number in range(int(sys.argv[2])):
    own.append(packages.register(registry).version)
    try:
        registry.promote("churn", own[-1], why=sys.argv[3])
    except Conflict:
        continue
print(own)
"""


def race(script: str, url: str, rounds: int) -> list[list[int]]:
    """What two processes print that begin at one word."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, url, str(rounds), who],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in ("one", "two")
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        began = time.time() + 0.1
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{began}\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(output) for output in outputs]


def test_of_two_creations_of_one_object_one_succeeds(s3: Bucket) -> None:
    """The store decides, by If-None-Match: every name has one creator, whose content stays."""
    one, two = race(_CREATE, s3.url, 40)
    assert sorted(one + two) == list(range(40))
    assert one
    assert two
    assert s3.conditional == 80
    from core.object_store import ObjectStore

    store = ObjectStore(s3.url)
    assert {store.read("race", str(number)) for number in one} == {b"one"}
    assert {store.read("race", str(number)) for number in two} == {b"two"}


def test_two_writers_get_versions_and_entries_of_their_own(s3: Bucket) -> None:
    one, two = race(_WRITE, s3.url, 4)
    registry = ModelRegistry(s3.url)
    assert sorted(one + two) == registry.versions("churn") == list(range(1, 9))
    history = registry.history("churn")
    assert {change.why for change in history} == {"one", "two"}
    assert sorted(change.aliases[CHAMPION] for change in history) == list(range(1, 9))
    for before, after in pairwise(history):
        assert after.aliases[PREVIOUS] == before.aliases[CHAMPION]


def test_an_answer_that_was_lost_makes_no_second_entry(s3: Bucket, registry: ModelRegistry) -> None:
    """The store has the entry; the client asks again, and is told that it exists."""
    packages.register(registry)
    s3.lose = "history/1.json"
    before = s3.conditional
    change = registry.promote("churn", 1)
    assert s3.conditional == before + 2
    assert registry.history("churn") == [change]
