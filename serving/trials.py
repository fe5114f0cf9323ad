"""What a worker notes about an active rollout: gathered on the event loop, added up in Redis once a second.

Gathering costs a few list operations and never waits; counting, comparing and writing happen in ``flush``,
in a thread. While Redis is away what was gathered is kept, as counts, and delivered later; Redis takes each
batch once. Knows no HTTP and no judge; ``serving.trial_store`` knows how things lie in Redis.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import BanquetError
from core.observed import LATENCY_EDGES_SECONDS, PROBABILITY_EDGES, Observed
from core.redis import RedisAddress
from serving.trial_store import LIFETIME_SECONDS, Batch, Comparison, Remembered, TrialName, add, label

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 25_000
# So many gathered numbers are counted at once where no flush comes for them.
_FOLD_AT = 50_000
# Redis does nothing else while a script runs: a sample goes in parts.
_ROWS_PER_BATCH = 500
_DISAGREEMENTS_PER_FLUSH = 100
_TIMEOUT_SECONDS = 2.0
_LATENCY_EDGES = np.array(LATENCY_EDGES_SECONDS)

# Variant, request id, row numbers, predictions, scores.
_Predicted = tuple[str, str, Sequence[int], Sequence[Any], Sequence[float | Sequence[float]] | None]
_Scores = Sequence[float | None] | None
# Request id, entity columns, the champion's and the challenger's predictions, and both's scores.
_Shadowed = tuple[str, Mapping[str, Sequence[Any]], Sequence[Any], Sequence[Any], _Scores, _Scores]


@dataclass(slots=True)
class _Gathered:
    """What one variant did since it was last counted."""

    rows: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class TrialRecorder:
    """The notes of one worker about one trial; make it after the process has forked.

    ``observe``, ``compare`` and ``remember`` are for the event loop, ``flush`` and ``label`` for a thread.

    Args:
        address: the online store.
        project, model, trial_id: which trial.
        classes: the model's classes, the positive one last; none for a regressor.
        score_edges: the bins of scores: PROBABILITY_EDGES for a classifier, ``value_edges`` of predictions of
            the champion for a regressor. The same for every worker of the trial.
        step: the step of the rollout under way; counts of steps are kept apart.
        lifetime_seconds: how long what a trial left stays after its last write.
        sample_rows: predictions per variant that wait for labels at most; an even sample of all.
    """

    def __init__(
        self,
        address: RedisAddress,
        project: str,
        model: str,
        trial_id: str,
        *,
        classes: Sequence[Any] = (),
        score_edges: Sequence[float] = PROBABILITY_EDGES,
        step: int = 0,
        lifetime_seconds: int = LIFETIME_SECONDS,
        sample_rows: int = SAMPLE_ROWS,
    ) -> None:
        self.trial = TrialName(project, model, trial_id)
        self._address = address
        self._classes = tuple(classes)
        self._edges = tuple(score_edges)
        self._edge_array = np.array(score_edges, dtype=np.float64)
        self._step = step
        self._lifetime_seconds = lifetime_seconds
        self._sample_rows = sample_rows
        self._worker = uuid.uuid4().hex
        self._client: Any = None
        self._failing = False
        self._number = 0

        self._gathered: dict[str, _Gathered] = {}
        self._predicted: list[_Predicted] = []
        self._shadowed: list[_Shadowed] = []
        self._size = 0
        # Whoever counts holds the first lock, whoever sends the second; the event loop waits for neither.
        self._counting = threading.Lock()
        self._sending = threading.Lock()
        self._counts: dict[str, Observed] = {}
        self._sample: dict[str, list[Remembered]] = {}
        self._thresholds: dict[str, float] = {}
        self._compared = Comparison()
        self._disagreements: deque[dict[str, Any]] = deque(maxlen=_DISAGREEMENTS_PER_FLUSH)
        self._unconfirmed: list[Batch] = []

    # On the event loop

    def observe(self, variant: str, rows: int, errors: int, seconds: float, scores: Sequence[float]) -> None:
        """Note one request of the trial.

        ``errors`` of its ``rows`` have no number; ``scores`` are those of the other rows (see ``Observed``).
        """
        gathered = self._gathered.get(variant)
        if gathered is None:
            gathered = self._gathered[variant] = _Gathered()
        gathered.rows.append(rows)
        gathered.seconds.append(seconds)
        gathered.scores.extend(scores)
        if errors:
            gathered.errors.append(errors)
        self._grown(rows)

    def compare(
        self,
        request_id: str,
        entities: Mapping[str, Sequence[Any]],
        champion: Sequence[Any],
        challenger: Sequence[Any],
        champion_scores: Sequence[float | None] | None = None,
        challenger_scores: Sequence[float | None] | None = None,
    ) -> None:
        """Note what both variants predicted for the same rows; ``None`` stands for an error.

        ``entities`` are the columns that name the rows. The sequences are read later: they must not change.
        """
        self._shadowed.append(
            (request_id, entities, champion, challenger, champion_scores, challenger_scores)
        )
        self._grown(len(champion))

    def remember(
        self,
        variant: str,
        request_id: str,
        rows: Sequence[int],
        predictions: Sequence[Any],
        scores: Sequence[float | Sequence[float]] | None = None,
    ) -> None:
        """Keep predictions for the labels that may come: those of the ``rows`` of a request, by row number.

        ``scores`` are the probabilities of the last of two classes, or of every class where there are more.
        The sequences are read later: they must not change.
        """
        self._predicted.append((variant, request_id, rows, predictions, scores))
        self._grown(len(rows))

    def begin(self, step: int) -> None:
        """What follows belongs to another step of the rollout."""
        if step != self._step:
            with self._counting:
                self._count()
                self._pack()
                self._step = step

    def _grown(self, rows: int) -> None:
        self._size += rows
        if self._size > _FOLD_AT and self._counting.acquire(blocking=False):
            try:
                self._count()
            finally:
                self._counting.release()

    # In a thread

    def flush(self) -> bool:
        """Add what was gathered to Redis; whether nothing is left to add. Does not raise.

        What cannot be added is kept. Blocks for as long as Redis takes to answer or to time out.
        """
        if not self._sending.acquire(blocking=False):
            return False
        try:
            with self._counting:
                self._count()
                self._pack()
            if self._unconfirmed:
                with self._address.translated():
                    self._send()
            self._failing = False
            return True
        except BanquetError as exc:
            if not self._failing:
                logger.warning("The statistics of trial %s wait for Redis: %s", self.trial.trial_id, exc)
            self._failing = True
            return False
        finally:
            self._sending.release()

    def label(self, request_id: str, labels: Mapping[int, Any]) -> int:
        """Count labels of a request's rows, by row number; how many were counted.

        A row counts once, if its prediction was flushed and is in the sample, and its label is one of the
        classes or, of a regressor, a number. Blocks. Raises ``RedisUnavailable`` or ``RedisReplyError``.
        """
        with self._address.translated():
            return label(
                self._connected(),
                self.trial,
                request_id,
                labels,
                classes=self._classes,
                edges=self._edges,
                step=self._step,
                lifetime_seconds=self._lifetime_seconds,
            )

    def close(self) -> None:
        """Flush once more and let go of the connection."""
        self.flush()
        with self._sending:
            if self._client is not None:
                self._client.close()
                self._client = None

    # Counting

    def _count(self) -> None:
        """Turn what was gathered into counts. The event loop may add to the lists meanwhile."""
        self._size = 0
        try:
            for variant, gathered in list(self._gathered.items()):
                found = self._observed(gathered)
                self._counts[variant] = self._counts.get(variant, Observed()) + found
            for row in _taken(self._shadowed):
                self._compare(*row)
            for row in _taken(self._predicted):
                self._keep(*row)
        except Exception:  # a wrong number must cost the statistics of a second, not the server
            logger.exception("Some statistics of trial %s are lost", self.trial.trial_id)

    def _observed(self, gathered: _Gathered) -> Observed:
        rows = _taken(gathered.rows)
        seconds = np.array(_taken(gathered.seconds), dtype=np.float64)
        scores = np.array(_taken(gathered.scores), dtype=np.float64)
        return Observed(
            rows=sum(rows),
            errors=sum(_taken(gathered.errors)),
            rows_squared=sum(number * number for number in rows),
            latency=_histogram(seconds, _LATENCY_EDGES),
            scores=_histogram(scores[np.isfinite(scores)], self._edge_array),
        )

    def _compare(
        self,
        request_id: str,
        entities: Mapping[str, Sequence[Any]],
        champion: Sequence[Any],
        challenger: Sequence[Any],
        champion_scores: Sequence[float | None] | None,
        challenger_scores: Sequence[float | None] | None,
    ) -> None:
        nothing = [None] * len(champion)
        firsts = nothing if champion_scores is None else champion_scores
        seconds = nothing if challenger_scores is None else challenger_scores
        agreed, distances = 0, []
        for row, (one, two, first, second) in enumerate(
            zip(champion, challenger, firsts, seconds, strict=True)
        ):
            if first is not None and second is not None:
                distance = abs(float(first) - float(second))  # scores may be numpy's
                if math.isfinite(distance):
                    distances.append(distance)
            if one == two or (isinstance(one, float) and isinstance(two, float) and math.isclose(one, two)):
                agreed += 1
                continue
            entity = {name: column[row] for name, column in entities.items()}
            self._disagreements.append(
                {
                    "request_id": request_id,
                    "entity": entity,
                    "champion": {"prediction": one, "score": first},
                    "challenger": {"prediction": two, "score": second},
                }
            )
        before = self._compared
        self._compared = Comparison(
            before.rows + len(champion),
            before.agreed + agreed,
            before.scored + len(distances),
            before.difference + math.fsum(distances),
            max([before.largest, *distances]),
        )

    def _keep(
        self,
        variant: str,
        request_id: str,
        rows: Sequence[int],
        predictions: Sequence[Any],
        scores: Sequence[float | Sequence[float]] | None,
    ) -> None:
        # A request's place is the same everywhere: the lowest places of all workers are an even sample.
        place = zlib.crc32(request_id.encode()) / 2**32
        if place >= self._thresholds.get(variant, 1.0):
            return
        kept = self._sample.setdefault(variant, [])
        for at, row in enumerate(rows):
            score = scores[at] if scores is not None else None
            kept.append(Remembered(f"{request_id}:{row}", place, predictions[at], score))
        if len(kept) > 2 * self._sample_rows:
            self._sample[variant] = sorted(kept, key=lambda one: one.place)[: self._sample_rows]

    # Sending

    def _pack(self) -> None:
        """Make batches of what was counted; whoever calls holds the lock of counting."""
        counts = {variant: found for variant, found in self._counts.items() if found.rows}
        sample = [(variant, one) for variant, kept in self._sample.items() for one in kept]
        if counts or self._compared.rows:
            self._append(counts, {}, self._compared, list(self._disagreements))
        for start in range(0, len(sample), _ROWS_PER_BATCH):
            part: dict[str, list[Remembered]] = {}
            for variant, one in sample[start : start + _ROWS_PER_BATCH]:
                part.setdefault(variant, []).append(one)
            self._append({}, part, Comparison(), [])
        self._counts, self._sample, self._compared = {}, {}, Comparison()
        self._disagreements.clear()

    def _append(
        self,
        counts: dict[str, Observed],
        sample: dict[str, list[Remembered]],
        compared: Comparison,
        disagreements: list[dict[str, Any]],
    ) -> None:
        self._number += 1
        self._unconfirmed.append(
            Batch(self._worker, self._number, self._step, counts, sample, compared, disagreements)
        )

    def _send(self) -> None:
        client = self._connected()
        while self._unconfirmed:
            thresholds = add(
                client,
                self.trial,
                self._unconfirmed[0],
                lifetime_seconds=self._lifetime_seconds,
                most_rows=self._sample_rows,
            )
            self._thresholds.update(thresholds)
            del self._unconfirmed[0]

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self._address.client(socket_timeout=_TIMEOUT_SECONDS)
        return self._client


def _taken(entries: list[Any]) -> list[Any]:
    """The entries of a list, which it loses; what another thread appends meanwhile stays in it."""
    taken = entries[: len(entries)]
    del entries[: len(taken)]
    return taken


def _histogram(values: np.ndarray[Any, np.dtype[np.float64]], edges: Any) -> dict[int, int]:
    """``core.observed.histogram`` of many values."""
    counts = np.bincount(np.searchsorted(edges, values, side="left"))
    return {int(place): int(counts[place]) for place in np.flatnonzero(counts)}
