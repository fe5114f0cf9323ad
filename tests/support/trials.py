"""A repository with two thousand users in Redis, and versions of a model that misbehave on purpose.

The label is worth predicting: a user's ``a`` is its log odds. A server's process finds the estimators because
they live in this module.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyarrow as pa

from core.layout_rows import RowEncoder
from core.manifest import BASELINE_FILE, MODEL_FILE, CompiledForm, ModelManifest
from core.online import FeaturePlan
from core.redis import RedisAddress
from core.registry import ModelRegistry
from core.repository import FeastRepository
from core.types import Dtype, Field
from core.write import OnlineWriter
from tests.support import packages
from tests.support.registered import AView, register, registry_of, repository

USERS = 2000
# Where latency is not to decide: a machine that stops for a second is no challenger's fault.
ANY_LATENCY = {"p99_ratio": 5.0, "p99_slack_seconds": 10.0, "p99_seconds": 15.0}
SERVICE = "scores_v1"
MODEL = "scores"
VIEW = AView("account")


def scene(path: Path, address: RedisAddress, project: str) -> FeastRepository:
    """The repository, its users written to Redis; user i has ``a`` between -3 and 1 and ``b`` = i."""
    repo = repository(path, address, project)
    register(repo, [VIEW])
    _add_service(repo)
    fields = [Field(name, Dtype.DOUBLE) for name in VIEW.features]
    encoder = RowEncoder(project, VIEW.name, [Field("user_id", Dtype.INT64)], fields, "event_timestamp")
    users = np.arange(USERS)
    batch = pa.record_batch(
        {
            "user_id": pa.array(users),
            "a": pa.array(log_odds(users)),
            "b": pa.array(users.astype(np.float64)),
            "event_timestamp": pa.array([time.time_ns() // 1000] * USERS, pa.timestamp("us", tz="UTC")),
        }
    )
    with OnlineWriter(address, project) as writer:
        writer.write(VIEW.name, encoder.encode(batch), distinct=True)
    return repo


def log_odds(users: Any) -> Any:
    """The ``a`` of some users: spread evenly, in no order."""
    return (users * 0.618033988749895 % 1.0) * 4.0 - 3.0


def label(user: int) -> int:
    """What the user really does: as likely as ``a`` says, and the same each time."""
    chance = 1 / (1 + np.exp(-log_odds(np.int64(user))))
    return int(user * 0.7548776662466927 % 1.0 < chance)


def _add_service(repo: FeastRepository) -> None:
    registry = registry_of(repo, [VIEW])
    service = registry.feature_services.add()
    service.spec.name, service.spec.project = SERVICE, repo.project
    projection = service.spec.features.add(feature_view_name=VIEW.name)
    for name in VIEW.features:
        projection.feature_columns.add(name=name, value_type=int(Dtype.DOUBLE))
    assert repo.registry_file is not None
    repo.registry_file.write_bytes(registry.SerializeToString())


def under_way(client: Any) -> bool:
    """Whether a server of one worker lets a rollout take its share: its version may take a while to load."""
    told = client.get("/health").json()["models"][MODEL]["rollout"]
    return bool(told) and "not in this worker" not in told


class Honest:
    """The probability that ``a`` stands for."""

    classes_ = np.array([0, 1])

    def predict_proba(self, matrix: Any) -> Any:
        """Shape (rows, 2)."""
        yes = 1 / (1 + np.exp(-np.nan_to_num(matrix[:, 0])))
        return np.stack([1 - yes, yes], axis=1)


class Slow(Honest):
    """Two hundred milliseconds late."""

    def predict_proba(self, matrix: Any) -> Any:
        time.sleep(0.2)
        return super().predict_proba(matrix)


class Failing(Honest):
    """Raises for one user in twenty."""

    def predict_proba(self, matrix: Any) -> Any:
        if (matrix[:, 1] % 20 == 7).any():
            raise ValueError("this row is too much")
        return super().predict_proba(matrix)


class Wrong(Honest):
    """Says the opposite."""

    def predict_proba(self, matrix: Any) -> Any:
        return super().predict_proba(matrix)[:, ::-1]


class Inverted(Honest):
    """The champion's scores, each given to another user: that of the mirrored ``a``."""

    def predict_proba(self, matrix: Any) -> Any:
        mirrored = matrix.copy()
        mirrored[:, 0] = -2.0 - matrix[:, 0]
        return super().predict_proba(mirrored)


class Nothing(Honest):
    """Gives NaN for everybody."""

    def predict_proba(self, matrix: Any) -> Any:
        return np.full((len(matrix), 2), np.nan)


def register_version(
    repo: FeastRepository, registry: ModelRegistry, estimator: Any, **changes: Any
) -> ModelManifest:
    """Register a version that serves as scikit-learn would; it becomes nothing's alias."""
    pickled = io.BytesIO()
    joblib.dump(estimator, pickled)
    described = {
        "name": MODEL,
        "schema": FeaturePlan.for_service(repo.definitions(), SERVICE).schema(SERVICE),
        "task": "classification",
        "classes": (0, 1),
        "golden": (),
        "compiled": CompiledForm("sklearn", MODEL_FILE, 0.0, True, 0),
    }
    files = {MODEL_FILE: pickled.getvalue(), BASELINE_FILE: b"rows"}
    return packages.register(registry, files, **(described | changes))
