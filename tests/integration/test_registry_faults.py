"""The registry under what a filesystem has to take: writers at once, and processes killed anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import ModelNotFound
from core.registry import CHAMPION, PREVIOUS, ModelRegistry
from tests.support.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]

# Registers versions with a megabyte each, as long as it is let; prints each one's number.
_REGISTER = """
import sys
from core.registry import ModelRegistry
from tests.support import packages

registry = ModelRegistry(sys.argv[1])
content = {"model.joblib": b"m" * 500_000, "baseline.parquet": b"b" * 300_000, "model.onnx": b"o" * 200_000}
for _ in range(int(sys.argv[2])):
    print(packages.register(registry, content).version, flush=True)
"""

# Moves the champion back and forth.
_PROMOTE = """
import sys
from core.registry import ModelRegistry
from core.errors import Conflict

registry = ModelRegistry(sys.argv[1])
for number in range(int(sys.argv[2])):
    try:
        registry.promote("churn", number % 2 + 1, why=sys.argv[3])
    except Conflict:
        continue
"""


@contextmanager
def started(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is gone when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_writers_at_once_get_versions_of_their_own(tmp_path: Path) -> None:
    url = str(tmp_path / "models")
    with started(_REGISTER, url, "15") as one, started(_REGISTER, url, "15") as two:
        outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in (one, two)]
    mine, theirs = ({int(line) for line in output.split()} for output in outputs)
    assert len(mine) == len(theirs) == 15
    assert mine.isdisjoint(theirs)
    registry = ModelRegistry(url)
    assert registry.versions("churn") == list(range(1, 31))
    for version in registry.versions("churn"):
        registry.verify("churn", version)


def test_a_killed_registration_is_never_visible(tmp_path: Path) -> None:
    """Killed at random moments: whatever has a manifest is whole, and the next writer is not hindered."""
    url = str(tmp_path / "models")
    registry, rng = ModelRegistry(url), random.Random(1)
    reported: set[int] = set()
    for _ in range(12):
        with started(_REGISTER, url, "1000000") as process:
            assert process.stdout is not None
            reported.add(int(process.stdout.readline()))
            time.sleep(rng.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
            rest, _ = process.communicate(timeout=PATIENCE_SECONDS)
            reported |= {int(line) for line in rest.split("\n")[:-1]}
        for version in registry.versions("churn"):
            registry.verify("churn", version)
    assert reported <= set(registry.versions("churn"))
    invisible = {int(p.name) for p in (tmp_path / "models/churn").iterdir()} - set(registry.versions("churn"))
    for version in invisible:
        with pytest.raises(ModelNotFound):
            registry.resolve(f"models:/churn/{version}")


def test_promotions_at_once_and_a_kill_leave_aliases_that_agree_with_history(tmp_path: Path) -> None:
    url = str(tmp_path / "models")
    registry = ModelRegistry(url)
    with started(_REGISTER, url, "2") as process:
        process.communicate(timeout=PATIENCE_SECONDS)
    with started(_PROMOTE, url, "60", "one") as one, started(_PROMOTE, url, "60", "two") as two:
        seen = []
        while one.poll() is None or two.poll() is None:
            seen.append(registry.aliases("churn"))
        assert (one.returncode, two.returncode) == (0, 0)
    history = registry.history("churn")
    assert {change.why for change in history} == {"one", "two"}
    for before, after in pairwise(history):
        assert after.aliases[PREVIOUS] == before.aliases[CHAMPION] != after.aliases[CHAMPION]
    assert registry.aliases("churn") == history[-1].aliases
    # A reader during all that saw nothing but states that were.
    states = [{}, *(dict(change.aliases) for change in history)]
    assert all(state in states for state in seen)

    with started(_PROMOTE, url, "1000000", "killed") as process:
        entries = tmp_path / "models/churn/history"
        before = len(os.listdir(entries))
        while len(os.listdir(entries)) < before + 20:
            time.sleep(0.005)
    registry.set_alias("churn", "pinned", 1)
    assert registry.aliases("churn") == registry.history("churn")[-1].aliases
    for entry in entries.glob("[0-9]*.json"):
        json.loads(entry.read_text())
