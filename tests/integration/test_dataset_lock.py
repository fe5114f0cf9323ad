"""Training sets and their locks: on our store and on Feast's own, and with each input moved in turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.dataset import Reproduction, reproduce, training_dataset
from core.errors import Conflict, DatasetMismatch, EntityFrameError, FeatureServiceNotFound, InvalidLock
from core.repository import FeastRepository
from tests.support import market
from tests.support.market import DAY, START, stamps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")

FEATURES = ["spend__note", "visits__count", "weather__degrees", "rest__left"]


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return market.apply(tmp_path_factory.mktemp("dataset") / "repo")


@pytest.fixture
def path(applied: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; times of change are kept."""
    return Path(shutil.copytree(applied, tmp_path / "repo"))


def entity_rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": [2, 1, 1, 1, 9],
            "shop_id": ["y", "x", "x", "x", "x"],
            "budget": [100.0, 90.0, 80.0, 70.0, 60.0],
            "event_timestamp": [*stamps(1, 3, 3, 4.5), pd.NaT],
            "label": pd.Categorical(["p", "q", "p", "q", "p"]),
            "amount": [1, 2, 3, 4, 5],
        }
    )


def build(path: Path, rows: pd.DataFrame | Path | None = None) -> Path:
    """A dataset of everything, from a file of entity rows; its lock."""
    if rows is None:
        rows = path.parent / "rows.parquet"
        entity_rows().to_parquet(rows)
    output = path.parent / "set.parquet"
    dataset = training_dataset(FeastRepository.open(path), "everything", rows, output=output)
    assert dataset.lock_path is not None
    return dataset.lock_path


def again(path: Path, lock: Path) -> Reproduction:
    return reproduce(FeastRepository.open(path), lock)


def test_a_dataset_is_its_rows_in_order_then_the_service_in_order(path: Path) -> None:
    rows = entity_rows()
    dataset = training_dataset(FeastRepository.open(path), "everything", rows)
    pd.testing.assert_frame_equal(dataset.frame[list(rows.columns)], rows)
    assert dataset.table.column_names == [*rows.columns, *FEATURES]
    assert dataset.frame["rest__left"].fillna(-1).tolist() == [80.0, -1, -1, -1, -1]
    assert dataset.lock_path is None
    assert dataset.lock.rows == 5


def test_the_file_and_its_lock_say_the_same(path: Path) -> None:
    lock_path = build(path)
    lock = json.loads(lock_path.read_text())
    table = pq.read_table(path.parent / "set.parquet")
    assert lock["rows"] == table.num_rows == 5
    assert list(lock["columns"]) == table.column_names
    assert lock["entities"]["path"] == "rows.parquet"
    assert lock["dataset"] == "set.parquet"
    assert lock["offline_store"] == "core.offline.BanquetOfflineStore"
    assert set(lock["definitions"]) == {
        "service everything", "on-demand view rest", "view spend", "view visits", "view weather",
    }  # fmt: skip
    by_view = {source["view"]: source for source in lock["sources"]}
    assert [file["path"] for file in by_view["visits"]["files"]] == [
        "data/visits/a.parquet", "data/visits/b.parquet",
    ]  # fmt: skip
    spend = by_view["spend"]["files"][0]
    stat = (path / "data" / "spend.parquet").stat()
    assert (spend["size"], spend["mtime_us"], spend["rows"]) == (stat.st_size, round(stat.st_mtime * 1e6), 4)
    assert by_view["spend"]["schema"]["amount"] == "double"
    assert str(path) not in lock_path.read_text()


def test_a_dataset_is_reproduced_from_its_lock_alone(path: Path) -> None:
    found = again(path, build(path))
    assert found.same
    assert found.moved == ()


def test_rows_given_as_a_frame_are_found_again_in_the_dataset_itself(path: Path) -> None:
    found = again(path, build(path, entity_rows()))
    assert found.same
    assert found.moved == ()


def rewrite(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    changed = pa.Table.from_pandas(change(pd.read_parquet(file)), preserve_index=False)
    pq.write_table(changed.cast(pq.read_schema(file)), file)


def add_file(path: Path) -> None:
    folder = path / "data" / "visits"
    shutil.copy(folder / "b.parquet", folder / "c.parquet")
    rewrite(folder / "c.parquet", lambda frame: frame.assign(n=9, made=stamps(9, 9)))


def redefine(path: Path, old: str, new: str) -> None:
    text = (path / "definitions.py").read_text()
    assert old in text
    (path / "definitions.py").write_text(text.replace(old, new))
    market.run_apply(path)


def change_view(path: Path, **changes: Any) -> None:
    store = FeastRepository.open(path).store()
    view = store.get_feature_view("spend")
    for name, value in changes.items():
        setattr(view, name, value)
    store.apply([view])


def add_to_service(path: Path) -> None:
    from feast import FeatureService

    store = FeastRepository.open(path).store()
    views = [store.get_feature_view(name) for name in ("visits", "weather", "clicks")]
    store.apply(
        [FeatureService(name="everything", features=[*views, store.get_on_demand_feature_view("rest")])]
    )


@pytest.mark.parametrize(
    ("move", "said"),
    [
        pytest.param(
            lambda path: rewrite(
                path / "data" / "spend.parquet", lambda f: f.assign(note=f["note"].str.upper())
            ),
            ["source spend data/spend.parquet: 4 rows", "-> 4 rows"],
            id="values of a source",
        ),
        pytest.param(
            lambda path: rewrite(
                path / "data" / "visits" / "b.parquet", lambda f: f.assign(made=stamps(5, 5))
            ),
            ["source visits data/visits/b.parquet"],
            id="one file of a folder",
        ),
        pytest.param(
            add_file,
            ["source visits data/visits/c.parquet: absent -> 2 rows"],
            id="a new file",
        ),
        pytest.param(
            lambda path: rewrite(path.parent / "rows.parquet", lambda f: f.head(3)),
            ["entities rows.parquet: 5 rows", "-> 3 rows"],
            id="entity rows",
        ),
        pytest.param(
            lambda path: change_view(path, ttl=timedelta(hours=1)),
            ["definition view spend"],
            id="a ttl",
        ),
        pytest.param(
            lambda path: redefine(path, 'inputs["budget"] - inputs', 'inputs["budget"] + inputs'),
            ["definition on-demand view rest"],
            id="an on-demand function",
        ),
        pytest.param(
            add_to_service,
            ["definition service everything"],
            id="the service",
        ),
    ],
)  # fmt: skip
def test_what_moved_is_named(path: Path, move: Callable[[Path], Any], said: list[str]) -> None:
    lock = build(path)
    move(path)
    found = again(path, lock)
    assert not found.same
    assert found.content_digest is not None
    assert all(words in str(found.moved[0]) for words in said), found.moved
    assert len(found.moved) == (3 if "service" in said[0] else 1)


@pytest.mark.parametrize(
    ("gone", "said"),
    [("repo/data/spend.parquet", "source spend data/spend.parquet: 4 rows"), ("rows.parquet", "entities")],
)
def test_an_input_that_is_gone_is_named(path: Path, gone: str, said: str) -> None:
    lock = build(path)
    (path.parent / gone).unlink()
    found = again(path, lock)
    assert not found.same
    assert found.content_digest is None
    assert any(str(moved).startswith(said) for moved in found.moved)


def test_a_touched_file_is_named_and_changes_nothing(path: Path) -> None:
    lock = build(path)
    os.utime(path / "data" / "weather.parquet")
    change_view(path, description="Degrees.", owner="o@example.com")
    found = again(path, lock)
    assert found.same
    assert [moved.kind for moved in found.moved] == ["source"]


def test_another_library_version_is_named(path: Path) -> None:
    lock = build(path)
    raw = json.loads(lock.read_text())
    raw["libraries"]["duckdb"] = "0.1"
    raw["content_digest"] = "0" * 64
    lock.write_text(json.dumps(raw))
    found = again(path, lock)
    assert not found.same
    assert [(moved.kind, moved.name, moved.was) for moved in found.moved] == [("library", "duckdb", "0.1")]


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"lock_version": 99}', '{"lock_version": 1}'])
def test_a_file_that_is_no_lock_is_refused(path: Path, text: str | None) -> None:
    lock = path.parent / "set.lock.json"
    if text is not None:
        lock.write_text(text)
    with pytest.raises(InvalidLock):
        again(path, lock)


def test_a_failed_build_leaves_the_old_dataset(path: Path) -> None:
    lock = build(path)
    before = (path.parent / "set.parquet").read_bytes(), lock.read_bytes()
    with pytest.raises(EntityFrameError, match="no column budget"):
        build(path, entity_rows().drop(columns="budget"))
    assert ((path.parent / "set.parquet").read_bytes(), lock.read_bytes()) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.rename(columns={"event_timestamp": "at"}), "no column event_timestamp"),
        (lambda rows: rows.drop(columns="shop_id"), "no column shop_id"),
        (lambda rows: rows.rename(columns={"label": "spend__note"}), "named like features: spend__note"),
        (lambda rows: rows.assign(user_id=rows["user_id"].astype(str)), "'user_id' is VARCHAR"),
        (lambda rows: rows.assign(budget="x"), "'budget' is (large_)?string in .*, DOUBLE in"),
        (lambda rows: rows.assign(event_timestamp=1), "'event_timestamp' .* int64, which is no time"),
    ],
)
def test_entity_rows_that_do_not_fit_are_refused(path: Path, change: Any, said: str) -> None:
    with pytest.raises(EntityFrameError, match=said):
        training_dataset(FeastRepository.open(path), "everything", change(entity_rows()))


_REFUSED = """
import sys
from cli.main import main
sys.argv[1:] = ["--repo", "repo", "dataset", "--service", "everything", "--entities", "rows.parquet",
                "--output", "set.parquet"]
try:
    main()
finally:
    assert "feast" not in sys.modules
"""


def test_the_command_names_what_is_missing_before_it_loads_feast(path: Path) -> None:
    entity_rows().drop(columns="budget").to_parquet(path.parent / "rows.parquet")
    done = subprocess.run(
        [sys.executable, "-c", _REFUSED], cwd=path.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "Error (entity_frame_error): The entity rows have no column budget.",
        "  everything needs event_timestamp, the time of each row; the join keys user_id (INT64), "
        "shop_id (STRING); the request-time inputs budget (DOUBLE).",
    ]


def test_only_an_earlier_dataset_is_overwritten(path: Path) -> None:
    """Not the entity rows, nor any other file that happens to have the name."""
    lock = build(path)
    assert build(path) == lock
    rows = path.parent / "rows.parquet"
    for entities in (rows, entity_rows()):
        with pytest.raises(Conflict, match=r"rows\.parquet"):
            training_dataset(FeastRepository.open(path), "everything", entities, output=rows)
    assert pd.read_parquet(rows).equals(entity_rows())


def test_an_unknown_service_is_refused(path: Path) -> None:
    with pytest.raises(FeatureServiceNotFound):
        training_dataset(FeastRepository.open(path), "nothing", entity_rows())


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return market.apply(tmp_path_factory.mktemp("stock") / "repo", offline="type: dask")


def in_stock(path: Path, rows: pd.DataFrame) -> Any:
    from contextlib import chdir

    # Feast's stores take relative paths from where they run.
    with chdir(path):
        return training_dataset(FeastRepository.open(path), "pair", rows)


def test_a_store_that_reorders_is_put_right(stock: Path) -> None:
    rows = pd.DataFrame(
        {
            "buyer_id": [1, 2, 1],
            "seller_id": [2, 2, 2],
            "event_timestamp": stamps(1.5, 1, 1),
            "label": list("abc"),
        }
    )
    dataset = in_stock(stock, rows)
    assert dataset.frame["label"].tolist() == ["a", "b", "c"]
    assert dataset.frame["buyer__amount"].tolist() == [11.0, 20.0, 11.0]
    assert dataset.lock.offline_store == "dask"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param({"buyer_id": [1, 1], "event_timestamp": stamps(1, 9)}, id="expired"),
        pytest.param({"buyer_id": [1, 1], "event_timestamp": stamps(1, -9)}, id="only later events"),
        pytest.param({"buyer_id": [1, 1], "event_timestamp": stamps(1, 1)}, id="two alike"),
    ],
)
def test_a_store_that_loses_rows_is_an_error(stock: Path, rows: dict[str, Any]) -> None:
    """Feast's default store loses each of these without a word."""
    with pytest.raises(DatasetMismatch, match="returned 1 rows for 2"):
        in_stock(stock, pd.DataFrame({**rows, "seller_id": 2}))


def test_entity_rows_keep_types_that_pandas_has_not(path: Path) -> None:
    rows = pa.table(
        {
            "user_id": pa.array([1, None], pa.int32()),
            "shop_id": pa.array(["x", "y"], pa.large_string()),
            "budget": [1.0, 2.0],
            "event_timestamp": pa.array([START, START + DAY], pa.timestamp("ms", "Asia/Tokyo")),
            "when": pa.array([timedelta(1), None], pa.duration("ns")),
        }
    )
    dataset = training_dataset(FeastRepository.open(path), "everything", rows)
    assert dataset.table.select(rows.column_names).equals(rows)
