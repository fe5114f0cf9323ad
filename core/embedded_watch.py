"""What keeps an embedded server running while somebody needs it: where it ends unasked, it is started again.

Knows the server by what is open, its lock and its folder, and not by their names: a folder that was moved or
removed meanwhile hides nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from core import embedded_process as process
from core.errors import BanquetError

if TYPE_CHECKING:
    from core.embedded import EmbeddedRedis

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
"""Pauses between starts double up to this, while none of them lasts ``STEADY_SECONDS``."""
STEADY_SECONDS = 10.0


class Watch:
    """Looks after a server that runs, in a thread of its own, until ``close``."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self._server = server
        self._data = (server.directory / "data.lock").open("r")
        self._folder = server.directory.stat()
        self._record: Mapping[str, int | bool] = server.record()
        self._started_at = time.monotonic()
        self._failures = 0
        self._said = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embedded Redis", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look after it no longer."""
        self._over.set()
        self._thread.join()
        self._data.close()

    def stop_server(self) -> None:
        """End the server unless it is to last; before ``close``."""
        self._over.set()
        self._thread.join()
        if self._in_place():
            if self._server.runs() and not self._server.record().get("lasting"):
                self._server.stop()
            return
        process_id, port = int(self._record.get("process_id", 0)), int(self._record.get("port", 0))
        if (
            not self._record.get("lasting")
            and self._holds()
            and process.works_in(process_id, self._folder, port)
        ):
            # Where its folder is removed it could save nothing, and would refuse to end.
            process.end(process_id, self._holds, save=os.fstat(self._data.fileno()).st_nlink > 0)

    def _run(self) -> None:
        pause = LOOK_SECONDS
        while not self._over.wait(pause):
            pause = LOOK_SECONDS
            alive = self._holds()
            if self._in_place():  # read after the look: who stops it says so before it ends
                self._record = self._server.record() or self._record
            if alive:
                if time.monotonic() - self._started_at > STEADY_SECONDS:
                    self._failures = 0
            elif not self._record.get("stopped"):
                self._start_again()
                pause = min(LONGEST_PAUSE_SECONDS, LOOK_SECONDS * 2.0**self._failures)

    def _start_again(self) -> None:
        process.reaped(int(self._record.get("process_id", 0)))
        self._failures = min(self._failures + 1, 10)
        if not self._in_place():
            self._say(
                f"The embedded Redis has ended, and its folder {self._server.directory} is gone. "
                "Put the folder back, or run `banquet up` again."
            )
            return
        try:
            state = self._server.start(lasting=bool(self._record.get("lasting")))
        except (BanquetError, OSError) as exc:
            self._say(f"The embedded Redis has ended and cannot be started again: {exc}")
            return
        if state.embedded:
            self._started_at = time.monotonic()
            self._said = ""
            if state.started:
                logger.warning(
                    "The embedded Redis had ended unasked; started again as process %s, with its data.",
                    state.process_id,
                )
        else:
            self._say(f"The embedded Redis has ended, and another one answers at {state.address} now.")

    def _say(self, text: str) -> None:
        """Once, however often it is tried."""
        if text != self._said:
            logger.error("%s", text)
            self._said = text

    def _holds(self) -> bool:
        return process.held(self._data)

    def _in_place(self) -> bool:
        """Whether the folder is still where it was."""
        try:
            return os.path.samestat(self._server.directory.stat(), self._folder)
        except OSError:
            return False
