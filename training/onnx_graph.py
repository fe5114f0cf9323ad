"""An ONNX graph under construction: nodes and constants over one float64 matrix.

Knows ONNX; nothing of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

INPUT = "matrix"
_OPSETS = (("", 21), ("ai.onnx.ml", 5))
_IR_VERSION = 10


class Graph:
    """Nodes and constants under construction; every tensor is float64 with one row per sample."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, values: Any, dtype: type = np.float64) -> str:
        """The name of a new constant tensor."""
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def gather(self, tensor: str, columns: Sequence[int]) -> str:
        """Some columns of a tensor, in that order."""
        return self.node("Gather", tensor, self.constant(columns, np.int64), axis=1)

    def concat(self, tensors: Sequence[str]) -> str:
        """Tensors side by side."""
        return tensors[0] if len(tensors) == 1 else self.node("Concat", *tensors, axis=1)

    def to_double(self, tensor: str) -> str:
        """A tensor of another type as float64."""
        return self.node("Cast", tensor, to=TensorProto.DOUBLE)

    def build(self, width: int, outputs: Mapping[str, tuple[str, int, Sequence[int | None]]]) -> ModelProto:
        """The model; ``outputs`` maps a public name to (tensor, element type, shape)."""
        for public, (tensor, _, _) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [tensor], [public], name=f"output_{public}"))
        graph = helper.make_graph(
            self._nodes,
            "model",
            [helper.make_tensor_value_info(INPUT, TensorProto.DOUBLE, [None, width])],
            [helper.make_tensor_value_info(name, kind, shape) for name, (_, kind, shape) in outputs.items()],
            self._constants,
        )
        model = helper.make_model(
            graph, ir_version=_IR_VERSION, opset_imports=[helper.make_opsetid(*opset) for opset in _OPSETS]
        )
        checker.check_model(model)
        return model
