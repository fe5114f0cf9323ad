"""Hot routes over a real socket: the short way answers what HTTP asks for, in order and in full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving.access import AccessPolicy
from serving.endpoints import Gateway, HotRoutes
from serving.metrics import RequestMetrics
from serving.protocol import HotProtocol

LIMIT = 200_000


async def echo(body: bytes, request_id: str) -> bytes:
    """Slower for a body that begins with `slow`, so that order is put to the test."""
    if body.startswith(b'"slow'):
        await asyncio.sleep(0.05)
    return body


@asynccontextmanager
async def server() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, uvicorn.Server]]:
    """A connection to a server with the hot route ``/echo``, and ``/cold`` behind it."""

    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse(b"cold " + await request.body())

    gateway = Gateway(max_body_bytes=LIMIT, access=AccessPolicy([]), metrics=RequestMetrics())
    app = HotRoutes(Starlette(routes=[Route("/cold", plain, methods=["POST"])]), gateway, {"/echo": echo})
    config = uvicorn.Config(app, port=0, http=HotProtocol, log_level="warning", lifespan="off")
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer, running
    finally:
        writer.close()
        running.should_exit = True
        await asyncio.wait_for(task, 10)


def request(body: bytes, *headers: str, path: str = "/echo", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *headers]
    if not any(header.startswith("transfer-encoding") for header in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode()
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
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 100")
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
                assert await asyncio.wait_for(reader.read(), 5) == b""

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


def test_shutdown_lets_a_hot_request_finish() -> None:
    async def scenario() -> None:
        async with server() as (reader, writer, running):
            writer.write(request(b'"slow 1"'))
            await writer.drain()
            await asyncio.sleep(0.02)
            running.should_exit = True
            assert (await answer(reader))[2] == b'"slow 1"'
            assert await asyncio.wait_for(reader.read(), 5) == b""

    asyncio.run(scenario())
