"""Files that DuckDB reads through Python: by several threads at once, each from its own place."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FileSource
from fsspec.implementations.local import LocalFileSystem

from core.source import connect, scan

GROUPS, ROWS = 64, 10


class Unhurried(LocalFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Local files at which other threads get their turn between a seek and the read that follows."""

    protocol = "unhurried"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("unhurried://")

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        file = io.BytesIO(Path(self._strip_protocol(path)).read_bytes())

        class Slow:
            def seek(self, place: int) -> int:
                file.seek(place)
                time.sleep(0.0005)
                return place

            def read(self, size: int) -> bytes:
                return file.read(size)

            def close(self) -> None:
                pass

        return Slow()


@pytest.fixture
def unhurried() -> None:
    fsspec.register_implementation("unhurried", Unhurried, clobber=True)


def test_threads_that_share_a_file_do_not_read_each_others_rows(unhurried: None, tmp_path: Path) -> None:
    """Row groups of one size in bytes: what is read from the wrong place looks as good as the right one."""
    rows = pa.table({"id": range(GROUPS * ROWS), "value": [float(n // ROWS) for n in range(GROUPS * ROWS)]})
    pq.write_table(
        rows, tmp_path / "rows.parquet", row_group_size=ROWS, use_dictionary=False, compression="none"
    )
    with connect(memory_limit="200MB", threads=4) as con:
        found = scan(con, FileSource(path=f"unhurried://{tmp_path}/rows.parquet"), None)
        wrong = con.execute(
            f"SELECT count(*), count(*) FILTER (WHERE value <> id // {ROWS}) FROM {found.table}"
        )
        assert wrong.fetchall() == [(GROUPS * ROWS, 0)]
