"""Who holds something (a lease, a folder), and whether that process is still alive."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_OWNER = "owner.json"


def this_process() -> dict[str, Any]:
    """Enough to tell later, on the same machine, that this process is gone. JSON."""
    return {
        "host": socket.gethostname(),
        "namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def has_died(process: Mapping[str, Any]) -> bool:
    """Whether a process that called ``this_process`` is gone; False where this machine cannot tell."""
    if process["host"] != socket.gethostname() or process["namespace"] != _pid_namespace():
        return False
    if process["started"] is not None:
        return bool(_started(process["pid"]) != process["started"])
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder; those that killed processes left behind are removed first."""
    root = Path(parent or tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    for folder in root.glob("banquet-*"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if has_died(json.loads((folder / _OWNER).read_text())):
                shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="banquet-", dir=root, ignore_cleanup_errors=True) as folder_name:
        folder = Path(folder_name)
        (folder / _OWNER).write_text(json.dumps(this_process()))
        yield folder


def _pid_namespace() -> str | None:
    """Containers on one machine number their processes apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if it is gone or the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]
