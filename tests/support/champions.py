"""Models of a few numbers, registered for a feature service of a test's repository and made champion."""

from __future__ import annotations

from typing import Any

from core.manifest import BASELINE_FILE, MODEL_FILE, CompiledForm, ModelManifest
from core.online import FeaturePlan
from core.registry import CHAMPION, ModelRegistry
from core.repository import FeastRepository
from tests.support import packages


def champion(
    repository: FeastRepository,
    registry: ModelRegistry,
    name: str,
    service: str,
    graph: bytes,
    **changes: Any,
) -> ModelManifest:
    """Register the ONNX ``graph`` over the service's features, in their order; a regressor by default."""
    plan = FeaturePlan.for_service(repository.definitions(), service)
    described = {
        "name": name,
        "schema": plan.schema(service),
        "golden": (),
        "compiled": CompiledForm("onnx", packages.GRAPH_FILE, 0.0, True, 2),
    }
    files = {MODEL_FILE: b"never unpickled", BASELINE_FILE: b"rows", packages.GRAPH_FILE: graph}
    manifest = packages.register(registry, files, **(described | changes))
    registry.set_alias(name, CHAMPION, manifest.version)
    return manifest
