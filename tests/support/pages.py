"""A page of the documentation as a test: its files written, its commands run, its outputs compared.

A block marked ``bash`` is run to its end and must succeed, ``bash server`` is left running. A block marked
``text`` after a command is what it has to print: these lines in this order, ``...`` for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.valkey import free_port
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^`(?P<file>[\w./]+)`\n\n)?^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``file`` is the name that stands alone above it."""

    file: str | None
    kind: str
    body: str


def blocks(page: str) -> list[Block]:
    """Those of a page of the documentation."""
    return [
        Block(m["file"], m["kind"], m["body"]) for m in _BLOCK.finditer((ROOT / "docs" / page).read_text())
    ]


def commands(page: str) -> Iterator[tuple[Block, str]]:
    """The blocks to run, each with the output that the page gives it."""
    found = blocks(page)
    for block, after in zip(found, [*found[1:], Block(None, "", "")], strict=True):
        if block.kind.startswith("bash"):
            yield block, after.body if after.kind == "text" else ""


def check_output(expected: str, printed: str) -> None:
    """Every line that the page shows is printed, in its order."""
    lines = iter(printed.splitlines())
    for line in expected.splitlines():
        pattern = re.compile(".*".join(map(re.escape, line.split("..."))))
        assert any(pattern.fullmatch(one.rstrip()) for one in lines), (
            f"{line!r} is not (there) in:\n{printed}"
        )


class Folder:
    """The reader's folder, with `banquet` and `python` of this environment on the PATH.

    The ports that a page names are free ones instead: ``ports`` maps what is written to what is used.
    """

    def __init__(self, path: Path, *ports: str) -> None:
        self.path = path
        self.ports = {port: str(free_port()) for port in ports}
        bin_dir = Path(sys.executable).parent
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BANQUET_", "PROMETHEUS_"))}
        self.env = {**clean, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def text(self, body: str) -> str:
        """The block with the ports of this folder."""
        for documented, free in self.ports.items():
            body = body.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{free}")
            body = body.replace(f"--port {documented}", f"--port {free}")
        return body

    def write(self, block: Block) -> None:
        """Write a block to the file that it names."""
        assert block.file is not None
        target = self.path / block.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(block.body))

    def run(self, body: str, *, with_errors: bool = False) -> str:
        """Run commands to their end; what they print."""
        done = subprocess.run(
            ["bash", "-e", "-c", self.text(body)],
            cwd=self.path,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if with_errors else subprocess.PIPE,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, body: str) -> subprocess.Popen[bytes]:
        """Start a server, and wait until the port in its command is ready."""
        command = self.text(body).strip()
        port = command.partition("--port ")[2].split()[0]
        process = subprocess.Popen(["bash", "-c", f"exec env {command}"], cwd=self.path, env=self.env)

        def ready() -> bool:
            assert process.poll() is None, "the server ended"
            return (
                httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10, trust_env=False).status_code == 200
            )

        wait_until(ready, "the server is ready", pause_seconds=0.1)
        return process
