"""One socket to a Redis server: dialling, introducing oneself, requests out and replies in.

Knows RESP; reconnecting, Sentinels and what is read over it are ``core.redis_connection``'s.

A reply belongs to the oldest request without one, so no reply is ever skipped: a caller who gives up
leaves his place in the queue, and a link that stalls or says something unasked is dropped whole.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import hiredis

from core.errors import BanquetError, InvalidRepository, NotRedis, RedisAccessDenied, RedisUnavailable
from core.handover import Handover
from core.redis import RedisAddress

_NOT_YET = object()
_HONOURED = frozenset(
    {"db", "username", "password", "client_name", "unix_socket_path", "socket_keepalive", "socket_timeout"}
    | {"socket_connect_timeout", "ssl", "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile"}
    | {"ssl_keyfile", "ssl_password", "ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version", "ssl_ciphers"}
    | {"sentinel_kwargs", "min_other_sentinels", "force_master_ip"}
)
# Options that steer redis-py's pools, retries and text handling, which a link has none of.
_WITHOUT_EFFECT = frozenset(
    {"decode_responses", "encoding", "encoding_errors", "health_check_interval", "lib_name", "lib_version"}
    | {"max_connections", "protocol", "retry_on_timeout", "single_connection_client", "socket_read_size"}
    | {"skip_full_coverage_check", "require_full_coverage", "reinitialize_steps", "dynamic_startup_nodes"}
    | {"cluster_error_retry_attempts", "read_from_replicas"}
)


class Link(asyncio.Protocol):
    """One connection's life. Never used again once ``lost`` is done; ``reason`` then says why.

    ``timeout_seconds`` bounds the wait for the oldest request, counted from when it was sent or, if it was
    queued behind others, from when the one before it was answered.
    """

    def __init__(
        self,
        address: RedisAddress,
        timeout_seconds: float | None,
        on_lost: Callable[[Link], None] | None = None,
    ) -> None:
        self.address = address
        self.in_flight = 0
        self.reason: BanquetError | None = None
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._on_lost = on_lost
        self._timeout = timeout_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._progress = 0.0
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []
        self._crowded = False
        self._reader = hiredis.Reader(replyError=self._refused, notEnoughData=_NOT_YET)
        self._waiting: deque[tuple[Handover[list[Any]], int]] = deque()
        self._replies: list[Any] = []
        self._refusal: str | None = None

    def send(self, payload: bytes, count: int) -> Handover[list[Any]]:
        """Send ``count`` commands; gives all their replies, or raises the first refusal among them.

        What comes in one turn of the loop leaves together at its end. An idle link is written to at once,
        unless several came together the last time: then they most likely do again.
        """
        future: Handover[list[Any]] = Handover(loop=self._loop)
        if self._transport is None:
            future.set_exception(self._unavailable())
            return future
        if not self._waiting:
            self._progress = self._loop.time()
            if self._timer is None and self._timeout is not None:
                self._timer = self._loop.call_later(self._timeout, self._watch)
        if self._waiting or self._crowded:
            if not self._outbox:
                self._loop.call_soon(self._flush)
            self._outbox.append(payload)
        else:
            self._transport.write(payload)
        self._waiting.append((future, count))
        self.in_flight += count
        return future

    def drop(self, reason: BanquetError) -> None:
        """Close the socket now; whoever waits gets ``RedisUnavailable`` with this reason."""
        if self.lost.done():
            return
        self.reason = reason
        self.lost.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._outbox.clear()
        self.in_flight = 0
        if self._on_lost is not None:
            self._on_lost(self)
        while self._waiting:
            self._waiting.popleft()[0].fail(self._unavailable())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol."""
        if self.lost.done():
            transport.close()
        else:
            self._transport = transport  # type: ignore[assignment]  # a stream's is always a full one

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio's protocol."""
        self.drop(self.address.unavailable(str(exc) if exc else "it closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Part of asyncio's protocol."""
        waiting, replies = self._waiting, self._replies
        # Who gets a reply goes on at once: it may send, or drop this link, before the next one gets its own.
        try:
            self._reader.feed(data)
            gets = self._reader.gets
            while waiting:
                future, count = waiting[0]
                if count == 1:
                    if (reply := gets()) is _NOT_YET:
                        return
                    replies.append(reply)
                else:
                    replies.extend(islice(iter(gets, _NOT_YET), count - len(replies)))
                    if len(replies) < count:
                        return
                waiting.popleft()
                self.in_flight -= count
                if waiting:
                    self._progress = self._loop.time()
                self._replies, delivered = [], replies
                replies = self._replies
                if self._refusal is not None:
                    self._deliver_refusal(future)
                else:
                    future.deliver(delivered)
        except hiredis.HiredisError as exc:
            self.drop(self.address.not_redis(str(exc)))
            return
        if self._reader.has_data():
            self.drop(self.address.not_redis("it speaks unasked"))

    def _refused(self, text: str) -> str:
        if self._refusal is None:
            self._refusal = text
        return text

    def _deliver_refusal(self, future: Handover[list[Any]]) -> None:
        text, self._refusal = self._refusal or "", None
        error = self.address.reply_error(text)
        future.fail(error)
        if text.startswith(("READONLY", "MASTERDOWN", "NOAUTH")):
            self.drop(error)  # the next connection finds the master, or learns why not

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        self._crowded = len(outbox) > 1
        if self._transport is not None:
            self._transport.write(b"".join(outbox))

    def _watch(self) -> None:
        self._timer = None
        if not self._waiting or self._timeout is None:
            return
        left = self._progress + self._timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._watch)
        else:
            self.drop(self.address.unavailable(f"no reply within {self._timeout:g} s"))

    def _unavailable(self) -> RedisUnavailable:
        reason = self.reason or self.address.unavailable("there is no connection")
        return RedisUnavailable(reason.message, hint=reason.hint)


@dataclass(frozen=True, slots=True)
class Dialler:
    """How to reach one server and introduce oneself: a connection string's options, understood."""

    address: RedisAddress
    host: str
    port: int
    path: str | None
    tls: ssl.SSLContext | None
    introduction: tuple[tuple[str, ...], ...]
    timeout_seconds: float | None
    connect_timeout_seconds: float | None
    keepalive: bool
    must_be_master: bool = False

    @classmethod
    def of(cls, address: RedisAddress, options: Mapping[str, Any], timeout_seconds: float | None) -> Dialler:
        """``timeout_seconds`` holds where the options say nothing.

        Raises ``InvalidRepository`` for an option that the online read cannot honour.
        """
        for name in options:
            if name not in _HONOURED and name not in _WITHOUT_EFFECT:
                raise InvalidRepository(
                    f"online_store.connection_string sets {name}, which the online read does not support.",
                    hint=f"Remove it; supported are {', '.join(sorted(_HONOURED))}.",
                )
        introduction: list[tuple[str, ...]] = []
        user, password = options.get("username"), options.get("password")
        if user:
            introduction.append(("AUTH", user, password or ""))
        elif password:
            introduction.append(("AUTH", password))
        if options.get("db"):
            introduction.append(("SELECT", str(options["db"])))
        if options.get("client_name"):
            introduction.append(("CLIENT", "SETNAME", options["client_name"]))
        timeout = options.get("socket_timeout", timeout_seconds)
        return cls(
            address=address,
            host=address.host,
            port=address.port,
            path=options.get("unix_socket_path"),
            tls=_tls_context(options) if options.get("ssl") else None,
            introduction=tuple(introduction),
            timeout_seconds=timeout,
            connect_timeout_seconds=options.get("socket_connect_timeout", timeout),
            keepalive=options.get("socket_keepalive") is not False,
        )

    async def open(self, on_lost: Callable[[Link], None] | None = None) -> Link:
        """A link that is connected, authenticated and past loading.

        Raises ``RedisUnavailable``, ``NotRedis``, or ``RedisReplyError`` for a database index out of range.
        """
        link = Link(self.address, self.timeout_seconds, on_lost)
        opened = False
        try:
            async with asyncio.timeout(self.connect_timeout_seconds):
                await self._connect(link)
                await self._introduce(link)
            opened = True
        except TimeoutError as exc:
            limit = f"{self.connect_timeout_seconds:g} s"
            raise self.address.unavailable(f"no connection to {self._place} within {limit}") from exc
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that DNS cannot hold
            raise self.address.unavailable(f"no connection to {self._place}: {exc}") from exc
        finally:
            if not opened:
                link.drop(self.address.unavailable("connecting failed"))
        return link

    @property
    def _place(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    async def _connect(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        if self.path:
            await loop.create_unix_connection(lambda: link, self.path)
            return
        transport, _ = await loop.create_connection(lambda: link, self.host, self.port, ssl=self.tls)
        if self.keepalive:
            # Notices a peer that vanished without a word, about half a minute later, even when nobody asks.
            tcp = transport.get_extra_info("socket")
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    async def _introduce(self, link: Link) -> None:
        words = [*self.introduction, *([("ROLE",)] if self.must_be_master else []), ("PING",)]
        answers = await asyncio.gather(
            *(link.send(hiredis.pack_command(word), 1) for word in words), return_exceptions=True
        )
        if isinstance(link.reason, NotRedis):
            raise link.reason
        for word, answer in zip(words, answers, strict=True):
            if isinstance(answer, BaseException):
                if word[0] in ("CLIENT", "ROLE", "PING") and lacks_permission(answer):
                    continue  # the right to read hashes is enough
                raise answer
            if word == ("ROLE",) and answer[0][0] != b"master":
                raise self.address.unavailable(f"{self._place} is a {answer[0][0].decode()}, not the master")


def lacks_permission(error: BaseException) -> bool:
    """Whether Redis answered, only to say that its user may not run this command."""
    return isinstance(error, RedisAccessDenied) and str(error.details.get("reply")).startswith("NOPERM")


def _tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    """The context that redis-py makes of the same options; raises ``InvalidRepository``."""
    demanded = options.get("ssl_cert_reqs", "required")
    modes = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
    try:
        mode = modes["none" if demanded is None else demanded]
        context = ssl.create_default_context(
            cafile=options.get("ssl_ca_certs"),
            capath=options.get("ssl_ca_path"),
            cadata=options.get("ssl_ca_data"),
        )
        context.check_hostname = bool(options.get("ssl_check_hostname", True)) and mode != ssl.CERT_NONE
        context.verify_mode = mode
        if options.get("ssl_certfile"):
            context.load_cert_chain(
                options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password")
            )
        if options.get("ssl_min_version") is not None:
            context.minimum_version = ssl.TLSVersion(options["ssl_min_version"])
        if options.get("ssl_ciphers"):
            context.set_ciphers(options["ssl_ciphers"])
    except (OSError, KeyError, TypeError, ValueError) as exc:
        raise InvalidRepository(
            f"The ssl_ options of online_store.connection_string cannot be used: {exc!r}.",
            hint="Check the paths; ssl_cert_reqs is required, optional or none.",
        ) from exc
    return context
