"""`banquet stream` on a real Valkey: nothing is lost, whoever dies."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from core.repository import FeastRepository
from materialization.stream import StreamConsumer, StreamOptions
from materialization.stream_group import StreamGroup
from tests.support.loads import values
from tests.support.streams import (
    DEAD,
    SEED,
    STREAM,
    consuming,
    event,
    fields,
    letters,
    offline,
    settled,
    streamed,
)
from tests.support.valkey import Cluster, SentinelTrio, Valkey
from tests.support.waiting import PATIENCE_SECONDS, wait_until

KILLS = int(os.environ.get("TEST_STREAM_KILLS", "10"))
NOW = datetime.now(tz=UTC).replace(microsecond=0) - timedelta(hours=5)
QUICK: dict[str, Any] = {"append_seconds": 0.2, "report_seconds": 0.5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    directory = tmp_path_factory.mktemp("stream")
    with Valkey(directory, "appendonly yes", "appendfsync always") as running:
        yield running


@pytest.fixture
def client(server: Valkey) -> Iterator[Any]:
    with server.client() as connection:
        connection.flushall()
        yield connection


@pytest.fixture(scope="module")
def prepared(server: Valkey, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeastRepository, Path]:
    path = tmp_path_factory.mktemp("streamed")
    return streamed(path, server), path


@pytest.fixture
def repo(prepared: tuple[FeastRepository, Path]) -> Iterator[FeastRepository]:
    repo, path = prepared
    yield repo
    for file in (path / "clicks").glob("*.parquet"):
        if file.name != "0.parquet":
            file.unlink()


@pytest.fixture
def source(repo: FeastRepository) -> Path:
    """Where the batch source is, for ``offline``."""
    return repo.path.parent


def wait_settled(client: Any) -> None:
    wait_until(lambda: settled(client), "everything is acknowledged")


def pending(client: Any) -> int:
    """How many entries have been read and not acknowledged."""
    return sum(info["pending"] for info in client.xinfo_groups(STREAM)) if client.exists(STREAM) else 0


class Producer(threading.Thread):
    """Adds good and bad events to the stream, ``rate`` a second: ``count``, or until it is stopped."""

    BAD = (
        ({"push_source": "clicks_push", "event": "{"}, "not valid JSON"),
        ({"push_source": "clicks_push", "event": b"\xff"}, "not valid JSON"),
        ({"push_source": "nowhere", "event": "{}"}, "No feature view takes pushes"),
        ({"push_source": "clicks_push"}, "either the field event or"),
        (fields({"user_id": 1}), "missing"),
        (fields(event(1, -1, NOW)), "min 0"),
        (fields(event(1, 1, NOW) | {"user_id": "1"}), "64-bit integer"),
        (fields(event(1, 1, NOW) | {"event_timestamp": "soon"}), "RFC 3339"),
        (fields(event(1, 1, NOW, page={"a": 1})), "page"),
    )

    def __init__(self, server: Valkey, rate: float, count: int | None = None, users: int = 40) -> None:
        super().__init__()
        self._server, self._rate, self._count, self._users = server, rate, count, users
        self._enough = threading.Event()
        self.good: list[tuple[int, int, datetime]] = []
        self.bad: list[str] = []

    def run(self) -> None:
        rng = random.Random(5)
        with self._server.client() as client:
            for number in itertools.count():
                if number == self._count or self._enough.wait(1 / self._rate):
                    return
                if number % 25 == 0:
                    entry, reason = self.BAD[(number // 25) % len(self.BAD)]
                    self.bad.append(reason)
                else:
                    # Late ones among them; no two at the same moment.
                    at = NOW + timedelta(milliseconds=rng.randrange(1000) * 10_000 + number)
                    user = rng.randrange(self._users)
                    entry = fields(event(user, number, at))
                    self.good.append((user, number, at))
                client.xadd(STREAM, entry)

    def stop(self) -> None:
        """Add no more."""
        self._enough.set()
        self.join()

    def newest(self) -> dict[int, int]:
        """Per user the clicks of the event that is newest by its own time."""
        best: dict[int, tuple[datetime, int]] = {}
        for user, clicks, at in self.good:
            best[user] = max(best.get(user, (at, clicks)), (at, clicks))
        return {user: clicks for user, (_, clicks) in best.items()}


def joined(repo: FeastRepository, users: list[int]) -> dict[int, int]:
    """The clicks of some users by the historical join, as of now."""
    asked = pd.DataFrame({"user_id": users, "event_timestamp": datetime.now(tz=UTC)})
    found = repo.store().get_historical_features(asked, ["clicks:clicks"]).to_df()
    return dict(zip(found["user_id"], found["clicks"], strict=True))


def assert_complete(repo: FeastRepository, client: Any, source: Path, producer: Producer) -> int:
    """All of it is where it belongs; how many rows are offline more than once."""
    newest = producer.newest()
    assert dict(zip(newest, values(repo, list(newest), "clicks:clicks"), strict=True)) == newest
    rows = offline(source)
    stored = set(zip(rows["user_id"], rows["clicks"], rows["event_timestamp"], strict=True))
    assert stored == set(producer.good)
    # A second delivery appends the very same row again, its created timestamp included.
    distinct = rows.drop_duplicates()
    assert len(distinct) == len(producer.good)
    assert (rows["page"] == "p" + rows["clicks"].astype(str)).all()
    found = letters(client)
    assert len(found) == len(producer.bad)
    for letter, reason in zip(
        sorted(found, key=lambda letter: tuple(map(int, letter[b"entry_id"].split(b"-")))),
        producer.bad,
        strict=True,
    ):
        assert reason in letter[b"reason"].decode()
    assert joined(repo, list(newest)) == newest
    return len(rows) - len(distinct)


def test_nothing_is_lost_when_the_consumer_is_killed_again_and_again(
    server: Valkey, client: Any, repo: FeastRepository, source: Path
) -> None:
    seed = int(os.environ.get("TEST_SEED", "1"))
    rng = random.Random(seed)
    producer = Producer(server, rate=250)
    producer.start()
    for _ in range(KILLS):
        with consuming(repo, **QUICK) as consumer:
            # However long a consumer takes to start here: it is killed at its work.
            wait_until(lambda: pending(client), "the consumer has read events")
            time.sleep(rng.uniform(0.0, 0.3))
            while not consumer.halted(lambda: pending(client) > 0):
                time.sleep(0.01)
            consumer.kill()
    producer.stop()
    with consuming(repo, **QUICK) as consumer:
        wait_settled(client)
        report = consumer.stop()
    assert report["reclaimed"] > 0, "the kills missed the work"
    assert (report["lag_entries"], report["pending"], report["waiting_rows"]) == (0, 0, 0)
    again = assert_complete(repo, client, source, producer)
    print(f"seed {seed}: {again} of {len(producer.good)} rows are offline more than once")
    assert client.xinfo_consumers(STREAM, "banquet") == [], "places of the dead are given up"


def test_two_consumers_share_the_work_and_one_takes_over_from_the_other(
    server: Valkey, client: Any, repo: FeastRepository, source: Path
) -> None:
    producer = Producer(server, rate=750, count=1500)
    # The one that will be killed never gets to append.
    with consuming(repo, consumer="a", append_seconds=60.0) as first, consuming(repo, **QUICK) as second:
        wait_until(lambda: len(client.xinfo_consumers(STREAM, "banquet")) == 2, "both have joined")
        producer.start()
        producer.join()
        first.kill()
        wait_settled(client)
        report = second.stop()
    assert 0 < report["reclaimed"] < 1500
    assert_complete(repo, client, source, producer)


def test_a_consumer_goes_on_when_redis_restarts_under_it(
    server: Valkey, client: Any, repo: FeastRepository, source: Path
) -> None:
    producer = Producer(server, rate=600, count=600)
    rest = Producer(server, rate=600, count=300, users=10)
    with consuming(repo, **QUICK) as consumer:
        producer.start()
        producer.join()
        server.kill()
        time.sleep(0.3)
        server.start()
        rest.start()
        rest.join()
        wait_settled(client)
        report = consumer.stop()
    assert report["refused"] > 0
    producer.good += rest.good
    producer.bad += rest.bad
    assert_complete(repo, client, source, producer)


def test_a_stopped_consumer_leaves_nothing_pending_and_its_successor_begins_where_it_ended(
    server: Valkey, client: Any, repo: FeastRepository, source: Path
) -> None:
    """Rows that waited for the offline store are appended before it ends, however long they might wait."""
    client.xadd(STREAM, fields(event(1, 5, NOW)))
    with consuming(repo, append_seconds=600.0) as consumer:
        wait_until(lambda: client.exists(STREAM) and values(repo, [1], "clicks:clicks") == [5], "5 is online")
        assert offline(source).empty
        first = consumer.stop()
    assert offline(source)["clicks"].tolist() == [5]
    assert settled(client)
    client.xadd(STREAM, fields(event(1, 6, NOW + timedelta(seconds=1))))
    with consuming(repo, **QUICK) as consumer:
        wait_settled(client)
        second = consumer.stop()
    assert (first["entries"], second["entries"], second["reclaimed"]) == (1, 1, 0)
    assert values(repo, [1], "clicks:clicks") == [6]


def run_until_settled(repo: FeastRepository, client: Any, **options: Any) -> Any:
    """A consumer in a thread of this process; its final report."""
    consumer = StreamConsumer(repo, StreamOptions(**{**QUICK, **options}))
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(consumer.run()))
    thread.start()
    try:
        wait_until(lambda: settled(client) or not thread.is_alive(), "everything is acknowledged")
    finally:
        consumer.stop()
        thread.join()
    return reports[0]


def test_the_reason_stands_with_the_entry_in_the_dead_letters(client: Any, repo: FeastRepository) -> None:
    bad = fields(event(1, -7, NOW))
    entry_id = client.xadd(STREAM, bad)
    client.xadd(STREAM, fields(event(2, 1, NOW)))
    report = run_until_settled(repo, client)
    (letter,) = letters(client)
    assert letter[b"push_source"] == b"clicks_push"
    assert json.loads(letter[b"event"]) == json.loads(bad["event"])
    assert letter[b"entry_id"] == entry_id
    assert (letter[b"code"], letter[b"field"], letter[b"view"]) == (b"invalid_row", b"clicks", b"clicks")
    assert b"min 0" in letter[b"reason"]
    assert (report.counts.refused, report.counts.written) == (1, 1)
    assert values(repo, [1, 2], "clicks:clicks") == [None, 1]


def test_an_event_of_many_rows_is_taken_or_refused_as_a_whole(
    client: Any, repo: FeastRepository, source: Path
) -> None:
    good = [event(user, user, NOW) for user in range(3)]
    client.xadd(STREAM, {"push_source": "clicks_push", "rows": json.dumps(good)})
    half = [event(10, 1, NOW), event(11, -1, NOW)]
    client.xadd(STREAM, {"push_source": "clicks_push", "rows": json.dumps(half)})
    run_until_settled(repo, client)
    assert values(repo, [0, 1, 2, 10, 11], "clicks:clicks") == [0, 1, 2, None, None]
    assert sorted(offline(source)["user_id"]) == [0, 1, 2]
    (letter,) = letters(client)
    assert (letter[b"row"], letter[b"field"]) == (b"1", b"clicks")


def test_a_second_delivery_changes_neither_the_online_value_nor_the_join(
    client: Any, repo: FeastRepository, source: Path
) -> None:
    """Between equal event times the stream's own order decides, and it is the same each time."""
    with client.pipeline() as pipeline:
        for clicks in range(50):
            pipeline.xadd(STREAM, fields(event(1, clicks, NOW)))
        pipeline.execute()
    run_until_settled(repo, client)
    assert values(repo, [1], "clicks:clicks") == [49]
    client.xgroup_setid(STREAM, "banquet", "0")  # everything once more
    report = run_until_settled(repo, client)
    assert (report.counts.entries, report.counts.older) == (50, 49)
    assert values(repo, [1], "clicks:clicks") == [49]
    rows = offline(source)
    assert (len(rows), len(rows.drop_duplicates())) == (100, 50)
    assert joined(repo, [1]) == {1: 49}


def test_online_alone_takes_events_that_bring_no_columns_of_the_source(
    client: Any, repo: FeastRepository, source: Path
) -> None:
    row = event(1, 3, NOW)
    del row["page"]
    client.xadd(STREAM, fields(row))
    report = run_until_settled(repo, client, to="online")
    assert (report.counts.written, report.counts.appended) == (1, 0)
    assert offline(source).empty
    client.xadd(STREAM, fields(event(2, 4, NOW)))
    report = run_until_settled(repo, client, to="offline")
    assert (report.counts.written, report.counts.appended) == (0, 1)
    assert values(repo, [1, 2], "clicks:clicks") == [3, None]


def test_only_what_every_group_has_acknowledged_is_trimmed(client: Any, repo: FeastRepository) -> None:
    with client.pipeline() as pipeline:
        for number in range(1000):
            pipeline.xadd(STREAM, fields(event(1, number, NOW)))
        pipeline.execute()
    client.xgroup_create(STREAM, "audit", id="0")
    client.xreadgroup("audit", "auditor", {STREAM: ">"}, count=400)  # and acknowledges none
    run_until_settled(repo, client)
    place = StreamGroup(repo.redis, STREAM, "banquet")
    assert place.trim(100) == 0
    taken = client.xpending_range(STREAM, "audit", "-", "+", 400)
    client.xack(STREAM, "audit", *[entry["message_id"] for entry in taken])
    assert 300 <= place.trim(100) <= 400, "the audit has not read the rest yet"
    assert client.xrange(STREAM, taken[-1]["message_id"], taken[-1]["message_id"])
    client.xgroup_destroy(STREAM, "audit")
    place.trim(100)
    assert 100 <= client.xlen(STREAM) < 300, "Redis deletes by nodes of a hundred entries"
    place.close()


def test_an_append_that_fails_is_repeated_until_it_succeeds(
    client: Any, repo: FeastRepository, source: Path
) -> None:
    with consuming(repo, **QUICK) as consumer:
        client.xadd(STREAM, fields(event(1, 1, NOW)))
        wait_until(lambda: settled(client), "the first event is through")
        folder = source / "clicks"
        folder.rename(source / "away")
        client.xadd(STREAM, fields(event(1, 2, NOW + timedelta(seconds=1))))
        wait_until(lambda: values(repo, [1], "clicks:clicks") == [2], "the second event is online")
        time.sleep(0.5)
        assert client.xpending(STREAM, "banquet")["pending"] == 1
        (source / "away").rename(folder)
        wait_settled(client)
        report = consumer.stop()
    assert report["error"] is None
    assert sorted(offline(source)["clicks"]) == [1, 2]


def test_a_single_file_is_appended_to_as_well(server: Valkey, tmp_path: Path) -> None:
    with server.client(db=3) as client:
        repo = streamed(tmp_path, server, db=3, file=True)
        client.xadd(STREAM, fields(event(1, 1, NOW, created=None)))
        client.xadd(STREAM, fields(event(2, 2, NOW, created=NOW.isoformat())))
        run_until_settled(repo, client)
        rows = offline(tmp_path).sort_values("user_id")
        assert rows["clicks"].tolist() == [1, 2]
        assert rows["created"].tolist()[1] == NOW
        assert SEED < rows["created"].tolist()[0] <= datetime.now(tz=UTC)


def test_a_name_in_use_is_refused(client: Any, repo: FeastRepository) -> None:
    from core.errors import AlreadyRunning

    with consuming(repo, consumer="a", **QUICK):
        wait_until(lambda: client.keys("banquet:stream:*:a"), "the first has joined")
        with pytest.raises(AlreadyRunning, match="named 'a'"):
            StreamConsumer(repo, StreamOptions(consumer="a", **QUICK)).run()


def test_the_command_reports_its_lag_as_json_lines_and_ends_with_a_summary(
    client: Any, repo: FeastRepository
) -> None:
    for number in range(20):
        client.xadd(STREAM, fields(event(number, number, NOW)))
    client.xadd(STREAM, {"push_source": "clicks_push", "event": "[]"})
    command = [str(Path(sys.executable).with_name("banquet")), "--json", "--repo", str(repo.path), "stream"]
    process = subprocess.Popen(
        [*command, "--append-seconds", "0.2", "--report-seconds", "0.3", "--to", "online"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(
            lambda: client.exists(STREAM) and client.xinfo_groups(STREAM) and settled(client), "all is read"
        )
        assert process.stdout is not None
        idle = {"lag_entries": 0, "pending": 0, "lag_seconds": 0.0}.items()
        lines = [json.loads(process.stdout.readline())]
        while not idle <= lines[-1].items():
            lines.append(json.loads(process.stdout.readline()))
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    *more, summary = [json.loads(line) for line in out.splitlines()]
    assert all(line["event"] == "report" for line in [*lines, *more])
    assert summary["event"] == "summary"
    assert (summary["entries"], summary["written"], summary["refused"]) == (21, 20, 1)
    assert client.xlen(DEAD) == 1


def test_a_cluster_and_a_sentinel_are_read_too(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", masters=3) as cluster:
        servers = ",".join(f"{host}:{port}" for host, port in cluster.address().hosts)
        _through(
            tmp_path / "c", f'redis_type: redis_cluster, connection_string: "{servers}"', cluster.nodes[0]
        )
    with SentinelTrio(tmp_path / "sentinel") as trio:
        servers = ",".join(f"{host}:{port}" for host, port in trio.address().hosts)
        _through(
            tmp_path / "s",
            f'redis_type: redis_sentinel, sentinel_master: {trio.name}, connection_string: "{servers}"',
            trio.master,
        )


def _through(path: Path, online_store: str, server: Valkey) -> None:
    streamed(path, server)
    settings = path / "repo" / "feature_store.yaml"
    lines = settings.read_text().splitlines()
    lines = [f"online_store: {{type: redis, {online_store}}}" if "online_store" in x else x for x in lines]
    settings.write_text("\n".join(lines) + "\n")
    repo = FeastRepository.open(path / "repo")
    with repo.redis.session() as client:
        for user in range(20):
            client.xadd(STREAM, fields(event(user, user, NOW)))
        client.xadd(STREAM, fields(event(1, -1, NOW)))
        report = run_until_settled(repo, client, max_length=5)
        assert (report.counts.written, report.counts.appended, report.counts.refused) == (20, 20, 1)
        assert len(letters(client)) == 1
