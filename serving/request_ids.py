"""Request ids: ULIDs, sortable by time and unique across workers without asking anyone.

Format: https://github.com/ulid/spec, 48 bits of milliseconds, then 80 random bits, in Crockford's base 32.
Within a process the random part counts up from a random start, which keeps ids of one millisecond sorted.
"""

from __future__ import annotations

import os
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]


class RequestIds:
    """A source of ids for one process; make it after the process has forked."""

    def __init__(self) -> None:
        self._prefix = "".join(_ALPHABET[byte & 31] for byte in os.urandom(10))
        self._count = int.from_bytes(os.urandom(3)) & 0xFFFFFF
        self._millisecond = -1
        self._stamp = ""

    def next(self) -> str:
        """A new id of 26 characters."""
        millisecond = time.time_ns() // 1_000_000
        if millisecond != self._millisecond:
            self._millisecond = millisecond
            pairs = (_PAIRS[(millisecond >> shift) & 1023] for shift in (40, 30, 20, 10, 0))
            self._stamp = "".join(pairs) + self._prefix
        self._count = count = (self._count + 1) & 0x3FFFFFFF
        return self._stamp + _PAIRS[count >> 20] + _PAIRS[(count >> 10) & 1023] + _PAIRS[count & 1023]
