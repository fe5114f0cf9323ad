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


@dataclass(frozen=True, slots=True)
class Moments:
    """How a key's number and a time make one integer that sorts by key and then by time: a moment.

    ``origin`` is the earliest time, ``span`` how many there are, ``keys`` how many keys.
    """

    origin: int
    span: int
    keys: int

    @property
    def fit(self) -> bool:
        """Every moment, and every difference of two times, is within 64 bits."""
        last = self.origin + self.span - 1
        return self.keys * self.span < 1 << 63 and max(-self.origin, last) < _REACH


def newest(
    moments: np.ndarray, places: np.ndarray, asked: Asked, scale: Moments, ttl: int, made: Made | None
) -> Found:
    """For each row asked about the newest candidate of its key at or before its time.

    Of several that share key and time the one created last wins, then the one whose place is largest.

    Args:
        moments: the candidates' keys and times, int64.
        places: the candidates' places, int64.
        asked: the rows, with times in the unit of the moments.
        scale: what the moments are made with; it must ``fit``.
        ttl: the age up to which a candidate counts, in the unit of the times; 0 for any.
        made: reads when the candidates at some places were created, null for the earliest.
    """
    if not len(moments) or not len(asked.row):
        none = np.zeros(0, np.int64)
        return Found(none, none, none, none.astype(np.bool_))
    order, moments = _sorted(moments)
    _settle(places, order, moments, made)
    first = asked.code * scale.span
    last = np.clip(asked.at, scale.origin - 1, scale.origin + scale.span - 1)
    last += first - scale.origin
    at = np.searchsorted(moments, last, "right") - 1
    # Before the first moment of its key, what was found belongs to the key before, or to none.
    known = (at >= 0) & (moments[at] >= first)
    at = at[known]
    time = moments[at] - first[known] + scale.origin
    fresh = asked.upper[known] - time <= min(ttl or _FOREVER, _FOREVER)
    return Found(asked.row[known], places[order[at]], time, fresh)


def _sorted(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the moments, and the moments in it.

    A plain sort of as much of each moment as 63 bits hold beside its index, and then of those that this did
    not tell apart, takes a third of the time of ``argsort``.
    """
    bits = len(moments).bit_length()
    cut = max(int(moments.max()).bit_length() + bits - 63, 0)
    packed = moments >> cut
    packed <<= bits
    packed |= np.arange(len(moments))
    packed.sort()
    order = packed & ((1 << bits) - 1)
    moments = moments[order]
    if (moments[1:] < moments[:-1]).any():
        packed >>= bits
        mixed = _repeated(packed)
        among = np.argsort(moments[mixed])
        order[mixed], moments[mixed] = order[mixed][among], moments[mixed][among]
    return order, moments


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which of the sorted ``values`` occur more than once."""
    same = values[1:] == values[:-1]
    repeated = np.zeros(len(values), np.bool_)
    repeated[1:] |= same
    repeated[:-1] |= same
    return repeated


def _settle(places: np.ndarray, order: np.ndarray, moments: np.ndarray, made: Made | None) -> None:
    """Put those of one moment in the order in which they win, the winner last."""
    tied = _repeated(moments)
    if not tied.any():
        return
    rivals = order[tied]
    columns = {"moment": pa.array(moments[tied])}
    if made:
        created = made(places[rivals])
        columns |= {"is made": created.is_valid().cast(pa.int8()), "made": created}
    columns["place"] = pa.array(places[rivals])
    ranked = pc.sort_indices(pa.table(columns), [(name, "ascending") for name in columns])
    order[tied] = rivals[ranked.to_numpy()]
