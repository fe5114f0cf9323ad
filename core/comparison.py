"""SQL that compares keys and times by value, whatever types the two sides have.

Knows DuckDB's types; knows no table and no join.
"""

from __future__ import annotations

from core.errors import EntityFrameError, InvalidSource

NANOSECOND_TYPES = {"TIMESTAMP_NS", "TIMESTAMPTZ_NS"}
_ZONED_TYPES = {"TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ_NS"}
_NAIVE_TYPES = {"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"}
_CAST_TO_TIMESTAMP = {"VARCHAR", "DATE", '"NULL"'}


def epoch(expression: str, kind: str, unit: str) -> str:
    """SQL for the time ``expression`` of DuckDB type ``kind`` as an integer since the epoch.

    ``unit`` is ``us`` (rounded down) or ``ns``.

    Raises:
        InvalidSource: ``kind`` is no time.
    """
    if kind in _CAST_TO_TIMESTAMP:
        expression, kind = _as_timestamp(expression, kind)
    if kind in NANOSECOND_TYPES:
        nanoseconds = f"epoch_ns({expression})"
        # DuckDB divides towards zero; times before 1970 are rounded down like the others.
        down = f"(({nanoseconds} - ({nanoseconds} % 1000 + 1000) % 1000) // 1000)"
        return nanoseconds if unit == "ns" else down
    if kind not in _NAIVE_TYPES | _ZONED_TYPES:
        raise InvalidSource(
            f"A timestamp has the type {kind}.", hint="Store it as a timestamp, a date or ISO 8601 text."
        )
    microseconds = f"epoch_us({expression})"
    if unit == "us":
        return microseconds
    # Nanoseconds in 64 bits reach from 1677 to 2262; times beyond compare as the nearest end.
    return f"(least(greatest({microseconds}, -9223372036854775), 9223372036854775) * 1000)"


def not_a_time(column: str, kind: object) -> EntityFrameError:
    """The error for a timestamp column of the entity rows whose type is no time."""
    return EntityFrameError(
        f"Column {column!r} of the entity rows has the type {kind}, which is no time.",
        hint="Make it timestamps, with a time zone or in UTC.",
    )


def comparable(left: str, left_kind: str, right: str, right_kind: str) -> tuple[str, str] | None:
    """SQL for both sides of a key so that ``=`` compares them by value; None where they never compare.

    Integers and decimals compare at any width, and so do whole floating-point numbers (pandas turns
    integers with gaps into them); times compare as instants, UUIDs with their text.
    """
    families = (_family(left_kind), _family(right_kind))
    if families[0] == "null":
        return f"CAST({left} AS {right_kind})", right
    if families[1] == "null":  # such as a file that pandas wrote from no rows
        return left, f"CAST({right} AS {left_kind})"
    if families == ("time", "time"):
        unit = "ns" if {left_kind, right_kind} & NANOSECOND_TYPES else "us"
        return epoch(left, left_kind, unit), epoch(right, right_kind, unit)
    if families == ("float", "integer"):
        return _whole(left), right
    if families == ("integer", "float"):
        return left, _whole(right)
    if families in {("text", "UUID"), ("UUID", "text")}:
        return f"TRY_CAST({left} AS UUID)", f"TRY_CAST({right} AS UUID)"
    if families[0] == families[1] or set(families) <= {"integer", "float", "decimal"}:
        return left, right
    return None


def _whole(expression: str) -> str:
    return f"CASE WHEN {expression} = trunc({expression}) THEN TRY_CAST({expression} AS HUGEINT) END"


def _family(kind: str) -> str:
    if kind.removeprefix("U") in {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}:
        return "integer"
    if kind in {"FLOAT", "DOUBLE"}:
        return "float"
    if kind.startswith("DECIMAL"):
        return "decimal"
    if kind == "VARCHAR" or kind.startswith("ENUM"):
        return "text"
    if kind == "DATE" or kind in _NAIVE_TYPES | _ZONED_TYPES:
        return "time"
    return "null" if kind == '"NULL"' else kind


def within(expression: str, kind: str, start: int | None, end: int | None) -> str:
    """SQL that a time lies between two times, both included, in a form DuckDB pushes into Parquet.

    ``kind`` is the type of ``expression``; ``start`` and ``end`` are microseconds since the epoch, None for
    no bound. A null time is outside.
    """
    conditions = [f"{expression} IS NOT NULL"]
    if kind in _CAST_TO_TIMESTAMP:
        expression, kind = _as_timestamp(expression, kind)
    reach = 9_000_000_000_000_000 if kind in NANOSECOND_TYPES else 1 << 60
    for operator, bound in ((">=", start), ("<=", end)):
        if bound is None:
            continue
        if abs(bound) > reach:
            if (operator == ">=") == (bound > 0):
                conditions.append("false")
            continue
        time = f"make_timestamptz({bound})" if kind in _ZONED_TYPES else f"make_timestamp({bound})"
        conditions.append(f"{expression} {operator} CAST({time} AS {kind})")
    return " AND ".join(conditions)


def _as_timestamp(expression: str, kind: str) -> tuple[str, str]:
    target = "TIMESTAMP WITH TIME ZONE" if kind == "VARCHAR" else "TIMESTAMP"
    return f"CAST({expression} AS {target})", target
