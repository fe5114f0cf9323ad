"""Fitted scikit-learn transformers as nodes of an ONNX graph, in float64.

Imputation with indicators, scaling, one-hot encoding, selection and assembly of columns. Knows no estimators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn import compose, feature_selection, impute, pipeline, preprocessing

from training.onnx_graph import Graph


def transform(graph: Graph, transformer: Any, x: str) -> str:
    """The tensor that a fitted transformer makes of ``x``; NotImplementedError for what is not covered."""
    if transformer is None or (isinstance(transformer, str) and transformer == "passthrough"):
        return x
    if isinstance(transformer, feature_selection.SelectorMixin):
        return graph.gather(x, transformer.get_support(indices=True).tolist())
    block = _TRANSFORMERS.get(type(transformer))
    if block is None:
        raise NotImplementedError(f"the transformer {type(transformer).__name__}")
    return block(graph, transformer, x)


def _pipeline_transform(graph: Graph, transformer: Any, x: str) -> str:
    for _, step in transformer.steps:
        x = transform(graph, step, x)
    return x


def _column_transformer(graph: Graph, transformer: Any, x: str) -> str:
    parts = []
    for name, step, _ in transformer.transformers_:
        columns = list(transformer._transformer_to_input_indices[name])
        if columns and not (isinstance(step, str) and step == "drop"):
            parts.append(transform(graph, step, graph.gather(x, columns)))
    return graph.concat(parts)


def _feature_union(graph: Graph, transformer: Any, x: str) -> str:
    if transformer.transformer_weights:
        raise NotImplementedError("a FeatureUnion with weights")
    steps = [step for _, step in transformer.transformer_list if step != "drop"]
    return graph.concat([transform(graph, step, x) for step in steps])


def _imputer(graph: Graph, transformer: Any, x: str) -> str:
    if transformer.missing_values == transformer.missing_values:
        raise NotImplementedError("a SimpleImputer for values other than NaN")
    statistics = np.asarray(transformer.statistics_, dtype=np.float64)
    missing = graph.node("IsNaN", x)
    kept = np.flatnonzero(~np.isnan(statistics)).tolist()
    source, gap = x, missing
    if len(kept) < len(statistics):
        source, gap = graph.gather(x, kept), graph.gather(missing, kept)
    parts = [graph.node("Where", gap, graph.constant(statistics[kept]), source)] if kept else []
    if transformer.add_indicator and len(transformer.indicator_.features_):
        indicated = transformer.indicator_.features_.tolist()
        if len(indicated) < len(statistics):
            missing = graph.gather(missing, indicated)
        parts.append(graph.to_double(missing))
    return graph.concat(parts)


def _missing_indicator(graph: Graph, transformer: Any, x: str) -> str:
    return graph.to_double(graph.node("IsNaN", graph.gather(x, transformer.features_.tolist())))


def _affine(center: str, scale: str) -> Callable[[Graph, Any, str], str]:
    def block(graph: Graph, transformer: Any, x: str) -> str:
        shift, factor = getattr(transformer, center, None), getattr(transformer, scale)
        if shift is not None and getattr(transformer, "with_mean", True):
            x = graph.node("Sub", x, graph.constant(shift))
        return x if factor is None else graph.node("Div", x, graph.constant(factor))

    return block


def _min_max(graph: Graph, transformer: Any, x: str) -> str:
    scaled = graph.node("Mul", x, graph.constant(transformer.scale_))
    scaled = graph.node("Add", scaled, graph.constant(transformer.min_))
    if not transformer.clip:
        return scaled
    low, high = transformer.feature_range
    return graph.node("Clip", scaled, graph.constant(low), graph.constant(high))


def _one_hot(graph: Graph, transformer: Any, x: str) -> str:
    if transformer.min_frequency is not None or transformer.max_categories is not None:
        raise NotImplementedError("a OneHotEncoder that merges rare categories")
    columns: list[int] = []
    values: list[float] = []
    for column, categories in enumerate(transformer.categories_):
        dropped = None if transformer.drop_idx_ is None else transformer.drop_idx_[column]
        kept = [value for i, value in enumerate(categories) if i != dropped]
        columns += [column] * len(kept)
        values += [float(value) for value in kept]
    repeated = graph.gather(x, columns)
    hot = graph.node("Equal", repeated, graph.constant(values))
    if np.isnan(values).any():
        # NaN is a category of its own and equals nothing, itself included.
        both = graph.node("And", graph.node("IsNaN", repeated), graph.constant(np.isnan(values), np.bool_))
        hot = graph.node("Or", hot, both)
    return graph.to_double(hot)


def _function(graph: Graph, transformer: Any, x: str) -> str:
    function = transformer.func
    if transformer.kw_args:
        raise NotImplementedError("a FunctionTransformer with arguments")
    if function is None:
        return x
    if function is np.log1p:
        return graph.node("Log", graph.node("Add", x, graph.constant(1.0)))
    operator = {np.log: "Log", np.exp: "Exp", np.sqrt: "Sqrt", np.abs: "Abs"}.get(function)
    if operator is None:
        raise NotImplementedError("a FunctionTransformer of a function with no ONNX counterpart")
    return graph.node(operator, x)


_TRANSFORMERS: dict[type, Callable[[Graph, Any, str], str]] = {
    pipeline.Pipeline: _pipeline_transform,
    pipeline.FeatureUnion: _feature_union,
    compose.ColumnTransformer: _column_transformer,
    impute.SimpleImputer: _imputer,
    impute.MissingIndicator: _missing_indicator,
    preprocessing.StandardScaler: _affine("mean_", "scale_"),
    preprocessing.RobustScaler: _affine("center_", "scale_"),
    preprocessing.MaxAbsScaler: _affine("", "scale_"),
    preprocessing.MinMaxScaler: _min_max,
    preprocessing.OneHotEncoder: _one_hot,
    preprocessing.FunctionTransformer: _function,
}
