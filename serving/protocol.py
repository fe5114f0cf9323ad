"""Uvicorn's HTTP protocol with a short way for hot routes: body in, answer out, one write to the socket.

Going through ASGI costs a request several times what its headers do: a scope, an event and a cycle made,
two coroutines awaited per message, header patterns matched, head and body written one after the other,
each a system call that wakes the client. Parsing, keep-alive, flow control and shutdown stay uvicorn's.
What is not hot goes through ASGI as ever, and so does a hot request that waits for ``100 Continue`` or that
was sent before the answer to the one before it. Knows no JSON.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.endpoints import Endpoint, HotRoutes


class HotProtocol(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routes = self.config.app if isinstance(self.config.app, HotRoutes) else None
        self._hot: _HotRequest | None = None  # while its body is being read

    def on_message_begin(self) -> None:
        """Part of uvicorn's protocol: a request begins; whether it is hot is not known yet."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Part of uvicorn's protocol."""
        found = self._find()
        if found is not None:
            keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
            self.cycle = self._hot = _HotRequest(*found, self.headers, keep_alive)  # type: ignore[assignment]
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        super().on_headers_complete()

    def _find(self) -> tuple[str, Endpoint] | None:
        """The hot route whose turn it is; None for all that ASGI is for."""
        if self._routes is None or self.expect_100_continue or self.parser.should_upgrade():
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        if b"?" in self.url or b"%" in self.url:
            return None
        return self._routes.find(self.parser.get_method().decode(), self.url.decode("latin-1"))

    def on_body(self, body: bytes) -> None:
        """Part of uvicorn's protocol."""
        hot = self._hot
        if hot is None:
            super().on_body(body)
            return
        hot.body += body
        assert self._routes is not None
        if len(hot.body) > self._routes.gateway.max_body_bytes:
            self._start(hot)  # to be refused; uvicorn drops the rest of a body that has its answer

    def on_message_complete(self) -> None:
        """Part of uvicorn's protocol."""
        if self._hot is None:
            super().on_message_complete()
        else:
            self._start(self._hot)

    def _start(self, hot: _HotRequest) -> None:
        self._hot = None
        task = self.loop.create_task(self._answer(hot))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, hot: _HotRequest) -> None:
        assert self._routes is not None
        reply = await self._routes.gateway.respond(hot.route, hot.endpoint, "POST", hot.headers, hot.read)
        if self.flow.write_paused and not hot.disconnected:
            await self.flow.drain()
        if hot.disconnected:
            return
        parts = [STATUS_LINE[reply.status]]
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in reply.headers:
            parts += (name, b": ", value, b"\r\n")
        if not hot.keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", reply.body)
        hot.response_complete = True
        self.transport.write(b"".join(parts))
        if not hot.keep_alive:
            self.transport.close()
        self.on_response_complete()


class _HotRequest:
    """Stands where uvicorn keeps a connection's current request, with what uvicorn asks of one."""

    __slots__ = ("body", "disconnected", "endpoint", "headers", "keep_alive", "response_complete", "route")

    def __init__(
        self, route: str, endpoint: Endpoint, headers: list[tuple[bytes, bytes]], keep_alive: bool
    ) -> None:
        self.route = route
        self.endpoint = endpoint
        self.headers = headers
        self.keep_alive = keep_alive
        self.body = b""
        self.disconnected = False
        self.response_complete = False

    @property
    def message_event(self) -> _HotRequest:
        """Uvicorn wakes whoever waits for more of the request: nobody does."""
        return self

    def set(self) -> None:
        """See ``message_event``."""

    async def read(self) -> bytes:
        """The body, which is all there."""
        return self.body
