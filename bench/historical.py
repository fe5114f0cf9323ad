"""Historical retrieval: Banquet's offline store against Feast's two, raw DuckDB and polars.

    python bench/historical.py [--shapes 1Mx1M,dense-30k] [--rounds 2] [--parts compare,memory,growth] [--dry]

Every contender runs in processes of its own, in turns, on the same Parquet files, and answers the same
question several times in each. ``first`` is the first retrieval of a process, as a training job has it: what
a store imports or prepares in its call counts, what is imported before it does not. ``warm`` is the median
of the calls after it in the same process, as a notebook or a service has them: at most ``--warm``, and none
once a process has spent ``--warm-seconds`` in calls. The clock runs from the call to the Arrow table.

Every result is compared with Banquet's, row by row and value by value; what differs is counted. A ratio is
the median of the ratios within each round: on a busy machine only they count, and CPU seconds more than
seconds. A process may use ``--memory-gb`` and ``--timeout``; a contender that needs more, or takes longer
than ``--once-over``, runs once; on a dense shape, it is not tried on a larger one either.

``memory`` joins 30,000 entity rows with ``--memory-events`` events of three views, on dense keys, with a
``memory_limit`` of 256 MB and, the most of them, with DuckDB's default: the peak of the process, what of it
was there before the call, the most that lay in the spill folder, and the files left there.

``growth`` runs Banquet alone on dense keys while entity rows and then events double, and fits its CPU seconds
to a + b * rows + c * events.

Feast's duckdb store needs ibis-framework[duckdb], and polars is a contender of its own: both come from a
virtual environment under the scratch folder that sees this one's packages (made on the first run; without
a package index those contenders are left out).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

_START = time.perf_counter()
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import report  # noqa: E402 — the folder is no package: its files are scripts

KINDS = ("first", "warm")
DIFFERENCES = ("rows_lost", "rows_different", "rows_out_of_place")
CONTENDERS = ("banquet", "duckdb", "polars", "feast-duckdb", "feast-dask")
NEEDS_EXTRA = {"polars", "feast-duckdb"}
DEFAULT_SHAPES = "100kx1M,1Mx1M,100kx10M,1Mx10M,dense-30k,dense-300k"
# Dense keys: entity rows double, then events.
GROWTH = [(30_000 << n, 340_000) for n in range(4)] + [(30_000, 340_000 << n) for n in range(1, 4)]


@dataclass(frozen=True)
class View:
    """One source: ``events`` rows over ``keys`` keys and ``days`` days, with double features."""

    name: str
    key: str
    keys: int
    events: int
    features: int
    ttl: timedelta
    days: int


@dataclass(frozen=True)
class Shape:
    """What is joined: ``rows`` entity rows over the last ``days`` days of every view."""

    name: str
    rows: int
    days: int
    views: tuple[View, ...]


def shape(name: str) -> Shape:
    """``<rows>x<events>``: two views of 13 features, 3 events per key. ``dense-<rows>``: 16 keys and more.

    ``dense-<rows>x<events>`` has another number of events per view than 340,000.
    """
    if name.startswith("dense-"):
        rows, events = map(_number, f"{name.removeprefix('dense-')}x340k".split("x")[:2])
        year: dict[str, Any] = {"days": 365, "features": 5, "events": events}
        return Shape(
            name,
            rows,
            365,
            (
                View("store", "store_id", 16, ttl=timedelta(days=30), **year),
                View("product", "product_id", 4_000, ttl=timedelta(days=30), **year),
                View("user", "user_id", 2_500, ttl=timedelta(days=90), **year),
            ),
        )
    rows, events = map(_number, name.split("x"))
    ten_days: dict[str, Any] = {
        "key": "user_id",
        "keys": events // 3,
        "events": events,
        "ttl": timedelta(days=10),
        "days": 30,
    }
    return Shape(
        name,
        rows,
        16,
        (View("behaviour", features=10, **ten_days), View("demographics", features=3, **ten_days)),
    )


def _number(text: str) -> int:
    return int(float(text.replace("k", "e3").replace("M", "e6")))


def generate(case: Shape, folder: Path) -> None:
    """Write the entity rows and the sources; the same numbers on every machine."""
    import duckdb

    con = duckdb.connect()
    con.execute("SET timezone = 'UTC'; SET threads = 1; SELECT setseed(0.5)")
    start = "TIMESTAMPTZ '2024-01-01'"
    for view in case.views:
        target = folder / f"{view.name}-{view.events}.parquet"
        if not target.exists():
            features = ", ".join(f"random() AS {view.name}_{i}" for i in range(view.features))
            con.execute(
                f"COPY (SELECT floor(random() * {view.keys})::BIGINT AS {view.key}, "
                f"{start} + to_microseconds((random() * {view.days} * 86400e6)::BIGINT) AS event_timestamp, "
                f"{start} + INTERVAL {view.days} DAY AS created, {features} FROM range({view.events})) "
                f"TO '{target}'"
            )
    target = folder / f"entities-{case.name}.parquet"
    if not target.exists():
        keys = {view.key: view.keys for view in case.views}
        columns = ", ".join(f"floor(random() * {n})::BIGINT AS {key}" for key, n in keys.items())
        since = max(view.days for view in case.views) - case.days
        con.execute(
            f"COPY (SELECT range AS label, {columns}, {start} + INTERVAL {since} DAY + "
            f"to_microseconds((random() * {case.days} * 86400e6)::BIGINT) AS event_timestamp "
            f"FROM range({case.rows})) TO '{target}'"
        )


def _feast(case: Shape, folder: Path, store_type: dict[str, Any]) -> Callable[[], Any]:
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64, Int64

    scratch = Path(tempfile.mkdtemp(dir=folder))
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            registry=str(scratch / "registry.db"),
            provider="local",
            online_store={"type": "sqlite", "path": str(scratch / "online.db")},
            offline_store=store_type,
            entity_key_serialization_version=3,
        )
    )
    entities = {
        key: Entity(name=key, join_keys=[key], value_type=ValueType.INT64)
        for key in {view.key for view in case.views}
    }
    views = [
        FeatureView(
            name=view.name,
            entities=[entities[view.key]],
            ttl=view.ttl,
            schema=[
                Field(name=view.key, dtype=Int64),
                *(Field(name=f"{view.name}_{i}", dtype=Float64) for i in range(view.features)),
            ],
            source=FileSource(
                name=view.name,
                path=str(folder / f"{view.name}-{view.events}.parquet"),
                timestamp_field="event_timestamp",
                created_timestamp_column="created",
            ),
        )
        for view in case.views
    ]
    store.apply([*entities.values(), *views])
    rows = pd.read_parquet(folder / f"entities-{case.name}.parquet")
    references = [f"{view.name}:{view.name}_{i}" for view in case.views for i in range(view.features)]
    return lambda: store.get_historical_features(rows, references).to_arrow()


def banquet(case: Shape, folder: Path) -> Callable[[], Any]:
    """Banquet's plugin, through Feast."""
    return _feast(case, folder, {"type": "core.offline.BanquetOfflineStore"})


def banquet_256mb(case: Shape, folder: Path) -> Callable[[], Any]:
    """Banquet's plugin where DuckDB may use 256 MB: the rest goes to disk."""
    return _feast(
        case,
        folder,
        {
            "type": "core.offline.BanquetOfflineStore",
            "memory_limit": "256MB",
            "temp_directory": str(folder / "spill"),
        },
    )


def feast_duckdb(case: Shape, folder: Path) -> Callable[[], Any]:
    """Feast's own duckdb store."""
    return _feast(case, folder, {"type": "duckdb"})


def feast_dask(case: Shape, folder: Path) -> Callable[[], Any]:
    """Feast's default store for files."""
    return _feast(case, folder, {"type": "dask"})


def duckdb(case: Shape, folder: Path) -> Callable[[], Any]:
    """One SQL statement for DuckDB by hand: semi-join, time range, ASOF. Settles no ties, keeps no order."""
    import duckdb as engine

    con = engine.connect()
    con.execute("SET timezone = 'UTC'")

    def run() -> Any:
        con.execute(f"CREATE OR REPLACE TEMP TABLE e AS FROM '{folder / f'entities-{case.name}.parquet'}'")
        last = con.execute("SELECT max(event_timestamp)::VARCHAR FROM e").fetchall()[0][0]
        selected, joined = ["e.*"], "e"
        for view in case.views:
            names = [f"{view.name}_{i}" for i in range(view.features)]
            ttl = f"INTERVAL {view.ttl.days} DAY"
            first = con.execute(f"SELECT (min(event_timestamp) - {ttl})::VARCHAR FROM e").fetchall()[0][0]
            joined += (
                f" ASOF LEFT JOIN (SELECT {view.key}, event_timestamp, {', '.join(names)} "
                f"FROM '{folder / f'{view.name}-{view.events}.parquet'}' "
                f"WHERE event_timestamp BETWEEN '{first}' AND '{last}' AND {view.key} IN "
                f"(SELECT {view.key} FROM e)) {view.name} ON e.{view.key} = {view.name}.{view.key} "
                f"AND e.event_timestamp >= {view.name}.event_timestamp"
            )
            fresh = f"{view.name}.event_timestamp >= e.event_timestamp - {ttl}"
            selected += [f"CASE WHEN {fresh} THEN {view.name}.{name} END AS {name}" for name in names]
        return con.sql(f"SELECT {', '.join(selected)} FROM {joined}").to_arrow_table()

    return run


def polars(case: Shape, folder: Path) -> Callable[[], Any]:
    """polars' join_asof, by hand. Settles no ties."""
    import polars as engine

    def run() -> Any:
        rows = engine.scan_parquet(folder / f"entities-{case.name}.parquet").sort("event_timestamp")
        for view in case.views:
            names = [f"{view.name}_{i}" for i in range(view.features)]
            source = engine.scan_parquet(folder / f"{view.name}-{view.events}.parquet")
            source = source.select(view.key, "event_timestamp", *names).sort("event_timestamp")
            rows = rows.join_asof(source, on="event_timestamp", by=view.key, tolerance=view.ttl)
        return rows.collect().to_arrow()

    return run


def run_one(name: str, case: Shape, folder: Path, output: Path, warm: int, warm_seconds: float) -> None:
    """The child process: run one contender, first and warm, and leave its first result in ``output``."""
    import pyarrow.parquet as pq

    def timed() -> tuple[Any, dict[str, float]]:
        start, cpu = time.perf_counter(), time.process_time()
        table = run()
        return table, {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    run = globals()[name.replace("-", "_")](case, folder)
    before_mb = report.peak_mb()
    table, first = timed()
    found: dict[str, Any] = {"rows": table.num_rows, "before_mb": before_mb, "peak_mb": report.peak_mb()}
    pq.write_table(table.select([c for c in table.column_names if c != "created"]), output)
    del table
    calls: list[dict[str, float]] = []
    while len(calls) < warm and sum(call["seconds"] for call in (first, *calls)) < warm_seconds:
        calls.append(timed()[1])
    found["first"] = first
    if calls:
        found["warm"] = {key: statistics.median(call[key] for call in calls) for key in first}
    print(json.dumps(found))


def differences(case: Shape, ours: Path, theirs: Path) -> dict[str, int]:
    """How ``theirs`` differs from ``ours``: rows lost, rows with another value, rows out of place."""
    import duckdb as engine

    con = engine.connect()
    names = [f"{view.name}_{i}" for view in case.views for i in range(view.features)]
    other = " OR ".join(f"a.{name} IS DISTINCT FROM b.{name}" for name in names)
    joined = f"FROM '{ours}' a LEFT JOIN '{theirs}' b USING (label)"
    counts = con.execute(
        f"SELECT count(*) FILTER (b.event_timestamp IS NULL), "
        f"count(*) FILTER (b.event_timestamp IS NOT NULL AND ({other})), "
        f"(SELECT count(*) FROM '{theirs}' WHERE label <> file_row_number) "
        f"{joined}"
    ).fetchall()[0]
    return dict(zip(DIFFERENCES, counts, strict=True))


def extra_python(scratch: Path) -> Path | None:
    """A Python that has ibis and polars beside this environment's packages; None without an index."""
    home = scratch / "venv"
    python = home / "bin" / "python"
    probe = [str(python), "-c", "import ibis, polars, feast"]
    if python.exists() and subprocess.run(probe, capture_output=True).returncode == 0:
        return python
    venv.create(home, with_pip=True, clear=True)
    inherited = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    import site

    (inherited / "project.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "ibis-framework[duckdb]>=11", "polars>=1.30"]
    if subprocess.run(install).returncode or subprocess.run(probe).returncode:
        return None
    return python


@dataclass(frozen=True)
class Bench:
    """Where the files are, and what a process may use."""

    scratch: Path
    timeout: int
    memory_gb: float
    warm: int
    warm_seconds: float

    def run(self, python: Path, name: str, case: Shape) -> dict[str, Any]:
        """One contender once; ``failed`` says why there is no result."""
        self.result(name).unlink(missing_ok=True)
        command = [str(python), __file__, "--child", name, "--shapes", case.name]
        command += ["--scratch", str(self.scratch), "--result", str(self.result(name))]
        command += ["--warm", str(self.warm), "--warm-seconds", str(self.warm_seconds)]

        def bounded() -> None:
            # Data, not address space: DuckDB and Arrow reserve far more than they use.
            resource.setrlimit(resource.RLIMIT_DATA, (int(self.memory_gb * 1e9),) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (self.timeout, self.timeout + 5))

        try:
            child = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "FEAST_USAGE": "False"},
                timeout=10 * self.timeout,
                preexec_fn=bounded,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"over {10 * self.timeout} s"}
        if not child.returncode:
            found: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
            return found
        if child.returncode == -signal.SIGXCPU:
            return {"failed": f"over {self.timeout} CPU seconds"}
        said = child.stderr.strip().splitlines() or ["killed"]
        full = ("MemoryError", "bad_alloc", "OutOfMemory", "Unable to allocate", "malloc", "realloc")
        if child.returncode < 0 or any(word in line for word in full for line in said[-5:]):
            return {"failed": f"out of memory at {self.memory_gb:g} GB"}
        return {"failed": said[-1][:160]}

    def result(self, name: str) -> Path:
        """Where a contender leaves its rows."""
        return self.scratch / f"result-{name}.parquet"


def measure(
    bench: Bench, case: Shape, names: list[str], rounds: int, once_over: float, beyond: set[str]
) -> list[dict[str, Any]]:
    """Every contender ``rounds`` times, in turns; what fails or is slow on dense keys joins ``beyond``."""
    generate(case, bench.scratch)
    extra = extra_python(bench.scratch) if NEEDS_EXTRA & set(names) else None
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    dense = case.name.startswith("dense-")
    failed = dict.fromkeys(beyond, "not tried: slow or failed on a smaller one") if dense else {}
    counted: dict[str, dict[str, int]] = {}
    for _ in range(rounds):
        for name in names:
            python = extra if name in NEEDS_EXTRA else Path(sys.executable)
            if python is None:
                failed[name] = "not installed"
            if name in failed or any(run["first"]["seconds"] > once_over for run in runs[name]):
                continue
            found = bench.run(python, name, case)
            _say(f"{case.name} {name}: {found.get('failed') or _told(found)}")
            if "failed" in found:
                failed[name] = found["failed"]
                continue
            runs[name].append(found)
            if name != "banquet" and name not in counted and runs.get("banquet"):
                counted[name] = differences(case, bench.result("banquet"), bench.result(name))
    if dense:
        slow = {name for name in names if any(run["first"]["seconds"] > once_over for run in runs[name])}
        beyond |= failed.keys() | (slow - {"banquet"})
    return [
        _summary(case, name, runs[name], runs.get("banquet", []), failed.get(name)) | counted.get(name, {})
        for name in names
    ]


def _say(line: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"  {time.perf_counter() - _START:4.0f} s  {line}", file=sys.stderr, flush=True)


def _told(run: dict[str, Any]) -> str:
    return ", ".join(
        f"{kind} {run[kind]['seconds']:.2f} s, {run[kind]['cpu_seconds']:.2f} CPU"
        for kind in KINDS
        if kind in run
    )


def _summary(
    case: Shape, name: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]], failed: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": case.name, "contender": name}
    if not runs:
        return row | {"failed": failed}
    for kind in KINDS:
        # A contender that ran once ran in the first round.
        turns = [
            (run[kind], our.get(kind))
            for run, our in zip_longest(runs, ours[: len(runs)], fillvalue={})
            if kind in run
        ]
        if not turns:
            continue
        row[kind] = {"processes": len(turns)}
        for key in ("seconds", "cpu_seconds"):
            row[kind][key] = statistics.median(run[key] for run, _ in turns)
            row[kind][f"all_{key}"] = [round(run[key], 3) for run, _ in turns]
            ratios = [run[key] / our[key] for run, our in turns if our]
            if ratios:
                row[kind][f"{key}_to_banquet"] = statistics.median(ratios)
    return row | {"peak_mb": round(max(run["peak_mb"] for run in runs))}


def memory(bench: Bench, events: Sequence[int]) -> list[dict[str, Any]]:
    """The peak of one process for numbers of events of three views, with 256 MB and with the default."""
    rows = []
    spill = bench.scratch / "spill"
    for count, name in [*((count, "banquet-256mb") for count in events), (max(events), "banquet")]:
        case = shape(f"dense-30kx{count // 3}")
        generate(case, bench.scratch)
        shutil.rmtree(spill, ignore_errors=True)
        spill.mkdir()
        row: dict[str, Any] = {"contender": name, "events": count}
        with _largest(spill) as sizes:
            found = bench.run(Path(sys.executable), name, case)
        _say(f"{count:,} events, {name}: {found.get('failed') or _told(found)}")
        if "failed" in found:
            rows.append(row | {"failed": found["failed"]})
            continue
        row |= {key: found[key] for key in ("before_mb", "peak_mb", "first")}
        row |= {"spilled_mb": max(sizes) / 1e6, "files_left": len(list(spill.iterdir()))}
        if name == "banquet" and "failed" not in rows[-1]:
            row |= differences(case, bench.result("banquet"), bench.result("banquet-256mb"))
        rows.append(row)
    return rows


@contextmanager
def _largest(folder: Path) -> Iterator[list[int]]:
    """The sizes of ``folder`` in bytes, looked at ten times a second."""
    sizes, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            try:
                sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
            except OSError:
                # A file went away between the two.
                continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def memory_text(rows: list[dict[str, Any]]) -> str:
    """The peaks as Markdown."""
    lines = []
    for row in rows:
        limit = "256 MB" if row["contender"] == "banquet-256mb" else "default"
        named = [f"{row['events']:,}", limit]
        if "failed" in row:
            lines.append([*named, row["failed"], *[""] * 5])
            continue
        lines.append(
            [
                *named,
                f"{row['before_mb']:,.0f}",
                f"{row['peak_mb']:,.0f}",
                f"{row['spilled_mb']:,.0f}",
                str(row["files_left"]),
                f"{row['first']['seconds']:.2f}",
                f"{row['first']['cpu_seconds']:.2f}",
            ]
        )
    header = ["events, dense keys", "`memory_limit`", "MB before the call", "peak MB", "most MB spilled"]
    return report.table([*header, "files left", "seconds", "CPU seconds"], lines)


def growth(bench: Bench) -> dict[str, Any]:
    """CPU seconds of Banquet while rows and events double, and the plane through them."""
    import numpy as np

    bench = replace(bench, warm=0)
    seconds: dict[tuple[int, int], float] = {}
    for rows, events in GROWTH:
        case = shape(f"dense-{rows}x{events}")
        generate(case, bench.scratch)
        found = bench.run(Path(sys.executable), "banquet", case)
        _say(f"{rows:,} rows x {events:,} events: {found.get('failed') or _told(found)}")
        if "failed" not in found:
            seconds[rows, events] = found["first"]["cpu_seconds"]
    sizes = np.array([[1, rows, 3 * events] for rows, events in seconds])
    measured = np.array(list(seconds.values()))
    plane, *_ = np.linalg.lstsq(sizes, measured, rcond=None)
    fitted = sizes @ plane
    return {
        "cpu_seconds": [
            {"rows": rows, "events_per_view": events, "measured": time, "fitted": float(fit)}
            for ((rows, events), time), fit in zip(seconds.items(), fitted, strict=True)
        ],
        "constant_seconds": float(plane[0]),
        "seconds_per_million_rows": float(plane[1] * 1e6),
        "seconds_per_million_events": float(plane[2] * 1e6),
        "r_squared": float(1 - ((measured - fitted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()),
    }


def growth_text(found: dict[str, Any]) -> str:
    """The growth as Markdown."""
    rows = [
        [f"{row['rows']:,}", f"{row['events_per_view']:,}", f"{row['measured']:.2f}", f"{row['fitted']:.2f}"]
        for row in found["cpu_seconds"]
    ]
    constant, by_rows, by_events = (
        found[name] for name in ("constant_seconds", "seconds_per_million_rows", "seconds_per_million_events")
    )
    plane = (
        f"CPU seconds = {constant:.2f} + {by_rows:.2f} per million rows + {by_events:.2f} per million events "
        f"(of three views); R² {found['r_squared']:.3f}."
    )
    header = ["entity rows, dense keys", "events per view", "CPU seconds", "by the plane"]
    return f"{report.table(header, rows)}\n\n{plane}"


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, one line per shape and contender; in brackets the ratio to Banquet."""
    rows = []
    for row in results:
        if "failed" in row:
            rows.append([row["shape"], row["contender"], row["failed"], *[""] * 7])
            continue
        measured = [_cell(row.get(kind), key) for kind in KINDS for key in ("seconds", "cpu_seconds")]
        counted = [f"{row[name]:,}" if name in row else "" for name in DIFFERENCES]
        rows.append([row["shape"], row["contender"], *measured, f"{row['peak_mb']:,}", *counted])
    header = ["rows x events", "", "first call, s", "CPU s", "warm call, s", "CPU s", "peak MB"]
    return report.table([*header, "rows lost", "values different", "out of place"], rows)


def _cell(taken: dict[str, Any] | None, key: str) -> str:
    if taken is None:
        return ""
    ratio = taken.get(f"{key}_to_banquet")
    times = "" if ratio is None else f" ({report.times(ratio)})"
    return f"{taken[key]:.2f}{times}"


def main() -> None:
    """Measure what was asked for, print it, keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--parts", default="compare,memory,growth")
    parser.add_argument("--memory-events", default="1M,10M", help="of the part memory, in three views")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=2, help="calls of a process after its first")
    parser.add_argument("--warm-seconds", type=float, default=4.0, help="of calls, after which none follows")
    parser.add_argument("--timeout", type=int, default=120, help="CPU seconds of one process")
    parser.add_argument("--memory-gb", type=float, default=12.0, help="of one process")
    parser.add_argument("--once-over", type=float, default=5.0, help="seconds after which one run is enough")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "banquet-bench-historical"
    )
    parser.add_argument("--dry", action="store_true", help="print only; leave results and documents alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [shape(name) for name in options.shapes.split(",")]
    if options.child:
        warm = options.warm, options.warm_seconds
        run_one(options.child, shapes[0], options.scratch, options.result, *warm)
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.scratch, options.timeout, options.memory_gb, options.warm, options.warm_seconds)
    record: dict[str, Any] = {
        "machine": report.machine(),
        "rounds": options.rounds,
        "memory_gb": options.memory_gb,
        "timeout_cpu_seconds": options.timeout,
        "shapes": [asdict(case) for case in shapes],
    }
    parts, texts = options.parts.split(","), []
    if "compare" in parts:
        names = options.contenders.split(",")
        beyond: set[str] = set()
        record["results"] = [
            row
            for case in shapes
            for row in measure(bench, case, names, options.rounds, options.once_over, beyond)
        ]
        texts.append(table(record["results"]))
    if "memory" in parts:
        record["memory"] = memory(
            replace(bench, warm=0), list(map(_number, options.memory_events.split(",")))
        )
        texts.append(memory_text(record["memory"]))
    if "growth" in parts:
        record["growth"] = growth(bench)
        texts.append(growth_text(record["growth"]))
    text = "\n\n".join(texts)
    print(text)
    if options.dry:
        return
    report.write_json("historical", record)
    groups: dict[str, dict[str, float]] = {}
    for row in record.get("results", ()):
        if "first" in row:
            groups.setdefault(row["shape"], {})[row["contender"]] = row["first"]["seconds"]
    if groups:
        title = "Historical retrieval, entity rows x events, first call"
        report.bar_chart("historical", title, "seconds", groups, own_scales=True)
    report.replace_section(ROOT / "docs" / "offline-store.md", "historical", text)


if __name__ == "__main__":
    main()
