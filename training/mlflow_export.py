"""A registered version in MLflow: the scikit-learn model, its metrics and origin, and its aliases.

What MLflow gets is the estimator with the matrix that it was fitted on as its input (``core.model``), and the
manifest beside it. Knows MLflow's client, which is an extra, and nothing of serving.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.compiled import SklearnRunner
from core.errors import ExportFailed, InvalidRequest
from core.manifest import MANIFEST_FILE, SKOPS_FILE, ModelManifest
from core.model import LoadedModel, load_estimator
from core.registry import ModelRegistry

_DIGEST_TAG = "banquet.manifest_sha256"


@dataclass(frozen=True, slots=True)
class Export:
    """Where a version is in MLflow; ``was_there`` where an earlier export had put it there."""

    name: str
    version: int
    mlflow_version: int
    run_id: str
    aliases: tuple[str, ...]
    was_there: bool


def export(registry: ModelRegistry, name: str, version: int, *, tracking_uri: str, experiment: str) -> Export:
    """Log and register a version in MLflow, unless it is there, and give it the aliases that it has here.

    Raises:
        ModelNotFound: there is no such version.
        ModelRejected: it is not sound, or does not reproduce its golden predictions here.
        InvalidRequest: MLflow is not installed.
        ExportFailed: MLflow does not answer, or refuses something.
    """
    try:
        import mlflow.sklearn
    except ImportError as exc:
        raise InvalidRequest(f"{exc.name} is not installed.", hint="Install feast-banquet[mlflow].") from exc
    manifest = registry.verify(name, version)
    digest = registry.manifest_digest(name, version)
    aliases = sorted(alias for alias, number in registry.aliases(name).items() if number == version)
    try:
        mlflow.set_tracking_uri(tracking_uri)
        client = mlflow.MlflowClient(tracking_uri, tracking_uri)
        there = [
            found
            for found in client.search_model_versions(f"name = '{name}'")
            if found.tags.get(_DIGEST_TAG) == digest
        ]
        found = there[0] if there else _register(mlflow, client, registry, manifest, digest, experiment)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, found.version)
    except (mlflow.MlflowException, OSError) as exc:
        first = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise ExportFailed(f"MLflow at {tracking_uri} did not take {name}/{version}: {first}") from exc
    return Export(name, version, int(found.version), found.run_id, tuple(aliases), bool(there))


def _register(
    mlflow: Any,
    client: Any,
    registry: ModelRegistry,
    manifest: ModelManifest,
    digest: str,
    experiment: str,
) -> Any:
    """Log a run with the model, and register what it logged."""
    estimator = load_estimator(registry, manifest)
    LoadedModel(manifest, SklearnRunner(estimator)).check_golden()
    skops = manifest.estimator_file == SKOPS_FILE
    tags = {
        "banquet.version": str(manifest.version),
        "banquet.feature_service": manifest.schema.service,
        "banquet.dataset_digest": manifest.dataset_digest,
        _DIGEST_TAG: digest,
    }
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=f"{manifest.name}-{manifest.version}", tags=tags) as run:
        mlflow.log_params(dict(_params(manifest)))
        mlflow.log_metrics(dict(_metrics(manifest.metrics)))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            mlflow.log_artifact(str(Path(folder) / MANIFEST_FILE))
        logged = mlflow.sklearn.log_model(
            estimator,
            name="model",
            signature=_signature(manifest),
            serialization_format="skops" if skops else "cloudpickle",
            skops_trusted_types=sorted(registry.trust.skops_types) if skops else None,
            pip_requirements=list(_requirements(manifest)),
            metadata={"features": list(manifest.feature_names)},
        )
    if not client.search_registered_models(f"name = '{manifest.name}'"):
        client.create_registered_model(manifest.name, description=manifest.description)
    return client.create_model_version(manifest.name, logged.model_uri, run_id=run.info.run_id, tags=tags)


def _signature(manifest: ModelManifest) -> Any:
    """A float64 matrix in, one column a feature in the manifest's order; classes or values out."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    matrix = TensorSpec(np.dtype(np.float64), (-1, len(manifest.feature_names)))
    out = np.asarray(manifest.classes or (0.0,)).dtype
    if out.kind == "U":
        out = np.dtype(str)  # MLflow takes no length
    return ModelSignature(Schema([matrix]), Schema([TensorSpec(out, (-1,))]))


def _params(manifest: ModelManifest) -> Iterator[tuple[str, Any]]:
    window = manifest.window
    yield from {
        "task": manifest.task,
        "feature_service": manifest.schema.service,
        "features": len(manifest.feature_names),
        "label": manifest.label,
        "threshold": manifest.threshold,
        "compiled_form": manifest.compiled.form,
        "training_rows": window.training_rows,
        "holdout_rows": window.holdout_rows,
        "window_start": window.start.isoformat(),
        "window_split": window.split.isoformat(),
        "window_end": window.end.isoformat(),
    }.items()


def _metrics(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a tree of metrics, by their path."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _metrics(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _requirements(manifest: ModelManifest) -> Iterator[str]:
    wanted = ["scikit-learn", "numpy"] + (["skops"] if manifest.estimator_file == SKOPS_FILE else [])
    for library in wanted:
        if library in manifest.libraries:
            yield f"{library}=={manifest.libraries[library]}"
