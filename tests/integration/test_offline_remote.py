"""The offline store on object storage, through a server that speaks S3, and on Delta tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from core.dataset import reproduce, training_dataset
from core.errors import InvalidSource
from core.repository import FeastRepository
from materialization.run import materialize
from tests.support.bucket import Bucket
from tests.support.loads import values
from tests.support.market import START, stamps
from tests.support.valkey import Valkey

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.fixture
def objects(s3: Bucket) -> Any:
    """The bucket as a file system."""
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def put(objects: Any, url: str, frame: pd.DataFrame) -> None:
    with objects.open(url, "wb") as file:
        frame.to_parquet(file, coerce_timestamps="us")


def events(values: list[float], *days: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": range(1, len(values) + 1),
            "amount": values,
            "event_timestamp": stamps(*days),
            "created": stamps(*days),
        }
    )


def a_repository(
    path: Path,
    source: Any,
    server: Valkey | None = None,
    *,
    features: Sequence[str] = ("amount",),
    offline: str = "",
) -> FeastRepository:
    """One view, ``spend``, on that source, in a service of that name; online in Redis where there is one."""
    from feast import Entity, FeatureService, FeatureView, Field, ValueType
    from feast.types import Float64, Int64

    online = "type: sqlite, path: online.db"
    if server is not None:
        online = f'type: redis, connection_string: "{server.connection_string}"'
    path.mkdir(exist_ok=True)
    (path / "feature_store.yaml").write_text(
        "project: remote\nprovider: local\nregistry: registry.db\n"
        f"online_store: {{{online}}}\n"
        f"offline_store: {{type: core.offline.BanquetOfflineStore{offline}}}\n"
        "entity_key_serialization_version: 3\n"
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    types = {"amount": Float64, "day": Int64}
    schema = [Field(name="user_id", dtype=Int64), *(Field(name=f, dtype=types[f]) for f in features)]
    view = FeatureView(name="spend", entities=[user], schema=schema, source=source)
    repository = FeastRepository.open(path)
    repository.store().apply([user, view, FeatureService(name="spend", features=[view])])
    return repository


def load(repository: FeastRepository) -> int:
    """Materialize what is due; how many rows were written."""
    (report,) = materialize(repository).views
    assert report.error is None, report.as_json()
    return report.written


def a_source(url: str, endpoint: str = "", **more: Any) -> Any:
    from feast import FileSource

    return FileSource(
        name="spend",
        path=url,
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        s3_endpoint_override=endpoint,
        **more,
    )


def rows() -> pd.DataFrame:
    return pd.DataFrame({"user_id": [2, 1, 1, 3], "event_timestamp": stamps(5, 0, 5, 5)})


def amounts(repository: FeastRepository) -> list[float]:
    """The historical amounts of ``rows``, -1 where there is none."""
    found = repository.store().get_historical_features(rows(), ["spend:amount"]).to_df()
    return list(found["amount"].fillna(-1))


@pytest.mark.parametrize("key", ["spend", "spend/*/*.parquet", "spend/day=*/?.parquet"])
def test_a_prefix_or_glob_of_objects_joins_and_loads_like_a_folder(
    s3: Bucket, objects: Any, server: Valkey, tmp_path: Path, key: str
) -> None:
    put(objects, s3.at("spend/day=1/a.parquet"), events([1.0, 2.0], 0, 0))
    put(objects, s3.at("spend/day=2/b.parquet"), events([3.0], 2))
    put(objects, s3.at("spend/_temporary/c.parquet"), events([9.0], 4))
    if "/*/" in key:
        objects.rm(s3.at("spend/_temporary/c.parquet"))  # a glob means every object that it names
    repository = a_repository(tmp_path / "repo", a_source(s3.at(key)), server, features=("amount", "day"))
    dataset = training_dataset(repository, "spend", rows(), output=tmp_path / "set.parquet")
    assert dataset.frame["spend__amount"].fillna(-1).tolist() == [2.0, 1.0, 3.0, -1.0]
    assert dataset.frame["spend__day"].fillna(-1).tolist() == [1, 1, 2, -1]
    files = dataset.lock.sources[0].files
    assert [(file.path, file.rows) for file in files] == [
        (f"{s3.name}/spend/day=1/a.parquet", 2), (f"{s3.name}/spend/day=2/b.parquet", 1),
    ]  # fmt: skip
    assert dataset.lock_path is not None
    assert reproduce(repository, dataset.lock_path).same
    assert load(repository) == 2
    assert values(repository, [1, 2, 3], "spend:amount") == [3.0, 2.0, None]
    assert values(repository, [1, 2, 3], "spend:day") == [2, 1, None]


def test_a_source_names_its_own_server_and_new_objects_are_loaded(
    s3: Bucket, objects: Any, server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(objects, s3.at("spend/a.parquet"), events([1.0, 2.0], 1, 0))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    repository = a_repository(tmp_path / "repo", a_source(s3.at("spend"), s3.endpoint), server)
    assert amounts(repository) == [2.0, -1.0, 1.0, -1.0]
    assert load(repository) == 2
    assert load(repository) == 0
    put(objects, s3.at("spend/b.parquet"), events([4.0], 2))
    assert load(repository) == 1
    assert values(repository, [1, 2], "spend:amount") == [4.0, 2.0]


def test_a_tie_within_an_object_goes_to_its_last_row(s3: Bucket, objects: Any, tmp_path: Path) -> None:
    put(objects, s3.at("spend.parquet"), pd.concat([events([1.0], 0), events([2.0], 0)]))
    repository = a_repository(tmp_path / "repo", a_source(s3.at("spend.parquet")))
    dataset = training_dataset(repository, "spend", rows().tail(2))
    assert dataset.frame["spend__amount"].fillna(-1).tolist() == [2.0, -1.0]


def test_pushed_rows_saved_datasets_and_staging_reach_object_storage(
    s3: Bucket, objects: Any, tmp_path: Path
) -> None:
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    put(objects, s3.at("spend.parquet"), events([1.0], 0))
    repository = a_repository(
        tmp_path / "repo",
        a_source(s3.at("spend.parquet"), s3.endpoint),
        offline=f", staging_location: '{s3.at('staged')}'"
        f", staging_location_endpoint_override: '{s3.endpoint}'",
    )
    store = repository.store()
    store.write_to_offline_store("spend", events([5.0], 1))
    assert amounts(repository) == [-1.0, 1.0, 5.0, -1.0]

    job = store.get_historical_features(rows(), ["spend:amount"])
    staged = job.to_remote_storage()
    assert [url.startswith(s3.at("staged/")) for url in staged] == [True]
    with objects.open(staged[0]) as file:
        assert pd.read_parquet(file).shape == (4, 3)

    storage = SavedDatasetFileStorage(s3.at("saved/"), s3_endpoint_override=s3.endpoint)
    saved = store.create_saved_dataset(job, name="saved", storage=storage)
    assert saved.to_df()["amount"].fillna(-1).tolist() == [-1.0, 1.0, 5.0, -1.0]


def test_rows_added_to_a_prefix_keep_its_partitions(s3: Bucket, objects: Any, tmp_path: Path) -> None:
    put(objects, s3.at("spend/day=1/a.parquet"), events([1.0], 0))
    repository = a_repository(tmp_path / "repo", a_source(s3.at("spend")), features=("amount", "day"))
    repository.store().write_to_offline_store("spend", events([5.0], 1).assign(day=[7]))
    assert amounts(repository) == [-1.0, 1.0, 5.0, -1.0]
    assert len(objects.glob(s3.at("spend/day=7/*.parquet"))) == 1


def test_an_absent_object_and_an_absent_server_are_named(s3: Bucket, tmp_path: Path) -> None:
    repository = a_repository(tmp_path / "repo", a_source(s3.at("nothing")))
    with pytest.raises(InvalidSource, match=f"{s3.at('nothing')} holds no Parquet file"):
        amounts(repository)
    repository = a_repository(tmp_path / "away", a_source(s3.at("nothing"), s3.endpoint))
    with s3.away(), pytest.raises(InvalidSource, match=f"{s3.at('nothing')} cannot be listed"):
        amounts(repository)


def test_any_other_scheme_goes_through_fsspec(tmp_path: Path) -> None:
    import fsspec
    from feast import FileSource

    memory = fsspec.filesystem("memory")
    with memory.open("/lake/spend.parquet", "wb") as file:
        events([1.0], 0).to_parquet(file)
    source = FileSource(name="spend", path="memory://lake/spend.parquet", timestamp_field="event_timestamp")
    repository = a_repository(tmp_path / "repo", source)
    frame = repository.store().get_historical_features(rows(), ["spend:amount"]).to_df()
    assert frame["amount"].fillna(-1).tolist() == [-1.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize("where", ["local", "s3", "s3 named by the source"])
def test_a_delta_table_joins_takes_rows_and_loads(
    where: str, s3: Bucket, server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its current version counts, of which more files may lie there than belong to it."""
    import deltalake
    from feast.data_format import DeltaFormat

    table = str(tmp_path / "table") if where == "local" else s3.at("table")
    options = None if where == "local" else {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_ALLOW_HTTP": "true"}

    def write(frame: pd.DataFrame, mode: str) -> None:
        rows = pa.Table.from_pandas(frame, preserve_index=False)
        deltalake.write_deltalake(table, rows, mode=mode, storage_options=options)

    write(events([9.0, 9.0, 9.0], 1, 1, 1), "error")
    write(events([1.0, 2.0], 0, 0), "overwrite")
    write(events([1.5], 0).assign(created=stamps(1)), "append")
    endpoint = ""
    if where == "s3":
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    elif where != "local":
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        endpoint = s3.endpoint
    source = a_source(table, endpoint, file_format=DeltaFormat())
    repository = a_repository(tmp_path / "repo", source, server)
    repository.store().write_to_offline_store("spend", events([3.0], 2))
    assert amounts(repository) == [2.0, 1.5, 3.0, -1.0]
    dataset = training_dataset(repository, "spend", rows(), output=tmp_path / "set.parquet")
    assert dataset.lock.sources[0].rows == 4
    assert dataset.lock_path is not None
    assert reproduce(repository, dataset.lock_path).same
    assert load(repository) == 2
    assert values(repository, [1, 2, 3], "spend:amount") == [3.0, 2.0, None]
    write(events([6.0], 3), "append")
    assert load(repository) == 1
    assert values(repository, [1, 2], "spend:amount") == [6.0, 2.0]


def test_without_the_delta_package_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from feast.data_format import DeltaFormat

    repository = a_repository(tmp_path / "repo", a_source_that_is(tmp_path))
    view = repository.store().get_feature_view("spend")
    view.batch_source = a_source(str(tmp_path / "table"), file_format=DeltaFormat())
    monkeypatch.setitem(sys.modules, "deltalake", None)
    offline = repository.store()._get_provider().offline_store
    job = offline.pull_all_from_table_or_query(
        repository.store().config, view.batch_source, ["user_id"], ["amount"], "event_timestamp", None, START
    )
    with pytest.raises(InvalidSource, match=r"needs the package deltalake\. Install feast-banquet\[delta\]"):
        job.to_arrow()


def a_source_that_is(folder: Path) -> Any:
    from feast import FileSource

    events([1.0], 0).to_parquet(folder / "spend.parquet")
    return FileSource(name="spend", path=str(folder / "spend.parquet"), timestamp_field="event_timestamp")
