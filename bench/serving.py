"""Online features and predictions over HTTP: Banquet, `feast serve`, the tutorial server, the limits.

    python bench/serving.py [--seconds 4] [--rounds 3] [--shapes 1x8,50x8] [--scratch DIR] [--keep]

One worker each, all on the same Redis and the same rows, driven by wrk in turns: within a round every
contender gets the same few seconds at the same shape (entities per request x connections), so that a noisy
machine is noisy for all of them. A ratio is the median of the ratios within each round. Before anything is
timed, all of them must answer the same values for sampled entities. Banquet runs with everything on: an API
key, validation, metrics, statuses by the read contract.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402 — the folder is no package: its files are scripts
from userbase import USERS, Userbase, cpu_seconds, free_port, userbase, wait_for  # noqa: E402

KEY = "bench-key"
SHAPES = "1x1,1x8,1x32,50x1,50x8,50x32"
PYTHON_BIN = Path(sys.executable).parent
# A fresh `feast serve` answers nothing in its first second under 32 connections.
_WARM_UP_S = 4.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test: how to start it and how to see that it is ready."""

    name: str
    command: tuple[str, ...]
    ready: str
    environment: dict[str, str] = field(default_factory=dict)
    start_seconds: float = 90.0


@dataclass(frozen=True, slots=True)
class Target:
    """What wrk asks: a server, a path and the form of the body."""

    name: str
    server: str
    path: str
    form: str


TARGETS = (
    Target("feast serve", "feast", "/get-online-features", "features"),
    Target("banquet features", "banquet", "/get-online-features", "features"),
    Target("canned answer", "canned", "/", "features"),
    Target("raw pipeline", "redis", "", ""),
    Target("tutorial predict", "tutorial", "/predict", "rows"),
    Target("banquet predict", "banquet", "/predict", "rows"),
)


def servers(canned: Path, workers: int = 1) -> tuple[Server, ...]:
    """The contenders; ``{port}`` is filled in when one is started."""
    uvicorn = ("uvicorn", "--port", "{port}", "--log-level", "warning", "--no-access-log")
    return (
        Server(
            "feast",
            (
                *("feast", "-f", "stock.yaml", "serve", "--port", "{port}", "--no-access-log"),
                *("--max-requests", "0", "--workers", str(workers)),
            ),
            "/health",
        ),
        Server(
            "tutorial",
            (*uvicorn, "--app-dir", str(HERE / "servers"), "tutorial:app"),
            "/health",
            # Several OpenMP threads per request on few cores would make it several times slower.
            {"OMP_NUM_THREADS": "1"},
        ),
        Server(
            "canned",
            (*uvicorn, "--app-dir", str(HERE / "servers"), "--lifespan", "off", "canned:app"),
            "/",
            {"BENCH_CANNED": str(canned)},
        ),
        Server(
            "banquet",
            ("banquet", "--repo", ".", "serve", "--port", "{port}", "--workers", str(workers)),
            "/readyz",
            {"BANQUET_API_KEYS": KEY},
        ),
    )


@dataclass(frozen=True, slots=True)
class Running:
    """A started server."""

    port: int
    pid: int
    seconds_to_ready: float

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Processor time that it and its children have used."""
        return cpu_seconds(self.pid)


@contextmanager
def running(server: Server, scene: Userbase) -> Iterator[Running]:
    """The server, from its start until the block ends."""
    port = free_port()
    command = [part.format(port=port) for part in server.command]
    command[0] = str(PYTHON_BIN / command[0])
    with (scene.folder / f"{server.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**scene.environment, **server.environment},
            cwd=scene.repo,
            stdout=log,
            stderr=log,
        )
    try:

        def ready() -> bool:
            if process.poll() is not None:
                raise SystemExit(
                    f"{server.name} ended:\n{(scene.folder / f'{server.name}.log').read_text()[-3000:]}"
                )
            return get(f"http://127.0.0.1:{port}{server.ready}")[0] == 200

        seconds = wait_for(ready, f"{server.name} is ready", server.start_seconds)
        yield Running(port, process.pid, seconds)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def get(url: str, body: Any = None) -> tuple[int, bytes, dict[str, str]]:
    """One request with the key; a POST where there is a body."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status, answer.read(), dict(answer.headers)


# The same values


def check_answers(up: dict[str, Running]) -> dict[str, int]:
    """Compare what the contenders answer for sampled users; raises AssertionError where values differ."""
    ids = [*range(0, USERS, USERS // 300), USERS + 1, USERS + 2]
    body = {"feature_service": "users", "entities": {"user_id": ids}}
    columns: dict[str, dict[str, list[Any]]] = {}
    for name in ("feast", "banquet"):
        answer = json.loads(get(f"{up[name].url}/get-online-features", body)[1])
        names = answer["metadata"]["feature_names"]
        columns[name] = dict(zip(names, answer["results"], strict=True))
    assert set(columns["feast"]) == set(columns["banquet"])
    values = statuses = 0
    for name, ours in columns["banquet"].items():
        stock = columns["feast"][name]
        assert ours["values"] == stock["values"], f"values of {name} differ"
        assert ours["event_timestamps"] == stock["event_timestamps"], f"timestamps of {name} differ"
        values += len(ids)
        statuses += sum(a != b for a, b in zip(ours["statuses"], stock["statuses"], strict=True))
    rows = {"entities": [{"user_id": user} for user in ids]}
    predictions = [
        json.loads(get(f"{up[name].url}/predict", rows)[1])["predictions"] for name in ("tutorial", "banquet")
    ]
    furthest = 0.0
    for stock, ours in zip(*predictions, strict=True):
        assert ours["entity"] == stock["entity"]
        assert ours["prediction"] == stock["prediction"], f"predictions for {ours['entity']} differ"
        furthest = max(furthest, abs(ours["confidence"] - stock["confidence"]))
    assert furthest < 1e-5, f"confidences differ by {furthest}"
    return {"values_equal": values, "statuses_corrected": statuses, "predictions_equal": len(ids)}


# Load


def wrk(target: Target, url: str, entities: int, connections: int, seconds: float) -> dict[str, float]:
    """One turn of wrk; raises RuntimeError when a request fails."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "--timeout", "30s"]
    command += [
        "-s",
        str(HERE / "wrk.lua"),
        f"{url}{target.path}",
        "--",
        target.form,
        str(entities),
        str(USERS),
        KEY,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["errors"] or not found["requests"]:
        raise RuntimeError(f"{target.name}: {found['errors']} of {found['requests']} requests failed")
    return {**found, "rps": found["requests"] / found["seconds"]}


def raw_pipeline(scene: Userbase, entities: int, connections: int, seconds: float) -> dict[str, float]:
    """One turn of the same reads without a server: see bench/raw_pipeline.py."""
    command = [sys.executable, str(HERE / "raw_pipeline.py"), str(entities), str(connections), str(seconds)]
    done = subprocess.run(
        command, env=scene.environment, cwd=scene.repo, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_load(
    scene: Userbase,
    up: dict[str, Running],
    targets: tuple[Target, ...],
    shapes: list[tuple[int, int]],
    seconds: float,
    rounds: int,
    ratios: Callable[[dict[str, list[dict[str, float]]]], dict[str, float]],
) -> list[dict[str, Any]]:
    """Every target at every shape, ``rounds`` times in turns; ``ratios`` compares what the turns gave."""
    cells = []
    for entities, connections in shapes:
        turns: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
        for turn in range(rounds + 1):
            for target in targets:
                duration = seconds if turn else 1.0
                if target.server == "redis":
                    found = raw_pipeline(scene, entities, connections, duration)
                else:
                    server = up[target.server]
                    cpu = server.cpu_seconds()
                    found = wrk(target, server.url, entities, connections, duration)
                    found["cpu_us"] = (server.cpu_seconds() - cpu) / found["requests"] * 1e6
                if turn:  # the first is for warming up
                    turns[target.name].append(found)
        cell: dict[str, Any] = {"entities": entities, "connections": connections, "targets": {}}
        for name, taken in turns.items():
            summary = {
                key: statistics.median(t[key] for t in taken) for key in ("rps", "p50_ms", "p99_ms", "cpu_us")
            }
            cell["targets"][name] = {**summary, "all_rps": [round(t["rps"], 1) for t in taken]}
            print(
                f"  {entities:>3} entities {connections:>2} connections  {name:<17}"
                f"{summary['rps']:>10,.0f} req/s   p50 {summary['p50_ms']:.2f} ms   "
                f"p99 {summary['p99_ms']:.2f} ms   {summary['cpu_us']:.0f} us cpu",
                file=sys.stderr,
            )
        cell["ratios"] = ratios(turns)
        cells.append(cell)
    return cells


def _ratios(turns: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians of the ratios within each round; above 1 means better than what is compared with."""

    def ratio(ours: str, theirs: str, key: str = "rps") -> float | None:
        if not turns.get(ours) or not turns.get(theirs):
            return None
        return statistics.median(a[key] / b[key] for a, b in zip(turns[ours], turns[theirs], strict=True))

    found = {
        "features_to_stock": ratio("banquet features", "feast serve"),
        "features_p99_to_stock": ratio("feast serve", "banquet features", "p99_ms"),
        "features_to_limit": ratio("banquet features", "canned answer"),
        "features_to_pipeline": ratio("banquet features", "raw pipeline"),
        "predict_to_tutorial": ratio("banquet predict", "tutorial predict"),
        "predict_p99_to_tutorial": ratio("tutorial predict", "banquet predict", "p99_ms"),
        "predict_to_features": ratio("banquet predict", "banquet features"),
    }
    return {name: value for name, value in found.items() if value is not None}


# Start-up


def measure_start(scene: Userbase, canned: Path, rounds: int) -> dict[str, float]:
    """Seconds until each is ready, medians of some starts in turns."""
    one = {server.name: server for server in servers(canned)}
    two = {server.name: server for server in servers(canned, workers=2)}
    found: dict[str, list[float]] = {
        "help": [],
        "feast": [],
        "banquet": [],
        "first_of_two": [],
        "both_of_two": [],
    }
    for _ in range(rounds):
        started = time.perf_counter()
        scene.run("banquet", "--help")
        found["help"].append(time.perf_counter() - started)
        for name in ("banquet", "feast"):
            with running(one[name], scene) as up:
                found[name].append(up.seconds_to_ready)
        with running(two["banquet"], scene) as up:
            found["first_of_two"].append(up.seconds_to_ready)
            found["both_of_two"].append(up.seconds_to_ready + _until_two_answer(up))
    return {name: statistics.median(times) for name, times in found.items()}


def _until_two_answer(up: Running) -> float:
    body = {"feature_service": "users", "entities": {"user_id": [1]}}
    seen: set[str] = set()

    def both() -> bool:
        # The middle of a request id is the worker's own.
        seen.add(get(f"{up.url}/get-online-features", body)[2]["x-request-id"][10:20])
        return len(seen) == 2

    return wait_for(both, "both workers answer", 30.0)


# The report


def tables(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = []
    if record.get("load"):
        rows = []
        for cell in record["load"]:
            shown, ratios = cell["targets"], cell["ratios"]
            rows.append(
                [
                    f"{cell['entities']}, {cell['connections']}",
                    *(_speed(shown.get(target.name)) for target in TARGETS[:4]),
                    _times(ratios.get("features_to_stock")),
                    _times(ratios.get("features_p99_to_stock")),
                    _times(ratios.get("features_to_limit")),
                    _times(ratios.get("features_to_pipeline")),
                ]
            )
        header = [
            "entities, connections",
            "`feast serve`",
            "Banquet",
            "limit: canned answer",
            "limit: raw pipeline",
            "req/s to stock",
            "p99 to stock",
            "to canned answer",
            "to raw pipeline",
        ]
        parts.append(report.table(header, rows))
        rows = []
        for cell in record["load"]:
            shown, ratios = cell["targets"], cell["ratios"]
            rows.append(
                [
                    f"{cell['entities']}, {cell['connections']}",
                    *(_speed(shown.get(target.name)) for target in TARGETS[4:]),
                    _times(ratios.get("predict_to_tutorial")),
                    _times(ratios.get("predict_p99_to_tutorial")),
                    _times(ratios.get("predict_to_features")),
                ]
            )
        header = ["entities, connections", "tutorial server", "Banquet `/predict`", "req/s to tutorial"]
        parts.append(report.table([*header, "p99 to tutorial", "req/s to Banquet's feature read"], rows))
    if record.get("workers"):
        rows = [
            [name, *(f"{value:,.0f}" for value in speeds), _times(speeds[1] / speeds[0])]
            for name, speeds in record["workers"].items()
        ]
        parts.append(
            report.table(["1 entity, 32 connections, req/s", "1 worker", "2 workers", "ratio"], rows)
        )
    if record.get("in_process"):
        rows = []
        for size, cells in record["in_process"].items():
            times = {name: statistics.median(taken) for name, taken in cells.items()}
            over, over_loop = (
                statistics.median(a / b for a, b in zip(cells["banquet"], cells[raw], strict=True))
                for raw in ("raw", "loop")
            )
            stock = statistics.median(a / b for a, b in zip(cells["stock"], cells["banquet"], strict=True))
            rows.append(
                [
                    size,
                    *(f"{times[n]:.3f}" for n in ("stock", "banquet", "raw", "loop")),
                    _times(stock),
                    f"{over:.2f}x",
                    f"{over_loop:.2f}x",
                ]
            )
        header = [
            "entities",
            "stock, ms",
            "Banquet, ms",
            "raw round trip, ms",
            "raw on uvloop, ms",
            "stock to Banquet",
            "Banquet to raw",
            "Banquet to raw on uvloop",
        ]
        parts.append(report.table(header, rows))
    if record.get("start"):
        start = record["start"]
        rows = [
            ["`banquet --help`", f"{start['help']:.2f}"],
            ["`banquet serve` ready", f"{start['banquet']:.2f}"],
            ["a second worker, after the first", f"{start['both_of_two'] - start['first_of_two']:.2f}"],
            ["`feast serve` ready", f"{start['feast']:.2f}"],
        ]
        parts.append(report.table(["start", "seconds"], rows))
    return "\n\n".join(parts)


def _speed(cell: dict[str, float] | None) -> str:
    return f"{cell['rps']:,.0f} ({cell['p99_ms']:.1f})" if cell else ""


def _times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return report.times(ratio)


def load_parser(about: str, name: str, *, shapes: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark that makes load with wrk; ``name`` is that of its scratch folder."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--shapes", default=shapes, help="entities x connections, separated by commas")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn of wrk")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / f"banquet-bench-{name}")
    parser.add_argument("--dry", action="store_true", help="print only; leave results and documents alone")
    return parser


def load_options(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[tuple[int, int]]]:
    """The options given, and the shapes; ends the program where there is no wrk."""
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit(
            "wrk is needed to make load: apt-get install wrk (Debian, Ubuntu) or brew install wrk"
        )
    pairs = [shape.split("x") for shape in options.shapes.split(",")]
    return options, [(int(entities), int(connections)) for entities, connections in pairs]


def main() -> None:
    """Measure what was asked for, print it, keep it."""
    parser = load_parser(__doc__, "serving", shapes=SHAPES, rounds=3)
    parser.add_argument("--targets", help="only these, separated by commas")
    parser.add_argument("--parts", default="load,workers,in_process,start")
    options, shapes = load_options(parser)
    wanted = options.targets.split(",") if options.targets else [target.name for target in TARGETS]
    targets = tuple(target for target in TARGETS if target.name in wanted)
    parts = options.parts.split(",")
    record: dict[str, Any] = {
        "machine": report.machine(),
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    with userbase(options.scratch) as scene:
        canned = scene.folder / "canned.json"
        if "load" in parts:
            with ExitStack() as stack:
                known = {server.name: server for server in servers(canned)}
                up = {"banquet": stack.enter_context(running(known["banquet"], scene))}
                for name in {target.server for target in targets} - {"banquet", "canned", "redis"}:
                    up[name] = stack.enter_context(running(known[name], scene))
                if {"feast", "tutorial"} <= set(up):
                    record["checks"] = check_answers(up)
                record["load"] = []
                for entities in dict.fromkeys(entities for entities, _ in shapes):
                    # The canned answer is ours to as many entities.
                    body = {"feature_service": "users", "entities": {"user_id": list(range(entities))}}
                    canned.write_bytes(get(f"{up['banquet'].url}/get-online-features", body)[1])
                    with running(known["canned"], scene) as up["canned"]:
                        of_this_size = [shape for shape in shapes if shape[0] == entities]
                        record["load"] += measure_load(
                            scene, up, targets, of_this_size, options.seconds, options.rounds, _ratios
                        )
        if "workers" in parts:
            record["workers"] = measure_workers(scene, canned, options.seconds, options.rounds)
        if "in_process" in parts:
            child = subprocess.run(
                [sys.executable, str(HERE / "online_read.py")],
                env=scene.environment,
                cwd=scene.repo,
                capture_output=True,
                text=True,
            )
            if child.returncode:
                raise SystemExit(child.stderr)
            record["in_process"] = json.loads(child.stdout.splitlines()[-1])
        if "start" in parts:
            record["start"] = measure_start(scene, canned, options.rounds)
    text = tables(record)
    print(text)
    if options.dry:
        return
    report.write_json("serving", record)
    groups = {
        f"{cell['entities']} x {cell['connections']}": {
            name: shown["rps"] for name, shown in cell["targets"].items()
        }
        for cell in record.get("load", ())
    }
    if groups:
        report.bar_chart(
            "serving",
            "Requests per second, entities x connections, one worker each",
            "requests per second",
            groups,
        )
    report.replace_section(HERE.parent / "docs" / "performance.md", "serving", text)


def measure_workers(scene: Userbase, canned: Path, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Requests per second with 1 and with 2 workers, at 1 entity and 32 connections."""
    found: dict[str, list[float]] = {}
    chosen = [target for target in TARGETS if target.server in ("feast", "banquet")]
    with ExitStack() as stack:
        up = {
            (server.name, workers): stack.enter_context(running(server, scene))
            for workers in (1, 2)
            for server in servers(canned, workers)
            if server.name in ("feast", "banquet")
        }
        for target in chosen:
            speeds: dict[int, list[float]] = {1: [], 2: []}
            for turn in range(rounds + 1):
                for workers, taken in speeds.items():
                    url = up[target.server, workers].url
                    rps = wrk(target, url, 1, 32, seconds if turn else _WARM_UP_S)["rps"]
                    if turn:
                        taken.append(rps)
            found[target.name] = [statistics.median(taken) for taken in speeds.values()]
    return found


if __name__ == "__main__":
    main()
