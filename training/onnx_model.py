"""A fitted scikit-learn pipeline as an ONNX graph in float64.

Covers what pipelines over a feature matrix are usually made of: the transformers of
``training.onnx_transformers``, linear models, trees and boosting, probability calibration. Each step computes
what scikit-learn computes, in the same precision. An estimator it does not know raises NotImplementedError;
whether a graph is good enough to serve is for the caller to measure.

Knows fitted scikit-learn objects and ONNX; nothing of models, manifests or registries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from sklearn import (
    calibration,
    discriminant_analysis,
    ensemble,
    frozen,
    isotonic,
    linear_model,
    model_selection,
    pipeline,
    svm,
    tree,
)

from training import onnx_trees
from training.onnx_graph import INPUT, Graph
from training.onnx_transformers import transform


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a final estimator gives. ``decision`` has one column for two classes, else one per class."""

    value: str | None = None
    decision: str | None = None
    probabilities: str | None = None


def build(estimator: Any, width: int) -> ModelProto:
    """The graph of a fitted estimator over ``width`` columns.

    Input ``matrix``: float64 (rows, width). Outputs: for a regressor ``value`` float64 (rows, 1); for a
    classifier ``probabilities`` float64 (rows, classes), or, where it has none, ``class`` int64 (rows,),
    the index of the predicted class. Raises NotImplementedError for what this module does not cover.
    """
    graph = Graph()
    answer = _answer(graph, estimator, INPUT)
    if answer.probabilities is not None:
        outputs = {
            "probabilities": (answer.probabilities, TensorProto.DOUBLE, [None, len(estimator.classes_)])
        }
    elif answer.decision is not None:
        outputs = {
            "class": (
                _most_likely(graph, answer.decision, len(estimator.classes_)),
                TensorProto.INT64,
                [None],
            )
        }
    else:
        assert answer.value is not None
        outputs = {"value": (answer.value, TensorProto.DOUBLE, [None, 1])}
    return graph.build(width, outputs)


def _most_likely(graph: Graph, decision: str, classes: int) -> str:
    if classes > 2:
        return graph.node("ArgMax", decision, axis=1, keepdims=0)
    positive = graph.node("Greater", decision, graph.constant(0.0))
    flat = graph.node("Reshape", positive, graph.constant([-1], np.int64))
    return graph.node("Cast", flat, to=TensorProto.INT64)


def _answer(graph: Graph, estimator: Any, x: str) -> _Answer:
    block = _ESTIMATORS.get(type(estimator))
    if block is None:
        raise NotImplementedError(f"the estimator {type(estimator).__name__}")
    return block(graph, estimator, x)


def _pipeline_answer(graph: Graph, estimator: Any, x: str) -> _Answer:
    for _, step in estimator.steps[:-1]:
        x = transform(graph, step, x)
    return _answer(graph, estimator.steps[-1][1], x)


def _linear(graph: Graph, estimator: Any, x: str) -> str:
    coefficients = np.atleast_2d(np.asarray(estimator.coef_, dtype=np.float64))
    product = graph.node("MatMul", x, graph.constant(coefficients.T))
    return graph.node("Add", product, graph.constant(np.atleast_1d(estimator.intercept_)))


def _linear_regressor(graph: Graph, estimator: Any, x: str) -> _Answer:
    if np.ndim(estimator.coef_) > 1 and len(estimator.coef_) > 1:
        raise NotImplementedError("a regressor with several outputs")
    return _Answer(value=_linear(graph, estimator, x))


def _linear_classifier(graph: Graph, estimator: Any, x: str) -> _Answer:
    return _Answer(decision=_linear(graph, estimator, x))


def _logistic(graph: Graph, decision: str, width: int) -> _Answer:
    """The probabilities of scores on the logit scale: logistic for one column, softmax for more."""
    if width > 1:
        return _Answer(decision=decision, probabilities=graph.node("Softmax", decision, axis=1))
    return _Answer(decision=decision, probabilities=_with_complement(graph, graph.node("Sigmoid", decision)))


def _with_complement(graph: Graph, second: str) -> str:
    return graph.concat([graph.node("Sub", graph.constant(1.0), second), second])


def _logistic_regression(graph: Graph, estimator: Any, x: str) -> _Answer:
    return _logistic(graph, _linear(graph, estimator, x), len(estimator.intercept_))


def _sum_of_trees(graph: Graph, trees: onnx_trees.TreeEnsemble, x: str) -> str:
    total = graph.node("TreeEnsemble", x, domain="ai.onnx.ml", **trees.attributes())
    return graph.node("Add", total, graph.constant(trees.base)) if trees.base.any() else total


def _rounded(graph: Graph, x: str) -> str:
    """Trees other than histogram gradient boosting compare a row rounded to float32."""
    return graph.to_double(graph.node("Cast", x, to=TensorProto.FLOAT))


def _forest(graph: Graph, estimator: Any, x: str) -> _Answer:
    if estimator.n_outputs_ != 1:
        raise NotImplementedError("trees with several outputs")
    mean = _sum_of_trees(graph, onnx_trees.forest(estimator), _rounded(graph, x))
    if not hasattr(estimator, "classes_"):
        return _Answer(value=mean)
    return _Answer(probabilities=_with_complement(graph, mean) if len(estimator.classes_) == 2 else mean)


def _gradient_boosting(graph: Graph, estimator: Any, x: str) -> _Answer:
    trees = onnx_trees.gradient_boosting(estimator)
    scores = _sum_of_trees(graph, trees, _rounded(graph, x))
    if not hasattr(estimator, "classes_"):
        return _Answer(value=scores)
    if estimator.loss != "exponential":
        return _logistic(graph, scores, trees.targets)
    # Friedman 2000, additive logistic regression: p = 1 / (1 + exp(-2 F)).
    doubled = graph.node("Mul", scores, graph.constant(2.0))
    return _Answer(decision=scores, probabilities=_logistic(graph, doubled, 1).probabilities)


def _histogram_gradient_boosting(graph: Graph, estimator: Any, x: str) -> _Answer:
    trees = onnx_trees.histogram_gradient_boosting(estimator)
    scores = _sum_of_trees(graph, trees, x)
    if hasattr(estimator, "classes_"):
        return _logistic(graph, scores, trees.targets)
    link = type(estimator._loss.link).__name__
    if link == "LogLink":
        return _Answer(value=graph.node("Exp", scores))
    if link != "IdentityLink":
        raise NotImplementedError(f"histogram gradient boosting with {link}")
    return _Answer(value=scores)


def _calibrated(graph: Graph, estimator: Any, x: str) -> _Answer:
    members = [_calibrated_member(graph, member, x) for member in estimator.calibrated_classifiers_]
    if len(members) == 1:
        return _Answer(probabilities=members[0])
    mean = graph.node("Div", graph.node("Sum", *members), graph.constant(float(len(members))))
    return _Answer(probabilities=mean)


def _calibrated_member(graph: Graph, member: Any, x: str) -> str:
    base = _answer(graph, member.estimator, x)
    classes = len(member.classes)
    if list(member.estimator.classes_) != list(member.classes):
        raise NotImplementedError("a calibrated classifier that was fitted on some of the classes")
    if base.decision is not None:
        columns = base.decision
    elif base.probabilities is not None:
        columns = graph.gather(base.probabilities, [1]) if classes == 2 else base.probabilities
    else:
        raise NotImplementedError("calibration of something that is not a classifier")
    if member.method == "sigmoid":
        slope = [calibrator.a_ for calibrator in member.calibrators]
        offset = [calibrator.b_ for calibrator in member.calibrators]
        # Platt 2000: p = 1 / (1 + exp(a f + b)).
        exponent = graph.node("Mul", columns, graph.constant(np.negative(slope)))
        calibrated = graph.node("Sigmoid", graph.node("Sub", exponent, graph.constant(offset)))
    elif member.method == "isotonic":
        width = 1 if classes == 2 else classes
        split = [columns] if width == 1 else [graph.gather(columns, [k]) for k in range(width)]
        calibrated = graph.concat(
            [_isotonic(graph, c, column) for c, column in zip(member.calibrators, split, strict=True)]
        )
    else:
        raise NotImplementedError(f"{member.method} calibration")
    if classes == 2:
        return _with_complement(graph, calibrated)
    total = graph.node("ReduceSum", calibrated, graph.constant([1], np.int64), keepdims=1)
    empty = graph.node("Equal", total, graph.constant(0.0))
    divisor = graph.node("Where", empty, graph.constant(1.0), total)
    return graph.node("Where", empty, graph.constant(1.0 / classes), graph.node("Div", calibrated, divisor))


def _isotonic(graph: Graph, calibrator: isotonic.IsotonicRegression, x: str) -> str:
    """Linear interpolation between the thresholds; ``x`` has one column."""
    if calibrator.out_of_bounds != "clip":
        raise NotImplementedError("isotonic regression that does not clip")
    at = np.asarray(calibrator.X_thresholds_, dtype=np.float64)
    level = np.asarray(calibrator.y_thresholds_, dtype=np.float64)
    if len(at) == 1:
        return graph.node("Add", graph.node("Mul", x, graph.constant(0.0)), graph.constant(level[0]))
    x = graph.node("Clip", x, graph.constant(at[0]), graph.constant(at[-1]))
    passed = graph.node("GreaterOrEqual", x, graph.constant(at[1:-1]))
    count = graph.node(
        "ReduceSum", graph.node("Cast", passed, to=TensorProto.INT64), graph.constant([1], np.int64)
    )
    slope = np.diff(level) / np.diff(at)

    def piece(values: NDArray[np.float64]) -> str:
        return graph.node("Gather", graph.constant(values), count, axis=0)

    run = graph.node("Sub", x, piece(at[:-1]))
    return graph.node("Add", piece(level[:-1]), graph.node("Mul", piece(slope), run))


def _log_linear(graph: Graph, estimator: Any, x: str) -> _Answer:
    return _Answer(value=graph.node("Exp", _linear(graph, estimator, x)))


def _frozen(graph: Graph, estimator: Any, x: str) -> _Answer:
    return _answer(graph, estimator.estimator, x)


def _searched(graph: Graph, estimator: Any, x: str) -> _Answer:
    return _answer(graph, estimator.best_estimator_, x)


_ESTIMATORS: dict[type, Callable[[Graph, Any, str], _Answer]] = {
    pipeline.Pipeline: _pipeline_answer,
    frozen.FrozenEstimator: _frozen,
    model_selection.GridSearchCV: _searched,
    model_selection.RandomizedSearchCV: _searched,
    calibration.CalibratedClassifierCV: _calibrated,
    **dict.fromkeys(
        (
            linear_model.LogisticRegression,
            linear_model.LogisticRegressionCV,
            discriminant_analysis.LinearDiscriminantAnalysis,
        ),
        _logistic_regression,
    ),
    **dict.fromkeys(
        (
            linear_model.LinearRegression,
            linear_model.Ridge,
            linear_model.RidgeCV,
            linear_model.Lasso,
            linear_model.LassoCV,
            linear_model.ElasticNet,
            linear_model.ElasticNetCV,
            linear_model.BayesianRidge,
            linear_model.HuberRegressor,
            linear_model.SGDRegressor,
            svm.LinearSVR,
        ),
        _linear_regressor,
    ),
    **dict.fromkeys((linear_model.PoissonRegressor, linear_model.GammaRegressor), _log_linear),
    **dict.fromkeys(
        (linear_model.RidgeClassifier, linear_model.Perceptron, svm.LinearSVC), _linear_classifier
    ),
    **dict.fromkeys(
        (
            tree.DecisionTreeClassifier,
            tree.DecisionTreeRegressor,
            ensemble.RandomForestClassifier,
            ensemble.RandomForestRegressor,
            ensemble.ExtraTreesClassifier,
            ensemble.ExtraTreesRegressor,
        ),
        _forest,
    ),
    **dict.fromkeys(
        (ensemble.GradientBoostingClassifier, ensemble.GradientBoostingRegressor), _gradient_boosting
    ),
    **dict.fromkeys(
        (ensemble.HistGradientBoostingClassifier, ensemble.HistGradientBoostingRegressor),
        _histogram_gradient_boosting,
    ),
}
