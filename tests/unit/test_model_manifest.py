"""The manifest: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidManifest
from core.manifest import Default, GoldenRow, ModelManifest, ServedFeature, finite_or_none
from core.types import Dtype, Field
from tests.support import packages

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
MOMENTS = st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.replace(fold=0))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5)


@st.composite
def manifests(draw: st.DrawFn) -> ModelManifest:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    dtypes = [draw(st.sampled_from([Dtype.DOUBLE, Dtype.STRING, Dtype.BOOL])) for _ in names]
    features = tuple(ServedFeature(n, d, draw(FLOATS)) for n, d in zip(names, dtypes, strict=True))
    classes = draw(st.sampled_from([(), (0, 1), (False, True), ("a", "b", "c"), (0.5, 1.5)]))
    policy = st.sampled_from(["pass", "reject"]) | st.builds(Default, FLOATS | st.integers() | st.booleans())
    probability = st.tuples(*[FLOATS for _ in classes]) if classes else st.none()
    golden = st.builds(
        GoldenRow, st.fixed_dictionaries(dict.fromkeys(names, SCALARS)), SCALARS, st.none() | probability
    )
    schema = packages.SCHEMA
    return packages.manifest(
        draw(st.integers(1, 10**6)),
        created=draw(MOMENTS),
        task="classification" if classes else "regression",
        classes=classes,
        threshold=draw(st.none() | FLOATS) if len(classes) == 2 else None,
        schema=type(schema)(draw(NAMES), features, (Field(draw(NAMES), Dtype.INT64),), ()),
        policies=draw(st.dictionaries(st.sampled_from(names), policy)),
        vocabulary={
            n: tuple(draw(st.lists(NAMES, max_size=3)))
            for n, d in zip(names, dtypes, strict=True)
            if d is Dtype.STRING
        },
        metrics=draw(st.dictionaries(NAMES, SCALARS | st.lists(SCALARS))),
        golden=tuple(draw(st.lists(golden, max_size=2))),
    )


@settings(max_examples=50)
@given(manifests())
def test_what_is_written_is_read_back(manifest: ModelManifest) -> None:
    found = ModelManifest.from_json(manifest.to_json())
    assert found == manifest
    # 1 == True == 1.0 in Python and not in JSON.
    assert repr(found) == repr(manifest)


def test_moments_are_written_in_utc() -> None:
    there = datetime(2026, 5, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    tree = json.loads(packages.manifest(created=there).to_json())
    assert tree["created"] == "2026-05-01T12:00:00+00:00"
    assert tree["schema"]["features"][0] == {
        "name": "account__spend",
        "dtype": "DOUBLE",
        "ttl_seconds": 86400.0,
    }


def edited(*path: str | int, to: Any = None, remove: bool = False) -> str:
    """The manifest's JSON with one place changed."""
    tree = json.loads(packages.manifest().to_json())
    place = tree
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (edited("surprise", to=1), "surprise"),
        (edited("window", "surprise", to=1), "manifest.window lacks or should not have: surprise"),
        (edited("label", remove=True), "label"),
        (edited("golden", 0, "prediction", remove=True), r"manifest.golden\[0\]"),
        (edited("version", to="1"), "manifest.version should be a int, not str"),
        (edited("version", to=True), "manifest.version"),
        (edited("version", to=1.0), "manifest.version"),
        (edited("version", to=0), "positive"),
        (edited("schema_version", to=2), "schema_version is 2, this release reads 1"),
        (edited("task", to="clustering"), "one of classification, regression"),
        (edited("task", to="classification"), "two or more classes"),
        (edited("classes", to=[0, 1]), "a regressor has no classes"),
        (edited("created", to="2026-05-01T12:00:00"), "UTC offset"),
        (edited("created", to="yesterday"), "ISO 8601"),
        (edited("created", to=5), "ISO 8601"),
        (edited("schema", "features", 0, "dtype", to="FLOAT128"), "name of a Dtype"),
        (edited("schema", "features", 0, "dtype", to=5), "name of a Dtype"),
        (edited("schema", "features", to={}), "a list"),
        (edited("schema", "features", to=[]), "empty"),
        (edited("schema", "features", 1, "name", to="account__spend"), "repeated"),
        (edited("policies", to={"account__spend": "ignore"}), "manifest.policies.account__spend"),
        (edited("policies", to={"account__spend": {"default": None}}), "manifest.policies.account__spend"),
        (edited("policies", to={"nobody": "reject"}), "unknown features"),
        (edited("vocabulary", to={"account__spend": ["a"]}), "vocabulary"),
        (edited("threshold", to=0.5), "two classes"),
        (edited("name", to="../churn"), "not a model name"),
        (edited("artifacts", "../../etc/passwd", to="0" * 64), "not a file name"),
        (edited("artifacts", "manifest.json", to="0" * 64), "a digest of itself"),
        (edited("artifacts", "model.joblib", to="abc"), "not a sha256"),
        (edited("artifacts", "model.joblib", remove=True), "no digest of model.joblib"),
        (edited("compiled", "artifact", to="other.onnx"), "no digest of the compiled form"),
        (edited("compiled", "form", to="torch"), "one of onnx"),
        (edited("golden", 0, "features", to={}), "golden rows lack features"),
        (edited("golden", 0, "probabilities", to=[0.5, 0.5]), "golden rows have other classes"),
        (edited("metrics", to=[]), "an object"),
        ("{}", "manifest lacks"),
        ("[]", "manifest should be an object"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ("\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"name": "a", "name": "b"}', "a key is repeated"),
        ('{"threshold": NaN}', "NaN is not JSON"),
    ],
)
def test_a_manifest_that_is_not_exactly_one_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(InvalidManifest, match=says):
        ModelManifest.from_json(text)


def test_metrics_without_numbers_json_has_no_name_for() -> None:
    tree = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": (float("-inf"), "x")}, "e": True}
    assert finite_or_none(tree) == {"a": None, "b": [1.0, None], "c": {"d": [None, "x"]}, "e": True}
