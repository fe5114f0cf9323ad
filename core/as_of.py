"""The as-of search in memory: one sorted array of key and time instead of an ASOF join.

Pure numpy and Arrow: knows numbered keys and integers for times; knows no table, no SQL and no view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BYTES_PER_ROW = 64
"""What a candidate or a row asked about takes at most while it is searched, in bytes."""

# Sums and differences of two times below it stay within 64 bits.
_REACH = 1 << 61
_FOREVER = (1 << 63) - 1

Made = Callable[[np.ndarray], pa.ChunkedArray]
"""The created times of the rows at some places, in their order."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The rows asked about: int64 arrays of one length, in about the order of key and time for speed.

    ``row`` is a row's number, ``code`` its key's, ``at`` its time and ``upper`` its time rounded up, which
    the ttl is held against.
    """

    row: np.ndarray
    code: np.ndarray
    at: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True, slots=True)
class Found:
    """Per row with a candidate its number, its newest candidate's place and time, and whether that counts."""

    row: np.ndarray
    place: np.ndarray
    time: np.ndarray
    fresh: np.ndarray


def newest(candidates: pa.Table, asked: Asked, ttl: int, made: Made | None) -> Found | None:
    """For each row asked about the newest candidate of its key at or before its time.

    Of several that share key and time the one created last wins, then the one whose place is largest.

    Args:
        candidates: ``code``, ``t`` and ``place``, int64 without nulls.
        asked: the rows, with times in the unit of ``t``.
        ttl: the age up to which a candidate counts, in the unit of ``t``; 0 for any.
        made: reads when the candidates at some places were created, null for the earliest.

    Returns:
        None where key and time together do not fit 64 bits.
    """
    if not candidates.num_rows or not len(asked.row):
        none = np.zeros(0, np.int64)
        return Found(none, none, none, none.astype(np.bool_))
    code, times, places = (candidates[name].to_numpy() for name in ("code", "t", "place"))
    oldest, last = int(times.min()), int(times.max())
    span = last - oldest + 1
    keys = int(max(code.max(), asked.code.max())) + 1
    if keys * span >= 1 << 63 or max(-oldest, last, int(asked.at.max())) >= _REACH:
        return None
    moments = code * span + (times - oldest)
    order = np.argsort(moments)
    moments = moments[order]
    _settle(places, order, moments, made)
    first = asked.code * span
    at = np.searchsorted(moments, first + (np.clip(asked.at, oldest - 1, last) - oldest), "right") - 1
    # Before the first moment of its key, what was found belongs to the key before, or to none.
    known = (at >= 0) & (moments[at] >= first)
    winner = order[at[known]]
    time = times[winner]
    fresh = asked.upper[known] - time <= min(ttl or _FOREVER, _FOREVER)
    return Found(asked.row[known], places[winner], time, fresh)


def _settle(places: np.ndarray, order: np.ndarray, moments: np.ndarray, made: Made | None) -> None:
    """Put those of one moment in the order in which they win, the winner last."""
    same = moments[1:] == moments[:-1]
    if not same.any():
        return
    tied = np.zeros(len(moments), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    rivals = order[tied]
    columns = {"moment": pa.array(moments[tied])}
    if made:
        created = made(places[rivals])
        columns |= {"is made": created.is_valid().cast(pa.int8()), "made": created}
    columns["place"] = pa.array(places[rivals])
    ranked = pc.sort_indices(pa.table(columns), [(name, "ascending") for name in columns])
    order[tied] = rivals[ranked.to_numpy()]
