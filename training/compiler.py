"""From a fitted estimator to the form that serves: an ONNX graph where it is as good, else scikit-learn.

A form is taken only after it was run on real rows of the matrix and agreed with scikit-learn on all of
them. Knows estimators and graphs, no manifests' names, registries or features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.compiled import MAX_DIFFERENCE, ONNX_FILE, Matrix, OnnxRunner, SklearnRunner
from core.manifest import MODEL_FILE, CompiledForm

_REASON_LENGTH = 200
_TIE = 1e-9


def compile_estimator(
    estimator: Any, matrix: Matrix, file: str = MODEL_FILE
) -> tuple[CompiledForm, bytes | None]:
    """The fastest form that agrees with ``estimator`` on ``matrix``, and its content (None: scikit-learn).

    It agrees when every predicted class is equal (ties within 1e-9 aside) and every probability within
    ``MAX_DIFFERENCE``; for a regressor every value, relatively. Tried in turn: this project's own float64
    graph, then skl2onnx's in float64 and float32 for estimators the first does not know. ``file`` is the
    artifact that holds the estimator.
    """
    expected = SklearnRunner(estimator).scores(matrix)
    reasons: list[str] = []
    try:
        for label, content in _candidates(estimator, matrix, reasons):
            try:
                found = OnnxRunner(content).scores(matrix)
            except Exception as exc:  # noqa: BLE001 — the runtime fails in many ways and none is fatal here
                reasons.append(f"{label}: {_brief(exc)}")
                continue
            difference, equal = compare(expected, found, classifier=hasattr(estimator, "classes_"))
            if difference <= MAX_DIFFERENCE and equal:
                return CompiledForm("onnx", ONNX_FILE, difference, equal, len(matrix)), content
            reasons.append(f"{label}: differs by {difference:.2g}, classes equal: {equal}")
    except ImportError as exc:
        reasons.append(f"{exc.name} is not installed; it comes with feast-banquet[train]")
    return CompiledForm("sklearn", file, 0.0, True, len(matrix), "; ".join(reasons)), None


def _candidates(estimator: Any, matrix: Matrix, reasons: list[str]) -> Iterator[tuple[str, bytes]]:
    from training import onnx_model

    try:
        yield "onnx", onnx_model.build(estimator, matrix.shape[1]).SerializeToString()
    except NotImplementedError as exc:
        reasons.append(f"onnx: not covered: {exc}")
    else:
        return
    if not hasattr(estimator, "predict_proba") and hasattr(estimator, "classes_"):
        return  # skl2onnx gives decision scores in the place of probabilities
    if any(type(part).__name__ in _ENDLESS for part in estimator.get_params(deep=True).values()):
        reasons.append("skl2onnx: its conversion of this estimator does not end")
        return
    from skl2onnx import to_onnx

    options = {"zipmap": False} if hasattr(estimator, "classes_") else {}
    for dtype in (np.float64, np.float32):
        label = f"skl2onnx {np.dtype(dtype)}"
        try:
            graph = to_onnx(
                estimator, matrix[:1].astype(dtype), options=options, target_opset=_SKL2ONNX_OPSETS
            )
        except Exception as exc:  # noqa: BLE001 — as does the converter
            reasons.append(f"{label}: {_brief(exc)}")
        else:
            yield label, graph.SerializeToString()


# What converter and runtime both support; the converter's own default may run ahead of the runtime.
_SKL2ONNX_OPSETS = {"": 21, "ai.onnx.ml": 3}


# Transformers whose skl2onnx conversion runs for hours.
_ENDLESS = frozenset({"QuantileTransformer"})


def _brief(exc: Exception) -> str:
    """One line: converters put whole models into their messages."""
    first = (str(exc).strip().splitlines() or [""])[0]
    return f"{type(exc).__name__}: {first[:_REASON_LENGTH]}"


def compare(expected: NDArray[Any], found: NDArray[Any], *, classifier: bool) -> tuple[float, bool]:
    """The largest difference of two answers, and whether every predicted class is equal.

    ``expected`` and ``found`` are what a runner's ``scores`` gives: differences of probabilities, or of
    values relative to the larger of the expected one's size and 1.
    """
    if found.shape != expected.shape:
        return float("inf"), False
    if not classifier:
        difference = np.abs(found - expected) / np.maximum(np.abs(expected), 1.0)
        return _worst(difference), True
    if expected.ndim == 1:
        return 0.0, bool((found == expected).all())
    rows = np.arange(len(expected))
    chosen, wanted = found.argmax(axis=1), expected.argmax(axis=1)
    # Where two classes tie, the last digit decides, and either is as good.
    gap = expected[rows, wanted] - expected[rows, chosen]
    return _worst(np.abs(found - expected)), bool((gap <= _TIE).all())


def _worst(difference: NDArray[Any]) -> float:
    worst = float(np.max(difference, initial=0.0))
    return worst if worst == worst else float("inf")
