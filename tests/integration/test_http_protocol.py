"""Hot routes over a real socket: the short way answers what HTTP asks for, in order and in full."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving.access import AccessPolicy
from serving.draining import DrainingServer
from serving.endpoints import Gateway, HotRoutes
from serving.metrics import RequestMetrics
from serving.protocol import HotProtocol
from tests.support.waiting import PATIENCE_SECONDS, until

LIMIT = 200_000


@asynccontextmanager
async def server(
    **options: Any,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, DrainingServer]]:
    """A connection to a server with the hot route ``/echo``, and ``/cold`` behind it.

    The echo is slow for a body that begins with `slow`, so that order is put to the test; `slowest` lasts
    until the server has noticed that it is to end.
    """

    async def echo(body: bytes, request_id: str) -> bytes:
        if body.startswith(b'"slowest'):
            await until(lambda: not running.servers[0].is_serving(), "the server takes no new connections")
        elif body.startswith(b'"slow'):
            await asyncio.sleep(0.05)
        return body

    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse(b"cold " + await request.body())

    gateway = Gateway(max_body_bytes=LIMIT, access=AccessPolicy(""), metrics=RequestMetrics())
    app = HotRoutes(Starlette(routes=[Route("/cold", plain, methods=["POST"])]), gateway, {"/echo": echo})
    config = uvicorn.Config(app, port=0, http=HotProtocol, log_level="warning", lifespan="off", **options)
    running = DrainingServer(config)
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer, running
    finally:
        writer.close()
        running.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(task, PATIENCE_SECONDS)


def request(body: bytes, *headers: str, path: str = "/echo", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *headers]
    if not any(header.startswith("transfer-encoding") for header in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)).decode()
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


def test_a_hot_route_answers_with_the_headers_of_any_other() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, _):
            writer.write(request(b'{"a": 1}', "x-request-id: mine"))
            status, headers, body = await answer(reader)
            assert (status, body) == (200, b'{"a": 1}')
            assert headers["content-type"] == "application/json"
            assert headers["x-request-id"] == "mine"
            assert "date" in headers
            writer.write(request(b"1", path="/cold"))
            assert (await answer(reader))[2] == b"cold 1"

    asyncio.run(scenario())


def test_pipelined_requests_are_answered_in_order_hot_or_not() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, _):
            writer.write(
                request(b'"slow 1"') + request(b'"2"') + request(b"3", path="/cold") + request(b'"slow 4"')
            )
            writer.write(request(b'"5"')[:-2])
            bodies = [(await answer(reader))[2] for _ in range(4)]
            assert bodies == [b'"slow 1"', b'"2"', b"cold 3", b'"slow 4"']
            writer.write(b'5"')
            assert (await answer(reader))[2] == b'"5"'

    asyncio.run(scenario())


def test_a_body_in_pieces_chunked_or_not_arrives_whole() -> None:
    async def scenario() -> None:
        body = b'"' + b"x" * 150_000 + b'"'
        async with server() as (reader, writer, _):
            whole = request(body)
            for start in range(0, len(whole), 20_000):
                writer.write(whole[start : start + 20_000])
                await writer.drain()
                await asyncio.sleep(0.002)
            assert (await answer(reader))[2] == body
            writer.write(request(b'4\r\n"abc\r\n2\r\n1"\r\n0\r\n\r\n', "transfer-encoding: chunked"))
            assert (await answer(reader))[2] == b'"abc1"'

    asyncio.run(scenario())


def test_a_body_over_the_limit_is_refused_before_it_is_all_there() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, _):
            whole = request(b'"' + b"x" * (3 * LIMIT))
            writer.write(whole[: LIMIT + 10_000])
            status, headers, body = await answer(reader)
            assert status == 413
            assert headers["content-type"] == "application/problem+json"
            assert b"too_large" in body
            writer.write(whole[LIMIT + 10_000 :])
            writer.write(request(b'"next"'))
            assert (await answer(reader))[2] == b'"next"'

    asyncio.run(scenario())


def test_expect_100_continue_is_honoured() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, _):
            whole = request(b'"later"', "expect: 100-continue")
            writer.write(whole[:-7])
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)).startswith(
                b"HTTP/1.1 100"
            )
            writer.write(whole[-7:])
            assert (await answer(reader))[2] == b'"later"'

    asyncio.run(scenario())


def test_connection_close_and_http_1_0_close_after_the_answer() -> None:
    async def scenario() -> None:
        for headers, version in ((["connection: close"], "1.1"), ([], "1.0")):
            async with server() as (reader, writer, _):
                writer.write(request(b'"1"', *headers, version=version))
                _, found, body = await answer(reader)
                assert (found["connection"], body) == ("close", b'"1"')
                assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""

    asyncio.run(scenario())


def test_a_client_that_leaves_early_harms_nobody() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, _):
            port = writer.get_extra_info("peername")[1]
            for size in (None, -3):
                _, other = await asyncio.open_connection("127.0.0.1", port)
                other.write(request(b'"slow"')[:size])
                await other.drain()
                other.close()
            await asyncio.sleep(0.1)
            writer.write(request(b'"1"'))
            assert (await answer(reader))[2] == b'"1"'

    asyncio.run(scenario())


def test_a_retiring_server_answers_once_more_and_says_that_it_closes() -> None:
    """In flight and idle alike; nothing new is taken."""

    async def scenario() -> None:
        async with server() as (reader, writer, running):
            port = writer.get_extra_info("peername")[1]
            busy_reader, busy = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(b'"1"'))
            assert "connection" not in (await answer(reader))[1]
            busy.write(request(b'"slowest"') + request(b'"2"', path="/cold"))
            await asyncio.sleep(0.02)
            running.retire()
            first, second = await answer(busy_reader), await answer(busy_reader)
            assert (first[2], second[2]) == (b'"slowest"', b'cold "2"')
            assert "connection" not in first[1]
            assert second[1]["connection"] == "close"
            assert await asyncio.wait_for(busy_reader.read(), PATIENCE_SECONDS) == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(b'"later"'))
            _, headers, body = await answer(reader)
            assert (headers["connection"], body) == ("close", b'"later"')
            assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""
            busy.close()

    asyncio.run(scenario())


def test_a_retiring_server_leaves_an_idle_connection_its_keep_alive_time_and_a_stopping_one_does_not() -> (
    None
):
    async def scenario() -> None:
        for stops, keep_alive_seconds, least in ((False, 2, 1.7), (True, 10_000, 0.8)):
            async with server(timeout_keep_alive=keep_alive_seconds) as (reader, writer, running):
                writer.write(request(b'"1"'))
                await answer(reader)
                began = time.monotonic()
                running.handle_exit(signal.SIGTERM, None) if stops else running.retire()
                assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""
                assert time.monotonic() - began > least

    asyncio.run(scenario())


def test_shutdown_lets_a_hot_request_finish() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, running):
            writer.write(request(b'"slowest"'))
            await writer.drain()
            await asyncio.sleep(0.02)
            running.handle_exit(signal.SIGTERM, None)
            assert (await answer(reader))[2] == b'"slowest"'
            assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""

    asyncio.run(scenario())
