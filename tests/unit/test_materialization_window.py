"""Which row of a source is loaded for each key, against a plain sort in pandas."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from core.errors import InvalidSource
from core.types import Dtype, Field
from materialization.window import CREATED_NS, EVENT, ViewSource, Window, partitions_for
from tests.support.staging import make_source, make_view

START = datetime(2026, 3, 1, tzinfo=UTC)
VIEW = make_view({"value": Dtype.DOUBLE})


def us(time: str) -> int:
    return int(pd.Timestamp(time, tz="UTC").value // 1000)


def loaded(source: ViewSource, window: Window, partitions: int = 1) -> pd.DataFrame:
    batches = list(source.stage(window, partitions).batches(7))
    return pa.Table.from_batches(batches).to_pandas() if batches else pd.DataFrame({"value": []})


def frame(*rows: tuple[int | None, str, float | None], **more: list[object]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": pd.array([row[0] for row in rows], dtype="Int64"),
            "event_timestamp": pd.to_datetime([row[1] for row in rows], utc=True, format="ISO8601"),
            "value": [row[2] for row in rows],
            **more,
        }
    )


@pytest.mark.parametrize("partitions", [1, 3])
def test_the_newest_row_of_each_key_is_loaded(partitions: int) -> None:
    """By event time, then created time, then place; 2,000 random rows with many ties."""
    rng = np.random.default_rng(5)
    n = 2000
    events = pd.DataFrame(
        {
            "user_id": rng.integers(0, 150, n),
            "event_timestamp": START + pd.to_timedelta(rng.integers(0, 40, n), unit="h"),
            "created": START + pd.to_timedelta(rng.integers(0, 3, n), unit="h"),
            "value": rng.random(n),
            "position": np.arange(n),
        }
    )
    window = Window(us("2026-03-01T05:00"), us("2026-03-02T01:00"))
    inside = events[events.event_timestamp.between("2026-03-01T05:00Z", "2026-03-02T01:00Z")]
    order = ["event_timestamp", "created", "position"]
    expected = inside.sort_values(order).groupby("user_id").tail(1).sort_values("user_id")
    found = loaded(make_source(VIEW, events, created="created"), window, partitions)
    found = found.sort_values("user_id")
    assert found["value"].tolist() == expected["value"].tolist()
    assert found["user_id"].tolist() == expected["user_id"].tolist()


def test_the_order_of_the_rows_depends_on_the_source_alone() -> None:
    rng = np.random.default_rng(6)
    events = pd.DataFrame(
        {
            "user_id": rng.permutation(500),
            "event_timestamp": [pd.Timestamp(START)] * 500,
            "value": rng.random(500),
        }
    )
    window = Window(None, us("2026-04-01"))
    first, again = (loaded(make_source(VIEW, events), window, 4) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    source = make_source(VIEW, events)
    rest = pa.Table.from_batches(list(source.stage(window, 4).batches(100, skip=321))).to_pandas()
    assert rest["user_id"].tolist() == first["user_id"].tolist()[321:]


def test_both_ends_of_the_window_belong_to_it() -> None:
    events = frame(
        (1, "2026-03-01T00:00:00", 1.0),
        (2, "2026-03-02T00:00:00", 2.0),
        (3, "2026-02-28T23:59:59.999999", 3.0),
        (4, "2026-03-02T00:00:00.000001", 4.0),
    )
    found = loaded(make_source(VIEW, events), Window(us("2026-03-01"), us("2026-03-02")))
    assert found["user_id"].tolist() == [1, 2]


def test_new_rows_are_those_after_the_watermark_and_those_that_arrived_since() -> None:
    events = frame(
        (1, "2026-03-01", 1.0),
        (2, "2026-03-05", 2.0),
        (3, "2026-03-01", 3.0),
        (4, "2026-01-01", 4.0),
        created=list(pd.to_datetime(["2026-03-01", "2026-03-05", "2026-03-06", "2026-03-06"], utc=True)),
    )
    source = make_source(VIEW, events, created="created")
    window = Window(us("2026-02-01"), us("2026-03-09"), us("2026-03-04"), us("2026-03-05T12:00") * 1000)
    assert loaded(source, window)["user_id"].tolist() == [2, 3]
    only_new = Window(us("2026-02-01"), us("2026-03-09"), us("2026-03-04"))
    assert loaded(source, only_new)["user_id"].tolist() == [2]


def test_the_newest_null_is_kept() -> None:
    events = frame((1, "2026-03-01", 1.0), (1, "2026-03-02", None))
    assert loaded(make_source(VIEW, events), Window(None, us("2026-04-01")))["value"].isna().tolist() == [
        True
    ]


def test_rows_without_a_key_are_left_out_and_counted() -> None:
    events = frame((1, "2026-03-01", 1.0), (None, "2026-03-01", 2.0), (None, "2027-03-01", 2.0))
    source = make_source(VIEW, events)
    window = Window(None, us("2026-04-01"))
    assert source.measure(window) == (2, 1)
    assert loaded(source, window)["user_id"].tolist() == [1]


def test_composite_keys_are_told_apart_and_a_view_without_keys_has_one_row() -> None:
    events = frame(
        (1, "2026-03-01", 1.0), (1, "2026-03-02", 2.0), (2, "2026-03-01", 3.0), region=["a", "b", "a"]
    )
    keys = (Field("user_id", Dtype.INT64), Field("region", Dtype.STRING))
    window = Window(None, us("2026-04-01"))
    both = make_view({"value": Dtype.DOUBLE}, keys=keys)
    assert sorted(loaded(make_source(both, events), window)["value"]) == [1.0, 2.0, 3.0]
    none = make_view({"value": Dtype.DOUBLE}, keys=())
    assert loaded(make_source(none, events), window)["value"].tolist() == [2.0]


def test_the_source_may_name_its_columns_otherwise() -> None:
    events = frame((1, "2026-03-01", 1.0)).rename(columns={"value": "v", "user_id": "uid"})
    source = make_source(VIEW, events, field_mapping={"v": "value", "uid": "user_id"})
    assert loaded(source, Window(None, us("2026-04-01")))["value"].tolist() == [1.0]
    with pytest.raises(InvalidSource, match="'value'"):
        make_source(VIEW, events, field_mapping={"uid": "user_id"})


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pd.to_datetime(["2026-03-01T10:00:00.123456789"]), "2026-03-01T10:00:00.123456789"),
        (pd.to_datetime(["2026-03-01T10:00:00+02:00"]), "2026-03-01T08:00:00"),
        (pd.to_datetime(["2026-03-01T10:00:00"]).astype("datetime64[s]"), "2026-03-01T10:00:00"),
        (["2026-03-01T10:00:00+01:00"], "2026-03-01T09:00:00"),
        ([datetime(2026, 3, 1, tzinfo=UTC).date()], "2026-03-01T00:00:00"),
    ],
    ids=["nanoseconds", "zoned", "seconds", "text", "date"],
)
def test_event_timestamps_of_every_kind_are_utc(column: object, expected: str) -> None:
    events = pd.DataFrame({"user_id": [1], "event_timestamp": column, "value": [1.0]})
    source = make_source(VIEW, events)
    staged = source.stage(Window(us("2026-02-28"), us("2026-03-02")), 1)
    assert staged.newest_event_us == pd.Timestamp(expected).value // 1000
    (batch,) = staged.batches(10)
    assert pa.types.is_timestamp(batch.schema.field(EVENT).type)


def test_an_empty_window_stages_nothing() -> None:
    source = make_source(VIEW, frame((1, "2026-03-01", 1.0)))
    staged = source.stage(Window(None, us("2020-01-01")), 1)
    assert (staged.rows, staged.newest_event_us, staged.newest_created_ns) == (0, None, None)
    assert list(staged.batches(10)) == []


def test_created_timestamps_come_as_nanoseconds_or_null() -> None:
    created = list(pd.to_datetime(["2026-03-01T00:00:00.000001", None], utc=True))
    events = frame((1, "2026-03-01", 1.0), (2, "2026-03-01", 2.0), created=created)
    staged = make_source(VIEW, events, created="created").stage(Window(None, us("2026-04-01")), 1)
    (batch,) = staged.batches(10)
    assert batch.column(CREATED_NS).to_pylist() == [us("2026-03-01") * 1000 + 1000, None]
    assert staged.newest_created_ns == us("2026-03-01") * 1000 + 1000


def test_a_load_is_cut_into_passes_by_its_size() -> None:
    assert [partitions_for(rows) for rows in (0, 1, 1_250_000, 1_250_001, 12_000_000)] == [1, 1, 1, 2, 10]
