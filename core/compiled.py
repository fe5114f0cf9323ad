"""How a fitted estimator runs: compiled to ONNX where that is exact enough, else as scikit-learn has it.

A runner takes the float64 matrix and returns scores; it knows no feature names, statuses or policies.
Importing this module imports neither scikit-learn nor ONNX Runtime: a worker pays only for what it runs.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

ONNX_FILE = "model.onnx"
MAX_DIFFERENCE = 1e-5


class Runner(Protocol):
    """A model's arithmetic; safe to call from several threads."""

    def scores(self, matrix: Matrix) -> NDArray[Any]:
        """Probabilities of shape (rows, classes); else class indices or values of shape (rows,)."""
        ...


class OnnxRunner:
    """An ONNX graph on one thread of ONNX Runtime: requests are what runs in parallel."""

    def __init__(self, content: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._dtype = np.float64 if "double" in self._session.get_inputs()[0].type else np.float32
        self._outputs = [self._session.get_outputs()[-1].name]

    def scores(self, matrix: Matrix) -> NDArray[Any]:
        """As the protocol says; a classifier without probabilities is never compiled."""
        given = {self._input: matrix.astype(self._dtype, copy=False)}
        found: NDArray[Any] = self._session.run(self._outputs, given)[0]
        return found if found.shape[-1:] != (1,) else found.reshape(-1)


class SklearnRunner:
    """The estimator itself."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        classes = getattr(estimator, "classes_", None)
        self._index = None if classes is None else {label: i for i, label in enumerate(classes.tolist())}

    def scores(self, matrix: Matrix) -> NDArray[Any]:
        """As the protocol says."""
        if self._index is None:
            return np.asarray(self._estimator.predict(matrix)).reshape(-1)
        if hasattr(self._estimator, "predict_proba"):
            probabilities: NDArray[Any] = self._estimator.predict_proba(matrix)
            return probabilities
        return np.array([self._index[label] for label in self._estimator.predict(matrix).tolist()])
