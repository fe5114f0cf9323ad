"""Tree ensembles as one ONNX node that routes every row, and adds every leaf, as scikit-learn does.

Missing values go where the tree sends them, categorical splits are kept, thresholds and leaves stay
float64. Knows fitted scikit-learn trees and the attributes of that node, nothing else.

Source of the node's semantics: the ONNX operator specification of ``ai.onnx.ml.TreeEnsemble``, version 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

Floats = NDArray[np.float64]

_LESS_OR_EQUAL, _MEMBER = 0, 6


class TreeEnsemble:
    """The sum of trees over ``targets`` outputs, starting from ``base`` (one number per target)."""

    def __init__(self, base: Floats) -> None:
        self.base = base
        self.targets = len(base)
        self._roots: list[int] = []
        self._modes: list[int] = []
        self._features: list[int] = []
        self._splits: list[float] = []
        self._missing_true: list[int] = []
        self._true: list[tuple[int, int]] = []  # (index, is a leaf)
        self._false: list[tuple[int, int]] = []
        self._members: list[float] = []
        self._leaf_targets: list[int] = []
        self._leaf_weights: list[float] = []

    def add(self, tree: Any, target: int, leaf_weights: Floats) -> None:
        """Add a ``sklearn.tree._tree.Tree``; ``leaf_weights`` has one entry per node of it."""
        left, right = tree.children_left, tree.children_right
        self._start(left < 0, leaf_weights, target)
        feature, threshold = tree.feature.tolist(), tree.threshold.tolist()
        missing_left = tree.missing_go_to_left.tolist()
        for i in np.flatnonzero(left >= 0).tolist():
            self._branch(feature[i], threshold[i], int(left[i]), int(right[i]), bool(missing_left[i]))

    def add_histogram(self, tree: Any, target: int, columns: _HistogramColumns) -> None:
        """Add a ``TreePredictor`` of histogram gradient boosting."""
        nodes = tree.nodes
        self._start(nodes["is_leaf"].astype(bool), nodes["value"], target)
        for node in nodes[nodes["is_leaf"] == 0]:
            feature, missing_left = columns.order[node["feature_idx"]], bool(node["missing_go_to_left"])
            left, right = int(node["left"]), int(node["right"])
            values = list(columns.left_values(tree, node)) if node["is_categorical"] else []
            if values:
                self._branch(feature, 0.0, left, right, missing_left, values)
            else:
                # A set without values sends missing ones left only, and no category's code is below zero.
                split = -1.0 if node["is_categorical"] else float(node["num_threshold"])
                self._branch(feature, split, left, right, missing_left)

    def _start(self, is_leaf: NDArray[np.bool_], leaf_weights: Floats, target: int) -> None:
        """Number the nodes and leaves of the next tree, and add its leaves."""
        node, leaf = len(self._modes), len(self._leaf_weights)
        index = np.where(is_leaf, leaf + np.cumsum(is_leaf) - 1, node + np.cumsum(~is_leaf) - 1)
        self._place = list(zip(index.tolist(), is_leaf.astype(int).tolist(), strict=True))
        weights = np.asarray(leaf_weights, dtype=np.float64)[is_leaf]
        self._leaf_weights += weights.tolist()
        self._leaf_targets += [target] * len(weights)
        self._roots.append(node)
        if is_leaf[0]:
            # A tree that is one leaf: a node whose branches both lead to it.
            self._branch(0, 0.0, 0, 0, missing_left=False)

    def _branch(
        self,
        feature: int,
        split: float,
        left: int,
        right: int,
        missing_left: bool,
        members: list[float] | None = None,
    ) -> None:
        self._modes.append(_LESS_OR_EQUAL if members is None else _MEMBER)
        self._features.append(feature)
        self._splits.append(split)
        self._missing_true.append(int(missing_left))
        self._true.append(self._place[left])
        self._false.append(self._place[right])
        if members is not None:
            self._members += [*members, float("nan")]

    def attributes(self) -> dict[str, Any]:
        """The attributes of the TreeEnsemble node."""

        def tensor(kind: int, values: list[Any]) -> Any:
            return helper.make_tensor("", kind, [len(values)], values)

        attributes = {
            "n_targets": self.targets,
            "aggregate_function": 1,
            "post_transform": 0,
            "tree_roots": self._roots,
            "nodes_modes": tensor(TensorProto.UINT8, self._modes),
            "nodes_featureids": self._features,
            "nodes_splits": tensor(TensorProto.DOUBLE, self._splits),
            "nodes_missing_value_tracks_true": self._missing_true,
            "nodes_truenodeids": [index for index, _ in self._true],
            "nodes_trueleafs": [is_leaf for _, is_leaf in self._true],
            "nodes_falsenodeids": [index for index, _ in self._false],
            "nodes_falseleafs": [is_leaf for _, is_leaf in self._false],
            "leaf_targetids": self._leaf_targets,
            "leaf_weights": tensor(TensorProto.DOUBLE, self._leaf_weights),
        }
        if self._members:
            attributes["membership_values"] = tensor(TensorProto.DOUBLE, self._members)
        return attributes


class _HistogramColumns:
    """How a histogram gradient boosting model numbers its columns and categories inside."""

    def __init__(self, model: Any) -> None:
        categorical = model.is_categorical_
        self._known, self._known_row = model._bin_mapper.make_known_categories_bitsets()
        self._categories: list[Floats] = []
        self.order: list[int] = list(range(model.n_features_in_))
        if categorical is not None:
            # The model moves categorical columns to the front and numbers each one's categories.
            self.order = [*np.flatnonzero(categorical).tolist(), *np.flatnonzero(~categorical).tolist()]
            self._categories = model._preprocessor.named_transformers_["encoder"].categories_

    def left_values(self, tree: Any, node: Any) -> Iterator[float]:
        """The values of a categorical split's column that go left, NaN aside."""
        left = tree.raw_left_cat_bitsets[node["bitset_idx"]]
        known = self._known[self._known_row[node["feature_idx"]]]
        for code, value in enumerate(self._categories[node["feature_idx"]].tolist()):
            unseen_left = bool(node["missing_go_to_left"]) and not _has(known, code)
            if value == value and (_has(left, code) or unseen_left):
                yield value


def _has(bitset: NDArray[np.uint32], code: int) -> bool:
    return bool(int(bitset[code // 32]) >> (code % 32) & 1)


def forest(model: Any) -> TreeEnsemble:
    """A decision tree or an averaged forest: the mean value, or the classes' mean probabilities.

    Two classes give one target, the second's probability.
    """
    members = model.estimators_ if hasattr(model, "estimators_") else [model]
    classes = len(model.classes_) if hasattr(model, "classes_") else 0
    targets = [1] if classes == 2 else list(range(classes or 1))
    ensemble = TreeEnsemble(np.zeros(len(targets)))
    for member in members:
        values = member.tree_.value[:, 0, :]
        if classes:
            values = values / values.sum(axis=1, keepdims=True)
        # A leaf of this node adds to one target only, so several classes take several copies.
        for position, target in enumerate(targets):
            ensemble.add(member.tree_, position, values[:, target] / len(members))
    return ensemble


def gradient_boosting(model: Any) -> TreeEnsemble:
    """The raw scores of gradient boosting that starts from its own prior."""
    if model.init not in (None, "zero"):
        raise NotImplementedError("gradient boosting that starts from another estimator")
    ensemble = TreeEnsemble(model._raw_predict_init(np.zeros((1, model.n_features_in_), np.float32)).ravel())
    for stage in model.estimators_:
        for target, member in enumerate(stage):
            ensemble.add(member.tree_, target, member.tree_.value[:, 0, 0] * model.learning_rate)
    return ensemble


def histogram_gradient_boosting(model: Any) -> TreeEnsemble:
    """The raw scores of histogram gradient boosting, missing values and categorical splits included."""
    columns = _HistogramColumns(model)
    ensemble = TreeEnsemble(np.ravel(model._baseline_prediction))
    for stage in model._predictors:
        for target, tree in enumerate(stage):
            ensemble.add_histogram(tree, target, columns)
    return ensemble
