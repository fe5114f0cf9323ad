"""Uvicorn's HTTP protocol with a short way for hot routes: body in, answer out, one write to the socket.

Going through ASGI costs a request several times what its headers do: a scope copied, two coroutines
awaited per message, header patterns matched, and head and body written one after the other, each a system
call that wakes the client. Parsing, pipelining, keep-alive, flow control and shutdown stay uvicorn's. A
request that is not hot, or that waits for ``100 Continue``, goes through ASGI as ever. Knows no JSON.

Depends on uvicorn calling ``_start_asgi_task`` for every request; where it does not, all goes through ASGI.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serving.endpoints import Endpoint, HotRoutes


class HotProtocol(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routes = self.config.app if isinstance(self.config.app, HotRoutes) else None
        self._reading: tuple[RequestResponseCycle, str, Endpoint] | None = None
        self._draining = False

    def drain(self) -> None:
        """Close the connection after the next answer that has not begun, and say so in it."""
        self._draining = True
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Part of uvicorn's protocol: the headers of the request whose turn it is are complete."""
        if self._draining and cycle is self.cycle:  # the last one read: those before it are answered first
            cycle.keep_alive = False
        if self._routes is not None and app is self.app and not cycle.waiting_for_100_continue:
            found = self._routes.find(cycle.scope["method"], cycle.scope["path"])
            if found is not None:
                if cycle.more_body:
                    self._reading = cycle, *found
                else:
                    self._start(cycle, *found)
                return
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Part of uvicorn's protocol."""
        super().on_body(body)
        reading = self._reading
        if reading is not None and reading[0] is self.cycle:
            assert self._routes is not None
            if len(self.cycle.body) > self._routes.gateway.max_body_bytes:
                self._reading = None
                self._start(*reading)
            else:
                self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """Part of uvicorn's protocol."""
        super().on_message_complete()
        reading = self._reading
        if reading is not None and reading[0] is self.cycle:
            self._reading = None
            self._start(*reading)

    def _start(self, cycle: RequestResponseCycle, route: str, endpoint: Endpoint) -> None:
        task = self.loop.create_task(self._answer(cycle, route, endpoint))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, cycle: RequestResponseCycle, route: str, endpoint: Endpoint) -> None:
        assert self._routes is not None
        body = bytes(cycle.body)

        async def read() -> bytes:
            return body

        reply = await self._routes.gateway.respond(route, endpoint, "POST", cycle.scope["headers"], read)
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()
        if cycle.disconnected:
            return
        parts = [STATUS_LINE[reply.status]]
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in reply.headers:
            parts += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", reply.body)
        cycle.response_started = cycle.response_complete = True
        self.transport.write(b"".join(parts))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
