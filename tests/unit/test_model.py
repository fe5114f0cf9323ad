"""A loaded package: what it refuses to load, the matrix by name, policies, predictions."""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import DigestMismatch, GoldenMismatch, LibraryMismatch, SchemaMismatch
from core.manifest import (
    MODEL_FILE,
    CompiledForm,
    Default,
    GoldenRow,
    ModelManifest,
    Policy,
    ServedFeature,
    ServiceSchema,
)
from core.model import LoadedModel, MatrixBuilder
from core.registry import ModelRegistry
from core.types import Dtype, Field
from tests.support import packages

Array = NDArray[Any]
NAN = math.nan


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(str(tmp_path))


# Loading


def test_a_sound_package_loads_and_predicts(registry: ModelRegistry) -> None:
    packages.register_linear(registry)
    model = LoadedModel.load(registry, "churn", 1, packages.SCHEMA)
    matrix = model.matrix({"account__visits": [1, 2], "account__spend": [10.0, 20.0]}, 2)
    assert model.predict(matrix).labels == [12.0, 24.0]


@pytest.mark.parametrize("recorded_form", ["onnx", "sklearn"])
def test_a_swapped_pickle_is_refused_before_it_can_run(
    registry: ModelRegistry, tmp_path: Path, recorded_form: str
) -> None:
    artifact = MODEL_FILE if recorded_form == "sklearn" else packages.GRAPH_FILE
    packages.register_linear(registry, compiled=CompiledForm(recorded_form, artifact, 0.0, True, 0))  # type: ignore[arg-type]
    fired = tmp_path / "fired"
    (tmp_path / "churn/1" / MODEL_FILE).write_bytes(pickle.dumps(packages.Bomb(fired)))
    with pytest.raises(DigestMismatch, match=MODEL_FILE):
        LoadedModel.load(registry, "churn", 1, packages.SCHEMA)
    assert not fired.exists()


def schema(**changes: Any) -> ServiceSchema:
    return replace(packages.SCHEMA, **changes)


SPEND, VISITS = packages.SCHEMA.features
OTHER_SCHEMAS = {
    "account__visits is gone": schema(features=(SPEND,)),
    "account__age is new": schema(features=(SPEND, VISITS, ServedFeature("account__age", Dtype.INT64, 0.0))),
    "account__visits was INT64 and is STRING": schema(features=(SPEND, replace(VISITS, dtype=Dtype.STRING))),
    "the ttl of account__visits was 86400 s and is 60 s": schema(
        features=(SPEND, replace(VISITS, ttl_seconds=60.0))
    ),
    "the order of the features changed": schema(features=(VISITS, SPEND)),
    "the join keys were user_id (INT64) and are user_id (STRING)": schema(
        join_keys=(Field("user_id", Dtype.STRING),)
    ),
    "the request-time inputs were basket_value (DOUBLE) and are none": schema(request_inputs=()),
    "the feature service is churn_v2": schema(service="churn_v2"),
}


@pytest.mark.parametrize("difference", OTHER_SCHEMAS)
def test_a_model_for_other_features_is_refused_and_told_which(
    registry: ModelRegistry, difference: str
) -> None:
    packages.register_linear(registry)
    with pytest.raises(SchemaMismatch) as caught:
        LoadedModel.load(registry, "churn", 1, OTHER_SCHEMAS[difference])
    assert difference in caught.value.message
    assert caught.value.details["differences"] == [difference]
    assert caught.value.hint


AGE = ServedFeature("account__age", Dtype.INT64, 86400.0)
RENAMED = {
    "the place": (
        schema(features=(SPEND, replace(VISITS, name="account__calls"))),
        ["account__visits is gone, probably renamed to account__calls"],
    ),
    "the name in another view": (
        schema(features=(replace(VISITS, name="usage__visits"), AGE, replace(SPEND, name="usage__spend"))),
        [
            "account__age is new",
            "account__spend is gone, probably renamed to usage__spend",
            "account__visits is gone, probably renamed to usage__visits",
        ],
    ),
    "the only one": (
        schema(features=(replace(VISITS, name="account__calls"), SPEND)),
        ["account__visits is gone, probably renamed to account__calls"],
    ),
    "nothing: another type": (
        schema(features=(SPEND, replace(VISITS, name="account__calls", dtype=Dtype.STRING))),
        ["account__calls is new", "account__visits is gone"],
    ),
    "nothing: another ttl": (
        schema(features=(SPEND, replace(VISITS, name="account__calls", ttl_seconds=0.0))),
        ["account__calls is new", "account__visits is gone"],
    ),
    "nothing: two it could be": (
        schema(features=(replace(VISITS, name="account__calls"), SPEND, AGE)),
        ["account__age is new", "account__calls is new", "account__visits is gone"],
    ),
}


@pytest.mark.parametrize("told_by", RENAMED)
def test_a_renamed_feature_is_named_as_probably_renamed(registry: ModelRegistry, told_by: str) -> None:
    packages.register_linear(registry)
    serves, differences = RENAMED[told_by]
    with pytest.raises(SchemaMismatch) as caught:
        LoadedModel.load(registry, "churn", 1, serves)
    assert caught.value.details["differences"] == differences


def test_without_scikit_learn_a_compiled_model_loads_and_another_is_refused(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("core.model.version", absent)
    packages.register_linear(registry, libraries={"scikit-learn": "1.7.0"})
    assert LoadedModel.load(registry, "churn", 1, packages.SCHEMA)
    packages.register(
        registry,
        libraries={"scikit-learn": "1.7.0"},
        compiled=CompiledForm("sklearn", MODEL_FILE, 0.0, True, 0),
    )
    with pytest.raises(LibraryMismatch, match=r"scikit-learn 1\.7\.0; here is none") as caught:
        LoadedModel.load(registry, "churn", 2, packages.SCHEMA)
    assert "scikit-learn==1.7.0" in (caught.value.hint or "")


def test_another_scikit_learn_is_refused_and_names_both(registry: ModelRegistry) -> None:
    packages.register_linear(registry, libraries={"scikit-learn": "0.1"})
    with pytest.raises(LibraryMismatch, match=rf"scikit-learn 0\.1; here is {version('scikit-learn')}"):
        LoadedModel.load(registry, "churn", 1, packages.SCHEMA)


def test_a_model_that_predicts_otherwise_than_recorded_is_refused(registry: ModelRegistry) -> None:
    packages.register_linear(registry, weights=(1.0, 2.001))
    with pytest.raises(GoldenMismatch, match=r"golden row 0: it differs by 0\.00036") as caught:
        LoadedModel.load(registry, "churn", 1, packages.SCHEMA)
    assert caught.value.details["row"] == 0


def test_a_model_that_predicts_nan_is_refused(registry: ModelRegistry) -> None:
    packages.register_linear(registry, weights=(1.0, NAN))
    with pytest.raises(GoldenMismatch, match="golden row 0: it fails, or gives no number"):
        LoadedModel.load(registry, "churn", 1, packages.SCHEMA)


def test_the_checks_come_in_the_order_of_the_contract(registry: ModelRegistry, tmp_path: Path) -> None:
    """A package with every fault shows the first; each one mended shows the next."""
    faulty = {"libraries": {"scikit-learn": "0.1"}, "weights": (5.0, 5.0)}
    packages.register_linear(registry, **faulty)
    baseline = tmp_path / "churn/1/baseline.parquet"
    sound = baseline.read_bytes()
    baseline.write_bytes(b"altered")
    other = schema(service="other")
    with pytest.raises(DigestMismatch):
        LoadedModel.load(registry, "churn", 1, other)
    baseline.write_bytes(sound)
    with pytest.raises(SchemaMismatch):
        LoadedModel.load(registry, "churn", 1, other)
    with pytest.raises(LibraryMismatch):
        LoadedModel.load(registry, "churn", 1, packages.SCHEMA)
    packages.register_linear(registry, weights=(5.0, 5.0))
    with pytest.raises(GoldenMismatch):
        LoadedModel.load(registry, "churn", 2, packages.SCHEMA)


# The matrix


def builder(
    dtypes: Mapping[str, Dtype],
    vocabulary: Mapping[str, tuple[str, ...]] | None = None,
    policies: Mapping[str, Policy] | None = None,
) -> MatrixBuilder:
    features = [ServedFeature(name, dtype, 0.0) for name, dtype in dtypes.items()]
    return MatrixBuilder(features, vocabulary or {}, policies or {})


def column(dtype: Dtype, values: list[Any], **options: Any) -> list[float]:
    built = builder({"f": dtype}, **options).build({"f": values}, len(values))
    assert built.dtype == np.float64
    assert built.flags.c_contiguous
    return [float(value) for value in built[:, 0]]


def same(found: list[float], expected: list[float]) -> bool:
    return all(a == b or (a != a and b != b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [Dtype.INT32, Dtype.INT64, Dtype.DOUBLE, Dtype.FLOAT])
def test_numbers_stay_and_missing_ones_are_nan(dtype: Dtype) -> None:
    assert same(column(dtype, [1, None, -3, NAN]), [1.0, NAN, -3.0, NAN])


def test_infinities_are_missing() -> None:
    assert same(column(Dtype.DOUBLE, [math.inf, -math.inf, 1e308]), [NAN, NAN, 1e308])


def test_a_float32_feature_is_rounded_as_redis_holds_it() -> None:
    assert column(Dtype.FLOAT, [0.1]) == [float(np.float32(0.1))]
    assert same(column(Dtype.FLOAT, [1e300]), [NAN])
    assert column(Dtype.DOUBLE, [0.1]) == [0.1]


def test_booleans_are_zero_and_one() -> None:
    assert same(column(Dtype.BOOL, [True, False, None]), [1.0, 0.0, NAN])


def test_strings_are_their_place_in_the_vocabulary() -> None:
    found = column(Dtype.STRING, ["b", "a", None, "unseen", ""], vocabulary={"f": ("a", "b")})
    assert same(found, [1.0, 0.0, NAN, NAN, NAN])


def test_timestamps_are_whole_epoch_seconds() -> None:
    east = timezone(timedelta(hours=9))
    values = [
        datetime(1970, 1, 1, 0, 1, tzinfo=UTC),
        datetime(1970, 1, 1, 9, 1, tzinfo=east),
        datetime(1970, 1, 1, 0, 1, 0, 999_999),  # noqa: DTZ001 — no zone is UTC, as Feast reads it
        datetime(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC),
        60,
        None,
    ]
    assert same(column(Dtype.UNIX_TIMESTAMP, values), [60.0, 60.0, 60.0, -1.0, 60.0, NAN])


def test_a_default_replaces_what_is_missing_and_nothing_else() -> None:
    number: dict[str, Policy] = {"f": Default(7)}
    assert column(Dtype.DOUBLE, [None, NAN, math.inf, 0.0], policies=number) == [7.0, 7.0, 7.0, 0.0]
    assert column(Dtype.BOOL, [None, False], policies={"f": Default(True)}) == [1.0, 0.0]
    text: dict[str, Policy] = {"f": Default("b")}
    found = column(Dtype.STRING, [None, "a", "unseen"], vocabulary={"f": ("a", "b")}, policies=text)
    assert same(found, [1.0, 0.0, NAN])


MIXED = {
    "v__double": Dtype.DOUBLE,
    "v__int": Dtype.INT64,
    "v__text": Dtype.STRING,
    "w__flag": Dtype.BOOL,
    "w__when": Dtype.UNIX_TIMESTAMP,
}
ROWS = st.lists(
    st.tuples(
        st.none() | st.floats(allow_infinity=False),
        st.none() | st.integers(-(2**53), 2**53),
        st.none() | st.sampled_from(["a", "b", "unseen"]),
        st.none() | st.booleans(),
        st.none() | st.integers(0, 2**40),
    ),
    min_size=1,
    max_size=6,
)


@given(ROWS, st.randoms(use_true_random=False))
def test_columns_are_found_by_name_and_rows_do_not_mix(
    rows: list[tuple[Any, ...]], rng: random.Random
) -> None:
    """Shuffled columns give the same matrix, and each row is what it is alone."""
    build = builder(MIXED, {"v__text": ("a", "b")}).build
    columns = {name: [row[i] for row in rows] for i, name in enumerate(MIXED)}
    matrix = build(columns, len(rows))
    names = [*MIXED, "x__not_a_feature"]
    rng.shuffle(names)
    shuffled = {name: columns.get(name, ["noise"] * len(rows)) for name in names}
    assert np.array_equal(build(shuffled, len(rows)), matrix, equal_nan=True)
    for i, row in enumerate(rows):
        alone = build({name: [value] for name, value in zip(MIXED, row, strict=True)}, 1)
        assert np.array_equal(alone[0], matrix[i], equal_nan=True)


def test_arrays_give_what_lists_give() -> None:
    build = builder({"a": Dtype.DOUBLE, "b": Dtype.INT64}).build
    lists = build({"a": [1.0, None], "b": [3, 4]}, 2)
    arrays = build({"a": np.array([1.0, NAN]), "b": np.array([3, 4])}, 2)  # type: ignore[dict-item]
    assert np.array_equal(lists, arrays, equal_nan=True)


def test_no_rows_make_an_empty_matrix() -> None:
    assert builder(MIXED, {"v__text": ()}).build({name: [] for name in MIXED}, 0).shape == (0, 5)


def test_a_thousand_rows_take_milliseconds() -> None:
    """Of processor time: only a change of kind (work per row and feature in Python) would break the bound."""
    dtypes = {f"v__{i}": Dtype.DOUBLE for i in range(20)}
    build, columns = builder(dtypes).build, {name: [1.0] * 1000 for name in dtypes}
    seconds = []
    for _ in range(20):
        started = time.thread_time()
        build(columns, 1000)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.02


# Policies and predictions


class Fixed:
    """A runner that gives the scores it was made with."""

    def __init__(self, scores: Any) -> None:
        self._scores = np.array(scores)

    def scores(self, matrix: Array) -> Array:
        return self._scores[: len(matrix)]


def loaded(scores: Any = (), **changes: Any) -> LoadedModel:
    return LoadedModel(packages.manifest(golden=(), **changes), Fixed(scores))


def test_reject_names_the_rows_and_their_missing_features() -> None:
    model = loaded(policies={"account__spend": "reject", "account__visits": "reject"})
    values = {"account__spend": [1.0, None, NAN, None], "account__visits": [1, 1, 1, None]}
    assert model.rejected(values, 4) == {
        1: ["account__spend"],
        2: ["account__spend"],
        3: ["account__spend", "account__visits"],
    }


def test_without_reject_no_row_is_rejected() -> None:
    model = loaded(policies={"account__spend": "pass", "account__visits": Default(0)})
    assert model.rejected({"account__spend": [None], "account__visits": [None]}, 1) == {}


ONE = np.zeros((1, 2))


def classifier(scores: Any, classes: tuple[Any, ...], threshold: float | None = None) -> LoadedModel:
    return loaded(scores, task="classification", classes=classes, threshold=threshold)


def test_a_classifier_gives_its_likeliest_class_and_that_classs_probability() -> None:
    found = classifier([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]], ("a", "b", "c")).predict(np.zeros((2, 2)))
    assert found.labels == ["b", "a"]
    assert found.confidences == [0.7, 0.5]
    assert found.probabilities is not None
    assert found.probabilities.shape == (2, 3)


@pytest.mark.parametrize(
    ("threshold", "label", "confidence"), [(None, 0, 0.7), (0.3, 1, 0.3), (0.31, 0, 0.7)]
)
def test_a_threshold_decides_in_the_place_of_the_likeliest(
    threshold: float | None, label: int, confidence: float
) -> None:
    found = classifier([[0.7, 0.3]], (0, 1), threshold).predict(ONE)
    assert (found.labels, found.confidences) == ([label], [confidence])


@pytest.mark.parametrize("classes", [(0, 1), (False, True), ("no", "yes"), (0.0, 1.0)])
def test_labels_are_the_classes_themselves(classes: tuple[Any, ...]) -> None:
    found = classifier([[0.1, 0.9]], classes).predict(ONE).labels
    assert found == [classes[1]]
    assert type(found[0]) is type(classes[1])


def test_a_model_without_probabilities_has_no_confidence() -> None:
    found = classifier([1, 0], ("no", "yes")).predict(np.zeros((2, 2)))
    assert (found.labels, found.confidences, found.probabilities) == (["yes", "no"], None, None)
    assert loaded([1.5]).predict(ONE).confidences is None


class Fragile:
    """An estimator that takes no NaN, as many do: it fails as a whole when a row has one."""

    def __init__(self, gives: str) -> None:
        self.gives = gives

    def scores(self, matrix: Array) -> Array:
        if np.isnan(matrix).any():
            raise ValueError("Input X contains NaN.")
        found = matrix[:, 0]
        if self.gives == "probabilities":
            return np.column_stack([1 - found, found])
        return found.astype(np.int64) if self.gives == "classes" else found


@pytest.mark.parametrize("gives", ["probabilities", "classes", "values"])
@pytest.mark.parametrize("bad", [[0], [6], [2, 3], [0, 1, 4, 6], list(range(7))])
def test_a_row_that_the_model_fails_on_spoils_no_other(gives: str, bad: list[int]) -> None:
    classes = () if gives == "values" else ("no", "yes")
    task = "classification" if classes else "regression"
    model = LoadedModel(packages.manifest(golden=(), task=task, classes=classes), Fragile(gives))
    matrix = np.ones((7, 2))
    matrix[bad, 0] = NAN
    found = model.predict(matrix)
    assert sorted(found.errors) == bad
    assert str(found.errors[bad[0]].__cause__) == "Input X contains NaN."
    good = [row for row in range(7) if row not in bad]
    assert len(found.labels) == 7
    assert [found.labels[row] for row in good] == ["yes" if classes else 1.0] * len(good)
    if gives == "probabilities":
        assert found.confidences is not None
        assert found.probabilities is not None
        assert [found.confidences[row] for row in good] == [1.0] * len(good)
        assert found.probabilities.shape == (7, 2)


def test_a_row_without_a_number_is_an_error() -> None:
    found = classifier([[0.5, 0.5], [NAN, NAN], [0.1, math.inf]], (0, 1)).predict(np.zeros((3, 2)))
    assert sorted(found.errors) == [1, 2]
    assert sorted(loaded([1.0, NAN]).predict(np.zeros((2, 2))).errors) == [1]
    assert not loaded([1.0, 2.0]).predict(np.zeros((2, 2))).errors


def test_golden_rows_of_a_classifier_are_held_to_their_probabilities() -> None:
    values = {"account__spend": 1.0, "account__visits": 1}

    def check(scores: list[list[float]]) -> None:
        manifest: ModelManifest = packages.manifest(
            task="classification", classes=(0, 1), golden=(GoldenRow(values, 1, (0.25, 0.75)),)
        )
        LoadedModel(manifest, Fixed(scores)).check_golden()

    check([[0.25, 0.75]])
    check([[0.25 + 1e-6, 0.75 - 1e-6]])
    with pytest.raises(GoldenMismatch):
        check([[0.26, 0.74]])
    with pytest.raises(GoldenMismatch):
        check([[NAN, NAN]])
