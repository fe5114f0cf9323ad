"""The scene of the serving bench: a Feast repository of 100,000 users, its Redis, its registered model.

Everything lies in a scratch folder and is kept there for a day, so that a second run starts at once; it is
made anew where its definitions have changed or where the code no longer reads its registry.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import redis

from core.embedded_process import server_binary
from core.errors import BanquetError
from core.registry import ModelRegistry

HERE = Path(__file__).parent
USERS = 100_000
_KEEP_SECONDS = 86_400.0
_CITIES = ("Bergen", "Graz", "Kyoto", "Lima", "Lyon", "Pune", "Turku", "Utrecht")


@dataclass(frozen=True, slots=True)
class Userbase:
    """Where the scene is."""

    folder: Path
    redis_port: int

    @property
    def repo(self) -> Path:
        """The Feast repository."""
        return self.folder / "repo"

    @property
    def model(self) -> Path:
        """The registered model's package."""
        return self.folder / "models" / "churn" / "1"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every contender."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("BANQUET_")},
            "BENCH_REDIS_PORT": str(self.redis_port),
            "BENCH_REPO": str(self.repo),
            "BENCH_MODEL": str(self.model),
            "BANQUET_REGISTRY_URL": str(self.folder / "models"),
            "BANQUET_STATE_DIR": str(self.folder / "state"),
            "FEAST_USAGE": "False",
            "PYTHONPATH": str(HERE.parent),
        }

    def run(self, *command: str) -> None:
        """Run a command of this environment to its end; raises CalledProcessError with its output shown."""
        program = Path(sys.executable).parent / command[0]
        done = subprocess.run(
            [str(program), *command[1:]], env=self.environment, cwd=self.repo, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            done.check_returncode()


@contextmanager
def userbase(folder: Path) -> Iterator[Userbase]:
    """The scene with its Redis running; it is made where there is none of the last day."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Userbase(folder, free_port())
    ready = folder / "ready"
    if not _usable(found, ready):
        for old in (found.repo, folder / "models", folder / "state"):
            shutil.rmtree(old, ignore_errors=True)
        for old in (ready, folder / "users.rdb"):
            old.unlink(missing_ok=True)
    with _redis(found) as server:
        if not ready.exists():
            _make(found)
            server.save()
            ready.write_text(_fingerprint())
        yield found


def _usable(scene: Userbase, ready: Path) -> bool:
    if not ready.exists() or time.time() - ready.stat().st_mtime > _KEEP_SECONDS:
        return False
    try:
        ModelRegistry(str(scene.folder / "models")).verify(scene.model.parent.name, 1)
    except BanquetError:
        return False
    return ready.read_text() == _fingerprint()


def _fingerprint() -> str:
    """Of all that the scene is made from, save the code itself."""
    files = [Path(__file__), HERE / "users_model.py", *sorted((HERE / "users").glob("*.*"))]
    return hashlib.sha256(b"".join([file.read_bytes() for file in files])).hexdigest()


def _make(scene: Userbase) -> None:
    shutil.copytree(HERE / "users", scene.repo)
    (scene.repo / "data").mkdir()
    write_sources(scene.repo / "data", USERS)
    now = datetime.now(tz=UTC)
    scene.run("banquet", "--repo", ".", "apply")
    span = [(now - timedelta(days=20)).isoformat(), now.isoformat()]
    scene.run("feast", "-f", "stock.yaml", "materialize", *span)
    scene.run("banquet", "--repo", ".", "train", "--spec", f"{HERE / 'users_model.py'}:churn")


def write_sources(folder: Path, users: int) -> None:
    """One row per user and view, at distinct moments of the last ten days; the same on every machine."""
    rng = np.random.default_rng(1)
    end = pd.Timestamp.now(tz="UTC").floor("s")

    def moments() -> pd.Series:
        ages = pd.to_timedelta(rng.integers(60_000_000, 10 * 86_400_000_000, users), unit="us")
        return pd.Series(end - ages).astype("datetime64[us, UTC]")

    demographics = pd.DataFrame(
        {
            "user_id": np.arange(users),
            "event_timestamp": moments(),
            "age": rng.integers(18, 90, users),
            "location": rng.choice(_CITIES, users),
            "income": rng.lognormal(10.5, 0.4, users).round(2),
        }
    )
    demographics.to_parquet(folder / "user_demographics.parquet")
    behavior = pd.DataFrame({"user_id": np.arange(users), "event_timestamp": moments()})
    for i in range(10):
        behavior[f"signal_{i}"] = rng.gamma(2.0, 25.0, users)
    # A folder, as events are appended to it by the bench of the stream.
    (folder / "user_behavior").mkdir()
    behavior.to_parquet(folder / "user_behavior" / "0.parquet")


@contextmanager
def _redis(scene: Userbase) -> Iterator[object]:
    command = [str(server_binary()), "--port", str(scene.redis_port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--dir", str(scene.folder), "--dbfilename", "users.rdb"]
    with (scene.folder / "redis.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client = redis.Redis(port=scene.redis_port, socket_timeout=60)
    try:
        wait_for(lambda: client.ping(), "Redis answers", 30.0)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait()


def wait_for(condition: Callable[[], object], what: str, seconds: float) -> float:
    """Poll until ``condition()`` is true; a network error counts as not yet. Returns the seconds waited."""
    started = time.perf_counter()
    while True:
        try:
            if condition():
                return time.perf_counter() - started
            problem = "not yet"
        except (OSError, redis.RedisError) as exc:
            problem = str(exc)
        if time.perf_counter() - started > seconds:
            raise TimeoutError(f"waited {seconds:.0f} s in vain until {what}: {problem}")
        time.sleep(0.005)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its children use; a busy machine hardly moves it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(map(cpu_seconds, map(int, children)))


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
