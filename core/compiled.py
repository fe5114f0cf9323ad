"""How a fitted estimator runs: compiled to ONNX where that is exact enough, else as scikit-learn has it.

A runner takes the float64 matrix and returns scores; it knows no feature names, statuses or policies.
Importing this module imports neither scikit-learn nor ONNX Runtime: a worker pays only for what it runs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.manifest import MODEL_FILE, CompiledForm, Task

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

    def __init__(self, estimator: Any, task: Task, classes: Sequence[Any]) -> None:
        self._estimator = estimator
        self._task = task
        self._index = {value: i for i, value in enumerate(classes)}

    @classmethod
    def load(cls, content: bytes, task: Task, classes: Sequence[Any]) -> SklearnRunner:
        """Unpickle an estimator. Only for content whose digest has been checked: unpickling runs code."""
        import joblib

        return cls(joblib.load(io.BytesIO(content)), task, classes)

    def scores(self, matrix: Matrix) -> NDArray[Any]:
        """As the protocol says."""
        if self._task == "classification" and hasattr(self._estimator, "predict_proba"):
            probabilities: NDArray[Any] = self._estimator.predict_proba(matrix)
            return probabilities
        found: NDArray[Any] = np.asarray(self._estimator.predict(matrix))
        if self._task == "classification":
            return np.array([self._index[label] for label in found.tolist()])
        return found.reshape(-1)


def compile_estimator(
    estimator: Any, matrix: Matrix, task: Task, classes: Sequence[Any]
) -> tuple[CompiledForm, bytes | None]:
    """The fastest form that is exact enough on ``matrix``, and its content (None for scikit-learn itself).

    A form is taken when every probability is within ``MAX_DIFFERENCE`` of scikit-learn's (for a regressor
    every value, relatively) and every predicted class is equal.
    """
    reference = SklearnRunner(estimator, task, classes)
    expected = reference.scores(matrix)

    def fallback(reason: str) -> tuple[CompiledForm, None]:
        return CompiledForm("sklearn", MODEL_FILE, 0.0, True, len(matrix), reason), None

    if task == "classification" and expected.ndim == 1:
        return fallback("the estimator gives no probabilities")
    try:
        from skl2onnx import to_onnx
    except ImportError:
        return fallback("skl2onnx is not installed; it comes with feast-banquet[train]")
    closest: CompiledForm | None = None
    reasons: list[str] = []
    options = {"zipmap": False} if task == "classification" else {}
    for dtype in (np.float64, np.float32):
        try:
            graph = to_onnx(estimator, matrix[:1].astype(dtype), options=options, target_opset=_OPSETS)
            content: bytes = graph.SerializeToString()
            found = OnnxRunner(content).scores(matrix)
        except Exception as exc:  # noqa: BLE001 — converters and the runtime fail in many ways; none is fatal
            reasons.append(
                f"{np.dtype(dtype)}: {type(exc).__name__}: {str(exc).strip().splitlines()[0][:160]}"
            )
            continue
        form = _compare(expected, found, task)
        if form.max_difference <= MAX_DIFFERENCE and form.classes_equal:
            return form, content
        if closest is None or form.max_difference < closest.max_difference:
            closest = form
    if closest is not None:
        reasons.append(
            f"ONNX differs by {closest.max_difference:.2g}, classes equal: {closest.classes_equal}"
        )
    return fallback("; ".join(reasons))


# What the pinned converter and runtime both support; the converter's own default may run ahead.
_OPSETS = {"": 21, "ai.onnx.ml": 3}


def _compare(expected: NDArray[Any], found: NDArray[Any], task: Task) -> CompiledForm:
    if found.shape != expected.shape:
        return CompiledForm("onnx", ONNX_FILE, float("inf"), False, len(expected))
    difference = np.abs(found.astype(np.float64) - expected)
    equal = True
    if task == "classification":
        equal = bool((found.argmax(axis=1) == expected.argmax(axis=1)).all())
    else:
        difference = difference / np.maximum(np.abs(expected), 1.0)
    worst = float(difference.max(initial=0.0))
    return CompiledForm("onnx", ONNX_FILE, worst, equal, len(expected))
