"""The gate's truth table, on staged rows in DuckDB."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from core.errors import InvalidRepository
from core.types import Dtype
from materialization.distribution import profile, stability_index
from materialization.gate import GateResult, Limits, judge
from materialization.window import Staged, Window
from tests.support.staging import make_source, make_view

END = datetime(2026, 3, 10, tzinfo=UTC)
END_US = int(END.timestamp()) * 1_000_000


def staged(values: list[Any] | np.ndarray, dtype: Dtype, **tags: str) -> tuple[Staged, dict[str, str]]:
    """One row per value; the key is the value's place."""
    events = pd.DataFrame(
        {"user_id": range(len(values)), "event_timestamp": END - timedelta(hours=2), "value": values}
    )
    source = make_source(make_view({"value": dtype}, tags={"value": tags}), events)
    return source.stage(Window(None, END_US), 1), source.feature_types


def gated(values: list[Any] | np.ndarray, dtype: Dtype = Dtype.DOUBLE, **tags: str) -> GateResult:
    rows, types = staged(values, dtype, **tags)
    return verdict(rows, types)


def verdict(rows: Staged, types: Mapping[str, str], **changes: Any) -> GateResult:
    settings: dict[str, Any] = {
        "limits": Limits(),
        "end_us": END_US,
        "whole": True,
        "nameless": 0,
        "reference": None,
    }
    return judge(rows, types, **{**settings, **changes})


NORMAL = np.random.default_rng(1).normal(size=5000)


@pytest.mark.parametrize(
    ("values", "dtype", "tags", "finding"),
    [
        ([1.0, 2.0], Dtype.DOUBLE, {}, None),
        ([1.0, -0.5, -2.0], Dtype.DOUBLE, {"min": "0"}, ("min", 0.0, -2.0, 2)),
        ([1, 11, 12], Dtype.INT64, {"max": "10"}, ("max", 10, 12, 2)),
        ([0.0, 10.0], Dtype.DOUBLE, {"min": "0", "max": "10"}, None),
        ([1.0, math.inf], Dtype.DOUBLE, {"max": "10"}, ("max", 10.0, "inf", 1)),
        ([1.0, None], Dtype.DOUBLE, {"nullable": "false"}, ("nullable", False, "null", 1)),
        ([1.0, math.nan], Dtype.DOUBLE, {"nullable": "false"}, ("nullable", False, "null", 1)),
        (["x", None], Dtype.STRING, {"nullable": "true"}, None),
        ([None, 1.0, 1.0, 1.0], Dtype.DOUBLE, {"max_null_rate": "0.25"}, None),
        ([None, None, 1.0, 1.0], Dtype.DOUBLE, {"max_null_rate": "0.25"}, ("max_null_rate", 0.25, 0.5, 2)),
        (["a", "b"], Dtype.STRING, {"categories": '["a", "b"]'}, None),
        (["a", "z", None], Dtype.STRING, {"categories": '["a", "b"]'}, ("categories", ["a", "b"], "z", 1)),
        ([True, False], Dtype.BOOL, {"categories": "[true]"}, ("categories", [True], False, 1)),
        ([1, 1 << 40], Dtype.INT32, {}, ("type", "INT32", 1 << 40, 1)),
        ([1.0, 1e30], Dtype.INT64, {}, ("type", "INT64", "DOUBLE", None)),
        (["1", "x"], Dtype.DOUBLE, {}, ("type", "DOUBLE", "VARCHAR", None)),
        ([[1.0], [2.0]], Dtype.DOUBLE, {}, ("type", "DOUBLE", "DOUBLE[]", None)),
        ([1.5, 2.5], Dtype.STRING, {}, None),
        ([[1, 2], None], Dtype.INT64_LIST, {}, None),
    ],
)
def test_the_truth_table_of_a_column(
    values: list[Any], dtype: Dtype, tags: dict[str, str], finding: tuple[Any, ...] | None
) -> None:
    result = gated(values, dtype, **tags)
    found = [(f.expectation, f.expected, f.observed, f.rows) for f in result.findings]
    assert found == ([] if finding is None else [finding])
    assert result.passed is (finding is None)
    assert {f.column for f in result.findings} <= {"value"}


def test_an_outlier_is_named_with_its_distance() -> None:
    assert gated(NORMAL, outlier_sigma="6").passed
    (finding,) = gated([*NORMAL, 50.0, None], outlier_sigma="6").findings
    assert (finding.expectation, finding.rows) == ("outlier_sigma", 1)
    assert finding.observed.startswith("50.0 (")
    assert finding.sample_keys == ({"user_id": 5000},)


def test_a_constant_column_has_no_outliers() -> None:
    assert gated([3.0] * 50, outlier_sigma="1").passed


def test_a_finding_names_a_few_of_the_keys() -> None:
    (finding,) = gated([*range(100)], Dtype.INT64, max="49").findings
    assert finding.rows == 50
    assert len(finding.sample_keys) == 5
    assert all(key["user_id"] >= 50 for key in finding.sample_keys)
    assert "user_id=" in str(finding)
    assert "max 49, observed 99, 50 rows" in str(finding)


def test_keys_with_a_null_fail_the_gate() -> None:
    (finding,) = verdict(*staged([1.0], Dtype.DOUBLE), nameless=3).findings
    assert (finding.column, finding.expectation, finding.rows) == ("user_id", "join key", 3)


@pytest.mark.parametrize(
    ("before", "whole", "limit", "fails"),
    [
        (100, True, 0.5, False),
        (199, True, 0.5, False),
        (201, True, 0.5, True),
        (60, True, 0.5, True),
        (201, False, 0.5, False),
        (201, True, None, False),
    ],
)
def test_the_number_of_rows_is_compared_with_the_last_full_load(
    before: int, whole: bool, limit: float | None, fails: bool
) -> None:
    rows, types = staged([1.0] * 100, Dtype.DOUBLE)
    result = verdict(
        rows,
        types,
        whole=whole,
        limits=Limits(max_row_change=limit),
        reference={"rows": before, "columns": {}},
    )
    assert [f.expectation for f in result.findings] == (["row count"] if fails else [])


def test_a_first_load_of_nothing_is_a_warning() -> None:
    rows, types = staged([], Dtype.DOUBLE, min="0")
    result = verdict(rows, types)
    assert result.passed
    assert [f.warning for f in result.findings] == [True]
    assert not verdict(rows, types, reference={"rows": 10, "columns": {}}).passed


@pytest.mark.parametrize(("limit", "passes"), [(None, True), (7200.0, True), (7199.0, False)])
def test_the_newest_event_may_be_too_old(limit: float | None, passes: bool) -> None:
    rows, types = staged([1.0], Dtype.DOUBLE)
    for whole in (True, False):
        assert verdict(rows, types, whole=whole, limits=Limits(max_age_seconds=limit)).passed is passes


@pytest.mark.parametrize(
    ("dtype", "before", "after", "drifts"),
    [
        (Dtype.DOUBLE, NORMAL, NORMAL[::-1] + 0.02, False),
        (Dtype.DOUBLE, NORMAL, NORMAL + 1.0, True),
        (Dtype.DOUBLE, NORMAL, np.where(np.arange(5000) % 3 == 0, np.nan, NORMAL), True),
        (Dtype.INT64, np.arange(5000) % 7, np.arange(5000) % 7, False),
        (Dtype.INT64, np.arange(5000) % 7, np.arange(5000) % 2, True),
        (Dtype.STRING, ["a", "b"] * 1000, ["b", "a"] * 1000, False),
        (Dtype.STRING, ["a", "b"] * 1000, ["a", "c"] * 1000, True),
        (Dtype.STRING, [f"{i}" for i in range(2000)], ["x"] * 2000, False),
        (Dtype.DOUBLE, NORMAL[:900], NORMAL[:900] + 5, False),
        (Dtype.BOOL, [True] * 2000, [False] * 2000, True),
    ],
    ids=[
        "same",
        "shifted",
        "nulls",
        "same whole numbers",
        "fewer numbers",
        "same categories",
        "new category",
        "too many categories",
        "too few rows",
        "flags",
    ],
)
def test_a_distribution_that_has_moved_fails_the_gate(
    dtype: Dtype, before: Any, after: Any, drifts: bool
) -> None:
    reference = json.loads(json.dumps(profile(staged(before, dtype)[0])))
    rows, types = staged(after, dtype)
    result = verdict(rows, types, reference=reference)
    assert [f.expectation for f in result.findings] == (["psi"] if drifts else [])
    assert verdict(rows, types, reference=reference, limits=Limits(max_psi=None)).passed


def test_the_stability_index_by_hand() -> None:
    """Two bins, 50/50 to 75/25: 0.25 ln 1.5 - 0.25 ln 0.5 = 0.2747."""
    assert stability_index([0.5, 0.5], [0.75, 0.25]) == pytest.approx(0.27465, abs=1e-5)
    assert stability_index([1.0, 0.0], [1.0, 0.0]) == 0.0
    assert stability_index([1.0, 0.0], [0.0, 1.0]) == pytest.approx(2 * 0.9999 * math.log(10_000))


def test_limits_stand_in_the_views_tags() -> None:
    tags = {"gate_max_psi": "0.4", "gate_max_row_change": "OFF", "gate_max_age_seconds": "60", "team": "a"}
    assert Limits.parse("v", tags) == Limits(max_psi=0.4, max_row_change=None, max_age_seconds=60.0)
    assert Limits.parse("v", {}) == Limits()
    for bad in ("much", "0", "-1", "nan", "inf"):
        with pytest.raises(InvalidRepository, match="gate_max_psi"):
            Limits.parse("v", {"gate_max_psi": bad})


def test_a_verdict_is_json() -> None:
    result = gated([1.0, math.inf, None], max="0", nullable="false")
    assert json.loads(json.dumps(result.as_json())) == {
        "view": "behavior",
        "passed": False,
        "forced": False,
        "rows": 3,
        "findings": [
            {
                "column": "value",
                "expectation": "nullable",
                "expected": False,
                "observed": "null",
                "rows": 1,
                "sample_keys": [{"user_id": 2}],
                "severity": "error",
            },
            {
                "column": "value",
                "expectation": "max",
                "expected": 0.0,
                "observed": "inf",
                "rows": 2,
                "sample_keys": [{"user_id": 0}, {"user_id": 1}],
                "severity": "error",
            },
        ],
    }
