"""Requests and replies on one link, without a server: bytes out, bytes in, in any pieces."""

from __future__ import annotations

import asyncio
from typing import Any

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from core.errors import InvalidRepository, NotRedis, RedisReplyError, RedisUnavailable
from core.redis import RedisAddress
from core.redis_cluster import slot_of
from core.redis_connection import HashFields
from core.redis_link import Dialler, Link
from tests.support import clock

ADDRESS = RedisAddress(hosts=(("localhost", 6379),))
some_bytes = st.binary(max_size=40)


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


def open_link(timeout_seconds: float | None = None) -> tuple[Link, Wire]:
    link, wire = Link(ADDRESS, timeout_seconds), Wire()
    link.connection_made(wire)
    return link, wire


def array(values: list[bytes | None]) -> bytes:
    cells = [b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value) for value in values]
    return b"*%d\r\n%s" % (len(values), b"".join(cells))


@given(st.lists(some_bytes, min_size=1, max_size=5), st.lists(some_bytes, min_size=1, max_size=6))
def test_a_pipeline_is_what_hiredis_would_write(fields: list[bytes], keys: list[bytes]) -> None:
    written = HashFields(fields)
    expected = b"".join(hiredis.pack_command((b"HMGET", key, *fields)) for key in keys)
    assert written.request(keys) == expected
    assert written.request(keys) == expected  # now with the lengths of its keys known


@given(st.integers(1, 50), st.integers(0, 12))
def test_keys_of_one_length_are_framed_like_others(count: int, size: int) -> None:
    keys = [bytes([index]) * size for index in range(count)]
    expected = b"".join(hiredis.pack_command((b"HMGET", key, b"f", b"\r\n")) for key in keys)
    assert HashFields([b"f", b"\r\n"]).request(keys) == expected


def test_fields_cannot_be_none_at_all() -> None:
    with pytest.raises(ValueError, match="at least one field"):
        HashFields([])


@given(st.binary(max_size=60) | st.from_regex(rb"[a{}]{0,12}", fullmatch=True))
def test_slots_are_those_of_redis_py(key: bytes) -> None:
    assert slot_of(key) == key_slot(key)


@settings(max_examples=60)
@given(st.data())
def test_every_caller_gets_his_own_replies_however_the_bytes_arrive(data: st.DataObject) -> None:
    """Any callers, some of whom give up, some refused; any cuts in the stream."""
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6), "commands per caller")
    cells = st.lists(st.none() | some_bytes, min_size=1, max_size=3)
    replies = [[data.draw(st.none() | cells) for _ in range(count)] for count in counts]
    given_up = data.draw(st.sets(st.integers(0, len(counts) - 1)), "callers who give up")
    stream = b"".join(
        b"-WRONGTYPE no hash\r\n" if reply is None else array(reply) for batch in replies for reply in batch
    )
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8), "cuts"))
    leave_at = data.draw(st.integers(0, len(cuts)), "piece after which they give up")

    async def scenario() -> None:
        link, _ = open_link()
        futures = [link.send(b"", count) for count in counts]
        for index, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(stream)], strict=True)):
            if start < end:
                link.data_received(stream[start:end])
            if index == leave_at:
                for caller in given_up:
                    futures[caller].cancel()
        assert not link.lost.done()
        assert link.in_flight == 0
        for caller, (future, batch) in enumerate(zip(futures, replies, strict=True)):
            if future.cancelled():
                assert caller in given_up
            elif None in batch:
                with pytest.raises(RedisReplyError, match="WRONGTYPE"):
                    future.result()
            else:
                assert future.result() == batch

    asyncio.run(scenario())


def test_an_idle_link_writes_at_once_and_a_busy_one_once_per_turn() -> None:
    async def scenario() -> None:
        link, wire = open_link()
        link.send(b"a", 1)
        assert wire.writes == [b"a"]
        for payload in (b"b", b"c", b"d"):
            link.send(payload, 1)
        assert wire.writes == [b"a"]
        await asyncio.sleep(0)
        assert wire.writes == [b"a", b"bcd"]
        link.drop(ADDRESS.unavailable("done"))

    asyncio.run(scenario())


@pytest.mark.parametrize("unasked", [b"+hello\r\n", b"$5\r\nhal", b"HTTP/1.1 400 Bad Request\r\n"])
def test_a_word_unasked_ends_the_link(unasked: bytes) -> None:
    async def scenario() -> None:
        link, wire = open_link()
        answered, waiting = link.send(b"", 1), None
        if unasked.startswith(b"HTTP"):
            waiting = answered
            link.data_received(unasked)
        else:
            link.data_received(b"+PONG\r\n" + unasked)
            assert await answered == [b"PONG"]
        assert wire.aborted
        assert link.lost.done()
        assert isinstance(link.reason, NotRedis)
        if waiting:
            with pytest.raises(RedisUnavailable):
                await waiting
        with pytest.raises(RedisUnavailable):
            await link.send(b"", 1)

    asyncio.run(scenario())


def test_silence_longer_than_the_timeout_ends_the_link_for_all_who_wait() -> None:
    async def scenario() -> None:
        link, wire = open_link(timeout_seconds=0.05)
        futures = [link.send(b"", 1) for _ in range(3)]
        link.data_received(b"+PONG\r\n")
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert outcomes[0] == [b"PONG"]
        assert all(isinstance(outcome, RedisUnavailable) for outcome in outcomes[1:])
        assert wire.aborted

    clock.run(scenario())


def test_a_slow_stream_of_whole_replies_is_no_silence() -> None:
    async def scenario() -> None:
        link, _ = open_link(timeout_seconds=0.2)
        futures = [link.send(b"", 1) for _ in range(6)]
        for _ in range(6):
            await asyncio.sleep(0.07)
            link.data_received(b"+PONG\r\n")
        assert await asyncio.gather(*futures) == [[b"PONG"]] * 6

    clock.run(scenario())


@pytest.mark.parametrize(
    "options",
    [{"ssl_validate_ocsp": True, "ssl": True}, {"credential_provider": "x"}, {"retry_on_timout": True}],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRepository, match=next(iter(options))):
        Dialler.of(ADDRESS, options, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"ssl_ca_certs": "/nowhere/ca.pem"},
        {"ssl_cert_reqs": "sometimes"},
        {"ssl_certfile": "/nowhere/client.pem"},
        {"ssl_min_version": 1},
        {"ssl_ciphers": "NO-SUCH"},
    ],
)
def test_tls_options_that_cannot_be_used_are_the_repositorys_fault(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRepository, match="ssl_"):
        Dialler.of(ADDRESS, {"ssl": True, **options}, 1.0)


def test_what_comes_together_leaves_together_once_it_has_come_together_before() -> None:
    async def scenario() -> None:
        link, wire = open_link()
        for count, writes in ((3, 2), (3, 1), (1, 1), (1, 1)):
            wire.writes.clear()
            futures = [link.send(b"c", 1) for _ in range(count)]
            await asyncio.sleep(0)
            assert len(wire.writes) == writes
            assert b"".join(wire.writes) == b"c" * count
            link.data_received(b"+OK\r\n" * count)
            assert [future.result() for future in futures] == [[b"OK"]] * count
        wire.writes.clear()
        link.send(b"alone", 1)
        assert wire.writes == [b"alone"], "written at once: the last turn had but one"

    asyncio.run(scenario())
