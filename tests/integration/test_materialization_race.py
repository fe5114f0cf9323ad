"""Two processes that write the same keys at the same time never leave the older row."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from feast import FeatureView, Field, PushSource
from feast.types import Float64

from core import layout
from core.repository import FeastRepository
from core.types import Dtype
from core.types import Field as Key
from core.write import OnlineWriter, encode_rows
from tests.support.children import context, materializing
from tests.support.loads import NOW, USER, a_view, everything, repository, write_rows
from tests.support.valkey import Valkey

USERS = 1500
Version = tuple[int, int, float]  # event and created timestamps in nanoseconds, value


def nanoseconds(time: str) -> int:
    return int(datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp()) * 1_000_000_000


def day(number: int) -> str:
    return f"2026-04-{number:02}"


def pushable_repository(path: Path, server: Valkey) -> FeastRepository:
    """A view that takes pushes, so that created timestamps settle ties between both ways in."""
    repo = repository(path / "repo", server)
    batch = a_view(path / "events.parquet").batch_source
    view = FeatureView(
        name="behavior",
        entities=[USER],
        schema=[Field(name="value", dtype=Float64)],
        source=PushSource(name="pushes", batch_source=batch),
    )
    repo.store().apply([USER, view])
    return repo


def push(path: Path, versions: list[tuple[int, Version]], batch_rows: int) -> None:
    """Push rows in small batches, as a stream would; runs in a process of its own."""
    repo = FeastRepository.open(path)
    view = repo.definitions().views["behavior"]
    with OnlineWriter(repo.redis, repo.project) as writer:
        for start in range(0, len(versions), batch_rows):
            batch = versions[start : start + batch_rows]
            columns = {"user_id": [user for user, _ in batch], "value": [v[2] for _, v in batch]}
            rows = encode_rows(repo.project, view, columns, [v[0] for _, v in batch])
            writer.write(view.stored_name, rows, created_ns=[v[1] for _, v in batch])


def stored(server: Valkey) -> dict[int, tuple[int | None, float]]:
    """Per user the event timestamp and the value in Redis."""
    keys = layout.EntityKeys("shop", [Key("user_id", Dtype.INT64)])
    found = {}
    for key, fields in everything(server).items():
        decoded = keys.decode(key)
        assert decoded is not None
        event = layout.decode_timestamp(fields[layout.timestamp_field("behavior")])
        value = layout.decode_value(fields[layout.feature_field("behavior", "value")], Dtype.DOUBLE)
        found[decoded[0]] = (event, value)
    return found


@pytest.mark.parametrize(("seed", "restore_rows"), [(0, 1 << 30), (1, 1 << 30), (2, 1 << 30), (3, 1), (4, 1)])
def test_a_materialization_and_pushes_leave_the_newest_row_of_every_key(
    server: Valkey, tmp_path: Path, seed: int, restore_rows: int
) -> None:
    """Few distinct event times, so that many rows tie and the created time decides."""
    rng = random.Random(seed)
    versions: dict[int, list[Version]] = {}

    def version(user: int) -> Version:
        event, created = day(rng.randint(1, 3)), day(rng.randint(10, 28))
        found = (nanoseconds(event), nanoseconds(created) + len(versions.get(user, [])), rng.random())
        versions.setdefault(user, []).append(found)
        return found

    batch = [(user, version(user)) for user in range(USERS)]
    rows: list[tuple[int, str, str | None, float | None]] = [
        (user, iso(event), iso(created), value) for user, (event, created, value) in batch
    ]
    write_rows(tmp_path / "events.parquet", rows)
    pushed = [(user, version(user)) for user in rng.choices(range(USERS), k=4 * USERS)]
    repo = pushable_repository(tmp_path, server)
    pushing = context().Process(target=push, args=(repo.path, pushed, 40), daemon=True)
    options = {"chunk_rows": 200, "slice_rows": 20, "restore_rows": restore_rows}
    with materializing(repo.path, NOW, **options) as (process, answers):
        pushing.start()
        (report,) = answers.get()
        process.join(60)
        pushing.join(120)
    assert report["ok"], report
    assert pushing.exitcode == 0
    expected = {user: max(found)[::2] for user, found in versions.items()}
    assert stored(server) == expected


def iso(ns: int) -> str:
    """Nanoseconds since the epoch as a time of nanosecond precision."""
    return str(np.datetime64(ns, "ns"))


def test_two_writers_in_two_processes_leave_the_newest_row(server: Valkey, tmp_path: Path) -> None:
    """One by transactions, one by the script, over the same keys and with interleaved versions."""
    write_rows(tmp_path / "events.parquet", [(1, "2026-04-01", "2026-04-01", 1.0)])
    repo = pushable_repository(tmp_path, server)
    versions = list(range(60))
    random.Random(4).shuffle(versions)
    spawn = context()
    writers = [
        spawn.Process(target=write_versions, args=(repo.path, versions[i::2], bool(i)), daemon=True)
        for i in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    base = nanoseconds(day(1))
    assert set(stored(server).values()) == {(base + 59_000, 59.0)}


def write_versions(path: Path, versions: list[int], distinct: bool) -> None:
    """Write each version to all users; runs in a process of its own."""
    repo = FeastRepository.open(path)
    view = repo.definitions().views["behavior"]
    base = nanoseconds(day(1))
    users = list(range(300))
    with OnlineWriter(repo.redis, repo.project) as writer:
        for version in versions:
            columns = {"user_id": users, "value": [float(version)] * len(users)}
            rows = encode_rows(repo.project, view, columns, [base + version * 1000] * len(users))
            writer.write(view.stored_name, rows, distinct=distinct)
