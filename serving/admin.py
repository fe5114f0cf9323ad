"""``/admin``: promote, roll back, start and stop rollouts. Keys of its own, off without one.

Every change is one entry of the model's history in the registry; this worker follows at once, the others
within their refresh. Knows what a body has to look like, nothing of how traffic is split.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from core import records, rollouts
from core.errors import InvalidRequest
from core.registry import Change, ModelRegistry
from core.traffic import Step
from serving import bodies
from serving.access import AccessPolicy
from serving.catalog import Catalog
from serving.conductor import Conductor
from serving.problems import AdminDisabled

_WHO = ("why", "who")


class AdminPolicy(AccessPolicy):
    """Lets a request through when its bearer key is one of the admin keys; without any, none."""

    setting = "BANQUET_ADMIN_KEYS"

    def check(self, authorization: bytes | None) -> None:
        """Raise AdminDisabled where there is no key, AccessDenied unless ``authorization`` carries one."""
        if not self.has_keys:
            raise AdminDisabled(
                hint="Set BANQUET_ADMIN_KEYS, or use the `banquet models` and `banquet rollout` commands."
            )
        super().check(authorization)


class Admin:
    """What the admin routes act on."""

    def __init__(self, registry: ModelRegistry, catalog: Catalog, conductor: Conductor) -> None:
        self.registry = registry
        self.catalog = catalog
        self.conductor = conductor

    async def change(self, model: str, work: Callable[[], Change]) -> bytes:
        """Do it and let this worker follow: the entry of the history, and the rollout that it ended."""
        change = await asyncio.to_thread(work)
        await self.catalog.refresh_models()
        ended = await asyncio.to_thread(self.registry.ended, model, change)
        answer = {**records.as_data(change), "ended_rollout": records.as_data(ended)}
        return orjson.dumps(answer, option=orjson.OPT_INDENT_2)


class _OfModel:
    """A change of one model; ``fields`` are what its body may have."""

    fields: tuple[str, ...] = _WHO

    def __init__(self, admin: Admin, name: str) -> None:
        self._admin = admin
        self._name = name

    async def __call__(self, body: bytes, request_id: str) -> bytes:
        given = bodies.parse(body) if body.strip() else {}
        bodies.check_fields(given, self.fields)
        signed = {
            "why": _text(given, "why", ""),
            "who": _text(given, "who", f"admin API, request {request_id}"),
        }
        return await self._admin.change(self._name, lambda: self.act(self._admin.registry, given, signed))

    def act(self, registry: ModelRegistry, given: Mapping[str, Any], signed: Mapping[str, str]) -> Change:
        """Change the registry."""
        raise NotImplementedError


class Promote(_OfModel):
    """``POST /admin/models/{name}/promote``."""

    fields = ("version", *_WHO)

    def act(self, registry: ModelRegistry, given: Mapping[str, Any], signed: Mapping[str, str]) -> Change:
        return registry.promote(self._name, _version(given), **signed)


class Rollback(_OfModel):
    """``POST /admin/models/{name}/rollback``."""

    def act(self, registry: ModelRegistry, given: Mapping[str, Any], signed: Mapping[str, str]) -> Change:  # noqa: ARG002
        return registry.rollback(self._name, **signed)


class StartRollout(_OfModel):
    """``POST /admin/models/{name}/rollout``."""

    fields = ("kind", "version", "steps", "automatic", "limits", *_WHO)

    def act(self, registry: ModelRegistry, given: Mapping[str, Any], signed: Mapping[str, str]) -> Change:
        kind = given.get("kind", "canary")
        if kind not in ("canary", "shadow"):
            raise InvalidRequest("`kind` must be canary or shadow.", field="kind")
        limits = given.get("limits", {})
        if type(limits) is not dict:
            raise InvalidRequest("`limits` must be an object.", field="limits")
        return rollouts.start(
            registry,
            self._name,
            kind=kind,
            version=_version(given),
            steps=_steps(given.get("steps")),
            limits=limits,
            automatic=bodies.flag(given, "automatic", default=True),
            **signed,
        )


class AdvanceRollout(_OfModel):
    """``POST /admin/models/{name}/rollout/advance``."""

    def act(self, registry: ModelRegistry, given: Mapping[str, Any], signed: Mapping[str, str]) -> Change:  # noqa: ARG002
        return rollouts.advance(registry, self._name, None, **signed)


class AbortRollout(_OfModel):
    """``POST /admin/models/{name}/rollout/abort``."""

    def act(self, registry: ModelRegistry, given: Mapping[str, Any], signed: Mapping[str, str]) -> Change:  # noqa: ARG002
        return rollouts.abort(registry, self._name, None, **signed)


class RolloutStatus:
    """``GET /admin/models/{name}/rollout``: the rollout under way, what was seen, what the judge says."""

    def __init__(self, admin: Admin, name: str) -> None:
        self._admin = admin
        self._name = name

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        status = await asyncio.to_thread(self._admin.conductor.status, self._name)
        return orjson.dumps(status.as_json())


class Models:
    """``GET /admin/models``: per model the aliases, what this worker has loaded and what it refused."""

    def __init__(self, admin: Admin) -> None:
        self._catalog = admin.catalog

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        refused = self._catalog.refused
        names = sorted({*self._catalog.deployments, *(name for name, _ in refused)})
        return orjson.dumps({name: self._model(name) for name in names})

    def _model(self, name: str) -> dict[str, Any]:
        refused = {
            str(version): {"code": error.code, "detail": error.message, "hint": error.hint}
            for (model, version), error in self._catalog.refused.items()
            if model == name
        }
        deployment = self._catalog.deployments.get(name)
        if deployment is None:
            return {"refused": refused}
        rollout = deployment.change.rollout
        return {
            "aliases": deployment.aliases,
            "versions": {
                str(number): {"form": served.model.manifest.compiled.form}
                for number, served in sorted(deployment.versions.items())
            },
            "rollout": records.as_data(rollout),
            "refused": refused,
        }


class Reload:
    """``POST /admin/reload``: look for changed definitions and models now, in the worker that answers."""

    def __init__(self, admin: Admin) -> None:
        self._catalog = admin.catalog

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        await self._catalog.refresh_definitions()
        await self._catalog.refresh_models()
        return orjson.dumps({"status": "ok"})


def _version(given: Mapping[str, Any]) -> int | None:
    version = given.get("version")
    if version is not None and (type(version) is not int or version < 1):
        raise InvalidRequest("`version` must be a positive integer.", field="version")
    return version


def _text(given: Mapping[str, Any], field: str, default: str) -> str:
    text = given.get(field, default)
    if type(text) is not str:
        raise InvalidRequest(f"`{field}` must be a string.", field=field)
    return text


def _steps(given: Any) -> list[Step] | None:
    """``[{"percent": 5, "min_seconds": 300, "min_rows": 1000}, ...]``, or percents alone."""
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        raise InvalidRequest("`steps` must be a list.", hint='Such as [{"percent": 5}].', field="steps")
    steps = []
    for entry in given:
        fields = entry if type(entry) is dict else {"percent": entry}
        bodies.check_fields(fields, ("percent", "min_seconds", "min_rows"))
        numbers = [fields.get("percent"), fields.get("min_seconds", 0.0)]
        if (
            not all(type(number) in (int, float) for number in numbers)
            or type(fields.get("min_rows", 1)) is not int
        ):
            raise InvalidRequest("A step has numbers for percent, min_seconds and min_rows.", field="steps")
        steps.append(Step(**fields))
    return steps
