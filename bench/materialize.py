"""Materialization: Banquet against stock Feast and against the rate at which Redis takes the same bytes.

    python bench/materialize.py [--rows 100000,1000000] [--situations first,reload,second] [--rounds 3]
        [--contenders pipe,banquet,...] [--memory-rows 10000000] [--scratch DIR] [--keep]

Ten double features, an int64 key, a created timestamp, one in five keys with an older second row. Three
situations: ``first``, an empty Redis; ``reload``, every key has an older row of the view; ``second``, every
key has a row of another view. Each contender runs in a process of its own, in turns, on the same Parquet
file; the clock covers the materialization, not the imports. ``pipe`` sends the HSETs of the same rows,
prebuilt, through one socket and drains the replies: what ``redis-cli --pipe`` does. A digest over every key,
field and value must come out equal for all. Only ratios taken in one run count, and on a busy machine only
those of processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402 — the folder is no package: its files are scripts

ROOT = HERE.parent
CONTENDERS = ("pipe", "banquet", "banquet-unchecked", "feast", "feast-unchecked")
SITUATIONS = {
    "first": "first load",
    "reload": "every key has an older row",
    "second": "every key has another view's row",
}
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

    payload: list[bytes] = []
    if contender == "pipe":
        payload = list(commands(folder))
    elif contender.startswith("banquet"):
        from materialization.run import materialize
    repo = FeastRepository.open(folder)
    store = repo.store() if contender.startswith("banquet") else FeatureStore(repo_path=str(folder))
    with redis_cpu(port) as server:
        began, used = time.perf_counter(), time.process_time()
        if contender == "pipe":
            pipe(payload, port)
        elif contender.startswith("banquet"):
            outcome = materialize(repo, start=START, end=END)
            assert outcome.ok, outcome.as_json()
        else:
            store.materialize(START, END)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "redis_cpu_seconds": server["cpu_seconds"],
        "peak_mb": report.peak_mb(),
    }


@contextmanager
def redis_cpu(port: int) -> Iterator[dict[str, float]]:
    """The processor time that the server uses within the block."""
    import redis

    with redis.Redis(port=port) as client:
        process = int(client.info("server")["process_id"])

    def used() -> float:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    found: dict[str, float] = {}
    began = used()
    yield found
    found["cpu_seconds"] = used() - began


def commands(folder: Path, view_name: str = "behavior", earlier: timedelta = timedelta(0)) -> Iterator[bytes]:
    """The HSETs of the rows that materialization finds; under another view's name, or with earlier events."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from core.layout_rows import RowEncoder, assemble, bulk_string, command_head
    from core.repository import FeastRepository
    from core.types import Field
    from materialization import views
    from materialization.materializer import Materializer
    from materialization.window import EVENT, Window

    store = FeastRepository.open(folder).store()
    view = store.get_feature_view("behavior")
    materializer = Materializer.of_store(store)
    window = Window(views.as_us(START), views.as_us(END))
    stored = views.stored_view(view, store.config)
    fields = [Field(f.name, f.dtype) for f in stored.features]
    encoder = RowEncoder("bench", view_name, stored.join_keys, fields, EVENT)
    with materializer.connection() as con:
        for batch in materializer.open_source(con, view, window).stage(window, 1).batches(50_000):
            place = batch.schema.get_field_index(EVENT)
            events = pc.subtract(batch.column(place), pa.scalar(earlier))
            encoded = encoder.encode(batch.set_column(place, EVENT, events))
            head = command_head(2 + 2 * encoded.field_count) + bulk_string(b"HSET")
            yield assemble(len(encoded), head, *encoded.key, *encoded.fields).data.tobytes()


def pipe(payload: Iterable[bytes], port: int) -> None:
    """Send prebuilt commands through one socket and drain the replies beside it."""
    end = b"$4\r\nDONE\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:

        def drain() -> None:
            last = b""
            while not last.endswith(end):
                received = connection.recv(1 << 18)
                assert received, "the connection was closed"
                last = (last + received)[-len(end) :]

        thread = threading.Thread(target=drain)
        thread.start()
        for part in payload:
            connection.sendall(part)
        connection.sendall(b"*2\r\n$4\r\nECHO\r\n" + end)
        thread.join()


def prefill(situation: str, folder: Path, port: int) -> None:
    """What Redis holds before the clock starts; runs in the child process."""
    sys.path.insert(0, str(ROOT))
    if situation == "reload":
        pipe(commands(folder, earlier=timedelta(days=1)), port)
    elif situation == "second":
        pipe(commands(folder, "profile"), port)


def digest(port: int) -> tuple[str, int]:
    """Of every key of Feast's with its fields and values; and how many keys there are."""
    import redis

    total, keys_read = hashlib.sha256(), 0
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
                keys_read += 1
            if cursor == 0:
                break
    assert keys_read == count(port)
    total.update(combined.to_bytes(32, "big"))
    return total.hexdigest()[:16], keys_read


def count(port: int) -> int:
    """How many keys of Feast's there are."""
    import redis

    with redis.Redis(port=port) as client:
        ours = sum(1 for _ in client.scan_iter(b"banquet:*", count=100_000))
        return int(client.dbsize()) - ours


def measure(
    rows: int, situation: str, contenders: list[str], rounds: int, scratch: Path, *, compare: bool = True
) -> list[dict[str, Any]]:
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
                if situation != "first":
                    child("--prefill", situation, folder, str(server.port))
                result = json.loads(child("--child", contender, folder, str(server.port)).splitlines()[-1])
                digests[contender], keys = digest(server.port) if compare else ("", count(server.port))
            assert keys == rows, f"{contender} wrote {keys} keys"
            result |= {"situation": situation, "contender": contender, "rows": rows}
            found.append(result)
            print(
                f"{rows:>9} {situation:<7} {contender:<18} {result['seconds']:7.2f} s, processor time "
                f"{result['cpu_seconds']:6.2f} s, Valkey's {result['redis_cpu_seconds']:6.2f} s, "
                f"{result['peak_mb']:6.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    assert len(set(digests.values())) == 1, f"the contenders wrote different bytes: {digests}"
    return found


def child(*arguments: str) -> str:
    """Run this script in a process of its own."""
    environment = {**os.environ, "FEAST_USAGE": "False", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if out.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{out.stdout}\n{out.stderr}")
    return out.stdout


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per size, situation and contender: medians, and their ratios to stock and to the pipe."""
    lines: list[dict[str, Any]] = []
    for rows, situation in dict.fromkeys((r["rows"], r["situation"]) for r in found):
        group = {}
        for contender in CONTENDERS:
            mine = [
                r
                for r in found
                if (r["rows"], r["situation"], r["contender"]) == (rows, situation, contender)
            ]
            if mine:
                rates = [rows / r["seconds"] for r in mine]
                group[contender] = {
                    "rows": rows,
                    "situation": situation,
                    "contender": contender,
                    "rows_per_second": round(statistics.median(rates)),
                    "spread": [round(min(rates)), round(max(rates))],
                    "cpu_us_per_row": _us_per_row(mine, "cpu_seconds"),
                    "redis_cpu_us_per_row": _us_per_row(mine, "redis_cpu_seconds"),
                    "peak_mb": round(max(r["peak_mb"] for r in mine)),
                }
        for line in group.values():
            for name, other in (("times_feast", "feast"), ("share_of_pipe", "pipe")):
                if other in group:
                    line[name] = round(line["rows_per_second"] / group[other]["rows_per_second"], 2)
            if "pipe" in group:
                pipe_cpu = group["pipe"]["redis_cpu_us_per_row"]
                line["redis_cpu_to_pipe"] = round(line["redis_cpu_us_per_row"] / max(0.01, pipe_cpu), 2)
        lines += group.values()
    return lines


def _us_per_row(runs: list[dict[str, Any]], what: str) -> float:
    return round(statistics.median(r[what] / r["rows"] for r in runs) * 1e6, 2)


def table(lines: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    header = ["rows", "", "", "rows/s", "times Feast", "of the pipe", "CPU us/row", "Valkey's CPU us/row"]
    rows = [
        [
            f"{line['rows']:,}",
            SITUATIONS[line["situation"]],
            line["contender"],
            f"{line['rows_per_second']:,}",
            line.get("times_feast", ""),
            line.get("share_of_pipe", ""),
            line["cpu_us_per_row"],
            line["redis_cpu_us_per_row"],
            f"{line['peak_mb']:,}",
        ]
        for line in lines
    ]
    return report.table([*header, "peak MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--situations", default=",".join(SITUATIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument(
        "--memory-rows", type=int, default=0, help="a first load of so many, by Banquet alone"
    )
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--keep", action="store_true", help="write bench/results and the table in docs")
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "FOLDER", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument("--prefill", nargs=3, metavar=("SITUATION", "FOLDER", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender, folder, port = options.child
        print(json.dumps(run_contender(contender, Path(folder), int(port))))
        return
    if options.prefill:
        situation, folder, port = options.prefill
        prefill(situation, Path(folder), int(port))
        return
    found: list[dict[str, Any]] = []
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        for rows in map(int, filter(None, options.rows.split(","))):
            for situation in options.situations.split(","):
                found += measure(rows, situation, options.contenders.split(","), options.rounds, scratch)
        if options.memory_rows:
            found += measure(options.memory_rows, "first", ["banquet"], 1, scratch, compare=False)
    loads.append(os.getloadavg()[0])
    lines = summary(found)
    text = table(lines) + (
        f"\n\nLoad average {loads[0]:.1f} to {loads[1]:.1f} on {os.cpu_count()} cores, which the contender, "
        "Valkey and everything else share."
    )
    print(text)
    if options.keep:
        record = {"machine": report.machine(), "load_average": loads, "summary": lines, "runs": found}
        report.write_json("materialize", record)
        groups: dict[str, dict[str, float]] = {}
        for line in lines:
            group = f"{line['rows']:,}, {line['situation']}"
            groups.setdefault(group, {})[line["contender"]] = line["rows_per_second"]
        report.bar_chart("materialize", "Materialization: rows and situation", "rows per second", groups)
        report.replace_section(ROOT / "docs" / "performance.md", "materialize", text)


if __name__ == "__main__":
    main()
