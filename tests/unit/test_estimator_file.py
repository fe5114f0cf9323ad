"""Estimators as files: what reading one may do, and who says so."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from core import estimator_file
from core.errors import DigestMismatch, InvalidManifest, PickleRefused, UntrustedType
from core.manifest import BASELINE_FILE, MODEL_FILE, SKOPS_FILE, CompiledForm, GoldenRow
from core.model import LoadedModel
from core.registry import ModelRegistry
from core.trust import Trust
from tests.support import packages

MATRIX = np.array([[1.0, 2.0], [3.0, 4.0], [0.5, 0.0], [2.0, 9.0]])
TARGET = MATRIX @ [1.0, 2.0]
TREE = "sklearn.tree._tree.Tree"


def register(registry: ModelRegistry, file: str, estimator: Any) -> None:
    """A version that is served by scikit-learn, from this file."""
    content = estimator if isinstance(estimator, bytes) else estimator_file.dump(estimator, file)
    packages.register(
        registry,
        {file: content, BASELINE_FILE: b"rows"},
        compiled=CompiledForm("sklearn", file, 0.0, True, 4),
        golden=(GoldenRow({"account__spend": 3.0, "account__visits": 4}, 11.0, None),),
    )


def load(registry: ModelRegistry) -> LoadedModel:
    return LoadedModel.load(registry, "churn", 1, packages.SCHEMA)


@pytest.mark.parametrize("file", [MODEL_FILE, SKOPS_FILE])
def test_a_stored_estimator_predicts_what_it_did(tmp_path: Path, file: str) -> None:
    registry = ModelRegistry(str(tmp_path), Trust(unpickle=file == MODEL_FILE))
    estimator = make_pipeline(StandardScaler(), LinearRegression()).fit(MATRIX, TARGET)
    register(registry, file, estimator)
    assert load(registry).predict(MATRIX).labels == estimator.predict(MATRIX).tolist()


def test_nothing_is_unpickled_where_that_is_off(tmp_path: Path) -> None:
    registry = ModelRegistry(str(tmp_path / "models"), Trust.of(unpickle=False))
    register(registry, MODEL_FILE, pickle.dumps(packages.Bomb(tmp_path / "fired")))
    with pytest.raises(PickleRefused, match="BANQUET_ALLOW_PICKLE") as caught:
        load(registry)
    assert caught.value.code == "pickle_refused"
    assert not (tmp_path / "fired").exists()


def test_a_pickle_under_the_name_of_a_skops_file_is_not_run(tmp_path: Path) -> None:
    registry = ModelRegistry(str(tmp_path / "models"))
    register(registry, SKOPS_FILE, pickle.dumps(packages.Bomb(tmp_path / "fired")))
    with pytest.raises(DigestMismatch, match="not in skops' format"):
        load(registry)
    assert not (tmp_path / "fired").exists()


def test_a_type_that_is_not_trusted_is_named_and_trusted_by_a_setting(tmp_path: Path) -> None:
    estimator = RandomForestRegressor(3, random_state=0, bootstrap=False).fit(MATRIX, TARGET)
    registry = ModelRegistry(str(tmp_path), Trust.of(skops_types="some.Other"))
    register(registry, SKOPS_FILE, estimator)
    with pytest.raises(UntrustedType, match=TREE) as caught:
        load(registry)
    assert caught.value.details["types"] == [TREE]
    assert "BANQUET_SKOPS_TRUSTED" in (caught.value.hint or "")
    trusting = ModelRegistry(str(tmp_path), Trust.of(skops_types=f"some.Other, {TREE}"))
    assert load(trusting).predict(MATRIX).labels == estimator.predict(MATRIX).tolist()


def test_a_function_in_a_skops_file_is_not_called(tmp_path: Path) -> None:
    """What a pickle would hide in an estimator: a function of an installed module that writes a file."""
    registry = ModelRegistry(str(tmp_path / "models"))
    estimator = make_pipeline(FunctionTransformer(np.save), LinearRegression())
    register(registry, SKOPS_FILE, estimator)
    with pytest.raises(UntrustedType, match=r"numpy\.save"):
        load(registry)


def test_a_compiled_model_is_served_without_reading_its_estimator(tmp_path: Path) -> None:
    registry = ModelRegistry(str(tmp_path / "models"), Trust.of(unpickle=False))
    bomb = pickle.dumps(packages.Bomb(tmp_path / "fired"))
    files = {MODEL_FILE: bomb, BASELINE_FILE: b"rows", packages.GRAPH_FILE: packages.linear_graph((1.0, 2.0))}
    packages.register(registry, files)
    assert load(registry).predict(MATRIX).labels == TARGET.tolist()
    assert not (tmp_path / "fired").exists()


def test_a_package_holds_its_estimator_once(tmp_path: Path) -> None:
    """Else what is checked and what is read could be two files."""
    for files in (
        {MODEL_FILE: b"a", SKOPS_FILE: b"b", packages.GRAPH_FILE: b"c"},
        {packages.GRAPH_FILE: b"c"},
    ):
        with pytest.raises(InvalidManifest, match="digest"):
            packages.register(ModelRegistry(str(tmp_path)), files)
    with pytest.raises(InvalidManifest, match="not the estimator"):
        packages.register(
            ModelRegistry(str(tmp_path)), compiled=CompiledForm("sklearn", packages.GRAPH_FILE, 0.0, True, 0)
        )
