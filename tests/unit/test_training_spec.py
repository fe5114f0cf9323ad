"""The model spec: what it refuses, and how it is found."""

from __future__ import annotations

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from core.errors import InvalidModelSpec
from training.spec import Default, MatrixColumns, ModelSpec, load_spec

WEEK = timedelta(weeks=1)


def spec(**changes: Any) -> ModelSpec:
    described: dict[str, Any] = {
        "name": "churn",
        "service": "churn_v1",
        "entities": "labels.parquet",
        "label": "left",
        "build": lambda columns: None,
        "holdout": WEEK,
    }
    return ModelSpec(**{**described, **changes})


def test_a_function_stays_a_function() -> None:
    """A dataclass attribute that is a function must not become a method."""
    assert spec(build=lambda columns: columns).build("the columns") == "the columns"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../churn"}, "cannot name a model"),
        ({"service": ""}, "service must be"),
        ({"label": 5}, "label must be"),
        ({"build": None}, "build must be callable"),
        ({"entities": 5}, "entities must be"),
        ({"task": "ranking"}, "task must be"),
        ({"holdout": 7}, "holdout must be a datetime.timedelta"),
        ({"holdout": timedelta(0)}, "longer than zero"),
        ({"label_horizon": -WEEK}, "must not be negative"),
        ({"label_horizon": None}, "label_horizon must be"),
        ({"calibration": timedelta(0)}, "calibration must be positive"),
        ({"calibration": WEEK, "task": "regression"}, "classifiers only"),
        ({"calibration_method": "platt"}, "calibration_method"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"threshold": 0.5, "task": "regression"}, "binary classifiers"),
        ({"policy": {"v__f": "ignore"}}, "policy of 'v__f'"),
        ({"policy": {"v__f": 0.0}}, r"Default\(value\)"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidModelSpec, match=says):
        spec(**changes)


def test_a_sound_spec_with_everything() -> None:
    full = spec(
        calibration=WEEK,
        calibration_method="isotonic",
        label_horizon=timedelta(days=7),
        policy={"v__a": "reject", "v__b": Default(0.0), "v__c": "pass"},
        threshold=0.3,
        recency_feature="v__a",
        description="Who leaves.",
    )
    assert full.policy["v__b"] == Default(0.0)


COLUMNS = MatrixColumns(("v__age", "v__city", "v__spend", "v__plan"), {"v__city": ("a", "b"), "v__plan": ()})


def test_columns_know_their_positions_and_codes() -> None:
    assert COLUMNS.index("v__spend") == 2
    assert COLUMNS.numeric == [0, 2]
    assert COLUMNS.categorical == [1, 3]
    assert COLUMNS.category_codes == [[0.0, 1.0], []]
    with pytest.raises(InvalidModelSpec, match="no feature 'v__spent'") as caught:
        COLUMNS.index("v__spent")
    assert "v__spend" in (caught.value.hint or "")


_FILE = """
from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from helper_of_the_spec import LABEL
from training.spec import ModelSpec


@dataclass
class Estimator:
    depth: int = 3


made = Estimator()
day = timedelta(days=1)
churn = ModelSpec(name="churn", service="s", entities="e.csv", label=LABEL, build=lambda c: made, holdout=day)
other = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_the_spec.py").write_text('LABEL = "left"\n')
    path = tmp_path / "my model.py"
    path.write_text(_FILE)
    return path


def test_a_spec_is_found_in_a_file_with_its_neighbours(file: Path) -> None:
    found = load_spec(f"{file}:churn")
    assert (found.name, found.label) == ("churn", "left")
    assert str(file.parent) not in sys.path


def test_a_spec_is_found_in_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.rename(file.with_name("model_in_a_module.py"))
    monkeypatch.syspath_prepend(file.parent)
    assert load_spec("model_in_a_module:churn").name == "churn"


def test_a_file_relative_to_the_working_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load_spec("my model.py:churn").name == "churn"


def test_what_a_file_defines_cannot_be_pickled(file: Path) -> None:
    """So that a model which could not be loaded elsewhere is refused here."""
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(load_spec(f"{file}:churn").build(COLUMNS))


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("churn", "does not name a model spec"),
        ("model.py", "does not name a model spec"),
        (":churn", "does not name a model spec"),
        ("model.py:not a name", "does not name a model spec"),
        ("no_such_module_here:churn", "no module named 'no_such_module_here'"),
        ("/no/such/file.py:churn", "There is no file '/no/such/file.py'"),
    ],
)
def test_a_reference_to_nothing_says_what_is_missing(reference: str, says: str) -> None:
    with pytest.raises(InvalidModelSpec, match=says):
        load_spec(reference)


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("chum", "has no 'chum'", "Its model specs: churn."),
        ("other", "is a int; a training.spec.ModelSpec", None),
    ],
)
def test_a_wrong_name_in_a_file_lists_the_right_ones(
    file: Path, name: str, says: str, hint: str | None
) -> None:
    with pytest.raises(InvalidModelSpec, match=says) as caught:
        load_spec(f"{file}:{name}")
    assert caught.value.hint == hint


def test_a_file_that_fails_says_how(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("spec = 1 / 0\n")
    with pytest.raises(InvalidModelSpec, match="ZeroDivisionError: division by zero"):
        load_spec(f"{path}:spec")


def test_a_files_missing_import_is_named(tmp_path: Path) -> None:
    path = tmp_path / "importing.py"
    path.write_text("import a_package_nobody_has\n")
    with pytest.raises(InvalidModelSpec, match="a_package_nobody_has"):
        load_spec(f"{path}:spec")


def test_openmp_threads_are_told_to_sleep_before_the_spec_imports_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    path = tmp_path / "looks.py"
    path.write_text('import os\nfound = os.environ["OMP_WAIT_POLICY"]\n')
    with pytest.raises(InvalidModelSpec, match="is a str"):
        load_spec(f"{path}:found")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
