"""An embedded Valkey for a Redis address on this machine where nobody listens.

Knows processes, files and locks; what is stored in Redis is none of its business.

Two file locks carry the safety, because the kernel drops them with the process, however it ends:
the server itself inherits ``data.lock``, so whoever can take it knows that no server uses the data;
everyone who needs the server shares ``users.lock``, so the last to leave can tell that he is the last.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from core import embedded_process as process
from core.embedded_watch import Watch
from core.errors import Conflict, RedisAccessDenied, RedisUnavailable
from core.redis import RedisAddress
from core.redis_connection import open_connection
from core.redis_link import lacks_permission

START_TIMEOUT_SECONDS = 20.0
LOAD_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class RedisState:
    """What is known of the Redis at an address.

    ``version`` is such as "valkey 9.1.2", or None where nobody listens. ``embedded`` says that it is the
    server of this folder, ``lasting`` that it was started to stay, ``started`` that this very call did it.
    """

    address: str
    version: str | None
    embedded: bool = False
    lasting: bool = False
    started: bool = False
    process_id: int | None = None
    directory: Path | None = None

    @property
    def running(self) -> bool:
        """Whether a Redis answers."""
        return self.version is not None


def probe(address: RedisAddress) -> str | None:
    """The name and version of the Redis at the address, or None where an embedded one may be started.

    Waits while it loads its data. Raises ``NotRedis`` when something else listens there,
    ``RedisAccessDenied`` when it takes neither the password nor its absence, and ``RedisUnavailable``
    when a remote one does not answer or a local one hangs.
    """
    deadline = time.monotonic() + LOAD_TIMEOUT_SECONDS
    while _may_answer(address):
        try:
            return asyncio.run(_version(address))
        except RedisUnavailable as exc:
            loading = "LOADING" in exc.message and time.monotonic() < deadline
            if not loading and _may_answer(address):
                raise
        time.sleep(0.1)
    return None


async def _version(address: RedisAddress) -> str:
    connection = open_connection(address, timeout_seconds=5.0)
    try:
        await connection.connect()
        lines = (await connection.command("INFO", "server")).decode().splitlines()
    except RedisUnavailable as exc:
        if not lacks_permission(exc):
            raise
        return "redis of an unknown version"
    finally:
        await connection.close()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    if "valkey_version" in facts:
        return f"valkey {facts['valkey_version']}"
    return f"redis {facts.get('redis_version', 'of an unknown version')}"


def _may_answer(address: RedisAddress) -> bool:
    """Whether somebody listens at a local address; of any other only asking can tell."""
    if not address.is_local:
        return True
    for family, kind, protocol, _, place in socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    ):
        with suppress(OSError), socket.socket(family, kind, protocol) as attempt:
            attempt.settimeout(2.0)
            with suppress(TimeoutError):  # a full backlog: somebody is there, and hangs
                attempt.connect(place)
            return True
    return False


class EmbeddedRedis:
    """The server that stands in at ``address`` when nobody listens there; its data in ``directory``.

    Persistent: an append-only file flushed every second, and snapshots. Only for a local standalone
    address; any other one is only looked at.
    """

    def __init__(self, directory: Path, address: RedisAddress) -> None:
        self.directory = directory.resolve()
        self.address = address

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.directory / "valkey.log"

    def status(self) -> RedisState:
        """What is at the address; raises as ``probe`` does."""
        version = probe(self.address)
        record = self.record() if self.runs() else {}
        ours = version is not None and record.get("port") == self.address.port and self.address.is_local
        return RedisState(
            address=str(self.address),
            version=version,
            embedded=ours,
            lasting=ours and bool(record.get("lasting")),
            process_id=record.get("process_id") if ours else None,
            directory=self.directory if ours else None,
        )

    def start(self, *, lasting: bool = True) -> RedisState:
        """See that a Redis answers at the address; starts one only if nobody listens there.

        A lasting one stays until ``stop``; another ends with the last ``in_use`` block.
        Raises as ``probe`` does, and ``Conflict`` when this folder's server still runs for another port.
        """
        if not self.address.is_local:
            return self.status()
        with self._starting_or_stopping():
            state = self.status()
            if state.running:
                if state.embedded and lasting and not state.lasting:
                    self._write_record({**self.record(), "lasting": True})
                    state = self.status()
                return state
            return self._launch(lasting)

    def stop(self) -> bool:
        """End the server of this folder, its data saved; False if none runs. Leaves any other alone."""
        if not self.directory.is_dir():
            return False
        with self._starting_or_stopping():
            if not self.runs():
                return False
            record = self.record()
            process_id = int(record["process_id"])
            if not process.works_in(process_id, self.directory.stat(), int(record["port"])):
                raise Conflict(
                    f"The data in {self.directory} is in use, but not by process {process_id} as recorded.",
                    hint="It may run in a container; stop it there.",
                )
            self._write_record({**record, "stopped": True})  # so that nobody who watches it starts it again
            process.end(process_id, self.runs)
            return True

    @contextmanager
    def in_use(self) -> Iterator[RedisState]:
        """``start`` for the length of a block; the last one out stops a server that is not lasting.

        An embedded one that ends unasked is started again. After a ``kill -9`` of the one who is in the block
        the server stays, and the next block finds and later stops it.
        """
        if not self.address.is_local:
            yield self.start()
            return
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.directory / "users.lock").open("a") as users:
            fcntl.flock(users, fcntl.LOCK_SH)
            state = self.start(lasting=False)
            if not state.embedded:
                yield state
                return
            watch = Watch(self)
            try:
                yield state
            finally:
                with suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    watch.stop_server()
                watch.close()

    def _launch(self, lasting: bool) -> RedisState:
        if self.address.options.get("ssl"):
            raise RedisUnavailable(
                f"Nobody listens at {self.address}, and the embedded server does not speak TLS.",
                hint="Remove ssl=true from online_store.connection_string, or start a Redis of your own.",
            )
        binary = process.server_binary()
        config = self.directory / "valkey.conf"
        config.write_text("\n".join(self._settings()) + "\n")
        with (self.directory / "data.lock").open("a") as data, self.log.open("ab") as log:
            if not process.taken(data):
                raise Conflict(
                    f"The embedded Redis of this folder still runs, on port {self.record().get('port')}.",
                    hint="Stop it first: banquet redis stop.",
                )
            os.set_inheritable(data.fileno(), True)
            said_before = log.tell()
            # A process group of its own, so that Ctrl-C reaches it only through us.
            process_id = os.posix_spawn(
                binary,
                [str(binary), str(config)],
                os.environ,
                setpgroup=0,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
            )
            self._write_record({"port": self.address.port, "process_id": process_id, "lasting": lasting})
        try:
            version = self._answer(process_id, said_before)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
            process.ended(process_id, self.runs)
            raise
        return RedisState(
            address=str(self.address),
            version=version,
            embedded=True,
            lasting=lasting,
            started=True,
            process_id=process_id,
            directory=self.directory,
        )

    def _answer(self, process_id: int, said_before: int) -> str:
        """Wait for the first answer of the server just started."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            if process.reaped(process_id) or time.monotonic() > deadline:
                said = self.log.read_bytes()[said_before:].decode(errors="replace").strip().splitlines()
                raise RedisUnavailable(
                    f"The embedded Redis did not start: {said[-1] if said else 'it said nothing'}.",
                    hint=f"Its log is {self.log}.",
                )
            try:
                if version := probe(self.address):
                    return version
            except RedisAccessDenied:
                raise
            except RedisUnavailable:
                pass  # it may listen for a moment and then fail to load its data
            time.sleep(0.02)

    def _settings(self) -> list[str]:
        """valkey.conf, in directives that Redis 6 knows too."""
        options = self.address.options
        lines = [
            "# Written anew at every start from online_store.connection_string.",
            f"port {self.address.port}",
            "bind ::1" if self.address.host == "::1" else "bind 127.0.0.1",
            f"dir {_quoted(str(self.directory))}",
            f"databases {max(16, self.address.db + 1)}",
            "daemonize no",
            'logfile ""',
            "appendonly yes",
            "appendfsync everysec",
            "save 3600 1",
            "save 300 100",
            "save 60 10000",
            # The append-only file holds the data; a snapshot that finds no memory must not stop writes.
            "stop-writes-on-bgsave-error no",
        ]
        if options.get("password") is not None:
            user = options.get("username") or "default"
            digest = hashlib.sha256(options["password"].encode()).hexdigest()
            lines.append(f"user {_quoted(user)} on #{digest} ~* &* +@all")
            if user != "default":
                lines.append("user default off")
        return lines

    @contextmanager
    def _starting_or_stopping(self) -> Iterator[None]:
        """One process at a time."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.directory / "start.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def runs(self) -> bool:
        """Whether a server holds the data of this folder."""
        try:
            with (self.directory / "data.lock").open("r") as data:
                return process.held(data)
        except FileNotFoundError:
            return False

    def record(self) -> dict[str, int | bool]:
        """What was written down of the last server: ``port``, ``process_id``, ``lasting``, ``stopped``."""
        try:
            record: dict[str, int | bool] = json.loads((self.directory / "server.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return record

    def _write_record(self, record: dict[str, int | bool]) -> None:
        fresh = self.directory / "server.json.new"
        fresh.write_text(json.dumps(record) + "\n")
        fresh.replace(self.directory / "server.json")


def _quoted(text: str) -> str:
    """One argument of a line of valkey.conf, whatever characters it holds."""
    plain = range(0x23, 0x7F)
    written = [chr(b) if b in plain and b != 0x5C else f"\\x{b:02x}" for b in text.encode()]
    return f'"{"".join(written)}"'
