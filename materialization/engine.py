"""Banquet's Feast compute engine: bulk loads behind ``feast materialize`` and ``materialize-incremental``.

    batch_engine: {type: materialization.engine.BulkComputeEngine, memory_limit: 300MB}

What it cannot load itself (views that transform, another online store) goes through Feast's local engine,
and so does historical retrieval by engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from feast import FeatureView
from feast.infra.common.materialization_job import (
    MaterializationJob,
    MaterializationJobStatus,
    MaterializationTask,
)
from feast.infra.common.retrieval_task import HistoricalRetrievalTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob, LocalRetrievalJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel

from core.errors import BanquetError
from materialization import views
from materialization.materializer import MEMORY_LIMIT, Materializer, Request
from materialization.report import Progress


class BulkComputeEngineConfig(FeastConfigBaseModel):  # type: ignore[misc]  # Feast ships no types
    """The ``batch_engine`` section of feature_store.yaml."""

    type: Literal["materialization.engine.BulkComputeEngine"] = "materialization.engine.BulkComputeEngine"

    memory_limit: str = MEMORY_LIMIT
    """DuckDB's memory; beyond it, it spills to disk."""

    threads: int | None = None
    """DuckDB's threads. Default: one per core."""

    temp_directory: str | None = None
    """Where DuckDB spills to; relative to the repository. Default: a folder of the system's."""


class BulkComputeEngine(ComputeEngine):  # type: ignore[misc]  # Feast ships no types
    """Feast's compute-engine interface over ``Materializer``."""

    def __init__(self, *, repo_config: Any, offline_store: Any, online_store: Any, **settings: Any) -> None:
        super().__init__(repo_config=repo_config, offline_store=offline_store, online_store=online_store)
        self.config = BulkComputeEngineConfig(**settings)
        self._local = LocalComputeEngine(
            backend="pandas", repo_config=repo_config, offline_store=offline_store, online_store=online_store
        )

    @property
    def supports_batch(self) -> bool:
        """One call gets every view, so that a view that fails does not keep the others from being loaded."""
        return True

    def update(self, *_: Any, **__: Any) -> None:
        """Nothing to prepare."""

    def teardown_infra(self, *_: Any, **__: Any) -> None:
        """Nothing to tear down: the online store removes its own rows."""

    def materialize(
        self,
        registry: BaseRegistry,
        tasks: MaterializationTask | list[MaterializationTask],
        **options: Any,
    ) -> list[MaterializationJob]:
        """One job per task, in order; a job that failed carries its error."""
        tasks = [tasks] if isinstance(tasks, MaterializationTask) else tasks
        return [self._materialize_one(registry, task, **options) for task in tasks]

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **options: Any
    ) -> MaterializationJob:
        view = task.feature_view
        if self.repo_config.online_store.type != "redis" or views.needs_feast(view):
            return self._local._materialize_one(registry, task, **options)
        job_id = f"{view.name}-{task.start_time}-{task.end_time}"
        bar = _Bar(task)
        try:
            report = self._materializer().load_view(
                view,
                Request(
                    start=task.start_time,
                    end=task.end_time,
                    incremental=_continues(view, task),
                    observe=bar.show,
                ),
            )
            if report.error is not None:
                raise report.error
        except BanquetError as exc:
            return LocalMaterializationJob(job_id, MaterializationJobStatus.ERROR, exc)
        finally:
            bar.close()
        return LocalMaterializationJob(job_id, MaterializationJobStatus.SUCCEEDED)

    def _materializer(self) -> Materializer:
        config = self.config
        folder = config.temp_directory and Path(self.repo_config.repo_path or ".") / config.temp_directory
        return Materializer(
            self.repo_config,
            self.offline_store,
            memory_limit=config.memory_limit,
            threads=config.threads,
            temp_directory=folder or None,
        )

    def get_historical_features(
        self, registry: BaseRegistry, task: HistoricalRetrievalTask
    ) -> LocalRetrievalJob:
        """As Feast's local engine does it."""
        return self._local.get_historical_features(registry, task)


def _continues(view: FeatureView, task: MaterializationTask) -> bool:
    """Whether Feast was asked to go on where it stopped: such a run also gets the late rows."""
    recent = view.most_recent_end_time
    return recent is not None and views.aware(recent) == views.aware(task.start_time)


class _Bar:
    """Feast's progress bar, fed by ours."""

    def __init__(self, task: MaterializationTask) -> None:
        self._build = task.tqdm_builder
        self._bar: Any = None

    def show(self, progress: Progress) -> None:
        if self._build is None:
            return
        if self._bar is None:
            self._bar = self._build(progress.total)
        self._bar.update(progress.rows - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
