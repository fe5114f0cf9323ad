"""The model registry in an S3 bucket, through s3fs, on a real S3 server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import ModelNotFound, RegistryUnavailable
from core.manifest import MANIFEST_FILE
from core.model import LoadedModel
from core.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelRegistry
from core.trust import Trust
from tests.support import packages
from tests.support.bucket import Bucket

ROOT = Path(__file__).parents[2]


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


# Tries to create the object of each line that it reads; says whether it did.
_CREATE = """
import sys
from core.object_store import ObjectStore

store = ObjectStore(sys.argv[1])
store.children()
print("ready", flush=True)
for line in sys.stdin:
    try:
        store.create(sys.argv[2].encode(), "race", line.strip())
    except FileExistsError:
        print("exists", flush=True)
    else:
        print("created", flush=True)
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
for number in range(4):
    own.append(packages.register(registry).version)
    try:
        registry.promote("churn", own[-1], why=sys.argv[2])
    except Conflict:
        continue
print(own)
"""


class Racer:
    """A process that runs a script, ready to go on at a word."""

    def __init__(self, script: str, url: str, who: str) -> None:
        command = [sys.executable, "-c", script, url, who]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, word: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def racers(script: str, url: str) -> Iterator[tuple[Racer, Racer]]:
    """Two of them, one by the name of "one", the other of "two"."""
    one, two = Racer(script, url, "one"), Racer(script, url, "two")
    try:
        assert (one.hear(), two.hear()) == ("ready", "ready")
        yield one, two
    finally:
        for racer in (one, two):
            racer.process.kill()
            racer.process.communicate()


def test_of_two_creations_of_one_object_one_succeeds(s3: Bucket) -> None:
    """The store decides, by If-None-Match: every name has one creator, whose content stays.

    Of three objects one is created by both at once, and one by each of them after the other has.
    """
    from core.object_store import ObjectStore

    store = ObjectStore(s3.url)
    with racers(_CREATE, s3.url) as both:
        for number in range(24):
            first, second = both if number % 2 else both[::-1]
            first.tell(str(number))
            early = first.hear() if number % 3 else ""
            second.tell(str(number))
            answers = {first: early or first.hear(), second: second.hear()}
            assert sorted(answers.values()) == ["created", "exists"]
            if early:
                assert early == "created"
            creator = next(racer for racer, said in answers.items() if said == "created")
            assert store.read("race", str(number)) == (b"one" if creator is both[0] else b"two")
    assert s3.conditional == 48


def test_two_writers_get_versions_and_entries_of_their_own(s3: Bucket) -> None:
    with racers(_WRITE, s3.url) as both:
        for racer in both:
            racer.tell("go")
        one, two = (json.loads(racer.hear()) for racer in both)
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
