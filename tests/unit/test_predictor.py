"""Where a predict call runs: on the event loop, unless it takes long, and again when it does no more."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np

from core.model import LoadedModel, Matrix
from core.online import FeatureVectors
from core.types import FeatureStatus
from serving.metrics import RequestMetrics
from serving.predictor import VectorPredictor
from tests.support import packages


class Runner:
    """Takes the given time for each row, as if it computed in other threads, and notes its own."""

    seconds = 0.0
    thread = 0

    def scores(self, matrix: Matrix) -> Matrix:
        if self.seconds:
            time.sleep(self.seconds * len(matrix))
        self.thread = threading.get_ident()
        return matrix.sum(axis=1)


def vectors(rows: int) -> FeatureVectors:
    values = {"account__spend": [1.0] * rows, "account__visits": [2] * rows}
    return FeatureVectors(rows, values, dict.fromkeys(values), {"account": [0] * rows})


def test_a_slow_model_moves_to_a_thread_and_comes_back_when_it_is_fast_again() -> None:
    async def run() -> None:
        for runner.seconds, on_the_loop in ((0.01, False), (0.0, True)):
            for _ in range(10_000):
                await predictor.predict(vectors(1))
                if (runner.thread == threading.get_ident()) is on_the_loop:
                    break
            assert (runner.thread == threading.get_ident()) is on_the_loop

    runner = Runner()
    predictor = VectorPredictor(LoadedModel(packages.manifest(), runner), RequestMetrics())
    asyncio.run(run())


def test_an_answer_is_cut_with_its_features() -> None:
    predictor = VectorPredictor(LoadedModel(packages.manifest(), Runner()), RequestMetrics())
    read = vectors(4)
    read.values["account__spend"] = [float(row) for row in range(4)]
    answer = predictor.answer(read).slice(1, 4).slice(1, 3)
    assert (answer.rows, answer.vectors.rows) == (2, 2)
    assert answer.vectors.values == {"account__spend": [2.0, 3.0], "account__visits": [2, 2]}
    assert np.allclose(answer.predictions, [4.0, 5.0])
    kept = answer.alone()
    assert kept.together.rows == 2
    assert (kept.vectors, kept.predictions) == (answer.vectors, answer.predictions)


def test_a_value_that_is_missing_elsewhere_in_the_batch_leaves_an_answer_its_statuses() -> None:
    predictor = VectorPredictor(LoadedModel(packages.manifest(), Runner()), RequestMetrics())
    read = vectors(3)
    read.values["account__spend"][0] = None  # type: ignore[call-overload]
    read.statuses["account__spend"] = [
        FeatureStatus.NULL_VALUE,
        FeatureStatus.PRESENT,
        FeatureStatus.PRESENT,
    ]
    ((name, statuses),) = predictor.answer(read).slice(0, 2).missing
    assert (name, statuses) == ("account__spend", [FeatureStatus.NULL_VALUE, FeatureStatus.PRESENT])
