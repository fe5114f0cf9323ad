"""What one worker serves: feature definitions, plans and models, kept current in the background.

A request only ever looks things up here. A refresh that fails keeps what was there, is logged and
counted; a model version that fails its checks never replaces the one that serves.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping

from core.errors import BanquetError, InvalidRepository, ModelNotFound, ModelNotReady
from core.model import LoadedModel
from core.online import FeaturePlan, OnlineReader
from core.redis_connection import HashReader
from core.registry import ModelRegistry
from core.repository import Definitions, FeastRepository
from core.settings import Settings
from serving.metrics import RequestMetrics
from serving.predictor import ServedFeatures, ServedModel

log = logging.getLogger("banquet.serving")

CHAMPION = "champion"
_MAX_PLANS = 512


class Catalog:
    """Definitions and models of one repository and one model registry."""

    def __init__(
        self,
        repository: FeastRepository,
        registry: ModelRegistry,
        connection: HashReader,
        settings: Settings,
        metrics: RequestMetrics,
    ) -> None:
        self.project = repository.project
        self._repository = repository
        self._registry = registry
        self._connection = connection
        self._settings = settings
        self._metrics = metrics
        self.reader = OnlineReader(connection)
        self._definitions: Definitions | None = None
        self._fingerprint: object = None
        self._features: OrderedDict[str | tuple[str, ...], ServedFeatures] = OrderedDict()
        self._models: dict[str, ServedModel] = {}
        self._refused: dict[tuple[str, int], BanquetError] = {}
        self._failure: BanquetError | None = None
        self._task: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()

    async def start(self) -> None:
        """Load what is there; what is not there yet is looked for again in the background."""
        await self._refresh()
        self._task = asyncio.create_task(self._keep_current())

    async def stop(self) -> None:
        """Stop looking for changes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def definitions(self) -> Definitions:
        """The definitions in force.

        Raises:
            ModelNotReady: none could be read yet.
        """
        if self._definitions is None:
            raise ModelNotReady(
                "The feature definitions are not loaded yet.",
                hint=str(self._failure) if self._failure else "Run `banquet apply`, then try again.",
            )
        return self._definitions

    def features(self, wanted: str | tuple[str, ...]) -> ServedFeatures:
        """The reads of a feature service (a name) or of references (a tuple), resolved at their first use.

        Raises:
            FeatureServiceNotFound, FeatureNotFound, InvalidRequest: it cannot be resolved.
        """
        served = self._features.get(wanted)
        if served is None:
            if isinstance(wanted, str):
                plan = FeaturePlan.for_service(self.definitions, wanted)
            else:
                plan = FeaturePlan.for_references(self.definitions, wanted)
            served = ServedFeatures(
                plan,
                self.reader,
                max_entities=self._settings.max_entities,
                slice_rows=self._settings.slice_rows,
            )
            self._features[wanted] = served
            if len(self._features) > _MAX_PLANS:
                self._features.popitem(last=False)
        return served

    def model(self, name: str | None = None, version: int | None = None) -> ServedModel:
        """The champion of that name; without a name the default model.

        Raises:
            ModelNotFound: there is no such model, or a name is needed to choose one.
            ModelNotReady: its champion has not passed its checks.
        """
        name = name or self._default()
        served = self._models.get(name)
        if served is None:
            refused = next((error for (model, _), error in self._refused.items() if model == name), None)
            if refused is not None:
                raise ModelNotReady(f"Model {name!r} failed its checks: {refused.message}", hint=refused.hint)
            known = ", ".join(sorted(self._models)) or "none; register one with `banquet train`"
            raise ModelNotFound(f"There is no model {name!r}.", hint=f"Models: {known}.", model=name)
        if version is not None and version != served.version:
            raise ModelNotFound(
                f"Model {name!r} does not serve version {version}.",
                hint=f"It serves version {served.version}.",
                model=name,
                version=version,
            )
        return served

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """The champions that serve, by name."""
        return self._models

    async def check_ready(self) -> None:
        """Raise what stands between this worker and a prediction, if anything."""
        await self._connection.ping()
        _ = self.definitions
        if not self._settings.features_only and (self._settings.default_model or not self._models):
            self.model()

    def _default(self) -> str:
        if self._settings.default_model:
            return self._settings.default_model
        if len(self._models) == 1:
            return next(iter(self._models))
        if not self._models and len({model for model, _ in self._refused}) == 1:
            return next(model for model, _ in self._refused)
        if not self._models:
            raise ModelNotReady("No model has a champion yet.", hint="Register one with `banquet train`.")
        raise ModelNotFound(
            f"This server has several models: {', '.join(sorted(self._models))}.",
            hint="Use POST /models/<name>/predict, or set BANQUET_DEFAULT_MODEL.",
        )

    async def _keep_current(self) -> None:
        while True:
            await asyncio.sleep(self._settings.registry_refresh_s)
            await self._refresh()

    async def refresh_definitions(self) -> None:
        """Look for changed definitions now; a failure keeps the old ones, is logged and counted."""
        async with self._refreshing:
            await self._try_definitions()

    async def _refresh(self) -> None:
        async with self._refreshing:
            await self._try_definitions()
            await self._try_models()

    async def _try_definitions(self) -> None:
        try:
            await self._refresh_definitions()
            self._failure = None
        except BanquetError as exc:
            self._note("definitions", exc)
        except Exception as exc:
            self._note(
                "definitions", InvalidRepository(f"The registry cannot be read ({type(exc).__name__}).")
            )
            log.exception("refresh of the definitions failed")

    async def _try_models(self) -> None:
        if self._definitions is not None:
            try:
                await self._refresh_models()
            except BanquetError as exc:
                self._note("models", exc)
            except Exception:
                self._metrics.refresh_failed("models")
                log.exception("refresh of the models failed")

    def _note(self, what: str, error: BanquetError) -> None:
        if self._failure is None or str(self._failure) != str(error):
            log.warning("refresh of the %s failed, the old state stays: %s", what, error)
        self._failure = error
        self._metrics.refresh_failed(what)

    async def _refresh_definitions(self) -> None:
        fingerprint = await asyncio.to_thread(self._repository.fingerprint)
        if self._definitions is not None and fingerprint == self._fingerprint:
            return
        definitions = await asyncio.to_thread(self._repository.definitions)
        if definitions == self._definitions:
            self._fingerprint = fingerprint
            return
        self._definitions, self._fingerprint = definitions, fingerprint
        self._features.clear()
        self._refused.clear()
        for name, served in list(self._models.items()):
            await self._load(name, served.version)

    async def _refresh_models(self) -> None:
        champions = await asyncio.to_thread(self._champions)
        for name in set(self._models) - set(champions):
            del self._models[name]
        for name, version in champions.items():
            served = self._models.get(name)
            if (served is None or served.version != version) and (name, version) not in self._refused:
                await self._load(name, version)

    def _champions(self) -> dict[str, int]:
        found = {}
        for name in self._registry.models():
            version = self._registry.aliases(name).get(CHAMPION)
            if version is not None:
                found[name] = version
        return found

    async def _load(self, name: str, version: int) -> None:
        try:
            model, plan = await asyncio.to_thread(self._load_checked, name, version)
        except BanquetError as exc:
            self._refused[name, version] = exc
            self._metrics.refresh_failed("models")
            log.error("model %s version %d does not serve (%s): %s", name, version, exc.code, exc)
            return
        self._models[name] = ServedModel(
            model,
            plan,
            self.reader,
            self._metrics,
            max_entities=self._settings.max_entities,
            slice_rows=self._settings.slice_rows,
        )
        self._metrics.serving(name, CHAMPION, version)
        log.info("model %s version %d serves (%s)", name, version, model.manifest.compiled.form)

    def _load_checked(self, name: str, version: int) -> tuple[LoadedModel, FeaturePlan]:
        manifest = self._registry.manifest(name, version)
        plan = FeaturePlan.for_service(self.definitions, manifest.schema.service)
        return LoadedModel.load(self._registry, name, version, plan.schema(manifest.schema.service)), plan
