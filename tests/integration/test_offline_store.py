"""The offline-store plugin as stock Feast drives it: a repository of its own, SQLite online."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.errors import EntityFrameError, InvalidSource
from tests.support import market
from tests.support.market import DAY, START, stamps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that `feast apply` was run in."""
    return market.apply(tmp_path_factory.mktemp("offline") / "repo")


@pytest.fixture
def repo(applied: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(applied, tmp_path / "repo"))


@pytest.fixture
def store(repo: Path) -> Any:
    from feast import FeatureStore

    return FeatureStore(repo_path=str(repo))


def entity_rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": [2, 1, 1, 1, 9, 1],
            "shop_id": ["y", "x", "x", "x", "x", "y"],
            "budget": [100.0] * 6,
            "event_timestamp": [*stamps(1, 3, 3, 4.5), pd.NaT, START],
            "label": pd.array([1, None, 3, 4, 5, 6], dtype="Int64"),
            "kind": pd.Categorical(["p", "q", "p", "q", "p", "q"]),
        },
        index=[5, 4, 3, 2, 1, 0],
    )


def test_every_row_comes_back_in_its_place_with_its_payload(store: Any) -> None:
    rows = entity_rows()
    job = store.get_historical_features(
        rows, store.get_feature_service("everything"), full_feature_names=True
    )
    frame = job.to_df()
    payload = frame[rows.columns].astype({"event_timestamp": rows["event_timestamp"].dtype})
    pd.testing.assert_frame_equal(payload, rows.reset_index(drop=True))
    assert list(frame.columns[len(rows.columns) :]) == [
        "spend__note", "spend__amount", "visits__count", "weather__degrees", "rest__left",
    ]  # fmt: skip
    assert frame["spend__note"].tolist() == [None, "d", "d", None, None, "a"]
    # The newest row wins, even where its value is null.
    assert frame["spend__amount"].fillna(-1).tolist() == [20.0, -1.0, -1.0, -1.0, -1.0, 10.0]
    # A tie goes to the newest created timestamp, which file a holds.
    assert frame["visits__count"].fillna(-1).tolist() == [1, 1, 1, 1, -1, -1]
    assert frame["weather__degrees"].fillna(-1).tolist() == [-3, 4, 4, 4, -1, -3]
    assert frame["rest__left"].fillna(-1).tolist() == [80.0, -1.0, -1.0, -1.0, -1.0, 90.0]
    assert (job.metadata.min_event_timestamp, job.metadata.max_event_timestamp) == (START, START + 4.5 * DAY)
    assert set(job.metadata.keys) == {"user_id", "shop_id", "budget", "label", "kind"}


def test_short_names_are_the_features_own(store: Any) -> None:
    frame = store.get_historical_features(entity_rows(), ["spend:amount", "visits:count"]).to_df()
    assert list(frame.columns[-2:]) == ["amount", "count"]


def test_one_view_under_two_names_joins_two_entities(store: Any) -> None:
    rows = pd.DataFrame({"buyer_id": [1, 2], "seller_id": [2, 7], "event_timestamp": stamps(1, 1)})
    service = store.get_feature_service("pair")
    frame = store.get_historical_features(rows, service, full_feature_names=True).to_df()
    assert frame["buyer__amount"].tolist() == [11.0, 20.0]
    assert frame["seller__amount"].fillna(-1).tolist() == [20.0, -1.0]


def test_a_folder_of_hive_partitions_named_by_a_glob_and_dated_by_days_joins(store: Any) -> None:
    rows = pd.DataFrame({"user_id": [1, 1, 1], "event_timestamp": stamps(-1, 30, 31)})
    frame = store.get_historical_features(rows, ["days:level"]).to_df()
    assert frame["level"].fillna(-1).tolist() == [-1, 1, 2]


def test_what_was_not_known_yet_can_be_left_out(store: Any) -> None:
    rows = pd.DataFrame({"user_id": [1, 1], "event_timestamp": stamps(3, 4)})
    known = store.get_historical_features(rows, ["spend:note"], filter_by_created_timestamp=True).to_df()
    assert known["note"].tolist() == ["b", "d"]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda rows: pa.Table.from_pandas(rows), id="arrow"),
        pytest.param(
            lambda rows: (
                "SELECT user_id::INTEGER AS user_id, event_timestamp::VARCHAR AS event_timestamp "
                "FROM 'data/rows.parquet' ORDER BY label"
            ),
            id="sql",
        ),
        pytest.param(
            lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].astype(str)), id="text"
        ),
        pytest.param(lambda rows: rows.rename(columns={"event_timestamp": "when"}), id="inferred"),
        pytest.param(
            lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_convert("Asia/Tokyo")),
            id="zoned",
        ),
        pytest.param(
            lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_localize(None)), id="naive"
        ),
    ],
)
def test_entity_rows_come_in_many_forms(store: Any, repo: Path, given: Callable[[pd.DataFrame], Any]) -> None:
    rows = pd.DataFrame({"user_id": [2, 1, 1], "event_timestamp": stamps(1, 0, 1), "label": [0, 1, 2]})
    rows.to_parquet(repo / "data" / "rows.parquet")
    frame = store.get_historical_features(given(rows), ["spend:amount"]).to_df()
    assert frame["amount"].tolist() == [20.0, 10.0, 11.0]


def test_no_entity_rows_give_an_empty_frame_with_every_column(store: Any) -> None:
    job = store.get_historical_features(entity_rows().head(0), ["spend:amount", "visits:count"])
    frame = job.to_df()
    assert frame.empty
    assert list(frame.columns[-2:]) == ["amount", "count"]
    assert job.metadata.min_event_timestamp is None


def test_a_date_range_gives_every_key_seen_in_it_as_of_its_end(store: Any) -> None:
    job = store.get_historical_features(
        features=["spend:amount", "spend:note", "weather:degrees"],
        start_date=START + 0.5 * DAY,
        end_date=START + 1.5 * DAY,
    )
    frame = job.to_df()
    assert frame.columns.tolist() == ["user_id", "event_timestamp", "amount", "note", "degrees"]
    assert frame["user_id"].tolist() == [1, 2]
    assert (frame["event_timestamp"] == START + 1.5 * DAY).all()
    assert frame["amount"].tolist() == [11.0, 20.0]
    assert frame["degrees"].tolist() == [-3.0, -3.0]
    assert job.metadata.keys == ["user_id"]


def test_a_date_range_over_views_of_different_keys_keeps_each_key(store: Any) -> None:
    frame = store.get_historical_features(
        features=["spend:amount", "visits:count"], start_date=START, end_date=START + DAY
    ).to_df()
    found = frame[["user_id", "shop_id", "amount", "count"]].astype(object).where(frame.notna(), None)
    assert sorted(map(tuple, found.values.tolist()), key=str) == [
        (1, "x", 11.0, 1), (1, None, 11.0, None), (2, "y", 20.0, 1), (2, None, 20.0, None),
    ]  # fmt: skip


def test_a_date_range_that_ends_before_it_starts_is_refused(store: Any) -> None:
    with pytest.raises(EntityFrameError, match=r"start_date 2024-01-02.* is after end_date 2024-01-01"):
        store.get_historical_features(
            None, ["spend:amount"], start_date=START + timedelta(days=1), end_date=START
        )


def test_a_label_named_like_a_feature_is_refused_with_a_way_out(store: Any) -> None:
    rows = pd.DataFrame({"user_id": [1], "amount": [3.0], "event_timestamp": stamps(1)})
    with pytest.raises(EntityFrameError, match=r"named like features: amount\. .*full_feature_names=True"):
        store.get_historical_features(rows, ["spend:amount"]).to_df()
    frame = store.get_historical_features(rows, ["spend:amount"], full_feature_names=True).to_df()
    assert (frame["amount"].item(), frame["spend__amount"].item()) == (3.0, 11.0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"event_timestamp": stamps(1)}, "no column 'user_id'"),
        ({"user_id": [1]}, "no column 'event_timestamp'"),
        ({"user_id": ["1"], "event_timestamp": stamps(1)}, "'user_id' is VARCHAR"),
        ({"user_id": [1], "event_timestamp": [3]}, "no time"),
        ({"user_id": [1], "event_timestamp": ["soon"]}, "soon"),
        ({"user_id": [1, 1], "event_timestamp": stamps(1, 1), "label": [1, "a"]}, "column label"),
    ],
)
def test_entity_rows_that_cannot_be_joined_are_refused_by_name(
    store: Any, rows: dict[str, Any], said: str
) -> None:
    with pytest.raises(EntityFrameError, match=said):
        store.get_historical_features(pd.DataFrame(rows), ["spend:amount"]).to_df()


def test_an_input_that_an_arrow_table_lacks_is_named(store: Any) -> None:
    rows = pa.table({"user_id": [1], "event_timestamp": stamps(1)})
    with pytest.raises(EntityFrameError, match="no column budget, which on-demand view 'rest' takes"):
        store.get_historical_features(rows, ["rest:left"]).to_df()


def test_a_missing_file_and_a_missing_column_are_named(store: Any, repo: Path) -> None:
    rows = pd.DataFrame({"user_id": [1], "event_timestamp": stamps(1)})
    frame = pd.read_parquet(repo / "data" / "spend.parquet")
    frame.drop(columns="note").to_parquet(repo / "data" / "spend.parquet")
    with pytest.raises(InvalidSource, match=r"spend\.parquet has no column 'note'"):
        store.get_historical_features(rows, ["spend:note"]).to_df()
    (repo / "data" / "spend.parquet").unlink()
    with pytest.raises(InvalidSource, match=r"spend\.parquet holds no Parquet file"):
        store.get_historical_features(rows, ["spend:note"]).to_df()


@pytest.mark.parametrize("latest", [False, True], ids=["pull all", "pull latest"])
def test_stock_materialize_reads_the_newest_rows_through_it(store: Any, latest: bool) -> None:
    store.config.materialization_config.pull_latest_features = latest
    store.materialize(START - DAY, START + 10 * DAY, feature_views=["spend", "visits", "weather"])
    answer = store.get_online_features(
        ["spend:note", "visits:count", "weather:degrees"], [{"user_id": 1, "shop_id": "x"}]
    ).to_dict()
    assert (answer["note"], answer["count"], answer["degrees"]) == (["d"], [1], [4.0])


def test_pull_all_gives_the_window_with_both_ends(store: Any) -> None:
    view = store.get_feature_view("spend")
    job = store._get_provider().offline_store.pull_all_from_table_or_query(
        store.config, view.batch_source, ["user_id"], ["amount"], "event_timestamp", "created",
        START, START + DAY,
    )  # fmt: skip
    table = job.to_arrow()
    assert table.column_names == ["user_id", "amount", "event_timestamp", "created"]
    assert table["amount"].to_pylist() == [10.0, 11.0, 20.0]


@pytest.mark.filterwarnings("ignore:Discarding nonzero nanoseconds:UserWarning")
def test_nanosecond_sources_are_pulled_in_full(store: Any, repo: Path) -> None:
    """Feast's duckdb store fails on them."""
    at = pa.array([int(START.timestamp()) * 10**9 + n for n in (1, 3, 2)]).cast(pa.timestamp("ns", "UTC"))
    amounts = {"user_id": [1, 1, 1], "amount": [1.0, 3.0, 2.0], "note": ["a", "c", "b"]}
    rows = pa.table({**amounts, "event_timestamp": at, "created": at})
    pq.write_table(rows, repo / "data" / "spend.parquet")
    store.materialize(START - DAY, START + DAY, feature_views=["spend"])
    answer = store.get_online_features(["spend:amount"], [{"user_id": 1}]).to_dict()
    assert answer["amount"] == [3.0]


@pytest.mark.parametrize("target", ["saved/set.parquet", "saved/folder"])
def test_a_saved_dataset_is_read_back_row_by_row(store: Any, repo: Path, target: str) -> None:
    from feast.errors import SavedDatasetLocationAlreadyExists
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    rows = pd.DataFrame({"user_id": [2, 1, 1], "event_timestamp": stamps(1, 0, 1), "budget": [1.0, 2.0, 3.0]})

    def save(rows: pd.DataFrame, **options: Any) -> pd.DataFrame:
        job = store.get_historical_features(rows, ["spend:amount", "rest:left"], full_feature_names=True)
        storage = SavedDatasetFileStorage(target)
        return store.create_saved_dataset(job, name="saved", storage=storage, **options).to_df()

    saved = save(rows)
    assert (repo / target).exists()
    assert saved["spend__amount"].tolist() == [20.0, 10.0, 11.0]
    assert saved["rest__left"].tolist() == [-19.0, -8.0, -8.0]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        save(rows)
    again = save(rows.head(1), allow_overwrite=True)
    assert again["spend__amount"].tolist() == [20.0]
    assert store.get_saved_dataset("saved").to_df()["user_id"].tolist() == [2]


def test_to_remote_storage_leaves_parquet_files_in_the_staging_location(store: Any, repo: Path) -> None:
    rows = pd.DataFrame({"user_id": [2, 1], "event_timestamp": stamps(1, 0)})
    job = store.get_historical_features(rows, ["spend:amount"])
    assert job.supports_remote_storage_export()
    files = job.to_remote_storage()
    assert all(file.startswith(str(repo / "staged")) for file in files)
    assert pq.read_table(files[0])["amount"].to_pylist() == [20.0, 10.0]


@pytest.mark.parametrize("source", ["spend", "clicks"], ids=["file", "folder"])
def test_written_rows_are_appended_and_win_their_ties(store: Any, source: str) -> None:
    from feast.data_source import PushMode

    rows = pd.DataFrame({"user_id": [1], "event_timestamp": stamps(1)})
    if source == "spend":
        new = pd.DataFrame(
            {
                "created": stamps(1),
                "event_timestamp": stamps(1),
                "user_id": [1],
                "note": ["new"],
                "amount": [1],
            }
        )
        store.write_to_offline_store("spend", new)
        found = store.get_historical_features(rows, ["spend:note", "spend:amount"]).to_df()
        assert (found["note"].item(), found["amount"].item()) == ("new", 1.0)
    else:
        new = pd.DataFrame({"user_id": [1], "n_clicks": [8], "event_timestamp": stamps(0)})
        store.push("clicks_push", new, to=PushMode.OFFLINE)
        assert store.get_historical_features(rows, ["clicks:clicks"]).to_df()["clicks"].item() == 8


def test_rows_that_do_not_fit_leave_the_source_as_it_was(store: Any, repo: Path) -> None:
    before = (repo / "data" / "spend.parquet").read_bytes()
    view = store.get_feature_view("spend")
    write = store._get_provider().offline_store.offline_write_batch
    good = pa.Table.from_pandas(pd.read_parquet(repo / "data" / "spend.parquet"))
    for bad, said in (
        (good.drop_columns(["note"]), "no note"),
        (good.append_column("extra", good["note"]), "extra, which it has not"),
        (good.set_column(1, "amount", good["note"]), "Column 'amount'"),
    ):
        with pytest.raises(InvalidSource, match=said):
            write(store.config, view, bad, None)
    assert (repo / "data" / "spend.parquet").read_bytes() == before
    assert [path.name for path in (repo / "data").glob(".spend*")] == [".spend.parquet.lock"]
    with pytest.raises(InvalidSource, match="no glob"):
        write(store.config, store.get_feature_view("days"), good, None)


def test_feature_logs_are_kept_by_day_and_read_back(store: Any, repo: Path) -> None:
    from feast.feature_logging import FeatureServiceLoggingSource

    service = store.get_feature_service("everything")
    schema = FeatureServiceLoggingSource(service, "offline").get_schema(store.registry)
    columns = {field.name: pa.nulls(2, field.type) for field in schema}
    columns |= {
        "user_id": pa.array([1, 2]),
        "spend__note": pa.array(["a", "b"]),
        "__request_id": pa.array(["r1", "r2"]),
        "__log_timestamp": pa.array(stamps(0, 1), schema.field("__log_timestamp").type),
        "__log_date": pa.array([START.date(), (START + DAY).date()]),
    }
    logs = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    store.write_logged_features(logs, service)
    staged = repo / "chunk"
    staged.mkdir()
    pq.write_table(logs.slice(1), staged / "0.parquet")
    store.write_logged_features(staged, service)
    assert sorted(path.name for path in (repo / "logs").iterdir()) == [
        "__log_date=2024-01-01", "__log_date=2024-01-02",
    ]  # fmt: skip
    provider = store._get_provider()
    job = provider.retrieve_feature_service_logs(
        service, START, START + 2 * DAY, store.config, store.registry
    )
    frame = job.to_df().sort_values("__log_timestamp")
    assert frame["__request_id"].tolist() == ["r1", "r2", "r2"]
    assert frame["spend__note"].tolist() == ["a", "b", "b"]
    assert set(frame.columns) - {"__dummy_id"} == set(schema.names)


@pytest.mark.filterwarnings("ignore:.*DataFrame concatenation:FutureWarning")
def test_feasts_monitoring_keeps_its_metrics_through_it(store: Any) -> None:
    from feast.monitoring.monitoring_service import MonitoringService

    service = MonitoringService(store)
    service.compute_metrics(
        "offline", "spend", start_date=START.date(), end_date=(START + 3 * DAY).date(), granularity="daily"
    )
    found = service.get_feature_metrics("offline", feature_view_name="spend", feature_name="amount")
    assert found
    assert found[0]["row_count"] == 4
    newest = store._get_provider().offline_store.get_monitoring_max_timestamp(
        store.config, store.get_feature_view("spend").batch_source, "event_timestamp"
    )
    assert newest == START + 2 * DAY


def by_merge_asof(rows: pd.DataFrame, events: pd.DataFrame, keys: list[str], ttl: Any) -> list[float | None]:
    """The same join by pandas alone: ties settled by a sort, rows without key or time left out of it."""
    numbered = rows.assign(number=range(len(rows)), at=pd.to_datetime(rows["event_timestamp"], utc=True))
    whole = numbered.dropna(subset=[*keys, "at"]).sort_values("at", kind="stable")
    newest = events.assign(at=events["at"].astype("datetime64[ns, UTC]"), place=range(len(events)))
    newest = newest.dropna(subset=[*keys, "at"]).sort_values(["at", "created", "place"], na_position="first")
    whole = whole.assign(at=whole["at"].astype("datetime64[ns, UTC]"))
    types = dict.fromkeys(keys, "int64")
    found = pd.merge_asof(
        whole.astype(types),
        newest.astype(types),
        on="at",
        by=keys,
        tolerance=pd.Timedelta(ttl) if ttl else None,
    )
    amounts = dict(zip(found["number"], found["amount"], strict=True))
    return [None if pd.isna(amounts.get(n)) else amounts[n] for n in range(len(rows))]


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(hours=3)], ids=["no ttl", "ttl"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize("width", [1, 2], ids=["one key", "two keys"])
def test_rows_equal_those_of_pandas_merge_asof(
    tmp_path: Path, width: int, zone: str | None, ttl: timedelta
) -> None:
    """Ttl boundaries, future rows, ties, duplicates, null keys and values, NaT and order, by the dozen."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64, Int64

    draw = np.random.default_rng(width)
    keys = ["a", "b"][:width]

    def frame(count: int) -> pd.DataFrame:
        found = pd.DataFrame({key: draw.integers(0, 4, count) for key in keys}).astype("Int64")
        found.loc[draw.random(count) < 0.05, "a"] = pd.NA
        return found

    def hours(count: int, missing: float) -> pd.Series:
        # Whole hours: half of all rows fall on the boundary of a ttl or on another row's time.
        at = pd.Series(pd.Timestamp(START) + pd.to_timedelta(draw.integers(0, 12, count), "h"))
        at[draw.random(count) < missing] = pd.NaT
        return at.dt.tz_convert(zone) if zone else at.dt.tz_localize(None)

    events = frame(400).assign(at=hours(400, 0.02), created=hours(400, 0.2), amount=draw.random(400))
    events.loc[draw.random(400) < 0.1, "amount"] = None
    events.to_parquet(tmp_path / "events.parquet", coerce_timestamps="us")
    entities = [Entity(name=key, join_keys=[key], value_type=ValueType.INT64) for key in keys]
    source = FileSource(
        name="spend", path="events.parquet", timestamp_field="at", created_timestamp_column="created"
    )
    schema = [*(Field(name=key, dtype=Int64) for key in keys), Field(name="amount", dtype=Float64)]
    view = FeatureView(name="spend", entities=entities, schema=schema, source=source, ttl=ttl)
    config = RepoConfig(
        project="oracle",
        provider="local",
        registry=str(tmp_path / "registry.db"),
        online_store={"type": "sqlite", "path": str(tmp_path / "online.db")},
        offline_store={"type": "core.offline.BanquetOfflineStore"},
        entity_key_serialization_version=3,
        repo_path=tmp_path,
    )
    store = FeatureStore(config=config)
    store.apply([*entities, view])
    rows = frame(300).assign(event_timestamp=hours(300, 0.05), label=range(300))

    found = store.get_historical_features(rows, ["spend:amount"]).to_df()
    assert found["label"].tolist() == list(range(300))
    amounts = [None if pd.isna(amount) else amount for amount in found["amount"]]
    in_utc = events.assign(**{name: pd.to_datetime(events[name], utc=True) for name in ("at", "created")})
    assert amounts == by_merge_asof(rows, in_utc, keys, ttl)
    assert sum(amount is None for amount in amounts) < 250
