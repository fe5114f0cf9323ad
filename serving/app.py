"""The ASGI application: FastAPI as the face, hot routes answered before it.

``create_app`` takes everything it needs; ``serving.server`` decides where that comes from.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from core.errors import BanquetError
from core.redis_connection import HashReader
from core.registry import ModelRegistry
from core.repository import FeastRepository
from core.settings import Settings
from serving import admin, admin_docs, api_docs, inference
from serving.access import AccessPolicy
from serving.catalog import Catalog
from serving.conductor import Conductor
from serving.endpoints import App, Endpoint, Gateway, HotRoutes, Receive, Scope, Send, given_id
from serving.features import OnlineFeaturesEndpoint
from serving.feedback import FeedbackEndpoint
from serving.memory import MemoryWatch
from serving.metrics import RequestMetrics
from serving.predictions import PredictEndpoint
from serving.problems import CONTENT_TYPE, MethodNotAllowed, RouteNotFound, problem
from serving.push import FeatureWriter, PushEndpoint, WriteOnlineEndpoint

log = logging.getLogger("banquet.serving")


def _spare_the_collector() -> None:
    """Keep the garbage collector off what lives as long as the process, and off short-lived replies.

    A read makes a list per entity, none of them in a cycle; at Python's thresholds they would have the whole
    application looked through several times a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class _Answer(Response):
    """Lets the gateway answer a request that FastAPI's router has matched."""

    def __init__(self, gateway: Gateway, route: str, endpoint: Endpoint) -> None:
        super().__init__()
        self._gateway = gateway
        self._route = route
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        await self._gateway.answer(self._route, self._endpoint, scope, receive, send)


def create_app(
    repository: FeastRepository,
    registry: ModelRegistry,
    connection: HashReader,
    settings: Settings,
    *,
    slot: int = 0,
    recycle: Callable[[str], None] | None = None,
) -> App:
    """The application of one worker.

    ``connection`` is opened when the application starts and closed when it stops. ``slot`` is the worker's
    number in the metrics, ``recycle`` asks for its replacement, where it has a supervisor.
    """
    metrics = RequestMetrics()
    memory = MemoryWatch(metrics, slot, settings.memory_limit_mb * 1_000_000, recycle)
    gateway = Gateway(
        max_body_bytes=settings.max_body_bytes, access=AccessPolicy(settings.api_keys), metrics=metrics
    )
    admin_gateway = Gateway(
        max_body_bytes=settings.max_body_bytes,
        access=admin.AdminPolicy(settings.admin_keys),
        metrics=metrics,
    )
    catalog = Catalog(repository, registry, connection, settings, metrics)
    conductor = Conductor(catalog, registry, repository.redis, repository.project)
    writer = FeatureWriter(repository, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await connection.connect()
        except BanquetError as exc:
            # Not a reason to die: the connection keeps trying, and /readyz says why it is not ready.
            log.warning("%s", exc)
        await catalog.start()
        await conductor.start()
        _spare_the_collector()
        watches = [asyncio.create_task(watch) for watch in (memory.run(), metrics.run())]
        try:
            yield
        finally:
            for watch in watches:
                watch.cancel()
            metrics.flush()
            await conductor.stop()
            await catalog.stop()
            await writer.close()
            await connection.close()

    app = FastAPIOffline(
        title="Banquet",
        version=version("feast-banquet"),
        summary=f"Features and predictions by entity ID for the Feast project {repository.project!r}.",
        lifespan=lifespan,
        redoc_url=None,
    )
    predict = PredictEndpoint(catalog)
    features = OnlineFeaturesEndpoint(catalog)
    feedback = FeedbackEndpoint(catalog, settings.max_entities)
    push = PushEndpoint(catalog, writer)
    write_online = WriteOnlineEndpoint(catalog, writer)

    def route(
        path: str,
        make: Callable[..., Endpoint],
        docs: dict[str, Any],
        *,
        method: str = "POST",
        through: Gateway = gateway,
    ) -> None:
        async def answer(request: Request) -> Response:
            return _Answer(through, path, make(**request.path_params))

        app.add_api_route(path, answer, methods=[method], name=docs["operationId"], openapi_extra=docs)

    def model_route(path: str, make: Callable[..., Endpoint], docs: dict[str, Any], *, method: str) -> None:
        """The route below ``/v2/models/{name}``, and below a version of it."""
        versioned = {**docs, "operationId": docs["operationId"] + "_version"}
        route("/v2/models/{name}" + path, make, api_docs.with_path(docs, "name"), method=method)
        route(
            "/v2/models/{name}/versions/{version}" + path,
            make,
            api_docs.with_path(versioned, "name", "version"),
            method=method,
        )

    route("/predict", lambda: predict, api_docs.PREDICT)
    route("/models/{name}/predict", partial(PredictEndpoint, catalog), api_docs.PREDICT_WITH)
    route(
        "/models/{name}/versions/{version}/predict",
        partial(PredictEndpoint, catalog),
        api_docs.PREDICT_WITH_VERSION,
    )
    route("/get-online-features", lambda: features, api_docs.ONLINE_FEATURES)
    route("/feedback", lambda: feedback, api_docs.FEEDBACK)
    route("/push", lambda: push, api_docs.PUSH)
    route("/write-to-online-store", lambda: write_online, api_docs.WRITE_ONLINE)

    route("/v2", inference.ServerMetadata, api_docs.V2_SERVER, method="GET")
    route("/v2/health/live", inference.ServerLive, api_docs.V2_LIVE, method="GET")
    route("/v2/health/ready", partial(inference.ServerReady, catalog), api_docs.V2_READY, method="GET")
    model_route("", partial(inference.ModelMetadata, catalog), api_docs.V2_MODEL, method="GET")
    model_route("/ready", partial(inference.ModelReady, catalog), api_docs.V2_MODEL_READY, method="GET")
    model_route("/infer", partial(inference.Infer, catalog), api_docs.V2_INFER, method="POST")

    acts = admin.Admin(registry, catalog, conductor)
    for method, path, make, docs in (
        ("GET", "/models", admin.Models, admin_docs.MODELS),
        ("POST", "/models/{name}/promote", admin.Promote, admin_docs.PROMOTE),
        ("POST", "/models/{name}/rollback", admin.Rollback, admin_docs.ROLLBACK),
        ("GET", "/models/{name}/rollout", admin.RolloutStatus, admin_docs.ROLLOUT),
        ("POST", "/models/{name}/rollout", admin.StartRollout, admin_docs.START),
        ("POST", "/models/{name}/rollout/advance", admin.AdvanceRollout, admin_docs.ADVANCE),
        ("POST", "/models/{name}/rollout/abort", admin.AbortRollout, admin_docs.ABORT),
        ("POST", "/reload", admin.Reload, admin_docs.RELOAD),
    ):
        route(f"/admin{path}", partial(make, acts), docs, method=method, through=admin_gateway)

    @app.get("/", tags=["operations"], summary="Where to look")
    async def root() -> dict[str, Any]:
        return {
            "name": "banquet",
            "version": app.version,
            "project": repository.project,
            "models": sorted(catalog.deployments),
            "predict": "POST /predict",
            "docs": "/docs",
            "health": "/health",
            "metrics": "/metrics",
        }

    @app.get("/livez", tags=["operations"], summary="Whether the process answers")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operations"],
        summary="Whether Redis answers and a model is loaded",
        responses={503: {"description": "Not ready; the body says why."}},
    )
    async def readyz(request: Request) -> Response:
        try:
            await catalog.check_ready()
        except BanquetError as exc:
            return _problem(exc, request, status=503)
        stale = {"stale": sorted(catalog.stale)} if catalog.stale else {}
        return JSONResponse({"status": "ready", **stale})

    @app.get("/health", tags=["operations"], summary="What this server serves")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "project": repository.project,
            "models": {
                name: {
                    "version": deployment.served.version,
                    "form": deployment.served.model.manifest.compiled.form,
                    "aliases": deployment.aliases,
                    "rollout": deployment.rollout_text,
                }
                for name, deployment in sorted(catalog.deployments.items())
            },
            "refused": [
                {"model": name, "version": number, "code": error.code}
                for (name, number), error in sorted(catalog.refused.items(), key=lambda item: item[0])
            ],
            "stale": [
                {"what": what, "code": stale.error.code, "since": stale.since}
                for what, stale in sorted(catalog.stale.items())
            ],
        }

    @app.get("/metrics", tags=["operations"], summary="Prometheus metrics", include_in_schema=False)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def _problem(exc: Exception, request: Request, status: int | None = None) -> Response:
        given = request.headers.get("x-request-id", "").encode("latin-1")
        identity = given_id(given) or gateway.request_ids.next()
        code, payload = problem(exc, identity, gateway.failures)
        headers = {"x-request-id": identity, **({"retry-after": "1"} if 503 in (code, status) else {})}
        return Response(payload, status or code, headers=headers, media_type=CONTENT_TYPE.decode())

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: HTTPException) -> Response:
        path = request.url.path
        if exc.status_code == 405:
            allowed = (exc.headers or {}).get("Allow", "")
            return _problem(
                MethodNotAllowed(f"{path} does not take {request.method}.", hint=f"Use {allowed}."), request
            )
        return _problem(
            RouteNotFound(f"There is nothing at {path}.", hint="The routes are listed at /docs."), request
        )

    @app.exception_handler(Exception)
    async def unexpected(request: Request, exc: Exception) -> Response:
        return _problem(exc, request)

    return HotRoutes(
        app,
        gateway,
        {"/predict": predict, "/get-online-features": features},
        {
            "/models/{name}/predict": partial(PredictEndpoint, catalog),
            "/models/{name}/versions/{version}/predict": partial(PredictEndpoint, catalog),
            "/v2/models/{name}/infer": partial(inference.Infer, catalog),
            "/v2/models/{name}/versions/{version}/infer": partial(inference.Infer, catalog),
        },
    )
