"""A running Banquet server, and a running ``feast serve``, for tests that speak HTTP to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from core.settings import Settings
from tests.support.valkey import free_port
from tests.support.waiting import PATIENCE_SECONDS, wait_until


@contextmanager
def banquet(repo: Path, settings: Settings | None = None) -> Iterator[httpx.Client]:
    """A worker in a thread of this process, on a free port; gives a client for its address."""
    from serving.draining import DrainingServer
    from serving.server import build_app, uvicorn_options

    settings = settings or Settings(features_only=True, state_dir=repo / ".banquet")
    app = build_app(repo, settings)
    port = free_port()
    server = DrainingServer(uvicorn.Config(app, host="127.0.0.1", port=port, **uvicorn_options(settings)))
    thread = threading.Thread(target=server.run, name="banquet-server")
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            _wait(client, "/livez", thread.is_alive)
            yield client
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "the server did not stop"


@contextmanager
def banquet_process(repo: Path, environ: Mapping[str, str] | None = None) -> Iterator[httpx.Client]:
    """A worker in a process of its own; gives a client for its address."""
    code = (
        "import sys; from pathlib import Path; from core.settings import load_settings;"
        "from serving.server import serve_here;"
        "serve_here(Path(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]), settings=load_settings())"
    )
    settings = {"BANQUET_FEATURES_ONLY": "true", "BANQUET_STATE_DIR": str(repo / ".banquet")}
    root = Path(__file__).parents[2]
    port = free_port()
    command = [sys.executable, "-c", code, str(repo), str(port)]
    with _process(command, port, "/livez", cwd=root, environ=settings | dict(environ or {})) as client:
        yield client


@contextmanager
def feast_serve(repo: Path) -> Iterator[httpx.Client]:
    """Stock ``feast serve`` with one worker that is never restarted."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("feast")), "-c", str(repo), "serve"]
    command += ["-h", "127.0.0.1", "-p", str(port), "--max-requests", "0", "--no-access-log"]
    # The repository may name plugins that lie in this one.
    environ = {"PYTHONPATH": str(Path(__file__).parents[2]), "FEAST_USAGE": "False"}
    with _process(command, port, "/health", cwd=repo, environ=environ) as client:
        yield client


@contextmanager
def _process(
    command: list[str], port: int, path: str, *, cwd: Path, environ: Mapping[str, Any]
) -> Iterator[httpx.Client]:
    # Feast sets Prometheus' variables in the process of the tests.
    own = ("BANQUET_", "PROMETHEUS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=inherited | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Feast's server drops a connection after it has answered 500, which the next request would run into.
    limits = httpx.Limits(max_keepalive_connections=0)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, limits=limits
        ) as client:
            _wait(client, path, lambda: process.poll() is None)
            yield client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(client: httpx.Client, path: str, alive: Callable[[], bool]) -> None:
    def answers() -> bool:
        if not alive():
            raise RuntimeError("the server ended before it answered")
        return client.get(path).status_code == 200

    wait_until(answers, f"{client.base_url}{path} answers", pause_seconds=0.05)
