"""docs/runbook.md, followed from top to bottom on a server that clients keep asking."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
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
    # Versions 3 and 5 were champion for as long as two commands take, which may be less than a worker's look.
    assert {1, 2} <= {seen.version for seen in clients.seen} <= {1, 2, 3, 5}


def _run(folder: Folder, body: str, expected: str) -> None:
    """Run commands; those after a `sleep` again and again, until they print what they have to."""
    first, sleep, rest = body.partition("sleep ")
    printed = folder.run(first, with_errors=True)
    if not sleep:
        check_output(expected, printed)
        return
    commands = rest.partition("\n")[2]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        more = folder.run(commands, with_errors=True)
        try:
            check_output(expected, printed + more)
        except AssertionError:
            assert time.monotonic() < deadline, f"{printed + more}\nis not\n{expected}"
        else:
            return


async def _follow(
    folder: Folder, page: Sequence[tuple[Block, str]], servers: list[subprocess.Popen[bytes]]
) -> Clients:
    async with Clients([int(folder.ports["8000"])], connections=4, pause_seconds=0.005) as clients:
        for block, expected in page:
            if block.kind == "bash server":
                servers.append(await asyncio.to_thread(folder.serve, block.body))
                continue
            # The judge gets its rows when `status` has shown that it waits for them.
            clients.resting = block.body.startswith("banquet rollout start scores --version 2")
            await asyncio.to_thread(_run, folder, block.body, expected)
            clients.resting = False
    return clients
