"""What one worker serves: feature definitions, plans and models, kept current in the background.

A request only ever looks things up here. A refresh that fails keeps what was there, is logged and
counted; a model version that fails its checks never replaces the one that serves. Every version that an alias
points to is loaded, so that moving traffic between them, forward or back, loads nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from core.errors import (
    BanquetError,
    CheckFailed,
    InvalidRepository,
    ModelNotFound,
    ModelNotReady,
    RegistryUnavailable,
    Unavailable,
)
from core.model import LoadedModel
from core.observed import PROBABILITY_EDGES, value_edges
from core.online import FeaturePlan, OnlineReader
from core.redis_connection import HashReader
from core.registry import CHAMPION, Change, ModelRegistry, versions_in
from core.repository import Definitions, FeastRepository
from core.settings import Settings
from core.traffic import Rollout
from serving.deployment import Canary, Deployment, Pinned, Shadow
from serving.metrics import RequestMetrics
from serving.predictor import ServedFeatures, ServedModel
from serving.trials import TrialRecorder

log = logging.getLogger("banquet.serving")

_MAX_PLANS = 512


@dataclass(frozen=True, slots=True)
class Stale:
    """Why definitions or models cannot be read anew, and since when (UTC); the old state serves."""

    error: BanquetError
    since: datetime


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
        self._deployments: dict[str, Deployment] = {}
        self._seen: dict[str, Change] = {}
        self._known: dict[str, Change] = {}
        self._refused: dict[tuple[str, int], BanquetError] = {}
        self._recorders: dict[str, TrialRecorder] = {}
        self._stale: dict[str, Stale] = {}
        self._failed = 0
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
        for name in list(self._deployments):
            self._withdraw(name)

    @property
    def definitions(self) -> Definitions:
        """The definitions in force.

        Raises:
            ModelNotReady: none could be read yet.
        """
        if self._definitions is None:
            stale = self._stale.get("definitions")
            raise ModelNotReady(
                "The feature definitions are not loaded yet.",
                hint=str(stale.error) if stale else "Run `banquet apply`, then try again.",
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

    def target(self, reference: str | None = None, version: int | None = None) -> Deployment | Pinned:
        """Who answers a request for ``name`` (its champion, and whoever is on trial), or ``name@alias``.

        With ``version`` that version alone; without a reference the default model.

        Raises:
            ModelNotFound: there is no such model, alias or version, or a name is needed to choose one.
            ModelNotReady: its champion has not passed its checks.
        """
        name, _, alias = (reference or self._default()).partition("@")
        if alias and version is not None:
            raise ModelNotFound(
                f"{reference!r} names a version by its alias already.",
                hint=f"Ask for {name!r} and version {version}, or for {reference!r} alone.",
                model=name,
                version=version,
            )
        deployment = self._deployments.get(name)
        if deployment is None:
            refused = next((error for (model, _), error in self._refused.items() if model == name), None)
            if refused is not None:
                raise ModelNotReady(f"Model {name!r} failed its checks: {refused.message}", hint=refused.hint)
            known = ", ".join(sorted(self._deployments)) or "none; register one with `banquet train`"
            raise ModelNotFound(f"There is no model {name!r}.", hint=f"Models: {known}.", model=name)
        if not alias and version is None:
            return deployment
        aliases = deployment.aliases
        if alias:
            if alias not in aliases:
                raise ModelNotFound(
                    f"Model {name!r} has no alias {alias!r} here.",
                    hint=f"Its aliases: {', '.join(sorted(aliases))}.",
                    model=name,
                )
            version = aliases[alias]
        pinned = deployment.pinned(version, alias) if version is not None else None
        if pinned is None:
            shown = ", ".join(f"{number} ({alias})" for alias, number in sorted(aliases.items()))
            raise ModelNotFound(
                f"Model {name!r} does not serve version {version}.",
                hint=f"It serves {shown}; give a version an alias with `banquet models alias`.",
                model=name,
                version=version,
            )
        return pinned

    @property
    def deployments(self) -> Mapping[str, Deployment]:
        """What serves, by model."""
        return self._deployments

    @property
    def refused(self) -> Mapping[tuple[str, int], BanquetError]:
        """The versions that an alias points to and that must not serve, with the reason."""
        return self._refused

    @property
    def stale(self) -> Mapping[str, Stale]:
        """What of "definitions" and "models" could not be read anew when it was looked at last."""
        return self._stale

    async def check_ready(self) -> None:
        """Raise what stands between this worker and a prediction, if anything."""
        await self._connection.ping()
        _ = self.definitions
        if not self._settings.features_only and (self._settings.default_model or not self._deployments):
            self.target()

    def _default(self) -> str:
        if self._settings.default_model:
            return self._settings.default_model
        if len(self._deployments) == 1:
            return next(iter(self._deployments))
        if not self._deployments and len({model for model, _ in self._refused}) == 1:
            return next(model for model, _ in self._refused)
        if not self._deployments:
            raise ModelNotReady("No model has a champion yet.", hint="Register one with `banquet train`.")
        raise ModelNotFound(
            f"This server has several models: {', '.join(sorted(self._deployments))}.",
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

    async def refresh_models(self) -> None:
        """Look for changed aliases and rollouts now; a failure keeps the old state, is logged and counted."""
        async with self._refreshing:
            await self._try_models()

    async def _refresh(self) -> None:
        async with self._refreshing:
            await self._try_definitions()
            await self._try_models()

    async def _try_definitions(self) -> None:
        try:
            await self._refresh_definitions()
        except BanquetError as exc:
            self._note("definitions", exc)
        except Exception as exc:  # noqa: BLE001 — logged with its traceback; the old state serves
            self._note(
                "definitions", InvalidRepository(f"The registry cannot be read ({type(exc).__name__})."), exc
            )
        else:
            self._read_again("definitions")

    async def _try_models(self) -> None:
        if self._definitions is not None:
            failed = self._failed
            try:
                await self._refresh_models()
            except BanquetError as exc:
                self._note("models", exc)
            except Exception as exc:  # noqa: BLE001 — as above
                self._note(
                    "models", RegistryUnavailable(f"The models cannot be read ({type(exc).__name__})."), exc
                )
            else:
                if self._failed == failed:
                    self._read_again("models")

    def _note(self, what: str, error: BanquetError, cause: Exception | None = None) -> None:
        before = self._stale.get(what)
        if before is None or str(before.error) != str(error):
            log.warning("refresh of the %s failed, the old state stays: %s", what, error, exc_info=cause)
        self._stale[what] = Stale(error, before.since if before else datetime.now(tz=UTC))
        self._failed += 1
        self._metrics.refresh_failed(what)
        self._metrics.refresh_failing(what, True)

    def _read_again(self, what: str) -> None:
        if self._stale.pop(what, None) is not None:
            log.info("the %s can be read again", what)
        self._metrics.refresh_failing(what, False)

    async def _refresh_definitions(self) -> None:
        fingerprint = await asyncio.to_thread(self._repository.fingerprint)
        if self._definitions is not None and fingerprint == self._fingerprint:
            return
        definitions = await asyncio.to_thread(self._repository.definitions)
        if await asyncio.to_thread(self._repository.fingerprint) != fingerprint:
            return  # it is being written, so what was read may be a part: the next look has it whole
        if definitions == self._definitions:
            self._fingerprint = fingerprint
            return
        self._definitions, self._fingerprint = definitions, fingerprint
        self._features.clear()
        self._refused.clear()
        for name, change in list(self._seen.items()):
            await self._deploy(name, change, {})

    async def _refresh_models(self) -> None:
        changes = await asyncio.to_thread(self._changes)
        for name in self._deployments.keys() - changes.keys():
            self._withdraw(name)
        for name in self._seen.keys() - changes.keys():
            del self._seen[name]
        for name, change in changes.items():
            if self._seen.get(name) != change:
                current = self._deployments.get(name)
                await self._deploy(name, change, current.versions if current else {})

    def _changes(self) -> dict[str, Change]:
        """The state of each model that has a champion; the last that was read where it cannot be trusted.

        No model is forgotten: one that comes back with an older history would be believed.
        """
        found = {}
        for name in sorted({*self._registry.names(), *self._known}):
            try:
                change = self._registry.latest(name, self._known.get(name))
            except CheckFailed as exc:
                self._note("models", exc)
                change = self._known.get(name)
            if change is not None:
                self._known[name] = change
                if CHAMPION in change.aliases:
                    found[name] = change
        return found

    async def _deploy(self, name: str, change: Change, loaded: Mapping[int, ServedModel]) -> None:
        """Load what the state names and ``loaded`` lacks, the champion first, which serves at once."""
        wanted = versions_in(change.traffic)
        versions = {number: served for number, served in loaded.items() if number in wanted}
        first = change.aliases[CHAMPION]
        for number in (first, *sorted(wanted - {first})):
            if number not in versions:
                served = await self._load(name, number)
                if served is not None:
                    versions[number] = served
            if number == first:
                self._install(name, change, versions)
        self._install(name, change, versions)
        kept = {(name, number) for number in wanted}
        for key in [key for key in self._refused if key[0] == name and key not in kept]:
            del self._refused[key]
        self._metrics.refused(name, [number for model, number in self._refused if model == name])
        self._seen[name] = change

    def _install(self, name: str, change: Change, versions: Mapping[int, ServedModel]) -> None:
        current = self._deployments.get(name)
        champion = versions.get(change.aliases[CHAMPION])
        if champion is None and current is not None:
            champion = current.served
        if champion is None:
            return
        everyone = {**versions, champion.version: champion}
        trial = self._trial(name, change.rollout, champion, everyone, current)
        deployment = Deployment(change, champion, everyone, trial)
        self._deployments[name] = deployment
        if current is not None and current.trial is not None and current.trial is not trial:
            current.trial.close()
        if current is None or current.served is not champion:
            form = champion.model.manifest.compiled.form
            log.info("model %s version %d serves (%s)", name, champion.version, form)
        self._metrics.serving(name, deployment.aliases)

    def _trial(
        self,
        name: str,
        rollout: Rollout | None,
        champion: ServedModel,
        versions: Mapping[int, ServedModel],
        current: Deployment | None,
    ) -> Canary | Shadow | None:
        """The trial that the state asks for, if both of its versions serve; the present one if it is that."""
        challenger = versions.get(rollout.version) if rollout is not None else None
        if rollout is None or challenger is None or champion.version != rollout.champion:
            return None
        trial = current.trial if current is not None else None
        if (
            trial is not None
            and trial.rollout == rollout
            and (trial.champion, trial.challenger) == (champion, challenger)
        ):
            return trial
        recorder = self._recorder(name, rollout, champion)
        if rollout.kind == "canary":
            return Canary(rollout, champion, challenger, recorder)
        return Shadow(rollout, champion, challenger, recorder, self._metrics)

    def _recorder(self, name: str, rollout: Rollout, champion: ServedModel) -> TrialRecorder:
        """What notes the rollout's statistics, at its present step."""
        recorder = self._recorders.get(rollout.id)
        if recorder is None:
            manifest = champion.model.manifest
            edges: Sequence[float] = PROBABILITY_EDGES
            if manifest.task == "regression":
                edges = value_edges([float(row.prediction or 0) for row in manifest.golden])
            recorder = self._recorders[rollout.id] = TrialRecorder(
                self._repository.redis,
                self.project,
                name,
                rollout.id,
                classes=manifest.classes,
                score_edges=edges,
                step=rollout.position,
            )
        recorder.begin(rollout.position)
        return recorder

    def ended_recorders(self) -> list[TrialRecorder]:
        """The recorders of rollouts that have ended, which are the caller's to flush and close."""
        live = {
            deployment.change.rollout.id
            for deployment in self._deployments.values()
            if deployment.change.rollout is not None
        }
        return [self._recorders.pop(trial) for trial in list(self._recorders) if trial not in live]

    def _withdraw(self, name: str) -> None:
        trial = self._deployments.pop(name).trial
        if trial is not None:
            trial.close()

    async def _load(self, name: str, version: int) -> ServedModel | None:
        """A version that has passed its checks; None where it must not serve.

        Raises Unavailable where the registry does not answer: the state is looked at again.
        """
        if (name, version) in self._refused:
            return None
        try:
            model, plan = await asyncio.to_thread(self._load_checked, name, version)
        except Unavailable:
            raise
        except BanquetError as exc:
            self._refused[name, version] = exc
            self._metrics.refresh_failed("models")
            log.error("model %s version %d does not serve (%s): %s", name, version, exc.code, exc)
            return None
        return ServedModel(
            model,
            plan,
            self.reader,
            self._metrics,
            max_entities=self._settings.max_entities,
            slice_rows=self._settings.slice_rows,
        )

    def _load_checked(self, name: str, version: int) -> tuple[LoadedModel, FeaturePlan]:
        manifest = self._registry.manifest(name, version)
        plan = FeaturePlan.for_service(self.definitions, manifest.schema.service)
        return LoadedModel.load(self._registry, name, version, plan.schema(manifest.schema.service)), plan
