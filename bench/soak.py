"""Half an hour of predictions while the champion changes every few seconds: does a worker's memory grow?

    python bench/soak.py [--minutes 30] [--workers 2] [--rate 200] [--promote-seconds 4] [--scratch DIR]

A real server under a load of about a fifth of a core. Every promotion makes each worker load a version, check
it, swap it in and let another go. What is reported is the slope of each worker's resident memory after a
warm-up, with its 95 % confidence interval: ordinary least squares over half-minute means, the interval
widened for the autocorrelation of the residuals (n (1 - r) / (1 + r) independent ones, r at lag 1). A failed
request or a worker that ended makes the run a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)
sys.path.append(str(HERE))

import psutil  # noqa: E402 — the folder is no package: its files are scripts
import report  # noqa: E402
from userbase import USERS, Userbase, free_port, userbase, wait_for  # noqa: E402

from core.registry import CHAMPION, ModelRegistry  # noqa: E402

MODEL = "churn"
# The champion and the previous one stay loaded: of three, every promotion loads one and lets one go.
VERSIONS = 3
CONNECTIONS = 8
REQUESTS_PER_CONNECTION = 200
ENTITIES = 10
SAMPLE_SECONDS = 2.0
BLOCK_SECONDS = 30.0


@dataclass
class Seen:
    """What the clients got."""

    answers: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    changes: int = 0


@dataclass(frozen=True, slots=True)
class Slope:
    """Megabytes an hour and the half width of the 95 % confidence interval."""

    mb_per_hour: float
    half_width: float
    first_mb: float
    last_mb: float


def main() -> None:
    """Run, print, write bench/results/soak.json and soak.svg; exit 1 where a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up-minutes", type=float, help="default: half of the time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--promote-seconds", type=float, default=4.0)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "banquet-bench")
    args = parser.parse_args()
    warm_up = args.minutes * 60 / 2 if args.warm_up_minutes is None else args.warm_up_minutes * 60
    with userbase(args.scratch) as scene, tempfile.TemporaryDirectory(prefix="soak-") as folder:
        registry = with_versions(scene, Path(folder))
        seen, samples, promotions, cpu = soak(scene, registry, args)
    slopes = {pid: slope([(t, mb) for t, mb in found if t >= warm_up]) for pid, found in samples.items()}
    record = {
        "machine": report.machine(),
        "minutes": args.minutes,
        "warm_up_seconds": warm_up,
        "workers": args.workers,
        "requests": sum(seen.answers.values()),
        "answers": seen.answers,
        "failures": seen.failures,
        "promotions": promotions,
        "version_changes_seen": seen.changes,
        "server_cpu_share_of_a_core": cpu / (args.minutes * 60),
        "slopes": {str(pid): asdict(found) for pid, found in slopes.items()},
        "samples": {str(pid): [(round(t, 1), round(mb, 3)) for t, mb in s] for pid, s in samples.items()},
    }
    report.write_json("soak", record)
    report.line_chart(
        "soak",
        f"Resident memory of workers: {promotions} promotions, {record['requests']:,} requests",
        ("minutes", "MB"),
        {f"worker {n}": [(t / 60, mb) for t, mb in s] for n, s in enumerate(samples.values())},
    )
    rows = [
        [n, f"{s.first_mb:.1f}", f"{s.last_mb:.1f}", f"{s.mb_per_hour:+.2f} ± {s.half_width:.2f}"]
        for n, s in enumerate(slopes.values())
    ]
    print(report.table(["worker", "MB after the warm-up", "MB at the end", "MB per hour"], rows))
    print(
        f"{record['requests']:,} requests ({dict(seen.answers)}), {promotions} promotions, "
        f"{sum(seen.failures.values())} failed {dict(seen.failures) or ''}, "
        f"{record['server_cpu_share_of_a_core']:.0%} of a core"
    )
    sys.exit(bool(seen.failures) or len(samples) != args.workers)


def with_versions(scene: Userbase, folder: Path) -> ModelRegistry:
    """A copy of the scene's registry with three versions of its model, so that promotions leave no trace."""
    while len(ModelRegistry(str(scene.folder / "models")).versions(MODEL)) < VERSIONS:
        scene.run("banquet", "--repo", ".", "train", "--spec", f"{HERE / 'users_model.py'}:churn")
    shutil.copytree(scene.folder / "models", folder / "models")
    return ModelRegistry(str(folder / "models"))


def soak(
    scene: Userbase, registry: ModelRegistry, args: argparse.Namespace
) -> tuple[Seen, dict[int, list[tuple[float, float]]], int, float]:
    """Run the server under load; what clients saw, (seconds, MB) by worker, promotions, CPU seconds."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("banquet")), "--repo", ".", "serve", "--port", str(port)]
    with (scene.folder / "soak.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--workers", str(args.workers)],
            env={**scene.environment, "BANQUET_REGISTRY_URL": registry.url},
            cwd=scene.repo,
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: urllib.request.urlopen(f"{url}/readyz", timeout=5).status == 200, "it is ready", 60)
        parent = psutil.Process(server.pid)
        wait_for(lambda: len(parent.children()) == args.workers, "its workers are there", 30)
        time.sleep(2.0)
        return asyncio.run(_soak(parent, registry, port, args))
    finally:
        server.terminate()
        server.wait(60)


async def _soak(
    parent: psutil.Process, registry: ModelRegistry, port: int, args: argparse.Namespace
) -> tuple[Seen, dict[int, list[tuple[float, float]]], int, float]:
    seen = Seen()
    started = time.monotonic()
    until = started + args.minutes * 60
    before = _cpu(parent)
    clients = [
        asyncio.create_task(_client(n, port, args.rate / CONNECTIONS, until, seen))
        for n in range(CONNECTIONS)
    ]
    samples: dict[int, list[tuple[float, float]]] = {}
    promotions, next_promotion = 0, started
    while (now := time.monotonic()) < until:
        for worker in parent.children():
            samples.setdefault(worker.pid, []).append((now - started, worker.memory_info().rss / 1e6))
        if now >= next_promotion:
            version = registry.aliases(MODEL)[CHAMPION] % VERSIONS + 1
            await asyncio.to_thread(registry.promote, MODEL, version, why="soak")
            promotions += 1
            next_promotion = now + args.promote_seconds
        await asyncio.sleep(SAMPLE_SECONDS)
    await asyncio.gather(*clients)
    return seen, samples, promotions, _cpu(parent) - before


def _cpu(parent: psutil.Process) -> float:
    times = [process.cpu_times() for process in (parent, *parent.children())]
    return sum(t.user + t.system for t in times)


async def _client(number: int, port: int, rate: float, until: float, seen: Seen) -> None:
    """Predict and read in turns at ``rate`` a second over keep-alive connections, each for a while."""
    user, version = number, 0
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for turn in range(REQUESTS_PER_CONNECTION):
            moment = time.monotonic()
            if moment >= until:
                break
            users = [(user + i * 37) % (USERS + 50) for i in range(ENTITIES)]
            user += 1
            path, body = (
                ("/predict", {"entities": {"user_id": users}})
                if turn % 2
                else ("/get-online-features", {"feature_service": "users", "entities": {"user_id": users}})
            )
            try:
                status, answer, closes = await _ask(reader, writer, path, body)
            except (OSError, asyncio.IncompleteReadError, ValueError) as exc:
                seen.failures[type(exc).__name__] += 1
                break
            if status != 200:
                seen.failures[str(status)] += 1
            elif path == "/predict":
                seen.answers[f"version {answer['model_version']}"] += 1
                seen.changes += answer["model_version"] != version
                version = answer["model_version"]
            else:
                seen.answers["features"] += 1
            if closes:
                break
            await asyncio.sleep(max(0.0, moment + 1 / rate - time.monotonic()))
        writer.close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: object
) -> tuple[int, Any, bool]:
    """The status, the answer, and whether the server closes the connection after it."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:-2])
    answer = json.loads(await reader.readexactly(int(headers["content-length"])))
    return int(lines[0].split()[1]), answer, headers.get("connection") == "close"


def slope(samples: list[tuple[float, float]]) -> Slope:
    """Fit (seconds, MB); see the module's docstring."""
    blocks: dict[int, list[float]] = {}
    for seconds, mb in samples:
        blocks.setdefault(int(seconds // BLOCK_SECONDS), []).append(mb)
    hours = [(block + 0.5) * BLOCK_SECONDS / 3600 for block in blocks]
    means = [statistics.fmean(found) for found in blocks.values()]
    n = len(means)
    if n < 4:
        return Slope(math.nan, math.nan, samples[0][1], samples[-1][1])
    rate, start = statistics.linear_regression(hours, means)
    rest = [mb - start - rate * hour for hour, mb in zip(hours, means, strict=True)]
    squares = sum(r * r for r in rest)
    lag = sum(a * b for a, b in itertools.pairwise(rest)) / squares if squares else 0.0
    independent = max(3.0, min(float(n), n * (1 - lag) / (1 + lag)))
    spread = sum((hour - statistics.fmean(hours)) ** 2 for hour in hours)
    from scipy.stats import t

    error = math.sqrt(squares / (n - 2) / spread * n / independent)
    return Slope(rate, float(t.ppf(0.975, independent - 2)) * error, means[0], means[-1])


if __name__ == "__main__":
    main()
