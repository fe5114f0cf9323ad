"""docs/runbook.md, followed from top to bottom on a server that clients keep asking."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from core.manifest import MODEL_FILE
from core.registry import CHAMPION, ModelRegistry
from tests.support import trials
from tests.support.clients import Clients
from tests.support.pages import Block, Folder, check_output, commands
from tests.support.trials import MODEL, Honest, Wrong
from tests.support.valkey import Valkey
from tests.support.waiting import PATIENCE_SECONDS


@pytest.mark.timeout(1200)
def test_the_runbook_does_what_it_says_and_no_request_fails(valkey: Valkey, tmp_path: Path) -> None:
    repo = trials.scene(tmp_path / "feature_repo", valkey.address(), "runbook")
    registry = ModelRegistry(str(tmp_path / ".banquet" / "models"))
    for estimator in (Honest(), Honest(), Wrong(), Honest(), Honest()):
        trials.register_version(repo, registry, estimator)
    registry.set_alias(MODEL, CHAMPION, 1)
    (tmp_path / ".banquet" / "models" / MODEL / "4" / MODEL_FILE).write_bytes(b"altered")
    folder = Folder(tmp_path, "8000", "8001")
    page = list(commands("runbook.md"))
    servers = [folder.serve(page[0][0].body)]
    try:
        clients = asyncio.run(_follow(folder, page[1:], servers))
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        for server in servers:
            server.wait(PATIENCE_SECONDS)
    assert clients.failures == []
    # Version 3 was champion for as long as two commands take, which may be less than a server's look.
    assert {seen.version for seen in clients.seen} - {3} == {1, 2, 5}


async def _follow(
    folder: Folder, page: Sequence[tuple[Block, str]], servers: list[subprocess.Popen[bytes]]
) -> Clients:
    async with Clients([int(folder.ports["8000"])], connections=4, pause_seconds=0.005) as clients:
        for block, expected in page:
            if block.kind == "bash server":
                servers.append(await asyncio.to_thread(folder.serve, block.body))
            else:
                printed = await asyncio.to_thread(folder.run, block.body, with_errors=True)
                check_output(expected, printed)
    return clients
