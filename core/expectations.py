"""What a feature's values must look like, read from the tags beside its definition.

One source of truth for the materialization gate, request-time inputs, batch scoring and monitoring:
``min``, ``max``, ``nullable``, ``max_null_rate``, ``categories`` (a JSON list) and ``outlier_sigma`` in
Feast's own ``Field(tags=...)``. Knows no source, no request and no report; other tags are not its concern.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from core.errors import InvalidRepository
from core.types import Dtype

_INTEGERS = frozenset({Dtype.INT32, Dtype.INT64})
_FLOATS = frozenset({Dtype.DOUBLE, Dtype.FLOAT})
NUMERIC = _INTEGERS | _FLOATS
_CATEGORICAL = _INTEGERS | {Dtype.STRING, Dtype.BOOL}


class Tagged(Protocol):
    """A feature or request-time input with Feast's tags (``core.repository.Feature`` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def tags(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class Violation:
    """One expectation that a value, or a column of values, does not meet."""

    expectation: str
    expected: object
    observed: object

    def __str__(self) -> str:
        return f"{self.observed!r} does not meet {self.expectation} {self.expected!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """The expectations of one feature. A default object expects nothing.

    ``minimum`` and ``maximum`` are inclusive. ``max_null_rate`` is a share of rows, 0 to 1; a NaN counts as
    null, as Feast stores it. ``outlier_sigma`` is a distance from the column's mean in standard deviations.
    """

    minimum: float | int | None = None
    maximum: float | int | None = None
    nullable: bool = True
    max_null_rate: float | None = None
    categories: tuple[str | int | bool, ...] | None = None
    outlier_sigma: float | None = None

    @classmethod
    def parse(cls, view: str, feature: Tagged) -> Expectation:
        """Read the tags of ``feature``, which belongs to ``view``.

        Raises:
            InvalidRepository: a tag is malformed, does not suit the dtype, or contradicts another.
        """
        found: dict[str, Any] = {}
        for tag, (argument, dtypes, read) in _TAGS.items():
            text = feature.tags.get(tag)
            if text is None:
                continue
            if dtypes is not None and feature.dtype not in dtypes:
                allowed = ", ".join(sorted(d.name for d in dtypes))
                raise _malformed(view, feature, tag, f"does not apply to {feature.dtype.name}", allowed)
            try:
                found[argument] = read(text, feature.dtype)
            except (ValueError, TypeError) as exc:
                raise _malformed(view, feature, tag, f"{text!r} is not {exc}") from exc
        expectation = cls(**found)
        low, high = expectation.minimum, expectation.maximum
        if low is not None and high is not None and low > high:
            raise _malformed(view, feature, "max", f"{high} is less than min {low}")
        if not expectation.nullable and expectation.max_null_rate:
            rate = expectation.max_null_rate
            raise _malformed(view, feature, "max_null_rate", f"{rate} contradicts nullable: false")
        return expectation

    @property
    def empty(self) -> bool:
        """Whether nothing is expected."""
        return self == _NOTHING

    @property
    def null_rate_limit(self) -> float:
        """The largest share of nulls that is accepted: 0 where ``nullable`` is false."""
        if not self.nullable:
            return 0.0
        return 1.0 if self.max_null_rate is None else self.max_null_rate

    def check_value(self, value: object) -> Violation | None:
        """The first expectation that one value does not meet, or None.

        Judges a single value, so ``max_null_rate`` and ``outlier_sigma`` take no part.
        """
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None if self.nullable else Violation("nullable", False, None)
        if isinstance(value, int | float):
            if self.minimum is not None and value < self.minimum:
                return Violation("min", self.minimum, value)
            if self.maximum is not None and value > self.maximum:
                return Violation("max", self.maximum, value)
        if self.categories is not None and value not in self.categories:
            return Violation("categories", list(self.categories), value)
        return None

    def sql_violations(self, column: str, dtype: Dtype) -> dict[str, str]:
        """DuckDB predicates, by tag name, each true for a row whose value alone violates the expectation.

        ``column`` is a quoted column. Nulls (and NaN) satisfy every one of them but ``nullable``.
        """
        null = sql_is_null(column, dtype)
        predicates = {}
        if not self.nullable:
            predicates["nullable"] = null
        if self.minimum is not None:
            predicates["min"] = f"(NOT {null} AND {column} < {self.minimum!r})"
        if self.maximum is not None:
            predicates["max"] = f"(NOT {null} AND {column} > {self.maximum!r})"
        if self.categories is not None:
            listed = ", ".join(_sql_literal(category) for category in self.categories)
            predicates["categories"] = f"(NOT {null} AND {column} NOT IN ({listed}))"
        return predicates


_NOTHING = Expectation()


def sql_is_null(column: str, dtype: Dtype) -> str:
    """The DuckDB predicate for what Feast stores as an empty value: null, and NaN in a float column."""
    if dtype in _FLOATS:  # whatever numeric type the source's column has
        return f"({column} IS NULL OR isnan(CAST({column} AS DOUBLE)))"
    return f"({column} IS NULL)"


def _bound(text: str, dtype: Dtype) -> float | int:
    try:
        number = int(text) if dtype in _INTEGERS else float(text)
    except ValueError:
        raise ValueError("a whole number" if dtype in _INTEGERS else "a number") from None
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _flag(text: str, _: Dtype) -> bool:
    try:
        return {"true": True, "false": False}[text.strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def _share(text: str, _: Dtype) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise ValueError("a share from 0 to 1")
    return share


def _sigma(text: str, _: Dtype) -> float:
    try:
        sigma = float(text)
    except ValueError:
        sigma = math.nan
    if not (sigma > 0.0 and math.isfinite(sigma)):
        raise ValueError("a positive number of standard deviations")
    return sigma


def _categories(text: str, dtype: Dtype) -> tuple[str | int | bool, ...]:
    kind: type = {Dtype.STRING: str, Dtype.BOOL: bool}.get(dtype, int)
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    # bool is an int to isinstance, so the exact type is asked for.
    if not isinstance(values, list) or not values or any(type(value) is not kind for value in values):
        raise ValueError(f"a JSON list of {kind.__name__}, such as {json.dumps(_EXAMPLES[kind])}")
    return tuple(values)


_EXAMPLES: dict[type, list[Any]] = {str: ["a", "b"], int: [1, 2], bool: [True]}
_Reader = Callable[[str, Dtype], Any]
_TAGS: dict[str, tuple[str, frozenset[Dtype] | None, _Reader]] = {
    "min": ("minimum", NUMERIC, _bound),
    "max": ("maximum", NUMERIC, _bound),
    "nullable": ("nullable", None, _flag),
    "max_null_rate": ("max_null_rate", None, _share),
    "categories": ("categories", _CATEGORICAL, _categories),
    "outlier_sigma": ("outlier_sigma", NUMERIC, _sigma),
}


def _sql_literal(value: str | int | bool) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _malformed(
    view: str, feature: Tagged, tag: str, problem: str, allowed: str | None = None
) -> InvalidRepository:
    return InvalidRepository(
        f"Tag {tag!r} of feature {feature.name!r} in view {view!r}: {problem}.",
        hint=f"It applies to: {allowed}." if allowed else "Correct the tag in the Feast definitions.",
        view=view,
        feature=feature.name,
        tag=tag,
    )
