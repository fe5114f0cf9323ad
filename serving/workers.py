"""Several workers under gunicorn, replaced one at a time without a gap.

Gunicorn stops a worker and then starts the next. Here a worker that is to go (so many requests answered, too
much memory, SIGHUP) works on until its replacement accepts connections, and only then drains. Gunicorn's
process handling (sockets, signals, reaping, killing workers that hang) stays; what counts as a worker to
keep is ours. Knows no application: it is given a function that builds one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.workers.base import Worker as GunicornWorker

from serving.draining import DrainingServer
from serving.endpoints import App

log = logging.getLogger("banquet.serving")

# After a replacement that could not start: long enough not to burn a core, short enough to heal by itself.
_RETRY_SECONDS = 2.0
_BEAT_SECONDS = 0.25
# Workers that started together must not go together.
_JITTER = 0.2
# For gunicorn, beyond what its workers give themselves.
_MARGIN_SECONDS = 5


def supervise(
    build: Callable[[Worker], App],
    options: Mapping[str, Any],
    *,
    host: str,
    port: int,
    workers: int,
    max_requests: int,
    on_exit: Callable[[Worker], None],
) -> None:
    """Run ``workers`` workers until SIGTERM or SIGINT; does not return.

    Args:
        build: makes a worker's application, in its own process.
        options: for uvicorn; with ``timeout_graceful_shutdown``.
        max_requests: a worker is replaced after so many requests, up to a fifth more by chance; 0: never.
        on_exit: called in the master with each worker that has ended.
    """

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            self.cfg.set("bind", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            self.cfg.set("workers", workers)
            self.cfg.set("worker_class", Worker)
            self.cfg.set("max_requests", max_requests)
            self.cfg.set("max_requests_jitter", round(max_requests * _JITTER))
            self.cfg.set("graceful_timeout", round(options["timeout_graceful_shutdown"]) + _MARGIN_SECONDS)
            self.cfg.set("pre_fork", _give_slot)
            self.cfg.set("child_exit", lambda _, worker: on_exit(worker))
            self.cfg.set("loglevel", "warning")
            # A thread in the master, while it forks, and a socket in the home folder.
            self.cfg.set("control_socket_disable", True)

        def load(self) -> App:
            raise NotImplementedError("each worker builds its own")

    server = Server()
    server.build, server.options = build, options
    Supervisor(server).run()


def _give_slot(supervisor: Supervisor, worker: Worker) -> None:
    taken = {other.slot for other in supervisor.WORKERS.values()}
    worker.slot = next(slot for slot in itertools.count() if slot not in taken)


class Supervisor(Arbiter):  # type: ignore[misc]
    """Gunicorn's master, which starts the replacement of a worker before it lets the worker go."""

    def __init__(self, server: BaseApplication) -> None:
        super().__init__(server)
        self._was_ready = False
        self._hold_until = 0.0

    def manage_workers(self) -> None:
        """Part of gunicorn's master, about once a second and after every signal: start and let go."""
        present = sorted((w for w in self.WORKERS.values() if not w.leaving), key=lambda w: w.age)
        ready = [worker for worker in present if worker.ready]
        self._was_ready = self._was_ready or bool(ready)
        if len(ready) > self.num_workers:
            goes = next((worker for worker in ready if worker.tired), ready[0])
            goes.leaving = True
            self.kill_worker(goes.pid, signal.SIGUSR2)
            present.remove(goes)
        if time.monotonic() >= self._hold_until:
            wanted = self.num_workers + any(worker.tired for worker in present)
            for _ in range(wanted - len(present)):
                self.spawn_worker()

    def spawn_worker(self) -> int:
        """Part of gunicorn's master."""
        try:
            pid: int = super().spawn_worker()
        except SystemExit as exc:
            # The child, at its end. It must not go on into what its parent was called from.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(exc.code if isinstance(exc.code, int) else 1)
        return pid

    def reap_workers(self) -> None:
        """Part of gunicorn's master; a replacement that cannot start is no reason to end those that serve."""
        try:
            super().reap_workers()
        except HaltServer as exc:
            if not self._was_ready:
                raise
            self._hold_until = time.monotonic() + _RETRY_SECONDS
            log.error("%s The others go on; the next try comes in %.0f s.", exc.reason, _RETRY_SECONDS)

    def handle_hup(self) -> None:
        """Part of gunicorn's master: replace every worker, one after the other."""
        for worker in self.WORKERS.values():
            worker.tired = True

    def handle_int(self) -> None:
        """Part of gunicorn's master: Ctrl-C is as gentle as SIGTERM."""
        raise StopIteration


class Worker(GunicornWorker):  # type: ignore[misc]
    """A worker process as both sides see it: what it says of itself lies in memory they share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The lowest number that no other living worker has: what outlives a worker is kept by slot.
        self.slot = -1
        self.leaving = False
        self._shared = mmap.mmap(-1, 2)

    @property
    def ready(self) -> bool:
        """Whether it accepts connections."""
        return bool(self._shared[0])

    @ready.setter
    def ready(self, value: bool) -> None:
        self._shared[0] = value

    @property
    def tired(self) -> bool:
        """Whether it is to be replaced."""
        return bool(self._shared[1])

    @tired.setter
    def tired(self, value: bool) -> None:
        self._shared[1] = value

    def ask_to_be_replaced(self, why: str) -> None:
        """Say, in the worker, that it should go; it works on until its replacement is ready."""
        if not self.tired:
            log.info("worker %d is to be replaced: %s", self.pid, why)
            self.tired = True
            self.wake_master()

    def wake_master(self) -> None:
        """Have the master look now, not within a second."""
        os.kill(self.ppid, signal.SIGCHLD)

    def load_wsgi(self) -> None:
        """Part of gunicorn's worker."""
        self.wsgi = self.app.build(self)

    def init_signals(self) -> None:
        """Part of gunicorn's worker: uvicorn sets its own once its loop runs."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # The master has reopened the log; nothing is open here.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def run(self) -> None:
        """Part of gunicorn's worker."""
        server = _WorkerServer(uvicorn.Config(self.wsgi, **self.app.options), self)
        server.run(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


class _WorkerServer(DrainingServer):
    """A worker's server, which reports to its master."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Part of uvicorn's server."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, self.retire)
        await super().startup(sockets)
        if self.started:
            self._worker.ready = True
            self._worker.wake_master()
            self._beat()

    def _beat(self) -> None:
        worker = self._worker
        worker.notify()
        if os.getppid() != worker.ppid:
            self.handle_exit(signal.SIGTERM, None)  # the master was killed
        elif self.server_state.total_requests >= worker.max_requests:
            worker.ask_to_be_replaced(f"it has answered {self.server_state.total_requests} requests")
        asyncio.get_running_loop().call_later(_BEAT_SECONDS, self._beat)
