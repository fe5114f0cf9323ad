"""Keys read in full and fields judged by the definitions, without any Redis."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from core import layout
from core.layout import EntityKeys, stored_key
from core.repository import Feature, View
from core.types import Dtype, Field
from materialization.claims import Claims

NAMES = st.text("abc_", min_size=1, max_size=5)
PROJECTS = st.sampled_from(["fraud", "prodfraud", "d", "aud", "fraud2"])
VALUES = {
    Dtype.INT32: 7,
    Dtype.INT64: -1,
    Dtype.STRING: "fraud",
    Dtype.BYTES: b"fraud",
    Dtype.UNIX_TIMESTAMP: 5,
}


@given(st.dictionaries(NAMES, st.sampled_from(list(VALUES)), max_size=3), PROJECTS, st.binary(max_size=6))
def test_a_key_says_its_join_keys_and_project_and_no_cut_or_longer_key_says_the_same(
    names: dict[str, Dtype], project: str, tail: bytes
) -> None:
    fields = [Field(name, dtype) for name, dtype in names.items()]
    (key,) = EntityKeys(project, fields).encode([[VALUES[field.dtype]] for field in fields])
    read = stored_key(key)
    assert read is not None
    assert read.project == project.encode()
    assert set(read.join_keys) == set(fields or [layout.PLACEHOLDER])
    assert list(read.join_keys) == sorted(read.join_keys, key=lambda field: field.name)
    longer = stored_key(key + tail)
    assert longer is not None
    assert longer.project == project.encode() + tail
    for cut in range(len(key) - len(project)):
        assert stored_key(key[:cut]) is None


@given(st.binary(max_size=40))
def test_any_bytes_can_be_asked(key: bytes) -> None:
    read = stored_key(key)
    assert read is None or read.join_keys


def test_of_two_definitions_of_one_stored_view_each_claims_its_features_and_the_longer_ttl_holds() -> None:
    user = (Field("user_id", Dtype.INT64),)
    views = [a_view("v", "a", timedelta(hours=1)), a_view("v", "b", timedelta(hours=2))]
    verdict = Claims("p", views).verdict(user, fields("v", "a", "b", "c"))
    assert verdict.orphans == (layout.feature_field("v", "c"),)
    assert [claim.ttl_ns for claim in verdict.mortal] == [7_200 * 10**9]
    assert Claims("p", [*views, a_view("v", "a", timedelta(0))]).verdict(user, fields("v", "a")).mortal == ()


def a_view(name: str, feature: str, ttl: timedelta) -> View:
    return View(
        name=name,
        stored_name=name,
        join_keys=(Field("user_id", Dtype.INT64),),
        features=(Feature(feature, Dtype.DOUBLE, {}),),
        ttl=ttl,
    )


def fields(view: str, *features: str) -> list[bytes]:
    return [layout.timestamp_field(view), *(layout.feature_field(view, feature) for feature in features)]
