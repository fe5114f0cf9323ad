"""On-demand views at request time: the very function the definition holds, called on columns.

Knows no Redis and no HTTP: columns in, columns out, as Feast's own transformation would see them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from core import layout
from core.errors import InvalidRepository, OnDemandFailed
from core.repository import OnDemandView
from core.types import Dtype, Field, feature_name

Columns = Mapping[str, Sequence[Any]]


class OnDemandTransformation:
    """One on-demand view made callable.

    ``inputs`` maps what the function may read to the column it comes from: each declared source feature
    under its short and its full name, the request-time inputs, and the join keys.
    """

    def __init__(self, view: OnDemandView, name: str, join_keys: Sequence[str]) -> None:
        """Load the view's function.

        Raises:
            InvalidRepository: the view's mode is not one that runs per request, or its function cannot be
                loaded here.
        """
        if view.mode not in ("python", "pandas") or (view.singleton and view.mode != "python"):
            raise InvalidRepository(
                f"On-demand view {view.name!r} has mode {view.mode!r}, which cannot run at request time.",
                hint="Use mode 'python' or 'pandas'.",
            )
        self.name = name
        self.view = view
        self.outputs = [Field(feature.name, feature.dtype) for feature in view.features]
        self.inputs: dict[str, str] = {key: key for key in join_keys}
        self.inputs |= {field.name: field.name for field in view.request_inputs}
        for source in view.sources:
            for feature in source.features:
                column = feature_name(source.name, feature)
                self.inputs[feature] = self.inputs[feature_name(source.view, feature)] = column
                self.inputs[column] = column
        self._function = _load_function(view)
        self._call = self._singleton if view.singleton else self._python
        if view.mode == "pandas":
            self._call = self._pandas

    def __call__(self, columns: Columns, rows: int) -> dict[str, list[Any]]:
        """Compute every feature of the view.

        Args:
            columns: at least the columns that ``inputs`` names, each of length ``rows``.
            rows: number of rows.

        Returns:
            ``view__feature`` to a list of ``rows`` values of the declared type, None where empty.

        Raises:
            OnDemandFailed: the function raised, or did not return what the view declares.
        """
        given = {name: columns[column] for name, column in self.inputs.items()}
        try:
            result = self._call(given, rows)
            return {
                feature_name(self.name, out.name): _typed(result[out.name], out.dtype, rows)
                for out in self.outputs
            }
        except Exception as exc:
            # The function is the user's: whatever it raises is a fault of these rows, not of the server.
            raise OnDemandFailed(
                f"On-demand view {self.name!r} failed on its inputs ({type(exc).__name__}).",
                hint="Let its function return None for inputs it cannot use.",
                view=self.name,
            ) from exc

    def _python(self, given: Columns, _rows: int) -> Mapping[str, Any]:
        # A function that edits its input must not edit what other views and the answer see.
        result: Mapping[str, Any] = self._function({name: list(values) for name, values in given.items()})
        return result

    def _singleton(self, given: Columns, rows: int) -> Mapping[str, Any]:
        results = [self._function({name: values[i] for name, values in given.items()}) for i in range(rows)]
        return {out.name: [result[out.name] for result in results] for out in self.outputs}

    def _pandas(self, given: Columns, _rows: int) -> Mapping[str, Any]:
        import pyarrow as pa

        frame = pa.Table.from_pydict({name: list(values) for name, values in given.items()}).to_pandas()
        result: Mapping[str, Any] = self._function(frame)
        return result


def _load_function(view: OnDemandView) -> Callable[[Any], Any]:
    """The pickled function holds the globals it uses; its source text alone does not."""
    import dill

    failure: Exception | None = None
    if view.function_body:
        try:
            loaded: Callable[[Any], Any] = dill.loads(view.function_body)  # noqa: S301 — the registry is trusted, as by Feast
            return loaded
        except Exception as exc:  # noqa: BLE001 — pickled by another Python: anything may come
            failure = exc
    if view.function_source:
        try:
            return _from_source(view.function_source, view.function_name)
        except Exception as exc:  # noqa: BLE001 — source of any quality
            failure = failure or exc
    version = ".".join(map(str, sys.version_info[:2]))
    raise InvalidRepository(
        f"The function of on-demand view {view.name!r} cannot be loaded by Python {version}.",
        hint="Run `banquet apply` with the Python version that serves.",
    ) from failure


def _from_source(source: str, name: str) -> Callable[[Any], Any]:
    import ast

    tree = ast.parse(source.strip())
    namespace: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list.clear()
            name = (
                name if name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} else node.name
            )
    exec(compile(tree, "<on-demand view>", "exec"), namespace)  # noqa: S102 — the registry is trusted, as by Feast
    function: Callable[[Any], Any] = namespace[name]
    return function


def _typed(values: Any, dtype: Dtype, rows: int) -> list[Any]:
    column = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(column) != rows:
        raise ValueError(f"{len(column)} values for {rows} rows")
    convert = _CONVERT.get(dtype) or partial(_checked, dtype)
    return [None if _missing(value) else convert(value) for value in column]


def _missing(value: Any) -> bool:
    # NaN, NaT and pandas' NA are each how some library spells an empty value.
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return type(value).__name__ in ("NaTType", "NAType")


def _checked(dtype: Dtype, value: Any) -> Any:
    """The value itself; raises InvalidFeatureValue where the declared type cannot hold it."""
    layout.encode_value(value, dtype)
    return value


def _integer(span: range, value: Any) -> int:
    number = int(value)
    if number not in span:
        raise ValueError(f"{number} is out of range")
    return number


def _float32(value: Any) -> float:
    import struct

    single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return single


_CONVERT: dict[Dtype, Callable[[Any], Any]] = {
    Dtype.INT32: partial(_integer, range(-(2**31), 2**31)),
    Dtype.INT64: partial(_integer, range(-(2**63), 2**63)),
    Dtype.DOUBLE: float,
    Dtype.FLOAT: _float32,
    Dtype.BOOL: bool,
    Dtype.STRING: str,
}
