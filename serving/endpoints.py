"""The seam between HTTP and what answers: raw ASGI for the routes that must be fast.

FastAPI stays the face (routing, OpenAPI, everything that is not hot); an ``Endpoint`` takes a body and
returns JSON bytes, and the same ``Gateway`` runs it whether the request came through FastAPI's router or
straight from the server. Everything every request needs happens here once: credentials, content type,
size limit, request id, errors, metrics.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from core.errors import BanquetError
from serving.access import AccessPolicy
from serving.failures import FailureLog
from serving.metrics import RequestMetrics
from serving.problems import CONTENT_TYPE as PROBLEM
from serving.problems import BodyTooLarge, UnsupportedMediaType, problem
from serving.request_ids import RequestIds

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

_JSON = b"application/json"
_RETRY_AFTER_S = b"1"
_MOST_HEADS, _LONGEST_HEAD = 2048, 1024


class Endpoint(Protocol):
    """One operation: a body in, a JSON body out; errors are raised."""

    async def __call__(self, body: bytes, request_id: str) -> bytes: ...


class Head(NamedTuple):
    """What the gateway takes from a request's headers; ``refusal`` is None where they pass."""

    route: str
    request_id: str | None
    refusal: BanquetError | None


class KnownHead(NamedTuple):
    """All there is to know of a hot request before its body, whose length ``body_bytes`` is."""

    head: Head
    endpoint: Endpoint
    keep_alive: bool
    body_bytes: int = 0


class Reply(NamedTuple):
    """What goes back to the client."""

    status: int
    content_type: bytes
    request_id: str
    body: bytes

    @property
    def extra_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """What stands beside content type, length and request id."""
        return _EXTRA_HEADERS.get(self.status, ())


_EXTRA_HEADERS = {503: ((b"retry-after", _RETRY_AFTER_S),), 401: ((b"www-authenticate", b"Bearer"),)}


class Gateway:
    """Runs endpoints for requests."""

    def __init__(self, *, max_body_bytes: int, access: AccessPolicy, metrics: RequestMetrics) -> None:
        self.max_body_bytes = max_body_bytes
        self._access = access
        self._metrics = metrics
        self.request_ids = RequestIds()
        self.failures = FailureLog()

    async def answer(
        self, route: str, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Read the request from ASGI, run the endpoint, send its answer or the problem it raised."""
        started = time.perf_counter()
        head = self.examine(route, scope["method"], scope["headers"])
        has_body = scope["method"] == "POST" and head.refusal is None
        body = await self._read(receive) if has_body else b""
        reply = await self.respond(head, endpoint, body, started)
        headers = [
            (b"content-type", reply.content_type),
            (b"content-length", b"%d" % len(reply.body)),
            (b"x-request-id", reply.request_id.encode("latin-1")),
            *reply.extra_headers,
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    def examine(self, route: str, method: str, headers: Iterable[tuple[bytes, bytes]]) -> Head:
        """Check credentials and content type; never raises."""
        content_type = encoding = credentials = request_id = None
        for name, value in headers:
            if name == b"content-type":
                content_type = value
            elif name == b"content-encoding":
                encoding = value
            elif name == b"authorization":
                credentials = value
            elif name == b"x-request-id":
                request_id = value
        refusal = None
        try:
            self._access.check(credentials)
            if method == "POST":
                # The inference protocol names no content type, and Triton's client sends none; most changes
                # of the admin API need no body.
                _check_content_type(content_type, optional=route.startswith(("/v2/", "/admin/")))
                _check_encoding(encoding)
        except BanquetError as exc:
            refusal = exc
        return Head(route, given_id(request_id), refusal)

    async def respond(self, head: Head, endpoint: Endpoint, body: bytes, started: float) -> Reply:
        """Run the endpoint on the body, whose length is checked here; never raises.

        ``started`` is when the request began, by ``time.perf_counter``.
        """
        identity = head.request_id or self.request_ids.next()
        status, kind = 200, _JSON
        try:
            if head.refusal is not None:
                raise head.refusal
            if len(body) > self.max_body_bytes:
                raise self._too_large()
            payload = await endpoint(body, identity)
        except Exception as exc:  # noqa: BLE001 — the last line: nothing may leak, nothing may go unanswered
            status, payload = problem(exc, identity, self.failures)
            kind = PROBLEM
        self._metrics.observe(head.route, status, time.perf_counter() - started)
        return Reply(status, kind, identity, payload)

    async def _read(self, receive: Receive) -> bytes:
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body") and size <= self.max_body_bytes:
                message = await receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
            body = b"".join(parts)
        return body

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The request body is larger than {self.max_body_bytes} bytes.",
            hint="Send fewer entities at once, or raise BANQUET_MAX_BODY_BYTES.",
            limit=self.max_body_bytes,
        )


class HotRoutes:
    """Answers some POST routes straight from the server and hands everything else to ``app``.

    ``endpoints`` has exact paths, ``patterns`` paths with parameters, such as ``/models/{name}/predict``, and
    what makes the endpoint from them.
    """

    def __init__(
        self,
        app: App,
        gateway: Gateway,
        endpoints: Mapping[str, Endpoint],
        patterns: Mapping[str, Callable[..., Endpoint]] | None = None,
    ) -> None:
        self._app = app
        self.gateway = gateway
        self._endpoints = endpoints
        self._patterns = [
            (route, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route)), make)
            for route, make in (patterns or {}).items()
        ]
        self.heads: dict[bytes, KnownHead] = {}

    def learn(self, head: bytes, known: KnownHead) -> None:
        """Remember a head that passed, byte for byte, unless it is the kind that never comes again."""
        if known.head.refusal is None and known.head.request_id is None and len(head) <= _LONGEST_HEAD:
            if len(self.heads) >= _MOST_HEADS:
                self.heads.clear()
            self.heads[head] = known

    def find(self, method: str, path: str) -> tuple[str, Endpoint] | None:
        """A hot route and its endpoint; None for any other request."""
        if method != "POST":
            return None
        endpoint = self._endpoints.get(path)
        if endpoint is not None:
            return path, endpoint
        for route, pattern, make in self._patterns:
            match = pattern.fullmatch(path)
            if match is not None:
                return route, make(**match.groupdict())
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = self.find(scope["method"], scope["path"])
            if found is not None:
                await self.gateway.answer(*found, scope, receive, send)
                return
        await self._app(scope, receive, send)


def _check_content_type(value: bytes | None, *, optional: bool) -> None:
    if value is None and optional:
        return
    if value is None or value.partition(b";")[0].strip().lower() != _JSON:
        shown = "none" if value is None else value.decode("latin-1")
        raise UnsupportedMediaType(
            f"The content type is {shown}; it must be application/json.",
            hint="Send the header `Content-Type: application/json`.",
            field="content-type",
        )


def _check_encoding(value: bytes | None) -> None:
    if value is not None and value.strip().lower() != b"identity":
        raise UnsupportedMediaType(
            f"The body is encoded as {value.decode('latin-1')}, which this server does not decode.",
            hint="Send it as it is, without the header `Content-Encoding`.",
            field="content-encoding",
        )


def given_id(request_id: bytes | None) -> str | None:
    """A caller's own id, if it is short and printable enough to go back into a header and a log."""
    if request_id is None or len(request_id) > 128:
        return None
    text = request_id.decode("latin-1")
    return text if text.isascii() and text.isprintable() and text else None
