"""Historical retrieval: Banquet's offline store against Feast's two, raw DuckDB and polars.

    python bench/historical.py [--shapes 100kx1M,1Mx1M,dense-30k] [--rounds 3] [--keep] [--scratch DIR]

Every contender runs in a process of its own, in turns, on the same Parquet files; the clock covers the
retrieval from the call to the Arrow table, not the imports. Every result is compared with Banquet's, row
by row and value by value; what differs is counted and reported. Only ratios taken in one run count.

Feast's duckdb store needs ibis-framework[duckdb], and polars is a contender of its own: both come from a
virtual environment under the scratch folder that sees this one's packages (made on the first run; without
a package index those contenders are left out).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import report  # noqa: E402 — the folder is no package: its files are scripts

DIFFERENCES = ("rows_lost", "rows_different", "rows_out_of_place")
CONTENDERS = ("banquet", "duckdb", "polars", "feast-duckdb", "feast-dask")
NEEDS_EXTRA = {"polars", "feast-duckdb"}
DEFAULT_SHAPES = "100kx1M,1Mx1M,100kx10M,1Mx10M,dense-3k,dense-10k,dense-30k"


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
    """``<rows>x<events>``: two views of 13 features, 3 events per key. ``dense-<rows>``: 16 keys and more."""
    if name.startswith("dense-"):
        year: dict[str, Any] = {"days": 365, "features": 5}
        return Shape(
            name,
            _number(name.removeprefix("dense-")),
            365,
            (
                View("store", "store_id", 16, 340_000, ttl=timedelta(days=30), **year),
                View("product", "product_id", 4_000, 340_000, ttl=timedelta(days=30), **year),
                View("user", "user_id", 2_500, 340_000, ttl=timedelta(days=90), **year),
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
        con.execute(f"CREATE TEMP TABLE e AS FROM '{folder / f'entities-{case.name}.parquet'}'")
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


def run_one(name: str, case: Shape, folder: Path, output: Path) -> None:
    """The child process: run one contender once and leave its result in ``output``."""
    import pyarrow.parquet as pq

    run = globals()[name.replace("-", "_")](case, folder)
    start, cpu = time.perf_counter(), time.process_time()
    table = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pq.write_table(table.select([c for c in table.column_names if c != "created"]), output)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak, "rows": table.num_rows}))


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


def measure(case: Shape, names: list[str], scratch: Path, rounds: int, timeout: int) -> list[dict[str, Any]]:
    """Every contender ``rounds`` times, in turns."""
    generate(case, scratch)
    extra = extra_python(scratch) if NEEDS_EXTRA & set(names) else None
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name in names:
            python = extra if name in NEEDS_EXTRA else Path(sys.executable)
            if python is None:
                failed[name] = "not installed"
            if name in failed:
                continue
            output = scratch / f"result-{name}.parquet"
            command = [
                str(python),
                __file__,
                "--child",
                name,
                "--shapes",
                case.name,
                "--scratch",
                str(scratch),
            ]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEAST_USAGE": "False"}
            try:
                child = subprocess.run(
                    [*command, "--result", str(output)],
                    capture_output=True,
                    text=True,
                    env=environment,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired:
                failed[name] = f"over {timeout} s"
                continue
            if child.returncode:
                last = (child.stderr.strip().splitlines() or ["killed"])[-1]
                failed[name] = "out of memory" if child.returncode == -9 else last[:160]
                continue
            runs[name].append(json.loads(child.stdout.strip().splitlines()[-1]))
            print(f"  {case.name} {name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr)
    results = []
    for name in names:
        row: dict[str, Any] = {"shape": case.name, "contender": name}
        if name in failed and not runs[name]:
            row["failed"] = failed[name]
        else:
            row["seconds"] = statistics.median(run["seconds"] for run in runs[name])
            row["cpu_seconds"] = statistics.median(run["cpu_seconds"] for run in runs[name])
            row["all_seconds"] = [round(run["seconds"], 3) for run in runs[name]]
            row["peak_mb"] = round(max(run["peak_mb"] for run in runs[name]))
            ours = scratch / "result-banquet.parquet"
            if ours.exists() and name != "banquet":
                row |= differences(case, ours, scratch / f"result-{name}.parquet")
        results.append(row)
    fastest = next((row.get("seconds") for row in results if row["contender"] == "banquet"), None)
    for row in results:
        if fastest and "seconds" in row:
            row["ratio_to_banquet"] = round(row["seconds"] / fastest, 2)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, one line per shape and contender."""
    rows = []
    for row in results:
        if "failed" in row:
            rows.append([row["shape"], row["contender"], row["failed"], *[""] * 6])
            continue
        measured = [f"{row[name]:.2f}" for name in ("seconds", "cpu_seconds")]
        counted = [f"{row[name]:,}" if name in row else "" for name in DIFFERENCES]
        ratio = f"{row['ratio_to_banquet']:.2f}" if "ratio_to_banquet" in row else ""
        rows.append([row["shape"], row["contender"], *measured, ratio, f"{row['peak_mb']:,}", *counted])
    header = ["rows x events", "", "seconds", "CPU seconds", "times Banquet", "peak MB"]
    return report.table([*header, "rows lost", "values different", "out of place"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=300, help="seconds per run")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "banquet-bench-historical"
    )
    parser.add_argument("--keep", action="store_true", help="write bench/results and the tables in docs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [shape(name) for name in options.shapes.split(",")]
    if options.child:
        run_one(options.child, shapes[0], options.scratch, options.result)
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for case in shapes:
        names = options.contenders.split(",")
        results += measure(case, names, options.scratch, options.rounds, options.timeout)
    text = table(results)
    print(text)
    if options.keep:
        record = {
            "machine": report.machine(),
            "rounds": options.rounds,
            "shapes": [asdict(case) for case in shapes],
            "results": results,
        }
        report.write_json("historical", record)
        groups: dict[str, dict[str, float]] = {}
        for row in results:
            if "seconds" in row:
                groups.setdefault(row["shape"], {})[row["contender"]] = row["seconds"]
        report.bar_chart("historical", "Historical retrieval, entity rows x events", "seconds", groups)
        for document in ("performance.md", "offline-store.md"):
            report.replace_section(ROOT / "docs" / document, "historical", text)


if __name__ == "__main__":
    main()
