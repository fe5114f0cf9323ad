"""Running the application: supervised workers, or one worker in this process.

The composition of one worker (repository, registry, connection) is here, because every worker has to make
its own after it has started.
"""

from __future__ import annotations

import gc
import logging
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from core.errors import Conflict
from core.redis_connection import open_connection
from core.registry import ModelRegistry
from core.repository import FeastRepository
from core.settings import Settings, load_settings
from serving.app import create_app
from serving.draining import DrainingServer
from serving.endpoints import App
from serving.metrics import forget_worker, share_counts
from serving.protocol import HotProtocol

_BACKLOG = 2048


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """How every worker runs."""
    return {
        # Parsers and loop in C; the access log would cost more than a prediction does.
        "loop": "uvloop",
        "http": HotProtocol,
        "ws": "none",
        "access_log": False,
        "server_header": False,
        "log_level": "warning",
        "timeout_keep_alive": settings.keep_alive_s,
        "timeout_graceful_shutdown": settings.stop_timeout_s,
    }


def build_app(
    repo: Path, settings: Settings, *, slot: int = 0, recycle: Callable[[str], None] | None = None
) -> App:
    """The application of one worker for the Feast repository at ``repo``.

    ``slot`` is the worker's number, ``recycle`` asks for its replacement, given the reason.
    """
    repository = FeastRepository.open(repo)
    connection = open_connection(
        repository.redis,
        timeout_seconds=settings.redis_timeout_s,
        max_in_flight=settings.redis_max_in_flight,
    )
    registry = ModelRegistry.of(settings)
    return create_app(repository, registry, connection, settings, slot=slot, recycle=recycle)


def serve(repo: Path, *, host: str, port: int, workers: int = 1, settings: Settings | None = None) -> None:
    """Serve with supervised workers until SIGTERM or SIGINT; does not return.

    Raises:
        Conflict: the port is taken.
        SystemExit: the server has ended.
    """
    # Here, because a process that serves by itself needs no gunicorn.
    from serving.workers import Worker, supervise

    settings = settings or load_settings()
    _configure(settings)
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="banquet-metrics-") as folder:

        def build(worker: Worker) -> App:
            share_counts(folder, worker.slot)
            return build_app(repo, settings, slot=worker.slot, recycle=worker.ask_to_be_replaced)

        supervise(
            build,
            uvicorn_options(settings),
            host=host,
            port=port,
            workers=workers,
            max_requests=settings.max_requests,
            on_exit=lambda worker: forget_worker(folder, worker.slot),
        )


def serve_here(
    repo: Path, *, host: str, port: int, settings: Settings, announce: Callable[[], None] = lambda: None
) -> None:
    """Serve in this process, with nobody to replace it, until SIGTERM or SIGINT.

    For a process that has used threads and libraries which do not survive a fork. ``announce`` is called once
    the port is taken.

    Raises:
        Conflict: the port is taken.
    """
    _configure(settings)
    with _listening(host, port) as listener:
        announce()
        app = build_app(repo, settings)
        config = uvicorn.Config(app, host=host, port=port, **uvicorn_options(settings))
        DrainingServer(config).run(sockets=[listener])
    # What the application has frozen would not be freed at the end of the process, and DuckDB tells of that.
    gc.unfreeze()


def _configure(settings: Settings) -> None:
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def check_port(host: str, port: int) -> None:
    """Raise Conflict where something already listens on ``host:port``."""
    _listening(host, port).close()


def _listening(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)  # two may be bound to one port; only one of them may listen
    except OSError as exc:
        listener.close()
        raise Conflict(
            f"Cannot listen on {host}:{port} ({exc.strerror}).", hint="Choose another port with --port."
        ) from exc
    return listener
