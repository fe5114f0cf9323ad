"""`banquet up` on the real data: the job a newcomer runs, and what it answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.embedded import EmbeddedRedis
from core.repository import FeastRepository
from tests.support import demo
from tests.support.valkey import free_port
from tests.support.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)

WITH_DEMOGRAPHICS, WITHOUT_DEMOGRAPHICS, UNKNOWN = 1, 2, 99_999_999


@dataclass
class Job:
    """A `banquet up` of its own: repository, state and ports."""

    repo: Path
    state: Path
    redis_port: int
    port: int
    day: date = field(default_factory=lambda: datetime.now(UTC).date())

    def command(self, *extra: str) -> list[str]:
        up = ["up", "--sources", "demo.sources:build", "--spec", "demo.model:repurchase"]
        return [str(Path(sys.executable).with_name("banquet")), "--repo", str(self.repo), *(extra or up)]

    @property
    def env(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BANQUET_")}
        return {**inherited, "BANQUET_STATE_DIR": str(self.state)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def start(self) -> subprocess.Popen[bytes]:
        command = [*self.command(), "--port", str(self.port)]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=self.env, cwd=ROOT, start_new_session=True, stderr=log)

    @property
    def log(self) -> Path:
        """What it says."""
        return self.repo.parent / "up.log"

    def readiness(self, process: subprocess.Popen[bytes]) -> httpx.Response:
        """What the server says of itself; raises TransportError while it does not listen."""
        assert process.poll() is None, "the command ended"
        return httpx.get(f"http://127.0.0.1:{self.port}/readyz", trust_env=False, timeout=30)

    def processes(self) -> list[str]:
        """Command lines of this machine that mention this job's folders."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    folder = os.readlink(entry / "cwd")
                except OSError:
                    continue
                if str(self.repo.parent) in line or str(self.state) in folder:
                    found.append(line)
        return found


@pytest.fixture(scope="module")
def job(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The main job, up and serving."""
    root = tmp_path_factory.mktemp("up")
    redis_port = free_port()
    repo = demo.copy(demo_data, root / "feature_repo", f"127.0.0.1:{redis_port}")
    job = Job(repo, root / "state", redis_port, free_port())
    process = job.start()
    try:
        wait_until(lambda: job.readiness(process).status_code == 200, "it is up", 500, pause_seconds=0.1)
        yield job
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 0, job.log.read_text()
        wait_until(lambda: job.processes() == [], "nothing is left behind by Ctrl-C")
        said = job.log.read_text()
        # A worker's memory is frozen, and DuckDB lists what was not freed at the end.
        assert "Serving on" in said
        assert "leaked" not in said, said


@pytest.fixture
def client(job: Job) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{job.port}", timeout=60, trust_env=False) as client:
        yield client


def predict(client: httpx.Client, *users: int, **more: Any) -> list[dict[str, Any]]:
    answer = client.post("/predict", json={"entities": [{"user_id": user} for user in users], **more})
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["predictions"]
    return rows


def test_three_honest_answers(client: httpx.Client) -> None:
    known, partly, unknown = predict(client, WITH_DEMOGRAPHICS, WITHOUT_DEMOGRAPHICS, UNKNOWN)
    assert known["missing"] == {}
    assert {name.split("__")[0] for name in partly["missing"]} == {"user_demographics"}
    assert set(partly["missing"].values()) == {"NOT_FOUND"}
    statuses = {name.split("__")[0]: status for name, status in unknown["missing"].items()}
    assert statuses == {
        "user_demographics": "NOT_FOUND",
        "user_behavior": "NOT_FOUND",
        "user_activity": "NOT_FOUND",
        "user_at_request": "NULL_VALUE",
    }
    for row in (known, partly, unknown):
        assert row["prediction"] in (0, 1)
        assert 0.5 <= row["confidence"] <= 1.0


def test_rows_and_columns_mean_the_same(client: httpx.Client) -> None:
    moment = int(time.time())
    users = [WITHOUT_DEMOGRAPHICS, WITH_DEMOGRAPHICS, WITHOUT_DEMOGRAPHICS]
    rows = [{"user_id": user, "request_timestamp": moment} for user in users]
    columns = {"user_id": users, "request_timestamp": [moment] * 3}
    answers = [client.post("/predict", json={"entities": e}).json()["predictions"] for e in (rows, columns)]
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2]


def test_an_explained_row_shows_what_the_model_saw(client: httpx.Client) -> None:
    (row,) = predict(client, WITHOUT_DEMOGRAPHICS, explain=True)
    features = row["features"]
    assert features["user_demographics__age"] == {
        "value": None,
        "status": "NOT_FOUND",
        "event_timestamp": None,
    }
    spent = features["user_behavior__purchase_amount_30d"]
    assert spent["status"] == "PRESENT"
    assert spent["value"] >= 0
    assert spent["event_timestamp"].endswith("+00:00")
    missing = {name: f["status"] for name, f in features.items() if f["status"] != "PRESENT"}
    assert missing == row["missing"]


def test_a_large_request_is_answered_whole_and_in_order(client: httpx.Client) -> None:
    users = [1 + i % 2500 for i in range(3000)]
    moment = int(time.time())
    entities = {"user_id": users, "request_timestamp": [moment] * len(users)}
    rows = client.post("/predict", json={"entities": entities}).json()["predictions"]
    assert [row["entity"]["user_id"] for row in rows] == users
    assert rows[0] == rows[2500]


def test_a_second_up_changes_nothing(job: Job) -> None:
    before = registry_state(job)
    if datetime.now(UTC).date() != job.day:
        job.run(*job.command()[3:], "--no-serve")  # a day has ended, and its data are new
    again = job.run(*job.command()[3:], "--no-serve")
    assert again.returncode == 0, again.stderr
    assert "unchanged" in again.stderr
    assert "0 rows written" in again.stderr
    assert "is the champion" in again.stderr
    assert registry_state(job) == before


def registry_state(job: Job) -> dict[str, bytes]:
    files = [path for path in (job.state / "models").rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def test_the_metrics_count_requests_although_this_process_has_imported_feast(client: httpx.Client) -> None:
    predict(client, WITH_DEMOGRAPHICS)
    assert 'banquet_requests_total{route="/predict",status="200"}' in client.get("/metrics").text


def test_the_documented_examples_are_true(client: httpx.Client) -> None:
    """Every example body in /docs is answered with 200 by the server that documents it."""
    sent = 0
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        body = (
            operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        )
        for example in body.get("examples", {}).values():
            address = path.replace("{name}", "repurchase").replace("{version}", "1")
            answer = client.post(address, json=example["value"])
            assert answer.status_code == 200, (address, example, answer.text)
            sent += 1
    assert sent >= 10
    assert client.get("/docs").status_code == 200


def test_models_are_listed_shown_and_verified(job: Job) -> None:
    listed = json.loads(job.run("--json", "models", "list").stdout)
    assert listed == [{"name": "repurchase", "versions": [1], "aliases": {"champion": 1}}]
    shown = json.loads(job.run("--json", "models", "show", "models:/repurchase@champion").stdout)
    assert shown["metrics"]["roc_auc"] > shown["metrics"]["baselines"]["recency_only"]["roc_auc"]
    assert shown["metrics"]["log_loss"] < shown["metrics"]["baselines"]["constant_rate"]["log_loss"]
    assert job.run("models", "verify").returncode == 0


def test_an_altered_model_is_refused_before_it_is_unpickled(job: Job, tmp_path: Path) -> None:
    """The altered pickle would create a file if anything loaded it."""
    state = tmp_path / "state"
    shutil.copytree(job.state / "models", state / "models")
    trace = tmp_path / "executed"
    (artifact,) = state.rglob("model.joblib")
    artifact.write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % str(trace).encode())
    altered = Job(job.repo, state, job.redis_port, free_port())
    verified = altered.run("models", "verify")
    assert verified.returncode == 1
    assert "model.joblib" in verified.stdout
    process = subprocess.Popen(
        altered.command("serve", "--port", str(altered.port)),
        env=altered.env,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: "model.joblib" in altered.readiness(process).text,
            "it says why it is not ready",
            pause_seconds=0.1,
        )
        time.sleep(2)  # it has looked again
        assert altered.readiness(process).status_code == 503
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE_SECONDS)
    assert not trace.exists()


def test_another_up_on_the_same_port_is_refused_at_once(job: Job) -> None:
    refused = job.run(*job.command()[3:], "--port", str(job.port))
    assert refused.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{job.port}" in refused.stderr
    assert "Sources" not in refused.stderr


def test_a_killed_redis_is_started_again_with_its_data(job: Job, client: httpx.Client) -> None:
    """Failed requests meanwhile say where Redis is and are few lines of the log, not one each."""
    body = {"entities": [{"user_id": WITH_DEMOGRAPHICS, "request_timestamp": int(time.time())}]}
    before = client.post("/predict", json=body).json()["predictions"]
    embedded = EmbeddedRedis(job.state / "redis", FeastRepository.open(job.repo).redis)
    first = embedded.status().process_id
    assert first
    os.kill(first, signal.SIGSTOP)  # so that some requests fail, however fast it is started again
    away = [client.post("/predict", json=body) for _ in range(20)]
    os.kill(first, signal.SIGKILL)
    assert {answer.status_code for answer in away} == {503}
    assert "banquet redis start" in away[0].json()["hint"]
    ready: list[bool] = []

    def recovered() -> bool:
        ready.append(client.get("/readyz").status_code == 200)
        return ready[-1]

    wait_until(recovered, "it has recovered", pause_seconds=0.05)
    assert client.post("/predict", json=body).json()["predictions"] == before
    assert embedded.status().process_id != first
    # It answers a moment before the one who started it says so.
    wait_until(lambda: "had ended unasked; started again" in job.log.read_text(), "it is said")
    said = job.log.read_text()
    failed = len(away) + ready.count(False)
    assert 1 <= said.count("WARNING banquet.serving: redis_unavailable") < failed / 2


def test_redis_away_is_503_and_recovery_needs_no_help(job: Job, client: httpx.Client) -> None:
    body = {"entities": [{"user_id": WITH_DEMOGRAPHICS, "request_timestamp": int(time.time())}]}
    before = client.post("/predict", json=body).json()["predictions"]
    assert job.run("redis", "stop").returncode == 0
    away = client.post("/predict", json=body)
    assert away.status_code == 503
    assert away.headers["retry-after"] == "1"
    assert away.json()["code"] == "redis_unavailable"
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    # Not `banquet redis start`, whose server is meant to outlive the one that uses it.
    EmbeddedRedis(job.state / "redis", FeastRepository.open(job.repo).redis).start(lasting=False)
    wait_until(lambda: client.get("/readyz").status_code == 200, "it has recovered", pause_seconds=0.05)
    assert client.post("/predict", json=body).json()["predictions"] == before
    assert job.run("redis", "status").returncode == 0
