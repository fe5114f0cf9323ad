"""From entity columns to predictions: read, build the matrix, predict, for many requests at once.

Knows no HTTP. A batch never mixes models; requests that arrive together share one Redis round trip and
one predict call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import orjson

from core.entities import EntitySchema
from core.errors import BanquetError, InvalidEntity
from core.model import LoadedModel, Predictions
from core.online import FeaturePlan, FeatureVectors, OnlineReader
from core.online_json import EPOCH, JsonColumn, event_timestamps, joined, repeated, rest, status_names
from core.types import FeatureStatus
from serving.batching import ColumnBatcher, Columns, Finished, pieces
from serving.metrics import RequestMetrics

# A predict call that takes longer than this runs in a thread, so that other requests get their turn.
_INLINE_PREDICT_S = 0.002


class Answer(NamedTuple):
    """The outcome for ``rows`` rows, by column: those from ``first`` on of the ones read ``together``.

    ``predictions[i]``, ``confidences[i]`` and ``scores[i]`` mean nothing where ``errors`` has row i. A score
    is what a distribution of answers is made of: the probability of the second of two classes, of the
    predicted one of several, or a regressor's value; None where the model has only classes. ``missing``
    gives the columns in which some value read is not PRESENT, with the status of each row.
    """

    together: FeatureVectors
    first: int
    rows: int
    predictions: Sequence[Any]
    confidences: Sequence[float | None]
    scores: Sequence[float] | None
    errors: dict[int, BanquetError]
    missing: list[tuple[str, list[FeatureStatus]]]

    @property
    def vectors(self) -> FeatureVectors:
        """The features; cut out when asked for, as most answers do without."""
        return self.together.slice(self.first, self.first + self.rows)

    def alone(self) -> Answer:
        """The same without the rest of what was read together: for who keeps it."""
        return self._replace(together=self.vectors, first=0)

    def slice(self, start: int, stop: int) -> Answer:
        """The rows from ``start`` to before ``stop``."""
        errors = self.errors
        if errors:
            errors = {row - start: error for row, error in errors.items() if start <= row < stop}
        return Answer(
            self.together,
            self.first + start,
            stop - start,
            self.predictions[start:stop],
            self.confidences[start:stop],
            None if self.scores is None else self.scores[start:stop],
            errors,
            [(name, statuses[start:stop]) for name, statuses in self.missing],
        )


class ServedFeatures:
    """One plan, read as the JSON of Feast's feature server.

    ``columns`` names the join keys and request-time inputs that a read has to bring. Requests share their
    round trips as they share the connection; where on-demand views are called, they share the calls too.
    """

    def __init__(
        self, plan: FeaturePlan, reader: OnlineReader, *, max_entities: int, slice_rows: int
    ) -> None:
        self.plan = plan
        self.entities = EntitySchema(plan.join_keys, list(plan.request_inputs.values()), max_entities)
        self.columns = (*(key.name for key in plan.join_keys), *plan.request_inputs)
        self._reader = reader
        self._slice_rows = slice_rows
        self._computing: ColumnBatcher[FeatureVectors] = ColumnBatcher(
            partial(reader.read, plan, as_json=True), slice_rows=slice_rows
        )

    async def read(self, columns: Columns, rows: int) -> list[JsonColumn]:
        """Read ``rows`` checked entities, in the order of ``plan.names``; raises as ``OnlineReader.read``."""
        if self.plan.computes:
            slices = await self._computing.run(columns, rows, self._written)
        elif rows <= self._slice_rows:
            return await self._reader.read_json(self.plan, columns, rows)
        else:
            slices = [
                await self._reader.read_json(self.plan, piece, count)
                for piece, count in pieces(columns, rows, self._slice_rows)
            ]
        return slices[0] if len(slices) == 1 else list(map(joined, zip(*slices, strict=True)))

    def _written(self, vectors: FeatureVectors, _: Columns) -> list[JsonColumn]:
        rows = vectors.rows
        times = {view: event_timestamps(events, rows)[0] for view, events in vectors.event_ns.items()}
        never = repeated(EPOCH, rows)
        return [
            (
                orjson.dumps(vectors.values[name]),
                rest(
                    status_names(vectors.statuses[name], rows),
                    times.get(self.plan.stored_in.get(name, ""), never),
                ),
            )
            for name in self.plan.names
        ]


class VectorPredictor:
    """Missing-value policy, matrix and estimator of one loaded version."""

    def __init__(self, model: LoadedModel, metrics: RequestMetrics) -> None:
        self._model = model
        self._metrics = metrics
        # An average call: a call has a cost of its own, so large ones say more of what a row costs.
        self._seconds = self._rows = 0.0

    async def predict(self, vectors: FeatureVectors) -> Answer:
        """``answer``, in a thread where it takes long."""
        if vectors.rows * self._seconds > self._rows * _INLINE_PREDICT_S:
            return await asyncio.get_running_loop().run_in_executor(None, self._timed, vectors)
        return self._timed(vectors)

    def _timed(self, vectors: FeatureVectors) -> Answer:
        started, busy = time.perf_counter(), time.thread_time()
        answer = self.answer(vectors)
        taken, busy = time.perf_counter() - started, time.thread_time() - busy
        # A call that waits, or computes in threads of its own, holds up the loop for all its time. One that
        # computes here does so for its processor time: what else it took, other processes took from it.
        if busy > taken / 4:
            taken = busy
        # Forgetting slowly keeps one slow call, a garbage collection say, from moving all into threads.
        self._seconds += 0.05 * (taken - self._seconds)
        self._rows += 0.05 * (vectors.rows - self._rows)
        return answer

    def answer(self, vectors: FeatureVectors) -> Answer:
        """Predict every row; what is wrong with a row is in the answer's ``errors``. Thread-safe."""
        model = self._model
        matrix = model.matrix(vectors.values, vectors.rows)
        errors = dict(vectors.errors)
        for row, features in model.rejected(vectors.values, vectors.rows).items():
            statuses = {
                name: (vectors.statuses[name] or [])[row].name for name in features if vectors.statuses[name]
            }
            errors.setdefault(
                row,
                InvalidEntity(
                    f"The model does not predict without {', '.join(features)}.",
                    hint="Its missing-value policy for these features is `reject`.",
                    missing=statuses,
                ),
            )
        predicted = model.predict(matrix)
        for row, error in predicted.errors.items():
            errors.setdefault(row, error)
        confidences = predicted.confidences
        return Answer(
            vectors,
            0,
            vectors.rows,
            predicted.labels,
            confidences if confidences is not None else [None] * vectors.rows,
            self._scores(predicted),
            errors,
            [(name, statuses) for name, statuses in vectors.statuses.items() if statuses],
        )

    def _scores(self, predicted: Predictions) -> Sequence[float] | None:
        classes = self._model.manifest.classes
        if not classes:
            return predicted.labels
        if len(classes) == 2 and predicted.probabilities is not None:
            # Left an array: who wants the scores, a trial, looks at them later.
            return cast("Sequence[float]", predicted.probabilities[:, 1])
        return predicted.confidences

    def count(self, answer: Answer) -> None:
        """Count an answer that goes to a client."""
        manifest = self._model.manifest
        self._metrics.predicted(manifest.name, manifest.version, answer.rows)
        for name, statuses in answer.missing:
            for status in set(statuses) - {FeatureStatus.PRESENT}:
                self._metrics.missing(name, status.name, statuses.count(status))


class ServedModel:
    """One loaded version together with the plan that feeds it.

    Holds no reference to itself, so it is released when its last request has ended.
    """

    def __init__(
        self,
        model: LoadedModel,
        plan: FeaturePlan,
        reader: OnlineReader,
        metrics: RequestMetrics,
        *,
        max_entities: int,
        slice_rows: int,
    ) -> None:
        self.name = model.manifest.name
        self.version = model.manifest.version
        self.model = model
        self.plan = plan
        self.entities = EntitySchema(plan.join_keys, list(plan.request_inputs.values()), max_entities)
        self.predictor = VectorPredictor(model, metrics)
        self.read = partial(reader.read, plan)
        self._batcher: ColumnBatcher[Answer] = ColumnBatcher(
            partial(_read_and_predict, reader, plan, self.predictor), slice_rows=slice_rows
        )

    def predict(
        self, columns: Columns, rows: int, finish: Callable[[Answer, Columns], Finished]
    ) -> Awaitable[list[Finished]]:
        """Predict ``rows`` checked entities; ``finish`` is called with each slice's answer and columns.

        Raises:
            RedisUnavailable: Redis did not answer.
            Overloaded: too many reads are waiting.
        """
        return self._batcher.run(columns, rows, finish)


async def _read_and_predict(
    reader: OnlineReader, plan: FeaturePlan, predictor: VectorPredictor, columns: Columns, rows: int
) -> Answer:
    answer = await predictor.predict(await reader.read(plan, columns, rows))
    predictor.count(answer)
    return answer
