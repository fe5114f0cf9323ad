"""The gate: staged rows judged before the first of them is written.

Checks, per column: the source's type, nulls in join keys, the expectations beside the feature's definition
(``core.expectations``), and how far its distribution has moved since the last accepted run of the same kind
(population stability index). Per view: the number of rows, and how old the newest event is. A finding that
is an error fails the gate; a warning is reported. Knows DuckDB's staged rows; writes nothing.

Limits that are not of a feature stand in the feature view's own tags: ``gate_max_psi`` (default 0.25),
``gate_max_row_change`` (a share of the rows of the last accepted full load, default 0.5) and
``gate_max_age_seconds`` (of the newest event at the window's end, no limit by default). Each may be ``off``.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from core.errors import InvalidFeatureValue, InvalidRepository
from core.expectations import Expectation, sql_is_null
from core.layout_columns import cells
from core.repository import Feature, View
from core.source import identifier
from core.types import Dtype
from materialization.distribution import PSI_MIN_ROWS, shares, stability_index
from materialization.window import STAGED, Staged

SAMPLE_KEYS = 5
_TYPE_SAMPLE_ROWS = 500

DEFAULT_MAX_PSI = 0.25
DEFAULT_MAX_ROW_CHANGE = 0.5

_INTEGER_RANGES = {
    Dtype.INT32: (-(1 << 31), (1 << 31) - 1),
    Dtype.INT64: (-(1 << 63), (1 << 63) - 1),
}
# Types whose values any integer feature can hold.
_NARROW = {"TINYINT", "SMALLINT", "INTEGER", "UTINYINT", "USMALLINT", "BOOLEAN"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the gate found. ``rows`` violate it; ``sample_keys`` are some of their keys, by join key.

    ``column`` is None for a finding about the view. A ``warning`` does not fail the gate.
    """

    expectation: str
    expected: Any
    observed: Any
    column: str | None = None
    rows: int | None = None
    sample_keys: tuple[Mapping[str, Any], ...] = ()
    warning: bool = False

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "column": self.column,
            "expectation": self.expectation,
            "expected": self.expected,
            "observed": self.observed,
            "rows": self.rows,
            "sample_keys": [dict(key) for key in self.sample_keys],
            "severity": "warning" if self.warning else "error",
        }

    def __str__(self) -> str:
        where = f"{self.column}: " if self.column else ""
        text = f"{where}{self.expectation} {self.expected}, observed {self.observed}"
        if self.rows is not None:
            text += f", {self.rows} rows"
        if self.sample_keys:
            text += ", such as " + "; ".join(
                ", ".join(f"{name}={value}" for name, value in key.items()) for key in self.sample_keys[:3]
            )
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """The verdict on one view's staged rows. ``forced``: it failed, and the caller wanted the rows anyway."""

    view: str
    rows: int
    findings: tuple[Finding, ...] = field(default=())
    forced: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing but warnings was found."""
        return all(finding.warning for finding in self.findings)

    @property
    def summary(self) -> str:
        """What failed first, and how much more did."""
        failed = [finding for finding in self.findings if not finding.warning]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return f"{failed[0]}{more}" if failed else "nothing failed"

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "view": self.view,
            "passed": self.passed,
            "forced": self.forced,
            "rows": self.rows,
            "findings": [finding.as_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """The view's own limits; None where a check is off."""

    max_psi: float | None = DEFAULT_MAX_PSI
    max_row_change: float | None = DEFAULT_MAX_ROW_CHANGE
    max_age_seconds: float | None = None

    @classmethod
    def parse(cls, view: str, tags: Mapping[str, str]) -> Limits:
        """Read a feature view's tags.

        Raises:
            InvalidRepository: a limit is neither ``off`` nor a number above 0.
        """
        found: dict[str, float | None] = {}
        for name in ("max_psi", "max_row_change", "max_age_seconds"):
            text = tags.get(f"gate_{name}")
            if text is None:
                continue
            try:
                limit = None if text.strip().lower() == "off" else float(text)
            except ValueError:
                limit = math.nan
            if limit is not None and not 0 < limit < math.inf:
                raise InvalidRepository(
                    f"Tag 'gate_{name}' of view {view!r} is {text!r}.", hint="Give a number above 0, or off."
                )
            found[name] = limit
        return cls(**found)


def judge(
    staged: Staged,
    source_types: Mapping[str, str],
    *,
    limits: Limits,
    end_us: int,
    whole: bool,
    nameless: int,
    reference: Mapping[str, Any] | None,
) -> GateResult:
    """Check the staged rows.

    Args:
        staged: the newest row of every key.
        source_types: DuckDB's type of each feature's column.
        limits: the view's limits.
        end_us: the window's end.
        whole: whether the rows are all there are, not only what is new.
        nameless: rows with a null in their key.
        reference: what ``distribution.profile`` returned for the last accepted run of the same kind, or None.

    Raises:
        InvalidRepository: a tag is malformed.
    """
    view = staged.view
    findings = [*_key_findings(view, nameless), *_type_findings(staged, source_types)]
    unreadable = {finding.column for finding in findings}
    readable = [feature for feature in view.features if feature.name not in unreadable]
    findings += _row_findings(staged, limits, end_us, whole, reference)
    if staged.rows:
        findings += _expectation_findings(staged, readable, source_types)
        if reference is not None and limits.max_psi is not None:
            findings += _drift_findings(staged, readable, limits.max_psi, reference)
    return GateResult(view=view.name, rows=staged.rows, findings=tuple(findings))


def _key_findings(view: View, nameless: int) -> list[Finding]:
    if not nameless:
        return []
    names = ", ".join(key.name for key in view.join_keys)
    return [
        Finding(column=names, expectation="join key", expected="not null", observed="null", rows=nameless)
    ]


def _type_findings(staged: Staged, source_types: Mapping[str, str]) -> list[Finding]:
    """Features whose values cannot be stored as the type they are declared with, judged by a sample."""
    sample = staged.sample(_TYPE_SAMPLE_ROWS)
    findings = []
    for feature in staged.view.features:
        column = sample[feature.name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if feature.dtype in _INTEGER_RANGES and pa.types.is_integer(column.type):
            continue  # every value's range is checked below
        try:
            cells(column, feature.dtype)
        except (InvalidFeatureValue, pa.ArrowException):
            findings.append(
                Finding(
                    column=feature.name,
                    expectation="type",
                    expected=feature.dtype.name,
                    observed=source_types[feature.name],
                )
            )
    return findings


def _row_findings(
    staged: Staged, limits: Limits, end_us: int, whole: bool, reference: Mapping[str, Any] | None
) -> list[Finding]:
    findings = []
    before = reference["rows"] if reference else 0
    if whole and before and limits.max_row_change is not None:
        change = staged.rows / before - 1
        if abs(change) > limits.max_row_change:
            findings.append(
                Finding(
                    expectation="row count",
                    expected=f"within {limits.max_row_change:.0%} of {before}",
                    observed=f"{staged.rows} ({change:+.0%})",
                )
            )
    elif whole and not staged.rows:
        findings.append(Finding(expectation="row count", expected="some", observed=0, warning=True))
    newest = staged.newest_event_us
    if newest is not None and (whole or limits.max_age_seconds is not None):
        age = (end_us - newest) / 1e6
        limit = limits.max_age_seconds
        if limit is not None and age > limit:
            findings.append(
                Finding(
                    expectation="age of the newest event", expected=f"{limit:g} s", observed=f"{age:.0f} s"
                )
            )
    return findings


def _expectation_findings(
    staged: Staged, features: Sequence[Feature], source_types: Mapping[str, str]
) -> list[Finding]:
    """One pass over the staged rows for every expectation; a second look only at what was violated."""
    asked: list[tuple[Feature, str, Any, str]] = []  # feature, expectation, expected, predicate
    values: dict[str, str] = {}
    for feature in features:
        column = identifier(feature.name)
        expectation = Expectation.parse(staged.view.name, feature)
        expected = {
            "nullable": False,
            "min": expectation.minimum,
            "max": expectation.maximum,
            "categories": list(expectation.categories or ()),
        }
        for tag, predicate in expectation.sql_violations(column, feature.dtype).items():
            asked.append((feature, tag, expected[tag], predicate))
        found = source_types[feature.name]
        wide = found not in _NARROW and not (feature.dtype is Dtype.INT64 and found == "BIGINT")
        if feature.dtype in _INTEGER_RANGES and wide:
            low, high = _INTEGER_RANGES[feature.dtype]
            outside = f"({column} < {low} OR {column} > {high})"
            asked.append((feature, "type", feature.dtype.name, outside))
        if expectation.max_null_rate is not None and expectation.nullable:
            values[f"nulls {feature.name}"] = f"count(*) FILTER (WHERE {sql_is_null(column, feature.dtype)})"
        if expectation.outlier_sigma is not None:
            finite = f"{column} IS NOT NULL AND isfinite({column}::DOUBLE)"
            values[f"mean {feature.name}"] = f"avg({column}::DOUBLE) FILTER (WHERE {finite})"
            values[f"deviation {feature.name}"] = f"stddev_pop({column}::DOUBLE) FILTER (WHERE {finite})"
    counts = [f"count(*) FILTER (WHERE {predicate})" for *_, predicate in asked]
    extremes = [
        f"{function}({identifier(feature.name)}) FILTER (WHERE {predicate})"
        for feature, tag, _, predicate in asked
        for function in (("min" if tag == "min" else "max"),)
    ]
    columns = [*counts, *(extremes if asked else []), *values.values()]
    if not columns:
        return []
    (row,) = staged.con.sql(f"SELECT {', '.join(columns)} FROM {STAGED}").fetchall()
    measured = dict(zip(values, row[2 * len(asked) :], strict=True))
    findings = [
        Finding(
            column=feature.name,
            expectation=tag,
            expected=expected,
            observed="null" if tag == "nullable" else _plain(worst),
            rows=count,
            sample_keys=_sample_keys(staged, predicate),
        )
        for (feature, tag, expected, predicate), count, worst in zip(
            asked, row[: len(asked)], row[len(asked) : 2 * len(asked)], strict=True
        )
        if count
    ]
    for feature in features:
        findings += _rate_and_outlier_findings(staged, feature, measured)
    return findings


def _rate_and_outlier_findings(staged: Staged, feature: Feature, found: Mapping[str, Any]) -> list[Finding]:
    expectation = Expectation.parse(staged.view.name, feature)
    column = identifier(feature.name)
    findings = []
    nulls = found.get(f"nulls {feature.name}")
    if nulls is not None and nulls / staged.rows > expectation.null_rate_limit:
        findings.append(
            Finding(
                column=feature.name,
                expectation="max_null_rate",
                expected=expectation.null_rate_limit,
                observed=round(nulls / staged.rows, 6),
                rows=nulls,
                sample_keys=_sample_keys(staged, sql_is_null(column, feature.dtype)),
            )
        )
    mean, deviation = found.get(f"mean {feature.name}"), found.get(f"deviation {feature.name}")
    if expectation.outlier_sigma is not None and mean is not None and deviation:
        distance = f"abs({column}::DOUBLE - {mean!r})"
        known = f"{column} IS NOT NULL AND NOT isnan({column}::DOUBLE)"
        far = f"({known} AND {distance} > {expectation.outlier_sigma * deviation!r})"
        sql = f"SELECT count(*), arg_max({column}, {distance}) FROM {STAGED} WHERE {far}"
        ((count, worst),) = staged.con.sql(sql).fetchall()
        if count:
            findings.append(
                Finding(
                    column=feature.name,
                    expectation="outlier_sigma",
                    expected=expectation.outlier_sigma,
                    observed=f"{_plain(worst)} ({abs(worst - mean) / deviation:.1f} sigma from {mean:.6g})",
                    rows=count,
                    sample_keys=_sample_keys(staged, far),
                )
            )
    return findings


def _drift_findings(
    staged: Staged, features: Sequence[Feature], limit: float, reference: Mapping[str, Any]
) -> list[Finding]:
    if min(staged.rows, reference["rows"]) < PSI_MIN_ROWS:
        return []
    findings = []
    for feature in features:
        before = reference["columns"].get(feature.name)
        if before is None:
            continue
        index = stability_index(before["shares"], shares(staged, feature, before["bins"]))
        if index > limit:
            findings.append(
                Finding(column=feature.name, expectation="psi", expected=limit, observed=round(index, 4))
            )
    return findings


def _sample_keys(staged: Staged, predicate: str) -> tuple[Mapping[str, Any], ...]:
    names = [key.name for key in staged.view.join_keys]
    if not names:
        return ()
    columns = ", ".join(identifier(name) for name in names)
    rows = staged.con.sql(f"SELECT {columns} FROM {STAGED} WHERE {predicate} LIMIT {SAMPLE_KEYS}").fetchall()
    return tuple({name: _plain(value) for name, value in zip(names, row, strict=True)} for row in rows)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
