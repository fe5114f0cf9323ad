"""A repository whose view takes events from a stream, and consumers of it in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from feast import FeatureView, Field, FileSource, PushSource
from feast.types import Float64, Int64

from core.repository import FeastRepository
from materialization.stream_group import default_stream
from tests.support.children import context, wait_halted
from tests.support.loads import USER, repository
from tests.support.valkey import Valkey
from tests.support.waiting import PATIENCE_SECONDS

STREAM = default_stream("shop")
DEAD = f"{{{STREAM}}}:dead"
SEED = datetime.fromisoformat("2020-01-01T00:00:00+00:00")


def streamed(path: Path, server: Valkey, *, db: int = 0, file: bool = False) -> FeastRepository:
    """A repository with the view ``clicks``, fed by ``clicks_push``.

    Its batch source ``path / "clicks"`` is a folder with one file, or a file ``clicks.parquet``; it has a
    column ``page`` that the view does not have, and a created timestamp.
    """
    repo = repository(path / "repo", server, db=db)
    where = path / ("clicks.parquet" if file else "clicks")
    first = where if file else where / "0.parquet"
    first.parent.mkdir(parents=True, exist_ok=True)
    seed = {"user_id": [-1], "clicks": [0], "rate": [0.5], "page": ["seed"]}
    frame = pd.DataFrame(seed).assign(event_timestamp=SEED, created=SEED)
    frame.to_parquet(first, coerce_timestamps="us")
    source = FileSource(
        name="clicks", path=str(where), timestamp_field="event_timestamp", created_timestamp_column="created"
    )
    view = FeatureView(
        name="clicks",
        entities=[USER],
        ttl=timedelta(0),
        source=PushSource(name="clicks_push", batch_source=source),
        schema=[
            Field(name="user_id", dtype=Int64),
            Field(name="clicks", dtype=Int64, tags={"min": "0"}),
            Field(name="rate", dtype=Float64),
        ],
    )
    repo.store().apply([USER, view])
    return repo


def event(user: int, clicks: int, at: datetime, **columns: Any) -> dict[str, Any]:
    """A good event."""
    usual = {"user_id": user, "clicks": clicks, "rate": clicks / 3, "page": f"p{clicks}"}
    return {**usual, "event_timestamp": at.isoformat(), **columns}


def fields(row: Any, source: str = "clicks_push") -> dict[Any, Any]:
    """The fields of an entry with one event."""
    return {"push_source": source, "event": json.dumps(row)}


def offline(path: Path) -> pd.DataFrame:
    """Every row of the batch source but the seed."""
    where = path / "clicks"
    files = sorted(where.glob("*.parquet")) if where.exists() else [path / "clicks.parquet"]
    frame = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
    return frame[frame["user_id"] >= 0].reset_index(drop=True)


def letters(client: Any) -> list[Mapping[bytes, bytes]]:
    """The dead letters, oldest first."""
    return [found for _, found in client.xrange(DEAD)]


def settled(client: Any, group: str = "banquet") -> bool:
    """Whether nothing is undelivered and nothing pending."""
    newest = client.xrevrange(STREAM, count=1)
    return any(
        info["pending"] == 0 and (not newest or newest[0][0] == info["last-delivered-id"])
        for info in client.xinfo_groups(STREAM)
        if info["name"] == group.encode()
    )


def _consume(path: Path, options: dict[str, Any], answers: Any) -> None:
    from materialization.stream import StreamConsumer, StreamOptions

    consumer = StreamConsumer(FeastRepository.open(path), StreamOptions(**options))
    signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
    answers.put(consumer.run().as_json())


class Consumer:
    """A consumer in a process of its own."""

    def __init__(self, process: Any, answers: Any) -> None:
        self.process = process
        self._answers = answers

    def kill(self) -> None:
        """End it with `kill -9`."""
        self.process.kill()
        self.process.join()

    def halted(self, holds: Callable[[], bool]) -> bool:
        """Suspend it and look whether something holds then; where it does not, it goes on."""
        os.kill(self.process.pid, signal.SIGSTOP)
        wait_halted(self.process)
        if found := holds():
            return found
        os.kill(self.process.pid, signal.SIGCONT)
        return False

    def stop(self) -> dict[str, Any]:
        """End it with SIGTERM; its final report."""
        self.process.terminate()
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode == 0, self.process.exitcode
        report: dict[str, Any] = self._answers.get()
        return report


@contextmanager
def consuming(repo: FeastRepository, **options: Any) -> Iterator[Consumer]:
    """A consumer that runs, killed when the block ends unless it ended before."""
    spawn = context()
    answers = spawn.SimpleQueue()
    process = spawn.Process(target=_consume, args=(repo.path, options, answers), daemon=True)
    process.start()
    try:
        yield Consumer(process, answers)
    finally:
        process.kill()
        process.join()
        answers.close()
