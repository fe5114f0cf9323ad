"""Entries of a stream: what is an event, what is refused and why, and in which order they count."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.repository import Definitions, FeastRepository, Feature, SourceColumns, View
from core.types import Dtype, Field
from materialization.stream_events import Entry, PushSources, read_entry
from materialization.stream_group import dead_letters

NOW = datetime.now(tz=UTC) - timedelta(hours=1)


class Fixed(FeastRepository):
    """A repository whose definitions a test sets."""

    def __init__(self, *views: View) -> None:
        super().__init__(Path("nowhere"), {"project": "shop", "registry": "registry.db"})
        self.views = views

    def fingerprint(self) -> object:
        return self.views

    def definitions(self) -> Definitions:
        views = {view.name: view for view in self.views}
        return Definitions(project="shop", views=views, on_demand={}, services={}, pinned={})


def a_view(name: str = "clicks", push: str = "clicks_push", **source: Any) -> View:
    columns: dict[str, Any] = {"timestamp": "at", "created": "created", "field_mapping": {}, "push": push}
    return View(
        name=name,
        stored_name=name,
        join_keys=(Field("user_id", Dtype.INT64),),
        features=(Feature("clicks", Dtype.INT64, {"min": "0"}),),
        ttl=timedelta(0),
        source=SourceColumns(**{**columns, **source}),
    )


def entry(row: Any = None, *, number: int = 0, source: str = "clicks_push", **fields: Any) -> Entry:
    raw = {"push_source": source, **({"event": json.dumps(row)} if row is not None else {}), **fields}
    encoded = {k.encode(): v if isinstance(v, bytes) else v.encode() for k, v in raw.items()}
    return Entry(b"%d-0" % (1_800_000_000_000 + number), encoded)


def row(user: Any = 1, clicks: Any = 1, **columns: Any) -> dict[str, Any]:
    return {"user_id": user, "clicks": clicks, "at": NOW.isoformat(), **columns}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({b"event": b"{}"}, "push_source is missing"),
        ({b"push_source": b"", b"event": b"{}"}, "push_source is missing"),
        ({b"push_source": b"a"}, "either the field event or"),
        ({b"push_source": b"a", b"event": b"{}", b"rows": b"[{}]"}, "either the field event or"),
        ({b"push_source": b"a", b"event": b"{}", b"when": b"now"}, "Unknown field `when`"),
        ({b"push_source": b"a", b"event": b"{}", b"\xff": b""}, r"Unknown field `\\xff`"),
        ({b"push_source": b"a", b"event": b""}, "not valid JSON"),
        ({b"push_source": b"a", b"event": b'{"a": NaN}'}, "not valid JSON"),
        ({b"push_source": b"a", b"event": b"\xff"}, "not valid JSON"),
        ({b"push_source": b"a", b"event": b"[{}]"}, "event is not a JSON object"),
        ({b"push_source": b"a", b"event": b'{"a": 1, "a": 2}'}, "`a` twice"),
        ({b"push_source": b"a", b"rows": b'[{"a": 1}, {"a": 1, "a": 2}]'}, "`a` twice"),
        ({b"push_source": b"a", b"rows": b"{}"}, "not a JSON list"),
        ({b"push_source": b"a", b"rows": b"[]"}, "not a JSON list"),
        ({b"push_source": b"a", b"rows": b'[{"a": 1}, 2]'}, "Row 1 of the field rows"),
        ({b"push_source": b"a", b"rows": b'[{"a": 1}, {"b": 1}]'}, "Row 1 differs from row 0"),
        ({b"push_source": b"a", b"event": b"[" * 100_000 + b"]" * 100_000}, "not valid JSON"),
    ],
)
def test_an_entry_that_is_no_event_is_refused_with_the_reason(fields: dict[bytes, bytes], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read_entry(Entry(b"1-0", fields))


def test_one_row_and_many_are_read() -> None:
    assert read_entry(entry({"a": 1})) == ("clicks_push", [{"a": 1}])
    assert read_entry(entry(rows='[{"a": 1, "b": 2}, {"b": 3, "a": null}]')) == (
        "clicks_push",
        [{"a": 1, "b": 2}, {"b": 3, "a": None}],
    )


@given(st.sets(st.tuples(st.integers(0, 2**42), st.integers(0, 999)), min_size=2))
def test_entries_arrive_in_the_order_of_their_ids(ids: set[tuple[int, int]]) -> None:
    arrived = [Entry(b"%d-%d" % pair, {}).arrived_ns for pair in sorted(ids)]
    assert arrived == sorted(set(arrived))
    assert all(ns % 1000 == 0 for ns in arrived), "created timestamps are kept in microseconds"


@settings(deadline=None)  # the first call imports
@given(st.lists(st.booleans(), max_size=70))
def test_each_bad_entry_is_refused_alone_wherever_it_stands(good: list[bool]) -> None:
    entries = [entry(row(number, 1 if fine else -1), number=number) for number, fine in enumerate(good)]
    batches, refused = PushSources(Fixed(a_view()), offline=False).check(entries)
    taken = [e for batch in batches for e in batch.entries]
    assert taken == [e for e, fine in zip(entries, good, strict=True) if fine], "in their order"
    assert [r.entry for r in refused] == [e for e, fine in zip(entries, good, strict=True) if not fine]
    assert all("in row 0: -1 does not meet min 0" in str(r.error) for r in refused)
    for batch in batches:
        ((checked, encoded),) = batch.online
        assert checked.columns["user_id"] == [entries.index(e) for e in batch.entries]
        assert encoded.rows == batch.rows == len(batch.entries)


def test_events_of_several_sources_and_columns_are_checked_together() -> None:
    views = [a_view(), a_view("totals"), a_view("visits", "visits_push", created=None)]
    entries = [
        entry(row(1), number=1),
        entry(row(2), number=2, source="visits_push"),
        entry(row(3, created=NOW.isoformat()), number=3),
        entry(row(4), number=4, source="elsewhere"),
    ]
    batches, refused = PushSources(Fixed(*views), offline=False).check(entries)
    by_view = {
        (part.view.name, user): created
        for batch in batches
        for part, _ in batch.online
        for user, created in zip(part.columns["user_id"], part.created_ns or [None], strict=True)
    }
    assert by_view[("clicks", 1)] == by_view[("totals", 1)] == entries[0].arrived_ns
    assert by_view[("visits", 2)] is None
    assert by_view[("clicks", 3)] == int(NOW.timestamp() * 1_000_000) * 1000
    ((refusal),) = refused
    assert refusal.entry is entries[3]
    assert "clicks_push, visits_push" in str(refusal.error)


def test_a_push_source_that_was_just_defined_is_found() -> None:
    repository = Fixed()
    sources = PushSources(repository, offline=False)
    assert len(sources.check([entry(row())])[1]) == 1
    repository.views = (a_view(),)
    assert sources.check([entry(row())])[1] == []


@pytest.mark.parametrize("stream", ["events", "banquet:events:shop", "{a}:b", "a{b}c"])
def test_the_dead_letters_are_in_the_slot_of_the_stream(stream: str) -> None:
    from redis.crc import key_slot

    assert dead_letters(stream) != stream
    assert key_slot(dead_letters(stream).encode()) == key_slot(stream.encode())
