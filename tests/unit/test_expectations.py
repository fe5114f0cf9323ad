"""The expectations beside a feature's definition: reading the tags, judging a value, the SQL of the gate."""

from __future__ import annotations

import math

import duckdb
import pytest

from core.errors import InvalidRepository
from core.expectations import Expectation
from core.repository import Feature
from core.types import Dtype


def parse(dtype: Dtype, **tags: str) -> Expectation:
    return Expectation.parse("user_behavior", Feature("score", dtype, tags))


def test_every_tag_is_read() -> None:
    found = parse(Dtype.DOUBLE, min="0", max="1.5", max_null_rate="0.25", outlier_sigma="6")
    assert found == Expectation(minimum=0.0, maximum=1.5, max_null_rate=0.25, outlier_sigma=6.0)
    assert parse(Dtype.STRING, categories='["a", "b"]', nullable="False") == Expectation(
        categories=("a", "b"), nullable=False
    )
    assert parse(Dtype.BOOL, categories="[true]").categories == (True,)


def test_no_tags_and_unknown_tags_expect_nothing() -> None:
    assert parse(Dtype.INT64, owner="growth").empty
    assert not parse(Dtype.INT64, min="0").empty


def test_an_integer_bound_keeps_every_digit() -> None:
    assert parse(Dtype.INT64, max="9007199254740993").maximum == 9007199254740993


@pytest.mark.parametrize(
    ("dtype", "tags", "tag"),
    [
        (Dtype.DOUBLE, {"min": "low"}, "min"),
        (Dtype.DOUBLE, {"min": "nan"}, "min"),
        (Dtype.INT64, {"max": "1.5"}, "max"),
        (Dtype.STRING, {"min": "0"}, "min"),
        (Dtype.DOUBLE, {"min": "2", "max": "1"}, "max"),
        (Dtype.DOUBLE, {"nullable": "maybe"}, "nullable"),
        (Dtype.DOUBLE, {"max_null_rate": "1.01"}, "max_null_rate"),
        (Dtype.DOUBLE, {"max_null_rate": "some"}, "max_null_rate"),
        (Dtype.DOUBLE, {"nullable": "false", "max_null_rate": "0.1"}, "max_null_rate"),
        (Dtype.STRING, {"categories": "a,b"}, "categories"),
        (Dtype.STRING, {"categories": "[]"}, "categories"),
        (Dtype.STRING, {"categories": "[1]"}, "categories"),
        (Dtype.INT64, {"categories": "[true]"}, "categories"),
        (Dtype.DOUBLE, {"categories": "[1.5]"}, "categories"),
        (Dtype.DOUBLE, {"outlier_sigma": "0"}, "outlier_sigma"),
        (Dtype.BOOL, {"outlier_sigma": "3"}, "outlier_sigma"),
    ],
)
def test_a_malformed_tag_is_named_with_its_view_and_feature(
    dtype: Dtype, tags: dict[str, str], tag: str
) -> None:
    with pytest.raises(InvalidRepository) as caught:
        parse(dtype, **tags)
    assert caught.value.details == {"view": "user_behavior", "feature": "score", "tag": tag}
    for name in ("user_behavior", "score", tag):
        assert repr(name) in caught.value.message


@pytest.mark.parametrize(
    ("expectation", "value", "violated"),
    [
        (Expectation(), None, None),
        (Expectation(nullable=False), None, "nullable"),
        (Expectation(nullable=False), math.nan, "nullable"),
        (Expectation(minimum=0), 0, None),
        (Expectation(minimum=0), -1, "min"),
        (Expectation(maximum=1.5), 1.5, None),
        (Expectation(maximum=1.5), 1.6, "max"),
        (Expectation(minimum=0), math.nan, None),
        (Expectation(categories=("a", "b")), "b", None),
        (Expectation(categories=("a", "b")), "c", "categories"),
        (Expectation(categories=(1, 2)), 3, "categories"),
        (Expectation(max_null_rate=0.0), None, None),
    ],
)
def test_one_value_is_judged_by_the_first_expectation_it_violates(
    expectation: Expectation, value: object, violated: str | None
) -> None:
    found = expectation.check_value(value)
    assert (found.expectation if found else None) == violated


@pytest.mark.parametrize(
    ("dtype", "sql_type", "tags", "values"),
    [
        (Dtype.DOUBLE, "DOUBLE", {"min": "0", "max": "1"}, [-0.1, 0.0, 1.0, 1.1, None, math.nan, math.inf]),
        (Dtype.DOUBLE, "DOUBLE", {"nullable": "false"}, [0.0, None, math.nan]),
        (Dtype.INT64, "BIGINT", {"min": "-5", "categories": "[-6, -5, 0]"}, [-6, -5, 0, 1, None]),
        (Dtype.STRING, "VARCHAR", {"categories": '["it\'s", "b"]', "nullable": "false"}, ["it's", "c", None]),
        (Dtype.BOOL, "BOOLEAN", {"categories": "[true]"}, [True, False, None]),
    ],
)
def test_the_sql_of_the_gate_agrees_with_check_value(
    dtype: Dtype, sql_type: str, tags: dict[str, str], values: list[object]
) -> None:
    expectation = parse(dtype, **tags)
    predicates = expectation.sql_violations('"v"', dtype)
    for value in values:
        row = f"(SELECT CAST($1 AS {sql_type}) AS v)"
        flags = duckdb.execute(f"SELECT {', '.join(predicates.values())} FROM {row}", [value]).fetchone()
        assert flags is not None
        violated = {tag for tag, flag in zip(predicates, flags, strict=True) if flag}
        first = expectation.check_value(value)
        assert bool(violated) == (first is not None)
        assert first is None or first.expectation in violated


@pytest.mark.parametrize(
    ("expectation", "limit"),
    [
        (Expectation(), 1.0),
        (Expectation(max_null_rate=0.2), 0.2),
        (Expectation(nullable=False), 0.0),
    ],
)
def test_the_accepted_share_of_nulls(expectation: Expectation, limit: float) -> None:
    assert expectation.null_rate_limit == limit
