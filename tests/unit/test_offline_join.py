"""The point-in-time join against an oracle that knows nothing of it: a loop over plain Python values."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise, product
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import EntityFrameError, InvalidSource
from core.point_in_time import Joined, ViewJoin, point_in_time_join
from core.source import connect, scan_parquet
from core.types import FeatureStatus

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
START = 1_700_000_000 * SECOND

PRESENT, NOT_FOUND = FeatureStatus.PRESENT, FeatureStatus.NOT_FOUND
OUTSIDE_MAX_AGE = FeatureStatus.OUTSIDE_MAX_AGE


@pytest.fixture(scope="module")
def con() -> duckdb.DuckDBPyConnection:
    return connect(memory_limit="500MB", threads=2)


@dataclass(frozen=True)
class Event:
    """One source row; times in nanoseconds since the epoch."""

    key: tuple[object, ...]
    time: int | None
    created: int | None
    value: object


def expected(
    rows: Sequence[tuple[tuple[object, ...], int | None]],
    events: Sequence[Event],
    ttl: int,
    known_by_then: bool = False,
) -> list[tuple[object, FeatureStatus]]:
    """The contract, read aloud: the newest event at or before the row's time, if it is not past its ttl."""
    answers: list[tuple[object, FeatureStatus]] = []
    for key, time in rows:
        candidates = [
            ((event.time, event.created if event.created is not None else -(1 << 70), place), event)
            for place, event in enumerate(events)
            if time is not None
            and event.time is not None
            and None not in key
            and event.key == key
            and event.time <= time
            and (not known_by_then or (event.created is not None and event.created <= time))
        ]
        if not candidates:
            answers.append((None, NOT_FOUND))
            continue
        newest = max(candidates, key=lambda candidate: candidate[0])[1]
        assert newest.time is not None
        assert time is not None
        if ttl and newest.time < time - ttl:
            answers.append((None, OUTSIDE_MAX_AGE))
        else:
            answers.append((newest.value, PRESENT))
    return answers


def times(values: Sequence[int | None], kind: pa.DataType) -> pa.Array:
    """Nanoseconds since the epoch as an Arrow column of ``kind``, which must hold them exactly."""
    if pa.types.is_date(kind):
        return pa.array([None if v is None else v // DAY for v in values], pa.int32()).cast(pa.date32())
    if pa.types.is_string(kind):
        stamps = [None if v is None else np.datetime64(v, "ns").astype("datetime64[us]") for v in values]
        return pa.array([None if s is None else f"{s}+00:00" for s in stamps])
    unit = {"s": SECOND, "ms": 1_000_000, "us": 1_000, "ns": 1}[kind.unit]
    assert all(v is None or v % unit == 0 for v in values)
    return pa.array([None if v is None else v // unit for v in values], pa.int64()).cast(kind)


def write(path: Path, events: Sequence[Event], kind: pa.DataType, *, files: int = 1) -> None:
    """The events as a folder of Parquet files, in order."""
    path.mkdir()
    bounds = np.linspace(0, len(events), files + 1).astype(int)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        part = events[start:stop]
        width = len(events[0].key) if events else 1
        keys = {f"key{i}": pa.array([event.key[i] for event in part], pa.int64()) for i in range(width)}
        table = pa.table(
            {
                **keys,
                "at": times([event.time for event in part], kind),
                "created": times([event.created for event in part], kind),
                "value": pa.array([event.value for event in part], pa.int64()),
            }
        )
        pq.write_table(table, path / f"{number}.parquet", row_group_size=4)


def join(
    con: duckdb.DuckDBPyConnection,
    entities: pa.Table,
    path: Path,
    *,
    keys: Mapping[str, str] | None = None,
    ttl: timedelta = timedelta(0),
    known_by_then: bool = False,
    expired: bool = False,
    created: str | None = "created",
    placed: bool = True,
    in_memory: int | None = None,
) -> Joined:
    scan = scan_parquet(con, str(path))
    view = ViewJoin(
        name="view",
        scan=scan if placed else replace(scan, position=()),
        keys=keys if keys is not None else {"key0": "key0"},
        features={"view__value": "value"},
        timestamp="at",
        created=created,
        ttl=ttl,
    )
    return point_in_time_join(
        con, entities, "at", [view], known_by_then=known_by_then, expired=expired, in_memory=in_memory
    )


def entity_rows(
    rows: Sequence[tuple[tuple[object, ...], int | None]], kind: pa.DataType, width: int = 1
) -> pa.Table:
    keys = {f"key{i}": pa.array([key[i] for key, _ in rows], pa.int64()) for i in range(width)}
    return pa.table({**keys, "at": times([time for _, time in rows], kind)})


UNITS = {
    "ns": (pa.timestamp("ns"), 1),
    "ns UTC": (pa.timestamp("ns", "UTC"), 1),
    "us": (pa.timestamp("us"), 1_000),
    "us UTC": (pa.timestamp("us", "UTC"), 1_000),
    "us zoned": (pa.timestamp("us", "America/New_York"), 1_000),
    "ms": (pa.timestamp("ms"), 1_000_000),
    "s": (pa.timestamp("s", "UTC"), SECOND),
    "date": (pa.date32(), DAY),
    "text": (pa.string(), 1_000),
}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    """A few keys and times, close together, so that ties, boundaries and duplicates are common."""
    width = draw(st.integers(1, 2))
    source_kind, source_step = UNITS[draw(st.sampled_from(sorted(UNITS)))]
    entity_kind, entity_step = UNITS[draw(st.sampled_from(sorted(UNITS)))]
    tick = draw(st.sampled_from([1, 1_000, SECOND, DAY]))
    key = st.tuples(*[st.one_of(st.none(), st.integers(0, 2)) for _ in range(width)])
    # Around both ends of 1970, where rounding towards zero would show, and where nanoseconds are too many to
    # share 64 bits with a key's number.
    origin = draw(st.sampled_from([START, 0, -3 * DAY, -80 * 365 * DAY]))

    def moment(step: int) -> st.SearchStrategy[int | None]:
        return st.one_of(st.none(), st.integers(-6, 6).map(lambda n: (origin + n * tick) // step * step))

    event = st.builds(
        Event, key, moment(source_step), moment(source_step), st.one_of(st.none(), st.integers(0, 9))
    )
    return {
        "events": draw(st.lists(event, min_size=1, max_size=16)),
        "rows": draw(st.lists(st.tuples(key, moment(entity_step)), max_size=12)),
        "ttl": draw(st.integers(0, 5)) * max(tick, 1_000),
        "known_by_then": draw(st.booleans()),
        "placed": draw(st.booleans()),
        "in_memory": draw(st.sampled_from([None, 20, 0])),
        "files": draw(st.integers(1, 3)),
        "source_kind": source_kind,
        "entity_kind": entity_kind,
        "width": width,
    }


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_join_equals_the_oracle_on_any_frame(case, con, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("source") / "events"
    write(path, case["events"], case["source_kind"], files=case["files"])
    entities = entity_rows(case["rows"], case["entity_kind"], case["width"])
    ttl = timedelta(microseconds=case["ttl"] // 1_000)
    keys = {f"key{i}": f"key{i}" for i in range(case["width"])}
    wanted = expected(case["rows"], case["events"], case["ttl"], case["known_by_then"])

    for expired in (False, True):
        joined = join(
            con,
            entities,
            path,
            keys=keys,
            ttl=ttl,
            known_by_then=case["known_by_then"],
            expired=expired,
            placed=case["placed"],
            in_memory=case["in_memory"],
        )
        assert joined.features["view__value"].to_pylist() == [value for value, _ in wanted]
        statuses = [FeatureStatus(status) for status in joined.statuses["view"]]
        assert statuses == [
            NOT_FOUND if status is OUTSIDE_MAX_AGE and not expired else status for _, status in wanted
        ]


@pytest.mark.parametrize("kind", sorted(UNITS))
def test_ttl_includes_its_boundary_and_nothing_beyond(con, tmp_path: Path, kind: str) -> None:
    arrow_kind, step = UNITS[kind]
    at = START // DAY * DAY
    write(tmp_path / "events", [Event((1,), at, at, 7)], arrow_kind)
    ttl = timedelta(days=2)
    rows = [((1,), at + 2 * DAY), ((1,), at + 2 * DAY + step), ((1,), at), ((1,), at - step)]
    joined = join(con, entity_rows(rows, arrow_kind), tmp_path / "events", ttl=ttl, expired=True)
    assert joined.features["view__value"].to_pylist() == [7, None, 7, None]
    assert list(joined.statuses["view"]) == [PRESENT, OUTSIDE_MAX_AGE, PRESENT, NOT_FOUND]


def test_one_nanosecond_past_the_ttl_of_a_microsecond_source_is_past_it(con, tmp_path: Path) -> None:
    write(tmp_path / "events", [Event((1,), START, START, 7)], pa.timestamp("us"))
    rows = [((1,), START + SECOND), ((1,), START + SECOND + 1), ((1,), START - 1)]
    entities = entity_rows(rows, pa.timestamp("ns", "UTC"))
    joined = join(con, entities, tmp_path / "events", ttl=timedelta(seconds=1))
    assert joined.features["view__value"].to_pylist() == [7, None, None]


def test_nanoseconds_order_events_within_one_microsecond(con, tmp_path: Path) -> None:
    events = [Event((1,), START + n, None, n) for n in (3, 1, 2)]
    write(tmp_path / "events", events, pa.timestamp("ns"))
    rows = [((1,), START + n) for n in range(5)]
    joined = join(con, entity_rows(rows, pa.timestamp("ns")), tmp_path / "events")
    assert joined.features["view__value"].to_pylist() == [None, 1, 2, 3, 3]


def test_the_newest_row_wins_even_if_it_is_null(con, tmp_path: Path) -> None:
    events = [Event((1,), START, None, 7), Event((1,), START + SECOND, None, None)]
    write(tmp_path / "events", events, pa.timestamp("us"))
    joined = join(con, entity_rows([((1,), START + SECOND)], pa.timestamp("us")), tmp_path / "events")
    assert joined.features["view__value"].to_pylist() == [None]
    assert list(joined.statuses["view"]) == [PRESENT]


@pytest.mark.parametrize("in_memory", [None, 0])
def test_a_tie_goes_to_the_newest_created_then_to_the_last_row(
    con, tmp_path: Path, in_memory: int | None
) -> None:
    events = [
        Event((1,), START, START + 2 * SECOND, 1),
        Event((1,), START, START + 3 * SECOND, 2),
        Event((1,), START, START + 3 * SECOND, 3),
        Event((1,), START, START + SECOND, 4),
        Event((1,), START, None, 5),
    ]
    write(tmp_path / "events", events, pa.timestamp("us"), files=2)
    entities = entity_rows([((1,), START), ((1,), START + DAY)], pa.timestamp("us"))
    joined = join(con, entities, tmp_path / "events", in_memory=in_memory)
    assert joined.features["view__value"].to_pylist() == [3, 3]
    without = join(con, entities, tmp_path / "events", created=None, in_memory=in_memory)
    assert without.features["view__value"].to_pylist() == [5, 5]


@pytest.mark.parametrize("in_memory", [None, 0])
def test_a_hundred_thousand_rows_tied_with_a_hundred_thousand_entity_rows_stay_linear(
    con, tmp_path: Path, in_memory: int | None
) -> None:
    count = 100_000
    at = pa.array(np.full(count, START // 1_000)).cast(pa.timestamp("us"))
    table = pa.table({"key0": np.zeros(count, np.int64), "at": at, "created": at, "value": np.arange(count)})
    pq.write_table(table, tmp_path / "events.parquet")
    entities = table.select(["key0", "at"])
    joined = join(con, entities, tmp_path / "events.parquet", in_memory=in_memory)
    assert joined.features["view__value"].to_pylist() == [count - 1] * count


def test_no_entity_rows_give_no_rows_with_the_sources_types(con, tmp_path: Path) -> None:
    write(tmp_path / "events", [Event((1,), START, None, 7)], pa.timestamp("us"))
    joined = join(con, entity_rows([], pa.timestamp("us")), tmp_path / "events")
    assert joined.features.num_rows == 0
    assert joined.features.schema.field("view__value").type == pa.int64()


def test_an_empty_source_gives_nulls(con, tmp_path: Path) -> None:
    write(tmp_path / "events", [], pa.timestamp("us"))
    joined = join(con, entity_rows([((1,), START)], pa.timestamp("us")), tmp_path / "events")
    assert joined.features["view__value"].to_pylist() == [None]


def test_a_view_without_keys_joins_on_time_alone(con, tmp_path: Path) -> None:
    write(
        tmp_path / "events",
        [Event((1,), START, None, 7), Event((2,), START + DAY, None, 8)],
        pa.timestamp("us"),
    )
    rows = [((None,), START - 1_000), ((5,), START), ((6,), START + 2 * DAY)]
    joined = join(con, entity_rows(rows, pa.timestamp("us")), tmp_path / "events", keys={})
    assert joined.features["view__value"].to_pylist() == [None, 7, 8]


@pytest.mark.parametrize(
    ("entity_keys", "source_keys", "matches"),
    [
        (pa.array([1, 2], pa.int32()), pa.array([1, 3], pa.int64()), [True, False]),
        (pa.array([1, 2], pa.uint64()), pa.array([1, 3], pa.int8()), [True, False]),
        (pa.array([1.0, 1.5]), pa.array([1, 2], pa.int64()), [True, False]),
        (pa.array([2**53 + 1, 2**53]), pa.array([2.0**53, 1.0]), [False, True]),
        (pa.array([1, 2], pa.int64()), pa.array([Decimal("1.00"), Decimal("2.50")]), [True, False]),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", "c"]), [True, False]),
        (pa.array(["a", "b"], pa.large_string()), pa.array(["a", "c"]), [True, False]),
        (pa.array([b"a", b"b"]), pa.array([b"a", b"c"]), [True, False]),
        (pa.array([True, False]), pa.array([True, True]), [True, False]),
        (pa.nulls(2), pa.array(["a", "c"]), [False, False]),
        (pa.array(["a", "c"]), pa.nulls(2), [False, False]),
        (pa.nulls(2), pa.nulls(2), [False, False]),
        (pa.array([date(2024, 1, 1)] * 2), pa.array([datetime(2024, 1, 1), None]), [True, True]),  # noqa: DTZ001
        (
            pa.array([SECOND, SECOND + 1]).cast(pa.timestamp("ns", "UTC")),
            pa.array([1_000_000, 0]).cast(pa.timestamp("us")),
            [True, False],
        ),
    ],
    ids=str,
)
def test_keys_compare_by_value_whatever_their_width(
    con, tmp_path: Path, entity_keys: pa.Array, source_keys: pa.Array, matches: list[bool]
) -> None:
    at = pa.array([START // 1_000] * 2).cast(pa.timestamp("us"))
    source = pa.table({"key0": source_keys, "at": at, "value": [7, 7]})
    pq.write_table(source, tmp_path / "events.parquet")
    entities = pa.table({"key0": entity_keys, "at": at})
    joined = join(con, entities, tmp_path / "events.parquet", created=None)
    assert joined.features["view__value"].to_pylist() == [7 if match else None for match in matches]


def test_a_uuid_key_is_found_by_its_text(con, tmp_path: Path) -> None:
    key = uuid.UUID(int=7)
    at = pa.array([START // 1_000]).cast(pa.timestamp("us"))
    con.register("uuids", pa.table({"text": [str(key)], "at": at}))
    con.execute(
        f"COPY (SELECT text::UUID AS key0, \"at\", 7 AS value FROM uuids) TO '{tmp_path / 'events.parquet'}'"
    )
    entities = pa.table({"key0": [str(key).upper()], "at": at})
    joined = join(con, entities, tmp_path / "events.parquet", created=None)
    assert joined.features["view__value"].to_pylist() == [7]


def test_keys_that_cannot_compare_are_refused_by_name(con, tmp_path: Path) -> None:
    write(tmp_path / "events", [Event((1,), START, None, 7)], pa.timestamp("us"))
    entities = pa.table({"key0": ["1"], "at": times([START], pa.timestamp("us"))})
    with pytest.raises(EntityFrameError, match=r"'key0' is VARCHAR in the entity rows, BIGINT in the source"):
        join(con, entities, tmp_path / "events")


def test_a_missing_key_and_a_time_that_is_none_are_refused_by_name(con, tmp_path: Path) -> None:
    write(tmp_path / "events", [Event((1,), START, None, 7)], pa.timestamp("us"))
    with pytest.raises(EntityFrameError, match="no column 'key0'"):
        join(con, pa.table({"at": times([START], pa.timestamp("us"))}), tmp_path / "events")
    with pytest.raises(EntityFrameError, match="'at' of the entity rows has the type BIGINT"):
        join(con, pa.table({"key0": [1], "at": [5]}), tmp_path / "events")
    with pytest.raises(InvalidSource, match="BIGINT"):
        join(con, pa.table({"key0": [1], "at": times([START], pa.timestamp("us"))}), _integer_times(tmp_path))


def _integer_times(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"key0": [1], "at": [5], "created": [5], "value": [7]}), tmp_path / "int.parquet")
    return tmp_path / "int.parquet"


def test_columns_named_like_the_joins_own_do_not_disturb_it(con, tmp_path: Path) -> None:
    at = times([START], pa.timestamp("us"))
    names = ["row", "k0", "t", "c", "expired", "us", "ns", "file_index", "f0", 'quo"ted', "select"]
    source = pa.table({"key0": [1], "at": at, **{name: [n] for n, name in enumerate(names)}})
    pq.write_table(source, tmp_path / "events.parquet")
    entities = pa.table({"key0": [1], "at": at, **{name: [-1] for name in names}})
    view = ViewJoin(
        name="view",
        scan=scan_parquet(con, str(tmp_path / "events.parquet")),
        keys={"key0": "key0"},
        features={f"view__{name}": name for name in names},
        timestamp="at",
        created=None,
        ttl=timedelta(0),
    )
    joined = point_in_time_join(con, entities, "at", [view])
    assert joined.features.to_pylist() == [{f"view__{name}": n for n, name in enumerate(names)}]


def test_columns_that_hide_the_place_of_a_row_do_not_confuse_the_files(con, tmp_path: Path) -> None:
    for number in range(2):
        at = times([START, START + SECOND], pa.timestamp("us"))
        columns = {"key0": [1, 1], "at": at, "value": [2 * number, 2 * number + 1]}
        for name in ("file_index", "file_row_number"):
            columns[name] = [7, 7]
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    rows = [((1,), START), ((1,), START + SECOND)]
    joined = join(con, entity_rows(rows, pa.timestamp("us")), tmp_path, created=None)
    assert joined.features["view__value"].to_pylist() == [2, 3]


def test_columns_of_every_shape_come_back_with_their_nulls(con, tmp_path: Path) -> None:
    columns = {
        "small": pa.array([1, None, 3], pa.int8()),
        "flag": pa.array([True, None, False]),
        "text": pa.array(["a", None, "c"]),
        "days": pa.array([1, None, 3], pa.date32()),
        "money": pa.array([Decimal("1.50"), None, Decimal("3.25")]),
        "many": pa.array([[1], None, [2, None]]),
        "deep": pa.array([{"x": 1}, None, {"x": None}]),
    }
    at = times([START] * 3, pa.timestamp("us"))
    pq.write_table(pa.table({"key0": [1, 2, 3], "at": at, **columns}), tmp_path / "events.parquet")
    view = ViewJoin(
        name="view",
        scan=scan_parquet(con, str(tmp_path / "events.parquet")),
        keys={"key0": "key0"},
        features={name: name for name in columns},
        timestamp="at",
        created=None,
        ttl=timedelta(0),
    )
    order = [3, 9, 1, 3, 2]
    entities = entity_rows([((key,), START) for key in order], pa.timestamp("us"))
    joined = point_in_time_join(con, entities, "at", [view]).features
    for name, column in columns.items():
        values = dict(zip([1, 2, 3], column.to_pylist(), strict=True))
        assert joined[name].to_pylist() == [values.get(key) for key in order], name
        assert joined.schema.field(name).type == column.type


class Restless(LocalFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Every file changes as soon as it is opened."""

    protocol = "restless"

    def open(self, path: str, mode: str = "rb", **options: object) -> object:
        local = path.removeprefix("restless://")
        status = os.stat(local)
        os.utime(local, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
        return super().open(local, mode)

    def glob(self, path: str, **_: object) -> list[str]:
        return [path]

    def info(self, path: str, **options: object) -> object:
        return super().info(path.removeprefix("restless://"))

    def modified(self, path: str) -> object:
        return super().modified(path.removeprefix("restless://"))


def test_a_source_that_changes_between_its_two_readings_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "events", [Event((1,), START, None, 7)], pa.timestamp("us"))
    file = str(tmp_path / "events" / "0.parquet")
    own = connect()
    own.register_filesystem(Restless())
    calm = scan_parquet(own, file)
    restless = replace(calm, table=f"read_parquet(['restless://{file}'])")
    view = ViewJoin(
        name="view",
        scan=restless,
        keys={"key0": "key0"},
        features={"view__value": "value"},
        timestamp="at",
        created=None,
        ttl=timedelta(0),
    )
    with pytest.raises(InvalidSource, match="changes while it is read"):
        point_in_time_join(own, entity_rows([((1,), START)], pa.timestamp("us")), "at", [view])


def test_times_at_the_ends_of_the_calendar_compare(con, tmp_path: Path) -> None:
    ends = [datetime(1, 1, 1), datetime(9999, 12, 31)]  # noqa: DTZ001
    source = pa.table({"key0": [1, 1], "at": pa.array(ends, pa.timestamp("us")), "value": [1, 2]})
    pq.write_table(source, tmp_path / "events.parquet")
    rows = pa.array([*ends, datetime(2024, 1, 1)], pa.timestamp("us"))  # noqa: DTZ001
    entities = pa.table({"key0": [1, 1, 1], "at": rows})
    for ttl, in_memory in product((timedelta(0), timedelta.max), (None, 0)):
        joined = join(con, entities, tmp_path / "events.parquet", created=None, ttl=ttl, in_memory=in_memory)
        assert joined.features["view__value"].to_pylist() == [1, 2, 1]
    nanoseconds = pa.table({"key0": [1], "at": times([START], pa.timestamp("ns")), "value": [3]})
    pq.write_table(nanoseconds, tmp_path / "events.parquet")
    for ttl, in_memory in product((timedelta(0), timedelta.max), (None, 0)):
        joined = join(con, entities, tmp_path / "events.parquet", created=None, ttl=ttl, in_memory=in_memory)
        assert joined.features["view__value"].to_pylist() == [None, 3, 3]


def test_a_join_larger_than_its_memory_spills_is_right_and_cleans_up(tmp_path: Path) -> None:
    count = 600_000
    source = pa.table(
        {
            "key0": np.arange(count) % 50_000,
            "at": pa.array(START // 1_000 + np.arange(count) * 1_000_000).cast(pa.timestamp("us")),
            **{f"v{i}": np.arange(count, dtype=np.float64) for i in range(6)},
            "value": np.arange(count),
        }
    )
    pq.write_table(source, tmp_path / "events.parquet")
    entities = source.select(["key0", "at"]).slice(count // 2)
    spill = tmp_path / "spill"
    small = connect(memory_limit="30MB", threads=1, temp_directory=spill)
    small.execute("SET max_temp_directory_size = '0KB'")
    with pytest.raises(duckdb.OutOfMemoryException):
        join(small, entities, tmp_path / "events.parquet", created=None)
    small.execute("RESET max_temp_directory_size")
    joined = join(small, entities, tmp_path / "events.parquet", created=None)
    assert joined.features["view__value"].to_pylist() == list(range(count // 2, count))
    small.close()
    assert list(tmp_path.glob("spill/*")) == []
