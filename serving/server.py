"""Running the application: one worker in this process, or several under gunicorn.

The composition of one worker (repository, registry, connection) is here, because every worker has to make
its own after it has started.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import uvicorn

from core.errors import Conflict
from core.redis_connection import open_connection
from core.registry import ModelRegistry
from core.repository import FeastRepository
from core.settings import Settings, load_settings
from serving.app import create_app
from serving.endpoints import App
from serving.metrics import forget_worker
from serving.protocol import HotProtocol

# How every worker runs. Parsers and loop in C; the access log would cost more than a prediction does.
UVICORN: dict[str, Any] = {
    "loop": "uvloop",
    "http": HotProtocol,
    "access_log": False,
    "server_header": False,
    "log_level": "warning",
}


def build_app(repo: Path, settings: Settings) -> App:
    """The application of one worker for the Feast repository at ``repo``."""
    repository = FeastRepository.open(repo)
    connection = open_connection(
        repository.redis,
        timeout_seconds=settings.redis_timeout_s,
        max_in_flight=settings.redis_max_in_flight,
    )
    return create_app(repository, ModelRegistry.of(settings), connection, settings)


def serve(repo: Path, *, host: str, port: int, workers: int = 1, settings: Settings | None = None) -> None:
    """Serve until interrupted.

    Raises:
        Conflict: the port is taken.
    """
    settings = settings or load_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    check_port(host, port)
    if workers == 1:
        uvicorn.run(build_app(repo, settings), host=host, port=port, **UVICORN)
    else:
        _serve_with_gunicorn(repo, host, port, workers, settings)


def check_port(host: str, port: int) -> None:
    """Raise Conflict where something already listens on ``host:port``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise Conflict(
                f"Cannot listen on {host}:{port} ({exc.strerror}).", hint="Choose another port with --port."
            ) from exc


def _serve_with_gunicorn(repo: Path, host: str, port: int, workers: int, settings: Settings) -> None:
    from gunicorn.app.base import BaseApplication
    from uvicorn_worker import UvicornWorker

    class Worker(UvicornWorker):  # type: ignore[misc]
        CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, **UVICORN}  # noqa: RUF012

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            self.cfg.set("bind", f"{host}:{port}")
            self.cfg.set("workers", workers)
            self.cfg.set("worker_class", Worker)
            # The modules are loaded once, before the workers fork; connections and models after.
            self.cfg.set("preload_app", False)
            self.cfg.set("loglevel", "warning")
            self.cfg.set("child_exit", lambda _, worker: forget_worker(worker.pid))

        def load(self) -> App:
            return build_app(repo, settings)

    Server().run()
