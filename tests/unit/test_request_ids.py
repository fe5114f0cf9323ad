"""Request ids are ULIDs: unique, sorted by time, from one process or many."""

from __future__ import annotations

import re
import time

from serving.request_ids import RequestIds


def test_ids_are_unique_and_sorted_as_they_are_made() -> None:
    source = RequestIds()
    source._count = 0
    made = [source.next() for _ in range(50_000)]
    assert len(set(made)) == len(made)
    assert made == sorted(made)
    assert all(re.fullmatch(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", name) for name in made[:100])


def test_the_first_ten_characters_are_the_time() -> None:
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    before = time.time_ns() // 1_000_000
    made = RequestIds().next()
    stamp = 0
    for letter in made[:10]:
        stamp = stamp * 32 + alphabet.index(letter)
    assert before <= stamp <= time.time_ns() // 1_000_000


def test_two_processes_do_not_meet() -> None:
    one, other = RequestIds(), RequestIds()
    assert {one.next() for _ in range(1000)}.isdisjoint({other.next() for _ in range(1000)})
