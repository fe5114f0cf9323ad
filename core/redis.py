"""Where Redis is: the ``online_store`` section of feature_store.yaml, and a blocking client for it.

The blocking client is for commands, the ledger and bulk writes; the server reads through
``core.redis_connection``. Knows nothing of keys, hash fields or values: that is ``core.layout``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from core.errors import InvalidRepository, NotRedis, RedisAccessDenied, RedisReplyError, RedisUnavailable

if TYPE_CHECKING:
    from redis import Redis
    from redis.cluster import RedisCluster

logger = logging.getLogger(__name__)

Kind = Literal["standalone", "sentinel", "cluster"]

DEFAULT_CONNECT_TIMEOUT_SECONDS = 5.0
DEFAULT_SOCKET_TIMEOUT_SECONDS = 10.0

_KINDS: dict[str, Kind] = {"redis": "standalone", "redis_sentinel": "sentinel", "redis_cluster": "cluster"}
_STORE_TYPES = ("redis", "feast.infra.online_stores.redis.RedisOnlineStore")
_LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_SECRETS = frozenset({"password", "ssl_password", "sentinel_kwargs", "ssl_ca_data"})
_TEXTS = frozenset({"password", "username", "ssl_password", "client_name"})
_FLAGS = frozenset({"ssl", "ssl_check_hostname", "socket_keepalive", "retry_on_timeout", "decode_responses"})
_SECONDS = frozenset({"socket_timeout", "socket_connect_timeout"})


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis server, the master behind some Sentinels, or a Redis Cluster.

    ``hosts`` are (host, port) pairs: the server, the Sentinels or the cluster's start-up nodes.
    ``options`` are redis-py's keyword arguments as the connection string gives them; read only.
    ``master`` is the name the Sentinels know the master by.
    """

    hosts: tuple[tuple[str, int], ...]
    kind: Kind = "standalone"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    master: str = "mymaster"

    @classmethod
    def from_online_store(cls, config: Mapping[str, Any]) -> RedisAddress:
        """The address that the ``online_store`` section of feature_store.yaml gives.

        Reads it as Feast does: segments of ``connection_string`` without ``=`` are hosts, the others
        options whose values are JSON where they can be. Raises ``InvalidRepository``, which names the key.
        """
        store_type = config.get("type")
        if store_type not in _STORE_TYPES:
            raise InvalidRepository(
                f"online_store.type is {store_type!r}; Banquet reads features from Redis.",
                hint="Set `type: redis` in the online_store section of feature_store.yaml.",
            )
        redis_type = config.get("redis_type", "redis")
        if redis_type not in _KINDS:
            raise InvalidRepository(
                f"online_store.redis_type is {redis_type!r}.", hint=f"It is one of {', '.join(_KINDS)}."
            )
        kind = _KINDS[redis_type]
        text = config.get("connection_string", "localhost:6379")
        if not isinstance(text, str) or not text.strip():
            raise _invalid(f"is {text!r}, not a text")
        if "${" in text:
            name = text.split("${", 1)[1].split("}", 1)[0]
            raise _invalid(
                f"holds ${{{name}}}, and no such environment variable is set",
                "Export it; Feast knows no default values there.",
            )
        segments = text.split(",")
        hosts = tuple(_host(segment) for segment in segments if "=" not in segment)
        options = dict(_option(segment) for segment in segments if "=" in segment)
        if not hosts:
            raise _invalid("names no host", "Begin it with host:port, such as localhost:6379.")
        if kind == "standalone" and len(hosts) > 1:
            logger.warning(
                "online_store.connection_string names %d hosts; redis_type `redis` uses only the first",
                len(hosts),
            )
            hosts = hosts[:1]
        if kind == "cluster" and "db" in options:
            raise _invalid("sets db, and a Redis Cluster has only one", "Remove db.")
        master = config.get("sentinel_master", "mymaster")
        if not isinstance(master, str) or not master:
            raise InvalidRepository(f"online_store.sentinel_master is {master!r}, not a name.")
        return cls(hosts=hosts, kind=kind, options=options, master=master)

    @property
    def host(self) -> str:
        """The first host."""
        return self.hosts[0][0]

    @property
    def port(self) -> int:
        """The port at the first host."""
        return self.hosts[0][1]

    @property
    def db(self) -> int:
        """The database index."""
        return int(self.options.get("db") or 0)

    @property
    def is_local(self) -> bool:
        """Whether this is one server on this machine's loopback, where an embedded one may stand in."""
        return (
            self.kind == "standalone"
            and self.host in _LOCAL_HOSTS
            and not self.options.get("unix_socket_path")
        )

    def client(self, **overrides: Any) -> Redis | RedisCluster:
        """A blocking redis-py client with timeouts; the caller closes it. Thread-safe.

        Without ``socket_timeout`` redis-py, and Feast with it, would wait for ever. ``overrides`` are
        redis-py's keyword arguments. Raises ``InvalidRepository`` for an option that redis-py does not have
        and ``RedisUnavailable`` when no cluster node answers; the other kinds connect with their first
        command, whose errors ``translated`` translates.
        """
        from redis import Redis
        from redis.backoff import ExponentialWithJitterBackoff
        from redis.cluster import ClusterNode, RedisCluster
        from redis.retry import Retry
        from redis.sentinel import Sentinel

        patience: dict[str, Any] = {
            "socket_timeout": DEFAULT_SOCKET_TIMEOUT_SECONDS,
            "socket_connect_timeout": DEFAULT_CONNECT_TIMEOUT_SECONDS,
            "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=3),
        }
        arguments = {**patience, **self.options, **overrides}
        try:
            if self.kind == "cluster":
                nodes = [ClusterNode(*host) for host in self.hosts]  # type: ignore[no-untyped-call]
                with self.translated():
                    return RedisCluster(startup_nodes=nodes, **arguments)
            if self.kind == "sentinel":
                given = self.options.get("sentinel_kwargs")
                if given is None:  # as redis-py has it: the password is the master's alone
                    given = {key: value for key, value in self.options.items() if key.startswith("socket_")}
                arguments["sentinel_kwargs"] = {**patience, **given}
                sentinel = Sentinel(list(self.hosts), **arguments)  # type: ignore[no-untyped-call]
                master: Redis = sentinel.master_for(self.master)  # type: ignore[no-untyped-call]
                return master
            return Redis(host=self.host, port=self.port, **arguments)
        except TypeError as exc:
            raise _invalid(f"sets an option that redis-py does not have: {exc}") from exc

    @contextmanager
    def session(self, **overrides: Any) -> Iterator[Any]:
        """``client`` for the length of a block: closed at its end, its errors translated.

        Typed loosely because redis-py's own annotations mix its blocking and async answers.
        Raises ``RedisUnavailable``, ``RedisAccessDenied`` or ``RedisReplyError``.
        """
        client = self.client(**overrides)
        try:
            with self.translated():
                yield client
        finally:
            client.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """redis-py's errors within the block as Banquet's; those of locks and of its arguments stay."""
        from redis import exceptions

        try:
            yield
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as exc:
            raise self.access_denied(_reply(exc)) from exc
        except exceptions.InvalidResponse as exc:
            raise self.not_redis(str(exc)) from exc
        except exceptions.ResponseError as exc:
            raise self.reply_error(_reply(exc)) from exc
        except (
            exceptions.ConnectionError,
            exceptions.TimeoutError,
            exceptions.ClusterError,
            exceptions.RedisClusterException,
        ) as exc:
            raise self.unavailable(str(exc)) from exc

    def unavailable(self, reason: str) -> RedisUnavailable:
        """The error to raise when this address does not answer, for ``reason``."""
        hint = "Check that it runs and that online_store.connection_string in feature_store.yaml is right."
        if self.is_local:
            hint = f"`banquet redis start` starts an embedded one where nobody listens. {hint}"
        return RedisUnavailable(f"Redis at {self} does not answer: {reason.rstrip('.')}.", hint=hint)

    def not_redis(self, reason: str) -> NotRedis:
        """The error to raise when something listens at this address and speaks another protocol."""
        return NotRedis(
            f"What listens at {self} is not Redis, or speaks TLS: {reason.rstrip('.')}.",
            hint="Name another port in online_store.connection_string, or add ssl=true to it.",
        )

    def access_denied(self, reason: str) -> RedisAccessDenied:
        """The error to raise when this address refuses the password, the user or a command."""
        return RedisAccessDenied(
            f"Redis at {self} denies access: {reason.rstrip('.')}.",
            hint="Check username and password in online_store.connection_string, and the user's ACL.",
            reply=reason,
        )

    def reply_error(self, reply: str) -> RedisUnavailable | RedisReplyError:
        """The error that stands for an error reply, by the code that the reply begins with."""
        code = reply.split(" ", 1)[0]
        if code in _DENIED or reply.startswith("ERR AUTH"):
            return self.access_denied(reply)
        if code in _PASSING:
            return self.unavailable(reply)
        return RedisReplyError(
            f"Redis at {self} refused a command: {reply.rstrip('.')}.",
            hint="Set redis_type: redis_cluster in the online_store section." if code == "MOVED" else None,
            reply=reply,
        )

    def __str__(self) -> str:
        """The connection string with its secrets blotted out."""
        hosts = [f"{host}:{port}" for host, port in self.hosts]
        options = [
            f"{name}={'***' if name in _SECRETS else value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.options.items()
        ]
        text = ",".join(hosts + options)
        return f"{text} (Sentinel master {self.master})" if self.kind == "sentinel" else text


_DENIED = frozenset({"NOAUTH", "WRONGPASS", "NOPERM", "DENIED"})
# Error replies that pass by themselves: the same command may succeed a moment later.
_PASSING = frozenset(
    {"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "OOM", "MISCONF"}
)


def _invalid(what: str, hint: str | None = None) -> InvalidRepository:
    return InvalidRepository(f"online_store.connection_string {what}.", hint=hint)


def _reply(error: Exception) -> str:
    """The error reply as Redis sent it: redis-py cuts its code off."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code and not str(error).startswith(code) else str(error)


def _host(segment: str) -> tuple[str, int]:
    parts = segment.strip().split(":")
    if len(parts) > 2:
        raise _invalid(
            f"holds the host {segment.strip()!r} with more than one colon",
            "Feast splits at the colon: give an IPv6 address a host name.",
        )
    if len(parts) < 2:
        raise _invalid(f"gives the host {segment.strip()!r} no port", "Write host:port.")
    host, port = parts
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise _invalid(f"holds {segment.strip()!r}, which is no host:port")
    return host, int(port)


def _option(segment: str) -> tuple[str, Any]:
    name, _, text = segment.partition("=")
    name = name.strip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if name in _TEXTS and value is not None and not isinstance(value, str):
        value = text  # a password of digits is still a text
    if name in _FLAGS and isinstance(value, str):
        if value.strip().lower() != "true":
            raise _invalid(
                f"sets {name} to {text!r}, a text, which redis-py takes for true", "Write true or false."
            )
        value = True
    if name in _SECONDS and value is not None and (type(value) not in (int, float) or value <= 0):
        raise _invalid(f"sets {name} to {text!r}", "It is a number of seconds above 0.")
    if name == "db" and (type(value) is not int or value < 0):
        raise _invalid(f"sets db to {text!r}", "It is a database index: 0, 1, 2, ...")
    if name == "decode_responses" and value:
        raise _invalid("sets decode_responses", "Remove it: feature values are bytes, not text.")
    return name, value
