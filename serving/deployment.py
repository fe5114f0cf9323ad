"""The versions of one model that a worker serves, and which of them answers for which rows.

A deployment is a snapshot of what the registry says, replaced as a whole: a request takes the one that is
there when it comes and keeps it to its end. Knows no HTTP and asks no registry.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from core.errors import BanquetError, PredictionFailed
from core.online import FeatureVectors
from core.registry import CHALLENGER, CHAMPION, Change
from core.traffic import Rollout, Split
from serving.batching import Columns, Finished
from serving.metrics import RequestMetrics
from serving.predictor import Answer, ServedModel
from serving.trials import TrialRecorder

log = logging.getLogger("banquet.serving")

# A shadow that falls behind loses rows, it does not grow.
_SHADOW_WAITING_ROWS = 4096
_SHADOW_BATCH_ROWS = 256
# It is in no hurry: what comes within this time is predicted in one call, in one visit to the thread.
_SHADOW_GATHERS_SECONDS = 0.02


class Share:
    """The rows of a request that one version answers for; ``rows`` are their places, None for all."""

    __slots__ = ("rows", "served", "variant")

    def __init__(self, served: ServedModel, variant: str, rows: list[int] | None = None) -> None:
        self.served = served
        self.variant = variant
        self.rows = rows

    def predict(
        self,
        columns: Columns,
        rows: int,
        finish: Callable[[Answer, Columns], Finished],
        request_id: str,  # noqa: ARG002 — a share on trial is remembered by it
    ) -> Awaitable[list[Finished]]:
        """Predict the share's rows as ``ServedModel.predict`` does; ``columns`` are those of the share."""
        return self.served.predict(columns, rows, finish)


@dataclass(frozen=True, slots=True)
class Pinned:
    """One version asked for by its number or alias: no rollout has a say."""

    served: ServedModel
    variant: str

    @property
    def numbers(self) -> list[int]:
        """The version's number."""
        return [self.served.version]

    def shares(self, columns: Columns, rows: int) -> list[Share]:  # noqa: ARG002 — as Deployment's
        """All rows for this version."""
        return [Share(self.served, self.variant)]


class Deployment:
    """One model: ``versions`` by number, of them the champion, and the trial of another if there is one."""

    def __init__(
        self,
        change: Change,
        champion: ServedModel,
        versions: Mapping[int, ServedModel],
        trial: Canary | Shadow | None,
    ) -> None:
        self.change = change
        self.served = champion
        self.versions = versions
        self.trial = trial
        self._champion = [Share(champion, CHAMPION)]

    @property
    def numbers(self) -> list[int]:
        """The versions that can be asked for."""
        return sorted(self.versions)

    @property
    def aliases(self) -> dict[str, int]:
        """The aliases as they serve: a champion that did not pass its checks is still the one before."""
        loaded = {alias: number for alias, number in self.change.aliases.items() if number in self.versions}
        return {**loaded, CHAMPION: self.served.version}

    @property
    def rollout_text(self) -> str | None:
        """What is on trial, for people: ``canary of version 4 at 25 %``."""
        rollout = self.change.rollout
        if rollout is None:
            return None
        text = f"{rollout.kind} of version {rollout.version} at {rollout.step.percent:g} %"
        return text if self.trial is not None else f"{text}, not in this worker: see refused"

    def shares(self, columns: Columns, rows: int) -> list[Share]:
        """Who answers for which of ``rows`` checked entities; every row is in one share."""
        return self._champion if self.trial is None else self.trial.shares(columns, rows)

    def pinned(self, version: int, alias: str = "") -> Pinned | None:
        """That version alone, if it is loaded, under the alias that it was asked for by."""
        served = self.versions.get(version)
        if served is None:
            return None
        if alias:
            return Pinned(served, alias)
        aliases = self.aliases
        if aliases[CHAMPION] == version:
            return Pinned(served, CHAMPION)
        return Pinned(served, next((a for a, v in aliases.items() if v == version), CHALLENGER))


def pick(columns: Columns, rows: Sequence[int]) -> Columns:
    """Some rows of the columns."""
    return {name: [column[row] for row in rows] for name, column in columns.items()}


class Canary:
    """A share of the entities goes to the version on trial, the rest to the champion."""

    def __init__(
        self, rollout: Rollout, champion: ServedModel, challenger: ServedModel, recorder: TrialRecorder
    ) -> None:
        self.rollout = rollout
        self.champion = champion
        self.challenger = challenger
        self.recorder = recorder
        self._split = Split(rollout, [key.name for key in champion.plan.join_keys])

    def shares(self, columns: Columns, rows: int) -> list[Share]:
        """The champion's rows and the canary's; one share where all are on one side."""
        chosen = self._split.chosen(columns, rows)
        canary = [row for row, is_canary in enumerate(chosen) if is_canary]
        if not canary:
            return [_Observed(self.champion, CHAMPION, self.recorder)]
        if len(canary) == rows:
            return [_Observed(self.challenger, CHALLENGER, self.recorder)]
        rest = [row for row, is_canary in enumerate(chosen) if not is_canary]
        return [
            _Observed(self.champion, CHAMPION, self.recorder, rest),
            _Observed(self.challenger, CHALLENGER, self.recorder, canary),
        ]

    def close(self) -> None:
        """Nothing runs beside the requests."""


class Shadow:
    """The champion answers; the version on trial predicts the same rows afterwards, in a thread of its own.

    Rows that it has no time for are dropped and counted: it never delays an answer and never fails one.
    """

    def __init__(
        self,
        rollout: Rollout,
        champion: ServedModel,
        challenger: ServedModel,
        recorder: TrialRecorder,
        metrics: RequestMetrics,
    ) -> None:
        self.rollout = rollout
        self.champion = champion
        self.challenger = challenger
        self.recorder = recorder
        self._metrics = metrics
        # The same features at the same moment, unless the two are fed by different services.
        self._same_features = (
            champion.model.manifest.schema.service == challenger.model.manifest.schema.service
        )
        self._share = rollout.step.percent / 100
        self._waiting: deque[_Mirrored] = deque()
        self._waiting_rows = 0
        self._thread = ThreadPoolExecutor(1, "banquet-shadow")
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def shares(self, columns: Columns, rows: int) -> list[Share]:  # noqa: ARG002 — as Canary's
        """All rows for the champion, whose answers are mirrored for a share of the requests."""
        if random.random() >= self._share:  # noqa: S311 — a sample, no secret
            return [Share(self.champion, CHAMPION)]
        return [_Observed(self.champion, CHAMPION, self.recorder, mirror=self._mirror)]

    def close(self) -> None:
        """Stop; what waits is dropped, and so is what requests still under way would mirror."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _mirror(self, request_id: str, answers: Sequence[tuple[Answer, Columns]]) -> None:
        for answer, columns in answers:
            rows = answer.rows
            if self._closed or self._waiting_rows + rows > _SHADOW_WAITING_ROWS:
                self._metrics.dropped(self.champion.name, rows)
                continue
            self._waiting.append(_Mirrored(request_id, columns, answer.alone()))
            self._waiting_rows += rows
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._catch_up())

    async def _catch_up(self) -> None:
        while self._waiting:
            if self._waiting_rows < _SHADOW_BATCH_ROWS:
                await asyncio.sleep(_SHADOW_GATHERS_SECONDS)
            try:
                batch = self._take()
                await self._predict(batch)
            except BanquetError as exc:  # Redis is away, say: the champion's requests tell of it
                log.debug("the shadow of %s lost a batch: %s", self.champion.name, exc)
            except Exception:
                log.exception("the shadow of %s failed", self.champion.name)

    def _take(self) -> list[_Mirrored]:
        batch: list[_Mirrored] = []
        rows = 0
        while self._waiting and rows < _SHADOW_BATCH_ROWS:
            batch.append(self._waiting.popleft())
            rows += batch[-1].answer.rows
        self._waiting_rows -= rows
        return batch

    async def _predict(self, batch: list[_Mirrored]) -> None:
        if self._same_features:
            vectors = FeatureVectors.joined([mirrored.answer.vectors for mirrored in batch])
        else:
            names = batch[0].columns
            columns = {name: [value for one in batch for value in one.columns[name]] for name in names}
            vectors = await self.challenger.read(columns, sum(one.answer.rows for one in batch))
        began = time.perf_counter()
        predict = self.challenger.predictor.answer
        together = await asyncio.get_running_loop().run_in_executor(self._thread, predict, vectors)
        seconds_per_row = (time.perf_counter() - began) / vectors.rows
        start = 0
        for mirrored in batch:
            rows = mirrored.answer.rows
            answer = together.slice(start, start + rows)
            start += rows
            _observe(self.recorder, CHALLENGER, [answer], rows * seconds_per_row)
            entities = {key.name: mirrored.columns[key.name] for key in self.champion.plan.join_keys}
            (mine, my_scores), (theirs, their_scores) = _outcomes(mirrored.answer), _outcomes(answer)
            self.recorder.compare(mirrored.request_id, entities, mine, theirs, my_scores, their_scores)


@dataclass(frozen=True, slots=True)
class _Mirrored:
    """A slice of a request that the champion has answered."""

    request_id: str
    columns: Columns
    answer: Answer


class _Observed(Share):
    """A share that the trial's statistics are made of."""

    __slots__ = ("_mirror", "_recorder")

    def __init__(
        self,
        served: ServedModel,
        variant: str,
        recorder: TrialRecorder,
        rows: list[int] | None = None,
        mirror: Callable[[str, Sequence[tuple[Answer, Columns]]], None] | None = None,
    ) -> None:
        super().__init__(served, variant, rows)
        self._recorder = recorder
        self._mirror = mirror

    async def predict(
        self, columns: Columns, rows: int, finish: Callable[[Answer, Columns], Finished], request_id: str
    ) -> list[Finished]:
        answers: list[tuple[Answer, Columns]] = []

        def note(answer: Answer, columns: Columns) -> Finished:
            answers.append((answer, columns))
            return finish(answer, columns)

        began = time.perf_counter()
        slices = await self.served.predict(columns, rows, note)
        seconds = time.perf_counter() - began
        _observe(self._recorder, self.variant, [answer for answer, _ in answers], seconds)
        _remember(self._recorder, self.variant, request_id, answers, self.rows)
        if self._mirror is not None:
            self._mirror(request_id, answers)
        return slices


def _observe(recorder: TrialRecorder, variant: str, answers: Sequence[Answer], seconds: float) -> None:
    """Tell the recorder of one request. What the missing-value policy refuses is no error of the model."""
    errors = rows = 0
    scores: list[float] = []
    for answer in answers:
        rows += answer.rows
        errors += sum(isinstance(error, PredictionFailed) for error in answer.errors.values())
        if answer.scores is not None:
            good = answer.scores
            if answer.errors:
                good = [score for row, score in enumerate(answer.scores) if row not in answer.errors]
            scores.extend(good)
    recorder.observe(variant, rows, errors, seconds, scores)


def _remember(
    recorder: TrialRecorder,
    variant: str,
    request_id: str,
    answers: Sequence[tuple[Answer, Columns]],
    rows: Sequence[int] | None,
) -> None:
    """Let the recorder keep the predictions of one request for the labels that may come."""
    start = 0
    for answer, _ in answers:
        stop = start + answer.rows
        places = range(start, stop) if rows is None else rows[start:stop]
        predictions, scores = answer.predictions, answer.scores
        if answer.errors:
            good = [row for row in range(len(places)) if row not in answer.errors]
            places, predictions = [places[row] for row in good], [predictions[row] for row in good]
            scores = None if scores is None else [scores[row] for row in good]
        recorder.remember(variant, request_id, places, predictions, scores)
        start = stop


def _outcomes(answer: Answer) -> tuple[Sequence[Any], Sequence[float | None] | None]:
    """The predictions and scores of an answer, None where there is an error."""
    predictions, scores = answer.predictions, answer.scores
    if not answer.errors:
        return predictions, scores
    rows = range(answer.rows)
    bad = answer.errors
    return (
        [None if row in bad else predictions[row] for row in rows],
        None if scores is None else [None if row in bad else float(scores[row]) for row in rows],
    )
