"""Uvicorn's HTTP protocol with a short way for hot routes: body in, answer out, one write to the socket.

Going through ASGI costs a request several times what its headers do: a scope, an event and a cycle made, a
task, two coroutines awaited per message, header patterns matched, head and body written one after the
other, each a system call that wakes the client. Clients also send the same head again and again; one that
is byte for byte like an earlier one is not parsed anew. Keep-alive, flow control, pipelining and shutdown
stay uvicorn's. What is not hot goes through ASGI as ever, and so does a hot request that waits for
``100 Continue`` or that was sent before the answer to the one before it. Knows no JSON.
"""

from __future__ import annotations

import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from core import handover
from serving.endpoints import HotRoutes, KnownHead

_END_OF_HEAD = b"\r\n\r\n"


class HotProtocol(HttpToolsProtocol):
    """One connection of a client."""

    cycle: Any  # uvicorn's own, or a _HotRequest; None before the first request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app = self.config.app
        plain = not self.root_path and self.limit_concurrency is None
        self._routes = app if plain and isinstance(app, HotRoutes) else None
        self._hot: _HotRequest | None = None  # while its body is being read
        self._between_requests = True
        self._idle_since = 0.0
        self._headers_of_all: tuple[Any, bytes] = None, b""
        self._draining = False

    def drain(self) -> None:
        """Close the connection after the next answer that has not begun, and say so in it."""
        self._draining = True
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    # Reading

    def data_received(self, data: bytes) -> None:
        """Part of asyncio's protocol."""
        routes = self._routes
        if routes is None or not self._between_requests or not self._answered:
            super().data_received(data)
            return
        end = data.find(_END_OF_HEAD) + len(_END_OF_HEAD)
        known = routes.heads.get(data[:end])
        if known is not None and len(data) - end == known.body_bytes:
            self.cycle = hot = _HotRequest(known, known.keep_alive and not self._draining)
            hot.body = data[end:]
            self._start(hot)
            return
        super().data_received(data)
        hot = self.cycle
        # Where data is one request and no more, what is not body is head, and nothing but a length frames it.
        if type(hot) is _HotRequest and self._between_requests and len(data) - end == len(hot.body):
            routes.learn(data[:end], hot.known._replace(body_bytes=len(hot.body)))

    @property
    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        """Part of uvicorn's protocol: a request begins; whether it is hot is not known yet."""
        self._between_requests = False
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Part of uvicorn's protocol."""
        known = self._find()
        if known is not None:
            self.cycle = self._hot = _HotRequest(known, known.keep_alive and not self._draining)
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        super().on_headers_complete()

    def _find(self) -> KnownHead | None:
        """The hot request whose turn it is; None for all that ASGI is for."""
        if self._routes is None or self.expect_100_continue or not self._answered:
            return None
        if b"?" in self.url or b"%" in self.url or self.parser.should_upgrade():
            return None
        found = self._routes.find(self.parser.get_method().decode(), self.url.decode("latin-1"))
        if found is None:
            return None
        route, endpoint = found
        head = self._routes.gateway.examine(route, "POST", self.headers)
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        return KnownHead(head, endpoint, keep_alive)

    def on_body(self, body: bytes) -> None:
        """Part of uvicorn's protocol."""
        hot = self._hot
        if hot is not None:
            hot.body += body
            assert self._routes is not None
            if len(hot.body) > self._routes.gateway.max_body_bytes:
                self._start(hot)  # to be refused; the rest is dropped
        elif type(self.cycle) is not _HotRequest:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Part of uvicorn's protocol."""
        self._between_requests = True
        if self._hot is not None:
            self._start(self._hot)
        elif type(self.cycle) is not _HotRequest:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Part of uvicorn's protocol: it is the turn of a request that is not hot."""
        if self._draining and cycle is self.cycle:  # the last one read: those before it are answered first
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    # Answering

    def _start(self, hot: _HotRequest) -> None:
        self._hot = None
        handover.run(self._answer(hot))

    async def _answer(self, hot: _HotRequest) -> None:
        assert self._routes is not None
        known = hot.known
        started = time.perf_counter()
        reply = await self._routes.gateway.respond(known.head, known.endpoint, bytes(hot.body), started)
        if self.flow.write_paused and not hot.disconnected:
            await self.flow.drain()
        if hot.disconnected or self.transport.is_closing():
            return
        extra = b"".join([b"%b: %b\r\n" % header for header in reply.extra_headers])
        if not hot.keep_alive:
            extra += b"connection: close\r\n"
        hot.response_complete = True
        self.transport.write(
            b"%b%bcontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b"
            % (
                STATUS_LINE[reply.status],
                self._default_headers(),
                reply.content_type,
                len(reply.body),
                reply.request_id.encode("latin-1"),
                extra,
                reply.body,
            )
        )
        if not hot.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _default_headers(self) -> bytes:
        headers = self.server_state.default_headers  # uvicorn makes them anew every second
        if headers is not self._headers_of_all[0]:
            lines = b"".join([b"%b: %b\r\n" % header for header in headers])
            self._headers_of_all = headers, lines
        return self._headers_of_all[1]

    # One timer for an idle connection, not one after every answer.

    def on_response_complete(self) -> None:
        """Part of uvicorn's protocol."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_again_in(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Part of uvicorn's protocol."""
        self.timeout_keep_alive_task = None
        if self._answered and not self.transport.is_closing():
            left = self._idle_since + self.timeout_keep_alive - self.loop.time()
            if left > 0:
                self._look_again_in(left)
            else:
                self.transport.close()

    def _look_again_in(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)


class _HotRequest:
    """Stands where uvicorn keeps a connection's current request, with what uvicorn asks of one."""

    __slots__ = ("body", "disconnected", "keep_alive", "known", "response_complete")

    def __init__(self, known: KnownHead, keep_alive: bool) -> None:
        self.known = known
        self.keep_alive = keep_alive
        self.body: bytes | bytearray = bytearray()
        self.disconnected = False
        self.response_complete = False

    @property
    def response_started(self) -> bool:
        """An answer is written at once."""
        return self.response_complete

    @property
    def message_event(self) -> _HotRequest:
        """Uvicorn wakes whoever waits for more of the request: nobody does."""
        return self

    def set(self) -> None:
        """See ``message_event``."""
