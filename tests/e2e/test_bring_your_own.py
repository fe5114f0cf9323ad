"""docs/bring-your-own.md, followed to the letter in an empty folder: its files written, its commands run.

Only the two ports differ from the page: they are free ones.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.pages import Folder, blocks, check_output, commands
from tests.support.waiting import PATIENCE_SECONDS


@pytest.mark.timeout(1200)
def test_the_page_leads_from_an_empty_folder_to_predictions(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "6379", "8000")
    (tmp_path / "feature_repo").mkdir()
    for block in blocks("bring-your-own.md"):
        if block.file:
            folder.write(block)
    server: subprocess.Popen[bytes] | None = None
    outputs = []
    try:
        for block, expected in commands("bring-your-own.md"):
            if block.kind == "bash server":
                server = folder.serve(block.body)
            else:
                outputs.append(folder.run(block.body))
                check_output(expected, outputs[-1])
                if server is not None and "curl" not in block.body:
                    server.send_signal(signal.SIGINT)
        assert server is not None
        assert server.wait(PATIENCE_SECONDS) == 0
    finally:
        if server is not None and server.poll() is None:
            server.kill()
        subprocess.run(["bash", "-c", "banquet redis stop"], cwd=tmp_path, env=folder.env, check=False)

    lifecycle, answer = outputs[0], json.loads(outputs[3])
    assert "delivery_minutes" in lifecycle
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
