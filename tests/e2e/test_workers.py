"""Several workers answer as one server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from tests.support.valkey import free_port


def test_workers_share_the_port_and_the_counts_and_end_together(shop: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [str(Path(sys.executable).with_name("banquet")), "--repo", str(shop), "serve"]
    # Feast names a metrics folder of its own when it is imported, as other tests of this process do.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("BANQUET_", "PROMETHEUS_"))}
    process = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "2"],
        env={**inherited, "BANQUET_FEATURES_ONLY": "true", "BANQUET_STATE_DIR": str(tmp_path)},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        body = {"features": ["profile:age"], "entities": {"user_id": [1]}}
        for _ in range(40):  # a new connection each, so that both get some
            answer = httpx.post(f"{url}/get-online-features", json=body, trust_env=False)
            assert answer.json()["results"][1]["values"] == [41]
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert 'banquet_requests_total{route="/get-online-features",status="200"} 40.0' in metrics
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    gone, alive = psutil.wait_procs(workers, timeout=5)
    assert (len(gone), alive) == (2, [])
