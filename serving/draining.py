"""Uvicorn's server, ending without a dropped request.

Uvicorn closes idle keep-alive connections the moment it stops, and a request that is on its way then meets a
reset. Here a server that ends takes no new connections, answers what it has, and says ``Connection: close``
with the next answer on each connection; an idle one that says nothing keeps the time it was given. Knows no
supervisor.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn

# How long idle connections get to say something when all of the server stops and there is no other worker for
# their clients. Requests in flight get `timeout_graceful_shutdown`.
_STOP_IDLE_SECONDS = 1.0


class DrainingServer(uvicorn.Server):
    """One worker's server. Its protocol has to be ``serving.protocol.HotProtocol``."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = False

    def retire(self) -> None:
        """End; an idle connection is closed only when its keep-alive time is over, as on any other day."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 — uvicorn's signature
        """Part of uvicorn's server: end soon; at once on a second SIGINT.

        The signal is not raised again afterwards, as uvicorn does: it has had its effect.
        """
        self.force_exit = self._stopping and sig == signal.SIGINT
        self.should_exit = self._stopping = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Part of uvicorn's server."""
        for server in self.servers:
            server.close()
        for sock in sockets or ():
            sock.close()
        for connection in list(self.server_state.connections):
            connection.drain()  # type: ignore[union-attr]
        began = time.monotonic()
        while self.server_state.connections and not self.force_exit:
            patience = _STOP_IDLE_SECONDS if self._stopping else self.config.timeout_keep_alive
            if time.monotonic() - began >= patience:
                break
            await asyncio.sleep(0.05)
        # Closes what is idle still, and waits for what is in flight.
        await super().shutdown(sockets)
