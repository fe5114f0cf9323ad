"""The offline store on object storage, through a server that speaks S3, and on Delta tables."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from core.dataset import reproduce, training_dataset
from core.errors import InvalidSource
from core.repository import FeastRepository
from tests.support.market import START, stamps
from tests.support.s3 import S3

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with S3() as server:
        yield server


def put(s3: S3, key: str, frame: pd.DataFrame) -> None:
    file = io.BytesIO()
    frame.to_parquet(file, coerce_timestamps="us")
    s3.objects[key] = file.getvalue()


def events(values: list[float], *days: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": range(1, len(values) + 1),
            "amount": values,
            "event_timestamp": stamps(*days),
            "created": stamps(*days),
        }
    )


def a_repository(path: Path, source: Any, *, extra: str = "") -> FeastRepository:
    """One view, ``spend``, on that source, in a service of the same name."""
    from feast import Entity, FeatureService, FeatureView, Field, ValueType
    from feast.types import Float64, Int64

    path.mkdir(exist_ok=True)
    (path / "feature_store.yaml").write_text(
        "project: remote\nprovider: local\nregistry: registry.db\n"
        "online_store: {type: sqlite, path: online.db}\n"
        f"offline_store: {{type: core.offline.BanquetOfflineStore{extra}}}\n"
        "entity_key_serialization_version: 3\n"
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    schema = [Field(name="user_id", dtype=Int64), Field(name="amount", dtype=Float64)]
    view = FeatureView(name="spend", entities=[user], schema=schema, source=source)
    repository = FeastRepository.open(path)
    repository.store().apply([user, view, FeatureService(name="spend", features=[view])])
    return repository


def a_source(s3: S3, url: str) -> Any:
    from feast import FileSource

    return FileSource(
        name="spend",
        path=url,
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        s3_endpoint_override=s3.endpoint,
    )


def rows() -> pd.DataFrame:
    return pd.DataFrame({"user_id": [2, 1, 1, 3], "event_timestamp": stamps(5, 0, 5, 5)})


@pytest.mark.parametrize("url", ["s3://lake/spend", "s3://lake/spend/*/*.parquet"])
def test_a_prefix_or_glob_of_objects_joins_like_a_folder(s3: S3, tmp_path: Path, url: str) -> None:
    put(s3, "lake/spend/day=1/a.parquet", events([1.0, 2.0], 0, 0))
    put(s3, "lake/spend/day=2/b.parquet", events([3.0], 2))
    put(s3, "lake/spend/_SUCCESS", events([9.0], 4))
    repository = a_repository(tmp_path / "repo", a_source(s3, url))
    if "*" in url:
        del s3.objects["lake/spend/_SUCCESS"]
    dataset = training_dataset(repository, "spend", rows(), output=tmp_path / "set.parquet")
    assert dataset.frame["spend__amount"].fillna(-1).tolist() == [2.0, 1.0, 3.0, -1.0]
    files = dataset.lock.sources[0].files
    assert [(file.path, file.rows) for file in files] == [
        ("lake/spend/day=1/a.parquet", 2), ("lake/spend/day=2/b.parquet", 1),
    ]  # fmt: skip
    assert dataset.lock_path is not None
    assert reproduce(repository, dataset.lock_path).same


def test_a_tie_within_an_object_goes_to_its_last_row(s3: S3, tmp_path: Path) -> None:
    frame = pd.concat([events([1.0], 0), events([2.0], 0)])
    put(s3, "lake/spend.parquet", frame)
    repository = a_repository(tmp_path / "repo", a_source(s3, "s3://lake/spend.parquet"))
    dataset = training_dataset(repository, "spend", rows().tail(2))
    assert dataset.frame["spend__amount"].fillna(-1).tolist() == [2.0, -1.0]


def test_pushed_rows_saved_datasets_and_staging_reach_object_storage(s3: S3, tmp_path: Path) -> None:
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    put(s3, "lake/spend.parquet", events([1.0], 0))
    repository = a_repository(
        tmp_path / "repo",
        a_source(s3, "s3://lake/spend.parquet"),
        extra=f", staging_location: 's3://lake/staged', staging_location_endpoint_override: '{s3.endpoint}'",
    )
    store = repository.store()
    store.write_to_offline_store("spend", events([5.0], 1))
    job = store.get_historical_features(rows(), ["spend:amount"])
    assert job.to_df()["amount"].fillna(-1).tolist() == [-1.0, 1.0, 5.0, -1.0]

    staged = job.to_remote_storage()
    assert [url.startswith("s3://lake/staged/") for url in staged] == [True]
    assert pd.read_parquet(io.BytesIO(s3.objects[staged[0].removeprefix("s3://")])).shape == (4, 3)

    storage = SavedDatasetFileStorage("s3://lake/saved/", s3_endpoint_override=s3.endpoint)
    saved = store.create_saved_dataset(job, name="saved", storage=storage)
    assert saved.to_df()["amount"].fillna(-1).tolist() == [-1.0, 1.0, 5.0, -1.0]


def test_an_absent_object_and_an_absent_server_are_named(s3: S3, tmp_path: Path) -> None:
    repository = a_repository(tmp_path / "repo", a_source(s3, "s3://lake/nothing"))
    with pytest.raises(InvalidSource, match="s3://lake/nothing holds no Parquet file"):
        repository.store().get_historical_features(rows(), ["spend:amount"]).to_df()


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


def a_delta_source(path: str) -> Any:
    from feast import FileSource
    from feast.data_format import DeltaFormat

    return FileSource(
        name="spend",
        path=path,
        file_format=DeltaFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )


def test_a_delta_table_joins_takes_rows_and_pulls(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    table = str(tmp_path / "table")
    # What was overwritten is still in the folder, and no longer in the table.
    deltalake.write_deltalake(table, pa.Table.from_pandas(events([9.0, 9.0, 9.0], 1, 1, 1)))
    deltalake.write_deltalake(table, pa.Table.from_pandas(events([1.0, 2.0], 0, 0)), mode="overwrite")
    later = events([1.5], 0).assign(created=stamps(1))
    deltalake.write_deltalake(table, pa.Table.from_pandas(later), mode="append")
    repository = a_repository(tmp_path / "repo", a_delta_source(table))
    store = repository.store()
    store.write_to_offline_store("spend", events([3.0], 2))
    frame = store.get_historical_features(rows(), ["spend:amount"]).to_df()
    assert frame["amount"].fillna(-1).tolist() == [2.0, 1.5, 3.0, -1.0]
    dataset = training_dataset(repository, "spend", rows())
    assert dataset.lock.sources[0].rows == 4


def test_without_the_delta_package_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    repository = a_repository(tmp_path / "repo", a_source_that_is(tmp_path))
    view = repository.store().get_feature_view("spend")
    view.batch_source = a_delta_source(str(tmp_path / "table"))
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
