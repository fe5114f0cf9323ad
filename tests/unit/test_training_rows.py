"""Rows to learn from: the split by time and its embargo, labels, raw values."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidModelSpec
from core.manifest import Default, ServedFeature, ServiceSchema
from core.repository import FeastRepository
from core.types import Dtype
from training import rows
from training.spec import ModelSpec

DAY = timedelta(days=1)
FIRST = datetime(2026, 1, 1, tzinfo=UTC)


def spec(**changes: Any) -> ModelSpec:
    described: dict[str, Any] = {
        "name": "churn",
        "service": "churn_v1",
        "entities": "labels.parquet",
        "label": "left",
        "build": lambda columns: None,
        "holdout": 3 * DAY,
    }
    return ModelSpec(**{**described, **changes})


def split(days: list[float], model: ModelSpec, rejected: list[bool] | None = None) -> Any:
    moments = pd.Series(pd.to_datetime([FIRST + day * DAY for day in sorted(days)]))
    return rows.split_by_time(moments, np.array(rejected or [False] * len(days)), model)


TEN_DAYS = [float(day) for day in range(11)]


def test_the_last_part_of_the_time_range_is_held_out() -> None:
    parts, window = split(TEN_DAYS, spec())
    assert parts["training"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert parts["calibration"].tolist() == []
    assert parts["holdout"].tolist() == [8, 9, 10]
    assert (window.start, window.split, window.end) == (FIRST, FIRST + 7 * DAY, FIRST + 10 * DAY)
    assert (window.training_rows, window.calibration_rows, window.holdout_rows) == (8, 0, 3)
    assert (window.embargoed_rows, window.rejected_rows) == (0, 0)


def test_rows_whose_labels_were_not_known_before_the_next_part_are_left_out() -> None:
    parts, window = split(TEN_DAYS, spec(label_horizon=2 * DAY, calibration=3 * DAY))
    # Training ends on day 4, calibration on day 7; their last labels are known by then.
    assert parts["training"].tolist() == [0, 1, 2]
    assert parts["calibration"].tolist() == [5]
    assert parts["holdout"].tolist() == [8, 9, 10]
    assert window.embargoed_rows == 4


def test_rejected_rows_are_in_no_part() -> None:
    rejected = [day in (0, 9) for day in range(11)]
    parts, window = split(TEN_DAYS, spec(), rejected)
    assert parts["training"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert parts["holdout"].tolist() == [8, 10]
    assert (window.rejected_rows, window.embargoed_rows) == (2, 0)


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 30), min_size=30, max_size=60),
    st.floats(0, 3),
    st.sampled_from([None, 4 * DAY]),
    st.data(),
)
def test_no_part_knows_what_a_later_one_is_asked(
    days: list[float], horizon: float, calibration: timedelta | None, data: st.DataObject
) -> None:
    model = spec(holdout=6 * DAY, label_horizon=horizon * DAY, calibration=calibration)
    days = sorted([*days, 0.0, 15.0, 30.0, 21.0])
    rejected = data.draw(
        st.lists(st.sampled_from([False] * 9 + [True]), min_size=len(days), max_size=len(days))
    )
    try:
        parts, window = split(days, model, rejected)
    except InvalidModelSpec:
        return
    used = [parts[name] for name in ("training", "calibration", "holdout") if len(parts[name])]
    for earlier, later in pairwise(used):
        known = FIRST + days[earlier[-1]] * DAY + model.label_horizon
        assert known <= FIRST + days[later[0]] * DAY + timedelta(microseconds=1)
    together = np.concatenate(used)
    assert len(set(together.tolist())) == len(together)
    assert len(together) + window.embargoed_rows + window.rejected_rows == len(days)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"holdout": 11 * DAY}, "training"),
        ({"label_horizon": 8 * DAY}, "training"),
        ({"calibration": DAY / 2, "label_horizon": DAY}, "calibration"),
    ],
)
def test_an_empty_part_is_refused_with_the_time_range(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidModelSpec, match=f"The {part} part .* is empty: its rows go from 2026-01-01"):
        split(TEN_DAYS, spec(**changes))


# Labels


ALL = np.arange(4)


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        (pd.Series([1, 0, 1, 0]), (0, 1)),
        (pd.Series([1, 0, 1, 0], dtype="Int64"), (0, 1)),
        (pd.Series([True, False, True, False]), (False, True)),
        (pd.Series([True, False, True, False], dtype="boolean"), (False, True)),
        (pd.Series(["b", "a", "c", "a"]), ("a", "b", "c")),
        (pd.Series(["b", "a", "c", "a"], dtype="category"), ("a", "b", "c")),
        (pd.Series([2.0, 1.0, 2.0, 1.0]), (1.0, 2.0)),
    ],
)
def test_classes_are_plain_values_in_order(column: pd.Series[Any], classes: tuple[Any, ...]) -> None:
    labels, found = rows.labels_and_classes(column, spec(), ALL)
    assert found == classes
    assert [type(a) for a in found] == [type(b) for b in classes]
    assert labels.dtype != object
    assert labels.tolist() == column.tolist()


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pd.Series([1, "a", 1, "a"], dtype=object), "of type int, str"),
        (pd.Series([date(2026, 1, 1)] * 4), "of type date"),
        (pd.Series([1, 1, 1, 1]), "has 1 of 1 classes"),
    ],
)
def test_labels_that_make_no_classes_are_refused(column: pd.Series[Any], says: str) -> None:
    with pytest.raises(InvalidModelSpec, match=says):
        rows.labels_and_classes(column, spec(), ALL)


def test_every_class_occurs_in_the_training_part() -> None:
    with pytest.raises(InvalidModelSpec, match="has 1 of 2 classes"):
        rows.labels_and_classes(pd.Series([0, 0, 1, 1]), spec(), np.array([0, 1]))


def test_a_threshold_needs_two_classes() -> None:
    with pytest.raises(InvalidModelSpec, match="a threshold but 3 classes"):
        rows.labels_and_classes(pd.Series([0, 1, 2, 0]), spec(threshold=0.4), ALL)


def test_a_regressors_labels_are_numbers() -> None:
    labels, classes = rows.labels_and_classes(pd.Series([1, 2, 3, 4]), spec(task="regression"), ALL)
    assert (labels.dtype, classes) == (np.float64, ())
    with pytest.raises(InvalidModelSpec, match="must be numeric"):
        rows.labels_and_classes(pd.Series(["a"]), spec(task="regression"), ALL)


# Values


def listed(values: Any) -> list[Any]:
    return [None if value != value else value for value in list(values)]


@pytest.mark.parametrize(
    ("column", "dtype", "expected"),
    [
        (pd.Series([1, None], dtype="Int64"), Dtype.INT64, [1.0, None]),
        (pd.Series([1.5, None]), Dtype.DOUBLE, [1.5, None]),
        (pd.Series([True, None], dtype="boolean"), Dtype.BOOL, [1.0, None]),
        (pd.Series([True, None], dtype=object), Dtype.BOOL, [True, None]),
        (pd.Series(["a", None]), Dtype.STRING, ["a", None]),
        (pd.Series(["a", pd.NA], dtype="string"), Dtype.STRING, ["a", None]),
        (pd.Series([60, None]), Dtype.UNIX_TIMESTAMP, [60.0, None]),
    ],
)
def test_missing_values_are_none_or_nan_whatever_pandas_calls_them(
    column: pd.Series[Any], dtype: Dtype, expected: list[Any]
) -> None:
    assert listed(rows.raw_values(column, dtype)) == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_moments_are_whole_epoch_seconds_in_any_unit_and_zone(unit: Any, zone: str | None) -> None:
    milliseconds = [61_000 if unit == "s" else 61_900, -2_000 if unit == "s" else -1_100, None]
    moments = pd.Series(pd.to_datetime(milliseconds, unit="ms", utc=True).as_unit(unit))
    moments = moments.dt.tz_localize(None) if zone is None else moments.dt.tz_convert(zone)
    assert listed(rows.raw_values(moments, Dtype.UNIX_TIMESTAMP)) == [61.0, -2.0, None]


def test_a_vocabulary_is_what_the_training_part_has_seen() -> None:
    values = ["b", None, "a", "only later"]
    assert rows.vocabulary_of("v__f", values, np.array([0, 1, 2])) == ("a", "b")


def test_a_name_per_row_is_no_category() -> None:
    values = [f"row {i}" for i in range(rows.MAX_CATEGORIES + 1)]
    with pytest.raises(InvalidModelSpec, match="v__f has 10,001 distinct values"):
        rows.vocabulary_of("v__f", values, np.arange(len(values)))


def test_rejected_rows_miss_something_the_model_insists_on() -> None:
    values = {"a": np.array([1.0, np.nan, 1.0, 1.0]), "b": ["x", "x", None, "unseen"], "c": [None] * 4}
    model = spec(policy={"a": "reject", "b": "reject", "c": "pass"})
    assert rows.rejected_rows(values, model).tolist() == [False, True, True, False]


SCHEMA = ServiceSchema(
    "s", (ServedFeature("v__n", Dtype.DOUBLE, 0.0), ServedFeature("v__t", Dtype.STRING, 0.0)), ()
)


@pytest.mark.parametrize(
    ("feature", "default", "fits"),
    [
        ("v__n", 0, True),
        ("v__n", True, True),
        ("v__n", "0", False),
        ("v__t", "a", True),
        ("v__t", "never seen", False),
        ("v__t", 0, False),
    ],
)
def test_a_default_is_a_value_the_feature_could_have(feature: str, default: Any, fits: bool) -> None:
    model = spec(policy={feature: Default(default)})
    if fits:
        rows.check_defaults(model, SCHEMA, {"v__t": ("a",)})
    else:
        with pytest.raises(InvalidModelSpec, match=f"of feature {feature} is not"):
            rows.check_defaults(model, SCHEMA, {"v__t": ("a",)})


def test_a_policy_for_no_feature_and_a_feature_for_no_column_are_refused() -> None:
    with pytest.raises(InvalidModelSpec, match="unknown features: v__other"):
        rows.check_features(SCHEMA, spec(policy={"v__other": "reject"}))
    listy = ServiceSchema("s", (ServedFeature("v__l", Dtype.STRING_LIST, 0.0),), ())
    with pytest.raises(InvalidModelSpec, match="v__l is STRING_LIST"):
        rows.check_features(listy, spec())


# Entity rows


@pytest.fixture
def repository(tmp_path: Path) -> FeastRepository:
    (tmp_path / "feature_store.yaml").write_text("project: p\nregistry: r.db\n")
    return FeastRepository.open(tmp_path)


def frame() -> pd.DataFrame:
    moments = pd.to_datetime([FIRST + DAY, FIRST, FIRST + DAY])
    return pd.DataFrame({"user_id": [1, 2, 3], "event_timestamp": moments, "left": [0, 1, 1]})


def test_entity_rows_come_from_a_function_parquet_or_csv_in_the_order_of_time(
    repository: FeastRepository,
) -> None:
    frame().to_parquet(repository.path / "labels.parquet")
    frame().to_csv(repository.path / "labels.csv", index=False)
    for entities in (lambda path: frame(), "labels.parquet", "labels.csv"):
        found = rows.entity_rows(repository, spec(entities=entities))
        assert found["user_id"].tolist() == [2, 1, 3]
        assert str(found["event_timestamp"].dt.tz) == "UTC"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns="left"), "no column 'left'"),
        (lambda f: f.drop(columns="event_timestamp"), "no column 'event_timestamp'"),
        (lambda f: f.assign(event_timestamp=f["event_timestamp"].dt.tz_localize(None)), "no time zone"),
        (lambda f: f.assign(event_timestamp="2026-01-01"), "no time zone"),
        (lambda f: f.assign(left=[0, None, 1]), "miss labels"),
        (lambda f: f.iloc[:0], "are empty"),
        (lambda f: {"not": "a frame"}, "are a dict"),
    ],
)
def test_entity_rows_that_cannot_be_used_are_refused(
    repository: FeastRepository, change: Any, says: str
) -> None:
    with pytest.raises(InvalidModelSpec, match=says):
        rows.entity_rows(repository, spec(entities=lambda path: change(frame())))


def test_a_missing_file_of_entity_rows_is_named(repository: FeastRepository) -> None:
    with pytest.raises(InvalidModelSpec, match=r"labels\.parquet"):
        rows.entity_rows(repository, spec())
