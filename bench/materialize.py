"""Materialization: Banquet against stock Feast and against the rate at which Redis takes the same bytes.

    python bench/materialize.py [--rows 100000,1000000] [--rounds 3] [--contenders ...] [--scratch DIR]

Ten double features, an int64 key, a created timestamp, one in five keys with an older second row. Every
contender runs in a process of its own, in turns, on the same Parquet file into an emptied Valkey; the clock
covers the materialization, not the imports. ``pipe`` sends the commands of the same rows, prebuilt, through
one socket and drains the replies: what ``redis-cli --pipe`` does. A digest over every key, field and value
must come out equal for all. Only ratios taken in one run count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CONTENDERS = ("pipe", "banquet", "banquet-unchecked", "feast", "feast-unchecked")
FEATURES = 10
END = datetime(2026, 5, 1, tzinfo=UTC)
START = END - timedelta(days=30)
# Stock writes everything at once by default, which takes 9 GB for a million rows.
STOCK_BATCH_ROWS = 10_000

REPOSITORY = """
project: bench
provider: local
registry: registry.db
online_store: {{type: redis, connection_string: "127.0.0.1:{port}", skip_dedup: {unchecked}}}
offline_store: {{type: {offline}}}
batch_engine: {{type: {engine}}}
materialization: {{online_write_batch_size: {batch}}}
entity_key_serialization_version: 3
"""


def make_events(path: Path, rows: int) -> None:
    """One row per key, and an older one for every fifth."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(rows)
    keys = np.concatenate([rng.permutation(rows), rng.permutation(rows)[: rows // 5]])
    start_us, span_us = int(START.timestamp()) * 10**6, int((END - START).total_seconds()) * 10**6
    events = start_us + rng.integers(0, span_us, len(keys))
    columns = {
        "user_id": keys,
        "event_timestamp": pa.array(events, pa.timestamp("us", tz="UTC")),
        "created": pa.array(events + 1_000_000, pa.timestamp("us", tz="UTC")),
        **{f"f{i}": rng.random(len(keys)) for i in range(FEATURES)},
    }
    pq.write_table(pa.table(columns), path, row_group_size=122_880)


def make_repository(folder: Path, events: Path, port: int, contender: str) -> None:
    """A Feast repository with one view, applied."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64

    ours = contender.startswith("banquet") or contender == "pipe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feature_store.yaml").write_text(
        REPOSITORY.format(
            port=port,
            unchecked=str(contender.endswith("-unchecked")).lower(),
            offline="core.offline.BanquetOfflineStore" if ours else "file",
            engine="materialization.engine.BulkComputeEngine" if ours else "local",
            batch=STOCK_BATCH_ROWS,
        )
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(
        name="events",
        path=str(events),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    schema = [Field(name=f"f{i}", dtype=Float64) for i in range(FEATURES)]
    view = FeatureView(name="behavior", entities=[user], schema=schema, source=source, ttl=timedelta(days=90))
    FeatureStore(repo_path=str(folder)).apply([user, view])


def run_contender(contender: str, folder: Path, port: int) -> dict[str, Any]:
    """Materialize once; runs in the child process."""
    sys.path.insert(0, str(ROOT))
    from feast import FeatureStore

    from core.repository import FeastRepository

    if contender == "pipe":
        seconds = _pipe(folder, port)
    elif contender.startswith("banquet"):
        from materialization.run import materialize

        repo = FeastRepository.open(folder)
        repo.store()
        began = time.perf_counter()
        report = materialize(repo, start=START, end=END)
        seconds = time.perf_counter() - began
        assert report.ok, report.as_json()
    else:
        store = FeatureStore(repo_path=str(folder))
        began = time.perf_counter()
        store.materialize(START, END)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _pipe(folder: Path, port: int) -> float:
    """The time that Redis needs for the prebuilt commands."""
    import socket

    from core.layout_rows import RowEncoder, assemble, bulk_string, command_head
    from core.repository import FeastRepository
    from core.types import Field
    from materialization import views
    from materialization.materializer import Materializer
    from materialization.window import EVENT, Window

    repo = FeastRepository.open(folder)
    store = repo.store()
    view = store.get_feature_view("behavior")
    materializer = Materializer.of_store(store)
    window = Window(views.as_us(START), views.as_us(END))
    stored = views.stored_view(view, store.config)
    fields = [Field(f.name, f.dtype) for f in stored.features]
    encoder = RowEncoder("bench", stored.stored_name, stored.join_keys, fields, EVENT)
    payload, rows = [], 0
    with materializer.connection() as con:
        for batch in materializer.open_source(con, view, window).stage(window, 1).batches(50_000):
            encoded = encoder.encode(batch)
            head = command_head(2 + 2 * encoded.field_count) + bulk_string(b"HSET")
            payload.append(assemble(len(encoded), head, *encoded.key, *encoded.fields).data.tobytes())
            rows += len(encoded)
    with socket.create_connection(("127.0.0.1", port)) as connection:

        def drain() -> None:
            lines, buffer = 0, bytearray(1 << 18)
            while lines < rows:
                count = connection.recv_into(buffer)
                assert count, "the connection was closed"
                lines += buffer.count(b"\n", 0, count)

        thread = threading.Thread(target=drain)
        began = time.perf_counter()
        thread.start()
        for part in payload:
            connection.sendall(part)
        thread.join()
        return time.perf_counter() - began


def digest(port: int) -> tuple[str, int]:
    """Of every key of Feast's with its fields and values; and how many keys there are."""
    import redis

    total, count = hashlib.sha256(), 0
    combined = 0
    with redis.Redis(port=port) as client:
        cursor = 0
        while True:
            cursor, keys = client.scan(cursor, count=5000)
            keys = [key for key in keys if not key.startswith(b"banquet:")]
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.hgetall(key)
            for key, fields in zip(keys, pipeline.execute(), strict=True):
                one = hashlib.sha256(key)
                for name, value in sorted(fields.items()):
                    one.update(b"%d:%s%d:%s" % (len(name), name, len(value), value))
                # A sum does not depend on the order, and SCAN may return a key twice: see the count.
                combined = (combined + int.from_bytes(one.digest(), "big")) % (1 << 256)
                count += 1
            if cursor == 0:
                break
        assert count == client.dbsize() - len(list(client.scan_iter(b"banquet:*", count=5000)))
    total.update(combined.to_bytes(32, "big"))
    return total.hexdigest()[:16], count


def measure(rows: int, contenders: list[str], rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """Run every contender ``rounds`` times, in turns."""
    sys.path.insert(0, str(ROOT))
    from tests.support.valkey import Valkey

    events = scratch / f"events-{rows}.parquet"
    if not events.exists():
        make_events(events, rows)
    found: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    for turn in range(rounds):
        for contender in contenders:
            if contender.startswith("feast") and turn and rows >= 1_000_000:
                continue  # minutes each, and far from the others
            with Valkey(scratch) as server, tempfile.TemporaryDirectory(dir=scratch) as folder:
                make_repository(Path(folder), events, server.port, contender)
                command = [sys.executable, __file__, "--child", contender, folder, str(server.port)]
                environment = {**os.environ, "FEAST_USAGE": "False", "PYTHONPATH": str(ROOT)}
                out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if out.returncode:
                    raise RuntimeError(f"{contender} failed:\n{out.stdout}\n{out.stderr}")
                result = json.loads(out.stdout.strip().splitlines()[-1])
                digests[contender], keys = digest(server.port)
            assert keys == rows, f"{contender} wrote {keys} keys"
            result |= {"contender": contender, "rows": rows, "rows_per_second": rows / result["seconds"]}
            found.append(result)
            print(
                f"{rows:>9} {contender:<18} {result['seconds']:7.2f} s "
                f"{result['rows_per_second']:9.0f} rows/s {result['peak_mb']:6.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    assert len(set(digests.values())) == 1, f"the contenders wrote different bytes: {digests}"
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per size and contender: the median, the best, and its ratios to stock and to the pipe."""
    lines = []
    sizes = sorted({result["rows"] for result in found})
    for rows in sizes:
        medians = {}
        for contender in CONTENDERS:
            mine = [r for r in found if r["rows"] == rows and r["contender"] == contender]
            if not mine:
                continue
            medians[contender] = statistics.median(r["rows_per_second"] for r in mine)
            lines.append(
                {
                    "rows": rows,
                    "contender": contender,
                    "rows_per_second": round(medians[contender]),
                    "spread": [
                        round(min(r["rows_per_second"] for r in mine)),
                        round(max(r["rows_per_second"] for r in mine)),
                    ],
                    "peak_mb": round(max(r["peak_mb"] for r in mine)),
                }
            )
        for line in lines:
            if line["rows"] == rows:
                for name, other in (("times_feast", "feast"), ("share_of_pipe", "pipe")):
                    if other in medians:
                        line[name] = round(medians[line["contender"]] / medians[other], 2)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    out = ["| rows | contender | rows/s | x feast | of the pipe | peak MB |", "|---|---|---|---|---|---|"]
    for line in lines:
        out.append(
            f"| {line['rows']:,} | {line['contender']} | {line['rows_per_second']:,} "
            f"| {line.get('times_feast', '')} | {line.get('share_of_pipe', '')} | {line['peak_mb']} |"
        )
    return "\n".join(out)


def plot(lines: list[dict[str, Any]]) -> str:
    """Rows per second as an SVG bar chart."""
    width, bar, gap = 760, 22, 8
    top = max(line["rows_per_second"] for line in lines)
    shapes, y = [], 30
    for line in lines:
        length = 430 * line["rows_per_second"] / top
        label = f"{line['rows']:,} rows, {line['contender']}"
        colour = "#2a6fb0" if line["contender"].startswith("banquet") else "#9aa4ad"
        shapes.append(
            f'<text x="225" y="{y + 15}" text-anchor="end">{label}</text>'
            f'<rect x="235" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>'
            f'<text x="{240 + length:.1f}" y="{y + 15}">{line["rows_per_second"]:,}</text>'
        )
        y += bar + gap
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 10}" '
        f'font-family="sans-serif" font-size="13"><text x="10" y="18">Materialization, rows per second</text>'
        + "".join(shapes)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        contender, folder, port = arguments.child
        print(json.dumps(run_contender(contender, Path(folder), int(port))))
        return
    contenders = arguments.contenders.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        found = []
        for rows in map(int, arguments.rows.split(",")):
            found += measure(rows, contenders, arguments.rounds, scratch)
    lines = summary(found)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"machine": machine, "summary": lines, "runs": found}
    (arguments.output / "materialize.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "materialize.svg").write_text(plot(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
