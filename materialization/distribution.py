"""How the values of staged rows are distributed, and how far that has moved since another run.

Measured on a sample that is the same for the same rows. Knows no threshold and no verdict.
"""

# ruff: noqa: S608  SQL is built from identifiers quoted by core.source.identifier and from numbers
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from core.expectations import NUMERIC, sql_is_null
from core.repository import Feature
from core.source import identifier
from core.types import Dtype
from materialization.window import SAMPLED, Staged

# Below this the index measures noise: with n rows on each side and 10 bins it is about 18 / n by itself.
PSI_MIN_ROWS = 1_000
_BINS = 10
_MAX_CATEGORIES = 50


def profile(staged: Staged) -> dict[str, Any]:
    """What the next run of this kind is compared with: rows, and each feature's distribution. JSON."""
    columns = {}
    for feature in staged.view.features:
        bins = _bins(staged, feature)
        if bins is not None:
            columns[feature.name] = {"bins": bins, "shares": shares(staged, feature, bins)}
    return {"rows": staged.rows, "columns": columns}


def stability_index(before: Sequence[float], after: Sequence[float]) -> float:
    """The population stability index of two distributions over the same bins.

    The sum of (after - before) ln(after / before); an empty bin counts as one in 10,000. Karakoulas, G.:
    Empirical validation of retail credit-scoring models. The RMA Journal 87 (2004).
    """
    pairs = [(max(b, 1e-4), max(a, 1e-4)) for b, a in zip(before, after, strict=True)]
    return sum((a - b) * math.log(a / b) for b, a in pairs)


def _bins(staged: Staged, feature: Feature) -> list[Any] | None:
    """What divides the feature's values: deciles of a number, the values of a category; None for others."""
    column = identifier(feature.name)
    if feature.dtype in NUMERIC:
        steps = [index / _BINS for index in range(1, _BINS)]
        sql = (
            f"SELECT quantile_cont({column}::DOUBLE, {steps}) FROM {SAMPLED} "
            f"WHERE {column} IS NOT NULL AND isfinite({column}::DOUBLE)"
        )
        ((edges,),) = staged.con.sql(sql).fetchall()
        return None if edges is None else sorted(set(edges))
    if feature.dtype in {Dtype.STRING, Dtype.BOOL}:
        sql = (
            f"SELECT DISTINCT {column} FROM {SAMPLED} WHERE {column} IS NOT NULL LIMIT {_MAX_CATEGORIES + 1}"
        )
        values = [value for (value,) in staged.con.sql(sql).fetchall()]
        return sorted(values) if len(values) <= _MAX_CATEGORIES else None
    return None


def shares(staged: Staged, feature: Feature, bins: Sequence[Any]) -> list[float]:
    """The share of rows in each bin; then of other values, and of nulls."""
    column = identifier(feature.name)
    null = sql_is_null(column, feature.dtype)
    if feature.dtype in NUMERIC:
        # Beyond the last edge lie the other values; infinities fall in the outermost bins.
        place = "+ ".join(f"({column}::DOUBLE > {edge!r})::INT" for edge in bins) or "0"
    else:
        cases = " ".join(f"WHEN {_literal(value)} THEN {i}" for i, value in enumerate(bins))
        place = f"CASE {column} {cases} ELSE {len(bins)} END" if cases else "0"
    sql = (
        f"SELECT CASE WHEN {null} THEN {len(bins) + 1} ELSE {place} END AS bin, count(*) "
        f"FROM {SAMPLED} GROUP BY bin"
    )
    counts = dict(staged.con.sql(sql).fetchall())
    total = sum(counts.values())
    return [counts.get(index, 0) / total for index in range(len(bins) + 2)]


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "'" + str(value).replace("'", "''") + "'"
