"""Several versions of a model in one server: asked for by alias or number, moved and refused as it runs."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from core import rollouts
from core.manifest import MODEL_FILE, GoldenRow
from core.model import LoadedModel
from core.registry import CHALLENGER, CHAMPION, ModelRegistry
from core.repository import FeastRepository
from core.settings import Settings
from core.traffic import Step
from tests.support import trials
from tests.support.clients import Clients
from tests.support.server import banquet
from tests.support.trials import MODEL, Honest, Wrong
from tests.support.waiting import until, wait_until

ADMIN = {"Authorization": "Bearer admin-key"}


@dataclass(frozen=True)
class Scene:
    """A server, its registry with three versions (1 the champion, 2 the opposite, 3 as 1), and a client."""

    repo: FeastRepository
    registry: ModelRegistry
    client: httpx.Client

    def predict(self, path: str = "/predict", user: int = 5) -> tuple[int, str, float]:
        """Version, variant and probability of what is predicted for a user."""
        answer = self.client.post(path, json={"entities": [{"user_id": user}]})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        return told["model_version"], told["variant"], told["predictions"][0]["confidence"]

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until the server has heard of it."""
        wait_until(holds, "it has reached the server", pause_seconds=0.02)


@pytest.fixture(scope="module")
def repo(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    return trials.scene(tmp_path_factory.mktemp("versions"), valkey.address(), "versions")


@pytest.fixture
def scene(repo: FeastRepository, tmp_path: Path) -> Iterator[Scene]:
    registry = ModelRegistry(str(tmp_path / "models"))
    for estimator in (Honest(), Wrong(), Honest()):
        trials.register_version(repo, registry, estimator)
    registry.set_alias(MODEL, CHAMPION, 1)
    registry.set_alias(MODEL, CHALLENGER, 2)
    settings = Settings(registry_url=registry.url, state_dir=tmp_path, admin_keys="admin-key, other")
    with banquet(repo.path, settings) as client:
        yield Scene(repo, registry, client)


def test_a_version_is_asked_for_by_name_alias_or_number(scene: Scene) -> None:
    sure = 1 / (1 + math.exp(-abs(trials.log_odds(5))))
    assert scene.predict() == (1, "champion", pytest.approx(sure))
    assert scene.predict(f"/models/{MODEL}/predict") == (1, "champion", pytest.approx(sure))
    assert scene.predict(f"/models/{MODEL}@challenger/predict") == (2, "challenger", pytest.approx(sure))
    assert scene.predict(f"/models/{MODEL}/versions/2/predict")[:2] == (2, "challenger")
    assert scene.predict(f"/models/{MODEL}/versions/1/predict")[:2] == (1, "champion")
    metadata = scene.client.get(f"/v2/models/{MODEL}").json()
    assert metadata["versions"] == ["1", "2"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "/models/scores/versions/3/predict",
            "does not serve version 3. It serves 2 (challenger), 1 (champion)",
        ),
        ("/models/scores/versions/x/predict", "has no version 'x'"),
        ("/models/scores@champion/versions/1/predict", "names a version by its alias already"),
        ("/v2/models/scores@champion/versions/7/infer", "names a version by its alias already"),
        ("/models/scores@nobody/predict", "has no alias 'nobody' here. Its aliases: challenger, champion"),
        ("/models/others/predict", "There is no model 'others'. Models: scores"),
        ("/models/%2e%2e%2fscores/predict", ""),
        ("/models/..%5cscores@champion/predict", ""),
        ("/models/scores@..%2f1/predict", ""),
        ("/models/scores/versions/..%2f1/predict", ""),
        ("/v2/models/%2e%2e%2fscores/infer", ""),
    ],
)
def test_what_does_not_serve_is_a_404_that_says_what_does(scene: Scene, path: str, says: str) -> None:
    answer = scene.client.post(path, json={"entities": [{"user_id": 1}]})
    assert answer.status_code == 404
    assert says in answer.json()["error"]


def test_a_promotion_and_its_rollback_reach_the_server(scene: Scene) -> None:
    scene.registry.promote(MODEL)
    scene.until(lambda: scene.predict()[:2] == (2, "champion"))
    assert scene.predict(f"/models/{MODEL}@previous/predict")[:2] == (1, "previous")
    scene.registry.rollback(MODEL)
    scene.until(lambda: scene.predict()[:2] == (1, "champion"))


def test_an_alias_of_its_own_loads_a_version_and_its_end_releases_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released without the garbage collector: nothing of a served version refers to itself."""
    loaded: dict[int, weakref.ref[LoadedModel]] = {}
    load = LoadedModel.load.__func__  # type: ignore[attr-defined]

    def watched(cls: type[LoadedModel], *arguments: Any) -> LoadedModel:
        model: LoadedModel = load(cls, *arguments)
        loaded[model.manifest.version] = weakref.ref(model)
        return model

    monkeypatch.setattr(LoadedModel, "load", classmethod(watched))
    scene.registry.set_alias(MODEL, "pinned", 3)
    scene.until(lambda: scene.client.post("/models/scores@pinned/predict", json={}).status_code != 404)
    assert scene.predict("/models/scores@pinned/predict")[:2] == (3, "pinned")
    gc.disable()
    try:
        scene.registry.set_alias(MODEL, "pinned", 1)
        scene.until(lambda: scene.predict("/models/scores@pinned/predict")[0] == 1)
        scene.until(lambda: loaded[3]() is None)
    finally:
        gc.enable()


def test_a_champion_that_fails_its_checks_never_serves(scene: Scene, tmp_path: Path) -> None:
    lies = (GoldenRow({"account__a": 1.0, "account__b": 0.0}, 1, (0.9, 0.1)),)
    bad = trials.register_version(scene.repo, scene.registry, Honest(), golden=lies).version
    scene.registry.promote(MODEL, bad)
    scene.until(lambda: bool(scene.client.get("/health").json()["refused"]))
    assert scene.client.get("/health").json()["refused"] == [
        {"model": MODEL, "version": bad, "code": "golden_mismatch"}
    ]
    assert scene.predict()[:2] == (1, "champion")
    assert scene.client.get("/readyz").status_code == 200
    assert f'banquet_model_versions_refused{{model="{MODEL}"}} 1.0' in scene.client.get("/metrics").text

    damaged = trials.register_version(scene.repo, scene.registry, Honest()).version
    (tmp_path / "models" / MODEL / str(damaged) / MODEL_FILE).write_bytes(b"swapped")
    scene.registry.promote(MODEL, damaged)
    scene.until(lambda: scene.client.get("/health").json()["refused"][-1]["code"] == "digest_mismatch")
    assert scene.predict()[:2] == (1, "champion")

    scene.registry.promote(MODEL, 3)
    scene.until(lambda: scene.predict()[:2] == (3, "champion"))


def failures(client: httpx.Client) -> float:
    """How many looks for changed models have failed."""
    found = re.search(r'refresh_failures_total{[^}]*"models"[^}]*} ([0-9.]+)', client.get("/metrics").text)
    return float(found[1]) if found else 0.0


def test_a_server_never_goes_back_to_a_state_that_it_has_left(scene: Scene, tmp_path: Path) -> None:
    """The model taken away, then put back with an older history: what serves goes on serving."""
    folder = tmp_path / "models" / MODEL
    shutil.copytree(folder, tmp_path / "old")
    scene.registry.promote(MODEL, 2)
    scene.until(lambda: scene.predict()[:2] == (2, "champion"))

    for replay in (lambda: None, lambda: shutil.copytree(tmp_path / "old", folder)):
        if not (tmp_path / "newer").exists():
            folder.rename(tmp_path / "newer")
        replay()
        seen = failures(scene.client)
        scene.until(lambda seen=seen: failures(scene.client) >= seen + 2)  # type: ignore[misc]
        assert scene.predict()[:2] == (2, "champion")
    shutil.rmtree(folder)
    (tmp_path / "newer").rename(folder)
    scene.registry.promote(MODEL, 3)
    scene.until(lambda: scene.predict()[:2] == (3, "champion"))


def aliases(client: httpx.Client) -> Any:
    """Those that a server knows."""
    return client.get("/health").json()["models"][MODEL]["aliases"]


def test_a_registry_that_is_away_is_told_of_once_and_everything_serves_on(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(registry_url=scene.registry.url, state_dir=tmp_path, registry_refresh_s=0.05)
    with banquet(scene.repo.path, settings) as client:

        def failing() -> float:
            found = re.search(r'refresh_failing{[^}]*"models"[^}]*} ([0-9.]+)', client.get("/metrics").text)
            return float(found[1]) if found else math.nan

        for number in range(2):
            caplog.clear()
            assert client.get("/readyz").json() == {"status": "ready"}
            before = failures(client)
            (tmp_path / "models").rename(tmp_path / "away")
            scene.until(lambda before=before: failures(client) >= before + 5)  # type: ignore[misc]
            scene.until(lambda: bool(client.get("/health").json()["stale"]))
            (stale,) = client.get("/health").json()["stale"]
            assert (stale["what"], stale["code"]) == ("models", "history_rewritten")
            assert datetime.fromisoformat(stale["since"]) <= datetime.now(tz=UTC)
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()) == (200, {"status": "ready", "stale": ["models"]})
            scene.until(lambda: failing() == 1)
            assert client.post("/predict", json={"entities": [{"user_id": 5}]}).json()["model_version"] == 1
            told = [record.message for record in caplog.records if "refresh of the models" in record.message]
            # The fixture's server has a log of its own to fill.
            assert 1 <= len(told) <= 2, told
            (tmp_path / "away").rename(tmp_path / "models")
            scene.registry.set_alias(MODEL, f"back{number}", 1)
            scene.until(lambda number=number: f"back{number}" in aliases(client))  # type: ignore[misc]
            scene.until(lambda: not client.get("/health").json()["stale"])
            scene.until(lambda: failing() == 0)


def test_the_admin_api_promotes_and_rolls_back_at_once(scene: Scene) -> None:
    def post(path: str, body: Any = None) -> httpx.Response:
        return scene.client.post(f"/admin/models/{MODEL}/{path}", json=body or {}, headers=ADMIN)

    done = post("promote", {"why": "better", "who": "ada"})
    assert done.status_code == 200, done.text
    assert done.json()["aliases"] == {"champion": 2, "previous": 1}
    assert scene.predict()[:2] == (2, "champion")
    done = scene.client.post(f"/admin/models/{MODEL}/rollback", headers=ADMIN)  # a body is optional
    assert done.json()["aliases"] == {"champion": 1, "previous": 2}
    assert post("rollback").json()["aliases"] == {"champion": 2, "previous": 1}
    done = post("rollback", {"why": "worse after all"})
    assert done.json()["aliases"] == {"champion": 1, "previous": 2}
    assert scene.predict()[:2] == (1, "champion")
    told = [(change.action, change.who, change.why) for change in scene.registry.history(MODEL)[-4:]]
    assert told[0] == ("promote", "ada", "better")
    assert [one[0::2] for one in told[1:]] == [("rollback", why) for why in ("", "", "worse after all")]
    assert told[1][1].startswith("admin API, request ")
    models = scene.client.get("/admin/models", headers=ADMIN).json()
    assert models[MODEL]["aliases"] == {"champion": 1, "previous": 2}
    assert set(models[MODEL]["versions"]) == {"1", "2"}
    assert scene.client.post("/admin/reload", json={}, headers=ADMIN).json() == {"status": "ok"}


def test_the_documented_examples_of_the_admin_api_are_true(scene: Scene) -> None:
    """Each change is what the one before it left possible, in the order of the document."""
    sent = 0
    for path, methods in scene.client.get("/openapi.json").json()["paths"].items():
        if path.startswith("/admin/") and "post" in methods:
            example = methods["post"]["requestBody"]["content"]["application/json"]["example"]
            address = path.replace("{name}", MODEL)
            answer = scene.client.post(address, json=example, headers=ADMIN)
            assert answer.status_code == 200, (address, example, answer.text)
            sent += 1
    assert sent == 6


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("promote", {"version": 1}, 409, "is the champion already"),
        ("promote", {"version": 9}, 404, "has no version 9"),
        ("promote", {"version": "2"}, 422, "`version` must be a positive integer"),
        ("promote", {"versoin": 2}, 422, "Unknown field `versoin`"),
        ("rollback", {}, 409, "has no previous champion"),
        ("rollout/abort", {}, 409, "has no rollout under way"),
        ("rollout/advance", {}, 409, "has no rollout under way"),
        ("rollout", {"kind": "green"}, 422, "`kind` must be canary or shadow"),
        ("rollout", {"steps": [50, 5]}, 422, "The steps of a rollout must grow"),
        ("rollout", {"steps": [{"percent": "5"}]}, 422, "A step has numbers"),
        ("rollout", {"limits": {"eror_rate": 1}}, 422, "There is no limit eror_rate"),
        ("rollout", {"limits": {"without": 5}}, 422, "The limit without is 5"),
        ("rollout", {"limits": {"without": [["errors"]]}}, 422, "The limit without is"),
        ("rollout", {"version": 1}, 409, "is the champion already"),
    ],
)
def test_what_the_admin_api_refuses(scene: Scene, path: str, body: Any, status: int, says: str) -> None:
    answer = scene.client.post(f"/admin/models/{MODEL}/{path}", json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]


def test_the_admin_api_needs_a_key_of_its_own(scene: Scene, tmp_path: Path) -> None:
    answer = scene.client.get("/admin/models")
    assert (answer.status_code, answer.json()["code"]) == (401, "access_denied")
    assert "BANQUET_ADMIN_KEYS" in answer.json()["hint"]
    settings = Settings(registry_url=scene.registry.url, state_dir=tmp_path, api_keys="k")
    with banquet(scene.repo.path, settings) as client:
        answer = client.get("/admin/models", headers={"Authorization": "Bearer k"})
        assert (answer.status_code, answer.json()["code"]) == (403, "admin_disabled")


def test_a_canary_shares_a_request_and_says_which_rows_are_its_own(scene: Scene) -> None:
    """The champion's rows and the canary's come back in the order of the request, by either protocol."""
    rollouts.start(scene.registry, MODEL, kind="canary", steps=[Step(50)], automatic=False)
    scene.until(lambda: trials.under_way(scene.client))
    users = list(range(200))
    whole = scene.client.post("/predict", json={"entities": {"user_id": users}}).json()
    assert (whole["model_version"], whole["variant"]) == (1, "champion")
    rows = whole["predictions"]
    assert [row["entity"]["user_id"] for row in rows] == users
    canary = [user for user, row in enumerate(rows) if "variant" in row]
    assert 60 < len(canary) < 140
    assert all((rows[user]["model_version"], rows[user]["variant"]) == (2, "challenger") for user in canary)
    for user, row in enumerate(rows):
        honest = int(trials.log_odds(user) > 0)
        assert row["prediction"] == (1 - honest if user in canary else honest)
        alone = scene.client.post("/predict", json={"entities": [{"user_id": user}]}).json()
        assert alone["variant"] == ("challenger" if user in canary else "champion")
        assert alone["predictions"][0]["confidence"] == pytest.approx(row["confidence"])
    tensor = {"name": "user_id", "shape": [200], "datatype": "INT64", "data": users}
    told = scene.client.post(f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]}).json()
    assert told["parameters"] == {"variant": "champion", "challenger_rows": canary}
    assert told["outputs"][0]["data"] == [row["prediction"] for row in rows]
    pinned = scene.client.post(f"/models/{MODEL}/versions/1/predict", json={"entities": {"user_id": users}})
    assert all("variant" not in row for row in pinned.json()["predictions"])


def test_versions_that_answer_other_requests_cannot_share_traffic(scene: Scene) -> None:
    other = trials.register_version(scene.repo, scene.registry, Honest(), classes=(0, 1, 2)).version
    body = {"version": other}
    answer = scene.client.post(f"/admin/models/{MODEL}/rollout", json=body, headers=ADMIN)
    assert answer.status_code == 409
    assert "differ in the classes" in answer.json()["error"]


def test_a_shadow_that_ends_under_load_ends_quietly(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that came before its end find it closed: their rows are dropped, nothing fails."""
    port = scene.client.base_url.port
    assert port is not None

    async def run() -> Clients:
        async with Clients([port], connections=6) as clients:
            for _ in range(3):
                rollouts.start(scene.registry, MODEL, kind="shadow", automatic=False)
                await until(
                    lambda: trials.under_way(scene.client), "the shadow has begun", pause_seconds=0.05
                )
                answered = len(clients.seen)
                await until(lambda answered=answered: len(clients.seen) > answered + 100, "it has work")  # type: ignore[misc]
                rollouts.abort(scene.registry, MODEL, None)
                await until(
                    lambda: not trials.under_way(scene.client), "the shadow has ended", pause_seconds=0.05
                )
        return clients

    clients = asyncio.run(run())
    assert clients.failures == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
