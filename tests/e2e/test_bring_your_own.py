"""docs/bring-your-own.md, followed to the letter in an empty folder: its files written, its commands run.

Only the two ports differ from the page: they are free ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.valkey import free_port

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "bring-your-own.md"
_BLOCK = re.compile(
    r"(?:^`(?P<file>[\w./]+)`\n\n)?^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    file: str | None
    kind: str
    body: str


def blocks() -> list[Block]:
    return [Block(m["file"], m["kind"], m["body"]) for m in _BLOCK.finditer(PAGE.read_text())]


class Folder:
    """The stranger's folder, with `banquet` and `python` of this environment on the PATH."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ports = {"6379": str(free_port()), "8000": str(free_port())}
        bin_dir = Path(sys.executable).parent
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BANQUET_")}
        self.env = {**clean, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def text(self, body: str) -> str:
        for documented, free in self.ports.items():
            body = body.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{free}")
            body = body.replace(f"--port {documented}", f"--port {free}")
        return body

    def write(self, block: Block) -> None:
        assert block.file is not None
        target = self.path / block.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(block.body))

    def run(self, body: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-c", self.text(body)],
            cwd=self.path, env=self.env, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, body: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["bash", "-c", "exec " + self.text(body)], cwd=self.path, env=self.env)
        deadline = time.monotonic() + 60
        url = f"http://127.0.0.1:{self.ports['8000']}/readyz"
        while True:
            try:
                with urllib.request.urlopen(url, timeout=2):
                    return process
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server is not ready after 60 s"
                time.sleep(0.1)


@pytest.mark.timeout(600)
def test_the_page_leads_from_an_empty_folder_to_predictions(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "feature_repo").mkdir()
    page = blocks()
    for block in page:
        if block.file:
            folder.write(block)
    server: subprocess.Popen[bytes] | None = None
    outputs = []
    try:
        for block in page:
            if block.kind == "bash server":
                server = folder.serve(block.body)
            elif block.kind == "bash":
                outputs.append(folder.run(block.body))
                if server is not None and "curl" not in block.body:
                    server.send_signal(signal.SIGINT)
        assert server is not None
        assert server.wait(20) == 0
    finally:
        if server is not None and server.poll() is None:
            server.kill()
        subprocess.run(["bash", "-c", "banquet redis stop"], cwd=tmp_path, env=folder.env, check=False)

    lifecycle, answer = outputs[0], json.loads(outputs[1])
    assert "delivery_minutes" in lifecycle
    assert (tmp_path / "training.parquet").exists()
    assert (tmp_path / "training.lock.json").exists()
    assert answer["model_name"] == "delivery_minutes"
    assert answer["model_version"] == 1
    known, unknown = answer["predictions"]
    assert known["entity"] == {"store_code": "north", "courier_id": 3}
    assert known["missing"] == {}
    assert 5 < known["prediction"] < 40
    assert known["confidence"] is None
    assert unknown["missing"] == {
        "store_load__open_orders": "NOT_FOUND",
        "courier_pace__minutes_per_km": "NOT_FOUND",
        "ride__ride_minutes": "NULL_VALUE",
    }
    assert isinstance(unknown["prediction"], float)
